"""The run card: what model this is, on what data, how good it is, what is claimed of it, and what it cannot do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vouch.errors import VouchError
from vouch.files import read_json, write_json
from vouch.recommenders.runs import OpenRun
from vouch.service.index import ServingIndex

METRICS = ("NDCG@10", "HR@10", "MRR")
CASES = 2_000
"""Test cases measured at most."""


def run_card(run: OpenRun, fingerprint: str, index: ServingIndex | None) -> dict[str, Any]:
    """The card in plain JSON. The metrics on the test part are there once `measure` was called."""
    header, log, card = run.header, run.dataset.interactions, run.model.card
    return {
        "name": run.path.resolve().name,
        "fingerprint": fingerprint,
        "model": {
            "method": card.slug,
            "name": card.name,
            "summary": card.summary,
            "paper": card.paper,
            "year": card.year,
            "settings": header.get("config", {}),
            "parameters": run.model.n_parameters,
            "seed": header.get("seed"),
            "vouch": header.get("version"),
            "training": header.get("report", {}),
        },
        "data": {
            "name": run.dataset.name,
            "fingerprint": log.fingerprint,
            "users": log.n_users,
            "items": log.n_items,
            "interactions": len(log),
            "attributes": list(run.dataset.catalog.table.columns),
        },
        "split": header.get("split", {}),
        "metrics": {"validation": header.get("validation", {}), "test": _measured(run.path, fingerprint)},
        "claims": _claims(card.slug),
        "limits": limits(run),
        "index": {"kind": "exact", "recall": 1.0} if index is None else asdict(index.measured),
    }


def limits(run: OpenRun) -> list[str]:
    """What the model cannot do, in sentences."""
    log, model = run.dataset.interactions, run.model
    said = [
        f"It knows the {log.n_items:,} items of its training data; items added later are recommended after the next training.",
        "Without a history it recommends what is popular, and says so.",
    ]
    reads = getattr(model, "reads", None)
    if reads is not None:
        said.append(f"It reads the last {reads} items of a history.")
    if log.time is None:
        said.append("Its data had no times: histories are in the order of the file.")
    validation = run.header.get("validation", {})
    if not validation:
        said.append("It was trained without validation.")
    said.append("Metrics are offline: they say how often past behaviour was foreseen, not what recommending changes.")
    return said


def measure(run: OpenRun, fingerprint: str, *, most: int = CASES) -> dict[str, Any]:
    """Metrics on test cases (at most `most`, drawn evenly) with intervals, and by groups; kept beside the run.

    Returns:
        `{"cases", "of", "protocol", "metrics": {name: {"value", "low", "high"}}, "groups": {by: [...]}}`.
    """
    from vouch.evaluation import bootstrap_interval, evaluate

    kept = _measured(run.path, fingerprint)
    if kept is not None:
        return kept
    made = run.split()
    cases = made.test
    total = len(cases)
    if total > most:
        cases = cases.take(np.linspace(0, total - 1, most).astype(np.int64))
    found = evaluate(run.model, cases, metrics=METRICS, train=made.train)
    metrics = {}
    for name, values in found.per_case.items():
        interval = bootstrap_interval(values)
        metrics[name] = {"value": found.metrics[name], "low": interval.low, "high": interval.high}
    groups = {
        "history length": found.by_group("NDCG@10", found.history_length, _thirds(found.history_length)),
        "popularity of the target": found.by_group(
            "NDCG@10", found.target_popularity, _thirds(found.target_popularity)
        ),
    }
    result = {"cases": len(cases), "of": total, "protocol": found.protocol, "metrics": metrics, "groups": groups}
    try:
        folder = run.path / "serving" / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "test.json", result)
    except (VouchError, OSError):
        pass  # the folder cannot be written: it is measured again next time
    return result


def measure_first(run: OpenRun, tell: Callable[[str], None]) -> dict[str, Any]:
    """`measure`, unless it was done before; says so, and what came out."""
    from vouch.service.index import fingerprint_of

    fingerprint = fingerprint_of(run)
    if _measured(run.path, fingerprint) is None:
        tell(f"measuring on at most {CASES:,} test cases, once; it is kept beside the run")
    found = measure(run, fingerprint)
    values = ", ".join(
        f"{name} {each['value']:.4f} [{each['low']:.4f}, {each['high']:.4f}]" for name, each in found["metrics"].items()
    )
    tell(f"test, {found['cases']:,} of {found['of']:,} cases: {values}")
    return found


def _thirds(values: Any) -> list[float]:
    return sorted({float(edge) for edge in np.quantile(values, (1 / 3, 2 / 3))})


def _measured(run: Path, fingerprint: str) -> Any:
    file = run / "serving" / fingerprint / "test.json"
    try:
        return read_json(file) if file.exists() else None
    except VouchError:
        return None


@functools.lru_cache(maxsize=16)
def _claims(slug: str) -> list[dict[str, Any]]:
    """What the ledger says of the method: the newest result of each variant and scale."""
    from vouch.claims.ledger import read_ledger

    try:
        entries = read_ledger()
    except VouchError:
        return []
    newest = {(entry.variant, entry.scale): entry for entry in entries if entry.slug == slug}
    told = ("variant", "scale", "statement", "reported", "metric", "effect", "interval", "verdict", "data", "date")
    return [{name: getattr(entry, name) for name in told} for entry in newest.values()]
