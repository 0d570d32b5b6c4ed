"""A transformer for item sequences, in the three arrangements that papers call SASRec.

Shapes: `B` batch, `T` positions, `D` hidden size, `H` heads. Sequences are left-aligned: real items come first, so a
causal mask alone keeps real positions from seeing padding, and no row of the attention is ever empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.errors import ConfigError
from vouch.nn.dropout import Dropout, dropout

Variant = Literal["original", "pre", "post"]


@dataclass
class Context:
    """One pass through an encoder: what its attention may look at beside the hidden vectors, and what it leaves behind.

    Attributes:
        rows: int64 `(B, T)` rows of the item table, 0 at padding. lengths: int64 `(B,)`.
        user: int64 `(B,)` codes, -1 where unknown; None where nobody knows.
        attack: whether the attention shall also give a second, attacked branch (where it has one).
        watch: whether attention layers shall leave their weights `(B, H, T, T)` as notes, `attention` among them.
        last_layer: whether the block that runs now is the last.
        graph: what an encoder with a graph saw of it.
        shared: what the attention kind computed once for all layers of this pass.
        second: the second branch's output `(B, T, D)`; a block takes mixed values here and leaves its output.
        notes: tensors by name that an objective reads afterwards, one a layer.
    """

    rows: Tensor | None = None
    lengths: Tensor | None = None
    user: Tensor | None = None
    graph: Any = None
    attack: bool = False
    watch: bool = False
    last_layer: bool = False
    shared: Any = None
    second: Tensor | None = None
    notes: dict[str, list[Tensor]] = field(default_factory=dict)

    def note(self, name: str, value: Tensor) -> None:
        """Leave a tensor of this layer."""
        self.notes.setdefault(name, []).append(value)


def allowed(mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """The bool mask of an attention, true where a key may be seen; `None` stands for a causal `(T, T)`."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril() if mask is None else mask


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

    def forward(
        self, query_BTD: Tensor, memory_BTD: Tensor, mask: Tensor | None, context: Context | None = None
    ) -> Tensor:
        """Attend; `mask` is bool, true where a key may be seen, or None for a causal mask."""
        B, T, D = query_BTD.shape
        q = self.query(query_BTD).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, H, T, D/H)
        kv = self.key_value(memory_BTD).view(B, T, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        if context is not None and context.watch:
            context.note("attention", _weights(q, kv[0], mask, p))
        if p and q.device.type == "cpu":  # torch has no fused kernel for this case; at these lengths ours is faster
            mixed = _weights(q, kv[0], mask, p) @ kv[1]
        else:
            mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], mask, dropout_p=p, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


