"""Where a volume lies: as SimpleITK and highdicom read the same files, in each of the 48 ways to store one, classic and enhanced."""

import itertools
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from ct_series import write_series
from enhanced_images import SHARED, at, enhanced_image, write_image
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from pydicom.uid import EnhancedCTImageStorage
from scipy.spatial.transform import Rotation

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import frames_of, read_headers
from dicomnode.analysis.geometry import stack_of
from dicomnode.analysis.select import SelectedSeries
from dicomnode.analysis.volume import read_volume
from dicomnode.findings import Volume

REAL = Path(__file__).parents[3].parent / "shared" / "data"
TOLERANCE_MM = 1e-4


def volume_of_files(files: list[Path]) -> Volume:
    headers = read_headers(files)
    uid = str(headers[0][1].SeriesInstanceUID)
    return read_volume(SelectedSeries(input_name="image", series_instance_uid=uid, frames=tuple(frames_of(headers)), why=""))


def by_simpleitk(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return (voxels, affine for (k, r, c)) as SimpleITK's series reader finds and sorts the files of a folder."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing()))[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image), affine


def assert_same_place(volume: Volume, voxels: NDArray[np.float64], affine: NDArray[np.float64]) -> None:
    """Each corner of another reader's array lies at the same mm, and its value there is the volume's; slices may run the other way."""
    if affine[:3, 0] @ volume.affine[:3, 0] < 0:
        affine = affine.copy()
        affine[:3, 3] += affine[:3, 0] * (len(voxels) - 1)
        affine[:3, 0] *= -1
        voxels = voxels[::-1]
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, n - 1) for n in voxels.shape))])
    np.testing.assert_allclose((corners @ affine.T)[:, :3], volume.to_lps(corners[:, :3]), atol=TOLERANCE_MM)
    np.testing.assert_array_equal(volume.voxels, voxels)


def orientation_of(seed: int) -> tuple[float, ...]:
    turned = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    return (*turned[:, 0], *turned[:, 1])


@pytest.mark.parametrize("seed", range(6))
def test_an_oblique_series_lies_where_simpleitk_and_highdicom_see_it(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing = tuple(float(v) for v in rng.uniform((0.5, 0.3, 0.3), (6.0, 1.5, 1.5)))
    origin = tuple(float(v) for v in rng.uniform(-400, 400, 3))
    stored = rng.integers(0, 4000, (5, 7, 6)).astype(np.uint16)
    orientation = orientation_of(seed)
    files = write_series(tmp_path, stored, orientation=orientation, origin=origin, spacing=(spacing[0], spacing[1], spacing[2]))
    volume = volume_of_files([files[i] for i in rng.permutation(len(files))])
    assert_same_place(volume, *by_simpleitk(tmp_path))
    other = highdicom.get_volume_from_series([pydicom.dcmread(file) for file in files])
    assert_same_place(volume, other.array, other.affine)
    assert volume.spacing_mm == pytest.approx(spacing, abs=TOLERANCE_MM)


@pytest.mark.parametrize("seed", range(4))
def test_an_enhanced_image_lies_where_highdicom_sees_it(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stored = rng.integers(-1000, 2000, (6, 5, 4)).astype(np.int16)
    orientation = np.array(orientation_of(seed))
    normal = np.cross(orientation[:3], orientation[3:])
    order = rng.permutation(6)
    frames = [at(*(np.array([10.0, -20.0, 30.0]) + 2.5 * k * normal)) for k in order]
    shared = {**SHARED, "PlaneOrientationSequence": {"ImageOrientationPatient": [round(float(v), 9) for v in orientation]}}
    image = enhanced_image(frames, shared=shared, stored=stored[order], SOPClassUID=EnhancedCTImageStorage, Modality="CT")
    file = write_image(tmp_path / "image.dcm", image)
    volume = volume_of_files([file])
    assert volume.frame_numbers == tuple(int(n) + 1 for n in np.argsort(order))
    assert set(volume.sop_instance_uids) == {"2.25.71"}
    other = highdicom.imread(file).get_volume()
    assert_same_place(volume, other.array, other.affine)
    np.testing.assert_array_equal(volume.voxels, stored - 1024)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "tolerance_mm"),
    [
        ("ct_chest_lidc/LIDC-IDRI-0001", TOLERANCE_MM),
        ("ct_chest_lidc/LIDC-IDRI-0002", TOLERANCE_MM),
        ("mr_series", 0.01),  # its own positions lie so far from one line: each reader draws it through another slice
    ],
)
def test_a_real_series_lies_where_simpleitk_and_highdicom_see_it(folder: str, tolerance_mm: float) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent")
    files = sorted((REAL / folder).rglob("*.dcm"))
    stack = stack_of([frame.header for frame in frames_of(read_headers(files))])
    voxels, affine = by_simpleitk(files[0].parent)
    other = highdicom.get_volume_from_series([pydicom.dcmread(file) for file in files]).affine
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, n - 1) for n in voxels.shape))])
    for known in (affine, other):
        if known[:3, 0] @ stack.affine[:3, 0] < 0:
            known[:3, 3] += known[:3, 0] * (len(voxels) - 1)
            known[:3, 0] *= -1
        np.testing.assert_allclose(corners @ known.T, corners @ stack.affine.T, atol=tolerance_mm)


