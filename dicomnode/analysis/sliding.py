"""A network over an image that is larger than its window: overlapping windows, blended by Gaussian weights.

The weights are separable, so their sum is known beforehand: each window is weighted, added in its place, and nothing is divided at
the end. The cost a window is one pass over its outputs. Knows nothing of manifests, packages or patients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.analysis.grid import Triple
from dicomnode.analysis.networks import Between

SIGMA = 0.125  # of the Gaussian, in windows: as MONAI's sliding window has it
LEAST_WEIGHT = 1e-3  # along each axis, so that a window's corner that nobody else sees still counts

Predict = Callable[[torch.Tensor], torch.Tensor]
"""(n, channels, *window) in, (n, outputs, *window) out."""


@dataclass(frozen=True, kw_only=True)
class Sliding:
    """How windows lie, how many go through the network at a time, and where their results are put together."""

    window: Triple
    overlap: float
    batch: int
    outputs: int
    stitch_on: torch.device


def slide(image: torch.Tensor, predict: Predict, how: Sliding, *, where: NDArray[np.bool_] | None, between: Between) -> torch.Tensor:
    """Return (outputs, k, r, c) float32 on `how.stitch_on`: the blended results of `predict` on the windows of `image`.

    `image` is (channels, k, r, c); one smaller than the window is padded with 0 on both sides. Windows that hold nothing of `where`,
    a mask of the image's shape, are left out, and their results are 0. `between` is told the share that is done before each batch.
    """
    shape = _triple(image.shape[1:])
    before = tuple(max(0, w - n) // 2 for w, n in zip(how.window, shape, strict=True))
    padded_shape = tuple(max(w, n) for w, n in zip(how.window, shape, strict=True))
    axes = [_starts(n, w, how.overlap) for n, w in zip(padded_shape, how.window, strict=True)]
    weights = [_weights(n, w, starts) for n, w, starts in zip(padded_shape, how.window, axes, strict=True)]
    places = [
        place
        for place in itertools.product(*(range(len(starts)) for starts in axes))
        if where is None or _touches(where, [starts[i] - b for starts, i, b in zip(axes, place, before, strict=True)], how.window)
    ]
    total = torch.zeros((how.outputs, *padded_shape), dtype=torch.float32, device=how.stitch_on)
    padded = _padded(image, before, padded_shape)
    for first in range(0, len(places), how.batch):
        between(first / len(places))
        batch = places[first : first + how.batch]
        boxes = [tuple(slice(axes[a][i], axes[a][i] + how.window[a]) for a, i in enumerate(place)) for place in batch]
        results = predict(torch.stack([padded[(slice(None), *box)] for box in boxes]))
        for place, box, result in zip(batch, boxes, results, strict=True):
            k, r, c = (torch.from_numpy(weights[a][i]).to(how.stitch_on) for a, i in enumerate(place))
            weight = k[:, None, None] * r[None, :, None] * c[None, None, :]
            total[(slice(None), *box)].addcmul_(result.to(how.stitch_on, torch.float32), weight)
    inside = tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))
    return total[(slice(None), *inside)]


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Return where windows begin along an axis of at least the window's size; the last one ends with it."""
    step = max(1, int(window * (1 - overlap)))
    count = -(-(size - window) // step) + 1
    return [min(i * step, size - window) for i in range(count)]


def _weights(size: int, window: int, starts: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return the weights of each window along one axis: Gaussians, divided by their sum at each position."""
    positions = np.arange(window) - (window - 1) / 2
    gaussian = np.maximum(np.exp(-0.5 * (positions / (SIGMA * window)) ** 2), LEAST_WEIGHT)
    sums = np.zeros(size)
    for start in starts:
        sums[start : start + window] += gaussian
    return [(gaussian / sums[start : start + window]).astype(np.float32) for start in starts]


def _touches(where: NDArray[np.bool_], starts: Sequence[int], window: Triple) -> bool:
    return bool(where[tuple(slice(max(0, s), max(0, s + w)) for s, w in zip(starts, window, strict=True))].any())


def _padded(image: torch.Tensor, before: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    after = [n - b - size for n, b, size in zip(shape, before, image.shape[1:], strict=True)]
    if not any(before) and not any(after):
        return image
    pads = [pad for axis in (2, 1, 0) for pad in (before[axis], after[axis])]  # torch wants the last axis first
    return torch.nn.functional.pad(image, pads)


def _triple(shape: Sequence[int]) -> Triple:
    first, second, third = shape
    return first, second, third
