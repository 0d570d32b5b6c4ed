"""Inputs made up to learn from a black box, and gradients through it without its derivatives.

Sources: the cooperative generators of Continual Learning From a Stream of APIs, arXiv 2309.00023; the zeroth-order
estimate and the convolutional generator as in data-free model extraction, arXiv 2011.14779. Shape letters: `B` batch,
`C` classes, `D` features, `m` directions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.errors import ConfigError

Gap = Literal["l1", "kl"]
SLOPE = 0.2


def mlp_generator(latent: int, shape: tuple[int, int, int], width: int = 128) -> nn.Module:
    """`(B, latent)` to pictures `(B, *shape)` before the tanh, with one hidden layer."""
    size = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Linear(latent, width), nn.LeakyReLU(SLOPE), nn.Linear(width, size), nn.Unflatten(1, shape))


def conv_generator(latent: int, shape: tuple[int, int, int], width: int = 64) -> nn.Module:
    """`(B, latent)` to pictures `(B, *shape)` before the tanh, by two upsamplings with convolutions between.

    Raises:
        ConfigError: height or width is no multiple of 4.
    """
    channels, high, wide = shape
    if high % 4 or wide % 4:
        raise ConfigError(
            f"the convolutional generator makes no pictures of {high} x {wide}", hint="multiples of 4, or generator=mlp"
        )
    return nn.Sequential(
        nn.Linear(latent, 2 * width * (high // 4) * (wide // 4)),
        nn.Unflatten(1, (2 * width, high // 4, wide // 4)),
        nn.BatchNorm2d(2 * width),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(SLOPE),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(width, channels, 3, padding=1),
        nn.BatchNorm2d(channels, affine=False),
    )


GENERATORS = {"mlp": mlp_generator, "conv": conv_generator}


def centred(scores: Tensor) -> Tensor:
    """Scores `(..., C)` less their mean over classes: log-probabilities and logits become the same numbers."""
    return scores - scores.mean(-1, keepdim=True)


def gap(logits: Tensor, answers: Tensor, kind: Gap = "l1") -> Tensor:
    """How far own logits `(..., C)` are from answered probabilities `(..., C)`: `(...)`, never negative.

    `l1` is the mean absolute difference of centred log-probabilities, `kl` the divergence of own probabilities from
    the answers.
    """
    if kind == "l1":
        return (centred(logits) - centred(answers.log())).abs().mean(-1)
    return (answers * (answers.log() - logits.log_softmax(-1))).sum(-1)


def unit_directions(m: int, like: Tensor) -> Tensor:
    """`m` random directions of length 1 for each row of `like (B, ...)`: `(m, B, ...)`."""
    drawn = torch.randn(m, *like.shape, device=like.device, dtype=like.dtype).flatten(2)
    return F.normalize(drawn, dim=2).view(m, *like.shape)


def around(u: Tensor, directions: Tensor, eps: float) -> Tensor:
    """`u (B, ...)` and its moves by `eps` along `directions (m, B, ...)`: `(m + 1, B, ...)`, `u` first."""
    return torch.cat([u[None], u + eps * directions])


def zeroth_order(values: Tensor, directions: Tensor, eps: float) -> Tensor:
    """The gradient `(B, ...)` of a function of each row from its `values (m + 1, B)` at the points of `around`.

    `(d / m) sum_i (value(u + eps v_i) - value(u)) / eps * v_i` with `d` numbers in a row: unbiased, up to `eps`, for
    directions drawn evenly from the sphere; exact for `d` orthonormal ones.
    """
    m, d = len(directions), directions[0, 0].numel()
    slopes = (values[1:] - values[0]) / eps
    return (d / m) * torch.einsum("mb,mb...->b...", slopes, directions)


def imbalance(logits: Tensor) -> Tensor:
    """`sum_c p_c log p_c` of the mean probabilities over a batch of logits `(B, C)`: least where classes are even."""
    mean = logits.softmax(-1).mean(0)
    return torch.xlogy(mean, mean).sum()


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """The mean cosine similarity between the rows of `a (B, D)` and those of `b (B', D)`."""
    return F.normalize(a, dim=1).mean(0) @ F.normalize(b, dim=1).mean(0)
