"""Headers of stored objects as image planes: a single-frame image is one, a multi-frame image has one for each frame.

What comes after sees planes alone: an enhanced image's functional groups (PS3.3 C.7.6.16) are flattened to the attributes that a
classic image would have. Must never read pixels or import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
)

from dicomnode.analysis.attributes import text_of, value_of
from dicomnode.analysis.functional_groups import Elements, FunctionalGroups
from dicomnode.analysis.headers import HeaderReader
from dicomnode.analysis.stored import Unreadable
from dicomnode.errors import AnalysisFailed

MAXIMUM_FRAMES = 20_000  # of one image; one that claims more stays as it is, and is refused for its Number of Frames

# What is asked for later. It is converted here, once for all planes of an image, and a value that is none of its VR is left out.
_READ_HERE = frozenset(tag_for_keyword(keyword) or 0 for keyword in (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
    "ImageType", "BodyPartExamined", "AnatomicRegionSequence", "SeriesNumber", "AcquisitionNumber", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "GantryDetectorTilt",
    "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelSpacingCalibrationType", "EstimatedRadiographicMagnificationFactor",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PresentationLUTShape", "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelAspectRatio", "PatientAge", "PatientBirthDate", "StudyDate", "PatientPosition",
    "PatientOrientation", "ViewPosition", "Laterality", "ImageLaterality", "ContrastBolusAgent", "ConvolutionKernel",
    "QualityControlImage", "BurnedInAnnotation", "ScanningSequence", "SequenceVariant", "ScanOptions", "SequenceName", "PulseSequenceName",
    "MRAcquisitionType", "EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "EchoNumbers", "EchoTrainLength",
    "DiffusionBValue", "TemporalPositionIdentifier", "StackID", "ComplexImageComponent", "AcquisitionContrast", "SeriesDescription",
    "ProtocolName", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod", "Manufacturer",
    "ManufacturerModelName",
))  # fmt: skip
_BODY_PART = Tag(0x0018, 0x0015)
_SEVERAL_FRAMES = {Tag(0x5200, 0x9229), Tag(0x5200, 0x9230), Tag(0x0028, 0x0008)}  # functional groups, Number of Frames
# Classes of which an object is one image (PS3.3 A.2, A.3, A.4, A.8.1, A.21, A.26): one that claims several frames is malformed.
_ONE_FRAME = {
    ComputedRadiographyImageStorage, CTImageStorage, MRImageStorage, SecondaryCaptureImageStorage, PositronEmissionTomographyImageStorage,
    DigitalXRayImageStorageForPresentation, DigitalXRayImageStorageForProcessing,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image plane: a single-frame image, or one frame of a multi-frame image."""

    file: Path
    image: Dataset  # the header of the file, without pixel data
    number: int | None  # of the frame, from 1; None: the image has one frame
    header: Dataset  # the plane's attributes as a classic image has them; of a single-frame image `image` itself


def read_headers(files: Sequence[Path]) -> list[tuple[Path, Dataset]]:
    """Read the headers of DICOM files up to their pixels; a malformed value stays as its bytes, which `value_of` reads as none.

    Files share the elements that they have in common: elements are for reading.

    Raises:
        AnalysisFailed: a file is no readable DICOM.
    """
    reader = HeaderReader(_READ_HERE)
    headers: list[tuple[Path, Dataset]] = []
    for file in files:
        try:
            headers.append((file, reader.read(file)))
        except (Unreadable, OSError) as error:
            cause = str(error) if isinstance(error, Unreadable) else type(error).__name__
            raise AnalysisFailed(f"The header of the stored object {file.stem} cannot be read: {cause}.") from error
    return headers


def frames_of(headers: Sequence[tuple[Path, Dataset]]) -> list[Frame]:
    """Return the image planes of files, in the files' order and each file's frames in theirs; an object that is no image has none.

    The planes of an image share their elements: a plane's header is for reading.
    """
    frames: list[Frame] = []
    for file, header in headers:
        if is_image(header):
            frames += _planes(file, header)
    return frames


def is_image(header: Dataset) -> bool:
    """Whether an object is an image by its SOP class; one of a class that isn't known is an image if it has rows and columns."""
    by_name = _named_image(str(value_of(header, "SOPClassUID") or ""))
    return by_name if by_name is not None else "Rows" in header and "Columns" in header


@lru_cache(maxsize=256)
def _named_image(sop_class: str) -> bool | None:
    """Whether a SOP class is one of images; None: it isn't known."""
    uid = UID(sop_class)
    if uid.name == uid or not uid.is_valid:
        return None
    return "Image Storage" in uid.name  # PS3.4 B.5 names each image's class so, and neither SEG, SR, PR nor RT Dose


def _planes(file: Path, image: Dataset) -> list[Frame]:
    if image.keys().isdisjoint(_SEVERAL_FRAMES):
        return [Frame(file=file, image=image, number=None, header=image)]
    groups = FunctionalGroups(image)
    grouped = len(groups) > 0 or "SharedFunctionalGroupsSequence" in image
    count = value_of(image, "NumberOfFrames")
    count = len(groups) or 1 if count is None else count
    several = isinstance(count, int) and 1 < count <= MAXIMUM_FRAMES and text_of(image, "SOPClassUID") not in _ONE_FRAME
    if not (several or (grouped and count == 1)):
        return [Frame(file=file, image=image, number=None, header=image)]
    own = len(groups) == count  # else nobody knows whose they are
    top = {tag: element for tag in list(image.keys()) if tag not in _SEVERAL_FRAMES and (element := image.get_item(tag)) is not None}
    if not value_of(image, "BodyPartExamined"):
        top.pop(_BODY_PART, None)
    body_part = {_BODY_PART: top[_BODY_PART]} if _BODY_PART in top else {}
    implicit, little = image.original_encoding

    def header_of(elements: Elements) -> Dataset:
        header = Dataset({**top, **elements, **body_part})
        header.set_original_encoding(implicit, little, image.original_character_set)
        return header

    shared = header_of(groups.shared)  # for all frames that say nothing of their own
    frames = []
    for index in range(count):
        elements = groups.plane(index) if own else groups.shared
        header = shared if elements is groups.shared else header_of(elements)
        frames.append(Frame(file=file, image=image, number=index + 1, header=header))
    return frames
