"""Gradients of several losses of one forward pass, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

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
    finite(found)
    return found


def finite(losses: Mapping[str, Tensor]) -> tuple[Tensor, list[float]]:
    """The losses stacked `(T,)`, with their graph, and as numbers, by one look at the device, which waits for it.

    Raises:
        ConfigError: one is not a scalar.
        TrainingError: one is not a finite number; the message names the task.
    """
    stacked = torch.stack(list(losses.values())) if len({loss.shape for loss in losses.values()}) == 1 else None
    if stacked is None or stacked.ndim > 1:
        task, shape = next((task, tuple(loss.shape)) for task, loss in losses.items() if loss.ndim)
        raise ConfigError(f"the loss of {task!r} has the shape {shape}", hint="give its mean or sum")
    found: list[float] = stacked.tolist()
    if not all(map(isfinite, found)):
        task = next(task for task, value in zip(losses, found, strict=True) if not isfinite(value))
        raise TrainingError(f"the loss of {task!r} is not a finite number", hint="lower the learning rate")
    return stacked, found


def of_each(
    losses: Sequence[Tensor], parameters: Sequence[Tensor | GradientEdge], *, keep: bool = False
) -> list[list[Tensor | None]]:
    """For each loss its gradients with respect to the parameters, None where a parameter has no part in it.

    One forward pass, one backward pass a task over the part of the graph that leads to `parameters`; the graph is
    freed with the last one unless `keep`.
    """
    found: list[list[Tensor | None]] = []
    inputs = cast(Sequence[Tensor], parameters)  # tensors and edges may be mixed, which its types do not say
    for number, loss in enumerate(losses):
        retain = keep or number < len(losses) - 1
        if not loss.requires_grad:
            found.append([None] * len(parameters))
            continue
        found.append(list(torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True)))
    return found


class Lookup(NamedTuple):
    """All rows of a table that a forward pass looked up, `L` of them; a row that comes often is kept at its last place."""

    edges: list[GradientEdge]
    """Where the rows enter the rest of the graph."""
    rows: Tensor
    """`(L,)`: which row of the table."""
    places: list[Tensor]
    """By edge, where the gradients are kept; L where they are dropped, as those of padding are."""
    width: int

    def fold(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """Gradients of the rows as they entered the graph, by edge, to `(L, D)`, each of the table's rows at one place."""
        if all(g is None for g in gradients):
            return None
        first = next(g for g in gradients if g is not None)
        kept = first.new_zeros(len(self.rows) + 1, self.width)
        for place, g in zip(self.places, gradients, strict=True):
            if g is not None:
                kept.index_add_(0, place, g.reshape(len(place), self.width))
        return kept[:-1]


def lookups(losses: Sequence[Tensor], parameters: Mapping[int, Tensor]) -> dict[int, Lookup | None]:
    """The tables among the parameters, which `nn.Embedding` looks rows up in and nothing else uses, and what was looked up.

    None where that is half of the rows or more: then a gradient as large as the table costs no more.
    """
    leaves = {get_gradient_edge(p).node: at for at, p in parameters.items() if p.ndim == 2 and not p._backward_hooks}
    users: dict[int, list[Any]] = {}
    waiting, seen = [loss.grad_fn for loss in losses if loss.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for child, _ in node.next_functions:
            if child in leaves:
                users.setdefault(leaves[child], []).append(node)
            elif child is not None:
                waiting.append(child)
    found: dict[int, Lookup | None] = {}
    for at, nodes in users.items():
        if any(node.name() != "EmbeddingBackward0" or node._saved_sparse for node in nodes):
            continue
        if any(node._saved_scale_grad_by_freq for node in nodes):
            continue
        parts = [_indices(node).flatten() for node in nodes]
        rows, (height, width) = torch.cat(parts), parameters[at].shape
        if 2 * len(rows) >= height:
            found[at] = None
            continue
        # the last place where a row occurs stands for all of them: no sorting, and no look at the device
        slot = torch.empty(height, dtype=torch.long, device=rows.device)
        slot.scatter_reduce_(0, rows, torch.arange(len(rows), device=rows.device), "amax", include_self=False)
        places = []
        for node, part in zip(nodes, parts, strict=True):
            place, padding = slot[part], node._saved_padding_idx
            # where there is no padding it is -1, read as a huge number
            places.append(place.masked_fill_(part == padding, len(rows)) if 0 <= padding < height else place)
        found[at] = Lookup([GradientEdge(node, 0) for node in nodes], rows, places, width)
    return found


def _indices(node: Any) -> Tensor:
    found: Tensor = node._saved_indices
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
