"""Gradients of several losses of one forward pass, task by task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from vouch.errors import ConfigError, TrainingError

MaybeLosses = Mapping[str, Tensor | None] | Sequence[Tensor | None] | Tensor
"""One scalar a task: named, in a list, or stacked `(T,)`. None, or a name left out, where a batch has no label of a task."""


def task_names(tasks: int | Sequence[str]) -> list[str]:
    """The names of tasks, or `task 0`, `task 1`, ... of a number of them.

    Raises:
        ConfigError: there is none, a name comes twice, or it is one text.
    """
    if isinstance(tasks, str):
        raise ConfigError(f"tasks is the text {tasks!r}", hint=f"give a list: tasks=[{tasks!r}, ...]")
    names = [f"task {k}" for k in range(tasks)] if isinstance(tasks, int) else list(tasks)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"tasks is {tasks!r}", hint="give the names of the tasks, or how many there are")
    return names


def by_name(losses: MaybeLosses, known: Collection[str]) -> dict[str, Tensor | None]:
    """The losses by task, those that are None too; unnamed ones take the names of `known` in order, `task 0`, ... if empty.

    Raises:
        ConfigError: they are not one scalar a task, not as many as tasks, or one is of an unknown task.
    """
    if isinstance(losses, Mapping):
        if known and not losses.keys() <= set(known):
            raise ConfigError(
                f"there is no task {next(task for task in losses if task not in known)!r}",
                hint=f"the tasks are: {', '.join(known)}; name all of them in the first call or in `tasks`",
            )
        return dict(losses)
    if isinstance(losses, Tensor) and losses.ndim != 1:
        raise ConfigError(f"the losses have the shape {tuple(losses.shape)}", hint="stack one scalar a task")
    values = list(losses)
    if known and len(values) != len(known):
        raise ConfigError(f"{len(values)} losses for {len(known)} tasks", hint="None stands for a task without labels")
    return dict(zip(known or [f"task {k}" for k in range(len(values))], values, strict=True))


def finite(losses: Mapping[str, Tensor]) -> tuple[Tensor, list[float]]:
    """The losses stacked `(T,)`, with their graph, and as numbers, by one look at the device, which waits for it.

    Raises:
        ConfigError: one is not a scalar tensor.
        TrainingError: one is not a finite number; the message names the task.
    """
    for task, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise ConfigError(f"the loss of {task!r} is {loss!r}", hint="give a tensor; None for a task without labels")
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


def not_given(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> int:
    """How many other parameters the losses reach: they would silently stay as they are."""
    known = {id(p) for p in parameters}
    waiting, seen, missed = [loss.grad_fn for loss in losses], set(), 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        missed += isinstance(variable, nn.Parameter) and id(variable) not in known
        waiting.extend(each for each, _ in node.next_functions)
    return missed


def shared_and_own(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that two losses or more reach, and those that one reaches; those that none reaches are left out."""
    tasks = reached(losses, parameters)
    shared = [p for p, found in zip(parameters, tasks, strict=True) if len(found) > 1]
    own = [p for p, found in zip(parameters, tasks, strict=True) if len(found) == 1]
    return shared, own
