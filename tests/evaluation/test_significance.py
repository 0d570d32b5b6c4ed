"""Intervals and tests: closed forms, an independent library, and calibration on simulated data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.errors import ConfigError, DataError
from vouch.evaluation import bootstrap_interval, holm, paired_test, seed_interval, two_way_interval


def test_the_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=150)
    ours = bootstrap_interval(values, resamples=20_000, level=0.9)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", vectorized=True
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    error = 0.03 * values.std() / np.sqrt(150) * 3  # of a simulated quantile
    assert ours.low == pytest.approx(theirs.low, abs=error)
    assert ours.high == pytest.approx(theirs.high, abs=error)


def test_the_p_value_agrees_with_every_sign_flip():
    generator = np.random.default_rng(1)
    for shift in (0.0, 0.4, 1.0):
        a, b = generator.normal(shift, 1, 12), generator.normal(0, 1, 12)
        exact = scipy.stats.permutation_test(
            (a, b),
            lambda x, y, axis: (x - y).mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=10**4,
        )
        ours = paired_test(a, b, resamples=40_000)
        spread = np.sqrt(exact.pvalue * (1 - exact.pvalue) / 40_000)
        assert ours.effect == pytest.approx(a.mean() - b.mean())
        assert abs(ours.p_value - exact.pvalue) < 5 * spread + 1e-4


def test_p_values_are_uniform_where_there_is_no_difference():
    generator = np.random.default_rng(2)
    n = 400
    p = [paired_test(generator.normal(size=40), generator.normal(size=40), resamples=400).p_value for _ in range(n)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * np.sqrt(level * (1 - level) / n)


def test_a_difference_is_found_and_the_same_in_both_directions():
    generator = np.random.default_rng(3)
    a = generator.random(300)
    b = a - 0.1 + generator.normal(0, 0.2, 300)
    forth, back = paired_test(a, b), paired_test(b, a)
    assert forth.p_value == back.p_value == pytest.approx(1 / 2001)
    assert forth.low > 0 > back.high
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=0.01)


def test_equal_methods_are_not_different():
    same = paired_test(np.ones(20), np.ones(20))
    assert (same.effect, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_cases_without_a_difference_do_not_matter_to_the_p_value():
    a, b = np.array([1.0, 1, 0, 1, 1, 1]), np.array([0.0, 0, 1, 0, 0, 0])
    short = paired_test(a, b, resamples=20_000)
    long = paired_test(np.append(a, np.ones(500)), np.append(b, np.ones(500)), resamples=20_000)
    exact = np.mean([abs(sum(signs)) >= 4 for signs in itertools.product((-1, 1), repeat=6)])
    assert short.p_value == pytest.approx(exact, abs=0.015)
    assert long.p_value == pytest.approx(exact, abs=0.015)


def coverage(interval, make, runs=300):
    generator = np.random.default_rng(4)
    found = [interval(make(generator)) for _ in range(runs)]
    return np.mean([one.low <= 0 <= one.high for one in found])


def test_the_interval_over_cases_covers():
    def skewed(generator):
        return generator.exponential(size=120) - 1

    assert 0.91 <= coverage(lambda values: bootstrap_interval(values, resamples=500), skewed) <= 0.98


@pytest.mark.parametrize(
    ("of_seeds", "of_cases", "of_both"), [(1, 0.1, 0.1), (0, 1, 0.1), (0, 0, 1), (0.1, 1, 1), (0.5, 1, 1)]
)
def test_the_interval_over_seeds_and_cases_covers_whichever_variance_rules(of_seeds, of_cases, of_both):
    def matrix(generator, seeds=5, cases=100):
        return (
            of_seeds * generator.normal(size=(seeds, 1))
            + of_cases * generator.normal(size=(1, cases))
            + of_both * generator.normal(size=(seeds, cases))
        )

    share = coverage(lambda values: two_way_interval(values, resamples=500), matrix)
    assert 0.90 <= share <= 0.99  # 300 runs: 0.95 plus or minus 4 standard errors

    if of_seeds == 1:  # leaving out the seeds, as is often done, misses the truth most of the time
        naive = coverage(lambda values: bootstrap_interval(values.mean(0), resamples=500), matrix)
        assert naive < 0.3


def test_seeds_alone_give_students_interval():
    generator = np.random.default_rng(5)
    by_seed = generator.normal(size=6)
    matrix = np.repeat(by_seed[:, None], 50, axis=1)
    ours, student = two_way_interval(matrix, resamples=40_000), seed_interval(by_seed)
    assert (ours.high - ours.low) == pytest.approx(student.high - student.low, rel=0.06)
    exact = scipy.stats.t.interval(0.95, 5, by_seed.mean(), scipy.stats.sem(by_seed))
    assert (student.low, student.high) == pytest.approx(exact)


def test_seeds_that_agree_add_nothing():
    values = np.random.default_rng(6).random(80)
    one = bootstrap_interval(values)
    five = two_way_interval(np.tile(values, (5, 1)))
    assert (one.low, one.high) == pytest.approx((five.low, five.high), rel=1e-3)


def test_the_same_seed_gives_the_same_interval_in_pieces_of_any_size(monkeypatch):
    matrix = np.random.default_rng(7).random((3, 50))
    first, test = two_way_interval(matrix, seed=1), paired_test(matrix[0], matrix[1], seed=1)
    assert two_way_interval(matrix, seed=2) != first
    monkeypatch.setattr("vouch.evaluation.significance.CELLS", 500)
    assert two_way_interval(matrix, seed=1) == first
    assert paired_test(matrix[0], matrix[1], seed=1).low == test.low


def closed_testing(p):
    """Holm's adjusted values from first principles: the worst Bonferroni value of any subset that holds one."""
    indices = range(len(p))
    subsets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(indices, size)]
    return [min(1.0, max(len(s) * min(p[i] for i in s) for s in subsets if j in s)) for j in indices]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p):
    assert holm(p) == pytest.approx(closed_testing(p))


def test_holm_of_nothing_and_of_nonsense():
    assert holm([]) == []
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([0.1, 1.2])
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([float("nan")])


def test_holm_keeps_the_rate_of_any_false_alarm():
    generator = np.random.default_rng(8)
    corrected = [min(holm(generator.random(10))) for _ in range(2000)]
    assert np.mean(np.array(corrected) <= 0.05) == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 2000))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: bootstrap_interval([]), DataError, "no value"),
        (lambda: bootstrap_interval([1.0, np.nan]), DataError, "not a number"),
        (lambda: bootstrap_interval([[1.0]]), DataError, "dimension"),
        (lambda: bootstrap_interval([1.0], level=95), ConfigError, "between 0 and 1"),
        (lambda: bootstrap_interval([1.0], resamples=0), ConfigError, "at least 1"),
        (lambda: two_way_interval([1.0, 2.0]), DataError, "dimension"),
        (lambda: paired_test([1.0, 2.0], [1.0]), DataError, "same cases"),
        (lambda: paired_test([1.0, np.inf], [1.0, 2.0]), DataError, "not a number"),
        (lambda: seed_interval([]), DataError, "no value"),
        (lambda: seed_interval([1.0, 2.0], level=0), ConfigError, "between 0 and 1"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_one_value_says_nothing_about_others():
    assert seed_interval([0.3]).low == -np.inf
    one = bootstrap_interval([0.3])
    assert one.low == one.high == 0.3
