"""What of a study an input of a manifest could be given: stacks of slices or projections that fit, ranked by rule, and what doesn't fit.

Must never read pixels, look at a patient's name, put patient data into a reason, or import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from dicomnode.analysis.attributes import number_of, text_of, texts_of, value_of
from dicomnode.analysis.decoding import is_decodable
from dicomnode.analysis.eligibility import NotEligible, keep_accepted
from dicomnode.analysis.frames import Frame
from dicomnode.analysis.geometry import Part, plane_of, stack_of, stacks_of
from dicomnode.analysis.manifest import InputSection, Orientation
from dicomnode.analysis.subject import view_rank

OBLIQUE_COSINE = 0.8  # a slice whose normal is further from each axis of the patient, some 37 degrees, is oblique


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
        return tuple({text_of(frame.image, "SOPInstanceUID"): frame.image for frame in self.frames}.values())


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A stack or projection that fits: `rank` holds its values for each rule in the order of the rules, the smallest first."""

    series: SelectedSeries
    label: str
    part: str  # which of several stacks or images of the series
    shape: str  # what is said about it in `why`
    differs: tuple[str, ...]  # the attributes that tell it from other stacks of its series
    rank: Mapping[str, Any]
    order: tuple[Any, ...]  # sorts by RULES

    @property
    def space(self) -> tuple[str, str]:
        """Study and frame of reference: what the members of a set share. Projections have no frame of reference that means anything."""
        header = self.series.frames[0].header
        return text_of(header, "StudyInstanceUID"), text_of(header, "FrameOfReferenceUID") if "thickness_mm" in self.rank else ""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What doesn't fit, and why."""

    series_instance_uid: str
    label: str
    part: str
    images: int
    refusal: NotEligible


# Of several that fit, each rule decides where those before it don't; in the words of `why`.
VOLUME_RULES = {
    "kernel": "the preferred kernel",
    "thickness_mm": "the thinnest slices",
    "extent_mm": "covers the most",
    "images": "the most images",
    "derived": "original before derived",
    "b_value": "the highest b-value",
    "acquired": "the latest acquisition",
    "series_number": "the lowest series number",
}
PROJECTION_RULES = {
    "view": "the preferred view",
    "derived": "original before derived",
    "acquired": "the latest acquisition",
    "series_number": "the lowest series number",
    "instance_number": "the last image of its series",
}


def candidates_of(accepts: InputSection, by_series: Mapping[str, Sequence[Frame]]) -> tuple[list[Candidate], list[Refused]]:
    """Return what of a study fits an input, the best first, and what doesn't."""
    fitting: list[Candidate] = []
    refused: list[Refused] = []
    for uid in sorted(by_series):
        frames = by_series[uid]
        found = []
        for candidate in _of_series(accepts, uid, frames):
            if isinstance(candidate, Candidate):
                found.append(candidate)
            else:
                refused.append(candidate)
        ambiguous = _ambiguity(found)
        if ambiguous is None:
            fitting += found
        else:
            refused.append(Refused(series_instance_uid=uid, label=found[0].label, part="", images=len(frames), refusal=ambiguous))
    return sorted(fitting, key=lambda candidate: candidate.order), refused


def rule_between(chosen: Candidate, second: Candidate) -> str:
    """Return, in words, the first rule by which one candidate was preferred to another."""
    rules = VOLUME_RULES if "thickness_mm" in chosen.rank else PROJECTION_RULES
    for (name, words), mine, other in zip(rules.items(), chosen.order, second.order, strict=False):
        if mine != other:
            return f"{words}, and the most images" if name == "extent_mm" and chosen.rank["images"] > second.rank["images"] else words
    return rules["series_number"]


def _of_series(accepts: InputSection, uid: str, frames: Sequence[Frame]) -> Iterator[Candidate | Refused]:
    label = label_of(frames[0].image)
    try:
        kept = _decodable(keep_accepted(accepts, frames))
    except NotEligible as refusal:
        yield Refused(series_instance_uid=uid, label=label, part="", images=len(frames), refusal=refusal)
        return
    left_out = f" ({len(frames) - len(kept)} other image(s) of the series left out)" if len(frames) > len(kept) else ""
    parts = stacks_of(kept) if accepts.dimensions == 3 else [Part(frames=(frame,), differs=()) for frame in kept]
    for part in parts:
        name = ", ".join(f"{keyword} {value}" for keyword, value in part.differs)
        if accepts.dimensions == 2 and len(kept) > 1:
            name = f"image {text_of(part.frames[0].image, 'InstanceNumber')[:12] or '?'}"
        try:
            if accepts.dimensions == 3:
                yield _volume(accepts, uid, part, (label, name, left_out))
            else:
                yield _projection(accepts, uid, part.frames[0], (label, name, left_out))
        except NotEligible as refusal:
            yield Refused(series_instance_uid=uid, label=label, part=name, images=len(part.frames), refusal=refusal)


