"""MEAL for any network: its formulas by brute force, the exact statements of the method, and what it must refuse."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vouch.data.images import drawn
from vouch.distillation.adversary import Discriminator, Judges, scale_gradient, telling
from vouch.distillation.images import BLOCKS, PictureBatches, SmallNet, answers, parts, right, watching, with_noise
from vouch.distillation.meal import DistilConfig, common_lengths, distil
from vouch.distillation.sgd import SGDConfig, as_batches, factor, train_on_labels
from vouch.distillation.taps import (
    Ensemble,
    Tapped,
    distances,
    entropies,
    kl,
    mixture,
    outputs,
    pooled,
    similarity,
)
from vouch.errors import ConfigError, TrainingError
from vouch.training import Run

CPU = Run(device="cpu")


class Tiny(nn.Module):
    """Two convolutions with batch norm, and a linear layer: taps `one` and `two`."""

    def __init__(self, classes: int = 3, width: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(width, width, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)).mean((2, 3)))


def tiny(seed: int, **settings: Any) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(**settings)


def some_batches(n: int = 3, size: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 7, 7, generator=random), torch.randint(0, 3, (size,), generator=random)) for _ in range(n)
    ]


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


# Pooling and similarity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["average", "max"])
@pytest.mark.parametrize("length", [20, 7, 30])
def test_pooling_is_positions_first_then_channels(how: Any, length: int) -> None:
    tap = torch.randn(3, 5, 4, 5)
    pool, over = (F.adaptive_avg_pool1d, np.mean) if how == "average" else (F.adaptive_max_pool1d, np.max)
    expected = over(pool(tap.flatten(2), length).numpy(), axis=1)
    torch.testing.assert_close(pooled(tap, length, how), torch.from_numpy(expected))
    torch.testing.assert_close(pooled(tap[:, torch.randperm(5)], length, how), torch.from_numpy(expected))


def test_pooling_of_a_constant_and_to_the_same_length() -> None:
    assert torch.equal(pooled(torch.full((2, 3, 4, 4), 1.5), 5), torch.full((2, 5), 1.5))
    tap = torch.randn(2, 3, 4, 4)
    assert torch.equal(pooled(tap, 16), tap.flatten(2).mean(1))
    values = torch.randn(2, 9)
    assert torch.equal(pooled(values, 9), values)


@pytest.mark.parametrize("kind", ["cross-entropy", "l1", "l2", "softmax-l1", "softmax-l2"])
def test_similarities_by_hand(kind: Any) -> None:
    s, t = torch.randn(4, 6, dtype=torch.double), 3 * torch.randn(4, 6, dtype=torch.double)
    total = 0.0
    for a, b in zip(s.tolist(), t.tolist(), strict=True):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a, b))
        total += {
            "cross-entropy": -sum(q[i] * math.log(p[i]) for i in range(6)),
            "l1": sum(abs(a[i] - b[i]) for i in range(6)) / 6,
            "l2": sum((a[i] - b[i]) ** 2 for i in range(6)) / 6,
            "softmax-l1": sum(abs(p[i] - q[i]) for i in range(6)),
            "softmax-l2": sum((p[i] - q[i]) ** 2 for i in range(6)),
        }[kind]
    assert float(similarity(s, t, kind)) == pytest.approx(total / 4, rel=1e-12)


def test_a_copy_of_the_teacher_is_at_the_minimum() -> None:
    logits = (5 * torch.randn(8, 10, dtype=torch.double)).requires_grad_()
    value = distances(logits, logits.detach())
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(value.detach(), -(p * p.log()).sum(-1))
    torch.testing.assert_close(entropies(logits.detach()), value.detach())
    (gradient,) = torch.autograd.grad(value.mean(), logits)
    assert float(gradient.abs().max()) < 1e-12
    assert float(kl(logits, logits.detach())) == pytest.approx(0, abs=1e-12)
    moved = torch.randn(8, 10, dtype=torch.double)
    inputs = F.kl_div(moved.log_softmax(-1), p, reduction="batchmean")
    assert float(kl(moved, logits.detach())) == pytest.approx(float(inputs))


def test_a_mixture_answers_with_the_mean_chance() -> None:
    each = [torch.randn(5, 4) * scale for scale in (1, 5, 20)]
    mean = torch.stack([one.softmax(-1) for one in each]).mean(0)
    torch.testing.assert_close(mixture(each).softmax(-1), mean)
    assert mixture(each[:1]) is each[0]
    ensemble = Ensemble([nn.Linear(3, 4), nn.Linear(3, 4)])
    x = torch.randn(2, 3)
    torch.testing.assert_close(ensemble(x), mixture([one(x) for one in ensemble.networks]))


# The game -----------------------------------------------------------------------------------------------------------


def test_discriminator_loss_by_hand_and_its_symmetry() -> None:
    logits, is_teacher = torch.randn(6, 2), torch.tensor([False] * 3 + [True] * 3)
    target = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    p = logits.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(telling(logits, is_teacher), expected)
    torch.testing.assert_close(telling(logits.flip(1), ~is_teacher), expected)


def test_discriminators_begin_near_ln_2_and_can_say_anything() -> None:
    torch.manual_seed(0)
    judges = Judges([196, 49, 10])
    s, t = [torch.randn(32, d) for d in (196, 49, 10)], [torch.randn(32, d) for d in (196, 49, 10)]
    for value in judges.losses(s, t):
        assert value.item() == pytest.approx(math.log(2), abs=0.05)
    assert [layer.out_features for layer in Discriminator(40) if isinstance(layer, nn.Linear)] == [20, 10, 2]
    assert isinstance(Discriminator(40)[-1], nn.Linear)  # no ReLU: it can fall below ln(2) / 2


def test_reversal_turns_the_students_gradient_and_nothing_else() -> None:
    torch.manual_seed(0)
    judges = Judges([7, 4])
    student, teacher = [torch.randn(5, 7), torch.randn(5, 4)], [torch.randn(5, 7), torch.randn(5, 4)]

    def gradients(weight: float) -> tuple[list[Tensor], list[Tensor]]:
        s = [each.clone().requires_grad_() for each in student]
        total = torch.stack(judges.losses(s, teacher, [weight] * 2)).sum()
        ours = torch.autograd.grad(total, s, allow_unused=True, retain_graph=True)
        return list(ours), list(torch.autograd.grad(total, list(judges.parameters())))

    helped, judged = gradients(1.0)
    for weight in (-1.0, -0.1, 0.0):
        turned, also = gradients(weight)
        assert all(torch.equal(a, b) for a, b in zip(judged, also, strict=True))
        for a, b in zip(helped, turned, strict=True):
            assert b is None if weight == 0 else torch.equal(b, weight * a)
    s = [each.clone().requires_grad_() for each in student]
    rows = torch.cat([s[0], teacher[0]])
    plain = telling(judges[0](rows), torch.arange(10) >= 5)
    torch.testing.assert_close(torch.autograd.grad(plain, s[0])[0], helped[0])
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(scale_gradient(x, -2.0), x)


def test_against_a_fixed_discriminator_reversal_makes_the_student_look_like_a_teacher() -> None:
    torch.manual_seed(0)
    judges = Judges([6])
    student, teacher = nn.Parameter(torch.randn(40, 6) - 1.5), torch.randn(40, 6) + 1.5
    optimizer = torch.optim.Adam(judges.parameters(), 0.02)
    for _ in range(60):
        (told,) = judges.losses([student], [teacher])
        optimizer.zero_grad()
        told.backward()
        optimizer.step()
    assert told.item() < 0.3 < math.log(2) / 2

    def as_teacher() -> float:
        return (judges[0](student)[:, 1] - judges[0](student)[:, 0]).mean().item()

    for weight, sign in ((-1.0, 1), (1.0, -1)):  # reversed, cooperative
        (gradient,) = torch.autograd.grad(judges.losses([student], [teacher], [weight])[0], student)
        before = as_teacher()
        with torch.no_grad():
            student -= gradient
        assert sign * (as_teacher() - before) > 0
    (lie,) = judges.deceived([student])
    (gradient,) = torch.autograd.grad(lie, student)
    before = as_teacher()
    with torch.no_grad():
        student -= gradient
    assert as_teacher() > before


def test_deceiving_trains_the_student_alone() -> None:
    judges, s = Judges([5]), torch.randn(4, 5, requires_grad=True)
    (lie,) = judges.deceived([s])
    torch.testing.assert_close(lie, telling(judges[0](s), torch.ones(4, dtype=torch.bool)))
    lie.backward()
    assert s.grad is not None and all(p.grad is None for p in judges.parameters())


# A whole step, by hand ----------------------------------------------------------------------------------------------


def by_hand(adversary: str, x: Tensor, eta: float = 0.3, rate: float = 0.05) -> nn.Module:
    """One plain gradient step of the whole method, with nothing of `distil` but its pieces."""
    student, teacher = tiny(1), tiny(2).eval()
    sizes = [49, 9, 3]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judges = Judges(sizes if adversary != "none" else [])

    def three(network: Tiny) -> list[Tensor]:
        one = network.one(x)
        two = network.two(one)
        return [one.flatten(2).mean(1), two.flatten(2).mean(1), network.head(two.mean((2, 3)))]

    ours = three(student)
    with torch.no_grad():
        theirs = three(teacher)
    gamma = [0.5, 0.25, 2.0]
    near = sum(
        g * -(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean() for g, s, t in zip(gamma, ours, theirs, strict=True)
    )
    parameters = list(student.parameters())
    found = list(torch.autograd.grad(near, parameters, retain_graph=True))
    if adversary in ("grl", "cooperative"):
        told = sum(
            telling(judge(torch.cat([s, t])), torch.arange(2 * len(x)) >= len(x))
            for judge, s, t in zip(judges, ours, theirs, strict=True)
        )
        sign = -1 if adversary == "grl" else 1
        more = torch.autograd.grad(told, parameters)
        found = [a + sign * eta * b for a, b in zip(found, more, strict=True)]
    if adversary == "alternating":
        told = sum(judges.losses([s.detach() for s in ours], theirs))
        steps = torch.autograd.grad(told, list(judges.parameters()))
        with torch.no_grad():
            for p, g in zip(judges.parameters(), steps, strict=True):
                p -= 0.2 * g
        lies = sum(telling(j(s), torch.ones(len(x), dtype=torch.bool)) for j, s in zip(judges, ours, strict=True))
        found = [a + eta * b for a, b in zip(found, torch.autograd.grad(lies, parameters), strict=True)]
    with torch.no_grad():
        for p, g in zip(parameters, found, strict=True):
            p -= rate * g
    return student


PLAIN = {"epochs": 1, "schedule": "constant", "momentum": 0.0, "weight_decay": 0.0, "ramp": 0.0, "learning_rate": 0.05}


@pytest.mark.parametrize("adversary", ["grl", "cooperative", "alternating", "none"])
def test_one_step_is_what_the_formulas_say(adversary: str) -> None:
    batches, student = some_batches(1), tiny(1)
    distil(
        student, [tiny(2)], batches, taps=["one", "two"], run=CPU, adversary=adversary, eta=(0.3,),
        gamma=(0.5, 0.25, 2.0), discriminator_rate=0.2, **PLAIN,
    )  # fmt: skip
    expected = by_hand(adversary, batches[0][0])
    for (name, a), b in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_the_ramp_begins_at_nothing_and_the_mean_of_one_teacher_is_that_teacher() -> None:
    batches, found = some_batches(1), []
    for settings in ({"adversary": "none"}, {"ramp": 1.0}, {"adversary": "none", "teacher": "mean"}):
        student = tiny(1)
        distil(student, [tiny(2)], batches, taps=["one"], run=CPU, **{**PLAIN, **settings})
        found.append(student)
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_the_ramp_grows_evenly_to_the_share_of_steps_also_over_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    losses = Judges.losses

    def watched(self: Judges, s: Any, t: Any, weights: Any = ()) -> Any:
        seen.append(list(weights))
        return losses(self, s, t, weights)

    monkeypatch.setattr(Judges, "losses", watched)
    settings: dict[str, Any] = {"taps": ["one"], "epochs": 3, "eta": (0.2, 0.4), "ramp": 0.5}
    whole = distil(tiny(1), [tiny(2)], some_batches(4), run=CPU, **settings)
    grown = [min(1, n / 6) for n in range(12)]
    assert seen == [pytest.approx([-0.2 * g, -0.4 * g]) for g in grown]
    seen.clear()
    distil(tiny(1), [tiny(2)], some_batches(4), run=Run(tmp_path, device="cpu", max_seconds=0.0), **settings)
    assert len(seen) == 4
    rest = distil(tiny(9), [tiny(2)], some_batches(4), run=Run(tmp_path, device="cpu", resume=True), **settings)
    assert seen == [pytest.approx([-0.2 * g, -0.4 * g]) for g in grown] and same(whole.student, rest.student)


def test_the_mean_teacher_is_the_mean_of_softmaxes_and_of_taps() -> None:
    batches, student, teachers = some_batches(1), tiny(1), [tiny(2).eval(), tiny(3, width=6).eval()]
    reference, (x, _) = copy.deepcopy(student), batches[0]
    distil(student, teachers, batches, taps=["one"], run=CPU, adversary="none", teacher="mean", **PLAIN)
    with torch.no_grad():
        tap = torch.stack([t.one(x).flatten(2).mean(1) for t in teachers]).mean(0).softmax(-1)
        chance = torch.stack([t(x).softmax(-1) for t in teachers]).mean(0)
    ours = reference.one(x)
    logits = reference.head(reference.two(ours).mean((2, 3)))
    loss = -(tap * ours.flatten(2).mean(1).log_softmax(-1)).sum(-1).mean()
    loss = loss - (chance * logits.log_softmax(-1)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    for p, g, found in zip(reference.parameters(), gradients, student.parameters(), strict=True):
        torch.testing.assert_close(found, p - 0.05 * g, rtol=1e-5, atol=1e-6)


# Exact statements of the method -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adversary", ["grl", "alternating"])
def test_labels_are_not_read_and_teachers_stay_as_they_were(adversary: Any) -> None:
    batches, teachers = some_batches(), [tiny(2).train(), tiny(3, width=6).eval()]
    before = [copy.deepcopy(teacher) for teacher in teachers]
    shuffled = [(x, y.flip(0)) for x, y in batches]
    without = [x for x, _ in batches]
    found = []
    for given in (batches, shuffled, without):
        student = tiny(1)
        distil(student, teachers, given, taps=["one", "two"], epochs=2, run=CPU, adversary=adversary)
        found.append(student)
    assert same(found[0], found[1]) and same(found[0], found[2])
    for teacher, was in zip(teachers, before, strict=True):
        assert same(teacher, was)  # batch norm statistics among them
        assert teacher.training == was.training and teacher.one.training == was.one.training
        assert not any(module._forward_hooks for module in teacher.modules())
    assert not any(module._forward_hooks for module in found[0].modules()) and not found[0].training


def test_labels_have_the_share_they_are_given() -> None:
    (x, y), student, teacher = some_batches(1)[0], tiny(1), tiny(2)
    reference = copy.deepcopy(student)
    distil(student, [teacher], [(x, y)], run=CPU, adversary="none", label_weight=0.25, **PLAIN)
    with torch.no_grad():
        target = teacher.eval()(x)
    logits = reference(x)
    loss = 0.75 * similarity(logits, target) + 0.25 * F.cross_entropy(logits, y)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    for p, g, found in zip(reference.parameters(), gradients, student.parameters(), strict=True):
        torch.testing.assert_close(found, p - 0.05 * g, rtol=1e-5, atol=1e-6)


def test_one_seed_draws_one_sequence_of_teachers_whatever_else_is_set() -> None:
    batches, teachers = some_batches(8), [tiny(2), tiny(3), tiny(4)]

    def taught(**settings: Any) -> tuple[int, ...]:
        seed = settings.pop("seed", 0)
        run = Run(device="cpu", seed=seed)
        return distil(tiny(1), teachers, batches, epochs=5, run=run, **settings).report.drawn

    first = taught()
    assert sum(first) == 40 and min(first) > 3  # uniform: 13 on average
    assert taught(adversary="none") == first == taught(taps=["one"])
    assert taught(seed=1) != first
    assert taught(teacher="mean") == (40, 40, 40)


def test_copies_of_one_teacher_are_that_teacher() -> None:
    batches, found = some_batches(4), []
    for count in (1, 3):
        student = tiny(1)
        distil(student, [copy.deepcopy(tiny(2)) for _ in range(count)], batches, taps=["one"], epochs=3, run=CPU)
        found.append(student)
    assert same(*found)


def test_the_random_state_outside_is_left_alone() -> None:
    pictures = torch.utils.data.TensorDataset(torch.randn(12, 1, 7, 7), torch.randint(0, 3, (12,)))
    loader = torch.utils.data.DataLoader(pictures, batch_size=4, shuffle=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = distil(tiny(1), [tiny(2)], loader, epochs=2, run=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert same(one.student, distil(tiny(1), [tiny(2)], loader, epochs=2, run=CPU).student)


def test_a_stopped_run_goes_on_to_the_same_student(tmp_path: Path) -> None:
    batches, teachers = some_batches(), [tiny(2), tiny(3)]
    settings: dict[str, Any] = {"taps": ["one"], "schedule": "constant", "ramp": 0.0}
    whole = distil(tiny(1), teachers, batches, epochs=4, run=CPU, **settings)
    distil(tiny(1), teachers, batches, epochs=2, run=Run(tmp_path, device="cpu"), **settings)
    rest = distil(tiny(9), teachers, batches, epochs=4, run=Run(tmp_path, device="cpu", resume=True), **settings)
    assert same(whole.student, rest.student)
    assert whole.report.drawn == rest.report.drawn


def test_the_student_is_saved_and_loaded_alone(tmp_path: Path) -> None:
    student = distil(tiny(1), [tiny(2)], some_batches(), taps=["one"], epochs=1, run=CPU).student
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    state = load_file(tmp_path / "student.safetensors")
    assert state.keys() == tiny(1).state_dict().keys()
    loaded = tiny(5)
    loaded.load_state_dict(state)
    x = some_batches(1)[0][0]
    assert torch.equal(loaded.eval()(x), student(x))


# It learns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adversary", ["grl", "alternating", "none"])
def test_a_student_of_identical_teachers_approaches_them(adversary: Any) -> None:
    train, valid, _ = parts(drawn(n_train=400, n_test=60), n_valid=60)
    batches = PictureBatches(train)
    torch.manual_seed(0)
    teacher = SmallNet(4, (6, 8, 8))
    train_on_labels(teacher, batches, epochs=4, run=CPU)
    torch.manual_seed(1)
    student = SmallNet(4, (6, 8, 8))
    before = float(kl(answers(student, valid.x), answers(teacher, valid.x)))
    made = distil(
        student, [teacher, copy.deepcopy(teacher)], batches, taps=BLOCKS, epochs=8, run=CPU, adversary=adversary
    )
    after = float(kl(answers(student, valid.x), answers(teacher, valid.x)))
    assert after < 0.15 * before
    agree = (answers(student, valid.x).argmax(1) == answers(teacher, valid.x).argmax(1)).float().mean()
    assert float(agree) > 0.8
    assert made.report.lengths == (64, 16, 4, 4)
    history = made.report.history
    assert history[-1]["kl"] < history[0]["kl"] and history[-1]["similarity"] < history[0]["similarity"]


def test_validation_chooses_the_epoch() -> None:
    train, valid, _ = parts(drawn(n_train=200, n_test=60), n_valid=60)
    torch.manual_seed(0)
    made = distil(SmallNet(4), [SmallNet(4)], PictureBatches(train), epochs=3, validate=watching(valid), run=CPU)
    values = [row["accuracy"] for row in made.report.history]
    assert made.report.best_value == max(values)
    assert float(right(made.student, valid).float().mean()) == pytest.approx(max(values))


# Any network --------------------------------------------------------------------------------------------------------


def test_networks_that_give_lists_objects_or_sequences() -> None:
    class Lists(Tiny):
        def forward(self, x: Tensor) -> Any:
            one = self.one(x)
            two = self.two(one)
            return [one, two, self.head(two.mean((2, 3)))]

    class Objects(Tiny):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(x), auxiliary=x)

    student = Lists()
    made = distil(student, [Lists(), Lists(width=7)], some_batches(), epochs=1, run=CPU)
    assert made.report.lengths == (49, 9, 3)
    made = distil(Objects(), [tiny(2)], some_batches(), taps=["one"], epochs=1, run=CPU)
    assert made.report.lengths == (49, 3)
    assert outputs(SimpleNamespace(logits=1))[0] == 1
    recurrent = nn.Sequential()
    recurrent.rnn = nn.GRU(7, 5, batch_first=True)

    class Reads(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(7, size, batch_first=True), nn.Linear(size, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])

    made = distil(Reads(5), [Reads(8)], some_batches(), taps=["rnn"], lengths=[5], epochs=1, run=CPU)
    assert made.report.lengths == (5, 3)


def test_taps_of_different_names_and_sizes() -> None:
    other = nn.Sequential(
        nn.Conv2d(1, 9, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(9, 2, 3)), nn.Flatten(), nn.Linear(18, 3)
    )
    with pytest.warns(UserWarning, match="tap 1 of teacher 2 has 25 positions, repeated to 49"):
        made = distil(
            tiny(1), [tiny(2), other], some_batches(), taps=["one", "two"],
            teacher_taps=[["one", "two"], ["0", "1"]], epochs=1, run=CPU,
        )  # fmt: skip
    assert made.report.lengths == (49, 9, 3)


def test_a_tap_is_what_the_module_gave() -> None:
    network, x = tiny(1).eval(), some_batches(1)[0][0]
    with Tapped(network, ["one", "two"]) as tapped:
        one, two, logits = tapped(x)
    assert torch.equal(one, network.one(x)) and torch.equal(two, network.two(one)) and torch.equal(logits, network(x))
    assert not any(module._forward_hooks for module in network.modules())


# What is refused ----------------------------------------------------------------------------------------------------


class Broken(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0 * 0


class Idle(Tiny):
    """Has a module that it does not run."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(49, 3)(x.flatten(1))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("there is no teacher", {"teachers": []}),
    ("teacher 2 knows 5 classes and the student 3", {"teachers": [Tiny(), Tiny(5)]}),
    ("the student has no module 'won' to tap", {"taps": ["won"]}),
    ("teacher 1 has no module 'blocks.0'", {"taps": ["one"], "teacher_taps": [["blocks.0"]]}),
    ("the student has 2 taps and teacher 1 has 1", {"taps": ["one", "two"], "teacher_taps": [["one"]]}),
    ("taps for 2", {"teacher_taps": [["one"], ["one"]]}),
    ("gamma has 3 values for 1 taps and the logits", {"taps": ["one"], "gamma": (1.0, 1.0, 1.0)}),
    ("eta has 2 values for 2 taps and the logits", {"taps": ["one", "two"], "eta": (1.0, 1.0)}),
    ("lengths are [4] for 2 taps", {"taps": ["one", "two"], "lengths": [4]}),
    ("teacher 1 cannot read inputs of the shape (6, 1, 7, 7)", {"teachers": [Tiny(channels=3)]}),
    ("teacher 1 does not run its module 'two'", {"teachers": [Idle()], "taps": ["two"]}),
    ("no labels to learn from", {"batches": [torch.randn(6, 1, 7, 7)], "label_weight": 0.5}),
    ("cannot be passed over again", {"batches": iter(some_batches())}),
    ("there are no batches", {"batches": []}),
]


