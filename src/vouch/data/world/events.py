"""What people do: sessions of clicks that follow on from each other, with noise, repeats, positions and ratings.

Every array is drawn for a whole block of users at once. An event belongs to one interest, which stays for a session
mostly. The items of an interest lie on a ring; an event moves a few items on from the last of the same interest
(`order_share`), or is drawn anew by popularity, so that order carries signal and popularity is skewed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vouch.data.world.config import BLOCK, START, YEARS, WorldConfig, stream
from vouch.data.world.items import CONSUMABLE, Items
from vouch.data.world.users import Users

NEW_SESSION = 0.25
"""Chance that an event opens a session."""
STAY = 0.85
"""Chance that an event keeps the interest of the one before it in its session."""
STEP = 2.5
"""Mean of the geometric law of the step on the ring, in items."""
PLACES = 10
"""Length of the lists that people choose from."""
SCENARIO_NOISE = np.array([0.4, 1.4, 1.0])
"""How much noise comes by search, feed and mail, relative to the average."""


@dataclass(frozen=True, eq=False)
class Events:
    """Rows of a block of users, sorted by user and time.

    Attributes:
        user, item: int64 `(n,)`; users count within the block.
        time: int64 seconds. value: float32 rating 1 to 5. scenario, domain: int16.
        interest: int16, the taste cluster that caused the event, -1 for noise.
        is_noise, is_repeat: bool. position: int16 place in the list, from 1.
        life: float32, how much of the user's life has passed, 0 to 1.
        expected_value: float32, the mean of the rating before chance.
        feedback: float32 `(n,)` by name: `click` and `like` 0 or 1, `watch_time` in seconds.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.int64]
    value: NDArray[np.float32]
    scenario: NDArray[np.int16]
    domain: NDArray[np.int16]
    interest: NDArray[np.int16]
    is_noise: NDArray[np.bool_]
    is_repeat: NDArray[np.bool_]
    position: NDArray[np.int16]
    life: NDArray[np.float32]
    expected_value: NDArray[np.float32]
    feedback: dict[str, NDArray[np.float32]]


def make_events(config: WorldConfig, items: Items, users: Users, block: int) -> Events:
    """Draw the events of one block of users."""
    random = stream(config, 3, block)
    user = np.repeat(np.arange(len(users.n_events)), users.n_events)
    n = len(user)
    first = np.concatenate([[True], user[1:] != user[:-1]])
    nth = np.arange(n) - np.maximum.accumulate(np.where(first, np.arange(n), 0))
    life = nth / np.maximum(users.n_events[user] - 1, 1)
    opens = first | (random.random(n) < NEW_SESSION)
    session = np.cumsum(opens) - 1
    time = _times(random, user, first, opens, n)
    scenario = _pick(users.scenario[user[opens]], random)[session]
    interest = _interests(random, users, user, life, opens)
    item = _ring(config, random, items, user, interest)
    # Position bias: lists are looked at from the top, and what is on top is clicked without much interest.
    chance = np.arange(1, PLACES + 1, dtype=np.float64) ** -config.position_bias
    position = 1 + np.searchsorted(np.cumsum(chance / chance.sum()), random.random(n), side="right").clip(
        max=PLACES - 1
    )
    careless = 1.6 / (1 + 0.3 * (position - 1))
    is_noise = random.random(n) < np.minimum(config.noise_share * SCENARIO_NOISE[scenario] * careless, 0.95)
    shown = np.searchsorted(np.cumsum(items.popularity), random.random(n), side="right").clip(max=config.items - 1)
    item = np.where(is_noise, shown, item)
    item, is_repeat = _repeats(config, random, items, user, item, is_noise)
    affinity = _affinity(items, users, user, item, life)
    expected = 3.6 + users.mood[user] + 0.8 * affinity - 1.2 * is_noise
    value = np.clip(np.round(expected + 0.6 * random.normal(size=n)), 1, 5).astype(np.float32)
    domain = items.domain[item].copy()
    elsewhere = items.shared[item] & np.where(domain == 0, users.fashion[user], users.home[user])
    domain[elsewhere & (random.random(n) < 0.5)] ^= 1
    return Events(
        user,
        item,
        time,
        value,
        scenario.astype(np.int16),
        domain,
        np.where(is_noise, -1, interest).astype(np.int16),
        is_noise,
        is_repeat,
        position.astype(np.int16),
        life.astype(np.float32),
        expected.astype(np.float32),
        _feedback(config, block, affinity - is_noise, item),
    )


def tempting(config: WorldConfig) -> NDArray[np.float64]:
    """How much each item `(N,)` tempts to click, whatever it is worth; about normal."""
    return stream(config, 5).normal(size=config.items)


