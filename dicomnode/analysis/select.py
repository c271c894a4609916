"""Which series of a study a package accepts, by headers and geometry alone, and why the others don't fit.

A refusal is an outcome with a code (contract 17). Must never look at names or descriptions, put patient data into a reason,
trust Instance Number for the order, read pixels, or import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from dicomnode.analysis.package import InputSection, Manifest
from dicomnode.errors import AnalysisFailed

# Every code of a refusal, in the order of the checks: the series that came furthest is the closest candidate.
REASONS = {
    "no-images": "the study holds no images",
    "modality": "the images are of another modality",
    "sop-class": "the images are of a SOP class that the package doesn't read",
    "image-type": "all images are localizers, derived images or screens",
    "body-part": "Body Part Examined names another body part, or none where one is demanded",
    "pixel-format": "the pixels are no single-frame greyscale of at most 16 bits",
    "not-hu": "Rescale Slope or Intercept is absent, or the rescaled values are no Hounsfield units",
    "missing-geometry": "the position, orientation, pixel spacing or frame of reference of an image is absent or malformed",
    "too-few-slices": "the series has fewer slices than the package needs",
    "too-many-slices": "the series has more slices than the package reads",
    "mixed-size": "Rows, Columns or Pixel Spacing differ within the series",
    "mixed-orientation": "the images of the series are turned against each other",
    "mixed-frame-of-reference": "the images of the series lie in different frames of reference",
    "too-large": "the volume would have more voxels than the node reads at once",
    "several-acquisitions": "several acquisitions in one series image the same positions",
    "duplicate-positions": "several images of the series lie at the same position",
    "gantry-tilt": "the gantry was tilted, or the slices are shifted against each other in their plane",
    "missing-slices": "there is a gap between neighbouring slices",
    "uneven-spacing": "the distances between neighbouring slices differ",
    "spacing": "the distance of slices or pixels is outside what the package was made for",
    "no-lung": "no lung was found in the images",
}

MAXIMUM_EDGE = 4096  # Rows and Columns
MAXIMUM_VOXELS = 2**30  # 4 GiB as float32
SAME_POSITION_MM = 0.01
TILT_DEGREES = 0.5  # of Gantry/Detector Tilt (0018,1120)
DIRECTION_TOLERANCE = 1e-3  # of direction cosines, which scanners round to three or more decimals
GAP_TOLERANCE_MM = 0.11  # scanners round positions to 0.1 mm

_READ_HERE = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "ImageType",
    "BodyPartExamined", "SeriesNumber", "AcquisitionNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "GantryDetectorTilt", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "PixelPaddingValue", "PixelPaddingRangeLimit",
)  # fmt: skip


class NotEligible(Exception):  # an outcome, not an error: the study is answered with it
    """A coded reason why a study, series or volume is not analysed."""

    def __init__(self, code: str, reason: str) -> None:
        if code not in REASONS:
            raise ValueError(f"{code!r} is no code of REASONS")
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class SelectedSeries:
    """The one series of a study that a package runs on, sorted by position along the slice normal."""

    series_instance_uid: str
    files: tuple[Path, ...]
    why: str
    headers: tuple[Dataset, ...]  # in the order of `files`, without pixel data


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The geometry of parallel, evenly spaced slices. Columns of `affine` are orthogonal; it maps (k, r, c, 1) to LPS mm."""

    order: tuple[int, ...]  # indices of the headers, first to last slice
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]  # slice, row, column


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    series: SelectedSeries
    number: int | None
    spacing_mm: float
    thickness_mm: float  # of what a slice shows: overlapping slices are thicker than their distance


