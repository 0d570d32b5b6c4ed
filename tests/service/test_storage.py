"""The store, on SQLite and on a real PostgreSQL server: the same tests."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from vouch.errors import ConfigError, StorageError
from vouch.service.storage import Appended, CatalogChange, KeyRow, Store, Unavailable
from vouch.service.storage.database import database
from vouch.service.storage.models import Base

HOSTILE = [
    "'; DROP TABLE events; --",
    '<script>alert("x")</script>',
    "Robert\"); DELETE FROM items WHERE ('1'='1",
    "%s %(name)s :u0 ? {0} \\",
    "日本語 🛍 ﷽ \u202e right to left",
    " leading and trailing ",
    "é is not é",
]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'a folder' / 'service.db'}"
    return request.getfixturevalue("postgres").empty()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store.open(url, wait_seconds=2)
    yield opened
    opened.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "service.db"


@pytest.fixture
def on_file(file: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{file}", wait_seconds=0.3)
    yield opened
    opened.close()


def event(id: object, user: str = "u", item: str = "i", **more: Any) -> dict[str, Any]:
    return {"id": str(id), "user": user, "item": item, **more}


def open_and_close(url: str) -> None:
    store = Store.open(url)
    store.ping()
    store.close()


# Events -------------------------------------------------------------------------------------------------------------


def test_an_event_is_stored_once_whatever_is_sent_again(store: Store) -> None:
    assert store.append_events([event(1, item="a"), event(2, item="b"), event(1, item="c")]) == Appended(2, 1)
    assert store.append_events([event(2, item="d"), event(3, item="e")]) == Appended(1, 1)
    assert store.histories(["u"]) == {"u": ["a", "b", "e"]}
    assert store.count_events() == 3


def test_many_at_once_with_the_same_ids_store_each_once(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: store.append_events([event(k) for k in range(n % 4, 30)]), range(40)))
    assert sum(each.accepted for each in done) == store.count_events() == 30
    assert sum(each.accepted + each.duplicates for each in done) == sum(30 - n % 4 for n in range(40))


def test_two_processes_share_a_database(store: Store, url: str) -> None:
    other = Store.open(url)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: [store.append_events([event(f"a{k}", item=f"a{k}")]) for k in range(20)])
        second = pool.submit(lambda: [other.append_events([event(f"b{k}", item=f"b{k}")]) for k in range(20)])
        first.result(), second.result()
    seen = other.histories(["u"])["u"]
    assert seen == store.histories(["u"])["u"]
    assert [item for item in seen if item[0] == "a"] == [f"a{k}" for k in range(20)]
    assert [item for item in seen if item[0] == "b"] == [f"b{k}" for k in range(20)]
    other.close()


def test_a_history_holds_the_latest_oldest_first_of_many_users(store: Store) -> None:
    users = [f"u{n}" for n in range(150)]  # more than one statement asks for
    store.append_events([event(f"{user}-{k}", user, f"{user}-{k}") for k in range(4) for user in users])
    found = store.histories([*users, "nobody", users[0]], most=3)
    assert set(found) == {*users, "nobody"}
    assert found["nobody"] == []
    assert all(found[user] == [f"{user}-{k}" for k in (1, 2, 3)] for user in users)
    assert store.histories([]) == {}


def test_a_clock_that_goes_backwards_changes_no_order(url: str) -> None:
    moments = iter([2_000, 1_000, 3_000, 0])
    store = Store.open(url, clock=lambda: next(moments))
    for item in "abcd":
        store.append_events([event(item, item=item)])
    assert store.histories(["u"])["u"] == list("abcd")
    store.append_events([event("e", item="e", time=5)])  # a late one, by the sender's clock, still comes last
    assert store.histories(["u"])["u"] == list("abcde")
    store.close()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_comes_back_as_it_was_sent(store: Store, text: str) -> None:
    row = {"id": text, "user": text, "item": text, "kind": text, "scenario": text, "domain": text, "value": 0.1}
    assert store.append_events([row]) == Appended(1, 0)
    assert store.append_events([row]) == Appended(0, 1)
    assert store.histories([text]) == {text: [text]}
    store.submit_feedback({"id": text, "user": text, "item": text, "kind": "dislike"}).result(5)
    assert store.past([text])[1] == {text: [text]}
    store.upsert_items([{"id": text, "title": text, "attributes": {text: [text]}}])
    assert store.catalog_since(0)[1] == [CatalogChange(text, text, {text: [text]})]
    store.put_audit("f", "attack", text, {text: text})
    assert store.audits("f")["attack"]["result"] == {text: text}
    store.add_key(KeyRow("k", text, "read", "h", 0))
    assert store.find_key(text) is None
    assert store.list_keys()[0].name == text
    assert store.erase(text).events == 1
    assert store.count_events() == 0


# Feedback -----------------------------------------------------------------------------------------------------------


def test_of_feedback_the_latest_counts_and_a_like_is_an_event(store: Store) -> None:
    def say(id: str, item: str, kind: str) -> Appended:
        return store.submit_feedback({"id": id, "user": "u", "item": item, "kind": kind}).result(5)

    assert say("1", "a", "dislike") == Appended(1, 0)
    assert say("2", "b", "like") == Appended(1, 0)
    assert say("2", "b", "like") == Appended(0, 1)
    assert say("3", "c", "dislike") == Appended(1, 0)
    assert store.past(["u", "v"]) == ({"u": ["b"], "v": []}, {"u": ["a", "c"], "v": []})
    say("4", "a", "like")
    assert store.past(["u"]) == ({"u": ["b", "a"]}, {"u": ["c"]})


def test_a_user_is_forgotten_and_only_that_one(store: Store) -> None:
    store.append_events([event(1), event(2), event(3, user="other")])
    store.submit_feedback({"id": "f", "user": "u", "item": "x", "kind": "dislike"}).result(5)
    erased = store.erase("u")
    assert (erased.events, erased.feedback) == (2, 1)
    assert store.past(["u", "other"]) == ({"u": [], "other": ["i"]}, {"u": [], "other": []})


# Catalogue ----------------------------------------------------------------------------------------------------------


def test_catalogue_changes_are_merged_and_told_from_a_version_on(store: Store) -> None:
    assert store.catalog_since(0) == (0, [])
    store.upsert_items([{"id": "a", "title": "A", "attributes": {"price": 1, "tags": ["x"]}}, {"id": "b"}])
    version, changed = store.catalog_since(0)
    assert sorted(each.item for each in changed) == ["a", "b"]
    store.upsert_items([{"id": "a", "title": None, "attributes": {"price": None, "size": True}}])
    now, changed = store.catalog_since(version)
    assert now > version
    assert changed == [CatalogChange("a", "A", {"price": None, "tags": ["x"], "size": True})]
    assert store.catalog_since(now) == (now, [])


def test_a_deleted_item_is_told_and_comes_back(store: Store) -> None:
    assert store.delete_item("a")
    assert not store.delete_item("a")
    version, changed = store.catalog_since(0)
    assert changed == [CatalogChange("a", deleted=True)]
    store.upsert_items([{"id": "a"}])
    assert store.catalog_since(version)[1] == [CatalogChange("a")]


def test_a_reader_of_versions_misses_no_change(store: Store, url: str) -> None:
    other, stop, seen = Store.open(url), threading.Event(), set()

    def follow() -> None:
        version = 0
        while True:
            last = stop.is_set()
            version, changed = other.catalog_since(version)
            seen.update(each.item for each in changed)
            if last:
                return

    reader = threading.Thread(target=follow)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: store.upsert_items([{"id": f"{n}"}]), range(40)))
    stop.set()
    reader.join(10)
    assert seen == {f"{n}" for n in range(40)}
    assert store.catalog_since(0)[0] == 40
    other.close()


# Keys, audits, settings ---------------------------------------------------------------------------------------------


def test_keys_audits_and_settings_are_kept(store: Store, url: str) -> None:
    key = KeyRow("id", "name", "write", "hash", 7)
    store.add_key(key)
    store.put_audit("f", "privacy", "s", {"x": [1, None]})
    store.put_audit("f", "privacy", "t", {"x": 2.5})
    store.put_setting("active", {"run": "a"})
    store.put_setting("active", {"run": "b"})
    again = Store.open(url)
    assert again.find_key("id") == key
    assert again.list_keys() == [key]
    assert again.audits("f")["privacy"]["summary"] == "t"
    assert again.audits("g") == {}
    assert again.setting("active") == {"run": "b"}
    assert again.setting("none") is None
    assert again.remove_key("id")
    assert not again.remove_key("id")
    assert store.find_key("id") is None
    again.close()


# Migrations ---------------------------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables_of_the_models(store: Store) -> None:
    with store._db.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_processes_that_migrate_at_once_all_succeed(url: str) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=open_and_close, args=(url,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    again = Store.open(url)
    assert again.catalog_since(0) == (0, [])  # the first row was put in once
    again.close()


def test_threads_that_migrate_at_once_all_succeed(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for store in pool.map(lambda _: Store.open(url), range(6)):
            store.ping()
            store.close()


def test_tables_of_a_newer_version_are_left_alone(store: Store, url: str) -> None:
    with store._db.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match="newer version"):
        Store.open(url)


# Commits ------------------------------------------------------------------------------------------------------------


def test_appends_that_wait_share_a_commit_and_are_told_after_it(url: str) -> None:
    store = Store.open(url)
    commits = []
    sa.event.listen(store._db.engine, "commit", lambda connection: commits.append(1))
    with store._db.write() as other:  # another writer holds what the append needs
        other.execute(sa.text("UPDATE settings SET value = '0' WHERE name = 'catalog'"))
        if other.dialect.name == "postgresql":
            other.execute(sa.text("LOCK TABLE events IN EXCLUSIVE MODE"))
        futures = [store.submit_events([event(f"{n}")]) for n in range(100)]
        with pytest.raises(NotYet):
            futures[0].result(0.2)
    assert [future.result(10) for future in futures] == [Appended(1, 0)] * 100
    assert len(commits) <= 4  # the other writer's, the first append's, the rest's
    store.close()


def test_closing_stores_what_was_accepted(url: str) -> None:
    store = Store.open(url)
    futures = [store.submit_events([event(f"{n}")]) for n in range(200)]
    store.close()
    assert all(future.result(0).accepted for future in futures)
    again = Store.open(url)
    assert again.count_events() == 200
    again.close()


def test_sqlite_takes_2_000_events_a_second_durably(on_file: Store) -> None:
    with on_file._db.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    begun = time.perf_counter()
    futures = [on_file.submit_events([event(f"{n}-{k}", f"u{k}") for k in range(10)]) for n in range(500)]
    assert all(future.result(30).accepted == 10 for future in futures)
    assert 5_000 / (time.perf_counter() - begun) > 2_000


# Faults -------------------------------------------------------------------------------------------------------------


def test_a_database_file_that_is_taken_away_and_put_back(on_file: Store, file: Path) -> None:
    on_file.append_events([event(1)])
    away = file.with_suffix(".away")
    file.rename(away)
    for attempt in (lambda: on_file.append_events([event(2)]), on_file.ping, lambda: on_file.histories(["u"])):
        with pytest.raises(Unavailable):
            attempt()
    assert not file.exists()  # no empty one took its place
    away.rename(file)
    assert on_file.append_events([event(2, item="j")]) == Appended(1, 0)
    assert on_file.histories(["u"]) == {"u": ["i", "j"]}


def test_a_database_file_that_is_exchanged_is_used_from_then_on(on_file: Store, file: Path, tmp_path: Path) -> None:
    on_file.append_events([event(1, item="old")])
    backup = tmp_path / "backup.db"
    other = Store.open(f"sqlite:///{backup}")
    other.append_events([event(1, item="new")])
    other.close()
    for extra in (f"{file}-wal", f"{file}-shm"):
        Path(extra).unlink(missing_ok=True)
    backup.replace(file)
    assert on_file.histories(["u"]) == {"u": ["new"]}


def test_a_full_disk_refuses_and_loses_nothing_and_recovers(on_file: Store) -> None:
    on_file.append_events([event(0)])
    full = threading.Event()
    full.set()

    @sa.event.listens_for(on_file._db.engine, "begin")
    def _limit(connection: sa.Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2 if full.is_set() else 1 << 30}")

    much = [event(f"n{n}", item="x" * 200) for n in range(500)]
    with pytest.raises(Unavailable, match="full"):
        on_file.append_events(much)
    assert on_file.count_events() == 1  # nothing of it
    full.clear()
    assert on_file.append_events(much) == Appended(500, 0)


def test_a_locked_database_is_busy_not_broken(on_file: Store, file: Path) -> None:
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="busy"):
            on_file.append_events([event(1)])
        assert on_file.histories(["u"]) == {"u": []}  # reading goes on
        other.execute("ROLLBACK")
    other.close()
    assert on_file.append_events([event(1)]) == Appended(1, 0)


def test_a_damaged_database_file_is_told(file: Path) -> None:
    file.write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError):
        Store.open(f"sqlite:///{file}")


def test_a_server_that_stops_and_comes_back(postgres: Any) -> None:
    store = Store.open(postgres.empty(), wait_seconds=2)
    store.append_events([event(1)])
    postgres.stop()
    try:
        with pytest.raises(Unavailable, match="cannot be reached"):
            store.append_events([event(2)])
        with pytest.raises(Unavailable):
            store.ping()
    finally:
        postgres.start()
    assert store.append_events([event(2, item="j")]) == Appended(1, 0)
    assert store.histories(["u"]) == {"u": ["i", "j"]}
    store.close()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("sqlite://", "memory"),
        ("sqlite:///:memory:", "memory"),
        ("mysql://root:hunter2@db/x", "begins with 'mysql'"),
        ("nonsense hunter2", "begins with"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(bad: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        database(bad, wait_seconds=1)
    assert "hunter2" not in told.value.what or "@" not in bad


def test_a_database_that_cannot_be_reached_is_told_without_its_secret() -> None:
    with pytest.raises(Unavailable) as told:
        Store.open("postgresql://me:hunter2@127.0.0.1:1/none", wait_seconds=0.5)
    assert "hunter2" not in str(told.value)
