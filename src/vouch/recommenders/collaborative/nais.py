"""NAIS: which items of the history matter is learned anew for each target.

Source: NAIS: Neural Attentive Item Similarity Model, arXiv 1809.07053: FISM with an attention network between target
and history items, and a softmax whose denominator is raised to `beta`, so that long histories are not punished:
`y_ui = n^-alpha sum_j a_ij p_i . q_j + b_i`, `a_ij = exp(f_ij) / (sum_j' exp(f_ij'))^beta`.

It starts from FISM, trained first (`pretrain_epochs`) or saved (`pretrained`). As in the released code there are an item
bias and `n^-alpha`, and the penalty is on full tables and W only. What differs: batches and `positives` as in FISM; the
bias of the hidden layer starts at 0; the sums of exponentials are taken after subtracting the greatest logit, and what is
left of it for `beta` below 1, `exp(m (1 - beta))`, is clamped where float32 would overflow.
Shapes: `U` users or queries, `L` history items, `C` candidates, `D` hidden size, `A` attention size, `N` items.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vouch.config import Choice, setting
from vouch.data import Queries, Split
from vouch.errors import ConfigError, DataError
from vouch.recommenders.base import load
from vouch.recommenders.collaborative.fism import (
    CELLS,
    FISM,
    HistoryBatch,
    HistoryConfig,
    HistoryRecommender,
    ItemTables,
    check_codes,
    copy_tables,
    distinct,
    overflow_limit,
    pointwise,
)
from vouch.registry import Card, register
from vouch.training import FitReport, Run, seeded

CANDIDATES = 256
"""Items scored at once."""
SCORE_CELLS = 1 << 18
"""Values of the attention's hidden layer at once when scoring, where a single history allows: 1 MiB of float32."""


class NAISConfig(HistoryConfig):
    """Settings of NAIS."""

    variant: Literal["prod", "concat"] = setting(
        "prod", "what the attention sees: the product of both vectors, or both"
    )
    attention_size: int = setting(16, "hidden units of the attention (a)", ge=1, search=Choice((8, 16, 32)))
    activation: Literal["relu", "sigmoid", "tanh"] = setting("relu", "of the attention's hidden layer")
    beta: float = setting(0.5, "power of the softmax's denominator; 1 is the usual softmax", ge=0, le=1)
    penalty_attention: float = setting(1e-5, "weight of the squared attention weights W", ge=0)
    pretrain_epochs: int = setting(500, "most passes of FISM before; 0 starts from noise", ge=0)
    pretrained: str = setting("", "folder of a trained fism to start from instead")
    freeze: bool = setting(False, "learn the attention only")
    epochs: int = setting(100, "most passes over the training log", ge=1)


def smoothed(logits: Tensor, real: Tensor, beta: float) -> Tensor:
    """`exp(f) / (sum exp(f))^beta` over the last axis, 0 where not `real`; all 0 where nothing is.

    Not invariant to shifts unless `beta` is 1, hence the factor `exp(m (1 - beta))` of the greatest logit `m`.
    """
    logits = logits.float().masked_fill(~real, -torch.inf)
    m = logits.amax(-1, keepdim=True)
    m = torch.where(torch.isfinite(m), m, 0.0).detach()
    e = torch.exp(logits - m)
    total = e.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1.0)
    return e * torch.exp((m * (1 - beta)).clamp(max=overflow_limit())) / total**beta


