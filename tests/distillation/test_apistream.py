"""Learning from a stream of services: every formula by hand, every count, resuming to the bit, and that it learns."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.data.images import drawn
from vouch.distillation.apis import Api, ApiError, Ledger, network_service
from vouch.distillation.apistream import APIStream, APIStreamConfig, StreamReport
from vouch.distillation.generators import (
    around,
    centred,
    conv_generator,
    gap,
    imbalance,
    likeness,
    mlp_generator,
    unit_directions,
    zeroth_order,
)
from vouch.distillation.memory import GrowingHead, Reservoir
from vouch.distillation.similarity import compared_layers, dissimilarity, linear_cka
from vouch.distillation.streamtask import Task
from vouch.errors import ConfigError, StorageError, TrainingError, UnknownIdError
from vouch.training import Run

SHAPE = (1, 4, 4)
SMALL: dict[str, Any] = {
    "latent": 4,
    "generator_width": 8,
    "iterations": 4,
    "model_steps": 2,
    "batch_size": 8,
    "directions": 2,
    "memory": 12,
    "replay": 5,
}
CPU = Run(device="cpu")


class Network:
    """A fixed torch classifier behind a NumPy function that counts the rows that reach it and fails where told to."""

    def __init__(self, seed: int, classes: int = 2, fail_at: tuple[int, ...] = (), error: type = OSError) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, classes))
        self.answer, self.rows, self.calls, self.fail_at, self.error = network_service(self.net), 0, 0, fail_at, error

    def __call__(self, x: np.ndarray) -> Any:
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        if self.calls in self.fail_at:
            raise self.error("down")
        return self.answer(x)


def api(k: int, service: Any = None, **settings: Any) -> Api:
    names = settings.pop("classes", (f"{k}a", f"{k}b"))
    return Api(service or Network(k), names, SHAPE, f"api {k}", **{"backoff": 0.0, **settings})


def features(norm: bool = False) -> nn.Module:
    torch.manual_seed(9)
    middle = (nn.BatchNorm1d(12),) if norm else ()
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), *middle, nn.ReLU(), nn.Linear(12, 6), nn.Tanh())


def stream(**settings: Any) -> APIStream:
    norm = settings.pop("norm", False)
    made = {name: settings.pop(name) for name in ("mapping", "make_generator") if name in settings}
    return APIStream(features(norm), SHAPE, **made, **{**SMALL, **settings})


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- formulas


def test_centred_log_probabilities_are_centred_logits() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3
    for shifted in (logits, logits + 11.0):
        assert torch.allclose(centred(shifted.softmax(1).log()), centred(logits), atol=1e-5)


def test_gap_by_hand() -> None:
    logits, p = torch.tensor([[1.0, 2.0, -0.5]]), torch.tensor([[0.7, 0.2, 0.1]])
    own = [math.exp(v) / sum(math.exp(u) for u in (1.0, 2.0, -0.5)) for v in (1.0, 2.0, -0.5)]
    logs = ([math.log(v) for v in own], [math.log(v) for v in (0.7, 0.2, 0.1)])
    r = [[v - sum(row) / 3 for v in row] for row in logs]
    l1 = sum(abs(a - b) for a, b in zip(*r, strict=True)) / 3
    kl = sum(t * (math.log(t) - math.log(f)) for t, f in zip((0.7, 0.2, 0.1), own, strict=True))
    assert gap(logits, p).item() == pytest.approx(l1, abs=1e-6)
    assert gap(logits, p, "kl").item() == pytest.approx(kl, abs=1e-6)
    assert gap(logits + 5, p).item() == pytest.approx(l1, abs=1e-6)
    assert gap(p.log() - 3, p).item() == pytest.approx(0, abs=1e-6)


def test_terms_of_the_generators_by_hand() -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    mean = logits.softmax(1).mean(0).tolist()
    assert imbalance(logits).item() == pytest.approx(sum(p * math.log(p) for p in mean), abs=1e-6)
    assert imbalance(torch.zeros(4, 3)).item() == pytest.approx(-math.log(3), abs=1e-6)
    assert imbalance(torch.tensor([[900.0, 0, 0]])).item() == 0
    a, b = torch.randn(2, 4), torch.randn(3, 4)
    pairs = [F.cosine_similarity(x, y, dim=0).item() for x in a for y in b]
    assert likeness(a, b).item() == pytest.approx(sum(pairs) / 6, abs=1e-6)


def test_zeroth_order_is_unbiased_for_a_linear_function() -> None:
    torch.manual_seed(2)
    g, u, eps = torch.randn(1, 2, 3), torch.randn(1, 1, 2, 3), 0.1
    v = unit_directions(10_000, u)
    assert torch.allclose(v.flatten(2).norm(dim=2), torch.ones(10_000, 1), atol=1e-5)
    values = (around(u, v, eps) * g).flatten(2).sum(2)
    found = zeroth_order(values, v, eps)[0]
    assert (found - g).norm() < 0.05 * g.norm()
    few = zeroth_order(values[:2], v[:1], eps)[0]  # d / m times slope times direction
    assert torch.allclose(few, 6 * (v[0, 0] * g).sum() * v[0, 0], atol=1e-3)


def test_zeroth_order_with_orthonormal_directions_is_exact() -> None:
    torch.manual_seed(3)
    u, g = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    v = basis[:, None].expand(5, 4, 5)
    values = (around(u, v, 0.3) @ g).squeeze(-1)
    assert torch.allclose(zeroth_order(values, v, 0.3), g.expand(4, 5), atol=1e-10)


def test_zeroth_order_against_the_true_gradient_of_a_service() -> None:
    """In expectation, for each row by itself; and at an eps that float32 cannot resolve it is noise."""
    torch.manual_seed(4)
    net, own = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 3)
    u = torch.randn(2, 6, requires_grad=True)

    def disagreement(x: Tensor) -> Tensor:
        return gap(own.expand(*x.shape[:-1], 3), net(x.tanh()).softmax(-1), "kl")

    (true,) = torch.autograd.grad(disagreement(u).sum(), u)
    errors = {}
    for eps in (1e-2, 1e-8):
        with torch.no_grad():
            v = unit_directions(20_000, u)
            found = zeroth_order(disagreement(around(u, v, eps)), v, eps)
        errors[eps] = ((found - true).norm(dim=1) / true.norm(dim=1)).max().item()
    assert errors[1e-2] < 0.05 and errors[1e-8] > 0.2


def brute_cka(a: Tensor, b: Tensor) -> float:
    n = len(a)
    h = torch.eye(n, dtype=a.dtype) - 1 / n
    k, m = h @ a @ a.T @ h, h @ b @ b.T @ h
    return float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())


@pytest.mark.parametrize(("n", "p", "q"), [(20, 3, 5), (6, 9, 4)])
def test_cka(n: int, p: int, q: int) -> None:
    random = torch.Generator().manual_seed(5)
    a, b = (torch.randn(n, w, generator=random, dtype=torch.float64) for w in (p, q))
    found = linear_cka(a, b).item()
    assert found == pytest.approx(brute_cka(a, b), abs=1e-10) and 0 <= found <= 1
    assert linear_cka(a, a).item() == pytest.approx(1, abs=1e-12)
    turn = torch.linalg.qr(torch.randn(p, p, generator=random, dtype=torch.float64))[0]
    assert linear_cka(7.5 * a @ turn + 3, b).item() == pytest.approx(found, abs=1e-10)
    assert linear_cka(torch.ones_like(a), b).item() == 0


def test_similarity_is_whole_and_flat_at_the_network_before() -> None:
    new = features(norm=True).train()
    old, x = copy.deepcopy(new).eval(), torch.randn(30, *SHAPE)
    layers = compared_layers(new)
    assert layers == ["1", "4", ""]  # weight matrices, and the features
    loss = dissimilarity(new.eval(), old, layers, x)
    slopes = torch.autograd.grad(loss, list(new.parameters()))
    assert loss.item() == pytest.approx(0, abs=1e-6) and max(s.abs().max().item() for s in slopes) < 1e-5
    with torch.no_grad():
        new[1].weight.add_(torch.randn_like(new[1].weight))
    moved = dissimilarity(new, old, layers, x)
    outs = [[net[:1](x).flatten(1) @ net[1].weight.T, net[:5](x), net(x)] for net in (new, old)]
    by_hand = sum(1 - brute_cka(a.detach(), b.detach()) for a, b in zip(*outs, strict=True)) / 3
    assert moved.item() == pytest.approx(by_hand, abs=1e-5) and by_hand > 0.01
    with pytest.raises(ConfigError, match="no layer 'x'"):
        compared_layers(new, ["x"])


# ---- the steps


class Caught(Exception):
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


def catch(monkeypatch: pytest.MonkeyPatch) -> None:
    def descend(self: Task, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        raise Caught(loss)

    monkeypatch.setattr(Task, "_descend", descend)


def midway(**settings: Any) -> tuple[APIStream, Api, Network]:
    """A stream that has learned one API and begun a second."""
    made, service = stream(**settings), Network(1)
    made.learn(api(0), run=CPU)
    second = api(1, service)
    made.task = Task.begin(made, second, list(second.classes), None)
    return made, second, service


@pytest.mark.parametrize("own_gradient", ["exact", "estimated"])
@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_the_generators_gradient_by_hand(monkeypatch: pytest.MonkeyPatch, own_gradient: str, kind: str) -> None:
    """The zeroth-order estimate, as the gradient that arrives at the outputs before the tanh, and the other terms."""
    made, second, service = midway(own_gradient=own_gradient, gap=kind, eps=0.5, balance=0.7, cooperation=0.3)
    task = made.task
    assert task is not None
    catch(monkeypatch)
    torch.manual_seed(5)
    with pytest.raises(Caught) as caught:
        task.generator_step(second)
    parameters = list(task.generators.parameters())
    found = torch.autograd.grad(caught.value.loss, parameters)

    torch.manual_seed(5)
    parts = [generator(torch.randn(4, 4)) for generator in task.generators]
    u = torch.cat(parts)
    v, columns = unit_directions(2, u), [2, 3]

    def own(x: Tensor) -> Tensor:
        return made.head(made.features(x))[:, columns]

    def value(x: Tensor, logits: Tensor) -> Tensor:
        p = service.net(x).softmax(1)
        if kind == "l1":
            return (centred(logits) - centred(p.log())).abs().mean(1)
        return (p * (p.log() - logits.log_softmax(1))).sum(1)

    with torch.no_grad():
        upstream = torch.zeros_like(u)
        here = own(u.tanh())
        for row in v:
            x = (u + 0.5 * row).tanh()
            logits = own(x) if own_gradient == "estimated" else here
            slope = (value(x, logits) - value(u.tanh(), here)) / 0.5
            upstream += 16 / 2 * slope.view(-1, 1, 1, 1) * row
        answers = service.net(u.tanh()).softmax(1)
    means = own(u.tanh()).softmax(1).mean(0)
    loss = 0.7 * (means * means.log()).sum()
    a, b = (made.features(part.tanh()) for part in parts)
    loss = loss + 0.3 * F.cosine_similarity(a[:, None], b[None], dim=2).mean()
    if own_gradient == "exact":  # two generators with 4 pictures each
        exact = (
            (centred(own(u.tanh())) - centred(answers.log())).abs().mean(1)
            if kind == "l1"
            else (answers * (answers.log() - own(u.tanh()).log_softmax(1))).sum(1)
        )
        loss = loss - exact.sum() / 4
    by_hand = torch.autograd.grad([loss, u], parameters, [torch.ones(()), -upstream / 4])
    for one, other in zip(found, by_hand, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_the_own_networks_loss_by_hand(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    made, second, service = midway(similarity=0.4, gap=kind)
    task = made.task
    assert task is not None and task.old is not None
    with torch.no_grad():
        made.features[1].weight.mul_(torch.linspace(0.1, 2, 16))  # away from the network before
    catch(monkeypatch)
    torch.manual_seed(6)
    with pytest.raises(Caught) as caught:
        task.model_step(second, 0.0)
    torch.manual_seed(6)
    with torch.no_grad():
        x = torch.cat([generator(torch.randn(4, 4)) for generator in task.generators]).tanh()
        inputs, answers = made.memory[0]
        chosen = torch.randint(len(inputs), (5,))
        new = gap(made.head(made.features(x))[:, 2:], service.net(x).softmax(1), kind).mean()
        old = gap(made.head(made.features(inputs[chosen]))[:, :2], answers[chosen], kind).mean()
        unlike = dissimilarity(made.features, task.old, made.layers, inputs[chosen])
    assert unlike > 1e-4
    assert caught.value.loss.item() == pytest.approx((new + old + 0.4 * unlike).item(), rel=1e-5)


def test_the_own_learning_rate_falls_at_its_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[int, float]] = []
    descend = Task._descend

    def watched(self: Task, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is self.own_optimizer:
            rates.append((self.step, optimizer.param_groups[0]["lr"]))
        descend(self, loss, optimizer)

    monkeypatch.setattr(Task, "_descend", watched)
    stream(decay_at=(0.3, 0.6), learning_rate=0.01).learn(api(0), run=CPU)
    steps = [1, 2, 4, 5, 7, 8, 10, 11]  # of 12; the others are the generators'
    assert rates == [(s, pytest.approx(0.01 * 0.3 ** ((s >= 3.6) + (s >= 7.2)))) for s in steps]


# ---- counts and budgets


def test_queries_of_a_round_and_the_ledger() -> None:
    services = [Network(0), Network(1)]
    made = stream()
    report = made.learn([api(k, s, cost=0.01) for k, s in enumerate(services)], run=CPU)
    assert [made.ledger.queries(f"api {k}") for k in (0, 1)] == [s.rows for s in services]
    assert services[1].rows == made.round_cost(None) * 4 == 4 * (8 * 3 + 2 * 8)
    assert {(r["phase"], r["queries"]) for r in report.ledger} == {("generators", 96), ("model", 64)}
    assert made.ledger.cost == pytest.approx(3.2)
    assert report.stopped == ["finished"] * 2 and len(report.history) == 8


@pytest.mark.parametrize("budget", [40, 57, 63, 103, 159])
@pytest.mark.parametrize("norm", [False, True])
def test_a_budget_is_spent_to_the_last_row_and_no_further(budget: int, norm: bool) -> None:
    service = Network(0, fail_at=(3,) if budget > 40 else ())
    report = stream(norm=norm, iterations=50).learn(api(0, service, budget=budget), run=CPU)
    assert service.rows == budget == sum(row["queries"] for row in report.ledger)
    assert report.stopped == ["budget"]


def test_a_budget_below_one_round_costs_nothing() -> None:
    services = [Network(0), Network(1)]
    with pytest.raises(ConfigError, match="39 rows left; one round takes 40"):
        stream().learn([api(0, services[0]), api(1, services[1], budget=39)], run=CPU)
    assert services[0].rows == 0


def test_a_service_is_only_asked_and_never_changed() -> None:
    service = Network(0)
    before = copy.deepcopy(service.net.state_dict())
    stream().learn(api(0, service), run=CPU)
    assert all(torch.equal(before[name], value) for name, value in service.net.state_dict().items())
    assert all(parameter.grad is None for parameter in service.net.parameters())


def test_memories_ask_nothing_and_stay_as_they_are() -> None:
    first, made = Network(0), stream()
    made.learn(api(0, first), run=CPU)
    rows, (inputs, answers) = first.rows, (made.memory[0][0].clone(), made.memory[0][1].clone())
    assert len(inputs) == 12
    assert torch.allclose(first.net(inputs).softmax(1), answers, atol=1e-6)
    made.learn([api(0, first), api(1)], run=CPU)  # the first is passed over
    assert first.rows == rows and made.apis == ["api 0", "api 1"]
    assert torch.equal(made.memory[0][0], inputs) and torch.equal(made.memory[0][1], answers)


# ---- what must come out the same


def test_one_api_is_plain_distillation_and_seeds_decide() -> None:
    runs = {
        name: (made := stream(**settings), made.learn(api(0), run=Run(seed=seed, device="cpu")))[0]
        for name, seed, settings in (
            ("a", 0, {}),
            ("again", 0, {}),
            ("other seed", 1, {}),
            ("no memory", 0, {"memory": 0, "similarity": 0.0}),
        )
    }
    assert same(runs["a"], runs["again"]) and runs["a"].ledger.rows == runs["again"].ledger.rows
    assert torch.equal(runs["a"].memory[0][0], runs["again"].memory[0][0])
    assert same(runs["a"], runs["no memory"]) and not same(runs["a"], runs["other seed"])


def test_without_memory_nothing_of_the_past_counts() -> None:
    """M = 0: similarity has nothing to be measured on. lambda = 0 and an emptied memory: the same."""
    ends = []
    for settings, emptied in (({"memory": 0}, False), ({"memory": 0, "similarity": 0.0}, False), ({}, True)):
        made = stream(**settings)
        made.learn(api(0), run=CPU)
        if emptied:
            made.memory = [(inputs[:0], answers[:0]) for inputs, answers in made.memory]
        made.learn(api(1), run=CPU)
        ends.append(made)
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])
    full = stream()
    full.learn([api(0), api(1)], run=CPU)
    assert not same(full, ends[0])


RAW = {"api 1": torch.rand(10, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"optimizer": "sgd", "weight_decay": 1e-3, "decay_at": (0.3, 0.6), "head": "per_api"},
    "norm": {"norm": True, "save_every": 1},
    "noise": {"queries": "noise"},
}


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name in VARIANTS for call in (1, 2, 6, 9, 13) if name != "noise" or call < 10]
)
def test_going_on_after_a_failure_equals_never_failing(tmp_path: Path, name: str, call: int) -> None:
    """In a new process, at a raw input, in either kind of step; memory, log, accuracy and weights to the bit."""
    tests = {"api 0": (torch.randn(20, *SHAPE).tanh(), torch.arange(20) % 2)}
    whole = stream(**VARIANTS[name])
    expected = whole.learn([api(0), api(1)], raw=RAW, tests=tests, run=Run(path=tmp_path / "whole", device="cpu"))
    made, service = stream(**VARIANTS[name]), Network(1, fail_at=(call,))
    apis = [api(0), api(1, service, attempts=1)]
    with pytest.raises(ApiError, match="api 1"):
        made.learn(apis, raw=RAW, tests=tests, run=Run(path=tmp_path / "cut", device="cpu"))
    with pytest.raises(ConfigError, match="before"):
        stream(**VARIANTS[name]).learn(apis, raw=RAW, run=Run(path=tmp_path / "cut", device="cpu"))
    other = stream(**VARIANTS[name])
    again = Run(path=tmp_path / "cut", resume=True, device="cpu")
    report = other.learn(apis, raw=RAW, tests=tests, run=again)
    assert same(whole, other) and (report.task, report.classes) == (expected.task, expected.classes)
    for (a, b), (c, d) in zip(whole.memory, other.memory, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]
    failed = sum(row["failed"] for row in report.ledger)
    assert failed > 0 and other.ledger.queries() == whole.ledger.queries() + failed
    assert other.ledger.queries("api 1") == service.rows
    done = other.learn(apis, raw=RAW, tests=tests, run=again)
    assert done.task == report.task and other.ledger.queries("api 1") == service.rows


def test_a_killed_run_repeats_what_it_did_not_save_and_counts_it(tmp_path: Path) -> None:
    whole = stream()
    whole.learn([api(0), api(1)], run=CPU)
    service = Network(1, fail_at=(8,), error=KeyboardInterrupt)
    apis = [api(0), api(1, service)]
    with pytest.raises(KeyboardInterrupt):
        stream(save_every=1).learn(apis, run=Run(path=tmp_path, device="cpu"))
    other = stream(save_every=1)
    other.learn(apis, run=Run(path=tmp_path, resume=True, device="cpu"))
    assert same(whole, other)
    assert Ledger(tmp_path / "ledger.jsonl").queries("api 1") == service.rows > whole.ledger.queries("api 1")


def test_the_budget_holds_over_failures_and_resumed_runs(tmp_path: Path) -> None:
    service = Network(0, fail_at=(2, 3, 7, 8, 9, 13))
    one = api(0, service, budget=200, attempts=1)
    for _ in range(20):
        made = stream(iterations=50)
        try:
            made.learn(one, run=Run(path=tmp_path, resume=True, device="cpu"))
            break
        except ApiError:
            continue
    assert made.stopped == ["budget"] and service.rows == 200 == made.ledger.queries()


def test_the_budget_holds_over_saved_streams(tmp_path: Path) -> None:
    """Also without a run's folder, in the same object or another, and into a folder later."""
    service = Network(0, fail_at=(4,))
    one = api(0, service, budget=100, attempts=1)
    made = stream(iterations=50)
    with pytest.raises(ApiError):
        made.learn(one, run=CPU)
    with pytest.raises(ConfigError, match="left unfinished"):
        made.learn(one, run=CPU)
    made.save(tmp_path / "saved")
    other = stream(iterations=50)
    other.load(tmp_path / "saved")
    assert other.ledger.rows == made.ledger.rows
    other.learn(one, run=Run(path=tmp_path / "run", resume=True, device="cpu"))
    assert service.rows == 100 == Ledger(tmp_path / "run" / "ledger.jsonl").queries()


