"""Where and how a training takes place, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vouch.config import Config, Span, setting


class TrainConfig(Config):
    """Settings that every method trained by gradient steps shares; methods derive from it and change defaults."""

    epochs: int = setting(100, "most passes over the training log", ge=1)
    batch_size: int = setting(256, "rows of one global batch (users or pairs, see the method)", ge=1)
    learning_rate: float = setting(1e-3, "step size of the optimizer", gt=0, search=Span(3e-4, 3e-3, log=True))
    weight_decay: float = setting(0.0, "decoupled weight decay", ge=0)
    max_grad_norm: float = setting(0.0, "clip the gradient's norm to this; 0 does not", ge=0)
    monitor: str = setting("NDCG@10", "validation metric that picks the best epoch and stops training")
    patience: int = setting(10, "evaluations without a better value before training stops", ge=1)
    evaluate_every: int = setting(1, "epochs between two validations", ge=1)


@dataclass(frozen=True)
class Run:
    """Where and how to train; nothing in here changes what is learned, except the seed.

    Attributes:
        path: folder for checkpoints and the log; None writes nothing.
        seed: seeds every source of randomness.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: `32`, `bf16`, or `auto` (bf16 where the hardware has matrix units for it).
        resume: go on from the last checkpoint in `path`, if there is one.
        progress: show a progress bar on the terminal.
        max_seconds: stop after the epoch in which this much time has passed.
        mlflow: MLflow tracking URI to log to as well (needs the extra `vouch[mlflow]`).
    """

    path: Path | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "32", "bf16"] = "auto"
    resume: bool = False
    progress: bool = False
    max_seconds: float | None = None
    mlflow: str | None = None


@dataclass(frozen=True)
class FitReport:
    """What came of a training.

    Attributes:
        epochs: passes made (0 for methods fitted in closed form).
        best_epoch: the pass whose weights were kept, counted from 1 (0 if there was no validation).
        monitor, best_value: the validation metric watched, and its value at `best_epoch`.
        seconds: wall time of the fit, validation included.
        history: one row an epoch: `{"epoch", "loss", ..., "NDCG@10", "seconds"}`.
        stopped: why it ended: `finished`, `patience`, `time`, `closed form`, `interrupted`.
    """

    seconds: float
    epochs: int = 0
    best_epoch: int = 0
    monitor: str | None = None
    best_value: float | None = None
    stopped: str = "closed form"
    history: list[dict[str, Any]] = field(default_factory=list)
