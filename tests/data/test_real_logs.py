"""Real logs: the readers find the counts that are published or were counted by other means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vouch.data import check_leaks, split
from vouch.data.inspect import inspect
from vouch.data.readers import read

pytestmark = pytest.mark.real
Find = Callable[[str], Path]

COUNTS = {
    "ml_100k": (100_000, 943, 1_682, "1997-09-20", "1998-04-22"),
    "ml_latest_small": (100_836, 610, 9_724, "1996-03-29", "2018-09-24"),
    "ml_1m_sasrec": (987_531 + 6_040 + 512, 6_040, 3_416, None, None),
    "amazon_beauty": (198_502, 22_363, 12_101, "2002-06-12", "2014-07-23"),
    "amazon_sports": (296_337, 35_598, 18_357, "2002-03-07", "2014-07-23"),
    "amazon_toys": (167_597, 19_412, 11_924, None, None),
    "amazon_home": (551_682, 66_519, 28_237, None, None),
    "amazon_musical_instruments": (10_261, 1_429, 900, "2004-09-18", "2014-07-22"),
    "yelp_2022": (207_045, 19_855, 14_541, "2019-01-01", "2019-12-30"),
    "diginetica": (906_140 + 76_821, 186_670 + 15_963, 43_097, None, None),
    "tmall_sessions": (416_554 + 26_925, 65_286 + 1_027, 40_727, None, None),
    "gowalla_sessions": (212_824, 57_492, 24_513, None, None),
    "lastfm": (52_551, 1_090, 3_646, None, None),
    "steam_fsr": (114_713, 3_753, 5_092, None, None),
    "kuairand_explicit": (41_828, 664, 9_359, "2022-04-07", "2022-04-21"),  # in UTC; its days are those of Beijing
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(real_data: Find, name: str) -> None:
    rows, users, items, first, last = COUNTS[name]
    dataset = read(real_data(name))
    facts = inspect(dataset).to_dict()
    assert (facts["rows"], facts["users"], facts["items"]) == (rows, users, items)
    assert facts.get("first", "")[:10] == (first or "")
    assert facts.get("last", "")[:10] == (last or "")


def test_movielens_100k_warns_of_its_ties(real_data: Find) -> None:
    dataset = read(real_data("ml_100k"))
    found = inspect(dataset)
    assert found.facts["test_items_that_depend_on_tie_order"] == 415
    assert round(found.facts["share_of_adjacent_rows_at_one_moment"], 2) == 0.51
    assert any("for 415 of 943 users the last two do" in warning for warning in found.warnings)
    assert found.facts["rows_per_user"] == {"min": 20, "median": 65, "max": 737}
    assert dataset.catalog.title(0) == "Toy Story"
    genres = dataset.catalog.attribute("class")
    assert len(genres.labels) == 1 + 19 and (genres.codes[:, 0] > 0).all()
    assert dataset.users is not None and dataset.users["gender"].value_counts().sort("gender")["count"].to_list() == [
        273,
        670,
    ]


@pytest.mark.parametrize(
    ("name", "share", "users"), [("amazon_beauty", 0.439, 9_719), ("amazon_sports", 0.476, 16_049)]
)
def test_amazon_warns_of_its_days(real_data: Find, name: str, share: float, users: int) -> None:
    found = inspect(read(real_data(name)))
    assert found.facts["test_items_that_depend_on_tie_order"] == users
    assert round(found.facts["share_of_adjacent_rows_at_one_moment"], 3) == share
    assert any("day resolution" in warning for warning in found.warnings)
    assert found.facts["catalog"]["attributes"] == found.facts["items"]


def test_the_other_order_of_beauty_moves_the_last_item(real_data: Find) -> None:
    folder = real_data("amazon_beauty")
    one = split(read(folder)).test.targets()[0]
    other = split(read(folder / "sequences_ticoserec_order.txt.gz")).test.targets()[0]
    assert (one != other).sum() == 6_522


def test_the_joined_movielens_1m_tells_what_it_lacks(real_data: Find) -> None:
    warnings = inspect(read(real_data("ml_1m_sasrec"))).warnings
    assert any("5528 of 6040 users have no line in valid.txt" in warning for warning in warnings)


def test_kuairand_has_rows_twice_and_users(real_data: Find) -> None:
    dataset = read(real_data("kuairand_explicit"))
    assert inspect(dataset).facts["identical_rows"] == 129  # 124 to the millisecond, and 5 more within a second
    assert dataset.users is not None and dataset.users.shape == (664, 30)


@pytest.mark.parametrize("name", ["ml_100k", "amazon_beauty"])
@pytest.mark.parametrize("protocol", ["leave-one-out", "temporal", "ratio", "session"])
def test_splits_do_not_leak(real_data: Find, name: str, protocol: str) -> None:
    check_leaks(split(read(real_data(name)), protocol))


def test_leave_one_out_keeps_every_beauty_user(real_data: Find) -> None:
    made = split(read(real_data("amazon_beauty")))
    assert len(made.train) == 198_502 - 2 * 22_363
    assert len(made.test) == len(made.valid) == 22_363
    assert made.dropped.get("users too short to ask about (kept in training)", 0) == 0
