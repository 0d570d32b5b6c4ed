from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError, StorageError, TrainingError, UnknownIdError
from vouch.merging.controls import linear_map, mean_shift, plane, plot_features, relabelled_head
from vouch.merging.surgery import Correction, Surgery
from vouch.merging.unlabelled import Endless

D = 8


class Net(nn.Module):
    """An encoder with what must be switched off: dropout and batch statistics."""

    def __init__(self, seed: int, features: int = D) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
            self.block, self.drop = nn.Linear(16, 16), nn.Dropout(0.5)
            self.last = nn.Linear(16, features)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(self.drop(h + torch.tanh(self.block(h))))


def inputs(seed: int, n: int = 200) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def family() -> tuple[Net, dict[str, Net], dict[str, Tensor]]:
    """A merged network, and individual ones: what it is the mean of."""
    first, second = Net(0), Net(1)
    merged = Net(0)
    merged.load_state_dict(
        {n: (t + second.state_dict()[n]) / 2 if t.is_floating_point() else t for n, t in first.state_dict().items()}
    )
    return merged, {"a": first, "b": second}, {"a": inputs(0), "b": inputs(1) + 1}


def features(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)


def fitted(**settings) -> tuple[Surgery, dict[str, Net], dict[str, Tensor]]:
    merged, individual, x = family()
    surgery = Surgery(merged, **{"rank": 4, "steps": 60, **settings})
    surgery.report = surgery.fit(individual, x)
    return surgery, individual, x


@pytest.mark.parametrize("settings", [{"steps": 0}, {"rank": 0}, {"activation": "gelu", "steps": 0}])
def test_nothing_changes_bit_for_bit_before_the_first_step(settings: dict) -> None:
    surgery, _, x = fitted(layers=("block",), **settings)
    for task in ("a", "b"):
        before, after = features(surgery.encoder, x[task]), surgery(x[task], task)
        assert before.numpy().tobytes() == after.detach().numpy().tobytes()


def test_the_update_is_that_of_the_formula() -> None:
    """Two steps by hand: `z - U relu(V z)`, mean absolute difference, Adam, on the batches of the stream."""
    surgery, individual, x = fitted(steps=2)
    merged = surgery.encoder
    start, _, _ = fitted(steps=0)
    down = start.corrections[0][0].down.detach().clone().requires_grad_(True)
    up = torch.zeros(D, 4, requires_grad=True)
    stream, moments = Endless("a", x["a"], 16, 0), {id(p): (0, 0) for p in (up, down)}
    for step in (1, 2):
        batch, _ = stream.next()
        z, target = features(merged, batch), features(individual["a"], batch)
        loss = (z - torch.relu(z @ down.T) @ up.T - target).abs().sum() / (16 * D)
        assert surgery.report.losses["a"][""][step - 1] == pytest.approx(float(loss.detach()), rel=1e-5)
        for parameter, grad in zip((up, down), torch.autograd.grad(loss, (up, down)), strict=True):
            m, v = moments[id(parameter)]
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            moments[id(parameter)] = m, v
            parameter.data -= 1e-3 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert torch.allclose(surgery.corrections[0][0].up, up, atol=1e-6)
    assert torch.allclose(surgery.corrections[0][0].down, down, atol=1e-6)
    z = features(merged, x["a"])
    assert torch.allclose(surgery(x["a"], "a"), z - torch.relu(z @ down.T) @ up.T, atol=1e-6)


