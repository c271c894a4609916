"""Headers of CT and MR series and of projections, and manifests that read them, for the tests of eligibility."""

from pathlib import Path
from typing import Any

import numpy as np
from ct_series import slice_dataset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, MRImageStorage

from dicomnode.analysis.manifest import Manifest, parse_manifest

Headers = list[tuple[Path, Dataset]]
CR, DX = str(ComputedRadiographyImageStorage), str(DigitalXRayImageStorageForPresentation)
MR_PARAMETERS: dict[str, dict[str, Any]] = {
    "t1": {"ScanningSequence": "SE", "RepetitionTime": 550, "EchoTime": 12},
    "t1c": {"ScanningSequence": "SE", "RepetitionTime": 550, "EchoTime": 12, "ContrastBolusAgent": "Gadobutrol"},
    "t2": {"ScanningSequence": "SE", "RepetitionTime": 4500, "EchoTime": 98},
    "flair": {"ScanningSequence": ["SE", "IR"], "RepetitionTime": 9000, "EchoTime": 110, "InversionTime": 2500},
    "pd": {"ScanningSequence": "SE", "RepetitionTime": 2500, "EchoTime": 20},
}
_HEAD = """
schema = 1
name = "bright"
version = "1.0"
title = "Bright things"
manufacturer = "dicomnode"
algorithm_name = "bright"
licence = "Apache-2.0"
intended_use = "RESEARCH USE ONLY"
training_data = "none"
kind = "segmentation"
"""
_TAIL = """
[preprocessing]
spacing_mm = [2.0, 1.5, 1.5]
window = [-1000.0, 400.0]
[inference]
window = [16, 32, 32]
[[outputs]]
channel = 0
label = "Bright thing"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "27925004", scheme = "SCT", meaning = "Nodule" }
"""
CT_INPUT = """
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
body_parts = ["CHEST"]
minimum_slices = 4
slice_spacing_mm = [0.4, 5.5]
pixel_spacing_mm = [0.3, 1.5]
"""
MR_INPUT = f"""
modality = "MR"
sop_classes = ["{MRImageStorage}"]
body_parts = ["HEAD"]
minimum_slices = 4
"""
CHEST_FILM_INPUT = f"""
modalities = ["CR", "DX", "RG"]
sop_classes = ["{CR}", "{DX}", "1.2.840.10008.5.1.4.1.1.7"]
dimensions = 2
body_parts = ["CHEST"]
view_positions = ["PA", "AP"]
pixel_spacing_may_be_absent = true
region = "chest-radiograph"
"""


def manifest_of(*inputs: str) -> Manifest:
    """Return a manifest with the keys of each `[[inputs]]`."""
    sections = "".join(f"[[inputs]]\n{keys.strip()}\n" for keys in inputs)
    return parse_manifest((_HEAD + sections + _TAIL).encode(), Path("bright"))


def series(
    slices: int = 8, *, spacing: float = 2.0, step: tuple[float, float, float] = (0.0, 0.0, 1.0), first: int = 0, **values: Any
) -> Headers:
    """Return headers of a plain axial chest CT; slice k lies at k * spacing * step, and its Instance Number is first + k + 1."""
    plane = np.zeros((4, 4), dtype=np.int16)
    images = [slice_dataset(plane, np.array(step) * spacing * k, first + k, spacing=(0.7, 0.7), **values) for k in range(slices)]
    return [(Path(f"{values.get('SeriesNumber', 0)}-{first + k}"), image) for k, image in enumerate(images)]


def mr_series(weighting: str, number: int, **values: Any) -> Headers:
    """Return headers of an axial MR series of a head with the parameters of a weighting."""
    mr: dict[str, Any] = {
        "SOPClassUID": MRImageStorage, "Modality": "MR", "BodyPartExamined": "HEAD", "SeriesNumber": number, "RescaleSlope": None,
        "RescaleIntercept": None, "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
    }  # fmt: skip
    return series(**(mr | MR_PARAMETERS[weighting] | values))


def projection(number: int = 1, instance: int = 0, **values: Any) -> Headers:
    """Return the header of one PA chest film."""
    film: dict[str, Any] = {
        "SOPClassUID": CR, "Modality": "CR", "SeriesNumber": number, "ImageType": ["ORIGINAL", "PRIMARY"], "ViewPosition": "PA",
        "PixelSpacing": [0.2, 0.2], "ImagePositionPatient": None, "ImageOrientationPatient": None, "FrameOfReferenceUID": None,
        "SliceThickness": None, "PhotometricInterpretation": "MONOCHROME1",
    }  # fmt: skip
    image = slice_dataset(np.zeros((64, 64), dtype=np.uint16), np.zeros(3), instance, spacing=(0.2, 0.2), **(film | values))
    return [(Path(f"{number}-{instance}"), image)]


def change(headers: Headers, only: int | None = None, **values: Any) -> Headers:
    """Set attributes of all headers, or of one; None removes them, bytes are a raw value as a file holds it. Returns the headers."""
    for k, (_, header) in enumerate(headers):
        if only is None or k == only:
            for keyword, value in values.items():
                if value is None:
                    delattr(header, keyword)
                elif isinstance(value, bytes):
                    tag = Tag(tag_for_keyword(keyword) or 0)
                    header[tag] = RawDataElement(tag, dictionary_VR(tag).split(" ")[0], len(value), value, 0, False, True)
                else:
                    setattr(header, keyword, value)
    return headers
