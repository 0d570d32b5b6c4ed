"""GCL4SR: the items of a history in the context of everybody's transitions, seen twice by chance.

Source: Enhancing Sequential Recommendation with Graph Contrastive Learning, arXiv 2205.14837. A weighted graph joins items
that follow each other in any history. Two random draws of neighbourhoods give two views of each item of a history; a
contrast pulls the views of a history together, an MMD loss keeps them, gated by the user, near the local item vectors,
and all streams are fused into the query. The losses alone fit other encoders: `objective+=gcl4sr`.

What differs from the released code: gates are learned and saved; initialisation is the usual one; neighbourhoods are
drawn once for each distinct item of a batch, never for padding. The query of every prefix of a history is computed in
one pass, equal to what the prefix alone would give: places count from the end of each prefix. The losses between views
take whole histories. To rank, one seeded draw for the whole catalogue is used, so scores have no chance in them. As the
convolution divides by the weights of drawn edges only, an item's context depends a little on what else is drawn for.
Users without a training event have no term in the gate. Weight decay is decoupled. With `objective+=gcl4sr` on another
encoder the loss has a graph network of its own over the shared item table, and no gate. The batch holds 128 histories
with all their prefixes, where the paper's holds 1,024 prefixes.
Shapes: `B` batch, `T` positions (ends of prefixes, then `J` items in them), `D` hidden size, `N` items.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.config import Choice, Config, setting
from vouch.data import Split
from vouch.data.graphs import cached, transition_graph
from vouch.nn.dropout import Dropout
from vouch.nn.graphs import GraphEncoder, mmd
from vouch.nn.transformer import Context, Transformer, init_weights
from vouch.recommenders.sequential.base import Objective, SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.contrast import one_vector
from vouch.recommenders.sequential.parts import Attention, Setup, Term, part
from vouch.recommenders.sequential.sasrec import SASRecConfig
from vouch.registry import Card, register

SEEDS = (0, 1)
"""Of the two draws that rankings use."""


class GraphConfig(Config):
    """Settings of the item graph and of the losses between its views."""

    graph: Literal["weighted", "unweighted", "rewired", "none"] = setting(
        "weighted",
        "the item graph; unweighted and rewired (other neighbours, as many) are controls, none leaves it out",
    )
    window: int = setting(3, "most events between two items that are joined", ge=1)
    row_normalised: bool = setting(False, "scale each item's weights to sum 1 first")
    neighbors: int = setting(
        20, "neighbours drawn for each item in each of the two hops", ge=1, search=Choice((10, 20))
    )
    views: Literal["two", "one"] = setting("two", "one uses the same draw twice, without contrast; a control")
    gate: Literal["user", "item", "none"] = setting(
        "user",
        "what gates a global vector: the item and the user, the item alone, or nothing; user learns a table of users",
    )
    contrast: float = setting(1.0, "weight of the contrast between the views (lambda 1)", ge=0)
    mmd: float = setting(0.1, "weight of the distance to the local item vectors (lambda 2)", ge=0)
    mmd_form: Literal["fast", "exact"] = setting(
        "fast", "histories as samples of projected positions, or positions as samples, a history at a time"
    )
    temperature: float = setting(0.5, "of the contrast", gt=0)


def graph_of(settings: GraphConfig, split: Split) -> dict[str, Tensor]:
    """The graph in compressed rows, as `indptr`, `indices` and `weight`.

    Raises:
        DataError: no history has two events.
    """
    made = cached(
        transition_graph,
        split.train,
        split.dataset.origin,
        window=settings.window,
        weighted=settings.graph != "unweighted",
        row_normalised=settings.row_normalised,
    )
    if settings.graph == "rewired":
        made = made.rewired(np.random.default_rng(0))
    names = ("indptr", "indices", "weight")
    return {name: torch.from_numpy(np.array(getattr(made, name))) for name in names}


def real_mean(x_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """Mean over the positions that hold an item `(B, D)`; zero where none does."""
    return (x_BTD * real_BT.unsqueeze(-1)).sum(1) / real_BT.sum(1, keepdim=True).clamp(min=1)


def view_contrast(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """The sum of both directions' means of `-log(e^(a.b) / (sum over all b' of e^(a.b') + sum over others a' of e^(a.a')))`
    for unit vectors of `(B, D)`, exponents by temperature."""
    a, b = F.normalize(one.float(), dim=-1), F.normalize(two.float(), dim=-1)
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    pair = torch.arange(len(a), device=a.device)
    total = a.new_zeros(())
    for x, y in ((a, b), (b, a)):
        logits = torch.cat([x @ y.T, (x @ x.T).masked_fill(own, -torch.inf)], 1) / temperature
        total = total + F.cross_entropy(logits, pair)
    return total


class GCL4SREncoder(SequenceEncoder):
    """Local transformer, graph views, gates, fusion and pooling; leaves the views as the note `graph`."""

    def __init__(
        self,
        n_items: int,
        config: GCL4SRConfig,
        settings: GraphConfig,
        facts: dict[str, Tensor],
        attention: Attention | None,
    ) -> None:
        super().__init__(n_items)
        size = config.hidden_size
        self.settings, self.max_length = settings, config.max_length
        self.item = nn.Embedding(n_items + 1, size, padding_idx=0)
        self.transformer = Transformer(
            size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            max_length=config.max_length,
            dropout=config.dropout,
            variant=config.variant,
            attention=attention,
            positions=False,
        )
        self.graph: GraphEncoder | None = None
        if settings.graph != "none":
            graph = (facts[name] for name in ("indptr", "indices", "weight"))
            self.graph = GraphEncoder(size, *graph, neighbors=settings.neighbors, dropout=config.dropout)
        by_user = settings.gate == "user"
        self.gate_item = nn.Linear(size, 1, bias=False) if settings.gate != "none" else None
        self.gate_user = nn.Linear(size, config.max_length, bias=False) if by_user else None
        self.user = nn.Embedding(int(facts["users"]), size) if by_user else None
        self.fuse = nn.Linear(3 * size, size, bias=False)
        self.position = nn.Embedding(config.max_length, size)  # 0 is the last item of a prefix
        self.pool_in = nn.Linear(2 * size, size, bias=False)
        self.pool_own = nn.Linear(size, size)
        self.pool_mean = nn.Linear(size, size, bias=False)
        self.pool_out = nn.Linear(size, 1, bias=False)
        self.dropout = Dropout(config.dropout)
        self.apply(init_weights)
        self._catalogue: tuple[Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> GCL4SREncoder:
        """Also forgets the views of the catalogue when training goes on."""
        if mode:
            self._catalogue = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._catalogue = None  # those of other weights
        super()._load_from_state_dict(*args)

    def views(self, rows_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Both views `(B, T, D)` of the items: fresh draws in training, else the seeded ones of the whole catalogue.

        Padding and hidden items have the view zero.
        """
        assert self.graph is not None
        real, place = rows_BT > 0, (rows_BT - 1).clamp(min=0)
        if self.training:
            nodes, found = torch.unique(place[real], return_inverse=True)
            place = torch.zeros_like(place).masked_scatter(real, found)
            one = self.graph(self.item_vectors(), nodes)
            two = one if self.settings.views == "one" else self.graph(self.item_vectors(), nodes)
        else:
            one, two = self.catalogue()
        return F.embedding(place, one) * real.unsqueeze(-1), F.embedding(place, two) * real.unsqueeze(-1)

    @torch.no_grad()
    def catalogue(self) -> tuple[Tensor, Tensor]:
        """Both views `(N, D)` of all items, by seeded draws; kept until training goes on."""
        assert self.graph is not None
        if self._catalogue is None:
            table = self.item_vectors()
            nodes = torch.arange(self.n_items, device=table.device)
            draws = [torch.Generator(table.device).manual_seed(seed) for seed in SEEDS]
            one = self.graph(table, nodes, draws[0])
            two = one if self.settings.views == "one" else self.graph(table, nodes, draws[1])
            self._catalogue = one, two
        return self._catalogue

    def read(self, x_BTD: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """`(B, T, D)`: the query of every prefix; zero after the end of a history.

        An item's fused vector in a prefix is a sum of three streams, each a vector of the item times a weight of the
        pair. Sums over a prefix are therefore products of matrices `(T, J)` and `(J, D)`; only the pooling's weights
        need vectors of pairs, and are computed for real pairs alone, `P` of them in one row.
        """
        assert context.rows is not None
        B, T, D = x_BTD.shape
        Z = self.transformer(x_BTD, lengths, context=context)  # without positions, so the same in every prefix
        place = torch.arange(T, device=x_BTD.device)
        inside = (place.unsqueeze(1) >= place) & (place < lengths.unsqueeze(1)).unsqueeze(2)  # (B, T, J)
        W_z, W_a, W_b = self.fuse.weight.split(D, 1)
        streams = [(inside.to(Z.dtype), Z @ W_z.T)]  # weights (B, T, J) and vectors (B, J, D)
        if self.graph is not None:
            bias = self.user_bias(context, B)  # (B, L) by age
            age = (place.unsqueeze(1) - place).clamp(min=0)  # (T, J): how far item j lies behind end t
            oldest = bias.gather(1, (lengths.unsqueeze(1) - 1 - place).clamp(min=0))  # of whole histories
            gated = []
            for G, W in zip(self.views(context.rows), (W_a, W_b), strict=True):
                if self.gate_item is None:
                    Q, weight = G, streams[0][0]
                else:
                    gate = self.gate_item(G).squeeze(-1)  # (B, J)
                    Q = torch.sigmoid(gate + oldest).unsqueeze(-1) * G
                    weight = torch.sigmoid(gate.unsqueeze(1) + bias[:, age]) * inside
                gated.append((G, Q))
                streams.append((weight, self.dropout(G) @ W.T))  # dropout of Q = r G is that of G, times r
            if self.training:
                context.graph = gated
        mean = torch.stack([w @ V for w, V in streams]).sum(0) / (place + 1).unsqueeze(-1)
        alpha = self.pool(streams, mean, inside)
        return self.dropout(torch.stack([(alpha * w) @ V for w, V in streams]).sum(0))

    def pool(self, streams: list[tuple[Tensor, Tensor]], mean_BTD: Tensor, inside: Tensor) -> Tensor:
        """Weights `(B, T, J)` of the items of each prefix; 0 where there is no item."""
        T, D = mean_BTD.shape[1:]
        row, end, item = inside.nonzero().unbind(1)  # (P,)
        whose = row * T + item
        W_p, W_F = self.pool_in.weight.split(D, 1)
        c = (self.position.weight[:T] @ W_p.T).index_select(0, end - item)
        for w, V in streams:
            found = (V @ W_F.T).flatten(0, 1).index_select(0, whose)  # (P, D)
            c = c + (found if w is streams[0][0] else w.masked_select(inside).unsqueeze(-1) * found)
        own = self.pool_own(torch.tanh(c)) + self.pool_mean(mean_BTD).flatten(0, 1).index_select(0, row * T + end)
        alpha = self.pool_out(torch.sigmoid(own)).squeeze(-1)
        return torch.zeros_like(streams[0][0]).masked_scatter(inside, alpha.to(mean_BTD.dtype))

    def user_bias(self, context: Context, B: int) -> Tensor:
        """`(B, L)` by age: what the user adds to the gate; 0 for unknown ones."""
        if self.user is None or self.gate_user is None or context.user is None:
            return self.item.weight.new_zeros(B, self.max_length)
        known = (context.user >= 0).unsqueeze(1)
        return self.gate_user(self.user(context.user.clamp(min=0))) * known


@part("objective", "gcl4sr", "contrast between two draws of the item graph, and their distance to the item vectors")
class GraphContrast(Term):
    """The losses `graph` and `mmd`."""

    Config = GraphConfig

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """Views are of items, and so fit every encoder with an item table and one vector a position."""
        if recommender.config.part("gcl4sr").graph == "none" and not isinstance(recommender, GCL4SR):
            return "without a graph (gcl4sr.graph=none) it has nothing to compare"
        return one_vector(recommender)

    def __init__(self, settings: GraphConfig, setup: Setup) -> None:
        super().__init__(settings, setup)
        config = setup.recommender.config
        self.own: GraphEncoder | None = None
        if not isinstance(setup.encoder, GCL4SREncoder):
            graph = graph_of(settings, setup.split)
            self.own = GraphEncoder(config.hidden_size, **graph, neighbors=settings.neighbors, dropout=config.dropout)
        self.local = nn.Linear(config.hidden_size, 1)
        self.context = nn.Linear(config.hidden_size, 1)
        self.apply(init_weights)

    def active(self) -> bool:
        """With a graph and any weight."""
        return self.settings.graph != "none" and (self.settings.contrast > 0 or self.settings.mmd > 0)

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """Those that have a weight. A single history has no other to differ from, and is no sample of histories."""
        del hidden_BTD
        settings, found, alone = self.settings, dict[str, Tensor](), len(batch.items) < 2
        if alone:
            warnings.warn(
                "a batch holds one history: it takes no part in the contrast and the fast MMD; raise batch_size if this "
                "is not the last batch",
                stacklevel=2,
            )
        (G_a, Q_a), (G_b, Q_b) = context.graph if self.own is None else self.views(encoder, batch)
        real = batch.items >= 0
        if settings.contrast > 0 and settings.views == "two" and not alone:
            one, two = real_mean(G_a, real), real_mean(G_b, real)
            found["graph"] = settings.contrast * view_contrast(one, two, settings.temperature)
        if settings.mmd > 0 and not (alone and settings.mmd_form == "fast"):
            E, _ = encoder.embed(batch.items)
            found["mmd"] = settings.mmd * (self.distance(E, Q_a, real) + self.distance(E, Q_b, real))
        return found

    def views(self, encoder: SequenceEncoder, batch: SequenceBatch) -> list[tuple[Tensor, Tensor]]:
        """Two draws for the items of the batch, without gates."""
        assert self.own is not None
        real = batch.items >= 0
        nodes, found = torch.unique(batch.items[real], return_inverse=True)
        place = torch.zeros_like(batch.items).masked_scatter(real, found)
        table = encoder.item.weight[1 : encoder.n_items + 1]
        one = F.embedding(place, self.own(table, nodes))
        two = one if self.settings.views == "one" else F.embedding(place, self.own(table, nodes))
        return [(one, one), (two, two)]

    def distance(self, E_BTD: Tensor, Q_BTD: Tensor, real_BT: Tensor) -> Tensor:
        """MMD between local and global vectors: of projected histories, or the mean of that within each history."""
        if self.settings.mmd_form == "exact":
            return mmd(E_BTD, Q_BTD, real_BT).mean()
        local, context = self.local(E_BTD).squeeze(-1), self.context(Q_BTD).squeeze(-1)  # (B, T)
        return mmd(local * real_BT, context * real_BT)


class GCL4SRConfig(SASRecConfig):
    """Settings of GCL4SR."""

    objective: tuple[str, ...] = setting(("next", "gcl4sr"), "losses that are added up; += adds one")
    parts: dict[str, dict[str, Any]] = setting({"gcl4sr": {}}, "settings of the parts")
    positions: bool = setting(False, "its local encoder has none; they stand in the pooling")
    weight_decay: float = setting(5e-5, "decoupled weight decay", ge=0)
    rate_decay: float = setting(0.7, "factor on the learning rate every five epochs", gt=0, le=1)


@register(
    Card(
        slug="gcl4sr",
        name="GCL4SR",
        area="recommenders/sequential",
        summary="histories in the context of a graph of everybody's transitions, seen in two views",
        paper="2205.14837",
        year=2022,
    )
)
class GCL4SR(SequentialRecommender):
    """Graph contrastive sequential recommendation."""

    Config = GCL4SRConfig
    network: GCL4SREncoder
    attends = True

    def settings(self) -> GraphConfig:
        """Those of the graph; the defaults where the losses are left out."""
        used = "gcl4sr" in self.config.terms()
        found: GraphConfig = self.config.part("gcl4sr") if used else GraphConfig(contrast=0.0, mmd=0.0)
        return found

    def facts(self, split: Split) -> dict[str, Tensor]:
        """The graph, and the number of users."""
        settings = self.settings()
        graph = {} if settings.graph == "none" else graph_of(settings, split)
        return {**super().facts(split), **graph, "users": torch.tensor(split.train.n_users)}

    def begin(self, split: Split) -> Objective:
        """As elsewhere; users of the log without a training event have no term in the gate."""
        objective, user = super().begin(split), self.network.user
        if user is not None:
            with torch.no_grad():
                user.weight[torch.from_numpy(split.train.lengths == 0)] = 0.0
        return objective

    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> GCL4SREncoder:
        """A new encoder."""
        return GCL4SREncoder(n_items, self.config, self.settings(), facts, self.attention(facts))

    def attention(self, facts: dict[str, Tensor]) -> Attention | None:
        """As for every transformer, without the facts of the graph."""
        return super().attention({name: fact for name, fact in facts.items() if name.startswith("attribute.")})

    def schedule(self, steps: int, per_epoch: int) -> Callable[[int], float]:
        """The learning rate falls every five epochs."""
        del steps
        decay = self.config.rate_decay
        return lambda step: float(decay ** (step // per_epoch // 5))