def test_saved_streams_give_the_same_scores_and_refuse_other_makings(tmp_path: Path) -> None:
    made = stream()
    made.learn([api(0), api(1)], run=CPU)
    made.save(tmp_path)
    other, x = stream(), torch.randn(5, *SHAPE)
    other.load(tmp_path)
    assert torch.equal(made(x), other(x)) and other.classes == ["0a", "0b", "1a", "1b"]
    with pytest.raises(ConfigError, match=r"saved with eps 0\.01, not 0\.5"):
        stream(eps=0.5).load(tmp_path)
    with pytest.raises(StorageError, match="does not fit"):
        APIStream(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), SHAPE, **SMALL).load(tmp_path)
    with pytest.raises(StorageError):
        stream().load(tmp_path / "nothing")


# ---- heads, memory, generators


def test_outputs_keep_their_place() -> None:
    head = GrowingHead(3)
    x = torch.randn(4, 3)
    assert head.grow(["a", "b"]) == [0, 1]
    before = head(x)
    assert head.grow(["c", "b", "d"]) == [2, 1, 3]
    assert head.classes == ["a", "b", "c", "d"] and torch.equal(head(x)[:, :2], before)
    assert head.grow(["a", "b"]) == [0, 1] and head(x).shape == (4, 4) and torch.equal(head.scores(head(x)), head(x))


