"""Key objects flag the images that findings are drawn on, each once, and a selection that flags others doesn't leave."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Findings, ResultObject, Segment
from dicomnode.results.proof import prove_selection
from dicomnode.results.selection import encode_selection
from results_cases import Case, box_of, enhanced, finding_of, projection, synthetic, written_again


def three(case: Case) -> Findings:
    """Two on slice 3 and one on slice 7."""
    mask = np.ones((1, 4, 5), dtype=np.bool_)
    return case.findings(*(finding_of(case, Segment(mask=mask, origin=(k, r, 6))) for k, r in ((3, 2), (7, 2), (3, 20))))


def encoded(case: Case, findings: Findings) -> ResultObject:
    made = encode_selection(findings, case.volume, case.headers, case.identity)
    assert made is not None
    return made


def read(made: ResultObject) -> Dataset:
    return pydicom.dcmread(BytesIO(made.data))


def references(document: Dataset) -> list[Dataset]:
    return [item.ReferencedSOPSequence[0] for item in document.ContentSequence if item.ValueType == "IMAGE"]


def test_each_image_with_a_finding_is_flagged_once() -> None:
    case = synthetic()
    made = encoded(case, three(case))
    prove_selection(made, three(case), case.volume)
    document = read(made)
    assert [str(r.ReferencedSOPInstanceUID) for r in references(document)] == [case.volume.sop_instance_uids[k] for k in (3, 7)]
    assert (document.Modality, document.SeriesNumber, document.ContentQualification) == ("KO", 9007, "RESEARCH")
    assert document.ConceptNameCodeSequence[0].CodeValue == "113000"  # Of Interest
    assert (str(document.PatientName), document.ContentDate) == ("Sphere^Synthetic", "20260304")
    assert encoded(case, three(case)).data == made.data


def test_of_a_multi_frame_image_the_frames_are_flagged() -> None:
    case = enhanced("CT")
    assert case.volume.frame_numbers is not None
    made = encoded(case, three(case))
    prove_selection(made, three(case), case.volume)
    (reference,) = references(read(made))
    assert list(reference.ReferencedFrameNumber) == [case.volume.frame_numbers[k] for k in (3, 7)]


def test_a_film_is_flagged() -> None:
    case = projection("DX")
    findings = case.findings(box_of(case, (0, 22, 33), (1, 10, 12)))
    prove_selection(encoded(case, findings), findings, case.volume)


def test_without_a_finding_nothing_is_flagged() -> None:
    case = synthetic()
    assert encode_selection(case.findings(), case.volume, case.headers, case.identity) is None
    prove_selection(None, case.findings(), case.volume)


def test_a_wrong_selection_does_not_leave() -> None:
    case = synthetic()
    findings = three(case)
    made = encoded(case, findings)

    def changed(uid: str) -> ResultObject:
        document = read(made)
        references(document)[0].ReferencedSOPInstanceUID = uid
        return replace(made, parts=(written_again(document),))

    first, *others = findings.findings
    off_by_one = replace(findings, findings=(finding_of(case, replace(first.segment, origin=(4, 2, 6))), *others))
    for wrong, said in (
        (changed(case.volume.sop_instance_uids[4]), findings),
        (changed("1.2.3"), findings),
        (made, off_by_one),
        (made, case.findings()),
        (None, findings),
    ):
        with pytest.raises(ProofFailed):
            prove_selection(wrong, said, case.volume)
