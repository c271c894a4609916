"""Pictures are read again from their bytes and compared with findings and images before they leave the node.

Must never import highdicom or the encoders: what proves must not share code with what is proved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.findings import Finding, Findings, ResultObject, Volume
from dicomnode.results.decoding import expect, read, slices_of

_LONG_SIDE = 1024  # pixels of the image's longer side, at the top left of a picture
_STROKE = 2  # pixels of an outline, outside of what it surrounds
_OFF = 1.5  # pixels that it may lie elsewhere
_COLOURED = 48  # difference between the channels of an outline's pixel: all else over the image is grey
_CONTRAST, _FINE = 40, 8  # grey levels that tell two places apart, for the image as a whole and between neighbouring slices
_SAMPLES, _AGREEMENT = 128, 0.99  # places along each axis; share of pairs
_BETTER = 0.8  # of the contradictions of a slice: what a neighbour must have to fit better
_MOST = 10  # pictures: only beyond them may a finding be on none
_WARNING = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"


def prove_captures(captures: Sequence[ResultObject], findings: Findings, volume: Volume) -> None:
    """Return if each picture shows its image the right way round, and outlines what the findings say, and nothing else.

    Raises:
        ProofFailed: one sentence says what differs; none of the pictures may leave.
    """
    expect(len(captures) > 0, "there is no picture")
    slices, drawn = slices_of(volume), set()
    for number, capture in enumerate(captures, start=1):
        name = f"picture {number}"
        image = read(capture.data)
        expect(str(image.SOPInstanceUID) == capture.sop_instance_uid, f"{name} holds another SOP Instance UID than was announced")
        expect(image.StudyInstanceUID == volume.study_instance_uid, f"{name} belongs to another study than the volume")
        expect(str(image.get("ContentQualification")) == "RESEARCH", f"{name}'s Content Qualification isn't RESEARCH")
        expect(_WARNING in str(image.get("ImageComments")), f"{name} doesn't say that it is for research only")
        expect(str(image.get("BurnedInAnnotation")) == "YES", f"{name} doesn't say that something is burned in")
        sources = [(str(s.ReferencedSOPInstanceUID), s.get("ReferencedFrameNumber")) for s in image.SourceImageSequence]
        expect(len(sources) == 1 and sources[0] in slices, f"{name} names {sources} as its source, no image of the volume")
        k = slices[sources[0]]
        here = [finding for finding in findings.findings if _mask(finding, k) is not None]
        drawn |= {finding.number for finding in here}
        pixels = _pixels(image, volume, name)
        _compare_image(pixels, volume, k, name)
        _compare_outlines(pixels, here, volume, k, name)
    missing = sorted({finding.number for finding in findings.findings} - drawn)
    expect(not missing or len(captures) == _MOST, f"no picture shows the findings {missing}")


def _pixels(image: Dataset, volume: Volume, name: str) -> NDArray[np.int16]:
    """(rows, columns, 3) of the image alone, without the words below it."""
    expect(str(image.PhotometricInterpretation) == "RGB" and int(image.BitsAllocated) == 8, f"{name} isn't RGB of 8 bits")
    whole = np.frombuffer(image.PixelData, dtype=np.uint8)[: int(image.Rows) * int(image.Columns) * 3]
    rows, columns = (round(scale * count) for scale, count in zip(_scale(volume), volume.voxels.shape[1:], strict=True))
    expect(int(image.Rows) > rows and int(image.Columns) >= columns, f"{name} is smaller than its image and its words")
    return whole.reshape(int(image.Rows), int(image.Columns), 3)[:rows, :columns].astype(np.int16)


def _scale(volume: Volume) -> tuple[float, float]:
    """Pixels of a picture for each voxel along rows and columns."""
    _, row_mm, column_mm = volume.spacing_mm
    longest = max(volume.voxels.shape[1] * row_mm, volume.voxels.shape[2] * column_mm)
    return _LONG_SIDE * row_mm / longest, _LONG_SIDE * column_mm / longest


def _mask(finding: Finding, k: int) -> NDArray[np.bool_] | None:
    """The finding's voxels on a slice, in its own box; None where it has none there."""
    inside = k - finding.segment.origin[0]
    mask = finding.segment.mask[inside] if 0 <= inside < len(finding.segment.mask) else None
    return mask if mask is not None and mask.any() else None


