"""Why was this recommended? By counterfactual removal, for several items at once; and the method's own evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.data import Queries
from vouch.nn.transformer import Context
from vouch.recommenders.base import Recommender
from vouch.recommenders.reasons import strongest, without_each
from vouch.recommenders.sequential.base import SequentialRecommender
from vouch.service.scoring import Scoring

SHOWN = 20
"""Weights shown at most."""


def reasons(scoring: Scoring, queries: Queries, items: NDArray[Any], *, most: int = 3) -> list[list[tuple[int, float]]]:
    """For each of some items, the history items whose removal lowers its standing most, with the drops.

    As `vouch.recommenders.reasons.why` for the first query, but the histories without each item are scored once for
    all items, in pieces that fit the memory.
    """
    removed, variants = without_each(queries, 0)
    if not removed:
        return [[] for _ in items]
    standing = standings(scoring, variants, torch.from_numpy(np.asarray(items, dtype=np.int64)))
    return [[(each.item, each.drop) for each in strongest(removed, column, most)] for column in standing.T]


def standings(scoring: Scoring, queries: Queries, items: Tensor) -> Tensor:
    """float64 `(B, len(items))`: scores in standard deviations above the mean over all items.

    One pass over the tiles: the sums of scores and of their squares, around the first score so that nothing cancels.
    """
    found = []
    for _, block in queries.blocks(64):
        wanted = torch.zeros(len(block), len(items), dtype=torch.float64)
        total = torch.zeros(len(block), dtype=torch.float64)
        squares = torch.zeros(len(block), dtype=torch.float64)
        middle: Tensor | None = None
        for first, scores in scoring.tiles(block):
            if middle is None:
                middle = scores.mean(1, keepdim=True)
            inside = (items >= first) & (items < first + scores.shape[1])
            wanted[:, inside] = scores[:, items[inside] - first].double()
            centred = scores - middle
            total += centred.sum(1, dtype=torch.float64)
            squares += centred.square_().sum(1, dtype=torch.float64)
        assert middle is not None
        n = len(scoring)
        spread = ((squares - total.square() / n) / (n - 1)).clamp(min=0).sqrt().clamp(min=1e-12)
        mean = middle.squeeze(1).double() + total / n
        found.append((wanted - mean.unsqueeze(1)) / spread.unsqueeze(1))
    return torch.cat(found)


@torch.no_grad()
def evidence(model: Any, queries: Queries, item: int) -> tuple[str, str, list[tuple[int, float]]] | None:
    """The kind of evidence, a sentence about it, and weights of history items for one item; None where there is none."""
    if isinstance(model, SequentialRecommender):
        return _weights_in_encoder(model, queries, item)
    history = np.asarray(queries.history(0), dtype=np.int64)
    attention = getattr(model, "attention", None)
    if callable(attention):
        distinct = np.unique(history)
        weights = attention(distinct, np.array([item]))[0].tolist()
        about = "How much the method attends to each history item for this recommendation."
        return "attention", about, _heaviest(distinct.tolist(), weights)
    if type(model).similarities is not Recommender.similarities:
        distinct = np.unique(history)
        column = model.similarities(distinct)[:, item].tolist()
        about = "How much each history item speaks for this recommendation: the method's similarity between the two."
        return "similarity", about, _heaviest(distinct.tolist(), column)
    return None


def _weights_in_encoder(
    model: SequentialRecommender, queries: Queries, item: int
) -> tuple[str, str, list[tuple[int, float]]] | None:
    """Attention weights of the last position in the last layer, or the routing of the interest that likes the item most."""
    was = model.network.training
    model.network.eval()
    lengths = np.minimum(queries.lengths[:1], model.reads)
    items, length = model.inputs(queries, np.array([0]), lengths)
    context = Context(user=torch.from_numpy(queries.user[:1].astype(np.int64)), watch=True)
    hidden = model.network(torch.from_numpy(items), torch.from_numpy(length), context)
    model.network.train(was)
    end, read = int(length[0]) - 1, int(lengths[0])
    codes = items[0, :read].tolist()
    if context.notes.get("attention"):
        weights = context.notes["attention"][-1][0, :, end, :read].mean(0)
        about = "Attention of the last position to each history item in the last layer, a mean over heads."
        return "attention", about, _heaviest(codes, weights.tolist())
    if context.notes.get("routing"):
        routing = context.notes["routing"][-1][0, end]  # (K, L)
        best = 0
        if hidden.dim() == 4:
            best = int((hidden[0, end] @ model.item_vectors()[item]).argmax())
        about = (
            f"How much each history item went into interest {best + 1}, the one that likes this recommendation most."
        )
        return "routing", about, _heaviest(codes, routing[best, :read].tolist())
    return None


def _heaviest(codes: list[int], weights: list[float]) -> list[tuple[int, float]]:
    """Items with the sum of their weights, greatest first; those without weight are left out."""
    total: dict[int, float] = {}
    for code, weight in zip(codes, weights, strict=True):
        total[code] = total.get(code, 0.0) + weight
    ranked = sorted(total.items(), key=lambda pair: -abs(pair[1]))
    return [(code, weight) for code, weight in ranked[:SHOWN] if weight != 0.0]
