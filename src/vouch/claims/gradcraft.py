"""The claims of GradCraft (arXiv 2407.19682): gradients of equal size, then free of conflicts, serve every task better.

All sides choose between the same two learning rates, by mean validation AUC.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vouch.claims.claim import Measurement, Scale, register_claim
from vouch.claims.tasks import Parts, Side, Tasks, network
from vouch.multitask.balancers import make
from vouch.multitask.directions import pcgrad
from vouch.multitask.gradcraft import gradcraft
from vouch.multitask.learn import Learner, TableBatches
from vouch.multitask.report import Report

CRAFT = Side("gradcraft", {"tau": 0.3})


class _Pair(Tasks):
    slug = "gradcraft"
    method = "GradCraft (tau 0.3, eps 0)"
    reported = "paper, WeChat, six tasks, PLE, one seed: mean AUC .8385; equal weights .8369, PCGrad .8371, UW .8358"


@register_claim
class Average(_Pair):
    """Against the plain sum."""

    variant = "auc"
    sides = (Side(), CRAFT)
    others = {
        "uw": Side("uw"), "dwa": Side("dwa"), "gradnorm": Side("gradnorm"), "mgda": Side("mgda"),
        "pcgrad": Side("pcgrad"), "gradvac": Side("gradvac"), "cagrad": Side("cagrad"), "adatask": Side("adatask"),
        "tau 0": Side("gradcraft", {"tau": 0.0}), "tau 1": Side("gradcraft", {"tau": 1.0}),
        "cone": Side("gradcraft", {"tau": 0.3, "projection": "cone"}),
    }  # fmt: skip
    with_single = True
    baseline = "the sum of the losses"
    statement = "GradCraft has a higher mean test AUC over all tasks than training on the sum of the losses."


@register_claim
class Sparse(_Pair):
    """Where the paper's gain is."""

    variant = "sparse"
    sides = (Side(), CRAFT)
    judged = "sparse"
    metric = "mean test AUC over the sparse tasks"
    baseline = "the sum of the losses"
    statement = (
        "GradCraft has a higher mean test AUC over the tasks with under 10 % positives than the sum of the losses."
    )
    reported = "paper: nearly the whole gain comes from the rarest task, follow: .8888 against .8810 of equal weights"


@register_claim
class OverPCGrad(_Pair):
    """Against projection one by one."""

    variant = "pcgrad"
    sides = (Side("pcgrad"), CRAFT)
    baseline = "PCGrad"
    statement = "GradCraft has a higher mean test AUC over all tasks than PCGrad."


@register_claim
class Magnitude(_Pair):
    """Does the first of its two steps matter?"""

    variant = "magnitude"
    sides = (Side("gradcraft", {"tau": 0.0}), CRAFT)
    baseline = "GradCraft without magnitudes (tau 0)"
    statement = "Bringing gradients part of the way to one size (tau 0.3) has a higher mean test AUC than leaving them."
    reported = "paper, WeChat: .8385 with tau tuned, .8370 with tau 0"


@register_claim
class NotAll(_Pair):
    """And all the way?"""

    variant = "full-size"
    sides = (Side("gradcraft", {"tau": 1.0}), CRAFT)
    baseline = "GradCraft with equal sizes (tau 1)"
    statement = "Bringing gradients part of the way to one size (tau 0.3) has a higher mean test AUC than all the way."
    reported = "paper, WeChat: .8385 with tau tuned, .8365 with tau 1"


@register_claim
class Margin(_Pair):
    """Does it help to ask for more than no conflict?"""

    variant = "eps"
    sides = (CRAFT, Side("gradcraft", {"tau": 0.3, "eps": 0.05}))
    baseline, method = "GradCraft (tau 0.3, eps 0)", "GradCraft (tau 0.3, eps 0.05)"
    statement = "Asking for a cosine of 0.05 with tasks that conflicted has a higher mean test AUC than asking for 0."
    reported = "paper, WeChat: .8385 with eps tuned among 1e-10 to 1e-8, .8382 with eps 0; such eps are below rounding"


