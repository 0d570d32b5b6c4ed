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
    the autocast type where autocast is on; everything else in float32. Gives first derivatives only.
    """
    return _softmax(hidden, item_vectors, bias, scores(hidden, item_vectors, target, bias), target, weight, max_cells)


def sampled_softmax(
    hidden: Tensor,
    item_vectors: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    log_q: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    draws: int | None = None,
    max_cells: int = MAX_CELLS,
) -> Tensor:
    """Softmax over the target and sampled negatives; negatives that hit the target are masked.

    Args:
        hidden: `(T, D)`. item_vectors: `(N, D)`. target: `(T,)`.
        negatives: `(n,)` shared by all targets, or `(T, n)` of their own.
        log_q: `(N,)` log of each item's probability to be drawn. When given, `log(n q)` is taken from the negatives'
            logits, which makes the loss a consistent estimate of the full softmax; None is right for uniform draws
            up to the constant `log(N / n)` between target and negatives.
        bias: `(N,)` added to the logits.
        draws: the `n` of the correction, where it is not the number of negatives given.
        max_cells: as in `cross_entropy`, for shared negatives.
    """
    positive = scores(hidden, item_vectors, target, bias)
    offset = None if bias is None else F.embedding(negatives, bias.unsqueeze(-1)).squeeze(-1)
    if log_q is not None:
        correction = log_q[negatives] + math.log(draws or negatives.shape[-1])
        offset = -correction if offset is None else offset - correction
    if negatives.dim() == 1:
        vectors = item_vectors.index_select(0, negatives)
        return _softmax(hidden, vectors, offset, positive, target, weight, max_cells, negatives)
    other = scores(hidden, item_vectors, negatives)
    other = other if offset is None else other + offset
    other = other.masked_fill(negatives == target.unsqueeze(-1), -torch.inf)
    return mean(F.softplus(torch.logsumexp(other, dim=-1) - positive), weight)


def hard_softmax(
    hidden: Tensor,
    item_vectors: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    hardness: float,
    log_q: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sampled softmax whose negatives count the more the nearer they are: `w_j = exp(hardness x_j)` (arXiv 2302.14532).

    With scores `x`, the negatives' mass is `sum_j w_j exp(x_j) / mean_j w_j`: the estimate that draws proportional to
    `exp(hardness x)` would give, from uniform ones. Computed as `logsumexp((1 + hardness) x) - logsumexp(hardness x)
    + log n`. Hits on the target are left out. `hardness` 0 is `sampled_softmax`; other arguments as there.
    """
    positive = scores(hidden, item_vectors, target, bias).float()
    if negatives.dim() == 1:
        other = hidden @ item_vectors.index_select(0, negatives).T
    else:
        other = scores(hidden, item_vectors, negatives)
    other = other.float()
    if bias is not None:
        other = other + bias[negatives]
    if log_q is not None:
        other = other - log_q[negatives] - math.log(negatives.shape[-1])
    hit = negatives == target.unsqueeze(-1)
    none = hit.all(-1)  # no negative is left
    hit = hit & ~none.unsqueeze(-1)
    other = other.masked_fill(hit, -torch.inf)
    count = torch.log((~hit).sum(-1).float())
    # masked anew, as 0 * -inf would not be a number
    importance = torch.logsumexp((hardness * other).masked_fill(hit, -torch.inf), dim=-1)
    mass = torch.logsumexp((1 + hardness) * other, dim=-1) - importance + count
    return mean(F.softplus(mass.masked_fill(none, -torch.inf) - positive), weight)


