from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from vouch.claims import claims
from vouch.claims.adamerging import OTHERS, Proxy, adapted, tuned
from vouch.claims.claim import Claim
from vouch.claims.experts import PICTURES, Experts, experts
from vouch.merging.arithmetic import task_arithmetic

CLAIMS = claims("adamerging")


@pytest.fixture(scope="module")
def made() -> Experts:
    return experts(PICTURES["smoke"], 0, "smoke")


def test_the_main_claim_comes_first_and_variants_are_named_once() -> None:
    variants = [claim.variant for claim in CLAIMS]
    assert variants[0] == "accuracy" and len(set(variants)) == len(variants) == 11


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, made: Experts) -> None:
    """The experts of one seed, which no claim changes for others."""
    from dataclasses import replace

    import vouch.claims.adamerging as module

    monkeypatch.setattr(
        module,
        "experts",
        lambda *_: replace(made, adapt=list(made.adapt), test=list(made.test), valid=list(made.valid)),
    )


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.variant)
def test_it_measures(claim: Claim, quick: None) -> None:
    found = claim.measure(claim.read("drawn,drawn-1"), "smoke", 0)
    assert all(math.isfinite(value) for value in (found.baseline, found.method, found.effect))
    json.dumps(dict(found.details), allow_nan=False)
    assert found.effect == pytest.approx(found.method - found.baseline)
    if claim.variant != "proxy":
        assert 0 <= found.baseline <= 1 and 0 <= found.method <= 1
    if claim.variant == "accuracy":
        for name in ("base", "expert", *OTHERS, "task_wise", "task_wise_plus", "plus", "labels"):
            assert 0 < found.details[f"{name}_accuracy"] <= 1
        assert found.details["expert_accuracy"] > found.details["base_accuracy"]


def test_every_merge_is_another(made: Experts) -> None:
    best, weight = tuned(made)
    found = {name: other(made) for name, other in OTHERS.items()} | {"tuned": best}
    values = {
        w / 10: np.mean(made.accuracy(task_arithmetic(made.base, made.states, w / 10), "valid")) for w in range(1, 11)
    }
    assert values[weight] == max(values.values())
    weights = [state["first.weight"] for state in found.values()]
    same = [torch.equal(a, b) for at, a in enumerate(weights) for b in weights[:at]]
    assert sum(same) <= (weight == 0.3)


def test_labels_are_read_by_the_control_alone(made: Experts) -> None:
    from dataclasses import replace

    wrong = replace(made, adapt=[(x, y.flip(0)) for x, y in made.adapt])
    plain, other = adapted(made, "smoke", 0), adapted(wrong, "smoke", 0)
    assert torch.equal(plain.coefficients, other.coefficients)
    labels = [adapted(each, "smoke", 0, objective="labels").coefficients for each in (made, wrong)]
    assert not torch.equal(*labels)


def test_the_correlation_is_that_of_ranks(made: Experts) -> None:
    from scipy.stats import rankdata

    from vouch.merging.unlabelled import features

    found = Proxy().correlations(made, made.states)
    for task, value in enumerate(found):
        x, y = made.test[task]
        p = features(made.encoder(made.states[task]), x, head=made.heads[task]).double().softmax(1)
        h, loss = -(p * p.log()).sum(1), -p.gather(1, y[:, None]).log()[:, 0]
        wanted = np.corrcoef(rankdata(h), rankdata(loss))[0, 1]
        assert value == pytest.approx(wanted, abs=1e-3)
