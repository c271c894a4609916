"""Volumes as the network wants them: several inputs as channels of one grid, in the intensities it was trained on, cut to the region.

All work on voxels is done on the device that is given. Must never look at a network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.analysis.grid import Grid, Triple, grid_over
from dicomnode.analysis.manifest import InputSection, Manifest, PreprocessingSection
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Volume, Voxels

REGIONS = {  # what `input.region` of a manifest names: a function of (values, spacing_mm) that returns (mask, side or None)
    "lung": ("dicomnode.analysis.lung", "lung_region"),
    "chest-radiograph": ("dicomnode.analysis.radiograph", "chest_radiograph_region"),
    "head": ("dicomnode.analysis.head", "head_region"),
}
CONTEXT_MM = 24.0  # the network sees this much around the region: what decides at its border lies outside it
SLAB = 8  # slices resampled at a time: a slab of 512 x 512 stays in the cache and out of the memory's peak
LOW, HIGH = 0.01, 0.99  # of intensity percentiles

Region = Callable[[NDArray[np.float32], tuple[float, float, float]], tuple[NDArray[np.bool_], NDArray[np.int8] | None]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the network is given: the part of the grid that begins at `origin`.

    `image` is float32 (inputs, k, r, c) on the device. `region` limits where findings may lie and `side` says 1 for the patient's
    right and 2 for the left; both have the image's shape, or are None where the manifest names no region.
    """

    grid: Grid
    origin: Triple
    image: torch.Tensor
    region: NDArray[np.bool_] | None
    side: NDArray[np.int8] | None
    notes: tuple[str, ...]


def prepare(manifest: Manifest, volumes: Mapping[str, Volume], device: torch.device, *, coarser: float = 1.0) -> Prepared:
    """Return the volumes of a manifest's inputs on the grid of the first one, at `coarser` times the manifest's spacing.

    An optional input that is absent is a channel of zeros, and a note says so.

    Raises:
        NotEligible: the manifest's region isn't in the volume.
        PackageError, AnalysisFailed: a volume that isn't optional is missing, or the manifest has no preprocessing.
    """
    settings = manifest.preprocessing
    if settings is None:
        raise PackageError(f"the package {manifest.name} has no preprocessing of its own")
    first = manifest.inputs[0]
    if first.name not in volumes:
        raise AnalysisFailed(f"The package {manifest.name} needs the input {first.name}.")
    volume = volumes[first.name]
    grid = grid_for(volume, settings, coarser)
    image = resample(volume.voxels, grid, device)
    region = side = None
    if first.region:
        region, side = region_of(first.region)(image.cpu().numpy(), grid.spacing_mm)
    box = _box_around(region, grid)
    channels, notes = [normalised(image[box], settings)], []
    for accepts in manifest.inputs[1:]:
        if accepts.name in volumes:
            channels.append(normalised(_on_grid(volumes[accepts.name], volume, grid, device)[box], settings))
        else:
            notes.append(_without(manifest, accepts))
            channels.append(torch.zeros_like(channels[0]))
    return Prepared(
        grid=grid, origin=(box[0].start, box[1].start, box[2].start), image=torch.stack(channels),
        region=None if region is None else region[box], side=None if side is None else side[box], notes=tuple(notes),
    )  # fmt: skip


def grid_for(volume: Volume, settings: PreprocessingSection, coarser: float = 1.0) -> Grid:
    """Return the grid that the manifest asks for over a volume; a projection keeps its one slice and its rows and columns."""
    if volume.is_projection:
        return _plane_grid(volume, settings, coarser)
    if settings.spacing_mm is None:
        raise PackageError("size_px is for projections: a series needs spacing_mm")
    slices, rows, columns = (spacing * coarser for spacing in settings.spacing_mm)
    return grid_over(_shape(volume.voxels), volume.affine, (slices, rows, columns))


def normalised(image: torch.Tensor, settings: PreprocessingSection) -> torch.Tensor:
    """Return an image of any shape in the manifest's intensities, float32.

    window: clipped, scaled to 0..1; z-score: by mean and standard deviation of the voxels above zero, the others are 0;
    percentiles: the 1st becomes 0 and the 99th 1, clipped.
    """
    if settings.window is not None:
        low, high = settings.window
        return ((image - low) / (high - low)).clamp_(0, 1)
    if settings.intensity == "z-score":
        inside = image > 0
        values = image[inside].double()
        deviation = float(values.std(correction=0)) if len(values) else 0.0
        mean = float(values.mean()) if len(values) else 0.0
        return torch.where(inside, (image - mean) / (deviation or 1.0), 0.0)
    flat = image.flatten()
    low, high = (float(flat.kthvalue(1 + round(share * (len(flat) - 1))).values) for share in (LOW, HIGH))
    return ((image - low) / ((high - low) or 1.0)).clamp_(0, 1)


