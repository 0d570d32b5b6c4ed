"""The claims of Representation Surgery (arXiv 2402.02705): merged features lie off, and a small correction brings them back.

Protocol of all: experts of several tasks are trained from one base (`vouch.claims.experts`) and merged. Corrections are
trained on one half of the tasks' test pictures without labels, with the paper's settings (rank 16, 1,000 updates of 16
pictures a task), and everything is reported on the other half. The weight of Task Arithmetic is chosen on labelled
validation pictures; TIES and AdaMerging have their papers' settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from vouch.claims.claim import Claim, Measurement, Scale, register_claim
from vouch.claims.experts import PICTURES, Collections, Experts, accuracy, experts, read_collections
from vouch.merging.adamerging import adamerging
from vouch.merging.arithmetic import average, task_arithmetic
from vouch.merging.controls import linear_map, mean_shift, relabelled_head
from vouch.merging.stored import State
from vouch.merging.surgery import Correction, Surgery
from vouch.merging.ties import ties
from vouch.merging.unlabelled import features

WEIGHTS = tuple(round(0.1 * number, 1) for number in range(1, 11))
STEPS = {"smoke": 40, "desk": 1000, "full": 1000}
ADAPTING = {"smoke": 20, "desk": 500, "full": 500}
SHARES = (0.01, 0.1, 0.3, 0.5, 1.0)
"""Of the stream at which the online way is read."""
LAYERS = ("first_norm", "norms.0", "norms.1")
"""Of the encoder, besides its output."""


def arithmetic(made: Experts) -> tuple[State, float]:
    """Task Arithmetic with the weight that validation likes best, and that weight."""
    states = {weight: task_arithmetic(made.base, made.states, weight) for weight in WEIGHTS}
    best = max(WEIGHTS, key=lambda weight: float(np.mean(made.accuracy(states[weight], "valid"))))
    return states[best], best


def adapted(made: Experts, scale: Scale, seed: int) -> State:
    """Layer-wise AdaMerging on the pictures that corrections are trained on."""
    inputs = [x for x, _ in made.adapt]
    found = adamerging(made.encoder(), made.base, made.states, inputs, made.heads, steps=ADAPTING[scale], seed=seed)
    return found.state


class Operated:
    """A merged encoder with corrections, and what it gives.

    Attributes:
        plain, corrected: accuracy of each task on the pictures to report on, without and with.
        before, after: bias of each task there, as a share of the individual features' mean size.
    """

    def __init__(
        self, made: Experts, state: State, scale: Scale, seed: int, part: str = "adapt", **settings: Any
    ) -> None:
        self.made, encoder = made, made.encoder(state)
        self.surgery = Surgery(encoder, **{"steps": STEPS[scale], **settings})
        inputs = {task: x for task, (x, _) in zip(made.tasks, getattr(made, part), strict=True)}
        self.report = self.surgery.fit(dict(zip(made.tasks, made.states, strict=True)), inputs, seed=seed)
        self.plain, self.corrected = made.accuracy(encoder), []
        self.before: list[float] = []
        self.after: list[float] = []
        for number, (task, (x, y)) in enumerate(zip(made.tasks, made.test, strict=True)):
            self.corrected.append(accuracy(made.heads[number](self.surgery(x, task)), y))
            bias = self.surgery.bias(task, made.states[number], x)[""]
            plain = bias.before if len(self.surgery.positions) == 1 else self._bias(number, x)
            self.before.append(float(plain.mean()) / bias.scale)
            self.after.append(float(bias.after.mean()) / bias.scale)

    def _bias(self, task: int, x: Tensor) -> Tensor:
        """Without any correction, where layers before the output have one."""
        own = features(self.made.encoder(self.made.states[task]), x)
        return (own - features(self.surgery.encoder, x)).abs().mean(0)


def controlled(made: Experts, state: State, kind: str, scale: Scale, seed: int) -> list[float]:
    """Accuracy of each task with another correction: `shift`, `linear`, or `heads`, on the same pictures."""
    merged, found = made.encoder(state), []
    for task, (x, _) in enumerate(made.adapt):
        z, own = features(merged, x), features(made.encoder(made.states[task]), x)
        correct: nn.Module = nn.Identity()
        head = made.heads[task]
        if kind == "heads":
            head = relabelled_head(head, z, head(own).argmax(1), steps=STEPS[scale], seed=seed)
        else:
            correct = {"shift": mean_shift, "linear": linear_map}[kind](z, own)
        test, y = made.test[task]
        found.append(accuracy(head(correct(features(merged, test))), y))
    return found


def online(made: Experts, state: State, seed: int) -> dict[str, list[float]]:
    """Accuracy of each task along a stream in which each picture comes once, one at a time."""
    surgery = Surgery(made.encoder(state), batch_size=1, passes=1)
    test = {
        task: (features(surgery.encoder, x), y, head, len(stream))
        for task, (x, y), head, (stream, _) in zip(made.tasks, made.test, made.heads, made.adapt, strict=True)
    }
    curves: dict[str, list[float]] = {task: [] for task in made.tasks}

    def read(task: str, step: int, correction: Correction) -> None:
        z, y, head, stream = test[task]
        if step in {max(1, round(share * stream)) for share in SHARES}:
            curves[task].append(accuracy(head(correction(z)), y))

    surgery.fit(
        dict(zip(made.tasks, made.states, strict=True)),
        {task: x for task, (x, _) in zip(made.tasks, made.adapt, strict=True)},
        seed=seed,
        on_step=read,
    )
    return curves


def compared(made: Experts, baseline: list[float], method: list[float], **details: Any) -> Measurement:
    """The means over tasks, with every task and the experts in the details."""
    low, high = float(np.mean(baseline)), float(np.mean(method))
    rows = {"baseline_by_task": baseline, "method_by_task": method}
    return Measurement(low, high, high - low, details={"tasks": made.tasks, **rows, **details})


class _Surgery(Claim):
    slug: ClassVar[str] = "surgery"
    data: ClassVar[Mapping[str, str]] = PICTURES
    metric = "accuracy, mean of the tasks"
    baseline = "Task Arithmetic, weight chosen on validation"
    method = "the same with corrections of rank 16"

    def read(self, source: str) -> Collections:
        """The pictures of all tasks."""
        return read_collections(source)


@register_claim
class Accuracy(_Surgery):
    """Corrections raise the accuracy of a merged encoder."""

    variant = "accuracy"
    statement = "Corrections trained without labels raise the mean accuracy of experts merged by Task Arithmetic."
    reported = (
        "paper, 8 tasks, CLIP ViT-B/32: 69.1 to 80.9 with Task Arithmetic, 65.8 to 80.0 with averaging, 72.4 to 83.2 with "
        "TIES (the values without are recalled); calibrated on the very pictures that it reports on"
    )

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Correct every merge, every way, and the same with the pictures that are reported on."""
        made = experts(dataset, seed, scale)
        state, weight = arithmetic(made)
        found = Operated(made, state, scale, seed)
        others = {
            "averaging": average(made.states, made.base),
            "ties": ties(made.base, made.states),
        }
        more: dict[str, Any] = {}
        for name, other in others.items():
            operated = Operated(made, other, scale, seed)
            more[f"{name}_accuracy"] = float(np.mean(operated.plain))
            more[f"{name}_corrected_accuracy"] = float(np.mean(operated.corrected))
        for kind in ("shift", "linear", "heads"):
            more[f"{kind}_accuracy"] = float(np.mean(controlled(made, state, kind, scale, seed)))
        seen = Operated(made, state, scale, seed, part="test")
        return compared(
            made,
            found.plain,
            found.corrected,
            weight=weight,
            base_accuracy=float(np.mean(made.accuracy(made.base))),
            expert_accuracy=float(np.mean(made.expert_accuracy())),
            **more,
            calibrated_on_reported_accuracy=float(np.mean(seen.corrected)),
            bias_before=found.before,
            bias_after=found.after,
            online=online(made, state, seed),
            online_shares=list(SHARES),
            parameters_by_task=found.report.parameters[made.tasks[0]],
            surgery_seconds=found.report.seconds,
        )


