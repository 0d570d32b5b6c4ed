"""The routes of the pages: thin, over what the API stands on."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from vouch.errors import ConfigError, UnknownIdError
from vouch.service import schemas
from vouch.service.api import DAY, ItemId, Memory, Reader, Service, Writer
from vouch.service.pages import assets, board, comparisons, runcard
from vouch.service.pages import shop as shops
from vouch.service.pages.goods import good
from vouch.service.pages.pictures import draw_picture
from vouch.service.pages.shop import SHOPPER, Opinion, Shopper, State, Window, cookie, shopper
from vouch.service.pages.web import HEADERS, Nothing, PageRoute, form, page, see, wants_part
from vouch.service.problems import Refused
from vouch.service.security import COOKIE, Caller, needs

SIMILAR = 8
WEEK = 7 * 24 * 3600
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'none'"
"""For the report of a comparison, which is one file with its styles inside: nothing in it may run or send."""

Admin = Annotated[Caller, Depends(needs("admin"))]
Asked = Annotated[Window, Query()]
pages = APIRouter(route_class=PageRoute, include_in_schema=False)


def router() -> APIRouter:
    """The pages, to be mounted at the root of the application.

    Raises:
        ConfigError: a package that carries a script of the pages is not installed.
    """
    assets.files()
    return pages


@pages.get("/")
async def home() -> RedirectResponse:
    """The face of the service."""
    return RedirectResponse("/shop", headers=HEADERS)


@pages.get("/static/{name}")
def static(request: Request, name: str) -> Response:
    """Styles and scripts; nothing that needs a key."""
    return assets.serve(request, name)


# The shop window ----------------------------------------------------------------------------------------------------


async def window_page(
    request: Request, serving: Service, store: Memory, caller: Caller, window: Window, user: str | None, cause: str = ""
) -> Response:
    """The shop window, or the part of it that changes."""
    shown = await shops.show(serving, store, window, user, cause)
    part = wants_part(request, "window")
    headers = {"HX-Push-Url": shown.state.url(**({"q": shown.words} if shown.words else {}))} if part else None
    may = {"write": caller.role in ("write", "admin"), "erase": caller.role == "admin"}
    return page(
        request,
        "_window.html" if part else "shop.html",
        headers=headers,
        part=part,
        shown=shown,
        state=shown.state,
        may=may,
    )


@pages.get("/shop")
async def shop(request: Request, caller: Reader, serving: Service, store: Memory, window: Asked) -> Response:
    """Recommendations for items that are clicked together."""
    return await window_page(request, serving, store, caller, window, None)


@pages.get("/shop/user")
async def shop_as_user(request: Request, caller: Reader, serving: Service, store: Memory, window: Asked) -> Response:
    """Recommendations for a user."""
    user = shopper(request)
    if user is None:
        return see("/shop")
    return await window_page(request, serving, store, caller, window, user)


@pages.post("/shop/user")
async def act_as(request: Request, caller: Reader) -> Response:
    """Choose a user; the choice is kept in a cookie until the browser is closed."""
    chosen = await form(request, Shopper)
    answer = see("/shop/user")
    answer.set_cookie(SHOPPER, cookie(chosen.user), path="/shop", httponly=True, samesite="strict")
    return answer


@pages.post("/shop/feedback")
async def feedback(request: Request, caller: Writer, serving: Service, store: Memory) -> Response:
    """What the user thinks of an item."""
    user, opinion = shopper(request), await form(request, Opinion)
    if user is None:
        raise Refused(409, "no user is chosen", hint="choose one in the shop window")
    done = await shops.tell(serving, store, user, opinion)
    if not wants_part(request, "window"):
        return see("/shop/user")
    window = Window(seen=opinion.seen[:100])
    return await window_page(request, serving, store, caller, window, user, done)


@pages.post("/shop/forget")
async def forget(request: Request, caller: Admin, serving: Service, store: Memory) -> Response:
    """Forget the events and the feedback of the user."""
    await form(request, Nothing)
    user = shopper(request)
    if user is not None:
        await run_in_threadpool(store.erase, user)
    return see("/shop/user")


async def why_page(request: Request, serving: Service, window: Window, user: str | None, item: str) -> Response:
    """What a recommendation rests on: a page, or what unfolds in its card."""
    found = await shops.why(serving, window, user, item)
    part = request.headers["hx-target"] if wants_part(request, "why-") else ""
    return page(request, "_why.html" if part else "why.html", part=part, **found)


class Question(Window):
    """Why an item?"""

    item: schemas.Id


@pages.get("/shop/why")
async def why(request: Request, caller: Reader, serving: Service, asked: Annotated[Question, Query()]) -> Response:
    """Why an item is recommended for items that were clicked together."""
    return await why_page(request, serving, asked, None, asked.item)


@pages.get("/shop/user/why")
async def why_user(request: Request, caller: Reader, serving: Service, asked: Annotated[Question, Query()]) -> Response:
    """Why an item is recommended to the user."""
    user = shopper(request)
    if user is None:
        return see("/shop")
    return await why_page(request, serving, asked, user, asked.item)


@pages.get("/items/{item:path}")
async def item_page(request: Request, item: ItemId, caller: Reader, serving: Service) -> Response:
    """What is known of an item, and items like it."""
    served = serving.served
    if not served.shelf.present(item):
        raise UnknownIdError("there is no such item")
    known = served.shelf.item(item)
    similar, why_not = [], ""
    if known.recommendable:
        try:
            answer = await serving.similar(schemas.SimilarRequest(item=item, k=SIMILAR))
            similar = [good(served, each) for each in answer.similar]
        except ConfigError as error:
            why_not = error.what
    else:
        why_not = "it was added after the model was trained"
    facts = [(name, text) for name, text in runcard.rows(known.attributes) if text != known.title]
    return page(
        request, "item.html", good=good(served, known), facts=facts, similar=similar, why_not=why_not,
        state=State(clicked=(item,)), known=known,
    )  # fmt: skip


@pages.get("/pictures/{item:path}")
async def picture(item: ItemId, caller: Reader, serving: Service) -> Response:
    """A picture of an item of the embedded world, drawn when it is asked for."""
    drawn = await run_in_threadpool(draw_picture, serving.served, item)
    if drawn is None:
        raise UnknownIdError("there is no picture of such an item")
    return Response(drawn, media_type="image/png", headers={"Cache-Control": DAY})


# Evidence -----------------------------------------------------------------------------------------------------------

Name = Annotated[str, Query(max_length=schemas.MAX_ID)]


@pages.get("/compare")
def compare(request: Request, caller: Reader, serving: Service, report: Name = "") -> Response:
    """The comparison of methods that the run came out of."""
    found = comparisons.find(serving.served.path)
    if not found and not report:
        return page(request, "compare_none.html")
    chosen = comparisons.choose(found, report)
    read = comparisons.read(chosen)
    return page(
        request,
        "compare.html",
        found=found,
        chosen=chosen,
        c=read,
        data=comparisons.plotted(read, comparisons.groups_of(chosen)),
        rows=runcard.rows,
    )


@pages.get("/compare/data")
def compare_data(caller: Reader, serving: Service, report: Name = "") -> Response:
    """What the plots are drawn from."""
    chosen = comparisons.choose(comparisons.find(serving.served.path), report)
    return JSONResponse(comparisons.plotted(comparisons.read(chosen), comparisons.groups_of(chosen)))


@pages.get("/compare/report")
def compare_report(caller: Reader, serving: Service, report: Name = "") -> Response:
    """The whole report, as `vouch compare` wrote it."""
    chosen = comparisons.choose(comparisons.find(serving.served.path), report)
    if chosen.report is None:
        raise UnknownIdError("this comparison has no report")
    return FileResponse(
        chosen.report, media_type="text/html", headers={**HEADERS, "Content-Security-Policy": REPORT_POLICY}
    )


@pages.get("/claims")
def claims(
    request: Request, caller: Reader, verdict: Name = "", area: Name = "", q: Annotated[str, Query(max_length=200)] = ""
) -> Response:
    """The board of all systems."""
    rows, trouble = board.board()
    part = wants_part(request, "board")
    return page(
        request, "_board.html" if part else "claims.html", part=part,
        rows=board.chosen(rows, verdict, area, q), total=len(rows), counts=board.counts(rows), trouble=trouble,
        areas=sorted({row.system.area for row in rows}), verdict=verdict, area=area, q=q,
    )  # fmt: skip


@pages.get("/claims/{slug}")
def claim(request: Request, caller: Reader, slug: Annotated[str, schemas.StringConstraints(max_length=64)]) -> Response:
    """A system's claims with their ledger entries."""
    return page(request, "claim.html", row=board.one(slug))


