"""What the lists are like beyond being right: coverage, novelty, concentration, diversity, popularity bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vouch.data import Catalog, Interactions, Queries
from vouch.errors import ConfigError
from vouch.evaluation.metrics import Metric


class Lists:
    """Collects the recommended lists of all cases, block by block, and describes them.

    - `Coverage@k`: share of the catalogue that is in some list.
    - `Novelty@k`: mean self-information `-log2 p(i)` of recommended items, `p` the share of training users (plus one)
      who have the item.
    - `Gini@k`: concentration of exposure over the catalogue: 0 when every item is shown equally often, near 1 when
      one item is shown always.
    - `ILD@k`: mean distance of two items of a list: `1 - cosine` of the first feature matrix of the catalogue, or
      else the share of pairs that differ in its first category.
    - `PopularityBias@k`: mean training count of the recommended items over that of the items in the same user's
      history, averaged over users, less one: 0 keeps the user's taste, 1 is twice as popular.

    Raises:
        ConfigError: a metric needs `train` or `catalog` and does not have it.
    """

    def __init__(
        self, metrics: Sequence[Metric], n_items: int, *, train: Interactions | None, catalog: Catalog | None
    ) -> None:
        self.metrics, self.n_items = metrics, n_items
        self.k = max(metric.k or 1 for metric in metrics)
        for metric in metrics:
            if metric.family in ("Novelty", "PopularityBias") and train is None:
                raise ConfigError(f"{metric.name} needs the training log", hint="give train=split.train")
        self._distance = _distance(catalog) if any(metric.family == "ILD" for metric in metrics) else None
        counts = np.zeros(n_items) if train is None else train.item_counts.astype(np.float64)
        users = 1 if train is None else max(1, int((train.lengths > 0).sum()))
        self._counts = counts
        self._information = -np.log2((counts + 1) / (users + 1))
        self._shown = {metric.name: np.zeros(n_items) for metric in metrics}
        self._sums = {metric.name: 0.0 for metric in metrics}
        self._cases = {metric.name: 0 for metric in metrics}

    def add(self, lists: NDArray[np.int64], queries: Queries) -> None:
        """Take in the lists `(B, k)` of a block."""
        for metric in self.metrics:
            top = lists[:, : metric.k]
            if metric.family in ("Coverage", "Gini"):
                self._shown[metric.name] += np.bincount(top.ravel(), minlength=self.n_items)
            elif metric.family == "Novelty":
                self._add(metric, self._information[top].mean(1))
            elif metric.family == "PopularityBias":
                flat = np.concatenate([np.zeros(1), np.cumsum(self._counts[queries.item])])
                total = flat[queries.offsets[1:]] - flat[queries.offsets[:-1]]
                known = total > 0
                own = total[known] / queries.lengths[known]
                self._add(metric, self._counts[top[known]].mean(1) / own - 1)
            else:
                assert self._distance is not None
                self._add(metric, self._distance(top))

    def _add(self, metric: Metric, values: NDArray[np.float64]) -> None:
        self._sums[metric.name] += float(values.sum())
        self._cases[metric.name] += len(values)

    def values(self) -> dict[str, float]:
        """The metrics over all lists so far."""
        found = {}
        for metric in self.metrics:
            if metric.family == "Coverage":
                found[metric.name] = float((self._shown[metric.name] > 0).mean())
            elif metric.family == "Gini":
                found[metric.name] = gini(self._shown[metric.name])
            else:
                found[metric.name] = self._sums[metric.name] / max(1, self._cases[metric.name])
        return found


def gini(counts: NDArray[np.float64]) -> float:
    """The Gini coefficient of non-negative counts: 0 for equal ones, `1 - 1/n` when one holds all."""
    ascending = np.sort(np.asarray(counts, dtype=np.float64))
    n, total = len(ascending), ascending.sum()
    if total == 0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending / (n * total))


def _distance(catalog: Catalog | None) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Mean pairwise distance within each list `(B, k)`."""
    if catalog is not None and catalog.features:
        matrix = np.asarray(next(iter(catalog.features.values())), dtype=np.float64)
        unit = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)

        def by_features(lists: NDArray[np.int64]) -> NDArray[np.float64]:
            k = lists.shape[1]
            if k < 2:
                return np.zeros(len(lists))
            vectors = unit[lists]  # (B, k, D)
            total = vectors.sum(1)
            own = (vectors**2).sum((1, 2))
            return 1 - ((total**2).sum(1) - own) / (k * (k - 1))

        return by_features
    names = [] if catalog is None else catalog.columns("category")
    if catalog is None or not names:
        raise ConfigError(
            "ILD needs a catalogue with features or a category", hint="give items=... when reading the data"
        )
    codes = catalog.attribute(names[0]).codes[:, 0]

    def by_category(lists: NDArray[np.int64]) -> NDArray[np.float64]:
        k = lists.shape[1]
        if k < 2:
            return np.zeros(len(lists))
        labels = codes[lists]
        same = (labels[:, :, None] == labels[:, None, :]).sum((1, 2)) - k
        return 1 - same / (k * (k - 1))

    return by_category
