"""Why an image, a series or its pixels don't fit a package: the table of codes, and the checks of headers.

A refusal is an outcome with a code (contract 17). Must never look at a patient's name, put patient data into a reason, decide by
an image's size alone, or import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from pydicom.dataset import Dataset

from dicomnode.analysis.frames import Frame
from dicomnode.analysis.manifest import InputSection

# Every code of a refusal, in the order of the checks: the series that came furthest is the closest candidate.
REASONS = {
    "no-images": "the study holds no images",
    "modality": "the images are of another modality",
    "sop-class": "the images are of a SOP class that the package doesn't read",
    "image-type": "all images are localizers, derived images or screens",
    "body-part": "Body Part Examined names another body part, or none where one is demanded",
    "pixel-format": "the pixels are no single-frame greyscale of at most 16 bits",
    "transfer-syntax": "the pixels are compressed in a way that the node doesn't decode",
    "not-hu": "Rescale Slope or Intercept is absent, or the rescaled values are no Hounsfield units",
    "missing-geometry": "the position, orientation, pixel spacing or frame of reference of an image is absent or malformed",
    "too-few-slices": "the series has fewer slices than the package needs",
    "too-many-slices": "the series has more slices than the package reads",
    "mixed-size": "Rows, Columns or Pixel Spacing differ within the series",
    "mixed-orientation": "the images of the series are turned against each other",
    "mixed-frame-of-reference": "the images of the series lie in different frames of reference",
    "too-large": "the volume would have more voxels than the node reads at once",
    "several-acquisitions": "several acquisitions in one series image the same positions",
    "duplicate-positions": "several images of the series lie at the same position",
    "gantry-tilt": "the gantry was tilted, or the slices are shifted against each other in their plane",
    "missing-slices": "there is a gap between neighbouring slices",
    "uneven-spacing": "the distances between neighbouring slices differ",
    "spacing": "the distance of slices or pixels is outside what the package was made for",
    "no-lung": "no lung was found in the images",
}


class NotEligible(Exception):  # an outcome, not an error: the study is answered with it
    """A coded reason why a study, series or volume is not analysed."""

    def __init__(self, code: str, reason: str) -> None:
        if code not in REASONS:
            raise ValueError(f"{code!r} is no code of REASONS")
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


def keep(frames: Sequence[Frame], fits: Callable[[Dataset], bool], code: str, reason: str) -> list[Frame]:
    """Return the frames that fit.

    Raises:
        NotEligible: none does.
    """
    kept = [frame for frame in frames if fits(frame.header)]
    if not kept:
        raise NotEligible(code, f"{reason[0].upper()}{reason[1:]}.")
    return kept


def keep_accepted(accepts: InputSection, frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames whose headers fit the manifest's input, in the order of REASONS; what it excludes one by one is left out.

    Raises:
        NotEligible: none is left, or one that is left has pixels that the node doesn't read.
    """
    modalities = ", ".join(accepts.modalities)
    kept = keep(frames, lambda h: h.get("Modality") in accepts.modalities, "modality", f"no image has the modality {modalities}")
    kept = keep(kept, lambda h: h.get("SOPClassUID") in accepts.sop_classes, "sop-class", "no image is of an accepted SOP class")
    kept = keep(
        kept, lambda h: not _excluded(h, accepts.exclude_image_types), "image-type", "all images are localizers, derived images or screens"
    )
    kept = keep(kept, lambda h: _body_part_fits(h, accepts), "body-part", "Body Part Examined is not one the package reads")
    for frame in kept:
        check_pixels(frame.header)
    return kept


def _excluded(header: Dataset, image_types: Iterable[str]) -> bool:
    r"""Image Type (0008,0008) holds all values of an entry such as "LOCALIZER" or "DERIVED\SECONDARY"."""
    values = {value.strip().upper() for value in texts_of(header, "ImageType")}
    return any(values.issuperset(entry.upper().split("\\")) for entry in image_types)


def _body_part_fits(header: Dataset, accepts: InputSection) -> bool:
    part = " ".join(texts_of(header, "BodyPartExamined")).strip().upper()
    if not part:
        return accepts.body_part_may_be_absent or not accepts.body_parts
    return not accepts.body_parts or part in accepts.body_parts


def check_pixels(header: Dataset) -> None:
    """Raise NotEligible unless the pixels are single-frame greyscale that Rescale Slope and Intercept turn into Hounsfield units."""
    if (
        header.get("SamplesPerPixel") != 1
        or header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2")
        or str(header.get("NumberOfFrames") or 1) != "1"
        or header.get("BitsAllocated") not in (8, 16)
        or header.get("PixelRepresentation") not in (0, 1)
        or not 1 <= whole_of(header, "BitsStored") <= header.BitsAllocated
        or header.get("HighBit") != header.BitsStored - 1
    ):
        raise NotEligible("pixel-format", "The pixels are no single-frame greyscale of at most 16 bits.")
    slope, intercept = (number_of(header.get(keyword)) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None or slope == 0:
        raise NotEligible("not-hu", "Rescale Slope or Intercept of an image is absent or malformed.")
    if str(header.get("RescaleType") or "HU").strip().upper() != "HU":
        raise NotEligible("not-hu", "Rescale Type says that the values are no Hounsfield units.")


def number_of(value: object) -> float | None:
    """Return a header's value as a finite number, or None."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def texts_of(header: Dataset, keyword: str) -> list[str]:
    """Return an attribute's values as texts; none where it is absent or empty."""
    value = header.get(keyword)
    if value is None or isinstance(value, str | bytes):
        return [str(value)] if value else []
    return [str(part) for part in value] if isinstance(value, Iterable) else [str(value)]


def whole_of(header: Dataset, keyword: str) -> int:
    """Return an attribute's value if it is a whole number, else 0."""
    value = header.get(keyword)
    return value if isinstance(value, int) else 0
