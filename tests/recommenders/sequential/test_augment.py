"""The operators against slow versions of their rules, on random histories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.recommenders.sequential import augment
from vouch.recommenders.sequential.augment import Mode, Ragged, Similar
from vouch.recommenders.sequential.batches import MASK

MODES: tuple[Mode, ...] = ("minimum", "maximum", "random")
SIMILAR = Similar((np.arange(50) + 7) % 50, np.ones(50))


def ragged(histories: list[list[int]], gaps: list[list[float]], seed: int = 0) -> Ragged:
    bounds = np.concatenate([[0], np.cumsum([len(h) for h in histories])])
    flat = [item for history in histories for item in history]
    return Ragged(
        np.array(flat, dtype=np.int64),
        bounds,
        np.array([g for each in gaps for g in each], dtype=np.float64),
        np.arange(seed, seed + len(histories), dtype=np.uint64),
    )


@st.composite
def batches(draw: Any, *, distinct: bool = False) -> tuple[list[list[int]], list[list[float]]]:
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    histories = [draw(st.lists(st.integers(0, 49), min_size=n, max_size=n)) for n in lengths]
    gaps = [
        draw(st.lists(st.integers(0, 10**8 if distinct else 4), min_size=n, max_size=n, unique=distinct))
        for n in lengths
    ]
    return histories, [[float(g) for g in each] for each in gaps]


def pieces(made: Ragged) -> list[list[int]]:
    return [made.items[a:b].tolist() for a, b in zip(made.bounds[:-1], made.bounds[1:], strict=True)]


def window(gaps: list[float], size: int, mode: str) -> int:
    """The rule: inner gaps of the window vary least or most, the latest among equals."""
    values = [float(np.var(gaps[s : s + size - 1])) if size > 1 else 0.0 for s in range(len(gaps) - size + 1)]
    best = min(values) if mode == "minimum" else max(values)
    return max(s for s, value in enumerate(values) if abs(value - best) <= 1e-9 * max(1.0, best))


@given(batches(), st.sampled_from(["minimum", "maximum"]), st.floats(0.1, 1.0))
def test_crop_keeps_the_window_of_the_rule(batch: Any, mode: Any, rate: float) -> None:
    histories, gaps = batch
    made = pieces(augment.crop(ragged(*batch), rate, mode))
    for history, own, got in zip(histories, gaps, made, strict=True):
        size = int(augment.portion(rate, np.array([len(history)]))[0])
        if size <= 2:
            assert len(got) == 1 and got[0] in history
        else:
            first = window(own, size, mode)
            assert got == history[first : first + size]


@given(batches(), st.sampled_from(MODES), st.floats(0.1, 1.0))
def test_reorder_moves_nothing_outside_its_window(batch: Any, mode: Any, rate: float) -> None:
    histories, gaps = batch
    made = pieces(augment.reorder(ragged(*batch), rate, mode))
    for history, own, got in zip(histories, gaps, made, strict=True):
        size = int(augment.portion(rate, np.array([len(history)]))[0])
        assert sorted(got) == sorted(history)
        moved = [i for i, (a, b) in enumerate(zip(history, got, strict=True)) if a != b]
        if size < 2:
            assert not moved
        elif moved and mode != "random":
            first = window(own, size, mode)
            assert first <= moved[0] and moved[-1] < first + size
        elif moved:
            assert moved[-1] - moved[0] < size


@given(batches(), st.sampled_from(MODES), st.floats(0.1, 1.0))
def test_mask_hides_as_many_as_asked(batch: Any, mode: Any, rate: float) -> None:
    histories, gaps = batch
    made = pieces(augment.mask(ragged(*batch), rate, mode))
    for history, own, got in zip(histories, gaps, made, strict=True):
        count = int(augment.portion(rate, np.array([len(history)]))[0])
        hidden = [i for i, item in enumerate(got) if item == MASK]
        assert len(hidden) == count and all(a == b for a, b in zip(history, got, strict=True) if b != MASK)
        if mode != "random":
            sign = 1 if mode == "minimum" else -1
            order = sorted(range(len(own)), key=lambda i: (sign * own[i], i))
            assert hidden == sorted(order[:count])


@given(batches(), st.sampled_from(MODES), st.floats(0.1, 1.0))
def test_substitute_keeps_the_length_and_changes_as_many_as_asked(batch: Any, mode: Any, rate: float) -> None:
    histories, _ = batch
    made = pieces(augment.substitute(ragged(*batch), rate, mode, SIMILAR))
    for history, got in zip(histories, made, strict=True):
        count = max(1, int(augment.portion(rate, np.array([len(history)]))[0])) if len(history) > 1 else 0
        changed = [(a, b) for a, b in zip(history, got, strict=True) if a != b]
        assert len(changed) == count and all(b == (a + 7) % 50 for a, b in changed)


@given(batches(), st.sampled_from(MODES), st.floats(0.1, 1.0))
def test_what_insert_adds_can_be_taken_out_again(batch: Any, mode: Any, rate: float) -> None:
    histories, gaps = batch
    made = pieces(augment.insert(ragged(*batch), rate, mode, SIMILAR))
    for history, own, got in zip(histories, gaps, made, strict=True):
        count = max(1, int(augment.portion(rate, np.array([len(history)]))[0]))
        assert len(got) == len(history) + count
        if mode != "random":
            sign = 1 if mode == "minimum" else -1
            chosen = sorted(sorted(range(len(own)), key=lambda i: (sign * own[i], i))[:count])
            expected = []
            for i, item in enumerate(history):
                expected += [item, (item + 7) % 50] if i in chosen else [item]
            assert got == expected


@given(batches(distinct=True), st.integers(1, 10))
def test_least_and_greatest_gaps_are_apart(batch: Any, k: int) -> None:
    made = ragged(*batch)
    count = np.minimum(k, made.lengths // 2)
    low, high = (augment.choose(made, count, mode) for mode in ("minimum", "maximum"))
    assert not (low & high).any() and low.sum() == high.sum() == count.sum()


@given(batches(), st.integers(2, 1000), st.sampled_from(["minimum", "maximum"]))
@settings(max_examples=50)
def test_the_unit_of_time_changes_nothing(batch: Any, unit: int, mode: Any) -> None:
    histories, gaps = batch
    one, other = ragged(histories, gaps), ragged(histories, [[g * unit for g in each] for each in gaps])
    for operator in (augment.crop, augment.reorder, augment.mask):
        a, b = (operator(each, 0.6, mode) for each in (one, other))
        assert a.items.tolist() == b.items.tolist()
    for operator_with in (augment.substitute, augment.insert):
        a, b = (operator_with(each, 0.4, mode, SIMILAR) for each in (one, other))
        assert a.items.tolist() == b.items.tolist()


def test_equal_gaps_are_decided_by_the_rule_for_ties() -> None:
    even = ragged([list(range(10))], [[0.1] * 10])
    assert pieces(augment.crop(even, 0.5, "minimum")) == [[5, 6, 7, 8, 9]]  # the latest
    assert pieces(augment.mask(even, 0.2, "maximum")) == [[MASK, MASK, *range(2, 10)]]


def test_ties_do_not_depend_on_the_size_of_the_batch() -> None:
    random = np.random.default_rng(0)
    gaps = [[float(g) for g in random.integers(0, 3, 20) * 0.1] for _ in range(3_000)]
    many = ragged([list(range(20))] * 3_000, gaps)
    together = augment.windows(many, np.full(3_000, 5), "minimum")
    for row in range(0, 3_000, 7):
        alone = ragged([list(range(20))], [gaps[row]])
        assert together[row] == augment.windows(alone, np.array([5]), "minimum")[0]


def test_a_shift_of_all_times_changes_nothing() -> None:
    """Operators see gaps only, and gaps of integer seconds are exact."""
    times = np.array([0, 100, 350, 360, 900, 905, 1_000, 7_000])
    found = []
    for shift in (0, 10**9):
        gaps = (np.diff(times + shift) / 86_400).tolist()
        for operator in (augment.crop, augment.reorder, augment.mask):
            made = operator(ragged([list(range(7))], [gaps]), 0.6, "minimum")
            found.append(pieces(made))
    assert found[:3] == found[3:]


def test_long_times_keep_their_digits() -> None:
    """Seconds over decades, differing by one second: the windows still come by their variance."""
    gaps = [1.0e9, 1.0e9 + 1, 1.0e9 + 2, 1.0e9, 1.0e9, 1.0e9, 1.0e9 + 5, 1.0e9]
    made = augment.crop(ragged([list(range(8))], [gaps]), 0.5, "minimum")
    assert pieces(made) == [[3, 4, 5, 6]]  # inner gaps 3, 4 and 5 are equal


def test_single_items_stay_but_may_gain_one() -> None:
    one = ragged([[3]], [[1.0]])
    assert pieces(augment.crop(one, 0.5, "minimum")) == [[3]]
    assert pieces(augment.mask(one, 0.5, "maximum")) == [[3]]
    assert pieces(augment.reorder(one, 0.5, "minimum")) == [[3]]
    assert pieces(augment.substitute(one, 0.5, "minimum", SIMILAR)) == [[3]]
    assert pieces(augment.insert(one, 0.5, "maximum", SIMILAR)) == [[3, 10]]


def test_items_without_a_neighbour_get_a_random_one() -> None:
    lonely = Similar(np.array([-1, 0]), np.array([0.0, 1.0]))
    chance = np.array([0.0, 0.499, 0.5, 0.999])
    assert lonely.of(np.zeros(4, dtype=np.int64), chance).tolist() == [0, 0, 1, 1]
    assert lonely.of(np.ones(4, dtype=np.int64), chance).tolist() == [0] * 4


def test_the_better_candidate_wins() -> None:
    one, other = (
        Similar(np.array([1, 1, -1]), np.array([0.5, 0.2, 0.0])),
        Similar(np.array([2, 2, 2]), np.array([0.5, 0.9, 0.1])),
    )
    best = augment.hybrid(one, other)
    assert best.item.tolist() == [1, 2, 2] and best.score.tolist() == [0.5, 0.9, 0.1]


def test_pieces_are_joined_in_their_places_and_cut_to_the_latest() -> None:
    a, b = ragged([[1, 2, 3], [4]], [[0.0] * 3, [0.0]]), ragged([[5, 6, 7, 8]], [[0.0] * 4])
    made = augment.join([a, b], [np.array([2, 0]), np.array([1])], 3)
    assert pieces(made) == [[4], [6, 7, 8], [1, 2, 3]]


def test_random_windows_are_as_likely_at_every_place() -> None:
    many = ragged([list(range(6))] * 4_000, [[0.0] * 6] * 4_000)
    firsts = [piece[0] for piece in pieces(augment.crop(many, 0.5, "random"))]
    counts = np.bincount(firsts)
    assert len(counts) == 4 and abs(counts - 1_000).max() < 120  # over four standard deviations


def test_random_events_are_as_likely_at_every_place_and_independent() -> None:
    many = ragged([list(range(10))] * 4_000, [[0.0] * 10] * 4_000)
    hidden = np.array([[item == MASK for item in piece] for piece in pieces(augment.mask(many, 0.3, "random"))])
    assert abs(hidden.mean(0) - 0.3).max() < 0.03
    together = np.corrcoef(hidden.T)[~np.eye(10, dtype=bool)]  # three of ten: -1/9 between any two
    assert abs(together + 1 / 9).max() < 0.08
    assert abs(np.corrcoef(hidden[:-1, 0], hidden[1:, 0])[0, 1]) < 0.08  # neighbouring seeds


def test_shuffles_are_as_likely_in_every_order() -> None:
    many = ragged([list(range(3))] * 6_000, [[0.0] * 3] * 6_000)
    orders = [tuple(piece) for piece in pieces(augment.reorder(many, 1.0, "minimum"))]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and max(abs(count - 1_000) for count in counts) < 130


@pytest.mark.parametrize("name", ["crop", "reorder", "mask"])
def test_what_becomes_of_a_history_depends_on_its_seed_alone(name: str) -> None:
    histories, gaps = [list(range(n)) for n in (8, 5, 12)], [[0.0] * n for n in (8, 5, 12)]
    operator = getattr(augment, name)
    whole = ragged(histories, gaps)
    together = pieces(operator(whole, 0.6, "random"))
    for row in range(3):
        assert pieces(operator(whole.take(np.array([row])), 0.6, "random")) == [together[row]]
    others = [pieces(operator(ragged(histories, gaps, seed), 0.6, "random")) for seed in range(3, 30, 3)]
    assert any(other != together for other in others)


def test_kinds_of_chance_are_apart() -> None:
    some = ragged([[0] * 50] * 200, [[0.0] * 50] * 200)
    drawn = [some.chance(use) for use in augment.Use]
    assert all(x.min() >= 0 and x.max() < 1 for x in drawn)
    assert abs(np.asarray(np.corrcoef(drawn))[~np.eye(len(drawn), dtype=bool)]).max() < 0.3
    events = some.chances(augment.Use.ORDER)
    assert len(np.unique(events)) == 10_000 and abs(events.mean() - 0.5) < 0.015
