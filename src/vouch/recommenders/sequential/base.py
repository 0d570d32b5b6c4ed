"""What sequential recommenders share: an encoder of histories, named losses at its output, and how they rank.

A method is an encoder (`SequenceEncoder`) with an attention kind, an augmentation and an objective, a sum of named
losses; see `parts`. Shapes: `B` batch, `T` positions, `D` hidden size, `K` interests, `N` items, `n` targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vouch.data import Interactions, Queries, Split
from vouch.data.queries import flat_rows
from vouch.errors import ConfigError
from vouch.evaluation import evaluate
from vouch.nn import losses
from vouch.nn.transformer import Context
from vouch.recommenders.base import Recommender
from vouch.recommenders.sequential import parts
from vouch.recommenders.sequential.batches import MASK, Draw, SequenceBatch, SequenceBatches
from vouch.recommenders.sequential.parts import Attention, Setup, Term
from vouch.training import FitReport, NegativeSampler, Run, fit, seeded

ENCODE_TOKENS = 1 << 13
"""Positions encoded at once when scoring."""
FACTS = "facts."
"""Marks tensors of a saved model that were not learned."""
SHARED = ("sampled_softmax", "hard_softmax", "gbce", "top1", "bpr_max")
"""Losses whose negatives are drawn once a batch and shared by its targets."""

PAIRWISE: dict[str, Callable[..., Tensor]] = {
    "bce": losses.bce,
    "bpr": losses.bpr,
    "top1": losses.top1,
    "bpr_max": losses.bpr_max,
}


class SequenceEncoder(nn.Module, ABC):
    """Turns histories into vectors. A subclass sets `item`, an embedding with the rows `[padding, items..., extra...]`.

    Attributes:
        item: `(1 + N + extra, D)`; row `code + 1` is an item, row 0 padding, which stays zero.
        n_items: N.
        bias: `(N,)` added to the scores, or None.
        interests: K, vectors at each position; 1 gives `(B, T, D)`, more `(B, T, K, D)`.
        merge: how scores of several interests become one: `max` or `sum`.
    """

    item: nn.Embedding
    bias: nn.Parameter | None
    interests: int = 1
    merge: Literal["max", "sum"] = "max"

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.n_items = n_items
        self.register_parameter("bias", None)

    def forward(self, items_BT: Tensor, lengths: Tensor, context: Context | None = None) -> Tensor:
        """Vectors `(B, T, D)` or `(B, T, K, D)` of left-aligned codes `(B, T)`: -1 after the end, `MASK` where hidden."""
        x_BTD, context = self.embed(items_BT, context)
        return self.read(x_BTD, lengths, context)

    @abstractmethod
    def read(self, x_BTD: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """The output for embedded histories; `context.rows` holds their rows of the item table."""

    def rows(self, items_BT: Tensor) -> Tensor:
        """Rows of the item table: padding 0, items `code + 1`, hidden the row after the last item."""
        return torch.where(items_BT == MASK, self.n_items + 1, items_BT + 1)

    def embed(self, items_BT: Tensor, context: Context | None = None) -> tuple[Tensor, Context]:
        """`(B, T, D)` of the item table, and the context with the rows in it. Hidden items without a row are zero."""
        rows_BT = self.rows(items_BT)
        if self.item.num_embeddings == self.n_items + 1:
            rows_BT = rows_BT.masked_fill(items_BT == MASK, 0)
        context = context or Context()
        context.rows = rows_BT
        return self.item(rows_BT), context

    def item_vectors(self) -> Tensor:
        """`(N, D)` vectors that the output is compared with; the input table unless a subclass keeps another."""
        return self.item.weight[1 : self.n_items + 1]


class Objective(nn.Module):
    """An encoder with its named losses: what `fit` trains."""

    def __init__(self, encoder: SequenceEncoder, terms: dict[str, Term], augmentation: Any = None) -> None:
        super().__init__()
        self.encoder, self.augmentation = encoder, augmentation
        self.terms, self.networks = terms, nn.ModuleDict(terms)
        attacks = [attack for term in terms.values() if (attack := term.attacks()) is not None]
        self.attackers = {name: found for name, found in attacks if found}

    def begin_epoch(self, epoch: int) -> None:
        """Tell the parts."""
        if self.augmentation is not None:
            self.augmentation.begin_epoch(epoch)
        for term in self.terms.values():
            term.begin_epoch(epoch)

    def loss(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """The weighted losses by name."""
        context = Context(user=batch.user, attack=bool(self.attackers))
        hidden = self.encoder(batch.items, batch.lengths, context)
        found: dict[str, Tensor] = {}
        for term in self.terms.values():
            found.update(term(self.encoder, hidden, batch, context))
        return found

    def draws(self) -> dict[str, Draw]:
        """What each term draws for a batch."""
        return {slug: term.draw for slug, term in self.terms.items()}


def routed_step(model: Objective, batch: SequenceBatch, optimizer: Any, fabric: Any) -> dict[str, Tensor]:
    """One optimizer step in which each attack trains its own parameters only, and the other losses all the rest."""
    with fabric.autocast():
        found = model.loss(batch)
    theirs = {id(p) for group in model.attackers.values() for p in group}
    ours = [p for p in model.parameters() if p.requires_grad and id(p) not in theirs]
    total = torch.stack([value for name, value in found.items() if name not in model.attackers]).sum()
    optimizer.zero_grad()
    for loss, group in ((total, ours), *((found[name], group) for name, group in model.attackers.items())):
        gradients = torch.autograd.grad(loss, group, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(group, gradients, strict=True):
            parameter.grad = gradient
    optimizer.step()
    return {**found, "loss": total}


@parts.part("objective", "next", "the next item at every position, by the setting `loss`")
class NextItem(Term):
    """The loss of the next item. With several interests, the one nearest to the target is trained (hard read-out)."""

    def __init__(self, settings: Any, setup: Setup) -> None:
        super().__init__(settings, setup)
        config = setup.recommender.config
        self.loss, self.calibration, self.hardness = setup.recommender.loss_kind(), config.calibration, config.hardness
        self.log_q: Tensor | None
        self.register_buffer("log_q", setup.recommender.log_q(setup.split.train), persistent=False)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """`{"next": mean over all targets}`."""
        del context
        table, target = encoder.item_vectors(), batch.target
        hidden = hidden_BTD.flatten(0, 1).index_select(0, batch.at)  # (n, D) or (n, K, D)
        if hidden.dim() == 3:
            nearest = torch.einsum("nkd,nd->nk", hidden, table[target]).argmax(1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), nearest]
        return {"next": self.of(encoder, hidden, table, batch)}

    def of(self, encoder: SequenceEncoder, hidden: Tensor, table: Tensor, batch: SequenceBatch) -> Tensor:
        """The chosen loss of vectors `(n, D)` against the item vectors `(N, D)`."""
        target, negatives, weight, bias = batch.target, batch.negatives, batch.weight, encoder.bias
        if self.loss == "ce":
            return losses.cross_entropy(hidden, table, target, bias=bias, weight=weight)
        if self.loss == "sampled_softmax":
            return losses.sampled_softmax(hidden, table, target, negatives, log_q=self.log_q, bias=bias, weight=weight)
        if self.loss == "hard_softmax":
            self.seen = (hidden.detach(), table.detach()[negatives])
            return losses.hard_softmax(
                hidden, table, target, negatives, hardness=self.hardness, log_q=self.log_q, bias=bias, weight=weight
            )
        positive = (hidden * table[target]).sum(-1)
        shared = negatives.dim() == 1
        negative = hidden @ table[negatives].T if shared else torch.einsum("nd,nmd->nm", hidden, table[negatives])
        if bias is not None:
            positive, negative = positive + bias[target], negative + bias[negatives]
        positive, negative = positive.float(), negative.float()
        if shared:  # they may hit a target
            negative = negative.masked_fill(negatives == target.unsqueeze(1), -torch.inf)
        if self.loss == "gbce":
            n_items, t = encoder.n_items, self.calibration
            return losses.gbce(positive, negative, n_items=n_items, calibration=t, weight=weight)
        return PAIRWISE[self.loss](positive, negative, weight=weight)

    def diagnose(self) -> dict[str, float]:
        """With hard negatives, how many of them count: `(sum w)^2 / sum w^2` of their weights in the last batch."""
        if self.seen is None:
            return {}
        hidden, negatives = self.seen
        weights = torch.softmax(self.hardness * (hidden @ negatives.T).float(), -1)
        return {"effective_negatives": float((1 / weights.square().sum(-1)).mean())}


class SequentialRecommender(Recommender):
    """Ranks items by the product of the history's last vector with every item's."""

    network: SequenceEncoder
    known: dict[str, Tensor]
    diagnostics: dict[str, float]
    """After `fit`: what the losses measured of themselves at its end."""
    attends: ClassVar[bool] = False
    """Whether the encoder is a transformer, whose attention kind can be chosen."""

    def __init__(self, config: Any = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._check()

    def _check(self) -> None:
        """Refuse combinations that do not fit, with the reason."""
        config, name = self.config, type(self).card.slug
        chosen = [parts.find("objective", slug) for slug in config.terms() if slug != "next"]
        if config.attention != "plain":
            if not self.attends:
                raise ConfigError(
                    f"{name} cannot take attention={config.attention!r}: its encoder is no transformer",
                    hint="use it with sasrec or bert4rec",
                )
            chosen.append(parts.find("attention", config.attention))
        if config.augment != "none":
            chosen.append(parts.find("augment", config.augment))
        for part in chosen:
            reason = part.refuses(self)
            if reason is not None:
                raise ConfigError(f"{name} cannot take {part.kind} {part.slug!r}: {reason}")

    @abstractmethod
    def encoder(self, n_items: int, facts: dict[str, Tensor]) -> SequenceEncoder:
        """A new, untrained encoder; `facts` is what `facts` gave for the training data."""

    def facts(self, split: Split) -> dict[str, Tensor]:
        """Tensors that the encoder must know of the data beside the number of items; saved with the model."""
        if self.config.attention == "plain":
            return {}
        kind = parts.find("attention", self.config.attention)
        return dict(kind.facts(self.config.part(kind.slug), split))

    def attention(self, facts: dict[str, Tensor]) -> Attention | None:
        """The attention kind for the transformer; None is the plain one."""
        if self.config.attention == "plain":
            return None
        kind = parts.find("attention", self.config.attention)
        made: Attention = kind(self.config, self.config.part(kind.slug), facts)
        return made

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Train on all positions of all training histories.

        Raises:
            DataError: no history has two events, or the data lacks what a part needs.
        """
        run = run or Run()
        with seeded(run.seed):
            objective = self.begin(split)
            return self.train(objective, split, run, self.optimizer(objective))

    def train(self, objective: Objective, split: Split, run: Run, optimizer: torch.optim.Optimizer) -> FitReport:
        """Run the loop."""
        config, batches = self.config, self.batches(split.train, objective.draws())
        report = fit(
            objective,
            batches,
            config=config,
            run=run,
            optimizer=optimizer,
            schedule=self.schedule(config.epochs * len(batches), len(batches)),
            step=routed_step if objective.attackers else None,
            validate=lambda: evaluate(self, split.valid, metrics=[config.monitor], train=split.train).metrics,
        )
        self.network.eval()
        self.diagnostics = {name: value for term in objective.terms.values() for name, value in term.diagnose().items()}
        return report

    def begin(self, split: Split) -> Objective:
        """A new encoder with the losses that the settings name, as training starts with them."""
        config = self.config
        self.prepare(split.train)
        self.known = self.facts(split)
        self.network = self.encoder(split.train.n_items, self.known)
        setup = Setup(self, self.network, split)
        if config.augment != "none":
            kind = parts.find("augment", config.augment)
            setup = replace(setup, augmentation=kind(config.part(kind.slug), setup))
        made = {slug: parts.find("objective", slug)(config.part(slug), setup) for slug in config.terms()}
        return Objective(self.network, {slug: term for slug, term in made.items() if term.active()}, setup.augmentation)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with the betas that papers of this field use."""
        config = self.config
        return torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
        )

    def schedule(self, steps: int, per_epoch: int) -> Any:
        """Factor on the learning rate by step, or None; `steps` is how many there can be, `per_epoch` in an epoch."""
        del steps, per_epoch

    def loss_kind(self) -> str:
        """The loss, with `auto` decided by the size of the catalogue."""
        if self.config.loss != "auto":
            return str(self.config.loss)
        return "ce" if self.n_items <= 5_000 else "sampled_softmax"

    def batches(self, log: Interactions, draws: dict[str, Draw] | None = None) -> Any:
        """Next-item batches with the negatives that the loss needs, and with what the objective draws."""
        config, kind = self.config, self.loss_kind()
        sampler = None
        if kind != "ce":
            sampler = NegativeSampler(log, config.negatives_by, avoid_known=kind not in SHARED)
        return self.batch_type()(
            log,
            config.batch_size,
            config.max_length,
            every_window=config.every_window,
            sampler=sampler,
            negatives=self._negatives(log) if kind in SHARED else 1,
            shared=kind in SHARED,
            draws=draws,
            least=config.min_history,
        )

    def _negatives(self, log: Interactions) -> int:
        """How many items a batch draws. The default shrinks to a small catalogue; a number that was asked for does not.

        Raises:
            ConfigError: more are asked for than there are items.
        """
        config = self.config
        if config.negatives > log.n_items and "negatives" in config.model_fields_set:
            raise ConfigError(
                f"negatives is {config.negatives:,} and there are {log.n_items:,} items",
                hint="ask for fewer, or set loss=ce, which compares with all of them",
            )
        return int(min(config.negatives, log.n_items))

    def batch_type(self) -> type[SequenceBatches]:
        """The class of the batches."""
        return SequenceBatches

    def log_q(self, log: Interactions) -> Tensor | None:
        """Logarithm of each item's chance to be drawn `(N,)`, or None where all are alike."""
        if self.config.negatives_by == "uniform":
            return None
        if self.loss_kind() not in ("sampled_softmax", "hard_softmax"):
            raise ConfigError(
                "negatives_by='popularity' is corrected for in the sampled softmaxes only", hint="set such a loss"
            )
        return NegativeSampler(log, "popularity", avoid_known=False).log_q()

    def score(self, queries: Queries) -> Tensor:
        """Products of query and item vectors, merged over interests, plus the bias where there is one."""
        with torch.no_grad():
            scores = self.query_vectors(queries) @ self.item_vectors().T  # (B, N) or (B, K, N)
            if scores.dim() == 3:
                scores = scores.amax(1) if self.network.merge == "max" else scores.sum(1)
            return scores if self.network.bias is None else scores + self.network.bias

    @torch.no_grad()
    def query_vectors(self, queries: Queries) -> Tensor:
        """`(B, D)` or `(B, K, D)`: the output at the end of each history. Histories of like length go together."""
        was_training = self.network.training
        self.network.eval()
        lengths = np.minimum(queries.lengths, self.reads)
        order = np.argsort(lengths, kind="stable")
        device = self.network.item.weight.device
        out: Tensor | None = None  # made when its shape is known: item vectors may have to be computed
        first = 0
        while first < len(order):
            # The longest of a piece is its last, and the piece is padded to it: take as many as fit.
            longest = np.maximum(lengths[order[first : first + ENCODE_TOKENS]], 1)
            size = max(1, int(np.searchsorted(longest * np.arange(1, len(longest) + 1), ENCODE_TOKENS, side="right")))
            rows = order[first : first + size]
            items, length = self.inputs(queries, rows, lengths[rows])
            context = Context(user=torch.from_numpy(queries.user[rows].astype(np.int64)).to(device))
            hidden = self.network(torch.from_numpy(items).to(device), torch.from_numpy(length).to(device), context)
            last = torch.from_numpy(length - 1).to(device).clamp(min=0)
            if out is None:
                out = torch.zeros(len(queries), *hidden.shape[2:], device=device)
            out[torch.from_numpy(rows).to(device)] = hidden[torch.arange(len(rows), device=device), last].float()
            first += size
        self.network.train(was_training)
        if out is None:
            interests = () if self.network.interests == 1 else (self.network.interests,)
            return torch.zeros(0, *interests, self.item_vectors().shape[1], device=device)
        return out

    @property
    def reads(self) -> int:
        """How many of the most recent history items the encoder reads."""
        return int(self.config.max_length)

    def inputs(self, queries: Queries, rows: Any, lengths: Any) -> tuple[Any, Any]:
        """Left-aligned int64 codes `(B, T)` of the last `lengths` items of some queries, and those lengths."""
        place = np.arange(max(1, int(lengths.max(initial=1))))
        real = place < lengths[:, None]
        stop = queries.offsets[1:][rows]
        flat, _ = flat_rows(stop - lengths, stop)
        items = np.full(real.shape, -1, dtype=np.int64)
        items[real] = queries.item[flat]
        return items, lengths.astype(np.int64)

    def item_vectors(self) -> Tensor:
        """`(N, D)`."""
        was_training = self.network.training
        self.network.eval()
        vectors = self.network.item_vectors().detach()
        self.network.train(was_training)
        return vectors

    def state(self) -> dict[str, Tensor]:
        """The encoder's parameters, and what it must know of the data."""
        facts = {FACTS + name: tensor for name, tensor in self.known.items()}
        return {**dict(self.network.state_dict()), **facts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the parameters back."""
        assert self.items is not None
        self.known = {name.removeprefix(FACTS): tensor for name, tensor in state.items() if name.startswith(FACTS)}
        self.network = self.encoder(len(self.items), self.known)
        self.network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(FACTS)})
        self.network.eval()
