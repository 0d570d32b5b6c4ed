"""Small logs whose order carries the meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vouch.data import Dataset, Interactions, Split, Vocabulary, split


def make_log(histories: Sequence[Sequence[int]], n_items: int) -> Interactions:
    """Users `0..`, items `0..n_items - 1`: codes are ids."""
    return Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(len(histories))),
        Vocabulary.of_numbers(np.arange(n_items)),
        np.repeat(np.arange(len(histories)), [len(history) for history in histories]),
        np.array([item for history in histories for item in history], dtype=np.int32),
    )


@pytest.fixture(scope="session")
def log_of() -> Callable[[Sequence[Sequence[int]], int], Interactions]:
    """A function that makes a log of histories."""
    return make_log


@pytest.fixture(scope="session")
def made() -> Split:
    """40 users of 1 to 30 events over 25 items."""
    generator = np.random.default_rng(0)
    histories = [generator.integers(0, 25, generator.integers(1, 31)).tolist() for _ in range(40)]
    return split(Dataset.of(make_log([[3], [1, 2], *histories], 25)))


@pytest.fixture(scope="session")
def chain() -> tuple[np.ndarray, Split]:
    """A first-order chain over 8 items: its transition matrix `(8, 8)`, and 600 histories of 22 events."""
    generator = np.random.default_rng(1)
    matrix = generator.dirichlet(np.full(8, 0.5), size=8)
    states = [generator.integers(0, 8, 600)]
    for _ in range(21):
        states.append((generator.random((600, 1)) > matrix[states[-1]].cumsum(1)).sum(1).clip(max=7))
    return matrix, split(Dataset.of(make_log(np.stack(states, 1).tolist(), 8)))


@pytest.fixture(scope="session")
def second_order() -> Split:
    """The next of 5 items is fixed by the last two, 9 times in 10; from the last alone nothing can be said."""
    generator = np.random.default_rng(2)
    states = [generator.integers(0, 5, 1500), generator.integers(0, 5, 1500)]
    for _ in range(6):
        rule = (states[-1] + states[-2]) % 5
        states.append(np.where(generator.random(1500) < 0.9, rule, generator.integers(0, 5, 1500)))
    return split(Dataset.of(make_log(np.stack(states, 1).tolist(), 5)))


@pytest.fixture(scope="session")
def ring() -> Split:
    """30 items in a ring; the next is the right neighbour 4 times in 5, else any."""
    generator = np.random.default_rng(3)
    states = [generator.integers(0, 30, 400)]
    for _ in range(11):
        states.append(np.where(generator.random(400) < 0.8, (states[-1] + 1) % 30, generator.integers(0, 30, 400)))
    return split(Dataset.of(make_log(np.stack(states, 1).tolist(), 30)))
