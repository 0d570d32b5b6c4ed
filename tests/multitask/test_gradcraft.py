"""GradCraft: its rule, its cone, and what the rule leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vouch.errors import ConfigError, TrainingError
from vouch.multitask.balancers import make
from vouch.multitask.directions import pcgrad
from vouch.multitask.gradcraft import craft, gradcraft, scales

SIZES = (2, 3, 4, 6, 10, 20)


def gradients(size, width=50, seed=0, spread=0.0):
    rng = np.random.default_rng([seed, size])
    return rng.normal(size=(size, width)) * 10 ** rng.uniform(-spread, spread, (size, 1))


def brute(G, tau, eps):
    """The formulas of the paper on the vectors themselves."""
    n = np.linalg.norm(G, axis=1)
    H = tau * G * (n.max() / n)[:, None] + (1 - tau) * G
    found = []
    for h in H:
        C = H[H @ h < 0]
        if len(C):
            z = eps * np.linalg.norm(h) * np.linalg.norm(C, axis=1)
            h = h + C.T @ np.linalg.solve(C @ C.T, z - C @ h)
        found.append(h)
    return H, np.stack(found)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("size", SIZES)
def test_the_rule(size, tau, eps):
    """It resolves exactly the conflicting set, by the smallest change."""
    for seed in range(5):
        G = gradients(size, seed=seed, spread=2)
        H, expected = brute(G, tau, eps)
        found = gradcraft(G @ G.T, tau=tau, eps=eps) @ G
        n = np.linalg.norm(H, axis=1)
        np.testing.assert_allclose(found / n[:, None], expected / n[:, None], rtol=0, atol=1e-8)
        conflict = H @ H.T < 0
        cosine = (found @ H.T) / np.outer(n, n)
        assert np.abs(cosine[conflict] - eps).max(initial=0) < 1e-9
        for i in range(size):
            change, C = found[i] - H[i], H[conflict[i]]
            if len(C):  # in the span of the set
                rest = change - C.T @ np.linalg.lstsq(C.T, change, rcond=None)[0]
                assert np.linalg.norm(rest) < 1e-9 * n[i]
            else:
                assert np.linalg.norm(change) < 1e-13 * n[i]
            if eps == 0:
                assert np.linalg.norm(found[i]) <= n[i] * (1 + 1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 1.0])
def test_sizes_are_pulled_to_the_largest(tau):
    G = gradients(6, spread=3)
    n, factor = np.linalg.norm(G, axis=1), scales(G @ G.T, tau)
    np.testing.assert_allclose(factor * n, tau * n.max() + (1 - tau) * n, rtol=1e-12)
    if tau:
        assert (n.max() / (factor * n) <= 1 / tau * (1 + 1e-12)).all()
    if tau == 1:
        np.testing.assert_allclose(factor * n, n.max(), rtol=1e-12)


def test_without_conflict_and_pull_it_is_the_mean_exactly():
    G = torch.from_numpy(np.abs(gradients(5)))
    g, report = craft(G, tau=0)
    assert torch.equal(g, torch.full((5,), 0.2, dtype=torch.float64) @ G)
    assert not report.conflicts.any() and report.remaining_share == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_rule_may_leave_conflicts_and_the_cone_leaves_none(size):
    """Measured on 200 draws in 50 dimensions. With six tasks the rule leaves some in about two draws of five."""
    left = {"paper": 0, "cone": 0, "pcgrad": 0}
    for seed in range(200 if size <= 6 else 40):
        G = gradients(size, seed=seed)
        K = G @ G.T
        n = np.sqrt(K.diagonal())
        order = np.random.default_rng(seed).permuted(np.tile(np.arange(size), (size, 1)), axis=1)
        for name, A in {
            "paper": gradcraft(K, tau=0),
            "cone": gradcraft(K, tau=0, projection="cone"),
            "pcgrad": pcgrad(K, order),
        }.items():
            cosine = (A @ K) / np.outer(n, n)
            left[name] += bool((cosine < -1e-9).any())
            if name == "cone":
                assert cosine.min() >= -1e-9
                x = A @ G
                assert (np.linalg.norm(x, axis=1) <= n * (1 + 1e-9)).all()
                # nearest: what was taken off points away from the cone, at a right angle to what is left
                np.testing.assert_allclose(np.einsum("ip,ip->i", G - x, x) / n**2, 0, atol=1e-9)
    assert left["cone"] == 0
    if size == 2:
        assert left["paper"] == 0 and left["pcgrad"] == 0
    if size == 6:
        assert 0.28 < left["paper"] / 200 < 0.48 and left["pcgrad"] / 200 > 0.75
    if size > 2:
        assert left["paper"] <= left["pcgrad"]


def test_the_cone_is_the_nearest_point_of_it():
    """Against a solver that knows only the constraints."""
    from scipy.optimize import minimize

    for seed in range(5):
        G = gradients(4, 6, seed)
        found = gradcraft(G @ G.T, tau=0, projection="cone") @ G
        for g, mine in zip(G, found, strict=True):
            other = minimize(
                lambda x, g=g: ((x - g) ** 2).sum(),
                g,
                jac=lambda x, g=g: 2 * (x - g),
                constraints={"type": "ineq", "fun": G.__matmul__, "jac": lambda x, G=G: G},
            )
            assert np.linalg.norm(mine - g) <= np.linalg.norm(other.x - g) + 1e-5


@pytest.mark.parametrize("projection", ["paper", "cone"])
def test_more_tasks_than_dimensions_repeated_and_opposite_gradients(projection):
    rng = np.random.default_rng(0)
    for size in SIZES:
        for width in (1, 2, 3):
            G = rng.normal(size=(size, width))
            if size > 3:
                G[1], G[2] = G[0], -2 * G[0]
            K = G @ G.T
            A = gradcraft(K, projection=projection, tau=0.3)
            n = np.sqrt(K.diagonal())
            assert np.isfinite(A).all()
            x = A @ G
            assert (np.linalg.norm(x, axis=1) <= n * scales(K, 0.3) * (1 + 1e-6)).all()
            if projection == "cone":
                assert (x @ G.T / np.outer(n * scales(K, 0.3), n)).min() >= -1e-9


def test_repeated_gradients_share_one_correction():
    a, b = gradients(2, 5)
    b = -a + 0.3 * b
    once = gradcraft(np.stack([a, b]) @ np.stack([a, b]).T, tau=0) @ np.stack([a, b])
    G = np.stack([a, b, b, b])
    found = gradcraft(G @ G.T, tau=0) @ G
    np.testing.assert_allclose(found[0], once[0], atol=1e-12)
    np.testing.assert_allclose(found[1], once[1], atol=1e-12)


def test_two_tasks_are_pcgrad():
    for seed in range(50):
        G = gradients(2, 3, seed, spread=2)
        K = G @ G.T
        np.testing.assert_allclose(gradcraft(K, tau=0), pcgrad(K, np.array([[0, 1], [1, 0]])), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("projection", ["paper", "cone"])
def test_order_and_scale(projection):
    for seed in range(10):
        G = torch.from_numpy(gradients(6, 8, seed, spread=1))
        g, _ = craft(G, projection=projection)
        order = torch.randperm(6)
        torch.testing.assert_close(craft(G[order], projection=projection)[0], g, rtol=1e-9, atol=1e-9)
        for c in (1e-12, 3.0, 1e9):
            torch.testing.assert_close(craft(c * G, projection=projection)[0] / c, g, rtol=1e-9, atol=1e-9)
        g, _ = craft(G, tau=1, projection=projection)
        smaller = G.clone()
        smaller[G.norm(dim=1) < G.norm(dim=1).max()] *= 1e-4
        torch.testing.assert_close(craft(smaller, tau=1, projection=projection)[0], g, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("projection", ["paper", "cone"])
def test_a_gradient_of_length_0_stays_0_and_takes_no_part(projection):
    G = gradients(4, 5)
    with_zero = np.insert(G, 2, 0, axis=0)
    A = gradcraft(with_zero @ with_zero.T, projection=projection, eps=0.0 if projection == "cone" else 0.1)
    rest = [0, 1, 3, 4]
    alone = gradcraft(G @ G.T, projection=projection, eps=0.0 if projection == "cone" else 0.1)
    np.testing.assert_allclose(A[np.ix_(rest, rest)], alone, rtol=1e-12)
    assert A[2].tolist() == [0, 0, 1, 0, 0] and not A[rest, 2].any()
    assert np.array_equal(gradcraft(np.zeros((3, 3))), np.eye(3))


def test_lengths_that_differ_by_many_orders():
    """The systems are solved on unit vectors: a task a billion times smaller is freed as exactly."""
    G = gradients(6, 50)
    G[3] *= 1e-9
    n = np.linalg.norm(G, axis=1)
    x = gradcraft(G @ G.T, tau=0) @ G
    conflict = G @ G.T < 0
    assert np.abs((x @ G.T / np.outer(n, n))[conflict]).max() < 1e-9


def test_what_is_seen_is_reported():
    G = torch.from_numpy(gradients(6, seed=3))
    _, report = craft(G, tau=0.3)
    norms = G.norm(dim=1).numpy()
    np.testing.assert_allclose(report.norms, norms)
    unit = G.numpy() / norms[:, None]
    np.testing.assert_allclose(report.cosines, unit @ unit.T, atol=1e-12)
    assert report.conflict_share == pytest.approx((unit @ unit.T < 0).sum() / 30)
    H, x = brute(G.numpy(), 0.3, 0)
    after = x @ H.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(H, axis=1))
    assert np.array_equal(report.remaining, after < -1e-9)
    g = x.sum(0)
    np.testing.assert_allclose(report.alignment, unit @ g / np.linalg.norm(g), atol=1e-12)


def test_mistakes_are_named():
    with pytest.raises(TrainingError, match="'task 2'"):
        craft(torch.tensor([[1.0], [2.0], [float("nan")]]))
    weight = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(ConfigError, match=r"eps.*cone"):
        make("gradcraft", weight, eps=0.1, projection="cone")
    with pytest.raises(ConfigError, match="tau"):
        make("gradcraft", weight, tau=1.5)
    with pytest.raises(ConfigError, match="projection"):
        make("gradcraft", weight, projection="ball")
