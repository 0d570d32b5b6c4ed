"""The rules on inner products, against brute force on the vectors themselves, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from vouch.multitask.bytask import BLOCK, gram, merge
from vouch.multitask.directions import cagrad, db_mtl, frank_wolfe, gradvac, imtl_g, mgda, nonnegative, pcgrad
from vouch.multitask.gradnorm import gradnorm


def draws(n, sizes=(2, 3, 5, 8, 20), width=12):
    """Random gradients `(T, P)` with lengths over several orders of magnitude."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        size = int(rng.choice(sizes))
        yield rng.normal(size=(size, width)) * 10 ** rng.uniform(-3, 3, (size, 1)), rng


def unit_draws(n, size, width, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield rng.normal(size=(size, width))


@pytest.mark.parametrize("missing", [False, True])
def test_gram_and_merge_are_those_of_the_flat_vectors(missing, monkeypatch):
    """In whatever pieces they come."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (50,), (7, 7), (2, 3, 5), (1,), (400,)]
    rows = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    rows[1][2] = rows[1][2].T  # not contiguous
    if missing:
        rows[0][0] = rows[2][3] = rows[3][0] = None
        for row in rows:
            row[1] = None
    flat = torch.stack(
        [
            torch.cat(
                [
                    torch.zeros(shape).flatten() if g is None else g.flatten()
                    for g, shape in zip(row, shapes, strict=True)
                ]
            )
            for row in rows
        ]
    ).double()
    for block in (1 << 17, 64, 4):
        monkeypatch.setitem(BLOCK, "cpu", block)
        found = gram(rows)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, flat @ flat.T, rtol=1e-12, atol=1e-12)
    factors = [0.5, -2.0, 0.0, 1.5]
    merged = merge(rows, factors)
    assert (merged[1] is None) == missing
    whole = torch.cat(
        [torch.zeros(s).flatten() if g is None else g.flatten() for g, s in zip(merged, shapes, strict=True)]
    )
    torch.testing.assert_close(whole.double(), torch.tensor(factors).double() @ flat, rtol=1e-5, atol=1e-5)
    assert all(a is None or a is not b for row in rows for a, b in zip(row, merged, strict=True))


def test_the_gram_matrix_keeps_the_digits_where_tasks_nearly_oppose_each_other():
    g = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    h = -g * (1 + 1e-5)
    exact = float((g.double() + h.double()).square().sum())
    assert float(gram([[g], [h]]).sum()) == pytest.approx(exact, rel=1e-3)  # all digits of float32 cancel


def brute_pcgrad(G, orders):
    changed = []
    for i, g in enumerate(G):
        p = g.copy()
        for j in orders[i]:
            if j != i and p @ G[j] < 0:
                p -= p @ G[j] / (G[j] @ G[j]) * G[j]
        changed.append(p)
    return np.stack(changed)


def test_pcgrad():
    for G, rng in draws(60):
        size = len(G)
        orders = rng.permuted(np.tile(np.arange(size), (size, 1)), axis=1)
        expected = brute_pcgrad(G, orders)
        found = pcgrad(G @ G.T, orders) @ G
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    apart = np.abs(rng.normal(size=(4, 6)))  # no conflict: the plain sum
    assert np.array_equal(pcgrad(apart @ apart.T, np.tile(np.arange(4), (4, 1))), np.eye(4))


def test_gradvac():
    rose = False
    for G, rng in draws(60, sizes=(2, 3, 6)):
        size = len(G)
        orders = rng.permuted(np.tile(np.arange(size), (size, 1)), axis=1)
        rho = rng.uniform(-0.5, 0.5, (size, size))
        target, changed = rho.copy(), []
        for i, g in enumerate(G):
            p = g.copy()
            for j in orders[i]:
                if j == i:
                    continue
                c = p @ G[j] / (np.linalg.norm(p) * np.linalg.norm(G[j]))
                r = target[i, j]
                if c < r:
                    a, b = np.sqrt(1 - c**2), np.sqrt(1 - r**2)
                    p = p + G[j] * np.linalg.norm(p) * (r * a - c * b) / (np.linalg.norm(G[j]) * b)
                    assert p @ G[j] / (np.linalg.norm(p) * np.linalg.norm(G[j])) == pytest.approx(r, abs=1e-9)
                target[i, j] = 0.9 * r + 0.1 * c
            changed.append(p)
        A, moved = gradvac(G @ G.T, rho, 0.1, orders)
        expected = np.stack(changed)
        np.testing.assert_allclose(A @ G, expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())
        off = ~np.eye(size, dtype=bool)
        np.testing.assert_allclose(moved[off], target[off], atol=1e-8)
        rose |= bool((moved[off] > rho[off]).any())
    assert rose  # the targets do not only sink


def test_mgda_of_two_tasks_is_the_closed_form():
    for G, _ in draws(200, sizes=(2,)):
        a, b = G
        w = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
        np.testing.assert_allclose(mgda(G @ G.T), [w, 1 - w], atol=1e-7)


@pytest.mark.parametrize("size", [2, 3, 7, 20])
def test_mgda_is_the_shortest_vector_of_the_hull(size):
    for width in (3, 50):
        for G in unit_draws(20, size, width):
            w = mgda(G @ G.T)
            assert (w >= 0).all() and w.sum() == pytest.approx(1, abs=1e-12)
            g = w @ G
            assert (G @ g >= g @ g - 1e-6).all()  # the optimality condition
            assert np.linalg.norm(g) <= np.linalg.norm(G, axis=1).min() + 1e-9
            slow = frank_wolfe(G @ G.T) @ G
            assert np.linalg.norm(g) <= np.linalg.norm(slow) + 1e-9
            if width == 50:
                assert np.linalg.norm(slow) <= np.linalg.norm(g) * 1.05


def test_mgda_leaves_out_gradients_of_length_0():
    G = np.array([[1.0, 0, 0], [0, 0, 0], [0, 2.0, 0]])
    np.testing.assert_allclose(mgda(G @ G.T), [0.8, 0, 0.2], atol=1e-9)
    np.testing.assert_allclose(mgda(G @ G.T, "frank-wolfe"), [0.8, 0, 0.2], atol=1e-3)


def cagrad_value(G, c, w):
    g0 = G.mean(0)
    return w @ G @ g0 + c * np.linalg.norm(g0) * np.linalg.norm(w @ G)


@pytest.mark.parametrize("c", [0.2, 0.4, 0.8])
def test_cagrad_against_a_search_over_the_simplex(c):
    """For two tasks a fine grid; for more, many random starts of another solver, over a softmax."""
    for scale in (1e-12, 1.0, 1e6):
        for G in unit_draws(15, 2, 5):
            G = G * scale
            g = cagrad(G @ G.T, c) @ G
            grid = np.linspace(0, 1, 20_001)
            points, g0 = np.stack([grid, 1 - grid], 1) @ G, G.mean(0)
            gw = points[(points @ g0 + c * np.linalg.norm(g0) * np.linalg.norm(points, axis=1)).argmin()]
            expected = (g0 + c * np.linalg.norm(g0) / np.linalg.norm(gw) * gw) / (1 + c**2)
            assert np.linalg.norm(g - expected) < 2e-3 * np.linalg.norm(expected)
    for G in unit_draws(8, 5, 9):
        factors = cagrad(G @ G.T, c)
        g0 = G.mean(0)
        direction = (factors * (1 + c**2) - 0.2) @ G  # c |g0| gw / |gw|
        assert np.linalg.norm(direction) == pytest.approx(c * np.linalg.norm(g0), rel=1e-6)
        w = (factors * (1 + c**2) - 0.2).clip(0)
        mine = cagrad_value(G, c, w / w.sum())
        rng = np.random.default_rng(0)

        def value(z, G=G):
            return cagrad_value(G, c, np.exp(z) / np.exp(z).sum())

        others = [minimize(value, rng.normal(size=5)).fun for _ in range(3)]
        assert mine <= min(others) + 1e-7


def test_cagrad_raises_the_worst_task_and_c_0_is_the_mean():
    for G in unit_draws(40, 4, 10):
        np.testing.assert_array_equal(cagrad(G @ G.T, 0.0), np.full(4, 0.25))
        g0, g = G.mean(0), cagrad(G @ G.T, 0.4) @ G * (1 + 0.4**2)
        assert np.linalg.norm(g - g0) <= 0.4 * np.linalg.norm(g0) * (1 + 1e-6)
        assert (G @ g).min() >= (G @ g0).min() - 1e-7


def test_cagrad_leaves_out_gradients_of_length_0():
    G = np.random.default_rng(0).normal(size=(3, 6))
    with_zero = np.vstack([G[:1], np.zeros((1, 6)), G[1:]])
    np.testing.assert_allclose(4 * cagrad(with_zero @ with_zero.T, 0.5) @ with_zero, 3 * cagrad(G @ G.T, 0.5) @ G)


def test_imtl_g_is_as_far_along_every_direction():
    for G, _ in draws(40, sizes=(2, 3, 5)):
        factors = imtl_g(G @ G.T)
        assert factors.sum() == pytest.approx(1, rel=1e-9)
        along = (factors @ G) @ (G / np.linalg.norm(G, axis=1, keepdims=True)).T
        np.testing.assert_allclose(along, along[0], rtol=1e-4, atol=1e-7 * np.abs(G).max())


def test_db_mtl_gives_all_the_longest_length():
    for G, _ in draws(20):
        lengths = np.linalg.norm(db_mtl(G @ G.T)[:, None] * G, axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(G, axis=1).max(), rtol=1e-12)
    assert db_mtl(np.diag([4.0, 0.0])).tolist() == [1.0, 0.0]


def test_gradnorm_is_the_gradient_of_its_loss():
    """By autograd, the target held constant."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, loss, first, w = (torch.from_numpy(rng.uniform(0.1, 2, 5)) for _ in range(4))
        w.requires_grad_(True)
        pace = (loss / first) / (loss / first).mean()
        target = ((w * n).mean() * pace**1.5).detach()
        (w * n - target).abs().sum().backward()
        found = gradnorm(*(x.detach().numpy() for x in (n, loss, first, w)), 1.5)
        np.testing.assert_allclose(found, w.grad.numpy())


def test_nonnegative_least_squares():
    rng = np.random.default_rng(0)
    for _ in range(30):
        A, b = rng.normal(size=(6, 4)), rng.normal(size=6)
        x = nonnegative(A, b)
        slope = A.T @ (A @ x - b)
        assert (x >= 0).all() and (slope > -1e-9).all() and np.abs(slope[x > 0]).max(initial=0) < 1e-9
