"""Comparing methods: the same split, the same tuning budget, the same test cases, several seeds, and a verdict."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.compare.units import Plan, base_config, is_random, train_seed, tune
from vouch.compare.verdict import Verdict, judge
from vouch.data import Dataset, check_leaks, split
from vouch.data.prepare import check_writable
from vouch.errors import ConfigError, DataError
from vouch.evaluation import parse_metric, two_way_interval
from vouch.files import read_json, write_json
from vouch.registry import Card, method
from vouch.workers import processes

SIMPLE = ("popularity", "recent-popularity", "itemknn", "markov", "ease")
"""Methods without gradient training: where one of these wins, that is said."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of a comparison.

    Attributes:
        plan: what was done. rows: one a method, best first; see `to_dict`.
        verdict: whether the best is really better.
        split: the description of the split. warnings: what may mislead about the data.
        values: per method and metric, float64 `(seeds, cases)`.
        history, popularity: int64 `(cases,)` history length and training count of the target.
        command: how to do it again.
    """

    plan: Plan
    rows: list[dict[str, Any]]
    verdict: Verdict
    split: dict[str, Any]
    warnings: list[str]
    values: dict[str, dict[str, NDArray[np.float64]]]
    history: NDArray[np.int64]
    popularity: NDArray[np.int64]
    machine: dict[str, Any]
    command: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, stable: `{"headline", "verdict", "methods": [row, ...], "split", "warnings", "plan", ...}`.

        A row is `{"method", "name", "status", "metrics", "intervals", "cost", "config", "trials", "seeds",
        "per_seed", "against_best"}`; a failed method has `error` instead of results.
        """
        return {
            "format": 1,
            "headline": self.plan.headline,
            "verdict": self.verdict.to_dict(),
            "methods": self.rows,
            "split": self.split,
            "warnings": self.warnings,
            "plan": {
                "methods": list(self.plan.methods),
                "seeds": self.plan.seeds,
                "trials": self.plan.trials,
                "exclude": self.plan.exclude,
                "metrics": list(self.plan.metrics),
            },
            "machine": self.machine,
            "command": self.command,
        }

    def table(self) -> Any:
        """The table for the terminal."""
        from rich.table import Table

        accuracy = [name for name in self.plan.metrics if not parse_metric(name).beyond]
        table = Table(title=f"{self.split['data']}, {self.split['protocol']}, {self.split['test_cases']:,} test cases")
        table.add_column("method")
        for name in (*accuracy, "fit", "p50"):
            table.add_column(name, justify="right")
        table.add_column("against the best")
        for row in self.rows:
            if row["status"] != "ok":
                table.add_row(row["name"], *["-"] * (len(accuracy) + 2), f"failed: {row['error']}", style="red")
                continue
            low, high = row["intervals"][self.plan.headline]
            cells = [
                f"{row['metrics'][accuracy[0]]:.4f} [dim][{low:.4f}, {high:.4f}][/dim]".replace("[dim][", "[dim]\\[")
            ]
            cells += [f"{row['metrics'][name]:.4f}" for name in accuracy[1:]]
            fit, p50 = row["cost"]["fit_seconds"], row["cost"]["latency_p50_ms"]
            style = "bold" if row is self.rows[0] else None
            table.add_row(row["name"], *cells, _duration(fit), f"{p50:.1f} ms", _standing(row), style=style)
        return table


