"""Identifiers of C-FIND, C-MOVE and C-GET: what a request asks for, and what is answered (PS3.4 C.4).

Must never trust a byte of a request: an identifier is walked strictly, under limits, before anything reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Literal

from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pynetdicom.dsutils import decode, encode

from dicomnode.dimse.contexts import PATIENT_ROOT, transfer_syntax
from dicomnode.dimse.encoding import Contents, Limits, walk
from dicomnode.dimse.scp import CHARACTER_SETS, NAME_DELIMITERS, TEXT_DELIMITERS, decode_text
from dicomnode.errors import CannotUnderstand, PixelDataTooShort, QueryFailure, QueryNotUnderstood, QueryUnacceptable

Level = Literal["PATIENT", "STUDY", "SERIES", "IMAGE"]
Value = str | int | tuple[str, ...] | None

LEVELS: Final[tuple[Level, ...]] = ("PATIENT", "STUDY", "SERIES", "IMAGE")
UNIQUE_KEYS: Final[Mapping[str, str]] = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}
FAILED_LISTED: Final = 1000  # SOP Instance UIDs that a final response lists: a UI holds 65534 bytes
_CHARACTER_SET, _LEVEL, _RETRIEVE_AE_TITLE = 0x00080005, 0x00080052, 0x00080054
_UNIQUE_TAGS: Final[Mapping[str, int]] = {"PATIENT": 0x00100020, "STUDY": 0x0020000D, "SERIES": 0x0020000E, "IMAGE": 0x00080018}
_LIMITS: Final = Limits(maximum_nesting=8, maximum_elements=2000)  # an identifier asks for some dozen attributes
_TEXTS: Final = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})  # what Specific Character Set is about


@dataclass(frozen=True, kw_only=True)
class Identifier:
    """What a request asks for: attributes, each with the value to match, empty for any."""

    level: Level
    keys: Mapping[str, str]  # by keyword, those that have one; several values with backslashes between
    tags: tuple[int, ...]  # of all that is asked for, in their order
    character_sets: tuple[str, ...]  # in which the answers are wanted, too


def read_identifier(encoded: bytes, syntax_uid: str, model: str) -> Identifier:
    """Read the identifier of a request in an information model (its SOP Class UID).

    Raises:
        QueryNotUnderstood: the data set can't be read.
        QueryUnacceptable: its level isn't one of the model, or it lacks the unique key of a level above (PS3.4 C.4.1.2).
    """
    syntax = transfer_syntax(syntax_uid)
    assert syntax is not None  # noqa: S101  the context was accepted
    try:
        walk(encoded, syntax, Contents(), wanted=frozenset(), limits=_LIMITS)
    except (CannotUnderstand, PixelDataTooShort) as error:
        raise QueryNotUnderstood(str(error)) from error
    dataset = decode(BytesIO(encoded), not syntax.explicit_vr, syntax.little_endian)
    raw = {int(tag): _bytes(dataset.get_item(tag)) for tag in dataset.keys()}  # noqa: SIM118  iteration would convert the values
    level, character_set = _plain(raw.pop(_LEVEL, b"")), _plain(raw.pop(_CHARACTER_SET, b""))
    if level not in LEVELS or (level == "PATIENT" and model not in PATIENT_ROOT):
        raise QueryUnacceptable("the Query/Retrieve Level is not one of this model")
    character_sets = tuple(term.strip() for term in character_set.split("\\"))
    keys = {keyword_for_tag(tag): _text(value, _vr(tag), character_sets) for tag, value in raw.items() if value is not None}
    identifier = Identifier(
        level=LEVELS[LEVELS.index(level)],
        keys={keyword: value for keyword, value in keys.items() if keyword},
        tags=tuple(tag for tag in raw if tag & 0xFFFF),  # but group lengths
        character_sets=character_sets,
    )
    for above in _levels_above(identifier.level, model):
        _check_unique(identifier, above)
    return identifier


def unique_keys(identifier: Identifier, model: str) -> dict[str, str]:
    """Return the unique keys of a retrieval down to its level; the last may be a list of UIDs.

    Raises:
        QueryUnacceptable: the key of the level is absent, or matches anything.
    """
    keyword = UNIQUE_KEYS[identifier.level]
    value = identifier.keys.get(keyword, "").strip(" \0")
    if not value or "*" in value or "?" in value:
        raise QueryUnacceptable(f"{keyword} must name what is to be retrieved")
    above = [UNIQUE_KEYS[level] for level in _levels_above(identifier.level, model)]
    return {**{key: identifier.keys[key] for key in above}, keyword: value}


def is_wholly_known(identifier: Identifier, found: Mapping[str, Value]) -> bool:
    """Whether the node knows each attribute that is asked for, whatever its value (PS3.4 C.4.1.1.4: FF00 or FF01)."""
    own = {"RetrieveAETitle", "InstanceAvailability"}
    return all(keyword_for_tag(tag) in found or keyword_for_tag(tag) in own for tag in identifier.tags)


def write_answer(identifier: Identifier, found: Mapping[str, Value], *, ae_title: str, explicit_vr: bool) -> bytes:
    """Encode the identifier of one match: each attribute that was asked for, empty where its value isn't known."""
    values: dict[str, Value] = {**found, "RetrieveAETitle": ae_title, "InstanceAvailability": "ONLINE"}
    unique = [tag for level, tag in _UNIQUE_TAGS.items() if UNIQUE_KEYS[level] in found]
    dataset = Dataset()
    dataset.QueryRetrieveLevel = identifier.level
    texts: list[str] = []
    for tag in (*identifier.tags, _RETRIEVE_AE_TITLE, *unique):
        vr = _vr(tag)
        value: Any = values.get(keyword_for_tag(tag))
        if vr == "SQ":
            value = Sequence()
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, int):
            value = str(value)
        dataset[tag] = DataElement(tag, vr, value, validation_mode=0)  # what a scanner wrote goes out as it came
        if vr in _TEXTS and isinstance(value, str):
            texts.append(value)
    character_sets = _character_sets(texts, identifier.character_sets)
    if character_sets:
        dataset.SpecificCharacterSet = list(character_sets) if len(character_sets) > 1 else character_sets[0]
    return _encoded(dataset, explicit_vr)


