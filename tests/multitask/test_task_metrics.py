"""AUC within and without groups against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from vouch.multitask.metrics import auc, gauc, rmse


@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_they_equal_scikit_learn_user_by_user(seed, n, levels):
    random = np.random.default_rng(seed)
    score = random.integers(0, 10**levels, n).astype(float)  # few levels make ties
    label = random.integers(0, 2, n).astype(float)
    group = random.integers(0, 4, n)
    if 0 < label.sum() < n:
        assert auc(score, label) == pytest.approx(roc_auc_score(label, score))
    else:
        assert math.isnan(auc(score, label))
    total, rows = 0.0, 0
    for user in np.unique(group):
        mine = group == user
        if 0 < label[mine].sum() < mine.sum():
            total += roc_auc_score(label[mine], score[mine]) * mine.sum()
            rows += mine.sum()
    found = gauc(score, label, group)
    assert found == pytest.approx(total / rows) if rows else math.isnan(found)


def test_error_and_its_absence():
    assert rmse(np.array([1.0, 3.0]), np.array([1.0, 1.0])) == pytest.approx(math.sqrt(2))
    assert math.isnan(rmse(np.zeros(0), np.zeros(0)))
