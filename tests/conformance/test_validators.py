"""Independent programs read every kind of result object of every kind of source, and find nothing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pydicom
import pytest
from every_result import EVERY, KINDS, REPORTS, SHAPES, report, segmentation, source_of

from dicomnode.findings import Finding, ResultObject, Segment
from dicomnode.results.decoding import concept_of
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation
from results_cases import LIDC, Case, enhanced, finding_of, lidc, synthetic
from validators import complaints, run, template_complaints

pytestmark = pytest.mark.system


@pytest.mark.parametrize(("source", "kind"), EVERY, ids=[" | ".join(each) for each in EVERY])
def test_programs_find_nothing_wrong(source: str, kind: str, tmp_path: Path) -> None:
    patient = str(source_of(source).case.headers[0].PatientName)
    made = KINDS[kind](source)
    assert made
    for file, result in written(tmp_path, *made).items():
        assert complaints(file, tmp_path) == []
        assert str(pydicom.dcmread(file).PatientName) == patient  # each source's in another script
        assert result.sop_class_uid == pydicom.dcmread(file).SOPClassUID


def test_the_checker_of_templates_finds_nothing_wrong_with_any_shape_of_report_and_does_see_a_mistake(tmp_path: Path) -> None:
    """One start of the checker for all: it takes longer than a report."""
    assert len(SHAPES) <= 10
    files = [tmp_path / f"{name}.dcm" for name in SHAPES]
    for file, make in zip(files, SHAPES.values(), strict=True):
        file.write_bytes(make().data)
    mistaken = pydicom.dcmread(BytesIO(REPORTS["report of nothing"]("CT").data))
    procedure = next(item for item in mistaken.ContentSequence if concept_of(item) == "121058")
    procedure.ConceptCodeSequence[0].CodeValue = "1-1"
    mistaken.save_as(tmp_path / "mistaken.dcm")
    said = template_complaints([*files, tmp_path / "mistaken.dcm"])
    assert said.pop("mistaken.dcm")
    assert {name: lines for name, lines in said.items() if lines} == {}
    assert {file.name for file in files} <= set(said)


@pytest.mark.long
def test_the_checker_of_templates_finds_nothing_wrong_with_any_report_of_any_source(tmp_path: Path) -> None:
    reports = [(source, kind) for source, kind in EVERY if kind in REPORTS]
    files = [tmp_path / f"{source} {kind}.dcm" for source, kind in reports]
    for file, (source, kind) in zip(files, reports, strict=True):
        file.write_bytes(REPORTS[kind](source).data)
    assert {name: lines for name, lines in template_complaints(files).items() if lines} == {}


def test_the_other_programs_do_see_mistakes(tmp_path: Path) -> None:
    """If they kept quiet about these, their silence above would mean nothing."""
    seg, document = (pydicom.dcmread(BytesIO(made.data)) for made in (segmentation("CT"), report("CT")))
    del seg.SharedFunctionalGroupsSequence
    del document.VerificationFlag
    document.ContentSequence[0].RelationshipType = "SELECTED FROM"
    seg.save_as(tmp_path / "SEG.dcm")
    document.save_as(tmp_path / "SR.dcm")
    said = complaints(tmp_path / "SEG.dcm", tmp_path) + complaints(tmp_path / "SR.dcm", tmp_path)
    for program in ("dciodvfy", "segimage2itkimage", "dsrdump"):
        assert any(line.startswith(program) for line in said), said


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was found in a series, and the segmentation that says so."""

    case: Case
    found: tuple[Finding, ...]
    segmentation: ResultObject


def make(case: Case, *found: Finding, **more: Any) -> Made:
    findings = case.findings(*found, **more)
    seg = encode_segmentation(findings, case.volume, case.headers, case.identity)
    assert seg is not None
    prove(seg, encode_report(findings, case.volume, case.headers, case.identity, seg), findings, case.volume)
    return Made(case=case, found=findings.findings, segmentation=seg)


def axial_against_the_normal() -> Made:
    case = synthetic(reverse=True)
    return make(case, finding_of(case, Segment(mask=np.ones((3, 5, 4), dtype=np.bool_), origin=(2, 8, 30))))


def oblique_overlapping() -> Made:
    case = synthetic("oblique", reverse=True)
    first, second = (Segment(mask=np.ones((3, 6, 6), dtype=np.bool_), origin=(k, r, 20)) for k, r in ((4, 10), (6, 13)))
    return make(case, finding_of(case, first), finding_of(case, second, side="right"))


def frames_in_disorder() -> Made:
    """An enhanced MR image whose frames don't lie in the order of the slices."""
    case = enhanced("MR")
    return make(case, finding_of(case, Segment(mask=np.ones((4, 6, 8), dtype=np.bool_), origin=(5, 30, 5))))


def real_nodule() -> Made:
    if not LIDC.is_dir():
        pytest.skip("../shared/data/ct_chest_lidc is absent")
    case, _, nodule = lidc()
    return make(case, nodule)


@pytest.mark.parametrize(
    "made",
    [axial_against_the_normal, oblique_overlapping, frames_in_disorder, pytest.param(real_nodule, marks=pytest.mark.realdata)],
)
def test_another_reader_sees_the_same_voxels_in_the_same_place(made: Callable[[], Made], tmp_path: Path) -> None:
    """dcmqi turns each segment into a volume of its own: count, spacing and position of every voxel equal the finding's."""
    this = made()
    (file,) = written(tmp_path, this.segmentation)
    assert complaints(file, tmp_path) == []
    run("segimage2itkimage", "--inputDICOM", file, "--outputDirectory", tmp_path, "--outputType", "nrrd", "--prefix", "s")
    volume = this.case.volume
    for finding in this.found:
        voxels, header = nrrd.read(str(tmp_path / f"s-{finding.number}.nrrd"))
        assert header["space"] == "left-posterior-superior"
        directions = np.array(header["space directions"])  # a row per axis of the file: column, row, slice
        assert np.linalg.norm(directions, axis=1) == pytest.approx(volume.spacing_mm[::-1], abs=1e-4)
        there = np.argwhere(voxels == finding.number) @ directions + np.array(header["space origin"])
        here = volume.to_lps(np.argwhere(finding.segment.mask) + np.array(finding.segment.origin, dtype=np.float64))
        assert len(there) == finding.segment.voxel_count
        assert ordered(there) == pytest.approx(ordered(here), abs=1e-3)


def written(folder: Path, *results: ResultObject) -> dict[Path, ResultObject]:
    files = {folder / f"{number}.{result.modality}.dcm": result for number, result in enumerate(results)}
    for file, result in files.items():
        file.write_bytes(result.data)
    return files


def ordered(points: np.ndarray) -> np.ndarray:
    """Points in an order that rounding doesn't change."""
    rounded = np.round(points, 2) + 0.0
    return np.asarray(points[np.lexsort(rounded.T)])
