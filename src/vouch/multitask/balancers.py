"""Balancers: given the losses of one forward pass, they set the gradients. This module: their contract.

    balancer = make("gradcraft", model.parameters(), tau=0.3)
    for batch in batches:
        losses = {"click": ..., "like": ..., "watch_time": ...}
        optimizer.zero_grad()
        balancer.backward(losses)
        optimizer.step()

Every balancer uses the *sum* convention: where nothing is weighted, projected or scaled, the gradient is that of the
plain sum of the losses, and methods that average are multiplied by the number of tasks, so that step lengths agree.
Those of `weights` weigh the losses, so a task's own parameters (its head) are weighted too, and one backward pass does.
Those of `directions` and `gradcraft` see each task's gradient of the shared parameters; a task's own parameters get its
plain gradient, whatever happens to the shared ones. Letters: `T` tasks.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.config import Config, setting
from vouch.errors import ConfigError, UnknownIdError, did_you_mean
from vouch.multitask.gradients import MaybeLosses, by_name, finite, not_given, task_names
from vouch.multitask.report import Report

Array = NDArray[np.float64]
LONG = 10_000
"""Steps after which an epoch should have ended."""


class BalancerConfig(Config):
    """Settings that every balancer has."""

    reduction: Literal["sum", "mean"] = setting(
        "sum", "what the gradient is where nothing is balanced: that of the sum or of the mean of the losses"
    )


class Balancer(ABC):
    """The contract: `backward(losses)` in place of `losses.sum().backward()`."""

    slug: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[BalancerConfig]] = BalancerConfig
    by_epoch: ClassVar[bool] = False
    """Whether `end_epoch` must be called: until it is, the weights rest."""

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        tasks: int | Sequence[str] | None = None,
        shared: Iterable[Tensor] | None = None,
        **settings: Any,
    ) -> None:
        """Take all trained parameters; give `model.named_parameters()`, and messages name them.

        Args:
            tasks: their names or number; read off the first losses unless given.
            shared: the parameters whose gradients are balanced; those that two losses or more reach, unless given.
            settings: those of `Config`.

        Raises:
            ConfigError: there is nothing to train, `shared` holds other parameters, or a setting does not fit.
        """
        self.config: Any = self.Config(**settings)
        pairs = [each if isinstance(each, tuple) else ("", each) for each in parameters]
        once = {id(p): (name or f"a parameter of shape {tuple(p.shape)}", p) for name, p in pairs if p.requires_grad}
        pairs = list(once.values())
        if not pairs:
            raise ConfigError(
                "there are no parameters to train", hint="model.parameters() is used up by the first loop over it"
            )
        self.names, self.trained = [name for name, _ in pairs], [p for _, p in pairs]
        self.fixed: list[bool] | None = None
        if shared is not None:
            given = {id(p) for p in shared}
            self.fixed = [id(p) in given for p in self.trained]
            if sum(self.fixed) < len(given):
                raise ConfigError(
                    f"{len(given) - sum(self.fixed)} of the shared parameters are not among the trained parameters",
                    hint="give all trained parameters, and in `shared` some of them",
                )
        self.tasks: list[str] | None = None
        self.known: dict[str, int] = {}
        """Their places."""
        self.steps = self.epochs = 0
        self.values: Array = np.zeros(0)
        """Of the losses of the last step, by task that took part."""
        self.report: Report | None = None
        """Of the last step."""
        if tasks is not None:
            self._begin(task_names(tasks))

    def backward(self, losses: MaybeLosses) -> None:
        """Add to `.grad` of all parameters, as `Tensor.backward` does; the graph is freed.

        Regularisers enter once, outside: `penalty.backward()` before or after, on the parameters themselves.

        Args:
            losses: a scalar for each task, by name, in a list or stacked. The names (or the number) of the first call
                are those of all. A task that is None or left out takes no part in this step; without any, nothing
                happens.

        Raises:
            ConfigError: there are no losses, one is of an unknown task or not a scalar, none depends on a parameter.
            TrainingError: a loss or a gradient is not a finite number; names the task.
        """
        found, stacked = self._present(losses)
        if not found:
            return
        self.steps += 1
        if self.steps == 1:
            missed = not_given(list(found.values()), self.trained)
            if missed:
                what = f"the losses reach {missed} parameters that the balancer was not given"
                warnings.warn(f"{what}; give it all that are trained", stacklevel=2)
        if self.steps == LONG and self.by_epoch and not self.epochs:
            warnings.warn(f"{LONG:,} steps and no end of an epoch: call balancer.end_epoch()", stacklevel=2)
        assert self.tasks is not None
        if len(self.tasks) > 1:
            self._backward(found, stacked)
        else:
            (loss,) = found.values()
            loss.backward()
            self.report = Report(list(found), self.values, np.ones(1))

    def step(self, model: Any, batch: Any, optimizer: torch.optim.Optimizer, fabric: Any) -> dict[str, Tensor]:
        """One step of `vouch.training.fit(..., step=balancer.step)`: each loss of `model.loss(batch)` is a task.

        Raises:
            ConfigError: there are several processes; and as `backward`.
        """
        if fabric.world_size > 1:  # each would balance by its own share of the batch
            raise ConfigError("gradients by task are not shared among processes", hint="train with one process")
        with fabric.autocast():
            losses: dict[str, Tensor] = {name: x for name, x in model.loss(batch).items() if x is not None}
        optimizer.zero_grad()
        self.backward(losses)
        optimizer.step()
        total = torch.stack([loss.detach() for loss in losses.values()]).sum() if losses else torch.zeros(())
        return {**losses, "loss": total}

    def measure(self, losses: MaybeLosses) -> Report:
        """The tasks' gradients as they are, without a step: for any balancer, at one backward pass a task. Keeps the graph."""
        from vouch.multitask.bytask import Sum

        found, _ = self._present(losses)
        if not found:
            raise ConfigError("no task has a loss", hint="measure a batch with labels")
        look = Sum(zip(self.names, self.trained, strict=True))
        look.fixed = self.fixed
        gram = look.gather(found, keep=True).K
        return Report(list(found), self.values, np.ones(len(found)), gram, np.eye(len(found)))

    def end_epoch(self) -> None:
        """Call after each epoch; balancers that compare epochs (`by_epoch`) need it."""
        self.epochs += 1
        if self.tasks is not None:
            self._end_epoch()

    def parameters(self) -> list[nn.Parameter]:
        """What the balancer learns by the user's optimizer: give it these too (in a group without weight decay)."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers, texts and lists (JSON keeps it exactly)."""
        return {"slug": self.slug, "tasks": self.tasks, "epochs": self.epochs, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a balancer of the same kind.

        Raises:
            ConfigError: it is of another balancer or of other tasks, or a part of it is missing.
        """
        for name, mine in (("slug", self.slug), ("tasks", self.tasks)):
            if state.get(name) != mine and mine is not None:
                raise ConfigError(f"the state is of another balancer: its {name} is {state.get(name)!r}, not {mine!r}")
        try:
            if self.tasks is None and state["tasks"] is not None:
                self._begin(list(state["tasks"]))
            self.epochs = int(state["epochs"])
            self._load(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"the state of the balancer is damaged: {error}") from error

    @abstractmethod
    def _backward(self, losses: dict[str, Tensor], stacked: Tensor) -> None:
        """Set gradients and report; every loss is a finite scalar, and there are two tasks or more.

        `stacked (T,)` holds the losses again, in a graph that ends in it.
        """

    def _start(self, size: int) -> None:  # noqa: B027
        """Make room for the state of `size` tasks."""

    def _end_epoch(self) -> None:  # noqa: B027
        """An epoch has ended, and the tasks are known."""

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        pass

    def _begin(self, tasks: list[str]) -> None:
        if len(tasks) == 1:
            warnings.warn(f"there is one task, {tasks[0]!r}: nothing to balance, its gradient is used", stacklevel=4)
        self.tasks, self.known = tasks, {task: place for place, task in enumerate(tasks)}
        self._start(len(tasks))

    def _present(self, losses: MaybeLosses) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of the tasks that have any, by name and stacked."""
        given = by_name(losses, self.known)
        if self.tasks is None:
            if not given:
                raise ConfigError("there are no losses to balance", hint="give one scalar for each task")
            self._begin(list(given))
        some = {task: loss for task, loss in given.items() if loss is not None}
        if not some:
            return {}, torch.zeros(0)
        stacked, values = finite(some)
        self.values = np.array(values)
        if not stacked.requires_grad:
            raise ConfigError("no loss depends on a parameter", hint="compute the losses with gradients enabled")
        return some, stacked

    def _places(self, found: Mapping[str, Tensor]) -> list[int]:
        return [self.known[task] for task in found]


B = TypeVar("B", bound=type[Balancer])
_registered: dict[str, type[Balancer]] = {}


def balancer(slug: str, summary: str) -> Callable[[B], B]:
    """Class decorator that files a balancer under its name."""

    def file(cls: B) -> B:
        cls.slug, cls.summary = slug, summary
        _registered[slug] = cls
        return cls

    return file


def balancers() -> dict[str, type[Balancer]]:
    """All balancers by name."""
    import vouch.multitask.directions
    import vouch.multitask.gradcraft
    import vouch.multitask.gradnorm
    import vouch.multitask.weights  # noqa: F401  (they register themselves)

    return dict(sorted(_registered.items()))


def make(slug: str, parameters: Iterable[Any], **settings: Any) -> Balancer:
    """A balancer by name; `settings` are its own, and `tasks` and `shared` of `Balancer`.

    Raises:
        UnknownIdError: there is none of that name; the message names near ones.
        ConfigError: as `Balancer`.
    """
    return find(slug)(parameters, **settings)


def find(slug: str) -> type[Balancer]:
    """The class of a balancer by name.

    Raises:
        UnknownIdError: there is none of that name; the message names near ones.
    """
    known = balancers()
    if slug not in known:
        raise UnknownIdError(f"there is no balancer {slug!r}", hint=did_you_mean(slug, known))
    return known[slug]
