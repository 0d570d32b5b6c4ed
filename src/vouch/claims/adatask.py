"""The claims of AdaTask (arXiv 2211.15055): accounts by task lift the dominated tasks and even out who moves what.

AdaTask moves the shared part by up to `T` times the learning rate, so both sides may choose between comparable steps:
the ordinary optimizer `lr` and `lr * T`, AdaTask `lr` and `lr / T`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vouch.claims.claim import Claim, Measurement, Scale, register_claim
from vouch.claims.tasks import Parts, Side, Tasks, alone, means, sparse, told, train
from vouch.multitask.adatask import AdaTaskAdam

RATE = 2e-3
SHARED = {"accumulators": "shared"}
"""Of the optimizers: the ordinary one, whose parts by task can be metered."""
OTHERS = {name: Side(name) for name in ("uw", "dwa", "gradnorm", "mgda", "pcgrad", "cagrad")}


def plain(tasks: int, optimizer: str = "adam", rate: float = RATE) -> Side:
    """The ordinary optimizer with equal weights."""
    return Side("adatask", SHARED, (rate, rate * tasks), optimizer=optimizer)


def ours(tasks: int, optimizer: str = "adam", rate: float = RATE) -> Side:
    """AdaTask."""
    return Side("adatask", {}, (rate, rate / tasks), optimizer=optimizer)


class _Pair(Tasks):
    slug = "adatask"
    baseline = "Adam with equal weights, lr or lr x T"
    method = "AdaTask (Adam), lr or lr / T"
    optimizer, rate = "adam", RATE
    metered = False

    def pair(self, parts: Parts, scale: Scale, seed: int) -> tuple[Any, Any]:
        """Both sides, trained."""
        T = len(parts[0].tasks)
        sides = (side(T, self.optimizer, self.rate) for side in (plain, ours))
        first, second = (train(parts, side, scale, seed, metered=self.metered) for side in sides)
        return first, second


@register_claim
class Average(_Pair):
    """The mean over all tasks."""

    variant = "auc"
    statement = "AdaTask has a higher mean test AUC over all tasks than Adam with equal weights."
    reported = "paper: the best average of all methods on TikTok and WeChat (recalled; numbers not known)"

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Both sides; single tasks and every balancer for the record."""
        parts = dataset.parts(seed)
        low, high = self.pair(parts, scale, seed)
        details: dict[str, Any] = {
            "baseline": told(low),
            "method": told(high),
            "step_ratio": high.seconds / low.seconds,
        }
        details |= {name: told(train(parts, side, scale, seed)) for name, side in OTHERS.items()}
        details["single"] = alone(parts, scale, seed)
        a, b = low.test["AUC"], high.test["AUC"]
        return Measurement(a, b, b - a, details=details)


@register_claim
class Sparse(_Pair):
    """The tasks with few positives."""

    variant = "sparse"
    metric = "mean test AUC over the sparse tasks"
    statement = (
        "AdaTask has a higher mean test AUC over the tasks with under 10 % positives than Adam with equal weights."
    )
    reported = "paper: large gains on the dominated tasks, the dominating one kept (numbers not known)"

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Both sides."""
        parts = dataset.parts(seed)
        low, high = self.pair(parts, scale, seed)
        tasks = [task for task in sparse(parts[0]) if not np.isnan(low.test[f"AUC {task}"])]
        a, b = (means(found.test, tasks)["AUC"] for found in (low, high))
        return Measurement(a, b, b - a, details={"baseline": told(low), "method": told(high), "tasks": tasks})


@register_claim
class Census(Average):
    """Six tasks of another kind."""

    variant = "census"
    data = {"smoke": "world", "desk": "adult_census", "full": "adult_census"}
    statement = "On six tasks of the Adult census, AdaTask has a higher mean test AUC than Adam with equal weights."


@register_claim
class Dominance(_Pair):
    """What the method is for, in its own measure."""

    variant = "dominance"
    metric = "mean over shared values of the largest task's share of the squared updates"
    effect = "baseline less method"
    statement = "Accounts by task make the shares of the tasks in the updates of shared parameters more even."
    reported = "paper: shares of shared layers move from near 0 or 1 to near 1/T (figures)"
    metered = True

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Both sides, metered."""
        parts = dataset.parts(seed)
        low, high = self.pair(parts, scale, seed)
        assert low.meter is not None and high.meter is not None
        a, b = low.meter.imbalance(), high.meter.imbalance()
        details = {"baseline_shares": low.meter.report(), "method_shares": high.meter.report()}
        return Measurement(a, b, a - b, details={**details, "even": 1 / len(parts[0].tasks)})


@register_claim
class Best(_Pair):
    """Against the balancer that validation likes best."""

    variant = "balancers"
    baseline = "the best on validation of UW, DWA, GradNorm, MGDA, PCGrad, CAGrad"
    statement = "AdaTask has a higher mean test AUC than the balancer, of six, that validation chooses."
    reported = "paper: ahead of loss balancing and gradient directions on all data (numbers not known)"

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """All balancers, and AdaTask."""
        parts = dataset.parts(seed)
        rivals = {name: train(parts, side, scale, seed) for name, side in OTHERS.items()}
        name = max(rivals, key=lambda each: rivals[each].valid)
        high = train(parts, ours(len(parts[0].tasks)), scale, seed)
        a, b = rivals[name].test["AUC"], high.test["AUC"]
        return Measurement(
            a, b, b - a, details={"chosen": name, **{each: told(found) for each, found in rivals.items()}}
        )


