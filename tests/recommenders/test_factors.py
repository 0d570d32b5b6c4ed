"""BPR-MF and APR: gradients against autograd, the exact invariants of the adversary, and the edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vouch import Dataset, Interactions, Queries, Run, split
from vouch.data import Split
from vouch.errors import ConfigError, TrainingError
from vouch.recommenders.collaborative.apr import APR, hardest, random_change, robustness, worst_change
from vouch.recommenders.collaborative.bpr import BPR
from vouch.recommenders.collaborative.factors import (
    Factors,
    Rows,
    Touched,
    Triples,
    bpr_gradient,
    penalty_gradient,
)

U, N, D, B = 12, 15, 6, 40


@pytest.fixture
def triples() -> tuple[Tensor, Tensor, Tensor]:
    random = np.random.default_rng(0)
    return tuple(torch.from_numpy(random.integers(0, size, B)) for size in (U, N, N))  # type: ignore[return-value]


@pytest.fixture
def factors() -> Factors:
    torch.manual_seed(0)
    return Factors(U, N, D, init_std=0.7).double()


def loss_of(p: Tensor, q: Tensor, triples: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    user, i, j = triples
    return F.softplus(-((p[user] * (q[i] - q[j])).sum(1))).sum()


def test_the_written_gradient_is_autograds(factors: Factors, triples: Any) -> None:
    touched = Touched.by(factors, *triples)
    p, q = factors.user.detach(), factors.item.detach()
    loss, grad_p, grad_q = bpr_gradient(p[touched.users], q[touched.items], touched)
    expected = loss_of(factors.user, factors.item, triples)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(Rows(touched.users, grad_p).onto(factors.user), factors.user.grad)
    torch.testing.assert_close(Rows(touched.items, grad_q).onto(factors.item), factors.item.grad)


def test_the_penalty_gradient_is_autograds(factors: Factors, triples: Any) -> None:
    user, i, j = triples
    touched = Touched.by(factors, *triples)
    p, q = factors.user[touched.users].detach(), factors.item[touched.items].detach()
    grad_p, grad_q = penalty_gradient(p, q, touched, 0.3)
    rows = (factors.user[user], factors.item[i], factors.item[j])
    (0.3 * sum(row.square().sum() for row in rows)).backward()
    torch.testing.assert_close(Rows(touched.users, grad_p).onto(factors.user), factors.user.grad)
    torch.testing.assert_close(Rows(touched.items, grad_q).onto(factors.item), factors.item.grad)


def test_few_rows_of_a_large_table_give_the_same_gradient_sparsely() -> None:
    torch.manual_seed(0)
    large = Factors(500, 700, D, init_std=0.5)
    few = tuple(torch.randint(0, size, (8,)) for size in (500, 700, 700))
    touched = Touched.by(large, *few)
    assert len(touched.users) <= 8 and len(touched.items) <= 16
    p, q = large.user.detach()[touched.users], large.item.detach()[touched.items]
    _, grad_p, grad_q = bpr_gradient(p, q, touched)
    sparse = Rows(touched.items, grad_q).onto(large.item)
    assert sparse.is_sparse
    loss_of(large.user, large.item, few).backward()
    torch.testing.assert_close(sparse.to_dense(), large.item.grad)
    torch.testing.assert_close(Rows(touched.users, grad_p).onto(large.user).to_dense(), large.user.grad)


def gradient_rows(factors: Factors, triples: Any) -> tuple[Tensor, Tensor]:
    touched = Touched.by(factors, *triples)
    _, grad_p, grad_q = bpr_gradient(
        factors.user.detach()[touched.users], factors.item.detach()[touched.items], touched
    )
    return Rows(touched.users, grad_p).onto(factors.user), Rows(touched.items, grad_q).onto(factors.item)


def test_changes_have_length_eps_or_nothing(factors: Factors, triples: Any) -> None:
    user, i, j = triples
    delta_p, delta_q = worst_change(*gradient_rows(factors, triples), eps=0.4)
    for delta, touched in ((delta_p, user), (delta_q, torch.cat([i, j]))):
        lengths = delta.norm(dim=1)
        inside = torch.zeros(len(delta), dtype=torch.bool)
        inside[touched] = True
        torch.testing.assert_close(lengths[inside], torch.full_like(lengths[inside], 0.4), rtol=1e-5, atol=1e-5)
        assert (delta[~inside] == 0).all()


def test_a_global_change_has_length_eps_in_all(factors: Factors, triples: Any) -> None:
    delta_p, delta_q = worst_change(*gradient_rows(factors, triples), eps=0.4, norm="global")
    assert float(torch.sqrt(delta_p.square().sum() + delta_q.square().sum())) == pytest.approx(0.4, rel=1e-6)


def test_a_zero_gradient_gives_no_change() -> None:
    delta_p, _ = worst_change(torch.zeros(3, D), torch.ones(2, D), eps=0.5)
    assert (delta_p == 0).all()


@pytest.mark.parametrize("norm", ["row", "global"])
def test_the_change_raises_the_loss_as_the_first_order_says(factors: Factors, triples: Any, norm: str) -> None:
    grads = gradient_rows(factors, triples)
    eps = 1e-3
    delta_p, delta_q = worst_change(*grads, eps=eps, norm=norm)
    p, q = factors.user.detach(), factors.item.detach()
    rise = float(loss_of(p + delta_p, q + delta_q, triples) - loss_of(p, q, triples))
    if norm == "row":
        predicted = eps * float(sum(grad.norm(dim=1).sum() for grad in grads))
    else:
        predicted = eps * float(torch.sqrt(sum(grad.square().sum() for grad in grads)))
    assert rise > 0
    assert rise == pytest.approx(predicted, rel=0.01)


def test_order_and_repeats_of_triples_do_not_matter_as_they_should(factors: Factors, triples: Any) -> None:
    order = torch.randperm(B)
    shuffled = tuple(column[order] for column in triples)
    for a, b in zip(gradient_rows(factors, triples), gradient_rows(factors, shuffled), strict=True):
        torch.testing.assert_close(a, b)
    doubled = tuple(torch.cat([column, column]) for column in triples)
    for a, b in zip(gradient_rows(factors, triples), gradient_rows(factors, doubled), strict=True):
        torch.testing.assert_close(2 * a, b)
    once, twice = (
        worst_change(*gradient_rows(factors, triples), eps=0.3),
        worst_change(*gradient_rows(factors, doubled), eps=0.3),
    )
    torch.testing.assert_close(once, twice)


class _Fabric:
    world_size = 1


def one_step(model: APR, batch: Any, adversary: str) -> tuple[Tensor, Tensor]:
    """The gradients that a training step hands to the optimizer."""

    class Keeper(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            del closure

    keeper = Keeper(model.factors.parameters(), lr=1.0)
    model._step(batch, keeper, _Fabric(), adversary, torch.Generator().manual_seed(0))
    return model.factors.user.grad.clone(), model.factors.item.grad.clone()


def apr_with(factors: Factors, **settings: Any) -> APR:
    model = APR(**settings)
    model.factors = factors
    return model


def test_the_step_is_the_gradient_of_the_sum_with_the_change_held_fixed(factors: Factors, triples: Any) -> None:
    user, i, j = triples
    batch = (user, i, j.unsqueeze(1), B)
    got = one_step(apr_with(factors, eps=0.4, adversarial_weight=0.7), batch, "gradient")
    delta_p, delta_q = worst_change(*gradient_rows(factors, triples), eps=0.4)
    p, q = factors.user.detach().clone().requires_grad_(), factors.item.detach().clone().requires_grad_()
    (loss_of(p, q, triples) + 0.7 * loss_of(p + delta_p, q + delta_q, triples)).backward()
    torch.testing.assert_close(got[0], p.grad)
    torch.testing.assert_close(got[1], q.grad)


def test_without_length_the_gradient_is_that_of_bpr_times_one_plus_lambda(factors: Factors, triples: Any) -> None:
    user, i, j = triples
    batch = (user, i, j.unsqueeze(1), B)
    plain = one_step(apr_with(factors), batch, "none")
    still = one_step(apr_with(factors, eps=0.0, adversarial_weight=0.7), batch, "gradient")
    for a, b in zip(plain, still, strict=True):
        torch.testing.assert_close(1.7 * a, b, rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def made() -> Split:
    random = np.random.default_rng(2)
    user = np.repeat(np.arange(40), 10)
    item = np.concatenate([random.choice(30, 10, replace=False) for _ in range(40)])
    return split(Dataset.of(Interactions.from_arrays(user, item)))


def test_lambda_zero_is_bpr_exactly(made: Split) -> None:
    first = BPR(epochs=3, batch_size=64, hidden_size=8)
    first.fit(made, Run(seed=0))
    common: dict[str, Any] = {"batch_size": 64, "hidden_size": 8, "monitor": "NDCG@10", "evaluate_every": 5}
    plain = BPR(epochs=4, **common)
    plain.fit(made, Run(seed=8), start=first.factors)
    none = APR(adversarial_epochs=4, adversarial_weight=0.0, **common)
    none.fit(made, Run(seed=7), start=first.factors)
    assert torch.equal(plain.factors.user, none.factors.user)
    assert torch.equal(plain.factors.item, none.factors.item)


def test_training_lowers_the_loss_and_hardens(made: Split) -> None:
    model = APR(epochs=30, adversarial_epochs=30, batch_size=64, hidden_size=8, monitor="NDCG@10", evaluate_every=30)
    report = model.fit(made, Run(seed=0))
    assert report.epochs == 60
    assert report.history[-1]["adversarial_loss"] < report.history[0]["adversarial_loss"]
    assert report.history[-1]["norm_user"] > 0


def test_measuring_robustness_leaves_the_model_alone(made: Split) -> None:
    model = BPR(epochs=20, batch_size=64, hidden_size=8)
    model.fit(made, Run(seed=0))
    queries = made.test.queries()
    before = model.score(queries).clone()
    rows = robustness(model, made, eps=(0.0, 2.0), metric="NDCG@10")
    assert torch.equal(model.score(queries), before)
    assert rows[0]["gradient"] == rows[0]["random"] == rows[0]["clean"]
    assert rows[1]["gradient"] < rows[1]["clean"]


def test_random_changes_have_the_length_and_no_direction() -> None:
    rows = random_change(torch.empty(4000, 8), 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((4000,), 0.5))
    assert rows.mean(0).abs().max() < 0.02


def test_the_hardest_negative_is_taken(factors: Factors) -> None:
    user, negatives = torch.tensor([0, 3]), torch.tensor([[1, 2, 5], [7, 7, 0]])
    chosen = hardest(factors, user, negatives)
    for u, row, found in zip(user, negatives, chosen, strict=True):
        scores = [float(factors.user.detach()[u] @ factors.item.detach()[j]) for j in row]
        assert int(found) == int(row[int(np.argmax(scores))])


def test_triples_hold_every_pair_once_and_no_known_negative(made: Split) -> None:
    batches = Triples(made.train, 32, negatives=3)
    pairs = []
    known = {(u, int(i)) for u in range(made.train.n_users) for i in made.train.history(u)}
    for user, item, negative, _ in batches.epoch(np.random.default_rng(0), 0, 1):
        pairs += list(zip(user.tolist(), item.tolist(), strict=True))
        assert not known & {(u, j) for u, row in zip(user.tolist(), negative.tolist(), strict=True) for j in row}
    assert sorted(pairs) == sorted(known)
    assert len(list(batches.epoch(np.random.default_rng(0), 0, 1))) == len(batches)


def test_a_bare_history_is_answered_like_the_user_who_has_it(made: Split) -> None:
    model = BPR(epochs=60, batch_size=64, hidden_size=8, patience=60)
    model.fit(made, Run(seed=0))
    train = made.train
    bare = model.score(Queries.from_histories([train.history(u) for u in range(train.n_users)]))
    known = np.zeros(bare.shape, dtype=bool)
    known[train.user, train.item] = True
    # What the history holds must stand above what it does not, though these users were never seen by number.
    assert float(bare[known].mean()) > float(bare[~known].mean()) + 2 * float(bare[~known].std()) / 3


def test_folding_in_solves_its_least_squares(made: Split) -> None:
    model = BPR(epochs=30, batch_size=64, hidden_size=8, patience=30)
    model.fit(made, Run(seed=0))
    q = model.item_vectors().double().numpy()
    ridge = 1e-3 * model.FOLD_WEIGHT * (q**2).sum() / 8
    histories = [[3], [4, 9, 1, 4], list(range(25))]
    vectors = model.query_vectors(Queries.from_histories(histories)).numpy()
    for history, vector in zip(histories, vectors, strict=True):
        # One row of the regression for each history item, one for each item of all, one for each element.
        rows = np.concatenate([q[history], np.sqrt(model.FOLD_WEIGHT) * q, np.sqrt(ridge) * np.eye(8)])
        wanted = np.concatenate([np.ones(len(history)), np.zeros(len(q) + 8)])
        np.testing.assert_allclose(vector, np.linalg.lstsq(rows, wanted, rcond=None)[0], rtol=1e-3, atol=1e-4)


def test_users_without_training_pairs_are_folded_in_or_get_what_is_popular() -> None:
    """A temporal split leaves users in the vocabulary of whom nothing was learned."""
    random = np.random.default_rng(3)
    early = np.concatenate([random.choice(30, 10, replace=False) for _ in range(40)])
    users = np.concatenate([np.repeat(np.arange(40), 10), np.full(6, 77)])
    log = Interactions.from_arrays(users, np.concatenate([early, np.arange(6)]), time=np.r_[np.arange(400), 400:406])
    made = split(Dataset.of(log), "temporal", valid_share=0.1, test_share=0.1)
    late = log.users.code(77)
    assert made.train.lengths[late] == 0
    model = APR(epochs=5, adversarial_epochs=5, batch_size=64, hidden_size=8, monitor="NDCG@10")
    model.fit(made, Run(seed=0))
    assert not model.factors.user[late].any()
    histories = [[2, 5], [2, 5], []]
    known = model.score(Queries.from_histories(histories, user=np.array([late, -1, late])))
    torch.testing.assert_close(known[0], known[1])
    assert known[2].tolist() == made.train.item_counts.tolist()


def test_rows_are_trained_as_whole_tables_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables too large to touch whole, with a regulariser: sparse steps give what dense ones give."""
    random = np.random.default_rng(4)
    log = Interactions.from_arrays(np.repeat(np.arange(300), 5), random.integers(0, 400, 1500))
    made = split(Dataset.of(log))
    settings: dict[str, Any] = {"batch_size": 8, "hidden_size": 4, "init_std": 0.5, "regularization": 0.1}
    tables = []
    for share in (16, 10**6):
        monkeypatch.setattr("vouch.recommenders.collaborative.factors.DENSE_SHARE", share)
        model = BPR(epochs=2, evaluate_every=2, **settings)
        model.fit(made, Run(seed=0, device="cpu"))
        tables.append(model.factors.item.detach())
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)