def _decodable(frames: list[Frame]) -> list[Frame]:
    """Return the frames; a header without file meta information is of no stored object, and nothing is known of its pixels."""
    for frame in frames:
        meta = getattr(frame.image, "file_meta", None)
        syntax = text_of(meta, "TransferSyntaxUID") if meta is not None else ""
        if syntax and not is_decodable(syntax):
            raise NotEligible("transfer-syntax", f"The pixels are in the transfer syntax {syntax[:64]}, which the node doesn't decode.")
    return frames


def _volume(accepts: InputSection, uid: str, part: Part, said: tuple[str, str, str]) -> Candidate:
    """Check one stack against the manifest, in the order of REASONS."""
    label, name, left_out = said
    frames = part.frames
    headers = [frame.header for frame in frames]
    _check_orientation(accepts, headers)
    if len(frames) < accepts.minimum_slices:
        raise NotEligible("too-few-slices", f"{len(frames)} slice(s), the package needs {accepts.minimum_slices}.")
    if len(frames) > accepts.maximum_slices:
        raise NotEligible("too-many-slices", f"{len(frames)} slices, the package reads {accepts.maximum_slices}.")
    stack = stack_of(headers)
    for what, value, (low, high) in (
        ("slices", stack.spacing_mm[0], accepts.slice_spacing_mm),
        ("rows", stack.spacing_mm[1], accepts.pixel_spacing_mm),
        ("columns", stack.spacing_mm[2], accepts.pixel_spacing_mm),
    ):
        if not low <= value <= high:
            raise NotEligible("spacing", f"The {what} are {value:.2f} mm apart; the package reads {low:g} to {high:g} mm.")
    ordered = tuple(frames[i] for i in stack.order)
    first = ordered[0].header
    thickness = round(max(stack.spacing_mm[0], *(number_of(value_of(h, "SliceThickness")) or 0.0 for h in headers)), 2)
    kernel = _kernel_rank(first, accepts)
    number, b_value = series_number_of(ordered[0].image), number_of(value_of(first, "DiffusionBValue"))
    extent, derived = round(stack.spacing_mm[0] * (len(ordered) - 1), 1), _is_derived(first)
    rank = {
        "kernel": kernel if accepts.preferred_kernels else None,
        "thickness_mm": thickness,  # overlapping slices are thicker than their distance
        "extent_mm": extent,
        "images": len(ordered),
        "derived": derived,
        "b_value": b_value,
        "series_number": number,
    }
    order = (
        kernel, thickness, -round(extent / 10), -len(ordered), derived, -(b_value or 0), -_acquired(headers), _last_if_absent(number),
        uid, name,
    )  # fmt: skip
    series = SelectedSeries(input_name=accepts.name, series_instance_uid=uid, frames=ordered, why=left_out)
    shape = f"{len(ordered)} slices, {stack.spacing_mm[0]:.2f} mm apart"
    differs = tuple(keyword for keyword, _ in part.differs)
    return Candidate(series=series, label=label, part=name, shape=shape, differs=differs, rank=rank, order=order)


def _projection(accepts: InputSection, uid: str, frame: Frame, said: tuple[str, str, str]) -> Candidate:
    label, name, left_out = said
    plane = plane_of(frame)
    low, high = accepts.pixel_spacing_mm
    if plane.calibration == "none":
        if not accepts.pixel_spacing_may_be_absent:
            raise NotEligible("missing-geometry", "Pixel Spacing and Imager Pixel Spacing are absent or malformed.")
    elif not all(low <= value <= high for value in plane.spacing_mm):
        row, column = plane.spacing_mm
        raise NotEligible("spacing", f"The pixels are {row:.3f} and {column:.3f} mm apart; the package reads {low:g} to {high:g} mm.")
    view = view_rank(frame.header, accepts)
    number, instance = series_number_of(frame.image), number_of(value_of(frame.image, "InstanceNumber"))
    rank = {"view": view, "images": 1, "derived": _is_derived(frame.header), "series_number": number}
    order = (view or 0, rank["derived"], -_acquired([frame.header]), _last_if_absent(number), -(instance or 0), uid, name)
    series = SelectedSeries(input_name=accepts.name, series_instance_uid=uid, frames=(frame,), why=left_out)
    return Candidate(series=series, label=label, part=name, shape="one projection", differs=(), rank=rank, order=order)


