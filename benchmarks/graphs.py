"""Item graphs of a log as large as MovieLens 20M (138,000 users, 27,000 items, 20 million events), generated.

Target: under a minute each on two cores. Beside the time that passed stands the processor's time of this process (of all
its threads), because the machine may be busy with other work; its load is kept too.

    python benchmarks/graphs.py
"""

from __future__ import annotations

import os
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
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results: dict[str, dict[str, float]] = {}
    for build in (co_occurrence, transition_graph):  # peaks are the process's: the one that needs less first
        begin, worked = time.perf_counter(), time.process_time()
        graph = build(log)
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results[build.__name__] = {
            "seconds": seconds,
            "processor_seconds": worked,
            "edges": len(graph.weight),
            "peak_memory_mb": memory,
            "load": os.getloadavg()[0],
        }
        print(
            f"{build.__name__}: {seconds:.1f} s ({worked:.1f} s of the processor), {len(graph.weight):,} edges, "
            f"peak {memory:,.0f} MB, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        del graph
    write_result("graphs", {"events": len(log), "target_seconds": 60, "memory_before_mb": memory_before, **results})


if __name__ == "__main__":
    main()
