"""MEAL for recommenders: several sequential models distilled into one.

Source: arXiv 1812.02425, see `meal`. The teachers are trained first on the same split, or come from folders of saved
models; they read the batches of the student. What networks of different kinds have in common are positions: at every
position that is learned from, the student's scores of all items, and the outputs of its blocks, are pulled toward the
teacher's. Use it with any encoder that reads from left to right: `objective+=meal`. The method `meal` is a SASRec that
learns from its teachers alone, or, with `label_weight`, also from the next item.

What differs from pictures: an output `(B, T, D)` has a meaning at each position, so positions are not pooled; the values
of each are, to a common length. Discriminators read the last position of each history, the one that recommends.
In a large catalogue the scores of some items are compared, those of the histories and others drawn at random; then no
discriminator reads scores, because a place in that choice means another item in each batch. `alternating` trains both
sides from one forward pass. Shapes: `B` batch, `T` positions, `D` hidden size, `n` positions learned from, `N` items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vouch.config import Choice, Config, Span, setting
from vouch.data import Split
from vouch.distillation.adversary import SIGN, Adversary, Judges
from vouch.distillation.taps import Pooling, Similarity, distances, kl, mixture, pooled
from vouch.distillation.teachers import Depths, at_positions, check_teachers, find_teachers, score_items
from vouch.errors import ConfigError
from vouch.nn.transformer import Context
from vouch.recommenders.sequential.base import Objective, SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.bert4rec import BERT4Rec
from vouch.recommenders.sequential.parts import Histories, Setup, Term, part
from vouch.recommenders.sequential.sasrec import SASRec, SASRecConfig
from vouch.registry import Card, register
from vouch.training import FitReport, Run

JUDGED = 128
"""Most values in the inner layers of a discriminator that reads scores."""


class MealSettings(Config):
    """Settings of the distillation of recommenders."""

    teachers: tuple[str, ...] = setting(
        ("sasrec", "gru4rec"), "methods that are trained first, with the student's sizes; or folders of saved models"
    )
    teacher: Literal["random", "mean"] = setting("random", "one teacher drawn for each batch, or the mean of all")
    weight: float = setting(1.0, "of the similarity of the scores", ge=0)
    similarity: Similarity = setting("cross-entropy", "how the student's outputs are pulled toward the teacher's")
    taps: int = setting(1, "outputs of blocks that are compared, the last one and some before it", ge=0)
    gamma: float = setting(0.1, "weight of the similarity of each block", ge=0, search=Span(0.01, 1.0, log=True))
    length: int = setting(0, "common length of the values at a position; 0 is the student's hidden_size", ge=0)
    pool: Pooling = setting("average", "how values become the common length")
    items: int = setting(5_000, "most items whose scores are compared in a batch", ge=2)
    adversary: Adversary = setting("grl", "what the student learns from the discriminators; none has none")
    eta: float = setting(0.1, "weight of what each discriminator teaches the student", ge=0, search=Choice((0.01, 0.1)))
    ramp: float = setting(1 / 3, "share of the epochs in which eta grows from 0", ge=0, le=1)

    def __init__(self, **values: Any) -> None:
        if isinstance(values.get("teachers"), str):
            values["teachers"] = tuple(name.strip() for name in values["teachers"].split(",") if name.strip())
        super().__init__(**values)


@part("objective", "meal", "the answers and block outputs of teachers at every position, with discriminators")
class Teaching(Term):
    """Similarity to the teachers, and the game with the discriminators."""

    Config = MealSettings

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """A student that fills in hidden items."""
        if isinstance(recommender, BERT4Rec):
            return "its losses stand at hidden items, where teachers that read from left to right have no answer"
        return None

    def __init__(self, settings: MealSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        recommender, config = setup.recommender, setup.recommender.config
        self.n_items, self.epochs, self.share = setup.encoder.n_items, int(config.epochs), 1.0
        self.length = settings.length or int(config.hidden_size)
        self.found: dict[str, float] = {}
        self.last: dict[str, Tensor] = {}
        given = list(getattr(recommender, "teachers", ()))
        if not given and settings.weight > 0:
            given = find_teachers(settings.teachers, recommender, setup.split, Run(seed=torch.initial_seed()))
        # in lists, so that no optimizer, checkpoint or saved model holds them
        self.theirs = [teacher.network.eval() for teacher in given]
        self.depths = Depths(setup.encoder)
        self.their_depths = [Depths(network) for network in self.theirs]
        lengths = [self.length] * settings.taps + ([self.n_items] if self.whole else [])
        self.judges = Judges([] if settings.adversary == "none" else lengths, most=JUDGED)

    @property
    def whole(self) -> bool:
        """Whether the scores of all items are compared."""
        return self.n_items <= self.settings.items

    def active(self) -> bool:
        """With a weight."""
        return bool(self.settings.weight > 0)

    def draw(self, histories: Histories, generator: np.random.Generator) -> Any:
        """The number of the teacher, and the items whose scores are compared, int64 `(m,)`; None for all."""
        k = int(generator.integers(0, len(self.theirs)))
        if self.whole:
            return k, None
        rows, _ = histories.rows()
        read = np.unique(histories.log.item[rows])
        drawn = generator.integers(0, self.n_items, self.settings.items)
        if len(read) > self.settings.items // 2:
            read = generator.choice(read, self.settings.items // 2, replace=False)
        return k, torch.from_numpy(np.unique(np.concatenate([read, drawn]))[: self.settings.items].astype(np.int64))

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """`similarity`, and `adversary` unless there is none."""
        settings, (chosen, items) = self.settings, batch.extra[self.slug]
        asked = range(len(self.theirs)) if settings.teacher == "mean" else [chosen]
        ours = self.vectors(encoder, hidden_BTD, self.depths, context, batch.at, items)
        theirs = [self.teach(k, batch, items) for k in asked]
        *taps, scores = zip(*theirs, strict=True)
        target = [*(torch.stack(tap).mean(0) for tap in taps), mixture(scores)]
        weights = [settings.gamma] * settings.taps + [1.0]
        near = [
            weight * (distances(s, t, settings.similarity) * batch.weight).sum()
            for weight, s, t in zip(weights, ours, target, strict=True)
        ]
        found = {"similarity": self.share * settings.weight * torch.stack(near).sum()}
        self.last = {"kl": kl(ours[-1], target[-1])}
        if len(self.judges):
            found["adversary"] = self.share * self.game(ours, target, batch)
        return found

    def game(self, ours: Sequence[Tensor], target: Sequence[Tensor], batch: SequenceBatch) -> Tensor:
        """The sum of the discriminators' losses at the last position of each history, with what the student learns."""
        settings = self.settings
        rows = torch.zeros_like(batch.items, dtype=torch.bool)
        rows[torch.arange(len(rows), device=rows.device), batch.lengths - 1] = True
        last = rows.flatten()[batch.at]
        pairs = list(zip(ours, target, strict=True))[: len(self.judges)]
        s, t = [a[last] for a, _ in pairs], [b[last] for _, b in pairs]
        steps = settings.ramp * self.epochs
        eta = settings.weight * settings.eta * (min(1.0, (self.epoch - 1) / steps) if steps else 1.0)
        told = torch.stack(self.judges.losses(s, t, [SIGN.get(settings.adversary, 0.0) * eta] * len(s)))
        self.last["discriminator"] = told.detach().mean()
        if settings.adversary == "alternating":
            return told.sum() + eta * torch.stack(self.judges.deceived(s)).sum()
        return told.sum()

    @torch.no_grad()
    def teach(self, k: int, batch: SequenceBatch, items: Tensor | None) -> list[Tensor]:
        """What a teacher gives for a batch."""
        network = self.theirs[k].to(batch.items.device)
        context = Context(user=batch.user)
        hidden = network(batch.items, batch.lengths, context)
        return self.vectors(network, hidden, self.their_depths[k], context, batch.at, items)

    def vectors(
        self,
        encoder: SequenceEncoder,
        hidden_BTD: Tensor,
        depths: Depths,
        context: Context,
        at: Tensor,
        items: Tensor | None,
    ) -> list[Tensor]:
        """At each position learned from: values of the taps `(n, length)`, and scores `(n, N)` or `(n, m)`."""
        outputs = depths.pick(context, hidden_BTD, self.settings.taps)
        taps = [pooled(at_positions(output, at), self.length, self.settings.pool) for output in outputs]
        scores = score_items(encoder, hidden_BTD.flatten(0, 1).index_select(0, at), items)
        return [*taps, scores]

    def diagnose(self) -> dict[str, float]:
        """How far the student's scores are from the teacher's, and how well discriminators tell them (0.69: not at all)."""
        return {f"meal.{name}": float(value) for name, value in self.last.items()}


