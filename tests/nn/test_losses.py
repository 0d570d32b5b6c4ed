"""The losses against their formulas, PyTorch's own, and each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vouch.nn import losses

T, N, D = 23, 31, 6
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def vectors(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=DOUBLE)).requires_grad_()


def same_gradient(first: Callable[[], Tensor], second: Callable[[], Tensor], *inputs: Tensor) -> None:
    """Two losses agree, and so do their gradients."""
    a, b = first(), second()
    torch.testing.assert_close(a, b)
    for x, y in zip(torch.autograd.grad(3 * a, inputs), torch.autograd.grad(3 * b, inputs), strict=True):
        torch.testing.assert_close(x, y)


# Pairs ----------------------------------------------------------------------------------------------------------


def test_pairwise_losses_by_brute_force() -> None:
    positive, negative = vectors(T), vectors(T, 3)
    bpr = bce = top1 = bpr_max = 0.0
    for t in range(T):
        s, others = positive[t].item(), negative[t].tolist()
        sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
        bpr += sum(-math.log(sigmoid(s - x)) for x in others) / 3 / T
        bce += (-math.log(sigmoid(s)) - sum(math.log(1 - sigmoid(x)) for x in others)) / T
        top1 += sum(sigmoid(x - s) + sigmoid(x * x) for x in others) / 3 / T
        share = [math.exp(x) / sum(map(math.exp, others)) for x in others]
        above = -math.log(sum(p * sigmoid(s - x) for p, x in zip(share, others, strict=True)))
        bpr_max += (above + 0.5 * sum(p * x * x for p, x in zip(share, others, strict=True))) / T
    assert float(losses.bpr(positive, negative)) == pytest.approx(bpr, abs=1e-12)
    assert float(losses.bce(positive, negative)) == pytest.approx(bce, abs=1e-12)
    assert float(losses.top1(positive, negative)) == pytest.approx(top1, abs=1e-12)
    assert float(losses.bpr_max(positive, negative, penalty=0.5)) == pytest.approx(bpr_max, abs=1e-12)


def test_one_negative_may_come_without_an_axis() -> None:
    positive, negative = vectors(T), vectors(T)
    for loss in (losses.bpr, losses.bce):
        torch.testing.assert_close(loss(positive, negative), loss(positive, negative.unsqueeze(-1)))


def test_gbce_without_calibration_is_bce() -> None:
    positive, one, many = vectors(T), vectors(T, 1), vectors(T, 5)
    torch.testing.assert_close(losses.gbce(positive, one, n_items=N, calibration=0.0), losses.bce(positive, one) / 2)
    torch.testing.assert_close(losses.gbce(positive, many, n_items=N, calibration=0.0), losses.bce(positive, many) / 6)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("k", [1, 7, N - 1])
def test_gbce_gradient_by_the_formula(t: float, k: int) -> None:
    """d/ds+ = -beta (1 - sigmoid(s+)) / (k + 1), d/ds_j = sigmoid(s_j) / (k + 1), averaged over targets."""
    positive, negative = vectors(T), vectors(T, k)
    at_positive, at_negative = torch.autograd.grad(
        losses.gbce(positive, negative, n_items=N, calibration=t), (positive, negative)
    )
    alpha = k / (N - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    torch.testing.assert_close(at_positive, -beta * (1 - torch.sigmoid(positive)) / (k + 1) / T)
    torch.testing.assert_close(at_negative, torch.sigmoid(negative) / (k + 1) / T)


def test_calibrated_gbce_finds_the_probability() -> None:
    """With t = 1 the minimiser's sigmoid is the true probability, however few negatives are drawn."""
    p, k = 0.02, 4
    alpha = k / (N - 1)
    far = torch.tensor([-torch.inf], dtype=DOUBLE)

    def slope(probability: float) -> float:
        """Of the expected loss: the item is the positive in a share p of targets, a negative in alpha of the others."""
        score = torch.tensor([math.log(probability / (1 - probability))], dtype=DOUBLE, requires_grad=True)
        taken = losses.gbce(score, far.expand(1, k), n_items=N, calibration=1.0)
        drawn = losses.gbce(-far, torch.cat([score, far.expand(k - 1)]).view(1, k), n_items=N, calibration=1.0)
        return float(torch.autograd.grad(p * taken + (1 - p) * alpha * drawn, score)[0])

    assert slope(p) == pytest.approx(0, abs=1e-12)
    assert slope(p / 2) < -1e-4 and slope(2 * p) > 1e-4


