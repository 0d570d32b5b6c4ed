"""Dropout that costs little on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each value with probability `p` and scale the others so that the mean is kept.

    On a CPU, where drawing the numbers is what dropout costs, four values share one 64-bit draw of torch's generator:
    `p` is then a multiple of 1/65,536. Elsewhere this is torch's own.
    """
    threshold = min(round(p * STEPS), STEPS - 1)
    if x.device.type != "cpu":
        return F.dropout(x, p)
    if threshold == 0:
        return x
    size = x.numel()
    draws = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    bits = draws.view(torch.int16)[:size].view(x.shape)  # uniform over -32,768..32,767
    return x * (bits >= threshold - STEPS // 2).to(x.dtype).mul_(STEPS / (STEPS - threshold))


class Dropout(nn.Module):
    """`dropout` while training, nothing otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return dropout(x, self.p) if self.training and self.p > 0 else x

    def extra_repr(self) -> str:
        """What is shown between the brackets when a network is printed."""
        return f"p={self.p}"
