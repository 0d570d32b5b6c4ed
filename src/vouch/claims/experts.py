"""What the claims on merging share: a base network, one expert a task, and pictures to adapt to and to report on.

A small encoder is trained on all tasks together for a few steps, on the first fifth of every training part; that gives
the base and one head a task. From then on the heads are frozen. Each expert is the base's encoder, trained on its own
task alone. Test parts are cut in half: one half to adapt to, without labels, and the other to report on. A tenth of
each training part is kept out of all training, for choices that need labels.

Which pictures are in which part is drawn anew for each seed, within the training and the test part of each collection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.claims.claim import Scale
from vouch.data.images import Images, read_images
from vouch.errors import ConfigError
from vouch.merging.unlabelled import features
from vouch.training.devices import seeded

PICTURES: dict[str, str] = {
    "smoke": "drawn,drawn-1,drawn-2",
    "desk": "mnist_t10k,fashion_mnist_4443,usps,cifar10_10k",
    "full": "mnist_t10k,fashion_mnist_4443,usps,cifar10_10k",
}
"""The collections of each scale, one a task."""
AT_MOST = {"cifar10_10k": 4_000}
"""Training pictures of collections that are cut; the others are used whole."""

Pictures = tuple[Tensor, Tensor]
"""float32 `(n, 1, S, S)` in [-1, 1], and their labels `(n,)`."""


@dataclass(frozen=True)
class Budget:
    """Size and steps of base and experts at one scale."""

    size: int = 28
    width: int = 256
    features: int = 128
    base_steps: int = 250
    steps: int = 500
    batch: int = 128
    rate: float = 5e-4
    decay: float = 0.05


BUDGET = {
    "smoke": Budget(size=16, width=64, features=32, base_steps=6, steps=60, batch=64, rate=2e-3),
    "desk": Budget(),
    "full": Budget(width=1024, features=512, base_steps=1_000, steps=4_000),
}


@dataclass(frozen=True, eq=False)
class Collections:
    """The pictures of all tasks, as read: what a claim on merging runs on."""

    images: tuple[Images, ...]

    @property
    def name(self) -> str:
        """Of all of them."""
        return " + ".join(each.name for each in self.images)

    @property
    def fingerprint(self) -> str:
        """A hash of all pictures and labels."""
        joined = " ".join(each.fingerprint for each in self.images)
        return hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()


def read_collections(source: str) -> Collections:
    """Several collections of labelled pictures, by names or paths with commas between them; see `read_images`.

    Raises:
        ConfigError: fewer than two, or one twice. StorageError, DataError: one is not there, or cannot be read.
    """
    names = [name.strip() for name in source.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"{source!r} names {len(set(names))} different collections of pictures",
            hint="merging needs two tasks or more: give their names with commas between them",
        )
    found = [read_images(name) for name in names]
    return Collections(tuple(_cut(each) for each in found))


def _cut(images: Images) -> Images:
    """A collection with at most so many training pictures as it is cut to."""
    most = AT_MOST.get(images.name, images.n_train)
    if images.n_train <= most:
        return images
    rows = np.r_[:most, images.n_train : len(images)]
    return replace(images, pixels=images.pixels[rows], label=images.label[rows], n_train=most)


class Encoder(nn.Module):
    """Pictures `(B, 1, S, S)` to features `(B, D)`: an input layer, two residual ones, and an output layer."""

    def __init__(self, size: int, width: int, features: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Linear(size * size, width), nn.LayerNorm(width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.last = nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(B, D)`."""
        h = F.gelu(self.first_norm(self.first(x.flatten(1))))
        for linear, norm in zip(self.inner, self.norms, strict=True):
            h = h + F.gelu(norm(linear(h)))
        z: Tensor = self.last(h)
        return z


