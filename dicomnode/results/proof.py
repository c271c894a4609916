"""Result objects are read again from their bytes and compared with the findings before anything leaves the node.

Must never import highdicom or the encoders: what proves must not share code with what is proved. Only pydicom's reader and
numpy are used; segment, plane and position come from each frame's own functional groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Finding, Findings, ResultObject, Volume

_TO_ML = {"ml": 1.0, "mL": 1.0, "cm3": 1.0, "mm3": 0.001}  # UCUM is case sensitive; litre may be l or L
_TO_MM = {"mm": 1.0, "cm": 10.0}
_LATERALITY = {"7771000": "left", "24028007": "right"}
_HALF = 0.5  # voxel: the tolerance of every position
_NUMBER = 1e-4  # relative: reports carry six significant digits

_VOLUME, _LONG_AXIS, _SUMMARY = "118565006", "103339001", "111017"
_FINISHED = {True: "111242", False: "111241"}  # CID 6047: all algorithms succeeded, with or without findings


@dataclass(frozen=True, kw_only=True)
class DecodedSegment:
    """What the bytes of a SEG say about one segment."""

    number: int
    tracking_uid: str
    side: str | None
    voxels: NDArray[np.int64]  # (n, 3) volume indices (k, r, c), sorted
    points_lps_mm: NDArray[np.float64]  # (n, 3) from the frames' own geometry, in the same order
    volume_ml: float


@dataclass(frozen=True, kw_only=True)
class DecodedGroup:
    """What the bytes of an SR say in one measurement group."""

    tracking_uid: str
    numbers: tuple[tuple[str, float, str, str], ...]  # concept, value, unit, scheme of the unit
    codes: tuple[tuple[str, str], ...]  # concept, value
    sides: tuple[str, ...]
    segment: tuple[str, int] | None  # SOP Instance UID of a SEG, segment number
    line: tuple[str, NDArray[np.float64]] | None  # SOP Instance UID of an image, (n, 2) (column, row)


def prove(segmentation: ResultObject | None, report: ResultObject, findings: Findings, volume: Volume) -> None:
    """Return if SEG and SR say what the findings say, on the right images and in the right place.

    Positions agree within half a voxel, voxels exactly, reported numbers to four digits.

    Raises:
        ProofFailed: one sentence says what differs; neither object may leave.
    """
    _expect((segmentation is None) == (not findings.findings), "there must be a SEG exactly when there are findings")
    segments: dict[int, DecodedSegment] = {}
    if segmentation is not None:
        segments = {s.number: s for s in decode_segmentation(segmentation.data, volume)}
        wanted = {f.number for f in findings.findings}
        _expect(set(segments) == wanted, f"the SEG has the segments {sorted(segments)}, the findings are {sorted(wanted)}")
        for finding in findings.findings:
            _compare_segment(segments[finding.number], finding, volume)
    document = _read(report)
    _expect(str(document.get("VerificationFlag")) == "UNVERIFIED", "the SR doesn't say that nobody has verified it")
    groups = list(decode_report(document))
    for finding in findings.findings:
        segment = segments[finding.number]
        _compare_groups([g for g in groups if g.tracking_uid == segment.tracking_uid], finding, segment, segmentation, volume)
    known = {s.tracking_uid for s in segments.values()}
    others = [g for g in groups if g.tracking_uid not in known]
    _expect(len(others) == 1, f"the SR has {len(others)} groups that belong to no finding, and not the one summary")
    ending = _FINISHED[bool(findings.findings)]
    _expect((_SUMMARY, ending) in others[0].codes, f"the SR's summary isn't ({ending}, DCM)")
    _compare_images(_named_by_report(document), volume, "SR", segmentation)


def decode_segmentation(data: bytes, volume: Volume) -> list[DecodedSegment]:
    """Read a BINARY SEG from its bytes alone; the volume says only which image and plane a frame must lie on.

    Raises:
        ProofFailed: a frame lies elsewhere than the image it names, names none of the volume's, or the frame of reference differs.
    """
    seg = pydicom.dcmread(BytesIO(data))
    _expect(str(seg.get("SegmentationType")) == "BINARY", "the SEG isn't BINARY")
    _expect(str(seg.get("ContentQualification")) == "RESEARCH", "the SEG's Content Qualification isn't RESEARCH")
    _expect(
        seg.get("FrameOfReferenceUID") == volume.frame_of_reference_uid,
        f"the SEG's Frame of Reference is {seg.get('FrameOfReferenceUID')}, the volume's {volume.frame_of_reference_uid}",
    )
    _expect(seg.StudyInstanceUID == volume.study_instance_uid, "the SEG belongs to another study than the volume")
    _compare_images(_named_by_segmentation(seg), volume, "SEG")
    to_index = np.linalg.inv(volume.affine)
    found: dict[int, list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = {int(s.SegmentNumber): [] for s in seg.SegmentSequence}
    voxel_ml = 0.0
    shared = seg.SharedFunctionalGroupsSequence[0]
    for number, frame in enumerate(seg.PerFrameFunctionalGroupsSequence):
        name = f"frame {number + 1} of the SEG"
        segment = int(_group(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        _expect(segment in found, f"{name} belongs to segment {segment}, which isn't described")
        sources = [str(s.ReferencedSOPInstanceUID) for d in frame.DerivationImageSequence for s in d.SourceImageSequence]
        _expect(
            len(sources) == 1 and sources[0] in volume.sop_instance_uids, f"{name} names {sources} as its source, no image of the volume"
        )
        pixels = np.argwhere(frame_pixels(seg, number))
        _expect(len(pixels) > 0, f"{name} is empty")
        voxels = np.column_stack([np.full(len(pixels), volume.sop_instance_uids.index(sources[0])), pixels])
        points, voxel_ml = _points(pixels, frame, shared)
        off = float(np.abs(points @ to_index[:3, :3].T + to_index[:3, 3] - voxels).max())
        _expect(off <= _HALF + 1e-6, f"{name} lies {off:.2f} voxels away from its place on the image it names")
        found[segment].append((voxels, points))
    return [_joined(item, found[int(item.SegmentNumber)], voxel_ml) for item in seg.SegmentSequence]


def decode_report(document: Dataset) -> Iterator[DecodedGroup]:
    """Yield the measurement groups of a TID 1500 report, whatever template each follows.

    Raises:
        ProofFailed: a group has not exactly one Tracking Unique Identifier, or a number has no unit.
    """
    for item in _items(document):
        if _concept(item) == "125007":  # Measurement Group
            content = list(_items(item))
            tracking = [str(i.UID) for i in content if _concept(i) == "112040"]
            _expect(len(tracking) == 1, f"a measurement group of the SR has {len(tracking)} Tracking Unique Identifiers")
            yield DecodedGroup(
                tracking_uid=tracking[0],
                numbers=tuple(_number(i) for i in content if i.ValueType == "NUM"),
                codes=tuple((_concept(i), str(i.ConceptCodeSequence[0].CodeValue)) for i in content if i.ValueType == "CODE"),
                sides=tuple(
                    _LATERALITY.get(str(i.ConceptCodeSequence[0].CodeValue), "other") for i in content if _concept(i) == "272741003"
                ),
                segment=_referenced_segment(content),
                line=_line(content),
            )


def frame_pixels(seg: Dataset, frame: int) -> NDArray[np.bool_]:
    """One frame of BINARY pixel data: bits follow each other without padding between frames, lowest bit first (PS3.5 8.1.1)."""
    size = int(seg.Rows) * int(seg.Columns)
    first = frame * size
    data = np.frombuffer(seg.PixelData, dtype=np.uint8, count=(first + size + 7) // 8 - first // 8, offset=first // 8)
    bits = np.unpackbits(data, bitorder="little")[first % 8 : first % 8 + size]
    return bits.reshape(int(seg.Rows), int(seg.Columns)).astype(np.bool_)


def _compare_segment(segment: DecodedSegment, finding: Finding, volume: Volume) -> None:
    """Volume, centre, bounds, side, and at last each voxel."""
    name = f"segment {segment.number}"
    expected = np.argwhere(finding.segment.mask) + np.array(finding.segment.origin)
    count = len(segment.voxels)
    _expect(count == len(expected), f"{name} has {count} voxels, its finding {len(expected)}")
    _expect(_near(segment.volume_ml, len(expected) * volume.voxel_ml), f"{name} has {segment.volume_ml:.4f} ml by its own pixel measures")
    half_voxel = _HALF * np.abs(volume.affine[:3, :3]).sum(axis=1)  # along x, y, z
    centre = segment.points_lps_mm.mean(axis=0)
    if finding.centre_lps_mm is None:
        raise ProofFailed(f"{name} is of a projection, which is not proved yet")
    distance = np.abs(centre - np.array(finding.centre_lps_mm))
    _expect(
        bool((distance <= half_voxel).all()),
        f"{name} has its centre at {_mm(centre)} mm (LPS), its finding at {_mm(finding.centre_lps_mm)} mm",
    )
    there = volume.to_lps(expected.astype(np.float64))
    for decoded, wanted, end in (
        (segment.points_lps_mm.min(axis=0), there.min(axis=0), "begins"),
        (segment.points_lps_mm.max(axis=0), there.max(axis=0), "ends"),
    ):
        near = bool((np.abs(decoded - wanted) <= half_voxel).all())
        _expect(near, f"{name} {end} at {_mm(decoded)} mm (LPS), its finding at {_mm(wanted)} mm")
    coded_side = finding.side if finding.site is not None else None
    _expect(segment.side == coded_side, f"{name} is coded as {segment.side or 'neither'} side, its finding is {coded_side or 'neither'}")
    _expect(bool(np.array_equal(segment.voxels, expected)), f"{name} has other voxels than its finding")


def _compare_groups(
    groups: Sequence[DecodedGroup],
    finding: Finding,
    segment: DecodedSegment,
    segmentation: ResultObject | None,
    volume: Volume,
) -> None:
    """The SR's groups under a finding's Tracking UID: one with the segment, one with the long axis."""
    name = f"finding {finding.number}"
    _expect(len(groups) == 2, f"the SR has {len(groups)} groups under the Tracking UID of {name}, not two")
    by_segment = [g for g in groups if g.segment is not None]
    by_line = [g for g in groups if g.line is not None]
    _expect(len(by_segment) == 1 and len(by_line) == 1, f"the SR doesn't reference {name} once as segment and once as line")
    uid = segmentation.sop_instance_uid if segmentation else ""
    _expect(by_segment[0].segment == (uid, finding.number), f"the SR references another segment for {name}: {by_segment[0].segment}")
    for group in groups:
        sides = tuple(s for s in (finding.side,) if s and finding.site)
        _expect(group.sides == sides, f"the SR says {group.sides or 'no side'} for {name}, which is {sides or 'neither'}")
    volumes = [_converted(n, _TO_ML, name) for g in groups for n in g.numbers if n[0] == _VOLUME]
    one = len(volumes) == 1 and _near(volumes[0], segment.volume_ml)
    _expect(one, f"the SR says {volumes} ml for {name}, the SEG {segment.volume_ml:.4f} ml")
    lengths = [_converted(n, _TO_MM, name) for g in groups for n in g.numbers if n[0] == _LONG_AXIS]
    _expect(bool(lengths) and any(n[0] == _LONG_AXIS for n in by_line[0].numbers), f"the SR's line of {name} has no length")
    for length in lengths:
        right = finding.long_axis_mm is not None and _near(length, finding.long_axis_mm)
        _expect(right, f"the SR says {length} mm for {name}, which is {finding.long_axis_mm} mm")
    for concept, value, unit, _ in (n for g in groups for n in g.numbers):
        for wanted in (m for m in finding.measurements if m.name.value == concept):
            _expect(_near(value, wanted.value) and unit == wanted.unit.value, f"the SR says {value} {unit} of {concept} for {name}")
    _compare_line(by_line[0], lengths[0], segment, finding, volume)


def _compare_line(group: DecodedGroup, length: float, segment: DecodedSegment, finding: Finding, volume: Volume) -> None:
    """The long axis, drawn in pixels, has its length in millimetres, its place in space, and touches its segment."""
    name = f"finding {finding.number}"
    image, points = group.line if group.line is not None else ("", np.empty((0, 2)))
    _expect(image in volume.sop_instance_uids and len(points) == 2, f"the SR's line of {name} isn't a line on an image of the volume")
    plane = volume.sop_instance_uids.index(image)
    # PS3.3 C.18.6.1.2: (0, 0) is the corner of the first pixel, so centres lie at halves.
    index = np.column_stack([np.full(2, plane), points[:, 1] - 0.5, points[:, 0] - 0.5])
    ends = volume.to_lps(index)
    drawn = float(np.linalg.norm(ends[1] - ends[0]))
    _expect(abs(drawn - length) < 0.01, f"the SR's line of {name} is {drawn:.3f} mm long on its image, the SR says {length} mm")
    half_voxel = _HALF * np.abs(volume.affine[:3, :3]).sum(axis=1)
    axis = finding.long_axis
    off = np.abs(ends - np.array(axis.points_lps_mm)) if axis else np.inf * half_voxel
    _expect(bool((off <= half_voxel).all()), f"the SR's line of {name} lies elsewhere than its long axis")
    on_plane = segment.voxels[segment.voxels[:, 0] == plane][:, 1:]
    _expect(len(on_plane) > 0, f"the SR's line of {name} lies on a slice where its segment has no voxel")
    for end in index[:, 1:]:
        nearest = float(np.abs(on_plane - end).max(axis=1).min())
        _expect(nearest <= 1.0, f"the SR's line of {name} ends {nearest:.1f} pixels away from its segment")


def _compare_images(named: Iterator[str], volume: Volume, what: str, segmentation: ResultObject | None = None) -> None:
    """Every instance that an object names as its source or evidence is an image of the volume, or the SEG beside it."""
    known = {*volume.sop_instance_uids, segmentation.sop_instance_uid if segmentation else ""}
    for uid in named:
        _expect(uid in known, f"the {what} references {uid}, which is no image of the volume")


def _named_by_segmentation(seg: Dataset) -> Iterator[str]:
    """Common Instance Reference and Source Image Sequence (PS3.3 C.12.2, C.7.6.1.1)."""
    for series in seg.ReferencedSeriesSequence:
        yield from (str(instance.ReferencedSOPInstanceUID) for instance in series.ReferencedInstanceSequence)
    yield from (str(instance.ReferencedSOPInstanceUID) for instance in seg.SourceImageSequence)


def _named_by_report(document: Dataset) -> Iterator[str]:
    """Current Requested Procedure Evidence (PS3.3 C.17.2.3) and each IMAGE item of the content tree."""
    for study in document.get("CurrentRequestedProcedureEvidenceSequence", []):
        for series in study.ReferencedSeriesSequence:
            yield from (str(instance.ReferencedSOPInstanceUID) for instance in series.ReferencedSOPSequence)
    yield from (str(i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for i in _items(document) if i.ValueType == "IMAGE")


def _read(report: ResultObject) -> Dataset:
    document = pydicom.dcmread(BytesIO(report.data))
    _expect(str(document.get("ContentQualification")) == "RESEARCH", "the SR's Content Qualification isn't RESEARCH")
    _expect(str(document.SOPInstanceUID) == report.sop_instance_uid, "the SR's bytes hold another SOP Instance UID than was announced")
    return document


def _points(pixels: NDArray[np.int64], frame: Dataset, shared: Dataset) -> tuple[NDArray[np.float64], float]:
    """LPS mm of a frame's set pixels (n, 2) by PS3.3 C.7.6.2.1.1, and the millilitres of one.

    Cosines are made orthogonal and of length one, since scanners round them.
    """
    position = np.array(_group(frame, shared, "PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    cosines = np.array(_group(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
    measures = _group(frame, shared, "PixelMeasuresSequence")
    row_mm, column_mm = map(float, measures.PixelSpacing)
    along_row = cosines[:3] / np.linalg.norm(cosines[:3])
    along_column = cosines[3:] - along_row * (along_row @ cosines[3:])
    along_column /= np.linalg.norm(along_column)
    points = position + np.outer(pixels[:, 1] * column_mm, along_row) + np.outer(pixels[:, 0] * row_mm, along_column)
    return points, row_mm * column_mm * float(measures.SpacingBetweenSlices) / 1000.0


def _joined(item: Dataset, parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], voxel_ml: float) -> DecodedSegment:
    voxels = np.concatenate([v for v, _ in parts]) if parts else np.empty((0, 3), dtype=np.int64)
    points = np.concatenate([p for _, p in parts]) if parts else np.empty((0, 3))
    order = np.lexsort(voxels.T[::-1])
    regions = item.get("AnatomicRegionSequence", [])
    modifiers = [m for r in regions for m in r.get("AnatomicRegionModifierSequence", [])]
    return DecodedSegment(
        number=int(item.SegmentNumber),
        tracking_uid=str(item.get("TrackingUID", "")),
        side=_LATERALITY.get(str(modifiers[0].CodeValue), "other") if modifiers else None,
        voxels=voxels[order],
        points_lps_mm=points[order],
        volume_ml=len(voxels) * voxel_ml,
    )


def _group(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """A functional group of a frame, from its own groups or from the shared ones (PS3.3 C.7.6.16)."""
    holder = frame if keyword in frame else shared
    _expect(keyword in holder, f"the SEG has no {keyword}")
    item: Dataset = holder[keyword].value[0]
    return item


def _items(dataset: Dataset) -> Iterator[Dataset]:
    """All content items below one, depth first."""
    for item in dataset.get("ContentSequence", []):
        yield item
        yield from _items(item)


def _concept(item: Dataset) -> str:
    names = item.get("ConceptNameCodeSequence", [])
    return str(names[0].get("CodeValue", "")) if names else ""


def _number(item: Dataset) -> tuple[str, float, str, str]:
    value = item.MeasuredValueSequence[0]
    units = value.get("MeasurementUnitsCodeSequence", [])
    _expect(len(units) == 1, f"the SR's number ({_concept(item)}) has no unit")
    return _concept(item), float(value.NumericValue), str(units[0].CodeValue), str(units[0].CodingSchemeDesignator)


def _converted(number: tuple[str, float, str, str], units: dict[str, float], name: str) -> float:
    concept, value, unit, scheme = number
    known = scheme == "UCUM" and unit in units
    _expect(known, f"the SR gives {concept} of {name} in ({unit}, {scheme}), which isn't one of {sorted(units)} of UCUM")
    return value * units[unit]


def _referenced_segment(content: Sequence[Dataset]) -> tuple[str, int] | None:
    for item in content:
        if item.ValueType == "IMAGE" and "ReferencedSegmentNumber" in item.ReferencedSOPSequence[0]:
            reference = item.ReferencedSOPSequence[0]
            return str(reference.ReferencedSOPInstanceUID), int(reference.ReferencedSegmentNumber)
    return None


def _line(content: Sequence[Dataset]) -> tuple[str, NDArray[np.float64]] | None:
    for item in content:
        if item.ValueType == "SCOORD":
            images = [i for i in _items(item) if i.ValueType == "IMAGE"]
            _expect(len(images) == 1, "a region of the SR lies on no image")
            uid = str(images[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
            return uid, np.array(item.GraphicData, dtype=np.float64).reshape(-1, 2)
    return None


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= _NUMBER * abs(wanted) + 1e-9


def _mm(point: Sequence[float] | NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{float(v):.1f}" for v in point) + ")"


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise ProofFailed(f"{otherwise[0].upper()}{otherwise[1:]}.")
