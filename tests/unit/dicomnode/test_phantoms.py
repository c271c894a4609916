"""What a synthetic chest is: known truth, the right numbers, the same for ever from its seed."""

import math

import numpy as np
import pytest

from dicomnode.phantoms.acquisition import Protocol, averaging, interpolating, scan
from dicomnode.phantoms.anatomy import points_in_lung
from dicomnode.phantoms.chest import ChestScene, chest_scene, render, scatter_nodules, true_mask
from dicomnode.phantoms.nodules import sphere
from dicomnode.phantoms.shapes import Ellipsoid, Grid, Tubes, random_waves
from dicomnode.phantoms.studies import ball_in_lung

QUIET = Protocol(thickness_mm=1.0, blur_px=0.0, noise_hu=0.0, grain_px=0.0)


@pytest.fixture(scope="module")
def scene() -> ChestScene:
    return chest_scene(7)


def around(centre: tuple[float, float, float], half_mm: float, step: float) -> Grid:
    count = int(2 * half_mm / step) + 1
    x, y, z = (c - half_mm for c in centre)
    return Grid(origin_lps_mm=(x, y, z), spacing_mm=(step, step, step), shape=(count, count, count))


@pytest.mark.parametrize("diameter", [6.0, 12.0, 20.0])
def test_a_ball_has_the_volume_of_a_ball(scene: ChestScene, diameter: float) -> None:
    ball = ball_in_lung(scene, diameter_mm=diameter, right=True, seed=1)
    grid = around(ball.centre_lps_mm, 0.6 * diameter, diameter / 30)
    found = true_mask(scene.with_nodules((ball,)), ball, grid)
    assert found is not None
    expected = math.pi * diameter**3 / 6 / 1000
    assert ball.volume_ml == pytest.approx(expected)
    assert np.count_nonzero(found[0]) * grid.voxel_ml == pytest.approx(expected, rel=0.02)


def test_what_is_drawn_has_the_volume_and_place_of_the_truth(scene: ChestScene) -> None:
    ball = ball_in_lung(scene, diameter_mm=14.0, right=False, seed=2)
    grid = around(ball.centre_lps_mm, 9.0, 0.6)
    with_ball = render(scene.with_nodules((ball,)), grid).hu
    share = (with_ball - render(scene, grid).hu) / (ball.hu + 850)
    assert float(share.sum()) * grid.voxel_ml == pytest.approx(ball.volume_ml, rel=0.08)
    weights = np.clip(share, 0, 1)
    for axis, expected in zip(grid.axes, ball.centre_lps_mm[::-1], strict=True):
        assert float((weights * axis).sum() / weights.sum()) == pytest.approx(expected, abs=0.3)


def test_tissues_have_their_hounsfield_units(scene: ChestScene) -> None:
    ball = ball_in_lung(scene, diameter_mm=16.0, right=True, seed=3)
    scene = scene.with_nodules((ball,))
    grid = Grid(origin_lps_mm=(-220, -190, ball.centre_lps_mm[2] - 4), spacing_mm=(2, 2, 2), shape=(5, 170, 220))
    rendering = render(scene, grid)
    deep = rendering.lung_distance < -10
    assert np.all(rendering.hu[:, :3, :3] == -1000)
    assert -930 < np.median(rendering.hu[deep]) < -700
    assert rendering.hu.max() > 300
    centre = tuple(round((c - o) / 2) for c, o in zip(ball.centre_lps_mm, grid.origin_lps_mm, strict=True))
    assert rendering.hu[centre[::-1]] == pytest.approx(ball.hu, abs=1)


def test_a_chest_follows_from_its_seed(scene: ChestScene) -> None:
    grid = Grid(origin_lps_mm=(-90, -40, 40), spacing_mm=(2, 2, 2), shape=(6, 30, 30))
    assert np.array_equal(render(scene, grid).hu, render(chest_scene(7), grid).hu)
    assert not np.array_equal(render(scene, grid).hu, render(chest_scene(8), grid).hu)
    noisy = Protocol(noise_hu=20.0)
    assert np.array_equal(scan(scene, grid, noisy), scan(chest_scene(7), grid, noisy))


def test_a_part_rendered_alone_is_the_part_of_the_whole() -> None:
    chest = chest_scene(9)
    chest = scatter_nodules(chest, np.random.default_rng(1), np.array([30.0, 12.0, 8.0, 6.0]))
    whole = Grid(origin_lps_mm=(-110, -70, 40), spacing_mm=(2.5, 1.5, 1.5), shape=(6, 40, 60))
    box = (slice(2, 5), slice(10, 30), slice(20, 50))
    assert np.allclose(render(chest, whole).hu[box], render(chest, whole.part(box)).hu, atol=0.05)


