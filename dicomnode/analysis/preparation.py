"""Volumes as the network wants them: several inputs as channels of one grid, in the intensities it was trained on, cut to the region.

All work on voxels is done on the device that is given. Must never look at a network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.analysis.even_light import evened
from dicomnode.analysis.grid import Grid, Triple, grid_of, resample_to
from dicomnode.analysis.head import without_background
from dicomnode.analysis.manifest import InputSection, Manifest, PreprocessingSection
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Volume, Voxels

REGIONS = {  # what `input.region` of a manifest names: a function of (values, spacing_mm) that returns (mask, side or None)
    "lung": ("dicomnode.analysis.lung", "lung_region"),
    "chest-radiograph": ("dicomnode.analysis.radiograph", "chest_radiograph_region"),
    "lung-fields": ("dicomnode.analysis.radiograph", "lung_field_region"),
    "head": ("dicomnode.analysis.head", "head_region"),
}
ORGANS = {  # the same with the mask of the organ itself as third
    "head": ("dicomnode.analysis.head", "brain_in_head"),
    "lung": ("dicomnode.analysis.lung", "lung_with_dents"),
}
CONTEXT_MM = 24.0  # the network sees this much around the region: what decides at its border lies outside it
FILM_CONTEXT = 1 / 16  # the same on a projection, which may not say what a millimetre is: of its longer side
SLAB = 8  # slices resampled at a time: a slab of 512 x 512 stays in the cache and out of the memory's peak
LOW, HIGH = 0.01, 0.99  # of intensity percentiles
FROM_0_TO_1 = ("window", "percentiles")  # intensities that end there; the others have negative values too
QUARTILES, DEVIATIONS = (0.25, 0.5, 0.75), 1.349  # of a normal distribution's deviation lie between the first quartile and the third
FURTHEST = 8.0  # deviations that an organ-z-score may have
# Of a local contrast: the Gaussian's deviation to the longer side, what is added to the deviation around a pixel, and the largest value
AROUND, EVEN, STRONGEST = 1 / 14, 0.01, 3.0

Organ = Callable[[NDArray[np.float32], tuple[float, float, float]], tuple[NDArray[np.bool_], NDArray[np.int8] | None, NDArray[np.bool_]]]
Region = Callable[[NDArray[np.float32], tuple[float, float, float]], tuple[NDArray[np.bool_], NDArray[np.int8] | None]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the network is given: the part of the grid that begins at `origin`.

    `image` is float32 (inputs, k, r, c) on the device. `region` limits where findings may lie and `side` says 1 for the patient's
    right and 2 for the left; both have the image's shape, or are None where the manifest names no region. `organ` is the part of the region
    where what is small may lie, for a pass at scale 1 beside coarser ones; None: all of it.
    """

    grid: Grid
    origin: Triple
    image: torch.Tensor
    region: NDArray[np.bool_] | None
    organ: NDArray[np.bool_] | None = None
    side: NDArray[np.int8] | None
    absent: tuple[str, ...]  # optional inputs in whose place are zeros
    notes: tuple[str, ...]


def prepare(
    manifest: Manifest, volumes: Mapping[str, Volume], device: torch.device, *, coarser: float = 1.0, whole: bool = False
) -> Prepared:
    """Return the volumes of a manifest's inputs on the grid of the first one, at `coarser` times the manifest's spacing.

    Where the manifest names a region, only the box around it is returned, unless the `whole` image is wanted.
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
    grid = grid_of(volume, _coarsened(settings, coarser))
    image = resample(volume.voxels, grid, device)
    region = side = organ = None
    at_scales = manifest.inference is not None and max(manifest.inference.scales) > 1 and first.region in ORGANS
    if first.region and (settings.intensity == "organ-z-score" or at_scales):
        region, side, organ = organ_of(first.region)(image.cpu().numpy(), grid.spacing_mm)
    elif first.region:
        region, side = region_of(first.region)(image.cpu().numpy(), grid.spacing_mm)
    box = _box_around(None if whole else region, grid, projection=volume.is_projection)
    scored = settings.intensity == "organ-z-score"
    inside = None if organ is None or not scored else torch.from_numpy(np.ascontiguousarray(organ[box])).to(device)
    # who took the skull away made the light even before, as a rule; a second time would take from a large tumour's brightness
    uneven = inside if settings.even and without_background(image.cpu().numpy()) is None else None
    channels, notes, absent = [normalised(evened(image[box], uneven), settings, inside)], [], []
    for accepts in manifest.inputs[1:]:
        if accepts.name in volumes:
            channels.append(normalised(evened(_brought(volumes[accepts.name], volume, grid, device)[box], uneven), settings, inside))
        else:
            notes.append(_without(manifest, accepts))
            channels.append(torch.zeros_like(channels[0]))
            absent.append(accepts.name)
    notes += [
        f"Nothing is said of {output.label}: it needs {' and '.join(output.needs)}."
        for output in manifest.outputs
        if set(output.needs) & set(absent)
    ]
    return Prepared(
        grid=grid, origin=(box[0].start, box[1].start, box[2].start), image=torch.stack(channels),
        region=None if region is None else region[box], side=None if side is None else side[box],
        organ=organ[box] if organ is not None and at_scales else None, absent=tuple(absent), notes=tuple(notes),
    )  # fmt: skip


def _brought(other: Volume, volume: Volume, grid: Grid, device: torch.device) -> torch.Tensor:
    return resample(resample_to(other, volume).voxels, grid, device)


def others(manifest: Manifest, volumes: Mapping[str, Volume]) -> tuple[str, ...]:
    """Return the series that the model was given beside the first input's."""
    return tuple(volumes[accepts.name].series_instance_uid for accepts in manifest.inputs[1:] if accepts.name in volumes)


