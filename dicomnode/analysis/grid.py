"""The grid a network works on: a volume's own axes, turned to anatomical order, at another spacing; and one series on another's voxels.

A grid is separable and linear, one small matrix an axis, so positions are exact and results the same on each device. No
interpolation across axes happens: oblique series keep their obliquity, but where a second series is brought onto the first one's
voxels. Must never import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.manifest import PreprocessingSection
from dicomnode.errors import PackageError
from dicomnode.findings import Volume

SAME_GRID = 1e-3  # voxels: two grids that differ by less anywhere are one
SLAB_VOXELS = 2**22  # resampled at a time

Triple = tuple[int, int, int]
_Voxel = TypeVar("_Voxel", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A regular grid over a volume, its axes turned to (towards head, towards back, towards the patient's left) as nearly as they go.

    `source_axis[a]` is the volume's axis that became axis `a`, reversed where `reversed_[a]`. Along axis `a`, grid index i lies at
    `offset[a] + i * step[a]` in voxels of the turned volume. `affine` maps grid indices to LPS mm.
    """

    shape: Triple
    source_shape: Triple  # of the turned volume
    source_axis: Triple
    reversed_: tuple[bool, bool, bool]
    step: tuple[float, float, float]
    offset: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]

    def from_volume(self, axis: int) -> NDArray[np.float32]:
        """Return the (grid, volume) matrix that resamples the volume's own axis `source_axis[axis]` onto grid axis `axis`.

        Each row is a triangle as wide as the coarser of both spacings, so that a coarser grid averages instead of skipping voxels.
        """
        positions = self.offset[axis] + np.arange(self.shape[axis], dtype=np.float64) * self.step[axis]
        matrix = _triangles(positions, self.source_shape[axis], max(1.0, self.step[axis]))
        return np.ascontiguousarray(matrix[:, ::-1]) if self.reversed_[axis] else matrix

    def to_volume(self, axis: int, *, grid: slice, turned: slice) -> NDArray[np.float32]:
        """Return the matrix of linear interpolation from grid indices `grid` to voxels `turned` of the turned volume along `axis`."""
        positions = (np.arange(turned.start, turned.stop) - self.offset[axis]) / self.step[axis] - grid.start
        return _triangles(positions, grid.stop - grid.start, 1.0)

    def covering(self, axis: int, grid: slice) -> slice:
        """Return the voxels of the turned volume that lie within one grid step of the grid indices `grid` along `axis`."""
        first = self.offset[axis] + (grid.start - 1) * self.step[axis]
        last = self.offset[axis] + grid.stop * self.step[axis]
        return slice(max(0, int(np.ceil(first))), min(self.source_shape[axis], int(np.floor(last)) + 1))

    def turn_back(self, box: NDArray[_Voxel], origin: Triple) -> tuple[NDArray[_Voxel], Triple]:
        """Turn a box of the turned volume, at `origin` there, into a box of the volume and its origin in the volume."""
        flips = tuple(slice(None, None, -1) if flipped else slice(None) for flipped in self.reversed_)
        starts = [
            size - start - length if flipped else start
            for size, start, length, flipped in zip(self.source_shape, origin, box.shape, self.reversed_, strict=True)
        ]
        order = np.argsort(self.source_axis)
        first, second, third = (starts[int(axis)] for axis in order)
        return np.ascontiguousarray(box[flips].transpose(order)), (first, second, third)


def grid_of(volume: Volume, preprocessing: PreprocessingSection) -> Grid:
    """Return the grid that the manifest's preprocessing wants of a volume; a projection keeps its axes and its one slice.

    With `size_px` the longer side gets that many pixels and the other one as many as keep the image's proportions in millimetres.
    """
    slices, rows, columns = volume.voxels.shape
    shape = (slices, rows, columns)
    slice_mm, row_mm, column_mm = volume.spacing_mm
    if preprocessing.spacing_mm is not None:
        _, wanted_row_mm, wanted_column_mm = spacing = preprocessing.spacing_mm
        if not volume.is_projection:
            return grid_over(shape, volume.affine, spacing)
        return grid_over(shape, volume.affine, (slice_mm, wanted_row_mm, wanted_column_mm), keep_axes=True)
    if preprocessing.size_px is None or not volume.is_projection:
        raise PackageError("size_px of the preprocessing is for projections, and spacing_mm for series.")
    pixel_mm = max(rows * row_mm, columns * column_mm) / preprocessing.size_px
    return grid_over(shape, volume.affine, (slice_mm, pixel_mm, pixel_mm), keep_axes=True)


