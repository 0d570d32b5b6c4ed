"""SR-GNN: a gated graph network over the clicks of a session, then soft attention.

Source: Session-based Recommendation with Graph Neural Networks, arXiv 1811.00855, with the normalised vectors and the
scaled cosine that all session recommenders here share (NISER, arXiv 1909.04276, does the same). `steps=0` leaves the
graph out. Every prefix has a graph of its own, so a prefix cannot share the work of another: the network runs on
`T` graphs a session, which is what it costs.
"""

from __future__ import annotations

from typing import Literal

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


def session_graphs(rows_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The graph of every prefix, on places: an item's node is the place where it first occurs.

    Args:
        rows_BT: item rows, 0 at padding.

    Returns:
        node: int64 `(B, T)` of each place. incoming, outgoing: float `(B, E, T, T)`; row `u` of `incoming` holds the
        shares of the nodes before `u` among all that go there, of `outgoing` those of the nodes after it.
    """
    T = rows_BT.shape[1]
    same = rows_BT.unsqueeze(2) == rows_BT.unsqueeze(1)
    node = same.int().argmax(2)  # the first place of the same item
    hot = torch.nn.functional.one_hot(node, T).float()  # (B, T, T)
    real = (rows_BT > 0).float().unsqueeze(2)
    step = (hot[:, :-1] * real[:, :-1]).unsqueeze(3) * (hot[:, 1:] * real[:, 1:]).unsqueeze(2)  # (B, T - 1, T, T)
    edges = torch.nn.functional.pad(step.cumsum(1), (0, 0, 0, 0, 1, 0)).clamp(max=1)  # (B, E, from, to)
    outgoing = edges / edges.sum(3, keepdim=True).clamp(min=1)
    incoming = (edges / edges.sum(2, keepdim=True).clamp(min=1)).transpose(2, 3)
    return node, incoming, outgoing


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
        """`(B, E, T, D)`: the items of each prefix after propagation in its own graph."""
        if self.steps == 0:
            return super().see(h_BTD, context)
        assert context.rows is not None
        node, incoming, outgoing = session_graphs(context.rows)
        B, T, D = h_BTD.shape
        x = h_BTD.unsqueeze(1).expand(B, T, T, D)  # node u of each prefix; those that are no first place are not used
        for _ in range(self.steps):
            # a node that occurs first at `u` has the vector of that place
            message = torch.cat([incoming @ self.before(x), outgoing @ self.after(x)], -1)
            x = self.cell(message.flatten(0, 2), x.flatten(0, 2)).view(B, T, T, D)
        index = node[:, None, :, None].expand(B, T, T, D)
        return unit(x.gather(2, index))


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
