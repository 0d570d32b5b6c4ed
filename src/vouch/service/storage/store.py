"""The store: plain methods over the tables. All of them block; `submit` alone gives a future."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy import delete, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from vouch.service.batching import Batcher
from vouch.service.schemas import MAX_HISTORY
from vouch.service.storage.database import Database, Unavailable, database
from vouch.service.storage.migrations import migrate
from vouch.service.storage.models import AuditRow, Base, EventRow, FeedbackRow, ItemRow, KeyTable, SettingRow

__all__ = ["Appended", "CatalogChange", "Erased", "KeyRow", "Store", "Unavailable"]

ROWS_A_STATEMENT = 500
USERS_A_STATEMENT = 64


@dataclass(frozen=True)
class Appended:
    """What became of an append: rows stored now, and rows whose id was there before."""

    accepted: int
    duplicates: int


@dataclass(frozen=True)
class CatalogChange:
    """What the service was told of an item. An attribute that is None was taken away."""

    item: str
    title: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    deleted: bool = False


@dataclass(frozen=True)
class KeyRow:
    """A stored API key."""

    id: str
    name: str
    role: str
    hash: str
    created: int


@dataclass(frozen=True)
class Erased:
    """How many rows of a user were erased."""

    events: int
    feedback: int


@dataclass(frozen=True)
class _Append:
    """Rows of one request, for one transaction with those of others."""

    events: Sequence[Mapping[str, Any]]
    feedback: Sequence[Mapping[str, Any]] = ()


class Store:
    """What the service remembers.

    Every method raises `Unavailable` while the database is gone, busy or full, and works again once it is back.
    Text must hold no NUL character (the requests' schemas see to that).
    """

    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = db, clock
        # A commit costs a flush to disk however much it holds: appends that wait share the next one.
        self._writer: Batcher[_Append, Appended] = Batcher(
            self._append_all,
            name="vouch-writer",
            most=5_000,
            waiting=50_000,
            size=lambda job: len(job.events) + len(job.feedback),
            shared=Unavailable,
        )

    @classmethod
    def open(cls, url: str, *, wait_seconds: float = 5.0, clock: Callable[[], float] = time.time) -> Self:
        """Connect, and bring the tables up to date; several processes may do so at once.

        Raises:
            ConfigError: the URL cannot be used. StorageError: the database cannot be reached or is newer.
        """
        db = database(url, wait_seconds=wait_seconds)
        try:
            with db.write() as connection:
                migrate(connection)
        except BaseException:
            db.close()
            raise
        return cls(db, clock)

    def close(self) -> None:
        """Commit what was accepted and disconnect."""
        self._writer.close()
        self._db.close()

    def ping(self) -> None:
        """Raise `Unavailable` unless the tables can be read."""
        with self._db.read() as connection:
            connection.execute(select(SettingRow.value).where(SettingRow.name == "catalog")).one()

    # Events and feedback ----------------------------------------------------------------------------------------

    def submit_events(self, events: Sequence[Mapping[str, Any]]) -> Future[Appended]:
        """Append events (keys as in `schemas.Event`); the future is done once they are on disk.

        The first event of an id counts: later ones change nothing.
        """
        return self._writer.submit(_Append([self._event(event) for event in events]))

    def append_events(self, events: Sequence[Mapping[str, Any]]) -> Appended:
        """`submit_events`, and wait."""
        return self.submit_events(events).result()

    def submit_feedback(self, feedback: Mapping[str, Any]) -> Future[Appended]:
        """Keep what a user thinks of an item; a like is an event as well."""
        row = {
            "id": feedback["id"],
            "user_id": feedback["user"],
            "item_id": feedback["item"],
            "kind": feedback["kind"],
            "time": int(self._clock()),
        }
        liked = [self._event({**feedback, "id": f"feedback:{feedback['id']}"})] if feedback["kind"] == "like" else []
        return self._writer.submit(_Append(liked, [row]))

    def histories(self, users: Iterable[str], most: int = MAX_HISTORY) -> dict[str, list[str]]:
        """The items of each user's latest events, oldest first."""
        return self.past(users, most)[0]

    def past(self, users: Iterable[str], most: int = MAX_HISTORY) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """`histories`, and the items each user disliked and did not like again since."""
        wanted = list(dict.fromkeys(users))
        with self._db.read() as connection:
            events = _latest(connection, "events", wanted, most)
            feedback = _latest(connection, "feedback", wanted, most)
        histories = {user: [item for item, _ in rows] for user, rows in events.items()}
        # Of an item the latest feedback counts.
        hidden = {
            user: [item for item, kind in dict(rows).items() if kind == "dislike"] for user, rows in feedback.items()
        }
        return histories, hidden

    def erase(self, user: str) -> Erased:
        """Forget a user."""
        with self._db.write() as connection:
            return Erased(
                connection.execute(delete(EventRow).where(EventRow.user_id == user)).rowcount,
                connection.execute(delete(FeedbackRow).where(FeedbackRow.user_id == user)).rowcount,
            )

    def count_events(self) -> int:
        """How many events are stored."""
        with self._db.read() as connection:
            return connection.execute(select(sa.func.count()).select_from(EventRow)).scalar_one()

    def _event(self, event: Mapping[str, Any]) -> dict[str, Any]:
        moment = event.get("time")
        return {
            "id": event["id"],
            "user_id": event["user"],
            "item_id": event["item"],
            "kind": event.get("kind") or "view",
            "time": int(self._clock()) if moment is None else moment,
            "value": event.get("value"),
            "scenario": event.get("scenario"),
            "domain": event.get("domain"),
        }

    def _append_all(self, jobs: Sequence[_Append]) -> list[Appended]:
        with self._db.write() as connection:
            stored_events = _insert_new(connection, EventRow, [row for job in jobs for row in job.events])
            stored_feedback = _insert_new(connection, FeedbackRow, [row for job in jobs for row in job.feedback])
        results = []
        for job in jobs:  # of rows with one id the first is the one that was stored
            rows = job.feedback or job.events
            stored = stored_feedback if job.feedback else stored_events
            accepted = 0
            for row in rows:
                if row["id"] in stored:
                    stored.discard(row["id"])
                    accepted += 1
            results.append(Appended(accepted, len(rows) - accepted))
        return results

    # Catalogue --------------------------------------------------------------------------------------------------

    def upsert_items(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add or change items (keys as in `schemas.ItemUpsert`); what is not named keeps its value."""
        with self._db.write() as connection:
            version = _next_version(connection)
            for item in items:
                row = connection.execute(
                    select(ItemRow.title, ItemRow.attributes).where(ItemRow.id == item["id"])
                ).one_or_none()
                values = {
                    "title": item.get("title") if item.get("title") is not None else row.title if row else None,
                    "attributes": {**(row.attributes if row else {}), **item.get("attributes", {})},
                    "deleted": False,
                    "version": version,
                }
                _put(connection, ItemRow, {"id": item["id"]}, values)

    def delete_item(self, item: str) -> bool:
        """Take an item out of every answer; whether it was not deleted already."""
        with self._db.write() as connection:
            row = connection.execute(select(ItemRow.deleted).where(ItemRow.id == item)).one_or_none()
            if row is not None and row.deleted:
                return False
            version = _next_version(connection)
            if row is None:
                values: dict[str, Any] = {"title": None, "attributes": {}, "deleted": True, "version": version}
                _put(connection, ItemRow, {"id": item}, values)
            else:
                connection.execute(update(ItemRow).where(ItemRow.id == item).values(deleted=True, version=version))
            return True

    def catalog_since(self, version: int) -> tuple[int, list[CatalogChange]]:
        """The catalogue's version, and the items that changed after `version`."""
        with self._db.read() as connection:
            now = connection.execute(select(SettingRow.value).where(SettingRow.name == "catalog")).scalar_one()
            if now == version:
                return now, []
            rows = connection.execute(
                select(ItemRow.id, ItemRow.title, ItemRow.attributes, ItemRow.deleted).where(
                    ItemRow.version > version, ItemRow.version <= now
                )
            )
            return now, [CatalogChange(*row) for row in rows]

    # Keys, audits, settings -------------------------------------------------------------------------------------

    def add_key(self, key: KeyRow) -> None:
        """Keep a key."""
        with self._db.write() as connection:
            connection.execute(sa.insert(KeyTable).values(key.__dict__))

    def find_key(self, id: str) -> KeyRow | None:
        """The key of an id."""
        with self._db.read() as connection:
            row = connection.execute(select(KeyTable.__table__).where(KeyTable.id == id)).one_or_none()
            return None if row is None else KeyRow(**row._mapping)

    def list_keys(self) -> list[KeyRow]:
        """All keys, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute(select(KeyTable.__table__).order_by(KeyTable.created, KeyTable.id))
            return [KeyRow(**row._mapping) for row in rows]

    def remove_key(self, id: str) -> bool:
        """Take a key away; whether there was one."""
        with self._db.write() as connection:
            return connection.execute(delete(KeyTable).where(KeyTable.id == id)).rowcount > 0

    def put_audit(self, fingerprint: str, slot: str, summary: str, result: Mapping[str, Any]) -> None:
        """Keep the result of an audit of a model, in place of an earlier one."""
        values = {"summary": summary, "result": dict(result), "time": int(self._clock())}
        with self._db.write() as connection:
            _put(connection, AuditRow, {"fingerprint": fingerprint, "slot": slot}, values)

    def audits(self, fingerprint: str) -> dict[str, dict[str, Any]]:
        """The audits of a model, by slot."""
        with self._db.read() as connection:
            rows = connection.execute(select(AuditRow.__table__).where(AuditRow.fingerprint == fingerprint))
            return {row.slot: {"summary": row.summary, "result": row.result, "time": row.time} for row in rows}

    def setting(self, name: str) -> Any:
        """A shared fact, or None."""
        with self._db.read() as connection:
            return connection.execute(select(SettingRow.value).where(SettingRow.name == name)).scalar_one_or_none()

    def put_setting(self, name: str, value: Any) -> None:
        """Keep a shared fact."""
        with self._db.write() as connection:
            _put(connection, SettingRow, {"name": name}, {"value": value})


def _upsert(connection: sa.Connection, table: type[Base]) -> Any:
    """INSERT with ON CONFLICT, which the two databases spell alike and SQLAlchemy keeps apart."""
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def _put(connection: sa.Connection, table: type[Base], key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    insert = _upsert(connection, table).values(**key, **values)
    connection.execute(insert.on_conflict_do_update(index_elements=list(key), set_=values))


def _insert_new(connection: sa.Connection, table: Any, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Insert the rows whose id is new, in their order; the ids stored."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault(row["id"], row)
    stored: set[str] = set()
    fresh = list(first.values())
    for start in range(0, len(fresh), ROWS_A_STATEMENT):
        insert = _upsert(connection, table).on_conflict_do_nothing(index_elements=["id"]).returning(table.id)
        stored.update(connection.execute(insert, fresh[start : start + ROWS_A_STATEMENT]).scalars())
    return stored


def _next_version(connection: sa.Connection) -> int:
    """Count the catalogue's version up; holds the row's lock until the commit, so versions appear in order."""
    catalog = SettingRow.name == "catalog"
    version = connection.execute(select(SettingRow.value).where(catalog).with_for_update()).scalar_one() + 1
    connection.execute(update(SettingRow).where(catalog).values(value=version))
    return version


def _latest(connection: sa.Connection, table: str, users: Sequence[str], most: int) -> dict[str, list[tuple[str, str]]]:
    """The item and kind of each user's latest rows, oldest first."""
    found: dict[str, list[tuple[str, str]]] = {user: [] for user in users}
    for start in range(0, len(users), USERS_A_STATEMENT):
        some = users[start : start + USERS_A_STATEMENT]
        values = {f"u{place}": user for place, user in enumerate(some)} | {"most": most}
        for _, user, item, kind in connection.execute(_latest_rows(table, len(some)), values):
            found[user].append((item, kind))
    return {user: rows[::-1] for user, rows in found.items()}


@functools.cache
def _latest_rows(table: str, users: int) -> sa.TextClause:
    """The latest rows of each of some users, newest first: one index range a user, however many rows they have."""
    parts = [
        f"SELECT * FROM (SELECT seq, user_id, item_id, kind FROM {table} WHERE user_id = :u{place} "
        f"ORDER BY seq DESC LIMIT :most) AS t{place}"
        for place in range(users)
    ]
    return text(" UNION ALL ".join(parts) + " ORDER BY 1 DESC")
