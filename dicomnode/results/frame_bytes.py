"""The functional groups of a SEG's frames as bytes (PS3.3 C.7.6.16), with the pixels behind them: the end of the file.

pydicom takes some milliseconds for the groups of one frame, and a SEG has thousands. Must never write anything else than pydicom would:
a test reads files and writes them again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pydicom import Dataset

from dicomnode.findings import Code
from dicomnode.results import codes

_LONG = ("OB", "SQ")  # PS3.5 7.1.2: two reserved bytes and a length of four
_PADDING = {"UI": b"\0", "OB": b"\0"}  # to even length, all else with a space (PS3.5 6.2)
_UNDEFINED = 0xFFFFFFFF


def place(image: Dataset, number: int | None) -> tuple[bytes, bytes]:
    """Return where a frame lies: the elements before its Frame Content, and those behind.

    `image` is the plane that it was derived from (see `provenance.source_images`), `number` which frame of it.
    """
    source = [_text(0x00081150, "UI", str(image.SOPClassUID)), _text(0x00081155, "UI", str(image.SOPInstanceUID))]
    source += [] if number is None else [_text(0x00081160, "IS", str(number))]
    source += [_text(0x0028135A, "CS", "YES"), _coded(0x0040A170, codes.SOURCE_IMAGE)]  # Spatial Locations Preserved, Purpose of Reference
    derivation = _sequence(0x00082112, [b"".join(source)]) + _coded(0x00089215, codes.SEGMENTED)
    position = b""
    if "ImagePositionPatient" in image:
        said = "\\".join(getattr(value, "original_string", None) or str(value) for value in image.ImagePositionPatient)
        position = _sequence(0x00209113, [_text(0x00200032, "DS", said)])
    return _sequence(0x00089124, [derivation]), position


def frame(where: tuple[bytes, bytes], dimension_index: Sequence[int], segment: int | None) -> bytes:
    """Return the groups of one frame; `segment` is None where no frame, or all of them, belong to one."""
    content = _sequence(0x00209111, [_element(0x00209157, "UL", struct.pack(f"<{len(dimension_index)}L", *dimension_index))])
    belongs = b"" if segment is None else _sequence(0x0062000A, [_element(0x0062000B, "US", struct.pack("<H", segment))])
    return where[0] + content + where[1] + belongs


def ending(frames: Sequence[bytes], pixels: bytes, *, encapsulated: bool) -> bytes:
    """Return Per-Frame Functional Groups Sequence and Pixel Data, the last elements of a SEG."""
    header = struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OB", 0, _UNDEFINED if encapsulated else len(pixels))
    delimiter = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0) if encapsulated else b""
    return b"".join((_sequence(0x52009230, frames), header, pixels, delimiter))


def _element(tag: int, vr: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += _PADDING.get(vr, b" ")
    form, reserved = ("<HH2sHL", (0,)) if vr in _LONG else ("<HH2sH", ())
    return struct.pack(form, tag >> 16, tag & 0xFFFF, vr.encode(), *reserved, len(value)) + value


def _text(tag: int, vr: str, value: str) -> bytes:
    return _element(tag, vr, value.encode("ascii"))


def _sequence(tag: int, items: Sequence[bytes]) -> bytes:
    return _element(tag, "SQ", b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item for item in items))


def _coded(tag: int, code: Code) -> bytes:
    words = ((0x00080100, "SH", code.value), (0x00080102, "SH", code.scheme), (0x00080104, "LO", code.meaning))
    return _sequence(tag, [b"".join(_text(*word) for word in words)])
