"""What a job's report refers to beside its own images: the reports that it takes the place of, and an earlier study of the patient.

Found once for a job and kept in its row, so that a job done again says the same, whatever arrived or went meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage, ExplicitVRLittleEndian, SegmentationStorage

from dicomnode.analysis.alignment import align
from dicomnode.analysis.attributes import text_of
from dicomnode.analysis.decoding import Decoder
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import frames_of, read_headers
from dicomnode.analysis.geometry import stack_of
from dicomnode.analysis.growth import compare
from dicomnode.analysis.select import SelectedSeries
from dicomnode.analysis.volume import read_volume
from dicomnode.errors import AnalysisFailed, ProofFailed
from dicomnode.findings import Code, Findings, Prior, PriorFinding, Reference, RunIdentity, Volume
from dicomnode.results.former import read_former
from dicomnode.results.identity import object_uid
from storage import Storage
from storage.records import Instance, Job, Result

SUPERSEDES, PRIOR = "supersedes", "prior"  # names of what a job's row keeps
_CANDIDATE = "candidate"  # in the latter: which study was to be compared with, or why none was
_THINNED_MM = 4.0  # an alignment needs no thinner slices
_SAME_SPACE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))
_HEADER = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "IssuerOfPatientID", "PatientBirthDate",
    "StudyDate", "StudyTime", "AcquisitionDate", "FrameOfReferenceUID",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Former:
    """An earlier analysis that can be compared with."""

    study_instance_uid: str
    version: str
    images: Sequence[Instance]
    header: Dataset  # of one of them
    segmentation: Path | None  # None: nothing was found
    is_lost: bool  # something was found, and its segmentation is no more
    reports: tuple[Reference, ...]

    @property
    def begun(self) -> tuple[str, str]:
        return _begun(self.header)


class _NotComparable(Exception):
    """There is no earlier study to compare with; the message is a clause that says why."""


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
        references = _reports(storage, former, storage.jobs.results(job_key=former.key))
        if references:
            return references
    return []


def _reports(storage: Storage, job: Job, results: Sequence[Result]) -> list[Reference]:
    """The reports among a job's results: of one class the one on the BINARY segmentation first."""
    identity = identity_of(job)

    def order(result: Result) -> tuple[str, bool]:
        first = object_uid(identity, result.sop_class_uid, ExplicitVRLittleEndian)
        return result.sop_class_uid, result.sop_instance_uid != first

    reports = sorted((result for result in results if result.modality == "SR"), key=order)
    return [reference for result in reports if (reference := reference_to(storage.objects.path(result.stored.object_id)))]


def reference_to(file: Path) -> Reference | None:
    """Return the names of a stored object; None if it isn't there any more or cannot be read."""
    try:
        named = _read(file)
        return Reference(
            sop_class_uid=str(named.SOPClassUID), sop_instance_uid=str(named.SOPInstanceUID),
            series_instance_uid=str(named.SeriesInstanceUID), study_instance_uid=str(named.StudyInstanceUID),
        )  # fmt: skip
    except (OSError, InvalidDicomError, AttributeError):
        return None


def compared(
    storage: Storage,
    job: Job,
    findings: Findings,
    volume: Volume,
    headers: Sequence[Dataset],
    decoder: Decoder | None,
    *,
    not_fetched: str = "",
) -> Findings:
    """Return the findings compared with the patient's last earlier study that the job's package has analysed, or why they aren't.

    The same patient has the same Patient ID and issuer, and no other date of birth. Earlier is by Study Date and Time. `headers` are
    those of the volume. `not_fetched` says in a clause why none could be fetched, for a reader who misses one.
    """
    noted = job.detail.get(PRIOR)
    if noted is None:
        noted = _noted(storage, job, findings, volume, headers[0], decoder)
        if "reason" in noted and not_fetched:
            noted["reason"] = f"{noted['reason']}; {not_fetched}"
        noted = storage.jobs.remember(job.key, PRIOR, noted)
    if "reason" in noted:
        return replace(findings, not_compared=noted["reason"])
    return compare(findings, volume, _prior(noted))


def _noted(storage: Storage, job: Job, findings: Findings, volume: Volume, header: Dataset, decoder: Decoder | None) -> dict[str, Any]:
    """The prior study as data for the job's row, or the reason why there is none; with the study that was looked at, if one was."""
    if volume.is_projection:
        return {"reason": "one radiograph says nothing of where in the patient something lies"}
    if findings.scores and not findings.findings:
        return {"reason": "what was asked is about the whole image"}
    try:
        former = _last_before(storage, job, header, findings.algorithm_name)
    except _NotComparable as reason:
        return {"reason": str(reason), _CANDIDATE: str(reason)}
    try:
        return {**asdict(_made_of(storage, former, volume, header, decoder)), _CANDIDATE: _name_of(former)}
    except _NotComparable as reason:
        return {"reason": str(reason), _CANDIDATE: _name_of(former)}


