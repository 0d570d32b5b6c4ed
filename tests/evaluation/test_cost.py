"""Costs of known size, measured."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from vouch.data import Queries
from vouch.errors import DataError
from vouch.evaluation import latency, measure


def test_waiting_takes_wall_time_and_no_processor():
    with measure() as cost:
        time.sleep(0.3)
    assert 0.3 <= cost.wall_seconds < 1.5
    assert cost.cpu_seconds < 0.15


def test_work_takes_processor_time():
    with measure() as cost:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
    assert 0.2 <= cost.cpu_seconds <= cost.wall_seconds + 0.1


def test_the_processor_time_of_children_counts():
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    with measure() as cost:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert cost.cpu_seconds >= 0.25


def test_memory_that_was_given_back_counts():
    with measure() as cost:
        block = np.ones(300 * 2**20 // 8)
        time.sleep(0.1)
        del block
    assert 290 <= cost.peak_memory_mb < 400
    with measure() as small:  # a later, smaller peak is not hidden by the larger one before it
        block = np.ones(100 * 2**20 // 8)
        time.sleep(0.1)
        del block
    assert 90 <= small.peak_memory_mb < 200


def test_the_cost_is_known_after_an_error_too():
    with pytest.raises(KeyError), measure() as cost:
        time.sleep(0.05)
        raise KeyError
    assert cost.wall_seconds >= 0.05


class Slow:
    """Answers after 2 ms a query; every tenth single query takes 20 ms."""

    def __init__(self):
        self.asked = []

    def recommend(self, queries, k):
        self.asked.append((len(queries), k))
        time.sleep(0.02 if len(queries) == 1 and len(self.asked) % 10 == 0 else 0.002 * len(queries))


def test_latency_and_throughput():
    model, queries = Slow(), Queries.from_histories([[0]] * 50)
    found = latency(model, queries, k=7, single=40)
    assert 2 <= found.p50_ms < 10
    assert found.p99_ms >= 18
    assert 200 < found.per_second <= 500
    assert model.asked[-1] == (50, 7)
    assert [size for size, _ in model.asked[:-1]] == [1] * 43  # three to warm up


def test_nothing_to_time_is_refused():
    with pytest.raises(DataError, match="no query"):
        latency(Slow(), Queries.from_histories([]))
