"""Vouch: recommendations you can vouch for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Catalog": "vouch.data",
    "Dataset": "vouch.data",
    "Interactions": "vouch.data",
    "Queries": "vouch.data",
    "Query": "vouch.data",
    "Split": "vouch.data",
    "split": "vouch.data",
    "read": "vouch.data.readers",
    "VouchError": "vouch.errors",
    "Run": "vouch.training",
    "FitReport": "vouch.training",
    "Recommender": "vouch.recommenders",
    "Ranking": "vouch.recommenders",
    "load": "vouch.recommenders",
    "method": "vouch.registry",
    "methods": "vouch.registry",
    "evaluate": "vouch.evaluation",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604

if TYPE_CHECKING:
    from vouch.data import Catalog, Dataset, Interactions, Queries, Query, Split, split
    from vouch.data.readers import read
    from vouch.errors import VouchError
    from vouch.evaluation import evaluate
    from vouch.recommenders import Ranking, Recommender, load
    from vouch.registry import method, methods
    from vouch.training import FitReport, Run


def __getattr__(name: str) -> Any:
    # Names are fetched when first used, so that `import vouch` and `vouch --help` stay fast.
    if name not in _HOMES:
        raise AttributeError(f"module 'vouch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
