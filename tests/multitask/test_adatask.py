"""AdaTask: one task is the plain optimizer, scale does nothing, accounts add up, state survives."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from vouch.errors import ConfigError, TrainingError
from vouch.multitask.adatask import AdaTaskAdagrad, AdaTaskAdam, AdaTaskRMSprop, AUMeter

PLAIN = {AdaTaskAdam: torch.optim.Adam, AdaTaskRMSprop: torch.optim.RMSprop, AdaTaskAdagrad: torch.optim.Adagrad}


class Body(nn.Module):
    """A shared layer and a head for each task."""

    def __init__(self, tasks: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(tasks)])

    def losses(self, x, y):
        h = self.body(x)
        return [(head(h).squeeze(1) - y[:, k]).square().mean() for k, head in enumerate(self.heads)]


def batches(n, tasks=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield torch.randn(16, 5, generator=generator), torch.randn(16, tasks, generator=generator)


def run(optimizer_of, *, steps=20, tasks=2, scale=(1.0, 1.0), model=None, order=None):
    model = model or Body(tasks)
    optimizer = optimizer_of(model)
    for x, y in batches(steps, tasks):
        losses = [c * loss for c, loss in zip(scale, model.losses(x, y), strict=True)]
        optimizer.step([losses[k] for k in order] if order else losses)
    return model, optimizer


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("kind", PLAIN)
def test_one_task_is_the_plain_optimizer_bit_for_bit(kind):
    mine, other = Body(1), Body(1)
    optimizer = kind(mine.parameters(), 1, lr=0.01, shared=mine.body.parameters())
    plain = PLAIN[kind](other.parameters(), lr=0.01)
    for x, y in batches(100, 1):
        optimizer.step(mine.losses(x, y))
        plain.zero_grad()
        other.losses(x, y)[0].backward()
        plain.step()
    assert torch.equal(flat(mine), flat(other))


@pytest.mark.parametrize("kind", PLAIN)
def test_parameters_of_one_task_follow_the_plain_optimizer_exactly(kind):
    """With the body frozen, heads see the same inputs either way."""
    mine, other = Body(), Body()
    for model in (mine, other):
        for p in model.body.parameters():
            p.requires_grad_(False)
    optimizer = kind(mine.heads.parameters(), 2, lr=0.01)
    plain = PLAIN[kind](other.heads.parameters(), lr=0.01)
    for x, y in batches(50):
        optimizer.step(mine.losses(x, y))
        plain.zero_grad()
        sum(other.losses(x, y)).backward()
        plain.step()
    assert torch.equal(flat(mine.heads), flat(other.heads))


@pytest.mark.parametrize("factor", [1e-2, 1e2])
def test_the_scale_of_a_loss_does_nothing_to_the_shared_part(factor):
    def ada(model):
        return AdaTaskAdam(model.parameters(), 2, lr=0.01, eps=1e-12)

    def adam(model):
        return AdaTaskAdam(model.parameters(), 2, lr=0.01, eps=1e-12, accumulators="shared")

    # heads follow the scale and change the body's gradients, so they are frozen
    def frozen():
        model = Body().double()
        for p in model.heads.parameters():
            p.requires_grad_(False)
        return model

    def go(optimizer_of, scale):
        model = frozen()
        optimizer = optimizer_of(model)
        for x, y in batches(20):
            losses = model.losses(x.double(), y.double())
            optimizer.step([losses[0] * scale, losses[1]])
        return flat(model.body)

    one, other = go(ada, 1.0), go(ada, factor)
    assert (one - other).norm() / one.norm() < 1e-4
    assert (go(adam, 1.0) - go(adam, factor)).norm() / one.norm() > 1e-2


def test_equal_gradients_move_the_shared_part_t_times_as_far():
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    three = AdaTaskAdam([p], 3, lr=0.01, shared=[p])
    one = torch.optim.Adam([q], lr=0.01)
    for _ in range(3):
        gradient = p.detach() ** 2
        loss = lambda v, g=gradient: (v * g).sum()  # noqa: E731
        three.step([loss(p) for _ in range(3)])
        one.zero_grad()
        loss(q).backward()
        before = q.detach().clone()
        one.step()
        moved = q.detach() - before
        q.data.copy_(before + 3 * moved)
    assert torch.allclose(p, q, atol=1e-7)


@pytest.mark.parametrize("kind", PLAIN)
def test_several_tasks_are_several_plain_optimizers_whose_steps_add_up(kind):
    """On gradients that differ, some missing: each account is that of a plain optimizer that sees this task alone."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    copies = [nn.Parameter(p.detach().clone()) for _ in range(3)]
    plain = [PLAIN[kind]([each], lr=0.01) for each in copies]
    optimizer = kind([p], 3, lr=0.01, shared=[p])
    sizes = torch.tensor([1.0, 50, 1e-3])[:, None, None]
    for step in range(12):
        G = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64) * sizes
        before, moved, losses = p.detach().clone(), torch.zeros(4, 3, dtype=torch.float64), []
        for k, (each, one, g) in enumerate(zip(copies, plain, G, strict=True)):
            if step % (k + 1):  # no label in this step: all stays as it is
                losses.append(None)
                continue
            each.grad, start = g.clone(), each.detach().clone()
            one.step()
            moved += each.detach() - start
            losses.append((p * g).sum())
        optimizer.step(losses)
        torch.testing.assert_close(p.detach() - before, moved, rtol=1e-9, atol=1e-12)


