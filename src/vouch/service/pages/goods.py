"""Items as the pages show them, and ways to find items and users to begin with."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vouch.service import schemas
from vouch.service.pages.pictures import picture_url
from vouch.service.serving import Served

PRICES = ("price", "cost")
DETAILS = ("brand", "artist", "author", "category", "genre", "genres", "colour", "color")
"""Attributes shown under a title, where the catalogue has them."""
TINTS = 6
MOST_LABELS = 40
FOUND = 12


@dataclass(frozen=True)
class Because:
    """A history item that a recommendation rests on; `share` of the strongest one's drop, from 0 to 1."""

    item: str
    title: str
    drop: float
    share: float


@dataclass(frozen=True)
class Good:
    """An item as a card shows it.

    Attributes:
        initial, tint: what stands in for a picture, where there is none.
        new: was not there a moment ago.
    """

    item: str
    title: str
    detail: str
    price: str
    picture: str | None
    initial: str
    tint: int
    because: list[Because]
    new: bool = False


@dataclass(frozen=True)
class Facts:
    """What the shop window asks of an engine once.

    Attributes:
        users: ids of a quiet, a middling and a busy user, with the length of their histories.
        attribute, labels: a categorical attribute with few labels, to choose by. priced: the attribute to limit, or "".
    """

    users: list[tuple[str, int]]
    attribute: str
    labels: list[str]
    priced: str


_facts: weakref.WeakKeyDictionary[Any, Facts] = weakref.WeakKeyDictionary()


def facts(engine: Any) -> Facts:
    """Facts of an engine; nothing of one that has no log and no catalogue to look at."""
    if engine not in _facts:
        _facts[engine] = Facts(_some_users(engine), *_choices(engine))
    return _facts[engine]


def _some_users(engine: Any) -> list[tuple[str, int]]:
    log = getattr(engine, "log", None)
    if log is None or log.n_users == 0:
        return []
    lengths = np.asarray(log.lengths)
    order = np.argsort(lengths, kind="stable")
    codes = dict.fromkeys(int(order[int(share * (len(order) - 1))]) for share in (0.2, 0.6, 0.95))
    return [(str(log.users.id(code)), int(lengths[code])) for code in codes]


def _choices(engine: Any) -> tuple[str, list[str], str]:
    catalog = getattr(engine, "catalog", None)
    if catalog is None or not catalog.table.width:
        return "", [], ""
    priced = next((name for name in catalog.columns("number") if name.lower() in PRICES), "")
    columns = catalog.columns("category")
    for name in sorted(columns, key=lambda name: name.lower() not in DETAILS):
        labels = catalog.table[name].drop_nulls().unique().sort()
        if name.lower() != "brand" and 2 <= len(labels) <= MOST_LABELS:
            return name, [str(label) for label in labels], priced
    return "", [], priced


def good(
    served: Served,
    item: schemas.Item | schemas.Recommendation,
    *,
    because: Sequence[schemas.Reason] = (),
    new: bool = False,
) -> Good:
    """An item, ready to be shown."""
    values = {name.lower(): value for name, value in item.attributes.items()}
    price = next((values[name] for name in PRICES if isinstance(values.get(name), int | float)), None)
    details = [
        ", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in map(values.get, DETAILS) if v is not None
    ]
    return Good(
        item=item.item,
        title=item.title,
        detail=" · ".join(text for text in details if len(text) <= 40)[:80],
        price="" if price is None else f"{price:,.2f}",
        picture=picture_url(served, item),
        initial=next((letter.upper() for letter in item.title if letter.isalnum()), "·"),
        tint=zlib.crc32(item.item.encode()) % TINTS,
        because=reasons(because),
        new=new,
    )


def goods(served: Served, items: Iterable[str]) -> list[Good]:
    """Items by id, ready to be shown."""
    return [good(served, served.shelf.item(item)) for item in items]


def reasons(found: Sequence[schemas.Reason]) -> list[Because]:
    """Reasons with their shares."""
    top = max((each.drop for each in found), default=0.0)
    return [Because(each.item, each.title, each.drop, each.drop / top if top > 0 else 0.0) for each in found]


def search(served: Served, words: str, most: int = FOUND) -> list[str]:
    """Items that can be recommended whose id is, or whose title holds, what was typed."""
    words = words.strip()
    if not words:
        return []
    found = [words]
    catalog: Any = getattr(served.engine, "catalog", None)
    for name in catalog.columns("title") if catalog is not None else ():
        hits = (
            catalog.table[name].cast(str).str.to_lowercase().str.contains(words.lower(), literal=True).fill_null(False)
        )
        found += [str(catalog.items.id(int(code))) for code in hits.arg_true()[: 4 * most]]
    found += [item for item, change in served.shelf.changes.items() if words.lower() in (change.title or "").lower()]
    known = [item for item in dict.fromkeys(found) if served.shelf.present(item) and served.shelf.recommendable(item)]
    return known[:most]
