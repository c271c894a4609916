"""Why an image, a series or its pixels don't fit a package: the table of codes, and the checks of headers.

A refusal is an outcome with a code (contract 17). Must never look at a patient's name, put patient data into a reason, decide by
an image's size alone, raise anything but NotEligible on a malformed value, or import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dicomnode.analysis.attributes import items_of, number_of, text_of, texts_of, value_of, whole_of
from dicomnode.analysis.frames import Frame
from dicomnode.analysis.manifest import InputSection
from dicomnode.analysis.subject import (
    age_fits,
    body_part_fits,
    is_animal,
    is_quality_control,
    laterality_fits,
    view_fits,
)
from dicomnode.analysis.weighting import contrast_agent, weighting_of

__all__ = ["REASONS", "NotEligible", "check_pixels", "keep_accepted", "number_of", "texts_of", "value_of", "whole_of"]

# Every code of a refusal, in the order of the checks: the series that came furthest is the closest candidate.
REASONS = {
    "no-images": "the study holds no images",
    "modality": "the images are of another modality",
    "sop-class": "the images are of a SOP class that the package doesn't read",
    "not-human": "the header says that the patient is an animal",
    "quality-control": "the header says that the images show a phantom, for quality control or calibration",
    "image-type": "all images are localizers, derived images or screens",
    "presentation-intent": "the images are meant for processing, not for presentation",
    "burned-in-annotation": "the header says that text is burned into the pixels",
    "body-part": "the header names another body part, or none where one is demanded",
    "view-position": "the header names another view, or none where one is demanded",
    "laterality": "the header names another side, or none where one is demanded",
    "age": "the patient is younger or older than the package was made for, or of unknown age where that is demanded",
    "contrast": "the images were made with a contrast agent, or without one, and the package needs the other",
    "mr-contrast": "the images have another MR weighting",
    "unknown-contrast": "the MR weighting of the images cannot be told from the header",
    "pixel-format": "the pixels are no greyscale of at most 16 bits, or several frames where one is read",
    "transfer-syntax": "the pixels are compressed in a way that the node doesn't decode",
    "not-hu": "Rescale Slope or Intercept is absent, or the rescaled values are no Hounsfield units",
    "orientation": "the slices are axial, coronal, sagittal or oblique where the package needs another, or a film is mirrored or turned",
    "missing-geometry": "the position, orientation, pixel spacing or frame of reference of an image is absent or malformed",
    "too-few-slices": "the series has fewer slices than the package needs",
    "too-many-slices": "the series has more slices than the package reads",
    "mixed-size": "Rows, Columns or Pixel Spacing differ within the series",
    "mixed-orientation": "the images of the series are turned against each other",
    "mixed-frame-of-reference": "the images of the series lie in different frames of reference",
    "too-large": "the volume would have more voxels than the node reads at once",
    "several-echoes": "several echoes in one series image the same positions",
    "several-phases": "several phases or kinds of image in one series lie at the same positions",
    "several-acquisitions": "several acquisitions in one series image the same positions",
    "duplicate-positions": "several images of the series lie at the same position",
    "gantry-tilt": "the gantry was tilted, or the slices are shifted against each other in their plane",
    "missing-slices": "there is a gap between neighbouring slices",
    "uneven-spacing": "the distances between neighbouring slices differ",
    "spacing": "the distance of slices or pixels is outside what the package was made for",
    "same-series": "one series is all that fits several inputs of the package",
    "frame-of-reference": "the series for the inputs of the package lie in different frames of reference",
    "empty-image": "all pixels have the same value",
    "saturated": "most pixels have the largest value, or one value at the border of their range",
    "polarity": "Photometric Interpretation contradicts the pixels: black and white are exchanged",
    "no-lung": "no lung was found in the images",
    "no-chest": "the pixels are no frontal radiograph of a human chest",
    "no-head": "no head was found in the images",
}


class NotEligible(Exception):  # an outcome, not an error: the study is answered with it
    """A coded reason why a study, series or volume is not analysed; `considered` holds each series that was looked at as data."""

    def __init__(self, code: str, reason: str, *, considered: Sequence[Mapping[str, Any]] = ()) -> None:
        if code not in REASONS:
            raise ValueError(f"{code!r} is no code of REASONS")
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.considered = tuple(dict(series) for series in considered)


# A check returns the sentence that says why one plane doesn't fit, or None.
Check = Callable[[InputSection, Frame], str | None]


def keep_accepted(accepts: InputSection, frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames whose headers fit the manifest's input, in the order of REASONS; what it excludes one by one is left out.

    Raises:
        NotEligible: none is left, or one that is left has pixels that the node doesn't read.
    """
    kept = list(frames)
    for code, check in _CHECKS:
        fitting = []
        sentence = f"{REASONS[code][0].upper()}{REASONS[code][1:]}."
        for frame in kept:
            wrong = check(accepts, frame)
            if wrong is None:
                fitting.append(frame)
            else:
                sentence = wrong
        if not fitting:
            raise NotEligible(code, sentence)
        kept = fitting
    if accepts.mr_contrasts:
        kept = _keep_weighting(accepts, kept)
    for frame in kept:
        frames_said = text_of(frame.image, "NumberOfFrames") or "1"
        if number_of(frames_said) != 1 and (accepts.dimensions == 2 or not items_of(frame.image, "PerFrameFunctionalGroupsSequence")):
            raise NotEligible("pixel-format", f"An image has {frames_said[:12]} frames, and nothing says where each lies.")
        check_pixels(frame.header)
    return kept


