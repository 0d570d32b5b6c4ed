"""What session recommenders share: item and session vectors of length 1, a scaled cosine, and a choice of read-outs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.config import Choice, setting
from vouch.nn.dropout import Dropout
from vouch.nn.transformer import Context
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatches
from vouch.recommenders.sequential.config import SequenceConfig
from vouch.recommenders.session.readouts import AttenMixer, LastItem, SoftAttention


class SessionConfig(SequenceConfig):
    """Settings of every session recommender."""

    hidden_size: int = setting(256, "length of the item and session vectors", ge=2, search=Choice((64, 128, 256)))
    max_length: int = setting(20, "most recent items that are read", ge=2)
    dropout: float = setting(
        0.1, "share of values dropped in training, in items, attention and the item matrix", ge=0, lt=1
    )
    readout: Literal["attenmixer", "attention", "last"] = setting(
        "attenmixer",
        "how items become a session vector: Atten-Mixer, soft attention by the last item, or the last item",
    )
    levels: int = setting(
        7, "for attenmixer: queries of the last 1 to so many items (L)", ge=1, search=Choice((1, 3, 7))
    )
    num_heads: int = setting(8, "for attenmixer: attention heads; divides hidden_size", ge=1)
    power: float = setting(4.0, "for attenmixer: the norm that mixes the levels (p)", ge=1)
    level_pool: Literal["concat", "sum"] = setting("concat", "for attenmixer: how the items of a level are joined")
    query_norm: Literal["level", "feature"] = setting(
        "level", "for attenmixer: queries have norm 1 over levels or features"
    )
    scale: float = setting(16.0, "factor on the cosine of session and item", gt=0)
    order: Literal["shuffled", "time"] = setting("shuffled", "order of the sessions in an epoch; time: oldest first")
    batch_size: int = setting(100, "sessions of one batch", ge=1)
    epochs: int = setting(10, "most passes over the training log", ge=1)
    patience: int = setting(3, "validations without a better value before training stops", ge=1)
    weight_decay: float = setting(1e-5, "L2 penalty, as part of the gradient", ge=0)
    rate_decay: float = setting(0.1, "factor on the learning rate every three epochs", gt=0, le=1)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 over the last axis; zero stays zero."""
    return F.normalize(x, dim=-1, eps=1e-12)


class SessionEncoder(SequenceEncoder):
    """Normalised items, what `see` makes of them, a read-out, and a session vector of length `scale`."""

    def __init__(self, n_items: int, config: SessionConfig) -> None:
        super().__init__(n_items)
        size = config.hidden_size
        self.item = nn.Embedding(n_items + 1, size, padding_idx=0)
        self.dropout, self.scale = Dropout(config.dropout), config.scale
        self.levels = config.levels if config.readout == "attenmixer" else 1
        self.readout: nn.Module
        if config.readout == "attenmixer":
            self.readout = AttenMixer(
                size,
                levels=config.levels,
                num_heads=config.num_heads,
                power=config.power,
                dropout=config.dropout,
                level_pool=config.level_pool,
                query_norm=config.query_norm,
            )
        else:
            self.readout = SoftAttention(size) if config.readout == "attention" else LastItem(size)

    def start(self) -> None:
        """All parameters uniform in +-1 / sqrt(D), as published; to be called at the end of `__init__`."""
        bound = self.item.embedding_dim**-0.5
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound)
            self.item.weight[0].zero_()

    def see(self, h_BTD: Tensor, context: Context) -> Tensor:
        """Item vectors as the read-out takes them: `(B, 1, T, D)`, or `(B, E, T, D)` for each prefix."""
        del context
        return h_BTD.unsqueeze(1)

    def read(self, x_BTD: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """`(B, T, D)` of length `scale`, for every prefix."""
        del lengths
        T = x_BTD.shape[1]
        h = self.see(unit(self.dropout(unit(x_BTD))), context)
        place = torch.arange(T, device=x_BTD.device)
        seen = place.unsqueeze(1) >= place  # (E, T)
        back = place.unsqueeze(1) - torch.arange(self.levels, device=x_BTD.device)  # (E, L)
        whose = place.unsqueeze(1) if h.shape[1] > 1 else place.new_zeros(1, 1)
        last = h[:, whose, back.clamp(min=0)] * (back >= 0).unsqueeze(-1)  # (B, E, L, D)
        return self.scale * unit(self.readout(h, last, seen))

    def item_vectors(self) -> Tensor:
        """`(N, D)` of length 1; in training with dropout, which changes their lengths."""
        return self.dropout(unit(super().item_vectors()))


class ByTime(SequenceBatches):
    """Sessions in the order of their first events."""

    def order(self, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Batches of rows, the oldest session first."""
        del generator
        rows = np.arange(len(self.start))
        if self.log.time is not None:
            rows = np.argsort(self.log.time[self.start], kind="stable")
        for first in range(0, len(rows), self.batch_size):
            yield rows[first : first + self.batch_size]


class SessionRecommender(SequentialRecommender):
    """Ranks items by the cosine with the session vector."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam, with the penalty in the gradient."""
        config = self.config
        return torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def schedule(self, steps: int, per_epoch: int) -> Callable[[int], float]:
        """The learning rate falls every three epochs."""
        del steps
        decay = self.config.rate_decay
        return lambda step: float(decay ** (step // per_epoch // 3))

    def batch_type(self) -> type[SequenceBatches]:
        """Batches in the order that the settings ask for."""
        return ByTime if self.config.order == "time" else SequenceBatches
