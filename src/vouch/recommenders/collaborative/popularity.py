"""Popularity: the same list for everyone, by training counts, optionally decayed with time.

The least that any other method must beat.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from vouch.config import Config, Span, setting
from vouch.data import Queries, Split
from vouch.errors import DataError
from vouch.recommenders.base import Recommender
from vouch.registry import Card, register
from vouch.training.run import FitReport, Run


class PopularityConfig(Config):
    """Settings of popularity."""

    half_life_days: float | None = setting(None, "days after which an event counts half; none counts all alike", gt=0)


class DecayedPopularityConfig(PopularityConfig):
    """Settings of recent popularity."""

    half_life_days: float | None = setting(
        30.0, "days after which an event counts half", gt=0, search=Span(1.0, 730.0, log=True)
    )


@register(
    Card(
        slug="popularity",
        name="Popularity",
        area="recommenders/collaborative",
        summary="the most taken items, the same for everyone",
        baseline=True,
    )
)
class Popularity(Recommender):
    """Ranks items by how often they were taken in training."""

    Config = PopularityConfig

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Count. With a half-life an event of age `a` days counts `0.5 ** (a / half_life_days)`.

        Raises:
            DataError: a half-life is set and the log has no times.
        """
        begin, train = time.perf_counter(), split.train
        self.prepare(train)
        weight = None
        if self.config.half_life_days is not None:
            if train.time is None:
                raise DataError("popularity with a half-life needs times and the log has none", hint="leave it out")
            age_days = (train.time.max() - train.time) / 86400.0
            weight = 0.5 ** (age_days / self.config.half_life_days)
        self.weights = torch.from_numpy(np.bincount(train.item, weights=weight, minlength=train.n_items)).float()
        return FitReport(seconds=time.perf_counter() - begin)

    def score(self, queries: Queries) -> Tensor:
        """The counts, for every query alike."""
        return self.weights.expand(len(queries), -1)

    def state(self) -> dict[str, Tensor]:
        """The weighted counts `(n_items,)`."""
        return {"weights": self.weights}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the counts back."""
        self.weights = state["weights"]


@register(
    Card(
        slug="recent-popularity",
        name="Recent popularity",
        area="recommenders/collaborative",
        summary="the most taken items of late: older events count less",
        needs=("times",),
        baseline=True,
    )
)
class RecentPopularity(Popularity):
    """Popularity whose events fade with time; the half-life is tuned."""

    Config = DecayedPopularityConfig
