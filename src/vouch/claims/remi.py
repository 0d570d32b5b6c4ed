"""The claims about REMI: hard negatives and routing that does not collapse, for models with several interests.

Protocol: users of training, validation and test are others; the first four fifths of a history are given, the last fifth
is asked for at once; full ranking, history not left out, as in this family of papers. Equal sizes, negatives, epochs and
patience; the best epoch is chosen by validation Recall@20, and so is the hardness of the negatives or, where there is
none, the learning rate: three tries for each side. Counts, which learn nothing, have one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.claims import synthetic
from vouch.claims.claim import Measurement, Scale, register_claim
from vouch.claims.protocol import RATES, Pair, cut, measured
from vouch.data import Dataset, Split, split
from vouch.data.queries import flat_rows
from vouch.nn.topk import top_k
from vouch.recommenders.collaborative.popularity import Popularity
from vouch.recommenders.sequential.interests import InterestRecommender
from vouch.recommenders.sequential.remi import routing, routing_report

SHAPE: dict[str, Any] = {
    "batch_size": 256,
    "patience": 4,
    "learning_rate": 1e-3,
    "hidden_size": 64,
    "interests": 4,
    "max_length": 20,
    "negatives": 640,
    "min_history": 4,
    "epochs": 15,
    "evaluate_every": 3,
    "monitor": "Recall@20",
}
HARDNESS: tuple[dict[str, Any], ...] = ({"hardness": 1.0}, {"hardness": 0.1}, {"hardness": 10.0})
"""What validation chooses from with hard negatives; else the learning rate, as many for each side."""


class _Accuracy(Pair):
    slug: ClassVar[str] = "remi"
    data = {"smoke": "world", "desk": "amazon_home", "full": "amazon_home"}
    users = 12_000
    metric = "Recall@20"
    also = ("HR@20",)
    shared = SHAPE
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("remi", {})
    baseline_tries: ClassVar[tuple[dict[str, Any], ...]] = RATES
    method_tries: ClassVar[tuple[dict[str, Any], ...]] = HARDNESS
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
        """Train both and pair them case by case."""
        made = self.prepare(dataset, scale, seed)
        baseline, method, chosen = self.sides(made, scale, seed)
        return self.compared(made, baseline, method, **chosen, **self.course(baseline, method))

    def compared(self, made: Split, baseline: Any, method: Any, **details: Any) -> Measurement:
        """Both on the test users, with what their routing looks like."""
        queries = made.test.queries(0, 2_000)
        for who, model in (("baseline", baseline), ("method", method)):
            if not isinstance(model, InterestRecommender):
                continue
            if model.card.slug != "youtube-dnn":
                details.update({f"{who}_{name}": value for name, value in routing_report(model, queries).items()})
            details[f"{who}_hits_by_interest"] = hits_by_interest(model, made)
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


def targets(made: Split, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The test cases `(m,)` and their targets `(m,)`, one row for each."""
    cases = made.test
    rows, bounds = flat_rows(cases.stop[:most], cases.target_stop[:most])
    owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return torch.from_numpy(owner), torch.from_numpy(cases.log.item[rows].astype(np.int64))


def hits_by_interest(model: Any, made: Split, k: int = 20, most: int = 2_000) -> list[float]:
    """The share of the test targets among the `k` best that each interest found, greatest first."""
    vectors = model.query_vectors(made.test.queries(0, most))
    if vectors.dim() == 2:
        return [1.0]
    by_interest = vectors @ model.item_vectors().T  # (B, K, N)
    _, best = top_k(by_interest.amax(1), k)
    user, target = targets(made, most)
    hit = (best[user] == target[:, None]).any(1)
    who = by_interest[user, :, target].argmax(1)[hit]
    shares = torch.bincount(who, minlength=vectors.shape[1]).float() / max(1, int(hit.sum()))
    return [round(share, 4) for share in shares.sort(descending=True).values.tolist()]


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
    method_tries = RATES
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
    """On another backbone, at a rate at which it learns in the epochs given."""

    variant = "dr"
    shared = {**SHAPE, "learning_rate": 3e-3}
    statement = "ComiRec-DR has a higher test Recall@20 with hard negatives and routing regularisation than without."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-dr", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = (
        "comirec-dr",
        {"loss": "hard_softmax", "objective": ("next", "remi")},
    )
    baseline = "ComiRec-DR, uniform negatives"
    method = "ComiRec-DR, REMI's training"


@register_claim
class OnMIND(_Accuracy):
    """On MIND."""

    variant = "mind"
    statement = "MIND has a higher test Recall@20 with hard negatives and routing regularisation than without."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("mind", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("mind", {"loss": "hard_softmax", "objective": ("next", "remi")})
    baseline = "MIND, uniform negatives"
    method = "MIND, REMI's training"


@register_claim
class AgainstItemKNN(_Accuracy):
    """Against counts."""

    variant = "itemknn"
    statement = "REMI has a higher test Recall@20 than item-kNN."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("itemknn", {})
    baseline_tries: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    baseline = "item-kNN"


@register_claim
class OneInterest(_Accuracy):
    """Are several interests needed at all?"""

    variant = "k1"
    statement = "REMI has a higher test Recall@20 with four interests than with one."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("remi", {"interests": 1})
    baseline_tries = HARDNESS
    baseline = "REMI, one interest"


@register_claim
class AveragePooling(_Accuracy):
    """Is routing needed at all?"""

    variant = "pooling"
    statement = "REMI has a higher test Recall@20 than an average-pooling network with the same hard negatives."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("youtube-dnn", {"loss": "hard_softmax", "interests": 1})
    baseline_tries = HARDNESS
    baseline = "average pooling, hard negatives"


@register_claim
class MoreNegatives(_Accuracy):
    """Is hardness more than number?"""

    variant = "negatives"
    statement = "REMI has a higher test Recall@20 than ComiRec-SA with ten times as many uniform negatives."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {"negatives": 6_400})
    baseline = "ComiRec-SA, ten times the negatives"


