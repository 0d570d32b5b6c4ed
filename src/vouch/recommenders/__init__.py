"""Recommenders, by what they look at: pairs (`collaborative`), order (`sequential`), sessions, media, domains."""

from vouch.recommenders.base import Ranking, Recommender, load

__all__ = ["Ranking", "Recommender", "load"]