def read_headers(files: Sequence[Path]) -> list[tuple[Path, Dataset]]:
    """Read the headers of DICOM files up to their pixels.

    Raises:
        AnalysisFailed: a file is no readable DICOM.
    """
    headers: list[tuple[Path, Dataset]] = []
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            for keyword in _READ_HERE:
                header.get(keyword)  # pydicom converts a value when it is first asked for it, and raises then
            headers.append((file, header))
        except (InvalidDicomError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, NotImplementedError) as error:
            raise AnalysisFailed(f"The header of the stored object {file.stem} cannot be read ({type(error).__name__}).") from error
    return headers


def select_series(manifest: Manifest, headers: Sequence[tuple[Path, Dataset]]) -> SelectedSeries:
    """Return the series that the package should run on: of several, the thinnest slices, then most images, then lowest number.

    Raises:
        NotEligible: no series fits; the code is that of the series that came closest, and the others are named shortly.
    """
    by_series: dict[str, list[tuple[Path, Dataset]]] = {}
    for file, header in headers:
        by_series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
    if not by_series:
        raise NotEligible("no-images", "The study holds no images.")
    candidates: list[_Candidate] = []
    refusals: list[tuple[NotEligible, int, str]] = []
    for uid in sorted(by_series):
        images = by_series[uid]
        try:
            candidates.append(_candidate(manifest.input, uid, images))
        except NotEligible as refusal:
            refusals.append((refusal, len(images), _label(images[0][1])))
    if not candidates:
        raise _closest(refusals)
    candidates.sort(key=lambda c: (c.thickness_mm, -len(c.series.files), _last_if_absent(c.number), c.series.series_instance_uid))
    chosen = candidates[0]
    why = f"{_label(chosen.series.headers[0])}: {len(chosen.series.files)} slices, {chosen.spacing_mm:.2f} mm apart"
    why += chosen.series.why
    if len(candidates) > 1:
        why += f"; chosen among {len(candidates)} that fit: {_rule(chosen, candidates[1])}"
    if refusals:
        why += "; not: " + _others(refusals)
    return SelectedSeries(
        series_instance_uid=chosen.series.series_instance_uid, files=chosen.series.files, why=why, headers=chosen.series.headers
    )


def stack_of(headers: Sequence[Dataset]) -> Stack:
    """Return the geometry of a series (PS3.3 C.7.6.2.1.1), slices sorted by position along the normal of their plane.

    Raises:
        NotEligible: a mandatory attribute is absent, or the slices don't form one even stack.
    """
    if len(headers) < 2:
        raise NotEligible("too-few-slices", f"{len(headers)} image(s) make no volume.")
    orientations = np.array([_numbers(h, "ImageOrientationPatient", 6) for h in headers])
    positions = np.array([_numbers(h, "ImagePositionPatient", 3) for h in headers])
    pixels = np.array([[*_numbers(h, "PixelSpacing", 2), _whole(h, "Rows"), _whole(h, "Columns")] for h in headers])
    frames = {str(h.get("FrameOfReferenceUID") or "") for h in headers}
    if "" in frames:
        raise NotEligible("missing-geometry", "Frame of Reference UID is absent from an image.")
    if (pixels <= 0).any():
        raise NotEligible("missing-geometry", "Rows, Columns or Pixel Spacing of an image is not positive.")
    if np.ptp(pixels, axis=0).max() > 1e-3:
        raise NotEligible("mixed-size", "Rows, Columns or Pixel Spacing differ within the series.")
    if np.ptp(orientations, axis=0).max() > DIRECTION_TOLERANCE:
        raise NotEligible("mixed-orientation", "The images of the series are turned against each other.")
    if len(frames) > 1:
        raise NotEligible("mixed-frame-of-reference", f"The images of the series lie in {len(frames)} frames of reference.")
    row_spacing, column_spacing, rows, columns = (float(value) for value in pixels[0])
    if max(rows, columns) > MAXIMUM_EDGE or rows * columns * len(headers) > MAXIMUM_VOXELS:
        raise NotEligible("too-large", f"{len(headers)} slices of {rows:.0f} x {columns:.0f} pixels are more than the node reads at once.")

    along_row, along_column = _directions(orientations[0])
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