def test_heads_of_their_own_are_centred_before_they_are_compared() -> None:
    head = GrowingHead(3, share=False)
    head.grow(["a", "b"])
    assert head.grow(["c", "b", "d"]) == [2, 3, 4]
    out = torch.tensor([[5.0, 1.0, 9.0, 0.0, 3.0]])
    assert torch.allclose(head.scores(out), torch.tensor([[2.0, (-2.0 - 4.0) / 2, 5.0, -1.0]]))


def test_the_reservoir_is_an_even_sample() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(600):
        kept = Reservoir(5, (1,), 1)
        for part in torch.arange(20.0).view(4, 5, 1):
            kept.offer(part, -part)
        assert len(kept) == 5 and torch.equal(kept.answers, -kept.inputs)
        counts[kept.inputs[:, 0].long()] += 1
    assert (counts - 150).abs().max() < 5 * math.sqrt(600 * 0.25 * 0.75)


def test_memory_comes_from_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[tuple[int, Tensor]] = []
    steps: list[int] = []
    step, offer = Task.model_step, Reservoir.offer

    def stepped(self: Task, *args: Any) -> Any:
        steps.append(self.step)
        return step(self, *args)

    def offers(self: Reservoir, inputs: Tensor, answers: Tensor) -> None:
        offered.append((steps[-1], inputs))
        offer(self, inputs, answers)

    monkeypatch.setattr(Task, "model_step", stepped)
    monkeypatch.setattr(Reservoir, "offer", offers)
    made = stream(memory=1000)
    made.learn(api(0), run=CPU)
    late = torch.cat([inputs for at, inputs in offered if at >= 6])
    found = made.memory[0][0]
    assert len(found) == len(late) == 32
    assert all(bool((late == row).flatten(1).all(1).any()) for row in found)


