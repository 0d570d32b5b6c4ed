"""AdaMerging: its gradient, its invariants, and what it does about inputs that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError, TrainingError
from vouch.merging.adamerging import AdaMergingConfig, Mixture, Spread, adamerging, entropy
from vouch.merging.arithmetic import average, task_arithmetic
from vouch.merging.states import Family
from vouch.merging.stored import read_record, save_state
from vouch.merging.ties import ties
from vouch.merging.unlabelled import Endless

TASKS, CLASSES = ("east", "west", "north"), 4


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(F.gelu(self.norm(self.one(x)))))


class World:
    """Three tasks, each with classes of its own that lie in other directions; a base, experts and heads."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.network = Encoder()
        self.heads = {task: nn.Linear(6, CLASSES) for task in TASKS}
        self.inputs, self.labels = {}, {}
        for task in TASKS:
            centre = 1.2 * torch.randn(CLASSES, 8)
            self.labels[task] = torch.arange(400) % CLASSES
            self.inputs[task] = centre[self.labels[task]] + 0.8 * torch.randn(400, 8)
        self._train(
            list(TASKS), 40, [*self.network.parameters(), *(p for h in self.heads.values() for p in h.parameters())]
        )
        self.base = self.state()
        self.models = {}
        for task in TASKS:
            self.network.load_state_dict(self.base)
            self._train([task], 60, list(self.network.parameters()))
            self.models[task] = self.state()
        self.network.load_state_dict(self.base)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.network.state_dict().items()}

    def _train(self, tasks: list[str], steps: int, parameters: list[Any]) -> None:
        self.network.eval()
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            for task in tasks:
                F.cross_entropy(self.heads[task](self.network(self.inputs[task])), self.labels[task]).backward()
            optimizer.step()
        for module in (self.network, *self.heads.values()):
            module.zero_grad()

    def merge(self, inputs: Any = None, **settings: Any):
        return adamerging(
            self.network, self.base, self.models, self.inputs if inputs is None else inputs, self.heads, **settings
        )

    def mean_entropy(self, state: Any) -> float:
        """Summed over tasks, on all inputs."""
        net = Encoder().eval()
        net.load_state_dict(dict(state))
        with torch.no_grad():
            return sum(float(entropy(self.heads[t](net(self.inputs[t]))).mean()) for t in TASKS)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def same(left: Any, right: Any, atol: float = 0.0) -> None:
    for name in right:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0)


@pytest.mark.parametrize("by", ["layer", "task"])
@pytest.mark.parametrize("keep", [None, 0.2])
def test_the_gradient_is_autograds_and_that_of_finite_differences(world: World, by: str, keep: float | None) -> None:
    doubled = {task: {name: x.double() for name, x in state.items()} for task, state in world.models.items()}
    base = {name: x.double() for name, x in world.base.items()}
    network, heads = Encoder().double().eval(), {task: head.double() for task, head in _copies(world.heads).items()}
    config = AdaMergingConfig(by=by, keep=keep)
    mixture = Mixture(network, Family(doubled, base, network=network), heads, config)
    g = torch.Generator().manual_seed(1)
    mixture.raw.data = torch.rand(mixture.raw.shape, generator=g, dtype=torch.float64)
    mixture.raw.data.view(-1)[:2] = torch.tensor([-0.2, 1.4])
    if by == "layer":  # at the ends themselves the gradient is passed on
        mixture.raw.data.view(-1)[-2:] = torch.tensor([0.0, 1.0])
    x = {task: world.inputs[task][:32].double() for task in TASKS}

    def total(theta: dict[str, Tensor]) -> Tensor:
        return torch.stack([entropy(mixture.logits(task, theta, x[task]).double()).mean() for task in TASKS]).sum()

    theta = mixture.theta()
    value = total(theta)
    value.backward(inputs=list(theta.values()))
    mixture.gather(theta)
    found = mixture.raw.grad.clone()

    raw = mixture.raw.detach().clone().requires_grad_()
    used, merged = raw.clamp(0, 1), {}
    for name in mixture.layers:
        start, tau_K = mixture.vectors(name)
        row = mixture.row(used, name)
        merged[name] = start + sum(row[k] * tau_K[k] for k in range(3))
    (wanted,) = torch.autograd.grad(total(merged), raw)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    assert not found.view(-1)[:2].any() and bool(found.view(-1)[2:].all())

    for at in torch.nonzero(mixture.raw < 1)[:8]:
        ends = []
        for step in (1e-5, -1e-5):
            mixture.raw.data[tuple(at)] += step
            ends.append(float(total(mixture.theta()).detach()))
            mixture.raw.data[tuple(at)] -= step
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(found[tuple(at)]), rel=1e-5, abs=1e-8)