def grid_over(shape: Triple, affine: NDArray[np.float64], spacing_mm: tuple[float, float, float], *, keep_axes: bool = False) -> Grid:
    """Return the grid of `spacing_mm` that is centred on a volume of this shape and affine (to mm).

    Its axes, and those of `spacing_mm`, go towards head, back and left; with `keep_axes` they are the volume's own.
    """
    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    along = (columns / lengths)[::-1]  # [a, v]: how much axis v of the volume points towards z, y, x
    turns = [(0, 1, 2)] if keep_axes else itertools.permutations(range(3))
    source_axis = max(turns, key=lambda order: sum(abs(along[a, v]) for a, v in enumerate(order)))
    reversed_ = tuple(not keep_axes and bool(along[a, v] < 0) for a, v in enumerate(source_axis))
    source_shape = tuple(shape[v] for v in source_axis)
    step = tuple(float(spacing_mm[a] / lengths[v]) for a, v in enumerate(source_axis))
    size = tuple(max(1, round(n / s)) for n, s in zip(source_shape, step, strict=True))
    offset = tuple((n - 1) / 2 - (g - 1) / 2 * s for n, g, s in zip(source_shape, size, step, strict=True))

    turned = np.eye(4)  # turned volume index -> volume index
    turned[:3, :3] = 0
    scaled = np.diag([*step, 1.0])  # grid index -> turned volume index
    scaled[:3, 3] = offset
    for a, v in enumerate(source_axis):
        turned[v, a] = -1 if reversed_[a] else 1
        turned[v, 3] = source_shape[a] - 1 if reversed_[a] else 0
    return Grid(
        shape=_triple(size), source_shape=_triple(source_shape), source_axis=_triple(source_axis),
        reversed_=(reversed_[0], reversed_[1], reversed_[2]), step=(step[0], step[1], step[2]),
        offset=(offset[0], offset[1], offset[2]), spacing_mm=spacing_mm, affine=affine @ turned @ scaled,
    )  # fmt: skip


def resample_to(volume: Volume, reference: Volume) -> Volume:
    """Return `volume` on the voxels of `reference`, trilinear and float32; the same voxels where both have one grid.

    Outside of it lies its minimum (CT: air; MR: background). Slices, affine and image UIDs are the reference's; Series Instance
    UID, modality and values are the volume's own. Done in slabs: beside the result little memory is taken.

    Raises:
        NotEligible: the two lie in different frames of reference, so no position of one has a meaning in the other.
    """
    if volume is reference:
        return volume
    if volume.is_projection or volume.frame_of_reference_uid != reference.frame_of_reference_uid:
        raise NotEligible("mixed-frame-of-reference", "The series of the set lie in different frames of reference.")
    shape = reference.voxels.shape
    into = np.linalg.inv(volume.affine) @ reference.affine  # reference index -> volume index
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, n - 1) for n in shape))])
    if shape == volume.voxels.shape and np.abs(corners @ into.T - corners).max() < SAME_GRID:
        voxels = volume.voxels
    else:
        voxels = np.empty(shape, dtype=np.float32)
        outside = volume.voxels.min()
        for slab, start in _slabs(voxels):
            offset = into[:3, 3] + into[:3, 0] * start
            ndimage.affine_transform(volume.voxels, into[:3, :3], offset, output_shape=slab.shape, output=slab, order=1, mode="nearest")
            slab[~_within(into[:3, :3], offset, slab.shape, volume.voxels.shape)] = outside
    return replace(
        volume, voxels=voxels, affine=reference.affine, sop_instance_uids=reference.sop_instance_uids, frame_numbers=reference.frame_numbers
    )


def _slabs(voxels: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], int]]:
    thickness = max(1, SLAB_VOXELS // max(1, voxels[0].size))
    for start in range(0, len(voxels), thickness):
        yield voxels[start : start + thickness], start


def _within(
    matrix: NDArray[np.float64], offset: NDArray[np.float64], shape: tuple[int, ...], source_shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Return which voxels of a slab lie within the source's outermost voxels, up to their edges (half a voxel beyond their centres)."""
    k, r, c = np.ogrid[tuple(slice(n) for n in shape)]
    inside = np.ones(shape, dtype=np.bool_)
    for row, start, size in zip(matrix, offset, source_shape, strict=True):
        along = (row[0] * k + row[1] * r + start).astype(np.float32) + (row[2] * c).astype(np.float32)
        inside &= (along >= -0.5 - SAME_GRID) & (along <= size - 0.5 + SAME_GRID)
    return inside


def _triangles(positions: NDArray[np.float64], size: int, half_width: float) -> NDArray[np.float32]:
    """Return rows of triangle weights around each position over `size` samples; beyond the ends the outermost sample counts."""
    inside = np.clip(positions, 0, size - 1)
    weights = np.clip(1 - np.abs(inside[:, None] - np.arange(size)[None, :]) / half_width, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def _triple(values: tuple[int, ...]) -> Triple:
    first, second, third = values
    return first, second, third
