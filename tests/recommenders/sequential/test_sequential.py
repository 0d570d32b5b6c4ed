"""What every sequential recommender must do, whichever its encoder and its loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vouch import registry
from vouch.data import Dataset, Queries, Query, Split, split
from vouch.errors import ConfigError, DataError, UnknownIdError
from vouch.evaluation import evaluate
from vouch.recommenders import load
from vouch.recommenders.sequential import base
from vouch.recommenders.sequential.base import Objective, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.gru4rec import GRU4Rec
from vouch.recommenders.sequential.markov import Markov
from vouch.recommenders.sequential.sasrec import SASRec
from vouch.training import Run

METHODS = ("sasrec", "gru4rec", "bert4rec")
CAUSAL = ("sasrec", "gru4rec")
LOSSES = ("ce", "sampled_softmax", "gbce", "bce", "bpr", "top1", "bpr_max")
SMALL: dict[str, Any] = {"hidden_size": 16, "max_length": 8, "epochs": 2, "batch_size": 16, "dropout": 0.2}
LONG = [int(item) for item in np.random.default_rng(5).integers(0, 25, 20)]


def new(slug: str, **settings: Any) -> SequentialRecommender:
    return registry.method(slug)(**{**SMALL, **settings})


@pytest.fixture(scope="module")
def trained(made: Split) -> dict[str, SequentialRecommender]:
    models = {slug: new(slug, learning_rate=0.01) for slug in METHODS}
    for model in models.values():
        model.fit(made, Run(device="cpu"))
    return models


def prepared(made: Split, slug: str = "sasrec", **settings: Any) -> tuple[SequentialRecommender, Objective]:
    """A model before its first step, as `fit` makes it, without dropout."""
    model = new(slug, **{"dropout": 0.0, **settings})
    torch.manual_seed(0)
    objective = model.begin(made)
    for value in model.network.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model, objective


def first_batch(model: SequentialRecommender, made: Split) -> SequenceBatch:
    return next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))


# The objective ------------------------------------------------------------------------------------------------


def by_hand(kind: str, hidden: Tensor, table: Tensor, bias: Tensor, target: int, negatives: list[int]) -> float:
    """The loss of one target, written out."""

    def score(item: int) -> float:
        return float(hidden @ table[item] + bias[item])

    s, others = score(target), [score(item) for item in negatives if item != target]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    if kind in ("ce", "sampled_softmax"):
        others = [score(item) for item in range(len(table)) if item != target] if kind == "ce" else others
        return -math.log(math.exp(s) / (math.exp(s) + sum(map(math.exp, others))))
    if kind == "bce":
        return -math.log(sigmoid(s)) - math.log(1 - sigmoid(others[0]))
    if kind == "bpr":
        return -math.log(sigmoid(s - others[0]))
    if kind == "gbce":
        alpha = len(negatives) / (len(table) - 1)
        beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
        return -(beta * math.log(sigmoid(s)) + sum(math.log(1 - sigmoid(o)) for o in others)) / (len(negatives) + 1)
    if kind == "top1":
        return sum(sigmoid(o - s) + sigmoid(o * o) for o in others) / len(others)
    share = [math.exp(o) / sum(map(math.exp, others)) for o in others]
    above = sum(w * sigmoid(s - o) for w, o in zip(share, others, strict=True))
    return -math.log(above) + sum(w * o * o for w, o in zip(share, others, strict=True))


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_equals_its_formula_at_every_target(made: Split, kind: str) -> None:
    model, objective = prepared(made, loss=kind, negatives=6, item_bias=True)
    batch = first_batch(model, made)
    with torch.no_grad():
        hidden = model.network(batch.items, batch.lengths).double()
        table, bias = model.network.item_vectors().double(), model.network.bias.double()
        width, total = batch.items.shape[1], 0.0
        for n, (at, target) in enumerate(zip(batch.at.tolist(), batch.target.tolist(), strict=True)):
            drawn = batch.negatives.tolist()
            drawn = drawn[n] if batch.negatives.dim() == 2 else drawn
            total += by_hand(kind, hidden[at // width, at % width], table, bias, target, drawn)
    assert objective.loss(batch)["next"].item() == pytest.approx(total / len(batch.target), rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_repeating_the_rows_leaves_the_loss_as_it_is(made: Split, kind: str) -> None:
    model, objective = prepared(made, loss=kind, negatives=6)
    batch = first_batch(model, made)
    cells = batch.items.numel()
    drawn = batch.negatives
    twice = SequenceBatch(
        torch.cat([batch.items] * 2),
        torch.cat([batch.lengths] * 2),
        torch.cat([batch.at, batch.at + cells]),
        torch.cat([batch.target] * 2),
        torch.cat([drawn] * 2) if drawn.dim() == 2 else drawn,
        batch.weight / 2,
        torch.cat([batch.user] * 2),
        {},
    )
    assert objective.loss(twice)["next"].item() == pytest.approx(objective.loss(batch)["next"].item(), rel=1e-5)


@pytest.mark.parametrize("slug", METHODS)
def test_more_padding_changes_neither_loss_nor_gradient(made: Split, slug: str) -> None:
    model, objective = prepared(made, slug)
    batch = first_batch(model, made)
    rows, width = batch.items.shape
    wide = batch._replace(
        items=torch.cat([batch.items, torch.full((rows, 3), -1)], dim=1),
        at=batch.at + 3 * (batch.at // width),
    )
    results = []
    for given in (batch, wide):
        loss = objective.loss(given)["next"]
        results.append((loss, *torch.autograd.grad(loss, list(model.network.parameters()), allow_unused=True)))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)


def test_every_other_item_once_as_negative_is_the_full_softmax(made: Split) -> None:
    model, objective = prepared(made, loss="sampled_softmax")
    other = new("sasrec", loss="ce")
    full = other.begin(made)
    full.encoder = model.network
    batch = first_batch(model, made)._replace(negatives=torch.arange(25))
    assert objective.loss(batch)["next"].item() == pytest.approx(full.loss(batch)["next"].item(), rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_learns_the_order(kind: str, ring: Split) -> None:
    epochs = 24 if kind == "gbce" else 6  # with few negatives its positives weigh little, and it starts slowly
    shape: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "dropout": 0.0, "batch_size": 32}
    model = SASRec(**shape, loss=kind, negatives=8, epochs=epochs, evaluate_every=epochs, learning_rate=0.01)
    report = model.fit(ring, Run(device="cpu"))
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert evaluate(model, ring.test, metrics=["NDCG@3"], exclude="none").metrics["NDCG@3"] > 0.5  # chance is 0.07


@pytest.mark.parametrize("slug", METHODS)
def test_popularity_negatives_train_with_their_correction(made: Split, slug: str) -> None:
    report = new(slug, loss="sampled_softmax", negatives_by="popularity", negatives=8).fit(made, Run(device="cpu"))
    assert all(math.isfinite(row["loss"]) for row in report.history)


def test_popularity_negatives_without_a_correction_are_refused(made: Split) -> None:
    with pytest.raises(ConfigError, match="negatives_by='popularity'"):
        new("sasrec", loss="bce", negatives_by="popularity").fit(made, Run(device="cpu"))


# What an encoder may see --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", CAUSAL)
def test_no_output_depends_on_later_items(made: Split, slug: str) -> None:
    model, _ = prepared(made, slug)
    items = torch.randint(0, 25, (3, 8))
    lengths = torch.full((3,), 8)
    before = model.network(items, lengths)
    for t in range(7):
        other = items.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % 25
        after = model.network(other, lengths)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


@pytest.mark.parametrize("slug", METHODS)
def test_the_padding_row_stays_zero(slug: str, trained: dict[str, SequentialRecommender]) -> None:
    assert not trained[slug].network.item.weight[0].any()
    assert trained[slug].network.item.weight[1:].any(dim=1).all()


# Asking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", METHODS)
def test_an_answer_does_not_depend_on_its_company(slug: str, trained: dict[str, SequentialRecommender]) -> None:
    model = trained[slug]
    generator = np.random.default_rng(0)
    histories = [generator.integers(0, 25, n).tolist() for n in (1, 30, 2, 8, 7, 9, 1, 15)]
    together = model.score(Queries.from_histories(histories))
    alone = torch.cat([model.score(Queries.from_histories([history])) for history in histories])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("slug", METHODS)
def test_scores_in_blocks_equal_scores_in_one_piece(
    slug: str, trained: dict[str, SequentialRecommender], monkeypatch: pytest.MonkeyPatch, made: Split
) -> None:
    model, queries = trained[slug], made.test.queries()
    whole = model.score(queries)
    parts = torch.cat([model.score(block) for _, block in queries.blocks(3)])
    assert torch.allclose(whole, parts, atol=1e-5)
    seen = []
    forward = model.network.forward
    monkeypatch.setattr(
        model.network, "forward", lambda items, *more: seen.append(items.shape) or forward(items, *more)
    )
    monkeypatch.setattr(base, "ENCODE_TOKENS", 16)
    assert torch.allclose(whole, model.score(queries), atol=1e-5)
    assert len(seen) > 5 and all(rows * width <= 24 for rows, width in seen)


@pytest.mark.parametrize("slug", METHODS)
def test_only_the_last_items_of_a_long_history_are_read(slug: str, trained: dict[str, SequentialRecommender]) -> None:
    model = trained[slug]
    reads = model.reads
    assert reads == (7 if slug == "bert4rec" else 8)
    whole, end = (model.score(Queries.from_histories([h])) for h in (LONG, LONG[-reads:]))
    assert torch.equal(whole, end)
    other = [*LONG[:-reads], (LONG[-reads] + 1) % 25, *LONG[-reads + 1 :]]
    assert not torch.equal(whole, model.score(Queries.from_histories([other])))


@pytest.mark.parametrize("slug", METHODS)
def test_order_matters(slug: str, trained: dict[str, SequentialRecommender]) -> None:
    there, back = (trained[slug].score(Queries.from_histories([h])) for h in ([1, 2, 3, 4], [4, 3, 2, 1]))
    assert (there - back).abs().max() > 1e-4  # ten times what rounding gives


@pytest.mark.parametrize("slug", METHODS)
def test_scores_are_products_of_vectors(slug: str, trained: dict[str, SequentialRecommender], made: Split) -> None:
    model, queries = trained[slug], made.test.queries()
    product = model.query_vectors(queries) @ model.item_vectors().T
    assert model.item_vectors().shape == (25, 16)
    bias = model.network.bias
    assert torch.allclose(model.score(queries), product if bias is None else product + bias, atol=1e-6)


@pytest.mark.parametrize("slug", METHODS)
def test_users_never_seen_are_answered_by_their_history(slug: str, trained: dict[str, SequentialRecommender]) -> None:
    model = trained[slug]
    ranking = model.recommend([Query(history=[1, 2, 3]), Query(history=[])], 22)
    assert not ranking.fallback[0] and set(ranking.item[0].tolist()) == set(range(25)) - {1, 2, 3}
    assert ranking.fallback[1]
    assert ranking.item[1].tolist() == np.argsort(-model.popularity, kind="stable")[:22].tolist()
    with pytest.raises(UnknownIdError, match="'7777'"):
        model.recommend([Query(history=[1, 7777])])


@pytest.mark.parametrize("slug", METHODS)
def test_training_mode_is_left_as_it_was(slug: str, trained: dict[str, SequentialRecommender]) -> None:
    model = trained[slug]
    model.network.train()
    first, again = (model.score(Queries.from_histories([LONG])) for _ in range(2))
    assert torch.equal(first, again)  # dropout was off all the same
    assert model.network.training
    model.network.eval()


# Keeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", METHODS)
def test_saved_and_loaded_scores_are_identical(
    slug: str, trained: dict[str, SequentialRecommender], made: Split, tmp_path: Path
) -> None:
    model, queries = trained[slug], made.test.queries()
    model.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").score(queries), model.score(queries))


@pytest.mark.parametrize("slug", METHODS)
def test_resumed_equals_uninterrupted(slug: str, made: Split, tmp_path: Path) -> None:
    # The length of the run shapes the schedule of BERT4Rec, so it is stopped by time, not by a smaller `epochs`.
    whole = new(slug, epochs=3)
    whole.fit(made, Run(device="cpu", seed=4))
    first, second = new(slug, epochs=3), new(slug, epochs=3)
    cut = first.fit(made, Run(tmp_path, device="cpu", seed=4, max_seconds=1e-9))
    assert cut.epochs == 1 and cut.stopped == "time"
    report = second.fit(made, Run(tmp_path, device="cpu", seed=4, resume=True))
    assert report.epochs == 3
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name


@pytest.mark.parametrize("slug", METHODS)
def test_the_seed_decides(slug: str, made: Split) -> None:
    def weights(seed: int) -> Tensor:
        model = new(slug, epochs=1)
        model.fit(made, Run(device="cpu", seed=seed))
        return model.item_vectors()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# Settings and data that do not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("slug", METHODS)
def test_a_history_of_one_item_is_no_sequence(slug: str) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        new(slug, max_length=1)


@pytest.mark.parametrize("slug", METHODS)
def test_training_needs_a_history_of_two_events(slug: str, log_of: Any) -> None:
    short = split(Dataset.of(log_of([[0, 1, 2], [2, 1, 0]], 3)))  # leaves one training event a user
    with pytest.raises(DataError, match="no history has two events"):
        new(slug).fit(short, Run(device="cpu"))


@pytest.mark.parametrize("slug", METHODS)
def test_equal_users_and_repeated_events_train(slug: str, log_of: Any) -> None:
    same = split(Dataset.of(log_of([[0, 0, 1, 1, 0, 0, 1, 1]] * 5, 2)))
    report = new(slug).fit(same, Run(device="cpu"))
    assert all(math.isfinite(row["loss"]) for row in report.history)


def test_heads_must_divide_the_size(made: Split) -> None:
    with pytest.raises(ConfigError, match="num_heads is 3"):
        new("sasrec", num_heads=3).fit(made, Run(device="cpu"))


def test_the_objective_follows_the_size_of_the_catalogue(made: Split) -> None:
    model, _ = prepared(made)
    assert model.loss_kind() == "ce"
    model.items = range(5_001)  # type: ignore[assignment]
    assert model.loss_kind() == "sampled_softmax"
    assert new("sasrec", loss="bpr").config.loss == "bpr"


# Known truth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SASRec, GRU4Rec])
def test_a_first_order_chain_is_learned(kind: Any, chain: tuple[np.ndarray, Split]) -> None:
    matrix, made = chain
    shape: dict[str, Any] = {"hidden_size": 32, "dropout": 0.0, "batch_size": 32, "max_length": 20, "loss": "ce"}
    model = kind(**shape, epochs=10, evaluate_every=10, learning_rate=3e-3 if kind is SASRec else 1e-2)
    model.fit(made, Run(device="cpu"))
    queries = made.test.queries()
    truth = matrix[queries.item[queries.offsets[1:] - 1]]
    predicted = F.log_softmax(model.score(queries).double(), dim=-1).numpy()
    divergence = (truth * (np.log(truth.clip(1e-12)) - predicted)).sum(1).mean()
    assert divergence < 0.05
    hits = truth[np.arange(len(truth)), predicted.argmax(1)].mean()
    assert hits == pytest.approx(truth.max(1).mean(), rel=0.03)  # HR@1 is the mean largest transition probability


@pytest.mark.parametrize("kind", [SASRec, GRU4Rec])
def test_more_than_the_last_item_is_used(kind: Any, second_order: Split) -> None:
    def hits(model: Any) -> float:
        model.fit(second_order, Run(device="cpu"))
        return evaluate(model, second_order.test, metrics=["HR@1"], exclude="none").metrics["HR@1"]

    shape: dict[str, Any] = {"hidden_size": 32, "dropout": 0.0, "loss": "ce", "max_length": 9, "batch_size": 32}
    epochs = 14 if kind is SASRec else 6
    assert hits(Markov()) < 0.3  # chance is 0.2
    assert hits(kind(**shape, epochs=epochs, evaluate_every=epochs, learning_rate=5e-3)) > 0.5
