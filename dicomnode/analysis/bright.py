"""Outputs that are the bright part of another one: an enhancing core by the intensity of its image, and not by a channel of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from dicomnode.analysis.components import mean_of_top_quarter
from dicomnode.analysis.manifest import BrightSection, Manifest
from dicomnode.findings import Finding

BRIGHTEST = 0.98  # the quantile of the other output's voxels that stands for the brightest: few voxels of vessels don't move it


def brighten(manifest: Manifest, probabilities: torch.Tensor, image: torch.Tensor) -> None:
    """Give outputs that are bright parts of another one the probability of their intensity, within what that one marks.

    `probabilities` is (outputs, k, r, c) and changed in place, `image` (inputs, k, r, c) as the network is given it.
    """
    labels, inputs = [output.label for output in manifest.outputs], [accepts.name for accepts in manifest.inputs]
    for number, output in enumerate(manifest.outputs):
        if output.bright is not None:
            other = labels.index(output.bright.within)
            outline = probabilities[other] > manifest.outputs[other].threshold
            marked = _sure(probabilities[other], outline, output.bright.least_score)
            values = image[inputs.index(output.bright.input)].to(probabilities.device)
            chance = ((values - cut_of(output.bright, values[marked]) + 1) / 2).clamp(0, 1)
            around = torch.minimum(probabilities[other], chance).masked_fill(outline & ~marked, 0)
            probabilities[number] = torch.where(marked, chance, around)


def without_orphans(findings: Sequence[Finding], manifest: Manifest) -> list[Finding]:
    """Leave out bright parts of an output of which there is no finding."""
    within = {output.label: output.bright.within for output in manifest.outputs if output.bright is not None}
    there = {finding.label for finding in findings}
    return [finding for finding in findings if within.get(finding.label, finding.label) in there]


def _sure(probability: torch.Tensor, marked: torch.Tensor, least_score: float) -> torch.Tensor:
    """What is marked (k, r, c), in components whose most certain quarter is on average as sure as it must be."""
    if not least_score:
        return marked
    values = probability.cpu().numpy()
    numbers, count = ndimage.label(marked.cpu().numpy(), structure=np.ones((3, 3, 3)))
    boxes = ndimage.find_objects(numbers)
    scores = [mean_of_top_quarter(values[box][numbers[box] == number]) for number, box in enumerate(boxes, start=1)]
    kept = [number for number in range(1, count + 1) if scores[number - 1] >= least_score]
    return torch.from_numpy(np.isin(numbers, kept)).to(marked.device)


def cut_of(bright: BrightSection, values: torch.Tensor) -> float:
    """The intensity a voxel must exceed, by `values` (n,) within the other output: how bright a core gets differs from scan to scan."""
    if bright.share is None or not len(values):
        return bright.above
    middle, top = (float(values.float().kthvalue(1 + round(share * (len(values) - 1))).values) for share in (0.5, BRIGHTEST))
    return max(bright.above, middle + bright.share * (top - middle))
