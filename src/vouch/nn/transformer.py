"""A transformer for item sequences, in the three arrangements that papers call SASRec.

Shapes: `B` batch, `T` positions, `D` hidden size, `H` heads. Sequences are left-aligned: real items come first, so a
causal mask alone keeps real positions from seeing padding, and no row of the attention is ever empty.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.errors import ConfigError
from vouch.nn.dropout import Dropout, dropout

Variant = Literal["original", "pre", "post"]


class SelfAttention(nn.Module):
    """Multi-head self-attention `(B, T, D) -> (B, T, D)`.

    Takes queries, and keys with values, apart, because the original SASRec normalises the queries only.

    Raises:
        ConfigError: `num_heads` does not divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ConfigError(
                f"num_heads is {num_heads}, which does not divide hidden_size {hidden_size}",
                hint="choose a hidden_size that is a multiple of num_heads",
            )
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, query_BTD: Tensor, memory_BTD: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; `mask` is bool, true where a key may be seen, or None for a causal mask."""
        B, T, D = query_BTD.shape
        q = self.query(query_BTD).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, H, T, D/H)
        kv = self.key_value(memory_BTD).view(B, T, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        if p and q.device.type == "cpu":  # torch has no fused kernel for this case; at these lengths ours is faster
            mixed = _attend(q, kv[0], kv[1], mask, p)
        else:
            mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], mask, dropout_p=p, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention `(B, H, T, D/H)` written out, with dropout of the attention weights."""
    T = q.shape[-2]
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    return dropout(weights, p) @ v


class Block(nn.Module):
    """Attention and a feed-forward layer with residuals.

    - `original`: the queries are normalised and carry the residual; relu, inner size D (arXiv 1808.09781).
    - `pre`: `x + f(LN x)`; gelu, inner size 4 D.
    - `post`: `LN(x + f(x))`; gelu, inner size 4 D.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, variant: Variant) -> None:
        super().__init__()
        inner = hidden_size if variant == "original" else 4 * hidden_size
        self.variant = variant
        self.attention = SelfAttention(hidden_size, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=1e-8)
        self.feed_norm = nn.LayerNorm(hidden_size, eps=1e-8)
        self.expand = nn.Linear(hidden_size, inner)
        self.contract = nn.Linear(inner, hidden_size)
        self.dropout = Dropout(dropout)

    def feed(self, x_BTD: Tensor) -> Tensor:
        """The position-wise feed-forward layer."""
        if self.variant == "original":
            return self.dropout(self.contract(self.dropout(F.relu(self.expand(x_BTD)))))
        return self.dropout(self.contract(F.gelu(self.expand(x_BTD))))

    def forward(self, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        """One block; `mask` as in `SelfAttention`."""
        if self.variant == "original":
            query = self.attention_norm(x_BTD)
            x_BTD = query + self.attention(query, x_BTD, mask)
            x_BTD = self.feed_norm(x_BTD)
            return x_BTD + self.feed(x_BTD)
        if self.variant == "pre":
            normal = self.attention_norm(x_BTD)
            x_BTD = x_BTD + self.dropout(self.attention(normal, normal, mask))
            return x_BTD + self.feed(self.feed_norm(x_BTD))
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, x_BTD, mask)))
        return self.feed_norm(x_BTD + self.feed(x_BTD))


class Transformer(nn.Module):
    """Positions counted from the most recent item, blocks, and a last norm where the arrangement has one."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_layers: int,
        num_heads: int,
        max_length: int,
        dropout: float,
        variant: Variant = "pre",
    ) -> None:
        super().__init__()
        self.variant, self.max_length = variant, max_length
        self.position = nn.Embedding(max_length, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, dropout, variant) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-8)  # first for `post`, last for the others
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, lengths: Tensor, *, causal: bool = True) -> Tensor:
        """Encode left-aligned vectors `(B, T, D)` of sequences of `lengths` `(B,)`, at most `max_length`."""
        T = x_BTD.shape[1]
        place = torch.arange(T, device=x_BTD.device)
        age = (lengths.unsqueeze(1) - 1 - place).clamp(min=0)  # 0 is the most recent
        if self.variant == "original":
            x_BTD = x_BTD * x_BTD.shape[-1] ** 0.5
        x_BTD = x_BTD + self.position(age)
        x_BTD = self.dropout(self.norm(x_BTD) if self.variant == "post" else x_BTD)
        mask = None if causal else (place < lengths.unsqueeze(1))[:, None, None, :]
        for block in self.blocks:
            x_BTD = block(x_BTD, mask)
        return x_BTD if self.variant == "post" else self.norm(x_BTD)


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """Normal weights, zero biases, and a zero padding row in every embedding that has one."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
