"""From a probability map to findings: connected components, back on the image's own grid, measured there.

Knows nothing of networks: a probability map and the manifest's output section in, findings out. Must never import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from dicomnode.analysis.grid import Grid, Triple
from dicomnode.analysis.manifest import OutputSection
from dicomnode.findings import Code, Finding, Laterality, LongAxis, Measurement, Segment, Shape, Volume, probability_bytes

VOLUME = Code(value="118565006", scheme="SCT", meaning="Volume")
AREA = Code(value="42798000", scheme="SCT", meaning="Area")
LONG_AXIS = Code(value="103339001", scheme="SCT", meaning="Long Axis")
MILLILITRE = Code(value="ml", scheme="UCUM", meaning="ml")
MILLIMETRE = Code(value="mm", scheme="UCUM", meaning="mm")
SQUARE_MILLIMETRE = Code(value="mm2", scheme="UCUM", meaning="mm2")
EDGES = (  # along the rows, along the columns, across the slices
    Code(value="103355008", scheme="SCT", meaning="Width"),
    Code(value="121207", scheme="DCM", meaning="Height"),
    Code(value="131197000", scheme="SCT", meaning="Depth"),
)
PIXEL = Code(value="{pixels}", scheme="UCUM", meaning="pixels")  # of a projection without a known spacing

_NEIGHBOURS = np.ones((3, 3, 3), dtype=np.bool_)  # 26-connected
MOSTLY = 0.75  # of a finding's voxels lie on one side, or it has none: a brain lies on both
_SIDES: dict[int, Laterality] = {1: "right", 2: "left"}  # the side labels of a region


@dataclass(frozen=True, kw_only=True)
class ProbabilityMap:
    """What a network says on a part of its grid.

    `values` is float32 on the grid box that begins at `origin`. `region` limits where findings may lie and `side` says
    1 for the patient's right and 2 for the left; both have the shape of `values`, or are None where the manifest names no region.
    """

    grid: Grid
    origin: Triple
    values: NDArray[np.float32]
    region: NDArray[np.bool_] | None
    side: NDArray[np.int8] | None


def find(output: OutputSection, probability: ProbabilityMap, volume: Volume) -> tuple[list[Finding], int]:
    """Return the findings of one output, most probable first, and how many more the manifest's cap left out.

    Volume, extent and centre are those of the segment's voxels on the volume's own grid.
    """
    parts = list(_segments(output, probability))
    if output.components == "one" and parts:
        parts = [_together(parts)]
    found = [
        (segment, score, side)
        for segment, score, side in parts
        if score >= output.minimum_score and segment.voxel_count >= smallest(output, volume)
    ]
    found.sort(key=lambda entry: (-entry[1], -entry[0].voxel_count, entry[0].origin))
    kept = found[: output.maximum_findings]  # only these are measured
    made = boxed if output.shape == "box" else measured
    return [made(output, segment, score, side, volume) for segment, score, side in kept], len(found) - len(kept)


def long_axis_of(segment: Segment, volume: Volume) -> LongAxis:
    """Return the longest diameter of the segment within one slice, from pixel edge to pixel edge.

    Its end points are vertices of the convex hull of the pixels' edge midpoints, as for the maximum 2D diameter of a mesh.
    """
    best = (-1.0, 0, np.zeros((2, 2)))
    for k in np.flatnonzero(segment.mask.any(axis=(1, 2))):
        pixels = _outline(segment.mask[k]) + np.array(segment.origin[1:])
        if len(pixels):
            millimetres = pixels @ volume.affine[:3, 1:3].T
            distances = cdist(millimetres, millimetres)
            first, second = np.unravel_index(int(distances.argmax()), distances.shape)
            if distances[first, second] > best[0] + 1e-6:
                best = (float(distances[first, second]), int(k) + segment.origin[0], pixels[[first, second]])
    length, slice_index, ends = best
    (x1, y1, z1), (x2, y2, z2) = volume.to_lps(np.column_stack([np.full(2, slice_index), ends])).tolist()
    (row1, column1), (row2, column2) = ends.tolist()
    return LongAxis(
        slice_index=slice_index,
        points_lps_mm=((x1, y1, z1), (x2, y2, z2)),
        points_px=((column1, row1), (column2, row2)),
        length_mm=length,
    )


def smallest(output: OutputSection, volume: Volume) -> float:
    """Return how many voxels a segment of this output needs; none on a projection of unknown spacing."""
    if volume.is_projection:
        return 0.0 if volume.calibration == "none" else output.minimum_mm2 / _pixel_area(volume)
    return output.minimum_ml / volume.voxel_ml


def centre_of(segment: Segment, volume: Volume) -> tuple[float, float, float] | None:
    """Return the mean position of the segment's voxels, LPS mm; None on a projection, which has no patient coordinates."""
    if volume.is_projection:
        return None
    x, y, z = volume.to_lps(np.argwhere(segment.mask).mean(axis=0) + np.array(segment.origin)).tolist()
    return x, y, z