@register_claim
class LessBias(_Surgery):
    """The bias falls, on pictures that the corrections were not trained on."""

    variant = "bias"
    statement = (
        "On pictures not used for calibration the mean distance to the experts' features falls by at least a tenth."
    )
    metric = "mean |z_k - z| as a share of mean |z_k|, mean of the tasks"
    effect = "0.9 x the bias without corrections, less the bias with them"
    reported = "paper, figures: lower for every task and merging method (no number known)"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Measure both on the reporting half."""
        made = experts(dataset, seed, scale)
        found = Operated(made, arithmetic(made)[0], scale, seed)
        low, high = float(np.mean(found.before)), float(np.mean(found.after))
        rows = {"before_by_task": found.before, "after_by_task": found.after}
        return Measurement(low, high, 0.9 * low - high, details={"tasks": made.tasks, **rows})


@register_claim
class OnAdaMerging(_Surgery):
    """Corrections also help where the merge itself was adapted."""

    variant = "adamerging"
    statement = "Corrections raise the mean accuracy of experts merged by layer-wise AdaMerging."
    baseline = "layer-wise AdaMerging"
    reported = "paper, 8 tasks, CLIP ViT-B/32: 80.2 to 86.1"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Merge by AdaMerging and correct."""
        made = experts(dataset, seed, scale)
        found = Operated(made, adapted(made, scale, seed), scale, seed)
        return compared(made, found.plain, found.corrected, bias_before=found.before, bias_after=found.after)