@pytest.mark.parametrize("make", [mlp_generator, conv_generator])
def test_generators_make_pictures(make: Any) -> None:
    assert make(5, (3, 8, 12), 6)(torch.randn(4, 5)).shape == (4, 3, 8, 12)


def test_a_generator_of_the_users_own_and_wrong_ones() -> None:
    made = stream(make_generator=lambda z, shape: mlp_generator(z, shape, 3), generators=3)
    made.learn(api(0), run=CPU)
    service = Network(0)
    with pytest.raises(ConfigError, match="generator makes pictures"):
        stream(make_generator=lambda z, shape: mlp_generator(z, (1, 2, 2), 3)).learn(api(0, service), run=CPU)
    with pytest.raises(ConfigError, match="multiples of 4"):
        conv_generator(4, (1, 6, 8))
    assert service.rows == 0


# ---- other inputs, other baselines


def test_noise_and_real_inputs_alone() -> None:
    service = Network(0)
    made = stream(queries="noise")
    made.learn(api(0, service), run=CPU)
    assert service.rows == 4 * 2 * 8 and made.ledger.queries(phase="model") == 64
    service = Network(1)
    made = stream(queries="raw", memory=6)
    report = made.learn(api(1, service), raw=RAW, run=CPU)
    assert service.rows == 10 == made.ledger.queries(phase="raw") and report.stopped == ["finished"]
    inputs, answers = made.memory[0]
    assert len(inputs) == 6 and all(bool((RAW["api 1"] == row).flatten(1).all(1).any()) for row in inputs)
    assert torch.allclose(service.net(inputs).softmax(1), answers, atol=1e-6)
    with pytest.raises(ConfigError, match="no raw inputs"):
        stream(queries="raw").learn(api(2), run=CPU)


