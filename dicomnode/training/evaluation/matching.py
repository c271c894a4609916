"""The rules by which findings and what is known are compared, and what is kept of each comparison. The one place of these rules: RULES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicomnode.analysis.bright import without_orphans
from dicomnode.analysis.manifest import Manifest, OutputSection
from dicomnode.findings import Finding, Findings, Segment, Volume
from dicomnode.training.cases import Case, Known, Mask, finds_lesions
from dicomnode.training.evaluation.measures import dice, surface_distances

MET = 0.1
LEAST_MM = 5.0
SMALLEST_MM = 5.0

RULES = (
    "A finding is compared with lesions of its own label alone; outputs of the category Anatomical Structure find no lesions.",
    f"Where a lesion's voxels are known, a finding meets it if they share {MET:g} of their union, or if it is a box that holds its centre.",
    f"Else it meets it if its centre lies in the sphere of the lesion's diameter, of at least {LEAST_MM:g} mm radius.",
    "A finding that meets several lesions counts for each. Of several that meet one the most certain counts, and none is false.",
    f"A lesion below {SMALLEST_MM:g} mm isn't asked for: to miss it is no miss, and a finding that meets it isn't false.",
    "A finding that meets nothing is false where all lesions of the case are known (`Case.complete`); else nobody knows what it is.",
    "What is reported is what the node would report; findings below `minimum_score` count in FROC, in the AUC and in calibration alone.",
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A known lesion, and the most certain finding that meets it."""

    known: Known
    finding: Finding | None


@dataclass(frozen=True, kw_only=True)
class Match:
    """Findings of one label compared with the lesions of it in one case."""

    pairs: tuple[Pair, ...]  # of lesions of at least SMALLEST_MM
    false: tuple[Finding, ...]
    small: int = 0  # lesions that aren't asked for


@dataclass(frozen=True, kw_only=True)
class Outline:
    """All of a label's reported findings together, compared with its reference."""

    dice: float | None
    hd95_mm: float | None
    average_surface_distance_mm: float | None
    reference: float  # in `unit`
    marked: float
    unit: str  # ml, on a projection cm2, without a known spacing px


@dataclass(frozen=True, kw_only=True)
class Called:
    """What is said of the whole study about one label, and what is true."""

    score: float  # of a classification its own; else the highest score of a finding of any score, 0 without one
    threshold: float
    reported: bool
    positive: bool


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One output's label in one case: reported findings, all findings, and what they were compared with."""

    reported: Match
    all: Match
    outline: Outline | None
    called: Called | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case of an evaluation: refused, failed, or compared label by label."""

    case: str
    patient: str
    attributes: Mapping[str, str]
    of_its_kind: bool = True
    complete: bool = True
    refused: str | None = None  # the code
    failed: str | None = None  # a sentence
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slices: int = 0
    findings: tuple[Finding, ...] = ()  # as reported; without voxels where only numbers are needed
    labels: Mapping[str, Labelled] = field(default_factory=dict)
    cpu_seconds: float = 0.0


def compare(case: Case, loose: Findings, manifest: Manifest) -> dict[str, Labelled]:
    """Compare the findings of a case, of any score, with what is known, for each label of which something is."""
    told = reported(loose.findings, manifest)
    result = {}
    for output in manifest.outputs:
        label = output.label
        mine = tuple(finding for finding in told if finding.label == label)
        any_score = tuple(finding for finding in loose.findings if finding.label == label)
        known = tuple(lesion for lesion in case.known if lesion.label == label)
        truth = case.truth.get(label)
        if truth is None and not known and label not in case.positive and not (finds_lesions(output) and output.finding):
            continue
        outlined = manifest.kind == "segmentation" and output.shape == "outline"
        result[label] = Labelled(
            reported=match(mine, known) if finds_lesions(output) else Match(pairs=(), false=()),
            all=match(any_score, known) if finds_lesions(output) else Match(pairs=(), false=()),
            outline=outline(mask_of(mine, case.volume), truth, case.volume) if truth is not None and outlined else None,
            called=_called(output, loose, any_score, mine, case.positive.get(label)),
        )  # fmt: skip
    return result


def reported(findings: Sequence[Finding], manifest: Manifest) -> tuple[Finding, ...]:
    """Of findings of any score, most certain first, those that the node reports: above `minimum_score` and within the caps."""
    outputs = {output.label: output for output in manifest.outputs}
    kept: list[Finding] = []
    counts = dict.fromkeys(outputs, 0)
    for finding in findings:
        output = outputs[finding.label]
        if finding.probability >= output.minimum_score and counts[finding.label] < output.maximum_findings:
            counts[finding.label] += 1
            kept.append(finding)
    return tuple(without_orphans(kept, manifest)[: manifest.maximum_findings])


def match(findings: Sequence[Finding], known: Sequence[Known]) -> Match:
    """Pair findings with lesions of the same label by RULES."""
    used: set[int] = set()
    pairs = []
    for lesion in known:
        meeting = [finding for finding in findings if meets(finding, lesion)]
        used |= {finding.number for finding in meeting}
        if lesion.diameter_mm >= SMALLEST_MM:
            pairs.append(Pair(known=lesion, finding=max(meeting, key=lambda finding: finding.probability, default=None)))
    false = tuple(finding for finding in findings if finding.number not in used)
    return Match(pairs=tuple(pairs), false=false, small=len(known) - len(pairs))


def meets(finding: Finding, lesion: Known) -> bool:
    """Whether a finding meets a lesion of its label: the second and the third rule."""
    if lesion.truth is None:
        if finding.centre_lps_mm is None or lesion.centre_lps_mm is None:
            return False
        distance = float(np.linalg.norm(np.subtract(finding.centre_lps_mm, lesion.centre_lps_mm)))
        return distance <= max(LEAST_MM, lesion.diameter_mm / 2)
    shared = shared_voxels(finding.segment, lesion.truth)
    if finding.shape == "box" and shared and _holds_centre(finding.segment, lesion.truth):
        return True
    return shared >= MET * (finding.segment.voxel_count + lesion.truth.voxel_count - shared)


def outline(marked: Mask, truth: Mask, volume: Volume) -> Outline:
    """Compare two masks on the volume's grid."""
    unit, voxel = voxel_size(volume)
    distances = surface_distances(marked, truth, volume.spacing_mm)
    return Outline(
        dice=dice(marked, truth), hd95_mm=distances and distances[0], average_surface_distance_mm=distances and distances[1],
        reference=int(np.count_nonzero(truth)) * voxel, marked=int(np.count_nonzero(marked)) * voxel, unit=unit,
    )  # fmt: skip