@pytest.mark.parametrize(("says", "given"), REFUSED, ids=[says for says, _ in REFUSED])
def test_it_refuses(says: str, given: dict[str, Any]) -> None:
    arguments = {"teachers": [tiny(2)], "batches": some_batches(), "epochs": 1, "run": CPU, **given}
    student = tiny(1)
    before = copy.deepcopy(student)
    with pytest.raises(ConfigError) as caught:
        distil(student, arguments.pop("teachers"), arguments.pop("batches"), **arguments)
    assert says in caught.value.what
    assert same(student, before)
    assert not any(module._forward_hooks for module in student.modules())


def test_near_names_are_suggested() -> None:
    with pytest.raises(ConfigError, match="blocks") as caught:
        Tapped(SmallNet(3), ["block.0"])
    assert "blocks.0" in (caught.value.hint or "")


def test_a_student_does_not_share_weights_with_a_teacher() -> None:
    student, ensemble = tiny(1), Ensemble([tiny(2), tiny(3)])
    for k, teachers in ((1, [student]), (2, [tiny(3), Ensemble([student])])):
        with pytest.raises(ConfigError, match=f"weights of teacher {k}"):
            distil(student, teachers, some_batches(), run=CPU)
    distil(student, [ensemble], some_batches(), epochs=1, run=CPU)


