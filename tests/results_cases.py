"""Series and projections with a known lesion, as headers and a volume, for the tests of results and of the validators."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalXRayImageStorageForPresentation,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    XRayAngiographicImageStorage,
)

from dicomnode.findings import (
    Calibration,
    Code,
    Finding,
    Findings,
    Laterality,
    LongAxis,
    Measurement,
    Prior,
    PriorFinding,
    Reference,
    RunIdentity,
    Score,
    Segment,
    Volume,
)

LIDC = Path(__file__).parent.parent.parent / "shared" / "data" / "ct_chest_lidc"
UID = "1.2.826.0.1.3680043.8.498.1"
DIGEST = "0123456789abcdef" * 4

# Direction cosines of (row index, column index) steps: PS3.3 C.7.6.2.1.1 gives them as (along a row, along a column).
ORIENTATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "oblique": ((0.9396926, 0.3420201, 0.0), (-0.3213938, 0.8830222, 0.3420201)),
}

PROJECTIONS = {
    "CR": ComputedRadiographyImageStorage,
    "DX": DigitalXRayImageStorageForPresentation,
    "MG": DigitalMammographyXRayImageStorageForPresentation,
    "XA": XRayAngiographicImageStorage,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A series as the encoders get it."""

    volume: Volume
    headers: list[Dataset]
    identity: RunIdentity

    def findings(self, *found: Finding, **more: Any) -> Findings:
        """Say `found`, numbered from 1, about this series."""
        return Findings(
            package="lung-nodule-ct",
            version="0.1.0",
            digest=DIGEST,
            algorithm_name="Lung nodule 3D U-Net",
            manufacturer="dicomnode",
            series_instance_uid=self.volume.series_instance_uid,
            findings=tuple(replace(f, number=i) for i, f in enumerate(found, start=1)),
            device="cpu fp32",
            **more,
        )


def identity(study_instance_uid: str, **changes: Any) -> RunIdentity:
    """A run of the package that the tests speak of."""
    run = RunIdentity(
        study_instance_uid=study_instance_uid,
        revision=1,
        package="lung-nodule-ct",
        version="0.1.0",
        digest=DIGEST,
        run=1,
        created_at=datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC),
    )
    return replace(run, **changes)


def synthetic(
    orientation: str = "axial",
    *,
    reverse: bool = False,
    shape: tuple[int, int, int] = (12, 50, 60),
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.7),
    patient_name: str = "Sphere^Synthetic",
    character_set: str | Sequence[str] | None = "ISO_IR 100",
    **attributes: Any,
) -> Case:
    """A series of `shape` voxels; `reverse` sorts the volume against the slice normal."""
    along_row, along_column = (np.array(v, dtype=np.float64) for v in ORIENTATIONS[orientation])
    along_row, along_column = along_row / np.linalg.norm(along_row), along_column / np.linalg.norm(along_column)
    normal = np.cross(along_row, along_column) * (-1 if reverse else 1)
    slice_mm, row_mm, column_mm = spacing
    origin = np.array([-20.0, -30.5, 100.25])
    affine = np.eye(4)
    affine[:3, :] = np.column_stack([normal * slice_mm, along_column * row_mm, along_row * column_mm, origin])
    headers = []
    for k in range(shape[0]):
        header = Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if character_set is not None:
            header.SpecificCharacterSet = character_set if isinstance(character_set, str) else list(character_set)
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, f"{UID}.3.{k + 1}"
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = f"{UID}.1", f"{UID}.2", f"{UID}.4"
        header.PatientName, header.PatientID, header.PatientBirthDate, header.PatientSex = patient_name, "P1", "19500102", "F"
        header.StudyDate, header.StudyTime, header.AccessionNumber, header.StudyID = "20260303", "101112", "A1", "S1"
        header.ReferringPhysicianName, header.PositionReferenceIndicator = "", ""
        header.Modality, header.BodyPartExamined, header.SeriesNumber, header.InstanceNumber = "CT", "CHEST", "3", k + 1
        header.Manufacturer, header.ManufacturerModelName = "Phantom works", "Sphere"
        header.Rows, header.Columns = shape[1:]
        header.ImageOrientationPatient = [float(f"{v:.8g}") for v in (*along_row, *along_column)]
        header.ImagePositionPatient = [float(f"{v:.10g}") for v in origin + normal * slice_mm * k]
        header.PixelSpacing, header.SliceThickness = [row_mm, column_mm], slice_mm
        for keyword, value in attributes.items():
            setattr(header, keyword, value)
        headers.append(header)
    return Case(volume=volume_of(headers, np.full(shape, -800, dtype=np.float32), affine), headers=headers, identity=identity(f"{UID}.1"))


