"""Scores of a loaded model in pieces that fit a processor's cache, and the best of them.

Shapes: `B` queries, `K` interests, `D` size, `N` items, `T` items of a tile, `k` results.
"""

from __future__ import annotations

import json
import mmap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.data import Interactions, Queries
from vouch.errors import DataError, StorageError
from vouch.nn.topk import top_k
from vouch.recommenders.base import Recommender

TILE_CELLS = 1 << 19
"""Scores of one tile: 2 MiB of float32."""
GROUP = 16
"""Scores of which only the greatest is looked at before the best are searched for."""
BLOCK_CELLS = 1 << 24
"""Scores at once of a method that only scores all items together: 64 MiB."""
QUERIES = 256
"""Queries multiplied at once."""
PROBES = 8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def map_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as read-only views of the file itself.

    Processes that map the same file share one copy of it in memory. Nothing may write to the tensors: that is a fault
    of the processor, not an exception.

    Raises:
        StorageError: the file cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
    except (OSError, ValueError) as error:
        raise StorageError(f"the weights cannot be mapped: {error}", where=str(path), hint="train again") from error
    tensors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the memory cannot be written, which is the point
        for name, about in header.items():
            if name == "__metadata__" or 0 in about["shape"]:
                continue
            low, high = about["data_offsets"]
            kind = DTYPES[about["dtype"]]
            count = (high - low) // kind.itemsize
            flat = torch.frombuffer(mapped, dtype=kind, count=count, offset=start + low)
            tensors[name] = flat.view(about["shape"])
    return tensors


def share_weights(model: Any, path: Path) -> None:
    """Let a loaded model's networks use the mapped file in place of their own copy."""
    weights = map_weights(path)
    for value in vars(model).values():
        if isinstance(value, nn.Module):
            named = value.state_dict()
            found = {name: weights[name] for name, own in named.items() if _alike(weights.get(name), own)}
            value.load_state_dict(found, strict=False, assign=True)


def _alike(mapped: Tensor | None, own: Tensor) -> bool:
    return mapped is not None and mapped.shape == own.shape and mapped.dtype == own.dtype


