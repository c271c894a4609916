"""Rows of objects that come in: patient, study, series and instance, each made once, whoever else makes it at the same time.

Who adds an instance holds its study's row lock until the commit. Must never add a row under a SOP Instance UID that has one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, and_, bindparam, null, select, union_all, update

from storage.database import Database
from storage.query import folded
from storage.records import InstanceHeader, StoredObject
from storage.schema import INSTANCE, PATIENT, RESULT, SERIES, STUDY
from storage.statements import Statement

Outcome = Literal["stored", "duplicate", "conflict"]

_SAME_CONTENT = select(INSTANCE.c.sha256, INSTANCE.c.transfer_syntax_uid).where(INSTANCE.c.sop_instance_uid == bindparam("uid"))
_COUNT_IMAGES = (
    update(STUDY).where(STUDY.c.id == bindparam("row_id")).values(last_image=bindparam("image"), last_received_at=bindparam("at"))
)


class _Statements:
    """The statements that every image needs, compiled once for a database."""

    def __init__(self, database: Database) -> None:
        engine = database.engine
        self.same_content = Statement(engine, _SAME_CONTENT)
        self.count_images = Statement(engine, _COUNT_IMAGES)
        of_instance = select(INSTANCE.c.sop_instance_uid, INSTANCE.c.sha256, INSTANCE.c.transfer_syntax_uid, INSTANCE.c.object_id)
        of_result = select(RESULT.c.sop_instance_uid, null(), null(), null())
        known = union_all(
            of_instance.where(database.is_one_of(INSTANCE.c.sop_instance_uid, "uids")),
            of_result.where(database.is_one_of(RESULT.c.sop_instance_uid, "uids")),
        )
        self.known = Statement(engine, known)  # (SOP Instance UID, digest, transfer syntax, object id), the last three of an instance alone
        wanted = and_(SERIES.c.study_row == STUDY.c.id, database.is_one_of(SERIES.c.series_instance_uid, "series"))
        series = SERIES.c.id.label("series_row"), SERIES.c.series_instance_uid
        lock = (
            select(STUDY.c.id, STUDY.c.study_instance_uid, STUDY.c.last_received_at, STUDY.c.holds, *series)
            .outerjoin_from(STUDY, SERIES, wanted)
            .where(database.is_one_of(STUDY.c.study_instance_uid, "studies"))
            .order_by(STUDY.c.study_instance_uid)
            .with_for_update(of=STUDY)
        )
        self.lock_studies = Statement(engine, lock)  # (row, UID, last received at, holds, series row, its UID)
        columns = [column.name for column in INSTANCE.c if column is not INSTANCE.c.id]
        self.insert_instance = Statement(engine, database.inserting_new(INSTANCE, INSTANCE.c.id), columns)


class _StudyRow(NamedTuple):
    """A study's row, locked, and the rows of those of its series that matter, by UID."""

    row_id: int
    last_received_at: datetime
    holds: bool
    series: dict[str, int]


