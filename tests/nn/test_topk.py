"""The best k of each row against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vouch.nn import topk
from vouch.nn.topk import top_k


def by_sorting(scores, k):
    values, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


def check(scores, k):
    values, index = top_k(scores, k)
    expected_values, expected_index = by_sorting(scores, k)
    assert torch.equal(index, expected_index)
    assert torch.equal(values, expected_values)
    assert index.dtype == torch.int64


@pytest.fixture(params=["all at once", "few of each row"])
def way(request, monkeypatch):
    """Both ways of selecting, whatever the size."""
    monkeypatch.setattr(topk, "FEW", 10**9 if request.param == "all at once" else 0)


@pytest.mark.parametrize("levels", [1, 2, 30, 10**6])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (3, 7, 7), (20, 300, 10), (5, 2500, 3), (40, 900, 100)])
def test_ties_of_every_width(way, levels, rows, n, k):
    generator = torch.Generator().manual_seed(levels + n)
    scores = torch.randint(0, levels, (rows, n), generator=generator).float() - levels // 2
    check(scores, k)


def test_rows_of_every_kind_side_by_side(way):
    """Rows that are settled in different ways must not mix: distinct, all equal, few finite, tied at the bound."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 2000, generator=generator)
    scores[::4] = 0.5
    scores[1::4, 3:] = -torch.inf
    scores[2::4] = (scores[2::4] - 0.999).relu()
    scores[10, :5] = torch.inf
    scores[11] = -scores[11]
    scores[12] = torch.where(torch.arange(2000) % 2 == 0, 0.0, -0.0)
    check(scores, 10)


def test_one_crowded_row_among_many_others(way):
    scores = torch.rand(200, 1000, generator=torch.Generator().manual_seed(1))
    scores[77] = 3.0
    check(scores, 5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 60), st.data())
def test_any_row(seed, levels, n, data):
    k = data.draw(st.integers(1, n))
    choices = np.array([-np.inf, -2.5, -0.0, 0.0, 1e-30, 1.0, 3e38, np.inf, 7.0, 7.5, -1e-30, -3e38], np.float32)
    scores = torch.from_numpy(np.random.default_rng(seed).choice(choices[:levels], (4, n)))
    for few in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(topk, "FEW", few)
            check(scores, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_kinds_of_numbers(dtype):
    scores = torch.randint(0, 50, (300, 400), generator=torch.Generator().manual_seed(2)).to(dtype)
    check(scores, 12)


def test_scores_that_carry_gradients():
    scores = torch.rand(300, 400, requires_grad=True)
    values, _ = top_k(scores, 3)
    values.sum().backward()
    assert int((scores.grad != 0).sum()) == 900


def test_pieces_of_crowded_rows(monkeypatch):
    monkeypatch.setattr(topk, "CELLS", 700)
    check(torch.zeros(20, 300), 4)
