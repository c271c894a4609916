"""What a job's report refers to beside its own images: the reports that it takes the place of.

Found once for a job and kept in its row, so that a job done again says the same, whatever arrived or went meanwhile.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.findings import Reference, RunIdentity
from dicomnode.results.identity import object_uid
from storage import Storage
from storage.records import Job, Result

SUPERSEDES = "supersedes"  # names of what a job's row keeps


def identity_of(job: Job) -> RunIdentity:
    """Return what the UIDs and dates of the job's results derive from."""
    return RunIdentity(
        study_instance_uid=job.study_instance_uid, revision=job.revision, package=job.package, version=job.version,
        digest=job.digest, run=job.run, created_at=job.created_at,
    )  # fmt: skip


def superseded(storage: Storage, job: Job) -> tuple[Reference, ...]:
    """Return the reports that those of the job take the place of: of the same package, on the study's former revision or run.

    In the order in which a run makes them: of one class the one on the BINARY segmentation first. Empty where there are none.
    """
    if SUPERSEDES not in job.detail:
        found = {"reports": [asdict(reference) for reference in _former_reports(storage, job)]}
        return _references(storage.jobs.remember(job.key, SUPERSEDES, found))
    return _references(job.detail[SUPERSEDES])


def _references(noted: dict[str, list[dict[str, str]]]) -> tuple[Reference, ...]:
    return tuple(Reference(**reference) for reference in noted["reports"])


def _former_reports(storage: Storage, job: Job) -> list[Reference]:
    """The reports of the last run before this one that made any, whatever its version and however it ended."""
    same = [other for other in storage.jobs.jobs(study_instance_uid=job.study_instance_uid, kind="analyse") if other.package == job.package]
    before = [other for other in same if (other.revision, other.run) < (job.revision, job.run)]
    for former in sorted(before, key=lambda other: (other.revision, other.run), reverse=True):
        results = [result for result in storage.jobs.results(job_key=former.key) if result.modality == "SR"]
        identity = identity_of(former)
        results.sort(key=lambda result: (result.sop_class_uid, result.sop_instance_uid != first_of(result, identity)))
        references = [reference for result in results if (reference := reference_to(storage.objects.path(result.stored.object_id)))]
        if references:
            return references
    return []


def first_of(result: Result, identity: RunIdentity) -> str:
    """Return the UID of the first report of the result's class that a run makes."""
    return object_uid(identity, result.sop_class_uid, ExplicitVRLittleEndian)


def reference_to(file: Path) -> Reference | None:
    """Return the names of a stored object; None if it isn't there any more or cannot be read."""
    try:
        named = pydicom.dcmread(file, specific_tags=["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"])
        return Reference(
            sop_class_uid=str(named.SOPClassUID), sop_instance_uid=str(named.SOPInstanceUID),
            series_instance_uid=str(named.SeriesInstanceUID), study_instance_uid=str(named.StudyInstanceUID),
        )  # fmt: skip
    except (OSError, InvalidDicomError, AttributeError):
        return None