def test_it_lowers_the_bias_and_reports_it() -> None:
    surgery, individual, x = fitted(steps=1000, rank=D)
    for task in ("a", "b"):
        z, own = features(surgery.encoder, x[task]), features(individual[task], x[task])
        found = surgery.report.bias[task][""]
        assert torch.allclose(found.before, (own - z).abs().mean(0), atol=1e-6)
        assert torch.allclose(found.after, (own - surgery(x[task], task)).abs().mean(0), atol=1e-6)
        assert found.after.mean() < 0.6 * found.before.mean()
        assert found.inputs == 200 and found.scale == pytest.approx(float(own.abs().mean()), rel=1e-5)
        shift = (own - mean_shift(z, own)(z)).abs().mean()
        assert found.after.mean() <= 1.1 * shift
        assert surgery.report.parameters[task] == 2 * D * D
        new = inputs(9) + (task == "b")
        held_out = surgery.bias(task, individual[task], new)[""]
        assert torch.allclose(
            held_out.after, (features(individual[task], new) - surgery(new, task)).abs().mean(0), atol=1e-6
        )
        assert held_out.after.mean() < held_out.before.mean()


def test_small_full_steps_never_raise_the_loss() -> None:
    surgery, _, _ = fitted(batch_size=200, steps=50, learning_rate=1e-4)
    losses = surgery.report.losses["a"][""]
    assert len(losses) == 50 and bool((losses.diff() <= 0).all()) and losses[-1] < losses[0]


def test_a_network_equal_to_its_individual_one_stays() -> None:
    net = Net(0)
    surgery = Surgery(net, rank=4, steps=20)
    report = surgery.fit({"only": copy.deepcopy(net)}, {"only": inputs(0)})
    assert not surgery.corrections[0][0].up.any() and not report.losses["only"][""].any()
    assert torch.equal(surgery(inputs(2), "only"), features(net, inputs(2)))


