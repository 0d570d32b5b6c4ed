"""Running a claim: every seed, then the interval, the verdict and the ledger."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vouch.claims.claim import SCALES, Claim, Measurement, Scale, claim
from vouch.claims.ledger import LedgerEntry, append, default_ledger, judge
from vouch.compare.machine import commit, describe_machine
from vouch.data import Dataset
from vouch.data.prepare import check_writable
from vouch.errors import ConfigError, StorageError, did_you_mean
from vouch.evaluation import Interval, seed_interval, two_way_interval
from vouch.files import atomic_file, read_json, write_json
from vouch.workers import processes

SEEDS = {"smoke": 2, "desk": 5, "full": 5}


def run_claim(
    slug: str,
    scale: Scale = "smoke",
    *,
    seeds: int | None = None,
    variant: str | None = None,
    data: str | None = None,
    out: Path | str = "runs/claims",
    ledger: Path | None = None,
    jobs: int | None = None,
    command: str = "",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> LedgerEntry:
    """Run a claim over seeds 0, 1, ... and append the result to the ledger.

    Finished seeds lie in `out` under a name with the data's fingerprint and the commit; a run that was stopped goes on.
    So do trained models, in `trained`, as long as the code is that of a commit: variants that share a side train it once.

    Args:
        seeds: how many; 2 at smoke, 5 otherwise.
        data: other data to run it on.
        ledger: the file to append to; see `default_ledger`.
        jobs: processes; as many as there are cores, at most one a seed.

    Raises:
        UnknownIdError, ConfigError: an unknown claim, variant or scale, or too few seeds for an interval.
        StorageError, DataError: the data is not there, or cannot be used.
    """
    found = claim(slug, variant)
    if scale not in SCALES:
        raise ConfigError(f"there is no scale {scale!r}", hint=did_you_mean(scale, SCALES))
    n = seeds if seeds is not None else SEEDS[scale]
    if n < 2:
        raise ConfigError(f"{n} seed gives no interval", hint="run at least 2, better 5")
    source = data or found.source(scale)
    out = Path(out)
    check_writable(out)
    target = ledger or default_ledger()
    check_writable(target.parent)
    begin = time.perf_counter()
    dataset = found.read(source) if data else _published(found, source)
    fingerprint = dataset.interactions.fingerprint if isinstance(dataset, Dataset) else dataset.fingerprint
    folder = out / f"{slug}-{found.variant}-{scale}-{fingerprint}-{commit() or 'installed'}"
    folder.mkdir(parents=True, exist_ok=True)
    opened: Path | str = source
    if isinstance(dataset, Dataset):  # the processes open a log by memory map
        opened = folder / "data"
        if not (opened / "dataset.json").exists():
            dataset.save(opened)
    measured = _measure_all(found, opened, scale, n, folder, jobs, on_progress or (lambda text, done, total: None))
    interval = effect_interval(measured)
    entry = LedgerEntry(
        slug=slug,
        variant=found.variant,
        scale=scale,
        seeds=list(range(n)),
        metric=found.metric,
        baseline=float(np.mean([m.baseline for m in measured])),
        method=float(np.mean([m.method for m in measured])),
        effect=float(np.mean([m.effect for m in measured])),
        interval=[interval.low, interval.high],
        verdict=verdict(interval),
        data=dataset.name,
        command=command,
        commit=commit(),
        statement=found.statement,
        reported=found.reported,
        effect_is=found.effect,
        baseline_name=found.baseline,
        method_name=found.method,
        fingerprint=fingerprint,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        seconds=round(time.perf_counter() - begin, 1),
        machine=describe_machine(),
        per_seed=[
            {
                "seed": seed,
                "baseline": m.baseline,
                "method": m.method,
                "effect": m.effect,
                "seconds": m.seconds,
                **m.details,
            }
            for seed, m in enumerate(measured)
        ],
    )
    append(entry, target)
    return entry


def _published(found: Claim, source: str) -> Any:
    """A claim's own data, if it is on this machine."""
    try:
        return found.read(source)
    except StorageError as error:
        hint = "set VOUCH_DATA to the folder that holds it, or run the claim on your own data with --data"
        raise StorageError(f"the data {source!r} of this claim is not here", hint=hint) from error


def verdict(interval: Interval) -> str:
    """What an interval of the effect says: see `judge`."""
    return judge(interval.low, interval.high)


def effect_interval(measured: Sequence[Measurement]) -> Interval:
    """The effect's 95 % interval: over seeds and cases where every seed has values per case, else over seeds (t)."""
    pairs = [(m.method_cases, m.baseline_cases) for m in measured]
    if all(a is not None and b is not None for a, b in pairs):
        return two_way_interval(np.stack([a - b for a, b in pairs if a is not None and b is not None]))
    return seed_interval([m.effect for m in measured])


def _measure_all(
    found: Claim,
    opened: Path | str,
    scale: Scale,
    n: int,
    folder: Path,
    jobs: int | None,
    say: Callable[[str, int, int], None],
) -> list[Measurement]:
    cores = os.cpu_count() or 1
    workers = max(1, min(jobs or cores, n, cores))
    threads = max(1, cores // workers)
    missing = [seed for seed in range(n) if not (folder / f"seed-{seed}.json").exists()]
    done = n - len(missing)
    if missing:
        with processes(workers) as pool:
            futures = {
                pool.submit(_measure_seed, found.slug, found.variant, opened, scale, seed, folder, threads): seed
                for seed in missing
            }
            try:
                for future in as_completed(futures):
                    future.result()
                    done += 1
                    say(f"{found.slug} ({found.variant}): seed {futures[future]} done", done, n)
            except BaseException:  # an error or an interrupt: begin no further seed
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [_load(folder, seed) for seed in range(n)]


def _measure_seed(
    slug: str, variant: str, opened: Path | str, scale: Scale, seed: int, folder: Path, threads: int
) -> None:
    import torch

    torch.set_num_threads(threads)
    begin = time.perf_counter()
    found, at = claim(slug, variant), commit()
    found.trained = folder.parent / "trained" / at if at and not at.endswith("+dirty") else None
    data = Dataset.open(opened) if isinstance(opened, Path) else found.read(opened)
    measured = found.measure(data, scale, seed)
    measured = replace(measured, seconds=round(time.perf_counter() - begin, 1))
    if measured.method_cases is not None and measured.baseline_cases is not None:
        with atomic_file(folder / f"seed-{seed}.npz") as aside, aside.open("wb") as file:
            np.savez_compressed(file, method=measured.method_cases, baseline=measured.baseline_cases)
    plain: dict[str, Any] = {
        name: getattr(measured, name) for name in ("baseline", "method", "effect", "details", "seconds")
    }
    write_json(folder / f"seed-{seed}.json", {**plain, "details": dict(measured.details)})


def _load(folder: Path, seed: int) -> Measurement:
    plain = read_json(folder / f"seed-{seed}.json")
    arrays: dict[str, Any] = {}
    if (folder / f"seed-{seed}.npz").exists():
        with np.load(folder / f"seed-{seed}.npz", allow_pickle=False) as file:
            arrays = {"method_cases": file["method"], "baseline_cases": file["baseline"]}
    return Measurement(**plain, **arrays)
