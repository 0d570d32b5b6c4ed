"""Batches of whole histories: what is learned from, once each, and nothing else."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.data import Interactions, Split
from vouch.errors import DataError
from vouch.recommenders.sequential.batches import SequenceBatch, SequenceBatches, windows
from vouch.training import NegativeSampler

LogOf = Callable[[Any, int], Interactions]


def pairs(batch: SequenceBatch) -> list[tuple[tuple[int, ...], int]]:
    """Every target with the inputs up to its position."""
    width = batch.items.shape[1]
    found = []
    for at, target in zip(batch.at.tolist(), batch.target.tolist(), strict=True):
        row, place = divmod(at, width)
        seen = tuple(batch.items[row, : place + 1].tolist())
        assert place < batch.lengths[row] and min(seen) >= 0
        found.append((seen, target))
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=9),
    length=st.integers(1, 6),
    batch_size=st.integers(1, 5),
    every=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_event_after_the_first_is_a_target_once(
    log_of: LogOf, lengths: list[int], length: int, batch_size: int, every: bool, seed: int
) -> None:
    start = np.cumsum([0, *lengths])
    histories = [list(range(a, b)) for a, b in itertools.pairwise(start)]  # no event has the same item
    log = log_of(histories, int(start[-1]) + 1)
    if max(lengths) < 2:
        with pytest.raises(DataError, match="no history has two events"):
            SequenceBatches(log, batch_size, length, every_window=every)
        return
    batches = SequenceBatches(log, batch_size, length, every_window=every)
    got = list(batches.epoch(np.random.default_rng(seed), 0, 1))
    assert len(got) == len(batches)
    for batch in got:
        assert batch.items.shape[1] == batch.lengths.max() <= length  # padded to its own longest only
        assert len(batch.items) <= batch_size
        assert ((batch.items >= 0).sum(1) == batch.lengths).all()
        assert batch.weight.item() == pytest.approx(1 / len(batch.target))
    found = [pair for batch in got for pair in pairs(batch)]
    wanted = [item for h in histories for item in (h[1:] if every else h[1:][-length:])]
    assert Counter(target for _, target in found) == Counter(wanted)
    for seen, target in found:  # the inputs are the events just before, of the same user
        assert seen == tuple(range(target - len(seen), target))
        owner = np.searchsorted(start, target, side="right") - 1
        assert seen[0] >= start[owner]


def test_windows_of_a_long_history(log_of: LogOf) -> None:
    log = log_of([list(range(10))], 10)
    user, start, stop = windows(log, 4)
    assert sorted(zip(start.tolist(), stop.tolist(), strict=True)) == [(0, 4), (3, 7), (6, 10)]
    assert user.tolist() == [0, 0, 0]
    _, start, stop = windows(log, 4, every_window=False)
    assert (start.tolist(), stop.tolist()) == ([6], [10])


def test_an_epoch_follows_from_its_generator(made: Split) -> None:
    batches = SequenceBatches(made.train, 8, 10, sampler=NegativeSampler(made.train, avoid_known=False), negatives=5)

    def epoch(seed: int) -> list[SequenceBatch]:
        return list(batches.epoch(np.random.default_rng(seed), 0, 1))

    first, again, other = epoch(1), epoch(1), epoch(2)
    for a, b in zip(first, again, strict=True):
        assert all(bool((x == y).all()) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor))
    assert [batch.target.tolist() for batch in first] != [batch.target.tolist() for batch in other]


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_share_each_global_batch(made: Split, shared: bool) -> None:
    sampler = NegativeSampler(made.train, avoid_known=not shared)
    batches = SequenceBatches(made.train, 7, 10, sampler=sampler, negatives=3, shared=shared)
    whole = list(batches.epoch(np.random.default_rng(0), 0, 1))
    parts = [list(batches.epoch(np.random.default_rng(0), rank, 2)) for rank in range(2)]
    for one, *two in zip(whole, *parts, strict=True):
        assert Counter(pairs(one)) == Counter(pairs(two[0])) + Counter(pairs(two[1]))
        # The average over ranks of sum * weight is the mean over the whole batch.
        assert all(part.weight.item() == pytest.approx(2 * one.weight.item()) for part in two)
        if shared:
            assert all(bool((part.negatives == one.negatives).all()) for part in two)
        else:
            rows = [Counter(map(str, zip(b.target.tolist(), b.negatives.tolist(), strict=True))) for b in (one, *two)]
            assert rows[0] == rows[1] + rows[2]


def test_negatives_of_a_user_avoid_the_training_part_only(log_of: LogOf) -> None:
    log = log_of([[0, 1, 2], [3, 4, 5]], 7)
    batches = SequenceBatches(log, 1, 5, sampler=NegativeSampler(log), negatives=200, shared=False)
    for batch in batches.epoch(np.random.default_rng(0), 0, 1):
        own = {0, 1, 2} if batch.items[0, 0] == 0 else {3, 4, 5}
        assert set(batch.negatives.unique().tolist()) == set(range(7)) - own


def test_held_out_events_are_never_trained_on(log_of: LogOf) -> None:
    from vouch.data import Dataset, split

    histories = [list(range(10 * u, 10 * u + 10)) for u in range(6)]
    made = split(Dataset.of(log_of(histories, 60)))
    seen: set[int] = set()
    for batch in SequenceBatches(made.train, 4, 5).epoch(np.random.default_rng(0), 0, 1):
        seen |= set(batch.items.unique().tolist()) | set(batch.target.tolist())
    assert seen - {-1} == {item for history in histories for item in history[:8]}


def test_batches_hold_histories_of_like_length(log_of: LogOf) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.permutation(np.repeat([3, 30], 40))
    log = log_of([[0] * n for n in lengths], 2)
    cells = sum(b.items.numel() for b in SequenceBatches(log, 10, 50).epoch(generator, 0, 1))
    assert cells == int((lengths - 1).sum())  # no padding at all