def test_weights_are_factors_on_the_losses():
    for accumulators in ("task", "shared"):
        mine, other = Body(), Body()
        weighted = AdaTaskAdam(mine.parameters(), 2, lr=0.01, weights=[2.0, 8.0], accumulators=accumulators)
        plain = AdaTaskAdam(other.parameters(), 2, lr=0.01, accumulators=accumulators)
        for x, y in batches(5):
            weighted.step(mine.losses(x, y))
            a, b = other.losses(x, y)
            plain.step([2 * a, 8 * b])
        assert torch.equal(flat(mine), flat(other))


def test_first_step_is_the_learning_rate_for_each_task():
    p = nn.Parameter(torch.zeros(6))
    optimizer = AdaTaskAdam([p], 3, lr=0.01, eps=1e-12, shared=[p])
    g = torch.randn(3, 6)
    optimizer.step([(p * each).sum() for each in g])
    assert torch.allclose(p, -0.01 * g.sign().sum(0), atol=1e-7)


def test_it_descends_where_one_task_is_a_thousand_times_as_large():
    """The small task, of which plain Adam sees nothing, is learned too."""
    torch.manual_seed(0)
    w = torch.randn(8, 8)
    targets = (torch.randn(8), torch.randn(8))
    found = {}
    for accumulators in ("task", "shared"):
        p = nn.Parameter(torch.zeros(8))
        optimizer = AdaTaskAdam([p], 2, lr=0.005, accumulators=accumulators, shared=[p])
        noise = torch.Generator().manual_seed(0)
        for _ in range(400):
            big = 1000 * ((p[:4] - targets[0][:4]).square().sum() + (p * torch.randn(8, generator=noise)).sum())
            small = (p[4:] - targets[1][4:]).square().sum()
            optimizer.step([big, small])
        found[accumulators] = float((p.detach()[4:] - targets[1][4:]).square().sum())
    assert found["task"] < 0.5 * found["shared"], (found, w.shape)


def test_tasks_may_change_places():
    one, _ = run(lambda m: AdaTaskAdam(m.parameters(), ["a", "b"], lr=0.01))
    other = Body()
    optimizer = AdaTaskAdam(other.parameters(), ["b", "a"], lr=0.01)
    for x, y in batches(20):
        a, b = other.losses(x, y)
        optimizer.step({"b": b, "a": a})
    assert torch.allclose(flat(one), flat(other), atol=1e-7)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_shared_account_is_the_plain_optimizer_and_its_parts_add_up(kind):
    model, other = Body(), Body()
    optimizer = kind(model.parameters(), 2, lr=0.01, accumulators="shared")
    optimizer.meter = meter = AUMeter(model.named_parameters(), optimizer.tasks, gamma=0.0)
    plain = PLAIN[kind](other.parameters(), lr=0.01)
    parts = {}
    original = meter.update
    meter.update = lambda k, updates: (
        parts.update({(k, meter.names[p]): u.clone() for p, u in updates.items()}),
        original(k, updates),
    )
    for x, y in batches(30):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(model.losses(x, y))
        plain.zero_grad()
        sum(other.losses(x, y)).backward()
        plain.step()
        for name, p in model.body.named_parameters(prefix="body"):
            assert torch.allclose(p.detach() - before[name], parts[0, name] + parts[1, name], atol=1e-7)
    assert torch.allclose(flat(model), flat(other), atol=1e-5)