def same_prior(storage: Storage, job: Job, former: Job, header: Dataset, algorithm_name: str) -> bool:
    """Whether the job would be compared with what `former`, of the same images, was; `header` is one of theirs."""
    noted = former.detail.get(PRIOR)
    if noted is None:
        return False
    if _CANDIDATE not in noted:  # no earlier study was looked for
        return True
    try:
        return bool(noted[_CANDIDATE] == _name_of(_last_before(storage, job, header, algorithm_name)))
    except _NotComparable as reason:
        return bool(noted[_CANDIDATE] == str(reason))


def _name_of(former: _Former) -> str:
    """What tells an earlier analysis from others: a later one of the same study is another one."""
    reports = sorted(report.sop_instance_uid for report in former.reports)
    lost = "lost" if former.is_lost else ""
    return " ".join([former.study_instance_uid, former.version, former.segmentation.name if former.segmentation else "-", lost, *reports])


def _made_of(storage: Storage, former: _Former, volume: Volume, header: Dataset, decoder: Decoder | None) -> Prior:
    there = former.header
    if former.is_lost:
        raise _NotComparable(f"the segmentation of the study of {_day(there)} is no more")
    try:
        found = read_former(former.segmentation.read_bytes()) if former.segmentation else ()
    except (OSError, ProofFailed):
        raise _NotComparable(f"the segmentation of the study of {_day(there)} can't be read") from None
    to_current, alignment = _alignment(storage, former.images, there, volume, decoder)
    return Prior(
        study_instance_uid=former.study_instance_uid,
        date=_day(there),
        days=_days(there, header),
        version=former.version,
        reports=former.reports,
        findings=tuple(finding for finding in found if finding.shape != "heat map"),
        to_current=to_current,
        alignment=alignment,
    )


def _last_before(storage: Storage, job: Job, header: Dataset, algorithm_name: str) -> _Former:
    """The last analysis by the package of the patient's latest earlier study: of this node's own, else by what it holds of one.

    The latter is an analysis that this node or another one made, whose SEG and reports came back, e.g. fetched from the PACS.
    """
    if not text_of(header, "PatientID").strip():
        raise _NotComparable("the images name no patient")
    if not text_of(header, "StudyDate"):
        raise _NotComparable("the study has no date")
    known = storage.index.study(job.study_instance_uid)
    earlier: list[_Former] = []
    for study in storage.index.studies_of(known.patient_id) if known else ():
        if study.study_instance_uid == job.study_instance_uid or (earlier and study.study_date < earlier[0].begun[0]):
            continue
        former = _by_job(storage, job, study.study_instance_uid) or _by_objects(storage, study.study_instance_uid, algorithm_name)
        if former is not None and _same_patient(former.header, header) and former.begun < _begun(header):
            earlier.append(former)
    if not earlier:
        raise _NotComparable(f"this node has analysed no earlier study of this patient with {job.package}")
    return max(earlier, key=lambda former: (former.begun, former.study_instance_uid))


def _by_job(storage: Storage, job: Job, study_instance_uid: str) -> _Former | None:
    """Return the last analysis that this node made of a study with the job's package; one that was carried over made nothing."""
    done = storage.jobs.jobs(study_instance_uid=study_instance_uid, kind="analyse", state="done")
    same = [other for other in done if other.package == job.package and other.carried_from is None]
    last = max(same, key=lambda other: (other.revision, other.run), default=None)
    if last is None:
        return None
    series = last.detail.get("series_instance_uid")
    images = [image for image in storage.index.instances(study_instance_uid, last.revision) if image.series_instance_uid == series]
    there = _header_of(storage, images)
    if there is None:
        return None
    results = storage.jobs.results(job_key=last.key)
    seg_uid = object_uid(identity_of(last), SegmentationStorage, ExplicitVRLittleEndian)
    files = [storage.objects.path(result.stored.object_id) for result in results if result.sop_instance_uid == seg_uid]
    return _Former(
        study_instance_uid=study_instance_uid, version=last.version, images=images, header=there, segmentation=files[0] if files else None,
        is_lost=bool(files) != bool(last.detail.get("findings")), reports=tuple(_reports(storage, last, results)),
    )  # fmt: skip


def _by_objects(storage: Storage, study_instance_uid: str, algorithm_name: str) -> _Former | None:
    """Return the newest SEG of an algorithm among the instances of a study, with the images that it is on and the reports that name it."""
    held = storage.index.instances(study_instance_uid)
    for instance in reversed([one for one in held if one.sop_class_uid == SegmentationStorage]):
        file = storage.objects.path(instance.stored.object_id)
        try:
            seg = pydicom.dcmread(file, specific_tags=["SegmentSequence", "ReferencedSeriesSequence"], stop_before_pixels=True)
            algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
            series, name, version = (
                str(seg.ReferencedSeriesSequence[0].SeriesInstanceUID),
                algorithm.AlgorithmName,
                algorithm.AlgorithmVersion,
            )
        except (OSError, InvalidDicomError, AttributeError, LookupError):
            continue
        images = [image for image in held if image.series_instance_uid == series and image.kind == "image"]
        there = _header_of(storage, images)
        if name == algorithm_name and there is not None:
            return _Former(
                study_instance_uid=study_instance_uid, version=str(version), images=images, header=there, segmentation=file, is_lost=False,
                reports=tuple(_reports_on(storage, held, instance.sop_instance_uid)),
            )  # fmt: skip
    return None


