"""The contract of balancers: what they set, on any model, and what they refuse."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from vouch.errors import ConfigError, TrainingError, UnknownIdError
from vouch.multitask.balancers import balancers, make
from vouch.multitask.bytask import GradientBalancer
from vouch.training import TrainConfig, fit

ALL = sorted(balancers())
BY_TASK = [slug for slug, cls in balancers().items() if issubclass(cls, GradientBalancer)]
TASKS = ("click", "like", "watch")


class Body(nn.Module):
    """A shared layer, a head for each task, and outputs apart or put together."""

    def __init__(self, tasks=3, together=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(tasks)])
        self.together = together

    def forward(self, x):
        h = self.body(x)
        out = [head(h).squeeze(1) for head in self.heads]
        return torch.stack(out, 1).unbind(1) if self.together else out

    def losses(self, x, y):
        return {
            name: (10.0**k) * (out - y[:, k]).square().mean()
            for k, (name, out) in enumerate(zip(TASKS, self(x), strict=False))
        }

    def loss(self, batch):
        return self.losses(*batch)


def batches(n, seed=1, rows=16):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(rows, 5, generator=generator)
        yield x, torch.stack([x[:, 0], -x[:, 0] + x[:, 1], x[:, 2]], 1)


def flat(parameters):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten() for g in grads]).double().numpy()


def by_task(model, x, y, parameters):
    """`(T, P)` by plain backward passes."""
    rows = []
    for name in TASKS[: len(model.heads)]:
        model.zero_grad()
        model.losses(x, y)[name].backward()
        rows.append(flat(parameters))
    model.zero_grad()
    return np.stack(rows)


def quiet(slug, model, **settings):
    return make(slug, model.named_parameters(), tasks=TASKS[: len(model.heads)], **settings)


@pytest.mark.parametrize("slug", ALL)
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_two_lines_in_a_plain_loop(slug, together):
    """Training lowers every loss, whatever the balancer."""
    model = Body(together=together)
    balancer = quiet(slug, model)
    optimizer = torch.optim.Adam([*model.parameters(), *balancer.parameters()], lr=0.02)
    first = last = None
    for step, (x, y) in enumerate(batches(150)):
        losses = model.losses(x, y)
        optimizer.zero_grad()
        balancer.backward(losses)
        optimizer.step()
        if step % 30 == 29:
            balancer.end_epoch()
        last = {name: float(loss.detach()) for name, loss in losses.items()}
        first = first or last
        assert all(p.grad is not None for p in model.parameters())
    assert all(last[name] < first[name] for name in TASKS), (first, last)
    assert balancer.report.tasks == list(TASKS) and balancer.report.losses[0] == pytest.approx(last["click"])


@pytest.mark.parametrize("slug", BY_TASK)
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_the_gradient_is_the_rule_on_shared_parameters_and_heads_get_their_own(slug, together):
    """Against plain backward passes, and the rule's factors as reported."""
    model = Body(together=together)
    balancer = quiet(slug, model)
    for x, y in batches(3):
        shared, heads = list(model.body.parameters()), list(model.heads.parameters())
        G, own = by_task(model, x, y, shared), by_task(model, x, y, heads)
        balancer.backward(model.losses(x, y))
        report = balancer.report
        np.testing.assert_allclose(report.gram, G @ G.T, rtol=1e-4, atol=1e-6)
        expected = (report.coefficients @ G).sum(0)
        np.testing.assert_allclose(flat(shared), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(flat(heads), own.sum(0))
        np.testing.assert_allclose(report.weights, report.coefficients.sum(0))


@pytest.mark.parametrize("slug", BY_TASK)
def test_factors_are_in_the_sum_convention(slug):
    """Equal gradients without conflict: whatever the rule, the sum; with `mean`, the mean. (CAGrad: its formula.)"""
    more = (1 + 0.4) / (1 + 0.4**2) if slug == "cagrad" else 1.0
    x, y = next(batches(1))
    for reduction, factor in (("sum", 3.0), ("mean", 1.0)):
        model = Body(1)
        balancer = make(slug, model.body.parameters(), reduction=reduction)
        model.losses(x, y)["click"].backward()
        plain = torch.cat([p.grad.flatten() for p in model.body.parameters()])
        model.zero_grad()
        loss = (model(x)[0] - y[:, 0]).square().mean()
        with pytest.warns(UserWarning, match="2 parameters"):  # the head is not given
            balancer.backward([loss, 1.0 * loss, 1.0 * loss])
        found = torch.cat([p.grad.flatten() for p in model.body.parameters()])
        torch.testing.assert_close(found, more * factor * plain, rtol=1e-4, atol=1e-5)


def test_the_plain_sum_is_the_plain_sum_bit_for_bit():
    x, y = next(batches(1))
    mine, other = Body(), Body()
    quiet("uniform", mine).backward(mine.losses(x, y))
    torch.stack(list(other.losses(x, y).values())).sum().backward()
    assert np.array_equal(flat(mine.parameters()), flat(other.parameters()))
    mine.zero_grad()
    quiet("uniform", mine, reduction="mean").backward(mine.losses(x, y))
    np.testing.assert_allclose(3 * flat(mine.parameters()), flat(other.parameters()), rtol=1e-5, atol=1e-6)


def test_uncertainty_weighting_is_its_formula_and_frozen_it_is_uniform():
    x, y = next(batches(1))
    model, other = Body(), Body()
    balancer = quiet("uw", model)
    (s,) = balancer.parameters()
    with torch.no_grad():
        s.copy_(torch.tensor([0.5, -1.0, 2.0]))
    again = s.detach().clone().requires_grad_(True)
    balancer.backward(model.losses(x, y))
    losses = torch.stack(list(other.losses(x, y).values()))
    (torch.exp(-again) * losses + again / 2).sum().backward()
    np.testing.assert_allclose(flat(model.parameters()), flat(other.parameters()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.grad, again.grad)
    np.testing.assert_allclose(balancer.report.weights, np.exp([-0.5, 1.0, -2.0]), rtol=1e-6)
    model, other = Body(), Body()
    quiet("uw", model).backward(model.losses(x, y))
    quiet("uniform", other).backward(other.losses(x, y))
    np.testing.assert_allclose(flat(model.parameters()), flat(other.parameters()), rtol=1e-6)


def test_uncertainty_weighting_says_when_its_weights_are_not_trained():
    model = Body()
    with pytest.raises(ConfigError, match="tasks"):
        make("uw", model.parameters()).parameters()
    balancer = quiet("uw", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"balancer.parameters\(\)"):
        for x, y in batches(4):
            optimizer.zero_grad()
            balancer.backward(model.losses(x, y))
            optimizer.step()


def test_dwa_compares_the_means_of_the_last_two_epochs():
    w = nn.Parameter(torch.ones(3))
    balancer = make("dwa", [w], tasks=TASKS, temperature=1.5)
    epochs = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    for e, epoch in enumerate(epochs):
        if e < 2:
            expected = np.ones(3)
        else:
            ratio = (epochs[e - 1].mean(0) / epochs[e - 2].mean(0)).double().numpy() / 1.5
            expected = 3 * np.exp(ratio) / np.exp(ratio).sum()
        for values in epoch:
            w.grad = None
            balancer.backward(list((w * values).unbind()))
            np.testing.assert_allclose(balancer.report.weights, expected, rtol=1e-5)
            np.testing.assert_allclose(w.grad.numpy(), expected * values.numpy(), rtol=1e-5)
        balancer.end_epoch()


def test_dwa_with_constant_losses_is_uniform_and_a_task_without_labels_has_ratio_1():
    w = nn.Parameter(torch.ones(2))
    balancer = make("dwa", [w], tasks=2)
    for _ in range(4):
        for _ in range(3):
            balancer.backward((w * torch.tensor([2.0, 5.0])).unbind())
            assert balancer.report.weights.tolist() == [1.0, 1.0]
        balancer.end_epoch()
    for _ in range(2):
        balancer.backward([w[0] * 1.0, None])
        balancer.end_epoch()
    assert np.isfinite(balancer.weights).all() and balancer.weights.sum() == pytest.approx(2)


@pytest.mark.parametrize("initial", ["epoch", "first", "log2"])
def test_gradnorm_follows_its_loss_with_adam(initial):
    """Against autograd and PyTorch's Adam on the weights, on losses whose gradients are known."""
    w = nn.Parameter(torch.zeros(4))
    rng = np.random.default_rng(0)
    balancer = make("gradnorm", [w], tasks=3, initial=initial, alpha=1.5, learning_rate=0.05, shared=[w])
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.05)
    first = torch.full((3,), np.log(2)).double() if initial == "log2" else None
    rest = []
    for step in range(40):
        G, L = rng.normal(size=(3, 4)), rng.uniform(0.2, 2, 3)
        w.grad = None
        losses = [(w * torch.tensor(g)).sum() + loss for g, loss in zip(G, L, strict=True)]
        balancer.backward(losses)
        np.testing.assert_allclose(w.grad.numpy(), weights.detach().numpy() @ G, rtol=1e-4, atol=1e-5)
        loss = torch.tensor([float(x.detach()) for x in losses]).double()
        if initial == "epoch" and step < 10:
            rest.append(loss)
            if step == 9:
                balancer.end_epoch()
                first = torch.stack(rest).mean(0)
            continue
        first = loss if first is None else first
        n = torch.from_numpy(np.linalg.norm(G.astype(np.float32).astype(np.float64), axis=1))
        pace = (loss / first) / (loss / first).mean()
        target = ((weights * n).mean() * pace**1.5).detach()
        adam.zero_grad()
        (weights * n - target).abs().sum().backward()
        adam.step()
        with torch.no_grad():
            weights.clamp_(min=0.01)
            weights *= 3 / weights.sum()
        np.testing.assert_allclose(balancer.weights, weights.detach().numpy(), rtol=1e-5)
    assert abs(float(weights.detach()[0]) - 1) > 1e-3 and balancer.weights.sum() == pytest.approx(3)


@pytest.mark.parametrize("scale", ["l2", "loss", "loss+"])
def test_mgda_on_scaled_gradients(scale):
    from vouch.multitask.directions import mgda

    x, y = next(batches(1))
    model = Body()
    G = by_task(model, x, y, list(model.body.parameters()))
    L = np.array([float(loss.detach()) for loss in model.losses(x, y).values()])
    by = {"l2": np.linalg.norm(G, axis=1), "loss": L, "loss+": L * np.linalg.norm(G, axis=1)}[scale]
    balancer = quiet("mgda", model, scale=scale)
    balancer.backward(model.losses(x, y))
    scaled = G / by[:, None]
    np.testing.assert_allclose(balancer.report.weights, 3 * mgda(scaled @ scaled.T), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("slug", ALL)
def test_one_task_is_its_gradient_with_a_warning(slug):
    mine, other = Body(1), Body(1)
    x, y = next(batches(1))
    with pytest.warns(UserWarning, match="one task, 'click'"):
        balancer = make(slug, mine.named_parameters(), tasks=["click"])
    balancer.backward(mine.losses(x, y))
    other.losses(x, y)["click"].backward()
    assert np.array_equal(flat(mine.parameters()), flat(other.parameters()))


@pytest.mark.parametrize("slug", ALL)
def test_a_task_without_labels_takes_no_part(slug):
    """Left out or None: the step is that of the others, and its head has no gradient."""
    x, y = next(batches(1))
    models = [Body() for _ in range(2)]
    for model, absent in zip(models, ({}, {"like": None}), strict=True):
        balancer = quiet(slug, model)
        losses = {name: loss for name, loss in model.losses(x, y).items() if name != "like"}
        balancer.backward({**losses, **absent})
        assert balancer.report.tasks == ["click", "watch"]
        assert model.heads[1].weight.grad is None
    assert np.array_equal(flat(models[0].body.parameters()), flat(models[1].body.parameters()))
    balancer.backward({"click": None})  # nothing to do
    balancer.backward({name: loss for name, loss in models[1].losses(x, y).items() if name == "like"})
    assert balancer.report.tasks == ["like"]


@pytest.mark.parametrize("slug", BY_TASK)
def test_a_task_with_a_zero_gradient_changes_nothing_for_the_others(slug):
    """Its loss is at its minimum."""
    x, y = next(batches(1))
    model, other = Body(), Body()
    losses = model.losses(x, y)
    losses["watch"] = 0.0 * losses["watch"]
    quiet(slug, model).backward(losses)
    pair = {name: loss for name, loss in other.losses(x, y).items() if name != "watch"}
    quiet(slug, other).backward(pair)
    found, expected = flat(model.body.parameters()), flat(other.body.parameters())
    assert np.isfinite(found).all()
    if slug in ("mgda", "imtl-g"):  # T times a mean
        expected = expected * 3 / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("slug", ALL)
def test_what_is_not_a_number_is_named(slug):
    model = Body()
    x, y = next(batches(1))
    balancer = quiet(slug, model)
    for bad in (float("nan"), float("inf")):
        losses = model.losses(x, y)
        losses["like"] = losses["like"] * bad
        with pytest.raises(TrainingError, match="loss of 'like'"):
            balancer.backward(losses)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("slug", BY_TASK)
@pytest.mark.parametrize("place", ["body", "head"])
def test_a_gradient_that_is_not_a_number_is_named_and_nothing_is_set(slug, place):
    """The square root at 0 has a finite value and an infinite slope."""
    for together in (False, True):
        model = Body(together=together)
        x, y = next(batches(1))
        balancer = quiet(slug, model)
        weight = model.body[0].weight if place == "body" else model.heads[1].weight
        losses = model.losses(x, y)
        losses["like"] = losses["like"] + (weight - weight.detach()).square().sum().sqrt()
        with pytest.raises(TrainingError, match=r"gradient.* of 'like'"):
            balancer.backward(losses)
        assert all(p.grad is None for p in model.parameters())


def test_gradients_add_up_and_the_graph_is_freed():
    for slug in ALL:
        model = Body()
        x, y = next(batches(1))
        balancer = quiet(slug, model)
        losses = model.losses(x, y)
        balancer.backward(losses)
        once = flat(model.parameters())
        model.zero_grad()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            next(iter(losses.values())).backward()
        if slug in ("pcgrad", "gradvac"):
            continue  # they go on in another order
        model.zero_grad()
        for _ in range(2):
            balancer.backward(model.losses(x, y))
        np.testing.assert_allclose(flat(model.parameters()), 2 * once, rtol=1e-4, atol=1e-5)


def test_parameters_do_not_share_the_memory_of_their_gradients():
    """Autograd gives both terms of a sum the same tensor."""
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    balancer = make("pcgrad", [a, b, c], tasks=2)
    balancer.backward([(c * (a + b)).sum(), (2 * c).sum()])
    assert len({p.grad.data_ptr() for p in (a, b, c)}) == 3
    a.grad.mul_(5)
    assert b.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("slug", BY_TASK)
def test_sparse_gradients_of_embeddings_stay_sparse(slug):
    """Only touched rows are kept, whether tasks look up the same rows or others; the result is that of dense ones."""
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table, heads = nn.Embedding(50, 4, sparse=sparse), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        balancer = make(slug, [*table.named_parameters(), *heads.named_parameters()], tasks=3)
        for same in (True, False, True):
            rows = torch.randint(0, 40, (3, 12))
            balancer.backward([h(table(rows[0 if same else k])).square().mean() for k, h in enumerate(heads)])
        assert table.weight.grad.is_sparse == sparse
        grads.append(table.weight.grad.to_dense())
        assert len(balancer.report.gram) == 3
    torch.testing.assert_close(grads[0], grads[1])


def test_a_table_used_by_sparse_and_dense_operations():
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, sparse=True)
    balancer = make("gradcraft", table.named_parameters(), tasks=2, tau=0)
    rows = torch.tensor([1, 1, 3])
    losses = [table(rows).square().sum(), (table.weight @ torch.ones(4)).square().sum()]
    balancer.backward(losses)
    again = table.weight.detach().clone().requires_grad_(True)
    (again[rows].square().sum() + (again @ torch.ones(4)).square().sum()).backward()
    if not balancer.report.conflicts.any():
        torch.testing.assert_close(table.weight.grad, again.grad)


class Tables(nn.Module):
    """Three tasks over a large table that is looked up in one way or another."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.table = nn.Embedding(
            90, 4, padding_idx=2 if how == "padding" else None, scale_grad_by_freq=how == "frequency"
        )
        self.body, self.heads = nn.Linear(12, 5), nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        if how == "hook":
            self.table.weight.register_hook(lambda g: 2 * g)

    def losses(self, rows):
        if self.how == "checkpoint":
            e = torch.utils.checkpoint.checkpoint(lambda r: 1.0 * self.table(r), rows, use_reentrant=False)
        else:
            e = self.table(rows)
        if self.how == "twice":
            e = e + nn.functional.embedding(rows.flip(0), self.table.weight, padding_idx=0)
        if self.how == "tied":
            e = e + (e.flatten(1) @ self.table.weight[:12]).mean()
        h = torch.tanh(self.body(e.flatten(1)))
        found = [(10.0**k) * (head(h) - k).square().mean() for k, head in enumerate(self.heads)]
        if self.how == "one task":
            h = torch.tanh(self.body(torch.ones(1, 12)))
            found = [(head(h) - k).square().mean() for k, head in enumerate(self.heads)]
            found[1] = found[1] + e.square().mean()
        return found


@pytest.mark.parametrize("how", ["plain", "padding", "twice", "tied", "frequency", "hook", "checkpoint", "one task"])
@pytest.mark.parametrize("slug", ["gradcraft", "pcgrad", "mgda"])
def test_only_the_rows_of_a_large_table_that_a_step_looks_up_are_compared(slug, how, monkeypatch):
    """Against whole gradients by plain backward passes; rows come once, often, as padding, or all in one."""
    import vouch.multitask.bytask as module

    seen = []
    inner = module.gram
    monkeypatch.setattr(module, "gram", lambda rows, *room: (seen.append([g.shape for g in rows[0]]), inner(rows))[1])
    model = Tables(how)
    balancer = make(slug, model.named_parameters(), tasks=3)
    shared = list(model.body.parameters()) + ([] if how == "one task" else [model.table.weight])
    for rows in (torch.randint(0, 9, (5, 3)), torch.full((4, 3), 2), torch.randint(0, 90, (40, 3))):
        G = []
        for k in range(3):
            model.zero_grad()
            model.losses(rows)[k].backward()
            G.append(flat(shared))
        model.zero_grad()
        model.table.weight.grad = torch.ones(90, 4) if len(rows) == 4 else None
        balancer.backward(model.losses(rows))
        before = np.ones(360) if len(rows) == 4 else 0.0
        expected = (balancer.report.coefficients @ np.stack(G)).sum(0)
        np.testing.assert_allclose(balancer.report.gram, np.stack(G) @ np.stack(G).T, rtol=1e-4, atol=1e-6)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * np.abs(expected).max()}
        np.testing.assert_allclose(flat(model.body.parameters()), expected[: 12 * 5 + 5], **tolerance)
        found = flat([model.table.weight])
        if how == "one task":
            again = Tables(how)
            again.losses(rows)[1].backward()
            np.testing.assert_allclose(found - before, flat([again.table.weight]), rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(found - before, expected[12 * 5 + 5 :], **tolerance)
    whole = how in ("tied", "frequency", "hook")
    assert any((90, 4) in shapes for shapes in seen[:3]) == whole  # the last batch has too many rows to spare any
    assert how == "one task" or any((90, 4) in shapes for shapes in seen[3:])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 5, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0][:, -1]


NETWORKS = {
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    ),
    "recurrent": lambda: nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Linear(1, 3), Recurrent()),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(8, 5)
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("slug", ["gradcraft", "cagrad", "uw"])
def test_any_network(network, slug):
    """With a part frozen, a part that no loss reaches, a parameter given twice, and in half precision."""
    torch.manual_seed(0)
    body, heads, idle = NETWORKS[network](), nn.ModuleList(nn.Linear(5, 1) for _ in range(3)), nn.Linear(2, 2)
    frozen = heads[0].bias.requires_grad_(False)
    every = [*body.parameters(), *heads.parameters(), *idle.parameters(), *body.parameters()]
    balancer = make(slug, every, tasks=3)
    optimizer = torch.optim.Adam([*body.parameters(), *heads.parameters(), *balancer.parameters()], lr=0.01)
    x = torch.randn(64, 8)
    y = torch.stack([x[:, 0], -x[:, 0], 5 * x[:, 1]])
    found = []
    for step in range(120):
        with torch.autocast("cpu", enabled=step % 2 == 0):
            h = body(x)
            losses = [(head(h)[:, 0].float() - target).square().mean() for head, target in zip(heads, y, strict=True)]
        optimizer.zero_grad()
        balancer.backward(losses)
        optimizer.step()
        found.append([float(loss.detach()) for loss in losses])
    assert frozen.grad is None and idle.weight.grad is None
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in body.parameters())
    assert all(last < 0.9 * first for first, last in zip(found[0], found[-1], strict=True)), (found[0], found[-1])


def test_what_is_shared_can_be_said():
    x, y = next(batches(1))
    model = Body()
    balancer = quiet("gradcraft", model, shared=model.body.parameters())
    balancer.backward(model.losses(x, y))
    expected = flat(model.parameters())
    model.zero_grad()
    quiet("gradcraft", model).backward(model.losses(x, y))
    np.testing.assert_allclose(flat(model.parameters()), expected, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"body\.0\.weight is reached by click, like, watch"):
        quiet("gradcraft", model, shared=model.body[2].parameters()).backward(model.losses(x, y))
    with pytest.raises(ConfigError, match="2 of the shared"):
        make("gradcraft", model.heads.parameters(), shared=model.body[0].parameters())


def test_measure_looks_without_a_step():
    x, y = next(batches(1))
    model = Body()
    balancer = quiet("uniform", model)
    losses = model.losses(x, y)
    report = balancer.measure(losses)
    G = by_task(model, x, y, list(model.body.parameters()))
    np.testing.assert_allclose(report.gram, G @ G.T, rtol=1e-4, atol=1e-6)
    balancer.backward(losses)  # the graph is still there
    with pytest.raises(ConfigError, match="losses only"):
        _ = balancer.report.cosines
    again = quiet("gradcraft", model)
    again.backward(model.losses(x, y))
    assert again.report.conflict_share == report.conflict_share > 0


@pytest.mark.parametrize("slug", ALL)
def test_a_run_goes_on_from_its_state(slug):
    """Through JSON, bit for bit."""

    def go(model, balancer, optimizer, part):
        for e, (x, y) in enumerate(part):
            optimizer.zero_grad()
            balancer.backward(model.losses(x, y))
            optimizer.step()
            if e % 3 == 2:
                balancer.end_epoch()

    data = list(batches(18))
    whole = Body()
    balancer = quiet(slug, whole)
    go(whole, balancer, torch.optim.SGD([*whole.parameters(), *balancer.parameters()], lr=1e-3), data)
    half = Body()
    balancer = quiet(slug, half)
    go(half, balancer, torch.optim.SGD([*half.parameters(), *balancer.parameters()], lr=1e-3), data[:9])
    state = json.loads(json.dumps(balancer.state_dict()))
    on = make(slug, half.named_parameters())
    on.load_state_dict(state)
    go(half, on, torch.optim.SGD([*half.parameters(), *on.parameters()], lr=1e-3), data[9:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    with pytest.raises(ConfigError, match="another balancer"):
        make("dwa" if slug == "uniform" else "uniform", half.parameters()).load_state_dict(state)
    with pytest.raises(ConfigError, match="tasks"):
        make(slug, half.parameters(), tasks=["a", "b"]).load_state_dict(state)


def test_inside_fit():
    class Data:
        def __len__(self):
            return 10

        def epoch(self, generator, rank, world):
            return batches(10)

    model = Body()
    balancer = quiet("gradcraft", model)
    report = fit(model, Data(), config=TrainConfig(epochs=8, learning_rate=0.02), step=balancer.step)
    assert report.history[-1]["loss"] < 0.5 * report.history[0]["loss"]
    assert set(TASKS) < set(report.history[0])


def test_copies_go_on_alone_and_carry_no_room_to_work_in():
    """What a step works in, up to 4 MB, is made again; so it is where the model has moved to another device."""
    (x, y), (more, labels) = batches(2)
    for slug in ALL:
        model = Body()
        balancer = quiet(slug, model)
        balancer.backward(model.losses(x, y))
        text = pickle.dumps((model, balancer))
        assert len(text) < 20_000
        found = []
        for mine, other in (copy.deepcopy((model, balancer)), pickle.loads(text), (model, balancer)):  # noqa: S301
            mine.zero_grad()
            other.backward(mine.losses(more, labels))
            found.append(flat(mine.parameters()))
        assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[2]), slug
        if slug in BY_TASK:
            balancer.room = torch.empty(8, device="meta", dtype=torch.float64)
            model.zero_grad()
            balancer.backward(model.losses(x, y))
            assert balancer.room.device.type == "cpu"


@pytest.mark.parametrize("slug", ["uniform", "uw", "dwa", "gradcraft"])
def test_losses_of_several_kinds_and_in_another_order(slug):
    """Single, double and half precision at once; by name, order does not matter."""
    x, y = next(batches(1))
    found = []
    for order in (TASKS, TASKS[::-1]):
        model = Body()
        balancer = quiet(slug, model)
        if slug == "uw":
            balancer.log_variances.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
        if slug == "dwa":
            balancer.weights = np.array([0.5, 1.0, 1.5])
        losses = model.losses(x, y)
        losses["click"], losses["like"] = losses["click"].double(), losses["like"].bfloat16()
        balancer.backward({task: losses[task] for task in order})
        assert balancer.report.tasks == list(order) and all(p.grad.dtype == torch.float32 for p in model.parameters())
        learned = balancer.sums if slug == "dwa" else flat(balancer.parameters()) if slug == "uw" else []
        found.append(np.append(flat(model.parameters()), learned))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5 * np.abs(found[0]).max())


def test_a_step_of_fit_without_labels_and_in_several_processes():
    class Fabric:
        world_size = 1

        def autocast(self):
            return contextlib.nullcontext()

    class Unlabelled(Body):
        def loss(self, batch):
            return {"click": None, "like": None, "watch": None}

    model = Unlabelled()
    before = [p.detach().clone() for p in model.parameters()]
    balancer, fabric = quiet("gradcraft", model), Fabric()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert float(balancer.step(model, None, optimizer, fabric)["loss"]) == 0
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    fabric.world_size = 2
    with pytest.raises(ConfigError, match="processes"):
        balancer.step(model, None, optimizer, fabric)


def test_mistakes():
    model = Body()
    x, y = next(batches(1))
    with pytest.raises(UnknownIdError, match="gradcraf"):
        make("gradcraf", model.parameters())
    with pytest.raises(ConfigError, match="no parameters"):
        make("uniform", [])
    with pytest.raises(ConfigError, match="tasks"):
        make("uniform", model.parameters(), tasks=["a", "a"])
    with pytest.raises(ConfigError, match="taau"):
        make("gradcraft", model.parameters(), taau=1)
    balancer = quiet("pcgrad", model)
    losses = model.losses(x, y)
    with pytest.raises(ConfigError, match="no task 'share'"):
        balancer.backward({"share": losses["click"]})
    with pytest.raises(ConfigError, match="2 losses for 3 tasks"):
        balancer.backward([losses["click"], losses["like"]])
    with pytest.raises(ConfigError, match=r"'click' has the shape \(16,\)"):
        balancer.backward({"click": model(x)[0]})
    with pytest.raises(ConfigError, match="depends on a parameter"):
        balancer.backward({"click": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match=r"'click' is 1\.0"):
        balancer.backward({"click": 1.0})
    with pytest.raises(ConfigError, match="the text 'click'"):
        make("uniform", model.parameters(), tasks="click")
    with pytest.raises(ConfigError, match="no losses"):
        make("uniform", model.parameters()).backward([])
    with pytest.raises(TrainingError, match="loss of 'click'"):
        quiet("mgda", model, scale="loss").backward({name: -loss for name, loss in losses.items()})


def test_balancers_that_compare_epochs_say_when_none_ends(monkeypatch):
    import vouch.multitask.balancers as module

    monkeypatch.setattr(module, "LONG", 3)
    w = nn.Parameter(torch.ones(2))
    for slug in ("dwa", "gradnorm"):
        balancer = make(slug, [w], tasks=2)
        with pytest.warns(UserWarning, match="end_epoch"):
            for _ in range(3):
                balancer.backward([w.sum(), (2 * w).sum()])
        balancer = make(slug, [w], tasks=2)
        balancer.end_epoch()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                balancer.backward([w.sum(), (2 * w).sum()])


@pytest.mark.parametrize("slug", ["gradcraft", "pcgrad", "cagrad"])
def test_directions_for_adatask(slug):
    """The tasks' gradients, each changed on its own, as AdaTask takes them; weights where a method only weighs."""
    from vouch.multitask.adatask import AdaTaskAdam

    model = Body(2)
    balancer = make(slug, model.parameters(), tasks=2)
    optimizer = AdaTaskAdam(model.parameters(), TASKS[:2], lr=0.01)
    first = None
    for x, y in batches(100):
        losses = model.losses(x, y)
        optimizer.step(losses, transform=balancer.transform)
        last = float(sum(losses.values()).detach())
        first = first or last
    assert last < first
    with pytest.raises(ConfigError, match="gradnorm needs the losses"):
        make("gradnorm", model.parameters(), tasks=2).transform([[torch.ones(1)], [torch.ones(1)]])
