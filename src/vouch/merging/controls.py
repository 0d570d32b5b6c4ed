"""What Representation Surgery is set against: simpler corrections of merged features, and retrained heads.

Each takes features of the merged network `z` and of a task's individual network `z_k`, both `(n, D)` and of the same
inputs. None needs a label. `mean_shift` and `linear_map` are solved, not trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError
from vouch.files import atomic_file
from vouch.merging.unlabelled import Endless, check_labels

RIDGES = tuple(10.0**power for power in range(-5, 4))
"""Tried by `linear_map`, in units of the mean variance of a feature times the number of inputs."""


def mean_shift(z: Tensor, target: Tensor) -> nn.Linear:
    """`z + mean(z_k - z)`.

    Raises:
        DataError: the features do not fit, are none, or not finite.
    """
    _check(z, target)
    return _linear(torch.eye(z.shape[1], dtype=torch.float64), (target - z).double().mean(0).cpu(), z)


def linear_map(z: Tensor, target: Tensor, ridge: float | None = None) -> nn.Linear:
    """`z + W z + b` with `W` by ridge regression of `z_k - z` on `z`, so that a strong ridge leaves the mean shift.

    Args:
        ridge: see `RIDGES`; by the exact leave-one-out error unless given.

    Raises:
        DataError: the features do not fit, are none, or not finite. ConfigError: `ridge` is not above 0.
    """
    _check(z, target)
    if ridge is not None and not ridge > 0:
        raise ConfigError(f"ridge is {ridge}; it must be above 0", hint="1e-5 hardly counts, 1e3 leaves the mean shift")
    mean, difference = z.double().mean(0).cpu(), (target - z).double().cpu()
    z_ND, shift = z.double().cpu() - mean, difference.mean(0)
    values, vectors = torch.linalg.eigh(z_ND.T @ z_ND)
    turned, values = z_ND @ vectors, values.clamp(min=0)
    unit = float(values.mean()) or 1.0
    product = turned.T @ (difference - shift)

    def left_out(by: float) -> float:
        """Mean squared error of each row under the map that is fitted without it."""
        fitted = turned @ (product / (values + by * unit)[:, None])
        leverage = 1 / len(z_ND) + (turned.square() / (values + by * unit)).sum(1)
        return float(((difference - shift - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean())

    by = min(RIDGES, key=left_out) if ridge is None else ridge
    weight = vectors @ (product / (values + by * unit)[:, None])
    return _linear(torch.eye(z.shape[1], dtype=torch.float64) + weight.T, shift - mean @ weight, z)


def relabelled_head(
    head: nn.Module,
    z: Tensor,
    label: Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """A copy of a head, trained on merged features to give the classes `(n,)` that the individual network gives.

    Raises:
        DataError: a label is no class of the head.
    """
    with torch.no_grad():
        check_labels(label, head(z[:1]).shape[1], "the task")
    made = copy.deepcopy(head).requires_grad_(True)
    optimizer = torch.optim.Adam(made.parameters(), lr=learning_rate)
    stream = Endless("head", (z, label), batch_size, seed)
    for _ in range(steps):
        x, y = stream.next()
        assert y is not None
        optimizer.zero_grad()
        F.cross_entropy(made(x), y).backward()
        optimizer.step()
    return made.requires_grad_(False)


def plane(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Several sets of features `(n, D)` in the plane `(n, 2)` of the two main directions of them all.

    Raises:
        DataError: they have fewer than two dimensions.
    """
    every = torch.cat([z.double().cpu() for z in features.values()])
    if every.ndim != 2 or every.shape[1] < 2:
        raise DataError(f"features {tuple(every.shape)} have no plane", hint="give (n, D) with D of 2 or more")
    mean = every.mean(0)
    directions = torch.linalg.eigh((every - mean).T @ (every - mean)).eigenvectors[:, [-1, -2]]
    return {name: (z.double().cpu() - mean) @ directions for name, z in features.items()}


def plot_features(path: Path | str, features: Mapping[str, Tensor]) -> None:
    """Draw sets of features, such as merged, corrected and individual ones, in their common plane into a file.

    Raises:
        DataError: they have fewer than two dimensions. ConfigError: the file's ending is of no kind of picture.
        StorageError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in plane(features).items():
        axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=5, alpha=0.6, label=name)
    axes.legend()
    with atomic_file(path) as aside:
        try:
            figure.savefig(aside, format=Path(path).suffix.lstrip(".") or "png")
        except ValueError as error:
            raise ConfigError(f"{str(path)!r} cannot be drawn: {error}", hint="end the name in .png or .svg") from error


def _linear(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], len(weight), device="meta").to_empty(device=like.device).requires_grad_(False)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made


def _check(z: Tensor, target: Tensor) -> None:
    if z.ndim != 2 or z.shape != target.shape or not len(z):
        raise DataError(
            f"merged features {tuple(z.shape)} do not fit individual ones {tuple(target.shape)}",
            hint="give both as (n, D), of the same inputs, with at least one of them",
        )
    if not bool(torch.isfinite(z).all() & torch.isfinite(target).all()):
        raise DataError("the features have values that are not finite", hint="look for them in inputs and weights")
