"""Every kind of result object of every kind of source: what validators and our own checks look at. A new kind or source is one line here.

Each source has a patient whose name is in a script of its own, and another way of lying in space or of being measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from pydicom import Dataset
from pydicom.uid import MRImageStorage, PositronEmissionTomographyImageStorage

from dicomnode.analysis.growth import compare
from dicomnode.errors import ProofFailed
from dicomnode.findings import Finding, Findings, Reference, ResultObject, Segment, Volume
from dicomnode.results.capture import encode_captures, encode_reason
from dicomnode.results.presentation import encode_presentations
from dicomnode.results.profile import Form
from dicomnode.results.proof import prove, prove_selection
from dicomnode.results.proof_captures import prove_captures
from dicomnode.results.proof_presentations import prove_presentations
from dicomnode.results.report import encode_refusal, encode_report
from dicomnode.results.segmentation import encode_segmentation, encode_segmentations
from dicomnode.results.selection import encode_selection
from results_cases import (
    Case,
    another_series,
    box_of,
    enhanced,
    finding_of,
    former_of,
    heat_map_of,
    prior_with,
    projection,
    scores,
    synthetic,
)

SMALL = (6, 50, 60)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was analysed, and what was found in it; `nothing` are findings without any."""

    case: Case
    findings: Findings
    nothing: Findings
    others: tuple[Case, ...] = ()

    @property
    def headers(self) -> list[Dataset]:
        return [header for one in (self.case, *self.others) for header in one.headers]

    @property
    def volumes(self) -> list[Volume]:
        return [one.volume for one in (self.case, *self.others)]

    @property
    def made_by(self) -> dict[str, str]:
        return {"manufacturer": self.findings.manufacturer, "algorithm_name": self.findings.algorithm_name}


def wedge(*shape: int) -> np.ndarray:
    """No flip or turn of it is itself."""
    depth, rows, columns = shape
    return np.stack([np.tri(rows, columns, k, dtype=np.bool_) for k in range(depth)])


def volume_source(case: Case, *others: Case) -> Source:
    outline = finding_of(case, Segment(mask=wedge(3, 6, 5), origin=(1, 5, 6)))
    box = box_of(case, (2, 14, 15), (3, 5, 6), side="right")
    more = {"other_series": tuple(other.volume.series_instance_uid for other in others)}
    notes = ("T1 with contrast is absent.",) if others else ()
    return Source(
        case=case,
        findings=case.findings(outline, box, omitted=2, notes=notes, **more),
        nothing=case.findings(**more),
        others=others,
    )


def film_source(case: Case) -> Source:
    """What a segmentation, a detection and a classification say of one radiograph."""
    found: list[Finding] = [
        finding_of(case, Segment(mask=wedge(1, 9, 7), origin=(0, 20, 30))),
        box_of(case, (0, 22, 33), (1, 10, 12), side="right"),
        heat_map_of(case, Segment(mask=wedge(1, 9, 7), origin=(0, 50, 8))),
    ]
    return Source(
        case=case,
        findings=case.findings(*found, scores=scores(), omitted=1, notes=("One view only.",)),
        nothing=case.findings(scores=scores()),
    )


def named(name: str, character_set: str | list[str]) -> dict[str, object]:
    return {"patient_name": name, "character_set": character_set, "shape": SMALL}


def film_of(name: str, character_set: str | list[str]) -> dict[str, object]:
    return {"patient_name": name, "character_set": character_set}


JAPANESE = ("Yamada^Tarou=山田^太郎=やまだ^たろう", ["", "ISO 2022 IR 87"])
KOREAN = ("Hong^Gildong=洪^吉洞=홍^길동", ["", "ISO 2022 IR 149"])
GREEK, ARABIC, CYRILLIC = ("Διονυσίου^Ανδρέας", "ISO_IR 126"), ("قباني^لنزار", "ISO_IR 127"), ("Петров^Иван", "ISO_IR 144")
HEBREW, LATIN, UNICODE = ("שרון^דבורה", "ISO_IR 138"), ("Buc^Jérôme", "ISO_IR 100"), ("Wang^XiaoDong=王^小东", "ISO_IR 192")


def mr(number: int = 0) -> Case:
    case = synthetic("sagittal", Modality="MR", SOPClassUID=MRImageStorage, **named(*JAPANESE))
    return another_series(case, number) if number else case


def pet() -> Case:
    return synthetic("coronal", reverse=True, Modality="PT", SOPClassUID=PositronEmissionTomographyImageStorage, **named(*KOREAN))


