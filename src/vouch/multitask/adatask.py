"""AdaTask: adaptive optimizers that keep accounts by task, and a meter of which task dominates which parameter.

Source: AdaTask: A Task-Aware Adaptive Learning Rate Approach to Multi-Task Learning, arXiv 2211.15055. An adaptive
optimizer divides a parameter's gradient by the root of its accumulated squares. Where tasks share the parameter, the
task with the largest gradients fills that accumulator and shrinks the steps of all others. Here each task has its own
accumulator on each shared parameter; parameters of one task see the ordinary optimizer:

    optimizer = AdaTaskAdam(model.parameters(), tasks=3, lr=1e-3)
    optimizer.step([click_loss, like_loss, watch_loss])      # in place of backward() and step()

What differs from the released code, and what the paper leaves open:

- One backward pass a task gives the gradients of the shared parameters and of the task's own.
- A task without a loss in a step, and a parameter that a task does not reach, keep that account as it was.
- What is shared is learned as training goes: when a second task reaches a parameter, its state becomes the first one's.
- Weight decay is decoupled and applied once; clipping is by task. `.grad` is neither read nor set.
- The share of a task is measured by a decaying mean of squared updates, without a root, gamma 0.99.

Every task moves the shared part by about the learning rate, so it moves up to T times as fast as with the ordinary
optimizer: compare at `lr / T`, or with the ordinary optimizer at `lr * T`. The rate is taken as given, not divided.

Shapes: `T` tasks; the state of a shared parameter has `T` in front, that of one task's parameter 1.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vouch.errors import ConfigError, TrainingError
from vouch.multitask.gradients import MaybeLosses, by_name, finite, not_given, reached, task_names

Gradients = list[list[Tensor | None]]
"""For each task its gradients of the shared parameters, None where it has no part in one."""
LIMITS = {"lr": math.inf, "eps": math.inf, "weight_decay": math.inf, "betas": 1.0, "alpha": 1.0}
"""Settings lie at or above 0 and below these."""


class AdaTask(torch.optim.Optimizer):
    """What the three optimizers share: gradients by task, their accounts, and one update that sums over tasks."""

    slots: tuple[str, ...]
    """Names of the accumulators; the last one's are of squares."""

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        tasks: int | Sequence[str],
        defaults: dict[str, Any],
        *,
        shared: Iterable[Tensor] | None = None,
        accumulators: Literal["task", "shared"] = "task",
        weights: Sequence[float] | None = None,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
    ) -> None:
        """Take all trained parameters and the tasks; give `model.named_parameters()`, and messages name them.

        Args:
            tasks: their names or their number.
            defaults: the settings of one kind of optimizer.
            shared: the parameters with accounts by task; those that two losses or more reach, unless given.
            accumulators: `shared` is the ordinary optimizer, with the tasks' parts of its steps kept apart for `meter`.
            weights: fixed weights of the losses `(T,)`. With accounts by task they do nothing to the shared part.
            weight_decay: decoupled, times the learning rate.
            max_norm: longest gradient of one task on all its parameters.

        Raises:
            ConfigError: there is no task or parameter, a parameter of `shared` is not among `parameters`, or a setting
                is out of bounds.
        """
        self.tasks = task_names(tasks)
        self.weights = [1.0] * len(self.tasks) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(self.tasks):
            raise ConfigError(f"{len(self.weights)} weights for {len(self.tasks)} tasks")
        if not all(map(math.isfinite, self.weights)):
            raise ConfigError(f"the weights are {self.weights}", hint="give a number for each task")
        if accumulators not in ("task", "shared"):
            raise ConfigError(f"accumulators is {accumulators!r}", hint="use 'task' or 'shared'")
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"max_norm is {max_norm}", hint="it is above 0; None does not clip")
        defaults = {**defaults, "weight_decay": weight_decay}
        for name, value in defaults.items():
            for each in value if isinstance(value, tuple) else (value,):
                if not 0 <= each < LIMITS[name]:
                    raise ConfigError(f"{name} is {value}", hint=f"it lies in [0, {LIMITS[name]})")
        every: list[Any] = list(parameters)
        if not every:
            raise ConfigError("there are no parameters to train")
        self.accumulators, self.max_norm = accumulators, max_norm
        self.given = None if shared is None else {id(p) for p in shared}
        self.meter: AUMeter | None = None
        super().__init__(every, defaults)
        strangers = (self.given or set()) - {id(p) for group in self.param_groups for p in group["params"]}
        if strangers:
            raise ConfigError(
                f"{len(strangers)} of the shared parameters are not among the parameters of the optimizer",
                hint="give all trained parameters, and in `shared` some of them",
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As that of PyTorch's optimizers. A group also notes which of its parameters are shared, and whose the others are."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["tasks"] = self.tasks
        group["shared"] = [self.given is not None and id(p) in self.given for p in group["params"]]
        group["owner"] = [None] * len(group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of PyTorch's optimizers.

        Raises:
            ConfigError: the state is of other tasks, or of tasks in another order.
        """
        for group in state_dict["param_groups"]:
            if list(group["tasks"]) != self.tasks:
                raise ConfigError(f"the state is of the tasks {group['tasks']}, and the optimizer has {self.tasks}")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; PyTorch's would keep no attribute."""
        mine = ("tasks", "weights", "accumulators", "max_norm", "given", "meter")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in mine}}

    def step(  # type: ignore[override]
        self,
        losses: MaybeLosses,
        *,
        transform: Callable[[Gradients], Gradients] | None = None,
        scale: float = 1.0,
    ) -> bool:
        """One update from the losses of one forward pass; the graph is freed.

        Args:
            losses: a scalar for each task, by name, in a list or stacked. A task that is None or left out keeps its
                state; without any, nothing happens.
            transform: changes the gradients of the shared parameters of all tasks first, e.g. into directions without
                conflict. What it makes of those of a task without a loss is not used.
            scale: the factor on the losses in mixed precision; gradients are divided by it.

        Returns:
            Whether there was a step: with a `scale`, an overflow in one task's gradient skips all of it.

        Raises:
            ConfigError: a loss is of no known task or reaches a parameter that is not in `shared`, the number of tasks
                has changed, or no loss depends on a parameter.
            TrainingError: a loss or a gradient is not a finite number; names the task.
        """
        found = {task: loss for task, loss in by_name(losses, self.tasks).items() if loss is not None}
        if not found:
            return False
        finite(found)
        places = [self.tasks.index(task) for task in found]
        values = [self.weights[k] * loss for k, loss in zip(places, found.values(), strict=True)]
        every = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        reach = reached(values, every)
        if not any(reach):
            raise ConfigError("no loss depends on a parameter", hint="compute the losses with gradients enabled")
        missed = 0 if self.state else not_given(values, every)
        if missed:
            what = f"the losses reach {missed} parameters that the optimizer was not given"
            warnings.warn(f"{what}; give it all that are trained", stacklevel=3)
        self._note({id(p): {places[k] for k in by} for p, by in zip(every, reach, strict=True)})
        shared = [p for group in self.param_groups for p in _where(group, True) if p.requires_grad]
        rows = self._gradients(values, every, reach, shared)
        if scale != 1.0:
            for row in rows:
                _multiply(row, 1 / scale)
            if not all(math.isfinite(_length(row)) for row in rows):
                return False
        if transform is not None:
            _transform(transform, rows, places, shared, len(self.tasks))
        for task, row in zip(found, rows, strict=True):
            length = _length(row)
            if not math.isfinite(length):
                raise TrainingError(f"the gradient of {task!r} is not a finite number", hint="lower the learning rate")
            if self.max_norm is not None and length > self.max_norm:
                _multiply(row, self.max_norm / length)
        with torch.no_grad():
            self._update(places, rows)
        return True

    def _note(self, reach: dict[int, set[int]]) -> None:
        """Learn which parameters are shared: those that more than one task has reached so far."""
        for group in self.param_groups:
            for at, p in enumerate(group["params"]):
                owner, found = group["owner"][at], reach.get(id(p), set())
                if group["shared"][at] or not found or found == {owner}:
                    continue
                by = found | {owner} - {None}
                if len(by) == 1:
                    (group["owner"][at],) = by
                elif self.given is not None:
                    name = group["param_names"][at] if "param_names" in group else f"a parameter of shape {(*p.shape,)}"
                    raise ConfigError(
                        f"{name} is reached by {', '.join(self.tasks[k] for k in sorted(by))}, but is not in `shared`"
                    )
                else:
                    group["shared"][at] = True
                    if self.state[p]:
                        self._widen(self.state[p], owner)

    def _widen(self, state: dict[str, Tensor], owner: int) -> None:
        """Make the state of one task's parameter that of a shared one."""
        together = ("step", self.slots[-1]) if self.accumulators == "shared" else ()
        for name, old in state.items():
            state[name] = old.new_zeros((len(self.tasks), *old.shape[1:]))
            state[name][slice(None) if name in together else owner] = old[0]

    def _gradients(
        self, losses: list[Tensor], every: list[Tensor], reach: list[set[int]], shared: list[Tensor]
    ) -> list[dict[int, Tensor]]:
        """By task those of the parameters that it has a part in; they may share memory."""
        rows: list[dict[int, Tensor]] = []
        is_shared = {id(p) for p in shared}
        for k, loss in enumerate(losses):
            mine = [*shared, *(p for p, by in zip(every, reach, strict=True) if k in by and id(p) not in is_shared)]
            rows.append({})
            if not loss.requires_grad or not mine:
                continue
            found = torch.autograd.grad(loss, mine, retain_graph=k < len(losses) - 1, allow_unused=True)
            for p, gradient in zip(mine, found, strict=True):
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise ConfigError(
                        f"the gradients of a table of shape {(*p.shape,)} are sparse", hint="make it with sparse=False"
                    )
                rows[-1][id(p)] = gradient.contiguous() if id(p) in is_shared else gradient
        return rows

    def _update(self, places: list[int], rows: list[dict[int, Tensor]]) -> None:
        """Advance the accounts, and move each parameter by the sum over its tasks."""
        size, moving = len(self.tasks), set().union(*rows)
        for group in self.param_groups:
            if group["weight_decay"]:
                moved = [p for p in group["params"] if id(p) in moving]
                if moved:
                    torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            own = {id(p): p for p in _where(group, False) if id(p) in moving}
            gradients = {at: row[at] for row in rows for at in own if at in row}
            self._move(group, list(own.values()), [gradients[at] for at in own], None, 0, 1)
            together = [p for p in _where(group, True) if id(p) in moving]
            by_task = dict(zip(places, rows, strict=True))
            total: dict[int, Tensor] = {}
            if self.accumulators == "shared":  # one account: a task that adds nothing to a gradient adds 0
                total = {id(p): torch.stack([row[id(p)] for row in rows if id(p) in row]).sum(0) for p in together}
                by_task = {
                    k: {id(p): by_task.get(k, {}).get(id(p), torch.zeros_like(p)) for p in together}
                    for k in range(size)
                }
            for k in range(size):
                row = by_task.get(k, {})
                moved = [p for p in together if id(p) in row]
                sums = [total[id(p)] for p in moved] if total else None
                updates = self._move(group, moved, [row[id(p)] for p in moved], sums, k, size)
                if self.meter is not None and together:
                    self.meter.update(k, {**dict.fromkeys(together), **updates})

    def _move(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        sums: list[Tensor] | None,
        k: int,
        T: int,
    ) -> dict[Tensor, Tensor]:
        """Move parameters by task k's part; the updates, where a meter asks for them.

        `sums` are the gradients of all tasks, where the account is shared.
        """
        if not parameters:
            return {}
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(T)
                state.update({slot: p.new_zeros((T, *p.shape)) for slot in self.slots})
            state["step"][k] += 1
        slots = {slot: [self.state[p][slot][k] for p in parameters] for slot in self.slots}
        steps = [float(self.state[p]["step"][k]) for p in parameters]
        numerators, denominators, factors = self.account(group, slots, gradients, sums or gradients, steps)
        updates: Sequence[Tensor] = ()
        if self.meter is not None:
            updates = torch._foreach_div(numerators, denominators)
            torch._foreach_mul_(updates, factors)
        torch._foreach_addcdiv_(parameters, numerators, denominators, factors)
        return dict(zip(parameters, updates, strict=False))

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


