"""Findings, their absence, or the reason why there is no analysis become a TID 1500 report (PS3.16), Comprehensive (3D) SR.

Must never decide what is a finding, read a clock or draw a random number: the same findings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from highdicom import sr
from pydicom import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import UID, Comprehensive3DSRStorage, ComprehensiveSRStorage, ExplicitVRLittleEndian, SegmentationStorage

from dicomnode.findings import Code, Finding, Findings, Measurement, Reference, ResultObject, RunIdentity, Score, Volume
from dicomnode.results import change, codes, identity as uids, provenance
from dicomnode.results.library import image_library
from dicomnode.results.segmentation import coded

# Both have the same content: all graphics are in pixels of an image (SCOORD), which either may hold (PS3.3 A.35.3, A.35.13).
CLASSES = {"sr": Comprehensive3DSRStorage, "sr-comprehensive": ComprehensiveSRStorage}
_DOCUMENTS = {Comprehensive3DSRStorage: sr.Comprehensive3DSR, ComprehensiveSRStorage: sr.ComprehensiveSR}


def encode_report(
    findings: Findings,
    volume: Volume,
    headers: Sequence[Dataset],
    identity: RunIdentity,
    segmentation: ResultObject | Sequence[ResultObject] | None,
    *,
    kind: str = "sr",
    variant: str = "",
    supersedes: Sequence[Reference] = (),
) -> ResultObject:
    """Return the report of a finished analysis; "no finding" is a report too.

    Each finding has two measurement groups under one Tracking UID. The first references its segment and holds its numbers (TID 1411;
    of a projection TID 1410). The second, TID 1410, draws on an image: the long axis of an outline, a closed rectangle of a box or a
    heat map; for a reader that is given no SEG it stands alone, with all numbers. Compared with an earlier study, the group with the
    numbers says how it changed since. Then, TID 1410 on the border of an image, one for each thing that is no longer seen, one for each
    class of a classification gives its probability, and the last says how the algorithm ended. (OHIF opens no report in which a
    Tracking UID has no coordinates.)

    Args:
        findings: what to report.
        volume: gives slices their images.
        headers: the images' headers, in any order: the volume's, and those of `findings.other_series`; more are ignored.
        identity: everything UIDs and dates derive from.
        segmentation: the SEG of the same findings, or one for each of them; None for a report that refers to none.
        kind: a key of CLASSES.
        variant: what tells the report's UIDs from those of one that refers to another form of SEG (see `profile.Form`).
        supersedes: the reports on what the study was before, in the order in which a run makes them.
    """
    segmentations = (segmentation,) if isinstance(segmentation, ResultObject) else tuple(segmentation or ())
    if len(segmentations) not in {0, min(1, len(findings.findings)), len(findings.findings)}:
        raise ValueError("a report refers to one segmentation of its findings, to one for each of them, or to none")
    images = provenance.source_images(volume, headers)
    origin = next(header for header in headers if header.SOPInstanceUID == volume.sop_instance_uids[0])
    others = [
        [provenance.reduced_header(header) for header in headers if str(header.SeriesInstanceUID) == uid] for uid in findings.other_series
    ]
    evidence = [*images, *(image for series in others for image in series)]
    groups: list[Dataset] = []
    evidence += [_named(one, volume.study_instance_uid) for one in segmentations]
    for finding in findings.findings:
        about = _about(finding, findings, identity)
        since = {
            "time_point_context": change.time_point(findings.comparison),
            "qualitative_evaluations": change.evaluations(change.trend(finding, findings)),
        }
        if segmentations:
            one, segment = (segmentations[0], finding.number) if len(segmentations) == 1 else (segmentations[finding.number - 1], 1)
            groups.append(_segment_group(finding, one, segment, volume, images, {**about, **since}))
            groups.append(_region_group(finding, volume, images, about, alone=False))
        else:
            groups.append(_region_group(finding, volume, images, {**about, **since}, alone=True))
    shown = findings.findings[0].key_slice if findings.findings else len(images) // 2
    whole = _whole_image(images[shown], _frames(volume, shown))
    algorithm = _algorithm(findings.algorithm_name, identity)
    groups += [_study_group(whole, algorithm_id=algorithm, **gone) for gone in change.vanished(findings)]
    groups += [_class_group(number, score, findings, identity, whole) for number, score in enumerate(findings.scores, start=1)]
    evaluation = codes.WITH_FINDINGS if findings.findings else codes.WITHOUT_FINDINGS
    groups.append(_summary_group(evaluation, findings.algorithm_name, identity, whole))
    made_by = {"manufacturer": findings.manufacturer, "model": findings.algorithm_name}
    content = _measurement_report(origin, identity, groups, said(findings, volume), **made_by)
    content[0].ContentSequence.insert(-2, image_library(images, [series for series in others if series], volume))  # TID 1500 row 5
    ordinal, variant = 1, variant if segmentations else ""  # each SEG has a report of its own
    if findings.findings and (not segmentations or segmentations[0].sop_class_uid != SegmentationStorage):
        ordinal = 2 if segmentations else 3
    former = _predecessors(supersedes, CLASSES[kind], ordinal)
    if findings.comparison is not None:
        former += _predecessors(findings.comparison.prior.reports, CLASSES[kind], ordinal)
    return _document(content, evidence, origin, identity, CLASSES[kind], ordinal, former, variant=variant, **made_by)


def encode_refusal(
    code: str,
    reason: str,
    headers: Sequence[Dataset],
    identity: RunIdentity,
    *,
    manufacturer: str,
    algorithm_name: str,
    kind: str = "sr",
    supersedes: Sequence[Reference] = (),
) -> ResultObject:
    """Return the report of a study that was not analysed, or whose analysis failed, with the reason in words.

    Args:
        code: the machine-readable reason, e.g. "too-few-slices".
        reason: one sentence for the person who reads the report.
        headers: at least one image of the study; all of them become evidence.
        identity: everything UIDs and dates derive from.
        manufacturer: of the package that would have run.
        algorithm_name: of the package that would have run.
        kind: a key of CLASSES.
        supersedes: the reports on what the study was before, in the order in which a run makes them.
    """
    if not headers:
        raise ValueError("a report needs at least one image of its study")
    images = [provenance.reduced_header(header) for header in headers]
    comments = [provenance.RESEARCH, f"Not analysed ({code}): {reason}"]
    wholes = [_whole_image(image, [1] if "NumberOfFrames" in header else None) for image, header in zip(images, headers, strict=True)]
    whole = next(filter(None, wholes[len(wholes) // 2 :] + wholes), None)
    group = _summary_group(codes.NO_ALGORITHM_SUCCEEDED, algorithm_name, identity, whole)
    made_by = {"manufacturer": manufacturer, "model": algorithm_name}
    content = _measurement_report(headers[0], identity, [group], comments, **made_by)
    former = _predecessors(supersedes, CLASSES[kind], 1)
    return _document(content, images, headers[0], identity, CLASSES[kind], 1, former, **made_by)


def device_observer(identity: RunIdentity, *, manufacturer: str, model: str) -> sr.ObserverContext:
    """Return who observed (TID 1004): this version and digest of the package."""
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=uids.device_uid(identity),
        name=provenance.ascii_text(f"{identity.package} {identity.version}", 1024),
        manufacturer_name=provenance.ascii_text(manufacturer, 1024),
        model_name=provenance.ascii_text(model, 1024),
        serial_number=identity.digest,
    )
    return sr.ObserverContext(observer_type=dicom_codes.DCM.Device, observer_identifying_attributes=device)


def _segment_group(
    finding: Finding, segmentation: ResultObject, number: int, volume: Volume, images: Sequence[Dataset], about: Mapping[str, Any]
) -> Dataset:
    """TID 1411, of a projection TID 1410: the segment of this number, and every number about it."""
    numbers = [_measurement(m) for m in _numbers(finding, volume)]
    if volume.is_projection:
        image = images[0]
        frame = sr.ReferencedSegmentationFrame(
            sop_class_uid=segmentation.sop_class_uid,
            sop_instance_uid=segmentation.sop_instance_uid,
            frame_number=number,  # a projection is one slice, so each segment has one frame
            segment_number=number,
            source_image=sr.SourceImageForSegmentation(image.SOPClassUID, image.SOPInstanceUID, _frames(volume, 0)),
        )
        del frame[0].ReferencedSOPSequence[0].ReferencedSegmentNumber  # not beside a frame number (PS3.3 C.18.4)
        planar: Dataset = sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_segment=frame, measurements=numbers, **about)
        return planar
    segment = sr.ReferencedSegment(
        sop_class_uid=segmentation.sop_class_uid,
        sop_instance_uid=segmentation.sop_instance_uid,
        segment_number=number,
        source_series=sr.SourceSeriesForSegmentation(volume.series_instance_uid),
    )
    group: Dataset = sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, measurements=numbers, **about)
    return group


def _numbers(finding: Finding, volume: Volume) -> list[Measurement]:
    """Every number about a finding."""
    measurements = list(finding.measurements)
    if finding.long_axis is not None and not any(m.name.value == codes.LONG_AXIS.value for m in measurements):
        measurements.append(_long_axis(finding, volume))
    return [*measurements, *change.numbers(finding), _certainty(finding.probability)]


def _region_group(finding: Finding, volume: Volume, images: Sequence[Dataset], about: Mapping[str, Any], *, alone: bool) -> Dataset:
    """TID 1410: a line or a closed rectangle on an image, with its number, or all where it stands `alone`.

    SCOORD counts from the corner of the first pixel (PS3.3 C.18.6.1.2).
    """
    if finding.long_axis is not None:
        slice_index, points = finding.long_axis.slice_index, list(finding.long_axis.points_px)
        number, purpose = _long_axis(finding, volume), None
    else:
        slice_index, points = finding.middle_slice, _rectangle(*finding.bounds_px)
        number, purpose = _certainty(finding.probability), coded(codes.BOUNDED_BY)
    image = images[slice_index]
    region = sr.ImageRegion(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.asarray(points, dtype=np.float64) + 0.5,
        source_image=sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID, _frames(volume, slice_index)),
    )
    group: Dataset = sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        referenced_region=region,
        measurements=[_measurement(m) for m in (_numbers(finding, volume) if alone else [number])],
        geometric_purpose=purpose,
        **about,
    )
    return group


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """A closed line of six points that begins in the middle of the upper edge.

    Four or five points are a tool of OHIF's own, which it offers to take over; it then loses what isn't written as it writes itself.
    """
    middle = (left + right) / 2
    return [(middle, top), (right, top), (right, bottom), (left, bottom), (left, top), (middle, top)]


def _frames(volume: Volume, slice_index: int) -> list[int] | None:
    number = provenance.frame_number(volume, slice_index)
    return None if number is None else [number]


def _about(finding: Finding, findings: Findings, identity: RunIdentity) -> dict[str, Any]:
    """What both groups of a finding say in the same words."""
    side = coded(codes.LATERALITY[finding.side]) if finding.side else None
    return {
        "tracking_identifier": sr.TrackingIdentifier(*uids.tracking_of(identity, finding)),
        "finding_category": coded(finding.category),
        "finding_type": coded(finding.type),
        "finding_sites": [sr.FindingSite(coded(finding.site), laterality=side)] if finding.site else None,
        "algorithm_id": _algorithm(findings.algorithm_name, identity),
    }


def _class_group(number: int, score: Score, findings: Findings, identity: RunIdentity, whole: sr.ImageRegion | None) -> Dataset:
    """The probability of one class of a classification, positive or not."""
    tracking = sr.TrackingIdentifier(uid=uids.class_tracking_uid(identity, number), identifier=uids.class_tracking_id(identity, number))
    return _study_group(
        whole,
        tracking_identifier=tracking,
        finding_type=coded(score.type),
        algorithm_id=_algorithm(findings.algorithm_name, identity),
        measurements=[_measurement(_certainty(score.probability))],
    )


def _summary_group(evaluation: Code, algorithm_name: str, identity: RunIdentity, whole: sr.ImageRegion | None) -> Dataset:
    """How the algorithm ended. Silence never means normal."""
    return _study_group(
        whole,
        tracking_identifier=_tracking(identity, 0),
        algorithm_id=_algorithm(algorithm_name, identity),
        qualitative_evaluations=[sr.QualitativeEvaluation(coded(codes.SUMMARY), coded(evaluation))],
    )


def _study_group(whole: sr.ImageRegion | None, **said: Any) -> Dataset:
    """What is said of all that was looked at: TID 1410 on the border of an image, or TID 1501 where no image has a size."""
    group: Dataset = (
        sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_region=whole, **said)
        if whole is not None
        else sr.MeasurementsAndQualitativeEvaluations(**said)
    )
    return group


def _whole_image(image: Dataset, frames: list[int] | None) -> sr.ImageRegion | None:
    """The border of an image or a frame, as a closed line; None of what says no size."""
    rows, columns = image.get("Rows"), image.get("Columns")
    if not (isinstance(rows, int) and isinstance(columns, int) and rows and columns):
        return None
    return sr.ImageRegion(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.array(_rectangle(0, 0, columns, rows), dtype=np.float64),
        source_image=sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID, frames),
    )


def said(findings: Findings, volume: Volume) -> list[str]:
    """Return what the reader is told in words: the warning, the package's notes, what numbers mean, and what was left out."""
    comments = [provenance.RESEARCH, *findings.notes, *change.words(findings)]
    for score in findings.scores:
        verdict = "positive" if score.positive else "negative"
        comments.append(f"{score.label}: {100 * score.probability:.1f} %, {verdict} at a threshold of {100 * score.threshold:.1f} %.")
    if any(finding.long_axis is None for finding in findings.findings):
        comments.append("Rectangles, and the segments named box or heat map, show where a finding lies: they are no outlines.")
    if findings.findings and volume.calibration == "detector":
        comments.append("Lengths and areas are measured at the detector: in the patient they are smaller by an unknown magnification.")
    if findings.findings and volume.calibration == "none":
        comments.append("The image says no pixel spacing: lengths and areas are in pixels.")
    if findings.omitted:
        noun = "finding is" if findings.omitted == 1 else "findings are"
        comments.append(f"{findings.omitted} further {noun} omitted: only the {len(findings.findings)} most probable are reported.")
    return comments


