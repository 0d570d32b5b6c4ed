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
        """Probability `(B, N)` of the next item when the same interest goes on from item `last`, noise left out.

        With `order_share` the next lies an exponential step further on the ring than a uniform place of `last`;
        otherwise anywhere on it; the same item again becomes the next on the ring. Exact but for one thing: after such
        a shift the place is taken to be uniform within `last` too.
        """
        last = np.asarray(last)
        out = np.zeros((len(last), len(self.items.cluster)))
        share = self.config.order_share
        place = np.empty(len(self.items.order), dtype=np.int64)
        place[self.items.order] = np.arange(len(place))
        for row, item in enumerate(last):
            cluster = int(self.items.cluster[item])
            low, high = int(self.items.bounds[cluster]), int(self.items.bounds[cluster + 1])
            members, upper = self.items.order[low:high], self.items.edges[low:high]
            lower = np.concatenate([[0.0], upper[:-1]])
            rate = (high - low) / STEP
            a, b = lower[place[item] - low], upper[place[item] - low]
            out[row, members] = (1 - share) * (upper - lower) + share * _step_mass(a, b, lower, upper, rate)
            out[row, self.items.after[item]] += out[row, item]
            out[row, item] = 0.0
        return out


def _step_mass(
    a: float, b: float, lower: NDArray[np.float64], upper: NDArray[np.float64], rate: float
) -> NDArray[np.float64]:
    """Chance to land in each `[lower, upper)` after an exponential step (mod 1) from a uniform place in `[a, b)`."""

    def below(x: NDArray[np.float64]) -> NDArray[np.float64]:
        # P(place + step < x), for x at or above 0 on the unrolled line.
        reach = np.clip(x, a, None)
        top = np.minimum(reach, b)
        return ((top - a) - (np.exp(-rate * (reach - top)) - np.exp(-rate * (reach - a))) / rate) / (b - a)

    total = np.zeros_like(lower)
    for turn in range(int(np.ceil(40 / rate)) + 2):  # further turns hold less than e^-40
        total += below(upper + turn) - below(lower + turn)
    return total
