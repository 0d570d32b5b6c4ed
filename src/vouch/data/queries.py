"""What is asked of a recommender: a batch of histories, with the user where one is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.data.interactions import Interactions
from vouch.data.vocabulary import Vocabulary
from vouch.errors import ConfigError, UnknownIdError, did_you_mean


@dataclass(frozen=True)
class Query:
    """One question in the log's own ids: a known user, or a bare history of a user never seen before.

    Where both are given the history replaces the one in the log. `times` are seconds, one per history item;
    `time` is the moment of asking.
    """

    user: Any = None
    history: Sequence[Any] | None = None
    times: Sequence[int] | None = None
    time: int | None = None
    scenario: str | None = None
    domain: str | None = None


@dataclass(frozen=True, eq=False)
class Queries:
    """A batch of `B` queries in codes; histories are compressed rows.

    Attributes:
        user: int32 `(B,)`, -1 where the user was not seen in training.
        offsets: int64 `(B + 1,)` bounds of each history in `item`.
        item: int32 `(sum of lengths,)`, each history oldest first.
        item_time: int64 like `item`, seconds, or None.
        time: int64 `(B,)` the moment of asking, or None.
        scenario, domain: int16 `(B,)`, or None.
    """

    user: NDArray[np.int32]
    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    item_time: NDArray[np.int64] | None = None
    time: NDArray[np.int64] | None = None
    scenario: NDArray[np.int16] | None = None
    domain: NDArray[np.int16] | None = None

    def __len__(self) -> int:
        return len(self.user)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `(B,)` history lengths."""
        return np.diff(self.offsets)

    def history(self, row: int) -> NDArray[np.int32]:
        """The history of one query, oldest first, as a view."""
        return self.item[self.offsets[row] : self.offsets[row + 1]]

    @classmethod
    def from_histories(
        cls,
        histories: Iterable[Sequence[int] | NDArray[Any]],
        *,
        user: NDArray[Any] | None = None,
        times: Iterable[Sequence[int] | NDArray[Any]] | None = None,
    ) -> Queries:
        """Build from histories in item codes; users unknown unless given as codes."""
        rows = [np.asarray(history, dtype=np.int32) for history in histories]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        ages = (
            None
            if times is None
            else np.concatenate([np.zeros(0, np.int64), *(np.asarray(t, np.int64) for t in times)])
        )
        if ages is not None and len(ages) != len(flat):
            raise ConfigError(f"{len(ages)} times for {len(flat)} history items")
        users = np.full(len(rows), -1, np.int32) if user is None else np.asarray(user, dtype=np.int32)
        return cls(users, offsets, flat, item_time=ages)

    @classmethod
    def from_users(cls, log: Interactions, users: NDArray[Any]) -> Queries:
        """Queries of known users (codes) with their whole history in `log`."""
        users = np.asarray(users, dtype=np.int64)
        return cls.from_slices(log, users, log.offsets[users], log.offsets[users + 1])

    @classmethod
    def from_slices(cls, log: Interactions, user: NDArray[Any], start: NDArray[Any], stop: NDArray[Any]) -> Queries:
        """Queries whose histories are the log's rows `start[b]:stop[b]`."""
        rows, offsets = flat_rows(start, stop)
        ages = None if log.time is None else log.time[rows]
        return cls(np.asarray(user, dtype=np.int32), offsets, log.item[rows], item_time=ages)

    @classmethod
    def resolve(
        cls, queries: Iterable[Query], *, users: Vocabulary, items: Vocabulary, log: Interactions | None = None
    ) -> Queries:
        """Turn questions in original ids into codes.

        Raises:
            UnknownIdError: a history item, a scenario or a domain is not known, or a user is not known and no history
                is given.
            ConfigError: a query has neither user nor history, or needs the log and none is at hand.
        """
        codes: list[int] = []
        histories: list[NDArray[Any]] = []
        ages: list[NDArray[Any]] = []
        queries = list(queries)
        for query in queries:
            if query.history is not None:
                codes.append(users.get(query.user) if query.user is not None else -1)
                histories.append(items.codes(query.history, kind="item"))
                if query.times is not None and len(query.times) != len(query.history):
                    raise ConfigError(f"{len(query.times)} times for {len(query.history)} history items")
                ages.append(np.asarray(query.times if query.times is not None else [0] * len(query.history), np.int64))
                continue
            if query.user is None:
                raise ConfigError("a query needs a user or a history", hint="for example Query(history=['a', 'b'])")
            code = users.code(query.user, kind="user")
            if log is None:
                raise ConfigError(f"the history of user {query.user!r} is not at hand", hint="give the history itself")
            codes.append(code)
            histories.append(log.history(code))
            bounds = slice(int(log.offsets[code]), int(log.offsets[code + 1]))
            ages.append(np.zeros(len(histories[-1]), np.int64) if log.time is None else log.time[bounds])
        # Times are used only if every query has them.
        timed = all(
            query.times is not None or (query.history is None and log is not None and log.time is not None)
            for query in queries
        )
        result = cls.from_histories(histories, user=np.array(codes), times=ages if timed and queries else None)
        moments = [query.time for query in queries if query.time is not None]
        complete = bool(queries) and len(moments) == len(queries)
        return replace(
            result,
            time=np.array(moments, dtype=np.int64) if complete else None,
            scenario=_label_codes([query.scenario for query in queries], "scenario", log),
            domain=_label_codes([query.domain for query in queries], "domain", log),
        )

    def blocks(self, size: int) -> Iterator[tuple[int, Queries]]:
        """Consecutive pieces of at most `size` queries, each with the position of its first."""
        for start in range(0, len(self), size):
            yield start, self[start : start + size]

    def __getitem__(self, rows: slice) -> Queries:
        """Consecutive queries, as views (step 1 only)."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        low, high = int(self.offsets[start]), int(self.offsets[max(stop, start)])

        def cut(column: NDArray[Any] | None, by: slice) -> NDArray[Any] | None:
            return None if column is None else column[by]

        return Queries(
            self.user[start:stop],
            self.offsets[start : max(stop, start) + 1] - low,
            self.item[low:high],
            cut(self.item_time, slice(low, high)),
            cut(self.time, slice(start, stop)),
            cut(self.scenario, slice(start, stop)),
            cut(self.domain, slice(start, stop)),
        )

    def last(self, length: int) -> NDArray[np.int32]:
        """The last `length` items as a dense int32 `(B, T)`, right-aligned, T the longest kept, -1 before it."""
        return right_aligned(self.item, self.offsets[:-1], self.offsets[1:], length, fill=-1)


def _label_codes(names: Sequence[str | None], kind: str, log: Interactions | None) -> NDArray[np.int16] | None:
    """int16 codes of scenarios or domains, -1 where none is given; None if none is given at all."""
    if all(name is None for name in names):
        return None
    known = list(log.labels.get(kind, ())) if log is not None else []
    for name in names:
        if name is not None and name not in known:
            raise UnknownIdError(f"there is no {kind} {name!r}", hint=did_you_mean(name, known) if known else None)
    return np.array([-1 if name is None else known.index(name) for name in names], dtype=np.int16)


def flat_rows(start: NDArray[Any], stop: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All row numbers of many slices, end to end, and the bounds `(B + 1,)` of each slice among them."""
    start, stop = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
    offsets = np.zeros(len(start) + 1, dtype=np.int64)
    np.cumsum(stop - start, out=offsets[1:])
    rows = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], stop - start)
    return rows, offsets


def right_aligned(
    values: NDArray[Any], start: NDArray[Any], stop: NDArray[Any], length: int, *, fill: int
) -> NDArray[Any]:
    """Slices of `values` as a dense `(B, T)`: the last `length` entries of each, right-aligned, `fill` before them."""
    start, stop = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
    width = int(min(length, max(1, int((stop - start).max(initial=0)))))
    rows = stop[:, None] + np.arange(-width, 0)  # (B, T) row numbers
    inside = rows >= start[:, None]
    if len(values) == 0:
        return np.full(rows.shape, fill, dtype=values.dtype)
    return np.where(inside, values[np.where(inside, rows, 0)], np.asarray(fill, dtype=values.dtype))
