"""Work items of the worklist (Unified Procedure Step, PS3.4 annex CC): each stands for an analysis, or waits for its study.

A work item without a job waits for the next revision of its study; one with a job is what its job is. A state that is final stays: an
analysis that is done again gets another work item. Must never build SQL from a key's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, case, func, literal, or_, select, union, update

from storage.database import Database
from storage.query import Conditions, folded
from storage.records import Job, Priority, ProcedureState, Subscription, WorkItem
from storage.schema import JOB, PATIENT, STUDY, WORKITEM
from storage.subscriptions import FILTERED, GLOBAL

_STATE: Final[Any] = func.coalesce(WORKITEM.c.state, JOB.c.state, "queued")
_STARTED: Final[Any] = case(
    (WORKITEM.c.state.is_(None), func.coalesce(WORKITEM.c.started_at, JOB.c.started_at)), else_=WORKITEM.c.started_at
)
_PROCEDURE_STATE: Final[Any] = case(
    (and_(_STATE == "queued", _STARTED.is_(None)), "SCHEDULED"),
    (_STATE.in_(("queued", "running")), "IN PROGRESS"),
    (_STATE == "done", "COMPLETED"),
    else_="CANCELED",
)
_PRIORITY: Final[Any] = func.coalesce(JOB.c.priority, WORKITEM.c.priority)
# The study's own word counts before its requester's, once the node holds it.
_OF_PATIENT: Final[Mapping[str, Any]] = {
    "PatientName": func.coalesce(PATIENT.c.patient_name, WORKITEM.c.patient_name),
    "PatientID": func.coalesce(PATIENT.c.patient_id, WORKITEM.c.patient_id),
    "PatientBirthDate": func.coalesce(STUDY.c.birth_date, WORKITEM.c.birth_date),
    "PatientSex": func.coalesce(STUDY.c.sex, WORKITEM.c.sex),
    "AccessionNumber": func.coalesce(STUDY.c.accession_number, WORKITEM.c.accession_number),
}
# What a search matches, with the kinds of matching of storage/query.py.
_MATCHED: Final[Mapping[str, tuple[str, Any]]] = {
    "SOPInstanceUID": ("uid", WORKITEM.c.uid),
    "StudyInstanceUID": ("uid", WORKITEM.c.study_instance_uid),
    "ReferencedRequestSequence.StudyInstanceUID": ("uid", WORKITEM.c.study_instance_uid),
    "ReferencedRequestSequence.AccessionNumber": ("text", _OF_PATIENT["AccessionNumber"]),
    "ReferencedRequestSequence.RequestedProcedureID": ("text", WORKITEM.c.requested_procedure_id),
    "PatientName": ("name", func.coalesce(PATIENT.c.folded_name, WORKITEM.c.folded_name)),
    "PatientID": ("text", _OF_PATIENT["PatientID"]),
    "PatientBirthDate": ("date", _OF_PATIENT["PatientBirthDate"]),
    "PatientSex": ("text", _OF_PATIENT["PatientSex"]),
    "ProcedureStepState": ("text", _PROCEDURE_STATE),
    "ProcedureStepLabel": ("text", WORKITEM.c.label),
    "WorklistLabel": ("text", WORKITEM.c.worklist_label),
    "ScheduledProcedureStepPriority": ("text", case((_PRIORITY == "stat", "HIGH"), else_="MEDIUM")),
    "ScheduledProcedureStepStartDateTime": ("datetime", WORKITEM.c.scheduled_at),
    "ScheduledWorkitemCodeSequence.CodeValue": ("text", WORKITEM.c.package),
    "InputReadinessState": ("text", case((and_(_STATE == "queued", WORKITEM.c.job_key.is_(None)), "UNREADY"), else_="READY")),
}
MATCHED: Final = frozenset(_MATCHED)


class WorkItems:
    """The table workitem. Any number of threads and processes may use it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lock(self, connection: Connection, study_instance_uid: str) -> None:
        """Let nobody else schedule or begin work on a study until the caller's write transaction ends."""
        self._database.lock(connection, f"workitems/{study_instance_uid}")

    def add(self, connection: Connection, item: WorkItem) -> bool:
        """Add a work item that waits for its study, in the caller's write transaction; False, and nothing changed, if its UID exists.

        Of `item` what tells how it goes on is not looked at.
        """
        patient = item.patient
        values = {
            "uid": item.uid,
            "study_instance_uid": item.study_instance_uid,
            "requester": item.requester,
            "package": item.package,
            "version": item.version,
            "priority": item.priority,
            "to_ae_titles": list(item.to_ae_titles),
            "label": item.label,
            "worklist_label": item.worklist_label,
            "scheduled_at": item.scheduled_at,
            "created_at": self._database.now(connection),
            "requested": dict(item.requested),
            "patient_name": patient.get("PatientName", ""),
            "folded_name": folded(patient.get("PatientName", "")),
            "patient_id": patient.get("PatientID", ""),
            "birth_date": patient.get("PatientBirthDate", ""),
            "sex": patient.get("PatientSex", ""),
            "accession_number": patient.get("AccessionNumber", ""),
            "requested_procedure_id": item.requested_procedure_id,
        }
        return self._database.insert_new(connection, WORKITEM, values) is not None

    def add_for(self, connection: Connection, uid: str, job: Job, *, label: str, worklist_label: str) -> None:
        """Add the work item of a job that no peer asked for, in the caller's write transaction; a known UID stays as it was."""
        columns = ("study_instance_uid", "package", "version", "priority")
        values = {name: getattr(job, name) for name in columns} | {"uid": uid, "job_key": job.key, "label": label}
        values |= {"worklist_label": worklist_label, "scheduled_at": job.created_at, "created_at": self._database.now(connection)}
        self._database.insert_new(connection, WORKITEM, values)

    def begin(self, connection: Connection, uid: str, job_key: str) -> None:
        """Let a waiting work item stand for a job, in the caller's write transaction."""
        connection.execute(update(WORKITEM).where(WORKITEM.c.uid == uid, WORKITEM.c.state.is_(None)).values(job_key=job_key))

    def part_from(self, connection: Connection, job: Job) -> int:
        """Let the work item of a job that ended, and is done again, stay as it is; return how many the job has had by now.

        In the caller's write transaction.
        """
        values = {name: getattr(job, name) for name in ("state", "started_at", "ended_at", "reason_code", "reason")}
        connection.execute(update(WORKITEM).where(WORKITEM.c.job_key == job.key, WORKITEM.c.state.is_(None)).values(values))
        count: int = connection.execute(select(func.count()).where(WORKITEM.c.job_key == job.key)).scalar_one()
        return count

    def keep_start(self, connection: Connection, job: Job) -> None:
        """Note when a job was begun that is going to wait as if it had never been, in the caller's write transaction.

        Its work item is in progress all the same: no state goes back.
        """
        if job.started_at is not None and job.ended_at is None:
            current = (WORKITEM.c.job_key == job.key, WORKITEM.c.state.is_(None), WORKITEM.c.started_at.is_(None))
            connection.execute(update(WORKITEM).where(*current).values(started_at=job.started_at))

    def end(self, connection: Connection, uid: str, reason: str) -> bool:
        """Cancel a work item that waits for its study, in the caller's write transaction; False if it doesn't wait."""
        waiting = update(WORKITEM).where(WORKITEM.c.uid == uid, WORKITEM.c.state.is_(None), WORKITEM.c.job_key.is_(None))
        values = {"state": "cancelled", "ended_at": self._database.now(connection), "reason_code": "cancelled", "reason": reason}
        return bool(connection.execute(waiting.values(values)).rowcount)

    def job_of(self, connection: Connection, uid: str) -> str | None:
        """Return the key of the job that a work item stands for now, in the caller's write transaction."""
        current = select(WORKITEM.c.job_key).where(WORKITEM.c.uid == uid, WORKITEM.c.state.is_(None))
        return connection.execute(current).scalar_one_or_none()

    def note_request_to_cancel(self, connection: Connection, uid: str, request: Mapping[str, Any]) -> None:
        """Keep who had a work item cancelled, and why, in the caller's write transaction."""
        values = {"cancel": dict(request), "cancel_at": self._database.now(connection)}
        connection.execute(update(WORKITEM).where(WORKITEM.c.uid == uid).values(values))

    def waiting(self, connection: Connection, study_instance_uid: str) -> list[WorkItem]:
        """Return the work items that wait for a study, oldest first, in the caller's write transaction."""
        waits = (WORKITEM.c.study_instance_uid == study_instance_uid, WORKITEM.c.state.is_(None), WORKITEM.c.job_key.is_(None))
        return [_item(row) for row in connection.execute(_select().where(*waits))]

    def of_study(self, study_instance_uid: str) -> list[WorkItem]:
        """Return the work items of a study, oldest first, whether the node holds it or not."""
        with self._database.reading() as connection:
            rows = connection.execute(_select().where(WORKITEM.c.study_instance_uid == study_instance_uid))
            return [_item(row) for row in rows]

    def item(self, uid: str) -> WorkItem | None:
        """Return the work item with this UID."""
        with self._database.reading() as connection:
            row = connection.execute(_select().where(WORKITEM.c.uid == uid)).one_or_none()
        return _item(row) if row else None

    def find(self, keys: Mapping[str, str], *, limit: int, offset: int = 0) -> list[WorkItem]:
        """Return the work items that match all keys, oldest first; of `keys` those that are not in MATCHED are ignored.

        Raises:
            BadQuery: a key's value can't be matched.
        """
        statement = _select().where(*self._matching(keys))
        with self._database.reading() as connection:
            return [_item(row) for row in connection.execute(statement.limit(limit).offset(offset))]

    def unlisted_jobs(self, limit: int) -> list[str]:
        """Return the keys of analyses that no work item stands for: those created before there were any."""
        listed = select(literal(1)).where(WORKITEM.c.job_key == JOB.c.key).exists()
        statement = select(JOB.c.key).where(JOB.c.kind == "analyse", ~listed).order_by(JOB.c.created_at, JOB.c.key)
        with self._database.reading() as connection:
            return list(connection.execute(statement.limit(limit)).scalars())

    def changed(self, subscription: Subscription, since: datetime | None) -> list[WorkItem]:
        """Return what a subscription is about, of work items that changed since then or are being worked on; without a time all of them.

        Raises:
            BadQuery: a key of the subscription can't be matched.
        """
        statement = _select()
        if since is not None:
            begun = and_(JOB.c.state == "queued", or_(JOB.c.created_at >= since, JOB.c.started_at >= since))
            jobs = or_(JOB.c.state == "running", begun, JOB.c.ended_at >= since)
            changed = union(  # by an index each: whoever watches asks every second
                select(WORKITEM.c.uid).where(WORKITEM.c.created_at >= since),
                select(WORKITEM.c.uid).where(WORKITEM.c.ended_at >= since),
                select(WORKITEM.c.uid).join_from(JOB, WORKITEM, WORKITEM.c.job_key == JOB.c.key).where(jobs),
            )
            statement = statement.where(WORKITEM.c.uid.in_(changed))
        if subscription.target == FILTERED:
            statement = statement.where(*self._matching(subscription.keys))
        elif subscription.target != GLOBAL:
            statement = statement.where(WORKITEM.c.uid == subscription.target)
        if subscription.suspended_at is not None:
            statement = statement.where(WORKITEM.c.created_at <= subscription.suspended_at)
        with self._database.reading() as connection:
            return [_item(row) for row in connection.execute(statement)]

    def _matching(self, keys: Mapping[str, str]) -> Iterator[Any]:
        conditions = Conditions(self._database, keys, kinds={keyword: kind for keyword, (kind, _) in _MATCHED.items()})
        return conditions.on({keyword: column for keyword, (_, column) in _MATCHED.items()})