def measured(output: OutputSection, segment: Segment, score: float, side: Laterality | None, volume: Volume) -> Finding:
    """Return the finding of an outline, with its volume (of a projection: its area) and its long axis.

    Without a known spacing a projection is measured in pixels.
    """
    axis = long_axis_of(segment, volume)
    in_pixels = volume.is_projection and volume.calibration == "none"
    if volume.is_projection:
        area = segment.voxel_count * _pixel_area(volume)
        extent = Measurement(name=AREA, value=area, unit=PIXEL if in_pixels else SQUARE_MILLIMETRE)
    else:
        extent = Measurement(name=VOLUME, value=segment.voxel_count * volume.voxel_ml, unit=MILLILITRE)
    measurements = (extent, Measurement(name=LONG_AXIS, value=axis.length_mm, unit=PIXEL if in_pixels else MILLIMETRE))
    return placed(output, segment, score, side, volume, long_axis=axis, measurements=measurements)


def boxed(output: OutputSection, segment: Segment, score: float, side: Laterality | None, volume: Volume) -> Finding:
    """Return the finding of the box around a segment, with the lengths of its edges: of an outline it says nothing."""
    whole = Segment(mask=np.ones_like(segment.mask), origin=segment.origin)
    return placed(output, whole, score, side, volume, shape="box", measurements=edges_of(segment.mask.shape, volume))


def edges_of(voxels: Sequence[float], volume: Volume) -> tuple[Measurement, ...]:
    """Return the lengths of a box's edges, given in voxels (k, r, c); without a known spacing a projection is measured in pixels."""
    unit = PIXEL if volume.is_projection and volume.calibration == "none" else MILLIMETRE
    across, down, along = (count * spacing for count, spacing in zip(voxels, volume.spacing_mm, strict=True))
    edges = (along, down) if volume.is_projection else (along, down, across)
    return tuple(Measurement(name=name, value=float(value), unit=unit) for name, value in zip(EDGES, edges, strict=False))


def placed(
    output: OutputSection,
    segment: Segment,
    score: float,
    side: Laterality | None,
    volume: Volume,
    *,
    shape: Shape = "outline",
    long_axis: LongAxis | None = None,
    measurements: tuple[Measurement, ...] = (),
) -> Finding:
    """Return the finding of an output at this place. The caller numbers the findings of all outputs together."""
    return Finding(
        number=1,
        label=output.label,
        probability=score,
        category=output.category.code(),
        type=output.type.code(),
        site=output.site.code() if output.site else None,
        side=side or output.side,
        centre_lps_mm=centre_of(segment, volume),
        segment=segment,
        shape=shape,
        long_axis=long_axis,
        measurements=measurements,
        colour_cielab=output.colour_cielab,
    )


def _pixel_area(volume: Volume) -> float:
    _, row, column = volume.spacing_mm
    return row * column


def _together(parts: Sequence[tuple[Segment, float, Laterality | None]]) -> tuple[Segment, float, Laterality | None]:
    """Return all parts as one segment; its score is the mean of theirs, weighed by their voxels, its side theirs if they share one."""
    starts = np.min([segment.origin for segment, _, _ in parts], axis=0)
    ends = np.max([np.add(segment.origin, segment.mask.shape) for segment, _, _ in parts], axis=0)
    each = np.zeros(ends - starts, dtype=np.uint8)  # the largest probability that a part gives a voxel
    for segment, _, _ in parts:
        there = each[tuple(slice(o - s, o - s + n) for o, s, n in zip(segment.origin, starts, segment.mask.shape, strict=True))]
        np.maximum(there, segment.mask if segment.probability is None else segment.probability, out=there)
    mask = each > 0
    voxels = [segment.voxel_count for segment, _, _ in parts]
    score = float(np.average([score for _, score, _ in parts], weights=voxels))
    sides = {side for _, _, side in parts}
    known = all(segment.probability is not None for segment, _, _ in parts)
    whole = Segment(mask=mask, origin=(int(starts[0]), int(starts[1]), int(starts[2])), probability=each if known else None)
    return whole, score, sides.pop() if len(sides) == 1 else None


