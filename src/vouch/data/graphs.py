"""Graphs of items that a log implies: who is taken together, and who follows whom.

Built by sparse products and index arithmetic, in blocks, without a loop over users or items. Compute them from training
logs only: whatever else goes in leaks.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from vouch.data.interactions import Interactions
from vouch.errors import DataError, StorageError
from vouch.files import atomic_directory

BLOCK_PAIRS = 1 << 22
"""Pairs of items held at once, by estimate: few enough for the processor's caches."""
DENSE_SHARE = 0.5
"""Rows of a product summed from so many pairs, by its columns, are summed densely."""
Similarity = Literal["cosine", "jaccard", "dice", "asymmetric", "conditional"]


@dataclass(frozen=True, eq=False)
class ItemGraph:
    """Weighted neighbours of each item, in compressed rows.

    Attributes:
        indptr: int64 `(N + 1,)` bounds of each item's row. indices: int32 `(E,)` neighbours, ascending in a row.
        weight: float32 `(E,)`.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    weight: NDArray[np.float32]

    @classmethod
    def of(cls, matrix: Any) -> ItemGraph:
        """From a square scipy matrix; entries that are 0 are left out."""
        matrix = matrix.tocsr()
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        matrix.sort_indices()
        return cls(
            matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.float32, copy=False)
        )

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.indptr) - 1

    @property
    def degree(self) -> NDArray[np.int64]:
        """Number of neighbours of each item `(N,)`."""
        return np.diff(self.indptr)

    @property
    def row(self) -> NDArray[np.int64]:
        """The item that each entry belongs to `(E,)`."""
        return np.repeat(np.arange(self.n_items), self.degree)

    def neighbours(self, item: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Neighbours of one item and their weights."""
        part = slice(self.indptr[item], self.indptr[item + 1])
        return self.indices[part], self.weight[part]

    def matrix(self) -> Any:
        """A scipy CSR matrix `(N, N)`."""
        return sp.csr_matrix((self.weight, self.indices, self.indptr), shape=(self.n_items, self.n_items))

    def dense(self) -> NDArray[np.float32]:
        """`(N, N)`; for small catalogues."""
        found: NDArray[np.float32] = self.matrix().toarray()
        return found

    def best(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Each item's neighbour of the greatest weight `(N,)`, the smaller code among equals, and that weight; -1 and
        -inf where it has none."""
        item = np.full(self.n_items, -1, dtype=np.int64)
        weight = np.full(self.n_items, -np.inf, dtype=np.float32)
        order = np.lexsort((self.indices, -self.weight, self.row))
        some = self.degree > 0
        first = order[self.indptr[:-1][some]]
        item[some], weight[some] = self.indices[first], self.weight[first]
        return item, weight

    def unweighted(self) -> ItemGraph:
        """The same neighbours, each of weight 1."""
        return ItemGraph(self.indptr, self.indices, np.ones_like(self.weight))

    def rewired(self, generator: np.random.Generator, *, rounds: int = 20) -> ItemGraph:
        """Other neighbours, as many for each item as before: edges of this symmetric graph exchange their ends.

        Each round pairs edges at random and exchanges the ends of those pairs that make no self-pair and no edge twice.
        """
        row, size = self.row, self.n_items
        half = row < self.indices
        a, b, weight = row[half], self.indices[half].astype(np.int64), self.weight[half]
        for _ in range(rounds):
            order = generator.permutation(len(a))
            one, two = order[: len(a) // 2], order[len(a) // 2 : len(a) // 2 * 2]
            new = np.stack([np.minimum(a[one], b[two]), np.maximum(a[one], b[two])])
            other = np.stack([np.minimum(a[two], b[one]), np.maximum(a[two], b[one])])
            keys = np.concatenate([new[0] * size + new[1], other[0] * size + other[1]])
            _, place, count = np.unique(keys, return_inverse=True, return_counts=True)
            taken = np.isin(keys, a * size + b) | (count[place] > 1)
            pairs = len(one)
            fine = ~(taken[:pairs] | taken[pairs:] | (new[0] == new[1]) | (other[0] == other[1]))
            a[one[fine]], b[one[fine]] = new[:, fine]
            a[two[fine]], b[two[fine]] = other[:, fine]
        loops = row == self.indices
        ends = np.concatenate([a, b, row[loops]]), np.concatenate([b, a, row[loops]])
        weights = np.concatenate([weight, weight, self.weight[loops]])
        return ItemGraph.of(sp.coo_matrix((weights, ends), shape=(size, size)))

    def save(self, path: Path | str) -> None:
        """Write as a folder of arrays, atomically."""
        with atomic_directory(path) as aside:
            for name in ("indptr", "indices", "weight"):
                np.save(aside / f"{name}.npy", getattr(self, name))

    @classmethod
    def open(cls, path: Path | str) -> ItemGraph:
        """Open a saved graph by memory map.

        Raises:
            StorageError: there is none, or it is damaged.
        """
        path = Path(path)
        try:
            return cls(*(np.load(path / f"{name}.npy", mmap_mode="r") for name in ("indptr", "indices", "weight")))
        except (OSError, ValueError, EOFError) as error:
            raise StorageError(f"the item graph is damaged: {error}", where=str(path), hint="delete it") from error


def transition_graph(
    log: Interactions, *, window: int = 3, weighted: bool = True, row_normalised: bool = False
) -> ItemGraph:
    """The weighted item transition graph of GCL4SR (arXiv 2205.14837): items within `window` events of each other.

    Each pair `k` events apart adds `1 / k` to both directions; pairs of an item with itself stay. Then
    `w~(i, j) = w(i, j) (1 / deg(i) + 1 / deg(j))`, `deg` the number of distinct neighbours.

    Args:
        weighted: False gives every edge weight 1 before that.
        row_normalised: first scale each row of `w` to sum 1 (the result is then not symmetric).

    Raises:
        DataError: no history has two events.
    """
    counts = transition_counts(log, window=window)
    if counts.nnz == 0:
        raise DataError("no history has two events, so the item graph is empty", hint="check the filters and the split")
    if not weighted:
        counts.data[:] = 1.0
    degree = np.diff(counts.indptr)
    if row_normalised:
        counts = sp.diags(1 / np.maximum(np.asarray(counts.sum(1)).ravel(), 1e-12)) @ counts
    inverse = 1 / np.maximum(degree, 1)
    counts = counts.tocsr()
    row = np.repeat(np.arange(log.n_items), np.diff(counts.indptr))
    counts.data = (counts.data * (inverse[row] + inverse[counts.indices])).astype(np.float32)
    return ItemGraph.of(counts)


def transition_counts(log: Interactions, *, window: int = 3, both_ways: bool = True) -> Any:
    """CSR `(N, N)` float64: for each pair of events `k <= window` apart in a history, `1 / k`."""
    shape = (log.n_items, log.n_items)
    total = sp.csr_matrix(shape)
    for k in range(1, window + 1):
        same = log.user[:-k] == log.user[k:] if k < len(log) else np.zeros(0, dtype=bool)
        ends = log.item[: len(same)][same], log.item[k:][same]
        total = total + sp.coo_matrix((np.full(len(ends[0]), 1 / k), ends), shape=shape).tocsr()
    return (total + total.T).tocsr() if both_ways else total


def co_occurrence(
    log: Interactions,
    *,
    similarity: Similarity = "cosine",
    alpha: float = 0.5,
    shrinkage: float = 0.0,
    inverse_user_frequency: bool = True,
    neighbors: int = 1000,
) -> ItemGraph:
    """Items that the same users have: the neighbours of item-kNN, and the similarity of ItemCF-IUF.

    `c_ij` counts the users that have both, each by `1 / log(1 + length of the history)` where `inverse_user_frequency`
    is set. Then, with `N_i` the number of users of `i`, similarity is `c_ij / (below + shrinkage)`, `below` being
    `sqrt(N_i N_j)` (cosine), `N_i + N_j - c_ij` (jaccard), `(N_i + N_j) / 2` (dice), `N_i^alpha N_j^(1 - alpha)`
    (asymmetric) or `N_i` (conditional). Without the item itself; the `neighbors` greatest of each item, the smaller
    code among equals.

    Blocks of rows, the items with the most pairs first: where nearly every item meets every other the product is summed
    into a dense block, elsewhere into a sparse one. Memory beside the result grows with the block.
    """
    users = log.to_csr()  # (U, N) binary
    items = users.T.tocsr()
    lengths = np.diff(users.indptr)
    pairs = items @ lengths.astype(np.float64)  # that each row of the product is summed from
    counts = np.maximum(np.diff(items.indptr), 1).astype(np.float32)
    if inverse_user_frequency:
        items.data = (1 / np.log1p(np.maximum(lengths, 1))).astype(np.float32)[items.indices]
    power = {"cosine": 0.5, "asymmetric": alpha, "conditional": 1.0}.get(similarity)
    left, right = (counts, counts) if power is None else (counts**power, counts ** (1 - power))

    def similar(own: Any, other: Any, together: Any) -> Any:
        """In place of `together`; `own` and `other` are items, of shapes that fit it."""
        if power is not None:
            below = left[own] * right[other]
        else:
            below = left[own] + right[other]
            below = below - together if similarity == "jaccard" else below / 2
        together /= below + np.float32(shrinkage)
        together[own == other] = 0.0
        return together

    order = np.argsort(-pairs, kind="stable")
    full = int((pairs >= DENSE_SHARE * log.n_items).sum()) if _sums_densely() else 0
    every, blocks = np.arange(log.n_items), []
    product = _DenseProduct(users) if full else None
    for rows in _pieces(order[:full], np.full(full, log.n_items), BLOCK_PAIRS):
        assert product is not None
        blocks.append(largest_of_dense(similar(rows[:, None], every, product(items[rows])), neighbors))
    for rows in _pieces(order[full:], pairs[order[full:]], BLOCK_PAIRS):
        block = (items[rows] @ users).tocsr()
        block.data = similar(np.repeat(rows, np.diff(block.indptr)), block.indices, block.data)
        block.eliminate_zeros()
        block.sort_indices()
        blocks.append(keep_largest(block, neighbors))
    return ItemGraph.of(sp.vstack(blocks, format="csr")[np.argsort(order)])


def _pieces(rows: NDArray[np.int64], work: NDArray[Any], most: int) -> list[NDArray[np.int64]]:
    """The rows in pieces of about `most` work each, at least one row a piece."""
    if len(rows) == 0:
        return []
    piece = (np.cumsum(work) - work) // most
    return np.split(rows, np.flatnonzero(np.diff(piece)) + 1)


def _sums_densely() -> bool:
    """Whether this build of PyTorch can sum products of sparse matrices into a dense one."""
    import torch

    return bool(torch.backends.mkl.is_available())


class _DenseProduct:
    """Products of sparse rows with one sparse matrix, as dense arrays, in the same order of summation as sparse ones."""

    def __init__(self, matrix: Any) -> None:
        self.right, self.columns = self.tensor(matrix), matrix.shape[1]

    @staticmethod
    def tensor(matrix: Any) -> Any:
        """A scipy CSR matrix as a tensor."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")  # in beta, says PyTorch
            bounds, columns, data = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
            return torch.sparse_csr_tensor(bounds, columns, data, matrix.shape, check_invariants=False)

    def __call__(self, rows: Any) -> NDArray[np.float32]:
        """`rows @ matrix`, for a CSR matrix of rows."""
        import torch

        found: NDArray[np.float32] = torch.addmm(
            torch.zeros(rows.shape[0], self.columns), self.tensor(rows), self.right
        ).numpy()
        return found


