"""`vouch merge`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vouch.cli import shared


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Example: vouch merge --base base.safetensors --models a.safetensors,b.safetensors --method ties "
        "--out merged.safetensors"
    )(merge)


def merge(
    models: Annotated[
        str,
        typer.Option("--models", "-m", help="By commas: safetensors files, their .index.json, or run folders."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .safetensors file; for runs also a folder, which is then a run.")
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="average; with --base: task-arithmetic, ties; with --network and --data: fisher, regmean; with all "
            "three: adamerging, adamerging++.",
        ),
    ] = "average",
    base: Annotated[str | None, typer.Option("--base", "-b", help="What the models were fine-tuned from.")] = None,
    settings: shared.Settings = None,
    network: Annotated[
        str | None,
        typer.Option(
            "--network",
            help="module:name of a torch network, or of what makes one without arguments. It is found from the current "
            "folder, has the models' tensor names, and gives logits (B, C).",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Unlabelled inputs of each model's task, by commas, in the models' order: an .npz with an array "
            "'inputs', or a folder of pictures (in [0, 1], as (n, C, H, W)).",
        ),
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Resize pictures to this many pixels.", min=1)] = None,
    grey: Annotated[bool, typer.Option("--grey", help="Make pictures grey.")] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="Tensors not merged, such as 'head.*': each model keeps its own. Repeatable."),
    ] = None,
    max_distance: Annotated[
        float, typer.Option("--max-distance", help="Refuse models further from the base, by its length; 0 allows all.")
    ] = 1.0,
    device: shared.Device = "auto",
    as_json: shared.Json = False,
) -> None:
    """Merge fine-tuned models of one architecture into one, without their training data."""
    from vouch.errors import ConfigError
    from vouch.merging.merge import METHODS, inputs_of, network_of
    from vouch.merging.merge import merge as merged
    from vouch.training.devices import parse_device

    begin = time.perf_counter()
    kind, index = parse_device(device)
    listed = [name.strip() for name in models.split(",") if name.strip()]
    if not listed:
        raise ConfigError("--models names no model", hint="for example --models a.safetensors,b.safetensors")
    needed = method in METHODS and METHODS[method].inputs
    if not needed and (network or data) and method in METHODS:
        shared.say(f"note: {method} needs neither --network nor --data")
    module = network_of(network).to(kind if index is None else f"{kind}:{index}") if network and needed else None
    sources = [name.strip() for name in (data or "").split(",") if name.strip()] if needed else []
    record = merged(
        method,
        listed,
        out,
        base=base,
        network=module,
        inputs=[inputs_of(source, size, grey=grey) for source in sources],
        settings=settings or [],
        exclude=exclude or [],
        max_distance=max_distance or None,
    )
    seconds = time.perf_counter() - begin
    if as_json:
        shared.emit({"out": str(out), "seconds": seconds, **record})
        return
    names = ", ".join(record["models"])
    shared.console().print(f"merged {names} by {record['method']} into {out} ({seconds:.1f} s)", soft_wrap=True)
    coefficients = record["settings"].get("coefficients")
    if coefficients is not None:
        rows = coefficients if isinstance(coefficients[0], list) else [coefficients]
        means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        told = ", ".join(f"{who} {mean:.2f}" for who, mean in zip(record["models"], means, strict=True))
        shared.console().print(f"coefficients, mean over the tensors: {told}")
