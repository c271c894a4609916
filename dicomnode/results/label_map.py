"""Findings as frames of a Segmentation with one byte a voxel (PS3.3 A.51, C.8.20.2) in RLE Lossless (PS3.5 Annex G): labels, probabilities.

A label map holds one finding a voxel: where two overlap there is none. Must never change what a voxel belongs to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from dicomnode.findings import Finding

SOP_CLASS = UID("1.2.840.10008.5.1.4.1.1.66.7")  # Label Map Segmentation Storage: pydicom has no name for it
MOST = 255  # findings: a byte, and 0 is the background
Patch = tuple[int, int, NDArray[np.uint8]]  # first row and column of some pixels of a frame, and their values
_RUN = 128  # bytes that one run may stand for
_HEADER = struct.pack("<16L", 1, 64, *[0] * 14)  # one segment, right after this header


def label_frames(findings: Sequence[Finding], planes: Sequence[int], shape: tuple[int, int]) -> bytes:
    """Return the encapsulated pixel data of slices `planes`, each a frame of `shape` whose voxels hold their finding's number, else 0."""
    crossing: dict[int, list[Finding]] = {k: [] for k in planes}
    for finding in findings:
        first = finding.segment.origin[0]
        for k in range(first, first + len(finding.segment.mask)):
            if k in crossing:
                crossing[k].append(finding)
    return encapsulated(([patch(f, k, f.segment.mask, f.number) for f in crossing[k]] for k in planes), shape)


def probability_frames(frames: Sequence[tuple[Finding, int]], shape: tuple[int, int]) -> bytes:
    """Return the encapsulated pixel data of findings on slices, each a frame of `shape` whose voxels hold their probability, else 0."""
    return encapsulated(([patch(f, k, f.segment.probability, 1)] if crosses(f, k) else [] for f, k in frames), shape)


def crosses(finding: Finding, k: int) -> bool:
    """Return whether the box of a finding reaches over a slice."""
    return 0 <= k - finding.segment.origin[0] < len(finding.segment.mask)


def patch(finding: Finding, k: int, box: NDArray[np.bool_] | NDArray[np.uint8] | None, factor: int) -> Patch:
    """Return where a finding's box lies on a slice, and what it has there."""
    first, row, column = finding.segment.origin
    there = np.zeros(finding.segment.mask.shape[1:], dtype=np.bool_) if box is None else box[k - first]
    return row, column, there * np.uint8(factor)


def encapsulated(frames: Iterable[Sequence[Patch]], shape: tuple[int, int]) -> bytes:
    """Return frames of bytes, each 0 but where its patches lie, as encapsulated pixel data."""
    blank = _runs(np.zeros((1, shape[1]), dtype=np.uint8))
    return bytes(encapsulate([_HEADER + _frame(patches, shape, blank) for patches in frames]))


def _frame(patches: Sequence[Patch], shape: tuple[int, int], blank: bytes) -> bytes:
    """The runs of one frame. Rows above and below all patches are `blank`, and need no search for runs."""
    if not patches:
        return blank * shape[0]
    top = min(row for row, _, _ in patches)
    bottom = max(row + len(values) for row, _, values in patches)
    pixels = np.zeros((bottom - top, shape[1]), dtype=np.uint8)
    for row, column, values in patches:
        part = pixels[row - top : row - top + len(values), column : column + values.shape[1]]
        np.maximum(part, values, out=part)
    return b"".join((blank * top, _runs(pixels), blank * (shape[0] - bottom)))


def _runs(labels: NDArray[np.uint8]) -> bytes:
    """PackBits of each row by itself: every run of equal bytes as two, a run of one as a literal of one (PS3.5 G.3.1)."""
    begins = np.ones(labels.shape, dtype=np.bool_)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
    begins[:, ::_RUN] = True
    starts = np.flatnonzero(begins)
    pairs = np.empty((len(starts), 2), dtype=np.uint8)
    pairs[:, 0] = (257 - np.diff(starts, append=labels.size)) & 0xFF
    pairs[:, 1] = labels.ravel()[starts]
    return pairs.tobytes()
