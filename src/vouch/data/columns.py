"""Which column is what: the usual names, explicit mappings, and turning columns into ids, seconds and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.data.interactions import OPTIONAL, Interactions
from vouch.data.times import BadCellError, to_numbers, to_seconds
from vouch.data.vocabulary import Vocabulary
from vouch.errors import ConfigError, DataError, did_you_mean

USUAL: dict[str, tuple[str, ...]] = {
    "user": (
        "user", "user_id", "userid", "uid", "u", "reviewerid", "reviewer_id", "customer_id", "customerid", "visitorid",
        "visitor_id", "member_id", "account_id", "client_id", "profile_id", "profileid",
        "session", "session_id", "sessionid",
    ),
    "item": (
        "item", "item_id", "itemid", "iid", "i", "movie_id", "movieid", "product_id", "productid", "parent_asin",
        "asin", "sku", "isbn", "video_id", "videoid", "track_id", "song_id", "artist_id", "artistid", "book_id",
        "business_id", "gmap_id", "article_id", "news_id", "poi_id", "venue_id", "location_id", "hotel_id", "recipe_id",
        "game_id", "product", "movie", "track", "song", "artist", "book", "article",
    ),
    "time": (
        "time", "timestamp", "ts", "t", "unixreviewtime", "unix_time", "unixtime", "time_ms", "timestamp_ms", "unix",
        "event_time", "datetime", "created_at", "date",
    ),
    "value": ("value", "rating", "ratings", "score", "stars", "overall", "book_rating", "weight", "count"),
    "scenario": ("scenario",),
    "domain": ("domain",),
}  # fmt: skip
"""Names recognised without a mapping, best first; in lower case, with spaces and dashes as underscores."""

FEEDBACK = "feedback"
"""The role of further signals: several columns, joined by `+`; they keep their names."""
NOT_AN_ID = ("", "nan", "NaN")
"""What programs write for a missing id, after the space around it is taken away."""


@dataclass(frozen=True)
class File:
    """A plain file to read, and the name to call it by in messages (before it was unpacked)."""

    path: Path
    shown: Path

    def __str__(self) -> str:
        return str(self.shown)


@dataclass
class RawLog:
    """A log as found: a lazy frame in file order, whose columns become those of `USUAL`.

    Attributes:
        frame: the columns; ids and times may still be text.
        source: the file the rows come from.
        locate: says where a row (from 0) of a column is, e.g. `line 12`; counts again, so only for messages.
        blank_lines: counts the file's empty lines, which come as rows without any value; None if there can be none.
        trouble: finds what a parser stumbled over, as (where, what), or None.
        items, users: tables of items and users with their id column's name, if there are any.
        notes: what was assumed while reading; plain JSON.
        columns: the file's name of each role's column, once chosen.
    """

    frame: pl.LazyFrame
    source: File
    locate: Callable[[str, int], str] | None = None
    blank_lines: Callable[[], int] | None = None
    trouble: Callable[[], tuple[str, str] | None] | None = None
    items: tuple[pl.DataFrame, str] | None = None
    users: tuple[pl.DataFrame, str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)

    def choose(self, mapping: Mapping[str, str] | None) -> None:
        """Keep only the columns with a role, under the role's name."""
        found = self.frame.collect_schema().names()
        signals = [name for name in (mapping or {}).get(FEEDBACK, "").split("+") if name]
        roles = {role: name for role, name in (mapping or {}).items() if role != FEEDBACK}
        for at, name in enumerate(signals):
            if name in signals[:at]:
                raise DataError(f"the feedback {name!r} is named twice", hint="name each column once")
            if name not in found:
                raise DataError(
                    f"there is no column {name!r} (wanted as feedback)",
                    where=str(self.source),
                    hint=f"columns are: {', '.join(found)}",
                )
        self.columns = choose_columns(found, roles, str(self.source))
        self.frame = self.frame.select(
            [pl.col(column).alias(role) for role, column in self.columns.items()]
            + [pl.col(name).alias(f"{FEEDBACK} {name}") for name in signals]
        )
        unusual = {role: column for role, column in self.columns.items() if role != column}
        if unusual:
            self.notes["columns"] = unusual

    def collect(self, *columns: pl.Expr) -> pl.DataFrame:
        """Read some columns.

        Raises:
            DataError: the file cannot be parsed; says where, if that can be found out.
        """
        try:
            return self.frame.select(*columns).collect(engine="streaming")
        except (pl.exceptions.PolarsError, OSError) as error:
            found = self.trouble() if self.trouble is not None else None
            where, what = found or (str(self.source), str(error).splitlines()[0])
            raise DataError(f"the file cannot be read: {what}", where=where) from error

    def bad_cell(self, name: str, row: int, value: Any, hint: str) -> DataError:
        """The error for a cell that cannot be used."""
        shown = "empty" if value is None or value == "" else repr(value)
        column = self.columns.get(name, name.removeprefix(f"{FEEDBACK} "))
        place = self.locate(name, row) if self.locate is not None else f"{self.source}, row {row + 1}"
        return DataError(f"the {name} is {shown}", where=f"{place}, column {column!r}", hint=hint)


