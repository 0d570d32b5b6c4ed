"""Markov: what came next after the items of the history, by plain counts.

The score of an item is the sum over the history of `decay ** age` times how often the item followed that history item
directly in training. With a small decay it is a first-order chain on the last item.
"""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.config import Choice, Config, Span, setting
from vouch.data import Interactions, Queries, Split
from vouch.data.graphs import keep_largest
from vouch.recommenders.base import Recommender
from vouch.recommenders.history import pack_sparse, score_by, unpack_sparse
from vouch.registry import Card, register
from vouch.training.run import FitReport, Run


class MarkovConfig(Config):
    """Settings of the Markov counts."""

    decay: float = setting(0.5, "weight of a history item that is one event older", gt=0, le=1, search=Span(0.1, 1.0))
    window: int = setting(
        1, "how many events ahead count as next; the d-th weighs 1 / d", ge=1, search=Choice((1, 2, 3))
    )
    normalize: Literal["counts", "sqrt", "probability"] = setting(
        "counts",
        "divide a row by nothing, the root of its sum, or its sum",
        search=Choice(("counts", "sqrt", "probability")),
    )
    successors: int = setting(1000, "most frequent successors kept for each item", ge=1)
    smoothing: float = setting(
        0.0, "score of the most popular item, added in proportion to popularity: ranks what never followed", ge=0
    )


def transitions(log: Interactions, window: int = 1) -> sp.csr_matrix:
    """CSR float32 `(n_items, n_items)`: how often column followed row within a user, the d-th event after for 1/d."""
    total = sp.csr_matrix((log.n_items, log.n_items), dtype=np.float32)
    for ahead in range(1, window + 1):
        # Rows `ahead` apart are of one user unless a boundary lies between them.
        same = log.user[:-ahead] == log.user[ahead:]
        before, after = log.item[:-ahead][same], log.item[ahead:][same]
        ones = np.full(len(before), 1 / ahead, dtype=np.float32)
        total = total + sp.coo_matrix((ones, (before, after)), shape=total.shape).tocsr()
    return total


@register(
    Card(
        slug="markov",
        name="Markov counts",
        area="recommenders/sequential",
        summary="what came next after the items of the history, by counts",
        baseline=True,
    )
)
class Markov(Recommender):
    """Next-item counts with weights that fade with the age of the history item."""

    Config = MarkovConfig

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Count the transitions of the training log."""
        begin = time.perf_counter()
        self.prepare(split.train)
        counts = transitions(split.train, self.config.window)
        if self.config.normalize != "counts":
            sums = np.maximum(np.asarray(counts.sum(1)).ravel(), 1e-12)
            power = -0.5 if self.config.normalize == "sqrt" else -1.0
            counts = (sp.diags((sums**power).astype(np.float32)) @ counts).tocsr()
        self.next = keep_largest(counts, self.config.successors)
        return FitReport(seconds=time.perf_counter() - begin)

    def score(self, queries: Queries) -> Tensor:
        """Decayed sum of the history's transition rows, plus the smoothing."""
        scores = score_by(queries, self.next, self.config.decay)
        if self.config.smoothing:
            assert self.popularity is not None
            scores += self.config.smoothing * torch.from_numpy(self.popularity / max(1.0, self.popularity.max()))
        return scores

    def similarities(self, items: NDArray[np.int64]) -> Tensor:
        """How often each item followed the given ones: rows of the transition matrix."""
        return torch.from_numpy(self.next[items].toarray())

    def state(self) -> dict[str, Tensor]:
        """The transition matrix in compressed rows."""
        return pack_sparse(self.next)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the matrix back."""
        self.next = unpack_sparse(state)
