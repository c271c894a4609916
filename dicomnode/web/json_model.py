"""Data sets in the DICOM JSON Model (PS3.18 annex F), and the values that they leave out as bulk data.

A malformed value counts as absent: what a device wrote must not keep the rest of a study from being read. Must never read pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag
from pydicom.valuerep import AMBIGUOUS_VR

from dicomnode.analysis.attributes import UNREADABLE
from dicomnode.analysis.headers import Header

INLINE_BYTES: Final = 1024  # longer binary values are bulk data
_BINARY: Final = {"OB": 1, "OW": 2, "OL": 4, "OF": 4, "OD": 8, "OV": 8, "UN": 1}  # bytes of a number, whose order may have to be turned
_CHARACTER_SET: Final = "00080005"
_AVAILABLE_SYNTAX: Final = "00083002"
_NUMBERS: Final = ("DS", "FL", "FD", "IS", "SL", "SS", "SV", "UL", "US", "UV")

Json = dict[str, Any]


class NoSuchValue(LookupError):
    """The data set has no bulk data under this name."""


def encode(value: object) -> bytes:
    """Return JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def header_as_json(header: Header, transfer_syntax: str, address: str) -> Json:
    """Return a stored object's header; long binary values, and the pixels, are named by addresses that begin with `address`."""
    made = _data_set(header, f"{address}/bulkdata/")
    made[_CHARACTER_SET] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    made[_AVAILABLE_SYNTAX] = {"vr": "UI", "Value": [transfer_syntax]}
    if header.pixels is not None:
        tag = f"{header.pixels.tag:08X}"
        made[tag] = {"vr": header.pixels.vr, "BulkDataURI": f"{address}/bulkdata/{tag}"}
    return dict(sorted(made.items()))


def attributes_as_json(values: Iterable[tuple[str, object]]) -> Json:
    """Return attributes, by keyword, as text, number, several of them, or None where there is no value."""
    made: Json = {}
    for keyword, value in values:
        tag = tag_for_keyword(keyword)
        if tag is None:
            continue
        vr = dictionary_VR(tag)
        several = value if isinstance(value, tuple | list) else () if value is None or value == "" else (value,)
        made[f"{tag:08X}"] = {"vr": vr}
        if several:
            made[f"{tag:08X}"]["Value"] = [_name(str(one)) if vr == "PN" else one for one in several]
    return dict(sorted(made.items()))


def bulk_value(header: Header, path: str) -> bytes:
    """Return the bytes, little endian, of the value that `path` names: tags and numbers of items, between dots.

    Raises:
        NoSuchValue: there is none.
    """
    words = path.split(".")
    if len(words) % 2 == 0 or len(words) > 129:
        raise NoSuchValue(path)
    data_set: Dataset = header
    try:
        for tag, item in zip(words[:-1:2], words[1::2], strict=True):
            data_set = data_set[BaseTag(int(tag, 16))].value[int(item)]
        element = data_set[BaseTag(int(words[-1], 16))]
        value = element.value
    except UNREADABLE as error:
        raise NoSuchValue(path) from error
    if element.VR not in _BINARY or not isinstance(value, bytes):
        raise NoSuchValue(path)
    return _little_endian(value, _BINARY[element.VR], header)


def _data_set(data_set: Dataset, address: str) -> Json:
    made: Json = {}
    for tag in sorted(data_set.keys()):
        if tag.element and (element := _element(data_set, tag, address)) is not None:
            made[f"{tag:08X}"] = element
    return made


def _element(data_set: Dataset, tag: BaseTag, address: str) -> Json | None:
    try:
        element = data_set[tag]
        vr = str(element.VR)
        if vr == "SQ":
            items = [_data_set(item, f"{address}{tag:08X}.{number}.") for number, item in enumerate(element.value)]
            return {"vr": vr, "Value": items} if items else {"vr": vr}
        if vr in _BINARY:
            return _binary(data_set, element, f"{address}{tag:08X}")
        values = _values(element)
    except UNREADABLE:
        raw = data_set.get_item(tag)
        vr = str(raw.VR) if isinstance(raw, RawDataElement | DataElement) and raw.VR and raw.VR not in AMBIGUOUS_VR else "UN"
        return {"vr": vr}
    return {"vr": vr, "Value": values} if values else {"vr": vr}


def _binary(data_set: Dataset, element: DataElement, address: str) -> Json:
    value = element.value
    if not value or not isinstance(value, bytes):
        return {"vr": element.VR}
    if len(value) > INLINE_BYTES:
        return {"vr": element.VR, "BulkDataURI": address}
    inline = element if element.VR == "UN" else DataElement(element.tag, element.VR, _little_endian(value, _BINARY[element.VR], data_set))
    return inline.to_json_dict(None, INLINE_BYTES)


def _little_endian(value: bytes, size: int, data_set: Dataset) -> bytes:
    if data_set.original_encoding[1] is not False or size == 1 or len(value) % size:
        return value
    return np.frombuffer(value, f">u{size}").byteswap().tobytes()


def _values(element: DataElement) -> list[Any]:
    """The values of an element; an absent one among several is null (PS3.18 F.2.5)."""
    if element.VM == 0:
        return []
    several = element.value if element.VM > 1 else [element.value]
    if element.VR == "PN":
        return [_name(str(name)) for name in several]
    if element.VR == "AT":
        return [f"{int(tag):08X}" for tag in several]
    if element.VR in _NUMBERS:
        return [_number(element.VR, value) for value in several]
    return [str(value) if value is not None and str(value) else None for value in several]


def _number(vr: str, value: Any) -> int | float | str | None:
    """A number; what JSON has no number for stands as text (PS3.18 F.2.3.1)."""
    if value is None or value == "":
        return None
    if vr in {"DS", "FL", "FD"}:
        number = float(value)
        return number if math.isfinite(number) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(number, "NaN")
    return int(value)


def _name(text: str) -> Json | None:
    """A PN by its component groups."""
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("="), strict=False)
    return {name: group for name, group in groups if group} or None