def test_a_teacher_without_numbers_is_named() -> None:
    with pytest.raises(TrainingError, match=r"teacher 2 \(Broken\) gave a value that is not a finite number"):
        distil(tiny(1), [tiny(2), Broken()], some_batches(), epochs=3, run=CPU)


def test_an_empty_batch_a_single_class_and_a_student_that_is_not_trained() -> None:
    with pytest.raises(TrainingError, match="a batch has no inputs"):
        distil(tiny(1), [tiny(2)], [*some_batches(1), torch.empty(0, 1, 7, 7)], epochs=1, run=CPU)
    with pytest.raises(ConfigError, match="a single class"):
        distil(tiny(1, classes=1), [tiny(2, classes=1)], some_batches(), epochs=1, run=CPU)
    with pytest.raises(ConfigError, match="no parameter that is trained"):
        distil(tiny(1).requires_grad_(False), [tiny(2)], some_batches(), epochs=1, run=CPU)
    with pytest.raises(ConfigError, match="no networks"):
        Ensemble([])


@pytest.mark.parametrize("change", [lambda y: y + 3, lambda y: y.float(), lambda y: y[:2]], ids=["range", "type", "n"])
def test_labels_that_do_not_fit_are_told(change: Any) -> None:
    batches = [(x, change(y)) for x, y in some_batches()]
    for learn in (
        lambda: train_on_labels(tiny(1), batches, epochs=1, run=CPU),
        lambda: distil(tiny(1), [tiny(2)], batches, epochs=1, run=CPU, label_weight=0.5),
    ):
        with pytest.raises(ConfigError, match=r"labels do not fit logits \(6, 3\)"):
            learn()
    distil(tiny(1), [tiny(2)], batches, epochs=1, run=CPU)  # not read