def test_shares_lie_in_0_1_sum_to_one_and_see_dominance():
    model = Body()
    optimizer = AdaTaskAdam(model.parameters(), ["small", "large"], lr=0.01, accumulators="shared")
    optimizer.meter = AUMeter(model.named_parameters(), optimizer.tasks)
    for x, y in batches(50):
        a, b = model.losses(x, y)
        optimizer.step({"small": a * 0.01, "large": b * 10})
    shares = optimizer.meter.shares()
    assert set(shares) == {f"body.{name}" for name, _ in model.body.named_parameters()}
    for share in shares.values():
        assert (share >= 0).all() and torch.allclose(share.sum(0), torch.ones_like(share[0]))
    report = optimizer.meter.report()
    assert report["all shared"]["large"] > 0.99
    assert optimizer.meter.imbalance() > 0.99
    balanced = AdaTaskAdam((m := Body()).parameters(), ["small", "large"], lr=0.01)
    balanced.meter = AUMeter(m.named_parameters(), balanced.tasks)
    for x, y in batches(50):
        a, b = m.losses(x, y)
        balanced.step({"small": a * 0.01, "large": b * 10})
    assert 0.3 < balanced.meter.report()["all shared"]["small"] < 0.7


def test_the_meter_averages_squares_with_decay():
    p = nn.Parameter(torch.zeros(2))
    meter = AUMeter([("p", p)], ["a", "b"], gamma=0.9)
    for u in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])):
        meter.update(0, {p: u})
    expected = 0.9 * 0.1 * torch.tensor([1.0, 4.0]) + 0.1 * torch.tensor([9.0, 0.0])
    assert torch.allclose(meter.au["p"][0], expected)
    assert torch.allclose(meter.shares()["p"][1], torch.zeros(2))


def test_the_meter_forgets_a_task_that_rests_and_keeps_parameters_apart():
    """Two of one shape without a name, one of which a single task moves, and a shared number."""
    p, q, number = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))
    optimizer = AdaTaskAdam([p, q, number], ["a", "b"], lr=0.1, eps=1e-12, shared=[p, q, number])
    optimizer.meter = AUMeter([], ["a", "b"], gamma=0.5)
    optimizer.step([(p + q).sum() + number, p.sum() + number])
    report = optimizer.meter.report()
    assert sorted(share["a"] for share in report.values()) == pytest.approx([0.5, 0.5, 5 / 7, 1.0])
    optimizer.step({"a": p.sum()})  # each step of a task is 0.1 long: its account is one of a constant gradient
    (au,) = (au for au in optimizer.meter.au.values() if au.shape == (2, 3) and au[1].any())
    torch.testing.assert_close(au[:, 0], torch.tensor([0.75, 0.25]) * 0.01)


