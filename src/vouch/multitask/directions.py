"""Balancers that see each task's gradient: PCGrad, GradVac, CAGrad, MGDA, IMTL-G, DB-MTL.

Sources: PCGrad arXiv 2001.06782; GradVac arXiv 2010.05874; CAGrad arXiv 2110.14048; MGDA arXiv 1810.04650; IMTL-G
(ICLR 2021, Towards Impartial Multi-Task Learning); DB-MTL arXiv 2308.12029. What differs:

- All in the sum convention: what a method averages is multiplied by the number of tasks, so that step lengths agree.
- A gradient of length 0 stays 0 and is left out of the geometry (MGDA would otherwise stop all tasks for it).
- PCGrad divides by `|g_j|^2`, without adding 1e-8 to it, so that it does not depend on the scale of the losses.
- GradVac updates its target cosines at every look, not only after a change, which could only lower them.
- MGDA is solved exactly, as non-negative least squares; Frank-Wolfe (`solver="frank-wolfe"`) stops within 250 rounds
  wherever it is then. Where gradients are scaled first, the weights still apply to the gradients as they are.
- DB-MTL keeps no running mean of the gradients, and takes the losses as they are, not their logarithms.
- A task's own parameters get its plain gradient; the code of MGDA weighs those too.

Each rule is a pure function of `K (T, T)`, the inner products of the tasks' gradients in float64. `T` tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vouch.config import Choice, Span, setting
from vouch.errors import TrainingError
from vouch.multitask.balancers import Array, BalancerConfig, balancer
from vouch.multitask.bytask import GradientBalancer, lengths


def root(K: Array) -> Array:
    """The symmetric square root `(T, T)` of a Gram matrix: vectors of T numbers with the same inner products."""
    values, vectors = np.linalg.eigh(K)
    found: Array = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return found


def nonnegative(A: Array, b: Array) -> Array:
    """`x >= 0` that minimises `|A x - b|`."""
    from scipy.optimize import lsq_linear, nnls

    try:
        return nnls(A, b)[0]
    except RuntimeError:  # it went in circles between sets that are equally good
        return np.maximum(lsq_linear(A, b, (0, np.inf), method="bvls", tol=1e-14).x, 0)


def pcgrad(K: Array, orders: NDArray[np.int64]) -> Array:
    """`(T, T)`: each gradient loses, one after another, what opposes each other gradient. g is the sum of rows.

    Args:
        K: `(T, T)`.
        orders: `(T, T)`: row i is the order in which gradient i meets the others.
    """
    size, every = len(K), np.arange(len(K))
    _, live = lengths(K)
    found = np.eye(size)
    for j in orders.T:  # all gradients at once, each with its own next one
        product = (found * K[j]).sum(1)
        opposed = (product < 0) & (j != every) & live[j]
        found[every, j] -= np.where(opposed, product / np.where(live[j], K[j, j], 1), 0)
    return found


def gradvac(K: Array, rho: Array, beta: float, orders: NDArray[np.int64]) -> tuple[Array, Array]:
    """`(T, T)` like `pcgrad`: each gradient is turned to target cosines `rho (T, T)` with the others, at least.

    Returns the targets too, moved by `beta` toward the cosines met.
    """
    size, every = len(K), np.arange(len(K))
    n, live = lengths(K)
    found, rho = np.eye(size), rho.copy()
    for j in orders.T:
        length = np.sqrt(np.maximum(0, np.einsum("ik,kl,il->i", found, K, found)))
        met = (j != every) & live[j] & live & (length > 0)
        c = np.clip((found * K[j]).sum(1) / np.where(met, length * n[j], 1), -1, 1)
        target = rho[every, j]
        across = np.sqrt(np.maximum(1 - target**2, 1e-12))
        turn = length * (target * np.sqrt(1 - c**2) - c * across) / (np.where(met, n[j], 1) * across)
        found[every, j] += np.where(met & (c < target), turn, 0)
        rho[every, j] = np.where(met, (1 - beta) * target + beta * c, target)
    return found, rho


def mgda(K: Array, solver: Literal["exact", "frank-wolfe"] = "exact") -> Array:
    """Weights `(T,)` on the simplex of the shortest vector in the gradients' convex hull."""
    _, live = lengths(K)
    inner = K[np.ix_(live, live)]
    found = np.zeros(len(K))
    if not live.any():
        return np.full(len(K), 1 / len(K))
    inner = inner / inner.diagonal().mean()
    if solver == "exact":
        # |G'u|^2 + (1'u - 1)^2 over u >= 0: whatever the best sum of u is, u / sum is the shortest point
        ones = np.ones((1, len(inner)))
        w = nonnegative(np.vstack([root(inner), ones]), np.append(np.zeros(len(inner)), 1.0))
        w = w / w.sum()
    else:
        w = frank_wolfe(inner)
    found[live] = w
    return found


