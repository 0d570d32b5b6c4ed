"""The claims of MEAL: each can be measured, with its controls, and what is promised of the protocol holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vouch.claims import claims
from vouch.claims.claim import Claim
from vouch.claims.meal import NOISE, school
from vouch.data.images import drawn
from vouch.distillation.images import parts

OURS = claims("meal")


@pytest.mark.parametrize(
    "claim", [claim for claim in OURS if claim.variant != "sequences"], ids=lambda claim: claim.variant
)
def test_it_measures(claim: Claim) -> None:
    found = claim.measure(drawn(n_train=260, n_test=60), "smoke", 0)
    assert math.isfinite(found.effect) and math.isfinite(found.baseline) and math.isfinite(found.method)
    if found.method_cases is not None and found.baseline_cases is not None:
        assert found.effect == pytest.approx(float((found.method_cases - found.baseline_cases).mean()), abs=1e-9)
    assert all(np.isfinite(value).all() for value in found.details.values())
    if claim.variant == "accuracy":
        ways = {"labels", "meal", "blocks", "random", "mean"}
        assert {f"accuracy_{way}" for way in ways} | {"ensemble", "best_teacher"} <= set(found.details)


def test_the_main_one_comes_first_and_reads_pictures() -> None:
    assert OURS[0].variant == "accuracy"
    images = OURS[0].read("drawn")
    assert images.name == "drawn 0" and images.fingerprint


def test_noise_reaches_validation_and_not_the_test() -> None:
    images = drawn(n_train=300, n_test=60)
    made, clean = school(images, "smoke", 0, noise=NOISE, kinds=1), parts(images, 100, 0)
    for noisy, true in ((made.train, clean[0]), (made.valid, clean[1])):
        assert 0.15 < float((noisy.y != true.y).float().mean()) < 0.45
    assert torch.equal(made.test.y, clean[2].y)


def test_students_of_one_seed_have_one_start() -> None:
    made = school(drawn(n_train=150, n_test=20), "smoke", 3, kinds=1)
    a, b = made.make((12, 24, 32), False, 99), made.make((12, 24, 32), False, 99)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, made.make((12, 24, 32), False, 0).head.weight)
