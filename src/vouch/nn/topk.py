"""The best k of each row, with ties settled the same way everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 1 << 19
"""Scores held at once where ties have to be settled."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row of `(B, N)`, best first; among equals the smaller index wins, on every device.

    `torch.topk` alone leaves the choice among equals open. It finds the values; rows that hold ties among their best
    `k + 1` are then settled by a key that no two items share.

    Returns:
        Values and int64 indices, `(B, k)` each.
    """
    values, index = torch.topk(scores, min(k + 1, scores.shape[-1]), dim=-1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1).nonzero().squeeze(-1)
    values, index = values[:, :k], index[:, :k]
    if len(tied):
        index = index.contiguous()
        for rows in tied.split(max(1, CELLS // scores.shape[-1])):
            index[rows] = _smaller_first(scores[rows], k)
        values = scores.gather(-1, index)
    return values, index


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
