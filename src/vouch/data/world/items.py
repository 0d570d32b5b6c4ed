"""The goods of the world: category, brand, colour, price, style, popularity, and the taste cluster they appeal to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vouch.data.world.config import WorldConfig, stream

STYLE = 16
"""Length of a style vector."""
CLUSTERS_PER_CATEGORY = 2

DOMAINS = ("home", "fashion")
CATEGORIES = ("mug", "lamp", "chair", "plant", "candle", "vase", "shirt", "shoe", "bag", "hat", "watch", "socks")
"""The first half belongs to the home, the second to fashion."""
CONSUMABLE = np.array([False, False, False, True, True, False, False, False, False, False, False, True])
PRICE = np.log(np.array([14, 60, 140, 25, 12, 35, 30, 90, 110, 28, 160, 9], dtype=np.float64))
COLOURS = {
    "coral": (232, 111, 97), "saffron": (240, 178, 60), "olive": (130, 142, 66), "forest": (52, 110, 84),
    "teal": (40, 140, 148), "sky": (112, 172, 216), "navy": (44, 66, 118), "plum": (124, 76, 132),
    "rose": (214, 140, 160), "sand": (206, 184, 148), "charcoal": (72, 76, 84), "ivory": (226, 220, 204),
}  # fmt: skip
BRANDS = (
    ("Alder & Co", "Birkholm", "Cinder", "Dovetail", "Eastlight", "Fjord", "Grange", "Hearth"),
    ("Indigo Lane", "Juniper", "Kestrel", "Linden", "Marlow", "Northgate", "Ostara", "Pell"),
)
MATERIALS = (
    "stoneware",
    "brass",
    "oak",
    "terracotta",
    "beeswax",
    "glass",
    "linen",
    "suede",
    "canvas",
    "felt",
    "steel",
    "merino",
)


@dataclass(frozen=True, eq=False)
class Items:
    """Arrays over the `N` items.

    Attributes:
        domain: int16 `(N,)` into `DOMAINS`: where the item belongs. shared: bool, sold in the other one too.
        category, brand, colour: int16 `(N,)`; brands count within the domain.
        price: float32 `(N,)`.
        style: float32 `(N, STYLE)`.
        cluster: int16 `(N,)` taste cluster; two to a category.
        popularity: float64 `(N,)` sums to one over all items.
        order: int64 `(N,)` items by cluster, in the order in which one leads to the next.
        edges: float64 `(N,)` running sum of `within` over each cluster's part of `order`, up to 1.
        bounds: int64 `(clusters + 1,)` of each cluster in `order`.
        centres: float32 `(clusters, STYLE)`.
    """

    domain: NDArray[np.int16]
    shared: NDArray[np.bool_]
    category: NDArray[np.int16]
    brand: NDArray[np.int16]
    colour: NDArray[np.int16]
    price: NDArray[np.float32]
    style: NDArray[np.float32]
    cluster: NDArray[np.int16]
    popularity: NDArray[np.float64]
    order: NDArray[np.int64]
    edges: NDArray[np.float64]
    bounds: NDArray[np.int64]
    centres: NDArray[np.float32]

    @property
    def n_clusters(self) -> int:
        """Number of taste clusters."""
        return len(self.bounds) - 1

    @property
    def within(self) -> NDArray[np.float64]:
        """float64 `(N,)`: popularity of each item within its cluster."""
        total = np.bincount(self.cluster, weights=self.popularity, minlength=self.n_clusters)
        return self.popularity / total[self.cluster]

    def draw(self, cluster: NDArray[np.int64], chance: NDArray[np.float64]) -> NDArray[np.int64]:
        """Places on the rings of clusters `(n,)`, by popularity: the inverse of its sums at `chance` `(n,)` in [0, 1)."""
        # Sums of all clusters laid end to end: those of cluster c lie in (c, c + 1].
        found = np.searchsorted(self.edges + self.cluster[self.order], cluster + chance, side="right")
        return np.clip(found, self.bounds[cluster], self.bounds[cluster + 1] - 1) - self.bounds[cluster]


def make_items(config: WorldConfig) -> Items:
    """Draw the goods."""
    random, n = stream(config, 1), config.items
    clusters = len(CATEGORIES) * CLUSTERS_PER_CATEGORY
    centres = random.normal(size=(clusters, STYLE)).astype(np.float32)
    cluster = np.concatenate([np.arange(clusters), random.integers(0, clusters, n - clusters)]).astype(np.int16)
    category = (cluster // CLUSTERS_PER_CATEGORY).astype(np.int16)
    domain = (category >= len(CATEGORIES) // 2).astype(np.int16)
    # A cluster favours some brands and colours: that is what makes it a taste.
    brand_taste = random.dirichlet(np.full(len(BRANDS[0]), 0.4), clusters)
    colour_taste = random.dirichlet(np.full(len(COLOURS), 0.5), clusters)
    brand = _draw(brand_taste[cluster], random)
    colour = _draw(colour_taste[cluster], random)
    brand_style = random.normal(size=(len(DOMAINS), len(BRANDS[0]), STYLE)).astype(np.float32)
    style = (
        centres[cluster] + 0.5 * brand_style[domain, brand] + 0.4 * random.normal(size=(n, STYLE)).astype(np.float32)
    )
    price = np.exp(PRICE[category] + 0.12 * (brand - 3.5) + 0.25 * random.normal(size=n)).astype(np.float32).round(2)
    weight = np.arange(1, n + 1, dtype=np.float64) ** -config.popularity_skew
    popularity = random.permutation(weight / weight.sum())
    order = np.lexsort((random.permutation(n), cluster))
    bounds = np.searchsorted(cluster[order], np.arange(clusters + 1))
    share = popularity[order]
    total = np.cumsum(share)
    before = np.concatenate([[0.0], total])[bounds[:-1]]
    sums = np.concatenate([[0.0], total])[bounds[1:]] - before
    edges = (total - before[cluster[order]]) / sums[cluster[order]]
    shared = random.random(n) < config.shared_items
    return Items(
        domain, shared, category, brand, colour, price, style, cluster, popularity, order, edges, bounds, centres
    )


def _draw(probability: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int16]:
    """One index for each row of probabilities `(n, k)`."""
    return (probability.cumsum(1) > random.random((len(probability), 1))).argmax(1).astype(np.int16)
