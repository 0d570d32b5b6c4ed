"""AdaTask: adaptive optimizers that keep accounts by task, and a meter of which task dominates which parameter.

Source: AdaTask: A Task-Aware Adaptive Learning Rate Approach to Multi-Task Learning, arXiv 2211.15055. An adaptive
optimizer divides a parameter's gradient by the root of its accumulated squares. Where tasks share the parameter, the
task with the largest gradients fills that accumulator and shrinks the steps of all others. Here each task has its own
accumulator on each shared parameter; parameters of one task see the ordinary optimizer:

    optimizer = AdaTaskAdam(model.parameters(), tasks=3, lr=1e-3)
    optimizer.step([click_loss, like_loss, watch_loss])      # in place of backward() and step()

What differs from the released code: one backward pass a task gives the gradients of the shared parameters and of the
task's own; a parameter that a task does not reach keeps that task's state; weight decay is decoupled and applied once.
Every task moves the shared part by about the learning rate, so it moves up to T times as fast as with the ordinary
optimizer: compare at `lr / T`, or with the ordinary optimizer at `lr * T`.

Shapes: `T` tasks; the state of a shared parameter has `T` in front, that of one task's parameter 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vouch.errors import ConfigError, TrainingError
from vouch.multitask.gradients import Losses, named, reached

Gradients = list[list[Tensor | None]]
"""For each task its gradients of the shared parameters, None where it has no part in one."""


class AdaTask(torch.optim.Optimizer):
    """What the three optimizers share: gradients by task, their accounts, and one update that sums over tasks."""

    slots: tuple[str, ...]
    """Names of the accumulators."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        tasks: int | Sequence[str],
        *,
        shared: Iterable[Tensor] | None = None,
        accumulators: Literal["task", "shared"] = "task",
        weights: Sequence[float] | None = None,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        **defaults: float | tuple[float, float],
    ) -> None:
        """Take all trained parameters and the tasks.

        Args:
            tasks: their names or their number.
            shared: the parameters with accounts by task; those that two losses or more reach, unless given.
            accumulators: `shared` is the ordinary optimizer, with the tasks' parts of its steps kept apart for `meter`.
            weights: fixed weights of the losses `(T,)`. With accounts by task they do nothing to the shared part.
            weight_decay: decoupled, times the learning rate. max_norm: longest gradient of one task on all its
                parameters.

        Raises:
            ConfigError: there is no task or parameter, or a parameter of `shared` is not among `parameters`.
        """
        every = list(parameters)
        self.tasks = [f"task {k}" for k in range(tasks)] if isinstance(tasks, int) else list(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks is {tasks!r}", hint="give the names of the tasks, or how many there are")
        if weights is not None and len(weights) != len(self.tasks):
            raise ConfigError(f"{len(weights)} weights for {len(self.tasks)} tasks")
        if not every:
            raise ConfigError("there are no parameters to train")
        self.weights = [1.0] * len(self.tasks) if weights is None else [float(w) for w in weights]
        self.accumulators, self.max_norm = accumulators, max_norm
        self.meter: AUMeter | None = None
        super().__init__(every, {**defaults, "weight_decay": weight_decay, "shared": None})
        if shared is not None:
            self._mark({id(p) for p in shared})

    def _mark(self, shared: set[int]) -> None:
        """Note in each group which of its parameters are shared; the state that is saved has it too."""
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if shared - known:
            raise ConfigError(
                f"{len(shared - known)} of the shared parameters are not among the parameters of the optimizer",
                hint="give all trained parameters, and in `shared` some of them",
            )
        for group in self.param_groups:
            group["shared"] = [id(p) in shared for p in group["params"]]

    def step(  # type: ignore[override]
        self,
        losses: Losses,
        *,
        transform: Callable[[Gradients], Gradients] | None = None,
        scale: float = 1.0,
    ) -> bool:
        """One update from the losses of one forward pass; the graph is freed.

        Tasks are matched by name where `losses` has names: one that is missing is left out, and keeps its state.

        Args:
            transform: changes the tasks' gradients of the shared parameters first, e.g. into directions without
                conflict.
            scale: the factor on the losses in mixed precision; gradients are divided by it.

        Returns:
            Whether there was a step: with a `scale`, an overflow in one task skips all of it.

        Raises:
            ConfigError: a loss is of no known task, or the number of tasks has changed.
            TrainingError: a loss or a gradient is not a finite number; names the task.
        """
        found = self._named(losses)
        every = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        tasks, values = list(found), [self.weights[self.tasks.index(t)] * loss for t, loss in found.items()]
        reach = reached(values, every)
        if any(group["shared"] is None for group in self.param_groups):
            self._mark({id(p) for p, by in zip(every, reach, strict=True) if len(by) > 1})
        is_shared = {id(p) for group in self.param_groups for p in _where(group, True)}
        shared = [p for p in every if id(p) in is_shared]
        by_task, own = self._gradients(tasks, values, every, reach, shared)
        if transform is not None:
            by_task = transform(by_task)
        for task, gradients in zip(tasks, by_task, strict=True):
            given = [g for g in (*gradients, *(g for g, by in own.values() if by == task)) if g is not None]
            if not given:
                continue
            if scale != 1.0:
                torch._foreach_mul_(given, 1 / scale)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(given)))
            if not bool(torch.isfinite(norm)):
                if scale != 1.0:
                    return False
                raise TrainingError(f"the gradient of {task!r} is not a finite number", hint="lower the learning rate")
            if self.max_norm is not None and float(norm) > self.max_norm:
                torch._foreach_mul_(given, self.max_norm / float(norm))
        places = [self.tasks.index(task) for task in tasks]
        by_parameter = {id(p): [g[at] for g in by_task] for at, p in enumerate(shared)}
        with torch.no_grad():
            self._update(places, by_parameter, {at: gradient for at, (gradient, _) in own.items()})
        return True

    def _named(self, losses: Losses) -> dict[str, Tensor]:
        found = named(losses)
        if not isinstance(losses, Mapping):
            if len(found) != len(self.tasks):
                raise ConfigError(
                    f"{len(found)} losses for {len(self.tasks)} tasks", hint="name the losses to leave a task out"
                )
            found = dict(zip(self.tasks, found.values(), strict=True))
        for task in found:
            if task not in self.tasks:
                raise ConfigError(f"there is no task {task!r}", hint=f"the tasks are: {', '.join(self.tasks)}")
        return found

    def _gradients(
        self, tasks: list[str], losses: list[Tensor], every: list[Tensor], reach: list[set[int]], shared: list[Tensor]
    ) -> tuple[Gradients, dict[int, tuple[Tensor, str]]]:
        """By task those of the shared parameters; and by parameter that of one task's own, with the task."""
        is_shared = {id(p) for p in shared}
        by_task: Gradients = []
        own: dict[int, tuple[Tensor, str]] = {}
        for k, loss in enumerate(losses):
            mine = [p for p, by in zip(every, reach, strict=True) if id(p) not in is_shared and k in by]
            for p, by in zip(every, reach, strict=True):
                if id(p) not in is_shared and len(by) > 1:
                    raise ConfigError(
                        f"a parameter of shape {tuple(p.shape)} is reached by {len(by)} tasks but is not in `shared`"
                    )
            if not loss.requires_grad:
                by_task.append([None] * len(shared))
                continue
            keep = k < len(losses) - 1
            found = torch.autograd.grad(loss, [*shared, *mine], retain_graph=keep, allow_unused=True)
            for gradient in found:
                if gradient is not None and gradient.is_sparse:
                    raise ConfigError("gradients are sparse", hint="make the embedding with sparse=False")
            by_task.append([None if g is None else g.contiguous() for g in found[: len(shared)]])
            own.update({id(p): (g, tasks[k]) for p, g in zip(mine, found[len(shared) :], strict=True) if g is not None})
        return by_task, own

    def _update(self, places: list[int], by_parameter: dict[int, list[Tensor | None]], own: dict[int, Tensor]) -> None:
        """Advance the accounts, and move each parameter by the sum over its tasks."""
        for group in self.param_groups:
            if group["weight_decay"]:
                moved = [p for p in group["params"] if id(p) in by_parameter or id(p) in own]
                if moved:
                    torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            alone = [p for p in _where(group, False) if id(p) in own]
            self._move(group, alone, [own[id(p)] for p in alone], None, 0, 1, None)
            together = _where(group, True)
            total: dict[int, Tensor] = {}
            nothing: list[Tensor | None] = [None] * len(places)
            if self.accumulators == "shared":
                for p in together:
                    parts = [g for g in by_parameter.get(id(p), ()) if g is not None]
                    if parts:
                        total[id(p)] = torch.stack(parts).sum(0)
            for at, k in enumerate(places):
                having = [(p, g) for p in together if (g := by_parameter.get(id(p), nothing)[at]) is not None]
                sums = [total[id(p)] for p, _ in having] if total else None
                moved = [p for p, _ in having]
                self._move(group, moved, [g for _, g in having], sums, k, len(self.tasks), self.meter)

    def _move(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        sums: list[Tensor] | None,
        k: int,
        T: int,
        meter: AUMeter | None,
    ) -> None:
        """Move parameters by one task's part. `sums` are the gradients of all tasks, where the account is shared."""
        if not parameters:
            return
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(T)
                state.update({slot: p.new_zeros((T, *p.shape)) for slot in self.slots})
            elif len(state["step"]) != T:
                raise ConfigError(f"a parameter has the state of {len(state['step'])} tasks, and there are {T}")
            state["step"][k] += 1
        slots = {slot: [self.state[p][slot][k] for p in parameters] for slot in self.slots}
        steps = [float(self.state[p]["step"][k]) for p in parameters]
        numerators, denominators, factors = self.account(group, slots, gradients, sums or gradients, steps)
        if meter is not None:
            updates = torch._foreach_div(numerators, denominators)
            torch._foreach_mul_(updates, factors)
            meter.update(k, dict(zip(parameters, updates, strict=True)))
        torch._foreach_addcdiv_(parameters, numerators, denominators, factors)

    @abstractmethod
    def account(
        self,
        group: dict[str, Any],
        slots: dict[str, list[Tensor]],
        gradients: list[Tensor],
        squares: list[Tensor],
        steps: list[float],
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Advance one task's accounts; numerators, denominators and factors of the update.

        `squares` are the gradients whose squares are accumulated.
        """


def _where(group: Mapping[str, Any], shared: bool) -> list[Tensor]:
    """The parameters of a group that are shared, or those that are not."""
    return [p for p, is_shared in zip(group["params"], group["shared"], strict=True) if is_shared == shared]


class AdaTaskAdam(AdaTask):
    """Adam with first and second moments for each task."""

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: Iterable[Tensor],
        tasks: int | Sequence[str],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        """See `AdaTask` for the other arguments."""
        super().__init__(parameters, tasks, lr=lr, betas=betas, eps=eps, **more)

    def account(
        self,
        group: dict[str, Any],
        slots: dict[str, list[Tensor]],
        gradients: list[Tensor],
        squares: list[Tensor],
        steps: list[float],
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """`m_k / (1 - b1^t)` over `sqrt(v_k / (1 - b2^t)) + eps`."""
        one, two = group["betas"]
        m, v = slots["exp_avg"], slots["exp_avg_sq"]
        torch._foreach_lerp_(m, gradients, 1 - one)
        torch._foreach_mul_(v, two)
        torch._foreach_addcmul_(v, squares, squares, 1 - two)
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, [(1 - two**t) ** 0.5 for t in steps])
        torch._foreach_add_(roots, group["eps"])
        return m, list(roots), [-(group["lr"] / (1 - one**t)) for t in steps]


class AdaTaskRMSprop(AdaTask):
    """RMSprop with a mean square for each task."""

    slots = ("square_avg",)

    def __init__(
        self,
        parameters: Iterable[Tensor],
        tasks: int | Sequence[str],
        *,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        """See `AdaTask` for the other arguments."""
        super().__init__(parameters, tasks, lr=lr, alpha=alpha, eps=eps, **more)

    def account(
        self,
        group: dict[str, Any],
        slots: dict[str, list[Tensor]],
        gradients: list[Tensor],
        squares: list[Tensor],
        steps: list[float],
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """`g_k` over `sqrt(v_k) + eps`."""
        v = slots["square_avg"]
        torch._foreach_mul_(v, group["alpha"])
        torch._foreach_addcmul_(v, squares, squares, 1 - group["alpha"])
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, group["eps"])
        return gradients, list(roots), [-group["lr"]] * len(steps)


class AdaTaskAdagrad(AdaTask):
    """AdaGrad with a sum of squares for each task."""

    slots = ("sum",)

    def __init__(
        self,
        parameters: Iterable[Tensor],
        tasks: int | Sequence[str],
        *,
        lr: float = 1e-2,
        eps: float = 1e-10,
        **more: Any,
    ) -> None:
        """See `AdaTask` for the other arguments."""
        super().__init__(parameters, tasks, lr=lr, eps=eps, **more)

    def account(
        self,
        group: dict[str, Any],
        slots: dict[str, list[Tensor]],
        gradients: list[Tensor],
        squares: list[Tensor],
        steps: list[float],
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """`g_k` over `sqrt(v_k) + eps`."""
        v = slots["sum"]
        torch._foreach_addcmul_(v, squares, squares, 1)
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, group["eps"])
        return gradients, list(roots), [-group["lr"]] * len(steps)


OPTIMIZERS: dict[str, type[AdaTask]] = {"adam": AdaTaskAdam, "rmsprop": AdaTaskRMSprop, "adagrad": AdaTaskAdagrad}


class AUMeter:
    """Which task moves which shared parameter: decaying averages of the tasks' squared updates (AU).

    Hang it on an optimizer of this module: `optimizer.meter = AUMeter(model.named_parameters(), optimizer.tasks)`. With
    `accumulators="shared"` it measures the ordinary optimizer. A parameter's share of task k is
    `AU_k / sum_j AU_j`: 1/T for all where they are even, near 1 where k dominates.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], tasks: Sequence[str], *, gamma: float = 0.99) -> None:
        if not 0 <= gamma < 1:
            raise ConfigError(f"gamma is {gamma}", hint="it lies in [0, 1)")
        self.names = {id(p): name for name, p in parameters}
        self.tasks, self.gamma = list(tasks), gamma
        self.au: dict[str, Tensor] = {}

    def update(self, task: int, updates: Mapping[Tensor, Tensor]) -> None:
        """`AU_k <- gamma AU_k + (1 - gamma) u_k^2` for the parameters moved."""
        for parameter, u in updates.items():
            name = self.names.get(id(parameter), f"parameter of shape {tuple(parameter.shape)}")
            if name not in self.au:
                self.au[name] = u.new_zeros((len(self.tasks), *u.shape))
            self.au[name][task].mul_(self.gamma).addcmul_(u, u, value=1 - self.gamma)

    def shares(self) -> dict[str, Tensor]:
        """The share of each task `(T, *shape)` in each parameter; even where nothing moved. They sum to 1 over tasks."""
        found = {}
        for name, au in self.au.items():
            total = au.sum(0)
            found[name] = torch.where(total > 0, au / total.clamp(min=torch.finfo(au.dtype).tiny), 1 / len(self.tasks))
        return found

    def report(self) -> dict[str, dict[str, float]]:
        """The mean share of each task by tensor of parameters, and over all of them (`all shared`)."""
        shares = self.shares()
        found = {
            name: dict(zip(self.tasks, share.flatten(1).mean(1).tolist(), strict=True))
            for name, share in shares.items()
        }
        if shares:
            every = torch.cat([share.flatten(1) for share in shares.values()], 1)
            found["all shared"] = dict(zip(self.tasks, every.mean(1).tolist(), strict=True))
        return found

    def imbalance(self) -> float:
        """Mean over shared values of the largest task's share: 1/T where even, 1 where one task dominates."""
        shares = self.shares()
        if not shares:
            return 1 / len(self.tasks)
        return float(torch.cat([share.flatten(1) for share in shares.values()], 1).amax(0).mean())

    def plot(self, path: Any) -> None:
        """A histogram of the shares of each task over all shared values, with the even share marked, into a file.

        Raises:
            ConfigError: nothing was measured yet.
        """
        if not self.au:
            raise ConfigError("the meter has seen no update", hint="set optimizer.meter before training")
        from matplotlib.figure import Figure

        every = torch.cat([share.flatten(1) for share in self.shares().values()], 1).numpy()
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for task, share in zip(self.tasks, every, strict=True):
            axes.hist(share, bins=40, range=(0, 1), histtype="step", label=task)
        axes.axvline(1 / len(self.tasks), color="grey", linestyle=":", label="even")
        axes.set(xlabel="share of the squared updates", ylabel="shared values")
        axes.legend()
        figure.savefig(path)
