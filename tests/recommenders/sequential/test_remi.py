"""Interests, routing, and how REMI trains them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vouch import registry
from vouch.data import Queries, Split, check_leaks, split
from vouch.errors import ConfigError, DataError
from vouch.evaluation import evaluate
from vouch.nn import losses
from vouch.nn.transformer import Context
from vouch.recommenders import load
from vouch.recommenders.retrieval import ItemIndex, retrieve
from vouch.recommenders.sequential.comirec import MIND, ComiRecDR, ComiRecSA
from vouch.recommenders.sequential.gru4rec import GRU4Rec
from vouch.recommenders.sequential.interests import squash
from vouch.recommenders.sequential.remi import REMI, item_variance, routing_report, routing_variance
from vouch.training import Run

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "interests": 3,
    "max_length": 8,
    "batch_size": 16,
    "negatives": 10,
    "epochs": 2,
}
KINDS = ("comirec-sa", "comirec-dr", "mind", "remi")


def started(made: Split, slug: str, **settings: Any) -> Any:
    model = registry.method(slug)(**{**SMALL, **settings})
    torch.manual_seed(0)
    model.begin(made)
    model.network.eval()
    return model


# The loss -----------------------------------------------------------------------------------------------------


def scores(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(6, 4).double(), torch.randn(20, 4).double(), torch.arange(6), torch.arange(8, 18)


def test_without_hardness_it_is_the_sampled_softmax() -> None:
    hidden, table, target, negatives = scores()
    plain = losses.sampled_softmax(hidden, table, target, negatives).item()
    assert losses.hard_softmax(hidden, table, target, negatives, hardness=0).item() == pytest.approx(plain, rel=1e-6)
    x = torch.cat([(hidden * table[target]).sum(1, keepdim=True), hidden @ table[negatives].T], 1)
    assert plain == pytest.approx(F.cross_entropy(x, torch.zeros(6, dtype=torch.long)).item(), rel=1e-6)


@pytest.mark.parametrize("hardness", [0.0, 0.5, 2.0, 10.0])
def test_the_hard_loss_by_its_formula(hardness: float) -> None:
    hidden, table, target, negatives = scores()
    total = 0.0
    for i in range(6):
        plus, x = float(hidden[i] @ table[target[i]]), (hidden[i] @ table[negatives].T).tolist()
        w = [math.exp(hardness * v) for v in x]
        mass = sum(a * math.exp(v) for a, v in zip(w, x, strict=True)) / (sum(w) / len(w))
        total -= math.log(math.exp(plus) / (math.exp(plus) + mass))
    got = losses.hard_softmax(hidden, table, target, negatives, hardness=hardness)
    assert got.item() == pytest.approx(total / 6, rel=1e-5)


def test_the_hard_loss_grows_with_hardness_and_not_with_a_constant() -> None:
    hidden, table, target, negatives = scores()
    values = [losses.hard_softmax(hidden, table, target, negatives, hardness=b).item() for b in (0, 0.1, 1, 3, 10)]
    assert values == sorted(values) and values[-1] > values[0] + 0.1
    shift = torch.full((20,), 7.0, dtype=torch.float64)
    moved = losses.hard_softmax(hidden, table, target, negatives, hardness=3, bias=shift).item()
    assert moved == pytest.approx(values[3], rel=1e-5)


def test_equal_negatives_have_the_same_loss_at_any_hardness() -> None:
    hidden, table, target, _ = scores()
    table[8:18] = table[8]
    values = [losses.hard_softmax(hidden, table, target, torch.arange(8, 18), hardness=b).item() for b in (0, 1, 10)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_extreme_scores_stay_finite_and_hits_are_left_out() -> None:
    hidden, table = torch.tensor([[100.0], [-100.0]]), torch.tensor([[1.0], [-1.0], [1.0]])
    got = losses.hard_softmax(hidden, table, torch.tensor([0, 1]), torch.tensor([1, 2]), hardness=10)
    assert torch.isfinite(got)
    hidden = torch.randn(1, 3, requires_grad=True)
    table = torch.randn(5, 3)
    hit = losses.hard_softmax(hidden, table, torch.tensor([2]), torch.tensor([2, 4]), hardness=1)
    without = losses.hard_softmax(hidden, table, torch.tensor([2]), torch.tensor([4]), hardness=1)
    assert hit.item() == pytest.approx(without.item(), rel=1e-6)
    only = losses.hard_softmax(hidden, table, torch.tensor([2]), torch.tensor([2]), hardness=1)
    (gradient,) = torch.autograd.grad(only, hidden)
    assert only.item() == 0 and torch.isfinite(gradient).all()


def test_gradients_of_negatives_follow_the_importance() -> None:
    x = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    table = torch.cat([torch.zeros(1, 1), x.T]).requires_grad_()
    hidden, beta = torch.ones(1, 1, dtype=torch.float64), 2.0
    table = table.detach().double().requires_grad_()
    losses.hard_softmax(hidden, table, torch.tensor([0]), torch.arange(1, 4), hardness=beta).backward()
    assert table.grad is not None
    mass = torch.exp((1 + beta) * x).sum() / torch.exp(beta * x).mean()
    share, pull = torch.softmax((1 + beta) * x, 1), torch.softmax(beta * x, 1)
    want = mass / (1 + mass) * ((1 + beta) * share - beta * pull)
    assert torch.allclose(table.grad[1:, 0], want[0], atol=1e-6)


# Routing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", KINDS)
@pytest.mark.parametrize("over", ["items", "interests"])
def test_routing_lies_on_the_prefix_and_sums_to_one(made: Split, slug: str, over: str) -> None:
    model = started(made, slug, softmax_over=over)
    context = Context()
    items, lengths = torch.randint(0, 25, (3, 8)), torch.tensor([8, 8, 8])
    V = model.network(items, lengths, context)
    A = context.notes["routing"][0]
    assert V.shape == (3, 8, 3, 8) and A.shape == (3, 8, 3, 8)
    later = torch.ones(8, 8, dtype=torch.bool).triu(1)
    assert (A.transpose(1, 2)[:, :, later] == 0).all()
    if over == "items" or slug in ("comirec-sa", "remi"):
        assert torch.allclose(A.sum(-1), torch.ones(()), atol=1e-5)
    else:
        seen = torch.ones(8, 8).tril()
        assert torch.allclose(A.sum(2), seen.expand(3, 8, 8), atol=1e-5)


@pytest.mark.parametrize("slug", KINDS)
def test_each_prefix_is_read_as_it_would_be_alone(made: Split, slug: str) -> None:
    network = started(made, slug).network
    items = torch.randint(0, 25, (2, 8))
    whole = network(items, torch.tensor([8, 8]))
    for n in range(1, 9):
        alone = network(items[:, :n], torch.tensor([n, n]))[:, n - 1]
        assert torch.allclose(alone, whole[:, n - 1], atol=1e-5)


def test_self_attentive_routing_by_hand(made: Split) -> None:
    network = started(made, "comirec-sa").network
    items = torch.tensor([[4, 9, 2]])
    H = network.item.weight[items[0] + 1]
    logits = torch.tanh((H + network.position.weight[:3]) @ network.inner.weight.T) @ network.outer.weight.T
    A = torch.softmax(logits, 0).T  # (K, L)
    assert torch.allclose(network(items, torch.tensor([3]))[0, 2], A @ H, atol=1e-5)


@pytest.mark.parametrize("slug", ["comirec-dr", "mind"])
def test_dynamic_routing_by_hand(made: Split, slug: str) -> None:
    network = started(made, slug).network
    items = torch.tensor([[4, 9, 2]])
    h = network.item.weight[items[0] + 1]
    b = network.start[:3].T.clone()  # (K, L)
    for _ in range(3):
        v = []
        c = torch.softmax(b, 1)
        for k in range(3):
            W = [network.weight[0, 0] if slug == "mind" else network.weight[place, k] for place in range(3)]
            u = torch.stack([W[place] @ h[place] for place in range(3)])
            v.append(squash(c[k] @ u))
            b[k] = b[k] + u @ v[-1]
    want = torch.stack(v)
    if slug == "mind":
        want = network.relu(want)
    else:
        assert torch.equal(network.start, torch.zeros_like(network.start))
    assert torch.allclose(network(items, torch.tensor([3]))[0, 2], want, atol=1e-5)


def test_routing_gradients_go_through_the_last_round_only(made: Split) -> None:
    network = started(made, "comirec-dr", interests=1).network
    items = torch.tensor([[4, 9]])
    V = network(items, torch.tensor([2]))[0, 1]
    (gradient,) = torch.autograd.grad(V.sum(), network.weight)
    context = Context()
    network(items, torch.tensor([2]), context)
    c = context.notes["routing"][0][0, 1, 0].detach()
    u = torch.stack([network.weight[place, 0] @ network.item.weight[items[0, place] + 1] for place in range(2)])
    (want,) = torch.autograd.grad(squash(c @ u).sum(), network.weight)
    assert torch.allclose(gradient, want, atol=1e-6)


def test_squash_keeps_the_direction_and_stays_short() -> None:
    s = torch.randn(20, 5) * torch.logspace(-2, 2, 20).unsqueeze(1)
    v = squash(s)
    assert torch.allclose(F.cosine_similarity(s, v), torch.ones(20), atol=1e-4) and (v.norm(dim=1) < 1).all()
    norm = s.norm(dim=1)
    assert torch.allclose(v.norm(dim=1), norm**2 / (1 + norm**2), rtol=1e-3)
    assert torch.equal(squash(torch.zeros(1, 3)), torch.zeros(1, 3))


# The regularisation -------------------------------------------------------------------------------------------


def test_variances_by_loop_and_at_their_ends() -> None:
    routing = torch.softmax(torch.randn(4, 3, 5), -1)
    got = routing_variance(routing, 9, 16)
    for n in range(4):
        for k in range(3):
            row = [*routing[n, k].tolist(), *[0.0] * 4]
            want = sum((value - sum(row) / 9) ** 2 for value in row) / 16
            assert got[n, k].item() == pytest.approx(want, rel=1e-4)
    assert routing_variance(torch.full((1, 1, 5), 0.2), 5, 16).item() == pytest.approx(0, abs=1e-8)
    peaked = routing_variance(torch.eye(5)[:1].unsqueeze(0), 5, 16).item()
    assert peaked == pytest.approx((1 - 1 / 5) / 16) and (routing_variance(routing, 5, 16) <= peaked).all()
    count = torch.tensor([5.0, 5, 5, 5])
    assert torch.allclose(item_variance(routing, count), routing.var(-1, correction=0), atol=1e-7)


@pytest.mark.parametrize("over", ["slots", "items"])
def test_the_penalty_is_over_all_examples_of_the_batch(made: Split, over: str) -> None:
    model = REMI(**SMALL, **{"remi.weight": 2.0, "remi.over": over})
    objective = model.begin(made)
    batch = next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))
    context = Context()
    model.network(batch.items, batch.lengths, context)
    A, T, total = context.notes["routing"][0], batch.items.shape[1], 0.0
    for at in batch.at.tolist():
        for row in A[at // T, at % T].tolist():
            real = row[: at % T + 1]
            values, divisor = ([*real, *[0.0] * (8 - len(real))], 8) if over == "slots" else (real, len(real))
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / (
                SMALL["hidden_size"] if over == "slots" else divisor
            )
            total += variance**2
    want = 2.0 * 128 * total / len(batch.at)
    assert objective.loss(batch)["routing"].item() == pytest.approx(want, rel=1e-4)


def test_the_interest_nearest_to_the_target_is_trained(made: Split) -> None:
    model = ComiRecSA(**{**SMALL, "loss": "ce"})
    objective = model.begin(made)
    batch = next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))
    V = model.network(batch.items, batch.lengths).flatten(0, 1)[batch.at]
    table = model.network.item_vectors()
    total = 0.0
    for v, target in zip(V, batch.target.tolist(), strict=True):
        best = v[(v @ table[target]).argmax()]
        total += F.cross_entropy((table @ best)[None], torch.tensor([target])).item()
    assert objective.loss(batch)["next"].item() == pytest.approx(total / len(batch.target), rel=1e-4)


def test_routing_regularisation_spreads_the_routing(ring: Split) -> None:
    shape = {**SMALL, "hidden_size": 16, "max_length": 15, "epochs": 10, "learning_rate": 0.02}
    reports = []
    for weight in (0.0, 3000.0):
        model = REMI(**shape, **{"remi.weight": weight, "remi.over": "items"})
        model.fit(ring, Run(device="cpu"))
        reports.append(routing_report(model, ring.test.queries(0, 100)))
    assert reports[1]["largest_weight"] < reports[0]["largest_weight"]
    assert reports[1]["effective_items"] > reports[0]["effective_items"]


# As recommenders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["max", "sum"])
def test_scores_retrieval_and_saving_agree(made: Split, tmp_path: Path, merge: Any) -> None:
    model = started(made, "remi", merge=merge)
    queries = Queries.from_histories([[1, 2, 3], [7], [4, 5]])
    vectors = model.query_vectors(queries)
    assert vectors.shape == (3, 3, 8)
    every = vectors @ model.item_vectors().T
    assert torch.allclose(model.score(queries), every.amax(1) if merge == "max" else every.sum(1), atol=1e-5)
    _, items = retrieve(vectors, ItemIndex(model.item_vectors()), 5, merge=merge)
    assert np.array_equal(items.numpy(), model.recommend(queries, 5, exclude="none").item)
    model.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").score(queries), model.score(queries))


def test_one_interest_is_attention_pooling_with_one_vector(made: Split) -> None:
    model = started(made, "comirec-sa", interests=1)
    queries = Queries.from_histories([[1, 2, 3]])
    assert model.query_vectors(queries).shape == (1, 8)
    H = model.network.item.weight[torch.tensor([2, 3, 4])]
    logits = (
        torch.tanh((H + model.network.position.weight[:3]) @ model.network.inner.weight.T)
        @ model.network.outer.weight.T
    )
    assert torch.allclose(model.query_vectors(queries)[0], torch.softmax(logits[:, 0], 0) @ H, atol=1e-5)


@pytest.mark.parametrize("slug", ["remi", "comirec-dr"])
def test_the_order_of_the_interests_does_not_matter(made: Split, slug: str) -> None:
    model = started(made, slug, objective=("next", "remi"), loss="hard_softmax")
    objective = model.begin(made)
    batch = next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))
    queries = Queries.from_histories([[1, 2, 3], [7]])

    def all_of_it() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return model.query_vectors(queries), model.score(queries), torch.stack(list(objective.loss(batch).values()))

    before = all_of_it()
    with torch.no_grad():
        if slug == "remi":
            model.network.outer.weight.copy_(model.network.outer.weight[[2, 0, 1]])
        else:
            model.network.weight.copy_(model.network.weight[:, [2, 0, 1]])
    after = all_of_it()
    assert torch.allclose(after[0], before[0][:, [2, 0, 1]], atol=1e-5)
    assert torch.allclose(after[1], before[1], atol=1e-5) and torch.allclose(after[2], before[2], rtol=1e-4)


def test_without_weight_there_is_no_penalty(made: Split) -> None:
    assert set(REMI(**SMALL, **{"remi.weight": 0.0}).begin(made).terms) == {"next"}


def test_more_negatives_than_items_are_refused_and_the_default_shrinks(made: Split) -> None:
    asked = REMI(**{**SMALL, "negatives": 2_000})
    asked.begin(made)
    with pytest.raises(ConfigError, match="negatives is 2,000 and there are 25 items"):
        asked.batches(made.train)
    model = REMI(**{name: value for name, value in SMALL.items() if name != "negatives"})
    model.begin(made)
    assert len(next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1))).negatives) == 25


def test_routing_is_asked_of_histories(made: Split) -> None:
    model = started(made, "remi")
    for histories, match in (([], "no histories"), ([[1, 2], []], "query 1 is empty")):
        with pytest.raises(DataError, match=match):
            routing_report(model, Queries.from_histories(histories))


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="no routing"):
        GRU4Rec(objective=("next", "remi"))
    for settings in ({"augment": "cl4srec"}, {"objective": ("next", "eclsr")}):
        with pytest.raises(ConfigError, match="several interests"):
            ComiRecDR(**settings)
    ComiRecDR(interests=1, augment="cl4srec")
    with pytest.raises(ConfigError, match="interests"):
        MIND(interests=0)


# Users apart --------------------------------------------------------------------------------------------------


def test_users_are_kept_apart_and_asked_for_their_last_fifth(made: Split) -> None:
    apart = split(made.dataset, "users", valid_share=0.2, test_share=0.3)
    check_leaks(apart)
    log = made.dataset.interactions
    owners = [np.searchsorted(log.offsets, cases.start, side="right") - 1 for cases in (apart.valid, apart.test)]
    trained = set(np.flatnonzero(apart.train.lengths > 0).tolist())
    assert not set(owners[0].tolist()) & set(owners[1].tolist()) and not trained & {
        *owners[0].tolist(),
        *owners[1].tolist(),
    }
    for cases, owner in zip((apart.valid, apart.test), owners, strict=True):
        assert (cases.user == -1).all()
        for user, start, stop, end in zip(owner, cases.start, cases.stop, cases.target_stop, strict=True):
            n = log.offsets[user + 1] - log.offsets[user]
            assert start == log.offsets[user] and end == log.offsets[user + 1] and end - stop == n // 5 > 0
    assert any("fewer than 5" in why for why in apart.dropped)


def test_sets_of_targets_are_measured_as_an_independent_count_does(made: Split) -> None:
    apart = split(made.dataset, "users", valid_share=0.2, test_share=0.3)
    model = REMI(**SMALL)
    model.fit(apart, Run(device="cpu"))
    found = evaluate(model, apart.test, metrics=["Recall@5", "HR@5", "NDCG@5"], exclude="none")
    ranked = model.recommend(apart.test.queries(), 5, exclude="none").item
    items, bounds = apart.test.targets()
    recall, hit, ndcg = [], [], []
    for row, (a, b) in enumerate(itertools.pairwise(bounds)):
        wanted = set(items[a:b].tolist())
        gains = [1.0 if item in wanted else 0.0 for item in ranked[row].tolist()]
        recall.append(sum(gains) / len(wanted))
        hit.append(float(any(gains)))
        ideal = sum(1 / math.log2(2 + place) for place in range(min(5, len(wanted))))
        ndcg.append(sum(gain / math.log2(2 + place) for place, gain in enumerate(gains)) / ideal)
    assert found.metrics["Recall@5"] == pytest.approx(np.mean(recall), abs=1e-6)
    assert found.metrics["HR@5"] == pytest.approx(np.mean(hit), abs=1e-6)
    assert found.metrics["NDCG@5"] == pytest.approx(np.mean(ndcg), abs=1e-6)
