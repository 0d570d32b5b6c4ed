"""The training loop: batches in, `model.loss(batch)` out, an optimizer step; validation, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, StorageError, TrainingError, did_you_mean
from vouch.training.checkpoints import load_checkpoint, save_checkpoint
from vouch.training.devices import make_fabric, seeded
from vouch.training.logs import TrainingLog
from vouch.training.progress import EpochBar
from vouch.training.run import FitReport, Run, TrainConfig

FLUSH = 500
"""Steps between two looks at the losses: reading one waits for the device, so they are read together."""


EXTENDABLE = ("epochs", "patience", "adversarial_epochs")
"""Settings that a resumed run may change: they say when to stop, not what is learned."""


class Batches(Protocol):
    """What `fit` trains on."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[Any]:
        """This rank's share of each global batch: nested tuples, dicts or dataclasses of CPU tensors.

        Every rank draws the same global batches from the same generator. Losses are means over the *global* batch:
        where the number of targets varies, the batch carries the global count divided by `world`, and the loss is the
        local sum over that, so that the average over ranks is the global mean.
        """
        ...


Step = Callable[[Any, Any, torch.optim.Optimizer, Any], dict[str, Tensor]]


@dataclass
class _Progress:
    """The loop's own numbers, as they go into a checkpoint."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_value: float | None = None
    waited: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    config: TrainConfig,
    run: Run | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    step: Step | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    schedule: Callable[[int], float] | None = None,
) -> FitReport:
    """Train `model` in place; at the end it holds the weights of the best epoch (the last, without validation).

    Args:
        model: has `loss(batch) -> dict[str, Tensor]` of named scalars; their sum is minimised.
        batches: see `Batches`.
        config: epochs, learning rate, early stopping.
        run: seed, device, precision, folder for checkpoints and log, resume.
        optimizer: AdamW over all parameters by default.
        step: replaces loss, backward and optimizer step, for alternating and adversarial schemes:
            `step(model, batch, optimizer, fabric) -> dict[str, Tensor]` of what to log.
        validate: gives metrics; called with the model in evaluation mode, on the first process only.
        schedule: factor on the learning rate at each step, counted from 0.

    Raises:
        TrainingError: there is no batch, or a loss is not a number (names the epoch and the step).
        ConfigError: `config.monitor` is not among the metrics, or a resumed run had other settings.
        StorageError: a checkpoint cannot be written or read.
        KeyboardInterrupt: passed on after the best weights are back in the model; the last finished epoch is on disk.
    """
    run = run or Run()
    if len(batches) == 0:
        raise TrainingError("there is nothing to train on: the log gives no batch", hint="check filters and split")
    with seeded(run.seed):
        fabric = make_fabric(run)
        return _Loop(model, batches, config, run, fabric, optimizer, step, validate, schedule).go()


class _Loop:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainConfig,
        run: Run,
        fabric: Any,
        optimizer: torch.optim.Optimizer | None,
        step: Step | None,
        validate: Callable[[], Mapping[str, float]] | None,
        schedule: Callable[[int], float] | None,
    ) -> None:
        self.raw, self.batches, self.config, self.run, self.fabric = model, batches, config, run, fabric
        self.validate, self.schedule, self.step = validate, schedule, step or self._plain_step
        if optimizer is None:
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
        self.model = fabric.setup_module(model)
        if hasattr(model, "loss"):
            self.model.mark_forward_method("loss")
        self.raw_optimizer, self.optimizer = optimizer, fabric.setup_optimizers(optimizer)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.state = _Progress()
        self.best: dict[str, Tensor] | None = None

    def go(self) -> FitReport:
        if self.run.resume:
            self._resume()
        path = None if self.run.path is None or self.fabric.global_rank else self.run.path / "log.jsonl"
        settings = self.config.model_dump(mode="json")
        with TrainingLog(path, mlflow=self.run.mlflow, settings=settings, keep=self.state.epoch) as log:
            try:
                while (stopped := self._why_stop()) is None:
                    self._epoch(log)
            finally:  # also after Ctrl-C, which then goes on to the caller
                if self.best is not None:
                    self.raw.load_state_dict(self.best)
        state = self.state
        return FitReport(
            seconds=state.seconds,
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            monitor=self.config.monitor if self.validate else None,
            best_value=state.best_value,
            stopped=stopped,
            history=state.history,
        )

    def _why_stop(self) -> str | None:
        if self.state.waited >= self.config.patience:
            return "patience"
        if self.state.epoch >= self.config.epochs:
            return "finished"
        if self.run.max_seconds is not None and self.state.seconds >= self.run.max_seconds:
            return "time"
        return None

    def _epoch(self, log: TrainingLog) -> None:
        state, begin = self.state, time.perf_counter()
        number = state.epoch + 1
        generator = np.random.default_rng([self.run.seed, number])
        self.model.train()
        total: dict[str, float] = {}
        pending: list[dict[str, Tensor]] = []
        rank, world = self.fabric.global_rank, self.fabric.world_size
        with EpochBar(self.run.progress and rank == 0, number, self.config, len(self.batches), state.history) as bar:
            for batch in self.batches.epoch(generator, rank, world):
                if self.schedule is not None:
                    for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                        group["lr"] = rate * self.schedule(state.step)
                losses = self.step(self.model, self.fabric.to_device(batch), self.optimizer, self.fabric)
                pending.append({name: value.detach() for name, value in losses.items()})
                state.step += 1
                bar.advance()
                if len(pending) == FLUSH:
                    self._flush(log, pending, total, number)
            self._flush(log, pending, total, number)
        row: dict[str, Any] = {"epoch": number, **{name: value / len(self.batches) for name, value in total.items()}}
        improved = False
        if self.validate is not None and (number % self.config.evaluate_every == 0 or number == self.config.epochs):
            metrics = self._validate()
            row.update(metrics)
            improved = self._judge(metrics, number)
        state.epoch = number
        elapsed = time.perf_counter() - begin
        state.seconds += elapsed
        row["seconds"] = elapsed
        state.history.append(row)
        metrics_row = {k: v for k, v in row.items() if k not in ("epoch", "seconds")}
        log.write([{"step": state.step, "epoch": number, "seconds": elapsed, "metrics": metrics_row}])
        self._save(improved)

    def _plain_step(self, model: Any, batch: Any, optimizer: torch.optim.Optimizer, fabric: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model.loss(batch)
        total = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        optimizer.zero_grad()
        fabric.backward(total)
        if self.config.max_grad_norm:
            fabric.clip_gradients(model, optimizer, max_norm=self.config.max_grad_norm)
        optimizer.step()
        return losses if "loss" in losses else {"loss": total, **losses}

    def _flush(self, log: TrainingLog, pending: list[dict[str, Tensor]], total: dict[str, float], epoch: int) -> None:
        if not pending:
            return
        names = list(pending[0])
        values = torch.stack([torch.stack([row[name].float() for name in names]) for row in pending])
        if self.fabric.world_size > 1:
            values = self.fabric.all_reduce(values, reduce_op="mean")
        rows = []
        first = self.state.step - len(pending) + 1
        for offset, numbers in enumerate(values.tolist()):
            bad = [name for name, number in zip(names, numbers, strict=True) if not math.isfinite(number)]
            if bad:
                raise TrainingError(
                    f"{bad[0]!r} is not a number at epoch {epoch}, step {first + offset}",
                    hint="lower learning_rate, set max_grad_norm, or train with --precision 32",
                )
            rows.append({"step": first + offset, "epoch": epoch, **dict(zip(names, numbers, strict=True))})
            for name, number in zip(names, numbers, strict=True):
                total[name] = total.get(name, 0.0) + number
        log.write(rows)
        pending.clear()

    def _validate(self) -> dict[str, float]:
        assert self.validate is not None
        metrics: dict[str, float] = {}
        if self.fabric.global_rank == 0:
            self.raw.eval()
            with torch.no_grad():
                metrics = {name: float(value) for name, value in self.validate().items()}
            self.raw.train()
        if self.fabric.world_size > 1:
            metrics = self.fabric.broadcast(metrics, src=0)
        if self.config.monitor not in metrics:
            raise ConfigError(
                f"monitor is {self.config.monitor!r}, which validation does not give",
                hint=did_you_mean(self.config.monitor, metrics),
            )
        return metrics

    def _judge(self, metrics: Mapping[str, float], epoch: int) -> bool:
        value, state = metrics[self.config.monitor], self.state
        if state.best_value is not None and not value > state.best_value:
            state.waited += 1
            return False
        state.best_value, state.best_epoch, state.waited = value, epoch, 0
        self.best = {name: tensor.detach().clone() for name, tensor in self.raw.state_dict().items()}
        return True

    def _save(self, improved: bool) -> None:
        if self.run.path is None:
            return
        if self.fabric.global_rank == 0:
            progress = {**vars(self.state), "config": self.config.model_dump(mode="json"), "seed": self.run.seed}
            save_checkpoint(self.run.path / "checkpoints" / "last", self.raw, self.raw_optimizer, progress)
            if improved:
                save_checkpoint(self.run.path / "checkpoints" / "best", self.raw, self.raw_optimizer, progress)
        self.fabric.barrier()

    def _resume(self) -> None:
        if self.run.path is None:
            raise ConfigError("resuming needs the folder of the run", hint="give --out")
        folder = self.run.path / "checkpoints"
        if not (folder / "last" / "checkpoint.json").exists():
            return  # stopped before the first epoch ended: begin anew
        found = load_checkpoint(folder / "last")
        progress = dict(found.progress)
        before, now = progress.pop("config"), self.config.model_dump(mode="json")
        changed = [k for k in now if k not in EXTENDABLE and before.get(k) != now[k]]
        if changed or progress.pop("seed") != self.run.seed:
            name = changed[0] if changed else "seed"
            raise ConfigError(
                f"the run in {self.run.path.name!r} was started with another {name!r}",
                where=str(self.run.path),
                hint="resume with the same settings, or choose another --out",
            )
        try:
            self.raw.load_state_dict(found.model)
            self.raw_optimizer.load_state_dict(found.optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            raise StorageError(f"the checkpoint does not fit this model: {error}", where=str(folder)) from error
        torch.set_rng_state(found.random)
        self.state = _Progress(**progress)
        if self.state.best_value is not None:
            self.best = load_checkpoint(folder / "best").model