class _Control(_Surgery):
    kind: ClassVar[str]
    reported = "not compared in the paper"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """The same merge, corrected either way."""
        made = experts(dataset, seed, scale)
        state, weight = arithmetic(made)
        found = Operated(made, state, scale, seed)
        other = controlled(made, state, self.kind, scale, seed)
        return compared(made, other, found.corrected, weight=weight, plain_accuracy=float(np.mean(found.plain)))


@register_claim
class BeyondShift(_Control):
    """The control: is a constant shift enough?"""

    variant, kind = "shift", "shift"
    statement = "Corrections of rank 16 give a higher mean accuracy than adding the mean difference of the features."
    baseline = "merged features plus the mean difference to the expert's"


@register_claim
class BeyondLinear(_Control):
    """The control: is a linear map, which is solved and not trained, enough?"""

    variant, kind = "linear", "linear"
    statement = "Corrections of rank 16 give a higher mean accuracy than a full linear map by ridge regression."
    baseline = "ridge regression from merged to the expert's features, 128 x 128 numbers"


@register_claim
class BeyondHeads(_Control):
    """The control: do retrained heads do as well?"""

    variant, kind = "heads", "heads"
    statement = "Corrections of rank 16 give a higher mean accuracy than heads retrained on the experts' predictions."
    baseline = "heads retrained on classes that the experts predict, as many updates"


@register_claim
class HigherRank(_Surgery):
    """A larger rank corrects more."""

    variant = "rank"
    statement = "Corrections of rank 64 give a higher mean accuracy than corrections of rank 4."
    baseline = "rank 4"
    method = "rank 64"
    reported = "paper: accuracy rises with the rank (values not known)"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Correct with several ranks."""
        made = experts(dataset, seed, scale)
        state, _ = arithmetic(made)
        found = {rank: Operated(made, state, scale, seed, rank=rank) for rank in (4, 16, 64)}
        bias = {f"bias_rank_{rank}": float(np.mean(each.after)) for rank, each in found.items()}
        plain, middle = float(np.mean(found[4].plain)), float(np.mean(found[16].corrected))
        more = {"plain_accuracy": plain, "rank_16_accuracy": middle, **bias}
        return compared(made, found[4].corrected, found[64].corrected, **more)


@register_claim
class Distance(_Surgery):
    """The distance that is minimised is of little matter."""

    variant = "distance"
    statement = (
        "Corrections trained by squared differences have a mean accuracy at most 0.01 below those of the paper's L1."
    )
    effect = "method less baseline, plus 0.01"
    baseline = "corrections of rank 16, by L1"
    method = "corrections of rank 16, by squared differences"
    reported = "paper: about equal (recalled; no number known)"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Correct with either distance."""
        made = experts(dataset, seed, scale)
        state, _ = arithmetic(made)
        found = {name: Operated(made, state, scale, seed, distance=name) for name in ("l1", "l2")}
        bias = {f"bias_{name}": float(np.mean(each.after)) for name, each in found.items()}
        plain = float(np.mean(found["l1"].plain))
        row = compared(made, found["l1"].corrected, found["l2"].corrected, plain_accuracy=plain, **bias)
        return replace(row, effect=row.effect + 0.01)


@register_claim
class EveryLayer(_Surgery):
    """Corrections inside the network correct more than one at its output, with as many numbers and updates."""

    variant = "layers"
    statement = (
        "Corrections of rank 16 after every layer give a higher mean accuracy than one after the last with as many "
        "numbers and updates."
    )
    baseline = "a correction of the output, with the numbers and updates of all layers'"
    method = "corrections of rank 16 of every layer's output"
    reported = "follow-up paper (arXiv 2410.14389): higher than with one at the output (values not known)"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Correct the output, and all layers."""
        made = experts(dataset, seed, scale)
        state, _ = arithmetic(made)
        inner, budget, steps = 4 if scale == "smoke" else 16, made.budget, (len(LAYERS) + 1) * STEPS[scale]
        every = Operated(made, state, scale, seed, rank=inner, layers=LAYERS)
        rank = inner * (len(LAYERS) * budget.width + budget.features) // budget.features
        last = Operated(made, state, scale, seed, rank=rank, steps=steps)
        numbers = {"baseline": last, "method": every}
        more: dict[str, float] = {
            f"{who}_parameters": each.report.parameters[made.tasks[0]] for who, each in numbers.items()
        }
        more |= {f"{who}_bias": float(np.mean(each.after)) for who, each in numbers.items()}
        return compared(made, last.corrected, every.corrected, plain_accuracy=float(np.mean(last.plain)), **more)