def _multiply(row: dict[int, Tensor], factor: float) -> None:
    """In new memory: autograd may give two parameters the same, or one a view."""
    if row:
        row.update(zip(row, torch._foreach_mul([*row.values()], factor), strict=True))


def _length(row: dict[int, Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm([*row.values()])))) if row else 0.0


def _transform(
    transform: Callable[[Gradients], Gradients],
    rows: list[dict[int, Tensor]],
    places: list[int],
    shared: list[Tensor],
    size: int,
) -> None:
    """Replace the gradients of shared parameters by what `transform` makes of those of all tasks."""
    given: Gradients = [[None] * len(shared) for _ in range(size)]
    for k, row in zip(places, rows, strict=True):
        given[k] = [row.pop(id(p), None) for p in shared]
    found = transform(given)
    for k, row in zip(places, rows, strict=True):
        row.update({id(p): g for p, g in zip(shared, found[k], strict=True) if g is not None})


def _where(group: Mapping[str, Any], shared: bool) -> list[Tensor]:
    """The parameters of a group that are shared, or those that are not."""
    return [p for p, is_shared in zip(group["params"], group["shared"], strict=True) if is_shared == shared]


class AdaTaskAdam(AdaTask):
    """Adam with first and second moments for each task."""

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        tasks: int | Sequence[str],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        """See `AdaTask` for the other arguments."""
        super().__init__(parameters, tasks, {"lr": lr, "betas": tuple(betas), "eps": eps}, **more)

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
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        tasks: int | Sequence[str],
        *,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        """See `AdaTask` for the other arguments."""
        super().__init__(parameters, tasks, {"lr": lr, "alpha": alpha, "eps": eps}, **more)

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
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        tasks: int | Sequence[str],
        *,
        lr: float = 1e-2,
        eps: float = 1e-10,
        **more: Any,
    ) -> None:
        """See `AdaTask` for the other arguments."""
        super().__init__(parameters, tasks, {"lr": lr, "eps": eps}, **more)

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


