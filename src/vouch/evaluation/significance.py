"""Is the difference real? Intervals by bootstrap, tests by randomisation, corrected for several comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vouch.errors import ConfigError, DataError

CELLS = 1 << 22
"""Drawn values held at once."""


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
        ConfigError: the level is not between 0 and 1, or there is no resample.
    """
    return two_way_interval(_clean(values, 1)[None, :], level=level, resamples=resamples, seed=seed)


def two_way_interval(matrix: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The bootstrap of a mean over seeds and cases `(S, Q)`: what other seeds and other cases would have given.

    Each resample draws `Q` cases with replacement, with their mean over the seeds, and adds the mean of `S` drawn seed
    effects. A seed's effect is how far its own mean is from the grand mean, corrected three times: the noise of cases
    in it is taken out (`1 - s_e^2 / (Q s^2)`, s_e^2 the residual variance; the cases drawn carry it already), the
    share of variance that a bootstrap of `S` values loses is put back (`S / (S - 1)`), and as `S` is small Student's
    quantile takes the place of the normal one. Cases alone are resampled where there is one seed: then nothing is
    said about other seeds. Simulated coverage at 95 % is 0.92 to 0.97 from three seeds on, whichever variance rules.

    Raises:
        DataError: there is no value, or one is not a number.
        ConfigError: the level is not between 0 and 1, or there is no resample.
    """
    values = _clean(matrix, 2)
    _check(level, resamples)
    of_cases, of_seeds = np.random.default_rng(seed).spawn(2)
    by_case, effects = values.mean(0), _seed_effects(values, level)
    means = []
    for rows in _pieces(resamples, values.size):
        drawn = by_case[of_cases.integers(0, len(by_case), (rows, len(by_case)))].mean(1)
        means.append(drawn + effects[of_seeds.integers(0, len(effects), (rows, len(effects)))].mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _seed_effects(values: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """The deviations of the seeds `(S,)` to draw from, see `two_way_interval`."""
    from scipy.stats import norm, t

    seeds, cases = values.shape
    effects = values.mean(1) - values.mean()
    variance = (effects**2).sum() / max(1, seeds - 1)
    if variance == 0:
        return np.zeros(seeds)
    residual = values - values.mean(0) - effects[:, None]
    noise = (residual**2).sum() / max(1, (seeds - 1) * (cases - 1)) / cases
    quantile = (1 + level) / 2
    return (
        effects
        * np.sqrt(max(0.0, 1 - noise / variance) * seeds / (seeds - 1))
        * (t.ppf(quantile, seeds - 1) / norm.ppf(quantile))
    )


def paired_test(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Paired:
    """Compare two methods on the same cases: arrays `(n,)`, or `(S, n)` over seeds that are paired as well.

    The effect is `mean(first) - mean(second)`. The interval is that of `two_way_interval`. The p-value is a two-sided
    randomisation test that flips the sign of each case's difference (averaged over seeds) at random; the observed
    arrangement counts among the resamples, `(count + 1) / (resamples + 1)`, so it is never 0. It holds for the seeds
    that were run, the interval for others as well: call a difference real only where both say so.

    Raises:
        DataError: the shapes differ, there is no value, or one is not a number.
        ConfigError: the level is not between 0 and 1, or there is no resample.
    """
    a, b = np.atleast_2d(np.asarray(first, np.float64)), np.atleast_2d(np.asarray(second, np.float64))
    if a.shape != b.shape:
        raise DataError(f"paired values have shapes {a.shape} and {b.shape}; they must be the same cases")
    difference = _clean(a - b, 2)
    interval = two_way_interval(difference, level=level, resamples=resamples, seed=seed)
    by_case = difference.mean(0)
    by_case = by_case[by_case != 0]  # a zero has no sign to flip
    observed = abs(by_case.sum())
    generator = np.random.default_rng(seed + 1)
    extreme = 0
    for rows in _pieces(resamples, len(by_case)):
        signs = generator.integers(0, 2, (rows, len(by_case)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ by_case) >= observed * (1 - 1e-12)).sum())
    return Paired(interval.mean, interval.low, interval.high, (extreme + 1) / (resamples + 1))


def seed_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's t interval of a mean over few repeats `(S,)`, such as seeds; infinite for one.

    Raises:
        DataError: there is no value, or one is not a number.
        ConfigError: the level is not between 0 and 1.
    """
    from scipy.stats import t

    array = _clean(values, 1)
    _check(level)
    n, centre = len(array), float(array.mean())
    if n < 2:
        return Interval(centre, -np.inf, np.inf)
    half = float(t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / np.sqrt(n))
    return Interval(centre, centre - half, centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold jointly for all comparisons made, in the order given.

    Raises:
        DataError: a p-value is not between 0 and 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError(f"p-values must lie between 0 and 1: {list(p_values)}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))).clip(max=1.0)
    corrected = np.empty_like(p)
    corrected[order] = stepped
    return [float(value) for value in corrected]


def _pieces(total: int, width: int) -> Iterator[int]:
    """Split `total` resamples of `width` values so that each piece stays within `CELLS`."""
    step = max(1, CELLS // max(1, width))
    for start in range(0, total, step):
        yield min(step, total - start)


def _clean(values: ArrayLike, dimensions: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise DataError(f"the values have shape {array.shape}; {dimensions} dimension(s) are expected")
    if array.size == 0:
        raise DataError("there is no value to test")
    if not np.isfinite(array).all():
        raise DataError("a value to test is not a number")
    return array


def _check(level: float, resamples: int = 1) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; it must lie between 0 and 1", hint="for example 0.95")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; it must be at least 1")