def test_a_plot_is_written(tmp_path):
    _, optimizer = run(lambda m: AdaTaskAdam(m.parameters(), 2))
    with pytest.raises(ConfigError, match="no update"):
        AUMeter([], ["a"]).plot(tmp_path / "x.png")
    model = Body()
    optimizer = AdaTaskAdam(model.parameters(), 2)
    optimizer.meter = AUMeter(model.named_parameters(), optimizer.tasks)
    for x, y in batches(2):
        optimizer.step(model.losses(x, y))
    optimizer.meter.plot(tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 1000


@pytest.mark.parametrize("how", ["state", "copy", "pickle"])
def test_saved_state_goes_on_bit_for_bit(how):
    model, optimizer = run(lambda m: AdaTaskAdam(m.parameters(), 2, lr=0.01, weights=[1, 3]), steps=7)
    if how == "state":
        other = copy.deepcopy(model)
        resumed = AdaTaskAdam(other.parameters(), 2, lr=0.01, weights=[1, 3])
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        optimizer.meter = AUMeter(model.named_parameters(), optimizer.tasks)
        pair = (model, optimizer)
        other, resumed = copy.deepcopy(pair) if how == "copy" else pickle.loads(pickle.dumps(pair))  # noqa: S301
    for x, y in itertools.islice(batches(12), 7, None):
        optimizer.step(model.losses(x, y))
        resumed.step(other.losses(x, y))
    assert torch.equal(flat(model), flat(other))
    if how != "state":
        assert resumed.meter.report() == optimizer.meter.report() and "body.0.weight" in resumed.meter.report()


def test_a_task_that_is_missing_keeps_its_state():
    model = Body()
    optimizer = AdaTaskAdam(model.parameters(), ["a", "b"], lr=0.01, shared=model.body.parameters())
    x, y = next(batches(1))
    a, b = model.losses(x, y)
    optimizer.step({"a": a, "b": b})
    weight = model.body[0].weight
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    head = model.heads[1].weight.detach().clone()
    optimizer.step({"a": model.losses(x, y)[0]})
    after = optimizer.state[weight]
    assert after["step"].tolist() == [2, 1]
    assert torch.equal(after["exp_avg"][1], before["exp_avg"][1])
    assert not torch.equal(after["exp_avg"][0], before["exp_avg"][0])
    assert torch.equal(model.heads[1].weight, head)


def test_none_is_as_good_as_missing_and_without_any_loss_nothing_happens():
    x, y = next(batches(1))
    found = []
    for like in ({}, {"like": None}):
        model = Body()
        optimizer = AdaTaskAdam(model.parameters(), ["click", "like"], lr=0.01)
        assert optimizer.step({"click": model.losses(x, y)[0], **like})
        assert not optimizer.step({}) and not optimizer.step([None, None])
        found.append(flat(model))
    assert torch.equal(*found)


PRESENT = [(0,), (0, 1), (1,), (1,), (0, 1), (0,), (0, 1)]
"""Which tasks have a loss in a step."""


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("start", range(4))
def test_what_is_shared_may_be_learned_late(kind, start):
    """Batches have labels of one task or of both: the same as with the shared part named, bit for bit."""
    mine, other = Body(), Body()
    learns = kind(mine.parameters(), 2, lr=0.01)
    told = kind(other.parameters(), 2, lr=0.01, shared=other.body.parameters())
    for (x, y), present in zip(batches(20), PRESENT[start:] + PRESENT, strict=False):
        for model, optimizer in ((mine, learns), (other, told)):
            losses = model.losses(x, y)
            optimizer.step([loss if k in present else None for k, loss in enumerate(losses)])
    assert torch.equal(flat(mine), flat(other))
    assert learns.param_groups[0]["shared"] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("start", range(4))
def test_the_shared_account_is_the_plain_optimizer_when_tasks_are_missing_too(kind, start):
    mine, other = Body(), Body()
    optimizer = kind(mine.parameters(), 2, lr=0.01, accumulators="shared")
    plain = PLAIN[kind](other.parameters(), lr=0.01)
    for (x, y), present in zip(batches(20), PRESENT[start:] + PRESENT, strict=False):
        losses = mine.losses(x, y)
        optimizer.step({f"task {k}": losses[k] for k in present})
        plain.zero_grad()
        sum(other.losses(x, y)[k] for k in present).backward()
        plain.step()
    torch.testing.assert_close(flat(mine), flat(other), rtol=1e-4, atol=1e-5)


def test_a_shared_parameter_that_one_task_does_not_reach_keeps_that_account():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdaTaskAdam([p, q], ["a", "b"], shared=[p, q])
    optimizer.step({"a": (p * q).sum(), "b": p.sum()})
    assert optimizer.state[q]["step"].tolist() == [1, 0]
    assert optimizer.state[p]["step"].tolist() == [1, 1]


def test_weight_decay_is_decoupled_and_applied_once():
    p = nn.Parameter(torch.full((3,), 2.0))
    optimizer = AdaTaskAdam([p], 2, lr=0.1, weight_decay=0.5, shared=[p])
    optimizer.step([(p * 0).sum() + p[0], p[0] * 3])
    assert torch.allclose(p.detach()[1:], torch.full((2,), 2.0 * (1 - 0.05)))


def test_clipping_is_by_task():
    p = nn.Parameter(torch.zeros(4))
    optimizer = AdaTaskRMSprop([p], 2, lr=0.1, max_norm=1.0, shared=[p])
    optimizer.step([(100 * p).sum(), (0.1 * p).sum()])
    expected = 0.01 * torch.tensor([0.5**2, 0.1**2])  # the first was 200 long
    assert torch.allclose(optimizer.state[p]["square_avg"][:, 0], expected)


def test_an_overflow_in_mixed_precision_skips_the_step():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaTaskAdam([p], 2, shared=[p])
    assert optimizer.step([(p * 4.0).sum(), p.sum()], scale=2.0)
    before = p.detach().clone()
    overflow = torch.sqrt((p - p.detach()).abs()).sum()  # its gradient is not a number at 0
    assert not optimizer.step([overflow + p.sum(), p.sum()], scale=2.0)
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"].tolist() == [1, 1]


def test_gradients_that_share_memory_are_scaled_and_clipped_once():
    """Autograd gives both terms of a sum the same tensor, and a sum one that is expanded from a single number."""
    for settings in ({"scale": 8.0}, {"max_norm": 0.1}):
        a, b, c, own = (nn.Parameter(torch.ones(2)) for _ in range(4))
        clip = {name: value for name, value in settings.items() if name == "max_norm"}
        optimizer = AdaTaskRMSprop([a, b, c, own], 2, alpha=0.0, **clip)
        s = settings.get("scale", 1.0)
        optimizer.step([s * ((c * (a + b)).sum() + own.sum()), s * (2 * c * (a + b)).sum()], scale=s)
        # the first task's are 1 for a, b and its own, 2 for c, two values each
        expected = 1.0 if "scale" in settings else (0.1 / (2 * (1 + 1 + 4 + 1)) ** 0.5) ** 2
        for p in (a, b, own):
            assert optimizer.state[p]["square_avg"][0].tolist() == pytest.approx([expected] * 2), settings


def test_directions_when_a_task_is_missing():
    """They see all tasks in their order; the missing one keeps its account."""
    from vouch.multitask.balancers import make

    model = Body(3)
    optimizer = AdaTaskAdam(model.parameters(), 3, shared=model.body.parameters())
    balancer = make("gradcraft", model.parameters(), tasks=3)
    x, y = next(batches(1, 3))
    a, _, c = model.losses(x, y)
    seen = []

    def transform(by_task):
        seen.append([[g is not None for g in row] for row in by_task])
        return balancer.transform(by_task)

    optimizer.step([a, None, c], transform=transform)
    assert [all(row) for row in seen[0]] == [True, False, True] and not any(seen[0][1])
    assert optimizer.state[model.body[0].weight]["step"].tolist() == [1, 0, 1]


def test_gradients_can_be_changed_first():
    p = nn.Parameter(torch.zeros(2))
    optimizer = AdaTaskRMSprop([p], 2, lr=1.0, shared=[p])
    seen = []

    def transform(by_task):
        seen.append([[g.clone() for g in gradients] for gradients in by_task])
        return [[g * 0 for g in by_task[0]], by_task[1]]

    optimizer.step([(p * 2).sum(), (p * 3).sum()], transform=transform)
    assert seen[0][0][0].tolist() == [2, 2] and seen[0][1][0].tolist() == [3, 3]
    assert optimizer.state[p]["square_avg"][0].eq(0).all()
    optimizer.step([(p * 2).sum(), (p * 3).sum()], transform=lambda by_task: [[None], by_task[1]])
    assert optimizer.state[p]["step"].tolist() == [1, 2]  # None is no part
    with pytest.raises(TrainingError, match="gradient of 'task 1'"):
        optimizer.step([p.sum(), p.sum()], transform=lambda by_task: [by_task[0], [by_task[1][0] / 0]])


def test_errors_name_what_is_wrong():
    model = Body()
    x, y = next(batches(1))
    with pytest.raises(ConfigError, match="tasks"):
        AdaTaskAdam(model.parameters(), 0)
    with pytest.raises(ConfigError, match="not among"):
        AdaTaskAdam(model.heads.parameters(), 2, shared=model.body.parameters())
    optimizer = AdaTaskAdam(model.parameters(), ["click", "like"])
    with pytest.raises(ConfigError, match="3 losses for 2"):
        optimizer.step([*model.losses(x, y), model.losses(x, y)[0]])
    with pytest.raises(ConfigError, match="'share'"):
        optimizer.step({"share": model.losses(x, y)[0]})
    with pytest.raises(TrainingError, match="'like'"):
        optimizer.step({"click": model.losses(x, y)[0], "like": model.losses(x, y)[1] * float("nan")})
    wrong = AdaTaskAdam(model.parameters(), 2, shared=model.body[0].parameters())
    with pytest.raises(ConfigError, match="not in `shared`"):
        wrong.step(model.losses(x, y))
    table = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(ConfigError, match="sparse"):
        AdaTaskAdam(table.parameters(), 2).step([table(torch.tensor([1])).sum(), table(torch.tensor([2])).sum()])


def test_a_state_of_other_tasks_is_refused():
    """Of another number, or in another order: the accounts would be mixed up."""
    _, optimizer = run(lambda m: AdaTaskAdam(m.parameters(), ["a", "b"]), steps=1)
    for tasks in (["a", "b", "c"], ["b", "a"]):
        with pytest.raises(ConfigError, match="the state is of the tasks"):
            AdaTaskAdam(Body().parameters(), tasks).load_state_dict(optimizer.state_dict())


def test_messages_name_parameters_and_tasks():
    model = Body()
    x, y = next(batches(1))
    optimizer = AdaTaskAdam(model.named_parameters(), ["click", "like"], shared=model.body[0].parameters())
    with pytest.raises(ConfigError, match=r"body\.2\.weight is reached by click, like"):
        optimizer.step(model.losses(x, y))
    click, like = model.losses(x, y)
    with pytest.raises(TrainingError, match="loss of 'like'"):
        AdaTaskAdam(model.parameters(), ["click", "like"]).step([click, like * float("nan")])
    optimizer = AdaTaskAdam(model.parameters(), ["click", "like"])
    slope = (model.body[0].weight - model.body[0].weight.detach()).square().sum().sqrt()  # infinite at 0
    with pytest.raises(TrainingError, match="gradient of 'like'"):
        optimizer.step([model.losses(x, y)[0], slope])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1}, "lr"), ({"lr": float("nan")}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"), ({"max_norm": 0.0}, "max_norm"), ({"accumulators": "tasks"}, "tasks"),
        ({"weights": [1.0]}, "1 weights for 2"), ({"weights": [1.0, float("nan")]}, "weights"),
    ],
)  # fmt: skip
def test_settings_out_of_bounds_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        AdaTaskAdam(Body().parameters(), 2, **settings)


def test_settings_of_other_optimizers_are_refused():
    """Not taken and ignored."""
    with pytest.raises(TypeError, match="amsgrad"):
        AdaTaskAdam(Body().parameters(), 2, amsgrad=True)


def test_losses_that_are_none_are_refused():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaTaskAdam([p], 2)
    for losses, match in (
        (p.sum(), "shape"),
        ([1.0, p.sum()], "is 1.0"),
        ([torch.ones(()), torch.ones(())], "depends on a parameter"),
    ):
        with pytest.raises(ConfigError, match=match):
            optimizer.step(losses)
    with pytest.raises(ConfigError, match="the text 'click'"):
        AdaTaskAdam([p], "click")
    with pytest.warns(UserWarning, match="1 parameters"):
        optimizer.step([p.sum(), nn.Parameter(torch.ones(2)).sum()])


def test_a_learning_rate_schedule_moves_it():
    model = Body()
    optimizer = AdaTaskAdam(model.parameters(), 2, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    x, y = next(batches(1))
    optimizer.step(model.losses(x, y))
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}
