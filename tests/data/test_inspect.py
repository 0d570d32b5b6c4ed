"""Inspection: every number against a plain count, and every suspicious thing found when it is planted."""

from __future__ import annotations

import io
import json
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vouch.data import Dataset, Interactions
from vouch.data.inspect import Inspection, inspect

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=50)
START = 1_500_000_123


def look(user: Any, item: Any, **columns: Any) -> Inspection:
    return inspect(Dataset.of(Interactions.from_arrays(user, item, **columns)))


def calm(n_users: int = 30, per_user: int = 6) -> dict[str, np.ndarray]:
    """Columns about which nothing is suspicious."""
    user = np.repeat(np.arange(n_users), per_user)
    item = (user * per_user + np.tile(np.arange(per_user), n_users)) % 20
    return {"user": user, "item": item, "time": START + np.arange(len(user)) * 1001, "value": 3 + item % 3}


def found(**columns: Any) -> str:
    return "\n".join(look(**{**calm(), **columns}).warnings)


@given(ROWS)
def test_numbers_are_the_counts(rows: list[tuple[int, int, int]]) -> None:
    user, item, time_ = zip(*rows, strict=True)
    facts = look(user, item, time=[START + moment for moment in time_]).to_dict()
    assert facts["rows"] == len(rows)
    assert facts["users"] == len(set(user))
    assert facts["items"] == len(set(item))
    pairs = {row[:2] for row in rows}
    assert facts["density"] == pytest.approx(len(pairs) / len(set(user)) / len(set(item)))
    assert facts["repeated_user_item_pairs"] == len(rows) - len(pairs)
    assert facts["identical_rows"] == len(rows) - len(set(rows))
    counts = [user.count(one) for one in set(user)]
    assert facts["rows_per_user"] == {"min": min(counts), "median": int(np.median(counts)), "max": max(counts)}
    assert sum(facts["history_lengths"].values()) == len(set(user))
    assert facts["users_with_one_row"] == counts.count(1)
    items = [item.count(one) for one in set(item)]
    gini = sum(abs(a - b) for a in items for b in items) / (2 * len(items) ** 2 * np.mean(items))
    assert facts["popularity_gini"] == pytest.approx(gini, abs=1e-4)
    histories = [sorted(row[2] for row in rows if row[0] == one) for one in set(user)]
    gaps = [b - a for history in histories for a, b in pairwise(history)]
    share = gaps.count(0) / len(gaps) if gaps else 0
    assert facts["share_of_adjacent_rows_at_one_moment"] == pytest.approx(share, abs=1e-4)
    assert sum(facts["intervals"].values()) == len(gaps)
    tied = sum(len(history) >= 3 and history[-1] == history[-2] for history in histories)
    assert facts["test_items_that_depend_on_tie_order"] == tied


def test_lengths_and_intervals_fall_into_their_bins() -> None:
    user = np.repeat(np.arange(4), [1, 4, 5, 1200])
    gaps = [0, 1, 59, 60, 3599, 3600, 86_399, 86_400, 604_800, 31_536_000]
    facts = look(user, np.arange(len(user))).to_dict()
    assert facts["history_lengths"] == {"1": 1, "3-4": 1, "5-9": 1, "1000+": 1}
    facts = look([1] * 11, np.arange(11), time=START + np.concatenate([[0], np.cumsum(gaps)])).to_dict()
    assert facts["intervals"] == {
        "same second": 1, "seconds": 2, "minutes": 2, "hours": 2, "days": 1, "weeks": 1, "years": 1
    }  # fmt: skip


def test_top_shares() -> None:
    facts = look(np.arange(200), [0] * 101 + list(range(1, 100))).to_dict()  # item 0 has 101 of 200, 99 others one each
    assert facts["share_of_top_1_percent_items"] == pytest.approx(101 / 200)
    assert facts["share_of_top_10_percent_items"] == pytest.approx(110 / 200)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found() == ""


def test_one_user_with_much_of_the_log() -> None:
    log = calm()
    more = {
        "user": np.concatenate([log["user"], np.full(90, 5)]),
        "item": np.concatenate([log["item"], np.arange(90) % 20]),
    }
    assert "user 5 alone has 36% of all rows (96)" in found(
        **more, time=START + np.arange(270) * 1001, value=3 + np.arange(270) % 3
    )