@dataclass(frozen=True)
class Generated:
    """Data that a seed makes."""

    name: str = "generated: y_k = sigma_k tanh((B + E_k) x)"
    fingerprint: str = "sigma 1 and 10, 40 inputs, 10 outputs"


SIGMA = (1.0, 10.0)


@register_claim
class Toy(Claim):
    """Two regressions that differ in size alone, where the truth is known (the toy of GradNorm, arXiv 1711.02257)."""

    slug, variant = "adatask", "toy"
    data = {"smoke": "generated", "desk": "generated", "full": "generated"}
    metric = "test error by variance of the task with small values"
    effect = "baseline less method"
    baseline = "Adam with equal weights, lr or lr x T"
    method = "AdaTask (Adam), lr or lr / T"
    statement = "AdaTask fits the task with small values better than Adam with equal weights."
    reported = "paper: on generated regressions the dominated task gains most (figures)"

    def read(self, source: str) -> Generated:
        """Nothing to read."""
        del source
        return Generated()

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Both, each at two rates, of which the validation rows choose."""
        del dataset
        steps = 60 if scale == "smoke" else 1500
        data = regressions(seed)
        sides: dict[str, Any] = {}
        for name, accounts, rates in (("baseline", "shared", (1e-3, 2e-3)), ("method", "task", (1e-3, 5e-4))):
            tries = [fit_toy(data, accounts, rate, steps, seed) for rate in rates]
            sides[name] = min(tries, key=lambda found: sum(found["valid"]))
        a, b = (sides[name]["test"][0] for name in ("baseline", "method"))
        return Measurement(a, b, a - b, details=sides)


Rows = tuple[Tensor, list[Tensor]]


def regressions(seed: int, rows: int = 2000) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test rows: inputs `(n, 40)` and for each task outputs `(n, 10)`."""
    g = torch.Generator().manual_seed(seed)
    base = 0.3 * torch.randn(10, 40, generator=g)
    own = [0.1 * torch.randn(10, 40, generator=g) for _ in SIGMA]

    def drawn() -> Rows:
        x = torch.randn(rows, 40, generator=g)
        return x, [sigma * torch.tanh(x @ (base + e).T) for sigma, e in zip(SIGMA, own, strict=True)]

    return drawn(), drawn(), drawn()


def fit_toy(data: tuple[Rows, Rows, Rows], accounts: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Train two layers of 64 and a linear head a task; error by variance of each task, on validation and test."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(64, 10) for _ in SIGMA)
    optimizer = AdaTaskAdam([*body.parameters(), *heads.parameters()], len(SIGMA), lr=rate, accumulators=accounts)
    x, y = data[0]
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        h = body(x[rows])
        optimizer.step([(head(h) - each[rows]).square().mean() for head, each in zip(heads, y, strict=True)])
    found: dict[str, Any] = {"learning_rate": rate}
    with torch.no_grad():
        for name, (inputs, outputs) in (("valid", data[1]), ("test", data[2])):
            h = body(inputs)
            errors = zip(heads, outputs, strict=True)
            found[name] = [float((head(h) - each).square().mean() / each.var()) for head, each in errors]
    return found


@register_claim
class Small(_Pair):
    """The same with the rate of the ordinary optimizer for both: what a user who swaps the optimizer gets."""

    variant = "swap"
    statement = "Put in place of Adam at the same learning rate, AdaTask has a higher mean test AUC."
    baseline, method = "Adam with equal weights, lr", "AdaTask (Adam), lr"
    reported = "paper: one learning rate for all methods (recalled)"

    def pair(self, parts: Parts, scale: Scale, seed: int) -> tuple[Any, Any]:
        """Both at one rate."""
        T = len(parts[0].tasks)
        sides = [replace(side, rates=(RATE,)) for side in (plain(T), ours(T))]
        first, second = (train(parts, side, scale, seed) for side in sides)
        return first, second

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Both sides."""
        return both(*self.pair(dataset.parts(seed), scale, seed))


def both(low: Any, high: Any) -> Measurement:
    """The mean AUC of two sides."""
    a, b = low.test["AUC"], high.test["AUC"]
    return Measurement(a, b, b - a, details={"baseline": told(low), "method": told(high)})


@register_claim
class RMSprop(_Pair):
    """With another optimizer."""

    variant = "rmsprop"
    optimizer = "rmsprop"
    baseline, method = "RMSprop with equal weights, lr or lr x T", "AdaTask (RMSprop), lr or lr / T"
    statement = "With RMSprop, AdaTask has a higher mean test AUC over all tasks than equal weights."
    reported = "paper: the method is given for AdaGrad, RMSProp and Adam; results by optimizer not known"

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Both sides."""
        return both(*self.pair(dataset.parts(seed), scale, seed))


@register_claim
class Adagrad(RMSprop):
    """And with the one whose steps only shrink, at the rate that PyTorch takes for it."""

    variant = "adagrad"
    optimizer, rate = "adagrad", 1e-2
    baseline, method = "AdaGrad with equal weights, lr or lr x T", "AdaTask (AdaGrad), lr or lr / T"
    statement = "With AdaGrad, AdaTask has a higher mean test AUC over all tasks than equal weights."
