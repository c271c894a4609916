"""From compared cases to the figures of an evaluation, as plain data for evaluation.json.

Patients are drawn, not cases: those of one patient are no independent evidence.

Refused and failed cases are counted and listed, and are in no other figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dicomnode.analysis.manifest import Manifest, OutputSection
from dicomnode.training.cases import finds_lesions
from dicomnode.training.evaluation import measures
from dicomnode.training.evaluation.matching import Called, Labelled, Outline, Pair, Result, row_of, segment_dice

SIZE_BINS_MM = ((5.0, 7.0), (7.0, 10.0), (10.0, 15.0), (15.0, 25.0), (25.0, 60.0), (60.0, float("inf")))
THICKNESS_BANDS_MM = (1.5, 3.0, 5.0)  # slices up to the first, between, and above the last
CURVE_POINTS = 200  # of a FROC or ROC curve that are kept


def summary(results: Sequence[Result], manifest: Manifest) -> dict[str, Any]:
    """All figures of one set of cases."""
    compared = [result for result in results if result.labels]
    mine = [result for result in results if result.of_its_kind]
    refused = [result for result in results if result.refused]
    return {
        "scans": len(results),
        "analysed": sum(result.refused is None and result.failed is None for result in results),
        "patients": len({result.patient for result in results}),
        "refused": [{"case": r.case, "code": r.refused, "of_its_kind": r.of_its_kind} for r in refused],
        "failed": [{"case": r.case, "reason": r.failed} for r in results if r.failed],
        "of_its_kind": len(mine), "wrongly_refused": sum(result.refused is not None for result in mine),
        "others": len(results) - len(mine),
        "wrongly_accepted": sum(not r.of_its_kind and r.refused is None and r.failed is None for r in results),
        "cpu_seconds_per_case": float(np.median([result.cpu_seconds for result in results])) if results else None,
        **_by_label(compared, manifest),
        "subgroups": list(_subgroups(compared, manifest)),
        "cases": [_case_row(result) for result in results],
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Data as JSON has it: lists, four decimals, and no number that isn't finite."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 4) if np.isfinite(value) else None
    return value


def _by_label(results: Sequence[Result], manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"segmentation": [], "lesions": [], "scores": []}
    for output in manifest.outputs:
        mine = [(result, result.labels[output.label]) for result in results if output.label in result.labels]
        outlines = [(result, each.outline) for result, each in mine if each.outline is not None]
        if outlines:
            found["segmentation"].append({"label": output.label, **segmentation(outlines)})
        if finds_lesions(output) and output.finding and mine:
            found["lesions"].append({"label": output.label, **lesions(mine, output)})
        called = [each.called for _, each in mine if each.called is not None]
        if called:
            found["scores"].append({"label": output.label, **scores(called)})
    return found


def segmentation(outlines: Sequence[tuple[Result, Outline]]) -> dict[str, Any]:
    """Agreement of a label's outline with its reference, over cases where the reference isn't empty."""
    there = [(result, each) for result, each in outlines if each.reference > 0]
    empty = [each for _, each in outlines if each.reference == 0]
    both = [each for _, each in there if each.marked > 0]
    errors = [each.marked - each.reference for _, each in there]
    unit = outlines[0][1].unit
    return {
        "cases": len(there), "nothing_marked": len(there) - len(both),
        "empty_references": len(empty), "marked_though_empty": sum(each.marked > 0 for each in empty),
        "dice": _spread(there, lambda each: each.dice),
        "hd95_mm": _spread(there, lambda each: each.hd95_mm),
        "average_surface_distance_mm": _spread(there, lambda each: each.average_surface_distance_mm),
        "unit": unit,
        "size_error": _spread(there, lambda each: each.marked - each.reference),
        "size_error_percent": _spread(there, lambda each: 100 * (each.marked / each.reference - 1)),
        "absolute_size_error_percent": _spread(there, lambda each: abs(100 * (each.marked / each.reference - 1))),
        "limits_of_agreement": _limits(errors),
    }  # fmt: skip


def lesions(cases: Sequence[tuple[Result, Labelled]], output: OutputSection) -> dict[str, Any]:
    """Sensitivity, false findings, FROC and sizes of one label; FROC and false findings over cases whose lesions are all known."""
    pairs = [pair for _, each in cases for pair in each.reported.pairs]
    found = sum(pair.finding is not None for pair in pairs)
    whole = [(result, each) for result, each in cases if result.complete]
    clear = [each for _, each in whole if not each.all.pairs and not each.all.small]
    return {
        "scans": len(cases), "complete_scans": len(whole), "clear_scans": len(clear), "minimum_score": output.minimum_score,
        "lesions": len(pairs), "found": found, "sensitivity": found / len(pairs) if pairs else None,
        "sensitivity_interval": measures.wilson(found, len(pairs)),
        "sensitivity_interval_by_patient": measures.bootstrap(_units(cases), _sensitivity),
        "not_asked_for": sum(each.all.small for _, each in cases),
        "false_findings": sum(len(each.reported.false) for _, each in whole),
        "false_findings_per_scan": _false_per_scan([each for _, each in whole]),
        "false_findings_per_scan_interval": measures.bootstrap(_units(whole), lambda units: _false_per_scan(_flat(units))),
        "false_findings_per_clear_scan": _false_per_scan(clear),
        "by_size": [_size_row(low, high, pairs) for low, high in SIZE_BINS_MM],
        "froc": _froc(whole),
        "by_minimum_score": [_score_row(round(float(level), 2), whole) for level in np.arange(0.5, 0.96, 0.05)] if whole else [],
        "found_outlines": _found_outlines(cases),
        "calibration": measures.calibration(*_finding_truths([each for _, each in whole])),
    }  # fmt: skip


def scores(called: Sequence[Called]) -> dict[str, Any]:
    """What is said of whole studies about one label: ROC, the operating point and calibration."""
    positive, negative = ([each.score for each in called if each.positive is yes] for yes in (True, False))
    told = [sum(each.reported for each in called if each.positive is yes) for yes in (True, False)]
    area = measures.auc(positive, negative)
    specific = len(negative) - told[1]
    return {
        "positive": len(positive), "negative": len(negative), "threshold": called[0].threshold,
        "auc": area and area[0], "auc_interval": area and area[1], "auc_method": area and area[2],
        "sensitivity": told[0] / len(positive) if positive else None, "sensitivity_interval": measures.wilson(told[0], len(positive)),
        "specificity": specific / len(negative) if negative else None, "specificity_interval": measures.wilson(specific, len(negative)),
        "roc": _thinned(measures.roc_curve(positive, negative)) if area else [],
        "calibration": measures.calibration([each.score for each in called], [each.positive for each in called]),
    }  # fmt: skip


def _spread(cases: Sequence[tuple[Result, Outline]], value: Callable[[Outline], float | None]) -> dict[str, Any] | None:
    rows = [(value(each), result.patient) for result, each in cases]
    defined = [(number, patient) for number, patient in rows if number is not None]
    return measures.spread([number for number, _ in defined], [patient for _, patient in defined])


def _limits(errors: Sequence[float]) -> dict[str, float] | None:
    """Bland and Altman's bias and limits, mean and 1.96 standard deviations."""
    if len(errors) < 2:
        return None
    bias, half = float(np.mean(errors)), 1.96 * float(np.std(errors, ddof=1))
    return {"bias": bias, "low": bias - half, "high": bias + half}


