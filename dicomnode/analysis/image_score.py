"""A number for a whole projection from the map of a segmentation: how probable it is that the image shows what is segmented at all.

The highest probability of a map doesn't tell an image with many findings from one with a false one; how much of the region is marked
does. Rule and constants are the manifest's. Must never import torch.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dicomnode.analysis.manifest import ImageScoreSection, OutputSection
from dicomnode.findings import Score


def image_score(output: OutputSection, rule: ImageScoreSection, share: float) -> Score:
    """Return the score of an image, `share` of whose region lies above the rule's threshold for pixels."""
    probability = 1 / (1 + math.exp(-(rule.intercept + rule.slope * math.log(share + rule.floor))))
    return Score(
        label=output.label, type=output.type.code(), probability=probability, threshold=rule.threshold,
        positive=probability > rule.threshold,
    )  # fmt: skip


def marked_share(values: NDArray[np.float32], region: NDArray[np.bool_] | None, above: float) -> float:
    """Return the share of the region (None: of the image) whose values are above a threshold; 0 where the region is empty."""
    inside = values if region is None else values[region]
    return float(np.mean(inside > above)) if inside.size else 0.0
