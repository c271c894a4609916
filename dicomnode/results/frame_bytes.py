"""What a SEG has many of, as bytes: functional groups of frames (PS3.3 C.7.6.16), references, what segments are called.

pydicom takes some milliseconds for the groups of one frame, and a SEG has thousands. Must never write anything else than pydicom would:
a test reads files and writes them again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from dicomnode.findings import Code
from dicomnode.results import codes
from dicomnode.results.provenance import Plane

_LONG = ("OB", "SQ", "UT")  # PS3.5 7.1.2: two reserved bytes and a length of four
_PADDING = {"UI": b"\0", "OB": b"\0"}  # to even length, all else with a space (PS3.5 6.2)
_UNDEFINED = 0xFFFFFFFF
_SHORT_HEADER, _LONG_HEADER = struct.Struct("<HH2sH").pack, struct.Struct("<HH2sHL").pack
_ITEM, _SEQUENCE_OF_ONE = struct.Struct("<HHL").pack, struct.Struct("<HH2sHLHHL").pack


def references(planes: Sequence[Plane]) -> bytes:
    """Return a reference to each image once, as the items of a sequence (PS3.3 10.8)."""
    return items(_image(plane) for plane in {plane.sop_instance_uid: plane for plane in planes}.values())


def referenced_series(series_instance_uid: str, images: bytes) -> bytes:
    """Return one item of a Referenced Series Sequence with `images` (see `references`) in it."""
    return items([_element(0x0008114A, "SQ", images) + _text(0x0020000E, "UI", series_instance_uid)])


def place(plane: Plane) -> tuple[bytes, bytes]:
    """Return where a frame lies: the elements before its Frame Content, and those behind."""
    source = _image(plane)
    source += b"" if plane.frame_number is None else _text(0x00081160, "IS", str(plane.frame_number))
    derivation = _sequence(0x00082112, [source + _DERIVED_FROM]) + _SEGMENTED
    position = b"" if plane.position is None else _sequence(0x00209113, [_text(0x00200032, "DS", plane.position)])
    return _sequence(0x00089124, [derivation]), position


def frame(where: tuple[bytes, bytes], dimension_index: Sequence[int], belongs: bytes = b"") -> bytes:
    """Return the groups of one frame; `belongs` says to which segment (see `segment`), unless none, or all frames, belong to one."""
    content, pack = _content(len(dimension_index))
    return where[0] + content + pack(*dimension_index) + where[1] + belongs


def segment(number: int) -> bytes:
    """Return the group that says which segment a frame belongs to."""
    return _sequence(0x0062000A, [_element(0x0062000B, "US", struct.pack("<H", number))])


def segment_values(number: int, label: str, colour: Sequence[int], tracking_uid: str, tracking_id: str) -> dict[int, bytes]:
    """Return the elements in which segments of one kind differ (PS3.3 C.8.20.2, C.8.20.4) by their tags."""
    return {
        0x00620004: _element(0x00620004, "US", struct.pack("<H", number)),
        0x00620005: _text(0x00620005, "LO", label),
        0x0062000D: _element(0x0062000D, "US", struct.pack("<3H", *colour)),
        0x00620020: _text(0x00620020, "UT", tracking_id),
        0x00620021: _text(0x00620021, "UI", tracking_uid),
    }


def ending(frames: Sequence[bytes], pixels: Sequence[bytes | memoryview], *, encapsulated: bool) -> tuple[bytes | memoryview, ...]:
    """Return Per-Frame Functional Groups Sequence and Pixel Data, the last elements of a SEG, in parts."""
    header = _LONG_HEADER(0x7FE0, 0x0010, b"OB", 0, _UNDEFINED if encapsulated else sum(map(len, pixels)))
    delimiter = [_ITEM(0xFFFE, 0xE0DD, 0)] if encapsulated else []
    return _sequence(0x52009230, frames), header, *pixels, *delimiter


def _image(plane: Plane) -> bytes:
    return _sop_class(plane.sop_class_uid) + _text(0x00081155, "UI", plane.sop_instance_uid)


@cache
def _sop_class(uid: str) -> bytes:
    return _text(0x00081150, "UI", uid)


@cache
def _content(indices: int) -> tuple[bytes, Callable[..., bytes]]:
    """Frame Content up to its values, the Dimension Index Values, which are its end; and how these are packed."""
    content = _sequence(0x00209111, [_element(0x00209157, "UL", bytes(4 * indices))])
    return content[: -4 * indices], struct.Struct(f"<{indices}L").pack


def _element(tag: int, vr: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += _PADDING.get(vr, b" ")
    if vr in _LONG:
        return _LONG_HEADER(tag >> 16, tag & 0xFFFF, vr.encode(), 0, len(value)) + value
    return _SHORT_HEADER(tag >> 16, tag & 0xFFFF, vr.encode(), len(value)) + value


def _text(tag: int, vr: str, value: str) -> bytes:
    return _element(tag, vr, value.encode("ascii"))


def _sequence(tag: int, contents: Sequence[bytes]) -> bytes:
    if len(contents) > 1:
        return _element(tag, "SQ", items(contents))
    (content,) = contents  # as thousands have it
    return _SEQUENCE_OF_ONE(tag >> 16, tag & 0xFFFF, b"SQ", 0, len(content) + 8, 0xFFFE, 0xE000, len(content)) + content


def items(contents: Iterable[bytes]) -> bytes:
    """Return the items of a sequence, each of its length."""
    return b"".join(part for content in contents for part in (_ITEM(0xFFFE, 0xE000, len(content)), content))


def _coded(tag: int, code: Code) -> bytes:
    words = ((0x00080100, "SH", code.value), (0x00080102, "SH", code.scheme), (0x00080104, "LO", code.meaning))
    return _sequence(tag, [b"".join(_text(*word) for word in words)])


_DERIVED_FROM = _text(0x0028135A, "CS", "YES") + _coded(0x0040A170, codes.SOURCE_IMAGE)  # Spatial Locations Preserved, Purpose of Reference
_SEGMENTED = _coded(0x00089215, codes.SEGMENTED)