def test_some_real_inputs_save_queries_and_are_remembered() -> None:
    service, made = Network(1), stream(raw_share=0.25, memory=8)
    made.learn(api(1, service, max_rows=4), raw=RAW, run=CPU)
    assert service.rows == 10 + 4 * (24 + 2 * 6)  # each real input once; two of eight rows of a step are real
    real = [bool((RAW["api 1"] == row).flatten(1).all(1).any()) for row in made.memory[0][0]]
    assert sum(real) == 2 and len(real) == 8


def test_collapsed_answers_end_an_apis_training() -> None:
    constant = api(0, lambda x: np.tile([0.999, 0.001], (len(x), 1)))
    made = stream(iterations=50, collapse_patience=6)
    report = made.learn([constant, api(1)], run=CPU)
    assert report.stopped == ["collapsed", "finished"]
    assert made.ledger.queries("api 0", "model") == 6 * 8
    even = [row["entropy"] for row in report.history if row["api"] == "api 0"]
    h = -(0.999 * math.log(0.999) + 0.001 * math.log(0.001)) / math.log(2)
    assert even == pytest.approx([h] * len(even), abs=1e-3)


def test_average_and_forgetting() -> None:
    matrix: list[list[float | None]] = [[0.9], [0.7, None], [0.6, 0.8, 1.0]]
    assert StreamReport.average(matrix) == pytest.approx(0.8)
    assert StreamReport.forgetting(matrix) == pytest.approx(0.3)
    assert StreamReport.forgetting([[0.9]]) == 0 and math.isnan(StreamReport.average([]))


