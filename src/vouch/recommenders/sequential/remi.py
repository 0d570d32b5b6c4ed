"""REMI: several interests, trained with hard negatives and against routing that collapses to one item.

Source: Rethinking Multi-Interest Learning for Candidate Matching, arXiv 2302.14532. Uniform negatives count the more the
nearer they are to the active interest (`loss=hard_softmax`, `hardness` is the paper's beta), and the variance of each
interest's routing weights is penalised (`objective+=remi`). Both change training only, and fit every encoder with
routing: `vouch train comirec-dr --set loss=hard_softmax --set objective+=remi`.

What differs: every position is learned from, so the penalty, which the paper sums over a batch of 128 examples, is 128
times its mean over all examples of the batch, whatever its size. A target among its own negatives is masked. The
paper's 4 events before the first target are `min_history=4`; the default asks for one. A long history is cut into windows,
each read from its own start, where the paper gives every target the items right before it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vouch.config import Choice, Config, setting
from vouch.data import Queries
from vouch.errors import DataError
from vouch.nn.transformer import Context
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.comirec import ComiRecSA
from vouch.recommenders.sequential.config import Loss
from vouch.recommenders.sequential.interests import InterestRecommender, InterestsConfig
from vouch.recommenders.sequential.parts import Setup, Term, part
from vouch.registry import Card, register

EXAMPLES = 128
"""Examples of a batch in the paper, over which it sums."""


class RoutingConfig(Config):
    """Settings of the routing regularisation."""

    weight: float = setting(100.0, "weight of the penalty (lambda)", ge=0, search=Choice((0.0, 10.0, 100.0)))
    over: Literal["slots", "items"] = setting(
        "slots", "variance over all slots of the window, as published, divided by the hidden size; or over real items"
    )


def routing_variance(routing_nKL: Tensor, slots: int, hidden_size: int) -> Tensor:
    """`c_k = 1/d sum over slots (A_kl - mean A_k)^2` for each example and interest `(n, K)`; unused slots are 0."""
    total = routing_nKL.sum(-1)
    return (routing_nKL.square().sum(-1) - total.square() / slots) / hidden_size


def item_variance(routing_nKL: Tensor, count_n: Tensor) -> Tensor:
    """The variance over the real items of each example `(n, K)`."""
    count = count_n.unsqueeze(1)
    return routing_nKL.square().sum(-1) / count - (routing_nKL.sum(-1) / count).square()


@part("objective", "remi", "against routing that collapses to single items")
class RoutingRegularisation(Term):
    """The sum over interests of squared routing variances."""

    Config = RoutingConfig

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """Without routing there is nothing to penalise."""
        routes = isinstance(recommender, InterestRecommender)
        return None if routes else "its encoder has no routing; use comirec-sa, comirec-dr, mind or remi"

    def __init__(self, settings: RoutingConfig, setup: Setup) -> None:
        super().__init__(settings, setup)
        config = setup.recommender.config
        self.slots, self.size = int(config.max_length), int(config.hidden_size)

    def active(self) -> bool:
        """Only with a weight."""
        return bool(self.settings.weight > 0)

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """`{"routing": ...}`."""
        del encoder, hidden_BTD
        routing = context.notes["routing"][0].flatten(0, 1).index_select(0, batch.at).float()  # (n, K, L)
        if self.settings.over == "slots":
            variance = routing_variance(routing, self.slots, self.size)
        else:
            variance = item_variance(routing, batch.at % batch.items.shape[1] + 1)
        penalty = variance.square().sum() * batch.weight
        return {"routing": self.settings.weight * EXAMPLES * penalty}


class REMIConfig(InterestsConfig):
    """Settings of REMI on ComiRec-SA."""

    objective: tuple[str, ...] = setting(("next", "remi"), "losses that are added up; += adds one")
    loss: Loss = setting("hard_softmax", "next-item loss of the interest that is nearest to the target")
    hardness: float = setting(
        1.0, "how much near negatives count (beta); 0 is the plain softmax", ge=0, search=Choice((0.0, 0.1, 1.0, 10.0))
    )


@register(
    Card(
        slug="remi",
        name="REMI",
        area="recommenders/sequential",
        summary="several interests, trained with hard negatives and against routing collapse",
        paper="2302.14532",
        year=2023,
    )
)
class REMI(ComiRecSA):
    """ComiRec-SA with interest-aware hard negatives and routing regularisation."""

    Config = REMIConfig


@torch.no_grad()
def routing(model: InterestRecommender, queries: Queries) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """The routing weights `(B, K, L)` of given histories, their item codes `(B, L)` and their lengths `(B,)`.

    Raises:
        DataError: there is no history, or an empty one, which is routed nowhere.
    """
    if not (len(queries) and queries.lengths.all()):
        empty = np.flatnonzero(queries.lengths == 0)
        what = f"the history of query {empty[0]} is empty" if len(empty) else "there are no histories"
        raise DataError(f"{what}, so there is no routing to look at", hint="give histories of one item or more")
    lengths = np.minimum(queries.lengths, model.reads)
    items, lengths = model.inputs(queries, np.arange(len(queries)), lengths)
    context, device = Context(), model.network.item.weight.device
    was_training = model.network.training
    model.network.eval()
    model.network(torch.from_numpy(items).to(device), torch.from_numpy(lengths).to(device), context)
    model.network.train(was_training)
    A = context.notes["routing"][0].cpu()[torch.arange(len(items)), torch.from_numpy(lengths - 1)]
    return A, items, lengths


def routing_report(model: InterestRecommender, queries: Queries) -> dict[str, float]:
    """How the routing of given histories looks: means over histories and interests.

    `largest_weight` is the greatest weight of one item, 1 where an interest has collapsed; `effective_items` is
    `exp(entropy)`, the number of items that it amounts to; `fixed_place` is how often an interest rests on the place
    of the history that it rests on most, 1 where it looks at a place and not at what is there.
    """
    A, _, lengths = routing(model, queries)
    entropy = -(A * torch.log(A.clamp(min=1e-30))).sum(-1)
    places = F.one_hot(A.argmax(-1), A.shape[-1]).float().mean(0)  # (K, L)
    return {
        "largest_weight": float(A.amax(-1).mean()),
        "effective_items": float(torch.exp(entropy).mean()),
        "fixed_place": float(places.amax(-1).mean()),
        "length": float(np.mean(lengths)),
    }
