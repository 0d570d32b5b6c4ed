"""The item catalogue: what is known of each item besides who took it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.data.interactions import read_header
from vouch.data.vocabulary import Vocabulary, open_array
from vouch.errors import DataError, UnknownIdError, did_you_mean
from vouch.files import atomic_directory, write_json

FORMAT = 1
ROLES = ("title", "text", "category", "categories", "number", "media", "other")


@dataclass(frozen=True, eq=False)
class Catalog:
    """Attributes, texts, media references and dense features of items; row `i` is item code `i`.

    Attributes:
        items: the item vocabulary; the same as the log's.
        table: a polars frame with `n_items` rows. Missing values are null.
        roles: the role of each column, one of `ROLES`: `title` and `text` are language, `category` one label per
            item, `categories` a list of labels, `number` a quantity, `media` a path or URL of a picture or clip.
        features: dense float32 matrices `(n_items, D_m)` by modality, e.g. `{"image": ..., "text": ...}`.
        root: the folder that relative `media` paths start from.
    """

    items: Vocabulary
    table: pl.DataFrame
    roles: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    root: Path | None = None

    def __post_init__(self) -> None:
        if self.table.width and self.table.height != len(self.items):
            raise DataError(f"the catalogue has {self.table.height} rows for {len(self.items)} items")
        for name, role in self.roles.items():
            if role not in ROLES:
                raise DataError(f"column {name!r} has the unknown role {role!r}", hint=did_you_mean(role, ROLES))
        for name, matrix in self.features.items():
            if matrix.ndim != 2 or len(matrix) != len(self.items):
                raise DataError(f"features {name!r} have shape {matrix.shape} for {len(self.items)} items")

    @classmethod
    def empty(cls, items: Vocabulary) -> Catalog:
        """A catalogue that knows nothing but the ids."""
        return cls(items, pl.DataFrame())

    @classmethod
    def from_frame(
        cls,
        items: Vocabulary,
        frame: pl.DataFrame,
        *,
        id_column: str,
        roles: Mapping[str, str] | None = None,
        features: Mapping[str, NDArray[np.float32]] | None = None,
        root: Path | None = None,
    ) -> Catalog:
        """Align a frame of items to the vocabulary: items without a row get nulls, rows of other items are left out.

        Raises:
            DataError: the id column is missing, or an id occurs twice.
        """
        if id_column not in frame.columns:
            raise DataError(f"the item table has no column {id_column!r}", hint=did_you_mean(id_column, frame.columns))
        ids = frame[id_column]
        if ids.dtype.is_float() and bool((ids == ids.floor()).all()):  # whole numbers that became floats beside a gap
            ids = ids.cast(pl.Int64)
        codes = np.array([items.get(value) if value is not None else -1 for value in ids.to_list()], dtype=np.int64)
        known = frame.filter(pl.Series(codes >= 0)).with_columns(pl.Series("__code", codes[codes >= 0]))
        if known["__code"].is_duplicated().any():
            twice = known.filter(known["__code"].is_duplicated())[id_column][0]
            raise DataError(f"item {twice!r} occurs twice in the item table", hint="keep one row per item")
        every = pl.DataFrame({"__code": np.arange(len(items), dtype=np.int64)})
        table = every.join(known, on="__code", how="left", maintain_order="left").drop("__code", id_column)
        chosen = dict(roles or {})
        for name, dtype in table.schema.items():
            chosen.setdefault(name, guess_role(name, dtype))
        return cls(items, table, chosen, dict(features or {}), root)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name}: {self.roles.get(name, 'other')}" for name in self.table.columns)
        matrices = ", ".join(f"{name} {matrix.shape[1]}-d" for name, matrix in self.features.items())
        return f"Catalog({len(self.items):,} items; {columns or 'no attributes'}; features: {matrices or 'none'})"

    def columns(self, role: str) -> list[str]:
        """Names of the columns with a role, in table order."""
        return [name for name in self.table.columns if self.roles.get(name) == role]

    @property
    def fingerprint(self) -> str:
        """A short hash of attributes, roles and features; it may change with the version of polars."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(json.dumps([self.table.columns, dict(self.roles)], sort_keys=True).encode())
        if self.table.width:
            digest.update(self.table.hash_rows().to_numpy().tobytes())
        for name in sorted(self.features):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.features[name]).data)
        return digest.hexdigest()

    def title(self, code: int) -> str:
        """The title of an item, or its id where it has none."""
        for name in self.columns("title"):
            value = self.table[name][int(code)]
            if value is not None:
                return str(value)
        return str(self.items.id(int(code)))

    def attribute(self, name: str) -> Attribute:
        """A `category`, `categories` column as padded codes. Missing is a value of its own (code 0).

        Raises:
            UnknownIdError: there is no such column, or it is not categorical.
        """
        choices = self.columns("category") + self.columns("categories")
        if name not in choices:
            raise UnknownIdError(f"there is no categorical attribute {name!r}", hint=did_you_mean(name, choices))
        column = self.table[name]
        if column.dtype != pl.List:
            column = column.cast(pl.String).map_elements(lambda value: [value], return_dtype=pl.List(pl.String))
        lists = [sorted({str(each) for each in values or () if each is not None}) for values in column.to_list()]
        labels = sorted({label for values in lists for label in values})
        rank = {label: code + 1 for code, label in enumerate(labels)}
        codes = np.zeros((len(lists), max(1, max(map(len, lists), default=1))), dtype=np.int32)
        for row, values in enumerate(lists):
            codes[row, : len(values)] = [rank[label] for label in values]
        return Attribute(name, codes, ["(missing)", *labels])

    def save(self, path: Path | str) -> None:
        """Write as a folder, atomically."""
        with atomic_directory(path) as aside:
            self.items.save(aside / "items")
            if self.table.width:
                self.table.write_parquet(aside / "items.parquet")
            (aside / "features").mkdir()
            for name, matrix in self.features.items():
                np.save(aside / "features" / f"{name}.npy", matrix)
            root = None if self.root is None else str(self.root.resolve())
            write_json(aside / "catalog.json", {"format": FORMAT, "roles": dict(self.roles), "root": root})

    @classmethod
    def open(cls, path: Path | str) -> Catalog:
        """Open a saved catalogue; feature matrices by memory map."""
        path = Path(path)
        header = read_header(path / "catalog.json", FORMAT)
        items = Vocabulary.open(path / "items")
        try:
            table = pl.read_parquet(path / "items.parquet") if (path / "items.parquet").exists() else pl.DataFrame()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"the item table is damaged: {error}", where=str(path), hint="prepare again") from error
        features: dict[str, Any] = {file.stem: open_array(file) for file in sorted((path / "features").glob("*.npy"))}
        return cls(items, table, header["roles"], features, Path(header["root"]) if header["root"] else None)


@dataclass(frozen=True, eq=False)
class Attribute:
    """One categorical attribute: `codes` int32 `(n_items, A)` padded with 0; `labels[0]` stands for missing."""

    name: str
    codes: NDArray[np.int32]
    labels: list[str]


def guess_role(name: str, dtype: pl.DataType) -> str:
    """The role of a column by its name and type; see `ROLES`."""
    lowered = name.lower()
    if dtype == pl.List:
        return "categories"
    if dtype.is_numeric():
        return "number"
    if dtype != pl.String:
        return "other"
    if any(word in lowered for word in ("title", "name")):
        return "title"
    if any(word in lowered for word in ("image", "picture", "photo", "video", "clip", "media", "poster")):
        return "media"
    if any(word in lowered for word in ("text", "description", "summary", "review")):
        return "text"
    return "category"
