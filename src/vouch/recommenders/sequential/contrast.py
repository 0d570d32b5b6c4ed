"""Contrast between two augmented views of a history, and the random augmentations of CL4SRec and CoSeRec.

Sources: CL4SRec (arXiv 2010.14395), CoSeRec (arXiv 2108.06479); the flattened form is that of CoSeRec and TiCoSeRec.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vouch.config import Config, setting
from vouch.data.graphs import cached, co_occurrence
from vouch.nn.transformer import Context
from vouch.recommenders.sequential import augment
from vouch.recommenders.sequential.augment import Mode, Ragged, Similar, Use
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.parts import Augmentation, Histories, Setup, Term, part

DAY = 86_400.0


class ContrastiveConfig(Config):
    """Settings of the contrast between views."""

    weight: float = setting(0.1, "weight of the loss", ge=0)
    temperature: float = setting(1.0, "of the softmax", gt=0)
    of: Literal["all", "padded", "last"] = setting(
        "all", "what represents a view: all its outputs end to end, the same with padding before them, or the last one"
    )
    cosine: bool = setting(False, "compare directions only")
    warmup_epochs: int = setting(0, "first epochs without it", ge=0)


def pair_contrast(one: Tensor, two: Tensor, temperature: float, user: Tensor | None = None) -> Tensor:
    """Mean over 2B anchors of `-log(exp(z_a.z_b / t) / sum over c != a of exp(z_a.z_c / t))`.

    Args:
        one, two: `(B, F)` views of the same histories. user: `(B,)`; other histories of the same user are no negatives.
    """
    z = torch.cat([one, two]).float()
    B = len(one)
    logits = z @ z.T / temperature
    owner = torch.arange(B, device=z.device) if user is None else user
    same = (owner.unsqueeze(1) == owner).repeat(2, 2)
    pair = torch.arange(2 * B, device=z.device).roll(B)
    same[torch.arange(2 * B, device=z.device), pair] = False
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), pair)


def dense(items: NDArray[np.int64], bounds: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Left-aligned codes `(B, T)`, -1 after the end, and lengths `(B,)`."""
    lengths = np.diff(bounds)
    real = np.arange(lengths.max(initial=1)) < lengths[:, None]
    out = np.full(real.shape, -1, dtype=np.int64)
    out[real] = items
    return torch.from_numpy(out), torch.from_numpy(lengths)


def flattened(hidden_BTD: Tensor, lengths: Tensor, before_LD: Tensor | None = None) -> Tensor:
    """All outputs end to end, `(B, T D)` or `(B, L D)`, the last of each history in the same place.

    Where a history has none there are zeros, or the outputs `before_LD` of so many places, at least `T`.
    """
    B, T, D = hidden_BTD.shape
    L = T if before_LD is None else len(before_LD)
    source = torch.arange(L, device=hidden_BTD.device) - (L - lengths.unsqueeze(1))  # right-aligned
    moved = hidden_BTD.gather(1, source.clamp(min=0).unsqueeze(-1).expand(B, L, D))
    before = hidden_BTD.new_zeros(()) if before_LD is None else before_LD.to(moved.dtype)
    return torch.where((source < 0).unsqueeze(-1), before, moved).flatten(1)


