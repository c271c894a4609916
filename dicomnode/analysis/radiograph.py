"""Whether a projection is a frontal radiograph of a human chest, the right way up and of the right polarity, by its pixels alone.

The lung fields that a network outlines must look like those of a chest: two of them, beside each other, of plausible size and shape.
A film that passes only when black and white are exchanged has a wrong polarity. Must never look at a header or import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.gates import LUNG_FIELDS, fitted, probabilities, scaled

SIZE_PX = 192  # of the longer side, as the network was trained
LARGEST_STRETCH = 3.0  # of the longer side to the shorter: beyond it there is no room for two lungs

Mask = NDArray[np.bool_]

# What a pair of lung fields must be. Set on projected phantoms; CONTRAST, OVERLAP and the areas follow the anatomy of adults.
SMALLEST_FIELD, SMALLEST_BOTH, LARGEST_BOTH = 0.02, 0.10, 0.75  # of the image
SMALLEST_RATIO = 0.35  # of the smaller field to the larger one
SMALLEST_OVERLAP = 0.6  # of their rows
SMALLEST_STRETCH = 1.05  # height to width, of each
SMALLEST_CERTAINTY = 0.7  # mean probability inside
SMALLEST_SHARE = 0.8  # of a field that its largest piece holds
SMALLEST_SOLIDITY = 0.75  # of its convex outline that a field fills
SMALLEST_CONTRAST = 0.03  # by how much of the grey scale lung is darker than what lies between and below both


@dataclass(frozen=True, kw_only=True)
class LungFields:
    """The two fields that the network outlines, on a film of at most SIZE_PX, and why they are none of a chest, if so."""

    right: Mask
    left: Mask
    faults: tuple[str, ...]

    @property
    def middle(self) -> float:
        """Where the middle between both fields lies, as a share of the film's width."""
        columns = [float(np.argwhere(field)[:, 1].mean()) for field in (self.right, self.left)]
        return float((sum(columns) / 2 + 0.5) / self.right.shape[1])


def chest_radiograph_region(image: NDArray[np.float32], spacing_mm: tuple[float, float, float]) -> tuple[Mask, NDArray[np.int8]]:
    """Return where findings may lie, which is the whole film, and the side of each pixel: 1 the patient's right, 2 left.

    `image` is (1, rows, columns), bone bright, the patient's right at its left. Spacing decides nothing: films come without it.

    Raises:
        NotEligible: "polarity" if black and white are exchanged; "no-chest" if no upright frontal chest is seen either way.
    """
    del spacing_mm
    fields = _accepted(image[0])
    return np.ones(image.shape, dtype=np.bool_), _sides(fields, image.shape)


def lung_field_region(image: NDArray[np.float32], spacing_mm: tuple[float, float, float]) -> tuple[Mask, NDArray[np.int8]]:
    """Return the same, with the two lung fields as where findings may lie: without their dents, where dense lung looks like none.

    Raises:
        NotEligible: as `chest_radiograph_region`.
    """
    del spacing_mm
    fields = _accepted(image[0])
    small = filled(fields.right) | filled(fields.left)
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(image.shape[1:], small.shape, strict=True))
    return small[np.ix_(rows, columns)][None], _sides(fields, image.shape)


def _accepted(film: NDArray[np.float32]) -> LungFields:
    as_it_is, exchanged = lung_fields(film), lung_fields(-film)
    if as_it_is.faults and not exchanged.faults:
        raise NotEligible("polarity", "The pixels show a chest only with black and white exchanged: Photometric Interpretation is wrong.")
    if as_it_is.faults:
        raise NotEligible("no-chest", f"The pixels show no frontal chest: {as_it_is.faults[0]}.")
    return as_it_is


def _sides(fields: LungFields, shape: tuple[int, ...]) -> NDArray[np.int8]:
    side = np.where(np.arange(shape[2]) + 0.5 < fields.middle * shape[2], 1, 2).astype(np.int8)
    return np.ascontiguousarray(np.broadcast_to(side, shape))