class Network(nn.Module):
    """One encoder, and a head for each task."""

    def __init__(self, encoder: Encoder, classes: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.last.out_features, c) for c in classes)

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Logits of one task `(B, C)`."""
        logits: Tensor = self.heads[task](self.encoder(x))
        return logits


@dataclass(frozen=True, eq=False)
class Experts:
    """A base, one expert a task, and the tasks' pictures. Lists are in the order of `tasks`.

    Attributes:
        tasks: their names. base: the encoder's state before, and states: after training on each task alone.
        heads: of each task, frozen; features `(B, D)` to logits `(B, C)`; the same for base, experts and merged ones.
        train: what the experts were trained on; base_train: the part of it that the base saw.
        valid: labelled and used by no training. adapt: half of the test part, to be used without its labels.
        test: the other half, to report on.
        budget: sizes and steps.
    """

    tasks: list[str]
    base: dict[str, Tensor]
    states: list[dict[str, Tensor]]
    heads: list[nn.Module]
    train: list[Pictures]
    base_train: list[Pictures]
    valid: list[Pictures]
    adapt: list[Pictures]
    test: list[Pictures]
    budget: Budget

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> Encoder:
        """A fresh encoder with a state; the base's unless one is given."""
        made = Encoder(self.budget.size, self.budget.width, self.budget.features)
        made.load_state_dict(dict(self.base if state is None else state))
        return made.eval()

    def model(self, state: Mapping[str, Tensor] | None = None) -> Network:
        """A fresh network with all heads, around an encoder's state; the base's unless one is given."""
        made = Network(self.encoder(state), [head.out_features for head in self.heads])  # type: ignore[misc]
        for mine, head in zip(made.heads, self.heads, strict=True):
            mine.load_state_dict(head.state_dict())
        return made.eval()

    def accuracy(self, encoder: Mapping[str, Tensor] | nn.Module, part: str = "test") -> list[float]:
        """Share of each task's pictures that an encoder, or a state of one, gets right under the task's head."""
        module = encoder if isinstance(encoder, nn.Module) else self.encoder(encoder)
        parts: list[Pictures] = getattr(self, part)
        return [
            accuracy(features(module, x, head=head, task=task), y)
            for task, head, (x, y) in zip(self.tasks, self.heads, parts, strict=True)
        ]

    def expert_accuracy(self, part: str = "test") -> list[float]:
        """That of each expert on its own task."""
        return [self.accuracy(state, part)[task] for task, state in enumerate(self.states)]


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of rows whose highest logit `(n, C)` is that of their label `(n,)`."""
    return float((logits.argmax(1) == y).double().mean())


def experts(source: str | Collections, seed: int, scale: Scale) -> Experts:
    """Train base, heads and experts for one seed; on one thread some 30 seconds at desk.

    Raises:
        ConfigError, StorageError, DataError: see `read_collections`.
    """
    collections = read_collections(source) if isinstance(source, str) else source
    budget = BUDGET[scale]
    with seeded(seed):
        generator = torch.Generator().manual_seed(seed)
        train: list[Pictures] = []
        valid: list[Pictures] = []
        adapt: list[Pictures] = []
        test: list[Pictures] = []
        for images in collections.images:
            x = images.tensor(budget.size, grey=True) * 2 - 1
            y, n = torch.from_numpy(images.label), images.n_train
            inside, outside = (
                torch.randperm(n, generator=generator),
                n + torch.randperm(len(y) - n, generator=generator),
            )
            kept, half = n - n // 10, len(outside) // 2
            for part, rows in (
                (train, inside[:kept]), (valid, inside[kept:]), (adapt, outside[:half]), (test, outside[half:]),
            ):  # fmt: skip
                part.append((x[rows], y[rows]))
        few = [(x[: len(x) // 5], y[: len(y) // 5]) for x, y in train]
        classes = [len(images.classes) for images in collections.images]
        network = Network(Encoder(budget.size, budget.width, budget.features), classes)
        _train(network, network.parameters(), dict(enumerate(few)), budget.base_steps, budget, generator)
        base = _copied(network.encoder)
        states = []
        for task, pictures in enumerate(train):
            network.encoder.load_state_dict(base)
            _train(network, network.encoder.parameters(), {task: pictures}, budget.steps, budget, generator)
            states.append(_copied(network.encoder))
    heads: list[nn.Module] = [head.requires_grad_(False).eval() for head in network.heads]
    names = [images.name for images in collections.images]
    return Experts(names, base, states, heads, train, few, valid, adapt, test, budget)


def _train(
    network: Network,
    parameters: Iterable[nn.Parameter],
    pictures: Mapping[int, Pictures],
    steps: int,
    budget: Budget,
    generator: torch.Generator,
) -> None:
    """Steps on the sum of the tasks' cross-entropies, one batch of each in every step; each picture once a round."""
    optimizer = torch.optim.AdamW(list(parameters), lr=budget.rate, weight_decay=budget.decay, fused=True)
    rows = {task: _rows(len(y), steps, budget.batch, generator) for task, (_, y) in pictures.items()}
    network.train()
    for step in range(steps):
        optimizer.zero_grad()
        for task, (x, y) in pictures.items():
            chosen = rows[task][step]
            F.cross_entropy(network(x[chosen], task), y[chosen]).backward()
        optimizer.step()


def _rows(n: int, steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """Rows of every batch `(steps, batch)`, shuffled anew each round."""
    rounds = -(-steps * batch // n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])[: steps * batch].view(
        steps, batch
    )


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
