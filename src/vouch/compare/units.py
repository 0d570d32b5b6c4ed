"""The pieces of work of a comparison: tuning one method, and training one method with one seed.

Every finished piece lies in `units/` as JSON (and .npz for values per case), written atomically under a name that
holds what it depends on. A comparison that is started again reads what is there and does the rest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vouch.config import Choice, Config, Search, Span
from vouch.data import Dataset, Split, split
from vouch.errors import VouchError
from vouch.files import atomic_file, read_json, write_json

if TYPE_CHECKING:
    from vouch.training import FitReport

LATENCY_QUERIES = 200
"""Test cases that recommendation is timed on."""


@dataclass(frozen=True)
class Plan:
    """What a comparison does; plain values only, so that it can travel to another process.

    Attributes:
        data: folder of the prepared dataset. fingerprint: of its log.
        methods: slugs. settings: fixed settings by slug, as `key=value`.
        protocol, shares: how to split. metrics: the first is the headline, tuned on validation.
        seeds, trials: how many of each; every method gets the same number of trials.
        exclude: `history` or `none`.
        max_seconds: limit on one training, or None.
        first_seed: seed of the first repeat.
        device, precision: as in `Run`.
    """

    data: str
    fingerprint: str
    methods: tuple[str, ...]
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    protocol: str = "leave-one-out"
    shares: Mapping[str, float] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("NDCG@10", "HR@10", "MRR", "Coverage@10", "Novelty@10", "Gini@10")
    seeds: int = 5
    trials: int = 10
    exclude: str = "history"
    max_seconds: float | None = None
    first_seed: int = 0
    device: str = "auto"
    precision: str = "auto"

    @property
    def headline(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    def key(self, method: str) -> str:
        """A short hash of all that one method's results depend on."""
        parts = asdict(self)
        for name in ("data", "methods", "seeds", "trials", "first_seed"):
            parts.pop(name)
        parts["settings"] = list(self.settings.get(method, ()))
        text = json.dumps({**parts, "method": method}, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def open(self) -> Split:
        """The data, split."""
        return split(Dataset.open(self.data), self.protocol, **self.shares)  # type: ignore[arg-type]


def base_config(plan: Plan, method: str) -> Config:
    """The method's defaults with the plan's fixed settings."""
    from vouch.registry import method as find

    return find(method).Config.parse(plan.settings.get(method, ()))


def is_random(method: str) -> bool:
    """Whether seeds make a difference: methods fitted in closed form are run once."""
    from vouch.registry import method as find
    from vouch.training import TrainConfig

    return issubclass(find(method).Config, TrainConfig)


def tune(plan: Plan, method: str, units: Path, threads: int = 1) -> dict[str, Any]:
    """Search the method's declared space on validation, `plan.trials` trainings in all; the defaults are the first.

    Where they are all there is to choose from nothing is trained here.

    Returns:
        `{"method", "config", "value", "trials", "tuning_seconds", "status", "error"}`; a method that fails with its
        defaults has status `failed`. `value` is None where nothing was trained.
    """
    config = base_config(plan, method)
    fixed = {text.partition("=")[0].strip() for text in plan.settings.get(method, ())}
    space = {
        name: search
        for name, search in config.search_space().items()
        if name not in fixed and config.value(name) is not None  # a part may have been left out
    }
    if plan.trials == 1 or not space:
        only = {"method": method, "config": config.model_dump(mode="json"), "status": "ok"}
        return {**only, "value": None, "trials": 1, "tuning_seconds": 0.0}
    import optuna

    _set_threads(threads)
    made: Split | None = None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=plan.first_seed, n_startup_trials=max(3, plan.trials // 3))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({name: _nearest(search, config.value(name)) for name, search in space.items()})
    rows: list[dict[str, Any]] = []
    for number in range(plan.trials):
        trial = study.ask({name: _distribution(search) for name, search in space.items()})
        chosen = config if number == 0 else config.updated(trial.params)
        path = units / f"{method}-{plan.key(method)}-trial-{number}.json"
        if not path.exists():
            made = made or plan.open()
            write_json(path, _trial(plan, method, chosen, made))
        row = read_json(path)
        rows.append(row)
        if row["status"] == "ok":
            study.tell(trial, row["value"])
        elif number == 0:
            return {"method": method, "status": "failed", "error": row["error"], "trials": 1}
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    best = max((row for row in rows if row["status"] == "ok"), key=lambda row: row["value"])
    seconds = sum(row["seconds"] for row in rows)
    return {**best, "trials": len(rows), "tuning_seconds": seconds}


def _trial(plan: Plan, method: str, config: Config, made: Split) -> dict[str, Any]:
    from vouch.evaluation import evaluate
    from vouch.registry import method as find
    from vouch.training import Run

    begin = time.perf_counter()
    result: dict[str, Any] = {"method": method, "config": config.model_dump(mode="json"), "status": "ok"}
    try:
        model = find(method)(config)
        run = Run(seed=plan.first_seed, max_seconds=plan.max_seconds, device=plan.device, precision=plan.precision)  # type: ignore[arg-type]
        report = model.fit(made, run)
        found = evaluate(model, made.valid, metrics=[plan.headline], exclude=plan.exclude, train=made.train)  # type: ignore[arg-type]
        result.update(value=found.metrics[plan.headline], epochs=report.epochs)
    except (VouchError, MemoryError) as error:
        result.update(status="failed", error=getattr(error, "what", None) or "out of memory")
    return {**result, "seconds": time.perf_counter() - begin}


def train_seed(
    plan: Plan, method: str, config: Mapping[str, Any], seed: int, units: Path, threads: int = 1
) -> dict[str, Any]:
    """Train with the chosen settings and one seed, and measure on test.

    Returns:
        `{"method", "seed", "metrics", "cost", "values", "stopped", "status"}`; `values` is the .npz of values per case,
        `stopped` why training ended: `time` and `epochs` while it still got better, else as the fit's report says.
    """
    from vouch.evaluation import evaluate, latency, measure
    from vouch.registry import method as find
    from vouch.training import Run

    _set_threads(threads)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=4).hexdigest()
    path = units / f"{method}-{plan.key(method)}-seed-{seed}-{digest}.json"
    if path.exists():
        return dict(read_json(path))
    result: dict[str, Any] = {"method": method, "seed": seed, "status": "ok"}
    try:
        made = plan.open()
        model = find(method)(find(method).Config(**config))
        run = Run(seed=seed, max_seconds=plan.max_seconds, device=plan.device, precision=plan.precision)  # type: ignore[arg-type]
        with measure() as cost:
            report = model.fit(made, run)
        with measure() as ranking:
            found = evaluate(
                model,
                made.test,
                metrics=plan.metrics,
                exclude=plan.exclude,  # type: ignore[arg-type]
                train=made.train,
                catalog=made.dataset.catalog,
            )
        speed = latency(model, made.test.queries(0, LATENCY_QUERIES))
        arrays = path.with_suffix(".npz")
        with atomic_file(arrays) as aside, aside.open("wb") as file:
            columns: dict[str, Any] = {"history": found.history_length, "popularity": found.target_popularity}
            np.savez_compressed(file, **columns, **found.per_case)  # type: ignore[arg-type]
        result.update(
            metrics=found.metrics,
            protocol=found.protocol,
            values=arrays.name,
            stopped=_stopped(report, model.config),
            cost={
                "fit_seconds": cost.wall_seconds,
                "cpu_seconds": cost.cpu_seconds,
                "peak_memory_mb": cost.peak_memory_mb,
                "evaluate_seconds": ranking.wall_seconds,
                "parameters": model.n_parameters,
                "epochs": report.epochs,
                "latency_p50_ms": speed.p50_ms,
                "latency_p99_ms": speed.p99_ms,
                "recommendations_per_second": speed.per_second,
            },
        )
    except (VouchError, MemoryError) as error:
        result.update(status="failed", error=getattr(error, "what", None) or "out of memory")
    write_json(path, result)
    return result


def _stopped(report: FitReport, config: Config) -> str:
    if report.stopped == "finished" and report.best_epoch > report.epochs - getattr(config, "evaluate_every", 1):
        return "epochs"  # the last look at validation was the best one
    return report.stopped


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(max(1, threads))


def _distribution(search: Search) -> Any:
    import optuna

    if isinstance(search, Choice):
        return optuna.distributions.CategoricalDistribution(search.values)
    if isinstance(search.low, int) and isinstance(search.high, int):
        return optuna.distributions.IntDistribution(search.low, search.high, log=search.log)
    return optuna.distributions.FloatDistribution(search.low, search.high, log=search.log)


def _nearest(search: Search, value: Any) -> Any:
    """A default value as the search space can say it: the first trial trains with the default itself."""
    if isinstance(search, Choice):
        return value if value in search.values else search.values[0]
    assert isinstance(search, Span)
    return min(max(value if value is not None else search.low, search.low), search.high)