def test_tasks_networks_and_labels_are_left_alone() -> None:
    merged, individual, x = family()
    merged.train()
    merged.drop.eval()
    nets = {"merged": merged, **individual}
    before = {who: copy.deepcopy(net.state_dict()) for who, net in nets.items()}
    modes = [part.training for part in merged.modules()]
    surgery = Surgery(merged, rank=4, steps=30)
    surgery.fit({"a": individual["a"]}, {"a": x["a"]})
    first = copy.deepcopy(surgery.corrections[0].state_dict())
    given = surgery(x["a"], "a")
    wrong = torch.randint(0, 3, (200,))
    surgery.fit({"b": individual["b"]}, {"b": (x["b"], wrong)})
    assert all(torch.equal(first[name], tensor) for name, tensor in surgery.corrections[0].state_dict().items())
    assert torch.equal(surgery(x["a"], "a"), given)
    assert [part.training for part in merged.modules()] == modes
    for who, net in nets.items():  # batch statistics too
        assert all(torch.equal(before[who][name], tensor) for name, tensor in net.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    # all at once, in another order, and without labels: the same
    other = Surgery(merged, rank=4, steps=30)
    other.fit({"b": individual["b"], "a": individual["a"]}, {"a": x["a"], "b": x["b"]})
    for task in ("a", "b"):
        assert torch.equal(other(x[task], task), surgery(x[task], task))
    assert torch.equal(other.correct(features(merged, x["a"]), "a"), other(x["a"], "a"))


@pytest.mark.parametrize("layers", [(), ("block",)])
def test_kept_and_recomputed_features_give_the_same_training(layers: tuple[str, ...]) -> None:
    kept, _, x = fitted(layers=layers)
    again, _, _ = fitted(layers=layers, cache=False)
    for task in ("a", "b"):
        for position in kept.positions:
            first, second = kept.report.losses[task][position], again.report.losses[task][position]
            assert torch.allclose(first, second, atol=1e-5)
            assert torch.allclose(
                kept.report.bias[task][position].after, again.report.bias[task][position].after, atol=1e-5
            )
        assert torch.allclose(kept(x[task], task), again(x[task], task), atol=1e-5)


def test_states_files_and_networks_are_the_same_individual(tmp_path) -> None:
    surgery, individual, x = fitted()
    save_file(individual["b"].state_dict(), tmp_path / "b.safetensors")
    other = Surgery(surgery.encoder, rank=4, steps=60)
    other.fit({"a": individual["a"].state_dict(), "b": tmp_path / "b.safetensors"}, x)
    for task in ("a", "b"):
        assert torch.equal(surgery(x[task], task), other(x[task], task))


def test_tied_parameters_of_a_state() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    merged, own = Tied(), Tied()
    by_state = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    first, second = Surgery(merged, rank=2, steps=5), Surgery(merged, rank=2, steps=5)
    first.fit({"a": own}, {"a": inputs(0)})
    second.fit({"a": by_state}, {"a": inputs(0)})
    assert torch.equal(first(inputs(1), "a"), second(inputs(1), "a")) and first.corrections[0][0].up.any()


def test_layers_are_corrected_in_their_order_on_corrected_outputs() -> None:
    surgery, individual, x = fitted(layers=("last", "block"), steps=200, rank=8)
    assert surgery.positions == ["block", "last", ""]
    assert surgery.report.parameters["a"] == 2 * 8 * (16 + D + D)
    net, own = surgery.encoder.eval(), individual["a"].eval()
    block, last, output = surgery.corrections[0]
    with torch.no_grad():
        h = torch.tanh(net.norm(net.first(x["a"])))
        inner, theirs = net.block(h), own.block(torch.tanh(own.norm(own.first(x["a"]))))
        z = net.last(h + torch.tanh(block(inner)))
        assert torch.allclose(surgery(x["a"], "a"), output(last(z)), atol=1e-6)
        found = surgery.report.bias["a"]
        assert torch.allclose(found["block"].before, (theirs - inner).abs().mean(0), atol=1e-5)
        assert torch.allclose(found["block"].after, (theirs - block(inner)).abs().mean(0), atol=1e-5)
        assert torch.allclose(found["last"].before, (own(x["a"]) - z).abs().mean(0), atol=1e-5)
        again = surgery.bias("a", individual["a"], x["a"])
        for position in surgery.positions:
            assert torch.allclose(again[position].before, found[position].before, atol=1e-5)
            assert torch.allclose(again[position].after, found[position].after, atol=1e-5)
        # the network alone is as it was
        assert torch.allclose(net(x["a"]), net.last(h + torch.tanh(inner)), atol=1e-6)
    assert all(found[p].after.mean() < found[p].before.mean() for p in ("block", "last"))


def test_channels_and_tokens_are_features_of_their_axis() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    merged, own, x = Conv(), Conv(), torch.randn(40, 1, 6, 6)
    surgery = Surgery(merged, layers=("conv",), axis=1, rank=3, steps=100, learning_rate=1e-2)
    report = surgery.fit([own], [x])
    z, target, made = merged.conv(x), own.conv(x), surgery.corrections[0][0]
    h = torch.relu(torch.einsum("rc,bchw->brhw", made.down, z))
    assert torch.allclose(made(z), z - torch.einsum("cr,brhw->bchw", made.up, h), atol=1e-6)
    found = report.bias["task 0"]["conv"]
    assert torch.allclose(found.before, (target - z).abs().mean((0, 2, 3)), atol=1e-6)
    assert found.after.mean() < found.before.mean()


def test_several_outputs_and_batches_as_dicts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.last = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 5)

        def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
            return self.last(self.gru(tokens)[0].mean(1) * scale)

    merged, own = Two(), Two()
    batches = [{"tokens": torch.randn(16, 7, 3), "scale": torch.ones(16, 1)} for _ in range(4)]
    surgery = Surgery(merged, layers=("gru",), rank=2, steps=50, learning_rate=1e-2)
    report = surgery.fit({"a": own}, {"a": [(batch, torch.zeros(16)) for batch in batches]})
    found = report.bias["a"]
    assert found["gru"].after.mean() < found["gru"].before.mean() and found[""].inputs == 64
    assert surgery(batches[0], "a").shape == (16, 5)


