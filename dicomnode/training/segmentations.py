"""What a DICOM SEG (PS3.3 A.51) marks on an image: its segments as masks on the image's voxels.

Whoever wrote it: the node, highdicom or dcmqi. Must never guess: a frame that doesn't lie on a plane of the image is a fault, not a label.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError

from dicomnode.errors import UsageError
from dicomnode.findings import Code, Volume
from dicomnode.results.decoding import Plane, frame_pixels, slices_of
from dicomnode.training.dataset import Mask

HALF = 0.5  # voxel: how far a frame may lie from its plane of the image
_NUMBER = re.compile(r"[\s,]*\d+$")  # that tells segments of one label apart
_NO_OUTLINE = (", box", ", heat map")  # how the node ends the label of a segment that outlines nothing
_MALFORMED = (AttributeError, KeyError, IndexError, TypeError, ValueError, NotImplementedError, BytesLengthException)


@dataclass(frozen=True, kw_only=True)
class SegmentRule:
    """Which segments are a label: by Segment Label or the type's meaning (a pattern, any case), else by the type's code."""

    label: str
    pattern: str
    type: Code | None = None


@dataclass(frozen=True, kw_only=True)
class SegFile:
    """A SEG and the images that it says it was made on."""

    file: Path
    seg: Dataset
    labels: dict[int, str]  # by segment number; a segment that no rule takes, or that outlines nothing, is left out
    images: frozenset[str]  # SOP Instance UIDs


def read_seg(file: Path, rules: Sequence[SegmentRule]) -> SegFile:
    """Read a SEG. Without rules each segment's label is its Segment Label without the number at its end.

    Raises:
        UsageError: it isn't readable, isn't BINARY, or has fewer pixels than frames.
    """
    try:
        seg = pydicom.dcmread(file)
        kind = str(seg.SegmentationType)
        if kind != "BINARY":
            raise UsageError(f"{file} is a SEG of the type {kind}, and BINARY is read alone")
        if seg.file_meta.TransferSyntaxUID.is_encapsulated:
            raise UsageError(f"{file} is a compressed SEG, and native pixels are read alone")
        frames = int(seg.get("NumberOfFrames", 1))
        size = (frames * int(seg.Rows) * int(seg.Columns) + 7) // 8
        if len(seg.PerFrameFunctionalGroupsSequence) != frames or len(seg.PixelData) < size:
            raise UsageError(f"{file} has fewer pixels or functional groups than its {frames} frame(s)")
        labels = {int(item.SegmentNumber): label for item in seg.SegmentSequence if (label := _label(item, rules)) is not None}
        return SegFile(file=file, seg=seg, labels=labels, images=frozenset(_images(seg)))
    except (InvalidDicomError, OSError, *_MALFORMED) as error:
        raise UsageError(f"{file} is no readable SEG ({type(error).__name__})") from error


def masks_of(read: SegFile, volume: Volume) -> dict[str, Mask]:
    """Return each label's voxels (k, r, c) in the image; segments of one label together.

    Raises:
        UsageError: a frame lies off the image's planes by more than half a voxel, names an image that isn't there, or belongs to
            another frame of reference.
    """
    seg, file = read.seg, read.file
    if seg.get("FrameOfReferenceUID") != volume.frame_of_reference_uid:
        raise UsageError(f"{file} lies in another frame of reference than its images")
    masks = {label: np.zeros(volume.voxels.shape, dtype=np.bool_) for label in read.labels.values()}
    planes = slices_of(volume)
    try:
        for number, item in enumerate(seg.PerFrameFunctionalGroupsSequence):
            shared = seg.SharedFunctionalGroupsSequence[0]
            segment = int(_group(item, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            if segment not in read.labels:
                continue
            name = f"{file}, frame {number + 1}"
            pixels = frame_pixels(seg, number)
            sources = _sources(item)
            if sources and not any(source in planes for source in sources):
                raise UsageError(f"{name} refers to images that aren't there")
            named = {planes[source] for source in sources if source in planes}
            k, turned = _placed(name, pixels, named, item, shared, volume)
            masks[read.labels[segment]][k] |= turned
    except _MALFORMED as error:
        raise UsageError(f"{file} is a malformed SEG ({type(error).__name__}: {error})") from error
    return masks


def _placed(name: str, pixels: Mask, named: set[int], item: Dataset, shared: Dataset, volume: Volume) -> tuple[int, Mask]:
    """The slice that a frame lies on, one of those it names if it names any, and its pixels turned as the image's are."""
    shape = volume.voxels.shape[1:]
    if volume.is_projection:
        if pixels.shape != shape or len(named) != 1:
            raise UsageError(f"{name} has {pixels.shape} pixels on an image of {shape}, or names no image")
        return named.pop(), pixels
    middle = volume.to_index(_points((np.array([pixels.shape], dtype=np.float64) - 1) / 2, item, shared))
    k = round(float(middle[0, 0]))
    if not 0 <= k < len(volume.voxels) or (named and k not in named):
        raise UsageError(f"{name} is shifted: it lies on no plane of the image, or on another than the one it names")
    corners = np.array(list(product((0, shape[0] - 1), (0, shape[1] - 1))), dtype=np.float64)
    wanted = np.column_stack([np.full(4, float(k)), corners])
    for transposed, *steps in product((False, True), (1, -1), (1, -1)):
        turned = (pixels.T if transposed else pixels)[:: steps[0], :: steps[1]]
        if turned.shape != shape:
            continue
        before = np.where(np.array(steps) > 0, corners, np.array(shape) - 1 - corners)
        found = volume.to_index(_points(before[:, ::-1] if transposed else before, item, shared))
        if np.abs(found - wanted).max() <= HALF:
            return k, turned
    raise UsageError(f"{name} is shifted: its pixels don't lie on those of the image")


