"""What an evaluation leaves in a folder for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dicomnode.training.evaluation.pictures import Failure


def write_pictures(out: Path, worst: Sequence[Failure]) -> None:
    """Write worst_01.png and so on into `out`, the worst first."""
    out.mkdir(parents=True, exist_ok=True)
    for number, failure in enumerate(worst, start=1):
        (out / f"worst_{number:02d}.png").write_bytes(failure.picture())
