"""The best k of each row, with ties settled the same way everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row of `(B, N)`, best first; among equals the smaller index wins, on every device.

    `torch.topk` alone leaves the choice among equals open. It finds the values; rows that hold ties among their best
    `k + 1` are then settled by a stable sort.
    """
    values, index = torch.topk(scores, min(k + 1, scores.shape[-1]), dim=-1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1)
    values, index = values[:, :k], index[:, :k]
    if tied.any():
        rows = scores[tied]
        order = torch.sort(rows, dim=-1, descending=True, stable=True).indices[:, :k]
        index, values = index.clone(), values.clone()
        index[tied], values[tied] = order, rows.gather(-1, order)
    return values, index
