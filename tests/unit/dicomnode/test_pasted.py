"""Nodules pasted into a scan: as large as they were drawn, where there is lung, and as noisy as their surroundings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dicomnode.errors import UsageError
from dicomnode.findings import Volume
from dicomnode.phantoms.acquisition import Protocol, scan
from dicomnode.phantoms.chest import chest_scene
from dicomnode.phantoms.nodules import sphere
from dicomnode.phantoms.shapes import Grid
from dicomnode.phantoms.studies import volume_of
from dicomnode.training.cases import Case, Known
from dicomnode.training.evaluate import evaluate
from dicomnode.training.evaluation.matching import SMALLEST_MM
from dicomnode.training.pasted import lung_of, noise_of, paste, pasted_cases

PACKAGE = Path(__file__).parents[3] / "dicomnode" / "packages" / "lung-nodule-ct"
GRID = Grid(origin_lps_mm=(-180.0, -150.0, 60.0), spacing_mm=(3.0, 1.5, 1.5), shape=(24, 200, 240))
NOISE = 20.0


@pytest.fixture(scope="module")
def chest() -> Volume:
    """A part of a chest of 72 mm, as if it were a patient's."""
    return volume_of(scan(chest_scene(12), GRID, Protocol(thickness_mm=3.0, noise_hu=NOISE, blur_px=0.3)), GRID, "pasted")


@pytest.fixture(scope="module")
def drawn(chest: Volume) -> list[Case]:
    own = Known(label="x", centre_lps_mm=(-80.0, 0.0, 90.0), diameter_mm=20.0)
    case = Case(name="chest", volumes={"image": chest}, known=(own,), complete=False)
    return [read() for _, read in pasted_cases([("chest", lambda: case)], count=3)]


def deep_in_the_lung(chest: Volume) -> NDArray[np.float64]:
    places = lung_of(chest).places["free"]
    middle = places[np.abs(places[:, 2] - 95) < 6]
    return np.asarray(middle[middle[:, 3].argmax(), :3])


def test_a_ball_in_the_lung_has_the_volume_and_density_it_was_given(chest: Volume) -> None:
    centre = deep_in_the_lung(chest)
    voxels = np.array(chest.voxels, dtype=np.float32)
    nodule = sphere((float(centre[0]), float(centre[1]), float(centre[2])), 20.0, hu=40.0)
    truth = paste(voxels, chest, nodule, np.random.default_rng(0), NOISE)
    assert truth is not None
    assert truth.voxel_count * chest.voxel_ml == pytest.approx(nodule.volume_ml, rel=0.06)
    k, r, c = (slice(o, o + n) for o, n in zip(truth.origin, truth.mask.shape, strict=True))
    inner = voxels[k, r, c][truth.mask]
    assert np.median(inner) == pytest.approx(40, abs=20)  # its border is half lung
    assert 0.5 * NOISE < inner[inner > -60].std() < 2 * NOISE  # no smoother than what is around it
    changed = np.argwhere(voxels != chest.voxels)
    assert np.linalg.norm(changed @ chest.affine[:3, :3].T + chest.affine[:3, 3] - centre, axis=1).max() < 10 + 5


def test_the_wall_stays_as_it_is_and_is_no_nodule(chest: Volume) -> None:
    _, row, _ = (int(i) for i in np.linalg.inv(chest.affine)[:3] @ [*deep_in_the_lung(chest), 1])
    line = np.asarray(chest.voxels[12, row], dtype=np.float32)
    edge = int(
        np.flatnonzero(line < -700)[np.flatnonzero(np.diff(np.flatnonzero(line < -700)) > 5)[0] + 1]
    )  # the wall ends, the lung begins
    x, y, z = chest.to_lps(np.array([12, row, edge], dtype=np.float64)).tolist()
    voxels = np.array(chest.voxels, dtype=np.float32)
    truth = paste(voxels, chest, sphere((x, y, z), 24.0), np.random.default_rng(1), NOISE)
    assert truth is not None
    before = np.asarray(chest.voxels, dtype=np.float32)
    assert (voxels >= before - 1e-3).all()
    marked = np.zeros(voxels.shape, dtype=np.bool_)
    marked[tuple(slice(o, o + n) for o, n in zip(truth.origin, truth.mask.shape, strict=True))] = truth.mask
    assert np.mean(before[marked] < -300) > 0.9
    assert truth.voxel_count * chest.voxel_ml < 0.8 * sphere((x, y, z), 24.0).volume_ml


def test_the_noise_of_an_image_is_measured(chest: Volume) -> None:
    assert noise_of(chest) == pytest.approx(NOISE, rel=0.4)
    assert noise_of(replace(chest, voxels=np.full_like(chest.voxels, -900))) == 0


def test_pasted_scans_hold_nodules_of_each_size_apart_from_each_other(drawn: list[Case], chest: Volume) -> None:
    assert len({case.name for case in drawn}) == 1
    for case in drawn:
        pasted = [known for known in case.known if known.truth is not None]
        assert len(pasted) >= 4
        assert case.complete
        for number, known in enumerate(pasted):
            assert known.truth is not None
            assert known.truth.origin[0] >= 0
            assert known.centre_lps_mm is not None
            assert known.truth.origin[0] + known.truth.mask.shape[0] <= len(chest.voxels)
            for other in pasted[:number]:
                assert other.centre_lps_mm is not None
                gap = np.linalg.norm(np.subtract(known.centre_lps_mm, other.centre_lps_mm))
                assert gap > 0.6 * (known.diameter_mm + other.diameter_mm) / 2
    first, second = ([k.centre_lps_mm for k in case.known] for case in drawn[:2])
    assert first != second


def test_what_was_there_before_is_known_and_not_asked_for(drawn: list[Case]) -> None:
    own = [known for known in drawn[0].known if known.truth is None]
    assert [known.centre_lps_mm for known in own] == [(-80.0, 0.0, 90.0)]
    assert own[0].diameter_mm < SMALLEST_MM


def test_nodules_are_pasted_into_real_scans_alone(tmp_path: Path) -> None:
    package = max(PACKAGE.iterdir())
    for data, split in ((None, "test"), (tmp_path, "validation")):
        with pytest.raises(UsageError, match="pasted into a folder of real chest CT"):
            evaluate(package, data, paste=3, split=split)  # type: ignore[arg-type]  # one of two words
