"""Result objects are read again from their bytes and compared with the findings before anything leaves the node.

Must never import highdicom or the encoders: what proves must not share code with what is proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.findings import Finding, Findings, ResultObject, Segment, Volume
from dicomnode.results.decoding import (
    DecodedGroup,
    DecodedSegment,
    Number,
    comments_of,
    decode_report,
    decode_segmentation,
    evidence_of,
    expect,
    items_below,
    read,
    read_report,
    slices_of,
)
from dicomnode.results.profile import USUAL, Form
from dicomnode.results.proof_comments import WARNING, compare_comments, compare_origin
from dicomnode.results.proof_growth import CHANGE, DOUBLING, compare_growth, compare_predecessors, compare_vanished

_TO_ML = {"ml": 1.0, "mL": 1.0, "cm3": 1.0, "mm3": 0.001}  # UCUM is case sensitive; litre may be l or L
_TO_MM = {"mm": 1.0, "cm": 10.0}
_TO_MM2 = {"mm2": 1.0, "cm2": 100.0}
_TO_PIXELS = {"{pixels}": 1.0}
_TO_PERCENT = {"%": 1.0}
_HALF = 0.5  # voxel: the tolerance of every position
_NUMBER = 1e-4  # relative: reports carry six significant digits

_VOLUME, _LONG_AXIS, _AREA, _CERTAINTY, _SUMMARY = "118565006", "103339001", "42798000", "111012", "111017"
_TYPE, _CATEGORY = "121071", "276214006"  # Finding, Finding Category
_FINISHED = {True: "111242", False: "111241"}  # CID 6047: all algorithms succeeded, with or without findings


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the numbers of a finding are compared with: what its segment holds, or the finding itself where there is no SEG."""

    count: int
    volume_ml: float
    edges: tuple[float, float, float, float]  # left, top, right, bottom: from the corner of the first pixel


def prove(
    segmentation: ResultObject | Sequence[ResultObject] | None,
    report: ResultObject,
    findings: Findings,
    volume: Volume,
    others: Sequence[Volume] = (),
    *,
    form: Form | None = USUAL,
) -> None:
    """Return if SEG and SR say what the findings say, on the right images and in the right place.

    Positions agree within half a voxel, voxels exactly, reported numbers to four digits. `others` are the volumes that the model was
    given beside the first: the SR names their images too. `form` says whether there is a SEG of all findings, or one of each, with empty
    frames or without; None: there is none, and the SR refers to none.

    Raises:
        ProofFailed: one sentence says what differs; neither object may leave.
    """
    segs = (segmentation,) if isinstance(segmentation, ResultObject) else tuple(segmentation or ())
    wanted = 0 if form is None or not findings.findings else 1 if form.per == "model" else len(findings.findings)
    expect(len(segs) == wanted, f"there must be a SEG exactly when there are findings: {wanted} and not {len(segs)}")
    expect(tuple(o.series_instance_uid for o in others) == findings.other_series, "the findings name other series than the model was given")
    segments: dict[int, tuple[DecodedSegment, ResultObject]] = {}  # of each finding
    for ordinal, one in enumerate(segs, start=1):
        seg = read(one.data)
        expect(str(seg.SOPInstanceUID) == one.sop_instance_uid, "the SEG's bytes hold another SOP Instance UID than was announced")
        decoded = {s.number: s for s in decode_segmentation(seg, volume, empty_frames=form is not None and form.empty_frames)}
        _compare_images(_named_by_segmentation(seg), {*volume.sop_instance_uids}, "SEG")
        numbers = {f.number for f in findings.findings} if wanted == 1 else {1}
        expect(set(decoded) == numbers, f"the SEG has the segments {sorted(decoded)}, the findings are {sorted(numbers)}")
        segments |= {number if wanted == 1 else ordinal: (segment, one) for number, segment in decoded.items()}
    for finding in findings.findings if segs else ():
        _compare_segment(segments[finding.number][0], finding, volume)
    document = read_report(report, volume.study_instance_uid)
    compare_origin(document, modality=volume.modality, algorithm_name=findings.algorithm_name, package_version=findings.version)
    groups = list(decode_report(document))
    known = [segments[f.number][0].tracking_uid if segs else g.tracking_uid for f, g in zip(findings.findings, groups, strict=False)]
    expect(len(set(known)) == len(findings.findings), "the SR has fewer groups than findings, or two findings have one Tracking UID")
    for finding, tracking_uid in zip(findings.findings, known, strict=True):
        mine = [g for g in groups if g.tracking_uid == tracking_uid]
        _compare_groups(mine, finding, segments.get(finding.number), volume)
        volume_ml = segments[finding.number][0].volume_ml if segs else finding.segment.voxel_count * volume.voxel_ml
        compare_growth(min(mine, key=lambda g: g.segment is None), finding, volume_ml, findings)
    _compare_study(compare_vanished([g for g in groups if g.tracking_uid not in known], findings), findings, volume)
    compare_comments(comments_of(document), findings, volume)
    compare_predecessors(document, findings, comments_of(document))
    _compare_evidence(document, volume, others, segs)