VOLUMES: dict[str, Callable[[], Source]] = {
    "CT": lambda: volume_source(synthetic(**named(*LATIN))),
    "MR": lambda: volume_source(mr()),
    "MR of a set of four": lambda: volume_source(mr(), mr(7), mr(8), mr(9)),
    "PT": lambda: volume_source(pet()),
    "enhanced CT": lambda: volume_source(enhanced("CT", orientation="oblique", reverse=True, **named(*GREEK))),
    "enhanced MR": lambda: volume_source(enhanced("MR", **named(*ARABIC))),
}
FILMS: dict[str, Callable[[], Source]] = {
    "CR in pixels": lambda: film_source(projection("CR", calibration="none", **film_of(*CYRILLIC))),
    "DX at the detector": lambda: film_source(projection("DX", calibration="detector", **film_of(*UNICODE))),
    "MG in the patient": lambda: film_source(projection("MG", calibration="patient", **film_of(*HEBREW))),
    "frame of XA": lambda: film_source(projection("XA", frame=3, **film_of(*GREEK))),
}
SOURCES = {**VOLUMES, **FILMS}


@cache
def source_of(name: str) -> Source:
    return SOURCES[name]()


@cache
def segmentation(name: str, kind: str = "seg") -> ResultObject:
    source = source_of(name)
    made = encode_segmentation(source.findings, source.case.volume, source.headers, source.case.identity, kind=kind)
    assert made is not None
    return made


@cache
def report(name: str, kind: str = "sr", of: str = "seg") -> ResultObject:
    source, seg = source_of(name), segmentation(name, of)
    made = encode_report(source.findings, source.case.volume, source.headers, source.case.identity, seg, kind=kind)
    prove(seg, made, source.findings, source.case.volume, source.volumes[1:])
    return made


@cache
def nothing_found(name: str, kind: str = "sr") -> ResultObject:
    source = source_of(name)
    made = encode_report(source.nothing, source.case.volume, source.headers, source.case.identity, None, kind=kind)
    prove(None, made, source.nothing, source.case.volume, source.volumes[1:])
    return made


@cache
def not_analysed(name: str, kind: str = "sr") -> ResultObject:
    source = source_of(name)
    reason = "2 slices — 8 are needed"
    return encode_refusal("too-few-slices", reason, source.headers, source.case.identity, kind=kind, **source.made_by)


@cache
def withheld(name: str) -> ResultObject:
    """What is sent instead of a result that the proof refused."""
    source, seg = source_of(name), segmentation(name)
    try:
        prove(seg, nothing_found(name), source.findings, source.case.volume, source.volumes[1:])
    except ProofFailed as error:
        reason = f"result withheld: {error}"
        return encode_refusal("result-withheld", reason, source.headers, source.case.identity, **source.made_by)
    raise AssertionError("findings passed for none")


def in_the_place_of_another(name: str) -> ResultObject:
    """The report of a study's next revision."""
    source, seg, former = source_of(name), segmentation(name), report(name)
    reference = Reference(
        sop_class_uid=former.sop_class_uid,
        sop_instance_uid=f"{former.sop_instance_uid}1",
        series_instance_uid=f"{former.series_instance_uid}1",
        study_instance_uid=source.case.volume.study_instance_uid,
    )
    made = encode_report(source.findings, source.case.volume, source.headers, source.case.identity, seg, supersedes=[reference])
    prove(seg, made, source.findings, source.case.volume, source.volumes[1:])
    return made


def other_forms(name: str) -> tuple[ResultObject, ...]:
    """A SEG of each finding with empty frames and the report that refers to them, a report that refers to none, and probabilities."""
    source, form = source_of(name), Form(per="finding", empty_frames=True)
    halves = [replace(f, segment=replace(f.segment, probability=f.segment.mask * np.uint8(127))) for f in source.findings.findings]
    likely = replace(source.findings, findings=tuple(halves))
    fractional = encode_segmentations(likely, source.case.volume, source.headers, source.case.identity, Form(kind="seg-fractional"))
    segs = encode_segmentations(source.findings, source.case.volume, source.headers, source.case.identity, form)
    made = [encode_report(source.findings, source.case.volume, source.headers, source.case.identity, given) for given in (segs, None)]
    for one, given in zip(made, (form, None), strict=True):
        prove(segs if given else (), one, source.findings, source.case.volume, source.volumes[1:], form=given)
    return *segs, *made, *fractional


