"""TiCoSeRec: contrast between views that make histories more even in time.

Source: Uniform Sequence Better, arXiv 2212.08262. Five operators look at the gaps between events: crop and shuffle
where they are most even, hide before the largest, replace at the smallest, fill in at the largest; the users whose
gaps vary least are left alone. Use them with any encoder: `augment="ticoserec"`.

What differs from the released code, which has each of these otherwise: the most similar item is the one of the highest
similarity; the users left alone are those of the smallest variance in the training part, events at one moment counted
once, ties by user code; the variance of a window takes all its gaps. A hidden item is a zero vector that is attended to
like any other. Another history of the same user is no negative. A history longer than a window is augmented window by
window. Chance is drawn from the run's seed, the epoch and the history alone, whatever the batches are.
Only gaps count, so times before 1970 are as good as any; a log is sorted by time when it is made.

As published, outputs of padding have a part in the flattened views (`contrastive.of="padded"`; here they see no item,
in the released code all of them), and the optimizer is Adam with its decay in the gradient. The part alone, as in
`augment="ticoserec"` with another method, leaves padding out and the optimizer as it is. There is one `dropout` (0.5);
the paper has 0.2 for attention weights.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vouch.config import setting
from vouch.data import Interactions
from vouch.errors import DataError
from vouch.recommenders.sequential.augment import Mode, Ragged, portion
from vouch.recommenders.sequential.config import Loss
from vouch.recommenders.sequential.contrast import DAY, CoSeRec, RatesConfig
from vouch.recommenders.sequential.parts import Histories, Setup, part
from vouch.recommenders.sequential.sasrec import SASRec, SASRecConfig
from vouch.registry import Card, register


class TimeRatesConfig(RatesConfig):
    """Settings of the time-interval operators: rates, and where each acts."""

    crop_at: Mode = setting("minimum", "crop to the window whose gaps vary least, most, or at random")
    reorder_at: Mode = setting("minimum", "shuffle the window whose gaps vary least, most, or at random")
    mask_at: Mode = setting("maximum", "hide before the smallest gaps, the largest, or at random")
    substitute_at: Mode = setting("minimum", "replace before the smallest gaps, the largest, or at random")
    insert_at: Mode = setting("maximum", "add after the events before the smallest gaps, the largest, or at random")
    exempt: float = setting(
        0.15, "share of users, those of the most even gaps, whose views are the original", ge=0, le=1
    )
    exempt_by: Literal["variance", "cv"] = setting("variance", "evenness: variance, or coefficient of variation")


def unevenness(log: Interactions, by: Literal["variance", "cv"] = "variance") -> NDArray[np.float64]:
    """Variance (days squared) or coefficient of variation of each user's gaps `(U,)`; events at one time count once.

    0 for users with fewer than two gaps.
    """
    assert log.time is not None
    user, time = log.user, np.asarray(log.time)
    first = np.ones(len(time), dtype=bool)
    first[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    user, time = user[first], time[first]
    within = user[1:] == user[:-1]
    owner, gap = user[1:][within], np.diff(time)[within] / DAY
    count = np.maximum(np.bincount(owner, minlength=log.n_users), 1)
    mean = np.bincount(owner, gap, log.n_users) / count
    variance = np.bincount(owner, (gap - mean[owner]) ** 2, log.n_users) / count
    return variance if by == "variance" else np.sqrt(variance) / np.where(mean > 0, mean, 1.0)


@part("augment", "ticoserec", "the five operators of CoSeRec, placed by the gaps in time")
class TimeIntervals(CoSeRec):
    """Operators placed by the gaps."""

    Config = TimeRatesConfig

    def __init__(self, settings: TimeRatesConfig, setup: Setup) -> None:
        log = setup.split.train
        if log.time is None:
            raise DataError(
                "augment='ticoserec' goes by the time between events, and the log has no 'time' column",
                hint="name it, for example --columns time=timestamp, or use augment=coserec, which needs none",
            )
        super().__init__(settings, setup)
        even = np.argsort(unevenness(log, settings.exempt_by), kind="stable")
        self.exempt = np.zeros(log.n_users, dtype=bool)
        self.exempt[even[: int(portion(settings.exempt, np.array(log.n_users)))]] = True

    def mode(self, operator: str) -> Mode:
        """By the settings."""
        found: Mode = getattr(self.settings, f"{operator}_at")
        return found

    def gaps(self, histories: Histories, rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Days to the next event; to the last target where it is known, else 0."""
        time = histories.log.time
        assert time is not None
        known = np.repeat(histories.known, np.diff(bounds))
        after = np.where(rows + 1 < known, rows + 1, rows)
        return (time[after] - time[rows]) / DAY

    def pick(self, ragged: Ragged, histories: Histories) -> NDArray[np.int64]:
        """As CoSeRec, but the users of even gaps are left alone."""
        return np.where(self.exempt[histories.user], -1, super().pick(ragged, histories))


class TiCoSeRecConfig(SASRecConfig):
    """Settings of TiCoSeRec on SASRec."""

    augment: str = setting("ticoserec", "how other views of a history are made")
    parts: dict[str, dict[str, Any]] = setting(
        {"contrastive": {"weight": 0.1, "temperature": 1.0, "warmup_epochs": 40, "of": "padded"}},
        "settings of the parts",
    )
    loss: Loss = setting("bce", "next-item loss at every position")
    hidden_size: int = setting(128, "length of the item and query vectors", ge=2)
    inner_size: int = setting(256, "size of the feed-forward layers; 0 is 4 x hidden_size", ge=0)
    epochs: int = setting(350, "most passes over the training log", ge=1)
    monitor: str = setting("NDCG@20", "validation metric that picks the best epoch and stops training")
    patience: int = setting(150, "validations without a better value before training stops", ge=1)
    weight_decay: float = setting(1e-6, "weight decay, a part of the gradient", ge=0)


@register(
    Card(
        slug="ticoserec",
        name="TiCoSeRec",
        area="recommenders/sequential",
        summary="contrast between views that make histories more even in time",
        paper="2212.08262",
        year=2023,
        needs=("times",),
    )
)
class TiCoSeRec(SASRec):
    """SASRec with time-interval-aware contrast."""

    Config = TiCoSeRecConfig

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam with its usual betas, as published."""
        config = self.config
        return torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
