"""Data sets made to hurt: what lies, nests, repeats or is deflated is refused, in bounded time and memory."""

from __future__ import annotations

import gzip
import mmap
import struct
import threading
import time
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from dimse_cases import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT, a_dataset, deflated, encapsulated, encoded, received
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dicomnode.dimse import encoding
from dicomnode.dimse.contexts import transfer_syntax
from dicomnode.dimse.encoding import Contents, Limits, inflate, walk
from dicomnode.dimse.scp import part10_prefix, read_header
from dicomnode.errors import CannotUnderstand, PixelDataTooShort, StoreRefused

UNDEFINED = b"\xff\xff\xff\xff"
ITEM = b"\xfe\xff\x00\xe0"
OPEN_ITEM = ITEM + UNDEFINED
CLOSE_ITEM = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00"
CLOSE_SEQUENCE = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
ELEMENT = b"\xff\x00\x01\x00CS\x02\x00A "
IMPLICIT_ELEMENT = b"\xff\x00\x01\x00\x02\x00\x00\x00A "
SQ = b"\xf0\x7f\x01\x00SQ\x00\x00"
UN = b"\xf0\x7f\x01\x00UN\x00\x00"
OB = b"\xf0\x7f\x01\x00OB\x00\x00"
OPEN_SQ = SQ + UNDEFINED
IMPLICIT_SQ = b"\x40\x00\x75\x02"  # Request Attributes Sequence


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def elements(data: bytes, syntax: str = EXPLICIT, **limits: int) -> Contents:
    """Walk bytes that need not be an image."""
    row = transfer_syntax(syntax)
    assert row is not None
    contents = Contents()
    walk(data, row, contents, wanted=frozenset({0x00100010}), nested=frozenset({(0x7FF00001, 0x00FF0001)}), limits=Limits(**limits))
    return contents


def refuse(data: bytes, syntax: str = EXPLICIT, **limits: int) -> str:
    with pytest.raises(CannotUnderstand) as caught:
        elements(data, syntax, **limits)
    assert str(caught.value).isascii()
    assert len(str(caught.value)) <= 64
    return str(caught.value)


