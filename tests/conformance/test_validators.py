"""Independent programs read the result objects, find nothing wrong, and see the findings where they are.

What no validator looks at (a Tracking UID, a UCUM unit, the procedure reported, the algorithm) is checked here too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import MRImageStorage

from dicomnode.findings import Calibration, Finding, ResultObject, Segment
from dicomnode.results.capture import encode_captures, encode_reason
from dicomnode.results.presentation import encode_presentations
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_refusal, encode_report
from dicomnode.results.segmentation import encode_segmentation
from dicomnode.results.selection import encode_selection
from results_cases import LIDC, Case, another_series, box_of, enhanced, finding_of, heat_map_of, lidc, projection, scores, sphere, synthetic
from validators import complaints

pytestmark = pytest.mark.system


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was found in a series, and the objects that say so."""

    case: Case
    found: tuple[Finding, ...]
    segmentation: ResultObject
    report: ResultObject


def make(case: Case, *found: Finding, others: tuple[Case, ...] = (), **more: Any) -> Made:
    findings = case.findings(*found, other_series=tuple(other.volume.series_instance_uid for other in others), **more)
    headers = [header for one in (case, *others) for header in one.headers]
    seg = encode_segmentation(findings, case.volume, headers, case.identity)
    assert seg is not None
    report = encode_report(findings, case.volume, headers, case.identity, seg)
    prove(seg, report, findings, case.volume, [other.volume for other in others])
    return Made(case=case, found=findings.findings, segmentation=seg, report=report)


def axial_pair() -> Made:
    case = synthetic()
    return make(case, sphere(case, (0, -10, 110), 9), sphere(case, (10, -20, 115), 5, side="right"), omitted=2)


def axial_against_the_normal() -> Made:
    case = synthetic(reverse=True)
    return make(case, sphere(case, (0, -10, 90), 9))


def coronal() -> Made:
    case = synthetic("coronal", character_set=["", "ISO 2022 IR 87"], patient_name="Yamada^Tarou=山田^太郎=やまだ^たろう")
    return make(case, finding_of(case, Segment(mask=np.ones((3, 5, 4), dtype=np.bool_), origin=(2, 8, 30))))


def oblique_overlapping() -> Made:
    case = synthetic("oblique", reverse=True)
    first, second = (Segment(mask=np.ones((3, 6, 6), dtype=np.bool_), origin=(k, r, 20)) for k, r in ((4, 10), (6, 13)))
    return make(case, finding_of(case, first), finding_of(case, second, side="right"))


def frames_of_a_set_of_four() -> Made:
    """An enhanced MR image whose frames don't lie in the order of the slices, with three series of one frame of reference beside it."""
    case = enhanced("MR")
    beside = tuple(another_series(synthetic(Modality="MR", SOPClassUID=MRImageStorage), number) for number in (7, 8, 9))
    box = box_of(case, (5, 30, 5), (4, 6, 8), side="right")
    return make(case, sphere(case, (0, -10, 110), 9), box, others=beside, notes=("T1 with contrast is absent.",))


def frames_of_a_ct() -> Made:
    case = enhanced("CT", orientation="oblique", reverse=True)
    return make(case, finding_of(case, Segment(mask=np.ones((3, 6, 6), dtype=np.bool_), origin=(4, 10, 20))))


def radiograph(modality: str, calibration: Calibration) -> Made:
    """What a detection, a classification and a segmentation say of one radiograph."""
    case = projection(modality, calibration=calibration)
    wedge = np.tri(9, 7, 2, dtype=np.bool_)[None]
    outline = finding_of(case, Segment(mask=wedge, origin=(0, 20, 30)))
    box = box_of(case, (0, 22, 33), (1, 10, 12), side="right")
    warm = heat_map_of(case, Segment(mask=wedge, origin=(0, 50, 8)))
    return make(case, outline, box, warm, scores=scores(), omitted=1, notes=("One view only.",))


def dx_at_the_detector() -> Made:
    return radiograph("DX", "detector")


def cr_in_pixels() -> Made:
    return radiograph("CR", "none")


def mg_in_the_patient() -> Made:
    return radiograph("MG", "patient")


def frame_of_an_angiogram() -> Made:
    case = projection("XA", frame=3)
    return make(case, box_of(case, (0, 22, 33), (1, 10, 12)))


def real_nodule() -> Made:
    if not LIDC.is_dir():
        pytest.skip("../shared/data/ct_chest_lidc is absent")
    case, _, nodule = lidc()
    return make(case, nodule)


EVERY = [
    axial_pair,
    axial_against_the_normal,
    coronal,
    oblique_overlapping,
    frames_of_a_set_of_four,
    frames_of_a_ct,
    pytest.param(real_nodule, marks=pytest.mark.realdata),
]

