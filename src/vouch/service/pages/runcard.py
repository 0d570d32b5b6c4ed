"""The run card as the page shows it: groups in words, and the slots of the audits."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vouch.service.pages.groups import span


@dataclass(frozen=True)
class Slot:
    """An audit: what it asks, and its result once it was run."""

    name: str
    title: str
    asks: str
    summary: str | None
    facts: list[tuple[str, str]]
    date: str


AUDITS = (
    ("attack", "Attack", "How far can somebody push an item, or steal the model, from outside?"),
    ("privacy", "Privacy", "How much does the model tell of the people it was trained on?"),
    ("explanation", "Explanation", "Do the reasons that are shown hold when they are put to the test?"),
)
MOST_FACTS = 12


def slots(audits: dict[str, dict[str, Any]]) -> list[Slot]:
    """The three audits, run or not."""
    made = []
    for name, title, asks in AUDITS:
        found = audits.get(name)
        if found is None:
            made.append(Slot(name, title, asks, None, [], ""))
            continue
        facts = [(key, _text(value)) for key, value in list(found["result"].items())[:MOST_FACTS]]
        date = datetime.fromtimestamp(found["time"], UTC).strftime("%Y-%m-%d")
        made.append(Slot(name, title, asks, found["summary"], facts, date))
    return made


@dataclass(frozen=True)
class Group:
    """Cases of a kind with their mean and its 95 % interval."""

    label: str
    cases: int
    value: float
    low: float
    high: float


def groups(measured: dict[str, Any]) -> dict[str, list[Group]]:
    """The groups of test cases, by what they are grouped by."""
    return {by: [_group(row) for row in rows] for by, rows in measured.get("groups", {}).items()}


def _group(row: dict[str, Any]) -> Group:
    mean, half = row["mean"], 1.96 * row["sem"]
    return Group(span(row["low"], row["high"]), row["cases"], mean, max(0.0, mean - half), mean + half)


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """A plain mapping as a list of names and texts."""
    return [(name.replace("_", " "), _text(value)) for name, value in facts.items() if value not in (None, {}, [], "")]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(inner) for inner in value) or "none"
    return str(value)
