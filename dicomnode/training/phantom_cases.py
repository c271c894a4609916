"""Synthetic chests with lung nodules as cases of a data set. Their truth is known to the voxel, and an empty one is certain."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dicomnode.training.sources import AnnotatedCase, Source
from dicomnode.training.unseen_phantoms import chest_case

LABEL = "Lung nodule"
FIRST_SEED = 3_300_000_000  # training draws its chests below 2**31, evaluate from 3.0e9 and 3.1e9
SEEDS = 100_000  # of one data set
NODULES = 6
CLEAR = 4  # each fourth chest has none


def phantom_sources(count: int, *, seed: int) -> Iterator[Source]:
    """Yield so many chests, each a patient of its own; other seeds give other chests."""
    for number in range(count):
        chest = FIRST_SEED + SEEDS * seed + number
        yield Source(
            name=f"phantom {chest}", patient=f"phantom {chest}", study=f"phantom {chest}", kind=f"phantom {chest}", modality="CT",
            channels=("image",), labels=(LABEL,), read=partial(_read, chest, 0 if number % CLEAR == CLEAR - 1 else NODULES),
        )  # fmt: skip


def _read(chest: int, nodules: int) -> AnnotatedCase:
    case = chest_case(chest, nodules=nodules, label=LABEL)
    return AnnotatedCase(
        volumes={"image": case.volume}, masks=case.truth, looked_for=frozenset({LABEL}),
        attributes={"scanner": "phantom", "slice_thickness_mm": round(case.volume.spacing_mm[0], 2)},
    )  # fmt: skip
