"""Looking at a log before trusting it: what is in it, and what about it is suspicious."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.data.dataset import Dataset
from vouch.data.gini import gini
from vouch.data.interactions import Interactions
from vouch.data.vocabulary import Vocabulary

HISTOGRAMS = ("history_lengths", "intervals")
LENGTH_EDGES = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
INTERVAL_EDGES = (0, 1, 60, 3600, 86_400, 604_800, 2_592_000, 31_536_000)
INTERVAL_NAMES = ("same second", "seconds", "minutes", "hours", "days", "weeks", "months", "years")
DAY = 86_400
YEAR_1990 = 631_152_000
MISSING_WORDS = ("null", "none", "na", "n/a", "undefined", "unknown", "-", "-1", "\\n")
"""Ids that programs write where there is none, in lower case."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        name: the dataset's name.
        facts: plain JSON: counts, density, time range, skew, histograms, duplicates, ties, and how it was read.
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
            label = key.replace("_", " ")
            if key in HISTOGRAMS:
                peak = max([*value.values(), 1])
                for part, count in value.items():
                    bar = "█" * round(24 * count / peak)
                    facts.add_row(label if part == next(iter(value)) else "", f"{part:>12} {count:>12,} {bar}")
            elif value not in ({}, []):
                facts.add_row(label, Text(_plain(value)))
        lines: list[Any] = [Text(self.name, style="bold"), facts, Text("")]
        for warning in self.warnings:
            lines.append(Text(f"! {warning}", style="yellow"))
        if not self.warnings:
            lines.append(Text("nothing suspicious found", style="green"))
        return Group(*lines)


def inspect(dataset: Dataset) -> Inspection:
    """Count, measure and doubt a dataset. A log of 20 million rows takes about two seconds."""
    log = dataset.interactions
    counts = np.sort(log.item_counts[log.item_counts > 0])[::-1].astype(np.float64)
    lengths = log.lengths[log.lengths > 0]
    repeats, exact = _repeats(log)
    facts: dict[str, Any] = {
        "rows": len(log),
        "users": len(lengths),
        "items": len(counts),
        "density": float(len(log) - repeats) / max(1, len(lengths)) / max(1, len(counts)),
        "rows_per_user": {"min": int(lengths.min()), "median": int(np.median(lengths)), "max": int(lengths.max())},
        "history_lengths": _histogram(lengths, LENGTH_EDGES, _ranges(LENGTH_EDGES)),
        "users_with_one_row": int((lengths == 1).sum()),
        "share_of_top_1_percent_items": _top_share(counts, 0.01),
        "share_of_top_10_percent_items": _top_share(counts, 0.1),
        "popularity_gini": round(gini(counts), 4),
        "repeated_user_item_pairs": repeats,
        "identical_rows": exact,
        "columns": [name for name in ("time", "value", "scenario", "domain") if getattr(log, name) is not None],
        "catalog": {name: len(dataset.catalog.table[name].drop_nulls()) for name in dataset.catalog.table.columns},
    }
    if log.value is not None:
        facts["values"] = {"min": float(log.value.min()), "mean": round(float(log.value.mean(dtype=np.float64)), 4),
                           "max": float(log.value.max())}  # fmt: skip
    warnings = _about_users_and_items(log, lengths)
    warnings += _about_ids(log) + _about_repeats(log, repeats, exact) + _about_values(log)
    if log.time is not None:
        warnings += _about_time(log, log.time, facts)
    else:
        warnings.append("there are no times: the order of rows in the source is taken for the order of events")
    if "warning" in log.notes:
        warnings.append(str(log.notes["warning"]))
    facts["notes"] = {key: value for key, value in log.notes.items() if key not in ("fingerprint", "warning")}
    return Inspection(dataset.name, facts, warnings)


def _about_users_and_items(log: Interactions, lengths: NDArray[np.int64]) -> list[str]:
    found = []
    n_items = int((log.item_counts > 0).sum())
    if len(lengths) == 1:
        found.append("there is one user: nothing can be learned from others")
    if n_items == 1:
        found.append("there is one item: there is nothing to rank")
    for kind, vocabulary, rows, why in (
        ("user", log.users, log.lengths, ": a robot, or a shared account?"),
        ("item", log.items, log.item_counts, ""),
    ):
        top, others = int(rows.argmax()), int((rows > 0).sum())
        share = int(rows[top]) / len(log)
        if others > 1 and share >= max(0.1, 2 / others):
            found.append(f"{kind} {vocabulary.id(top)!r} alone has {share:.0%} of all rows ({int(rows[top]):,}){why}")
    single, short = int((lengths == 1).sum()), int((lengths < 3).sum())
    if single:
        found.append(
            f"{single:,} of {len(lengths):,} users have a single row: they teach no order and cannot be asked about"
        )
    if short > single:
        found.append(f"{short:,} of {len(lengths):,} users have fewer than 3 rows, too few for a leave-one-out case")
    rare = int(((log.item_counts > 0) & (log.item_counts < 5)).sum())
    if rare > 0.5 * n_items:
        found.append(f"{rare:,} of {n_items:,} items have fewer than 5 rows")
    return found


