"""What every result object has in common: whose study it belongs to, who made it and when, and that it is research.

Must never read the clock: all dates come from the run. Texts of our own are ASCII, because they share the data set
with the patient's name and so its Specific Character Set, which is copied as it is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from io import BytesIO
from typing import Any

import highdicom
import numpy as np
from pydicom import DataElement, Dataset
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.errors import BytesLengthException
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr, dcmwrite, write_data_element
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.tag import Tag

from dicomnode.findings import Findings, ResultObject, RunIdentity, Volume
from dicomnode.version import VERSION

RESEARCH = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"

# What a derived object says about the images it stands on: used to describe them, never to change them.
_IMAGE_KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns",
    "FrameOfReferenceUID", "PositionReferenceIndicator", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod", "Manufacturer",
    "ManufacturerModelName", "AcquisitionDate", "AcquisitionTime", "BodyPartExamined", "PatientOrientation",
)  # fmt: skip
# Optional numbers that the encoder computes with: what is no number is left out, as a result needs no word of it.
_NUMBERS = {Tag(keyword) for keyword in ("SliceThickness", "LossyImageCompressionRatio")}
# Type 1 and 2 of the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1), which the encoder wants to see present.
_PATIENT_AND_STUDY_KEYWORDS = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
    "ReferringPhysicianName",
)  # fmt: skip


_IMAGE_TAGS = [Tag(keyword) for keyword in _IMAGE_KEYWORDS]  # found at once: a name would be looked up for each of 500 slices
_EMPTY = [DataElement(Tag(keyword), dictionary_VR(keyword), "") for keyword in _PATIENT_AND_STUDY_KEYWORDS]
_SOP_CLASS, _SOP_INSTANCE, _POSITION, _ORIENTATION, _SPACING = (
    Tag(keyword) for keyword in ("SOPClassUID", "SOPInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
)


@dataclass(frozen=True, kw_only=True)
class Plane:
    """An image, or a frame of one, that a result stands on."""

    sop_class_uid: str
    sop_instance_uid: str
    frame_number: int | None  # None: the image has one frame
    position: str | None  # Image Position (Patient) as VR DS; None of a projection


def ascii_text(text: str, limit: int) -> str:
    """Return `text` in ASCII without control characters or backslashes, at most `limit` characters long."""
    for mark, plain in (("—", "-"), ("–", "-"), ("×", "x"), ("≤", "<="), ("≥", ">="), ("µ", "u"), ("°", " deg"), ("\\", "/")):
        text = text.replace(mark, plain)
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())[:limit].rstrip()


def long_string(text: str, *, ending: str = "") -> str:
    """Return `text` and `ending` as one value of VR LO (64 characters); the ending is never cut off."""
    ending = f" {ending}" if ending else ""
    return ascii_text(text, 64 - len(ending)) + ending


def content_label(package: str) -> str:
    """Return a Content Label (0070,0080), VR CS: at most 16 upper-case letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in ascii_text(package, 16).upper()).rstrip("_")


def planes(volume: Volume, headers: Sequence[Dataset]) -> list[Plane]:
    """Return the image plane of each slice of the volume, in its order. Its position is the image's own, of a frame the frame's."""
    by_uid = _by_uid(headers)
    found = []
    for k, uid in enumerate(volume.sop_instance_uids):
        header, number, position = by_uid[uid], frame_number(volume, k), None
        if not volume.is_projection:
            values = header[_POSITION].value if number is None else _position_of_frame(header, number, volume, k)
            position = "\\".join(getattr(value, "original_string", None) or str(value) for value in values)
        found.append(Plane(sop_class_uid=str(header[_SOP_CLASS].value), sop_instance_uid=uid, frame_number=number, position=position))
    return found


