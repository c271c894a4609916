"""Measure a package that outlines an organ: on films and heads from phantoms it never saw, compared with their truth.

Runs the package exactly as the node does, its gate included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.inference import Model
from dicomnode.analysis.manifest import Manifest
from dicomnode.findings import Findings, Volume
from dicomnode.phantoms.chest import chest_scene
from dicomnode.phantoms.dicom import uid_from
from dicomnode.phantoms.head import CONTRASTS, acquire, head_scene, receive, render_head, signal
from dicomnode.phantoms.other_films import KINDS, film_of
from dicomnode.phantoms.radiograph import expose, project, random_technique, random_view
from dicomnode.phantoms.shapes import Floats, Grid
from dicomnode.training.films import framed

Mask = NDArray[np.bool_]
Truth = Mapping[str, Mask]  # label of an output -> (slices, rows, columns)
EVERY_OTHER = 3  # each third case holds nothing of the kind


def outlines_organs(manifest: Manifest) -> bool:
    """Whether the package outlines what these phantoms have: lung fields on projections, or the brain in MR."""
    return manifest.kind == "segmentation" and manifest.inputs[0].region in ("chest-radiograph", "head")


def measure_structures(model: Model, *, first_seed: int, scans: int) -> dict[str, Any]:
    """Dice and the error of the size for each output, what was refused wrongly, and what was accepted wrongly."""
    manifest = model.manifest
    case = film_case if manifest.inputs[0].dimensions == 2 else head_case
    dices: dict[str, list[float]] = {output.label: [] for output in manifest.outputs}
    errors: dict[str, list[float]] = {output.label: [] for output in manifest.outputs}
    others = refused = accepted = 0
    for number in track(range(scans), description="phantoms"):
        volume, truth = case(first_seed + number, other=number % EVERY_OTHER == EVERY_OTHER - 1)
        others += not truth
        try:
            findings = model({manifest.inputs[0].name: volume})
        except NotEligible:
            refused += bool(truth)
            continue
        accepted += not truth
        for label, mask in truth.items():
            found = mask_of(findings, label, volume)
            dices[label].append(float(2 * (found & mask).sum() / max(1, int(found.sum()) + int(mask.sum()))))
            errors[label].append(100 * (float(found.sum()) / float(mask.sum()) - 1))
    return {
        "first_seed": first_seed, "scans": scans, "others": others, "wrongly_refused": refused, "wrongly_accepted": accepted,
        "structures": [
            {
                "label": label, "median_dice": round(float(np.median(dices[label])), 3), "lowest_dice": round(min(dices[label]), 3),
                "median_size_error_percent": round(float(np.median(errors[label])), 1),
            }
            for label in dices if dices[label]
        ],
    }  # fmt: skip


def mask_of(findings: Findings, label: str, volume: Volume) -> Mask:
    """All findings of one label as a mask of the volume."""
    mask = np.zeros(volume.voxels.shape, dtype=np.bool_)
    for finding in findings.findings:
        if finding.label == label:
            box = tuple(slice(o, o + n) for o, n in zip(finding.segment.origin, finding.segment.mask.shape, strict=True))
            mask[box] |= finding.segment.mask
    return mask


def film_case(seed: int, *, other: bool) -> tuple[Volume, Truth]:
    """A film of a random chest, or with `other` of something else, whose truth is empty."""
    rng = np.random.default_rng([seed, 81])
    if other:
        shadow = film_of(str(rng.choice(list(KINDS))), rng)
    else:
        shadow = framed(project(chest_scene(seed), random_view(rng), pixel_mm=1.6), rng)
    film = np.round(4095 * expose(shadow, random_technique(rng), rng))
    affine = np.diag([1.0, shadow.plane.pixel_mm, shadow.plane.pixel_mm, 1.0])[[2, 1, 0, 3]]
    truth = {} if other else {"Right lung field": shadow.right[None], "Left lung field": shadow.left[None]}
    return _volume(film[None], affine, f"film {seed}", "DX"), truth


def head_case(seed: int, *, other: bool) -> tuple[Volume, Truth]:
    """A random head in a usual contrast and slices of 1 to 6 mm, or with `other` the body of a chest, whose truth is empty."""
    rng = np.random.default_rng([seed, 82])
    fine = Grid(origin_lps_mm=(-100.0, -126.0, -116.0), spacing_mm=(2.5, 2.5, 2.5), shape=(88, 100, 81))
    thick = float(rng.uniform(1.5, 6.0))
    grid = Grid(origin_lps_mm=(-96.0, -120.0, -100.0), spacing_mm=(thick, 1.5, 1.5), shape=(int(185 / thick), 160, 128))
    shares, brain = render_head(head_scene(seed, lesion_mm=float(rng.uniform(0, 40))), fine)
    contrast = CONTRASTS[str(rng.choice(list(CONTRASTS)))]
    if other:
        _, y, x = fine.axes
        body = np.hypot(x / 90, y / 70) < 1
        image = np.asarray(body * rng.uniform(0.3, 1) * np.ones(fine.shape), dtype=np.float32)
    else:
        image = signal(shares, contrast)
    scanned = receive(acquire(image, fine, grid.affine, grid.shape, thickness_mm=thick), rng, noise=float(rng.uniform(0.01, 0.05)))
    truth = {} if other else {"Brain": acquire(brain, fine, grid.affine, grid.shape, thickness_mm=thick) > 0.5}
    return _volume(np.round(1000 * scanned), grid.affine, f"head {seed}", "MR"), truth


def _volume(voxels: Floats, affine: NDArray[np.float64], name: str, modality: str) -> Volume:
    uids = tuple(uid_from(name, str(k)) for k in range(len(voxels)))
    return Volume(
        voxels=np.asarray(voxels, dtype=np.float32), affine=affine, sop_instance_uids=uids, series_instance_uid=uid_from(name),
        study_instance_uid=uid_from(name, "study"), frame_of_reference_uid=uid_from(name, "frame") if modality == "MR" else None,
        modality=modality, calibration="patient" if modality == "MR" else "detector",
    )  # fmt: skip