class NAISNetwork(ItemTables):
    """Tables and attention, with the loss."""

    def __init__(self, n_items: int, config: NAISConfig) -> None:
        super().__init__(n_items, config.hidden_size)
        self.config = config
        fan_in = config.hidden_size * (2 if config.variant == "concat" else 1)
        self.W = nn.Parameter(torch.empty(config.attention_size, fan_in))
        std = (2 / (config.attention_size + fan_in)) ** 0.5
        nn.init.trunc_normal_(self.W, std=std, a=-2 * std, b=2 * std)
        self.b = nn.Parameter(torch.zeros(config.attention_size))
        self.h = nn.Parameter(torch.ones(config.attention_size))
        if config.freeze:
            for table in (self.history, self.target, self.bias):
                table.requires_grad_(False)

    def activate(self, x: Tensor) -> Tensor:
        """The hidden layer's function."""
        found: Tensor = getattr(torch, self.config.activation)(x)
        return found

    def of_history(self, q: Tensor) -> Tensor:
        """What the layer makes of history items alone: `W_q q (.., A)` for `concat`, `q` itself for `prod`."""
        return q @ self.W.chunk(2, 1)[0].T if self.config.variant == "concat" else q

    def of_target(self, p: Tensor) -> Tensor:
        """What the layer makes of targets alone: `W_p p (.., A)` for `concat`, `W diag(p) (.., A, D)` for `prod`."""
        return p @ self.W.chunk(2, 1)[1].T if self.config.variant == "concat" else p.unsqueeze(-2) * self.W

    def attention_logits(self, key_UL: Tensor, query_UC: Tensor) -> Tensor:
        """`f (U, C, L)` of what `of_history` and `of_target` gave; targets of one user (`U` = 1) serve all.

        Linear layers split: `W [q; p] = W_q q + W_p p`, and `W (q * p) = (W diag(p)) q`, so that no `(U, C, L, D)`
        tensor is built.
        """
        if self.config.variant == "concat":
            hidden = key_UL.unsqueeze(1) + query_UC.unsqueeze(2)
        else:
            hidden = torch.einsum("ucad,uld->ucla", query_UC, key_UL)
        return self.activate(hidden + self.b) @ self.h

    def attend(self, q_ULD: Tensor, p_UCD: Tensor, real_UCL: Tensor, f_UCL: Tensor) -> Tensor:
        """`n^-alpha sum_j a_j p . q_j`, without the bias, `(U, C)`."""
        weighted = (smoothed(f_UCL, real_UCL, self.config.beta) * (p_UCD @ q_ULD.transpose(1, 2))).sum(-1)
        return weighted * real_UCL.sum(-1).clamp(min=1).float() ** -self.config.alpha

    def logits(self, history_UL: Tensor, target_UC: Tensor) -> Tensor:
        """Scores `(U, C)`; an item is never part of its own history. Empty histories leave the bias.

        Where there are many targets, they are taken some at a time and attention is computed again going backward.
        """
        size = max(1, CELLS // history_UL.numel())
        if target_UC.shape[1] <= size:
            return self._logits(history_UL, target_UC)
        parts = [checkpoint(self._logits, history_UL, some, use_reentrant=False) for some in target_UC.split(size, 1)]
        return torch.cat(parts, 1)

    def _logits(self, history_UL: Tensor, target_UC: Tensor) -> Tensor:
        i = target_UC.clamp(min=0)
        q, p = F.embedding(history_UL.clamp(min=0), self.history), F.embedding(i, self.target)
        real = (history_UL >= 0).unsqueeze(1) & (history_UL.unsqueeze(1) != target_UC.unsqueeze(2))  # (U, C, L)
        return self.attend(q, p, real, self.attention_logits(self.of_history(q), self.of_target(p))) + self.bias[i]

    def loss(self, batch: HistoryBatch) -> dict[str, Tensor]:
        """Cross-entropy and penalty."""
        config = self.config
        penalty = config.penalty_target * self.target.square().sum()
        penalty = penalty + config.penalty_history * self.history.square().sum()
        penalty = penalty + config.penalty_attention * self.W.square().sum()
        return {"bce": pointwise(self.logits(batch.history, batch.target), batch), "penalty": penalty}


@register(
    Card(
        slug="nais",
        name="NAIS",
        area="recommenders/collaborative",
        summary="similarities to the items of the history, weighed anew for each target",
        paper="1809.07053",
        year=2018,
    )
)
class NAIS(HistoryRecommender):
    """Neural attentive item similarity."""

    Config = NAISConfig

    def fit(self, split: Split, run: Run | None = None, *, start: ItemTables | None = None) -> FitReport:
        """Train FISM, then the attention on its tables; or from `start` (which is not changed) if given.

        Raises:
            DataError: no user has two items, or the pre-trained tables are of another size.
            StorageError: there is no trained model at `pretrained`.
        """
        run, config = run or Run(), self.config
        self.prepare(split.train)
        seconds = 0.0
        if start is None and config.pretrained:
            start = self._saved(split)
        elif start is None and config.pretrain_epochs:
            shared = {name: getattr(config, name) for name in HistoryConfig.model_fields}
            first = FISM(**{**shared, "epochs": config.pretrain_epochs})
            path = None if run.path is None else Path(run.path) / "pretrain"
            # other negatives and another order than in what follows
            seconds = first.fit(split, replace(run, path=path, seed=run.seed + 1)).seconds
            start = first.network
        with seeded(run.seed):
            network = NAISNetwork(split.train.n_items, config)
            if start is not None:
                copy_tables(start, network)
            report = self.train(split, run, network)
        return replace(report, seconds=report.seconds + seconds)

    def _saved(self, split: Split) -> ItemTables:
        found = load(self.config.pretrained)
        if not isinstance(found, FISM):
            raise ConfigError(
                f"{self.config.pretrained!r} holds {found.card.slug!r}, not fism", hint="vouch train fism"
            )
        if found.n_items == split.train.n_items and found.items != split.train.items:  # other sizes: see copy_tables
            raise DataError(
                f"the pre-trained fism knows {found.n_items} items, but not the {split.train.n_items} of this log",
                where=self.config.pretrained,
                hint="pre-train it on the same data",
            )
        tables: ItemTables = found.network
        return tables

    @torch.no_grad()
    def score(self, queries: Queries) -> Tensor:
        """All items, in blocks of candidates and of queries with like histories; each item is projected once."""
        self.refuse_empty(queries)
        network, config = self.network, self.config
        rows = distinct(queries, self.n_items)
        n = np.diff(rows.indptr)
        order = np.argsort(-n, kind="stable")[: int((n > 0).sum())]  # the first of a block is its longest
        groups: list[list[Tensor]] = []
        while len(order):
            some = order[: max(1, SCORE_CELLS // (CANDIDATES * config.attention_size * int(n[order[0]])))]
            place = np.arange(n[some[0]])
            real = place < n[some][:, None]
            codes = np.zeros(real.shape, dtype=np.int64)
            codes[real] = rows.indices[(rows.indptr[some][:, None] + place)[real]]
            groups.append([torch.from_numpy(x).to(network.bias.device) for x in (some, codes, real)])
            order = order[len(some) :]
        keys = network.of_history(network.history)
        out: Tensor = network.bias.expand(len(queries), -1).clone()
        for first in range(0, self.n_items, CANDIDATES):
            p = network.target[first : first + CANDIDATES].unsqueeze(0)
            projected = network.of_target(p)
            for who, history, there in groups:
                f = network.attention_logits(keys[history], projected)
                shown = there.unsqueeze(1).expand_as(f)
                out[who, first : first + CANDIDATES] += network.attend(network.history[history], p, shown, f)
        return out

    @torch.no_grad()
    def attention(self, history: NDArray[np.int64], candidates: NDArray[np.int64]) -> Tensor:
        """How much each history item matters for each candidate `(C, L)`; they add up to 1 only where `beta` is 1.

        Args:
            history, candidates: item codes.

        Raises:
            DataError: a code is not that of an item; the message names it and the number of items.
        """
        network = self.network
        q = network.history[check_codes(history, self.n_items)].unsqueeze(0)
        p = network.target[check_codes(candidates, self.n_items)].unsqueeze(0)
        f = network.attention_logits(network.of_history(q), network.of_target(p))[0]
        return smoothed(f, torch.ones_like(f, dtype=torch.bool), self.config.beta)

    def similarities(self, items: NDArray[np.int64]) -> Tensor:
        """`q_j . p_i` of each given item with every item, without attention."""
        return (self.network.history[torch.as_tensor(items)] @ self.network.target.T).detach()

    def online(self, history: NDArray[np.int64]) -> OnlineScores:
        """Scores of all items that take new history items one at a time."""
        return OnlineScores(self, history)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the parameters back."""
        assert self.items is not None
        self.network = NAISNetwork(len(self.items), self.config)
        self.network.load_state_dict(state)


class OnlineScores:
    """A user's scores of all items, kept as sums: a new item costs one term a candidate, not the whole history.

    For each candidate: the greatest logit `m`, `S0 = sum exp(f - m)` and `S1 = sum exp(f - m) p . q`.
    """

    def __init__(self, model: NAIS, history: NDArray[np.int64]) -> None:
        self.model, bias = model, model.network.bias.detach()
        self.projected = model.network.of_target(model.network.target.detach()).detach().unsqueeze(0)
        self.m = torch.full_like(bias, -torch.inf)
        self.S0, self.S1, self.known = torch.zeros_like(bias), torch.zeros_like(bias), set[int]()
        for item in np.asarray(history).tolist():
            self.add(item)

    @torch.no_grad()
    def add(self, item: int) -> None:
        """Take an item into the history; one that is there already changes nothing.

        Raises:
            DataError: there is no such item.
        """
        check_codes(np.array([item]), self.model.n_items)
        if item in self.known:
            return
        self.known.add(item)
        network = self.model.network
        q, p = network.history[item].view(1, 1, -1), network.target.unsqueeze(0)
        f = network.attention_logits(network.of_history(q), self.projected)[0, :, 0].float()
        m = torch.maximum(self.m, f)
        old, new = torch.exp(self.m - m), torch.exp(f - m)
        self.S0, self.S1, self.m = self.S0 * old + new, self.S1 * old + new * (p @ q.transpose(1, 2))[0, :, 0], m

    @torch.no_grad()
    def scores(self) -> Tensor:
        """float32 `(N,)`, as `NAIS.score` gives for the whole history."""
        config, network = self.model.config, self.model.network
        if not self.known:
            return network.bias.detach().clone()
        raised = torch.exp((self.m * (1 - config.beta)).clamp(max=overflow_limit()))
        return self.S1 * raised / self.S0**config.beta * len(self.known) ** -config.alpha + network.bias
