"""Splitting a log into what is trained on and what is asked: five named protocols, checked for leaks.

The histories and targets of validation and test are slices of the one sorted log, never copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.data.dataset import Dataset
from vouch.data.interactions import OPTIONAL, Interactions
from vouch.data.queries import Queries, flat_rows
from vouch.errors import ConfigError, DataError, did_you_mean

PROTOCOLS = ("leave-one-out", "temporal", "ratio", "session", "users")
TAIL = 0.2
"""Share of a history that is asked for where whole users are held out."""


@dataclass(frozen=True, eq=False)
class Cases:
    """`Q` evaluation cases over one log: the history is rows `start:stop`, the targets are rows `stop:target_stop`.

    Attributes:
        log: the whole log, before splitting.
        user: int32 `(Q,)`, -1 where the user has no row in training.
        start, stop, target_stop: int64 `(Q,)`.
    """

    log: Interactions
    user: NDArray[np.int32]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    target_stop: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user)

    def queries(self, first: int = 0, last: int | None = None) -> Queries:
        """The questions of cases `first:last`."""
        rows = slice(first, last)
        return Queries.from_slices(self.log, self.user[rows], self.start[rows], self.stop[rows])

    def targets(self, first: int = 0, last: int | None = None) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The wanted items of cases `first:last`: item codes end to end, and bounds `(Q + 1,)`."""
        rows, offsets = flat_rows(self.stop[first:last], self.target_stop[first:last])
        return self.log.item[rows], offsets

    def blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Bounds of consecutive pieces of at most `size` cases."""
        for first in range(0, len(self), size):
            yield first, min(first + size, len(self))

    def take(self, rows: NDArray[Any]) -> Cases:
        """A selection of cases, by position."""
        return Cases(self.log, self.user[rows], self.start[rows], self.stop[rows], self.target_stop[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """A dataset with its training log and its validation and test cases.

    Attributes:
        dataset: the whole dataset.
        train: the training rows, with the same vocabularies (so codes mean the same).
        valid, test: evaluation cases. The history of a test case includes what validation asked for.
        protocol: one of `PROTOCOLS`.
        settings: the numbers that define the split.
        dropped: what was left out and why, e.g. `{"users too short": 3}`.
    """

    dataset: Dataset
    train: Interactions
    valid: Cases
    test: Cases
    protocol: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Split({self.protocol!r}, train {len(self.train):,} rows, valid {len(self.valid):,} cases, "
            f"test {len(self.test):,} cases)"
        )

    def describe(self) -> dict[str, Any]:
        """Plain JSON: protocol, settings, sizes, what was dropped, and the fingerprint of the log."""
        return {
            "protocol": self.protocol,
            "settings": dict(self.settings),
            "train_rows": len(self.train),
            "valid_cases": len(self.valid),
            "test_cases": len(self.test),
            "dropped": dict(self.dropped),
            "data": self.dataset.name,
            "fingerprint": self.dataset.interactions.fingerprint,
        }


def split(
    dataset: Dataset,
    protocol: str = "leave-one-out",
    *,
    valid_share: float = 0.1,
    test_share: float = 0.1,
    min_history: int = 1,
) -> Split:
    """Split by a named protocol.

    - `leave-one-out`: each user's last event is the test target, the one before it the validation target.
    - `temporal`: two moments cut the whole log by time; nothing after the first is trained on. A user's events
      after a cut are the targets, the events before it the history.
    - `ratio`: the last `test_share` of each user's events are test targets, `valid_share` before them validation.
    - `session`: every "user" of the log is a session; the last `test_share` of sessions (by start time, or by order
      of the log without times) are test, those before them validation; each event of them after the first is asked
      for with the events before it as history.
    - `users`: a fixed random choice of users is kept out of training, `valid_share` and `test_share` of them; the last
      fifth of each of their histories is asked for at once, with what is before it as history.

    Users who are too short for a case stay in training, and are counted in `dropped`.

    Args:
        valid_share, test_share: shares of events (`temporal`, `ratio`), sessions (`session`) or users (`users`).
        min_history: the fewest training events a user needs to be asked about (`leave-one-out`, `ratio`).

    Raises:
        ConfigError: unknown protocol, or shares outside (0, 1) or that leave nothing to train on.
        DataError: the log cannot be split this way; the message says what is lacking.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"there is no split protocol {protocol!r}", hint=did_you_mean(protocol, PROTOCOLS))
    for name, share in (("valid_share", valid_share), ("test_share", test_share)):
        if not 0 < share < 1:
            raise ConfigError(f"{name} is {share}; it must lie between 0 and 1")
    if valid_share + test_share >= 1:
        raise ConfigError(f"valid_share + test_share is {valid_share + test_share}; nothing is left to train on")
    if min_history < 1:
        raise ConfigError(f"min_history is {min_history}; it must be at least 1")
    log = dataset.interactions
    if log.n_items < 2:
        raise DataError("the log has one item; there is nothing to rank", hint="check the item column")
    makers = {
        "leave-one-out": lambda: _leave_one_out(log, min_history),
        "temporal": lambda: _temporal(log, valid_share, test_share),
        "ratio": lambda: _ratio(log, valid_share, test_share, min_history),
        "session": lambda: _session(log, valid_share, test_share),
        "users": lambda: _users(log, valid_share, test_share),
    }
    train, valid, test, settings, dropped = makers[protocol]()
    settings = {**settings, **({} if protocol in ("temporal", "session", "users") else {"min_history": min_history})}
    for name, cases in (("validation", valid), ("test", test)):
        if len(cases) == 0:
            raise DataError(
                f"the {protocol} split leaves no {name} case: {_why_short(log)}",
                hint="use another protocol, a larger share, or a log with longer histories",
            )
    if len(train) == 0:
        raise DataError(f"the {protocol} split leaves nothing to train on: {_why_short(log)}")
    trained = np.bincount(train.item, minlength=log.n_items) > 0
    cold = int((~trained[test.targets()[0]]).sum())
    dropped = {**dropped, "test targets never seen in training (kept, count as misses)": cold}
    return Split(dataset, train, valid, test, protocol, settings, {k: v for k, v in dropped.items() if v})


