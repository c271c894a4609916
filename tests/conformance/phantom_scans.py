"""Two bodies of known place and size in a patient, scanned in every way that the same patient can be stored.

Everything here is plain numpy in patient space (LPS mm, PS3.3 C.7.6.2.1.1): what is true is never asked of the node's own geometry.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian
from scipy.spatial.transform import Rotation

from dicomnode.findings import Laterality
from results_cases import ORIENTATIONS

MIDDLE = np.array([12.5, -31.0, 104.25])  # of the scanned region: off the origin along each axis
COUNT = (24, 72, 84)  # slices, rows, columns
SPACING = (1.4, 0.5, 0.42)  # mm along them: no two equal, so that two axes can't be confused
AIR = -1000


@dataclass(frozen=True, kw_only=True)
class Body:
    """A solid ellipsoid that no axis of a scan lies along, so that no flip of a scan is itself."""

    value: int  # HU
    side: Laterality
    centre: NDArray[np.float64]
    semi_axes: tuple[float, float, float]
    turn: NDArray[np.float64]  # its axes as columns

    @property
    def volume_ml(self) -> float:
        """By the formula."""
        return 4 / 3 * np.pi * float(np.prod(self.semi_axes)) / 1000

    def depth(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far from the centre points (..., 3) lie, in parts of the way to the surface: below 1 is inside."""
        return np.asarray(np.linalg.norm((points - self.centre) @ self.turn / self.semi_axes, axis=-1))


def body(value: int, side: Laterality, offset: tuple[float, float, float], semi_axes: tuple[float, float, float], degrees: int) -> Body:
    turn = Rotation.from_euler("xyz", (degrees, 40 - degrees, 25), degrees=True).as_matrix()
    return Body(value=value, side=side, centre=MIDDLE + offset, semi_axes=semi_axes, turn=turn)


BODIES = (
    body(40, "left", (6.1, 3.3, -4.2), (9.0, 6.5, 5.2), 20),
    body(90, "right", (-7.4, -5.1, 5.7), (7.2, 5.6, 4.6), 65),
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One of the ways to store the scan: which way slices follow each other, rows and columns run, how they are numbered, as what."""

    flip: tuple[int, int, int]  # 1 or -1 along slices as they are stored, rows (index), columns (index)
    plane: str
    descending: bool  # Instance Number, of frames In-Stack Position Number, falls while slices are stored
    enhanced: bool

    def __str__(self) -> str:
        flipped = "".join(letter if sign < 0 else "-" for letter, sign in zip("src", self.flip, strict=True))
        return f"{self.plane} {flipped} {'descending' if self.descending else 'ascending'} {'enhanced' if self.enhanced else 'classic'}"

    @property
    def steps(self) -> NDArray[np.float64]:
        """Rows: the way in mm from one voxel to the next along stored slices, rows and columns."""
        along_row, along_column = (np.array(v, dtype=np.float64) for v in ORIENTATIONS[self.plane])
        along_row /= np.linalg.norm(along_row)
        along_column -= along_row * (along_row @ along_column)
        along_column /= np.linalg.norm(along_column)
        directions = np.array([np.cross(along_row, along_column), along_column, along_row])
        return np.asarray(directions * np.array(self.flip)[:, None] * np.array(SPACING)[:, None])

    @property
    def positions(self) -> NDArray[np.float64]:
        """(slices, rows, columns, 3): where each stored voxel lies in the patient."""
        index = np.moveaxis(np.indices(COUNT), 0, -1) - (np.array(COUNT) - 1) / 2
        return np.asarray(index @ self.steps + MIDDLE)


EVERY = [
    Way(flip=(s, r, c), plane=plane, descending=descending, enhanced=enhanced)
    for plane, s, r, c, descending, enhanced in itertools.product(ORIENTATIONS, (1, -1), (1, -1), (1, -1), (False, True), (False, True))
]


def scan(way: Way, folder: Path) -> list[Path]:
    """Write the patient's scan; return its files as they are stored."""
    positions = way.positions
    stored = np.full(COUNT, AIR, dtype=np.int16)
    for one in BODIES:
        stored[one.depth(positions) <= 1] = one.value
    orientation = [f"{v:.9g}" for v in np.concatenate([way.steps[2] / SPACING[2], way.steps[1] / SPACING[1]]) + 0.0]
    places = [[f"{v:.10g}" for v in position + 0.0] for position in positions[:, 0, 0]]
    numbers = range(COUNT[0], 0, -1) if way.descending else range(1, COUNT[0] + 1)
    files = []
    if way.enhanced:
        image = _image(EnhancedCTImageStorage, 99, 1, stored)
        image.NumberOfFrames = COUNT[0]
        image.SharedFunctionalGroupsSequence = [
            _item(
                PlaneOrientationSequence=[_item(ImageOrientationPatient=orientation)],
                PixelMeasuresSequence=[_item(PixelSpacing=list(SPACING[1:]), SliceThickness=SPACING[0])],
                PixelValueTransformationSequence=[_item(RescaleSlope=1, RescaleIntercept=0, RescaleType="HU")],
            )
        ]
        image.PerFrameFunctionalGroupsSequence = [
            _item(
                PlanePositionSequence=[_item(ImagePositionPatient=place)],
                FrameContentSequence=[_item(StackID="1", InStackPositionNumber=number, DimensionIndexValues=[1, number])],
            )
            for place, number in zip(places, numbers, strict=True)
        ]
        files.append(_written(image, folder / "image.dcm"))
    else:
        for k, (place, number) in enumerate(zip(places, numbers, strict=True)):
            image = _image(CTImageStorage, k + 1, number, stored[k])
            image.ImagePositionPatient, image.ImageOrientationPatient = place, orientation
            image.PixelSpacing, image.SliceThickness = list(SPACING[1:]), SPACING[0]
            image.RescaleSlope, image.RescaleIntercept = 1, 0
            files.append(_written(image, folder / f"{k:02}.dcm"))
    return files


def _item(**values: object) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def _image(sop_class: str, uid: int, number: int, stored: NDArray[np.int16]) -> Dataset:
    image = _item(
        SpecificCharacterSet="ISO_IR 100", ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "NONE"], SOPClassUID=sop_class,
        SOPInstanceUID=f"2.25.7.{uid}", StudyDate="20260303", StudyTime="101112", AccessionNumber="A1", Modality="CT",
        Manufacturer="Phantom works", ReferringPhysicianName="", PatientName="Two^Bodies", PatientID="P1", PatientBirthDate="19500102",
        PatientSex="F", BodyPartExamined="CHEST", StudyInstanceUID="2.25.5", SeriesInstanceUID="2.25.6", StudyID="S1", SeriesNumber=3,
        InstanceNumber=number, FrameOfReferenceUID="2.25.8", PositionReferenceIndicator="", SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2", Rows=COUNT[1], Columns=COUNT[2], BitsAllocated=16, BitsStored=16, HighBit=15,
        PixelRepresentation=1, PixelData=stored.tobytes(),
    )  # fmt: skip
    image["PixelData"].VR = "OW"
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return image


def _written(image: Dataset, file: Path) -> Path:
    image.save_as(file, enforce_file_format=True)
    return file