def enhanced(modality: str = "CT", *, shuffled: bool = True, **more: Any) -> Case:
    """The same series as one multi-frame image; unless told otherwise its frames don't lie in the order of the slices."""
    classic = synthetic(Modality=modality, **more)
    count = len(classic.headers)
    numbers = tuple((7 * k) % count + 1 if shuffled else k + 1 for k in range(count))
    image = Dataset()
    for element in classic.headers[0]:
        if element.keyword not in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            image.add(element)
    image.file_meta = classic.headers[0].file_meta
    image.SOPClassUID = EnhancedMRImageStorage if modality == "MR" else EnhancedCTImageStorage
    image.SOPInstanceUID, image.NumberOfFrames = f"{UID}.3.99", count
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = classic.headers[0].PixelSpacing, classic.headers[0].SliceThickness
    orientation.ImageOrientationPatient = classic.headers[0].ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    image.SharedFunctionalGroupsSequence = [shared]
    frames = [Dataset() for _ in numbers]
    for header, number in zip(classic.headers, numbers, strict=True):
        position = Dataset()
        position.ImagePositionPatient = header.ImagePositionPatient
        frames[number - 1].PlanePositionSequence = [position]
    image.PerFrameFunctionalGroupsSequence = frames
    volume = replace(classic.volume, sop_instance_uids=(str(image.SOPInstanceUID),) * count, frame_numbers=numbers, modality=modality)
    return Case(volume=volume, headers=[image], identity=classic.identity)


def projection(modality: str = "DX", *, calibration: Calibration = "detector", frame: int | None = None, **more: Any) -> Case:
    """A radiograph of 80 x 60 pixels of 0.2 x 0.15 mm; `frame`: it is this frame of a multi-frame image."""
    shape, (row_mm, column_mm) = (1, 80, 60), (0.2, 0.15) if calibration != "none" else (1.0, 1.0)
    header = synthetic(shape=shape, Modality=modality, **more).headers[0]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "FrameOfReferenceUID"):
        delattr(header, keyword)
    header.SOPClassUID = PROJECTIONS[modality]
    header.PatientOrientation = ["L", "F"]
    if calibration == "detector":
        header.ImagerPixelSpacing = [row_mm, column_mm]
    if calibration == "patient":
        header.PixelSpacing = [row_mm, column_mm]
    if frame is not None:
        header.NumberOfFrames = frame + 2
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = column_mm, row_mm, 1.0, 1.0
    volume = Volume(
        voxels=np.zeros(shape, dtype=np.int16),
        affine=affine,
        sop_instance_uids=(str(header.SOPInstanceUID),),
        series_instance_uid=str(header.SeriesInstanceUID),
        study_instance_uid=str(header.StudyInstanceUID),
        frame_of_reference_uid=None,
        modality=modality,
        frame_numbers=None if frame is None else (frame,),
        calibration=calibration,
    )
    return Case(volume=volume, headers=[header], identity=identity(f"{UID}.1"))


def another_series(case: Case, number: int) -> Case:
    """The same grid as another series."""
    for header in case.headers:
        header.SeriesInstanceUID, header.SOPInstanceUID = f"2.25.{number}", f"2.25.{number}.{header.InstanceNumber}"
    uids = tuple(str(header.SOPInstanceUID) for header in case.headers)
    return replace(case, volume=replace(case.volume, series_instance_uid=f"2.25.{number}", sop_instance_uids=uids))


