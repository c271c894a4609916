"""The functional groups of a SEG's frames as bytes (PS3.3 C.7.6.16), with the pixels behind them: the end of the file.

pydicom takes some milliseconds for the groups of one frame, and a SEG has thousands. Must never write anything else than pydicom would:
a test reads files and writes them again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import cache

from dicomnode.findings import Code
from dicomnode.results import codes
from dicomnode.results.provenance import Plane

_LONG = ("OB", "SQ")  # PS3.5 7.1.2: two reserved bytes and a length of four
_PADDING = {"UI": b"\0", "OB": b"\0"}  # to even length, all else with a space (PS3.5 6.2)
_UNDEFINED = 0xFFFFFFFF


def references(planes: Sequence[Plane]) -> bytes:
    """Return a reference to each image once, as the items of a sequence (PS3.3 10.8)."""
    images = {plane.sop_instance_uid: plane for plane in planes}.values()
    return _items(_text(0x00081150, "UI", plane.sop_class_uid) + _text(0x00081155, "UI", plane.sop_instance_uid) for plane in images)


def referenced_series(series_instance_uid: str, images: bytes) -> bytes:
    """Return one item of a Referenced Series Sequence with `images` (see `references`) in it."""
    return _items([_element(0x0008114A, "SQ", images) + _text(0x0020000E, "UI", series_instance_uid)])


def place(plane: Plane) -> tuple[bytes, bytes]:
    """Return where a frame lies: the elements before its Frame Content, and those behind."""
    source = _text(0x00081150, "UI", plane.sop_class_uid) + _text(0x00081155, "UI", plane.sop_instance_uid)
    source += b"" if plane.frame_number is None else _text(0x00081160, "IS", str(plane.frame_number))
    derivation = _sequence(0x00082112, [source + _DERIVED_FROM]) + _SEGMENTED
    position = b"" if plane.position is None else _sequence(0x00209113, [_text(0x00200032, "DS", plane.position)])
    return _sequence(0x00089124, [derivation]), position


def frame(where: tuple[bytes, bytes], dimension_index: Sequence[int], belongs: bytes = b"") -> bytes:
    """Return the groups of one frame; `belongs` says to which segment (see `segment`), unless none, or all frames, belong to one."""
    values = struct.pack(f"<{len(dimension_index)}L", *dimension_index)
    return where[0] + _content(len(dimension_index)) + values + where[1] + belongs


def segment(number: int) -> bytes:
    """Return the group that says which segment a frame belongs to."""
    return _sequence(0x0062000A, [_element(0x0062000B, "US", struct.pack("<H", number))])


def ending(frames: Sequence[bytes], pixels: bytes | memoryview, *, encapsulated: bool) -> tuple[bytes | memoryview, ...]:
    """Return Per-Frame Functional Groups Sequence and Pixel Data, the last elements of a SEG, in parts."""
    header = struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OB", 0, _UNDEFINED if encapsulated else len(pixels))
    delimiter = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0) if encapsulated else b""
    return _sequence(0x52009230, frames), header, pixels, delimiter


@cache
def _content(indices: int) -> bytes:
    """Frame Content up to its values, the Dimension Index Values: they are its end."""
    return _sequence(0x00209111, [_element(0x00209157, "UL", bytes(4 * indices))])[: -4 * indices]


def _element(tag: int, vr: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += _PADDING.get(vr, b" ")
    form, reserved = ("<HH2sHL", (0,)) if vr in _LONG else ("<HH2sH", ())
    return struct.pack(form, tag >> 16, tag & 0xFFFF, vr.encode(), *reserved, len(value)) + value


def _text(tag: int, vr: str, value: str) -> bytes:
    return _element(tag, vr, value.encode("ascii"))


def _sequence(tag: int, items: Iterable[bytes]) -> bytes:
    return _element(tag, "SQ", _items(items))


def _items(items: Iterable[bytes]) -> bytes:
    return b"".join(part for item in items for part in (struct.pack("<HHL", 0xFFFE, 0xE000, len(item)), item))


def _coded(tag: int, code: Code) -> bytes:
    words = ((0x00080100, "SH", code.value), (0x00080102, "SH", code.scheme), (0x00080104, "LO", code.meaning))
    return _sequence(tag, [b"".join(_text(*word) for word in words)])


_DERIVED_FROM = _text(0x0028135A, "CS", "YES") + _coded(0x0040A170, codes.SOURCE_IMAGE)  # Spatial Locations Preserved, Purpose of Reference
_SEGMENTED = _coded(0x00089215, codes.SEGMENTED)
