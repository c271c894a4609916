"""Grids, smooth random fields, ellipsoids and tubes: the geometry that the phantoms are made of.

Everything is an analytic function of position (LPS mm), so any box of a scene can be rendered at any spacing and two
renderings of the same place agree. Knows nothing of anatomy, noise or DICOM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Axes = tuple[Floats, Floats, Floats]  # z, y, x in LPS mm: (nz,1,1), (1,ny,1), (1,1,nx) on a grid, or (n,) each for points


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A box of voxels aligned with the patient: slice k goes to +z (superior), row r to +y (posterior), column c to +x (left)."""

    origin_lps_mm: tuple[float, float, float]  # x, y, z of the centre of voxel (0, 0, 0)
    spacing_mm: tuple[float, float, float]  # slice, row, column
    shape: tuple[int, int, int]

    @property
    def axes(self) -> Axes:
        """Coordinates of the voxel centres, ready to broadcast."""
        z, y, x = (
            np.asarray(start + step * np.arange(count), dtype=np.float32)
            for start, step, count in zip(self.origin_lps_mm[::-1], self.spacing_mm, self.shape, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4: (k, r, c, 1) to LPS mm."""
        matrix = np.zeros((4, 4))
        matrix[2, 0], matrix[1, 1], matrix[0, 2] = self.spacing_mm
        matrix[:3, 3] = self.origin_lps_mm
        matrix[3, 3] = 1.0
        return matrix

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return math.prod(self.spacing_mm) / 1000.0

    def part(self, box: tuple[slice, slice, slice]) -> Grid:
        """The grid of `box`, whose slices have start and stop."""
        starts = [s.start for s in box]
        origin = tuple(o + i * d for o, i, d in zip(self.origin_lps_mm, starts[::-1], self.spacing_mm[::-1], strict=True))
        return Grid(
            origin_lps_mm=(origin[0], origin[1], origin[2]),
            spacing_mm=self.spacing_mm,
            shape=(box[0].stop - box[0].start, box[1].stop - box[1].start, box[2].stop - box[2].start),
        )

    def box(self, low_lps_mm: Sequence[float], high_lps_mm: Sequence[float]) -> tuple[slice, slice, slice] | None:
        """The voxels between two corners, or None if the grid doesn't reach there."""
        slices = []
        for low, high, start, step, count in zip(
            low_lps_mm[::-1], high_lps_mm[::-1], self.origin_lps_mm[::-1], self.spacing_mm, self.shape, strict=True
        ):
            first = max(0, math.ceil(max((low - start) / step, -1.0)))
            last = min(count, math.floor(min((high - start) / step, count)) + 1)
            if first >= last:
                return None
            slices.append(slice(first, last))
        return slices[0], slices[1], slices[2]


@dataclass(frozen=True, kw_only=True)
class Waves:
    """A smooth random field: a sum of plane waves. Defined everywhere, so a part rendered alone equals the part of the whole."""

    vectors: NDArray[np.float64]  # (m, 3) radians per mm along z, y, x
    phases: NDArray[np.float64]  # (m,)
    amplitude: float

    def __call__(self, axes: Axes) -> Floats:
        """The field at `axes`. At points (1-D axes) it is summed wave by wave."""
        z, y, x = axes
        kz, ky, kx = self.vectors.T
        if z.ndim == 1:
            angle = np.outer(z, kz) + np.outer(y, ky) + np.outer(x, kx) + self.phases
            return np.asarray(self.amplitude * np.cos(angle).sum(axis=1), dtype=np.float32)
        # cos(a + b + c) is the real part of a product of three exponentials: a matrix product per slice sums all waves
        along_z = np.exp(1j * (np.outer(z.ravel(), kz) + self.phases))
        along_y = np.exp(1j * np.outer(y.ravel(), ky))
        along_x = np.exp(1j * np.outer(kx, x.ravel()))
        both = (self.amplitude * along_z[:, None, :]) * along_y[None, :, :]
        left = np.concatenate([both.real, -both.imag], axis=2).astype(np.float32)
        right = np.concatenate([along_x.real, along_x.imag], axis=0).astype(np.float32)
        return (left.reshape(-1, left.shape[2]) @ right).reshape(z.size, y.size, x.size)


def random_waves(rng: np.random.Generator, *, count: int, wavelengths_mm: tuple[float, float], deviation: float) -> Waves:
    """Isotropic waves with log-uniform wavelengths whose sum has the given standard deviation."""
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shortest, longest = wavelengths_mm
    lengths = np.exp(rng.uniform(math.log(shortest), math.log(longest), size=(count, 1)))
    return Waves(
        vectors=directions * 2 * np.pi / lengths, phases=rng.uniform(0, 2 * np.pi, count), amplitude=deviation * math.sqrt(2.0 / count)
    )


@dataclass(frozen=True, kw_only=True)
class Ellipsoid:
    """An ellipsoid; an infinite radius makes a cylinder, `dome` one that goes on as a cylinder below its centre."""

    centre: tuple[float, float, float]  # x, y, z, LPS mm
    radii: tuple[float, float, float]
    rotation: NDArray[np.float64] | None = None  # 3x3, rows are the ellipsoid's own axes in (x, y, z)
    dome: bool = False

    def distance(self, axes: Axes) -> Floats:
        """Signed distance to the surface in mm, negative inside: exact for a sphere, to first order otherwise."""
        z, y, x = axes
        dx, dy, dz = x - self.centre[0], y - self.centre[1], z - self.centre[2]
        if self.dome:
            dz = np.maximum(dz, 0)
        if self.rotation is not None:
            r = self.rotation.astype(np.float32)
            dx, dy, dz = (r[i, 0] * dx + r[i, 1] * dy + r[i, 2] * dz for i in range(3))
        inverse = [np.float32(1.0 / radius) for radius in self.radii]
        form = (dx * inverse[0]) ** 2 + (dy * inverse[1]) ** 2 + (dz * inverse[2]) ** 2
        slope = (dx * inverse[0] ** 2) ** 2 + (dy * inverse[1] ** 2) ** 2 + (dz * inverse[2] ** 2) ** 2
        np.sqrt(form, out=form)
        np.sqrt(slope, out=slope)
        smallest = min(self.radii)
        return np.asarray((form - 1) * (form + 1e-4) / (slope + 1e-4 / smallest), dtype=np.float32)

    def bounds(self, margin_mm: float) -> tuple[list[float], list[float]]:
        """Corners of a box that holds the ellipsoid and a margin; of a rotated one, the sphere around it."""
        reach = [max(self.radii)] * 3 if self.rotation is not None else list(self.radii)
        return (
            [c - r - margin_mm for c, r in zip(self.centre, reach, strict=True)],
            [c + r + margin_mm for c, r in zip(self.centre, reach, strict=True)],
        )


@dataclass(frozen=True, kw_only=True)
class Tubes:
    """Straight tapered tubes with round ends: n of them, as arrays."""

    starts: NDArray[np.float64]  # (n, 3) x, y, z
    ends: NDArray[np.float64]  # (n, 3)
    start_radii: NDArray[np.float64]  # (n,)
    end_radii: NDArray[np.float64]  # (n,)

    def coverage(self, grid: Grid, edge_mm: float, *, widen_mm: float = 0.0) -> Floats:
        """How much of each voxel the tubes fill, 0..1: thin ones fade as the area of their cross-section does."""
        filled = np.zeros(grid.shape, dtype=np.float32)
        reach = np.maximum(self.start_radii, self.end_radii)[:, None] + widen_mm + 2 * edge_mm
        low, high = np.minimum(self.starts, self.ends) - reach, np.maximum(self.starts, self.ends) + reach
        first = np.asarray(grid.origin_lps_mm)
        last = first + np.asarray(grid.spacing_mm[::-1]) * (np.asarray(grid.shape[::-1]) - 1)
        z, y, x = grid.axes
        for i in np.flatnonzero(((high >= first) & (low <= last)).all(axis=1)):
            box = grid.box(low[i].tolist(), high[i].tolist())
            if box is None:
                continue
            (x0, y0, z0), axis = self.starts[i].tolist(), (self.ends[i] - self.starts[i])
            ax, ay, az = axis.tolist()
            square = max(ax * ax + ay * ay + az * az, 1e-6)
            dz, dy, dx = z[box[0]] - z0, y[:, box[1]] - y0, x[:, :, box[2]] - x0
            along = np.clip((dx * (ax / square) + dy * (ay / square)) + dz * (az / square), 0, 1)
            radius = along * float(self.end_radii[i] - self.start_radii[i]) + (float(self.start_radii[i]) + widen_mm)
            distance = np.sqrt((dx - along * ax) ** 2 + (dy - along * ay) ** 2 + (dz - along * az) ** 2)
            thin = np.minimum(radius / edge_mm, 1)
            fill = thin * thin * np.clip((np.maximum(radius, edge_mm) - distance) / (2 * edge_mm) + 0.5, 0, 1)
            np.maximum(filled[box], fill, out=filled[box])
        return filled


def inside(distance: NDArray[np.floating], edge_mm: float) -> Floats:
    """Coverage 0..1 from a signed distance, with an edge of 2 x `edge_mm`."""
    return np.asarray(np.clip(0.5 - distance / np.float32(2 * edge_mm), 0, 1), dtype=np.float32)


def join(first: Floats, second: Floats, blend_mm: float) -> Floats:
    """Union of two signed distances with a fillet of about `blend_mm`."""
    near = np.maximum(blend_mm - np.abs(first - second), 0) / blend_mm
    return np.asarray(np.minimum(first, second) - near * near * np.float32(blend_mm / 4), dtype=np.float32)


def random_rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """A rotation drawn uniformly."""
    matrix, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    return np.asarray(matrix * np.sign(np.diag(upper)), dtype=np.float64)
