"""What the claims share: data cut to a size that a desk can bear, and two models measured case by case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vouch.claims.claim import Measurement
from vouch.data import Dataset, Split
from vouch.data.filters import keep_rows
from vouch.evaluation import evaluate


def cut(dataset: Dataset, users: int, *, longest: bool = False) -> Dataset:
    """The dataset with at most so many users: a fixed random choice, or those with the longest histories.

    Items that nobody is left to have are dropped. The choice depends on the data alone, so that all seeds share it.
    """
    log = dataset.interactions
    if log.n_users <= users:
        return dataset
    if longest:
        chosen = np.argsort(-log.lengths, kind="stable")[:users]
    else:
        chosen = np.random.default_rng(0).permutation(log.n_users)[:users]
    keep = np.zeros(log.n_users, dtype=bool)
    keep[chosen] = True
    return keep_rows(dataset, keep[log.user], {"users": users, "longest": longest})


def measured(
    made: Split,
    baseline: Any,
    method: Any,
    metric: str = "NDCG@10",
    *,
    also: tuple[str, ...] = ("HR@10",),
    others: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **details: Any,
) -> Measurement:
    """Rank the test cases with both and pair them case by case.

    Args:
        also: metrics that go into the details for both. others: more models whose metrics go into the details.
        options: further arguments of `evaluate`.
    """
    names, options = [metric, *(name for name in also if name != metric)], dict(options or {})
    low, high = (evaluate(model, made.test, metrics=names, **options) for model in (baseline, method))
    more: dict[str, Any] = {}
    for who, found in (("baseline", low), ("method", high)):
        more.update({f"{who}_{name}": found.metrics[name] for name in names[1:]})
    for who, model in (others or {}).items():
        found = evaluate(model, made.test, metrics=names, **options)
        more.update({f"{who}_{name}": found.metrics[name] for name in names})
    a, b = low.metrics[metric], high.metrics[metric]
    return Measurement(a, b, b - a, low.per_case[metric], high.per_case[metric], {**more, **details})
