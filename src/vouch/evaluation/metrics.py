"""Ranking metrics from the places of the targets; ties are settled by a rule, so luck has no part.

Candidates with equal scores stand in an order that the model did not choose. Take the `g` candidates of one score, with
`b` candidates strictly above them. Two rules are offered:

- `expected` (default): every metric is its exact mean over all orders of the tied candidates, in closed form
  (McSherry and Najork, ECIR 2008, for several targets). Constant scores are then exactly at chance level, and the
  value without ties is the usual one.
- `midrank`: the metric with the target at the middle place `b + (g + 1) / 2`, as some published tables do. It favours
  no one either, but a wide tie at the top counts as a miss. For one target a case.

AUC is the same under both.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, gammaln

from vouch.errors import ConfigError, did_you_mean

Floats = NDArray[np.float64]
RANKING = ("NDCG", "HR", "Recall", "Precision", "MRR", "MAP", "AUC")
BEYOND = ("Coverage", "Novelty", "Gini", "ILD", "PopularityBias")
DEFAULT_METRICS = ("NDCG@10", "HR@10", "MRR", "NDCG@20", "HR@20")
CELLS = 1 << 21
"""Values held at once."""


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


@functools.cache
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
class Groups:
    """The tied groups that hold a target which may be recommended, `G` of them, by case and best first.

    Attributes:
        case: int64 `(G,)`.
        above: float64 `(G,)` candidates scored strictly higher.
        size: float64 `(G,)` candidates in the group.
        targets: float64 `(G,)` how many of them are targets.
        better: float64 `(G,)` targets of the same case in higher groups.
    """

    case: NDArray[np.int64]
    above: Floats
    size: Floats
    targets: Floats
    better: Floats


@dataclass(frozen=True, eq=False)
class Places:
    """Where the targets of `Q` cases stand; one row a target, `T` in all.

    Attributes:
        case: int64 `(T,)` the case of each target, ascending; every case has one.
        above: float64 `(T,)` candidates scored strictly higher; inf for a target that may not be recommended.
        equal: float64 `(T,)` candidates of the same score, itself included.
        candidates: float64 `(Q,)` candidates of each case, targets included.
        ties: the rule, `expected` or `midrank`.

    Raises:
        ConfigError: `midrank`, and a case has several targets.
    """

    case: NDArray[np.int64]
    above: Floats
    equal: Floats
    candidates: Floats
    ties: str = "expected"

    def __post_init__(self) -> None:
        if self.ties == "midrank" and len(self.case) > len(self.candidates):
            raise ConfigError("ties='midrank' is for one target a case", hint="the default ties='expected' takes any")

    def sum(self, case: NDArray[np.int64], values: Floats) -> Floats:
        """Sums of values over each case, float64 `(Q,)`."""
        return np.asarray(np.bincount(case, weights=values, minlength=len(self.candidates)), dtype=np.float64)

    @functools.cached_property
    def n_targets(self) -> Floats:
        """float64 `(Q,)` targets of each case."""
        return self.sum(self.case, np.ones(len(self.case)))

    @functools.cached_property
    def groups(self) -> Groups:
        """The same places by tied group."""
        allowed = np.isfinite(self.above)
        case, above, size = self.case[allowed], self.above[allowed], self.equal[allowed]
        ones = np.ones(len(case))
        if len(self.case) == len(self.candidates):
            return Groups(case, above, size, ones, np.zeros(len(case)))
        order = np.lexsort((above, case))
        case, above, size = case[order], above[order], size[order]
        new = np.ones(len(case), dtype=bool)
        new[1:] = (case[1:] != case[:-1]) | (above[1:] != above[:-1])
        first = np.flatnonzero(new)
        case, above, size = case[first], above[first], size[first]
        start = np.searchsorted(self.case[allowed], case)  # the targets of a case lie together
        targets = np.diff(np.append(first, len(order))).astype(np.float64)
        return Groups(case, above, size, targets, (first - start).astype(np.float64))


def compute(metric: Metric, places: Places) -> Floats:
    """A ranking metric of every case, float64 `(Q,)`; see the module for ties.

    - `NDCG`: binary gains, discount `1 / log2(rank + 1)`, over the best order of the case's targets.
    - `HR`: whether any target is among the first k. `Recall`, `Precision`: the share of targets, of k places.
    - `MRR`: one over the rank of the best target (0 beyond k).
    - `MAP`: precision at each target's rank up to k, over `min(targets, k)`.
    - `AUC`: the chance that a target stands above a candidate that is none.
    """
    if metric.family == "AUC":
        return _auc(places)
    k = np.inf if metric.k is None else float(metric.k)
    if places.ties == "midrank":
        return _at_midrank(metric.family, places, k)
    if metric.family == "MRR":
        return _reciprocal(places, k)
    if metric.family == "HR":
        return _hit(places, k)
    groups, n_targets = places.groups, places.n_targets
    if metric.family == "NDCG":
        total = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
        gain = groups.targets * _mean_worth(groups, k, total)
        return places.sum(groups.case, gain) / total[np.minimum(n_targets, k).astype(np.int64)]
    if metric.family == "MAP":
        return places.sum(groups.case, _precisions(places, k)) / np.minimum(n_targets, k)
    hits = places.sum(groups.case, groups.targets * _mean_worth(groups, k, np.arange(k + 1)))
    return hits / (k if metric.family == "Precision" else n_targets)


def _at_midrank(family: str, places: Places, k: float) -> Floats:
    """Any metric but AUC, for one target a case."""
    rank = places.above + (places.equal + 1) / 2
    worth = {"NDCG": 1 / np.log2(rank + 1), "MRR": 1 / rank, "MAP": 1 / rank, "Precision": np.full(len(rank), 1 / k)}
    return np.where(rank <= k, worth.get(family, np.ones(len(rank))), 0.0)


def _within(groups: Groups, k: float) -> Floats:
    """How many places of each group are among the first `k`."""
    return np.clip(k - groups.above, 0, groups.size)


def _mean_worth(groups: Groups, k: float, total: Floats) -> Floats:
    """What a target of each group earns `(G,)`; the first `r` places together are worth `total[r]`, up to `k`."""
    low = np.minimum(groups.above, k)
    return (total[(low + _within(groups, k)).astype(np.int64)] - total[low.astype(np.int64)]) / groups.size


def _hit(places: Places, k: float) -> Floats:
    groups = places.groups
    # The chance that the places within k hold no target: C(others, within) / C(size, within).
    within, others = _within(groups, k), groups.size - groups.targets
    log_ratio = (gammaln(groups.size - within + 1) - gammaln(groups.size + 1)) + (
        gammaln(others + 1) - gammaln(np.maximum(others - within, 0) + 1)
    )
    missed = np.where(groups.targets == 1, 1 - within / groups.size, np.exp(log_ratio))
    missed[within > others] = 0.0
    none = np.ones(len(places.candidates))
    np.multiply.at(none, groups.case, missed)
    return 1 - none


def _harmonic(above: Floats, within: Floats) -> Floats:
    """The sum of `1 / rank` over the `within` places after the first `above`."""
    return np.where(within == 1, 1 / (above + 1), digamma(above + within + 1) - digamma(above + 1))


def _reciprocal(places: Places, k: float) -> Floats:
    best = places.groups.better == 0
    case, above = places.groups.case[best], places.groups.above[best]
    size, targets = places.groups.size[best], places.groups.targets[best]
    within = np.clip(k - above, 0, size)
    value = _harmonic(above, within) / size
    several = np.flatnonzero((targets > 1) & (within > 0))
    step = max(1, CELLS // max(1, int(within[several].max(initial=1))))
    for first in range(0, len(several), step):
        rows = several[first : first + step]
        value[rows] = _reciprocal_of_best(above[rows, None], size[rows, None], targets[rows, None], within[rows, None])
    return places.sum(case, value)


def _reciprocal_of_best(above: Floats, size: Floats, targets: Floats, within: Floats) -> Floats:
    """The mean of `1 / rank` of the best of several targets in a tied group, all `(R, 1)`; 0 beyond `within`."""
    j = np.arange(int(within.max()))
    # The chance that the first j + 1 places hold no target: each drawn from what is left.
    later = np.cumprod(np.clip(size - targets - j, 0, None) / np.maximum(size - j, 1), axis=1)
    here = np.hstack([np.ones_like(size), later[:, :-1]]) - later
    return np.asarray((here / (above + j + 1) * (j < within)).sum(1))


def _precisions(places: Places, k: float) -> Floats:
    """The sum of the precisions at the targets of each group `(G,)`."""
    groups = places.groups
    # Place j of the group holds a target with chance targets / size; then the other targets of the group are before
    # it with chance (j - 1) / (size - 1) each. Summed over j = 1 .. within of nth / (above + j).
    within = _within(groups, k)
    inverse = _harmonic(groups.above, within)
    others = (groups.targets - 1) / np.maximum(groups.size - 1, 1)
    expected = (groups.better + 1) * inverse + others * (within - (groups.above + 1) * inverse)
    return groups.targets / groups.size * expected


def _auc(places: Places) -> Floats:
    """Mann-Whitney, ties counting half; targets that may not be recommended share the lowest places."""
    allowed = np.isfinite(places.above)
    n, m = places.candidates, places.n_targets
    others = n - m
    # A target's ascending mid-rank is n - above - (equal - 1) / 2; the banned ones stand at 1 .. banned.
    banned = places.sum(places.case, (~allowed).astype(np.float64))
    midrank = n[places.case] - np.where(allowed, places.above + (places.equal - 1) / 2, 0.0)
    total = places.sum(places.case, np.where(allowed, midrank, 0.0)) + banned * (banned + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (total - m * (m + 1) / 2) / (m * others)
    return np.where(others > 0, value, 0.5)  # nothing to stand above: chance level


def distinct(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different values of `keys`, ascending. A sort is many times as fast as the hashing of `np.unique`."""
    ascending = np.sort(keys)
    return ascending[np.append(True, ascending[1:] != ascending[:-1])] if len(keys) else ascending