def _select() -> Any:
    """All that is known of work items, oldest first."""
    return (
        select(
            WORKITEM,
            _PROCEDURE_STATE.label("procedure_state"),
            _STARTED.label("begun_at"),
            _PRIORITY.label("current_priority"),
            *(column.label(f"known_{keyword}") for keyword, column in _OF_PATIENT.items()),
            func.coalesce(WORKITEM.c.state, JOB.c.state).label("outcome"),
            JOB.c.version.label("job_version"),
            JOB.c.to_ae_titles.label("job_to_ae_titles"),
            JOB.c.revision,
            JOB.c.progress,
            JOB.c.created_at.label("job_created_at"),
            JOB.c.ended_at.label("job_ended_at"),
            JOB.c.reason_code.label("job_reason_code"),
            JOB.c.reason.label("job_reason"),
            STUDY.c.study_id,
            func.coalesce(STUDY.c.holds, literal(False)).label("held"),
        )
        .select_from(WORKITEM)
        .outerjoin(JOB, JOB.c.key == WORKITEM.c.job_key)
        .outerjoin(STUDY, STUDY.c.study_instance_uid == WORKITEM.c.study_instance_uid)
        .outerjoin(PATIENT, PATIENT.c.id == STUDY.c.patient_row)
        .order_by(WORKITEM.c.created_at, WORKITEM.c.uid)
    )


