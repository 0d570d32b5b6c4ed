"""The claims about REMI: hard negatives and routing that does not collapse, for models with several interests.

Protocol: users of training, validation and test are others; the first four fifths of a history are given, the last fifth
is asked for at once; full ranking, history not left out, as in this family of papers. Equal sizes, negatives, epochs and
patience; the best epoch is chosen by validation Recall@20, and so is the hardness of the negatives or, where there is none,
the learning rate: three tries for each side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vouch.claims import synthetic
from vouch.claims.claim import Measurement, Scale, register_claim
from vouch.claims.protocol import Pair, cut, measured
from vouch.data import Dataset, Split, split
from vouch.evaluation import evaluate
from vouch.recommenders.collaborative.popularity import Popularity
from vouch.recommenders.sequential.remi import routing_report

SHAPE: dict[str, Any] = {
    "batch_size": 256,
    "patience": 4,
    "hidden_size": 64,
    "interests": 4,
    "max_length": 20,
    "negatives": 640,
    "min_history": 4,
    "epochs": 15,
    "evaluate_every": 3,
    "monitor": "Recall@20",
}
HARDNESS = (0.1, 1.0, 10.0)
RATES = (3e-4, 1e-3, 3e-3)
"""What validation chooses from, as many for each side."""


class _Accuracy(Pair):
    slug: ClassVar[str] = "remi"
    data = {"smoke": "world", "desk": "amazon_home", "full": "amazon_home"}
    users = 12_000
    metric = "Recall@20"
    also = ("HR@20",)
    shared = SHAPE
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("remi", {})
    baseline = "ComiRec-SA, uniform negatives"
    method = "REMI"
    reported = "better than ComiRec-SA on Books, Gowalla and RetailRocket; expected +5 to +20 % relative"

    def prepare(self, dataset: Dataset, scale: Scale, seed: int) -> Split:
        """Users apart."""
        del seed
        return split(cut(dataset, self.users, longest=True) if scale == "desk" else dataset, "users")

    def options(self) -> dict[str, Any]:
        """Histories may be recommended again."""
        return {"exclude": "none"}

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train both sides three times, of which validation chooses one: with each hardness of the negatives, or with
        each learning rate where there is none to choose."""
        made = self.prepare(dataset, scale, seed)
        best: list[Any] = []
        chosen: dict[str, Any] = {}
        for who, side in (("baseline", self.baseline_is), ("method", self.method_is)):
            tries = (
                [{"hardness": value} for value in HARDNESS]
                if self.hard(side)
                else [{"learning_rate": r} for r in RATES]
            )
            tries = tries[1:2] if scale == "smoke" else tries
            models = [self.train((side[0], {**side[1], **each}), made, scale, seed) for each in tries]
            values = [
                evaluate(model, made.valid, metrics=[self.metric], **self.options()).metrics[self.metric]
                for model in models
            ]
            best.append(models[int(np.argmax(values))])
            chosen.update({f"{who}_{name}": value for name, value in tries[int(np.argmax(values))].items()})
        return self.compared(made, best[0], best[1], **chosen)

    def hard(self, side: tuple[str, Mapping[str, Any]]) -> bool:
        """Whether a side is trained with hard negatives."""
        return side[0] == "remi" or side[1].get("loss") == "hard_softmax"

    def compared(self, made: Split, baseline: Any, method: Any, **details: Any) -> Measurement:
        """Both on the test users, with what their routing looks like."""
        queries = made.test.queries(0, 2_000)
        for who, model in (("baseline", baseline), ("method", method)):
            details.update({f"{who}_{name}": value for name, value in routing_report(model, queries).items()})
        popular = Popularity()
        popular.fit(made)
        return measured(
            made,
            baseline,
            method,
            self.metric,
            also=self.also,
            others={"popularity": popular},
            options=self.options(),
            **details,
        )


@register_claim
class Recall(_Accuracy):
    """Against ComiRec-SA."""

    variant = "recall"
    statement = "REMI has a higher test Recall@20 than ComiRec-SA with uniform negatives."


@register_claim
class HardNegatives(_Accuracy):
    """Hard negatives alone."""

    variant = "ihn"
    statement = "ComiRec-SA has a higher test Recall@20 with hard negatives than with uniform ones."
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {"loss": "hard_softmax"})
    method = "ComiRec-SA, hard negatives"


@register_claim
class RoutingAlone(_Accuracy):
    """The regularisation alone."""

    variant = "rr"
    statement = "ComiRec-SA has a higher test Recall@20 with routing regularisation than without."
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {"objective": ("next", "remi")})
    method = "ComiRec-SA, routing regularised"


@register_claim
class Routing(_Accuracy):
    """Routing collapse."""

    variant = "routing"
    statement = "With routing regularisation an interest gives less of its weight to a single item."
    metric = "largest routing weight"
    effect = "baseline less method"
    baseline = "REMI without routing regularisation"
    method = "REMI"
    reported = "the largest weight falls, the number of items that count rises, at equal or better recall"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train REMI with and without."""
        made = self.prepare(dataset, scale, seed)
        without = self.train(("comirec-sa", {"loss": "hard_softmax", "hardness": 1.0}), made, scale, seed)
        with_it = self.train(("remi", {"hardness": 1.0}), made, scale, seed)
        found = _Accuracy.compared(_Recall20(), made, without, with_it)
        low, high = (found.details[f"{who}_largest_weight"] for who in ("baseline", "method"))
        recall = {"baseline_Recall@20": found.baseline, "method_Recall@20": found.method}
        return Measurement(low, high, low - high, details={**found.details, **recall})


class _Recall20(_Accuracy):
    pass


@register_claim
class OnDynamicRouting(_Accuracy):
    """On another backbone."""

    variant = "dr"
    statement = "ComiRec-DR has a higher test Recall@20 with hard negatives and routing regularisation than without."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-dr", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = (
        "comirec-dr",
        {"loss": "hard_softmax", "objective": ("next", "remi")},
    )
    baseline = "ComiRec-DR, uniform negatives"
    method = "ComiRec-DR, REMI's training"


@register_claim
class OneInterest(_Accuracy):
    """Are several interests needed at all?"""

    variant = "k1"
    statement = "REMI has a higher test Recall@20 with four interests than with one."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("remi", {"interests": 1})
    baseline = "REMI, one interest"


@register_claim
class MoreNegatives(_Accuracy):
    """Is hardness more than number?"""

    variant = "negatives"
    statement = "REMI has a higher test Recall@20 than ComiRec-SA with ten times as many uniform negatives."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {"negatives": 6_400})
    baseline = "ComiRec-SA, ten times the negatives"


@register_claim
class Clusters(_Accuracy):
    """Where users are known to mix three tastes."""

    variant = "clusters"
    statement = "Where users mix three tastes, REMI has a higher test Recall@20 with four interests than with one."
    data = {"smoke": "world", "desk": "world", "full": "world"}
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("remi", {"interests": 1})
    baseline = "REMI, one interest"
    reported = "better with three tastes, equal with one"

    def prepare(self, dataset: Dataset, scale: Scale, seed: int) -> Split:
        """800 items of 20 tastes."""
        del dataset
        return split(synthetic.taste_clusters(seed, users=200 if scale == "smoke" else 3_000, mixed=3), "users")
