"""ECL-SR: an encoder that does not mind dropout, and does mind replaced items.

Source: Equivariant Contrastive Learning for Sequential Recommendation, arXiv 2211.05290. Beside the next item there are
three losses: two encodings of a history under different dropout must agree (invariance); a small bidirectional
generator fills in hidden items; and a discriminator, conditioned on the encoder's output for the true history, must
tell which items the generator replaced (equivariance). Use it with any encoder: `objective+=eclsr`.

What differs from the released code: padding has no part in any loss, and averages of the last outputs run over real
positions; the second stage, which the released code never reaches, is `stages=2`; other histories of the same user are
no negatives; the first item of a history is never hidden. All prefixes of a history are trained in one pass; the three
losses take whole histories. As in the published settings the discriminator is the encoder itself; the paper draws it
apart (`share="own"`). The defaults are those of Toys, the only published weights that belong to losses without padding.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.config import Config, Span, setting
from vouch.data import Split
from vouch.nn import losses
from vouch.nn.transformer import Context, Transformer, init_weights
from vouch.recommenders.sequential.augment import portion
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.contrast import one_vector
from vouch.recommenders.sequential.parts import Histories, Setup, Term, part
from vouch.recommenders.sequential.sasrec import SASRec, SASRecConfig
from vouch.registry import Card, register
from vouch.training import FitReport, Run, seeded

ARGMAX_CELLS = 1 << 25
"""Scores held at once when the generator chooses items."""


class EquivarianceConfig(Config):
    """Settings of the three losses of ECL-SR."""

    contrast: float = setting(0.1, "weight a of the invariance to dropout", ge=0, search=Span(0.01, 1.0, log=True))
    discriminate: float = setting(0.01, "weight b of telling replaced items", ge=0, search=Span(0.003, 0.1, log=True))
    generate: float = setting(0.02, "weight c of filling in hidden items", ge=0)
    masking: Literal["prob", "sample"] = setting("prob", "hide each item by chance, or a fixed share of them")
    mask_share: float = setting(0.2, "share of items that are hidden (gamma)", gt=0, lt=1)
    last: int = setting(10, "outputs that are averaged for the invariance, the last ones", ge=1)
    temperature: float = setting(0.05, "of the invariance", gt=0)
    combine: Literal["addall", "add", "cat", "atten"] = setting(
        "addall", "how the discriminator sees the true history: its outputs added, its last one added, joined, or first"
    )
    share: Literal["all", "own"] = setting(
        "all", "the discriminator is the encoder itself, or a transformer of its own"
    )
    bidirectional: bool = setting(False, "the discriminator sees both sides; needs share=own")
    conditional: bool = setting(True, "the discriminator sees the true history at all; False is as ELECTRA does")
    replace_by: Literal["generator", "random"] = setting("generator", "what hidden items become")
    invariant_to: Literal["dropout", "replacement"] = setting("dropout", "the second view; replacement is a control")
    generator_layers: int = setting(2, "transformer blocks of the generator, and of a discriminator of its own", ge=1)
    num_heads: int = setting(2, "their attention heads; divides hidden_size", ge=1)
    stages: int = setting(1, "2 goes on without discriminator and generator after the first has stopped", ge=1, le=2)


def hide(histories: Histories, settings: EquivarianceConfig, longest: int, generator: np.random.Generator) -> Any:
    """True at the items to hide, bool `(n,)` end to end; never the first of a history, so none where it has one item.

    - `sample`: exactly `floor(share n + 1)`, at most `n - 1`.
    - `prob`: each by chance, the first `floor(share longest + 1)` of them; the last item if there is none.
    """
    lengths = histories.stop - histories.start
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chance = np.where(place > 0, generator.random(len(row)), np.inf)
    if settings.masking == "sample":
        count = np.minimum(portion(settings.mask_share, lengths) + 1, lengths - 1)
        order = np.lexsort((chance, row))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = place
        return rank < count[row]
    hidden = chance < settings.mask_share
    so_far = np.cumsum(hidden)
    before = np.concatenate([[0], so_far])[np.cumsum(lengths) - lengths]
    hidden &= so_far - before[row] <= int(settings.mask_share * longest + 1)
    none = np.bincount(row, hidden, len(lengths)) == 0
    return hidden | (none[row] & (place == lengths[row] - 1) & (place > 0))


def last_mean(hidden_BTD: Tensor, lengths: Tensor, last: int) -> Tensor:
    """Mean `(B, D)` of the last outputs of each history, as many as it has, at most `last`."""
    age = lengths.unsqueeze(1) - 1 - torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
    counts = ((age >= 0) & (age < last)).to(hidden_BTD.dtype)
    return (hidden_BTD * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True)


def invariance(one: Tensor, two: Tensor, temperature: float, user: Tensor) -> Tensor:
    """`CE(cos(z_i, z'_j) / temperature, j = i)` over the batch; other histories of the same user are no negatives."""
    logits = F.normalize(one.float(), dim=-1) @ F.normalize(two.float(), dim=-1).T / temperature
    own = torch.eye(len(one), dtype=torch.bool, device=one.device)
    logits = logits.masked_fill((user.unsqueeze(1) == user) & ~own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(one), device=one.device))


class Generator(nn.Module):
    """A bidirectional transformer over the shared item table, with a vector of its own for hidden items."""

    def __init__(self, hidden_size: int, max_length: int, dropout: float, settings: EquivarianceConfig) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(hidden_size).normal_(std=0.02))
        self.transformer = Transformer(
            hidden_size,
            num_layers=settings.generator_layers,
            num_heads=settings.num_heads,
            max_length=max_length,
            dropout=dropout,
            variant="post",
        )
        self.apply(init_weights)

    def forward(self, x_BTD: Tensor, hidden_BT: Tensor, lengths: Tensor) -> Tensor:
        """Outputs `(m, D)` at the hidden places, in order."""
        x_BTD = torch.where(hidden_BT.unsqueeze(-1), self.hidden, x_BTD)
        return self.transformer(x_BTD, lengths, causal=False)[hidden_BT]


@part("objective", "eclsr", "invariance to dropout, and a discriminator of replaced items")
class Equivariance(Term):
    """The losses `contrast`, `discriminate` and `generate`."""

    Config = EquivarianceConfig

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """One vector a position; and the encoder reads as it reads."""
        settings = recommender.config.part("eclsr")
        if settings.share == "all" and settings.combine == "atten":
            return "combine=atten reads one position more than the encoder can; set eclsr.share=own"
        if settings.share == "all" and settings.bidirectional:
            return "a discriminator that is the encoder sees what the encoder sees; set eclsr.share=own"
        return one_vector(recommender)

    def __init__(self, settings: EquivarianceConfig, setup: Setup) -> None:
        super().__init__(settings, setup)
        config = setup.recommender.config
        size, self.longest = config.hidden_size, int(config.max_length)
        self.n_items = setup.encoder.n_items
        self.told = torch.zeros(4, dtype=torch.float64)
        self.generator = Generator(size, self.longest, config.dropout, settings)
        self.verdict = nn.Linear(size, 1, bias=False)
        self.joint = nn.Linear(2 * size, size, bias=False) if settings.combine == "cat" else None
        self.own: Transformer | None = None
        if settings.share == "own":
            self.own = Transformer(
                size,
                num_layers=settings.generator_layers,
                num_heads=settings.num_heads,
                max_length=self.longest + 1,
                dropout=config.dropout,
                variant="post",
            )
        self.verdict.apply(init_weights)
        for module in (self.joint, self.own):
            if module is not None:
                module.apply(init_weights)
        self.discriminates = settings.discriminate > 0 or settings.generate > 0

    def active(self) -> bool:
        """With any of its weights."""
        settings = self.settings
        return bool(settings.contrast > 0 or settings.discriminate > 0 or settings.generate > 0)

    def edits(self) -> bool:
        """Whether edited histories are needed."""
        replaced = self.settings.invariant_to == "replacement" and self.settings.contrast > 0
        return self.discriminates or bool(replaced)

    def draw(self, histories: Histories, generator: np.random.Generator) -> Any:
        """What is hidden, bool `(B, T)`, and random items `(B, T)`."""
        lengths = histories.stop - histories.start
        real = np.arange(lengths.max(initial=1)) < lengths[:, None]
        hidden = np.zeros(real.shape, dtype=bool)
        hidden[real] = hide(histories, self.settings, self.longest, generator)
        other = generator.integers(0, self.n_items, real.shape)
        return torch.from_numpy(hidden), torch.from_numpy(other)

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """Those of the three losses that have a weight and something to learn from in this batch."""
        settings, found = self.settings, {}
        edited, generated = batch.items, None
        if self.edits():
            edited, generated = self.edit(encoder, batch)
        if settings.contrast > 0 and len(batch.items) < 2:
            warnings.warn(
                "a batch holds one history, which has no other to differ from: it takes no part in the invariance to "
                "dropout; raise batch_size if this is not the last batch",
                stacklevel=2,
            )
        elif settings.contrast > 0:
            other = encoder(edited if settings.invariant_to == "replacement" else batch.items, batch.lengths)
            one, two = (last_mean(h, batch.lengths, settings.last) for h in (hidden_BTD, other))
            found["contrast"] = settings.contrast * invariance(one, two, settings.temperature, batch.user)
        if generated is not None and self.discriminates:
            if settings.generate > 0 and settings.replace_by == "generator":
                found["generate"] = settings.generate * generated
            if settings.discriminate > 0:
                told = self.discriminate(encoder, edited, hidden_BTD, batch)
                found["discriminate"] = settings.discriminate * told
        return found

    def edit(self, encoder: SequenceEncoder, batch: SequenceBatch) -> tuple[Tensor, Tensor | None]:
        """The edited history `(B, T)`, and the generator's loss; None where nothing is hidden."""
        hidden_BT, other = batch.extra[self.slug]
        hidden_BT = hidden_BT & (batch.items >= 0)
        if not bool(hidden_BT.any()):
            return batch.items, None
        if self.settings.replace_by == "random":
            return torch.where(hidden_BT, other, batch.items), hidden_BT.new_zeros((), dtype=torch.float32)
        x_BTD, _ = encoder.embed(batch.items)
        out, table = self.generator(x_BTD, hidden_BT, batch.lengths), encoder.item_vectors()
        loss = losses.cross_entropy(out, table, batch.items[hidden_BT])
        with torch.no_grad():
            rows = max(1, ARGMAX_CELLS // len(table))
            best = torch.cat([(piece @ table.T).argmax(1) for piece in out.split(rows)])
        return batch.items.masked_scatter(hidden_BT, best), loss

    def discriminate(
        self, encoder: SequenceEncoder, edited: Tensor, hidden_BTD: Tensor, batch: SequenceBatch
    ) -> Tensor:
        """Mean binary cross-entropy over real positions of telling which items are not the true ones."""
        lengths, settings = batch.lengths, self.settings
        x_BTD, context = encoder.embed(edited)
        if settings.conditional:
            u = hidden_BTD[torch.arange(len(x_BTD), device=x_BTD.device), lengths - 1].unsqueeze(1)  # (B, 1, D)
            match settings.combine:
                case "addall":
                    x_BTD = x_BTD + hidden_BTD
                case "add":
                    x_BTD = x_BTD + u
                case "cat":
                    assert self.joint is not None
                    x_BTD = self.joint(torch.cat([u.expand_as(x_BTD), x_BTD], -1))
                case _:
                    x_BTD, lengths = torch.cat([u, x_BTD], 1), lengths + 1
        if self.own is None:
            D_BTD = encoder.read(x_BTD, lengths, context)
        else:
            D_BTD = self.own(x_BTD, lengths, causal=not settings.bidirectional)
        D_BTD = D_BTD[:, -batch.items.shape[1] :]  # without the extra first token
        real = batch.items >= 0
        logits = self.verdict(D_BTD).squeeze(-1)[real].float()
        replaced = (edited != batch.items)[real].float()
        self.told += judged(logits.detach(), replaced.bool()).cpu()
        return F.binary_cross_entropy_with_logits(logits, replaced)

    def begin_epoch(self, epoch: int) -> None:
        """Measure each epoch anew."""
        super().begin_epoch(epoch)
        self.told.zero_()

    def diagnose(self) -> dict[str, float]:
        """Over the last epoch: the share of replaced items, and the discriminator's area under the curve in a batch."""
        won, pairs, replaced, items = self.told.tolist()
        found = {"eclsr.replaced": replaced / items} if items else {}
        return {**found, "eclsr.auc": won / pairs} if pairs else found


def judged(logits: Tensor, replaced: Tensor) -> Tensor:
    """Pairs of a replaced and a true item that are told right (ties are half), all pairs, replaced items, items `(4,)`."""
    values, place = torch.unique(logits, return_inverse=True)
    counts = logits.new_zeros((2, len(values)), dtype=torch.float64)
    counts.index_put_((replaced.long(), place), logits.new_ones(len(place), dtype=torch.float64), accumulate=True)
    true, false = counts
    below = true.cumsum(0) - true
    won = (false * (below + true / 2)).sum()
    return torch.stack([won, true.sum() * false.sum(), false.sum(), counts.sum()])


class ECLSRConfig(SASRecConfig):
    """Settings of ECL-SR on SASRec."""

    objective: tuple[str, ...] = setting(("next", "eclsr"), "losses that are added up; += adds one")
    batch_size: int = setting(256, "histories of one batch", ge=1)
    epochs: int = setting(300, "most passes over the training log", ge=1)


@register(
    Card(
        slug="eclsr",
        name="ECL-SR",
        area="recommenders/sequential",
        summary="a transformer that does not mind dropout and does mind replaced items",
        paper="2211.05290",
        year=2023,
    )
)
class ECLSR(SASRec):
    """SASRec with equivariant contrastive learning."""

    Config = ECLSRConfig

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Train; in two stages if the settings say so.

        The second stage starts from the best of the first with its optimizer, without discriminator and generator, and
        with new patience. Its checkpoints lie in `stage-2`, so a stopped run goes on in the stage it was in.
        `run.max_seconds` is for both together.
        """
        run, settings = run or Run(), self.config.part("eclsr") if "eclsr" in self.config.terms() else None
        if settings is None or settings.stages == 1:
            return super().fit(split, run)
        with seeded(run.seed):
            objective = self.begin(split)
            optimizer = self.optimizer(objective)
            first = self.train(objective, split, run, optimizer)
            if first.stopped == "time":  # resuming finishes the first stage before it begins the second
                return first
            term = objective.terms["eclsr"]
            assert isinstance(term, Equivariance)
            measured = self.diagnostics
            term.settings, term.discriminates = settings.updated({"discriminate": 0.0, "generate": 0.0}), False
            path = None if run.path is None else Path(run.path) / "stage-2"
            left = None if run.max_seconds is None else max(run.max_seconds - first.seconds, 0.0)
            second = self.train(objective, split, replace(run, path=path, max_seconds=left), optimizer)
            self.diagnostics = measured
        return replace(
            second,
            seconds=first.seconds + second.seconds,
            epochs=first.epochs + second.epochs,
            best_epoch=first.epochs + second.best_epoch,
            history=[*first.history, *({**row, "epoch": first.epochs + row["epoch"]} for row in second.history)],
        )
