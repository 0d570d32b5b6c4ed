"""Training a network on several tasks: losses by task, a balancer or AdaTask, the best epoch by mean AUC."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError
from vouch.multitask import balancers
from vouch.multitask.adatask import OPTIMIZERS, AdaTask, AUMeter
from vouch.multitask.balancers import Balancer
from vouch.multitask.metrics import auc, gauc, rmse
from vouch.multitask.table import TaskTable
from vouch.training import FitReport, Run, TrainConfig, fit, seeded

READ = 8192
"""Rows predicted at once."""


class TaskBatch(NamedTuple):
    """Inputs as the network takes them, and labels `(B, T)`, NaN where unknown."""

    inputs: Any
    label: Tensor


class TableBatches:
    """Random batches of a table's rows that have a label. With several processes each takes every `world`-th row of a batch."""

    def __init__(self, table: TaskTable, batch_size: int) -> None:
        labelled = ~np.isnan(table.label).all(1)
        if not labelled.any():
            raise DataError("no row of the table has a label of any task")
        table = table if labelled.all() else table.rows(labelled)
        self.codes, self.label = torch.from_numpy(table.codes), torch.from_numpy(table.label)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.codes) / self.batch_size)

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[TaskBatch]:
        """One pass."""
        order = torch.from_numpy(generator.permutation(len(self.codes)))
        for rows in order.split(self.batch_size):
            mine = rows[rank::world]
            yield TaskBatch(self.codes[mine], self.label[mine])


def task_losses(
    output: Sequence[Tensor], label: Tensor, tasks: Sequence[str], binary: Sequence[bool]
) -> dict[str, Tensor]:
    """Mean loss of each task over its labelled rows: cross-entropy of logits, or squared error.

    A task without a labelled row is left out. One output `(B,)` a task, labels `(B, T)`.
    """
    found = {}
    known = ~torch.isnan(label)
    for k, task in enumerate(tasks):
        rows = known[:, k]
        if bool(rows.any()):
            out, target = output[k][rows].float(), label[rows, k]
            found[task] = F.binary_cross_entropy_with_logits(out, target) if binary[k] else F.mse_loss(out, target)
    return found


class Learner(nn.Module):
    """A network with its tasks, as `fit` trains it; it returns one output `(B,)` a task.

    Values of tasks that are not binary are taken in standard units.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, network: nn.Module, table: TaskTable) -> None:
        super().__init__()
        self.network, self.tasks, self.binary = network, table.tasks, table.binary
        self.balancer: Balancer | None = None
        unknown = [task for task, column in zip(table.tasks, table.label.T, strict=True) if np.isnan(column).all()]
        if unknown:
            raise DataError(f"the task {unknown[0]!r} has no label in training", hint="leave it out of `tasks`")
        plain = torch.tensor(table.binary)
        mean, spread = np.nanmean(table.label, 0), np.nanstd(table.label, 0)
        self.register_buffer("mean", torch.where(plain, 0.0, torch.from_numpy(mean)))
        self.register_buffer("spread", torch.where(plain, 1.0, torch.from_numpy(np.maximum(spread, 1e-6))))

    def begin_epoch(self, epoch: int) -> None:
        """Tell the balancer that an epoch has ended."""
        if self.balancer is not None and epoch > 1:
            self.balancer.end_epoch()

    def get_extra_state(self) -> Tensor:
        """The balancer's state as bytes of JSON, so that a resumed training goes on with it."""
        found = None if self.balancer is None else self.balancer.state_dict()
        return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take it back; without a balancer, as when predicting, there is nothing to do."""
        found = json.loads(bytes(state.tolist()))
        if self.balancer is not None and found is not None:
            self.balancer.load_state_dict(found)

    def losses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """The tasks' losses of a batch."""
        label = (batch.label - self.mean) / self.spread
        return task_losses(self.network(batch.inputs), label, self.tasks, self.binary)

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """Chances of binary tasks, expected values of the others, `(n, T)`."""
        out = torch.stack(self.network(inputs), 1).float()
        return torch.where(
            torch.tensor(self.binary, device=out.device), torch.sigmoid(out), out * self.spread + self.mean
        )