# ---- mistakes, found before a query is spent


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"apis": [api(0), api(0)]}, "two APIs have one name"),
        ({"apis": [api(0), api(1, classes=("0a", "x"))]}, "'0a' of API 'api 1' is taken"),
        ({"apis": [Api(Network(0), ("a", "b"), (1, 2, 2), "api 0")]}, r"takes pictures \(1, 2, 2\)"),
        ({"tests": {"nobody": (torch.zeros(2, *SHAPE), torch.zeros(2))}}, "tests is for an API 'nobody'"),
        ({"tests": {"api 0": (torch.zeros(2, *SHAPE), torch.tensor([0, 2]))}}, "labels 0 to 2; it has 2"),
        ({"tests": {"api 0": (torch.zeros(2, *SHAPE), torch.zeros(3))}}, r"labels \(3,\)"),
        ({"tests": {"api 0": (torch.zeros(2, *SHAPE), torch.zeros(2))}}, "labels of torch.float32"),
        ({"apis": [lambda x: x]}, "a function is no Api"),
        ({"apis": nn.Linear(2, 2)}, "a Linear is no Api"),
        ({"raw": {"api 0": torch.zeros(2, 1, 2, 2)}}, "raw inputs"),
        ({"raw": {"api 0": torch.full((2, *SHAPE), 255.0)}}, r"not within \[-1, 1\]"),
        ({"raw": {"api 0": torch.full((2, *SHAPE), math.nan)}}, r"not within \[-1, 1\]"),
    ],
)
def test_mistakes_cost_nothing(change: dict[str, Any], says: str) -> None:
    apis, made = change.pop("apis", None), stream()
    services = [Network(0), Network(1)]
    with pytest.raises(ConfigError, match=says):
        made.learn(apis or [api(k, s) for k, s in enumerate(services)], **change, run=CPU)
    assert made.ledger.queries() == 0 and sum(s.rows for s in services) == 0 and made.task is None


