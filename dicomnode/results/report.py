"""Findings, their absence, or the reason why there is no analysis become a TID 1500 report (PS3.16), Comprehensive 3D SR.

Must never decide what is a finding, read a clock or draw a random number: the same findings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from highdicom import sr
from highdicom.sr import CodedConcept
from pydicom import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import Comprehensive3DSRStorage, ExplicitVRLittleEndian

from dicomnode.findings import Code, Finding, Findings, Measurement, ResultObject, RunIdentity, Volume
from dicomnode.results import codes, identity as uids, provenance
from dicomnode.results.segmentation import coded


def encode_report(
    findings: Findings, volume: Volume, headers: Sequence[Dataset], identity: RunIdentity, segmentation: ResultObject | None
) -> ResultObject:
    """Return the report of a finished analysis; "no finding" is a report too.

    Each finding has two measurement groups under one Tracking UID: TID 1411 references its segment and holds its numbers, TID 1410
    draws the long axis on its image. (A viewer in wide use loses a report whose only group has no image region.) One TID 1501
    group says how the algorithm ended.

    Args:
        findings: what to report.
        volume: gives slices their images.
        headers: the source images' headers, in any order; more than the volume's are ignored.
        identity: everything UIDs and dates derive from.
        segmentation: the SEG of the same findings; None where there are none.
    """
    if (segmentation is None) != (not findings.findings):
        raise ValueError("a report refers to the segmentation of its findings, and to none without findings")
    images = provenance.source_images(volume, headers)
    origin = next(header for header in headers if header.SOPInstanceUID == volume.sop_instance_uids[0])
    evidence = list(images)
    groups: list[Dataset] = []
    if segmentation is not None:
        evidence.append(_reference(segmentation, volume.study_instance_uid))
        for finding in findings.findings:
            groups += [
                _segment_group(finding, findings, identity, segmentation, volume),
                _long_axis_group(finding, findings, identity, images),
            ]
    evaluation = codes.WITH_FINDINGS if findings.findings else codes.WITHOUT_FINDINGS
    comments = [provenance.RESEARCH]
    if findings.omitted:
        comments.append(f"{findings.omitted} further findings are omitted: the package reports at most {len(findings.findings)}.")
    groups.append(_summary_group(evaluation, findings.algorithm_name, identity))
    made_by = {"manufacturer": findings.manufacturer, "model": findings.algorithm_name}
    content = _measurement_report(origin, identity, groups, comments, images, **made_by)
    return _document(content, evidence, origin, identity, **made_by)


def encode_refusal(
    code: str, reason: str, headers: Sequence[Dataset], identity: RunIdentity, *, manufacturer: str, algorithm_name: str
) -> ResultObject:
    """Return the report of a study that was not analysed, or whose analysis failed, with the reason in words.

    Args:
        code: the machine-readable reason, e.g. "too-few-slices".
        reason: one sentence for the person who reads the report.
        headers: at least one image of the study; all of them become evidence.
        identity: everything UIDs and dates derive from.
        manufacturer: of the package that would have run.
        algorithm_name: of the package that would have run.
    """
    if not headers:
        raise ValueError("a report needs at least one image of its study")
    images = [provenance.reduced_header(header) for header in headers]
    comments = [provenance.RESEARCH, f"Not analysed ({code}): {reason}"]
    group = _summary_group(codes.NO_ALGORITHM_SUCCEEDED, algorithm_name, identity)
    made_by = {"manufacturer": manufacturer, "model": algorithm_name}
    content = _measurement_report(headers[0], identity, [group], comments, None, **made_by)
    return _document(content, images, headers[0], identity, **made_by)


def _segment_group(
    finding: Finding, findings: Findings, identity: RunIdentity, segmentation: ResultObject, volume: Volume
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    """TID 1411: the segment and every number about it."""
    measurements = list(finding.measurements)
    if not any(m.name.value == codes.LONG_AXIS.value for m in measurements):
        measurements.append(_long_axis(finding))
    measurements.append(Measurement(name=codes.CERTAINTY, value=100.0 * finding.probability, unit=codes.PERCENT))
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=segmentation.sop_class_uid,
            sop_instance_uid=segmentation.sop_instance_uid,
            segment_number=finding.number,
            source_series=sr.SourceSeriesForSegmentation(volume.series_instance_uid),
        ),
        measurements=[_measurement(m) for m in measurements],
        **_about(finding, findings, identity),
    )


def _long_axis_group(
    finding: Finding, findings: Findings, identity: RunIdentity, images: Sequence[Dataset]
) -> sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    """TID 1410: the long axis as a line on its image. SCOORD counts from the corner of the first pixel (PS3.3 C.18.6.1.2)."""
    if finding.long_axis is None:
        raise ValueError("boxes and heat maps are not reported yet")
    image = images[finding.long_axis.slice_index]
    region = sr.ImageRegion(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.asarray(finding.long_axis.points_px, dtype=np.float64) + 0.5,
        source_image=sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID),
    )
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        referenced_region=region, measurements=[_measurement(_long_axis(finding))], **_about(finding, findings, identity)
    )


def _about(finding: Finding, findings: Findings, identity: RunIdentity) -> dict[str, object]:
    """What both groups of a finding say in the same words."""
    side = coded(codes.LATERALITY[finding.side]) if finding.side else None
    return {
        "tracking_identifier": _tracking(identity, finding.number),
        "finding_category": coded(finding.category),
        "finding_type": coded(finding.type),
        "finding_sites": [sr.FindingSite(coded(finding.site), laterality=side)] if finding.site else None,
        "algorithm_id": _algorithm(findings.algorithm_name, identity),
    }


def _summary_group(evaluation: Code, algorithm_name: str, identity: RunIdentity) -> sr.MeasurementsAndQualitativeEvaluations:
    """TID 1501: how the algorithm ended. Silence never means normal."""
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(identity, 0),
        algorithm_id=_algorithm(algorithm_name, identity),
        qualitative_evaluations=[sr.QualitativeEvaluation(coded(codes.SUMMARY), coded(evaluation))],
    )


def _measurement_report(
    header: Dataset,
    identity: RunIdentity,
    groups: Sequence[Dataset],
    comments: Sequence[str],
    images: Sequence[Dataset] | None,
    *,
    manufacturer: str,
    model: str,
) -> sr.MeasurementReport:
    """TID 1500: who observed, what procedure, which images, the groups."""
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=uids.device_uid(identity),
        name=provenance.ascii_text(f"{identity.package} {identity.version}", 1024),
        manufacturer_name=provenance.ascii_text(manufacturer, 1024),
        model_name=provenance.ascii_text(model, 1024),
        serial_number=identity.digest,
    )
    observer = sr.ObserverContext(observer_type=dicom_codes.DCM.Device, observer_identifying_attributes=device)
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=coded(codes.procedure_reported(str(header.get("Modality") or ""))),
        imaging_measurements=groups,
        title=dicom_codes.DCM.ImagingMeasurementReport,
    )
    if images:
        report[0].ContentSequence.insert(-1, _image_library(images))  # TID 1500 row 5, before the measurements
    report[0].ContentSequence.append(_comments(comments))
    return report


def _image_library(images: Sequence[Dataset]) -> sr.ContainerContentItem:
    """TID 1600: the analysed images as one group, what they share said once. Saying it for each of 500 makes a report of megabytes."""
    contains = sr.RelationshipTypeValues.CONTAINS
    source = CodedConcept(value="260753009", scheme_designator="SCT", meaning="Source")
    group = sr.ContainerContentItem(name=dicom_codes.DCM.ImageLibraryGroup, relationship_type=contains)
    group.ContentSequence = sr.ContentSequence(
        item for item in sr.ImageLibraryEntryDescriptors(images[0]) if not item.name.meaning.startswith("Image Position (Patient)")
    )
    for image in images:
        group.ContentSequence.append(sr.ImageContentItem(source, image.SOPClassUID, image.SOPInstanceUID, relationship_type=contains))
    library = sr.ContainerContentItem(name=dicom_codes.DCM.ImageLibrary, relationship_type=contains)
    library.ContentSequence = sr.ContentSequence([group])
    return library


def _comments(comments: Sequence[str]) -> sr.ContainerContentItem:
    """TID 1500 rows 12 and 14: what is said in words. A TID 1501 group has no place for text."""
    container = sr.ContainerContentItem(name=coded(codes.QUALITATIVE_EVALUATIONS), relationship_type=sr.RelationshipTypeValues.CONTAINS)
    container.ContentSequence = sr.ContentSequence(
        [
            sr.TextContentItem(
                name=coded(codes.COMMENT),
                value=provenance.ascii_text(comment, 1024),
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
    *,
    manufacturer: str,
    model: str,
) -> ResultObject:
    """The SR document: complete as the machine's word, preliminary and unverified as no person has looked (PS3.3 C.17.2)."""
    arguments = provenance.common_arguments(header, identity, "SR", manufacturer=manufacturer, model=model)
    arguments["series_instance_uid"] = uids.series_uid(identity, "SR")
    document = sr.Comprehensive3DSR(
        evidence=evidence,
        content=content[0],
        sop_instance_uid=uids.object_uid(identity, Comprehensive3DSRStorage, ExplicitVRLittleEndian),
        is_complete=True,
        is_final=False,
        is_verified=False,
        **arguments,
    )
    provenance.stamp(document, header, identity, manufacturer=manufacturer, model=model)
    return provenance.encode(document)


