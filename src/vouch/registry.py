"""The register of systems: every method declares a card; the library finds it by its slug."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from vouch.errors import UnknownIdError, did_you_mean

ROOMS = ("recommenders", "content", "language", "multitask", "merging", "distillation", "federated", "audit", "explain")
"""Packages that hold methods; those not built yet are skipped."""


@dataclass(frozen=True)
class Card:
    """What a system is, on one card.

    Attributes:
        slug: its name in commands, files and the ledger.
        name: its name in print.
        area: the room it lives in, e.g. `recommenders/sequential`.
        summary: one line in plain words.
        paper: arXiv id of the paper it comes from, or None.
        year: of publication, or None.
        needs: what must be in the data or the machine: `times`, `media`, `attributes`, `gpu`.
        baseline: whether it is a baseline rather than one of the mission's systems.
    """

    slug: str
    name: str
    area: str
    summary: str
    paper: str | None = None
    year: int | None = None
    needs: tuple[str, ...] = ()
    baseline: bool = False


T = TypeVar("T", bound=type)
_registered: dict[str, Any] = {}


def register(card: Card) -> Callable[[T], T]:
    """Class decorator that files a method under its card's slug and hangs the card on it as `card`."""

    def file(cls: T) -> T:
        if card.slug in _registered and _registered[card.slug].__qualname__ != cls.__qualname__:
            raise ValueError(f"two methods claim the slug {card.slug!r}")
        cls.card = card  # type: ignore[attr-defined]
        _registered[card.slug] = cls
        return cls

    return file


@functools.cache
def _discover() -> None:
    """Import every module of every room, so that each registers itself."""
    for room in ROOMS:
        try:
            package = importlib.import_module(f"vouch.{room}")
        except ModuleNotFoundError as error:
            if error.name != f"vouch.{room}":
                raise
            continue
        for found in pkgutil.walk_packages(package.__path__, f"vouch.{room}."):
            importlib.import_module(found.name)


def methods() -> dict[str, Any]:
    """Every registered method, by slug, in alphabetical order."""
    _discover()
    return dict(sorted(_registered.items()))


def method(slug: str) -> Any:
    """The method with a slug.

    Raises:
        UnknownIdError: there is none; the message names near ones.
    """
    if slug in _registered:  # its module was imported: no need to import all others
        return _registered[slug]
    known = methods()
    if slug not in known:
        raise UnknownIdError(f"there is no method {slug!r}", hint=did_you_mean(slug, known))
    return known[slug]