def _modality(accepts: InputSection, frame: Frame) -> str | None:
    fits = text_of(frame.header, "Modality") in accepts.modalities
    return None if fits else f"No image has the modality {' or '.join(accepts.modalities)}."


def _sop_class(accepts: InputSection, frame: Frame) -> str | None:
    return None if text_of(frame.header, "SOPClassUID") in accepts.sop_classes else "No image is of an accepted SOP class."


def _human(accepts: InputSection, frame: Frame) -> str | None:
    return "The header says that the patient is an animal." if not accepts.animals and is_animal(frame.header) else None


def _quality_control(accepts: InputSection, frame: Frame) -> str | None:
    said = None if accepts.quality_control_images else is_quality_control(frame.header)
    return f"{said} says that the images show a phantom." if said else None


def _image_type(accepts: InputSection, frame: Frame) -> str | None:
    r"""Image Type (0008,0008) or a frame's Frame Type holds all values of an entry such as "LOCALIZER" or "DERIVED\SECONDARY"."""
    for header in (frame.header, frame.image):
        values = _image_type_values(header)
        for entry in accepts.exclude_image_types:
            if all(_plain(value) in values for value in entry.split("\\")):
                return f"Image Type or description says {_plain(entry)}, which the package leaves out."
        if header is frame.image:
            break
    return None


def _image_type_values(header: Any) -> set[str]:
    values = {_plain(value) for value in texts_of(header, "ImageType")}
    # Some writers join the first values by a space in place of a backslash; each vendor has its own word for a localizer.
    values |= {word for value in values if value.startswith(("ORIGINAL ", "DERIVED ")) for word in value.split()}
    if values & {"SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"} or _LOCALIZER.match(text_of(header, "SeriesDescription").upper()):
        values.add("LOCALIZER")
    if values & {"SCREENSAVE", "SCREEN CAPTURE", "SCREENSHOT"}:
        values.add("SCREEN SAVE")
    if values & {"DOSE", "DOSEINFO", "DOSE REPORT"}:
        values.add("DOSE INFO")
    return values


# A series that is called so at the beginning of its description; what comes after a scout may be named after it further on.
_LOCALIZER = re.compile(r"\W*(3\W?(PL|PLANE)\W*)?(LOCALI[SZ]ER|SURVEY|SCOUT|TOPOGRAM|SURVIEW|SCANOGRAM)\b")


def _plain(value: str) -> str:
    return " ".join(value.upper().replace("_", " ").replace("-", " ").split())


def _presentation_intent(accepts: InputSection, frame: Frame) -> str | None:
    if accepts.for_processing or text_of(frame.header, "PresentationIntentType").upper() != "FOR PROCESSING":
        return None
    return "Presentation Intent Type is FOR PROCESSING."


def _burned_in(accepts: InputSection, frame: Frame) -> str | None:
    if accepts.burned_in_annotation or text_of(frame.header, "BurnedInAnnotation").upper() != "YES":
        return None
    return "Burned In Annotation is YES."


