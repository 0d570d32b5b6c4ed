"""Steps of multi-task balancers in one process: ours, TorchJD's and LibMTL's, in turn, on the same network and batch.

    python peer_multitask.py SRC ROUNDS

SRC is the folder with `vouch`. In each round every method takes one step, in another order each: what ran before leaves
the caches in its state. Prints one JSON object: for each network and method the milliseconds of processor time for the
forward pass and the gradients (no optimizer), their median over the rounds and the least.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 512
NETWORKS = {
    # tasks, embedding rows, fields or inputs, body, towers
    "recommender, 3 tasks": (3, 20_000, 8, (256, 128, 64), (32, 16)),
    "recommender, 6 tasks": (6, 20_000, 8, (256, 128, 64), (32, 16)),
    "dense, 6 tasks": (6, 0, 128, (256, 256, 128), (32, 16)),
}


def layers(width: int, sizes: tuple[int, ...]) -> list[nn.Module]:
    """Linear layers with ReLU."""
    parts: list[nn.Module] = []
    for size in sizes:
        parts += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return parts


class Encoder(nn.Module):
    """Embeddings (or plain inputs) and the shared layers."""

    def __init__(self, rows: int, fields: int, body: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 16) if rows else None
        self.body = nn.Sequential(*layers(16 * fields if rows else fields, body))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, fields)` to `(B, D)`."""
        return self.body(x if self.table is None else self.table(x).flatten(1))


@functools.cache
def made(name: str) -> tuple[Encoder, nn.ModuleDict, Tensor, Tensor]:
    """A network's encoder and towers, inputs and labels. All methods share them: copies elsewhere in memory differ by 2 %."""
    tasks, rows, fields, body, tower = NETWORKS[name]
    torch.manual_seed(0)
    encoder = Encoder(rows, fields, body)
    towers = nn.ModuleDict({
        f"task {k}": nn.Sequential(*layers(body[-1], tower), nn.Linear(tower[-1], 1)) for k in range(tasks)
    })  # fmt: skip
    x = torch.randint(0, rows, (BATCH, fields)) if rows else torch.randn(BATCH, fields)
    return encoder, towers, x, torch.randint(0, 2, (BATCH, tasks)).float()


def losses_of(out: dict[str, Tensor], y: Tensor) -> list[Tensor]:
    """Binary cross-entropy of each task."""
    return [F.binary_cross_entropy_with_logits(o.squeeze(1), y[:, k]) for k, o in enumerate(out.values())]


Step = Callable[[], None]


def ours(name: str, slug: str) -> tuple[Step, list[nn.Parameter]]:
    """A step of `vouch.multitask`; `plain` is the sum of the losses without any balancer."""
    from vouch.multitask.balancers import make

    encoder, towers, x, y = made(name)
    parameters = [*encoder.parameters(), *towers.parameters()]
    balancer = None if slug == "plain" else make(slug, parameters, tasks=list(towers))

    def step() -> None:
        for p in parameters:
            p.grad = None
        h = encoder(x)
        losses = losses_of({task: tower(h) for task, tower in towers.items()}, y)
        if balancer is None:
            torch.stack(losses).sum().backward()
        else:
            balancer.backward(losses)

    if slug in ("dwa", "gradnorm") and balancer is not None:
        step()
        balancer.end_epoch()  # the first epoch is a plain sum
    return step, list(encoder.parameters())


def torchjd(name: str, slug: str, chunk: int | None, gramian: bool) -> tuple[Step, list[nn.Parameter]]:
    """A step of TorchJD: all tasks at once or one after another; with its shortcut for the Gram matrix or without."""
    from torchjd.aggregation import IMTLG, MGDA, CAGrad, GradVac, PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = {
        "pcgrad": PCGrad,
        "gradvac": GradVac,
        "mgda": MGDA,
        "imtl-g": IMTLG,
        "cagrad": lambda: CAGrad(c=0.4),
    }[slug]()
    encoder, towers, x, y = made(name)
    parameters = [*encoder.parameters(), *towers.parameters()]
    more: dict[str, Any] = {"optimize_gramian_computation": True} if gramian else {}

    def step() -> None:
        for p in parameters:
            p.grad = None
        h = encoder(x)
        losses = losses_of({task: tower(h) for task, tower in towers.items()}, y)
        mtl_backward(losses, features=h, parallel_chunk_size=chunk)
        jac_to_grad(encoder.parameters(), aggregator, **more)

    return step, list(encoder.parameters())


