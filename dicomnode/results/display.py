"""One image of a file as grey values for a person's eye: decoded, windowed, the right way round.

Must never measure anything, and never die of an image: what cannot be shown is None.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.utils import pixel_array

LUNG_WINDOW = (-600.0, 1500.0)  # centre and width, HU
SOFT_TISSUE_WINDOW = (40.0, 400.0)
MAXIMUM_PIXELS = 100_000_000  # of one frame, by its header, before anything is decoded

# What pydicom and the decoders behind it raise on malformed, truncated or unsupported data.
UNREADABLE = (
    InvalidDicomError, BytesLengthException, ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
    OSError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


def grey_values(file: Path, *, frame: int = 1, lung: bool = False) -> NDArray[np.uint8] | None:
    """Return (rows, columns) of 0..255 for one frame (from 1) of an image file, or None where it cannot be decoded.

    CT has the lung window where `lung`, else the window of its header, else that of soft tissue. MR has the window of its header, all
    else, and MR without one, the range of its values. MONOCHROME1 is turned round: what is dense is bright.
    """
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        if not 0 < int(header.Rows) * int(header.Columns) <= MAXIMUM_PIXELS:
            return None
        stored = pixel_array(file, index=frame - 1)
        values = stored.astype(np.float32) if stored.ndim == 2 else stored[..., :3].astype(np.float32).mean(axis=-1)
        slope, intercept = _rescale(header, frame)
        valid = _valid(header, stored)
        values = values * slope + intercept
        grey = _windowed(values, shown_range(header, values[valid] if valid is not None and valid.any() else values, lung=lung))
    except UNREADABLE:
        return None
    return np.asarray(255 - grey, dtype=np.uint8) if header.get("PhotometricInterpretation") == "MONOCHROME1" else grey


def grey_slice(values: NDArray[np.generic], header: Dataset, *, lung: bool = False) -> NDArray[np.uint8]:
    """Return (rows, columns) of 0..255 for a slice in the modality's units (dense is bright), windowed as by `grey_values`."""
    plain = values.astype(np.float32)
    return _windowed(plain, shown_range(header, plain, lung=lung))


def frame_count(header: Dataset) -> int:
    """Return how many frames an image has, as its header says; 1 where it says nothing or nonsense."""
    number = finite(header.get("NumberOfFrames"))
    return int(number) if number is not None and number >= 1 else 1


def _windowed(values: NDArray[np.float32], bounds: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = bounds
    return np.asarray(np.clip((values - low) * (255.0 / (high - low)), 0, 255), dtype=np.float32).astype(np.uint8)


def shown_range(header: Dataset, values: NDArray[np.float32], *, lung: bool) -> tuple[float, float]:
    """Return the values, in the modality's units, that are shown black and white."""
    window = None
    if header.get("Modality") in ("CT", "MR"):
        centre, width = (finite(value_of(header, keyword)) for keyword in ("WindowCenter", "WindowWidth"))
        if centre is not None and width is not None and width > 1:
            window = centre, width
    if header.get("Modality") == "CT":
        window = LUNG_WINDOW if lung else window or SOFT_TISSUE_WINDOW
    if window is not None:
        return window[0] - window[1] / 2, window[0] + window[1] / 2
    low, high = (float(v) for v in np.nanpercentile(values, (1, 99.5)))
    return low, max(high, low + 1e-6)


def _rescale(header: Dataset, frame: int) -> tuple[float, float]:
    """Rescale Slope and Intercept, of a multi-frame image from its functional groups (PS3.3 C.7.6.16.2.9)."""
    holders = [header]
    for groups in (
        *(header.get("PerFrameFunctionalGroupsSequence") or [])[frame - 1 : frame],
        *(header.get("SharedFunctionalGroupsSequence") or [])[:1],
    ):
        holders += list(groups.get("PixelValueTransformationSequence") or [])
    for holder in holders:
        slope, intercept = finite(holder.get("RescaleSlope")), finite(holder.get("RescaleIntercept"))
        if slope and intercept is not None:
            return slope, intercept
    return 1.0, 0.0


def _valid(header: Dataset, stored: NDArray[np.generic]) -> NDArray[np.bool_] | None:
    """Which pixels aren't padding; None where nothing is said of it."""
    padding = finite(header.get("PixelPaddingValue"))
    return None if padding is None or stored.ndim != 2 else np.asarray(stored != padding)


def value_of(dataset: Dataset, keyword: str) -> object:
    """Return an attribute's value; None where it is absent, or no value of its kind."""
    try:
        value: object = dataset.get(keyword)
    except UNREADABLE:
        return None
    return value


def finite(value: object) -> float | None:
    """Return the value, or the first of several, as a finite number; None if it is none."""
    if isinstance(value, MultiValue | list | tuple):
        value = value[0] if value else None
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if np.isfinite(number) else None
