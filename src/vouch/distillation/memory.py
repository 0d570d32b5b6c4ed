"""What outlasts one API of a stream: outputs that are only ever added to, and some of the answers it gave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GrowingHead(nn.Module):
    """Linear outputs on features, extended API by API; an output once assigned keeps its place and its meaning.

    Attributes:
        classes: all names so far, in the order they came. groups: the outputs of each API, in the API's own order.
        owner: the class that each output stands for.
    """

    def __init__(self, width: int, *, share: bool = True) -> None:
        """`share`: a class that another API knows keeps one output; otherwise each API gets outputs of its own."""
        super().__init__()
        self.width, self.share = width, share
        self.blocks = nn.ModuleList()
        self.classes: list[str] = []
        self.owner: list[int] = []
        self.groups: list[list[int]] = []

    def grow(self, names: Sequence[str]) -> list[int]:
        """Add an API with these classes; returns the outputs that answer for it."""
        columns, before = [], len(self.owner)
        for name in names:
            known = name in self.classes
            if not known:
                self.classes.append(name)
            number = self.classes.index(name)
            if not (known and self.share):
                self.owner.append(number)
            columns.append(self.owner.index(number) if self.share else len(self.owner) - 1)
        if len(self.owner) > before:  # torch warns of layers without outputs
            self.blocks.append(nn.Linear(self.width, len(self.owner) - before))
        self.groups.append(columns)
        return columns

    def forward(self, features: Tensor) -> Tensor:
        """All outputs `(B, n_outputs)` for features `(B, width)`."""
        return torch.cat([block(features) for block in self.blocks], 1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Scores `(B, n_classes)` that compare classes across APIs.

        With shared outputs these are the outputs. Otherwise each API's outputs are centred, because an API fixes them
        only up to a constant, and a class's are averaged over the APIs that know it.
        """
        if self.share:
            return outputs
        centre = torch.zeros_like(outputs)
        for columns in self.groups:
            centre[:, columns] = outputs[:, columns].mean(1, keepdim=True)
        owner = torch.tensor(self.owner, device=outputs.device)
        total = outputs.new_zeros(len(outputs), len(self.classes)).index_add_(1, owner, outputs - centre)
        return total / torch.bincount(owner, minlength=len(self.classes))


class Reservoir:
    """An even sample of at most `size` of all rows ever offered: those with the smallest random keys."""

    def __init__(self, size: int, shape: tuple[int, ...], classes: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.inputs = torch.empty(0, *shape, device=device)
        self.answers = torch.empty(0, classes, device=device)
        self.keys = torch.empty(0, device=device)

    def __len__(self) -> int:
        return len(self.keys)

    def clear(self) -> None:
        """Begin anew."""
        self.inputs, self.answers, self.keys = self.inputs[:0], self.answers[:0], self.keys[:0]

    def offer(self, inputs: Tensor, answers: Tensor) -> None:
        """Offer rows `(B, ...)` with their answers `(B, C)`."""
        if self.size == 0:
            return
        keys = torch.rand(len(inputs), device=inputs.device)
        if len(self) == self.size:
            better = keys < self.keys.max()
            if not bool(better.any()):
                return
            inputs, answers, keys = inputs[better], answers[better], keys[better]
        keys = torch.cat([self.keys, keys])
        kept = keys.topk(min(self.size, len(keys)), largest=False).indices
        self.inputs = torch.cat([self.inputs, inputs])[kept]
        self.answers = torch.cat([self.answers, answers])[kept]
        self.keys = keys[kept]