def voxel_size(volume: Volume) -> tuple[str, float]:
    """In what the volume's voxels are measured, and one voxel's size in it."""
    if not volume.is_projection:
        return "ml", volume.voxel_ml
    _, row, column = volume.spacing_mm
    return ("px", 1.0) if volume.calibration == "none" else ("cm2", row * column / 100)


def mask_of(findings: Sequence[Finding], volume: Volume) -> Mask:
    """Findings together as a mask (k, r, c) of the volume."""
    mask: Mask = np.zeros(volume.voxels.shape, dtype=np.bool_)
    for finding in findings:
        box = tuple(slice(o, o + n) for o, n in zip(finding.segment.origin, finding.segment.mask.shape, strict=True))
        mask[box] |= finding.segment.mask
    return mask


def shared_voxels(first: Segment, second: Segment) -> int:
    """How many voxels two segments of one volume have in common."""
    starts = [max(a, b) for a, b in zip(first.origin, second.origin, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(first.origin, first.mask.shape, second.origin, second.mask.shape, strict=True)]
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        return 0
    parts = [s.mask[tuple(slice(i - o, j - o) for i, j, o in zip(starts, ends, s.origin, strict=True))] for s in (first, second)]
    return int(np.count_nonzero(parts[0] & parts[1]))


def segment_dice(finding: Finding, lesion: Known) -> float | None:
    """Dice of one finding with the lesion that it meets; None where the lesion's voxels aren't known, or of a box or a heat map."""
    if lesion.truth is None or finding.shape != "outline":
        return None
    return 2 * shared_voxels(finding.segment, lesion.truth) / (finding.segment.voxel_count + lesion.truth.voxel_count)


def row_of(finding: Finding) -> dict[str, Any]:
    """A finding as numbers."""
    return {
        "label": finding.label, "score": finding.probability, "centre_lps_mm": finding.centre_lps_mm, "volume_ml": finding.volume_ml,
        "long_axis_mm": finding.long_axis_mm, "side": finding.side,
    }  # fmt: skip


def _holds_centre(box: Segment, lesion: Segment) -> bool:
    centre: NDArray[np.float64] = np.argwhere(lesion.mask).mean(axis=0) + np.array(lesion.origin)
    low = np.array(box.origin) - 0.5
    return bool(np.all(centre >= low) and np.all(centre <= low + np.array(box.mask.shape)))


def _called(
    output: OutputSection, findings: Findings, any_score: Sequence[Finding], told: Sequence[Finding], positive: bool | None
) -> Called | None:
    """None where nobody knows, or of an output that isn't a statement about the study."""
    if positive is None:
        return None
    for score in findings.scores:
        if score.label == output.label:
            return Called(score=score.probability, threshold=score.threshold, reported=score.positive, positive=positive)
    if not output.finding or not finds_lesions(output):
        return None
    best = max((finding.probability for finding in any_score), default=0.0)
    return Called(score=best, threshold=output.minimum_score, reported=bool(told), positive=positive)
