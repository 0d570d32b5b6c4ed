"""`vouch export` and `vouch score`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vouch.cli import shared

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]
TELL_EVERY = 5.0
"""Seconds between two lines of progress."""


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: vouch export runs/best --format onnx --out best-onnx")(export)
    app.command(epilog="Example: vouch score runs/best --users all -k 100 --out recs.parquet")(score)


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    format: Annotated[
        str, typer.Option("--format", help="vectors, or onnx: vectors and the query network.")
    ] = "vectors",
    as_json: shared.Json = False,
) -> None:
    """Write item vectors with their ids, and the query network as ONNX: a model that is used without the library."""
    from vouch.service.export import export as write

    about = write(run, out, format)  # type: ignore[arg-type]
    if as_json:
        shared.emit({"out": str(out), **about})
        return
    shared.console().print(f"{about['items']:,} item vectors of size {about['size']} in {out}", markup=False)
    if "onnx" in about:
        inputs = ", ".join(f"{name} {value['shape']}" for name, value in about["onnx"]["inputs"].items())
        checked = about["onnx"]["largest_difference"]
        how = "not checked: pip install onnxruntime" if checked is None else f"within {checked:.0e} of the model"
        shared.console().print(f"query.onnx takes {inputs}, {how}; about.json says how to use it", markup=False)


def score(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet file to write.")],
    users: Annotated[str, typer.Option("--users", help="all, or a file with one user id a line.")] = "all",
    k: Annotated[int, typer.Option("-k", help="Items for each user.", min=1)] = 100,
    repeat: Annotated[bool, typer.Option("--repeat", help="Items of the history may be recommended again.")] = False,
    index: Annotated[str, typer.Option("--index", help="auto, exact, hnsw or ivf.")] = "auto",
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster to run on (or: local).")] = None,
    as_json: shared.Json = False,
) -> None:
    """Write the best items of every user as Parquet: user, rank, item, score, fallback."""
    from vouch.service.offline import score as write

    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > TELL_EVERY:
            last = time.monotonic()
            shared.say(f"{done:,} of {total:,} users")

    chosen = None if users == "all" else Path(users)
    found = write(run, out, users=chosen, k=k, repeat=repeat, index=index, ray=ray, tell=tell)  # type: ignore[arg-type]
    if as_json:
        shared.emit(
            {
                "out": str(out),
                "users": found.users,
                "rows": found.rows,
                "fallback": found.fallback,
                "seconds": found.seconds,
            }
        )
        return
    shared.console().print(f"{found.users:,} users, {found.rows:,} rows in {out} ({found.seconds:.1f} s)", markup=False)
    if found.fallback:
        shared.say(f"note: {found.fallback:,} users have no history, so theirs are the most popular items")
