"""APR (AMF): BPR matrix factorisation trained against the worst small change of its own vectors.

Source: Adversarial Personalized Ranking for Recommendation, arXiv 1808.03908. Phase one is plain BPR; phase two starts
from its vectors with a fresh optimizer and minimises, on every batch,

    L(Theta) + adversarial_weight * L(Theta + Delta),   Delta = eps * Gamma / |Gamma|,   Gamma = dL / dTheta,

with Delta held fixed. What differs from the paper, and why:
- `norm="row"` (default) normalises each vector's gradient on its own, as the authors' code does; the paper's text
  writes one norm for all, which is `norm="global"`.
- Epochs are chosen on validation, not on test; incomplete last batches are kept; the regulariser counts once.
- With `dns > 1` the hardest of several negatives is taken under the current vectors in both phases, and Delta is made
  for that choice (the authors' code leaves Delta stale there).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vouch.config import Choice, Span, setting
from vouch.data import Split
from vouch.errors import ConfigError, TrainingError
from vouch.evaluation import evaluate
from vouch.recommenders.collaborative.bpr import apply_gradient
from vouch.recommenders.collaborative.factors import (
    FactorConfig,
    FactorRecommender,
    Factors,
    Touched,
    Triples,
    adagrad,
    bpr_gradient,
    penalty_gradient,
)
from vouch.registry import Card, register
from vouch.training import FitReport, Run, fit, seeded
from vouch.training.devices import parse_device

TINY = 1e-12


class APRConfig(FactorConfig):
    """Settings of APR; the defaults are the paper's."""

    epochs: int = setting(1000, "most epochs of phase one, plain BPR", ge=1)
    adversarial_epochs: int = setting(1000, "most epochs of phase two", ge=0)
    batch_size: int = setting(512, "pairs of one batch; the loss is their sum", ge=1)
    patience: int = setting(20, "evaluations without a better value before a phase stops", ge=1)
    monitor: str = setting("NDCG@100", "validation metric that picks the best epoch and stops training")
    regularization: float = setting(0.0, "weight of the squared norms of the vectors in a triple", ge=0)
    eps: float = setting(
        0.5, "length of the change of each vector, in the units of the vectors", ge=0, search=Span(0.1, 1.0, log=True)
    )
    adversarial_weight: float = setting(
        1.0, "lambda, the weight of the changed loss", ge=0, search=Choice((0.3, 1.0, 3.0))
    )
    norm: Literal["row", "global"] = setting("row", "normalise each vector's gradient, or the whole gradient")
    adversary: Literal["gradient", "random", "none"] = setting(
        "gradient", "the worst change, a random one of equal length (a control), or none (plain BPR goes on)"
    )
    dns: int = setting(1, "negatives drawn per pair; the highest-scored is used", ge=1)


@register(
    Card(
        slug="apr",
        name="APR",
        area="recommenders/collaborative",
        summary="adversarial perturbation of embeddings while training pairwise ranking",
        paper="1808.03908",
        year=2018,
    )
)
class APR(FactorRecommender):
    """Adversarial matrix factorisation. Perturbations are never used when recommending."""

    Config = APRConfig

    def fit(self, split: Split, run: Run | None = None, *, start: Factors | None = None) -> FitReport:
        """Train both phases, or phase two alone from `start` (which is not changed).

        The report is phase two's, its seconds and epochs are those of both; its history holds `norm_user` and
        `norm_item`, the mean lengths of the vectors, because `eps` is in their units.

        Raises:
            TrainingError: a vector is not a number, or a user has every item.
        """
        run, config = run or Run(), self.config
        self.prepare(split.train)
        batches = Triples(split.train, config.batch_size, negatives=config.dns)
        first: FitReport | None = None
        with seeded(run.seed):
            self.begin(split.train, start)
            if start is None:
                aside = replace(run, path=None if run.path is None else run.path / "pretrain")
                first = self._phase(split, batches, aside, "none", config.epochs)
        self._gram = None
        if config.adversarial_epochs == 0 and first is not None:
            return first
        # Other negatives and another order than in phase one.
        second = self._phase(
            split, batches, replace(run, seed=run.seed + 1), config.adversary, config.adversarial_epochs
        )
        self._gram = None
        if first is None:
            return second
        return replace(second, seconds=first.seconds + second.seconds, epochs=first.epochs + second.epochs)

    def _phase(self, split: Split, batches: Triples, run: Run, adversary: str, epochs: int) -> FitReport:
        """One phase with a fresh optimizer."""
        kind, index = parse_device(run.device)
        generator = torch.Generator(kind if index is None else f"{kind}:{index}").manual_seed(run.seed)

        def step(model: Any, batch: Any, optimizer: torch.optim.Optimizer, fabric: Any) -> dict[str, Tensor]:
            return self._step(batch, optimizer, fabric, adversary, generator)

        def validate() -> dict[str, float]:
            norms = {f"norm_{name}": float(table.detach().norm(dim=1).mean()) for name, table in self._tables()}
            if not all(np.isfinite(value) for value in norms.values()):
                raise TrainingError("a vector is not a number", hint="lower learning_rate or eps")
            return {**self.validation(split, self.config.monitor), **norms}

        return fit(
            self.factors,
            batches,
            config=self.config.updated({"epochs": epochs}),
            run=run,
            optimizer=adagrad(self.factors, self.config, run),
            step=step,
            validate=validate,
        )

    @torch.no_grad()
    def _step(
        self, batch: Any, optimizer: torch.optim.Optimizer, fabric: Any, adversary: str, generator: torch.Generator
    ) -> dict[str, Tensor]:
        user, positive, negatives, size = batch
        config = self.config
        shared, share = fabric.world_size > 1, fabric.world_size / size
        touched = Touched.by(self.factors, user, positive, hardest(self.factors, user, negatives), whole=shared)
        p, q = touched.rows(self.factors)
        loss, grad_p, grad_q = bpr_gradient(p, q, touched)
        logged = {"loss": loss * share}  # its mean over processes is that over triples
        if adversary != "none" and config.adversarial_weight:
            if adversary == "gradient":
                # The change is that of the global batch, whichever process holds the triples.
                all_p, all_q = grad_p, grad_q
                if shared:
                    all_p, all_q = (fabric.all_reduce(grad.clone(), reduce_op="sum") for grad in (grad_p, grad_q))
                delta_p, delta_q = worst_change(all_p, all_q, config.eps, config.norm)
            else:
                # Rows outside the batch are in no loss of it, so only the touched ones need to be drawn.
                delta_p, delta_q = (random_change(table, config.eps, generator) for table in (p, q))
            changed, changed_p, changed_q = bpr_gradient(p + delta_p, q + delta_q, touched)
            grad_p = grad_p + config.adversarial_weight * changed_p
            grad_q = grad_q + config.adversarial_weight * changed_q
            logged["adversarial_loss"] = changed * share
        if config.regularization:
            more_p, more_q = penalty_gradient(p, q, touched, config.regularization)
            grad_p, grad_q = grad_p + more_p, grad_q + more_q
        apply_gradient(self.factors, touched, grad_p, grad_q, optimizer, fabric)
        return logged

    def _tables(self) -> list[tuple[str, Tensor]]:
        return [("user", self.factors.user), ("item", self.factors.item)]