def test_gbce_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        losses.gbce(torch.zeros(1), torch.zeros(1, 1), n_items=5, calibration=1.5)
    with pytest.raises(ValueError, match="n_items is 1"):
        losses.gbce(torch.zeros(1), torch.zeros(1, 1), n_items=1, calibration=0.5)


PAIRWISE = {
    "bpr": losses.bpr,
    "bce": losses.bce,
    "top1": losses.top1,
    "bpr_max": losses.bpr_max,
    "gbce": lambda p, n, weight=None: losses.gbce(p, n, n_items=50, calibration=0.75, weight=weight),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_masked_negatives_do_not_count(name: str) -> None:
    """A negative of -inf gives no gradient, and leaves what the others give alone (up to the number of negatives)."""
    loss = PAIRWISE[name]
    positive, negative = vectors(T), vectors(T, 3)
    masked = torch.cat([negative, torch.full((T, 1), -torch.inf, dtype=DOUBLE)], dim=1).detach().requires_grad_()
    at_positive, at_masked = torch.autograd.grad(loss(positive, masked), (positive, masked))
    expected = torch.autograd.grad(loss(positive, negative), (positive, negative))
    ratio = {"bpr": 3 / 4, "gbce": None}.get(name, 1.0)
    assert torch.isfinite(at_positive).all() and (at_masked[:, 3] == 0).all()
    if ratio is not None:
        torch.testing.assert_close(at_positive, ratio * expected[0])
        torch.testing.assert_close(at_masked[:, :3], ratio * expected[1])


@pytest.mark.parametrize("name", PAIRWISE)
def test_all_negatives_masked(name: str) -> None:
    positive, negative = vectors(T), torch.full((T, 2), -torch.inf, dtype=DOUBLE, requires_grad=True)
    loss = PAIRWISE[name](positive, negative)
    gradient = torch.autograd.grad(loss, (positive, negative))
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_extremes_stay_finite(name: str) -> None:
    positive = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    negative = torch.tensor([[1e4, -1e4], [1e4, 1e4], [-1e4, 1e4]], requires_grad=True)
    loss = PAIRWISE[name](positive, negative)
    gradient = torch.autograd.grad(loss, (positive, negative))
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradient)
    assert gradient[0][0] < 0 or name == "top1"  # a lost pair still pulls; TOP1 saturates


# Softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_cells", [1, 5 * N, 1 << 25])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_is_torch_s(max_cells: int, with_bias: bool) -> None:
    hidden, items, target = vectors(T, D), vectors(N, D), torch.randint(0, N, (T,))
    bias = vectors(N) if with_bias else None
    same_gradient(
        lambda: losses.cross_entropy(hidden, items, target, bias=bias, max_cells=max_cells),
        lambda: F.cross_entropy(F.linear(hidden, items, bias), target),
        *([hidden, items] if bias is None else [hidden, items, bias]),
    )


def test_cross_entropy_of_leaves_that_need_no_gradient() -> None:
    hidden, items, target = vectors(T, D), vectors(N, D).detach(), torch.randint(0, N, (T,))
    same_gradient(
        lambda: losses.cross_entropy(hidden, items, target),
        lambda: F.cross_entropy(hidden @ items.T, target),
        hidden,
    )
    with torch.no_grad():
        plain = F.cross_entropy(hidden @ items.T, target)
        torch.testing.assert_close(losses.cross_entropy(hidden, items, target), plain)


