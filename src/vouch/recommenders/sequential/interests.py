"""Encoders that give several vectors for a history, each an interest: ComiRec-SA, ComiRec-DR and MIND.

Sources: ComiRec (arXiv 2005.09347), MIND (arXiv 1904.08030). Every prefix of a history is an example, and all are read
in one pass; positions count from the start of a window, so that each prefix is read as it would be alone.
Shapes: `B` batch, `T` positions (of prefixes' ends, then of items `L`), `K` interests, `D` hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from vouch.config import Choice, setting
from vouch.nn.dropout import Dropout
from vouch.nn.transformer import Context
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.config import Loss, SequenceConfig

ROUNDS = 3


class InterestsConfig(SequenceConfig):
    """Settings of every encoder with several interests."""

    interests: int = setting(4, "vectors for each history (K)", ge=1, search=Choice((1, 2, 4, 8)))
    merge: Literal["max", "sum"] = setting("max", "how an item's scores by all interests become one")
    max_length: int = setting(20, "most recent history items that are read", ge=2)
    dropout: float = setting(0.0, "share of the item vectors' values dropped in training", ge=0, lt=1)
    loss: Loss = setting("sampled_softmax", "next-item loss of the interest that is nearest to the target")
    negatives: int = setting(1280, "items drawn for the losses that sample (bce and bpr always draw 1)", ge=1)
    routing_size: int = setting(256, "inner size of the self-attentive routing", ge=1)
    softmax_over: Literal["items", "interests"] = setting(
        "items", "what a routing weight is shared among, in DR and MIND"
    )


def squash(s: Tensor) -> Tensor:
    """`|s|^2 / (1 + |s|^2) s / |s|` over the last axis: the same direction, shorter than 1."""
    square = s.square().sum(-1, keepdim=True)
    return s * torch.rsqrt(square + 1e-12) * square / (1 + square)


def prefixes(T: int, device: torch.device) -> Tensor:
    """bool `(T, 1, T)`: which items belong to the prefix that ends at each position."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().unsqueeze(1)


class InterestEncoder(SequenceEncoder):
    """Item table, routing, and interests as weighted sums; leaves the routing `(B, T, K, L)` as the note `routing`."""

    def __init__(self, n_items: int, config: InterestsConfig) -> None:
        super().__init__(n_items)
        self.interests, self.merge = config.interests, config.merge
        self.item = nn.Embedding(n_items + 1, config.hidden_size, padding_idx=0)
        nn.init.normal_(self.item.weight, std=(2 / config.hidden_size) ** 0.5)
        with torch.no_grad():
            self.item.weight[0].zero_()
        self.dropout = Dropout(config.dropout)

    @abstractmethod
    def route(self, h_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Interests `(B, T, K, D)` of every prefix, and the routing weights `(B, T, K, L)`."""

    def read(self, x_BTD: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """`(B, T, K, D)`, or `(B, T, D)` where there is one interest."""
        del lengths  # what comes after the end is in no prefix that is asked for
        V, routing = self.route(self.dropout(x_BTD))
        context.note("routing", routing)
        return V.squeeze(2) if self.interests == 1 else V


class SelfAttentive(InterestEncoder):
    """ComiRec-SA: `A = softmax over items (W2 tanh(W1 (H + P)))`, `V = A H`."""

    def __init__(self, n_items: int, config: InterestsConfig) -> None:
        super().__init__(n_items, config)
        self.position = nn.Embedding(config.max_length, config.hidden_size)
        self.inner = nn.Linear(config.hidden_size, config.routing_size, bias=False)
        self.outer = nn.Linear(config.routing_size, config.interests, bias=False)
        for weight in (self.position.weight, self.inner.weight, self.outer.weight):
            nn.init.kaiming_normal_(weight)

    def route(self, h_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """All prefixes share the logits; each has its own softmax."""
        T = h_BLD.shape[1]
        logits_BLK = self.outer(torch.tanh(self.inner(h_BLD + self.position.weight[:T])))
        seen = prefixes(T, h_BLD.device)
        A = torch.softmax(logits_BLK.float().transpose(1, 2).unsqueeze(1).masked_fill(~seen, -torch.inf), -1)
        return torch.einsum("btkl,bld->btkd", A.to(h_BLD.dtype), h_BLD), A


class Average(InterestEncoder):
    """One vector: the mean of the history through a dense layer; its routing is even."""

    def __init__(self, n_items: int, config: InterestsConfig) -> None:
        super().__init__(n_items, config)
        self.interests = 1
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def route(self, h_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """The means of all prefixes, by cumulative sums."""
        B, T, _ = h_BLD.shape
        count = torch.arange(1, T + 1, device=h_BLD.device)
        mean = h_BLD.cumsum(1) / count.unsqueeze(1)
        even = (prefixes(T, h_BLD.device) / count.view(T, 1, 1)).expand(B, T, 1, T)
        return self.dense(mean).unsqueeze(2), even


class Dynamic(InterestEncoder):
    """ComiRec-DR and MIND: capsules routed by agreement, with gradients through the last round only."""

    start: Tensor

    def __init__(self, n_items: int, config: InterestsConfig, *, shared: bool, relu: bool) -> None:
        super().__init__(n_items, config)
        self.softmax_over, self.shared = config.softmax_over, shared
        size, K = config.hidden_size, config.interests
        places = 1 if shared else config.max_length
        # MIND: one bilinear map for all; ComiRec-DR: one for each position and interest
        self.weight = nn.Parameter(torch.empty(places, 1 if shared else K, size, size))
        nn.init.normal_(self.weight, std=(2 / size) ** 0.5)
        start = torch.randn(config.max_length, K) if shared else torch.zeros(config.max_length, K)
        self.register_buffer("start", start)
        self.relu = nn.Sequential(nn.Linear(size, size), nn.ReLU()) if relu else None

    def route(self, h_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Three rounds for each prefix."""
        T, K = h_BLD.shape[1], self.interests
        if self.shared:
            u = (h_BLD @ self.weight[0, 0].T).unsqueeze(2).expand(-1, -1, K, -1)
        else:
            u = torch.einsum("lkij,blj->blki", self.weight[:T], h_BLD)
        seen = prefixes(T, h_BLD.device)  # (T, 1, L)
        logits = self.start[:T].T.expand(len(h_BLD), T, K, T)  # (B, T, K, L)
        still = u.detach()
        for turn in range(ROUNDS):
            if self.softmax_over == "items":
                c = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)
            else:
                c = torch.softmax(logits, 2) * seen
            last = turn == ROUNDS - 1
            v = squash(torch.einsum("btkl,blkd->btkd", c, u if last else still))
            if not last:
                logits = logits + torch.einsum("blkd,btkd->btkl", still, v)
        return (v if self.relu is None else self.relu(v)), c


class InterestRecommender(SequentialRecommender):
    """Ranks items by the interest that likes them most, or by all together (`merge`)."""

    config: InterestsConfig
