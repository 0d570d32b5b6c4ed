"""The best k of each row, with ties settled the same way everywhere."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CELLS = 1 << 19
"""Scores held at once where many are tied."""
FEW = 1 << 16
"""Scores below which one call that does everything is quicker than several."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row of `(B, N)`, best first; among equals the smaller index wins, on every device.

    `torch.topk` leaves the choice among equals open: rows that hold ties among their best `k + 1` are settled after
    it. Many scores on a CPU are first cut to a few of each row, which is about twice as fast.

    Returns:
        Values and int64 indices, `(B, k)` each.
    """
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.numel() >= FEW:
        index, unsettled = _select(scores.detach().numpy(), k)
    else:
        values, index = torch.topk(scores, min(k + 1, scores.shape[-1]), dim=-1)
        unsettled = (values[:, 1:] == values[:, :-1]).any(-1).nonzero().squeeze(-1)
        index = index[:, :k].contiguous()
    for rows in unsettled.split(max(1, CELLS // scores.shape[-1])):
        index[rows] = _smaller_first(scores[rows], k)
    return scores.gather(-1, index), index


def _select(scores: NDArray[np.float32], k: int) -> tuple[Tensor, Tensor]:
    """Indices `(B, k)`, and the rows for which they are not right, as too many scores are tied."""
    # Whatever is below the k-th largest of the maxima of disjoint groups of columns is not among the k best.
    maxima = scores
    while maxima.shape[1] >= 16 * k:
        half = maxima.shape[1] // 2
        maxima = np.maximum(maxima[:, :half], maxima[:, half : 2 * half])
    place = maxima.shape[1] - k
    kept = scores >= np.partition(maxima, place, axis=1)[:, place, None]
    most = 4 * k + 64
    if np.count_nonzero(kept) > len(kept) * most:  # ties by the thousand: do not list them
        kept[np.count_nonzero(kept, axis=1) > most] = False
    # What is kept, row by row, smaller columns first; a stable sort leaves equals in that order.
    row, column = np.divmod(np.flatnonzero(kept), scores.shape[1])
    count = np.bincount(row, minlength=len(scores))
    unsettled = (count < k) | (count > most)
    if unsettled.any():
        settled = ~unsettled[row]
        row, column, count = row[settled], column[settled], np.where(unsettled, 0, count)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    shape = (len(scores), max(k, int(count.max())))
    value, index = np.full(shape, -np.inf, dtype=np.float32), np.zeros(shape, dtype=np.int64)
    value[row, slot], index[row, slot] = scores[row, column], column
    best = np.argsort(-value, axis=1, kind="stable")[:, :k]
    return torch.from_numpy(np.take_along_axis(index, best, axis=1)), torch.from_numpy(np.flatnonzero(unsettled))


def _smaller_first(scores: Tensor, k: int) -> Tensor:
    """Indices `(B, k)` of the largest, smaller indices first among equals."""
    if scores.dtype == torch.float64:  # too wide for a key
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]
    # The bits of a float, read as an integer, have its order; for negative ones after turning all but the sign.
    bits = (scores.float() + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    last = scores.shape[-1] - 1
    key = (ordered << 32) + (last - torch.arange(last + 1, device=scores.device))
    return last - (torch.topk(key, k, dim=-1).values & 0xFFFFFFFF)