PROJECTIONS = [dx_at_the_detector, cr_in_pixels, mg_in_the_patient, frame_of_an_angiogram]  # dcmqi reads no SEG of these


def written(folder: Path, *results: ResultObject) -> list[Path]:
    files = [folder / f"{result.modality}.dcm" for result in results]
    for file, result in zip(files, results, strict=True):
        file.write_bytes(result.data)
    return files


@pytest.mark.parametrize("made", [*EVERY, *PROJECTIONS])
def test_validators_find_nothing_wrong_with_a_segmentation(made: Callable[[], Made], tmp_path: Path) -> None:
    (file,) = written(tmp_path, made().segmentation)
    assert complaints(file, tmp_path) == []


@pytest.mark.parametrize("made", [axial_pair, coronal, frames_of_a_set_of_four])
def test_validators_find_nothing_wrong_with_a_label_map(made: Callable[[], Made], tmp_path: Path) -> None:
    this = made()
    findings = this.case.findings(*this.found)
    labels = encode_segmentation(findings, this.case.volume, this.case.headers, this.case.identity, kind="seg-labelmap")
    assert labels is not None
    assert labels.sop_class_uid == "1.2.840.10008.5.1.4.1.1.66.7"
    (file,) = written(tmp_path, labels)
    assert complaints(file, tmp_path) == []


# PixelMed takes 5 to 15 s a file: one report for each way to place a finding in each run, the others in the long one.
@pytest.mark.parametrize(
    "made",
    [
        axial_pair,
        frames_of_a_set_of_four,
        dx_at_the_detector,
        *(pytest.param(made, marks=pytest.mark.long) for made in (cr_in_pixels, mg_in_the_patient, frame_of_an_angiogram, frames_of_a_ct)),
        pytest.param(real_nodule, marks=pytest.mark.realdata),
    ],
)
def test_validators_find_nothing_wrong_with_a_report(made: Callable[[], Made], tmp_path: Path) -> None:
    (file,) = written(tmp_path, made().report)
    assert complaints(file, tmp_path) == []


@pytest.mark.parametrize("made", [axial_pair, dx_at_the_detector])
def test_programs_find_nothing_wrong_with_a_comprehensive_report(made: Callable[[], Made], tmp_path: Path) -> None:
    """The content is that of the report above, so the slow checker of templates has seen it."""
    this = made()
    findings = this.case.findings(*this.found)
    report = encode_report(findings, this.case.volume, this.case.headers, this.case.identity, this.segmentation, kind="sr-comprehensive")
    (file,) = written(tmp_path, report)
    assert complaints(file, tmp_path, templates=False) == []


def test_validators_find_nothing_wrong_with_no_finding(tmp_path: Path) -> None:
    case = synthetic()
    (file,) = written(tmp_path, encode_report(case.findings(), case.volume, case.headers, case.identity, None))
    assert complaints(file, tmp_path) == []


@pytest.mark.parametrize(
    "case",
    [synthetic(shape=(2, 20, 20)), projection("DX"), pytest.param(enhanced("MR"), marks=pytest.mark.long)],
    ids=["CT", "DX", "frames"],
)
def test_validators_find_nothing_wrong_with_a_refusal(case: Case, tmp_path: Path) -> None:
    refusal = encode_refusal(
        "too-few-slices", "2 slices — 8 are needed", case.headers, case.identity, manufacturer="dicomnode", algorithm_name="U-Net"
    )
    (file,) = written(tmp_path, refusal)
    assert complaints(file, tmp_path) == []


@pytest.mark.parametrize(
    "case",
    [synthetic(), enhanced("MR"), *(projection(modality, frame=3 if modality == "XA" else None) for modality in ("CR", "DX", "MG", "XA"))],
    ids=["CT", "frames", "CR", "DX", "MG", "XA"],
)
def test_validators_find_nothing_wrong_with_a_picture(case: Case, tmp_path: Path) -> None:
    findings = case.findings(finding_of(case, Segment(mask=np.ones((1, 6, 6), dtype=np.bool_), origin=(0, 10, 20))))
    for found in (findings, case.findings()):
        (file,) = written(tmp_path, *encode_captures(found, case.volume, case.headers, case.identity))
        assert complaints(file, tmp_path) == []


@pytest.mark.parametrize("made", [axial_pair, frames_of_a_set_of_four, dx_at_the_detector])
def test_validators_find_nothing_wrong_with_key_objects(made: Callable[[], Made], tmp_path: Path) -> None:
    this = made()
    selection = encode_selection(this.case.findings(*this.found), this.case.volume, this.case.headers, this.case.identity)
    assert selection is not None
    (file,) = written(tmp_path, selection)
    assert complaints(file, tmp_path) == []


