"""`vouch compare` and `vouch demo`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vouch.cli import shared


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: vouch demo --out demo")(demo)
    app.command(
        epilog="Example: vouch compare --data world --methods popularity,itemknn,sasrec --seeds 3 --trials 4 --out runs/world"
    )(compare)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the world.", min=0)] = 0,
    as_json: shared.Json = False,
) -> None:
    """Build a small simulated shop, train and compare six methods on it, explain the best, write a report."""
    from vouch.compare.demo import demo as run

    shared.say(
        "Building a world of 2,000 people, 1,500 things and about 60,000 events, and comparing six methods on it."
    )
    result = run(out, seed=seed, command=_command(), on_progress=_progress())
    if as_json:
        shared.emit(result.comparison.to_dict())
        return
    from rich.markup import escape

    print_to = shared.console()
    print_to.print(result.comparison.table())
    print_to.print(f"[bold]Is the best really better?[/bold] {escape(result.comparison.verdict.sentence)}")
    for person in result.people:
        print_to.print(f"\n[bold]{escape(person.name)}[/bold]")
        print_to.print("  latest: " + escape("; ".join(item.title for item in person.history[:4])))
        for item in person.recommended:
            because = f"  [dim]because of {escape(item.reason)}[/dim]" if item.reason else ""
            print_to.print(f"  -> {escape(item.title)}{because}")
    print_to.print(f"\nThe report, with plots and pictures: {result.report}")
    print_to.print(f"next: vouch serve {result.run}")


def compare(
    data: shared.Source,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything; the same folder continues where it stopped.")
    ],
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Slugs by commas, or all-sequential, all-collaborative, all.")
    ] = "popularity,itemknn,markov,ease,bpr,sasrec",
    seeds: Annotated[int, typer.Option("--seeds", help="Repeats of each trained method.", min=1)] = 5,
    trials: Annotated[int, typer.Option("--trials", help="Tuning trials of every method, on validation.", min=1)] = 10,
    split_by: shared.SplitBy = "leave-one-out",
    metrics: Annotated[
        str, typer.Option("--metrics", help="By commas; the first decides.")
    ] = "NDCG@10,HR@10,MRR,Coverage@10,Novelty@10,Gini@10",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Fix a setting: METHOD.key=value, or key=value for all that have it."),
    ] = None,
    exclude: Annotated[str, typer.Option("--exclude", help="history or none.")] = "history",
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", help="Limit on each training.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Processes; as many as cores by default.", min=1)
    ] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster to run on.")] = None,
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
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
    """Which method is best here, is the difference real, and what does it cost?"""
    from vouch.compare import compare as run
    from vouch.compare import write_report
    from vouch.data.prepare import check_writable

    check_writable(out)
    slugs = _methods(methods)
    fixed = _settings(settings or [], slugs)
    chosen = shared.filters(k_core, min_value, duplicates, since, until)
    dataset = shared.load_data(data, format, columns, items, chosen)
    result = run(
        dataset,
        slugs,
        out=out,
        split_by=split_by,
        seeds=seeds,
        trials=trials,
        metrics=[name for name in metrics.split(",") if name.strip()],
        settings=fixed,
        exclude=exclude,
        max_seconds=max_seconds,
        device=device,
        precision=precision,
        jobs=jobs,
        ray=ray,
        command=_command(),
        on_progress=_progress(),
    )
    report = write_report(result, out / "report.html")
    if as_json:
        shared.emit(result.to_dict())
        return
    from rich.markup import escape

    shared.console().print(result.table())
    shared.console().print(f"[bold]Is the best really better?[/bold] {escape(result.verdict.sentence)}")
    for warning in result.warnings:
        shared.console().print(f"[yellow]![/yellow] {escape(warning)}")
    shared.console().print(f"report: {report}   data: {out / 'comparison.json'}")


def _methods(text: str) -> list[str]:
    from vouch import registry

    chosen: list[str] = []
    for word in (word.strip() for word in text.split(",")):
        if word == "all" or word.startswith("all-"):
            room = word.removeprefix("all").removeprefix("-")
            chosen += [slug for slug, kind in registry.methods().items() if kind.card.area.endswith(room)]
        elif word:
            registry.method(word)
            chosen.append(word)
    return list(dict.fromkeys(chosen))


def _settings(texts: list[str], methods: list[str]) -> dict[str, list[str]]:
    """`sasrec.epochs=20` for one method; `epochs=20` for every method that has the setting."""
    from vouch import registry
    from vouch.errors import ConfigError, did_you_mean

    fixed: dict[str, list[str]] = {}
    for text in texts:
        key = text.partition("=")[0]
        slug, dot, _ = key.partition(".")
        if dot:
            registry.method(slug)
            fixed.setdefault(slug, []).append(text[len(slug) + 1 :])
            continue
        having = [slug for slug in methods if key in registry.method(slug).Config.model_fields]
        if not having:
            known = {field for slug in methods for field in registry.method(slug).Config.model_fields}
            raise ConfigError(f"no method here has a setting {key!r}", hint=did_you_mean(key, known))
        for slug in having:
            fixed.setdefault(slug, []).append(text)
    return fixed


def _command() -> str:
    return shlex.join(["vouch", *sys.argv[1:]])


def _progress() -> Callable[[str, int, int], None]:
    """A line for each finished piece of work, with the time it has taken so far."""
    import time

    begin = time.perf_counter()

    def show(text: str, done: int, total: int) -> None:
        shared.say(f"[{done:>3}/{total}] {time.perf_counter() - begin:6.1f} s  {text}")

    return show
