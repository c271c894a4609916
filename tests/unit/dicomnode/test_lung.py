"""Where the lungs are: in phantoms, whose truth is known, and in parts of real chests."""

from pathlib import Path

import nrrd
import numpy as np
import pytest
from numpy.typing import NDArray

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import frames_of, read_headers
from dicomnode.analysis.lung import LEFT, RIGHT, lung_region, lung_with_dents
from dicomnode.analysis.select import SelectedSeries
from dicomnode.analysis.volume import read_volume
from dicomnode.phantoms.acquisition import Protocol, scan
from dicomnode.phantoms.chest import ChestScene, chest_scene, true_mask
from dicomnode.phantoms.nodules import sphere
from dicomnode.phantoms.shapes import Grid

SPACING = (4.0, 2.0, 2.0)
GRID = Grid(origin_lps_mm=(-200, -170, 30), spacing_mm=SPACING, shape=(16, 170, 200))
DATA = Path(__file__).parents[4] / "shared" / "data"

Mask = NDArray[np.bool_]
Found = tuple[ChestScene, NDArray[np.float32], Mask, NDArray[np.int8]]


@pytest.fixture(scope="module")
def found() -> Found:
    scene = chest_scene(12)
    _, y, _ = scene.anatomy.cage.centre
    at_the_wall = sphere((-scene.anatomy.cage.radii[0] + 11, y, 60.0), 20.0)
    scene = scene.with_nodules((at_the_wall,))
    hu = scan(scene, GRID, Protocol(thickness_mm=4.0, noise_hu=25.0))
    return scene, hu, *lung_region(hu, SPACING)


def test_the_region_holds_the_lungs_and_little_else(found: Found) -> None:
    scene, _, region, _ = found
    distance = scene.anatomy.lung_distance(GRID.axes)
    assert region[distance < -3].mean() > 0.99
    assert region[distance > 16].mean() < 0.01


def test_each_voxel_of_the_region_has_its_side(found: Found) -> None:
    _, _, region, side = found
    assert np.array_equal(side > 0, region)
    x = np.broadcast_to(GRID.axes[2], region.shape)
    assert np.mean(x[side == RIGHT] < 0) > 0.99
    assert np.mean(x[side == LEFT] > 0) > 0.99


def test_a_nodule_at_the_wall_is_in_the_region(found: Found) -> None:
    scene, _, region, _ = found
    truth = true_mask(scene, scene.nodules[0], GRID)
    assert truth is not None
    assert region[truth[1]][truth[0]].mean() > 0.9


def test_a_mass_that_leaves_a_dent_in_the_lung_lies_in_the_dent() -> None:
    scene = chest_scene(12)
    _, y, _ = scene.anatomy.cage.centre
    scene = scene.with_nodules((sphere((-scene.anatomy.cage.radii[0] + 20, y, 60.0), 45.0),))
    truth = true_mask(scene, scene.nodules[0], GRID)
    assert truth is not None
    mask, box = truth
    region, side, lung = lung_with_dents(scan(scene, GRID, Protocol(thickness_mm=4.0, noise_hu=25.0)), SPACING)
    assert lung[box][mask].mean() < 0.5
    assert region[box][mask].mean() > 0.8
    assert (side[box][mask & region[box]] == RIGHT).all()


def test_dents_are_added_to_the_lung_and_change_nothing_of_it(found: Found) -> None:
    scene, hu, region, side = found
    with_dents, sides, lung = lung_with_dents(hu, SPACING)
    assert np.array_equal(lung, region)
    assert with_dents[lung].all()
    assert np.array_equal(sides[lung], side[lung])
    assert np.array_equal(sides > 0, with_dents)
    distance = scene.anatomy.lung_distance(GRID.axes)
    assert with_dents[distance > 16].mean() < 0.03  # a part of heart and hilum
    assert not with_dents[distance > 45].any()


def test_finer_pixels_give_the_same_dents(found: Found) -> None:
    _, hu, _, _ = found
    coarse, _, _ = lung_with_dents(hu, SPACING)
    fine, sides, _ = lung_with_dents(hu.repeat(2, axis=1).repeat(2, axis=2)[:, :-1], (SPACING[0], SPACING[1] / 2, SPACING[2] / 2))
    assert fine.shape == sides.shape == (hu.shape[0], 2 * hu.shape[1] - 1, 2 * hu.shape[2])
    assert np.mean(fine[:, ::2, ::2] != coarse) < 0.003


