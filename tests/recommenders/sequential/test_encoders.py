"""SASRec and GRU4Rec: their own settings, against plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vouch.data import Split
from vouch.recommenders.sequential.gru4rec import GRU4Rec, GRUEncoder
from vouch.recommenders.sequential.sasrec import SASRec, SASRecEncoder
from vouch.training import Run


def sasrec(**settings: Any) -> SASRecEncoder:
    torch.manual_seed(0)
    return SASRecEncoder(10, SASRec(hidden_size=8, max_length=6, **settings).config).eval()


def test_tied_and_untied_tables() -> None:
    tied, untied = sasrec(), sasrec(tied=False)
    assert tied.item_vectors().data_ptr() == tied.item.weight[1:].data_ptr()
    assert untied.item_vectors() is untied.output.weight
    assert sum(p.numel() for p in untied.parameters()) == sum(p.numel() for p in tied.parameters()) + 10 * 8


def test_the_bias_is_learned_and_scored(made: Split) -> None:
    assert sasrec().bias is None
    model = SASRec(hidden_size=8, max_length=6, item_bias=True, epochs=1, learning_rate=0.01)
    model.fit(made, Run(device="cpu"))
    queries = made.test.queries()
    assert model.network.bias.abs().min() > 0
    want = model.query_vectors(queries) @ model.item_vectors().T + model.network.bias
    assert torch.equal(model.score(queries), want.detach())


@pytest.mark.parametrize("variant", ["original", "pre", "post"])
def test_the_input_is_item_plus_position(variant: Any) -> None:
    encoder = sasrec(variant=variant)
    items, lengths = torch.tensor([[3, 9, 0]]), torch.tensor([3])
    rows = encoder.item.weight[[4, 10, 1]].unsqueeze(0)
    assert torch.equal(encoder(items, lengths), encoder.transformer(rows, lengths))
    weights = encoder.transformer.position.weight
    assert weights.shape == (6, 8)


def test_where_the_last_item_is_decides_its_position() -> None:
    encoder = sasrec()
    one = encoder(torch.tensor([[5]]), torch.tensor([1]))
    with torch.no_grad():
        encoder.transformer.position.weight[1:] += 100  # only age 0 is used
    assert torch.equal(one, encoder(torch.tensor([[5]]), torch.tensor([1])))


def test_the_recurrence_equals_its_formulas() -> None:
    torch.manual_seed(0)
    config = GRU4Rec(hidden_size=6, recurrent_size=5).config
    encoder = GRUEncoder(10, config).double().eval()
    for value in encoder.parameters():
        torch.nn.init.normal_(value, std=0.5)
    items = [4, 9, 0, 4]
    got = encoder(torch.tensor([items]), torch.tensor([4]))[0]
    gru, h = encoder.gru, torch.zeros(5, dtype=torch.float64)
    for t, item in enumerate(items):
        x = gru.weight_ih_l0 @ encoder.item.weight[item + 1] + gru.bias_ih_l0
        y = gru.weight_hh_l0 @ h + gru.bias_hh_l0
        reset, update = torch.sigmoid(x[:5] + y[:5]), torch.sigmoid(x[5:10] + y[5:10])
        h = (1 - update) * torch.tanh(x[10:] + reset * y[10:]) + update * h
        assert torch.allclose(got[t], encoder.dense.weight @ h + encoder.dense.bias, atol=1e-12)


def test_layers_of_the_recurrence() -> None:
    assert GRUEncoder(10, GRU4Rec(num_layers=2).config).gru.num_layers == 2
