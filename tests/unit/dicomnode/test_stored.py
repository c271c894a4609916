"""Headers of stored files: the same data set as pydicom reads, or a sentence; and where the pixels lie."""

import io
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from ct_series import slice_dataset, write_series
from dimse_cases import SHARED_DATA
from hypothesis import HealthCheck, given, settings, strategies as st
from pydicom.datadict import tag_for_keyword
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode.analysis.headers import HeaderReader
from dicomnode.analysis.stored import Unreadable, pixels_of

WANTED = {
    tag_for_keyword(keyword) or 0
    for keyword in ("Rows", "RescaleSlope", "ImagePositionPatient", "SOPInstanceUID", "PatientID", "PixelPaddingValue")
}
META = b"\0" * 128 + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", 20)
EXPLICIT = META + b"1.2.840.10008.1.2.1\0"


def with_meta(data: bytes, syntax: bytes = b"1.2.840.10008.1.2.1\0") -> bytes:
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(syntax)) + syntax + data


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_a_header_is_what_pydicom_reads(tmp_path: Path, syntax: str | None) -> None:
    (file,) = write_series(tmp_path, np.zeros((1, 5, 6), np.int16))
    image = pydicom.dcmread(file)
    item = pydicom.Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    image.ReferencedImageSequence = [item, item]
    image["ReferencedImageSequence"].is_undefined_length = True
    image.SpecificCharacterSet, image.PatientName = "ISO_IR 192", "Müller^Jürgen"
    image.PixelPaddingValue = -2000  # which no implicit VR says to be signed
    if syntax:
        image.file_meta.TransferSyntaxUID = syntax
        image.PixelData = bytes(60)
        pydicom.dcmwrite(file, image, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian)
    else:
        image.save_as(file)
    read = HeaderReader(WANTED).read(file)
    again = pydicom.dcmread(file, stop_before_pixels=True)
    assert read == again
    assert read.file_meta == again.file_meta
    assert (str(read.PatientName), read.PixelPaddingValue) == ("Müller^Jürgen", -2000)
    place = pixels_of(file)
    assert place is not None
    assert (place.length, place.transfer_syntax_uid) == (60, again.file_meta.TransferSyntaxUID)


@pytest.mark.realdata
def test_headers_of_odd_files_are_pydicoms_or_refused() -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    refused = []
    reader = HeaderReader(WANTED)
    for file in sorted((SHARED_DATA / "odd_files").rglob("*.dcm")):
        try:
            read = reader.read(file)
        except Unreadable:
            refused.append(file.name)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = pydicom.dcmread(file, stop_before_pixels=True)
            assert read == again, file
    assert len(refused) == 8, refused


def test_a_value_set_in_one_header_is_set_in_that_one_alone(tmp_path: Path) -> None:
    first, second = (HeaderReader(WANTED).read(file) for file in write_series(tmp_path, np.zeros((2, 5, 6), np.int16)))
    first.Rows, first.RescaleSlope = 7, 2
    assert (second.Rows, second.RescaleSlope) == (5, 1)


def test_a_wanted_value_that_is_malformed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(EXPLICIT + struct.pack("<HH2sH", 0x28, 0x10, b"US", 3) + b"abc")
    assert "Rows" not in HeaderReader(WANTED).read(tmp_path / "x")


def nested(depth: int) -> bytes:
    opening = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closing = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return EXPLICIT + opening * depth + closing * depth


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no DICOM file"),
        (nested(400), "nest deeper than 64"),
        (nested(64)[:-3], "cut off"),
        (EXPLICIT + struct.pack("<HH2sHI", 8, 0x1140, b"OB", 0, 0xFFFFFFFE) + b"x", "cut off"),
        (EXPLICIT + struct.pack("<HH2sHI", 8, 0x1140, b"OB", 0, 0xFFFFFFFF) + b"x", "does not allow"),
        (EXPLICIT + struct.pack("<HH2sH", 8, 0x1140, b"??", 0), "no known VR"),
        (with_meta(zlib.compress(bytes(100)), b"1.2.840.10008.1.2.1.99"), "not deflated"),
        (b"\0" * 128 + b"DICM" + struct.pack("<HH2sH", 8, 0x10, b"UI", 0), "no transfer syntax"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_with_a_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Unreadable, match=reason):
        HeaderReader(WANTED).read(tmp_path / "x")


