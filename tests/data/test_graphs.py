"""Item graphs against loops over small logs, and what is kept beside prepared data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.data import Dataset, Interactions, Vocabulary, split
from vouch.data.graphs import (
    ItemGraph,
    cached,
    co_occurrence,
    keep_largest,
    largest_of_dense,
    transition_counts,
    transition_graph,
)
from vouch.errors import DataError, StorageError


def log_of(histories: list[list[int]], n_items: int) -> Interactions:
    return Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(len(histories))),
        Vocabulary.of_numbers(np.arange(n_items)),
        np.repeat(np.arange(len(histories)), [len(h) for h in histories]),
        np.array([item for h in histories for item in h], dtype=np.int32),
    )


HISTORIES = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=9), min_size=1, max_size=8)


@given(HISTORIES)
@settings(max_examples=60, deadline=None)
def test_transition_weights_by_loops(histories: list[list[int]]) -> None:
    w = np.zeros((8, 8))
    for h in histories:
        for j in range(len(h)):
            for k in (1, 2, 3):
                if j + k < len(h):
                    w[h[j], h[j + k]] += 1 / k
                    w[h[j + k], h[j]] += 1 / k
    log = log_of(histories, 8)
    assert np.allclose(transition_counts(log).toarray(), w)
    total = 2 * sum(max(len(h) - k, 0) / k for h in histories for k in (1, 2, 3))
    assert w.sum() == pytest.approx(total)
    if total == 0:
        with pytest.raises(DataError, match="empty"):
            transition_graph(log)
        return
    degree = np.maximum((w > 0).sum(1), 1)
    want = w * (1 / degree[:, None] + 1 / degree[None])
    made = transition_graph(log)
    assert np.allclose(made.dense(), want, atol=1e-6) and np.allclose(made.dense(), made.dense().T)
    plain = transition_graph(log, weighted=False)
    assert np.allclose(plain.dense(), (w > 0) * (1 / degree[:, None] + 1 / degree[None]), atol=1e-6)
    rows = transition_graph(log, row_normalised=True).dense()
    scaled = w / np.maximum(w.sum(1, keepdims=True), 1e-12)
    assert np.allclose(rows, scaled * (1 / degree[:, None] + 1 / degree[None]), atol=1e-6)


def test_the_example_of_the_definition() -> None:
    made = transition_graph(log_of([[1, 2, 3], [2, 3]], 4)).dense()
    assert made[1, 2] == pytest.approx(1) and made[2, 3] == pytest.approx(2) and made[1, 3] == pytest.approx(0.5)
    assert not made[0].any()


SHARES = {"sparse": math.inf, "mixed": 0.5, "dense": -1.0}
"""Values of `DENSE_SHARE` that send all rows, some or none through sparse blocks."""


@given(
    HISTORIES,
    st.sampled_from(["cosine", "jaccard", "dice", "asymmetric", "conditional"]),
    st.booleans(),
    st.sampled_from(sorted(SHARES)),
)
@settings(max_examples=120, deadline=None)
def test_co_occurrence_by_loops(histories: list[list[int]], similarity: str, frequency: bool, blocks: str) -> None:
    sets = [set(h) for h in histories]
    n = np.array([sum(i in s for s in sets) for i in range(8)], dtype=float)
    c = np.zeros((8, 8))
    for s in sets:
        for i in s:
            for j in s - {i}:
                c[i, j] += 1 / math.log(1 + len(s)) if frequency else 1
    with np.errstate(divide="ignore", invalid="ignore"):
        below = {
            "cosine": np.sqrt(np.outer(n, n)),
            "jaccard": n[:, None] + n - c,
            "dice": (n[:, None] + n) / 2,
            "asymmetric": np.outer(n**0.3, n**0.7),
            "conditional": np.repeat(n[:, None], 8, 1),
        }[similarity]
        want = np.nan_to_num(c / (below + 2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vouch.data.graphs.DENSE_SHARE", SHARES[blocks])
        made = co_occurrence(
            log_of(histories, 8), similarity=similarity, alpha=0.3, shrinkage=2.0, inverse_user_frequency=frequency
        )
    assert np.allclose(made.dense(), want, atol=1e-6)
    assert np.array_equal(made.dense() > 0, want > 0) and not np.diag(made.dense()).any()


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([8, 1 << 22]))
@settings(max_examples=60, deadline=None)
def test_the_largest_of_a_row_by_sorting(k: int, seed: int, block: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4, (6, 8)).astype(np.float32)  # many are equal
    want = np.zeros_like(values)
    for row, given_row in enumerate(values):
        best = sorted(np.flatnonzero(given_row), key=lambda column: (-given_row[column], column))[:k]
        want[row, best] = given_row[best]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vouch.data.graphs.BLOCK_PAIRS", block)
        for made in (largest_of_dense(values, k), keep_largest(sp.csr_matrix(values), k)):
            assert np.array_equal(made.toarray(), want) and made.nnz == (want > 0).sum()


def test_only_the_nearest_are_kept_and_the_best_is_the_highest() -> None:
    random = np.random.default_rng(0)
    log = log_of([random.permutation(30)[:8].tolist() for _ in range(60)], 30)
    whole, few = co_occurrence(log), co_occurrence(log, neighbors=3)
    for item in range(30):
        found, weight = few.neighbours(item)
        row = whole.dense()[item]
        assert len(found) == 3 and sorted(weight.tolist()) == sorted(np.sort(row)[-3:].tolist())
    best, score = whole.best()
    assert score.tolist() == whole.dense().max(1).tolist()
    assert best.tolist() == whole.dense().argmax(1).tolist()


def test_items_without_neighbours_have_no_best() -> None:
    best, score = co_occurrence(log_of([[0, 1], [2]], 3)).best()
    assert best.tolist() == [1, 0, -1] and np.isneginf(score[2])


@pytest.mark.parametrize("neighbors", [5, 30])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, neighbors: int) -> None:
    random = np.random.default_rng(0)
    log = log_of([np.minimum(random.zipf(1.4, 8), 30).astype(int).tolist() for _ in range(60)], 31)
    whole = co_occurrence(log, neighbors=neighbors)
    for block in (1, 100, 1 << 22):
        for share in SHARES.values():
            monkeypatch.setattr("vouch.data.graphs.BLOCK_PAIRS", block)
            monkeypatch.setattr("vouch.data.graphs.DENSE_SHARE", share)
            assert np.array_equal(co_occurrence(log, neighbors=neighbors).dense(), whole.dense())


def test_without_products_that_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of([[0, 1, 2], [1, 2, 3], [0, 3]], 5)
    whole = co_occurrence(log)
    monkeypatch.setattr("vouch.data.graphs._sums_densely", lambda: False)
    assert np.array_equal(co_occurrence(log).dense(), whole.dense())


def test_rewiring_keeps_degrees_and_destroys_the_rest() -> None:
    random = np.random.default_rng(0)
    histories = [(random.integers(0, 10, 6) + 10 * (u % 8)).tolist() for u in range(200)]  # eight communities
    made = transition_graph(log_of(histories, 80))
    other = made.rewired(np.random.default_rng(1))
    assert np.array_equal(other.degree, made.degree) and np.allclose(other.dense(), other.dense().T)
    assert np.allclose(np.sort(other.weight), np.sort(made.weight))

    def within(graph: ItemGraph) -> float:
        return float((graph.row // 10 == graph.indices // 10).mean())

    assert within(made) == 1 and within(other) < 0.35
    assert np.array_equal(other.dense(), made.rewired(np.random.default_rng(1)).dense())


def test_held_out_events_have_no_part() -> None:
    histories = [[1, 2, 3, 4, 5], [3, 2, 1, 0, 6]]
    others = [[1, 2, 3, 6, 0], [3, 2, 1, 4, 5]]  # the last two differ
    one, other = (split(Dataset.of(log_of(each, 7))).train for each in (histories, others))
    assert np.array_equal(transition_graph(one).dense(), transition_graph(other).dense())


def test_graphs_are_kept_beside_prepared_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    Dataset.of(log_of([random.integers(0, 20, 6).tolist() for _ in range(30)], 20)).save(tmp_path / "data")
    made = Dataset.open(tmp_path / "data")
    assert made.origin == tmp_path / "data"
    calls = []

    def build(log: Interactions, **parameters: int) -> ItemGraph:
        calls.append(parameters)
        return transition_graph(log, **parameters)

    first = cached(build, made.interactions, made.origin, window=2)
    again = cached(build, made.interactions, made.origin, window=2)
    assert len(calls) == 1 and np.array_equal(first.dense(), again.dense())
    cached(build, made.interactions, made.origin, window=1)
    cached(build, split(made).train, made.origin, window=2)
    assert len(calls) == 3
    cached(build, made.interactions, None, window=2)
    assert len(calls) == 4 and len(list((tmp_path / "data" / "graphs").iterdir())) == 3
    for folder in (tmp_path / "data" / "graphs").iterdir():
        (folder / "weight.npy").write_bytes(b"torn")
    mended = cached(build, made.interactions, made.origin, window=2)
    assert len(calls) == 5 and np.array_equal(mended.dense(), first.dense())
    with pytest.raises(StorageError, match="damaged"):
        ItemGraph.open(tmp_path)
