"""Times: every unit and form comes out as the same seconds; what is no time is pointed at."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vouch.data.times import BadCellError, moment, to_numbers, to_seconds
from vouch.errors import ConfigError

MOMENTS = st.lists(st.integers(631_152_000, 4_000_000_000), min_size=1, max_size=10)


@given(
    MOMENTS, st.sampled_from([("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)])
)
def test_the_unit_of_numbers_is_told_by_their_size(moments: list[int], unit: tuple[str, int]) -> None:
    name, scale = unit
    numbers = [moment * scale + scale // 2 for moment in moments]
    for column in (pl.Series(numbers), pl.Series([f" {number}" for number in numbers])):
        seconds, found = to_seconds(column)
        assert found == name
        assert seconds.dtype == np.int64
        assert seconds.tolist() == moments


@given(
    MOMENTS, st.sampled_from(["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.000Z", "%Y/%m/%d %H:%M:%S"])
)
def test_iso_forms_are_read_as_utc(moments: list[int], form: str) -> None:
    texts = [datetime.fromtimestamp(moment, UTC).strftime(form) for moment in moments]
    seconds, found = to_seconds(pl.Series(texts))
    assert (seconds.tolist(), found) == (moments, "ISO dates")


def test_zones_days_and_mixed_forms() -> None:
    texts = ["2020-01-01T02:00:00+02:00", "2020-01-01", "2020-01-01 00:00:00 UTC", "2020-01-01T00:00"]
    assert to_seconds(pl.Series(texts))[0].tolist() == [1_577_836_800] * 4


def test_typed_columns_and_calendar_numbers() -> None:
    day = 1_577_836_800
    assert to_seconds(pl.Series([date(2020, 1, 1)]))[0].tolist() == [day]
    assert to_seconds(pl.Series([datetime(2020, 1, 1, 0, 0, 1)]))[0].tolist() == [day + 1]
    assert to_seconds(pl.Series([datetime(2020, 1, 1, tzinfo=UTC) + timedelta(milliseconds=999)]))[0].tolist() == [day]
    assert to_seconds(pl.Series([20200101, 20200301]))[0].tolist() == [day, day + 60 * 86_400]
    assert to_seconds(pl.Series([20200101, 20200231]))[1] == "seconds"  # no calendar has that day
    assert to_seconds(pl.Series([1.5e9, 1.5e9 + 0.7]))[0].tolist() == [1_500_000_000] * 2
    assert to_seconds(pl.Series([0, 0]))[0].tolist() == [0, 0]


def test_one_odd_value_does_not_rescale_the_others() -> None:
    seconds, unit = to_seconds(pl.Series([1_500_000_000] * 9 + [10**18]))
    assert unit == "seconds"
    assert seconds[0] == 1_500_000_000


@pytest.mark.parametrize(
    ("values", "row", "value"),
    [
        (["1", "2", "soon", "4"], 2, "soon"),
        (["soon", "2", "3"], 0, "soon"),
        (["2020-01-01", "yesterday"], 1, "yesterday"),
        (["2020-01-01", "2020-13-45"], 1, "2020-13-45"),
        (["2020-01-01", "03/04/2020"], 1, "03/04/2020"),  # day or month first?
        (["2020-01-01", "1577836800"], 1, "1577836800"),
        (["1", ""], 1, ""),
        (["1", None], 1, None),
        (["1", "nan"], 1, "nan"),
        (["1", "inf"], 1, "inf"),
        ([1.0, float("nan")], 1, float("nan")),
        ([1, None], 1, None),
        ([date(2020, 1, 1), None], 1, None),
        ([[1], [2]], 0, [1]),
        ([timedelta(1)], 0, timedelta(1)),
    ],
)
def test_the_cell_that_is_no_time_is_named(values: list, row: int, value: object) -> None:
    with pytest.raises(BadCellError) as error:
        to_seconds(pl.Series(values))
    assert error.value.row == row
    found = error.value.value
    assert found == value or (isinstance(found, pl.Series) and found.to_list() == value) or found != found


def test_numbers_from_text_truth_and_numbers() -> None:
    assert to_numbers(pl.Series([" 1", "2.5", "-3e1"])).tolist() == [1, 2.5, -30]
    assert to_numbers(pl.Series([True, False])).tolist() == [1, 0]
    for values, row in ((["1", "good"], 1), ([1.0, float("inf")], 1), ([[1]], 0)):
        with pytest.raises(BadCellError) as error:
            to_numbers(pl.Series(values))
        assert error.value.row == row


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2020-01-01", 1_577_836_800),
        ("2020", 1_577_836_800),
        ("2020-01-01T01:00+01:00", 1_577_836_800),
        (77777, 77777),
        ("-5", -5),
    ],
)
def test_moments(text: str | int, seconds: int) -> None:
    assert moment(text) == seconds


def test_a_moment_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="since is 'soon'"):
        moment("soon", "since")
