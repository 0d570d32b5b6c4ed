"""What it costs: time, processor time, memory, and how long one recommendation takes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vouch.data import Queries
from vouch.errors import DataError

INTERVAL = 0.02
"""Seconds between two looks at the memory in use."""


@dataclass
class Cost:
    """Filled when the `measure` block ends.

    Attributes:
        wall_seconds: time on the clock.
        cpu_seconds: processor time of this process and the children that ended inside the block.
        peak_memory_mb: most resident memory of this process above what was in use at the start, in MiB. Looked at
            every 20 ms, and exact where the block went above all that the process had used before (the system's
            high-water mark, on Unix). Children and memory on a GPU are not counted.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: float = 0.0


@dataclass(frozen=True)
class Latency:
    """Time to answer one query alone (median and 99th percentile, ms), and queries a second in one batch."""

    p50_ms: float
    p99_ms: float
    per_second: float


@contextlib.contextmanager
def measure() -> Iterator[Cost]:
    """Measure what happens inside the block."""
    import psutil

    cost, process, done = Cost(), psutil.Process(), threading.Event()
    begin_memory = peak = process.memory_info().rss
    begin_mark = _high_water()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin, begin_cpu = time.perf_counter(), _cpu()
    try:
        yield cost
    finally:
        cost.wall_seconds, cost.cpu_seconds = time.perf_counter() - begin, _cpu() - begin_cpu
        done.set()
        watcher.join()
        mark = _high_water()
        peak = max(peak, process.memory_info().rss, mark if mark > begin_mark else 0)
        cost.peak_memory_mb = (peak - begin_memory) / 2**20


def _cpu() -> float:
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def _high_water() -> int:
    """The most bytes ever resident in this process; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def latency(model: Any, queries: Queries, *, k: int = 10, single: int = 100) -> Latency:
    """Time `model.recommend`: up to `single` queries one by one, after a warm-up, then all in one batch.

    Raises:
        DataError: there is no query.
    """
    if len(queries) == 0:
        raise DataError("there is no query to time")
    for row in range(min(3, len(queries))):
        model.recommend(queries[row : row + 1], k)
    seconds = []
    for row in range(min(single, len(queries))):
        begin = time.perf_counter()
        model.recommend(queries[row : row + 1], k)
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    model.recommend(queries, k)
    together = time.perf_counter() - begin
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return Latency(float(p50), float(p99), len(queries) / together)
