"""Leases: who may do what only one process at a time should do, judged on the database's clock.

A lease is a promise for a time, not a lock: its holder can stall past the end without noticing. What it guards must
stay right, if wasteful, when two do it.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import delete, select, update

from storage.database import Database
from storage.schema import LEASE


class Leases:
    """Named leases in the database. Any number of threads and processes may use them."""

    def __init__(self, database: Database):
        self._database = database

    def hold(self, name: str, owner: str, seconds: float) -> bool:
        """Take or renew the lease for so long from now; False if another owner holds it."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            values = {"owner": owner, "expires_at": now + timedelta(seconds=seconds)}
            mine = (LEASE.c.owner == owner) | (LEASE.c.expires_at <= now)
            if connection.execute(update(LEASE).where(LEASE.c.name == name, mine).values(**values)).rowcount:
                return True
            return self._database.insert_new(connection, LEASE, {"name": name, **values}) is not None

    def holder(self, name: str) -> str | None:
        """Return who holds the lease now."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
            statement = select(LEASE.c.owner).where(LEASE.c.name == name, LEASE.c.expires_at > now)
            return connection.execute(statement).scalar_one_or_none()

    def expired(self, prefix: str) -> list[tuple[str, str]]:
        """Return (name, owner) of the leases that ran out and were not released, of names that start with `prefix`."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
            statement = select(LEASE.c.name, LEASE.c.owner).where(LEASE.c.expires_at <= now).order_by(LEASE.c.name)
            rows = connection.execute(statement).all()
        return [(name, owner) for name, owner in rows if name.startswith(prefix)]

    def release(self, name: str, owner: str) -> None:
        """Give the lease up; nothing happens if `owner` has lost it."""
        with self._database.writing() as connection:
            connection.execute(delete(LEASE).where(LEASE.c.name == name, LEASE.c.owner == owner))