def normalised(image: torch.Tensor, settings: PreprocessingSection, organ: torch.Tensor | None = None) -> torch.Tensor:
    """Return an image of any shape in the manifest's intensities, float32.

    window: clipped, scaled to 0..1; z-score: by mean and standard deviation of the voxels above zero, the others are 0;
    percentiles: the 1st becomes 0 and the 99th 1, clipped; organ-z-score: by the median and the quartiles of the voxels of `organ`,
    a mask of the image's shape, within 8 deviations; the others are 0. A tumour moves quartiles less than it moves a mean.
    local-contrast: percentiles, then `local_contrast`.
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
    if organ is not None:
        first, median, third = _quantiles(image[organ], QUARTILES)
        deviation = (third - first) / DEVIATIONS
        return torch.where(organ, ((image - median) / (deviation or 1.0)).clamp_(-FURTHEST, FURTHEST), 0.0)
    flat = image.flatten()
    low, high = _quantiles(flat, (LOW, HIGH))
    scaled = ((image - low) / ((high - low) or 1.0)).clamp_(0, 1)
    return local_contrast(scaled) if settings.intensity == "local-contrast" else scaled


def local_contrast(image: torch.Tensor) -> torch.Tensor:
    """Return (k, r, c) values 0..1 less their mean around each pixel of a slice, by their deviation there, within 3. NaN becomes 0.

    What a film's technique and a viewer's grey scale change slowly over the film is gone, and a faint opacity over dark lung counts as
    much as a dense one: as R. H. H. M. Philipsen et al. prepare chest radiographs (IEEE Trans. Med. Imaging 34, 2015), in one band.
    """
    known = torch.isfinite(image)
    values, weights = torch.where(known, image, 0.0), known.float()
    rows, columns = (_gaussian(size, AROUND * max(image.shape[-2:]), image.device) for size in image.shape[-2:])

    def around(part: torch.Tensor) -> torch.Tensor:
        return rows @ part @ columns

    total = around(weights).clamp_(min=1e-6)
    difference = torch.where(known, values - around(values) / total, 0.0)
    spread = (around(difference * difference) / total).sqrt_()
    return (difference / (spread + EVEN)).clamp_(-STRONGEST, STRONGEST)


def _gaussian(size: int, deviation: float, device: torch.device) -> torch.Tensor:
    """The weight of each of `size` pixels around each of them, (size, size): a product with it blurs along an axis."""
    place = torch.arange(size, device=device, dtype=torch.float32)
    return torch.exp(-0.5 * ((place[:, None] - place[None]) / deviation) ** 2)


def _quantiles(values: torch.Tensor, shares: Sequence[float]) -> list[float]:
    return [float(values.kthvalue(1 + round(share * (len(values) - 1))).values) for share in shares] if len(values) else [0.0] * len(shares)


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


def organ_of(name: str) -> Organ:
    """Return the function that finds the region `name` of a manifest and the organ in it."""
    module, function = ORGANS[name]
    found: Any = getattr(importlib.import_module(module), function)
    organ: Organ = found
    return organ


def _coarsened(settings: PreprocessingSection, coarser: float) -> PreprocessingSection:
    if settings.spacing_mm is not None:
        return settings.model_copy(update={"spacing_mm": tuple(spacing * coarser for spacing in settings.spacing_mm)})
    return settings.model_copy(update={"size_px": max(1, round((settings.size_px or 1) / coarser))})


def _without(manifest: Manifest, accepts: InputSection) -> str:
    if not accepts.optional:
        raise AnalysisFailed(f"The package {manifest.name} needs the input {accepts.name}.")
    return f"The input {accepts.name} is absent: the model was given zeros in its place."


def _box_around(region: NDArray[np.bool_] | None, grid: Grid, *, projection: bool) -> tuple[slice, slice, slice]:
    if region is None:
        return slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2])
    boxes = []
    for axis in range(3):
        filled = np.flatnonzero(region.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(FILM_CONTEXT * max(grid.shape)) if projection else round(CONTEXT_MM / grid.spacing_mm[axis])
        boxes.append(slice(max(0, int(filled[0]) - margin), min(grid.shape[axis], int(filled[-1]) + 1 + margin)))
    return boxes[0], boxes[1], boxes[2]
