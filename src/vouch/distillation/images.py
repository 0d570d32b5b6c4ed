"""Small picture classifiers, and batches of shifted and mirrored pictures to train them with.

Shapes: `B` batch, `C` channels, `H`, `W` height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.data.images import Images
from vouch.distillation.sgd import Validate
from vouch.distillation.taps import outputs

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
"""The modules of a `SmallNet` whose outputs are compared: the ends of its blocks."""


class _Plain(nn.Sequential):
    """Convolution, batch norm, ReLU; halves the picture."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)
        )


class _Residual(nn.Module):
    """Two convolutions beside a linear way past them; halves the picture."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.one_norm = nn.BatchNorm2d(after)
        self.two = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.two_norm = nn.BatchNorm2d(after)
        self.past = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, after, H // 2, W // 2)`."""
        inner = F.relu(self.one_norm(self.one(x)))
        return F.max_pool2d(F.relu(self.two_norm(self.two(inner)) + self.past(x)), 2)


class SmallNet(nn.Module):
    """Blocks of convolutions, the mean over what is left of the picture, and a linear layer.

    Args:
        widths: channels of the blocks. residual: the kind of blocks. channels: of the pictures.
    """

    def __init__(
        self, classes: int, widths: Sequence[int] = (12, 24, 32), *, residual: bool = False, channels: int = 1
    ) -> None:
        super().__init__()
        block = _Residual if residual else _Plain
        ways = zip((channels, *widths[:-1]), widths, strict=True)
        self.blocks = nn.Sequential(*(block(before, after) for before, after in ways))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, classes)` of pictures `(B, C, H, W)`."""
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


class Pictures(NamedTuple):
    """Pictures as a network reads them: `x` float32 `(n, C, H, W)`, normalised; `y` int64 `(n,)`."""

    x: Tensor
    y: Tensor


def parts(images: Images, n_valid: int = 300, seed: int = 0) -> tuple[Pictures, Pictures, Pictures]:
    """Pictures for training, for choosing and for testing, normalised by those for training.

    Those for choosing are drawn from the training part.
    """
    x, y = images.tensor(), torch.from_numpy(images.label)
    order = torch.from_numpy(np.random.default_rng([seed, 5]).permutation(images.n_train))
    fit, valid = order[n_valid:], order[:n_valid]
    mean, std = x[fit].mean((0, 2, 3), keepdim=True), x[fit].std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    x = (x - mean) / std
    return Pictures(x[fit], y[fit]), Pictures(x[valid], y[valid]), Pictures(x[images.n_train :], y[images.n_train :])


def with_noise(y: Tensor, share: float, classes: int, seed: int = 0) -> Tensor:
    """Labels of which a share is drawn anew, uniformly over all classes, the true one among them."""
    random = np.random.default_rng([seed, 6])
    noisy = y.clone()
    chosen = torch.from_numpy(random.permutation(len(y))[: round(share * len(y))])
    noisy[chosen] = torch.from_numpy(random.integers(0, classes, len(chosen)))
    return noisy


class PictureBatches:
    """Batches `(x, y)` in random order, each picture shifted and, by chance, mirrored.

    Args:
        shift: most pixels of a shift, by rows and by columns; what comes in is the darkest value.
        flip: mirror half of them left to right. A last batch of one picture is left out.
    """

    def __init__(self, pictures: Pictures, batch_size: int = 64, *, shift: int = 2, flip: bool = True) -> None:
        self.x, self.y, self.batch_size, self.shift, self.flip = pictures.x, pictures.y, batch_size, shift, flip
        self.padded = F.pad(pictures.x, (shift,) * 4, value=float(pictures.x.min()))

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.batch_size) - (len(self.y) % self.batch_size == 1)

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches; this rank takes every `world`-th picture of each."""
        order = generator.permutation(len(self.y))
        n, (height, width) = len(order), self.x.shape[2:]
        down, right = (torch.from_numpy(generator.integers(0, 2 * self.shift + 1, n)) for _ in range(2))
        mirrored = torch.from_numpy(generator.random(n) < (0.5 if self.flip else 0.0))
        columns = torch.where(mirrored[:, None], torch.arange(width).flip(0), torch.arange(width)) + right[:, None]
        rows = torch.arange(height) + down[:, None]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            at = slice(start + rank, start + self.batch_size, world)
            chosen = torch.from_numpy(order[at])
            # advanced indices on both sides of the channels put these last: (b, H, W, C)
            x = self.padded[chosen[:, None, None], :, rows[at][:, :, None], columns[at][:, None, :]]
            yield x.permute(0, 3, 1, 2).contiguous(), self.y[chosen]


@torch.no_grad()
def answers(network: nn.Module, x: Tensor, block: int = 1_024) -> Tensor:
    """The network's logits `(n, classes)` in evaluation mode, on the CPU."""
    was_training = network.training
    device = next((p.device for p in network.parameters()), x.device)
    network.eval()
    found = []
    for piece in x.split(block):
        found.append(outputs(network(piece.to(device)))[-1].float().cpu())
    network.train(was_training)
    return torch.cat(found)


def right(network: nn.Module, pictures: Pictures) -> Tensor:
    """Which pictures the network names rightly, bool `(n,)`."""
    return answers(network, pictures.x).argmax(1) == pictures.y


def watching(pictures: Pictures) -> Validate:
    """A `validate` that gives the accuracy on pictures."""
    return lambda network: {"accuracy": float(right(network, pictures).float().mean())}
