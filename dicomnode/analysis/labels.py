"""A network's answer on the volume's own grid, as label values or as channels that may overlap, to findings.

Torch is not needed: `scores` says how probable each voxel is, asked only for the voxels of what may become a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.components import measured, smallest
from dicomnode.analysis.manifest import Manifest, OutputSection
from dicomnode.findings import Finding, Segment, Volume

CANDIDATES = 1000  # of more components of one output than these, the largest are looked at: a noisy map has tens of thousands

_NEIGHBOURS = np.ones((3, 3, 3), dtype=np.bool_)  # 26-connected

Scores = Callable[[OutputSection, NDArray[np.int64]], NDArray[np.float32]]
"""(output, (n, 3) voxel indices (k, r, c)) -> (n,) probabilities 0..1 that the network gives that output there."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network says on the volume's grid.

    `labels` is (k, r, c) of whole numbers: an output is where its `channel` is the value. Or it is (channels, k, r, c) of bool.
    """

    labels: NDArray[np.integer] | NDArray[np.bool_]
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    output: OutputSection
    segment: Segment
    score: float


def find_in(answer: Answer, manifest: Manifest, volume: Volume) -> tuple[tuple[Finding, ...], int]:
    """Return the findings of all outputs, most probable first and numbered, and how many more the manifest's caps left out."""
    candidates: list[_Candidate] = []
    omitted = 0
    boxes = ndimage.find_objects(answer.labels) if answer.labels.ndim == 3 else []
    for output in manifest.outputs:
        if not output.finding:
            continue
        mask, origin = _mask(answer, boxes, output)
        if mask is None:
            continue
        segments, left_out = _segments(mask, origin, output, volume)
        scored = [_Candidate(output=output, segment=s, score=_score(answer.scores, output, s)) for s in segments]
        scored = sorted((c for c in scored if c.score >= output.minimum_score), key=_order)
        candidates += scored[: output.maximum_findings]
        omitted += left_out + max(0, len(scored) - output.maximum_findings)
    candidates.sort(key=_order)
    kept = candidates[: manifest.maximum_findings]  # only these are measured
    found = [measured(c.output, c.segment, c.score, c.output.side, volume) for c in kept]
    return tuple(replace(f, number=number) for number, f in enumerate(found, start=1)), omitted + len(candidates) - len(kept)


def _order(candidate: _Candidate) -> tuple[float, int, tuple[int, int, int]]:
    return -candidate.score, -candidate.segment.voxel_count, candidate.segment.origin


def _mask(
    answer: Answer, boxes: Sequence[tuple[slice, ...] | None], output: OutputSection
) -> tuple[NDArray[np.bool_] | None, tuple[int, int, int]]:
    """Return where the output is, cropped, and where that begins; None where it is nowhere."""
    if answer.labels.ndim == 3:
        box = boxes[output.channel - 1] if 0 < output.channel <= len(boxes) else None
        if box is None:
            return None, (0, 0, 0)
        return answer.labels[box] == output.channel, (box[0].start, box[1].start, box[2].start)
    if output.channel >= len(answer.labels):
        return None, (0, 0, 0)
    whole = answer.labels[output.channel].astype(np.bool_, copy=False)
    found = ndimage.find_objects(whole.view(np.uint8))
    if not found or found[0] is None:
        return None, (0, 0, 0)
    box = found[0]
    return whole[box], (box[0].start, box[1].start, box[2].start)


def _segments(mask: NDArray[np.bool_], origin: tuple[int, int, int], output: OutputSection, volume: Volume) -> tuple[list[Segment], int]:
    """Return the output's segments that are large enough, the largest CANDIDATES of them, and how many more there were."""
    if output.components == "one":
        whole = Segment(mask=np.ascontiguousarray(mask), origin=origin)
        return ([whole] if whole.voxel_count >= smallest(output, volume) else []), 0
    parts, count = ndimage.label(mask, structure=_NEIGHBOURS)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    enough = int(np.count_nonzero(sizes >= smallest(output, volume)))
    largest = np.argsort(-sizes, kind="stable")[: min(enough, CANDIDATES)]
    boxes = ndimage.find_objects(parts)
    return [_segment(parts, boxes[number], int(number) + 1, origin) for number in largest], enough - len(largest)


def _segment(parts: NDArray[np.int32], box: tuple[slice, ...], number: int, origin: tuple[int, int, int]) -> Segment:
    first, second, third = (side.start + start for side, start in zip(box, origin, strict=True))
    return Segment(mask=parts[box] == number, origin=(first, second, third))


def _score(scores: Scores, output: OutputSection, segment: Segment) -> float:
    """The mean of the top quarter of the probabilities in the segment."""
    values = scores(output, np.argwhere(segment.mask) + np.array(segment.origin))
    count = max(1, (values.size + 3) // 4)
    return float(np.clip(np.partition(values, values.size - count)[values.size - count :].mean(dtype=np.float64), 0, 1))