def prove_selection(selection: ResultObject | None, findings: Findings, volume: Volume) -> None:
    """Return if a key object selection flags the images, or the frames, that findings are drawn on, and no others.

    Raises:
        ProofFailed: one sentence says what differs; the selection may not leave.
    """
    expect((selection is None) == (not findings.findings), "there must be a key object selection exactly when there are findings")
    if selection is None:
        return
    document = read(selection.data)
    expect(str(document.SOPInstanceUID) == selection.sop_instance_uid, "the key objects hold another SOP Instance UID than was announced")
    expect(document.StudyInstanceUID == volume.study_instance_uid, "the key objects belong to another study than the volume")
    expect(str(document.get("ContentQualification")) == "RESEARCH", "the key objects' Content Qualification isn't RESEARCH")
    said = [str(item.TextValue) for item in items_below(document) if item.ValueType == "TEXT"]
    expect(any(WARNING in text for text in said), "the key objects don't say that they are for research only")
    flagged = set()
    for item in items_below(document):
        if item.ValueType == "IMAGE":
            reference = item.ReferencedSOPSequence[0]
            numbers = reference.get("ReferencedFrameNumber")
            frames = [numbers] if numbers is None or isinstance(numbers, int | str) else list(numbers)
            flagged |= {(str(reference.ReferencedSOPInstanceUID), None if n is None else int(n)) for n in frames}
    wanted = {plane for plane, k in slices_of(volume).items() if any(k == finding.key_slice for finding in findings.findings)}
    expect(flagged == wanted, f"the key objects flag {sorted(map(str, flagged))}, the findings are on {sorted(map(str, wanted))}")
    evidence = dict(evidence_of(document))
    for uid in {uid for uid, _ in wanted} | {*evidence}:
        expect(evidence.get(uid) == volume.series_instance_uid, f"the key objects' evidence doesn't name {uid} in its series")


def _compare_segment(segment: DecodedSegment, finding: Finding, volume: Volume) -> None:
    """What it is called, volume, centre, bounds, side, and at last each voxel."""
    name = f"segment {segment.number}"
    for shape in ("box", "heat map"):
        expect(
            segment.label.endswith(f", {shape}") == (finding.shape == shape),
            f"{name} is labelled {segment.label!r}, but is a {finding.shape}",
        )
    coded = tuple((code.value, code.scheme) for code in (finding.category, finding.type))
    expect(segment.codes == coded, f"{name} is coded as {segment.codes}, its finding as {coded}")
    count = finding.segment.voxel_count
    expect(segment.count == count, f"{name} has {segment.count} voxels, its finding {count}")
    _compare_measures(segment, volume)
    middle, ends = _extent(finding.segment)
    half_voxel = np.full(3, _HALF) if volume.is_projection else _HALF * np.abs(volume.affine[:3, :3]).sum(axis=1)  # along x, y, z
    unit = "(slice, row, column)" if volume.is_projection else "mm (LPS)"
    there = ends if volume.is_projection else volume.to_lps(ends)
    said = middle if finding.centre_lps_mm is None else np.array(finding.centre_lps_mm)
    expect((finding.centre_lps_mm is None) == volume.is_projection, f"{name} has a centre in space exactly where its images have none")
    for decoded, wanted, verb in (
        (segment.centre, said, "has its centre"),
        (segment.low, there.min(axis=0), "begins"),
        (segment.high, there.max(axis=0), "ends"),
    ):
        near = bool((np.abs(decoded - wanted) <= half_voxel + 1e-9).all())
        expect(near, f"{name} {verb} at {_point(decoded)} {unit}, its finding at {_point(wanted)}")
    coded_side = finding.side if finding.site is not None else None
    expect(segment.side == coded_side, f"{name} is coded as {segment.side or 'neither'} side, its finding is {coded_side or 'neither'}")
    _compare_voxels(segment, finding)


def _compare_measures(segment: DecodedSegment, volume: Volume) -> None:
    name = f"segment {segment.number}"
    if volume.is_projection:
        expect(segment.pixel_mm is None, f"{name} claims a pixel spacing on a projection")
    else:
        near = _near(segment.volume_ml, segment.count * volume.voxel_ml)
        expect(near, f"{name} has {segment.volume_ml:.4f} ml by its own pixel measures")


