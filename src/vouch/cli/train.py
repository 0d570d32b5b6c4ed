"""`vouch train`, `vouch evaluate`, `vouch recommend`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from vouch.cli import shared


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: vouch train sasrec --data world --set epochs=20 --out runs/sasrec")(train)
    app.command(epilog="Example: vouch evaluate runs/sasrec --metrics NDCG@10,HR@10,MRR")(evaluate)
    app.command(epilog="Example: vouch recommend runs/sasrec --history 12,7,430 -k 5")(recommend)


def train(
    method: Annotated[str, typer.Argument(help="What to train; 'vouch systems METHOD' shows its settings.")],
    data: shared.Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    settings: shared.Settings = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Feedback columns to learn, by commas: short for --set tasks=...")
    ] = None,
    balancer: Annotated[
        str | None, typer.Option("--balancer", help="How tasks are balanced: short for --set balancer=...")
    ] = None,
    split_by: shared.SplitBy = "leave-one-out",
    seed: Annotated[int, typer.Option("--seed", help="Seed of every source of chance.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop after the epoch in which this passes.")
    ] = None,
    mlflow: Annotated[str | None, typer.Option("--mlflow", help="MLflow tracking URI to log to as well.")] = None,
    format: shared.Format = None,
    columns: shared.Columns = None,
    items: shared.Items = None,
    k_core: shared.KCore = 0,
    min_value: shared.MinValue = None,
    duplicates: shared.Duplicates = "all",
    since: shared.Since = None,
    until: shared.Until = None,
    as_json: shared.Json = False,
) -> None:
    """Train a method, watch it on validation, and keep the best as a run."""
    from vouch import registry
    from vouch.data import Dataset, check_leaks
    from vouch.data import split as cut
    from vouch.data.filters import apply
    from vouch.data.readers import read
    from vouch.evaluation import evaluate as measure
    from vouch.recommenders.runs import begin_run, finish_run
    from vouch.training import Run
    from vouch.training.devices import parse_device

    kind = registry.method(method)
    parse_device(device)
    short = [f"{name}={value}" for name, value in (("tasks", tasks), ("balancer", balancer)) if value is not None]
    config = kind.Config.parse([*(settings or []), *short])
    chosen = shared.filters(k_core, min_value, duplicates, since, until)
    if resume and (out / "data" / "dataset.json").exists():
        dataset, kept = Dataset.open(out / "data"), True
    else:
        mapping = shared.parse_columns(columns)
        if tasks and data != "world" and not shared.is_prepared(data):
            mapping = {"feedback": "+".join(name.strip() for name in tasks.split(",")), **(mapping or {})}
        found = read(data, format=format, columns=mapping, items=items)
        dataset = apply(found, chosen)
        kept = shared.is_prepared(data) and dataset is found  # it lies where it was prepared
    made = cut(dataset, split_by)
    check_leaks(made)
    begin_run(out, dataset, data, keep_data=not kept)
    for why, count in made.dropped.items():
        shared.say(f"note: {count:,} {why}")
    model = kind(config)
    run = Run(
        path=out,
        seed=seed,
        device=device,
        precision=precision,  # type: ignore[arg-type]
        resume=resume,
        progress=True,
        max_seconds=max_seconds,
        mlflow=mlflow,
    )
    try:
        report = model.fit(made, run)
    except KeyboardInterrupt:
        kept_last = (out / "checkpoints" / "last" / "checkpoint.json").exists()
        what = "the last checkpoint is kept: the same command with --resume goes on from it"
        shared.say(f"\nstopped; {what if kept_last else 'no epoch was finished yet'} ({out})")
        raise typer.Exit(130) from None
    metrics = measure(model, made.valid, metrics=["NDCG@10", "HR@10", "MRR"], train=made.train).metrics
    metrics |= model.measure(made.valid)
    finish_run(out, model, made, report, source=data, seed=seed, metrics=metrics)
    result = {
        "run": str(out),
        "method": method,
        "seconds": report.seconds,
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "stopped": report.stopped,
        "validation": metrics,
    }
    if as_json:
        shared.emit(result)
        return
    text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    shared.console().print(
        f"{kind.card.name} on {dataset.name}: validation {text} ({report.seconds:.1f} s, {report.epochs} epochs)"
    )
    shared.console().print(f"next: vouch evaluate {out}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    metrics: Annotated[str, typer.Option("--metrics", help="Names, by commas.")] = "NDCG@10,HR@10,MRR,NDCG@20,HR@20",
    part: Annotated[str, typer.Option("--part", help="test or valid.")] = "test",
    exclude: Annotated[
        str, typer.Option("--exclude", help="history: never rank what the history holds; none: rank all.")
    ] = "history",
    ties: Annotated[str, typer.Option("--ties", help="expected or midrank.")] = "expected",
    sampled: Annotated[
        int | None, typer.Option("--sampled", help="Rank against this many sampled items: biased, and named so.")
    ] = None,
    as_json: shared.Json = False,
) -> None:
    """Measure a run: every case against every item, with intervals."""
    from vouch.errors import ConfigError
    from vouch.evaluation import bootstrap_interval
    from vouch.evaluation import evaluate as measure
    from vouch.recommenders.runs import open_run

    opened = open_run(run)
    made = opened.split()
    if part not in ("test", "valid"):
        raise ConfigError(f"--part is {part!r}", hint="use test or valid")
    found = measure(
        opened.model,
        made.test if part == "test" else made.valid,
        metrics=[name for name in metrics.split(",") if name.strip()],
        exclude=exclude,  # type: ignore[arg-type]
        ties=ties,  # type: ignore[arg-type]
        sampled=sampled,
        train=made.train,
        catalog=made.dataset.catalog,
    )
    found.metrics.update(opened.model.measure(made.test if part == "test" else made.valid))
    intervals = {name: bootstrap_interval(values) for name, values in found.per_case.items()}
    if as_json:
        shared.emit(
            {
                "run": str(run),
                "method": opened.header["method"],
                "part": part,
                "metrics": found.metrics,
                "intervals": {name: [interval.low, interval.high] for name, interval in intervals.items()},
                "protocol": found.protocol,
            }
        )
        return
    from rich.table import Table

    table = Table(title=f"{opened.header['method']} on {made.dataset.name}, {part}, {len(found):,} cases")
    for name in ("metric", "value", "95 % interval"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, value in found.metrics.items():
        interval = intervals.get(name)
        table.add_row(name, f"{value:.4f}", f"{interval.low:.4f} to {interval.high:.4f}" if interval else "")
    shared.console().print(table)
    if found.protocol["targets_in_history"]:
        shared.say(f"note: {found.protocol['targets_in_history']:,} targets are in the history and count as misses")
    if sampled is not None:
        shared.say("note: sampled rankings are biased and can reverse the order of methods")


def recommend(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    user: Annotated[str | None, typer.Option("--user", "-u", help="A user of the log.")] = None,
    history: Annotated[
        str | None, typer.Option("--history", help="Item ids by commas, oldest first; quote ids that hold commas.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many items.", min=1)] = 10,
    repeat: Annotated[bool, typer.Option("--repeat", help="Items of the history may be recommended again.")] = False,
    as_json: shared.Json = False,
) -> None:
    """Recommend to a known user, or to anyone with a history, and say which history items mattered most."""
    from vouch.data import Queries, Query
    from vouch.errors import ConfigError
    from vouch.recommenders.reasons import why
    from vouch.recommenders.runs import open_run

    if user is None and history is None:
        raise ConfigError("say whom to recommend to", hint="--user ID or --history A,B,C")
    opened = open_run(run)
    model, catalog, log = opened.model, opened.dataset.catalog, opened.dataset.interactions
    items = None if history is None else _ids(history)
    queries = Queries.resolve([Query(user=user, history=items)], users=model.users, items=model.items, log=log)
    ranking = model.recommend(queries, k, exclude="none" if repeat else "history")
    rows: list[dict[str, Any]] = []
    for code, score in zip(ranking.item[0], ranking.score[0], strict=True):
        if code < 0:
            break
        reasons = why(model, queries, 0, int(code))
        because = [{"item": log.items.id(r.item), "title": catalog.title(r.item), "drop": r.drop} for r in reasons]
        rows.append(
            {
                "item": log.items.id(int(code)),
                "title": catalog.title(int(code)),
                "score": float(score),
                "because": because,
            }
        )
    recent: list[dict[str, Any]] = [
        {"item": log.items.id(int(c)), "title": catalog.title(int(c))} for c in queries.history(0)[::-1][:10]
    ]
    fallback = bool(ranking.fallback[0])
    if as_json:
        shared.emit({"user": user, "history": recent, "fallback": fallback, "recommendations": rows})
        return
    from rich.markup import escape
    from rich.table import Table

    out = shared.console()
    if recent:
        out.print("[bold]latest in the history:[/bold] " + escape("; ".join(str(row["title"]) for row in recent[:5])))
    if fallback:
        shared.say("note: there is no history, so these are the most popular items")
    table = Table()
    for name in ("", "item", "title", "score", "what mattered most"):
        table.add_column(name, justify="right" if name in ("", "score") else "left")
    for place, row in enumerate(rows, 1):
        mattered = "; ".join(str(reason["title"]) for reason in row["because"]) or "-"
        name = "" if str(row["title"]) == str(row["item"]) else str(row["title"])
        table.add_row(str(place), escape(str(row["item"])), escape(name), f"{row['score']:.4g}", escape(mattered))
    out.print(table)


def _ids(text: str) -> list[str]:
    """Ids by commas, in the manner of CSV."""
    (row,) = list(csv.reader([text], skipinitialspace=True)) or [[]]
    return [cell for cell in row if cell != ""]
