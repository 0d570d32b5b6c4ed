"""The claims of AdaMerging (arXiv 2310.02575): coefficients learned without labels merge better than one fixed for all.

Protocol of all: experts of several tasks are trained from one base (`vouch.claims.experts`) and merged. Coefficients
are learned on one half of the tasks' test pictures without labels, with the paper's settings (from 0.3, Adam 1e-3, 500
updates on two batches of 16 pictures a task), and everything is reported on the other half. The paper adapts to the
pictures that it reports on; the variant `transductive` says what that does. The weight of Task Arithmetic is either
the 0.3 of the paper or chosen among ten on labelled validation pictures; TIES, Fisher and RegMean have the settings of
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vouch.claims.claim import Claim, Measurement, Scale, register_claim
from vouch.claims.experts import PICTURES, Collections, Experts, accuracy, experts, read_collections
from vouch.merging.adamerging import AdaMerged, adamerging, entropy
from vouch.merging.arithmetic import average, task_arithmetic
from vouch.merging.fisher import fisher, fisher_information
from vouch.merging.regmean import gram_matrices, regmean
from vouch.merging.stored import State
from vouch.merging.ties import ties
from vouch.merging.unlabelled import features

WEIGHTS = tuple(round(0.1 * number, 1) for number in range(1, 11))
STEPS = {"smoke": 20, "desk": 500, "full": 500}
READ = (50, 200, 500)
"""Updates after which the accuracy is read on the way."""
NOISE = 0.5
"""Standard deviation of what is added to pictures in [-1, 1] where they are corrupted."""


def by_fisher(made: Experts) -> State:
    """Fisher merging with the information of 256 pictures a task."""
    parts = zip(made.states, made.adapt, made.heads, strict=True)
    found = [fisher_information(made.encoder(state), x, head) for state, (x, _), head in parts]
    return fisher(made.states, found, made.base)


def by_regmean(made: Experts) -> State:
    """RegMean with 256 pictures a task."""
    parts = zip(made.states, made.adapt, strict=True)
    grams = [gram_matrices(made.encoder(state), x) for state, (x, _) in parts]
    return regmean(made.states, grams, made.base)


def tuned(made: Experts) -> tuple[State, float]:
    """Task Arithmetic with the weight that validation likes best, and that weight."""
    states = {weight: task_arithmetic(made.base, made.states, weight) for weight in WEIGHTS}
    best = max(WEIGHTS, key=lambda weight: float(np.mean(made.accuracy(states[weight], "valid"))))
    return states[best], best


OTHERS: dict[str, Callable[[Experts], State]] = {
    "averaging": lambda made: average(made.states, made.base),
    "arithmetic": lambda made: task_arithmetic(made.base, made.states, 0.3),
    "ties": lambda made: ties(made.base, made.states),
    "fisher": by_fisher,
    "regmean": by_regmean,
}
"""The other ways of merging without labels."""


def adapted(made: Experts, scale: Scale, seed: int, part: str = "adapt", **settings: Any) -> AdaMerged:
    """AdaMerging on one part of the pictures; by layer unless `settings` say otherwise."""
    inputs = getattr(made, part) if settings.get("objective") == "labels" else [x for x, _ in getattr(made, part)]
    settings = {"steps": STEPS[scale], "seed": seed, **settings}
    return adamerging(made.encoder(), made.base, made.states, inputs, made.heads, **settings)


def compared(made: Experts, baseline: Sequence[float], method: Sequence[float], **details: Any) -> Measurement:
    """The means over tasks, with every task in the details."""
    low, high = float(np.mean(baseline)), float(np.mean(method))
    rows = {"baseline_by_task": list(baseline), "method_by_task": list(method)}
    return Measurement(low, high, high - low, details={"tasks": made.tasks, **rows, **details})


def told(found: AdaMerged) -> dict[str, Any]:
    """How a learning went."""
    report, rows = found.report, found.coefficients.expand(len(found.layers), -1).mean(1).tolist()
    return {
        "coefficients_by_task": found.coefficients.view(-1, len(found.tasks)).mean(0).tolist(),
        "coefficients_by_layer": dict(zip(found.layers, rows, strict=True)),
        "entropy_first_and_last": {task: [curve[0], curve[-1]] for task, curve in report.entropy.items()},
        "least_spread": {task: min(curve) for task, curve in report.spread.items()},
        "steps": report.steps,
        "stopped": report.stopped,
        "merging_seconds": report.seconds,
        "merging_memory_mb": report.memory_mb,
    }


class _AdaMerging(Claim):
    slug: ClassVar[str] = "adamerging"
    data: ClassVar[Mapping[str, str]] = PICTURES
    metric = "accuracy, mean of the tasks"
    method = "layer-wise AdaMerging"

    def read(self, source: str) -> Collections:
        """The pictures of all tasks."""
        return read_collections(source)


@register_claim
class Accuracy(_AdaMerging):
    """Better than Task Arithmetic, even where that has labels to choose its weight."""

    variant = "accuracy"
    statement = (
        "Layer-wise AdaMerging, without labels, has a higher mean accuracy than Task Arithmetic whose weight was chosen "
        "on labelled pictures."
    )
    baseline = "Task Arithmetic, weight chosen on validation"
    reported = (
        "paper, 8 tasks, CLIP ViT-B/32: 80.2 against 69.1 (recalled; 68.0 re-measured) of Task Arithmetic with 0.3; "
        "adapted to the very pictures that it reports on"
    )

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Merge every way there is."""
        made = experts(dataset, seed, scale)
        low, weight = tuned(made)
        way: dict[int, float] = {}

        def read(step: int, coefficients: Tensor) -> None:
            if step in READ:
                rows = dict(zip(layers, coefficients.tolist(), strict=True))
                way[step] = float(np.mean(made.accuracy(task_arithmetic(made.base, made.states, rows))))

        layers = list(made.base)
        found = adapted(made, scale, seed, on_step=read)
        others: dict[str, State] = {
            "base": made.base,
            **{name: other(made) for name, other in OTHERS.items()},
            "task_wise": adapted(made, scale, seed, by="task").state,
            "task_wise_plus": adapted(made, scale, seed, by="task", keep=0.2).state,
            "plus": adapted(made, scale, seed, keep=0.2).state,
            "labels": adapted(made, scale, seed, part="valid", objective="labels").state,
        }
        return compared(
            made,
            made.accuracy(low),
            made.accuracy(found.state),
            weight=weight,
            **{f"{name}_accuracy": float(np.mean(made.accuracy(state))) for name, state in others.items()},
            expert_accuracy=float(np.mean(made.expert_accuracy())),
            accuracy_after_steps={str(step): value for step, value in way.items()},
            **told(found),
        )