@dataclass(frozen=True, eq=False)
class Closed:
    """What may not be recommended: pairs of a row and an item, in the order of items, and masks of whole rows.

    Attributes:
        row, item: int64, like one another. allowed: bool `(N,)` by row, for rows that have a filter.
    """

    row: NDArray[np.int64]
    item: NDArray[np.int64]
    allowed: dict[int, NDArray[np.bool_]] = field(default_factory=dict)

    @classmethod
    def of(cls, codes: Sequence[NDArray[np.int64]], allowed: Sequence[NDArray[np.bool_] | None]) -> Closed:
        """From the closed item codes and the mask of each row."""
        row = np.repeat(np.arange(len(codes)), [len(each) for each in codes])
        item = np.concatenate(codes) if len(codes) else np.zeros(0, np.int64)
        order = np.argsort(item, kind="stable")
        return cls(row[order], item[order], {at: mask for at, mask in enumerate(allowed) if mask is not None})

    def only(self, rows: NDArray[np.bool_]) -> Closed:
        """The same for some rows `(B,)`, in their order."""
        number = np.cumsum(rows) - 1
        kept = rows[self.row]
        masks = {int(number[at]): mask for at, mask in self.allowed.items() if rows[at]}
        return Closed(number[self.row[kept]], self.item[kept], masks)

    def keep_open(self, scores: Tensor, items: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The first `(B, k)` of found items `(B, n)` that may be recommended; -inf and -1 where there are fewer."""
        score, item = scores.numpy(), items.numpy()
        n_items = int(max(self.item.max(initial=0), item.max(initial=0))) + 1
        known = np.sort(self.row * n_items + self.item)
        key = np.arange(len(item))[:, None] * n_items + item
        place = np.minimum(np.searchsorted(known, key), max(0, len(known) - 1))
        shut = (item < 0) | (known[place] == key if len(known) else False)
        for at, mask in self.allowed.items():
            shut[at] |= ~mask[item[at]]
        order = np.argsort(shut, axis=1, kind="stable")[:, :k]
        shut = np.take_along_axis(shut, order, 1)
        kept_score = np.where(shut, -np.inf, np.take_along_axis(score, order, 1)).astype(np.float32)
        return kept_score, np.where(shut, -1, np.take_along_axis(item, order, 1))

    def close(self, scores: Tensor, first: int) -> None:
        """Put -inf where nothing may be recommended, in scores `(B, T)` of items from `first` on."""
        low, high = np.searchsorted(self.item, (first, first + scores.shape[1]))
        row, item = self.row[low:high], self.item[low:high] - first
        scores[torch.from_numpy(row), torch.from_numpy(item)] = -torch.inf
        for at, mask in self.allowed.items():
            scores[at].masked_fill_(torch.from_numpy(~mask[first : first + scores.shape[1]]), -torch.inf)


class Scoring:
    """A loaded model as a source of scores.

    A method that ranks by products of vectors is used by its vectors: they are multiplied tile by tile, so that scores
    never leave the cache. Whether its vectors rank as its `score` does is tried out on some histories. Any other is
    asked for all scores at once.

    Attributes:
        vectors: `(N, D)`, with a last column for what the method adds to an item's score; None if it has none.
        merge: how the products of several interests become one score.
    """

    def __init__(self, model: Recommender, log: Interactions) -> None:
        self.model, self.turn = model, threading.Lock()
        assert model.popularity is not None
        self.popularity = torch.from_numpy(np.asarray(model.popularity))
        network = getattr(model, "network", None)
        self.merge: Literal["max", "sum"] = getattr(network, "merge", "max")
        self.vectors: Tensor | None = None
        self.biased = False
        self._lengths: Tensor | None = None
        with torch.no_grad():
            vectors = model.item_vectors()
            if vectors is not None:
                bias = getattr(network, "bias", None) if hasattr(network, "interests") else None
                self.biased = bias is not None
                vectors = vectors.float()
                self.vectors = vectors if bias is None else torch.cat([vectors, bias.unsqueeze(1)], 1)
                if not self._agrees(log):
                    self.vectors = None

    def __len__(self) -> int:
        return len(self.popularity)

    def query_vectors(self, queries: Queries) -> Tensor:
        """`(B, D)` or `(B, K, D)`, to be multiplied with `vectors`.

        Raises:
            DataError: a vector is not a number.
        """
        with self.turn, torch.no_grad():  # a method may keep notes of a pass
            found = self.model.query_vectors(queries)
        assert found is not None
        found = found.float()
        if self.biased:
            ones = found.new_ones(*found.shape[:-1], 1)
            found = torch.cat([found, ones / found.shape[1] if found.dim() == 3 and self.merge == "sum" else ones], -1)
        if not torch.isfinite(found).all():
            raise DataError(f"{self.model.card.slug} gave a vector that is not a number", hint="train it again")
        return found

    def product(self, queries: Tensor, items: Tensor) -> Tensor:
        """Scores `(B, T)` of query vectors with item vectors `(T, D)`."""
        if queries.dim() == 2:
            return queries @ items.T
        scores = (queries.flatten(0, 1) @ items.T).view(*queries.shape[:2], -1)
        return scores.amax(1) if self.merge == "max" else scores.sum(1)

    def nothing_known(self, queries: Queries) -> NDArray[np.bool_]:
        """bool `(B,)`: no history, so that popularity answers, for users of the log as well."""
        return queries.lengths == 0

    def tiles(self, queries: Queries) -> Iterator[tuple[int, Tensor]]:
        """Scores `(B, T)` of consecutive items, each with the code of the first; they may be written to."""
        if self.vectors is None:
            users = np.where(self.nothing_known(queries), -1, queries.user).astype(np.int32)
            with self.turn, torch.no_grad():
                scores = self.model.score_or_popularity(replace(queries, user=users))
            yield 0, scores
        else:
            yield from self.products(self.query_vectors(queries), torch.from_numpy(self.nothing_known(queries)))

    def products(self, queries: Tensor, popular: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Scores of query vectors, as `tiles`; popularity where `popular` `(B,)` says so, or a vector is zero."""
        assert self.vectors is not None
        blank = ~queries.flatten(1).any(1)
        blank = blank if popular is None else blank | popular
        some = bool(blank.any())
        interests = queries.shape[1] if queries.dim() == 3 else 1
        size = max(64, TILE_CELLS // (len(queries) * interests))
        for first in range(0, len(self), size):
            scores = self.product(queries, self.vectors[first : first + size])
            if some:
                scores[blank] = self.popularity[first : first + size]
            yield first, scores

    def blocks(self, queries: Queries) -> Iterator[tuple[int, Queries]]:
        """Pieces of a batch that fit the memory."""
        return queries.blocks(QUERIES if self.vectors is not None else max(1, BLOCK_CELLS // len(self)))

    def best(self, queries: Queries, k: int, closed: Closed) -> tuple[Tensor, Tensor]:
        """Scores and items `(B, k)`, best first, the smaller item among equals; -1 and -inf where there are no more."""
        if self.vectors is not None:
            popular = torch.from_numpy(self.nothing_known(queries))
            return self.best_of_vectors(self.query_vectors(queries), k, closed, popular)
        ((_, scores),) = self.tiles(queries)
        closed.close(scores, 0)
        value, item = top_k(scores, min(k, len(self)))
        return value, item.masked_fill(torch.isneginf(value), -1)

    def best_of_vectors(
        self, queries: Tensor, k: int, closed: Closed, popular: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`best` for query vectors.

        `largest` is fast and leaves the choice among equals open, so one more is taken than asked for. Rows in which none
        of these are equal are settled; for the others it is done again with care for equals.
        """
        k = min(k, len(self))
        value, item = _merged(self.products(queries, popular), k + 1, closed, largest)
        tied = ((value[:, 1:] == value[:, :-1]) & ~torch.isneginf(value[:, 1:])).any(1)
        value, item = value[:, :k].contiguous(), item[:, :k].contiguous()
        if bool(tied.any()):
            rows = None if popular is None else popular[tied]
            tiles = self.products(queries[tied], rows)
            value[tied], item[tied] = _merged(tiles, k, closed.only(tied.numpy()), top_k)
        return value, item.masked_fill(torch.isneginf(value), -1)

    def similarities(self, code: int) -> Tensor | None:
        """`(1, N)`: the similarity of every item to one, which may be written to; None if the method has no notion of it."""
        if type(self.model).similarities is not Recommender.similarities or self.vectors is None:
            with self.turn, torch.no_grad():
                found = self.model.similarities(np.array([code]))
            return None if found is None else found.detach().float().clone()
        vectors = self.vectors[:, :-1] if self.biased else self.vectors
        if self._lengths is None:
            self._lengths = torch.linalg.vector_norm(vectors, dim=1).clamp(min=1e-12)
        return ((vectors @ (vectors[code] / self._lengths[code])) / self._lengths).unsqueeze(0)

    def _agrees(self, log: Interactions) -> bool:
        """Whether products rank as `score` does, on a few histories and on one of a stranger."""
        users = np.linspace(0, log.n_users - 1, min(PROBES, log.n_users)).astype(np.int64)
        users = users[log.lengths[users] > 0] if log.n_users <= 1 << 20 else users[np.diff(log.offsets)[users] > 0]
        if len(users) == 0:
            return False
        probe = Queries.from_users(log, users)
        probe = Queries(np.where(np.arange(len(users)) % 2, -1, probe.user).astype(np.int32), probe.offsets, probe.item)
        try:
            ours = self.product(self.query_vectors(probe), self.vectors if self.vectors is not None else torch.empty(0))
        except (NotImplementedError, AssertionError):
            return False
        theirs = self.model.score(probe).float()
        scale = theirs.abs().max().clamp(min=1e-12)
        return bool(((ours - theirs).abs().max() / scale) < 1e-4)


def _merged(
    tiles: Iterable[tuple[int, Tensor]], k: int, closed: Closed, best_in: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    values, items = [], []
    for first, scores in tiles:
        closed.close(scores, first)
        value, index = best_in(scores, min(k, scores.shape[1]))
        values.append(value)
        items.append(index + first)
    value, item = torch.cat(values, 1), torch.cat(items, 1)
    if len(values) > 1:  # equals are in the order of items, within tiles and among them
        order = torch.sort(value, dim=1, descending=True, stable=True).indices[:, :k]
        value, item = value.gather(1, order), item.gather(1, order)
    return value, item


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row of `(B, T)` and where they are, as `torch.topk`; of equals, any.

    Only the `k` groups of columns with the greatest maxima are searched: each holds a score that no score outside them
    exceeds, so the `k` largest are found there.
    """
    T = scores.shape[1]
    width = T // GROUP
    if width < 4 * k:
        return torch.topk(scores, k)
    even = width * GROUP  # group `w` holds the columns w, w + width, w + 2 width, ...
    chosen = torch.topk(scores[:, :even].unflatten(1, (GROUP, width)).amax(1), k).indices
    column = (chosen.unsqueeze(1) + width * torch.arange(GROUP).unsqueeze(1)).flatten(1)
    column = torch.cat([column, torch.arange(even, T).expand(len(scores), -1)], 1)
    value, place = torch.topk(scores.gather(1, column), k)
    return value, column.gather(1, place)
