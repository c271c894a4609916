"""What the Storage SCP checks before it says Success (PS3.4 annex B): data set, command and presentation context agree.

Must never decode pixels, change a byte of the data set, or put a value from the wire into an error message.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from pydicom.charset import CODES_TO_ENCODINGS, python_encoding

from dicomnode.dimse.contexts import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    StorageClass,
    TransferSyntax,
    storage_class,
    transfer_syntax,
)
from dicomnode.dimse.encoding import DOUBLE_PIXEL_DATA, FLOAT_PIXEL_DATA, PIXEL_DATA, Contents, Encoded, Limits, walk
from dicomnode.errors import CannotUnderstand, DataSetDoesNotMatchSOPClass, PixelDataTooShort, StoreRefused
from storage.records import InstanceHeader, Priority

CHARACTER_SET: Final = 0x00080005
SOP_CLASS_UID: Final = 0x00080016
SOP_INSTANCE_UID: Final = 0x00080018
STUDY_DATE: Final = 0x00080020
STUDY_TIME: Final = 0x00080030
ACCESSION_NUMBER: Final = 0x00080050
MODALITY: Final = 0x00080060
REFERRING_PHYSICIAN: Final = 0x00080090
STUDY_DESCRIPTION: Final = 0x00081030
SERIES_DESCRIPTION: Final = 0x0008103E
PATIENT_NAME: Final = 0x00100010
PATIENT_ID: Final = 0x00100020
BIRTH_DATE: Final = 0x00100030
SEX: Final = 0x00100040
BODY_PART: Final = 0x00180015
STUDY_INSTANCE_UID: Final = 0x0020000D
SERIES_INSTANCE_UID: Final = 0x0020000E
STUDY_ID: Final = 0x00200010
SERIES_NUMBER: Final = 0x00200011
ACQUISITION_NUMBER: Final = 0x00200012
INSTANCE_NUMBER: Final = 0x00200013
IMAGE_POSITION: Final = 0x00200032
IMAGE_ORIENTATION: Final = 0x00200037
IMAGES_IN_ACQUISITION: Final = 0x00201002
SAMPLES_PER_PIXEL: Final = 0x00280002
PHOTOMETRIC_INTERPRETATION: Final = 0x00280004
NUMBER_OF_FRAMES: Final = 0x00280008
ROWS: Final = 0x00280010
COLUMNS: Final = 0x00280011
BITS_ALLOCATED: Final = 0x00280100
REQUEST_ATTRIBUTES: Final = 0x00400275
PRIORITY: Final = 0x00401003

_WANTED: Final = frozenset(
    {
        CHARACTER_SET, SOP_CLASS_UID, SOP_INSTANCE_UID, STUDY_DATE, ACCESSION_NUMBER, MODALITY, STUDY_DESCRIPTION, SERIES_DESCRIPTION,
        PATIENT_NAME, PATIENT_ID, STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, SERIES_NUMBER, INSTANCE_NUMBER, SAMPLES_PER_PIXEL,
        PHOTOMETRIC_INTERPRETATION, NUMBER_OF_FRAMES, ROWS, COLUMNS, BITS_ALLOCATED, PRIORITY, STUDY_TIME, STUDY_ID, REFERRING_PHYSICIAN,
        BIRTH_DATE, SEX, BODY_PART,
        PHOTOMETRIC_INTERPRETATION, NUMBER_OF_FRAMES, ROWS, COLUMNS, BITS_ALLOCATED, PRIORITY, ACQUISITION_NUMBER, IMAGE_POSITION,
        IMAGE_ORIENTATION, IMAGES_IN_ACQUISITION,
    }
)  # fmt: skip
_NESTED: Final = frozenset({(REQUEST_ATTRIBUTES, PRIORITY)})

_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
# Defined terms of PS3.3 C.12.1.1.2 -> codecs, and escape sequences of PS3.3 C.12-3 and C.12-4 -> codecs of what follows.
CHARACTER_SETS: Final = python_encoding | {"ISO_IR 203": "iso8859_15", "ISO 2022 IR 203": "iso8859_15"}
_ENCODING_OF_ESCAPE: Final = {code: name for code, name in CODES_TO_ENCODINGS.items() if code != b"\x1b(B"} | {b"\x1b-b": "iso8859_15"}
_READ_ESCAPES: Final = frozenset({"iso2022_jp", "iso2022_jp_2"})  # codecs that read the escape sequence themselves

TEXT_DELIMITERS: Final = re.compile(rb"[\\\t\n\f\r]")
NAME_DELIMITERS: Final = re.compile(rb"[\\\t\n\f\r^=]")

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,10}", re.ASCII)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_ESCAPE: Final = re.compile(rb"\x1b(?:\$[()]?|[()-]).", re.DOTALL)
_LONGEST_ORIENTATION: Final = 6 * 17  # bytes: six DS with their delimiters
_MAXIMUM_TEXT: Final = 324  # characters kept of a text in the index: five components of 64 of a PN and what joins them


@dataclass(frozen=True, kw_only=True)
class StoreRequest:
    """One C-STORE request as it came: who, and what the command and the context declare. Its data set follows."""

    association: int  # number of the association within this process
    calling_ae_title: str
    called_ae_title: str
    context_sop_class_uid: str  # abstract syntax of the presentation context
    sop_class_uid: str  # Affected SOP Class UID of the command
    sop_instance_uid: str  # Affected SOP Instance UID of the command
    transfer_syntax_uid: str


@dataclass(frozen=True, kw_only=True)
class ReceivedInstance(StoreRequest):
    """A C-STORE request with its whole data set in memory."""

    dataset: bytes


def is_uid(value: str) -> bool:
    """Whether `value` is a UID: up to 64 characters, digits in components separated by dots (PS3.5 9.1).

    A leading zero in a component is let through: devices in use write them.
    """
    return len(value) <= 64 and _UID.fullmatch(value) is not None


def read_header(
    request: StoreRequest,
    dataset: Encoded,
    dataset_sha256: str,
    *,
    start: int = 0,
    limits: Limits = Limits(),  # noqa: B008  frozen, so one default serves every call
) -> InstanceHeader:
    """Check a received instance (contract 3) and return what the index keeps of it.

    From `start` on, `dataset` is the encoded data set as it came; `dataset_sha256` is its digest in hex.

    Raises:
        CannotUnderstand: the data set can't be read to its end, or a UID is absent or malformed.
        DataSetDoesNotMatchSOPClass: data set, command and presentation context disagree.
        PixelDataTooShort: pixel data is absent, shorter than its header says, or broken.
        Each carries the Study Instance UID if it could be read.
    """
    contents = Contents()
    try:
        return _checked_header(request, dataset, dataset_sha256, start, limits, contents)
    except StoreRefused as refusal:
        study = _plain(contents.values.get(STUDY_INSTANCE_UID))
        refusal.study_instance_uid = study if is_uid(study) else None
        raise


def part10_prefix(request: StoreRequest) -> bytes:
    """Return preamble, prefix and file meta information (PS3.10 7.1); the data set's bytes follow it unchanged."""
    elements = (
        _meta_element(0x0001, b"OB", b"\x00\x01"),
        _meta_element(0x0002, b"UI", request.sop_class_uid.encode("ascii")),
        _meta_element(0x0003, b"UI", request.sop_instance_uid.encode("ascii")),
        _meta_element(0x0010, b"UI", request.transfer_syntax_uid.encode("ascii")),
        _meta_element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID.encode("ascii")),
        _meta_element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME.encode("ascii")),
        _meta_element(0x0016, b"AE", request.calling_ae_title.encode("ascii")),
    )
    group = b"".join(elements)
    return b"\x00" * 128 + b"DICM" + _meta_element(0x0000, b"UL", struct.pack("<L", len(group))) + group


