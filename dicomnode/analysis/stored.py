"""A stored object's header, and where its pixels lie in the file: one walk over the bytes before them.

What is walked came from anywhere, so the walk is strict, and what it costs is bounded: sequences nest so deep, a header is so large, a
deflated data set is inflated up to its pixels and no further. Must never read pixels, or convert a value that nobody asks for.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from pydicom.charset import convert_encodings
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.errors import BytesLengthException
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.valuerep import DSfloat

MAXIMUM_NESTING = 64  # as at reception
MAXIMUM_HEADER_BYTES = 32 * 2**20  # an enhanced image of 10,000 frames has some 20 MB
FIRST_READ_BYTES = 16384  # most headers are shorter
LONGEST_SHARED = 256  # bytes of a value of which files share one element; those of pydicom that are not converted yet cannot be changed

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_FIRST_PIXELS: Final = 0x7FE00008  # Float Pixel Data, then Double Float Pixel Data and Pixel Data
_PIXEL_DATA: Final = 0x7FE00010
_SYNTAX: Final = 0x00020010
_CHARACTER_SET: Final = 0x00080005
_LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # PS3.5 7.1.2: 32 bits of length after two reserved bytes
_SHORT_VRS: Final = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_VR_NAMES: Final = {vr: vr.decode() for vr in _LONG_VRS | _SHORT_VRS}

_Bytes = bytes | mmap.mmap
_Element = tuple[int, str | None, bytes, int]  # tag, VR, value, where the value begins
_Header = TypeVar("_Header", FileDataset, FileMetaDataset)
_Elements = dict[BaseTag, "DataElement | RawDataElement"]


class Unreadable(ValueError):
    """The bytes before the pixels are no well-formed data set, or more than the node reads of one."""


# What pydicom raises where a value is none of its VR.
CONVERTING_FAILS = (
    ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError, OSError, struct.error, BytesLengthException,
)  # fmt: skip


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


class HeaderReader:
    """Reads headers of files that have much in common, as those of a series have: equal bytes are converted once.

    Each data set has elements of its own, so that a value can be set in one alone; the values behind them are shared.
    """

    def __init__(self, wanted: Collection[int] = ()) -> None:
        """`wanted` are tags whose values are converted at once, and left out where that fails; the others when they are first asked for."""
        self._wanted = frozenset(wanted) | {_CHARACTER_SET}
        self._sequences = [_tag(tag) for tag in sorted(self._wanted) if _is_sequence(tag)]
        self._known: dict[tuple[int, str | None, bytes, int], RawDataElement | dict[str, Any] | None] = {}
        self._samples: dict[tuple[int, int], dict[str, Any]] = {}  # an element of each wanted tag as pydicom converted it
        self._codings: dict[tuple[bool, bool, bytes], int] = {}
        self._meta = FileMetaDataset()
        self._meta.set_original_encoding(False, True)
        self._headers: dict[tuple[bool, bool], FileDataset] = {}

    def read(self, file: Path) -> FileDataset:
        """Return the header of a file, without its pixels; its attribute `pixels` is the PixelPlace, or None.

        Raises:
            Unreadable: it is no well-formed DICOM file. OSError: it cannot be read.
        """
        meta, walk, syntax, size = _scan_file(file, keep=True)
        implicit, little = not walk.explicit, walk.little
        charset: str | list[str] = "iso8859"  # pydicom's own name of the default repertoire
        coding = self._coding(implicit, little, b"")
        elements: _Elements = {}
        for element in walk.kept:
            self._add(element, coding, charset, elements)
            if element[0] == _CHARACTER_SET and (named := elements.get(_tag(_CHARACTER_SET))):
                charset, coding = _encodings(named.value), self._coding(implicit, little, element[2])
        of_meta: _Elements = {}
        for element in meta.kept:
            self._add(element, self._coding(False, True, b""), "iso8859", of_meta)
        header = _alike(self._header(implicit, little), elements)
        header.file_meta = _alike(self._meta, of_meta)
        header.set_original_encoding(implicit, little, charset)
        header.__dict__["pixels"] = walk.place(syntax, size)
        for wanted in self._sequences:  # their items belong to one data set, so they are never shared
            if wanted in elements:
                try:
                    header[wanted]
                except CONVERTING_FAILS:
                    del elements[wanted]
        return header

    def _header(self, implicit: bool, little: bool) -> FileDataset:
        key = implicit, little
        if key not in self._headers:
            self._headers[key] = FileDataset("", {}, bytes(128), FileMetaDataset(), implicit, little)
        return self._headers[key]

    def _coding(self, implicit: bool, little: bool, charset: bytes) -> int:
        """Return a number for what, beside its bytes, makes a value; (implicit, little) are its last two bits."""
        return self._codings.setdefault((implicit, little, charset), len(self._codings) << 2 | implicit << 1 | little)

    def _add(self, element: _Element, coding: int, charset: str | list[str], elements: _Elements) -> None:
        """Add an element to those of a header: as it is encoded, or converted if it is wanted."""
        tag, vr, value, place = element
        key = tag, vr, value, coding
        try:
            known = self._known[key]
        except KeyError:
            known = RawDataElement(_tag(tag), vr, len(value), value, place, bool(coding & 2), bool(coding & 1))
            if tag in self._wanted and not _is_sequence(tag):
                try:
                    known = (
                        _number_or_uid(known, self._samples.get((tag, coding)))
                        or convert_raw_data_element(known, encoding=charset).__dict__
                    )
                    self._samples.setdefault((tag, coding), known)
                except CONVERTING_FAILS:
                    known = None
            if len(value) <= LONGEST_SHARED:
                self._known[key] = known
        if known is None:
            return
        if isinstance(known, RawDataElement):
            elements[known.tag] = known
            return
        own = DataElement.__new__(DataElement)  # its constructor would convert and validate once more
        own.__dict__.update(known)
        elements[own.tag] = own


def pixels_of(file: Path) -> PixelPlace | None:
    """Return where the pixel data of a file lies; None where it has none.

    Raises:
        Unreadable: it is no well-formed DICOM file. OSError: it cannot be read.
    """
    _, walk, syntax, size = _scan_file(file, keep=False)
    return walk.place(syntax, size)


def _scan_file(file: Path, *, keep: bool) -> tuple[_Walk, _Walk, UID, int]:
    """Walk a file up to its pixels; return the walks over file meta information and data set, transfer syntax and the file's size."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        start = os.read(descriptor, FIRST_READ_BYTES)
        try:
            return *_scan(start, whole=len(start) == size, keep=keep), size
        except _Short:
            with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
                return *_scan(mapped, whole=True, keep=keep), size
    finally:
        os.close(descriptor)


