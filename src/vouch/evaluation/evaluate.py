"""Evaluating a recommender: every case against every item, streamed in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.data import Cases, Catalog, Interactions, Queries
from vouch.errors import ConfigError, DataError, did_you_mean
from vouch.evaluation.beyond import Lists
from vouch.evaluation.metrics import DEFAULT_METRICS, Places, compute, distinct, parse_metric
from vouch.nn.topk import top_k

BLOCK_CELLS = 1 << 22
"""Scores asked for at once: 16 MiB of float32, small enough for the allocator to reuse."""
PIECE_CELLS = 1 << 18
"""Scores compared at once: what stays in a processor's cache."""


class Scorer(Protocol):
    """What can be evaluated; every `Recommender` is one."""

    def score_or_popularity(self, queries: Queries) -> Tensor:
        """Scores float32 `(B, n_items)`."""
        ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result over `Q` cases.

    Attributes:
        metrics: means by name. Names of sampled rankings end in `~100neg` (with the number drawn).
        per_case: ranking metrics of each case, float64 `(Q,)`.
        rank: float64 `(Q,)` rank of the best target, from 1, at the middle of its ties; inf where it may not be
            recommended.
        user: int32 `(Q,)` user codes.
        history_length: int64 `(Q,)`.
        target_popularity: int64 `(Q,)` training count of the first target (0 without `train`).
        protocol: how it was measured: `exclude`, `ties`, `candidates`; and the numbers of `cases`, of `targets`, of
            `targets_in_history` that were misses for that (under `exclude="history"`), and of `cold_targets` that
            `train`, where given, does not have.
    """

    metrics: dict[str, float]
    per_case: dict[str, NDArray[np.float64]]
    rank: NDArray[np.float64]
    user: NDArray[np.int32]
    history_length: NDArray[np.int64]
    target_popularity: NDArray[np.int64]
    protocol: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rank)

    def __repr__(self) -> str:
        return f"Evaluation({len(self):,} cases: {', '.join(f'{name} {v:.4f}' for name, v in self.metrics.items())})"

    @property
    def exclude(self) -> str:
        """What was done with the history: `history` or `none`."""
        return str(self.protocol["exclude"])

    def by_group(self, metric: str, values: NDArray[Any], edges: Sequence[float]) -> list[dict[str, Any]]:
        """Means of a metric by where `values` `(Q,)` fall between `edges` (left closed; the last group is open).

        Returns:
            One row a group that has cases: `{"low", "high", "cases", "mean", "sem"}`; the bounds of open ends are None.

        Raises:
            ConfigError: the metric was not measured by case, or there is not one value a case.
        """
        if metric not in self.per_case:
            raise ConfigError(f"{metric!r} was not measured by case", hint=did_you_mean(metric, self.per_case))
        if len(values) != len(self):
            raise ConfigError(f"there are {len(values)} values for {len(self)} cases")
        group = np.digitize(values, edges)
        rows = []
        for number in np.unique(group):
            inside = self.per_case[metric][group == number]
            low = None if number == 0 else float(edges[number - 1])
            high = None if number == len(edges) else float(edges[number])
            sem = float(inside.std(ddof=1) / np.sqrt(len(inside))) if len(inside) > 1 else 0.0
            rows.append({"low": low, "high": high, "cases": len(inside), "mean": float(inside.mean()), "sem": sem})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the means and the protocol."""
        return {"metrics": dict(self.metrics), "protocol": dict(self.protocol)}