def hardest(factors: Factors, user: Tensor, negatives: Tensor) -> Tensor:
    """Of each triple's negatives `(B, n)` the one with the highest score now `(B,)`."""
    if negatives.shape[1] == 1:
        return negatives[:, 0]
    scores = torch.einsum("bd,bnd->bn", factors.user[user], factors.item[negatives])
    return negatives.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)


def worst_change(grad_p: Tensor, grad_q: Tensor, eps: float, norm: str = "row") -> tuple[Tensor, Tensor]:
    """The change of touched users `(Ru, D)` and items `(Ri, D)` that raises the loss most, to first order.

    With `row` each row has length `eps`, or 0 where its gradient is 0; with `global` all rows together have.

    Raises:
        ConfigError: `norm` is neither, or `eps` is negative.
    """
    if eps < 0:
        raise ConfigError(f"eps is {eps}; it must not be negative")
    if norm == "row":
        p, q = (eps * grad / grad.norm(dim=1, keepdim=True).clamp(min=TINY) for grad in (grad_p, grad_q))
        return p, q
    if norm == "global":
        length = torch.sqrt(grad_p.square().sum() + grad_q.square().sum()).clamp(min=TINY)
        return eps * grad_p / length, eps * grad_q / length
    raise ConfigError(f"norm is {norm!r}; it must be 'row' or 'global'")


def random_change(table: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Rows like `table`'s from a normal cut at two standard deviations, each scaled to length `eps`."""
    drawn = torch.nn.init.trunc_normal_(torch.empty_like(table), a=-2, b=2, generator=generator)
    return eps * drawn / drawn.norm(dim=1, keepdim=True).clamp(min=TINY)


def robustness(
    model: FactorRecommender,
    split: Split,
    *,
    eps: Sequence[float] = (0.5, 1.0, 2.0),
    metric: str = "NDCG@100",
    seed: int = 0,
) -> list[dict[str, float]]:
    """How much a factor model's test ranking suffers when its vectors are nudged.

    Every vector is moved by `eps`: along the gradient of the BPR loss over all training pairs (one drawn negative
    each), and in a random direction. Works for any factor model (`bpr`, `apr`).

    Returns:
        One row an eps: `{"eps", "clean", "gradient", "random", "gradient_drop", "random_drop"}`; drops are shares of
        the clean value.
    """
    triples = Triples(split.train, max(1, len(split.train)))
    ((user, positive, negative, _),) = triples.epoch(np.random.default_rng(seed), 0, 1)
    factors = model.factors
    everything = Touched(
        torch.arange(len(factors.user)), torch.arange(len(factors.item)), user, positive, negative[:, 0]
    )
    p, q = factors.user.detach().cpu(), factors.item.detach().cpu()
    _, grad_p, grad_q = bpr_gradient(p, q, everything)
    generator = torch.Generator().manual_seed(seed)
    noise_p, noise_q = random_change(p, 1.0, generator), random_change(q, 1.0, generator)

    def ranked(delta_p: Tensor, delta_q: Tensor) -> float:
        nudged = copy.copy(model)
        nudged.load_state({"user": p + delta_p, "item": q + delta_q})
        return evaluate(nudged, split.test, metrics=[metric]).metrics[metric]

    clean = ranked(torch.zeros_like(p), torch.zeros_like(q))
    rows = []
    for length in eps:
        gradient = ranked(*worst_change(grad_p, grad_q, length))
        random = ranked(length * noise_p, length * noise_q)
        drops = {"gradient_drop": 1 - gradient / clean, "random_drop": 1 - random / clean} if clean else {}
        rows.append({"eps": length, "clean": clean, "gradient": gradient, "random": random, **drops})
    return rows
