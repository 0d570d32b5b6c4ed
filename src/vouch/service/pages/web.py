"""What all pages share: templates, headers, forms, errors as pages, and signing in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote

import jinja2
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

import vouch
from vouch.errors import ConfigError, VouchError, clause
from vouch.service.pages import assets
from vouch.service.pages.words import brief, number, sentence, signed, whole
from vouch.service.problems import PHRASES, Refused, place, status_of
from vouch.service.security import COOKIE

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    # Without it browsers send no usable Origin with a form, which tells our forms from those of other sites.
    "Referrer-Policy": "same-origin",
    "Vary": "HX-Request, HX-Target",
}
PLACES = (("/shop", "Shop window"), ("/compare", "Compare"), ("/claims", "Claims"), ("/card", "Run card"))
MOST_FIELDS = 100
CHANGE_IT = "go back and change it"

Sent = TypeVar("Sent", bound=BaseModel)


@functools.cache
def environment() -> jinja2.Environment:
    """The templates; whatever is put into them is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("vouch.service.pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.globals.update(asset=assets.url, plotly_styles=assets.plotly_styles, version=vouch.__version__, places=PLACES)
    made.filters.update(
        number=number,
        signed=signed,
        whole=whole,
        sentence=sentence,
        brief=brief,
        segment=lambda text: quote(text, safe=""),
    )
    return made


def page(
    request: Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
) -> HTMLResponse:
    """A page, or the part of one where the template is a part."""
    entered = "key_id" in request.scope["state"]  # strangers are not told what is served
    text = environment().get_template(template).render(
        path=request.url.path,
        model=request.app.state.serving.served.model if entered else None,
        signed_in=COOKIE in request.cookies,
        **values,
    )  # fmt: skip
    return HTMLResponse(text, status, {**HEADERS, **(headers or {})})


def wants_part(request: Request, part: str) -> bool:
    """Whether htmx asks for a part of the page only: the element whose id begins so."""
    return "hx-request" in request.headers and request.headers.get("hx-target", "").startswith(part)


class Nothing(BaseModel):
    """A form that is a button only."""


async def form(request: Request, model: type[Sent]) -> Sent:
    """The fields of a form that was sent from one of our pages; fields that are lists may occur again and again.

    Raises:
        Refused: 403 if a page of another site sent it, 415 if it is no form, 400 if it cannot be read.
        ConfigError: a field does not fit.
    """
    origin = request.headers.get("origin")
    if origin is None or origin.partition("://")[2] != request.headers.get("host"):
        raise Refused(403, "this form was not sent from a page of this service", hint="open the page and try again")
    body = await request.body()
    if body and not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise Refused(415, "the body is no form")
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except ValueError:
        raise Refused(400, "the form cannot be read") from None
    fields: dict[str, Any] = {}
    for name, value in pairs:
        field = model.model_fields.get(name)
        if field is not None and str(field.annotation).startswith("list"):
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_fault(error.errors()[0]), hint=CHANGE_IT) from None


def _fault(fault: Mapping[str, Any]) -> str:
    return f"{place(fault['loc'])}: {clause(fault['msg'])}"


def see(path: str) -> RedirectResponse:
    """Go and see another page, after a form."""
    return RedirectResponse(path, 303, {**HEADERS})


class PageRoute(APIRoute):
    """A route whose errors are pages; a visitor without a key is asked for one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler."""
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await answer(request)
            except Refused as error:
                if error.status_code == 401 and request.method == "GET" and "hx-request" not in request.headers:
                    return see(f"/sign-in?next={quote(request.url.path, safe='')}")
                return problem_page(request, error.status_code, error.detail, error.hint, error.headers)
            except HTTPException as error:
                what, hint = PHRASES.get(error.status_code, (str(error.detail), None))
                return problem_page(request, error.status_code, what, hint, error.headers)
            except RequestValidationError as error:
                fault = error.errors()[0]
                return problem_page(request, 422, _fault({**fault, "loc": fault["loc"][1:]}), CHANGE_IT)
            except VouchError as error:
                return problem_page(request, status_of(error), error.what, error.hint)

        return handler


def problem_page(
    request: Request, status: int, what: str, hint: str | None, headers: Mapping[str, str] | None = None
) -> HTMLResponse:
    """The page, or the notice, that tells of an error."""
    template = "_problem.html" if "hx-request" in request.headers else "problem.html"
    what = what[:500].encode("utf-8", "backslashreplace").decode()
    return page(request, template, status=status, headers=headers, status_code=status, what=what, hint=hint)
