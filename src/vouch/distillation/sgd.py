"""Training plain torch networks with momentum: settings, schedules, batches of any kind, and training on labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.config import setting
from vouch.distillation.taps import outputs
from vouch.errors import ConfigError, TrainingError
from vouch.training import FitReport, Run, TrainConfig, fit
from vouch.training.loop import Batches

Schedule = Literal["onecycle", "cosine", "steps", "constant"]
Validate = Callable[[nn.Module], Mapping[str, float]]
RISE, START = 0.3, 0.04
"""Of the one-cycle schedule: the share of steps in which the rate rises, and the factor it rises from."""


class SGDConfig(TrainConfig):
    """Settings of training by stochastic gradients with momentum."""

    epochs: int = setting(30, "passes over the batches", ge=1)
    learning_rate: float = setting(0.1, "step size of the network at its largest", gt=0)
    momentum: float = setting(0.9, "of the gradient steps", ge=0, lt=1)
    nesterov: bool = setting(False, "look ahead along the momentum")
    weight_decay: float = setting(5e-4, "pulls weights to zero; added to the gradient", ge=0)
    schedule: Schedule = setting(
        "onecycle", "of the rates: up and down, down by a cosine, x 0.1 after 3/7 and 5/7 of the epochs, or constant"
    )
    monitor: str = setting("accuracy", "validation metric that picks the best epoch")
    patience: int = setting(1_000, "evaluations without a better value before training stops", ge=1)


def factor(schedule: Schedule, steps: int) -> Callable[[int], float] | None:
    """Factor on the rates by step, of `steps` in all."""

    def half_cosine(share: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def onecycle(step: int) -> float:
        rise = max(1.0, RISE * steps)
        if step < rise:
            return 1 - (1 - START) * half_cosine(step / rise)
        return half_cosine((step - rise) / max(1.0, steps - rise))

    match schedule:
        case "constant":
            return None
        case "cosine":
            return lambda step: half_cosine(step / steps)
        case "steps":
            return lambda step: 0.1 ** sum(step >= share * steps for share in (3 / 7, 5 / 7))
        case _:
            return onecycle


def sgd(groups: Any, config: SGDConfig) -> torch.optim.Optimizer:
    """The optimizer; groups may have rates of their own."""
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


class _Loader:
    """A sized iterable, such as a `DataLoader`, as the batches of `fit`."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[Any]:
        """One pass; with several processes give each its own part, for example by a `DistributedSampler`."""
        del generator, rank, world
        return iter(self.batches)


def as_batches(batches: Batches | Iterable[Any]) -> Batches:
    """Batches of `fit`, or a sized iterable of inputs or `(input, label)` that can be passed over many times.

    Raises:
        ConfigError: it is neither, or there is none.
    """
    if isinstance(batches, Sized) and not len(batches):
        raise ConfigError("there are no batches", hint="a DataLoader with drop_last=True drops an incomplete only one")
    if hasattr(batches, "epoch"):
        given: Any = batches
        return given
    if not isinstance(batches, Sized) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"{type(batches).__name__} cannot be passed over again and again",
            hint="give a list of batches, a DataLoader, or an object with epoch(generator, rank, world)",
        )
    return _Loader(batches)


def parts_of(batch: Any) -> tuple[Any, Tensor | None]:
    """The input and the labels of a batch; None where it has only inputs."""
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch.

    Raises:
        ConfigError: it has none.
    """
    label = parts_of(batch)[1]
    if label is None:
        raise ConfigError("the batches have no labels to learn from", hint="give (input, label), or set label_weight=0")
    return label


def label_loss(logits: Tensor, label: Tensor) -> Tensor:
    """The cross-entropy of logits `(B, C)` against labels int64 `(B,)`.

    Raises:
        ConfigError: the labels are not one number of a class for each input.
    """
    try:
        return F.cross_entropy(logits.float(), label)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"labels do not fit logits {tuple(logits.shape)}: {error}",
            hint=f"give one int64 for each input, from 0 to {logits.shape[-1] - 1}",
        ) from error


def check_batch(network: nn.Module, x: Any) -> None:
    """Refuse an empty batch, and a batch of one where the network needs the statistics of a batch.

    Raises:
        TrainingError: it is one.
    """
    if isinstance(x, Tensor) and not len(x):
        raise TrainingError("a batch has no inputs", hint="leave empty batches out")
    if isinstance(x, Tensor) and len(x) == 1:
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise TrainingError(
                    f"a batch of one picture has no statistics for the batch norm {name!r}",
                    hint="drop the last, incomplete batch (drop_last=True of a DataLoader)",
                )


class _Labels(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: Any) -> dict[str, Tensor]:
        x, _ = parts_of(batch)
        check_batch(self.network, x)
        logits = outputs(self.network(x))[-1]
        return {"labels": label_loss(logits, labels_of(batch))}


def train_on_labels(
    network: nn.Module,
    batches: Batches | Iterable[Any],
    *,
    config: SGDConfig | None = None,
    run: Run | None = None,
    validate: Validate | None = None,
    **settings: Any,
) -> FitReport:
    """Train a classifier in place by cross-entropy: teachers, and the students that distilled ones are compared with.

    Args:
        batches: of `(input, label)`, see `as_batches`.
        validate: gives metrics of the network; the best epoch by `config.monitor` is kept. Without, the last.
        settings: those of `SGDConfig`, in place of `config`.

    Raises:
        TrainingError: the loss stopped being a number, or a batch of one met a batch norm.
        ConfigError: the batches have no labels or such as do not fit, or there are none, or they cannot be repeated.
    """
    config, source, model = config or SGDConfig(**settings), as_batches(batches), _Labels(network)
    report = fit(
        model,
        source,
        config=config,
        run=run,
        optimizer=sgd(model.parameters(), config),
        schedule=factor(config.schedule, config.epochs * len(source)),
        validate=None if validate is None else lambda: validate(network),
    )
    network.eval()
    return report
