"""Outlines and words on a picture, for whatever file it becomes.

Must never fill an outline: what lies under a finding is what the reader must judge.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

RESEARCH = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
LONG_SIDE = 1024  # pixels of a picture; a larger image is reduced to this
Colour = tuple[int, int, int]  # red, green, blue: 0 to 255
Outlines = Sequence[tuple[NDArray[np.bool_], Colour]]  # masks and their colours, the later over the earlier


def trace(canvas: NDArray[np.uint8], outlines: Outlines, *, thickness: int = 2) -> None:
    """Colour the pixels of `canvas` (rows, columns, 3) just outside of each mask (rows, columns): what is marked stays visible."""
    for mask, colour in outlines:
        grown = np.pad(mask, thickness)
        for _ in range(thickness):
            grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0) | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
        canvas[grown[thickness:-thickness, thickness:-thickness] & ~mask] = colour


def broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, *, most: int) -> list[str]:
    """Return a text as lines that fit into `width` pixels; what is too much ends in dots."""
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text).split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]