def test_the_pieces_are_sound():
    """What the other tests put wrongly together is read when it is put together rightly."""
    inner = OPEN_SQ + OPEN_ITEM + ELEMENT + CLOSE_ITEM + ITEM + u32(len(ELEMENT)) + ELEMENT + CLOSE_SEQUENCE
    assert elements(inner).nested_values == {(0x7FF00001, 0x00FF0001): b"A "}
    assert elements(SQ + u32(len(inner) + 8) + ITEM + u32(len(inner)) + inner).nested_values == {}
    assert elements(UN + UNDEFINED + OPEN_ITEM + IMPLICIT_ELEMENT + CLOSE_ITEM + CLOSE_SEQUENCE).nested_values
    assert elements(UN + u32(4) + b"\xff\xff\xff\xff" + OB + u32(0)).values == {}
    big_endian = b"\x7f\xf0\x00\x01UN\x00\x00" + UNDEFINED
    unknown = OPEN_ITEM + IMPLICIT_ELEMENT + CLOSE_ITEM + ITEM + u32(10) + IMPLICIT_ELEMENT + CLOSE_SEQUENCE  # always little endian
    assert elements(big_endian + unknown + b"\x7f\xf0\x00\x02US\x00\x02\x00\x01", BIG_ENDIAN).nested_values
    implicit = OPEN_ITEM + IMPLICIT_ELEMENT + CLOSE_ITEM
    assert elements(IMPLICIT_SQ + UNDEFINED + implicit + CLOSE_SEQUENCE, IMPLICIT)
    assert elements(IMPLICIT_SQ + u32(len(implicit)) + implicit, IMPLICIT)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(CLOSE_ITEM, id="item delimiter outside an item"),
        pytest.param(CLOSE_SEQUENCE, id="sequence delimiter outside a sequence"),
        pytest.param(ITEM + u32(len(ELEMENT)) + ELEMENT, id="item outside a sequence"),
        pytest.param(OPEN_SQ + ELEMENT + CLOSE_SEQUENCE, id="element without an item"),
        pytest.param(OPEN_SQ + OPEN_ITEM + ELEMENT + CLOSE_SEQUENCE, id="item without an end"),
        pytest.param(OPEN_SQ + OPEN_ITEM + CLOSE_ITEM, id="sequence without an end"),
        pytest.param(OPEN_SQ + OPEN_ITEM + CLOSE_ITEM + CLOSE_ITEM, id="two ends of one item"),
        pytest.param(OPEN_SQ + CLOSE_SEQUENCE + CLOSE_SEQUENCE, id="two ends of one sequence"),
        pytest.param(OPEN_SQ + OPEN_ITEM + CLOSE_ITEM[:-4] + u32(2) + b"ab" + CLOSE_SEQUENCE, id="item delimiter with a value"),
        pytest.param(OPEN_SQ + CLOSE_SEQUENCE[:-4] + u32(2) + b"ab", id="sequence delimiter with a value"),
        pytest.param(OPEN_SQ + ITEM + u32(18) + ELEMENT + CLOSE_ITEM + CLOSE_SEQUENCE, id="delimiter in an item that says its length"),
        pytest.param(SQ + u32(18) + OPEN_ITEM + ELEMENT + CLOSE_ITEM, id="delimiter beyond the sequence"),
        pytest.param(SQ + u32(16) + OPEN_ITEM + CLOSE_SEQUENCE + CLOSE_ITEM, id="delimiters crossed"),
        pytest.param(SQ + u32(19) + ITEM + u32(11) + ELEMENT + b"x", id="odd sequence"),
        pytest.param(SQ + u32(18) + ITEM + u32(12) + ELEMENT + ELEMENT, id="item longer than its sequence"),
        pytest.param(SQ + u32(18) + ITEM + u32(8) + ELEMENT, id="element longer than its item"),
        pytest.param(SQ + u32(18) + ITEM + UNDEFINED + ELEMENT, id="item that ends with its sequence"),
        pytest.param(SQ + u32(4) + ITEM, id="half an item's header"),
        pytest.param(OPEN_SQ + OPEN_SQ + CLOSE_SEQUENCE + CLOSE_SEQUENCE, id="sequence as an item"),
        pytest.param(UN + UNDEFINED + OPEN_ITEM + ELEMENT + CLOSE_ITEM + CLOSE_SEQUENCE, id="UN that is explicit within"),
        pytest.param(UN + UNDEFINED + bytes(64), id="UN of undefined length that is no sequence"),
        pytest.param(UN + UNDEFINED + OPEN_ITEM + IMPLICIT_ELEMENT + CLOSE_ITEM, id="UN without an end"),
        pytest.param(OB + UNDEFINED + OPEN_ITEM + CLOSE_ITEM + CLOSE_SEQUENCE, id="undefined length of OB"),
        pytest.param(OB + u32(0xFFFFFFFE) + b"ab", id="4 GiB"),
        pytest.param(OB + u32(3) + b"abc", id="odd OB"),
        pytest.param(OB[:-2], id="half a header"),
        pytest.param(OB, id="a header without its length"),
        pytest.param(b"\xff\x00\x01\x00UT\x00\x00" + u32(7) + b"abcdefg", id="odd UT"),
        pytest.param(b"\x00\x00\x00\x00UL\x04\x00" + u32(0), id="command element"),
        pytest.param(b"\x02\x00\x10\x00UI\x00\x00", id="file meta information"),
        pytest.param(b"\xfe\xff\x0d\xe0UI\x00\x00", id="delimiter with a VR"),
        pytest.param(b"\xff\xff\x01\x00UI\x00\x00", id="group FFFF"),
        pytest.param(b"\x10\x00\x10\x00PN\x00\x00" * 2, id="two patients"),
        pytest.param(b"\xe0\x7f\x10\x00OW\x00\x00\x00\x00\x00\x00" * 2, id="pixel data twice"),
    ],
)
def test_what_does_not_fit_together_is_refused(data):
    refuse(ELEMENT + data)
    refuse(OPEN_SQ + OPEN_ITEM + data + CLOSE_ITEM + CLOSE_SEQUENCE + data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(IMPLICIT_SQ + u32(10) + IMPLICIT_ELEMENT, id="no item"),
        pytest.param(IMPLICIT_SQ + UNDEFINED + OPEN_ITEM + CLOSE_ITEM, id="no end"),
        pytest.param(IMPLICIT_SQ + u32(16) + OPEN_ITEM + IMPLICIT_ELEMENT[:8], id="cut off"),
        pytest.param(b"\xff\x00\x01\x00" + u32(3) + b"abc", id="odd length"),
        pytest.param(b"\xff\x00\x01\x00" + u32(0xFFFFFFFE) + b"ab", id="4 GiB"),
        pytest.param(b"\xff\x00\x01\x00" + UNDEFINED + b"ab", id="undefined length of no sequence"),
        pytest.param(CLOSE_ITEM, id="delimiter"),
        pytest.param(b"\x02\x00\x10\x00" + u32(0), id="file meta information"),
        pytest.param(b"\xff\x00", id="half a header"),
    ],
)
def test_what_does_not_fit_together_without_vrs_is_refused_too(data):
    refuse(IMPLICIT_ELEMENT + data, IMPLICIT)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_nesting_is_refused_however_it_is_written(syntax):
    innermost = Dataset()
    innermost.PatientName = "Doe^Jane"
    for _ in range(8):
        outer = Dataset()
        outer.RequestAttributesSequence = Sequence([innermost])
        innermost = outer
    assert elements(encoded(innermost, syntax), syntax, maximum_nesting=8)
    assert "8" not in refuse(encoded(innermost, syntax), syntax, maximum_nesting=7)