def frank_wolfe(K: Array, rounds: int = 250, tolerance: float = 1e-6) -> Array:
    """As `mgda`, by moving toward one gradient a round, as far as shortens the vector most."""
    w = np.full(len(K), 1 / len(K))
    for _ in range(rounds):
        product = K @ w
        t = int(product.argmin())
        a, b, c = w @ product, product[t], K[t, t]
        keep = 1.0 if b >= a else 0.0 if b >= c else (c - b) / (a + c - 2 * b)
        new = keep * w
        new[t] += 1 - keep
        if np.abs(new - w).max() < tolerance:
            return new
        w = new
    return w


def cagrad(K: Array, c: float) -> Array:
    """Factors `(T,)` of the vector near the mean gradient (within c of its length) that serves the worst task best."""
    from scipy.optimize import minimize

    mean = np.full(len(K), 1 / len(K))
    _, live = lengths(K)
    if c == 0 or not live.any():
        return mean
    if not live.all():
        found = mean.copy()
        found[live] = live.mean() * cagrad(K[np.ix_(live, live)], c)
        return found
    K = K / K.diagonal().mean()  # the solver stops early where numbers are tiny
    b, radius = K @ mean, c * float(np.sqrt(max(0.0, mean @ K @ mean)))

    def value(w: Array) -> tuple[float, Array]:
        product = K @ w
        length = float(np.sqrt(max(float(w @ product), 1e-24)))
        return float(w @ b + radius * length), b + radius * product / length

    solved = minimize(
        value,
        mean,
        jac=True,
        bounds=[(0, 1)] * len(K),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 300},
    ).x
    w = np.clip(solved, 0, 1)
    w = w / w.sum() if np.isfinite(w).all() and w.sum() > 0 else mean
    length = float(np.sqrt(max(0.0, float(w @ K @ w))))
    if length < 1e-7:  # rounding: no direction helps all
        return mean / (1 + c**2)
    return (mean + radius / length * w) / (1 + c**2)


def imtl_g(K: Array) -> Array:
    """Factors `(T,)` of sum 1 with which the merged gradient projects equally on all unit gradients."""
    n, live = lengths(K)
    found = np.zeros(len(K))
    if live.sum() < 2:
        found[live] = 1
        return found
    inner, n = (K, n) if live.all() else (K[np.ix_(live, live)], n[live])
    to_units = inner / n  # <g_i, u_j>
    v = to_units[0, 0] - to_units[0, 1:]
    M = v - (to_units[1:, :1] - to_units[1:, 1:])  # <g_1 - g_i, u_1 - u_j>
    rest = np.linalg.lstsq(M.T, v, rcond=1e-10)[0]
    found[live] = np.append(1 - rest.sum(), rest)
    return found


def db_mtl(K: Array) -> Array:
    """Factors `(T,)` that give every gradient the longest's length."""
    n, live = lengths(K)
    return np.where(live, n.max() / np.where(live, n, 1), 0)


class _Ordered(GradientBalancer):
    """Methods that take the other tasks in random order."""

    rng: np.random.Generator

    def _start(self, size: int) -> None:
        self.rng = np.random.default_rng(self.config.seed)

    def _orders(self, size: int) -> NDArray[np.int64]:
        """A random order of all tasks for each task `(T, T)`."""
        return self.rng.permuted(np.tile(np.arange(size), (size, 1)), axis=1)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "rng": None if self.tasks is None else self.rng.bit_generator.state}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if self.tasks is not None:
            self.rng.bit_generator.state = state["rng"]


