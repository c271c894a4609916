"""What could be removed of what is held, and removing a study's objects: rows first, in one transaction, then files.

Must never decide what may go: it says what is known of a study, and removes it only if all of that is still so. What the removed rows
named stands in the table `removal` until the files are gone, so no crash leaves a file that nobody knows or a row whose file is gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Connection, and_, case, delete, func, insert, or_, select, update

from storage.database import Database
from storage.objects import ObjectStore
from storage.schema import (
    COMMITMENT,
    COMMITMENT_REQUEST,
    DELIVERY,
    INSTANCE,
    JOB,
    PATIENT,
    REMOVAL,
    RESULT,
    REVISION,
    SERIES,
    STUDY,
)

_BATCH = 200
_UNFINISHED = ("queued", "running")
_OPEN = ("asking", "waiting")  # states of a commitment whose answer is awaited


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What is held of one study, and what is known of it that bears on whether it may go."""

    study_instance_uid: str
    patient_id: str
    study_date: str
    touched_at: datetime  # when the last object came, or a job ended, whichever was later
    objects: int
    size: int  # bytes
    last_image: int
    last_instance: int
    receiving: bool  # images came since the last closed revision
    busy: bool  # a job of it, or a commitment by a peer, isn't finished, or a peer waits for our commitment to it
    patient_busy: bool  # another study of the patient is received or has unfinished jobs: this one may be its prior
    analysed: bool  # an analysis of its last revision has ended with a result or with a reason
    # Studies of the patient that are held, were analysed and come after it by study date; None where it isn't one of them. It may change
    # while one after the other is removed.
    later: int | None = field(compare=False)
    stat: bool  # a job of it is urgent, or an image asks for it
    waiting_for: tuple[str, ...]  # peers that haven't taken all of its results
    sent_to: tuple[str, ...]  # peers that have taken results and committed to none, or not to all