def _body_part(accepts: InputSection, frame: Frame) -> str | None:
    if body_part_fits(frame.header, accepts):
        return None
    return "Body Part Examined or Anatomic Region is not one the package reads."


def _view(accepts: InputSection, frame: Frame) -> str | None:
    if view_fits(frame.header, accepts):
        return None
    return f"The view of no image is {' or '.join(accepts.view_positions)}."


def _laterality(accepts: InputSection, frame: Frame) -> str | None:
    if laterality_fits(frame.header, accepts):
        return None
    return f"The laterality of no image is {' or '.join(accepts.laterality)}."


def _age(accepts: InputSection, frame: Frame) -> str | None:
    return age_fits(frame.header, accepts)


def _contrast(accepts: InputSection, frame: Frame) -> str | None:
    if accepts.contrast == "any":
        return None
    given = contrast_agent(frame.header)
    if accepts.contrast == "with" and not given:
        return "The header names no contrast agent, and the package needs one."
    if accepts.contrast == "without" and given:
        return "The header names a contrast agent, and the package needs images without."
    return None


def _upright(accepts: InputSection, frame: Frame) -> str | None:
    """Patient Orientation (PS3.3 C.7.6.1.1.1) of a chest film: rows run to the left and columns to the feet, or nothing is said."""
    if accepts.region not in ("chest-radiograph", "lung-fields"):
        return None
    row, column = ([text.strip().upper() for text in texts_of(frame.header, "PatientOrientation")] + ["", ""])[:2]
    if row[:1] in ("", "L") and column[:1] in ("", "F"):
        return None
    return "Patient Orientation says that the film is mirrored or turned: left and right would be exchanged."


# In the order of REASONS.
_CHECKS: tuple[tuple[str, Check], ...] = (
    ("modality", _modality),
    ("sop-class", _sop_class),
    ("not-human", _human),
    ("quality-control", _quality_control),
    ("image-type", _image_type),
    ("presentation-intent", _presentation_intent),
    ("burned-in-annotation", _burned_in),
    ("body-part", _body_part),
    ("view-position", _view),
    ("laterality", _laterality),
    ("age", _age),
    ("contrast", _contrast),
    ("orientation", _upright),
)


def _keep_weighting(accepts: InputSection, frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames of an accepted MR weighting: of a series with two echoes that is one of them."""
    found = [weighting_of(frame.header) for frame in frames]
    kept = [frame for frame, weighting in zip(frames, found, strict=True) if weighting in accepts.mr_contrasts]
    if kept:
        return kept
    known = sorted({weighting for weighting in found if weighting is not None})
    wanted = " or ".join(accepts.mr_contrasts)
    if known:
        raise NotEligible("mr-contrast", f"The weighting is {' and '.join(known)}; the package reads {wanted}.")
    raise NotEligible("unknown-contrast", f"The MR weighting cannot be told from the header; the package reads {wanted}.")


def check_pixels(header: Any) -> None:
    """Raise NotEligible unless the pixels are greyscale of at most 16 bits, which in CT become Hounsfield units."""
    allocated, stored = whole_of(header, "BitsAllocated"), whole_of(header, "BitsStored")
    if (
        whole_of(header, "SamplesPerPixel") != 1
        or text_of(header, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2")
        or allocated not in (8, 16)
        or value_of(header, "PixelRepresentation") not in (0, 1)
        or not 1 <= stored <= allocated
        or value_of(header, "HighBit") != stored - 1
    ):
        raise NotEligible("pixel-format", "The pixels are no greyscale of at most 16 bits.")
    if text_of(header, "Modality") == "CT":
        _check_hounsfield(header)


def _check_hounsfield(header: Any) -> None:
    slope, intercept = (number_of(value_of(header, keyword)) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None or slope == 0:
        raise NotEligible("not-hu", "Rescale Slope or Intercept of an image is absent or malformed.")
    if (text_of(header, "RescaleType") or "HU").upper() != "HU":
        raise NotEligible("not-hu", "Rescale Type says that the values are no Hounsfield units.")
    if slope < 0 or abs(slope) > 100 or abs(intercept) > 32768:
        raise NotEligible("not-hu", f"Rescale Slope {slope:g} and Intercept {intercept:g} give no Hounsfield units.")
