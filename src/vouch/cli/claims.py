"""`vouch systems` and `vouch claims list|run|show`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vouch.cli import shared

VERDICT_STYLE = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: vouch systems --baselines")(systems)
    group = typer.Typer(help="Run published claims and read the ledger of results.", no_args_is_help=True)
    group.command("list", epilog="Example: vouch claims list --json")(list_entries)
    group.command("run", epilog="Example: vouch claims run apr --scale smoke")(run)
    group.command("show", epilog="Example: vouch claims show apr")(show)
    app.add_typer(group, name="claims")


def systems(
    slug: Annotated[str | None, typer.Argument(help="Show one method with its settings.")] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="List the baselines instead.")] = False,
    as_json: shared.Json = False,
) -> None:
    """List the 46 systems and how far each has come; or show one method's settings."""
    from vouch.claims import claims, read_ledger
    from vouch.systems import baseline_rows, status_rows

    if slug is not None:
        _settings(slug, as_json)
        return
    entries = read_ledger()
    rows = baseline_rows() if baselines else status_rows()
    for row in rows:
        row["claims"] = [entry.to_dict() for entry in entries if entry.slug == row["slug"]]
    if as_json:
        shared.emit(rows)
        return
    from rich.table import Table

    table = Table()
    for name in ("slug", "name", "room", "status", "claims", "what it is"):
        table.add_column(name, no_wrap=name in ("slug", "status"))
    for row in rows:
        latest = {(entry["variant"]): entry["verdict"] for entry in row["claims"]}
        text = ", ".join(f"{variant}: {verdict}" for variant, verdict in latest.items())
        if not text and claims(row["slug"]):
            text = "not run yet"
        style = None if row["status"] == "works" else "dim"
        table.add_row(row["slug"], row["name"], row["area"], row["status"], text, row["summary"], style=style)
    shared.console().print(table)
    if not baselines:
        works = sum(row["status"] == "works" for row in rows)
        shared.console().print(
            f"{works} of {len(rows)} work; {len(baseline_rows())} baselines: vouch systems --baselines"
        )


def _settings(slug: str, as_json: bool) -> None:
    from vouch import registry
    from vouch.config import Choice
    from vouch.errors import UnknownIdError, did_you_mean
    from vouch.systems import SYSTEMS, module_of, settings_of

    methods, modules = registry.methods(), {each.slug: module_of(each) for each in SYSTEMS}
    technique = next((each for each in SYSTEMS if each.slug == slug and modules[slug] and slug not in methods), None)
    if technique is not None:
        module = modules[slug] or ""
        config = settings_of(module)
        name, area, papers, summary = technique.name, technique.area, technique.papers, technique.summary
    else:
        if slug not in methods:
            known = {*methods, *(each for each, module in modules.items() if module)}
            hint = "it is not built yet" if slug in modules else did_you_mean(slug, known)
            raise UnknownIdError(f"there is no method {slug!r}", hint=hint)
        kind = methods[slug]
        card, config, module = kind.card, kind.Config, kind.__module__
        name, area, summary = card.name, card.area, card.summary
        papers = (card.paper,) if card.paper else ()
    rows: list[dict[str, Any]] = []
    for row in config.rows() if config else []:
        tuned = ""
        if row.search is not None:
            tuned = (
                ", ".join(map(str, row.search.values))
                if isinstance(row.search, Choice)
                else f"{row.search.low} to {row.search.high}"
            )
        rows.append(
            {
                "name": row.name,
                "type": row.type,
                "default": row.default,
                "description": row.description,
                "tuned_over": tuned,
            }
        )
    if as_json:
        found = {"slug": slug, "name": name, "area": area, "paper": papers[0] if papers else None}
        shared.emit({**found, "summary": summary, "module": module, "settings": rows})
        return
    from rich.markup import escape
    from rich.table import Table

    paper = f" (arXiv {', '.join(papers)})" if papers else ""
    table = Table(title=f"{name}{paper}: {summary}")
    for column in ("setting", "default", "what it does", "tuned over"):
        table.add_column(column)
    for row_ in rows:
        table.add_row(
            row_["name"], escape(str(row_["default"])), escape(row_["description"]), escape(row_["tuned_over"])
        )
    if rows:
        shared.console().print(table)
    else:
        shared.console().print(f"{name}{paper}: {summary}")
    if technique is not None:
        shared.console().print(f"for any PyTorch network: import {module}; how is on its page, systems/{slug}")


