"""Presentation states are read again from their bytes and compared with findings and images before they leave the node.

Must never import highdicom or the encoders: what proves must not share code with what is proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.findings import Finding, Findings, ResultObject, Volume
from dicomnode.results.decoding import expect, read, slices_of

_MOST = 200  # images: only beyond them may a finding lie on one without its outline
_HALF = 0.5  # pixel: how far an outline may lie from the border of its finding
_WARNING = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"


def prove_presentations(states: Sequence[ResultObject], findings: Findings, volume: Volume) -> None:
    """Return if the states outline each finding on its images, within half a pixel, and nothing else anywhere.

    Raises:
        ProofFailed: one sentence says what differs; none of the states may leave.
    """
    expect(bool(states) == bool(findings.findings), "there must be a presentation state exactly when there are findings")
    named = {finding.number: finding for finding in findings.findings}
    drawn: set[tuple[int, int]] = set()  # finding and slice
    warned: set[int] = set()
    slices: set[int] = set()
    for state in states:
        dataset = read(state.data)
        here = _images(dataset, state, volume)
        expect(not here & slices, "two presentation states show the same image")
        slices |= here
        for annotation in dataset.GraphicAnnotationSequence:
            (k,) = _slices(annotation.ReferencedImageSequence, volume)
            expect(k in here, f"an outline lies on slice {k}, which its presentation state doesn't reference")
            texts = [str(text.UnformattedTextValue) for text in annotation.get("TextObjectSequence", [])]
            if "GraphicObjectSequence" not in annotation:
                warned |= {k} if any(_WARNING in text for text in texts) else set()
                continue
            number = _number(texts, named)
            expect((number, k) not in drawn, f"finding {number} is outlined twice on slice {k}")
            drawn.add((number, k))
            _compare(list(_lines(annotation)), named[number], volume, k)
    expect(slices <= warned, "an image doesn't say that its outlines are for research only")
    _compare_extent(drawn, slices, findings)


def _images(dataset: Dataset, state: ResultObject, volume: Volume) -> set[int]:
    """The slices that a presentation state is about."""
    expect(
        str(dataset.SOPInstanceUID) == state.sop_instance_uid, "the presentation state holds another SOP Instance UID than was announced"
    )
    expect(dataset.StudyInstanceUID == volume.study_instance_uid, "the presentation state belongs to another study than the volume")
    expect(str(dataset.get("ContentQualification")) == "RESEARCH", "the presentation state's Content Qualification isn't RESEARCH")
    expect(str(dataset.get("ContentDescription")).endswith(_WARNING), "the presentation state doesn't say that it is for research only")
    series = {str(item.SeriesInstanceUID) for item in dataset.ReferencedSeriesSequence}
    expect(series == {volume.series_instance_uid}, f"the presentation state references the series {sorted(series)}")
    rows, columns = volume.voxels.shape[1:]
    for area in dataset.DisplayedAreaSelectionSequence:
        shown = [*area.DisplayedAreaTopLeftHandCorner, *area.DisplayedAreaBottomRightHandCorner]
        expect(shown == [1, 1, columns, rows], f"the presentation state shows {shown} of its images, not all of them")
    return {k for item in dataset.ReferencedSeriesSequence for k in _slices(item.ReferencedImageSequence, volume)}


def _slices(references: Sequence[Dataset], volume: Volume) -> list[int]:
    known, found = slices_of(volume), []
    for reference in references:
        numbers = reference.get("ReferencedFrameNumber")
        frames = [numbers] if numbers is None or isinstance(numbers, int | str) else list(numbers)
        for frame in frames:
            plane = str(reference.ReferencedSOPInstanceUID), None if frame is None else int(frame)
            expect(plane in known, f"the presentation state references {plane}, no image of the volume")
            found.append(known[plane])
    return found


def _number(texts: Sequence[str], named: dict[int, Finding]) -> int:
    """The finding whose label stands beside an outline."""
    expect(len(texts) == 1, f"an outline has {len(texts)} labels")
    number, _, words = texts[0].partition(": ")
    finding = named.get(int(number)) if number.isdigit() else None
    expect(finding is not None and bool(words), f"an outline is labelled {texts[0]!r}, which is no finding")
    side = next((side for side in ("left", "right") if f", {side}" in words), None)
    expect(finding is None or side == finding.side, f"the label {texts[0]!r} has another side than its finding")
    return int(number)


def _lines(annotation: Dataset) -> Iterator[NDArray[np.float64]]:
    """The closed lines of an annotation, (n, 2) as (column, row); one that is longer than an element goes on in the next."""
    points: list[NDArray[np.float64]] = []
    for graphic in annotation.GraphicObjectSequence:
        kind = str(graphic.GraphicAnnotationUnits), str(graphic.GraphicType), str(graphic.get("GraphicFilled", "N"))
        expect(kind == ("PIXEL", "POLYLINE", "N"), f"an outline is {kind}, no open line in pixels")
        part = np.asarray(graphic.GraphicData, dtype=np.float64).reshape(-1, 2)
        expect(len(part) == int(graphic.NumberOfGraphicPoints), "an outline has another number of points than it says")
        expect(not points or bool((points[-1] == part[0]).all()), "an outline is no closed line")
        points += list(part[1:] if points else part)
        if (points[0] == points[-1]).all():
            yield np.array(points)
            points = []
    expect(not points, "an outline is no closed line")


def _compare(lines: Sequence[NDArray[np.float64]], finding: Finding, volume: Volume, k: int) -> None:
    """What lies within the lines is the finding on this slice, pixel centre by pixel centre, and no corner is off its border."""
    name = f"the outline of finding {finding.number} on slice {k}"
    inside = k - finding.segment.origin[0]
    expect(0 <= inside < len(finding.segment.mask), f"{name} is on a slice where the finding isn't")
    mask = np.zeros((volume.voxels.shape[1] + 2, volume.voxels.shape[2] + 2), dtype=np.bool_)  # a pixel wider on each side
    _, row, column = finding.segment.origin
    part = finding.segment.mask[inside]
    mask[row + 1 : row + 1 + part.shape[0], column + 1 : column + 1 + part.shape[1]] = part
    surrounded = _within(lines, (volume.voxels.shape[1], volume.voxels.shape[2]))
    off = int(np.count_nonzero(surrounded != mask[1:-1, 1:-1]))
    expect(off == 0, f"{name} surrounds other pixels than the finding has: {off} differ")
    corners = mask[:-1, :-1].astype(np.int8) + mask[1:, :-1] + mask[:-1, 1:] + mask[1:, 1:]  # of the mask's pixels around each corner
    border = (corners > 0) & (corners < 4)
    for line in lines:
        nearest = np.clip(np.rint(line), 0, np.array(border.shape)[::-1] - 1).astype(np.intp)
        near = np.abs(line - nearest).max(axis=1) <= _HALF
        expect(bool((border[nearest[:, 1], nearest[:, 0]] & near).all()), f"{name} lies more than half a pixel off its border")


def _within(lines: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which pixel centres a horizontal ray from the left reaches after an odd number of lines."""
    crossings = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)
    for line in lines:
        for (x0, y0), (x1, y1) in pairwise(line.tolist()):
            if y0 == y1:
                continue
            low, high = sorted((y0, y1))
            rows = np.arange(max(0, int(np.ceil(low - _HALF))), min(shape[0], int(np.ceil(high - _HALF))))
            places = x0 + (rows + _HALF - y0) * (x1 - x0) / (y1 - y0)
            np.add.at(crossings, (rows, np.clip(np.ceil(places - _HALF), 0, shape[1]).astype(np.intp)), 1)
    return np.asarray(np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1)


def _compare_extent(drawn: set[tuple[int, int]], slices: set[int], findings: Findings) -> None:
    """Each finding is outlined on each of its slices that is shown, and images are left out only where there are too many."""
    wanted = {
        (finding.number, finding.segment.origin[0] + int(k))
        for finding in findings.findings
        for k in np.flatnonzero(finding.segment.mask.any(axis=(1, 2)))
    }
    every = {k for _, k in wanted}
    expect(slices <= every, f"the presentation state shows slices without a finding: {sorted(slices - every)}")
    expect(len(slices) == min(len(every), _MOST), f"the presentation state shows {len(slices)} of {len(every)} images with findings")
    missing = {(number, k) for number, k in wanted if k in slices} - drawn
    expect(not missing, f"these findings aren't outlined on these slices: {sorted(missing)}")