def _points(pixels: NDArray[np.float64], item: Dataset, shared: Dataset) -> NDArray[np.float64]:
    """LPS mm of pixels (n, 2) (row, column) of a frame (PS3.3 C.7.6.2.1.1)."""
    position = np.array(_group(item, shared, "PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    cosines = np.array(_group(item, shared, "PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
    row_mm, column_mm = (float(step) for step in _group(item, shared, "PixelMeasuresSequence").PixelSpacing)
    points = position + np.outer(pixels[:, 1] * column_mm, cosines[:3]) + np.outer(pixels[:, 0] * row_mm, cosines[3:])
    return np.asarray(points, dtype=np.float64)


def _group(item: Dataset, shared: Dataset, keyword: str) -> Dataset:
    group: Dataset = (item if keyword in item else shared)[keyword].value[0]
    return group


def _sources(item: Dataset) -> list[Plane]:
    """The planes that a frame says it was derived from."""
    return [
        (str(source.ReferencedSOPInstanceUID), None if (number := source.get("ReferencedFrameNumber")) is None else int(number))
        for derivation in item.get("DerivationImageSequence", [])
        for source in derivation.get("SourceImageSequence", [])
    ]


def _images(seg: Dataset) -> Iterator[str]:
    for series in seg.get("ReferencedSeriesSequence", []):
        for instance in series.get("ReferencedInstanceSequence", []):
            yield str(instance.ReferencedSOPInstanceUID)
    for item in seg.PerFrameFunctionalGroupsSequence:
        yield from (uid for uid, _ in _sources(item))


def _label(item: Dataset, rules: Sequence[SegmentRule]) -> str | None:
    """The label of a segment; None: it is none of those that are wanted."""
    said = str(item.get("SegmentLabel", "")).strip()
    if said.endswith(_NO_OUTLINE):
        return None
    coded = item.SegmentedPropertyTypeCodeSequence[0]
    name = _NUMBER.sub("", said) or str(coded.get("CodeMeaning", ""))
    if not rules:
        return name or None
    for rule in rules:
        if any(fnmatchcase(text.casefold(), rule.pattern.casefold()) for text in (name, said, str(coded.get("CodeMeaning", "")))):
            return rule.label
    typed = [
        rule.label
        for rule in rules
        if rule.type
        and (rule.type.value, rule.type.scheme) == (str(coded.get("CodeValue", "")), str(coded.get("CodingSchemeDesignator", "")))
    ]
    return typed[0] if len(typed) == 1 else None