Parts = tuple[Interactions, Cases, Cases, dict[str, Any], dict[str, int]]


def _leave_one_out(log: Interactions, min_history: int) -> Parts:
    start, end = log.offsets[:-1], log.offsets[1:]
    fits = (end - start) >= min_history + 2
    user = np.flatnonzero(fits).astype(np.int32)
    s, e = start[fits], end[fits]
    held = np.zeros(len(log), dtype=bool)
    held[e - 1] = held[e - 2] = True
    valid = Cases(log, user, s, e - 2, e - 1)
    test = Cases(log, user, s, e - 1, e)
    short = int(((end > start) & ~fits).sum())
    return log.where(~held), valid, test, {}, {"users too short to ask about (kept in training)": short}


def _ratio(log: Interactions, valid_share: float, test_share: float, min_history: int) -> Parts:
    start, end = log.offsets[:-1], log.offsets[1:]
    lengths = end - start
    n_test = np.maximum(1, np.round(lengths * test_share)).astype(np.int64)
    n_valid = np.maximum(1, np.round(lengths * valid_share)).astype(np.int64)
    fits = lengths - n_test - n_valid >= min_history
    user = np.flatnonzero(fits).astype(np.int32)
    s, e = start[fits], end[fits]
    cut_test = e - n_test[fits]
    cut_valid = cut_test - n_valid[fits]
    boundary = end.copy()
    boundary[fits] = cut_valid
    keep = np.arange(len(log)) < np.repeat(boundary, lengths)
    valid = Cases(log, user, s, cut_valid, cut_test)
    test = Cases(log, user, s, cut_test, e)
    short = int(((lengths > 0) & ~fits).sum())
    settings = {"valid_share": valid_share, "test_share": test_share}
    return log.where(keep), valid, test, settings, {"users too short to ask about (kept in training)": short}


