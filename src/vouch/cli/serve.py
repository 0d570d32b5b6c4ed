"""`vouch serve` and `vouch keys`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vouch.cli import shared
from vouch.errors import ConfigError, StorageError, UnknownIdError, VouchError

if TYPE_CHECKING:
    from vouch.service.config import ServiceConfig
    from vouch.service.storage import Store

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]
Database = Annotated[
    str | None,
    typer.Option(
        "--database", help="sqlite:///PATH or postgresql://USER:SECRET@HOST/NAME; else service.db beside RUN."
    ),
]

keys = typer.Typer(help="API keys of the service: add, list, remove.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: vouch serve runs/best --port 8000")(serve)
    app.add_typer(keys, name="keys")


def serve(
    run: RunFolder,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", help="Port to listen on (8000).")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes that answer (1).")] = None,
    database: Database = None,
    api_keys: Annotated[
        str | None, typer.Option("--keys", help="required, off, or auto: asked for unless on 127.0.0.1.")
    ] = None,
    index: Annotated[str | None, typer.Option("--index", help="auto, exact, hnsw or ivf.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="First measure it on the test part, for the run card; kept beside RUN.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A limit of the service: key=value. Repeat for more.")
    ] = None,
) -> None:
    """Serve a run over HTTP: recommendations, reasons, events, catalogue, run card."""
    config = _config(
        run, settings, host=host, port=port, workers=workers, database=database, keys=api_keys, index=index
    )
    from vouch.service.server import serve as run_server

    _need_run(config)
    if config.needs_keys and not _has_keys(config):
        shared.say(f"note: there are no API keys yet; make one with: vouch keys add {run} NAME --role admin")
    if not config.needs_keys and not config.is_local:
        shared.say("note: everyone who reaches this address may do everything: no keys are asked for")
    run_server(config, measure=measure, tell=shared.say)


@keys.command("add", epilog="Example: vouch keys add runs/best shop-frontend --role read")
def add_key(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    role: Annotated[str, typer.Option("--role", help="read, write or admin.")] = "read",
    database: Database = None,
) -> None:
    """Make a key. It is printed this once."""
    import time

    from vouch.service.security import ROLES, new_key

    if role not in ROLES:
        raise ConfigError(f"there is no role {role!r}", hint="use read, write or admin")
    if not name or len(name) > 64 or not name.isprintable():
        raise ConfigError("the name of a key has 1 to 64 printable characters")
    config = _config(run, None, database=database)
    _need_run(config)
    with _open(config) as store:
        key, row = new_key(name, role, time.time())
        store.add_key(row)
    typer.echo(key)


@keys.command("list", epilog="Example: vouch keys list runs/best")
def list_keys(run: RunFolder, database: Database = None, as_json: shared.Json = False) -> None:
    """List the keys, without their secrets."""
    with _open(_config(run, None, database=database)) as store:
        rows = [{"id": key.id, "name": key.name, "role": key.role, "created": key.created} for key in store.list_keys()]
    if as_json:
        shared.emit(rows)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    if not rows:
        shared.say(f"there are no keys yet; make one with: vouch keys add {run} NAME")
        return
    for column in ("id", "name", "role", "made"):
        table.add_column(column)
    for row in rows:
        made = datetime.fromtimestamp(row["created"], UTC).strftime("%Y-%m-%d")
        table.add_row(str(row["id"]), escape(str(row["name"])), str(row["role"]), made)
    shared.console().print(table)


@keys.command("remove", epilog="Example: vouch keys remove runs/best 7c1e0b52")
def remove_key(
    run: RunFolder,
    id: Annotated[str, typer.Argument(help="The id of the key; see the list.")],
    database: Database = None,
) -> None:
    """Take a key away. It stops working within seconds."""
    with _open(_config(run, None, database=database)) as store:
        if not store.remove_key(id):
            raise UnknownIdError(f"there is no key {id!r}", hint=f"vouch keys list {run}")
    shared.say("removed")


def _config(run: Path, settings: list[str] | None, **given: Any) -> ServiceConfig:
    _need_service()
    from vouch.service.config import ServiceConfig

    parsed = ServiceConfig.parse(settings or [])  # refuses unknown names and values that do not fit
    chosen = {name: getattr(parsed, name) for name in parsed.model_fields_set}
    return ServiceConfig.from_environment(
        **{**chosen, **{name: value for name, value in given.items() if value is not None}, "run": run}
    )


def _need_run(config: ServiceConfig) -> None:
    """Refuse a folder without a run before a database is made beside it; one that is named need not lie beside any."""
    from vouch.recommenders.runs import is_run

    if not config.database and not is_run(config.run):
        hint = "vouch train METHOD --data SOURCE --out RUN makes one"
        raise StorageError(f"there is no run in {str(config.run)!r}", hint=hint)


def _need_service() -> None:
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "httptools", "sqlalchemy", "alembic", "prometheus_client")
    if any(find_spec(name) is None for name in needed):
        raise VouchError("the service is not installed", hint='pip install "vouch[service]"')


def _open(config: ServiceConfig) -> Any:
    import contextlib

    from vouch.service.storage import Store

    return contextlib.closing(Store.open(config.database_url, wait_seconds=config.database_seconds))


def _has_keys(config: ServiceConfig) -> bool:
    with _open(config) as opened:
        store: Store = opened
        return bool(store.list_keys())
