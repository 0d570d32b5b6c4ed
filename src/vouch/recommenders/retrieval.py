"""Nearest items for query vectors, one or several a query: exact, or through an index; and what the interests are like.

Shapes: `B` queries, `K` interests, `D` size, `N` items, `k` results.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vouch.errors import ConfigError
from vouch.nn.topk import top_k

Merge = Literal["max", "sum"]
EXACT_UP_TO = 100_000
"""Items up to which `auto` searches exactly."""
BLOCK_CELLS = 1 << 25
HNSW_LINKS, HNSW_EFFORT = 32, 128


class ItemIndex:
    """Items by their vectors, to search by inner product.

    Args:
        vectors: float32 `(N, D)`.
        kind: `exact` compares with every item; `hnsw` is a graph of neighbours (faiss), approximate and fast; `auto`
            is exact up to 100,000 items.

    Raises:
        ConfigError: unknown kind, or `hnsw` without faiss.
    """

    def __init__(self, vectors: Tensor, kind: Literal["auto", "exact", "hnsw"] = "auto") -> None:
        if kind not in ("auto", "exact", "hnsw"):
            raise ConfigError(f"there is no index {kind!r}", hint="use auto, exact or hnsw")
        self.vectors = vectors.detach().float()
        self.kind = kind if kind != "auto" else "exact" if len(vectors) <= EXACT_UP_TO else "hnsw"
        self._faiss: Any = None
        if self.kind == "hnsw":
            try:
                import faiss
            except ImportError:
                raise ConfigError(
                    "an hnsw index needs faiss", hint="pip install 'vouch[index]', or kind='exact'"
                ) from None
            self._faiss = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            self._faiss.hnsw.efConstruction = HNSW_EFFORT
            self._faiss.add(np.ascontiguousarray(self.vectors.cpu().numpy()))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and items `(B, k)` of the greatest products with `(B, D)`, best first; -1 and -inf where there are no more."""
        k_found = min(k, len(self.vectors))
        if self._faiss is not None:
            self._faiss.hnsw.efSearch = max(HNSW_EFFORT, 2 * k_found)
            found, item = self._faiss.search(np.ascontiguousarray(queries.detach().float().cpu().numpy()), k_found)
            scores, items = torch.from_numpy(found), torch.from_numpy(item)
            scores = scores.masked_fill(items < 0, -torch.inf)
        else:
            rows = max(1, BLOCK_CELLS // len(self.vectors))
            pieces = [top_k(piece.float() @ self.vectors.T, k_found) for piece in queries.split(rows)]
            scores, items = (torch.cat(each) for each in zip(*pieces, strict=True))
        return F.pad(scores, (0, k - k_found), value=-torch.inf), F.pad(items, (0, k - k_found), value=-1)


def retrieve(
    queries: Tensor,
    index: ItemIndex,
    k: int,
    *,
    merge: Merge = "max",
    seen: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and items `(B, k)` for query vectors `(B, D)` or `(B, K, D)`, best first.

    With `max` an item's score is that of the interest that likes it most: each interest gives its best, and the lists
    are merged, which is the top of the maximum exactly (where the search is exact). With `sum` it is the sum, which is
    the product with the summed vector.

    Args:
        seen: items to leave out, end to end, and the bounds `(B + 1,)` of each query's.

    Raises:
        ConfigError: `k` is below 1.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; it must be at least 1")
    if queries.dim() == 3 and merge == "sum":
        queries = queries.sum(1)
    B = len(queries)
    longest = 0 if seen is None else int(np.diff(seen[1]).max(initial=0))
    wide = min(k + longest, len(index.vectors))
    if queries.dim() == 2:
        scores, items = index.search(queries, wide)
    else:
        scores, items = (found.view(B, -1) for found in index.search(queries.flatten(0, 1), wide))
        # each item once, by its best score: sorted by item, best first, later ones of a run are repeats
        order = torch.argsort(scores, dim=1, descending=True, stable=True)
        scores, items = scores.gather(1, order), items.gather(1, order)
        order = torch.argsort(items, dim=1, stable=True)
        scores, items = scores.gather(1, order), items.gather(1, order)
        repeat = F.pad(items[:, 1:] == items[:, :-1], (1, 0))
        scores = scores.masked_fill(repeat | (items < 0), -torch.inf)
    if seen is not None:
        owner = np.repeat(np.arange(B), np.diff(seen[1]))
        known = np.sort(owner * len(index.vectors) + seen[0])
        keys = (torch.arange(B).unsqueeze(1) * len(index.vectors) + items.cpu()).numpy()
        scores = scores.masked_fill(torch.from_numpy(np.isin(keys, known)).to(scores.device), -torch.inf)
    best, place = top_k(scores, min(k, scores.shape[1]))
    chosen = items.gather(1, place).masked_fill(torch.isneginf(best), -1)
    pad = k - best.shape[1]
    return F.pad(best, (0, pad), value=-torch.inf), F.pad(chosen, (0, pad), value=-1)


def diversify(scores: Tensor, items: Tensor, category: NDArray[np.int64], k: int, coef: float) -> Tensor:
    """Items `(B, k)` chosen one at a time for `score + coef * (number of those chosen of another category)`.

    The controllable ranking of ComiRec (arXiv 2005.09347): `coef` 0 keeps the order of the scores.

    Args:
        scores, items: `(B, C)` candidates. category: int64 `(N,)` of each item.
    """
    kinds = torch.from_numpy(np.asarray(category))[items.clamp(min=0).cpu()].to(scores.device)  # (B, C)
    left = scores.clone().float().masked_fill(items < 0, -torch.inf)
    bonus = torch.zeros_like(left)
    out = torch.full((len(scores), k), -1, dtype=torch.int64, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    for place in range(min(k, scores.shape[1])):
        best = (left + coef * bonus).argmax(1)
        fine = ~torch.isneginf(left[rows, best])
        out[fine, place] = items[rows, best][fine]
        bonus += kinds != kinds[rows, best].unsqueeze(1)
        left[rows, best] = -torch.inf
    return out


def interest_report(queries: Tensor, index: ItemIndex, k: int = 20) -> dict[str, Any]:
    """How different the interests `(B, K, D)` of each query are, as means over queries.

    `cosine`: between pairs of interests of one query. `effective_interests`: `exp` of the entropy of the shares that
    interests have in the `k` results by maximum; 1 if one gives them all. `shares`: those shares, greatest first.
    `overlap`: part of an interest's own `k` results that another interest of the query also gives.

    Raises:
        ConfigError: there is one vector a query.
    """
    if queries.dim() != 3 or queries.shape[1] < 2:
        raise ConfigError(
            "there is one interest a query, so there is nothing to compare", hint="use interests of 2 or more"
        )
    B, K, _ = queries.shape
    unit = F.normalize(queries.float(), dim=-1)
    cosine = (unit @ unit.transpose(1, 2))[:, ~torch.eye(K, dtype=torch.bool)].mean()
    _, items = retrieve(queries, index, k)
    by_interest = torch.einsum("bkd,bnd->bkn", queries.float(), index.vectors[items.clamp(min=0)])
    who = by_interest.argmax(1)  # (B, k)
    shares = F.one_hot(who, K).float().mean(1)
    entropy = -(shares * torch.log(shares.clamp(min=1e-30))).sum(1)
    _, own = index.search(queries.flatten(0, 1), k)
    own = own.view(B, K, -1)
    same = (own[:, :, :, None, None] == own[:, None, None]).any(-1)  # (B, K, k, K): in the list of another
    others = ~torch.eye(K, dtype=torch.bool, device=own.device)[None, :, None, :]
    return {
        "cosine": float(cosine),
        "effective_interests": float(torch.exp(entropy).mean()),
        "shares": shares.sort(1, descending=True).values.mean(0).tolist(),
        "overlap": float((same & others).any(-1).float().mean()),
    }
