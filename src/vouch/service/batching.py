"""Gathers what is asked at the same time, so that one pass of the model, or one commit, does for all.

One thread works. While it does, the next jobs gather; it then takes as many as there are. So nobody waits for company:
alone, a job is done at once, and the busier it is, the larger the batches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from vouch.errors import VouchError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Busy(VouchError):
    """Too much is waiting, or the service is stopping; what was asked may be asked again."""


class Batcher(Generic[Job, Result]):
    """A thread that does jobs in batches.

    Args:
        work: does some jobs and gives the result of each, in their order. If it raises, each job is tried alone, so
            that one at fault does not spoil the others; errors of the kind `shared` concern them all.
        most: the most that one batch takes. waiting: the most that may wait; both in units of `size`.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Job]], Sequence[Result]],
        *,
        name: str,
        most: int,
        waiting: int,
        size: Callable[[Job], int] = lambda job: 1,
        shared: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> None:
        self._work, self._size, self._most, self._limit, self._shared = work, size, most, waiting, shared
        self._jobs: deque[tuple[Job, Future[Result]]] = deque()
        self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How much is waiting now."""
        return self._waiting

    def submit(self, job: Job) -> Future[Result]:
        """Queue a job. A future that is cancelled before its turn is not done at all.

        Raises:
            Busy: too much is waiting, or the batcher was closed.
        """
        future: Future[Result] = Future()
        size = self._size(job)
        with self._changed:
            if self._closed:
                raise Busy("the service is stopping", hint="ask again")
            if self._waiting and self._waiting + size > self._limit:
                raise Busy("too many requests are waiting", hint="ask again in a moment")
            self._waiting += size
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Do what was accepted, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _gather(self) -> list[tuple[Job, Future[Result]]]:
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            batch: list[tuple[Job, Future[Result]]] = []
            size = 0
            while self._jobs and (not batch or size + self._size(self._jobs[0][0]) <= self._most):
                batch.append(self._jobs.popleft())
                size += self._size(batch[-1][0])
            self._waiting -= size
            return batch

    def _run(self) -> None:
        while batch := self._gather():
            self._settle([(job, future) for job, future in batch if future.set_running_or_notify_cancel()])

    def _settle(self, batch: list[tuple[Job, Future[Result]]]) -> None:
        if not batch:
            return
        try:
            results = self._work([job for job, _ in batch])
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, self._shared):
                for one in batch:
                    self._settle([one])
                return
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
