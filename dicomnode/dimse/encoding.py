"""Walk an encoded data set from its first byte to its last (PS3.5 section 7 and annex A), and say what stands there.

Libraries that read DICOM forgive what is cut off or mislabelled; this walk refuses it, because what is acknowledged must be
readable later. It copies the few values it is asked for and only measures everything else: pixel data is never copied.
Every received image passes through here, so an element costs one unpacked struct and a few comparisons, and the time and
memory that hostile bytes can take are bounded by Limits.
"""

from __future__ import annotations

import mmap
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from typing import Final

from pydicom._dicom_dict import DicomDictionary, RepeatersDictionary  # the public functions answer for one element only

from dicomnode.dimse.contexts import TransferSyntax
from dicomnode.errors import CannotUnderstand, PixelDataTooShort

Encoded = bytes | mmap.mmap  # an encoded data set, in memory or mapped from its file

UNDEFINED_LENGTH: Final = 0xFFFFFFFF

ITEM: Final = 0xFFFEE000
ITEM_DELIMITER: Final = 0xFFFEE00D
SEQUENCE_DELIMITER: Final = 0xFFFEE0DD
FLOAT_PIXEL_DATA: Final = 0x7FE00008
DOUBLE_PIXEL_DATA: Final = 0x7FE00009
PIXEL_DATA: Final = 0x7FE00010

# PS3.5 7.1.2: VRs whose length has 32 bits after two reserved bytes, and those whose length has 16 bits.
_LONG_VRS: Final = tuple(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT_VRS: Final = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())

_PIXELS: Final = frozenset({FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA, PIXEL_DATA})
_NO_ELEMENTS: Final[frozenset[int]] = frozenset()
_LONGEST_VALUE: Final = 4096  # bytes copied of a value; no UID is longer than 64, and of a text less is shown
_INFLATE_STEP: Final = 65536

_CUT_OFF: Final = "the data set is cut off within an element"
_WRONG_LENGTH: Final = "the data set is cut off, or a length is wrong"
_ODD_LENGTH: Final = "an element has an odd length"
_WRONG_GROUP: Final = "an element of a group that no data set may have"
_TOO_MANY: Final = "the data set has too many elements"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a data set is read before it is refused."""

    maximum_nesting: int = 64  # sequences inside sequences; 64 at most: each takes two frames of the stack
    maximum_elements: int = 4_000_000  # elements, items and fragments; a SEG of 50,000 frames has 1.5 million
    maximum_inflated_bytes: int = 512 * 1024 * 1024  # of a deflated data set, which is inflated in memory
    # one at a time, or so many associations would take that memory so many times
    inflating: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)


@dataclass(kw_only=True)
class Contents:
    """What a walk has met so far. It is filled as the walk goes, so it tells something of a broken data set too."""

    values: dict[int, bytes] = field(default_factory=dict)  # top-level values that were asked for, their first 4096 bytes
    nested_values: dict[tuple[int, int], bytes] = field(default_factory=dict)  # (sequence, element) -> first value
    native_lengths: dict[int, int] = field(default_factory=dict)  # top-level pixel data elements -> bytes
    fragments: int | None = None  # of top-level encapsulated pixel data, without the Basic Offset Table


def walk(
    data: Encoded,
    syntax: TransferSyntax,
    contents: Contents,
    *,
    wanted: frozenset[int],
    nested: frozenset[tuple[int, int]] = frozenset(),
    start: int = 0,
    limits: Limits = Limits(),
) -> None:
    """Walk the data set that begins at `start` of `data`, encoded in `syntax`, to the last byte and fill `contents` on the way.

    `wanted` names top-level elements, `nested` pairs of a top-level sequence and an element of its items. A deflated data
    set is inflated first; of those that share `limits`, one at a time.

    Raises:
        CannotUnderstand: an element is cut off, has an odd or impossible length or an unknown VR, something nests too deep,
            there is too much of it, or a deflated stream is broken.
        PixelDataTooShort: encapsulated pixel data lacks its item structure or its sequence delimiter (PS3.5 A.4).
    """
    if not syntax.deflated:
        _Walk(data, syntax, contents, wanted, nested, limits).data_set(start)
        return
    with limits.inflating:
        inflated = inflate(data, start, limits.maximum_inflated_bytes)
        _Walk(inflated, syntax, contents, wanted, nested, limits).data_set(0)
        del inflated


def inflate(data: Encoded, start: int, maximum_bytes: int) -> bytes:
    """Inflate the deflated data set that begins at `start` (PS3.5 A.5), holding hardly more than `maximum_bytes` of it.

    What may follow the stream is one padding byte, or the check sum and length that gzip writes and dicom3tools leaves there.

    Raises:
        CannotUnderstand: it isn't a deflate stream, is cut off, becomes too large, or something else follows it.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)  # without the header and check sum of zlib
    inflated = BytesIO()  # its value is taken without a copy
    position = start
    pending = b""
    try:
        while not inflater.eof:
            if not pending:
                pending = data[position : position + _INFLATE_STEP]
                position += len(pending)
            at_end = not pending
            part = inflater.decompress(pending, _INFLATE_STEP * 4)
            pending = inflater.unconsumed_tail
            if at_end and not part and not inflater.eof:
                raise CannotUnderstand("the deflated data set is cut off")
            inflated.write(part)
            if inflated.tell() > maximum_bytes:
                raise CannotUnderstand("the data set is too large when inflated")
    except zlib.error:
        raise CannotUnderstand("the data set is not deflated, or damaged") from None
    rest = inflater.unused_data + data[position : position + 9]
    content = inflated.getvalue()
    if rest not in {b"", b"\x00"} and rest != struct.pack("<LL", zlib.crc32(content), len(content) & 0xFFFFFFFF):
        raise CannotUnderstand("something follows the deflated data set")
    return content


