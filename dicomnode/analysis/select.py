"""Which series of a study a package is given, and why not the others.

Must never look at a patient's name, put patient data into a reason, read pixels, or import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from dicomnode.analysis.attributes import text_of
from dicomnode.analysis.candidates import Candidate, Refused, SelectedSeries, candidates_of, rule_between, series_number_of
from dicomnode.analysis.eligibility import REASONS, NotEligible
from dicomnode.analysis.frames import Frame, frames_of
from dicomnode.analysis.manifest import InputSection, Manifest

__all__ = ["SelectedSeries", "Selection", "select"]

BEST = 8  # candidates of an input that are tried in a set: with four inputs that is 4096 sets


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a package is given of a study: a series for each of its inputs but the absent optional ones, and the reasons as data."""

    series: tuple[SelectedSeries, ...]  # in the manifest's order; the findings lie on the grid of the first
    absent: tuple[str, ...]  # optional inputs that the study doesn't have
    why: str
    # Each series for each input: input, series_instance_uid, series_number, part, images, chosen, reason_code, reason, rank
    considered: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    accepts: InputSection
    fitting: Sequence[Candidate]  # the best first
    refused: Sequence[Refused]


def select(manifest: Manifest, headers: Sequence[tuple[Path, Dataset]]) -> Selection:
    """Return the series that the package should run on; the members of a set share study and frame of reference.

    Of several series that fit, the rules of `candidates` choose.

    Raises:
        NotEligible: an input that isn't optional has no series, or the inputs have none in one frame of reference; the code is that
            of the series that came closest.
    """
    by_series: dict[str, list[Frame]] = {}
    for frame in frames_of(headers):
        by_series.setdefault(text_of(frame.image, "SeriesInstanceUID"), []).append(frame)
    if not by_series:
        raise NotEligible("no-images", "The study holds no images.")
    choices = []
    for accepts in manifest.inputs:
        fitting, refused = candidates_of(accepts, by_series)
        choices.append(_Choice(accepts=accepts, fitting=fitting, refused=refused))
    try:
        chosen = _best_set(choices)
    except NotEligible as refusal:
        raise NotEligible(refusal.code, refusal.reason, considered=_considered(choices, [None] * len(choices), by_series)) from None
    several = len(choices) > 1
    series, sentences, absent = [], [], []
    for choice, candidate in zip(choices, chosen, strict=True):
        name = choice.accepts.name
        if candidate is None:
            absent.append(name)
            sentences.append(f"without {name}")
            continue
        why = _why(choice, candidate)
        series.append(replace(candidate.series, why=why))
        sentences.append(f"{name}: {why}" if several else why)
    considered = _considered(choices, chosen, by_series)
    return Selection(series=tuple(series), absent=tuple(absent), why="; ".join(sentences), considered=considered)


def _best_set(choices: Sequence[_Choice]) -> list[Candidate | None]:
    """Choose a candidate for each input, None for an optional one without: as many inputs as can be, then the best of the first.

    Raises:
        NotEligible: no set has all inputs that aren't optional.
    """
    required = [choice for choice in choices if not choice.accepts.optional]
    for choice in required:
        if not choice.fitting:
            raise _closest(choice, named=len(choices) > 1)
    sets: list[tuple[tuple[int, ...], list[Candidate | None]]] = []
    complete_spaces = 0
    for space in dict.fromkeys(candidate.space for candidate in choices[0].fitting):
        options = [_options(choice, space) for choice in choices]
        complete_spaces += all(options)
        for members in product(*options):
            found = [candidate for _, candidate in members if candidate is not None]
            if not _overlap(found):
                absent = sum(candidate is None for _, candidate in members)
                sets.append(((absent, *(place for place, _ in members)), [candidate for _, candidate in members]))
    if sets:
        return min(sets, key=lambda entry: entry[0])[1]
    names = " and ".join(choice.accepts.name for choice in required)
    if complete_spaces:
        raise NotEligible("same-series", f"The inputs {names} need series of their own, and the study has one that fits several of them.")
    raise NotEligible("frame-of-reference", f"No frame of reference of the study has a series for each of {names}.")


