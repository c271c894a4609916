"""The built-in studies with known truth: what the demo sends, and what a package check looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from dicomnode.findings import Volume
from dicomnode.phantoms.acquisition import Protocol, scan
from dicomnode.phantoms.anatomy import points_in_lung
from dicomnode.phantoms.chest import ChestScene, chest_scene
from dicomnode.phantoms.dicom import MR, SeriesHeader, uid_from, write_ct_series
from dicomnode.phantoms.film import CR, DX, WHITE, Film, write_film
from dicomnode.phantoms.head import CONTRASTS, acquire, head_scene, receive, render_head, signal
from dicomnode.phantoms.nodules import Nodule, sphere
from dicomnode.phantoms.opacities import opacity_in_lung, with_opacities
from dicomnode.phantoms.other_films import film_of
from dicomnode.phantoms.radiograph import Technique, View, dressed, expose, project
from dicomnode.phantoms.shapes import Floats, Grid

DEMO_PROTOCOL = Protocol(thickness_mm=3.0, blur_px=0.2, noise_hu=14.0, grain_px=0.7)

DEMO_TECHNIQUE = Technique(bone_per_cm=0.5, scatter=0.4, photons=100000.0, black_percent=1.0, white_percent=14.0, enhancement=0.6)


@dataclass(frozen=True, kw_only=True)
class TrueNodule:
    """A nodule that is there."""

    centre_lps_mm: tuple[float, float, float]
    volume_ml: float
    diameter_mm: float
    side: str  # "right" or "left"


@dataclass(frozen=True, kw_only=True)
class TrueStudy:
    """A written study and the truth about it."""

    folder: Path
    study_instance_uid: str
    series_instance_uid: str
    instances: int
    nodules: tuple[TrueNodule, ...]
    refused: bool  # no chest model may accept it


def true_nodule(nodule: Nodule) -> TrueNodule:
    """The truth about a nodule with a smooth surface."""
    return TrueNodule(
        centre_lps_mm=nodule.centre_lps_mm, volume_ml=nodule.volume_ml, diameter_mm=nodule.diameter_mm,
        side="right" if nodule.centre_lps_mm[0] < 0 else "left",
    )  # fmt: skip


def chest_grid(scene: ChestScene, *, pixel_mm: float, slice_mm: float, pixels: int, slices: int | None = None) -> Grid:
    """A grid over the whole chest of `scene`, from below the diaphragm domes to above the apices; or of so many slices in its middle."""
    low, high = scene.anatomy.bottom_z * 0.8, scene.anatomy.apex_z + 15
    count = int((high - low) / slice_mm) + 1
    if slices is not None:
        low += (count - slices) // 2 * slice_mm
        count = slices
    half = pixel_mm * (pixels - 1) / 2
    return Grid(origin_lps_mm=(-half, -half + 5, low), spacing_mm=(slice_mm, pixel_mm, pixel_mm), shape=(count, pixels, pixels))


def ball_in_lung(scene: ChestScene, *, diameter_mm: float, right: bool, seed: int) -> Nodule:
    """A smooth solid nodule wholly inside the lung of one side, clear of its border and of large vessels."""
    rng = np.random.default_rng([scene.seed, seed, 5])
    vessels = scene.anatomy.vessels
    wide = np.concatenate([vessels.starts[vessels.start_radii > 2.0], vessels.ends[vessels.start_radii > 2.0]])
    points = points_in_lung(scene.anatomy, rng, count=4000, depth_mm=(diameter_mm / 2 + 6, np.inf))
    middle = (scene.anatomy.bottom_z * 0.5 + scene.anatomy.apex_z) / 2
    points = points[(points[:, 0] < -45 if right else points[:, 0] > 45) & (np.abs(points[:, 2] - middle) < 60)]
    clearance, _ = cKDTree(wide).query(points)
    x, y, z = points[int(np.argmax(clearance))].round(1)
    return sphere((float(x), float(y), float(z)), diameter_mm)


def write_demo_studies(folder: Path) -> tuple[TrueStudy, ...]:
    """Write the demo's studies into folders of `folder`: for CT, MR and X-ray at least one that a model reads and one that none may.

    A chest CT with one nodule, one without, and one of a tilted gantry; a head in MR, one with a glioma before and after contrast
    agent, and a bottle in three MR images; a frontal chest film with opacities, and a leg whose header says CHEST. Takes about 25
    seconds on one core.
    """
    scene = chest_scene(102)
    nodule = ball_in_lung(scene, diameter_mm=18.0, right=True, seed=0)
    with_nodule = _write_chest(folder / "chest-nodule", scene.with_nodules((nodule,)), 1, slices=52)
    without = _write_chest(folder / "chest-clear", chest_scene(143), 2, slices=24)
    return (
        with_nodule, without, write_tilted_chest(folder / "chest-tilted"), write_mr_bottle(folder / "mr-three-images"),
        write_head(folder / "head-t1"), write_glioma(folder / "head-glioma"), write_chest_film(folder / "chest-film"),
        write_leg_film(folder / "leg-film"),
    )  # fmt: skip


def check_volume(*, modality: str = "CT", projection: bool = False, seed: int = 42, contrast: str = "") -> Volume:
    """What a package is run on for the first time: something of its modality that it might accept.

    CT: a small part of a chest with one nodule, 20 slices of 3 mm, 160 x 160. MR: a whole head with a glioma, 48 slices of 4 mm, 160 x 128;
    the contrasts (keys of `head.CONTRASTS`; "" is t1) of one seed share grid and frame of reference. A projection, or an X-ray
    modality: a frontal chest film with two opacities, white where much absorbs, spacing at the detector.
    """
    if projection or modality in ("CR", "DX", "RG", "MG", "XA", "RF", "IO", "PX"):
        return _check_film(modality if modality != "CT" else "DX", seed)
    if modality == "MR":
        return _check_head(seed, contrast or "t1")
    scene, grid = _around_a_nodule(seed, pixel_mm=2.2, pixels=160)
    return volume_of(scan(scene, grid, DEMO_PROTOCOL), grid, f"check {seed}")


def _check_film(modality: str, seed: int) -> Volume:
    pixels = np.round(WHITE * chest_film(seed, pixel_mm=1.5, step_mm=(3.0, 6.0, 3.0), opacities_mm=(40.0, 30.0))).astype(np.float32)
    affine = np.diag([1.0, 1.5, 1.5, 1.0])[[2, 1, 0, 3]]  # (k, r, c) to (x, y): columns run along x, rows along y
    name = f"check film {seed}"
    return Volume(
        voxels=pixels[None], affine=affine, sop_instance_uids=(uid_from(name, "2", "0"),), series_instance_uid=uid_from(name, "2"),
        study_instance_uid=uid_from(name, "study"), frame_of_reference_uid=None, modality=modality, calibration="detector",
    )  # fmt: skip


def _check_head(seed: int, contrast: str) -> Volume:
    grid = Grid(origin_lps_mm=(-101.6, -127.2, -104.0), spacing_mm=(4.0, 1.6, 1.6), shape=(48, 160, 128))
    name = f"check head {seed}"
    images = head_images(seed, grid.affine, grid.shape, (contrast,), thickness_mm=4.0, glioma_mm=45.0)
    volume = volume_of(images[contrast], grid, name)
    return replace(
        volume, modality="MR", series_instance_uid=uid_from(name, contrast),
        sop_instance_uids=tuple(uid_from(name, contrast, str(k)) for k in range(len(volume.voxels))),
    )  # fmt: skip


def chest_film(
    seed: int, *, pixel_mm: float, step_mm: tuple[float, float, float] = (2.0, 5.0, 2.0), opacities_mm: tuple[float, ...] = ()
) -> Floats:
    """An upright frontal chest film of `seed` with round opacities of these diameters, 0 black to 1 white, framed as a film is."""
    scene, rng = chest_scene(seed), np.random.default_rng([seed, 61])
    scene = replace(scene, anatomy=replace(scene.anatomy, hazes=()))
    shadow = dressed(project(scene, View(), pixel_mm=pixel_mm, step_mm=step_mm, bare=True), scene, View(), rng)
    for diameter in opacities_mm:
        opacity = opacity_in_lung(shadow, diameter, "round", rng)
        shadow = shadow if opacity is None else with_opacities(shadow, (opacity,))
    rows, columns = (np.flatnonzero((shadow.right | shadow.left).any(axis=axis)) for axis in (1, 0))
    margin = round(35 / pixel_mm)
    seen = tuple(slice(max(0, int(edge[0]) - margin), int(edge[-1]) + margin) for edge in (rows, columns))
    film = expose(shadow, DEMO_TECHNIQUE, rng)[seen]
    low, high = np.percentile(film, (0.5, 99.5))
    return np.asarray(np.clip((film - low) / (high - low), 0, 1), dtype=np.float32)


def head_images(
    seed: int,
    affine: NDArray[np.float64],
    shape: tuple[int, int, int],
    contrasts: Sequence[str],
    *,
    thickness_mm: float,
    lesion_mm: float = 0.0,
    glioma_mm: float = 0.0,
) -> dict[str, Floats]:
    """The head of `seed` in each contrast, in slices of any orientation: signal 0 to about 1000, rounded."""
    fine = Grid(origin_lps_mm=(-100.0, -126.0, -126.0), spacing_mm=(2.0, 2.0, 2.0), shape=(114, 124, 101))
    shares, _ = render_head(head_scene(seed, lesion_mm=lesion_mm, glioma_mm=glioma_mm), fine)
    images = {}
    for number, contrast in enumerate(contrasts):
        scanned = acquire(signal(shares, CONTRASTS[contrast]), fine, affine, shape, thickness_mm=thickness_mm)
        images[contrast] = np.round(1000 * receive(scanned, np.random.default_rng([seed, number, 62]), bias=0.1))
    return images


def write_check_study(folder: Path, seed: str) -> TrueStudy:
    """Write a small chest CT with one nodule whose UIDs follow from `seed`: 20 slices of 3 mm, 256 x 256."""
    scene, grid = _around_a_nodule(42, pixel_mm=1.45, pixels=256)
    header = SeriesHeader(
        seed=seed, patient_name="PHANTOM^SELF TEST", patient_id="PHANTOM-CHECK", accession_number="PHANTOM-CHECK",
        thickness_mm=DEMO_PROTOCOL.thickness_mm,
    )  # fmt: skip
    files = write_ct_series(folder, scan(scene, grid, DEMO_PROTOCOL), grid.affine, header)
    return TrueStudy(
        folder=folder, study_instance_uid=uid_from(seed, "study"), series_instance_uid=uid_from(seed, "2"), instances=len(files),
        nodules=tuple(true_nodule(nodule) for nodule in scene.nodules), refused=False,
    )  # fmt: skip


def _around_a_nodule(seed: int, *, pixel_mm: float, pixels: int) -> tuple[ChestScene, Grid]:
    """A chest with one nodule, and 20 slices of 3 mm around it."""
    scene = chest_scene(seed)
    nodule = ball_in_lung(scene, diameter_mm=18.0, right=True, seed=0)
    whole = chest_grid(scene, pixel_mm=pixel_mm, slice_mm=3.0, pixels=pixels)
    first = int((nodule.centre_lps_mm[2] - whole.origin_lps_mm[2]) / 3.0) - 10
    x, y, z = whole.origin_lps_mm
    grid = Grid(origin_lps_mm=(x, y, z + 3.0 * first), spacing_mm=whole.spacing_mm, shape=(20, pixels, pixels))
    return scene.with_nodules((nodule,)), grid


def volume_of(voxels: np.ndarray[tuple[int, ...], np.dtype[np.float32]], grid: Grid, seed: str) -> Volume:
    """A volume as if read from a series written with `seed`."""
    return Volume(
        voxels=voxels, affine=grid.affine, sop_instance_uids=tuple(uid_from(seed, "2", str(k)) for k in range(len(voxels))),
        series_instance_uid=uid_from(seed, "2"), study_instance_uid=uid_from(seed, "study"),
        frame_of_reference_uid=uid_from(seed, "frame of reference"), modality="CT",
    )  # fmt: skip


def _write_chest(folder: Path, scene: ChestScene, number: int, *, slices: int) -> TrueStudy:
    grid = chest_grid(scene, pixel_mm=1.2, slice_mm=3.0, pixels=320, slices=slices)
    header = SeriesHeader(
        seed=f"demo chest {number}", patient_name=f"PHANTOM^CHEST {number}", patient_id=f"PHANTOM-{number}",
        accession_number=f"PHANTOM-{number}", thickness_mm=DEMO_PROTOCOL.thickness_mm, descending=True,
    )  # fmt: skip
    files = write_ct_series(folder, scan(scene, grid, DEMO_PROTOCOL), grid.affine, header)
    return TrueStudy(
        folder=folder, study_instance_uid=uid_from(header.seed, "study"), series_instance_uid=uid_from(header.seed, "2"),
        instances=len(files), nodules=tuple(true_nodule(nodule) for nodule in scene.nodules), refused=False,
    )  # fmt: skip


def write_mr_bottle(folder: Path) -> TrueStudy:
    """Three MR images of a water bottle: nothing that a model of chest CT may look at."""
    grid = Grid(origin_lps_mm=(-63.5, -63.5, 0), spacing_mm=(6.0, 1.0, 1.0), shape=(3, 128, 128))
    _, y, x = grid.axes
    noise = np.random.default_rng(7).rayleigh(12.0, grid.shape)
    voxels = (np.where(np.hypot(x, y) < 45, 700.0, 0.0) + noise).astype(np.float32)
    header = SeriesHeader(
        seed="demo mr 3", patient_name="PHANTOM^BOTTLE 3", patient_id="PHANTOM-3", accession_number="PHANTOM-3",
        study_description="Synthetic bottle", series_description="Synthetic MR", body_part="HEAD", sop_class_uid=MR,
        thickness_mm=6.0, image_type=("ORIGINAL", "PRIMARY", "OTHER"),
    )  # fmt: skip
    files = write_ct_series(folder, voxels, grid.affine, header)
    return TrueStudy(
        folder=folder, study_instance_uid=uid_from(header.seed, "study"), series_instance_uid=uid_from(header.seed, "2"),
        instances=len(files), nodules=(), refused=True,
    )  # fmt: skip


def write_tilted_chest(folder: Path) -> TrueStudy:
    """Twelve CT slices of a chest from a gantry that was tilted by 20 degrees: no even stack."""
    scene = chest_scene(143)
    grid = chest_grid(scene, pixel_mm=2.8, slice_mm=6.0, pixels=128, slices=12)
    voxels = scan(scene, grid, replace(DEMO_PROTOCOL, thickness_mm=6.0))
    sheared = grid.affine.copy()
    sheared[1, 0] = -6.0 * np.tan(np.deg2rad(20.0))
    header = _header(4, "TILTED", "Synthetic chest", "Synthetic CT", tilt_degrees=20.0, thickness_mm=6.0)
    return _true_study(folder, header, write_ct_series(folder, voxels, sheared, header), refused=True)


def write_head(folder: Path) -> TrueStudy:
    """A head in MR, T1, in 30 oblique axial slices of 5 mm."""
    turn = np.deg2rad(8.0)  # about the axis between the ears
    affine = np.eye(4)
    affine[:3, 0] = 5.0 * np.array([0, -np.sin(turn), np.cos(turn)])
    affine[:3, 1] = 1.3 * np.array([0, np.cos(turn), np.sin(turn)])
    affine[:3, 2] = 1.3 * np.array([1, 0, 0])
    shape = (30, 184, 152)
    affine[:3, 3] = np.array([0, -2, -12]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    voxels = head_images(7, affine, shape, ("t1",), thickness_mm=5.0)["t1"]
    header = _header(
        5, "HEAD", "Synthetic head", "Synthetic T1", body_part="HEAD", sop_class_uid=MR, thickness_mm=5.0, contrast="t1",
        image_type=("ORIGINAL", "PRIMARY", "OTHER"),
    )  # fmt: skip
    return _true_study(folder, header, write_ct_series(folder, voxels, affine, header), refused=False)


def write_glioma(folder: Path) -> TrueStudy:
    """A head with a glioma: FLAIR in 44 axial slices of 4 mm, and T1 after contrast agent in 88 of 2 mm, in one frame of reference."""
    files: list[Path] = []
    header = _header(
        8, "GLIOMA", "Synthetic head", "FLAIR", body_part="HEAD", sop_class_uid=MR, image_type=("ORIGINAL", "PRIMARY", "OTHER")
    )
    for number, contrast, slices, thickness_mm in ((2, "flair", 44, 4.0), (3, "t1c", 88, 2.0)):
        grid = Grid(origin_lps_mm=(-96.0, -120.0, -92.0), spacing_mm=(thickness_mm, 1.6, 1.6), shape=(slices, 150, 120))
        voxels = head_images(9, grid.affine, grid.shape, (contrast,), thickness_mm=thickness_mm, glioma_mm=50.0)[contrast]
        series = replace(
            header, series_number=number, contrast=contrast, thickness_mm=thickness_mm, series_description=f"Synthetic {contrast.upper()}"
        )  # fmt: skip
        files += write_ct_series(folder, voxels, grid.affine, series)
    return _true_study(folder, header, files, refused=False)


def write_chest_film(folder: Path) -> TrueStudy:
    """A frontal chest film with opacities as a DX image, inverted (MONOCHROME1)."""
    pixels = chest_film(18, pixel_mm=1.0, step_mm=(2.5, 6.0, 2.5), opacities_mm=(42.0, 32.0, 26.0))
    film = Film(pixels=pixels, pixel_mm=1.0, photometric="MONOCHROME1")
    header = _header(6, "FILM", "Synthetic chest", "Synthetic DX", sop_class_uid=DX, image_type=("ORIGINAL", "PRIMARY", ""))
    return _true_study(folder, header, write_film(folder, film, header), refused=False)


def write_leg_film(folder: Path) -> TrueStudy:
    """A leg as a CR image whose header says that it is a chest."""
    pixels = expose(film_of("limb", np.random.default_rng(4)), DEMO_TECHNIQUE, np.random.default_rng(5))
    header = _header(7, "LEG", "Synthetic leg", "Synthetic CR", sop_class_uid=CR, image_type=("ORIGINAL", "PRIMARY", ""))
    return _true_study(folder, header, write_film(folder, Film(pixels=pixels, pixel_mm=2.0), header), refused=True)


def _header(number: int, name: str, study: str, series: str, **others: Any) -> SeriesHeader:
    return SeriesHeader(
        seed=f"demo {name.lower()} {number}", patient_name=f"PHANTOM^{name} {number}", patient_id=f"PHANTOM-{number}",
        accession_number=f"PHANTOM-{number}", study_description=study, series_description=series, **others,
    )  # fmt: skip


def _true_study(folder: Path, header: SeriesHeader, files: Sequence[Path], *, refused: bool) -> TrueStudy:
    return TrueStudy(
        folder=folder, study_instance_uid=uid_from(header.seed, "study"), series_instance_uid=uid_from(header.seed, "2"),
        instances=len(files), nodules=(), refused=refused,
    )  # fmt: skip
