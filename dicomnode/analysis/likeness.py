"""What the headers of one series have in common: bytes that a walk has found well-formed once need no second walk.

Only whole elements are compared, with all their bytes, so what stands in a run is what the walk would find there again.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final, NamedTuple

from pydicom.uid import UID

LONGEST_SHARED = 1024  # bytes of an element, or of a value, that is kept for the next files
TRANSFER_SYNTAX: Final = 0x00020010
CHARACTER_SET: Final = 0x00080005
_SERIES: Final = 0x0020000E


class Element(NamedTuple):
    """A data element at the top of a data set, as it is encoded."""

    tag: int
    vr: str | None
    value: bytes
    start: int  # of the element in the file
    value_start: int


class Piece(NamedTuple):
    """An element, and all of its bytes."""

    element: Element
    content: bytes


class Run(NamedTuple):
    """Elements that follow one another, and all of their bytes."""

    first: int  # tag
    last: int
    content: bytes
    pieces: tuple[Piece, ...]


class Likeness:
    """The runs of elements that were equal to the byte in all headers of a series so far; a file of another series begins anew."""

    def __init__(self) -> None:
        self.meta: list[Run] = []
        self._data_set: list[Run] = []
        self._syntax: UID | None = None
        self._series: bytes | None = None

    def data_set(self, syntax: UID) -> list[Run]:
        """Return the runs of data sets in this transfer syntax, which says how they were walked."""
        return self._data_set if syntax == self._syntax else []

    def had_all(self, meta: Sequence[Run], data_set: Sequence[Run]) -> bool:
        """Whether these are all runs, so that a file in which they stand teaches nothing."""
        return len(data_set) == len(self._data_set) > 0 and len(meta) == len(self.meta)

    def learn(self, meta: Sequence[Piece | None], data_set: Sequence[Piece | None], syntax: UID) -> None:
        """Keep of the runs what stands in this file too."""
        series = next((piece.element.value for piece in data_set if piece and piece.element.tag == _SERIES), b"")
        if (syntax, series) == (self._syntax, self._series):
            self.meta, self._data_set = _in_common(self.meta, meta), _in_common(self._data_set, data_set)
        else:
            self.meta, self._data_set, self._syntax, self._series = _runs(meta), _runs(data_set), syntax, series


def piece_of(element: Element, data: bytes | mmap.mmap, end: int) -> Piece | None:
    """Return an element that ends there with its bytes; None if it is long, or says how others are read: no run has such."""
    if element.tag in {TRANSFER_SYNTAX, CHARACTER_SET} or end - element.start > LONGEST_SHARED:
        return None
    return Piece(element, data[element.start : end])


def _in_common(runs: Sequence[Run], pieces: Sequence[Piece | None]) -> list[Run]:
    """Return what of the runs stands among the pieces, and follows one another there as well."""
    places = {piece.content: place for place, piece in enumerate(pieces) if piece}
    common: list[Piece | None] = []
    for run in runs:
        before = None
        for piece in run.pieces:
            place = places.get(piece.content)
            if place is None or (before is not None and place != before + 1):
                common.append(None)
            if place is not None:
                common.append(piece)
            before = place
        common.append(None)
    return _runs(common)


def _runs(pieces: Sequence[Piece | None]) -> list[Run]:
    """Return the runs between the gaps; one element is none, it is as soon walked."""
    runs, stretch = [], list[Piece]()
    for piece in (*pieces, None):
        if piece:
            stretch.append(piece)
            continue
        if len(stretch) > 1:
            content = b"".join(piece.content for piece in stretch)
            runs.append(Run(stretch[0].element.tag, stretch[-1].element.tag, content, tuple(stretch)))
        stretch = []
    return runs