def lung_fields(film: NDArray[np.float32]) -> LungFields:
    """Outline the lung fields of a film (rows, columns) and say what speaks against a chest."""
    nothing = np.zeros(film.shape, dtype=np.bool_)
    if max(film.shape) > LARGEST_STRETCH * min(film.shape) or min(film.shape) < 32:
        return LungFields(right=nothing, left=nothing, faults=("the image is too narrow or too small",))
    coarser = max(1, max(film.shape) // SIZE_PX)  # whole pixels are averaged, the rest is interpolated
    rows, columns = (n // coarser for n in film.shape)
    small = film[: rows * coarser, : columns * coarser].reshape(rows, coarser, columns, coarser).mean(axis=(1, 3))
    small = ndimage.zoom(small, SIZE_PX / max(small.shape), order=1, mode="nearest", grid_mode=True)[:SIZE_PX, :SIZE_PX]
    small = scaled(small)
    square, place = fitted(small, (SIZE_PX, SIZE_PX))
    chances = probabilities(LUNG_FIELDS, square[None])[0][(slice(None), *place)]
    return LungFields(right=_largest(chances[0] > 0.5), left=_largest(chances[1] > 0.5), faults=tuple(_faults(chances, small)))


def _faults(chances: NDArray[np.float32], film: NDArray[np.float32]) -> list[str]:
    """What speaks against a chest, worst first; empty for a chest. `chances` is (2, rows, columns) of `film`."""
    whole = [chance > 0.5 for chance in chances]
    right, left = fields = [_largest(field) for field in whole]
    areas = [float(field.mean()) for field in fields]
    if min(areas) < SMALLEST_FIELD or not SMALLEST_BOTH <= sum(areas) <= LARGEST_BOTH:
        return [f"lung fields of {100 * areas[0]:.0f} and {100 * areas[1]:.0f} % of the image"]
    faults = []
    if min(areas) < SMALLEST_RATIO * max(areas):
        faults.append("one lung field is much smaller than the other")
    rows, columns = ([np.flatnonzero(field.any(axis=axis)) for field in fields] for axis in (1, 0))
    shared = min(rows[0][-1], rows[1][-1]) - max(rows[0][0], rows[1][0])
    if shared < SMALLEST_OVERLAP * min(len(rows[0]), len(rows[1])):
        faults.append("the lung fields don't lie beside each other")
    if np.argwhere(right)[:, 1].mean() >= np.argwhere(left)[:, 1].mean():
        faults.append("the lung fields are on the wrong sides")
    if any(len(r) < SMALLEST_STRETCH * len(c) for r, c in zip(rows, columns, strict=True)):
        faults.append("a lung field is wider than it is high")
    if any(float(chance[field].mean()) < SMALLEST_CERTAINTY for chance, field in zip(chances, fields, strict=True)):
        faults.append("the network is not certain of lung")
    if any(field.sum() < SMALLEST_SHARE * every.sum() for field, every in zip(fields, whole, strict=True)):
        faults.append("a lung field is in pieces")
    if any(_solidity(field) < SMALLEST_SOLIDITY for field in fields):
        faults.append("a lung field is ragged")
    if _darker_by(right | left, film) < SMALLEST_CONTRAST:
        faults.append("the lung fields are not darker than what is around them")
    return faults


def _largest(mask: Mask) -> Mask:
    """The largest connected part of a mask."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    return np.asarray(labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:])), dtype=np.bool_)


def filled(mask: Mask) -> Mask:
    """A lung field without the dents that its rows or its columns close."""
    by_row = np.maximum.accumulate(mask, axis=1) & np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    by_column = np.maximum.accumulate(mask, axis=0) & np.maximum.accumulate(mask[::-1], axis=0)[::-1]
    return np.asarray(by_row | by_column, dtype=np.bool_)


def _solidity(mask: Mask) -> float:
    """The share of its outline that a mask fills; the outline has no dents deeper than its rows and columns."""
    return float(mask.sum() / max(1, int(filled(mask).sum())))


def _darker_by(lungs: Mask, film: NDArray[np.float32]) -> float:
    """How much darker lung is than what lies between both fields and right below them, as a share of the grey scale."""
    rows, columns = (np.flatnonzero(lungs.any(axis=axis)) for axis in (1, 0))
    low = min(film.shape[0], rows[-1] + (rows[-1] - rows[0]) // 8 + 1)
    box = np.zeros(lungs.shape, dtype=np.bool_)
    box[rows[0] + (rows[-1] - rows[0]) // 4 : low, columns[0] : columns[-1] + 1] = True
    around = box & ~ndimage.binary_dilation(lungs, iterations=2)
    return float(np.median(film[around]) - np.median(film[lungs])) if around.any() else 0.0
