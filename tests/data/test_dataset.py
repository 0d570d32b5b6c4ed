"""Datasets: log, catalogue and users that fit together, saved as one folder."""

from __future__ import annotations

import json

import polars as pl
import pytest

from vouch.data import Catalog, Dataset, Interactions, Vocabulary
from vouch.errors import DataError, StorageError

LOG = Interactions.from_arrays(["ann", "bob", "ann"], [1, 2, 3], time=[1, 2, 3], value=[1, 2, 3])


def test_a_saved_dataset_opens_the_same(tmp_path) -> None:
    users = pl.DataFrame({"age": [30, 40]})
    catalog = Catalog.from_frame(LOG.items, pl.DataFrame({"item": [1], "title": ["One"]}), id_column="item")
    Dataset(LOG, catalog, users, "small").save(tmp_path / "d")
    opened = Dataset.open(tmp_path / "d")
    assert opened.name == "small"
    assert opened.interactions.fingerprint == LOG.fingerprint
    assert opened.catalog.title(0) == "One"
    assert opened.users is not None and opened.users.equals(users)
    opened.save(tmp_path / "d")  # over itself, while it is mapped
    assert Dataset.open(tmp_path / "d").interactions.fingerprint == LOG.fingerprint


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="number their items differently"):
        Dataset(LOG, Catalog.empty(Vocabulary.of([1, 2, 4])))
    with pytest.raises(DataError, match="3 rows for 2 users"):
        Dataset(LOG, Catalog.empty(LOG.items), pl.DataFrame({"age": [1, 2, 3]}))


def test_damaged_and_newer_folders_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="not a prepared dataset"):
        Dataset.open(tmp_path)
    path = tmp_path / "d"
    Dataset(LOG, Catalog.empty(LOG.items), pl.DataFrame({"age": [1, 2]})).save(path)
    (path / "users.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="table of users is damaged"):
        Dataset.open(path)
    header = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**header, "format": 2}))
    with pytest.raises(DataError, match="format 2; this version reads up to 1"):
        Dataset.open(path)
    (path / "dataset.json").write_text("{")
    with pytest.raises(StorageError, match="cannot be read as JSON"):
        Dataset.open(path)