def test_a_million_nested_openings_are_refused_at_once():
    refuse((OPEN_SQ + OPEN_ITEM) * 1_000_000)
    refuse((UN + UNDEFINED + OPEN_ITEM) + (IMPLICIT_SQ + UNDEFINED + OPEN_ITEM) * 1_000_000)


MANY = 100  # each of these has so many elements, items or fragments, sequences included


@pytest.mark.parametrize(
    ("data", "syntax"),
    [
        pytest.param(ELEMENT * MANY, EXPLICIT, id="elements"),
        pytest.param(IMPLICIT_ELEMENT * MANY, IMPLICIT, id="implicit elements"),
        pytest.param((OB + u32(0)) * MANY, EXPLICIT, id="long elements"),
        pytest.param((SQ + u32(0)) * MANY, EXPLICIT, id="empty sequences"),
        pytest.param((IMPLICIT_SQ + u32(0)) * MANY, IMPLICIT, id="implicit empty sequences"),
        pytest.param((OPEN_SQ + CLOSE_SEQUENCE) * MANY, EXPLICIT, id="empty open sequences"),
        pytest.param(OPEN_SQ + (ITEM + u32(0)) * (MANY - 1) + CLOSE_SEQUENCE, EXPLICIT, id="empty items"),
        pytest.param(OPEN_SQ + (OPEN_ITEM + CLOSE_ITEM) * (MANY - 1) + CLOSE_SEQUENCE, EXPLICIT, id="empty open items"),
        pytest.param(SQ + u32(8 * (MANY - 1)) + (ITEM + u32(0)) * (MANY - 1), EXPLICIT, id="items of a sequence with length"),
        pytest.param(OPEN_SQ + OPEN_ITEM + ELEMENT * (MANY - 2) + CLOSE_ITEM + CLOSE_SEQUENCE, EXPLICIT, id="nested elements"),
        pytest.param(
            ELEMENT * 30 + OPEN_SQ + (OPEN_ITEM + ELEMENT * 20 + CLOSE_ITEM) * 2 + CLOSE_SEQUENCE + ELEMENT * (MANY - 73),
            EXPLICIT,
            id="some of each",
        ),
        pytest.param(
            UN + UNDEFINED + OPEN_ITEM + IMPLICIT_ELEMENT * (MANY - 2) + CLOSE_ITEM + CLOSE_SEQUENCE, EXPLICIT, id="unknown elements"
        ),
        pytest.param(encapsulated(*[b""] * (MANY - 2)), "1.2.840.10008.1.2.4.90", id="fragments"),
    ],
)
def test_elements_items_and_fragments_are_counted_wherever_they_stand(data, syntax):
    assert elements(data, syntax, maximum_elements=MANY + 1)
    assert refuse(data, syntax, maximum_elements=MANY - 1) == "the data set has too many elements"