def _options(choice: _Choice, space: tuple[str, str]) -> list[tuple[int, Candidate | None]]:
    """The candidates of an input in one frame of reference, with their places; after them nothing, if the input is optional."""
    options: list[tuple[int, Candidate | None]] = [
        (place, candidate) for place, candidate in enumerate(choice.fitting) if candidate.space == space
    ]
    options = options[:BEST]
    return [*options, (len(choice.fitting), None)] if choice.accepts.optional else options


def _overlap(members: Sequence[Candidate]) -> bool:
    """Whether two members of a set have an image plane in common."""
    planes = Counter(id(frame) for candidate in members for frame in candidate.series.frames) if len(members) > 1 else Counter[int]()
    return any(count > 1 for count in planes.values())


def _why(choice: _Choice, chosen: Candidate) -> str:
    why = f"{chosen.label}{f' ({chosen.part})' if chosen.part else ''}: {chosen.shape}{chosen.series.why}"
    others = [candidate for candidate in choice.fitting if candidate is not chosen]
    if others:
        why += f"; chosen among {len(choice.fitting)} that fit: {_rule(choice, chosen)}"
    if choice.refused:
        why += "; not: " + _counted(choice.refused)
    return why


def _rule(choice: _Choice, chosen: Candidate) -> str:
    place = choice.fitting.index(chosen)
    return rule_between(chosen, choice.fitting[1]) if place == 0 else "the frame of reference of the other inputs, or not taken by them"


def _closest(choice: _Choice, *, named: bool) -> NotEligible:
    progress = list(REASONS)
    ordered = sorted(choice.refused, key=lambda refused: (-progress.index(refused.refusal.code), -refused.images))
    closest = ordered[0]
    reason = f"{closest.label}: {closest.refusal.reason}"
    if len(ordered) > 1:
        reason += " Others: " + _counted(ordered[1:]) + "."
    return NotEligible(closest.refusal.code, f"Input {choice.accepts.name}: {reason}" if named else reason)


def _counted(refused: Sequence[Refused]) -> str:
    counts = Counter(entry.refusal.code for entry in refused)
    return ", ".join(f"{count} series {code}" for code, count in counts.items())


def _considered(
    choices: Sequence[_Choice], chosen: Sequence[Candidate | None], by_series: dict[str, list[Frame]]
) -> tuple[dict[str, Any], ...]:
    """Return each series for each input as data, the best first."""
    rows: list[dict[str, Any]] = []
    for choice, taken in zip(choices, chosen, strict=True):
        for candidate in choice.fitting:
            code, reason = (None, None) if candidate is taken else _not_taken(choice, candidate, taken)
            uid, images, number = candidate.series.series_instance_uid, len(candidate.series.frames), candidate.rank["series_number"]
            rows.append(_row(choice, uid, number, candidate.part, images) | {
                "chosen": candidate is taken, "reason_code": code, "reason": reason, "rank": dict(candidate.rank),
            })  # fmt: skip
        for entry in choice.refused:
            number = series_number_of(by_series[entry.series_instance_uid][0].image)
            row = _row(choice, entry.series_instance_uid, number, entry.part, entry.images)
            rows.append(row | {"chosen": False, "reason_code": entry.refusal.code, "reason": entry.refusal.reason, "rank": None})
    return tuple(rows)


def _not_taken(choice: _Choice, candidate: Candidate, taken: Candidate | None) -> tuple[str | None, str]:
    """Why a candidate that fits by itself was not taken: a code where a set ruled it out, else the rule alone."""
    if taken is None:
        return "frame-of-reference", "It fits, but no set of the package's inputs is complete with it."
    if candidate.space != taken.space:
        return "frame-of-reference", "It fits, but lies in another frame of reference than what was chosen."
    if choice.fitting.index(candidate) < choice.fitting.index(taken):
        return "same-series", "It fits, but another input was given it."
    return None, f"It fits; preferred was {rule_between(taken, candidate)}."


def _row(choice: _Choice, uid: str, number: int | None, part: str, images: int) -> dict[str, Any]:
    return {"input": choice.accepts.name, "series_instance_uid": uid, "series_number": number, "part": part, "images": images}
