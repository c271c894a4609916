"""Compares what an SR says of an earlier study with the findings: what is the same, by how much it grew, what is new or gone.

Must never import highdicom or the encoders: what proves must not share code with what is proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isclose, log

from pydicom import Dataset

from dicomnode.findings import Comparison, Finding, Findings
from dicomnode.results.decoding import DecodedGroup, expect

CHANGE, DOUBLING = "VOLUME-CHANGE", "DOUBLING-TIME"  # of 99DICOMNODE
_DIFFERENCE = "111049"  # Qualitative Difference
_TRENDS = {"grown": "15454001", "shrunk": "19776001", "unchanged": "129723006"}
_NEW, _ABSENT = "129721008", "272519000"
_NUMBER = 1e-4  # relative: reports carry six significant digits


def compare_growth(group: DecodedGroup, finding: Finding, volume_ml: float, findings: Findings) -> None:
    """Return if the group with a finding's numbers says how it changed, computed here again from the volume that its SEG has.

    Raises:
        ProofFailed: one sentence says what differs.
    """
    name, growth, comparison = f"finding {finding.number}", finding.growth, findings.comparison
    expect(growth is None or comparison is not None, f"{name} is followed up, but nothing was compared")
    if growth is not None:
        same = group.tracking_uid == growth.former.tracking_uid
        expect(same, f"{name} has another Tracking UID than in the study that it was compared with")
    numbers = {n[0]: n for n in group.numbers if n[0] in (CHANGE, DOUBLING)}
    wanted: dict[str, tuple[float, str]] = {}
    if growth is not None and growth.percent is not None:
        ratio = volume_ml / growth.former.volume_ml
        wanted[CHANGE] = (100.0 * (ratio - 1.0), "%")
        if growth.doubling_days is not None and comparison is not None:
            wanted[DOUBLING] = ((comparison.prior.days or 0) * log(2.0) / log(ratio), "d")
    expect(numbers.keys() == wanted.keys(), f"the SR says {sorted(numbers)} of {name}, and should say {sorted(wanted)}")
    for concept, (value, unit) in wanted.items():
        _, said, said_unit, scheme = numbers[concept]
        near = isclose(said, value, rel_tol=_NUMBER, abs_tol=100 * _NUMBER) and (said_unit, scheme) == (unit, "UCUM")
        expect(near, f"the SR says {said} {said_unit} of {concept} for {name}, which is {value:.6g} {unit}")
    trend = _TRENDS.get(growth.trend or "") if growth is not None else _NEW
    compared = comparison is not None and finding.shape != "heat map" and trend is not None
    _expect_difference(group, trend if compared else None, name)
    _expect_time_point(group, comparison, name)


def compare_vanished(groups: Sequence[DecodedGroup], findings: Findings) -> list[DecodedGroup]:
    """Return the groups that are about nothing of the earlier study; the others say, each, what is no longer seen.

    Raises:
        ProofFailed: one sentence says what differs.
    """
    vanished = findings.comparison.vanished if findings.comparison is not None else ()
    by_uid = {former.tracking_uid: former for former in vanished}
    about = [group for group in groups if group.tracking_uid in by_uid]
    uids = sorted(group.tracking_uid for group in about)
    expect(uids == sorted(by_uid), f"the SR says of {len(uids)} things that they are no longer seen, not of {len(by_uid)}")
    for group in about:
        former = by_uid[group.tracking_uid]
        name = f"{former.tracking_id}, which is no longer seen"
        _expect_difference(group, _ABSENT, name)
        _expect_time_point(group, findings.comparison, name)
        expect(not group.numbers, f"the SR measures {name}")
        expect(("121071", former.type.value) in group.codes, f"the SR gives {name} another type")
    return [group for group in groups if group.tracking_uid not in by_uid]


def compare_predecessors(document: Dataset, findings: Findings, comments: Sequence[str]) -> None:
    """Return if the SR names what it was compared with, in words and among its predecessors, or says that it wasn't.

    Raises:
        ProofFailed: one sentence says what differs.
    """
    compared = any(comment.startswith("Compared with the study of ") for comment in comments)
    expect(compared == (findings.comparison is not None), "the SR's words don't say whether it was compared with an earlier study")
    if findings.not_compared:
        expect(any(findings.not_compared in comment for comment in comments), f"the SR doesn't say: {findings.not_compared}")
    reports = findings.comparison.prior.reports if findings.comparison is not None else ()
    named = set(predecessors_of(document)) & {(report.study_instance_uid, report.sop_instance_uid) for report in reports}
    expect(len(named) == min(1, len(reports)), "the SR's predecessors don't name the report of the study that it was compared with")


def predecessors_of(document: Dataset) -> Iterator[tuple[str, str]]:
    """Yield study and instance of each document that the SR names as its predecessor (PS3.3 C.17.2)."""
    for study in document.get("PredecessorDocumentsSequence", []):
        for series in study.ReferencedSeriesSequence:
            for instance in series.ReferencedSOPSequence:
                yield str(study.StudyInstanceUID), str(instance.ReferencedSOPInstanceUID)


def _expect_difference(group: DecodedGroup, wanted: str | None, name: str) -> None:
    said = [value for concept, value in group.codes if concept == _DIFFERENCE]
    expect(said == ([] if wanted is None else [wanted]), f"the SR says {said} as the change of {name}, which is {wanted}")


def _expect_time_point(group: DecodedGroup, comparison: Comparison | None, name: str) -> None:
    days = comparison.prior.days if comparison is not None else None
    words = () if comparison is None or days is None else (f"{days} days after {comparison.prior.date}",)
    expect(group.time_points == words, f"the SR says {group.time_points} as the time of {name}, which is {words}")
