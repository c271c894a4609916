"""A stored object's header, and where its pixels lie in the file: one walk over the bytes before them.

What is walked came from anywhere, so the walk is strict, and what it costs is bounded: sequences nest so deep, a header is so large, a
deflated data set is inflated up to its pixels and no further. Files of a series are nearly equal: where the bytes of elements that
were walked before stand again, the walk jumps over them. Must never read pixels, or convert a value.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from dicomnode.analysis.likeness import TRANSFER_SYNTAX, Element, Likeness, Piece, Run, piece_of

MAXIMUM_NESTING = 64  # as at reception
MAXIMUM_HEADER_BYTES = 32 * 2**20  # an enhanced image of 10,000 frames has some 20 MB
FIRST_READ_BYTES = 16384  # most headers are shorter

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_FIRST_PIXELS: Final = 0x7FE00008  # Float Pixel Data, then Double Float Pixel Data and Pixel Data
_PIXEL_DATA: Final = 0x7FE00010
_LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # PS3.5 7.1.2: 32 bits of length after two reserved bytes
_SHORT_VRS: Final = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_VR_NAMES: Final = {vr: vr.decode() for vr in _LONG_VRS | _SHORT_VRS}
_STRUCTS: Final = {
    little: tuple(struct.Struct(order + form).unpack_from for form in ("HHL", "HH2sH", "L"))
    for little, order in ((True, "<"), (False, ">"))
}

_Bytes = bytes | mmap.mmap


class Unreadable(ValueError):
    """The bytes before the pixels are no well-formed data set, or more than the node reads of one."""


class _Short(Exception):
    """The walk needs more bytes than it was given."""


class PixelPlace(NamedTuple):
    """Where a file's pixel data lies, and how it is encoded."""

    tag: int
    offset: int  # of the first byte of the value, or of the first item; of a deflated data set among the inflated bytes
    length: int | None  # None: encapsulated
    vr: str  # OB or OW; of Implicit VR OW (PS3.5 A.1)
    transfer_syntax_uid: UID
    file_bytes: int


def pixels_of(file: Path) -> PixelPlace | None:
    """Return where the pixel data of a file lies; None where it has none.

    Raises:
        Unreadable: it is no well-formed DICOM file. OSError: it cannot be read.
    """
    return walk_file(file, keep=False).pixels


class Walked(NamedTuple):
    """A walked file."""

    meta: Walk  # over the file meta information
    data_set: Walk
    pixels: PixelPlace | None