def test_silent_units_are_mirrored_and_counted() -> None:
    correction = Correction(3, 200)
    x = torch.rand(50, 3) + 1  # all positive: half the units would be silent
    assert ((correction.units(x) > 0).any(0)).sum() < 150
    shifted = nn.Linear(3, 3)
    shifted.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    surgery = Surgery(shifted, rank=200, steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = surgery.fit({"a": nn.Linear(3, 3)}, {"a": x})
    assert report.bias["a"][""].silent == 0
    bound = 3**-0.5
    assert (
        surgery.corrections[0][0].down.abs().max() <= bound
        and surgery.corrections[0][0].down.abs().mean() > 0.4 * bound
    )


def test_every_input_once_is_the_online_way() -> None:
    merged, individual, x = family()
    seen = []
    surgery = Surgery(merged, rank=4, batch_size=1, passes=1)
    report = surgery.fit(
        individual, x, on_step=lambda task, step, made: seen.append((task, step, made.up.sum().item()))
    )
    assert len(report.losses["a"][""]) == 200 and [s for t, s, _ in seen if t == "b"] == list(range(1, 201))
    assert seen[0][2] != seen[100][2]
    twice = Surgery(merged, rank=4, batch_size=8, passes=2).fit(individual, x)
    assert len(twice.losses["a"][""]) == 2 * 200 / 8
    z, own = features(merged, x["a"]), features(individual["a"], x["a"])
    # the first loss of each input, in some order, where the correction has hardly moved: every input came once
    tiny = Surgery(merged, rank=4, batch_size=1, passes=1, learning_rate=1e-12).fit(individual, x)
    assert torch.allclose(tiny.losses["a"][""].sort().values, (own - z).abs().mean(1).sort().values, atol=1e-5)


@pytest.mark.parametrize(("distance", "of"), [("l2", F.mse_loss), ("smooth_l1", F.smooth_l1_loss)])
def test_other_distances(distance: str, of) -> None:
    surgery, individual, x = fitted(distance=distance, batch_size=200)
    z, own = features(surgery.encoder, x["a"]), features(individual["a"], x["a"])
    losses = surgery.report.losses["a"][""]
    assert float(losses[0]) == pytest.approx(float(of(z, own)), rel=1e-5) and losses[-1] < losses[0]


def test_it_is_saved_and_loaded(tmp_path) -> None:
    surgery, _, x = fitted(layers=("block",), activation="gelu")
    path = tmp_path / "surgery.safetensors"
    surgery.save(path)
    loaded = Surgery.load(path, surgery.encoder)
    z, made = features(surgery.encoder, x["a"]), surgery.corrections[0][-1]
    assert torch.allclose(made(z), z - F.gelu(z @ made.down.T) @ made.up.T, atol=1e-6)
    assert loaded.tasks == ["a", "b"] and loaded.config == surgery.config and loaded.positions == surgery.positions
    for task in ("a", "b"):
        assert torch.equal(loaded(x[task], task), surgery(x[task], task))
    assert path.stat().st_size < 2 * 4 * (2 * 4 * (16 + D)) + 2_000  # the network is not in it
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for bad, words in (("other", "holds no corrections"), ("broken", "cannot be read"), ("missing", "no file")):
        with pytest.raises(StorageError, match=words):
            Surgery.load(tmp_path / f"{bad}.safetensors", surgery.encoder)
    with pytest.raises(ConfigError, match="no layer 'block'"):
        Surgery.load(path, nn.Linear(6, D))
    with pytest.raises(DataError, match=r"5 dimensions.*made for 8"):
        plain, _, _ = fitted()
        plain.save(path)
        Surgery.load(path, nn.Linear(6, 5))(x["a"], "a")


def test_half_precision_features_stay_half() -> None:
    correction = Correction(D, 4)
    z = torch.randn(3, D, dtype=torch.bfloat16)
    assert torch.equal(correction(z), z) and correction(z).dtype == torch.bfloat16
    surgery = Surgery(Net(0).bfloat16(), rank=2, steps=3)
    report = surgery.fit({"a": Net(1).bfloat16()}, {"a": inputs(0).bfloat16()})
    assert surgery.corrections[0][0].up.dtype == torch.float32 and torch.isfinite(report.losses["a"][""]).all()


def test_mistakes_are_named() -> None:
    merged, individual, x = family()
    surgery = Surgery(merged, rank=4, steps=5)
    with pytest.raises(DataError, match=r"(?s)8 dimensions.*task 'a' 5"):
        surgery.fit({"a": Net(1, features=5)}, {"a": x["a"]})
    with pytest.raises(DataError, match="not finite numbers on inputs of task 'a'"):
        surgery.fit({"a": individual["a"]}, {"a": torch.full((20, 6), float("nan"))})
    with pytest.raises(DataError, match="no inputs of task 'a'"):
        surgery.fit({"a": individual["a"]}, {"a": x["a"][:0]})
    with pytest.raises(ConfigError, match="no inputs of model 'b'"):
        surgery.fit(individual, {"a": x["a"]})
    with pytest.raises(ConfigError, match="not features"):
        Surgery(nn.Flatten(0), steps=1).fit({"a": individual["a"]}, {"a": x["a"]})
    with pytest.raises(DataError, match=r"task 'a' has no 'block.weight'"):
        surgery.fit({"a": {k: v for k, v in merged.state_dict().items() if k != "block.weight"}}, {"a": x["a"]})
    with pytest.raises(DataError, match=r"\(5, 16\) of 'last.weight'"):
        surgery.fit({"a": Net(1, features=5).state_dict()}, {"a": x["a"]})
    with pytest.raises(ConfigError, match=r"(?s)no layer 'blok'.*block"):
        Surgery(merged, layers=("blok",))
    with pytest.raises(ConfigError, match="rank"):
        Surgery(merged, rank=-1)
    for axis in (0, 2, -3):
        with pytest.raises(ConfigError, match=f"axis is {axis}; the output of layer 'block' has the axes 1 to 1"):
            Surgery(merged, layers=("block",), axis=axis, steps=1).fit({"a": individual["a"]}, {"a": x["a"]})
    for bad, told in ((torch.randn(20, 5), "float32"), (torch.ones(20, 6, dtype=torch.long), "int64")):
        with pytest.raises(ConfigError, match=rf"cannot read the inputs of task 'a', \(20, .\) of {told}"):
            surgery.fit({"a": individual["a"]}, {"a": bad})
    with pytest.raises(TrainingError, match="task 'a' is not a finite number at step"):
        Surgery(merged, rank=4, steps=60, learning_rate=1e30, distance="l2").fit({"a": individual["a"]}, {"a": x["a"]})
    assert surgery.tasks == [] and len(surgery.corrections) == 0  # nothing half-made
    surgery.fit(individual, x)
    with pytest.raises(UnknownIdError, match=r"(?s)task 'c'.*'a', 'b'"):
        surgery(x["a"], "c")
    deep = Surgery(merged, layers=("block",), rank=2, steps=1)
    deep.fit(individual, x)
    with pytest.raises(ConfigError, match="layers are corrected"):
        deep.correct(torch.zeros(1, D), "a")


def test_a_layer_that_is_called_twice_or_never_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x))

    for layer, times in (("twice", 2), ("never", 0)):
        with pytest.raises(ConfigError, match=f"{layer!r} is called {times} times"):
            Surgery(Odd(), layers=(layer,), steps=1).fit({"a": Odd()}, {"a": inputs(0)})