def attend(scores_BHTT: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the keys that may be seen; the others get exactly 0."""
    return torch.softmax(scores_BHTT.masked_fill(~mask, -torch.inf), dim=-1)


class ExplicitAttention(SelfAttention):
    """Self-attention whose weights can be worked on: a subclass says what becomes of them."""

    def forward(
        self, query_BTD: Tensor, memory_BTD: Tensor, mask: Tensor | None, context: Context | None = None
    ) -> Tensor:
        """As `SelfAttention`, with the weights of `weigh`."""
        context = context or Context()
        T = query_BTD.shape[1]
        q = self.query(query_BTD)
        k, v = self.key_value(memory_BTD).chunk(2, -1)
        weights, attacked = self.weigh(q, k, allowed(mask, T, q.device), context)
        if context.watch:
            context.note("attention", weights)
        if attacked is not None:
            context.second = self.mix(attacked, v)
        return self.mix(weights, v)

    def heads(self, x_BTD: Tensor) -> Tensor:
        """`(B, H, T, D/H)`."""
        return x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def mix(self, weights_BHTT: Tensor, v_BTD: Tensor) -> Tensor:
        """Weighted values through the output projection."""
        return self.out((weights_BHTT @ self.heads(v_BTD)).transpose(1, 2).flatten(2))

    def drop(self, weights: Tensor) -> Tensor:
        """Dropout of attention weights, in training."""
        return dropout(weights, self.dropout) if self.training and self.dropout > 0 else weights

    def weigh(self, q_BTD: Tensor, k_BTD: Tensor, mask: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Weights `(B, H, T, T)`, and those of a second branch if the context asks for it."""
        del context
        q, k = self.heads(q_BTD), self.heads(k_BTD)
        return self.drop(attend(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, mask)), None


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention weights `(B, H, T, T)` written out, with dropout."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = torch.softmax(scores.masked_fill(~allowed(mask, q.shape[-2], q.device), -torch.inf), dim=-1)
    return dropout(weights, p)


class Block(nn.Module):
    """Attention and a feed-forward layer with residuals.

    - `original`: the queries are normalised and carry the residual; relu, inner size D (arXiv 1808.09781).
    - `pre`: `x + f(LN x)`; gelu, inner size 4 D.
    - `post`: `LN(x + f(x))`; gelu, inner size 4 D.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        variant: Variant,
        *,
        attention: nn.Module | None = None,
        inner_size: int | None = None,
    ) -> None:
        super().__init__()
        inner = inner_size or (hidden_size if variant == "original" else 4 * hidden_size)
        self.variant = variant
        self.attention = SelfAttention(hidden_size, num_heads, dropout) if attention is None else attention
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

    def finish(self, x_BTD: Tensor, mixed_BTD: Tensor) -> Tensor:
        """What follows the attention: residuals, norms, feed-forward layer. `x_BTD` is what the residual carries."""
        if self.variant == "original":
            x_BTD = self.feed_norm(x_BTD + mixed_BTD)
            return x_BTD + self.feed(x_BTD)
        if self.variant == "pre":
            x_BTD = x_BTD + self.dropout(mixed_BTD)
            return x_BTD + self.feed(self.feed_norm(x_BTD))
        x_BTD = self.attention_norm(x_BTD + self.dropout(mixed_BTD))
        return self.feed_norm(x_BTD + self.feed(x_BTD))

    def forward(self, x_BTD: Tensor, mask: Tensor | None, context: Context | None = None) -> Tensor:
        """One block; `mask` as in `SelfAttention`."""
        query = x_BTD if self.variant == "post" else self.attention_norm(x_BTD)
        memory = x_BTD if self.variant == "original" else query
        residual = query if self.variant == "original" else x_BTD
        mixed = self.attention(query, memory, mask, context)
        if context is not None and context.second is not None:
            context.second = self.finish(residual, context.second)
        return self.finish(residual, mixed)


class Transformer(nn.Module):
    """Positions counted from the most recent item, blocks, and a last norm where the arrangement has one.

    Args:
        attention: an attention kind: `layer()` gives one block's attention, a call with the context what all blocks
            share in a pass, `enter` may change the input; its `positions` says whether position vectors are added to the input.
        positions: whether they are, where the attention is the plain one.
        inner_size: of the feed-forward layers; 4 D unless given (D for `original`).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_layers: int,
        num_heads: int,
        max_length: int,
        dropout: float,
        variant: Variant = "pre",
        attention: Any = None,
        positions: bool = True,
        inner_size: int | None = None,
    ) -> None:
        super().__init__()
        self.variant, self.max_length, self.attention = variant, max_length, attention
        positions = positions if attention is None else attention.positions
        self.position = nn.Embedding(max_length, hidden_size) if positions else None
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                num_heads,
                dropout,
                variant,
                attention=None if attention is None else attention.layer(),
                inner_size=inner_size,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-8)  # first for `post`, last for the others
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, lengths: Tensor, *, causal: bool = True, context: Context | None = None) -> Tensor:
        """Encode left-aligned vectors `(B, T, D)` of sequences of `lengths` `(B,)`, at most `max_length`."""
        place = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        context = context or Context()
        context.lengths = lengths
        if self.attention is not None:
            context.shared = self.attention(context)
            x_BTD = self.attention.enter(x_BTD, context)
        if self.variant == "original":
            x_BTD = x_BTD * x_BTD.shape[-1] ** 0.5
        if self.position is not None:
            age = (lengths.unsqueeze(1) - 1 - place).clamp(min=0)  # 0 is the most recent
            x_BTD = x_BTD + self.position(age)
        x_BTD = self.dropout(self.norm(x_BTD) if self.variant == "post" else x_BTD)
        mask = None if causal else (place < lengths.unsqueeze(1))[:, None, None, :]
        for i, block in enumerate(self.blocks):
            context.last_layer = i == len(self.blocks) - 1
            x_BTD = block(x_BTD, mask, context)
        if self.variant == "post":
            return x_BTD
        if context.second is not None:
            context.second = self.norm(context.second)
        return self.norm(x_BTD)


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
