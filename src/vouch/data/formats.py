"""One function for each form a log comes in; each opens a plain file lazily as a `RawLog`."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from vouch.data.columns import RawLog
from vouch.errors import DataError

SNIFF = 1 << 16
"""Bytes looked at to tell what a file is."""
GENRES = (
    "unknown Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
)
"""In the order of the flags of `u.item`."""
DELIMITERS = ("\t", ",", ";", "|", "::", " ")


def _head(path: Path) -> list[str]:
    """The first lines of a text file.

    Raises:
        DataError: it is empty, or is no text.
    """
    with path.open("rb") as file:
        raw = file.read(SNIFF)
    if not raw.strip():
        raise DataError("the file is empty", where=str(path))
    if b"\0" in raw:
        raise DataError("the file is neither text nor Parquet", where=str(path), hint="give CSV, Parquet or JSON lines")
    lines = raw.decode("utf-8", errors="replace").splitlines()
    return lines[:-1] if len(raw) == SNIFF and len(lines) > 1 else lines


def detect(path: Path) -> str:
    """The name of a plain file's format, by content first, then by extension.

    Raises:
        DataError: the content contradicts the extension, or is ambiguous.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        return "parquet"
    if suffix in (".parquet", ".pq"):
        raise DataError(
            "the file is named Parquet and is not (it does not begin with PAR1)",
            where=str(path),
            hint="if it is text, name it .csv or give --format csv",
        )
    lines = _head(path)
    if lines[0].lstrip().startswith("{"):
        return "jsonl"
    if suffix == ".inter" or ":token" in lines[0]:
        return "recbole"
    if path.name == "u.data":
        return "movielens-100k"
    if path.name == "ratings.dat" or lines[0].count("::") == 3:
        return "movielens-1m"
    if suffix in (".csv", ".tsv") or any(mark in lines[0] for mark in ",\t;|"):
        return "csv"
    return _sequence_or_session(path, lines)


def _sequence_or_session(path: Path, lines: list[str]) -> str:
    """Lines of ids: users with their items, or sessions? Users are numbered one by one; items in front repeat."""
    first = [line.split()[0] for line in lines if line.strip()]
    numbers = [int(word) for word in first if word.isdigit()]
    if len(numbers) == len(first) > 1 and all(b == a + 1 for a, b in pairwise(numbers)):
        return "sequence"
    if len(set(first)) < len(first):
        return "session"
    raise DataError(
        "the lines may be users with their items, or sessions of items: the first words tell neither",
        where=str(path),
        hint="say which: --format sequence or --format session",
    )


def sniff_delimiter(lines: list[str]) -> str:
    """The delimiter that splits the first lines into the same number of columns, at least two.

    Raises:
        DataError: none does.
    """
    sample = [line for line in lines[:50] if line.strip()]
    best, width = "", 1
    for mark in DELIMITERS:
        counts = [line.count(mark) for line in sample]
        # Quoted text may hold more of them, so the header decides and the others must have as many.
        if counts[0] >= width and min(counts) >= counts[0]:
            best, width = mark, counts[0] + 1
    if not best:
        raise DataError(
            f"no delimiter splits the file into columns; it begins with {sample[0][:60]!r}",
            hint="use commas, tabs, semicolons or bars, or say --format sequence or session",
        )
    return best


def read_delimited(path: Path) -> RawLog:
    """CSV with any delimiter; a first line of only numbers is data, and columns are then `column_1`, ..."""
    lines = _head(path)
    try:
        mark = sniff_delimiter(lines)
    except DataError as error:
        raise DataError(error.what, where=str(path), hint=error.hint) from None
    header = [cell.strip().strip('"') for cell in lines[0].split(mark)]
    named = not all(_is_number(cell) for cell in header)
    if mark == "::":
        raise DataError("fields are split by '::'", where=str(path), hint="give --format movielens-1m")
    frame = _scan_csv(path, mark, named)
    if named and len([line for line in lines if line.strip()]) == 1:
        raise DataError("the file has a header and no rows", where=str(path))
    return RawLog(frame, path, first_line=2 if named else 1)


def _scan_csv(path: Path, mark: str, header: bool) -> pl.LazyFrame:
    """Every column as text: ids keep their spelling."""
    try:
        frame = pl.scan_csv(path, separator=mark, has_header=header, infer_schema=False, encoding="utf8-lossy")
        frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"the file cannot be read: {str(error).splitlines()[0]}", where=str(path)) from error
    return frame


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_parquet(path: Path) -> RawLog:
    """Parquet; a file that is cut short is refused."""
    try:
        frame = pl.scan_parquet(path)
        frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"the Parquet file is damaged or cut short: {str(error).splitlines()[0]}", where=str(path)
        ) from error
    return RawLog(frame, path, first_line=None)


