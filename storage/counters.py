"""Numbers that every process adds to, for the metrics: they survive a restart and are one sum over all processes."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from storage.database import Database
from storage.schema import COUNTER


class Counters:
    """Counts by name. Any number of threads and processes may add to them."""

    def __init__(self, database: Database):
        self._database = database

    def add(self, deltas: Mapping[str, int]) -> None:
        """Add to each of these counts, in one transaction; a name that is new begins at 0."""
        if not deltas:
            return
        insert = (sqlite if self._database.is_sqlite else postgresql).insert(COUNTER)
        upsert = insert.on_conflict_do_update(index_elements=[COUNTER.c.name], set_={"count": COUNTER.c.count + insert.excluded.count})
        rows = [{"name": name, "count": deltas[name]} for name in sorted(deltas)]  # one order: row locks never wait in a ring
        with self._database.writing() as connection:
            connection.execute(upsert, rows)

    def all(self) -> dict[str, int]:
        """Return every count by its name."""
        with self._database.reading() as connection:
            rows = connection.execute(select(COUNTER.c.name, COUNTER.c.count).order_by(COUNTER.c.name)).all()
        return {name: int(count) for name, count in rows}
