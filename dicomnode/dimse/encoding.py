"""Walk an encoded data set from its first byte to its last (PS3.5 section 7 and annex A), and say what stands there.

Libraries that read DICOM forgive what is cut off or mislabelled; this walk refuses it, because what is acknowledged must be
readable later. It copies the few values it is asked for and only measures everything else: pixel data is never copied.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from pydicom.datadict import dictionary_VR

from dicomnode.dimse.contexts import TransferSyntax
from dicomnode.errors import CannotUnderstand, PixelDataTooShort

Encoded = bytes | mmap.mmap  # an encoded data set, in memory or mapped from its file

MAXIMUM_DEPTH: Final = 64  # sequences inside sequences
UNDEFINED_LENGTH: Final = 0xFFFFFFFF

ITEM: Final = 0xFFFEE000
ITEM_DELIMITER: Final = 0xFFFEE00D
SEQUENCE_DELIMITER: Final = 0xFFFEE0DD
FLOAT_PIXEL_DATA: Final = 0x7FE00008
DOUBLE_PIXEL_DATA: Final = 0x7FE00009
PIXEL_DATA: Final = 0x7FE00010

# PS3.5 7.1.2: VRs whose length has 32 bits after two reserved bytes, and those whose length has 16 bits.
_LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT_VRS: Final = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())


@dataclass(kw_only=True)
class Contents:
    """What a walk has met so far. It is filled as the walk goes, so it tells something of a broken data set too."""

    values: dict[int, bytes] = field(default_factory=dict)  # top-level values that were asked for
    nested_values: dict[tuple[int, int], bytes] = field(default_factory=dict)  # (sequence, element) -> first value
    native_lengths: dict[int, int] = field(default_factory=dict)  # top-level pixel data elements -> bytes
    fragments: int | None = None  # of top-level encapsulated pixel data, without the Basic Offset Table


def walk(
    data: Encoded, syntax: TransferSyntax, contents: Contents, *, wanted: frozenset[int], nested: frozenset[tuple[int, int]] = frozenset()
) -> None:
    """Walk `data`, encoded in `syntax`, to its last byte and fill `contents` on the way.

    `wanted` names top-level elements, `nested` pairs of a top-level sequence and an element of its items.

    Raises:
        CannotUnderstand: an element is cut off, has an odd or impossible length or an unknown VR, or nests too deep.
        PixelDataTooShort: encapsulated pixel data lacks its item structure or its sequence delimiter (PS3.5 A.4).
    """
    _Walk(data, syntax, contents, wanted, nested).elements(0, len(data), syntax.explicit_vr, (), delimited=False)


@lru_cache(maxsize=8192)
def _is_sequence(tag: int) -> bool:
    """Whether the data dictionary says that an element is a sequence; private and unknown ones are not."""
    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:
        return False


class _Walk:
    """The state of one walk over one data set."""

    def __init__(
        self, data: Encoded, syntax: TransferSyntax, contents: Contents, wanted: frozenset[int], nested: frozenset[tuple[int, int]]
    ) -> None:
        order = "<" if syntax.little_endian else ">"
        self._data = data
        self._contents = contents
        self._wanted = wanted
        self._nested = nested
        self._encapsulated = syntax.pixels != "native"
        self._tag_and_32 = struct.Struct(order + "HHL").unpack_from
        self._tag_and_16 = struct.Struct(order + "HH2sH").unpack_from
        self._32 = struct.Struct(order + "L").unpack_from

    def elements(self, position: int, end: int, explicit: bool, path: tuple[int, ...], *, delimited: bool) -> int:
        """Walk elements from `position` to `end`, or to the item delimiter if `delimited`; return where they end."""
        if len(path) > MAXIMUM_DEPTH:
            raise CannotUnderstand(f"sequences nest deeper than {MAXIMUM_DEPTH}")
        while delimited or position < end:
            tag, vr, length, position = self._header(position, end, explicit)
            if tag == ITEM_DELIMITER and delimited and length == 0:
                return position
            if tag >> 16 <= 0x0007 or tag >> 16 == 0xFFFE:
                raise CannotUnderstand("an element of a group that no data set may have")
            if length == UNDEFINED_LENGTH:
                position = self._undefined(tag, vr, position, end, explicit, path)
                continue
            if length & 1 and (path or tag != PIXEL_DATA):  # some devices leave out the byte that pads their pixel data
                raise CannotUnderstand("an element has an odd length")
            if length > end - position:
                raise CannotUnderstand("the data set is cut off, or a length is wrong")
            if vr == b"SQ" or (not explicit and length and _is_sequence(tag)):
                self._items(position, position + length, explicit, (*path, tag), delimited=False)
            else:
                self._keep(tag, position, length, path)
            position += length
        return position

    def _header(self, position: int, end: int, explicit: bool) -> tuple[int, bytes, int, int]:
        """Return (tag, VR or b"", value length, where the value begins) of the element at `position`."""
        if end - position < 8:
            raise CannotUnderstand("the data set is cut off within an element")
        group, element, length = self._tag_and_32(self._data, position)
        tag = group << 16 | element
        if not explicit or group == 0xFFFE:
            return tag, b"", length, position + 8
        _, _, vr, length = self._tag_and_16(self._data, position)
        if vr in _SHORT_VRS:
            return tag, vr, length, position + 8
        if vr not in _LONG_VRS:
            raise CannotUnderstand("an element has no known VR: other transfer syntax?")
        if end - position < 12:
            raise CannotUnderstand("the data set is cut off within an element")
        return tag, vr, self._32(self._data, position + 8)[0], position + 12

    def _undefined(self, tag: int, vr: bytes, position: int, end: int, explicit: bool, path: tuple[int, ...]) -> int:
        """Walk a value of undefined length: encapsulated pixel data or a sequence; return where it ends."""
        if tag == PIXEL_DATA:
            if not self._encapsulated:
                raise PixelDataTooShort("encapsulated pixel data in a native transfer syntax")
            fragments, position = self._fragments(position, end)
            if not path:
                self._contents.fragments = fragments
            return position
        if explicit and vr not in {b"SQ", b"UN"}:
            raise CannotUnderstand("an undefined length that its VR does not allow")
        return self._items(position, end, explicit and vr == b"SQ", (*path, tag), delimited=True)  # UN: PS3.5 6.2.2 note 2

    def _items(self, position: int, end: int, explicit: bool, path: tuple[int, ...], *, delimited: bool) -> int:
        """Walk the items of a sequence to `end`, or to the sequence delimiter if `delimited`; return where they end."""
        while delimited or position < end:
            tag, _, length, position = self._header(position, end, explicit=False)
            if tag == SEQUENCE_DELIMITER and delimited and length == 0:
                return position
            if tag != ITEM:
                raise CannotUnderstand("a sequence holds something that is no item")
            if length == UNDEFINED_LENGTH:
                position = self.elements(position, end, explicit, path, delimited=True)
            elif length > end - position:
                raise CannotUnderstand("an item is cut off, or its length is wrong")
            else:
                position = self.elements(position, position + length, explicit, path, delimited=False)
        return position

    def _fragments(self, position: int, end: int) -> tuple[int, int]:
        """Walk the items of encapsulated pixel data; return (fragments after the Basic Offset Table, where they end)."""
        items = 0
        while end - position >= 8:
            tag, _, length, position = self._header(position, end, explicit=False)
            if tag == SEQUENCE_DELIMITER and length == 0:
                if items == 0:
                    raise PixelDataTooShort("encapsulated pixel data without an offset table")
                return items - 1, position
            if tag != ITEM or length & 1 or length > end - position:
                break
            items += 1
            position += length
        raise PixelDataTooShort("encapsulated pixel data is cut off or not in items")

    def _keep(self, tag: int, position: int, length: int, path: tuple[int, ...]) -> None:
        """Copy a value that was asked for; of pixel data note the length alone."""
        if not path and tag in {PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA}:
            self._contents.native_lengths[tag] = length
        elif not path and tag in self._wanted:
            if tag in self._contents.values:
                raise CannotUnderstand("an element that identifies the object occurs twice")
            self._contents.values[tag] = self._data[position : position + length]
        elif len(path) == 1 and (path[0], tag) in self._nested:
            self._contents.nested_values.setdefault((path[0], tag), self._data[position : position + length])