def walk_file(file: Path, likeness: Likeness | None = None, *, keep: bool = True) -> Walked:
    """Walk a file up to its pixels, without `keep` for these alone. Raises what `pixels_of` raises."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        start = os.read(descriptor, FIRST_READ_BYTES)
        try:
            meta, data_set, syntax = _walk(start, likeness, whole=len(start) == size, keep=keep)
        except _Short:
            with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
                meta, data_set, syntax = _walk(mapped, likeness, whole=True, keep=keep)
        return Walked(meta, data_set, data_set.place(syntax, size))
    finally:
        os.close(descriptor)


def _walk(data: _Bytes, likeness: Likeness | None, *, whole: bool, keep: bool) -> tuple[Walk, Walk, UID]:
    if data[128:132] != b"DICM":
        raise Unreadable("it is no DICOM file")
    meta = Walk(data, 132, explicit=True, little=True, whole=whole, keep=True, group=2)
    position = meta.over(likeness.meta if likeness else ())
    syntaxes = [element.value for element in meta.kept if element.tag == TRANSFER_SYNTAX]
    if not syntaxes or not syntaxes[0]:
        raise Unreadable("its file meta information names no transfer syntax")
    syntax = _uid(syntaxes[0])
    if syntax == DeflatedExplicitVRLittleEndian:
        return meta, _walk_inflated(data, position, whole=whole, keep=keep), syntax
    explicit, little = syntax != ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    data_set = Walk(data, position, explicit=explicit, little=little, whole=whole, keep=keep)
    data_set.over(likeness.data_set(syntax) if likeness else ())
    if likeness and not likeness.recognise(meta.jumped, data_set.jumped):
        likeness.learn(meta.pieces(), data_set.pieces(), syntax)
    return meta, data_set, syntax


def _walk_inflated(data: _Bytes, start: int, *, whole: bool, keep: bool) -> Walk:
    """Walk a deflated data set, inflating four times as much until the walk reaches the pixels (PS3.5 A.5)."""
    enough = 4 * FIRST_READ_BYTES
    while True:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            inflated = inflater.decompress(data[start : start + enough], enough)
        except zlib.error as error:
            raise Unreadable("its data set is not deflated, or damaged") from error
        walk = Walk(inflated, 0, explicit=True, little=True, whole=inflater.eof, keep=keep)
        try:
            walk.over()
        except _Short:
            if len(inflated) < enough and start + enough < len(data):
                pass  # it hardly shrank when it was deflated: more of it is needed
            elif len(inflated) < enough:
                if not whole:
                    raise
                raise Unreadable("its deflated data set is cut off") from None
            if enough >= MAXIMUM_HEADER_BYTES:
                raise Unreadable("its header is too large") from None
            enough *= 4
        else:
            return walk


class Walk:
    """One walk over elements up to the pixel data; what is kept are the values of the data set itself, sequences as their bytes."""

    def __init__(
        self, data: _Bytes, start: int, *, explicit: bool, little: bool, whole: bool, keep: bool, group: int | None = None
    ) -> None:
        self.kept: list[Element] = []
        self.jumped: list[Run] = []
        self._jumped_at: list[int] = []
        self.explicit = explicit
        self.little = little
        self._pixels: tuple[int, int, int | None, str] | None = None  # tag, where it begins, length, VR
        self._data = data
        self._start = self._end = start
        self._group = group  # the walk ends with it
        self._previous = -1  # tag
        self._whole = whole
        self._keep = keep
        self._tag_and_32, self._tag_vr_16, self._32 = _STRUCTS[little]

    def place(self, transfer_syntax_uid: UID, file_bytes: int) -> PixelPlace | None:
        """Return where the pixels are that the walk ended at."""
        if self._pixels is None:
            return None
        tag, offset, length, vr = self._pixels
        return PixelPlace(tag=tag, offset=offset, length=length, vr=vr, transfer_syntax_uid=transfer_syntax_uid, file_bytes=file_bytes)

    def over(self, runs: Sequence[Run] = ()) -> int:
        """Walk to the pixel data, or the end, or the end of the group; return where that is.

        Where a run stands between what comes before it and what follows, it is jumped over, as if it had been walked.
        """
        position = self._start
        for run in runs:
            position = self._elements(position, run.first)
            end = position + len(run.content)
            if self._data[position:end] == run.content:
                self.jumped.append(run)
                self._jumped_at.append(position)
                self._previous, position = run.last, end
        self._end = self._elements(position, _FIRST_PIXELS)
        return self._end

    def pieces(self) -> list[Piece | None]:
        """Return what was walked or jumped over, in the file's order; None for an element that no run may have."""
        parts: dict[int, Element | Run] = {element.start: element for element in self.kept}
        parts.update(zip(self._jumped_at, self.jumped, strict=True))
        pieces: list[Piece | None] = []
        for start, end in pairwise((*sorted(parts), self._end)):
            part = parts[start]
            pieces += part.pieces if isinstance(part, Run) else [piece_of(part, self._data, end)]
        return pieces

    def _elements(self, position: int, until: int) -> int:  # noqa: PLR0912  the hot loop: each header passes through it
        """Walk to the first element that isn't below the tag `until`, or to the pixel data, or the end, or the end of the group."""
        data, size, explicit, keep, kept, group = self._data, len(self._data), self.explicit, self._keep, self.kept, self._group
        header = self._tag_vr_16 if explicit else self._tag_and_32
        vr = b""
        name: str | None = None
        while position < size:
            start = position
            if position + 12 > size:
                self._check_header(position)
            if explicit:
                high, low, vr, length = header(data, position)
                position += 8
                if vr in _LONG_VRS:
                    length = self._32(data, position)[0]
                    position += 4
                elif vr not in _SHORT_VRS:
                    if group is not None and high != group:
                        return start
                    raise Unreadable("an element has no known VR")
                name = _VR_NAMES[vr]
            else:
                high, low, length = header(data, position)
                position += 8
            tag = high << 16 | low
            if tag >= until or (group is not None and high != group):
                if _FIRST_PIXELS <= tag <= _PIXEL_DATA:
                    self._pixels = tag, position, None if length == _UNDEFINED else length, name or "OW"
                return start
            if tag <= self._previous:
                raise Unreadable("its elements are not in order")
            self._previous = tag
            if length == _UNDEFINED:
                following = self._undefined(position, name, explicit=explicit, depth=0)
                end = following - 8
            else:
                end = following = position + length
                if end > size:
                    self._cut_off()
                if name == "SQ" or (not explicit and length and is_sequence(tag)):
                    self._items(position, end, explicit=explicit, depth=1)
            if following - self._start > MAXIMUM_HEADER_BYTES:
                raise Unreadable("its header is too large")
            if keep:
                kept.append(Element(tag, name or ("SQ" if length == _UNDEFINED else None), data[position:end], start, position))
            position = following
        if not self._whole:
            raise _Short
        return position

    def _check_header(self, position: int) -> None:
        """See that the fewer than 12 bytes that are left are the header of an element."""
        left = len(self._data) - position
        if left < 8 or (self.explicit and self._data[position + 4 : position + 6] in _LONG_VRS):
            self._cut_off()

    def _header(self, position: int, *, explicit: bool) -> tuple[int, str | None, int, int]:
        """Return (tag, VR, length, where the value begins) of an element or item at `position`."""
        if position + 12 > len(self._data):
            self._check_header(position)
        if not explicit:
            group, element, length = self._tag_and_32(self._data, position)
            return group << 16 | element, None, length, position + 8
        group, element, vr, length = self._tag_vr_16(self._data, position)
        tag = group << 16 | element
        if group == 0xFFFE:
            return tag, None, self._32(self._data, position + 4)[0], position + 8
        if vr in _SHORT_VRS:
            return tag, _VR_NAMES[vr], length, position + 8
        if vr not in _LONG_VRS:
            raise Unreadable("an element has no known VR")
        return tag, _VR_NAMES[vr], self._32(self._data, position + 8)[0], position + 12

    def _undefined(self, position: int, vr: str | None, *, explicit: bool, depth: int) -> int:
        """Walk an element of undefined length; return where it ends."""
        if vr not in {None, "SQ", "UN"}:
            raise Unreadable("an undefined length that its VR does not allow")
        return self._items(position, None, explicit=explicit and vr != "UN", depth=depth + 1)  # of UN implicit: PS3.5 6.2.2 note 2

    def _items(self, position: int, end: int | None, *, explicit: bool, depth: int) -> int:
        """Walk items to `end`, or to the sequence's delimiter."""
        if depth > MAXIMUM_NESTING:
            raise Unreadable(f"its sequences nest deeper than {MAXIMUM_NESTING}")
        while end is None or position < end:
            tag, _, length, position = self._header(position, explicit=False)
            if tag == _SEQUENCE_END and end is None and not length:
                return position
            if tag != _ITEM:
                raise Unreadable("a sequence holds something that is no item")
            position = self._item(position, None if length == _UNDEFINED else position + length, explicit=explicit, depth=depth)
        if position != end:
            raise Unreadable("an item is longer than its sequence")
        return position

    def _item(self, position: int, end: int | None, *, explicit: bool, depth: int) -> int:
        """Walk the elements of an item to `end`, or to its delimiter."""
        if end is not None and end > len(self._data):
            self._cut_off()
        while end is None or position < end:
            tag, vr, length, position = self._header(position, explicit=explicit)
            if tag == _ITEM_END and end is None and not length:
                return position
            if length == _UNDEFINED:
                position = self._undefined(position, vr, explicit=explicit, depth=depth)
            elif vr == "SQ" or (vr is None and length and is_sequence(tag)):
                position = self._items(position, position + length, explicit=explicit, depth=depth + 1)
            else:
                position += length
        if position != end:
            raise Unreadable("an element is longer than its item")
        return position

    def _cut_off(self) -> None:
        if self._whole:
            raise Unreadable("it is cut off")
        raise _Short


@lru_cache(maxsize=4096)
def is_sequence(tag: int) -> bool:
    """Whether the data dictionary calls the element a sequence, for data sets that don't say so."""
    try:
        return not tag >> 16 & 1 and dictionary_VR(tag) == "SQ"
    except KeyError:
        return False


@lru_cache(maxsize=4096)
def _uid(value: bytes) -> UID:
    return UID(value.decode("ascii", "replace").rstrip("\0 "), validation_mode=IGNORE)
