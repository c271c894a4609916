"""Jobs, the result objects they made, and each result's way to each peer: what the node shows of its work.

The engine decides what runs when; these rows say what became of it. A job's row is created in the transaction that
closes its revision, and a foreign key refuses a job of a revision that is not closed (contract 7).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from storage.database import Database
from storage.errors import Conflict
from storage.records import Delivery, DeliveryState, Job, JobKind, JobState, Priority, Result, StoredObject
from storage.schema import DELIVERY, JOB, RESULT

_UNFINISHED = ("queued", "running")
WAITING = "waiting"  # reason code of a job that waits for its next try


class Jobs:
    """The tables job, result and delivery. Any number of threads and processes may use them."""

    def __init__(self, database: Database):
        self._database = database

    def create(
        self,
        connection: Connection,
        *,
        key: str,
        kind: JobKind,
        study_instance_uid: str,
        revision: int,
        package: str,
        version: str,
        digest: str,
        run: int,
        priority: Priority,
        peer: str | None = None,
        to_ae_titles: Sequence[str] = (),
        report_refusals: bool = False,
        objects: Mapping[str, Sequence[str]] | None = None,
    ) -> bool:
        """Add a queued job in the caller's write transaction; False, and nothing changed, if its key exists.

        Raises:
            Conflict: the revision isn't closed; raised by the statement or when the transaction ends.
        """
        values = {
            "key": key,
            "kind": kind,
            "study_instance_uid": study_instance_uid,
            "revision": revision,
            "package": package,
            "version": version,
            "digest": digest,
            "run": run,
            "peer": peer,
            "to_ae_titles": list(to_ae_titles),
            "report_refusals": report_refusals,
            "objects": {peer: list(kinds) for peer, kinds in (objects or {}).items()},
            "priority": priority,
            "state": "queued",
            "attempts": 0,
            "detail": {},
            "created_at": self._database.now(connection),
        }
        return self._database.insert_new(connection, JOB, values) is not None

    def job(self, key: str, *, connection: Connection | None = None) -> Job | None:
        """Return the job with this key; with `connection` as the caller's write transaction sees it."""
        with nullcontext(connection) if connection is not None else self._database.reading() as reading:
            row = reading.execute(select(JOB).where(JOB.c.key == key)).one_or_none()
        return _job(row) if row else None

    def jobs(self, *, study_instance_uid: str | None = None, state: JobState | None = None, kind: JobKind | None = None) -> list[Job]:
        """Return the jobs that agree with every given value, oldest first."""
        statement = select(JOB).order_by(JOB.c.created_at, JOB.c.key)
        for column, value in ((JOB.c.study_instance_uid, study_instance_uid), (JOB.c.state, state), (JOB.c.kind, kind)):
            if value is not None:
                statement = statement.where(column == value)
        with self._database.reading() as connection:
            return [_job(row) for row in connection.execute(statement)]

    def start(self, key: str) -> Job:
        """Count an attempt: a queued or running job is running from now on. One that has ended (cancelled, say) stays as it is.

        Returns:
            The job as it is now; the caller looks at `state` before it works.

        Raises:
            Conflict: there is no such job.
        """
        with self._database.writing() as connection:
            values = {"state": "running", "attempts": JOB.c.attempts + 1, "started_at": self._database.now(connection), "progress": None}
            connection.execute(update(JOB).where(JOB.c.key == key, JOB.c.state.in_(_UNFINISHED)).values(values))
            return _job(_row(connection, key))

    def finish(
        self,
        key: str,
        state: JobState,
        *,
        reason_code: str | None = None,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        connection: Connection | None = None,
    ) -> bool:
        """End a queued or running job. False, and nothing changed, if it had ended: the first end stands.

        What a failed or cancelled one had still to deliver has failed with it; `requeue` lets it wait again. `detail` is added to what
        the row remembers. With `connection` this is part of the caller's write transaction.

        Raises:
            Conflict: there is no such job.
        """
        values: dict[str, Any] = {"state": state, "reason_code": reason_code, "reason": reason, "progress": None, "in_backlog": False}
        with nullcontext(connection) if connection is not None else self._database.writing() as transaction:
            values["ended_at"] = self._database.now(transaction)
            if detail is not None:
                values["detail"] = {**_row(transaction, key, locked=True).detail, **detail}
            ended = update(JOB).where(JOB.c.key == key, JOB.c.state.in_(_UNFINISHED)).values(**values)
            if transaction.execute(ended).rowcount:
                if state in {"failed", "cancelled"}:  # nothing waits for a job that has given up
                    waiting = update(DELIVERY).where(DELIVERY.c.job_key == key, DELIVERY.c.state == "waiting")
                    transaction.execute(waiting.values(state="failed", error=func.coalesce(DELIVERY.c.error, reason), next_at=None))
                return True
            _row(transaction, key)
            return False

    def remember(self, key: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Note in a job's detail what its results depend on beside its images, unless that is noted already; return what is noted.

        It stays through retries and restarts, so that a job done again says the same, whatever arrived or went meanwhile.

        Raises:
            Conflict: there is no such job.
        """
        with self._database.writing() as connection:
            detail: dict[str, Any] = _row(connection, key, locked=True).detail
            if name not in detail:
                connection.execute(update(JOB).where(JOB.c.key == key).values(detail={**detail, name: value}))
            noted: dict[str, Any] = detail.get(name, value)
            return noted

    def forgive(self, key: str) -> None:
        """Take one attempt of a running job back: its worker is told to stop, which is no fault of the job."""
        with self._database.writing() as connection:
            running = update(JOB).where(JOB.c.key == key, JOB.c.state == "running", JOB.c.attempts > 0)
            connection.execute(running.values(attempts=JOB.c.attempts - 1))

    def is_current(self, started: Job) -> bool:
        """Whether a job that `start` returned still runs and nobody has started it since."""
        this = (JOB.c.key == started.key) & (JOB.c.state == "running") & (JOB.c.started_at == started.started_at)
        with self._database.reading() as connection:
            return connection.execute(select(JOB.c.key).where(this)).one_or_none() is not None

    def postpone(self, key: str, reason: str) -> None:
        """Let a running job wait for its next try, with why; nothing happens if it has ended."""
        with self._database.writing() as connection:
            waiting = update(JOB).where(JOB.c.key == key, JOB.c.state == "running")
            connection.execute(waiting.values(**self._waits(connection, reason)))

    def explain_wait(self, connection: Connection, key: str, reason: str) -> None:
        """Let a job wait with this reason, in the caller's write transaction, whether it runs or waits already."""
        waiting = update(JOB).where(JOB.c.key == key, JOB.c.state.in_(_UNFINISHED))
        connection.execute(waiting.values(**self._waits(connection, reason)))

    def _waits(self, connection: Connection, reason: str) -> dict[str, Any]:
        since = func.coalesce(JOB.c.waiting_since, self._database.now(connection))
        return {"state": "queued", "reason_code": WAITING, "reason": reason, "progress": None, "waiting_since": since}

    def mend(self, connection: Connection, key: str) -> None:
        """Let a job that had failed be done after all, in the caller's write transaction: what it was for has come about late."""
        failed = update(JOB).where(JOB.c.key == key, JOB.c.state == "failed")
        connection.execute(failed.values(state="done", reason_code=None, reason=None))

    def progress(self, key: str, share: float) -> bool:
        """Note how much of a running job is done, 0..1; False, and nothing changed, if it doesn't run."""
        with self._database.writing() as connection:
            running = update(JOB).where(JOB.c.key == key, JOB.c.state == "running")
            return bool(connection.execute(running.values(progress=share)).rowcount)

    def urgent(self, kind: JobKind, waited_seconds: float) -> Job | None:
        """Return the queued STAT job of this kind that has waited longest, if for longer than `waited_seconds`.

        One that waits for its next try isn't meant.
        """
        statement = select(JOB).where(
            JOB.c.kind == kind, JOB.c.state == "queued", JOB.c.priority == "stat",
            JOB.c.reason_code.is_distinct_from(WAITING),
        )  # fmt: skip
        with self._database.reading() as connection:
            before = self._database.now(connection) - timedelta(seconds=waited_seconds)
            row = connection.execute(
                statement.where(JOB.c.created_at < before).order_by(JOB.c.created_at, JOB.c.key).limit(1)
            ).one_or_none()
        return _job(row) if row else None

    def set_priority(self, key: str, priority: Priority) -> None:
        """Change the priority of a job. Raises Conflict if there is no such job."""
        with self._database.writing() as connection:
            if not connection.execute(update(JOB).where(JOB.c.key == key).values(priority=priority)).rowcount:
                raise Conflict(f"there is no job {key}")

    def requeue(self, key: str, *, connection: Connection | None = None) -> None:
        """Make a job as if it had never been tried; what it failed to deliver waits again. Raises Conflict if there is none.

        With `connection` this is part of the caller's write transaction.
        """
        fresh = {
            "state": "queued",
            "attempts": 0,
            "reason_code": None,
            "reason": None,
            "started_at": None,
            "ended_at": None,
            "progress": None,
            "waiting_since": None,
            "in_backlog": False,
        }
        with nullcontext(connection) if connection is not None else self._database.writing() as transaction:
            if not transaction.execute(update(JOB).where(JOB.c.key == key).values(**fresh)).rowcount:
                raise Conflict(f"there is no job {key}")
            failed = update(DELIVERY).where(DELIVERY.c.job_key == key, DELIVERY.c.state == "failed")
            transaction.execute(failed.values(state="waiting", next_at=None, refusals=0))

    def next_run(self, connection: Connection, study_instance_uid: str, revision: int, package: str) -> int:
        """Return the run after the last of this revision and package, whatever its version; 1 if there was none.

        In the caller's write transaction, which may have created some.
        """
        statement = select(func.max(JOB.c.run)).where(
            JOB.c.study_instance_uid == study_instance_uid, JOB.c.revision == revision, JOB.c.package == package
        )
        return (connection.execute(statement).scalar_one() or 0) + 1

    def add_results(self, connection: Connection, results: Sequence[Result]) -> None:
        """Add result objects in the caller's write transaction; those whose SOP Instance UID is there stay as they were."""
        for result in results:
            values = {
                "sop_instance_uid": result.sop_instance_uid,
                "sop_class_uid": result.sop_class_uid,
                "transfer_syntax_uid": result.transfer_syntax_uid,
                "modality": result.modality,
                "study_instance_uid": result.study_instance_uid,
                "job_key": result.job_key,
                "object_id": result.stored.object_id,
                "sha256": result.stored.sha256,
                "size": result.stored.size,
                "created_at": result.created_at,
                "series_instance_uid": result.series_instance_uid,
                "series_number": result.series_number,
                "series_description": result.series_description,
                "instance_number": result.instance_number,
            }
            self._database.insert_new(connection, RESULT, values)

    def results(self, *, study_instance_uid: str | None = None, job_key: str | None = None) -> list[Result]:
        """Return the result objects of a study, of a job, or all, oldest first; none that was removed."""
        statement = (
            select(RESULT)
            .where(RESULT.c.removed_at.is_(None))
            .order_by(RESULT.c.created_at, RESULT.c.modality.desc(), RESULT.c.sop_instance_uid)
        )
        for column, value in ((RESULT.c.study_instance_uid, study_instance_uid), (RESULT.c.job_key, job_key)):
            if value is not None:
                statement = statement.where(column == value)
        with self._database.reading() as connection:
            return [_result(row) for row in connection.execute(statement)]

    def standing_results(self, job_key: str) -> list[Result]:
        """Return the results that stand for a job: its own, or those of the job that it was carried over from."""
        job = self.job(job_key)
        return self.results(job_key=job_key if job is None or job.carried_from is None else job.carried_from)

    def unnamed_results(self) -> list[Result]:
        """Return the results whose series wasn't kept yet when they were made."""
        with self._database.reading() as connection:
            return [_result(row) for row in connection.execute(select(RESULT).where(RESULT.c.series_instance_uid.is_(None)))]

    def name_result(
        self, sop_instance_uid: str, *, series_instance_uid: str, series_number: int, series_description: str, instance_number: int
    ) -> None:
        """Keep which series a result is in, so that queries find it."""
        values = {
            "series_instance_uid": series_instance_uid,
            "series_number": series_number,
            "series_description": series_description,
            "instance_number": instance_number,
        }
        with self._database.writing() as connection:
            connection.execute(update(RESULT).where(RESULT.c.sop_instance_uid == sop_instance_uid).values(**values))

    def add_deliveries(
        self,
        connection: Connection,
        job_key: str,
        peer: str,
        sop_instance_uids: Collection[str],
        ways: Mapping[str, Sequence[tuple[str, Sequence[str]]]] | None = None,
    ) -> None:
        """Note in the caller's write transaction that these results are to reach the peer; known ones stay as they were.

        `ways` tells of some what else could be sent in their place: themselves and their alternatives, with what each refers to.
        """
        for uid in sop_instance_uids:
            values = {"sop_instance_uid": uid, "peer": peer, "job_key": job_key, "state": "waiting", "attempts": 0}
            values["ways"] = [[way, list(refers_to)] for way, refers_to in (ways or {}).get(uid, ())]
            self._database.insert_new(connection, DELIVERY, values)

    def deliveries(self, *, study_instance_uid: str | None = None, job_key: str | None = None) -> list[Delivery]:
        """Return the deliveries of a study's results, of a deliver job, or all."""
        statement = select(DELIVERY).join(RESULT).order_by(DELIVERY.c.peer, RESULT.c.created_at, RESULT.c.sop_instance_uid)
        for column, value in ((RESULT.c.study_instance_uid, study_instance_uid), (DELIVERY.c.job_key, job_key)):
            if value is not None:
                statement = statement.where(column == value)
        with self._database.reading() as connection:
            return [delivery(row) for row in connection.execute(statement)]

    def record_delivery(
        self,
        sop_instance_uid: str,
        peer: str,
        *,
        state: DeliveryState,
        status: int | None = None,
        error: str | None = None,
        next_at: datetime | None = None,
        sent_as: tuple[str, str] | None = None,
        note: str | None = None,
    ) -> None:
        """Note how one try to send one result ended, and what went in its place (SOP Class and SOP Instance UID).

        The time of the first success stays.

        Raises:
            Conflict: no such delivery was noted.
        """
        values: dict[str, Any] = {"state": state, "attempts": DELIVERY.c.attempts + 1, "status": status, "error": error, "next_at": next_at}
        with self._database.writing() as connection:
            if state == "sent":
                values |= {"sent_class": sent_as and sent_as[0], "sent_as": sent_as and sent_as[1], "note": note}
                values["sent_at"] = func.coalesce(DELIVERY.c.sent_at, self._database.now(connection))
            this = (DELIVERY.c.sop_instance_uid == sop_instance_uid) & (DELIVERY.c.peer == peer)
            if not connection.execute(update(DELIVERY).where(this).values(values)).rowcount:
                raise Conflict(f"{sop_instance_uid} is not on its way to {peer}")


def _row(connection: Connection, key: str, *, locked: bool = False) -> Row[Any]:
    """A job's row; locked, nobody else changes it before the transaction ends."""
    statement = select(JOB).where(JOB.c.key == key)
    row = connection.execute(statement.with_for_update() if locked else statement).one_or_none()
    if row is None:
        raise Conflict(f"there is no job {key}")
    return row


def _job(row: Row[Any]) -> Job:
    return Job(
        key=row.key,
        kind=row.kind,
        study_instance_uid=row.study_instance_uid,
        revision=row.revision,
        package=row.package,
        version=row.version,
        digest=row.digest,
        run=row.run,
        peer=row.peer,
        to_ae_titles=tuple(row.to_ae_titles),
        report_refusals=row.report_refusals,
        priority=row.priority,
        state=row.state,
        attempts=row.attempts,
        reason_code=row.reason_code,
        reason=row.reason,
        detail=row.detail,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        progress=row.progress,
        objects={peer: tuple(kinds) for peer, kinds in row.objects.items()},
        waiting_since=row.waiting_since,
        in_backlog=row.in_backlog,
    )


def _result(row: Row[Any]) -> Result:
    return Result(
        sop_instance_uid=row.sop_instance_uid,
        sop_class_uid=row.sop_class_uid,
        transfer_syntax_uid=row.transfer_syntax_uid,
        modality=row.modality,
        study_instance_uid=row.study_instance_uid,
        job_key=row.job_key,
        stored=StoredObject(object_id=row.object_id, sha256=row.sha256, size=row.size),
        created_at=row.created_at,
        series_instance_uid=row.series_instance_uid,
        series_number=row.series_number,
        series_description=row.series_description,
        instance_number=row.instance_number,
    )


def delivery(row: Row[Any]) -> Delivery:
    """Make the record of a row of the table delivery."""
    return Delivery(
        sop_instance_uid=row.sop_instance_uid,
        peer=row.peer,
        job_key=row.job_key,
        state=row.state,
        attempts=row.attempts,
        status=row.status,
        error=row.error,
        next_at=row.next_at,
        sent_at=row.sent_at,
        transaction_uid=row.transaction_uid,
        refusals=row.refusals,
        committed_at=row.committed_at,
        ways=tuple((way, tuple(refers_to)) for way, refers_to in row.ways),
        sent_as=row.sent_as,
        sent_class=row.sent_class,
        note=row.note,
    )
