"""The claims of MEAL (arXiv 1812.02425, 1908.08520): one network learns from an ensemble, by blocks, and from an adversary.

Protocol on pictures: three networks, of different widths and one with residual blocks, are trained on labels; then students of
one start, all with the same batches and as many steps. The epoch is chosen by the accuracy on 300 pictures of the
training part, and the test pictures are answered once. With noise, 40 % of the labels of the training part are drawn
anew, those of the 300 among them, so that nobody sees a clean one.
Protocol on histories: leave-one-out, every item ranked, as many epochs for all, the epoch chosen on validation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from vouch import registry
from vouch.claims.claim import Claim, Measurement, Scale, register_claim
from vouch.claims.protocol import cut, measured
from vouch.data import Dataset, split
from vouch.distillation.images import BLOCKS, PictureBatches, Pictures, SmallNet, answers, parts, watching, with_noise
from vouch.distillation.meal import distil
from vouch.distillation.sequences import distil_recommender
from vouch.distillation.sgd import train_on_labels
from vouch.distillation.taps import Ensemble, kl, mixture
from vouch.distillation.teachers import Together
from vouch.training import Run

if TYPE_CHECKING:
    from vouch.data.images import Images

NETWORKS: tuple[tuple[tuple[int, int, int], bool], ...] = (
    ((12, 24, 32), False),
    ((16, 24, 40), False),
    ((8, 16, 32), True),
)
"""Widths of the teachers' blocks, and whether these are residual."""
STUDENT = (12, 24, 32)
EPOCHS = {"smoke": 2, "desk": 14, "full": 60}
WIDER = {"smoke": 1, "desk": 1, "full": 3}
"""Factor on all widths."""
PICTURES = {"smoke": "drawn", "desk": "fashion_mnist_4443", "full": "cifar10_10k"}
NOISE = 0.4
WAYS: dict[str, dict[str, Any]] = {
    "meal": {"taps": BLOCKS},
    "cooperative": {"taps": BLOCKS, "adversary": "cooperative"},
    "alternating": {"taps": BLOCKS, "adversary": "alternating"},
    "squares": {"taps": BLOCKS, "similarity": "l2"},
    "blocks": {"taps": BLOCKS, "adversary": "none"},
    "random": {"adversary": "none"},
    "mean": {"adversary": "none", "teacher": "mean"},
}
"""Ways to learn from teachers; `labels` is the other one. `random` and `mean` see the logits alone."""
CONTROLS = ("meal", "blocks", "random", "mean", "labels")
NAMES = {
    "meal": "MEAL: blocks and logits, gradient reversal",
    "cooperative": "the same discriminators, not reversed",
    "alternating": "the same game in two steps",
    "squares": "MEAL with squared differences of the outputs as similarity",
    "blocks": "blocks and logits, no discriminators",
    "random": "logits of one teacher a batch",
    "mean": "mean softmax of all teachers",
    "labels": "the same network, on labels",
}


@dataclass(frozen=True)
class School:
    """Trained teachers, and all that students of one seed share."""

    train: Pictures
    valid: Pictures
    test: Pictures
    teachers: list[SmallNet]
    make: Callable[..., SmallNet]
    epochs: int
    seed: int

    def student(self, way: str, **settings: Any) -> SmallNet:
        """One more student, from the start that all have."""
        run = Run(seed=1_000 + self.seed)
        network, batches = self.make(STUDENT, False, 99), PictureBatches(self.train)
        given: dict[str, Any] = {"epochs": self.epochs, "run": run, "validate": watching(self.valid)}
        if way == "labels":
            train_on_labels(network, batches, **given)
        else:
            distil(network, self.teachers, batches, **{**given, **WAYS[way], **settings})
        return network

    def right(self, network: torch.nn.Module) -> Any:
        """Which test pictures are named rightly, float64 `(Q,)`."""
        return (answers(network, self.test.x).argmax(1) == self.test.y).numpy().astype(np.float64)


def school(images: Images, scale: Scale, seed: int, *, noise: float = 0.0, kinds: int = len(NETWORKS)) -> School:
    """Train the first `kinds` teachers."""
    train, valid, test = parts(images, 300 if scale != "smoke" else 100, seed)
    classes, epochs = len(images.classes), EPOCHS[scale]
    if noise:
        y = with_noise(torch.cat([train.y, valid.y]), noise, classes, seed)
        train, valid = Pictures(train.x, y[: len(train.y)]), Pictures(valid.x, y[len(train.y) :])

    def make(widths: tuple[int, ...], residual: bool, number: int) -> SmallNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 * seed + number)
            wider = [WIDER[scale] * width for width in widths]
            return SmallNet(classes, wider, residual=residual, channels=images.pixels.shape[-1])

    teachers = []
    for number, (widths, residual) in enumerate(NETWORKS[:kinds]):
        teacher = make(widths, residual, number)
        run = Run(seed=100 * seed + number)
        train_on_labels(teacher, PictureBatches(train), epochs=epochs, run=run, validate=watching(valid))
        teachers.append(teacher)
    return School(train, valid, test, teachers, make, epochs, seed)


