"""Deliver jobs that wait for a peer which cannot be reached: rows alone, however many they are.

A job in a backlog has no ticket on the engine's queues; the backlog has one, and lives as long as that. Every change of a backlog
takes the lock of its peer, so that no job is put in while the last one goes.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, case, delete, func, select, update

from storage.database import Database
from storage.records import Backlog
from storage.schema import BACKLOG, DELIVERY, JOB

_UNFINISHED = ("queued", "running")


class Backlogs:
    """The table backlog, and the jobs in it. Any number of threads and processes may use it."""

    def __init__(self, database: Database):
        self._database = database

    def backlog(self, peer: str) -> Backlog | None:
        """Return what waits for this peer; None: it is not known to be away."""
        return self._one(BACKLOG.c.peer == peer)

    def of_ticket(self, ticket: str) -> Backlog | None:
        """Return the backlog whose ticket this is now."""
        return self._one(BACKLOG.c.ticket == ticket)

    def backlogs(self) -> list[Backlog]:
        """Return every backlog, by its peer."""
        with self._database.reading() as connection:
            return [_backlog(row) for row in connection.execute(select(BACKLOG).order_by(BACKLOG.c.peer))]

    def seconds_left(self, backlog: Backlog) -> float:
        """Return how long it is until the peer is to be tried again; 0 when it is time, or nothing has to be awaited."""
        if backlog.next_at is None:
            return 0.0
        with self._database.reading() as connection:
            return max(0.0, (backlog.next_at - self._database.now(connection)).total_seconds())

    def put(
        self, connection: Connection, key: str, peer: str, *, reason: str, error: str, schedule: Sequence[float], tried: bool
    ) -> str | None:
        """Put a running job in its peer's backlog, in the caller's write transaction; nothing happens if it has ended.

        If it has `tried` the peer, and that is news of it, the next try is by the schedule, whose last wait repeats.

        Returns:
            The name of the ticket that the backlog needs, if it is new.
        """
        self._lock(connection, peer)
        now = self._database.now(connection)
        values = {"state": "queued", "reason_code": "waiting", "reason": reason, "progress": None, "attempts": 0, "in_backlog": True}
        since = case((JOB.c.in_backlog, JOB.c.waiting_since), else_=now)
        running = update(JOB).where(JOB.c.key == key, JOB.c.state == "running").values(**values, waiting_since=since)
        if not connection.execute(running).rowcount:
            return None
        row = connection.execute(select(BACKLOG).where(BACKLOG.c.peer == peer)).one_or_none()
        if row is None:
            ticket = uuid.uuid4().hex
            next_at = now + timedelta(seconds=schedule[0])
            fresh = {"peer": peer, "ticket": ticket, "since": now, "tries": 1, "next_at": next_at, "error": error}
            connection.execute(BACKLOG.insert().values(**fresh))
            return ticket
        changes: dict[str, Any] = {"probe": None} if row.probe == key else {}
        if tried and (row.next_at is None or row.next_at <= now):
            wait = schedule[min(row.tries, len(schedule) - 1)]
            changes |= {"tries": row.tries + 1, "next_at": now + timedelta(seconds=wait), "error": error}
        if changes:
            connection.execute(update(BACKLOG).where(BACKLOG.c.peer == peer).values(**changes))
        return None

    def put_all(self, connection: Connection, peer: str) -> tuple[int, str]:
        """Let every deliver job of this peer that has failed or waits be tried again as soon as the peer is there.

        Returns:
            How many they are, and the name of the ticket that the backlog needs: its earlier one is void.
        """
        self._lock(connection, peer)
        now = self._database.now(connection)
        failed = select(JOB.c.key).where(JOB.c.kind == "deliver", JOB.c.peer == peer, JOB.c.state == "failed")
        again = update(DELIVERY).where(DELIVERY.c.job_key.in_(failed), DELIVERY.c.state == "failed")
        connection.execute(again.values(state="waiting", next_at=None, refusals=0))
        idle = (JOB.c.kind == "deliver") & (JOB.c.peer == peer) & JOB.c.state.in_(("failed", "queued"))
        values = {"state": "queued", "attempts": 0, "reason_code": "waiting", "ended_at": None, "in_backlog": True, "waiting_since": now}
        jobs = connection.execute(update(JOB).where(idle).values(**values)).rowcount
        return jobs, self._renew(connection, peer, tries=0, next_at=now, probe=None)

    def take(self, connection: Connection, key: str) -> None:
        """Take a job out of its backlog in the transaction that gives it a ticket of its own."""
        connection.execute(update(JOB).where(JOB.c.key == key).values(in_backlog=False))

    def allow(self, connection: Connection, peer: str, key: str) -> None:
        """Let this job try the peer, whatever is known of that, in the caller's write transaction."""
        self._lock(connection, peer)
        connection.execute(update(BACKLOG).where(BACKLOG.c.peer == peer).values(probe=key))

    def reached(self, connection: Connection, peer: str) -> str | None:
        """Note that the peer is back; return the name of the ticket that the backlog needs if its own would come too late."""
        self._lock(connection, peer)
        row = connection.execute(select(BACKLOG).where(BACKLOG.c.peer == peer)).one_or_none()
        if row is None or row.next_at is None:
            return None
        if row.next_at > self._database.now(connection):
            return self._renew(connection, peer, tries=0, next_at=None, probe=None, error=None)
        connection.execute(update(BACKLOG).where(BACKLOG.c.peer == peer).values(tries=0, next_at=None, probe=None, error=None))
        return None

    def jobs(self, peer: str, *, most: int) -> list[str]:
        """Return the keys of what comes first: urgent ones, then the oldest."""
        urgent_first = case((JOB.c.priority == "stat", 0), else_=1)
        waiting = select(JOB.c.key).where(_waits_for(peer)).order_by(urgent_first, JOB.c.created_at, JOB.c.key).limit(most)
        with self._database.reading() as connection:
            return list(connection.execute(waiting).scalars())

    def close(self, backlog: Backlog) -> bool:
        """Remove a backlog that nothing waits in; False, and nothing changed, if something does."""
        with self._database.writing() as connection:
            self._lock(connection, backlog.peer)
            if connection.execute(select(JOB.c.key).where(_waits_for(backlog.peer)).limit(1)).one_or_none() is not None:
                return False
            connection.execute(delete(BACKLOG).where(BACKLOG.c.peer == backlog.peer, BACKLOG.c.ticket == backlog.ticket))
            return True

    def give_up(self, peer: str, reason: str, *, after_seconds: float) -> int:
        """End the jobs that have waited in a backlog for so long, as failed; return how many they are."""
        with self._database.writing() as connection:
            self._lock(connection, peer)
            now = self._database.now(connection)
            overdue = _waits_for(peer) & (JOB.c.state == "queued") & (JOB.c.waiting_since <= now - timedelta(seconds=after_seconds))
            keys = select(JOB.c.key).where(overdue)
            waiting = update(DELIVERY).where(DELIVERY.c.job_key.in_(keys), DELIVERY.c.state == "waiting")
            connection.execute(waiting.values(state="failed", error=func.coalesce(DELIVERY.c.error, reason), next_at=None))
            ended = {"state": "failed", "reason_code": "delivery-failed", "reason": reason, "ended_at": now, "in_backlog": False}
            return connection.execute(update(JOB).where(overdue).values(**ended)).rowcount

    def postpone(self, key: str, reason: str) -> None:
        """Nothing has to be noted: a backlog waits until it is worked off."""

    def finish(self, key: str, state: str, *, reason_code: str | None = None, reason: str | None = None) -> bool:
        """End what waits in the backlog of this ticket (`resume/<ticket>`): it could not be worked off."""
        del state, reason_code  # it is given up, and says why
        backlog = self.of_ticket(key.rpartition("/")[2])
        if backlog is None:
            return False
        self.give_up(backlog.peer, reason or "", after_seconds=0)
        return self.close(backlog)

    def _one(self, condition: ColumnElement[bool]) -> Backlog | None:
        with self._database.reading() as connection:
            row = connection.execute(select(BACKLOG).where(condition)).one_or_none()
        return _backlog(row) if row else None

    def _renew(self, connection: Connection, peer: str, **values: Any) -> str:
        """Give a backlog, which may be new, another ticket, and these values."""
        ticket = uuid.uuid4().hex
        fresh = {"peer": peer, "ticket": ticket, "since": self._database.now(connection), **values}
        if self._database.insert_new(connection, BACKLOG, fresh) is None:
            connection.execute(update(BACKLOG).where(BACKLOG.c.peer == peer).values(ticket=ticket, **values))
        return ticket

    def _lock(self, connection: Connection, peer: str) -> None:
        self._database.lock(connection, f"backlog of {peer}")


def _waits_for(peer: str) -> ColumnElement[bool]:
    return (JOB.c.peer == peer) & JOB.c.in_backlog & JOB.c.state.in_(_UNFINISHED)


def _backlog(row: Row[Any]) -> Backlog:
    return Backlog(
        peer=row.peer,
        ticket=row.ticket,
        since=row.since,
        tries=row.tries,
        next_at=row.next_at,
        probe=row.probe,
        error=row.error,
    )
