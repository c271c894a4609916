"""Where the lungs are in a chest CT, by threshold and shape. Limits where findings may lie and says on which side they are.

A mass as dense as the wall leaves a dent in the airy lung. Dents up to the width of a large mass are told apart from the lung itself,
because a part of hilum and mediastinum lies in them too: what is small there is no nodule.

Works on a part of a chest too: nothing is expected of the first and last slice. Must never import torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.eligibility import NotEligible

RIGHT, LEFT = 1, 2

_AIRY_HU = -400.0  # below: lung or air
_GAS_HU = -975.0  # a cavity this empty at its median is gas, not lung
_TISSUE_HU = -200.0
_SMALLEST_ML = 8.0
_CLOSING_MM = 15.0  # bridges vessels, and nodules at the pleura
_DENT_MM = 30.0  # closes the dent of a mass of 60 mm, and not the one of the heart, which is wider
_DENT_PIXEL_MM = 2.0  # finer pixels are left out, since distances of 30 mm over the whole chest cost seconds there
_NECK_MM = 9.0  # half the widest bridge between both lungs that is cut

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
Box = tuple[slice, ...]


def lung_region(hu: NDArray[np.float32], spacing_mm: Spacing) -> tuple[Mask, NDArray[np.int8]]:
    """Find the lungs, with the vessels and nodules in them.

    `hu` is (slices, rows, columns) with rows towards the back and columns towards the patient's left, `spacing_mm` in the
    same order. Returns a mask and, of the same shape, the side of each of its voxels: 1 right, 2 left, 0 elsewhere.

    Raises:
        NotEligible: "no-lung", if no air-filled space of lung's density and size lies inside the body.
    """
    pieces = _airy_pieces(hu, spacing_mm)
    if not pieces.any():
        raise NotEligible("no-lung", "No lung was found in the images.")
    middle = _middle_column(hu)
    sides = _split(pieces, middle, spacing_mm)
    region = np.zeros(hu.shape, dtype=np.bool_)
    side = np.zeros(hu.shape, dtype=np.int8)
    for label in (RIGHT, LEFT):
        own = sides == label
        if not own.any():
            continue
        filled, box = _filled(own, spacing_mm, _CLOSING_MM)
        taken = filled & (side[box] == 0) & (sides[box] != (LEFT if label == RIGHT else RIGHT))
        side[box][taken] = label
        region[box] |= taken
    return region, side


def lung_with_dents(hu: NDArray[np.float32], spacing_mm: Spacing) -> tuple[Mask, NDArray[np.int8], Mask]:
    """Find the lungs with the dents in them, the side of each voxel of both, and the lungs alone as `lung_region` finds them.

    Raises:
        NotEligible: as `lung_region` does.
    """
    lung, side = lung_region(hu, spacing_mm)
    rows, columns = (max(1, round(_DENT_PIXEL_MM / step)) for step in spacing_mm[1:])
    with_dents = side.copy()
    for label in (RIGHT, LEFT):
        own = side[:, ::rows, ::columns] == label
        if own.any():
            filled, box = _filled(own, (spacing_mm[0], spacing_mm[1] * rows, spacing_mm[2] * columns), _DENT_MM)
            closed = np.zeros(own.shape, dtype=np.bool_)
            closed[box] = filled
            fine = closed.repeat(rows, axis=1).repeat(columns, axis=2)[:, : hu.shape[1], : hu.shape[2]]
            with_dents[fine & (with_dents == 0)] = label
    return with_dents > 0, with_dents, lung


def _airy_pieces(hu: NDArray[np.float32], spacing_mm: Spacing) -> Mask:
    """Everything airy, of lung's density, inside the body and over 8 ml."""
    labels, count = ndimage.label(hu < _AIRY_HU)
    if not count:
        return np.zeros(hu.shape, dtype=np.bool_)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    outside = np.unique(np.concatenate([labels[:, edge].ravel() for edge in (0, -1)] + [labels[:, :, edge].ravel() for edge in (0, -1)]))
    kept = sizes * (np.prod(spacing_mm) / 1000.0) > _SMALLEST_ML
    kept[0] = False
    kept[outside] = False
    boxes = ndimage.find_objects(labels)
    for label in np.flatnonzero(kept):
        box = boxes[label - 1]
        kept[label] = float(np.median(hu[box][labels[box] == label])) > _GAS_HU
    return np.asarray(kept[labels], dtype=np.bool_)


