"""Styles and scripts: our own, and those of htmx and Plotly out of the packages that carry them. Nothing from elsewhere."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import re
from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse, Response

from vouch.errors import ConfigError, UnknownIdError

OWN = Path(__file__).with_name("static")
FROM_PACKAGES = {
    "htmx.min.js": ("js_lib_htmx", "static/htmx/htmx.min.js"),
    "plotly.min.js": ("plotly", "package_data/plotly.min.js"),
}
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
FOR_EVER = "public, max-age=31536000, immutable"
WORTH_PACKING = 2_000


@functools.cache
def files() -> dict[str, Path]:
    """The files that are served, by name.

    Raises:
        ConfigError: a package that carries one is not installed.
    """
    found = {file.name: file for file in OWN.iterdir() if file.suffix in TYPES}
    for name, (package, path) in FROM_PACKAGES.items():
        spec = importlib.util.find_spec(package)  # found, not imported: only a file of it is wanted
        file = (
            next((Path(root) / path for root in (spec.submodule_search_locations or ()) if spec), None)
            if spec
            else None
        )
        if file is None or not file.is_file():
            raise ConfigError(f"the pages need {name}, which is not here", hint='pip install "vouch[service]"')
        found[name] = file
    return found


@functools.cache
def url(name: str) -> str:
    """Where a file is served; changes with its content, so that browsers may keep it for ever."""
    return f"/static/{name}?v={hashlib.sha256(files()[name].read_bytes()).hexdigest()[:12]}"


@functools.cache
def plotly_styles() -> list[str]:
    """Ids of the styles that Plotly's maps write into any page; they are left out where such elements are there already."""
    return re.findall(r'getElementById\("([0-9a-f]{64})"\)', files()["plotly.min.js"].read_text(encoding="utf-8"))


@functools.cache
def _packed(name: str) -> bytes:
    return gzip.compress(files()[name].read_bytes(), 6, mtime=0)


def serve(request: Request, name: str) -> Response:
    """Answer with a file.

    Raises:
        UnknownIdError: there is none of that name.
    """
    file = files().get(name)
    if file is None:
        raise UnknownIdError("there is no such file")
    headers = {"Cache-Control": FOR_EVER, "Vary": "Accept-Encoding"}
    kind = TYPES[file.suffix]
    if "gzip" in request.headers.get("accept-encoding", "") and file.stat().st_size > WORTH_PACKING:
        return Response(_packed(name), media_type=kind, headers={**headers, "Content-Encoding": "gzip"})
    return FileResponse(file, media_type=kind, headers=headers)
