"""Two studies of one patient: what is the same, by how much it grew, what is new or gone, and that SEG and SR say exactly that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from scipy.spatial.transform import Rotation

from dicomnode.analysis.alignment import align
from dicomnode.analysis.growth import compare
from dicomnode.errors import ProofFailed
from dicomnode.findings import Code, Findings, Prior, PriorFinding, ResultObject, Volume
from dicomnode.phantoms.chest import chest_scene, render
from dicomnode.phantoms.studies import chest_grid
from dicomnode.results.capture import encode_captures
from dicomnode.results.decoding import concept_of, items_below
from dicomnode.results.former import read_former
from dicomnode.results.identity import tracking_uid
from dicomnode.results.proof import prove
from dicomnode.results.report import CLASSES, encode_report
from dicomnode.results.segmentation import encode_segmentation
from dicomnode.results.selection import encode_selection
from results_cases import box_of, former_of, prior_with, sphere, synthetic, written_again

CASE = synthetic(shape=(20, 60, 70))
BALL, OTHER = sphere(CASE, (-5, -10, 120), 9), sphere(CASE, (15, 5, 135), 6, side="right")


def compared(*former: PriorFinding, findings: Findings | None = None, **changes: Any) -> Findings:
    """The ball, compared."""
    return compare(findings or CASE.findings(BALL), CASE.volume, prior_with(*former, **changes))


def gone(findings: Findings) -> list[str]:
    assert findings.comparison is not None
    return [former.tracking_uid for former in findings.comparison.vanished]


@pytest.mark.parametrize(
    ("grown", "days", "trend", "doubling"),
    [(2.0, 50, "grown", 50.0), (8.0, 300, "grown", 100.0), (1.24, 50, "unchanged", None), (0.76, 50, "unchanged", None),
     (0.5, 50, "shrunk", None), (2.0, 0, "grown", None), (2.0, None, "grown", None), (2.0, -3, "grown", None)],
)  # fmt: skip
def test_growth_is_the_change_of_volume_and_the_days_in_which_it_doubles(
    grown: float, days: int | None, trend: str, doubling: float | None
) -> None:
    growth = compared(former_of(CASE, BALL, grown=grown), days=days).findings[0].growth
    assert growth is not None
    assert growth.percent == pytest.approx(100 * (grown - 1))
    assert growth.trend == trend
    assert growth.doubling_days == (None if doubling is None else pytest.approx(doubling))


def test_an_organ_that_is_larger_than_before_has_no_doubling_time() -> None:
    organ = replace(BALL, category=Code(value="91723000", scheme="SCT", meaning="Anatomical Structure"))
    growth = compared(former_of(CASE, organ, grown=2.0), findings=CASE.findings(organ)).findings[0].growth
    assert growth is not None
    assert (growth.trend, growth.doubling_days) == ("grown", None)


def test_a_box_is_followed_and_measures_nothing() -> None:
    box = box_of(CASE, (3, 12, 20), (4, 5, 6))
    (finding,) = compared(former_of(CASE, box, grown=2.0), findings=CASE.findings(box)).findings
    assert finding.growth is not None
    assert (finding.growth.percent, finding.growth.trend, finding.growth.doubling_days) == (None, None, None)


X, Y, Z = BALL.centre_lps_mm or (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"centre_lps_mm": (X + 14, Y, Z)}, True),  # 4.5 mm of radius, 10 mm of breathing
        ({"centre_lps_mm": (X + 15, Y, Z)}, False),
        ({"side": None}, True),
        ({"side": "right"}, False),
        ({"shape": "box"}, False),
        ({"label": "Lung mass"}, False),
        ({"type": Code(value="4147007", scheme="SCT", meaning="Mass")}, False),
    ],
)
def test_the_same_is_of_one_kind_and_near(changes: dict[str, Any], same: bool) -> None:
    findings = compared(former_of(CASE, BALL, **changes))
    assert (findings.findings[0].growth is not None, gone(findings) == []) == (same, same)


def test_of_two_that_could_be_it_the_nearer_is_and_each_is_one_thing_only() -> None:
    near, far = (former_of(CASE, BALL, tracking_uid=f"2.25.{n}", centre_lps_mm=(X + n, Y, Z)) for n in (2, 9))
    findings = compared(far, near)
    assert findings.findings[0].growth is not None
    assert (findings.findings[0].growth.former, gone(findings)) == (near, ["2.25.9"])
    twice = compared(near, findings=CASE.findings(BALL, replace(BALL, centre_lps_mm=(X + 3, Y, Z))))
    assert [finding.growth is None for finding in twice.findings] == [True, False]


def test_places_of_the_prior_study_are_brought_into_this_one() -> None:
    turned = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    place = tuple(np.linalg.inv(turned) @ (np.array([X, Y, Z]) - (100, 200, 300)))
    rows = tuple((float(a), float(b), float(c), float(d)) for (a, b, c), d in zip(turned, (100, 200, 300), strict=True))
    assert compared(former_of(CASE, BALL, centre_lps_mm=place)).findings[0].growth is None
    assert compared(former_of(CASE, BALL, centre_lps_mm=place), to_current=rows).findings[0].growth is not None


def test_what_a_segmentation_says_is_what_the_next_study_compares_with() -> None:
    findings = CASE.findings(BALL, OTHER, box_of(CASE, (3, 12, 20), (4, 5, 6), side=None))
    seg = encode_segmentation(findings, CASE.volume, CASE.headers, CASE.identity)
    assert seg is not None
    for finding, former in zip(findings.findings, read_former(seg.data), strict=True):
        said = former_of(CASE, finding, tracking_uid=tracking_uid(CASE.identity, finding.number), tracking_id=former.tracking_id)
        assert former.centre_lps_mm == pytest.approx(said.centre_lps_mm, abs=1e-3)
        assert former.volume_ml == pytest.approx(said.volume_ml, rel=1e-6)
        assert replace(former, centre_lps_mm=said.centre_lps_mm, volume_ml=said.volume_ml) == said
    with pytest.raises(ProofFailed):
        read_former(encode_report(findings, CASE.volume, CASE.headers, CASE.identity, seg).data)


def everything(findings: Findings) -> list[bytes]:
    """All kinds of objects of these findings."""
    volume, headers, identity = CASE.volume, CASE.headers, CASE.identity
    made: list[ResultObject | None] = [
        *encode_captures(findings, volume, headers, identity),
        encode_selection(findings, volume, headers, identity),
    ]
    for kind in ("seg", "seg-labelmap"):
        seg = encode_segmentation(findings, volume, headers, identity, kind=kind)
        made += [seg, *(encode_report(findings, volume, headers, identity, seg, kind=report) for report in CLASSES)]
    return [each.data for each in made if each is not None]


@pytest.mark.parametrize("prior", [None, prior_with(former_of(CASE, BALL, grown=2.0), former_of(CASE, OTHER, tracking_uid="2.25.71"))])
def test_the_same_findings_give_the_same_bytes_of_every_kind(prior: Prior | None) -> None:
    def again() -> list[bytes]:
        findings = synthetic(shape=(20, 60, 70)).findings(BALL)
        return everything(findings if prior is None else compare(findings, CASE.volume, prior))

    first = again()
    assert len(first) == 8
    assert again() == first


def objects() -> tuple[Findings, ResultObject, ResultObject]:
    """A ball that has doubled in 100 days, one that is new, and one that is gone."""
    vanished = former_of(CASE, BALL, tracking_uid="2.25.71", tracking_id="lung-nodule-ct 0.0.9 #2", centre_lps_mm=(X, Y, Z + 40))
    findings = compared(former_of(CASE, BALL, grown=2.0), vanished, findings=CASE.findings(BALL, OTHER))
    seg = encode_segmentation(findings, CASE.volume, CASE.headers, CASE.identity)
    assert seg is not None
    return findings, seg, encode_report(findings, CASE.volume, CASE.headers, CASE.identity, seg)


def test_segmentation_and_report_keep_the_tracking_uid_and_say_the_change() -> None:
    findings, seg, report = objects()
    prove(seg, report, findings, CASE.volume)
    uids = [str(item.TrackingUID) for item in pydicom.dcmread(BytesIO(seg.data)).SegmentSequence]
    assert uids == ["2.25.70", tracking_uid(CASE.identity, 2)]
    document = pydicom.dcmread(BytesIO(report.data))
    numbers = {concept_of(item): item.MeasuredValueSequence[0] for item in items_below(document) if item.ValueType == "NUM"}
    assert float(numbers["VOLUME-CHANGE"].NumericValue) == pytest.approx(100)
    assert float(numbers["DOUBLING-TIME"].NumericValue) == pytest.approx(100)
    assert [str(i.TextValue) for i in items_below(document) if concept_of(i) == "C2348792"] == 3 * ["100 days after 20251123"]
    (study,) = document.PredecessorDocumentsSequence
    (series,) = study.ReferencedSeriesSequence
    (former,) = series.ReferencedSOPSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID, former.ReferencedSOPInstanceUID) == ("2.25.80", "2.25.82.34", "2.25.81.34")


def item(document: Dataset, concept: str) -> Dataset:
    return next(i for i in items_below(document) if concept_of(i) == concept)


def number(concept: str, value: str) -> Callable[[Dataset], None]:
    def change(document: Dataset) -> None:
        item(document, concept).MeasuredValueSequence[0].NumericValue = value

    return change


def unit(document: Dataset) -> None:
    item(document, "DOUBLING-TIME").MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue = "a"


def another_time(document: Dataset) -> None:
    item(document, "C2348792").TextValue = "99 days after 20251123"


def trend(code: str, other: str) -> Callable[[Dataset], None]:
    def change(document: Dataset) -> None:
        for each in items_below(document):
            if concept_of(each) == "111049" and each.ConceptCodeSequence[0].CodeValue == code:
                each.ConceptCodeSequence[0].CodeValue = other

    return change


def without_the_vanished(document: Dataset) -> None:
    for container in items_below(document):
        content = container.get("ContentSequence", [])
        for each in list(content):
            if concept_of(each) == "125007" and any(str(i.get("UID")) == "2.25.71" for i in items_below(each)):
                content.remove(each)


def without_words(document: Dataset) -> None:
    for each in items_below(document):
        if each.ValueType == "TEXT" and str(each.TextValue).startswith("Compared with"):
            each.TextValue = "Some words."


def without_predecessor(document: Dataset) -> None:
    del document.PredecessorDocumentsSequence


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (number("VOLUME-CHANGE", "101"), "101.0 %"),
        (number("DOUBLING-TIME", "99"), "99.0 d"),
        (unit, "100.0 a"),
        (another_time, "as the time of finding 1"),
        (trend("15454001", "19776001"), "as the change of finding 1"),
        (trend("129721008", "129723006"), "as the change of finding 2"),
        (trend("272519000", "129723006"), "no longer seen"),
        (without_the_vanished, "no longer seen"),
        (without_words, "earlier study"),
        (without_predecessor, "predecessors"),
    ],
)
def test_a_report_that_says_another_change_may_not_leave(change: Callable[[Dataset], None], says: str) -> None:
    findings, seg, report = objects()
    document = pydicom.dcmread(BytesIO(report.data))
    change(document)
    with pytest.raises(ProofFailed, match=says):
        prove(seg, replace(report, parts=(written_again(document),)), findings, CASE.volume)


def test_a_report_that_was_not_compared_says_why() -> None:
    findings = replace(CASE.findings(BALL), not_compared="there is none")
    seg = encode_segmentation(findings, CASE.volume, CASE.headers, CASE.identity)
    report = encode_report(findings, CASE.volume, CASE.headers, CASE.identity, seg)
    prove(seg, report, findings, CASE.volume)
    with pytest.raises(ProofFailed, match="there is another"):
        prove(seg, report, replace(findings, not_compared="there is another"), CASE.volume)


def chest(seed: int) -> Volume:
    scene = chest_scene(seed)
    grid = chest_grid(scene, pixel_mm=4.0, slice_mm=5.0, pixels=96)
    voxels = render(scene, grid).hu
    return replace(synthetic().volume, voxels=voxels, affine=grid.affine)


def test_a_patient_who_lies_otherwise_is_found_again_and_another_patient_is_not() -> None:
    volume = chest(102)
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("xyz", [4, -3, 6], degrees=True).as_matrix()
    moved[:3, 3] = 15, -22, 40
    noise = np.random.default_rng(1).normal(0, 30, volume.voxels.shape)
    there = replace(volume, affine=moved @ volume.affine, voxels=(volume.voxels + noise).astype(np.float32)[:-8])
    found = align(volume, there)
    assert found is not None
    places = volume.to_lps(np.array([[10.0, 30, 30], [40, 70, 60], [25, 48, 20]]))
    off = places @ (found.matrix - moved)[:3, :3].T + (found.matrix - moved)[:3, 3]
    assert float(np.linalg.norm(off, axis=1).max()) < 2.0  # mm
    assert align(chest(143), volume) is None


def test_doubling_is_what_the_word_says() -> None:
    growth = compared(former_of(CASE, BALL, grown=3.0), days=90).findings[0].growth
    assert growth is not None
    assert growth.doubling_days is not None
    assert pytest.approx(2 ** (90 / growth.doubling_days)) == 3.0
    assert math.isfinite(growth.doubling_days)
