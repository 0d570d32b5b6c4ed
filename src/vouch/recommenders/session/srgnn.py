"""SR-GNN: a gated graph network over the clicks of a session, then soft attention.

Source: Session-based Recommendation with Graph Neural Networks, arXiv 1811.00855, with the normalised vectors and the
scaled cosine that all session recommenders here share (NISER, arXiv 1909.04276, does the same). `steps=0` leaves the
graph out. Every prefix has a graph of its own, so a prefix cannot share the work of another: the network runs on
`T` graphs a session, which is what it costs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vouch.config import setting
from vouch.nn.transformer import Context
from vouch.recommenders.session.base import SessionConfig, SessionEncoder, SessionRecommender, unit
from vouch.registry import Card, register


class SRGNNConfig(SessionConfig):
    """Settings of SR-GNN."""

    steps: int = setting(1, "gated propagation steps; 0 leaves the graph out", ge=0)
    readout: Literal["attenmixer", "attention", "last"] = setting(
        "attention", "how items become a session vector: Atten-Mixer, soft attention by the last item, or the last item"
    )
    scale: float = setting(12.0, "factor on the cosine of session and item", gt=0)


class SessionGraphs(NamedTuple):
    """The graphs of all prefixes of a batch as one graph: `P` nodes, one for each distinct item of each prefix.

    Attributes:
        first: int64 `(P,)`, where the node's item first occurs: row in the session times T, plus the place.
        source, target: int64 `(E,)`, nodes that edges lead from and to; an edge stands once in a prefix.
        node: int64 `(B, T, T)`, the node of item `j` in the prefix that ends at `e`; P where it is not in it.
    """

    first: Tensor
    source: Tensor
    target: Tensor
    node: Tensor


def session_graphs(rows_BT: Tensor) -> SessionGraphs:
    """The graph of every prefix: its edges lead from each click to the next.

    Args:
        rows_BT: item rows, 0 at padding.
    """
    B, T = rows_BT.shape
    place = torch.arange(T, device=rows_BT.device)
    real = rows_BT > 0
    inside = real.unsqueeze(2) & (place.unsqueeze(1) >= place)  # (B, E, T): place j is in the prefix that ends at e
    first = (rows_BT.unsqueeze(2) == rows_BT.unsqueeze(1)).int().argmax(2)  # (B, T): where the item occurs first
    nodes = inside & (first == place).unsqueeze(1)
    row, _, begin = nodes.nonzero().unbind(1)
    number = torch.zeros_like(nodes, dtype=torch.int64).masked_scatter(nodes, torch.arange(len(row), device=row.device))
    node = number.gather(2, first.unsqueeze(1).expand(B, T, T))
    step = first[:, :-1] * T + first[:, 1:]
    new = (step.unsqueeze(2) == step.unsqueeze(1)).int().argmax(2) == place[:-1] if T > 1 else step > 0
    edges = inside[:, :, 1:] & new.unsqueeze(1)  # (B, E, T - 1)
    source, target = node[:, :, :-1].masked_select(edges), node[:, :, 1:].masked_select(edges)
    return SessionGraphs(row * T + begin, source, target, node.masked_fill(~inside, len(row)))


def mean_of(x_ED: Tensor, at: Tensor, size: int) -> Tensor:
    """Mean `(size, D)` of the rows that go to each place; zero where none does."""
    counts = torch.bincount(at, minlength=size).clamp(min=1)
    return x_ED.new_zeros(size, x_ED.shape[1]).index_add(0, at, x_ED) / counts.unsqueeze(1)


class SRGNNEncoder(SessionEncoder):
    """Gated graph network under the read-out."""

    def __init__(self, n_items: int, config: SRGNNConfig) -> None:
        super().__init__(n_items, config)
        size = config.hidden_size
        self.steps = config.steps
        self.before, self.after = nn.Linear(size, size), nn.Linear(size, size)
        self.cell = nn.GRUCell(2 * size, size)
        self.start()

    def see(self, h_BTD: Tensor, context: Context) -> Tensor:
        """`(B, E, T, D)`: the items of each prefix after propagation in its own graph; zero where there is none."""
        if self.steps == 0:
            return super().see(h_BTD, context)
        assert context.rows is not None
        graphs = session_graphs(context.rows)
        source, target, nodes = graphs.source, graphs.target, len(graphs.first)
        x, at = h_BTD.flatten(0, 1), graphs.first  # before the first step a node has the vector of its place
        for _ in range(self.steps):
            before = self.before(x).index_select(0, at[source])
            after = self.after(x).index_select(0, at[target])
            message = torch.cat([mean_of(before, target, nodes), mean_of(after, source, nodes)], -1)
            x = self.cell(message, x.index_select(0, at))
            at = torch.arange(nodes, device=x.device)
        return nn.functional.embedding(graphs.node, nn.functional.pad(unit(x), (0, 0, 0, 1)))


@register(
    Card(
        slug="srgnn",
        name="SR-GNN",
        area="recommenders/session",
        summary="a gated graph network over the clicks of a session",
        paper="1811.00855",
        year=2019,
        baseline=True,
    )
)
class SRGNN(SessionRecommender):
    """Graph network over a session."""

    Config = SRGNNConfig

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> SRGNNEncoder:
        """A new encoder."""
        del facts
        return SRGNNEncoder(n_items, self.config)