def test_more_elements_than_any_image_has_are_refused_by_default():
    limit = Limits().maximum_elements
    assert refuse(OPEN_SQ + (ITEM + u32(0)) * limit + CLOSE_SEQUENCE) == "the data set has too many elements"


def test_an_enhanced_image_of_many_frames_is_no_attack():
    """10,000 frames of 41 elements and items each: about what an enhanced CT with all its functional groups has."""
    frame = b"".join(OPEN_SQ + OPEN_ITEM + ELEMENT * 3 + CLOSE_ITEM + CLOSE_SEQUENCE for _ in range(8))
    groups = b"\x00\x52\x30\x92SQ\x00\x00" + UNDEFINED + (OPEN_ITEM + frame + CLOSE_ITEM) * 10_000 + CLOSE_SEQUENCE
    dataset = a_dataset("1.2.840.10008.5.1.4.1.1.2.1", NumberOfFrames=10_000, Rows=2, Columns=2, PixelData=None)
    pixels = b"\xe0\x7f\x10\x00OW\x00\x00" + u32(80_000) + bytes(80_000)
    data = encoded(dataset) + groups + pixels
    assert read_header(received(data, uid=dataset.SOPInstanceUID, sop_class=dataset.SOPClassUID), data, "").kind == "image"


def test_a_value_of_any_size_takes_no_memory():
    name = b"\x10\x00\x10\x00UT\x00\x00" + u32(1 << 26) + bytes(1 << 26)
    tracemalloc.start()
    assert len(elements(name).values[0x00100010]) == 4096
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "uid", ["1.2.3\r\n", "1.2.3\n", "1.2.3\x00", "\x001.2.3", "1.2.3\\4", "1.2.3;DROP", "<b>", "%2e%2e/", "-1", "1.2,3"]
)
def test_a_uid_is_digits_and_dots_in_the_command_and_in_the_data_set(uid):
    data = encoded(a_dataset(SOPInstanceUID=None))
    with pytest.raises(CannotUnderstand):
        read_header(received(data, uid=uid), data, "")
    value = uid.encode() + b"\x00" * (len(uid) % 2)
    for element in (b"\x20\x00\x0d\x00UI", b"\x20\x00\x0e\x00UI"):
        other = b"\x20\x00\x0e\x00UI" if element[2] == 0x0D else b"\x20\x00\x0d\x00UI"
        dataset = a_dataset(StudyInstanceUID=None, SeriesInstanceUID=None)
        tail = element + len(value).to_bytes(2, "little") + value + other + b"\x06\x001.2.3\x00"
        data = encoded(dataset) + tail
        if uid.strip("\x00") == "1.2.3":
            assert read_header(received(data, uid=dataset.SOPInstanceUID), data, "").study_instance_uid == "1.2.3"  # padding
        else:
            with pytest.raises(CannotUnderstand):
                read_header(received(data, uid=dataset.SOPInstanceUID), data, "")


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_an_empty_uid_is_no_uid(keyword):
    dataset = a_dataset()
    uid = dataset.SOPInstanceUID
    setattr(dataset, keyword, "")
    data = encoded(dataset)
    with pytest.raises(StoreRefused) as caught:
        read_header(received(data, uid=uid), data, "")
    assert caught.value.dimse_status == (0xA900 if keyword.startswith("SOP") else 0xC001)


# Deflated Explicit VR Little Endian (PS3.5 A.5)


def read_deflated(data: bytes, uid: str, **limits: int) -> str:
    return read_header(received(data, uid=uid, syntax=DEFLATED), data, "digest", limits=Limits(**limits)).patient_name


@pytest.mark.parametrize("size", [48, 262_100, 262_144, 262_146, 1_000_000])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_deflated_data_set_is_checked_as_what_it_inflates_to(size, level):
    dataset = a_dataset(PixelData=bytes(size))
    data = deflated(encoded(dataset), level)
    assert read_deflated(data, dataset.SOPInstanceUID) == "Doe^Jane"
    assert read_deflated(data + b"\x00", dataset.SOPInstanceUID) == "Doe^Jane"
    gzipped = gzip.compress(encoded(dataset), level)[10:]  # without gzip's header: dicom3tools writes data sets so
    assert read_deflated(gzipped, dataset.SOPInstanceUID) == "Doe^Jane"
    with pytest.raises(PixelDataTooShort):
        read_deflated(deflated(encoded(a_dataset(SOPInstanceUID="1.2.3", PixelData=bytes(46))), level), "1.2.3")
    with pytest.raises(CannotUnderstand):
        read_deflated(deflated(encoded(dataset)[:-2], level), dataset.SOPInstanceUID)


