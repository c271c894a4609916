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
    """The runs of elements that were equal to the byte in all headers of a series so far.

    It begins anew where two files in turn are of another series or transfer syntax, and not yet at the first: they may alternate.
    """

    def __init__(self) -> None:
        self.meta: list[Run] = []
        self._data_set: list[Run] = []
        self._series: tuple[UID, bytes] | None = None  # whose runs these are: transfer syntax and Series Instance UID
        self._before: tuple[UID, bytes] | None = None  # of the file before

    def data_set(self, syntax: UID) -> list[Run]:
        """Return the runs of data sets in this transfer syntax, which says how they were walked."""
        return self._data_set if self._series and syntax == self._series[0] else []

    def recognise(self, meta: Sequence[Run], data_set: Sequence[Run]) -> bool:
        """Return whether the runs that stand in a file are all there are, so that nothing is to be learnt of it."""
        if len(data_set) == len(self._data_set) > 0 and len(meta) == len(self.meta):
            self._before = self._series
            return True
        return False

    def learn(self, meta: Sequence[Piece | None], data_set: Sequence[Piece | None], syntax: UID) -> None:
        """Keep of the runs what stands in this file too."""
        series = syntax, next((piece.element.value for piece in data_set if piece and piece.element.tag == _SERIES), b"")
        if series == self._series:
            self.meta, self._data_set = _in_common(self.meta, meta), _in_common(self._data_set, data_set)
        elif series == self._before or not self._series:
            self.meta, self._data_set, self._series = _runs(meta), _runs(data_set), series
        self._before = series


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