def decode_text(value: bytes, character_sets: tuple[str, ...], *, delimiters: re.Pattern[bytes] = TEXT_DELIMITERS) -> str:
    """Decode a text value by its Specific Character Set (PS3.5 6.1.2); what can't be decoded becomes U+FFFD.

    Unknown character sets count as ISO 8859-1. Control characters and outer spaces are dropped, and long texts cut.
    `delimiters` are those after which the first character set holds again: NAME_DELIMITERS for a PN.
    """
    first = CHARACTER_SETS.get(character_sets[0] if character_sets else "", "latin_1")
    text = _without_codes(value, first, delimiters) if b"\x1b" in value else value.decode(first, "replace")
    if not text.isprintable():
        text = _CONTROL.sub(" ", text)
    return text.strip()[:_MAXIMUM_TEXT]


def _without_codes(value: bytes, first: str, delimiters: re.Pattern[bytes]) -> str:
    """Decode a value with ISO 2022 code extensions (PS3.5 6.1.2.5).

    An escape sequence names the character set of what follows it, up to the next one or to a delimiter.
    """
    parts: list[str] = []
    position, encoding = 0, first
    for escape in [*_ESCAPE.finditer(value), None]:
        part = value[position : escape.start() if escape else len(value)]
        if encoding in _READ_ESCAPES:  # two bytes a character, any of which may look like a delimiter
            parts.append(part.decode(encoding, "replace"))
        else:
            delimiter = delimiters.search(part)
            changes = delimiter.start() if delimiter else len(part)
            parts += part[:changes].decode(encoding, "replace"), part[changes:].decode(first, "replace")
        if escape:
            encoding = _ENCODING_OF_ESCAPE.get(escape.group(), first)
            position = escape.start() if encoding in _READ_ESCAPES else escape.end()
    return "".join(parts)


