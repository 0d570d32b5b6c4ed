"""Drawing items that a user did not choose."""

from __future__ import annotations

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
        self.probability: NDArray[np.float64] = weight / weight.sum()
        self._uniform = kind == "uniform"
        self._cumulative = np.cumsum(self.probability)
        self._cumulative[-1] = 1.0
        # Known pairs as sorted keys user * N + item, for membership tests by binary search.
        keys = log.user.astype(np.int64) * log.n_items + log.item if avoid_known else np.zeros(0, np.int64)
        self._keys: NDArray[np.int64] = np.zeros(0, np.int64)
        self._table: NDArray[np.bool_] | None = None
        if log.n_users * log.n_items <= TABLE_CELLS:  # a table answers ten times faster
            self._table = np.zeros(log.n_users * log.n_items, dtype=bool)
            self._table[keys] = True
        else:
            self._keys = np.unique(keys)

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
        if self._table is not None:
            return self._table[wanted]
        if len(self._keys) == 0:
            return np.zeros(wanted.shape, dtype=bool)
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return self._keys[place] == wanted

    def sample(self, users: NDArray[np.int64], n: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """`(B, n)` items for users `(B,)`.

        Raises:
            TrainingError: a user has every item that can be drawn; the message names the user.
        """
        users = np.asarray(users, dtype=np.int64)
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
        for place in hit:  # users who have nearly everything: choose exactly among the rest
            flat[place] = self._draw_from_rest(int(owner[place]), generator)
        return drawn

    def _draw_from_rest(self, user: int, generator: np.random.Generator) -> int:
        weight = self.probability.copy()
        weight[self.log.history(user)] = 0.0
        total = weight.sum()
        if total <= 0:
            raise TrainingError(
                f"no negative available for user {self.log.users.id(user)!r}: the user has every item",
                hint="drop this user, or train with a loss that needs no negatives (cross-entropy)",
            )
        return int(generator.choice(self.n_items, p=weight / total))
