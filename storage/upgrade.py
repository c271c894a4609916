"""Runs the migrations, and tells whether they have run. One transaction: a crash leaves the old revision whole."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from storage.database import Database
from storage.errors import StorageError

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the tables to this program's revision, or to an earlier one; several processes at once take turns.

    Raises:
        StorageError: the database is at a revision that this program doesn't know.
    """
    config = _config()
    with _alone(database), database.writing() as connection:
        database.lock(connection, "migrations")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, revision)
        except CommandError as error:
            raise StorageError(f"the database cannot be brought up to date: {error}") from error


def is_current(database: Database) -> bool:
    """Return whether the tables are at this program's revision."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    with database.reading() as connection:
        return MigrationContext.configure(connection).get_current_revision() == head


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@contextmanager
def _alone(database: Database) -> Iterator[None]:
    """Hold a file lock beside a SQLite file: switching it to WAL fails at once when two processes do it."""
    if database.file is None:
        yield
        return
    with database.file.with_name(f"{database.file.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
