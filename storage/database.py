"""One database, SQLite or PostgreSQL: how connections are set up and what a transaction is.

Every write is one short transaction. On SQLite it takes the write lock when it begins, so it never fails half-way for
want of it; each commit is synced before it returns (README.md).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import ARRAY, JSON, Column, ColumnElement, Connection, Engine, Table, Text, bindparam, event, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, StatementError, TimeoutError as PoolTimeout

from storage.errors import Conflict, OutOfSpace, StorageError, Unavailable
from storage.turns import Turns

BUSY_SECONDS = 30
_SQLITE_FULL = 13
_POSTGRES_DISK_FULL = "53100"


class Database:
    """The engine and its two kinds of transaction. Any number of threads may use one."""

    def __init__(self, url: str):
        try:
            parsed = sqlalchemy.make_url(url)
        except (sqlalchemy.exc.ArgumentError, ValueError) as error:  # its text may hold the password
            raise StorageError("the URL of the database is malformed; it is like postgresql+psycopg://USER:PASSWORD@HOST/NAME") from error
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if not self.is_sqlite and parsed.get_backend_name() != "postgresql":
            raise StorageError(f"{parsed.get_backend_name()} is neither sqlite nor postgresql")
        if self.is_sqlite and parsed.database in {None, "", ":memory:"}:
            raise StorageError("the SQLite database must be a file")
        self.file = Path(str(parsed.database)) if self.is_sqlite else None
        arguments: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if self.is_sqlite else {"isolation_level": "READ COMMITTED"}
        try:
            self.engine: Engine = sqlalchemy.create_engine(
                parsed,
                hide_parameters=True,  # an error's text may reach a log, and parameters are patients' names
                pool_size=8,
                max_overflow=56 if self.is_sqlite else 8,  # a server has 100 for every process; transactions are short, threads wait
                pool_timeout=BUSY_SECONDS,
                pool_pre_ping=not self.is_sqlite,
                json_serializer=partial(json.dumps, allow_nan=False),  # NaN is no JSON, and PostgreSQL says so
                **arguments,
            )
        except (ImportError, sqlalchemy.exc.ArgumentError) as error:
            raise StorageError(f"there is no driver for {parsed.drivername}; the node comes with postgresql+psycopg and sqlite") from error
        self._insertions: dict[str, Any] = {}
        self._writer = threading.Lock()
        self._turns = Turns(self.file.with_name(f"{self.file.name}.queue")) if self.file else None
        event.listen(self.engine, "connect", _set_up_sqlite if self.is_sqlite else _set_up_postgresql)
        if self.is_sqlite:
            event.listen(self.engine, "begin", _begin_sqlite)
        self._write_engine = self.engine.execution_options(storage_writes=True)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One write transaction: committed and synced on exit, rolled back if the block raises. Doesn't nest.

        Raises:
            Conflict: a constraint does not hold.
            OutOfSpace: the disk of the database is full.
            Unavailable: no connection, or the lock was not had in time.
            StorageError: any other failure of the database.
        """
        with self._alone(), _own_errors(), self._write_engine.begin() as connection:
            yield connection

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for our turn to write: SQLite has one writer, and threads and processes queue here instead of polling for its lock."""
        if self._turns is None:
            yield
            return
        if not self._writer.acquire(timeout=BUSY_SECONDS):
            raise Unavailable("another thread has been writing to the database for too long")
        try:
            try:
                turn = self._turns.take(BUSY_SECONDS)
            except OSError as error:
                raise Unavailable(f"the file beside the database cannot be locked: {error.strerror}") from error
            if turn is None:
                raise Unavailable("another process has been writing to the database for too long")
            try:
                yield
            finally:
                self._turns.give_back(turn)
        finally:
            self._writer.release()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One read transaction; on SQLite all of it sees the same state. Raises as `writing` does."""
        with _own_errors(), self.engine.connect() as connection:
            yield connection

    def now(self, connection: Connection) -> datetime:
        """Return the time on the database's clock: one clock for every machine that shares the database."""
        if self.is_sqlite:  # a SQLite database is used from one machine
            return datetime.now(UTC)
        time = connection.execute(select(func.clock_timestamp())).scalar_one()
        return time.astimezone(UTC)  # type: ignore[no-any-return]  # func.clock_timestamp is untyped

    def insert_new(self, connection: Connection, table: Table, values: dict[str, Any]) -> Any | None:
        """Insert a row unless a unique constraint says it is there already; return the first column of its key, or None."""
        statement = self._insertions.get(table.name)
        if statement is None:
            statement = self._insertions[table.name] = self.inserting_new(table, next(iter(table.primary_key.columns)))
        return connection.execute(statement, values).scalar_one_or_none()

    def inserting_new(self, table: Table, *returned: Column[Any]) -> Any:  # the two dialects' types have nothing in common
        """Return the statement that inserts rows unless a unique constraint says that they are there already."""
        dialect = sqlite if self.is_sqlite else postgresql
        return dialect.insert(table).on_conflict_do_nothing().returning(*returned)

    def lock(self, connection: Connection, name: str) -> None:
        """Let one transaction at a time pass for `name`, until it ends. On SQLite every write transaction is alone anyway."""
        if not self.is_sqlite:
            key = func.hashtextextended(name, 0)
            connection.execute(select(func.pg_advisory_xact_lock(key)))

    def is_one_of(self, column: Column[Any], parameter: str) -> ColumnElement[bool]:
        """Return the condition that a text is one of a list, which is one parameter: the statement is the same for any number."""
        if self.is_sqlite:
            return column.in_(select(func.json_each(bindparam(parameter, type_=JSON)).table_valued("value").c.value))
        return column == func.any(bindparam(parameter, type_=ARRAY(Text)))

    def wait_for_writers(self, connection: Connection, tables: Sequence[Table]) -> None:
        """In a write transaction, wait until nobody else has unfinished changes in these tables. On SQLite nobody has."""
        if not self.is_sqlite:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'")
            connection.exec_driver_sql(f"LOCK TABLE {', '.join(table.name for table in tables)} IN SHARE MODE")

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _begin_sqlite does
    for pragma in (f"busy_timeout={BUSY_SECONDS * 1000}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Begin by the driver itself: SQLAlchemy's way takes longer than the statement."""
    writes = connection.get_execution_options().get("storage_writes", False)
    driver_connection: Any = connection.connection.driver_connection
    driver_connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")


def _set_up_postgresql(connection: Any, _record: object) -> None:
    """Never acknowledge a commit that is not on the server's disk, whatever the server's default is."""
    autocommit, connection.autocommit = connection.autocommit, True
    setting = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    connection.execute(setting)
    connection.autocommit = autocommit


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except (IntegrityError, sqlite3.IntegrityError) as error:
        raise Conflict(f"the database refuses the row: {getattr(error, 'orig', error)}") from error
    except PoolTimeout as error:
        raise Unavailable(f"every connection to the database is in use: {error}") from error
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if getattr(cause, "sqlite_errorcode", None) == _SQLITE_FULL or getattr(cause, "sqlstate", None) == _POSTGRES_DISK_FULL:
            raise OutOfSpace(f"the disk of the database is full: {cause}") from error
        if isinstance(error, OperationalError | InterfaceError | sqlite3.OperationalError):
            raise Unavailable(f"the database cannot be used now: {cause}") from error
        raise StorageError(f"the database failed: {cause}") from error
    except StatementError as error:  # a value that its column does not take
        raise StorageError(f"the value cannot be stored: {error.orig}") from error
