"""The service without HTTP: questions in, answers out, over a model and a catalogue that may change at any moment.

What is served (`Served`: an engine and its shelf) is one immutable object behind one name. A swap binds the name anew:
requests under way finish with what they began with, the next ones find the new one, and none is dropped.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vouch.errors import ConfigError, StorageError, UnknownIdError, VouchError
from vouch.service import schemas
from vouch.service.batching import Batcher, Busy
from vouch.service.config import ServiceConfig
from vouch.service.contract import Answers
from vouch.service.logs import log
from vouch.service.metrics import Metrics
from vouch.service.shelf import Shelf
from vouch.service.storage import Store, Unavailable

if TYPE_CHECKING:
    from vouch.service.engine import Question, Recommended

T = TypeVar("T")
Open = Callable[[Path], Answers]
ACTIVE = "active"
WITHOUT_EVENTS = "the database is not at hand: stored events and dislikes are not taken into account"
NOTHING_KNOWN = "there was no history to go by: these are popular items"
NOTHING_TO_REST_ON = "there is no history that the recommendation could rest on"
FEWER = "these are fewer items than asked for: no others pass the filters and exclusions"


@dataclass(frozen=True)
class Served:
    """A model and the catalogue as it is now; `swap` is the mark of the swap that brought it, if one did."""

    engine: Answers
    shelf: Shelf
    path: Path
    swap: str | None = None

    @property
    def model(self) -> schemas.ModelInfo:
        """Which model this is."""
        return schemas.ModelInfo(name=self.engine.name, fingerprint=self.engine.fingerprint)


@dataclass(frozen=True)
class Past:
    """What a recommendation goes by: a history, items to hide, and whether the database could be asked."""

    history: list[str]
    hidden: list[str]
    complete: bool = True


@dataclass(frozen=True)
class Done:
    """An answer, and what it was found with: its reasons must come from the same."""

    answer: schemas.RecommendAnswer
    served: Served
    past: Past


class Serving:
    """Answers requests for one process.

    Args:
        open_engine: opens a run folder. base: the run named at the start.
    """

    def __init__(self, config: ServiceConfig, store: Store, metrics: Metrics, open_engine: Open) -> None:
        self.config, self.store, self.metrics, self._open = config, store, metrics, open_engine
        self.base = config.run.resolve()
        self._changing = threading.Lock()
        self._refused: str | None = None
        self._database_rests_until = 0.0
        self.served = self._first()
        self._batcher: Batcher[schemas.RecommendRequest, Done | VouchError] = Batcher(
            self._answer_all, name="vouch-model", most=config.max_batch, waiting=config.max_waiting
        )
        # Reasons and similar items cost many passes: they queue apart, so that plain recommendations do not wait.
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="vouch-slow")
        self._slow_waiting = 0

    def close(self) -> None:
        """Answer what was accepted, then stop."""
        self._batcher.close()
        self._slow.shutdown()

    @property
    def waiting(self) -> int:
        """Requests that wait for the model."""
        return self._batcher.waiting + self._slow_waiting

    # Questions ------------------------------------------------------------------------------------------------------

    async def recommend(self, request: schemas.RecommendRequest) -> schemas.RecommendAnswer:
        """The best items for a user or a history."""
        done = await self._within(self._batcher.submit(request))
        if isinstance(done, VouchError):
            raise done
        if done.answer.fallback:
            self.metrics.fallbacks.inc()
        elif request.reasons and done.answer.recommendations:
            return await self._later(self._with_reasons, request, done)
        return done.answer

    async def similar(self, request: schemas.SimilarRequest) -> schemas.SimilarAnswer:
        """Items like an item."""
        return await self._later(self._similar, request)

    async def explain(self, request: schemas.ExplainRequest) -> schemas.ExplainAnswer:
        """What the recommendation of an item rests on."""
        return await self._later(self._explain, request)

    async def _within(self, future: Future[T]) -> T:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.config.answer_seconds)
        except TimeoutError:
            self.metrics.refused.labels("timeout").inc()
            raise Busy(
                f"no answer within {self.config.answer_seconds:g} seconds", hint="ask again in a moment, or for less"
            ) from None

    async def _later(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._slow_waiting >= self.config.max_waiting:
            raise Busy("too many requests are waiting", hint="ask again in a moment")
        self._slow_waiting += 1
        try:
            return await self._within(self._slow.submit(work, *arguments))
        finally:
            self._slow_waiting -= 1

    def _answer_all(self, requests: Sequence[schemas.RecommendRequest]) -> list[Done | VouchError]:
        """Answer a batch; a request at fault gets its error, the others their answers."""
        served = self.served
        self.metrics.batches.observe(len(requests))
        pasts = self._pasts(served, requests)
        asked = [_question(served, request, past) for request, past in zip(requests, pasts, strict=True)]
        good = [question for question in asked if not isinstance(question, VouchError)]
        found = iter(served.engine.recommend(good) if good else [])
        return [
            question
            if isinstance(question, VouchError)
            else Done(_answer(served, request, past, next(found)), served, past)
            for question, request, past in zip(asked, requests, pasts, strict=True)
        ]

    def _pasts(self, served: Served, requests: Sequence[schemas.Whose]) -> list[Past]:
        """The histories of a batch: one look into the database for all of them."""
        users = [request.user for request in requests if request.user is not None]
        complete = True
        events: dict[str, list[str]] = {}
        hidden: dict[str, list[str]] = {}
        if users:
            try:
                events, hidden = self._stored(users)
            except Unavailable:
                complete = False
        pasts = []
        for request in requests:
            user = request.user
            if request.history is not None:
                history = request.history
            else:
                assert user is not None  # the schema sees to it
                history = served.engine.history(user) + events.get(user, [])
            pasts.append(Past(history, hidden.get(user, []) if user else [], complete or user is None))
        return pasts

    def _stored(self, users: list[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Events and dislikes. A database that was gone is not asked again at once: each try might take seconds, and
        everyone would wait for it.
        """
        if time.monotonic() < self._database_rests_until:
            raise Unavailable("the database cannot be reached")
        try:
            return self.store.past(users)
        except Unavailable:
            self._database_rests_until = time.monotonic() + self.config.poll_seconds
            raise

    def _with_reasons(self, request: schemas.RecommendRequest, done: Done) -> schemas.RecommendAnswer:
        listed = done.answer.recommendations
        items = [each.item for each in listed[: schemas.MAX_REASONED]]
        reasons = self._reasons(done.served, done.past.history, items, request.user, request.reasons)
        named = [each.model_copy(update={"reasons": found}) for each, found in zip(listed, reasons, strict=False)]
        return done.answer.model_copy(update={"recommendations": named + listed[len(named) :]})

    def _reasons(
        self, served: Served, history: list[str], items: list[str], user: str | None, n: int
    ) -> list[list[schemas.Reason]]:
        def shown(item: str, drop: float) -> schemas.Reason:
            return schemas.Reason(item=item, title=served.shelf.item(item).title, drop=drop)

        found = served.engine.explain_all(history, items, user, n)
        return [[shown(each.item, each.drop) for each in reasons] for reasons in found]

    def _similar(self, request: schemas.SimilarRequest) -> schemas.SimilarAnswer:
        served = self.served
        self._check_item(served, request.item)
        found = served.engine.similar(request.item, request.k, _allowed(served, request.filters))
        return schemas.SimilarAnswer(
            item=served.shelf.item(request.item), similar=_shown(served, found), model=served.model
        )

    def _explain(self, request: schemas.ExplainRequest) -> schemas.ExplainAnswer:
        served = self.served
        self._check_item(served, request.item)
        (past,) = self._pasts(served, [request])
        return schemas.ExplainAnswer(
            item=served.shelf.item(request.item),
            reasons=self._reasons(served, past.history, [request.item], request.user, request.n)[0],
            evidence=served.engine.evidence(past.history, request.item, request.user),
            unknown=unknown_items(served.engine, past.history) if request.history is not None else [],
            notes=[
                *([] if past.complete else [WITHOUT_EVENTS]),
                *([] if (served.engine.codes(past.history) >= 0).any() else [NOTHING_TO_REST_ON]),
            ],
            model=served.model,
        )

    def _check_item(self, served: Served, item: str) -> None:
        if not served.shelf.present(item):
            raise UnknownIdError("there is no such item", where="body.item")
        if not served.shelf.recommendable(item):
            raise ConfigError(
                "the item was added after the model was trained", where="body.item", hint="train again to include it"
            )

    # Catalogue ------------------------------------------------------------------------------------------------------

    def refresh_catalog(self) -> None:
        """Lay changes made since, by whichever worker, over the catalogue."""
        with self._changing:
            served = self.served
            version, changed = self.store.catalog_since(served.shelf.version)
            if version != served.shelf.version:
                self.served = replace(served, shelf=served.shelf.with_changes(version, changed))

    # Models ---------------------------------------------------------------------------------------------------------

    def swap(self, name: str) -> tuple[schemas.ModelInfo, schemas.ModelInfo]:
        """Serve the run of that name beside the one named at the start; the model served now, and the one before.

        The other workers follow when they see it in the database, and so does a service that is started again.

        Raises:
            ConfigError: there is no such run, or it cannot be served; the old one stays.
        """
        path, mark = self.base.parent / name, secrets.token_hex(8)
        with self._changing:
            before = self.served
            try:
                after = self._load(path, mark)
            except VouchError as error:
                self.metrics.swaps.labels("refused").inc()
                raise ConfigError(
                    f"the run {name!r} cannot be served: {error.what}", where="body.run", hint=error.hint
                ) from None
            self.store.put_setting(ACTIVE, {"base": str(self.base), "run": str(path), "swap": mark})
            self.served = after
        self.metrics.swaps.labels("done").inc()
        log.info("swapped", extra={"facts": {"model": after.model.fingerprint}})
        return after.model, before.model

    def follow(self) -> None:
        """Serve the run that another worker was told to serve. One that cannot be opened is left alone."""
        path, mark = self._wanted()
        if mark is None or mark in (self.served.swap, self._refused):
            return
        with self._changing:
            self.served = self._load_or_stay(path, mark) or self.served

    def _first(self) -> Served:
        """The run swapped to last, if it was in place of the one named at the start; else that one."""
        active = self.store.setting(ACTIVE)
        if active is not None and active["base"] != str(self.base):  # another run was named: that ends the swap
            self.store.put_setting(ACTIVE, {"base": str(self.base), "run": str(self.base), "swap": None})
        path, mark = self._wanted()
        return (self._load_or_stay(path, mark) if mark is not None else None) or self._load(self.base)

    def _wanted(self) -> tuple[Path, str | None]:
        """The run to serve, and the mark of the swap to it, if there was one."""
        active = self.store.setting(ACTIVE)
        if active is None or active["base"] != str(self.base):
            return self.base, None
        return Path(active["run"]), active["swap"]

    def _load_or_stay(self, path: Path, mark: str) -> Served | None:
        try:
            found = self._load(path, mark)
        except VouchError:
            self._refused = mark
            self.metrics.swaps.labels("refused").inc()
            log.error("cannot open the run swapped to", extra={"facts": {"run": path.name}})
            return None
        self.metrics.swaps.labels("done").inc()
        return found

    def _load(self, path: Path, mark: str | None = None) -> Served:
        if not _is_folder(path):
            raise StorageError(f"there is no run {path.name!r}", hint="vouch train METHOD --data SOURCE --out RUN")
        engine = self._open(path)
        version, changed = self.store.catalog_since(0)
        return Served(engine, Shelf(engine, version, {change.item: change for change in changed}), path, mark)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than the system takes
        return False