@pytest.mark.parametrize("made", [axial_pair, frames_of_a_set_of_four, dx_at_the_detector, cr_in_pixels, frame_of_an_angiogram])
def test_validators_find_nothing_wrong_with_a_presentation_state(made: Callable[[], Made], tmp_path: Path) -> None:
    this = made()
    (file,) = written(
        tmp_path, *encode_presentations(this.case.findings(*this.found), this.case.volume, this.case.headers, this.case.identity)
    )
    assert complaints(file, tmp_path) == []


def test_validators_find_nothing_wrong_with_a_reason_in_a_picture(tmp_path: Path) -> None:
    case = synthetic(shape=(2, 20, 20))
    reason = encode_reason("too-few-slices", "2 slices", case.headers, case.identity, manufacturer="dicomnode", algorithm_name="U-Net")
    (file,) = written(tmp_path, *reason)
    assert complaints(file, tmp_path) == []


def test_the_validators_do_see_mistakes(tmp_path: Path) -> None:
    """If they kept quiet about these, their silence above would mean nothing."""
    made = axial_pair()
    seg, report = (pydicom.dcmread(BytesIO(result.data)) for result in (made.segmentation, made.report))
    del seg.SegmentSequence
    procedure = next(i for i in report.ContentSequence if concept(i) == "121058")
    procedure.ConceptCodeSequence[0].CodeValue = "1-1"
    del report.VerificationFlag
    seg.save_as(tmp_path / "SEG.dcm")
    report.save_as(tmp_path / "SR.dcm")
    said = complaints(tmp_path / "SEG.dcm", tmp_path) + complaints(tmp_path / "SR.dcm", tmp_path)
    for validator in ("dciodvfy", "PixelMed"):
        assert any(line.startswith(validator) for line in said), said


@pytest.mark.parametrize("made", EVERY)
def test_another_reader_sees_the_same_voxels_in_the_same_place(made: Callable[[], Made], tmp_path: Path) -> None:
    """dcmqi turns each segment into a volume of its own: count, spacing and position of every voxel equal the finding's."""
    this = made()
    (file,) = written(tmp_path, this.segmentation)
    read(file, "segimage2itkimage", "--outputDirectory", tmp_path, "--outputType", "nrrd", "--prefix", "s")
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


def test_another_reader_sees_the_same_numbers(tmp_path: Path) -> None:
    made = axial_pair()
    (file,) = written(tmp_path, made.report)
    read(file, "tid1500reader", "--outputMetadata", tmp_path / "report.json")
    groups = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["Measurements"]
    for finding in made.found:
        (group,) = (g for g in groups if g.get("ReferencedSegment") == finding.number)
        values = {m["quantity"]["CodeValue"]: (float(m["value"]), m["units"]["CodeValue"]) for m in group["measurementItems"]}
        assert values["118565006"] == (pytest.approx(finding.volume_ml, rel=1e-4), "ml")
        assert values["103339001"] == (pytest.approx(finding.long_axis.length_mm, rel=1e-4), "mm")
        assert group["Laterality"]["CodeMeaning"].lower() == finding.side
        assert group["segmentationSOPInstanceUID"] == made.segmentation.sop_instance_uid


def test_what_no_validator_looks_at_is_there() -> None:
    """A missing Tracking UID, a wrong unit, a missing procedure or algorithm pass every one of the programs above."""
    report = pydicom.dcmread(BytesIO(axial_pair().report.data))
    groups = [i for i in items(report) if concept(i) == "125007"]
    assert len(groups) == 5
    templates = {str(group.ContentTemplateSequence[0].TemplateIdentifier) for group in groups}
    assert templates == {"1411", "1410", "1501"}
    for group in groups:
        assert {"112039", "112040", "111001", "111003"} <= {concept(i) for i in group.ContentSequence}
    assert [concept(i) for i in report.ContentSequence].count("121058") == 1
    units = {"118565006": "ml", "103339001": "mm", "111012": "%"}
    numbers = [i for group in groups for i in group.ContentSequence if i.ValueType == "NUM"]
    assert {concept(i) for i in numbers} == set(units)
    for item in numbers:
        unit = item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0]
        assert (unit.CodeValue, unit.CodingSchemeDesignator) == (units[concept(item)], "UCUM")


def read(file: Path, reader: str, *arguments: str | Path) -> None:
    """Run one of dcmqi's readers, which come with the test extra."""
    command = [str(Path(sys.executable).parent / reader), "--inputDICOM", str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def ordered(points: np.ndarray) -> np.ndarray:
    """Points in an order that rounding doesn't change."""
    rounded = np.round(points, 2) + 0.0
    return np.asarray(points[np.lexsort(rounded.T)])


def items(below: Dataset) -> list[Dataset]:
    here = list(below.get("ContentSequence", []))
    return here + [j for i in here for j in items(i)]


def concept(item: Dataset) -> str:
    names = item.get("ConceptNameCodeSequence", [])
    return str(names[0].get("CodeValue", "")) if names else ""
