"""Interaction logs, item catalogues, splits and queries."""

from vouch.data.catalog import Attribute, Catalog
from vouch.data.dataset import Dataset
from vouch.data.interactions import Interactions
from vouch.data.queries import Queries, Query
from vouch.data.split import Cases, Split, check_leaks, split
from vouch.data.vocabulary import Vocabulary

__all__ = [
    "Attribute",
    "Cases",
    "Catalog",
    "Dataset",
    "Interactions",
    "Queries",
    "Query",
    "Split",
    "Vocabulary",
    "check_leaks",
    "split",
]