def _checked_header(
    request: StoreRequest, dataset: Encoded, dataset_sha256: str, start: int, limits: Limits, contents: Contents
) -> InstanceHeader:
    sop_class = storage_class(request.sop_class_uid)
    syntax = transfer_syntax(request.transfer_syntax_uid)
    if sop_class is None or request.context_sop_class_uid != request.sop_class_uid:
        raise DataSetDoesNotMatchSOPClass("SOP class of the command is not that of the context")
    if syntax is None:
        raise CannotUnderstand("the transfer syntax is not supported")
    if not is_uid(request.sop_instance_uid):
        raise CannotUnderstand("the command's SOP Instance UID is malformed")
    if len(dataset) <= start:
        raise CannotUnderstand("the request has no data set")
    walk(dataset, syntax, contents, wanted=_WANTED, nested=_NESTED, start=start, limits=limits)
    values = contents.values
    if _plain(values.get(SOP_CLASS_UID)) != request.sop_class_uid:
        raise DataSetDoesNotMatchSOPClass("SOP Class UID: data set and command differ")
    if _plain(values.get(SOP_INSTANCE_UID)) != request.sop_instance_uid:
        raise DataSetDoesNotMatchSOPClass("SOP Instance UID: data set and command differ")
    study, series = _plain(values.get(STUDY_INSTANCE_UID)), _plain(values.get(SERIES_INSTANCE_UID))
    if not is_uid(study):
        raise CannotUnderstand("Study Instance UID is absent or malformed")
    if not is_uid(series):
        raise CannotUnderstand("Series Instance UID is absent or malformed")
    note = _check_pixel_data(contents, sop_class, syntax)
    character_sets = tuple(term.strip() for term in _plain(values.get(CHARACTER_SET)).split("\\"))
    priorities = (values.get(PRIORITY), contents.nested_values.get((REQUEST_ATTRIBUTES, PRIORITY)))
    orientation, position = _plane(values)
    priority: Priority = "stat" if any(_plain(value).upper() == "STAT" for value in priorities) else "routine"
    return InstanceHeader(
        sop_instance_uid=request.sop_instance_uid,
        sop_class_uid=request.sop_class_uid,
        transfer_syntax_uid=request.transfer_syntax_uid,
        series_instance_uid=series,
        study_instance_uid=study,
        dataset_sha256=dataset_sha256,
        kind=sop_class.kind,
        modality=decode_text(values.get(MODALITY, b""), ())[:16],
        instance_number=_number(values.get(INSTANCE_NUMBER)),
        patient_id=decode_text(values.get(PATIENT_ID, b""), character_sets),
        patient_name=decode_text(values.get(PATIENT_NAME, b""), character_sets, delimiters=NAME_DELIMITERS),
        study_date=decode_text(values.get(STUDY_DATE, b""), ())[:16],
        study_description=decode_text(values.get(STUDY_DESCRIPTION, b""), character_sets),
        accession_number=decode_text(values.get(ACCESSION_NUMBER, b""), character_sets),
        series_number=_number(values.get(SERIES_NUMBER)),
        series_description=decode_text(values.get(SERIES_DESCRIPTION, b""), character_sets),
        requested_priority=priority,
        calling_ae_title=request.calling_ae_title,
        called_ae_title=request.called_ae_title,
        note=note,
        study_time=_plain(values.get(STUDY_TIME))[:16],
        study_id=decode_text(values.get(STUDY_ID, b""), character_sets),
        referring_physician=decode_text(values.get(REFERRING_PHYSICIAN, b""), character_sets, delimiters=NAME_DELIMITERS),
        birth_date=_plain(values.get(BIRTH_DATE))[:16],
        sex=_plain(values.get(SEX))[:16],
        body_part=_plain(values.get(BODY_PART))[:16],
        acquisition_number=_number(values.get(ACQUISITION_NUMBER)),
        images_in_acquisition=_number(values.get(IMAGES_IN_ACQUISITION)) if _number(values.get(NUMBER_OF_FRAMES)) in {None, 1} else None,
        orientation=orientation,
        position=position,
    )


