"""Item-kNN: items similar to those in the history, where similar means taken by the same users.

Similarity of items i and j from the co-occurrence `C = X^T diag(w) X` over binary histories X, with the inverse user
frequency `w_u = 1 / log(1 + n_u)` (long histories say less about each pair) and plain item counts `c` as norms:
`C_ij / sqrt(c_i c_j)` for the cosine. The score of an item sums its similarity to each history item, weighted
`decay ** age`. Source: Deshpande and Karypis, ACM TOIS 2004.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.config import Choice, Config, Span, setting
from vouch.data import Queries, Split
from vouch.recommenders.base import Recommender
from vouch.recommenders.history import keep_largest, pack_sparse, score_by, unpack_sparse
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
        users = split.train.to_csr()  # (U, N) binary
        counts = np.asarray(users.sum(0), dtype=np.float64).ravel()
        weighted = users
        if self.config.inverse_user_frequency:
            lengths = np.asarray(users.sum(1)).ravel()
            weighted = sp.diags((1 / np.log1p(np.maximum(lengths, 1))).astype(np.float32)) @ users
        items, users = weighted.T.tocsr(), users.tocsr()
        blocks = [
            keep_largest(
                self._normalise((items[start : start + BLOCK] @ users).tocsr(), start, counts), self.config.neighbors
            )
            for start in range(0, len(counts), BLOCK)
        ]
        self.similarity = sp.vstack(blocks, format="csr")
        return FitReport(seconds=time.perf_counter() - begin)

    def _normalise(self, block: Any, start: int, counts: NDArray[np.float64]) -> Any:
        """Co-occurrence of items `start..` with all, as similarities without the item itself."""
        row = np.repeat(np.arange(start, start + block.shape[0]), np.diff(block.indptr))
        own, other, together = counts[row], counts[block.indices], block.data.astype(np.float64)
        match self.config.similarity:
            case "cosine":
                below = np.sqrt(own * other)
            case "jaccard":
                below = own + other - together
            case "dice":
                below = (own + other) / 2
            case "asymmetric":
                below = own**self.config.alpha * other ** (1 - self.config.alpha)
            case _:
                below = own
        values = together / (below + self.config.shrinkage)
        values[row == block.indices] = 0.0
        block.data = values.astype(np.float32)
        block.eliminate_zeros()
        block.sort_indices()
        return block

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
