"""Splits: each protocol against a plain restatement of its rule, and a leak check that catches planted leaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vouch.data import Cases, Dataset, Interactions, Split, check_leaks, split
from vouch.data.split import PROTOCOLS
from vouch.errors import ConfigError, DataError

Asked = list[tuple[Any, list[Any], list[Any]]]
ROW = st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(0, 30))
ROWS = st.lists(ROW, min_size=3, max_size=70)


def dataset_of(rows: list[tuple[int, int, int]], *, times: bool = True) -> Dataset:
    user, item, time = zip(*rows, strict=True)
    return Dataset.of(Interactions.from_arrays(user, item, time=time if times else None))


def histories(log: Interactions) -> dict[int, list[tuple[int, int]]]:
    """User -> [(item, time)], oldest first, in original ids, of users with rows."""
    times = log.time if log.time is not None else np.zeros(len(log), np.int64)
    found: dict[int, list[tuple[int, int]]] = {}
    for user, item, time in zip(log.users.ids(log.user), log.items.ids(log.item), times, strict=True):
        found.setdefault(user, []).append((item, int(time)))  # type: ignore[arg-type]
    return found


def asked(made: Split, cases: Cases) -> Asked:
    """(user or None, history, targets) of each case, in original ids, sorted."""
    log, queries = made.dataset.interactions, cases.queries()
    targets, offsets = cases.targets()
    found = []
    for row, code in enumerate(cases.user):
        user = None if code < 0 else log.users.id(int(code))
        wanted = targets[offsets[row] : offsets[row + 1]]
        found.append((user, log.items.ids(queries.history(row)), log.items.ids(wanted)))
    return sorted(found, key=repr)


def items(pairs: list[tuple[int, int]]) -> list[int]:
    return [item for item, _ in pairs]


def try_split(dataset: Dataset, protocol: str, **settings: Any) -> Split:
    """The split, or no example where the log is refused (which its own test covers)."""
    try:
        return split(dataset, protocol, **settings)
    except DataError:
        assume(False)
        raise AssertionError from None


@given(ROWS, st.integers(1, 3))
def test_leave_one_out(rows: list[tuple[int, int, int]], min_history: int) -> None:
    made = try_split(dataset_of(rows), "leave-one-out", min_history=min_history)
    train: dict[int, list[tuple[int, int]]] = {}
    valid: Asked = []
    test: Asked = []
    for user, row in histories(made.dataset.interactions).items():
        train[user] = row
        if len(row) >= min_history + 2:
            train[user] = row[:-2]
            valid.append((user, items(row[:-2]), items(row[-2:-1])))
            test.append((user, items(row[:-1]), items(row[-1:])))
    assert histories(made.train) == train
    assert asked(made, made.valid) == sorted(valid, key=repr)
    assert asked(made, made.test) == sorted(test, key=repr)
    short = len(train) - len(test)
    assert made.dropped.get("users too short to ask about (kept in training)", 0) == short
    check_leaks(made)


@given(ROWS, st.sampled_from([0.1, 0.25, 0.4]))
def test_ratio(rows: list[tuple[int, int, int]], share: float) -> None:
    made = try_split(dataset_of(rows), "ratio", valid_share=share, test_share=share)
    train: dict[int, list[tuple[int, int]]] = {}
    valid: Asked = []
    test: Asked = []
    for user, row in histories(made.dataset.interactions).items():
        size = max(1, round(len(row) * share))
        train[user] = row
        if len(row) - 2 * size >= 1:
            train[user] = row[: -2 * size]
            valid.append((user, items(row[: -2 * size]), items(row[-2 * size : -size])))
            test.append((user, items(row[:-size]), items(row[-size:])))
    assert histories(made.train) == train
    assert asked(made, made.valid) == sorted(valid, key=repr)
    assert asked(made, made.test) == sorted(test, key=repr)
    check_leaks(made)


@given(ROWS, st.sampled_from([0.1, 0.25, 0.4]))
def test_temporal(rows: list[tuple[int, int, int]], share: float) -> None:
    made = try_split(dataset_of(rows), "temporal", valid_share=share, test_share=share)
    first, second = made.settings["valid_from"], made.settings["test_from"]
    moments = sorted(time for _, _, time in rows)
    assert second == moments[int(len(rows) * (1 - share))]
    assert first == moments[int(len(rows) * (1 - share - share))]
    train: dict[int, list[tuple[int, int]]] = {}
    valid: Asked = []
    test: Asked = []
    for user, row in histories(made.dataset.interactions).items():
        old = [pair for pair in row if pair[1] < first]
        middle = [pair for pair in row if first <= pair[1] < second]
        new = [pair for pair in row if pair[1] >= second]
        if old:
            train[user] = old
        if old and middle:
            valid.append((user, items(old), items(middle)))
        if (old or middle) and new:
            test.append((user if old else None, items(old + middle), items(new)))
    assert histories(made.train) == train
    assert asked(made, made.valid) == sorted(valid, key=repr)
    assert asked(made, made.test) == sorted(test, key=repr)
    check_leaks(made)


@given(st.lists(ROW, min_size=25, max_size=70), st.booleans())
def test_session(rows: list[tuple[int, int, int]], times: bool) -> None:
    made = try_split(dataset_of(rows, times=times), "session", valid_share=0.2, test_share=0.3)
    whole = histories(made.dataset.interactions)
    order = sorted(whole, key=lambda session: (whole[session][0][1], session))  # by start, then by id
    n_test, n_valid = max(1, round(0.3 * len(order))), max(1, round(0.2 * len(order)))
    cut = len(order) - n_test

    def prefixes(sessions: list[int]) -> Asked:
        found: Asked = []
        for session in sessions:
            row = items(whole[session])
            found += [(None, row[:end], row[end : end + 1]) for end in range(1, len(row))]
        return sorted(found, key=repr)

    assert histories(made.train) == {session: whole[session] for session in order[: cut - n_valid]}
    assert asked(made, made.valid) == prefixes(order[cut - n_valid : cut])
    assert asked(made, made.test) == prefixes(order[cut:])
    check_leaks(made)


def test_items_that_only_the_test_has_are_counted() -> None:
    made = split(dataset_of([(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 1), (2, 2, 2), (2, 1, 3)]))
    assert made.dropped["test targets never seen in training (kept, count as misses)"] == 1
    assert made.describe()["test_cases"] == 2


def test_cases_come_in_blocks_and_selections() -> None:
    made = split(dataset_of([(user, item, item) for user in range(5) for item in range(4)]))
    assert list(made.test.blocks(2)) == [(0, 2), (2, 4), (4, 5)]
    some = made.test.take(np.array([3, 1]))
    assert [(row[0], row[2]) for row in asked(made, some)] == [(1, [3]), (3, [3])]


@pytest.mark.parametrize(
    ("rows", "protocol", "message"),
    [
        ([(1, 1, 1), (1, 1, 2), (1, 1, 3)], "leave-one-out", "one item"),
        ([(1, 1, 1), (1, 2, 2), (2, 1, 3)], "leave-one-out", "2 users with at most 2 events each"),
        ([(1, 1, 1), (1, 2, 2), (2, 1, 3)], "ratio", "2 users with at most 2 events each"),
        ([(1, 1, 5), (1, 2, 5), (2, 1, 5)], "temporal", "too coarse"),
        ([(1, 1, 1), (1, 2, 2), (2, 1, 3)], "session", "2 sessions; a session split needs at least 3"),
        ([(1, 1, 1), (2, 2, 2), (3, 1, 3)], "session", "no validation case"),
        ([(1, 1, t) for t in range(9)] + [(2, 2, 10 + t) for t in range(3)], "temporal", "no validation case"),
    ],
)
def test_logs_that_cannot_be_split_say_why(rows: list[tuple[int, int, int]], protocol: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(dataset_of(rows), protocol)


def test_a_temporal_split_needs_times() -> None:
    with pytest.raises(DataError, match="needs times and the log has none"):
        split(dataset_of([(1, 1, 1), (1, 2, 2)], times=False), "temporal")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "leave-two-out"}, "no split protocol 'leave-two-out'"),
        ({"valid_share": 0}, "valid_share is 0"),
        ({"test_share": 1.5}, "test_share is 1.5"),
        ({"valid_share": 0.5, "test_share": 0.5}, "nothing is left"),
        ({"min_history": 0}, "min_history is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(dataset_of([(1, 1, 1), (1, 2, 2), (1, 3, 3)]), **settings)


@pytest.fixture(scope="module")
def made() -> dict[str, Split]:
    draw = np.random.default_rng(0)
    log = Interactions.from_arrays(
        draw.integers(0, 30, 600),
        draw.integers(0, 40, 600),
        time=draw.integers(0, 10**6, 600),
        value=draw.integers(1, 6, 600),
    )
    return {protocol: split(Dataset.of(log), protocol) for protocol in PROTOCOLS}


def train_on(made: Split, rows: np.ndarray) -> Split:
    """The same split with more rows of the log in training."""
    log = made.dataset.interactions
    keep = np.zeros(len(log), dtype=bool)
    starts = log.offsets[:-1]
    for start, length in zip(starts, made.train.lengths, strict=True):
        keep[start : start + length] = True
    keep[rows] = True
    return replace(made, train=log.where(keep))


def move(cases: Cases, **change: int) -> Cases:
    """The same cases, the last of them changed by some rows."""
    columns = {name: getattr(cases, name).copy() for name in ("user", "start", "stop", "target_stop")}
    for name, step in change.items():
        columns[name][-1] += step
    return replace(cases, **columns)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_trained_target_is_caught(made: dict[str, Split], protocol: str, part: str) -> None:
    right = made[protocol]
    check_leaks(right)
    cases: Cases = getattr(right, part)
    for case in (0, len(cases) // 2, len(cases) - 1):
        leaky = train_on(right, cases.stop[case : case + 1])
        with pytest.raises(DataError):
            check_leaks(leaky)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_other_planted_leaks_are_caught(made: dict[str, Split], protocol: str) -> None:
    right = made[protocol]
    log = right.dataset.interactions
    wrong: dict[str, Split] = {
        "validation is tested": replace(right, test=right.valid),
        "history begins in another user": replace(right, test=move(right.test, start=-1)),
        "history begins nowhere": replace(right, test=move(right.test, start=10_000)),
        "history begins before the log": replace(right, test=move(right.test, start=-10_000)),
        "targets run into the next user": replace(right, test=move(right.test, target_stop=1_000)),
        "asked twice": replace(right, test=right.test.take(np.array([0, 0]))),
        "another user is named": replace(right, test=move(right.test, user=1)),
        "training has other items": replace(right, train=replace(right.train, item=np.roll(right.train.item, 1))),
        "training has other times": replace(right, train=replace(right.train, time=right.train.time + 1)),
        "training has other values": replace(right, train=replace(right.train, value=right.train.value + 1)),
        "training has lost its times": replace(right, train=replace(right.train, time=None)),
        "training is another log": replace(right, train=split(dataset_of([(1, i, i) for i in range(9)])).train),
    }
    if protocol in ("leave-one-out", "session"):
        wrong["history holds the target"] = replace(right, test=move(right.test, stop=1))
    if protocol == "leave-one-out":
        wrong["two targets"] = replace(right, valid=move(right.valid, target_stop=1))
        wrong["not the last"] = replace(
            right, test=move(right.test, stop=-1, target_stop=-1), valid=right.valid.take(np.arange(1, 5))
        )
    if protocol == "temporal":
        wrong["the cut lies later"] = replace(right, settings={**right.settings, "valid_from": int(log.time.min())})
        wrong["the second cut lies later"] = replace(
            right, settings={**right.settings, "test_from": int(log.time.max())}
        )
    if protocol == "session":
        wrong["old sessions are asked about"] = _session_order_reversed(right)
    missed = []
    for what, leaky in wrong.items():
        try:
            check_leaks(leaky)
            missed.append(what)
        except DataError:
            pass
    assert missed == []


def _session_order_reversed(made: Split) -> Split:
    """Train on the sessions that begin last and test on those that begin first."""
    log = made.dataset.interactions
    order = np.argsort(log.time[log.offsets[:-1]])
    in_train = np.zeros(log.n_users, dtype=bool)
    in_train[order[10:]] = True
    empty = made.valid.take(np.arange(0))
    start, stop = log.offsets[order[:10]], log.offsets[order[:10]] + 1
    test = Cases(log, np.full(10, -1, np.int32), start, stop, stop + 1)
    valid = replace(empty, log=log)
    train = log.where(np.repeat(in_train, log.lengths))
    return replace(made, train=train, valid=valid, test=test)
