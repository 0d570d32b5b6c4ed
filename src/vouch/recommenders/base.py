"""The contract of a recommender: `fit`, `score`, `recommend`, `similar`, `save`, `load`."""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch import registry
from vouch.config import Config as BaseConfig
from vouch.data import Cases, Interactions, Queries, Query, Split, Vocabulary
from vouch.errors import ConfigError, DataError, StorageError
from vouch.files import atomic_directory, read_json, write_json
from vouch.nn.topk import top_k
from vouch.registry import Card
from vouch.training.run import FitReport, Run

FORMAT = 1
Exclude = Literal["history", "none"]
BLOCK_CELLS = 1 << 25
"""Scores held at once when recommending: 128 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """The best items of each query, best first.

    Attributes:
        item: int64 `(B, k)` item codes; -1 where fewer than `k` items could be recommended.
        score: float32 `(B, k)`; -inf where `item` is -1.
        fallback: bool `(B,)`, true where the query had no history and popularity answered.
    """

    item: NDArray[np.int64]
    score: NDArray[np.float32]
    fallback: NDArray[np.bool_]


class Recommender(ABC):
    """Base of every recommender. A method defines `Config`, `fit`, `score` and its `state`.

    After `fit` (or `load`) these are set:
        config: the method's settings.
        items, users: the vocabularies that codes refer to.
        popularity: float32 `(n_items,)` training counts, the answer to a query without history.
    """

    card: ClassVar[Card]
    Config: ClassVar[type[BaseConfig]]

    def __init__(self, config: BaseConfig | None = None, **settings: Any) -> None:
        """Take a config, or its settings by name: `SASRec(epochs=20)`."""
        if config is not None and settings:
            raise ConfigError("give a config or settings, not both")
        self.config: Any = config if config is not None else self.Config(**settings)
        self.items: Vocabulary | None = None
        self.users: Vocabulary | None = None
        self.popularity: NDArray[np.float32] | None = None

    # What a method defines ------------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Train on `split.train`, watching `split.valid`; begins with `self.prepare(split.train)`.

        Raises:
            DataError: the log lacks what the method needs.
            TrainingError: the loss stopped being a number.
        """

    @abstractmethod
    def score(self, queries: Queries) -> Tensor:
        """Scores float32 `(B, n_items)` of every item for each query; higher is better, never NaN."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that was learned, as named tensors."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave. `self.items` and `self.users` are set before it is called."""

    # What a method may add ------------------------------------------------------------------------------------

    def query_vectors(self, queries: Queries) -> Tensor | None:
        """`(B, D)` or `(B, K, D)` vectors whose products with `item_vectors` rank items, or None."""
        del queries
        return None

    def item_vectors(self) -> Tensor | None:
        """`(n_items, D)` vectors, or None if the method does not factorise."""
        return None

    def measure(self, cases: Cases) -> dict[str, float]:
        """Metrics of its own besides those of rankings, by name: none, unless the method predicts more than rankings."""
        del cases
        return {}

    def similarities(self, items: NDArray[np.int64]) -> Tensor | None:
        """`(len(items), n_items)` similarity of each item to every other, or None; cosine of `item_vectors` if any."""
        vectors = self.item_vectors()
        if vectors is None:
            return None
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        return unit[torch.as_tensor(items)] @ unit.T

    # What every recommender does ------------------------------------------------------------------------------

    @property
    def n_items(self) -> int:
        """Number of items that can be scored."""
        return len(self._fitted().items or ())

    @property
    def n_parameters(self) -> int:
        """Number of learned values."""
        return sum(tensor.numel() for tensor in self.state().values())

    def prepare(self, train: Interactions) -> None:
        """Remember the vocabularies and the popularity of the training log.

        Raises:
            DataError: the log has fewer than two items.
        """
        if train.n_items < 2:
            raise DataError("a recommender needs at least two items", hint="check the item column")
        self.items, self.users = train.items, train.users
        self.popularity = train.item_counts.astype(np.float32)

    def recommend(
        self,
        queries: Queries | Iterable[Query],
        k: int = 10,
        *,
        exclude: Exclude = "history",
        candidates: NDArray[Any] | None = None,
        log: Interactions | None = None,
    ) -> Ranking:
        """The `k` best items of each query; ties go to the smaller item code.

        Args:
            queries: a batch in codes, or questions in original ids.
            exclude: `history` never recommends what the query's history holds; `none` may.
            candidates: item codes to choose from; all items by default.
            log: where the histories of users named by id are looked up.

        Raises:
            ConfigError: `k` is below 1, or a candidate is not an item code.
            UnknownIdError: a user or item is not known.
        """
        self._fitted()
        assert self.items is not None and self.users is not None
        if k < 1:
            raise ConfigError(f"k is {k}; it must be at least 1")
        if exclude not in ("history", "none"):
            raise ConfigError(f"exclude is {exclude!r}; it must be 'history' or 'none'")
        if not isinstance(queries, Queries):
            queries = Queries.resolve(queries, users=self.users, items=self.items, log=log)
        n_items = self.n_items
        closed = None
        if candidates is not None:
            chosen = np.asarray(candidates, dtype=np.int64)
            if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= n_items:
                raise ConfigError(f"candidates must be item codes between 0 and {n_items - 1}, at least one")
            closed = torch.ones(n_items, dtype=torch.bool)
            closed[torch.as_tensor(chosen)] = False
        width = min(k, n_items)
        item = np.full((len(queries), k), -1, dtype=np.int64)
        score = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for start, block in queries.blocks(max(1, BLOCK_CELLS // n_items)):
            values = self.score_or_popularity(block)
            if exclude == "history":
                row = np.repeat(np.arange(len(block)), block.lengths)
                values[torch.as_tensor(row), torch.as_tensor(block.item.astype(np.int64))] = -torch.inf
            if closed is not None:
                values[:, closed.to(values.device)] = -torch.inf
            best, index = top_k(values, width)
            rows = slice(start, start + len(block))
            score[rows, :width] = best.float().cpu().numpy()
            item[rows, :width] = index.cpu().numpy()
        item[np.isneginf(score)] = -1
        return Ranking(item, score, queries.lengths == 0)

    def score_or_popularity(self, queries: Queries) -> Tensor:
        """`score`, with training popularity for queries that have neither a history nor a known user."""
        self._fitted()
        values = self.score(queries).float().clone()
        if torch.isnan(values).any():
            raise DataError(f"{self.card.slug} gave a score that is not a number", hint="train it again")
        empty = torch.as_tensor((queries.lengths == 0) & (queries.user < 0))
        if empty.any():
            assert self.popularity is not None
            values[empty.to(values.device)] = torch.from_numpy(self.popularity).to(values)
        return values

    def similar(self, item: Any, k: int = 10) -> list[tuple[Any, float]]:
        """The `k` items most similar to one, in original ids with similarities, best first.

        Raises:
            UnknownIdError: the item is not known.
            ConfigError: the method has no notion of similar items.
        """
        self._fitted()
        assert self.items is not None
        code = self.items.code(item, kind="item")
        values = self.similarities(np.array([code]))
        if values is None:
            raise ConfigError(f"{self.card.name} has no item-to-item similarity", hint="itemknn and ease have")
        row = values.float().clone()
        row[0, code] = -torch.inf
        best, index = top_k(row, min(k, self.n_items - 1))
        return [(self.items.id(int(i)), float(v)) for i, v in zip(index[0], best[0], strict=True)]

    def save(self, path: Path | str) -> None:
        """Write as a folder (`recommender.json`, `weights.safetensors`, vocabularies), atomically; no pickle."""
        from safetensors.torch import save_file

        self._fitted()
        assert self.items is not None and self.users is not None and self.popularity is not None
        with atomic_directory(path) as aside:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state().items()}
            save_file(tensors, aside / "weights.safetensors")
            np.save(aside / "popularity.npy", self.popularity)
            self.items.save(aside / "items")
            self.users.save(aside / "users")
            header = {"format": FORMAT, "method": self.card.slug, "module": type(self).__module__}
            write_json(aside / "recommender.json", {**header, "config": self.config.model_dump(mode="json")})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a saved recommender.

        Raises:
            StorageError: the folder is damaged, or holds another method or a newer format.
        """
        loaded = load(path)
        if not isinstance(loaded, cls):
            raise StorageError(f"the folder holds {loaded.card.slug!r}, not {cls.__name__}", where=str(path))
        return loaded

    def _fitted(self) -> Self:
        if self.items is None:
            raise ConfigError(f"{self.card.slug} is not trained yet", hint="call fit first, or load a saved one")
        return self


def load(path: Path | str) -> Any:
    """Read any saved recommender.

    Raises:
        StorageError: there is none, it is damaged, or it was written by a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not (path / "recommender.json").exists():
        raise StorageError(f"there is no trained model in {path.name!r}", where=str(path), hint="vouch train makes one")
    header = read_json(path / "recommender.json")
    if header.get("format", 0) > FORMAT:
        raise StorageError(
            f"the model was written in format {header['format']}; this version reads up to {FORMAT}",
            where=str(path),
            hint="upgrade vouch, or train again",
        )
    module = str(header.get("module", ""))
    if module.startswith("vouch."):  # spares the import of all other methods
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    kind = registry.method(header["method"])
    model = kind(kind.Config(**header["config"]))
    try:
        model.items, model.users = Vocabulary.open(path / "items"), Vocabulary.open(path / "users")
        model.popularity = np.load(path / "popularity.npy", allow_pickle=False)
        model.load_state(load_file(path / "weights.safetensors"))
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise StorageError(f"the model is damaged: {error}", where=str(path), hint="train it again") from error
    return model
