"""The parts that sequential models are composed of: attention kinds, augmentations, and named losses.

A part is a class filed under its kind and slug; a paper's method is a choice of parts with the paper's settings, and
the same parts fit other encoders. All parts of one slug share one settings class. Shapes: `B` batch, `T` positions,
`D` hidden size, `K` interests, `n` targets.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.config import Config
from vouch.data import Interactions, Split
from vouch.data.queries import flat_rows
from vouch.errors import UnknownIdError, did_you_mean
from vouch.nn.transformer import Context
from vouch.registry import methods

if TYPE_CHECKING:
    from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
    from vouch.recommenders.sequential.batches import SequenceBatch
    from vouch.recommenders.sequential.config import SequenceConfig

Kind = Literal["attention", "augment", "objective"]
PartClass = TypeVar("PartClass", bound="type[Part]")
_parts: dict[tuple[str, str], Any] = {}


class NoSettings(Config):
    """A part without settings."""


class Part:
    """What all parts declare.

    Attributes:
        kind, slug, summary: set by `part`.
        Config: the settings; one class for all parts of a slug.
        brings: objectives that come with it, unless they are named already.
    """

    kind: ClassVar[Kind]
    slug: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[Config]] = NoSettings
    brings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """Why this part cannot go into that recommender, or None if it can."""
        del recommender
        return None


class Attention(Part, nn.Module, ABC):
    """An attention kind: made once for a transformer, it gives each block its own layer.

    Calling it with the context of a pass computes what all layers share in that pass (`context.shared`).

    Attributes:
        positions: whether the transformer adds position vectors to its input.
    """

    positions: ClassVar[bool] = True

    def __init__(self, config: SequenceConfig, settings: Any, facts: dict[str, Tensor]) -> None:
        """`config` is the recommender's, `settings` its own, `facts` what `facts` gave for the training data."""
        super().__init__()
        del config, settings, facts

    @classmethod
    def facts(cls, settings: Any, split: Split) -> dict[str, Tensor]:
        """Tensors that it must know of the data; saved with the model."""
        del settings, split
        return {}

    @abstractmethod
    def layer(self) -> nn.Module:
        """One block's attention: `(query_BTD, memory_BTD, mask, context) -> (B, T, D)`, see `nn.SelfAttention`."""

    def forward(self, context: Context) -> Any:
        """What all layers share in a pass."""
        del context

    def enter(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The input of the transformer, before positions and norm."""
        del context
        return x_BTD


class Histories(NamedTuple):
    """The histories of a batch as rows of the training log: `start:stop` is what the encoder reads.

    Attributes:
        log: the training log, sorted by user and time.
        user: int64 `(B,)`. start, stop: int64 `(B,)` rows.
        known: int64 `(B,)`, the end of what training may know of; `stop + 1` where the event after is the last target.
    """

    log: Interactions
    user: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    known: NDArray[np.int64]

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of all events read, end to end `(n,)`, and the bounds `(B + 1,)` of each history among them."""
        return flat_rows(self.start, self.stop)


@dataclass(frozen=True)
class Setup:
    """What a training is about, for the parts that it consists of."""

    recommender: SequentialRecommender
    encoder: SequenceEncoder
    split: Split
    augmentation: Augmentation | None = None


class Augmentation(Part, ABC):
    """Makes another view of histories, on the host, a batch at a time; always fresh, never in place."""

    brings = ("contrastive",)

    def __init__(self, settings: Any, setup: Setup) -> None:
        """`setup.augmentation` is None here."""
        self.settings, self.setup = settings, setup

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1."""

    @abstractmethod
    def view(self, histories: Histories, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """New histories: item codes `(m,)` end to end (`MASK` where hidden), and the bounds `(B + 1,)` of each.

        Chance comes from `seed` and the history alone: in another batch the same history gets the same view.
        """


class Term(Part, nn.Module, ABC):
    """A named loss. The sum of all terms is minimised; each applies its own weight and owns its own networks."""

    def __init__(self, settings: Any, setup: Setup) -> None:
        super().__init__()
        self.settings = settings
        self.epoch = 1

    def active(self) -> bool:
        """Whether it counts at all; a term of weight 0 takes no part, so that it changes nothing, chance included."""
        return True

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1."""
        self.epoch = epoch

    def draw(self, histories: Histories, generator: np.random.Generator) -> Any:
        """What it needs of a batch beside the batch itself: tensors in tuples or dicts, made on the host.

        The generator is apart from that of the batches, so that drawing from it leaves them as they were.
        """
        del histories, generator

    @abstractmethod
    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """Weighted scalars by name; what `draw` gave is in `batch.extra[self.slug]`."""

    def diagnose(self) -> dict[str, float]:
        """Numbers by name that tell whether it teaches anything, as of the last batch."""
        return {}

    def attacks(self) -> tuple[str, list[nn.Parameter]] | None:
        """The name of a loss that trains *only* the parameters beside it, which no other loss then trains, or None."""
        return None


def part(kind: Kind, slug: str, summary: str) -> Callable[[PartClass], PartClass]:
    """Class decorator that files a part under its kind and slug."""

    def file(cls: PartClass) -> PartClass:
        cls.kind, cls.slug, cls.summary = kind, slug, summary
        _parts[kind, slug] = cls
        return cls

    return file


@functools.cache
def _discover() -> None:
    import vouch.recommenders.sequential as room

    for found in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        importlib.import_module(found.name)
    methods()  # other rooms may hold parts too


def parts(kind: Kind) -> dict[str, Any]:
    """All parts of a kind by slug, in alphabetical order."""
    _discover()
    return {slug: found for (owner, slug), found in sorted(_parts.items()) if owner == kind}


def find(kind: Kind, slug: str) -> Any:
    """A part.

    Raises:
        UnknownIdError: there is none; the message names near ones.
    """
    known = parts(kind)
    if slug not in known:
        raise UnknownIdError(f"there is no {kind} {slug!r}", hint=did_you_mean(slug, known))
    return known[slug]


def settings_class(slug: str) -> type[Config]:
    """The settings class that the parts of a slug share.

    Raises:
        UnknownIdError: no part has that slug.
    """
    _discover()
    for (_, owner), found in _parts.items():
        if owner == slug:
            settings: type[Config] = found.Config
            return settings
    raise UnknownIdError(f"there is no part {slug!r}", hint=did_you_mean(slug, {owner for _, owner in _parts}))
