"""SR-GNN: a gated graph network over the clicks of a session, then soft attention.

Source: Session-based Recommendation with Graph Neural Networks, arXiv 1811.00855, with the normalised vectors and the
scaled cosine that all session recommenders here share (NISER, arXiv 1909.04276, does the same). `steps=0` leaves the
graph out. Every prefix has a graph of its own. The last click changes the edges of two nodes only, so prefixes share the
first step on all others; further steps and the read-out run on all items of all prefixes, which is what it costs.
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
        alike: int64 `(P,)`, the node of the same item in the last prefix that ended in a step from or to it: no edge at
            it has come since.
    """

    first: Tensor
    source: Tensor
    target: Tensor
    node: Tensor
    alike: Tensor


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
    before = torch.cat([first[:, :1], first[:, :-1]], 1)
    touched = nodes & ((first.unsqueeze(2) == place) | (before.unsqueeze(2) == place))  # by the last step
    alike = number.masked_fill(~touched, -1).cummax(1).values.masked_select(nodes)
    node = number.gather(2, first.unsqueeze(1).expand(B, T, T))
    step = first[:, :-1] * T + first[:, 1:]
    new = (step.unsqueeze(2) == step.unsqueeze(1)).int().argmax(2) == place[:-1] if T > 1 else step > 0
    edges = inside[:, :, 1:] & new.unsqueeze(1)  # (B, E, T - 1)
    source, target = node[:, :, :-1].masked_select(edges), node[:, :, 1:].masked_select(edges)
    return SessionGraphs(row * T + begin, source, target, node.masked_fill(~inside, len(row)), alike)


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
        every = torch.arange(len(graphs.first), device=h_BTD.device)
        x, at = h_BTD.flatten(0, 1), graphs.first  # before the first step a node has the vector of its place
        for step in range(self.steps):
            # the first step sees a node's own edges only, so nodes that are alike share its outcome
            outcome = every if step else graphs.alike
            x, at = self.propagate(x, at, graphs, outcome == every), (torch.cumsum(outcome == every, 0) - 1)[outcome]
        at = torch.cat([at, at.new_full((1,), len(x))])[graphs.node]
        return nn.functional.embedding(at, nn.functional.pad(unit(x), (0, 0, 0, 1)))

    def propagate(self, x: Tensor, at: Tensor, graphs: SessionGraphs, wanted: Tensor) -> Tensor:
        """One step: new vectors of the nodes in `wanted`, bool `(P,)`, in order; `at` is the row of `x` of each node."""
        number, nodes = torch.cumsum(wanted, 0) - 1, int(wanted.sum())
        into, out = wanted[graphs.target], wanted[graphs.source]
        before = self.before(x).index_select(0, at[graphs.source[into]])
        after = self.after(x).index_select(0, at[graphs.target[out]])
        message = torch.cat(
            [
                mean_of(before, number[graphs.target[into]], nodes),
                mean_of(after, number[graphs.source[out]], nodes),
            ],
            -1,
        )
        new: Tensor = self.cell(message, x.index_select(0, at[wanted]))
        return new


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
