"""The routes of `/v1`: thin, over `Serving` and `Store`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from vouch.errors import UnknownIdError
from vouch.service import schemas
from vouch.service.problems import Refused
from vouch.service.security import Caller, needs, new_key
from vouch.service.serving import Serving, unknown_items
from vouch.service.storage import Store

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer, "description": description}
    for status, description in (
        (400, "The request cannot be read."),
        (401, "A valid API key is needed."),
        (403, "The key's role does not suffice."),
        (404, "There is no such item, user or path."),
        (408, "The body did not arrive in time."),
        (413, "The body is too large."),
        (422, "A field does not fit."),
        (429, "Too many requests."),
        (503, "Busy, stopping, or without its database: ask again."),
    )
}
PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
DAY = "private, max-age=86400"

router = APIRouter(prefix="/v1", responses=ERRORS)
Reader = Annotated[Caller, Depends(needs("read"))]
Writer = Annotated[Caller, Depends(needs("write"))]
Admin = Annotated[Caller, Depends(needs("admin"))]
ItemId = Annotated[str, InPath(min_length=1, max_length=schemas.MAX_ID, pattern=schemas.NO_CONTROLS)]


def serving_of(request: Request) -> Serving:
    """The service that answers."""
    return request.app.state.serving


def store_of(request: Request) -> Store:
    """Its memory."""
    return request.app.state.store


Service = Annotated[Serving, Depends(serving_of)]
Memory = Annotated[Store, Depends(store_of)]


# Recommendations ----------------------------------------------------------------------------------------------------


@router.post("/recommend", tags=["recommendations"])
async def recommend(body: schemas.RecommendRequest, caller: Reader, serving: Service) -> schemas.RecommendAnswer:
    """The best items for a user or a history.

    A user's history is what the training log holds plus the events sent since. A user who is not known, or whose
    history holds nothing the model knows, gets popular items with `fallback` true.
    """
    return await serving.recommend(body)


@router.post("/similar", tags=["recommendations"])
async def similar(body: schemas.SimilarRequest, caller: Reader, serving: Service) -> schemas.SimilarAnswer:
    """Items like an item."""
    return await serving.similar(body)


@router.post("/explain", tags=["recommendations"])
async def explain(body: schemas.ExplainRequest, caller: Reader, serving: Service) -> schemas.ExplainAnswer:
    """Which history items a recommendation rests on: each is taken away in turn, and what falls is measured."""
    return await serving.explain(body)


# Events and feedback ------------------------------------------------------------------------------------------------


@router.post("/events", tags=["events"])
async def events(
    request: Request, body: schemas.EventsRequest, caller: Writer, serving: Service, store: Memory
) -> schemas.EventsAnswer:
    """Append interactions. The answer comes after they are on disk; the next recommendation takes them into account."""
    done = await asyncio.wrap_future(store.submit_events([event.model_dump() for event in body.events]))
    serving.metrics.events.inc(done.accepted)
    serving.metrics.duplicates.inc(done.duplicates)
    unknown = unknown_items(serving.served.engine, [event.item for event in body.events])
    return schemas.EventsAnswer(accepted=done.accepted, duplicates=done.duplicates, unknown=unknown)


@router.post("/feedback", tags=["events"])
async def feedback(
    body: schemas.FeedbackRequest, caller: Writer, serving: Service, store: Memory
) -> schemas.FeedbackAnswer:
    """What a user thinks of an item: a like counts as an interaction, a dislike hides the item from them."""
    done = await asyncio.wrap_future(store.submit_feedback(body.model_dump()))
    return schemas.FeedbackAnswer(accepted=done.accepted > 0)


@router.post("/users/history", tags=["events"])
async def history(
    body: schemas.HistoryRequest, caller: Reader, serving: Service, store: Memory
) -> schemas.HistoryAnswer:
    """The latest items of a user. (A POST, so that no user id gets into the logs of proxies.)"""
    served = serving.served
    past, hidden = await run_in_threadpool(store.past, [body.user])
    items = (served.engine.history(body.user) + past[body.user])[-body.limit :]
    return schemas.HistoryAnswer(
        known=bool(past[body.user]) or served.engine.knows_user(body.user),
        items=[served.shelf.item(item) for item in items],
        hidden=hidden[body.user],
    )


@router.post("/users/erase", tags=["events"])
async def erase(body: schemas.EraseRequest, caller: Admin, store: Memory) -> schemas.EraseAnswer:
    """Forget the events and the feedback of a user. The training log stays as it is."""
    erased = await run_in_threadpool(store.erase, body.user)
    return schemas.EraseAnswer(events=erased.events, feedback=erased.feedback)


# Catalogue ----------------------------------------------------------------------------------------------------------


@router.put("/items", tags=["catalogue"])
async def put_items(body: schemas.ItemsRequest, caller: Writer, serving: Service, store: Memory) -> schemas.ItemsAnswer:
    """Add or change items. Those the model was not trained on are kept, and recommended after the next training."""
    rows = [{"id": item.id, "title": item.title, "attributes": item.attributes} for item in body.items]
    await run_in_threadpool(store.upsert_items, rows)
    await run_in_threadpool(serving.refresh_catalog)
    new = unknown_items(serving.served.engine, [item.id for item in body.items])
    return schemas.ItemsAnswer(stored=len(body.items), not_recommendable=new)


@router.get("/items/{item:path}", tags=["catalogue"])
async def get_item(item: ItemId, caller: Reader, serving: Service) -> schemas.Item:
    """What is known of an item."""
    shelf = serving.served.shelf
    if not shelf.knows(item):
        raise UnknownIdError("there is no such item", where="path.item")
    return shelf.item(item)


@router.delete("/items/{item:path}", tags=["catalogue"])
async def delete_item(item: ItemId, caller: Writer, serving: Service, store: Memory) -> schemas.DeleteAnswer:
    """Take an item out of all answers; sending it again by `PUT /v1/items` brings it back."""
    if not serving.served.shelf.knows(item):
        raise UnknownIdError("there is no such item", where="path.item")
    deleted = await run_in_threadpool(store.delete_item, item)
    await run_in_threadpool(serving.refresh_catalog)
    return schemas.DeleteAnswer(deleted=deleted)


@router.get("/pictures/{item:path}", tags=["catalogue"], response_class=FileResponse)
async def picture(item: ItemId, caller: Reader, serving: Service) -> FileResponse:
    """The picture of an item."""
    engine = serving.served.engine
    found = engine.item(item)["picture"] if engine.codes([item])[0] >= 0 else None
    kind = PICTURES.get(Path(found).suffix.lower()) if found else None
    if found is None or kind is None or not Path(found).is_file():
        raise UnknownIdError("there is no picture of such an item", where="path.item")
    return FileResponse(found, media_type=kind, headers={"Cache-Control": DAY})


# The model ----------------------------------------------------------------------------------------------------------


@router.get("/card", tags=["model"])
async def card(caller: Reader, serving: Service, store: Memory) -> schemas.CardAnswer:
    """The run card: what model this is, on what data, how good, what is claimed and what not."""
    engine = serving.served.engine
    return schemas.CardAnswer(
        card=await run_in_threadpool(engine.card), audits=await run_in_threadpool(store.audits, engine.fingerprint)
    )


@router.put("/audits/{slot}", tags=["model"])
async def put_audit(
    slot: schemas.Slot, body: schemas.AuditRequest, caller: Admin, serving: Service, store: Memory
) -> schemas.AuditRequest:
    """Put the result of an audit into the card of the model that is served."""
    await run_in_threadpool(store.put_audit, serving.served.engine.fingerprint, slot, body.summary, body.result)
    return body


@router.put("/model", tags=["model"])
async def swap(body: schemas.SwapRequest, caller: Admin, serving: Service) -> schemas.SwapAnswer:
    """Serve another run, without dropping a request. If it cannot be opened, the old one stays."""
    after, before = await run_in_threadpool(serving.swap, body.run)
    return schemas.SwapAnswer(model=after, previous=before)


# Keys ---------------------------------------------------------------------------------------------------------------


@router.post("/keys", tags=["keys"])
async def add_key(body: schemas.KeyRequest, caller: Admin, store: Memory) -> schemas.KeyAnswer:
    """Make an API key. It is shown this once."""
    key, row = new_key(body.name, body.role, time.time())
    await run_in_threadpool(store.add_key, row)
    return schemas.KeyAnswer(key=key, id=row.id, name=row.name, role=body.role, created=row.created)


@router.get("/keys", tags=["keys"])
async def list_keys(caller: Admin, store: Memory) -> schemas.KeysAnswer:
    """The keys in use, without their secrets."""
    rows = await run_in_threadpool(store.list_keys)
    return schemas.KeysAnswer(
        keys=[schemas.KeyInfo(id=row.id, name=row.name, role=row.role, created=row.created) for row in rows]  # type: ignore[arg-type]
    )


@router.delete("/keys/{id}", tags=["keys"])
async def remove_key(request: Request, id: schemas.Id, caller: Admin, store: Memory) -> schemas.DeleteAnswer:
    """Take a key away. It stops working within seconds, in all workers."""
    if not await run_in_threadpool(store.remove_key, id):
        raise Refused(404, "there is no such key", where="path.id")
    if request.app.state.gate.keys is not None:
        request.app.state.gate.keys.forget(id)
    return schemas.DeleteAnswer(deleted=True)
