"""Grids of series and projections, and one series on another's voxels: each place of the patient stays where it is."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from small_bundle import MANIFEST, affine_of, volume_of

from dicomnode.analysis import grid as grid_module
from dicomnode.analysis.components import ProbabilityMap, find
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.grid import grid_of, resample_to
from dicomnode.analysis.manifest import PreprocessingSection, parse_manifest
from dicomnode.errors import PackageError
from dicomnode.findings import Volume

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])


def preprocessing(**values: object) -> PreprocessingSection:
    return PreprocessingSection.model_validate({"window": [0.0, 1.0], **values})


def projection(shape: tuple[int, int], spacing: tuple[float, float]) -> Volume:
    """Return a radiograph whose values are their own place: 1000 x + y, in mm."""
    affine = np.array([[0, 0, spacing[1], 0], [0, spacing[0], 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = volume_of(np.zeros((1, *shape), dtype=np.float32), affine)
    x, y, _ = np.moveaxis(volume.to_lps(everywhere(volume.voxels.shape)), -1, 0)
    return made_of(volume, (1000 * x + y).astype(np.float32), frame_of_reference_uid=None, modality="DX")


def made_of(volume: Volume, voxels: NDArray[np.float32] | NDArray[np.int16], **values: object) -> Volume:
    return Volume(**{**volume.__dict__, "voxels": voxels, **values})


def everywhere(shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.moveaxis(np.indices(shape), 0, -1).astype(np.float64)


@pytest.mark.parametrize(
    ("shape", "spacing", "wanted", "on_grid", "spacing_mm"),
    [
        ((200, 160), (0.2, 0.2), {"size_px": 100}, (1, 100, 80), (0.4, 0.4)),
        ((160, 200), (0.2, 0.2), {"size_px": 100}, (1, 80, 100), (0.4, 0.4)),
        ((100, 200), (0.4, 0.2), {"size_px": 100}, (1, 100, 100), (0.4, 0.4)),  # proportions are those of the patient
        ((64, 64), (1.0, 1.0), {"size_px": 128}, (1, 128, 128), (0.5, 0.5)),
        ((200, 160), (0.2, 0.2), {"spacing_mm": [9.0, 0.4, 0.8]}, (1, 100, 40), (0.4, 0.8)),
    ],
)
def test_the_grid_of_a_projection_keeps_its_axes_and_its_slice(
    shape: tuple[int, int],
    spacing: tuple[float, float],
    wanted: dict[str, object],
    on_grid: tuple[int, int, int],
    spacing_mm: tuple[float, float],
) -> None:
    grid = grid_of(projection(shape, spacing), preprocessing(**wanted))
    assert (grid.shape, grid.source_axis, grid.reversed_, grid.step[0]) == (on_grid, (0, 1, 2), (False, False, False), 1.0)
    assert grid.spacing_mm[1:] == pytest.approx(spacing_mm)
    centre = (np.array([*grid.shape, 0]) - 1) / 2 + [0, 0, 0, 1.5]
    np.testing.assert_allclose((grid.affine @ centre)[:2], [(shape[1] - 1) / 2 * spacing[1], (shape[0] - 1) / 2 * spacing[0]])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_what_a_projections_grid_holds_is_what_the_image_holds_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, spacing = tuple(rng.integers(20, 60, 2)), tuple(rng.uniform(0.1, 0.5, 2))
    volume = projection((int(shape[0]), int(shape[1])), (float(spacing[0]), float(spacing[1])))
    grid = grid_of(volume, preprocessing(size_px=int(rng.integers(16, 80))))
    on_grid = np.einsum("ak,br,cs,krs->abc", *(grid.from_volume(a) for a in range(3)), volume.voxels, optimize=True)
    x, y, _ = np.moveaxis(everywhere(grid.shape) @ grid.affine[:3, :3].T + grid.affine[:3, 3], -1, 0)
    margin = [slice(int(np.ceil(3 * max(1.0, 1 / s))), -int(np.ceil(3 * max(1.0, 1 / s)))) for s in grid.step[1:]]
    tenth = 1000 * 0.1 * float(spacing[1])  # of a pixel: so near are the triangles of a coarser grid to a ramp
    inner = (slice(None), *margin)  # beyond the image's outermost pixels its values go on unchanged
    np.testing.assert_allclose(on_grid[inner], (1000 * x + y)[inner], atol=tenth)
    whole = [slice(0, n) for n in grid.shape]
    back = [grid.to_volume(a, grid=whole[a], turned=slice(0, grid.source_shape[a])) for a in range(3)]
    returned = np.einsum("ka,rb,sc,abc->krs", *back, on_grid, optimize=True)
    edge = [slice(int(np.ceil(4 * max(1.0, s))), -int(np.ceil(4 * max(1.0, s)))) for s in grid.step[1:]]
    np.testing.assert_allclose(returned[:, *edge], volume.voxels[:, *edge], atol=2 * tenth)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_a_disc_of_a_projection_stays_where_it_is_there_and_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = (int(n) for n in rng.integers(90, 160, 2))
    volume = projection((rows, columns), (float(rng.uniform(0.1, 0.3)), float(rng.uniform(0.1, 0.3))))
    row_mm, column_mm = volume.spacing_mm[1:]
    radius = 0.2 * min(rows * row_mm, columns * column_mm)
    centre = np.array([(columns - 1) / 2 * column_mm, (rows - 1) / 2 * row_mm]) + rng.uniform(-1, 1, 2)
    x, y, _ = np.moveaxis(volume.to_lps(everywhere(volume.voxels.shape)), -1, 0)
    edge = (row_mm + column_mm) / 2
    disc = np.clip((radius - np.hypot(x - centre[0], y - centre[1])) / edge + 0.5, 0, 1).astype(np.float32)
    grid = grid_of(volume, preprocessing(size_px=int(rng.integers(64, 200))))
    on_grid = np.einsum("ak,br,cs,krs->abc", *(grid.from_volume(a) for a in range(3)), disc, optimize=True).astype(np.float32)
    output = parse_manifest(MANIFEST.encode(), Path("bright")).outputs[0].model_copy(update={"minimum_ml": 0.0})
    area = ProbabilityMap(grid=grid, origin=(0, 0, 0), values=on_grid, region=None, side=None)
    ((finding,), _) = find(output, area, made_of(volume, disc))
    pixels = np.argwhere(finding.segment.mask) + np.array(finding.segment.origin)
    offset = pixels.mean(axis=0) - [0, centre[1] / row_mm, centre[0] / column_mm]
    assert np.abs(offset).max() <= 0.5
    found = math.sqrt(len(pixels) * row_mm * column_mm / math.pi)
    assert abs(found - radius) <= 0.25 * max(row_mm, column_mm, *grid.spacing_mm[1:])


def test_a_series_has_no_size_in_pixels() -> None:
    volume = volume_of(np.zeros((4, 5, 6), dtype=np.float32), affine_of((2.0, 1.0, 1.0), (0, 0, 0), AXIAL))
    with pytest.raises(PackageError, match="size_px"):
        grid_of(volume, preprocessing(size_px=64))
    assert grid_of(volume, preprocessing(spacing_mm=[1.0, 1.0, 1.0])).shape == (8, 5, 6)


def ramp(position: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(position @ [3.0, -2.0, 5.0] + 100.0)


def oblique(rng: np.random.Generator, edge_mm: float, dtype: type) -> Volume:
    """Return a cube of about this edge around the origin, turned at random, whose values are a ramp through the patient."""
    spacing = rng.uniform((1.0, 0.6, 0.6), (4.0, 1.5, 1.5))
    shape = np.ceil(edge_mm / spacing).astype(int)
    affine = affine_of((spacing[0], spacing[1], spacing[2]), (0, 0, 0), Rotation.random(rng=rng).as_matrix())
    affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2)
    empty = volume_of(np.zeros(shape, dtype=np.float32), affine)
    values = ramp(empty.to_lps(everywhere(empty.voxels.shape)))
    return made_of(empty, (np.rint(values) if dtype is np.int16 else values).astype(dtype))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100_000), dtype=st.sampled_from([np.float32, np.int16]))
def test_a_second_series_on_the_first_ones_voxels_has_its_value_at_each_place(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    volume, reference = oblique(rng, 50, dtype), oblique(rng, 20, np.float32)  # the reference lies within: its diagonal is 35 mm
    moved = resample_to(volume, reference)
    places = reference.to_lps(everywhere(reference.voxels.shape))
    np.testing.assert_allclose(moved.voxels, ramp(places), atol=0.01 if dtype is np.float32 else 0.51)
    assert moved.voxels.dtype == np.float32
    np.testing.assert_array_equal(moved.affine, reference.affine)
    assert moved.sop_instance_uids == reference.sop_instance_uids
    assert moved.series_instance_uid == volume.series_instance_uid


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_beyond_its_edges_a_series_is_its_minimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    volume, reference = oblique(rng, 12, np.int16), oblique(rng, 40, np.float32)
    moved = resample_to(volume, reference)
    index = volume.to_index(reference.to_lps(everywhere(reference.voxels.shape)))
    size = np.array(volume.voxels.shape)
    beyond = ((index < -0.51) | (index > size - 0.49)).any(axis=-1)
    within = ((index > -0.49) & (index < size - 0.51)).all(axis=-1)
    assert beyond.any()
    assert within.any()
    assert (moved.voxels[beyond] == volume.voxels.min()).all()
    nearest = np.clip(index, 0, size - 1)
    np.testing.assert_allclose(moved.voxels[within], ramp(volume.to_lps(nearest))[within], atol=0.51)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    volume, reference = oblique(rng, 30, np.int16), oblique(rng, 30, np.float32)
    whole = resample_to(volume, reference).voxels
    monkeypatch.setattr(grid_module, "SLAB_VOXELS", 3 * reference.voxels[0].size)
    np.testing.assert_allclose(resample_to(volume, reference).voxels, whole, atol=1e-3)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_series_on_the_same_grid_keeps_its_voxels_to_the_bit(noise: float) -> None:
    volume = oblique(np.random.default_rng(4), 20, np.int16)
    assert resample_to(volume, made_of(volume, volume.voxels, affine=volume.affine + noise)).voxels is volume.voxels


def test_a_projection_lies_on_its_own_grid_and_on_no_other() -> None:
    volume = projection((20, 30), (0.2, 0.2))
    assert resample_to(volume, volume) is volume
    with pytest.raises(NotEligible, match="mixed-frame-of-reference"):
        resample_to(volume, projection((20, 30), (0.2, 0.2)))


def test_a_shift_by_a_voxel_keeps_the_border() -> None:
    volume = oblique(np.random.default_rng(5), 20, np.float32)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 0]  # the reference begins one slice further on
    moved = resample_to(volume, made_of(volume, volume.voxels[:-1], affine=affine)).voxels
    np.testing.assert_allclose(moved, volume.voxels[1:], atol=0.01)


@pytest.mark.parametrize("other", ["2.25.9", None])
def test_another_frame_of_reference_has_no_places_in_common(other: str | None) -> None:
    volume = oblique(np.random.default_rng(6), 20, np.float32)
    with pytest.raises(NotEligible) as caught:
        resample_to(volume, made_of(volume, volume.voxels, frame_of_reference_uid=other))
    assert caught.value.code == "mixed-frame-of-reference"