_ByGroup = Mapping[int, frozenset[int]]  # group number -> element numbers
_NO_GROUPS: Final[_ByGroup] = {}


def _by_group(tags: Iterable[int]) -> _ByGroup:
    """Tags sorted so that a walk looks a group up once, when it comes to it."""
    groups: dict[int, set[int]] = {}
    for tag in tags:
        groups.setdefault(tag >> 16, set()).add(tag & 0xFFFF)
    return {group: frozenset(elements) for group, elements in groups.items()}


@cache
def _sequences() -> _ByGroup:
    """The elements that the data dictionary calls sequences, for transfer syntaxes that don't say so."""
    repeating = [mask for mask, entry in RepeatersDictionary.items() if entry[0] == "SQ"]  # such as 50xx2600
    groups = range(0, 0x100, 2)
    return _by_group(
        [tag for tag, entry in DicomDictionary.items() if entry[0] == "SQ"]
        + [int(mask.replace("xx", f"{group:02x}"), 16) for mask in repeating for group in groups]
    )


@cache
def _top_level(wanted: frozenset[int]) -> _ByGroup:
    """What is kept of a data set itself: the wanted values and the length of the pixel data."""
    return _by_group(wanted | _PIXELS)


@cache
def _within(nested: frozenset[tuple[int, int]]) -> Mapping[int, _ByGroup]:
    """What is kept of the items of each top-level sequence."""
    return {sequence: _by_group(tag for above, tag in nested if above == sequence) for sequence, _ in nested}


class _ByteOrder:
    """What the walk reads numbers with in one byte order; a VR is read as one number, too, which is faster than two letters."""

    def __init__(self, order: str) -> None:
        self.four_of_16 = struct.Struct(order + "HHHH").unpack_from
        self.tag_and_32 = struct.Struct(order + "HHL").unpack_from
        self.one_of_32 = struct.Struct(order + "L").unpack_from
        number = struct.Struct(order + "H").unpack
        self.short_vrs = frozenset(number(vr)[0] for vr in _SHORT_VRS)
        self.long_vrs = frozenset(number(vr)[0] for vr in _LONG_VRS)
        self.sq: int = number(b"SQ")[0]
        self.un: int = number(b"UN")[0]


_LITTLE_ENDIAN: Final = _ByteOrder("<")
_BIG_ENDIAN: Final = _ByteOrder(">")


