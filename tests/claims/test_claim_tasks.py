"""Claims about several tasks: tables, fair sides, and each variant at smoke scale on a small world."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vouch import Catalog, Dataset, Interactions
from vouch.claims import claim, claims
from vouch.claims.adatask import regressions
from vouch.claims.claim import Claim
from vouch.claims.tasks import Side, Tables, from_log, means, read_tables, sparse, train
from vouch.data.world import WorldConfig, build
from vouch.errors import DataError


@pytest.fixture(scope="module")
def small() -> Tables:
    return from_log(build(WorldConfig(users=80, items=60, events=3_000, seed=0)).dataset)


@pytest.mark.parametrize(
    "claim", [*claims("adatask"), *claims("gradcraft")], ids=lambda claim: f"{claim.slug}-{claim.variant}"
)
def test_it_measures(small: Tables, claim: Claim) -> None:
    found = claim.measure(small, "smoke", 0)
    assert math.isfinite(found.effect) and math.isfinite(found.baseline) and math.isfinite(found.method)
    assert found.effect in (found.method - found.baseline, found.baseline - found.method)


def test_parts_are_coded_by_training_rows_alone(small: Tables) -> None:
    train_part, valid, test = small.parts(0)
    n = len(small.group if small.group is not None else ())
    assert len(train_part) + len(valid) + len(test) == n
    assert abs(len(train_part) - 0.6 * n) <= 1
    at = train_part.fields.index("item")
    counts = np.bincount(train_part.codes[:, at], minlength=train_part.sizes[at])
    assert (counts[1:] >= 3).all()  # a code of its own takes three training rows
    assert train_part.sizes == valid.sizes == test.sizes


def test_one_seed_gives_one_result(small: Tables) -> None:
    side = Side("gradcraft", {"tau": 0.3})
    first, second = (train(small.parts(1), side, "smoke", 1) for _ in range(2))
    assert first.test == second.test


def test_adam_by_parts_is_adam(small: Tables) -> None:
    """The metered baseline of AdaTask's claims and the plain sum are the same training."""
    metered = train(small.parts(0), Side("adatask", {"accumulators": "shared"}), "smoke", 0, metered=True)
    plain = train(small.parts(0), Side(), "smoke", 0)
    assert metered.test == pytest.approx(plain.test, abs=2e-3)
    assert metered.meter is not None and 1 / 3 < metered.meter.imbalance() <= 1


def test_means_and_sparse_tasks(small: Tables) -> None:
    assert means({"AUC a": 0.5, "AUC b": 0.7, "GAUC a": 0.6, "RMSE c": 9.0}) == {"AUC": 0.6, "GAUC": 0.6}
    assert means({"AUC a": 0.5, "AUC b": 0.7}, ["b"]) == {"AUC": 0.7}
    table = small.parts(0)[0]
    assert set(sparse(table)) <= {"click", "like"}


def test_the_toy_is_what_it_says() -> None:
    (x, (small_values, large)), _, (test_x, _) = regressions(0)
    assert x.shape == (2000, 40) and small_values.shape == (2000, 10)
    assert float(large.std() / small_values.std()) == pytest.approx(10, rel=0.1)
    assert float(small_values.abs().max()) <= 1 and not bool((x == test_x).all())


def test_a_log_without_feedback_is_refused() -> None:
    dataset = build(WorldConfig(users=20, items=48, events=600, seed=0)).dataset
    log = dataset.interactions
    bare = Interactions.from_arrays(log.user, log.item, time=log.time)
    with pytest.raises(DataError, match="no feedback"):
        from_log(Dataset(bare, Catalog.empty(bare.items), None, "bare"))
    click, seconds = log.feedback["click"], log.feedback["watch_time"]
    for feedback in ({"click": click}, {"seconds": seconds, "more": 2 * seconds}):
        few = Interactions.from_arrays(log.user, log.item, time=log.time, feedback=feedback)
        with pytest.raises(DataError, match=f"few has the feedback {', '.join(feedback)}"):
            from_log(Dataset(few, Catalog.empty(few.items), None, "few"))


@pytest.mark.real
def test_the_real_tables_hold_what_their_readme_says(real_data) -> None:
    found = read_tables(str(real_data("kuairand_explicit")))
    rates = {task: float(np.mean(values)) for task, values in found.labels.items()}
    expected = {"click": 0.717, "long_view": 0.519, "profile_enter": 0.061, "comment": 0.0355}
    assert {task: rates[task] for task in expected} == pytest.approx(expected, abs=2e-3)
    assert len(found.inputs) == 19 and len(found.labels["click"]) == 33_707
    census = read_tables(str(real_data("adult_census")))
    assert len(census.labels["income"]) == 48_842
    assert float(np.mean(census.labels["income"])) == pytest.approx(0.2393, abs=1e-3)
    assert not set(census.inputs) & {"education", "marital_status", "income", "hours_per_week"}
    assert claim("adatask").source("desk") == "kuairand_explicit"
