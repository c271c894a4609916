"""Headers of stored files as data sets: what files of a series have in common is converted once, and shared.

Must never read pixels, or convert a value that nobody asks for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from copy import copy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from pydicom.charset import convert_encodings
from pydicom.config import IGNORE
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import BytesLengthException
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import UID
from pydicom.valuerep import AMBIGUOUS_VR, IS, DSfloat

from dicomnode.analysis.likeness import CHARACTER_SET, LONGEST_SHARED, Element, Likeness
from dicomnode.analysis.stored import PixelPlace, Walk, is_sequence, walk_file

# What pydicom raises where a value is none of its VR.
CONVERTING_FAILS = (
    ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError, OSError, struct.error, BytesLengthException,
)  # fmt: skip

_MUTABLE = tuple(name for name, value in FileMetaDataset().__dict__.items() if isinstance(value, dict))  # attributes of a data set
_KINDS: dict[str, Callable[[str], Any]] = {
    "UI": partial(UID, validation_mode=IGNORE),
    "DS": partial(DSfloat, validation_mode=IGNORE),
    "IS": partial(IS, validation_mode=IGNORE),
}
_DataSet = TypeVar("_DataSet", bound=Dataset)
_Elements = dict[BaseTag, "DataElement | RawDataElement"]


class Header(FileDataset):
    """The header of a file: a data set that shares its elements with those of other files, so elements are for reading."""

    pixels: PixelPlace | None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a value in this header alone."""
        tag = tag_for_keyword(name)
        if tag is not None and tag in self:
            self[tag] = copy(self[tag])
        super().__setattr__(name, value)


class HeaderReader:
    """Reads headers of files that have much in common, as those of a series have: equal elements are converted once."""

    def __init__(self, wanted: Collection[int] = ()) -> None:
        """`wanted` are tags whose values are converted at once, and left out where that fails; the others when they are first asked for."""
        self._wanted = frozenset(wanted) | {CHARACTER_SET}
        self._sequences = [tag_of(tag) for tag in sorted(self._wanted) if is_sequence(tag)]
        self._likeness = Likeness()
        self._runs: dict[tuple[int, bytes], _Elements] = {}
        self._known: dict[tuple[int, str | None, bytes, int], DataElement | RawDataElement | None] = {}
        self._samples: dict[tuple[int, int], DataElement] = {}  # an element of each wanted tag as pydicom converted it
        self._codings: dict[tuple[bool, bool, bytes], int] = {}
        self._meta = FileMetaDataset()
        self._meta.set_original_encoding(False, True)
        self._headers: dict[int, Header] = {}

    def read(self, file: Path) -> Header:
        """Return the header of a file, without its pixels.

        Raises:
            Unreadable: it is no well-formed DICOM file. OSError: it cannot be read.
        """
        meta, walk, pixels = walk_file(file, self._likeness)
        charset: str | list[str] = "iso8859"  # pydicom's own name of the default repertoire
        named = next((element for element in walk.kept if element.tag == CHARACTER_SET), None)
        coding = self._coding(not walk.explicit, walk.little, b"")
        if named and (converted := self._element(named, coding, charset)):
            charset = _encodings(converted.value)
            coding = self._coding(not walk.explicit, walk.little, named.value)
        elements = self._elements(walk, coding, charset)
        header = _alike(self._empty(coding, charset), elements)
        header.__dict__["file_meta"] = _alike(self._meta, self._elements(meta, self._coding(False, True, b""), "iso8859"))
        header.__dict__["pixels"] = pixels
        for wanted in self._sequences:  # their items belong to one data set, so they are never shared
            if wanted in elements:
                try:
                    header[wanted]
                except CONVERTING_FAILS:
                    del elements[wanted]
        return header

    def _empty(self, coding: int, charset: str | list[str]) -> Header:
        if coding not in self._headers:
            implicit, little = bool(coding & 2), bool(coding & 1)
            empty = Header("", {}, bytes(128), FileMetaDataset(), implicit, little)
            empty.set_original_encoding(implicit, little, charset)
            self._headers[coding] = empty
        return self._headers[coding]

    def _coding(self, implicit: bool, little: bool, charset: bytes) -> int:
        """Return a number for what, beside its bytes, makes a value; (implicit, little) are its last two bits."""
        return self._codings.setdefault((implicit, little, charset), len(self._codings) << 2 | implicit << 1 | little)

    def _elements(self, walk: Walk, coding: int, charset: str | list[str]) -> _Elements:
        """Return the elements that were walked, and those that were jumped over."""
        elements: _Elements = {}
        for run in walk.jumped:
            key = coding, run.content
            if key not in self._runs:
                of_run = ((element.tag, self._element(element, coding, charset)) for element, _ in run.pieces)
                self._runs[key] = {tag_of(tag): element for tag, element in of_run if element is not None}
            elements.update(self._runs[key])
        for element in walk.kept:
            if (made := self._element(element, coding, charset)) is not None:
                elements[tag_of(element.tag)] = made
        return elements

    def _element(self, element: Element, coding: int, charset: str | list[str]) -> DataElement | RawDataElement | None:
        """Return an element as it is encoded, or converted if it is wanted; None where that fails."""
        tag, vr, value, _, place = element
        key = tag, vr, value, coding
        if key in self._known:
            return self._known[key]
        raw = RawDataElement(tag_of(tag), vr, len(value), value, place, bool(coding & 2), bool(coding & 1))
        made: DataElement | RawDataElement | None = raw
        if tag in self._wanted and not is_sequence(tag):
            try:
                converted = _number_or_uid(raw, self._samples.get((tag, coding)))
                converted = converted if converted is not None else convert_raw_data_element(raw, encoding=charset)
                self._samples.setdefault((tag, coding), converted)
                made = raw if converted.VR in AMBIGUOUS_VR else converted  # its data set says which VR it is
            except CONVERTING_FAILS:
                made = None
        if len(value) <= LONGEST_SHARED:
            self._known[key] = made
        return made


@lru_cache(maxsize=4096)
def tag_of(number: int) -> BaseTag:
    """Return a tag, for a number always the same object: what compares tags sees sooner that they are equal."""
    return BaseTag(number)


def _number_or_uid(raw: RawDataElement, sample: DataElement | None) -> DataElement | None:
    """Return what pydicom makes of a number or UID, without its checks of form; None where it is something else. Each file has a few."""
    kind = _KINDS.get(sample.VR) if sample is not None else None
    if sample is None or kind is None or not raw.value or not raw.value.isascii():
        return None
    parts = raw.value.decode("ascii").rstrip(" \0").split("\\")
    try:
        value = MultiValue(kind, parts) if len(parts) > 1 else kind(parts[0])
    except (ValueError, TypeError, OverflowError):
        return None
    made = DataElement.__new__(DataElement)  # its constructor would convert and validate once more
    made.__dict__.update(sample.__dict__)
    made.__dict__["_value"] = value
    return made


def _alike(empty: _DataSet, elements: _Elements) -> _DataSet:
    """Return a data set of these elements, otherwise like an empty one; pydicom's constructors set 40 attributes one by one."""
    made: _DataSet = object.__new__(type(empty))
    made.__dict__.update(empty.__dict__)
    for name in _MUTABLE:
        made.__dict__[name] = empty.__dict__[name].copy()
    made.__dict__["_dict"] = elements
    return made


def _encodings(value: object) -> str | list[str]:
    """Return Python's names of the character sets; the default repertoire where there is no such."""
    try:
        names = convert_encodings(value or None)  # type: ignore[arg-type]  # it takes what the element holds
    except (LookupError, TypeError, ValueError, AttributeError):
        return "iso8859"
    return names
