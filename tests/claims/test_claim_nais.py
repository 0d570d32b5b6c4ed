"""What the claims of NAIS measure beside the ranking."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vouch.claims.nais import spread, untrained
from vouch.data import Dataset, Interactions, Split, split
from vouch.recommenders.collaborative.fism import FISM, FISMNetwork


@pytest.fixture(scope="module")
def made() -> Split:
    """Nine users with 4 to 20 items; two are kept back of each."""
    random, sizes = np.random.default_rng(0), [4, 6, 8, 10, 12, 14, 16, 18, 20]
    item = np.concatenate([random.permutation(25)[:n] for n in sizes])
    return split(Dataset.of(Interactions.from_arrays(np.repeat(np.arange(9), sizes), item)))


def test_spread_of_scores_by_length(made: Split) -> None:
    class Wide:
        """Scores -w and w for all items, where w is the length."""

        def score(self, queries: Any) -> torch.Tensor:
            sign = torch.tensor([-1.0, 1.0]).repeat(500)
            return torch.from_numpy(queries.lengths).float().unsqueeze(1) * sign

    lengths = made.test.queries().lengths
    found = spread(Wide(), made)
    assert found["length_correlation"] == pytest.approx(1.0)
    assert found["spread_short"] == pytest.approx(np.sort(lengths)[:3].mean(), rel=1e-3)
    assert found["spread_long"] == pytest.approx(np.sort(lengths)[-3:].mean(), rel=1e-3)


def test_before_training_it_is_the_checkpoint_with_fresh_attention(made: Split) -> None:
    start = FISM(hidden_size=4)
    start.prepare(made.train)
    start.network = FISMNetwork(made.train.n_items, start.config)
    one, two = (untrained(made, seed, start, hidden_size=4, beta=0.3) for seed in (0, 1))
    for name in ("history", "target", "bias"):
        assert torch.equal(getattr(one.network, name), getattr(start.network, name))
    assert not torch.equal(one.network.W, two.network.W)
    assert torch.isfinite(one.score(made.test.queries())).all() and one.config.beta == 0.3
