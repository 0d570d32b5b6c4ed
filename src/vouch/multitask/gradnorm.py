"""GradNorm: weights learned so that the tasks' gradients are of like length, longer for tasks that lag behind.

Source: GradNorm, arXiv 1711.02257. What differs: norms are those of all shared parameters; weights stay above 0.01; a
task's own parameters get its plain gradient. The losses are compared with their means in the first epoch, which one
batch of a rare task would not tell; `initial="first"` is the paper's. `T` tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from vouch.config import Span, setting
from vouch.multitask.balancers import Array, BalancerConfig, balancer
from vouch.multitask.bytask import GradientBalancer, lengths


def gradnorm(norms: Array, losses: Array, initial: Array, weights: Array, alpha: float) -> Array:
    """The gradient `(T,)` of `sum_k |w_k n_k - C_k|` with respect to the weights; all arguments `(T,)`.

    `C_k = mean_j(w_j n_j) r_k^alpha` counts as a constant, with `r_k` the loss relative to its first value, relative to
    the mean of those.
    """
    ratio = losses / initial
    pace = ratio / ratio.mean()
    target = (weights * norms).mean() * pace**alpha
    found: Array = norms * np.sign(weights * norms - target)
    return found


class GradNormConfig(BalancerConfig):
    """Settings of GradNorm."""

    alpha: float = setting(0.5, "how hard tasks that lag behind are pulled", ge=0, search=Span(0.1, 2))
    learning_rate: float = setting(0.025, "of the weights", gt=0, search=Span(1e-3, 0.1, log=True))
    initial: Literal["epoch", "first", "log2"] = setting(
        "epoch",
        "what losses are compared with: their mean in the first epoch (through which the weights rest), their first "
        "value, or ln 2, that of a guess on binary labels",
    )


@balancer("gradnorm", "weights learned so that gradients are of like length and tasks of like pace (GradNorm)")
class GradNorm(GradientBalancer):
    """`sum_k w_k g_k` with weights of sum T, moved by Adam along `gradnorm` after each step."""

    Config = GradNormConfig
    needs_losses = True
    weights: Array
    initial: Array  # NaN where not known yet
    sums: Array  # of the first epoch
    counts: Array
    moments: Array  # (3, T): Adam's first, second, and how many steps

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T,)`: the weights as they were before this step."""
        used: Array = self.weights[places]
        self._follow(lengths(K)[0], losses, places)
        return used

    def _follow(self, norms: Array, losses: Array, places: list[int]) -> None:
        if self.config.initial == "epoch" and not self.epochs:
            self.sums[places] += losses
            self.counts[places] += 1
            return
        new = np.isnan(self.initial[places])
        self.initial[places] = np.where(new, losses, self.initial[places])
        at = [place for place in places if self.initial[place] > 0]  # a loss that began at 0 has no pace
        chosen = np.isin(places, at)
        if len(at) < 2:
            return
        slope = gradnorm(norms[chosen], losses[chosen], self.initial[at], self.weights[at], self.config.alpha)
        first, second, count = self.moments
        count[at] += 1
        first[at] += 0.1 * (slope - first[at])
        second[at] += 0.001 * (slope**2 - second[at])
        m, v = first[at] / (1 - 0.9 ** count[at]), second[at] / (1 - 0.999 ** count[at])
        self.weights[at] -= self.config.learning_rate * m / (np.sqrt(v) + 1e-8)
        self.weights = np.maximum(self.weights, 0.01)
        self.weights *= len(self.weights) / self.weights.sum()

    def _end_epoch(self) -> None:
        if self.config.initial == "epoch" and self.epochs == 1:
            with np.errstate(invalid="ignore"):
                self.initial = self.sums / self.counts

    def _start(self, size: int) -> None:
        self.weights, self.moments = np.ones(size), np.zeros((3, size))
        self.sums, self.counts = np.zeros(size), np.zeros(size)
        self.initial = np.full(size, np.log(2) if self.config.initial == "log2" else np.nan)

    @property
    def by_epoch(self) -> bool:  # type: ignore[override]
        """Where losses are compared with the first epoch's."""
        return self.config.initial == "epoch"

    def _state(self) -> dict[str, Any]:
        if self.tasks is None:
            return super()._state()
        initial = [None if np.isnan(x) else float(x) for x in self.initial]
        rest = {name: getattr(self, name).tolist() for name in ("weights", "sums", "counts", "moments")}
        return {**super()._state(), "initial": initial, **rest}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if self.tasks is not None:
            self.initial = np.array([np.nan if x is None else x for x in state["initial"]])
            for name in ("weights", "sums", "counts", "moments"):
                getattr(self, name)[:] = state[name]
