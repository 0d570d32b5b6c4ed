"""Logs whose law is known, for claims about what a method can see.

Each draws a new log from a seed. Users are `0..`, items `0..n_items - 1`, one event a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.data import Catalog, Dataset, Interactions, Vocabulary

DAY = 86_400


def log_of(
    histories: NDArray[np.int64], n_items: int, *, gaps: NDArray[np.float64] | None = None, attribute: Any = None
) -> Dataset:
    """A dataset of histories `(U, T)` (-1 after the end), with times from `gaps` in days, and a category of each item."""
    real = histories >= 0
    columns = {} if gaps is None else {"time": (np.cumsum(gaps, 1)[real] * DAY).astype(np.int64)}
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(len(histories))),
        Vocabulary.of_numbers(np.arange(n_items)),
        np.nonzero(real)[0],
        histories[real].astype(np.int32),
        columns=columns,
    )
    if attribute is None:
        return Dataset.of(log, name="synthetic")
    table = pl.DataFrame({"category": [f"c{value}" for value in attribute]})
    return Dataset(log, Catalog(log.items, table, {"category": "category"}), None, "synthetic")


def key_item(seed: int, *, users: int, keys: int = 20, noise: int = 100, length: int = 9) -> Dataset:
    """One item of each history, at a random place, determines the last two; all others are noise.

    Items `0..keys - 1` are keys, key `k` is answered by `keys + k`, the rest is noise.
    """
    random = np.random.default_rng(seed)
    histories = random.integers(2 * keys, 2 * keys + noise, (users, length + 2))
    key = random.integers(0, keys, users)
    histories[np.arange(users), random.integers(0, length, users)] = key
    histories[:, length:] = (keys + key)[:, None]
    return log_of(histories, 2 * keys + noise)


def two_types(seed: int, *, users: int, items: int = 60, length: int = 8) -> Dataset:
    """Two types of users with the same items, but for one key item that decides what comes at the end."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 2, users)
    histories = random.integers(22, 22 + items, (users, length + 3))
    histories[np.arange(users), random.integers(0, length, users)] = kind  # item 0 or 1
    histories[:, length:] = 2 + 10 * kind[:, None] + random.integers(0, 10, (users, 3))
    return log_of(histories, 22 + items)


def paused_chain(seed: int, *, users: int, pauses: float, items: int = 200, length: int = 20) -> Dataset:
    """A first-order chain; before a share of the steps lies a long pause, after which the state is drawn anew."""
    random = np.random.default_rng(seed)
    follow = np.random.default_rng(0).integers(0, items, (items, 3))  # each item has three that follow
    state = random.integers(0, items, users)
    histories, gaps = [state], [np.ones(users)]
    for _ in range(length - 1):
        pause = random.random(users) < pauses
        step = follow[state, random.integers(0, 3, users)]
        state = np.where(pause, random.integers(0, items, users), step)
        histories.append(state)
        gaps.append(random.uniform(0.5, 1.5, users) * np.where(pause, 50.0, 1.0))
    return log_of(np.stack(histories, 1), items, gaps=np.stack(gaps, 1))


def category_chain(seed: int, *, users: int, categories: int = 20, each: int = 50, length: int = 8) -> Dataset:
    """The next category follows a Markov chain, the item within it is drawn uniformly."""
    random = np.random.default_rng(seed)
    follow = np.random.default_rng(0).integers(0, categories, (categories, 2))
    state = random.integers(0, categories, users)
    histories = []
    for _ in range(length):
        histories.append(state * each + random.integers(0, each, users))
        state = follow[state, random.integers(0, 2, users)]
    attribute = np.repeat(np.arange(categories), each)
    return log_of(np.stack(histories, 1), categories * each, attribute=attribute)


def communities(seed: int, *, users: int, groups: int = 40, each: int = 30, length: int = 5) -> Dataset:
    """Users of one community each take a few of its items; a single history shows little of it."""
    random = np.random.default_rng(seed)
    group = random.integers(0, groups, users)
    histories = group[:, None] * each + random.integers(0, each, (users, length))
    return log_of(histories, groups * each)


def taste_clusters(
    seed: int, *, users: int, mixed: int, clusters: int = 20, each: int = 40, length: int = 25
) -> Dataset:
    """Users mix `mixed` of the clusters; within one, an item is followed by its neighbours on a ring."""
    random = np.random.default_rng(seed)
    tastes = np.stack([random.permutation(clusters)[:mixed] for _ in range(users)])
    places = random.integers(0, each, (users, mixed))
    histories = []
    for _ in range(length):
        turn = random.integers(0, mixed, users)
        rows = np.arange(users)
        places[rows, turn] = (places[rows, turn] + random.integers(1, 4, users)) % each
        histories.append(tastes[rows, turn] * each + places[rows, turn])
    return log_of(np.stack(histories, 1), clusters * each)
