"""Enhanced multi-frame images made by hand: each functional group where a test wants it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian

Groups = Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]  # {sequence: {keyword: value}}, or a list for several items

SHARED: Groups = {
    "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    "PixelMeasuresSequence": {"PixelSpacing": [0.8, 0.7], "SliceThickness": 2},
    "PixelValueTransformationSequence": {"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU"},
}


def item(values: Mapping[str, Any]) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, [item(v) for v in value] if keyword.endswith("Sequence") else value)
    return made


def groups_of(groups: Groups) -> Dataset:
    made = Dataset()
    for keyword, values in groups.items():
        setattr(made, keyword, [item(values)] if isinstance(values, Mapping) else [item(v) for v in values])
    return made


def at(*position: float) -> dict[str, Any]:
    """Return the group of a frame's position."""
    return {"PlanePositionSequence": {"ImagePositionPatient": [round(float(p), 8) for p in position]}}


def enhanced_image(frames: Sequence[Groups], *, shared: Groups = SHARED, stored: NDArray[Any] | None = None, **values: Any) -> Dataset:
    """Return an enhanced image whose frames have these groups; `stored` (frames, rows, columns) are its pixels."""
    if stored is None:
        stored = np.zeros((len(frames), 4, 4), dtype=np.int16)
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    attributes: dict[str, Any] = {
        "SOPClassUID": EnhancedMRImageStorage, "SOPInstanceUID": "2.25.71", "StudyInstanceUID": "2.25.5", "SeriesInstanceUID": "2.25.6",
        "FrameOfReferenceUID": "2.25.8", "Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "SeriesNumber": 3, "InstanceNumber": 1, "NumberOfFrames": len(frames), "Rows": stored.shape[1], "Columns": stored.shape[2],
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": int(stored.dtype.kind == "i"), "PatientName": "Doe^Jane", "PatientID": "SECRET",
    } | values  # fmt: skip
    for keyword, value in attributes.items():
        if value is not None:
            setattr(image, keyword, value)
    image.SharedFunctionalGroupsSequence = [groups_of(shared)]
    image.PerFrameFunctionalGroupsSequence = [groups_of(frame) for frame in frames]
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.PixelData = stored.tobytes()
    image["PixelData"].VR = "OW"
    return image


def undefined_lengths(dataset: Dataset) -> Dataset:
    """Have each sequence and item of a data set written with undefined length."""
    for element in dataset:
        if element.VR == "SQ":
            element.is_undefined_length = True
            for content in element.value:
                content.is_undefined_length_sequence_item = True
                undefined_lengths(content)
    return dataset


def write_image(file: Path, image: Dataset) -> Path:
    image.save_as(file, enforce_file_format=True)
    return file
