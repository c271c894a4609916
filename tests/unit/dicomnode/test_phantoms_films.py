"""Projected chests, films of other things, and heads: their truth, and what is written of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode.phantoms.chest import chest_scene
from dicomnode.phantoms.dicom import MR, SEQUENCES, SeriesHeader, write_ct_series
from dicomnode.phantoms.film import CR, DX, Film, write_film
from dicomnode.phantoms.head import CONTRASTS, acquire, head_scene, render_head, signal
from dicomnode.phantoms.other_films import KINDS, film_of
from dicomnode.phantoms.radiograph import Technique, View, expose, project, project_sideways
from dicomnode.phantoms.shadows import Plane, Shadow, capsule, ellipsoid
from dicomnode.phantoms.shapes import Grid
from dicomnode.phantoms.studies import check_volume

PLANE = Plane(left_mm=-60.0, top_mm=60.0, pixel_mm=1.0, shape=(121, 121))
HEAD = Grid(origin_lps_mm=(-96.0, -120.0, -120.0), spacing_mm=(4.0, 4.0, 4.0), shape=(56, 60, 49))


@pytest.fixture(scope="module")
def shadow() -> Shadow:
    return project(chest_scene(5), View(), pixel_mm=3.0, step_mm=(5.0, 8.0, 5.0))


def test_path_lengths_add_up_to_the_body(shadow: Shadow) -> None:
    ball = ellipsoid(PLANE, (5.0, -3.0), (30.0, 30.0, 30.0))
    assert float(ball.sum()) == pytest.approx(4 / 3 * np.pi * 30**3, rel=0.01)
    assert float(ball[63, 65]) == pytest.approx(60.0)  # z -3 is row 63, x 5 is column 65
    rod = capsule(PLANE, (0.0, 200.0), (0.0, -200.0), (20.0, 20.0))
    assert float(rod.sum()) == pytest.approx(np.pi * 20**2 * 121, rel=0.01)
    assert float(shadow.soft_cm.max()) < 60


def test_a_projected_chest_has_two_dark_lung_fields_on_their_sides(shadow: Shadow) -> None:
    assert not (shadow.right & shadow.left).any()
    columns = [np.argwhere(side)[:, 1].mean() for side in (shadow.right, shadow.left)]
    assert columns[0] < columns[1]  # the patient's right is at the film's left
    assert shadow.right.sum() > shadow.left.sum()  # the heart hides some of the left one
    for side in (shadow.right, shadow.left):
        assert 80 < float(side.sum()) * 0.09 < 350  # cm2
    film = expose(shadow, Technique(photons=1e6), np.random.default_rng(0))
    lungs = shadow.right | shadow.left
    body = (shadow.soft_cm > 12) & ~lungs
    assert float(np.median(film[lungs])) < float(np.median(film[body])) - 0.1


def test_what_is_no_frontal_chest_has_no_lung_fields() -> None:
    for kind in KINDS:
        other = film_of(kind, np.random.default_rng(1))
        assert not (other.right | other.left).any(), kind
        assert np.isfinite(other.soft_cm).all(), kind
        assert float(other.soft_cm.max()) > 0, kind
    lateral = project_sideways(chest_scene(5))
    assert not (lateral.right | lateral.left).any()


@pytest.mark.parametrize(("sop_class", "photometric"), [(DX, "MONOCHROME2"), (DX, "MONOCHROME1"), (CR, "MONOCHROME1")])
def test_a_written_film_is_valid_and_shows_the_same(sop_class: str, photometric: str, tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 24 * 20, dtype=np.float32).reshape(24, 20)
    film = Film(pixels=pixels, pixel_mm=0.8, photometric=photometric)  # type: ignore[arg-type]  # one of the two Literals
    (file,) = write_film(tmp_path, film, SeriesHeader(seed="f", sop_class_uid=sop_class, image_type=("ORIGINAL", "PRIMARY", "")))
    image = pydicom.dcmread(file)
    stored = image.pixel_array / 4095
    assert np.allclose(1 - stored if photometric == "MONOCHROME1" else stored, pixels, atol=1e-3)
    assert [float(v) for v in image.ImagerPixelSpacing] == [0.8, 0.8]
    assert "PixelSpacing" not in image
    program = shutil.which("dciodvfy", path=str(Path(sys.executable).parent)) or shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy is not installed")
    answer = subprocess.run([program, "-new", str(file)], capture_output=True, text=True, check=False)
    assert "Error" not in answer.stdout + answer.stderr, answer.stdout + answer.stderr


def test_each_contrast_is_written_with_the_times_that_make_it(tmp_path: Path) -> None:
    voxels = np.zeros((2, 8, 8), dtype=np.float32)
    for contrast in CONTRASTS:
        header = SeriesHeader(
            seed=contrast, sop_class_uid=MR, contrast=contrast, body_part="HEAD", image_type=("ORIGINAL", "PRIMARY", "OTHER")
        )
        image = pydicom.dcmread(write_ct_series(tmp_path / contrast, voxels, HEAD.affine, header)[0])
        assert float(image.EchoTime) == SEQUENCES[contrast].echo_ms
        assert ("InversionTime" in image) == (contrast == "flair")
        assert ("ContrastBolusAgent" in image) == (contrast == "t1c")


def test_a_head_holds_a_brain_of_plausible_size_and_its_tissues_fill_each_voxel() -> None:
    for seed in range(2):
        shares, brain = render_head(head_scene(seed, lesion_mm=20.0), HEAD)
        assert 1000 < float(brain.sum()) * HEAD.voxel_ml < 1900
        total = sum(shares.values())
        assert float(np.abs(np.asarray(total) - 1).max()) < 1e-3
        assert float(shares["lesion"].sum()) * HEAD.voxel_ml == pytest.approx(4.19, rel=0.25)


def test_a_scan_across_the_grid_sees_the_same_head() -> None:
    shares, _ = render_head(head_scene(3), HEAD)
    image = signal(shares, CONTRASTS["t1"])
    sagittal = np.array([[6.0, 0, 0, -90.0], [0, 0, 4.0, -118.0], [0, -4.0, 0, 98.0], [0, 0, 0, 1]])
    scanned = acquire(image, HEAD, sagittal, (31, 54, 59), thickness_mm=6.0)
    assert float(scanned.sum()) * 6 * 16 == pytest.approx(float(image.sum()) * 64, rel=0.03)
    middle = HEAD.affine @ [30, 30, 24, 1]
    k, r, c = np.round(np.linalg.inv(sagittal) @ middle).astype(int)[:3]
    assert float(scanned[k, r, c]) == pytest.approx(float(image[30, 30, 23:26].mean()), abs=0.15)


def test_the_volumes_of_a_check_share_a_grid_and_say_what_they_are() -> None:
    t1, flair = check_volume(modality="MR"), check_volume(modality="MR", contrast="flair")
    assert np.array_equal(t1.affine, flair.affine)
    assert t1.frame_of_reference_uid == flair.frame_of_reference_uid
    assert t1.series_instance_uid != flair.series_instance_uid
    film = check_volume(projection=True)
    assert film.is_projection
    assert film.calibration == "detector"
    assert film.voxels.shape[0] == 1
    assert film.affine[:3, 2].tolist() == [1.5, 0.0, 0.0]