@part("objective", "contrastive", "agreement between two augmented views of a history")
class Contrastive(Term):
    """InfoNCE between the two views that the augmentation makes of each history, fresh in every epoch."""

    Config = ContrastiveConfig

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """It needs views."""
        if recommender.config.augment == "none":
            return "it compares two views of a history, and augment is 'none': set augment, for example to 'cl4srec'"
        return one_vector(recommender)

    def __init__(self, settings: ContrastiveConfig, setup: Setup) -> None:
        super().__init__(settings, setup)
        assert setup.augmentation is not None
        self.augmentation, self.longest = setup.augmentation, int(setup.recommender.reads)

    def active(self) -> bool:
        """Only with a weight."""
        return bool(self.settings.weight > 0)

    def draw(self, histories: Histories, generator: np.random.Generator) -> Any:
        """Two views, one under the other: codes `(2B, T)` and lengths `(2B,)`.

        They come from the seed of the epoch's generator, not from its state: other batches give the same views.
        """
        if self.epoch <= self.settings.warmup_epochs:
            return None
        seeds = generator.bit_generator.seed_seq.generate_state(2, np.uint64)
        views = [self.augmentation.view(histories, int(seed)) for seed in seeds]
        items = np.concatenate([items for items, _ in views])
        bounds = np.concatenate([views[0][1], views[0][1][-1] + views[1][1][1:]])
        return dense(items, bounds)

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """`{"contrastive": ...}`, nothing while it warms up."""
        del hidden_BTD, context
        if self.slug not in batch.extra or len(batch.items) < 2:  # one history has nothing to differ from
            return {}
        items, lengths = batch.extra[self.slug]
        hidden = encoder(items, lengths)
        if self.settings.of == "all":
            z = flattened(hidden, lengths)
        elif self.settings.of == "padded":
            z = flattened(hidden, lengths, self.padding(encoder, items))
        else:
            z = hidden[torch.arange(len(items), device=items.device), lengths - 1]
        z = F.normalize(z.float(), dim=-1) if self.settings.cosine else z
        one, two = z.chunk(2)
        return {"contrastive": self.settings.weight * pair_contrast(one, two, self.settings.temperature, batch.user)}

    def padding(self, encoder: SequenceEncoder, like: Tensor) -> Tensor:
        """The outputs `(L, D)` of places before a history: they see no item, so they are the same for all."""
        nothing = torch.full((1, self.longest), -1, device=like.device)
        found: Tensor = encoder(nothing, torch.tensor([self.longest], device=like.device))[0]
        return found


def one_vector(recommender: SequentialRecommender) -> str | None:
    """The reason why a loss on one vector for each position does not fit, or None."""
    several = getattr(recommender.config, "interests", 1) > 1
    return "it needs one vector at each position, and this encoder gives several interests" if several else None


class RandomConfig(Config):
    """Settings of the random augmentations."""

    crop: float = setting(0.6, "share of the history that is kept", gt=0, le=1)
    mask: float = setting(0.3, "share of the history that is hidden", gt=0, le=1)
    reorder: float = setting(0.6, "share of the history that is shuffled", gt=0, le=1)


class RatesConfig(RandomConfig):
    """Settings of augmentations with similar items."""

    crop: float = setting(0.7, "share of the history that is kept", gt=0, le=1)
    mask: float = setting(0.5, "share of the history that is hidden", gt=0, le=1)
    reorder: float = setting(0.2, "share of the history that is shuffled", gt=0, le=1)
    substitute: float = setting(0.1, "share of the history that is replaced by similar items", gt=0, le=1)
    insert: float = setting(0.5, "share of the history after which a similar item is added", gt=0, le=1)
    short: int = setting(12, "histories up to this length are not cropped or reordered", ge=1)
    similarity: Literal["memory", "model", "hybrid"] = setting(
        "hybrid", "where similar items come from: co-occurrence, item vectors, or the better of both"
    )
    hybrid_after: int = setting(80, "epochs in which co-occurrence alone decides; for hybrid", ge=0)


