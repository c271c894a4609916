"""Where the patient of one volume lies in another: a rigid transform, found on coarse copies of both in a second or two.

Must never import torch. It is good for saying which finding is which, and for no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.fft import irfftn, rfftn
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from dicomnode.findings import Volume

COARSE_MM = 8.0  # of the search for a shift
FINE_MM = 5.0  # of the rotation and the last millimetres
LEAST_CORRELATION = 0.8  # below that the two volumes don't show the same: two phantom patients' chests have 0.74
LEAST_OVERLAP = 0.3  # of the smaller one's volume
EVALUATIONS = 400
_POINTS = 20_000
_CT_RANGE = (-1000.0, 300.0)  # HU: beyond lies metal and the table's plastic says nothing

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Maps LPS mm of the moving volume to those of the fixed one; `correlation` is that of their values where both are."""

    matrix: Floats  # 4x4
    correlation: float


@dataclass(frozen=True, kw_only=True)
class _Coarse:
    """A volume on an even grid along the axes of LPS: values 0..1, (x, y, z)."""

    values: Floats
    known: NDArray[np.bool_]  # where the volume is
    origin: Floats  # LPS mm of [0, 0, 0]
    spacing: float

    def points(self) -> Floats:
        """LPS mm of all voxels inside the volume, (n, 3)."""
        return np.argwhere(self.known) * self.spacing + self.origin


