"""Shared architectures: what reduces to what, which parameters are whose, and tables of tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vouch.errors import DataError
from vouch.multitask.gradients import reached, shared_and_own
from vouch.multitask.learn import Learner, TableBatches, task_losses
from vouch.multitask.table import TaskTable
from vouch.multitask.towers import PLE, FieldNetwork, MMoE, SharedBottom, gated

SHAPE = {"bottom": (6, 4), "tower": (3,)}


def test_one_expert_is_the_shared_bottom():
    one = MMoE(5, 2, experts=1, **SHAPE)
    plain = SharedBottom(5, 2, **SHAPE)
    plain.bottom.load_state_dict(one.experts[0].state_dict())
    plain.towers.load_state_dict(one.towers.state_dict())
    x = torch.randn(7, 5)
    assert torch.allclose(torch.stack(one(x)), torch.stack(plain(x)), atol=1e-6)


def test_gates_are_convex():
    x, gate = torch.randn(6, 5), torch.nn.Linear(5, 3, bias=False)
    ones = torch.ones(6, 3, 2)
    assert torch.allclose(gated(gate, x, ones), torch.ones(6, 2))


def test_ple_equals_its_formula():
    """Two levels, written out expert by expert."""
    torch.manual_seed(0)
    model = PLE(5, 2, levels=2, own=1, common=1, **SHAPE)
    x = torch.randn(3, 5)
    inputs, shared = [x, x], x
    for level in model.levels:
        own = [level.own[k][0](inputs[k]) for k in range(2)]
        common = level.common[0](shared)
        out = []
        for k in range(2):
            g = torch.softmax(inputs[k] @ level.gates[k].weight.T, 1)
            out.append(g[:, :1] * own[k] + g[:, 1:] * common)
        if level.gate is not None:
            g = torch.softmax(shared @ level.gate.weight.T, 1)
            shared = g[:, :1] * own[0] + g[:, 1:2] * own[1] + g[:, 2:] * common
        inputs = out
    for out, tower, h in zip(model(x), model.towers.towers, inputs, strict=True):
        assert torch.allclose(out, tower(h)[:, 0], atol=1e-6)


def named_split(model):
    x = torch.randn(8, 5)
    out = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    losses = [each.sum() for each in out]
    shared, own = shared_and_own(losses, parameters)
    at = {id(p): name for name, p in zip(names, parameters, strict=True)}
    return {at[id(p)] for p in shared}, {at[id(p)] for p in own}


def test_the_graph_tells_what_is_shared():
    shared, own = named_split(SharedBottom(5, 2, **SHAPE))
    assert all(name.startswith("bottom") for name in shared) and all(name.startswith("towers") for name in own)
    shared, own = named_split(MMoE(5, 2, **SHAPE))
    assert all(name.startswith("experts") for name in shared)
    assert {name.split(".")[0] for name in own} == {"gates", "towers"}
    shared, own = named_split(PLE(5, 2, levels=2, **SHAPE))
    assert any(name.startswith("levels.0.own") for name in shared)  # they reach all by the shared gate
    assert not any(name.startswith("levels.1.own") for name in shared)
    assert any(name.startswith("levels.1.common") for name in shared)


def test_unused_parameters_are_reached_by_none():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    assert reached([p.sum(), (p * 2).sum()], [p, q]) == [{0, 1}, set()]


def test_the_interaction_is_the_sum_of_products():
    torch.manual_seed(0)
    model = FieldNetwork([3, 4, 5], 1, embedding_size=2, interaction=True, **SHAPE)
    plain = FieldNetwork([3, 4, 5], 1, embedding_size=2, **SHAPE)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "interaction" not in k}, strict=True)
    with torch.no_grad():
        model.interaction[0].fill_(1.0)
    codes = torch.tensor([[2, 3, 4], [0, 1, 0]])
    v = model.fields(codes).unflatten(1, (3, 2))
    products = (v[:, 0] * v[:, 1]).sum(1) + (v[:, 0] * v[:, 2]).sum(1) + (v[:, 1] * v[:, 2]).sum(1)
    assert torch.allclose(model(codes)[0] - plain(codes)[0], products, atol=1e-6)


def test_codes_come_from_training_rows_and_rare_values_share_one():
    train = np.array([True, True, True, False, False])
    table = TaskTable.of({"a": ["x", "x", "y", "x", "z"]}, {"t": [0, 1, 0, 1, 1]}, train=train, least=2)
    assert table.codes[:, 0].tolist() == [1, 1, 0, 1, 0]
    assert table.sizes == (2,)
    with pytest.raises(DataError, match="3 rows"):
        TaskTable.of({"a": ["x", "x", "y"]}, {"t": [0, 1]})
    with pytest.raises(DataError):
        TaskTable.of({}, {"t": [0]})


def test_parts_are_disjoint_whole_and_repeatable():
    table = TaskTable.of({"a": np.arange(100)}, {"t": np.arange(100) % 2})
    parts = table.parts((0.6, 0.2), 3)
    values = [each.codes[:, 0].tolist() for each in parts]
    assert [len(each) for each in values] == [60, 20, 20]
    assert sorted(code for part in values for code in part) == sorted(table.codes[:, 0].tolist())
    assert values == [each.codes[:, 0].tolist() for each in table.parts((0.6, 0.2), 3)]


def test_losses_skip_unknown_labels_and_absent_tasks():
    nan = float("nan")
    output = [torch.tensor([0.3, -0.2]), torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])]
    label = torch.tensor([[1.0, nan, nan], [nan, 4.0, nan]])
    losses = task_losses(output, label, ("a", "b", "c"), (True, False, True))
    assert set(losses) == {"a", "b"}
    assert float(losses["a"]) == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(-0.3))))
    assert float(losses["b"]) == pytest.approx(4.0)


def test_rows_without_any_label_are_in_no_batch():
    nan = float("nan")
    table = TaskTable.of({"a": [1, 2, 3, 4]}, {"t": [0, nan, 1, nan], "u": [nan, nan, 1, 0]})
    batches = TableBatches(table, 1)
    codes = [int(batch.inputs) for batch in batches.epoch(np.random.default_rng(0), 0, 1)]
    assert len(batches) == 3 and sorted(codes) == [1, 3, 4]
    with pytest.raises(DataError, match="no row"):
        TableBatches(table.rows([1]), 1)


def test_values_are_learned_in_standard_units_and_told_in_their_own():
    table = TaskTable.of({"a": [1, 2, 3]}, {"t": [10.0, 20.0, 60.0], "c": [0, 1, 1]})
    network = FieldNetwork(table.sizes, 2, embedding_size=2, **SHAPE)
    learner = Learner(network, table)
    assert table.binary == (False, True)
    codes = torch.from_numpy(table.codes)
    out = network(codes)
    spread = float(np.std([10, 20, 60]))
    assert torch.allclose(learner.predict(codes)[:, 0], out[0] * spread + 30, atol=1e-4)
    assert torch.allclose(learner.predict(codes)[:, 1], torch.sigmoid(out[1]))
    with pytest.raises(DataError, match="'t'"):
        Learner(network, TaskTable.of({"a": [1]}, {"t": [float("nan")]}))