def _middle_column(hu: NDArray[np.float32]) -> float:
    """Column of the body's middle: halfway between its sides, as a median over slices."""
    present = (hu > _TISSUE_HU).sum(axis=1) * 1.0  # (slices, columns): tissue along each column of pixels
    columns = np.arange(hu.shape[2])
    weights = present.sum(axis=1)
    weights[weights == 0] = 1
    return float(np.median((present * columns).sum(axis=1) / weights))


def _split(pieces: Mask, middle: float, spacing_mm: Spacing) -> NDArray[np.int8]:
    """Give each voxel its side. A piece on both sides is parted at its necks, or else at the middle."""
    sides = np.zeros(pieces.shape, dtype=np.int8)
    labels, _ = ndimage.label(pieces)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        own = labels[box] == number
        columns = np.arange(box[2].start, box[2].stop)
        amount = own.sum(axis=(0, 1))
        share = float(amount[columns < middle].sum() / amount.sum())
        if 0.15 < share < 0.85:
            sides[box][own] = _parted(own, middle - box[2].start, spacing_mm)[own]
        else:
            sides[box][own] = RIGHT if share >= 0.5 else LEFT
    return sides


def _parted(piece: Mask, middle: float, spacing_mm: Spacing) -> NDArray[np.int8]:
    """Part one piece in two by shrinking it until two large cores remain; each voxel goes to the nearest core.

    Every second voxel along each axis is enough to find the necks.
    """
    coarse = piece[::2, ::2, ::2]
    sampling = tuple(2 * step for step in spacing_mm)
    depth = ndimage.distance_transform_edt(np.pad(coarse, ((0, 0), (1, 1), (1, 1))), sampling=sampling)[:, 1:-1, 1:-1]
    for shrunk_mm in np.arange(2.0, _NECK_MM, 2.0):
        cores, count = ndimage.label(depth > shrunk_mm)
        sizes = np.bincount(cores.ravel(), minlength=count + 1)
        sizes[0] = 0
        large = [int(core) for core in np.flatnonzero(sizes > 0.15 * sizes.sum())]
        centres = [float(2 * ndimage.center_of_mass(cores == core)[2]) for core in large]
        if any(c < middle for c in centres) and any(c >= middle for c in centres):
            seeds = np.zeros(coarse.shape, dtype=np.int8)
            for core, centre in zip(large, centres, strict=True):
                seeds[cores == core] = RIGHT if centre < middle else LEFT
            nearest = ndimage.distance_transform_edt(seeds == 0, sampling=sampling, return_distances=False, return_indices=True)
            parted = seeds[tuple(nearest)]
            for axis, size in enumerate(piece.shape):
                parted = np.repeat(parted, 2, axis=axis).take(np.arange(size), axis=axis)
            return np.asarray(parted, dtype=np.int8)
    by_middle = np.where(np.arange(piece.shape[2]) < middle, RIGHT, LEFT).astype(np.int8)
    return np.broadcast_to(by_middle, piece.shape)


def _filled(lung: Mask, spacing_mm: Spacing, closing_mm: float) -> tuple[Mask, Box]:
    """One lung closed in its slices and without holes, in a box of the volume."""
    tight = ndimage.find_objects(lung.astype(np.int8))[0]
    margin = tuple(int(np.ceil(closing_mm / step)) + 1 for step in spacing_mm[1:])
    padded = np.pad(lung[tight], ((0, 0), (margin[0],) * 2, (margin[1],) * 2))
    for k in range(len(padded)):
        if padded[k].any():
            near = ndimage.distance_transform_edt(~padded[k], sampling=spacing_mm[1:]) <= closing_mm
            closed = ndimage.distance_transform_edt(near, sampling=spacing_mm[1:]) > closing_mm
            padded[k] = ndimage.binary_fill_holes(closed | padded[k])
    return padded[:, margin[0] : -margin[0], margin[1] : -margin[1]], tight
