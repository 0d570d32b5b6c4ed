"""Is the difference real? Intervals by bootstrap, tests by randomisation, corrected for several comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vouch.errors import DataError

CELLS = 1 << 23


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that covers the true one with the chosen confidence."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """A paired difference: its mean, its interval, and the chance of one as large if there were none."""

    effect: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(values: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The percentile bootstrap of a mean over independent cases `(n,)`.

    Raises:
        DataError: there is no value, or one is not a number.
    """
    return two_way_interval(_clean(values)[None, :], level=level, resamples=resamples, seed=seed)


def two_way_interval(matrix: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The bootstrap of a mean over seeds and cases `(S, Q)`: both are drawn with replacement in every resample.

    Drawing `S` seeds with replacement shows only `(S - 1) / S` of their variance, so the deviations of the seed means
    are widened by `sqrt(S / (S - 1))` first.
    """
    values = _clean(matrix)
    seeds, cases = values.shape
    generator = np.random.default_rng(seed)
    means = []
    for weights in _resamples(cases, resamples, generator):
        by_seed = weights @ values.T / cases  # (r, S)
        if seeds > 1:
            own = values.mean(1)
            by_seed = by_seed + (own - own.mean()) * (np.sqrt(seeds / (seeds - 1)) - 1)
            chosen = generator.integers(0, seeds, by_seed.shape)
            by_seed = np.take_along_axis(by_seed, chosen, axis=1)
        means.append(by_seed.mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_test(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Paired:
    """Compare two methods on the same cases: arrays `(n,)`, or `(S, n)` over seeds that are paired as well.

    The effect is `mean(first) - mean(second)`. The interval is the bootstrap over cases (and seeds); the p-value is a
    two-sided randomisation test that flips the sign of each case's difference (averaged over seeds), with the
    observed arrangement counted among the resamples, so it is never 0.

    Raises:
        DataError: the shapes differ.
    """
    a, b = _clean(first), _clean(second)
    if a.shape != b.shape:
        raise DataError(f"paired values have shapes {a.shape} and {b.shape}; they must be the same cases")
    difference = np.atleast_2d(a - b)
    interval = two_way_interval(difference, level=level, resamples=resamples, seed=seed)
    by_case = difference.mean(0)
    observed = abs(by_case.sum())
    generator = np.random.default_rng(seed + 1)
    extreme, n = 0, len(by_case)
    for rows in _pieces(resamples, n):
        signs = generator.integers(0, 2, (rows, n), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ by_case) >= observed * (1 - 1e-12)).sum())
    return Paired(interval.mean, interval.low, interval.high, (extreme + 1) / (resamples + 1))


def seed_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's t interval of a mean over few repeats `(S,)`, such as seeds; infinite for one."""
    from scipy.stats import t

    array = _clean(values)
    n, centre = len(array), float(array.mean())
    if n < 2:
        return Interval(centre, -np.inf, np.inf)
    half = float(t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / np.sqrt(n))
    return Interval(centre, centre - half, centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold jointly for all comparisons made."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))).clip(max=1.0)
    corrected = np.empty_like(p)
    corrected[order] = stepped
    return [float(value) for value in corrected]


def _resamples(n: int, resamples: int, generator: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """How often each of `n` cases is drawn in each resample: blocks `(r, n)`."""
    for rows in _pieces(resamples, n):
        drawn = generator.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _pieces(total: int, width: int) -> Iterator[int]:
    step = max(1, CELLS // max(1, width))
    for start in range(0, total, step):
        yield min(step, total - start)


def _clean(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise DataError("there is no value to test")
    if not np.isfinite(array).all():
        raise DataError("a value to test is not a number")
    return array
