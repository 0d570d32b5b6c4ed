"""Ranking losses. Each takes scores or vectors and gives the mean over its targets, as a scalar.

Every loss takes `weight`: with it the result is `sum(weight * loss)` instead of the mean, so `weight` is a mask over
its sum, or one over the number of targets of a batch that several processes share. Scores of `-inf` mark negatives
that do not count. Sources: BPR arXiv 1205.2618; gBCE arXiv 2308.07192, eq. 9-11; the logQ correction of sampled
softmax, Bengio and Senecal 2008; in-batch softmax with it, Yi et al., RecSys 2019. Shapes: `T` targets, `N` items,
`D` hidden size, `n` negatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_CELLS = 1 << 25
"""Most scores held at once by a softmax: 128 MiB of float32."""
CACHE_CELLS = 1 << 18
"""Scores of one block on a CPU: what stays in a core's cache is two to three times faster than one large product."""
MIN_ROWS = 128
"""Fewer rows than this make the products of a block slow."""


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
        ValueError: `calibration` lies outside [0, 1], or `n_items` is below 2.
    """
    if not 0 <= calibration <= 1:
        raise ValueError(f"calibration is {calibration}; it must lie in [0, 1]")
    if n_items < 2:
        raise ValueError(f"n_items is {n_items}; there must be an item to be the negative")
    n = negative.shape[-1]
    alpha = n / (n_items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    return mean((beta * F.softplus(-positive) + F.softplus(negative).sum(-1)) / (n + 1), weight)


def top1(positive: Tensor, negative: Tensor, weight: Tensor | None = None) -> Tensor:
    """GRU4Rec's `mean_j sigmoid(s_j - s+) + sigmoid(s_j^2)` (arXiv 1511.06939) of `(T,)` and `(T, n)`."""
    negative, kept = _finite(negative)
    apart = torch.sigmoid(negative - positive.unsqueeze(-1)) + torch.sigmoid(negative.square())
    return mean((apart * kept).sum(-1) / kept.sum(-1).clamp(min=1), weight)


def bpr_max(positive: Tensor, negative: Tensor, *, penalty: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """GRU4Rec's BPR-max (arXiv 1706.03847, eq. 10) of `(T,)` and `(T, n)`: negatives weighted by their softmax.

    `-log sum_j p_j sigmoid(s+ - s_j) + penalty * sum_j p_j s_j^2`, in logarithms throughout; a target whose negatives
    are all marked has no loss.
    """
    negative, kept = _finite(negative)
    log_share = F.log_softmax(negative.masked_fill(~kept, torch.finfo(negative.dtype).min), dim=-1)
    below = torch.logsumexp(log_share + F.logsigmoid(positive.unsqueeze(-1) - negative), dim=-1)
    losses = -below + penalty * (log_share.exp() * negative.square()).sum(-1)
    return mean(losses.masked_fill(~kept.any(-1), 0.0), weight)


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

    At most `max_cells` of the `(T, N)` logits exist at a time, so memory does not grow with `T`. Products are made in
    the autocast type where autocast is on, sums always in float32. Gives first derivatives only.
    """
    rest = _SoftmaxRest.apply(hidden, item_vectors, bias, target, None, _rows(hidden, len(item_vectors), max_cells))
    return mean(F.softplus(rest - scores(hidden, item_vectors, target, bias)), weight)
