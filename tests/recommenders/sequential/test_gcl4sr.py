"""GCL4SR: queries of prefixes, gates, losses between views, and scores without chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vouch.data import Queries, Split, split
from vouch.errors import ConfigError
from vouch.nn.graphs import mmd
from vouch.nn.transformer import Context
from vouch.recommenders import load
from vouch.recommenders.sequential.batches import MASK
from vouch.recommenders.sequential.bert4rec import BERT4Rec
from vouch.recommenders.sequential.gcl4sr import GCL4SR, real_mean, view_contrast
from vouch.recommenders.sequential.gru4rec import GRU4Rec
from vouch.recommenders.sequential.sasrec import SASRec
from vouch.training import Run

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "max_length": 7,
    "batch_size": 16,
    "epochs": 2,
    "dropout": 0.0,
    "loss": "ce",
    "gcl4sr.neighbors": 4,
}
ITEMS, LENGTHS = torch.tensor([[3, 6, 7, 12, 1], [9, 0, 14, -1, -1]]), torch.tensor([5, 3])


def started(made: Split, **settings: Any) -> Any:
    model = GCL4SR(**{**SMALL, **settings})
    torch.manual_seed(0)
    model.begin(made)
    with torch.no_grad():
        for value in model.network.parameters():
            value.normal_(std=0.5)
    model.network.eval()
    return model


def test_every_prefix_has_the_query_that_it_would_have_alone(made: Split) -> None:
    network = started(made).network
    user = torch.tensor([3, 5])
    whole = network(ITEMS, LENGTHS, Context(user=user))
    for b, n in enumerate(LENGTHS.tolist()):
        for t in range(1, n + 1):
            alone = network(ITEMS[b : b + 1, :t], torch.tensor([t]), Context(user=user[b : b + 1]))[0, t - 1]
            assert torch.allclose(alone, whole[b, t - 1], atol=1e-5)


@pytest.mark.parametrize("gate", ["user", "item", "none"])
def test_the_query_by_its_formulas(made: Split, gate: str) -> None:
    network = started(made, **{"gcl4sr.gate": gate}).network
    user = torch.tensor([3])
    got = network(ITEMS[:1], LENGTHS[:1], Context(user=user))[0, 4]
    rows = ITEMS[0] + 1
    Z = network.transformer(network.item(rows)[None], LENGTHS[:1])[0]
    one, two = network.catalogue()
    F_rows = []
    age = torch.tensor([4, 3, 2, 1, 0])
    bias = network.gate_user(network.user(user))[0] if gate == "user" else torch.zeros(SMALL["max_length"])
    for t in range(5):
        parts = [Z[t]]
        for G in (one[ITEMS[0, t]], two[ITEMS[0, t]]):
            if gate == "none":
                parts.append(G)
                continue
            r = torch.sigmoid(network.gate_item.weight[0] @ G + bias[age[t]])
            assert 0 < r < 1
            parts.append(r * G)
        F_rows.append(network.fuse.weight @ torch.cat(parts))
    m = torch.stack(F_rows).mean(0)
    y = torch.zeros(8)
    for t in range(5):
        c = torch.tanh(network.pool_in.weight @ torch.cat([network.position.weight[age[t]], F_rows[t]]))
        alpha = network.pool_out.weight[0] @ torch.sigmoid(network.pool_own(c) + network.pool_mean.weight @ m)
        y = y + alpha * F_rows[t]
    assert torch.allclose(got, y, atol=1e-5)


def test_users_move_the_gate_and_strangers_do_not(made: Split) -> None:
    network = started(made).network
    outputs = [
        network(ITEMS, LENGTHS, Context(user=None if u is None else torch.tensor([u, u]))) for u in (3, 5, -1, None)
    ]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert torch.equal(outputs[2], outputs[3])
    for gate in ("item", "none"):
        without = started(made, **{"gcl4sr.gate": gate})
        assert without.network.user is None and not any("user" in name for name in without.network.state_dict())


def test_gates_are_learned_and_saved(made: Split) -> None:
    model = GCL4SR(**SMALL)
    objective = model.begin(made)
    batch = next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))
    sum(objective.loss(batch).values()).backward()
    network = model.network
    for parameter in (network.gate_item.weight, network.gate_user.weight, network.user.weight):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    assert {"gate_item.weight", "gate_user.weight", "user.weight"} <= set(model.state())


def test_without_the_graph_the_other_streams_remain(made: Split) -> None:
    bare = GCL4SR(**{**SMALL, "gcl4sr.graph": "none"})
    objective = bare.begin(made)
    assert set(objective.terms) == {"next"} and bare.network.graph is None
    full = started(made)
    bare.network.load_state_dict({k: v for k, v in full.network.state_dict().items() if not k.startswith("graph.")})
    full.network.user_bias = lambda context, B: torch.full((B, 7), -1e4)  # a gate shut for all items
    user = torch.tensor([3, 5])
    bare.network.eval()
    a, b = (model.network(ITEMS, LENGTHS, Context(user=user)) for model in (full, bare))
    assert torch.allclose(a, b, atol=1e-5)


def test_contrast_by_hand_and_for_equal_views() -> None:
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    x, y = F.normalize(a, dim=1), F.normalize(b, dim=1)
    total = 0.0
    for p, q in ((x, y), (y, x)):
        for i in range(4):
            below = sum(math.exp(p[i] @ q[j] / 0.5) for j in range(4))
            below += sum(math.exp(p[i] @ p[j] / 0.5) for j in range(4) if j != i)
            total -= math.log(math.exp(p[i] @ q[i] / 0.5) / below) / 4
    assert view_contrast(a, b, 0.5).item() == pytest.approx(total, rel=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    assert view_contrast(a[order], b[order], 0.5).item() == pytest.approx(total, rel=1e-5)
    e = torch.eye(4)
    want = -2 * math.log(math.e**2 / (math.e**2 + 3 + 3))
    assert view_contrast(e, e, 0.5).item() == pytest.approx(want, rel=1e-5)


def test_with_every_neighbour_both_views_are_one(made: Split) -> None:
    model = GCL4SR(**{**SMALL, "gcl4sr.neighbors": 25})
    objective = model.begin(made)
    batch = next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))
    found = objective.loss(batch)
    table = model.network.item_vectors()
    G = model.network.graph(table, torch.arange(25))[batch.items.clamp(min=0)]
    g = real_mean(G, batch.items >= 0)
    assert found["graph"].item() == pytest.approx(view_contrast(g, g, 0.5).item(), rel=1e-4)


def first_batch(model: Any, made: Split) -> tuple[Any, Any]:
    objective = model.begin(made)
    return objective, next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))


@pytest.mark.parametrize("form", ["fast", "exact"])
def test_the_distance_to_the_item_vectors_by_hand(made: Split, form: str) -> None:
    model = GCL4SR(**{**SMALL, "gcl4sr.neighbors": 25, "gcl4sr.mmd_form": form, "gcl4sr.mmd": 3.0})
    objective, batch = first_batch(model, made)
    with torch.no_grad():
        for value in objective.parameters():
            value.normal_(std=0.5)
    network, term = model.network, objective.terms["gcl4sr"]
    table = network.item_vectors()
    G = network.graph(table, torch.arange(25))  # all neighbours are drawn, so both views are this one
    E_rows, Q_rows = [], []
    for items, n, user in zip(batch.items, batch.lengths.tolist(), batch.user, strict=True):
        bias = network.gate_user(network.user(user))[:n].flip(0)  # by age, the last item is 0
        own = G[items[:n]]
        E_rows.append(table[items[:n]])
        Q_rows.append(torch.sigmoid(own @ network.gate_item.weight[0] + bias).unsqueeze(1) * own)
    if form == "exact":
        want = sum(mmd(E, Q) for E, Q in zip(E_rows, Q_rows, strict=True)) / len(E_rows)
    else:
        width = batch.items.shape[1]
        lines = [
            torch.stack([F.pad(linear(rows).squeeze(1), (0, width - len(rows))) for rows in each])
            for linear, each in ((term.local, E_rows), (term.context, Q_rows))
        ]
        want = mmd(*lines)
    assert objective.loss(batch)["mmd"].item() == pytest.approx(2 * 3.0 * want.item(), rel=1e-3)


def test_hidden_items_have_no_view(made: Split) -> None:
    network = started(made).network
    hidden = ITEMS.clone()
    hidden[0, 2] = MASK
    for training in (False, True):
        network.train(training)
        one, two = network.views(network.rows(hidden).masked_fill(hidden == MASK, 0))
        assert (one[0, 2] == 0).all() and (two[0, 2] == 0).all() and (one[1, 3:] == 0).all()
        assert torch.allclose(one[hidden >= 0].norm(dim=1), torch.ones(7), atol=1e-5)


def test_hidden_items_take_no_part_in_the_losses(made: Split) -> None:
    model = BERT4Rec(
        hidden_size=8, num_heads=2, max_length=7, dropout=0.0, objective=("next", "gcl4sr"), **{"gcl4sr.neighbors": 25}
    )
    objective, batch = first_batch(model, made)
    own, table = objective.terms["gcl4sr"].own, model.network.item_vectors()
    G = own(table, torch.unique(batch.items[batch.items >= 0]))
    G = torch.zeros(25, 8).index_copy(0, torch.unique(batch.items[batch.items >= 0]), G)
    assert (batch.items == MASK).any()
    rows = [G[items[items >= 0]] for items in batch.items]
    g = torch.stack([row.mean(0) if len(row) else torch.zeros(8) for row in rows])
    assert objective.loss(batch)["graph"].item() == pytest.approx(view_contrast(g, g, 0.5).item(), rel=1e-4)


def test_a_single_history_has_no_contrast_and_no_fast_distance(made: Split) -> None:
    for form, left in (("fast", {"next"}), ("exact", {"next", "mmd"})):
        model = GCL4SR(**{**SMALL, "batch_size": 1, "gcl4sr.mmd_form": form})
        objective, batch = first_batch(model, made)
        with pytest.warns(UserWarning, match="one history"):
            found = objective.loss(batch)
        assert set(found) == left and all(torch.isfinite(value) for value in found.values())


def test_the_catalogues_views_follow_the_weights(made: Split) -> None:
    one, other = started(made), started(made)
    with torch.no_grad():
        for value in other.network.parameters():
            value.normal_(std=0.5)
    queries = Queries.from_histories([[1, 2, 3]])
    before, want = one.score(queries), other.score(queries)
    assert not torch.allclose(before, want, atol=1e-2)
    one.network.load_state_dict(other.network.state_dict())
    assert torch.equal(one.score(queries), want)


def test_users_without_a_training_event_have_no_term(made: Split) -> None:
    apart = split(made.dataset, "users", valid_share=0.2, test_share=0.3)
    model = GCL4SR(**SMALL)
    model.fit(apart, Run(device="cpu"))
    absent = int(np.flatnonzero(apart.train.lengths == 0)[0])
    named, nobody = (Queries.from_histories([[1, 2, 3]], user=np.array([user])) for user in (absent, -1))
    assert torch.equal(model.score(named), model.score(nobody))


@pytest.mark.parametrize("form", ["fast", "exact"])
def test_more_padding_changes_nothing(made: Split, form: str) -> None:
    model = GCL4SR(**{**SMALL, "gcl4sr.neighbors": 25, "gcl4sr.mmd_form": form})
    objective = model.begin(made)
    batches = model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)
    batch = min(batches, key=lambda each: each.items.shape[1])
    rows, width = batch.items.shape
    assert width + 2 <= 7
    wide = batch._replace(
        items=torch.cat([batch.items, torch.full((rows, 2), -1)], 1), at=batch.at + 2 * (batch.at // width)
    )
    a, b = objective.loss(batch), objective.loss(wide)
    assert set(a) == {"next", "graph", "mmd"}
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-4, abs=1e-6)


def test_scores_have_no_chance_in_them_and_a_saved_model_scores_alike(made: Split, tmp_path: Path) -> None:
    model = GCL4SR(**{**SMALL, "dropout": 0.3})
    report = model.fit(made, Run(device="cpu"))
    assert {"next", "graph", "mmd"} <= set(report.history[-1])
    queries = Queries.from_histories([[1, 2, 3], [7]], user=np.array([4, -1]))
    first = model.score(queries)
    assert torch.equal(first, model.score(queries))
    model.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").score(queries), first)


def test_one_view_has_no_contrast(made: Split) -> None:
    model = GCL4SR(**{**SMALL, "gcl4sr.views": "one"})
    objective = model.begin(made)
    batch = next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))
    assert set(objective.loss(batch)) == {"next", "mmd"}


def test_the_rate_falls_every_five_epochs() -> None:
    factor = GCL4SR().schedule(1000, 10)
    assert [factor(step) for step in (0, 49, 50, 99, 100)] == pytest.approx([1, 1, 0.7, 0.7, 0.49])


def test_the_losses_fit_other_encoders(made: Split) -> None:
    for kind in (SASRec, GRU4Rec):
        shape = {k: v for k, v in SMALL.items() if k in kind.Config.model_fields}
        model = kind(**shape, objective=("next", "gcl4sr"))
        assert {"graph", "mmd"} <= set(model.fit(made, Run(device="cpu")).history[-1])
    with pytest.raises(ConfigError, match="without a graph"):
        SASRec(objective=("next", "gcl4sr"), **{"gcl4sr.graph": "none"})


def test_training_lowers_all_losses(ring: Split) -> None:
    shape = {**SMALL, "max_length": 15, "hidden_size": 16, "epochs": 6, "learning_rate": 0.01, "rate_decay": 1.0}
    history = GCL4SR(**shape).fit(ring, Run(device="cpu")).history
    assert history[-1]["next"] < 0.9 * history[0]["next"] and history[-1]["graph"] < history[0]["graph"]