class Arriving:
    """Adds rows of stored objects, in transactions of its callers."""

    def __init__(self, database: Database):
        self._database = database
        self._statements = _Statements(database)

    def is_known(self, connection: Connection, header: InstanceHeader) -> bool:
        """Return whether the same content (equal data set bytes in the same transfer syntax) is stored under this UID."""
        row = self._statements.same_content.first(connection, {"uid": header.sop_instance_uid})
        return row == (header.dataset_sha256, header.transfer_syntax_uid)

    def known(self, connection: Connection, sop_instance_uids: Collection[str]) -> set[str]:
        """Return those of the UIDs under which something was received, or a result was made here."""
        return {row[0] for row in self._statements.known.all(connection, {"uids": list(sop_instance_uids)})}

    def add(self, connection: Connection, batch: Sequence[tuple[InstanceHeader, StoredObject]]) -> list[Outcome] | None:
        """Add what is new. None if another transaction, not seen before, was first with one of the UIDs: then all has to be undone."""
        known: dict[str, tuple[str, str, str]] = {}
        made_here: set[str] = set()
        for uid, sha256, syntax, object_id in self._statements.known.all(
            connection, {"uids": [header.sop_instance_uid for header, _ in batch]}
        ):
            if object_id is None:
                made_here.add(uid)
            else:
                known[uid] = (sha256, syntax, object_id)
        outcomes: list[Outcome] = []
        new = []
        for header, stored in batch:
            outcome = _outcome(header, stored, known.get(header.sop_instance_uid))
            if header.sop_instance_uid not in known:
                known[header.sop_instance_uid] = (header.dataset_sha256, header.transfer_syntax_uid, stored.object_id)
                new.append((header, stored))
            outcomes.append(outcome)
        if not new:
            return outcomes
        studies = self._locked_studies(connection, [header for header, _ in new])
        now = self._database.now(connection)
        rows: list[dict[str, Any]] = []
        for header, stored in new:
            study = studies[header.study_instance_uid]
            rows.append(
                {
                    "study_row": study.row_id,
                    "series_row": study.series.get(header.series_instance_uid) or self._new_series_row(connection, study, header),
                    "sop_instance_uid": header.sop_instance_uid,
                    "sop_class_uid": header.sop_class_uid,
                    "transfer_syntax_uid": header.transfer_syntax_uid,
                    "kind": header.kind,
                    "made_here": header.sop_instance_uid in made_here,
                    "instance_number": header.instance_number,
                    "requested_priority": header.requested_priority,
                    "calling_ae_title": header.calling_ae_title,
                    "called_ae_title": header.called_ae_title,
                    "note": header.note,
                    "received_at": _after(now, study.last_received_at),
                    "object_id": stored.object_id,
                    "sha256": header.dataset_sha256,
                    "size": stored.size,
                    "acquisition_number": header.acquisition_number,
                    "images_in_acquisition": header.images_in_acquisition,
                    "orientation": header.orientation,
                    "position": header.position,
                }
            )
        row_ids: dict[str, int] = {}
        for row in rows:
            inserted = self._statements.insert_instance.first(connection, row)
            if inserted is None:
                return None
            row_ids[row["sop_instance_uid"]] = inserted[0]
        last_images = {
            row["study_row"]: {"row_id": row["study_row"], "image": row_ids[row["sop_instance_uid"]], "at": row["received_at"]}
            for row in rows
            if row["kind"] == "image" and not row["made_here"]
        }
        for last_image in last_images.values():
            self._statements.count_images.first(connection, last_image)
        if again := [study.row_id for study in studies.values() if not study.holds]:  # their objects had been removed
            connection.execute(update(STUDY).where(STUDY.c.id.in_(again)).values(holds=True))
        return outcomes

    def _locked_studies(self, connection: Connection, headers: Sequence[InstanceHeader]) -> dict[str, _StudyRow]:
        """Return the studies' rows, made if absent, with their series, locked until the transaction ends."""
        first_of = {header.study_instance_uid: header for header in reversed(headers)}
        series = list({header.series_instance_uid for header in headers})
        studies = self._lock_studies(connection, list(first_of), series)
        missing = [header for uid, header in sorted(first_of.items()) if uid not in studies]
        if missing:
            now = self._database.now(connection)
            patients = {key: self._patient_row(connection, key) for key in sorted({(h.patient_id, h.patient_name) for h in missing})}
            for header in missing:
                values = {
                    "patient_row": patients[header.patient_id, header.patient_name],
                    "study_instance_uid": header.study_instance_uid,
                    "study_date": header.study_date,
                    "study_description": header.study_description,
                    "accession_number": header.accession_number,
                    "first_received_at": now,
                    "last_received_at": now,
                    "last_image": 0,
                    "closed_image": 0,
                    "revision": 0,
                    "study_time": header.study_time,
                    "study_id": header.study_id,
                    "referring_physician": header.referring_physician,
                    "birth_date": header.birth_date,
                    "sex": header.sex,
                }
                self._database.insert_new(connection, STUDY, values)
            studies |= self._lock_studies(connection, [header.study_instance_uid for header in missing], series)
        return studies

    def _lock_studies(self, connection: Connection, studies: Sequence[str], series: Sequence[str]) -> dict[str, _StudyRow]:
        """Lock those of the studies that exist, in one order everywhere, so that locks never wait in a ring."""
        found: dict[str, _StudyRow] = {}
        for row_id, uid, last_received_at, holds, series_row, series_uid in self._statements.lock_studies.all(
            connection, {"studies": studies, "series": series}
        ):
            study = found.setdefault(uid, _StudyRow(row_id, last_received_at, bool(holds), {}))
            if series_row is not None:
                study.series[series_uid] = series_row
        return found

    def _patient_row(self, connection: Connection, id_and_name: tuple[str, str]) -> int:
        patient_id, patient_name = id_and_name
        same = select(PATIENT.c.id).where(PATIENT.c.patient_id == patient_id, PATIENT.c.patient_name == patient_name)
        values = {"patient_id": patient_id, "patient_name": patient_name, "folded_name": folded(patient_name)}
        row_id = connection.execute(same).scalar_one_or_none() or self._database.insert_new(connection, PATIENT, values)
        return int(row_id or connection.execute(same).scalar_one())

    def _new_series_row(self, connection: Connection, study: _StudyRow, header: InstanceHeader) -> int:
        """Make the series; who held the study's lock before us may have made it after our snapshot."""
        values = {
            "study_row": study.row_id,
            "series_instance_uid": header.series_instance_uid,
            "modality": header.modality,
            "series_number": header.series_number,
            "series_description": header.series_description,
            "body_part": header.body_part,
        }
        same = select(SERIES.c.id).where(SERIES.c.study_row == study.row_id, SERIES.c.series_instance_uid == header.series_instance_uid)
        row_id = self._database.insert_new(connection, SERIES, values) or connection.execute(same).scalar_one()
        study.series[header.series_instance_uid] = int(row_id)
        return int(row_id)


def _outcome(header: InstanceHeader, stored: StoredObject, known: tuple[str, str, str] | None) -> Outcome:
    """Compare with the row of this UID: (digest, transfer syntax, object id)."""
    if known is None or known[2] == stored.object_id:  # the row is ours if an earlier try was committed and its answer lost
        return "stored"
    return "duplicate" if known[:2] == (header.dataset_sha256, header.transfer_syntax_uid) else "conflict"


def _after(now: datetime, last: datetime) -> datetime:
    """Return `now`, made different from the last time: "nothing arrived since" is judged by equality."""
    return now + timedelta(microseconds=1) if now == last else now
