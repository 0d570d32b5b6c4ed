"""BPR-MF against implicit's on ML-100K (64 factors, two threads), and the fitting times of EASE and item-kNN.

Both train on the same pairs, in turn, three times; a round's seconds an epoch are the median of its epochs after the
first, and the best round of each counts, as other programs can only add to it. Targets: within 2 times of implicit;
EASE and item-kNN under a second.

    VOUCH_DATA=FOLDER python benchmarks/bpr.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from peers import run_peer, write_result
from vouch.data import split
from vouch.data.readers import read
from vouch.recommenders.collaborative.bpr import BPR
from vouch.recommenders.collaborative.ease import EASE
from vouch.recommenders.collaborative.itemknn import ItemKNN
from vouch.training import Run

EPOCHS = 60
ROUNDS = 3


def main() -> None:
    """Measure, print the ratio, write `results/bpr.json`."""
    torch.set_num_threads(2)
    made = split(read("ml-100k"))
    fits = {}
    for kind in (EASE, ItemKNN):
        kind().fit(made)  # once to warm up
        begin = time.perf_counter()
        kind().fit(made)
        fits[kind.card.slug] = time.perf_counter() - begin
        print(f"{kind.card.name}: fitted in {fits[kind.card.slug]:.2f} s")
    model = BPR(epochs=EPOCHS, evaluate_every=EPOCHS, hidden_size=64)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.npz"
        np.savez(path, user=made.train.user, item=made.train.item)
        for _ in range(ROUNDS):
            report = model.fit(made, Run(seed=0, device="cpu"))
            ours.append(median(row["seconds"] for row in report.history[1:-1]))  # the last holds the validation
            peer = run_peer("implicit", "peer_implicit_bpr.py", path, EPOCHS, env={"OPENBLAS_NUM_THREADS": "1"})
            theirs.append(peer["seconds"])
    ratio = min(ours) / min(theirs)
    print(f"BPR-MF: {min(ours) * 1000:.1f} ms an epoch, implicit {min(theirs) * 1000:.1f}: {ratio:.2f} times its time")
    result = {
        "target": 2.0,
        "met": ratio <= 2.0,
        "seconds": min(ours),
        "implicit_seconds": min(theirs),
        "ratio": ratio,
        "rounds": {"seconds": ours, "implicit_seconds": theirs},
    }
    write_result("bpr", {**result, "fit_seconds": fits, "epochs": EPOCHS, "batch_size": model.config.batch_size})


if __name__ == "__main__":
    main()
