"""The size and the habits of the embedded world."""

from __future__ import annotations

from typing import Any

import numpy as np

from vouch.config import Config, setting

BLOCK = 4096
"""Users simulated together; each block has its own random stream, so a world is the same however it is cut."""
START = 1_672_531_200
"""The first moment of the world: 2023-01-01 00:00 UTC."""
YEARS = 2


class WorldConfig(Config):
    """Settings of the embedded world; equal settings give equal worlds, bit for bit."""

    users: int = setting(2000, "number of users", ge=1)
    items: int = setting(1500, "number of items", ge=48)
    events: int = setting(60_000, "events aimed at; the number drawn differs by a few per cent", ge=1)
    seed: int = setting(0, "seed of everything", ge=0)
    interests_per_user: int = setting(3, "taste clusters of one user", ge=1, le=6)
    popularity_skew: float = setting(0.7, "exponent of the Zipf law of item popularity", ge=0, le=2)
    order_share: float = setting(0.5, "chance that an event follows on from the last of its interest", ge=0, le=1)
    noise_share: float = setting(0.08, "share of clicks that no interest explains", ge=0, lt=1)
    repeat_share: float = setting(0.06, "chance that a consumable bought lately is bought again", ge=0, lt=1)
    both_domains: float = setting(0.3, "share of users who shop in both domains", ge=0, le=1)
    shared_items: float = setting(0.1, "share of items sold in both domains", ge=0, le=1)
    drift: float = setting(0.7, "how far interests move over a user's life: 0 not at all, 1 altogether", ge=0, le=1)
    position_bias: float = setting(0.6, "exponent by which clicks fall with the place in the list", ge=0, le=3)
    task_conflict: float = setting(
        0.7, "what tempts to click is for (0) or against (1) liking and watching on; 0.5 is neither", ge=0, le=1
    )


def stream(config: WorldConfig, *key: int) -> np.random.Generator:
    """The random stream of one part of the world, independent of all others."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(config.seed, spawn_key=key)))


def check_known(value: Any, known: int, what: str) -> int:
    """An index in range.

    Raises:
        UnknownIdError: it is not.
    """
    from vouch.errors import UnknownIdError

    number = int(value)
    if not 0 <= number < known:
        raise UnknownIdError(f"there is no {what} {number}", hint=f"codes run from 0 to {known - 1}")
    return number
