"""What the neighbourhood methods share: histories as weighted sparse rows, similarities as sparse matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.data import Queries


def ages(queries: Queries) -> NDArray[np.int64]:
    """int64, like `queries.item`: how many events lie after each history item; the newest has age 0."""
    return np.repeat(queries.offsets[1:], queries.lengths) - 1 - np.arange(len(queries.item))


def weighted_rows(queries: Queries, n_items: int, decay: float) -> Any:
    """CSR `(B, n_items)`: each history item weighs `decay ** age`, repeats summed."""
    weight = (decay ** ages(queries)).astype(np.float32)
    rows = sp.csr_matrix((weight, queries.item.astype(np.int32), queries.offsets), shape=(len(queries), n_items))
    rows.sum_duplicates()
    return rows


def score_by(queries: Queries, similarity: Any, decay: float) -> Tensor:
    """float32 `(B, n_items)`: the decayed history times an item-to-item CSR matrix `(n_items, n_items)`."""
    product = weighted_rows(queries, similarity.shape[0], decay) @ similarity
    return torch.from_numpy(product.toarray().astype(np.float32, copy=False))


def pack_sparse(matrix: Any) -> dict[str, Tensor]:
    """A CSR matrix as named tensors, to save."""
    return {
        "data": torch.from_numpy(matrix.data.astype(np.float32)),
        "indices": torch.from_numpy(matrix.indices.astype(np.int32)),
        "indptr": torch.from_numpy(matrix.indptr.astype(np.int64)),
    }


def unpack_sparse(state: dict[str, Tensor]) -> Any:
    """The square CSR matrix that `pack_sparse` packed."""
    n = len(state["indptr"]) - 1
    return sp.csr_matrix(tuple(state[name].numpy() for name in ("data", "indices", "indptr")), shape=(n, n))
