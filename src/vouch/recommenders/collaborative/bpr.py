"""BPR-MF: matrix factorisation trained so that what a user took scores above what the user did not.

Source: Bayesian Personalized Ranking, arXiv 1205.2618, with Adagrad in place of plain gradient descent. The gradient
is written out, not recorded: a step is four gathers and three scattered sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vouch.data import Split
from vouch.recommenders.collaborative.factors import (
    FactorConfig,
    FactorRecommender,
    Factors,
    Rows,
    Touched,
    Triples,
    adagrad,
    bpr_gradient,
    penalty_gradient,
)
from vouch.registry import Card, register
from vouch.training import FitReport, Run, fit, seeded


class BPRConfig(FactorConfig):
    """Settings of BPR-MF."""


@register(
    Card(
        slug="bpr",
        name="BPR-MF",
        area="recommenders/collaborative",
        summary="user and item vectors trained by comparing pairs",
        paper="1205.2618",
        year=2009,
        baseline=True,
    )
)
class BPR(FactorRecommender):
    """Matrix factorisation by pairwise ranking."""

    Config = BPRConfig

    def fit(self, split: Split, run: Run | None = None, *, start: Factors | None = None) -> FitReport:
        """Train, from `start` (which is not changed) if given.

        Raises:
            TrainingError: a user has every item, so that no negative can be drawn.
        """
        run, config = run or Run(), self.config
        self.prepare(split.train)
        with seeded(run.seed):
            self.begin(split.train, start)
            report = fit(
                self.factors,
                Triples(split.train, config.batch_size),
                config=config,
                run=run,
                optimizer=adagrad(self.factors, config, run),
                step=self._step,
                validate=lambda: self.validation(split, config.monitor),
            )
        self._gram = None
        return report

    @torch.no_grad()
    def _step(self, model: Any, batch: Any, optimizer: torch.optim.Optimizer, fabric: Any) -> dict[str, Tensor]:
        user, positive, negative, size = batch
        touched = Touched.by(self.factors, user, positive, negative[:, 0])
        p, q = touched.rows(self.factors)
        loss, grad_p, grad_q = bpr_gradient(p, q, touched)
        if self.config.regularization:
            more_p, more_q = penalty_gradient(p, q, touched, self.config.regularization)
            grad_p, grad_q = grad_p + more_p, grad_q + more_q
        apply_gradient(self.factors, touched, grad_p, grad_q, optimizer, fabric)
        return {"loss": loss * fabric.world_size / size}  # its mean over processes is that over triples


def apply_gradient(
    factors: Factors, touched: Touched, grad_p: Tensor, grad_q: Tensor, optimizer: torch.optim.Optimizer, fabric: Any
) -> None:
    """Hang the rows' gradients on the tables and make one step.

    The step averages gradients over processes; the loss is a sum over the global batch, hence the factor.
    """
    if fabric.world_size > 1:
        grad_p, grad_q = grad_p * fabric.world_size, grad_q * fabric.world_size
    dense = any(group.get("fused") for group in optimizer.param_groups)  # a last batch may be short
    factors.user.grad = Rows(touched.users, grad_p).onto(factors.user, dense=dense)
    factors.item.grad = Rows(touched.items, grad_q).onto(factors.item, dense=dense)
    with torch.sparse.check_sparse_tensor_invariants(False):  # said aloud, or PyTorch warns
        optimizer.step()
