"""A report says what was found, that nothing was found, or why nobody looked; never nothing."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from dicomnode.findings import Code, Findings, Measurement, ResultObject
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_refusal, encode_report
from dicomnode.results.segmentation import encode_segmentation
from results_cases import DIGEST, Case, sphere, synthetic

SUMMARY = "111017"


def encode(case: Case, findings: Findings) -> tuple[Dataset, Dataset | None]:
    seg = encode_segmentation(findings, case.volume, case.headers, case.identity)
    report = encode_report(findings, case.volume, case.headers, case.identity, seg)
    return read(report), read(seg) if seg else None


def read(result: ResultObject) -> Dataset:
    return pydicom.dcmread(BytesIO(result.data))


def refuse(case: Case) -> Dataset:
    reason = "the series has 2 slices — the package needs 8"
    return read(
        encode_refusal(
            "too-few-slices", reason, case.headers[:2], case.identity, manufacturer="dicomnode", algorithm_name="Lung nodule 3D U-Net"
        )
    )


def found(case: Case, code: str, below: Dataset) -> list[Dataset]:
    """Content items with a concept, at any depth."""
    here = [i for i in below.get("ContentSequence", []) if i.get("ConceptNameCodeSequence", [Dataset()])[0].get("CodeValue") == code]
    return here + [j for i in below.get("ContentSequence", []) for j in found(case, code, i)]


def text(items: list[Dataset]) -> list[str]:
    return [str(i.TextValue) for i in items]


def coded(items: list[Dataset]) -> list[str]:
    return [str(i.ConceptCodeSequence[0].CodeValue) for i in items]


@pytest.fixture(scope="module")
def case() -> Case:
    return synthetic()


def test_a_comprehensive_report_says_the_same_without_a_third_dimension(case: Case) -> None:
    findings = case.findings(sphere(case, (0, -10, 110), 9), omitted=1)
    seg = encode_segmentation(findings, case.volume, case.headers, case.identity)
    three, two = (encode_report(findings, case.volume, case.headers, case.identity, seg, kind=kind) for kind in ("sr", "sr-comprehensive"))
    prove(seg, two, findings, case.volume)
    assert (three.sop_class_uid, two.sop_class_uid) == ("1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.33")
    assert three.sop_instance_uid != two.sop_instance_uid
    assert three.series_instance_uid != two.series_instance_uid
    assert read(three).ContentSequence == read(two).ContentSequence


@pytest.fixture(scope="module")
def two(case: Case) -> tuple[Dataset, Dataset]:
    findings = case.findings(sphere(case, (0, -10, 110), 9), sphere(case, (10, -20, 115), 5, side="right", probability=0.625), omitted=3)
    report, seg = encode(case, findings)
    assert seg is not None
    return report, seg


def test_each_finding_has_a_segment_group_and_a_line_group_under_the_tracking_uid_of_its_segment(
    case: Case, two: tuple[Dataset, Dataset]
) -> None:
    report, seg = two
    groups = found(case, "125007", report)
    tracking = [[str(i.UID) for i in found(case, "112040", g)] for g in groups]
    first, second = (str(s.TrackingUID) for s in seg.SegmentSequence)
    assert tracking[:4] == [[first], [first], [second], [second]]
    assert len(groups) == 5
    templates = [g.ContentTemplateSequence[0].TemplateIdentifier for g in groups]
    assert templates == ["1411", "1410", "1411", "1410", "1410"]


def test_numbers_stand_with_their_ucum_units(case: Case, two: tuple[Dataset, Dataset]) -> None:
    group = found(case, "125007", two[0])[2]
    numbers = {}
    for item in (i for i in group.ContentSequence if i.ValueType == "NUM"):
        value, unit = item.MeasuredValueSequence[0], item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0]
        assert unit.CodingSchemeDesignator == "UCUM"
        numbers[item.ConceptNameCodeSequence[0].CodeMeaning] = (float(value.NumericValue), unit.CodeValue)
    finding = sphere(case, (10, -20, 115), 5)
    assert numbers["Volume"] == (pytest.approx(finding.volume_ml, rel=1e-4), "ml")
    assert numbers["Long axis"] == (pytest.approx(finding.long_axis.length_mm, rel=1e-4), "mm")
    assert numbers["Certainty of Finding"] == (62.5, "%")


def test_finding_site_side_and_type_stand_in_both_groups(case: Case, two: tuple[Dataset, Dataset]) -> None:
    for group in found(case, "125007", two[0])[2:4]:
        assert coded(found(case, "121071", group)) == ["27925004"]
        assert coded(found(case, "363698007", group)) == ["39607008"]
        assert coded(found(case, "272741003", group)) == ["24028007"]


def test_every_group_names_the_algorithm_its_version_and_its_weights(case: Case, two: tuple[Dataset, Dataset]) -> None:
    for group in found(case, "125007", two[0]):
        assert text(found(case, "111001", group)) == ["Lung nodule 3D U-Net"]
        assert text(found(case, "111003", group)) == [f"0.1.0 weights sha256:{DIGEST}"]


def test_the_line_counts_from_the_corner_of_the_first_pixel(case: Case, two: tuple[Dataset, Dataset]) -> None:
    """PS3.3 C.18.6.1.2: the centre of the first pixel is (0.5, 0.5)."""
    axis = sphere(case, (0, -10, 110), 9).long_axis
    (line,) = (i for i in found(case, "125007", two[0])[1].ContentSequence if i.ValueType == "SCOORD")
    assert line.GraphicType == "POLYLINE"
    assert np.allclose(np.reshape(line.GraphicData, (2, 2)), np.array(axis.points_px) + 0.5)
    image = line.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert image == case.volume.sop_instance_uids[axis.slice_index]


def test_findings_end_with_the_summary_with_findings_and_say_how_many_are_omitted(case: Case, two: tuple[Dataset, Dataset]) -> None:
    assert coded(found(case, SUMMARY, two[0])) == ["111242"]
    comments = text(found(case, "121106", two[0]))
    assert comments == ["RESEARCH USE ONLY - NOT FOR DIAGNOSIS", "3 further findings are omitted: only the 2 most probable are reported."]


def test_no_finding_is_a_report(case: Case) -> None:
    report, seg = encode(case, case.findings())
    assert seg is None
    assert coded(found(case, SUMMARY, report)) == ["111241"]
    (group,) = found(case, "125007", report)
    assert len(found(case, "112040", group)) == 1
    assert [r.ReferencedSOPInstanceUID for r in evidence(report)] == list(case.volume.sop_instance_uids)


def test_a_refusal_is_a_report_with_the_reason_in_words(case: Case) -> None:
    report = refuse(case)
    assert coded(found(case, SUMMARY, report)) == ["111245"]
    assert text(found(case, "121106", report))[1] == "Not analysed (too-few-slices): the series has 2 slices - the package needs 8"
    assert [r.ReferencedSOPInstanceUID for r in evidence(report)] == list(case.volume.sop_instance_uids[:2])


def test_a_study_without_geometry_patient_or_time_can_still_be_refused_with_a_report(case: Case) -> None:
    bare = Dataset()
    bare.SOPClassUID, bare.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    bare.StudyInstanceUID, bare.SeriesInstanceUID = case.volume.study_instance_uid, "1.2.4"
    data = encode_refusal("modality", "no CT", [bare], case.identity, manufacturer="m", algorithm_name="a")
    assert coded(found(case, "121058", read(data))) == ["363679005"]


def test_a_report_is_unverified_research_of_a_named_device(case: Case, two: tuple[Dataset, Dataset]) -> None:
    for report in (two[0], encode(case, case.findings())[0], refuse(case)):
        assert (report.VerificationFlag, report.CompletionFlag, report.PreliminaryFlag) == ("UNVERIFIED", "COMPLETE", "PRELIMINARY")
        assert report.ContentQualification == "RESEARCH"
        assert report.SeriesDescription == "lung-nodule-ct 0.1.0 SR RESEARCH"
        assert (report.InstanceCreationDate, report.ContentTime) == ("20260304", "050607")
        assert text(found(case, "121013", report)) == ["lung-nodule-ct 0.1.0"]  # Device Observer Name
        assert text(found(case, "121014", report)) == ["dicomnode"]  # Manufacturer
        assert text(found(case, "121015", report)) == ["Lung nodule 3D U-Net"]  # Model Name
        assert len(found(case, "121012", report)) == 1  # UID
        assert report.PatientName == "Sphere^Synthetic"


@pytest.mark.parametrize(
    ("modality", "code"), [("CT", "25045-6"), ("MR", "25056-3"), ("DX", "43468-8"), ("CR", "43468-8"), ("XX", "363679005")]
)
def test_the_procedure_reported_follows_the_modality(case: Case, modality: str, code: str) -> None:
    assert coded(found(case, "121058", refuse(synthetic(Modality=modality)))) == [code]


def test_further_measurements_are_reported_and_concepts_have_the_standards_words(case: Case) -> None:
    plain = sphere(case, (0, -10, 110), 9)
    density = Measurement(
        name=Code(value="112031", scheme="DCM", meaning="Attenuation Coefficient"),
        value=-12.3456789,
        unit=Code(value="[hnsf'U]", scheme="UCUM", meaning="Hounsfield unit"),
        method=Code(value="373098007", scheme="SCT", meaning="Mean"),
    )
    axis = replace(plain.measurements[1], name=Code(value="103339001", scheme="SCT", meaning="LONG AXIS"))
    report, _ = encode(case, case.findings(replace(plain, measurements=(plain.measurements[0], axis, density))))
    (item,) = found(case, "112031", report)
    assert float(item.MeasuredValueSequence[0].NumericValue) == -12.3457
    assert {i.ConceptNameCodeSequence[0].CodeMeaning for i in found(case, "103339001", report)} == {"Long axis"}


def test_a_report_refers_to_no_segmentation_of_other_findings(case: Case) -> None:
    findings = case.findings(sphere(case, (0, -10, 110), 9))
    segmentation = encode_segmentation(findings, case.volume, case.headers, case.identity)
    assert segmentation is not None
    for said, given in ((case.findings(), segmentation), (findings, (segmentation, segmentation))):
        with pytest.raises(ValueError, match="segmentation"):
            encode_report(said, case.volume, case.headers, case.identity, given)


def test_a_refusal_needs_an_image_of_the_study(case: Case) -> None:
    with pytest.raises(ValueError, match="image"):
        encode_refusal("modality", "no CT", [], case.identity, manufacturer="m", algorithm_name="a")


def evidence(report: Dataset) -> list[Dataset]:
    return [
        instance
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    ]
