"""Looking at a log before trusting it: what is in it, and what about it is suspicious."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.data.dataset import Dataset
from vouch.data.interactions import Interactions

LENGTH_EDGES = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
INTERVAL_EDGES = (0, 1, 60, 3600, 86_400, 604_800, 2_592_000, 31_536_000)
INTERVAL_NAMES = ("same second", "seconds", "minutes", "hours", "days", "weeks", "months", "years")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        name: the dataset's name.
        facts: plain JSON: counts, density, time range, skew, histograms, duplicates, ties.
        warnings: plain sentences about what may mislead, each with its numbers.
    """

    name: str
    facts: dict[str, Any]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: `{"name", ...facts, "warnings"}`."""
        return {"name": self.name, **self.facts, "warnings": self.warnings}

    def render(self) -> Any:
        """A rich renderable for the terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for key, value in self.facts.items():
            if isinstance(value, dict):
                peak = max([*value.values(), 1])
                for label, count in value.items():
                    bar = "█" * round(24 * count / peak)
                    facts.add_row(key if label == next(iter(value)) else "", f"{label:>12} {count:>12,} {bar}")
            else:
                facts.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
        lines: list[Any] = [Text(self.name, style="bold"), facts]
        for warning in self.warnings:
            lines.append(Text(f"! {warning}", style="yellow"))
        if not self.warnings:
            lines.append(Text("nothing suspicious found", style="green"))
        return Group(*lines)