def list_entries(
    slug: Annotated[str | None, typer.Argument(help="Only of one system.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Earlier runs of a claim too, not only its newest.")] = False,
    ledger: Annotated[Path | None, typer.Option("--ledger", help="Another ledger file.")] = None,
    as_json: shared.Json = False,
) -> None:
    """List the ledger: the newest run of each claim, with effect, interval and verdict."""
    from vouch.claims import claims, read_ledger
    from vouch.claims.ledger import newest

    found = [entry for entry in read_ledger(ledger) if slug in (None, entry.slug)]
    entries = found if every else newest(found)
    if as_json:
        shared.emit([entry.to_dict() for entry in entries])
        return
    from rich.table import Table

    table = Table()
    for name in ("claim", "scale", "data", "baseline", "method", "effect [95 % interval]", "verdict"):
        table.add_column(name, justify="right" if name in ("baseline", "method") else "left", overflow="fold")
    for entry in entries:
        style, (low, high) = VERDICT_STYLE.get(entry.verdict, "bold"), entry.interval
        table.add_row(
            f"{entry.slug} {entry.variant}",
            entry.scale,
            entry.data,
            f"{entry.baseline:.4f}",
            f"{entry.method:.4f}",
            f"{entry.effect:+.4f} \\[{low:+.4f}, {high:+.4f}]",
            f"[{style}]{entry.verdict}[/{style}]",
        )
    shared.console().print(table)
    if len(entries) < len(found):
        shared.console().print(f"{len(found) - len(entries)} earlier runs: vouch claims list --all")
    ran = {(entry.slug, entry.variant) for entry in entries}
    waiting = [f"{found.slug} ({found.variant})" for found in claims(slug) if (found.slug, found.variant) not in ran]
    if waiting:
        shared.console().print("not run yet: " + ", ".join(waiting))


def run(
    slug: Annotated[str, typer.Argument(help="The system.")],
    scale: Annotated[
        str, typer.Option("--scale", help="smoke (seconds), desk (within 30 minutes on two cores), full (paper-sized).")
    ] = "smoke",
    variant: Annotated[str | None, typer.Option("--variant", help="Which of its claims; 'all' for every one.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="How many; 2 at smoke, 5 otherwise.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Run it on other data.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where finished seeds are kept.")] = Path("runs/claims"),
    ledger: Annotated[Path | None, typer.Option("--ledger", help="The file to append to.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Processes; as many as cores by default.", min=1)
    ] = None,
    as_json: shared.Json = False,
) -> None:
    """Run a claim over several seeds, and write effect, interval and verdict to the ledger."""
    from vouch.claims import claim, claims, run_claim

    claim(slug)
    chosen = [found.variant for found in claims(slug)] if variant == "all" else [claim(slug, variant).variant]
    entries = []
    begin = time.perf_counter()

    def progress(text: str, done: int, total: int) -> None:
        shared.say(f"[{done}/{total}] {time.perf_counter() - begin:6.1f} s  {text}")

    for name in chosen:
        words = ["vouch", "claims", "run", slug, "--scale", scale, "--variant", name]
        words += ["--seeds", str(seeds)] if seeds is not None else []
        words += ["--data", data] if data is not None else []
        entry = run_claim(
            slug, scale, seeds=seeds, variant=name, data=data, out=out, ledger=ledger, jobs=jobs,  # type: ignore[arg-type]
            command=shlex.join(words), on_progress=progress,
        )  # fmt: skip
        entries.append(entry)
        if not as_json:
            _print(entry)
    if as_json:
        shared.emit([entry.to_dict() for entry in entries])
    sys.stdout.flush()


def show(
    slug: Annotated[str, typer.Argument(help="The system.")],
    ledger: Annotated[Path | None, typer.Option("--ledger", help="Another ledger file.")] = None,
    as_json: shared.Json = False,
) -> None:
    """Show a system's claims: what the paper says, what we found, and how to run it."""
    from vouch.claims import claim, claims, read_ledger
    from vouch.claims.ledger import newest

    claim(slug)
    entries = [entry for entry in read_ledger(ledger) if entry.slug == slug]
    if as_json:
        shared.emit([entry.to_dict() for entry in entries])
        return
    for found in claims(slug):
        ran = [entry for entry in entries if entry.variant == found.variant]
        if ran:
            for entry in ran:
                _print(entry, superseded=entry not in newest(ran))
        else:
            how = f"vouch claims run {slug} --variant {found.variant} --scale desk"
            out = shared.console()
            out.print(f"\n[bold]{slug} ({found.variant})[/bold]: {found.statement}")
            out.print(f"  paper: {found.reported}\n  not run yet: {how}")


def _print(entry: Any, *, superseded: bool = False) -> None:
    from rich.markup import escape

    out = shared.console()
    style = VERDICT_STYLE.get(entry.verdict, "bold")
    later = ", superseded by a later run" if superseded else ""
    out.print(
        f"\n[bold]{entry.slug} ({entry.variant})[/bold], {entry.scale}: [{style}]{entry.verdict}[/{style}]{later}"
    )
    out.print(escape(f"  {entry.statement}"))
    out.print(escape(f"  paper:  {entry.reported}"))
    out.print(escape(
        f"  here:   {entry.metric}: {entry.baseline_name} {entry.baseline:.4f}, {entry.method_name} {entry.method:.4f}; "
        f"effect ({entry.effect_is}) {entry.effect:+.4f} [{entry.interval[0]:+.4f}, {entry.interval[1]:+.4f}]"
    ))  # fmt: skip
    short = [
        f"{name} in {n} of {len(entry.seeds)} seeds"
        for name, n in (
            (entry.baseline_name, entry.cut_short("baseline")),
            (entry.method_name, entry.cut_short("method")),
        )
        if n
    ]
    if short:
        out.print(
            escape(f"  note:   the epochs ran out before the patience did: {', '.join(short)}; more might change this")
        )
    out.print(
        escape(
            f"  how:    {entry.command}; {entry.data}, seeds {entry.seeds[0]} to {entry.seeds[-1]}, commit {entry.commit}"
        )
    )
