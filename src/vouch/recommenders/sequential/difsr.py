"""DIF-SR: side information of the items in the attention scores, not in the item vectors.

Source: Decoupled Side Information Fusion for Sequential Recommendation, arXiv 2204.11046. Items, positions and each
attribute give a matrix of attention scores of their own; the scores are fused, and item values alone are mixed by them.
A second loss predicts the attributes of the next item. Use it with any transformer here: `attention="difsr"`; the
prediction of attributes alone, with any encoder: `objective+=difsr`.

What differs: the columns of the fusions `gate` and `concat` count from the query back, and each source is masked before
the fusion and again after it, so that no position sees later items although all are trained in one pass (in a
bidirectional encoder they count from the most recent item). An item without an attribute has a vector that stands for
that, unless `missing=zero`. Attribute vectors are learned, as the paper has it; in the released code they stay as drawn
(`embeddings=frozen`), which is what the published numbers belong to. One dropout serves the attention too, where the paper
has 0.3 beside 0.5. Sizes are those that the methods here share; the paper's are `hidden_size=256`,
`difsr.attribute_size=64`, 3 or 4 layers and 4 or 8 heads.
Shapes: `B` batch, `H` heads, `T` positions, `D` hidden size, `S` sources, `A` values of one item.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.config import Choice, Config, setting
from vouch.data import Catalog, Split
from vouch.errors import DataError
from vouch.nn.transformer import Context, ExplicitAttention, SelfAttention, attend, init_weights
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.contrast import one_vector
from vouch.recommenders.sequential.parts import Attention, Setup, Term, part
from vouch.recommenders.sequential.sasrec import SASRec, SASRecConfig
from vouch.registry import Card, register


class AttributesConfig(Config):
    """Which attributes of the items are read, and how their values become a vector."""

    fields: tuple[str, ...] = setting((), "attributes of the catalogue; none named: all categorical ones")
    bins: int = setting(10, "parts of equal size that numeric attributes are cut into", ge=2)
    pooling: Literal["sum", "mean"] = setting("sum", "how several values of one item become a vector")
    missing: Literal["own", "zero"] = setting("own", "the vector of items without the attribute: their own, or zero")


class DecoupledConfig(AttributesConfig):
    """Settings of the decoupled attention and of the attribute predictor."""

    attribute_size: int = setting(32, "length of the attribute vectors", ge=1, search=Choice((16, 32, 64)))
    fusion: Literal["gate", "sum", "concat"] = setting("gate", "how the scores of all sources become one")
    positions: bool = setting(True, "positions are a source; without, the order of the history is not seen")
    embeddings: Literal["learned", "frozen"] = setting("learned", "attribute vectors learned, or kept as drawn")
    predict: float = setting(10.0, "weight of the attribute predictors (lambda)", ge=0, search=Choice((5.0, 10.0)))


def attribute_tables(catalog: Catalog, settings: AttributesConfig) -> dict[str, NDArray[np.int64]]:
    """Codes `(N, A)` of each field, padded with 0, in the order named.

    Raises:
        DataError: the catalogue has no attributes, or a field that no item has. UnknownIdError: a field is unknown.
    """
    names = settings.fields or tuple(catalog.columns("category") + catalog.columns("categories"))
    if not names:
        raise DataError(
            "there are no attributes of items to read, and this model needs some",
            hint="give a table of items (--items FILE) with categories, tags or brands, or use sasrec",
        )
    tables = {}
    for name in names:
        number = name in catalog.columns("number")
        codes = binned(catalog, name, settings.bins) if number else catalog.attribute(name).codes.astype(np.int64)
        if not codes.any():
            raise DataError(f"no item has a value of the attribute {name!r}", hint="leave it out of the fields")
        if codes.max() == 1 and codes.any(1).all():
            warnings.warn(f"the attribute {name!r} has one value only, so it tells nothing", stacklevel=2)
        tables[name] = codes
    return tables


def binned(catalog: Catalog, name: str, bins: int) -> NDArray[np.int64]:
    """Codes `(N, 1)` of a numeric attribute cut at its quantiles, from 1; 0 where it is missing."""
    values = catalog.table[name].cast(float, strict=False).to_numpy().astype(np.float64)
    known = np.isfinite(values)
    cuts = np.unique(np.quantile(values[known], np.linspace(0, 1, bins + 1)[1:-1])) if known.any() else np.zeros(0)
    codes = np.where(known, np.searchsorted(cuts, np.nan_to_num(values), side="right") + 1, 0)
    return np.unique(codes, return_inverse=True)[1].reshape(-1, 1) + int(known.all())  # without gaps


class AttributeVectors(nn.Module):
    """The vector of one attribute for rows of the item table: the sum or mean of its values' vectors."""

    codes: Tensor

    def __init__(self, codes: Tensor, size: int, settings: AttributesConfig, *, frozen: bool = False) -> None:
        super().__init__()
        # row 0 is padding, and so has no values; like hidden items, whose rows come after the last
        self.register_buffer("codes", F.pad(codes, (0, 0, 1, 1)), persistent=False)
        self.pooling, self.missing = settings.pooling, settings.missing
        drawn = torch.randn(int(codes.max()) + 1, size)
        self.weight = nn.Parameter(drawn if frozen else 0.02 * drawn, requires_grad=not frozen)  # row 0 is missing

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., size)` of rows of the item table."""
        codes = self.codes[rows]  # (..., A)
        has = codes > 0
        pooled = (F.embedding(codes, self.weight) * has.unsqueeze(-1)).sum(-2)
        count = has.sum(-1, keepdim=True)
        if self.pooling == "mean":
            pooled = pooled / count.clamp(min=1)
        if self.missing == "zero":
            return pooled
        none = (count == 0) & (rows > 0).unsqueeze(-1) & (rows < len(self.codes) - 1).unsqueeze(-1)
        return pooled + none * self.weight[0]


class DecoupledAttention(ExplicitAttention):
    """One layer: scores of items, positions and attributes, fused; values of items alone."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        max_length: int,
        fields: int,
        settings: DecoupledConfig,
    ) -> None:
        super().__init__(hidden_size, num_heads, dropout)
        self.fusion, self.width = settings.fusion, max_length
        size = settings.attribute_size
        self.position_query = nn.Linear(hidden_size, hidden_size) if settings.positions else None
        self.position_key = nn.Linear(hidden_size, hidden_size) if settings.positions else None
        self.field_query = nn.ModuleList(nn.Linear(size, size) for _ in range(fields))
        self.field_key = nn.ModuleList(nn.Linear(size, size) for _ in range(fields))
        sources = fields + 1 + settings.positions
        if settings.fusion == "concat":
            self.joined = nn.Linear(sources * max_length, max_length)
        elif settings.fusion == "gate":
            self.inner, self.energy = nn.Linear(max_length, max_length), nn.Linear(max_length, 1)

    def weigh(self, q_BTD: Tensor, k_BTD: Tensor, mask: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Softmax of the fused scores."""
        q, k = self.heads(q_BTD), self.heads(k_BTD)
        sources = [q @ k.transpose(-1, -2)]
        ages, columns, position_LD, fields = context.shared
        if self.position_query is not None and self.position_key is not None:
            p_q, p_k = (
                self.heads(self.position_query(position_LD)[None]),
                self.heads(self.position_key(position_LD)[None]),
            )
            table = (p_q @ p_k.transpose(-1, -2))[0]  # (H, L, L)
            sources.append(table[:, ages.unsqueeze(2), ages.unsqueeze(1)].transpose(0, 1))  # (B, H, T, T)
        for query, key, F_BTS in zip(self.field_query, self.field_key, fields, strict=True):
            sources.append(self.heads(query(F_BTS)) @ self.heads(key(F_BTS)).transpose(-1, -2))
        # no source may carry what the query must not see into the fusion
        scores = torch.stack([source.masked_fill(~mask, 0.0) for source in sources], -2).float()  # (B, H, T, S, T)
        fused = self.fuse(scores, columns, causal=bool(mask.dim() == 2))
        weights = attend(fused * q.shape[-1] ** -0.5, mask)
        return self.drop(weights), None

    def fuse(self, scores_BHTST: Tensor, columns: Tensor, *, causal: bool) -> Tensor:
        """One score for each pair `(B, H, T, T)`."""
        if self.fusion == "sum":
            return scores_BHTST.sum(-2)
        T = scores_BHTST.shape[-1]
        place = torch.arange(T, device=columns.device)
        # the column of key j: how far it lies behind query i, or behind the end; what is after either is 0 anyway
        back = place.unsqueeze(1) - place
        column = torch.where(back < 0, back + T, back)[:, None] if causal else columns[:, None, None, None]
        index = column.expand_as(scores_BHTST)
        rows = torch.zeros_like(scores_BHTST).scatter(-1, index, scores_BHTST)
        if self.fusion == "gate":
            inner = F.relu(F.linear(rows, self.inner.weight[:, :T], self.inner.bias))
            share = torch.softmax(self.energy(inner), dim=-2)  # (B, H, T, S, 1)
            return (share * scores_BHTST).sum(-2)
        weight = self.joined.weight[:T].unflatten(1, (-1, self.width))[..., :T]  # (T, S, T)
        out = torch.einsum("bhist,cst->bhic", rows, weight) + self.joined.bias[:T]
        return out.gather(-1, index[..., 0, :])


@part("attention", "difsr", "scores of items, positions and attributes apart, then fused")
class Decoupled(Attention):
    """The attention kind of DIF-SR. Positions are one of its sources, so none are added to the input."""

    Config = DecoupledConfig
    brings = ("difsr",)
    positions = False

    def __init__(self, config: Any, settings: DecoupledConfig, facts: dict[str, Tensor]) -> None:
        super().__init__(config, settings, facts)
        frozen = settings.embeddings == "frozen"
        self.fields = nn.ModuleList(
            AttributeVectors(facts[name], settings.attribute_size, settings, frozen=frozen) for name in sorted(facts)
        )
        self.position = nn.Embedding(config.max_length, config.hidden_size)
        self.shape = (config.hidden_size, config.num_heads, config.dropout, config.max_length, len(facts), settings)
        SelfAttention(settings.attribute_size, config.num_heads, 0.0)  # complains where the heads do not divide it

    @classmethod
    def facts(cls, settings: DecoupledConfig, split: Split) -> dict[str, Tensor]:
        """The codes of each attribute `(N, A)`."""
        tables = attribute_tables(split.dataset.catalog, settings)
        return {f"attribute.{i:03d}.{name}": torch.from_numpy(codes) for i, (name, codes) in enumerate(tables.items())}

    def layer(self) -> DecoupledAttention:
        """One block's attention."""
        return DecoupledAttention(*self.shape)

    def forward(self, context: Context) -> Any:
        """Ages and columns `(B, T)`, position vectors `(L, D)`, and attribute vectors `(B, T, size)` of each field."""
        assert context.rows is not None and context.lengths is not None
        place = torch.arange(context.rows.shape[1], device=context.rows.device)
        ages = context.lengths.unsqueeze(1) - 1 - place
        columns = torch.where(ages >= 0, ages, place)
        return ages.clamp(min=0), columns, self.position.weight, [field(context.rows) for field in self.fields]


@part("attention", "early", "plain attention, with attributes added to the item vectors (SASRec-F)")
class Early(Attention):
    """Attribute vectors added to the input: what DIF-SR argues against."""

    Config = AttributesConfig

    def __init__(self, config: Any, settings: AttributesConfig, facts: dict[str, Tensor]) -> None:
        super().__init__(config, settings, facts)
        self.fields = nn.ModuleList(
            AttributeVectors(facts[name], config.hidden_size, settings) for name in sorted(facts)
        )
        self.shape = (config.hidden_size, config.num_heads, config.dropout)

    @classmethod
    def facts(cls, settings: AttributesConfig, split: Split) -> dict[str, Tensor]:
        """The codes of each attribute `(N, A)`."""
        tables = attribute_tables(split.dataset.catalog, settings)
        return {f"attribute.{i:03d}.{name}": torch.from_numpy(codes) for i, (name, codes) in enumerate(tables.items())}

    def layer(self) -> SelfAttention:
        """Plain attention."""
        return SelfAttention(*self.shape)

    def enter(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Items and their attributes."""
        for field in self.fields:
            x_BTD = x_BTD + field(context.rows)
        return x_BTD


@part("objective", "difsr", "the attributes of the next item")
class AttributePrediction(Term):
    """Binary cross-entropy of each attribute value of the target, averaged over targets and values."""

    Config = DecoupledConfig

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """One prediction a position."""
        return one_vector(recommender)

    def __init__(self, settings: DecoupledConfig, setup: Setup) -> None:
        super().__init__(settings, setup)
        size = setup.recommender.config.hidden_size
        tables = attribute_tables(setup.split.dataset.catalog, settings) if settings.predict > 0 else {}
        for i, codes in enumerate(tables.values()):
            self.register_buffer(f"codes_{i}", torch.from_numpy(codes), persistent=False)  # (N, A)
        self.heads = nn.ModuleList(nn.Linear(size, int(codes.max()) + 1) for codes in self.buffers())
        self.heads.apply(init_weights)

    def active(self) -> bool:
        """Only with a weight."""
        return bool(self.settings.predict > 0)

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """`{"attributes": ...}`, the sum over the fields."""
        del encoder, context
        hidden = hidden_BTD.flatten(0, 1).index_select(0, batch.at)  # (n, D)
        total = hidden.new_zeros((), dtype=torch.float32)
        for head, codes in zip(self.heads, self.buffers(), strict=True):
            logits = head(hidden).float()  # (n, C)
            wanted = torch.zeros_like(logits).scatter_(1, codes[batch.target], 1.0)  # 1 however often a value is named
            loss = F.binary_cross_entropy_with_logits(logits[:, 1:], wanted[:, 1:], reduction="none")
            total = total + loss.mean(1).sum() * batch.weight
        return {"attributes": self.settings.predict * total}


class DIFSRConfig(SASRecConfig):
    """Settings of DIF-SR on SASRec."""

    attention: str = setting("difsr", "attention kind of the transformer")
    inner_size: int = setting(64, "size of the feed-forward layers; 0 is 4 x hidden_size", ge=0)
    batch_size: int = setting(256, "histories of one batch", ge=1)


@register(
    Card(
        slug="difsr",
        name="DIF-SR",
        area="recommenders/sequential",
        summary="a transformer with side information of the items in its attention scores",
        paper="2204.11046",
        year=2022,
        needs=("attributes",),
    )
)
class DIFSR(SASRec):
    """SASRec with decoupled side information."""

    Config = DIFSRConfig
