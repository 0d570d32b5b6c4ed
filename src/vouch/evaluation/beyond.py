"""What the lists are like beyond being right: coverage, novelty, concentration, diversity, popularity bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vouch.data import Catalog, Interactions, Queries
from vouch.data.gini import gini
from vouch.errors import ConfigError, DataError
from vouch.evaluation.metrics import Metric, distinct

CELLS = 1 << 21
"""Values held at once."""


class Lists:
    """Collects the recommended lists of all cases, block by block, and describes them.

    - `Coverage@k`: share of the catalogue that is in some list.
    - `Gini@k`: concentration of exposure over the catalogue: 0 when every item is shown equally often, near 1 when
      one item is shown always.
    - `Novelty@k`: self-information `-log2 p` of the recommended items, in bits; `p = (u + 1) / (U + 1)` where `u` of
      the `U` training users have the item. Mean over each list, then over cases.
    - `ILD@k`: intra-list diversity, the mean distance of two items of a list: `1 - cosine` in the first feature matrix
      of the catalogue, or else whether they differ in its first `category` column, or else `1 - cosine` of the labels
      in its first `categories` column (none is a label of its own). Mean over the cases with at least two items.
    - `PopularityBias@k`: mean training count of the recommended items over that of the items in the same history,
      less one, averaged over cases with a history: 0 keeps to the user's taste, 1 is twice as popular.

    Places of a list that no item could fill (fewer candidates than k) are left out.

    Raises:
        ConfigError: a metric needs `train` or `catalog` and does not have it.
    """

    def __init__(
        self, metrics: Sequence[Metric], n_items: int, *, train: Interactions | None, catalog: Catalog | None
    ) -> None:
        self.metrics, self.n_items = metrics, n_items
        self.k = max(metric.k or 1 for metric in metrics)
        families = {metric.family for metric in metrics}
        self._counts = self._information = np.zeros(0)
        for family in ("Novelty", "PopularityBias"):
            if family in families and train is None:
                raise ConfigError(f"{family} needs the training log", hint="give train=split.train")
        if "PopularityBias" in families and train is not None:
            self._counts = train.item_counts.astype(np.float64)
        if "Novelty" in families and train is not None:
            pairs = distinct((train.item.astype(np.int64) << 32) + train.user)  # an item's users count once
            users = int((train.lengths > 0).sum())
            self._information = -np.log2((np.bincount(pairs >> 32, minlength=n_items) + 1) / (users + 1))
        self._distance = _Distance(catalog) if "ILD" in families else None
        self._shown = {metric.name: np.zeros(n_items) for metric in metrics if metric.family in ("Coverage", "Gini")}
        self._sums = dict.fromkeys((metric.name for metric in metrics), 0.0)
        self._cases = dict.fromkeys((metric.name for metric in metrics), 0)

    def add(self, lists: NDArray[np.int64], queries: Queries) -> None:
        """Take in the lists `(B, k)` of a block, -1 where a place is not filled."""
        novelty, popularity = _running_mean(self._information, lists), _running_mean(self._counts, lists)
        own = self._own(queries)
        known = own > 0
        for metric in self.metrics:
            top = lists[:, : metric.k]
            last = top.shape[1] - 1
            if metric.family in ("Coverage", "Gini"):
                self._shown[metric.name] += np.bincount(top[top >= 0], minlength=self.n_items)
            elif metric.family == "Novelty":
                self._add(metric, novelty[:, last])
            elif metric.family == "PopularityBias":
                self._add(metric, popularity[known, last] / own[known] - 1)
            else:
                assert self._distance is not None
                step = max(1, CELLS // (top.shape[1] * max(top.shape[1], self._distance.width)))
                for first in range(0, len(top), step):
                    self._add(metric, self._distance(top[first : first + step]))

    def _own(self, queries: Queries) -> NDArray[np.float64]:
        """The mean training count of the items of each history `(B,)`; 0 where it is empty or nobody asks."""
        if len(self._counts) == 0:
            return np.zeros(len(queries))
        # `reduceat` gives the value at its start for an empty slice: a last zero to start at, and no weight below.
        summed = np.add.reduceat(np.append(self._counts[queries.item], 0.0), queries.offsets[:-1])
        return np.where(queries.lengths > 0, summed / np.maximum(queries.lengths, 1), 0.0)

    def _add(self, metric: Metric, values: NDArray[np.float64]) -> None:
        values = values[~np.isnan(values)]  # lists for which it is not defined
        self._sums[metric.name] += float(values.sum())
        self._cases[metric.name] += len(values)

    def values(self) -> dict[str, float]:
        """The metrics over all lists so far.

        Raises:
            DataError: a metric is not defined for any of the lists.
        """
        found = {}
        for metric in self.metrics:
            if metric.family == "Coverage":
                found[metric.name] = float((self._shown[metric.name] > 0).mean())
            elif metric.family == "Gini":
                found[metric.name] = gini(self._shown[metric.name])
            elif self._cases[metric.name] == 0:
                lacking = "two items" if metric.family == "ILD" else "a history"
                raise DataError(f"{metric.name} is not defined: no case has {lacking}")
            else:
                found[metric.name] = self._sums[metric.name] / self._cases[metric.name]
        return found


def _running_mean(values: NDArray[np.float64], lists: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean value of the first 1, 2, ... k items of each list `(B, k)`; NaN where none is filled."""
    if len(values) == 0:  # no metric asks for them
        return np.zeros((0, 0))
    filled = lists >= 0
    with np.errstate(invalid="ignore"):
        return np.where(filled, values[lists], 0.0).cumsum(1) / filled.cumsum(1)


