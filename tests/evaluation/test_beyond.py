"""What the lists are like, against plain loops over them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from vouch.data import Catalog, Interactions, Vocabulary
from vouch.errors import ConfigError, DataError
from vouch.evaluation import evaluate
from vouch.evaluation.beyond import gini

N = 12
ITEMS = Vocabulary.of_numbers(np.arange(N))
KINDS = ["a", "b", None, "a", "c", "b", None, "a", "c", "c", "b", "a"]
LABELS = [["x"], ["x", "y"], ["y", "z"], None, [], ["z"], ["x", "y", "z"], ["y"], ["x"], ["z"], ["x", "z"], ["y"]]


@pytest.fixture
def setting(given):
    """A model over 30 cases, their lists of the best 4, the cases and a training log with repeats."""
    kind, make = given
    generator = np.random.default_rng(3)
    scores = torch.as_tensor(generator.permuted(np.tile(np.arange(N), (30, 1)), axis=1)).float()
    histories = [generator.integers(0, N, length).tolist() for length in generator.integers(0, 6, 30)]
    cases = make(N, [[int(item)] for item in generator.integers(0, N, 30)], histories)
    lists = []
    for row, history in zip(scores.tolist(), histories, strict=True):
        order = [item for item in sorted(range(N), key=lambda i, row=row: -row[i]) if item not in history]
        lists.append(order[:4])
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(9)),
        ITEMS,
        generator.integers(0, 8, 40),  # the ninth user has no row
        (N * generator.random(40) ** 2).astype(np.int32),
    )
    return kind(scores), cases, lists, histories, log


def catalog(frame=None, **settings):
    table = pl.DataFrame({"id": np.arange(N), **(frame or {})})
    return Catalog.from_frame(ITEMS, table, id_column="id", **settings)


def test_coverage_and_gini(setting):
    model, cases, lists, _, _ = setting
    result = evaluate(model, cases, metrics=["Coverage@4", "Gini@4", "Coverage@1"])
    shown = [item for row in lists for item in row]
    counts = [shown.count(item) for item in range(N)]
    pairs = sum(abs(a - b) for a, b in itertools.product(counts, counts))
    assert result.metrics["Coverage@4"] == len(set(shown)) / N
    assert result.metrics["Coverage@1"] == len({row[0] for row in lists}) / N
    assert result.metrics["Gini@4"] == pytest.approx(pairs / (2 * N * sum(counts)))


def test_novelty_counts_users_not_rows(setting):
    model, cases, lists, _, log = setting
    users = [{int(u) for u, i in zip(log.user, log.item, strict=True) if i == item} for item in range(N)]
    active = len(set(log.user.tolist()))
    bits = [-math.log2((len(who) + 1) / (active + 1)) for who in users]
    expected = np.mean([np.mean([bits[item] for item in row]) for row in lists])
    result = evaluate(model, cases, metrics=["Novelty@4"], train=log)
    assert result.metrics["Novelty@4"] == pytest.approx(expected)
    assert log.item_counts.sum() > sum(map(len, users))  # the log has repeats, or this shows nothing
    assert min(bits) >= 0


def test_popularity_bias_compares_with_the_own_history(setting):
    model, cases, lists, histories, log = setting
    counts = log.item_counts
    ratios = []
    for row, history in zip(lists, histories, strict=True):
        own = np.mean([counts[item] for item in history]) if history else 0
        if own > 0:
            ratios.append(np.mean([counts[item] for item in row]) / own - 1)
    assert 0 < len(ratios) < 30
    result = evaluate(model, cases, metrics=["PopularityBias@4"], train=log)
    assert result.metrics["PopularityBias@4"] == pytest.approx(np.mean(ratios))


def ild(lists, distance):
    return np.mean([np.mean([distance(a, b) for a, b in itertools.combinations(row, 2)]) for row in lists])


def test_diversity_over_features(setting):
    model, cases, lists, _, _ = setting
    vectors = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
    vectors[3] = 0  # an item of which nothing is known is unlike any other

    def distance(a, b):
        norm = np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
        return 1 - (vectors[a] @ vectors[b] / norm if norm else 0)

    known = catalog({"kind": KINDS}, features={"image": vectors})
    result = evaluate(model, cases, metrics=["ILD@4"], catalog=known)
    assert result.metrics["ILD@4"] == pytest.approx(ild(lists, distance), abs=1e-6)


def test_diversity_over_a_category(setting):
    model, cases, lists, _, _ = setting
    result = evaluate(model, cases, metrics=["ILD@4"], catalog=catalog({"kind": KINDS}, roles={"kind": "category"}))
    assert result.metrics["ILD@4"] == pytest.approx(ild(lists, lambda a, b: KINDS[a] != KINDS[b]))


def test_diversity_over_several_labels(setting):
    model, cases, lists, _, _ = setting

    def distance(a, b):
        one, other = set(LABELS[a] or ["none"]), set(LABELS[b] or ["none"])
        return 1 - len(one & other) / math.sqrt(len(one) * len(other))

    known = catalog({"labels": LABELS}, roles={"labels": "categories"})
    result = evaluate(model, cases, metrics=["ILD@4"], catalog=known)
    assert result.metrics["ILD@4"] == pytest.approx(ild(lists, distance))


def test_small_pieces_change_nothing(setting, monkeypatch):
    model, cases, _, _, _ = setting
    known = catalog(features={"image": np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)})
    whole = evaluate(model, cases, metrics=["ILD@4"], catalog=known)
    monkeypatch.setattr("vouch.evaluation.beyond.CELLS", 50)
    assert evaluate(model, cases, metrics=["ILD@4"], catalog=known).metrics == pytest.approx(whole.metrics)


def test_places_that_no_item_can_fill_are_left_out(given):
    """With three of four items in the history, a list of 4 has one item: the history never slips back in."""
    kind, make = given
    cases = make(4, [[3], [0]], [[0, 1, 2], [2]])
    model = kind(torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]))
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(3)), cases.log.items, np.array([0, 0, 1]), np.array([0, 2, 3], dtype=np.int32)
    )
    known = Catalog.from_frame(
        cases.log.items, pl.DataFrame({"id": range(4), "kind": ["a", "a", "b", "b"]}), id_column="id"
    )
    names = ["Coverage@4", "Gini@4", "Novelty@4", "PopularityBias@4", "ILD@4"]
    result = evaluate(model, cases, metrics=names, train=log, catalog=known)
    assert result.metrics["Coverage@4"] == 3 / 4  # items 3; 0, 1, 3
    assert result.metrics["Gini@4"] == pytest.approx(gini(np.array([1.0, 1, 0, 2])))
    bits = [-math.log2((count + 1) / 3) for count in (1, 0, 1, 1)]
    assert result.metrics["Novelty@4"] == pytest.approx((bits[3] + (bits[0] + bits[1] + bits[3]) / 3) / 2)
    assert result.metrics["PopularityBias@4"] == pytest.approx((1 / (2 / 3) - 1 + (2 / 3) / 1 - 1) / 2)
    assert result.metrics["ILD@4"] == pytest.approx(2 / 3)  # only the second list has a pair


def test_what_no_case_defines_is_refused(given):
    kind, make = given
    cases = make(3, [[0]])
    train = cases.log
    with pytest.raises(DataError, match="history"):
        evaluate(kind(torch.rand(1, 3)), cases, metrics=["PopularityBias@2"], train=train)
    with pytest.raises(DataError, match="two items"):
        known = Catalog.from_frame(
            cases.log.items, pl.DataFrame({"id": range(3), "kind": ["a", "b", "b"]}), id_column="id"
        )
        evaluate(kind(torch.rand(1, 3)), cases, metrics=["ILD@1"], catalog=known)
    with pytest.raises(ConfigError, match="features or a category"):
        evaluate(kind(torch.rand(1, 3)), cases, metrics=["ILD@2"], catalog=Catalog.empty(cases.log.items))


@settings(max_examples=50, deadline=None)
@examples(st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_gini_is_half_the_relative_mean_difference(counts):
    value = gini(np.array(counts, dtype=float))
    if sum(counts) == 0:
        assert value == 0
        return
    pairs = sum(abs(a - b) for a, b in itertools.product(counts, counts))
    assert value == pytest.approx(pairs / (2 * len(counts) * sum(counts)), abs=1e-12)
    assert -1e-12 <= value <= 1 - 1 / len(counts) + 1e-12
