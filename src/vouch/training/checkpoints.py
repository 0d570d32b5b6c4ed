"""Checkpoints: safetensors for tensors, JSON for the rest, each written aside and renamed; no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vouch.errors import StorageError
from vouch.files import atomic_directory, read_json, write_json

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk: model tensors, optimizer state, random state, and the loop's own numbers."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: Tensor
    progress: dict[str, Any]


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write a checkpoint folder. A reader sees the old one or the new one, never a part.

    Raises:
        StorageError: it cannot be written (full disk, permissions); the previous one is left as it was.
    """
    from safetensors.torch import save_file

    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
    numbers: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{slot}"] = value.detach().cpu().clone()
            else:
                numbers[f"{index}.{slot}"] = value
    header = {"format": FORMAT, "progress": dict(progress), "numbers": numbers, "groups": state["param_groups"]}
    with atomic_directory(path) as aside:
        # Tied parameters share memory, which safetensors refuses; each is written in full.
        save_file(
            {name: value.detach().cpu().clone() for name, value in model.state_dict().items()},
            aside / "model.safetensors",
        )
        save_file(tensors, aside / "training.safetensors")
        write_json(aside / "checkpoint.json", header)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        StorageError: it is missing, damaged, or was written by a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_json(path / "checkpoint.json")
    if header.get("format", 0) > FORMAT:
        raise StorageError(
            f"the checkpoint was written in format {header['format']}; this version reads up to {FORMAT}",
            where=str(path),
            hint="upgrade vouch, or train again without --resume",
        )
    try:
        model, tensors = load_file(path / "model.safetensors"), load_file(path / "training.safetensors")
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"the checkpoint is damaged: {error}", where=str(path), hint="train without --resume"
        ) from error
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = value
    for name, number in header["numbers"].items():
        index, slot = name.split(".", 1)
        state.setdefault(int(index), {})[slot] = number
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in header["groups"]]
    return Checkpoint(model, {"state": state, "param_groups": groups}, tensors["random"], header["progress"])
