"""Classes and boxes to findings: what a classification or a detection says, with a place on the volume's grid.

Neither is measured as if it were an outline: a heat map has no volume, and of a box its edges are all that is known. Must never import
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.components import edges_of, placed
from dicomnode.analysis.manifest import Manifest, OutputSection
from dicomnode.findings import Finding, Score, Segment, Volume

HALF = 0.5  # of the map's maximum: what is above it is shown as the place


@dataclass(frozen=True, kw_only=True)
class Box:
    """One detected box: corners in voxel indices (k, r, c) of the volume, voxel centres at whole numbers."""

    label: int  # the class, as an output's `channel`
    score: float  # 0..1
    low: tuple[float, float, float]
    high: tuple[float, float, float]


def classified(
    manifest: Manifest, probabilities: NDArray[np.floating], map_of: Callable[[int], NDArray[np.float32]], volume: Volume
) -> tuple[tuple[Score, ...], tuple[Finding, ...], int]:
    """Return the score of every class, the positive ones as findings, and how many more the cap left out.

    `probabilities` is (classes,); `map_of(class)` gives the class's heat map (k, r, c) on the volume's grid, and is asked for
    positive classes alone.
    """
    scores = tuple(_score(output, float(np.clip(probabilities[output.channel], 0, 1))) for output in manifest.outputs)
    positive = [(o, s.probability) for o, s in zip(manifest.outputs, scores, strict=True) if s.positive and o.finding]
    positive.sort(key=lambda entry: -entry[1])
    kept = positive[: manifest.maximum_findings]
    found = [placed(output, _warm(map_of(output.channel)), score, None, volume, shape="heat map") for output, score in kept]
    return scores, tuple(replace(f, number=number) for number, f in enumerate(found, start=1)), len(positive) - len(kept)


def detected(manifest: Manifest, boxes: Sequence[Box], volume: Volume) -> tuple[tuple[Finding, ...], int]:
    """Return boxes above their output's `minimum_score` as findings, most probable first, and how many more the caps left out."""
    outputs = {output.channel: output for output in manifest.outputs if output.finding}
    wanted = [(outputs[box.label], box) for box in boxes if box.label in outputs and box.score >= outputs[box.label].minimum_score]
    wanted.sort(key=lambda entry: (-entry[1].score, entry[1].low))
    found: list[Finding] = []
    omitted = 0
    counts = dict.fromkeys(outputs, 0)
    for output, box in wanted:
        segment = _filled(box, volume.voxels.shape)
        if segment is None:  # outside the image
            continue
        if counts[output.channel] >= output.maximum_findings or len(found) >= manifest.maximum_findings:
            omitted += 1
            continue
        counts[output.channel] += 1
        edges = edges_of(np.subtract(box.high, box.low).tolist(), volume)  # as the detector gave them, not rounded to voxels
        finding = placed(output, segment, float(np.clip(box.score, 0, 1)), None, volume, shape="box", measurements=edges)
        found.append(replace(finding, number=len(found) + 1))
    return tuple(found), omitted


def _score(output: OutputSection, probability: float) -> Score:
    return Score(
        label=output.label,
        type=output.type.code(),
        probability=probability,
        threshold=output.threshold,
        positive=probability > output.threshold,
    )


def _warm(heat: NDArray[np.float32]) -> Segment:
    """The largest part of a map above half of its maximum; the whole image where nothing stands out."""
    top = float(heat.max())
    above = heat > HALF * top if top > 0 else np.ones(heat.shape, dtype=np.bool_)
    parts, count = ndimage.label(above, structure=np.ones((3, 3, 3), dtype=np.bool_))
    largest = int(np.argmax(np.bincount(parts.ravel(), minlength=count + 1)[1:])) + 1
    box = ndimage.find_objects(parts)[largest - 1]
    return Segment(mask=parts[box] == largest, origin=(box[0].start, box[1].start, box[2].start))


def _filled(box: Box, shape: tuple[int, ...]) -> Segment | None:
    """The voxels whose centres are in the box, at least the nearest one; cut at the image's edge, None beyond it."""
    starts, lengths = [], []
    for low, high, size in zip(box.low, box.high, shape, strict=True):
        first, last = int(np.ceil(low - 1e-6)), int(np.floor(high + 1e-6))
        if last < first:
            first = last = round((low + high) / 2)
        first, last = max(0, first), min(size - 1, last)
        if last < first:
            return None
        starts.append(first)
        lengths.append(last - first + 1)
    return Segment(mask=np.ones(lengths, dtype=np.bool_), origin=(starts[0], starts[1], starts[2]))
