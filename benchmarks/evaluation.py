"""Full-ranking evaluation of 943 users x 1,682 items with all metrics, against RecBole on the same scores.

Both sides start from a model that looks its scores up, take the history out, and rank all items, on one thread. Times
are processor times: equal to the clock on one thread, and not disturbed by what else the machine does.
RecBole is timed as its users run it (`Trainer.evaluate` with its data loader, batches by default), the same with all
users in one batch, and, as its best case, in its collector and evaluator alone with all indices made beforehand.

    python benchmarks/evaluation.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peers import run_peer, write_result
from vouch.data import Cases, Interactions, Queries, Vocabulary
from vouch.evaluation import evaluate

USERS, ITEMS, EVENTS, REPEATS, CUTS = 943, 1682, 100_000, 20, (5, 10, 20)
SHARED = {"NDCG": "ndcg", "HR": "hit", "Recall": "recall", "Precision": "precision", "MRR": "mrr", "MAP": "map"}
LISTS = {"Coverage": "itemcoverage", "Gini": "giniindex"}
METRICS = [
    *(f"{family}@{k}" for family in (*SHARED, *LISTS, "Novelty", "PopularityBias") for k in CUTS),
    "AUC",
]
TARGET = 20


class Given:
    """A model whose scores are known beforehand."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def score_or_popularity(self, queries: Queries) -> torch.Tensor:
        """The rows of the queries' users."""
        return self.scores.index_select(0, torch.from_numpy(queries.user.astype(np.int64)))


def make_log(generator: np.random.Generator) -> Interactions:
    """A log of MovieLens-100K's shape: long and short histories, popular and rare items, no repeats."""
    popularity = generator.permutation(1 / np.arange(10, 10 + ITEMS))
    activity = generator.lognormal(0, 1, USERS)
    lengths = np.clip(20 + activity / activity.sum() * (EVENTS - 20 * USERS), 20, ITEMS // 2).astype(int)
    keys = np.log(generator.random((USERS, ITEMS))) / popularity  # weighted draws without replacement
    order = np.argsort(-keys, axis=1)
    item = np.concatenate([row[:length] for row, length in zip(order, lengths, strict=True)]).astype(np.int32)
    return Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(USERS)),
        Vocabulary.of_numbers(np.arange(ITEMS)),
        np.repeat(np.arange(USERS), lengths),
        item,
    )


def make_cases(log: Interactions, targets: int) -> Cases:
    """The last `targets` events of each user are asked for."""
    stop = log.offsets[1:] - targets
    return Cases(log, np.arange(USERS, dtype=np.int32), log.offsets[:-1], stop, log.offsets[1:])


def compare(targets: int) -> dict[str, Any]:
    """Time both on cases with so many targets, and check that they agree."""
    generator = np.random.default_rng(0)
    log = make_log(generator)
    cases = make_cases(log, targets)
    keep = np.ones(len(log), dtype=bool)
    for back in range(1, targets + 1):
        keep[log.offsets[1:] - back] = False
    train = log.where(keep)
    scores = torch.from_numpy(generator.normal(size=(USERS, ITEMS)).astype(np.float32))
    scores += torch.log1p(torch.from_numpy(train.item_counts.astype(np.float32)))
    model = Given(scores)
    seconds = []
    for _ in range(REPEATS + 2):
        begin = time.process_time()
        ours = evaluate(model, cases, metrics=METRICS, train=train)
        seconds.append(time.process_time() - begin)
    seconds = seconds[2:]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given.npz"
        queries, (target, _) = cases.queries(), cases.targets()
        np.savez(
            file, scores=scores.numpy(), item=queries.item, offsets=queries.offsets, target=target.reshape(USERS, -1)
        )
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        theirs = run_peer("recbole", "peer_recbole_evaluation.py", file, *CUTS, env=single)
    differences = [abs(ours.metrics["AUC"] - theirs["metrics"]["gauc"])]
    for family, peer in {**SHARED, **LISTS}.items():
        # It counts the padding item as part of the catalogue.
        scale = (ITEMS + 1) / ITEMS if family == "Coverage" else 1.0
        if family != "Gini":
            differences += [abs(ours.metrics[f"{family}@{k}"] - theirs["metrics"][f"{peer}@{k}"] * scale) for k in CUTS]
    mine = float(np.median(seconds))
    row = {"targets": targets, "seconds": mine, "users_per_second": USERS / mine, "worst": max(differences)}
    for name in ("seconds", "large_batch_seconds", "core_seconds"):
        if name in theirs:
            row[f"recbole_{name}"], row[f"ratio_{name.removesuffix('_seconds')}"] = theirs[name], theirs[name] / mine
    return row


def main() -> int:
    """Run, print and write `results/evaluation.json`; 1 where the target is missed."""
    torch.set_num_threads(1)
    rows = [compare(targets) for targets in (1, 10)]
    print(f"{USERS} users x {ITEMS} items, {len(METRICS)} metrics, history excluded, one thread")
    names = {"seconds": "RecBole 1.2.1 as it comes", "large_batch": "all in one batch", "core": "its evaluator alone"}
    for row in rows:
        print(
            f"  {row['targets']} target(s) a user: {1000 * row['seconds']:.1f} ms; values differ by {row['worst']:.0e}"
        )
        for name, words in names.items():
            if f"ratio_{name}" in row:
                peer = row["recbole_seconds" if name == "seconds" else f"recbole_{name}_seconds"]
                print(f"    {words}: {1000 * peer:.0f} ms, {row[f'ratio_{name}']:.1f} times as long")
    met = rows[0]["ratio_seconds"] >= TARGET
    print(f"  target, {TARGET} times RecBole's rate: {'met' if met else 'MISSED'}")
    write_result("evaluation", {"target": TARGET, "met": met, "metrics": METRICS, "rows": rows})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