class _Pair(_AdaMerging):
    """Two ways of merging.

    Attributes:
        low, high: a name in `OTHERS`, or settings of AdaMerging.
    """

    low: ClassVar[str | Mapping[str, Any]]
    high: ClassVar[Mapping[str, Any]] = {}

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Merge both ways."""
        made = experts(dataset, seed, scale)
        low = self.low
        state = OTHERS[low](made) if isinstance(low, str) else adapted(made, scale, seed, **low).state
        found = adapted(made, scale, seed, **self.high)
        return compared(made, made.accuracy(state), made.accuracy(found.state), **told(found))


@register_claim
class Fixed(_Pair):
    """The paper's own comparison."""

    variant, low = "fixed", "arithmetic"
    statement = "Layer-wise AdaMerging has a higher mean accuracy than Task Arithmetic with the weight 0.3."
    baseline = "Task Arithmetic 0.3"
    reported = "paper: 80.2 against 69.1 (recalled; 68.0 re-measured)"


@register_claim
class TaskWise(_Pair):
    """One coefficient a task already helps."""

    variant, low, high = "taskwise", "arithmetic", {"by": "task"}
    statement = "Task-wise AdaMerging has a higher mean accuracy than Task Arithmetic with the weight 0.3."
    baseline, method = "Task Arithmetic 0.3", "task-wise AdaMerging"
    reported = "paper: 71.1 against 69.1 (recalled); re-measured by others 68.7 against 68.0"


@register_claim
class LayerWise(_Pair):
    """Coefficients by layer are better than by task."""

    variant, low = "layerwise", {"by": "task"}
    statement = "Layer-wise AdaMerging has a higher mean accuracy than task-wise AdaMerging."
    baseline = "task-wise AdaMerging"
    reported = "paper: 80.2 against 71.1"


@register_claim
class PlusPlus(_Pair):
    """The entries that TIES keeps are better than all."""

    variant, low, high = "plusplus", {}, {"keep": 0.2}
    statement = "Layer-wise AdaMerging++ (TIES keeps 20 %) has a higher mean accuracy than layer-wise AdaMerging."
    baseline, method = "layer-wise AdaMerging", "layer-wise AdaMerging++"
    reported = "paper: 81.2 against 80.2"


@register_claim
class BeyondTies(_Pair):
    """Better than TIES."""

    variant, low = "ties", "ties"
    statement = "Layer-wise AdaMerging has a higher mean accuracy than TIES (keeps 20 %, sum, weight 0.3)."
    baseline = "TIES"
    reported = "paper: 80.2 against 72.4 (recalled; 72.2 re-measured)"


@register_claim
class BeyondRegMean(_Pair):
    """Better than RegMean, which sees the same pictures and needs no steps."""

    variant, low = "regmean", "regmean"
    statement = "Layer-wise AdaMerging has a higher mean accuracy than RegMean (0.9) with as many inputs at hand."
    baseline = "RegMean"
    reported = "paper: 80.2 against 71.8 (recalled); re-measured by others, RegMean has 82.4"


