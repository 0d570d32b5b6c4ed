"""What sequential recommenders share: an encoder of histories, an objective at every position, and how they rank.

A method is an encoder (`SequenceEncoder`) with its settings. The objective is one of the losses of `vouch.nn.losses`,
at every real position. Shapes: `B` batch, `T` positions, `D` hidden size, `N` items, `n` targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vouch.config import Choice, Span, setting
from vouch.data import Interactions, Queries, Split
from vouch.data.queries import flat_rows
from vouch.errors import ConfigError
from vouch.evaluation import evaluate
from vouch.nn import losses
from vouch.recommenders.base import Recommender
from vouch.recommenders.sequential.batches import MASK, SequenceBatch, SequenceBatches
from vouch.training import FitReport, NegativeSampler, Run, TrainConfig, fit, seeded

ENCODE_TOKENS = 1 << 13
"""Positions encoded at once when scoring."""
SHARED = ("sampled_softmax", "gbce", "top1", "bpr_max")
"""Losses whose negatives are drawn once a batch and shared by its targets."""

PAIRWISE: dict[str, Callable[..., Tensor]] = {
    "bce": losses.bce,
    "bpr": losses.bpr,
    "top1": losses.top1,
    "bpr_max": losses.bpr_max,
}

Loss = Literal["auto", "ce", "sampled_softmax", "gbce", "bce", "bpr", "top1", "bpr_max"]


class SequenceConfig(TrainConfig):
    """Settings of every sequential recommender."""

    hidden_size: int = setting(64, "length of the item and query vectors", ge=2, search=Choice((32, 64, 128)))
    max_length: int = setting(50, "most recent history items that are read", ge=2)
    dropout: float = setting(0.5, "share of activations dropped in training", ge=0, lt=1, search=Span(0.1, 0.6))
    loss: Loss = setting("auto", "objective at every position; auto is ce up to 5,000 items, else sampled_softmax")
    negatives: int = setting(1024, "items drawn for the losses that sample (bce and bpr always draw 1)", ge=1)
    negatives_by: Literal["uniform", "popularity"] = setting(
        "uniform", "how they are drawn; popularity draws by count ** 0.75 and corrects the softmax for it"
    )
    calibration: float = setting(0.75, "for gbce: t, 0 is plain BCE, 1 gives calibrated probabilities", ge=0, le=1)
    every_window: bool = setting(True, "learn from all of a long history, not only its last max_length events")
    epochs: int = setting(200, "most passes over the training log", ge=1)
    batch_size: int = setting(128, "histories of one batch", ge=1)
    patience: int = setting(15, "validations without a better value before training stops", ge=1)


class SequenceEncoder(nn.Module, ABC):
    """Turns histories into vectors. A subclass sets `item`, an embedding with the rows `[padding, items..., extra...]`.

    Attributes:
        item: `(1 + N + extra, D)`; row `code + 1` is an item, row 0 padding, which stays zero.
        n_items: N.
        bias: `(N,)` added to the scores, or None.
    """

    item: nn.Embedding
    bias: nn.Parameter | None

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.n_items = n_items
        self.register_parameter("bias", None)

    @abstractmethod
    def forward(self, items_BT: Tensor, lengths: Tensor) -> Tensor:
        """Vectors `(B, T, D)` of left-aligned codes `(B, T)`: -1 after the end, `MASK` where hidden."""

    def rows(self, items_BT: Tensor) -> Tensor:
        """Rows of the item table: padding 0, items `code + 1`, hidden `N + 1`."""
        return torch.where(items_BT == MASK, self.n_items + 1, items_BT + 1)

    def item_vectors(self) -> Tensor:
        """`(N, D)` vectors that the output is compared with; the input table unless a subclass keeps another."""
        return self.item.weight[1 : self.n_items + 1]


class Objective(nn.Module):
    """An encoder with its loss at every target: what `fit` trains."""

    def __init__(self, encoder: SequenceEncoder, loss: str, *, calibration: float = 0.75, log_q: Tensor | None = None):
        super().__init__()
        self.encoder, self.kind, self.calibration = encoder, loss, calibration
        self.log_q: Tensor | None
        self.register_buffer("log_q", log_q, persistent=False)

    def loss(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """`{"loss": mean over all targets}`."""
        hidden_BTD = self.encoder(batch.items, batch.lengths)
        hidden = hidden_BTD.flatten(0, 1).index_select(0, batch.at)  # (n, D)
        table, bias = self.encoder.item_vectors(), self.encoder.bias
        target, negatives, weight = batch.target, batch.negatives, batch.weight
        if self.kind == "ce":
            return {"loss": losses.cross_entropy(hidden, table, target, bias=bias, weight=weight)}
        if self.kind == "sampled_softmax":
            return {
                "loss": losses.sampled_softmax(
                    hidden, table, target, negatives, log_q=self.log_q, bias=bias, weight=weight
                )
            }
        positive = (hidden * table[target]).sum(-1)
        shared = negatives.dim() == 1
        negative = hidden @ table[negatives].T if shared else torch.einsum("nd,nmd->nm", hidden, table[negatives])
        if bias is not None:
            positive, negative = positive + bias[target], negative + bias[negatives]
        positive, negative = positive.float(), negative.float()
        if shared:  # they may hit a target
            negative = negative.masked_fill(negatives == target.unsqueeze(1), -torch.inf)
        if self.kind == "gbce":
            n_items, t = self.encoder.n_items, self.calibration
            return {"loss": losses.gbce(positive, negative, n_items=n_items, calibration=t, weight=weight)}
        return {"loss": PAIRWISE[self.kind](positive, negative, weight=weight)}


class SequentialRecommender(Recommender):
    """Ranks items by the product of the history's last vector with every item's."""

    network: SequenceEncoder

    @abstractmethod
    def encoder(self, n_items: int) -> SequenceEncoder:
        """A new, untrained encoder."""

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Train on all positions of all training histories.

        Raises:
            DataError: no history has two events.
        """
        run, config = run or Run(), self.config
        self.prepare(split.train)
        with seeded(run.seed):
            self.network = self.encoder(split.train.n_items)
            objective = Objective(
                self.network, self.loss_kind(), calibration=config.calibration, log_q=self._log_q(split.train)
            )
            batches = self.batches(split.train)
            return fit(
                objective,
                batches,
                config=config,
                run=run,
                optimizer=self.optimizer(objective),
                schedule=self.schedule(config.epochs * len(batches)),
                validate=lambda: evaluate(self, split.valid, metrics=[config.monitor], train=split.train).metrics,
            )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with the betas that papers of this field use."""
        config = self.config
        return torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
        )

    def schedule(self, steps: int) -> Any:
        """Factor on the learning rate by step, or None."""
        del steps

    def loss_kind(self) -> str:
        """The loss, with `auto` decided by the size of the catalogue."""
        if self.config.loss != "auto":
            return str(self.config.loss)
        return "ce" if self.n_items <= 5_000 else "sampled_softmax"

    def batches(self, log: Interactions) -> Any:
        """Next-item batches with the negatives that the loss needs."""
        config, kind = self.config, self.loss_kind()
        sampler = None
        if kind != "ce":
            sampler = NegativeSampler(log, config.negatives_by, avoid_known=kind not in SHARED)
        return SequenceBatches(
            log,
            config.batch_size,
            config.max_length,
            every_window=config.every_window,
            sampler=sampler,
            negatives=min(config.negatives, log.n_items) if kind in SHARED else 1,
            shared=kind in SHARED,
        )

    def _log_q(self, log: Interactions) -> Tensor | None:
        if self.config.negatives_by == "uniform":
            return None
        if self.loss_kind() != "sampled_softmax":
            raise ConfigError(
                "negatives_by='popularity' is corrected for in sampled_softmax only", hint="set that loss"
            )
        return NegativeSampler(log, "popularity", avoid_known=False).log_q()

    def score(self, queries: Queries) -> Tensor:
        """Products of query and item vectors, plus the bias where there is one."""
        with torch.no_grad():
            scores = self.query_vectors(queries) @ self.item_vectors().T
            return scores if self.network.bias is None else scores + self.network.bias

    @torch.no_grad()
    def query_vectors(self, queries: Queries) -> Tensor:
        """`(B, D)`: the encoder's output at the end of each history. Histories of like length are encoded together."""
        was_training = self.network.training
        self.network.eval()
        lengths = np.minimum(queries.lengths, self.reads)
        order = np.argsort(lengths, kind="stable")
        device = self.network.item.weight.device
        out = torch.zeros(len(queries), self.item_vectors().shape[1], device=device)
        first = 0
        while first < len(order):
            # The longest of a piece is its last, and the piece is padded to it: take as many as fit.
            longest = np.maximum(lengths[order[first : first + ENCODE_TOKENS]], 1)
            size = max(1, int(np.searchsorted(longest * np.arange(1, len(longest) + 1), ENCODE_TOKENS, side="right")))
            rows = order[first : first + size]
            items, length = self.inputs(queries, rows, lengths[rows])
            hidden = self.network(torch.from_numpy(items).to(device), torch.from_numpy(length).to(device))
            last = torch.from_numpy(length - 1).to(device).clamp(min=0)
            out[torch.from_numpy(rows).to(device)] = hidden[torch.arange(len(rows), device=device), last].float()
            first += size
        self.network.train(was_training)
        return out

    @property
    def reads(self) -> int:
        """How many of the most recent history items the encoder reads."""
        return int(self.config.max_length)

    def inputs(self, queries: Queries, rows: Any, lengths: Any) -> tuple[Any, Any]:
        """Left-aligned int64 codes `(B, T)` of the last `lengths` items of some queries, and those lengths."""
        place = np.arange(max(1, int(lengths.max(initial=1))))
        real = place < lengths[:, None]
        stop = queries.offsets[1:][rows]
        flat, _ = flat_rows(stop - lengths, stop)
        items = np.full(real.shape, -1, dtype=np.int64)
        items[real] = queries.item[flat]
        return items, lengths.astype(np.int64)

    def item_vectors(self) -> Tensor:
        """`(N, D)`."""
        return self.network.item_vectors().detach()

    def state(self) -> dict[str, Tensor]:
        """The encoder's parameters."""
        return dict(self.network.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the parameters back."""
        assert self.items is not None
        self.network = self.encoder(len(self.items))
        self.network.load_state_dict(state)
        self.network.eval()
