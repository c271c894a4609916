"""What has been received: patient, study, series, instance, the revisions of each study, and the quarantine.

An *image that counts* is one of an image SOP class that this node did not make itself: it alone makes a revision.
Whoever adds an instance or closes a revision holds the study's row lock until the commit, so a revision's content is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, func, select, update

from storage.arriving import Arriving, Outcome
from storage.database import Database
from storage.errors import Conflict
from storage.records import Arrival, Instance, InstanceHeader, Plane, Priority, Quarantined, Revision, Series, StoredObject, Study
from storage.schema import INSTANCE, MISSING, PATIENT, QUARANTINE, RESULT, REVISION, SERIES, STUDY

KEPT_PER_UID = 10  # contract 2: copies in quarantine of one SOP Instance UID
_BATCH = 500


class Index:
    """The index of received instances. Any number of threads and processes may use it."""

    def __init__(self, database: Database):
        self._database = database
        self._arriving = Arriving(database)

    def find(self, sop_instance_uid: str) -> Instance | None:
        """Return the stored instance with this UID."""
        with self._database.reading() as connection:
            row = connection.execute(_select_instances().where(INSTANCE.c.sop_instance_uid == sop_instance_uid)).one_or_none()
        return _instance(row) if row else None

    def find_all(self, sop_instance_uids: Sequence[str]) -> dict[str, Instance]:
        """Return the stored instances with these UIDs, by UID."""
        found = {}
        with self._database.reading() as connection:
            for start in range(0, len(sop_instance_uids), _BATCH):
                batch = sop_instance_uids[start : start + _BATCH]
                for row in connection.execute(_select_instances().where(INSTANCE.c.sop_instance_uid.in_(batch))):
                    found[row.sop_instance_uid] = _instance(row)
        return found

    def holds(self, header: InstanceHeader) -> bool:
        """Return whether the same content (equal data set bytes in the same transfer syntax) is stored under this UID."""
        with self._database.reading() as connection:
            return self._arriving.is_known(connection, header)

    def add_instance(self, header: InstanceHeader, stored: StoredObject) -> Outcome:
        """Add the row of one stored object, as `add_instances` does."""
        return self.add_instances([(header, stored)])[0]

    def add_instances(self, batch: Sequence[tuple[InstanceHeader, StoredObject]]) -> list[Outcome]:
        """Add the rows of stored objects in one transaction, each unless its SOP Instance UID is there already.

        "duplicate" (same data set bytes, same transfer syntax) and "conflict" leave the index as it was: the caller
        removes the object or moves it to quarantine. Of several callers with one UID, and of several in one batch,
        exactly one gets "stored".
        """
        for _ in range(len(batch) + 1):  # each time one more of the UIDs is known
            with self._database.writing() as connection:
                outcomes = self._arriving.add(connection, batch)
                if outcomes is None or "stored" not in outcomes:
                    connection.rollback()
            if outcomes is not None:
                return outcomes
        raise Conflict("an object id is used by another instance")

    def quarantine(
        self,
        *,
        sop_instance_uid: str,
        study_instance_uid: str | None,
        calling_ae_title: str,
        dimse_status: int,
        reason: str,
        stored: StoredObject | None,
    ) -> bool:
        """Note an object that was not accepted; return whether its file is kept (else the caller removes it).

        One copy is kept per UID and digest, and ten per UID. What is not kept is one row per UID and status that counts
        its repeats, so that a peer that tries for ever fills nothing.
        """
        values: dict[str, Any] = {
            "sop_instance_uid": sop_instance_uid,
            "study_instance_uid": study_instance_uid,
            "calling_ae_title": calling_ae_title,
            "dimse_status": dimse_status,
            "reason": reason,
            "repeats": 0,
        }
        same_uid = QUARANTINE.c.sop_instance_uid == sop_instance_uid
        with self._database.writing() as connection:
            self._database.lock(connection, f"quarantine {sop_instance_uid!a}")
            values["received_at"] = self._database.now(connection)
            kept = dict(
                connection.execute(select(QUARANTINE.c.sha256, QUARANTINE.c.id).where(same_uid, QUARANTINE.c.object_id.is_not(None))).all()
            )
            if stored and stored.sha256 not in kept and len(kept) < KEPT_PER_UID:
                connection.execute(QUARANTINE.insert().values(**values, **_stored_values(stored)))
                return True
            same = and_(same_uid, QUARANTINE.c.object_id.is_(None), QUARANTINE.c.dimse_status == dimse_status)
            if stored and stored.sha256 in kept:
                same = QUARANTINE.c.id == kept[stored.sha256]
            again = update(QUARANTINE).where(same).values(repeats=QUARANTINE.c.repeats + 1)
            if not connection.execute(again).rowcount:
                connection.execute(QUARANTINE.insert().values(**values))
            return False

    def quarantined(self, study_instance_uid: str | None = None) -> list[Quarantined]:
        """Return what was not accepted, of one study or of all, oldest first."""
        statement = select(QUARANTINE).order_by(QUARANTINE.c.id)
        if study_instance_uid is not None:
            statement = statement.where(QUARANTINE.c.study_instance_uid == study_instance_uid)
        with self._database.reading() as connection:
            rows = connection.execute(statement).all()
        return [
            Quarantined(
                id=row.id,
                sop_instance_uid=row.sop_instance_uid,
                study_instance_uid=row.study_instance_uid,
                calling_ae_title=row.calling_ae_title,
                dimse_status=row.dimse_status,
                reason=row.reason,
                received_at=row.received_at,
                stored=_stored(row) if row.object_id else None,
                repeats=row.repeats,
            )
            for row in rows
        ]

    def mark_released(self, study_instance_uids: Collection[str]) -> None:
        """Note that an association that brought images of these studies was released just now."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            for uid in sorted(study_instance_uids):  # in one order everywhere, so that row locks never wait in a ring
                connection.execute(update(STUDY).where(STUDY.c.study_instance_uid == uid).values(released_at=now))

    def studies(self, limit: int = 1000) -> list[Study]:
        """Return the studies that received something last, newest first."""
        with self._database.reading() as connection:
            rows = connection.execute(_select_studies().order_by(STUDY.c.last_received_at.desc(), STUDY.c.id).limit(limit)).all()
        return [_study(row) for row in rows]

    def study(self, study_instance_uid: str) -> Study | None:
        """Return one study."""
        with self._database.reading() as connection:
            row = connection.execute(_select_studies().where(STUDY.c.study_instance_uid == study_instance_uid)).one_or_none()
        return _study(row) if row else None

    def studies_of(self, patient_id: str) -> list[Study]:
        """Return the studies that came under this Patient ID, whatever their patient's name, newest study date first."""
        statement = _select_studies().where(PATIENT.c.patient_id == patient_id).order_by(STUDY.c.study_date.desc(), STUDY.c.id.desc())
        with self._database.reading() as connection:
            return [_study(row) for row in connection.execute(statement)]

    def series(self, study_instance_uid: str) -> list[Series]:
        """Return the series of a study in the order of their numbers."""
        count = select(func.count()).where(INSTANCE.c.series_row == SERIES.c.id).scalar_subquery()
        statement = (
            select(SERIES, STUDY.c.study_instance_uid, count.label("instances"))
            .join(STUDY)
            .where(STUDY.c.study_instance_uid == study_instance_uid)
            .order_by(SERIES.c.series_number.is_(None), SERIES.c.series_number, SERIES.c.id)
        )
        with self._database.reading() as connection:
            rows = connection.execute(statement).all()
        return [
            Series(
                series_instance_uid=row.series_instance_uid,
                study_instance_uid=row.study_instance_uid,
                modality=row.modality,
                series_number=row.series_number,
                series_description=row.series_description,
                instances=row.instances,
            )
            for row in rows
        ]

    def revisions(self, study_instance_uid: str) -> list[Revision]:
        """Return the closed revisions of a study, first to last."""
        statement = select(REVISION).where(REVISION.c.study_instance_uid == study_instance_uid).order_by(REVISION.c.number)
        with self._database.reading() as connection:
            return [_revision(row) for row in connection.execute(statement)]

    def instances(self, study_instance_uid: str, revision: int | None = None) -> list[Instance]:
        """Return the instances of a study in the order of arrival; with `revision`, the images that it holds and nothing else."""
        statement = _select_instances().where(STUDY.c.study_instance_uid == study_instance_uid).order_by(INSTANCE.c.id)
        with self._database.reading() as connection:
            if revision is not None:
                this = and_(REVISION.c.study_instance_uid == study_instance_uid, REVISION.c.number == revision)
                known = connection.execute(select(REVISION.c.last_image, REVISION.c.series).where(this)).one_or_none()
                if known is None:
                    return []
                statement = statement.where(_counts(), INSTANCE.c.id <= known.last_image)
                if known.series is not None:
                    statement = statement.where(SERIES.c.series_instance_uid.in_(known.series))
            return [_instance(row) for row in connection.execute(statement)]

    def receiving(self) -> list[Study]:
        """Return the studies that have images newer than their last closed revision, longest silent first."""
        statement = _select_studies().where(STUDY.c.last_image > STUDY.c.closed_image).order_by(STUDY.c.last_received_at)
        with self._database.reading() as connection:
            return [_study(row) for row in connection.execute(statement)]

    def arrivals(self, study_instance_uid: str) -> list[Arrival]:
        """Return what came of each series that has images that count, in the order of their first image."""
        statement = (
            select(
                SERIES.c.series_instance_uid, SERIES.c.modality, func.count().label("images"),
                func.max(INSTANCE.c.received_at).label("last_received_at"),
            )
            .join_from(INSTANCE, SERIES)
            .join(STUDY, INSTANCE.c.study_row == STUDY.c.id)
            .where(_images_of(study_instance_uid))
            .group_by(SERIES.c.id)
            .order_by(func.min(INSTANCE.c.id))
        )  # fmt: skip
        with self._database.reading() as connection:
            return [Arrival(**row._mapping) for row in connection.execute(statement)]

    def planes(self, study_instance_uid: str, series: Collection[str] | None = None) -> list[Plane]:
        """Return where each image of the study, or of some of its series, that counts lies, in the order of arrival."""
        of_series = SERIES.c.series_instance_uid, SERIES.c.series_number, SERIES.c.modality
        image = INSTANCE.c.instance_number, INSTANCE.c.acquisition_number, INSTANCE.c.images_in_acquisition
        statement = (
            select(*of_series, *image, INSTANCE.c.orientation, INSTANCE.c.position)
            .join_from(INSTANCE, SERIES)
            .join(STUDY, INSTANCE.c.study_row == STUDY.c.id)
            .where(_images_of(study_instance_uid))
            .order_by(INSTANCE.c.id)
        )
        if series is not None:
            statement = statement.where(SERIES.c.series_instance_uid.in_(series))
        with self._database.reading() as connection:
            rows = connection.execute(statement).all()
        return [Plane(**{**row._mapping, "orientation": row.orientation or ""}) for row in rows]

    def absent(self, sop_instance_uids: Collection[str]) -> set[str]:
        """Return those of the UIDs under which nothing was received, and no result was made here."""
        with self._database.reading() as connection:
            return set(sop_instance_uids) - self._arriving.known(connection, sop_instance_uids)

    def callers(self, study_instance_uid: str) -> list[tuple[str, str]]:
        """Return the distinct (calling, called) AE titles that brought the images of the study: a revision holds all of them.

        A peer that brought none before it was asked for images that were missing doesn't count: no route holds for the study by that.
        """
        statement = (
            select(INSTANCE.c.calling_ae_title, INSTANCE.c.called_ae_title).distinct().join(STUDY).where(_images_of(study_instance_uid))
        )
        asked = select(MISSING.c.peer).where(MISSING.c.study_instance_uid == study_instance_uid, MISSING.c.sent_before.is_(False))
        with self._database.reading() as connection:
            every = sorted((calling, called) for calling, called in connection.execute(statement))
            helping = set(connection.execute(asked).scalars()) if len(every) > 1 else set()
        return [caller for caller in every if caller[0] not in helping] or every

    def requested_priority(self, study_instance_uid: str) -> Priority:
        """Return "stat" if an image of the study asks for it, else "routine"."""
        is_stat = and_(_images_of(study_instance_uid), INSTANCE.c.requested_priority == "stat")
        statement = select(func.count()).select_from(INSTANCE).join(STUDY).where(is_stat)
        with self._database.reading() as connection:
            return "stat" if connection.execute(statement).scalar_one() else "routine"

    def close_revision(
        self,
        connection: Connection,
        study_instance_uid: str,
        *,
        seen_last_received_at: datetime,
        evidence: str,
        outcome: str,
        facts: Mapping[str, Any] | None = None,
    ) -> Revision | None:
        """Close the next revision in the caller's write transaction, so that its jobs are created in the same one.

        `facts` is what was evident, as JSON has it.

        None, and nothing changed, if an image arrived since the caller looked, or if no image is new.

        Raises:
            Conflict: there is no such study.
        """
        study = _locked_study(connection, study_instance_uid)
        if study.last_received_at != seen_last_received_at or study.last_image <= study.closed_image:
            return None
        connection.execute(update(STUDY).where(STUDY.c.id == study.id).values(closed_image=study.last_image))
        return self._add_revision(connection, study, evidence=evidence, outcome=outcome, facts=facts or {}, series=None)

    def begin_revision(
        self,
        connection: Connection,
        study_instance_uid: str,
        *,
        seen_images: Mapping[str, int],
        evidence: str,
        outcome: str,
        facts: Mapping[str, Any],
    ) -> Revision | None:
        """Make the next revision of some series alone, in the caller's write transaction: the study stays open, others still come.

        `seen_images` says how many images that count each of these series had when the caller looked.

        None, and nothing changed, if that has changed.

        Raises:
            Conflict: there is no such study.
        """
        study = _locked_study(connection, study_instance_uid)
        count = (
            select(SERIES.c.series_instance_uid, func.count())
            .join_from(INSTANCE, SERIES)
            .where(SERIES.c.study_row == study.id, SERIES.c.series_instance_uid.in_(seen_images), _counts())
            .group_by(SERIES.c.series_instance_uid)
        )
        if dict(connection.execute(count).all()) != seen_images:
            return None
        return self._add_revision(connection, study, evidence=evidence, outcome=outcome, facts=facts, series=tuple(sorted(seen_images)))

    def _add_revision(
        self,
        connection: Connection,
        study: Row[Any],
        *,
        evidence: str,
        outcome: str,
        facts: Mapping[str, Any],
        series: tuple[str, ...] | None,
    ) -> Revision:
        """Add the next revision of a study whose row is locked."""
        revision = Revision(
            study_instance_uid=study.study_instance_uid,
            number=study.revision + 1,
            closed_at=self._database.now(connection),
            evidence=evidence,
            outcome=outcome,
            facts=facts,
            series=series,
        )
        connection.execute(
            REVISION.insert().values(
                study_instance_uid=revision.study_instance_uid,
                number=revision.number,
                last_image=study.last_image,
                closed_at=revision.closed_at,
                evidence=evidence,
                outcome=outcome,
                facts=facts,
                series=None if series is None else list(series),
            )
        )
        connection.execute(update(STUDY).where(STUDY.c.id == study.id).values(revision=revision.number))
        return revision

    def is_known(self, object_ids: Sequence[str]) -> set[str]:
        """Return those of the object ids that a row of an instance, a result or the quarantine names.

        What is not among them no transaction that is running now will name either: not even one of a process that is
        dead, or whose connection broke, and whose commit the server is still at.
        """
        known: set[str] = set()
        with self._database.writing() as connection:
            self._database.wait_for_writers(connection, (INSTANCE, RESULT, QUARANTINE))
            for start in range(0, len(object_ids), _BATCH):
                batch = object_ids[start : start + _BATCH]
                for table in (INSTANCE, RESULT, QUARANTINE):
                    known.update(connection.execute(select(table.c.object_id).where(table.c.object_id.in_(batch))).scalars())
        return known


