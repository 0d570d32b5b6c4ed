"""Groups of test cases: by the length of the history, and by how often the target was taken."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.errors import VouchError
from vouch.files import read_json

UNITS = "units"
FIFTHS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Grouped:
    """Quality of every method in each group.

    Attributes:
        by: what the cases are grouped by. names, cases: of the groups. means: by the slug of the method, one a group.
    """

    by: str
    names: list[str]
    cases: list[int]
    means: dict[str, list[float]]


def span(low: float | None, high: float | None) -> str:
    """A range of whole numbers in words; `high` is no part of it."""
    if high is None:
        return "all" if low is None else f"{low:,.0f} or more"
    last = high - 1
    if low is None:
        return f"up to {last:,.0f}"
    return f"{low:,.0f}" if last <= low else f"{low:,.0f} to {last:,.0f}"


def grouped(comparison: dict[str, Any], folder: Path) -> list[Grouped]:
    """The headline metric by groups, from the values per case that `vouch compare` left in its folder.

    Empty where they are gone, or are not those that the comparison was made from.
    """
    from vouch.compare.plots import LENGTH_EDGES

    values: dict[str, NDArray[np.float64]] = {}
    by: dict[str, NDArray[np.int64]] = {}
    for row in comparison["methods"]:
        if row["status"] != "ok":
            continue
        found = [_values(folder / UNITS, row["method"], seed, comparison["headline"]) for seed in row["per_seed"]]
        if not found or any(each is None or len(each[0]) != len(found[0][0]) for each in found):
            return []
        values[row["method"]] = np.mean([each[0] for each in found], axis=0)
        _, by["events in the history"], by["training events of the target"] = found[0]
    if not values or len({len(each) for each in values.values()}) != 1:
        return []
    length, popularity = by["events in the history"], by["training events of the target"]
    fifths = sorted({int(edge) for edge in np.quantile(popularity, FIFTHS)} - {0}) or [1]
    return [
        _group("events in the history", length, list(LENGTH_EDGES), values),
        _group("training events of the target", popularity, fifths, values),
    ]


def _group(by: str, numbers: NDArray[np.int64], edges: list[int], values: dict[str, NDArray[np.float64]]) -> Grouped:
    group = np.digitize(numbers, edges)
    present = [int(place) for place in np.unique(group)]
    bounds: list[int | None] = [None, *edges, None]
    return Grouped(
        by=by,
        names=[span(bounds[place], bounds[place + 1]) for place in present],
        cases=[int((group == place).sum()) for place in present],
        means={slug: [float(each[group == place].mean()) for place in present] for slug, each in values.items()},
    )


def _values(units: Path, method: str, metrics: dict[str, float], headline: str) -> Any:
    """Values per case, history lengths and popularities of the seed that had these metrics; None if it is gone."""
    for file in sorted(units.glob(f"{method}-*-seed-*.json")):
        if (unit := _unit(file)).get("metrics") == metrics and unit.get("method") == method:
            try:
                with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
                    return tuple(arrays[name] for name in (headline, "history", "popularity"))
            except (OSError, ValueError, KeyError):
                return None
    return None


@functools.lru_cache(maxsize=512)
def _unit(file: Path) -> dict[str, Any]:
    try:
        unit = read_json(file)
    except VouchError:
        return {}
    return unit if isinstance(unit, dict) else {}
