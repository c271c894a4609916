"""Build a data set: sources in, a folder out, pseudonymised and split by patient. It appears whole or not at all.

Must never write a Patient ID, a Study Instance UID, a name or a path.
"""

from __future__ import annotations

import hashlib
import hmac
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.errors import AnalysisFailed, UsageError
from dicomnode.training.dataset import SPLITS, DataSet, Mask, Split, State, write_case, write_dataset
from dicomnode.training.leakage import overlaps, refuse
from dicomnode.training.sources import AnnotatedCase, Source

PSEUDONYM = 16  # hex digits

WhatIsUnknown = Literal["refuse", "absent", "unlabelled"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a data set is built.

    `missing` says what a label means that nobody marked in a case (no segment, no file), and `empty` what an empty mask means: the
    label is absent, nobody knows (unlabelled), or the case is refused. A map in which another label was drawn, and a phantom, have
    been looked at: there an empty mask is absent without being asked about.
    """

    name: str
    terms: str
    shares: tuple[float, float, float] = (0.7, 0.15, 0.15)  # of the patients: train, validation, test
    pins: Mapping[str, Split] = field(default_factory=dict)  # by Patient ID
    seed: int = 0
    key: bytes = b""  # of the pseudonyms; without one anybody who has a list of Patient IDs can look them up
    labels: tuple[str, ...] = ()  # these alone, in this order; else all that the sources have
    missing: WhatIsUnknown = "refuse"
    empty: WhatIsUnknown = "refuse"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A data set, and for whoever built it what became of each source."""

    dataset: DataSet
    origins: tuple[tuple[str, str], ...]  # case and the source's name
    refused: tuple[tuple[str, str], ...]  # the source's name and why it is no case


def build_dataset(
    out: Path, sources: Sequence[Source], plan: Plan, *, progress: Callable[[Sequence[Source]], Iterable[Source]] = tuple
) -> Built:
    """Read all sources and write them as a data set into `out`, which doesn't exist yet or is empty.

    A source whose images no model would be given (NotEligible, AnalysisFailed) is left out with its reason; other faults end the build.

    Raises:
        UsageError: `out` holds something, the sources don't go together, a case has a fault, or two splits overlap.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} holds something already; take an empty folder")
    channels, modality, labels = _common(sources, plan)
    splits = split_by_patient([source.patient for source in sources], plan)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rows, origins, refused = [], [], []
        counts: dict[str, int] = {}
        for source in progress(sources):
            patient = pseudonym(plan.key, "patient", source.patient)
            try:
                annotated = source.read()
            except (NotEligible, AnalysisFailed) as refusal:
                refused.append((source.name, str(refusal)))
                continue
            counts[patient[:8]] = counts.get(patient[:8], 0) + 1
            case = f"{patient[:8]}-{counts[patient[:8]]}"
            masks, states = _states(source, annotated, labels, plan)
            row = {
                "case": case, "patient": patient, "study": pseudonym(plan.key, "study", source.study), "split": splits[source.patient],
                "source": source.kind, "attributes": dict(annotated.attributes),
            }  # fmt: skip
            try:
                rows.append(write_case(partial, row, annotated.volumes, masks, states))
            except UsageError as error:
                raise UsageError(f"{source.name}: {error}") from error
            origins.append((case, source.name))
        if not rows:
            raise UsageError(f"none of the sources is a case: {'; '.join(f'{name}: {why}' for name, why in refused)}")
        dataset = DataSet(
            folder=partial, name=plan.name, modality=modality, channels=channels, labels=labels, terms=plan.terms, seed=plan.seed,
            cases=tuple(rows),
        )  # fmt: skip
        written = write_dataset(dataset)
        refuse(replace(written, folder=out), [_named(fault, origins) for fault in overlaps(written)])
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Built(dataset=replace(written, folder=out), origins=tuple(origins), refused=tuple(refused))


def split_by_patient(patients: Sequence[str], plan: Plan) -> dict[str, Split]:
    """Return each patient's split: as pinned, the others drawn with the plan's seed so that the shares are met as nearly as they go.

    Raises:
        UsageError: the shares are none, or a pinned patient isn't there.
    """
    if not (min(plan.shares) >= 0 and abs(sum(plan.shares) - 1) < 1e-6):  # also what is no number
        raise UsageError("the shares of train, validation and test must add up to 1")
    if unknown := sorted(set(plan.pins) - set(patients)):
        raise UsageError(f"no source is of the patient {unknown[0]}, who is pinned to {plan.pins[unknown[0]]}")
    everyone = sorted(set(patients), key=lambda patient: pseudonym(b"", "order", patient))
    free = [patient for patient in everyone if patient not in plan.pins]
    wanted = np.array(plan.shares) * len(everyone)
    wanted -= [sum(split == pinned for pinned in plan.pins.values()) for split in SPLITS]
    counts = _whole_numbers(np.maximum(wanted, 0), len(free))
    drawn = np.repeat(np.arange(len(SPLITS)), counts)
    np.random.default_rng([plan.seed, 91]).shuffle(drawn)
    return {**plan.pins, **{patient: SPLITS[split] for patient, split in zip(free, drawn, strict=True)}}


def pseudonym(key: bytes, what: str, identifier: str) -> str:
    """Return the keyed hash (HMAC-SHA256) that stands for an identifier; without a key a plain hash."""
    text = f"{what}\0{identifier}".encode()
    digest = hmac.new(key, text, hashlib.sha256) if key else hashlib.sha256(text)
    return digest.hexdigest()[:PSEUDONYM]


def age_band(years: float | None) -> str | None:
    """Return the ten years that an age lies in, as 60-69; from 90 on there is one band."""
    if years is None:
        return None
    decade = int(years) // 10 * 10
    return "90+" if decade >= 90 else f"{decade}-{decade + 9}"


def _whole_numbers(wanted: np.ndarray[tuple[int], np.dtype[np.float64]], total: int) -> list[int]:
    """Whole numbers that add up to `total` and lie nearest to `wanted` once that is scaled to it; the first get what is left."""
    if wanted.sum() == 0:
        return [total, 0, 0]
    scaled = wanted * total / wanted.sum()
    counts = np.floor(scaled + 1e-9).astype(int)
    for index in np.argsort(counts - scaled, kind="stable")[: total - int(counts.sum())]:
        counts[index] += 1
    return [int(count) for count in counts]


def _common(sources: Sequence[Source], plan: Plan) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    if not sources:
        raise UsageError("the sources hold no case")
    first = sources[0]
    for source in sources:
        if (source.channels, source.modality) != (first.channels, first.modality):
            mine, theirs = (f"{each.modality} with {', '.join(each.channels)}" for each in (source, first))
            raise UsageError(f"one data set has one modality and the same channels: {source.name} is {mine}, {first.name} is {theirs}")
    named = list(dict.fromkeys(label for source in sources for label in source.labels))
    if unknown := [label for label in plan.labels if label not in named]:
        raise UsageError(f"no source has the label {unknown[0]}; there is {', '.join(named) or 'none'}")
    labels = plan.labels or tuple(named)
    if not labels:
        raise UsageError("the sources hold no label")
    return first.channels, first.modality, labels


def _states(source: Source, annotated: AnnotatedCase, labels: Sequence[str], plan: Plan) -> tuple[Mask, dict[str, State]]:
    """The truth of a case (labels, k, r, c), and what is known of each label."""
    shape = next(iter(annotated.volumes.values())).voxels.shape
    masks = np.zeros((len(labels), *shape), dtype=np.bool_)
    states: dict[str, State] = {}
    for number, label in enumerate(labels):
        mask = annotated.masks.get(label)
        if mask is not None and mask.any():
            masks[number], states[label] = mask, "present"
        elif label in annotated.looked_for:
            states[label] = "absent"
        else:
            what, policy = ("is empty", plan.empty) if mask is not None else ("is missing", plan.missing)
            if policy == "refuse":
                raise UsageError(
                    f"{source.name}: the label {label} {what}; say whether that means that it is absent or that nobody looked for it"
                )
            states[label] = policy
    if set(states.values()) == {"unlabelled"}:
        raise UsageError(f"{source.name}: nothing is known of any label, so it is no case")
    return masks, states


def _named(fault: str, origins: Sequence[tuple[str, str]]) -> str:
    """A fault with the sources of its cases, for whoever builds."""
    return fault + "".join(f"; {case} is {name}" for case, name in origins if f"{case} (" in fault)
