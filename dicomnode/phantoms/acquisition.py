"""What a CT scanner does to a scene: slices of some thickness, a reconstruction kernel, noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.phantoms.chest import ChestScene, render
from dicomnode.phantoms.shapes import Floats, Grid


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a scene is scanned."""

    thickness_mm: float = 2.5
    blur_px: float = 0.3  # Gaussian, in the slice; negative: sharpened by that much
    noise_hu: float = 15.0
    grain_px: float = 0.6  # correlation of the noise in the slice


def averaging(fine_z: NDArray[np.floating], slice_z: NDArray[np.floating], thickness_mm: float) -> Floats:
    """Matrix (slices, fine) that averages fine slices over a rectangular slice profile."""
    step = float(fine_z[1] - fine_z[0])
    overlap = np.clip(thickness_mm / 2 + step / 2 - np.abs(slice_z[:, None] - fine_z[None, :]), 0, min(step, thickness_mm))
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True), dtype=np.float32)


def interpolating(from_z: NDArray[np.floating], to_z: NDArray[np.floating]) -> Floats:
    """Matrix (to, from) of linear interpolation between ascending positions, held constant beyond the ends."""
    place = np.interp(to_z, from_z, np.arange(len(from_z)))
    low = np.minimum(place.astype(int), len(from_z) - 2)
    matrix = np.zeros((len(to_z), len(from_z)), dtype=np.float32)
    rows = np.arange(len(to_z))
    matrix[rows, low] = 1 - (place - low)
    matrix[rows, low + 1] += (place - low).astype(np.float32)
    return matrix


def apply_matrix(matrix: Floats, voxels: Floats) -> Floats:
    """Apply a (to, from) matrix along the slices of (from, rows, columns)."""
    return (matrix @ voxels.reshape(len(voxels), -1)).reshape(len(matrix), *voxels.shape[1:])


def develop(slices: Floats, protocol: Protocol, rng: np.random.Generator) -> Floats:
    """Blur or sharpen slices in the plane and add correlated noise, HU."""
    image = slices
    if protocol.blur_px > 0.05:
        image = ndimage.gaussian_filter(image, (0, protocol.blur_px, protocol.blur_px))
    elif protocol.blur_px < -0.05:
        image = image - protocol.blur_px * (image - ndimage.gaussian_filter(image, (0, 1.0, 1.0)))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    if protocol.grain_px > 0.05:
        noise = ndimage.gaussian_filter(noise, (0, protocol.grain_px, protocol.grain_px))
        noise /= max(float(noise.std()), 1e-6)
    return np.asarray(np.maximum(image + protocol.noise_hu * noise, -1024), dtype=np.float32)


def random_protocol(rng: np.random.Generator) -> Protocol:
    """A protocol drawn from what is usual: 1 to 5 mm, soft to sharp kernels, 5 to 60 HU of noise."""
    return Protocol(
        thickness_mm=float(np.exp(rng.uniform(np.log(1.0), np.log(5.0)))),
        blur_px=float(rng.uniform(-0.7, 0.0) if rng.random() < 0.3 else rng.uniform(0.0, 0.8)),
        noise_hu=float(np.exp(rng.uniform(np.log(5), np.log(60)))),
        grain_px=float(rng.uniform(0.3, 1.1)),
    )


def scan(scene: ChestScene, grid: Grid, protocol: Protocol, *, slab: int = 4) -> Floats:
    """Scan a scene: float32 HU (slices, rows, columns) on `grid`, rounded to whole HU. The noise follows from the scene's seed.

    Works through slabs of `slab` slices, so memory stays small.
    """
    fine_step = min(1.5, max(0.75, protocol.thickness_mm / 2))
    step, reach = grid.spacing_mm[0], protocol.thickness_mm / 2
    x, y, start = grid.origin_lps_mm
    result = np.empty(grid.shape, dtype=np.float32)
    for first in range(0, grid.shape[0], slab):
        count = min(slab, grid.shape[0] - first)
        slice_z = start + step * np.arange(first, first + count)
        fine_count = int(np.ceil((slice_z[-1] - slice_z[0] + 2 * reach) / fine_step)) + 1
        fine = Grid(
            origin_lps_mm=(x, y, float(slice_z[0] - reach)),
            spacing_mm=(fine_step, *grid.spacing_mm[1:]),
            shape=(fine_count, *grid.shape[1:]),
        )
        fine_z = fine.origin_lps_mm[2] + fine_step * np.arange(fine_count)
        mean = averaging(fine_z, slice_z, protocol.thickness_mm)
        rng = np.random.default_rng([scene.seed, 2, first])
        result[first : first + count] = develop(apply_matrix(mean, render(scene, fine).hu), protocol, rng)
    return np.round(result)
