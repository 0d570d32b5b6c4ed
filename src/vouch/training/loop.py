"""The training loop: batches in, `model.loss(batch)` out, an optimizer step; validation, checkpoints, resume."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, StorageError, TrainingError, did_you_mean
from vouch.training.checkpoints import HEADER, load_checkpoint, save_checkpoint
from vouch.training.devices import make_fabric, seed_of, seeded, share_gradients, to_device
from vouch.training.logs import TrainingLog
from vouch.training.progress import ProgressBar
from vouch.training.run import FitReport, Run, TrainConfig

FLUSH = 500
"""Steps between two looks at the losses: reading one waits for the device, so they are read together."""
SAVING_SHARE = 0.05
"""Most of the time that checkpoints may take: where epochs last milliseconds, not every one is saved."""


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

    Every epoch is seeded from `(run.seed, epoch, process)`, numpy and torch alike, so a run that was killed and
    resumed equals one that was not, bit for bit on a CPU. The random state outside is left as it was.

    Args:
        model: has `loss(batch) -> dict[str, Tensor]` of named scalars; their sum is minimised, and logged as `loss`.
            Where it has `begin_epoch(number)`, that is called before each epoch, counted from 1.
        batches: see `Batches`.
        config: epochs, learning rate, early stopping.
        run: seed, device, precision, folder for checkpoints and log, resume.
        optimizer: AdamW over all parameters by default.
        step: replaces loss, backward and optimizer step, for alternating and adversarial schemes:
            `step(model, batch, optimizer, fabric) -> dict[str, Tensor]` of what to log. It computes losses within
            `fabric.autocast()`, and `optimizer.step()` averages the gradients over the processes; parameters without
            a gradient are left alone, so one optimizer (with groups) serves several players.
        validate: gives metrics, of which a higher `config.monitor` is better; called with the model in evaluation
            mode, without gradients, on the first process only.
        schedule: factor on the learning rate at each step, counted from 0.

    Raises:
        TrainingError: there is no batch, or a loss or the monitored metric is not a number (names epoch and step).
        ConfigError: `config.monitor` is not among the metrics, or a resumed run had other settings or data.
        StorageError: a checkpoint cannot be written or read; the last one written stays usable.
        KeyboardInterrupt: passed on after the best weights are back in the model. The checkpoint of the last epoch
            saved is on disk for `run.resume`.
    """
    run = run or Run()
    if len(batches) == 0:
        raise TrainingError("there is nothing to train on: the log gives no batch", hint="check filters and split")
    with seeded(run.seed):
        fabric = make_fabric(run)
        return _Loop(model, batches, config, run, fabric, optimizer, step, validate, schedule).go()


