"""Tables: telling what a file is, and opening delimited text, Parquet and JSON lines lazily as a `RawLog`."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise

import polars as pl

from vouch.data.columns import USUAL, File, RawLog, usual
from vouch.errors import DataError

SNIFF = 1 << 16
"""Bytes looked at to tell what a file is."""
DELIMITERS = ("\t", ",", ";", "|", "::", "\x01", "^", "~", " ")
OTHER_FORMS = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x1f\x8b": "gzip within gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of what is not plain text."""


def head(file: File) -> list[str]:
    """The first complete lines of a text file, without their ends.

    Raises:
        DataError: it is empty, or is no UTF-8 text; says what it seems to be.
    """
    with file.path.open("rb") as opened:
        raw = opened.read(SNIFF)
    if not raw.strip():
        raise DataError("the file is empty", where=str(file))
    hint = "give CSV, Parquet or JSON lines, plain or gzipped"
    for magic, form in OTHER_FORMS.items():
        if raw.startswith(magic):
            hint = hint if magic != b"PAR1" else "leave --format out"
            raise DataError(f"the file is not text: it looks like {form}", where=str(file), hint=hint)
    if b"\0" in raw:
        raise DataError("the file is neither text nor Parquet", where=str(file), hint=hint)
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=len(raw) < SNIFF)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"the file is not UTF-8 text: byte 0x{raw[error.start]:02x}",
            where=f"{file}, line {line}",
            hint="convert it first, for example with: iconv -f latin1 -t utf-8",
        ) from None
    if "\n" not in text and text.strip("\r").count("\r"):
        raise DataError(
            "the lines end with a bare carriage return", where=str(file), hint="convert the line ends to \\n"
        )
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if len(raw) == SNIFF and len(lines) > 1 else lines


def detect(file: File) -> str:
    """The name of a plain file's format, by content first, then by name.

    Raises:
        DataError: the content contradicts the name, is ambiguous, or is of no known form.
    """
    suffix = file.path.suffix.lower()
    with file.path.open("rb") as opened:
        if opened.read(4) == b"PAR1":
            return "parquet"
    if suffix in (".parquet", ".pq"):
        raise not_parquet(file)
    lines = head(file)
    first = next(line for line in lines if line.strip())
    if first.lstrip().startswith("{"):
        return "jsonl"
    if first.lstrip().startswith("["):
        raise DataError("the file is one JSON array", where=str(file), hint="write one JSON object a line")
    if suffix == ".inter" or ":token" in first:
        return "recbole"
    if file.path.name == "u.data":
        return "movielens-100k"
    if file.path.name == "ratings.dat" or first.count("::") == 3:
        return "movielens-1m"
    if suffix in (".csv", ".tsv") or _best_delimiter(lines)[0].strip(" "):
        return "csv"
    return _kind_of_word_lines(file, [line for line in lines if line.strip()])


def not_parquet(file: File) -> DataError:
    """The error for a file that is called Parquet and is not; shows how it begins."""
    with file.path.open("rb") as opened:
        begin = opened.read(40)
    return DataError(
        f"the file is not Parquet: it begins with {begin[:24]!r} instead of PAR1",
        where=str(file),
        hint="if it is text, name it .csv or give --format csv",
    )


def _kind_of_word_lines(file: File, lines: list[str]) -> str:
    """Lines of words: a table, users with their items, or sessions? Users are in order, one line each; items repeat."""
    words = [line.split() for line in lines]
    first = [row[0] for row in words]
    numbers = [int(word) for word in first if word.isdigit()] if all(word.isdigit() for word in first) else []
    steps = [b - a for a, b in pairwise(numbers)]
    if (len(steps) >= 2 and all(step == 1 for step in steps)) or (len(steps) >= 7 and all(step > 0 for step in steps)):
        return "sequence"
    repeats = len(set(first)) < len(first)
    if repeats and len(words) >= 3 and len({len(row) for row in words}) == 1 and 2 <= len(words[0]) <= 8:
        return "csv"
    if repeats:
        return "session"
    raise DataError(
        "the lines may be users with their items, or sessions of items: the first words tell neither",
        where=str(file),
        hint="say which: --format sequence or --format session",
    )


