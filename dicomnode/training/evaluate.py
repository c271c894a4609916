"""Measure a model package: on synthetic chests it never saw, and on real cases, one by one. Writes evaluation.json.

Runs the package exactly as the node does, through the one inference there is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.inference import Model, load_model
from dicomnode.analysis.package import load_package
from dicomnode.errors import UsageError
from dicomnode.findings import Finding, Findings, Segment
from dicomnode.training.cases import SIZE_BINS_MM, Case, Known, Point, real_cases, synthetic_case
from dicomnode.training.export import write_model_card
from dicomnode.training.structures import measure_structures, outlines_organs

VALIDATION_SEED, TEST_SEED = 3_000_000_000, 3_100_000_000  # training draws its chests below 2**31
NODULES_PER_SCAN = 10
LOWEST_SCORE = 0.5  # of what is looked at to choose a threshold

Pair = tuple[Known, Finding | None]


@dataclass(frozen=True, kw_only=True)
class Match:
    """What a package said of one scan, compared with what is known."""

    pairs: tuple[Pair, ...]  # each known nodule and the most probable finding that meets it
    false: tuple[Finding, ...]
    voxel_ml: float

    def above(self, score: float) -> Match:
        """The same with findings of at least this score alone."""
        pairs = tuple((known, f if f is not None and f.probability >= score else None) for known, f in self.pairs)
        return replace(self, pairs=pairs, false=tuple(f for f in self.false if f.probability >= score))


def evaluate(package_folder: Path, data_folder: Path | None = None, *, scans: int = 12, device: str = "auto") -> dict[str, Any]:
    """Measure the package; write what was found into its evaluation.json and MODEL_CARD.md, and return it.

    Without `data_folder` on `scans` phantoms, of which every third has no nodule or is of something else; else on the real cases in it, as
    `cases.real_cases` reads them. Cases of earlier calls stay; figures of another digest are thrown away.

    Raises:
        PackageError: the package is not sound.
        UsageError: the folder holds no case.
    """
    package = load_package(package_folder)
    model = load_model(package_folder, digest=package.digest, device=device)
    file = package_folder / "evaluation.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if content.get("digest") != package.digest:
        content = {"schema": 1, "package": package.manifest.name, "version": package.manifest.version, "digest": package.digest}
    if data_folder is None and outlines_organs(package.manifest):
        content["structures"] = measure_structures(model, first_seed=TEST_SEED, scans=scans)
    elif data_folder is None:
        content["phantoms"] = measure_phantoms(model, first_seed=TEST_SEED, scans=scans)
    else:
        earlier = {row["case"]: row for row in content.get("cases", [])}
        content["cases"] = [*(earlier | {row["case"]: row for row in measure_cases(model, data_folder)}).values()]
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_model_card(package_folder)
    return content


def measure_phantoms(model: Model, *, first_seed: int, scans: int) -> dict[str, Any]:
    """Sensitivity by size, false findings, Dice and volume error on synthetic chests; and what other score thresholds would give."""
    threshold = model.manifest.outputs[0].minimum_score
    loose = _with_minimum_score(model, LOWEST_SCORE)
    matches = []
    for number in track(range(scans), description="phantoms"):
        case = synthetic_case(first_seed + number, nodules=0 if number % 3 == 2 else NODULES_PER_SCAN)
        matches.append(match(loose({model.manifest.inputs[0].name: case.volume}), case))
    chosen = [each.above(threshold) for each in matches]
    pairs = [pair for each in chosen for pair in each.pairs]
    clear = [each for each in chosen if not each.pairs]
    return {
        "first_seed": first_seed,
        "scans": scans,
        "clear_scans": len(clear),
        "minimum_score": threshold,
        "nodules": len(pairs),
        "found": _found(pairs),
        "false_findings_per_scan": _false_per_scan(chosen),
        "false_findings_per_clear_scan": _false_per_scan(clear),
        "by_size": [_size_row(low, high, pairs) for low, high in SIZE_BINS_MM],
        **_agreement(chosen),
        "by_minimum_score": [_score_row(round(float(score), 2), matches) for score in np.arange(LOWEST_SCORE, 0.96, 0.05)],
    }


def measure_cases(model: Model, folder: Path) -> list[dict[str, Any]]:
    """What the package says of each real case: every known nodule, and every other finding.

    Raises:
        UsageError: the folder holds no case.
    """
    rows: list[dict[str, Any]] = []
    for name, read in real_cases(folder, model.manifest):
        try:
            case = read()
            compared = match(model({model.manifest.inputs[0].name: case.volume}), case)
        except NotEligible as refusal:
            rows.append({"case": name, "refused": refusal.code})
            continue
        rows.append(
            {
                "case": name,
                "slices": len(case.volume.voxels),
                "spacing_mm": [round(step, 3) for step in case.volume.spacing_mm],
                "known": [_known_row(known, finding, case) for known, finding in compared.pairs],
                "other_findings": len(compared.false),
                "others": [_finding_row(finding) for finding in compared.false],
            }
        )
    if not rows:
        raise UsageError(f"{folder} holds no DICOM series and no *_image.nrrd")
    return rows


def match(findings: Findings, case: Case) -> Match:
    """Pair findings with known nodules.

    Where the nodule's voxels are known, they meet if they share a tenth of their union; else if the finding's centre lies in
    the nodule's sphere (at least 5 mm). A finding that meets nothing is false.
    """
    pairs: list[Pair] = []
    used: set[int] = set()
    for known in case.known:
        meeting = [finding for finding in findings.findings if _meets(finding, known)]
        used |= {finding.number for finding in meeting}
        pairs.append((known, max(meeting, key=lambda finding: finding.probability, default=None)))
    false = tuple(finding for finding in findings.findings if finding.number not in used)
    return Match(pairs=tuple(pairs), false=false, voxel_ml=case.volume.voxel_ml)


def shared_voxels(first: Segment, second: Segment) -> int:
    """How many voxels two segments of one volume have in common."""
    starts = [max(a, b) for a, b in zip(first.origin, second.origin, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(first.origin, first.mask.shape, second.origin, second.mask.shape, strict=True)]
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        return 0
    parts = [s.mask[tuple(slice(i - o, j - o) for i, j, o in zip(starts, ends, s.origin, strict=True))] for s in (first, second)]
    return int(np.count_nonzero(parts[0] & parts[1]))


def _meets(finding: Finding, known: Known) -> bool:
    if known.truth is None:
        distance = float(np.linalg.norm(np.subtract(_centre(finding), known.centre_lps_mm)))
        return distance <= max(5.0, known.diameter_mm / 2)
    shared = shared_voxels(finding.segment, known.truth)
    return shared >= 0.1 * (finding.segment.voxel_count + known.truth.voxel_count - shared)


def _found(pairs: Sequence[Pair]) -> int:
    return sum(finding is not None for _, finding in pairs)


def _false_per_scan(matches: Sequence[Match]) -> float | None:
    return round(sum(len(each.false) for each in matches) / len(matches), 2) if matches else None


def _size_row(low: float, high: float, pairs: Sequence[Pair]) -> dict[str, Any]:
    inside = [pair for pair in pairs if low <= pair[0].diameter_mm < high]
    return {"diameter_mm": [low, high], "nodules": len(inside), "found": _found(inside)}


def _score_row(score: float, matches: Sequence[Match]) -> dict[str, Any]:
    chosen = [each.above(score) for each in matches]
    found = _found([pair for each in chosen for pair in each.pairs])
    return {"minimum_score": score, "found": found, "false_findings_per_scan": _false_per_scan(chosen)}


def _dice(finding: Finding, truth: Segment) -> float:
    return 2 * shared_voxels(finding.segment, truth) / (finding.segment.voxel_count + truth.voxel_count)


def _agreement(matches: Sequence[Match]) -> dict[str, Any]:
    dices, errors = [], []
    for each in matches:
        for known, finding in each.pairs:
            if finding is not None and known.truth is not None:
                dices.append(_dice(finding, known.truth))
                reference = known.truth.voxel_count * each.voxel_ml
                errors.append(100 * (finding.volume_ml - reference) / reference)
    if not dices:
        return {"median_dice": None, "median_volume_error_percent": None, "median_absolute_volume_error_percent": None}
    return {
        "median_dice": round(float(np.median(dices)), 3),
        "median_volume_error_percent": round(float(np.median(errors)), 1),
        "median_absolute_volume_error_percent": round(float(np.median(np.abs(errors))), 1),
    }


def _with_minimum_score(model: Model, score: float) -> Model:
    outputs = tuple(output.model_copy(update={"minimum_score": score}) for output in model.manifest.outputs)
    return replace(model, manifest=model.manifest.model_copy(update={"outputs": outputs}))  # type: ignore[type-var]  # every model is a frozen dataclass


def _known_row(known: Known, finding: Finding | None, case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {"diameter_mm": round(known.diameter_mm, 1), "centre_lps_mm": [round(c, 1) for c in known.centre_lps_mm]}
    if known.truth is not None:
        row["volume_ml"] = round(known.truth.voxel_count * case.volume.voxel_ml, 3)
    row["found"] = None
    if finding is not None:
        distance = float(np.linalg.norm(np.subtract(_centre(finding), known.centre_lps_mm)))
        row["found"] = {"distance_mm": round(distance, 1), **_finding_row(finding)}
        if known.truth is not None:
            row["found"]["dice"] = round(_dice(finding, known.truth), 3)
    return row


def _finding_row(finding: Finding) -> dict[str, Any]:
    return {
        "centre_lps_mm": [round(c, 1) for c in _centre(finding)], "volume_ml": round(finding.volume_ml, 3),
        "long_axis_mm": round(finding.long_axis_mm or 0.0, 1), "score": round(finding.probability, 3), "side": finding.side,
    }  # fmt: skip


def _centre(finding: Finding) -> Point:
    if finding.centre_lps_mm is None:
        raise UsageError("evaluation measures in patient space: the package finds things on projections")
    return finding.centre_lps_mm
