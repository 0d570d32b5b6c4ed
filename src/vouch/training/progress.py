"""The progress bar of a training: how far, how fast, how long at most, and the last validation."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from vouch.training.run import TrainConfig

REFRESH = 0.2
"""Seconds between two updates of the bar."""


class ProgressBar:
    """A rich progress bar on standard error; nothing where `show` is false or standard error is no terminal."""

    def __init__(self, show: bool, config: TrainConfig, steps: int, *, done: int = 0) -> None:
        """For `config.epochs` of `steps` batches each, `done` epochs of which lie behind."""
        self._bar: Any = None
        self._new, self._last = 0, 0.0
        if not show or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._config, self._steps = config, steps
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}" + f"/{config.epochs}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}  at most"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(
            "", total=config.epochs * steps, completed=done * steps, epoch=done + 1, rate="", note=""
        )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One batch is done."""
        if self._bar is None:
            return
        self._new += 1
        if time.perf_counter() - self._last >= REFRESH:
            self._show()

    def epoch_done(self, row: dict[str, Any], best: float | None, best_epoch: int) -> None:
        """One epoch is done, with its losses and metrics."""
        if self._bar is None:
            return
        monitor = self._config.monitor
        note = f"loss {row['loss']:.4f}" if "loss" in row else ""
        if best is not None:
            note += f"  best {monitor} {best:.4f} at epoch {best_epoch}"
        self._show(epoch=row["epoch"] + 1, note=note)

    def _show(self, **fields: Any) -> None:
        speed = self._bar.tasks[0].speed
        rate = f"{speed * self._config.batch_size:,.0f} rows/s" if speed else ""
        self._bar.update(self._task, advance=self._new, rate=rate, **fields)
        self._new, self._last = 0, time.perf_counter()
