"""The verdict on made-up values: a clear win, a tie, noise, and a simple method that wins."""

from __future__ import annotations

import numpy as np
import pytest

from vouch.compare import judge

NAMES = {"a": "Alpha", "b": "Beta", "c": "Gamma", "itemknn": "Item-kNN"}


def values(*means: float, seeds: int = 3, cases: int = 800) -> list[np.ndarray]:
    """Hits at given rates over the same cases: harder cases are hard for all."""
    random = np.random.default_rng(0)
    ease = random.normal(size=cases)
    return [
        (ease + random.normal(size=(seeds, cases)) > np.quantile(ease, 1 - mean)).astype(float) * 1.0 for mean in means
    ]


def test_a_clear_winner_is_really_better() -> None:
    a, b, c = values(0.5, 0.3, 0.25)
    found = judge("NDCG@10", {"b": b, "a": a, "c": c}, NAMES)
    assert found.best == "a" and found.really_better and found.tied == []
    assert found.sentence.startswith("Yes: Alpha is best")
    assert found.against["b"]["effect"] == pytest.approx(b.mean() - a.mean())
    assert found.against["b"]["interval"][1] < 0 and found.against["b"]["p_value"] < 0.01


def test_equal_methods_are_not_told_apart() -> None:
    random = np.random.default_rng(3)
    a, b = (random.random((3, 400)) for _ in range(2))
    found = judge("HR@10", {"a": a, "b": b}, NAMES)
    assert not found.really_better and len(found.tied) == 1
    assert found.sentence.startswith("No:") and "cannot be told apart" in found.sentence


def test_the_correction_counts_all_comparisons() -> None:
    random = np.random.default_rng(7)
    base = random.random((1, 300))
    noise = 0.2 * random.normal(size=(1, 300))
    best = base + 0.03 + noise - noise.mean()  # 2.6 standard errors
    alone = judge("m", {"a": best, "b": base}, NAMES).against["b"]["p_value"]
    assert 0.001 < alone < 0.05
    crowd = {f"x{k}": base + 1e-6 * random.normal(size=(1, 300)) for k in range(6)}
    names = {**NAMES, **{slug: slug for slug in crowd}}
    together = judge("m", {"a": best, "b": base, **crowd}, names).against["b"]["p_value"]
    assert together == pytest.approx(7 * alone, rel=0.3)


def test_one_seed_is_set_against_each_of_others_and_a_simple_winner_is_told() -> None:
    knn, trained = values(0.5, 0.3)
    found = judge("m", {"itemknn": knn[:1], "a": trained}, NAMES, simple=("itemknn",))
    assert found.best == "itemknn"
    assert found.sentence.endswith("It needs no training, and beats Alpha, which do.")


def test_one_method_alone_wins_nothing() -> None:
    found = judge("m", {"a": values(0.4)[0]}, NAMES)
    assert not found.really_better and "alone" in found.sentence
