"""Headers of stored objects as image planes: a single-frame image is one, an enhanced multi-frame image has one for each frame.

What comes after sees planes alone: a frame's functional groups (PS3.3 C.7.6.16) are flattened to the attributes that a classic image
would have. Must never read pixels or import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from dicomnode.errors import AnalysisFailed

_READ_HERE = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "ImageType",
    "BodyPartExamined", "SeriesNumber", "AcquisitionNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "GantryDetectorTilt", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "PixelPaddingValue", "PixelPaddingRangeLimit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image plane: a single-frame image, or one frame of a multi-frame image."""

    file: Path
    image: Dataset  # the header of the file, without pixel data
    number: int | None  # of the frame, from 1; None: the image has one frame
    header: Dataset  # the plane's attributes as a classic image has them; of a single-frame image `image` itself


def read_headers(files: Sequence[Path]) -> list[tuple[Path, Dataset]]:
    """Read the headers of DICOM files up to their pixels.

    Raises:
        AnalysisFailed: a file is no readable DICOM.
    """
    headers: list[tuple[Path, Dataset]] = []
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            for keyword in _READ_HERE:
                header.get(keyword)  # pydicom converts a value when it is first asked for it, and raises then
            headers.append((file, header))
        except (InvalidDicomError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, NotImplementedError) as error:
            raise AnalysisFailed(f"The header of the stored object {file.stem} cannot be read ({type(error).__name__}).") from error
    return headers


def frames_of(headers: Sequence[tuple[Path, Dataset]]) -> list[Frame]:
    """Return the image planes of files, in the files' order and each file's frames in theirs."""
    return [Frame(file=file, image=header, number=None, header=header) for file, header in headers]