def _temporal(log: Interactions, valid_share: float, test_share: float) -> Parts:
    if log.time is None:
        raise DataError("a temporal split needs times and the log has none", hint="use leave-one-out or ratio")
    ordered = np.sort(log.time)
    cut_valid = int(ordered[int(len(log) * (1 - test_share - valid_share))])
    cut_test = int(ordered[int(len(log) * (1 - test_share))])
    if not ordered[0] < cut_valid < cut_test:
        raise DataError(
            "the log's times are too coarse for a temporal split: too many events share one moment",
            hint="use leave-one-out or ratio",
        )
    start, end = log.offsets[:-1], log.offsets[1:]

    times = log.time

    def first_at_or_after(moment: int) -> NDArray[np.int64]:
        late = np.concatenate([np.zeros(1, np.int64), np.cumsum(times >= moment, dtype=np.int64)])
        return end - (late[end] - late[start])

    at_valid, at_test = first_at_or_after(cut_valid), first_at_or_after(cut_test)
    train = log.where(log.time < cut_valid)
    seen = train.lengths > 0
    codes = np.where(seen, np.arange(log.n_users), -1).astype(np.int32)
    ask_valid, ask_test = (at_test > at_valid) & (at_valid > start), (end > at_test) & (at_test > start)
    no_history = int(((at_valid == start) & (at_test > at_valid)).sum() + ((at_test == start) & (end > at_test)).sum())
    valid = Cases(log, codes[ask_valid], start[ask_valid], at_valid[ask_valid], at_test[ask_valid])
    test = Cases(log, codes[ask_test], start[ask_test], at_test[ask_test], end[ask_test])
    settings = {"valid_share": valid_share, "test_share": test_share, "valid_from": cut_valid, "test_from": cut_test}
    return train, valid, test, settings, {"users with no history before the cut": no_history}


def _session(log: Interactions, valid_share: float, test_share: float) -> Parts:
    start, end = log.offsets[:-1], log.offsets[1:]
    sessions = np.flatnonzero(end > start)
    if log.time is not None:
        sessions = sessions[np.argsort(log.time[start[sessions]], kind="stable")]
    n_test, n_valid = (max(1, round(len(sessions) * share)) for share in (test_share, valid_share))
    if len(sessions) < n_test + n_valid + 1:
        raise DataError(f"the log has {len(sessions)} sessions; a session split needs at least 3")
    cut = len(sessions) - n_test
    in_train = np.zeros(log.n_users, dtype=bool)
    in_train[sessions[: cut - n_valid]] = True
    train = log.where(np.repeat(in_train, end - start))

    def cases(chosen: NDArray[np.int64]) -> Cases:
        chosen = np.sort(chosen)
        stop, _ = flat_rows(start[chosen] + 1, end[chosen])
        first = np.repeat(start[chosen], np.maximum(end[chosen] - start[chosen] - 1, 0))
        return Cases(log, np.full(len(stop), -1, np.int32), first, stop, stop + 1)

    single = int((end - start == 1).sum())
    valid, test = cases(sessions[cut - n_valid : cut]), cases(sessions[cut:])
    settings = {"valid_share": valid_share, "test_share": test_share}
    return train, valid, test, settings, {"sessions of one event (nothing to ask)": single}


def _users(log: Interactions, valid_share: float, test_share: float) -> Parts:
    start, end = log.offsets[:-1], log.offsets[1:]
    users = np.random.default_rng(0).permutation(np.flatnonzero(end > start))
    n_test, n_valid = (max(1, round(len(users) * share)) for share in (test_share, valid_share))
    if len(users) < n_test + n_valid + 1:
        raise DataError(f"the log has {len(users)} users; a split of users needs at least 3")
    held = np.zeros(log.n_users, dtype=bool)
    held[users[: n_test + n_valid]] = True
    train = log.where(np.repeat(~held, end - start))
    short = 0

    def cases(chosen: NDArray[np.int64]) -> Cases:
        nonlocal short
        tail = np.floor(TAIL * (end - start)[chosen] + 1e-9).astype(np.int64)
        short += int((tail == 0).sum())
        chosen, tail = np.sort(chosen[tail > 0]), tail[tail > 0][np.argsort(chosen[tail > 0])]
        return Cases(log, np.full(len(chosen), -1, np.int32), start[chosen], end[chosen] - tail, end[chosen])

    test, valid = cases(users[:n_test]), cases(users[n_test : n_test + n_valid])
    settings = {"valid_share": valid_share, "test_share": test_share, "tail": TAIL}
    return train, valid, test, settings, {"held-out users with fewer than 5 events (left out)": short}


def _why_short(log: Interactions) -> str:
    longest = int(log.lengths.max(initial=0))
    return f"{log.n_users} users with at most {longest} events each"