def _copies(heads: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    import copy

    return {task: copy.deepcopy(head) for task, head in heads.items()}


@pytest.mark.parametrize("by", ["layer", "task"])
@pytest.mark.parametrize("keep", [None, 0.2])
def test_entropy_goes_down_and_coefficients_stay_in_range(world: World, by: str, keep: float | None) -> None:
    found = world.merge(by=by, keep=keep, steps=60, learning_rate=2e-2)
    start = (
        task_arithmetic(world.base, world.models, 0.3) if keep is None else ties(world.base, world.models, keep=keep)
    )
    assert world.mean_entropy(found.state) < 0.95 * world.mean_entropy(start)
    assert found.coefficients.shape == ((6, 3) if by == "layer" else (3,)) and found.tasks == list(TASKS)
    assert bool(((found.coefficients >= 0) & (found.coefficients <= 1)).all())
    assert found.report.steps == 60 and found.report.stopped == "finished" and found.report.seconds > 0
    for task in TASKS:
        assert len(found.report.entropy[task]) == 60
        assert all(0 <= value <= math.log(CLASSES) + 1e-6 for value in found.report.entropy[task])
        assert all(0 <= value <= 1 for value in found.report.spread[task])
    if keep is None:
        same(found.state, task_arithmetic(world.base, world.models, found.weights()), 1e-6)


def test_no_steps_are_task_arithmetic_and_ties(world: World) -> None:
    same(world.merge(steps=0).state, task_arithmetic(world.base, world.models, 0.3))
    same(world.merge(steps=0, by="task", keep=0.2).state, ties(world.base, world.models, 0.3, keep=0.2), 1e-6)
    same(world.merge(steps=0, start=0.0).state, world.base)
    same(world.merge(steps=0, start=1 / 3).state, average(world.models), 1e-6)


def test_labels_are_not_read(world: World) -> None:
    plain = world.merge(steps=20)
    right = world.merge({t: (world.inputs[t], world.labels[t]) for t in TASKS}, steps=20)
    wrong = world.merge({t: (world.inputs[t], world.labels[t].flip(0)) for t in TASKS}, steps=20)
    assert torch.equal(plain.coefficients, right.coefficients) and torch.equal(plain.coefficients, wrong.coefficients)
    assert torch.equal(plain.coefficients, world.merge(steps=20).coefficients)
    assert not torch.equal(plain.coefficients, world.merge(steps=20, seed=1).coefficients)
    rows = [Endless(task, torch.arange(50.0), 50, 0).next()[0] for task in ("east", "west")]
    assert not torch.equal(*rows) and torch.equal(rows[0].sort().values, torch.arange(50.0))
    control = world.merge({t: (world.inputs[t], world.labels[t]) for t in TASKS}, steps=20, objective="labels")
    assert not torch.equal(control.coefficients, plain.coefficients)
    with pytest.raises(DataError, match="no labels of task 'east'"):
        world.merge(steps=1, objective="labels")


def test_nothing_else_changes(world: World) -> None:
    before = {
        **world.state(),
        **{f"{t}.{n}": p.clone() for t, h in world.heads.items() for n, p in h.named_parameters()},
    }
    world.network.train()
    world.merge(steps=5)
    assert world.network.training and world.network.drop.training
    after = {**world.state(), **{f"{t}.{n}": p for t, h in world.heads.items() for n, p in h.named_parameters()}}
    same(after, before)
    everything = [*world.network.parameters(), *(p for h in world.heads.values() for p in h.parameters())]
    assert all(p.grad is None for p in everything)


def test_where_the_vectors_lie_makes_no_difference(world: World, tmp_path) -> None:
    for name, state in {"base": world.base, **world.models}.items():
        save_state(tmp_path / f"{name}.safetensors", state)
    files = {task: tmp_path / f"{task}.safetensors" for task in TASKS}
    for keep in (None, 0.3):
        held = world.merge(steps=10, keep=keep)
        for vectors in ("cpu", "disk"):
            out = tmp_path / "merged.safetensors"
            found = adamerging(world.network, tmp_path / "base.safetensors", files, world.inputs, world.heads,
                               steps=10, keep=keep, vectors=vectors, out=out)  # fmt: skip
            mine = held.weights()  # a file has its own order
            assert all(found.weights()[name] == pytest.approx(mine[name], abs=1e-6) for name in mine)
            same(found.state, held.state, 1e-6)
            record = read_record(out)
            assert record["method"] == ("adamerging" if keep is None else "adamerging++")
            assert record["settings"]["coefficients"] == found.coefficients.tolist()
            assert record["settings"]["layers"] == found.layers
            assert record["settings"]["config"]["vectors"] == vectors and record["models"]["west"]["sha256"]


def test_order_does_not_matter(world: World) -> None:
    turned = {task: world.models[task] for task in reversed(TASKS)}
    one = world.merge(steps=20)
    two = adamerging(world.network, world.base, turned, world.inputs, world.heads, steps=20)
    assert two.tasks == list(reversed(TASKS))
    torch.testing.assert_close(one.coefficients, two.coefficients.flip(1), atol=1e-4, rtol=0)


def test_equal_models_leave_the_coefficients_alone(world: World) -> None:
    found = adamerging(world.network, world.base, [world.base, world.base], [world.inputs["east"]] * 2,
                       [world.heads["east"]] * 2, steps=10)  # fmt: skip
    assert bool((found.coefficients == 0.3).all())
    same(found.state, world.base)


def test_a_model_brings_its_own_head(world: World) -> None:
    """Whole classifiers, heads in the state: excluded from merging, each task has its own, of its own size."""
    whole = {
        task: {**{f"0.{n}": x for n, x in world.models[task].items()},
               **{f"1.{n}": x.detach() for n, x in world.heads[task].state_dict().items()}}
        for task in TASKS
    }  # fmt: skip
    base = {f"0.{name}": x for name, x in world.base.items()}
    network = nn.Sequential(Encoder(), nn.Linear(6, 99))  # its head's size is of no account
    found = adamerging(network, base, whole, world.inputs, exclude=["1.*"], steps=15)
    wanted = world.merge(steps=15)
    torch.testing.assert_close(found.coefficients, wanted.coefficients)
    assert set(found.state) == set(base)
    with pytest.raises(ConfigError, match=r"model 'east' has no '1.weight'"):
        adamerging(network, base, {t: {f"0.{n}": x for n, x in s.items()} for t, s in world.models.items()},
                   world.inputs, steps=1)  # fmt: skip


def test_batches_of_any_kind(world: World) -> None:
    loader = {
        task: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(world.inputs[task], world.labels[task]), batch_size=16
        )
        for task in TASKS
    }
    found, listed = world.merge(loader, steps=4), {t: list(world.inputs[t].split(16)) for t in TASKS}
    assert torch.equal(found.coefficients, world.merge(listed, steps=4).coefficients)
    named = {t: [{"x": x} for x in batches] for t, batches in listed.items()}
    assert torch.equal(found.coefficients, world.merge(named, steps=4).coefficients)
    seen: list[int] = []
    world.merge(steps=3, on_step=lambda step, coefficients: seen.append((step, tuple(coefficients.shape))))
    assert seen == [(1, (6, 3)), (2, (6, 3)), (3, (6, 3))]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": True},
        {"clamp": False},
        {"start": 0.995},
        {"start": 0.995, "clamp": False},
        {"objective": "labels"},
    ],
)
def test_the_learning_is_that_of_a_plain_loop(world: World, settings: dict[str, Any]) -> None:
    """A graph through the sum of all models, torch's Adam with its own betas, tasks of 4, 9 and 4 classes."""
    heads = {**world.heads, "west": nn.Linear(6, 9).requires_grad_(False)}
    batches = {t: list(zip(world.inputs[t].split(40), world.labels[t].split(40), strict=True)) for t in TASKS}
    found = adamerging(world.network, world.base, world.models, batches, heads, steps=7, learning_rate=0.02, collapse=0,
                       **settings)  # fmt: skip
    names = list(world.base)
    raw = torch.full((len(names), 3), settings.get("start", 0.3), requires_grad=True)
    optimizer, network = torch.optim.Adam([raw], lr=0.02), Encoder().eval()
    entropies: dict[str, list[float]] = {task: [] for task in TASKS}
    for step in range(7):
        used = raw.clamp(0, 1) if settings.get("clamp", True) else raw
        theta = {
            name: world.base[name]
            + sum(used[at, k] * (world.models[t][name] - world.base[name]) for k, t in enumerate(TASKS))
            for at, name in enumerate(names)
        }
        total = torch.zeros(())
        for task in TASKS:
            seen = []
            for x, y in (batches[task] * 2)[2 * step : 2 * step + 2]:
                logits = heads[task](torch.func.functional_call(network, theta, (x,)))
                p = logits.softmax(1)
                seen.append(-(p * p.log()).sum(1).mean())
                loss = F.cross_entropy(logits, y) if settings.get("objective") else seen[-1]
                total = total + (loss / math.log(logits.shape[1]) if settings.get("scale") else loss)
            entropies[task].append(float(sum(seen).detach()) / 2)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    wanted = raw.detach() if settings.get("clamp") is False else raw.detach().clamp(0, 1)
    torch.testing.assert_close(found.coefficients, wanted, atol=2e-5, rtol=0)
    for task in TASKS:
        assert found.report.entropy[task] == pytest.approx(entropies[task], abs=1e-4)
    if settings.get("start"):
        assert bool((wanted > 1).any()) == (settings.get("clamp") is False)


