"""Which column is what: the usual names, explicit mappings, and turning columns into ids, seconds and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.data.interactions import OPTIONAL, Interactions
from vouch.data.vocabulary import Vocabulary
from vouch.errors import ConfigError, DataError, did_you_mean

USUAL: dict[str, tuple[str, ...]] = {
    "user": ("user", "user_id", "userid", "uid", "u", "reviewerid", "reviewer_id", "customer_id", "customerid", "visitorid",
             "visitor_id", "account_id", "session", "session_id", "sessionid"),
    "item": ("item", "item_id", "itemid", "iid", "i", "movieid", "movie_id", "product_id", "productid", "asin", "parent_asin",
             "video_id", "videoid", "track_id", "song_id", "artist_id", "book_id", "business_id", "article_id", "sku"),
    "time": ("time", "timestamp", "ts", "t", "unixreviewtime", "unix_time", "unixtime", "time_ms", "timestamp_ms", "datetime",
             "date", "created_at", "event_time"),
    "value": ("value", "rating", "ratings", "score", "stars", "overall", "weight", "count"),
    "scenario": ("scenario",),
    "domain": ("domain",),
}  # fmt: skip
"""Names recognised without a mapping, in lower case, best first."""


@dataclass
class RawLog:
    """A log as found: a lazy frame with some of the columns of `USUAL` under those names, in file order.

    Attributes:
        frame: the columns; ids and times may still be text.
        source: the file the rows come from, for error messages.
        first_line: the file's line number of row 0, or None where lines mean nothing (Parquet).
        items, users: tables of items and users with their id column's name, if there are any.
        notes: what was assumed while reading; plain JSON.
    """

    frame: pl.LazyFrame
    source: Path
    first_line: int | None = 1
    items: tuple[pl.DataFrame, str] | None = None
    users: tuple[pl.DataFrame, str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def choose_columns(found: Sequence[str], mapping: Mapping[str, str] | None, source: Path) -> dict[str, str]:
    """The file's column of each role: the explicit mapping first, then the usual names.

    Raises:
        ConfigError: the mapping names an unknown role.
        DataError: a mapped column is missing, or no user or item column can be recognised.
    """
    chosen: dict[str, str] = {}
    for role, name in (mapping or {}).items():
        if role not in USUAL:
            raise ConfigError(f"there is no column role {role!r}", hint=did_you_mean(role, USUAL))
        if name not in found:
            raise DataError(
                f"there is no column {name!r} (wanted for {role})",
                where=str(source),
                hint=f"columns are: {', '.join(found)}",
            )
        chosen[role] = name
    lowered = {name.strip().lower(): name for name in reversed(found)}
    for role, names in USUAL.items():
        if role not in chosen:
            match = next((lowered[name] for name in names if name in lowered), None)
            if match is not None and match not in chosen.values():
                chosen[role] = match
    for role in ("user", "item"):
        if role not in chosen:
            raise DataError(
                f"no column looks like the {role}: found {', '.join(repr(name) for name in found[:20])}",
                where=str(source),
                hint=f"name it: --columns {role}=NAME (or columns={{'{role}': 'NAME'}}); is the delimiter right?",
            )
    return chosen


def encode(raw: RawLog) -> Interactions:
    """Turn a raw log into `Interactions`: codes by rank, times in seconds, rows by (user, time).

    Raises:
        DataError: a row has no user or item, or a time or value that is not a number; names file, line and value.
    """
    names = raw.frame.collect_schema().names()
    try:
        # Only these columns are ever held: 28 bytes a row with whole-number ids.
        frame = raw.frame.select([_narrow(name, raw) for name in names]).collect(engine="streaming")
        for name in ("user", "item"):  # ids that looked like whole numbers and are not all, stay text
            if frame.schema[name] == pl.Int64 and raw.frame.collect_schema()[name] == pl.String:
                spelt = pl.col(name).cast(pl.Int64, strict=False).cast(pl.String) == pl.col(name)
                if not raw.frame.select(spelt.fill_null(False).all()).collect(engine="streaming").item():
                    frame = frame.with_columns(raw.frame.select(name).collect(engine="streaming")[name])
        if any(frame[name].null_count() for name in ("user", "item")):
            _complain_about_ids(raw)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"the file cannot be read: {_first_line(error)}", where=str(raw.source)) from error
    if frame.height == 0:
        raise DataError("the log has no rows", where=str(raw.source))
    users, user = _codes(frame["user"], raw)
    frame = frame.drop("user")
    items, item = _codes(frame["item"], raw)
    frame = frame.drop("item")
    columns: dict[str, NDArray[Any]] = {}
    labels: dict[str, list[str]] = {}
    notes = dict(raw.notes)
    for name in ("scenario", "domain"):
        if name in frame.columns:
            vocabulary, codes = _codes(frame[name].fill_null("(none)"), raw)
            if len(vocabulary) > np.iinfo(np.int16).max:
                raise DataError(f"column {name!r} has {len(vocabulary):,} distinct values; at most 32,767 are kept")
            columns[name] = codes.astype(np.int16)
            labels[name] = [str(label) for label in vocabulary.ids(np.arange(len(vocabulary)))]
    if "time" in frame.columns:
        columns["time"] = _seconds(frame["time"], raw, notes)
        backwards = (np.diff(columns["time"]) < 0) & (user[1:] == user[:-1])
        notes["clock_backwards"] = int(backwards.sum())
    if "value" in frame.columns:
        columns["value"] = _numbers(frame["value"], "value", raw).astype(OPTIONAL["value"])
    del frame
    notes["source"] = raw.source.name
    return Interactions.from_codes(users, items, user, item, columns=columns, labels=labels, notes=notes)


def _narrow(name: str, raw: RawLog) -> pl.Expr:
    """A column in the narrowest type that loses nothing yet: whole-number ids as int64, plain times as int64."""
    dtype = raw.frame.collect_schema()[name]
    if name in ("user", "item") and dtype == pl.String:
        sample = raw.frame.select(name).head(2000).collect()[name]
        whole = sample.drop_nulls().cast(pl.Int64, strict=False).cast(pl.String)
        if len(whole) and whole.null_count() == 0 and bool((whole == sample.drop_nulls()).all()):
            return pl.col(name).cast(pl.Int64, strict=False)
    if name in ("scenario", "domain"):
        return pl.col(name).cast(pl.String)
    return pl.col(name)


def _codes(column: pl.Series, raw: RawLog) -> tuple[Vocabulary, NDArray[np.int32]]:
    """The vocabulary of an id column and its codes `(n,)`."""
    if column.dtype.is_float():
        if not bool((column.is_finite() & (column == column.floor())).all()):
            raise DataError(f"{column.name} ids hold NaN or fractions", where=str(raw.source), hint="ids are whole or text")
        column = column.cast(pl.Int64)
    if column.dtype.is_integer():
        values = column.cast(pl.Int64).to_numpy()
        low, high = int(values.min()), int(values.max())
        if high - low < 4 * len(values) + 1024:  # dense enough for a table
            seen = np.zeros(high - low + 1, dtype=bool)
            seen[values - low] = True
            rank = np.cumsum(seen, dtype=np.int32) - np.int32(1)
            return Vocabulary.of_numbers(np.flatnonzero(seen).astype(np.int64) + low), rank[values - low]
        numbers = np.unique(values)
        return Vocabulary.of_numbers(numbers), np.searchsorted(numbers, values).astype(np.int32)
    column = column.cast(pl.String)
    if column.null_count() or bool((column.str.len_bytes() == 0).any()):
        _complain_about_ids(raw)
    distinct = column.unique().sort()
    vocabulary = Vocabulary.of_sorted_texts(distinct.to_list())
    return vocabulary, column.cast(pl.Enum(distinct)).to_physical().cast(pl.Int32).to_numpy()


def _seconds(column: pl.Series, raw: RawLog, notes: dict[str, Any]) -> NDArray[np.int64]:
    """Seconds since 1970 UTC from numbers (s, ms, us, ns by size) or dates in ISO form."""
    if column.dtype == pl.String:
        number = column.str.strip_chars().cast(pl.Float64, strict=False)
        if number.null_count():
            parsed = _dates(column)
            if parsed is None:
                row = int(number.is_null().arg_max() or 0)
                raise _bad_cell(raw, "time", row, column[row], "times are unix seconds, milliseconds or ISO dates")
            notes["time_unit"] = "ISO dates"
            return parsed
        column = number
    if column.dtype in (pl.Date, pl.Datetime) or isinstance(column.dtype, pl.Datetime):
        if column.null_count():
            raise _bad_cell(raw, "time", int(column.is_null().arg_max() or 0), None, "drop or mend such rows")
        return column.dt.epoch("s").cast(pl.Int64).to_numpy()
    values = _numbers(column, "time", raw)
    largest = float(np.abs(values).max())
    for unit, scale, limit in (("nanoseconds", 10**9, 1e17), ("microseconds", 10**6, 1e14), ("milliseconds", 10**3, 1e11)):
        if largest > limit:
            notes["time_unit"] = unit
            return (values // scale).astype(np.int64)
    notes["time_unit"] = "seconds"
    return values.astype(np.int64, copy=False)


def _dates(column: pl.Series) -> NDArray[np.int64] | None:
    for parse in (
        lambda: column.str.to_datetime(strict=True, time_zone="UTC"),
        lambda: column.str.to_datetime(strict=True).dt.replace_time_zone("UTC"),
        lambda: column.str.to_date(strict=True).cast(pl.Datetime("us")).dt.replace_time_zone("UTC"),
    ):
        try:
            return parse().dt.epoch("s").cast(pl.Int64).to_numpy()
        except pl.exceptions.PolarsError:
            continue
    return None


def _numbers(column: pl.Series, name: str, raw: RawLog) -> NDArray[Any]:
    """A numeric column without gaps."""
    number = column.str.strip_chars().cast(pl.Float64, strict=False) if column.dtype == pl.String else column
    if not number.dtype.is_numeric():
        raise DataError(f"column {name!r} holds {number.dtype} instead of numbers", where=str(raw.source))
    bad = number.is_null() if not number.dtype.is_float() else ~number.is_finite().fill_null(False)
    if bool(bad.any()):
        row = int(bad.arg_max() or 0)
        raise _bad_cell(raw, name, row, column[row], "drop or mend such rows")
    return number.to_numpy()


def _complain_about_ids(raw: RawLog) -> None:
    for name in ("user", "item"):
        cells = raw.frame.select(pl.col(name).cast(pl.String)).collect(engine="streaming")[name]
        bad = cells.is_null() | (cells.str.strip_chars().str.len_bytes() == 0)
        if bool(bad.any()):
            row = int(bad.arg_max() or 0)
            raise _bad_cell(raw, name, row, cells[row], f"every row needs a {name}; drop or mend such rows")


def _bad_cell(raw: RawLog, name: str, row: int, value: Any, hint: str) -> DataError:
    line = f"row {row + 1}" if raw.first_line is None else f"line {raw.first_line + row}"
    shown = "empty" if value is None or value == "" else repr(value)
    return DataError(f"the {name} is {shown}", where=f"{raw.source}, {line}, column {name!r}", hint=hint)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