def write_failed(sop_instance_uids: Iterable[str], *, explicit_vr: bool) -> bytes:
    """Encode what a final response says of failed sub-operations (PS3.4 Table C.4-2)."""
    dataset = Dataset()
    dataset.FailedSOPInstanceUIDList = list(sop_instance_uids)[:FAILED_LISTED]
    return _encoded(dataset, explicit_vr)


def _encoded(dataset: Dataset, explicit_vr: bool) -> bytes:
    encoded = encode(dataset, not explicit_vr, True)
    if encoded is None:
        raise QueryFailure("an answer can't be encoded")
    return bytes(encoded)


def _levels_above(level: Level, model: str) -> tuple[Level, ...]:
    first = 0 if model in PATIENT_ROOT else 1
    return LEVELS[first : LEVELS.index(level)]


def _check_unique(identifier: Identifier, level: Level) -> None:
    keyword = UNIQUE_KEYS[level]
    value = identifier.keys.get(keyword, "").strip(" \0")
    if not value or any(special in value for special in "*?\\"):
        raise QueryUnacceptable(f"{keyword} must have one value at the level {identifier.level}")


def _bytes(element: Any) -> bytes | None:
    """The value of an element as it came; None of a sequence, which matches nothing here. pydicom leaves empty elements alone unread."""
    if element.VR == "SQ":
        return None
    return element.value or b"" if isinstance(element, RawDataElement) else b""


def _vr(tag: int) -> str:
    try:
        return dictionary_VR(tag).split(" ")[0]
    except KeyError:
        return "UN"


def _text(value: bytes, vr: str, character_sets: tuple[str, ...]) -> str:
    if vr not in _TEXTS:
        return _plain(value)
    delimiters = NAME_DELIMITERS if vr == "PN" else TEXT_DELIMITERS
    return decode_text(value, character_sets, delimiters=delimiters)


def _plain(value: bytes | None) -> str:
    return (value or b"").decode("ascii", "replace").strip(" \0")


def _character_sets(texts: Iterable[str], asked: tuple[str, ...]) -> tuple[str, ...]:
    """The character sets of an answer: none for ASCII, else those of the request if they have all that is said, else UTF-8."""
    characters = {character for text in texts if not text.isascii() for character in text}
    if not characters:
        return ()
    codecs = [CHARACTER_SETS[term] for term in asked if term in CHARACTER_SETS]
    if len(codecs) == len(asked) and all(any(_has(codec, character) for codec in codecs) for character in characters):
        return asked
    return ("ISO_IR 192",)


def _has(codec: str, character: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        character.encode(codec)
        return True
    return False
