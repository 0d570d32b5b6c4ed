"""Every claim can be measured: each variant runs at smoke scale on a small world and gives numbers."""

from __future__ import annotations

import math

import pytest

from vouch.claims import claim as named
from vouch.claims import claims
from vouch.claims.claim import Claim
from vouch.data import Dataset
from vouch.data.world import WorldConfig, build

OTHERS = [each for each in claims() if each.slug not in ("apr", "sasrec") and type(each).read is Claim.read]


@pytest.fixture(scope="module")
def small() -> Dataset:
    return build(WorldConfig(users=80, items=80, events=2_000, seed=0)).dataset


@pytest.mark.parametrize("claim", OTHERS, ids=lambda claim: f"{claim.slug}-{claim.variant}")
def test_it_measures(small: Dataset, claim: Claim) -> None:
    found = claim.measure(small, "smoke", 0)
    assert math.isfinite(found.effect) and math.isfinite(found.baseline) and math.isfinite(found.method)
    if found.method_cases is not None and found.baseline_cases is not None:
        assert len(found.method_cases) == len(found.baseline_cases)
        assert found.effect == pytest.approx(float((found.method_cases - found.baseline_cases).mean()), abs=1e-9)


def test_both_sides_say_how_their_training_ended(small: Dataset) -> None:
    found = named("gcl4sr", "itemknn").measure(small, "smoke", 0).details
    assert found["method_stopped"] == "finished" and found["method_best_epoch"] in (1, 2)
    assert "baseline_stopped" not in found and "epoch_seconds_ratio" not in found  # it counts, without epochs
    found = named("remi", "dr").measure(small, "smoke", 0).details
    assert found["baseline_stopped"] == found["method_stopped"] == "finished" and found["epoch_seconds_ratio"] > 0
