"""Path lengths: what X-rays cross between source and detector, and simple bodies whose path lengths are formulas.

Knows nothing of films, noise or DICOM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicomnode.phantoms.shapes import Floats

Point = tuple[float, float]  # x towards the patient's left, z towards the head; mm in the plane of the detector
Box = tuple[slice, slice]  # rows, columns


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The detector's pixels: row 0 lies at the head's side, column 0 at the patient's right."""

    left_mm: float  # x of the centres of column 0
    top_mm: float  # z of the centres of row 0
    pixel_mm: float
    shape: tuple[int, int]

    @property
    def x(self) -> Floats:
        """(1, columns) mm."""
        return np.asarray(self.left_mm + self.pixel_mm * np.arange(self.shape[1]), dtype=np.float32)[None, :]

    @property
    def z(self) -> Floats:
        """(rows, 1) mm."""
        return np.asarray(self.top_mm - self.pixel_mm * np.arange(self.shape[0]), dtype=np.float32)[:, None]

    def around(self, low: Sequence[float] | NDArray[np.float64], high: Sequence[float] | NDArray[np.float64]) -> Box | None:
        """The pixels between two corners (x, z), or None if the plane doesn't reach there."""
        rows = _span(self.top_mm - high[1], self.top_mm - low[1], self.pixel_mm, self.shape[0])
        columns = _span(low[0] - self.left_mm, high[0] - self.left_mm, self.pixel_mm, self.shape[1])
        return None if rows is None or columns is None else (rows, columns)

    def part(self, box: Box) -> Plane:
        """The plane of `box`, whose slices have start and stop."""
        rows, columns = box
        return Plane(
            left_mm=self.left_mm + self.pixel_mm * columns.start, top_mm=self.top_mm - self.pixel_mm * rows.start, pixel_mm=self.pixel_mm,
            shape=(rows.stop - rows.start, columns.stop - columns.start),
        )  # fmt: skip


def _span(first_mm: float, last_mm: float, pixel_mm: float, count: int) -> slice | None:
    first, last = max(0, math.ceil(first_mm / pixel_mm)), min(count, math.floor(last_mm / pixel_mm) + 1)
    return slice(first, last) if first < last else None


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """What lies in the beam of each pixel, and which pixels show lung. All arrays are (rows, columns) of `plane`."""

    plane: Plane
    soft_cm: Floats  # of water
    bone_cm: Floats  # of dense bone, beyond the water it displaces
    right: NDArray[np.bool_]  # the right lung field: lung that neither heart, mediastinum nor diaphragm hides
    left: NDArray[np.bool_]


def no_lungs(plane: Plane, soft_mm: Floats, bone_mm: Floats) -> Shadow:
    """A shadow of something without lungs."""
    nothing = np.zeros(plane.shape, dtype=np.bool_)
    soft, bone = (np.asarray(np.broadcast_to(np.maximum(part, 0) / 10, plane.shape), dtype=np.float32) for part in (soft_mm, bone_mm))
    return Shadow(plane=plane, soft_cm=soft, bone_cm=bone, right=nothing, left=nothing)


def capsule(plane: Plane, start: Point, end: Point, radii_mm: tuple[float, float]) -> Floats:
    """Path length in mm through a tapered rod with round ends that lies in the detector's plane."""
    (x0, z0), (x1, z1) = start, end
    dx, dz = x1 - x0, z1 - z0
    along = np.clip(((plane.x - x0) * dx + (plane.z - z0) * dz) / max(dx * dx + dz * dz, 1e-6), 0, 1)
    square = (plane.x - x0 - along * dx) ** 2 + (plane.z - z0 - along * dz) ** 2
    radius = radii_mm[0] + along * (radii_mm[1] - radii_mm[0])
    return np.asarray(2 * np.sqrt(np.maximum(radius * radius - square, 0)), dtype=np.float32)


def ellipsoid(plane: Plane, centre: Point, radii_mm: tuple[float, float, float], *, turn: float = 0.0) -> Floats:
    """Path length in mm through an ellipsoid: radii along x, along the beam, along z, turned by `turn` radians in the plane."""
    dx, dz = plane.x - centre[0], plane.z - centre[1]
    along, across = dx * np.cos(turn) + dz * np.sin(turn), -dx * np.sin(turn) + dz * np.cos(turn)
    form = (along / radii_mm[0]) ** 2 + (across / radii_mm[2]) ** 2
    return np.asarray(2 * radii_mm[1] * np.sqrt(np.maximum(1 - form, 0)), dtype=np.float32)


def tubular_bone(plane: Plane, start: Point, end: Point, radii_mm: tuple[float, float]) -> Floats:
    """Path length in mm of dense bone through a long bone: a thick wall, and a marrow that counts a quarter."""
    inner = (radii_mm[0] * 0.6, radii_mm[1] * 0.6)
    return np.asarray(capsule(plane, start, end, radii_mm) - 0.75 * capsule(plane, start, end, inner), dtype=np.float32)