def test_a_class_that_two_apis_know() -> None:
    for kind, outputs in (("one", 3), ("per_api", 4)):
        mapping = {"api 1": {"cat": "cat", "dog": "hound"}}
        made = stream(head=kind, mapping=mapping)
        made.learn([api(0, classes=("cat", "wolf")), api(1, classes=("cat", "dog"))], run=CPU)
        assert made.classes == ["cat", "wolf", "hound"] and len(made.head.owner) == outputs
        assert made(torch.zeros(2, *SHAPE)).shape == (2, 3)
    with pytest.raises(ConfigError, match="no class 'cow'"):
        stream(mapping={"api 0": {"cow": "x"}}).learn(api(0), run=CPU)


def test_features_and_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="do not take pictures"):
        APIStream(nn.Linear(3, 2), SHAPE)
    with pytest.raises(ConfigError, match="end with a flat layer"):
        APIStream(nn.Conv2d(1, 2, 1), SHAPE)
    with pytest.raises(ConfigError, match="directions"):
        APIStreamConfig(directions=0)


def test_inputs_in_double_precision_are_as_good() -> None:
    tests = {"api 1": (torch.rand(9, *SHAPE) * 2 - 1, torch.arange(9) % 2)}
    ends = []
    for dtype in (torch.float32, torch.float64):
        made = stream()
        raw = {name: x.to(dtype) for name, x in RAW.items()}
        report = made.learn(api(1), raw=raw, tests={n: (x.to(dtype), y) for n, (x, y) in tests.items()}, run=CPU)
        ends.append((made, report.task))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_a_stream_that_knows_nothing_says_so() -> None:
    made = stream()
    with pytest.raises(ConfigError, match="knows no class yet"):
        made(torch.zeros(2, *SHAPE))
    made.learn(api(0), run=CPU)
    with pytest.raises(UnknownIdError, match="no API 'api 2' was learned"):
        made.accuracy("api 2", torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="labels 0 to 5"):
        made.accuracy("api 0", torch.zeros(2, *SHAPE), torch.tensor([0, 5]))


