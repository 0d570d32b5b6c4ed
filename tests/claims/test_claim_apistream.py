"""The claims of learning from a stream of services: fair sides, and every variant measures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vouch.claims import apistream, claims
from vouch.claims.apistream import WAYS, Schools, learn, on_labels, own_features, schools, summary
from vouch.claims.claim import Claim
from vouch.data.images import Images, drawn

VARIANTS = claims("apistream")


@pytest.fixture(scope="module")
def images() -> Images:
    return drawn(n_train=400, n_test=60, classes=5, size=8)


@pytest.fixture(scope="module")
def made(images: Images) -> Schools:
    return schools(images, "smoke", 0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, made: Schools) -> None:
    settings = {"iterations": 3, "model_steps": 2, "batch_size": 16, "generator_width": 8, "memory": 20}
    monkeypatch.setitem(apistream.BUDGET, "smoke", settings)
    monkeypatch.setattr(apistream, "schools", lambda *args: made)


def test_services_share_the_classes_and_see_no_test_picture(made: Schools, images: Images) -> None:
    assert [api.classes for api in made.apis] == [("pattern 0", "pattern 1"), ("pattern 2", "pattern 3", "pattern 4")]
    for part, whole in ((made.train, images.train), (made.test, images.test)):
        assert sum(len(y) for _, y in part.values()) == len(whole)
        x, y = part[made.apis[1].name]
        mine = torch.from_numpy(whole.label) >= 2
        assert torch.equal(x, whole.tensor()[mine] * 2 - 1)
        assert torch.equal(y + 2, torch.from_numpy(whole.label)[mine])
    assert min(made.accuracy.values()) > 0.6


@pytest.mark.usefixtures("short")
def test_ways_without_data_spend_alike(made: Schools) -> None:
    spent = {way: summary(learn(made, "smoke", 0, way))["queries"] for way in WAYS}
    for way in ("full", "noise", "sequential", "one generator", "no similarity"):
        assert spent[way] == 2 * 3 * (16 * 5 + 2 * 16)
    assert spent["real"] == len(made.train[made.apis[0].name][0]) + len(made.train[made.apis[1].name][0])
    few = sum(max(4, round(0.02 * len(y))) for _, y in made.train.values())
    assert spent["few real"] == few and spent["data-efficient"] < spent["full"]


def test_labels_are_learned_at_once_and_one_after_the_other(made: Schools) -> None:
    joint = on_labels(made, "smoke", 0, joint=True)
    classic = on_labels(made, "smoke", 0, joint=False)
    assert len(joint.classes) == 1 and [len(row) for row in classic.classes] == [1, 2]
    assert joint.average(joint.classes) > 0.6 and classic.average(classic.task) > 0.7


def test_networks() -> None:
    kinds = [apistream.classifier((3, 9, 10), 4, convolutions=c)(torch.zeros(2, 3, 9, 10)).shape for c in (False, True)]
    assert kinds == [(2, 4), (2, 4)]
    assert own_features((1, 16, 16), "desk")(torch.zeros(2, 1, 16, 16)).shape == (2, 100)
    assert own_features((3, 32, 32), "full")(torch.zeros(2, 3, 32, 32)).shape == (2, 1024)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in own_features((3, 32, 32), "full").modules())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("claim", VARIANTS, ids=lambda claim: claim.variant)
def test_it_measures(images: Images, claim: Claim) -> None:
    assert isinstance(claim, apistream._StreamClaim)
    found = claim.measure(images, "smoke", 0)
    low, high = (found.details[way] for way in claim.sides)
    assert (found.baseline, found.method) == (low[claim.value], high[claim.value])
    if claim.variant == "memory":
        assert found.effect == pytest.approx(found.baseline - found.method)
    elif claim.variant == "comparable":
        assert found.effect == pytest.approx(found.method - 0.95 * found.baseline)
        assert {"real", "joint", "services"} <= found.details.keys()
    else:
        assert found.effect == pytest.approx(found.method - found.baseline)
    assert math.isfinite(found.effect)


def test_the_main_claim_comes_first_and_smoke_needs_no_files() -> None:
    assert VARIANTS[0].variant == "comparable"
    assert {claim.data["smoke"] for claim in VARIANTS} == {"drawn"}
    assert len(VARIANTS[0].read("drawn")) == 600  # type: ignore[attr-defined]
