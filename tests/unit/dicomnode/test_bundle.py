"""A MONAI Bundle's own pipeline on our volumes: what it finds lies where it was, and nothing of it stays behind."""

from typing import Any

import numpy as np
import pytest
from small_bundle import affine_of, spheres, volume_of
from zoo_package import BRIGHT, BRIGHT_WEIGHTS, load, write_zoo_package

from dicomnode.findings import Volume

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
SHAPE = (22, 52, 60)


def ball(directions: np.ndarray[Any, Any], radius: float = 11.0) -> tuple[Volume, np.ndarray[Any, Any]]:
    """A volume with one bright ball off its middle, and the ball's centre in LPS mm."""
    affine = affine_of((3.0, 1.3, 1.1), (12.0, -40.0, 7.0), directions)
    centre = affine[:3, :3] @ [12.3, 22.4, 33.7] + affine[:3, 3]
    x, y, z = centre
    return volume_of(spheres(SHAPE, affine, [((x, y, z), radius)]), affine), centre


def oblique(seed: int) -> np.ndarray[Any, Any]:
    directions, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return directions


ORIENTATIONS = [
    *(
        AXIAL[:, order] * signs
        for order, signs in zip([(0, 1, 2), (2, 0, 1), (1, 2, 0)], [(1, 1, 1), (-1, 1, 1), (1, -1, -1)], strict=True)
    ),
    *(oblique(seed) for seed in range(3)),
]


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_zoo_package(tmp_path_factory.mktemp("zoo") / "p", BRIGHT, BRIGHT_WEIGHTS))


@pytest.mark.parametrize("directions", ORIENTATIONS)
def test_a_ball_stays_where_it_is_through_orientation_spacing_and_cropping(bright: Any, directions: np.ndarray[Any, Any]) -> None:
    volume, centre = ball(directions)
    found = bright({"image": volume})
    (finding,) = found.findings
    off = np.linalg.inv(volume.affine[:3, :3]) @ (np.array(finding.centre_lps_mm) - centre)
    assert np.abs(off).max() <= 0.5
    assert finding.volume_ml == pytest.approx(4 / 3 * np.pi * 1.1**3, rel=0.1)
    assert finding.probability > 0.9
    assert found.omitted == 0
    assert found.device == "cpu fp32 torch"
