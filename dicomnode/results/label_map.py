"""Findings as the frames of a Label Map Segmentation (PS3.3 A.51, C.8.20.2): one byte a voxel, RLE Lossless (PS3.5 Annex G).

A label map holds one finding a voxel: where two overlap there is none. Must never change what a voxel belongs to.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from dicomnode.findings import Finding

SOP_CLASS = UID("1.2.840.10008.5.1.4.1.1.66.7")  # Label Map Segmentation Storage: pydicom has no name for it
MOST = 255  # findings: a byte, and 0 is the background
_RUN = 128  # bytes that one run may stand for
_HEADER = struct.pack("<16L", 1, 64, *[0] * 14)  # one segment, right after this header


def label_frames(findings: Sequence[Finding], planes: Sequence[int], shape: tuple[int, int]) -> bytes:
    """Return the encapsulated pixel data of slices `planes`, each a frame of `shape` whose voxels hold their finding's number, else 0."""
    blank = _runs(np.zeros((1, shape[1]), dtype=np.uint8))
    return bytes(encapsulate([_HEADER + _frame(findings, k, shape, blank) for k in planes]))


def _frame(findings: Sequence[Finding], k: int, shape: tuple[int, int], blank: bytes) -> bytes:
    """The runs of one slice. Rows above and below all findings are `blank`, and need no search for runs."""
    here = [finding for finding in findings if 0 <= k - finding.segment.origin[0] < len(finding.segment.mask)]
    if not here:
        return blank * shape[0]
    top = min(finding.segment.origin[1] for finding in here)
    bottom = max(finding.segment.origin[1] + finding.segment.mask.shape[1] for finding in here)
    labels = np.zeros((bottom - top, shape[1]), dtype=np.uint8)
    for finding in here:
        first, row, column = finding.segment.origin
        mask = finding.segment.mask[k - first]
        part = labels[row - top : row - top + mask.shape[0], column : column + mask.shape[1]]
        np.putmask(part, mask, finding.number)
    return b"".join((blank * top, _runs(labels), blank * (shape[0] - bottom)))


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
