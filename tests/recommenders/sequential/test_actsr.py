"""AC-TSR: the calibrators' formulas, which loss trains what, and what must not change when they are off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vouch.data import Queries, Query, Split
from vouch.errors import ConfigError, DataError
from vouch.nn.transformer import Context
from vouch.recommenders import load
from vouch.recommenders.sequential.actsr import (
    ACTSR,
    Calibrated,
    CalibratedAttention,
    CalibrationConfig,
    evenness,
)
from vouch.recommenders.sequential.base import Objective, routed_step
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.bert4rec import BERT4Rec
from vouch.recommenders.sequential.gru4rec import GRU4Rec
from vouch.recommenders.sequential.maps import attention_maps
from vouch.recommenders.sequential.sasrec import SASRec
from vouch.training import Run

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "num_layers": 2,
    "max_length": 8,
    "inner_size": 16,
    "epochs": 2,
    "batch_size": 16,
    "dropout": 0.0,
    "loss": "ce",
}


def layer(*, std: float = 0.7, **settings: Any) -> CalibratedAttention:
    torch.manual_seed(0)
    made = CalibratedAttention(8, 2, 0.0, 6, CalibrationConfig(**settings))
    for value in made.parameters():
        torch.nn.init.normal_(value, std=std)
    return made


def watched(made: CalibratedAttention, x: Tensor, mask: Tensor | None = None, attack: bool = True) -> Context:
    context = Context(watch=True, attack=attack, last_layer=True)
    made(x, x, mask, context)
    return context


def started(made: Split, **settings: Any) -> tuple[Any, Objective, SequenceBatch]:
    """A model before its first step, with larger weights than it starts with, and a batch."""
    model = ACTSR(**{**SMALL, **settings})
    torch.manual_seed(0)
    objective = model.begin(made)
    with torch.no_grad():
        for value in objective.parameters():
            value.normal_(std=0.3)
    return model, objective, next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))


# The formulas -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("arrange", ["series", "parallel"])
@pytest.mark.parametrize("combine", ["gate", "fixed"])
def test_weights_equal_the_formulas_pair_by_pair(causal: bool, arrange: str, combine: str) -> None:
    T = 5
    made = layer(arrange=arrange, combine=combine)
    x = torch.randn(1, T, 8)
    mask = None if causal else torch.ones(1, 1, 1, T, dtype=torch.bool)
    context = watched(made, x, mask, attack=False)
    q, (k, _) = made.query(x)[0], made.key_value(x)[0].chunk(2, -1)
    m_q, m_k = made.attack_query(q), made.attack_key(k)
    gate = torch.sigmoid(made.gate(q))

    def softmax(values: list[float]) -> list[float]:
        total = sum(map(math.exp, values))
        return [math.exp(value) / total for value in values]

    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        for i in range(T):
            seen = range(i + 1) if causal else range(T)
            spatial, plain, attack = [], [], []
            for j in seen:
                pair = torch.cat([q[i, part], k[j, part]])
                w = torch.cat([made.spatial_query.weight, made.spatial_key.weight], 1)  # (2, 2k): order and distance
                b = made.spatial_query.bias
                o = 1 / (1 + math.exp(-float(w[0] @ pair + b[0])))
                e_order = math.log(o) if j > i else math.log(1 - o)
                e_distance = (
                    -(float(made.spread) ** 2) / 2 * (math.log(abs(i - j) + 1) - float(w[1] @ pair + b[1])) ** 2
                )
                dot = float(q[i, part] @ k[j, part])
                plain.append(dot / 2)
                spatial.append((dot + e_order + e_distance) / 2)
                attack.append(float(m_q[i, part] @ m_k[j, part]) / 2)
            origin, M = softmax(spatial), softmax(attack)
            base = softmax(plain) if arrange == "parallel" else origin
            calibrated = softmax([a * math.exp(1 - m) for a, m in zip(base, M, strict=True)])
            if combine == "gate":
                mixed = [
                    float(gate[i, j]) * a + (1 - float(gate[i, j])) * c
                    for j, a, c in zip(seen, origin, calibrated, strict=True)
                ]
            else:
                mixed = [a + 0.5 * c for a, c in zip(origin, calibrated, strict=True)]
            for name, want in (("origin", origin), ("mask", M), ("attention", softmax(mixed))):
                got = context.notes[name][0][0, h, i]
                assert got[list(seen)].tolist() == pytest.approx(want, abs=1e-5), name
                assert got.sum().item() == pytest.approx(1, abs=1e-6)


def test_attacked_weights_equal_the_formula() -> None:
    made = layer()
    x = torch.randn(2, 5, 8)
    torch.manual_seed(3)
    context = watched(made, x)
    torch.manual_seed(3)
    origin, M = context.notes["origin"][0], context.notes["mask"][0]
    noise = torch.randn_like(origin)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = torch.softmax((origin * M + noise * (1 - M)).masked_fill(~mask, -torch.inf), -1)
    value = made.heads(made.key_value(x).chunk(2, -1)[1])
    assert context.second is not None
    assert torch.allclose(context.second, made.out((weights @ value).transpose(1, 2).flatten(2)), atol=1e-6)
    penalty = context.notes["penalty"][0]
    assert penalty.item() == pytest.approx((1 - M).square().sum().sqrt().item(), rel=1e-6)


def test_mean_penalty_does_not_grow_with_the_batch() -> None:
    made = layer(mask_penalty="mean")
    x = torch.randn(3, 5, 8)
    one = watched(made, x).notes["penalty"][0].item()
    two = watched(made, torch.cat([x, x])).notes["penalty"][0].item()
    assert one == pytest.approx(two, rel=1e-5) and 0 < one < 1
    norm = layer()
    ratio = watched(norm, torch.cat([x] * 4)).notes["penalty"][0].item() / watched(norm, x).notes["penalty"][0].item()
    assert ratio == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_sum_to_one_and_masked_keys_have_no_weight(causal: bool) -> None:
    made = layer()
    lengths = torch.tensor([5, 2])
    mask = None if causal else (torch.arange(5) < lengths[:, None])[:, None, None]
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril() if mask is None else mask.expand(2, 1, 5, 5)
    notes = watched(made, torch.randn(2, 5, 8), mask).notes
    for name in ("origin", "mask", "attention"):
        assert torch.allclose(notes[name][0].sum(-1), torch.ones(()), atol=1e-6)
        assert notes[name][0].masked_select(~allowed).abs().max() < 1e-6


def test_bounds_of_the_final_weights() -> None:
    made = layer(std=3.0)
    weights = watched(made, 5 * torch.randn(16, 6, 8)).notes["attention"][0]
    for i in range(6):
        n, seen = i + 1, weights[:, :, i, : i + 1]
        assert seen.max() <= math.e / (math.e + n - 1) + 1e-6
        assert seen.min() >= 1 / (1 + (n - 1) * math.e) - 1e-6


def test_spatial_errors_are_never_positive_and_vanish_without_spread() -> None:
    made = layer(std=2.0)
    q, k = made.heads(torch.randn(4, 6, 8)), made.heads(torch.randn(4, 6, 8))
    order, distance = made.spatial_errors(q, k)
    assert order.max() <= 0 and distance.max() <= 0 and distance.min() < -0.1
    torch.nn.init.zeros_(made.spread)
    assert made.spatial_errors(q, k)[1].abs().max() == 0


def test_a_gate_of_one_leaves_the_softmax_of_the_origin() -> None:
    made = layer()
    torch.nn.init.zeros_(made.gate.weight)
    torch.nn.init.constant_(made.gate.bias, 100.0)
    notes = watched(made, torch.randn(2, 5, 8)).notes
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = torch.softmax(notes["origin"][0].masked_fill(~mask, -torch.inf), -1)
    assert torch.allclose(notes["attention"][0], expected, atol=1e-6)


def test_one_item_gets_all_the_attention() -> None:
    for weights in watched(layer(), torch.randn(3, 1, 8)).notes.values():
        if weights[0].dim() == 4:
            assert torch.equal(weights[0], torch.ones(3, 2, 1, 1))


def test_annealing_forgets_the_origin_step_by_step() -> None:
    made = layer(combine="annealing")
    origin, calibrated = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
    made.steps.fill_(99_999)
    made.train()
    joined = made.join(origin, calibrated, torch.zeros(1, 3, 8))
    assert torch.allclose(joined, math.exp(-1) * origin + calibrated)
    made.eval()
    made.join(origin, calibrated, torch.zeros(1, 3, 8))
    assert made.steps.item() == 100_000


# With the calibrators off -------------------------------------------------------------------------------------


def test_without_calibrators_it_is_sasrec(made: Split) -> None:
    plain = SASRec(**SMALL, positions=False)
    torch.manual_seed(0)
    plain.begin(made)
    bare = ACTSR(**SMALL, **{"actsr.calibrators": "none"})
    bare.begin(made)
    missing = bare.network.load_state_dict(plain.network.state_dict(), strict=False)
    assert not missing.unexpected_keys
    items, lengths = torch.randint(0, 25, (4, 8)), torch.tensor([8, 8, 8, 8])
    assert torch.allclose(bare.network(items, lengths), plain.network(items, lengths), atol=1e-6)


def test_spatial_calibrator_with_both_terms_off_is_plain_attention() -> None:
    made = layer(calibrators="spatial", order=False, distance=False)
    x = torch.randn(2, 5, 8)
    plain = layer(calibrators="none")
    assert torch.allclose(made(x, x, None), plain(x, x, None), atol=1e-6)
    assert not torch.allclose(layer(calibrators="spatial")(x, x, None), plain(x, x, None), atol=1e-3)


# Which loss trains what ---------------------------------------------------------------------------------------


def test_the_attack_trains_its_own_projections_only(made: Split) -> None:
    _, objective, batch = started(made)
    names = {id(p): name for name, p in objective.named_parameters()}
    theirs = {names[id(p)] for p in objective.attackers["attack"]}
    assert len(theirs) == 2 * SMALL["num_layers"] and all(".attack_" in name for name in theirs)
    found = objective.loss(batch)
    gradients = torch.autograd.grad(found["attack"], objective.attackers["attack"])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


class _Plain:
    """Stands in for Fabric in one process."""

    @staticmethod
    def autocast() -> Any:
        import contextlib

        return contextlib.nullcontext()


def test_each_parameter_moves_by_its_own_loss(made: Split) -> None:
    _, objective, batch = started(made)
    torch.manual_seed(1)
    found = objective.loss(batch)
    theirs = {id(p) for p in objective.attackers["attack"]}
    expected = {}
    for name, parameter in objective.named_parameters():
        loss = found["attack"] if id(parameter) in theirs else found["next"]
        (expected[name],) = torch.autograd.grad(loss, [parameter], retain_graph=True, allow_unused=True)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    torch.manual_seed(1)
    routed_step(objective, batch, torch.optim.SGD(objective.parameters(), lr=0.1), _Plain())
    for name, value in objective.named_parameters():
        step = 0 if expected[name] is None else 0.1 * expected[name]
        assert torch.allclose(value, before[name] - step, atol=1e-6), name


def test_a_step_of_the_attacker_does_not_lower_the_loss_it_attacks(made: Split) -> None:
    _, objective, batch = started(made, **{"actsr.penalty": 0.0})

    def attack() -> Tensor:
        torch.manual_seed(1)
        return objective.loss(batch)["attack"]

    group = objective.attackers["attack"]
    before = attack()
    gradients = torch.autograd.grad(before, group)
    with torch.no_grad():
        for parameter, gradient in zip(group, gradients, strict=True):
            parameter -= 0.3 * gradient / gradient.norm()
    assert attack().item() < before.item()


def test_training_lowers_the_loss_and_moves_the_attacker(ring: Split) -> None:
    shape = {**SMALL, "max_length": 20, "epochs": 6, "learning_rate": 0.01}
    model = ACTSR(**shape, **{"actsr.mask_penalty": "mean"})
    report = model.fit(ring, Run(device="cpu"))
    assert report.history[-1]["next"] < 0.7 * report.history[0]["next"]
    assert report.history[-1]["loss"] == pytest.approx(report.history[-1]["next"])  # the attack is no part of it


@pytest.mark.parametrize("settings", [{"calibrators": "spatial"}, {"calibrators": "none"}, {"mask": "uniform"}])
def test_without_an_attacker_there_is_no_attack(made: Split, settings: dict[str, str]) -> None:
    _, objective, batch = started(made, **{f"actsr.{name}": value for name, value in settings.items()})
    assert not objective.attackers and set(objective.loss(batch)) == {"next"}


# What a recommender must keep ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"arrange": "parallel"}, {"combine": "annealing"}, {"mask": "uniform"}])
def test_no_output_depends_on_later_items(made: Split, settings: dict[str, str]) -> None:
    model, _, _ = started(made, **{f"actsr.{name}": value for name, value in settings.items()})
    network = model.network.eval()
    items = torch.randint(0, 25, (3, 8))
    changed = items.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % 25
    full = torch.full((3,), 8)
    assert torch.allclose(network(items, full)[:, :5], network(changed, full)[:, :5], atol=1e-6)
    assert not torch.allclose(network(items, full)[:, 5:], network(changed, full)[:, 5:], atol=1e-3)


def test_longer_neighbours_in_the_batch_change_nothing(made: Split) -> None:
    model, _, _ = started(made)
    short, long = Queries.from_histories([[1, 2, 3]]), Queries.from_histories([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]])
    assert torch.allclose(model.score(short)[0], model.score(long)[0], atol=1e-5)


def test_evaluation_has_no_chance_in_it_and_a_saved_model_scores_alike(made: Split, tmp_path: Path) -> None:
    model = ACTSR(**{**SMALL, "dropout": 0.3})
    model.fit(made, Run(device="cpu"))
    queries = Queries.from_histories([[1, 2, 3], [4], list(range(20))])
    scores = model.score(queries)
    assert torch.equal(scores, model.score(queries))
    model.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").score(queries), scores)


def test_the_same_attention_serves_bert4rec_and_is_refused_elsewhere(made: Split) -> None:
    shape = {name: value for name, value in SMALL.items() if name != "inner_size"}
    model = BERT4Rec(**shape, attention="actsr")
    report = model.fit(made, Run(device="cpu"))
    assert {"next", "attack"} <= set(report.history[-1])
    with pytest.raises(ConfigError, match="its encoder is no transformer"):
        GRU4Rec(attention="actsr")
    with pytest.raises(ConfigError, match="it needs attention=actsr"):
        SASRec(objective=("next", "actsr"))


def test_maps_show_what_each_layer_looked_at(made: Split) -> None:
    model, _, _ = started(made)
    maps = attention_maps(model, Queries.from_histories([[1, 2, 3], [4, 5]]))
    assert {name: len(layers) for name, layers in maps.items()} == {"attention": 2, "origin": 2, "mask": 2}
    assert maps["attention"][0].shape == (2, 2, 3, 3)
    plain = SASRec(**SMALL)
    plain.begin(made)
    assert set(attention_maps(plain, Queries.from_histories([[1, 2]]))) == {"attention"}
    gru = GRU4Rec()
    gru.begin(made)
    with pytest.raises(ConfigError, match="no attention"):
        attention_maps(gru, Queries.from_histories([[1, 2]]))


@pytest.mark.parametrize(("kind", "twice"), [("double-softmax", True), ("mean", False)])
def test_controls_do_what_they_say(made: Split, kind: str, twice: bool) -> None:
    model = SASRec(**SMALL, attention=kind)
    torch.manual_seed(0)
    model.begin(made)
    (weights, _) = attention_maps(model, Queries.from_histories([[1, 2, 3, 4]]))["attention"]
    if twice:
        assert weights[0, 0, 3].max() <= math.e / (math.e + 3)
        plain = SASRec(**SMALL)
        plain.begin(made)
        plain.network.load_state_dict(model.network.state_dict())
        once = attention_maps(plain, Queries.from_histories([[1, 2, 3, 4]]))["attention"][0][0, 0, 3]
        assert torch.allclose(weights[0, 0, 3], torch.softmax(once, -1), atol=1e-6)
    else:
        assert torch.allclose(weights[0, 0, 3], torch.full((4,), 0.25))


def test_the_evenness_of_the_masks_is_reported(made: Split) -> None:
    even = torch.ones(2, 3, 4, 4).tril() / torch.arange(1.0, 5).view(4, 1)
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    assert evenness(even, real).tolist() == pytest.approx([1.0] * 3 * (3 + 1))
    rows = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.5, 0.25, 0.25, 0], [0.25] * 4]).expand(1, 1, 4, 4)
    want = [-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2), 1.5 * math.log(2) / math.log(3), 1.0]
    assert evenness(rows, real[:1]).tolist() == pytest.approx(want)

    model = ACTSR(**{**SMALL, "epochs": 1})
    model.fit(made, Run(device="cpu"))
    assert 0.9 < model.diagnostics["actsr.mask_evenness"] <= 1 + 1e-6  # next to no training
    _, objective, batch = started(made)  # with large weights
    objective.loss(batch)
    assert 0 < objective.terms["actsr"].diagnose()["actsr.mask_evenness"] < 0.999
    assert not any("last" in name for name in model.begin(made).state_dict())
    uniform = ACTSR(**{**SMALL, "epochs": 1}, **{"actsr.mask": "uniform"})
    uniform.fit(made, Run(device="cpu"))
    assert uniform.diagnostics == {}


def test_a_window_longer_than_the_gates_is_named_and_long_histories_are_cut(made: Split) -> None:
    model, _, _ = started(made)
    with pytest.raises(DataError, match="a history of 9 events for a gate of 8"):
        model.network(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([9]))
    long = list(range(20))
    assert torch.equal(*(model.score(Queries.from_histories([history])) for history in (long, long[-8:])))


def test_heads_must_divide_the_size() -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        Calibrated(ACTSR(hidden_size=10, num_heads=3).config, CalibrationConfig(), {}).layer()


def test_strangers_are_served(made: Split) -> None:
    model, _, _ = started(made)
    assert (model.recommend([Query(history=[1, 2])], 3).item >= 0).all()
