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
    def weigh(self, losses: Tensor, places: list[int]) -> tuple[Tensor, Tensor | None]:
        """Weights `(T,)` of the losses `(T,)` of the tasks at `places`, and what is added to their weighted sum, if anything."""

    def _backward(self, losses: dict[str, Tensor]) -> None:
        values = torch.stack(list(losses.values()))
        weights, more = self.weigh(values, self._places(losses))
        total = (weights * values).sum() if more is None else (weights * values).sum() + more
        (total / len(losses) if self.config.reduction == "mean" else total).backward()
        self.report = Report(list(losses), self.values, weights.detach().cpu().double().numpy())


@balancer("uniform", "the plain sum of the losses")
class Uniform(LossBalancer):
    """All weights 1."""

    def weigh(self, losses: Tensor, places: list[int]) -> tuple[Tensor, Tensor | None]:
        """Ones."""
        return torch.ones_like(losses), None


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

    def weigh(self, losses: Tensor, places: list[int]) -> tuple[Tensor, Tensor | None]:
        """`exp(-s)`, and half the sum of s."""
        every = places == list(range(len(self.log_variances)))  # as in most steps; picking some is slow
        s = (self.log_variances if every else self.log_variances[places]).to(losses.device)
        self.seen += 1
        if self.seen == 3 and self.log_variances.requires_grad and not bool(self.log_variances.any()):
            warnings.warn(
                "the weights of uncertainty weighting have not moved in two steps: give the optimizer "
                "balancer.parameters() too",
                stacklevel=5,
            )
        return torch.exp(-s), s.sum() / 2

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

    def weigh(self, losses: Tensor, places: list[int]) -> tuple[Tensor, Tensor | None]:
        """The weights of this epoch."""
        if self.sums.device != losses.device:
            exact = torch.float32 if losses.device.type == "mps" else torch.float64
            self.sums = self.sums.to(losses.device, exact)
        if places == list(range(len(self.sums))):  # as in most steps; picking some is slow
            self.sums += losses.detach()
        else:
            self.sums[places] += losses.detach().to(self.sums)
        self.counts[places] += 1
        return torch.as_tensor(self.weights[places], dtype=losses.dtype, device=losses.device), None

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
