"""Averaging, Task Arithmetic and TIES: against tensors worked out by hand, and what every merge owes its inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vouch.errors import ConfigError, DataError
from vouch.merging.arithmetic import average, task_arithmetic
from vouch.merging.states import Family
from vouch.merging.ties import Trimmed, kth_magnitude, ties

State = dict[str, Tensor]


def made(seed: int, models: int = 3, scale: float = 0.1) -> tuple[State, list[State]]:
    """A base and models near it, with tensors of 2, 1 and 0 dimensions."""
    g = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=g) for name, shape in {"w": (4, 3), "b": (3,), "s": ()}.items()}
    return base, [
        {name: x + scale * torch.randn(x.shape, generator=g) for name, x in base.items()} for _ in range(models)
    ]


def flat(state: State) -> np.ndarray:
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(state.items())]).numpy()


def same(left: State, right: State, atol: float = 1e-6) -> None:
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0)


def test_task_arithmetic_by_hand() -> None:
    base = {"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(-1.0)}
    one = {"w": torch.tensor([2.0, 2.0, 1.0]), "b": torch.tensor(0.0)}
    two = {"w": torch.tensor([1.0, 6.0, 2.0]), "b": torch.tensor(-2.0)}
    found = task_arithmetic(base, [one, two], 0.5)
    assert found["w"].tolist() == [1.5, 4.0, 1.5] and found["b"].item() == -1.0
    found = task_arithmetic(base, {"one": one, "two": two}, {"two": 1.0, "one": 0.25})
    assert found["w"].tolist() == [1.25, 6.0, 1.5] and found["b"].item() == -1.75
    by_layer = task_arithmetic(base, [one, two], {"w": [1.0, 0.0], "b": [0.0, 0.5]})
    assert by_layer["w"].tolist() == [2.0, 2.0, 1.0] and by_layer["b"].item() == -1.5


def test_coefficients_at_the_ends() -> None:
    base, models = made(0)
    same(task_arithmetic(base, models, 0.0), base, atol=0)
    for k, model in enumerate(models):
        same(task_arithmetic(base, models, [float(j == k) for j in range(3)]), model)
    same(task_arithmetic(base, models[:1], 1.0), models[0])
    same(task_arithmetic(base, models, 1 / 3), average(models))
    rows = {name: [0.1, 0.7, 0.4] for name in base}
    same(task_arithmetic(base, models, [0.1, 0.7, 0.4]), task_arithmetic(base, models, rows), atol=0)


def test_a_model_merged_with_itself_is_itself() -> None:
    base, (model, *_) = made(1)
    same(average([model, model, model]), model)
    same(average([model] * 4), model, atol=0)
    same(task_arithmetic(model, [model, model], 0.3), model, atol=0)
    same(task_arithmetic(base, [model, model], 0.5), model)
    same(ties(model, [model, model]), model, atol=0)
    same(ties(base, [model, model], keep=1.0, merge="mean"), model)


def test_averages_have_weights() -> None:
    _, models = made(2, 2)
    same(average(models, weights=[3, 1]), {name: (3 * models[0][name] + models[1][name]) / 4 for name in models[0]})
    same(average(models, weights=[1, 0]), models[0], atol=0)
    for weights in ([0, 0], [1, -1], [1], [1, math.nan]):
        with pytest.raises(ConfigError):
            average(models, weights=weights)


def test_ties_by_hand() -> None:
    """Ten entries, keep 40 %: the sixth smallest magnitude of each is its threshold, and its equals stay."""
    base = {"w": torch.zeros(10)}
    one = {"w": torch.tensor([5.0, -4.0, 3.0, 3.0, 3.0, 0.1, 0.2, 0.0, -0.3, 0.1])}
    two = {"w": torch.tensor([-2.0, -6.0, 1.0, 9.0, -3.0, 0.5, 7.0, 0.1, 0.2, 0.3])}
    # sixth smallest of one: 0 .1 .1 .2 .3 [3] 3 3 4 5; of two: .1 .2 .3 .5 1 [2] 3 6 7 9
    kept_one = [5.0, -4, 3, 3, 3, 0, 0, 0, 0, 0]
    kept_two = [-2.0, -6, 0, 9, -3, 0, 7, 0, 0, 0]
    # sums: 3 -10 3 12 0 0 7 0 0 0: signs + - + + 0 0 + 0 0 0, mostly +, so that 0 becomes +
    agreed_one = [5.0, -4, 3, 3, 3, 0, 0, 0, 0, 0]
    agreed_two = [0.0, -6, 0, 9, 0, 0, 7, 0, 0, 0]
    trimmed = Trimmed(Family([one, two], base, max_distance=None), 0.4)
    assert trimmed.threshold_K.tolist() == [3, 2] and trimmed.majority == 1
    tau = torch.stack([one["w"], two["w"]])
    assert trimmed._trim(tau).tolist() == [kept_one, kept_two]
    assert trimmed.agreed(tau).tolist() == [agreed_one, agreed_two]
    assert ties(base, [one, two], 1.0, keep=0.4)["w"].tolist() == [5, -10, 3, 12, 3, 0, 7, 0, 0, 0]
    assert ties(base, [one, two], keep=0.4, merge="mean")["w"].tolist() == [5, -5, 3, 6, 3, 0, 7, 0, 0, 0]
    torch.testing.assert_close(ties(base, [one, two], keep=0.4)["w"], 0.3 * ties(base, [one, two], 1, keep=0.4)["w"])


def reference(base: State, models: list[State], weight: float, keep: float, merge: str) -> np.ndarray:
    """TIES on whole vectors, by sorting."""
    zero = flat(base).astype(np.float32)
    tau = np.stack([flat(model).astype(np.float32) - zero for model in models])
    d = tau.shape[1]
    bar = np.sort(np.abs(tau), axis=1)[:, max(0, d - math.floor(keep * d) - 1)]
    tau = np.where(np.abs(tau) >= bar[:, None], tau, 0)
    sign = np.sign(tau.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    tau = np.where(np.sign(tau) == sign, tau, 0)
    total = tau.sum(0)
    if merge == "mean":
        total = total / np.maximum((tau != 0).sum(0), 1)
    return zero + weight * total


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.sampled_from(["sum", "mean"]), st.integers(1, 4))
def test_ties_is_that_of_whole_vectors(seed: int, keep: float, merge: str, models: int) -> None:
    base, others = made(seed, models)
    if seed % 3 == 0:  # many equal magnitudes, and votes that cancel
        base = {name: torch.zeros_like(x) for name, x in base.items()}
        others = [{name: (10 * x).round().clamp(-2, 2) for name, x in each.items()} for each in made(seed, models)[1]]
    found = ties(base, others, 0.7, keep=keep, merge=merge, max_distance=None)
    np.testing.assert_allclose(flat(found), reference(base, others, 0.7, keep, merge), atol=1e-6)


def test_invariants_of_ties() -> None:
    base, models = made(3)
    positive = [{name: base[name] + (model[name] - base[name]).abs() for name in base} for model in models]
    same(ties(base, positive, 1.0, keep=1.0), task_arithmetic(base, positive, 1.0))
    trimmed = Trimmed(Family(models, base), 0.3)
    for name in base:
        tau = trimmed.family.vectors(name)
        phi = trimmed.agreed(tau)
        assert bool(((phi == 0) | (phi == tau)).all())
        assert not bool(((phi > 0).any(0) & (phi < 0).any(0)).any())
        torch.testing.assert_close(base[name] + phi.sum(0), ties(base, models, 1.0, keep=0.3)[name])
    alone = ties(base, models[:1], 1.0, keep=0.25)
    moved = np.abs(flat(alone) - flat(base))
    changed, tau = moved > 0, np.abs(flat(models[0]) - flat(base))
    assert changed.sum() == 5 and tau[changed].min() > tau[~changed].max()  # floor(16 / 4) and the threshold itself


@settings(max_examples=40)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40), st.integers(0, 39))
def test_the_threshold_is_the_kth_magnitude(values: list[float], k: int) -> None:
    k = k % len(values)
    for dtype in (torch.float32, torch.float64):
        base, model = {"w": torch.zeros(len(values), dtype=dtype)}, {"w": torch.tensor(values, dtype=dtype)}
        (found,) = kth_magnitude(Family([model], base, max_distance=None), k + 1)
        assert found.item() == sorted(model["w"].abs().tolist())[k]


@pytest.mark.parametrize("method", [average, lambda m: task_arithmetic(B, m), lambda m: ties(B, m)])
def test_order_does_not_matter(method) -> None:
    _, models = made(5)
    same(method(models), method(models[::-1]))


B = made(5)[0]


def test_what_cannot_be_done_says_so() -> None:
    base, models = made(4)
    for keep in (0.0, 1.5):
        with pytest.raises(ConfigError, match=str(keep)):
            ties(base, models, keep=keep)
    with pytest.raises(ConfigError, match="'median'"):
        ties(base, models, merge="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 weights for 3 models"):
        task_arithmetic(base, models, [0.1, 0.2])
    with pytest.raises(ConfigError, match="'s'"):
        task_arithmetic(base, models, {"w": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]})
    with pytest.raises(ConfigError, match="finite"):
        task_arithmetic(base, models, math.inf)
    with pytest.raises(DataError, match="does not seem to descend"):
        task_arithmetic(base, [made(99)[0]], 0.3)
    for method in (task_arithmetic, ties):
        with pytest.raises(ConfigError, match="there is no base"):
            method(None, models)  # type: ignore[arg-type]
