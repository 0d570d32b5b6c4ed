"""What a claim is: a statement that can be run."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vouch.data.readers import read
from vouch.errors import ConfigError, UnknownIdError, did_you_mean

Scale = Literal["smoke", "desk", "full"]
SCALES: tuple[Scale, ...] = ("smoke", "desk", "full")


@dataclass(frozen=True)
class Measurement:
    """One run of a claim with one seed.

    Attributes:
        baseline, method: the claim's metric for each.
        effect: what must be above 0 for the claim to hold; method less baseline unless the claim says otherwise.
        baseline_cases, method_cases: values per case `(Q,)`, where the effect is their mean difference; the interval
            is then over cases and seeds, otherwise over seeds alone.
        details: other numbers worth keeping, plain JSON. seconds: what it took.
    """

    baseline: float
    method: float
    effect: float
    baseline_cases: NDArray[np.float64] | None = None
    method_cases: NDArray[np.float64] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Claim(ABC):
    """A statement of a paper, made executable. One subclass a variant; see `CONTRIBUTING.md`.

    Attributes:
        slug: the system. variant: the name of this statement among the system's.
        statement: what is claimed, in one sentence that a run can refute.
        metric: what `baseline` and `method` of a measurement are. effect: what the effect is, in words.
        baseline, method: what is set against what.
        reported: the paper's own numbers, in words, with their source.
        data: the source at each scale; `world` at smoke.
        trained: a folder in which sides that were trained are kept, so that variants that share one train it once; None
            keeps nothing.
    """

    slug: ClassVar[str]
    variant: ClassVar[str]
    statement: ClassVar[str]
    metric: ClassVar[str]
    effect: ClassVar[str] = "method less baseline"
    baseline: ClassVar[str]
    method: ClassVar[str]
    reported: ClassVar[str]
    data: ClassVar[Mapping[str, str]]
    trained: Path | None = None

    @abstractmethod
    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Run method and baseline once with the same budget; what is chosen is chosen on validation."""

    def read(self, source: str) -> Any:
        """The data of a source, with a `name` and a `fingerprint`; an interaction log unless a claim needs another kind."""
        return read(source)

    def source(self, scale: Scale) -> str:
        """The data a scale runs on unless other data is given.

        Raises:
            ConfigError: the claim has no such scale.
        """
        if scale not in self.data:
            raise ConfigError(
                f"{self.slug} ({self.variant}) has no scale {scale!r}", hint=did_you_mean(scale, self.data)
            )
        return self.data[scale]


_claims: dict[tuple[str, str], Claim] = {}


def register_claim(kind: type[Claim]) -> type[Claim]:
    """Class decorator that files a claim under its slug and variant."""
    _claims[kind.slug, kind.variant] = kind()
    return kind


@functools.cache
def _discover() -> None:
    import vouch.claims as room

    for found in pkgutil.iter_modules(room.__path__, "vouch.claims."):
        importlib.import_module(found.name)


def claims(slug: str | None = None) -> list[Claim]:
    """All claims, or those of one system, the main one first."""
    _discover()
    return [found for (owner, _), found in _claims.items() if slug in (None, owner)]


def claim(slug: str, variant: str | None = None) -> Claim:
    """One claim; the system's main one unless a variant is named.

    Raises:
        UnknownIdError: the system has no claim, or not that variant.
    """
    found = claims(slug)
    if not found:
        raise UnknownIdError(f"there is no claim of {slug!r}", hint=did_you_mean(slug, {owner for owner, _ in _claims}))
    if variant is None:
        return found[0]
    for each in found:
        if each.variant == variant:
            return each
    raise UnknownIdError(
        f"{slug} has no claim {variant!r}", hint=did_you_mean(variant, [each.variant for each in found])
    )
