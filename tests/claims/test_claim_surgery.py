from __future__ import annotations

import json
import math

import numpy as np
import pytest

from vouch.claims import claims
from vouch.claims.claim import Claim
from vouch.claims.experts import PICTURES, Experts, experts
from vouch.claims.surgery import SHARES, Operated, arithmetic, controlled, online
from vouch.merging.arithmetic import task_arithmetic
from vouch.merging.unlabelled import features

CLAIMS = claims("surgery")


@pytest.fixture(scope="module")
def made() -> Experts:
    return experts(PICTURES["smoke"], 0, "smoke")


def test_the_main_claim_comes_first_and_variants_are_named_once() -> None:
    variants = [claim.variant for claim in CLAIMS]
    assert variants[0] == "accuracy" and len(set(variants)) == len(variants) == 9


@pytest.mark.parametrize("claim", [*CLAIMS[:4], *CLAIMS[-2:]], ids=lambda claim: claim.variant)
def test_it_measures(claim: Claim) -> None:
    found = claim.measure(claim.read(claim.source("smoke")), "smoke", 0)
    assert all(math.isfinite(value) for value in (found.baseline, found.method, found.effect))
    json.dumps(dict(found.details), allow_nan=False)
    if claim.variant == "layers":
        assert found.details["baseline_parameters"] == found.details["method_parameters"]
    if claim.variant == "bias":
        assert found.effect == pytest.approx(0.9 * found.baseline - found.method) and found.method < found.baseline
    else:
        slack = 0.01 if claim.variant == "distance" else 0
        assert found.effect == pytest.approx(found.method - found.baseline + slack)


def test_the_weight_is_chosen_on_validation(made: Experts) -> None:
    state, weight = arithmetic(made)
    values = {
        w / 10: np.mean(made.accuracy(task_arithmetic(made.base, made.states, w / 10), "valid")) for w in range(1, 11)
    }
    assert values[weight] == max(values.values())
    assert np.mean(made.accuracy(state, "valid")) == values[weight]


def test_what_is_reported_is_the_accuracy_of_corrected_features_on_the_other_half(made: Experts) -> None:
    state, _ = arithmetic(made)
    found = Operated(made, state, "smoke", 0)
    assert found.plain == made.accuracy(state)
    for task, (x, y) in enumerate(made.test):
        z = features(made.encoder(state), x)
        right = made.heads[task](found.surgery.correct(z, made.tasks[task])).argmax(1) == y
        assert found.corrected[task] == pytest.approx(float(right.double().mean()))
        own = features(made.encoder(made.states[task]), x)
        assert found.before[task] == pytest.approx(float((own - z).abs().mean() / own.abs().mean()), rel=1e-4)
        assert found.report.bias[made.tasks[task]][""].inputs == len(made.adapt[task][0])
        assert found.after[task] < found.before[task]
    deep = Operated(made, state, "smoke", 0, layers=["norms.0"])
    assert deep.before == pytest.approx(found.before, rel=1e-4) and deep.after != found.after


@pytest.mark.parametrize("kind", ["shift", "linear", "heads"])
def test_controls_reach_the_expert_where_the_merge_is_the_expert(made: Experts, kind: str) -> None:
    own = controlled(made, made.states[1], kind, "smoke", 0)
    assert own[1] == pytest.approx(made.expert_accuracy()[1], abs=0.021)
    if kind != "heads":
        assert own[1] == made.expert_accuracy()[1]


def test_the_stream_is_read_at_its_shares(made: Experts) -> None:
    curves = online(made, arithmetic(made)[0], 0)
    assert list(curves) == made.tasks and all(len(curve) == len(SHARES) for curve in curves.values())