def _extent(segment: Segment) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean voxel index (3,), and the first and last voxel of each row (n, 3): a linear map has its extremes there."""
    mask, origin = segment.mask, np.array(segment.origin, dtype=np.float64)
    sums = [mask.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    middle = np.array([total @ np.arange(len(total)) for total in sums], dtype=np.float64) / segment.voxel_count
    filled = mask.any(axis=2)
    left, right = mask.argmax(axis=2)[filled], mask.shape[2] - 1 - mask[:, :, ::-1].argmax(axis=2)[filled]
    rows = np.argwhere(filled)
    ends = np.concatenate([np.column_stack([rows, left]), np.column_stack([rows, right])])
    return middle + origin, ends + origin


def _compare_voxels(segment: DecodedSegment, finding: Finding) -> None:
    first, row, column = finding.segment.origin
    rows, columns = finding.segment.mask.shape[1:]
    for frame in segment.frames:
        k = frame.slice_index - first
        same = 0 <= k < len(finding.segment.mask)
        if same:
            mask, (top, bottom, left, right) = finding.segment.mask[k], frame.bounds
            inside = row <= top <= bottom < row + rows and column <= left <= right < column + columns
            there = mask[top - row : bottom + 1 - row, left - column : right + 1 - column]
            same = inside and frame.count == np.count_nonzero(mask) and np.array_equal(frame.mask, there)
            if same and frame.values is not None:
                each = finding.segment.probability
                shown = None if each is None else each[k][top - row : bottom + 1 - row, left - column : right + 1 - column]
                said = shown is not None and np.array_equal(frame.values, shown)
                expect(said, f"segment {segment.number} has other probabilities than its finding")
        expect(bool(same), f"segment {segment.number} has other voxels than its finding")


def _compare_groups(
    groups: Sequence[DecodedGroup], finding: Finding, segment: tuple[DecodedSegment, ResultObject] | None, volume: Volume
) -> None:
    """The SR's groups under a finding's Tracking UID: one with the segment and the numbers, one with a line on an image.

    Where there is no SEG, one with the line and the numbers.
    """
    name = f"finding {finding.number}"
    by_segment = [g for g in groups if g.segment is not None]
    by_region = [g for g in groups if g.region is not None]
    wanted = 1 if segment is None else 2
    expect(
        len(groups) == wanted, f"the SR has {len(groups)} groups under the Tracking UID of {name}, not {'one' if wanted == 1 else 'two'}"
    )
    once = len(by_region) == 1 and len(by_segment) == wanted - 1
    expect(once, f"the SR doesn't reference {name} once as segment and once as region")
    measured = _measured(finding, volume)
    if segment is not None:
        decoded, seg = segment
        right = (seg.sop_instance_uid, *((None, decoded.frames[0].number) if volume.is_projection else (decoded.number, None)))
        expect(by_segment[0].segment == right, f"the SR references another segment for {name}: {by_segment[0].segment}")
        measured = _measured_again(decoded)
    for group in groups:
        sides = tuple(s for s in (finding.side,) if s and finding.site)
        expect(group.sides == sides, f"the SR says {group.sides or 'no side'} for {name}, which is {sides or 'neither'}")
        for concept, code in ((_TYPE, finding.type), (_CATEGORY, finding.category)):
            said = [value for c, value in group.codes if c == concept]
            expect(said == [code.value], f"the SR says {said} of ({concept}) for {name}, which is {code.value}")
    _compare_numbers((by_segment or by_region)[0], by_region[0], finding, measured, volume)
    if finding.shape == "outline":
        _compare_line(by_region[0], finding, volume)
    else:
        _compare_rectangle(by_region[0], measured, finding, volume)


def _measured(finding: Finding, volume: Volume) -> _Measured:
    left, top, right, bottom = (edge + _HALF for edge in finding.bounds_px)
    count = finding.segment.voxel_count
    return _Measured(count=count, volume_ml=count * volume.voxel_ml, edges=(left, top, right, bottom))


def _measured_again(segment: DecodedSegment) -> _Measured:
    bounds = np.array([frame.bounds for frame in segment.frames])
    left, top, right, bottom = bounds[:, 2].min(), bounds[:, 0].min(), bounds[:, 3].max() + 1, bounds[:, 1].max() + 1
    return _Measured(count=segment.count, volume_ml=segment.volume_ml, edges=(float(left), float(top), float(right), float(bottom)))


def _compare_numbers(by_segment: DecodedGroup, by_region: DecodedGroup, finding: Finding, segment: _Measured, volume: Volume) -> None:
    """Each number in each group; those that the SEG's voxels give are computed from them again."""
    name = f"finding {finding.number}"
    in_pixels = volume.calibration == "none"
    pixel = 1.0 if in_pixels else volume.spacing_mm[1] * volume.spacing_mm[2]
    known: dict[str, tuple[float | None, Mapping[str, float]]] = {
        _CERTAINTY: (100.0 * finding.probability, _TO_PERCENT),
        _LONG_AXIS: (finding.long_axis_mm, _TO_PIXELS if in_pixels else _TO_MM),
        _AREA: (segment.count * pixel if volume.is_projection else None, _TO_PIXELS if in_pixels else _TO_MM2),
        _VOLUME: (None if volume.is_projection else segment.volume_ml, _TO_ML),
    }
    given = {m.name.value: m for m in finding.measurements}
    numbers = [n for n in by_segment.numbers if n[0] not in (CHANGE, DOUBLING)]
    for number in (*numbers, *by_region.numbers):
        concept, value, unit, scheme = number
        wanted, units = known.get(concept, (None, {}))
        if wanted is not None:
            said = _converted(number, units, name)
            expect(_near(said, wanted), f"the SR says {said} {next(iter(units))} for {name}, which is {wanted:.6g}")
        else:
            expect(concept in given, f"the SR says {value} {unit} of {concept} for {name}, which the findings don't")
        if concept in given:
            same = _near(value, given[concept].value) and (unit, scheme) == (given[concept].unit.value, given[concept].unit.scheme)
            expect(same, f"the SR says {value} {unit} of {concept} for {name}")
    expected = {*given, _CERTAINTY, *([_LONG_AXIS] if finding.long_axis is not None else [])}
    said_once = sorted(n[0] for n in numbers)
    expect(
        said_once == sorted(expected), f"the SR gives the numbers {said_once} for the segment of {name}, the findings {sorted(expected)}"
    )


