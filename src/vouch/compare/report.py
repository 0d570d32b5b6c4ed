"""The report: one HTML file that needs nothing else, readable in light, in dark, and on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vouch
from vouch.evaluation import parse_metric
from vouch.files import atomic_file

if TYPE_CHECKING:
    from vouch.compare.compare import Comparison


@dataclass(frozen=True)
class Shown:
    """An item as a page shows it: title, one line of detail, and a picture as a data URI, if there is one."""

    title: str
    detail: str = ""
    picture: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Person:
    """A user with the latest history and what is recommended."""

    name: str
    history: list[Shown]
    recommended: list[Shown]


def write_report(comparison: Comparison, path: Path | str, *, people: Sequence[Person] = ()) -> Path:
    """Write the report of a comparison.

    Args:
        people: users to show with their recommendations.

    Raises:
        StorageError: the file cannot be written.
    """
    import jinja2

    from vouch.compare.plots import all_plots

    loader = jinja2.PackageLoader("vouch.compare", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["seconds"] = _seconds
    metrics = list(comparison.plan.metrics)
    page = environment.get_template("report.html").render(
        c=comparison,
        rows=comparison.rows,
        accuracy=[name for name in metrics if not parse_metric(name).beyond],
        beyond=[name for name in metrics if parse_metric(name).beyond],
        plots=all_plots(comparison),
        people=people,
        settings=[(row["name"], _changed(row)) for row in comparison.rows if row["status"] == "ok"],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=vouch.__version__,
    )
    with atomic_file(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return Path(path)


def _changed(row: dict[str, Any]) -> str:
    """The settings of a method that differ from its defaults."""
    from vouch.registry import method

    defaults = {setting.name: setting.default for setting in method(row["method"]).Config.rows()}
    changed = {name: value for name, value in row["config"].items() if value != defaults.get(name)}
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in changed.items()) or "defaults"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
