"""The evaluation loop: blocks, history, sampled ranking, errors, groups."""

from __future__ import annotations

import gzip
import importlib
import json
import math

import numpy as np
import pytest
import torch

from vouch.data import Interactions
from vouch.data.catalog import Catalog
from vouch.data.vocabulary import Vocabulary
from vouch.errors import ConfigError, DataError
from vouch.evaluation import evaluate

LOOP = importlib.import_module("vouch.evaluation.evaluate")  # the function of that name hides the module
ALL = ("NDCG@10", "HR@10", "Recall@10", "Precision@10", "MRR", "MRR@10", "MAP@10", "AUC", "Coverage@10", "Gini@10")


def random_cases(cases, n, *, several=True, levels=30, seed=0):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (cases, n))
    histories = [generator.integers(0, n, generator.integers(0, 20)).tolist() for _ in range(cases)]
    targets = [generator.integers(0, n, generator.integers(1, 6) if several else 1).tolist() for _ in range(cases)]
    return scores, targets, histories


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sampled", [None, 20])
def test_the_size_of_blocks_changes_nothing(ask, monkeypatch, several, sampled):
    scores, targets, histories = random_cases(70, 90, several=several)
    whole = ask(scores, targets, histories, metrics=ALL, sampled=sampled)
    monkeypatch.setattr(LOOP, "BLOCK_CELLS", 90 * 7 + 5)
    pieces = ask(scores, targets, histories, metrics=ALL, sampled=sampled)
    assert pieces.metrics == pytest.approx(whole.metrics, rel=1e-12)
    np.testing.assert_array_equal(pieces.rank, whole.rank)
    for name, values in whole.per_case.items():
        np.testing.assert_array_equal(pieces.per_case[name], values)


def test_no_block_holds_more_than_its_share(given, monkeypatch):
    kind, make = given
    sizes = []

    class Watched(kind):
        def score_or_popularity(self, queries):
            sizes.append(len(queries))
            return super().score_or_popularity(queries)

    monkeypatch.setattr(LOOP, "BLOCK_CELLS", 100)
    evaluate(Watched(torch.rand(25, 10)), make(10, [[0]] * 25))
    assert sizes == [10, 10, 5]
    sizes.clear()
    evaluate(Watched(torch.rand(3, 200)), make(200, [[0]] * 3))  # one row does not fit: still one at a time
    assert sizes == [1, 1, 1]


def test_one_target_and_several_go_through_the_same_metrics(ask):
    """Counting (one target) and sorting (several) are two paths: the same case must come out of both."""
    scores, targets, histories = random_cases(60, 50, several=False)
    counted = ask(scores, targets, histories, metrics=ALL[:8])
    # Another case with two targets sends all through the sort.
    mixed = ask(np.vstack([scores, scores[:1]]), [*targets, [1, 2]], [*histories, []], metrics=ALL[:8])
    for name, values in counted.per_case.items():
        np.testing.assert_allclose(mixed.per_case[name][:60], values, atol=1e-12)
    np.testing.assert_array_equal(mixed.rank[:60], counted.rank)


def test_means_are_those_of_the_cases(ask):
    scores, targets, histories = random_cases(50, 40)
    result = ask(scores, targets, histories, metrics=ALL)
    assert list(result.metrics) == list(ALL)
    assert set(result.per_case) == set(ALL[:8])
    for name, values in result.per_case.items():
        assert values.shape == (50,)
        assert values.dtype == np.float64
        assert result.metrics[name] == pytest.approx(values.mean(), abs=1e-15)
        assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_array_equal(result.user, np.arange(50))
    np.testing.assert_array_equal(result.history_length, [len(history) for history in histories])


def test_the_history_is_taken_out_or_kept(ask):
    scores = [[5.0, 4.0, 3.0, 2.0, 1.0]]
    out = ask(scores, [[2]], [[0, 1]], metrics=["MRR", "AUC"])
    kept = ask(scores, [[2]], [[0, 1]], metrics=["MRR", "AUC"], exclude="none")
    assert (out.rank[0], kept.rank[0]) == (1, 3)
    assert (out.metrics["AUC"], kept.metrics["AUC"]) == (1.0, 0.5)
    assert (out.exclude, kept.exclude) == ("history", "none")


def test_a_repeated_target_is_a_miss_and_is_counted(ask):
    names = ["NDCG@5", "HR@5", "MRR", "AUC"]
    result = ask([[9.0, 1.0, 2.0, 3.0, 4.0], [9.0, 1.0, 2.0, 3.0, 4.0]], [[0], [4]], [[0], [1]], metrics=names)
    assert [result.per_case[name][0] for name in names] == [0, 0, 0, 0]
    assert np.isinf(result.rank[0])
    assert result.per_case["HR@5"][1] == 1
    assert result.protocol["targets_in_history"] == 1
    kept = ask([[9.0, 1.0, 2.0, 3.0, 4.0]], [[0]], [[0]], metrics=names, exclude="none")
    assert kept.metrics["NDCG@5"] == 1
    assert kept.protocol["targets_in_history"] == 0


