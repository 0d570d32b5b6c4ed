"""Comparisons that lie beside the served run: found, read, and made ready for tables and plots."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vouch.errors import DataError, UnknownIdError, VouchError
from vouch.files import read_json
from vouch.service.pages.groups import Grouped, grouped

FILE = "comparison.json"
REPORT = "report.html"
FORMAT = 1
COSTS = {
    "fit_seconds": "seconds to fit",
    "tuning_seconds": "seconds to tune",
    "latency_p50_ms": "median latency, ms",
    "peak_memory_mb": "peak memory, MB",
    "parameters": "parameters",
}


@dataclass(frozen=True)
class Found:
    """A comparison: the name of its folder, the file, and whether the whole report lies beside it."""

    name: str
    file: Path

    @property
    def report(self) -> Path | None:
        """The report of the whole comparison, if it was written."""
        report = self.file.with_name(REPORT)
        return report if report.is_file() else None


def find(run: Path) -> list[Found]:
    """Comparisons in the run's folder, in the folder that holds it, and in the folders beside it; newest first."""
    around = [run, run.parent, *(each for each in run.parent.iterdir() if each != run and each.is_dir())]
    files = [folder / FILE for folder in around if (folder / FILE).is_file()]
    return [Found(file.parent.name, file) for file in sorted(files, key=lambda file: -file.stat().st_mtime)]


def choose(found: list[Found], name: str) -> Found:
    """The comparison of that name, the newest where none is named.

    Raises:
        UnknownIdError: there is none of that name.
    """
    for each in found:
        if name in ("", each.name):
            return each
    raise UnknownIdError(f"there is no comparison {name!r} beside the run")


def read(found: Found) -> dict[str, Any]:
    """The comparison as plain JSON.

    Raises:
        DataError: it is damaged, or a newer version wrote it.
    """
    try:
        read = read_json(found.file)
    except VouchError as error:
        raise DataError(f"the comparison {found.name!r} cannot be read", hint="run vouch compare again") from error
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise DataError(f"the comparison {found.name!r} has a form this version does not read", hint="upgrade vouch")
    missing = {"headline", "verdict", "methods", "split", "plan"} - read.keys()
    if missing:
        raise DataError(
            f"the comparison {found.name!r} lacks {', '.join(sorted(missing))}", hint="run vouch compare again"
        )
    return read


def groups_of(found: Found) -> list[Grouped]:
    """Quality by groups of test cases, where the values per case are still there."""
    return _groups(found.file, found.file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _groups(file: Path, written: int) -> list[Grouped]:
    return grouped(read(Found(file.parent.name, file)), file.parent)


def plotted(comparison: dict[str, Any], groups: list[Grouped]) -> dict[str, Any]:
    """What the plots are drawn from: of every method that ran, its numbers."""
    methods = [row for row in comparison["methods"] if row["status"] == "ok"]
    metrics = list(comparison["plan"]["metrics"])
    return {
        "headline": comparison["headline"],
        "metrics": [name for name in metrics if all(name in row["metrics"] for row in methods)],
        "costs": {name: label for name, label in COSTS.items() if all(name in row["cost"] for row in methods)},
        "best": comparison["verdict"]["best"],
        "groups": [asdict(each) for each in groups],
        "methods": [
            {
                "slug": row["method"],
                "name": row["name"],
                "metrics": row["metrics"],
                "intervals": row["intervals"],
                "cost": row["cost"],
                "seeds": row["per_seed"],
                "against": row.get("against_best"),
            }
            for row in methods
        ],
    }
