"""Synthetic nodules pasted into real lungs, as cases of known truth. For measuring alone: never for training, nor to choose a threshold.

A nodule is drawn as the scanner would have seen it: its coverage of each voxel over the slice's thickness, the blur of the
reconstruction, a density with some texture, and in it noise as strong as the image has. What is denser than it, as wall and vessel, stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.grid import grid_over
from dicomnode.analysis.lung import lung_region
from dicomnode.analysis.preparation import resample
from dicomnode.findings import Segment, Volume
from dicomnode.phantoms.nodules import Nodule, random_nodule
from dicomnode.phantoms.shapes import Floats, inside, random_waves
from dicomnode.training.cases import Case, Reader, known_lesion
from dicomnode.training.evaluation.matching import SMALLEST_MM
from dicomnode.training.evaluation.summary import SIZE_BINS_MM

GRID_MM = (2.0, 1.5, 1.5)  # on which places are looked for
AIRY_HU = -500.0
TISSUE_HU = (-50.0, 120.0)  # where the noise is measured
KINDS = ("free", "pleura", "vessel")
EDGE_MM = 0.4
BLUR_MM = 0.55  # of a usual kernel, standard deviation in the plane
SAMPLES = 3  # a voxel and axis
APART_MM = 8.0
TRIES = 60
NOT_ASKED_FOR_MM = SMALLEST_MM - 0.1  # stands for the size of lesions that were there before

Mask = NDArray[np.bool_]
Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Lung:
    """Where nodules can be pasted into a volume: points on a coarse grid, by what is there."""

    places: Mapping[str, Vector]  # kind -> (n, 4): x, y, z in LPS mm, and the depth below the lung's surface, mm
    noise_hu: float


def pasted_cases(cases: Iterable[tuple[str, Reader]], *, count: int) -> Iterator[tuple[str, Reader]]:
    """Yield `count` cases made of the given ones in turn, each time with other nodules, one of each size that fits the series.

    The original's own lesions stay known without being asked for: a finding that meets one isn't false.
    """
    readers = list(cases)
    for number in range(count if readers else 0):
        name, read = readers[number % len(readers)]
        yield f"{name} pasted {number // len(readers) + 1}", partial(_pasted, name, read, number)


def _pasted(name: str, read: Reader, number: int) -> Case:
    case = read()
    rng = np.random.default_rng([number, 91])
    volume, label = case.volume, (case.known[0].label if case.known else "Lung nodule")
    lung = lung_of(volume)
    voxels = np.array(volume.voxels, dtype=np.float32)
    centres = [(np.asarray(known.centre_lps_mm), known.diameter_mm / 2) for known in case.known if known.centre_lps_mm is not None]
    pasted = []
    for low, high in reversed([bins for bins in SIZE_BINS_MM if np.isfinite(bins[1])]):
        diameter = float(np.exp(rng.uniform(np.log(low if low < 25 else 30), np.log(high))))
        kind = str(rng.choice(KINDS))
        centre = _free_place(rng, lung, kind, diameter, volume, centres)
        if centre is None:
            continue
        nodule = random_nodule(rng, (float(centre[0]), float(centre[1]), float(centre[2])), diameter)
        segment = paste(voxels, volume, nodule, rng, lung.noise_hu)
        if segment is not None:
            centres.append((centre, diameter / 2))
            pasted.append(known_lesion(segment, volume, label, diameter))
    own = tuple(replace(known, diameter_mm=min(known.diameter_mm, NOT_ASKED_FOR_MM)) for known in case.known)
    volumes = {**case.volumes, next(iter(case.volumes)): replace(volume, voxels=np.round(voxels))}
    return replace(
        case, name=f"{name} pasted", volumes=volumes, known=(*pasted, *own), truth={}, positive={}, complete=True,
        patient=case.patient or name,
    )  # fmt: skip


def lung_of(volume: Volume) -> Lung:
    """Find the airy lung of a volume, how deep each place lies in it, and the noise of the image.

    Raises:
        NotEligible: there is no lung in it.
    """
    grid = grid_over(_shape(volume), volume.affine, GRID_MM)
    hu = resample(volume.voxels, grid, torch.device("cpu")).numpy()
    region, _ = lung_region(hu, grid.spacing_mm)
    airy = (hu < AIRY_HU) & region
    disc = np.hypot(*np.mgrid[-4:5, -4:5]) <= 4.2
    closed = ndimage.binary_closing(np.pad(airy, ((0, 0), (6, 6), (6, 6))), structure=disc[None])[:, 6:-6, 6:-6] | airy
    padded = np.pad(closed, ((1, 1), (0, 0), (0, 0)), mode="edge")  # beyond the first and last slice the lung goes on
    depth = ndimage.distance_transform_edt(padded, sampling=grid.spacing_mm)[1:-1]
    dense = ndimage.maximum_filter(np.where(airy, 0, closed), size=3) > 0
    masks = {"free": airy & ~dense & (depth > 3), "pleura": airy & (depth < 10), "vessel": closed & ~airy & (depth > 5)}
    places = {}
    for kind, mask in masks.items():
        index = np.argwhere(mask)
        points = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        places[kind] = np.column_stack([points, depth[mask]])
    return Lung(places=places, noise_hu=noise_of(volume))


def noise_of(volume: Volume) -> float:
    """Standard deviation of the noise in soft tissue, HU: of what differs from its surroundings in the plane, by its median."""
    middle = np.asarray(volume.voxels[len(volume.voxels) // 2], dtype=np.float32)
    smooth = ndimage.gaussian_filter(middle, 2.0)
    tissue = ndimage.binary_erosion((smooth > TISSUE_HU[0]) & (smooth < TISSUE_HU[1]), iterations=3)
    if not tissue.any():
        return 0.0
    return float(1.4826 * np.median(np.abs(middle - smooth)[tissue]))


def paste(voxels: Floats, volume: Volume, nodule: Nodule, rng: np.random.Generator, noise_hu: float) -> Segment | None:
    """Draw a nodule into `voxels`, the volume's own (k, r, c), in place; return its voxels, or None if none is half covered.

    Of the wall and the mediastinum nothing becomes nodule.
    """
    reach = max(nodule.body.radii) * 1.3 + nodule.halo_mm + 3
    to_index = np.linalg.inv(volume.affine)
    middle = to_index[:3, :3] @ np.asarray(nodule.centre_lps_mm) + to_index[:3, 3]
    reach_px = np.abs(to_index[:3, :3]) @ np.full(3, reach)
    box = tuple(
        slice(max(0, int(m - r)), min(n, int(m + r) + 2)) for m, r, n in zip(middle, reach_px, voxels.shape, strict=True)
    )  # fmt: skip
    if any(s.stop <= s.start for s in box):
        return None
    target = voxels[box]
    lung = ndimage.binary_closing(np.pad(target < AIRY_HU, 8), structure=_ball(8))[8:-8, 8:-8, 8:-8] | (target < AIRY_HU)
    body, core = _coverage(nodule, volume, box, 0.0), None
    value = np.full(target.shape, nodule.hu, dtype=np.float32)
    if nodule.kind in ("part-solid", "calcified", "cavitary"):
        core = _coverage(nodule, volume, box, {"part-solid": 0.22, "calcified": 0.25, "cavitary": 0.2}[nodule.kind] * nodule.diameter_mm)
        outer, inner = {"part-solid": (-500, nodule.hu), "calcified": (nodule.hu, 450), "cavitary": (nodule.hu, -880)}[nodule.kind]
        value = (outer + core * (inner - outer)).astype(np.float32)
    grain = ndimage.gaussian_filter(rng.standard_normal(target.shape, dtype=np.float32), (0, 0.7, 0.7))
    value += 8 * _texture(rng, volume, box) + grain * np.float32(noise_hu / max(float(grain.std()), 1e-6))
    change = value - target
    if nodule.kind != "cavitary":
        change = np.maximum(change, 0)  # what is denser stays
    target += body * ndimage.binary_dilation(lung, structure=_ball(2)) * change  # up to the wall, whose border is half lung
    mask = (body > 0.5) & lung
    if not mask.any():
        return None
    tight = ndimage.find_objects(mask.astype(np.int8))[0]
    first, second, third = (s.start + t.start for s, t in zip(box, tight, strict=True))
    return Segment(mask=mask[tight], origin=(first, second, third))


def _coverage(nodule: Nodule, volume: Volume, box: tuple[slice, ...], inward_mm: float) -> Floats:
    """How much of each voxel of the box the nodule, shrunk by `inward_mm`, covers: over the voxel, then blurred in the plane."""
    steps = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
    axes = [(np.arange(s.start, s.stop)[:, None] + steps).ravel() for s in box]
    grid = np.meshgrid(*axes, indexing="ij")
    x, y, z = (sum(float(row[a]) * grid[a] for a in range(3)) + float(row[3]) for row in volume.affine[:3])
    points = tuple(np.asarray(part, dtype=np.float32).ravel() for part in (z, y, x))
    near = np.linalg.norm(np.stack(points)[::-1] - np.asarray(nodule.centre_lps_mm)[:, None], axis=0) < 1.6 * max(nodule.body.radii) + 2
    distance = np.full(len(near), 99.0, dtype=np.float32)
    some = (points[0][near], points[1][near], points[2][near])
    distance[near] = nodule.body.distance(some)
    if nodule.surface is not None:
        distance[near] += nodule.surface(some)
    fine = inside(distance + inward_mm, EDGE_MM).reshape(grid[0].shape)
    shape = [n for s in box for n in (s.stop - s.start, SAMPLES)]
    mean = fine.reshape(shape).mean(axis=(1, 3, 5))
    return np.asarray(ndimage.gaussian_filter(mean, [0, *(BLUR_MM / step for step in volume.spacing_mm[1:])]), dtype=np.float32)


def _texture(rng: np.random.Generator, volume: Volume, box: tuple[slice, ...]) -> Floats:
    waves = random_waves(rng, count=16, wavelengths_mm=(3, 15), deviation=1.0)
    z, y, x = (np.arange(s.start, s.stop, dtype=np.float32) * np.float32(step) for s, step in zip(box, volume.spacing_mm, strict=True))
    return waves((z[:, None, None], y[None, :, None], x[None, None, :]))


def _free_place(
    rng: np.random.Generator, lung: Lung, kind: str, diameter: float, volume: Volume, taken: list[tuple[Vector, float]]
) -> Vector | None:
    """A place of this kind with room for the nodule, whole between the first and the last slice; None after TRIES tries."""
    places, radius = lung.places[kind], diameter / 2
    depth = places[:, 3]
    if kind == "pleura":
        places = places[(depth > 0.2 * radius) & (depth < max(0.9 * radius, 3.0))]
    elif kind == "free":
        places = places[depth > min(radius, 10.0)]
    to_index = np.linalg.inv(volume.affine)
    half = radius / volume.spacing_mm[0]
    for _ in range(TRIES if len(places) else 0):
        point = places[rng.integers(len(places)), :3] + rng.uniform(-0.7, 0.7, 3)
        slice_index = float(to_index[0, :3] @ point + to_index[0, 3])
        whole = half - 0.5 <= slice_index <= len(volume.voxels) - 0.5 - half
        if whole and all(np.linalg.norm(point - other) > radius + size + APART_MM for other, size in taken):
            return np.asarray(point)
    return None


def _ball(radius: int) -> Mask:
    """A flat disc: slices are too thick to close across."""
    return np.asarray(np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius)[None]


def _shape(volume: Volume) -> tuple[int, int, int]:
    slices, rows, columns = volume.voxels.shape
    return slices, rows, columns
