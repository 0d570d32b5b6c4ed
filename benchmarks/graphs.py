"""Item graphs of a log as large as MovieLens 20M (138,000 users, 27,000 items, 20 million events), generated.

Target: under a minute each.

    python benchmarks/graphs.py
"""

from __future__ import annotations

import resource
import time

import numpy as np

from peers import write_result
from vouch.data import Interactions, Vocabulary
from vouch.data.graphs import co_occurrence, transition_graph

USERS, ITEMS, EVENTS = 138_000, 27_000, 20_000_000


def log_like_movielens() -> Interactions:
    """Popularity by Zipf's law, history lengths log-normal."""
    random = np.random.default_rng(0)
    share = random.lognormal(0, 1, USERS)
    lengths = np.maximum(20, share / share.sum() * EVENTS).astype(np.int64)
    weight = 1 / np.arange(1, ITEMS + 1) ** 0.8
    items = random.choice(ITEMS, size=int(lengths.sum()), p=weight / weight.sum()).astype(np.int32)
    users = Vocabulary.of_numbers(np.arange(USERS))
    return Interactions.from_codes(
        users, Vocabulary.of_numbers(np.arange(ITEMS)), np.repeat(np.arange(USERS), lengths), items
    )


def main() -> None:
    """Measure, print and keep."""
    log = log_like_movielens()
    results: dict[str, dict[str, float]] = {}
    for build in (transition_graph, co_occurrence):
        begin = time.perf_counter()
        graph = build(log)
        seconds = time.perf_counter() - begin
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results[build.__name__] = {"seconds": seconds, "edges": len(graph.weight), "peak_memory_mb": memory}
        print(f"{build.__name__}: {seconds:.1f} s, {len(graph.weight):,} edges, peak {memory:,.0f} MB", flush=True)
    write_result("graphs", {"events": len(log), "target_seconds": 60, **results})


if __name__ == "__main__":
    main()