class _Tastes(_Accuracy):
    """800 items of 20 tastes; within one, an item is followed by its neighbours on a ring."""

    data = {"smoke": "world", "desk": "world", "full": "world"}
    mixed: ClassVar[int] = 3
    each: ClassVar[int] = 40

    def prepare(self, dataset: Dataset, scale: Scale, seed: int) -> Split:
        """Drawn anew for each seed."""
        del dataset
        users = 200 if scale == "smoke" else 3_000
        return split(synthetic.taste_clusters(seed, users=users, mixed=self.mixed, each=self.each))


@register_claim
class Clusters(_Tastes):
    """Where users are known to mix three tastes."""

    variant = "clusters"
    statement = "Where users mix three tastes, REMI has a higher test Recall@20 with four interests than with one."
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("remi", {"interests": 1})
    baseline_tries = HARDNESS
    baseline = "REMI, one interest"
    reported = "better with three tastes, equal with one"


@register_claim
class OneTaste(_Tastes):
    """Where users have one taste only."""

    variant = "one-taste"
    statement = "Where users have one taste, four interests cost REMI at most 0.02 of the Recall@20 of one."
    effect = "method less baseline, plus 0.02"
    mixed = 1
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("remi", {"interests": 1})
    baseline_tries = HARDNESS
    baseline = "REMI, one interest"
    reported = "better with three tastes, equal with one"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """As the others, with the margin."""
        found = super().measure(dataset, scale, seed)
        assert found.method_cases is not None
        return replace(found, effect=found.effect + MARGIN, method_cases=found.method_cases + MARGIN)


MARGIN = 0.02


@register_claim
class Within(_Tastes):
    """Hard negatives teach the item, easy ones the taste."""

    variant = "within"
    statement = "Hard negatives rank the target higher among the items of its own taste than uniform ones do."
    metric = "MRR among the items of the target's taste"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("comirec-sa", {"loss": "hard_softmax"})
    baseline = "ComiRec-SA, uniform negatives"
    method = "ComiRec-SA, hard negatives"
    reported = "the paper's argument; easy negatives teach the cluster and hard ones the item"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Rank each target among its taste's items."""
        made, judge = self.prepare(dataset, scale, seed), _Judge()
        judge.baseline_is, judge.method_is = self.baseline_is, self.method_is  # type: ignore[misc]
        baseline, method, chosen = judge.sides(made, scale, seed)
        low, high = (self.within(model, made) for model in (baseline, method))
        return Measurement(float(low.mean()), float(high.mean()), float((high - low).mean()), low, high, chosen)

    def within(self, model: Any, made: Split) -> Any:
        """Reciprocal rank `(Q,)` of each test target among the items of its taste."""
        queries = made.test.queries(0, len(made.test))
        taste = torch.from_numpy(tastes(model, self.each))
        user, target = targets(made)
        scores = model.score(queries)[user]
        rivals = taste[None] == taste[target][:, None]
        rank = (rivals & (scores > scores.gather(1, target[:, None]))).sum(1) + 1
        return (1.0 / rank.double()).numpy()


class _Judge(_Tastes):
    """Chooses by Recall@20 for claims with another metric."""

    variant = "judge"
    statement = ""


@register_claim
class Purity(_Tastes):
    """Do interests follow the tastes?"""

    variant = "purity"
    statement = (
        "Where users mix three tastes, an interest of REMI rests on one taste more than without its regularisation."
    )
    metric = "purity: routing weight on the interest's main taste, over what chance would give"
    baseline = "REMI without routing regularisation"
    method = "REMI"
    reported = "expected: interests align with the true clusters more with the regularisation than without"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """The weight of the main taste; a single item is pure by itself, so collapse is set against its own chance."""
        made = self.prepare(dataset, scale, seed)
        sides = [
            self.train((slug, {"hardness": 1.0, **settings}), made, scale, seed)
            for slug, settings in (("comirec-sa", {"loss": "hard_softmax"}), ("remi", {}))
        ]
        low, high = (purity(model, made, self.each, seed) for model in sides)
        return Measurement(low, high, high - low)


def tastes(model: Any, each: int) -> NDArray[np.int64]:
    """The taste `(N,)` of every item code; ids count through the tastes."""
    return np.asarray(model.items.ids(np.arange(model.n_items)), dtype=np.int64) // each


def purity(model: Any, made: Split, each: int, seed: int) -> float:
    """Mean weight of each interest's main taste, less that of the same weights dealt out anew over the items."""
    queries = made.test.queries(0, 2_000)
    A, items, length = routing(model, queries)  # (B, K, L), (B, L), (B,)
    taste = tastes(model, each)[np.maximum(items, 0)]
    random, shuffled = np.random.default_rng(seed), taste.copy()
    for row, n in zip(shuffled, length, strict=True):
        random.shuffle(row[:n])
    one_hot = torch.nn.functional.one_hot

    def main(of: Any) -> float:
        return float(torch.einsum("bkl,blc->bkc", A, one_hot(torch.from_numpy(of)).float()).amax(-1).mean())

    return main(taste) - main(shuffled)
