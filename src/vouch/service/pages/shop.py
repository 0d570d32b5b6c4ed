"""The shop window: a history, what is recommended for it and why, and what feedback changes.

A history that is clicked together lies in the address: every click is a plain link, the back button works, and nothing
is stored. Acting as a user goes by a cookie, so that no user id gets into the logs of proxies; feedback is then stored,
as `/v1/feedback` would.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self
from urllib.parse import quote, unquote, urlencode
from uuid import uuid4

from fastapi import Request
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from vouch.errors import ConfigError, UnknownIdError
from vouch.service import schemas
from vouch.service.pages.goods import FOUND, Good, facts, good, goods, reasons, search
from vouch.service.pages.words import brief
from vouch.service.serving import Serving
from vouch.service.storage import Store

SHOPPER = "vouch_shopper"
"""The cookie that holds whom one acts as."""
MOST_CLICKED = 30
SHOWN = 12
SHOWN_HISTORY = 12
SHOWN_WEIGHTS = 6
REASONS = 2
REASONS_WHY = 5

_one_id: TypeAdapter[str] = TypeAdapter(schemas.Id)
Ids = Annotated[list[schemas.Id], Field(max_length=100)]


class Window(BaseModel):
    """What the address of the shop window may say; `with` are the items clicked, `without` those turned down."""

    clicked: Annotated[list[schemas.Id], Field(alias="with", max_length=MOST_CLICKED)] = []
    without: Ids = []
    label: Annotated[str, Field(max_length=schemas.MAX_TEXT)] = ""
    below: Annotated[str, Field(max_length=32)] = ""
    q: Annotated[str, Field(max_length=200)] = ""
    seen: Ids = []
    """Items shown before, so that new ones can be marked."""


class Shopper(BaseModel):
    """Whom to act as."""

    user: schemas.Id


class Opinion(BaseModel):
    """Feedback from a card."""

    item: schemas.Id
    kind: schemas.FeedbackKind
    seen: list[str] = []


@dataclass(frozen=True)
class State:
    """Where the visitor is: a user, or a history of items clicked together; and what to choose from."""

    user: str | None = None
    clicked: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    label: str = ""
    below: float | None = None

    @classmethod
    def of(cls, window: Window, user: str | None) -> Self:
        """The state that an address tells.

        Raises:
            ConfigError: the price is no number.
        """
        try:
            below = float(window.below) if window.below.strip() else None
            if below is not None and not abs(below) < 1e300:
                raise ValueError
        except ValueError:
            raise ConfigError(f"the price {window.below!r} is no number", hint="for example 50") from None
        if user is not None:
            return cls(user=user, label=window.label, below=below)
        return cls(None, tuple(window.clicked), tuple(window.without), window.label, below)

    @property
    def base(self) -> str:
        """The path without what follows it."""
        return "/shop" if self.user is None else "/shop/user"

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The state as fields of an address."""
        pairs = [("with", item) for item in self.clicked] + [("without", item) for item in self.without]
        pairs += [("label", self.label)] if self.label else []
        return pairs + ([("below", f"{self.below:g}")] if self.below is not None else [])

    def url(self, path: str = "", **more: str) -> str:
        """The address of this state."""
        pairs = [*self.fields, *more.items()]
        return self.base + path + (f"?{urlencode(pairs)}" if pairs else "")

    def plus(self, item: str) -> str:
        """The address after a click on an item."""
        return replace(self, clicked=(*self.clicked, item)[-MOST_CLICKED:]).url()

    def minus(self, place: int) -> str:
        """The address without the item at a place of the history."""
        return replace(self, clicked=self.clicked[:place] + self.clicked[place + 1 :]).url()

    def hide(self, item: str) -> str:
        """The address after an item was turned down."""
        return replace(self, without=tuple(dict.fromkeys((*self.without, item)))[-100:]).url()

    def unhide(self, item: str) -> str:
        """The address after an item was let in again."""
        return replace(self, without=tuple(each for each in self.without if each != item)).url()

    def why(self, item: str) -> str:
        """The address of the reasons of a recommendation."""
        return self.url("/why", item=item)

    def filters(self, attribute: str, priced: str) -> list[schemas.Filter]:
        """The conditions chosen, as the API has them."""
        chosen: list[dict[str, Any]] = []
        if self.label and attribute:
            chosen.append({"attribute": attribute, "equals": self.label})
        if self.below is not None and priced:
            chosen.append({"attribute": priced, "max": self.below})
        return [schemas.Filter(**each) for each in chosen]


