"""Write voxels as a CT or MR series, one file a slice (PS3.3 A.3, A.4), or a film (`film.py`), with every UID derived from a seed.

Must never put anything but obviously synthetic people into a file.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

CT, MR = str(CTImageStorage), str(MRImageStorage)


@dataclass(frozen=True, kw_only=True)
class MrSequence:
    """What an MR series says of how it was made (PS3.3 C.8.3.1)."""

    name: str  # Scanning Sequence
    repetition_ms: float
    echo_ms: float
    inversion_ms: float | None = None
    contrast_agent: str | None = None


SEQUENCES = {
    "": MrSequence(name="SE", repetition_ms=500, echo_ms=15),
    "t1": MrSequence(name="SE", repetition_ms=500, echo_ms=12),
    "t1c": MrSequence(name="SE", repetition_ms=500, echo_ms=12, contrast_agent="SYNTHETIC GADOLINIUM"),
    "t2": MrSequence(name="SE", repetition_ms=4000, echo_ms=95),
    "flair": MrSequence(name="IR", repetition_ms=9000, echo_ms=110, inversion_ms=2500),
    "pd": MrSequence(name="SE", repetition_ms=2500, echo_ms=20),
}


@dataclass(frozen=True, kw_only=True)
class SeriesHeader:
    """Who and what a written series claims to be."""

    seed: str  # all UIDs follow from it
    patient_name: str = "PHANTOM^SYNTHETIC"
    patient_id: str = "PHANTOM-0"
    study_description: str = "Synthetic chest"
    series_description: str = "Synthetic CT"
    accession_number: str = "PHANTOM-0"
    body_part: str = "CHEST"
    study_date: str = "20260101"
    study_time: str = "120000"
    series_number: int = 2
    image_type: tuple[str, ...] = ("ORIGINAL", "PRIMARY", "AXIAL")
    thickness_mm: float = 2.5
    sop_class_uid: str = CT
    contrast: str = ""  # of an MR series: a key of SEQUENCES
    patient_position: str = "HFS"
    tilt_degrees: float = 0.0  # of the gantry, as the header says it
    descending: bool = False  # Instance Number runs from head to feet
    skip: tuple[int, ...] = ()  # slices that are not written


def uid_from(*parts: str) -> str:
    """A UID under 2.25 (PS3.5 B.2) that follows from `parts`."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def write_ct_series(folder: Path, voxels: NDArray[np.float32], affine: NDArray[np.float64], header: SeriesHeader) -> list[Path]:
    """Write (slices, rows, columns) HU, or signal if the SOP class is MR, with an affine from (k, r, c, 1) to LPS mm.

    Returns the files, slice 0 first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(len(voxels)):
        if k in header.skip:
            continue
        number = len(voxels) - k if header.descending else k + 1
        image = _image(voxels[k], affine, k, number, header)
        file = folder / f"{header.series_number:02d}-{number:04d}.dcm"
        image.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def _image(pixels: NDArray[np.float32], affine: NDArray[np.float64], k: int, number: int, header: SeriesHeader) -> Dataset:
    image = Dataset()
    write_patient_and_study(image, header)
    row_way, column_way = affine[:3, 2], affine[:3, 1]
    column_step, row_step = float(np.linalg.norm(row_way)), float(np.linalg.norm(column_way))
    position = affine[:3, 3] + k * affine[:3, 0]
    image.SOPClassUID = header.sop_class_uid
    image.SOPInstanceUID = uid_from(header.seed, str(header.series_number), str(k))
    image.Modality = "CT" if header.sop_class_uid == CT else "MR"
    image.SeriesInstanceUID = uid_from(header.seed, str(header.series_number))
    image.SeriesNumber = header.series_number
    image.SeriesDescription = header.series_description
    image.PatientPosition = header.patient_position
    image.FrameOfReferenceUID = uid_from(header.seed, "frame of reference")
    image.PositionReferenceIndicator = None
    image.BodyPartExamined = header.body_part
    image.ImageType = list(header.image_type)
    image.InstanceNumber = number
    image.AcquisitionNumber = 1
    image.ContentDate, image.ContentTime = header.study_date, header.study_time
    image.AcquisitionDate, image.AcquisitionTime = header.study_date, header.study_time
    image.ImagePositionPatient = _decimals(position)
    image.ImageOrientationPatient = _decimals(np.concatenate([row_way / column_step, column_way / row_step]))
    image.PixelSpacing = _decimals(np.array([row_step, column_step]))
    image.SliceThickness = _decimal(header.thickness_mm)
    image.SliceLocation = _decimal(float(position[2]))
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows, image.Columns = pixels.shape
    image.BitsAllocated = 16
    if header.sop_class_uid == CT:
        image.KVP, image.ConvolutionKernel = "120", "SYNTHETIC"
        if header.tilt_degrees:
            image.GantryDetectorTilt = _decimal(header.tilt_degrees)
        image.BitsStored, image.HighBit, image.PixelRepresentation = 12, 11, 0
        image.RescaleIntercept, image.RescaleSlope, image.RescaleType = "-1024", "1", "HU"
        stored = np.clip(np.round(pixels) + 1024, 0, 4095)
        image.WindowCenter, image.WindowWidth = ["-600", "40"], ["1500", "400"]
    else:
        _mr_sequence(image, SEQUENCES[header.contrast])
        image.BitsStored, image.HighBit, image.PixelRepresentation = 12, 11, 0
        stored = np.clip(np.round(pixels), 0, 4095)
        image.WindowCenter, image.WindowWidth = "500", "1000"
    image.PixelData = stored.astype("<u2").tobytes()
    image.file_meta = file_meta(image)
    return image


def _mr_sequence(image: Dataset, sequence: MrSequence) -> None:
    image.ScanningSequence, image.SequenceVariant, image.ScanOptions = sequence.name, "NONE", None
    image.MRAcquisitionType, image.EchoTrainLength = "2D", 1
    image.RepetitionTime, image.EchoTime = _decimal(sequence.repetition_ms), _decimal(sequence.echo_ms)
    if sequence.inversion_ms is not None:
        image.InversionTime = _decimal(sequence.inversion_ms)
    if sequence.contrast_agent is not None:
        image.ContrastBolusAgent = sequence.contrast_agent


def file_meta(image: Dataset) -> FileMetaDataset:
    """The file meta information of an uncompressed image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(uid_from("dicomnode", "phantoms"))
    return meta


def write_patient_and_study(image: Dataset, header: SeriesHeader) -> None:
    """Set what all images of a study share: an obviously synthetic person."""
    image.SpecificCharacterSet = "ISO_IR 192"
    image.PatientName, image.PatientID = header.patient_name, header.patient_id
    image.PatientBirthDate, image.PatientSex = "19500101", "O"
    image.PatientAge = "076Y"
    image.StudyInstanceUID = uid_from(header.seed, "study")
    image.StudyDate, image.StudyTime = header.study_date, header.study_time
    image.StudyID = "1"
    image.StudyDescription = header.study_description
    image.AccessionNumber = header.accession_number
    image.ReferringPhysicianName = None
    image.Manufacturer = "dicomnode phantoms"
    image.ManufacturerModelName = "synthetic head" if header.body_part == "HEAD" and header.contrast else "synthetic chest"
    image.SeriesDate, image.SeriesTime = header.study_date, header.study_time


def _decimals(values: NDArray[np.float64] | Sequence[float]) -> list[str]:
    return [_decimal(float(value)) for value in values]


def _decimal(value: float) -> str:
    """A Decimal String of at most 16 characters (PS3.5 6.2)."""
    return f"{round(value, 6) + 0.0:.6f}".rstrip("0").rstrip(".")
