"""Ranking metrics from the places of the targets; ties are settled by a rule, so luck has no part.

For a target with `b` candidates strictly above it and `g` candidates of its own score (itself included), a fair coin
would place it at `b + 1 .. b + g` with equal chance. Two rules are offered:

- `expected` (default): the metric's expectation over those places. Constant scores are then exactly at chance level.
- `midrank`: the metric at the middle place `b + (g + 1) / 2`, as some published tables do. It favours no one either,
  but a wide tie at the top counts as a miss.

NDCG, Recall and Precision are sums over targets, so their expectation is exact; so are HR and MRR where there is one
target. HR, MRR and MAP of several targets are not sums: there, under both rules, equal scores are placed in the order
of one fixed random permutation of the items.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.errors import ConfigError, did_you_mean

Floats = NDArray[np.float64]
RANKING = ("NDCG", "HR", "Recall", "Precision", "MRR", "MAP", "AUC")
BEYOND = ("Coverage", "Novelty", "Gini", "ILD", "PopularityBias")
DEFAULT_METRICS = ("NDCG@10", "HR@10", "MRR", "NDCG@20", "HR@20")


@dataclass(frozen=True)
class Metric:
    """A metric's family and cut-off (None: the whole ranking)."""

    name: str
    family: str
    k: int | None

    @property
    def beyond(self) -> bool:
        """Whether it describes the lists rather than their accuracy."""
        return self.family in BEYOND


def parse_metric(name: str) -> Metric:
    """Read a name such as `NDCG@10`, `MRR`, `Coverage@20`.

    Raises:
        ConfigError: the family is unknown, or the cut-off is missing, superfluous or below 1.
    """
    found = re.fullmatch(r"([A-Za-z]+)(?:@(\d+))?", name.strip())
    families = {family.lower(): family for family in (*RANKING, *BEYOND)}
    if not found or found[1].lower() not in families:
        raise ConfigError(
            f"there is no metric {name!r}", hint=did_you_mean(name, [f"{family}@10" for family in families.values()])
        )
    family, k = families[found[1].lower()], int(found[2]) if found[2] else None
    if k is not None and k < 1:
        raise ConfigError(f"metric {name!r} has the cut-off {k}; it must be at least 1")
    if k is None and family not in ("MRR", "AUC"):
        raise ConfigError(f"metric {name!r} needs a cut-off", hint=f"for example {family}@10")
    if k is not None and family == "AUC":
        raise ConfigError("AUC has no cut-off", hint="write AUC")
    return Metric(family if k is None else f"{family}@{k}", family, k)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the targets of `Q` cases stand; one row a target.

    Attributes:
        case: int64 `(T,)` the case of each target, ascending.
        above: float64 `(T,)` candidates scored strictly higher; inf for a target that may not be recommended.
        equal: float64 `(T,)` candidates of the same score, itself included.
        broken: float64 `(T,)` rank from 1 with ties placed by the fixed permutation; inf as above.
        candidates: float64 `(Q,)` candidates of each case, targets included.
        n_cases: Q.
        ties: the rule, `expected` or `midrank`.
    """

    case: NDArray[np.int64]
    above: Floats
    equal: Floats
    broken: Floats
    candidates: Floats
    n_cases: int
    ties: str = "expected"

    @property
    def n_targets(self) -> Floats:
        """float64 `(Q,)` targets of each case."""
        return np.asarray(np.bincount(self.case, minlength=self.n_cases), dtype=np.float64)

    def sum(self, values: Floats) -> Floats:
        """Sums of a value per target `(T,)` over each case `(Q,)`."""
        return np.asarray(np.bincount(self.case, weights=values, minlength=self.n_cases), dtype=np.float64)


def compute(metric: Metric, places: Places) -> Floats:
    """A ranking metric of every case, float64 `(Q,)`."""
    one = bool((places.n_targets == 1).all())
    if metric.family == "NDCG":
        assert metric.k is not None
        gain = places.sum(_gain(places, lambda rank: 1 / np.log2(rank + 1), metric.k))
        ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, metric.k + 2)))])
        return gain / ideal[np.minimum(places.n_targets, metric.k).astype(np.int64)]
    if metric.family in ("Recall", "Precision") or (metric.family == "HR" and one):
        assert metric.k is not None
        hits = places.sum(_gain(places, np.ones_like, metric.k))
        return hits / (metric.k if metric.family == "Precision" else places.n_targets)
    if metric.family == "HR":
        assert metric.k is not None
        return places.sum((places.broken <= metric.k).astype(np.float64)).clip(max=1.0)
    if metric.family == "MRR" and one:
        return places.sum(_reciprocal(places, metric.k))
    if metric.family == "MRR":
        first = np.full(places.n_cases, np.inf)
        np.minimum.at(first, places.case, places.broken)
        return np.where(first <= (metric.k or np.inf), 1 / first, 0.0)
    if metric.family == "MAP":
        return _average_precision(places, metric.k or 0)
    return _auc(places)


def _gain(places: Places, worth: Callable[[Floats], Floats], k: int) -> Floats:
    """What each target earns `(T,)`, where place `r` up to `k` is worth `worth(r)` and later ones nothing."""
    if places.ties == "midrank":
        rank = places.above + (places.equal + 1) / 2
        return np.where(rank <= k, worth(np.minimum(rank, k)), 0.0)
    total = np.concatenate([[0.0], np.cumsum(worth(np.arange(1, k + 1, dtype=np.float64)))])
    low = np.minimum(places.above, k).astype(np.int64)
    high = np.minimum(places.above + places.equal, k).astype(np.int64)
    return (total[high] - total[low]) / places.equal


def _reciprocal(places: Places, k: int | None) -> Floats:
    """`1 / rank` of each target; its expectation over a tie is a difference of harmonic numbers, by digamma."""
    from scipy.special import digamma

    if places.ties == "midrank":
        rank = places.above + (places.equal + 1) / 2
        return np.where(rank <= (k or np.inf), 1 / rank, 0.0)
    allowed = np.isfinite(places.above)
    low = np.where(allowed, places.above, 0.0)
    high = low + places.equal
    if k is not None:
        low, high = np.minimum(low, k), np.minimum(high, k)
    harmonic = digamma(high + 1) - digamma(low + 1)
    return np.where(allowed, harmonic / places.equal, 0.0)


def _average_precision(places: Places, k: int) -> Floats:
    order = np.lexsort((places.broken, places.case))
    case, rank = places.case[order], places.broken[order]
    starts = np.searchsorted(case, np.arange(places.n_cases))
    nth = np.arange(len(case)) - starts[case] + 1
    precision = np.where(rank <= k, nth / rank, 0.0)
    return np.bincount(case, weights=precision, minlength=places.n_cases) / np.minimum(places.n_targets, k)


def _auc(places: Places) -> Floats:
    """Probability that a target stands above a candidate that is none, ties counting half (Mann-Whitney)."""
    allowed = np.isfinite(places.above)
    n, m = places.candidates, places.n_targets
    banned = places.sum((~allowed).astype(np.float64))
    # Ascending mid-ranks; targets that may not be recommended share the lowest places.
    from_below = n[places.case] - np.where(allowed, places.above, 0.0) - (places.equal - 1) / 2
    midrank = np.where(allowed, from_below, (banned[places.case] + 1) / 2)
    others = n - m
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (places.sum(midrank) - m * (m + 1) / 2) / (m * others)
    return np.where(others > 0, value, 0.5)  # nothing to stand above: chance level