def evaluate(
    model: Scorer,
    cases: Cases,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    exclude: Literal["history", "none"] = "history",
    train: Interactions | None = None,
    catalog: Catalog | None = None,
    ties: Literal["expected", "midrank"] = "expected",
    sampled: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Rank all items for every case and measure where its targets stand.

    Args:
        metrics: names such as `NDCG@10`, `HR@10`, `MRR`, `MAP@10`, `AUC`, `Coverage@10`, `Novelty@10`, `Gini@10`,
            `ILD@10`, `PopularityBias@10`. The last five describe the lists: see `vouch.evaluation.beyond.Lists`.
        exclude: `history` takes every item of the query's history out of the ranking (a target among them is a miss,
            and counted in `protocol`); `none` ranks all.
        ties: how equal scores are settled, see `vouch.evaluation.metrics`.
        sampled: rank the targets among this many uniformly drawn other items instead of all. Such values are biased
            and can reverse the order of models (Krichene and Rendle, KDD 2020); they are named apart.
        seed: of the sampled candidates.

    Raises:
        ConfigError: an unknown metric, or one that lacks what it needs.
        DataError: there is no case, a case has no target, or a score is not a number.
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    wanted = list(dict.fromkeys(parse_metric(name) for name in names))
    _check(cases, exclude=exclude, ties=ties, train=train, catalog=catalog, sampled=sampled)
    n_items = cases.log.n_items
    beyond = [metric for metric in wanted if metric.beyond]
    lists = Lists(beyond, n_items, train=train, catalog=catalog) if beyond else None
    generator = torch.Generator().manual_seed(seed)
    parts: list[Places] = []
    in_history = cold = 0
    for first, last in cases.blocks(max(1, BLOCK_CELLS // n_items)):
        queries = cases.queries(first, last)
        scores = model.score_or_popularity(queries).float()
        if scores.shape != (last - first, n_items):
            raise DataError(f"the model gave scores of shape {tuple(scores.shape)} for {(last - first, n_items)}")
        if scores.sum().isnan() and scores.isnan().any():  # the sum is quick, but inf - inf is none either
            raise DataError("the model gave a score that is not a number", hint="train it again")
        case, target = _targets(cases, first, last, n_items)
        rows, columns = torch.from_numpy(case).to(scores.device), torch.from_numpy(target).to(scores.device)
        if exclude == "history":
            scorable = ~scores[rows, columns].isneginf()
            scores = _without_history(scores, queries)
            in_history += int((scorable & scores[rows, columns].isneginf()).sum())
        if train is not None:
            cold += int((train.item_counts[target] == 0).sum())
        if lists is not None:
            best, item = top_k(scores, min(lists.k, n_items))
            lists.add(item.masked_fill(best.isneginf(), -1).cpu().numpy(), queries)
        if sampled is not None:
            scores = _keep_sample(scores, rows, columns, sampled, generator)
        parts.append(_places(scores, rows, columns))
    places = _join(parts, ties)
    suffix = f"~{sampled}neg" if sampled is not None else ""
    per_case = {metric.name + suffix: compute(metric, places) for metric in wanted if not metric.beyond}
    means = {name: float(values.mean()) for name, values in per_case.items()}
    if lists is not None:
        means.update(lists.values())
    order = [metric.name + ("" if metric.beyond else suffix) for metric in wanted]
    rank = np.full(len(cases), np.inf)
    np.minimum.at(rank, places.case, places.above + (places.equal + 1) / 2)
    first_target = cases.log.item[cases.stop]
    return Evaluation(
        metrics={name: means[name] for name in order},
        per_case=per_case,
        rank=rank,
        user=cases.user,
        history_length=cases.stop - cases.start,
        target_popularity=train.item_counts[first_target] if train is not None else np.zeros(len(cases), np.int64),
        protocol={
            "exclude": exclude,
            "ties": ties,
            "candidates": "all items" if sampled is None else f"{sampled} sampled items (biased)",
            "cases": len(cases),
            "targets": len(places.case),
            "targets_in_history": in_history,
            **({"cold_targets": cold} if train is not None else {}),
        },
    )


def _check(
    cases: Cases,
    *,
    exclude: str,
    ties: str,
    train: Interactions | None,
    catalog: Catalog | None,
    sampled: int | None,
) -> None:
    if len(cases) == 0:
        raise DataError("there is no case to evaluate", hint="check the split")
    if (cases.target_stop <= cases.stop).any():
        row = int(np.argmax(cases.target_stop <= cases.stop))
        raise DataError("a case has no target", where=f"case {row}", hint="leave such cases out with cases.take")
    if exclude not in ("history", "none"):
        raise ConfigError(f"exclude is {exclude!r}; it must be 'history' or 'none'")
    if ties not in ("expected", "midrank"):
        raise ConfigError(f"ties is {ties!r}; it must be 'expected' or 'midrank'")
    for name, given in (("train", train), ("catalog", catalog)):
        if given is not None and len(given.items) != cases.log.n_items:
            raise ConfigError(f"{name} has {len(given.items)} items; the cases have {cases.log.n_items}")
    if sampled is not None and sampled < 1:
        raise ConfigError(f"sampled is {sampled}; it must be at least 1")


def _targets(cases: Cases, first: int, last: int, n_items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct (case, item) targets of a block; cases count from 0 within it."""
    item, offsets = cases.targets(first, last)
    keys = np.repeat(np.arange(last - first), np.diff(offsets)) * n_items + item
    if len(keys) > last - first:
        keys = distinct(keys)
    return keys // n_items, keys % n_items


def _without_history(scores: Tensor, queries: Queries) -> Tensor:
    cells = np.repeat(np.arange(len(queries)) * scores.shape[1], queries.lengths) + queries.item
    return scores.flatten().index_fill(0, torch.from_numpy(cells).to(scores.device), -torch.inf).view_as(scores)


def _places(scores: Tensor, rows: Tensor, columns: Tensor) -> Places:
    """Where the targets `(rows, columns)` stand among the finite scores `(B, n_items)`: counting, no sort."""
    own = scores[rows, columns]
    above, equal = torch.empty_like(own, dtype=torch.float64), torch.empty_like(own, dtype=torch.float64)
    step = max(1, PIECE_CELLS // scores.shape[1])
    for piece in torch.arange(len(rows), device=rows.device).split(step):
        others, mine = scores.index_select(0, rows[piece]), own[piece].unsqueeze(1)
        truth = torch.empty_like(others)
        above[piece] = _count(torch.gt(others, mine, out=truth))
        equal[piece] = _count(torch.eq(others, mine, out=truth))
    banned = own.isneginf()
    finite = [_count(torch.gt(part, -torch.inf, out=torch.empty_like(part))) for part in scores.split(step)]
    candidates = torch.cat(finite)
    candidates.index_add_(0, rows, banned.double())
    return Places(
        rows.cpu().numpy(),
        above.masked_fill(banned, torch.inf).cpu().numpy(),
        equal.masked_fill(banned, 1.0).cpu().numpy(),
        candidates.cpu().numpy(),
    )


def _count(truth: Tensor) -> Tensor:
    """Ones of each row of a float32 `(B, N)`, float64 `(B,)`. Summing floats is four times as fast as counting bools."""
    exact = torch.float32 if truth.shape[1] < 1 << 24 else torch.float64
    return truth.sum(1, dtype=exact).double()


def _join(parts: list[Places], ties: str) -> Places:
    shift = np.cumsum([0, *(len(part.candidates) for part in parts)])
    return Places(
        np.concatenate([part.case + start for part, start in zip(parts, shift, strict=False)]),
        np.concatenate([part.above for part in parts]),
        np.concatenate([part.equal for part in parts]),
        np.concatenate([part.candidates for part in parts]),
        ties,
    )


def _keep_sample(scores: Tensor, rows: Tensor, columns: Tensor, sampled: int, generator: torch.Generator) -> Tensor:
    """Scores in which only the targets and `sampled` other candidates, drawn without replacement, are left."""
    keys = torch.rand(scores.shape, generator=generator).to(scores.device)
    keys[torch.isneginf(scores)] = -1
    keys[rows, columns] = -1
    drawn, index = keys.topk(min(sampled, scores.shape[1]), dim=1)
    kept = torch.full_like(scores, -torch.inf)
    kept.scatter_(1, index, torch.where(drawn >= 0, scores.gather(1, index), scores.new_tensor(-torch.inf)))
    kept[rows, columns] = scores[rows, columns]
    return kept
