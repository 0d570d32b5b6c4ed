"""Filters on catalogue attributes as masks over items, and what the catalogue says of an item."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.data.catalog import Catalog
from vouch.errors import ConfigError, UnknownIdError, did_you_mean

KEPT = 64
"""Masks remembered; one takes a byte an item."""


class Filter(Protocol):
    """A condition on one attribute: all that are given must hold. A missing attribute fulfils none."""

    attribute: str
    equals: Any
    in_: Sequence[Any] | None
    min: float | None
    max: float | None


class Filters:
    """The attributes of a catalogue, to ask and to show."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._mask = functools.lru_cache(maxsize=KEPT)(self._one)

    def mask(self, filters: Sequence[Filter]) -> NDArray[np.bool_]:
        """bool `(n_items,)`: the items that fulfil all filters; read-only.

        On a column of lists, `equals` and `in` ask whether any label fits. Numbers compare as numbers, all else as text.

        Raises:
            UnknownIdError: there is no such attribute. ConfigError: a bound on what is no number.
        """
        masks = [self._mask(_key(each)) for each in filters]
        if len(masks) == 1:
            return masks[0]
        return np.logical_and.reduce(masks) if masks else np.ones(len(self.catalog.items), dtype=bool)

    def _one(self, key: str) -> NDArray[np.bool_]:
        name, equals, among, low, high = json.loads(key)
        known = self.catalog.table.columns
        if name not in known:
            hint = did_you_mean(name, known) if known else "the catalogue has none"
            raise UnknownIdError(f"there is no attribute {name!r}", hint=hint)
        column = self.catalog.table[name]
        kept = pl.repeat(True, len(column), eager=True)
        if equals is not None:
            kept &= _any_of(column, [equals])
        if among is not None:
            kept &= _any_of(column, among)
        if low is not None or high is not None:
            if not column.dtype.is_numeric():
                raise ConfigError(f"{name!r} is no number, so it has no least or greatest", hint="use equals or in")
            kept &= column >= (low if low is not None else -np.inf)
            kept &= column <= (high if high is not None else np.inf)
        mask = kept.fill_null(False).to_numpy().copy()
        mask.flags.writeable = False
        return mask

    def describe(self, code: int) -> dict[str, Any]:
        """`title`, `attributes` and `picture` of an item."""
        row = self.catalog.table.row(int(code), named=True) if self.catalog.table.width else {}
        roles = self.catalog.roles
        shown = {
            name: _plain(_decimal(value) if self.catalog.table.schema[name] == pl.Float32 else value)
            for name, value in row.items()
            if value is not None and roles.get(name) not in ("media", "title")
        }
        pictures = (self._file(row[name]) for name in self.catalog.columns("media") if row[name] is not None)
        return {
            "title": self.catalog.title(int(code)),
            "attributes": shown,
            "picture": next((file for file in pictures if file is not None), None),
        }

    def _file(self, name: str) -> str | None:
        """The path of a media file; None if it is none, or lies outside the catalogue's folder."""
        root = self.catalog.root
        if root is None or "://" in str(name):
            return None
        path = (root / str(name)).resolve()
        return str(path) if path.is_relative_to(Path(root).resolve()) and path.is_file() else None


def _key(one: Filter) -> str:
    among = None if one.in_ is None else list(one.in_)
    return json.dumps([one.attribute, one.equals, among, one.min, one.max])


def _any_of(column: pl.Series, values: list[Any]) -> pl.Series:
    """Where a column, or any label of its lists, is one of some values."""
    if column.dtype == pl.Boolean:
        return column.is_in([value for value in values if isinstance(value, bool)])
    if column.dtype.is_numeric():
        numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        # As precisely as the column is: 12.3 in single precision is not 12.3 in double.
        precision = pl.Float32 if column.dtype == pl.Float32 else pl.Float64
        return column.cast(precision).is_in(pl.Series(numbers, dtype=pl.Float64).cast(precision).implode())
    texts = pl.Series([str(value) for value in values], dtype=pl.String)
    if column.dtype == pl.List:
        labels = column.cast(pl.List(pl.String))
        return labels.list.eval(pl.element().is_in(texts.implode())).list.any()
    return column.cast(pl.String).is_in(texts.implode())


def _decimal(value: float) -> float:
    """A number of single precision as it was written: 12.3, not 12.300000190734863."""
    return float(str(np.float32(value)))


def _plain(value: Any) -> Any:
    """A cell as JSON has it."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool) else str(value)
