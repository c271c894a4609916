"""Reading a series: the same Hounsfield units at the same places of the patient as another reader sees, whatever the order of files."""

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from ct_series import AXIAL, write_series
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray
from pydicom.uid import JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless
from small_bundle import MANIFEST

from dicomnode.analysis.decoding import Decoder
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import frames_of, read_headers
from dicomnode.analysis.geometry import stack_of
from dicomnode.analysis.manifest import parse_manifest
from dicomnode.analysis.select import SelectedSeries, select
from dicomnode.analysis.volume import read_volume
from dicomnode.errors import AnalysisFailed
from dicomnode.findings import Volume
from pacs import program

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "ct_chest_lidc"


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(processes=1) as children:
        yield children


def series_of(files: list[Path]) -> SelectedSeries:
    headers = read_headers(files)
    uid = str(headers[0][1].SeriesInstanceUID)
    return SelectedSeries(input_name="image", series_instance_uid=uid, frames=tuple(frames_of(headers)), why="")


def by_simpleitk(files: list[Path]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return (voxels, affine for (k, r, c)) as SimpleITK reads files that are sorted by position."""
    image = SimpleITK.ReadImage([str(f) for f in files], SimpleITK.sitkFloat32)
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3] = directions[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image), affine


def random_stored(rng: np.random.Generator, *, signed: bool = False, shape: tuple[int, int, int] = (5, 7, 6)) -> NDArray[Any]:
    return rng.integers(-1000, 2000, shape).astype(np.int16) if signed else rng.integers(0, 4000, shape).astype(np.uint16)


def rotation(seed: int) -> NDArray[np.float64]:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_an_oblique_series_has_simpleitks_values_and_geometry(tmp_path: Path, seed: int, signed: bool) -> None:
    turned = rotation(seed)
    orientation = (*turned[:, 0], *turned[:, 1])
    files = write_series(tmp_path, random_stored(np.random.default_rng(seed), signed=signed), orientation=orientation)
    voxels, affine = by_simpleitk(files)
    volume = read_volume(series_of(files[::-1]))
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert volume.voxels.dtype == np.int16


@pytest.mark.realdata
@pytest.mark.parametrize("case", ["LIDC-IDRI-0001", "LIDC-IDRI-0002"])
def test_a_real_chest_ct_has_simpleitks_values_and_geometry(case: str) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent")
    files = sorted((REAL / case).glob("*.dcm"), key=lambda f: float(f.stem))
    voxels, affine = by_simpleitk(files)
    volume = read_volume(series_of(random.Random(1).sample(files, len(files))))
    padding = voxels == -3024  # -2000 stored: Pixel Padding Value, written unsigned in one of the two series
    assert padding.any() == (case == "LIDC-IDRI-0002")
    np.testing.assert_array_equal(volume.voxels[~padding], voxels[~padding])
    assert (volume.voxels[padding] == -1000).all()
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert volume.sop_instance_uids == tuple(str(pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID) for f in files)


@pytest.mark.realdata
def test_the_real_series_are_chosen_by_an_ordinary_chest_manifest() -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent")
    manifest = parse_manifest(MANIFEST.encode(), Path("bright"))
    for case, slices, spacing in (("LIDC-IDRI-0001", 16, 2.5), ("LIDC-IDRI-0002", 12, 1.25)):
        selected = select(manifest, read_headers(list((REAL / case).glob("*.dcm")))).series[0]
        assert len(selected.frames) == slices
        assert stack_of(selected.headers).spacing_mm[0] == pytest.approx(spacing)


def in_patient_space(volume: Volume, points: NDArray[np.float64]) -> NDArray[np.float32]:
    index = (points - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T
    k, r, c = np.rint(index).astype(int).T
    return volume.voxels[k, r, c]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), flips=st.tuples(st.booleans(), st.booleans()), shuffle=st.randoms(use_true_random=False))
def test_shuffled_files_and_flipped_images_are_the_same_volume_in_patient_space(
    tmp_path_factory: pytest.TempPathFactory, seed: int, flips: tuple[bool, bool], shuffle: random.Random
) -> None:
    turned = rotation(seed)
    stored = random_stored(np.random.default_rng(seed))
    spacing, origin = (2.0, 0.8, 0.7), np.array([1.0, 2.0, 3.0])
    along_row, along_column = turned[:, 0], turned[:, 1]
    normal = np.cross(along_row, along_column)
    plain = tmp_path_factory.mktemp("plain")
    volume = read_volume(
        series_of(write_series(plain, stored, spacing=spacing, orientation=(*along_row, *along_column), origin=tuple(origin)))
    )

    flipped, start = stored, origin
    if flips[0]:  # the rows are written from the other end
        flipped, start, along_row = flipped[:, :, ::-1], start + along_row * spacing[2] * (stored.shape[2] - 1), -along_row
    if flips[1]:
        flipped, start, along_column = flipped[:, ::-1], start + along_column * spacing[1] * (stored.shape[1] - 1), -along_column
    if flips[0] != flips[1]:  # one flip turns the normal round, and write_series goes along the normal
        flipped, start = flipped[::-1], start + normal * spacing[0] * (stored.shape[0] - 1)
    other = tmp_path_factory.mktemp("flipped")
    files = write_series(
        other, np.ascontiguousarray(flipped), spacing=spacing, orientation=(*along_row, *along_column), origin=tuple(start)
    )
    shuffle.shuffle(files)
    again = read_volume(series_of(files))

    points = volume.to_lps(np.argwhere(np.ones(stored.shape)).astype(np.float64))
    np.testing.assert_array_equal(in_patient_space(again, points), in_patient_space(volume, points))


def test_slope_and_intercept_of_each_slice_are_its_own(tmp_path: Path) -> None:
    stored = np.full((4, 3, 3), 100, dtype=np.uint16)
    files = write_series(tmp_path, stored)
    for k, file in enumerate(files):
        image = pydicom.dcmread(file)
        image.RescaleSlope, image.RescaleIntercept = k + 1, -10 * k
        image.save_as(file)
    assert read_volume(series_of(files)).voxels[:, 0, 0].tolist() == [100, 190, 280, 370]


@pytest.mark.parametrize(("signed", "stored_padding", "written"), [(True, -2000, 63536), (True, -2000, -2000), (False, 63536, 63536)])
def test_padding_is_air_however_its_value_is_written(tmp_path: Path, signed: bool, stored_padding: int, written: int) -> None:
    stored = np.full((3, 4, 4), 1024, dtype=np.int16 if signed else np.uint16)
    stored[:, 0, 0] = stored_padding
    files = write_series(tmp_path, stored)
    for file in files:
        image = pydicom.dcmread(file)
        image.add_new("PixelPaddingValue", "US" if written > 0 else "SS", written)
        image.save_as(file)
    volume = read_volume(series_of(files))
    assert (volume.voxels[:, 0, 0] == -1000).all()
    assert (volume.voxels[:, 1:, 1:] == 0).all()


def test_bits_above_bits_stored_are_not_part_of_the_value(tmp_path: Path) -> None:
    stored = np.full((3, 4, 4), 1024, dtype=np.uint16)
    files = write_series(tmp_path, stored | 0xF000, BitsStored=12, HighBit=11)
    assert (read_volume(series_of(files)).voxels == 0).all()


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("signed", [True, False])
def test_a_losslessly_compressed_series_has_the_same_values(tmp_path: Path, decoder: Decoder, syntax: str, signed: bool) -> None:
    stored = random_stored(np.random.default_rng(3), signed=signed, shape=(3, 64, 64))
    files = write_series(tmp_path, stored)
    plain = read_volume(series_of(files))
    for file in files:
        image = pydicom.dcmread(file)
        image.compress(syntax, generate_instance_uid=False)
        image.save_as(file)
    np.testing.assert_array_equal(read_volume(series_of(files), decoder).voxels, plain.voxels)


@pytest.mark.system
@pytest.mark.parametrize("option", ["+e1", "+el"])
@pytest.mark.parametrize("signed", [True, False])
def test_a_series_that_dcmtk_compressed_to_jpeg_lossless_has_the_same_values(
    tmp_path: Path, decoder: Decoder, option: str, signed: bool
) -> None:
    dcmcjpeg = program("dcmcjpeg", "dcmtk")
    files = write_series(tmp_path, random_stored(np.random.default_rng(5), signed=signed, shape=(3, 64, 64)))
    plain = read_volume(series_of(files))
    for file in files:
        subprocess.run([dcmcjpeg, option, "+un", file, file], check=True, capture_output=True)
        assert pydicom.dcmread(file).file_meta.TransferSyntaxUID in {JPEGLossless, JPEGLosslessSV1}
    np.testing.assert_array_equal(read_volume(series_of(files), decoder).voxels, plain.voxels)


def spoil(image: pydicom.Dataset, how: str) -> None:
    if how == "truncated":
        image.PixelData = image.PixelData[:100]
    elif how == "absent":
        del image.PixelData
    elif how == "smaller":
        image.Rows, image.PixelData = image.Rows // 2, image.PixelData[: len(image.PixelData) // 2]
    elif how.startswith("garbage"):
        syntax = {"garbage j2k": JPEG2000Lossless, "garbage jls": JPEGLSLossless, "garbage rle": RLELossless}[how]
        image.compress(syntax, generate_instance_uid=False)
        data = bytearray(image.PixelData)
        data[60:-8] = bytes((7 * i + 3) % 251 for i in range(len(data) - 68))
        image.PixelData = bytes(data)
    elif how.startswith("lying"):
        syntax, marker, at = (JPEGLSLossless, b"\xff\xf7", 5) if how == "lying jls" else (JPEG2000Lossless, b"\xff\x51", 6)
        image.compress(syntax, generate_instance_uid=False)
        data = bytearray(image.PixelData)
        place = data.index(marker) + at
        data[place : place + 4] = b"\x7f\xff\x7f\xff" if how == "lying jls" else b"\x00\x00\xff\xff"
        image.PixelData = bytes(data)


@pytest.mark.filterwarnings("ignore")  # pydicom warns of what is spoilt here
@pytest.mark.parametrize("how", ["truncated", "absent", "smaller", "garbage j2k", "garbage jls", "garbage rle", "lying jls", "lying j2k"])
def test_an_image_that_cannot_be_decoded_is_named_by_its_uid(tmp_path: Path, decoder: Decoder, how: str) -> None:
    stored = random_stored(np.random.default_rng(3), shape=(3, 64, 64))
    files = write_series(tmp_path, stored)
    selected = series_of(files)
    image = pydicom.dcmread(files[1])
    spoil(image, how)
    image.save_as(files[1])
    with pytest.raises(AnalysisFailed, match=r"2\.25\.7\.0\.2") as caught:
        read_volume(selected, decoder)
    assert "Doe" not in str(caught.value)


def test_a_transfer_syntax_that_nothing_decodes_is_a_refusal(tmp_path: Path) -> None:
    files = write_series(tmp_path, random_stored(np.random.default_rng(3)))
    image = pydicom.dcmread(files[1])
    image.file_meta.TransferSyntaxUID = "2.25.99"
    image.save_as(files[1])
    with pytest.raises(NotEligible) as caught:
        read_volume(series_of(files))
    assert caught.value.code == "transfer-syntax"


def test_a_size_beyond_the_limit_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    files = write_series(tmp_path, random_stored(np.random.default_rng(3)), Rows=65535, Columns=65535)
    with pytest.raises(NotEligible) as caught:
        read_volume(series_of(files))
    assert caught.value.code == "too-large"


def test_an_axial_volume_maps_its_first_pixel_to_the_first_images_position(tmp_path: Path) -> None:
    files = write_series(tmp_path, random_stored(np.random.default_rng(3)), orientation=AXIAL, origin=(-10.0, -20.0, -30.0))
    volume = read_volume(series_of(files))
    np.testing.assert_allclose(volume.to_lps(np.array([0.0, 0.0, 0.0])), [-10, -20, -30])
    np.testing.assert_allclose(volume.to_lps(np.array([1.0, 2.0, 3.0])), [-10 + 3 * 0.7, -20 + 2 * 0.8, -28])