def source_images(volume: Volume, headers: Sequence[Dataset], slices: Sequence[int] | None = None) -> list[Dataset]:
    """Return one reduced header for each slice of the volume, or of `slices` alone, with the plane's geometry as a classic image has it.

    The position stays the image's own, of a multi-frame image the frame's. Orientation and pixel spacing are for all those of the
    plane that the volume's axes follow: images of one series may differ in the last digits. A projection has no position, no frame of
    reference and no pixel spacing. Patient and study attributes are left empty (see `stamp`).
    """
    by_uid = _by_uid(headers)
    if slices is None:
        slices = range(len(volume.sop_instance_uids))
    uids = [volume.sop_instance_uids[k] for k in slices]
    whole = {uid: reduced_header(by_uid[uid]) for uid in dict.fromkeys(uids)}
    if volume.is_projection:
        return [_of_projection(whole[uid]) for uid in uids]
    images = [
        whole[uid] if (number := frame_number(volume, k)) is None else _of_frame(whole[uid], by_uid[uid], number, volume, k)
        for k, uid in zip(slices, uids, strict=True)
    ]
    slice_mm = f"{volume.spacing_mm[0]:.10g}"
    shared = Dataset()
    shared.FrameOfReferenceUID = volume.frame_of_reference_uid
    shared.ImageOrientationPatient, shared.PixelSpacing = _axes(volume, by_uid)
    shared.SpacingBetweenSlices = slice_mm
    elements = list(shared)  # converted and checked once: of 500 slices that would take as long as all the rest
    for image in images:
        for element in elements:
            image.add(_copy(element))
        if not image.get("SliceThickness"):
            image.SliceThickness = slice_mm
    return images


def _by_uid(headers: Sequence[Dataset]) -> dict[str, Dataset]:
    return {str(header[_SOP_INSTANCE].value): header for header in headers}


def frame_number(volume: Volume, slice_index: int) -> int | None:
    """Return which frame of its image a slice is, or None where the images have one frame each."""
    return volume.frame_numbers[slice_index] if volume.frame_numbers is not None else None


def reduced_header(header: Dataset) -> Dataset:
    """Return what a result object needs of an image's header, as a copy; patient and study attributes are present and empty.

    What cannot be read is left out.
    """
    image = Dataset()
    for tag in _IMAGE_TAGS:
        element = _readable(header, tag)
        if element is not None:
            image.add(_copy(element))  # an element that two data sets share is changed in both
    for empty in _EMPTY:
        image.add(_copy(empty))
    return image


def copied(image: Dataset) -> Dataset:
    """Return a data set of its own with the same elements: what is set in one stays as it is in the other."""
    other = Dataset()
    for element in image:
        other.add(_copy(element))
    return other


def _copy(element: DataElement) -> DataElement:
    """What `copy.copy` gives, without its detour over pickling: 500 slices have 10,000 elements."""
    made = DataElement.__new__(type(element))
    made.__dict__.update(element.__dict__)
    return made


def _readable(header: Dataset, tag: int) -> DataElement | None:
    """An element of a header; None where it is absent, or no value of its kind."""
    try:
        element: DataElement | None = header.get(tag)
        if element is not None and tag in _NUMBERS:
            for number in element.value if isinstance(element.value, MultiValue) else [element.value]:
                float(number)
    except (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError, AttributeError, BytesLengthException):
        return None
    return element


def series_number(header: Dataset, modality: str) -> int:
    """Return a Series Number that sorts after the images' own: theirs + 9001 and more (IS, 31 bit)."""
    try:
        images = max(0, int(header.get("SeriesNumber") or 0))
    except (TypeError, ValueError):  # not an integer string: the images sort as the viewer likes
        images = 0
    return min(images + {"SEG": 9001, "SR": 9002, "OT": 9003, "KO": 9004, "PR": 9005}[modality], 2**31 - 1)


def software_versions(identity: RunIdentity) -> list[str]:
    """Return package, weights digest and node as values of Software Versions (0018,1020), VR LO.

    The digest has all 64 characters a value may have, so it isn't last: padding would make it 65 to some readers.
    """
    return [long_string(f"{identity.package} {identity.version}"), identity.digest[:64], f"dicomnode {VERSION}"]


def common_arguments(header: Dataset, identity: RunIdentity, modality: str, *, manufacturer: str, model: str) -> dict[str, object]:
    """Return the keyword arguments that highdicom's SEG and SR constructors share."""
    created = created_at(header, identity)
    return {
        "series_instance_uid": "",  # overridden by the caller
        "series_number": series_number(header, modality),
        "instance_number": 1,
        "manufacturer": long_string(manufacturer),
        "manufacturer_model_name": long_string(model),
        "device_serial_number": identity.digest[:64],
        "software_versions": software_versions(identity),
        "series_description": long_string(f"{identity.package} {identity.version}", ending=f"{modality} RESEARCH"),
        "content_qualification": "RESEARCH",
        "content_date": created.date(),
        "content_time": created.time(),
        "series_date": created.date(),
        "series_time": created.time(),
        "specific_character_set": None,  # copied as it is by `stamp`
    }


