"""What balancers that see each task's gradient share: inner products, the merged gradient, and who owns a parameter.

Each method is a rule on `K (T, T)`, the inner products of the tasks' gradients; it gives factors on the gradients,
`(T,)` or, where each gradient is changed on its own, `(T, T)` (row i is what becomes of gradient i). So beyond the T
gradients of T backward passes nothing as long as a gradient is made but the merged one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.errors import ConfigError, TrainingError
from vouch.multitask.balancers import Array, Balancer, numbers
from vouch.multitask.gradients import of_each
from vouch.multitask.report import Report

Gradients = Sequence[Sequence[Tensor | None]]
"""For each task its gradients by parameter, None where it has no part in one."""
BLOCK = {"cpu": 1 << 17}
"""Values taken to float64 at a time: on a CPU what stays in a core's cache; elsewhere 2^24."""


def gram(gradients: Gradients) -> Tensor:
    """Inner products `(T, T)` of the tasks' gradients over all parameters, in float64.

    In float32 half the digits would be lost exactly where tasks nearly oppose each other.
    """
    size = len(gradients)
    first = next((g for row in gradients for g in row if g is not None), None)
    if first is None:
        return torch.zeros(size, size, dtype=torch.float64)
    device = "cpu" if first.device.type == "mps" else first.device  # which has no float64
    found = torch.zeros(size, size, dtype=torch.float64, device=device)
    width = max(1, BLOCK.get(first.device.type, 1 << 24) // size)
    pack: list[list[Tensor]] = []
    packed = 0

    def add(rows: Tensor) -> None:
        rows = rows.to(found)
        found.addmm_(rows, rows.T)

    def flush() -> None:
        if pack:
            add(torch.stack([torch.cat(parts) for parts in zip(*pack, strict=True)]))
            pack.clear()

    for each in zip(*gradients, strict=True):
        some = next((g for g in each if g is not None), None)
        if some is None:
            continue
        nothing = torch.zeros_like(some).flatten() if any(g is None for g in each) else some
        flat = [nothing if g is None else g.flatten() for g in each]
        if some.numel() > width:
            for begin in range(0, some.numel(), width):
                add(torch.stack([g[begin : begin + width] for g in flat]))
            continue
        if packed + some.numel() > width:
            flush()
            packed = 0
        pack.append(flat)
        packed += some.numel()
    flush()
    return (found + found.T) / 2


def merge(gradients: Gradients, factors: Sequence[float]) -> list[Tensor | None]:
    """`sum_k factors[k] gradients[k]`, parameter by parameter, in new memory."""
    merged: list[Tensor | None] = [None] * len(gradients[0])
    for row, factor in zip(gradients, factors, strict=True):
        olds, adds, places, news = [], [], [], []
        for at, (g, old) in enumerate(zip(row, merged, strict=True)):
            if g is None:
                continue
            if old is None:
                places.append(at)
                news.append(g)
            else:
                olds.append(old)
                adds.append(g)
        if olds:
            torch._foreach_add_(olds, adds, alpha=factor)
        if news:
            for at, new in zip(places, torch._foreach_mul(news, factor), strict=True):
                merged[at] = new
    return merged


def lengths(K: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Norms `(T,)`, and which are not 0. What is 1e-30 of the longest counts as 0: no float32 factor could lift it."""
    n = np.sqrt(K.diagonal())
    return n, n > 1e-30 * n.max()


class Gathered(NamedTuple):
    """The gradients of one step. `gradients` holds, at sparse parameters, only the rows that `touched` lists."""

    K: Array
    gradients: list[list[Tensor | None]]
    shared: list[int]
    own: list[tuple[int, int]]
    """(task, parameter) of the gradients of parameters that are not shared, and the largest value of each:"""
    largest: list[float]
    touched: dict[int, Tensor]


class GradientBalancer(Balancer):
    """Balancers that see each task's gradient: a backward pass a task.

    Gradients of embeddings made with `sparse=True` stay sparse: only the rows that the batch touches are kept and
    compared, instead of a table a task. Their optimizer must take sparse gradients (`SparseAdam`, `Adagrad`, `SGD`).
    """

    needs_losses: ClassVar[bool] = False

    def __init__(
        self, parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]], *args: Any, **settings: Any
    ) -> None:
        super().__init__(parameters, *args, **settings)
        self.reach: list[set[str]] = [set() for _ in self.trained]

    @abstractmethod
    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """Factors `(T,)` or `(T, T)` in the sum convention, of the tasks at `places`, from `K (T, T)` and `losses (T,)`."""

    def transform(self, gradients: Gradients) -> list[list[Tensor | None]]:
        """What becomes of each task's gradient: the `transform` of `vouch.multitask.adatask` optimizers.

        Raises:
            ConfigError: the method needs the losses too, or there are not as many gradients as tasks.
            TrainingError: a gradient is not a finite number; names the task.
        """
        if self.needs_losses:
            raise ConfigError(f"{self.slug} needs the losses, not only gradients", hint="use balancer.backward(losses)")
        if self.tasks is None:
            self._begin([f"task {k}" for k in range(len(gradients))])
        assert self.tasks is not None
        if len(gradients) != len(self.tasks):
            raise ConfigError(f"{len(gradients)} gradients for {len(self.tasks)} tasks")
        K = gram(gradients).cpu().numpy()
        for task, length in zip(self.tasks, K.diagonal(), strict=True):
            _check(task, float(length))
        size = len(K)
        A = np.eye(1) if size == 1 else _matrix(self.coefficients(K, np.full(size, np.nan), list(range(size))))
        return [merge(gradients, row) for row in A.tolist()]

    def gather(self, losses: Mapping[str, Tensor], *, keep: bool = False) -> Gathered:
        """The gradients of all tasks.

        A parameter is shared where two tasks or more have moved it so far. The graph alone cannot tell: where the
        outputs of all heads are put together in one tensor, each task reaches every head, with zeros.

        Raises:
            TrainingError: a gradient is not a finite number; names the task.
            ConfigError: a parameter that was not given as shared is.
        """
        tasks = list(losses)
        gradients = of_each(list(losses.values()), self.trained, keep=keep)
        touched = _only_touched(gradients)
        while True:
            shared = self._shared()
            known = set(shared)
            own = [
                (k, at)
                for k, row in enumerate(gradients)
                for at, g in enumerate(row)
                if g is not None and at not in known and g.numel()
            ]
            found = gram([[row[at] for at in shared] for row in gradients])
            K, largest = _read(found, [g for k, at in own if (g := gradients[k][at]) is not None])
            for task, length in zip(tasks, K.diagonal(), strict=True):
                _check(task, float(length))
            for (k, at), value in zip(own, largest, strict=True):
                _check(tasks[k], value, self.names[at])
                if value > 0:
                    self.reach[at].add(tasks[k])
            if self.fixed is not None:
                for at in {at for _, at in own}:
                    if len(self.reach[at]) > 1:
                        raise ConfigError(
                            f"{self.names[at]} is reached by {', '.join(sorted(self.reach[at]))}, but is not in `shared`"
                        )
            if self._shared() == shared:
                return Gathered(K, gradients, shared, own, largest, touched)

    def _shared(self) -> list[int]:
        if self.fixed is not None:
            return [at for at, yes in enumerate(self.fixed) if yes]
        return [at for at, tasks in enumerate(self.reach) if len(tasks) > 1]

    def _backward(self, losses: dict[str, Tensor]) -> None:
        K, gradients, shared, own, largest, touched = self.gather(losses)
        size, values = len(losses), numbers(losses)
        matrix = np.eye(1) if size == 1 else _matrix(self.coefficients(K, values, self._places(losses)))
        weights = matrix.sum(0)
        factor = 1 / size if self.config.reduction == "mean" else 1.0
        merged = merge([[row[at] for at in shared] for row in gradients], (factor * weights).tolist())
        for at, g in zip(shared, merged, strict=True):
            if g is not None:
                _accumulate(self.trained[at], g, touched.get(at))
        one: dict[int, tuple[float, Tensor]] = {}  # all others are zeros
        for (k, at), value in zip(own, largest, strict=True):
            g = gradients[k][at]
            if g is not None and (at not in one or value > one[at][0]):
                one[at] = (value, g)
        seen: set[int] = set()
        for at, (_, g) in one.items():
            # autograd may give two parameters the same memory, or one a view
            mine = g.is_contiguous() and g._base is None and g.data_ptr() not in seen
            seen.add(g.data_ptr())
            g = g * factor if factor != 1 else g if mine else g.clone(memory_format=torch.contiguous_format)
            _accumulate(self.trained[at], g, touched.get(at))
        self.report = Report(list(losses), values, weights, K, matrix)

    def _state(self) -> dict[str, Any]:
        return {"reach": [sorted(found) for found in self.reach]}

    def _load(self, state: Mapping[str, Any]) -> None:
        if len(state["reach"]) != len(self.reach):
            raise ConfigError(f"the state is of {len(state['reach'])} parameters; there are {len(self.reach)}")
        self.reach = [set(found) for found in state["reach"]]


class Sum(GradientBalancer):
    """The plain sum, with a look at the gradients."""

    slug = "sum"

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """Ones."""
        return np.ones(len(K))


def _matrix(A: Array) -> Array:
    return A if A.ndim == 2 else np.diag(A)


def _check(task: str, value: float, name: str | None = None) -> None:
    if not np.isfinite(value):
        where = "" if name is None else f" of {name}"
        raise TrainingError(f"the gradient{where} of {task!r} is not a finite number", hint="lower the learning rate")


def _read(K: Tensor, others: list[Tensor]) -> tuple[Array, list[float]]:
    """`K`, and the largest absolute value of each of the others, in one look at the device."""
    sizes = torch._foreach_norm(others, float("inf")) if others else ()
    every = torch.cat([K.flatten(), *(x.to(K).reshape(1) for x in sizes)]).cpu().numpy()
    return every[: K.numel()].reshape(K.shape), every[K.numel() :].tolist()


def _only_touched(gradients: list[list[Tensor | None]]) -> dict[int, Tensor]:
    """Replace sparse gradients, in place, by the rows `(n, ...)` that any task touches; by parameter those rows' places."""
    touched: dict[int, Tensor] = {}
    for at in range(len(gradients[0])):
        each = [row[at] for row in gradients]
        if not any(g is not None and g.is_sparse for g in each):
            continue
        if any(g is not None and not g.is_sparse for g in each):
            for row, g in zip(gradients, each, strict=True):
                row[at] = g.to_dense() if g is not None and g.is_sparse else g
            continue
        parts = {k: g.coalesce() for k, g in enumerate(each) if g is not None}
        places = [g.indices() for g in parts.values()]
        touched[at] = places[0]
        if all(torch.equal(place, places[0]) for place in places[1:]):  # one look-up for all tasks
            for k, g in parts.items():
                gradients[k][at] = g.values()
            continue
        touched[at], inverse = torch.cat(places, 1).unique(dim=1, return_inverse=True)
        for (k, g), place in zip(parts.items(), inverse.split([p.shape[1] for p in places]), strict=True):
            values = g.values()
            rows = values.new_zeros((touched[at].shape[1], *values.shape[1:]))
            gradients[k][at] = rows.index_copy_(0, place, values)
    return touched


def _accumulate(parameter: Tensor, gradient: Tensor, touched: Tensor | None) -> None:
    if touched is not None:
        gradient = torch.sparse_coo_tensor(
            touched, gradient, parameter.shape, is_coalesced=True, check_invariants=False
        )
    if parameter.grad is None:
        parameter.grad = gradient
    elif parameter.grad.is_sparse and not gradient.is_sparse:
        parameter.grad = gradient.add_(parameter.grad)
    else:
        parameter.grad.add_(gradient)
