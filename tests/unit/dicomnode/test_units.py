"""Stored values to units: what each kind of image means by its numbers, in the narrowest type that holds them exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from ct_series import write_series
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import frames_of, read_headers
from dicomnode.analysis.units import PixelFormat, Units, convert
from dicomnode.analysis.volume import read_voxels

FILM: dict[str, Any] = {"Modality": "DX", "RescaleSlope": None, "RescaleIntercept": None}


def values(folder: Path, stored: NDArray[Any], *, projection: bool = False, **attributes: Any) -> NDArray[Any]:
    return read_voxels(frames_of(read_headers(write_series(folder, stored, **attributes))), projection=projection)


def test_values_beyond_int16_make_the_whole_volume_float32(tmp_path: Path) -> None:
    stored = np.array([[[0, 40000]], [[5, 6]]], dtype=np.uint16)
    read = values(tmp_path, stored, RescaleIntercept=0)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, stored.astype(np.float32))


def test_16_unsigned_bits_are_int16_where_the_values_fit(tmp_path: Path) -> None:
    stored = np.array([[[0, 33791]], [[5, 6]]], dtype=np.uint16)
    read = values(tmp_path, stored, RescaleIntercept=-1024)
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, stored.astype(np.int32) - 1024)


def test_a_slope_makes_float32_rounded_once(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.uint16).reshape(2, 3, 4) * 2711
    read = values(tmp_path, stored, Modality="PT", RescaleSlope="0.3333333", RescaleIntercept="0.1")
    np.testing.assert_array_equal(read, (stored * 0.3333333 + 0.1).astype(np.float32))


def test_mr_without_rescale_keeps_its_values(tmp_path: Path) -> None:
    stored = np.arange(12, dtype=np.uint16).reshape(2, 2, 3)
    np.testing.assert_array_equal(values(tmp_path, stored, Modality="MR", RescaleSlope=None, RescaleIntercept=None), stored)


def test_ct_without_rescale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotEligible) as caught:
        values(tmp_path, np.zeros((2, 2, 2), np.uint16), RescaleSlope=None)
    assert caught.value.code == "not-hu"


@pytest.mark.parametrize("signed", [True, False])
def test_a_film_in_monochrome1_is_turned_round(tmp_path: Path, signed: bool) -> None:
    stored = np.array([[[0, 1, 100], [2047, -2048 if signed else 4095, 7]]], dtype=np.int16 if signed else np.uint16)
    more = FILM | {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    read = values(tmp_path, stored, projection=True, **more)
    np.testing.assert_array_equal(read, (-1 if signed else 4095) - stored.astype(np.int32))


def test_the_photometric_sense_of_a_series_is_not_its_values(tmp_path: Path) -> None:
    stored = np.arange(8, dtype=np.uint16).reshape(2, 2, 2)
    np.testing.assert_array_equal(values(tmp_path, stored, PhotometricInterpretation="MONOCHROME1"), stored.astype(np.int32) - 1024)


def test_padding_of_a_film_is_its_smallest_value(tmp_path: Path) -> None:
    stored = np.array([[[4095, 200], [300, 4095]]], dtype=np.uint16)
    more = FILM | {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "PixelPaddingValue": 4095}
    assert values(tmp_path, stored, projection=True, **more).tolist() == [[[3795, 3895], [3795, 3795]]]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_modality_lut_maps_what_is_outside_to_its_ends(tmp_path: Path, photometric: str) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, 10, 16], "US"
    table["LUTDescriptor"].VR = "US"
    table.add_new("LUTData", "OW", np.array([100, 90, 50, 0], dtype="<u2").tobytes())
    stored = np.array([[[0, 10, 11], [12, 13, 4000]]], dtype=np.uint16)
    more = FILM | {"PhotometricInterpretation": photometric, "ModalityLUTSequence": [table]}
    expected = np.array([[[100, 100, 90], [50, 0, 0]]])
    read = values(tmp_path, stored, projection=True, **more)
    np.testing.assert_array_equal(read, 100 - expected if photometric == "MONOCHROME1" else expected)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("signed", [True, False])
def test_big_endian_pixels_are_pydicoms(tmp_path: Path, bits: int, signed: bool) -> None:
    stored = np.random.default_rng(1).integers(0, 100, (2, 4, 6)).astype(f"{'i' if signed else 'u'}{bits // 8}")
    files = write_series(tmp_path, stored, BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1, RescaleIntercept=0)
    for file, plane in zip(files, stored, strict=True):
        image = pydicom.dcmread(file)
        image.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        words = plane.view(np.uint16) if bits == 8 else plane
        image.PixelData = words.byteswap().tobytes()
        pydicom.dcmwrite(file, image, implicit_vr=False, little_endian=False)
    np.testing.assert_array_equal(read_voxels(frames_of(read_headers(files)), projection=False), stored)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_int16_in_place_is_the_sum_or_does_not_fit(data: st.DataObject) -> None:
    bits, signed = data.draw(st.integers(2, 16)), data.draw(st.booleans())
    pixels = PixelFormat(rows=1, columns=5, bits_allocated=16, bits_stored=bits, signed=signed)
    inverted, intercept = data.draw(st.booleans()), data.draw(st.integers(-40000, 40000))
    low, high = pixels.bounds
    stored = np.array([data.draw(st.lists(st.integers(low, high), min_size=5, max_size=5))], dtype=pixels.dtype)
    expected = (low + high - stored.astype(np.int64) if inverted else stored.astype(np.int64)) + intercept
    units = Units(slope=1.0, intercept=float(intercept), lookup=None, padding=None, outside=None, inverted=inverted)
    out = stored.view(np.int16)
    fits = convert(stored, pixels, units, out)
    assert fits == (expected.min() >= -32768 and expected.max() <= 32767) or units.fits_int16(pixels) is True
    if fits:
        np.testing.assert_array_equal(out, expected)
