"""Where the brain is in an MR volume of a head, and on which side what lies. Limits where findings may lie.

A network outlines the brain in any contrast; what is no head has none of a brain's size. Must never look at a header or import torch.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.gates import BRAIN, fitted, probabilities, scaled

STEP_MM = 4.0  # the network's grid
WINDOW = (48, 64, 48)  # its voxels along slice, row, column
SMALLEST_ML, LARGEST_ML = 300.0, 2200.0  # of a brain, or of the part of it that was scanned
SMALLEST_CERTAINTY = 0.7  # mean probability inside
LEAST_DEPTH = 1.0  # front to back, of its width: an adult's brain has 1.1 or more
AROUND_MM = 12.0  # findings may lie this far outside the brain
GROWN_MM, SHRUNK_MM = 10.0, 7.0  # what lies in a dent of the outline is brain: a tumour at its surface; some 3 mm around it are left
ONE_VALUE = 1e-4  # of the range of an image: what differs less from its border is the background of an image without a skull
LEAST_BACKGROUND = 0.98  # of an image's border has one value where a skull was taken away

Mask = NDArray[np.bool_]


def head_region(image: NDArray[np.float32], spacing_mm: tuple[float, float, float]) -> tuple[Mask, NDArray[np.int8]]:
    """Return the brain with what is within 12 mm of it, and the side of each voxel: 1 right, 2 left.

    `image` is (slices, rows, columns) with rows towards the back and columns towards the patient's left.

    Raises:
        NotEligible: "no-head" if no brain, and no large part of one, is seen.
    """
    region, side, _ = brain_in_head(image, spacing_mm)
    return region, side


def brain_in_head(image: NDArray[np.float32], spacing_mm: tuple[float, float, float]) -> tuple[Mask, NDArray[np.int8], Mask]:
    """Return what `head_region` does, and the brain alone with some 3 mm around it.

    Where the skull has been taken away, which leaves one value around the brain, the brain is all that has another one.
    """
    inside = without_background(image)
    if inside is not None:  # the value around it may be any: 0 in the middle of what was normalised already
        image = np.where(inside, image, np.float32(image[inside].min()))
    factors = np.array(spacing_mm) / STEP_MM
    small = image
    for axis, factor in enumerate(factors):
        if factor < 1:
            small = ndimage.uniform_filter1d(small, max(1, round(1 / factor)), axis=axis, mode="nearest")
    small = scaled(ndimage.zoom(small, factors, order=1, mode="nearest", grid_mode=True))
    chances = _slid(small)
    brain = _largest(chances > 0.5)
    volume_ml = float(brain.sum()) * STEP_MM**3 / 1000
    if not SMALLEST_ML <= volume_ml <= LARGEST_ML or float(chances[brain].mean()) < SMALLEST_CERTAINTY:
        raise NotEligible("no-head", f"The pixels show no brain: {volume_ml:.0f} ml look like one.")
    depth, width = (np.ptp(np.flatnonzero(brain.any(axis=axes))) + 1 for axes in ((0, 2), (0, 1)))
    if depth < LEAST_DEPTH * width:
        raise NotEligible("no-head", "The pixels show no brain: what looks like one is wider than it is deep.")
    back = np.array(image.shape) / brain.shape
    region = _zoomed(_within(brain, AROUND_MM), back)
    middle = (float(np.argwhere(brain)[:, 2].mean()) + 0.5) * back[2]
    side = np.ascontiguousarray(np.broadcast_to(np.where(np.arange(image.shape[2]) + 0.5 < middle, 1, 2).astype(np.int8), image.shape))
    if inside is not None:
        return region, side, region & inside
    closed = ~_within(~_within(brain, GROWN_MM), SHRUNK_MM)
    return region, side, region & _zoomed(ndimage.binary_fill_holes(closed), back)


def without_background(image: NDArray[np.float32]) -> Mask | None:
    """Return the voxels that are no background where the background has one value, as around a brain without its skull; else None.

    Voxels of that value within the brain belong to it.
    """
    border = np.concatenate([image[[0, -1]].ravel(), image[:, [0, -1]].ravel(), image[:, :, [0, -1]].ravel()])
    value = float(np.median(border))
    near = ONE_VALUE * float(np.ptp(image))
    if near == 0 or float(np.mean(np.abs(border - value) <= near)) < LEAST_BACKGROUND:
        return None
    inside = np.abs(image - value) > near
    return np.asarray(ndimage.binary_fill_holes(inside), dtype=np.bool_)


def _within(mask: Mask, distance_mm: float) -> Mask:
    """The mask with what is near it, on the network's grid; beyond the image's border lies nothing."""
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=STEP_MM) <= distance_mm, dtype=np.bool_)


def _zoomed(mask: Mask, factors: NDArray[np.float64]) -> Mask:
    return np.asarray(ndimage.zoom(mask.astype(np.float32), factors, order=1, mode="nearest", grid_mode=True) > 0.5, dtype=np.bool_)


def _slid(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The network's answer on an image of any size: windows that overlap by half at least, averaged."""
    window = tuple(min(n, w) for n, w in zip(image.shape, WINDOW, strict=True))
    starts = [sorted({*range(0, n - w, max(1, w // 2)), n - w}) for n, w in zip(image.shape, window, strict=True)]
    total, count = (np.zeros(image.shape, dtype=np.float32) for _ in range(2))
    for corner in itertools.product(*starts):
        box = tuple(slice(first, first + w) for first, w in zip(corner, window, strict=True))
        padded, place = fitted(image[box], WINDOW)
        total[box] += probabilities(BRAIN, padded[None])[0, 0][place]
        count[box] += 1
    return total / count


def _largest(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    return np.asarray(labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:])), dtype=np.bool_)
