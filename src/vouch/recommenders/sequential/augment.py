"""Operators that make another history of a history: crop, mask, reorder, substitute, insert.

Each works on a whole batch of ragged histories at once, and chooses where to act by the gaps in time (`minimum`,
`maximum`) or at random. Chance comes from a seed of each history, so what becomes of one does not depend on the batch
that it is in. Sources: CL4SRec (arXiv 2010.14395), CoSeRec (arXiv 2108.06479), TiCoSeRec (arXiv 2212.08262).
Shapes: `B` histories, `n` events in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vouch.data.queries import flat_rows
from vouch.recommenders.sequential.batches import MASK

Mode = Literal["minimum", "maximum", "random"]
GRID = float(1 << 26)
"""Variances are compared on a grid, in units of the history's own, so that equal ones are equal however they were summed:
running sums over a batch of a million events are exact to a hundredth of a cell."""


class Use(IntEnum):
    """What random numbers are for; each use of a history's seed has numbers of its own."""

    OPERATOR, PLACE, SINGLE, ORDER, ITEM = range(5)


def scrambled(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits that look random, the same for the same number: one step of SplitMix64 from each."""
    x = numbers + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers from 0 up to, but not including, 1."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(bound: NDArray[np.int64] | int, chance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers from 0 to `bound - 1`, of uniform `chance`."""
    return np.floor(chance * bound).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Histories end to end.

    Attributes:
        items: int64 `(n,)` codes. bounds: int64 `(B + 1,)`.
        gaps: float64 `(n,)`, the time from each event to the next; the last one's is to the event after the history.
        seeds: uint64 `(B,)`, where the chance of each history comes from.
    """

    items: NDArray[np.int64]
    bounds: NDArray[np.int64]
    gaps: NDArray[np.float64]
    seeds: NDArray[np.uint64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`(B,)`."""
        return np.diff(self.bounds)

    @property
    def row(self) -> NDArray[np.int64]:
        """The history of each event `(n,)`."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def place(self) -> NDArray[np.int64]:
        """Each event's place in its history `(n,)`, from 0."""
        return np.arange(len(self.items)) - np.repeat(self.bounds[:-1], self.lengths)

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """Some of the histories."""
        flat, bounds = flat_rows(self.bounds[rows], self.bounds[rows + 1])
        return Ragged(self.items[flat], bounds, self.gaps[flat], self.seeds[rows])

    def chance(self, use: Use) -> NDArray[np.float64]:
        """A random number of each history `(B,)`, from 0 to 1."""
        return uniform(scrambled(scrambled(self.seeds) + np.uint64(use)))

    def chances(self, use: Use) -> NDArray[np.float64]:
        """A random number of each event `(n,)`, from 0 to 1."""
        own = scrambled(scrambled(self.seeds) + np.uint64(use))
        return uniform(scrambled(own[self.row] + self.place.astype(np.uint64)))


@dataclass(frozen=True, eq=False)
class Similar:
    """For each item its most similar other item `(N,)`, -1 where there is none, and how similar they are, from 0 to 1."""

    item: NDArray[np.int64]
    score: NDArray[np.float64]

    def of(self, items: NDArray[np.int64], chance: NDArray[np.float64]) -> NDArray[np.int64]:
        """A similar item for each `(n,)`; a random one, by `chance` `(n,)`, for those that have none."""
        found = self.item[items]
        return np.where(found < 0, below(len(self.item), chance), found)


def hybrid(one: Similar, other: Similar) -> Similar:
    """For each item the candidate of the greater score; `one` among equals."""
    better = other.score > one.score
    return Similar(np.where(better, other.item, one.item), np.where(better, other.score, one.score))


def portion(rate: float, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`floor(rate * n)`, exact where the product is a whole number that floats miss by a hair."""
    return np.floor(rate * lengths + 1e-9).astype(np.int64)


def choose(histories: Ragged, count: NDArray[np.int64], mode: Mode) -> NDArray[np.bool_]:
    """True at `count` `(B,)` events of each history: those of the least or greatest gaps, the earlier first among
    equals, or random ones."""
    key = histories.chances(Use.PLACE) if mode == "random" else histories.gaps
    order = np.lexsort((histories.place, -key if mode == "maximum" else key, histories.row))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = histories.place  # sorted by history, so places count from 0 in each
    return rank < np.repeat(count, histories.lengths)


def windows(histories: Ragged, size: NDArray[np.int64], mode: Mode) -> NDArray[np.int64]:
    """First place `(B,)` of a window of `size` `(B,)` events in each history (`1 <= size <= n`): the one whose inner
    gaps vary least or most, the latest among equals, or a random one.

    The variances of all windows come from running sums of the gaps and of their squares.
    """
    lengths, row, place = histories.lengths, histories.row, histories.place
    if mode == "random":
        return below(lengths - size + 1, histories.chance(Use.PLACE))
    # Centred and scaled a history at a time: the variance keeps its order, and running sums their digits.
    scaled = histories.gaps - (np.add.reduceat(histories.gaps, histories.bounds[:-1]) / lengths)[row]
    spread = np.sqrt(np.add.reduceat(scaled**2, histories.bounds[:-1]) / lengths)
    scaled = scaled / np.where(spread > 0, spread, 1.0)[row]
    sums = np.concatenate([[0.0], np.cumsum(scaled)])
    squares = np.concatenate([[0.0], np.cumsum(scaled**2)])
    fits = np.flatnonzero(place + size[row] <= lengths[row])
    inner = np.maximum(size[row[fits]] - 1, 1)  # a window of one event has no gap: all are equal
    stop = fits + size[row[fits]] - 1
    mean = (sums[stop] - sums[fits]) / inner
    variance = np.round(((squares[stop] - squares[fits]) / inner - mean**2) * GRID)
    order = np.lexsort((-place[fits], -variance if mode == "maximum" else variance, row[fits]))
    best = order[np.concatenate([[0], np.cumsum(lengths - size + 1)[:-1]])]
    return place[fits[best]]


def crop(histories: Ragged, rate: float, mode: Mode) -> Ragged:
    """Keep a window of `floor(rate n)` events; a random single one where that is 2 or less."""
    size = portion(rate, histories.lengths)
    single = size <= 2
    first = windows(histories, np.where(single, 1, size), mode)
    first = np.where(single, below(histories.lengths, histories.chance(Use.SINGLE)), first)
    start = histories.bounds[:-1] + first
    flat, bounds = flat_rows(start, start + np.where(single, 1, size))
    return Ragged(histories.items[flat], bounds, histories.gaps[flat], histories.seeds)


def reorder(histories: Ragged, rate: float, mode: Mode) -> Ragged:
    """Shuffle a window of `floor(rate n)` events; windows of less than 2 stay as they are."""
    size = portion(rate, histories.lengths)
    first = windows(histories, np.maximum(size, 1), mode)
    place, row = histories.place, histories.row
    inside = np.flatnonzero((place >= first[row]) & (place < (first + size)[row]))
    source = inside[np.lexsort((histories.chances(Use.ORDER)[inside], row[inside]))]
    items = histories.items.copy()
    items[inside] = histories.items[source]
    return Ragged(items, histories.bounds, histories.gaps, histories.seeds)


def mask(histories: Ragged, rate: float, mode: Mode) -> Ragged:
    """Hide `floor(rate n)` events."""
    hidden = choose(histories, portion(rate, histories.lengths), mode)
    return Ragged(np.where(hidden, MASK, histories.items), histories.bounds, histories.gaps, histories.seeds)


def substitute(histories: Ragged, rate: float, mode: Mode, similar: Similar) -> Ragged:
    """Put similar items in the place of `max(1, floor(rate n))` events; histories of one event stay as they are."""
    count = np.where(histories.lengths > 1, np.maximum(1, portion(rate, histories.lengths)), 0)
    chosen = choose(histories, count, mode)
    items = histories.items.copy()
    items[chosen] = similar.of(items[chosen], histories.chances(Use.ITEM)[chosen])
    return Ragged(items, histories.bounds, histories.gaps, histories.seeds)


def insert(histories: Ragged, rate: float, mode: Mode, similar: Similar) -> Ragged:
    """Add a similar item after `max(1, floor(rate n))` events."""
    chosen = choose(histories, np.maximum(1, portion(rate, histories.lengths)), mode)
    times = 1 + chosen
    items, gaps = np.repeat(histories.items, times), np.repeat(histories.gaps, times)
    added = np.cumsum(times)[chosen] - 1
    items[added] = similar.of(histories.items[chosen], histories.chances(Use.ITEM)[chosen])
    bounds = np.concatenate([[0], np.cumsum(np.add.reduceat(times, histories.bounds[:-1]))])
    return Ragged(items, bounds, gaps, histories.seeds)


def join(pieces: Sequence[Ragged], rows: Sequence[NDArray[np.int64]], longest: int) -> Ragged:
    """One batch of the histories in `pieces`, history `i` of piece `p` at `rows[p][i]`; each cut to its last `longest`."""
    items, gaps = np.concatenate([p.items for p in pieces]), np.concatenate([p.gaps for p in pieces])
    shift = np.cumsum([0, *(len(p.items) for p in pieces)])
    start = np.concatenate([p.bounds[:-1] + s for p, s in zip(pieces, shift, strict=False)])
    stop = np.concatenate([p.bounds[1:] + s for p, s in zip(pieces, shift, strict=False)])
    order = np.argsort(np.concatenate(list(rows)), kind="stable")
    start, stop, seeds = start[order], stop[order], np.concatenate([p.seeds for p in pieces])[order]
    flat, bounds = flat_rows(np.maximum(start, stop - longest), stop)
    return Ragged(items[flat], bounds, gaps[flat], seeds)