def align(moving: Volume, fixed: Volume) -> Alignment | None:
    """Return where `moving` lies in `fixed`, or None if they aren't seen to show the same.

    A shift by normalised cross-correlation of what is in both (Padfield, IEEE Trans. Image Process. 21:2706, 2012), then six
    parameters by Powell's method.
    """
    start = _shift(_coarse(moving, COARSE_MM), _coarse(fixed, COARSE_MM))
    there, here = _coarse(moving, FINE_MM), _coarse(fixed, FINE_MM)
    points = here.points()
    step = max(1, len(points) // _POINTS)
    points = points[::step]
    values = here.values[here.known][::step]
    middle = points.mean(axis=0)

    known = there.known.astype(np.float32)
    least = LEAST_OVERLAP * min(len(points), np.count_nonzero(there.known) / step)

    def mismatch(parameters: Floats) -> float:
        index = ((_moved(points, parameters, middle) - there.origin) / there.spacing).T
        inside = ndimage.map_coordinates(known, index, order=1, cval=0.0) > 0.99
        if np.count_nonzero(inside) < least:
            return 0.0
        return -_correlation(ndimage.map_coordinates(there.values, index[:, inside], order=1), values[inside])

    begins = [np.concatenate([np.zeros(3), shift]) for shift in (-start, np.zeros(3))]
    best = min(begins, key=mismatch)
    steps = np.diag([3.0] * 3 + [8.0] * 3)  # degrees and mm
    options = {"maxfev": EVALUATIONS, "xtol": 1e-2, "ftol": 1e-5, "direc": steps}
    found = minimize(mismatch, best, method="Powell", options=options)
    parameters = found.x if found.fun < mismatch(best) else best
    correlation = -mismatch(parameters)
    if correlation < LEAST_CORRELATION:
        return None
    return Alignment(matrix=np.asarray(np.linalg.inv(_matrix(parameters, middle)), dtype=np.float64), correlation=correlation)


def _moved(points: Floats, parameters: Floats, middle: Floats) -> Floats:
    """Points of the fixed volume in the moving one: turned by degrees about x, y and z through the middle, then shifted by mm."""
    turn = Rotation.from_euler("xyz", parameters[:3], degrees=True)
    return np.asarray(turn.apply(points - middle) + middle + parameters[3:], dtype=np.float64)


def _matrix(parameters: Floats, middle: Floats) -> Floats:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", parameters[:3], degrees=True).as_matrix()
    matrix[:3, 3] = middle + parameters[3:] - matrix[:3, :3] @ middle
    return matrix


def _correlation(one: Floats, other: Floats) -> float:
    """Pearson's; 0 where one of them is even."""
    return float(np.corrcoef(one, other)[0, 1]) if one.std() > 1e-6 and other.std() > 1e-6 else 0.0


def _shift(moving: _Coarse, fixed: _Coarse) -> Floats:
    """LPS mm by which `moving` must be shifted to lie on `fixed`."""
    shape = np.array(moving.values.shape) + np.array(fixed.values.shape) - 1
    a, a_known = (rfftn(part[::-1, ::-1, ::-1], shape) for part in (moving.values * moving.known, moving.known.astype(np.float64)))
    b, b_known = (rfftn(part, shape) for part in (fixed.values * fixed.known, fixed.known.astype(np.float64)))
    aa = rfftn((moving.values**2 * moving.known)[::-1, ::-1, ::-1], shape)
    bb = rfftn(fixed.values**2 * fixed.known, shape)

    def product(one: NDArray[np.complex128], other: NDArray[np.complex128]) -> Floats:
        return np.asarray(irfftn(one * other, shape), dtype=np.float64)

    count = np.maximum(product(a_known, b_known), 1.0)
    sum_a, sum_b = product(a, b_known), product(a_known, b)
    covariance = product(a, b) - sum_a * sum_b / count
    variance_a = np.maximum(product(aa, b_known) - sum_a**2 / count, 0.0)
    variance_b = np.maximum(product(a_known, bb) - sum_b**2 / count, 0.0)
    least = LEAST_OVERLAP * min(np.count_nonzero(moving.known), np.count_nonzero(fixed.known))
    usable = (count >= least) & (variance_a * variance_b > 1e-9)
    correlation = np.where(usable, covariance / np.sqrt(np.maximum(variance_a * variance_b, 1e-9)), -1.0)
    peak = np.array(np.unravel_index(int(correlation.argmax()), correlation.shape))
    return np.asarray((peak - (np.array(moving.values.shape) - 1)) * fixed.spacing + fixed.origin - moving.origin, dtype=np.float64)


def _coarse(volume: Volume, spacing: float) -> _Coarse:
    """The volume on a grid of this spacing, block means first, so that nothing fine is folded over."""
    voxels = volume.voxels
    steps = [min(size, max(1, int(spacing / mm))) for size, mm in zip(voxels.shape, volume.spacing_mm, strict=True)]
    whole = [size // step * step for size, step in zip(voxels.shape, steps, strict=True)]
    blocks = voxels[: whole[0], : whole[1], : whole[2]].reshape(
        whole[0] // steps[0], steps[0], whole[1] // steps[1], steps[1], whole[2] // steps[2], steps[2]
    )
    small = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    low, high = _CT_RANGE if volume.modality == "CT" else (float(small.min()), float(np.percentile(small, 99)))
    small = np.clip((small - low) / max(high - low, 1e-6), 0.0, 1.0)
    scale = np.diag([*map(float, steps), 1.0])
    scale[:3, 3] = (np.array(steps) - 1) / 2  # the middle of the first block
    affine = volume.affine @ scale
    corners = np.array(np.meshgrid(*([0, size - 1] for size in small.shape), indexing="ij")).reshape(3, -1).T
    places = corners @ affine[:3, :3].T + affine[:3, 3]
    origin = places.min(axis=0)
    shape = tuple(int(extent / spacing) + 1 for extent in places.max(axis=0) - origin)
    to_index = np.linalg.inv(affine)
    matrix, offset = to_index[:3, :3] * spacing, to_index[:3, :3] @ origin + to_index[:3, 3]
    values = ndimage.affine_transform(small, matrix, offset=offset, output_shape=shape, order=1, cval=0.0, output=np.float64)
    known = ndimage.affine_transform(np.ones_like(small), matrix, offset=offset, output_shape=shape, order=1, cval=0.0) > 0.99
    return _Coarse(values=values, known=known, origin=origin, spacing=spacing)