def test_sampled_softmax_over_everything_else_is_cross_entropy() -> None:
    hidden, items, bias, target = vectors(T, D), vectors(N, D), vectors(N), torch.randint(0, N, (T,))
    others = torch.stack([torch.tensor([i for i in range(N) if i != t]) for t in target.tolist()])
    for negatives in (others, torch.arange(N)):  # of its own; shared, where the hit is masked
        same_gradient(
            lambda negatives=negatives: losses.sampled_softmax(hidden, items, target, negatives, bias=bias),
            lambda: F.cross_entropy(hidden @ items.T + bias, target),
            hidden,
            items,
            bias,
        )


@pytest.mark.parametrize("max_cells", [10, 1 << 25])
@pytest.mark.parametrize("shared", [True, False])
def test_sampled_softmax_by_brute_force(max_cells: int, shared: bool) -> None:
    hidden, items, bias, target = vectors(T, D), vectors(N, D), vectors(N), torch.randint(0, N, (T,))
    log_q = torch.log_softmax(torch.randn(N, dtype=DOUBLE), 0)
    n = 40  # with repeats and hits
    negatives = torch.randint(0, N, (n,) if shared else (T, n))
    assert (negatives == target.unsqueeze(1)).any()

    def brute() -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for t in range(T):
            logit = items @ hidden[t] + bias
            drawn = [j for j in (negatives if shared else negatives[t]).tolist() if j != target[t]]
            others = torch.stack([logit[j] - log_q[j] - math.log(n) for j in drawn])
            chosen = logit[target[t]]
            total = total + torch.logsumexp(torch.cat([chosen.view(1), others]), 0) - chosen
        return total / T

    same_gradient(
        lambda: losses.sampled_softmax(
            hidden, items, target, negatives, log_q=log_q, bias=bias, **({"max_cells": max_cells} if shared else {})
        ),
        brute,
        hidden,
        items,
        bias,
    )


def test_the_correction_makes_sampling_consistent() -> None:
    """As draws grow, corrected sampled softmax and its gradient go to the full one; uncorrected, they do not."""
    hidden, items, target = vectors(T, D, scale=0.7), vectors(N, D), torch.randint(0, N, (T,))
    q = torch.softmax(1.5 * torch.randn(N, dtype=DOUBLE), 0)
    full = F.cross_entropy(hidden @ items.T, target)
    at_full = torch.autograd.grad(full, hidden, retain_graph=True)[0]
    apart, apart_gradient = [], []
    for n in (100, 10_000, 400_000):
        negatives = torch.multinomial(q, n, replacement=True)
        sampled = losses.sampled_softmax(hidden, items, target, negatives, log_q=q.log())
        apart.append(abs(float(sampled - full)))
        apart_gradient.append(float((torch.autograd.grad(sampled, hidden)[0] - at_full).norm() / at_full.norm()))
    assert apart[2] < 0.01 and apart_gradient[2] < 0.02
    assert apart_gradient[0] > 5 * apart_gradient[2]
    plain = losses.sampled_softmax(hidden, items, target, negatives)
    assert float((torch.autograd.grad(plain, hidden)[0] - at_full).norm() / at_full.norm()) > 0.2


def test_the_partition_sum_is_unbiased() -> None:
    """The mean over many small draws of what the corrected negatives add up to is the sum over all other items."""
    hidden, items, target = vectors(1, D), vectors(N, D), torch.tensor([4])
    q = torch.softmax(torch.randn(N, dtype=DOUBLE), 0)
    logit = (items @ hidden[0]).detach()
    rest = torch.exp(logit).sum() - torch.exp(logit[4])
    found = []
    for _ in range(4000):
        negatives = torch.multinomial(q, 5, replacement=True)
        loss = losses.sampled_softmax(hidden.detach(), items.detach(), target, negatives, log_q=q.log())
        found.append((torch.exp(loss) - 1) * torch.exp(logit[4]))  # loss = log(1 + rest / exp(s+))
    estimate = torch.stack(found)
    error = float(estimate.std()) / len(found) ** 0.5
    assert abs(float(estimate.mean() - rest)) < 4 * error and error < 0.05 * float(rest)


