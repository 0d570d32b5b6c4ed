"""Times as they come (unix numbers of any unit, dates in ISO form) as seconds since 1970 UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.errors import ConfigError

UNITS = (("nanoseconds", 10**9, 1e17), ("microseconds", 10**6, 1e14), ("milliseconds", 10**3, 1e11))
"""Name, how many make a second, and the size above which a number is taken for it (1e11 s is the year 5138)."""


class BadCellError(Exception):
    """A cell of a column cannot be used: its row number, its value, and what was wanted."""

    def __init__(self, row: int, value: Any, wanted: str) -> None:
        super().__init__(row, value, wanted)
        self.row, self.value, self.wanted = row, value, wanted


def to_seconds(column: pl.Series) -> tuple[NDArray[np.int64], str]:
    """Seconds since 1970 UTC `(n,)`, and the unit that was recognised. Dates without a zone are taken for UTC.

    Raises:
        BadCellError: a cell is empty or is no time.
    """
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        _refuse(column, column.is_null())
        return column.dt.epoch("s").cast(pl.Int64).to_numpy(), "dates"
    if column.dtype == pl.String:
        return _from_text(column)
    return _by_size(to_numbers(column))


def to_numbers(column: pl.Series) -> NDArray[Any]:
    """A column of finite numbers `(n,)`, from numbers, truth values or their spelling.

    Raises:
        BadCellError: a cell is empty or is no finite number.
    """
    number = column.str.strip_chars().cast(pl.Float64, strict=False) if column.dtype == pl.String else column
    if number.dtype == pl.Boolean or number.dtype.is_decimal():
        number = number.cast(pl.Float64)
    if not number.dtype.is_numeric():
        raise BadCellError(0, column.to_list()[0], f"numbers are wanted, the column holds {column.dtype}")
    _refuse(column, ~number.is_finite().fill_null(False) if number.dtype.is_float() else number.is_null())
    return number.to_numpy()


def moment(text: str | int, name: str = "time") -> int:
    """Unix seconds of an ISO date or time (UTC unless it says otherwise), of a year, or of a plain number.

    Raises:
        ConfigError: the text is none of these.
    """
    shown = str(text).strip()
    try:
        if shown.removeprefix("-").isdigit() and len(shown) != 4:
            return int(shown)
        found = datetime.fromisoformat(shown if len(shown) != 4 else f"{shown}-01-01")
        return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, which is no time", hint="write 2024-01-31 or unix seconds") from error


def _refuse(column: pl.Series, bad: pl.Series, wanted: str = "drop or mend such rows") -> None:
    if bool(bad.any()):
        row = int(bad.arg_max() or 0)
        raise BadCellError(row, column[row], wanted)


def _from_text(column: pl.Series) -> tuple[NDArray[np.int64], str]:
    text = column.str.strip_chars()
    whole = text.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return _by_size(whole.to_numpy())
    number = text.cast(pl.Float64, strict=False)
    is_number = number.is_finite().fill_null(False)
    if bool(is_number.all()):
        return _by_size(number.to_numpy())
    # Day-first and month-first dates cannot be told apart, so a date must begin with its year.
    iso = text.set(~text.str.contains(r"^\d{4}[-/]\d{1,2}[-/]\d{1,2}").fill_null(False), None).str.replace(
        " ?UTC$", "Z"
    )
    dates = _parse(iso)
    _refuse(
        column, dates.is_null() & ~is_number, "times are unix seconds or milliseconds, or ISO dates (2024-01-31T12:00)"
    )
    _refuse(column, is_number, "the column mixes dates and numbers; use one of them")
    return dates.dt.epoch("s").to_numpy(), "ISO dates"


def _parse(iso: pl.Series) -> pl.Series:
    """Moments of texts, null where there is none; forms are inferred one after the other, as they come."""
    dates = pl.Series([None] * len(iso), dtype=pl.Datetime("us", "UTC"))
    while True:
        left = iso.set(dates.is_not_null(), None)
        try:
            more = left.str.to_datetime(time_unit="us", time_zone="UTC", strict=False)
        except pl.exceptions.PolarsError:  # no form can be inferred from what is left
            return dates
        if more.null_count() == len(more):
            return dates
        dates = dates.zip_with(more.is_null(), more)


def _by_size(values: NDArray[Any]) -> tuple[NDArray[np.int64], str]:
    """Tell the unit of unix times by their typical size: one odd value must not rescale all others."""
    sizes = np.abs(values[:: max(1, len(values) >> 20)])
    sizes = sizes[sizes > 0]
    typical = float(np.median(sizes)) if len(sizes) else 0.0
    if 19_000_101 <= typical <= 21_001_231:
        days = _calendar_days(values)
        if days is not None:
            return days, "YYYYMMDD dates"
    for unit, scale, limit in UNITS:
        if typical > limit:
            return (values // scale).astype(np.int64), unit
    return np.floor(values).astype(np.int64, copy=False) if values.dtype.kind == "f" else values.astype(
        np.int64
    ), "seconds"


def _calendar_days(values: NDArray[Any]) -> NDArray[np.int64] | None:
    """Seconds of numbers such as 20240131, or None if some number is no date."""
    whole = values.astype(np.int64)
    year, month, day = whole // 10_000, whole // 100 % 100, whole % 100
    fits = (values == whole) & (year >= 1900) & (year <= 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    if not bool(fits.all()):
        return None
    months = (year - 1970).astype("datetime64[Y]").astype("datetime64[M]") + (month - 1).astype("timedelta64[M]")
    days = months.astype("datetime64[D]") + (day - 1).astype("timedelta64[D]")
    if not bool((days.astype("datetime64[M]") == months).all()):  # such as 31 February
        return None
    return days.astype("datetime64[s]").astype(np.int64)