def _compare_image(pixels: NDArray[np.int16], volume: Volume, k: int, name: str) -> None:
    """Of two places that differ in the picture, the brighter one has the larger value: so it is shown the right way round.

    And neither neighbour of the slice fits better: so it is the right slice.
    """
    rows, columns = (np.linspace(0, count - 1, min(count, _SAMPLES)).astype(np.intp) for count in volume.voxels.shape[1:])
    greys = _at_centres(pixels, rows, columns, _scale(volume))
    slices = {
        j: volume.voxels[j][np.ix_(rows, columns)].astype(np.float64).ravel() for j in (k - 1, k, k + 1) if 0 <= j < len(volume.voxels)
    }
    told, wrong = _contradictions(slices[k], greys, _CONTRAST)
    allowed = (1 - _AGREEMENT) * told + len(greys) // 100  # letters and numbers lie over the image
    expect(wrong <= allowed, f"{name} shows something else than its image: {wrong} of {told} pairs of places contradict it")
    fine = {j: _contradictions(values, greys, _FINE)[1] for j, values in slices.items()}
    better = [j for j, count in fine.items() if count < _BETTER * fine[k]]
    expect(not better, f"{name} shows something else than its image: slice {better} of the volume and not {k}")


def _at_centres(
    pixels: NDArray[np.int16], rows: NDArray[np.intp], columns: NDArray[np.intp], scale: tuple[float, float]
) -> NDArray[np.float64]:
    """The picture's greys at the centres of voxels, interpolated between four pixels; -1 where one of these has colour."""
    lows, parts = [], []
    for index, step, size in zip((rows, columns), scale, pixels.shape, strict=False):
        place = np.clip((index + 0.5) * step - 0.5, 0, size - 1.001)
        lows.append(place.astype(np.intp))
        parts.append(place - place.astype(np.intp))
    total, has_colour = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=np.bool_)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = pixels[np.ix_(lows[0] + down, lows[1] + right)]
        weight = np.outer(*(share if side else 1 - share for share, side in zip(parts, (down, right), strict=True)))
        total += weight * part[..., 0]
        has_colour |= np.ptp(part, axis=2) >= _COLOURED
    return np.where(has_colour, -1.0, total).ravel()


def _contradictions(values: NDArray[np.float64], greys: NDArray[np.float64], contrast: int) -> tuple[int, int]:
    """How many pairs of places are at least so many grey levels apart, and of how many the brighter one has no larger value."""
    told = wrong = 0
    for share in (2, 3, 7):
        others = np.roll(greys, len(greys) // share)
        apart = (greys >= 0) & (others >= 0) & (np.abs(greys - others) >= contrast)
        same = (greys > others) == (values > np.roll(values, len(values) // share))
        told, wrong = told + int(apart.sum()), wrong + int((apart & ~same).sum())
    return told, wrong


def _compare_outlines(pixels: NDArray[np.int16], here: Sequence[Finding], volume: Volume, k: int, name: str) -> None:
    """All that is coloured is bounded by the findings of the slice, and there is colour around each of them."""
    coloured = np.ptp(pixels, axis=2) >= _COLOURED
    expect(bool(coloured.any()) == bool(here), f"{name} has an outline where there is no finding, or none where there is one")
    if not here:
        return
    bounds = [_bounds(finding, volume, k, coloured.shape) for finding in here]
    for finding, (top, bottom, left, right) in zip(here, bounds, strict=True):
        low = slice(max(0, int(top - _OFF)), int(bottom + _OFF) + 1), slice(max(0, int(left - _OFF)), int(right + _OFF) + 1)
        expect(bool(coloured[low].any()), f"{name} has no outline around finding {finding.number}")
    wanted = np.array([f(side) for f, side in zip((min, max, min, max), zip(*bounds, strict=True), strict=True)])
    there = np.array([edge for lines in np.nonzero(coloured) for edge in (lines.min(), lines.max() + 1)], dtype=np.float64)
    off = float(np.abs(there - wanted).max())
    expect(off <= _OFF, f"{name} has its outlines {off:.1f} pixels away from its findings")


def _bounds(finding: Finding, volume: Volume, k: int, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Top, bottom, left and right edge of an outline, in pixels of the picture."""
    mask = _mask(finding, k)
    edges: list[float] = []
    for axis, lines in enumerate(np.nonzero(mask) if mask is not None else ()):
        scale, origin = _scale(volume)[axis], finding.segment.origin[axis + 1]
        first, end = (origin + int(lines.min())) * scale, (origin + int(lines.max()) + 1) * scale
        edges += [max(0.0, first - _STROKE), min(float(shape[axis]), end + _STROKE)]
    return tuple(edges)
