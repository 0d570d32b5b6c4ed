"""A stream's state as named tensors and plain numbers, so that it can go on in another process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vouch.distillation.memory import GrowingHead
from vouch.distillation.streamtask import Task
from vouch.errors import ConfigError, StorageError
from vouch.training.checkpoints import load_checkpoint

if TYPE_CHECKING:
    from vouch.distillation.apistream import APIStream

FREE = ("iterations", "save_every", "collapse", "collapse_patience")
"""Settings that may differ when a stream goes on."""


def pack(stream: APIStream) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the rest as plain JSON."""
    tensors = _parts("features", stream.features) | _parts("head", stream.head)
    for number, (inputs, answers) in enumerate(stream.memory):
        tensors |= {f"memory.{number}.inputs": inputs, f"memory.{number}.answers": answers}
    stream.saves += 1
    progress: dict[str, Any] = {
        "epoch": stream.saves,  # it names the file, so that each state has its own, also within a round
        "rounds": stream.rounds,
        "ledger": stream.ledger.rows,
        "config": stream.config.model_dump(mode="json"),
        "names": [[stream.head.classes[stream.head.owner[c]] for c in group] for group in stream.head.groups],
        "apis": stream.apis,
        "stopped": stream.stopped,
        "matrices": stream.matrices,
        "memories": len(stream.memory),
        "task": None,
    }
    task = stream.task
    if task is not None:
        progress["task"] = {
            "name": task.name,
            "step": task.step,
            "planned": task.planned,
            "low": task.low,
            "old": task.old is not None,
        }
        tensors |= _parts("generators", task.generators)
        tensors |= {} if task.old is None else _parts("old", task.old)
        tensors |= _slots("own", task.own_optimizer) | _slots("theirs", task.generator_optimizer)
        tensors |= {"raw.inputs": task.raw, "raw.answers": task.raw_answers}
        kept = task.reservoir
        tensors |= {"kept.inputs": kept.inputs, "kept.answers": kept.answers, "kept.keys": kept.keys}
    return tensors, progress


def unpack(stream: APIStream, path: Path) -> None:
    """Put a saved state into a stream of the same making; on an error the stream is as it was, its weights perhaps not.

    Raises:
        StorageError: there is none, it is damaged, or of another network. ConfigError: it had other settings.
    """
    found = load_checkpoint(path)
    progress, tensors = found.progress, {n: t.to(stream.device) for n, t in found.model.items()}
    try:
        now = stream.config.model_dump(mode="json")
        changed = [name for name in now if name not in FREE and progress["config"].get(name) != now[name]]
        if changed:
            raise ConfigError(
                f"the stream was saved with {changed[0]} {progress['config'].get(changed[0])!r}, not {now[changed[0]]!r}",
                where=str(path),
                hint="use the same settings",
            )
        head = GrowingHead(stream.head.width, share=stream.head.share)
        for names in progress["names"]:
            head.grow(names)
        head.load_state_dict(_under("head", tensors))
        stream.features.load_state_dict(_under("features", tensors))
        stream.head = head.to(stream.device)
        stream.memory = [
            (tensors[f"memory.{number}.inputs"], tensors[f"memory.{number}.answers"])
            for number in range(progress["memories"])
        ]
        stream.apis, stream.stopped, stream.matrices = progress["apis"], progress["stopped"], progress["matrices"]
        stream.rounds, stream.saves, stream.task = progress["rounds"], progress["epoch"], None
        stream.ledger.at_least(progress["ledger"])
        if progress["task"] is not None:
            stream.task = _unpack_task(stream, progress["task"], tensors)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the saved stream does not fit this one: {error}", where=str(path)) from error


def _unpack_task(stream: APIStream, saved: dict[str, Any], tensors: dict[str, Tensor]) -> Task:
    old = None
    if saved["old"]:
        old = copy.deepcopy(stream.features)
        old.load_state_dict(_under("old", tensors))
    task = Task(stream, saved["name"], stream.head.groups[-1], tensors["raw.inputs"], old)
    task.generators.load_state_dict(_under("generators", tensors))
    _fill(task.own_optimizer, _under("own", tensors))
    if task.generator_optimizer is not None:
        _fill(task.generator_optimizer, _under("theirs", tensors))
    task.raw_answers = tensors["raw.answers"]
    kept = task.reservoir
    kept.inputs, kept.answers, kept.keys = (tensors[f"kept.{name}"] for name in ("inputs", "answers", "keys"))
    task.step, task.planned, task.low = saved["step"], saved["planned"], saved["low"]
    return task


def _parts(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def _slots(prefix: str, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{slot}": value
        for index, slots in state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def _fill(optimizer: torch.optim.Optimizer, slots: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in slots.items():
        index, _, slot = name.partition(".")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