def test_a_batch_of_one_needs_no_batch_norm() -> None:
    batches = [*some_batches(2), (torch.randn(1, 1, 7, 7), torch.zeros(1, dtype=torch.long))]
    with pytest.raises(TrainingError, match="batch of one") as caught:
        distil(tiny(1), [tiny(2)], batches, epochs=1, run=CPU)
    assert "drop" in (caught.value.hint or "")
    with pytest.raises(TrainingError, match=r"one\.1"):
        train_on_labels(tiny(1), batches, epochs=1, run=CPU)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(49, 3))
    distil(plain, [tiny(2)], batches, epochs=1, run=CPU)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="label_weight"):
        DistilConfig(label_weight=1.5)
    with pytest.raises(ConfigError, match="adversary"):
        DistilConfig(adversary="friendly")


# Pieces for pictures ------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    onecycle, cosine, steps = (factor(name, 100) for name in ("onecycle", "cosine", "steps"))
    assert onecycle and cosine and steps and factor("constant", 100) is None
    values = [onecycle(step) for step in range(100)]
    assert values[0] == pytest.approx(0.04) and max(values) == pytest.approx(1) == values[30] and values[-1] < 0.01
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torch.optim.lr_scheduler.CosineAnnealingLR(reference, 100)
    assert [cosine(0), cosine(50), cosine(100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert [round(steps(s), 4) for s in (0, 42, 43, 71, 72, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_noise_redraws_the_share_it_says() -> None:
    y = torch.zeros(10_000, dtype=torch.long)
    noisy = with_noise(y, 0.4, 10, seed=3)
    changed = float((noisy != y).float().mean())
    assert changed == pytest.approx(0.36, abs=0.01)  # a tenth of those drawn anew stay
    assert torch.equal(noisy, with_noise(y, 0.4, 10, seed=3)) and int(noisy.max()) == 9
    assert torch.equal(with_noise(y, 0.0, 10), y)


def test_picture_batches_shift_and_mirror_each_picture() -> None:
    train, _, _ = parts(drawn(n_train=130, n_test=10), n_valid=1)
    batches = as_batches(PictureBatches(train, 64))
    assert len(batches) == 2  # the one picture left over is dropped
    plain = PictureBatches(train, 64, shift=0, flip=False)
    seen = torch.cat([x for x, _ in plain.epoch(np.random.default_rng(0), 0, 1)])
    assert len(seen) == 128 and all((train.x == x).flatten(1).all(1).any() for x in seen)
    padded = F.pad(train.x, (2,) * 4, value=float(train.x.min()))
    views = [
        v
        for dy in range(5)
        for dx in range(5)
        for w in [padded[:, :, dy : dy + 16, dx : dx + 16]]
        for v in (w, w.flip(3))
    ]
    order = np.random.default_rng(0).permutation(129)
    ways = set()
    for b, (x, y) in enumerate(batches.epoch(np.random.default_rng(0), 0, 1)):
        for row, at in enumerate(order[64 * b : 64 * b + 64]):
            found = [n for n, view in enumerate(views) if torch.equal(view[at], x[row])]
            assert found and y[row] == train.y[at]
            ways.add(found[0])
    assert len(ways) > 30


def test_parts_are_apart_and_normalised_by_training() -> None:
    train, valid, test = parts(drawn(n_train=100, n_test=50), n_valid=30, seed=4)
    assert (len(train.y), len(valid.y), len(test.y)) == (70, 30, 50)
    assert float(train.x.mean()) == pytest.approx(0, abs=1e-5) and float(train.x.std()) == pytest.approx(1, abs=1e-3)
    assert not any((train.x == x).flatten(1).all(1).any() for x in valid.x)


def test_common_lengths_leave_networks_as_they_were() -> None:
    student, batches = tiny(1).train(), as_batches(some_batches())
    before = copy.deepcopy(student)
    assert common_lengths(Tapped(student), [Tapped(tiny(2))], batches, None) == [3]
    assert same(student, before) and student.training


def test_training_on_labels_learns() -> None:
    train, valid, _ = parts(drawn(n_train=300, n_test=60), n_valid=60)
    torch.manual_seed(0)
    network = SmallNet(4, (6, 8, 8), residual=True)
    batches = PictureBatches(train, flip=False)
    report = train_on_labels(network, batches, config=SGDConfig(epochs=8), run=CPU, validate=watching(valid))
    assert report.history[-1]["labels"] < 0.5 * report.history[0]["labels"]
    assert float(right(network, train).float().mean()) > 0.7
    assert report.best_value == pytest.approx(watching(valid)(network)["accuracy"])
