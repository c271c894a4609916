"""What a DT of DICOM means in time (PS3.5 6.2): one moment or a range of them, which may leave open whatever follows the year."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Final

_DT: Final = r"[0-9]{4}(?:[0-9]{2}){0,5}(?:\.[0-9]{1,6})?(?:[+-](?:0[0-9]|1[0-4])[0-5][0-9])?"
_ONE: Final = re.compile(_DT, re.ASCII)
_RANGE: Final = re.compile(rf"({_DT})?-({_DT})?", re.ASCII)


def moment(text: str, *, latest: bool = False) -> datetime:
    """Return the earliest time that a DT can mean, or the latest, aware; one without an offset is of this machine's zone.

    Raises:
        ValueError: it is no DT, or no time that there is.
    """
    if not _ONE.fullmatch(text):
        raise ValueError("no DT")
    digits, offset = (text[:-5], text[-5:]) if text[-5:-4] in {"+", "-"} else (text, "")
    whole, _, fraction = digits.partition(".")
    if fraction and len(whole) < 14:
        raise ValueError("a fraction of something else than a second")
    parts = [int(whole[:4]), *(int(whole[at : at + 2]) for at in range(4, len(whole), 2))]
    year, month, day, hour, minute, second = parts + [1, 1, 0, 0, 0][len(parts) - 1 :]
    made = datetime(year, month, day, hour, minute, second, int(f"{fraction:0<6}"))  # noqa: DTZ001  its zone follows
    try:
        if latest:
            made = _end(made, len(whole), fraction)
        if not offset:
            return made.astimezone()
        minutes = int(offset[1:3]) * 60 + int(offset[3:])
        return made.replace(tzinfo=timezone(timedelta(minutes=minutes if offset[0] == "+" else -minutes)))
    except (OverflowError, OSError) as error:  # at the ends of what a calendar can hold
        raise ValueError("a time that no clock shows") from error


def moments(text: str) -> tuple[datetime | None, datetime | None]:
    """Return the first and the last time of a DT or a range of them, None where it is open (PS3.4 C.2.2.2.5).

    What could be both, like 2026-0500, is a DT with an offset.

    Raises:
        ValueError: it is neither.
    """
    if _ONE.fullmatch(text):
        return moment(text), moment(text, latest=True)
    found = _RANGE.fullmatch(text)
    if found is None or not any(found.groups()):
        raise ValueError("neither a DT nor a range of them")
    return moment(found[1]) if found[1] else None, moment(found[2], latest=True) if found[2] else None


def _end(first: datetime, digits: int, fraction: str) -> datetime:
    """The last microsecond of the year, month, …, second or fraction that begins with `first`."""
    if digits == 4:
        return first.replace(month=12, day=31, hour=23, minute=59, second=59, microsecond=999_999)
    if digits == 6:
        return (first.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(microseconds=1)
    length = timedelta(seconds={8: 86_400.0, 10: 3_600.0, 12: 60.0}.get(digits, 10.0 ** -len(fraction)))
    return first + length - timedelta(microseconds=1)
