"""Architectures that tasks share: shared-bottom, MMoE and PLE over categorical fields.

Sources: Multitask Learning (Caruana 1997); Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts (KDD 2018); Progressive Layered Extraction (RecSys 2020). Gates are linear.
Shapes: `B` batch, `E` width of the input, `T` tasks, `N` experts, `D` width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Fields(nn.Module):
    """Vectors of categorical fields, side by side: codes `(B, F)` to `(B, F * size)`."""

    offsets: Tensor

    def __init__(self, sizes: Sequence[int], size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(sizes), size)
        nn.init.normal_(self.table.weight, std=0.01)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)
        self.width = len(sizes) * size

    def forward(self, codes_BF: Tensor) -> Tensor:
        """See above."""
        return self.table(codes_BF + self.offsets).flatten(1)


def dense(width: int, layers: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers with ReLU and dropout after each."""
    parts: list[nn.Module] = []
    for size in layers:
        parts += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*parts)


class Towers(nn.Module):
    """One small network a task, ending in one number: `T` inputs `(B, D)` to `T` outputs `(B,)`.

    Outputs stay apart: put together in one tensor, the graph would say that every task reaches every tower.
    """

    def __init__(self, tasks: int, width: int, layers: Sequence[int], dropout: float) -> None:
        super().__init__()
        last = layers[-1] if layers else width
        self.towers = nn.ModuleList(
            nn.Sequential(*dense(width, layers, dropout), nn.Linear(last, 1)) for _ in range(tasks)
        )

    def forward(self, h: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See above."""
        return tuple(tower(each).squeeze(1) for tower, each in zip(self.towers, h, strict=True))


class SharedBottom(nn.Module):
    """One body for all tasks: `(B, E)` to `T` outputs `(B,)`."""

    def __init__(
        self, width: int, tasks: int, *, bottom: Sequence[int], tower: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.bottom = dense(width, bottom, dropout)
        self.towers = Towers(tasks, bottom[-1], tower, dropout)
        self.tasks = tasks

    def forward(self, x_BE: Tensor) -> tuple[Tensor, ...]:
        """Outputs of all tasks."""
        return self.towers([self.bottom(x_BE)] * self.tasks)


def gated(gate: nn.Linear, x_BE: Tensor, experts_BND: Tensor) -> Tensor:
    """`sum_n softmax(gate(x))_n e_n`, `(B, D)`."""
    return torch.einsum("bn,bnd->bd", torch.softmax(gate(x_BE), -1), experts_BND)


class MMoE(nn.Module):
    """Experts for all, and a gate for each task; by default one expert more than there are tasks."""

    def __init__(
        self,
        width: int,
        tasks: int,
        *,
        bottom: Sequence[int],
        tower: Sequence[int],
        dropout: float = 0.0,
        experts: int | None = None,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(dense(width, bottom, dropout) for _ in range(experts or tasks + 1))
        self.gates = nn.ModuleList(nn.Linear(width, len(self.experts), bias=False) for _ in range(tasks))
        self.towers = Towers(tasks, bottom[-1], tower, dropout)

    def forward(self, x_BE: Tensor) -> tuple[Tensor, ...]:
        """Outputs of all tasks."""
        experts_BND = torch.stack([expert(x_BE) for expert in self.experts], 1)
        return self.towers([gated(gate, x_BE, experts_BND) for gate in self.gates])  # type: ignore[arg-type]


class _Level(nn.Module):
    """One level of PLE: `own` experts a task, `common` ones, a gate a task and, but for the last level, one for all."""

    def __init__(
        self, width: int, tasks: int, layers: Sequence[int], dropout: float, own: int, common: int, last: bool
    ) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.ModuleList(dense(width, layers, dropout) for _ in range(own)) for _ in range(tasks))
        self.common = nn.ModuleList(dense(width, layers, dropout) for _ in range(common))
        self.gates = nn.ModuleList(nn.Linear(width, own + common, bias=False) for _ in range(tasks))
        self.gate = None if last else nn.Linear(width, tasks * own + common, bias=False)

    def forward(self, x: list[Tensor], shared: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The tasks' inputs and the common one, to the next level's."""
        common = [expert(shared) for expert in self.common]
        own = [[expert(each) for expert in cast(nn.ModuleList, mine)] for mine, each in zip(self.own, x, strict=True)]
        out = [
            gated(gate, each, torch.stack([*mine, *common], 1))  # type: ignore[arg-type]
            for gate, each, mine in zip(self.gates, x, own, strict=True)
        ]
        if self.gate is None:
            return out, None
        return out, gated(self.gate, shared, torch.stack([*(e for mine in own for e in mine), *common], 1))


class PLE(nn.Module):
    """Experts for all and for each task, level upon level; experts of all levels but the last reach every task."""

    def __init__(
        self,
        width: int,
        tasks: int,
        *,
        bottom: Sequence[int],
        tower: Sequence[int],
        dropout: float = 0.0,
        levels: int = 1,
        own: int = 1,
        common: int = 1,
    ) -> None:
        super().__init__()
        widths = [width, *[bottom[-1]] * (levels - 1)]
        self.levels = nn.ModuleList(
            _Level(w, tasks, bottom, dropout, own, common, at == levels - 1) for at, w in enumerate(widths)
        )
        self.towers = Towers(tasks, bottom[-1], tower, dropout)
        self.tasks = tasks

    def forward(self, x_BE: Tensor) -> tuple[Tensor, ...]:
        """Outputs of all tasks."""
        x, shared = [x_BE] * self.tasks, x_BE
        for level in self.levels:
            x, shared = level(x, shared)
        return self.towers(x)


ARCHITECTURES: dict[str, type[SharedBottom] | type[MMoE] | type[PLE]] = {
    "shared-bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
}


class FieldNetwork(nn.Module):
    """Fields and one of the architectures: codes `(B, F)` to `T` outputs `(B,)`; logits where a task is binary.

    With `interaction` the factorisation machine's sum of products of field vectors,
    `((sum v)^2 - sum v^2) / 2`, is added to each output with a weight of its own.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        tasks: int,
        *,
        embedding_size: int,
        architecture: str = "shared-bottom",
        bottom: Sequence[int] = (64, 32),
        tower: Sequence[int] = (16,),
        dropout: float = 0.0,
        interaction: bool = False,
    ) -> None:
        super().__init__()
        self.fields = Fields(sizes, embedding_size)
        self.size = embedding_size
        kind = ARCHITECTURES[architecture]
        self.body = kind(self.fields.width, tasks, bottom=bottom, tower=tower, dropout=dropout)
        weights = [nn.Parameter(torch.zeros(())) for _ in range(tasks if interaction else 0)]
        self.interaction = nn.ParameterList(weights)

    def forward(self, codes_BF: Tensor) -> tuple[Tensor, ...]:
        """See above."""
        return self.read(self.fields(codes_BF))

    def read(self, x_BE: Tensor) -> tuple[Tensor, ...]:
        """Outputs for field vectors side by side."""
        out: tuple[Tensor, ...] = self.body(x_BE)
        if not self.interaction:
            return out
        v = x_BE.unflatten(1, (-1, self.size))
        products = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)  # (B,)
        return tuple(each + products * weight for each, weight in zip(out, self.interaction, strict=True))