def volume_of(headers: Sequence[Dataset], voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> Volume:
    """Voxels and affine with the identities of their headers."""
    return Volume(
        voxels=voxels,
        affine=affine,
        sop_instance_uids=tuple(str(h.SOPInstanceUID) for h in headers),
        series_instance_uid=str(headers[0].SeriesInstanceUID),
        study_instance_uid=str(headers[0].StudyInstanceUID),
        frame_of_reference_uid=str(headers[0].FrameOfReferenceUID),
        modality=str(headers[0].Modality),
    )


def sphere(
    case: Case, centre_lps: Sequence[float], diameter_mm: float, *, side: Laterality | None = "left", probability: float = 0.9
) -> Finding:
    """A finding whose voxels are those with their centre inside the sphere; its numbers are measured on the voxels."""
    volume = case.volume
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in volume.voxels.shape), indexing="ij"), axis=-1).astype(np.float64)
    full = np.linalg.norm(volume.to_lps(grid) - np.array(centre_lps), axis=-1) <= diameter_mm / 2
    index = np.argwhere(full)
    low, high = index.min(axis=0), index.max(axis=0) + 1
    mask = full[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    segment = Segment(mask=mask, origin=(int(low[0]), int(low[1]), int(low[2])))
    return finding_of(case, segment, side=side, probability=probability)


def finding_of(case: Case, segment: Segment, *, side: Laterality | None = "left", probability: float = 0.9) -> Finding:
    """A lung nodule of these voxels; the long axis is the longest line between voxel centres along one row or column."""
    volume, index = case.volume, np.argwhere(segment.mask) + np.array(segment.origin)
    centre = volume.to_lps(index.mean(axis=0))
    k = int(np.argmax(segment.mask.sum(axis=(1, 2)))) + segment.origin[0]
    pixels = index[index[:, 0] == k]
    distance = np.linalg.norm((pixels[:, None] - pixels[None]) * np.array(volume.spacing_mm), axis=-1)
    a, b = np.unravel_index(int(distance.argmax()), distance.shape)
    ends = pixels[[a, b]].astype(np.float64)
    points = volume.to_lps(ends)
    length = float(distance.max())
    return Finding(
        number=1,
        label="Lung nodule",
        probability=probability,
        category=Code(value="49755003", scheme="SCT", meaning="Morphologically Abnormal Structure"),
        type=Code(value="27925004", scheme="SCT", meaning="Nodule"),
        site=Code(value="39607008", scheme="SCT", meaning="Lung"),
        side=side,
        centre_lps_mm=None if volume.is_projection else (float(centre[0]), float(centre[1]), float(centre[2])),
        segment=segment,
        long_axis=LongAxis(
            slice_index=k,
            points_lps_mm=(tuple(points[0].tolist()), tuple(points[1].tolist())),
            points_px=((float(ends[0][2]), float(ends[0][1])), (float(ends[1][2]), float(ends[1][1]))),
            length_mm=length,
        ),
        measurements=measured(volume, len(index), length),
        colour_cielab=(70.0, 30.0, 50.0),
    )


def measured(volume: Volume, count: int, length: float) -> tuple[Measurement, ...]:
    """Volume and long axis, of a projection area and long axis, in the units that its calibration allows."""
    unit = "{pixels}" if volume.calibration == "none" else "mm"
    axis = Measurement(
        name=Code(value="103339001", scheme="SCT", meaning="Long axis"), value=length, unit=Code(value=unit, scheme="UCUM", meaning=unit)
    )
    if not volume.is_projection:
        millilitre = Code(value="ml", scheme="UCUM", meaning="ml")
        name = Code(value="118565006", scheme="SCT", meaning="Volume")
        return Measurement(name=name, value=count * volume.voxel_ml, unit=millilitre), axis
    square = "{pixels}" if volume.calibration == "none" else "mm2"
    area = count * volume.spacing_mm[1] * volume.spacing_mm[2]
    name = Code(value="42798000", scheme="SCT", meaning="Area")
    return Measurement(name=name, value=area, unit=Code(value=square, scheme="UCUM", meaning=square)), axis


def box_of(case: Case, first: tuple[int, int, int], shape: tuple[int, int, int], **about: Any) -> Finding:
    """What a detection says: a filled box and a probability."""
    found = finding_of(case, Segment(mask=np.ones(shape, dtype=np.bool_), origin=first), **about)
    return replace(found, shape="box", long_axis=None, measurements=())


def heat_map_of(case: Case, segment: Segment, **about: Any) -> Finding:
    """What a classification says of a place."""
    found = finding_of(case, segment, **about)
    return replace(found, label="Pneumothorax", shape="heat map", long_axis=None, measurements=())


def scores() -> tuple[Score, ...]:
    """Three classes, one of them positive."""
    return tuple(
        Score(
            label=label,
            type=Code(value=value, scheme="SCT", meaning=label),
            probability=probability,
            threshold=0.5,
            positive=probability > 0.5,
        )
        for label, value, probability in (
            ("Pneumothorax", "36118008", 0.8125),
            ("Pleural effusion", "60046008", 0.25),
            ("Cardiomegaly", "8186001", 0.0305),
        )
    )


def former_of(case: Case, finding: Finding, *, grown: float = 1.0, **changes: Any) -> PriorFinding:
    """The finding as an earlier study has it, a `grown`-th of its volume."""
    assert finding.centre_lps_mm is not None
    former = PriorFinding(
        tracking_uid="2.25.70",
        tracking_id="lung-nodule-ct 0.0.9 #1",
        label=finding.label,
        shape=finding.shape,
        category=finding.category,
        type=finding.type,
        site=finding.site,
        side=finding.side,
        centre_lps_mm=finding.centre_lps_mm,
        volume_ml=finding.segment.voxel_count * case.volume.voxel_ml / grown,
    )
    return replace(former, **changes)


def prior_with(*former: PriorFinding, days: int | None = 100, **changes: Any) -> Prior:
    """An earlier study in the same place."""
    prior = Prior(
        study_instance_uid="2.25.80",
        date="20251123",
        days=days,
        version="0.0.9",
        reports=tuple(
            Reference(
                sop_class_uid=f"1.2.840.10008.5.1.4.1.1.88.{n}", sop_instance_uid=f"2.25.81.{n}", series_instance_uid=f"2.25.82.{n}",
                study_instance_uid="2.25.80",
            )
            for n in (33, 34)
        ),
        findings=former,
        to_current=((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)),
        alignment="both are in one frame of reference",
    )  # fmt: skip
    return replace(prior, **changes)


def written_again(dataset: Dataset) -> bytes:
    """The bytes of a changed object."""
    buffer = BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def lidc() -> tuple[Case, list[Path], Finding]:
    """LIDC-IDRI-0001 with the sphere that its readers' mean nodule describes; needs ../shared/data."""
    files = sorted((LIDC / "LIDC-IDRI-0001").glob("*.dcm"), key=lambda f: float(pydicom.dcmread(f, stop_before_pixels=True).SliceLocation))
    images = [pydicom.dcmread(f) for f in files]
    first, last = (np.array(images[i].ImagePositionPatient, dtype=np.float64) for i in (0, -1))
    affine = np.eye(4)
    row, column = (np.array(images[0].ImageOrientationPatient[i : i + 3], dtype=np.float64) for i in (0, 3))
    row_mm, column_mm = map(float, images[0].PixelSpacing)
    affine[:3, :] = np.column_stack([(last - first) / (len(images) - 1), column * row_mm, row * column_mm, first])
    voxels = np.stack([i.pixel_array * float(i.RescaleSlope) + float(i.RescaleIntercept) for i in images]).astype(np.float32)
    case = Case(volume=volume_of(images, voxels, affine), headers=images, identity=identity(str(images[0].StudyInstanceUID)))
    nodule = next(csv.DictReader((LIDC / "nodules_luna16.csv").read_text().splitlines()))
    centre = [float(nodule[k]) for k in ("coordX", "coordY", "coordZ")]
    return case, files, sphere(case, centre, float(nodule["diameter_mm"]), side="left")
