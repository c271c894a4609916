"""Studies in a storage as they are after their analysis: images, a closed revision, jobs, a result, its delivery."""

from __future__ import annotations

import hashlib
import itertools
from datetime import UTC, datetime

from storage import Storage
from storage.records import DeliveryState, InstanceHeader, JobState, Peer, Priority, Result

CT, SEG, CAPTURE = (f"1.2.840.10008.5.1.4.1.1.{ending}" for ending in ("2", "66.4", "7"))
PACS = Peer(ae_title="PACS", host="127.0.0.1", port=104, sends=False, receives=True, tls=False, client_cert=None)
_NUMBERS = itertools.count(1)


def header_of(
    study: str, number: int, *, patient: str = "P", content: bytes = b"DICM", uid: str = "", sop_class: str = CT
) -> InstanceHeader:
    """The header of an image of a study."""
    return InstanceHeader(
        sop_instance_uid=uid or f"{study}.1.{number}", sop_class_uid=sop_class, transfer_syntax_uid="1.2.840.10008.1.2.1",
        series_instance_uid=f"{study}.1", study_instance_uid=study, dataset_sha256=hashlib.sha256(content).hexdigest(), kind="image",
        modality="CT", instance_number=number, patient_id=patient, patient_name="Doe^Jane", study_date="20260101", study_description="",
        accession_number="", series_number=1, series_description="", requested_priority="routine", calling_ae_title="SCANNER",
        called_ae_title="NODE",
    )  # fmt: skip


def receive(storage: Storage, study: str, *numbers: int, patient: str = "P", content: bytes = b"DICM") -> list[str]:
    """Store images of a study; return how each ended."""
    return [
        storage.index.add_instance(header_of(study, n, patient=patient, content=content), storage.objects.put(content)) for n in numbers
    ]


def close(storage: Storage, study: str) -> int:
    """Close the study's next revision; return its number."""
    known = storage.index.study(study)
    assert known is not None
    with storage.database.writing() as connection:
        closed = storage.index.close_revision(
            connection, study, seen_last_received_at=known.last_received_at, evidence="quiet", outcome="1 job(s)"
        )
    assert closed is not None
    return closed.number


def create_job(storage: Storage, study: str, revision: int = 1, *, kind: str = "analyse", priority: Priority = "routine") -> str:
    """Create a job, queued; return its key."""
    key = f"{kind}/{study}/{revision}"
    with storage.database.writing() as connection:
        storage.jobs.create(
            connection, key=key, kind="analyse" if kind == "analyse" else "deliver", study_instance_uid=study, revision=revision,
            package="lung", version="1.0", digest="d", run=1, priority=priority, peer=None if kind == "analyse" else PACS.ae_title,
        )  # fmt: skip
    return key


def hold(
    storage: Storage, *, patient: str = "", images: int = 2, content: bytes = b"DICM", priority: Priority = "routine",
    analysis: JobState | None = "done", delivery: DeliveryState | None = "sent", deliver_state: JobState = "done",
) -> str:  # fmt: skip
    """Receive a study and let its jobs end; return its UID. Without `patient` it is a patient's of its own."""
    number = next(_NUMBERS)
    study = f"1.2.826.0.1.3680043.8.498.7.{number}"
    receive(storage, study, *range(1, images + 1), patient=patient or f"P{number}", content=content)
    revision = close(storage, study)
    if analysis is None:
        return study
    key = create_job(storage, study, revision, priority=priority)
    if analysis == "done" and delivery is not None:
        result = Result(
            sop_instance_uid=f"{study}.9", sop_class_uid=CAPTURE, transfer_syntax_uid="1.2.840.10008.1.2.1", modality="OT",
            study_instance_uid=study, job_key=key, stored=storage.objects.put(b"RESULT"), created_at=datetime.now(UTC),
            series_instance_uid=f"{study}.8",
        )  # fmt: skip
        deliver = create_job(storage, study, revision, kind="deliver")
        with storage.database.writing() as connection:
            storage.jobs.add_results(connection, [result])
            storage.jobs.add_deliveries(connection, deliver, PACS.ae_title, [result.sop_instance_uid])
        if delivery != "waiting":
            storage.jobs.record_delivery(result.sop_instance_uid, PACS.ae_title, state=delivery)
        if deliver_state != "queued":
            storage.jobs.finish(deliver, deliver_state)
    if analysis not in {"queued", "running"}:
        storage.jobs.finish(key, analysis)
    return study
