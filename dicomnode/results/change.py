"""What a report and a picture say of a comparison with an earlier study: numbers, coded trends, and words.

Must never decide what is the same, or what has grown: the findings say it.
"""

from __future__ import annotations

from typing import Any

from highdicom import sr

from dicomnode.findings import Code, Comparison, Finding, Findings, Measurement, PriorFinding
from dicomnode.results import codes
from dicomnode.results.segmentation import coded

_TRENDS = {"grown": codes.INCREASED, "shrunk": codes.DECREASED, "unchanged": codes.UNCHANGED}


def numbers(finding: Finding) -> list[Measurement]:
    """Return the finding's volume change, and its doubling time, where it has them."""
    growth = finding.growth
    made = []
    if growth is not None and growth.percent is not None:
        made.append(Measurement(name=codes.VOLUME_CHANGE, value=growth.percent, unit=codes.PERCENT))
    if growth is not None and growth.doubling_days is not None:
        made.append(Measurement(name=codes.DOUBLING_TIME, value=growth.doubling_days, unit=codes.DAY))
    return made


def trend(finding: Finding, findings: Findings) -> Code | None:
    """Return how the finding has changed, or that it is new; None where nothing was compared."""
    if findings.comparison is None or finding.shape == "heat map":
        return None
    if finding.growth is None:
        return codes.NEW
    return _TRENDS.get(finding.growth.trend or "")


def evaluations(code: Code | None) -> list[sr.QualitativeEvaluation] | None:
    """Return the trend as a group of a report holds it."""
    return [sr.QualitativeEvaluation(coded(codes.QUALITATIVE_DIFFERENCE), coded(code))] if code else None


def time_point(comparison: Comparison | None) -> sr.TimePointContext | None:
    """TID 1502, in words: its numbers would pass for measurements of the group."""
    if comparison is None or comparison.prior.days is None:
        return None
    return sr.TimePointContext(time_point=f"{comparison.prior.days} days after {comparison.prior.date}")


def vanished(findings: Findings) -> list[dict[str, Any]]:
    """Return what a group says of each thing of the earlier study that is no longer seen, under its Tracking UID of then."""
    if findings.comparison is None:
        return []
    return [
        {
            "tracking_identifier": sr.TrackingIdentifier(uid=former.tracking_uid, identifier=former.tracking_id),
            "time_point_context": time_point(findings.comparison),
            "finding_category": coded(former.category),
            "finding_type": coded(former.type),
            "finding_sites": [sr.FindingSite(coded(former.site), laterality=_side(former))] if former.site else None,
            "qualitative_evaluations": evaluations(codes.ABSENT),
        }
        for former in findings.comparison.vanished
    ]


def words(findings: Findings) -> list[str]:
    """Return what the reader is told of the comparison, or why there is none."""
    if findings.comparison is None:
        return [f"Not compared with an earlier study: {findings.not_compared}."] if findings.not_compared else []
    prior = findings.comparison.prior
    since = "" if prior.days is None else f", {prior.days} day{'' if prior.days == 1 else 's'} before"
    compared = f"Compared with the study of {_day(prior.date)}{since}, analysed by {findings.package} {prior.version}"
    said = [f"{compared}: {prior.alignment}, findings were matched by their nearest centres."]
    if prior.version != findings.version:
        said.append(f"That was another version of {findings.package} than {findings.version}: it may measure otherwise.")
    said += [_line(finding) for finding in findings.findings if finding.shape != "heat map"]
    said += [f"No longer seen: {former.tracking_id}, {_named(former)}." for former in findings.comparison.vanished]
    return said


def _line(finding: Finding) -> str:
    growth = finding.growth
    if growth is None:
        return f"{finding.label} {finding.number}: new."
    told = f"{finding.label} {finding.number}: seen before as {growth.former.tracking_id}"
    if growth.percent is None:
        return f"{told}."
    told += f", {growth.former.volume_ml:.3g} ml then, volume change {growth.percent:+.1f} %"
    if growth.trend == "unchanged":
        return f"{told}, which is within what two measurements may differ by."
    return told + (f", doubling time {growth.doubling_days:.0f} days." if growth.doubling_days is not None else ".")


def _named(former: PriorFinding) -> str:
    side = f", {former.side}" if former.side else ""
    return f"{former.label}{side}" + (f", {former.volume_ml:.3g} ml then" if former.shape == "outline" else "")


def _side(former: PriorFinding) -> sr.CodedConcept | None:
    return coded(codes.LATERALITY[former.side]) if former.side else None


def _day(date: str) -> str:
    return f"{date[:4]}-{date[4:6]}-{date[6:]}" if len(date) == 8 and date.isdigit() else date