def resample(voxels: Voxels, grid: Grid, device: torch.device) -> torch.Tensor:
    """Return the voxels that the grid lies over on the grid, float32 on `device`, a slab of slices at a time."""
    slices, rows, columns = (torch.from_numpy(grid.from_volume(axis)).to(device) for axis in range(3))
    turned = torch.from_numpy(np.require(voxels, requirements=["C", "W"])).permute(grid.source_axis)  # as torch wants it; seldom a copy
    planes = [
        rows @ (turned[k : k + SLAB].to(device).float() @ columns.T)  # the slab is copied, never the volume
        for k in range(0, turned.shape[0], SLAB)
    ]
    stacked = torch.cat(planes)
    return (slices @ stacked.flatten(1)).reshape(grid.shape)


def region_of(name: str) -> Region:
    """Return the function that finds the region `name` of a manifest."""
    module, function = REGIONS[name]
    found: Any = getattr(importlib.import_module(module), function)
    region: Region = found
    return region


def _on_grid(volume: Volume, first: Volume, grid: Grid, device: torch.device) -> torch.Tensor:
    """Return a further input on the grid over the first: by the same small matrices where both share theirs, else voxel by voxel."""
    if volume.voxels.shape == first.voxels.shape and np.allclose(volume.affine, first.affine, atol=1e-3):
        return resample(volume.voxels, grid, device)
    return _interpolated(volume, grid, device)


def _interpolated(volume: Volume, grid: Grid, device: torch.device) -> torch.Tensor:
    """Return a volume of the same patient space on a grid that isn't over it, by linear interpolation; 0 beyond its edges."""
    to_index = np.linalg.inv(volume.affine) @ grid.affine  # grid index -> voxel of this volume
    size = np.array(volume.voxels.shape, dtype=np.float64)
    steps = np.linalg.norm(to_index[:3, :3], axis=1)
    voxels = torch.from_numpy(np.require(volume.voxels, requirements=["C", "W"])).to(device).float()[None, None]
    factors = [max(1, int(step)) for step in steps]  # a coarser grid averages instead of skipping voxels
    if max(factors) > 1:
        voxels = torch.nn.functional.avg_pool3d(voxels, factors, ceil_mode=True, count_include_pad=False)
    rows, columns = (torch.arange(n, device=device, dtype=torch.float64) for n in grid.shape[1:])
    result = torch.empty(grid.shape, dtype=torch.float32, device=device)
    for k in range(grid.shape[0]):
        scaled = []
        for axis in (2, 1, 0):  # grid_sample wants x, y, z in -1..1 from edge to edge
            along = to_index[axis]
            index = along[0] * k + along[1] * rows[:, None] + along[2] * columns[None, :] + along[3]
            pooled = -(-size[axis] // factors[axis])
            scaled.append((2 * ((index + 0.5) / factors[axis]) / pooled - 1).float())
        where = torch.stack(scaled, dim=-1)[None, None]
        result[k] = torch.nn.functional.grid_sample(voxels, where, mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0, 0]
    return result


def _plane_grid(volume: Volume, settings: PreprocessingSection, coarser: float) -> Grid:
    """Return a grid of one slice over a projection."""
    shape = _shape(volume.voxels)
    row_mm, column_mm = float(np.linalg.norm(volume.affine[:2, 1])), float(np.linalg.norm(volume.affine[:2, 2]))
    if settings.size_px is not None:
        scale = max(shape[1:]) / settings.size_px * coarser  # pixels of the image for one of the grid
        step = (1.0, scale, scale)
    elif settings.spacing_mm is not None:
        step = (1.0, settings.spacing_mm[1] * coarser / row_mm, settings.spacing_mm[2] * coarser / column_mm)
    size = (1, max(1, round(shape[1] / step[1])), max(1, round(shape[2] / step[2])))
    offset = (0.0, *((n - 1) / 2 - (g - 1) / 2 * s for n, g, s in zip(shape[1:], size[1:], step[1:], strict=True)))
    scaled = np.diag([*step, 1.0])
    scaled[:3, 3] = offset
    return Grid(
        shape=size, source_shape=shape, source_axis=(0, 1, 2), reversed_=(False, False, False), step=step,
        offset=(offset[0], offset[1], offset[2]), spacing_mm=(1.0, row_mm * step[1], column_mm * step[2]), affine=volume.affine @ scaled,
    )  # fmt: skip


def _without(manifest: Manifest, accepts: InputSection) -> str:
    if not accepts.optional:
        raise AnalysisFailed(f"The package {manifest.name} needs the input {accepts.name}.")
    return f"The study has no {accepts.name}: the model ran without it."


def _box_around(region: NDArray[np.bool_] | None, grid: Grid) -> tuple[slice, slice, slice]:
    if region is None:
        return slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2])
    boxes = []
    for axis in range(3):
        filled = np.flatnonzero(region.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(CONTEXT_MM / grid.spacing_mm[axis])
        boxes.append(slice(max(0, int(filled[0]) - margin), min(grid.shape[axis], int(filled[-1]) + 1 + margin)))
    return boxes[0], boxes[1], boxes[2]


def _shape(voxels: Voxels) -> Triple:
    slices, rows, columns = voxels.shape
    return slices, rows, columns