def test_a_loss_that_is_no_number_says_so() -> None:
    made = stream()
    with torch.no_grad():
        made.features[1].weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="api 0"):
        made.learn(api(0), run=CPU)


# ---- it learns


@pytest.fixture(scope="module")
def schools() -> tuple[list[Api], dict[str, tuple[Tensor, Tensor]], list[float]]:
    """Two services of two classes each, trained on drawn pictures of 8 x 8, their tests and their own accuracies."""
    images = drawn(n_train=400, n_test=200, size=8)
    x, y = images.train.tensor() * 2 - 1, torch.from_numpy(images.train.label)
    xt, yt = images.test.tensor() * 2 - 1, torch.from_numpy(images.test.label)
    apis, tests, own = [], {}, []
    for k in range(2):
        torch.manual_seed(k)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(80):
            optimizer.zero_grad()
            F.cross_entropy(net(x[y // 2 == k]), y[y // 2 == k] % 2).backward()
            optimizer.step()
        mine = yt // 2 == k
        apis.append(Api(network_service(net), (f"{2 * k}", f"{2 * k + 1}"), (1, 8, 8), f"school {k}"))
        tests[f"school {k}"] = (xt[mine], yt[mine] % 2)
        own.append((net(xt[mine]).argmax(1) == yt[mine] % 2).float().mean().item())
    return apis, tests, own


BRIEF: dict[str, Any] = {"iterations": 30, "model_steps": 8, "batch_size": 64, "learning_rate": 3e-3}


def test_it_learns_without_data_and_remembers(schools: Any) -> None:
    apis, tests, own = schools
    made, reports = {}, {}
    for name, settings in (("full", {}), ("sequential", {"generators": 1, "memory": 0})):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        made[name] = APIStream(body, (1, 8, 8), **BRIEF, **settings)
        with pytest.warns(UserWarning, match="clipped") if name == "full" else contextlib.nullcontext():
            reports[name] = made[name].learn(apis, tests=tests, run=CPU)
    full = reports["full"]
    assert min(own) > 0.85
    assert full.average(full.task) > 0.8 * sum(own) / 2  # guessing is 0.5
    assert full.task[-1][0] > 0.85 * own[0]  # the first school was not forgotten
    assert "replay" in full.history[-1] and "replay" not in reports["sequential"].history[-1]
    # On pictures that neither was trained on, the one with a memory still answers as the first school did.
    x = tests["school 0"][0]
    answers = apis[0].ask(x, "check", Ledger())
    off = {name: gap(network(x)[:, :2], answers).mean().item() for name, network in made.items()}
    assert off["full"] < 0.6 * off["sequential"]
