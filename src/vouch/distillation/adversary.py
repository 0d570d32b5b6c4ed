"""Networks that try to tell a student from its teachers, and what the student learns from them.

A discriminator reads one pooled vector and says whose it is. `grl` turns its gradient round on the way to the student,
who so learns to be taken for the teacher, in one step for both players. `alternating` is the same game in two steps:
the discriminator learns, then the student is trained to be called a teacher. `cooperative` is what released code does:
the gradient is not turned round, so the student learns to be told apart. `none` has no discriminators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Adversary = Literal["grl", "alternating", "cooperative", "none"]
SIGN = {"grl": -1.0, "cooperative": 1.0}


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number; a negative one reverses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """`x` itself."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient times the number."""
        return gradients[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x`, with its gradient times `scale`; -1 is gradient reversal."""
    found: Tensor = Scaled.apply(x, scale)
    return found


class Discriminator(nn.Sequential):
    """`d -> d/2 -> d/4 -> 2` with ReLU between; the two outputs are logits for student and teacher.

    There is no ReLU at its end: with one, as in released code, the logits cannot fall below 0, nor the loss below
    `ln(2) / 2`, and a unit that is dead stays so.

    Args:
        most: at most so many values in the layers between.
    """

    def __init__(self, length: int, most: int | None = None) -> None:
        half, quarter = (max(2, min(length, 2 * (most or length)) // share) for share in (2, 4))
        super().__init__(nn.Linear(length, half), nn.ReLU(), nn.Linear(half, quarter), nn.ReLU(), nn.Linear(quarter, 2))


def telling(logits: Tensor, is_teacher: Tensor) -> Tensor:
    """Binary cross-entropy, mean over rows and both outputs `(n, 2)`: targets (1, 0) for students, (0, 1) for teachers."""
    teacher = is_teacher.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, torch.stack([1 - teacher, teacher], -1))


class Judges(nn.ModuleList):
    """A discriminator for each of several pairs of vectors."""

    def __init__(self, lengths: Sequence[int], most: int | None = None) -> None:
        super().__init__(Discriminator(length, most) for length in lengths)

    def losses(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float] = ()
    ) -> list[Tensor]:
        """How well each tells `(B, d_j)` of the student from `(B, d_j)` of the teacher, over the 2B rows.

        Args:
            weights: what the gradient is multiplied by on its way to each student vector, negative to reverse it; 0 by
                default. The discriminators themselves always learn at full strength.
        """
        weights = weights or [0.0] * len(student)
        found = []
        for judge, s, t, weight in zip(self, student, teacher, weights, strict=True):
            s = scale_gradient(s, weight) if weight else s.detach()
            rows = torch.cat([s, t.detach().to(s.dtype)])
            is_teacher = torch.arange(len(rows), device=rows.device) >= len(s)
            found.append(telling(judge(rows), is_teacher))
        return found

    def deceived(self, student: Sequence[Tensor]) -> list[Tensor]:
        """How far each is from taking the student's vectors `(B, d_j)` for a teacher's; trains the student alone."""
        found = []
        for judge, s in zip(self, student, strict=True):
            fixed = {name: value.detach() for name, value in judge.named_parameters()}
            logits = torch.func.functional_call(judge, fixed, (s,))
            found.append(telling(logits, torch.ones(len(s), dtype=torch.bool, device=s.device)))
        return found