class Retention:
    """Holdings, oldest first, and their removal. Any number of threads and processes may use it."""

    def __init__(self, database: Database, objects: ObjectStore) -> None:
        self._database = database
        self._objects = objects

    def held_bytes(self) -> int:
        """Return how many bytes the objects of all studies have, by their rows."""
        with self._database.reading() as connection:
            images = connection.execute(select(func.coalesce(func.sum(INSTANCE.c.size), 0))).scalar_one()
            results = connection.execute(
                select(func.coalesce(func.sum(RESULT.c.size), 0)).where(RESULT.c.removed_at.is_(None))
            ).scalar_one()
        return int(images) + int(results)

    def holdings(self, until: datetime | None = None) -> Iterator[Holding]:
        """Yield every study that holds objects and, with `until`, had its last image by then; the longest without a new one first."""
        after: tuple[datetime, int] | None = None
        while True:
            statement = select(STUDY.c.id, STUDY.c.last_received_at).where(STUDY.c.holds)
            if until is not None:
                statement = statement.where(STUDY.c.last_received_at <= until)
            if after is not None:
                same_time = and_(STUDY.c.last_received_at == after[0], STUDY.c.id > after[1])
                statement = statement.where(or_(STUDY.c.last_received_at > after[0], same_time))
            with self._database.reading() as connection:
                rows = connection.execute(statement.order_by(STUDY.c.last_received_at, STUDY.c.id).limit(_BATCH)).all()
                found = _holdings(connection, [row.id for row in rows])
            if not rows:
                return
            after = rows[-1].last_received_at, rows[-1].id
            yield from (found[row.id] for row in rows if row.id in found)

    def remove(self, seen: Holding, why: str) -> bool:
        """Remove the objects of a study, unless anything about it isn't any more as it was seen; return whether they are removed.

        When this returns True their rows are gone for good, and so are the files but for those that `finish` has still to try.
        """
        with self._database.writing() as connection:
            of_study = STUDY.c.study_instance_uid == seen.study_instance_uid
            row_id = connection.execute(select(STUDY.c.id).where(of_study).with_for_update()).scalar_one_or_none()
            # Who creates a job refers to a revision, and waits until this transaction ends; so does who takes one up again.
            for table in (JOB, REVISION):  # in the order in which a job's end locks them
                connection.execute(select(table).where(table.c.study_instance_uid == seen.study_instance_uid).with_for_update()).all()
            if row_id is None or _holdings(connection, [row_id]).get(row_id) != seen:
                return False
            images = INSTANCE.c.study_row == row_id
            results = and_(RESULT.c.study_instance_uid == seen.study_instance_uid, RESULT.c.removed_at.is_(None))
            now = self._database.now(connection)
            for table, these in ((INSTANCE, images), (RESULT, results)):
                connection.execute(insert(REMOVAL).from_select(["object_id"], select(table.c.object_id).where(these)))
            connection.execute(delete(INSTANCE).where(images))
            connection.execute(delete(SERIES).where(SERIES.c.study_row == row_id))
            connection.execute(update(RESULT).where(results).values(removed_at=now))
            connection.execute(update(STUDY).where(STUDY.c.id == row_id).values(holds=False, removed_at=now, removed_why=why))
        self.finish()
        return True

    def finish(self) -> int:
        """Remove the files that no row names any more, as a process that died may have left them; return how many can't be removed now."""
        failed: set[str] = set()
        while True:
            with self._database.reading() as connection:
                statement = select(REMOVAL.c.object_id).where(REMOVAL.c.object_id.not_in(failed)).limit(_BATCH)
                object_ids = list(connection.execute(statement).scalars())
            if not object_ids:
                return len(failed)
            for object_id in object_ids:
                try:
                    self._objects.remove(object_id)
                except OSError:
                    failed.add(object_id)
            with self._database.writing() as connection:
                connection.execute(delete(REMOVAL).where(REMOVAL.c.object_id.in_([one for one in object_ids if one not in failed])))

    def unfinished(self) -> int:
        """Return how many files are still to be removed whose rows are gone."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(REMOVAL)).scalar_one())


def _holdings(connection: Connection, rows: Sequence[int]) -> dict[int, Holding]:
    """What is held of these studies, by row."""
    columns = (STUDY.c.id, STUDY.c.study_instance_uid, STUDY.c.patient_row, STUDY.c.study_date, STUDY.c.last_received_at)
    of_studies = select(*columns, STUDY.c.last_image, STUDY.c.closed_image, STUDY.c.revision, PATIENT.c.patient_id)
    studies = connection.execute(of_studies.join_from(STUDY, PATIENT).where(STUDY.c.id.in_(rows), STUDY.c.holds)).all()
    uids = {study.study_instance_uid: study.id for study in studies}
    urgent = func.max(case((INSTANCE.c.requested_priority == "stat", 1), else_=0))
    counts = func.count(), func.sum(INSTANCE.c.size), func.max(INSTANCE.c.id), func.max(INSTANCE.c.received_at), urgent
    of_images = select(INSTANCE.c.study_row, *counts).where(INSTANCE.c.study_row.in_(rows)).group_by(INSTANCE.c.study_row)
    images = {row[0]: tuple(row[1:]) for row in connection.execute(of_images)}
    mine = and_(RESULT.c.study_instance_uid.in_(uids), RESULT.c.removed_at.is_(None))
    of_results = select(RESULT.c.study_instance_uid, func.count(), func.sum(RESULT.c.size)).where(mine)
    results = {uid: (count, size) for uid, count, size in connection.execute(of_results.group_by(RESULT.c.study_instance_uid))}
    jobs = defaultdict(list)
    of_jobs = JOB.c.study_instance_uid, JOB.c.kind, JOB.c.revision, JOB.c.state, JOB.c.priority, JOB.c.ended_at
    for job in connection.execute(select(*of_jobs).where(JOB.c.study_instance_uid.in_(uids))):
        jobs[job.study_instance_uid].append(job)
    peers: dict[tuple[str, str], set[str]] = defaultdict(set)
    ways = select(RESULT.c.study_instance_uid, DELIVERY.c.state, DELIVERY.c.peer).join_from(DELIVERY, RESULT).where(mine).distinct()
    for uid, state, peer in connection.execute(ways):
        peers[uid, state].add(peer)
    awaited = _awaited(connection, uids)
    asked = _asked(connection)
    patients = _patients_at_work(connection, {study.patient_id for study in studies})
    ranks = _ranks(connection, {study.patient_id for study in studies})
    found = {}
    for study in studies:
        uid = study.study_instance_uid
        count, size, last_instance, newest, is_urgent = images.get(study.id, (0, 0, 0, None, 0))
        times = [study.last_received_at, newest, *(job.ended_at for job in jobs[uid])]
        ended = [job.state for job in jobs[uid] if job.kind == "analyse" and job.revision == study.revision]
        found[study.id] = Holding(
            study_instance_uid=uid,
            patient_id=study.patient_id,
            study_date=study.study_date,
            touched_at=max(time for time in times if time is not None),
            objects=count + results.get(uid, (0, 0))[0],
            size=int(size) + int(results.get(uid, (0, 0))[1]),
            last_image=study.last_image,
            last_instance=last_instance,
            receiving=study.last_image > study.closed_image,
            busy=uid in awaited or study.id in asked or any(job.state in _UNFINISHED for job in jobs[uid]),
            patient_busy=bool(patients.get(study.patient_id, set()) - {uid}),
            later=ranks.get(uid),
            analysed=any(state in {"done", "refused"} for state in ended),
            stat=bool(is_urgent) or any(job.priority == "stat" for job in jobs[uid]),
            waiting_for=tuple(sorted(peers[uid, "waiting"] | peers[uid, "failed"])),
            sent_to=tuple(sorted(peers[uid, "sent"])),
        )
    return found


def _awaited(connection: Connection, uids: Mapping[str, int]) -> set[str]:
    """Which of the studies a peer has been asked to commit to, without an answer yet."""
    statement = select(JOB.c.study_instance_uid).join_from(COMMITMENT, JOB).where(COMMITMENT.c.state.in_(_OPEN))
    return set(connection.execute(statement.where(JOB.c.study_instance_uid.in_(uids))).scalars())


def _asked(connection: Connection) -> set[int]:
    """The rows of the studies of which peers have asked us to commit to something, and wait for our report."""
    waiting = select(COMMITMENT_REQUEST.c.references).where(COMMITMENT_REQUEST.c.state == "waiting")
    named = [uid for references in connection.execute(waiting).scalars() for _, uid in references]
    rows: set[int] = set()
    for start in range(0, len(named), _BATCH):
        batch = INSTANCE.c.sop_instance_uid.in_(named[start : start + _BATCH])
        rows.update(connection.execute(select(INSTANCE.c.study_row).where(batch)).scalars())
    return rows


def _ranks(connection: Connection, patient_ids: set[str]) -> dict[str, int]:
    """Of each of these patients, but of none without an ID, the studies that are held and have been analysed, the newest numbered 0."""
    known = and_(PATIENT.c.patient_id.in_(patient_ids), PATIENT.c.patient_id != "", STUDY.c.holds)
    of_patients = select(PATIENT.c.patient_id, STUDY.c.study_instance_uid).join_from(STUDY, PATIENT).where(known)
    studies = connection.execute(of_patients.order_by(STUDY.c.study_date.desc(), STUDY.c.id.desc())).all()
    # Their jobs by study alone: asked for those that are done, SQLite would go through all that ever were.
    of_jobs = select(JOB.c.study_instance_uid, JOB.c.kind, JOB.c.state).where(JOB.c.study_instance_uid.in_([uid for _, uid in studies]))
    analysed = {uid for uid, kind, state in connection.execute(of_jobs) if (kind, state) == ("analyse", "done")}
    ranks: dict[str, int] = {}
    counted: dict[str, int] = defaultdict(int)
    for patient_id, uid in studies:
        if uid in analysed:
            ranks[uid] = counted[patient_id]
            counted[patient_id] += 1
    return ranks


def _patients_at_work(connection: Connection, patient_ids: set[str]) -> dict[str, set[str]]:
    """Of each of these patients, but of none without an ID, the studies that are received now or have unfinished jobs."""
    known = and_(PATIENT.c.patient_id.in_(patient_ids), PATIENT.c.patient_id != "")
    of_patient = select(PATIENT.c.patient_id, STUDY.c.study_instance_uid).join_from(STUDY, PATIENT).where(known)
    unfinished = select(JOB.c.study_instance_uid).where(JOB.c.state.in_(_UNFINISHED))
    at_work = or_(STUDY.c.last_image > STUDY.c.closed_image, STUDY.c.study_instance_uid.in_(unfinished))
    found: dict[str, set[str]] = defaultdict(set)
    for patient_id, uid in connection.execute(of_patient.where(at_work)):
        found[patient_id].add(uid)
    return found