def _scan(data: _Bytes, *, whole: bool, keep: bool) -> tuple[_Walk, _Walk, UID]:
    if data[128:132] != b"DICM":
        raise Unreadable("it is no DICOM file")
    meta = _Walk(data, explicit=True, little=True, whole=whole, keep=True)
    position = meta.elements(132, group=2)
    syntaxes = [value for tag, _, value, _ in meta.kept if tag == _SYNTAX]
    if not syntaxes or not syntaxes[0]:
        raise Unreadable("its file meta information names no transfer syntax")
    syntax = _uid(syntaxes[0])
    if syntax == DeflatedExplicitVRLittleEndian:
        return meta, _walk_inflated(data, position, whole=whole, keep=keep), syntax
    walk = _Walk(data, explicit=syntax != ImplicitVRLittleEndian, little=syntax != ExplicitVRBigEndian, whole=whole, keep=keep)
    walk.elements(position)
    return meta, walk, syntax


def _walk_inflated(data: _Bytes, start: int, *, whole: bool, keep: bool) -> _Walk:
    """Walk a deflated data set, inflating four times as much until the walk reaches the pixels (PS3.5 A.5)."""
    enough = 4 * FIRST_READ_BYTES
    while True:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            inflated = inflater.decompress(data[start : start + enough], enough)
        except zlib.error as error:
            raise Unreadable("its data set is not deflated, or damaged") from error
        walk = _Walk(inflated, explicit=True, little=True, whole=inflater.eof, keep=keep)
        try:
            walk.elements(0)
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


