"""Sampling neighbourhoods of a graph in compressed rows, and two convolutions on them.

Everything is index arithmetic on tensors, on their device. Shapes: `M` nodes, `S` neighbours drawn, `E` edges, `D` size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Edges(NamedTuple):
    """Edges into some nodes, grouped by the node they enter.

    Attributes:
        source: int64 `(E,)`. bounds: int64 `(M + 1,)`, edges of each node. weight: float32 `(E,)`.
    """

    source: Tensor
    bounds: Tensor
    weight: Tensor


def draw_neighbours(
    indptr: Tensor, indices: Tensor, weight: Tensor, nodes: Tensor, size: int, generator: torch.Generator | None = None
) -> Edges:
    """For each node at most `size` of its neighbours, uniformly and without repeats; all where there are no more.

    Args:
        indptr, indices, weight: the graph. nodes: int64 `(M,)`.
    """
    first = indptr[nodes]
    degree = indptr[nodes + 1] - first
    # Floyd's method for all rows at once: the s-th draw is from the first `degree - size + s + 1` places, and where it
    # was drawn before, the last of these is taken, which cannot have been. Draws stand in rows, nodes in columns.
    chance = torch.rand(len(nodes), size, generator=generator, device=nodes.device, dtype=torch.float64)
    many = (degree > size).nonzero().squeeze(1)
    top = (degree[many] - size) + torch.arange(size, device=nodes.device).unsqueeze(1)  # (S, M)
    drawn = torch.minimum((chance[many].T * (top + 1)).long(), top).int()
    top = top.int()
    for s in range(1, size):
        again = (drawn[:s] == drawn[s]).any(0)
        drawn[s] = torch.where(again, top[s], drawn[s])
    every = torch.arange(size, device=nodes.device)
    chosen = every.repeat(len(nodes), 1)
    chosen[many] = drawn.T.long()
    count = degree.clamp(max=size)
    flat = (first.unsqueeze(1) + chosen).masked_select(every < count.unsqueeze(1))
    bounds = F.pad(count.cumsum(0), (1, 0))
    return Edges(indices.index_select(0, flat).long(), bounds, weight.index_select(0, flat))


def all_neighbours(indptr: Tensor, indices: Tensor, weight: Tensor) -> Edges:
    """Every edge of the graph."""
    return Edges(indices.long(), indptr, weight)


class _BagSums(torch.autograd.Function):
    """Weighted sums of the rows of each bag; its gradient is such a sum too, several times faster than torch's own."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, source: Tensor, bounds: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(source, bounds, weight)
        ctx.rows = len(x_MD)
        return _bags(source, x_MD, bounds, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        source, bounds, weight = ctx.saved_tensors
        order = torch.argsort(source, stable=True)  # the same edges, grouped by the node they leave
        nodes = torch.arange(len(bounds) - 1, device=source.device)
        target = torch.repeat_interleave(nodes, bounds.diff()).index_select(0, order)
        starts = F.pad(torch.bincount(source, minlength=ctx.rows).cumsum(0), (1, 0))
        return _bags(target, gradients[0].contiguous(), starts, weight.index_select(0, order)), None, None, None


def _bags(source: Tensor, x_MD: Tensor, bounds: Tensor, weight: Tensor) -> Tensor:
    """Sums `(len(bounds) - 1, D)` of rows by weight, zero for an empty bag."""
    return F.embedding_bag(source, x_MD, bounds[:-1], mode="sum", per_sample_weights=weight)


def weighted_sums(x_MD: Tensor, edges: Edges, weight: Tensor) -> Tensor:
    """For each node the sum of its neighbours' vectors by weight; zero where it has none. Weights get no gradient."""
    if len(edges.source) == 0:
        return x_MD.new_zeros(len(edges.bounds) - 1, x_MD.shape[1])
    sums: Tensor = _BagSums.apply(x_MD, edges.source, edges.bounds, weight)
    return sums


class GCN(nn.Module):
    """`x'_i = W^T (sum_j w_ij / sqrt(D_i D_j) x_j + x_i / D_i) + b`, `D_i = 1 + sum_j w_ij` over the edges given."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x_MD: Tensor, edges: Edges) -> Tensor:
        """The first nodes of `x` are those that the edges enter; the others have their self-loop only."""
        targets = len(edges.bounds) - 1
        node = torch.repeat_interleave(torch.arange(targets, device=x_MD.device), edges.bounds.diff())
        D = torch.ones(len(x_MD), device=x_MD.device).index_add(0, node, edges.weight)
        scale = D.rsqrt()
        weight = edges.weight * scale.index_select(0, node) * scale.index_select(0, edges.source)
        mixed = weighted_sums(x_MD, edges, weight)
        looped = x_MD / D.unsqueeze(1)
        return self.linear(torch.cat([looped[:targets] + mixed, looped[targets:]]))


class SAGE(nn.Module):
    """`x'_i = W_l mean_j x_j + W_r x_i + b`, of length 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.neighbours = nn.Linear(size, size)
        self.own = nn.Linear(size, size, bias=False)

    def forward(self, x_MD: Tensor, edges: Edges) -> Tensor:
        """`(targets, D)`: the nodes that the edges enter, which are the first of `x`."""
        counts = edges.bounds.diff()
        share = torch.repeat_interleave(1.0 / counts.clamp(min=1), counts)
        mean = weighted_sums(x_MD, edges, share)
        return F.normalize(self.neighbours(mean) + self.own(x_MD[: len(counts)]), dim=-1)


class GraphEncoder(nn.Module):
    """Two hops of GCN and SAGE on drawn neighbourhoods: the global context of items, rows of length 1.

    The GCN is one for both hops; ReLU and dropout stand between the hops. Source: arXiv 2205.14837.
    """

    indptr: Tensor
    indices: Tensor
    weight: Tensor

    def __init__(
        self, size: int, indptr: Tensor, indices: Tensor, weight: Tensor, *, neighbors: int, dropout: float
    ) -> None:
        super().__init__()
        for name, tensor in (("indptr", indptr), ("indices", indices), ("weight", weight)):
            self.register_buffer(name, tensor, persistent=False)
        self.neighbors, self.dropout = neighbors, dropout
        self.gcn = GCN(size)
        self.sage = nn.ModuleList(SAGE(size) for _ in range(2))  # outer hop, inner hop

    def forward(self, table_ND: Tensor, nodes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`(M, D)` for distinct nodes `(M,)`, from the vectors `(N, D)` of all items and a fresh draw."""
        inner = draw_neighbours(self.indptr, self.indices, self.weight, nodes, self.neighbors, generator)
        middle, inner = _local(nodes, inner, len(table_ND))
        outer = draw_neighbours(self.indptr, self.indices, self.weight, middle, self.neighbors, generator)
        outermost, outer = _local(middle, outer, len(table_ND))
        x = table_ND.index_select(0, outermost)
        x = self.sage[0](self.gcn(x, outer), outer)
        x = F.dropout(F.relu(x), self.dropout, self.training)
        return self.sage[1](self.gcn(x, inner), inner)


def _local(nodes: Tensor, edges: Edges, total: int) -> tuple[Tensor, Edges]:
    """The nodes with the sources of their edges, each once, `nodes` first; and the edges in the numbers of that list."""
    place = torch.full((total,), -1, dtype=torch.int64, device=nodes.device)
    place[nodes] = torch.arange(len(nodes), device=nodes.device)
    reached = torch.zeros(total, dtype=torch.bool, device=nodes.device)
    reached[edges.source] = True
    fresh = (reached & (place < 0)).nonzero().squeeze(1)
    place[fresh] = torch.arange(len(nodes), len(nodes) + len(fresh), device=nodes.device)
    return torch.cat([nodes, fresh]), edges._replace(source=place.index_select(0, edges.source))


def mmd(X: Tensor, Y: Tensor, real: Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy of two samples, by a sum of five Gaussians, biased form: `(...)`.

    Bandwidths are `bw * 2 ** (i - 2)`, `bw` the sum of all squared distances in the joined sample by `n (n - 1)`, taken
    without gradient.

    Args:
        X, Y: `(..., n, F)` samples. real: bool `(..., n)`, which rows count, for both; all by default.
    """
    Z = torch.cat([X, Y], -2).float()
    square = torch.cdist(Z, Z).square() if not Z.requires_grad else _squared_distances(Z)
    n = X.shape[-2]
    counts = torch.ones(Z.shape[:-1], device=Z.device) if real is None else torch.cat([real, real], -1).float()
    pairs = counts.unsqueeze(-1) * counts.unsqueeze(-2)
    total = counts.sum(-1)
    bandwidth = (square.detach() * pairs).sum((-1, -2)) / (total.square() - total).clamp(min=1)
    bandwidth = bandwidth.clamp(min=1e-12)[..., None, None]
    kernel = torch.stack([torch.exp(-square / (bandwidth * 2.0 ** (i - 2))) for i in range(5)]).sum(0)
    sign = torch.ones(2 * n, device=Z.device)
    sign[n:] = -1
    weighted = kernel * pairs * sign.unsqueeze(-1) * sign
    return weighted.sum((-1, -2)) / (total / 2).square().clamp(min=1)


def _squared_distances(Z: Tensor) -> Tensor:
    """As `cdist` squared, whose gradient is not defined at distance 0."""
    norm = Z.square().sum(-1)
    return (norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * Z @ Z.transpose(-1, -2)).clamp(min=0)