def test_a_deflated_object_is_stored_as_it_came_and_read_from_its_file(tmp_path: Path):
    dataset = a_dataset(PixelData=bytes(range(48)))
    data = deflated(encoded(dataset)) + b"\x00" * (len(deflated(encoded(dataset))) % 2)
    instance = received(data, uid=dataset.SOPInstanceUID, syntax=DEFLATED)
    prefix = part10_prefix(instance)
    read = pydicom.dcmread(BytesIO(prefix + data))
    assert (read.PatientName, read.PixelData) == ("Doe^Jane", bytes(range(48)))
    file = tmp_path / "object"
    file.write_bytes(prefix + data)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        header = read_header(instance, mapped, "digest", start=len(prefix))
    assert (header.patient_name, header.transfer_syntax_uid, header.dataset_sha256) == ("Doe^Jane", DEFLATED, "digest")


def test_no_part_of_a_deflated_data_set_passes_for_the_whole():
    dataset = a_dataset()
    data = deflated(encoded(dataset))
    for length in range(len(data)):
        with pytest.raises(CannotUnderstand):
            read_deflated(data[:length], dataset.SOPInstanceUID)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: deflated(data) + b"\x00\x00", id="two bytes after it"),
        pytest.param(lambda data: deflated(data) + b"x", id="no padding after it"),
        pytest.param(lambda data: deflated(data) + struct.pack("<LL", zlib.crc32(data) ^ 1, len(data)), id="wrong check sum after it"),
        pytest.param(lambda data: deflated(data) + struct.pack("<LL", zlib.crc32(data), len(data) + 1), id="wrong length after it"),
        pytest.param(lambda data: deflated(data) + struct.pack("<LLB", zlib.crc32(data), len(data), 0), id="more than the length after it"),
        pytest.param(lambda data: deflated(data) * 2, id="another stream after it"),
        pytest.param(zlib.compress, id="zlib format"),
        pytest.param(lambda data: data, id="not deflated"),
        pytest.param(lambda data: deflated(deflated(data)), id="deflated twice"),
        pytest.param(lambda data: deflated(b""), id="nothing"),
        pytest.param(lambda data: deflated(encoded(a_dataset(), IMPLICIT)), id="implicit"),
    ],
)
def test_what_is_not_deflated_as_it_should_be_is_refused(spoil):
    dataset = a_dataset()
    with pytest.raises(StoreRefused):
        read_deflated(spoil(encoded(dataset)), dataset.SOPInstanceUID)


def test_a_bomb_is_refused_before_it_is_inflated():
    limit = 4 << 20
    bomb = deflated(encoded(a_dataset()) + b"\xe1\x7f\x10\x00OB\x00\x00" + u32(1 << 30) + bytes(1 << 26), 9)
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(CannotUnderstand, match="too large when inflated"):
        read_deflated(bomb, "1.2.3", maximum_inflated_bytes=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit + (2 << 20)


def test_one_data_set_at_a_time_is_held_inflated(monkeypatch):
    limits, held, most = Limits(), [], []
    real, together = encoding.inflate, threading.Barrier(4)

    def watched(*given):
        held.append(1)
        time.sleep(0.01)
        most.append(len(held))
        data = real(*given)
        held.pop()
        return data

    def read():
        together.wait()
        dataset = a_dataset()
        data = deflated(encoded(dataset))
        read_header(received(data, uid=dataset.SOPInstanceUID, syntax=DEFLATED), data, "", limits=limits)

    monkeypatch.setattr(encoding, "inflate", watched)
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_the_limit_on_inflation_is_exact():
    data = bytes(1_000_000)
    assert inflate(deflated(data), 0, 1_000_000) == data
    with pytest.raises(CannotUnderstand):
        inflate(deflated(data), 0, 999_999)
    assert inflate(b"abc" + deflated(b"de"), 3, 2) == b"de"
