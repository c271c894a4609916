"""What peers asked this node to commit to, and what became of it (PS3.4 J.3).

A request is a row before its peer hears Success. The row keeps what was found of each instance until its peer has taken the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, func, select, update

from storage.database import Database
from storage.records import CommitmentRequest
from storage.schema import COMMITMENT_REQUEST


class CommitmentRequests:
    """The table commitment_request. Any number of threads and processes may use it."""

    def __init__(self, database: Database):
        self._database = database

    def lock(self, connection: Connection, peer: str) -> None:
        """Let one request of a peer at a time be taken, until the caller's transaction ends."""
        self._database.lock(connection, f"commitment requests of {peer}")

    def of_transaction(self, connection: Connection, peer: str, transaction_uid: str) -> list[CommitmentRequest]:
        """Return the requests of a peer with this Transaction UID, the first one first: what a second one is told is another matter."""
        same = (COMMITMENT_REQUEST.c.peer == peer) & (COMMITMENT_REQUEST.c.transaction_uid == transaction_uid)
        rows = connection.execute(select(COMMITMENT_REQUEST).where(same).order_by(COMMITMENT_REQUEST.c.asked_at)).all()
        return [_request(row) for row in rows]

    def waiting(self, connection: Connection, peer: str) -> int:
        """Return how many requests of a peer wait to be answered."""
        table = COMMITMENT_REQUEST.c
        count = select(func.count()).select_from(COMMITMENT_REQUEST).where(table.peer == peer, table.state == "waiting")
        return int(connection.execute(count).scalar_one())

    def add(
        self,
        connection: Connection,
        key: str,
        *,
        peer: str,
        transaction_uid: str,
        digest: str,
        references: Sequence[tuple[str, str]],
        failures: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        """Add a request in the caller's write transaction; `failures` where nothing has to be looked at."""
        values = {"key": key, "peer": peer, "transaction_uid": transaction_uid, "digest": digest, "instances": len(references)}
        fresh = _fresh(references, failures)
        connection.execute(COMMITMENT_REQUEST.insert().values(**values, **fresh, asked_at=self._database.now(connection)))

    def renew(self, connection: Connection, key: str, references: Sequence[tuple[str, str]]) -> None:
        """Let an answered request be looked at and answered once more, as if it were new, in the caller's write transaction."""
        this = COMMITMENT_REQUEST.c.key == key
        connection.execute(update(COMMITMENT_REQUEST).where(this).values(**_fresh(references, None)))

    def reopen(self, connection: Connection, key: str) -> None:
        """Let a report that was given up be sent again, its tries counted from 0, in the caller's write transaction."""
        this = (COMMITMENT_REQUEST.c.key == key) & (COMMITMENT_REQUEST.c.state == "failed")
        connection.execute(update(COMMITMENT_REQUEST).where(this).values(state="waiting", attempts=0, reason=None))

    def request(self, key: str) -> CommitmentRequest | None:
        """Return the request with this key."""
        with self._database.reading() as connection:
            row = connection.execute(select(COMMITMENT_REQUEST).where(COMMITMENT_REQUEST.c.key == key)).one_or_none()
        return _request(row) if row else None

    def requests(self) -> list[CommitmentRequest]:
        """Return every request, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(select(COMMITMENT_REQUEST).order_by(COMMITMENT_REQUEST.c.asked_at, COMMITMENT_REQUEST.c.key)).all()
        return [_request(row) for row in rows]

    def forget(self, before: datetime) -> int:
        """Remove requests that ended before then, reported or given up."""
        old = delete(COMMITMENT_REQUEST).where(COMMITMENT_REQUEST.c.state != "waiting", COMMITMENT_REQUEST.c.ended_at < before)
        with self._database.writing() as connection:
            return connection.execute(old).rowcount

    def start(self, key: str) -> CommitmentRequest | None:
        """Count an attempt to answer a request that waits, and return it; None if there is none, or it was answered or given up."""
        this = (COMMITMENT_REQUEST.c.key == key) & (COMMITMENT_REQUEST.c.state == "waiting")
        with self._database.writing() as connection:
            counted = update(COMMITMENT_REQUEST).where(this).values(attempts=COMMITMENT_REQUEST.c.attempts + 1)
            row = connection.execute(counted.returning(COMMITMENT_REQUEST)).one_or_none()
        return _request(row) if row else None

    def verified(self, key: str, failures: Sequence[tuple[str, int]]) -> None:
        """Keep which instances are not committed to, and why (PS3.3 C.14.1.1); all others are."""
        values = {"failures": [list(failure) for failure in failures]}
        self._change(key, **values)

    def postpone(self, key: str, reason: str) -> None:
        """Note why a request that waits hasn't been answered yet."""
        self._change(key, reason=reason)

    def finish(self, key: str, state: Literal["reported", "failed"], *, reason_code: str | None = None, reason: str | None = None) -> bool:
        """End a request that waits; False, and nothing changed, if it had ended. One that is reported keeps no references."""
        del reason_code  # a job's row has it
        with self._database.writing() as connection:
            values: dict[str, Any] = {"state": state, "reason": reason, "ended_at": self._database.now(connection)}
            if state == "reported":
                values["references"] = []
            this = (COMMITMENT_REQUEST.c.key == key) & (COMMITMENT_REQUEST.c.state == "waiting")
            return bool(connection.execute(update(COMMITMENT_REQUEST).where(this).values(**values)).rowcount)

    def _change(self, key: str, **values: Any) -> None:
        with self._database.writing() as connection:
            this = (COMMITMENT_REQUEST.c.key == key) & (COMMITMENT_REQUEST.c.state == "waiting")
            connection.execute(update(COMMITMENT_REQUEST).where(this).values(**values))


def _fresh(references: Sequence[tuple[str, str]], failures: Sequence[tuple[str, int]] | None) -> dict[str, Any]:
    return {
        "references": [list(reference) for reference in references],
        "failures": None if failures is None else [list(failure) for failure in failures],
        "state": "waiting",
        "attempts": 0,
        "reason": None,
        "ended_at": None,
    }


def _request(row: Row[Any]) -> CommitmentRequest:
    return CommitmentRequest(
        key=row.key,
        peer=row.peer,
        transaction_uid=row.transaction_uid,
        digest=row.digest,
        instances=row.instances,
        references=tuple((sop_class, uid) for sop_class, uid in row.references),
        failures=None if row.failures is None else tuple((uid, reason) for uid, reason in row.failures),
        state=row.state,
        attempts=row.attempts,
        reason=row.reason,
        asked_at=row.asked_at,
        ended_at=row.ended_at,
    )
