"""What a balancer saw and did in one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vouch.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Report:
    """What a balancer saw and did. `T` counts the tasks that had labels in that step.

    Attributes:
        tasks: their names.
        losses: `(T,)`.
        weights: `(T,)`: the factor on each task's gradient in the merged one, in the sum convention.
        gram: `(T, T)` inner products of the tasks' gradients of the shared parameters; None where only losses were seen.
        coefficients: `(T, T)`: row i is what became of gradient i, as factors on all; None like `gram`.
    """

    tasks: list[str]
    losses: Array
    weights: Array
    gram: Array | None = None
    coefficients: Array | None = None

    @property
    def norms(self) -> Array:
        """Lengths of the tasks' gradients `(T,)`."""
        return np.sqrt(self._gram.diagonal())

    @property
    def cosines(self) -> Array:
        """Cosines between the tasks' gradients `(T, T)`; 0 beside a gradient of length 0."""
        return _cosines(self._gram, self.norms, self.norms)

    @property
    def conflicts(self) -> NDArray[np.bool_]:
        """Which gradients oppose each other `(T, T)`."""
        found: NDArray[np.bool_] = self._gram < 0
        return found

    @property
    def conflict_share(self) -> float:
        """Of all pairs of tasks, the share that conflict."""
        return _share(self.conflicts)

    @property
    def remaining(self) -> NDArray[np.bool_]:
        """`(T, T)`: whether what became of gradient i opposes gradient j. Rounding errors (1e-9) do not count."""
        self._gram  # noqa: B018  (or it raises)
        assert self.coefficients is not None
        after = self.coefficients @ self._gram
        lengths = np.sqrt(np.maximum(0, (after * self.coefficients).sum(1)))
        found: NDArray[np.bool_] = _cosines(after, lengths, self.norms) < -1e-9
        return found

    @property
    def remaining_share(self) -> float:
        """Of all ordered pairs of tasks, the share that still conflict: what became of i, against j."""
        return _share(self.remaining)

    @property
    def alignment(self) -> Array:
        """Cosines between the merged gradient and each task's `(T,)`: below 0, the step raises that task's loss."""
        w = self.weights
        return _cosines((w @ self._gram)[None], np.sqrt(np.maximum(0, [w @ self._gram @ w])), self.norms)[0]

    @property
    def _gram(self) -> Array:
        if self.gram is None:
            raise ConfigError(
                "this balancer sees losses only, no gradients", hint="balancer.measure(losses) has a look at them"
            )
        return self.gram


def _cosines(products: Array, rows: Array, columns: Array) -> Array:
    lengths = np.outer(rows, columns)
    found: Array = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return found


def _share(pairs: NDArray[np.bool_]) -> float:
    size = len(pairs)
    return float(pairs.sum() / (size * (size - 1))) if size > 1 else 0.0
