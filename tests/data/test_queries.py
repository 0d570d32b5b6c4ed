"""Queries: histories as slices, original ids resolved, blocks that lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vouch.data import Interactions, Queries, Query
from vouch.data.queries import flat_rows, right_aligned
from vouch.errors import ConfigError, UnknownIdError

LOG = Interactions.from_arrays(
    ["ann", "ann", "bob", "ann", "cat"],
    ["x", "y", "x", "z", "z"],
    time=[10, 20, 30, 40, 50],
    scenario=["web", "app", "web", "web", "app"],
    domain=["home", "home", "home", "garden", "home"],
)
HISTORIES = st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=8)


def resolve(*queries: Query, log: Interactions | None = LOG) -> Queries:
    return Queries.resolve(queries, users=LOG.users, items=LOG.items, log=log)


@given(HISTORIES)
def test_histories_come_back_as_they_went_in(histories: list[list[int]]) -> None:
    queries = Queries.from_histories(histories, times=[[7] * len(history) for history in histories])
    assert len(queries) == len(histories)
    assert [queries.history(row).tolist() for row in range(len(queries))] == histories
    assert queries.lengths.tolist() == [len(history) for history in histories]
    assert (queries.user == -1).all()
    assert queries.item_time is not None and queries.item_time.tolist() == [7] * sum(map(len, histories))


@given(HISTORIES, st.integers(1, 5))
def test_blocks_are_the_whole_in_order(histories: list[list[int]], size: int) -> None:
    times = [list(range(len(history))) for history in histories]
    queries = Queries.from_histories(histories, user=np.arange(len(histories)), times=times)
    found, users, ages = [], [], []
    for start, block in queries.blocks(size):
        assert start == len(found)
        assert 0 < len(block) <= size
        found += [block.history(row).tolist() for row in range(len(block))]
        users += block.user.tolist()
        ages += block.item_time.tolist()
    assert found == histories
    assert users == list(range(len(histories)))
    assert ages == [age for row in times for age in row]


@given(HISTORIES, st.integers(1, 8))
def test_last_is_right_aligned(histories: list[list[int]], length: int) -> None:
    dense = Queries.from_histories(histories).last(length)
    width = max([1, *(min(length, len(history)) for history in histories)])
    assert dense.shape == (len(histories), width)
    assert dense.tolist() == [[-1] * (width - len(kept)) + kept for kept in (history[-width:] for history in histories)]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=8))
def test_flat_rows_are_the_slices_end_to_end(slices: list[tuple[int, int]]) -> None:
    start = np.array([low for low, _ in slices], dtype=np.int64)
    stop = start + np.array([size for _, size in slices], dtype=np.int64)
    rows, offsets = flat_rows(start, stop)
    assert rows.tolist() == [row for low, size in slices for row in range(low, low + size)]
    assert np.diff(offsets).tolist() == [size for _, size in slices]


def test_right_aligned_of_nothing_is_padding() -> None:
    assert right_aligned(np.zeros(0, np.int32), np.array([0]), np.array([0]), 3, fill=-1).tolist() == [[-1]]


def test_users_of_the_log_bring_their_history_and_times() -> None:
    queries = Queries.from_users(LOG, np.array([0, 2]))
    assert [LOG.items.ids(queries.history(row)) for row in range(2)] == [["x", "y", "z"], ["z"]]
    assert queries.item_time is not None and queries.item_time.tolist() == [10, 20, 40, 50]


def test_resolving_known_users_and_bare_histories() -> None:
    found = resolve(
        Query(user="ann"), Query(history=["z", "x"], times=[1, 2]), Query(user="bob", history=["y"], times=[5])
    )
    assert found.user.tolist() == [0, -1, 1]
    assert [LOG.items.ids(found.history(row)) for row in range(3)] == [["x", "y", "z"], ["z", "x"], ["y"]]
    assert found.item_time is not None and found.item_time.tolist() == [10, 20, 40, 1, 2, 5]
    assert found.scenario is None and found.time is None
    assert resolve(Query(user="ann"), Query(history=["z"])).item_time is None  # not all have times
    assert resolve(Query(user="stranger", history=["z"])).user.tolist() == [-1]
    assert len(resolve()) == 0


def test_moment_scenario_and_domain_are_carried() -> None:
    found = resolve(
        Query(user="ann", time=99, scenario="web", domain="garden"), Query(user="bob", time=98, domain="home")
    )
    assert found.time is not None and found.time.tolist() == [99, 98]
    assert found.scenario is not None and found.scenario.tolist() == [LOG.labels["scenario"].index("web"), -1]
    assert found.domain is not None
    assert [LOG.labels["domain"][code] for code in found.domain] == ["garden", "home"]
    assert resolve(Query(user="ann", time=99), Query(user="bob")).time is None


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (Query(), ConfigError, "needs a user or a history"),
        (Query(user="dan"), UnknownIdError, "no user 'dan'"),
        (Query(history=["w"]), UnknownIdError, "no item 'w'"),
        (Query(history=["x"], times=[1, 2]), ConfigError, "2 times for 1 history"),
        (Query(user="ann", scenario="wep"), UnknownIdError, "no scenario 'wep'"),
        (Query(user="ann", domain="attic"), UnknownIdError, "no domain 'attic'"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(query: Query, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(query)


def test_a_known_user_without_a_log_is_refused() -> None:
    with pytest.raises(ConfigError, match="not at hand"):
        resolve(Query(user="ann"), log=None)
    with pytest.raises(ConfigError, match="3 times for 2"):
        Queries.from_histories([[1], [2]], times=[[1], [2, 3]])
