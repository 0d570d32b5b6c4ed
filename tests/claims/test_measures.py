"""Every claim can be measured: each variant runs at smoke scale on a small world and gives numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vouch.claims import claim as named
from vouch.claims import claims
from vouch.claims.claim import Claim
from vouch.data import Catalog, Dataset
from vouch.data.world import WorldConfig, build
from vouch.recommenders.sequential.sasrec import SASRec

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


def test_a_side_that_was_trained_is_read_back(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = named("eclsr", "equivariance"), named("eclsr", "discriminator")
    monkeypatch.setattr(type(first), "trained", tmp_path)
    monkeypatch.setattr(type(other), "trained", tmp_path)
    whole = first.measure(small, "smoke", 0)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(SASRec, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = first.measure(small, "smoke", 0)
    assert again.details == whole.details
    for name in ("baseline_cases", "method_cases"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        first.measure(small, "smoke", 1)
    changed = replace(small, catalog=Catalog.empty(small.catalog.items))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        first.measure(changed, "smoke", 0)
    monkeypatch.undo()
    monkeypatch.setattr(type(other), "trained", tmp_path)
    fitted: list[object] = []
    fit = SASRec.fit
    monkeypatch.setattr(SASRec, "fit", lambda self, *rest: fitted.append(self) or fit(self, *rest))
    assert other.measure(small, "smoke", 0).method == whole.method
    assert len(fitted) == 1  # the baseline, which is another


def test_catalogues_have_fingerprints(small: Dataset) -> None:
    catalog = small.catalog
    same = replace(catalog, table=catalog.table.clone(), features={k: v.copy() for k, v in catalog.features.items()})
    assert same.fingerprint == catalog.fingerprint
    turned = replace(catalog, table=catalog.table.reverse())
    described = replace(catalog, features={"image": np.ones((len(small.catalog.items), 2), np.float32)})
    renamed = replace(catalog, features={"text": np.ones((len(small.catalog.items), 2), np.float32)})
    prints = {each.fingerprint for each in (catalog, turned, described, renamed, Catalog.empty(catalog.items))}
    assert len(prints) == 5