def _best_delimiter(lines: Sequence[str]) -> tuple[str, int]:
    """The delimiter that splits most of the first records as it splits the very first, and into how many (1: none)."""
    text = "\n".join(lines[:200])
    best, width = "", 1
    for mark in DELIMITERS:
        if mark == "::":
            widths = [line.count(mark) + 1 for line in lines[:200] if line.strip()]
        else:  # as the csv module reads it, since quoted fields may hold delimiters and line ends
            try:
                widths = [len(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark) if row]
            except csv.Error:
                continue
        if widths and widths[0] > width and widths.count(widths[0]) > 0.5 * len(widths):
            best, width = mark, widths[0]
    return best, width


def sniff_delimiter(file: File, lines: Sequence[str]) -> str:
    """The delimiter of a table.

    Raises:
        DataError: none of `DELIMITERS` splits the lines alike.
    """
    best, _ = _best_delimiter(lines)
    if not best:
        first = next(line for line in lines if line.strip())
        raise DataError(
            f"no delimiter splits the file into columns; it begins with {first[:60]!r}",
            where=str(file),
            hint="use commas, tabs, semicolons or bars, or say --format sequence or session",
        )
    return best


def read_delimited(file: File) -> RawLog:
    """A table with any delimiter. A first line that holds a number is data: columns are then `column_1`, ..."""
    lines = head(file)
    mark = sniff_delimiter(file, lines)
    if mark == "::":
        raise DataError("fields are split by '::'", where=str(file), hint="give --format movielens-1m")
    first = next(csv.reader(lines, delimiter=mark))
    header = not any(_is_number(cell) for cell in first)
    if header and sum(1 for line in lines if line.strip()) == 1 and file.path.stat().st_size < SNIFF:
        raise DataError("the file has a header and no rows", where=str(file))
    # Tab-separated text is written with and without quoting; a lone quotation mark is then just a character.
    quote = (
        None if mark == "\t" and not any(cell.startswith('"') for line in lines for cell in line.split(mark)) else '"'
    )
    notes = {"read_as": f"a table split by {mark!r}{'' if header else ', without a header'}"}
    return open_table(file, mark, header=header, quote=quote, notes=notes)


def open_table(file: File, mark: str, *, header: bool, quote: str | None, notes: Mapping[str, object]) -> RawLog:
    """Delimited text whose columns are all kept as text: ids keep their spelling."""
    head(file)
    try:
        frame = pl.scan_csv(file.path, separator=mark, has_header=header, infer_schema=False, quote_char=quote)
        names = frame.collect_schema().names()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"the file cannot be read: {str(error).splitlines()[0]}", where=str(file)) from error

    if not header:
        frame = frame.rename({name: f"column_{place}" for place, name in enumerate(names, 1)})

    def records() -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of each record, the header's among them."""
        with file.path.open(newline="", encoding="utf-8", errors="replace") as opened:
            reader, line = csv.reader(opened, delimiter=mark, quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE), 1
            for cells in reader:
                yield line, cells
                line = reader.line_num + 1

    def locate(name: str, row: int) -> str:
        del name
        try:
            line = next(islice(records(), row + header, None))[0]
        except (csv.Error, StopIteration):
            return f"{file}, row {row + 1}"
        return f"{file}, line {line}"

    def trouble() -> tuple[str, str] | None:
        bad = _first_undecodable_line(file)
        if bad:
            return f"{file}, line {bad}", "it is not UTF-8 text; convert it with iconv"
        width = len(names)
        line = 1
        try:
            for line, cells in records():
                if len(cells) > width:
                    return f"{file}, line {line}", f"{len(cells)} fields instead of {width}"
        except csv.Error as error:
            return f"{file}, after line {line}", str(error)
        return str(file), "its quotation marks do not pair up; double those within a field, and quote the field"

    def blank_lines() -> int:
        with file.path.open("rb") as opened:
            return sum(not line.strip() for line in opened)

    return RawLog(frame, file, locate, blank_lines, trouble, notes=dict(notes))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_undecodable_line(file: File) -> int | None:
    with file.path.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def read_parquet(file: File, *parts: File) -> RawLog:
    """Parquet, in one file or several parts."""
    for part in (file, *parts):
        with part.path.open("rb") as opened:
            if opened.read(4) != b"PAR1":
                raise not_parquet(part)
    try:
        frame = pl.scan_parquet([part.path for part in (file, *parts)])
        frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        what = f"the Parquet file is damaged or cut short: {str(error).splitlines()[0]}"
        raise DataError(what, where=str(file), hint="fetch or write it again") from error
    return RawLog(frame, file, notes={"read_as": f"Parquet in {len(parts) + 1} parts"} if parts else {})


