"""What the commands share: options, printing, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vouch.errors import ConfigError, VouchError

if TYPE_CHECKING:
    from vouch.data import Dataset

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Source = Annotated[
    str, typer.Option("--data", "-d", help="A file, a folder, the word 'world', or a name in $VOUCH_DATA.")
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="csv, parquet, jsonl, recbole, movielens-100k, movielens-1m, sequence, session."),
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Unusual column names: user=uid,item=sku,time=ts,value=stars.")
]
Items = Annotated[str | None, typer.Option("--items", help="A table of items (CSV, Parquet, JSON lines).")]
KCore = Annotated[int, typer.Option("--k-core", help="Fewest rows a user and an item need.", min=0)]
MinValue = Annotated[float | None, typer.Option("--min-value", help="Least rating that counts as positive.")]
Duplicates = Annotated[str, typer.Option("--duplicates", help="Rows kept of one user and item: all, first, last.")]
Since = Annotated[str | None, typer.Option("--since", help="First moment kept: 2024-01-31 or unix seconds.")]
Until = Annotated[str | None, typer.Option("--until", help="First moment no longer kept.")]
SplitBy = Annotated[str, typer.Option("--split", help="leave-one-out, temporal, ratio or session.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method: key=value. Repeat for more.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, 32 or bf16.")]


def complain(error: VouchError) -> None:
    """Print one message on standard error."""
    from rich.console import Console
    from rich.text import Text

    text = Text("error: ", style="bold red") + Text(error.what, style="bold")
    if error.where:
        text += Text(f"\n  where: {error.where}")
    if error.hint:
        text += Text(f"\n  try:   {error.hint}", style="cyan")
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def console() -> Any:
    """Where results for people go."""
    from rich.console import Console

    return Console(highlight=False)


def say(text: str) -> None:
    """Tell what is going on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """Print JSON on standard output; numbers that JSON lacks become null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def parse_columns(text: str | None) -> dict[str, str] | None:
    """`user=uid,item=sku` as a mapping.

    Raises:
        ConfigError: a part has no `=`.
    """
    if text is None:
        return None
    mapping = {}
    for part in text.split(","):
        role, equals, name = part.partition("=")
        if not equals or not name:
            raise ConfigError(f"--columns has {part!r}, which is not ROLE=NAME", hint="for example user=uid,item=sku")
        mapping[role.strip()] = name.strip()
    return mapping


def filters(k_core: int, min_value: float | None, duplicates: str, since: str | None, until: str | None) -> Any:
    """The filters that the options ask for."""
    from vouch.data.filters import Filters

    return Filters(
        k_core_user=k_core,
        k_core_item=k_core,
        min_value=min_value,
        duplicates=duplicates,  # type: ignore[arg-type]
        since=since,
        until=until,
    )


def load_data(
    source: str,
    format: str | None,
    columns: str | None,
    items: str | None,
    chosen: Any,
) -> Dataset:
    """Read a source and filter it."""
    from vouch.data.filters import apply
    from vouch.data.readers import read

    return apply(read(source, format=format, columns=parse_columns(columns), items=items), chosen)


def is_prepared(source: str) -> bool:
    """Whether a source is a prepared folder, which opens as it is."""
    return (Path(source) / "dataset.json").exists()