def _feedback(
    config: WorldConfig, block: int, liking: NDArray[np.float64], item: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """What people do with what they see. What is not clicked is neither liked nor watched.

    Logits and log seconds are linear in liking and in temptation, which is for or against the latter two signals.
    """
    random, n = stream(config, 6, block), len(item)  # streams of its own: the rest of the world stays as it was
    tempted = tempting(config)[item]
    after = (1 - 2 * config.task_conflict) * tempted
    click = random.random(n) < _sigmoid(0.8 + 1.5 * liking + 0.9 * tempted)
    like = click & (random.random(n) < _sigmoid(-1.6 + 2.0 * liking + 0.9 * after))
    watched = click * np.exp(2.5 + 0.8 * liking + 0.5 * after + 0.4 * random.normal(size=n))
    signals = {"click": click, "like": like, "watch_time": watched.round(1)}
    return {name: signal.astype(np.float32) for name, signal in signals.items()}


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def _times(
    random: np.random.Generator, user: NDArray[np.int64], first: NDArray[np.bool_], opens: NDArray[np.bool_], n: int
) -> NDArray[np.int64]:
    """Seconds: under two minutes within a session as a rule, days to months between, all within the world's years."""
    within = 5 + random.exponential(70, n)
    between = 3600 * np.exp(random.normal(3.9, 1.2, n))  # median two days
    gap = np.where(first, 0.0, np.where(opens, between, within))
    passed = np.cumsum(gap)
    passed -= passed[np.maximum.accumulate(np.where(first, np.arange(n), 0))]
    span = np.zeros(user[-1] + 1)
    np.maximum.at(span, user, passed)
    room = YEARS * 365 * 86_400
    # Who lives longer than the world is sped up between sessions; within them too, but never to below a second.
    scale = np.minimum(1.0, 0.95 * room / np.maximum(span, 1.0))
    begin = random.random(len(span)) * (room - span * scale)
    steps = np.maximum(np.round(gap * scale[user]), np.where(first, 0, 1)).astype(np.int64)
    total = np.cumsum(steps)
    total -= total[np.maximum.accumulate(np.where(first, np.arange(n), 0))]
    return START + begin.astype(np.int64)[user] + total


def _pick(probability: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    return np.minimum((probability.cumsum(1) < random.random((len(probability), 1))).sum(1), probability.shape[1] - 1)


def _interests(
    random: np.random.Generator,
    users: Users,
    user: NDArray[np.int64],
    life: NDArray[np.float64],
    opens: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """The taste cluster of each event: drawn anew when a session opens, or now and then within it."""
    drawn = opens | (random.random(len(user)) > STAY)
    choice = _pick(users.weights(user, life), random)
    last_drawn = np.maximum.accumulate(np.where(drawn, np.arange(len(user)), 0))
    return users.interests[user, choice[last_drawn]]


def _ring(
    config: WorldConfig,
    random: np.random.Generator,
    items: Items,
    user: NDArray[np.int64],
    interest: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The item of each event: some steps on from the last event of user and interest on the ring, or drawn anew."""
    n = len(user)
    order = np.lexsort((np.arange(n), interest, user))  # events of one user and interest together, in time
    u, c = user[order], interest[order]
    begins = np.concatenate([[True], (u[1:] != u[:-1]) | (c[1:] != c[:-1])])
    fresh = begins | (random.random(n) >= config.order_share)
    moved = np.cumsum(np.where(fresh, 0, random.geometric(1 / STEP, n)))
    anchor = np.maximum.accumulate(np.where(fresh, np.arange(n), 0))
    drawn = items.draw(c, random.random(n))[anchor]
    place = (drawn + moved - moved[anchor]) % np.diff(items.bounds)[c]
    out = np.empty(n, dtype=np.int64)
    out[order] = items.order[items.bounds[c] + place]
    return out


def _repeats(
    config: WorldConfig,
    random: np.random.Generator,
    items: Items,
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    is_noise: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Now and then a consumable of the last few events again."""
    n = len(user)
    back = np.arange(n) - random.integers(1, 8, n)
    source = np.maximum(back, 0)
    fits = (
        (back >= 0) & (user[source] == user) & CONSUMABLE[items.category[item[source]]] & ~is_noise & ~is_noise[source]
    )
    # Consumables are a quarter of the goods, so the chance is raised to give the share asked for.
    again = fits & (random.random(n) < min(1.0, 3 * config.repeat_share))
    again &= ~again[source]  # what was itself put there again is no source
    return np.where(again, item[source], item), again


def _affinity(
    items: Items, users: Users, user: NDArray[np.int64], item: NDArray[np.int64], life: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How well an item's style fits the user's taste of the day: a cosine, -1 to 1."""
    weights = users.weights(user, life)
    taste = np.einsum("nk,nkd->nd", weights, items.centres[users.interests[user]])
    style = items.style[item]
    return (taste * style).sum(1) / np.maximum(np.linalg.norm(taste, axis=1) * np.linalg.norm(style, axis=1), 1e-9)


def first_user(block: int) -> int:
    """The world's number of a block's first user."""
    return block * BLOCK
