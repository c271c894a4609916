"""Which series of a study a package is given, and why not the others.

Must never look at a patient's name, put patient data into a reason, read pixels, or import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from dicomnode.analysis.eligibility import REASONS, NotEligible, keep_accepted, number_of
from dicomnode.analysis.frames import Frame, frames_of
from dicomnode.analysis.geometry import stack_of
from dicomnode.analysis.manifest import InputSection, Manifest


@dataclass(frozen=True, kw_only=True)
class SelectedSeries:
    """The series that an input of the manifest is given, sorted by position along the slice normal; one frame of a projection."""

    input_name: str
    series_instance_uid: str
    frames: tuple[Frame, ...]
    why: str

    @property
    def headers(self) -> tuple[Dataset, ...]:
        """The headers of the images, each once, in the order of their first frames."""
        return tuple({str(frame.image.SOPInstanceUID): frame.image for frame in self.frames}.values())


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a package is given of a study: a series for each of its inputs but the absent optional ones, and the reasons as data."""

    series: tuple[SelectedSeries, ...]  # in the manifest's order; the findings lie on the grid of the first
    absent: tuple[str, ...]  # optional inputs that the study doesn't have
    why: str
    considered: tuple[
        dict[str, Any], ...
    ]  # each series: input, series_instance_uid, series_number, images, chosen, reason_code, reason, rank


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    series: SelectedSeries
    number: int | None
    spacing_mm: float
    thickness_mm: float  # of what a slice shows: overlapping slices are thicker than their distance


def select(manifest: Manifest, headers: Sequence[tuple[Path, Dataset]]) -> Selection:
    """Return the series that the package should run on: of several, the thinnest slices, then most images, then lowest number.

    Raises:
        NotEligible: an input that isn't optional has no series; the code is that of the series that came closest.
    """
    frames = frames_of(headers)
    chosen = tuple(_select_one(accepts, frames) for accepts in manifest.inputs)
    return Selection(series=chosen, absent=(), why="; ".join(series.why for series in chosen), considered=())


def _select_one(accepts: InputSection, frames: Sequence[Frame]) -> SelectedSeries:
    by_series: dict[str, list[Frame]] = {}
    for frame in frames:
        by_series.setdefault(str(frame.image.get("SeriesInstanceUID", "")), []).append(frame)
    if not by_series:
        raise NotEligible("no-images", "The study holds no images.")
    candidates: list[_Candidate] = []
    refusals: list[tuple[NotEligible, int, str]] = []
    for uid in sorted(by_series):
        images = by_series[uid]
        try:
            candidates.append(_candidate(accepts, uid, images))
        except NotEligible as refusal:
            refusals.append((refusal, len(images), _label(images[0].image)))
    if not candidates:
        raise _closest(refusals)
    candidates.sort(key=lambda c: (c.thickness_mm, -len(c.series.frames), _last_if_absent(c.number), c.series.series_instance_uid))
    chosen = candidates[0]
    why = f"{_label(chosen.series.headers[0])}: {len(chosen.series.frames)} slices, {chosen.spacing_mm:.2f} mm apart"
    why += chosen.series.why
    if len(candidates) > 1:
        why += f"; chosen among {len(candidates)} that fit: {_rule(chosen, candidates[1])}"
    if refusals:
        why += "; not: " + _others(refusals)
    return replace(chosen.series, why=why)


def _candidate(accepts: InputSection, uid: str, frames: Sequence[Frame]) -> _Candidate:
    """Check one series against the manifest, in the order of REASONS; images that it excludes one by one are left out."""
    total = len(frames)
    frames = keep_accepted(accepts, frames)
    if len(frames) < accepts.minimum_slices:
        raise NotEligible("too-few-slices", f"{len(frames)} slice(s), the package needs {accepts.minimum_slices}.")
    if len(frames) > accepts.maximum_slices:
        raise NotEligible("too-many-slices", f"{len(frames)} slices, the package reads {accepts.maximum_slices}.")
    stack = stack_of([frame.header for frame in frames])
    for name, value, (low, high) in (
        ("slices", stack.spacing_mm[0], accepts.slice_spacing_mm),
        ("rows", stack.spacing_mm[1], accepts.pixel_spacing_mm),
        ("columns", stack.spacing_mm[2], accepts.pixel_spacing_mm),
    ):
        if not low <= value <= high:
            raise NotEligible("spacing", f"The {name} are {value:.2f} mm apart; the package reads {low:g} to {high:g} mm.")
    ordered = [frames[i] for i in stack.order]
    left_out = f" ({total - len(frames)} other image(s) of the series left out)" if total > len(frames) else ""
    series = SelectedSeries(input_name=accepts.name, series_instance_uid=uid, frames=tuple(ordered), why=left_out)
    thickness = max(stack.spacing_mm[0], *(_positive_or_zero(frame.header, "SliceThickness") for frame in ordered))
    return _Candidate(
        series=series, number=_seriesnumber_of(ordered[0].image), spacing_mm=stack.spacing_mm[0], thickness_mm=round(thickness, 2)
    )


def _closest(refusals: list[tuple[NotEligible, int, str]]) -> NotEligible:
    progress = list(REASONS)
    ordered = sorted(refusals, key=lambda entry: (-progress.index(entry[0].code), -entry[1]))
    closest, _, label = ordered[0]
    reason = f"{label}: {closest.reason}"
    if len(ordered) > 1:
        reason += " Others: " + _others(ordered[1:]) + "."
    return NotEligible(closest.code, reason)


def _others(refusals: list[tuple[NotEligible, int, str]]) -> str:
    counts = Counter(refusal.code for refusal, _, _ in refusals)
    return ", ".join(f"{count} series {code}" for code, count in counts.items())


def _rule(chosen: _Candidate, second: _Candidate) -> str:
    if chosen.thickness_mm < second.thickness_mm:
        return "the thinnest slices"
    return "the most images" if len(chosen.series.frames) > len(second.series.frames) else "the lowest series number"


def _label(header: Dataset) -> str:
    number = _seriesnumber_of(header)
    return "Series without number" if number is None else f"Series {number}"


def _seriesnumber_of(header: Dataset) -> int | None:
    number = number_of(header.get("SeriesNumber"))
    return None if number is None else int(number)


def _last_if_absent(number: int | None) -> tuple[bool, int]:
    return number is None, number or 0


def _positive_or_zero(header: Dataset, keyword: str) -> float:
    return max(0.0, number_of(header.get(keyword)) or 0.0)