def _item(row: Row[Any]) -> WorkItem:
    own = row.state is not None  # it parted from its job, or never had one
    state: ProcedureState = row.procedure_state
    priority: Priority = row.current_priority
    times: Sequence[datetime | None] = (
        row.created_at, row.cancel_at, row.job_created_at, row.begun_at, row.ended_at, None if own else row.job_ended_at,
    )  # fmt: skip
    return WorkItem(
        uid=row.uid,
        study_instance_uid=row.study_instance_uid,
        requester=row.requester,
        package=row.package,
        version=row.job_version or row.version,
        priority=priority,
        to_ae_titles=tuple(row.job_to_ae_titles or row.to_ae_titles),
        label=row.label,
        worklist_label=row.worklist_label,
        scheduled_at=row.scheduled_at,
        created_at=row.created_at,
        requested=row.requested,
        patient={keyword: getattr(row, f"known_{keyword}") or "" for keyword in _OF_PATIENT},
        requested_procedure_id=row.requested_procedure_id,
        state=state,
        job_key=row.job_key,
        parted=own,
        revision=row.revision,
        started_at=row.begun_at,
        outcome=row.outcome,
        ended_at=row.ended_at if own else row.job_ended_at,
        reason_code=row.reason_code if own else row.job_reason_code,
        reason=row.reason if own else row.job_reason,
        progress=None if own else row.progress,
        cancel=row.cancel,
        changed_at=max(time for time in times if time is not None),
        held=bool(row.held),
    )
