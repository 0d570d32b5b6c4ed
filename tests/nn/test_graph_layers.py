"""Neighbourhood draws, convolutions against dense products, and the distance between samples."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from vouch.nn.graphs import GCN, SAGE, Edges, GraphEncoder, draw_neighbours, mmd, weighted_sums


def graph(n: int = 30, share: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    dense = np.triu(random.random((n, n)) < share, 1) * random.random((n, n))
    matrix = sp.csr_matrix(dense + dense.T)
    return (
        torch.from_numpy(matrix.indptr.astype(np.int64)),
        torch.from_numpy(matrix.indices),
        torch.from_numpy(matrix.data).float(),
    )


def dense_of(indptr: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    n = len(indptr) - 1
    return torch.from_numpy(sp.csr_matrix((weight.numpy(), indices.numpy(), indptr.numpy()), shape=(n, n)).toarray())


@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_draws_are_neighbours_without_repeats_and_at_most_as_many(size: int) -> None:
    indptr, indices, weight = graph()
    dense = dense_of(indptr, indices, weight)
    nodes = torch.tensor([3, 0, 17, 29])
    edges = draw_neighbours(indptr, indices, weight, nodes, size)
    for i, node in enumerate(nodes.tolist()):
        part = slice(edges.bounds[i], edges.bounds[i + 1])
        found = edges.source[part].tolist()
        degree = int(indptr[node + 1] - indptr[node])
        assert len(found) == len(set(found)) == min(size, degree)
        assert torch.allclose(edges.weight[part], dense[node, edges.source[part]])
        if size >= degree:
            assert sorted(found) == indices[indptr[node] : indptr[node + 1]].tolist()


def test_draws_are_uniform() -> None:
    indptr, indices = torch.tensor([0, 7]), torch.arange(7, dtype=torch.int32)
    torch.manual_seed(0)
    nodes = torch.zeros(20_000, dtype=torch.int64)
    edges = draw_neighbours(indptr, indices, torch.ones(7), nodes, 3)
    counts = torch.bincount(edges.source, minlength=7) / 20_000
    assert torch.allclose(counts, torch.full((7,), 3 / 7), atol=0.015)
    pairs = edges.source.view(-1, 3)
    together = torch.zeros(7, 7)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        together.index_put_((pairs[:, a], pairs[:, b]), torch.ones(20_000), accumulate=True)
    together = (together + together.T)[~torch.eye(7, dtype=torch.bool)] / 20_000
    assert torch.allclose(together, torch.full((42,), 1 / 7), atol=0.015)


def test_a_node_without_neighbours_has_none() -> None:
    edges = draw_neighbours(torch.tensor([0, 0, 1]), torch.tensor([0]), torch.ones(1), torch.tensor([0, 1]), 2)
    assert edges.bounds.tolist() == [0, 0, 1]
    gcn, sage, x = GCN(4), SAGE(4), torch.randn(2, 4)
    assert torch.allclose(gcn(x, edges)[0], gcn.linear(x[0]), atol=1e-6)
    want = F.normalize(sage.neighbours(torch.zeros(4)) + sage.own(x[0]), dim=0)
    assert torch.allclose(sage(x, edges)[0], want, atol=1e-6)


def test_weighted_sums_and_their_gradient_by_a_dense_product() -> None:
    torch.manual_seed(0)
    source = torch.tensor([4, 1, 4, 0, 2, 2])  # the second node has no edge, and nothing leaves row 3
    bounds, weight = torch.tensor([0, 2, 2, 5, 6]), torch.rand(6)
    x, gradient = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    dense = torch.zeros(4, 5).index_put((torch.tensor([0, 0, 2, 2, 2, 3]), source), weight, accumulate=True)
    made = weighted_sums(x, Edges(source, bounds, weight), weight)
    made.backward(gradient)
    assert torch.allclose(made, dense @ x, atol=1e-6) and torch.allclose(x.grad, dense.T @ gradient, atol=1e-6)


def test_with_all_neighbours_the_encoder_is_its_dense_form() -> None:
    indptr, indices, weight = graph()
    A = dense_of(indptr, indices, weight)
    torch.manual_seed(1)
    encoder = GraphEncoder(6, indptr, indices, weight, neighbors=30, dropout=0.5).eval()
    table = torch.randn(30, 6)
    got = encoder(table, torch.arange(30))
    D = 1 + A.sum(1)
    mix = A / torch.sqrt(D[:, None] * D[None])
    mean = (A > 0).float() / (A > 0).sum(1, keepdim=True)
    x = table
    for hop in range(2):
        x = encoder.gcn.linear(mix @ x + x / D[:, None])
        x = F.normalize(encoder.sage[hop].neighbours(mean @ x) + encoder.sage[hop].own(x), dim=1)
        x = F.relu(x) if hop == 0 else x
    assert torch.allclose(got, x, atol=1e-5)
    assert torch.allclose(got.norm(dim=1), torch.ones(30), atol=1e-5)


def test_equal_draws_give_equal_views_and_others_do_not() -> None:
    indptr, indices, weight = graph(share=0.8)
    encoder = GraphEncoder(6, indptr, indices, weight, neighbors=3, dropout=0.0).eval()
    table, nodes = torch.randn(30, 6), torch.tensor([4, 11])
    one, again, other = (encoder(table, nodes, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.allclose(one, other)
    full = GraphEncoder(6, indptr, indices, weight, neighbors=30, dropout=0.0).eval()
    assert torch.allclose(full(table, nodes), full(table, nodes), atol=1e-6)


def test_mmd_by_loops_and_its_signs() -> None:
    torch.manual_seed(0)
    X, Y = torch.randn(7, 3), torch.randn(7, 3) + 1
    Z = torch.cat([X, Y]).double()
    square = torch.tensor([[float(((a - b) ** 2).sum()) for b in Z] for a in Z])
    bandwidth = square.sum() / (14**2 - 14)

    def k(i: int, j: int) -> float:
        return sum(float(torch.exp(-square[i, j] / (bandwidth * 2.0 ** (m - 2)))) for m in range(5))

    want = sum((k(i, j) + k(7 + i, 7 + j) - k(i, 7 + j) - k(7 + i, j)) for i in range(7) for j in range(7)) / 49
    assert mmd(X, Y).item() == pytest.approx(want, rel=1e-4)
    assert mmd(X, X).item() == pytest.approx(0, abs=1e-5) and mmd(X, Y).item() > 0
    assert mmd(X, Y).item() == pytest.approx(mmd(Y, X).item(), rel=1e-5)


def test_rows_that_do_not_count_have_no_part() -> None:
    X, Y = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    real = torch.tensor([[True, True, True, False, False], [True] * 5])
    alone = torch.stack([mmd(X[0, :3], Y[0, :3]), mmd(X[1], Y[1])])
    assert torch.allclose(mmd(X, Y, real), alone, rtol=1e-4)


def test_gradients_are_finite_at_distance_zero() -> None:
    X = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(mmd(X, X.detach().clone()), X)
    assert torch.isfinite(gradient).all()


def test_edges_keep_their_order() -> None:
    assert Edges._fields == ("source", "bounds", "weight")
