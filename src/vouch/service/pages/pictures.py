"""Pictures of items: the catalogue's own, or drawn here where the data is the embedded world."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from vouch.data.world.items import BRANDS, COLOURS
from vouch.data.world.pictures import SHAPES, draw
from vouch.service import schemas
from vouch.service.serving import Served

SIZE = 256
KEPT = 2_048


def is_world(engine: Any) -> bool:
    """Whether the run's data is the embedded world."""
    return "world" in getattr(getattr(engine, "log", None), "notes", {})


def picture_url(served: Served, item: schemas.Item | schemas.Recommendation) -> str | None:
    """Where the picture of an item is, if there is one."""
    if item.picture is not None:
        return item.picture
    if is_world(served.engine) and _looks(item.attributes) is not None:
        return f"/pictures/{quote(item.item, safe='')}"
    return None


def draw_picture(served: Served, item: str) -> bytes | None:
    """The picture of an item of the embedded world as PNG, or None."""
    looks = _looks(served.shelf.item(item).attributes) if is_world(served.engine) and served.shelf.knows(item) else None
    return None if looks is None or not item.isdecimal() else _drawn(*looks, int(item) - 1)


def _looks(attributes: Mapping[str, Any]) -> tuple[str, str, int] | None:
    """Category, colour and the brand's number."""
    category, colour, brand = (attributes.get(name) for name in ("category", "colour", "brand"))
    for names in BRANDS:
        if category in SHAPES and colour in COLOURS and brand in names:
            return str(category), str(colour), names.index(str(brand))
    return None


@functools.lru_cache(maxsize=KEPT)
def _drawn(category: str, colour: str, brand: int, code: int) -> bytes:
    buffer = io.BytesIO()
    draw(category, COLOURS[colour], brand, code, SIZE).quantize(128).save(buffer, "PNG")
    return buffer.getvalue()
