"""Drawing items that a user did not choose."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.data import Interactions
from vouch.errors import ConfigError, TrainingError

TABLE_CELLS = 1 << 27
"""Largest user-by-item table of bytes kept for membership tests (128 MiB); above it, binary search."""
ROUNDS = 12
"""Redraws before the few draws that still hit are made exactly from what is left."""
EXACT_CELLS = 1 << 22
"""Draws times items at once when drawing exactly (32 MiB of float64)."""


class NegativeSampler:
    """Draws items, uniformly or by popularity to a power, and on request never one the user has.

    Args:
        log: the training log; the known positives and the popularities are its own.
        kind: `uniform`, or `popularity` with probability proportional to `count ** alpha`.
        alpha: the power; 0 is uniform, 1 is the popularity itself.
        avoid_known: whether a user's own training items are never drawn. The draw is then from `q` conditioned on
            the rest.

    Raises:
        ConfigError: unknown kind, or a negative `alpha`.
        TrainingError: the log has no rows to count.
    """

    def __init__(
        self,
        log: Interactions,
        kind: Literal["uniform", "popularity"] = "uniform",
        *,
        alpha: float = 0.75,
        avoid_known: bool = True,
    ) -> None:
        if kind not in ("uniform", "popularity"):
            raise ConfigError(f"negatives of kind {kind!r} do not exist", hint="use 'uniform' or 'popularity'")
        if alpha < 0:
            raise ConfigError(f"alpha is {alpha}; it must not be negative")
        self.log, self.n_items, self.avoid_known = log, log.n_items, avoid_known
        weight = np.ones(log.n_items) if kind == "uniform" else log.item_counts.astype(np.float64) ** alpha
        if len(log) == 0:
            raise TrainingError("the training log is empty: there is no item to draw", hint="check filters and split")
        self.probability: NDArray[np.float64] = weight / weight.sum()
        self._uniform = kind == "uniform"
        cumulative = np.cumsum(self.probability)
        self._cumulative = cumulative / cumulative[-1]  # ends in exact ones, so that what follows is never drawn

    @functools.cached_property
    def _known(self) -> tuple[NDArray[np.bool_] | None, NDArray[np.int64]]:
        """The training pairs as a table, which answers ten times faster, or as sorted keys `user * N + item`."""
        keys = self.log.user.astype(np.int64) * self.n_items + self.log.item
        if self.log.n_users * self.n_items > TABLE_CELLS:
            return None, np.unique(keys)
        table = np.zeros(self.log.n_users * self.n_items, dtype=bool)
        table[keys] = True
        return table, keys[:0]

    def log_q(self) -> Tensor:
        """float32 `(n_items,)` log of the probability of each item to be drawn (-inf where it never is)."""
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(self.probability).astype(np.float32))

    def draw(self, size: int | tuple[int, ...], generator: np.random.Generator) -> NDArray[np.int64]:
        """Items of any shape, regardless of users."""
        if self._uniform:
            return generator.integers(0, self.n_items, size)
        return np.searchsorted(self._cumulative, generator.random(size), side="right").astype(np.int64)

    def is_known(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each (user, item) pair, broadcast together, is in the training log."""
        wanted = users * self.n_items + items
        table, keys = self._known
        if table is not None:
            return table[wanted]
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return keys[place] == wanted

    def sample(self, users: NDArray[np.int64], n: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """`(B, n)` items for users `(B,)`.

        Raises:
            TrainingError: a user has every item that can be drawn; the message names the user.
            ValueError: a user code is negative.
        """
        users = np.asarray(users, dtype=np.int64)
        if users.min(initial=0) < 0:
            raise ValueError("a user code is negative: users never seen have no items to avoid")
        drawn = self.draw((len(users), n), generator)
        if not self.avoid_known:
            return drawn
        owner = np.repeat(users, n)
        flat = drawn.reshape(-1)
        hit = np.flatnonzero(self.is_known(owner, flat))
        for _ in range(ROUNDS):
            if len(hit) == 0:
                return drawn
            flat[hit] = self.draw(len(hit), generator)
            hit = hit[self.is_known(owner[hit], flat[hit])]
        flat[hit] = self._sample_exactly(owner[hit], generator)  # users who have nearly everything
        return drawn

    def _sample_exactly(self, users: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """One item for each user `(B,)` from the distribution over what the user does not have, in O(B N)."""
        out = np.empty(len(users), dtype=np.int64)
        rows = max(1, EXACT_CELLS // self.n_items)
        for first in range(0, len(users), rows):
            some = users[first : first + rows, None]
            weight = np.where(self.is_known(some, np.arange(self.n_items)), 0.0, self.probability)
            cumulative = weight.cumsum(axis=1)
            total = cumulative[:, -1:]
            if not total.all():
                user = self.log.users.id(int(some[np.argmin(total), 0]))
                raise TrainingError(
                    f"no negative available for user {user!r}: the user has every item",
                    hint="drop this user, or train with a loss that needs no negatives (cross-entropy)",
                )
            out[first : first + rows] = (cumulative <= generator.random((len(some), 1)) * total).sum(axis=1)
        return out