def test_a_deflated_header_larger_than_any_is_refused(tmp_path: Path) -> None:
    endless = struct.pack("<HH2sHI", 9, 0x10, b"OB", 0, 2**30) + bytes(2**26)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    (tmp_path / "x").write_bytes(with_meta(deflater.compress(endless) + deflater.flush(), b"1.2.840.10008.1.2.1.99"))
    with pytest.raises(Unreadable, match="too large"):
        HeaderReader(WANTED).read(tmp_path / "x")


@pytest.mark.filterwarnings("ignore")  # pydicom warns of values
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_stands_in_a_file_is_a_header_or_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    (file,) = write_series(tmp_path, np.zeros((1, 2, 2), np.int16))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(128, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        HeaderReader(WANTED).read(file)
        pixels_of(file)
    except Unreadable:
        pass


def encoded(image: pydicom.Dataset, syntax: str) -> bytes:
    image.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer, image, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian, enforce_file_format=True
    )
    return buffer.getvalue()


@cache
def series_of(syntax: str) -> list[bytes]:
    """Headers of two series as a scanner writes them: most is the same, numbers and UIDs have other lengths, a sequence differs."""
    images = []
    for k in range(6):
        image = slice_dataset(np.zeros((2, 3), np.int16), np.array([-10.0, -20.0, -30.5 + 3 * k]), 7 + k, spacing=(0.5, 0.5))
        image.Manufacturer, image.KVP, image.AcquisitionTime, image.XRayTubeCurrent = "ACME", 120, f"1200{k:02}", 99 + k // 2
        image.SeriesInstanceUID = f"2.25.6.{k // 3}"
        image.add_new(0x00090010, "LO", "ACME")
        image.add_new(0x00091001, "OB", bytes(range(20)))
        item = pydicom.Dataset()
        item.ReferencedSOPInstanceUID = f"1.2.3.{k // 4}"
        image.ReferencedImageSequence = [item, item]
        image["ReferencedImageSequence"].is_undefined_length = True
        images.append(encoded(image, syntax))
    return images


def read_as(reader: HeaderReader, file: Path) -> object:
    """What a reader says of a file: its elements as they are encoded or converted, and its pixels' place; or why not."""
    try:
        header = reader.read(file)
    except Unreadable as refusal:
        return str(refusal)
    elements = {tag: (header.get_item(tag).VR, repr(header.get_item(tag).value)) for tag in header.keys()}  # noqa: SIM118  as they are
    meta = {tag: header.file_meta.get_item(tag).value for tag in header.file_meta.keys()}  # noqa: SIM118
    return elements, meta, header.pixels, header.original_encoding, header.original_character_set


@pytest.mark.filterwarnings("ignore")  # pydicom warns of values
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_is_read_among_others_as_it_is_alone(tmp_path: Path, syntax: str, data: st.DataObject) -> None:
    series, reader = series_of(syntax), HeaderReader(WANTED)
    for content in series[: data.draw(st.integers(1, 4))]:
        (tmp_path / "x").write_bytes(content)
        reader.read(tmp_path / "x")
    for _ in range(3):
        content = bytearray(data.draw(st.sampled_from(series)))
        for _ in range(data.draw(st.integers(0, 3))):
            place = data.draw(st.integers(128, len(content) - 1))
            content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        (tmp_path / "x").write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        assert read_as(reader, tmp_path / "x") == read_as(HeaderReader(WANTED), tmp_path / "x")


def test_what_files_have_in_common_is_one_object(tmp_path: Path) -> None:
    reader = HeaderReader(WANTED)
    headers = [reader.read(file) for file in write_series(tmp_path, np.zeros((4, 5, 6), np.int16))]
    assert headers[2]["RescaleSlope"] is headers[3]["RescaleSlope"]
    assert [header.ImagePositionPatient[2] for header in headers] == [-30, -28, -26, -24]


def test_a_file_in_another_character_set_is_read_in_that_one(tmp_path: Path) -> None:
    reader, names = HeaderReader(WANTED | {tag_for_keyword("PatientName") or 0}), []
    for number, charset in enumerate(["ISO_IR 100", "ISO_IR 100", "ISO_IR 101", "ISO_IR 100"]):
        (file,) = write_series(tmp_path / str(number), np.zeros((1, 5, 6), np.int16), SpecificCharacterSet=charset)
        file.write_bytes(file.read_bytes().replace(b"Doe^Jane", b"\xa3\xb3e^Jane"))
        names.append(str(reader.read(file).PatientName))
    assert names == ["£³e^Jane", "£³e^Jane", "Łłe^Jane", "£³e^Jane"]
