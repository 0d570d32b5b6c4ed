"""The claims about AC-TSR: is it better than its backbone, is that calibration or flattening, and what does it look at?

Protocol: leave-one-out, full ranking without the history, equal sizes, losses, epochs and patience; the best epoch is
chosen by validation NDCG@10.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vouch.claims import synthetic
from vouch.claims.claim import Measurement, Scale, register_claim
from vouch.claims.protocol import PLANTED, SEQUENTIAL, Pair, measured
from vouch.data import Cases, Dataset, Interactions, Queries, split
from vouch.data.world import WorldConfig, build
from vouch.evaluation import evaluate
from vouch.recommenders.sequential.maps import attention_maps

SHAPE: dict[str, Any] = {**SEQUENTIAL, "num_layers": 2, "num_heads": 2, "inner_size": 128}
CALIBRATED: dict[str, Any] = {"attention": "actsr", "actsr.penalty": 0.3}


class _Accuracy(Pair):
    slug: ClassVar[str] = "actsr"
    data = {"smoke": "world", "desk": "amazon_toys", "full": "amazon_toys"}
    shared = SHAPE
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", CALIBRATED)
    method = "SASRec with calibrated attention"
    reported = "better than its backbone on Beauty, Sports, Toys and Yelp; expected +3 to +10 % relative"


@register_claim
class Accuracy(_Accuracy):
    """Against SASRec."""

    variant = "accuracy"
    statement = "SASRec with calibrated attention has a higher test NDCG@10 than SASRec of equal size."
    baseline = "SASRec"


@register_claim
class Calibration(_Accuracy):
    """Against the control that flattens without calibrating; validation chooses whether that has positions."""

    variant = "control"
    statement = "SASRec with calibrated attention has a higher test NDCG@10 than SASRec with its softmax applied twice."
    baseline = "SASRec, softmax applied twice"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {"attention": "double-softmax"})
    baseline_tries = ({"positions": True}, {"positions": False})
    method_tries = ({"actsr.penalty": 0.3}, {"actsr.penalty": 0.03})


@register_claim
class Yelp(_Accuracy):
    """Against SASRec on reviews."""

    variant = "yelp"
    statement = "On reviews too, SASRec with calibrated attention has a higher test NDCG@10 than SASRec."
    baseline = "SASRec"
    data = {"smoke": "world", "desk": "yelp_2022", "full": "yelp_2022"}


@register_claim
class Positions(_Accuracy):
    """Against SASRec without positions."""

    variant = "positions"
    statement = "SASRec with calibrated attention has a higher test NDCG@10 than SASRec without position vectors."
    baseline = "SASRec without positions"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {"positions": False})


@register_claim
class Spatial(_Accuracy):
    """Both calibrators against the spatial one."""

    variant = "spatial"
    statement = "Both calibrators together have a higher test NDCG@10 than the spatial one alone."
    baseline = "spatial calibrator only"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {**CALIBRATED, "actsr.calibrators": "spatial"})


@register_claim
class Adversarial(_Accuracy):
    """Both calibrators against the adversarial one."""

    variant = "adversarial"
    statement = "Both calibrators together have a higher test NDCG@10 than the adversarial one alone."
    baseline = "adversarial calibrator only"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {**CALIBRATED, "actsr.calibrators": "adversarial"})


@register_claim
class Mask(_Accuracy):
    """The learned mask against a uniform one."""

    variant = "mask"
    statement = "The attacker's learned mask gives a higher test NDCG@10 than a uniform mask."
    baseline = "uniform mask"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {**CALIBRATED, "actsr.mask": "uniform"})


@register_claim
class Series(_Accuracy):
    """One calibrator after the other, or side by side."""

    variant = "parallel"
    statement = "The calibrators one after the other have a higher test NDCG@10 than side by side."
    baseline = "calibrators in parallel"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {**CALIBRATED, "actsr.arrange": "parallel"})
    reported = "series is better than parallel (recalled)"


@register_claim
class AgainstFixed(_Accuracy):
    """The gate against a fixed sum."""

    variant = "fixed"
    statement = "The learned gate gives a higher test NDCG@10 than origin and half the calibrated attention added up."
    baseline = "fixed combination"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {**CALIBRATED, "actsr.combine": "fixed"})
    reported = "the gate is better than the fixed combination (recalled)"


@register_claim
class AgainstAnnealing(_Accuracy):
    """The gate against a weight that falls by the step."""

    variant = "annealing"
    statement = "The learned gate gives a higher test NDCG@10 than an origin attention that fades by the step."
    baseline = "annealing"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {**CALIBRATED, "actsr.combine": "annealing"})
    reported = "the gate is better than annealing (recalled)"


@register_claim
class Mean(_Accuracy):
    """Attention as such against the mean of the history."""

    variant = "mean"
    statement = "SASRec with calibrated attention has a higher test NDCG@10 than with the mean of the history instead."
    baseline = "SASRec, uniform attention"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {"attention": "mean"})


class _Known(Pair):
    slug: ClassVar[str] = "actsr"
    data = {"smoke": "world", "desk": "world", "full": "world"}
    shared = {**SHAPE, **PLANTED, "num_layers": 1, "epochs": 60}
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("sasrec", CALIBRATED)
    baseline = "SASRec"
    method = "SASRec with calibrated attention"


@register_claim
class Attention(_Known):
    """The share of attention on the one item that matters."""

    variant = "attention"
    statement = "Where one known item determines the next, calibrated attention gives it a larger share than plain."
    metric = "share of attention on the item that matters"
    reported = "the paper's argument; the formulas bound what a single item can get"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train both on histories of one key among noise, and look at the last position of the test histories."""
        del dataset
        made = split(synthetic.key_item(seed, users=300 if scale == "smoke" else 3_000), "users")
        sides = [self.train(side, made, scale, seed) for side in (self.baseline_is, self.method_is)]
        # of users kept apart; the histories end with noise, and the answer comes next
        queries = made.test.queries(0, 1_000)
        shares = [on_keys(model, queries) for model in sides]
        ranks = measured(made, sides[0], sides[1], options={"exclude": "none"})
        low, high = (float(share.mean()) for share in shares)
        names = {"baseline_NDCG@10": ranks.baseline, "method_NDCG@10": ranks.method}
        return Measurement(low, high, high - low, shares[0], shares[1], names)