def check_leaks(made: Split) -> None:
    """Verify, against the log itself, that nothing asked for was trained on and that no case looks ahead.

    For every protocol: a user's training rows are that user's first rows of the log, unchanged; no row that is asked
    for, in validation or test, is among them; a case's history lies within its user's rows and directly before what is
    asked; no row is asked for twice; and `Cases.user` names the user exactly where training has rows of that user.
    `leave-one-out` asks for single rows, in test the last of each user. `temporal` trains on nothing as late as the
    validation cut, and asks in validation for rows between the two cuts, in test for rows after the second.
    `session` and `users` train on no row of what is asked for, and (with times) on none that began after one that is asked for.

    Raises:
        DataError: one of these fails; the message names the part and the user.
    """
    log, train = made.dataset.interactions, made.train
    _check_training(log, train)
    asked: dict[str, NDArray[np.int64]] = {}
    for name, cases in (("validation", made.valid), ("test", made.test)):
        owner = np.searchsorted(log.offsets, cases.start.clip(0, len(log) - 1), side="right") - 1

        def refuse(bad: NDArray[np.bool_], what: str, name: str = name, owner: NDArray[Any] = owner) -> None:
            if bool(bad.any()):
                raise DataError(f"{name} {what}", where=f"user {log.users.id(int(owner[np.flatnonzero(bad)[0]]))!r}")

        inside = (cases.start >= 0) & (cases.start <= cases.stop) & (cases.stop < cases.target_stop)
        refuse(~inside | (cases.target_stop > log.offsets[owner + 1]), "asks for rows outside its user's history")
        trained = train.lengths[owner]
        refuse(cases.stop < log.offsets[owner] + trained, "asks for rows that were trained on")
        refuse(
            cases.user != np.where(trained > 0, owner, -1), "names a user who was not trained on, or does not name one"
        )
        asked[name], _ = flat_rows(cases.stop, cases.target_stop)
        refuse(np.full(1, len(np.unique(asked[name])) < len(asked[name])), "asks for a row twice")
        if made.protocol == "leave-one-out":
            refuse(cases.target_stop - cases.stop != 1, "asks for more than one row")
            if name == "test":
                refuse(cases.target_stop != log.offsets[owner + 1], "does not ask for the last row")
        if made.protocol in ("session", "users"):
            refuse(trained > 0, f"asks for a {made.protocol.rstrip('s')} that was trained on")
    if len(np.intersect1d(asked["validation"], asked["test"])):
        raise DataError("validation and test ask for the same rows")
    if made.protocol == "temporal":
        _check_order(log, made, asked)
    if made.protocol == "session" and log.time is not None:
        begun = log.time[np.minimum(log.offsets[:-1], len(log) - 1)]
        last_trained = int(begun[train.lengths > 0].max())
        for name, cases in (("validation", made.valid), ("test", made.test)):
            if bool((log.time[cases.start] < last_trained).any()):
                raise DataError(f"{name} asks for a session that began before one that was trained on")


def _check_training(log: Interactions, train: Interactions) -> None:
    """A user's training rows must be that user's first rows of the log, in every column."""
    if train.users != log.users or train.items != log.items:
        raise DataError("training numbers users or items otherwise than the log")
    bad = train.lengths > log.lengths
    if not bool(bad.any()):
        rows, _ = flat_rows(log.offsets[:-1], log.offsets[:-1] + train.lengths)
        differs = train.item != log.item[rows]
        for name in OPTIONAL:
            ours, theirs = getattr(train, name), getattr(log, name)
            if (ours is None) != (theirs is None):
                raise DataError(f"training and the log do not both have the column {name!r}")
            if ours is not None:
                differs |= ours != theirs[rows]
        bad = np.bincount(train.user[differs], minlength=log.n_users) > 0
    if bool(bad.any()):
        user = log.users.id(int(bad.argmax()))
        raise DataError("training rows are not the first rows of their user in the log", where=f"user {user!r}")


def _check_order(log: Interactions, made: Split, asked: Mapping[str, NDArray[np.int64]]) -> None:
    """The two moments of a temporal split part training, validation and test."""
    assert log.time is not None and made.train.time is not None
    first, second = int(made.settings["valid_from"]), int(made.settings["test_from"])
    for name, times, low, high in (
        ("training", made.train.time, None, first),
        ("validation", log.time[asked["validation"]], first, second),
        ("test", log.time[asked["test"]], second, None),
    ):
        if (low is not None and bool((times < low).any())) or (high is not None and bool((times >= high).any())):
            raise DataError(f"a {name} row lies on the wrong side of a cut", where=f"cuts at {first} and {second}")
