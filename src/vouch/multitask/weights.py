"""Balancers that weigh the losses: the plain sum, uncertainty weighting, dynamic weight average. One backward pass each.

Sources: uncertainty weighting, arXiv 1705.07115; DWA, arXiv 1803.10704. What differs: uncertainty weighting learns log
variances from 0 (other codes start at -0.5 with half the weight, or add `log(1 + 1 / 2w)`); DWA compares means of
epochs as its paper says, not single steps, and its weights sum to the number of tasks. `T` tasks.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vouch.config import Span, setting
from vouch.errors import ConfigError
from vouch.multitask.balancers import Array, Balancer, BalancerConfig, balancer
from vouch.multitask.report import Report


class LossBalancer(Balancer):
    """Balancers that weigh the losses: one backward pass."""

    @abstractmethod
    def weigh(self, losses: Array, places: list[int]) -> Array:
        """Weights `(T,)` of the losses `(T,)` of the tasks at `places`."""

    def _backward(self, losses: dict[str, Tensor], stacked: Tensor) -> None:
        # a few numbers that were read already: numpy takes a fraction of the time that tensors would
        values, places = self.values, self._places(losses)
        weights = self.weigh(values, places)
        factor = 1 / len(values) if self.config.reduction == "mean" else 1.0
        stacked.backward(torch.as_tensor(factor * weights, dtype=stacked.dtype, device=stacked.device))
        self._learn(factor * weights, values, places, factor)
        self.report = Report(list(losses), values, weights)

    def _learn(self, weights: Array, losses: Array, places: list[int], factor: float) -> None:
        """Give what is learned its gradient; the weights have the factor on all losses in them."""


@balancer("uniform", "the plain sum of the losses")
class Uniform(Balancer):
    """All weights 1."""

    def _backward(self, losses: dict[str, Tensor], stacked: Tensor) -> None:
        (stacked.sum() if self.config.reduction == "sum" else stacked.mean()).backward()
        self.report = Report(list(losses), self.values, np.ones(len(losses)))


@balancer("uw", "weights learned with the model as variances of the tasks (uncertainty weighting)")
class UncertaintyWeighting(LossBalancer):
    """`sum_k exp(-s_k) L_k + s_k / 2` with log variances `s (T,)` learned from 0.

    Learned by the user's optimizer: `Adam([*model.parameters(), *balancer.parameters()])`. So `tasks` must be given.
    """

    log_variances: nn.Parameter
    seen: int

    def parameters(self) -> list[nn.Parameter]:
        """The log variances.

        Raises:
            ConfigError: the tasks are not known yet.
        """
        if self.tasks is None:
            raise ConfigError(
                "the tasks are not known, so there is no weight to learn yet", hint='give tasks=["click", "like", ...]'
            )
        return [self.log_variances]

    def weigh(self, losses: Array, places: list[int]) -> Array:
        """`exp(-s)`."""
        s = np.array(self.log_variances.tolist())
        self.seen += 1
        if self.seen == 3 and self.log_variances.requires_grad and not s.any():
            warnings.warn(
                "the weights of uncertainty weighting have not moved in two steps: give the optimizer "
                "balancer.parameters() too",
                stacklevel=5,
            )
        return np.exp(-s[places])

    def _learn(self, weights: Array, losses: Array, places: list[int], factor: float) -> None:
        """`1/2 - exp(-s_k) L_k`."""
        s = self.log_variances
        if not s.requires_grad:
            return
        slope = np.zeros(len(s))
        slope[places] = 0.5 * factor - weights * losses
        gradient = torch.as_tensor(slope, dtype=s.dtype, device=s.device)
        s.grad = gradient if s.grad is None else s.grad.add_(gradient)

    def _start(self, size: int) -> None:
        self.log_variances = nn.Parameter(torch.zeros(size, device=self.trained[0].device))
        self.seen = 0

    def _state(self) -> dict[str, Any]:
        return {"log_variances": None if self.tasks is None else self.log_variances.tolist()}

    def _load(self, state: Mapping[str, Any]) -> None:
        if self.tasks is not None:
            with torch.no_grad():
                self.log_variances.copy_(torch.tensor(state["log_variances"]))


class DWAConfig(BalancerConfig):
    """Settings of dynamic weight average."""

    temperature: float = setting(2.0, "how even the weights are", gt=0, search=Span(0.5, 5, log=True))


@balancer("dwa", "more weight for the losses that fell least between the last two epochs")
class DWA(LossBalancer):
    """`w = T softmax(r / temperature)`, `r_k = L_k(e - 1) / L_k(e - 2)` with means over epochs; 1 in the first two.

    A task without labels in one of the two epochs has `r_k = 1`.
    """

    Config = DWAConfig
    by_epoch = True
    sums: Array  # of this epoch
    counts: Array
    weights: Array
    means: list[Array]  # of the last two epochs

    def weigh(self, losses: Array, places: list[int]) -> Array:
        """The weights of this epoch."""
        self.sums[places] += losses
        self.counts[places] += 1
        return self.weights[places]

    def _end_epoch(self) -> None:
        """Set the weights of the next epoch from the mean losses of the last two."""
        with np.errstate(invalid="ignore"):
            self.means = [*self.means[-1:], self.sums / self.counts]
        self.sums[:] = 0
        self.counts[:] = 0
        if len(self.means) == 2:
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = self.means[1] / self.means[0]
            ratio = np.where(np.isfinite(ratio), ratio, 1.0) / self.config.temperature
            powers = np.exp(ratio - ratio.max())
            self.weights = len(powers) * powers / powers.sum()

    def _start(self, size: int) -> None:
        self.sums, self.counts, self.weights = np.zeros(size), np.zeros(size), np.ones(size)
        self.means = []

    def _state(self) -> dict[str, Any]:
        if self.tasks is None:
            return {}
        means = [[None if np.isnan(x) else float(x) for x in row] for row in self.means]
        return {
            "means": means,
            "weights": self.weights.tolist(),
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        if self.tasks is not None:
            self.means = [np.array([np.nan if x is None else x for x in row]) for row in state["means"]]
            self.weights, self.counts = np.array(state["weights"]), np.array(state["counts"])
            self.sums = np.array(state["sums"])