def test_few_inputs_and_dead_features_are_warned_of() -> None:
    merged, individual, x = family()
    with pytest.warns(UserWarning, match="task 'a' has 3 inputs for a correction of rank 4"):
        report = Surgery(merged, rank=4, steps=5).fit({"a": individual["a"]}, {"a": x["a"][:3]})
    assert report.bias["a"][""].inputs == 3 and len(report.losses["a"][""]) == 5
    dead = Net(0)
    nn.init.zeros_(dead.last.weight)
    with pytest.warns(UserWarning, match="same for all inputs"):
        Surgery(dead, rank=4, steps=5).fit({"a": individual["a"]}, {"a": x["a"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Surgery(merged, rank=4, steps=5).fit(individual, x)


def test_the_linear_map_is_ridge_regression_and_leaves_out_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 5, generator=generator) + 2
    target = z @ torch.randn(5, 5, generator=generator) * 0.5 + 1 + torch.randn(40, 5, generator=generator)
    centred, difference = (z - z.mean(0)).double(), (target - z).double()
    unit = float(torch.linalg.eigvalsh(centred.T @ centred).mean())

    def solved(rows: Tensor, by: float) -> tuple[Tensor, Tensor]:
        x, y = z[rows].double(), difference[rows]
        a, b = x - x.mean(0), y - y.mean(0)
        weight = torch.linalg.solve(a.T @ a + by * unit * torch.eye(5), a.T @ b)
        return weight, y.mean(0) - x.mean(0) @ weight

    every = torch.arange(40)
    weight, shift = solved(every, 0.1)
    assert torch.allclose(linear_map(z, target, 0.1)(z).double(), z + z.double() @ weight + shift, atol=1e-4)
    errors = {}
    for by in (10.0**power for power in range(-5, 4)):
        rows = []
        for left in range(40):
            w, s = solved(every[every != left], by)
            rows.append((difference[left] - z[left].double() @ w - s).square().mean())
        errors[by] = float(torch.stack(rows).mean())
    best = min(errors, key=errors.get)
    assert torch.allclose(linear_map(z, target).weight, linear_map(z, target, best).weight)
    # a strong ridge leaves the mean shift; a weak one beats it where the map is linear
    assert torch.allclose(linear_map(z, target, 1e9)(z), mean_shift(z, target)(z), atol=1e-4)
    assert torch.allclose((mean_shift(z, target)(z) - target).mean(0), torch.zeros(5), atol=1e-5)
    with pytest.raises(DataError, match=r"\(40, 5\) do not fit"):
        linear_map(z, target[:, :4])
    for solve in (mean_shift, linear_map):
        with pytest.raises(DataError, match=r"\(0, 5\)"):
            solve(z[:0], target[:0])
        with pytest.raises(DataError, match="not finite"):
            solve(z / 0, target)
    with pytest.raises(ConfigError, match=r"ridge is -1\.0"):
        linear_map(z, target, -1.0)


def test_a_head_is_retrained_on_the_classes_of_the_individual_network() -> None:
    z = inputs(0)
    label, head = (z[:, 0] > 0).long(), nn.Linear(6, 2)
    before = copy.deepcopy(head.state_dict())
    made = relabelled_head(head, z, label, steps=300, learning_rate=1e-2)
    assert (made(z).argmax(1) == label).float().mean() > 0.95
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())
    with pytest.raises(DataError, match="numbers from 0 to 1"):
        relabelled_head(head, z, label + 1)


def test_the_plane_keeps_the_main_directions(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = (torch.randn(30, 2, generator=generator) @ torch.randn(2, 6, generator=generator)).double()
    points = plane({"one": flat[:10], "two": flat[10:]})
    together = torch.cat([points["one"], points["two"]])
    assert torch.allclose(torch.cdist(together, together), torch.cdist(flat, flat), atol=1e-4)
    plot_features(tmp_path / "plane.png", {"one": flat[:10], "two": flat[10:]})
    assert (tmp_path / "plane.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="xyz"):
        plot_features(tmp_path / "plane.xyz", {"one": flat})
    assert [path.name for path in tmp_path.iterdir()] == ["plane.png"]
    with pytest.raises(DataError, match=r"\(30, 1\) have no plane"):
        plane({"one": flat[:, :1]})
