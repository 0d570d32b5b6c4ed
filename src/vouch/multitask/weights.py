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
    def weigh(self, losses: Tensor, places: list[int]) -> Tensor:
        """Weights `(T,)` of the losses `(T,)` of the tasks at `places`; neither has a gradient."""

    def _backward(self, losses: dict[str, Tensor]) -> None:
        stacked, places = torch.stack(list(losses.values())), self._places(losses)
        with torch.no_grad():
            weights = self.weigh(stacked.detach(), places)
        factor = 1 / len(losses) if self.config.reduction == "mean" else 1.0
        stacked.backward((weights if factor == 1 else weights * factor).to(stacked))
        self._learn(weights, stacked.detach(), places, factor)
        self.report = Report(list(losses), self.values, np.array(weights.tolist()))

    def _learn(self, weights: Tensor, losses: Tensor, places: list[int], factor: float) -> None:
        """Give what is learned its gradient."""


@balancer("uniform", "the plain sum of the losses")
class Uniform(LossBalancer):
    """All weights 1."""

    def weigh(self, losses: Tensor, places: list[int]) -> Tensor:
        """Ones."""
        return torch.ones_like(losses)


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

    def weigh(self, losses: Tensor, places: list[int]) -> Tensor:
        """`exp(-s)`."""
        self.seen += 1
        if self.seen == 3 and self.log_variances.requires_grad and not bool(self.log_variances.any()):
            warnings.warn(
                "the weights of uncertainty weighting have not moved in two steps: give the optimizer "
                "balancer.parameters() too",
                stacklevel=5,
            )
        s = self.log_variances.detach()
        # picking some takes longer, and most often it is all
        return torch.exp(-(s if places == list(range(len(s))) else s[places])).to(losses.device)

    def _learn(self, weights: Tensor, losses: Tensor, places: list[int], factor: float) -> None:
        """`1/2 - exp(-s_k) L_k`."""
        s = self.log_variances
        if not s.requires_grad:
            return
        slope = torch.rsub(weights * losses, 0.5 * factor, alpha=factor).to(s)
        if len(places) < len(s) or places != list(range(len(s))):
            slope = torch.zeros_like(s).index_copy_(0, torch.tensor(places, device=s.device), slope)
        if s.grad is None:
            s.grad = slope
        else:
            s.grad.add_(slope)

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
    sums: Tensor  # of this epoch, kept on the device: reading a number would wait for it
    counts: Array
    weights: Array
    means: list[Array]  # of the last two epochs

    def weigh(self, losses: Tensor, places: list[int]) -> Tensor:
        """The weights of this epoch."""
        if self.sums.device != losses.device:
            exact = torch.float32 if losses.device.type == "mps" else torch.float64
            self.sums = self.sums.to(losses.device, exact)
        if places == list(range(len(self.sums))):  # as in most steps; picking some is slow
            self.sums += losses
        else:
            self.sums[places] += losses.to(self.sums)
        self.counts[places] += 1
        return torch.as_tensor(self.weights[places], dtype=losses.dtype, device=losses.device)

    def _end_epoch(self) -> None:
        """Set the weights of the next epoch from the mean losses of the last two."""
        with np.errstate(invalid="ignore"):
            self.means = [*self.means[-1:], self.sums.cpu().double().numpy() / self.counts]
        self.sums.zero_()
        self.counts[:] = 0
        if len(self.means) == 2:
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = self.means[1] / self.means[0]
            ratio = np.where(np.isfinite(ratio), ratio, 1.0) / self.config.temperature
            powers = np.exp(ratio - ratio.max())
            self.weights = len(powers) * powers / powers.sum()

    def _start(self, size: int) -> None:
        self.sums = torch.zeros(size, dtype=torch.float64)
        self.counts, self.weights = np.zeros(size), np.ones(size)
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
            self.sums = torch.tensor(state["sums"], dtype=torch.float64)
