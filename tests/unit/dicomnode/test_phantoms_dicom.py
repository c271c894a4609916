"""Phantom studies as files: valid, in place, and the same each time."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode.phantoms.chest import ChestScene, chest_scene, true_mask
from dicomnode.phantoms.dicom import MR, SeriesHeader, uid_from, write_ct_series
from dicomnode.phantoms.shapes import Grid
from dicomnode.phantoms.studies import ball_in_lung, check_volume, chest_grid, true_nodule, write_mr_bottle

GRID = Grid(origin_lps_mm=(-12.5, -10.0, 31.25), spacing_mm=(2.5, 0.75, 0.8), shape=(6, 12, 16))
VOXELS = np.random.default_rng(0).integers(-1000, 1200, GRID.shape).astype(np.float32)


def dciodvfy() -> str:
    found = shutil.which("dciodvfy", path=str(Path(sys.executable).parent)) or shutil.which("dciodvfy")
    if found is None:
        pytest.skip("dciodvfy is not installed")
    return found


def test_a_written_series_reads_back_where_it_was(tmp_path: Path) -> None:
    files = write_ct_series(tmp_path, VOXELS, GRID.affine, SeriesHeader(seed="a", descending=True))
    assert len(files) == 6
    for k, file in enumerate(files):
        image = pydicom.dcmread(file)
        assert image.InstanceNumber == 6 - k
        assert [float(v) for v in image.ImagePositionPatient] == pytest.approx(GRID.affine[:3, 3] + k * GRID.affine[:3, 0])
        assert [float(v) for v in image.PixelSpacing] == [0.75, 0.8]
        hu = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        assert np.array_equal(hu, VOXELS[k])


def test_uids_follow_from_the_seed(tmp_path: Path) -> None:
    first, again, other = (
        write_ct_series(tmp_path / name, VOXELS, GRID.affine, SeriesHeader(seed=seed))
        for name, seed in (("1", "a"), ("2", "a"), ("3", "b"))
    )
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in again]
    uids = [{pydicom.dcmread(f).SOPInstanceUID for f in files} for files in (first, other)]
    assert not uids[0] & uids[1]
    assert pydicom.dcmread(first[0]).StudyInstanceUID == uid_from("a", "study")
    assert pydicom.uid.UID(uid_from("a")).is_valid


def test_slices_can_be_left_out(tmp_path: Path) -> None:
    files = write_ct_series(tmp_path, VOXELS, GRID.affine, SeriesHeader(seed="a", skip=(2, 3)))
    assert len(files) == 4


def test_written_images_are_valid(tmp_path: Path) -> None:
    program = dciodvfy()
    ct = write_ct_series(tmp_path / "ct", VOXELS, GRID.affine, SeriesHeader(seed="a"))
    mr = write_ct_series(
        tmp_path / "mr", VOXELS, GRID.affine,
        SeriesHeader(seed="b", sop_class_uid=MR, body_part="HEAD", image_type=("ORIGINAL", "PRIMARY", "OTHER")),
    )  # fmt: skip
    for file in (ct[0], mr[-1]):
        answer = subprocess.run([program, "-new", str(file)], capture_output=True, text=True, check=False)
        said = answer.stdout + answer.stderr
        assert "Error" not in said, said
        assert "Image" in said


def test_the_mr_of_the_demo_is_an_mr_of_three_images(tmp_path: Path) -> None:
    study = write_mr_bottle(tmp_path)
    images = [pydicom.dcmread(file) for file in study.folder.iterdir()]
    assert {image.Modality for image in images} == {"MR"}
    assert len(images) == study.instances == 3
    assert study.refused


def test_the_volume_of_a_package_check_shows_a_nodule_in_its_middle() -> None:
    volume = check_volume()
    scene = chest_scene(42)
    ball = ball_in_lung(scene, diameter_mm=18.0, right=True, seed=0)
    index = np.linalg.inv(volume.affine) @ [*ball.centre_lps_mm, 1]
    k, r, c = (round(float(i)) for i in index[:3])
    assert 8 <= k <= 12
    assert float(volume.voxels[k, r - 1 : r + 2, c - 1 : c + 2].mean()) == pytest.approx(ball.hu, abs=25)
    assert volume.spacing_mm == pytest.approx((3.0, 2.2, 2.2))


@pytest.fixture(scope="module")
def scene() -> ChestScene:
    return chest_scene(102)


@pytest.mark.parametrize("right", [True, False])
def test_a_ball_lies_in_the_lung_of_its_side(scene: ChestScene, right: bool) -> None:
    ball = ball_in_lung(scene, diameter_mm=18.0, right=right, seed=0)
    assert true_nodule(ball).side == ("right" if right else "left")
    grid = chest_grid(scene, pixel_mm=1.2, slice_mm=3.0, pixels=320)
    found = true_mask(scene, ball, grid)
    assert found is not None
    assert np.count_nonzero(found[0]) * grid.voxel_ml == pytest.approx(ball.volume_ml, rel=0.03)
