"""What BPR-MF and APR share: two tables of factors, triples to train on, and the gradient of BPR in closed form.

Shapes: `U` users, `N` items, `D` hidden size, `B` triples in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.config import Span, setting
from vouch.data import Interactions, Queries, Split
from vouch.data.queries import right_aligned
from vouch.errors import DataError
from vouch.evaluation import evaluate
from vouch.recommenders.base import Recommender
from vouch.training import NegativeSampler, Run, TrainConfig
from vouch.training.devices import parse_device

SLAB = 1 << 20
"""Positives whose negatives are drawn in one go."""
BLOCK_CELLS = 1 << 18
"""Vector elements handled at once on a CPU: temporaries of 1 MiB stay in the cache and need no fresh pages."""
FOLD_CELLS = 1 << 24
"""Elements of padded histories, or of their normal equations, held at once when folding in."""
DENSE_SHARE = 16
"""A gradient is kept as rows when the table has this many times more rows than the batch touches."""


class FactorConfig(TrainConfig):
    """Settings of matrix factorisation by pairwise ranking."""

    hidden_size: int = setting(64, "length of the user and item vectors", ge=1)
    epochs: int = setting(300, "most passes over the training pairs", ge=1)
    batch_size: int = setting(8192, "pairs of one batch; the loss is their sum", ge=1)
    learning_rate: float = setting(0.05, "Adagrad's step size", gt=0, search=Span(0.01, 0.2, log=True))
    regularization: float = setting(
        0.0, "weight of the squared norms of the vectors in a triple", ge=0, search=Span(1e-4, 1e-1, log=True)
    )
    patience: int = setting(10, "evaluations without a better value before training stops", ge=1)
    evaluate_every: int = setting(5, "epochs between two validations", ge=1)
    init_std: float = setting(0.01, "standard deviation of the initial vectors (normal, cut at two of them)", gt=0)


Batch = tuple[Tensor, Tensor, Tensor, int]
"""Users `(B,)`, positives `(B,)`, negatives `(B, n)`, and the triples of the global batch, `B` in a single process."""


class Factors(nn.Module):
    """User vectors `(U, D)` and item vectors `(N, D)`; no biases."""

    def __init__(self, n_users: int, n_items: int, hidden_size: int, init_std: float = 0.01) -> None:
        super().__init__()
        self.user = nn.Parameter(torch.empty(n_users, hidden_size))
        self.item = nn.Parameter(torch.empty(n_items, hidden_size))
        for table in (self.user, self.item):
            nn.init.trunc_normal_(table, std=init_std, a=-2 * init_std, b=2 * init_std)


class Triples:
    """Every training pair once an epoch, shuffled, each with `n` freshly drawn items that the user does not have."""

    def __init__(self, log: Interactions, batch_size: int, *, negatives: int = 1) -> None:
        if (log.lengths == 0).all():
            raise DataError("the training log is empty")
        self.log, self.batch_size, self.n = log, batch_size, negatives
        self.user, self.item = log.user.astype(np.int64), log.item.astype(np.int64)
        self.sampler = NegativeSampler(log)

    def __len__(self) -> int:
        return math.ceil(len(self.log) / self.batch_size)

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[Batch]:
        """This process's share of each batch; the last batch may be shorter, and a share of it empty."""
        order = generator.permutation(len(self.log))
        slab = max(1, SLAB // self.batch_size) * self.batch_size
        for start in range(0, len(order), slab):
            rows = order[start : start + slab]
            user, item = torch.from_numpy(self.user[rows]), torch.from_numpy(self.item[rows])
            drawn = torch.from_numpy(self.sampler.sample(self.user[rows], self.n, generator))
            for first in range(0, len(rows), self.batch_size):
                mine = (
                    slice(first + rank, first + self.batch_size, world)
                    if world > 1
                    else slice(first, first + self.batch_size)
                )
                yield user[mine], item[mine], drawn[mine], len(user[first : first + self.batch_size])


@dataclass(frozen=True)
class Rows:
    """A gradient on some rows of a table: distinct row numbers `(R,)` and values `(R, D)`."""

    index: Tensor
    values: Tensor

    def onto(self, table: nn.Parameter, *, dense: bool = False) -> Tensor:
        """As a gradient of the whole table; unless `dense`, sparse where few of many rows are touched."""
        if len(table) == len(self.index):
            return self.values
        if not dense and len(table) > DENSE_SHARE * len(self.index):
            return torch.sparse_coo_tensor(
                self.index.unsqueeze(0), self.values, table.shape, is_coalesced=True, check_invariants=False
            )
        return torch.zeros_like(table).index_copy_(0, self.index, self.values)


@dataclass(frozen=True)
class Touched:
    """The distinct users and items of a batch of triples, and where each triple's own lie among them.

    A table that is small beside the batch is taken whole: finding its distinct rows would cost more than it saves.
    """

    users: Tensor
    items: Tensor
    u: Tensor
    i: Tensor
    j: Tensor

    @classmethod
    def by(cls, factors: Factors, user: Tensor, positive: Tensor, negative: Tensor, *, whole: bool = False) -> Touched:
        """Coalesce triples `(B,)` each; `whole` takes all rows, so that several processes have the same."""
        users, u = _distinct(user, len(factors.user), whole)
        items, both = _distinct(torch.cat([positive, negative]), len(factors.item), whole)
        return cls(users, items, u, both[: len(u)], both[len(u) :])

    def rows(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The touched rows `(Ru, D)` and `(Ri, D)` of both tables; a table taken whole is not copied."""
        p, q = (
            table.detach() if len(index) == len(table) else table.detach().index_select(0, index)
            for table, index in ((factors.user, self.users), (factors.item, self.items))
        )
        return p, q


def _distinct(codes: Tensor, size: int, whole: bool) -> tuple[Tensor, Tensor]:
    if whole or size <= 4 * len(codes):
        return torch.arange(size, device=codes.device), codes
    return torch.unique(codes, return_inverse=True)


def bpr_gradient(p: Tensor, q: Tensor, t: Touched) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of `softplus(-(s+ - s-))` over the triples, and its gradient on the touched rows.

    Args:
        p, q: vectors of the touched users `(Ru, D)` and items `(Ri, D)`.

    Returns:
        The loss, the gradient of `p`, the gradient of `q`; a row's gradient sums over all its triples.
    """
    grad_p, grad_q = torch.zeros_like(p), torch.zeros_like(q)
    loss = p.new_zeros(())
    block = max(1, BLOCK_CELLS // p.shape[1]) if p.device.type == "cpu" else max(1, len(t.u))
    for u, i, j in zip(t.u.split(block), t.i.split(block), t.j.split(block), strict=True):
        pu, difference = p.index_select(0, u), q.index_select(0, i)  # (block, D)
        difference -= q.index_select(0, j)
        margin = torch.linalg.vecdot(pu, difference)
        loss += F.softplus(-margin).sum()
        slope = torch.sigmoid(-margin).neg_().unsqueeze(1)  # d loss / d margin
        grad_p.index_add_(0, u, difference.mul_(slope))
        pull = pu.mul_(slope)
        grad_q.index_add_(0, i, pull)
        grad_q.index_add_(0, j, pull.neg_())
    return loss, grad_p, grad_q


def penalty_gradient(p: Tensor, q: Tensor, t: Touched, weight: float) -> tuple[Tensor, Tensor]:
    """Gradient of `weight * (|p_u|^2 + |q_i|^2 + |q_j|^2)` summed over the triples."""
    times_p = torch.bincount(t.u, minlength=len(p)).unsqueeze(1)
    times_q = (torch.bincount(t.i, minlength=len(q)) + torch.bincount(t.j, minlength=len(q))).unsqueeze(1)
    return 2 * weight * times_p * p, 2 * weight * times_q * q


def adagrad(factors: Factors, config: FactorConfig, run: Run) -> torch.optim.Optimizer:
    """Adagrad with its accumulators at 0.1, as in the published code of APR."""
    learning_rate = config.learning_rate
    dense = all(len(table) <= DENSE_SHARE * config.batch_size for table in (factors.user, factors.item))
    extra = {"fused": True} if dense and parse_device(run.device)[0] == "cpu" else {}  # a fused step takes no rows
    return torch.optim.Adagrad(factors.parameters(), lr=learning_rate, initial_accumulator_value=0.1, **extra)


class FactorRecommender(Recommender):
    """What a recommender over `Factors` does once it is trained.

    A user of the training log is scored with the learned vector; the history only excludes items. The history of any
    other user is folded in: the vector that minimises `sum_history (1 - p.q)^2 + w sum_all (p.q)^2 + ridge |p|^2` over
    fixed item vectors, as in weighted least squares for implicit feedback, solved in closed form. Its length does not
    matter for the ranking.
    """

    factors: Factors
    FOLD_WEIGHT = 0.05
    _gram: Tensor | None = None  # (D, D) of the weighted sum over all items, kept while the factors stay

    def begin(self, train: Interactions, start: Factors | None) -> None:
        """Fresh factors, or a copy of `start`. Users without a training pair have, and keep, the zero vector."""
        config = self.config
        self.factors = Factors(train.n_users, train.n_items, config.hidden_size, config.init_std)
        if start is not None:
            self.factors.load_state_dict(start.state_dict())
        with torch.no_grad():
            self.factors.user[torch.from_numpy(train.lengths == 0)] = 0.0

    def score(self, queries: Queries) -> Tensor:
        """Products of the query vectors and the item vectors; popularity for a user nothing is known of."""
        vectors = self.query_vectors(queries)
        scores = vectors @ self.item_vectors().T
        blank = ~vectors.any(dim=1)
        if blank.any():
            assert self.popularity is not None
            scores[blank] = torch.from_numpy(self.popularity).to(scores)
        return scores

    def query_vectors(self, queries: Queries) -> Tensor:
        """`(B, D)`: learned vectors of the users of the training log, folded-in histories of others."""
        user = torch.from_numpy(queries.user.astype(np.int64))
        table = self.factors.user.detach()
        vectors = table[user.clamp(min=0).to(table.device)]
        vectors[(user < 0).to(table.device)] = 0.0
        fold = np.flatnonzero(~vectors.any(dim=1).cpu().numpy() & (queries.lengths > 0))
        if len(fold):
            vectors[torch.from_numpy(fold).to(table.device)] = self._fold_in(queries, fold)
        return vectors

    def item_vectors(self) -> Tensor:
        """`(N, D)`."""
        return self.factors.item.detach()

    def _fold_in(self, queries: Queries, rows: NDArray[np.int64]) -> Tensor:
        items = self.item_vectors()
        size = items.shape[1]
        if self._gram is None:
            gram = self.FOLD_WEIGHT * items.T @ items
            self._gram = gram + 1e-3 * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(size).to(gram)
        out = items.new_empty(len(rows), size)
        start, stop = queries.offsets[rows], queries.offsets[rows + 1]
        cells = size * max(size, int((stop - start).max()))  # of one row, padded
        block = max(1, FOLD_CELLS // cells)
        for first in range(0, len(rows), block):
            part = slice(first, first + block)
            codes = right_aligned(queries.item, start[part], stop[part], len(queries.item), fill=-1)  # (b, T)
            code = torch.from_numpy(codes.astype(np.int64)).to(items.device)
            padded = items[code.clamp(min=0)] * (code >= 0).unsqueeze(2)  # (b, T, D)
            left = torch.baddbmm(self._gram, padded.transpose(1, 2), padded)
            out[part] = torch.linalg.solve(left, padded.sum(1))
        return out

    def validation(self, split: Split, monitor: str) -> dict[str, float]:
        """Metrics on the validation cases with the current factors."""
        self._gram = None
        return evaluate(self, split.valid, metrics=[monitor], train=split.train).metrics

    def state(self) -> dict[str, Tensor]:
        """`user` `(U, D)` and `item` `(N, D)`."""
        return {"user": self.factors.user.detach(), "item": self.factors.item.detach()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the factors back."""
        self._gram = None
        self.factors = Factors(*state["user"].shape[:1], *state["item"].shape)
        with torch.no_grad():
            self.factors.user.copy_(state["user"])
            self.factors.item.copy_(state["item"])