def scores(predicted: np.ndarray[Any, Any], table: TaskTable) -> dict[str, float]:
    """`AUC TASK` and `GAUC TASK` of binary tasks, `RMSE TASK` and `R2 TASK` of others, and the means `AUC`, `GAUC`, `R2`.

    What cannot be told (labels of one class, no two rows of a user) is left out, and has no part in a mean.
    """
    found: dict[str, float] = {}
    for k, (task, binary) in enumerate(zip(table.tasks, table.binary, strict=True)):
        rows = ~np.isnan(table.label[:, k])
        value, label = predicted[rows, k].astype(np.float64), table.label[rows, k].astype(np.float64)
        if not binary:
            found[f"RMSE {task}"] = rmse(value, label)
            found[f"R2 {task}"] = (
                1 - found[f"RMSE {task}"] ** 2 / label.var() if label.size and label.var() else math.nan
            )
            continue
        found[f"AUC {task}"] = auc(value, label)
        if table.group is not None:
            found[f"GAUC {task}"] = gauc(value, label, table.group[rows])
    found = {name: float(value) for name, value in found.items() if not math.isnan(value)}
    for name in ("AUC", "GAUC", "R2"):
        values = [value for key, value in found.items() if key.startswith(f"{name} ")]
        if values:
            found[name] = float(np.mean(values))
    return found


def predict(learner: Learner, table: TaskTable) -> np.ndarray[Any, Any]:
    """`(n, T)`, in pieces."""
    was = learner.training
    learner.eval()
    device = learner.mean.device
    pieces = [learner.predict(codes.to(device)).cpu() for codes in torch.from_numpy(table.codes).split(READ)]
    learner.train(was)
    return torch.cat(pieces).numpy()


def learn(
    learner: Learner,
    batches: Any,
    config: TrainConfig,
    run: Run | None = None,
    *,
    balancer: str = "uniform",
    optimizer: str = "adam",
    settings: dict[str, Any] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    meter: AUMeter | None = None,
    tell: dict[str, Any] | None = None,
) -> FitReport:
    """Train in place.

    Args:
        balancer: one of `vouch.multitask.balancers`, with its `settings`; or `adatask`, which is an optimizer of the
            kind that `optimizer` names.
        optimizer: `adam`, `rmsprop` or `adagrad`.
        meter: hung on the optimizer, where the balancer is `adatask`.
        tell: filled with `balancer` and `optimizer`, for those who want to look at them afterwards.

    Raises:
        ConfigError: a name is unknown, or there are several processes, whose gradients these methods do not share yet.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"there is no optimizer {optimizer!r}", hint=f"use one of {', '.join(OPTIMIZERS)}")
    run = run or Run()
    parameters = [p for p in learner.parameters() if p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    more = dict(settings or {})
    with seeded(run.seed):
        if balancer == "adatask":
            ada = OPTIMIZERS[optimizer](parameters, learner.tasks, lr=rate, weight_decay=decay, **more)
            ada.meter = meter
            step, stepping, chosen = _adatask_step(ada), ada, None
        else:
            chosen = balancers.make(balancer, learner.named_parameters(), tasks=learner.tasks, **more)
            learner.balancer = chosen
            kinds: dict[str, Any] = {
                "adam": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad
            }  # fmt: skip
            groups = [{"params": parameters, "weight_decay": decay}]
            if chosen.parameters():
                groups.append({"params": chosen.parameters(), "weight_decay": 0.0})
            stepping = kinds[optimizer](groups, lr=rate)
            step = _balanced_step(chosen)
        if tell is not None:
            tell.update(balancer=chosen, optimizer=stepping)
        return fit(learner, batches, config=config, run=run, optimizer=stepping, step=step, validate=validate)


def _one_process(fabric: Any) -> None:
    if fabric.world_size > 1:
        raise ConfigError("gradients by task are not shared among processes", hint="train with one process")


def _balanced_step(balancer: Balancer) -> Any:
    def step(model: Learner, batch: TaskBatch, optimizer: Any, fabric: Any) -> dict[str, Tensor]:
        _one_process(fabric)
        with fabric.autocast():
            losses = model.losses(batch)
        optimizer.zero_grad()
        balancer.backward(losses)
        optimizer.step()
        return _told(losses)

    return step


def _adatask_step(ada: AdaTask) -> Any:
    def step(model: Learner, batch: TaskBatch, optimizer: Any, fabric: Any) -> dict[str, Tensor]:
        del optimizer  # the same, wrapped
        _one_process(fabric)
        with fabric.autocast():
            losses = model.losses(batch)
        ada.step(losses)
        return _told(losses)

    return step


def _told(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {task: loss.detach() for task, loss in losses.items()}
    return {**found, "loss": torch.stack(list(found.values())).sum()}
