"""What the bytes of a SEG and an SR say, read without any help of those that wrote them.

Must never import highdicom or the encoders: only pydicom's reader and numpy. Segment, plane and position come from each frame's own
functional groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.utils import iter_pixels

from dicomnode.errors import ProofFailed
from dicomnode.findings import Laterality, ResultObject, Volume

LATERALITY: dict[str, Laterality] = {"7771000": "left", "24028007": "right"}
_BACKGROUND = 0  # a label map's voxels that belong to nothing
_HALF = 0.5  # voxel: how far a frame may lie from the place of the image it names

Number = tuple[str, float, str, str]  # concept, value, unit, scheme of the unit
Plane = tuple[str, int | None]  # SOP Instance UID and frame number; None of an image with one frame


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """One frame of a SEG: the slice it lies on, and where its pixels are, in LPS mm (of a projection: as (k, r, c))."""

    number: int  # from 1
    slice_index: int
    count: int
    centre: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    bounds: tuple[int, int, int, int]  # first and last row, first and last column
    mask: NDArray[np.bool_]  # the pixels within these bounds
    values: NDArray[np.uint8] | None  # of a FRACTIONAL SEG: their probabilities, 255 for 1


@dataclass(frozen=True, kw_only=True)
class DecodedSegment:
    """What the bytes of a SEG say about one segment."""

    number: int
    label: str
    tracking_uid: str
    codes: tuple[tuple[str, str], ...]  # category and type: value and scheme
    side: str | None
    frames: tuple[DecodedFrame, ...]
    pixel_mm: tuple[float, float] | None  # row and column spacing; None: it isn't said
    slice_mm: float | None

    @property
    def count(self) -> int:
        """Number of voxels."""
        return sum(frame.count for frame in self.frames)

    @property
    def volume_ml(self) -> float:
        """Millilitres by its own pixel measures; 0 where they don't say."""
        return (
            0.0
            if self.pixel_mm is None or self.slice_mm is None
            else self.count * self.pixel_mm[0] * self.pixel_mm[1] * self.slice_mm / 1000
        )

    @property
    def centre(self) -> NDArray[np.float64]:
        """The mean of all voxel centres."""
        return np.asarray(sum(frame.centre * frame.count for frame in self.frames) / self.count)

    @property
    def low(self) -> NDArray[np.float64]:
        """The smallest coordinates of a voxel centre."""
        return np.asarray(np.min([frame.low for frame in self.frames], axis=0))

    @property
    def high(self) -> NDArray[np.float64]:
        """The largest coordinates of a voxel centre."""
        return np.asarray(np.max([frame.high for frame in self.frames], axis=0))


@dataclass(frozen=True, kw_only=True)
class DecodedGroup:
    """What the bytes of an SR say in one measurement group."""

    tracking_uid: str
    numbers: tuple[Number, ...]
    time_points: tuple[str, ...]  # TID 1502
    codes: tuple[tuple[str, str], ...]  # concept, value
    sides: tuple[str, ...]
    segment: tuple[str, int | None, int | None] | None  # SOP Instance UID of a SEG, segment number, else frame number
    region: tuple[Plane, NDArray[np.float64]] | None  # an image, (n, 2) (column, row) from the corner of its first pixel


