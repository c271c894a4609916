"""The worst of an evaluation, each with a picture: what is known in green, what was marked in yellow.

How bad: a missed lesion 1 and a hundredth of its diameter in mm; a wrong call of a study by how far its score lies from the threshold,
one more if it was missed; a false finding its score; an outline 1 - Dice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicomnode.analysis.manifest import InputSection
from dicomnode.findings import Finding, Volume
from dicomnode.results.display import LUNG_WINDOW, SOFT_TISSUE_WINDOW
from dicomnode.results.keyimage import draw_comparison
from dicomnode.training.cases import Case, Known, Mask
from dicomnode.training.evaluation.matching import Labelled, Result, mask_of

MOST = 20


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One thing that went wrong, on one slice."""

    case: str
    label: str
    kind: str  # missed, false finding, missed study, false alarm, outline
    text: str
    badness: float
    slice_index: int
    grey: NDArray[np.uint8]  # (rows, columns)
    marked: Mask  # (rows, columns)
    reference: Mask

    def picture(self) -> bytes:
        """Return the PNG."""
        caption = f"{self.case}  |  {self.text}  |  slice {self.slice_index + 1}  |  green: reference, yellow: marked"
        return draw_comparison(self.grey, self.marked, self.reference, caption=caption)


@dataclass(frozen=True, kw_only=True)
class _Mistake:
    kind: str
    text: str
    badness: float
    slice_index: int


class Gallery:
    """Keeps the worst failures while cases go by, so that no volume stays in memory."""

    def __init__(self, accepts: InputSection) -> None:
        self._accepts = accepts
        self._kept: list[Failure] = []

    def look(self, case: Case, result: Result) -> None:
        """Keep what is bad enough of one compared case."""
        for label, each in result.labels.items():
            for mistake in mistakes(case, label, each, result):
                if len(self._kept) < MOST or mistake.badness > self._kept[-1].badness:
                    self._kept.append(self._failure(case, label, mistake, result))
                    self._kept.sort(key=lambda failure: -failure.badness)
                    del self._kept[MOST:]

    @property
    def worst(self) -> tuple[Failure, ...]:
        """The worst first."""
        return tuple(self._kept)

    def _failure(self, case: Case, label: str, mistake: _Mistake, result: Result) -> Failure:
        k = mistake.slice_index
        mine = [finding for finding in result.findings if finding.label == label]
        return Failure(
            case=case.name, label=label, kind=mistake.kind, text=mistake.text, badness=mistake.badness, slice_index=k,
            grey=grey_slice(case.volume, k, self._accepts), marked=mask_of(mine, case.volume)[k], reference=reference_slice(case, label, k),
        )  # fmt: skip


def mistakes(case: Case, label: str, each: Labelled, result: Result) -> Iterator[_Mistake]:
    """Everything that went wrong with one label of a case, and any outline however good; what was missed counts once."""
    for pair in each.reported.pairs:
        if pair.finding is None:
            text = f"missed: {label} of {pair.known.diameter_mm:.0f} mm"
            yield _Mistake(
                kind="missed", text=text, badness=1 + pair.known.diameter_mm / 100, slice_index=_slice_of(pair.known, case.volume)
            )
    for finding in each.reported.false:
        known = "false finding" if case.complete else "finding of which nothing is known"
        text = f"{known}: {label}, score {finding.probability:.2f}"
        yield _Mistake(
            kind="false finding" if case.complete else "other finding", text=text, slice_index=_largest(finding),
            badness=finding.probability if case.complete else 0.5 * finding.probability,
        )  # fmt: skip
    called, outline = each.called, each.outline
    if called is not None and called.positive is not called.reported and not each.reported.pairs and not each.reported.false:
        kind = "missed study" if called.positive else "false alarm"
        text = f"{kind}: {label}, score {called.score:.2f}, threshold {called.threshold:.2f}"
        badness = abs(called.score - called.threshold) + called.positive
        yield _Mistake(kind=kind, text=text, badness=badness, slice_index=_any_slice(case, label, result))
    if outline is not None and outline.dice is not None and (outline.dice > 0 or all(pair.finding for pair in each.reported.pairs)):
        distance = "" if outline.hd95_mm is None else f", HD95 {outline.hd95_mm:.1f} mm"
        text = f"{label}: Dice {outline.dice:.2f}{distance}"
        yield _Mistake(kind="outline", text=text, badness=1 - outline.dice, slice_index=_worst_slice(case, label, result))


def grey_slice(volume: Volume, k: int, accepts: InputSection) -> NDArray[np.uint8]:
    """A slice as grey values: CT in a window, else between its 1st and 99.5th percentile."""
    image = np.asarray(volume.voxels[k], dtype=np.float32)
    if volume.modality == "CT":
        centre, width = LUNG_WINDOW if accepts.region == "lung" else SOFT_TISSUE_WINDOW
        low, high = centre - width / 2, centre + width / 2
    else:
        low, high = (float(value) for value in np.percentile(image, (1, 99.5)))
    grey: NDArray[np.uint8] = np.clip((image - low) * (255.0 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)
    return grey


def reference_slice(case: Case, label: str, k: int) -> Mask:
    """What is known of a label on one slice: its voxels, or of a lesion of known centre the disc of its sphere there."""
    volume = case.volume
    mask: Mask = np.zeros(volume.voxels.shape[1:], dtype=np.bool_)
    if label in case.truth:
        mask |= case.truth[label][k]
    rows, columns = np.indices(mask.shape)
    for lesion in case.known:
        if lesion.label == label and lesion.truth is not None and 0 <= k - lesion.truth.origin[0] < len(lesion.truth.mask):
            _, row, column = lesion.truth.origin
            plane = lesion.truth.mask[k - lesion.truth.origin[0]]
            mask[row : row + plane.shape[0], column : column + plane.shape[1]] |= plane
        elif lesion.label == label and lesion.truth is None and lesion.centre_lps_mm is not None:
            places = volume.to_lps(np.stack([np.full(mask.shape, k), rows, columns], axis=-1).astype(np.float64))
            mask |= np.linalg.norm(places - np.array(lesion.centre_lps_mm), axis=-1) <= lesion.diameter_mm / 2
    return mask


def _slice_of(lesion: Known, volume: Volume) -> int:
    if lesion.truth is not None:
        return lesion.truth.origin[0] + int(np.argmax(lesion.truth.mask.sum(axis=(1, 2))))
    if lesion.centre_lps_mm is None:
        return 0
    return int(np.clip(round(float(volume.to_index(np.array(lesion.centre_lps_mm))[0])), 0, len(volume.voxels) - 1))


def _largest(finding: Finding) -> int:
    return finding.segment.origin[0] + int(np.argmax(finding.segment.mask.sum(axis=(1, 2))))


def _any_slice(case: Case, label: str, result: Result) -> int:
    mine = [finding for finding in result.findings if finding.label == label]
    if mine:
        return _largest(mine[0])
    return int(np.argmax(case.truth[label].sum(axis=(1, 2)))) if label in case.truth else len(case.volume.voxels) // 2


def _worst_slice(case: Case, label: str, result: Result) -> int:
    """Where outline and reference differ most."""
    marked = mask_of([finding for finding in result.findings if finding.label == label], case.volume)
    return int(np.argmax((marked ^ case.truth[label]).sum(axis=(1, 2))))