def test_it_stops_when_predictions_fall_on_one_class(world: World) -> None:
    one_class = {task: world.inputs[task][world.labels[task] == 0] for task in TASKS}
    with pytest.warns(UserWarning, match="fell together on few classes"):
        found = world.merge(one_class, steps=60)
    assert (
        found.report.stopped.startswith("collapse of ") and found.report.steps == 7
    )  # seen in the eighth: 256 predictions
    assert all(len(curve) == 8 for curve in found.report.entropy.values())
    assert world.merge(one_class, steps=12, collapse=0).report.stopped == "finished"


def test_the_spread_is_that_of_the_latest_predictions() -> None:
    spread = Spread()
    for _ in range(20):
        spread.add(F.one_hot(torch.zeros(32, dtype=torch.long), 4))
    assert spread.full and spread.share() == 0
    many = Spread()
    for _ in range(19):
        assert not many.full
        many.add(F.one_hot(torch.zeros(32, dtype=torch.long), 60))
    assert many.full  # 600 predictions, for 60 classes
    for _ in range(8):
        spread.add(F.one_hot(torch.arange(32) % 4, 4))
    assert spread.share() == pytest.approx(1)


def test_buffers_and_statistics(world: World) -> None:
    """Running statistics are the models' mean, counts the base's; the network runs with them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    states = []
    for seed in range(3):
        network.train()
        network(torch.randn(32, 8) + seed)
        states.append({name: x.clone() + (0.01 * seed if x.is_floating_point() else 0) for name, x in
                       network.state_dict().items()})  # fmt: skip
    base, models = states[0], states[1:]
    with pytest.warns(UserWarning, match=r"2 running statistics or buffers, such as '1.running_mean'"):
        found = adamerging(network, base, models, [torch.randn(40, 8)] * 2, steps=3, collapse=0)
    mean = (models[0]["1.running_mean"] + models[1]["1.running_mean"]) / 2
    torch.testing.assert_close(found.state["1.running_mean"], mean)
    assert found.state["1.num_batches_tracked"] == base["1.num_batches_tracked"] == 1
    assert "1.running_mean" not in found.layers and network[1].num_batches_tracked == 3
    with pytest.warns(UserWarning):  # what learning saw is the network that comes out
        first = adamerging(network, base, models, [x := torch.randn(16, 8)] * 2, batches=1, steps=1, collapse=0)
        start = task_arithmetic(base, models, 0.3)
    network.load_state_dict(start)
    wanted = float(entropy(network.eval()(x)).mean().detach())
    assert first.report.entropy["model 0"] == pytest.approx([wanted], rel=1e-5)


def test_tied_parameters_have_one_coefficient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    torch.manual_seed(0)
    network = Tied()
    base = {name: x.clone() for name, x in network.state_dict().items()}  # clones: ties known to the network alone
    models = [{name: x + 0.1 * (k + 1) * torch.ones_like(x) for name, x in base.items()} for k in range(2)]
    found = adamerging(network, base, models, [torch.randn(32, 4)] * 2, steps=3)
    assert found.layers == ["one.weight"]
    assert torch.equal(found.state["one.weight"], found.state["two.weight"])


def test_half_precision_is_merged_in_float32(world: World) -> None:
    half = lambda state: {name: x.bfloat16() for name, x in state.items()}  # noqa: E731
    found = adamerging(world.network, half(world.base), {t: half(s) for t, s in world.models.items()},
                       world.inputs, world.heads, steps=5)  # fmt: skip
    assert all(x.dtype == torch.bfloat16 for x in found.state.values())
    torch.testing.assert_close(found.coefficients, world.merge(steps=5).coefficients, atol=1e-3, rtol=0)


def test_what_does_not_fit_says_so(world: World) -> None:
    with pytest.raises(ConfigError, match="inputs is one tensor"):
        world.merge(world.inputs["east"])
    with pytest.raises(ConfigError, match="'west'"):
        world.merge({"east": world.inputs["east"]}, steps=1)
    with pytest.raises(DataError, match="no inputs of task 'west'"):
        world.merge({**world.inputs, "west": torch.empty(0, 8)}, steps=1)
    with pytest.raises(DataError, match="no inputs of task 'west'"):
        world.merge({**world.inputs, "west": []}, steps=1)
    with pytest.raises(TrainingError, match="task 'west' is not a finite number"):
        world.merge({**world.inputs, "west": world.inputs["west"] * math.nan}, steps=1)
    broken = {**world.models, "north": {**world.models["north"], "two.bias": torch.full((6,), math.nan)}}
    with pytest.raises(DataError, match=r"'two.bias' of model 'north'"):
        adamerging(world.network, world.base, broken, world.inputs, world.heads, steps=1)
    single = {**world.heads, "east": nn.Linear(6, 1)}
    with pytest.raises(ConfigError, match="'east' has a single class"):
        adamerging(world.network, world.base, world.models, world.inputs, single, steps=1)
    with pytest.raises(ConfigError, match=r"'one.weight' has the shape \(16, 8\) in the base and \(5, 8\)"):
        other = Encoder()
        other.one = nn.Linear(8, 5)
        adamerging(other, world.base, world.models, world.inputs, world.heads, steps=1)
    with pytest.raises(ConfigError, match="steps"):
        world.merge(steps=-1)
    strangers = {**world.models, "north": World(7).models["north"]}
    learned: list[int] = []
    for vectors in ("device", "disk"):
        with pytest.raises(DataError, match=r"'north' is .* does not seem to descend"):
            adamerging(world.network, world.base, strangers, world.inputs, world.heads, steps=1, vectors=vectors,
                       on_step=lambda step, _: learned.append(step))  # fmt: skip
        assert not learned  # refused before, not after
    with pytest.raises(ConfigError, match=r"cannot read the inputs of task 'west', \(16, 5\) of float32"):
        world.merge({**world.inputs, "west": torch.randn(40, 5)}, steps=1)
    with pytest.raises(ConfigError, match=r"cannot read the inputs of task 'west', \(16, 8\) of int64"):
        world.merge({**world.inputs, "west": torch.ones(40, 8, dtype=torch.long)}, steps=1)
    with pytest.raises(ConfigError, match=r"head cannot read the features of task 'east', \(16, 6\)"):
        adamerging(world.network, world.base, world.models, world.inputs, {**world.heads, "east": nn.Linear(9, 3)},
                   steps=1)  # fmt: skip
    with pytest.raises(DataError, match=r"labels of task 'north'.*numbers from 0 to 3"):
        world.merge({t: (world.inputs[t], world.labels[t] + 4 * (t == "north")) for t in TASKS}, steps=1,
                    objective="labels")  # fmt: skip
    with pytest.raises(ConfigError, match="there is no base"):
        adamerging(world.network, None, world.models, world.inputs, world.heads, steps=1)  # type: ignore[arg-type]
