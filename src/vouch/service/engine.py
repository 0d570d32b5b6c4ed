"""An opened run, ready to answer: recommendations in batches, similar items, reasons, catalogue, run card.

An engine never changes, so that it can be swapped for another at any moment, and several threads may ask it at once.
It reads no database. Weights, vectors, log and features are memory maps of files, which worker processes share.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vouch.data import Queries, Vocabulary
from vouch.data.interactions import Interactions
from vouch.errors import ConfigError, StorageError, UnknownIdError, VouchError, did_you_mean
from vouch.nn.topk import top_k
from vouch.recommenders.base import Recommender
from vouch.recommenders.runs import OpenRun, open_run
from vouch.service import evidence as evidences
from vouch.service.card import run_card
from vouch.service.filters import Filters
from vouch.service.index import ServingIndex, fingerprint_of, keep_vectors, open_index
from vouch.service.scoring import Closed, Scoring, share_weights

IndexKind = Literal["auto", "exact", "hnsw", "ivf"]
WIDEST = 1_000
"""Most items that the index is asked for; beyond that, all items are compared."""

WARM_UP = 16


@dataclass(frozen=True)
class Question:
    """What to recommend to whom.

    Attributes:
        user: where known to the log, methods that have learned of users use it; any other goes by the history.
        history: item ids, oldest first, complete: an engine adds nothing to it. Unknown ones are left out; if none is
            left, popularity answers.
        exclude: item ids never to recommend. allowed: bool `(n_items,)`, the items to choose from; None is all.
        repeat: whether items of the history may be recommended.
    """

    user: str | None = None
    history: Sequence[str] = ()
    k: int = 10
    exclude: Sequence[str] = ()
    allowed: NDArray[np.bool_] | None = None
    repeat: bool = False
    scenario: str | None = None
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Recommended:
    """One item of an answer. `fallback`: popularity answered, as there was nothing to go by."""

    item: str
    score: float
    fallback: bool = False


@dataclass(frozen=True, slots=True)
class Reason:
    """A history item, and how far the standing of the recommendation falls without it, in standard deviations."""

    item: str
    drop: float


class Answer(list[Recommended]):
    """The items for one question, best first.

    Attributes:
        fallback: popularity answered. unknown: items of the history that the model does not know.
    """

    def __init__(self, items: Sequence[Recommended] = (), *, fallback: bool = False, unknown: Sequence[str] = ()):
        super().__init__(items)
        self.fallback, self.unknown = fallback, list(unknown)


class Engine:
    """See the module. Made by `Engine.open`.

    Attributes:
        name: of the run's folder. fingerprint: of model and data; equal ones answer alike.
        model: the recommender. index: the search index, or None where all items are compared.
    """

    def __init__(self, run: OpenRun, scoring: Scoring, index: ServingIndex | None, fingerprint: str) -> None:
        self.run, self.scoring, self.index = run, scoring, index
        self.name, self.fingerprint = run.path.resolve().name, fingerprint
        self.model: Recommender = run.model
        self.log: Interactions = run.dataset.interactions
        self.catalog = run.dataset.catalog
        self.items, self.users = self.log.items, self.log.users
        self.n_items = len(self.items)
        self.filters = Filters(self.catalog)
        self._code = functools.lru_cache(maxsize=1 << 16)(functools.partial(find, self.items))

    @classmethod
    def open(cls, run: Path | str, *, index: IndexKind = "auto", mmap: bool = True) -> Engine:
        """Open a run folder.

        Args:
            index: `exact` compares with all items; `hnsw` and `ivf` search an index (faiss), which is built once and
                kept beside the run; `auto` takes one for large catalogues.
            mmap: map the model's files into memory, read-only, rather than read them.

        Raises:
            VouchError: there is no finished run, it is damaged, its data is gone or was changed, or a newer version
                wrote it.
        """
        if index not in ("auto", "exact", "hnsw", "ivf"):
            raise ConfigError(f"there is no index {index!r}", hint="use auto, exact, hnsw or ivf")
        path = Path(run)
        try:
            opened = open_run(path)
            fingerprint = fingerprint_of(opened)
            model, log = opened.model, opened.dataset.interactions
            if model.items != log.items or model.users != log.users:
                raise StorageError(
                    "the model and the data of the run do not belong together", where=str(path), hint="train again"
                )
            if mmap:
                share_weights(model, path / "model" / "weights.safetensors")
            scoring = Scoring(model, log)
            if mmap and scoring.vectors is not None:
                scoring.vectors = keep_vectors(path, fingerprint, scoring.vectors)
            engine = cls(opened, scoring, open_index(path, fingerprint, scoring, log, index), fingerprint)
            engine.warm_up()
            return engine
        except VouchError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, RuntimeError, EOFError) as error:
            raise StorageError(
                f"the run is damaged: {type(error).__name__}: {error}", where=str(path), hint="train it again"
            ) from error

    def warm_up(self) -> None:
        """Answer a few questions, so that the first one asked is not slow; then give back what opening needed."""
        users = np.flatnonzero(np.diff(self.log.offsets[: WARM_UP + 1]) > 0)
        self.recommend([Question(None, self.history(str(self.users.id(int(user))))) for user in users])
        with contextlib.suppress(OSError, AttributeError):  # only some C libraries have it
            ctypes.CDLL(None).malloc_trim(0)

    # Ids --------------------------------------------------------------------------------------------------------

    def codes(self, items: Sequence[str]) -> NDArray[np.int64]:
        """int64 `(len(items),)` codes, -1 where an item is not known."""
        return np.fromiter(map(self._code, items), dtype=np.int64, count=len(items))

    def knows_user(self, user: str) -> bool:
        """Whether the user is in the run's log."""
        return find(self.users, user) >= 0

    def history(self, user: str) -> list[str]:
        """The items of a user in the run's log, oldest first; none for one it does not know."""
        code = find(self.users, user)
        return [] if code < 0 else [str(item) for item in self.items.ids(self.log.history(code))]

    # Recommending -----------------------------------------------------------------------------------------------

    def check(self, question: Question) -> None:
        """Find what is wrong with a question before it joins others in a batch.

        Raises:
            ConfigError: `k` is below 1, or `allowed` is not one bool an item. UnknownIdError: no such scenario, domain.
        """
        if question.k < 1:
            raise ConfigError(f"k is {question.k}; it must be at least 1")
        mask = question.allowed
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (self.n_items,)):
            raise ConfigError(
                f"allowed is {mask.dtype} of shape {mask.shape}; it must be one bool for each of {self.n_items} items"
            )
        for kind in ("scenario", "domain"):
            name, known = getattr(question, kind), self.log.labels.get(kind, ())
            if name is not None and name not in known:
                hint = did_you_mean(name, known) if known else f"the log has no column {kind}"
                raise UnknownIdError(f"there is no {kind} {name!r}", where=kind, hint=hint)

    def recommend(self, questions: Sequence[Question]) -> list[list[Recommended]]:
        """The best items of each question, as `Answer`s: one pass of the model and one search for all of them.

        Among equal scores the item that comes first in the vocabulary wins. There are fewer than `k` items where no
        more may be recommended.

        Raises:
            ConfigError, UnknownIdError: as `check`, of the first question that has a fault.
        """
        for question in questions:
            self.check(question)
        queries, found = self._resolve(questions)
        answers: list[list[Recommended]] = []
        for first, block in self.scoring.blocks(queries):
            answers += self._answer(questions[first : first + len(block)], block, found[first : first + len(block)])
        return answers

    def _resolve(self, questions: Sequence[Question]) -> tuple[Queries, list[NDArray[np.int64]]]:
        """The questions in codes; and the codes of each history, -1 at unknown items."""
        found = [self.codes(question.history) for question in questions]
        users = [-1 if question.user is None else find(self.users, question.user) for question in questions]
        queries = Queries.from_histories([codes[codes >= 0] for codes in found], user=np.array(users, np.int32))
        labels: dict[str, Any] = {}
        for kind in ("scenario", "domain"):
            names = [getattr(question, kind) for question in questions]
            if any(name is not None for name in names):
                known = list(self.log.labels[kind])
                labels[kind] = np.array([-1 if name is None else known.index(name) for name in names], np.int16)
        return replace(queries, **labels), found

    def _answer(
        self, questions: Sequence[Question], queries: Queries, found: Sequence[NDArray[np.int64]]
    ) -> list[Answer]:
        closed = []
        for row, question in enumerate(questions):
            codes = [] if question.repeat else [queries.history(row).astype(np.int64)]
            if len(question.exclude):
                excluded = self.codes(question.exclude)
                codes.append(excluded[excluded >= 0])
            closed.append(np.concatenate(codes) if codes else np.zeros(0, np.int64))
        allowed = [question.allowed for question in questions]
        k = min(max(question.k for question in questions), self.n_items)
        scores, items = self.search(queries, k, closed, allowed)
        popular = self.scoring.nothing_known(queries)
        answers = []
        for row, question in enumerate(questions):
            fallback = bool(popular[row])
            best = items[row, : question.k]
            names = self.items.ids(best[best >= 0])
            row_scores = scores[row, : len(names)].tolist()
            unknown = [question.history[at] for at in np.flatnonzero(found[row] < 0).tolist()]
            listed = [Recommended(str(name), score, fallback) for name, score in zip(names, row_scores, strict=True)]
            answers.append(Answer(listed, fallback=fallback, unknown=list(dict.fromkeys(unknown))))
        return answers

    def search(
        self,
        queries: Queries,
        k: int,
        closed: list[NDArray[np.int64]],
        allowed: list[NDArray[np.bool_] | None],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and items `(B, k)`, `k` at most the items there are; -inf and -1 where no more may be recommended.

        By the index where there is one and it can find enough, else by comparing with all items.

        Args:
            closed: item codes not to recommend, by row; one may occur twice. allowed: bool `(n_items,)` of each row, or None.
        """
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        items = np.full((len(queries), k), -1, dtype=np.int64)
        left = np.arange(len(queries))
        if self.index is not None and k < WIDEST:
            # Ask for as many more as exclusions and filters may take away; who comes out short is asked exactly.
            shares = {id(mask): max(float(mask.mean()), 1e-9) for mask in allowed if mask is not None}
            share = np.array([1.0 if mask is None else shares[id(mask)] for mask in allowed])
            taken = np.array([len(codes) for codes in closed])
            need = np.where(share < 1, 1.5 * k / share + 16, k) + taken
            by_index = np.flatnonzero(~self.scoring.nothing_known(queries) & (need <= WIDEST))
            if len(by_index):
                part = take(queries, by_index)
                more, those = self.index.best(self.scoring, part, int(need[by_index].max()))
                shut = Closed.of([closed[row] for row in by_index], [allowed[row] for row in by_index])
                value, item = shut.keep_open(more, those, k)
                full = item[:, -1] >= 0
                done = by_index[full]
                scores[done], items[done] = value[full], item[full]
                left = np.setdiff1d(left, done)
        if len(left):
            part = queries if len(left) == len(queries) else take(queries, left)
            shut = Closed.of([closed[row] for row in left], [allowed[row] for row in left])
            value_t, item_t = self.scoring.best(part, k, shut)
            scores[left, : value_t.shape[1]], items[left, : item_t.shape[1]] = value_t.numpy(), item_t.numpy()
        return scores, items

    # Similar items, reasons, evidence -------------------------------------------------------------------------------

    def similar(self, item: str, k: int, allowed: NDArray[np.bool_] | None = None) -> list[Recommended]:
        """The items most like one, best first.

        Raises:
            UnknownIdError: the item is not known.
            ConfigError: the method has no notion of similar items, or `k` is below 1.
        """
        self.check(Question(k=k, allowed=allowed))
        code = self.items.code(item, kind="item")
        values = self.scoring.similarities(code)
        if values is None:
            hint = "itemknn, ease and methods with item vectors have"
            raise ConfigError(f"{self.model.card.name} has no item-to-item similarity", hint=hint)
        Closed.of([np.array([code])], [allowed]).close(values, 0)
        best, index = top_k(values, min(k, self.n_items))
        keep = ~torch.isneginf(best[0])
        names = self.items.ids(index[0][keep].numpy())
        return [Recommended(str(name), score) for name, score in zip(names, best[0][keep].tolist(), strict=True)]

    def explain(self, history: Sequence[str], item: str, user: str | None = None, n: int = 3) -> list[Reason]:
        """The history items whose removal lowers the standing of an item most, strongest first.

        Raises:
            UnknownIdError: the item is not known.
        """
        return self.explain_all(history, [item], user, n)[0]

    def explain_all(
        self, history: Sequence[str], items: Sequence[str], user: str | None = None, n: int = 3
    ) -> list[list[Reason]]:
        """`explain` for several items recommended to one history, for the price of one.

        Raises:
            UnknownIdError: an item is not known.
        """
        wanted = self.items.codes(items, kind="item")
        queries, _ = self._resolve([Question(user=user, history=history)])
        found = evidences.reasons(self.scoring, queries, wanted, most=n)
        return [[Reason(str(self.items.id(code)), drop) for code, drop in each] for each in found]

    def evidence(self, history: Sequence[str], item: str, user: str | None = None) -> dict[str, Any] | None:
        """What the method itself offers as evidence, in plain JSON: `{"kind", "about", "weights": [{"item", "weight"}]}`.

        Attention weights or the routing of interests where it has them, similarities to the history where it is a
        neighbourhood method; None otherwise.

        Raises:
            UnknownIdError: the item is not known.
        """
        code = self.items.code(item, kind="item")
        queries, _ = self._resolve([Question(user=user, history=history)])
        if queries.lengths[0] == 0:
            return None
        with self.scoring.turn:
            found = evidences.evidence(self.model, queries, code)
        if found is None:
            return None
        kind, about, weights = found
        named = [{"item": str(self.items.id(int(code))), "weight": weight} for code, weight in weights]
        return {"kind": kind, "about": about, "weights": named}

    # Catalogue and card -----------------------------------------------------------------------------------------

    def mask(self, filters: Sequence[Any]) -> NDArray[np.bool_]:
        """bool `(n_items,)`, not to be written to: the items that fulfil every filter; see `Filters`.

        Raises:
            UnknownIdError: the catalogue has no such attribute.
            ConfigError: a bound is put on what is no number.
        """
        return self.filters.mask(filters)

    def item(self, item: str) -> dict[str, Any]:
        """`title`, `attributes` (plain JSON) and `picture` (a path of a file that exists, or None).

        Raises:
            UnknownIdError: the item is not known.
        """
        return self.filters.describe(self.items.code(item, kind="item"))

    def card(self) -> dict[str, Any]:
        """The run card, in plain JSON; see `run_card`."""
        return run_card(self.run, self.fingerprint, self.index)


def find(vocabulary: Vocabulary, id: str) -> int:
    """The code of an id, or -1; also for texts that are none (half a surrogate pair)."""
    try:
        return vocabulary.get(id)
    except UnicodeEncodeError:
        return -1


def take(queries: Queries, rows: NDArray[np.int64]) -> Queries:
    """Some queries of a batch."""
    chosen = Queries.from_histories([queries.history(int(row)) for row in rows], user=queries.user[rows])
    scenario, domain = (None if label is None else label[rows] for label in (queries.scenario, queries.domain))
    return replace(chosen, scenario=scenario, domain=domain)


__all__ = ["Answer", "Engine", "Question", "Reason", "Recommended"]
