"""Bad input: each kind is refused with what is wrong, where it is and what to do, or read for what it is."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from vouch.data import Dataset, split
from vouch.data.inspect import inspect
from vouch.data.readers import read
from vouch.errors import DataError, StorageError, VouchError

Write = Callable[..., Path]
HEAD = "user,item,time,value\n"


def refused(path: Path, error: type[VouchError] = DataError, **how: object) -> VouchError:
    """The error of reading a path, which must say what is wrong, where, and what to do."""
    with pytest.raises(error) as caught:
        read(path, **how)  # type: ignore[arg-type]
    assert caught.value.what
    assert caught.value.where or caught.value.hint
    assert "Traceback" not in str(caught.value)
    return caught.value


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no file or folder" in refused(tmp_path / "absent.csv", StorageError).what
    assert "source is empty" in refused("", StorageError).what  # type: ignore[arg-type]
    refused(tmp_path / ("long" * 100), StorageError)


@pytest.mark.parametrize(
    "name", ["log.csv", "log.parquet", "log.jsonl", "log", "log.csv.gz", "u.data", "x.inter", "sequences.txt"]
)
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(write: Write, name: str, content: str) -> None:
    error = refused(write(name, content))
    assert "empty" in error.what or "not Parquet" in error.what
    assert name in str(error.where)


def test_a_header_and_nothing_else(write: Write, tmp_path: Path) -> None:
    assert "a header and no rows" in refused(write("log.csv", HEAD)).what
    assert "a header and no rows" in refused(write("log.csv", HEAD + "\n\n")).what
    assert "no rows" in refused(write("toy.inter", "user_id:token\titem_id:token\n")).what
    pl.DataFrame({"user": [], "item": []}, schema={"user": pl.Int64, "item": pl.Int64}).write_parquet(
        tmp_path / "e.parquet"
    )
    assert "no rows" in refused(tmp_path / "e.parquet").what


def test_the_wrong_delimiter(write: Write) -> None:
    error = refused(write("log.csv", "user!item!time\na!b!1\nc!d!2\n"))
    assert "no delimiter splits the file" in error.what
    assert "user!item!time" in error.what


def test_a_missing_column(write: Write) -> None:
    error = refused(write("log.csv", "user,price\na,1\n"))
    assert "no column looks like the item: found 'user', 'price'" in error.what
    assert "--columns item=NAME" in str(error.hint)


CELLS = [
    ("a,x,soon,1", "time", "'soon'"),
    ("a,x,,1", "time", "empty"),
    ("a,x,nan,1", "time", "'nan'"),
    ("a,x,5,good", "value", "'good'"),
    ("a,x,5,", "value", "empty"),
    ("a,x,5,inf", "value", "'inf'"),
    (",x,5,1", "user", "empty"),
    ("a,,5,1", "item", "empty"),
    ("nan,x,5,1", "user", "'nan'"),
    ("NaN,x,5,1", "user", "'NaN'"),
    ('a,"  ",5,1', "item", "'  '"),
    ('a,"",5,1', "item", "empty"),
    (",,5,1", "user", "empty"),
    ("a", "item", "empty"),
]


@pytest.mark.parametrize(("row", "column", "shown"), CELLS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_cell_that_cannot_be_used_is_named_by_line(
    write: Write, row: str, column: str, shown: str, packed: bool
) -> None:
    # Two rows of two lines each and a blank line come before it: it is row 4 of the log, and stands in line 7.
    text = HEAD + '"b\nb",y,1,1\n\n"c,c","z\n",2,1\n' + f"{row}\n" + "d,w,3,1\n"
    error = refused(write("log.csv" + ".gz" * packed, text))
    assert error.what == f"the {column} is {shown}"
    assert "line 7" in str(error.where)
    assert "log.csv" in str(error.where)
    assert f"column {column!r}" in str(error.where)
    assert error.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user": "a", "item": "x", "time": "soon"}', "the time is 'soon'"),
        ('{"user": null, "item": "x", "time": 5}', "the user is empty"),
        ('{"user": "a", "time": 5}', "the item is empty"),
        ('{"user": "a", "item": "x", "time": 5', "the line is not JSON"),
        ("[1, 2]", "the line is JSON but no object"),
    ],
)
@pytest.mark.parametrize("late", [0, 3000])
def test_a_json_line_that_cannot_be_used_is_named(write: Write, line: str, message: str, late: int) -> None:
    good = '{"user": "b", "item": "y", "time": 1}\n'
    error = refused(write("log.jsonl", good * late + good + "\n" + line + "\n" + good))
    assert message in error.what
    assert f"line {late + 3}" in str(error.where)


def test_nan_and_gaps_in_parquet(tmp_path: Path) -> None:
    good = {"user": [1.0, 2.0, 3.0], "item": ["x", "y", "z"], "time": [1, 2, 3], "value": [1.0, 2.0, 3.0]}
    for column, value, message in (
        ("user", np.nan, "the user is nan"),
        ("user", None, "the user is empty"),
        ("user", 2.5, "the user is 2.5"),
        ("item", "", "the item is empty"),
        ("time", None, "the time is empty"),
        ("value", np.nan, "the value is nan"),
    ):
        values = [*good[column][:1], value, *good[column][2:]]
        frame = pl.DataFrame({**good, column: values}, strict=False)
        frame.write_parquet(tmp_path / "log.parquet")
        error = refused(tmp_path / "log.parquet")
        assert error.what == message
        assert "row 2" in str(error.where)
    pl.DataFrame({**good, "user": [[1], [2], [3]]}).write_parquet(tmp_path / "log.parquet")
    assert "the user column holds List" in refused(tmp_path / "log.parquet").what


def test_lines_of_other_lengths(write: Write) -> None:
    error = refused(write("log.csv", HEAD + "a,x,1,1\n" * 50 + "a,x,1,1,extra\n"))
    assert "5 fields instead of 4" in error.what
    assert "line 52" in str(error.where)


def test_quotation_marks_left_open(write: Write) -> None:
    error = refused(write("log.csv", HEAD + "a,x,1,1\n" * 30 + 'a,"x,1,1\n' + "b,y,2,2\n" * 30))
    assert "log.csv" in str(error.where)
    log = read(
        write("closed.csv", HEAD + "a,x,1,1\n" * 30 + 'a,"x,1,1\n' + "b,y,2,2\n" * 3 + 'c,z",3,3\n')
    ).interactions
    assert any("line ends" in warning for warning in inspect(Dataset.of(log)).warnings)


def test_one_user_and_one_item_are_told(write: Write) -> None:
    one_user = read(write("user.csv", "user,item\n" + "".join(f"a,{item}\n" for item in range(5))))
    assert any("there is one user" in warning for warning in inspect(one_user).warnings)
    assert len(split(one_user).test) == 1
    one_item = read(write("item.csv", "user,item\n" + "".join(f"{user},a\n" for user in range(5)) * 4))
    assert any("there is one item" in warning for warning in inspect(one_item).warnings)
    with pytest.raises(DataError, match="one item; there is nothing to rank"):
        split(one_item)


def test_users_too_short_to_split(write: Write) -> None:
    dataset = read(write("short.csv", "user,item\n" + "".join(f"{user},{user % 3}\n" for user in range(9)) * 2))
    with pytest.raises(DataError, match="9 users with at most 2 events each"):
        split(dataset)


def test_a_huge_file_that_is_not_parquet_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "huge.parquet"
    with path.open("wb") as file:
        file.write(HEAD.encode() * 100)
        file.truncate(10 << 30)  # 10 GB, sparse
    begin = time.perf_counter()
    error = refused(path)
    assert "not Parquet: it begins with b'user,item" in error.what
    assert "not Parquet" in refused(path.rename(tmp_path / "huge.csv"), format="parquet").what
    assert time.perf_counter() - begin < 1


def test_parquet_given_as_another_form(tmp_path: Path) -> None:
    pl.DataFrame({"user": [1, 2], "item": [1, 2]}).write_parquet(tmp_path / "log.csv")
    assert len(read(tmp_path / "log.csv").interactions) == 2  # the content decides
    assert "looks like Parquet" in refused(tmp_path / "log.csv", format="csv").what


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    pl.DataFrame({"user": np.arange(9999), "item": np.arange(9999)}).write_parquet(tmp_path / "log.parquet")
    whole = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in refused(tmp_path / "log.parquet").what


@pytest.mark.parametrize("damage", ["cut", "header only", "garbage within", "wrong checksum"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    rows = "".join(f"{user},{item}\n" for user, item in np.random.default_rng(0).integers(0, 10**9, (5000, 2)))
    whole = gzip.compress(("user,item\n" + rows).encode())
    raw = {
        "cut": whole[: len(whole) // 2],
        "header only": whole[:12],
        "garbage within": whole[:100] + bytes(range(256)) + whole[356:],
        "wrong checksum": whole[:-8] + bytes(8),
    }[damage]
    (tmp_path / "log.csv.gz").write_bytes(raw)
    assert "gzip file is cut short or damaged" in refused(tmp_path / "log.csv.gz").what


@pytest.mark.parametrize(
    "name", ["log", "log.csv", "log.csv.gz", "log.jsonl", "log.inter", "u.data", "ratings.dat", "sequences.txt"]
)
def test_binary_garbage(write: Write, name: str) -> None:
    for seed in range(3):
        for size in (50, 100_000):
            refused(write(name, np.random.default_rng(seed).bytes(size)))


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (b"PK\x03\x04", "zip archive"),
        (b"BZh9", "bzip2"),
        (b"SQLite format 3\0", "SQLite"),
        ("user,item\na,b\n".encode("utf-16"), "UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0", "neither text nor Parquet"),
        (b"user,item\n\na,caf\xe9\n", "not UTF-8 text: byte 0xe9"),
        (b'[{"user": 1, "item": 2}]', "one JSON array"),
        (b'{"user": {"id": 1}, "item": 2}', "no column looks like the user: found 'item'"),
        (b"user,item\ra,b\rc,d\r", "bare carriage return"),
    ],
)
def test_other_forms_are_called_by_name(write: Write, begin: bytes, message: str) -> None:
    error = refused(write("data.txt", begin))
    assert message in error.what
    assert error.hint


def test_text_that_stops_being_utf8(write: Write) -> None:
    for name, row in (("log.csv", b"a,b\n"), ("log.jsonl", b'{"user": "a", "item": "b"}\n')):
        begin = b"user,item\n" if name == "log.csv" else row
        error = refused(write(name, begin + row * 40_000 + row.replace(b"a", b"\xe9") + row))
        assert "UTF-8" in error.what
        assert "line 40002" in str(error.where)


def test_folders_without_a_log(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "the folder holds nothing" in str(refused(tmp_path / "empty").hint)
    write("pictures/readme.md", "nothing here")
    write("pictures/cat.png", b"\x89PNG\0")
    assert "cat.png, readme.md" in str(refused(tmp_path / "pictures").hint)
    write("two/a.csv", "user,item\n1,2\n")
    write("two/b.csv", "user,item\n1,2\n")
    assert "more than one log" in refused(tmp_path / "two").what


def test_files_that_may_not_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("log.csv", HEAD)
    opened = Path.open

    def deny(self: Path, *how: object, **more: object) -> object:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *how, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", deny)
    error = refused(path, StorageError)
    assert "Permission denied" in error.what
    assert str(path) in str(error.where)


def test_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", deny)
    assert "Permission denied" in refused(tmp_path, StorageError).what


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no plain file" in refused(tmp_path / "pipe", StorageError).what
    assert "no plain file" in refused(Path("/dev/null"), StorageError).what


def test_no_room_to_unpack(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*how: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    assert "No space left" in refused(write("log.csv.gz", HEAD), StorageError).what


@pytest.mark.parametrize(
    ("text", "message"),
    [("name,title\nx,Y\n", "no column looks like the item id"), ("item,title\nx,Y\nx,Z\n", "item 'x' occurs twice")],
)
def test_item_tables_that_do_not_fit(write: Write, text: str, message: str) -> None:
    log, items = write("log.csv", "user,item\na,x\n"), write("items.csv", text)
    assert message in refused(log, items=items).what
    assert "no file or folder" in refused(log, StorageError, items="absent.csv").what
