"""SASRec on ML-100K (64 dims, 2 layers, 2 heads, length 50, full cross-entropy, dropout 0.2) against two peers.

1. RecTools' SASRecModel at equal work: the same data (each user's last 51 training events), batch size, loss and
   learning rate. Seconds an epoch, and test NDCG@10 of the epoch that validation chose.
2. RecBole's SASRec, which trains on every prefix. Its run is stopped after a set time, usually long before it
   converges, so the level that counts is the best validation NDCG@10 it has reached by then, and the time it needed
   is a lower bound of the time to converge. Both rank all items with nothing excluded, as RecBole does.

All with two threads, one after the other. Batch 128; RecBole's own default is 2,048, used for it.

    VOUCH_DATA=FOLDER python benchmarks/sasrec.py [--recbole-seconds 600]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from peers import run_peer, write_result
from vouch.data import Split, split
from vouch.data.readers import read
from vouch.evaluation import evaluate
from vouch.recommenders.sequential.sasrec import SASRec
from vouch.training import Run, fit

BATCH, ROUNDS, EACH, SEED = 128, 20, 2, 0
MODEL = {
    "hidden_size": 64, "num_layers": 2, "num_heads": 2, "max_length": 50, "dropout": 0.2, "loss": "ce",
    "learning_rate": 1e-3, "batch_size": BATCH, "every_window": False, "patience": 1000,
}  # fmt: skip


def train(made: Split, exclude: str, **settings: Any) -> dict[str, Any]:
    """Train ours; seconds of each epoch without validation, validation NDCG@10, and test NDCG@10 of the best."""
    model = SASRec(**{**MODEL, **settings})
    checks: list[float] = []

    def validate() -> dict[str, float]:
        begin = time.perf_counter()
        found = evaluate(model, made.valid, metrics=["NDCG@10"], exclude=exclude).metrics
        checks.append(time.perf_counter() - begin)
        return found

    torch.manual_seed(SEED)
    objective = model.begin(made)
    report = fit(
        objective,
        model.batches(made.train),
        config=model.config,
        run=Run(seed=SEED, device="cpu"),
        optimizer=model.optimizer(objective),
        validate=validate,
    )
    rows = report.history
    spent = iter(checks)
    seconds = [row["seconds"] - (next(spent) if "NDCG@10" in row else 0.0) for row in rows]
    valid = [row["NDCG@10"] for row in rows if "NDCG@10" in row]
    tested = evaluate(model, made.test, metrics=["NDCG@10"], exclude=exclude).metrics["NDCG@10"]
    return {"seconds": seconds, "valid": valid, "test": tested, "checks": checks}


def write_log(made: Split, folder: Path) -> Path:
    """The log for the peers: places in the history stand for times; part 0 is training, 1 validation, 2 test."""
    log = made.dataset.interactions
    place = np.arange(len(log)) - np.repeat(log.offsets[:-1], log.lengths)
    part = np.zeros(len(log), np.int64)
    part[made.valid.stop], part[made.test.stop] = 1, 2
    np.savez(folder / "log.npz", user=log.user, item=log.item, place=place, part=part)
    (folder / "given").mkdir()
    with (folder / "given" / "given.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        file.writelines(f"{u}\t{i}\t{p}\n" for u, i, p in zip(log.user, log.item, place, strict=True))
    return folder / "log.npz"


def main() -> None:
    """Run everything, print the ratios and write `results/sasrec.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--recbole-seconds", type=int, default=600, help="0 leaves RecBole out")
    options = parser.parse_args()
    torch.set_num_threads(2)
    made = split(read(options.data))
    result: dict[str, Any] = {"settings": {**MODEL, "data": options.data, "seed": SEED}}
    with tempfile.TemporaryDirectory() as name:
        log = write_log(made, Path(name))
        ours = train(made, "history", epochs=ROUNDS * EACH, evaluate_every=EACH)
        theirs = run_peer("rectools", "peer_rectools_sasrec.py", log, ROUNDS, EACH, BATCH, SEED)
        ours["seconds"] += train(made, "history", epochs=10, evaluate_every=EACH)[
            "seconds"
        ]  # others may use the machine
        result["vouch"], result["rectools"] = ours, theirs
        a, b = median(ours["seconds"]), median(theirs["seconds"])
        result["rectools_ratio"] = b / a
        print(f"seconds an epoch: vouch {a:.3f}, RecTools {b:.3f}: {b / a:.2f} times faster (target 2)")
        print(f"test NDCG@10: vouch {ours['test']:.4f}, RecTools {theirs['test']:.4f}")
        if options.recbole_seconds:
            theirs = run_peer("recbole", "peer_recbole_sasrec.py", name, 2048, options.recbole_seconds, SEED)
            result["recbole"] = theirs
            best = int(np.argmax(theirs["valid"]))
            needed = sum(theirs["seconds"][: best + 1])
            ours = train(made, "none", epochs=60, evaluate_every=1)
            total = np.cumsum(ours["seconds"]) + np.cumsum(ours["checks"])  # our validation counts
            level = theirs["valid"][best]
            reached = np.flatnonzero(np.array(ours["valid"]) >= level)
            spent = float(total[reached[0]]) if len(reached) else None
            result["to_level"] = {"level": level, "recbole": needed, "vouch": spent, "vouch_run": ours}
            print(
                f"RecBole: {median(theirs['seconds']):.1f} s an epoch, {len(theirs['valid'])} epochs in the time given"
            )
            if spent is None:
                print(f"validation NDCG@10 {level:.4f}: RecBole {needed:.1f} s; vouch did not reach it")
            else:
                result["recbole_ratio"] = needed / spent
                print(
                    f"validation NDCG@10 {level:.4f}: RecBole {needed:.1f} s, vouch {spent:.2f} s: {needed / spent:.0f} times"
                )
    print(write_result("sasrec", result).name)


if __name__ == "__main__":
    main()
