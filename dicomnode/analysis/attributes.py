"""Values of a header as plain text and numbers, whatever stands there.

A malformed value is as good as none: reading one never raises. Must never decide anything.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.sequence import Sequence as ItemSequence
from pydicom.tag import BaseTag

from dicomnode.analysis.headers import tag_of

_Made = TypeVar("_Made")

# What pydicom raises on bytes that are no value of their VR, or no sequence of items, when it first converts them.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, BytesLengthException, EOFError, LookupError, NotImplementedError, OSError,
    RecursionError, TypeError, ValueError, struct.error,
)  # fmt: skip


def value_of(header: Dataset, keyword: str) -> Any:
    """Return an attribute's value, or None where it is absent, empty or malformed."""
    tag = _tag_of(keyword)
    try:
        return header[tag].value if tag in header else None
    except UNREADABLE:
        return None


@cache
def _tag_of(keyword: str) -> BaseTag:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"{keyword} is no keyword of PS3.6")
    return tag_of(tag)


def once_for_shared(keywords: Sequence[str], compute: Callable[[Mapping[str, Any]], _Made]) -> Callable[[Dataset], _Made]:
    """Return a function of headers that computes something of these attributes once for all headers that share their elements.

    `compute` is given the values by keyword, as `value_of` returns them, and no others.
    """
    tags = [_tag_of(keyword) for keyword in keywords]
    known: dict[tuple[int, ...], tuple[list[Any], _Made]] = {}  # with the elements, so that their ids stay theirs

    def of(header: Dataset) -> _Made:
        elements = [header._dict.get(tag) for tag in tags]  # get_item makes a tag of each tag
        key = tuple(map(id, elements))
        if key not in known:
            known[key] = elements, compute({keyword: value_of(header, keyword) for keyword in keywords})
        return known[key][1]

    return of


def number_of(value: object) -> float | None:
    """Return a header's value as a finite number, or None."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def texts_of(header: Dataset, keyword: str) -> list[str]:
    """Return an attribute's values as texts; none where it is absent or empty."""
    value = value_of(header, keyword)
    if value is None or isinstance(value, str | bytes):
        return [str(value)] if value else []
    if isinstance(value, ItemSequence | Dataset):
        return []
    return [str(part) for part in value] if isinstance(value, Iterable) else [str(value)]


def text_of(header: Dataset, keyword: str) -> str:
    """Return an attribute's values as one text without space around it, empty where there is none."""
    return " ".join(texts_of(header, keyword)).strip()


def whole_of(header: Dataset, keyword: str) -> int:
    """Return an attribute's value if it is a whole number, else 0."""
    value = value_of(header, keyword)
    return value if isinstance(value, int) else 0


def items_of(header: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence; none where it is absent or no sequence."""
    value = value_of(header, keyword)
    return [item for item in value if isinstance(item, Dataset)] if isinstance(value, ItemSequence) else []


def codes_of(header: Dataset, keyword: str) -> list[tuple[str, str, str]]:
    """Return the coded entries of a sequence (PS3.3 8.8): value, scheme, meaning; entries without a value are left out."""
    codes = [
        (text_of(item, "CodeValue"), text_of(item, "CodingSchemeDesignator").upper(), text_of(item, "CodeMeaning"))
        for item in items_of(header, keyword)
    ]
    return [code for code in codes if code[0]]
