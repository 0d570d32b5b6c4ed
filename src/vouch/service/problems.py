"""Errors as answers: `{"error": {"what", "where", "hint"}}` with the status that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from vouch.errors import ConfigError, UnknownIdError, VouchError, clause
from vouch.service.batching import Busy
from vouch.service.storage import Unavailable

MOST = 500
RETRY = {"Retry-After": "1"}
PHRASES = {
    400: ("the request cannot be read", None),
    404: ("there is no such page", "the paths are listed in /v1/openapi.json"),
    405: ("this path does not take this method", "the paths are listed in /v1/openapi.json"),
    415: ("the body is not JSON", "send Content-Type: application/json"),
}
HINTS = {
    "string_type": "ids and texts go in quotes",
    "extra_forbidden": "leave it out; the fields are listed in /v1/openapi.json",
    "missing": "the fields are listed in /v1/openapi.json",
}
ONE_OBJECT = "send one JSON object"


class Refused(HTTPException):
    """A refusal with its reason and what to do."""

    def __init__(
        self,
        status: int,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, what, dict(headers) if headers else None)
        self.where, self.hint = where, hint


def problem(
    status: int, what: str, where: str | None = None, hint: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer that tells of an error."""
    body = {"error": {"what": _safe(what), "where": _safe(where), "hint": _safe(hint)}}
    return JSONResponse(body, status, dict(headers) if headers else None)


def status_of(error: VouchError) -> int:
    """The status that fits an error of the library."""
    if isinstance(error, Busy | Unavailable):
        return 503
    if isinstance(error, UnknownIdError):
        return 404
    return 422 if isinstance(error, ConfigError) else 500


def add_handlers(app: FastAPI, page: Callable[[Request, int, str, str | None], Response] | None = None) -> None:
    """Answer errors of all kinds in one form.

    Args:
        page: makes what a browser is shown at an address, outside the API, that does not exist.
    """

    @app.exception_handler(VouchError)
    def _vouch(request: Request, error: VouchError) -> JSONResponse:
        status = status_of(error)
        where = None if status >= 500 else error.where  # paths of the machine are nobody's business
        return problem(status, error.what, where, error.hint, RETRY if status == 503 else None)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refused):
            return problem(error.status_code, error.detail, error.where, error.hint, error.headers)
        what, hint = PHRASES.get(error.status_code, (str(error.detail), None))
        browser = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1")
        if page is not None and browser and error.status_code == 404:
            return page(request, 404, what, None)
        return problem(error.status_code, what, None, hint, error.headers)

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = error.errors()[0]
        if first["type"] == "json_invalid":
            what = f"the body is not valid JSON: {clause(str(first['ctx']['error']))}"
            return problem(422, what, f"body, character {first['loc'][-1]}", ONE_OBJECT)
        if first["loc"] == ("body",) and first["type"] != "value_error":
            return problem(422, *_no_object(request, first))
        more = len(error.errors()) - 1
        also = f"there {'is one more fault' if more == 1 else f'are {more} more faults'}" if more else None
        return problem(422, clause(first["msg"]), place(first["loc"]), HINTS.get(first["type"]) or also)


def place(parts: Sequence[int | str]) -> str:
    """Where in a request: `body.events.0.time`."""
    return ".".join(str(part) for part in parts)


def _no_object(request: Request, fault: Mapping[str, Any]) -> tuple[str, str, str]:
    """What is wrong with a body that is no JSON object, where, and what to do. Most often it is not declared as JSON."""
    if fault["input"] in (None, b"", ""):
        return "the body is missing", "body", ONE_OBJECT
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if isinstance(fault["input"], str | bytes) and not kind.endswith("json"):
        return "the body is not declared as JSON", "header.content-type", "send Content-Type: application/json"
    return "the body is no JSON object", "body", ONE_OBJECT


def _safe(text: str | None) -> str | None:
    """Text of bounded length that can be written as UTF-8, whatever was sent."""
    return None if text is None else text[:MOST].encode("utf-8", "backslashreplace").decode()