def inspect(dataset: Dataset) -> Inspection:
    """Count, measure and doubt a dataset. A log of millions of rows takes seconds."""
    log = dataset.interactions
    counts = np.sort(log.item_counts)[::-1].astype(np.float64)
    lengths = log.lengths[log.lengths > 0]
    repeats = _repeated_pairs(log)
    facts: dict[str, Any] = {
        "rows": len(log),
        "users": int((log.lengths > 0).sum()),
        "items": int((log.item_counts > 0).sum()),
        "density": float(len(log) / max(1, log.n_users) / max(1, log.n_items)),
        "rows_per_user": {"min": int(lengths.min()), "median": int(np.median(lengths)), "max": int(lengths.max())},
        "history_lengths": _histogram(lengths, LENGTH_EDGES, [f"{edge}+" for edge in LENGTH_EDGES]),
        "share_of_top_1_percent_items": round(float(counts[: max(1, len(counts) // 100)].sum() / counts.sum()), 4),
        "share_of_top_10_percent_items": round(float(counts[: max(1, len(counts) // 10)].sum() / counts.sum()), 4),
        "popularity_gini": round(_gini(counts), 4),
        "repeated_user_item_pairs": repeats,
        "columns": [name for name in ("time", "value", "scenario", "domain") if getattr(log, name) is not None],
        "catalog": {
            name: int(dataset.catalog.table[name].drop_nulls().len()) for name in dataset.catalog.table.columns
        },
    }
    warnings = _about_people_and_items(log, lengths, repeats)
    if log.time is not None:
        warnings += _about_time(log, facts)
    else:
        warnings.append("there are no times: the order of rows in the source is taken for the order of events")
    warnings += [str(log.notes["warning"])] if "warning" in log.notes else []
    return Inspection(dataset.name, facts, warnings)


def _about_people_and_items(log: Interactions, lengths: NDArray[np.int64], repeats: int) -> list[str]:
    found = []
    top = int(log.lengths.argmax())
    share = log.lengths[top] / len(log)
    if share >= 0.1 and len(lengths) > 1:
        found.append(f"user {log.users.id(top)!r} alone has {share:.0%} of all rows: a robot, or a shared account?")
    if len(lengths) == 1:
        found.append("there is one user: nothing can be learned from others")
    top_item = int(log.item_counts.argmax())
    item_share = log.item_counts[top_item] / len(log)
    if item_share >= 0.1 and log.n_items > 1:
        found.append(f"item {log.items.id(top_item)!r} alone has {item_share:.0%} of all rows")
    single = int((lengths == 1).sum())
    if single:
        found.append(f"{single:,} users have a single row; they teach no order and cannot be asked about")
    short = int((lengths < 3).sum())
    if short and short != single:
        found.append(f"{short:,} users have fewer than 3 rows, too few for a leave-one-out case")
    if repeats:
        found.append(
            f"{repeats:,} rows repeat an earlier item of the same user; rankings that exclude the history count such "
            "targets as misses (--duplicates first drops repeats, exclude='none' ranks them)"
        )
    rare = int(((log.item_counts > 0) & (log.item_counts < 5)).sum())
    if rare > 0.5 * log.n_items:
        found.append(f"{rare:,} of {log.n_items:,} items have fewer than 5 rows")
    for kind, vocabulary in (("user", log.users), ("item", log.items)):
        twins = _near_twins(vocabulary)
        if twins:
            found.append(
                f"{twins[2]:,} {kind} ids differ from another only in case or spaces, such as {twins[0]!r} and {twins[1]!r}"
            )
    if log.value is not None and len(log) > 1 and float(log.value.min()) == float(log.value.max()):
        found.append(f"every value is {float(log.value[0]):g}: the column says nothing")
    elif log.value is not None and float(log.value.max()) > 3:
        bound = 0.4 * float(log.value.max())
        low = float((log.value <= bound).mean())
        if low > 0.05:
            found.append(
                f"{low:.0%} of the values are at most {bound:g} and count as positive unless --min-value is set"
            )
    return found


def _about_time(log: Interactions, facts: dict[str, Any]) -> list[str]:
    assert log.time is not None
    found = []
    first, last = int(log.time.min()), int(log.time.max())
    facts["first"], facts["last"] = _date(first), _date(last)
    same_user = log.user[1:] == log.user[:-1]
    gaps = np.diff(log.time)[same_user]
    facts["intervals"] = _histogram(gaps, INTERVAL_EDGES, list(INTERVAL_NAMES))
    facts["clock_backwards_in_source"] = int(log.notes.get("clock_backwards", 0))
    tied = float((gaps == 0).mean()) if len(gaps) else 0.0
    facts["share_of_adjacent_rows_at_one_moment"] = round(tied, 4)
    askable = log.lengths >= 3
    ends = log.offsets[1:][askable]
    tied_ends = int((log.time[ends - 1] == log.time[ends - 2]).sum())
    facts["test_items_that_depend_on_tie_order"] = tied_ends
    if tied >= 0.05:
        found.append(
            f"{tied:.0%} of adjacent rows of a user share a moment, so their order is a convention; for {tied_ends:,} of "
            f"{int(askable.sum()):,} users the last two do, so which of them is the leave-one-out test item is one too"
        )
    if facts["clock_backwards_in_source"]:
        found.append(
            f"the clock goes backwards {facts['clock_backwards_in_source']:,} times between neighbouring rows of a user in the "
            "source; rows were sorted by time"
        )
    if last > first and bool((log.time % 86_400 == 0).all()):
        found.append("times have day resolution: the order within a day is the source's")
    now = int(datetime.now(UTC).timestamp())
    late, early = int((log.time > now).sum()), int((log.time < 631_152_000).sum())
    if late:
        found.append(f"{late:,} rows lie in the future (last {_date(last)}): is the unit of time right?")
    if early:
        found.append(f"{early:,} rows lie before 1990 (first {_date(first)}): is the unit of time right?")
    if first == last and len(log) > 1:
        found.append("all rows share one moment: times say nothing")
    return found


def _histogram(values: NDArray[Any], edges: tuple[int, ...], names: list[str]) -> dict[str, int]:
    place = np.digitize(values, edges) - 1
    counts = np.bincount(place[place >= 0], minlength=len(edges))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _repeated_pairs(log: Interactions) -> int:
    keys = np.sort(log.user.astype(np.int64) * log.n_items + log.item)
    return int((keys[1:] == keys[:-1]).sum())


def _near_twins(vocabulary: Any) -> tuple[Any, Any, int] | None:
    """Two ids that are the same but for case and surrounding space, and how many such there are."""
    if vocabulary.is_numeric or len(vocabulary) > 2_000_000:
        return None
    seen: dict[str, Any] = {}
    first: tuple[Any, Any] | None = None
    count = 0
    for value in vocabulary.ids(np.arange(len(vocabulary))):
        other = seen.setdefault(str(value).strip().casefold(), value)
        if other is not value:
            count += 1
            first = first or (other, value)
    return None if first is None else (*first, count)


def _gini(descending: NDArray[np.float64]) -> float:
    n, total = len(descending), descending.sum()
    return float((n + 1 - 2 * np.arange(1, n + 1)) @ descending / (n * total))


def _date(moment: int) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{moment} s"
