"""MovieLens, RecBole, sequence and session files: small ones written by hand, read as their publishers mean them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vouch.data import Dataset
from vouch.data.readers import read
from vouch.errors import DataError

Write = Callable[..., Path]
PACKED = pytest.mark.parametrize("gz", ["", ".gz"])


def rows_of(dataset: Dataset) -> list[tuple]:
    log = dataset.interactions
    columns = [log.users.ids(log.user), log.items.ids(log.item)]
    columns += [column.tolist() for column in (log.time, log.value) if column is not None]
    return list(zip(*columns, strict=True))


@PACKED
def test_movielens_100k(write: Write, gz: str) -> None:
    log = write(f"ml/u.data{gz}", "2\t20\t5\t900\n1\t10\t3\t800\n1\t20\t4\t700\n")
    flags = "|".join("1" if genre in (1, 18) else "0" for genre in range(19))
    write(
        "ml/u.item",
        f"10|Amélie (2001)|01-Jan-2001||http://x|{flags}\n20|Ran|||http://y|{'|'.join('0' * 19)}\n".encode("latin-1"),
    )
    write("ml/u.user", "1|24|M|technician|85711\n2|53|F|other|94043\n")
    for source in (log, log.parent):
        dataset = read(source)
        assert rows_of(dataset) == [(1, 20, 700, 4), (1, 10, 800, 3), (2, 20, 900, 5)]
        assert [dataset.catalog.title(code) for code in (0, 1)] == ["Amélie (2001)", "Ran"]
        assert dataset.catalog.table["genres"].to_list() == [["Action", "Western"], []]
        assert dataset.users is not None and dataset.users["occupation"].to_list() == ["technician", "other"]


@PACKED
def test_movielens_1m(write: Write, gz: str) -> None:
    log = write(f"ml/ratings.dat{gz}", "2::20::5::900\n1::10::3::800\n1::20::4::700\n")
    write("ml/movies.dat", "10::Amélie: la vie (2001)::Comedy|Romance\n20::Ran::Drama\n".encode("latin-1"))
    write("ml/users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n")
    for source in (log, log.parent):
        dataset = read(source)
        assert rows_of(dataset) == [(1, 20, 700, 4), (1, 10, 800, 3), (2, 20, 900, 5)]
        assert dataset.catalog.title(0) == "Amélie: la vie (2001)"
        assert dataset.catalog.table["genres"].to_list() == [["Comedy", "Romance"], ["Drama"]]
        assert dataset.users is not None and dataset.users["gender"].to_list() == ["F", "M"]


@PACKED
def test_movielens_latest(write: Write, tmp_path: Path, gz: str) -> None:
    write(f"ml/ratings.csv{gz}", "userId,movieId,rating,timestamp\n1,10,3.5,800\n1,20,4.0,700\n")
    write(
        "ml/movies.csv", 'movieId,title,genres\n10,"Amélie, or: ""life""",Comedy|Romance\n20,Ran,(no genres listed)\n'
    )
    write("ml/tags.csv", "userId,movieId,tag,timestamp\n1,10,sweet,900\n")
    dataset = read(tmp_path / "ml")
    assert rows_of(dataset) == [(1, 20, 700, 4), (1, 10, 800, 3.5)]
    assert dataset.catalog.title(0) == 'Amélie, or: "life"'
    assert dataset.catalog.table["genres"].to_list() == [["Comedy", "Romance"], None]


@PACKED
def test_recbole(write: Write, gz: str) -> None:
    log = write(
        f"toy/toy.inter{gz}",
        'user_id:token\titem_id:token\trating:float\ttimestamp:float\nu"1\tb\t5\t9.0\nu"1\ta\t4\t8.0\n',
    )
    write(
        "toy/toy.item", "item_id:token\tmovie_title:token_seq\tclass:token_seq\tyear:float\na\tSome Title\tx y\t1999\n"
    )
    write("toy/toy.user", 'user_id:token\tage:float\nu"1\t7\n')
    for source in (log, log.parent):
        dataset = read(source)
        assert rows_of(dataset) == [('u"1', "a", 8, 4), ('u"1', "b", 9, 5)]
        assert dataset.catalog.title(0) == "Some Title"
        assert dataset.catalog.table["class"].to_list() == [["x", "y"], None]
        assert dataset.users is not None and dataset.users["age"].to_list() == [7]


def test_recbole_logs_in_parts_are_not_guessed(write: Write, tmp_path: Path) -> None:
    for part in ("train", "valid"):
        write(f"toy/toy.{part}.inter", "user_id:token\titem_id:token\na\tb\n")
    with pytest.raises(DataError, match=r"2 logs: toy\.train\.inter, toy\.valid\.inter"):
        read(tmp_path / "toy")


@PACKED
def test_sequences_with_times_and_attributes(write: Write, gz: str) -> None:
    log = write(f"amazon/sequences.txt{gz}", "1 30 10\n\n2 10 20 30\n3 20\n")
    write(f"amazon/times.txt{gz}", "1 100 100\n2 5 6 7\n3 9\n")
    write(f"amazon/item_attributes.json{gz}", '{"10": ["b", "a", "b"], "20": []}')
    for source in (log, log.parent):
        dataset = read(source)
        assert rows_of(dataset) == [(1, 30, 100), (1, 10, 100), (2, 10, 5), (2, 20, 6), (2, 30, 7), (3, 20, 9)]
        assert dataset.catalog.table["attributes"].to_list() == [["b", "a"], [], None]
        assert "one user per line" in dataset.interactions.notes["read_as"]


