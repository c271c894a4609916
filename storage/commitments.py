"""What peers were asked to commit to, and what they answered (PS3.4 J.3): a delivery that is sent becomes committed.

The first report of a transaction decides; what comes after it can only commit to more. Every change locks the row of the deliver job
first, as the end of a job does, so a report and a worker never meet half-way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, update

from storage.database import Database
from storage.jobs import delivery
from storage.records import Commitment, CommitmentState, Delivery
from storage.schema import COMMITMENT, DELIVERY, JOB

_OPEN = ("asking", "waiting")


class Commitments:
    """The table commitment, and what it means for the table delivery. Any number of threads and processes may use it."""

    def __init__(self, database: Database):
        self._database = database

    def ask(self, transaction_uid: str, job_key: str, peer: str, sop_instance_uids: Collection[str]) -> Commitment:
        """Note, before the peer hears of it, that it is asked to commit to these results of a deliver job."""
        with self._database.writing() as connection:
            _lock(connection, job_key)
            values = {"transaction_uid": transaction_uid, "peer": peer, "job_key": job_key, "state": "asking"}
            asked = COMMITMENT.insert().values(**values, asked_at=self._database.now(connection)).returning(COMMITMENT)
            row = connection.execute(asked).one()
            for uid in sorted(sop_instance_uids):
                this = (DELIVERY.c.sop_instance_uid == uid) & (DELIVERY.c.peer == peer)
                connection.execute(update(DELIVERY).where(this).values(transaction_uid=transaction_uid))
            return _commitment(row)

    def acknowledged(
        self,
        connection: Connection,
        asked: Commitment,
        *,
        state: CommitmentState,
        error: str | None = None,
        wait_seconds: float | None = None,
    ) -> bool:
        """Note in the caller's write transaction how the request itself was taken: "waiting" for its report, or "refused".

        False, and nothing changed, if it was overtaken by its report or by a newer request.
        """
        _lock(connection, asked.job_key)
        due_at = None if wait_seconds is None else self._database.now(connection) + timedelta(seconds=wait_seconds)
        this = (COMMITMENT.c.transaction_uid == asked.transaction_uid) & (COMMITMENT.c.state == "asking")
        return bool(connection.execute(update(COMMITMENT).where(this).values(state=state, error=error, due_at=due_at)).rowcount)

    def seconds_left(self, job_key: str) -> float | None:
        """Return for how many seconds more a report is awaited; None if none is, or no longer."""
        last = select(func.max(COMMITMENT.c.due_at)).where(COMMITMENT.c.job_key == job_key, COMMITMENT.c.state == "waiting")
        with self._database.reading() as connection:
            due_at: datetime | None = connection.execute(last).scalar_one()
            left = (due_at - self._database.now(connection)).total_seconds() if due_at is not None else 0.0
        return left if left > 0 else None

    def lapse(self, job_key: str) -> None:
        """Wait no longer for what was asked for a deliver job. A report that comes late is still taken."""
        with self._database.writing() as connection:
            _lock(connection, job_key)
            still_open = update(COMMITMENT).where(COMMITMENT.c.job_key == job_key, COMMITMENT.c.state.in_(_OPEN))
            connection.execute(still_open.values(state="unanswered"))

    def commitment(self, transaction_uid: str) -> Commitment | None:
        """Return the request with this Transaction UID."""
        with self._database.reading() as connection:
            row = connection.execute(select(COMMITMENT).where(COMMITMENT.c.transaction_uid == transaction_uid)).one_or_none()
        return _commitment(row) if row else None

    def is_answered(self, transaction_uid: str) -> bool:
        """Whether the report of this request has come."""
        found = self.commitment(transaction_uid)
        return found is not None and found.answered_at is not None

    def commitments(self, *, job_key: str | None = None) -> list[Commitment]:
        """Return what was asked for a deliver job, or all, oldest first."""
        statement = select(COMMITMENT).order_by(COMMITMENT.c.asked_at, COMMITMENT.c.transaction_uid)
        if job_key is not None:
            statement = statement.where(COMMITMENT.c.job_key == job_key)
        with self._database.reading() as connection:
            return [_commitment(row) for row in connection.execute(statement)]

    def forget(self, before: datetime) -> int:
        """Remove what was asked before then for deliver jobs that have ended; a report that comes after that is a stranger's."""
        unfinished = select(JOB.c.key).where(JOB.c.state.in_(("queued", "running")))
        old = delete(COMMITMENT).where(COMMITMENT.c.asked_at < before, COMMITMENT.c.job_key.not_in(unfinished))
        with self._database.writing() as connection:
            return connection.execute(old).rowcount

    def answer(
        self, connection: Connection, asked: Commitment, *, committed: Collection[str], failed: Mapping[str, tuple[int, str]], rounds: int
    ) -> tuple[bool, list[Delivery]]:
        """Take a peer's report in the caller's write transaction.

        What the peer doesn't hold (status and words by SOP Instance UID; what the report doesn't name, too) waits to be sent again, and
        has failed after so many rounds, or if the job has ended. That counts for the first report of the last request alone: others may
        only commit. What the job didn't send is not looked at.

        Returns:
            Whether this is the first report of its request, and the deliveries of the job that are not committed to by now.
        """
        is_open = _lock(connection, asked.job_key) in {"queued", "running"}
        this = COMMITMENT.c.transaction_uid == asked.transaction_uid
        is_first = connection.execute(select(COMMITMENT.c.answered_at).where(this)).scalar_one() is None
        now = self._database.now(connection)
        connection.execute(
            update(COMMITMENT).where(this).values(state="answered", answered_at=func.coalesce(COMMITMENT.c.answered_at, now))
        )
        of_job = select(DELIVERY).where(DELIVERY.c.job_key == asked.job_key, DELIVERY.c.peer == asked.peer, DELIVERY.c.state != "committed")
        for row in connection.execute(of_job.order_by(DELIVERY.c.sop_instance_uid)).all():
            values: dict[str, Any] = {}
            at_peer = row.sent_as or row.sop_instance_uid
            if at_peer in committed:
                values = {"state": "committed", "status": 0, "error": None, "next_at": None, "committed_at": now}
            elif is_first and row.transaction_uid == asked.transaction_uid and row.state == "sent":
                status, words = failed.get(at_peer, (None, f"{asked.peer} did not say whether it commits to it"))
                state = "waiting" if is_open and row.refusals < rounds else "failed"
                values = {"state": state, "status": status, "error": words, "refusals": row.refusals + 1}
            if values:
                same = (DELIVERY.c.sop_instance_uid == row.sop_instance_uid) & (DELIVERY.c.peer == row.peer)
                connection.execute(update(DELIVERY).where(same).values(**values))
        not_committed = [delivery(row) for row in connection.execute(of_job.order_by(DELIVERY.c.sop_instance_uid))]
        return is_first, not_committed


def _lock(connection: Connection, job_key: str) -> str | None:
    """Lock the row of a job until the transaction ends; return its state."""
    state: str | None = connection.execute(select(JOB.c.state).where(JOB.c.key == job_key).with_for_update()).scalar_one_or_none()
    return state


def _commitment(row: Row[Any]) -> Commitment:
    return Commitment(
        transaction_uid=row.transaction_uid,
        peer=row.peer,
        job_key=row.job_key,
        state=row.state,
        asked_at=row.asked_at,
        due_at=row.due_at,
        answered_at=row.answered_at,
        error=row.error,
    )