class _Pictures(Claim):
    """One way to learn against another; the other controls go into the details.

    Attributes:
        low, high: names of the two ways. also: ways that are measured beside them. noise: share of labels drawn anew.
    """

    slug: ClassVar[str] = "meal"
    data = PICTURES
    metric = "test accuracy"
    low: ClassVar[str]
    high: ClassVar[str] = "meal"
    also: ClassVar[tuple[str, ...]] = ()
    noise: ClassVar[float] = 0.0

    def read(self, source: str) -> Any:
        """Labelled pictures."""
        from vouch.data.images import read_images

        return read_images(source)

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Train teachers and students, and answer the test pictures."""
        made = school(dataset, scale, seed, noise=self.noise)
        ways = list(dict.fromkeys((self.low, self.high, *self.also)))
        students = {way: made.student(way) for way in ways}
        found = {way: made.right(student) for way, student in students.items()}
        singles = [float(made.right(teacher).mean()) for teacher in made.teachers]
        logits = [answers(teacher, made.test.x) for teacher in made.teachers]
        mean = mixture(logits)
        details = {
            **{f"accuracy_{way}": float(cases.mean()) for way, cases in found.items()},
            **{f"kl_to_ensemble_{way}": float(kl(answers(s, made.test.x), mean)) for way, s in students.items()},
            "ensemble": float(made.right(Ensemble(made.teachers)).mean()),
            "best_teacher": max(singles),
            "teachers": singles,
        }
        low, high = found[self.low], found[self.high]
        a, b = float(low.mean()), float(high.mean())
        return Measurement(a, b, b - a, low, high, details)


@register_claim
class Accuracy(_Pictures):
    """What is promised: a better network for the same cost when it is used."""

    variant = "accuracy"
    statement = (
        "A network distilled by MEAL from three teachers answers more test pictures rightly than the same network "
        "trained on labels with as many steps."
    )
    low, also = "labels", ("blocks", "random", "mean")
    baseline, method = NAMES["labels"], NAMES["meal"]
    reported = "paper, ImageNet: ResNet-50 top-1 error 23.85 on labels, 21.79 by MEAL (2.06 points)"


@register_claim
class Discriminators(_Pictures):
    """The ablation that matters: is it the game that helps?"""

    variant = "adversary"
    statement = "MEAL answers more test pictures rightly than the same distillation without discriminators."
    low, also = "blocks", ("cooperative", "alternating")
    baseline, method = NAMES["blocks"], NAMES["meal"]
    reported = "paper, CIFAR-10 ablation: a few tenths of a point (recalled)"


@register_claim
class Blocks(_Pictures):
    """Do the blocks say more than the answers?"""

    variant = "blocks"
    statement = (
        "MEAL answers more test pictures rightly than distillation of the logits alone, of a random teacher each batch."
    )
    low = "random"
    baseline, method = NAMES["random"], NAMES["meal"]
    reported = "paper: similarity over several blocks is better than over the logits (no number known)"


@register_claim
class Similarity(_Pictures):
    """The similarity that the authors chose."""

    variant = "similarity"
    statement = (
        "MEAL with soft cross-entropy as similarity answers more test pictures rightly than with squared differences."
    )
    low = "squares"
    baseline, method = NAMES["squares"], "MEAL with soft cross-entropy as similarity"
    reported = "paper: cross-entropy is the best similarity (recalled; no number known)"


@register_claim
class Teachers(_Pictures):
    """More teachers teach better."""

    variant = "teachers"
    statement = "MEAL from three teachers answers more test pictures rightly than MEAL from the first of them."
    baseline, method = "MEAL from one teacher", "MEAL from three teachers"
    reported = "paper: more teachers help (recalled; no number known)"

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Train three teachers and two students."""
        made = school(dataset, scale, seed)
        low = made.right(replace(made, teachers=made.teachers[:1]).student("meal"))
        high = made.right(made.student("meal"))
        a, b = float(low.mean()), float(high.mean())
        details = {"teachers": [float(made.right(teacher).mean()) for teacher in made.teachers]}
        return Measurement(a, b, b - a, low, high, details)


