"""The ground truth of the world: what caused each event, and how relevant any item is to any user at any time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vouch.data.world.config import WorldConfig
from vouch.data.world.events import STEP
from vouch.data.world.items import Items
from vouch.data.world.users import Users


@dataclass(frozen=True, eq=False)
class Truth:
    """Arrays aligned with the rows of the world's log, and the laws behind them.

    Attributes:
        items, users: the drawn goods and people.
        is_noise, is_repeat: bool `(n,)`. interest: int16 `(n,)` taste cluster, -1 for noise.
        position: int16 `(n,)` place in the list the item was chosen from, from 1.
        life: float32 `(n,)` how much of the user's life had passed.
        expected_value: float32 `(n,)` mean rating.
    """

    config: WorldConfig
    items: Items
    users: Users
    is_noise: NDArray[np.bool_]
    is_repeat: NDArray[np.bool_]
    interest: NDArray[np.int16]
    position: NDArray[np.int16]
    life: NDArray[np.float32]
    expected_value: NDArray[np.float32]

    def interests(self, user: NDArray[np.int64], life: NDArray[np.float64] | float = 1.0) -> NDArray[np.float64]:
        """Weights `(B, clusters)` of all taste clusters for users at a moment of their life; rows sum to one."""
        user = np.asarray(user)
        weights = self.users.weights(user, np.broadcast_to(np.asarray(life, dtype=np.float64), user.shape))
        out = np.zeros((len(user), self.items.n_clusters))
        np.add.at(out, (np.arange(len(user))[:, None], self.users.interests[user]), weights)
        return out

    def relevance(self, user: NDArray[np.int64], life: NDArray[np.float64] | float = 1.0) -> NDArray[np.float64]:
        """Probability `(B, N)` that an event of a user, caused by an interest and not by the event before, is the item.

        It is `sum_c weight_c p(item | c)`: noise and repeats have no part in it. Rows sum to one.
        """
        return self.interests(user, life)[:, self.items.cluster] * self.items.within

    def next_item(
        self, user: NDArray[np.int64], last: NDArray[np.int64], life: NDArray[np.float64] | float = 1.0
    ) -> NDArray[np.float64]:
        """Probability `(B, N)` of the next item when the same interest goes on from item `last` `(B,)`, without noise.

        With `order_share` it lies a geometric number of places further on the ring, else it is drawn by popularity.
        """
        del user, life  # the interest that goes on is the last item's own
        items, last = self.items, np.asarray(last)
        place = np.empty(len(items.order), dtype=np.int64)
        place[items.order] = np.arange(len(items.order)) - items.bounds[items.cluster[items.order]]
        size = np.diff(items.bounds)[items.cluster[last]][:, None]
        same = items.cluster[last][:, None] == items.cluster
        ahead = (place - place[last][:, None] - 1) % size  # steps less one
        step = (1 - 1 / STEP) ** ahead / STEP / (1 - (1 - 1 / STEP) ** size)  # whole turns included
        share = self.config.order_share
        return np.where(same, (1 - share) * items.within + share * step, 0.0)
