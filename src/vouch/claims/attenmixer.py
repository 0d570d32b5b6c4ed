"""The claims about Atten-Mixer: is a graph needed for sessions, and do queries of several levels help?

Protocol: the last training sessions and the first test sessions of the log; every click of a test session after the
first is asked for, clicks of the session may come again; MRR@20 and HR@20 over all items seen in training. Equal sizes,
read-outs' scale aside, dropout, epochs and patience; sessions come shuffled; the best epoch is chosen by validation.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vouch.claims.claim import Measurement, Scale, register_claim
from vouch.claims.protocol import Pair, measured
from vouch.data import Dataset, Split, split
from vouch.data.filters import keep_rows

TRAIN_SESSIONS, TEST_SESSIONS = 186_670 // 16, 4_000
"""Of Diginetica: the most recent sixteenth of training, and the first of the test week."""
FIRST_TEST = 186_670
SHAPE: dict[str, Any] = {
    "batch_size": 128,
    "hidden_size": 64,
    "learning_rate": 3e-3,
    "epochs": 9,
    "evaluate_every": 1,
    "patience": 9,
    "dropout": 0.1,
    "monitor": "MRR@20",
    "loss": "ce",
}
SCALES: tuple[dict[str, Any], ...] = ({"scale": 12.0}, {"scale": 16.0})
"""The published scales, of graph networks and of Atten-Mixer: where the two meet, validation chooses for each."""


class _Sessions(Pair):
    slug: ClassVar[str] = "attenmixer"
    data = {"smoke": "world", "desk": "diginetica", "full": "diginetica"}
    metric = "MRR@20"
    also = ("HR@20",)
    shared = SHAPE
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("attenmixer", {})
    method = "Atten-Mixer"
    reported = "best HR@20 and MRR@20 on Diginetica, Gowalla and Last.fm, at a fraction of a graph network's time"

    def prepare(self, dataset: Dataset, scale: Scale, seed: int) -> Split:
        """Sessions by order; test clicks on items that training has not seen are left out."""
        del seed
        log = dataset.interactions
        if scale == "smoke" or log.n_users < FIRST_TEST + TEST_SESSIONS:
            return split(dataset, "session")
        tests = TEST_SESSIONS if scale == "desk" else log.n_users - FIRST_TEST
        trains = TRAIN_SESSIONS if scale == "desk" else FIRST_TEST
        chosen = (log.user >= FIRST_TEST - trains) & (log.user < FIRST_TEST + tests)
        seen = np.bincount(log.item[chosen & (log.user < FIRST_TEST)], minlength=log.n_items) > 0
        kept = keep_rows(dataset, chosen & seen[log.item], {"sessions": trains + tests})
        share = tests / (trains + tests)
        return split(kept, "session", test_share=share, valid_share=0.05 * (1 - share))

    def options(self) -> dict[str, Any]:
        """Clicks may come again."""
        return {"exclude": "none"}

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """Train both, and compare the time of an epoch and short sessions with long ones."""
        made = self.prepare(dataset, scale, seed)
        baseline, method, chosen = self.sides(made, scale, seed)
        found = measured(made, baseline, method, self.metric, also=self.also, options=self.options(), **chosen)
        assert found.method_cases is not None and found.baseline_cases is not None
        gain = found.method_cases - found.baseline_cases
        long = made.test.stop - made.test.start > 5
        more = {
            "effect_short": float(gain[~long].mean()),
            "effect_long": float(gain[long].mean()) if long.any() else 0.0,
        }
        return Measurement(
            found.baseline,
            found.method,
            found.effect,
            found.baseline_cases,
            found.method_cases,
            {**found.details, **more, **self.course(baseline, method)},
        )


@register_claim
class Readout(_Sessions):
    """Against plain attention."""

    variant = "readout"
    statement = (
        "Without a graph, the multi-level read-out has a higher test MRR@20 than soft attention by the last item."
    )
    baseline = "soft attention read-out, no graph"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("attenmixer", {"readout": "attention"})


@register_claim
class GraphNotNeeded(_Sessions):
    """The graph against none, with the read-out of SR-GNN."""

    variant = "graph"
    statement = "Leaving out SR-GNN's graph costs less than 1 % of its test MRR@20."
    effect = "MRR@20 without the graph less 0.99 x MRR@20 with it"
    baseline = "0.99 x SR-GNN, one step"
    method = "SR-GNN without propagation"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("srgnn", {"steps": 1})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("srgnn", {"steps": 0})
    reported = "graph propagation adds little"

    def measure(self, dataset: Dataset, scale: Scale, seed: int) -> Measurement:
        """With a margin of one part in a hundred."""
        found = super().measure(dataset, scale, seed)
        assert found.baseline_cases is not None
        least = 0.99 * found.baseline
        return Measurement(
            least, found.method, found.method - least, 0.99 * found.baseline_cases, found.method_cases, found.details
        )


@register_claim
class AgainstSRGNN(_Sessions):
    """Against the graph network."""

    variant = "srgnn"
    statement = "Atten-Mixer has a higher test MRR@20 than SR-GNN with one gated step."
    baseline = "SR-GNN, one step"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("srgnn", {"steps": 1})
    baseline_tries = method_tries = SCALES


@register_claim
class Levels(_Sessions):
    """Seven levels against one."""

    variant = "levels"
    statement = "Atten-Mixer has a higher test MRR@20 with seven levels than with one."
    baseline = "Atten-Mixer, one level"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("attenmixer", {"levels": 1})


@register_claim
class Heads(_Sessions):
    """Eight heads against one."""

    variant = "heads"
    statement = "Atten-Mixer has a higher test MRR@20 with eight heads than with one."
    baseline = "Atten-Mixer, one head"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("attenmixer", {"num_heads": 1})


@register_claim
class Power(_Sessions):
    """The norm that mixes the levels against their sum."""

    variant = "power"
    statement = "Atten-Mixer has a higher test MRR@20 when a norm of power 4 mixes the levels than when they are added."
    baseline = "Atten-Mixer, levels added"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("attenmixer", {"power": 1.0})


@register_claim
class Order(_Sessions):
    """The items of a level in order, as released, against their sum, as described."""

    variant = "order"
    statement = "Atten-Mixer has a higher test MRR@20 with the items of a level joined in order than with their sum."
    baseline = "Atten-Mixer, items of a level added"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("attenmixer", {"level_pool": "sum"})
    reported = "the paper describes the sum; the released code, which made its numbers, joins in order"


@register_claim
class LastItem(_Sessions):
    """Against the last click alone."""

    variant = "last"
    statement = "Atten-Mixer has a higher test MRR@20 than the last item alone."
    baseline = "last item only"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("attenmixer", {"readout": "last"})


@register_claim
class PlugIn(_Sessions):
    """On top of a graph network."""

    variant = "plugin"
    statement = "SR-GNN has a higher test MRR@20 with the multi-level read-out than with its own."
    baseline = "SR-GNN"
    method = "SR-GNN with the read-out of Atten-Mixer"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("srgnn", {})
    method_is: ClassVar[tuple[str, dict[str, Any]]] = ("srgnn", {"readout": "attenmixer"})


@register_claim
class AgainstItemKNN(_Sessions):
    """Against neighbours."""

    variant = "itemknn"
    statement = "Atten-Mixer has a higher test MRR@20 than item-kNN with decay."
    baseline = "item-kNN"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("itemknn", {})


@register_claim
class AgainstMarkov(_Sessions):
    """Against first-order counts."""

    variant = "markov"
    statement = "Atten-Mixer has a higher test MRR@20 than first-order transition counts."
    baseline = "Markov counts"
    baseline_is: ClassVar[tuple[str, dict[str, Any]]] = ("markov", {})
