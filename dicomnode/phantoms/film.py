"""Write a projection as a DX or CR image (PS3.3 A.26, A.2): 12 bits, either polarity, spacing at the detector.

Must never put anything but obviously synthetic people into a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation

from dicomnode.phantoms.dicom import SeriesHeader, file_meta, uid_from, write_patient_and_study
from dicomnode.phantoms.shapes import Floats

CR, DX = str(ComputedRadiographyImageStorage), str(DigitalXRayImageStorageForPresentation)
WHITE = 4095  # 12 bits


@dataclass(frozen=True, kw_only=True)
class Film:
    """A film's pixels, 0 black to 1 white as they are to be seen, and what its header claims."""

    pixels: Floats
    pixel_mm: float  # at the detector
    view: str = "PA"
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME2"
    orientation: tuple[str, str] = ("L", "F")  # Patient Orientation: where rows and columns run to


def write_film(folder: Path, film: Film, header: SeriesHeader) -> list[Path]:
    """Write one image of the header's SOP class, DX or CR."""
    folder.mkdir(parents=True, exist_ok=True)
    image = Dataset()
    write_patient_and_study(image, header)
    image.SOPClassUID = header.sop_class_uid
    image.SOPInstanceUID = uid_from(header.seed, str(header.series_number), "0")
    image.Modality = "DX" if header.sop_class_uid == DX else "CR"
    image.SeriesInstanceUID = uid_from(header.seed, str(header.series_number))
    image.SeriesNumber, image.SeriesDescription = header.series_number, header.series_description
    image.InstanceNumber = 1
    image.ImageType = list(header.image_type)
    image.BodyPartExamined, image.ViewPosition = header.body_part, film.view
    image.PatientOrientation = list(film.orientation)
    image.ContentDate, image.ContentTime = header.study_date, header.study_time
    image.AcquisitionDate, image.AcquisitionTime = header.study_date, header.study_time
    image.KVP = "120"
    image.ImagerPixelSpacing = [f"{film.pixel_mm:g}"] * 2
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, film.photometric
    image.Rows, image.Columns = film.pixels.shape
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    seen = np.clip(film.pixels, 0, 1)
    stored = np.round(WHITE * (1 - seen if film.photometric == "MONOCHROME1" else seen))
    image.WindowCenter, image.WindowWidth = "2048", "4096"
    if header.sop_class_uid == DX:
        _digital(image, film)
    image.PixelData = stored.astype("<u2").tobytes()
    image.file_meta = file_meta(image)
    file = folder / f"{header.series_number:02d}-0001.dcm"
    image.save_as(file, enforce_file_format=True)
    return [file]


def _digital(image: Dataset, film: Film) -> None:
    """What a DX image must say beyond a CR image (PS3.3 C.8.11)."""
    image.PresentationIntentType = "FOR PRESENTATION"
    image.ImageLaterality = "U"
    image.AnatomicRegionSequence = [_code("43799004", "SCT", "Thoracic cavity")]
    image.PixelIntensityRelationship = "LOG"
    image.PixelIntensityRelationshipSign = -1 if film.photometric == "MONOCHROME1" else 1
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = "0", "1", "US"
    image.PresentationLUTShape = "INVERSE" if film.photometric == "MONOCHROME1" else "IDENTITY"
    image.LossyImageCompression, image.BurnedInAnnotation = "00", "NO"
    image.PositionerType = "NONE"
    image.DetectorType, image.DetectorConfiguration = "DIRECT", "AREA"
    image.ViewCodeSequence = [_code("399348003", "SCT", "postero-anterior")]
    image.ViewCodeSequence[0].ViewModifierCodeSequence = []
    image.AcquisitionContextSequence = []


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code
