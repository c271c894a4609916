"""Findings become one Segmentation object (PS3.3 A.51): BINARY, a segment per finding, empty frames left out.

Must never decide what is a finding, read a clock or draw a random number: the same findings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import highdicom
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage

from dicomnode.findings import Code, Finding, Findings, ResultObject, RunIdentity, Volume
from dicomnode.results import codes, identity as uids, provenance


def encode_segmentation(findings: Findings, volume: Volume, headers: Sequence[Dataset], identity: RunIdentity) -> ResultObject | None:
    """Return the SEG of all findings, or None where there are none: a study without a finding gets no SEG.

    Args:
        findings: what to encode; `finding.number` counts from 1 without a gap and becomes the segment number.
        volume: the voxels' geometry; its pixels aren't looked at.
        headers: the source images' headers, in any order; more than the volume's are ignored.
        identity: everything UIDs and dates derive from.

    Only planes that hold a finding are built, so memory is one label volume of those planes (one per finding where
    findings overlap).
    """
    if not findings.findings:
        return None
    images = provenance.source_images(volume, headers)
    origin = next(header for header in headers if header.SOPInstanceUID == volume.sop_instance_uids[0])
    planes, pixels = _paint(findings.findings, volume.voxels.shape[1:])
    made_by = {"manufacturer": findings.manufacturer, "model": findings.algorithm_name}
    arguments = provenance.common_arguments(origin, identity, "SEG", **made_by)
    arguments["series_instance_uid"] = uids.series_uid(identity, "SEG")
    result = Segmentation(
        source_images=[images[plane] for plane in planes],
        pixel_array=pixels,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe(finding, findings, identity) for finding in findings.findings],
        sop_instance_uid=uids.object_uid(identity, SegmentationStorage, ExplicitVRLittleEndian),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
        content_label=_content_label(identity.package),
        content_description=provenance.long_string(findings.algorithm_name, ending=provenance.RESEARCH),
        **arguments,
    )
    result.ImageComments = f"{provenance.RESEARCH}. {identity.package} {identity.version}, weights sha256:{identity.digest}"
    result.ContentCreatorName = ""  # type 2: no person made this
    _reference_whole_series(result, images)
    _derive_dimension_uid(result, uids.derive_uid(identity, "dimension organization"))
    provenance.stamp(result, origin, identity, **made_by)
    return provenance.encode(result)


def coded(code: Code) -> CodedConcept:
    """Return a code as the encoder wants it, its meaning in ASCII (VR LO)."""
    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=provenance.ascii_text(code.meaning, 64))


def _paint(findings: Sequence[Finding], plane_shape: tuple[int, ...]) -> tuple[list[int], NDArray[np.integer]]:
    """Return the slice indices that hold a finding, and their pixels.

    (planes, rows, columns) of segment numbers where no voxel belongs to two findings, else (planes, rows, columns, findings) of 0
    and 1.
    """
    occupied = {f.segment.origin[0] + int(k) for f in findings for k in np.flatnonzero(f.segment.mask.any(axis=(1, 2)))}
    planes = sorted(occupied)
    index = {plane: i for i, plane in enumerate(planes)}
    labels = np.zeros((len(planes), *plane_shape), dtype=np.uint8 if len(findings) < 256 else np.uint16)
    for finding in findings:
        for plane, window, mask in _slices(finding):
            target = labels[index[plane]][window]
            if target[mask].any():
                return planes, _paint_overlapping(findings, labels.shape, index)
            target[mask] = finding.number
    return planes, labels


def _paint_overlapping(findings: Sequence[Finding], shape: tuple[int, ...], index: dict[int, int]) -> NDArray[np.uint8]:
    stack = np.zeros((*shape, len(findings)), dtype=np.uint8)
    for finding in findings:
        for plane, window, mask in _slices(finding):
            stack[index[plane]][window][mask, finding.number - 1] = 1
    return stack


def _slices(finding: Finding) -> list[tuple[int, tuple[slice, slice], NDArray[np.bool_]]]:
    """The finding's non-empty slices: slice index in the volume, its window in the plane, its mask there."""
    first, row, column = finding.segment.origin
    _, rows, columns = finding.segment.mask.shape
    window = (slice(row, row + rows), slice(column, column + columns))
    return [(first + k, window, mask) for k, mask in enumerate(finding.segment.mask) if mask.any()]


def _describe(finding: Finding, findings: Findings, identity: RunIdentity) -> SegmentDescription:
    """One item of the Segment Sequence (PS3.3 C.8.20.2, C.8.20.4)."""
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=provenance.long_string(findings.algorithm_name),
        family=coded(codes.ARTIFICIAL_INTELLIGENCE),
        version=provenance.long_string(findings.version),
        source=provenance.long_string(findings.manufacturer),
        parameters=dict(provenance.algorithm_parameters(identity, findings)),
    )
    description = SegmentDescription(
        segment_number=finding.number,
        segment_label=provenance.long_string(finding.label, ending=str(finding.number)),
        segmented_property_category=coded(finding.category),
        segmented_property_type=coded(finding.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=uids.tracking_uid(identity, finding.number),
        tracking_id=uids.tracking_id(identity, finding.number),
        anatomic_regions=[coded(finding.site)] if finding.site else None,
        display_color=CIELabColor(*finding.colour_cielab),
    )
    if finding.site and finding.side:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [coded(codes.LATERALITY[finding.side])]
    return description


def _content_label(package: str) -> str:
    """Content Label (0070,0080) is of VR CS: 16 upper-case letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in provenance.ascii_text(package, 16).upper())


def _reference_whole_series(result: Dataset, images: Sequence[Dataset]) -> None:
    """Name every image that was analysed, not only those under a frame (PS3.3 C.12.2, C.7.6.1.1)."""
    references = []
    for image in images:
        reference = Dataset()
        reference.ReferencedSOPClassUID = image.SOPClassUID
        reference.ReferencedSOPInstanceUID = image.SOPInstanceUID
        references.append(reference)
    result.SourceImageSequence = references
    result.ReferencedSeriesSequence[0].ReferencedInstanceSequence = references


def _derive_dimension_uid(result: Dataset, uid: str) -> None:
    """Replace highdicom's random Dimension Organization UID wherever it stands (PS3.3 C.7.6.17)."""
    for item in [*result.DimensionOrganizationSequence, *result.DimensionIndexSequence]:
        item.DimensionOrganizationUID = uid