def _units(cases: Sequence[tuple[Result, Labelled]]) -> list[list[Labelled]]:
    """The cases of each patient."""
    units: dict[str, list[Labelled]] = {}
    for result, each in cases:
        units.setdefault(result.patient, []).append(each)
    return list(units.values())


def _flat(units: Iterable[Iterable[Labelled]]) -> list[Labelled]:
    return [each for unit in units for each in unit]


def _sensitivity(units: Sequence[Sequence[Labelled]]) -> float | None:
    hits = [pair.finding is not None for each in _flat(units) for pair in each.reported.pairs]
    return sum(hits) / len(hits) if hits else None


def _false_per_scan(cases: Sequence[Labelled]) -> float | None:
    return sum(len(each.reported.false) for each in cases) / len(cases) if cases else None


def _size_row(low: float, high: float, pairs: Sequence[Pair]) -> dict[str, Any]:
    inside = [pair for pair in pairs if low <= pair.known.diameter_mm < high]
    found = sum(pair.finding is not None for pair in inside)
    upper = high if np.isfinite(high) else None
    return {"diameter_mm": [low, upper], "lesions": len(inside), "found": found, "interval": measures.wilson(found, len(inside))}


def _scored(cases: Sequence[Labelled]) -> tuple[list[float | None], list[float], int]:
    """The scores of lesions and of false findings, of any score, and of how many scans."""
    known = [pair.finding.probability if pair.finding else None for each in cases for pair in each.all.pairs]
    return known, [finding.probability for each in cases for finding in each.all.false], len(cases)


