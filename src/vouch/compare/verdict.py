"""Is the best really better? Paired tests of the best against all others, corrected together, in plain words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.evaluation import holm, paired_test

LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """The outcome.

    Attributes:
        best: slug of the method with the highest mean.
        really_better: whether it differs from every other by more than chance, all tests taken together.
        sentence: the verdict in words.
        tied: slugs that cannot be told apart from the best.
        against: per other method `{"effect", "interval", "p_value", "significant"}`; the effect is other less best,
            the p-value Holm's.
    """

    best: str
    really_better: bool
    sentence: str
    tied: list[str]
    against: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "best": self.best,
            "really_better": self.really_better,
            "sentence": self.sentence,
            "tied": self.tied,
            "against": self.against,
        }


def judge(
    metric: str,
    values: Mapping[str, NDArray[np.float64]],
    names: Mapping[str, str],
    simple: Collection[str] = (),
) -> Verdict:
    """Compare the methods' values per seed and case `(S, Q)`; a method with one seed is set against each seed of others.

    Args:
        values: by slug. names: by slug, for the sentence. simple: slugs whose victory over trained methods is told.
    """
    order = sorted(values, key=lambda slug: -float(values[slug].mean()))
    best, others = order[0], order[1:]
    name, mean = names[best], float(values[best].mean())
    if not others:
        return Verdict(best, False, f"{name} alone was run: {metric} {mean:.4f}.", [], {})
    seeds = max(len(matrix) for matrix in values.values())
    full = {slug: np.broadcast_to(m, (seeds, m.shape[1])) if len(m) == 1 else m for slug, m in values.items()}
    tests = {}
    for slug in others:
        rows = min(len(full[slug]), len(full[best]))
        tests[slug] = paired_test(full[slug][:rows], full[best][:rows])
    corrected = dict(zip(others, holm([tests[slug].p_value for slug in others]), strict=True))
    against: dict[str, dict[str, Any]] = {
        slug: {
            "effect": test.effect,
            "interval": [test.low, test.high],
            "p_value": corrected[slug],
            "significant": bool(corrected[slug] < LEVEL and (test.low > 0 or test.high < 0)),
        }
        for slug, test in tests.items()
    }
    tied = [slug for slug in others if not against[slug]["significant"]]
    second = others[0]
    gap = -against[second]["effect"]
    low, high = (-bound for bound in reversed(against[second]["interval"]))
    if not tied:
        sentence = (
            f"Yes: {name} is best with {metric} {mean:.4f}, ahead of {names[second]} by {gap:.4f} "
            f"[{low:.4f}, {high:.4f}], p = {against[second]['p_value']:.3f} after correction."
        )
    else:
        rest = " and ".join(
            [", ".join(names[slug] for slug in tied[:-1]), names[tied[-1]]] if len(tied) > 1 else [names[tied[0]]]
        )
        sentence = (
            f"No: {name} has the highest {metric}, {mean:.4f}, but cannot be told apart from {rest} "
            f"(ahead of {names[second]} by {gap:.4f} [{low:.4f}, {high:.4f}])."
        )
    trained = [slug for slug in others if slug not in simple]
    if best in simple and trained:
        beaten = [names[slug] for slug in trained if slug not in tied]
        sentence += " It needs no training"
        sentence += f", and beats {', '.join(beaten)}, which do." if beaten else "; no method that does is ahead of it."
    return Verdict(best, not tied, sentence, tied, against)