@register_claim
class Cone(_Pair):
    """Does it matter that the paper's rule can leave conflicts?"""

    variant = "cone"
    sides = (CRAFT, Side("gradcraft", {"tau": 0.3, "projection": "cone"}))
    baseline, method = "GradCraft, the paper's projection", "GradCraft, projection on the cone of all tasks"
    statement = "A projection that leaves no conflict at all has a higher mean test AUC than the paper's."
    reported = "not in the paper"


@register_claim
class Experts(_Pair):
    """On the paper's architecture."""

    variant = "ple"
    sides = (Side(architecture="ple"), Side("gradcraft", {"tau": 0.3}, architecture="ple"))
    baseline = "the sum of the losses, PLE"
    method = "GradCraft (tau 0.3, eps 0), PLE"
    statement = "On a PLE, GradCraft has a higher mean test AUC over all tasks than the sum of the losses."


@register_claim
class MixtureOfExperts(_Pair):
    """And on another one."""

    variant = "mmoe"
    sides = (Side(architecture="mmoe"), Side("gradcraft", {"tau": 0.3}, architecture="mmoe"))
    baseline = "the sum of the losses, MMoE"
    method = "GradCraft (tau 0.3, eps 0), MMoE"
    statement = "On an MMoE, GradCraft has a higher mean test AUC over all tasks than the sum of the losses."
    reported = "not in the paper"


@register_claim
class Census(_Pair):
    """Six tasks of another kind."""

    variant = "census"
    data = {"smoke": "world", "desk": "adult_census", "full": "adult_census"}
    sides = (Side(), CRAFT)
    others = {"pcgrad": Side("pcgrad"), "uw": Side("uw"), "cagrad": Side("cagrad")}
    with_single = True
    baseline = "the sum of the losses"
    statement = "On six tasks of the Adult census, GradCraft has a higher mean test AUC than the sum of the losses."


@register_claim
class Conflicts(_Pair):
    """What the projection is for, in its own measure, along the training of GradCraft."""

    variant = "conflicts"
    metric = "share of ordered pairs of tasks of which the first's changed gradient opposes the second"
    effect = "baseline less method"
    baseline, method = "PCGrad, on the same gradients", "GradCraft's projection"
    statement = "In training, GradCraft's projection leaves fewer conflicts between tasks than PCGrad's."
    reported = (
        "paper: a global guarantee; its rule covers only tasks that conflicted at first (none of it measured there)"
    )

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """One training; each step's gradients go through both projections and through that on the cone."""
        shares = left(dataset.parts(seed), 1 if scale == "smoke" else 4, seed)
        a, b = shares["pcgrad"], shares["paper"]
        return Measurement(a, b, a - b, details=shares)


def left(parts: Parts, epochs: int, seed: int) -> dict[str, float]:
    """Mean share of conflicts before (`before`) and after each projection, over the steps of a training."""
    learner = Learner(network(parts[0], Side(), seed), parts[0])
    balancer = make("gradcraft", learner.named_parameters(), tasks=learner.tasks, tau=0.3)
    optimizer = torch.optim.Adam(learner.parameters(), lr=2e-3)
    random = np.random.default_rng(seed)
    T = len(learner.tasks)
    seen: dict[str, list[float]] = {"before": [], "pcgrad": [], "paper": [], "cone": []}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(epochs):
            for batch in TableBatches(parts[0], 512).epoch(random, 0, 1):
                optimizer.zero_grad()
                balancer.backward(learner.losses(batch))
                optimizer.step()
                report = balancer.report
                if report is None or report.gram is None or len(report.tasks) < T:
                    continue
                K = report.gram
                orders = np.stack([random.permutation(np.delete(np.arange(T), i)) for i in range(T)])
                after = {
                    "pcgrad": pcgrad(K, orders), "paper": gradcraft(K), "cone": gradcraft(K, projection="cone"),
                }  # fmt: skip
                seen["before"].append(report.conflict_share)
                for name, coefficients in after.items():
                    found = Report(report.tasks, report.losses, coefficients.sum(0), K, coefficients)
                    seen[name].append(found.remaining_share)
    return {name: float(np.mean(values)) for name, values in seen.items()}