def decode_segmentation(seg: Dataset, volume: Volume, *, empty_frames: bool = False) -> list[DecodedSegment]:
    """Read a BINARY, FRACTIONAL or LABELMAP SEG alone; the volume says only which image and plane a frame must lie on.

    With `empty_frames` there must be a frame for each image (of a BINARY SEG for each of each segment), else none without a pixel.

    Raises:
        ProofFailed: a frame lies elsewhere than the image it names, names none of the volume's, or the frame of reference differs.
    """
    kind = str(seg.get("SegmentationType"))
    expect(kind in ("BINARY", "FRACTIONAL", "LABELMAP"), "the SEG is neither BINARY nor FRACTIONAL nor LABELMAP")
    if kind == "FRACTIONAL":
        fractions = str(seg.get("SegmentationFractionalType")), int(seg.get("MaximumFractionalValue", 0)), int(seg.BitsAllocated)
        expect(fractions == ("PROBABILITY", 255, 8), f"the SEG's fractions are {fractions}, no probabilities up to 255 in 8 bits")
    expect(str(seg.get("ContentQualification")) == "RESEARCH", "the SEG's Content Qualification isn't RESEARCH")
    said = seg.get("FrameOfReferenceUID")
    expect(said == volume.frame_of_reference_uid, f"the SEG's Frame of Reference is {said}, the volume's {volume.frame_of_reference_uid}")
    expect(seg.StudyInstanceUID == volume.study_instance_uid, "the SEG belongs to another study than the volume")
    slices = slices_of(volume)
    to_index = None if volume.is_projection else np.asarray(np.linalg.inv(volume.affine), dtype=np.float64)
    described = [item for item in seg.SegmentSequence if kind != "LABELMAP" or int(item.SegmentNumber) != _BACKGROUND]
    found: dict[int, dict[int, DecodedFrame]] = {int(item.SegmentNumber): {} for item in described}
    shared = seg.SharedFunctionalGroupsSequence[0]
    expect(len(seg.PerFrameFunctionalGroupsSequence) == int(seg.NumberOfFrames), "the SEG's number of frames isn't that of its items")
    seen: dict[int, set[int]] = {number: set() for number in ([_BACKGROUND] if kind == "LABELMAP" else found)}
    encoded = None if kind == "BINARY" else iter_pixels(seg)
    for number, frame in enumerate(seg.PerFrameFunctionalGroupsSequence, start=1):
        name = f"frame {number} of the SEG"
        sources = [_plane(s) for d in frame.DerivationImageSequence for s in d.SourceImageSequence]
        expect(len(sources) == 1 and sources[0] in slices, f"{name} names {sources} as its source, no image of the volume")
        k = slices[sources[0]]
        pixels = None if encoded is None else next(encoded)
        if pixels is not None and kind == "LABELMAP":
            holder, masks = _BACKGROUND, _masks_of(pixels)
        else:
            holder = int(group_of(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            masks = {holder: frame_pixels(seg, number - 1) if pixels is None else pixels > 0}
            masks = {} if empty_frames and not masks[holder].any() else masks
        expect(bool(masks) or empty_frames, f"{name} is empty")
        expect(k not in seen.setdefault(holder, set()), f"{name} is the second of segment {holder} on one image")
        seen[holder].add(k)
        place = place_of(name, frame, shared, projection=to_index is None)
        for segment, mask in masks.items():
            expect(segment in found, f"{name} belongs to segment {segment}, which isn't described")
            found[segment][k] = _frame(number, mask, k, place, to_index, pixels if kind == "FRACTIONAL" else None)
    whole = all(planes == set(slices.values()) for planes in seen.values())
    expect(whole or not empty_frames, "the SEG doesn't have a frame for each image")
    return [_segment(item, tuple(found[int(item.SegmentNumber)].values()), shared) for item in described]


def decode_report(document: Dataset) -> Iterator[DecodedGroup]:
    """Yield the measurement groups of a TID 1500 report, whatever template each follows.

    Raises:
        ProofFailed: a group has not exactly one Tracking Unique Identifier, or a number has no unit.
    """
    for item in items_below(document):
        if concept_of(item) == "125007":  # Measurement Group
            content = list(items_below(item))
            tracking = [str(i.UID) for i in content if concept_of(i) == "112040"]
            expect(len(tracking) == 1, f"a measurement group of the SR has {len(tracking)} Tracking Unique Identifiers")
            yield DecodedGroup(
                tracking_uid=tracking[0],
                numbers=tuple(_number(i) for i in content if i.ValueType == "NUM"),
                time_points=tuple(str(i.TextValue) for i in content if concept_of(i) == "C2348792"),
                codes=tuple((concept_of(i), str(i.ConceptCodeSequence[0].CodeValue)) for i in content if i.ValueType == "CODE"),
                sides=tuple(
                    LATERALITY.get(str(i.ConceptCodeSequence[0].CodeValue), "other") for i in content if concept_of(i) == "272741003"
                ),
                segment=_referenced_segment(content),
                region=_region(content),
            )


def comments_of(document: Dataset) -> list[str]:
    """Return the texts of all Comment items (121106, DCM)."""
    return [str(i.TextValue) for i in items_below(document) if i.ValueType == "TEXT" and concept_of(i) == "121106"]


def read(data: bytes) -> Dataset:
    """Return the data set of a Part 10 file."""
    return pydicom.dcmread(BytesIO(data))


def read_report(report: ResultObject, study_instance_uid: str) -> Dataset:
    """Return the data set of an SR that is what it was announced as: of this study, unverified, for research.

    Raises:
        ProofFailed: one sentence says what it isn't.
    """
    document = read(report.data)
    expect(str(document.get("VerificationFlag")) == "UNVERIFIED", "the SR doesn't say that nobody has verified it")
    expect(str(document.get("ContentQualification")) == "RESEARCH", "the SR's Content Qualification isn't RESEARCH")
    expect(str(document.SOPInstanceUID) == report.sop_instance_uid, "the SR's bytes hold another SOP Instance UID than was announced")
    expect(str(document.StudyInstanceUID) == study_instance_uid, "the SR belongs to another study than the images")
    return document


def frame_pixels(seg: Dataset, frame: int) -> NDArray[np.bool_]:
    """One frame (from 0) of BINARY pixel data: bits follow each other without padding, lowest bit first (PS3.5 8.1.1)."""
    size = int(seg.Rows) * int(seg.Columns)
    first = frame * size
    data = np.frombuffer(seg.PixelData, dtype=np.uint8, count=(first + size + 7) // 8 - first // 8, offset=first // 8)
    bits = np.unpackbits(data, bitorder="little")[first % 8 : first % 8 + size]
    return bits.reshape(int(seg.Rows), int(seg.Columns)).view(np.bool_)


def _masks_of(labels: NDArray[np.uint8]) -> dict[int, NDArray[np.bool_]]:
    """Each segment of a frame of labels."""
    present = np.flatnonzero(np.bincount(labels[labels != _BACKGROUND]))
    return {int(number): labels == number for number in present}


def slices_of(volume: Volume) -> dict[Plane, int]:
    """Return the slice that each image, or each frame of one, is."""
    numbers: Sequence[int | None] = volume.frame_numbers or [None] * len(volume.sop_instance_uids)
    return {plane: k for k, plane in enumerate(zip(volume.sop_instance_uids, numbers, strict=True))}


def evidence_of(document: Dataset) -> Iterator[tuple[str, str]]:
    """Yield what Current Requested Procedure Evidence names (PS3.3 C.17.2.3): instance and series."""
    for study in document.get("CurrentRequestedProcedureEvidenceSequence", []):
        for series in study.ReferencedSeriesSequence:
            for instance in series.ReferencedSOPSequence:
                yield str(instance.ReferencedSOPInstanceUID), str(series.SeriesInstanceUID)


def items_below(dataset: Dataset) -> Iterator[Dataset]:
    """Yield all content items below one, depth first."""
    for item in dataset.get("ContentSequence", []):
        yield item
        yield from items_below(item)


def concept_of(item: Dataset) -> str:
    """Return the code value of a content item's concept name."""
    names = item.get("ConceptNameCodeSequence", [])
    return str(names[0].get("CodeValue", "")) if names else ""


def expect(true: bool, otherwise: str) -> None:
    """Raise ProofFailed with `otherwise` as a sentence unless `true`."""
    if not true:
        raise ProofFailed(f"{otherwise[0].upper()}{otherwise[1:]}.")


def place_of(name: str, frame: Dataset, shared: Dataset, *, projection: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the centre of a frame's first pixel (3,) and its steps (2, 3) along rows and columns of pixels, LPS mm (PS3.3 C.7.6.2.1.1).

    Cosines are made orthogonal and of length one, since scanners round them. None of a projection.
    """
    if projection:
        for keyword in ("PlanePositionSequence", "PlaneOrientationSequence"):
            expect(keyword not in frame and keyword not in shared, f"{name} has a place in space, but lies on a projection")
        return None
    position = np.array(group_of(frame, shared, "PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    cosines = np.array(group_of(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
    row_mm, column_mm = map(float, group_of(frame, shared, "PixelMeasuresSequence").PixelSpacing)
    along_row = cosines[:3] / np.linalg.norm(cosines[:3])
    along_column = cosines[3:] - along_row * (along_row @ cosines[3:])
    along_column /= np.linalg.norm(along_column)
    return position, np.stack([along_column * row_mm, along_row * column_mm])


def _frame(
    number: int,
    mask: NDArray[np.bool_],
    k: int,
    place: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    to_index: NDArray[np.float64] | None,
    values: NDArray[np.uint8] | None,
) -> DecodedFrame:
    """Where the frame's pixels are. Its first and last pixel of each row are enough for extent and place, as positions are linear."""
    name = f"frame {number} of the SEG"
    rows = np.flatnonzero(mask.any(axis=1))
    expect(len(rows) > 0, f"{name} is empty")
    part = mask[rows[0] : rows[-1] + 1]
    columns = np.flatnonzero(part.any(axis=0))
    part = part[:, columns[0] : columns[-1] + 1].copy()
    filled = part[rows - rows[0]]
    left, right = columns[0] + filled.argmax(axis=1), columns[-1] - filled[:, ::-1].argmax(axis=1)
    ends = np.concatenate([np.column_stack([rows, left]), np.column_stack([rows, right])]).astype(np.float64)
    count = int(np.count_nonzero(part))
    middle = np.array([part.sum(axis=1) @ np.arange(len(part)), part.sum(axis=0) @ np.arange(part.shape[1])]) / count
    pixels = np.vstack([ends, middle + np.array([rows[0], columns[0]])])
    points = np.column_stack([np.full(len(pixels), float(k)), pixels])  # of a projection
    if place is not None and to_index is not None:
        there, points = points[:-1], place[0] + pixels @ place[1]
        off = float(np.abs(points[:-1] @ to_index[:3, :3].T + to_index[:3, 3] - there).max())
        expect(off <= _HALF + 1e-6, f"{name} lies {off:.2f} voxels away from its place on the image it names")
    return DecodedFrame(
        number=number,
        slice_index=k,
        count=count,
        centre=points[-1],
        low=points[:-1].min(axis=0),
        high=points[:-1].max(axis=0),
        bounds=(int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])),
        mask=part,
        values=None if values is None else values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy(),
    )


def _segment(item: Dataset, frames: tuple[DecodedFrame, ...], shared: Dataset) -> DecodedSegment:
    expect(bool(frames), f"segment {item.SegmentNumber} of the SEG has no frame")
    regions = item.get("AnatomicRegionSequence", [])
    modifiers = [m for r in regions for m in r.get("AnatomicRegionModifierSequence", [])]
    measures = (shared.get("PixelMeasuresSequence") or [Dataset()])[0]
    spacing = measures.get("PixelSpacing")
    coded = [item[keyword].value[0] for keyword in ("SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence")]
    return DecodedSegment(
        number=int(item.SegmentNumber),
        label=str(item.get("SegmentLabel", "")),
        tracking_uid=str(item.get("TrackingUID", "")),
        codes=tuple((str(code.CodeValue), str(code.CodingSchemeDesignator)) for code in coded),
        side=LATERALITY.get(str(modifiers[0].CodeValue), "other") if modifiers else None,
        frames=frames,
        pixel_mm=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        slice_mm=None if measures.get("SpacingBetweenSlices") is None else float(measures.SpacingBetweenSlices),
    )


def group_of(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """Return a functional group of a frame, from its own groups or from the shared ones (PS3.3 C.7.6.16)."""
    holder = frame if keyword in frame else shared
    expect(keyword in holder, f"the SEG has no {keyword}")
    item: Dataset = holder[keyword].value[0]
    return item


def _plane(reference: Dataset) -> Plane:
    """The image, and the frame of it, that a reference names; several frames are none."""
    number = reference.get("ReferencedFrameNumber")
    if number is None:
        return str(reference.ReferencedSOPInstanceUID), None
    return str(reference.ReferencedSOPInstanceUID), int(number) if isinstance(number, int | str) else -1


def _number(item: Dataset) -> Number:
    value = item.MeasuredValueSequence[0]
    units = value.get("MeasurementUnitsCodeSequence", [])
    expect(len(units) == 1, f"the SR's number ({concept_of(item)}) has no unit")
    return concept_of(item), float(value.NumericValue), str(units[0].CodeValue), str(units[0].CodingSchemeDesignator)


def _referenced_segment(content: Sequence[Dataset]) -> tuple[str, int | None, int | None] | None:
    for item in content:
        if item.ValueType == "IMAGE" and concept_of(item) in ("121191", "121214"):  # Referenced Segment, Referenced Segmentation Frame
            reference = item.ReferencedSOPSequence[0]
            segment, frame = reference.get("ReferencedSegmentNumber"), reference.get("ReferencedFrameNumber")
            whole = [int(n) if isinstance(n, int | str) else None for n in (segment, frame)]
            return str(reference.ReferencedSOPInstanceUID), whole[0], whole[1]
    return None


def _region(content: Sequence[Dataset]) -> tuple[Plane, NDArray[np.float64]] | None:
    for item in content:
        if item.ValueType == "SCOORD":
            images = [i for i in items_below(item) if i.ValueType == "IMAGE"]
            expect(len(images) == 1, "a region of the SR lies on no image")
            expect(str(item.GraphicType) == "POLYLINE", f"a region of the SR is a {item.GraphicType} and no line")
            return _plane(images[0].ReferencedSOPSequence[0]), np.array(item.GraphicData, dtype=np.float64).reshape(-1, 2)
    return None