def created_at(header: Dataset, identity: RunIdentity) -> datetime:
    """Return the run's creation time in the study's own time zone where the study names one, else in the run's.

    Seconds are whole: fractions add nothing and some peers dislike them.
    """
    return identity.created_at.astimezone(_study_zone(header) or identity.created_at.tzinfo).replace(microsecond=0)


def stamp(result: Dataset, header: Dataset, identity: RunIdentity, *, manufacturer: str, model: str) -> None:
    """Write patient, study, character set, dates, contributing equipment and labels into an object that highdicom built.

    Patient and study attributes are copied from `header` unchanged, whatever they hold. highdicom's own clock readings are
    replaced.
    """
    if "SpecificCharacterSet" in header:
        result["SpecificCharacterSet"] = header["SpecificCharacterSet"]
    result.copy_patient_and_study_information(header)
    created = created_at(header, identity)
    for keyword in ("InstanceCreationDate", "ContentDate", "SeriesDate"):
        setattr(result, keyword, created.strftime("%Y%m%d"))
    for keyword in ("InstanceCreationTime", "ContentTime", "SeriesTime"):
        setattr(result, keyword, created.strftime("%H%M%S"))
    if _study_zone(header) is not None:
        result.TimezoneOffsetFromUTC = header.TimezoneOffsetFromUTC
    node = highdicom.ContributingEquipment(
        manufacturer=long_string(manufacturer),
        purpose_of_reference=codes.DCM.ProcessingEquipment,
        manufacturer_model_name=long_string(model),
        software_versions=software_versions(identity),
        device_serial_number=identity.digest[:64],
        contribution_description=f"Analysis by {identity.package} {identity.version}, weights {identity.digest}. {RESEARCH}",
    )
    others = list(result.get("ContributingEquipmentSequence", []))
    for item in others:
        item.pop("ContributionDateTime", None)  # highdicom's clock
    result.ContributingEquipmentSequence = [*others, node]
    for item in (others[-1], node):
        item.ContributionDateTime = created.strftime("%Y%m%d%H%M%S%z")


def copy_side(result: Dataset, header: Dataset, keywords: Sequence[str]) -> None:
    """Say which part of the body and which side the image shows; without either, Laterality is empty (type 2C, PS3.3 C.7.3.1)."""
    for keyword in keywords:
        if header.get(keyword):
            result[keyword] = header[keyword]
    if not any(keyword in result for keyword in keywords):
        result.Laterality = ""


def algorithm_parameters(identity: RunIdentity, findings: Findings | None) -> Mapping[str, str]:
    """Return what identifies the algorithm beyond its name and version."""
    parameters = {"weights": f"sha256:{identity.digest}", "use": RESEARCH}
    if findings is not None and findings.device:
        parameters["device"] = ascii_text(findings.device, 64)
    return parameters


def encode(result: Dataset, *, sequences: Mapping[int, bytes] | None = None, ending: Sequence[bytes | memoryview] = ()) -> ResultObject:
    """Return the Part 10 file of an object: the same data set gives the same bytes.

    Args:
        result: a data set in Explicit VR Little Endian; it is changed.
        sequences: the items of further sequences by their tag, encoded.
        ending: what is written behind the last element.
    """
    buffer = BytesIO()
    if sequences:
        result = correct_ambiguous_vr(result, True)  # as pydicom does where it takes nothing as it is
        if result.get("SpecificCharacterSet"):
            result.set_original_encoding(False, True, convert_encodings(result.SpecificCharacterSet))
        else:
            result.set_original_encoding(False, True)
        for tag, items in sequences.items():
            result[tag] = RawDataElement(Tag(tag), "SQ", len(items), items, 0, False, True)
    dcmwrite(buffer, result, enforce_file_format=True)
    return ResultObject(
        sop_instance_uid=str(result.SOPInstanceUID),
        sop_class_uid=str(result.SOPClassUID),
        transfer_syntax_uid=str(result.file_meta.TransferSyntaxUID),
        series_instance_uid=str(result.SeriesInstanceUID),
        modality=str(result.Modality),
        parts=(buffer.getvalue(), *ending),
        series_number=int(result.SeriesNumber),
        series_description=str(result.get("SeriesDescription", "")),
        instance_number=int(result.InstanceNumber),
    )


def encoded_elements(item: Dataset) -> dict[int, bytes]:
    """Return each element of an item in ASCII as it is encoded in Explicit VR Little Endian, in the order of tags."""
    elements = {}
    for element in item:
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_data_element(buffer, element)
        elements[int(element.tag)] = buffer.getvalue()
    return elements


