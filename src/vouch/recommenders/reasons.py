"""Why was this recommended? By counterfactual removal: how far the score falls without each item of the history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vouch.data import Queries
from vouch.recommenders.base import Recommender


@dataclass(frozen=True)
class Reason:
    """A history item and how much of the recommended item's score went with it when it was taken away."""

    item: int
    drop: float


def why(
    model: Recommender, queries: Queries, row: int, item: int, *, most: int = 3, look_back: int = 50
) -> list[Reason]:
    """The history items of query `row` whose removal lowers the standing of `item` most, strongest first.

    Standing is the item's score in standard deviations above the mean score of all items, so that methods whose
    scores shift as a whole with the history are treated fairly. Each of the last `look_back` items is removed in turn
    (all its occurrences at once); items whose removal does not lower the standing are left out. A method that ignores
    the history gives no reason.
    """
    removed, variants = without_each(queries, row, look_back=look_back)
    if not removed:
        return []
    scores = model.score_or_popularity(variants).double()
    spread = scores.std(dim=1).clamp(min=1e-12)
    standing = ((scores[:, item] - scores.mean(dim=1)) / spread).cpu()
    return strongest(removed, standing, most)


def without_each(queries: Queries, row: int, *, look_back: int = 50) -> tuple[list[int], Queries]:
    """The distinct ones of a history's last items, newest first; and the history as it is, then without each of them."""
    history = np.asarray(queries.history(row))
    times = None if queries.item_time is None else queries.item_time[queries.offsets[row] : queries.offsets[row + 1]]
    recent = list(dict.fromkeys(history[::-1][:look_back].tolist()))
    kept = [np.ones(len(history), bool), *(history != code for code in recent)]
    variants = Queries.from_histories(
        [history[keep] for keep in kept],
        user=np.full(len(kept), queries.user[row]),
        times=None if times is None else [times[keep] for keep in kept],
    )
    return recent, variants


def strongest(removed: list[int], standing: Tensor, most: int) -> list[Reason]:
    """Reasons from the standing `(1 + len(removed),)` with the whole history, then without each item."""
    drops = standing[0] - standing[1:]
    order = torch.argsort(drops, descending=True)[:most].tolist()
    return [Reason(int(removed[k]), float(drops[k])) for k in order if float(drops[k]) > 1e-6]


def explain(model: Recommender, queries: Queries, row: int, items: Any, *, most: int = 3) -> list[list[Reason]]:
    """`why` for each of several items of one query."""
    return [why(model, queries, row, int(item), most=most) for item in items]
