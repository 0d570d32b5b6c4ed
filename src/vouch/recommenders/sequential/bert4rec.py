"""BERT4Rec: a bidirectional transformer that fills in hidden items; a hidden item at the end is the next one.

Source: BERT4Rec, arXiv 1904.06690. In training each item is hidden with probability `mask_share`; in a share of the
sequences only the last item is, as the question will be (implementations that left this out score far too low, see
arXiv 2207.07483). What differs: the default learning rate is higher than the paper's 1e-4, which needs many times the
epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.config import Choice, Span, setting
from vouch.data import Interactions, Queries
from vouch.errors import DataError
from vouch.nn.transformer import Context, Transformer, init_weights
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import MASK, Draw, SequenceBatch, by_length, draw_all, windows
from vouch.recommenders.sequential.config import SequenceConfig
from vouch.recommenders.sequential.parts import Attention, Histories
from vouch.registry import Card, register
from vouch.training import NegativeSampler


class BERT4RecConfig(SequenceConfig):
    """Settings of BERT4Rec."""

    num_layers: int = setting(2, "transformer blocks", ge=1)
    num_heads: int = setting(2, "attention heads; divides hidden_size", ge=1)
    mask_share: float = setting(0.3, "chance of an item to be hidden", gt=0, lt=1, search=Span(0.15, 0.6))
    last_share: float = setting(0.2, "share of sequences in which only the last item is hidden", ge=0, le=1)
    loss: Literal["auto", "ce", "sampled_softmax"] = setting(
        "auto", "objective at hidden items; auto is ce up to 5,000 items, else sampled_softmax"
    )
    max_grad_norm: float = setting(5.0, "clip the gradient's norm to this; 0 does not", ge=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", ge=0, search=Choice((0.0, 0.01)))
    warmup_share: float = setting(0.02, "share of all steps in which the learning rate rises", ge=0, lt=1)


class BERT4RecEncoder(SequenceEncoder):
    """Item table with a mask row, bidirectional transformer, and the prediction head."""

    def __init__(self, n_items: int, config: BERT4RecConfig, attention: Attention | None = None) -> None:
        super().__init__(n_items)
        self.item = nn.Embedding(n_items + 2, config.hidden_size, padding_idx=0)
        self.transformer = Transformer(
            config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            max_length=config.max_length,
            dropout=config.dropout,
            variant="post",
            attention=attention,
        )
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_norm = nn.LayerNorm(config.hidden_size, eps=1e-8)
        self.apply(init_weights)
        self.bias = nn.Parameter(torch.zeros(n_items))

    def read(self, x_BTD: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """`(B, T, D)`; every position depends on both sides."""
        hidden = self.transformer(x_BTD, lengths, causal=False, context=context)
        if context.second is not None:
            context.second = self.output(context.second)
        return self.output(hidden)

    def output(self, hidden: Tensor) -> Tensor:
        """The prediction head."""
        return self.head_norm(F.gelu(self.head(hidden)))


class MaskedBatches:
    """Windows with hidden items; see `BERT4RecConfig` for the two ways of hiding."""

    def __init__(
        self,
        log: Interactions,
        config: BERT4RecConfig,
        sampler: NegativeSampler | None,
        negatives: int,
        draws: dict[str, Draw],
    ) -> None:
        self.log, self.config, self.sampler, self.n, self.draws = log, config, sampler, negatives, draws
        self.user, self.start, self.stop = windows(log, config.max_length, every_window=config.every_window)
        if len(self.user) == 0:
            raise DataError("no history has two events to learn from", hint="check the filters and the split")

    def __len__(self) -> int:
        return math.ceil(len(self.user) / self.config.batch_size)

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[SequenceBatch]:
        """Batches in random order; this rank takes every `world`-th window of each."""
        apart = generator.spawn(1)[0]  # leaves this one as it is
        for rows in by_length(self.stop - self.start, self.config.batch_size, generator):
            start, lengths = self.start[rows], self.stop[rows] - self.start[rows]
            place = np.arange(lengths.max())
            real = place < lengths[:, None]  # (B, T)
            items = np.where(real, self.log.item[np.where(real, start[:, None] + place, 0)], -1).astype(np.int64)
            hidden = real & (generator.random(real.shape) < self.config.mask_share)
            last = place == lengths[:, None] - 1
            only_last = (generator.random(len(rows)) < self.config.last_share) | ~hidden.any(1)
            hidden = np.where(only_last[:, None], last, hidden)
            total = int(hidden.sum())
            mine = slice(rank, None, world)
            items, hidden, lengths = items[mine], hidden[mine], lengths[mine]
            user, start, stop = self.user[rows][mine], start[mine], self.stop[rows][mine]
            target = items[hidden]
            drawn = np.zeros(0, np.int64) if self.sampler is None else self.sampler.draw(self.n, generator)
            yield SequenceBatch(
                torch.from_numpy(np.where(hidden, MASK, items)),
                torch.from_numpy(np.ascontiguousarray(lengths)),
                torch.from_numpy(np.flatnonzero(hidden)),
                torch.from_numpy(target),
                torch.from_numpy(drawn),
                torch.tensor(world / total, dtype=torch.float32),
                torch.from_numpy(user),
                draw_all(self.draws, Histories(self.log, user, start, stop, stop), apart),
            )


@register(
    Card(
        slug="bert4rec",
        name="BERT4Rec",
        area="recommenders/sequential",
        summary="a bidirectional transformer that fills in hidden items",
        paper="1904.06690",
        year=2019,
        baseline=True,
    )
)
class BERT4Rec(SequentialRecommender):
    """Bidirectional transformer recommendation."""

    Config = BERT4RecConfig
    attends = True

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> BERT4RecEncoder:
        """A new transformer."""
        return BERT4RecEncoder(n_items, self.config, self.attention(facts))

    def batches(self, log: Interactions, draws: dict[str, Draw] | None = None) -> MaskedBatches:
        """Windows with hidden items."""
        sampler = None
        if self.loss_kind() == "sampled_softmax":
            sampler = NegativeSampler(log, self.config.negatives_by, avoid_known=False)
        return MaskedBatches(log, self.config, sampler, min(self.config.negatives, log.n_items), draws or {})

    def schedule(self, steps: int, per_epoch: int) -> Callable[[int], float]:
        """A linear rise, then a linear fall to zero."""
        del per_epoch
        rise = max(1, int(self.config.warmup_share * steps))

        def factor(step: int) -> float:
            return (step + 1) / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise))

        return factor

    @property
    def reads(self) -> int:
        """One place is the question's."""
        return int(self.config.max_length) - 1

    def inputs(self, queries: Queries, rows: Any, lengths: Any) -> tuple[Any, Any]:
        """The history with a hidden item after its end."""
        items, lengths = super().inputs(queries, rows, lengths)
        items = np.concatenate([items, np.full((len(items), 1), -1, dtype=np.int64)], axis=1)
        items[np.arange(len(items)), lengths] = MASK
        return items, lengths + 1