def on_keys(model: Any, queries: Queries) -> NDArray[np.float64]:
    """Share `(B,)` of the last position's attention that falls on keys (items below 20)."""
    lengths = np.minimum(queries.lengths, model.reads)
    items, _ = model.inputs(queries, np.arange(len(queries)), lengths)
    return share_of_attention(model, queries, (items >= 0) & (items < 20))


def share_of_attention(model: Any, queries: Queries, marked: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share `(B,)` of the last position's attention, the mean over layers and heads, on what is marked `(B, T)`."""
    maps = attention_maps(model, queries)["attention"]
    last = torch.from_numpy(np.minimum(queries.lengths, model.reads) - 1)
    shares = torch.stack([m[torch.arange(len(m)), :, last] for m in maps]).mean((0, 2))  # (B, T)
    return (shares * torch.from_numpy(marked)).sum(1).double().numpy()


@register_claim
class Planted(_Known):
    """The share of attention on events that no interest explains, in the embedded world."""

    variant = "planted"
    statement = "In the embedded world, calibrated attention gives planted noise events a smaller share than plain."
    metric = "share of attention on planted noise events"
    effect = "baseline less method"
    shared = {**SHAPE, **PLANTED}
    reported = "the paper's argument: attention goes to items that do not matter, and calibration takes it away"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train both in a world with one noise event in five, and look where the last position of test histories looks."""
        del dataset
        size = {"users": 300, "items": 200, "events": 6_000} if scale == "smoke" else {"users": 3_000, "events": 90_000}
        world = build(WorldConfig(**size, noise_share=0.2, seed=seed))
        made = split(world.dataset)
        cases = made.test
        rows = slice(0, 1_000)
        queries = cases.queries(0, 1_000)
        sides = [self.train(side, made, scale, seed) for side in (self.baseline_is, self.method_is)]
        length = np.minimum(cases.stop[rows] - cases.start[rows], sides[0].reads)
        place = np.arange(length.max())
        at = np.minimum(cases.stop[rows, None] - length[:, None] + place, len(world.truth.is_noise) - 1)
        noise = world.truth.is_noise[at] & (place < length[:, None])
        shares = [share_of_attention(model, queries, noise) for model in sides]
        ranks = measured(made, *sides)
        low, high = (float(share.mean()) for share in shares)
        details = {
            "even_share": float((noise.sum(1) / length).mean()),
            "baseline_NDCG@10": ranks.baseline,
            "method_NDCG@10": ranks.method,
        }
        return Measurement(low, high, low - high, shares[1], shares[0], details)


@register_claim
class Noise(_Accuracy):
    """What random items in the history cost."""

    variant = "noise"
    statement = "With 20 % random items added to test histories, calibrated attention loses less NDCG@10 than plain."
    effect = "SASRec's loss less calibrated SASRec's"
    baseline = "SASRec: NDCG@10 lost"
    metric = "NDCG@10 lost to noise"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Evaluate both on the test histories as they are and with random items inserted."""
        made = self.prepare(dataset, scale, seed)
        noisy = with_noise(made.test, np.random.default_rng(seed))
        lost = []
        for side in (self.baseline_is, self.method_is):
            model = self.train(side, made, scale, seed)
            clean, dirty = (
                evaluate(model, cases, metrics=["NDCG@10"]).per_case["NDCG@10"] for cases in (made.test, noisy)
            )
            lost.append(clean - dirty)
        low, high = (float(values.mean()) for values in lost)
        # the effect is baseline less method, so the cases change places
        return Measurement(low, high, low - high, lost[1], lost[0])


def with_noise(cases: Cases, random: np.random.Generator, share: float = 0.2) -> Cases:
    """The cases over a log in which, before each event of a history, a random item stands with a chance of `share`."""
    log = cases.log
    lengths = cases.target_stop - cases.start
    rows = np.repeat(cases.start, lengths) + np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    owner = np.repeat(np.arange(len(cases)), lengths)
    added = (random.random(len(rows)) < share) & (rows < np.repeat(cases.stop, lengths))
    times = 1 + added
    items = np.repeat(log.item[rows], times)
    items[np.cumsum(times)[added] - 2] = random.integers(0, log.n_items, int(added.sum()))
    user = np.repeat(owner, times)
    changed = Interactions.from_codes(log.users, log.items, cases.user[user], items)
    total = np.bincount(user, minlength=len(cases))
    asked = cases.target_stop - cases.stop
    start = np.array([changed.offsets[code] for code in cases.user])
    return Cases(changed, cases.user, start, start + total - asked, start + total)
