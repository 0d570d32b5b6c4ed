"""Prices in single precision are shown and asked for as they were written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

pytest.importorskip("fastapi")

from vouch import Catalog, Interactions
from vouch.service.filters import Filters
from vouch.service.shelf import fits


@pytest.fixture
def priced() -> Filters:
    items = Interactions.from_arrays(["u", "u"], ["a", "b"]).items
    prices = pl.Series("price", [12.3, 9.99], dtype=pl.Float32)
    return Filters(Catalog.from_frame(items, pl.DataFrame({"id": ["a", "b"], "price": prices}), id_column="id"))


def asked(**bounds: Any) -> Any:
    return SimpleNamespace(**{"attribute": "price", "equals": None, "in_": None, "min": None, "max": None, **bounds})


def test_a_price_is_shown_as_it_was_written(priced: Filters) -> None:
    assert [priced.describe(code)["attributes"]["price"] for code in (0, 1)] == [12.3, 9.99]


@pytest.mark.parametrize("bounds", [{"equals": 12.3}, {"in_": [12.3, 5]}, {"min": 12.3}, {"min": 12.3, "max": 12.3}])
def test_a_price_is_found_by_the_number_shown(priced: Filters, bounds: dict[str, Any]) -> None:
    assert priced.mask([asked(**bounds)]).tolist() == [True, False]
    # and so it is for an item that was changed, whose attributes are compared as shown
    assert [fits(asked(**bounds), priced.describe(code)["attributes"]["price"]) for code in (0, 1)] == [True, False]
