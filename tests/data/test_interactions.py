"""The log: sorted by user and time with ties in order, sliced by offsets, and the same after saving."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.data import Interactions
from vouch.errors import DataError

ROWS = st.lists(
    st.tuples(st.sampled_from("abcé"), st.integers(0, 6), st.integers(-3, 3), st.integers(1, 5)),
    min_size=1,
    max_size=40,
)
Row = tuple[str, int, int, int]


def log_of(rows: list[Row]) -> Interactions:
    user, item, time, value = zip(*rows, strict=True)
    return Interactions.from_arrays(user, item, time=time, value=value, scenario=[f"s{u}" for u in user])


def rows_of(log: Interactions) -> list[Row]:
    assert log.time is not None and log.value is not None
    users, items = log.users.ids(log.user), log.items.ids(log.item)
    return list(zip(users, items, log.time.tolist(), log.value.astype(int).tolist(), strict=True))  # type: ignore[arg-type]


@given(ROWS)
def test_rows_are_sorted_by_user_and_time_with_ties_in_their_order(rows: list[Row]) -> None:
    log = log_of(rows)
    assert rows_of(log) == sorted(rows, key=lambda row: (row[0].encode(), row[2]))  # Python's sort is stable
    for code in range(log.n_users):
        mine = [row for row in rows_of(log) if row[0] == log.users.id(code)]
        assert log.items.ids(log.history(code)) == [row[1] for row in mine]
        assert log.lengths[code] == len(mine)
    assert log.item_counts.tolist() == [
        sum(row[1] == item for row in rows) for item in log.items.ids(range(log.n_items))
    ]
    assert [log.labels["scenario"][code] for code in log.scenario] == [f"s{row[0]}" for row in rows_of(log)]


@given(ROWS)
def test_without_times_rows_keep_their_order(rows: list[Row]) -> None:
    log = Interactions.from_arrays([row[0] for row in rows], [row[1] for row in rows])
    found = list(zip(log.users.ids(log.user), log.items.ids(log.item), strict=True))
    assert found == [row[:2] for row in sorted(rows, key=lambda row: row[0].encode())]


@given(ROWS)
def test_rows_out_of_order_are_counted(rows: list[Row]) -> None:
    place = sorted(range(len(rows)), key=lambda row: (rows[row][0].encode(), rows[row][2]))
    pairs = pairwise(place)
    count = sum(right < left and rows[left][0] == rows[right][0] for left, right in pairs)
    assert log_of(rows).notes.get("rows_out_of_order", 0) == count


@given(ROWS, st.data())
def test_a_selection_keeps_codes_and_rows(rows: list[Row], data: st.DataObject) -> None:
    log = log_of(rows)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    part = log.where(keep)
    assert part.users is log.users and part.items is log.items
    assert rows_of(part) == [row for row, kept in zip(rows_of(log), keep, strict=True) if kept]
    assert part.lengths.tolist() == np.bincount(log.user[keep], minlength=log.n_users).tolist()
    if keep.any():
        smaller, users, items = part.compact()
        assert rows_of(smaller) == rows_of(part)
        assert (
            smaller.users.ids(range(smaller.n_users))
            == log.users.ids(users)
            == sorted({row[0] for row in rows_of(part)})
        )
        assert (
            smaller.items.ids(range(smaller.n_items))
            == log.items.ids(items)
            == sorted({row[1] for row in rows_of(part)})
        )


@settings(max_examples=25)
@given(ROWS)
def test_a_saved_log_opens_the_same(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    log, path = log_of(rows), tmp_path_factory.mktemp("log") / "log"
    log.save(path)
    opened = Interactions.open(path)
    assert rows_of(opened) == rows_of(log)
    assert opened.labels == log.labels
    assert opened.fingerprint == log.fingerprint
    assert isinstance(opened.item, np.memmap) or len(opened) == 0


@given(ROWS)
def test_csr_counts_pairs(rows: list[Row]) -> None:
    log = log_of(rows)
    dense = np.zeros((log.n_users, log.n_items))
    np.add.at(dense, (log.user, log.item), 1)
    np.testing.assert_array_equal(log.to_csr(binary=False).toarray(), dense)
    np.testing.assert_array_equal(log.to_csr().toarray(), dense > 0)


def test_the_fingerprint_tells_logs_apart() -> None:
    base = [("a", 1, 1, 1), ("a", 2, 2, 2), ("b", 1, 3, 3)]
    others = [
        [("a", 1, 1, 1), ("a", 2, 2, 2), ("b", 1, 3, 4)],  # a value
        [("a", 1, 1, 1), ("a", 2, 2, 2), ("b", 1, 4, 3)],  # a time
        [("a", 2, 1, 1), ("a", 1, 2, 2), ("b", 1, 3, 3)],  # the order of items
        [("a", 1, 1, 1), ("a", 2, 2, 2), ("c", 1, 3, 3)],  # only an id
        [("a", 1, 1, 1), ("a", 3, 2, 2), ("b", 1, 3, 3)],
    ]
    prints = {log_of(rows).fingerprint for rows in (base, *others)}
    assert len(prints) == 6
    assert log_of(base[::-1]).fingerprint == log_of(base).fingerprint


def test_a_part_of_an_opened_log_has_its_own_fingerprint(tmp_path) -> None:
    log_of([("a", 1, 1, 1), ("a", 2, 2, 2), ("b", 1, 3, 3)]).save(tmp_path / "log")
    opened = Interactions.open(tmp_path / "log")
    part = opened.where(np.array([True, False, True]))
    assert part.fingerprint != opened.fingerprint


def test_columns_cannot_be_written_to() -> None:
    log = log_of([("a", 1, 1, 1), ("b", 2, 2, 2)])
    for column in (
        log.item,
        log.offsets,
        log.time,
        log.value,
        log.user,
        log.where(log.item >= 0).item,
        log.compact()[0].item,
    ):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0


def test_moments_of_numpy_are_seconds() -> None:
    log = Interactions.from_arrays(
        [1, 1], [1, 2], time=np.array(["1970-01-02", "1970-01-01T00:00:05.9"], "datetime64[ms]")
    )
    assert log.time.tolist() == [5, 86_400]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [], "item": []}, "no rows"),
        ({"user": [1, 2], "item": [1]}, "shape"),
        ({"user": [1, 2], "item": [1, 2], "time": [1]}, "shape"),
        ({"user": [1.5], "item": [1]}, "fraction"),
        ({"user": [np.nan], "item": [1]}, "NaN"),
        ({"user": ["a", None], "item": [1, 2]}, "an id is None"),
        ({"user": ["a", ""], "item": [1, 2]}, "an id is ''"),
        ({"user": np.array(["a", np.nan], dtype=object), "item": [1, 2]}, "an id is nan"),
        ({"user": [1], "item": [1], "time": [np.nan]}, "'time' holds"),
        ({"user": [1], "item": [1], "time": ["soon"]}, "'time' holds"),
        ({"user": [1], "item": [1], "time": np.array(["NaT"], "datetime64[s]")}, "NaT"),
        ({"user": [1], "item": [1], "value": [np.inf]}, "'value' holds inf"),
        ({"user": np.arange(40_000), "item": np.arange(40_000), "scenario": np.arange(40_000)}, "32,767"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Interactions.from_arrays(**columns)


def test_unsigned_ids_beyond_int64_stay_apart() -> None:
    log = Interactions.from_arrays(np.array([(1 << 64) - 1, 1], dtype=np.uint64), [1, 2])
    assert sorted(log.users.ids([0, 1])) == ["1", str((1 << 64) - 1)]


def test_a_damaged_or_newer_log_is_refused(tmp_path) -> None:
    log = log_of([("a", 1, 1, 1), ("b", 2, 2, 2)])
    for name, damage, message in (
        ("item.npy", lambda file: np.save(file, np.zeros(1, np.int32)), "do not fit together"),
        ("value.npy", lambda file: np.save(file, np.zeros(1, np.float32)), "do not fit together"),
        ("item.npy", lambda file: file.write_bytes(file.read_bytes()[:-3]), "damaged"),
        ("item.npy", lambda file: file.unlink(), "missing"),
        ("log.json", lambda file: file.write_text('{"format": 99}'), "upgrade"),
        ("log.json", lambda file: file.write_text("[]"), "no header"),
        ("log.json", lambda file: file.unlink(), "not a prepared log"),
    ):
        log.save(tmp_path / "log")
        damage(tmp_path / "log" / name)
        with pytest.raises(DataError) as error:
            Interactions.open(tmp_path / "log")
        assert message in str(error.value)