def _locked_study(connection: Connection, study_instance_uid: str) -> Row[Any]:
    study = connection.execute(select(STUDY).where(STUDY.c.study_instance_uid == study_instance_uid).with_for_update()).one_or_none()
    if study is None:
        raise Conflict(f"there is no study {study_instance_uid}")
    return study


def _counts() -> ColumnElement[bool]:
    return and_(INSTANCE.c.kind == "image", INSTANCE.c.made_here.is_(False))


def _images_of(study_instance_uid: str) -> ColumnElement[bool]:
    return and_(STUDY.c.study_instance_uid == study_instance_uid, _counts())


def _select_instances() -> Select[Any]:
    return (
        select(INSTANCE, SERIES.c.series_instance_uid, STUDY.c.study_instance_uid)
        .join_from(INSTANCE, SERIES)
        .join(STUDY, INSTANCE.c.study_row == STUDY.c.id)
    )


def _select_studies() -> Select[Any]:
    count = select(func.count()).where(INSTANCE.c.study_row == STUDY.c.id).scalar_subquery()
    return select(STUDY, PATIENT.c.patient_id, PATIENT.c.patient_name, count.label("instances")).join_from(STUDY, PATIENT)


def _stored_values(stored: StoredObject) -> dict[str, Any]:
    return {"object_id": stored.object_id, "sha256": stored.sha256, "size": stored.size}


