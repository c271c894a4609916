"""Where images lie: a series as one even stack of parallel planes in patient space, a projection in its own plane, or a coded reason.

Must never guess geometry, trust Instance Number for the order, or import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from dicomnode.analysis.attributes import number_of, once_for_shared, texts_of, value_of, whole_of
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import Frame
from dicomnode.findings import Calibration

MAXIMUM_EDGE = 4096  # Rows and Columns
MAXIMUM_VOXELS = 2**30  # 4 GiB as float32
MAXIMUM_PROJECTION = (16384, 2**27)  # Rows and Columns, and pixels, of a projection: a stitched spine
SAME_POSITION_MM = 0.01
TILT_DEGREES = 0.5  # of Gantry/Detector Tilt (0018,1120)
DIRECTION_TOLERANCE = 1e-3  # of direction cosines, which scanners round to three or more decimals
GAP_TOLERANCE_MM = 0.11  # scanners round positions to 0.1 mm
FARTHEST_MM = 1e5  # of a position from the origin; beyond it a value is no measurement
LARGEST_SPACING_MM = 100.0

PROJECTION_SPACING_MM = (0.01, 10.0)  # a pixel of a radiograph is neither finer nor coarser
PROJECTION_SIZE_MM = (10.0, 1500.0)  # of its longer side: a tooth to a stitched spine
SAME_SPACING = 0.01  # relative

LARGEST_MAGNIFICATION = 4.0
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")

# What tells images at one position apart, and makes two stacks of them. Acquisition Number isn't among them: which of two passes
# over the patient is meant, nobody can say by their headers.
_TELL_APART = (
    "TemporalPositionIdentifier", "EchoTime", "EchoNumbers", "InversionTime", "DiffusionBValue", "DiffusionDirectionality",
    "ComplexImageComponent", "ImageType", "TriggerTime", "NominalCardiacTriggerDelayTime", "FlipAngle",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The geometry of parallel, evenly spaced slices. Columns of `affine` are orthogonal; it maps (k, r, c, 1) to LPS mm."""

    order: tuple[int, ...]  # indices of the headers, first to last slice
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]  # slice, row, column


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images of a series that can be one stack, and how they differ from its other parts: keyword and value; empty: the whole series."""

    frames: tuple[Frame, ...]
    differs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The geometry of a projection: `affine` maps (0, r, c, 1) to mm from the first pixel, x along the rows and y along the columns."""

    affine: NDArray[np.float64]
    spacing_mm: tuple[float, float]  # row, column; a pixel is a millimetre where the calibration is "none"
    calibration: Calibration


def stacks_of(frames: Sequence[Frame]) -> tuple[Part, ...]:
    """Return the parts of a series that can be stacks: by Stack ID, and where images share a position, by what tells them apart.

    A series that is one stack comes back whole, and so does one of which nothing tells the images apart: `stack_of` refuses that.
    """
    whole = Part(frames=tuple(frames), differs=())
    parts = _split(whole, "StackID")
    if min(len(part.frames) for part in parts) < 2:
        parts = [whole]  # a stack of one image each is none
    return tuple(piece for part in parts for piece in _untangled(part))