def _froc(cases: Sequence[tuple[Result, Labelled]]) -> dict[str, Any] | None:
    reached = measures.sensitivities(*_scored([each for _, each in cases]))
    if reached is None:
        return None
    # numbers alone are drawn again and again
    units = [_scored(unit) for unit in _units(cases)]

    def drawn(parts: Sequence[tuple[list[float | None], list[float], int]]) -> float | None:
        known = [score for part in parts for score in part[0]]
        again = measures.sensitivities(known, [score for part in parts for score in part[1]], sum(part[2] for part in parts))
        return None if again is None else float(np.mean(again))

    return {
        "false_findings_per_scan": list(measures.FROC_RATES), "sensitivity": reached,
        "mean_sensitivity": float(np.mean(reached)), "mean_sensitivity_interval": measures.bootstrap(units, drawn),
        "curve": _thinned(measures.froc_curve(*_scored([each for _, each in cases]))),
    }  # fmt: skip


def _score_row(level: float, cases: Sequence[tuple[Result, Labelled]]) -> dict[str, Any]:
    known, false, scans = _scored([each for _, each in cases])
    found = sum(score is not None and score >= level for score in known)
    return {"minimum_score": level, "found": found, "false_findings_per_scan": sum(score >= level for score in false) / scans}


def _finding_truths(cases: Sequence[Labelled]) -> tuple[list[float], list[bool]]:
    """The scores of findings of any score, and whether each meets a lesion (that of several is the most certain one)."""
    met = [pair.finding.probability for each in cases for pair in each.all.pairs if pair.finding is not None]
    false = [finding.probability for each in cases for finding in each.all.false]
    return [*met, *false], [*(True for _ in met), *(False for _ in false)]


def _found_outlines(cases: Sequence[tuple[Result, Labelled]]) -> dict[str, Any]:
    """Of lesions that were found and whose voxels are known: Dice and the error of the size of the one finding."""
    dices, errors, patients = [], [], []
    for result, each in cases:
        for pair in each.reported.pairs:
            value = segment_dice(pair.finding, pair.known) if pair.finding is not None else None
            if value is not None and pair.finding is not None and pair.known.truth is not None:
                dices.append(value)
                errors.append(100 * (pair.finding.segment.voxel_count / pair.known.truth.voxel_count - 1))
                patients.append(result.patient)
    return {
        "dice": measures.spread(dices, patients), "size_error_percent": measures.spread(errors, patients),
        "absolute_size_error_percent": measures.spread([abs(error) for error in errors], patients),
    }  # fmt: skip