def _about_ids(log: Interactions) -> list[str]:
    found = []
    for kind, vocabulary, rows in (("user", log.users, log.lengths), ("item", log.items, log.item_counts)):
        odd = [(word, code) for word in MISSING_WORDS for code in _spellings(vocabulary, word)]
        for code in sorted({code for _, code in odd if rows[code] > 0}):
            found.append(
                f"{int(rows[code]):,} rows have the {kind} id {vocabulary.id(code)!r}: does it stand for a missing one?"
            )
        if vocabulary.is_numeric or len(vocabulary) == 0:
            continue
        texts = pl.Series(vocabulary.ids(np.arange(len(vocabulary))), dtype=pl.String)
        same = texts.str.strip_chars().str.to_lowercase()
        twins = int(same.is_duplicated().sum())
        if twins:
            pair = texts.filter(same == same.filter(same.is_duplicated())[0]).to_list()[:2]
            found.append(
                f"{twins:,} {kind} ids differ from another only in case or in the space around them, "
                f"such as {pair[0]!r} and {pair[1]!r}"
            )
        broken = int(texts.str.contains("[\r\n]").sum())
        if broken:
            found.append(f"{broken:,} {kind} ids hold line ends: is a quotation mark left open in the source?")
    return found


def _about_repeats(log: Interactions, repeats: int, exact: int) -> list[str]:
    found = []
    if repeats:
        found.append(
            f"{repeats:,} rows repeat an earlier item of the same user; rankings that exclude the history count such "
            "targets as misses (--duplicates first drops repeats, exclude='none' ranks them)"
        )
    if exact:
        found.append(f"{exact:,} of them repeat user, item and time: the same event recorded twice?")
    return found


def _about_values(log: Interactions) -> list[str]:
    if log.value is None or len(log) < 2:
        return []
    low, high = float(log.value.min()), float(log.value.max())
    if low == high:
        return [f"every value is {low:g}: the column says nothing"]
    bound = 0.4 * high
    share = float((log.value <= bound).mean())
    if high > 3 and share > 0.05:
        return [f"{share:.0%} of the values are at most {bound:g} and count as positive unless --min-value is set"]
    return []


def _about_time(log: Interactions, time: NDArray[np.int64], facts: dict[str, Any]) -> list[str]:
    found = []
    first, last = int(time.min()), int(time.max())
    facts["first"], facts["last"] = _date(first), _date(last)
    gaps = np.diff(time)[log.user[1:] == log.user[:-1]]
    facts["intervals"] = _histogram(gaps, INTERVAL_EDGES, list(INTERVAL_NAMES))
    tied = float((gaps == 0).mean()) if len(gaps) else 0.0
    facts["share_of_adjacent_rows_at_one_moment"] = round(tied, 4)
    askable = log.lengths >= 3
    ends = log.offsets[1:][askable]
    tied_ends = int((time[ends - 1] == time[ends - 2]).sum())
    facts["test_items_that_depend_on_tie_order"] = tied_ends
    if tied >= 0.01 or tied_ends:
        found.append(
            f"{tied:.1%} of adjacent rows of a user share a moment, so their order is a convention; for {tied_ends:,} "
            f"of {int(askable.sum()):,} users the last two do, so which of them is the leave-one-out test item is one too"
        )
    backwards = int(log.notes.get("rows_out_of_order", 0))
    facts["rows_out_of_order_in_source"] = backwards
    if backwards:
        found.append(
            f"the clock goes backwards in the source: of {len(gaps):,} neighbouring rows of a user, {backwards:,} "
            "stand there the other way round; they were sorted by time"
        )
    if first == last and len(log) > 1:
        found.append("all rows share one moment: times say nothing")
    elif bool((time % DAY == 0).all()):
        found.append("times have day resolution: the order within a day is the source's")
    now = int(datetime.now(UTC).timestamp())
    for count, what, edge in (
        (int((time > now).sum()), "in the future (last", last),
        (int((time < YEAR_1990).sum()), "before 1990 (first", first),
    ):
        if count:
            found.append(f"{count:,} rows lie {what} {_date(edge)}): is the unit of time right?")
    return found


def _repeats(log: Interactions) -> tuple[int, int]:
    """Rows whose user and item, and rows whose user, item and time, occur before."""
    keys = log.user.astype(np.int64) * log.n_items + log.item
    if log.time is None:
        keys.sort()
        return int((keys[1:] == keys[:-1]).sum()), 0
    order = np.argsort(keys, kind="stable")  # rows of a user are in time order, and stay so within a key
    same = keys[order[1:]] == keys[order[:-1]]
    return int(same.sum()), int((same & (log.time[order[1:]] == log.time[order[:-1]])).sum())


def _spellings(vocabulary: Vocabulary, word: str) -> list[int]:
    """Codes of a word as it is, in capitals, and with a capital."""
    codes = {vocabulary.get(spelling) for spelling in (word, word.upper(), word.capitalize())}
    return sorted(code for code in codes if code >= 0)


def _histogram(values: NDArray[Any], edges: tuple[int, ...], names: list[str]) -> dict[str, int]:
    place = np.digitize(values, edges) - 1
    counts = np.bincount(place[place >= 0], minlength=len(edges))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _ranges(edges: tuple[int, ...]) -> list[str]:
    names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    return [*names, f"{edges[-1]}+"]


def _top_share(descending: NDArray[np.float64], part: float) -> float:
    return round(float(descending[: max(1, round(len(descending) * part))].sum() / descending.sum()), 4)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _date(moment: int) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{moment} s"
