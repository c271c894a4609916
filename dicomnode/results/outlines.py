"""The border of a mask as closed lines between its pixels and the others: exact, whatever the mask's shape.

Must never smooth or leave out a corner: what lies within the lines is the mask, pixel by pixel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # (column, row): right, down, left, up, each a quarter turn to the right of the one before


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Return closed lines, each (n, 2) of (column, row) with its first point again at its end, holes running the other way round.

    (0, 0) is the top left corner of the first pixel and pixels are 1 wide (PS3.3 C.10.5), so that all corners are whole numbers. Of two
    pixels that touch at a corner alone each has a line of its own.
    """
    inside = np.pad(mask, 1)
    centre = inside[1:-1, 1:-1]
    borders = (  # of each pixel with none of the mask beside it, so that the mask is at the right hand: where it begins
        (centre & ~inside[:-2, 1:-1], 0, 0),
        (centre & ~inside[1:-1, 2:], 1, 0),
        (centre & ~inside[2:, 1:-1], 1, 1),
        (centre & ~inside[1:-1, :-2], 0, 1),
    )
    leaving: dict[tuple[int, int], list[int]] = {}  # from each corner: where its borders run
    for direction, (pixels, right, down) in enumerate(borders):
        for row, column in np.argwhere(pixels).tolist():
            leaving.setdefault((column + right, row + down), []).append(direction)
    lines = []
    for start in sorted(leaving):
        while leaving[start]:
            lines.append(_line(start, leaving))
    return lines


def _line(start: tuple[int, int], leaving: dict[tuple[int, int], list[int]]) -> NDArray[np.float64]:
    """Follow the borders from a corner until it is reached again, taking them away; points where the line turns."""
    here, direction, points = start, leaving[start].pop(), [start]
    while True:
        here = here[0] + _STEPS[direction][0], here[1] + _STEPS[direction][1]
        if here == start:
            break
        ways = leaving[here]
        turned = next(way for way in ((direction + turn) % 4 for turn in (1, 0, 3)) if way in ways)
        ways.remove(turned)
        if turned != direction:
            points.append(here)
        direction = turned
    return np.array([*points, start], dtype=np.float64)
