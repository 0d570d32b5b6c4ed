"""Readers: one log written in every form reads back the same, plain or gzipped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.data import Dataset, Interactions
from vouch.data.columns import USUAL, choose_columns
from vouch.data.readers import FORMATS, find_source, read
from vouch.errors import ConfigError, DataError, StorageError

Write = Callable[..., Path]
TRICKY = [
    "plain",
    "with,comma",
    "with\nline end",
    'with "quotes"',
    "🍕",
    "tab\there",
    "semi;colon",
    "ünï",
    " space ",
    "007",
    "'",
]
DRAW = np.random.default_rng(0)
ROWS = [
    (TRICKY[u], TRICKY[i], 1_500_000_000 + int(t), float(v))
    for u, i, t, v in zip(
        DRAW.integers(0, 11, 80),
        DRAW.integers(0, 11, 80),
        DRAW.integers(0, 999, 80),
        DRAW.integers(1, 6, 80),
        strict=True,
    )
]
NAMES = ["user", "item", "time", "value"]


def log_of(rows: list[tuple], *, times: bool = True) -> Interactions:
    user, item, time, value = zip(*rows, strict=True)
    return Interactions.from_arrays(user, item, time=time if times else None, value=value)


def as_csv(rows: list[tuple], names: list[str] | None = NAMES, mark: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=mark, lineterminator="\n")
    if names is not None:
        writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


def as_json_lines(rows: list[tuple]) -> str:
    return "\n".join(json.dumps(dict(zip(NAMES, row, strict=True)), ensure_ascii=False) for row in rows) + "\n"


def as_parquet(rows: list[tuple]) -> bytes:
    raw = io.BytesIO()
    pl.DataFrame(rows, schema=NAMES, orient="row").write_parquet(raw)
    return raw.getvalue()


FORMS: dict[str, str | bytes] = {
    "log.csv": as_csv(ROWS),
    "log.tsv": as_csv(ROWS, mark="\t"),
    "log.txt": as_csv(ROWS, mark=";"),
    "bars.dat": as_csv(ROWS, mark="|"),
    "carets": as_csv(ROWS, mark="^"),
    "crlf.csv": as_csv(ROWS).replace("\n", "\r\n").replace("with\r\n", "with\n"),
    "bom.csv": "\ufeff" + as_csv(ROWS),
    "blank.csv": as_csv(ROWS[:40]) + "\n\n" + as_csv(ROWS[40:], None) + "\n",
    "log.jsonl": as_json_lines(ROWS),
    "untold": as_json_lines(ROWS),
    "log.parquet": as_parquet(ROWS),
    "untold_parquet": as_parquet(ROWS),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_table_reads_back_the_same(write: Write, form: str, packed: bool) -> None:
    dataset = read(write(form + ".gz" * packed, FORMS[form]))
    assert dataset.interactions.fingerprint == log_of(ROWS).fingerprint
    assert dataset.name == form.rsplit(".", 1)[0]
    assert dataset.interactions.notes["source"] == form + ".gz" * packed


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n,;\t\"'|"), min_size=1, max_size=6)
            .filter(lambda text: text.strip() not in ("", "nan", "NaN")),
            st.integers(-(1 << 63), (1 << 63) - 1),
            st.integers(0, 10**10),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=15,
    )
)  # fmt: skip
def test_any_ids_survive_csv_and_parquet_and_json(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("forms")
    (folder / "a.csv").write_text(as_csv(rows), newline="")
    (folder / "a.jsonl").write_text(as_json_lines(rows), newline="")
    (folder / "a.parquet").write_bytes(as_parquet(rows))
    expected = log_of(rows).fingerprint
    assert {read(folder / f"a.{form}").interactions.fingerprint for form in ("csv", "jsonl", "parquet")} == {expected}


@pytest.mark.parametrize("mark", [",", "\t", ";", "|", "^", "~", " "])
def test_a_table_of_numbers_without_a_header_is_mapped_by_place(write: Write, mark: str) -> None:
    rows = [(u, i, 1_500_000_000 + t, 1.0) for t, (u, i) in enumerate([(1, 2), (1, 3), (2, 2), (2, 5), (3, 5)])]
    path = write("numbers.txt", as_csv(rows, None, mark))
    with pytest.raises(DataError, match="column_1"):
        read(path)
    columns = {"user": "column_1", "item": "column_2", "time": "column_3", "value": "column_4"}
    assert read(path, columns=columns).interactions.fingerprint == log_of(rows).fingerprint


def test_columns_are_mapped_named_and_left_out(write: Write) -> None:
    path = write("odd.csv", as_csv(ROWS, ["Who", "What", "when", "rating"]))
    with pytest.raises(DataError, match="no column looks like the user") as error:
        read(path)
    assert "'Who', 'What', 'when', 'rating'" in str(error.value)
    assert "--columns user=NAME" in str(error.value)
    dataset = read(path, columns={"user": "Who", "item": "What", "time": "when"}, name="odd one")
    assert dataset.name == "odd one"
    assert dataset.interactions.fingerprint == log_of(ROWS).fingerprint
    assert dataset.interactions.notes["columns"] == {"user": "Who", "item": "What", "time": "when", "value": "rating"}
    assert read(path, columns={"user": "Who", "item": "What", "value": ""}).interactions.value is None
    with pytest.raises(DataError, match="no column 'Whom'"):
        read(path, columns={"user": "Whom", "item": "What"})
    with pytest.raises(ConfigError, match="no column role 'person'"):
        read(path, columns={"person": "Who"})


@pytest.mark.parametrize(
    ("found", "user", "item"),
    [
        (["userId", "movieId", "rating", "timestamp"], "userId", "movieId"),
        (["reviewerID", "asin", "overall", "unixReviewTime"], "reviewerID", "asin"),
        (["User-ID", "ISBN", "Book-Rating"], "User-ID", "ISBN"),
        (["timestamp", "visitorid", "event", "itemid"], "visitorid", "itemid"),
        (["session_id", "user_id", "asin", "parent_asin"], "user_id", "parent_asin"),
        (["SessionId", "ItemId", "Time"], "SessionId", "ItemId"),
        ([" user id ", "Item ID"], " user id ", "Item ID"),
    ],
)
def test_usual_names_are_recognised(found: list[str], user: str, item: str) -> None:
    chosen = choose_columns(found, None, "log.csv")
    assert (chosen["user"], chosen["item"]) == (user, item)
    assert set(chosen) <= set(USUAL)


def test_scenarios_and_domains_become_labels(write: Write) -> None:
    rows = "user,item,scenario,domain\na,1,web,home\na,2,app,\nb,1,web,garden\n"
    log = read(write("log.csv", rows)).interactions
    assert [log.labels["scenario"][code] for code in log.scenario] == ["web", "app", "web"]
    assert [log.labels["domain"][code] for code in log.domain] == ["home", "(none)", "garden"]


def test_tables_of_items_and_users_come_along(write: Write) -> None:
    log = write("shop/log.csv", "user,item\na,1\nb,2\n")
    write("shop/items.csv.gz", "item,title,price\n1,One,1.5\n2,Two,\n9,Nine,3\n")
    write("shop/users.jsonl", '{"user": "b", "age": 4}\n{"user": "a", "age": 3}\n')
    for dataset in (
        read(log.parent),
        read(log, items=log.parent / "items.csv.gz", users=log.parent / "users.jsonl"),
    ):
        assert dataset.catalog.table["title"].to_list() == ["One", "Two"]
        assert dataset.catalog.table["price"].to_list() == [1.5, None]
        assert dataset.users is not None and dataset.users["age"].to_list() == [3, 4]
    assert read(log).catalog.table.width == 0


def test_parquet_in_parts_is_one_log(write: Write, tmp_path: Path) -> None:
    write("parts/part-0.parquet", as_parquet(ROWS[:30]))
    write("parts/part-1.parquet", as_parquet(ROWS[30:]))
    assert read(tmp_path / "parts").interactions.fingerprint == log_of(ROWS).fingerprint


def test_ids_of_other_types(write: Write, tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1.0, 2.0], "item": ["x", "y"]}).with_columns(pl.col("item").cast(pl.Categorical))
    frame.write_parquet(tmp_path / "typed.parquet")
    log = read(tmp_path / "typed.parquet").interactions
    assert (log.users.ids([0, 1]), log.items.ids([0, 1])) == ([1, 2], ["x", "y"])
    json_lines = '{"user": 1, "item": 1, "time": 5}\n{"user": "x", "item": "1", "time": 6.5, "late": [1, {}]}\n'
    log = read(write("mixed.jsonl", json_lines)).interactions
    assert (log.users.ids([0, 1]), log.items.ids([0]), log.time.tolist()) == (["1", "x"], [1], [5, 6])


def test_sources_are_found_by_name(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("shelf/my_log/log.csv", as_csv(ROWS))
    monkeypatch.setenv("VOUCH_DATA", f"{tmp_path / 'absent'}:{tmp_path / 'shelf'}")
    monkeypatch.chdir(tmp_path)
    for word in ("my_log", "my-log", "MY-LOG"):
        assert find_source(word) == tmp_path / "shelf/my_log"
    with pytest.raises(StorageError, match="no file or folder 'my-lug'") as error:
        find_source("my-lug")
    assert "my_log" in str(error.value.hint)


def test_prepared_folders_and_the_world_need_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Dataset.of(log_of(ROWS), name="kept").save(tmp_path / "prepared")
    assert read("prepared").name == "kept"
    assert read("prepared", name="other").name == "other"
    assert len(read("world").interactions) > 10_000
    for source in ("prepared", "world"):
        with pytest.raises(ConfigError, match="columns does not apply"):
            read(source, columns={"user": "u"})


def test_every_format_has_a_reader_and_unknown_ones_are_refused(write: Write) -> None:
    assert all(callable(reader) for reader in FORMATS.values())
    with pytest.raises(ConfigError, match="no format 'cvs'") as error:
        read(write("log.csv", as_csv(ROWS)), format="cvs")
    assert "csv" in str(error.value.hint)


def test_nothing_is_left_in_the_scratch_folder(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    read(write("log.csv.gz", as_csv(ROWS)))
    with pytest.raises(DataError):
        read(write("bad.csv.gz", "user,item\na,\n"))
    assert list((tmp_path / "scratch").iterdir()) == []