def _check_pixel_data(contents: Contents, sop_class: StorageClass, syntax: TransferSyntax) -> str:
    """Refuse pixel data that is less than its header says (PS3.3 C.7.6.3, PS3.5 8); return a note on what is more."""
    values, lengths = contents.values, contents.native_lengths
    if not lengths and contents.fragments is None:
        if sop_class.kind == "image" or _unsigned(values.get(ROWS), syntax):
            raise PixelDataTooShort("an image without pixel data")
        return ""
    rows, columns = _unsigned(values.get(ROWS), syntax), _unsigned(values.get(COLUMNS), syntax)
    frames = _number(values.get(NUMBER_OF_FRAMES)) if _plain(values.get(NUMBER_OF_FRAMES)) else 1
    if not rows or not columns or frames is None or frames < 1:
        raise PixelDataTooShort("pixel data without valid Rows, Columns or Number of Frames")
    if contents.fragments is not None:
        least = 1 if syntax.pixels == "video" else frames  # a video is one stream in any number of fragments (PS3.5 8.2.5)
        if contents.fragments < least:
            raise PixelDataTooShort("encapsulated pixel data has too few fragments")
        return ""
    if syntax.pixels != "native" and PIXEL_DATA in lengths:
        raise PixelDataTooShort("native pixel data in an encapsulated transfer syntax")
    if PIXEL_DATA in lengths:
        length, bits = lengths[PIXEL_DATA], _unsigned(values.get(BITS_ALLOCATED), syntax) * _samples(values, syntax)
    else:
        length, bits = (lengths[FLOAT_PIXEL_DATA], 32) if FLOAT_PIXEL_DATA in lengths else (lengths[DOUBLE_PIXEL_DATA], 64)
    if not bits:
        raise PixelDataTooShort("pixel data without Bits Allocated")
    expected = int((rows * columns * frames * bits + 7) // 8)
    if length < expected:
        raise PixelDataTooShort("pixel data is shorter than its header says")
    if length % 2:
        return "pixel data has an odd length"
    surplus = length - expected - expected % 2  # one byte makes the length even
    return f"pixel data has {surplus} bytes more than its header says" if surplus > 0 else ""


def _samples(values: dict[int, bytes], syntax: TransferSyntax) -> float:
    """Stored samples per pixel: the chroma of 4:2:2 and 4:2:0 is subsampled (PS3.3 C.7.6.3.1.2)."""
    photometric = _plain(values.get(PHOTOMETRIC_INTERPRETATION)).upper()
    subsampled = {"YBR_FULL_422": 2.0, "YBR_PARTIAL_422": 2.0, "YBR_PARTIAL_420": 1.5}
    return subsampled.get(photometric) or float(_unsigned(values.get(SAMPLES_PER_PIXEL), syntax) or 1)


def _meta_element(element: int, vr: bytes, value: bytes) -> bytes:
    """Encode one element of group 0002, always Explicit VR Little Endian (PS3.10 7.1)."""
    value += (b"\x00" if vr in {b"UI", b"OB"} else b" ") * (len(value) % 2)
    length = struct.pack("<HL", 0, len(value)) if vr == b"OB" else struct.pack("<H", len(value))
    return struct.pack("<HH", 0x0002, element) + vr + length + value


def _plain(value: bytes | None) -> str:
    """A value of the default repertoire without padding; other bytes become U+FFFD."""
    return value.decode("ascii", "replace").strip(" \x00") if value else ""


def _unsigned(value: bytes | None, syntax: TransferSyntax) -> int:
    """The first US of a value, 0 if there is none."""
    return int.from_bytes((value or b"")[:2], "little" if syntax.little_endian else "big")


def _plane(values: dict[int, bytes]) -> tuple[str, float | None]:
    """The direction of an image's plane as text, and its place along the normal in mm (PS3.3 C.7.6.2.1.1); ("", None) if it has none."""
    if IMAGE_POSITION not in values or not 0 < len(values.get(IMAGE_ORIENTATION, b"")) <= _LONGEST_ORIENTATION:
        return "", None
    orientation, normal = _direction(values[IMAGE_ORIENTATION])
    try:
        x, y, z = map(float, values[IMAGE_POSITION].rstrip(b" \x00").split(b"\\"))
    except ValueError:
        return "", None
    position = x * normal[0] + y * normal[1] + z * normal[2]
    return (orientation, round(position, 3)) if math.isfinite(position) else ("", None)


@lru_cache(maxsize=1024)
def _direction(value: bytes) -> tuple[str, tuple[float, float, float]]:
    """Image Orientation (Patient) as text, rounded, and the plane's normal; not a number where it is malformed. A series has one or few."""
    try:
        a, b, c, d, e, f = map(float, value.rstrip(b" \x00").split(b"\\"))
    except ValueError:
        return "", (math.nan, math.nan, math.nan)
    text = " ".join(f"{round(cosine, 2) + 0.0:g}" for cosine in (a, b, c, d, e, f) if math.isfinite(cosine))
    return text, (b * f - c * e, c * d - a * f, a * e - b * d)


def _number(value: bytes | None) -> int | None:
    """The first IS of a value; None if it is absent or no number of 32 bits (PS3.5 6.2)."""
    if not value:
        return None
    text = _plain(value).partition("\\")[0].strip()
    number = int(text) if _INTEGER.fullmatch(text) else None
    return number if number is not None and -(2**31) <= number < 2**31 else None