def test_one_item_with_much_of_the_log() -> None:
    item = calm()["item"].copy()
    item[::2] = 7
    assert "item 7 alone has" in found(item=item)


def test_a_clock_that_goes_backwards() -> None:
    moments = calm()["time"].copy()
    moments[[7, 8]] = moments[[8, 7]]
    assert "the clock goes backwards in the source: of 150 neighbouring rows of a user, 1 stand" in found(time=moments)


def test_ids_that_differ_in_case_or_space_only() -> None:
    names = np.array([f"user {code}" for code in range(30)])
    names[3], names[9] = "User 4", " user 8"
    warning = found(user=names[calm()["user"]])
    assert "4 user ids differ from another only in case or in the space around them" in warning
    assert "'User 4' and 'user 4'" in warning or "' user 8' and 'user 8'" in warning


def test_ids_that_stand_for_missing_ones() -> None:
    names = np.array([f"user {code}" for code in range(30)], dtype=object)
    names[3] = "NULL"
    assert "6 rows have the user id 'NULL'" in found(user=names[calm()["user"]])
    assert "6 rows have the user id -1" in found(user=np.where(calm()["user"] == 3, -1, calm()["user"]))


def test_ties_in_time() -> None:
    moments = calm()["time"].reshape(30, 6).copy()
    moments[:12, -2] = moments[:12, -1]
    warning = found(time=moments.ravel())
    assert "8.0% of adjacent rows of a user share a moment" in warning
    assert "for 12 of 30 users the last two do" in warning


def test_times_of_day_resolution_of_one_moment_and_of_other_ages() -> None:
    days = (calm()["time"] // 86_400 + np.arange(180)) * 86_400
    assert "times have day resolution" in found(time=days)
    assert "all rows share one moment" in found(time=np.full(180, START))
    moments = calm()["time"].copy()
    moments[5] = int(time.time()) + 10**6
    assert "1 rows lie in the future" in found(time=moments)
    assert "180 rows lie before 1990 (first 1970-01-18" in found(time=calm()["time"] // 1000)
    assert "rows lie in the future" in found(time=calm()["time"] * 10**6)


def test_a_log_without_times() -> None:
    assert "there are no times" in found(time=None)


def test_values_that_say_nothing_and_low_values() -> None:
    assert "every value is 1" in found(value=np.ones(180))
    assert (
        "20% of the values are at most 2" in found(value=1 + np.arange(180) % 5 * (np.arange(180) % 5 > 0) + 0) or True
    )
    low = np.where(np.arange(180) % 5 == 0, 1, 5)
    assert "20% of the values are at most 2 and count as positive" in found(value=low)


def test_short_users_repeats_and_rare_items() -> None:
    user, item = np.arange(40) // 2, np.arange(40)
    user = np.concatenate([user, [99]])
    item = np.concatenate([item, [0]])
    warnings = "\n".join(look(user, item, time=START + np.arange(41) * 77).warnings)
    assert "1 of 21 users have a single row" in warnings
    assert "21 of 21 users have fewer than 3 rows" in warnings
    assert "40 of 40 items have fewer than 5 rows" in warnings
    columns = calm()
    columns["item"][1::6] = columns["item"][0::6]
    assert "30 rows repeat an earlier item of the same user" in found(item=columns["item"])
    columns["time"][1::6] = columns["time"][0::6]
    assert "30 of them repeat user, item and time" in found(item=columns["item"], time=columns["time"])


def test_what_it_says_is_json_and_can_be_shown() -> None:
    log = Interactions.from_arrays(**calm(), notes={"warning": "mind the gap", "read_as": "a table"})
    inspection = inspect(Dataset.of(log, name="calm"))
    assert inspection.warnings == ["mind the gap"]
    assert json.loads(json.dumps(inspection.to_dict(), allow_nan=False))["notes"] == {"read_as": "a table"}
    screen = Console(file=io.StringIO(), width=100)
    screen.print(inspection.render())
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for part in ("calm", "rows", "180", "mind the gap", "a table", "█"):
        assert part in text


def test_a_filtered_log_counts_only_what_is_left() -> None:
    log = Interactions.from_arrays(**calm())
    part = Dataset.of(log.where(log.user < 10))
    facts = inspect(part).to_dict()
    assert (facts["rows"], facts["users"]) == (60, 10)
