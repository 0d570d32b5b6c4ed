"""Item-kNN: items similar to those in the history, where similar means taken by the same users.

Similarity of items i and j from the co-occurrence `C = X^T diag(w) X` over binary histories X, with the inverse user
frequency `w_u = 1 / log(1 + n_u)` (long histories say less about each pair) and plain item counts `c` as norms:
`C_ij / sqrt(c_i c_j)` for the cosine. The score of an item sums its similarity to each history item, weighted
`decay ** age`. Source: Deshpande and Karypis, ACM TOIS 2004.
"""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.config import Choice, Config, Span, setting
from vouch.data import Queries, Split
from vouch.data.graphs import co_occurrence
from vouch.recommenders.base import Recommender
from vouch.recommenders.history import pack_sparse, score_by, unpack_sparse
from vouch.registry import Card, register
from vouch.training.run import FitReport, Run

BLOCK = 4096
"""Items whose neighbours are found at once."""


class ItemKNNConfig(Config):
    """Settings of item-kNN."""

    similarity: Literal["cosine", "jaccard", "dice", "asymmetric", "conditional"] = setting(
        "cosine", "how co-occurrence is normalised", search=Choice(("cosine", "jaccard", "asymmetric", "conditional"))
    )
    alpha: float = setting(
        0.5, "for asymmetric: power of the history item's count; the rest goes to the other", ge=0, le=1
    )
    inverse_user_frequency: bool = setting(
        True, "weigh each user by 1 / log(1 + history length)", search=Choice((True, False))
    )
    shrinkage: float = setting(
        0.0, "added to the denominator, against chance pairs", ge=0, search=Choice((0.0, 5.0, 20.0))
    )
    neighbors: int = setting(1000, "most similar items kept for each item", ge=1, search=Choice((50, 200, 1000)))
    decay: float = setting(0.7, "weight of a history item that is one event older", gt=0, le=1, search=Span(0.3, 1.0))


@register(
    Card(
        slug="itemknn",
        name="Item-kNN",
        area="recommenders/collaborative",
        summary="items taken by the same users as those in the history",
        baseline=True,
    )
)
class ItemKNN(Recommender):
    """Neighbourhood recommender over item co-occurrence."""

    Config = ItemKNNConfig

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Build the similarity matrix, block by block of items."""
        begin = time.perf_counter()
        self.prepare(split.train)
        config = self.config
        self.similarity = co_occurrence(
            split.train,
            similarity=config.similarity,
            alpha=config.alpha,
            shrinkage=config.shrinkage,
            inverse_user_frequency=config.inverse_user_frequency,
            neighbors=config.neighbors,
        ).matrix()
        return FitReport(seconds=time.perf_counter() - begin)

    def score(self, queries: Queries) -> Tensor:
        """Decayed sum of similarities to the history."""
        return score_by(queries, self.similarity, self.config.decay)

    def similarities(self, items: NDArray[np.int64]) -> Tensor:
        """Rows of the similarity matrix."""
        return torch.from_numpy(self.similarity[items].toarray())

    def state(self) -> dict[str, Tensor]:
        """The similarity matrix in compressed rows."""
        return pack_sparse(self.similarity)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the matrix back."""
        self.similarity = unpack_sparse(state)