def _compare_line(group: DecodedGroup, finding: Finding, volume: Volume) -> None:
    """The long axis, drawn in pixels, has its length in millimetres, its place in space, and touches its segment."""
    name = f"finding {finding.number}"
    lengths = [n[1] * {**_TO_MM, **_TO_PIXELS}.get(n[2], 0.0) for n in group.numbers if n[0] == _LONG_AXIS]
    expect(len(lengths) == 1, f"the SR's line of {name} has no length")
    plane, points = _on_a_slice(group, volume, name)
    expect(len(points) == 2, f"the SR's line of {name} isn't a line on an image of the volume")
    index = np.column_stack([np.full(2, plane), points[:, 1] - 0.5, points[:, 0] - 0.5])
    ends = volume.to_lps(index)
    drawn = float(np.linalg.norm(ends[1] - ends[0]))
    expect(abs(drawn - lengths[0]) < 0.01, f"the SR's line of {name} is {drawn:.3f} mm long on its image, the SR says {lengths[0]} mm")
    half_voxel = _HALF * np.abs(volume.affine[:3, :3]).sum(axis=1)
    axis = finding.long_axis
    off = np.abs(ends - np.array(axis.points_lps_mm)) if axis else np.full(3, np.inf)
    expect(bool((off <= half_voxel).all()), f"the SR's line of {name} lies elsewhere than its long axis")
    first, row, column = finding.segment.origin
    mask = finding.segment.mask[plane - first] if 0 <= plane - first < len(finding.segment.mask) else np.zeros((0, 0), dtype=np.bool_)
    on_plane = np.argwhere(mask) + np.array([row, column])
    expect(len(on_plane) > 0, f"the SR's line of {name} lies on a slice where its segment has no voxel")
    for end in index[:, 1:]:
        nearest = float(np.abs(on_plane - end).max(axis=1).min())
        expect(nearest <= 1.0, f"the SR's line of {name} ends {nearest:.1f} pixels away from its segment")


def _compare_rectangle(group: DecodedGroup, segment: _Measured, finding: Finding, volume: Volume) -> None:
    """A closed rectangle around all of the segment's pixels, on its middle slice."""
    name = f"finding {finding.number}"
    plane, points = _on_a_slice(group, volume, name)
    expect(plane == finding.middle_slice, f"the SR's rectangle of {name} lies on slice {plane}, its middle is {finding.middle_slice}")
    off = _off_rectangle(points, *segment.edges)
    expect(off < np.inf, f"the SR's region of {name}, a {finding.shape}, is no closed rectangle")
    expect(off <= 0.01, f"the SR's rectangle of {name} lies {off:.2f} pixels away from its segment")