def test_in_batch_softmax_by_brute_force() -> None:
    hidden, items, bias = vectors(T, D), vectors(N, D), vectors(N)
    target = torch.randint(0, 8, (T,))  # repeats: equal targets are no negatives of each other
    log_q = torch.log_softmax(torch.randn(N, dtype=DOUBLE), 0)

    def brute() -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for t in range(T):
            logit = items @ hidden[t] + bias
            others = [j for j in target.tolist() if j != target[t]]
            corrected = torch.stack([logit[j] - log_q[j] - math.log(T - 1) for j in others])
            total = total + torch.logsumexp(torch.cat([logit[target[t]].view(1), corrected]), 0) - logit[target[t]]
        return total / T

    same_gradient(
        lambda: losses.in_batch_softmax(hidden, items, target, log_q=log_q, bias=bias), brute, hidden, items, bias
    )


def test_in_batch_softmax_estimates_the_full_one() -> None:
    """With targets drawn from q, the corrected in-batch loss goes to full cross-entropy as the batch grows."""
    items, q = vectors(N, D, scale=0.5), torch.softmax(torch.randn(N, dtype=DOUBLE).clamp(-1, 1), 0)
    target = torch.multinomial(q, 6000, replacement=True)
    hidden = vectors(6000, D, scale=0.5)
    full = F.cross_entropy(hidden @ items.T, target)
    assert losses.in_batch_softmax(hidden, items, target, log_q=q.log()).item() == pytest.approx(full.item(), abs=0.05)
    at_full = torch.autograd.grad(full, items)[0]
    apart = []
    for log_q in (q.log(), None):
        loss = losses.in_batch_softmax(hidden, items, target, log_q=log_q)
        apart.append(float((torch.autograd.grad(loss, items)[0] - at_full).norm() / at_full.norm()))
    assert apart[0] < 0.2 and apart[1] > 0.4


def test_a_batch_of_one_has_nothing_to_compare_with() -> None:
    hidden, items = vectors(1, D), vectors(N, D)
    log_q = torch.full((N,), -math.log(N), dtype=DOUBLE)
    loss = losses.in_batch_softmax(hidden, items, torch.tensor([3]), log_q=log_q)
    gradient = torch.autograd.grad(loss, (hidden, items))
    assert float(loss) == 0 and all((g == 0).all() for g in gradient)


@pytest.mark.parametrize("own", [False, True])
def test_every_negative_is_a_hit(own: bool) -> None:
    hidden, items, target = vectors(2, D), vectors(N, D), torch.tensor([3, 3])
    negatives = torch.full((2, 4) if own else (4,), 3)
    loss = losses.sampled_softmax(hidden, items, target, negatives)
    gradient = torch.autograd.grad(loss, (hidden, items))
    assert float(loss) == 0 and all((g == 0).all() for g in gradient)


SOFTMAX: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": losses.cross_entropy,
    "shared": lambda h, v, t, **kw: losses.sampled_softmax(h, v, t, torch.arange(0, N, 2), **kw),
    "own": lambda h, v, t, **kw: losses.sampled_softmax(h, v, t, torch.arange(0, N, 2).expand(len(t), -1), **kw),
    "in_batch": losses.in_batch_softmax,
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_extremes_stay_finite(name: str) -> None:
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    items = torch.linspace(-2, 2, N).unsqueeze(1).requires_grad_()
    target = torch.tensor([0, 0, 5])
    loss = SOFTMAX[name](hidden, items, target)
    gradient = torch.autograd.grad(loss, (hidden, items))
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradient)
    assert float(loss) > 1e3 and float(gradient[0][0].abs()) > 1e-3  # far off, and still pulled


