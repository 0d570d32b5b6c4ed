"""GRU4Rec: a recurrent network over the history.

Source: Session-based Recommendations with Recurrent Neural Networks, arXiv 1511.06939; losses top1 and bpr_max also
arXiv 1706.03847. What differs: whole histories are read at once and every position is trained, with a softmax by
default; the paper's session-parallel mini-batches, which carry the state from batch to batch, are not offered.
"""

from __future__ import annotations

from torch import Tensor, nn

from vouch.config import Choice, setting
from vouch.nn.dropout import Dropout
from vouch.nn.transformer import Context, init_weights
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.config import SequenceConfig
from vouch.registry import Card, register


class GRU4RecConfig(SequenceConfig):
    """Settings of GRU4Rec."""

    recurrent_size: int = setting(128, "size of the recurrent state", ge=1, search=Choice((64, 128, 256)))
    num_layers: int = setting(1, "recurrent layers", ge=1)


class GRUEncoder(SequenceEncoder):
    """Item table, GRU, and a dense layer back to the item space."""

    def __init__(self, n_items: int, config: GRU4RecConfig) -> None:
        super().__init__(n_items)
        self.item = nn.Embedding(n_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = Dropout(config.dropout)
        self.gru = nn.GRU(config.hidden_size, config.recurrent_size, config.num_layers, batch_first=True)
        self.dense = nn.Linear(config.recurrent_size, config.hidden_size)
        self.apply(init_weights)

    def read(self, x_BTD: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """`(B, T, D)`; padding comes after the end, so it needs no packing."""
        del lengths, context
        hidden, _ = self.gru(self.dropout(x_BTD))
        return self.dense(self.dropout(hidden))


@register(
    Card(
        slug="gru4rec",
        name="GRU4Rec",
        area="recommenders/sequential",
        summary="a recurrent network over the history",
        paper="1511.06939",
        year=2016,
        baseline=True,
    )
)
class GRU4Rec(SequentialRecommender):
    """Recurrent recommendation."""

    Config = GRU4RecConfig

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> GRUEncoder:
        """A new recurrent network."""
        del facts
        return GRUEncoder(n_items, self.config)