def unknown_items(engine: Answers, items: Sequence[str]) -> list[str]:
    """Those of some items that the model does not know, each once."""
    distinct = list(dict.fromkeys(items))
    return [item for item, code in zip(distinct, engine.codes(distinct), strict=True) if code < 0]


def _allowed(served: Served, filters: Sequence[schemas.Filter]) -> NDArray[np.bool_] | None:
    try:
        return served.shelf.allowed(filters)
    except VouchError as error:
        raise ConfigError(error.what, where="body.filters", hint=error.hint) from None


def _question(served: Served, request: schemas.RecommendRequest, past: Past) -> Question | VouchError:
    """The question for the engine, or what is wrong with the request."""
    from vouch.service.engine import Question

    try:
        question = Question(
            user=request.user,
            history=past.history,
            k=request.k,
            exclude=[*request.exclude, *past.hidden],
            allowed=_allowed(served, request.filters),
            repeat=request.repeat,
            scenario=request.scenario,
            domain=request.domain,
        )
        served.engine.check(question)
    except VouchError as error:
        where = f"body.{error.where}" if error.where and not error.where.startswith("body") else error.where or "body"
        return ConfigError(error.what, where=where, hint=error.hint)
    return question


def _answer(
    served: Served, request: schemas.RecommendRequest, past: Past, found: Sequence[Recommended]
) -> schemas.RecommendAnswer:
    fallback = any(each.fallback for each in found)
    notes = [
        note
        for said, note in (
            (not past.complete, WITHOUT_EVENTS),
            (fallback, NOTHING_KNOWN),
            (len(found) < request.k, FEWER),
        )
        if said
    ]
    return schemas.RecommendAnswer(
        recommendations=_shown(served, found),
        fallback=fallback,
        unknown=unknown_items(served.engine, past.history) if request.history is not None else [],
        notes=notes,
        model=served.model,
    )


def _shown(served: Served, found: Sequence[Recommended]) -> list[schemas.Recommendation]:
    shown = []
    for each in found:
        item = served.shelf.item(each.item)
        shown.append(
            schemas.Recommendation(
                item=each.item, score=each.score, title=item.title, attributes=item.attributes, picture=item.picture
            )
        )
    return shown
