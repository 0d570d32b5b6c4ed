"""The board of claims: what each of the 46 systems' papers says, and what we found."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vouch.errors import UnknownIdError, VouchError
from vouch.systems import SYSTEMS, System

if TYPE_CHECKING:
    from vouch.claims.ledger import LedgerEntry

OPEN = "not run yet"
MISSING = "not built yet"
VERDICTS = ("holds", "inconclusive", "does not hold", OPEN, MISSING)


@dataclass(frozen=True)
class Stand:
    """A statement of a paper, and where it stands.

    Attributes:
        entry: the newest ledger entry of the largest scale; None until the claim was run. earlier: all others.
        span: the interval's place on a line from `low` to `high` around 0, for drawing.
    """

    variant: str
    statement: str
    reported: str
    command: str
    entry: LedgerEntry | None
    earlier: tuple[LedgerEntry, ...]

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return self.entry.verdict if self.entry is not None else OPEN


@dataclass(frozen=True)
class Row:
    """A system with its claims, the main one first."""

    system: System
    stands: tuple[Stand, ...]

    @property
    def verdict(self) -> str:
        """Of the main claim."""
        return self.stands[0].verdict if self.stands else MISSING

    @property
    def verdicts(self) -> list[str]:
        """Of all its claims; that it is not built, if it has none."""
        return [stand.verdict for stand in self.stands] or [MISSING]

    @property
    def others(self) -> list[tuple[str, int]]:
        """The verdicts of the further claims, counted."""
        given = [stand.verdict for stand in self.stands[1:]]
        return [(verdict, given.count(verdict)) for verdict in VERDICTS if verdict in given]


def board() -> tuple[list[Row], str]:
    """All systems, and what is wrong with the ledger, if anything is."""
    trouble = ""
    try:
        entries = ledger()
    except VouchError as error:
        entries, trouble = [], error.what
    return [row(system, entries) for system in SYSTEMS], trouble


def row(system: System, entries: Iterable[LedgerEntry]) -> Row:
    """One system."""
    own = [entry for entry in entries if entry.slug == system.slug]
    return Row(system, tuple(_stand(found, own) for found in _claims(system.slug)))


def ledger() -> list[LedgerEntry]:
    """All entries, oldest first."""
    from vouch.claims import read_ledger  # with all it stands on, when the first visitor asks

    return read_ledger()


@functools.cache
def _claims(slug: str) -> tuple[Any, ...]:
    from vouch.claims import claims

    return tuple(claims(slug))


def _stand(found: Any, own: list[LedgerEntry]) -> Stand:
    from vouch.claims.claim import SCALES

    ran = sorted(
        (entry for entry in own if entry.variant == found.variant),
        key=lambda entry: SCALES.index(entry.scale),
    )  # sorting is stable: of one scale the newest comes last
    scale = "desk" if "desk" in found.data else next(iter(found.data))
    return Stand(
        variant=found.variant,
        statement=found.statement,
        reported=found.reported.removeprefix("paper: "),
        command=f"vouch claims run {found.slug} --variant {found.variant} --scale {scale}",
        entry=ran[-1] if ran else None,
        earlier=tuple(reversed(ran[:-1])),
    )


def one(slug: str) -> Row:
    """One system by its slug.

    Raises:
        UnknownIdError: there is none. StorageError: the ledger cannot be read.
    """
    for system in SYSTEMS:
        if system.slug == slug:
            return row(system, ledger())
    raise UnknownIdError(f"there is no system {slug!r}", hint="the board lists all of them")


def counts(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """How many claims have each verdict, and how many systems are not built: no refuted claim hides behind a main one."""
    given = Counter(verdict for each in rows for verdict in each.verdicts)
    return [(name, given[name]) for name in VERDICTS]


def chosen(rows: Iterable[Row], verdict: str, area: str, words: str) -> list[Row]:
    """The rows any claim of which has a verdict, of an area, whose texts hold some words; an empty choice lets all pass."""
    wanted = words.casefold().split()

    def fits(each: Row) -> bool:
        texts = [each.system.slug, each.system.name, each.system.summary, *(stand.statement for stand in each.stands)]
        text = " ".join(texts).casefold()
        return (
            verdict in ("", *each.verdicts) and area in ("", each.system.area) and all(word in text for word in wanted)
        )

    return [each for each in rows if fits(each)]