class _Operators(Augmentation):
    """Draws one operator for each history and applies it."""

    operators: ClassVar[tuple[str, ...]] = ("crop", "mask", "reorder")

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """Views are histories, so any encoder can read them."""
        return one_vector(recommender)

    def __init__(self, settings: Any, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.longest = int(setup.recommender.reads)

    def mode(self, operator: str) -> Mode:
        """Where an operator acts."""
        del operator
        return "random"

    def gaps(self, histories: Histories, rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Time to the next event, which operators at random have no need of."""
        del histories, bounds
        return np.zeros(len(rows))

    def pick(self, ragged: Ragged, histories: Histories) -> NDArray[np.int64]:
        """The operator of each history `(B,)`, as its number in `operators`; -1 leaves it as it is."""
        del histories
        return augment.below(len(self.operators), ragged.chance(Use.OPERATOR))

    def view(self, histories: Histories, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each history under an operator of its own."""
        rows, bounds = histories.rows()
        items, gaps = histories.log.item[rows].astype(np.int64), self.gaps(histories, rows, bounds)
        # a history is known by its first row in the log
        seeds = augment.scrambled(np.array([seed], np.uint64)) + histories.start.astype(np.uint64)
        ragged = Ragged(items, bounds, gaps, seeds)
        picked = self.pick(ragged, histories)
        pieces, places = [], []
        for number in range(-1, len(self.operators)):
            mine = np.flatnonzero(picked == number)
            if len(mine):
                part = ragged.take(mine)
                pieces.append(part if number < 0 else self.apply(self.operators[number], part))
                places.append(mine)
        made = augment.join(pieces, places, self.longest)
        return made.items, made.bounds

    def apply(self, operator: str, ragged: Ragged) -> Ragged:
        """One operator."""
        plain = {"crop": augment.crop, "mask": augment.mask, "reorder": augment.reorder}[operator]
        return plain(ragged, getattr(self.settings, operator), self.mode(operator))


@part("augment", "cl4srec", "crop, mask or reorder at random places")
class CL4SRec(_Operators):
    """One of the three operators of CL4SRec."""

    Config = RandomConfig


@part("augment", "crop", "crop at a random place")
class Crop(_Operators):
    """Crop only."""

    Config = RandomConfig
    operators = ("crop",)


@part("augment", "mask", "hide random items")
class Mask(_Operators):
    """Mask only."""

    Config = RandomConfig
    operators = ("mask",)


@part("augment", "reorder", "shuffle a random window")
class Reorder(_Operators):
    """Reorder only."""

    Config = RandomConfig
    operators = ("reorder",)


@part("augment", "coserec", "crop, mask, reorder, substitute or insert at random places")
class CoSeRec(_Operators):
    """One of five operators; on short histories one of substitute, insert and mask."""

    Config = RatesConfig
    operators = ("substitute", "insert", "mask", "crop", "reorder")

    def __init__(self, settings: RatesConfig, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.memory = from_graph(setup)
        self.now = self.memory

    def pick(self, ragged: Ragged, histories: Histories) -> NDArray[np.int64]:
        """Uniform over all five, or over the first three where the history is short."""
        del histories
        return augment.below(np.where(ragged.lengths > self.settings.short, 5, 3), ragged.chance(Use.OPERATOR))

    def apply(self, operator: str, ragged: Ragged) -> Ragged:
        """One operator; two of them need similar items."""
        if operator not in ("substitute", "insert"):
            return super().apply(operator, ragged)
        with_items = augment.substitute if operator == "substitute" else augment.insert
        return with_items(ragged, getattr(self.settings, operator), self.mode(operator), self.similar())

    def begin_epoch(self, epoch: int) -> None:
        """Compare the item vectors anew where they count."""
        settings = self.settings
        if settings.similarity == "memory" or (settings.similarity == "hybrid" and epoch <= settings.hybrid_after):
            self.now = self.memory
            return
        model = from_vectors(self.setup.encoder.item_vectors().detach())
        self.now = model if settings.similarity == "model" else augment.hybrid(self.memory, model)

    def similar(self) -> Similar:
        """By co-occurrence, by the model, or the better of both."""
        return self.now


def from_graph(setup: Setup) -> Similar:
    """The item most often taken by the same users, in the manner of ItemCF-IUF, from the training log."""
    # All pairs, for the smallest; those that never meet have 0, so that is the smallest unless all meet.
    graph = cached(co_occurrence, setup.split.train, setup.split.dataset.origin, neighbors=setup.split.train.n_items)
    item, score = graph.best()
    n = graph.n_items
    low = float(graph.weight.min()) if len(graph.weight) == n * (n - 1) else 0.0
    high = float(graph.weight.max(initial=0.0))
    scaled = (np.where(item < 0, low, score) - low) / max(high - low, 1e-12)
    return Similar(item, scaled.astype(np.float64))


@torch.no_grad()
def from_vectors(vectors: Tensor, block: int = 4096) -> Similar:
    """The item of the greatest product of vectors `(N, D)`, scaled by the least and greatest product of any pair."""
    best, where, low, high = [], [], np.inf, -np.inf
    for start in range(0, len(vectors), block):
        scores = (vectors[start : start + block] @ vectors.T).float()
        own = torch.arange(len(scores), device=scores.device)
        scores[own, own + start] = torch.inf
        low = min(low, float(scores.min()))
        scores[own, own + start] = -torch.inf
        found, index = scores.max(1)
        high = max(high, float(found.max()))
        best.append(found.cpu().numpy())
        where.append(index.cpu().numpy())
    score = (np.concatenate(best).astype(np.float64) - low) / max(high - low, 1e-12)
    return Similar(np.concatenate(where).astype(np.int64), score)
