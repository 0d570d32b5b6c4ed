"""What the claims share: data cut to a size that a desk can bear, and two models measured case by case."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from vouch import registry
from vouch.claims.claim import Claim, Measurement, Scale
from vouch.data import Dataset, Split, split
from vouch.data.filters import keep_rows
from vouch.evaluation import evaluate
from vouch.files import read_json, write_json
from vouch.recommenders.base import load
from vouch.training import FitReport, Run


def cut(dataset: Dataset, users: int, *, longest: bool = False) -> Dataset:
    """The dataset with at most so many users: a fixed random choice, or those with the longest histories.

    Items that nobody is left to have are dropped. The choice depends on the data alone, so that all seeds share it.
    """
    log = dataset.interactions
    if log.n_users <= users:
        return dataset
    if longest:
        chosen = np.argsort(-log.lengths, kind="stable")[:users]
    else:
        chosen = np.random.default_rng(0).permutation(log.n_users)[:users]
    keep = np.zeros(log.n_users, dtype=bool)
    keep[chosen] = True
    return keep_rows(dataset, keep[log.user], {"users": users, "longest": longest})


def measured(
    made: Split,
    baseline: Any,
    method: Any,
    metric: str = "NDCG@10",
    *,
    also: tuple[str, ...] = ("HR@10",),
    others: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **details: Any,
) -> Measurement:
    """Rank the test cases with both and pair them case by case.

    Args:
        also: metrics that go into the details for both. others: more models whose metrics go into the details.
        options: further arguments of `evaluate`.
    """
    names, options = [metric, *(name for name in also if name != metric)], dict(options or {})
    low, high = (evaluate(model, made.test, metrics=names, **options) for model in (baseline, method))
    more: dict[str, Any] = {}
    for who, found in (("baseline", low), ("method", high)):
        more.update({f"{who}_{name}": found.metrics[name] for name in names[1:]})
    for who, model in (others or {}).items():
        found = evaluate(model, made.test, metrics=names, **options)
        more.update({f"{who}_{name}": found.metrics[name] for name in names})
    a, b = low.metrics[metric], high.metrics[metric]
    return Measurement(a, b, b - a, low.per_case[metric], high.per_case[metric], {**more, **details})


RATES: tuple[dict[str, Any], ...] = ({"learning_rate": 3e-3}, {"learning_rate": 1e-3}, {"learning_rate": 3e-4})
"""What a side without settings of its own to choose tries, so that both have as many."""
BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"epochs": 2, "hidden_size": 16, "negatives": 32, "max_length": 10},
    "desk": {
        "epochs": 60,
        "evaluate_every": 3,
        "patience": 5,
        "learning_rate": 3e-3,
        "hidden_size": 64,
        "negatives": 512,
    },
    "full": {"epochs": 200, "evaluate_every": 2, "patience": 5, "negatives": 1024},
}
"""What both sides of a claim about sequences get. At desk the rate is one at which SASRec levels off within the epochs."""
USERS = 6_000
"""Users of a desk claim, those with the longest histories: what they share decides more than who they are."""
SEQUENTIAL: dict[str, Any] = {"batch_size": 256, "dropout": 0.5}
PLANTED: dict[str, Any] = {"dropout": 0.2, "loss": "ce", "learning_rate": 1e-3, "epochs": 24, "patience": 4}
"""What both sides get where the data is made for the claim, and small."""


class Pair(Claim):
    """A claim that sets one method with its settings against another, on the same split with the same budget.

    Attributes:
        baseline_is, method_is: slug and settings of each side; the scale's budget and `shared` stand below them.
        shared: settings of both. users: how many are kept at desk.
        baseline_tries, method_tries: further settings of each side, of which validation chooses; as many for both.
    """

    baseline_is: ClassVar[tuple[str, Mapping[str, Any]]]
    method_is: ClassVar[tuple[str, Mapping[str, Any]]]
    baseline_tries: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    method_tries: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    shared: ClassVar[Mapping[str, Any]] = SEQUENTIAL
    users: ClassVar[int] = USERS
    metric = "NDCG@10"
    also: ClassVar[tuple[str, ...]] = ("HR@10",)

    def __init__(self) -> None:
        self.reports: WeakKeyDictionary[Any, FitReport] = WeakKeyDictionary()  # how each model's training went

    def prepare(self, dataset: Dataset, scale: Scale, seed: int) -> Split:
        """The split that both sides see."""
        del seed
        return split(cut(dataset, self.users, longest=True) if scale == "desk" else dataset)

    def train(self, side: tuple[str, Mapping[str, Any]], made: Split, scale: Scale, seed: int) -> Any:
        """One side."""
        kind, settings = registry.method(side[0]), {**BUDGET[scale], **self.shared, **side[1]}
        smoke = {name: value for name, value in BUDGET["smoke"].items() if scale == "smoke"}
        known = {
            name: value
            for name, value in {**settings, **smoke}.items()
            if "." in name or name in kind.Config.model_fields
        }
        model = kind(**known)
        place = self.place(model, made, seed)
        if place is not None and (place / "course.json").exists():
            model, course = load(place / "model"), read_json(place / "course.json")
            model.diagnostics = course["diagnostics"]
            report = FitReport(**course["report"])
        else:
            report = replace(model.fit(made, Run(seed=seed)), history=[])
            if place is not None:
                model.save(place / "model")
                course = {"report": asdict(report), "diagnostics": getattr(model, "diagnostics", {})}
                write_json(place / "course.json", course)  # last, as the sign that all is there
        self.reports[model] = report
        return model

    def place(self, model: Any, made: Split, seed: int) -> Path | None:
        """Where a side is kept, by all that decides what it becomes."""
        if self.trained is None:
            return None
        facts = [model.card.slug, model.config.model_dump(mode="json"), seed, torch.get_num_threads()]
        data = [made.describe(), made.train.fingerprint, made.dataset.catalog.fingerprint]
        text = json.dumps([facts, data], sort_keys=True, default=str)
        return self.trained / hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def best(
        self,
        side: tuple[str, Mapping[str, Any]],
        tries: tuple[Mapping[str, Any], ...],
        made: Split,
        scale: Scale,
        seed: int,
    ) -> tuple[Any, dict[str, Any]]:
        """One side with the settings, of those tried, that validation likes best; and which these are."""
        tries = tries[:1] if scale == "smoke" else tries
        if len(tries) == 1:
            return self.train((side[0], {**side[1], **tries[0]}), made, scale, seed), dict(tries[0])
        models = [self.train((side[0], {**side[1], **each}), made, scale, seed) for each in tries]
        values = [evaluate(m, made.valid, metrics=[self.metric], **self.options()).metrics[self.metric] for m in models]
        return models[int(np.argmax(values))], dict(tries[int(np.argmax(values))])

    def sides(self, made: Split, scale: Scale, seed: int) -> tuple[Any, Any, dict[str, Any]]:
        """Baseline and method, trained, and the settings that were chosen."""
        baseline, low = self.best(self.baseline_is, self.baseline_tries, made, scale, seed)
        method, high = self.best(self.method_is, self.method_tries, made, scale, seed)
        chosen = {
            f"{who}_{name}": value for who, of in (("baseline", low), ("method", high)) for name, value in of.items()
        }
        return baseline, method, chosen

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train both and pair them case by case."""
        made = self.prepare(dataset, scale, seed)
        baseline, method, chosen = self.sides(made, scale, seed)
        more = {**chosen, **getattr(method, "diagnostics", {}), **self.course(baseline, method)}
        return measured(made, baseline, method, self.metric, also=self.also, options=self.options(), **more)

    def course(self, baseline: Any, method: Any) -> dict[str, Any]:
        """How the training of the two went: why it stopped, the best epoch, and an epoch's time of method by baseline."""
        found, seconds = dict[str, Any](), []
        for who, model in (("baseline", baseline), ("method", method)):
            report = self.reports[model]
            if report.epochs:
                found |= {f"{who}_stopped": report.stopped, f"{who}_best_epoch": report.best_epoch}
                seconds.append(report.seconds / report.epochs)
        return {**found, "epoch_seconds_ratio": seconds[1] / seconds[0]} if len(seconds) == 2 else found

    def options(self) -> dict[str, Any]:
        """Further arguments of `evaluate`."""
        return {}