def test_items_that_a_model_rules_out_are_no_candidates(ask):
    """A target scored -inf is a miss, though not one of the history's; other such items are not ranked at all."""
    inf = math.inf
    result = ask([[1, -inf, 0, -inf], [1, -inf, 0, -inf]], [[1], [2]], metrics=["HR@4", "AUC", "MRR"])
    assert result.per_case["HR@4"].tolist() == [0, 1]
    assert result.per_case["AUC"].tolist() == [0, 0]
    assert result.per_case["MRR"].tolist() == [0, 0.5]
    assert result.protocol["targets_in_history"] == 0


def test_infinite_scores_are_numbers(ask):
    assert ask([[math.inf, -math.inf, 0.0]], [[0]], metrics=["MRR"]).metrics["MRR"] == 1


def test_a_target_named_twice_counts_once(ask):
    twice = ask([[3.0, 2.0, 1.0]], [[1, 1, 2]], metrics=["NDCG@3", "Recall@2", "MAP@3"])
    once = ask([[3.0, 2.0, 1.0]], [[1, 2]], metrics=["NDCG@3", "Recall@2", "MAP@3"])
    assert twice.metrics == once.metrics
    assert twice.protocol["targets"] == 2


def test_the_models_own_tensor_is_left_alone(given):
    kind, make = given

    class Whole(kind):
        def score_or_popularity(self, queries):
            return self.scores

    scores = torch.rand(4, 6)
    before = scores.clone()
    evaluate(Whole(scores), make(6, [[0]] * 4, [[1, 2]] * 4), sampled=2)
    assert torch.equal(scores, before)


def test_half_precision_scores_are_taken(given):
    kind, make = given
    scores = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    assert evaluate(kind(scores), make(3, [[2]])).rank[0] == 2


# Sampled ranking ----------------------------------------------------------------------------------------------


def test_sampled_metrics_carry_their_number_in_the_name(ask):
    scores, targets, _ = random_cases(30, 200, several=False)
    result = ask(scores, targets, metrics=["NDCG@10", "Coverage@10"], sampled=100)
    assert list(result.metrics) == ["NDCG@10~100neg", "Coverage@10"]  # lists are never sampled
    assert list(result.per_case) == ["NDCG@10~100neg"]
    assert "biased" in result.protocol["candidates"]


@pytest.mark.parametrize("several", [False, True])
def test_sampling_everything_is_the_full_ranking(ask, several):
    scores, targets, histories = random_cases(40, 60, several=several)
    full = ask(scores, targets, histories, metrics=ALL[:8])
    every = ask(scores, targets, histories, metrics=ALL[:8], sampled=60)
    for name, value in full.metrics.items():
        assert every.metrics[f"{name}~60neg"] == pytest.approx(value, abs=1e-12)


def test_sampled_ranks_have_the_mean_that_uniform_draws_give(ask):
    """A target with `b` of `N - 1` others above it has on average `b m / (N - 1)` of `m` drawn above it."""
    cases, n, m, rank = 3000, 51, 10, 11
    scores = np.tile(-np.arange(n), (cases, 1))
    result = ask(scores, [[rank - 1]] * cases, metrics=["MRR"], sampled=m)
    above = result.rank - 1
    expected = (rank - 1) * m / (n - 1)
    spread = math.sqrt(expected * (1 - (rank - 1) / (n - 1)) * (n - 1 - m) / (n - 2))  # hypergeometric
    assert abs(above.mean() - expected) < 4 * spread / math.sqrt(cases)
    assert above.std() == pytest.approx(spread, rel=0.1)


def test_sampled_negatives_are_never_history_or_targets(ask):
    """All but three items are ruled out: the sample of ten can hold only those."""
    scores = [np.arange(30)[::-1]]
    result = ask(scores, [[29, 28]], [list(range(25))], metrics=["Recall@3", "AUC"], sampled=10)
    assert result.metrics["Recall@3~10neg"] == 0
    assert result.metrics["AUC~10neg"] == 0
    assert result.rank[0] == 4


def test_the_seed_decides_the_sample(ask):
    scores, targets, _ = random_cases(50, 300, several=False, levels=10**6)
    first = ask(scores, targets, sampled=20, seed=1)
    again = ask(scores, targets, sampled=20, seed=1)
    other = ask(scores, targets, sampled=20, seed=2)
    np.testing.assert_array_equal(first.rank, again.rank)
    assert (first.rank != other.rank).any()


# What is refused ----------------------------------------------------------------------------------------------


def test_a_score_that_is_no_number_is_refused(ask):
    with pytest.raises(DataError, match="not a number"):
        ask([[1.0, math.nan, 2.0]], [[0]])
    with pytest.raises(DataError, match="not a number"):
        ask([[1.0, math.nan, math.inf]], [[0]], [[1]])  # even where the history would hide it


