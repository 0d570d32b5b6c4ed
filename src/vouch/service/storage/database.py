"""Connections: SQLite that survives a killed process and notices a file taken away, or PostgreSQL by URL."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from vouch.errors import ConfigError, StorageError


class Unavailable(StorageError):
    """The database cannot be used at the moment; what was asked may be asked again."""


def database(url: str, *, wait_seconds: float) -> Database:
    """The database of a URL.

    Raises:
        ConfigError: the URL is of another kind, or names a database in memory.
    """
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        parsed = URL.create("none")
    if parsed.drivername.startswith("sqlite"):
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError("a database in memory would lose accepted events", hint="use sqlite:///service.db")
        return SQLite(Path(parsed.database).absolute(), wait_seconds)
    if parsed.drivername.startswith("postgres"):
        return PostgreSQL(parsed.set(drivername="postgresql+psycopg"), wait_seconds)
    raise ConfigError(
        f"the database URL begins with {url.partition(':')[0][:20]!r}",
        hint="use sqlite:///PATH or postgresql://USER:SECRET@HOST/NAME",
    )


class Database:
    """An engine, with transactions whose failures are told as `Unavailable`."""

    engine: sa.Engine

    def check(self) -> None:
        """Raise `Unavailable` if what is connected is no longer the database."""

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection to read with."""
        with self._explained():
            self.check()
            with self.engine.connect() as connection, connection.begin():
                yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction: committed, durably, when the block ends well."""
        with self._explained():
            self.check()
            with self.engine.connect().execution_options(vouch_write=True) as connection, connection.begin():
                yield connection
                self.check()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError) as error:
            raise _explain(error) from None
        except exc.DatabaseError as error:
            # Of a damaged file, or tables that are not there (yet): no fault of the request.
            if isinstance(error, exc.DataError | exc.IntegrityError):
                raise
            raise _explain(error) from None


class SQLite(Database):
    """SQLite with a write-ahead log: readers never wait, and what is committed has reached the disk."""

    def __init__(self, path: Path, wait_seconds: float) -> None:
        self.path, self.wait_seconds = path, wait_seconds
        self._inode: tuple[int, int] | None = None
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise StorageError(
                f"cannot write the database {path.name!r}: {error.strerror}", where=str(path), hint="choose --database"
            ) from error
        self._remember()
        self.engine = sa.create_engine(
            "sqlite://",
            creator=self._connect,
            poolclass=sa.QueuePool,
            pool_size=4,
            max_overflow=12,
            pool_timeout=wait_seconds,
            hide_parameters=True,
        )

        @sa.event.listens_for(self.engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            # A writer takes its lock at once, so that it waits for its turn instead of failing half-way.
            immediate = connection.get_execution_options().get("vouch_write")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    def _connect(self) -> sqlite3.Connection:
        # mode=rw: a database that was taken away must not come back empty.
        location = f"file:{quote(str(self.path))}?mode=rw"
        connection = sqlite3.connect(
            location, uri=True, timeout=self.wait_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            _use_wal(connection, self.wait_seconds)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA journal_size_limit = 67108864")
        except BaseException:
            connection.close()
            raise
        return connection

    def _remember(self) -> None:
        found = self.path.stat()
        self._inode = (found.st_dev, found.st_ino)

    def check(self) -> None:
        """Notice that the file was taken away or exchanged: open connections would go on with the old one."""
        try:
            found = self.path.stat()
        except OSError:
            raise Unavailable("the database file is not there", hint="put it back, or restart the service") from None
        if (found.st_dev, found.st_ino) != self._inode:
            with self._lock:
                self._remember()
                self.engine.dispose()


class PostgreSQL(Database):
    """PostgreSQL; a connection that broke is replaced before use."""

    def __init__(self, url: URL, wait_seconds: float) -> None:
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise ConfigError("PostgreSQL needs its driver", hint='pip install "vouch[service]"') from None
        limit = int(wait_seconds * 1000)
        self.engine = sa.create_engine(
            url,
            pool_pre_ping=True,
            pool_size=4,
            max_overflow=12,
            pool_timeout=wait_seconds,
            hide_parameters=True,
            connect_args={
                "connect_timeout": max(2, int(wait_seconds)),
                "options": f"-c lock_timeout={limit} -c statement_timeout={4 * limit} -c application_name=vouch",
            },
        )


def _use_wal(connection: sqlite3.Connection, wait_seconds: float) -> None:
    """Turn the write-ahead log on; SQLite does not wait by itself while another process does the same."""
    until = time.monotonic() + wait_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _explain(error: Any) -> Unavailable:
    # Messages of drivers may hold values of rows; only what is known to be harmless is passed on.
    text = str(getattr(error, "orig", error)).lower()
    if "full" in text or "no space" in text:
        return Unavailable("the disk of the database is full", hint="free some space; then the same request will do")
    if "locked" in text or "lock timeout" in text or isinstance(error, exc.TimeoutError):
        return Unavailable("the database is busy", hint="ask again in a moment")
    return Unavailable("the database cannot be reached", hint="ask again in a moment; see /readyz")