def _candidate(accepts: InputSection, uid: str, images: list[tuple[Path, Dataset]]) -> _Candidate:
    """Check one series against the manifest, in the order of REASONS; images that it excludes one by one are left out."""
    total = len(images)
    images = _keep(images, lambda h: h.get("Modality") == accepts.modality, "modality", f"no image has the modality {accepts.modality}")
    images = _keep(images, lambda h: h.get("SOPClassUID") in accepts.sop_classes, "sop-class", "no image is of an accepted SOP class")
    images = _keep(
        images,
        lambda h: not _excluded(h, accepts.exclude_image_types),
        "image-type",
        "all images are localizers, derived images or screens",
    )
    images = _keep(images, lambda h: _body_part_fits(h, accepts), "body-part", "Body Part Examined is not one the package reads")
    for _, header in images:
        check_pixels(header)
    if len(images) < accepts.minimum_slices:
        raise NotEligible("too-few-slices", f"{len(images)} slice(s), the package needs {accepts.minimum_slices}.")
    if len(images) > accepts.maximum_slices:
        raise NotEligible("too-many-slices", f"{len(images)} slices, the package reads {accepts.maximum_slices}.")
    stack = stack_of([header for _, header in images])
    for name, value, (low, high) in (
        ("slices", stack.spacing_mm[0], accepts.slice_spacing_mm),
        ("rows", stack.spacing_mm[1], accepts.pixel_spacing_mm),
        ("columns", stack.spacing_mm[2], accepts.pixel_spacing_mm),
    ):
        if not low <= value <= high:
            raise NotEligible("spacing", f"The {name} are {value:.2f} mm apart; the package reads {low:g} to {high:g} mm.")
    ordered = [images[i] for i in stack.order]
    left_out = f" ({total - len(images)} other image(s) of the series left out)" if total > len(images) else ""
    series = SelectedSeries(
        series_instance_uid=uid, files=tuple(file for file, _ in ordered), why=left_out, headers=tuple(header for _, header in ordered)
    )
    thickness = max(stack.spacing_mm[0], *(_positive_or_zero(header, "SliceThickness") for _, header in ordered))
    return _Candidate(series=series, number=_series_number(ordered[0][1]), spacing_mm=stack.spacing_mm[0], thickness_mm=round(thickness, 2))


def _keep(images: list[tuple[Path, Dataset]], fits: Callable[[Dataset], bool], code: str, reason: str) -> list[tuple[Path, Dataset]]:
    kept = [(file, header) for file, header in images if fits(header)]
    if not kept:
        raise NotEligible(code, f"{reason[0].upper()}{reason[1:]}.")
    return kept


def _excluded(header: Dataset, image_types: Iterable[str]) -> bool:
    r"""Image Type (0008,0008) holds all values of an entry such as "LOCALIZER" or "DERIVED\SECONDARY"."""
    values = {value.strip().upper() for value in _texts(header, "ImageType")}
    return any(values.issuperset(entry.upper().split("\\")) for entry in image_types)


def _body_part_fits(header: Dataset, accepts: InputSection) -> bool:
    part = " ".join(_texts(header, "BodyPartExamined")).strip().upper()
    if not part:
        return accepts.body_part_may_be_absent or not accepts.body_parts
    return not accepts.body_parts or part in accepts.body_parts


