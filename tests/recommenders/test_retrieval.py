"""Retrieval by one and by several vectors a query, exactly and through an index, and what is said of the interests."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.errors import ConfigError
from vouch.recommenders.retrieval import ItemIndex, diversify, interest_report, retrieve


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 40), st.integers(1, 45), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_merging_the_interests_lists_is_the_top_of_the_maximum(B: int, K: int, N: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    queries, vectors = torch.randn(B, K, 6), torch.randn(N, 6)
    scores, items = retrieve(queries, ItemIndex(vectors, "exact"), k)
    every = (queries @ vectors.T).amax(1)
    best, place = every.sort(1, descending=True)
    n = min(k, N)
    assert torch.equal(items[:, :n], place[:, :n]) and torch.allclose(scores[:, :n], best[:, :n], atol=1e-5)
    assert (items[:, n:] == -1).all() and torch.isneginf(scores[:, n:]).all()


def test_the_sum_is_the_product_with_the_summed_vector() -> None:
    queries, vectors = torch.randn(3, 4, 6), torch.randn(50, 6)
    scores, items = retrieve(queries, ItemIndex(vectors), 5, merge="sum")
    every = (queries @ vectors.T).sum(1)
    assert torch.equal(items, every.topk(5).indices) and torch.allclose(scores, every.topk(5).values, atol=1e-4)


def test_the_order_of_interests_does_not_matter() -> None:
    queries, index = torch.randn(3, 4, 6), ItemIndex(torch.randn(50, 6))
    for merge in ("max", "sum"):
        one, other = retrieve(queries, index, 9, merge=merge), retrieve(queries[:, [2, 0, 3, 1]], index, 9, merge=merge)
        assert torch.equal(one[1], other[1])


def test_what_was_seen_is_left_out() -> None:
    queries, vectors = torch.randn(2, 3, 6), torch.randn(30, 6)
    index = ItemIndex(vectors)
    _, first = retrieve(queries, index, 4)
    seen = first.numpy().ravel(), np.array([0, 4, 8])
    scores, items = retrieve(queries, index, 4, seen=seen)
    every = (queries @ vectors.T).amax(1)
    every.scatter_(1, first, -torch.inf)
    assert torch.equal(items, every.topk(4).indices) and torch.allclose(scores, every.topk(4).values, atol=1e-5)


def test_an_approximate_index_agrees_with_the_exact_one() -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    queries, vectors = torch.randn(50, 2, 16), torch.randn(5_000, 16)
    (exact, want), (found, got) = (retrieve(queries, ItemIndex(vectors, kind), 10) for kind in ("exact", "hnsw"))
    recall = np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(want, got, strict=True)])
    assert recall > 0.9 and (found <= exact + 1e-4).all()


def test_one_vector_a_query_needs_no_merging() -> None:
    queries, vectors = torch.randn(4, 6), torch.randn(30, 6)
    scores, items = retrieve(queries, ItemIndex(vectors), 5)
    assert torch.equal(items, (queries @ vectors.T).topk(5).indices) and (scores.diff(dim=1) <= 0).all()


def test_bad_requests_are_named() -> None:
    with pytest.raises(ConfigError, match="no index 'flat'"):
        ItemIndex(torch.randn(3, 2), "flat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k is 0"):
        retrieve(torch.randn(1, 2), ItemIndex(torch.randn(3, 2)), 0)
    with pytest.raises(ConfigError, match="one interest"):
        interest_report(torch.randn(1, 1, 2), ItemIndex(torch.randn(3, 2)))


def test_diversity_is_bought_by_its_coefficient() -> None:
    scores, items = torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([[0, 1, 2, 3]])
    category = np.array([0, 0, 0, 1])
    assert diversify(scores, items, category, 3, 0.0).tolist() == [[0, 1, 2]]
    assert diversify(scores, items, category, 3, 1.5).tolist() == [[0, 1, 3]]
    assert diversify(scores, items, category, 3, 2.5).tolist() == [[0, 3, 1]]


def test_the_report_tells_one_interest_from_several() -> None:
    vectors = torch.cat([torch.eye(4).repeat_interleave(10, 0) + 0.01 * torch.randn(40, 4)])
    apart, alike = torch.eye(4)[None].repeat(3, 1, 1), torch.eye(4)[:1][None].repeat(3, 4, 1)
    index = ItemIndex(vectors)
    one, other = interest_report(apart, index, 40), interest_report(alike, index, 10)
    assert one["cosine"] == pytest.approx(0, abs=1e-6) and other["cosine"] == pytest.approx(1)
    assert one["effective_interests"] == pytest.approx(4, rel=0.01) and other["effective_interests"] == pytest.approx(1)
    assert one["shares"] == pytest.approx([0.25] * 4) and other["overlap"] == 1
    assert interest_report(apart, index, 10)["overlap"] == 0
    assert not math.isnan(one["overlap"])
