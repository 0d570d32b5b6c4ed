"""The catalogue: aligned to the vocabulary, typed by role, saved and opened the same."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from vouch.data import Catalog, Vocabulary
from vouch.data.catalog import guess_role
from vouch.errors import DataError, UnknownIdError

ITEMS = Vocabulary.of([3, 5, 8])
FRAME = pl.DataFrame(
    {
        "item": [8, 3, 99],
        "title": ["Eight", None, "Elsewhere"],
        "brand": ["B", "A", "C"],
        "tags": [["x", "y", "x"], ["z"], ["w"]],
        "price": [1.5, 2.5, 3.5],
    }
)


def test_rows_follow_the_vocabulary() -> None:
    catalog = Catalog.from_frame(ITEMS, FRAME, id_column="item")
    assert catalog.table["brand"].to_list() == ["A", None, "B"]
    assert catalog.table["price"].to_list() == [2.5, None, 1.5]
    assert [catalog.title(code) for code in range(3)] == ["3", "5", "Eight"]
    assert catalog.roles == {"title": "title", "brand": "category", "tags": "categories", "price": "number"}


def test_ids_match_by_spelling_and_whole_floats() -> None:
    for ids in (["8", "3", "99"], [8.0, 3.0, None]):
        frame = FRAME.with_columns(pl.Series("item", ids))
        assert Catalog.from_frame(ITEMS, frame, id_column="item").table["brand"].to_list() == ["A", None, "B"]


def test_attributes_are_padded_codes() -> None:
    catalog = Catalog.from_frame(ITEMS, FRAME, id_column="item")
    tags, brand = catalog.attribute("tags"), catalog.attribute("brand")
    assert tags.labels == ["(missing)", "x", "y", "z"]
    np.testing.assert_array_equal(tags.codes, [[3, 0], [0, 0], [1, 2]])
    np.testing.assert_array_equal(brand.codes, [[1], [0], [2]])
    with pytest.raises(UnknownIdError, match="no categorical attribute 'price'"):
        catalog.attribute("price")


def test_nothing_in_a_list_is_no_value() -> None:
    frame = pl.DataFrame({"item": [3, 5, 8], "tags": [["x", None], [None], ["y"]]})
    tags = Catalog.from_frame(ITEMS, frame, id_column="item").attribute("tags")
    assert "None" not in tags.labels and tags.labels[0] == "(missing)"
    assert [int((row > 0).sum()) for row in tags.codes].count(0) == 1


def test_saved_catalogues_open_the_same(tmp_path) -> None:
    features = {"image": np.arange(6, dtype=np.float32).reshape(3, 2)}
    for catalog in (
        Catalog.from_frame(ITEMS, FRAME, id_column="item", features=features, root=tmp_path),
        Catalog.empty(ITEMS),
    ):
        catalog.save(tmp_path / "catalog")
        opened = Catalog.open(tmp_path / "catalog")
        assert opened.items == catalog.items
        assert opened.table.equals(catalog.table)
        assert opened.roles == catalog.roles
        assert opened.root == catalog.root
        assert {name: matrix.tolist() for name, matrix in opened.features.items()} == {
            name: matrix.tolist() for name, matrix in catalog.features.items()
        }


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="no column 'id'"):
        Catalog.from_frame(ITEMS, FRAME, id_column="id")
    with pytest.raises(DataError, match="item 8 occurs twice"):
        Catalog.from_frame(ITEMS, pl.concat([FRAME, FRAME.head(1)]), id_column="item")
    with pytest.raises(DataError, match="2 rows for 3 items"):
        Catalog(ITEMS, pl.DataFrame({"a": [1, 2]}))
    with pytest.raises(DataError, match="unknown role 'tittle'"):
        Catalog(ITEMS, pl.DataFrame({"a": [1, 2, 3]}), {"a": "tittle"})
    with pytest.raises(DataError, match="features 'image' have shape"):
        Catalog(ITEMS, pl.DataFrame(), {}, {"image": np.zeros((2, 2), np.float32)})
    Catalog.from_frame(ITEMS, FRAME, id_column="item").save(tmp_path / "catalog")
    (tmp_path / "catalog/items.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="damaged"):
        Catalog.open(tmp_path / "catalog")


@pytest.mark.parametrize(
    ("name", "dtype", "role"),
    [
        ("movie_title", pl.String, "title"),
        ("Description", pl.String, "text"),
        ("image_url", pl.String, "media"),
        ("colour", pl.String, "category"),
        ("genres", pl.List(pl.String), "categories"),
        ("title_length", pl.Int64, "number"),
        ("seen", pl.Date, "other"),
    ],
)
def test_roles_are_guessed_from_name_and_type(name: str, dtype: pl.DataType, role: str) -> None:
    assert guess_role(name, dtype() if isinstance(dtype, type) else dtype) == role