def test_sequences_are_told_by_their_numbering(write: Write) -> None:
    for text in ("1 7 7\n2 8\n3 7 9 9\n", "".join(f"{3 * line + 5} 1 2\n" for line in range(9))):
        assert read(write("any.txt", text)).interactions.notes["read_as"] == "one user per line"


def test_sequences_in_parts_join_in_order(write: Write, tmp_path: Path) -> None:
    write("sas/history.txt.gz", "1 5 6\n2 7\n3 8 9\n")
    write("sas/valid.txt", "2 50\n")
    write("sas/test.txt", "1 60\n2 70\n3 80\n")
    dataset = read(tmp_path / "sas")
    assert rows_of(dataset) == [(1, 5), (1, 6), (1, 60), (2, 7), (2, 50), (2, 70), (3, 8), (3, 9), (3, 80)]
    warning = dataset.interactions.notes["warning"]
    assert warning == "2 of 3 users have no line in valid.txt: their second-last event is unknown"


@PACKED
def test_sessions(write: Write, tmp_path: Path, gz: str) -> None:
    write(f"shop/train_sessions.txt{gz}", "5 6 5\n7 6\n")
    write("shop/test_sessions.txt", "6 7\n")
    dataset = read(tmp_path / "shop")
    assert rows_of(dataset) == [(1, 5), (1, 6), (1, 5), (2, 7), (2, 6), (3, 6), (3, 7)]
    assert dataset.interactions.notes["sessions_in_parts"] == [2, 1]
    alone = read(write(f"one/sessions.txt{gz}", "5 6 5\n5 6\n7 5 8 9\n"))
    assert rows_of(alone) == [(1, 5), (1, 6), (1, 5), (2, 5), (2, 6), (3, 7), (3, 5), (3, 8), (3, 9)]
    assert alone.interactions.notes["read_as"] == "one session per line"


def test_lines_that_begin_with_their_count(write: Write) -> None:
    dataset = read(write("users.dat", "2 10 20\n3 30 20 10\n2 40 10\n"))
    assert rows_of(dataset) == [(1, 10), (1, 20), (2, 30), (2, 20), (2, 10), (3, 40), (3, 10)]
    assert "after its count" in dataset.interactions.notes["read_as"]


def test_sequence_or_session_is_not_guessed_when_it_may_be_either(write: Write) -> None:
    path = write("lines.txt", "a b c\nd b\ne a c d\n")
    with pytest.raises(DataError, match="may be users with their items, or sessions") as error:
        read(path)
    assert "--format sequence or --format session" in str(error.value.hint)
    assert len(read(path, format="sequence").interactions) == 6
    assert len(read(path, format="session").interactions) == 9


@pytest.mark.parametrize(
    ("files", "message", "where"),
    [
        ({"sequences.txt": "1 5\n2 6\n1 7\n"}, "user '1' has more than one line", "sequences.txt, line 3"),
        ({"sequences.txt": "1 5\n2 6\n", "times.txt": "1 5\n"}, "1 lines instead of 2", "times.txt"),
        ({"sequences.txt": "1 5\n2 6 7\n", "times.txt": "1 5\n\n2 6\n"}, "1 times of user '2' for 2 items", "times.txt, line 3"),
        ({"sequences.txt": "1 5\n2 6\n", "times.txt": "1 5\n3 6\n"}, "user '3' for 1 items of user '2'", "times.txt, line 2"),
        ({"sequences.txt": "1 5\n2 6 7\n", "times.txt": "1 5\n2 6 x\n"}, "the time is 'x'", "times.txt, line 2"),
        ({"sequences.txt": "1 5\n2 6\n", "item_attributes.json": "[1]"}, "no JSON object of lists", "item_attributes.json"),
        ({"sequences.txt": "1 5\n2 6\n", "item_attributes.json": '{"5": 3}'}, "no JSON object of lists", "item_attributes.json"),
        ({"u.data": "1\t2\t3\n"}, "3 fields instead of 4", "u.data"),
        ({"u.data": "1\t2\t3\t4\n", "u.item": "2|Title\n"}, "2 fields split by '|' instead of 24", "u.item, line 1"),
        ({"ratings.dat": "1::2::3\n"}, "3 fields instead of 4", "ratings.dat"),
        ({"ratings.dat": "1::2::3::4\n5::6::x::8\n"}, "the value is 'x'", "ratings.dat, line 2"),
        ({"toy.inter": "user_id:token\tprice:float\n1\t2\n"}, "no column looks like the item", "toy.inter"),
    ],
)  # fmt: skip
def test_releases_that_are_damaged_are_refused(
    write: Write, tmp_path: Path, files: dict[str, str], message: str, where: str
) -> None:
    for name, text in files.items():
        write(f"folder/{name}", text)
    with pytest.raises(DataError) as error:
        read(tmp_path / "folder")
    assert message in error.value.what
    assert where in str(error.value.where)