def read_json_lines(path: Path) -> RawLog:
    """One JSON object a line."""
    try:
        frame = pl.scan_ndjson(path)
        frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"a line is not JSON: {str(error).splitlines()[0]}", where=str(path)) from error
    return RawLog(frame, path)


def read_recbole(path: Path) -> RawLog:
    """An atomic `.inter` file: tab-separated with typed headers such as `user_id:token`."""
    frame = _scan_csv(path, "\t", True)
    names = {name: name.partition(":")[0] for name in frame.collect_schema().names()}
    return RawLog(frame.rename(names), path, first_line=2)


def read_recbole_table(path: Path, id_column: str) -> tuple[pl.DataFrame, str]:
    """An atomic `.item` or `.user` file; sequences of tokens become lists, except titles and names."""
    frame = _scan_csv(path, "\t", True).collect()
    chosen = []
    for name in frame.columns:
        bare, _, kind = name.partition(":")
        column = pl.col(name).alias(bare)
        if kind in ("token_seq", "float_seq") and not any(word in bare.lower() for word in ("title", "name", "text")):
            column = pl.col(name).str.split(" ").alias(bare)
        elif kind == "float":
            column = pl.col(name).cast(pl.Float64, strict=False).alias(bare)
        chosen.append(column)
    return frame.select(chosen), id_column


def read_movielens_100k(path: Path) -> RawLog:
    """The original `u.data`: user, item, rating, time, by tabs, without a header."""
    frame = _scan_csv(path, "\t", False)
    return RawLog(_rename(frame, ["user", "item", "value", "time"], path), path)


def read_movielens_100k_items(path: Path) -> tuple[pl.DataFrame, str]:
    """The original `u.item`: id, title, date, ..., 19 genre flags, by bars, in Latin-1."""
    genres = GENRES.split()
    rows = [line.split("|") for line in path.read_text(encoding="latin-1").splitlines() if line]
    flags = [[name for name, flag in zip(genres, row[5:], strict=False) if flag == "1"] for row in rows]
    return pl.DataFrame({"item": [r[0] for r in rows], "title": [r[1] for r in rows], "genres": flags}), "item"


def read_movielens_1m(path: Path) -> RawLog:
    """The original `ratings.dat`: user::item::rating::time."""
    frame = _scan_csv(path, ":", False)
    names = frame.collect_schema().names()
    if len(names) < 7:
        raise DataError("a line does not have four fields split by '::'", where=f"{path}, line 1")
    frame = frame.select(
        pl.col(names[k]).alias(role) for k, role in ((0, "user"), (2, "item"), (4, "value"), (6, "time"))
    )
    return RawLog(frame, path)


def read_movielens_1m_items(path: Path) -> tuple[pl.DataFrame, str]:
    """The original `movies.dat`: id::title::genres, in Latin-1."""
    rows = [line.split("::") for line in path.read_text(encoding="latin-1").splitlines() if line]
    data = {"item": [r[0] for r in rows], "title": [r[1] for r in rows], "genres": [r[2].split("|") for r in rows]}
    return pl.DataFrame(data), "item"


def read_movies_csv(path: Path) -> tuple[pl.DataFrame, str]:
    """`movies.csv` of the newer MovieLens releases: movieId, title, genres by bars."""
    frame = pl.read_csv(path, infer_schema=False)
    if "genres" in frame.columns:
        missing = pl.col("genres") == "(no genres listed)"
        frame = frame.with_columns(
            pl.when(missing).then(None).otherwise(pl.col("genres").str.split("|")).alias("genres")
        )
    return frame, "movieId"


def _rename(frame: pl.LazyFrame, roles: list[str], path: Path) -> pl.LazyFrame:
    names = frame.collect_schema().names()
    if len(names) < len(roles):
        raise DataError(f"a line has {len(names)} fields instead of {len(roles)}", where=f"{path}, line 1")
    return frame.select(pl.col(name).alias(role) for name, role in zip(names, roles, strict=False))


def _word_lists(path: Path) -> pl.DataFrame:
    """The lines of a text file as lists of words: `line` (from 1) and `words`; blank lines are left out."""
    _head(path)
    frame = pl.read_csv(
        path, has_header=False, separator="\x01", quote_char=None, infer_schema=False, new_columns=["text"]
    )
    words = pl.col("text").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ").alias("words")
    return frame.with_row_index("line", 1).filter(pl.col("text").str.strip_chars() != "").select("line", words)


