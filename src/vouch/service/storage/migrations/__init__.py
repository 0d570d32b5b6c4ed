"""The history of the tables, for Alembic; `migrate` brings a database up to date."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from vouch.errors import StorageError

LOCK = 0x766F756368  # "vouch": the advisory lock that migrating processes take in turn


def migrate(connection: Connection) -> None:
    """Bring the tables up to date within the connection's transaction.

    One process at a time: on SQLite the transaction itself holds the write lock (it began IMMEDIATE), on PostgreSQL
    an advisory lock is taken. Whoever comes second finds the work done.

    Raises:
        StorageError: the database was written by a newer version.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL statement_timeout = '60s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    current = MigrationContext.configure(connection).get_current_revision()
    try:
        if current is not None:
            ScriptDirectory.from_config(config).get_revision(current)
        command.upgrade(config, "head")
    except CommandError as error:
        raise StorageError(
            f"the database has the tables of a newer version ({current})",
            hint="upgrade vouch, or use another --database",
        ) from error
