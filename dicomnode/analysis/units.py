"""Stored pixel values to the modality's units: rescale or Modality LUT, padding, and the sense of a projection (PS3.3 C.7.6.3, C.11.1).

Works in place where it can: an image passes through the processor's cache once. Must never lose a value to a narrower type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicomnode.analysis.eligibility import NotEligible, number_of
from dicomnode.findings import Voxels

AIR_HU = -1000.0
_LOWEST, _HIGHEST = -(2**15), 2**15 - 1  # of int16
_EXACT = 2.0**24  # whole numbers up to here are exact in float32


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How one image's values are stored (PS3.3 C.7.6.3.1)."""

    rows: int
    columns: int
    bits_allocated: int  # 8, 16 or 32
    bits_stored: int
    signed: bool

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of a stored value, little endian."""
        return np.dtype(f"<{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @cached_property
    def frame_bytes(self) -> int:
        """Bytes of a native frame."""
        return self.rows * self.columns * self.bits_allocated // 8

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest value that can be stored."""
        return (-(1 << self.bits_stored - 1), (1 << self.bits_stored - 1) - 1) if self.signed else (0, (1 << self.bits_stored) - 1)


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A Modality LUT (PS3.3 C.11.1.1): stored values up to `first` become its first entry, those beyond its end its last."""

    first: int
    table: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Units:
    """What turns one image's stored values into the modality's units."""

    slope: float
    intercept: float
    lookup: Lookup | None
    padding: tuple[int, int] | None  # smallest and largest stored value that marks what lies outside the image
    outside: float | None  # what padding becomes; None: the image's own smallest value
    inverted: bool  # a projection whose small values are bright: turned round, so that air is dark

    def fits_int16(self, pixels: PixelFormat) -> bool | None:
        """Whether int16 holds each value exactly; None: it depends on the values."""
        if self.lookup is not None:
            return bool(self.lookup.table.min() >= _LOWEST and self.lookup.table.max() <= _HIGHEST)
        if self.slope != 1 or not self.intercept.is_integer() or abs(self.intercept) > 2**16 or pixels.bits_allocated > 16:
            return False
        low, high = pixels.bounds
        return True if low + self.intercept >= _LOWEST and high + self.intercept <= _HIGHEST else None


FORMAT_ATTRIBUTES = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
UNITS_ATTRIBUTES = (
    *FORMAT_ATTRIBUTES, "Modality", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "PixelPaddingValue", "PixelPaddingRangeLimit",
)  # fmt: skip


def format_of(values: Mapping[str, Any]) -> PixelFormat:
    """Return how a plane's pixels are stored, by the values of FORMAT_ATTRIBUTES.

    Raises:
        NotEligible: they are no greyscale of 8, 16 or 32 bits.
    """
    rows, columns, allocated, stored = (
        value if isinstance(value := values[keyword], int) else 0 for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored")
    )
    sign = values["PixelRepresentation"]
    if (
        values["SamplesPerPixel"] != 1
        or values["PhotometricInterpretation"] not in ("MONOCHROME1", "MONOCHROME2")
        or allocated not in {8, 16, 32}
        or not 1 <= stored <= allocated
        or values["HighBit"] != stored - 1
        or sign not in (0, 1)
    ):
        raise NotEligible("pixel-format", "The pixels are no greyscale of 8, 16 or 32 bits.")
    return PixelFormat(rows=rows, columns=columns, bits_allocated=allocated, bits_stored=stored, signed=sign == 1)


def units_of(values: Mapping[str, Any], *, projection: bool) -> Units:
    """Return what turns a plane's stored values into units, by the values of UNITS_ATTRIBUTES; only CT may not leave rescaling out.

    Raises:
        NotEligible: a CT image doesn't say how its values become Hounsfield units, or a LUT is malformed.
    """
    is_ct = values["Modality"] == "CT"
    pixels = format_of(values)
    lookup = _lookup(values, pixels)
    slope, intercept = number_of(values["RescaleSlope"]), number_of(values["RescaleIntercept"])
    if is_ct and lookup is None and (slope is None or intercept is None or slope == 0):
        raise NotEligible("not-hu", "Rescale Slope or Intercept of an image is absent or malformed.")
    return Units(
        slope=slope or 1.0,
        intercept=intercept or 0.0,
        lookup=lookup,
        padding=_padding(values, pixels),
        outside=AIR_HU if is_ct else None,
        inverted=projection and values["PhotometricInterpretation"] == "MONOCHROME1",
    )


def clean(stored: NDArray[Any], pixels: PixelFormat) -> None:
    """Remove, in place, what stands above Bits Stored: old overlays, or rubbish."""
    unused = pixels.bits_allocated - pixels.bits_stored
    if unused and pixels.signed:
        np.left_shift(stored, unused, out=stored)
        np.right_shift(stored, unused, out=stored)  # of signed integers with the sign
    elif unused:
        np.bitwise_and(stored, (1 << pixels.bits_stored) - 1, out=stored)


def convert(stored: NDArray[Any], pixels: PixelFormat, units: Units, out: Voxels) -> bool:
    """Write the image's units to `out`, which may share its memory with `stored`; return whether its type holds all of them."""
    padded = None
    if units.padding is not None:
        padded = (stored >= units.padding[0]) & (stored <= units.padding[1])
        if not padded.any():
            padded = None
    fits = _linear(stored, pixels, units, out, padded) if units.lookup is None else _looked_up(stored, units, units.lookup, out)
    if padded is not None and fits:
        if units.outside is not None:
            out[padded] = units.outside
        elif not padded.all():
            out[padded] = out[~padded].min()
    return fits


