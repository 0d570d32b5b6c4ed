"""What balancers that see each task's gradient share: inner products, the merged gradient, and who owns a parameter.

Each method is a rule on `K (T, T)`, the inner products of the tasks' gradients; it gives factors on the gradients,
`(T,)` or, where each gradient is changed on its own, `(T, T)` (row i is what becomes of gradient i). So beyond the T
gradients of T backward passes nothing as long as a gradient is made but the merged one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.errors import ConfigError, TrainingError
from vouch.multitask.balancers import Array, Balancer
from vouch.multitask.gradients import Lookup, lookups, of_each
from vouch.multitask.report import Report

Gradients = Sequence[Sequence[Tensor | None]]
"""For each task its gradients by parameter, None where it has no part in one."""
BLOCK = {"cpu": 1 << 19}
"""Values taken to float64 at a time: on a CPU what stays near the core; elsewhere 2^22."""
SMALL = 1 << 14
"""Values up to which gradients are put together to be looked at."""


def gram(gradients: Gradients, room: Tensor | None = None) -> Tensor:
    """Inner products `(T, T)` of the tasks' gradients over all parameters, in float64.

    In float32 half the digits would be lost exactly where tasks nearly oppose each other. `room` is memory to work in
    (`room_on`), that of the last step: memory that is new to the process takes longer to get than the products take.
    """
    size = len(gradients)
    first = next((g for row in gradients for g in row if g is not None), None)
    if first is None:
        return torch.zeros(size, size, dtype=torch.float64)
    room = room_on(place_of(first)) if room is None else room
    found = torch.zeros(size, size, dtype=torch.float64, device=room.device)
    width = max(1, len(room) // size)
    room = room[: size * width].view(size, width)
    for filled, pieces in _blocks(gradients, width):
        rows = room[:, :filled]
        sizes = [piece.numel() for piece in pieces[0]]
        torch._foreach_copy_([x for row in rows.unbind() for x in row.split(sizes)], [x for row in pieces for x in row])
        if rows.is_cpu:  # a few long rows: products of a matrix and a vector take half the time
            for k in range(size):
                found[k, k:].addmv_(rows[k:], rows[k])
        else:
            found.addmm_(rows, rows.T)
    return found.triu() + found.triu(1).T


def place_of(gradient: Tensor) -> torch.device:
    """Where products of such gradients are summed in float64."""
    return torch.device("cpu") if gradient.device.type == "mps" else gradient.device  # which has no float64


def room_on(device: torch.device) -> Tensor:
    """Memory in which `gram` works."""
    return torch.empty(BLOCK.get(device.type, 1 << 22), dtype=torch.float64, device=device)


def _blocks(gradients: Gradients, width: int) -> Iterator[tuple[int, list[list[Tensor]]]]:
    """All gradients in blocks of `width` values (the last one of fewer): by task the vectors that make up its row."""
    pieces: list[list[Tensor]] = [[] for _ in gradients]
    filled = 0
    for each in zip(*gradients, strict=True):
        some = next((g for g in each if g is not None), None)
        if some is None:
            continue
        nothing = torch.zeros_like(some).flatten() if any(g is None for g in each) else some
        flat = [nothing if g is None else g.flatten() for g in each]
        begin, size = 0, some.numel()
        while begin < size:
            end = min(size, begin + width - filled)
            for row, g in zip(pieces, flat, strict=True):
                row.append(g if end - begin == size else g[begin:end])
            filled += end - begin
            begin = end
            if filled == width:
                yield filled, pieces
                pieces, filled = [[] for _ in gradients], 0
    if filled:
        yield filled, pieces


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
    """The gradients of one step. At sparse parameters, and at tables, they are those of the rows that these list."""

    K: Array
    gradients: list[list[Tensor | None]]
    shared: list[int]
    own: dict[int, int]
    """By parameter that is not shared the task whose gradient it gets; those of all others are zeros."""
    touched: dict[int, Tensor]
    looked: dict[int, Lookup]


class GradientBalancer(Balancer):
    """Balancers that see each task's gradient: a backward pass a task.

    Gradients of embeddings made with `sparse=True` stay sparse: only the rows that the batch touches are kept and
    compared, instead of a table a task. Their optimizer must take sparse gradients (`SparseAdam`, `Adagrad`, `SGD`).
    Of other large embeddings only the merged gradient is made as large as the table.
    """

    needs_losses: ClassVar[bool] = False

    def __init__(
        self, parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]], *args: Any, **settings: Any
    ) -> None:
        super().__init__(parameters, *args, **settings)
        self.reach: list[set[str]] = [set() for _ in self.trained]
        self.tables = dict(enumerate(self.trained))
        """What may be a table, that is, what was one in the first steps."""
        self.room: Tensor | None = None

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
        K = self._gram(gradients).cpu().numpy()
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
        gradients, looked = self._gradients(list(losses.values()), keep)
        touched = _only_touched(gradients)
        while True:
            shared = self._shared()
            known = set(shared)
            by: dict[int, list[int]] = {}  # tasks with a gradient of a parameter that is not shared
            for k, row in enumerate(gradients):
                for at, g in enumerate(row):
                    if g is not None and at not in known and g.numel():
                        by.setdefault(at, []).append(k)
            own = {at: found[0] for at, found in by.items()}
            unsure = [
                (at, k) for at, found in by.items() if [*self.reach[at]] != [tasks[k] for k in found] for k in found
            ]
            sure = by.keys() - {at for at, _ in unsure}  # as in the steps before
            found = self._gram([[row[at] for at in shared] for row in gradients])
            K, largest, doubtful = _read(
                found,
                [g for at, k in unsure if (g := gradients[k][at]) is not None],
                [g for at in sure if (g := gradients[own[at]][at]) is not None],
            )
            for task, length in zip(tasks, K.diagonal().tolist(), strict=True):
                _check(task, length)
            if doubtful:
                for at in sorted(sure):
                    g = gradients[own[at]][at]
                    assert g is not None
                    _check(tasks[own[at]], float(g.abs().max()), self.names[at])
            most: dict[int, float] = {}
            for (at, k), value in zip(unsure, largest, strict=True):
                _check(tasks[k], value, self.names[at])
                if value > 0:
                    self.reach[at].add(tasks[k])
                if value > most.get(at, -1):
                    own[at], most[at] = k, value
            if self.fixed is not None:
                for at in own:
                    if len(self.reach[at]) > 1:
                        raise ConfigError(
                            f"{self.names[at]} is reached by {', '.join(sorted(self.reach[at]))}, but is not in `shared`"
                        )
            if self._shared() == shared:
                return Gathered(K, gradients, shared, own, touched, looked)

    def _gram(self, gradients: Gradients) -> Tensor:
        place = place_of(self.trained[0])
        if self.room is None or self.room.device != place:  # the model has moved
            self.room = room_on(place)
        return gram(gradients, self.room)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the room to work in."""
        return {**self.__dict__, "room": None}

    def _gradients(self, losses: list[Tensor], keep: bool) -> tuple[list[list[Tensor | None]], dict[int, Lookup]]:
        """By task and parameter; at tables those of the rows that were looked up."""
        tables = lookups(losses, self.tables) if self.tables else {}
        if self.steps == 2:
            self.tables = {at: self.trained[at] for at in tables}  # without any, the graph need not be walked again
        looked = {at: found for at, found in tables.items() if found is not None}
        if not looked:
            return of_each(losses, self.trained, keep=keep), {}
        plain = [p for at, p in enumerate(self.trained) if at not in looked]
        edges = [edge for lookup in looked.values() for edge in lookup.edges]
        gradients = []
        for found in of_each(losses, [*plain, *edges], keep=keep):
            rest, begin = iter(found), len(plain)
            row = [None if at in looked else next(rest) for at in range(len(self.trained))]
            for at, lookup in looked.items():
                row[at] = lookup.fold(found[begin : begin + len(lookup.edges)])
                begin += len(lookup.edges)
            gradients.append(row)
        return gradients, looked

    def _shared(self) -> list[int]:
        if self.fixed is not None:
            return [at for at, yes in enumerate(self.fixed) if yes]
        return [at for at, tasks in enumerate(self.reach) if len(tasks) > 1]

    def _backward(self, losses: dict[str, Tensor], stacked: Tensor) -> None:
        K, gradients, shared, own, touched, looked = self.gather(losses)
        size, values = len(losses), self.values
        matrix = np.eye(1) if size == 1 else _matrix(self.coefficients(K, values, self._places(losses)))
        weights = matrix.sum(0)
        factor = 1 / size if self.config.reduction == "mean" else 1.0
        merged = merge([[row[at] for at in shared] for row in gradients], (factor * weights).tolist())
        for at, g in zip(shared, merged, strict=True):
            if g is not None:
                _accumulate(self.trained[at], g, touched.get(at), looked.get(at))
        seen: set[int] = set()
        for at, k in own.items():
            g = gradients[k][at]
            assert g is not None
            # autograd may give two parameters the same memory, or one a view
            mine = g._base is None and g.is_contiguous() and g.data_ptr() not in seen
            seen.add(g.data_ptr())
            g = g * factor if factor != 1 else g if mine else g.clone(memory_format=torch.contiguous_format)
            _accumulate(self.trained[at], g, touched.get(at), looked.get(at))
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
    if not isfinite(value):
        where = "" if name is None else f" of {name}"
        raise TrainingError(f"the gradient{where} of {task!r} is not a finite number", hint="lower the learning rate")


def _read(K: Tensor, each: list[Tensor], together: list[Tensor]) -> tuple[Array, list[float], bool]:
    """`K`, the largest absolute value of each, and whether the others may not be finite, in one look at the device."""
    sizes = list(torch._foreach_norm(each, float("inf"))) if each else []
    small = [g.flatten() for g in together if g.numel() <= SMALL]  # an operation costs more than its values
    sizes += [g.sum() for g in together if g.numel() > SMALL]
    sizes += [torch.cat(small).sum()] if small else []
    every = (torch.cat([K.flatten(), torch.stack([x.to(K) for x in sizes])]) if sizes else K.flatten()).cpu().numpy()
    found = every[K.numel() :].tolist()
    return every[: K.numel()].reshape(K.shape), found[: len(each)], not all(map(isfinite, found[len(each) :]))


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


def _accumulate(parameter: Tensor, gradient: Tensor, touched: Tensor | None, looked: Lookup | None) -> None:
    if looked is not None:
        if parameter.grad is not None and not parameter.grad.is_sparse:
            parameter.grad.index_add_(0, looked.rows, gradient)
            return
        gradient = torch.zeros_like(parameter).index_add_(0, looked.rows, gradient)
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
