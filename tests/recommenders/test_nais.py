"""NAIS and FISM: formulas against sums written out, exact invariants, batches, and starting from a saved model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vouch import Dataset, Interactions, Queries, Run, split
from vouch.data import Split
from vouch.errors import ConfigError, DataError, StorageError
from vouch.recommenders.collaborative import nais as room
from vouch.recommenders.collaborative.fism import FISM, FISMNetwork, HistoryBatches, overflow_limit
from vouch.recommenders.collaborative.nais import NAIS, NAISConfig, NAISNetwork, smoothed

N = 30
BOTH = pytest.mark.parametrize("variant", ["prod", "concat"])


@pytest.fixture(scope="module")
def made() -> Split:
    """Histories of 3 to 14 items after the split; one user with a single training item."""
    random = np.random.default_rng(1)
    sizes = [3, *random.integers(5, 17, 39)]
    item = np.concatenate([random.permutation(N)[:size] for size in sizes])
    return split(Dataset.of(Interactions.from_arrays(np.repeat(np.arange(40), sizes), item)))


def model_with(kind: Any, made: Split, scale: float = 0.7, **settings: Any) -> Any:
    """A model with random parameters, large enough for attention to matter."""
    model = kind(hidden_size=5, **({"attention_size": 4} if kind is NAIS else {}), **settings)
    model.prepare(made.train)
    torch.manual_seed(0)
    network = NAISNetwork(N, model.config) if kind is NAIS else FISMNetwork(N, model.config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, scale)
    model.network = network
    return model


def with_tables_of(model: Any, source: Any) -> Any:
    room.copy_tables(source.network, model.network)
    return model


def padded(*histories: list[int], width: int = 8) -> Tensor:
    return torch.tensor([history + [-1] * (width - len(history)) for history in histories])


def by_hand(model: Any, history: list[int], i: int) -> float:
    """NAIS's score as the paper writes it, in double precision and without a maximum."""
    network, config = model.network, model.config
    value = {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()}
    items = [j for j in history if j != i]
    if not items:
        return float(value["bias"][i])
    f, product = [], []
    for j in items:
        q, p = value["history"][j], value["target"][i]
        seen = np.concatenate([q, p]) if config.variant == "concat" else q * p
        hidden = value["W"] @ seen + value["b"]
        hidden = {
            "relu": lambda x: np.maximum(x, 0),
            "tanh": np.tanh,
            "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        }[config.activation](hidden)
        f.append(float(value["h"] @ hidden))
        product.append(float(p @ q))
    weight = np.exp(f) / np.exp(f).sum() ** config.beta
    return float(len(items) ** -config.alpha * (weight @ product) + value["bias"][i])


@BOTH
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("beta, alpha", [(0.5, 0.0), (1.0, 0.3), (0.0, 1.0)])
def test_training_and_ranking_scores_are_the_papers(
    made: Split, variant: str, activation: str, beta: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CANDIDATES", 7)  # several blocks of both kinds
    monkeypatch.setattr(room, "SCORE_CELLS", 300)
    model = model_with(NAIS, made, variant=variant, activation=activation, beta=beta, alpha=alpha)
    histories = [[3, 8, 1, 20, 9], [7], [2, 4, 6], list(range(12))]
    targets = [3, 8, 29, 0]  # some in the history
    got = model.network.logits(padded(*histories, width=13), torch.tensor([targets] * 4))
    wanted = [[by_hand(model, history, i) for i in targets] for history in histories]
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=2e-5, atol=2e-5)
    # when ranking nothing is taken out: compare where the target is outside
    scores = model.score(Queries.from_histories(histories)).numpy()
    for row, history in enumerate(histories):
        others = [i for i in range(N) if i not in history]
        expected = [by_hand(model, history, i) for i in others]
        np.testing.assert_allclose(scores[row, others], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_fism_is_the_sum_and_factorises(made: Split, alpha: float) -> None:
    model = model_with(FISM, made, alpha=alpha)
    q, p, b = (getattr(model.network, name).detach() for name in ("history", "target", "bias"))
    history = [3, 8, 1]
    got = model.network.logits(padded(history, [5]), torch.tensor([[3, 9], [5, 9]])).detach()
    assert float(got[0, 0]) == pytest.approx(float(2**-alpha * p[3] @ (q[8] + q[1]) + b[3]), abs=1e-5)
    assert float(got[0, 1]) == pytest.approx(float(3**-alpha * p[9] @ (q[3] + q[8] + q[1]) + b[9]), abs=1e-5)
    assert float(got[1, 0]) == pytest.approx(float(b[5]), abs=1e-6)  # nothing is left of its history
    queries = Queries.from_histories([history])
    torch.testing.assert_close(model.query_vectors(queries) @ model.item_vectors().T, model.score(queries))
    assert float(model.score(queries)[0, 9]) == pytest.approx(float(got[0, 1]), abs=1e-5)


def test_an_item_more_adds_its_similarity_in_fism(made: Split) -> None:
    model = model_with(FISM, made)
    before, after = model.score(Queries.from_histories([[3, 8], [3, 8, 17]]))
    torch.testing.assert_close(after - before, model.similarities(np.array([17]))[0], rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_without_attention_nais_is_fism(made: Split, variant: str, beta: float) -> None:
    flat = model_with(NAIS, made, variant=variant, beta=beta, scale=0.3)
    with torch.no_grad():
        flat.network.W.zero_()
        flat.network.b.zero_()
    plain = with_tables_of(model_with(FISM, made, alpha=beta), flat)
    history, target = padded([3, 8, 1, 20], [7, 2]), torch.tensor([[3, 9, 0], [7, 2, 29]])
    torch.testing.assert_close(
        flat.network.logits(history, target), plain.network.logits(history, target), rtol=0, atol=1e-6
    )
    queries = Queries.from_histories([[3, 8, 1, 20], [7], []])
    torch.testing.assert_close(flat.score(queries), plain.score(queries), rtol=0, atol=1e-6)
    weights = flat.attention(np.array([3, 8, 1, 20]), np.arange(5))
    torch.testing.assert_close(weights, torch.full((5, 4), 4**-beta))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_weights_add_up_as_they_should_and_masked_ones_are_nothing(beta: float) -> None:
    f = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 3
    real = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    real[0] = False
    weights = smoothed(f, real, beta)
    assert (weights[~real] == 0).all()
    total = (f.double().exp() * real).sum(1)[1:]
    torch.testing.assert_close(weights.sum(1)[1:].double(), total ** (1 - beta), rtol=1e-5, atol=1e-6)
    naive = (f.double().exp() * real)[1:] / total.unsqueeze(1) ** beta
    torch.testing.assert_close(weights[1:].double(), naive, rtol=1e-5, atol=1e-6)


def test_the_stable_form_has_the_gradient_of_the_naive_one() -> None:
    f = torch.randn(4, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    out = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    (stable,) = torch.autograd.grad((smoothed(f, torch.ones(4, 7, dtype=torch.bool), 0.4) * out).sum(), f)
    (naive,) = torch.autograd.grad((f.exp() / f.exp().sum(1, keepdim=True) ** 0.4 * out).sum(), f)
    torch.testing.assert_close(stable, naive, rtol=1e-4, atol=1e-5)


def test_huge_logits_stay_finite() -> None:
    f, real = torch.tensor([[1e3, 999.0, -1e3]]), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(smoothed(f, real, 1.0), torch.softmax(f, 1))
    clamped = smoothed(f, real, 0.5)
    assert torch.isfinite(clamped).all()
    # relative sizes are kept; the common factor is the largest allowed
    shape = torch.exp(f - 1e3)
    torch.testing.assert_close(clamped, shape / shape.sum() ** 0.5 * math.exp(overflow_limit()))


def test_a_history_without_items_has_no_gradient_that_is_no_number(made: Split) -> None:
    model = model_with(NAIS, made)
    logits = model.network.logits(padded([7], []), torch.tensor([[7, -1], [3, 4]]))
    torch.testing.assert_close(logits[0, 0], model.network.bias[7])
    torch.testing.assert_close(logits[1], model.network.bias[[3, 4]])
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.network.parameters() if p.grad is not None)


@BOTH
def test_order_and_padding_do_not_matter(made: Split, variant: str) -> None:
    network = model_with(NAIS, made, variant=variant, scale=0.4).network
    target = torch.tensor([[3, 9, 0]])
    narrow = network.logits(torch.tensor([[3, 8, 1, 20]]), target)
    torch.testing.assert_close(network.logits(torch.tensor([[20, 1, 3, 8]]), target), narrow, rtol=0, atol=2e-6)
    torch.testing.assert_close(network.logits(padded([3, 8, 1, 20], width=40), target), narrow, rtol=0, atol=2e-6)


@BOTH
def test_a_positive_does_not_see_itself_in_the_history(made: Split, variant: str) -> None:
    for model in (model_with(NAIS, made, variant=variant), model_with(FISM, made)):
        history, target = padded([3, 8, 1, 20]), torch.tensor([[8, 9]])
        before = model.network.logits(history, target).detach()
        with torch.no_grad():
            model.network.history[8] += 1.0
        after = model.network.logits(history, target).detach()
        torch.testing.assert_close(after[0, 0], before[0, 0], rtol=1e-5, atol=1e-5)
        assert abs(float(after[0, 1] - before[0, 1])) > 1e-3  # a negative does see it


@BOTH
def test_many_targets_are_taken_in_parts_with_the_same_gradient(
    made: Split, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, target = padded([3, 8, 1, 20], [7, 2]), torch.arange(20).view(2, 10)
    found = []
    for cells in (1 << 20, 48):  # three targets at a time
        monkeypatch.setattr(room, "CELLS", cells)
        network = model_with(NAIS, made, variant=variant).network
        logits = network.logits(history, target)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in network.parameters())])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_online_scores_are_those_of_the_whole_history(made: Split, variant: str, beta: float) -> None:
    random = np.random.default_rng(0)
    items = 150
    log = Interactions.from_arrays(np.repeat(np.arange(20), 40), random.integers(0, items, 800).clip(max=items - 1))
    model = NAIS(hidden_size=5, attention_size=4, variant=variant, beta=beta, alpha=0.2)
    model.prepare(log)
    torch.manual_seed(0)
    model.network = NAISNetwork(log.n_items, model.config)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.normal_(0, 0.4)
    order = random.permutation(log.n_items)[:101]
    online = model.online(order[:1])
    for item in order[1:]:
        online.add(int(item))
    online.add(int(order[5]))  # known already
    whole = model.score(Queries.from_histories([order]))[0]
    torch.testing.assert_close(online.scores(), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.online(np.zeros(0, np.int64)).scores(), model.network.bias.detach())
    with pytest.raises(DataError, match=f"item code {log.n_items} is not in the table of {log.n_items} items"):
        online.add(log.n_items)


@BOTH
def test_attention_explains_the_score(made: Split, variant: str) -> None:
    model = model_with(NAIS, made, variant=variant)
    history, candidates = np.array([3, 8, 1]), np.array([9, 12])
    weights = model.attention(history, candidates)
    products = model.similarities(history)[:, candidates].T
    expected = (weights * products).sum(1) + model.network.bias.detach()[candidates]
    torch.testing.assert_close(model.score(Queries.from_histories([history]))[0, candidates], expected)
    with pytest.raises(DataError, match=f"item code 99 is not in the table of {N} items"):
        model.attention(history, np.array([99]))


def test_an_empty_history_is_ranked_by_bias_or_refused(made: Split) -> None:
    queries = Queries.from_histories([[3], []])
    for kind in (NAIS, FISM):
        model = model_with(kind, made)
        torch.testing.assert_close(model.score(queries)[1], model.network.bias.detach())
        strict = with_tables_of(model_with(kind, made, empty_history="error"), model)
        with pytest.raises(DataError, match="query 1 has no history"):
            strict.score(queries)


def test_batches_hold_every_pair_and_no_known_negative(made: Split) -> None:
    config = NAISConfig(positives=0, batch_size=7, negatives=3)
    batches = HistoryBatches(made.train, config)
    lengths = made.train.lengths
    assert batches.skipped == int((lengths == 1).sum()) == 1
    histories = {tuple(sorted(made.train.history(u).tolist())): u for u in range(made.train.n_users)}
    seen: list[tuple[int, int]] = []
    for batch in batches.epoch(np.random.default_rng(0), 0, 1):
        real = batch.target >= 0
        assert float(batch.weight) == pytest.approx(1 / int(real.sum()))
        for history, target, label in zip(batch.history, batch.target, batch.label, strict=True):
            items = [int(i) for i in history if i >= 0]
            positive = [int(i) for i in target[(label == 1) & (target >= 0)]]
            negative = [int(i) for i in target[(label == 0) & (target >= 0)]]
            assert len(negative) == 3 * len(positive)
            assert not set(negative) & set(items)
            seen += [(histories[tuple(sorted(items))], i) for i in positive]
    wanted = [(u, int(i)) for u in np.flatnonzero(lengths > 1) for i in made.train.history(u)]
    assert sorted(seen) == sorted(wanted)


def test_positives_are_capped_and_drawn_anew_while_histories_stay_whole(made: Split) -> None:
    batches = HistoryBatches(made.train, NAISConfig(positives=2, batch_size=40))
    draws = []
    for seed in (0, 1):
        (batch,) = batches.epoch(np.random.default_rng(seed), 0, 1)
        positive = batch.target[:, :2]
        assert ((batch.history >= 0).sum(1) == torch.tensor(np.sort(made.train.lengths[made.train.lengths > 1]))).all()
        assert all(len(set(row.tolist())) == 2 and min(row.tolist()) >= 0 for row in positive)
        owners = {tuple(h.tolist()): set(p.tolist()) for h, p in zip(batch.history, positive, strict=True)}
        assert all(p <= set(h) for h, p in owners.items())
        draws.append(owners)
    assert draws[0].keys() == draws[1].keys() and draws[0] != draws[1]


def test_processes_share_a_batch(made: Split) -> None:
    batches = HistoryBatches(made.train, NAISConfig(batch_size=5))
    network = model_with(FISM, made).network
    whole = list(batches.epoch(np.random.default_rng(0), 0, 1))
    shares = [list(batches.epoch(np.random.default_rng(0), rank, 2)) for rank in (0, 1)]
    for all_of_it, *parts in zip(whole, *shares, strict=True):
        mean = sum(network.loss(part)["bce"] for part in parts) / 2  # what averaging gradients does
        torch.testing.assert_close(mean, network.loss(all_of_it)["bce"])


def test_the_loss_is_the_mean_over_instances_plus_whole_tables(made: Split) -> None:
    model = model_with(NAIS, made, penalty_target=0.1, penalty_history=0.2, penalty_attention=0.3)
    network = model.network
    (batch,) = HistoryBatches(made.train, NAISConfig(batch_size=40)).epoch(np.random.default_rng(0), 0, 1)
    losses = network.loss(batch)
    terms = []
    for history, target, label in zip(batch.history, batch.target, batch.label, strict=True):
        for i, y in zip(target.tolist(), label.tolist(), strict=True):
            if i >= 0:
                s = by_hand(model, [j for j in history.tolist() if j >= 0], i)
                terms.append(math.log1p(math.exp(-s if y else s)))
    assert losses["bce"].item() == pytest.approx(np.mean(terms), rel=1e-4)
    squares = {name: float(t.square().sum()) for name, t in network.state_dict().items()}
    wanted = 0.1 * squares["target"] + 0.2 * squares["history"] + 0.3 * squares["W"]
    assert losses["penalty"].item() == pytest.approx(wanted, rel=1e-5)


SHORT: dict[str, Any] = {"epochs": 3, "hidden_size": 5, "learning_rate": 0.05, "batch_size": 8}


@BOTH
def test_training_lowers_the_loss_and_reports_who_was_skipped(made: Split, variant: str) -> None:
    model = NAIS(**{**SHORT, "epochs": 15}, pretrain_epochs=10, variant=variant, attention_size=4, patience=99)
    report = model.fit(made, Run(seed=0))
    assert report.history[-1]["bce"] < 0.95 * report.history[0]["bce"]
    assert report.history[0]["skipped_users"] == 1
    assert (model.network.h != 1).any()  # learned, from ones


def test_the_first_step_of_a_coordinate_has_the_size_of_the_rate(made: Split) -> None:
    """Adagrad's sums begin at next to nothing; and what decays, decays."""
    settings = {**SHORT, "epochs": 1, "batch_size": 99, "learning_rate": 0.05}
    moved = []
    for more in ({"weight_decay": 0.0}, {"weight_decay": 10.0}):
        model = FISM(**{**settings, **more})
        model.fit(made, Run(seed=0))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            begin = FISMNetwork(N, model.config)
        moved.append(
            [(now - then).detach() for now, then in zip(model.network.parameters(), begin.parameters(), strict=True)]
        )
    _, _, bias = moved[0]
    assert bias.abs().min().item() == pytest.approx(0.05, rel=0.05)
    begin_signs = [-torch.sign(then) for then in begin.parameters()][:2]
    for step, sign in zip(moved[1][:2], begin_signs, strict=True):
        assert (torch.sign(step) == sign).float().mean() > 0.9


def test_beginnings(made: Split) -> None:
    torch.manual_seed(0)
    for variant, fan_in in (("prod", 16), ("concat", 32)):
        network = NAISNetwork(4000, NAISConfig(variant=variant))
        for table in (network.history, network.target):
            assert table.abs().max().item() <= 0.02 and table.std().item() == pytest.approx(0.0088, rel=0.02)
        std = math.sqrt(2 / (16 + fan_in))
        assert network.W.shape == (16, fan_in) and std < network.W.abs().max().item() <= 2 * std
        assert network.W.std().item() == pytest.approx(0.88 * std, rel=0.12)
        assert (network.h == 1).all() and (network.b == 0).all() and (network.bias == 0).all()


def test_nais_starts_from_fism_saved_or_trained_first(made: Split, tmp_path: Path) -> None:
    first = FISM(**SHORT)
    first.fit(made, Run(seed=6))
    first.save(tmp_path / "fism")
    tables = {name: value.clone() for name, value in first.state().items()}
    frozen = {**SHORT, "freeze": True, "attention_size": 4}
    saved = NAIS(pretrained=str(tmp_path / "fism"), **frozen)
    saved.fit(made, Run(seed=5))
    given = NAIS(**frozen)
    given.fit(made, Run(seed=5), start=first.network)
    trained = NAIS(pretrain_epochs=3, **frozen)
    trained.fit(made, Run(seed=5))  # pre-trains with the next seed
    for model in (saved, given, trained):
        assert all(torch.equal(model.state()[name], tables[name]) for name in tables)
        assert (model.network.b != 0).any()
    assert torch.equal(saved.network.W, trained.network.W)
    thawed = NAIS(**{**frozen, "freeze": False})
    thawed.fit(made, Run(seed=5), start=first.network)
    assert not any(torch.equal(thawed.state()[name], tables[name]) for name in tables)
    assert all(torch.equal(first.state()[name], tables[name]) for name in tables)  # the start is left alone


def test_beginnings_that_do_not_fit_are_named(made: Split, tmp_path: Path) -> None:
    first = FISM(**SHORT)
    first.fit(made, Run(seed=0))
    first.save(tmp_path / "fism")
    with pytest.raises(DataError, match=r"'history' has shape \(30, 5\), this model needs \(30, 6\)"):
        NAIS(pretrained=str(tmp_path / "fism"), hidden_size=6).fit(made)
    fewer = split(Dataset.of(Interactions.from_arrays(np.repeat(np.arange(9), 6), np.tile(np.arange(18), 3))))
    with pytest.raises(DataError, match=r"\(30, 5\), this model needs \(18, 5\)"):
        NAIS(pretrained=str(tmp_path / "fism"), hidden_size=5).fit(fewer)
    other = Interactions.from_arrays(np.repeat(np.arange(9), 10), [f"x{i}" for i in np.tile(np.arange(N), 3)])
    with pytest.raises(DataError, match="knows 30 items, but not the 30 of this log"):
        NAIS(pretrained=str(tmp_path / "fism"), hidden_size=5).fit(split(Dataset.of(other)))
    given = NAIS(**SHORT)
    given.fit(made, Run(seed=0), start=first.network)
    given.save(tmp_path / "nais")
    with pytest.raises(ConfigError, match="holds 'nais', not fism"):
        NAIS(pretrained=str(tmp_path / "nais")).fit(made)
    with pytest.raises(StorageError, match="no trained model"):
        NAIS(pretrained=str(tmp_path / "nothing")).fit(made)


def test_bad_settings_and_impossible_data_are_named(made: Split) -> None:
    for settings, found in (
        ({"beta": 1.5}, "'beta' of NAIS is 1.5"),
        ({"beta": -0.1}, "'beta' of NAIS is -0.1"),
        ({"variant": "sum"}, "'prod' or 'concat'"),
        ({"alpha": 2}, "'alpha'"),
    ):
        with pytest.raises(ConfigError, match=found):
            NAIS(**settings)
    with pytest.raises(DataError, match=f"item code {N} is not in the table of {N} items"):
        model_with(FISM, made).score(Queries.from_histories([[3, N]]))
    lonely = split(Dataset.of(Interactions.from_arrays([0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 0, 1])))
    with pytest.raises(DataError, match="no user has two items"):
        FISM(epochs=1).fit(lonely)


@pytest.mark.real
def test_all_items_of_ml_100k_are_ranked_in_time(real_data: Any) -> None:
    import time

    from vouch.data.readers import read

    log = read(str(real_data("ml_100k"))).interactions
    for variant in ("prod", "concat"):
        model = NAIS(variant=variant)
        model.prepare(log)
        model.network = NAISNetwork(log.n_items, model.config)
        begin = time.perf_counter()
        model.score(Queries.from_users(log, np.arange(log.n_users)))
        assert time.perf_counter() - begin < 30
