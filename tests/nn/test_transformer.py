"""The transformer against plain formulas, and what it must not see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vouch.errors import ConfigError
from vouch.nn.dropout import Dropout, dropout
from vouch.nn.transformer import Block, SelfAttention, Transformer, init_weights

VARIANTS = ("original", "pre", "post")


def make(
    variant: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, max_length: int = 12
) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(8, num_layers=2, num_heads=2, max_length=max_length, dropout=dropout, variant=variant)
    for value in made.parameters():  # large enough that a mistake shows; norms away from their start
        torch.nn.init.normal_(value, std=0.4)
    return made.to(dtype).eval()


def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def attend(layer: SelfAttention, query: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
    """One head and one position after the other."""
    q = query @ layer.query.weight.T + layer.query.bias
    k, v = (memory @ layer.key_value.weight.T + layer.key_value.bias).chunk(2, -1)
    out = torch.zeros_like(q)
    size = q.shape[-1] // layer.num_heads
    for b in range(len(q)):
        for head in range(layer.num_heads):
            part = slice(head * size, (head + 1) * size)
            for t in range(q.shape[1]):
                keys = [s for s in range(q.shape[1]) if seen[b, t, s]]
                weight = torch.stack([q[b, t, part] @ k[b, s, part] / math.sqrt(size) for s in keys]).softmax(0)
                out[b, t, part] = sum(w * v[b, s, part] for w, s in zip(weight, keys, strict=True))
    return out @ layer.out.weight.T + layer.out.bias


def block(layer: Block, x: Tensor, seen: Tensor, variant: str) -> Tensor:
    def feed(y: Tensor) -> Tensor:
        inner = y @ layer.expand.weight.T + layer.expand.bias
        inner = inner.clamp(min=0) if variant == "original" else inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return inner @ layer.contract.weight.T + layer.contract.bias

    if variant == "original":
        query = norm(x, layer.attention_norm)
        x = norm(query + attend(layer.attention, query, x, seen), layer.feed_norm)
        return x + feed(x)
    if variant == "pre":
        normal = norm(x, layer.attention_norm)
        x = x + attend(layer.attention, normal, normal, seen)
        return x + feed(norm(x, layer.feed_norm))
    x = norm(x + attend(layer.attention, x, x, seen), layer.attention_norm)
    return norm(x + feed(x), layer.feed_norm)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_formulas(variant: str, causal: bool) -> None:
    model = make(variant, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 1])
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    place = torch.arange(5)
    real = place < lengths[:, None]
    seen = real[:, None, :] & (place[:, None] >= place if causal else torch.ones(5, 5, dtype=torch.bool))
    seen = seen | ((~real)[:, :, None] & torch.eye(5, dtype=torch.bool))  # padding: any value will do
    want = x * math.sqrt(8) if variant == "original" else x.clone()
    for b, length in enumerate(lengths.tolist()):
        for t in range(length):
            want[b, t] += model.position.weight[length - 1 - t]
    if variant == "post":
        want = norm(want, model.norm)
    for layer in model.blocks:
        want = block(layer, want, seen, variant)
    if variant != "post":
        want = norm(want, model.norm)
    got = model(x, lengths, causal=causal)
    assert torch.allclose(got[real], want[real], atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_to_the_bit(variant: str, training: bool) -> None:
    model = make(variant, dropout=0.4).train(training)
    lengths = torch.full((2,), 9)
    x = torch.randn(2, 9, 8)
    torch.manual_seed(1)
    before = model(x, lengths)
    for t in range(8):
        other = x.clone()
        other[:, t + 1 :] = torch.randn(2, 8 - t, 8) * 100
        torch.manual_seed(1)
        after = model(other, lengths)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.allclose(before[:, t + 1], after[:, t + 1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_company_change_nothing(variant: str, causal: bool) -> None:
    model = make(variant, dtype=torch.float64)
    lengths = torch.tensor([4, 7, 1, 2])
    x = torch.randn(4, 7, 8, dtype=torch.float64)
    together = model(x, lengths, causal=causal)
    for b, length in enumerate(lengths.tolist()):
        alone = model(x[b : b + 1, :length], lengths[b : b + 1], causal=causal)[0]
        assert torch.allclose(together[b, :length], alone, atol=1e-12)
    longer = torch.cat([x, torch.full((4, 4, 8), 1e4, dtype=torch.float64)], dim=1)
    padded = model(longer, lengths, causal=causal)
    assert torch.isfinite(padded).all()
    for b, length in enumerate(lengths.tolist()):
        assert torch.allclose(together[b, :length], padded[b, :length], atol=1e-12)


def test_both_directions_are_seen_without_the_causal_mask() -> None:
    model = make("post")
    x = torch.randn(1, 5, 8)
    before = model(x, torch.tensor([5]), causal=False)[0, 2]
    for place in (0, 4):
        other = x.clone()
        other[0, place] = torch.randn(8)
        assert not torch.allclose(before, model(other, torch.tensor([5]), causal=False)[0, 2])


@pytest.mark.parametrize("masked", [True, False])
def test_the_written_out_attention_equals_torch(masked: bool) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, dropout=1e-9).double()  # too little to drop anything, enough to take the other path
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(6) < torch.tensor([[2], [6], [1]]))[:, None, None, :] if masked else None
    results = []
    for training in (True, False):
        layer.train(training)
        out = layer(x, x, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_heads_must_divide_the_size() -> None:
    with pytest.raises(ConfigError, match="num_heads is 3, which does not divide hidden_size 8"):
        SelfAttention(8, 3, 0.0)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(2000, 64, padding_idx=0)
    init_weights(embedding)
    assert torch.equal(embedding.weight[0], torch.zeros(64))
    assert embedding.weight[1:].std().item() == pytest.approx(0.02, rel=0.02)
    linear = torch.nn.Linear(64, 64)
    init_weights(linear)
    assert not linear.bias.any()
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(p=st.floats(0.05, 0.95), seed=st.integers(0, 10_000))
def test_dropout_keeps_the_mean_and_drops_its_share(p: float, seed: int) -> None:
    torch.manual_seed(seed)
    n = 40_003  # not a multiple of four
    got = dropout(torch.ones(n), p)
    assert set(got.unique().tolist()) == {0.0, got.max().item()}
    assert got.max().item() == pytest.approx(1 / (1 - p), rel=1e-2)
    error = math.sqrt(p * (1 - p) / n)
    assert (got == 0).float().mean().item() == pytest.approx(p, abs=5 * error)
    kept = (got != 0).float()
    together = (kept[:-1] * kept[1:]).mean().item()  # neighbours are independent
    assert together == pytest.approx((1 - p) ** 2, abs=8 * error)


def test_dropout_gradient_seed_and_evaluation() -> None:
    layer = Dropout(0.5)
    x = torch.ones(50, 7, requires_grad=True)
    torch.manual_seed(3)
    out = layer(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out)  # the input is one everywhere
    torch.manual_seed(3)
    assert torch.equal(out, layer(x))
    assert not torch.equal(out, layer(x))
    assert layer.eval()(x) is x
    assert Dropout(0.0).train()(x) is x
