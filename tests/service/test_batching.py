from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

pytest.importorskip("fastapi")

from vouch.service.batching import Batcher, Busy


class Slow:
    """Work that waits for a sign, and remembers its batches."""

    def __init__(self) -> None:
        self.go, self.begun, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, jobs: Sequence[int]) -> list[int]:
        self.batches.append(list(jobs))
        self.begun.set()
        assert self.go.wait(10)
        return [job * 2 for job in jobs]


def test_jobs_that_come_while_others_are_done_share_a_batch() -> None:
    work = Slow()
    batcher = Batcher(work, name="t", most=8, waiting=100)
    first = batcher.submit(0)
    assert work.begun.wait(10)
    rest = [batcher.submit(number) for number in range(1, 20)]
    assert batcher.waiting == 19
    work.go.set()
    assert [future.result(10) for future in (first, *rest)] == [2 * number for number in range(20)]
    assert [len(batch) for batch in work.batches] == [1, 8, 8, 3]
    batcher.close()


def test_size_counts_towards_batches_and_a_large_job_goes_alone() -> None:
    work = Slow()
    batcher = Batcher(work, name="t", most=10, waiting=1_000, size=lambda job: job)
    futures = [batcher.submit(1)]
    assert work.begun.wait(10)
    futures += [batcher.submit(number) for number in (6, 4, 5, 50, 1)]
    work.go.set()
    [future.result(10) for future in futures]
    assert work.batches == [[1], [6, 4], [5], [50], [1]]
    batcher.close()


def test_too_many_waiting_are_refused_at_once() -> None:
    work = Slow()
    batcher = Batcher(work, name="t", most=4, waiting=3)
    batcher.submit(0)
    assert work.begun.wait(10)
    kept = [batcher.submit(number) for number in range(3)]
    with pytest.raises(Busy):
        batcher.submit(9)
    work.go.set()
    assert [future.result(10) for future in kept] == [0, 2, 4]
    assert batcher.submit(9).result(10) == 18
    batcher.close()


def test_a_job_at_fault_fails_alone() -> None:
    def work(jobs: Sequence[int]) -> list[int]:
        if 3 in jobs:
            raise ValueError("three")
        return [job + 1 for job in jobs]

    hold = threading.Event()
    batcher = Batcher(lambda jobs: (hold.wait(10), work(jobs))[1], name="t", most=8, waiting=100)
    futures = [batcher.submit(number) for number in range(6)]
    hold.set()
    for number, future in enumerate(futures):
        if number == 3:
            with pytest.raises(ValueError, match="three"):
                future.result(10)
        else:
            assert future.result(10) == number + 1
    batcher.close()


def test_an_error_that_concerns_all_is_not_tried_again() -> None:
    calls = []
    gate = threading.Event()

    def work(jobs: Sequence[int]) -> list[int]:
        calls.append(len(jobs))
        assert gate.wait(10)
        raise OSError("gone")

    batcher = Batcher(work, name="t", most=8, waiting=100, shared=OSError)
    futures = [batcher.submit(0)]
    while not calls:
        time.sleep(0.001)
    futures += [batcher.submit(number) for number in range(5)]
    gate.set()
    for future in futures:
        with pytest.raises(OSError, match="gone"):
            future.result(10)
    assert calls == [1, 5]
    batcher.close()


def test_closing_does_what_was_accepted_and_takes_no_more() -> None:
    work = Slow()
    batcher = Batcher(work, name="t", most=2, waiting=100)
    futures = [batcher.submit(number) for number in range(7)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    work.go.set()
    closing.join(10)
    assert [future.result(0) for future in futures] == [2 * number for number in range(7)]
    with pytest.raises(Busy, match="stopping"):
        batcher.submit(1)


def test_what_was_given_up_before_its_turn_is_not_done() -> None:
    work = Slow()
    batcher = Batcher(work, name="t", most=8, waiting=100)
    first = batcher.submit(0)
    assert work.begun.wait(10)
    given_up, kept = batcher.submit(1), batcher.submit(2)
    assert given_up.cancel()
    work.go.set()
    assert (first.result(10), kept.result(10)) == (0, 4)
    assert work.batches == [[0], [2]]
    batcher.close()
