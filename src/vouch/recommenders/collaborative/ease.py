"""EASE: a linear item-to-item model with zero diagonal, in closed form.

`B = I - P diag(1 / diag(P))` with `P = (X^T X + lambda I)^-1` over binary histories X (arXiv 1905.03375, eq. 8). The
score of an item is the decayed history times its column of B. One dense `n_items x n_items` inverse: fine up to some
20,000 items (1.6 GB), refused above the limit with the figure.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vouch.config import Choice, Config, Span, setting
from vouch.data import Queries, Split
from vouch.errors import DataError
from vouch.recommenders.base import Recommender
from vouch.recommenders.history import ages
from vouch.registry import Card, register
from vouch.training.run import FitReport, Run


class EASEConfig(Config):
    """Settings of EASE."""

    regularization: float = setting(
        200.0, "lambda, the weight of the ridge penalty", gt=0, search=Span(5.0, 2000.0, log=True)
    )
    decay: float = setting(
        1.0, "weight of a history item that is one event older", gt=0, le=1, search=Choice((0.5, 0.7, 0.9, 1.0))
    )
    max_items: int = setting(30_000, "largest catalogue to accept; memory is 12 bytes x items squared", ge=2)


@register(
    Card(
        slug="ease",
        name="EASE",
        area="recommenders/collaborative",
        summary="a linear model of every item by all others, solved in closed form",
        paper="1905.03375",
        year=2019,
        baseline=True,
    )
)
class EASE(Recommender):
    """Embarrassingly shallow autoencoder."""

    Config = EASEConfig

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Invert the regularised Gram matrix by Cholesky.

        Raises:
            DataError: the catalogue is larger than `max_items`.
        """
        begin, n = time.perf_counter(), split.train.n_items
        if n > self.config.max_items:
            raise DataError(
                f"EASE needs a dense {n:,} x {n:,} matrix ({12 * n * n / 2**30:.0f} GiB while fitting)",
                hint="use itemknn, filter rare items (--k-core 5), or raise max_items if the memory is there",
            )
        self.prepare(split.train)
        users = split.train.to_csr()
        gram = torch.from_numpy((users.T @ users).toarray())
        gram.diagonal().add_(self.config.regularization)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        weights = inverse.div_(-inverse.diagonal().clone()).contiguous()  # column j divided by -P_jj
        weights.fill_diagonal_(0.0)
        self.weights = weights
        return FitReport(seconds=time.perf_counter() - begin)

    def score(self, queries: Queries) -> Tensor:
        """The decayed history `(B, n_items)` times the weights."""
        weight = torch.from_numpy((self.config.decay ** ages(queries)).astype(np.float32))
        item, start = torch.from_numpy(queries.item.astype(np.int64)), torch.from_numpy(queries.offsets[:-1])
        return F.embedding_bag(item, self.weights, start, per_sample_weights=weight, mode="sum")

    def similarities(self, items: NDArray[np.int64]) -> Tensor:
        """Rows of the weight matrix: how much each item speaks for every other."""
        return self.weights[torch.as_tensor(items)]

    def state(self) -> dict[str, Tensor]:
        """The weights `(n_items, n_items)`."""
        return {"weights": self.weights}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the weights back."""
        self.weights = state["weights"]
