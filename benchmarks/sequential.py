"""What each sequential method costs in training, relative to plain SASRec in the same run, on ML-100K and Beauty.

Same sizes for all (64 dims, 2 layers, 2 heads, length 50, batch 128 histories with all their positions, one thread;
cross-entropy on ML-100K, 512 sampled negatives on Beauty). Each method runs in a process of its own, SASRec before and
after, 40 steps of which the first 3 are left out; the ratio is to the mean of both SASRec runs. Time is the processor's
time of the process, so that other work on the machine counts for little. Peak memory is the process's own. For TiCoSeRec
also the share of a step that making the views takes (target: under 15 %).

    VOUCH_DATA=FOLDER python benchmarks/sequential.py [METHOD ...] [DATA ...]

With methods or data named only these are measured, SASRec always, and the results of the others are kept.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import sys
import time
from typing import Any

import numpy as np
import torch

from peers import RESULTS, write_result
from vouch import registry
from vouch.data import split
from vouch.data.readers import read
from vouch.recommenders.sequential.base import routed_step

STEPS, FIRST = 40, 3
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "inner_size": 256,
    "hidden_size": 64,
    "max_length": 50,
    "batch_size": 128,
    "negatives": 512,
}
METHODS: dict[str, dict[str, Any]] = {
    "sasrec": {},
    "actsr": {},
    "ticoserec": {"contrastive.warmup_epochs": 0},
    "eclsr": {},
    "difsr": {},
    "gcl4sr": {},
    "comirec-sa": {},
    "remi": {},
    "comirec-dr": {},
    "mind": {},
    "attenmixer": {"max_length": 20},
    "srgnn": {"max_length": 20},
}
DATA = {"ml_100k": "ce", "amazon_beauty": "sampled_softmax"}


class _Here:
    """Stands in for Fabric in one process."""

    autocast = staticmethod(contextlib.nullcontext)


def measure(data: str, slug: str) -> dict[str, float]:
    """Seconds of a step, peak memory in MB, and for views their share of a step."""
    torch.set_num_threads(1)
    kind = registry.method(slug)
    settings = {**SHAPE, "loss": DATA[data], **METHODS[slug]}
    model = kind(**{k: v for k, v in settings.items() if "." in k or k in kind.Config.model_fields})
    made = split(read(data))
    objective = model.begin(made)
    objective.begin_epoch(1)
    optimizer = model.optimizer(objective)
    drawing = 0.0

    def timed(draw: Any) -> Any:
        def wrapped(histories: Any, generator: Any) -> Any:
            nonlocal drawing
            begin = time.process_time()
            found = draw(histories, generator)
            drawing += time.process_time() - begin
            return found

        return wrapped

    draws = {name: timed(draw) for name, draw in objective.draws().items()}
    batches = model.batches(made.train, draws)
    seconds, begin = [], time.process_time()
    epoch = 0
    while len(seconds) < STEPS:
        for batch in batches.epoch(np.random.default_rng(epoch), 0, 1):
            if objective.attackers:
                routed_step(objective, batch, optimizer, _Here())
            else:
                loss = torch.stack(list(objective.loss(batch).values())).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seconds.append(time.process_time() - begin)
            if len(seconds) == FIRST:
                drawing = 0.0
            if len(seconds) == STEPS:
                break
            begin = time.process_time()
        epoch += 1
    total = float(np.sum(seconds[FIRST:]))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": total / (STEPS - FIRST), "memory_mb": memory, "drawing_share": drawing / total}


def main() -> None:
    """Measure, print and keep."""
    context = multiprocessing.get_context("spawn")
    chosen = [slug for slug in sys.argv[1:] if slug in METHODS]
    path = RESULTS / "sequential.json"
    results: dict[str, Any] = json.loads(path.read_text()) if chosen and path.exists() else {}
    for data in [name for name in DATA if name in sys.argv[1:]] or DATA:
        found = {}
        for slug in ["sasrec", *(chosen or [slug for slug in METHODS if slug != "sasrec"]), "sasrec again"]:
            with context.Pool(1) as pool:
                found[slug] = pool.apply(measure, (data, slug.split()[0]))
        plain = (found["sasrec"]["seconds"] + found["sasrec again"]["seconds"]) / 2
        for slug, row in found.items():
            row["ratio"] = row["seconds"] / plain
            print(f"{data} {slug}: {row['ratio']:.2f} x SASRec, {row['memory_mb']:.0f} MB", flush=True)
        if "ticoserec" in found:
            share = found["ticoserec"]["drawing_share"]
            print(f"{data} views: {100 * share:.1f} % of a step (target 15 %)", flush=True)
        results[data] = {**results.get(data, {}), **found}
    write_result("sequential", results)


if __name__ == "__main__":
    main()