def _of_projection(image: Dataset) -> Dataset:
    """No geometry at all: a pixel spacing alone would be allowed, but GDCM 3.0.21, and a PACS with it, dies of a SEG with nothing more."""
    for keyword in (
        "FrameOfReferenceUID", "PositionReferenceIndicator", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
        "SliceThickness",
    ):  # fmt: skip
        image.pop(keyword, None)
    return image


def _of_frame(image: Dataset, header: Dataset, number: int, volume: Volume, slice_index: int) -> Dataset:
    """The plane of one frame, but for what all planes share."""
    plane = copied(image)
    plane.ImagePositionPatient = _position_of_frame(header, number, volume, slice_index)
    thickness = _of_functional_groups(header, number, "SliceThickness")
    if thickness is not None:
        plane.SliceThickness = thickness
    return plane


def _position_of_frame(header: Dataset, number: int, volume: Volume, slice_index: int) -> Sequence[object]:
    """A frame's position by its own functional groups (PS3.3 C.7.6.16) where it has them, else where the volume puts it."""
    own = _of_functional_groups(header, number, "ImagePositionPatient")
    return own or [_decimal(v) for v in volume.to_lps(np.array([slice_index, 0.0, 0.0]))]


def _axes(volume: Volume, by_uid: Mapping[str, Dataset]) -> tuple[Sequence[object], Sequence[object]]:
    """Orientation and pixel spacing of the plane that the volume's axes follow best; of a frame without its own, those of the volume."""
    known: dict[tuple[float, ...], tuple[Sequence[Any], Sequence[Any]]] = {}
    last: tuple[Sequence[Any] | None, Sequence[Any] | None] = (None, None)
    steps = (volume.affine[:3, axis] / np.linalg.norm(volume.affine[:3, axis]) for axis in (2, 1))
    cosines, spacing = [_decimal(v) for step in steps for v in step], [_decimal(v) for v in volume.spacing_mm[1:]]
    for k, uid in enumerate(volume.sop_instance_uids):
        header, number = by_uid[uid], frame_number(volume, k)
        if number is None:
            said = header[_ORIENTATION].value, header[_SPACING].value
        else:
            said = (
                _of_functional_groups(header, number, "ImageOrientationPatient") or cosines,
                _of_functional_groups(header, number, "PixelSpacing") or spacing,
            )
        if said[0] is last[0] and said[1] is last[1]:  # headers of a series share what is equal
            continue
        last = said
        known.setdefault((*map(float, said[0]), *map(float, said[1])), said)
    return min(known.values(), key=lambda said: _distance(said[0], said[1], volume))


def _of_functional_groups(header: Dataset, number: int, keyword: str) -> Any:
    """A value of a frame, from its own functional groups or from the shared ones; None where neither has it."""
    sequence = {"ImagePositionPatient": "PlanePositionSequence", "ImageOrientationPatient": "PlaneOrientationSequence"}.get(
        keyword, "PixelMeasuresSequence"
    )
    per_frame, shared = header.get("PerFrameFunctionalGroupsSequence") or [], header.get("SharedFunctionalGroupsSequence") or []
    for groups in (*per_frame[number - 1 : number], *shared[:1]):
        for item in groups.get(sequence) or []:
            if item.get(keyword):
                return item.get(keyword)
    return None


def _decimal(value: float) -> str:
    """A number as VR DS holds it: at most 16 characters."""
    return f"{value + 0.0:.10g}"


def _distance(orientation: Sequence[object], spacing: Sequence[object], volume: Volume) -> float:
    """How far an orientation and a pixel spacing are from the volume's axes."""
    row_mm, column_mm = np.array(spacing, dtype=np.float64)
    cosines = np.array(orientation, dtype=np.float64)
    axes = [cosines[3:] * row_mm - volume.affine[:3, 1], cosines[:3] * column_mm - volume.affine[:3, 2]]
    return float(np.abs(axes).max())


def _study_zone(header: Dataset) -> tzinfo | None:
    """The study's Timezone Offset From UTC (PS3.3 C.12.1.1.8), or None where it is absent or malformed."""
    text = str(header.get("TimezoneOffsetFromUTC") or "")
    if len(text) != 5 or text[0] not in "+-" or not text[1:].isdigit():
        return None
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[3:]))
    return timezone(-offset if text[0] == "-" else offset) if offset < timedelta(hours=24) else None
