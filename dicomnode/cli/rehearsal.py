"""What a package is checked with: a phantom for each input, no larger than its check needs.

Must never run or resolve anything of a bundle: its own grid is read from its configuration as data.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dicomnode.analysis.bundle_files import spacing_and_channels, window_of
from dicomnode.analysis.manifest import InputSection, Manifest
from dicomnode.analysis.package import BUNDLE
from dicomnode.findings import Volume
from dicomnode.phantoms.head import CONTRASTS
from dicomnode.phantoms.studies import check_volume

VOXELS = 6_000_000  # on the grid of the bundle: a minute or two of a large network on a CPU
VALUES = 160_000_000  # those times the channels: 640 MB of float32, of which a bundle holds several copies
WINDOWED = 8_000_000  # in windows that overlap: nine of 96 x 96 x 96
LEAST = 100_000
FEWEST_SLICES, FEWEST_PIXELS = 16, 48


def check_volumes(folder: Path, manifest: Manifest) -> dict[str, Volume]:
    """Return what the package in `folder` is run on, by the names of its inputs; the series of a set lie on one grid."""
    volumes = {accepts.name: _phantom(accepts) for accepts in manifest.inputs}
    if manifest.bundle is None or manifest.inputs[0].dimensions == 2:
        return volumes
    spacing, channels = spacing_and_channels(folder / BUNDLE, manifest.bundle.config, manifest.bundle.preprocessing)
    most = min(VOXELS, VALUES // max(1, channels))
    slides = window_of(folder / BUNDLE, manifest.bundle.config)
    if slides is not None:
        first, fewest = volumes[manifest.inputs[0].name], max(1, WINDOWED // math.prod(slides[0]))
        while most > LEAST and windows_of(cut(first, spacing, most), spacing, *slides) > fewest:
            most = most * 3 // 4
    return {name: cut(volume, spacing, most) for name, volume in volumes.items()}


def windows_of(volume: Volume, spacing_mm: tuple[float, float, float] | None, window: tuple[int, int, int], overlap: float) -> int:
    """Return how many windows that overlap cover a volume whose voxels are brought to be `spacing_mm` (x, y, z) apart."""
    extent = np.abs(volume.affine[:3, :3]) @ np.array(volume.voxels.shape)
    edges = extent / spacing_mm if spacing_mm is not None else np.array(volume.voxels.shape[::-1])
    count = 1
    for edge, size in zip(edges.tolist(), window, strict=True):
        count *= math.ceil(max(0.0, edge - size) / max(1, int(size * (1 - overlap)))) + 1
    return count


def cut(volume: Volume, spacing_mm: tuple[float, float, float] | None, most: int) -> Volume:
    """Return the middle of a volume that has at most so many voxels where they are `spacing_mm` (x, y, z) apart, or its smallest middle."""
    extent = np.abs(volume.affine[:3, :3]) @ np.array(volume.voxels.shape)
    step = extent / volume.voxels.shape if spacing_mm is None else np.array(spacing_mm)
    share = most / float(np.prod(np.maximum(1, extent / step)))
    if share >= 1:
        return volume
    slices, rows, columns = volume.voxels.shape
    kept_slices = min(slices, max(FEWEST_SLICES, round(slices * share ** (1 / 3))))
    in_plane = (share * slices / kept_slices) ** 0.5
    kept = (kept_slices, *(min(edge, max(FEWEST_PIXELS, int(edge * in_plane))) for edge in (rows, columns)))
    first = [(whole - part) // 2 for whole, part in zip(volume.voxels.shape, kept, strict=True)]
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps(np.array(first, dtype=np.float64))
    box = tuple(slice(start, start + edge) for start, edge in zip(first, kept, strict=True))
    voxels: Any = np.ascontiguousarray(volume.voxels[box])  # of the volume's own type, which numpy's stubs lose
    return replace(
        volume,
        voxels=voxels,
        affine=affine,
        sop_instance_uids=volume.sop_instance_uids[box[0]],
        frame_numbers=None if volume.frame_numbers is None else volume.frame_numbers[box[0]],
    )


def _phantom(accepts: InputSection) -> Volume:
    drawn = next((weighting for weighting in accepts.mr_contrasts if weighting in CONTRASTS), "")
    return check_volume(modality=accepts.modalities[0], projection=accepts.dimensions == 2, contrast=drawn)
