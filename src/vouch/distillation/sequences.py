"""MEAL for recommenders: several sequential models distilled into one.

Source: arXiv 1812.02425, see `meal`. The teachers are trained first on the same split, or come from folders of saved
models; they read the batches of the student. What networks of different kinds have in common are positions: at every
position that is learned from, the student's scores of all items, and the outputs of its blocks, are pulled toward the
teacher's. Any encoder that reads from left to right can be the student: `distil_recommender` trains it from teachers
alone, or, with `label_weight`, also from the next item; the method `meal` is a SASRec trained so; and with
`objective+=meal` the teachers' loss stands beside a method's own.

What differs from pictures: an output `(B, T, D)` has a meaning at each position, so positions are not pooled; the values
of each are, to a common length. Discriminators read the last position of each history, the one that recommends.
In a large catalogue the scores of some items are compared, those of the histories and others drawn at random; then no
discriminator reads scores, because a place in that choice means another item in each batch. `alternating` trains both
sides in one optimizer step. The ramp of `eta` goes by epochs.

Shapes: `B` batch, `T` positions, `D` hidden size, `n` positions learned from, `N` items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
WATCHED = 128
"""Positions of a batch at which the distance from the teacher is measured for the report."""


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
        if "adversary" in values:  # the command line reads `none` as no value
            values["adversary"] = values["adversary"] or "none"
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
        self.last = {"kl": kl(ours[-1][:WATCHED], target[-1][:WATCHED])}
        if len(self.judges):
            found["adversary"] = self.game(ours, target, batch)
        return found

    def game(self, ours: Sequence[Tensor], target: Sequence[Tensor], batch: SequenceBatch) -> Tensor:
        """The sum of the discriminators' losses at the last position of each history, with what the student learns."""
        settings = self.settings
        rows = torch.zeros_like(batch.items, dtype=torch.bool)
        rows[torch.arange(len(rows), device=rows.device), batch.lengths - 1] = True
        last = rows.flatten()[batch.at]
        pairs = list(zip(ours, target, strict=True))[: len(self.judges)]
        s, t = [a[last] for a, _ in pairs], [b[last] for _, b in pairs]
        if not len(s[0]):  # no history of this batch is learned from at its end
            return ours[0].new_zeros(())
        steps = settings.ramp * self.epochs
        eta = self.share * settings.weight * settings.eta * (min(1.0, (self.epoch - 1) / steps) if steps else 1.0)
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

    def close(self) -> None:
        """Take the hooks off student and teachers."""
        for depths in (self.depths, *self.their_depths):
            depths.close()

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


@contextmanager
def taught(
    student: SequentialRecommender, teachers: Sequence[Any], split: Split, label_weight: float
) -> Iterator[None]:
    """Inside the block, `student.fit` learns from these teachers, and from the next item by a share.

    Raises:
        ConfigError: there is no teacher, or one cannot teach this student.
    """
    student.prepare(split.train)
    check_teachers(teachers, student, split)
    begin, made = student.begin, []

    def weighed(split: Split) -> Objective:
        objective = begin(split)
        if "meal" in objective.terms:
            labels = Weighted(objective.terms["next"], label_weight)
            objective.terms["next"] = objective.networks["next"] = labels
            teaching = objective.terms["meal"]
            assert isinstance(teaching, Teaching)
            teaching.share = 1 - label_weight
            made.append(teaching)
        return objective

    held: Any = student
    held.begin, held.teachers = weighed, tuple(teachers)
    try:
        yield
    finally:
        del held.begin, held.teachers
        for teaching in made:
            teaching.close()


@dataclass(frozen=True)
class TaughtReport(FitReport):
    """What came of a recommender's distillation.

    Attributes:
        teachers: the methods that taught. label_weight: the share of the next-item loss.
    """

    teachers: tuple[str, ...] = ()
    label_weight: float = 0.0


def distil_recommender(
    student: SequentialRecommender,
    teachers: Sequence[Any],
    split: Split,
    run: Run | None = None,
    *,
    label_weight: float = 0.0,
) -> TaughtReport:
    """Train any sequential recommender from trained ones, which are left as they were.

    The student needs `meal` in its objective, whose settings are the distillation's:
    `GRU4Rec(objective=["next", "meal"], **{"meal.adversary": "none"})`. It is saved, loaded and asked like any other.

    Args:
        teachers: trained sequential recommenders of the same items.
        label_weight: the share of the loss of the next item; at 0 no target is read in training. Validation, which
            chooses the epoch, reads those of `split.valid`.

    Raises:
        ConfigError: the student has no such objective, there is no teacher, or one cannot teach it.
        DataError, TrainingError: see the student's `fit`.
    """
    if not 0 <= label_weight <= 1:
        raise ConfigError(f"label_weight is {label_weight}", hint="it is a share, from 0 to 1")
    if isinstance(student, MEAL):
        raise ConfigError("meal has its own setting label_weight", hint="student.fit(split, run, teachers=teachers)")
    if "meal" not in student.config.terms():
        raise ConfigError(
            f"the objective of {student.card.slug} has no 'meal'", hint='give it objective=["next", "meal"]'
        )
    with taught(student, teachers, split, label_weight):
        report = student.fit(split, run)
    plain = {field.name: getattr(report, field.name) for field in fields(report)}
    return TaughtReport(**plain, teachers=tuple(t.card.slug for t in teachers), label_weight=label_weight)


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
        if teachers is None:
            self.prepare(split.train)
            teachers = find_teachers(self.config.part("meal").teachers, self, split, run)
        with taught(self, teachers, split, self.config.label_weight):
            return super().fit(split, run)