def _off_rectangle(points: NDArray[np.float64], left: float, top: float, right: float, bottom: float) -> float:
    """How far a closed line of six points, which begins on an edge, is from a rectangle, in pixels; infinite for another line."""
    if len(points) != 6 or not (points[0] == points[-1]).all():
        return np.inf
    corners = np.array([(right, top), (right, bottom), (left, bottom), (left, top)], dtype=np.float64)
    on_edge = max(abs(points[0, 1] - top), left - points[0, 0], points[0, 0] - right)
    return float(max(np.abs(points[1:5] - corners).max(), on_edge))


def _on_a_slice(group: DecodedGroup, volume: Volume, name: str) -> tuple[int, NDArray[np.float64]]:
    """The slice of a region, and its points (PS3.3 C.18.6.1.2: (0, 0) is the corner of the first pixel, so centres lie at halves)."""
    image, points = group.region if group.region is not None else (("", None), np.empty((0, 2)))
    slices = slices_of(volume)
    expect(image in slices, f"the SR's region of {name} isn't a line on an image of the volume, but on {image}")
    return slices[image], points


def _compare_study(groups: Sequence[DecodedGroup], findings: Findings, volume: Volume) -> None:
    """The groups about the study: one for each class of a classification in their order, then the summary; each is of a whole image."""
    expected = len(findings.scores) + 1
    expect(len(groups) == expected, f"the SR has {len(groups)} groups that belong to no finding, and not {expected}")
    expect(len({g.tracking_uid for g in groups}) == expected, "two groups of the SR that belong to no finding have one Tracking UID")
    ending = _FINISHED[bool(findings.findings)]
    expect((_SUMMARY, ending) in groups[-1].codes, f"the SR's summary isn't ({ending}, DCM)")
    rows, columns = volume.voxels.shape[1:]
    for group in groups:
        _, points = _on_a_slice(group, volume, "the study")
        off = _off_rectangle(points, 0, 0, columns, rows)
        expect(off <= 0.01, "the SR's region of the study isn't the border of an image")
    for group, score in zip(groups, findings.scores, strict=False):
        expect((_TYPE, score.type.value) in group.codes, f"the SR's class is {group.codes}, not {score.type.value} ({score.label})")
        said = [_converted(number, _TO_PERCENT, score.label) for number in group.numbers if number[0] == _CERTAINTY]
        right = len(said) == 1 and _near(said[0], 100.0 * score.probability)
        expect(right, f"the SR says {said} % for {score.label}, which is {100.0 * score.probability:.4g} %")


def _compare_images(named: Iterator[str], known: set[str], what: str) -> None:
    """Every instance that an object names as its source or evidence is one of those the model was given, or the SEG beside it."""
    for uid in named:
        expect(uid in known, f"the {what} references {uid}, which is no image of the volume")


def _compare_evidence(document: Dataset, volume: Volume, others: Sequence[Volume], segs: Sequence[ResultObject]) -> None:
    """The SR names the images that were analysed, all of them, each in its series."""
    series = {uid: v.series_instance_uid for v in (volume, *others) for uid in v.sop_instance_uids}
    series |= {seg.sop_instance_uid: seg.series_instance_uid for seg in segs}
    _compare_images(
        (str(i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for i in items_below(document) if i.ValueType == "IMAGE"), {*series}, "SR"
    )
    named = dict(evidence_of(document))
    _compare_images(iter(named), {*series}, "SR")
    for uid, where in series.items():
        expect(named.get(uid) == where, f"the SR's evidence doesn't name {uid} in its series")


def _named_by_segmentation(seg: Dataset) -> Iterator[str]:
    """Common Instance Reference and Source Image Sequence (PS3.3 C.12.2, C.7.6.1.1)."""
    for series in seg.ReferencedSeriesSequence:
        yield from (str(instance.ReferencedSOPInstanceUID) for instance in series.ReferencedInstanceSequence)
    yield from (str(instance.ReferencedSOPInstanceUID) for instance in seg.SourceImageSequence)


def _converted(number: Number, units: Mapping[str, float], name: str) -> float:
    concept, value, unit, scheme = number
    known = scheme == "UCUM" and unit in units
    expect(known, f"the SR gives {concept} of {name} in ({unit}, {scheme}), which isn't one of {sorted(units)} of UCUM")
    return value * units[unit]


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= _NUMBER * abs(wanted) + 1e-9


def _point(point: Sequence[float] | NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{float(v):.1f}" for v in point) + ")"