@register_claim
class Mean(_Pictures):
    """Against what is simplest."""

    variant = "mean"
    statement = (
        "MEAL answers more test pictures rightly than distillation of the mean softmax of all teachers, which asks "
        "three teachers a step in place of one."
    )
    low = "mean"
    baseline, method = NAMES["mean"], NAMES["meal"]
    reported = "the authors' later MEAL V2 (arXiv 2009.08453) uses this mean; ResNet-50 80.67 against 78.21 of MEAL"


@register_claim
class Noise(_Pictures):
    """The extension: teachers of noisy labels still teach better than these labels."""

    variant = "noise"
    statement = (
        "Where 40 % of the labels were drawn anew, a network distilled by MEAL from teachers of those labels answers "
        "more clean test pictures rightly than the same network trained on them."
    )
    noise = NOISE
    low, also = "labels", ("mean",)
    baseline, method = NAMES["labels"], NAMES["meal"]
    reported = "extension, iMaterialist: top-3 error 1.15 points below a strong ResNet-101"


@register_claim
class Identical(_Pictures):
    """Several copies of one teacher: the student must come near it."""

    variant = "identical"
    statement = (
        "A student distilled by MEAL from three copies of one teacher answers nearer to it on test pictures than the "
        "same network trained on labels: its KL divergence from the teacher is at most half."
    )
    metric = "KL divergence from the teacher"
    effect = "0.5 x the divergence of the network trained on labels, less the student's"
    baseline, method = NAMES["labels"], "MEAL from three copies of one teacher"
    reported = "no number; it follows from the method"

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Train one teacher and two students."""
        made = school(dataset, scale, seed, kinds=1)
        made = replace(made, teachers=made.teachers * 3)
        students = {way: made.student(way) for way in ("labels", "meal")}
        target = answers(made.teachers[0], made.test.x)
        given = {way: answers(student, made.test.x) for way, student in students.items()}
        away = {way: float(kl(logits, target)) for way, logits in given.items()}
        same = {f"agree_{w}": float((g.argmax(1) == target.argmax(1)).float().mean()) for w, g in given.items()}
        right = {f"accuracy_{way}": float(made.right(student).mean()) for way, student in students.items()}
        details = {**same, **right, "teacher": float(made.right(made.teachers[0]).mean())}
        return Measurement(away["labels"], away["meal"], 0.5 * away["labels"] - away["meal"], details=details)


USERS = 2_000
SEQUENTIAL: dict[str, dict[str, Any]] = {
    "smoke": {"epochs": 2, "hidden_size": 16, "max_length": 10},
    "desk": {"epochs": 12, "hidden_size": 32, "max_length": 20, "evaluate_every": 2, "learning_rate": 3e-3},
    "full": {"epochs": 100, "hidden_size": 64, "evaluate_every": 2},
}
TEACHERS = ("sasrec", "gru4rec")
"""Methods that teach."""
COMPARED = 1_024
"""Items compared in a batch, by the students and by the loss of next items, which draws as many."""


@register_claim
class Sequences(Claim):
    """An ensemble of recommenders in one."""

    slug: ClassVar[str] = "meal"
    variant = "sequences"
    statement = (
        "A GRU4Rec distilled by MEAL from a SASRec and a GRU4Rec has a higher test NDCG@10 than the same GRU4Rec "
        "trained on next items for as many epochs."
    )
    metric = "NDCG@10"
    baseline = "GRU4Rec, on next items"
    method = "GRU4Rec, distilled by MEAL without next items"
    reported = "none: the paper has no recommenders"
    data = {"smoke": "world", "desk": "amazon_beauty", "full": "amazon_beauty"}
    student: ClassVar[str] = "gru4rec"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train teachers and students, and rank."""
        made = split(cut(dataset, USERS, longest=True) if scale == "desk" else dataset)
        shared = {"batch_size": 128, "patience": 1_000, "dropout": 0.3, **SEQUENTIAL[scale]}
        kind = functools.partial(registry.method(self.student), **shared)
        teachers = [registry.method(slug)(**shared) for slug in TEACHERS]
        for number, teacher in enumerate(teachers, start=1):
            teacher.fit(made, Run(seed=1_000 * number + seed))
        plain = kind()
        plain.fit(made, Run(seed=seed))
        students = {}
        for name, adversary in (("meal", "grl"), ("no_adversary", "none")):
            student = kind(objective=["next", "meal"], **{"meal.adversary": adversary, "meal.items": COMPARED})
            distil_recommender(student, teachers, made, Run(seed=seed))
            students[name] = student
        others = {"ensemble": Together(teachers), "no_adversary": students["no_adversary"]}
        others.update({f"teacher_{slug}": teacher for slug, teacher in zip(TEACHERS, teachers, strict=True)})
        return measured(made, plain, students["meal"], others=others, **students["meal"].diagnostics)
