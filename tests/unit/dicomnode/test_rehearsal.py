"""A package is checked with phantoms of its modalities, cut to what the check needs."""

from pathlib import Path

import numpy as np
import pytest
from monai.data.utils import dense_patch_slices
from small_bundle import affine_of, volume_of

import zoo_bundles
from dicomnode.analysis.bundle_files import spacing_and_channels, window_of
from dicomnode.analysis.draft import draft_manifest
from dicomnode.cli.rehearsal import check_volumes, cut, windows_of

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])


def placed(tmp_path: Path, name: str) -> Path:
    """A bundle as the node keeps it."""
    bundle = zoo_bundles.write_bundle(tmp_path, name)
    (tmp_path / "package").mkdir()
    return bundle.rename(tmp_path / "package/bundle").parent


def test_what_is_kept_of_a_phantom_is_its_middle_at_the_place_where_it_was() -> None:
    affine = affine_of((3.0, 1.0, 1.0), (-50.0, -40.0, 100.0), AXIAL)
    volume = volume_of(np.arange(40 * 100 * 90, dtype=np.float32).reshape(40, 100, 90), affine)
    part = cut(volume, (1.0, 1.0, 1.0), 400_000)
    assert part.voxels.size < volume.voxels.size
    assert len(part.sop_instance_uids) == len(part.voxels)
    first = np.linalg.inv(affine) @ part.affine[:, 3]
    k, r, c = first[:3].round().astype(int)
    slices, rows, columns = part.voxels.shape
    np.testing.assert_array_equal(part.voxels, volume.voxels[k : k + slices, r : r + rows, c : c + columns])
    assert abs((40 - part.voxels.shape[0]) / 2 - k) <= 1
    assert cut(volume, (1.0, 1.0, 1.0), 10**9) is volume
    assert cut(volume, None, 10**9) is volume


@pytest.mark.parametrize(
    ("name", "spacing", "channels"),
    [
        ("spleen_ct_segmentation", (1.5, 1.5, 2.0), 2),
        ("wholeBody_ct_segmentation", (3.0, 3.0, 3.0), 105),  # "@pixdim", an expression
        ("brats_mri_segmentation", None, 3),
    ],
)
def test_the_grid_of_a_bundle_is_read_without_evaluating_it(
    tmp_path: Path, name: str, spacing: tuple[float, float, float] | None, channels: int
) -> None:
    assert spacing_and_channels(zoo_bundles.write_bundle(tmp_path, name), "configs/inference.json", "preprocessing") == (spacing, channels)


def test_a_set_of_mr_series_lies_on_one_grid_and_differs_in_its_weighting(tmp_path: Path) -> None:
    package = placed(tmp_path, "brats_mri_segmentation")
    volumes = check_volumes(package, draft_manifest(package / "bundle").manifest)
    assert list(volumes) == ["t1c", "t1", "t2", "flair"]
    assert len({volume.frame_of_reference_uid for volume in volumes.values()}) == 1
    assert all(np.array_equal(volume.affine, volumes["t1"].affine) for volume in volumes.values())
    assert len({volume.series_instance_uid for volume in volumes.values()}) == 4


def test_a_fine_grid_gets_a_small_phantom(tmp_path: Path) -> None:
    package = placed(tmp_path, "prostate_mri_anatomy")
    [volume] = check_volumes(package, draft_manifest(package / "bundle").manifest).values()
    assert volume.modality == "MR"
    assert volume.voxels.size * volume.voxel_ml * 1000 / 0.5**3 < 9_000_000


def test_a_projection_is_one_slice_of_an_x_ray(tmp_path: Path) -> None:
    package = placed(tmp_path, "cxr_densenet_classification")
    [volume] = check_volumes(package, draft_manifest(package / "bundle").manifest).values()
    assert volume.is_projection
    assert len(volume.voxels) == 1


def test_windows_are_counted_as_monai_lays_them_and_a_check_has_few(tmp_path: Path) -> None:
    volume = volume_of(np.zeros((22, 235, 250), dtype=np.float32), affine_of((2.0, 1.5, 1.5), (0.0, 0.0, 0.0), AXIAL))
    laid = dense_patch_slices((250, 235, 96), (96, 96, 96), (48, 48, 48))  # an image that is smaller than a window is padded
    assert windows_of(volume, (1.5, 1.5, 2.0), (96, 96, 96), 0.5) == windows_of(volume, None, (96, 96, 96), 0.5) == len(laid)
    package = placed(tmp_path, "spleen_ct_segmentation")
    [volume] = check_volumes(package, draft_manifest(package / "bundle").manifest).values()
    slides = window_of(package / "bundle", "configs/inference.json")
    assert slides == ((96, 96, 96), 0.5)
    assert windows_of(volume, (1.5, 1.5, 2.0), *slides) <= 9
    assert window_of(package / "bundle", "configs/metadata.json") is None