def test_a_vector_that_is_no_number_stops_training_and_is_located(made: Split) -> None:
    broken = Factors(made.train.n_users, made.train.n_items, 8)
    with torch.no_grad():
        broken.item[made.train.item[0]] = torch.nan
    model = APR(adversarial_epochs=2, batch_size=64, hidden_size=8, monitor="NDCG@10")
    with pytest.raises(TrainingError, match="epoch 1, step"):
        model.fit(made, Run(seed=0), start=broken)


def test_bad_settings_and_impossible_data_are_named() -> None:
    with pytest.raises(ConfigError, match="eps"):
        APR(eps=-1.0)
    with pytest.raises(ConfigError, match="adversarial_weight"):
        APR(adversarial_weight=-0.1)
    with pytest.raises(ConfigError, match="norm"):
        APR(norm="column")
    with pytest.raises(ConfigError, match="norm is 'column'"):
        worst_change(torch.ones(1, 2), torch.ones(1, 2), 0.1, "column")
    log = Interactions.from_arrays(["ann"] * 5 + ["bob"] * 5, [0, 1, 2, 3, 4, 0, 1, 0, 1, 2])
    greedy = Interactions.from_arrays(["ann"] * 6 + ["bob"] * 4, [0, 1, 2, 0, 1, 2, 0, 1, 0, 1])
    BPR(epochs=1).fit(split(Dataset.of(log)))
    with pytest.raises(TrainingError, match="no negative available for user 'ann'"):
        BPR(epochs=1).fit(split(Dataset.of(greedy)))