def plane_of(frame: Frame) -> Plane:
    """Return the geometry of a projection (PS3.3 10.7.1, C.8.11.7): where a millimetre lies, and how many a pixel has.

    Pixel Spacing is in the patient where its Calibration Type says so, or where it differs from the spacing at the detector;
    Imager Pixel Spacing is so once it is divided by Estimated Radiographic Magnification Factor. A spacing of zero, or that makes
    no image of a body, counts as absent, and so do two that contradict each other.

    Raises:
        NotEligible: Rows or Columns is absent.
    """
    header = frame.header
    shape = whole_of(header, "Rows"), whole_of(header, "Columns")
    if min(shape) < 1:
        raise NotEligible("missing-geometry", "Rows or Columns of an image is absent or malformed.")
    edge, pixels = MAXIMUM_PROJECTION
    if max(shape) > edge or shape[0] * shape[1] > pixels:
        raise NotEligible("too-large", f"{shape[0]} x {shape[1]} pixels are more than the node reads at once.")
    spacing, calibration = _spacing_of(header, shape)
    row_mm, column_mm = spacing
    affine = np.array([[0, 0, column_mm, 0], [0, row_mm, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
    return Plane(affine=affine, spacing_mm=spacing, calibration=calibration)


def _spacing_of(header: Dataset, shape: tuple[int, int]) -> tuple[tuple[float, float], Calibration]:
    pixel, imager, scanned = (_projection_spacing(header, keyword, shape) for keyword in _SPACINGS)
    detector = imager or scanned
    magnification = number_of(value_of(header, "EstimatedRadiographicMagnificationFactor")) or 1.0
    if pixel is not None:
        ratios = [p / d for p, d in zip(pixel, detector, strict=True)] if detector is not None else [1.0]
        if max(ratios) > 1 + SAME_SPACING or min(ratios) < 1 / LARGEST_MAGNIFICATION:
            return (1.0, 1.0), "none"  # what lies before the detector is magnified there, never made smaller, and not without limit
        calibrated = " ".join(texts_of(header, "PixelSpacingCalibrationType")).strip().upper() in ("GEOMETRY", "FIDUCIAL")
        if calibrated or min(ratios) < 1 - SAME_SPACING:
            return pixel, "patient"
        detector = detector or pixel
    if detector is None:
        return (1.0, 1.0), "none"
    if imager is not None and 1 + SAME_SPACING < magnification <= LARGEST_MAGNIFICATION:
        return (imager[0] / magnification, imager[1] / magnification), "patient"
    return detector, "detector"


def _projection_spacing(header: Dataset, keyword: str, shape: tuple[int, int]) -> tuple[float, float] | None:
    values = [number_of(value) for value in texts_of(header, keyword)]
    if len(values) != 2 or values[0] is None or values[1] is None:
        return None
    row, column = values[0], values[1]
    low, high = PROJECTION_SPACING_MM
    smallest, largest = PROJECTION_SIZE_MM
    fits = low <= min(row, column) and max(row, column) <= high and max(row, column) <= 2 * min(row, column)
    return (row, column) if fits and smallest <= max(shape[0] * row, shape[1] * column) <= largest else None


def _untangled(part: Part) -> list[Part]:
    """Split a part that has several images at one position, by whatever tells them apart and leaves most of a stack in each piece."""
    places = {id(frame): _place(frame.header) for frame in part.frames}

    def distinct(piece: Part) -> int:
        return len({places[id(frame)] for frame in piece.frames})

    if None in places.values() or distinct(part) == len(part.frames):
        return [part]
    parts = [part]
    for keyword in _TELL_APART:
        pieces: list[Part] = []
        for crowded in parts:
            split = _split(crowded, keyword) if distinct(crowded) < len(crowded.frames) else [crowded]
            enough = max(2, (distinct(crowded) + 1) // 2)
            pieces += split if all(distinct(piece) >= enough for piece in split) else [crowded]
        parts = pieces
    return parts


def _split(part: Part, keyword: str) -> list[Part]:
    by_value: dict[str, list[Frame]] = {}
    for frame in part.frames:
        by_value.setdefault("\\".join(texts_of(frame.header, keyword)), []).append(frame)
    if len(by_value) < 2:
        return [part]
    values = sorted(by_value, key=lambda value: (number_of(value) is None, number_of(value) or 0.0, value))
    return [Part(frames=tuple(by_value[value]), differs=(*part.differs, (keyword, value))) for value in values]


def _place(header: Dataset) -> tuple[float, ...] | None:
    """Where an image begins and how it is turned, rounded; None: it doesn't say."""
    try:
        numbers = [*_numbers(header, "ImagePositionPatient", 3), *_numbers(header, "ImageOrientationPatient", 6)]
    except NotEligible:
        return None
    return (*(round(number / SAME_POSITION_MM) for number in numbers[:3]), *(round(number, 2) for number in numbers[3:]))


def stack_of(headers: Sequence[Dataset]) -> Stack:
    """Return the geometry of a series (PS3.3 C.7.6.2.1.1), slices sorted by position along the normal of their plane.

    Raises:
        NotEligible: a mandatory attribute is absent, or the slices don't form one even stack.
    """
    if len(headers) < 2:
        raise NotEligible("too-few-slices", f"{len(headers)} image(s) make no volume.")
    orientations = np.array(list(map(_shared_numbers("ImageOrientationPatient", 6), headers)))
    positions = np.array([_numbers(h, "ImagePositionPatient", 3) for h in headers])
    sizes = once_for_shared(("Rows", "Columns"), lambda values: [value if isinstance(value, int) else 0 for value in values.values()])
    spacings = _shared_numbers("PixelSpacing", 2)
    pixels = np.array([[*spacings(header), *sizes(header)] for header in headers])
    frames = set(map(_shared_text("FrameOfReferenceUID"), headers))
    if "" in frames:
        raise NotEligible("missing-geometry", "Frame of Reference UID is absent from an image.")
    if (pixels <= 0).any() or pixels[:, :2].max() > LARGEST_SPACING_MM or np.abs(positions).max() > FARTHEST_MM:
        raise NotEligible("missing-geometry", "Rows, Columns, Pixel Spacing or the position of an image is no measurement.")
    if np.ptp(pixels, axis=0).max() > 1e-3:
        raise NotEligible("mixed-size", "Rows, Columns or Pixel Spacing differ within the series.")
    if np.ptp(orientations, axis=0).max() > DIRECTION_TOLERANCE:
        raise NotEligible("mixed-orientation", "The images of the series are turned against each other.")
    if len(frames) > 1:
        raise NotEligible("mixed-frame-of-reference", f"The images of the series lie in {len(frames)} frames of reference.")
    typical = _most_typical(np.column_stack([orientations, pixels]))  # the same image in whatever order they come
    row_spacing, column_spacing, rows, columns = (float(value) for value in pixels[typical])
    if max(rows, columns) > MAXIMUM_EDGE or rows * columns * len(headers) > MAXIMUM_VOXELS:
        raise NotEligible("too-large", f"{len(headers)} slices of {rows:.0f} x {columns:.0f} pixels are more than the node reads at once.")

    along_row, along_column = _directions(orientations[typical])
    normal = np.cross(along_row, along_column)
    order = np.argsort(positions @ normal, kind="stable")
    heights = (positions @ normal)[order]
    gaps = np.diff(heights)
    _check_duplicates(headers, gaps)
    _check_tilt(headers, positions[order] - np.outer(heights, normal), min(row_spacing, column_spacing))
    _check_gaps(gaps)
    spacing = float((heights[-1] - heights[0]) / (len(headers) - 1))
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([normal * spacing, along_column * row_spacing, along_row * column_spacing])
    affine[:3, 3] = positions[order[0]]
    return Stack(order=tuple(int(i) for i in order), affine=affine, spacing_mm=(spacing, row_spacing, column_spacing))


def _most_typical(values: NDArray[np.float64]) -> int:
    """Return the row nearest to the median of each column, and of equal ones that of the smallest values."""
    away = np.round(np.abs(values - np.median(values, axis=0)).sum(axis=1), 9)
    return int(np.lexsort((*values.T[::-1], away))[0])


def _check_duplicates(headers: Sequence[Dataset], gaps: NDArray[np.float64]) -> None:
    duplicates = int(np.count_nonzero(gaps < SAME_POSITION_MM))
    acquisitions = len(set(map(_shared_text("AcquisitionNumber"), headers)))
    if duplicates and acquisitions > 1:
        raise NotEligible("several-acquisitions", f"{acquisitions} acquisitions in one series share {duplicates} position(s).")
    if duplicates:
        raise NotEligible("duplicate-positions", f"{duplicates} image(s) lie where another one lies.")


def _check_tilt(headers: Sequence[Dataset], in_plane: NDArray[np.float64], pixel_mm: float) -> None:
    """A tilted gantry shears the stack: its slices move along the table, not along their normal."""
    tilt = max(map(once_for_shared(("GantryDetectorTilt",), lambda values: abs(number_of(values["GantryDetectorTilt"]) or 0.0)), headers))
    if tilt > TILT_DEGREES:
        raise NotEligible("gantry-tilt", f"The gantry was tilted by {tilt:.1f} degrees.")
    shift = float(np.linalg.norm(in_plane - in_plane[0], axis=1).max())
    if shift > pixel_mm / 2:
        raise NotEligible("gantry-tilt", f"The slices are shifted in their plane by up to {shift:.1f} mm, as by a tilted gantry.")


def _check_gaps(gaps: NDArray[np.float64]) -> None:
    usual = float(np.median(gaps))
    tolerance = max(GAP_TOLERANCE_MM, 0.1 * usual)
    wide = gaps > max(1.5 * usual, usual + tolerance)
    if wide.any():
        raise NotEligible("missing-slices", f"{int(wide.sum())} gap(s) of up to {gaps.max():.2f} mm where slices are {usual:.2f} mm apart.")
    heights = np.concatenate([[0.0], np.cumsum(gaps)])
    drift = np.abs(heights - np.linspace(0, heights[-1], len(heights))).max()
    if (np.abs(gaps - usual) > tolerance).any() or drift > max(GAP_TOLERANCE_MM, 0.5 * usual):
        raise NotEligible("uneven-spacing", f"The slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart.")


def _directions(orientation: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if np.abs(orientation).max() > 2:
        raise NotEligible("missing-geometry", "Image Orientation (Patient) holds no unit vectors.")
    along_row, along_column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if max(abs(length - 1) for length in lengths) > 10 * DIRECTION_TOLERANCE or abs(along_row @ along_column) > 10 * DIRECTION_TOLERANCE:
        raise NotEligible("missing-geometry", "Image Orientation (Patient) holds no two orthogonal unit vectors.")
    along_row = along_row / lengths[0]
    along_column = along_column - along_row * (along_row @ along_column)
    return along_row, along_column / np.linalg.norm(along_column)


def _shared_text(keyword: str) -> Callable[[Dataset], str]:
    return once_for_shared((keyword,), lambda values: str(values[keyword] or ""))


def _shared_numbers(keyword: str, count: int) -> Callable[[Dataset], list[float]]:
    return once_for_shared((keyword,), lambda values: _finite(values[keyword], keyword, count))


def _numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    return _finite(value_of(header, keyword), keyword, count)


def _finite(values: object, keyword: str, count: int) -> list[float]:
    try:
        numbers = [float(value) for value in values] if isinstance(values, MultiValue | list | tuple) else []
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise NotEligible("missing-geometry", f"{keyword} of an image is absent or malformed.")
    return numbers