def test_scores_of_the_wrong_shape_are_refused(given):
    kind, make = given
    with pytest.raises(DataError, match="shape"):
        evaluate(kind(torch.rand(2, 4)), make(5, [[0], [1]]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"metrics": ["NDGC@10"]}, "did you mean 'NDCG@10'"),
        ({"exclude": "seen"}, "'history' or 'none'"),
        ({"ties": "lucky"}, "'expected' or 'midrank'"),
        ({"sampled": 0}, "at least 1"),
        ({"metrics": ["Novelty@5"]}, "training log"),
        ({"metrics": ["PopularityBias@5"]}, "training log"),
        ({"metrics": ["ILD@5"]}, "catalogue"),
        ({"train": Interactions.from_arrays([0, 0], [0, 1])}, "train has 2 items"),
        ({"catalog": Catalog.empty(Vocabulary.of_numbers(np.arange(9)))}, "catalog has 9 items"),
    ],
)
def test_a_wrong_setting_is_explained(ask, settings, says):
    with pytest.raises(ConfigError, match=says):
        ask(np.zeros((1, 5)), [[0]], **settings)


def test_no_case_and_no_target_are_refused(given):
    kind, make = given
    cases = make(5, [[0], [1]])
    with pytest.raises(DataError, match="no case"):
        evaluate(kind(torch.rand(2, 5)), cases.take(np.zeros(0, dtype=np.int64)))
    with pytest.raises(DataError, match="no target"):
        evaluate(kind(torch.rand(2, 5)), make(5, [[0, 1], []]))


def test_one_name_alone_is_one_metric(ask):
    assert list(ask([[1.0, 2.0]], [[0]], metrics="MRR").metrics) == ["MRR"]


# What comes back ----------------------------------------------------------------------------------------------


def test_groups_have_the_means_of_their_cases(ask):
    scores, targets, histories = random_cases(80, 40, several=False)
    result = ask(scores, targets, histories, metrics=["NDCG@10"])
    rows = result.by_group("NDCG@10", result.history_length, [5, 10, 15])
    assert [(row["low"], row["high"]) for row in rows] == [(None, 5), (5, 10), (10, 15), (15, None)]
    assert sum(row["cases"] for row in rows) == 80
    weighted = sum(row["cases"] * row["mean"] for row in rows) / 80
    assert weighted == pytest.approx(result.metrics["NDCG@10"])
    inside = (result.history_length >= 5) & (result.history_length < 10)
    values = result.per_case["NDCG@10"][inside]
    assert rows[1]["mean"] == pytest.approx(values.mean())
    assert rows[1]["sem"] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))
    json.dumps(rows)
    with pytest.raises(ConfigError, match="not measured"):
        result.by_group("HR@10", result.history_length, [5])
    with pytest.raises(ConfigError, match="values for 80 cases"):
        result.by_group("NDCG@10", np.zeros(3), [5])


def test_the_result_is_plain_json(ask):
    scores, targets, histories = random_cases(20, 30)
    result = ask(scores, targets, histories, metrics=ALL)
    back = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert back["metrics"] == result.metrics
    assert back["protocol"]["exclude"] == "history"
    assert "20 cases" in repr(result)


def test_training_counts_are_those_of_the_first_target(given):
    kind, make = given
    cases = make(4, [[1, 2], [3]], [[0, 0, 1], [1]])
    train = cases.log.where(np.array([True, True, True, False, False, True, False]))
    result = evaluate(kind(torch.rand(2, 4)), cases, train=train)
    assert result.target_popularity.tolist() == [2, 0]
    assert result.protocol["cold_targets"] == 2  # items 2 and 3
    assert evaluate(kind(torch.rand(2, 4)), cases).target_popularity.tolist() == [0, 0]


@pytest.mark.real
def test_popularity_on_amazon_beauty_is_as_published(real_data, given):
    """The data's own notes count a tie with the target in its favour: so scored, HR and NDCG must be theirs."""
    kind, make = given
    with gzip.open(real_data("amazon_beauty") / "sequences.txt.gz", "rt") as lines:
        rows = [[int(item) - 1 for item in line.split()[1:]] for line in lines]
    n = 1 + max(map(max, rows))
    counts = torch.as_tensor(np.bincount(np.concatenate([row[:-2] for row in rows]), minlength=n)).float()
    last = torch.tensor([row[-1] for row in rows])

    class Popular(kind):
        bonus = 0.0

        def score_or_popularity(self, queries):
            scores = counts.repeat(len(queries), 1)
            scores[torch.arange(len(queries)), last[torch.from_numpy(queries.user.astype(np.int64))]] += self.bonus
            return scores

    class Favoured(Popular):
        bonus = 0.5

    cases = make(n, [row[-1:] for row in rows], [row[:-1] for row in rows])
    published = evaluate(Favoured(counts), cases, metrics=["HR@10", "NDCG@10"])
    assert len(published) == 22_363
    assert published.metrics["HR@10"] == pytest.approx(0.0120, abs=5e-5)
    assert published.metrics["NDCG@10"] == pytest.approx(0.0056, abs=5e-5)
    fair = evaluate(Popular(counts), cases, metrics=["HR@10", "NDCG@10"])
    assert 0.0110 < fair.metrics["HR@10"] < 0.0118