def in_batch_softmax(
    hidden: Tensor,
    item_vectors: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Softmax of each target against the other targets of the batch, which cost no drawing.

    They come by popularity: without the correction popular items are pushed down. Pass the `log_q` of
    `NegativeSampler(log, "popularity", alpha=1)` to correct it. Arguments as in `sampled_softmax`.
    """
    others = max(1, len(target) - 1)  # a target is no draw for itself
    return sampled_softmax(hidden, item_vectors, target, target, log_q=log_q, bias=bias, weight=weight, draws=others)


def scores(hidden: Tensor, item_vectors: Tensor, items: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 products of hidden `(T, D)` with chosen items: `(T,)` with their own each, or `(T, n)`.

    Rows are taken by `index_select`, whose gradient is the same at any number of CPU threads; that of
    `item_vectors[items]` is not, and is slower.
    """
    chosen = item_vectors.index_select(0, items.reshape(-1)).view(*items.shape, item_vectors.shape[1])
    products = (hidden * chosen).sum(-1) if items.dim() == 1 else torch.einsum("td,tnd->tn", hidden, chosen)
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    return products if bias is None else products + bias.index_select(0, items.reshape(-1)).view(items.shape)


def _softmax(
    hidden: Tensor,
    vectors: Tensor,
    offset: Tensor | None,
    positive: Tensor,
    target: Tensor,
    weight: Tensor | None,
    max_cells: int,
    negatives: Tensor | None = None,
) -> Tensor:
    cells = min(max_cells, max(CACHE_CELLS, MIN_ROWS * len(vectors))) if hidden.device.type == "cpu" else max_cells
    each = torch.full_like(positive, 1 / max(1, len(positive))) if weight is None else weight.expand_as(positive)
    rows = max(1, cells // max(1, len(vectors)))
    return _SoftmaxLoss.apply(hidden, vectors, offset, positive, target, negatives, each, rows)


class _SoftmaxLoss(torch.autograd.Function):
    """`sum_t weight_t (log(exp(s+_t) + sum_j exp(h_t . v_j + offset_j)) - s+_t)`, the target left out of the sum over j.

    The gradient of a block of logits is made while they are still in the cache, then they are forgotten: nothing of
    size `(T, n)` is kept for the backward pass, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D)
        vectors: Tensor,  # (n, D)
        offset: Tensor | None,  # (n,)
        positive: Tensor,  # (T,)
        target: Tensor,  # (T,)
        negatives: Tensor | None,  # (n,) item of each vector; None where vector j is item j
        weight: Tensor,  # (T,)
        rows: int,
    ) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else vectors.dtype
        wanted = any(ctx.needs_input_grad)
        grad_hidden, grad_vectors = torch.empty_like(hidden), torch.zeros_like(vectors)
        grad_offset = torch.zeros_like(offset) if offset is not None else None
        grad_positive, losses = torch.empty_like(positive), torch.empty_like(positive)
        with torch.autocast(kind, enabled=False):
            v = vectors.to(dtype)
            for first in range(0, len(hidden), rows):
                block = slice(first, first + rows)
                h, s = hidden[block].to(dtype), positive[block].unsqueeze(1)
                p = (h @ v.T).to(positive.dtype)  # logits now, probabilities below
                if offset is not None:
                    p += offset
                if negatives is None:
                    p.scatter_(1, target[block].unsqueeze(1), -torch.inf)
                else:
                    p.masked_fill_(negatives == target[block].unsqueeze(1), -torch.inf)
                top = torch.maximum(p.amax(1, keepdim=True), s)
                p.sub_(top).exp_()
                s = s - top
                rest = p.sum(1, keepdim=True)
                total = rest + s.exp()
                losses[block] = (total.log() - s).squeeze(1)
                if not wanted:
                    continue
                share = weight[block].unsqueeze(1) / total
                p *= share
                grad_positive[block] = -(rest * share).squeeze(1)  # what the positive gains, the others lose
                if grad_offset is not None:
                    grad_offset += p.sum(0)
                p = p.to(dtype)
                grad_hidden[block] = p @ v
                grad_vectors += p.T @ h
        ctx.save_for_backward(grad_hidden, grad_vectors, grad_offset, grad_positive)
        return torch.dot(losses, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        found = (None if saved is None else saved * grads[0] for saved in ctx.saved_tensors)
        return *found, None, None, None, None


def _finite(negative: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with 0 in place of `-inf`, and where they were finite: infinities would turn gradients into NaN."""
    kept = ~torch.isneginf(negative)
    return negative.masked_fill(~kept, 0.0), kept
