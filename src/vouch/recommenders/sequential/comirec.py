"""ComiRec and MIND, several interests for each history; and average pooling, one. Uniform sampled negatives.

Sources: Controllable Multi-Interest Framework for Recommendation, arXiv 2005.09347; Multi-Interest Network with Dynamic
Routing, arXiv 1904.08030; Deep Neural Networks for YouTube Recommendations (RecSys 2016), of which only the average is
here. What differs: every position of a history is learned from, in one pass (the papers draw one position for each user
and step); the routing softmax of DR and MIND is over the items by default, as in the port that published comparisons
use, and over the interests by `softmax_over=interests`. MIND starts its routing from one draw that is kept with the
model.
"""

from __future__ import annotations

from torch import Tensor

from vouch.config import setting
from vouch.recommenders.sequential.interests import (
    Average,
    Dynamic,
    InterestRecommender,
    InterestsConfig,
    SelfAttentive,
)
from vouch.registry import Card, register


@register(
    Card(
        slug="comirec-sa",
        name="ComiRec-SA",
        area="recommenders/sequential",
        summary="several interests by self-attention over the history",
        paper="2005.09347",
        year=2020,
        baseline=True,
    )
)
class ComiRecSA(InterestRecommender):
    """Self-attentive interests."""

    Config = InterestsConfig

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> SelfAttentive:
        """A new encoder."""
        del facts
        return SelfAttentive(n_items, self.config)


@register(
    Card(
        slug="comirec-dr",
        name="ComiRec-DR",
        area="recommenders/sequential",
        summary="several interests by dynamic routing over the history",
        paper="2005.09347",
        year=2020,
        baseline=True,
    )
)
class ComiRecDR(InterestRecommender):
    """Interests as capsules, with a map for each position and interest."""

    Config = InterestsConfig

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> Dynamic:
        """A new encoder."""
        del facts
        return Dynamic(n_items, self.config, shared=False, relu=False)


class MINDConfig(InterestsConfig):
    """Settings of MIND."""

    relu: bool = setting(True, "a dense layer after the capsules")


@register(
    Card(
        slug="mind",
        name="MIND",
        area="recommenders/sequential",
        summary="several interests by dynamic routing with one map for all",
        paper="1904.08030",
        year=2019,
        baseline=True,
    )
)
class MIND(InterestRecommender):
    """Interests as capsules, with a map that all share."""

    Config = MINDConfig
    config: MINDConfig

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> Dynamic:
        """A new encoder."""
        del facts
        return Dynamic(n_items, self.config, shared=True, relu=self.config.relu)


class PoolingConfig(InterestsConfig):
    """Settings of average pooling."""

    interests: int = setting(1, "vectors for each history (K)", ge=1, le=1)


@register(
    Card(
        slug="youtube-dnn",
        name="YouTube DNN",
        area="recommenders/sequential",
        summary="the mean of the history through a dense layer",
        year=2016,
        baseline=True,
    )
)
class YouTubeDNN(InterestRecommender):
    """Average pooling."""

    Config = PoolingConfig

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> Average:
        """A new encoder."""
        del facts
        return Average(n_items, self.config)