def _check_orientation(accepts: InputSection, headers: Sequence[Dataset]) -> None:
    """Raise NotEligible if all slices are of an orientation the package doesn't read; mixed ones are the geometry's to refuse."""
    if not accepts.orientations:
        return
    found = {orientation_of(header) for header in headers} - {None}
    if found and not found & set(accepts.orientations):
        wanted = " or ".join(accepts.orientations)
        raise NotEligible("orientation", f"The slices are {' and '.join(sorted(str(o) for o in found))}; the package reads {wanted} ones.")


def orientation_of(header: Dataset) -> Orientation | None:
    """Return the anatomical plane of a slice from the normal of Image Orientation (Patient), or None where that is malformed."""
    values = [number_of(value) for value in texts_of(header, "ImageOrientationPatient")]
    numbers = [value for value in values if value is not None]
    if len(values) != 6 or len(numbers) != 6:
        return None
    normal = np.abs(np.cross(numbers[:3], numbers[3:]))
    length = float(np.linalg.norm(normal))
    if not np.isfinite(length) or length == 0:
        return None
    planes: tuple[Orientation, ...] = ("sagittal", "coronal", "axial")
    return planes[int(normal.argmax())] if normal.max() / length >= OBLIQUE_COSINE else "oblique"


def _ambiguity(found: Sequence[Candidate]) -> NotEligible | None:
    """Why stacks of one series that all fit cannot be chosen from by rule; None if they can."""
    if len(found) < 2:
        return None
    differs = {keyword for candidate in found for keyword in candidate.differs}
    if differs & {"EchoTime", "EchoNumbers"}:
        return NotEligible("several-echoes", f"{len(found)} echoes in one series fit, and nothing says which one the package needs.")
    by_rule = differs <= {"StackID", "DiffusionBValue"}
    if not by_rule and differs == {"ImageType"} and sum(not candidate.rank["derived"] for candidate in found) == 1:
        by_rule = True
    if by_rule:
        return None
    return NotEligible("several-phases", f"{len(found)} stacks of one series fit, told apart by {', '.join(sorted(differs))} alone.")


def label_of(header: Dataset) -> str:
    """Return what a person calls a series: its number."""
    number = series_number_of(header)
    return "Series without number" if number is None else f"Series {number}"


def series_number_of(header: Dataset) -> int | None:
    """Return Series Number, or None where it is absent or malformed."""
    number = number_of(value_of(header, "SeriesNumber"))
    return None if number is None else int(number)


def _last_if_absent(number: int | None) -> tuple[bool, int]:
    return number is None, number or 0


def _kernel_rank(header: Dataset, accepts: InputSection) -> int:
    kernels = {value.strip().upper() for value in texts_of(header, "ConvolutionKernel")}
    places = [i for i, kernel in enumerate(accepts.preferred_kernels) if kernel.upper() in kernels]
    return places[0] if places else len(accepts.preferred_kernels)


def _is_derived(header: Dataset) -> bool:
    return any(value.strip().upper().startswith("DERIVED") for value in texts_of(header, "ImageType")[:1])


def _acquired(headers: Sequence[Dataset]) -> int:
    """When a series was acquired, as a number that grows (YYYYMMDDhhmmss of its first image); 0 where no header says."""
    return min((moment for moment in map(_moment, headers) if moment), default=0)


def _moment(header: Dataset) -> int:
    for date, time in (("AcquisitionDateTime", ""), ("AcquisitionDate", "AcquisitionTime"), ("ContentDate", "ContentTime")):
        text = text_of(header, date).replace(".", "" if time else ".") + (text_of(header, time).replace(":", "") if time else "")
        digits = text.split(".")[0][:14]
        if len(digits) >= 12 and digits.isascii() and digits.isdigit():
            return int(digits.ljust(14, "0"))
    return 0
