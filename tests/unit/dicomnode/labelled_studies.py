"""DICOM series with bright balls and the SEG of them as the node writes it, for tests of data sets and of training on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.analysis.candidates import SelectedSeries
from dicomnode.analysis.frames import frames_of, read_headers
from dicomnode.analysis.volume import read_volume
from dicomnode.findings import Finding, Findings, RunIdentity, Volume
from dicomnode.phantoms.dicom import SeriesHeader, write_ct_series
from dicomnode.results.segmentation import encode_segmentation
from results_cases import Case, identity, sphere

Point = tuple[float, float, float]

SHAPE = (16, 48, 52)
SPACING = (2.5, 1.0, 1.0)
ORIGIN = (-26.0, -24.0, -20.0)
CENTRES: tuple[Point, Point] = ((-8.0, 4.0, -4.0), (12.0, -9.0, 5.0))  # LPS mm
DIAMETER_MM = 14.0


def affine_of() -> NDArray[np.float64]:
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = SPACING
    affine[:3, 3], affine[3, 3] = ORIGIN, 1.0
    return affine


def ball(volume: Volume, centre: Point, diameter_mm: float = DIAMETER_MM) -> NDArray[np.bool_]:
    """The voxels of a volume whose centre is inside."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.voxels.shape), indexing="ij"), axis=-1).astype(np.float64)
    return np.asarray(np.linalg.norm(volume.to_lps(index) - np.array(centre), axis=-1) <= diameter_mm / 2)


def write_study(
    folder: Path, seed: str, *, centres: Sequence[Point] = CENTRES, patient_id: str = "P1", patient_age: str = "",
    body_part: str = "CHEST", descending: bool = False,
) -> Path:  # fmt: skip
    """Write low noise with bright balls as a CT series and return its folder."""
    rng = np.random.default_rng([ord(letter) for letter in seed])
    affine = affine_of()
    blank = Volume(
        voxels=np.zeros(SHAPE, dtype=np.int16), affine=affine, sop_instance_uids=(), series_instance_uid="", study_instance_uid="",
        frame_of_reference_uid="", modality="CT",
    )  # fmt: skip
    voxels = rng.normal(-800, 15, SHAPE)
    for centre in centres:
        voxels[ball(blank, centre)] += 800
    header = SeriesHeader(seed=seed, patient_id=patient_id, body_part=body_part, descending=descending)
    for file in write_ct_series(folder, np.round(voxels).astype(np.float32), affine, header):
        if patient_age:
            image = pydicom.dcmread(file)
            image.PatientAge = patient_age
            image.save_as(file)
    return folder


def headers_of(folder: Path) -> list[Dataset]:
    return [image for file in sorted(folder.glob("*.dcm")) if (image := pydicom.dcmread(file)).Modality != "SEG"]


def read_series(folder: Path) -> Volume:
    frames = [frame for frame in frames_of(read_headers(sorted(folder.glob("*.dcm")))) if frame.image.Modality != "SEG"]
    return read_volume(SelectedSeries(input_name="image", series_instance_uid="", frames=tuple(frames), why=""))


def findings_of(volume: Volume, headers: list[Dataset], centres: Sequence[Point]) -> tuple[Findings, RunIdentity]:
    case = Case(volume=volume, headers=headers, identity=identity(volume.study_instance_uid))
    return case.findings(*(sphere(case, centre, DIAMETER_MM, side=None) for centre in centres)), case.identity


def write_seg(folder: Path, centres: Sequence[Point], *, found: Sequence[Finding] = ()) -> Path:
    """Write the SEG of these balls, or of what is `found`, beside the images that it names."""
    volume, headers = read_series(folder), headers_of(folder)
    findings, run = findings_of(volume, headers, centres)
    if found:
        findings = replace(findings, findings=tuple(found))
    result = encode_segmentation(findings, volume, headers, run)
    assert result is not None
    file = folder / "seg.dcm"
    file.write_bytes(result.data)
    return file
