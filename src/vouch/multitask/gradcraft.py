"""GradCraft: bring the tasks' gradients toward one size, then free each from all tasks it conflicts with, at once.

Source: GradCraft: Elevating Multi-task Recommendations through Holistic Gradient Crafting, KDD 2024, arXiv 2407.19682.
Two steps on the tasks' gradients `g_i` of the shared parameters, with `n_i = |g_i|`:

1. size: `h_i = (tau max_j n_j / n_i + 1 - tau) g_i`;
2. direction: with `C_i` the tasks j of `<h_i, h_j> < 0`, the smallest change of `h_i` after which
   `<x_i, h_j> = eps |h_i| |h_j|` for all j in `C_i`. All are freed of the `h_j` as they were, so no order enters.

The merged gradient is the mean of the `x_i` (their sum by default here: `reduction`).

What it does not guarantee: freed from `C_i`, `x_i` may oppose a task that `h_i` did not. `projection="cone"` takes the
nearest `x_i` that opposes no task at all, by non-negative least squares; then no conflict remains. The default is the
paper's rule; `balancer.report.remaining` says what it left.

What differs from the authors' code: only shared parameters count and are changed; one optimizer step, regularisers
outside; no running mean of the norms (theirs is off); all is solved in float64 from the inner products, with a
pseudo-inverse where gradients repeat each other, so that eps is not below the rounding, as theirs is. A gradient of
length 0 stays 0 and conflicts with none. `T` tasks, `P` values.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.config import Choice, setting
from vouch.errors import ConfigError, TrainingError
from vouch.multitask.balancers import Array, BalancerConfig, balancer
from vouch.multitask.bytask import GradientBalancer, gram, lengths
from vouch.multitask.directions import nonnegative, root
from vouch.multitask.report import Report

DEPENDENT = 1e-10
"""Of the sum of all, below which an eigenvalue of the conflicting directions counts as 0."""


class GradCraftConfig(BalancerConfig):
    """Settings of GradCraft."""

    tau: float = setting(
        0.3, "how far gradients are pulled to the longest one's length", ge=0, le=1,
        search=Choice(tuple(k / 10 for k in range(11))),
    )  # fmt: skip
    eps: float = setting(
        0.0, "cosine to set between tasks that conflicted", ge=0, lt=1, search=Choice((0.0, 0.01, 0.05, 0.1))
    )
    projection: Literal["paper", "cone"] = setting(
        "paper", "free each gradient of the tasks it conflicts with, or so that it opposes none"
    )


@balancer("gradcraft", "gradients of like size, freed of all conflicting tasks at once (GradCraft)")
class GradCraft(GradientBalancer):
    """The sum of the gradients that `gradcraft` changes.

    Raises:
        ConfigError: `eps` is set with the cone, which may then be empty.
    """

    Config = GradCraftConfig

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.config.eps and self.config.projection == "cone":
            raise ConfigError(f"eps is {self.config.eps} with the cone", hint="eps belongs to projection='paper'")

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T, T)`."""
        config = self.config
        return gradcraft(K, tau=config.tau, eps=config.eps, projection=config.projection)


def scales(K: Array, tau: float) -> Array:
    """`tau max_j n_j / n_i + 1 - tau` `(T,)`; 1 for a gradient of length 0."""
    n, live = lengths(K)
    return np.where(live, tau * n.max() / np.where(live, n, 1) + 1 - tau, 1.0)


def gradcraft(K: Array, *, tau: float = 0.3, eps: float = 0.0, projection: Literal["paper", "cone"] = "paper") -> Array:
    """`(T, T)`: row i is what becomes of gradient i, as factors on all gradients.

    Args:
        K: `(T, T)`, inner products of the gradients.
        tau: 0 leaves lengths alone, 1 makes all the longest one's.
        eps: the cosine, relative to the lengths before, that is set where tasks conflicted.
    """
    scale, (n, live) = scales(K, tau), lengths(K)
    safe = np.where(live, n, 1)
    cosine = np.where(np.outer(live, live), K / np.outer(safe, safe), 0)
    # on directions of length 1, where the systems are as well conditioned as they can be
    change = _cone(cosine, live) if projection == "cone" else _freed(cosine, eps)
    length = scale * safe
    # w_ij / |h_j| on h_j, in units of |h_i|; and h_j = scale_j g_j
    found: Array = np.diag(scale) + length[:, None] * change / safe
    return found


def _freed(cosine: Array, eps: float) -> Array:
    """Factors `(T, T)` on the unit vectors `u`: `u_i + change_i u` has inner product `eps` with all it conflicts with."""
    conflict = cosine < 0
    change = np.zeros_like(cosine)
    some = np.flatnonzero(conflict.any(1))
    if len(some):
        within = conflict[some]
        systems = cosine * (within[:, :, None] & within[:, None, :])  # one for each, 0 outside its conflicts
        values, vectors = np.linalg.eigh(systems)
        keep = values > DEPENDENT * within.sum(1, keepdims=True)
        inverse = np.where(keep, 1 / np.where(keep, values, 1), 0)
        wanted = np.where(within, eps - cosine[some], 0)
        along = (wanted[:, None, :] @ vectors)[:, 0] * inverse
        change[some] = (vectors @ along[:, :, None])[:, :, 0] * within
    return change


def _cone(cosine: Array, live: NDArray[np.bool_]) -> Array:
    """Factors `(T, T)` on the unit vectors `u`: `u_i + change_i u` is the nearest to `u_i` that opposes none."""
    change = np.zeros_like(cosine)
    conflict = cosine < 0
    if not conflict.any():
        return change
    base = root(cosine)
    for i in np.flatnonzero(conflict.any(1)):
        others = np.flatnonzero(live & (np.arange(len(cosine)) != i))
        change[i, others] = nonnegative(base[:, others], -base[:, i])
    return change


def craft(
    G: Tensor, *, tau: float = 0.3, eps: float = 0.0, projection: Literal["paper", "cone"] = "paper"
) -> tuple[Tensor, Report]:
    """The gradient stage alone: gradients `G (T, P)` to the merged one `(P,)`, the mean, and what was seen and done.

    Raises:
        TrainingError: a gradient is not finite; names the task by its row.
    """
    K = gram([[row] for row in G]).cpu().numpy()
    for task, length in enumerate(K.diagonal()):
        if not np.isfinite(length):
            raise TrainingError(f"the gradient of 'task {task}' is not a finite number")
    A = gradcraft(K, tau=tau, eps=eps, projection=projection)
    tasks = [f"task {k}" for k in range(len(K))]
    report = Report(tasks, np.full(len(K), np.nan), A.sum(0), K, A)
    return torch.as_tensor(A.mean(0), dtype=G.dtype, device=G.device) @ G, report