def _linear(stored: NDArray[Any], pixels: PixelFormat, units: Units, out: Voxels, padded: NDArray[np.bool_] | None) -> bool:
    low, high = pixels.bounds
    turned = low + high  # stored values turned round: the smallest becomes the largest
    if out.dtype == np.int16:
        if units.fits_int16(pixels) is None:
            real = stored if padded is None else stored[~padded]
            if real.size:
                low, high = (turned - real.max(), turned - real.min()) if units.inverted else (int(real.min()), int(real.max()))
            if low + units.intercept < _LOWEST or high + units.intercept > _HIGHEST:
                return False
        whole = out.view(np.uint16)  # arithmetic modulo 65536 is exact where the result fits
        if stored.dtype.itemsize != 2 or not np.shares_memory(stored, out):
            np.copyto(whole, stored, casting="unsafe")
        if units.inverted:
            np.subtract(np.uint16(turned % 65536), whole, out=whole)
        if units.intercept:
            np.add(whole, np.uint16(int(units.intercept) % 65536), out=whole)
        return True
    slope, intercept = units.slope, units.intercept
    if units.inverted:
        slope, intercept = -slope, intercept + slope * turned
    exact = slope.is_integer() and intercept.is_integer() and max(abs(low), abs(high)) * abs(slope) + abs(intercept) < _EXACT
    kind = np.float32 if exact else np.float64  # then rounded once
    values = out if exact else np.empty(stored.shape, dtype=np.float64)
    np.multiply(stored, kind(slope), out=values, casting="unsafe")
    values += kind(intercept)
    if not exact:
        np.copyto(out, values, casting="same_kind")
    return True


def _looked_up(stored: NDArray[Any], units: Units, lookup: Lookup, out: Voxels) -> bool:
    last = len(lookup.table) - 1
    values = lookup.table[np.clip(stored.astype(np.int64) - lookup.first, 0, last)]
    np.copyto(out, lookup.table.max() + lookup.table.min() - values if units.inverted else values, casting="unsafe")
    return True


def _padding(values: Mapping[str, Any], pixels: PixelFormat) -> tuple[int, int] | None:
    """Return the smallest and largest padding value (PS3.3 C.7.5.1.1.2) as stored: many writers encode signed ones as unsigned."""
    bounds = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = values[keyword]
        if isinstance(value, int):
            wrapped = value % 2**pixels.bits_allocated
            half = 2 ** (pixels.bits_allocated - 1)
            bounds.append(wrapped - 2 * half if pixels.signed and wrapped >= half else wrapped)
    return (min(bounds), max(bounds)) if bounds and isinstance(values["PixelPaddingValue"], int) else None


def _lookup(values: Mapping[str, Any], pixels: PixelFormat) -> Lookup | None:
    """Return the Modality LUT; its descriptor is the number of entries (0: 65536), the first value mapped, and bits of an entry."""
    sequence = values["ModalityLUTSequence"]
    if not sequence:
        return None
    try:
        item = sequence[0]
        entries, first, bits = (int(value) for value in item.LUTDescriptor)
        data = item.LUTData
        table = np.frombuffer(data, dtype="<u2") if isinstance(data, bytes) else np.asarray(_numbers(data), dtype=np.int64)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise NotEligible("pixel-format", "The Modality LUT of an image is malformed.") from error
    entries = entries or 65536
    if bits == 8 and isinstance(data, bytes) and len(table) * 2 == entries:  # two entries in a word
        table = np.frombuffer(data, dtype=np.uint8)
    if len(table) < entries or not 8 <= bits <= 16:
        raise NotEligible("pixel-format", "The Modality LUT of an image is malformed.")
    if pixels.signed and first >= 2**15:
        first -= 2**16
    return Lookup(first=first, table=np.ascontiguousarray(table[:entries] & 0xFFFF, dtype=np.int32))


def _numbers(data: object) -> Sequence[int]:
    return [int(value) for value in data] if isinstance(data, Sequence) else [int(str(data))]