def compare(
    dataset: Dataset | Path | str,
    methods: Sequence[str],
    *,
    out: Path | str,
    split_by: str = "leave-one-out",
    shares: Mapping[str, float] | None = None,
    seeds: int = 5,
    trials: int = 10,
    metrics: Sequence[str] | None = None,
    settings: Mapping[str, Sequence[str]] | None = None,
    exclude: str = "history",
    max_seconds: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    jobs: int | None = None,
    ray: str | None = None,
    command: str = "",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Tune, train and test methods side by side; continue where an earlier call with the same `out` stopped.

    Args:
        dataset: a dataset, or the folder of a prepared one. A dataset is saved under `out/data` for the workers.
        methods: slugs of the register.
        out: folder for all results; `comparison.json` is written there last.
        shares: `valid_share`, `test_share`, `min_history` of the split.
        metrics: the first decides, and is what tuning maximises on validation.
        settings: fixed settings by slug, `{"sasrec": ["epochs=20"]}`; tuning leaves them alone.
        max_seconds: limit on each training.
        jobs: processes; by default as many as there are cores. Each gets an equal share of the threads.
        ray: address of a Ray cluster (`auto`, `local`, `ray://...`) to run on instead; `out` must be seen by all.
        on_progress: called with a text, pieces done and pieces in all.

    Raises:
        UnknownIdError, ConfigError: an unknown method, metric or setting; found before any work.
        DataError: the data cannot be split, or `out` holds a comparison of other data, or every method failed.
        StorageError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    if not methods:
        raise ConfigError("there is no method to compare", hint="for example --methods popularity,itemknn,sasrec")
    if seeds < 1 or trials < 1:
        raise ConfigError(f"seeds is {seeds} and trials is {trials}; both must be at least 1")
    folder = _data_folder(dataset, out)
    opened = Dataset.open(folder)
    made = split(opened, split_by, **(shares or {}))  # type: ignore[arg-type]
    check_leaks(made)
    names = tuple(parse_metric(name).name for name in (metrics or Plan.metrics))
    if parse_metric(names[0]).beyond:
        raise ConfigError(
            f"the first metric decides, and {names[0]} does not measure accuracy", hint="begin with NDCG@10"
        )
    if "ILD" in "".join(names) and not opened.catalog.table.width:
        raise ConfigError("ILD needs a catalogue", hint="leave it out, or give --items")
    plan = Plan(
        data=str(folder.resolve()),
        fingerprint=opened.interactions.fingerprint,
        methods=tuple(dict.fromkeys(methods)),
        settings={slug: tuple(values) for slug, values in (settings or {}).items()},
        protocol=split_by,
        shares=dict(shares or {}),
        metrics=names,
        seeds=seeds,
        trials=trials,
        exclude=exclude,
        max_seconds=max_seconds,
        device=device,
        precision=precision,
    )
    for slug in (*plan.methods, *plan.settings):
        method(slug)
        base_config(plan, slug)
    _claim_folder(out, plan)
    units = out / "units"
    units.mkdir(parents=True, exist_ok=True)
    say = on_progress or (lambda text, done, total: None)
    results = _run_all(plan, units, jobs, ray, say)
    comparison = _assemble(plan, results, units, made.describe(), _warnings(opened, made.dropped), command)
    write_json(out / "comparison.json", comparison.to_dict())
    return comparison


Results = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


def _run_all(
    plan: Plan, units: Path, jobs: int | None, ray: str | None, say: Callable[[str, int, int], None]
) -> Results:
    """Tune every method, then train every seed; `{slug: (tuned, seed results)}`."""
    cores = os.cpu_count() or 1
    jobs = max(1, min(jobs or cores, cores))
    threads = max(1, cores // jobs)
    seeds = {slug: plan.seeds if is_random(slug) else 1 for slug in plan.methods}
    total, done = len(plan.methods) + sum(seeds.values()), 0
    tuned: dict[str, dict[str, Any]] = {}
    with _executor(jobs, ray) as pool:
        # The long ones first, so that no core waits for them at the end.
        waiting: dict[Future[Any], tuple[str, int | None]] = {
            pool.submit(tune, plan, slug, units, threads): (slug, None)
            for slug in sorted(plan.methods, key=is_random, reverse=True)
        }
        seed_results: dict[str, list[dict[str, Any]]] = {slug: [] for slug in plan.methods}
        try:
            while waiting:
                future = _next(waiting)
                slug, seed = waiting.pop(future)
                result, done = future.result(), done + 1
                if seed is not None:
                    seed_results[slug].append(result)
                    say(f"{slug}: seed {seed} done", done, total)
                    continue
                tuned[slug] = result
                say(f"{slug}: {'settings chosen' if result['status'] == 'ok' else 'failed'}", done, total)
                if result["status"] != "ok":
                    total -= seeds[slug]
                    continue
                for number in range(plan.first_seed, plan.first_seed + seeds[slug]):
                    unit = pool.submit(train_seed, plan, slug, result["config"], number, units, threads)
                    waiting[unit] = (slug, number)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # finished pieces stay on disk
            raise
    return {slug: (tuned[slug], sorted(seed_results[slug], key=lambda row: row["seed"])) for slug in plan.methods}


def _next(waiting: Iterable[Future[Any]]) -> Future[Any]:
    from concurrent.futures import FIRST_COMPLETED, wait

    return next(iter(wait(list(waiting), return_when=FIRST_COMPLETED).done))


def _executor(jobs: int, ray: str | None) -> Executor:
    if ray is not None:
        from vouch.compare.on_ray import RayExecutor

        return RayExecutor(ray)
    if jobs == 1:
        return _Here()
    return processes(jobs)


class _Here(Executor):
    """Runs each piece in this process when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _assemble(
    plan: Plan, results: Results, units: Path, described: dict[str, Any], warnings: list[str], command: str
) -> Comparison:
    from vouch.compare.machine import describe_machine

    rows: list[dict[str, Any]] = []
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    history = popularity = np.zeros(0, np.int64)
    for slug in plan.methods:
        tuned, seeds = results[slug]
        card: Card = method(slug).card
        failed = next((row for row in (tuned, *seeds) if row["status"] != "ok"), None)
        if failed is not None:
            rows.append({"method": slug, "name": card.name, "status": "failed", "error": failed["error"]})
            continue
        arrays = []
        for seed in seeds:
            with np.load(units / seed["values"], allow_pickle=False) as file:
                arrays.append({name: file[name] for name in file.files})
        history, popularity = arrays[0].pop("history"), arrays[0].pop("popularity")
        values[slug] = {name: np.stack([array[name] for array in arrays]) for name in arrays[0]}
        intervals = {}
        for name, matrix in values[slug].items():
            interval = two_way_interval(matrix)
            intervals[name] = [interval.low, interval.high]
        metrics = {name: float(np.mean([seed["metrics"][name] for seed in seeds])) for name in plan.metrics}
        cost = {name: float(np.mean([seed["cost"][name] for seed in seeds])) for name in seeds[0]["cost"]}
        rows.append(
            {
                "method": slug,
                "name": card.name,
                "status": "ok",
                "metrics": metrics,
                "intervals": intervals,
                "cost": {**cost, "tuning_seconds": tuned["tuning_seconds"]},
                "config": tuned["config"],
                "validation": {} if tuned["value"] is None else {plan.headline: tuned["value"]},
                "trials": tuned["trials"],
                "seeds": len(seeds),
                "stopped": [seed.get("stopped") for seed in seeds],
                "per_seed": [seed["metrics"] for seed in seeds],
            }
        )
    if not values:
        raise DataError(
            f"every method failed; the first because: {rows[0]['error']}", hint="see the settings and the data"
        )
    rows.sort(key=lambda row: -row["metrics"][plan.headline] if row["status"] == "ok" else np.inf)
    verdict = judge(plan.headline, {slug: found[plan.headline] for slug, found in values.items()}, _names(rows), SIMPLE)
    for row in rows:
        if row["status"] == "ok":
            row["against_best"] = verdict.against.get(row["method"])
    warnings = [*warnings, *_cut_short(rows)]
    return Comparison(
        plan, rows, verdict, described, warnings, values, history, popularity, describe_machine(), command
    )


def _names(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["method"]: row["name"] for row in rows}


def _data_folder(dataset: Dataset | Path | str, out: Path) -> Path:
    if not isinstance(dataset, Dataset):
        return Path(dataset)
    folder = out / "data"
    if not (folder / "dataset.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        dataset.save(folder)
    elif Dataset.open(folder).interactions.fingerprint != dataset.interactions.fingerprint:
        raise DataError("the folder holds a comparison of other data", where=str(out), hint="choose another --out")
    return folder


def _claim_folder(out: Path, plan: Plan) -> None:
    mark = out / "plan.json"
    if mark.exists() and read_json(mark).get("fingerprint") != plan.fingerprint:
        raise DataError("the folder holds a comparison of other data", where=str(out), hint="choose another --out")
    write_json(mark, {"fingerprint": plan.fingerprint, "data": plan.data, "methods": list(plan.methods)})


def _warnings(dataset: Dataset, dropped: Mapping[str, int]) -> list[str]:
    from vouch.data.inspect import inspect

    return inspect(dataset).warnings + [f"{count:,} {what}" for what, count in dropped.items()]


def _cut_short(rows: list[dict[str, Any]]) -> list[str]:
    """Which methods might have come further, in most of their seeds."""
    found = []
    for reason, text in (
        ("time", "the clock stopped {}: more seconds may change what is said of them"),
        ("epochs", "the last epoch was the best one of {}: more epochs may change what is said of them"),
    ):
        names = [row["name"] for row in rows if 2 * row.get("stopped", []).count(reason) > row.get("seeds", 0)]
        if names:
            found.append(text.format(", ".join(names)))
    return found


def _duration(seconds: float) -> str:
    return (
        f"{seconds * 1000:.0f} ms"
        if seconds < 1
        else f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
    )


def _standing(row: dict[str, Any]) -> str:
    found = row.get("against_best")
    if found is None:
        return "best"
    return f"{found['effect']:+.4f}, p = {found['p_value']:.3f}" + ("" if found["significant"] else " (not told apart)")
