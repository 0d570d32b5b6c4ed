"""How unevenly counts are spread."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def gini(counts: NDArray[np.float64]) -> float:
    """The Gini coefficient of non-negative counts: 0 for equal ones, `1 - 1/n` when one holds all."""
    ascending = np.sort(np.asarray(counts, dtype=np.float64))
    n, total = len(ascending), ascending.sum()
    if total == 0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending / (n * total))
