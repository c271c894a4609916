"""One SEG of all findings or one for each, with empty frames or without, or none: each with a report that refers to what there is."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Finding, Findings, ResultObject, Segment, probability_bytes
from dicomnode.results.profile import USUAL, Form
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation, encode_segmentations
from results_cases import Case, box_of, enhanced, finding_of, projection, synthetic, written_again

PER_FINDING, EMPTY = Form(per="finding"), Form(empty_frames=True)
FORMS = [
    USUAL,
    PER_FINDING,
    EMPTY,
    Form(per="finding", empty_frames=True),
    Form(kind="seg-labelmap", per="finding"),
    Form(kind="seg-labelmap", empty_frames=True),
    None,
]


def pair(case: Case) -> Findings:
    """A wedge, and a box that overlaps it."""
    first, deep = (0, 1) if case.volume.is_projection else (2, 3)
    wedge = Segment(mask=np.tri(9, 7, 2, dtype=np.bool_)[None].repeat(deep, axis=0), origin=(first, 20, 30))
    return case.findings(finding_of(case, wedge), box_of(case, (first, 24, 28), (1, 4, 5), side="right"))


def encoded(case: Case, findings: Findings, form: Form | None) -> tuple[tuple[ResultObject, ...], ResultObject]:
    segs = () if form is None else encode_segmentations(findings, case.volume, case.headers, case.identity, form)
    variant = "" if form is None else form.variant
    return segs, encode_report(findings, case.volume, case.headers, case.identity, segs, variant=variant)


def read(made: ResultObject) -> Dataset:
    return pydicom.dcmread(BytesIO(made.data))


@pytest.mark.parametrize("case", [synthetic(), enhanced("MR"), projection("DX")], ids=["CT", "frames", "film"])
def test_each_form_is_proved_with_its_report_and_has_names_of_its_own(case: Case) -> None:
    findings, made = pair(case), []
    for form in FORMS:
        segs, report = encoded(case, findings, form)
        prove(segs, report, findings, case.volume, form=form)
        made += [*segs, report]
    uids = {one.sop_instance_uid: one.data for one in made}
    assert all(uids[one.sop_instance_uid] == one.data for one in made)  # no two objects of one name differ


def test_what_is_usual_is_what_it_was() -> None:
    case = synthetic()
    (one,) = encode_segmentations(pair(case), case.volume, case.headers, case.identity, USUAL)
    assert one == encode_segmentation(pair(case), case.volume, case.headers, case.identity)


def test_one_for_each_finding_has_one_segment_that_says_whose_it_is() -> None:
    case = synthetic()
    segs, report = encoded(case, pair(case), PER_FINDING)
    assert encoded(case, pair(case), PER_FINDING) == (segs, report)
    objects = [read(seg) for seg in segs]
    together = read(encoded(case, pair(case), USUAL)[0][0]).SegmentSequence
    assert [(o.SegmentSequence[0].SegmentNumber, o.SegmentSequence[0].SegmentLabel) for o in objects] == [
        (1, "Lung nodule 1"),
        (1, "Lung nodule 2, box"),
    ]
    assert [o.SegmentSequence[0].TrackingUID for o in objects] == [segment.TrackingUID for segment in together]
    assert [(o.InstanceNumber, o.NumberOfFrames, o.SegmentsOverlap) for o in objects] == [(1, 3, "NO"), (2, 1, "NO")]
    assert len({o.SeriesInstanceUID for o in objects}) == 1
    named = read(report).to_json()
    assert all(seg.sop_instance_uid in named for seg in segs)


def test_empty_frames_are_there_for_each_image_of_each_segment() -> None:
    case = synthetic()
    (seg,), _ = encoded(case, pair(case), EMPTY)
    whole = read(seg)
    assert whole.NumberOfFrames == 24
    assert whole.pixel_array.any(axis=(1, 2)).sum() == 4
    (labels,), _ = encoded(case, case.findings(pair(case).findings[0]), Form(kind="seg-labelmap", empty_frames=True))
    assert (read(labels).NumberOfFrames, int(read(labels).pixel_array.any(axis=(1, 2)).sum())) == (12, 3)


def test_a_report_without_segmentations_has_all_numbers_beside_its_lines() -> None:
    case = synthetic()
    _, report = encoded(case, pair(case), None)
    groups = [item for item in items(read(report)) if concept(item) == "125007"]
    templates = [str(group.ContentTemplateSequence[0].TemplateIdentifier) for group in groups]
    assert templates == ["1410", "1410", "1410"]  # the last on the border of an image
    numbers = [sorted(concept(item) for item in group.ContentSequence if item.ValueType == "NUM") for group in groups]
    assert numbers == [["103339001", "111012", "118565006"], ["111012"], []]


def test_without_a_finding_all_forms_say_the_same() -> None:
    case = synthetic()
    reports = {encoded(case, case.findings(), form)[1].data for form in FORMS}
    assert len(reports) == 1


def test_what_does_not_fit_its_form_does_not_leave() -> None:
    case = synthetic()
    findings = pair(case)
    usual, each, empty, alone = (encoded(case, findings, form) for form in (USUAL, PER_FINDING, EMPTY, None))
    first, second = findings.findings
    for segs, report, said, form in (
        (each[0][::-1], each[1], findings, PER_FINDING),
        (each[0][:1], each[1], findings, PER_FINDING),
        (each[0], usual[1], findings, PER_FINDING),
        (each[0], each[1], findings, USUAL),
        (usual[0], each[1], findings, USUAL),
        (usual[0], usual[1], findings, None),
        (usual[0], usual[1], findings, EMPTY),
        (empty[0], empty[1], findings, USUAL),
        ((), usual[1], findings, None),
        ((), alone[1], findings, USUAL),
        ((), alone[1], replace(findings, findings=(first,)), None),
        ((), alone[1], replace(findings, findings=(renumbered(second, 1), renumbered(first, 2))), None),
        ((), alone[1], replace(findings, findings=(replace(first, probability=0.5), second)), None),
        ((), alone[1], replace(findings, findings=(replace(first, side="right"), second)), None),
        ((), alone[1], replace(findings, findings=(moved(first), second)), None),
        ((), alone[1], replace(findings, findings=(first, moved(second))), None),
    ):
        with pytest.raises(ProofFailed):
            prove(segs, report, said, case.volume, form=form)


def test_an_empty_frame_that_is_missing_does_not_leave() -> None:
    case = synthetic()
    findings = case.findings(pair(case).findings[0])
    (seg,), report = encoded(case, findings, EMPTY)
    shorter = read(seg)
    del shorter.PerFrameFunctionalGroupsSequence[-1]
    shorter.NumberOfFrames, size = 11, 50 * 60 * 11 // 8
    shorter.PixelData = shorter.PixelData[: size + size % 2]
    with pytest.raises(ProofFailed, match="a frame for each image"):
        prove([replace(seg, parts=(written_again(shorter),))], report, findings, case.volume, form=EMPTY)


def graded(finding: Finding) -> Finding:
    """With a probability for each voxel, of which no flip is itself; the first is so small that it would round to nothing."""
    mask = finding.segment.mask
    values = np.linspace(0.0, 1.0, mask.size, dtype=np.float32).reshape(mask.shape)
    return replace(finding, segment=replace(finding.segment, probability=probability_bytes(values, mask)))


FRACTIONAL = Form(kind="seg-fractional")


@pytest.mark.parametrize("case", [synthetic(), enhanced("MR"), projection("DX")], ids=["CT", "frames", "film"])
@pytest.mark.parametrize("form", [FRACTIONAL, Form(kind="seg-fractional", per="finding", empty_frames=True)], ids=["together", "each"])
def test_probabilities_of_voxels_are_fractions_of_255(case: Case, form: Form) -> None:
    findings = replace(pair(case), findings=tuple(map(graded, pair(case).findings)))
    segs, report = encoded(case, findings, form)
    prove(segs, report, findings, case.volume, form=form)
    first, segment = read(segs[0]), findings.findings[0].segment
    assert (first.SegmentationType, first.SegmentationFractionalType, first.MaximumFractionalValue) == ("FRACTIONAL", "PROBABILITY", 255)
    assert segment.probability is not None
    assert ((segment.probability > 0) == segment.mask).all()
    k = segment.origin[0] if form.empty_frames and not case.volume.is_projection else 0
    shown = (first.pixel_array if first.NumberOfFrames > 1 else first.pixel_array[None])[k]
    assert shown.sum() == segment.probability[0].sum()
    assert (shown[20:29, 30:37] == segment.probability[0]).all()


def test_where_a_finding_has_no_probabilities_all_are_binary() -> None:
    case = synthetic()
    findings = replace(pair(case), findings=(graded(pair(case).findings[0]), pair(case).findings[1]))
    segs, report = encoded(case, findings, FRACTIONAL)
    prove(segs, report, findings, case.volume, form=FRACTIONAL)
    assert read(segs[0]).SegmentationType == "BINARY"


def test_other_probabilities_do_not_leave() -> None:
    case = synthetic()
    findings = replace(pair(case), findings=tuple(map(graded, pair(case).findings)))
    segs, report = encoded(case, findings, FRACTIONAL)
    first, second = findings.findings
    assert first.segment.probability is not None
    one_more = first.segment.probability.copy()
    one_more[0, 3, 2] += 1
    for values in (one_more, np.where(first.segment.mask, first.segment.probability[::-1, ::-1], 0), None):
        other = replace(first, segment=replace(first.segment, probability=values))
        with pytest.raises(ProofFailed, match="other probabilities"):
            prove(segs, report, replace(findings, findings=(other, second)), case.volume, form=FRACTIONAL)
    seg = read(segs[0])
    seg.SegmentationFractionalType = "OCCUPANCY"
    with pytest.raises(ProofFailed, match="no probabilities"):
        prove([replace(segs[0], parts=(written_again(seg),))], report, findings, case.volume, form=FRACTIONAL)


def moved(finding: Finding) -> Finding:
    """A row further down, and all that is said of its place with it."""
    k, r, c = finding.segment.origin
    axis = finding.long_axis
    if axis is not None:
        axis = replace(axis, points_lps_mm=tuple((x, y + 0.8, z) for x, y, z in axis.points_lps_mm))  # type: ignore[arg-type]  # two
    return replace(finding, segment=replace(finding.segment, origin=(k, r + 1, c)), long_axis=axis)


def renumbered(finding: Finding, number: int) -> Finding:
    return replace(finding, number=number)


def items(below: Dataset) -> list[Dataset]:
    here = list(below.get("ContentSequence", []))
    return here + [j for i in here for j in items(i)]


def concept(item: Dataset) -> str:
    names = item.get("ConceptNameCodeSequence", [])
    return str(names[0].get("CodeValue", "")) if names else ""