def _measurement_report(
    header: Dataset, identity: RunIdentity, groups: Sequence[Dataset], comments: Sequence[str], *, manufacturer: str, model: str
) -> sr.MeasurementReport:
    """TID 1500: who observed, what procedure, the groups, the words."""
    observer = device_observer(identity, manufacturer=manufacturer, model=model)
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=coded(codes.procedure_reported(str(header.get("Modality") or ""))),
        imaging_measurements=groups,
        title=dicom_codes.DCM.ImagingMeasurementReport,
    )
    report[0].ContentSequence.append(_comments(comments))
    return report


def _comments(comments: Sequence[str]) -> sr.ContainerContentItem:
    """TID 1500 rows 12 and 14: what is said in words. A TID 1501 group has no place for text."""
    container = sr.ContainerContentItem(name=coded(codes.QUALITATIVE_EVALUATIONS), relationship_type=sr.RelationshipTypeValues.CONTAINS)
    container.ContentSequence = sr.ContentSequence(
        [
            sr.TextContentItem(
                name=coded(codes.COMMENT),
                value=provenance.ascii_text(comment, 100_000),  # UT has no limit; this is one
                relationship_type=sr.RelationshipTypeValues.CONTAINS,
            )
            for comment in comments
        ]
    )
    return container


def _document(
    content: sr.MeasurementReport,
    evidence: Sequence[Dataset],
    header: Dataset,
    identity: RunIdentity,
    sop_class: UID,
    ordinal: int,
    predecessors: Sequence[Reference],
    *,
    variant: str = "",
    manufacturer: str,
    model: str,
) -> ResultObject:
    """The SR document: complete as the machine's word, preliminary and unverified as no person has looked (PS3.3 C.17.2).

    Its predecessors are the documents whose content it has taken over or replaced.
    """
    arguments = provenance.common_arguments(header, identity, "SR", manufacturer=manufacturer, model=model)
    series = "SR" if (sop_class, ordinal) == (Comprehensive3DSRStorage, 1) else f"SR {sop_class} {ordinal}"
    arguments["series_instance_uid"] = uids.series_uid(identity, series + variant)
    document = _DOCUMENTS[sop_class](
        evidence=evidence,
        content=content[0],
        sop_instance_uid=uids.object_uid(identity, sop_class, ExplicitVRLittleEndian + variant, ordinal),
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=[_named(reference) for reference in predecessors] or None,
        **arguments,
    )
    provenance.stamp(document, header, identity, manufacturer=manufacturer, model=model)
    return provenance.encode(document)


