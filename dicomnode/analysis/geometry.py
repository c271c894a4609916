"""Where the slices of a series lie: one even stack of parallel planes in patient space, or a coded reason why they aren't one.

Must never guess geometry, trust Instance Number for the order, or import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicomnode.analysis.eligibility import NotEligible, number_of, texts_of, whole_of

MAXIMUM_EDGE = 4096  # Rows and Columns
MAXIMUM_VOXELS = 2**30  # 4 GiB as float32
SAME_POSITION_MM = 0.01
TILT_DEGREES = 0.5  # of Gantry/Detector Tilt (0018,1120)
DIRECTION_TOLERANCE = 1e-3  # of direction cosines, which scanners round to three or more decimals
GAP_TOLERANCE_MM = 0.11  # scanners round positions to 0.1 mm


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The geometry of parallel, evenly spaced slices. Columns of `affine` are orthogonal; it maps (k, r, c, 1) to LPS mm."""

    order: tuple[int, ...]  # indices of the headers, first to last slice
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]  # slice, row, column


def stack_of(headers: Sequence[Dataset]) -> Stack:
    """Return the geometry of a series (PS3.3 C.7.6.2.1.1), slices sorted by position along the normal of their plane.

    Raises:
        NotEligible: a mandatory attribute is absent, or the slices don't form one even stack.
    """
    if len(headers) < 2:
        raise NotEligible("too-few-slices", f"{len(headers)} image(s) make no volume.")
    orientations = np.array([_numbers(h, "ImageOrientationPatient", 6) for h in headers])
    positions = np.array([_numbers(h, "ImagePositionPatient", 3) for h in headers])
    pixels = np.array([[*_numbers(h, "PixelSpacing", 2), whole_of(h, "Rows"), whole_of(h, "Columns")] for h in headers])
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


def _check_duplicates(headers: Sequence[Dataset], gaps: NDArray[np.float64]) -> None:
    duplicates = int(np.count_nonzero(gaps < SAME_POSITION_MM))
    acquisitions = len({str(h.get("AcquisitionNumber") or "") for h in headers})
    if duplicates and acquisitions > 1:
        raise NotEligible("several-acquisitions", f"{acquisitions} acquisitions in one series share {duplicates} position(s).")
    if duplicates:
        raise NotEligible("duplicate-positions", f"{duplicates} image(s) lie where another one lies.")


def _check_tilt(headers: Sequence[Dataset], in_plane: NDArray[np.float64], pixel_mm: float) -> None:
    """A tilted gantry shears the stack: its slices move along the table, not along their normal."""
    tilt = max(abs(number_of(h.get("GantryDetectorTilt")) or 0.0) for h in headers)
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


def _numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    values = [number_of(value) for value in texts_of(header, keyword)]
    numbers = [value for value in values if value is not None]
    if len(numbers) != count or len(values) != count:
        raise NotEligible("missing-geometry", f"{keyword} of an image is absent or malformed.")
    return numbers
