"""Measuring a segment: the long axis of shapes whose diameter is known, and grids that lose no place."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.spatial import ConvexHull, distance_matrix
from small_bundle import affine_of, volume_of

import dicomnode
from dicomnode.analysis.components import ProbabilityMap, find, long_axis_of
from dicomnode.analysis.grid import grid_over
from dicomnode.analysis.package import load_package
from dicomnode.findings import Segment

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
VOLUME = volume_of(np.zeros((8, 40, 40), dtype=np.float32), affine_of((3.0, 0.5, 0.5), (0.0, 0.0, 0.0), AXIAL))


def test_one_pixel_is_one_pixel_long() -> None:
    axis = long_axis_of(Segment(mask=np.ones((1, 1, 1), dtype=bool), origin=(4, 10, 20)), VOLUME)
    assert axis.length_mm == pytest.approx(0.5)
    assert axis.slice_index == 4
    assert {axis.points_px[0], axis.points_px[1]} in ({(19.5, 10.0), (20.5, 10.0)}, {(20.0, 9.5), (20.0, 10.5)})


def test_the_slice_with_the_longest_diameter_is_taken() -> None:
    mask = np.zeros((3, 5, 30), dtype=bool)
    mask[0, 2, :5] = mask[1, 2, :30] = mask[2, :, 3] = True
    axis = long_axis_of(Segment(mask=mask, origin=(2, 0, 0)), VOLUME)
    assert axis.slice_index == 3
    assert axis.length_mm == pytest.approx(15.0)
    assert {point[1] for point in axis.points_px} == {2.0}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_long_axis_is_the_diameter_of_the_convex_hull_of_the_pixels_edges(seed: int) -> None:
    mask = np.random.default_rng(seed).random((1, 9, 12)) < 0.2
    mask[0, 4, 4] = True
    rows, columns = np.nonzero(mask[0])
    edges = [(rows - 0.5, columns), (rows + 0.5, columns), (rows, columns - 0.5), (rows, columns + 0.5)]
    points = np.concatenate([np.column_stack(e) for e in edges]) * 0.5
    hull = points[ConvexHull(points).vertices]
    axis = long_axis_of(Segment(mask=mask, origin=(0, 0, 0)), VOLUME)
    assert axis.length_mm == pytest.approx(distance_matrix(hull, hull).max())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    target=st.tuples(*[st.floats(0.5, 4.0)] * 3),
)
def test_a_linear_field_is_itself_on_the_grid_and_the_grid_is_centred(
    seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float], target: tuple[float, float, float]
) -> None:
    directions, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    affine = affine_of(spacing, (5.0, -7.0, 11.0), directions)
    grid = grid_over(shape, affine, target)
    np.testing.assert_allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), target)
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    np.testing.assert_allclose(grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3], middle, atol=1e-9)
    assert np.linalg.det(grid.affine[:3, :3]) < 0  # (head, back, left) is a left-handed order of LPS axes
    for axis in range(3):
        weights = grid.from_volume(axis)
        assert weights.shape == (grid.shape[axis], shape[grid.source_axis[axis]])
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        assert (weights >= 0).all()


@given(flips=st.tuples(st.booleans(), st.booleans(), st.booleans()), order=st.permutations([0, 1, 2]))
def test_a_box_that_is_turned_back_holds_the_same_voxels(flips: tuple[bool, bool, bool], order: list[int]) -> None:
    shape = (5, 6, 7)
    directions = AXIAL[:, order] * np.where(flips, -1, 1)
    grid = grid_over(shape, affine_of((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), directions), (1.0, 1.0, 1.0))
    volume = np.random.default_rng(0).random(shape) < 0.5
    turned = volume.transpose(grid.source_axis)[tuple(slice(None, None, -1) if f else slice(None) for f in grid.reversed_)]
    box = turned[1:3, 2:5, 1:4]
    mask, (k, r, c) = grid.turn_back(box, (1, 2, 1))
    np.testing.assert_array_equal(volume[k : k + mask.shape[0], r : r + mask.shape[1], c : c + mask.shape[2]], mask)


def test_a_segment_of_a_map_holds_the_probability_of_each_of_its_voxels() -> None:
    """On a volume that lies the other way round along each axis: they are turned back with the mask."""
    volume = volume_of(np.zeros((4, 5, 6), dtype=np.float32), affine_of((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), -AXIAL))
    grid = grid_over((4, 5, 6), volume.affine, (1.0, 1.0, 1.0))
    values = np.zeros((4, 5, 6), dtype=np.float32)
    values[1:3, 2:4, 1:4] = np.linspace(0.45, 1.0, 12).reshape(2, 2, 3)
    turned = values.transpose(grid.source_axis)[tuple(slice(None, None, -1) if f else slice(None) for f in grid.reversed_)]
    area = ProbabilityMap(grid=grid, origin=(0, 0, 0), values=np.ascontiguousarray(turned), region=None, side=None)
    lung = load_package(Path(dicomnode.__file__).parent / "packages" / "lung-nodule-ct" / "0.2.0").manifest.outputs[0]
    for components in ("each", "one"):
        output = lung.model_copy(update={"threshold": 0.5, "minimum_ml": 0.0, "minimum_score": 0.0, "components": components})
        ((finding,), _) = find(output, area, volume)
        first, row, column = finding.segment.origin
        there = values[first:, row:, column:][tuple(slice(n) for n in finding.segment.mask.shape)]
        assert finding.segment.probability is not None
        assert finding.segment.voxel_count == 10
        np.testing.assert_array_equal(finding.segment.mask, there > 0.5)
        np.testing.assert_allclose(finding.segment.probability / 255, np.where(there > 0.5, there, 0), atol=0.5 / 255 + 1e-6)
