"""A small model to train in tests; run as a script, it trains and reports, alone or under torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vouch.nn import losses
from vouch.training import FitReport, Run, TrainConfig, fit

ITEMS, ROWS, LONGEST = 20, 90, 7


class Bag(NamedTuple):
    """`R` rows of items `(R, LONGEST)`, -1 after their end; each row's targets are its items shifted by three."""

    items: Tensor
    weight: Tensor


class Bags:
    """Batches with varying numbers of targets: the length of row `r` is `1 + r % LONGEST`."""

    def __init__(self, size: int = 16, interrupt: tuple[int, int, int] | None = None) -> None:
        """`interrupt`: the signal to raise in this process, and in which epoch before which batch."""
        items = np.random.default_rng(0).integers(0, ITEMS, (ROWS, LONGEST))
        self.lengths = 1 + np.arange(ROWS) % LONGEST
        self.items = np.where(np.arange(LONGEST) < self.lengths[:, None], items, -1)
        self.size, self.interrupt, self.epochs_begun = size, interrupt, 0

    def __len__(self) -> int:
        return (ROWS + self.size - 1) // self.size

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[Bag]:
        order = generator.permutation(ROWS)
        self.epochs_begun += 1
        for number, start in enumerate(range(0, ROWS, self.size)):
            if self.interrupt is not None and self.interrupt[1:] == (self.epochs_begun, number):
                os.kill(os.getpid(), self.interrupt[0])
            rows = order[start : start + self.size]
            items = torch.from_numpy(self.items[rows[rank::world]])
            yield Bag(items, torch.tensor(world / float(self.lengths[rows].sum())))


class Toy(nn.Module):
    """Guesses `item + 3` from `item`; the output table is tied to the input's; and it has what checkpoints find hard."""

    def __init__(self, seed: int = 0, dropout: float = 0.5) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.item = nn.Embedding(ITEMS, 8)
            self.mix = nn.Linear(8, 8)
        self.tied = self.item  # the same parameter under two names
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("rough", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)  # not contiguous
        self.register_buffer("ballast", torch.zeros(20_000))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, items: Tensor) -> Tensor:
        return self.mix(self.dropout(self.item(items)))

    def loss(self, batch: Bag) -> dict[str, Tensor]:
        """Two terms, to be summed."""
        self.steps += 1
        items = batch.items[batch.items >= 0]
        target = (items + 3) % ITEMS
        entropy = losses.cross_entropy(self.forward(items), self.tied.weight, target, weight=batch.weight)
        return {"entropy": entropy, "penalty": 1e-3 * self.mix.weight.square().sum()}

    def hits(self) -> dict[str, float]:
        """The share of right guesses, and a metric that never is a number."""
        items = torch.arange(ITEMS)
        guess = (self(items) @ self.tied.weight.T).argmax(1)
        return {"hit": float((guess == (items + 3) % ITEMS).double().mean()), "empty": float("nan")}


def train(
    path: Path | None = None,
    *,
    resume: bool = False,
    interrupt: tuple[int, int, int] | None = None,
    dropout: float = 0.5,
    **settings: Any,
) -> tuple[Toy, FitReport]:
    """Train a toy for eight epochs, by default."""
    model = Toy(dropout=dropout)
    config = TrainConfig(**{"epochs": 8, "learning_rate": 0.03, "monitor": "hit", "patience": 100, **settings})
    run = Run(path=path, device="cpu", precision="32", resume=resume, seed=3)
    report = fit(model, Bags(interrupt=interrupt), config=config, run=run, validate=model.hits)
    return model, report


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all tensors of two models agree bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def learned(report: FitReport) -> list[dict[str, Any]]:
    """What a report says of the training, without the time it took."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in report.history]


def _alternate(model: Any, batch: Bag, optimizer: Any, fabric: Any) -> dict[str, Tensor]:
    """A step of its own in two parts, the second of which uses a part of the parameters."""
    optimizer.zero_grad()
    first = model.loss(batch)
    fabric.backward(first["entropy"])
    optimizer.step()
    optimizer.zero_grad()
    second = model.loss(batch)["penalty"]
    fabric.backward(second)
    optimizer.step()
    return {"entropy": first["entropy"], "penalty": second}


def _several_processes(out: Path) -> None:
    """Three fits in a row; the first process writes what they logged."""
    from vouch.data import Dataset, Interactions, split
    from vouch.recommenders.collaborative.bpr import BPR
    from vouch.recommenders.sequential.sasrec import SASRec

    made: dict[str, Any] = {}
    model, report = train(out / "toy", dropout=0.0, epochs=5, max_grad_norm=1.0)
    made["toy"] = [row["entropy"] for row in report.history]
    made["weights"] = model.mix.weight.flatten().tolist()
    made["stopped"] = fit(
        Toy(dropout=0.0), Bags(), config=TrainConfig(epochs=3), run=Run(device="cpu", max_seconds=0.0)
    ).stopped
    config = TrainConfig(epochs=3, learning_rate=0.03)
    report = fit(Toy(dropout=0.0), Bags(), config=config, run=Run(device="cpu", precision="32"), step=_alternate)
    made["alternating"] = [row["entropy"] for row in report.history]

    random = np.random.default_rng(1)
    user = random.integers(0, 33, 400)
    parts = split(Dataset.of(Interactions.from_arrays(user, random.integers(0, 25, 400), time=np.arange(400))))
    run = Run(device="cpu", precision="32")
    sasrec = SASRec(epochs=2, hidden_size=8, num_layers=1, num_heads=1, dropout=0.0, batch_size=11, max_length=6)
    made["sasrec"] = [row["loss"] for row in sasrec.fit(parts, run).history]
    bpr = BPR(epochs=2, hidden_size=8, batch_size=64, evaluate_every=1)
    made["bpr"] = [bool(np.isfinite(row["loss"])) for row in bpr.fit(parts, run).history]
    if os.environ.get("RANK", "0") == "0":
        (out / "report.json").write_text(json.dumps(made))


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "processes":
        _several_processes(folder)
    else:  # killed in the middle of an epoch
        train(folder, interrupt=(signal.SIGKILL, 6, 3))
