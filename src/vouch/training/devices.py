"""Devices, processes, precision and seeds, on Lightning Fabric."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from vouch.errors import ConfigError
from vouch.training.run import Run


def make_fabric(run: Run) -> Any:
    """A launched Fabric for `run`: one process, or the processes that `torchrun` started (gloo on CPU, nccl on GPU).

    Raises:
        ConfigError: the device or the precision is unknown or not there.
    """
    from lightning_fabric import Fabric

    accelerator, index = parse_device(run.device)
    if run.precision not in ("auto", "32", "bf16"):
        raise ConfigError(f"precision is {run.precision!r}", hint="use auto, 32 or bf16")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator=accelerator,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else ([index] if index is not None else 1),
        num_nodes=max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world))),
        strategy="ddp" if world > 1 else "auto",
        precision="bf16-mixed" if use_bf16(run.precision, accelerator) else "32-true",
    )
    fabric.launch()
    return fabric


def parse_device(name: str) -> tuple[str, int | None]:
    """The Fabric accelerator and the index of a device name.

    Raises:
        ConfigError: the name is unknown, or the device is not there.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise ConfigError(f"there is no device {name!r}", hint="use auto, cpu, cuda, cuda:1 or mps")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} is not there: {torch.cuda.device_count()} GPUs found", hint="use --device cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not there", hint="use --device cpu")
    return kind, int(number) if number and kind == "cuda" else None


def use_bf16(precision: str, accelerator: str) -> bool:
    """Whether to train in bfloat16 with float32 master weights.

    `auto` says yes on a GPU with bfloat16 units. On a CPU it says no even where there are matrix units: at the sizes
    of these models (hidden size 64 to 256) the casts cost more than the products save; ask for `bf16` to decide
    otherwise. The large catalogue-sized products of the losses are the exception and choose for themselves.
    """
    if precision == "auto":
        return accelerator == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and give the outer random state back afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
