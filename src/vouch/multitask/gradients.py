"""Gradients of several losses of one forward pass, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vouch.errors import ConfigError, TrainingError

Losses = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
"""One scalar a task: named, in a list, or stacked `(T,)`."""


def named(losses: Losses) -> dict[str, Tensor]:
    """The losses by task name (`task 0`, `task 1`, ... where they have none).

    Raises:
        ConfigError: there is none, or one is not a scalar.
        TrainingError: one is not a finite number; the message names the task.
    """
    found = (
        dict(losses) if isinstance(losses, Mapping) else {f"task {number}": loss for number, loss in enumerate(losses)}
    )
    if not found:
        raise ConfigError("there are no losses to balance", hint="give one scalar for each task")
    for task, loss in found.items():
        if loss.ndim:
            raise ConfigError(f"the loss of {task!r} has the shape {tuple(loss.shape)}", hint="give its mean or sum")
    # one look at all of them: reading a number waits for the device
    finite = torch.isfinite(torch.stack([loss.detach().float() for loss in found.values()]))
    if not bool(finite.all()):
        task = list(found)[int((~finite).nonzero()[0, 0])]
        raise TrainingError(f"the loss of {task!r} is not a finite number", hint="lower the learning rate")
    return found


def of_each(losses: Sequence[Tensor], parameters: Sequence[Tensor], *, keep: bool = False) -> list[list[Tensor | None]]:
    """For each loss its gradients with respect to the parameters, None where a parameter has no part in it.

    One forward pass, one backward pass a task over the part of the graph that leads to `parameters`; the graph is
    freed with the last one unless `keep`.
    """
    found: list[list[Tensor | None]] = []
    for number, loss in enumerate(losses):
        retain = keep or number < len(losses) - 1
        if not loss.requires_grad:
            found.append([None] * len(parameters))
            continue
        found.append(list(torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)))
    return found


def reached(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[set[int]]:
    """For each parameter the numbers of the losses that it has a part in, read off the graph without a backward pass."""
    place = {id(parameter): at for at, parameter in enumerate(parameters)}
    found: list[set[int]] = [set() for _ in parameters]
    for number, loss in enumerate(losses):
        waiting, seen = [loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)  # where the graph ends in a parameter
            if variable is not None and id(variable) in place:
                found[place[id(variable)]].add(number)
            waiting.extend(each for each, _ in node.next_functions)
    return found


def shared_and_own(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that two losses or more reach, and those that one reaches; those that none reaches are left out."""
    tasks = reached(losses, parameters)
    shared = [p for p, found in zip(parameters, tasks, strict=True) if len(found) > 1]
    own = [p for p, found in zip(parameters, tasks, strict=True) if len(found) == 1]
    return shared, own