def _predecessors(former: Sequence[Reference], sop_class: UID, ordinal: int) -> list[Reference]:
    """The report that this one takes the place of: of its class and ordinal, else the nearest to that."""
    alike = [reference for reference in former if reference.sop_class_uid == sop_class] or list(former)
    return alike[:ordinal][-1:]


def _named(reference: ResultObject | Reference, study_instance_uid: str = "") -> Dataset:
    """An object as the encoder wants it named. A result object doesn't know its study."""
    named = Dataset()
    named.SOPClassUID, named.SOPInstanceUID = reference.sop_class_uid, reference.sop_instance_uid
    named.StudyInstanceUID = reference.study_instance_uid if isinstance(reference, Reference) else study_instance_uid
    named.SeriesInstanceUID = reference.series_instance_uid
    return named


def _tracking(identity: RunIdentity, number: int) -> sr.TrackingIdentifier:
    return sr.TrackingIdentifier(uid=uids.tracking_uid(identity, number), identifier=uids.tracking_id(identity, number))


def _algorithm(name: str, identity: RunIdentity) -> sr.AlgorithmIdentification:
    """TID 4019, the two items it demands; the weights digest is part of the version, as no checker knows the others here."""
    return sr.AlgorithmIdentification(
        name=provenance.ascii_text(name, 1024),
        version=provenance.ascii_text(f"{identity.version} weights sha256:{identity.digest}", 1024),
    )


def _long_axis(finding: Finding, volume: Volume) -> Measurement:
    unit = codes.PIXELS if volume.calibration == "none" else codes.MILLIMETRE
    return Measurement(name=codes.LONG_AXIS, value=finding.long_axis_mm or 0.0, unit=unit)


def _certainty(probability: float) -> Measurement:
    return Measurement(name=codes.CERTAINTY, value=100.0 * probability, unit=codes.PERCENT)


def _measurement(measurement: Measurement) -> sr.Measurement:
    """TID 300, the value with six significant digits: more would claim what no scanner measures (VR DS holds 16)."""
    return sr.Measurement(
        name=coded(codes.as_printed(measurement.name)),
        value=float(f"{measurement.value:.6g}"),
        unit=coded(measurement.unit),
        method=coded(measurement.method) if measurement.method else None,
    )