def _thinned(curve: Sequence[Any]) -> list[Any]:
    if len(curve) <= CURVE_POINTS:
        return list(curve)
    return [curve[int(i)] for i in np.linspace(0, len(curve) - 1, CURVE_POINTS)]


def _subgroups(results: Sequence[Result], manifest: Manifest) -> Iterable[dict[str, Any]]:
    """The main figures for each value of each attribute, and how many scans and patients they stand on."""
    for name in sorted({name for result in results for name in result.attributes}):
        values: dict[str, list[Result]] = {}
        for result in results:
            values.setdefault(_band(name, result.attributes.get(name, "not known")), []).append(result)
        for value, inside in sorted(values.items()):
            row: dict[str, Any] = {"attribute": name, "value": value, "scans": len(inside), "labels": []}
            row["patients"] = len({result.patient for result in inside})
            for output in manifest.outputs:
                mine = [result.labels[output.label] for result in inside if output.label in result.labels]
                if mine:
                    row["labels"].append({"label": output.label, **_subgroup_figures(mine, [r for r in inside if r.complete], output)})
            yield row


def _subgroup_figures(mine: Sequence[Labelled], whole: Sequence[Result], output: OutputSection) -> dict[str, Any]:
    dices = [each.outline.dice for each in mine if each.outline is not None and each.outline.dice is not None]
    row: dict[str, Any] = {"outlines": len(dices), "median_dice": float(np.median(dices)) if dices else None}
    if finds_lesions(output):
        pairs = [pair for each in mine for pair in each.reported.pairs]
        found = sum(pair.finding is not None for pair in pairs)
        complete = [result.labels[output.label] for result in whole if output.label in result.labels]
        row |= {"lesions": len(pairs), "found": found, "interval": measures.wilson(found, len(pairs))}
        row["false_findings_per_scan"] = _false_per_scan(complete)
    called = [each.called for each in mine if each.called is not None]
    area = measures.auc([c.score for c in called if c.positive], [c.score for c in called if not c.positive])
    return row | {"auc": area and area[0], "auc_interval": area and area[1]}


def _band(name: str, value: str) -> str:
    """A slice thickness as a band; every other value as it is."""
    if name != "slice_thickness_mm":
        return value
    try:
        thickness = float(value)
    except ValueError:
        return value
    edges = (0.0, *THICKNESS_BANDS_MM)
    for low, high in zip(edges, THICKNESS_BANDS_MM, strict=False):
        if thickness <= high:
            return f"{low:g} to {high:g} mm"
    return f"above {THICKNESS_BANDS_MM[-1]:g} mm"


def _case_row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"case": result.case, "attributes": dict(result.attributes)}
    if result.refused or result.failed:
        return row | ({"refused": result.refused} if result.refused else {"failed": result.failed})
    row |= {"slices": result.slices, "spacing_mm": list(result.spacing_mm), "cpu_seconds": result.cpu_seconds, "labels": {}}
    for label, each in result.labels.items():
        row["labels"][label] = {
            "outline": vars(each.outline) if each.outline else None, "called": vars(each.called) if each.called else None,
            "known": [_pair_row(pair) for pair in each.reported.pairs], "not_asked_for": each.all.small,
            "other_findings": [row_of(finding) for finding in each.reported.false],
        }  # fmt: skip
    if not result.labels:
        row["findings"] = [row_of(finding) for finding in result.findings]
    return row


def _pair_row(pair: Pair) -> dict[str, Any]:
    known, finding = pair.known, pair.finding
    row: dict[str, Any] = {"diameter_mm": known.diameter_mm, "centre_lps_mm": known.centre_lps_mm, "found": None}
    if finding is not None:
        distance = None
        if finding.centre_lps_mm is not None and known.centre_lps_mm is not None:
            distance = float(np.linalg.norm(np.subtract(finding.centre_lps_mm, known.centre_lps_mm)))
        row["found"] = {**row_of(finding), "distance_mm": distance, "dice": segment_dice(finding, known)}
    return row