def alone(name: str) -> ResultObject:
    """The report for a peer that is given no SEG."""
    source = source_of(name)
    made = encode_report(source.findings, source.case.volume, source.headers, source.case.identity, None)
    prove((), made, source.findings, source.case.volume, source.volumes[1:], form=None)
    return made


def followed_up(name: str) -> ResultObject:
    """The first finding has doubled since an earlier study, the others are new, and one is gone."""
    source = source_of(name)
    case, first = source.case, source.findings.findings[0]
    gone = former_of(case, first, tracking_uid="2.25.71", tracking_id="lung-nodule-ct 0.0.9 #2", centre_lps_mm=(900.0, 0.0, 0.0))
    findings = compare(source.findings, case.volume, prior_with(former_of(case, first, grown=2.0), gone))
    seg = encode_segmentation(findings, case.volume, source.headers, case.identity)
    made = encode_report(findings, case.volume, source.headers, case.identity, seg)
    prove(seg, made, findings, case.volume, source.volumes[1:])
    return made


def presentation_states(name: str) -> tuple[ResultObject, ...]:
    source = source_of(name)
    made = encode_presentations(source.findings, source.case.volume, source.headers, source.case.identity)
    prove_presentations(made, source.findings, source.case.volume)
    return made


def pictures(name: str, *, of_nothing: bool = False) -> tuple[ResultObject, ...]:
    source = source_of(name)
    findings = source.nothing if of_nothing else source.findings
    made = encode_captures(findings, source.case.volume, source.headers, source.case.identity)
    prove_captures(made, findings, source.case.volume)
    return made


def reason_in_a_picture(name: str) -> tuple[ResultObject, ...]:
    source = source_of(name)
    return encode_reason("too-few-slices", "2 slices — 8 are needed", source.headers, source.case.identity, **source.made_by)


def key_objects(name: str) -> ResultObject:
    source = source_of(name)
    made = encode_selection(source.findings, source.case.volume, source.headers, source.case.identity)
    prove_selection(made, source.findings, source.case.volume)
    assert made is not None
    return made


REPORTS: dict[str, Callable[[str], ResultObject]] = {
    "report": report,
    "comprehensive report": lambda name: report(name, "sr-comprehensive"),
    "report of nothing": nothing_found,
    "comprehensive report of nothing": lambda name: nothing_found(name, "sr-comprehensive"),
    "report of no analysis": not_analysed,
    "comprehensive report of no analysis": lambda name: not_analysed(name, "sr-comprehensive"),
    "report of a withheld result": withheld,
    "report in the place of another": in_the_place_of_another,
    "report of growth": followed_up,
    "report that draws alone": alone,
}
# How each is made. Of a film there is no label map.
KINDS: dict[str, Callable[[str], tuple[ResultObject, ...]]] = {
    "segmentation": lambda name: (segmentation(name),),
    "label map": lambda name: (segmentation(name, "seg-labelmap"),),
    **{kind: lambda name, make=make: (make(name),) for kind, make in REPORTS.items()},
    "report on a label map": lambda name: (report(name, of="seg-labelmap"),),
    "pictures": pictures,
    "picture of nothing": lambda name: pictures(name, of_nothing=True),
    "reason in a picture": reason_in_a_picture,
    "presentation states": presentation_states,
    "key objects": lambda name: (key_objects(name),),
    "other forms": other_forms,
}
OF_VOLUMES_ONLY = {"label map", "report on a label map"}
OF_SOME = {
    "other forms": {"CT", "enhanced MR", "DX at the detector"},  # for a source of each way to place a finding
    "report of growth": {"CT", "enhanced MR"},
    "report that draws alone": set(FILMS) - {"DX at the detector"},  # that one's stands among the other forms
}
EVERY = [
    (name, kind)
    for name in SOURCES
    for kind in KINDS
    if (name in VOLUMES or kind not in OF_VOLUMES_ONLY) and name in OF_SOME.get(kind, SOURCES)
]

# What a checker of templates can tell apart: it is slow, so these are ten at most, and each small.
SHAPES: dict[str, Callable[[], ResultObject]] = {
    "outline and box": lambda: report("CT"),
    "frames": lambda: report("enhanced MR"),
    "several series": lambda: report("MR of a set of four"),
    "film in millimetres": lambda: report("DX at the detector"),
    "film in pixels": lambda: report("CR in pixels"),
    "frame of a film": lambda: report("frame of XA"),
    "comprehensive": lambda: report("CT", "sr-comprehensive"),
    "growth": lambda: followed_up("CT"),
    "nothing": lambda: nothing_found("CT"),
    "no analysis": lambda: not_analysed("CT"),
}