@pytest.mark.parametrize("name", SOFTMAX)
def test_weights_are_masks_and_shares(name: str) -> None:
    """A weight of 1 / T is the mean; a zero drops a target; repeating every target changes nothing."""
    if name == "in_batch":
        pytest.skip("its negatives are the batch: every target counts for the others")
    hidden, items, target = vectors(T, D), vectors(N, D), torch.randint(0, N, (T,))
    loss = SOFTMAX[name]
    whole = loss(hidden, items, target)
    torch.testing.assert_close(loss(hidden, items, target, weight=torch.tensor(1 / T, dtype=DOUBLE)), whole)
    keep = torch.arange(T) % 3 > 0
    same_gradient(
        lambda: loss(hidden, items, target, weight=keep / keep.sum().double()),
        lambda: loss(hidden[keep], items, target[keep]),
        hidden,
        items,
    )
    torch.testing.assert_close(loss(hidden.repeat(2, 1), items, target.repeat(2)), whole)


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_weights(name: str) -> None:
    positive, negative = vectors(T), vectors(T, 3)
    keep = torch.arange(T) % 3 > 0
    torch.testing.assert_close(
        PAIRWISE[name](positive, negative, weight=keep / keep.sum().double()),
        PAIRWISE[name](positive[keep], negative[keep]),
    )


@pytest.mark.parametrize("name", SOFTMAX)
def test_no_target_is_no_loss(name: str) -> None:
    """A process may have no target in its share of a batch."""
    hidden, items = vectors(0, D), vectors(N, D)
    loss = SOFTMAX[name](hidden, items, torch.zeros(0, dtype=torch.int64), weight=torch.tensor(0.1, dtype=DOUBLE))
    gradient = torch.autograd.grad(loss, (hidden, items))
    assert float(loss) == 0 and (gradient[1] == 0).all()


def test_one_dimension_too_many_to_hold_at_once() -> None:
    """No more than `max_cells` logits are made at a time, and never fewer than a row."""
    seen: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[1:] == (N,) and out.shape != (D, N):
                seen.append(out.numel())
            return out

    hidden, items, target = vectors(T, D), vectors(N, D), torch.randint(0, N, (T,))
    with Watch():
        losses.cross_entropy(hidden, items, target, max_cells=4 * N)
    assert seen and max(seen) == 4 * N


@pytest.mark.parametrize("name", SOFTMAX)
def test_bfloat16_is_close(name: str) -> None:
    """Under autocast products are bfloat16; the loss stays float32 and near, and so do the gradients."""
    hidden, items = vectors(T, D).detach().float().requires_grad_(), vectors(N, D).detach().float().requires_grad_()
    target = torch.randint(0, N, (T,))
    exact = SOFTMAX[name](hidden, items, target)
    with torch.autocast("cpu", torch.bfloat16):
        near = SOFTMAX[name](hidden, items, target)
    assert near.dtype == torch.float32
    assert float(near) == pytest.approx(float(exact), rel=0.01) and float(near) != float(exact)
    for x, y in zip(
        torch.autograd.grad(near, (hidden, items)), torch.autograd.grad(exact, (hidden, items)), strict=True
    ):
        assert x.dtype == torch.float32
        assert float((x - y).norm() / y.norm()) < 0.02


def test_the_gradient_is_the_same_at_two_threads() -> None:
    """Row gradients must not depend on which thread adds first."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        hidden, items = torch.randn(60_000, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
        target, negatives = torch.randint(0, 50, (60_000,)), torch.randint(0, 50, (60_000, 2))
        for _ in range(3):
            found = [
                torch.autograd.grad(losses.sampled_softmax(hidden, items, target, negatives), items)[0]
                for _ in range(2)
            ]
            assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


def test_scores() -> None:
    hidden, items, bias = vectors(T, D), vectors(N, D), vectors(N)
    one, many = torch.randint(0, N, (T,)), torch.randint(0, N, (T, 4))
    everything = hidden @ items.T + bias
    torch.testing.assert_close(losses.scores(hidden, items, one, bias), everything.gather(1, one.unsqueeze(1))[:, 0])
    torch.testing.assert_close(losses.scores(hidden, items, many, bias), everything.gather(1, many))
