"""The ledger: one JSON line for every claim that was run, never changed afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vouch.errors import StorageError

PACKAGED = Path(__file__).with_name("ledger.jsonl")
"""The project's own results, shipped with it."""


@dataclass(frozen=True)
class LedgerEntry:
    """A claim's result.

    Attributes:
        slug, variant, scale: what was run. statement, reported: what the paper says.
        seeds: the seeds. metric, baseline_name, method_name: what was measured for whom.
        baseline, method: means over seeds. effect: mean effect. interval: its 95 % interval.
        verdict: `holds` (the interval lies above 0), `does not hold` (below 0), `inconclusive`.
        data, fingerprint: what it ran on. command, commit, date, machine: how, where and when.
        per_seed: `{"seed", "baseline", "method", "effect", "seconds", ...details}` each.
    """

    slug: str
    variant: str
    scale: str
    seeds: list[int]
    metric: str
    baseline: float
    method: float
    effect: float
    interval: list[float]
    verdict: str
    data: str
    command: str
    commit: str | None
    statement: str = ""
    reported: str = ""
    effect_is: str = ""
    baseline_name: str = ""
    method_name: str = ""
    fingerprint: str = ""
    date: str = ""
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    per_seed: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def cut_short(self, side: Literal["baseline", "method"]) -> int:
        """In how many seeds a side's epochs ran out before its patience did; 0 where that was not recorded."""
        return sum(each.get(f"{side}_stopped") in ("finished", "time") for each in self.per_seed)


def judge(low: float, high: float) -> str:
    """`holds` if the whole interval of the effect lies above 0, `does not hold` if below, else `inconclusive`."""
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else "inconclusive"


def default_ledger() -> Path:
    """Where new results go: the project's ledger in a checkout, a file in the current folder otherwise."""
    root = PACKAGED.parents[3]
    return PACKAGED if (root / ".git").exists() and (root / "pyproject.toml").exists() else Path("vouch-ledger.jsonl")


def read_ledger(path: Path | None = None) -> list[LedgerEntry]:
    """All entries: of one file, or the shipped ones and then those of the current folder.

    Raises:
        StorageError: a file cannot be read, or a line is no entry (names the line).
    """
    paths = [path] if path is not None else list(dict.fromkeys([PACKAGED, default_ledger()]))
    entries = []
    for file in paths:
        if not file.exists():
            if path is not None:
                raise StorageError("there is no ledger", where=str(file))
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                entries.append(_checked(LedgerEntry(**json.loads(line))))
            except (ValueError, TypeError) as error:
                raise StorageError(
                    f"the ledger has a line that is no entry: {error}",
                    where=f"{file}, line {number}",
                    hint="mend or drop it",
                ) from error
    return entries


def newest(entries: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Of each claim at each scale on each data the last entry, in the order of the claims' first ones."""
    return list({(each.slug, each.variant, each.scale, each.data): each for each in entries}.values())


def _checked(entry: LedgerEntry) -> LedgerEntry:
    low, high = (float(bound) for bound in entry.interval)
    if not low <= high:
        raise ValueError(f"{entry.interval} is no interval")
    if entry.verdict != judge(low, high):
        raise ValueError(f"the verdict {entry.verdict!r} is not what the interval {entry.interval} says")
    return entry


def append(entry: LedgerEntry, path: Path) -> None:
    """Add one line.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write the ledger: {error.strerror}", where=str(path)) from error