def test_scattered_nodules_lie_in_the_lungs_and_apart(scene: ChestScene) -> None:
    chest = scatter_nodules(scene, np.random.default_rng(3), np.array([30.0, 20.0, 12.0, 9.0, 7.0, 5.0]))
    assert len(chest.nodules) >= 4
    for i, nodule in enumerate(chest.nodules):
        x, y, z = (np.array([c], dtype=np.float32) for c in nodule.centre_lps_mm)
        assert chest.anatomy.lung_distance((z, y, x))[0] < 0
        for other in chest.nodules[:i]:
            gap = math.dist(nodule.centre_lps_mm, other.centre_lps_mm)
            assert gap > (nodule.diameter_mm + other.diameter_mm) / 2


def test_right_is_the_side_of_the_liver_and_left_that_of_the_heart(scene: ChestScene) -> None:
    assert scene.anatomy.heart.centre[0] > 0
    assert scene.anatomy.domes[0].centre[0] < 0
    assert scene.anatomy.domes[0].centre[2] + scene.anatomy.domes[0].radii[2] == pytest.approx(0, abs=1e-6)
    points = points_in_lung(scene.anatomy, np.random.default_rng(0), count=400, depth_mm=(0, np.inf))
    assert 0.25 < np.mean(points[:, 0] > 0) < 0.75


def test_thick_slices_average_what_thin_ones_show(scene: ChestScene) -> None:
    grid = Grid(origin_lps_mm=(-80, -30, 60), spacing_mm=(4, 2, 2), shape=(3, 20, 20))
    thick = scan(scene, grid, Protocol(thickness_mm=4.0, blur_px=0, noise_hu=0, grain_px=0))
    fine = Grid(origin_lps_mm=(-80, -30, 58.25), spacing_mm=(0.5, 2, 2), shape=(24, 20, 20))
    thin = render(scene, fine).hu.reshape(3, 8, 20, 20).mean(axis=1)
    assert np.abs(thick - thin).mean() < 12


def test_noise_has_its_deviation(scene: ChestScene) -> None:
    grid = Grid(origin_lps_mm=(-300, -300, 60), spacing_mm=(2, 2, 2), shape=(4, 40, 40))  # air beside the patient
    clipped = scan(scene, grid, Protocol(noise_hu=10.0))
    assert float(clipped.std()) == pytest.approx(10, rel=0.1)


def test_averaging_and_interpolation_keep_a_constant() -> None:
    fine, slices, target = np.arange(0, 40, 1.0), np.arange(3, 35, 2.5), np.arange(4, 30, 2.0)
    assert np.allclose(averaging(fine, slices, 5.0).sum(axis=1), 1)
    matrix = interpolating(slices, target)
    assert np.allclose(matrix.sum(axis=1), 1)
    assert np.allclose(matrix @ slices.astype(np.float32), target)


def test_waves_are_the_same_at_points_and_on_a_grid_and_have_their_deviation() -> None:
    waves = random_waves(np.random.default_rng(5), count=40, wavelengths_mm=(8, 30), deviation=3.0)
    z, y, x = Grid(origin_lps_mm=(0, 0, 0), spacing_mm=(3, 3, 3), shape=(20, 30, 30)).axes
    on_grid = waves((z, y, x))
    zs, ys, xs = (np.ascontiguousarray(np.broadcast_to(a, on_grid.shape)).ravel() for a in (z, y, x))
    assert np.allclose(on_grid.ravel(), waves((zs, ys, xs)), atol=1e-3)
    assert float(on_grid.std()) == pytest.approx(3.0, rel=0.25)


def test_distance_to_a_sphere_is_exact() -> None:
    axes = Grid(origin_lps_mm=(-20, -20, -20), spacing_mm=(4, 4, 4), shape=(11, 11, 11)).axes
    z, y, x = axes
    expected = np.sqrt((x - 1) ** 2 + (y - 2) ** 2 + (z - 3) ** 2) - 7
    assert np.allclose(Ellipsoid(centre=(1, 2, 3), radii=(7, 7, 7)).distance(axes), expected, atol=0.02)


def test_a_thin_tube_fills_as_much_as_its_volume() -> None:
    grid = Grid(origin_lps_mm=(-10, -10, -20), spacing_mm=(1, 1, 1), shape=(41, 21, 21))
    for radius, tolerance in ((0.5, 0.35), (2.0, 0.1), (4.0, 0.05)):
        tube = Tubes(
            starts=np.array([[0.3, 0.2, -60.0]]), ends=np.array([[0.3, 0.2, 60.0]]),
            start_radii=np.array([radius]), end_radii=np.array([radius]),
        )  # fmt: skip
        area = float(tube.coverage(grid, 0.75).sum()) / 41
        assert area == pytest.approx(math.pi * radius**2, rel=tolerance)


def test_a_nodule_outside_the_grid_has_no_mask(scene: ChestScene) -> None:
    grid = Grid(origin_lps_mm=(0, 0, 0), spacing_mm=(1, 1, 1), shape=(4, 4, 4))
    assert true_mask(scene, sphere((100.0, 0.0, 0.0), 5.0), grid) is None