DIRECTIONS = [sign * axis for axis in np.eye(3) for sign in (1.0, -1.0)]
WAYS = [
    (row, column, turn) for row, column in itertools.product(range(6), repeat=2) if row // 2 != column // 2 for turn in (1, -1)
]  # where the rows run, where the columns run, and whether slices are stored along their normal or against it


def stored_voxel(position: NDArray[np.float64]) -> NDArray[np.int16]:
    """A value that no other place of the patient has: positions are whole, and -8..8 mm along each axis."""
    x, y, z = np.rint(position).astype(np.int16).T
    return np.asarray((x + 8) + 17 * (y + 8) + 289 * (z + 8), dtype=np.int16).T


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_each_of_the_48_ways_to_store_a_volume_gives_the_same_in_patient_space(
    tmp_path: Path, way: tuple[int, int, int], enhanced: bool
) -> None:
    assert len(WAYS) == 48
    row, column, turn = way
    along_row, along_column = DIRECTIONS[row], DIRECTIONS[column]
    normal = turn * np.cross(along_row, along_column)
    spacing, size = np.array([2.0, 1.0, 3.0]), np.array([4, 7, 5])  # of the patient's axes x, y, z
    steps, counts = zip(*((d * (np.abs(d) @ spacing), round(np.abs(d) @ size)) for d in (normal, along_column, along_row)), strict=True)
    start = -(sum(step * (n - 1) for step, n in zip(steps, counts, strict=True))) / 2 // 1 + [1, 0, -1]
    index = np.moveaxis(np.indices(counts), 0, -1)
    stored = stored_voxel(start + index @ np.array(steps))
    positions = [start + k * steps[0] for k in range(counts[0])]
    orientation = [*along_row, *along_column]
    pixel_mm = [float(np.abs(along_column) @ spacing), float(np.abs(along_row) @ spacing)]
    if enhanced:
        shared = {
            "PlaneOrientationSequence": {"ImageOrientationPatient": orientation},
            "PixelMeasuresSequence": {"PixelSpacing": pixel_mm},
            "PixelValueTransformationSequence": {"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "HU"},
        }
        image = enhanced_image([at(*p) for p in positions], shared=shared, stored=stored, SOPClassUID=EnhancedCTImageStorage, Modality="CT")
        files = [write_image(tmp_path / "image.dcm", image)]
    else:
        files = [
            write_series(
                tmp_path / str(k), plane[None], orientation=tuple(orientation), origin=tuple(position), SOPInstanceUID=f"2.25.7.{k + 1}",
                spacing=(1.0, pixel_mm[0], pixel_mm[1]), RescaleIntercept=0,
            )[0]
            for k, (plane, position) in enumerate(zip(stored, positions, strict=True))
        ]  # fmt: skip
    volume = volume_of_files(files)
    everywhere = np.moveaxis(np.indices(volume.voxels.shape), 0, -1).astype(np.float64)
    np.testing.assert_array_equal(volume.voxels, stored_voxel(volume.to_lps(everywhere)))
    np.testing.assert_allclose(volume.to_index(volume.to_lps(everywhere)), everywhere, atol=1e-9)
    assert volume.voxel_ml == pytest.approx(0.006)
    assert len(np.unique(volume.voxels)) == 4 * 7 * 5


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000), jitter=st.sampled_from([0.0, 4e-4]))
def test_the_stack_is_the_same_whatever_the_order_and_the_last_digits_of_its_images(seed: int, jitter: float) -> None:
    rng = np.random.default_rng(seed)
    orientation = np.array(orientation_of(seed))
    normal = np.cross(orientation[:3], orientation[3:])
    origin, spacing = rng.uniform(-500, 500, 3), float(rng.uniform(0.5, 5))
    headers = []
    for k in range(9):
        (frame,) = frames_of([(Path("x"), enhanced_image([at(*(origin + spacing * k * normal))]))])
        frame.header.ImageOrientationPatient = [round(float(v), 6) for v in orientation + rng.uniform(-jitter, jitter, 6)]
        headers.append(frame.header)
    stack = stack_of(headers)
    order = [int(i) for i in rng.permutation(9)]
    shuffled = stack_of([headers[i] for i in order])
    np.testing.assert_array_equal(stack.affine, shuffled.affine)
    assert [order[i] for i in shuffled.order] == list(stack.order) == list(range(9))
    expected = np.column_stack([spacing * normal, 0.8 * orientation[3:], 0.7 * orientation[:3]])
    np.testing.assert_allclose(stack.affine[:3, :3], expected, atol=max(1e-5, 4 * jitter * spacing))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"ImagePositionPatient": [1e300, 0, 0]}, "missing-geometry"),
        ({"ImagePositionPatient": [float("nan"), 0, 0]}, "missing-geometry"),
        ({"PixelSpacing": [1e30, 1e30]}, "missing-geometry"),
        ({"ImageOrientationPatient": [1e200, 0, 0, 0, 1, 0]}, "mixed-orientation"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(values: dict[str, list[float]], code: str) -> None:
    headers = [frames_of([(Path("x"), enhanced_image([at(0, 0, k)]))])[0].header for k in range(5)]
    for keyword, value in values.items():
        setattr(headers[2], keyword, value)
    with pytest.raises(NotEligible) as caught:
        stack_of(headers)
    assert caught.value.code == code
