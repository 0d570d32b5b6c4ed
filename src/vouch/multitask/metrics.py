"""How well each task is predicted: AUC, AUC within groups, root mean squared error."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata


def auc(score: NDArray[np.float64], label: NDArray[np.float64]) -> float:
    """Area under the curve: the share of pairs of a positive and a negative that are ranked right, ties half.

    NaN where there are not both.
    """
    positive = label > 0.5
    p, n = int(positive.sum()), int((~positive).sum())
    if p == 0 or n == 0:
        return math.nan
    return float((rankdata(score)[positive].sum() - p * (p + 1) / 2) / (p * n))


def gauc(score: NDArray[np.float64], label: NDArray[np.float64], group: NDArray[np.int64]) -> float:
    """The mean AUC within groups (users), weighted by their rows; groups of one class are left out.

    Source: Deep Interest Network, arXiv 1706.06978, equation 5. NaN where no group has both classes.
    """
    if len(label) == 0:
        return math.nan
    _, group = np.unique(group, return_inverse=True)
    order = np.lexsort((score, group))
    g, s, positive = group[order], score[order], label[order] > 0.5
    first = np.concatenate([[True], g[1:] != g[:-1]])
    tied = np.concatenate([[False], (g[1:] == g[:-1]) & (s[1:] == s[:-1])])
    place = np.arange(len(g)) - np.maximum.accumulate(np.where(first, np.arange(len(g)), 0)) + 1.0
    run = np.cumsum(~tied) - 1  # rows of one group with one score share the mean of their places
    rank = (np.bincount(run, place) / np.bincount(run))[run]
    p = np.bincount(g, positive).astype(float)
    rows = np.bincount(g).astype(float)
    n = rows - p
    both = (p > 0) & (n > 0)
    if not both.any():
        return math.nan
    total = np.bincount(g, rank * positive)
    areas = (total[both] - p[both] * (p[both] + 1) / 2) / (p[both] * n[both])
    return float((areas * rows[both]).sum() / rows[both].sum())


def rmse(predicted: NDArray[np.float64], label: NDArray[np.float64]) -> float:
    """Root of the mean squared error; NaN without rows."""
    return float(np.sqrt(np.mean((predicted - label) ** 2))) if len(label) else math.nan