class PCGradConfig(BalancerConfig):
    """Settings of PCGrad."""

    seed: int = setting(0, "of the order in which a task meets the others", ge=0)


@balancer("pcgrad", "each gradient loses what opposes the others, one after another (PCGrad)")
class PCGrad(_Ordered):
    """The sum of the gradients that `pcgrad` changes, in random order."""

    Config = PCGradConfig

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T, T)`."""
        return pcgrad(K, self._orders(len(K)))


class GradVacConfig(PCGradConfig):
    """Settings of GradVac."""

    beta: float = setting(0.01, "how fast the target cosines follow", gt=0, le=1, search=Span(1e-3, 0.5, log=True))


@balancer("gradvac", "each gradient is turned to the cosines usual between tasks (GradVac)")
class GradVac(_Ordered):
    """The sum of the gradients that `gradvac` changes; target cosines start at 0."""

    Config = GradVacConfig
    rho: Array

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T, T)`."""
        at = np.ix_(places, places)
        found, self.rho[at] = gradvac(K, self.rho[at], self.config.beta, self._orders(len(K)))
        return found

    def _start(self, size: int) -> None:
        super()._start(size)
        self.rho = np.zeros((size, size))

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "rho": None if self.tasks is None else self.rho.tolist()}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if self.tasks is not None:
            self.rho[:] = state["rho"]


class CAGradConfig(BalancerConfig):
    """Settings of CAGrad."""

    c: float = setting(
        0.4, "how far from the mean gradient, in its lengths; 0 is the mean", ge=0, lt=1, search=Choice((0.2, 0.4, 0.6, 0.8))
    )  # fmt: skip


@balancer("cagrad", "the direction near the mean gradient that serves the worst task best (CAGrad)")
class CAGrad(GradientBalancer):
    """T times the gradient of `cagrad`."""

    Config = CAGradConfig

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T,)`."""
        found: Array = len(K) * cagrad(K, self.config.c)
        return found


class MGDAConfig(BalancerConfig):
    """Settings of MGDA."""

    solver: Literal["exact", "frank-wolfe"] = setting("exact", "how the weights are found")
    scale: Literal["none", "l2", "loss", "loss+"] = setting(
        "none", "what gradients are divided by first: their length, the loss, or both"
    )


@balancer("mgda", "the shortest vector between the gradients, which opposes none (MGDA)")
class MGDA(GradientBalancer):
    """T times the gradient of `mgda`."""

    Config = MGDAConfig

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T,)`.

        Raises:
            TrainingError: gradients are to be divided by a loss that is negative.
        """
        scale, (n, live) = self.config.scale, lengths(K)
        by = np.ones(len(K))
        if scale in ("l2", "loss+"):
            by = np.where(live, n, 1)
        if scale in ("loss", "loss+"):
            assert self.tasks is not None
            for place, loss in zip(places, losses, strict=True):
                if loss < 0:
                    raise TrainingError(f"the loss of {self.tasks[place]!r} is {loss:.4g}", hint="set scale=l2")
            by = by * np.where(losses > 0, losses, 1)
        found: Array = len(K) * mgda(K / np.outer(by, by), self.config.solver)
        return found

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]
        """Where they divide gradients."""
        return self.config.scale in ("loss", "loss+")


@balancer("imtl-g", "weights with which the step is as far along each task's direction (IMTL-G)")
class IMTLG(GradientBalancer):
    """T times the gradient of `imtl_g`."""

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T,)`."""
        found: Array = len(K) * imtl_g(K)
        return found


@balancer("db-mtl", "all gradients pulled to the longest one's length (DB-MTL)")
class DBMTL(GradientBalancer):
    """The sum of the gradients, each as long as the longest."""

    def coefficients(self, K: Array, losses: Array, places: list[int]) -> Array:
        """`(T,)`."""
        return db_mtl(K)