def libmtl(name: str, slug: str) -> tuple[Step, list[nn.Parameter]]:
    """A step of LibMTL's architecture with one of its weightings."""
    import numpy as np

    # it takes a loader of weights from where torchvision no longer has it; nothing here uses it
    gone = types.ModuleType("torchvision.models.utils")
    gone.load_state_dict_from_url = None  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision.models.utils", gone)
    from LibMTL import weighting
    from LibMTL.architecture import HPS

    kind = {"uw": "UW", "dwa": "DWA", "gradnorm": "GradNorm", "pcgrad": "PCGrad", "gradvac": "GradVac", "mgda": "MGDA",
            "imtl-g": "IMTL", "cagrad": "CAGrad", "uniform": "EW"}[slug]  # fmt: skip
    given = {"dwa": {"T": 2.0}, "gradnorm": {"alpha": 0.5}, "gradvac": {"beta": 0.01}, "mgda": {"mgda_gn": "none"},
             "cagrad": {"calpha": 0.4, "rescale": 1}}.get(slug, {})  # fmt: skip
    encoder, towers, x, y = made(name)

    class Model(HPS, getattr(weighting, kind)):  # type: ignore[misc]
        def zero_grad_share_params(self) -> None:
            self.encoder.zero_grad(set_to_none=False)  # it writes into these tensors, which are gone by default

    model = Model(list(towers), lambda: encoder, towers, False, False, torch.device("cpu"))
    model.init_param()
    model.epoch = 2
    model.train_loss_buffer = np.ones((len(towers), 4))
    parameters = [*encoder.parameters(), *towers.parameters()]

    def step() -> None:
        for p in parameters:
            p.grad = None
        model.backward(torch.stack(losses_of(model(x), y)), **given)

    return step, list(encoder.parameters())


def candidates(name: str) -> dict[str, dict[str, Callable[[], tuple[Step, list[nn.Parameter]]]]]:
    """By method the implementations to time."""
    found: dict[str, dict[str, Any]] = {"plain": {"ours": lambda: ours(name, "plain")}}
    for slug in ("uniform", "uw", "dwa", "gradnorm", "pcgrad", "gradvac", "mgda", "imtl-g", "cagrad", "gradcraft"):
        rows: dict[str, Any] = {"ours": lambda slug=slug: ours(name, slug)}
        if slug in ("pcgrad", "gradvac", "mgda", "imtl-g", "cagrad"):
            for chunk, gramian in ((None, False), (1, False), (1, True)):
                if not gramian or slug != "gradvac":
                    label = f"torchjd, {'one by one' if chunk else 'at once'}{', gramian' if gramian else ''}"
                    rows[label] = lambda slug=slug, c=chunk, g=gramian: torchjd(name, slug, c, g)
        if slug != "gradcraft":
            rows["libmtl"] = lambda slug=slug: libmtl(name, slug)
        found[slug] = rows
    return found


def timed(step: Step) -> float:
    """Milliseconds of processor time of a step."""
    begin = time.process_time()
    step()
    return (time.process_time() - begin) * 1000


def main() -> None:
    """See the top."""
    sys.path.insert(0, sys.argv[1])
    rounds = int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {}
    for name in NETWORKS:
        steps: dict[tuple[str, str], Step] = {}
        failed: dict[str, str] = {}
        gradients: dict[tuple[str, str], Tensor] = {}
        for slug, kinds in candidates(name).items():
            for kind, build in kinds.items():
                try:
                    step, shared = build()
                    step()
                    step()
                except Exception as error:  # a peer's own limit is part of the result
                    failed[f"{slug}, {kind}"] = f"{type(error).__name__}: {str(error)[:160]}"
                    continue
                steps[slug, kind] = step
                grads = [p.grad.flatten() for p in shared if p.grad is not None]
                gradients[slug, kind] = torch.cat(grads)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        turns, shuffled = list(steps), random.Random(0)
        for _ in range(rounds):
            shuffled.shuffle(turns)
            for key in turns:
                times[key].append(timed(steps[key]))
        rows: dict[str, dict[str, Any]] = {}
        for (slug, kind), values in times.items():
            mine, other = gradients.get((slug, "ours")), gradients[slug, kind]
            cosine = None if mine is None else float(F.cosine_similarity(mine.double(), other.double(), dim=0))
            rows.setdefault(slug, {})[kind] = {
                "ms": statistics.median(values),
                "least_ms": min(values),
                "cosine_with_ours": cosine,
            }
        result[name] = {"methods": rows, "failed": failed}
        print(f"{name} done", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
