"""Checkpoints: safetensors for tensors, JSON for the rest; no pickle.

A checkpoint is a folder of two files: the tensors, and `checkpoint.json`, which names them and is put in place last by
a rename. Whoever reads sees the old checkpoint or the new one, at whatever moment the writer was killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vouch.errors import StorageError
from vouch.files import atomic_file, read_json

FORMAT = 1
HEADER = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk: the model's tensors, the optimizer's state, and the loop's own numbers.

    There is no random state: every epoch is seeded afresh from the run's seed and its own number.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]


def save_checkpoint(
    path: Path,
    model: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a checkpoint folder, or replace the one that is there; `progress` must hold its `epoch`.

    Raises:
        StorageError: it cannot be written (full disk, permissions); the previous one is left as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"model.{name}": value for name, value in model.items()}
    header: dict[str, Any] = {"format": FORMAT, "progress": dict(progress), "numbers": {}, "groups": []}
    if optimizer is not None:
        state = optimizer.state_dict()
        header["groups"] = [{key: _plain(value) for key, value in group.items()} for group in state["param_groups"]]
        for index, slots in state["state"].items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{slot}"] = value
                else:
                    header["numbers"][f"{index}.{slot}"] = value
    header["tensors"] = f"epoch-{progress['epoch']}.safetensors"
    # Tied parameters share memory, which the format refuses: each is copied and written in full.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    try:
        with atomic_file(path / header["tensors"]) as aside:
            save_file(copies, aside)
    except SafetensorError as error:  # how that library reports a full disk
        raise StorageError(
            f"the checkpoint cannot be written: {error}",
            where=str(path),
            hint="free some disk space and go on with --resume, or choose another --out",
        ) from error
    with atomic_file(path / HEADER) as aside:
        aside.write_text(json.dumps(header, allow_nan=False), encoding="utf-8")
    for other in path.iterdir():
        if other.name not in (HEADER, header["tensors"]):
            other.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        StorageError: it is missing, damaged, or was written by a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_json(path / HEADER)
    try:
        if header["format"] > FORMAT:
            raise StorageError(
                f"the checkpoint was written in format {header['format']}; this version reads up to {FORMAT}",
                where=str(path),
                hint="upgrade vouch, or train again without --resume",
            )
        model: dict[str, Tensor] = {}
        state: dict[int, dict[str, Any]] = {}
        for name, value in load_file(path / Path(header["tensors"]).name).items():
            part, _, rest = name.partition(".")
            if part == "model":
                model[rest] = value
            else:
                index, _, slot = rest.partition(".")
                state.setdefault(int(index), {})[slot] = value
        for name, number in header["numbers"].items():
            index, _, slot = name.partition(".")
            state.setdefault(int(index), {})[slot] = number
        groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in header["groups"]]
        return Checkpoint(model, {"state": state, "param_groups": groups}, dict(header["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"the checkpoint is damaged: {error}", where=str(path), hint="train again without --resume"
        ) from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
