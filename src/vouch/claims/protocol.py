"""What the claims share: data cut to a size that a desk can bear, and two models measured case by case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vouch import registry
from vouch.claims.claim import Claim, Measurement, Scale
from vouch.data import Dataset, Split, split
from vouch.data.filters import keep_rows
from vouch.evaluation import evaluate
from vouch.training import Run


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


BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"epochs": 2, "hidden_size": 16, "negatives": 32, "max_length": 10},
    "desk": {"epochs": 24, "evaluate_every": 3, "hidden_size": 64, "negatives": 512},
    "full": {"epochs": 200, "evaluate_every": 2, "negatives": 1024},
}
"""What both sides of a claim about sequences get."""
USERS = 6_000
"""Users of a desk claim, those with the longest histories: what they share decides more than who they are."""
SEQUENTIAL: dict[str, Any] = {"batch_size": 256, "patience": 4, "dropout": 0.5}


class Pair(Claim):
    """A claim that sets one method with its settings against another, on the same split with the same budget.

    Attributes:
        baseline_is, method_is: slug and settings of each side; the scale's budget and `shared` stand below them.
        shared: settings of both. users: how many are kept at desk.
    """

    baseline_is: ClassVar[tuple[str, Mapping[str, Any]]]
    method_is: ClassVar[tuple[str, Mapping[str, Any]]]
    shared: ClassVar[Mapping[str, Any]] = SEQUENTIAL
    users: ClassVar[int] = USERS
    metric = "NDCG@10"
    also: ClassVar[tuple[str, ...]] = ("HR@10",)

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}

    def prepare(self, dataset: Dataset, scale: Scale, seed: int) -> Split:
        """The split that both sides see."""
        del seed
        return split(cut(dataset, self.users, longest=True) if scale == "desk" else dataset)

    def train(self, side: tuple[str, Mapping[str, Any]], made: Split, scale: Scale, seed: int) -> Any:
        """One side."""
        kind, settings = registry.method(side[0]), {**BUDGET[scale], **self.shared, **side[1]}
        smoke = {name: value for name, value in BUDGET["smoke"].items() if scale == "smoke"}
        known = {
            name: value
            for name, value in {**settings, **smoke}.items()
            if "." in name or name in kind.Config.model_fields
        }
        model = kind(**known)
        report = model.fit(made, Run(seed=seed))
        self.seconds[side[0], str(side[1])] = report.seconds / max(1, report.epochs)
        return model

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train both and pair them case by case."""
        made = self.prepare(dataset, scale, seed)
        baseline, method = (self.train(side, made, scale, seed) for side in (self.baseline_is, self.method_is))
        more = {**getattr(method, "diagnostics", {}), **self.cost()}
        return measured(made, baseline, method, self.metric, also=self.also, options=self.options(), **more)

    def cost(self) -> dict[str, float]:
        """Seconds of an epoch, validation included, of method by baseline."""
        low, high = (self.seconds.get((side[0], str(side[1])), 0.0) for side in (self.baseline_is, self.method_is))
        return {"epoch_seconds_ratio": high / low} if low > 0 and high > 0 else {}

    def options(self) -> dict[str, Any]:
        """Further arguments of `evaluate`."""
        return {}
