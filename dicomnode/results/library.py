"""The Image Library of a report (PS3.16 TID 1600): which images were analysed, and what each series of them is.

Must never demand an attribute: what an image doesn't say is left out, so that every modality gets its report.
"""

from __future__ import annotations

from collections.abc import Sequence

from highdicom import sr
from highdicom.sr import CodedConcept, ContentItem
from pydicom import Dataset
from pydicom.sr.codedict import codes as dicom_codes

from dicomnode.findings import Code, Volume
from dicomnode.results import codes, provenance

_CONTAINS = sr.RelationshipTypeValues.CONTAINS
_CONTEXT = sr.RelationshipTypeValues.HAS_ACQ_CONTEXT
_PIXELS = CodedConcept(value="{pixels}", scheme_designator="UCUM", meaning="Pixels")
_COSINE = CodedConcept(value="{-1:1}", scheme_designator="UCUM", meaning="{-1:1}")
_MILLIMETRE = CodedConcept(value="mm", scheme_designator="UCUM", meaning="mm")
_ORIENTATION = (
    "ImageOrientationPatientRowX", "ImageOrientationPatientRowY", "ImageOrientationPatientRowZ", "ImageOrientationPatientColumnX",
    "ImageOrientationPatientColumnY", "ImageOrientationPatientColumnZ",
)  # fmt: skip


def image_library(images: Sequence[Dataset], others: Sequence[Sequence[Dataset]], volume: Volume) -> sr.ContainerContentItem:
    """Return the library: a group for each series, with what its images share said once. Saying it for each of 500 makes megabytes.

    `images` are the volume's planes (see `provenance.source_images`), `others` the reduced headers of each further series.
    """
    library = sr.ContainerContentItem(name=dicom_codes.DCM.ImageLibrary, relationship_type=_CONTAINS)
    groups = [_group(images, _spacing(volume))]
    groups += [_group(series, series[0].get("PixelSpacing")) for series in others]
    library.ContentSequence = sr.ContentSequence(groups)
    return library


def _group(images: Sequence[Dataset], spacing: Sequence[float] | None) -> sr.ContainerContentItem:
    """One series (TID 1601): descriptors, then each image once."""
    group = sr.ContainerContentItem(name=dicom_codes.DCM.ImageLibraryGroup, relationship_type=_CONTAINS)
    group.ContentSequence = sr.ContentSequence(_descriptors(images[0], spacing))
    source = CodedConcept(value="260753009", scheme_designator="SCT", meaning="Source")
    for image in {str(image.SOPInstanceUID): image for image in images}.values():
        group.ContentSequence.append(sr.ImageContentItem(source, image.SOPClassUID, image.SOPInstanceUID, relationship_type=_CONTAINS))
    return group


def _descriptors(image: Dataset, spacing: Sequence[float] | None) -> list[ContentItem]:
    """TID 1602 with 1603 (projection radiography) or 1604 (cross-sectional): what the image says of it."""
    names = dicom_codes.DCM
    items: list[ContentItem] = []
    modality = codes.modality(str(image.get("Modality") or ""))
    if modality is not None:
        value = CodedConcept(value=modality.value, scheme_designator=modality.scheme, meaning=modality.meaning)
        items.append(sr.CodeContentItem(name=names.Modality, value=value, relationship_type=_CONTEXT))
    if image.get("FrameOfReferenceUID"):
        items.append(sr.UIDRefContentItem(name=names.FrameOfReferenceUID, value=image.FrameOfReferenceUID, relationship_type=_CONTEXT))
    for name, keyword in ((names.PixelDataRows, "Rows"), (names.PixelDataColumns, "Columns")):
        if image.get(keyword):
            items.append(_number(name, image.get(keyword), _PIXELS))
    orientation = image.get("PatientOrientation")
    if "ImageOrientationPatient" not in image and orientation and len(orientation) == 2 and all(orientation):
        for name, text in zip((names.PatientOrientationRow, names.PatientOrientationColumn), orientation, strict=True):
            items.append(sr.TextContentItem(name=name, value=provenance.ascii_text(str(text), 16), relationship_type=_CONTEXT))
    if spacing is not None and len(spacing) == 2:
        items += [
            _number(names.HorizontalPixelSpacing, spacing[1], _MILLIMETRE),
            _number(names.VerticalPixelSpacing, spacing[0], _MILLIMETRE),
        ]
    if image.get("SliceThickness"):
        items.append(_number(names.SliceThickness, image.SliceThickness, _MILLIMETRE))
    cosines = image.get("ImageOrientationPatient")
    if cosines is not None and len(cosines) == len(_ORIENTATION):
        items += [_number(getattr(names, keyword), cosine, _COSINE) for keyword, cosine in zip(_ORIENTATION, cosines, strict=True)]
    if image.get("SpacingBetweenSlices"):
        items.append(_number(names.SpacingBetweenSlices, image.SpacingBetweenSlices, _MILLIMETRE))
    return items


def _spacing(volume: Volume) -> tuple[float, float] | None:
    """Row and column spacing in mm; None where it isn't known. That of a projection may be at the detector (TID 1603)."""
    if volume.calibration == "none":
        return None
    return float(f"{volume.spacing_mm[1]:.10g}"), float(f"{volume.spacing_mm[2]:.10g}")


def _number(name: Code | CodedConcept, value: object, unit: CodedConcept) -> sr.NumContentItem:
    return sr.NumContentItem(name=name, value=value, unit=unit, relationship_type=_CONTEXT)
