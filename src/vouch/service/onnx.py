"""The part of a model that turns a question into a query vector, as ONNX: with the item vectors, a model without its code.

What goes in depends on the method, and is written beside the file:

- sequential methods: `history` int64 `(B, T)`, item codes, oldest first, left-aligned, -1 after the end; `length` int64
  `(B,)`. At most the last `max_length` items; at least one. The user is not asked for.
- FISM: `history`, as above, of any length.
- factor models: `user` int64 `(B,)`, a user's code. Strangers need the library: their vectors are solved for.

Out comes `query` float32 `(B, D)`, or `(B, K, D)` for several interests. Shapes: `T` items, `D` size, `K` interests.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vouch.errors import ConfigError
from vouch.nn.transformer import Context
from vouch.recommenders.collaborative.factors import FactorRecommender
from vouch.recommenders.collaborative.fism import FISM
from vouch.recommenders.sequential.base import SequentialRecommender
from vouch.recommenders.sequential.batches import MASK
from vouch.service.scoring import Scoring

OPSET = 20
TOLERANCE = 1e-4


class SequenceQuery(nn.Module):
    """A sequential method: the output at the end of each history."""

    names = ("history", "length")

    def __init__(self, model: SequentialRecommender, bias: float | None) -> None:
        super().__init__()
        self.network, self.bias = model.network, bias
        self.asks = model.reads < int(model.config.max_length)  # a hidden item after the end is the question
        self.most = model.reads

    def forward(self, history: Tensor, length: Tensor) -> Tensor:
        """`(B, D)` or `(B, K, D)`."""
        items, last = history, length - 1
        if self.asks:
            items = torch.cat([history, torch.full_like(history[:, :1], -1)], 1)
            place = torch.arange(items.shape[1], device=items.device)
            items = torch.where(place == length.unsqueeze(1), MASK, items)
            length, last = length + 1, length
        hidden = self.network(items, length, Context(user=torch.full_like(length, -1)))
        index = last.view(-1, *[1] * (hidden.dim() - 1)).expand(-1, 1, *hidden.shape[2:])
        query = hidden.gather(1, index).squeeze(1)
        if self.bias is None:
            return query
        return torch.cat([query, torch.full_like(query[..., :1], self.bias)], -1)

    def example(self, length: int) -> tuple[Tensor, ...]:
        """Three histories, the first of full length."""
        lengths = torch.tensor([length, max(1, length // 2), 1])
        history = (torch.arange(3 * length).view(3, length) * 7) % self.network.n_items
        return history.masked_fill(torch.arange(length) >= lengths.unsqueeze(1), -1), lengths


class FISMQuery(nn.Module):
    """FISM: the mean of the distinct items, to a power, and 1 for the bias."""

    names = ("history",)
    most = 1 << 30

    def __init__(self, model: FISM) -> None:
        super().__init__()
        self.history = nn.Parameter(model.network.history.detach(), requires_grad=False)
        self.alpha = float(model.config.alpha)

    def forward(self, history: Tensor) -> Tensor:
        """`(B, D + 1)`."""
        place = torch.arange(history.shape[1], device=history.device)
        again = ((history.unsqueeze(2) == history.unsqueeze(1)) & (place < place.unsqueeze(1))).any(2)
        once = ((history >= 0) & ~again).float().unsqueeze(2)
        total = (self.history[history.clamp(min=0)] * once).sum(1)
        total = total * once.sum(1).clamp(min=1) ** -self.alpha
        return torch.cat([total, torch.ones_like(total[:, :1])], 1)

    def example(self, length: int) -> tuple[Tensor, ...]:
        """Three histories, with a repeated item."""
        history = (torch.arange(3 * length).view(3, length) * 7) % len(self.history)
        history[0, -1] = history[0, 0]
        return (history.masked_fill(torch.arange(length) >= torch.tensor([[length], [2], [1]]), -1),)


class UserQuery(nn.Module):
    """A factor model: the learned vector of a user."""

    names = ("user",)
    most = 1

    def __init__(self, model: FactorRecommender) -> None:
        super().__init__()
        self.user = nn.Parameter(model.factors.user.detach(), requires_grad=False)

    def forward(self, user: Tensor) -> Tensor:
        """`(B, D)`."""
        return self.user[user]

    def example(self, length: int) -> tuple[Tensor, ...]:
        """Three users."""
        del length
        return (torch.arange(3) % len(self.user),)


def query_network(scoring: Scoring) -> Any:
    """The network to export.

    Raises:
        ConfigError: the method has no query vectors.
    """
    model = scoring.model
    if scoring.vectors is not None:
        if isinstance(model, SequentialRecommender):
            bias = None
            if scoring.biased:
                interests = model.network.interests
                bias = 1.0 / interests if scoring.merge == "sum" else 1.0
            return SequenceQuery(model, bias)
        if isinstance(model, FISM):
            return FISMQuery(model)
        if isinstance(model, FactorRecommender):
            return UserQuery(model)
    raise ConfigError(
        f"{model.card.name} has no query vectors that a network gives, so there is nothing to write as ONNX",
        hint="methods with item vectors have: bpr, fism, sasrec, gru4rec, comirec-sa, ...",
    )


def export_onnx(scoring: Scoring, file: Path) -> dict[str, Any]:
    """Write the query network and tell what it takes and gives; checked against the model where onnxruntime is installed.

    Raises:
        ConfigError: the method has no query vectors, its network uses what ONNX lacks, or `onnx` is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError("writing ONNX needs onnx and onnxscript", hint="pip install 'vouch[export]'") from None
    network = query_network(scoring).eval()
    long = min(8, network.most)
    given = network.example(long)
    batch = torch.export.Dim("batch")
    shapes: list[dict[int, Any]] = [{0: batch} for _ in given]
    if given[0].dim() == 2:
        shapes[0][1] = (
            torch.export.Dim("items", max=network.most) if network.most < 1 << 30 else torch.export.Dim("items")
        )
    said = io.StringIO()
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
            torch.onnx.export(
                network,
                given,
                str(file),
                input_names=list(network.names),
                output_names=["query"],
                dynamic_shapes=dict(zip(network.names, shapes, strict=True)),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever it meets
        raise ConfigError(
            f"the network of {scoring.model.card.name} cannot be written as ONNX: {_reason(error)}",
            hint="use --format vectors",
        ) from error
    inputs = {
        name: ["batch"] if value.dim() == 1 else ["batch", "items"]
        for name, value in zip(network.names, given, strict=True)
    }
    checked = check_onnx(network, file)
    return {
        "inputs": {name: {"type": "int64", "shape": shape} for name, shape in inputs.items()},
        "output": {"query": {"type": "float32", "shape": ["batch", *map(int, network(*given).shape[1:])]}},
        "most_items": network.most if network.names[0] == "history" and network.most < 1 << 30 else None,
        "opset": OPSET,
        "largest_difference": checked,
    }


@torch.no_grad()
def check_onnx(network: Any, file: Path) -> float | None:
    """The largest difference between the file and the network, over several shapes; None where onnxruntime is missing.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest = 0.0
    for length in sorted({2, min(5, network.most), min(11, network.most), min(60, network.most)}):
        given = network.example(length)
        found = session.run(None, {name: value.numpy() for name, value in zip(network.names, given, strict=True)})[0]
        wanted = network(*given).numpy()
        largest = max(largest, float(np.abs(found - wanted).max() / max(1e-6, np.abs(wanted).max())))
    if largest > TOLERANCE:
        raise ConfigError(
            f"the ONNX file gives other vectors than the model (by {largest:.1e} of their size)",
            hint="use --format vectors, and report this",
        )
    return largest


def _reason(error: BaseException) -> str:
    """What an exporter met first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