def check_pixels(header: Dataset) -> None:
    """Raise NotEligible unless the pixels are single-frame greyscale that Rescale Slope and Intercept turn into Hounsfield units."""
    if (
        header.get("SamplesPerPixel") != 1
        or header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2")
        or str(header.get("NumberOfFrames") or 1) != "1"
        or header.get("BitsAllocated") not in (8, 16)
        or header.get("PixelRepresentation") not in (0, 1)
        or not 1 <= _whole(header, "BitsStored") <= header.BitsAllocated
        or header.get("HighBit") != header.BitsStored - 1
    ):
        raise NotEligible("pixel-format", "The pixels are no single-frame greyscale of at most 16 bits.")
    slope, intercept = (_number(header.get(keyword)) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None or slope == 0:
        raise NotEligible("not-hu", "Rescale Slope or Intercept of an image is absent or malformed.")
    if str(header.get("RescaleType") or "HU").strip().upper() != "HU":
        raise NotEligible("not-hu", "Rescale Type says that the values are no Hounsfield units.")


def _check_duplicates(headers: Sequence[Dataset], gaps: NDArray[np.float64]) -> None:
    duplicates = int(np.count_nonzero(gaps < SAME_POSITION_MM))
    acquisitions = len({str(h.get("AcquisitionNumber") or "") for h in headers})
    if duplicates and acquisitions > 1:
        raise NotEligible("several-acquisitions", f"{acquisitions} acquisitions in one series share {duplicates} position(s).")
    if duplicates:
        raise NotEligible("duplicate-positions", f"{duplicates} image(s) lie where another one lies.")


def _check_tilt(headers: Sequence[Dataset], in_plane: NDArray[np.float64], pixel_mm: float) -> None:
    """A tilted gantry shears the stack: its slices move along the table, not along their normal."""
    tilt = max(abs(_number(h.get("GantryDetectorTilt")) or 0.0) for h in headers)
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
    along_row, along_column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if max(abs(length - 1) for length in lengths) > 10 * DIRECTION_TOLERANCE or abs(along_row @ along_column) > 10 * DIRECTION_TOLERANCE:
        raise NotEligible("missing-geometry", "Image Orientation (Patient) holds no two orthogonal unit vectors.")
    along_row = along_row / lengths[0]
    along_column = along_column - along_row * (along_row @ along_column)
    return along_row, along_column / np.linalg.norm(along_column)


def _closest(refusals: list[tuple[NotEligible, int, str]]) -> NotEligible:
    progress = list(REASONS)
    ordered = sorted(refusals, key=lambda entry: (-progress.index(entry[0].code), -entry[1]))
    closest, _, label = ordered[0]
    reason = f"{label}: {closest.reason}"
    if len(ordered) > 1:
        reason += " Others: " + _others(ordered[1:]) + "."
    return NotEligible(closest.code, reason)


def _others(refusals: list[tuple[NotEligible, int, str]]) -> str:
    counts = Counter(refusal.code for refusal, _, _ in refusals)
    return ", ".join(f"{count} series {code}" for code, count in counts.items())


def _rule(chosen: _Candidate, second: _Candidate) -> str:
    if chosen.thickness_mm < second.thickness_mm:
        return "the thinnest slices"
    return "the most images" if len(chosen.series.files) > len(second.series.files) else "the lowest series number"


def _label(header: Dataset) -> str:
    number = _series_number(header)
    return "Series without number" if number is None else f"Series {number}"


def _series_number(header: Dataset) -> int | None:
    number = _number(header.get("SeriesNumber"))
    return None if number is None else int(number)


def _last_if_absent(number: int | None) -> tuple[bool, int]:
    return number is None, number or 0


def _numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    values = [_number(value) for value in _texts(header, keyword)]
    numbers = [value for value in values if value is not None]
    if len(numbers) != count or len(values) != count:
        raise NotEligible("missing-geometry", f"{keyword} of an image is absent or malformed.")
    return numbers


def _whole(header: Dataset, keyword: str) -> int:
    value = header.get(keyword)
    return value if isinstance(value, int) else 0


def _positive_or_zero(header: Dataset, keyword: str) -> float:
    return max(0.0, _number(header.get(keyword)) or 0.0)


def _texts(header: Dataset, keyword: str) -> list[str]:
    value = header.get(keyword)
    if value is None or isinstance(value, str | bytes):
        return [str(value)] if value else []
    return [str(part) for part in value] if isinstance(value, Iterable) else [str(value)]


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if np.isfinite(number) else None