def read_json_lines(file: File) -> RawLog:
    """One JSON object a line; the columns are the keys of the first lines."""
    head(file)
    names: dict[str, bool] = {}  # and whether a key's first value is nested, which no id, time or value is
    with file.path.open(encoding="utf-8", errors="replace") as opened:
        for number, line in enumerate(islice(opened, 1000), 1):
            if line.strip():
                cells = _object(line, f"{file}, line {number}")
                names.update({name: isinstance(value, dict | list) for name, value in cells.items()} | names)

    def lines() -> Iterator[tuple[int, str]]:
        with file.path.open(encoding="utf-8", errors="replace") as opened:
            yield from ((number, line) for number, line in enumerate(opened, 1) if line.strip())

    def locate(name: str, row: int) -> str:
        del name
        return f"{file}, line {next(islice(lines(), row, None))[0]}"

    def trouble() -> tuple[str, str] | None:
        bad = _first_undecodable_line(file)
        if bad:
            return f"{file}, line {bad}", "it is not UTF-8 text"
        for number, line in lines():
            try:
                _object(line, f"{file}, line {number}")
            except DataError as error:
                return f"{file}, line {number}", error.what
        return None

    # As text, so that no later line can contradict a type guessed from the first ones.
    schema = {name: pl.String for name, nested in names.items() if not nested}
    frame = pl.scan_ndjson(file.path, schema=schema)
    return RawLog(frame, file, locate, None, trouble)


def _object(line: str, where: str) -> dict[str, object]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"the line is not JSON: {error.msg}", where=where, hint="write one JSON object a line"
        ) from None
    if not isinstance(found, dict):
        raise DataError("the line is JSON but no object", where=where, hint="write one JSON object a line")
    return found


def read_table(file: File, role: str) -> tuple[pl.DataFrame, str]:
    """A table of items or users in CSV, Parquet or JSON lines, and its id column (one of the usual names of the role).

    Raises:
        DataError: it cannot be read, or has no column that looks like the id.
    """
    kind = detect(file)
    try:
        if kind == "parquet":
            frame = pl.read_parquet(file.path)
        elif kind == "jsonl":
            frame = pl.read_ndjson(file.path, infer_schema_length=None)
        else:
            text = read_delimited(file).frame.collect()
            frame = text.with_columns(_typed(text[name]) for name in text.columns)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"the table cannot be read: {str(error).splitlines()[0]}", where=str(file)) from error
    spelt = {usual(name): name for name in reversed(frame.columns)}
    for name in (*USUAL[role], "id"):
        if name in spelt:
            return frame, spelt[name]
    raise DataError(
        f"no column looks like the {role} id: found {', '.join(frame.columns[:20])}",
        where=str(file),
        hint=f"name it {role!r}",
    )


def _typed(column: pl.Series) -> pl.Series:
    """A text column as numbers if all its values are; ids among them keep their spelling (`007` is no number)."""
    for dtype in (pl.Int64, pl.Float64):
        number = column.cast(dtype, strict=False)
        if number.null_count() == column.null_count() and number.null_count() < len(number):
            if dtype == pl.Int64 and not bool((number.cast(pl.String) == column).all()):
                return column
            return number
    return column