@pages.get("/card")
async def card(request: Request, caller: Reader, serving: Service, store: Memory) -> Response:
    """The run card with its audits."""
    engine = serving.served.engine
    shown: dict[str, Any] = await run_in_threadpool(engine.card)
    audits = await run_in_threadpool(store.audits, engine.fingerprint)
    test = shown.get("metrics", {}).get("test")
    return page(
        request, "card.html", card=shown, test=test, groups=runcard.groups(test) if test else {},
        slots=runcard.slots(audits), rows=runcard.rows, may_measure=caller.role == "admin",
    )  # fmt: skip


@pages.post("/card/measure")
async def measure(request: Request, caller: Admin, serving: Service) -> Response:
    """Measure the run on its test part, apart from the model that answers."""
    from vouch.recommenders.runs import open_run
    from vouch.service.card import measure as measured

    await form(request, Nothing)
    served = serving.served
    await run_in_threadpool(lambda: measured(open_run(served.path), served.engine.fingerprint))
    return see("/card")


# Keys ---------------------------------------------------------------------------------------------------------------


class SignIn(BaseModel):
    """An API key, and where to go on."""

    key: Annotated[str, schemas.StringConstraints(max_length=200)]
    next: Annotated[str, schemas.StringConstraints(max_length=200)] = "/"


@pages.get("/sign-in")
async def ask_for_key(request: Request, next: Name = "/") -> Response:
    """Ask a visitor for a key."""
    return page(request, "sign_in.html", next=next, wrong=False)


@pages.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Keep a good key in a cookie that no script can read and no other site can send."""
    gate = request.app.state.gate
    address = request.client.host if request.client else "unknown"
    if gate.limit.wait(f"address {address}") > 0:
        raise Refused(429, "too many requests", headers={"Retry-After": "1"})
    sent = await form(request, SignIn)
    key = sent.key.strip()
    if gate.keys is not None and await gate.keys.caller(key) is None:
        return page(request, "sign_in.html", status=401, next=sent.next, wrong=True)
    here = sent.next.startswith("/") and not sent.next.startswith(("//", "/\\"))
    answer = see(sent.next if here and sent.next.isprintable() else "/")
    if gate.keys is not None:
        answer.set_cookie(
            COOKIE, key, max_age=WEEK, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
    return answer


@pages.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """Forget the key and the user."""
    await form(request, Nothing)
    answer = see("/sign-in")
    answer.delete_cookie(COOKIE)
    answer.delete_cookie(SHOPPER, path="/shop")
    return answer