def _stored(row: Row[Any]) -> StoredObject:
    return StoredObject(object_id=row.object_id, sha256=row.sha256, size=row.size)


def _instance(row: Row[Any]) -> Instance:
    return Instance(
        sop_instance_uid=row.sop_instance_uid,
        sop_class_uid=row.sop_class_uid,
        transfer_syntax_uid=row.transfer_syntax_uid,
        series_instance_uid=row.series_instance_uid,
        study_instance_uid=row.study_instance_uid,
        kind=row.kind,
        made_here=row.made_here,
        instance_number=row.instance_number,
        calling_ae_title=row.calling_ae_title,
        called_ae_title=row.called_ae_title,
        note=row.note,
        received_at=row.received_at,
        stored=_stored(row),
    )


def _study(row: Row[Any]) -> Study:
    return Study(
        study_instance_uid=row.study_instance_uid,
        patient_id=row.patient_id,
        patient_name=row.patient_name,
        study_date=row.study_date,
        study_description=row.study_description,
        accession_number=row.accession_number,
        instances=row.instances,
        revision=row.revision,
        state="receiving" if row.last_image > row.closed_image else "closed",
        first_received_at=row.first_received_at,
        last_received_at=row.last_received_at,
        released_at=row.released_at,
        holds=row.holds,
        removed_at=row.removed_at,
        removed_why=row.removed_why,
    )


def _revision(row: Row[Any]) -> Revision:
    return Revision(
        study_instance_uid=row.study_instance_uid,
        number=row.number,
        closed_at=row.closed_at,
        evidence=row.evidence,
        outcome=row.outcome,
        facts=row.facts,
        series=None if row.series is None else tuple(row.series),
    )
