"""Scans of which something is known: synthetic chests with their truth, and folders of real cases with a reference.

Real cases are for measuring alone: nothing here hands them to training.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nrrd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.findings import Segment, Volume
from dicomnode.phantoms.acquisition import random_protocol, scan
from dicomnode.phantoms.chest import ChestScene, chest_scene, scatter_nodules, true_mask
from dicomnode.phantoms.shapes import Grid
from dicomnode.phantoms.studies import chest_grid, volume_of

SIZE_BINS_MM = ((5.0, 7.0), (7.0, 10.0), (10.0, 15.0), (15.0, 25.0), (25.0, 40.0))

Point = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Known:
    """A nodule that is there. `truth` is its voxels, where they are known."""

    centre_lps_mm: Point
    diameter_mm: float
    truth: Segment | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A volume and what is known of it."""

    name: str
    volume: Volume
    known: tuple[Known, ...]


def synthetic_case(seed: int, *, nodules: int) -> Case:
    """A whole synthetic chest, scanned with a random protocol, with about so many nodules spread over SIZE_BINS_MM."""
    rng = np.random.default_rng([seed, 21])
    bins = [SIZE_BINS_MM[i % len(SIZE_BINS_MM)] for i in range(nodules)]
    diameters = np.array([np.exp(rng.uniform(np.log(low), np.log(high))) for low, high in bins])
    scene = scatter_nodules(chest_scene(seed), rng, np.sort(diameters)[::-1])
    protocol = random_protocol(rng)
    grid = chest_grid(scene, pixel_mm=1.2, slice_mm=max(1.5, round(protocol.thickness_mm, 2)), pixels=320)
    volume = volume_of(scan(scene, grid, protocol), grid, f"phantom {seed}")
    return Case(name=f"phantom {seed}", volume=volume, known=tuple(_truths(scene, grid)))


def real_cases(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each case in `folder`: its name, and a function that reads it and raises NotEligible if the package doesn't accept it.

    Folders of DICOM files, and `X_image.nrrd` with the mask `X_label.nrrd` (LPS). Known nodules of DICOM series come from
    `nodules*.csv` with the columns seriesuid, coordX, coordY, coordZ (LPS mm) and diameter_mm.
    """
    tables = [file.read_text(encoding="utf-8").splitlines() for file in sorted(folder.rglob("nodules*.csv"))]
    nodules = [row for table in tables for row in csv.DictReader(table)]
    places = sorted({path.parent for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in ("", ".dcm")})
    for place in places:
        headers = read_headers(sorted(path for path in place.iterdir() if path.is_file()))
        if headers:
            yield place.name, partial(_dicom_case, place.name, headers, manifest, nodules)
    for image in sorted(folder.rglob("*_image.nrrd")):
        yield image.name.removesuffix("_image.nrrd"), partial(_nrrd_case, image)


def _truths(scene: ChestScene, grid: Grid) -> Iterator[Known]:
    for nodule in scene.nodules:
        found = true_mask(scene, nodule, grid)
        if found is not None and found[0].any():
            truth = Segment(mask=found[0], origin=(found[1][0].start, found[1][1].start, found[1][2].start))
            yield Known(centre_lps_mm=nodule.centre_lps_mm, diameter_mm=nodule.diameter_mm, truth=truth)


def _dicom_case(name: str, headers: Sequence[tuple[Path, Dataset]], manifest: Manifest, nodules: Sequence[Mapping[str, str]]) -> Case:
    volume = read_volume(select(manifest, headers).series[0])
    known = tuple(
        Known(centre_lps_mm=(float(row["coordX"]), float(row["coordY"]), float(row["coordZ"])), diameter_mm=float(row["diameter_mm"]))
        for row in nodules
        if row["seriesuid"] == volume.series_instance_uid
    )
    return Case(name=name, volume=volume, known=known)


def _nrrd_case(image: Path) -> Case:
    voxels, header = nrrd.read(str(image))
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(header["space directions"])[::-1].T
    affine[:3, 3] = header["space origin"]
    name = image.name.removesuffix("_image.nrrd")
    volume = Volume(
        voxels=np.ascontiguousarray(voxels.transpose(2, 1, 0), dtype=np.float32), affine=affine,
        sop_instance_uids=tuple(f"{name}.{k}" for k in range(voxels.shape[2])), series_instance_uid=name, study_instance_uid=name,
        frame_of_reference_uid=name, modality="CT",
    )  # fmt: skip
    label = image.with_name(f"{name}_label.nrrd")
    known = (_known_from_mask(nrrd.read(str(label))[0].transpose(2, 1, 0) > 0, volume),) if label.exists() else ()
    return Case(name=name, volume=volume, known=known)


def _known_from_mask(mask: NDArray[np.bool_], volume: Volume) -> Known:
    inside = np.argwhere(mask)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    x, y, z = volume.to_lps(inside.mean(axis=0)).tolist()
    return Known(
        centre_lps_mm=(x, y, z),
        diameter_mm=float(2 * (len(inside) * volume.voxel_ml * 1000 * 3 / 4 / np.pi) ** (1 / 3)),
        truth=Segment(mask=mask[low[0] : high[0], low[1] : high[1], low[2] : high[2]], origin=(int(low[0]), int(low[1]), int(low[2]))),
    )
