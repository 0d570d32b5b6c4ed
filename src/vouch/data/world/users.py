"""The people of the world: how active they are, where they shop, and what they like, now and later."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vouch.data.world.config import BLOCK, WorldConfig, stream
from vouch.data.world.items import DOMAINS, Items

SCENARIOS = ("search", "feed", "mail")


@dataclass(frozen=True, eq=False)
class Users:
    """Arrays over the `U` users of a block (or of the whole world).

    Attributes:
        n_events: int64 `(U,)`; at least 5, with a heavy tail.
        home, fashion: bool `(U,)` domains they shop in; at least one.
        interests: int64 `(U, K)` taste clusters.
        early, late: float64 `(U, K)` weights of the interests at the beginning and the end of their life; sum to one.
        mood: float64 `(U,)` how kindly they rate.
        scenario: float64 `(U, 3)` how often they come by each of `SCENARIOS`.
    """

    n_events: NDArray[np.int64]
    home: NDArray[np.bool_]
    fashion: NDArray[np.bool_]
    interests: NDArray[np.int64]
    early: NDArray[np.float64]
    late: NDArray[np.float64]
    mood: NDArray[np.float64]
    scenario: NDArray[np.float64]

    def weights(self, user: NDArray[np.int64], life: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights `(n, K)` of users' interests at moments of their life, 0 to 1, both `(n,)`."""
        passed = np.asarray(life)[:, None]
        return (1 - passed) * self.early[user] + passed * self.late[user]


def n_blocks(config: WorldConfig) -> int:
    """How many blocks of users there are."""
    return -(-config.users // BLOCK)


def make_users(config: WorldConfig, items: Items, block: int) -> Users:
    """Draw the users of one block."""
    random = stream(config, 2, block)
    n, k = min(BLOCK, config.users - block * BLOCK), config.interests_per_user
    mean = max(config.events / config.users - 5, 0.0)
    spread = 1.0  # of the logarithm: a few users are very active
    extra = mean * np.exp(spread * random.normal(size=n) - spread**2 / 2)
    n_events = 5 + np.minimum(random.poisson(extra), 40 * max(1, int(mean)))
    where = random.random(n)
    both = where < config.both_domains
    first = random.random(n) < 0.5
    home, fashion = both | first, both | ~first
    in_home = np.arange(items.n_clusters) < items.n_clusters // 2
    allowed = np.where(in_home, home[:, None], fashion[:, None])
    keys = np.where(allowed, random.random((n, items.n_clusters)), -1.0)
    interests = np.argsort(-keys, axis=1)[:, :k]
    early, fresh = random.dirichlet(np.full(k, 0.7), n), random.dirichlet(np.full(k, 0.7), n)
    late = (1 - config.drift) * early + config.drift * fresh
    scenario = random.dirichlet((2.0, 3.0, 1.0), n)
    return Users(n_events, home, fashion, interests, early, late, random.normal(0, 0.4, n), scenario)


def join(parts: list[Users]) -> Users:
    """Blocks end to end."""
    return Users(*(np.concatenate([getattr(part, name) for part in parts]) for name in Users.__dataclass_fields__))


assert len(DOMAINS) == 2  # `home` and `fashion` above are these two
