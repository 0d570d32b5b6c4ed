"""Training batches of whole histories: every position of a history is learned from in one pass.

Nothing is copied per prefix. An epoch is index arithmetic on the columnar log: windows of at most `length + 1` events,
grouped by length so that a batch is padded to its own longest window only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.data import Interactions
from vouch.errors import DataError
from vouch.recommenders.sequential.parts import Histories
from vouch.training import NegativeSampler

MASK = -2
"""Marks a hidden item among codes; encoders turn it into their mask row."""


class SequenceBatch(NamedTuple):
    """A batch of `B` left-aligned sequences with `n` targets in all.

    Attributes:
        items: int64 `(B, T)` codes, -1 after the end, `MASK` where hidden.
        lengths: int64 `(B,)`.
        at: int64 `(n,)` positions of the targets in the flattened `(B * T)` grid.
        target: int64 `(n,)` codes.
        negatives: int64 `(m,)` shared by all targets, `(n, m)` of their own, or empty.
        weight: float32 `()`: one over the targets of the whole global batch, times the number of processes.
        user: int64 `(B,)`.
        extra: what each objective drew for this batch, by its slug.
    """

    items: Tensor
    lengths: Tensor
    at: Tensor
    target: Tensor
    negatives: Tensor
    weight: Tensor
    user: Tensor
    extra: dict[str, Any]


Draw = Callable[[Histories, np.random.Generator], Any]


class SequenceBatches:
    """Next-item batches: position `t` of a window has event `t + 1` as its target.

    Args:
        log: the training log.
        batch_size: windows in a global batch.
        length: longest input.
        every_window: cut longer histories into consecutive windows; otherwise only the last is used.
        sampler, negatives, shared: draw `negatives` items for each batch (`shared`) or each target.
        draws: what objectives draw for each batch, by their slugs.
        least: events that a window must show before a target.

    Raises:
        DataError: no history has two events.
    """

    def __init__(
        self,
        log: Interactions,
        batch_size: int,
        length: int,
        *,
        every_window: bool = True,
        sampler: NegativeSampler | None = None,
        negatives: int = 0,
        shared: bool = True,
        draws: Mapping[str, Draw] | None = None,
        least: int = 1,
    ) -> None:
        self.draws, self.least = draws or {}, least
        self.log, self.batch_size, self.length = log, batch_size, length
        self.sampler, self.n, self.shared = sampler, negatives, shared
        self.user, self.start, self.stop = windows(log, length + 1, every_window=every_window, least=least + 1)
        if len(self.user) == 0:
            few = "two" if least == 1 else least + 1
            raise DataError(
                f"no history has {few} events to learn an order from", hint="check the filters and the split"
            )

    def __len__(self) -> int:
        return math.ceil(len(self.user) / self.batch_size)

    def order(self, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Rows of the windows of each batch."""
        return by_length(self.stop - self.start, self.batch_size, generator)

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[SequenceBatch]:
        """Batches in random order; this rank takes every `world`-th window of each."""
        apart = generator.spawn(1)[0]  # leaves this one as it is
        for rows in self.order(generator):
            mine = rows[rank::world] if world > 1 else rows
            start, stop = self.start[mine], self.stop[mine]
            events = self.log.item  # (n,)
            lengths = stop - start - 1
            place = np.arange(lengths.max(initial=1))
            real = place < lengths[:, None]  # (B, T)
            row = np.where(real, start[:, None] + place, 0)
            items = np.where(real, events[row], -1).astype(np.int64)
            asked = real & (place >= self.least - 1)
            target = events[row[asked] + 1].astype(np.int64)
            targets = np.maximum(self.stop[rows] - self.start[rows] - self.least, 0)
            drawn = np.zeros(0, np.int64)
            if self.sampler is not None and self.shared:
                drawn = self.sampler.draw(self.n, generator)
            elif self.sampler is not None:  # for the whole batch: all ranks must draw alike
                drawn = self.sampler.sample(np.repeat(self.user[rows], targets), self.n, generator)
                drawn = drawn[np.repeat(np.arange(len(rows)) % world == rank, targets)]
            total = max(1, int(targets.sum()))
            histories = Histories(self.log, self.user[mine], start, stop - 1, stop)
            yield SequenceBatch(
                torch.from_numpy(items),
                torch.from_numpy(lengths),
                torch.from_numpy(np.flatnonzero(asked)),
                torch.from_numpy(target),
                torch.from_numpy(drawn),
                torch.tensor(world / total, dtype=torch.float32),
                torch.from_numpy(self.user[mine]),
                draw_all(self.draws, histories, apart),
            )


def draw_all(draws: Mapping[str, Draw], histories: Histories, generator: np.random.Generator) -> dict[str, Any]:
    """What each objective draws, by its slug."""
    return {slug: drawn for slug, draw in draws.items() if (drawn := draw(histories, generator)) is not None}


def windows(
    log: Interactions, size: int, *, every_window: bool = True, least: int = 2
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows `start:stop` of windows of at most `size` events of one user, with the user; the last window ends the history.

    Consecutive windows share one event: the target that ends the older is the first input of the newer.
    """
    lengths = log.lengths
    user = np.flatnonzero(lengths >= least)
    n = lengths[user]
    step = size - 1
    count = np.maximum(1, -(-(n - 1) // step)) if every_window else np.ones(len(user), np.int64)
    owner = np.repeat(np.arange(len(user)), count)
    back = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)  # 0 is the last window
    begin, end = log.offsets[user][owner], log.offsets[user + 1][owner]
    stop = end - back * step
    return user[owner], np.maximum(begin, stop - size), stop


def by_length(
    lengths: NDArray[np.int64], batch_size: int, generator: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Random batches of rows of similar length, in random order."""
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    starts = np.arange(0, len(order), batch_size)
    for start in generator.permutation(starts):
        yield order[start : start + batch_size]