@dataclass(frozen=True)
class Shown:
    """All that the shop window shows."""

    state: State
    known: bool
    history: list[Good]
    history_length: int
    hidden: list[Good]
    found: list[Good]
    words: str
    cards: list[Good]
    fallback: bool
    notes: list[str]
    users: list[tuple[str, int]]
    labels: list[str]
    attribute: str
    priced: str
    news: str


def shopper(request: Request) -> str | None:
    """Whom the visitor acts as."""
    try:
        return _one_id.validate_python(unquote(request.cookies.get(SHOPPER, ""), errors="strict"))
    except (ValidationError, UnicodeDecodeError):
        return None


def cookie(user: str) -> str:
    """The cookie's value."""
    return quote(user, safe="")


async def show(serving: Serving, store: Store, window: Window, user: str | None, cause: str = "") -> Shown:
    """Ask for recommendations and put everything together.

    Args:
        cause: what the visitor just did, for the notice.
    """
    state = State.of(window, user)
    served = serving.served
    about = await run_in_threadpool(facts, served.engine)
    whose = {"history": list(state.clicked)} if state.user is None else {"user": state.user}
    answer = await serving.recommend(
        schemas.RecommendRequest(
            **whose,
            k=SHOWN,
            exclude=list(state.without),
            filters=state.filters(about.attribute, about.priced),
            reasons=REASONS,
        )
    )
    known, items, hidden = True, list(state.clicked), list(state.without)
    if state.user is not None:
        past, hides = await run_in_threadpool(store.past, [state.user])
        items, hidden = served.engine.history(state.user) + past[state.user], hides[state.user]
        known = bool(past[state.user]) or served.engine.knows_user(state.user)
    latest = items[-SHOWN_HISTORY:] if state.user is not None else items
    found = await run_in_threadpool(search, served, window.q)
    before = set(window.seen)
    cards = [
        good(served, each, because=each.reasons, new=bool(before) and each.item not in before)
        for each in answer.recommendations
    ]
    return Shown(
        state=state,
        known=known,
        history=goods(served, latest),
        history_length=len(items),
        hidden=goods(served, hidden[-SHOWN_HISTORY:]),
        found=goods(served, found[:FOUND]),
        words=window.q.strip(),
        cards=cards,
        fallback=answer.fallback,
        notes=[note for note in answer.notes if not answer.fallback or "popular" not in note],
        users=about.users,
        labels=about.labels,
        attribute=about.attribute,
        priced=about.priced,
        news=_news(cards, bool(before), cause),
    )


def _news(cards: list[Good], compared: bool, cause: str) -> str:
    """What changed, in words: for screen readers, and for all who look."""
    text = f"{len(cards)} recommendation{'' if len(cards) == 1 else 's'}"
    if compared:
        new = sum(card.new for card in cards)
        text += f", {new} of them new" if new else ", none of them new"
    return f"{cause} {text}." if cause else f"{text}."


async def tell(serving: Serving, store: Store, user: str, opinion: Opinion) -> str:
    """Store feedback; what was done, in words.

    Raises:
        UnknownIdError: there is no such item.
    """
    shelf = serving.served.shelf
    if not shelf.present(opinion.item):
        raise UnknownIdError("there is no such item")
    sent = schemas.FeedbackRequest(id=str(uuid4()), user=user, item=opinion.item, kind=opinion.kind)
    await asyncio.wrap_future(store.submit_feedback(sent.model_dump()))
    title = brief(shelf.item(opinion.item).title)
    return f"You liked {title}." if opinion.kind == "like" else f"{title} is hidden from now on."


async def why(serving: Serving, window: Window, user: str | None, item: str) -> dict[str, Any]:
    """What a recommendation rests on: by taking history items away, and what the method itself says."""
    state = State.of(window, user)
    whose = {"history": list(state.clicked)} if state.user is None else {"user": state.user}
    answer = await serving.explain(schemas.ExplainRequest(**whose, item=item, n=REASONS_WHY))
    served = serving.served
    evidence = answer.evidence
    weights = []
    if evidence is not None:
        heaviest = evidence["weights"][:SHOWN_WEIGHTS]
        top = max((abs(each["weight"]) for each in heaviest), default=0.0) or 1.0
        for each in heaviest:
            title = served.shelf.item(each["item"]).title
            weights.append({"title": title, "weight": each["weight"], "share": abs(each["weight"]) / top})
    return {
        "state": state,
        "good": good(served, answer.item),
        "because": reasons(answer.reasons),
        "about": evidence["about"] if evidence is not None else "",
        "weights": weights,
        "notes": answer.notes,
    }
