"""What an earlier SEG of this node says was found, and where: read from its stored bytes alone, without its images.

Must never import highdicom or the encoders. It reads BINARY segmentations of volumes, as `segmentation.py` writes them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Code, Laterality, PriorFinding, Shape
from dicomnode.results.decoding import LATERALITY, frame_pixels, group_of, place_of, read

_SHAPES: tuple[Shape, ...] = ("box", "heat map")  # said at the end of a segment's label; what is neither is an outline


def read_former(data: bytes) -> tuple[PriorFinding, ...]:
    """Return what the SEG's segments say, in their order; centres in LPS mm, volumes by the SEG's own pixel measures.

    Raises:
        ProofFailed: it isn't such a SEG.
    """
    seg = read(data)
    try:
        if seg.SegmentationType != "BINARY" or "FrameOfReferenceUID" not in seg:
            raise ProofFailed("The earlier SEG is no BINARY segmentation of a volume.")
        shared = seg.SharedFunctionalGroupsSequence[0]
        counts: dict[int, int] = {}
        sums: dict[int, NDArray[np.float64]] = {}
        for number, frame in enumerate(seg.PerFrameFunctionalGroupsSequence):
            segment = int(group_of(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            pixels = np.argwhere(frame_pixels(seg, number))
            if len(pixels):
                position, steps = place_of("", frame, shared, projection=False) or (np.zeros(3), np.zeros((2, 3)))
                middle = position + pixels.mean(axis=0) @ steps
                counts[segment] = counts.get(segment, 0) + len(pixels)
                sums[segment] = sums.get(segment, np.zeros(3)) + middle * len(pixels)
        measures = shared.PixelMeasuresSequence[0]
        voxel_ml = float(measures.PixelSpacing[0]) * float(measures.PixelSpacing[1]) * float(measures.SpacingBetweenSlices) / 1000
        described = {int(item.SegmentNumber): item for item in seg.SegmentSequence}
        return tuple(
            _finding(described[segment], sums[segment] / counts[segment], counts[segment] * voxel_ml) for segment in sorted(counts)
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ProofFailed("The earlier SEG cannot be read.") from error


def _finding(item: Dataset, centre: NDArray[np.float64], volume_ml: float) -> PriorFinding:
    text = str(item.SegmentLabel)
    shape: Shape = next((shape for shape in _SHAPES if text.endswith(f", {shape}")), "outline")
    regions = item.get("AnatomicRegionSequence", [])
    modifiers = [modifier for region in regions for modifier in region.get("AnatomicRegionModifierSequence", [])]
    side: Laterality | None = LATERALITY.get(str(modifiers[0].CodeValue)) if modifiers else None
    return PriorFinding(
        tracking_uid=str(item.TrackingUID),
        tracking_id=str(item.TrackingID),
        label=text.removesuffix(f", {shape}").rpartition(" ")[0],
        shape=shape,
        category=_code(item.SegmentedPropertyCategoryCodeSequence[0]),
        type=_code(item.SegmentedPropertyTypeCodeSequence[0]),
        site=_code(regions[0]) if regions else None,
        side=side,
        centre_lps_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
        volume_ml=volume_ml,
    )


def _code(item: Dataset) -> Code:
    return Code(value=str(item.CodeValue), scheme=str(item.CodingSchemeDesignator), meaning=str(item.CodeMeaning))