class _Walk:
    """The state of one walk over one data set.

    The two loops over elements say twice what they have in common: a call for each element would double their time.
    """

    def __init__(
        self,
        data: Encoded,
        syntax: TransferSyntax,
        contents: Contents,
        wanted: frozenset[int],
        nested: frozenset[tuple[int, int]],
        limits: Limits,
    ) -> None:
        self._data = data
        self._contents = contents
        self._wanted = wanted
        self._within = _within(nested)
        self._explicit = syntax.explicit_vr
        self._encapsulated = syntax.pixels != "native"
        self._deepest = limits.maximum_nesting
        self._left = limits.maximum_elements
        self._order = _LITTLE_ENDIAN if syntax.little_endian else _BIG_ENDIAN

    def data_set(self, start: int) -> None:
        """Walk the whole data set."""
        elements = self._explicit_elements if self._explicit else self._implicit_elements
        elements(start, len(self._data), 0, 0, _top_level(self._wanted), delimited=False)

    def _explicit_elements(  # noqa: PLR0912, PLR0915  the hot loop, see above
        self, position: int, end: int, depth: int, parent: int, wanted: _ByGroup, *, delimited: bool
    ) -> int:
        """Walk elements that carry their VR from `position` to `end`, or to the item delimiter if `delimited`; return where they end.

        `parent` is the sequence that holds them, 0 for the data set itself; values of `wanted` elements are kept.
        """
        data, order = self._data, self._order
        header, short_vrs = order.four_of_16, order.short_vrs
        last, current, kept = end - 8, 0, _NO_ELEMENTS
        counted = count = 0
        for count in range(self._left):
            if position > last:
                break
            group, element, vr, length = header(data, position)
            position += 8
            if group != current:
                if group == 0xFFFE and element == 0xE00D and delimited and not vr and not length:
                    self._left -= count - counted
                    return position
                if not 7 < group < 0xFFFE:
                    raise CannotUnderstand(_WRONG_GROUP)
                current, kept = group, wanted.get(group, _NO_ELEMENTS)
            if vr in short_vrs:
                following = position + length
                if following > end or length & 1:
                    raise CannotUnderstand(_ODD_LENGTH if length & 1 else _WRONG_LENGTH)
                if element in kept:
                    self._keep(group << 16 | element, position, length, parent)
                position = following
                continue
            if vr not in order.long_vrs:
                raise CannotUnderstand("an element has no known VR: other transfer syntax?")
            if position + 4 > end:
                raise CannotUnderstand(_CUT_OFF)
            tag = group << 16 | element
            length = order.one_of_32(data, position)[0]
            position += 4
            if length == UNDEFINED_LENGTH:
                if tag == PIXEL_DATA:
                    position = self._fragments(position, end, depth)
                    continue
                if vr not in {order.sq, order.un}:
                    raise CannotUnderstand("an undefined length that its VR does not allow")
                self._left -= count - counted
                counted = count
                if vr == order.sq:
                    position = self._items(position, end, depth + 1, tag, explicit=True, delimited=True)
                    continue
                self._order = _LITTLE_ENDIAN  # what is unknown is Implicit VR Little Endian everywhere (PS3.5 6.2.2 note 2)
                position = self._items(position, end, depth + 1, tag, explicit=False, delimited=True)
                self._order = order
                continue
            following = position + length
            if following > end:
                raise CannotUnderstand(_WRONG_LENGTH)
            if length & 1 and (depth or tag != PIXEL_DATA):  # some devices leave out the byte that pads their pixel data
                raise CannotUnderstand(_ODD_LENGTH)
            if vr == order.sq:
                self._left -= count - counted
                counted = count
                self._items(position, following, depth + 1, tag, explicit=True, delimited=False)
            elif element in kept:
                self._keep(tag, position, length, parent)
            position = following
        else:
            raise CannotUnderstand(_TOO_MANY)
        return self._ended(position, end, count - counted, delimited=delimited)

    def _implicit_elements(  # noqa: PLR0912  the hot loop, see above
        self, position: int, end: int, depth: int, parent: int, wanted: _ByGroup, *, delimited: bool
    ) -> int:
        """Walk elements without a VR in the same way."""
        data, header, all_sequences = self._data, self._order.tag_and_32, _sequences()
        last, current, kept, sequences = end - 8, 0, _NO_ELEMENTS, _NO_ELEMENTS
        counted = count = 0
        for count in range(self._left):
            if position > last:
                break
            group, element, length = header(data, position)
            position += 8
            if group != current:
                if group == 0xFFFE and element == 0xE00D and delimited and not length:
                    self._left -= count - counted
                    return position
                if not 7 < group < 0xFFFE:
                    raise CannotUnderstand(_WRONG_GROUP)
                current, kept, sequences = group, wanted.get(group, _NO_ELEMENTS), all_sequences.get(group, _NO_ELEMENTS)
            following = position + length
            if following > end or length & 1 or element in sequences:
                tag = group << 16 | element
                if length == UNDEFINED_LENGTH:
                    if tag == PIXEL_DATA:
                        position = self._fragments(position, end, depth)
                        continue
                    self._left -= count - counted
                    counted = count
                    position = self._items(position, end, depth + 1, tag, explicit=False, delimited=True)
                    continue
                if following > end:
                    raise CannotUnderstand(_WRONG_LENGTH)
                if length & 1 and (depth or tag != PIXEL_DATA):
                    raise CannotUnderstand(_ODD_LENGTH)
                if element in sequences:
                    self._left -= count - counted
                    counted = count
                    self._items(position, following, depth + 1, tag, explicit=False, delimited=False)
            if element in kept:
                self._keep(group << 16 | element, position, length, parent)
            position = following
        else:
            raise CannotUnderstand(_TOO_MANY)
        return self._ended(position, end, count - counted, delimited=delimited)

    def _ended(self, position: int, end: int, count: int, *, delimited: bool) -> int:
        """Count the elements of a data set or item of which fewer than 8 bytes are left; return where it ends."""
        if position != end or delimited:
            raise CannotUnderstand(_CUT_OFF)
        self._left -= count
        if self._left < 0:
            raise CannotUnderstand(_TOO_MANY)
        return position

    def _items(self, position: int, end: int, depth: int, sequence: int, *, explicit: bool, delimited: bool) -> int:
        """Walk the items of a sequence to `end`, or to the sequence delimiter if `delimited`; return where they end."""
        if depth > self._deepest:
            raise CannotUnderstand(f"sequences nest deeper than {self._deepest}")
        data, header = self._data, self._order.tag_and_32
        wanted = self._within.get(sequence, _NO_GROUPS) if depth == 1 else _NO_GROUPS
        elements = self._explicit_elements if explicit else self._implicit_elements
        while delimited or position < end:
            if end - position < 8:
                raise CannotUnderstand(_CUT_OFF)
            group, element, length = header(data, position)
            position += 8
            if group != 0xFFFE or element != 0xE000:
                if group == 0xFFFE and element == 0xE0DD and delimited and not length:
                    return position
                raise CannotUnderstand("a sequence holds something that is no item")
            self._left -= 1
            if self._left < 0:
                raise CannotUnderstand(_TOO_MANY)
            if length == UNDEFINED_LENGTH:
                position = elements(position, end, depth, sequence, wanted, delimited=True)
            elif length > end - position:
                raise CannotUnderstand("an item is cut off, or its length is wrong")
            elif length:
                position = elements(position, position + length, depth, sequence, wanted, delimited=False)
        return position

    def _fragments(self, position: int, end: int, depth: int) -> int:
        """Walk the items of encapsulated pixel data, the Basic Offset Table first; return where they end."""
        if not self._encapsulated:
            raise PixelDataTooShort("encapsulated pixel data in a native transfer syntax")
        data, header = self._data, self._order.tag_and_32
        for items in range(self._left):
            if end - position < 8:
                break
            group, element, length = header(data, position)
            position += 8
            if group == 0xFFFE and element == 0xE0DD and not length:
                if not items:
                    raise PixelDataTooShort("encapsulated pixel data without an offset table")
                self._left -= items
                if not depth:
                    if self._contents.fragments is not None:
                        raise CannotUnderstand("the pixel data occurs twice")
                    self._contents.fragments = items - 1
                return position
            if group != 0xFFFE or element != 0xE000 or length & 1 or length > end - position:
                break
            position += length
        else:
            raise CannotUnderstand(_TOO_MANY)
        raise PixelDataTooShort("encapsulated pixel data is cut off or not in items")

    def _keep(self, tag: int, position: int, length: int, parent: int) -> None:
        """Copy a value that was asked for; of pixel data note the length alone."""
        if parent:
            self._contents.nested_values.setdefault((parent, tag), self._data[position : position + min(length, _LONGEST_VALUE)])
        elif tag in _PIXELS:
            if tag in self._contents.native_lengths:
                raise CannotUnderstand("the pixel data occurs twice")
            self._contents.native_lengths[tag] = length
        elif tag in self._contents.values:
            raise CannotUnderstand("an element that identifies the object occurs twice")
        else:
            self._contents.values[tag] = self._data[position : position + min(length, _LONGEST_VALUE)]
