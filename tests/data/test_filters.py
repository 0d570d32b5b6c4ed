"""Filters: each against a plain restatement of its rule; vocabularies and tables shrink to what is left."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vouch.data import Catalog, Dataset, Interactions
from vouch.data.filters import Filters, apply
from vouch.errors import ConfigError, DataError

Row = tuple[int, int, int, int]
ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=50
)


def dataset_of(rows: list[Row]) -> Dataset:
    """A dataset whose catalogue, features and users carry the ids, so that misalignment shows."""
    user, item, time, value = zip(*rows, strict=True)
    log = Interactions.from_arrays(user, item, time=time, value=value)
    ids = log.items.ids(np.arange(log.n_items))
    catalog = Catalog(log.items, pl.DataFrame({"name": [f"item {i}" for i in ids]}), {"name": "title"},
                      {"image": np.array(ids, np.float32)[:, None]})  # fmt: skip
    return Dataset(log, catalog, pl.DataFrame({"name": log.users.ids(np.arange(log.n_users))}), "d")


def rows_of(dataset: Dataset) -> list[Row]:
    log = dataset.interactions
    columns = (log.users.ids(log.user), log.items.ids(log.item), log.time.tolist(), log.value.astype(int).tolist())
    return list(zip(*columns, strict=True))  # type: ignore


def filtered(rows: list[Row], **settings: Any) -> tuple[list[Row], Dataset | None]:
    try:
        found = apply(dataset_of(rows), Filters(**settings))
    except DataError as error:
        assert "leaves no row" in error.what
        return [], None
    log = found.interactions
    assert log.lengths.min() > 0 and log.item_counts.min() > 0
    ids = log.items.ids(np.arange(log.n_items))
    assert found.catalog.table["name"].to_list() == [f"item {i}" for i in ids]
    assert found.catalog.features["image"][:, 0].tolist() == ids
    assert found.users is not None and found.users["name"].to_list() == log.users.ids(np.arange(log.n_users))
    assert sum(log.notes.get("dropped", {}).values()) == len(rows) - len(log)
    return rows_of(found), found


@given(ROWS, st.integers(1, 5))
def test_minimum_value(rows: list[Row], least: int) -> None:
    assert filtered(rows, min_value=least)[0] == [row for row in rows_of(dataset_of(rows)) if row[3] >= least]


@given(ROWS, st.integers(0, 20), st.integers(0, 20))
def test_time_window(rows: list[Row], since: int, until: int) -> None:
    found, _ = filtered(rows, since=since, until=str(until))
    assert found == [row for row in rows_of(dataset_of(rows)) if since <= row[2] < until]


@given(ROWS, st.sampled_from(["all", "first", "last"]))
def test_duplicates(rows: list[Row], policy: str) -> None:
    whole = rows_of(dataset_of(rows))
    seen: dict[tuple[int, int], Row] = {}
    for row in whole if policy == "first" else whole[::-1]:
        seen.setdefault(row[:2], row)
    kept = whole if policy == "all" else [row for place, row in enumerate(whole) if _is(place, row, whole, policy)]
    assert filtered(rows, duplicates=policy)[0] == kept
    if policy != "all":
        assert sorted(kept) == sorted(seen.values())


def _is(place: int, row: Row, whole: list[Row], policy: str) -> bool:
    others = whole[:place] if policy == "first" else whole[place + 1 :]
    return all(other[:2] != row[:2] for other in others)


@given(ROWS, st.integers(0, 4), st.integers(0, 4))
def test_k_core(rows: list[Row], per_user: int, per_item: int) -> None:
    kept = rows_of(dataset_of(rows))
    while True:
        users, items = Counter(row[0] for row in kept), Counter(row[1] for row in kept)
        fewer = [row for row in kept if users[row[0]] >= per_user and items[row[1]] >= per_item]
        if len(fewer) == len(kept):
            break
        kept = fewer
    assert filtered(rows, k_core_user=per_user, k_core_item=per_item)[0] == kept


def test_filters_work_in_their_fixed_order_and_are_noted() -> None:
    rows = [
        (1, 1, 1, 5),
        (1, 1, 2, 1),
        (1, 2, 3, 5),
        (2, 1, 4, 5),
        (2, 2, 5, 5),
        (2, 2, 6, 5),
        (3, 1, 7, 5),
        (3, 1, 99, 5),
    ]
    settings = {"until": 50, "min_value": 2, "duplicates": "first", "k_core_user": 2, "k_core_item": 2}
    found, dataset = filtered(rows, **settings)
    assert found == [(1, 1, 1, 5), (1, 2, 3, 5), (2, 1, 4, 5), (2, 2, 5, 5)]
    assert dataset is not None
    notes = dataset.interactions.notes
    assert notes["dropped"] == {"until": 1, "min_value": 1, "duplicates": 1, "k_core": 1}
    assert notes["filters"] == settings
    again = apply(dataset, Filters(since=2)).interactions.notes
    assert again["dropped"] == {"until": 1, "min_value": 1, "duplicates": 1, "k_core": 1, "since": 1}
    assert again["filters"] == {**settings, "since": 2}


def test_a_filter_that_drops_nothing_changes_nothing() -> None:
    dataset = dataset_of([(1, 1, 1, 5), (2, 1, 2, 5)])
    assert apply(dataset, Filters()) is dataset
    assert apply(dataset, Filters(min_value=1, k_core_item=2)) is dataset


def test_filters_without_their_column_are_refused() -> None:
    bare = Dataset.of(Interactions.from_arrays([1], [1]))
    for settings, message in (({"since": "2020"}, "needs times"), ({"min_value": 1}, "needs values")):
        with pytest.raises(DataError, match=message):
            apply(bare, Filters(**settings))


def test_what_leaves_nothing_is_named() -> None:
    dataset = dataset_of([(1, 1, 1, 5), (2, 1, 2, 5)])
    for settings, message in (
        ({"min_value": 6}, "min_value = 6.0 leaves no row of 2"),
        ({"since": "2020-01-01"}, "since = '2020-01-01' leaves no row"),
        ({"k_core_user": 2}, "k_core = (2 rows a user, 0 rows an item) leaves no row"),
    ):
        with pytest.raises(DataError) as error:
            apply(dataset, Filters(**settings))
        assert message in error.value.what


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"since": "someday"}, "'someday'"),
        ({"k_core_user": -1}, "greater than or equal to 0"),
        ({"duplicates": "some"}, "'all', 'first' or 'last'"),
        ({"minimum": 3}, "Filters has no setting 'minimum'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Filters(**settings)
    assert message in error.value.what
