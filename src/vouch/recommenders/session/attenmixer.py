"""Atten-Mixer: a session's next click by queries of several levels over its items, without a graph.

Source: Efficiently Leveraging Multi-level User Intent for Session-based Recommendation, arXiv 2206.12781. The read-out
also serves graph networks: `vouch train srgnn --set readout=attenmixer`.

What differs from the released code: padding has no weight anywhere; heads are split by features alone (the released
split mixes positions into them, so that a key would hold later items, and depends on the longest session of a batch);
all prefixes of a session are trained in one pass, exactly as they would be apart; sessions come shuffled unless
`order=time`. The loss is the softmax over all items up to 5,000 of them, above that over sampled ones (`loss=ce` is the
paper's at any size). The session vector has length `scale`, item vectors have length 1: products are the scaled cosines.
"""

from __future__ import annotations

from torch import Tensor

from vouch.recommenders.session.base import SessionConfig, SessionEncoder, SessionRecommender
from vouch.registry import Card, register


class AttenMixerConfig(SessionConfig):
    """Settings of Atten-Mixer."""


class AttenMixerEncoder(SessionEncoder):
    """Items as they are, under the read-out."""

    def __init__(self, n_items: int, config: SessionConfig) -> None:
        super().__init__(n_items, config)
        self.start()


@register(
    Card(
        slug="attenmixer",
        name="Atten-Mixer",
        area="recommenders/session",
        summary="a session's next click by queries of several levels over its items",
        paper="2206.12781",
        year=2023,
    )
)
class AttenMixerRecommender(SessionRecommender):
    """Multi-level attention over a session."""

    Config = AttenMixerConfig

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> AttenMixerEncoder:
        """A new encoder."""
        del facts
        return AttenMixerEncoder(n_items, self.config)