def _exploded(lines: pl.DataFrame, path: Path) -> pl.DataFrame:
    """`user item item ...` lines as rows of `user` and `item`."""
    users = lines["words"].list.first()
    twice = users.is_duplicated()
    if bool(twice.any()):
        at = int(twice.arg_max() or 0)
        raise DataError(
            f"user {users[at]!r} has more than one line",
            where=str(path),
            hint="if lines are sessions of items, give --format session",
        )
    rows = lines.select(pl.col("words").list.first().alias("user"), pl.col("words").list.slice(1).alias("item"))
    return rows.filter(pl.col("item").list.len() > 0).explode("item")


def read_sequences(path: Path, *, times: Path | None = None) -> RawLog:
    """`user item item ...` lines, oldest first, with an optional file of the same shape that holds times.

    Raises:
        DataError: a user has two lines, or the two files do not match; names the line.
    """
    lines = _word_lists(path)
    rows = _exploded(lines, path)
    if times is not None:
        moments = _word_lists(times)
        same = len(moments) == len(lines)
        fits = (moments["words"].list.len() == lines["words"].list.len()) if same else pl.Series([False])
        fits = fits & (moments["words"].list.first() == lines["words"].list.first()) if same else fits
        if not bool(fits.all()):
            at = int((~fits).arg_max() or 0) + 1
            what = f"line {at} differs in user or length" if same else f"{len(moments)} lines instead of {len(lines)}"
            raise DataError(f"the times do not match the sequences: {what}", where=str(times))
        rows = rows.with_columns(_exploded(moments, times)["item"].alias("time"))
    return RawLog(rows.lazy(), path, first_line=None, notes={"read_as": "one user per line"})


def read_sequence_parts(paths: list[Path]) -> RawLog:
    """Files of `user item ...` lines whose parts follow each other in time: history, (validation,) test."""
    parts = [_exploded(_word_lists(path), path).with_columns(part=pl.lit(number)) for number, path in enumerate(paths)]
    rows = pl.concat(parts)
    first = rows["user"].unique(maintain_order=True)
    order = rows.with_columns(pl.col("user").cast(pl.Enum(first)).to_physical().alias("rank"))
    rows = order.sort("rank", "part", maintain_order=True).select("user", "item")
    notes: dict[str, object] = {"read_as": "one user per line, in parts: " + ", ".join(path.name for path in paths)}
    if len(paths) == 3:
        lacking = len(first) - parts[1]["user"].n_unique()
        if lacking:
            notes["warning"] = (
                f"{lacking} of {len(first)} users have no line in {paths[1].name}: their second-last event is unknown"
            )
    return RawLog(rows.lazy(), paths[0], first_line=None, notes=notes)


def read_sessions(*paths: Path) -> RawLog:
    """`item item ...` lines, one session each; sessions are numbered in file order, from 1."""
    parts = [_word_lists(path).select("words") for path in paths]
    lines = pl.concat(parts).with_row_index("user", 1)
    rows = lines.with_columns(pl.col("user").cast(pl.Int64)).explode("words").rename({"words": "item"})
    notes: dict[str, object] = {"read_as": "one session per line"}
    if len(paths) > 1:
        notes["sessions_in_parts"] = [part.height for part in parts]
    return RawLog(rows.lazy(), paths[0], first_line=None, notes=notes)


def read_attributes(path: Path) -> tuple[pl.DataFrame, str]:
    """A JSON object from item id to a list of attributes; repeats within an item are dropped."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"the attributes are not JSON: {error}", where=str(path)) from error
    values = [[str(value) for value in dict.fromkeys(row)] for row in table.values()]
    schema: dict[str, Any] = {"item": pl.String, "attributes": pl.List(pl.String)}
    return pl.DataFrame({"item": list(table), "attributes": values}, schema=schema), "item"


def read_items(path: Path) -> tuple[pl.DataFrame, str]:
    """A table of items in CSV, Parquet or JSON lines, with one of the usual item columns as its id."""
    from vouch.data.columns import USUAL

    if path.name.endswith(".item"):
        return read_recbole_table(path, "item_id")
    kind = detect(path)
    opened = {"parquet": read_parquet, "jsonl": read_json_lines, "csv": read_delimited}.get(kind, read_delimited)(path)
    frame = opened.frame.collect()
    lowered = {name.lower(): name for name in frame.columns}
    for name in (*USUAL["item"], "id"):
        if name in lowered:
            return frame, lowered[name]
    raise DataError(
        f"no column looks like the item id: found {', '.join(frame.columns[:20])}",
        where=str(path),
        hint="name it 'item'",
    )
