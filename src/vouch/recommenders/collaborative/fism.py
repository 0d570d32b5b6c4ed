"""FISM: a user is the items they have; an item's score is the sum of learned similarities to them.

Source: Factored Item Similarity Models (KDD 2013), as it is used to pre-train NAIS (arXiv 1809.07053): pointwise loss,
`y_ui = n^-alpha sum over j in R_u without i of p_i . q_j + b_i`. What differs: a batch holds several users of like
history length, with all their instances, where the paper has one user; and at most `positives` of a user's items are
learned from in an epoch, drawn anew each time, while histories stay whole.
Shapes: `U` users of a batch, `L` history items, `C` instances of a user, `D` hidden size, `N` items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.config import Choice, setting
from vouch.data import Interactions, Queries, Split
from vouch.errors import DataError
from vouch.evaluation import evaluate
from vouch.recommenders.base import Recommender
from vouch.recommenders.history import weighted_rows
from vouch.registry import Card, register
from vouch.training import FitReport, NegativeSampler, Run, TrainConfig, fit, seeded

CELLS = 1 << 20
"""Pairs of an instance and a history item in a batch, at most, where there is more than one user."""


class HistoryConfig(TrainConfig):
    """Settings of FISM and NAIS."""

    hidden_size: int = setting(16, "length of the item vectors (d)", ge=1, search=Choice((16, 32, 64)))
    alpha: float = setting(0.0, "scores are divided by the history's length to this power", ge=0, le=1)
    negatives: int = setting(4, "items drawn for each positive, anew each epoch", ge=1)
    positives: int = setting(20, "most items of a user that are learned from in an epoch; 0 is all", ge=0)
    batch_size: int = setting(16, "users of one batch", ge=1)
    weight_decay: float = setting(0.0, "decay of all that is learned, a part of the gradient", ge=0)
    learning_rate: float = setting(0.01, "step size of Adagrad", gt=0, search=Choice((0.005, 0.01, 0.05)))
    penalty_target: float = setting(1e-7, "weight of the squared vectors p of target items", ge=0)
    penalty_history: float = setting(1e-7, "weight of the squared vectors q of history items", ge=0)
    empty_history: Literal["bias", "error"] = setting("bias", "queries without history: rank by item bias, or refuse")
    epochs: int = setting(500, "most passes over the training log", ge=1)
    patience: int = setting(10, "validations without a better value before training stops", ge=1)


class HistoryBatch(NamedTuple):
    """Instances of some users.

    Attributes:
        history: int64 `(U, L)` codes, -1 after the end. target: int64 `(U, C)`, -1 after the end.
        label: float32 `(U, C)`. weight: float32 `()`, one over the instances of the global batch times the processes.
    """

    history: Tensor
    target: Tensor
    label: Tensor
    weight: Tensor


class HistoryBatches:
    """Users of like history length, with their positives and negatives.

    A user's only item cannot be learned from: without it there is no history. `skipped` counts such users.
    """

    def __init__(self, log: Interactions, config: HistoryConfig) -> None:
        matrix = log.to_csr()
        matrix.sort_indices()
        self.indptr, self.indices, self.config = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), config
        lengths = np.diff(self.indptr)
        self.skipped = int((lengths == 1).sum())
        self.users = np.flatnonzero(lengths > 1)
        self.sampler = NegativeSampler(log)
        if len(self.users) == 0:
            raise DataError("no user has two items to learn from", hint="check the filters and the split")
        self.users = self.users[np.argsort(lengths[self.users], kind="stable")]
        # bounds of the batches among users by length: at most batch_size, fewer where histories are long
        taken = lengths[self.users]
        cells = taken * (1 + config.negatives) * (np.minimum(taken, config.positives) if config.positives else taken)
        bounds = [0]
        while bounds[-1] < len(self.users):
            first = bounds[-1]
            some = cells[first : first + config.batch_size]  # ascending: the last sets the padding
            bounds.append(first + max(1, int((some * np.arange(1, len(some) + 1) <= CELLS).sum())))
        self.bounds = np.array(bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[HistoryBatch]:
        """Batches in random order, users within a batch by length; this rank takes every `world`-th user."""
        lengths = np.diff(self.indptr)
        shuffled = self.users[np.lexsort((generator.random(len(self.users)), lengths[self.users]))]
        for number in generator.permutation(len(self)):
            everyone = shuffled[self.bounds[number] : self.bounds[number + 1]]
            n = lengths[everyone]
            place = np.arange(n.max())
            real = place < n[:, None]
            history = np.full(real.shape, -1, dtype=np.int64)
            history[real] = self.indices[(self.indptr[everyone][:, None] + place)[real]]
            width = min(self.config.positives or n.max(), n.max())
            if width < n.max():  # random ones of each, the real ones first
                key = np.where(real, generator.random(real.shape), 2.0)
                positive = np.take_along_axis(history, np.argsort(key, 1)[:, :width], 1)
            else:
                positive = history
            owner = np.repeat(everyone, positive.shape[1])
            negative = self.sampler.sample(owner, self.config.negatives, generator)
            negative = np.where(positive[:, :, None] >= 0, negative.reshape(*positive.shape, -1), -1)
            target = np.concatenate([positive, negative.reshape(len(everyone), -1)], 1)
            label = np.zeros(target.shape, dtype=np.float32)
            label[:, : positive.shape[1]] = 1
            mine = slice(rank, None, world)
            yield HistoryBatch(
                torch.from_numpy(history[mine]),
                torch.from_numpy(target[mine]),
                torch.from_numpy(label[mine]),
                torch.tensor(world / (target >= 0).sum(), dtype=torch.float32),
            )


class ItemTables(nn.Module):
    """Vectors of items in both roles, and their biases."""

    def __init__(self, n_items: int, size: int) -> None:
        super().__init__()
        self.history = nn.Parameter(torch.empty(n_items, size))  # q
        self.target = nn.Parameter(torch.empty(n_items, size))  # p
        self.bias = nn.Parameter(torch.zeros(n_items))
        for table in (self.history, self.target):
            nn.init.trunc_normal_(table, std=0.01, a=-0.02, b=0.02)


def pointwise(logits_UC: Tensor, batch: HistoryBatch) -> Tensor:
    """Mean binary cross-entropy over the instances."""
    real = batch.target >= 0
    return F.binary_cross_entropy_with_logits(logits_UC[real], batch.label[real], reduction="sum") * batch.weight


class FISMNetwork(ItemTables):
    """The tables with the loss."""

    def __init__(self, n_items: int, config: HistoryConfig) -> None:
        super().__init__(n_items, config.hidden_size)
        self.config = config

    def logits(self, history_UL: Tensor, target_UC: Tensor) -> Tensor:
        """Scores `(U, C)`; an item is never part of its own history. Empty histories leave the bias."""
        real = (history_UL >= 0).unsqueeze(-1)
        total = (F.embedding(history_UL.clamp(min=0), self.history) * real).sum(1)  # (U, D)
        i = target_UC.clamp(min=0)
        p = F.embedding(i, self.target)
        own = (history_UL.unsqueeze(1) == target_UC.unsqueeze(2)).any(2)  # (U, C)
        product = torch.einsum("ucd,ud->uc", p, total) - own * (p * F.embedding(i, self.history)).sum(-1)
        n = real.sum((1, 2)).unsqueeze(1) - own.long()
        return product * n.clamp(min=1).float() ** -self.config.alpha * (n > 0) + self.bias[i]

    def loss(self, batch: HistoryBatch) -> dict[str, Tensor]:
        """Cross-entropy and penalty."""
        config = self.config
        penalty = config.penalty_target * self.target.square().sum()
        penalty = penalty + config.penalty_history * self.history.square().sum()
        return {"bce": pointwise(self.logits(batch.history, batch.target), batch), "penalty": penalty}


def check_codes(codes: NDArray[np.integer[Any]], n_items: int) -> Tensor:
    """Item codes as a tensor.

    Raises:
        DataError: a code is not that of an item; the message names it and the number of items.
    """
    codes = np.asarray(codes, dtype=np.int64)
    bad = (codes < 0) | (codes >= n_items)
    if bool(bad.any()):
        raise DataError(f"item code {int(codes[bad][0])} is not in the table of {n_items} items")
    return torch.from_numpy(codes)


def distinct(queries: Queries, n_items: int) -> Any:
    """CSR `(B, N)` of ones: the set of items of each history.

    Raises:
        DataError: a code is not that of an item.
    """
    check_codes(queries.item, n_items)
    rows = weighted_rows(queries, n_items, 1.0)
    rows.data[:] = 1.0
    rows.sort_indices()
    return rows


class HistoryRecommender(Recommender):
    """What FISM and NAIS share: training by users, tables, and what becomes of empty histories."""

    network: Any

    def train(self, split: Split, run: Run, network: Any) -> FitReport:
        """Run the loop with Adagrad, always in float32: attention exponentiates, and vectors of 16 gain nothing.

        The number of users without a second item goes into the log as `skipped_users`.
        """
        config, batches = self.config, HistoryBatches(split.train, self.config)
        self.network = network

        def validate() -> dict[str, float]:
            found = evaluate(self, split.valid, metrics=[config.monitor], train=split.train).metrics
            return {**found, "skipped_users": batches.skipped}

        return fit(
            network,
            batches,
            config=config,
            run=replace(run, precision="32"),
            optimizer=torch.optim.Adagrad(
                [p for p in network.parameters() if p.requires_grad],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                initial_accumulator_value=1e-8,
            ),
            validate=validate,
        )

    def refuse_empty(self, queries: Queries) -> None:
        """Raises DataError for a query without history, where the settings ask for it."""
        if self.config.empty_history == "error" and bool((queries.lengths == 0).any()):
            row = int(np.flatnonzero(queries.lengths == 0)[0])
            raise DataError(
                f"query {row} has no history, and {self.card.slug} knows users by their history only",
                hint="give a history, or set empty_history=bias",
            )

    def state(self) -> dict[str, Tensor]:
        """The learned parameters."""
        return dict(self.network.state_dict())


class FISMConfig(HistoryConfig):
    """Settings of FISM."""


@register(
    Card(
        slug="fism",
        name="FISM",
        area="recommenders/collaborative",
        summary="learned similarities to the items of the history, summed",
        year=2013,
        baseline=True,
    )
)
class FISM(HistoryRecommender):
    """Factored item similarities."""

    Config = FISMConfig

    def fit(self, split: Split, run: Run | None = None, *, start: ItemTables | None = None) -> FitReport:
        """Train, from `start` (which is not changed) if given.

        Raises:
            DataError: no user has two items.
        """
        run = run or Run()
        self.prepare(split.train)
        with seeded(run.seed):
            network = FISMNetwork(split.train.n_items, self.config)
            if start is not None:
                copy_tables(start, network)
            return self.train(split, run, network)

    @torch.no_grad()
    def query_vectors(self, queries: Queries) -> Tensor:
        """`(B, D + 1)`: the sum of the history by its length to the power -alpha, and 1 for the bias."""
        self.refuse_empty(queries)
        rows = distinct(queries, self.n_items)
        total = torch.from_numpy(rows @ self.network.history.detach().cpu().numpy())
        n = torch.from_numpy(np.diff(rows.indptr)).clamp(min=1).float().unsqueeze(1)
        total = (total * n**-self.config.alpha).to(self.network.bias.device)
        return torch.cat([total, torch.ones_like(total[:, :1])], 1)

    def item_vectors(self) -> Tensor:
        """`(N, D + 1)`: target vectors and biases."""
        return torch.cat([self.network.target, self.network.bias.unsqueeze(1)], 1).detach()

    def similarities(self, items: NDArray[np.int64]) -> Tensor:
        """`q_j . p_i` of each given item `j` with every item `i`: what having `j` adds to the score of `i`."""
        return (self.network.history[torch.as_tensor(items)] @ self.network.target.T).detach()

    def score(self, queries: Queries) -> Tensor:
        """Sums of similarities to the history, plus the bias."""
        return self.query_vectors(queries) @ self.item_vectors().T

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the parameters back."""
        assert self.items is not None
        self.network = FISMNetwork(len(self.items), self.config)
        self.network.load_state_dict(state)


@torch.no_grad()
def copy_tables(source: ItemTables, into: ItemTables) -> None:
    """Copy vectors and biases.

    Raises:
        DataError: they have other shapes; the message names both.
    """
    for name in ("history", "target", "bias"):
        there, here = getattr(source, name), getattr(into, name)
        if there.shape != here.shape:
            raise DataError(
                f"the pre-trained table {name!r} has shape {tuple(there.shape)}, this model needs {tuple(here.shape)}",
                hint="pre-train on the same data with the same hidden_size",
            )
        here.copy_(there)


def overflow_limit() -> float:
    """Largest exponent that float32 bears, with room for a sum."""
    return math.log(torch.finfo(torch.float32).max) - 10
