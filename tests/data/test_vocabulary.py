"""Vocabularies: codes are ranks, look-up is exact, and saved ones open the same."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.data import Vocabulary
from vouch.errors import DataError, UnknownIdError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(1 << 63), (1 << 63) - 1)
IDS = st.one_of(
    st.lists(TEXTS, max_size=20), st.lists(NUMBERS, max_size=20), st.lists(st.one_of(TEXTS, NUMBERS), max_size=20)
)


def is_whole(text: str) -> bool:
    try:
        return str(int(text)) == text and -(1 << 63) <= int(text) < 1 << 63
    except ValueError:
        return False


def expected(ids: list[object]) -> list[object]:
    """The distinct ids in order, as the class promises: by value if all are whole numbers, else by UTF-8 bytes."""
    texts = {str(value) for value in ids}
    if all(is_whole(text) for text in texts):
        return sorted(int(text) for text in texts)
    return sorted(texts, key=str.encode)


@given(IDS)
def test_codes_are_ranks_of_the_sorted_distinct_ids(ids: list[object]) -> None:
    vocabulary = Vocabulary.of(ids)
    assert vocabulary.ids(np.arange(len(vocabulary))) == expected(ids)
    for rank, value in enumerate(expected(ids)):
        assert vocabulary.get(value) == vocabulary.get(str(value)) == rank
        assert vocabulary.id(rank) == value


@given(IDS, TEXTS)
def test_an_id_that_is_not_there_has_no_code(ids: list[object], other: str) -> None:
    vocabulary = Vocabulary.of(ids)
    if other not in {str(value) for value in ids}:
        assert vocabulary.get(other) == -1
        with pytest.raises(UnknownIdError):
            vocabulary.code(other)


@given(st.one_of(st.lists(TEXTS, min_size=1, max_size=20), st.lists(NUMBERS, min_size=1, max_size=20)))
def test_encoding_a_column_agrees_with_looking_up_each_id(ids: list[object]) -> None:
    column = pl.Series(ids, dtype=pl.Int64 if isinstance(ids[0], int) else pl.String)
    vocabulary, codes = Vocabulary.encode(column)
    assert vocabulary == Vocabulary.of(ids)
    assert codes.dtype == np.int32
    assert codes.tolist() == [expected(ids).index(int(value) if vocabulary.is_numeric else str(value)) for value in ids]


@pytest.mark.parametrize("span", [10, 10**12])
def test_dense_and_sparse_numbers_are_encoded_alike(span: int) -> None:
    values = np.random.default_rng(0).integers(-span, span, 1000)
    vocabulary, codes = Vocabulary.encode(pl.Series(values))
    numbers, ranks = np.unique(values, return_inverse=True)
    assert vocabulary.ids(np.arange(len(vocabulary))) == numbers.tolist()
    np.testing.assert_array_equal(codes, ranks)


@given(IDS, st.data())
def test_taking_codes_keeps_their_ids_in_order(ids: list[object], data: st.DataObject) -> None:
    vocabulary = Vocabulary.of(ids)
    codes = sorted(data.draw(st.sets(st.integers(0, max(0, len(vocabulary) - 1))))) if len(vocabulary) else []
    taken = vocabulary.take(np.array(codes, dtype=np.int64))
    assert taken.ids(np.arange(len(taken))) == vocabulary.ids(np.array(codes, dtype=np.int64))


@settings(max_examples=30)
@given(IDS)
def test_saved_vocabularies_open_the_same(tmp_path_factory: pytest.TempPathFactory, ids: list[object]) -> None:
    path = tmp_path_factory.mktemp("vocabulary") / "v"
    vocabulary = Vocabulary.of(ids)
    vocabulary.save(path)
    assert Vocabulary.open(path) == vocabulary


@pytest.mark.parametrize("odd", ["007", "+7", "7.0", " 7", "-0", "9223372036854775808", "٣"])
def test_only_the_usual_spelling_of_a_number_is_a_number(odd: str) -> None:
    assert not Vocabulary.of(["1", odd]).is_numeric
    assert not Vocabulary.encode(pl.Series(["1", odd]))[0].is_numeric
    assert Vocabulary.of(["1", "2"]).get(odd) == -1


def test_the_largest_numbers_are_found_again() -> None:
    vocabulary = Vocabulary.of([(1 << 63) - 1, -(1 << 63), 0])
    assert [vocabulary.get(value) for value in (-(1 << 63), 0, (1 << 63) - 1)] == [0, 1, 2]


def test_ids_must_be_sorted_and_distinct_where_that_is_asked_for() -> None:
    for bad in ([2, 1], [1, 1]):
        with pytest.raises(DataError, match="distinct and sorted"):
            Vocabulary.of_numbers(np.array(bad))
        with pytest.raises(DataError, match="distinct and sorted"):
            Vocabulary.of_sorted_texts([str(value) for value in bad])


def test_unknown_ids_and_codes_are_explained() -> None:
    vocabulary = Vocabulary.of(["toaster", "kettle"])
    with pytest.raises(UnknownIdError, match="there is no item 'toster'") as error:
        vocabulary.code("toster", kind="item")
    assert "toaster" in str(error.value.hint)
    for code in (-1, 2):
        with pytest.raises(UnknownIdError):
            vocabulary.id(code)
        with pytest.raises(UnknownIdError):
            Vocabulary.of([5, 6]).ids([code])


def test_a_damaged_vocabulary_is_refused(tmp_path) -> None:
    Vocabulary.of([1, 2, 3]).save(tmp_path / "v")
    whole = (tmp_path / "v/numbers.npy").read_bytes()
    (tmp_path / "v/numbers.npy").write_bytes(whole[:-8])
    with pytest.raises(DataError, match="damaged"):
        Vocabulary.open(tmp_path / "v")
    (tmp_path / "v/numbers.npy").unlink()
    with pytest.raises(DataError, match="missing"):
        Vocabulary.open(tmp_path / "v")
