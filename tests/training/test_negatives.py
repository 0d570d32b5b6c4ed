"""Negatives: never a known item when asked so, and drawn from the distribution that is promised."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from vouch.data import Interactions
from vouch.errors import ConfigError, TrainingError
from vouch.training import NegativeSampler, negatives

N = 12
DRAWS = 40_000


def log_of(histories: list[list[int]], n_items: int = N) -> Interactions:
    """A log of users 'u0', 'u1', ... over items 0 .. n_items - 1, all of which are in the vocabulary."""
    everything = Interactions.from_arrays(
        ["zz"] * n_items + [f"u{u}" for u, items in enumerate(histories) for _ in items],
        [*range(n_items), *(item for items in histories for item in items)],
    )
    return everything.where(everything.user < len(histories))


@pytest.fixture(params=["table", "search"])
def lookup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of testing membership."""
    if request.param == "search":
        monkeypatch.setattr(negatives, "TABLE_CELLS", 0)
    yield request.param


def p_value(drawn: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    possible = expected > 0
    counts = np.bincount(drawn.reshape(-1), minlength=len(expected))
    assert counts[~possible].sum() == 0, "an item was drawn that cannot be"
    if possible.sum() == 1:
        return 1.0
    share = expected[possible] / expected[possible].sum()
    return float(chisquare(counts[possible], share * counts.sum()).pvalue)


HISTORIES = [[0, 1, 1, 1, 2], [3], list(range(N - 1)), [5, 5, 5, 5, 6, 7, 8, 8], [11, 11, 0]]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_popularity_is_the_count_to_a_power(alpha: float) -> None:
    log = log_of(HISTORIES)
    weight = log.item_counts.astype(float) ** alpha
    sampler = NegativeSampler(log, "popularity", alpha=alpha, avoid_known=False)
    drawn = sampler.sample(np.zeros(DRAWS // 4, np.int64), 4, np.random.default_rng(0))
    assert drawn.shape == (DRAWS // 4, 4) and drawn.dtype == np.int64
    assert p_value(drawn, weight) > 1e-3
    np.testing.assert_allclose(np.exp(sampler.log_q().numpy()), weight / weight.sum(), rtol=1e-6)
    assert sampler.log_q().dtype.is_floating_point and sampler.log_q().shape == (N,)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
@pytest.mark.parametrize("rounds", [0, 1, 12])
def test_avoiding_conditions_the_distribution(
    kind: str, rounds: int, lookup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each user's draws follow q restricted to what the user lacks, by redraws (12), exactly (0), and mixed (1)."""
    monkeypatch.setattr(negatives, "ROUNDS", rounds)
    monkeypatch.setattr(negatives, "EXACT_CELLS", 1000)  # several blocks
    log = log_of(HISTORIES)
    weight = np.ones(N) if kind == "uniform" else log.item_counts**0.75
    sampler = NegativeSampler(log, kind)  # type: ignore[arg-type]
    users = np.arange(len(HISTORIES)).repeat(DRAWS // 4)
    drawn = sampler.sample(users, 2, np.random.default_rng(1))
    for user, history in enumerate(HISTORIES):
        allowed = weight.copy()
        allowed[history] = 0.0
        assert p_value(drawn[users == user], allowed) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    histories=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=6),
    kind=st.sampled_from(["uniform", "popularity"]),
    seed=st.integers(0, 1000),
    search=st.booleans(),
)
def test_never_a_known_item(histories: list[list[int]], kind: str, seed: int, search: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "TABLE_CELLS", 0 if search else 1 << 20)
        log = log_of(histories, n_items=6)
        can = {item for items in histories for item in items} if kind == "popularity" else set(range(6))
        sampler = NegativeSampler(log, kind)  # type: ignore[arg-type]
        for user, items in enumerate(histories):
            if can <= set(items):
                with pytest.raises(TrainingError, match=f"no negative available for user 'u{user}'"):
                    sampler.sample(np.array([user]), 3, np.random.default_rng(seed))
            else:
                drawn = sampler.sample(np.full(20, user), 3, np.random.default_rng(seed))
                assert set(drawn.reshape(-1).tolist()) <= can - set(items)


def test_membership(lookup: str) -> None:
    log = log_of(HISTORIES)
    sampler = NegativeSampler(log, avoid_known=False)
    users, items = np.meshgrid(np.arange(len(HISTORIES)), np.arange(N), indexing="ij")
    expected = [[item in history for item in range(N)] for history in HISTORIES]
    np.testing.assert_array_equal(sampler.is_known(users, items), expected)


def test_items_without_events_are_never_popular() -> None:
    """Also not the last ones, where rounding of the cumulated distribution would put them."""
    log = log_of([[0, 1, 2]] * 7, n_items=2000)
    drawn = NegativeSampler(log, "popularity", avoid_known=False).draw(200_000, np.random.default_rng(0))
    assert drawn.max() == 2

    class Highest:
        def random(self, size: int) -> NDArray[np.float64]:
            return np.full(size, np.nextafter(1.0, 0.0))

    assert NegativeSampler(log, "popularity").draw(3, Highest()).tolist() == [2, 2, 2]  # type: ignore[arg-type]


def test_the_generator_decides() -> None:
    sampler = NegativeSampler(log_of(HISTORIES))
    users = np.arange(5).repeat(50)
    first, again, other = (sampler.sample(users, 3, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_bad_arguments() -> None:
    log = log_of(HISTORIES)
    with pytest.raises(ConfigError, match="'in-batch'"):
        NegativeSampler(log, "in-batch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="-1"):
        NegativeSampler(log, "popularity", alpha=-1)
    with pytest.raises(ValueError, match="negative"):
        NegativeSampler(log).sample(np.array([0, -1]), 1, np.random.default_rng(0))
    with pytest.raises(TrainingError, match="empty"):
        NegativeSampler(log.where(log.user < 0))