def _reference(segmentation: ResultObject, study_instance_uid: str) -> Dataset:
    reference = Dataset()
    reference.SOPClassUID = segmentation.sop_class_uid
    reference.SOPInstanceUID = segmentation.sop_instance_uid
    reference.StudyInstanceUID = study_instance_uid
    reference.SeriesInstanceUID = segmentation.series_instance_uid
    return reference


def _tracking(identity: RunIdentity, number: int) -> sr.TrackingIdentifier:
    return sr.TrackingIdentifier(uid=uids.tracking_uid(identity, number), identifier=uids.tracking_id(identity, number))


def _algorithm(name: str, identity: RunIdentity) -> sr.AlgorithmIdentification:
    """TID 4019, the two items it demands; the weights digest is part of the version, as no checker knows the others here."""
    return sr.AlgorithmIdentification(
        name=provenance.ascii_text(name, 1024),
        version=provenance.ascii_text(f"{identity.version} weights sha256:{identity.digest}", 1024),
    )


def _long_axis(finding: Finding) -> Measurement:
    return Measurement(name=codes.LONG_AXIS, value=finding.long_axis_mm or 0.0, unit=codes.MILLIMETRE)


def _measurement(measurement: Measurement) -> sr.Measurement:
    """TID 300, the value with six significant digits: more would claim what no scanner measures (VR DS holds 16)."""
    return sr.Measurement(
        name=coded(codes.as_printed(measurement.name)),
        value=float(f"{measurement.value:.6g}"),
        unit=coded(measurement.unit),
        method=coded(measurement.method) if measurement.method else None,
    )
