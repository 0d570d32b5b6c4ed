"""Lines of ids: one user a line (`user item item ...`), or one session a line (`item item ...`)."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import polars as pl

from vouch.data.columns import File, RawLog
from vouch.data.formats import head
from vouch.errors import DataError


def read_sequences(file: File, *, times: File | None = None) -> RawLog:
    """`user item item ...` lines, oldest first, with an optional file of the same shape that holds times.

    Raises:
        DataError: a user has two lines, or the two files do not match; names the line.
    """
    lines = _word_lists(file)
    rows = _exploded(lines, file)
    locate = _locator({"user": (file, lines), "item": (file, lines)}, skip=1)
    if times is not None:
        moments = _word_lists(times)
        _must_match(lines, moments, times)
        rows = rows.with_columns(_exploded(moments, times)["item"].alias("time"))
        locate = _locator({"user": (file, lines), "item": (file, lines), "time": (times, moments)}, skip=1)
    notes: dict[str, object] = {"read_as": "one user per line" + (f", times from {times.shown.name}" if times else "")}
    empty = len(lines) - rows["user"].n_unique()
    if empty:
        notes["users_without_items"] = empty
    return RawLog(rows.lazy(), file, locate, notes=notes)


def read_sequence_parts(files: list[File]) -> RawLog:
    """Files of `user item ...` lines whose parts follow each other in time: history, (validation,) test."""
    parts = [_exploded(_word_lists(file), file).with_columns(part=pl.lit(number)) for number, file in enumerate(files)]
    rows = pl.concat(parts)
    first = rows["user"].unique(maintain_order=True)
    order = rows.with_columns(pl.col("user").cast(pl.Enum(first)).to_physical().alias("rank"))
    rows = order.sort("rank", "part", maintain_order=True).select("user", "item")
    names = [file.shown.name for file in files]
    notes: dict[str, object] = {"read_as": "one user per line, in parts: " + ", ".join(names)}
    lacking = {name: len(first) - part["user"].n_unique() for name, part in zip(names, parts, strict=True)}
    missing = [f"{count} of {len(first)} users have no line in {name}" for name, count in lacking.items() if count]
    if missing:
        last = ": their second-last event is unknown" if len(files) == 3 and list(lacking.values())[1] else ""
        notes["warning"] = "; ".join(missing) + last
    return RawLog(rows.lazy(), files[0], notes=notes)


def read_sessions(*files: File) -> RawLog:
    """`item item ...` lines, one session each; sessions are numbered in file order, from 1.

    Where the first word of every line counts the others, it is left out.
    """
    parts = [_word_lists(file).select("words") for file in files]
    lines = pl.concat(parts).with_row_index("user", 1)
    words = lines["words"]
    counted = (words.list.first() == (words.list.len() - 1).cast(pl.String)).all()
    if counted:
        lines = lines.with_columns(pl.col("words").list.slice(1)).filter(pl.col("words").list.len() > 0)
    rows = lines.with_columns(pl.col("user").cast(pl.Int64)).explode("words").rename({"words": "item"})
    notes: dict[str, object] = {"read_as": "one session per line" + (", after its count" if counted else "")}
    if len(files) > 1:
        notes["sessions_in_parts"] = [part.height for part in parts]
    return RawLog(rows.lazy(), files[0], notes=notes)


def read_attributes(file: File) -> tuple[pl.DataFrame, str]:
    """A JSON object from item id to a list of attributes; repeats within an item are dropped."""
    try:
        table = json.loads(file.path.read_text(encoding="utf-8"))
        values = [[str(value) for value in dict.fromkeys(row)] for row in table.values()]
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        what = f"the attributes are no JSON object of lists: {error}"
        raise DataError(what, where=str(file), hint='write {"item": ["attribute", ...], ...}') from error
    attributes = pl.Series("attributes", values, dtype=pl.List(pl.String))
    return pl.DataFrame([pl.Series("item", list(table), dtype=pl.String), attributes]), "item"


def _word_lists(file: File) -> pl.DataFrame:
    """The lines of a text file as lists of words: `line` (from 1) and `words`; blank lines are left out."""
    head(file)
    try:
        frame = pl.read_csv(
            file.path, has_header=False, separator="\x01", quote_char=None, infer_schema=False, new_columns=["text"]
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(f"the file cannot be read: {str(error).splitlines()[0]}", where=str(file)) from error
    words = pl.col("text").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ").alias("words")
    return frame.with_row_index("line", 1).filter(pl.col("text").str.strip_chars() != "").select("line", words)


def _exploded(lines: pl.DataFrame, file: File) -> pl.DataFrame:
    """`user item item ...` lines as rows of `user` and `item`."""
    users = lines["words"].list.first()
    again = ~users.is_first_distinct()
    if bool(again.any()):
        at = int(again.arg_max() or 0)
        raise DataError(
            f"user {users[at]!r} has more than one line",
            where=f"{file}, line {lines['line'][at]}",
            hint="if lines are sessions of items, give --format session",
        )
    rows = lines.select(pl.col("words").list.first().alias("user"), pl.col("words").list.slice(1).alias("item"))
    return rows.filter(pl.col("item").list.len() > 0).explode("item")


def _must_match(lines: pl.DataFrame, moments: pl.DataFrame, times: File) -> None:
    if len(moments) != len(lines):
        what = f"the times do not match the sequences: {len(moments):,} lines instead of {len(lines):,}"
        raise DataError(what, where=str(times))
    same_user = lines["words"].list.first() == moments["words"].list.first()
    differs = ~(same_user & (lines["words"].list.len() == moments["words"].list.len()))
    if bool(differs.any()):
        at = int(differs.arg_max() or 0)
        user, items, found = lines["words"][at][0], len(lines["words"][at]) - 1, len(moments["words"][at]) - 1
        raise DataError(
            f"the times do not match the sequences: {found} times of user {moments['words'][at][0]!r} "
            f"for {items} items of user {user!r}",
            where=f"{times}, line {moments['line'][at]}",
        )


def _locator(columns: dict[str, tuple[File, pl.DataFrame]], *, skip: int) -> Callable[[str, int], str]:
    """Says in which line of which file a row of an exploded column stands; `skip` words begin each line."""
    bounds = {
        name: (file, lines["line"].to_numpy(), np.cumsum(lines["words"].list.len().to_numpy().astype(np.int64) - skip))
        for name, (file, lines) in columns.items()
    }

    def locate(name: str, row: int) -> str:
        file, line, stops = bounds[name]
        return f"{file}, line {line[np.searchsorted(stops, row, side='right')]}"

    return locate
