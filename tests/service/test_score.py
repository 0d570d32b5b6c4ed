from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from small_runs import small_data, small_run

from vouch import Dataset, Interactions, load
from vouch.cli.main import main
from vouch.data import Queries
from vouch.errors import ConfigError, StorageError, UnknownIdError, VouchError
from vouch.service import offline
from vouch.service.engine import Engine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("score") / "run", "sasrec")


@pytest.mark.parametrize("rows", [1 << 19, 23])
def test_rows_are_the_recommendations(run: Path, tmp_path: Path, monkeypatch: Any, rows: int) -> None:
    """In one block or in many."""
    monkeypatch.setattr(offline, "ROWS", rows)
    done: list[int] = []
    found = offline.score(run, tmp_path / "recs.parquet", k=7, tell=lambda at, total: done.append(at))
    frame = pl.read_parquet(tmp_path / "recs.parquet")
    model, data = load(run / "model"), Dataset.open(run / "data")
    users = np.arange(60)
    ranking = model.recommend(Queries.from_users(data.interactions, users), 7)
    assert frame.columns == ["user", "rank", "item", "score", "fallback"]
    assert frame["user"].to_list() == [u for u in data.interactions.users.ids(users) for _ in range(7)]
    assert frame["rank"].to_list() == list(range(1, 8)) * 60
    assert frame["item"].to_list() == data.interactions.items.ids(ranking.item)
    np.testing.assert_allclose(frame["score"].to_numpy(), ranking.score.ravel(), rtol=1e-4, atol=1e-5)
    assert not frame["fallback"].any()
    assert (found.users, found.rows, found.fallback) == (60, 420, 0)
    assert done[-1] == 60 and len(done) == (1 if rows > 1_000 else 20)
    assert [file.name for file in tmp_path.iterdir()] == ["recs.parquet"]


def test_chosen_users_in_their_order(run: Path, tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_text("u7\n\nu3\n")
    assert (
        main(["score", str(run), "--users", str(tmp_path / "users.txt"), "-k", "2", "-o", str(tmp_path / "r.parquet")])
        == 0
    )
    assert pl.read_parquet(tmp_path / "r.parquet")["user"].to_list() == ["u7", "u7", "u3", "u3"]


def test_users_without_history_get_what_is_popular_and_numbers_stay_numbers(tmp_path: Path) -> None:
    log = Interactions.from_arrays([1, 1, 1, 2, 2, 2, 3, 3, 3], [10, 20, 30, 10, 20, 40, 20, 30, 50], time=range(9))
    empty = log.where(log.user != 2)  # the user stays in the vocabulary
    path = small_run(tmp_path / "run", "itemknn", Dataset.of(empty))
    found = offline.score(path, tmp_path / "r.parquet", k=100)
    frame = pl.read_parquet(tmp_path / "r.parquet")
    assert frame.schema["user"] == frame.schema["item"] == pl.Int64
    assert found.fallback == 1
    assert frame.filter("fallback")["user"].unique().to_list() == [3]
    assert frame.filter(pl.col("user") == 1)["item"].to_list() == [40, 50][: frame.filter(pl.col("user") == 1).height]
    assert frame.filter(pl.col("user") == 3)["item"].to_list()[:2] == [10, 20]  # all items, as none was seen


def test_memory_does_not_grow_with_the_users(tmp_path: Path) -> None:
    """Ten times the users and rows, about the same memory."""
    peaks = []
    for name, users in (("few", 300), ("many", 3_000)):
        path = small_run(tmp_path / name, "popularity", small_data(None, users))
        offline_rows, offline.ROWS = offline.ROWS, 1 << 11
        try:
            tracemalloc.start()
            offline.score(path, tmp_path / f"{name}.parquet", k=30)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
            offline.ROWS = offline_rows
    assert peaks[1] < 2 * peaks[0]


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recs\.csv"):
        offline.score(run, tmp_path / "recs.csv")
    with pytest.raises(ConfigError, match="k is 0"):
        offline.score(run, tmp_path / "recs.parquet", k=0)
    with pytest.raises(StorageError, match="cannot be read"):
        offline.score(run, tmp_path / "recs.parquet", users=tmp_path / "none.txt")
    (tmp_path / "users.txt").write_text("u1\nnobody\n")
    with pytest.raises(UnknownIdError, match="line 2"):
        offline.score(run, tmp_path / "recs.parquet", users=tmp_path / "users.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="names no user"):
        offline.score(run, tmp_path / "recs.parquet", users=tmp_path / "empty.txt")
    with pytest.raises(VouchError):
        offline.score(tmp_path / "no-run", tmp_path / "recs.parquet")
    assert not (tmp_path / "recs.parquet").exists()


def test_nothing_half_written_is_left_when_it_fails(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(offline, "ROWS", 23)
    calls = iter(range(100))
    whole = Engine.search

    def fails(self: Engine, *args: Any) -> Any:
        if next(calls) == 5:
            raise MemoryError
        return whole(self, *args)

    monkeypatch.setattr(Engine, "search", fails)
    with pytest.raises(MemoryError):
        offline.score(run, tmp_path / "recs.parquet", k=7)
    assert list(tmp_path.iterdir()) == []


def test_on_a_cluster_it_is_the_same(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """On Ray where it is installed."""
    pytest.importorskip("ray")
    monkeypatch.setattr(offline, "ROWS", 70)
    offline.score(run, tmp_path / "here.parquet", k=7)
    offline.score(run, tmp_path / "there.parquet", k=7, ray="local")
    assert pl.read_parquet(tmp_path / "here.parquet").equals(pl.read_parquet(tmp_path / "there.parquet"))


def test_blocks_given_to_a_cluster_come_back_in_order(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With threads in place of a cluster, and fewer given ahead than there are."""
    from concurrent.futures import ThreadPoolExecutor

    from vouch.compare import on_ray

    monkeypatch.setattr(on_ray, "RayExecutor", lambda address: ThreadPoolExecutor(2))
    monkeypatch.setattr(offline, "ROWS", 23)
    monkeypatch.setattr(offline, "AHEAD", 3)
    offline.score(run, tmp_path / "here.parquet", k=7)
    offline.score(run, tmp_path / "there.parquet", k=7, ray="local")
    assert pl.read_parquet(tmp_path / "here.parquet").equals(pl.read_parquet(tmp_path / "there.parquet"))
