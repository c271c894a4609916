"""Write small CT series as DICOM files: any orientation, spacing, signedness and transfer syntax."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def slice_dataset(
    stored: NDArray[Any], position: NDArray[np.float64], number: int, *, spacing: tuple[float, float], **values: Any
) -> Dataset:
    """Return one CT image with its stored values; `values` are attributes by keyword and override, None leaves one out."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    series = int(values.get("SeriesNumber") or 0)
    attributes: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": f"2.25.7.{series}.{number + 1}",
        "StudyInstanceUID": "2.25.5",
        "SeriesInstanceUID": f"2.25.6.{series}",
        "FrameOfReferenceUID": "2.25.8",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "BodyPartExamined": "CHEST",
        "SeriesNumber": series,
        "InstanceNumber": number + 1,
        "ImagePositionPatient": [round(float(p), 6) for p in position],
        "ImageOrientationPatient": list(AXIAL),
        "PixelSpacing": list(spacing),
        "SliceThickness": 1.0,
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PatientName": "Doe^Jane",
        "PatientID": "SECRET",
    } | values
    for keyword, value in attributes.items():
        if value is not None:
            setattr(image, keyword, value)
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.PixelData = stored.tobytes()
    image["PixelData"].VR = "OW"
    return image


def write_series(
    folder: Path,
    stored: NDArray[Any],
    *,
    spacing: tuple[float, float, float] = (2.0, 0.8, 0.7),
    orientation: tuple[float, ...] = AXIAL,
    origin: Sequence[float] = (-10.0, -20.0, -30.0),
    **values: Any,
) -> list[Path]:
    """Write stored[k, r, c], slice k at `origin` + k * spacing[0] along the normal; return the files in that order."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    files = []
    for k, plane in enumerate(stored):
        image = slice_dataset(
            plane,
            np.array(origin) + k * spacing[0] * normal,
            k,
            spacing=spacing[1:],
            **({"ImageOrientationPatient": [round(float(v), 9) for v in orientation]} | values),
        )
        files.append(folder / f"{int(values.get('SeriesNumber') or 0)}-{k:03}.dcm")
        image.save_as(files[-1], enforce_file_format=True)
    return files
