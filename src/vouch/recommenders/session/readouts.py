"""Read-outs: how the items of a session become one vector, for every prefix of it at once.

Shapes: `B` sessions, `E` ends of prefixes, `T` items, `L` levels, `H` heads, `D` hidden size. Item vectors come as
`(B, 1, T, D)` where all prefixes see the same, or `(B, E, T, D)`; item `j` belongs to the prefix that ends at `e` if
`j <= e`. The last items of each prefix come as `(B, E, L, D)`, newest first, zero before the session's start.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vouch.errors import ConfigError
from vouch.nn.dropout import Dropout

UNSEEN = -1e4
"""Stands for no weight among logarithms that go on to other functions, whose gradients an infinity would spoil."""


class AttenMixer(nn.Module):
    """Queries of several levels attend over the session; their attention maps are mixed by an Lp norm.

    Source: arXiv 2206.12781. Level `l` asks for what the last `l` items want.

    Args:
        level_pool: `concat` of the last `l` items, in order, as released; or their `sum`, which the paper describes.
        query_norm: queries are divided by their norm over the levels, as released, or over the features.

    Raises:
        ConfigError: `num_heads` does not divide `hidden_size`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        levels: int,
        num_heads: int,
        power: float,
        dropout: float,
        level_pool: Literal["concat", "sum"] = "concat",
        query_norm: Literal["level", "feature"] = "level",
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ConfigError(
                f"num_heads is {num_heads}, which does not divide hidden_size {hidden_size}",
                hint="choose a hidden_size that is a multiple of num_heads",
            )
        self.levels, self.num_heads, self.power = levels, num_heads, power
        self.level_pool, self.query_norm = level_pool, query_norm
        wide = level_pool == "concat"
        self.level = nn.ModuleList(
            nn.Linear(hidden_size * (n if wide else 1), hidden_size) for n in range(1, levels + 1)
        )
        self.query, self.key = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-8)
        self.out = nn.Linear(2 * hidden_size, hidden_size)
        self.dropout = Dropout(dropout)

    def queries(self, last_BELD: Tensor) -> Tensor:
        """One query a level `(B, E, L, D)`."""
        if self.level_pool == "concat":
            groups = [last_BELD[:, :, :n].flatten(2) for n in range(1, self.levels + 1)]
        else:
            groups = list(last_BELD.cumsum(2).unbind(2))
        Q = torch.stack([linear(group) for linear, group in zip(self.level, groups, strict=True)], 2)
        over = 2 if self.query_norm == "level" else 3
        return Q / torch.sqrt(Q.square().sum(over, keepdim=True).clamp(min=1e-24))

    def weights(self, h: Tensor, last_BELD: Tensor, seen_ET: Tensor) -> Tensor:
        """Attention `(B, E, H, T)` over the items of each prefix; rows sum to 1."""
        q = self.query(self.queries(last_BELD)).unflatten(-1, (self.num_heads, -1)).transpose(2, 3)  # (B, E, H, L, d)
        k = self.key(h).unflatten(-1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2)  # (B, 1|E, H, d, T)
        seen = seen_ET[:, None, None, :]
        a = torch.sigmoid((q @ k).float())
        log_p = torch.log_softmax((2 * a).masked_fill(~seen, UNSEEN), -1)  # (B, E, H, L, T)
        # the norm over the levels, in logarithms: powers of small shares would be 0
        r = (torch.logsumexp(self.power * log_p, 3) / self.power).exp()
        return torch.softmax((2 * r).masked_fill(~seen[:, :, 0], -torch.inf), -1)

    def forward(self, h: Tensor, last_BELD: Tensor, seen_ET: Tensor) -> Tensor:
        """`(B, E, D)`."""
        alpha = self.dropout(self.weights(h, last_BELD, seen_ET)).to(h.dtype)
        v = self.value(h).unflatten(-1, (self.num_heads, -1)).transpose(2, 3)  # (B, 1|E, H, T, d)
        c = (alpha.unsqueeze(3) @ v).flatten(2)  # (B, E, H, 1, d) to (B, E, D)
        return self.out(torch.cat([self.norm(c), last_BELD[:, :, 0]], -1))


class SoftAttention(nn.Module):
    """The read-out of SR-GNN (arXiv 1811.00855): `sum_j w . sigmoid(W_1 h_n + W_2 h_j + c) h_j`, joined with `h_n`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.last, self.item = nn.Linear(hidden_size, hidden_size, bias=False), nn.Linear(hidden_size, hidden_size)
        self.weight = nn.Linear(hidden_size, 1, bias=False)
        self.out = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, h: Tensor, last_BELD: Tensor, seen_ET: Tensor) -> Tensor:
        """`(B, E, D)`."""
        newest = last_BELD[:, :, 0]
        alpha = self.weight(torch.sigmoid(self.last(newest).unsqueeze(2) + self.item(h))).squeeze(-1)  # (B, E, T)
        mixed = ((alpha * seen_ET).unsqueeze(2) @ h).squeeze(2)
        return self.out(torch.cat([newest, mixed], -1))


class LastItem(nn.Module):
    """A map of the last item."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, h: Tensor, last_BELD: Tensor, seen_ET: Tensor) -> Tensor:
        """`(B, E, D)`."""
        del h, seen_ET
        return self.out(last_BELD[:, :, 0])
