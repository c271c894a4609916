"""From an image's stored values to grey: what its header says of rescaling, window and polarity, as a presentation state repeats it.

Must never demand an attribute, and never die of one: what is malformed counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from highdicom import VOILUT, ModalityLUT, ModalityLUTTransformation, PresentationLUTTransformation
from highdicom.content import ReferencedImageSequence
from highdicom.pr import SoftcopyVOILUTTransformation
from numpy.typing import NDArray
from pydicom import DataElement, Dataset
from pydicom.tag import Tag

from dicomnode.results.display import UNREADABLE, finite, shown_range, value_of

_FUNCTIONS = ("LINEAR_EXACT", "SIGMOID")  # PS3.3 C.11.2.1.3, beside LINEAR
_DESCRIPTOR = Tag("LUTDescriptor")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A lookup table (PS3.3 C.11.1.1, C.11.2.1.1)."""

    first: int  # the value that its first entry is for
    bits: int  # 8 to 16, of an entry
    entries: bytes

    @property
    def values(self) -> NDArray[np.unsignedinteger]:
        """The entries as numbers."""
        return np.frombuffer(self.entries, dtype=np.dtype("<u1" if self.bits == 8 else "<u2"))


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """Stored values to the modality's units, and whether large ones are dark (MONOCHROME1)."""

    slope: float
    intercept: float
    unit: str  # PS3.3 C.11.1.1.2
    table: Table | None  # in place of slope and intercept
    inverted: bool

    def modality_lut(self) -> ModalityLUTTransformation:
        """Return the Modality LUT module (PS3.3 C.11.1)."""
        if self.table is None:
            return ModalityLUTTransformation(rescale_intercept=self.intercept, rescale_slope=self.slope, rescale_type=self.unit)
        return ModalityLUTTransformation(modality_lut=_described(ModalityLUT(self.unit, 0, self.table.values), self.table))

    def presentation_lut(self) -> PresentationLUTTransformation:
        """Return the Softcopy Presentation LUT module (PS3.3 C.11.6): the image's own polarity doesn't count beside it."""
        return PresentationLUTTransformation(presentation_lut_shape="INVERSE" if self.inverted else "IDENTITY")


@dataclass(frozen=True, kw_only=True)
class Window:
    """The modality's units to greys: a window, or a table."""

    centre: float = 0.0
    width: float = 1.0
    function: str = "LINEAR"
    table: Table | None = None

    def voi_lut(self, images: ReferencedImageSequence | None) -> SoftcopyVOILUTTransformation:
        """Return an item of the Softcopy VOI LUT module (PS3.3 C.11.8) for `images`, or for all."""
        if self.table is not None:
            table = _described(VOILUT(0, self.table.values), self.table)
            return SoftcopyVOILUTTransformation(voi_luts=[table], referenced_images=images)
        return SoftcopyVOILUTTransformation(
            window_center=self.centre,
            window_width=self.width,
            voi_lut_function=None if self.function == "LINEAR" else self.function,
            referenced_images=images,
        )


def rescaling_of(header: Dataset, frame: int | None) -> Rescaling:
    """Return what makes units of an image's stored values, of a multi-frame image of those of a frame (from 1)."""
    slope = intercept = table = None
    unit = ""
    for holder in _holders(header, frame, "PixelValueTransformationSequence"):
        table = next(iter(_tables(holder, "ModalityLUTSequence")), None)
        slope, intercept = finite(value_of(holder, "RescaleSlope")), finite(value_of(holder, "RescaleIntercept"))
        unit = str(value_of(holder, "RescaleType") or "")
        if table is not None or (slope and intercept is not None):
            break
    known = unit.isascii() and unit.isalnum() and len(unit) <= 16
    return Rescaling(
        slope=slope or 1.0,
        intercept=intercept or 0.0,
        unit=unit if known else "HU" if header.get("Modality") == "CT" else "US",
        table=table,
        inverted=header.get("PhotometricInterpretation") == "MONOCHROME1",
    )


def window_of(header: Dataset, frame: int | None) -> Window | None:
    """Return the first window of an image, or of a frame of one, else its first VOI LUT; None where it says neither."""
    for holder in _holders(header, frame, "FrameVOILUTSequence"):
        centre, width = finite(value_of(holder, "WindowCenter")), finite(value_of(holder, "WindowWidth"))
        said = str(value_of(holder, "VOILUTFunction") or "")
        function = said if said in _FUNCTIONS else "LINEAR"
        if centre is not None and width is not None and (width >= 1 if function == "LINEAR" else width > 0):
            return Window(centre=centre, width=width, function=function)
        for table in _tables(holder, "VOILUTSequence"):
            return Window(table=table)
    return None


def window_over(header: Dataset, values: NDArray[np.generic], rescaling: Rescaling, *, lung: bool) -> Window:
    """Return a window for an image that has none, from its values in the modality's units (of a projection: dense is bright)."""
    low, high = shown_range(header, values.astype(np.float32), lung=lung)
    if rescaling.inverted:  # the values were turned round in the range that can be stored
        bits, signed = int(header.BitsStored), int(header.PixelRepresentation)
        turned = rescaling.slope * (-1 if signed else 2**bits - 1) + 2 * rescaling.intercept
        if rescaling.table is not None:
            turned = float(rescaling.table.values.max()) + float(rescaling.table.values.min())
        low, high = turned - high, turned - low
    centre, width = float(f"{(low + high) / 2:.6g}"), float(f"{high - low:.6g}")
    return Window(centre=centre, width=width, function="LINEAR" if width >= 1 else "LINEAR_EXACT")


def _holders(header: Dataset, frame: int | None, group: str) -> Iterator[Dataset]:
    """Where a frame's attributes may stand (PS3.3 C.7.6.16): in its own groups, in those of all frames, in the image's header."""
    if frame is not None:
        for keyword, index in (("PerFrameFunctionalGroupsSequence", frame - 1), ("SharedFunctionalGroupsSequence", 0)):
            groups = value_of(header, keyword)
            if isinstance(groups, Sequence) and len(groups) > index:
                yield from _items(groups[index], group)
    yield header


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    value = value_of(dataset, keyword)
    return list(value) if isinstance(value, Sequence) else []


def _tables(holder: Dataset, keyword: str) -> Iterator[Table]:
    """The lookup tables of a sequence that are well-formed."""
    for item in _items(holder, keyword):
        try:
            count, first, bits = (int(v) for v in item.LUTDescriptor)
            count = count % 2**16 or 2**16  # of a signed image it may be written as a negative number
            data = item.LUTData
            entries = np.frombuffer(data, dtype="<u2") if isinstance(data, bytes) else np.array(list(data), dtype=np.uint16)
        except UNREADABLE:
            continue
        if bits == 8 and isinstance(data, bytes) and 2 * len(entries) in (count, count + 1):  # two entries in a word
            entries = np.frombuffer(data, dtype=np.uint8).astype(np.uint16)
        if 8 <= bits <= 16 and len(entries) >= count:
            yield Table(first=first, bits=bits, entries=entries[:count].astype(np.uint8 if bits == 8 else np.uint16).tobytes())


def _described(item: ModalityLUT | VOILUT, table: Table) -> ModalityLUT | VOILUT:
    """The item with its descriptor in the VR that its first value needs, and with as many bits as the table has."""
    count, signed = len(table.values), table.first < 0
    values = [count % 2**16, table.first, table.bits]
    if signed:
        values[0] = (values[0] + 2**15) % 2**16 - 2**15
    item[_DESCRIPTOR] = DataElement(_DESCRIPTOR, "SS" if signed else "US", values)
    return item