def largest_of_dense(values: NDArray[np.float32], k: int) -> Any:
    """As `keep_largest` of what is above 0 in a dense array."""
    least = np.full(len(values), np.finfo(np.float32).tiny, dtype=np.float32)
    if k < values.shape[1]:
        least = np.maximum(least, np.partition(values, -k, axis=1)[:, -k])
    chosen = values >= least[:, None]
    bounds = np.concatenate([[0], np.cumsum(np.count_nonzero(chosen, axis=1))])
    found = sp.csr_matrix((values[chosen], np.nonzero(chosen)[1].astype(np.int32), bounds), shape=values.shape)
    return keep_largest(found, k)  # some are equal to the least


def keep_largest(matrix: Any, k: int) -> Any:
    """A CSR matrix with only the `k` largest entries of each row (the earlier column first among equals)."""
    matrix = matrix.tocsr()
    counts = np.diff(matrix.indptr)
    many = np.flatnonzero(counts > k)
    if len(many) == 0:
        return matrix
    matrix.sort_indices()
    least = np.full(matrix.shape[0], -np.inf, dtype=matrix.dtype)
    many = many[np.argsort(counts[many])]
    for rows in _pieces(many, counts[many], BLOCK_PAIRS):  # side by side, those of like length
        size = counts[rows]
        place = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        row = np.repeat(np.arange(len(rows)), size)
        side = np.full((len(rows), size.max()), -np.inf, dtype=matrix.dtype)
        side[row, place] = matrix.data[matrix.indptr[rows][row] + place]
        least[rows] = np.partition(side, -k, axis=1)[:, -k]
    bound = np.repeat(least, counts)
    chosen = matrix.data > bound
    before = np.concatenate([[0], np.cumsum(chosen)])
    room = k - np.diff(before[matrix.indptr])  # for those that equal the least
    equal = np.flatnonzero(matrix.data == bound)
    row = np.searchsorted(matrix.indptr, equal, side="right") - 1
    first = np.searchsorted(equal, matrix.indptr[:-1])
    chosen[equal[np.arange(len(equal)) - first[row] < room[row]]] = True
    bounds = np.concatenate([[0], np.cumsum(np.minimum(counts, k))])
    return sp.csr_matrix((matrix.data[chosen], matrix.indices[chosen], bounds), shape=matrix.shape)


def cached(build: Callable[..., ItemGraph], log: Interactions, folder: Path | None, **parameters: Any) -> ItemGraph:
    """`build(log, **parameters)`, kept in `folder / "graphs"` where there is a folder (`Dataset.origin`).

    The name there holds the log's fingerprint and the parameters, so another log or other parameters never meet it; a
    folder that cannot be written is done without, and one that is damaged is built anew.
    """
    if folder is None:
        return build(log, **parameters)
    text = json.dumps([log.fingerprint, sorted(parameters.items())])
    path = Path(folder) / "graphs" / f"{build.__name__}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    if path.exists():
        try:
            return ItemGraph.open(path)
        except StorageError:
            pass
    graph = build(log, **parameters)
    try:
        path.parent.mkdir(exist_ok=True)
        graph.save(path)
    except (OSError, StorageError):
        pass  # the data may lie where nothing can be written
    return graph