def _reports_on(storage: Storage, held: Sequence[Instance], seg_uid: str) -> Iterator[Reference]:
    """The reports among the instances whose evidence names a SEG."""
    for instance in held:
        file = storage.objects.path(instance.stored.object_id)
        if instance.sop_class_uid not in {Comprehensive3DSRStorage, ComprehensiveSRStorage}:
            continue
        with suppress(OSError, InvalidDicomError, AttributeError):
            studies = pydicom.dcmread(
                file, specific_tags=["CurrentRequestedProcedureEvidenceSequence"]
            ).CurrentRequestedProcedureEvidenceSequence
            named = {
                str(one.ReferencedSOPInstanceUID) for s in studies for r in s.ReferencedSeriesSequence for one in r.ReferencedSOPSequence
            }
            reference = reference_to(file) if seg_uid in named else None
            if reference is not None:
                yield reference


def _alignment(
    storage: Storage, instances: Sequence[Instance], there: Dataset, volume: Volume, decoder: Decoder | None
) -> tuple[tuple[tuple[float, float, float, float], ...], str]:
    """How places of the prior study become places of this one, and in words how that was found."""
    if text_of(there, "FrameOfReferenceUID") == volume.frame_of_reference_uid:
        return _SAME_SPACE, "both are in one frame of reference"
    try:
        headers = read_headers([storage.objects.path(instance.stored.object_id) for instance in instances])
        frames = frames_of(headers)
        stack = stack_of([frame.header for frame in frames])
        step = max(1, int(_THINNED_MM / float(np.linalg.norm(stack.affine[:3, 0]))))
        thinned = tuple(frames[i] for i in stack.order[::step])
        series = SelectedSeries(input_name="", series_instance_uid=text_of(there, "SeriesInstanceUID"), frames=thinned, why="")
        found = align(read_volume(series, decoder), volume)
    except (NotEligible, AnalysisFailed, OSError):
        raise _NotComparable(f"the images of the study of {_day(there)} can't be read again") from None
    if found is None:
        raise _NotComparable(f"the images of the study of {_day(there)} can't be aligned with these")
    rows = tuple((round(float(x), 6), round(float(y), 6), round(float(z), 6), round(float(t), 6)) for x, y, z, t in found.matrix[:3])
    return rows, f"the images were aligned rigidly (correlation {found.correlation:.2f})"


def _prior(noted: dict[str, Any]) -> Prior:
    """What `asdict` made of a prior, as it was."""
    found = [
        PriorFinding(
            **{
                **finding,
                **{name: Code(**finding[name]) if finding[name] else None for name in ("category", "type", "site")},
                "centre_lps_mm": tuple(finding["centre_lps_mm"]),
            }
        )
        for finding in noted["findings"]
    ]
    reports = tuple(Reference(**report) for report in noted["reports"])
    to_current = tuple(tuple(row) for row in noted["to_current"])
    known = {name: value for name, value in noted.items() if name != _CANDIDATE}
    return Prior(**{**known, "findings": tuple(found), "reports": reports, "to_current": to_current})


def _header_of(storage: Storage, images: Sequence[Instance]) -> Dataset | None:
    try:
        return _read(storage.objects.path(images[0].stored.object_id)) if images else None
    except (OSError, InvalidDicomError):
        return None


def _read(file: Path) -> Dataset:
    return pydicom.dcmread(file, specific_tags=_HEADER, stop_before_pixels=True)


def _same_patient(one: Dataset, other: Dataset) -> bool:
    same = all(text_of(one, keyword).strip() == text_of(other, keyword).strip() for keyword in ("PatientID", "IssuerOfPatientID"))
    births = {text_of(header, "PatientBirthDate").strip() for header in (one, other)} - {""}
    return same and len(births) < 2


def _begun(header: Dataset) -> tuple[str, str]:
    """When the study began, as DICOM writes it: that sorts by time."""
    return text_of(header, "StudyDate").strip(), text_of(header, "StudyTime").strip()


def _day(header: Dataset) -> str:
    """When the images were acquired, else when the study began."""
    return (text_of(header, "AcquisitionDate") or text_of(header, "StudyDate")).strip()


def _days(there: Dataset, here: Dataset) -> int | None:
    try:
        first, second = (date.fromisoformat(_day(header)) for header in (there, here))
    except ValueError:
        return None
    return (second - first).days
