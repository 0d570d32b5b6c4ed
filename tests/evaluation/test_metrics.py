"""Ranking metrics against brute force over all orders of ties, and against independent libraries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.retrieval as peer
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.errors import ConfigError
from vouch.evaluation import parse_metric

NAMES = ("NDCG@3", "HR@2", "Recall@3", "Precision@2", "MRR", "MRR@2", "MAP@3", "MAP@9", "NDCG@9", "AUC")


def of_order(name: str, relevant: list[bool], banned: int = 0) -> float:
    """A metric of one ranking, best first, by its definition. `banned` targets can never be reached."""
    metric = parse_metric(name)
    k = metric.k or len(relevant)
    wanted = sum(relevant) + banned
    places = [place for place, hit in enumerate(relevant, start=1) if hit]
    top = [place for place in places if place <= k]
    if metric.family == "NDCG":
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(wanted, k) + 1))
        return sum(1 / math.log2(place + 1) for place in top) / ideal
    if metric.family == "HR":
        return float(bool(top))
    if metric.family == "Recall":
        return len(top) / wanted
    if metric.family == "Precision":
        return len(top) / k
    if metric.family == "MRR":
        return 1 / top[0] if top else 0.0
    if metric.family == "MAP":
        return sum(nth / place for nth, place in enumerate(top, start=1)) / min(wanted, k)
    negatives = [place for place, hit in enumerate(relevant, start=1) if not hit]
    if not negatives:
        return 0.5
    return sum(place < other for place in places for other in negatives) / (wanted * len(negatives))


def over_all_orders(name: str, scores: list[int], targets: list[int], banned: int = 0) -> float:
    """The mean of a metric over every order that agrees with the scores."""
    groups = [
        list(group)
        for _, group in itertools.groupby(sorted(range(len(scores)), key=lambda i: -scores[i]), lambda i: scores[i])
    ]
    values = []
    for orders in itertools.product(*(itertools.permutations(group) for group in groups)):
        values.append(of_order(name, [item in targets for order in orders for item in order], banned))
    return float(np.mean(values))


@st.composite
def small_cases(draw):
    n = draw(st.integers(2, 6))
    scores = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    targets = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    return scores, targets


@settings(max_examples=60, deadline=None)
@given(case=small_cases())
def test_every_metric_is_its_mean_over_all_orders_of_ties(ask, case):
    scores, targets = case
    # A second case with another number of targets makes sure that cases do not mix.
    result = ask([scores, list(range(len(scores)))], [targets, [0]], metrics=NAMES)
    for name in NAMES:
        assert result.per_case[name][0] == pytest.approx(over_all_orders(name, scores, targets), abs=1e-9), name
        ascending = of_order(name, [False] * (len(scores) - 1) + [True])
        assert result.per_case[name][1] == pytest.approx(ascending, abs=1e-12), name


@settings(max_examples=40, deadline=None)
@given(case=small_cases(), data=st.data())
def test_targets_in_the_history_are_misses(ask, case, data):
    scores, targets = case
    history = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=len(scores) - 1))
    left = [item for item in range(len(scores)) if item not in history]
    banned = len(set(targets) & set(history))
    result = ask([scores], [targets], [history], metrics=NAMES)
    for name in NAMES:
        expected = over_all_orders(
            name, [scores[i] for i in left], [left.index(i) for i in targets if i in left], banned=banned
        )
        assert result.per_case[name][0] == pytest.approx(expected, abs=1e-9), name
    assert result.protocol["targets_in_history"] == banned


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_midrank_puts_the_target_in_the_middle_of_its_ties(ask, scores):
    rank = sum(s > scores[0] for s in scores) + (sum(s == scores[0] for s in scores) + 1) / 2
    result = ask([scores], [[0]], metrics=NAMES, ties="midrank")
    assert result.rank[0] == rank
    assert result.metrics["NDCG@3"] == pytest.approx(1 / math.log2(rank + 1) if rank <= 3 else 0)
    assert result.metrics["HR@2"] == float(rank <= 2)
    assert result.metrics["Recall@3"] == float(rank <= 3)
    assert result.metrics["Precision@2"] == float(rank <= 2) / 2
    assert result.metrics["MRR"] == pytest.approx(1 / rank)
    assert result.metrics["MRR@2"] == pytest.approx(1 / rank if rank <= 2 else 0)
    assert result.metrics["MAP@3"] == pytest.approx(1 / rank if rank <= 3 else 0)
    assert result.metrics["AUC"] == pytest.approx(over_all_orders("AUC", scores, [0]))


def test_midrank_of_several_targets_is_refused(ask):
    with pytest.raises(ConfigError, match="one target"):
        ask([[1, 1, 0]], [[0, 1]], ties="midrank")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_agree_with_torchmetrics_without_ties(ask, several, seed):
    generator = np.random.default_rng(seed)
    cases, n = 40, 60
    scores = generator.permuted(np.arange(cases * n).reshape(cases, n), axis=1)
    targets = [
        generator.choice(n, generator.integers(1, 15) if several else 1, replace=False).tolist() for _ in range(cases)
    ]
    names = [f"{family}@{k}" for family in ("NDCG", "HR", "Recall", "Precision", "MRR") for k in (1, 5, 10, 60)]
    result = ask(scores, targets, metrics=[*names, "MRR", "MAP@60", "AUC"])
    functions = {
        "NDCG": peer.retrieval_normalized_dcg,
        "HR": peer.retrieval_hit_rate,
        "Recall": peer.retrieval_recall,
        "Precision": peer.retrieval_precision,
        "MRR": peer.retrieval_reciprocal_rank,
        "MAP": peer.retrieval_average_precision,
        "AUC": peer.retrieval_auroc,
    }
    for case in range(cases):
        preds = torch.as_tensor(scores[case] / scores.size)  # beyond 0 .. 1 their AUROC would squash them into ties
        wanted = torch.zeros(n, dtype=torch.bool)
        wanted[targets[case]] = True
        for name in result.per_case:
            metric = parse_metric(name)
            theirs = float(functions[metric.family](preds, wanted, top_k=metric.k))
            assert result.per_case[name][case] == pytest.approx(theirs, abs=1e-6), (name, case)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_ndcg_map_and_auc_agree_with_scikit_learn(ask, levels):
    generator = np.random.default_rng(levels)
    cases, n = 50, 80
    scores = generator.integers(0, levels, (cases, n))
    relevant = generator.random((cases, n)) < 0.1
    relevant[np.arange(cases), generator.integers(0, n, cases)] = True
    targets = [np.flatnonzero(row).tolist() for row in relevant]
    result = ask(scores, targets, metrics=["NDCG@10", "NDCG@80", "AUC", "MAP@80"])
    for case in range(cases):
        for k in (10, 80):  # scikit-learn too averages over ties
            theirs = sklearn.metrics.ndcg_score(relevant[case : case + 1], scores[case : case + 1], k=k)
            assert result.per_case[f"NDCG@{k}"][case] == pytest.approx(theirs, abs=1e-6)
        theirs = sklearn.metrics.roc_auc_score(relevant[case], scores[case])
        assert result.per_case["AUC"][case] == pytest.approx(theirs, abs=1e-6)
        if len(np.unique(scores[case])) == n:
            theirs = sklearn.metrics.average_precision_score(relevant[case], scores[case])
            assert result.per_case["MAP@80"][case] == pytest.approx(theirs, abs=1e-6)


def test_constant_scores_are_exactly_at_chance(ask):
    n, k = 200, 10
    places = np.arange(1, n + 1)
    one = ask(np.zeros((3, n)), [[0], [7], [199]], metrics=["HR@10", "NDCG@10", "MRR", "AUC", "Recall@10", "MAP@10"])
    assert one.per_case["HR@10"] == pytest.approx(k / n)
    assert one.per_case["NDCG@10"] == pytest.approx((1 / np.log2(places[:k] + 1)).sum() / n)
    assert one.per_case["MRR"] == pytest.approx((1 / places).sum() / n)
    assert one.per_case["MAP@10"] == pytest.approx((1 / places[:k]).sum() / n)
    assert one.per_case["AUC"] == pytest.approx(0.5)
    assert one.rank == pytest.approx((n + 1) / 2)
    several = ask(np.zeros((2, n)), [[0, 1, 2], [5, 190, 17]], metrics=["HR@10", "Recall@10", "AUC"])
    none_of_three = math.comb(n - 3, k) / math.comb(n, k)
    assert several.per_case["HR@10"] == pytest.approx(1 - none_of_three)
    assert several.per_case["Recall@10"] == pytest.approx(k / n)
    assert several.per_case["AUC"] == pytest.approx(0.5)


def test_random_scores_hit_as_often_as_chance(ask):
    generator = np.random.default_rng(0)
    cases, n, k = 4000, 100, 10
    targets = generator.integers(0, n, (cases, 1)).tolist()
    result = ask(generator.random((cases, n)), targets, metrics=["HR@10", "AUC"])
    error = math.sqrt(k / n * (1 - k / n) / cases)
    assert abs(result.metrics["HR@10"] - k / n) < 4 * error
    assert abs(result.metrics["AUC"] - 0.5) < 4 / math.sqrt(12 * cases)


def test_a_wide_tie_of_many_targets_stays_exact(ask):
    """Hypergeometric terms are formed from logarithms; large numbers must not spoil them."""
    n, wanted, k = 20_000, 40, 10
    result = ask(np.zeros((1, n)), [list(range(wanted))], metrics=["HR@10", "MRR@10"])
    later = [math.prod((n - wanted - i) / (n - i) for i in range(j)) for j in range(k + 1)]
    assert result.metrics["HR@10"] == pytest.approx(1 - later[k], rel=1e-7)
    expected = sum((later[j] - later[j + 1]) / (j + 1) for j in range(k))
    assert result.metrics["MRR@10"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NDGC@10", "NDCG@10"),
        ("hitrate@10", "there is no metric"),
        ("NDCG", "needs a cut-off"),
        ("HR@0", "at least 1"),
        ("AUC@10", "no cut-off"),
        ("", "there is no metric"),
        ("NDCG@ten", "there is no metric"),
    ],
)
def test_a_wrong_name_is_explained(name, says):
    with pytest.raises(ConfigError, match=says):
        parse_metric(name)


def test_names_are_read_without_regard_to_case():
    assert parse_metric("ndcg@5").name == "NDCG@5"
    assert parse_metric("Mrr").k is None
    assert parse_metric("popularitybias@20").beyond