class _Loop:
    """One call of `fit`. `raw` is the model itself, `model` what Fabric made of it."""

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
        self.first, self.world = fabric.global_rank == 0, fabric.world_size
        if step is None:
            self.model = fabric.setup_module(model)
            self.model.mark_forward_method("loss")  # so that DDP sees it
        else:
            self.model = model.to(fabric.device)
        if optimizer is None:
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
        for slots in optimizer.state.values():  # made before the model moved
            slots.update(
                {name: value if name == "step" else to_device(value, fabric.device) for name, value in slots.items()}
            )
        if step is not None:
            share_gradients(model, optimizer, fabric)
        self.raw_optimizer, self.optimizer = optimizer, fabric.setup_optimizers(optimizer)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.folder = None if run.path is None else Path(run.path) / "checkpoints"
        self.state = _Progress()
        self.best: dict[str, Tensor] | None = None
        self.best_saved = 0
        self.saved_at, self.saving = -math.inf, 0.0

    def go(self) -> FitReport:
        if self.run.resume:
            self._resume()
        elif self.folder is not None and self.first:
            shutil.rmtree(self.folder, ignore_errors=True)  # another run's
        state, run = self.state, self.run
        path = None if run.path is None or not self.first else Path(run.path) / "log.jsonl"
        settings = self.config.model_dump(mode="json")
        mlflow = run.mlflow if self.first else None
        with (
            TrainingLog(path, mlflow=mlflow, settings=settings, keep=state.epoch) as log,
            ProgressBar(run.progress and self.first, self.config, len(self.batches), done=state.epoch) as bar,
        ):
            try:
                while (stopped := self._why_stop()) is None:
                    self._epoch(log, bar)
                    self._save(last=self._why_stop() is not None)
            finally:  # also after Ctrl-C, which then goes on to the caller
                if self.best is not None:
                    self.raw.load_state_dict(self.best)
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
        if self.run.max_seconds is not None and self.state.epoch and self.state.seconds >= self.run.max_seconds:
            return "time"
        return None

    def _epoch(self, log: TrainingLog, bar: ProgressBar) -> None:
        state, begin = self.state, time.perf_counter()
        number, rank = state.epoch + 1, self.fabric.global_rank
        torch.manual_seed(seed_of(self.run.seed, number, rank))
        moves = self.fabric.device.type != "cpu"
        losses = _Losses(self.fabric, log, number, state.step)
        self.model.train()
        begin_epoch: Callable[[int], None] | None = getattr(self.raw, "begin_epoch", None)
        if begin_epoch is not None:
            begin_epoch(number)
        for batch in self.batches.epoch(np.random.default_rng([self.run.seed, number]), rank, self.world):
            if self.schedule is not None:
                for group, rate in zip(self.raw_optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * self.schedule(state.step)
            batch = to_device(batch, self.fabric.device) if moves else batch
            losses.add(self.step(self.model, batch, self.optimizer, self.fabric))
            state.step += 1
            bar.advance()
        row: dict[str, Any] = {"epoch": number, **losses.means()}
        if self.validate is not None and (number % self.config.evaluate_every == 0 or number == self.config.epochs):
            row.update(self._validate(number))
            self._judge(row[self.config.monitor], number)
        seconds = time.perf_counter() - begin
        if self.world > 1:  # all must agree on when to stop
            seconds = self.fabric.broadcast(seconds, src=0)
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        log.write([{"step": state.step, "epoch": number, "seconds": seconds, "metrics": metrics}])
        state.epoch, state.seconds = number, state.seconds + seconds
        state.history.append({**row, "seconds": seconds})
        bar.epoch_done(row, state.best_value, state.best_epoch)

    def _plain_step(self, model: Any, batch: Any, optimizer: torch.optim.Optimizer, fabric: Any) -> dict[str, Tensor]:
        with fabric.autocast():
            losses: dict[str, Tensor] = model.loss(batch)
        total = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        optimizer.zero_grad()
        fabric.backward(total)
        if self.config.max_grad_norm:
            # A norm that is not a number shows in the next loss; asking for it here would wait for the device.
            fabric.clip_gradients(model, optimizer, max_norm=self.config.max_grad_norm, error_if_nonfinite=False)
        optimizer.step()
        return {**losses, "loss": total}

    def _validate(self, epoch: int) -> dict[str, Any]:
        """The metrics of this epoch, on every process; those that are not a number (but are not watched) as None."""
        assert self.validate is not None
        metrics: dict[str, Any] = {}
        if self.first:
            self.raw.eval()
            with torch.no_grad():
                found = {name: float(value) for name, value in self.validate().items()}
            metrics = {name: value if math.isfinite(value) else None for name, value in found.items()}
            self.raw.train()
        if self.world > 1:
            metrics = self.fabric.broadcast(metrics, src=0)
        monitor = self.config.monitor
        if monitor not in metrics:
            raise ConfigError(
                f"monitor is {monitor!r}, which validation does not give", hint=did_you_mean(monitor, metrics)
            )
        if metrics[monitor] is None:
            raise TrainingError(
                f"{monitor} is not a number after epoch {epoch}",
                hint="lower learning_rate, set max_grad_norm, or train with --precision 32",
            )
        return metrics

    def _judge(self, value: float, epoch: int) -> None:
        state = self.state
        if state.best_value is not None and value <= state.best_value:
            state.waited += 1
            return
        state.best_value, state.best_epoch, state.waited = value, epoch, 0
        self.best = {name: tensor.detach().clone() for name, tensor in self.raw.state_dict().items()}

    def _save(self, *, last: bool) -> None:
        begin = time.perf_counter()
        if self.folder is None or not self.first or not (last or begin >= self.saved_at + self.saving / SAVING_SHARE):
            return
        state = self.state
        progress = {**vars(state), **self._identity()}
        if self.best is not None and self.best_saved != state.best_epoch:
            save_checkpoint(self.folder / "best", self.best, {"epoch": state.best_epoch, "value": state.best_value})
            self.best_saved = state.best_epoch
        save_checkpoint(self.folder / "last", self.raw.state_dict(), progress, self.raw_optimizer)
        self.saved_at = time.perf_counter()
        self.saving = self.saved_at - begin

    def _identity(self) -> dict[str, Any]:
        """What a run must share with the one it goes on from; when to stop is not part of it."""
        config = self.config.model_dump(mode="json")
        fixed = {name: value for name, value in config.items() if name != "patience" and not name.endswith("epochs")}
        return {"config": fixed, "seed": self.run.seed, "batches": len(self.batches)}

    def _resume(self) -> None:
        if self.folder is None:
            raise ConfigError("resuming needs the folder of the run", hint="give --out")
        if not (self.folder / "last" / HEADER).exists():
            return  # stopped before the first epoch ended: begin anew
        found = load_checkpoint(self.folder / "last")
        try:
            before = {name: found.progress.pop(name) for name in ("config", "seed", "batches")}
            _check_same(before, self._identity(), self.folder.parent)
            state = _Progress(**found.progress)
            self.raw.load_state_dict(found.model)
            self.raw_optimizer.load_state_dict(found.optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"the checkpoint does not fit this model: {error}", where=str(self.folder)) from error
        self.state = state
        if state.best_value is not None:
            best = load_checkpoint(self.folder / "best")
            self.best, self.best_saved = best.model, int(best.progress["epoch"])


class _Losses:
    """The losses of one epoch: kept on the device, read and logged some hundred steps at a time."""

    def __init__(self, fabric: Any, log: TrainingLog, epoch: int, step: int) -> None:
        self.fabric, self.log, self.epoch, self.step = fabric, log, epoch, step
        self.waiting: list[dict[str, Tensor]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        self.waiting.append({name: value.detach() for name, value in losses.items()})
        if len(self.waiting) == FLUSH:
            self.flush()

    def flush(self) -> None:
        """Read, log and sum up what waits.

        Raises:
            TrainingError: a loss is not a number.
        """
        if not self.waiting:
            return
        values = torch.stack([value.float() for row in self.waiting for value in row.values()])
        if self.fabric.world_size > 1:
            values = self.fabric.all_reduce(values, reduce_op="mean")
        numbers = iter(values.tolist())
        rows: list[dict[str, Any]] = []
        for names in self.waiting:
            self.step += 1
            found = dict(zip(names, numbers, strict=False))  # as many as there are names
            bad = [name for name, number in found.items() if not math.isfinite(number)]
            if bad:
                self.log.write(rows)
                raise TrainingError(
                    f"{bad[0]!r} is {found[bad[0]]} at epoch {self.epoch}, step {self.step}",
                    hint="lower learning_rate, set max_grad_norm, or train with --precision 32",
                )
            for name, number in found.items():
                self.sums[name] = self.sums.get(name, 0.0) + number
                self.counts[name] = self.counts.get(name, 0) + 1
            rows.append({"step": self.step, "epoch": self.epoch, **found})
        self.log.write(rows)
        self.waiting.clear()

    def means(self) -> dict[str, float]:
        """The mean of each loss over the steps that gave it.

        Raises:
            TrainingError: a loss is not a number, or there was no step.
        """
        self.flush()
        if not self.counts:
            raise TrainingError(f"epoch {self.epoch} gave no batch", hint="check filters and split")
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    changed = [name for name in now["config"] if before["config"].get(name) != now["config"][name]]
    changed += [name for name in ("seed",) if before[name] != now[name]]
    if changed:
        what = f"another {changed[0]!r}"
    elif before["batches"] != now["batches"]:
        what = f"other data: {before['batches']} batches an epoch, now {now['batches']}"
    else:
        return
    raise ConfigError(
        f"the run in {path.name!r} was started with {what}",
        where=str(path),
        hint="resume with the same settings and data, or choose another --out",
    )