def test_air_outside_the_body_is_no_lung(found: Found) -> None:
    _, hu, region, _ = found
    assert not region[:, :2].any()
    assert not region[:, :, :2].any()
    padded = np.full_like(hu, -2000)
    padded[:, 5:-5, 5:-5] = hu[:, 5:-5, 5:-5]
    assert np.array_equal(lung_region(padded, SPACING)[0], region)


def test_two_lungs_that_touch_are_parted() -> None:
    hu = np.full((12, 80, 120), 40, dtype=np.float32)
    hu[:, 20:60, 15:55] = -850
    hu[:, 20:60, 65:105] = -850
    hu[4:8, 30:34, 50:70] = -850  # a thin bridge
    region, side = lung_region(hu, (3.0, 2.0, 2.0))
    assert (side[:, 25:55, 15:50] == RIGHT).all()
    assert (side[:, 25:55, 70:105] == LEFT).all()
    assert region[:, 25:55, 15:50].all()


def test_one_lung_is_enough() -> None:
    hu = np.full((10, 80, 120), 40, dtype=np.float32)
    hu[:, 20:60, 70:105] = -800
    region, side = lung_region(hu, (3.0, 2.0, 2.0))
    assert set(np.unique(side)) == {0, LEFT}
    assert region.any()


@pytest.mark.parametrize("content", [40.0, -1000.0])
def test_without_lung_the_volume_is_not_eligible(content: float) -> None:
    hu = np.full((10, 60, 80), content, dtype=np.float32)
    hu[:, 0] = hu[:, -1] = -1000
    with pytest.raises(NotEligible) as refusal:
        lung_region(hu, SPACING)
    assert refusal.value.code == "no-lung"


def test_bowel_gas_is_no_lung() -> None:
    hu = np.full((10, 80, 120), 40, dtype=np.float32)
    hu[:, 20:60, 70:105] = -1000
    with pytest.raises(NotEligible):
        lung_region(hu, (3.0, 2.0, 2.0))


@pytest.mark.realdata
@pytest.mark.parametrize(("case", "slices"), [("LIDC-IDRI-0001", 16), ("LIDC-IDRI-0002", 12)])
def test_parts_of_real_chests_have_two_lungs(case: str, slices: int) -> None:
    folder = DATA / "ct_chest_lidc" / case
    if not folder.is_dir():
        pytest.skip(f"real images are not here: {folder}")
    headers = sorted(read_headers(sorted(folder.iterdir())), key=lambda entry: float(entry[1].ImagePositionPatient[2]))
    uid = str(headers[0][1].SeriesInstanceUID)
    series = SelectedSeries(input_name="image", series_instance_uid=uid, frames=tuple(frames_of(headers)), why="")
    volume = read_volume(series)
    region, side = lung_region(volume.voxels[:, ::2, ::2], (volume.spacing_mm[0], volume.spacing_mm[1] * 2, volume.spacing_mm[2] * 2))
    assert len(volume.voxels) == slices
    shares = [np.mean(side[region] == label) for label in (RIGHT, LEFT)]
    assert min(shares) > 0.35
    assert 0.1 < region.mean() < 0.5
    if case == "LIDC-IDRI-0001":
        index = np.linalg.inv(volume.affine) @ [56.2, 86.3, -115.9, 1]
        k, r, c = round(float(index[0])), round(float(index[1]) / 2), round(float(index[2]) / 2)
        assert side[k, r, c] == LEFT


@pytest.mark.realdata
def test_a_real_tumour_lies_in_the_region() -> None:
    image = DATA / "ct_lung_tumour" / "lung1_image.nrrd"
    if not image.is_file():
        pytest.skip(f"real images are not here: {image}")
    hu = nrrd.read(str(image))[0].transpose(2, 1, 0)[:, ::3, ::3].astype(np.float32)
    tumour = nrrd.read(str(image.with_name("lung1_label.nrrd")))[0].transpose(2, 1, 0)[:, ::3, ::3] > 0
    region, side = lung_region(hu, (5.0, 1.71, 1.71))
    assert region[tumour].mean() > 0.95
    assert (side[tumour & region] == RIGHT).all()