class _Distance:
    """Mean distance within each list `(B, k)`, float64 `(B,)`, NaN below two items; see `Lists` for the kinds.

    Attributes:
        width: how many numbers describe an item while it is compared.
    """

    def __init__(self, catalog: Catalog | None) -> None:
        self._vectors = self._codes = self._label = None
        if catalog is not None and catalog.features:
            self._vectors = next(iter(catalog.features.values()))
            self.width = self._vectors.shape[1]
        elif catalog is not None and catalog.columns("category"):
            self._label = catalog.attribute(catalog.columns("category")[0]).codes[:, 0]
            self.width = 1
        elif catalog is not None and catalog.columns("categories"):
            attribute = catalog.attribute(catalog.columns("categories")[0])
            self._codes, self.width = attribute.codes, len(attribute.labels)
        else:
            raise ConfigError("ILD needs a catalogue with features or a category", hint="give catalog=dataset.catalog")

    def __call__(self, top: NDArray[np.int64]) -> NDArray[np.float64]:
        filled = top >= 0
        count = filled.sum(1)
        if self._label is not None:
            label = np.where(filled, self._label[top], -1 - np.arange(top.shape[1]))  # no two empty places alike
            alike = (label[:, :, None] == label[:, None, :]).sum((1, 2)) - top.shape[1]
        else:
            vectors = self._of(top) * filled[:, :, None]  # (B, k, D)
            norm = np.linalg.norm(vectors, axis=2, keepdims=True)
            unit = vectors / np.where(norm > 0, norm, 1)
            # The cosines of all ordered pairs: the square of the sum, less each with itself.
            alike = (unit.sum(1) ** 2).sum(1) - (unit**2).sum((1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(count > 1, 1 - alike / (count * (count - 1)), np.nan)

    def _of(self, top: NDArray[np.int64]) -> NDArray[np.float64]:
        if self._vectors is not None:
            return np.asarray(self._vectors[top], dtype=np.float64)
        assert self._codes is not None
        codes = self._codes[top]  # (B, k, A), padded with 0
        several_hot = np.zeros((*top.shape, self.width))
        np.put_along_axis(several_hot, codes.astype(np.int64), 1.0, axis=2)
        several_hot[:, :, 0] = codes[:, :, 0] == 0
        return several_hot
