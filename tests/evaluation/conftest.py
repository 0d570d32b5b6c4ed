"""Evaluation of a given matrix of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vouch.data import Cases, Interactions, Queries, Vocabulary
from vouch.evaluation import Evaluation, evaluate


class Given:
    """A model whose scores for case `q` (of user `q`) are row `q` of a matrix."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def score_or_popularity(self, queries: Queries) -> torch.Tensor:
        return self.scores[torch.from_numpy(queries.user.astype(np.int64))]


def make_cases(
    n_items: int, targets: Sequence[Sequence[int]], histories: Sequence[Sequence[int]] | None = None
) -> Cases:
    """One user a case; the rows of each are the history, then the targets."""
    histories = histories if histories is not None else [[]] * len(targets)
    rows = [[*history, *wanted] for history, wanted in zip(histories, targets, strict=True)]
    user = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(len(rows))),
        Vocabulary.of_numbers(np.arange(n_items)),
        user,
        np.array([item for row in rows for item in row], dtype=np.int32),
    )
    stop = log.offsets[:-1] + np.array([len(history) for history in histories])
    return Cases(log, np.arange(len(rows), dtype=np.int32), log.offsets[:-1], stop, log.offsets[1:])


@pytest.fixture(scope="session")
def ask() -> Callable[..., Evaluation]:
    """Evaluate a matrix of scores `(Q, n_items)` for lists of targets, and of histories."""

    def run(scores: Any, targets: Any, histories: Any = None, **settings: Any) -> Evaluation:
        scores = torch.as_tensor(np.asarray(scores), dtype=torch.float32)
        return evaluate(Given(scores), make_cases(scores.shape[1], targets, histories), **settings)

    return run


@pytest.fixture(scope="session")
def given() -> tuple[type[Given], Callable[..., Cases]]:
    """The model and the maker of cases behind `ask`."""
    return Given, make_cases
