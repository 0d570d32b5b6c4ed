"""SASRec: a causal transformer over the history; its last output ranks the next item.

Source: Self-Attentive Sequential Recommendation, arXiv 1808.09781. What differs from the paper: the default loss is a
softmax (over the catalogue, or over sampled items where it is large), which is worth more than any other change
(arXiv 2308.07192, 2309.07602); the paper's own is `--set loss=bce --set variant=original`. All positions of a history
are trained in one pass. Positions count from the most recent item.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vouch.config import Choice, setting
from vouch.nn.transformer import Context, Transformer, Variant, init_weights
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.config import SequenceConfig
from vouch.recommenders.sequential.parts import Attention
from vouch.registry import Card, register


class SASRecConfig(SequenceConfig):
    """Settings of SASRec."""

    num_layers: int = setting(2, "transformer blocks", ge=1, search=Choice((1, 2)))
    num_heads: int = setting(2, "attention heads; divides hidden_size", ge=1)
    variant: Variant = setting("post", "where the norms stand: original, pre or post")
    inner_size: int = setting(0, "size of the feed-forward layers; 0 is 4 x hidden_size (1 x for original)", ge=0)
    positions: bool = setting(True, "add position vectors to the input (attention kinds with their own never do)")
    tied: bool = setting(True, "one item table for input and output")
    item_bias: bool = setting(False, "a learned popularity term per item")


class SASRecEncoder(SequenceEncoder):
    """Item table and causal transformer."""

    def __init__(self, n_items: int, config: SASRecConfig, attention: Attention | None = None) -> None:
        super().__init__(n_items)
        self.item = nn.Embedding(n_items + 1, config.hidden_size, padding_idx=0)
        self.transformer = Transformer(
            config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            max_length=config.max_length,
            dropout=config.dropout,
            variant=config.variant,
            attention=attention,
            positions=config.positions,
            inner_size=config.inner_size or None,
        )
        self.output = None if config.tied else nn.Embedding(n_items, config.hidden_size)
        self.apply(init_weights)
        self.bias = nn.Parameter(torch.zeros(n_items)) if config.item_bias else None

    def read(self, x_BTD: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """`(B, T, D)`; position `t` depends on items up to `t` only."""
        return self.transformer(x_BTD, lengths, context=context)

    def item_vectors(self) -> Tensor:
        """The input table, or the output table where they are not tied."""
        return super().item_vectors() if self.output is None else self.output.weight


@register(
    Card(
        slug="sasrec",
        name="SASRec",
        area="recommenders/sequential",
        summary="a causal transformer over the history",
        paper="1808.09781",
        year=2018,
        baseline=True,
    )
)
class SASRec(SequentialRecommender):
    """Self-attentive sequential recommendation."""

    Config = SASRecConfig
    attends = True

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> SASRecEncoder:
        """A new transformer."""
        return SASRecEncoder(n_items, self.config, self.attention(facts))
