"""BERT4Rec: what is hidden, what the answer may see, and what is never recommended."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from vouch.data import Queries, Split
from vouch.errors import ConfigError
from vouch.evaluation import evaluate
from vouch.recommenders.sequential.batches import MASK, SequenceBatch
from vouch.recommenders.sequential.bert4rec import BERT4Rec, BERT4RecEncoder
from vouch.training import Run


def batches(made: Split, seed: int = 0, **settings: Any) -> list[SequenceBatch]:
    model = BERT4Rec(**{"max_length": 8, "batch_size": 16, **settings})
    model.prepare(made.train)
    return list(model.batches(made.train).epoch(np.random.default_rng(seed), 0, 1))


def network(n_items: int = 25, **settings: Any) -> BERT4RecEncoder:
    torch.manual_seed(0)
    made = BERT4RecEncoder(n_items, BERT4Rec(hidden_size=16, max_length=8, **settings).config)
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return made.eval()


def test_targets_are_the_hidden_items_and_nothing_else(log_of: Any) -> None:
    from vouch.data import Dataset, split

    histories = [list(range(20 * u, 20 * u + 12)) for u in range(9)]  # so that an item tells its place
    made = split(Dataset.of(log_of(histories, 180)))
    for batch in batches(made):
        hidden = batch.items == MASK
        assert batch.at.tolist() == hidden.flatten().nonzero().squeeze(1).tolist()
        assert hidden.any(1).all()  # each sequence teaches something
        row, place = batch.at // batch.items.shape[1], batch.at % batch.items.shape[1]
        for b, t, target in zip(row.tolist(), place.tolist(), batch.target.tolist(), strict=True):
            known = [(s, i) for s, i in enumerate(batch.items[b].tolist()) if i >= 0]
            assert all(target - t == item - s for s, item in known)
        assert batch.weight.item() == pytest.approx(1 / len(batch.target))


def test_shares_of_hidden_items(log_of: Any) -> None:
    from vouch.data import Dataset, split

    made = split(Dataset.of(log_of([[0, 1] * 11] * 400, 2)))  # 20 training events each
    shape = {"max_length": 20, "batch_size": 50}
    rows = torch.cat([b.items == MASK for b in batches(made, **shape, mask_share=0.3, last_share=0.0)])
    assert rows.float().mean().item() == pytest.approx(0.3, abs=0.02)
    rows = torch.cat([b.items == MASK for b in batches(made, **shape, mask_share=0.3, last_share=0.25)])
    only_last = (rows.sum(1) == 1) & rows[:, -1]
    assert only_last.float().mean().item() == pytest.approx(0.25, abs=0.07)
    rows = torch.cat([b.items == MASK for b in batches(made, **shape, last_share=1.0)])
    assert torch.equal(rows.sum(1), torch.ones(len(rows), dtype=torch.int64)) and rows[:, -1].all()


def test_what_is_hidden_changes_from_epoch_to_epoch(made: Split) -> None:
    first, again, other = (batches(made, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a.items, b.items) for a, b in zip(first, again, strict=True))
    assert not all(
        a.items.shape == b.items.shape and torch.equal(a.items, b.items) for a, b in zip(first, other, strict=True)
    )


def test_ranks_share_each_global_batch(made: Split) -> None:
    model = BERT4Rec(max_length=8, batch_size=7)
    model.prepare(made.train)
    source = model.batches(made.train)
    whole = list(source.epoch(np.random.default_rng(0), 0, 1))
    parts = [list(source.epoch(np.random.default_rng(0), rank, 2)) for rank in range(2)]
    for one, *two in zip(whole, *parts, strict=True):
        assert torch.equal(one.items[0::2], two[0].items) and torch.equal(one.items[1::2], two[1].items)
        assert all(part.weight.item() == pytest.approx(2 * one.weight.item()) for part in two)


def test_shown_positions_give_no_loss(made: Split) -> None:
    model = BERT4Rec(hidden_size=16, max_length=8, batch_size=16, loss="ce")
    objective = model.begin(made)
    batch = next(iter(model.batches(made.train).epoch(np.random.default_rng(0), 0, 1)))
    hidden = objective.encoder(batch.items, batch.lengths)
    hidden.retain_grad()
    objective.encoder.forward = lambda items, lengths, context: hidden  # type: ignore[method-assign, assignment]
    objective.loss(batch)["next"].backward()
    assert hidden.grad is not None
    used = hidden.grad.abs().sum(-1) > 0
    assert torch.equal(used, batch.items == MASK)


def test_the_answer_depends_on_both_sides() -> None:
    encoder = network()
    items = torch.tensor([[4, 7, MASK, 9, 2]])
    before = encoder(items, torch.tensor([5]))[0, 2]
    for place in (0, 1, 3, 4):
        other = items.clone()
        other[0, place] = 11
        assert not torch.allclose(before, encoder(other, torch.tensor([5]))[0, 2], atol=1e-4)


def test_padding_is_not_seen() -> None:
    encoder = network()
    short = encoder(torch.tensor([[4, 7, MASK]]), torch.tensor([3]))[0]
    padded = encoder(torch.tensor([[4, 7, MASK, -1, -1], [1, 2, 3, 4, 5]]), torch.tensor([3, 5]))[0, :3]
    assert torch.allclose(short, padded, atol=1e-5)


def test_the_question_is_a_hidden_item_after_the_history() -> None:
    model = BERT4Rec(max_length=4)
    items, lengths = model.inputs(Queries.from_histories([[1, 2, 3, 4, 5], [6]]), np.array([0, 1]), np.array([3, 1]))
    assert items.tolist() == [[3, 4, 5, MASK], [6, MASK, -1, -1]]
    assert lengths.tolist() == [4, 2]


def test_the_mask_and_the_padding_have_no_score(made: Split) -> None:
    model = BERT4Rec(hidden_size=16, max_length=8, epochs=1)
    model.fit(made, Run(device="cpu"))
    assert model.network.item.weight.shape == (27, 16)
    assert model.score(made.test.queries()).shape == (len(made.test), 25)
    assert torch.equal(model.item_vectors(), model.network.item.weight[1:26])
    ranking = model.recommend(made.test.queries(), 30, exclude="none")
    assert (np.sort(ranking.item, axis=1) == [-1] * 5 + list(range(25))).all()


def test_head_and_bias() -> None:
    encoder = network()
    items, lengths = torch.tensor([[4, MASK]]), torch.tensor([2])
    inner = encoder.transformer(encoder.item(torch.tensor([[5, 26]])), lengths, causal=False)
    want = torch.nn.functional.layer_norm(
        torch.nn.functional.gelu(inner @ encoder.head.weight.T + encoder.head.bias),
        (16,), encoder.head_norm.weight, encoder.head_norm.bias, 1e-8,
    )  # fmt: skip
    assert torch.allclose(encoder(items, lengths), want, atol=1e-5)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    factor = BERT4Rec(warmup_share=0.1).schedule(100, 10)
    values = [factor(step) for step in range(100)]
    assert values[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert values[10] == 1.0 and all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] == pytest.approx(1 / 90)


def test_an_order_is_learned(ring: Split) -> None:
    model = BERT4Rec(
        hidden_size=16, num_layers=1, num_heads=1, dropout=0.0, max_length=13, batch_size=32, learning_rate=0.01,
        epochs=20, evaluate_every=20,
    )  # fmt: skip
    model.fit(ring, Run(device="cpu"))
    assert evaluate(model, ring.test, metrics=["NDCG@3"], exclude="none").metrics["NDCG@3"] > 0.4  # chance is 0.07


def test_losses_that_rank_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match="'loss' of BERT4Rec is 'bpr'"):
        BERT4Rec(loss="bpr")