class _Walk:
    """One walk over elements up to the pixel data; what is kept are the values of the data set itself, sequences as their bytes."""

    def __init__(self, data: _Bytes, *, explicit: bool, little: bool, whole: bool, keep: bool) -> None:
        self.kept: list[_Element] = []
        self.pixels: tuple[int, int, int | None, str] | None = None  # tag, where it begins, length, VR
        self.explicit = explicit
        self.little = little
        self._data = data
        self._whole = whole
        self._keep = keep
        order = "<" if little else ">"
        self._tag_and_32 = struct.Struct(order + "HHL").unpack_from
        self._tag_vr_16 = struct.Struct(order + "HH2sH").unpack_from
        self._32 = struct.Struct(order + "L").unpack_from

    def place(self, transfer_syntax_uid: UID, file_bytes: int) -> PixelPlace | None:
        """Return where the pixels are that the walk ended at."""
        if self.pixels is None:
            return None
        tag, offset, length, vr = self.pixels
        return PixelPlace(tag=tag, offset=offset, length=length, vr=vr, transfer_syntax_uid=transfer_syntax_uid, file_bytes=file_bytes)

    def elements(self, position: int, group: int | None = None) -> int:  # noqa: PLR0912  the hot loop: each header passes through it
        """Walk to the pixel data, or the end, or the end of `group`; return where that is."""
        data, size, explicit, keep, kept = self._data, len(self._data), self.explicit, self._keep, self.kept
        header = self._tag_vr_16 if explicit else self._tag_and_32
        begin, previous, vr = position, -1, b""
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
            if tag >= _FIRST_PIXELS or (group is not None and high != group):
                if _FIRST_PIXELS <= tag <= _PIXEL_DATA:
                    self.pixels = tag, position, None if length == _UNDEFINED else length, name or "OW"
                return start
            if tag <= previous:
                raise Unreadable("its elements are not in order")
            previous = tag
            if length == _UNDEFINED:
                following = self._undefined(position, name, explicit=explicit, depth=0)
                end = following - 8
            else:
                end = following = position + length
                if end > size:
                    self._cut_off()
                if name == "SQ" or (not explicit and length and _is_sequence(tag)):
                    self._items(position, end, explicit=explicit, depth=1)
            if following - begin > MAXIMUM_HEADER_BYTES:
                raise Unreadable("its header is too large")
            if keep:
                kept.append((tag, name or ("SQ" if length == _UNDEFINED else None), data[position:end], position))
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
            elif vr == "SQ" or (vr is None and length and _is_sequence(tag)):
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


def _number_or_uid(raw: RawDataElement, sample: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what pydicom makes of a number or UID, without its checks of form; None where it is something else. Each file has a few."""
    if sample is None or not raw.value or sample["VR"] not in {"UI", "DS"} or not raw.value.isascii():
        return None
    text = raw.value.decode("ascii").rstrip(" \0")
    if sample["VR"] == "UI":
        return None if "\\" in text else sample | {"_value": UID(text, validation_mode=IGNORE)}
    parts = text.split("\\")
    try:
        return sample | {"_value": MultiValue(_number, parts) if len(parts) > 1 else _number(text)}
    except ValueError:
        return None


def _number(text: str) -> DSfloat:
    return DSfloat(text, validation_mode=IGNORE)


def _alike(empty: _Header, elements: _Elements) -> _Header:
    """Return a data set of these elements, otherwise like an empty one; pydicom's constructors set 40 attributes one by one."""
    made = empty.__class__.__new__(empty.__class__)
    made.__dict__.update({name: value.copy() if isinstance(value, dict) else value for name, value in empty.__dict__.items()})
    made.__dict__["_dict"] = elements
    return made


def _encodings(value: object) -> str | list[str]:
    """Return Python's names of the character sets; the default repertoire where there is no such."""
    try:
        names = convert_encodings(value or None)  # type: ignore[arg-type]  # it takes what the element holds
    except (LookupError, TypeError, ValueError, AttributeError):
        return "iso8859"
    return names


@lru_cache(maxsize=4096)
def _is_sequence(tag: int) -> bool:
    """Whether the data dictionary calls the element a sequence, for data sets that don't say so."""
    try:
        return not tag >> 16 & 1 and dictionary_VR(tag) == "SQ"
    except KeyError:
        return False


@lru_cache(maxsize=4096)
def _tag(number: int) -> BaseTag:
    return BaseTag(number)


@lru_cache(maxsize=4096)
def _uid(value: bytes) -> UID:
    return UID(value.decode("ascii", "replace").rstrip("\0 "), validation_mode=IGNORE)
