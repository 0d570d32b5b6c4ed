"""Inputs of tasks without their labels, and networks run on them in evaluation mode."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError
from vouch.training.devices import seed_of, to_device

Inputs = Tensor | tuple[Tensor, ...] | Iterable[Any]
"""Of one task: a tensor `(n, ...)`, a tuple of tensors of which the first is the inputs, or batches, such as a
`DataLoader`. A batch is a tensor, a dict of arguments for the network, or a tuple whose first part is one of these."""
Head = Callable[[Tensor], Tensor]
"""Features `(B, D)` to logits `(B, C)`."""


class Endless:
    """Batches of one task without end: a tensor is shuffled, each row once before any twice; batches are begun again."""

    def __init__(self, task: str, inputs: Inputs, batch_size: int, seed: int) -> None:
        """Take the inputs.

        Raises:
            DataError: there are none.
        """
        self.task, self.inputs, self.batch_size = task, inputs, batch_size
        self.generator = generator_of(seed, task)
        self._batches: Iterator[Any] = iter(())
        self._rows = tensors_of(task, inputs)

    def next(self) -> tuple[Any, Tensor | None]:
        """A batch of inputs, and its labels if there are any."""
        for _ in range(2):
            for batch in self._batches:
                return parts(batch)
            self._batches = self._begin()
        raise DataError(
            f"there are no inputs of task {self.task!r}, or no more of them",
            hint="give a tensor, a list of batches or a DataLoader: a generator cannot begin again",
        )

    def _begin(self) -> Iterator[Any]:
        if self._rows is None:
            return iter(self.inputs)
        order = torch.randperm(len(self._rows[0]), generator=self.generator)
        return self._shuffled(self._rows, order)

    def _shuffled(self, rows: tuple[Tensor, ...], order: Tensor) -> Iterator[Any]:
        size = min(self.batch_size, len(order))
        for at in range(0, len(order) - size + 1, size):
            chosen = order[at : at + size].to(rows[0].device)
            yield tuple(each[chosen] for each in rows)


def once(task: str, inputs: Inputs, batch_size: int = 256) -> Iterator[Any]:
    """The inputs of a task in their order, batch by batch, without labels.

    Raises:
        DataError: there are none.
    """
    found, rows = False, tensors_of(task, inputs)
    if rows is not None:
        yield from rows[0].split(batch_size)
        return
    for batch in inputs:
        found = True
        yield parts(batch)[0]
    if not found:
        raise DataError(f"there are no inputs of task {task!r}")


def features(
    encoder: nn.Module, inputs: Inputs, *, head: Head | None = None, task: str = "the task", batch_size: int = 256
) -> Tensor:
    """The features `(n, D)` that a network gives, in evaluation mode and without gradients; logits with a `head`.

    Raises:
        DataError: there are no inputs, or a feature is not a finite number. ConfigError: they are no `(B, D)` tensor,
            or the network cannot read the inputs.
    """
    device = place_of(encoder)
    with evaluating(encoder, head), torch.no_grad():
        found = [encode(encoder, moved(batch, device), head, task) for batch in once(task, inputs, batch_size)]
    z = torch.cat(found)
    if not bool(torch.isfinite(z).all()):
        raise DataError(f"features of task {task!r} are not finite numbers", hint="look for such values in its inputs")
    return z


def encode(encoder: Callable[..., Any], batch: Any, head: Head | None = None, task: str = "the task") -> Tensor:
    """What a network gives for one batch; with a `head` its logits.

    Raises:
        ConfigError: it cannot read the batch, or gives no tensor with a row of features for each input.
    """
    z = call_with(encoder, batch, task)
    if not isinstance(z, Tensor) or z.ndim != 2:
        what = f"a tensor of the shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise ConfigError(
            f"the network gave {what}, not features (B, D)", hint="wrap it so that it returns its pooled features"
        )
    if head is None:
        return z
    with reading(f"the head cannot read the features of task {task!r}, {tuple(z.shape)}"):
        return head(z)


def call_with(call: Callable[..., Any], batch: Any, task: str = "the task") -> Any:
    """What a network gives for a batch: a tensor, or a dict of arguments.

    Raises:
        ConfigError: it cannot read the batch.
    """
    first = next(iter(batch.values()), None) if isinstance(batch, Mapping) else batch
    like = f", {tuple(first.shape)} of {str(first.dtype).removeprefix('torch.')}" if isinstance(first, Tensor) else ""
    with reading(f"the network cannot read the inputs of task {task!r}{like}"):
        return call(**batch) if isinstance(batch, Mapping) else call(batch)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Say `what` where torch refuses the shapes or types of its operands.

    Raises:
        ConfigError: it does.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        hint = "give inputs of the shape and type that the network was trained on"
        raise ConfigError(f"{what}: {error}", hint=hint) from error


def check_labels(label: Tensor, classes: int, task: str) -> None:
    """Labels `(n,)` are numbers of classes.

    Raises:
        DataError: they are not.
    """
    if label.is_floating_point() or label.ndim != 1 or int(label.min()) < 0 or int(label.max()) >= classes:
        raise DataError(
            f"labels of task {task!r}, {tuple(label.shape)} of {str(label.dtype).removeprefix('torch.')}, are not "
            f"numbers from 0 to {classes - 1}",
            hint="count them as the head's outputs are",
        )


def parts(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and, where there are any, labels of a batch."""
    if isinstance(batch, Sequence) and not isinstance(batch, Tensor | str):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def tensors_of(task: str, inputs: Inputs) -> tuple[Tensor, ...] | None:
    """The tensors, where the inputs are a tensor or a tuple of them; None where they are batches.

    Raises:
        DataError: they have no rows, or not equally many.
    """
    rows = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not (isinstance(rows, tuple) and rows and all(isinstance(each, Tensor) for each in rows)):
        return None
    if not rows[0].ndim or not len(rows[0]):
        raise DataError(f"there are no inputs of task {task!r}", hint="give a tensor (n, ...), a row for each input")
    if any(each.shape[:1] != rows[0].shape[:1] for each in rows):
        raise DataError(f"task {task!r} has inputs {tuple(rows[0].shape)} and labels {tuple(rows[-1].shape)}")
    return rows


def place_of(module: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    found = next(iter(module.parameters()), None)
    return torch.device("cpu") if found is None else found.device


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    return to_device(dict(batch) if isinstance(batch, Mapping) else batch, device)


def generator_of(seed: int, task: str) -> torch.Generator:
    """Chance of one task, which other tasks and their order leave alone."""
    return torch.Generator().manual_seed(seed_of(seed, zlib.crc32(task.encode())))


@contextlib.contextmanager
def evaluating(*modules: object) -> Iterator[None]:
    """Put networks into evaluation mode, and every part of them back afterwards as it was."""
    every = [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    modes = [part.training for part in every]
    try:
        for part in every:
            part.training = False
        yield
    finally:
        for part, mode in zip(every, modes, strict=True):
            part.training = mode