class Weighted(Term):
    """A loss times a number; at 0 it is not computed, so the batch's targets are never read."""

    def __init__(self, inner: Term, weight: float) -> None:
        nn.Module.__init__(self)
        self.inner, self.weight, self.epoch = inner, weight, 1

    def begin_epoch(self, epoch: int) -> None:
        """Tell it."""
        self.inner.begin_epoch(epoch)

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """Its losses, weighted."""
        if self.weight == 0:
            return {self.inner.slug: hidden_BTD.new_zeros((), dtype=torch.float32)}
        found: dict[str, Tensor] = self.inner(encoder, hidden_BTD, batch, context)
        return {name: self.weight * value for name, value in found.items()}


class MEALConfig(SASRecConfig):
    """Settings of a SASRec that learns from teachers."""

    objective: tuple[str, ...] = setting(("next", "meal"), "losses that are added up; += adds one")
    label_weight: float = setting(
        0.0, "share of the next-item loss; the rest is the teachers'", ge=0, le=1, search=Span(0.0, 0.9)
    )


@register(
    Card(
        slug="meal",
        name="MEAL",
        area="distillation",
        summary="several trained models distilled into one",
        paper="1812.02425",
        year=2019,
    )
)
class MEAL(SASRec):
    """SASRec distilled from an ensemble; it is saved, loaded and asked without its teachers."""

    Config = MEALConfig
    teachers: Sequence[Any] = ()

    def _check(self) -> None:
        super()._check()
        if "meal" not in self.config.terms():
            raise ConfigError("the objective of meal has no 'meal'", hint="train sasrec instead")

    def fit(self, split: Split, run: Run | None = None, *, teachers: Sequence[Any] | None = None) -> FitReport:
        """Train the teachers, or take trained ones, then the student.

        The teachers' logs and checkpoints lie in `teachers`, so a stopped run goes on where it was.

        Raises:
            ConfigError: a teacher cannot teach this student. DataError, TrainingError: see `SASRec.fit`.
        """
        run = run or Run()
        self.prepare(split.train)
        if teachers is None:
            teachers = find_teachers(self.config.part("meal").teachers, self, split, run)
        else:
            check_teachers(teachers, self, split)
        self.teachers = teachers
        try:
            return super().fit(split, run)
        finally:
            self.teachers = ()

    def begin(self, split: Split) -> Objective:
        """With the shares of labels and teachers."""
        objective, share = super().begin(split), self.config.label_weight
        labels = Weighted(objective.terms["next"], share)
        objective.terms["next"] = objective.networks["next"] = labels
        teaching = objective.terms.get("meal")
        if isinstance(teaching, Teaching):
            teaching.share = 1 - share
        return objective