def usual(name: str) -> str:
    """A column name in the spelling of `USUAL`."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def choose_columns(found: Sequence[str], mapping: Mapping[str, str] | None, source: str) -> dict[str, str]:
    """The file's column of each role: the explicit mapping first, then the usual names.

    A role that is mapped to nothing (`""`) is left out even if a column has a usual name.

    Raises:
        ConfigError: the mapping names an unknown role.
        DataError: a mapped column is missing, or no user or item column can be recognised.
    """
    chosen: dict[str, str] = {}
    for role, name in (mapping or {}).items():
        if role not in USUAL:
            raise ConfigError(f"there is no column role {role!r}", hint=did_you_mean(role, USUAL))
        if name and name not in found:
            raise DataError(
                f"there is no column {name!r} (wanted for {role})",
                where=source,
                hint=f"columns are: {', '.join(found)}",
            )
        if name:
            chosen[role] = name
    spelt = {usual(name): name for name in reversed(found)}
    for role, names in USUAL.items():
        if role not in (mapping or {}):
            match = next((spelt[name] for name in names if name in spelt), None)
            if match is not None and match not in chosen.values():
                chosen[role] = match
    for role in ("user", "item"):
        if role not in chosen:
            doubt = "the first line was taken for data" if "column_1" in found else "is the delimiter right?"
            raise DataError(
                f"no column looks like the {role}: found {', '.join(repr(name) for name in found[:20]) or 'none'}",
                where=source,
                hint=f"name it: --columns {role}=NAME (or columns={{'{role}': 'NAME'}}); {doubt}",
            )
    return chosen


def encode(raw: RawLog) -> Interactions:
    """Turn a raw log into `Interactions`: codes by rank, times in seconds, rows by (user, time).

    Only the columns of the log are held, in their narrowest form: each distinct id's text once, about 28 bytes a row.

    Raises:
        DataError: a row has no user or item, or a time, value or feedback that is not a number; names file, line and
            value.
    """
    schema = raw.frame.collect_schema()
    frame = raw.collect(*[expression for name, dtype in schema.items() for expression in _narrow(name, dtype, raw)])
    for name in schema.names():
        if f"{name} fits" in frame.columns and not frame[f"{name} fits"].all():
            frame = frame.with_columns(raw.collect(pl.col(name)))  # numbers in an unusual spelling: decided in full
    frame = frame.select(schema.names())
    if frame["user"].null_count():
        frame = _without_blank_lines(frame, raw)
    if frame.height == 0:
        raise DataError("the log has no rows", where=str(raw.source))
    notes = dict(raw.notes)
    columns: dict[str, NDArray[Any]] = {}
    labels: dict[str, list[str]] = {}
    vocabularies: dict[str, Vocabulary] = {}
    signals: dict[str, NDArray[np.float32]] = {}
    for name in schema.names():
        column = frame[name]
        frame = frame.drop(name)  # so that each column is freed once it is coded
        try:
            if name in ("user", "item"):
                vocabularies[name], columns[name] = _codes(column)
            elif name == "time":
                columns[name], notes["time_unit"] = to_seconds(column)
            elif name.startswith(f"{FEEDBACK} "):
                signals[name.removeprefix(f"{FEEDBACK} ")] = _signal(column)
            elif name == "value":
                columns[name] = to_numbers(column).astype(OPTIONAL["value"])
            else:
                columns[name], labels[name] = _labels(column, raw)
        except BadCellError as bad:
            raise raw.bad_cell(name, bad.row, bad.value, bad.wanted) from None
    notes["source"] = raw.source.shown.name
    user, item = columns.pop("user"), columns.pop("item")
    return Interactions.from_codes(
        vocabularies["user"],
        vocabularies["item"],
        user,
        item,
        columns=columns,
        feedback=signals,
        labels=labels,
        notes=notes,
    )


def _narrow(name: str, dtype: pl.DataType, raw: RawLog) -> list[pl.Expr]:
    """A column in its narrowest form, and for numbers read from text whether nothing was lost."""
    column = pl.col(name)
    if name.startswith(f"{FEEDBACK} "):
        if dtype != pl.String:
            return [column]
        text = column.str.strip_chars()
        number = text.cast(pl.Float32, strict=False)
        fits = column.is_null() | (text == "") | ~number.is_infinite().fill_null(True)
        return [number, fits.alias(f"{name} fits")]
    if name in ("time", "value"):
        if dtype != pl.String:
            return [column]
        number = column.cast(pl.Int64 if name == "time" else pl.Float32, strict=False)
        return [number, (column.is_null() | number.is_finite().fill_null(False)).alias(f"{name} fits")]
    if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
        raise DataError(f"the {name} column holds {dtype}; ids are whole numbers or text", where=str(raw.source))
    if name in ("user", "item") and (dtype.is_integer() or dtype.is_float()) and dtype != pl.UInt64:
        return [column]
    return [column.cast(pl.String).cast(pl.Categorical(pl.Categories.random()))]


def _signal(column: pl.Series) -> NDArray[np.float32]:
    """A column of numbers `(n,)`, NaN where a cell is empty.

    Raises:
        BadCellError: a cell holds something else.
    """
    wanted = "feedback is a number, such as 0 or 1; leave the cell empty where it is unknown"
    text = column.str.strip_chars() if column.dtype == pl.String else column
    if text.dtype.is_nested() or text.dtype.is_temporal() or text.dtype in (pl.Binary, pl.Object):
        raise BadCellError(0, column.to_list()[0], wanted)
    number = text.cast(pl.Float32, strict=False)
    wrong = text.is_not_null() & number.is_infinite().fill_null(True)
    if column.dtype == pl.String:
        wrong &= text != ""
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        raise BadCellError(row, column[row], wanted)
    return number.fill_null(float("nan")).to_numpy().astype(np.float32)


def _without_blank_lines(frame: pl.DataFrame, raw: RawLog) -> pl.DataFrame:
    """Drop the rows that are empty lines of the file; other rows without a value stay, to be complained about."""
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    count = int(blank.sum())
    if not count or raw.blank_lines is None or raw.blank_lines() < count:
        return frame
    rows, locate = np.flatnonzero(~blank.to_numpy()), raw.locate
    if locate is not None:
        raw.locate = lambda name, row: locate(name, int(rows[row]))
    return frame.filter(~blank)


def _codes(column: pl.Series) -> tuple[Vocabulary, NDArray[np.int32]]:
    """The vocabulary of an id column and its codes `(n,)`."""
    wanted = f"every row needs a {column.name}; drop or mend such rows"
    if column.null_count():
        raise BadCellError(int(column.is_null().arg_max() or 0), None, wanted)
    if column.dtype.is_float():
        odd = ~column.is_finite() | (column != column.floor())
        if bool(odd.any()):
            row = int(odd.arg_max() or 0)
            raise BadCellError(row, column[row], "ids are whole numbers or text")
        column = column.cast(pl.Int64)
    if not column.dtype.is_integer():
        distinct = column.unique().cast(pl.String)
        missing = distinct.filter(distinct.str.strip_chars().is_in(NOT_AN_ID))
        if len(missing):
            row = int((column.cast(pl.String).is_in(missing.implode())).arg_max() or 0)
            raise BadCellError(row, column.cast(pl.String)[row], wanted)
    return Vocabulary.encode(column)


def _labels(column: pl.Series, raw: RawLog) -> tuple[NDArray[np.int16], list[str]]:
    """Codes of a column of few labels; a missing one is a label of its own."""
    vocabulary, codes = Vocabulary.encode(column.cast(pl.String).fill_null("(none)"))
    if len(vocabulary) > np.iinfo(np.int16).max:
        raise DataError(
            f"column {column.name!r} has {len(vocabulary):,} distinct values; at most 32,767 are kept",
            where=str(raw.source),
            hint=f"leave it out: --columns {column.name}=",
        )
    return codes.astype(np.int16), [str(label) for label in vocabulary.ids(np.arange(len(vocabulary)))]
