"""The value types that analysis produces and results consume. No DICOM encoding, no torch, no storage here.

Axes everywhere: voxel arrays are indexed (slice k, row r, column c); positions are LPS millimetres in the
patient coordinate system of PS3.3 C.7.6.2.1.1; an affine maps (k, r, c, 1) to (x, y, z, 1). A projection (X-ray) has no
patient coordinates: its affine maps to (x, y, 0) in the image plane, mm from the centre of the first pixel, x along the rows
and y along the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Laterality = Literal["left", "right"]
Shape = Literal["outline", "box", "heat map"]
Calibration = Literal["patient", "detector", "none"]
Voxels = NDArray[np.int16] | NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Code:
    """A coded concept (PS3.3 8.8): value, coding scheme designator, meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One image series as voxels in patient space, or one projection (X-ray) as a single slice.

    `voxels` is int16 or float32 (slices, rows, columns) in the modality's units (CT: HU); int16 where no value is lost by it.
    `affine` is 4x4 float64 and maps (k, r, c, 1) to mm of the voxel's centre. Slice k is frame `frame_numbers[k]` (from 1) of the image
    `sop_instance_uids[k]`; where `frame_numbers` is None the images have one frame each.
    """

    voxels: Voxels
    affine: NDArray[np.float64]
    sop_instance_uids: tuple[str, ...]
    series_instance_uid: str
    study_instance_uid: str
    frame_of_reference_uid: str | None  # None: a projection
    modality: str
    frame_numbers: tuple[int, ...] | None = None
    calibration: Calibration = "patient"  # where a millimetre is: in the patient, at the detector, or nowhere (then it is a pixel)

    @property
    def is_projection(self) -> bool:
        """Whether this is an X-ray projection: one slice without patient coordinates."""
        return self.frame_of_reference_uid is None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along (slice, row, column), mm."""
        norms = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(norms[0]), float(norms[1]), float(norms[2])

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def to_lps(self, index: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map (..., 3) voxel indices (k, r, c) to (..., 3) LPS mm."""
        return np.asarray(index @ self.affine[:3, :3].T + self.affine[:3, 3], dtype=np.float64)

    def to_index(self, position: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map (..., 3) LPS mm to (..., 3) voxel indices (k, r, c), voxel centres at whole numbers."""
        return np.asarray((position - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T, dtype=np.float64)


def probability_bytes(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return probabilities as a segment keeps them: 255 is 1, 0 is outside of the mask, and a voxel of the mask has at least 1."""
    return np.where(mask, np.rint(np.clip(values * 255.0, 1, 255)), 0).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A mask inside a volume: a boolean box and where its first voxel lies in the volume."""

    mask: NDArray[np.bool_]  # (k, r, c), cropped to its bounds; never empty
    origin: tuple[int, int, int]  # index of mask[0, 0, 0] in the volume
    probability: NDArray[np.uint8] | None = None  # of each voxel of the mask, 1..255 for 0..1, and 0 outside; None: the model gives none

    @property
    def voxel_count(self) -> int:
        """Number of voxels in the segment."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number with its concept and UCUM unit, and how it was derived."""

    name: Code
    value: float
    unit: Code  # scheme UCUM
    method: Code | None = None


@dataclass(frozen=True, kw_only=True)
class LongAxis:
    """The longest diameter of a segment within one slice: two points in LPS mm and the slice they lie in."""

    slice_index: int
    points_lps_mm: tuple[tuple[float, float, float], tuple[float, float, float]]
    points_px: tuple[tuple[float, float], tuple[float, float]]  # (column, row), pixel centres at whole numbers
    length_mm: float


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A DICOM object of this node by its names, in whatever study."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str


@dataclass(frozen=True, kw_only=True)
class PriorFinding:
    """What was found in an earlier study, and where in that study's patient space."""

    tracking_uid: str
    tracking_id: str
    label: str
    shape: Shape
    category: Code
    type: Code
    site: Code | None
    side: Laterality | None
    centre_lps_mm: tuple[float, float, float]
    volume_ml: float  # of its voxels: of a box no measurement


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What became of something since the study that was compared with."""

    former: PriorFinding
    percent: float | None  # by how much its volume changed; None: it has none that is measured
    trend: Literal["grown", "shrunk", "unchanged"] | None  # unchanged: within what measuring it twice may differ by
    doubling_days: float | None  # of something abnormal that has grown


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The earlier study of the same patient that findings are compared with, as the same package saw it."""

    study_instance_uid: str
    date: str  # of its acquisition, else of the study: YYYYMMDD
    days: int | None  # from it to the study at hand; None: one of them has no date
    version: str  # of the package then
    reports: tuple[Reference, ...]  # what the node said of it, in the order in which a run makes them
    findings: tuple[PriorFinding, ...]
    to_current: tuple[tuple[float, float, float, float], ...]  # rows of the affine from its LPS mm to those of the study at hand
    alignment: str  # how these were found, in words


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What became of an earlier study's findings, beside those that are still there."""

    prior: Prior
    vanished: tuple[PriorFinding, ...]  # in the prior study, and nowhere in this one


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing a model says about a study, and where.

    Every finding has a place that can be drawn: an outline, a filled box (of a detection, or of a segmentation that says so), or where
    a heat map is warm (classification).
    """

    number: int  # 1.. within its Findings: the segment number, and the ordinal its UIDs derive from
    label: str
    probability: float  # 0..1
    category: Code  # e.g. (49755003, SCT, Morphologically Abnormal Structure)
    type: Code  # e.g. (27925004, SCT, Nodule)
    site: Code | None  # anatomic region
    side: Laterality | None
    centre_lps_mm: tuple[float, float, float] | None  # None on a projection
    segment: Segment
    shape: Shape = "outline"
    long_axis: LongAxis | None  # of an outline; None of a box or a heat map, whose extent measures nothing
    measurements: tuple[Measurement, ...]
    colour_cielab: tuple[float, float, float]
    growth: Growth | None = None  # where the study that was compared with has it too

    @property
    def long_axis_mm(self) -> float | None:
        """The length of the long axis; None where there is none."""
        return self.long_axis.length_mm if self.long_axis else None

    @property
    def bounds_px(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge in its slices, in pixels: (column, row) with pixel centres at whole numbers."""
        _, row, column = self.segment.origin
        _, rows, columns = self.segment.mask.shape
        return column - 0.5, row - 0.5, column + columns - 0.5, row + rows - 0.5

    @property
    def middle_slice(self) -> int:
        """The slice in the middle of the finding, as an index of the volume."""
        return self.segment.origin[0] + len(self.segment.mask) // 2

    @property
    def key_slice(self) -> int:
        """The slice that it is drawn on, as an index of the volume: that of its long axis where it has one, else the middle one."""
        return self.long_axis.slice_index if self.long_axis else self.middle_slice

    @property
    def volume_ml(self) -> float:
        """The volume measurement (118565006, SCT) in ml; 0.0 if there is none."""
        return next((m.value for m in self.measurements if m.name.value == "118565006"), 0.0)


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model says about the whole image or study: one class, its probability, and whether that is above its threshold."""

    label: str
    type: Code
    probability: float  # 0..1
    threshold: float
    positive: bool


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What one model package says about one series, or a set of them on one grid: that of the first.

    An empty `findings` is a statement: nothing was found.
    """

    package: str
    version: str
    digest: str  # sha256 hex of the package
    algorithm_name: str
    manufacturer: str
    series_instance_uid: str
    findings: tuple[Finding, ...]
    device: str  # device, precision and backend, e.g. "cpu fp32 torch", "cpu bf16 openvino", "cuda bf16 torch"
    scores: tuple[Score, ...] = ()  # of a classification, or of a segmentation that scores whole images
    omitted: int = 0  # findings beyond the cap, counted and said
    other_series: tuple[str, ...] = ()  # Series Instance UIDs that the model was given beside the first
    notes: tuple[str, ...] = ()  # what the reader must be told, a sentence each, e.g. "FLAIR alone"
    comparison: Comparison | None = None  # with an earlier study of the patient
    not_compared: str = ""  # why there is none: a clause
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Everything a result object's UIDs and dates derive from (contract 11)."""

    study_instance_uid: str
    revision: int
    package: str
    version: str
    digest: str
    run: int
    created_at: datetime  # aware; kept with the job, so a retry writes the same dates


@dataclass(frozen=True, kw_only=True)
class ResultObject:
    """An encoded DICOM object (a whole Part 10 file) made from findings.

    Its bytes are in parts, as they were made: to put those of a large SEG together takes longer than to encode it.
    """

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    series_instance_uid: str
    modality: str  # "SEG", "SR", "OT" (a picture), "KO" or "PR"
    parts: tuple[bytes | memoryview, ...]  # the file, one behind the other; the first begins with preamble and file meta information
    series_number: int | None = None
    series_description: str = ""
    instance_number: int | None = None

    @property
    def data(self) -> bytes:
        """The whole file, put together anew each time."""
        return b"".join(self.parts)

    @property
    def size(self) -> int:
        """Number of bytes of the file."""
        return sum(len(part) for part in self.parts)