@register_claim
class Transductive(_AdaMerging):
    """What adapting to the reported pictures does to the numbers."""

    variant = "transductive"
    statement = "Adapting to the pictures reported on gives a higher mean accuracy there than adapting to others."
    baseline, method = "adapted to the other half", "adapted to the half reported on"
    reported = "the paper adapts to the pictures that it reports on, and does not compare"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Adapt to either half."""
        made = experts(dataset, seed, scale)
        other, same = (adapted(made, scale, seed, part) for part in ("adapt", "test"))
        return compared(made, made.accuracy(other.state), made.accuracy(same.state), **told(same))


@register_claim
class Unseen(_AdaMerging):
    """Merged weights also serve a task that had no part in them."""

    variant = "unseen"
    statement = (
        "With each task left out in turn, the mean accuracy on it is higher where the others were merged by layer-wise "
        "AdaMerging than by Task Arithmetic with the weight 0.3."
    )
    baseline = "Task Arithmetic 0.3"
    reported = "paper: better on average, not on every task; re-measured by others on two tasks: 62.5 against 59.1"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Leave each out."""
        made = experts(dataset, seed, scale)
        low: list[float] = []
        high: list[float] = []
        for out, (head, (x, y)) in enumerate(zip(made.heads, made.test, strict=True)):
            rest = [task for task in range(len(made.tasks)) if task != out]
            states, heads = [made.states[task] for task in rest], [made.heads[task] for task in rest]
            inputs = [made.adapt[task][0] for task in rest]
            found = adamerging(made.encoder(), made.base, states, inputs, heads, steps=STEPS[scale], seed=seed)
            for state, values in ((task_arithmetic(made.base, states, 0.3), low), (found.state, high)):
                values.append(accuracy(features(made.encoder(state), x, head=head), y))
        base = float(np.mean(made.accuracy(made.base)))
        return compared(made, low, high, base_accuracy=base)


@register_claim
class Corrupted(_AdaMerging):
    """Adapting to noisy pictures helps on noisy pictures."""

    variant = "corrupted"
    statement = (
        "On pictures with noise, layer-wise AdaMerging, adapted to pictures with such noise, has a higher mean accuracy "
        "than Task Arithmetic with the weight 0.3."
    )
    baseline = "Task Arithmetic 0.3"
    reported = "paper: better on average on seven corruptions, not on every task"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Add noise to both halves."""
        made = experts(dataset, seed, scale)
        generator = torch.Generator().manual_seed(seed)
        for part in (made.adapt, made.test):
            part[:] = [((x + NOISE * torch.randn(x.shape, generator=generator)).clamp(-1, 1), y) for x, y in part]
        found = adapted(made, scale, seed)
        low = made.accuracy(task_arithmetic(made.base, made.states, 0.3))
        return compared(made, low, made.accuracy(found.state), experts_by_task=made.expert_accuracy(), **told(found))


@register_claim
class Proxy(_AdaMerging):
    """Entropy stands for the loss that needs labels."""

    variant = "proxy"
    statement = (
        "Over the pictures of a task, the entropy and the cross-entropy of what Task Arithmetic (0.3) gives have a rank "
        "correlation above 0.5, mean of the tasks."
    )
    metric = "Spearman's rank correlation, mean of the tasks"
    effect = "the correlation less 0.5"
    baseline, method = "0.5", "rank correlation of entropy and cross-entropy"
    reported = "paper, figure: high (value not known)"

    def measure(self, dataset: Collections, scale: Scale, seed: int) -> Measurement:
        """Correlate, for the merged network, the base and each expert."""
        made = experts(dataset, seed, scale)
        found: dict[str, list[dict[str, Tensor]]] = {
            "merged": [dict(task_arithmetic(made.base, made.states, 0.3))] * len(made.tasks),
            "base": [made.base] * len(made.tasks),
            "expert": made.states,
        }
        rows = {name: self.correlations(made, states) for name, states in found.items()}
        value = float(np.mean(rows["merged"]))
        details = {"tasks": made.tasks, **{f"{name}_by_task": row for name, row in rows.items()}}
        return Measurement(0.5, value, value - 0.5, details=details)

    def correlations(self, made: Experts, states: Sequence[State]) -> list[float]:
        """That of each task, with one state for each."""
        from scipy.stats import spearmanr

        rows = []
        for state, head, (x, y) in zip(states, made.heads, made.test, strict=True):
            logits = features(made.encoder(state), x, head=head)
            loss = F.cross_entropy(logits, y, reduction="none")
            rows.append(float(cast(Any, spearmanr(entropy(logits).numpy(), loss.numpy())).statistic))
        return rows