OPTIMIZERS: dict[str, Callable[..., AdaTask]] = {
    "adam": AdaTaskAdam,
    "rmsprop": AdaTaskRMSprop,
    "adagrad": AdaTaskAdagrad,
}


class AUMeter:
    """Which task moves which shared parameter: decaying averages of the tasks' squared updates (AU).

    Hang it on an optimizer of this module: `optimizer.meter = AUMeter(model.named_parameters(), optimizer.tasks)`. With
    `accumulators="shared"` it measures the ordinary optimizer. A parameter's share of task k is
    `AU_k / sum_j AU_j`: 1/T for all where they are even, near 1 where k dominates.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], tasks: Sequence[str], *, gamma: float = 0.99) -> None:
        if not 0 <= gamma < 1:
            raise ConfigError(f"gamma is {gamma}", hint="it lies in [0, 1)")
        self.names = {p: name for name, p in parameters}
        self.tasks, self.gamma = list(tasks), gamma
        self.au: dict[str, Tensor] = {}

    def update(self, task: int, updates: Mapping[Tensor, Tensor | None]) -> None:
        """`AU_k <- gamma AU_k + (1 - gamma) u_k^2` for the parameters moved; None where task k did not move one."""
        for parameter, u in updates.items():
            name = self.names.setdefault(parameter, f"parameter {len(self.names)} of shape {(*parameter.shape,)}")
            if name not in self.au:
                self.au[name] = parameter.new_zeros((len(self.tasks), *parameter.shape))
            mine = self.au[name][task].mul_(self.gamma)
            if u is not None:
                mine.addcmul_(u, u, value=1 - self.gamma)

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
        if shares:
            shares["all shared"] = _together(shares)
        return {
            name: dict(zip(self.tasks, share.reshape(len(share), -1).mean(1).tolist(), strict=True))
            for name, share in shares.items()
        }

    def imbalance(self) -> float:
        """Mean over shared values of the largest task's share: 1/T where even, 1 where one task dominates."""
        shares = self.shares()
        if not shares:
            return 1 / len(self.tasks)
        return float(_together(shares).amax(0).mean())

    def plot(self, path: Any) -> None:
        """A histogram of the shares of each task over all shared values, with the even share marked, into a file.

        Raises:
            ConfigError: nothing was measured yet.
        """
        if not self.au:
            raise ConfigError("the meter has seen no update", hint="set optimizer.meter before training")
        from matplotlib.figure import Figure

        every = _together(self.shares()).float().cpu().numpy()
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for task, share in zip(self.tasks, every, strict=True):
            axes.hist(share, bins=40, range=(0, 1), histtype="step", label=task)
        axes.axvline(1 / len(self.tasks), color="grey", linestyle=":", label="even")
        axes.set(xlabel="share of the squared updates", ylabel="shared values")
        axes.legend()
        figure.savefig(path)


def _together(shares: Mapping[str, Tensor]) -> Tensor:
    """Shares of all shared values side by side `(T, n)`."""
    return torch.cat([share.reshape(len(share), -1) for share in shares.values()], 1)
