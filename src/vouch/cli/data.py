"""`vouch data prepare` and `vouch data inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vouch.cli import shared


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Prepare and inspect interaction logs.", no_args_is_help=True)
    group.command(epilog="Example: vouch data prepare ratings.csv --min-value 4 --k-core 5 --out data/ratings")(prepare)
    group.command(epilog="Example: vouch data inspect ratings.csv")(inspect)
    app.add_typer(group, name="data")


def prepare(
    source: Annotated[str, typer.Argument(help="A file, a folder, the word 'world', or a name in $VOUCH_DATA.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
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
    """Read a log once, filter it, and keep it as a folder that opens at once, whatever its size."""
    from vouch.data.prepare import prepare as run

    chosen = shared.filters(k_core, min_value, duplicates, since, until)
    made = run(source, out, filters=chosen, format=format, columns=shared.parse_columns(columns), items=items)
    log = made.interactions
    found = {"out": str(out), "rows": len(log), "users": log.n_users, "items": log.n_items, "notes": dict(log.notes)}
    if as_json:
        shared.emit(found)
        return
    shared.console().print(f"{out}: {len(log):,} rows, {log.n_users:,} users, {log.n_items:,} items")
    for why, count in log.notes.get("dropped", {}).items():
        shared.console().print(f"  dropped by {why}: {count:,} rows")
    if "warning" in log.notes:
        shared.say(f"note: {log.notes['warning']}")


def inspect(
    source: Annotated[str, typer.Argument(help="A file, a folder, the word 'world', or a name in $VOUCH_DATA.")],
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
    """Count, measure and doubt a log: skew, gaps, duplicates, ties in time, and what is suspicious."""
    from vouch.data.inspect import inspect as look

    chosen = shared.filters(k_core, min_value, duplicates, since, until)
    found = look(shared.load_data(source, format, columns, items, chosen))
    if as_json:
        shared.emit(found.to_dict())
    else:
        shared.console().print(found.render())
