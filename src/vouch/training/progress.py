"""A progress bar for one epoch: how far, how fast, how long still, and the last validation."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from vouch.training.run import TrainConfig


class EpochBar:
    """A rich progress bar on standard error, or nothing where `show` is false."""

    def __init__(self, show: bool, epoch: int, config: TrainConfig, total: int, history: list[dict[str, Any]]) -> None:
        self._bar: Any = None
        import sys

        if not show or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(f"epoch {epoch}/{config.epochs}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn(_last(history, config.monitor)),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._rows = config.batch_size
        self._task = self._bar.add_task("", total=total, rate="")

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
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            rate = f"{speed * self._rows:,.0f} rows/s" if speed else ""
            self._bar.update(self._task, advance=1, rate=rate)


def _last(history: list[dict[str, Any]], monitor: str) -> str:
    for row in reversed(history):
        if monitor in row:
            return f"loss {row.get('loss', float('nan')):.4f}  {monitor} {row[monitor]:.4f}"
    return ""
