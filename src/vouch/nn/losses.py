"""Ranking losses. Each takes scores or vectors and gives the mean over its targets, as a scalar.

Sources: BPR arXiv 1205.2618; gBCE arXiv 2308.07192, eq. 9-11; the logQ correction of sampled softmax, Bengio and
Senecal 2008. Shapes: `T` targets, `N` items, `D` hidden size, `n` negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CELLS = 1 << 25
"""Logits held at once by `cross_entropy`: 128 MiB of float32."""


def mean(losses: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over all targets, or the sum weighted by `weight` (which then carries its own normalisation)."""
    return losses.mean() if weight is None else (losses * weight).sum()


def bpr(positive: Tensor, negative: Tensor, weight: Tensor | None = None) -> Tensor:
    """`-log sigmoid(s+ - s-)` of positives `(T,)` against negatives `(T,)` or `(T, n)`, averaged over the n."""
    if negative.dim() > positive.dim():
        return mean(F.softplus(negative - positive.unsqueeze(-1)).mean(-1), weight)
    return mean(F.softplus(negative - positive), weight)


def bce(positive: Tensor, negative: Tensor, weight: Tensor | None = None) -> Tensor:
    """`-log sigmoid(s+) - sum_j log sigmoid(-s_j)` of positives `(T,)` and negatives `(T,)` or `(T, n)`."""
    negatives = negative if negative.dim() > positive.dim() else negative.unsqueeze(-1)
    return mean(F.softplus(-positive) + F.softplus(negatives).sum(-1), weight)


def gbce(
    positive: Tensor, negative: Tensor, *, n_items: int, calibration: float, weight: Tensor | None = None
) -> Tensor:
    """gSASRec's generalised cross-entropy of positives `(T,)` and `n` negatives `(T, n)`.

    `-(beta log sigmoid(s+) + sum_j log(1 - sigmoid(s_j))) / (n + 1)` with `alpha = n / (n_items - 1)` and
    `beta = alpha (t (1 - 1/alpha) + 1/alpha)`; `calibration` is `t`: 0 is plain BCE, 1 makes probabilities calibrated.

    Raises:
        ValueError: `calibration` lies outside [0, 1].
    """
    if not 0 <= calibration <= 1:
        raise ValueError(f"calibration is {calibration}; it must lie in [0, 1]")
    n = negative.shape[-1]
    alpha = n / (n_items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    return mean((beta * F.softplus(-positive) + F.softplus(negative).sum(-1)) / (n + 1), weight)


def cross_entropy(
    hidden: Tensor,
    item_vectors: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    max_cells: int = MAX_CELLS,
) -> Tensor:
    """Softmax over the whole catalogue: hidden `(T, D)`, item_vectors `(N, D)`, target `(T,)`, bias `(N,)`.

    Where the `(T, N)` logits would exceed `max_cells` they are made in blocks of targets, and made again in the
    backward pass, so that memory does not grow with `T`.
    """

    def block(hidden: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(hidden, item_vectors, bias)
        return F.cross_entropy(logits.float(), target, reduction="none")

    rows = max(1, max_cells // len(item_vectors))
    if len(hidden) <= rows:
        return mean(block(hidden, target), weight)
    pieces = [
        torch.utils.checkpoint.checkpoint(block, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), target.split(rows), strict=True)
    ]
    return mean(torch.cat(pieces), weight)


def sampled_softmax(
    hidden: Tensor,
    item_vectors: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    log_q: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Softmax over the target and sampled negatives; negatives that hit the target are masked.

    Args:
        hidden: `(T, D)`. item_vectors: `(N, D)`. target: `(T,)`.
        negatives: `(n,)` shared by all targets, or `(T, n)` of their own.
        log_q: `(N,)` log of each item's probability to be drawn. When given, `log(n q)` is taken from the negatives'
            logits, which makes the loss a consistent estimate of the full softmax; None is right for uniform draws
            up to the constant `log(N / n)` between target and negatives.
        bias: `(N,)` added to the logits.
    """
    positive = (hidden * item_vectors[target]).sum(-1, keepdim=True)
    if negatives.dim() == 1:
        other = hidden @ item_vectors[negatives].T
    else:
        other = torch.einsum("td,tnd->tn", hidden, item_vectors[negatives])
    if bias is not None:
        positive, other = positive + bias[target].unsqueeze(-1), other + bias[negatives]
    other = other.float()
    if log_q is not None:
        n = negatives.shape[-1]
        other = other - (log_q[negatives] + torch.log(torch.tensor(float(n), device=other.device)))
    other = other.masked_fill(negatives == target.unsqueeze(-1), -torch.inf)
    logits = torch.cat([positive.float(), other], dim=-1)
    return mean(torch.logsumexp(logits, dim=-1) - logits[:, 0], weight)


def top1(positive: Tensor, negative: Tensor, weight: Tensor | None = None) -> Tensor:
    """GRU4Rec's `mean_j sigmoid(s_j - s+) + sigmoid(s_j^2)` (arXiv 1511.06939) of `(T,)` and `(T, n)`."""
    apart = torch.sigmoid(negative - positive.unsqueeze(-1)) + torch.sigmoid(negative.square())
    return mean(_over_finite(apart, negative), weight)


def bpr_max(positive: Tensor, negative: Tensor, *, penalty: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """GRU4Rec's BPR-max (arXiv 1706.03847, eq. 10) of `(T,)` and `(T, n)`: negatives weighted by their softmax."""
    share = torch.softmax(negative, dim=-1)
    finite = negative.masked_fill(torch.isneginf(negative), 0.0)
    above = torch.log((share * torch.sigmoid(positive.unsqueeze(-1) - finite)).sum(-1).clamp(min=1e-24))
    return mean(-above + penalty * (share * finite.square()).sum(-1), weight)


def _over_finite(values: Tensor, negative: Tensor) -> Tensor:
    """Mean over the negatives that are not masked with -inf."""
    kept = ~torch.isneginf(negative)
    return (values * kept).sum(-1) / kept.sum(-1).clamp(min=1)