def _segments(output: OutputSection, probability: ProbabilityMap) -> Iterator[tuple[Segment, float, Laterality | None]]:
    above = probability.values > output.threshold
    if probability.region is not None:
        above &= probability.region
    labels = _parts(output, above)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[box] == number
        if probability.values[box][component].max() < output.minimum_score:
            continue  # interpolation can only lower it
        side = None if probability.side is None else _majority(probability.side[box][component])
        for segment, score in _on_the_volume(output, probability, labels, number, box):
            yield segment, score, side


def _parts(output: OutputSection, mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the connected components, or all voxels as one where the output is one thing."""
    if output.components == "one":
        return mask.astype(np.int32)
    labels: NDArray[np.int32] = ndimage.label(mask, structure=_NEIGHBOURS)[0]
    return labels


def _on_the_volume(
    output: OutputSection, probability: ProbabilityMap, labels: NDArray[np.int32], number: int, box: tuple[slice, ...]
) -> Iterator[tuple[Segment, float]]:
    """Interpolate one component back: on the volume's coarser grid it may be several segments, or none if it lies between slices."""
    grid = probability.grid
    wide = tuple(slice(max(0, s.start - 1), min(n, s.stop + 1)) for s, n in zip(box, labels.shape, strict=True))
    values = np.where((labels[wide] == 0) | (labels[wide] == number), probability.values[wide], 0)
    on_grid = [slice(s.start + o, s.stop + o) for s, o in zip(wide, probability.origin, strict=True)]
    turned = [grid.covering(axis, s) for axis, s in enumerate(on_grid)]
    matrices = [grid.to_volume(axis, grid=on_grid[axis], turned=turned[axis]) for axis in range(3)]
    scores = _apply(matrices, values)
    inside = scores > output.threshold
    if probability.region is not None:
        inside &= _apply(matrices, probability.region[wide].astype(np.float32)) > 0.5
    parts = _parts(output, inside)
    for part, tight in enumerate(ndimage.find_objects(parts), start=1):
        mask = parts[tight] == part
        first, second, third = (s.start + t.start for s, t in zip(tight, turned, strict=True))
        mask_there, origin = grid.turn_back(mask, (first, second, third))
        each, _ = grid.turn_back(probability_bytes(scores[tight], mask), (first, second, third))
        yield Segment(mask=mask_there, origin=origin, probability=each), mean_of_top_quarter(scores[tight][mask])


def _apply(matrices: list[NDArray[np.float32]], values: NDArray[np.float32]) -> NDArray[np.float32]:
    result = values
    for matrix in matrices:  # each moves the axis it has done to the end: after three the order is back
        result = np.tensordot(result, matrix, axes=(0, 1))
    return result


def mean_of_top_quarter(values: NDArray[np.float32]) -> float:
    """Return the score of a finding with these probabilities."""
    count = max(1, (values.size + 3) // 4)
    return float(np.clip(np.partition(values, values.size - count)[values.size - count :].mean(dtype=np.float64), 0, 1))


def _majority(sides: NDArray[np.int8]) -> Laterality | None:
    right, left = (int(np.count_nonzero(sides == label)) for label in _SIDES)
    return None if max(right, left) <= MOSTLY * (right + left) else _SIDES[1 if right > left else 2]


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the (row, column) edge midpoints of the outermost pixels of each row and column: the hull's vertices are among them."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, right = mask[rows].argmax(axis=1) - 0.5, mask.shape[1] - mask[rows, ::-1].argmax(axis=1) - 0.5
    top, bottom = mask[:, columns].argmax(axis=0) - 0.5, mask.shape[0] - mask[::-1, columns].argmax(axis=0) - 0.5
    sides = [(rows, left), (rows, right), (top, columns), (bottom, columns)]
    return np.concatenate([np.column_stack(pair).astype(np.float64) for pair in sides])
