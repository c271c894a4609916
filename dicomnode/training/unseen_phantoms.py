"""Phantoms of which the truth is known, drawn from seeds that training never uses: chests in CT, chest films, heads in MR, gliomas.

Each third case holds nothing to find, or is nothing of the kind; of films with opacities each second one is
clear, of the same chest as the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dicomnode.analysis.manifest import Manifest
from dicomnode.errors import UsageError
from dicomnode.findings import Segment, Volume
from dicomnode.phantoms.acquisition import random_protocol, scan
from dicomnode.phantoms.chest import ChestScene, chest_scene, scatter_nodules, true_mask
from dicomnode.phantoms.dicom import uid_from
from dicomnode.phantoms.head import CONTRASTS, GLIOMA, acquire, head_scene, receive, render_head, signal
from dicomnode.phantoms.opacities import scatter_opacities, with_opacities
from dicomnode.phantoms.other_films import KINDS, film_of
from dicomnode.phantoms.radiograph import expose, project, random_technique, random_view
from dicomnode.phantoms.shapes import Floats, Grid
from dicomnode.phantoms.studies import chest_grid, volume_of
from dicomnode.training.cases import Case, Mask, case_from_masks, known_lesion
from dicomnode.training.films import framed
from dicomnode.training.opacities import Standing, any_technique, standing, upright

VALIDATION_SEED, TEST_SEED = 3_000_000_000, 3_100_000_000  # training draws its phantoms below 2**31
SIZES_MM = ((5.0, 7.0), (7.0, 10.0), (10.0, 15.0), (15.0, 25.0), (25.0, 40.0), (40.0, 60.0))  # nodules are spread over these
NODULES_PER_SCAN = 12
EVERY_OTHER = 3

Draw = Callable[[int, int], Case]  # seed, number of the case
LUNG_FIELDS = {"Right lung field", "Left lung field"}


def unseen_phantoms(manifest: Manifest, *, first_seed: int, scans: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """So many phantoms for what the package looks for, as `cases.real_cases` gives real ones.

    Raises:
        UsageError: there are no phantoms of it.
    """
    draw = _drawing(manifest)
    for number in range(scans):
        yield f"phantom {first_seed + number}", lambda number=number: draw(first_seed + number, number)  # type: ignore[misc]  # a default binds it


def _drawing(manifest: Manifest) -> Draw:
    """Which phantoms fit: by the region of the first input and the labels of the outputs."""
    accepts, labels = manifest.inputs[0], {output.label for output in manifest.outputs}
    if accepts.region == "lung" and "CT" in accepts.modalities:
        label, name = manifest.outputs[0].label, accepts.name
        return lambda seed, number: chest_case(seed, nodules=0 if _is_other(number) else NODULES_PER_SCAN, label=label, name=name)
    if labels == {"Lung opacity"} and accepts.dimensions == 2:
        return lambda seed, number: opacity_case(seed - number % 2, clear=number % 2 == 1, name=accepts.name)
    if labels >= LUNG_FIELDS and accepts.dimensions == 2:
        return lambda seed, number: film_case(seed, other=_is_other(number), name=accepts.name)
    if labels == {"Brain"}:
        return lambda seed, number: head_case(seed, other=_is_other(number), name=accepts.name)
    if labels == {"Glioma", "Enhancing core"}:
        return lambda seed, number: glioma_case(seed, other=_is_other(number), manifest=manifest)
    raise UsageError(f"there are no phantoms of what the package {manifest.name} looks for; give a data set or a folder of cases")


def _is_other(number: int) -> bool:
    return number % EVERY_OTHER == EVERY_OTHER - 1


def chest_case(seed: int, *, nodules: int, label: str = "Lung nodule", name: str = "image") -> Case:
    """A whole synthetic chest, scanned with a random protocol, with about so many nodules spread over SIZES_MM."""
    rng = np.random.default_rng([seed, 21])
    bins = [SIZES_MM[i % len(SIZES_MM)] for i in range(nodules)]
    diameters = np.array([np.exp(rng.uniform(np.log(low), np.log(high))) for low, high in bins])
    scene = scatter_nodules(chest_scene(seed), rng, np.sort(diameters)[::-1])
    protocol = random_protocol(rng)
    grid = chest_grid(scene, pixel_mm=1.2, slice_mm=max(1.5, round(protocol.thickness_mm, 2)), pixels=320)
    volume = volume_of(scan(scene, grid, protocol), grid, f"phantom {seed}")
    segments = dict(_nodules(scene, grid))
    noise = "above 25 HU" if protocol.noise_hu > 25 else "up to 25 HU"
    truth = np.zeros(volume.voxels.shape, dtype=np.bool_)
    for segment in segments.values():
        truth[tuple(slice(o, o + n) for o, n in zip(segment.origin, segment.mask.shape, strict=True))] |= segment.mask
    return Case(
        name=f"phantom {seed}", volumes={name: volume}, truth={label: truth}, positive={label: bool(segments)},
        known=tuple(known_lesion(segment, volume, label, scene.nodules[i].diameter_mm) for i, segment in segments.items()),
        attributes={"slice_thickness_mm": f"{protocol.thickness_mm:.2f}", "noise": noise},
    )  # fmt: skip


def film_case(seed: int, *, other: bool, name: str = "image") -> Case:
    """A film of a random chest with its lung fields, or with `other` of something else, whose truth is empty."""
    rng = np.random.default_rng([seed, 81])
    kind = str(rng.choice(list(KINDS))) if other else "chest"
    shadow = film_of(kind, rng) if other else framed(project(chest_scene(seed), random_view(rng), pixel_mm=1.6), rng)
    film = np.round(4095 * expose(shadow, random_technique(rng), rng))
    affine = np.diag([1.0, shadow.plane.pixel_mm, shadow.plane.pixel_mm, 1.0])[[2, 1, 0, 3]]
    truth = {} if other else {"Right lung field": shadow.right[None], "Left lung field": shadow.left[None]}
    volume = _volume(film[None], affine, f"film {seed}", "DX")
    return _structures(f"film {seed}", {name: volume}, truth, {"film": kind})


def opacity_case(seed: int, *, clear: bool, name: str = "image") -> Case:
    """A film of a random chest with one to six masses in the lung fields, all of them seen (`phantoms.opacities`), or a `clear` one.

    Both films of a seed are of one chest from one side, with other ribs, arms, framing and technique.
    """
    rng = np.random.default_rng([seed, 85, int(clear)])
    shadow = framed(upright(_chest_before_the_detector(seed), rng), rng)
    opacities = () if clear else scatter_opacities(shadow, rng)
    film = np.round(4095 * expose(with_opacities(shadow, opacities), any_technique(rng), rng))
    affine = np.diag([1.0, shadow.plane.pixel_mm, shadow.plane.pixel_mm, 1.0])[[2, 1, 0, 3]]
    volume = _volume(film[None], affine, f"film {seed} {clear}", "DX")
    segments = [Segment(mask=o.body[None], origin=(0, o.box[0].start, o.box[1].start)) for o in opacities]
    known = tuple(
        known_lesion(segment, volume, "Lung opacity", opacity.diameter_mm) for segment, opacity in zip(segments, opacities, strict=True)
    )
    several = "none" if clear else "one or two" if len(opacities) < 3 else "three to six"
    return Case(
        name=f"film {seed}{' clear' if clear else ''}", volumes={name: volume}, known=known, positive={"Lung opacity": bool(known)},
        attributes={"opacities": several}, patient=f"chest {seed}",
    )  # fmt: skip


@lru_cache(maxsize=1)
def _chest_before_the_detector(seed: int) -> Standing:
    # other chests than those that smaller opacities were first measured on
    return standing(seed + 1_000_000_000, np.random.default_rng([seed, 86]))


def head_case(seed: int, *, other: bool, name: str = "image") -> Case:
    """A random head in a usual contrast and slices of 1 to 6 mm, or with `other` the body of a chest, whose truth is empty."""
    rng = np.random.default_rng([seed, 82])
    fine = Grid(origin_lps_mm=(-100.0, -126.0, -116.0), spacing_mm=(2.5, 2.5, 2.5), shape=(88, 100, 81))
    thick = float(rng.uniform(1.5, 6.0))
    grid = Grid(origin_lps_mm=(-96.0, -120.0, -100.0), spacing_mm=(thick, 1.5, 1.5), shape=(int(185 / thick), 160, 128))
    shares, brain = render_head(head_scene(seed, lesion_mm=float(rng.uniform(0, 40))), fine)
    contrast = str(rng.choice(list(CONTRASTS)))
    if other:
        _, y, x = fine.axes
        body = np.hypot(x / 90, y / 70) < 1
        image = np.asarray(body * rng.uniform(0.3, 1) * np.ones(fine.shape), dtype=np.float32)
    else:
        image = signal(shares, CONTRASTS[contrast])
    scanned = receive(acquire(image, fine, grid.affine, grid.shape, thickness_mm=thick), rng, noise=float(rng.uniform(0.01, 0.05)))
    truth = {} if other else {"Brain": acquire(brain, fine, grid.affine, grid.shape, thickness_mm=thick) > 0.5}
    volume = _volume(np.round(1000 * scanned), grid.affine, f"head {seed}", "MR")
    attributes = {"slice_thickness_mm": f"{thick:.2f}", "contrast": "no head" if other else contrast}
    return _structures(f"head {seed}", {name: volume}, truth, attributes)


def glioma_case(seed: int, *, other: bool, manifest: Manifest) -> Case:
    """A head on FLAIR and T1c in slices of 1.5 to 6 mm, with a glioma of 25 to 75 mm, or with `other` none; each has look-alikes."""
    rng = np.random.default_rng([seed, 83])
    fine = Grid(origin_lps_mm=(-100.0, -126.0, -116.0), spacing_mm=(2.0, 2.0, 2.0), shape=(110, 125, 101))
    thick = float(rng.uniform(1.5, 6.0))
    grid = Grid(origin_lps_mm=(-96.0, -120.0, -100.0), spacing_mm=(thick, 1.5, 1.5), shape=(int(185 / thick), 160, 128))
    shares, _ = render_head(head_scene(seed, glioma_mm=0.0 if other else float(rng.uniform(25, 75)), lookalikes=True), fine)
    volumes = {}
    for contrast in ("flair", "t1c"):
        image = acquire(signal(shares, CONTRASTS[contrast]), fine, grid.affine, grid.shape, thickness_mm=thick)
        voxels = np.round(1000 * receive(image, rng, noise=float(rng.uniform(0.01, 0.04))))
        volumes[contrast] = replace(
            _volume(voxels, grid.affine, f"glioma {seed}", "MR"), series_instance_uid=uid_from(f"glioma {seed}", contrast)
        )  # fmt: skip
    nothing = np.zeros(fine.shape, dtype=np.float32)
    whole, rim = sum((shares.get(tissue, nothing) for tissue in GLIOMA), nothing), shares.get("rim", nothing)
    truth = {
        label: acquire(share, fine, grid.affine, grid.shape, thickness_mm=thick) > 0.5
        for label, share in (("Glioma", whole), ("Enhancing core", rim))
    }
    attributes = {"slice_thickness_mm": f"{thick:.2f}", "glioma": "no" if other else "yes"}
    return case_from_masks(f"head {seed}", volumes, truth, manifest, attributes=attributes)


def _structures(name: str, volumes: dict[str, Volume], truth: dict[str, Mask], attributes: dict[str, str]) -> Case:
    return Case(name=name, volumes=volumes, truth=truth, attributes=attributes, of_its_kind=bool(truth))


def _nodules(scene: ChestScene, grid: Grid) -> Iterator[tuple[int, Segment]]:
    for number, nodule in enumerate(scene.nodules):
        found = true_mask(scene, nodule, grid)
        if found is not None and found[0].any():
            yield number, Segment(mask=found[0], origin=(found[1][0].start, found[1][1].start, found[1][2].start))


def _volume(voxels: Floats, affine: NDArray[np.float64], name: str, modality: str) -> Volume:
    uids = tuple(uid_from(name, str(k)) for k in range(len(voxels)))
    return Volume(
        voxels=np.asarray(voxels, dtype=np.float32), affine=affine, sop_instance_uids=uids, series_instance_uid=uid_from(name),
        study_instance_uid=uid_from(name, "study"), frame_of_reference_uid=uid_from(name, "frame") if modality == "MR" else None,
        modality=modality, calibration="patient" if modality == "MR" else "detector",
    )  # fmt: skip
