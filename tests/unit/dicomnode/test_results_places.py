"""Frames of multi-frame images, radiographs, boxes, heat maps and classes are said so that no reader can take them for something else."""

import copy
from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from dicomnode.findings import Finding, Segment
from dicomnode.results.decoding import decode_segmentation
from dicomnode.results.report import encode_refusal, encode_report
from dicomnode.results.segmentation import encode_segmentation
from results_cases import Case, another_series, box_of, enhanced, finding_of, heat_map_of, projection, scores, synthetic


def encode(case: Case, *found: Finding, **more: object) -> tuple[Dataset, Dataset]:
    findings = case.findings(*found, **more)
    seg = encode_segmentation(findings, case.volume, case.headers, case.identity)
    assert seg is not None
    report = encode_report(findings, case.volume, case.headers, case.identity, seg)
    return pydicom.dcmread(BytesIO(seg.data)), pydicom.dcmread(BytesIO(report.data))


def outline(case: Case, first: tuple[int, int, int], shape: tuple[int, int, int] = (1, 4, 6)) -> Finding:
    return finding_of(case, Segment(mask=np.ones(shape, dtype=np.bool_), origin=first))


def below(item: Dataset) -> list[Dataset]:
    here = list(item.get("ContentSequence", []))
    return here + [j for i in here for j in below(i)]


def concept(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def groups(report: Dataset) -> list[Dataset]:
    return [item for item in below(report) if concept(item) == "125007"]


def texts(report: Dataset) -> list[str]:
    return [str(item.TextValue) for item in below(report) if concept(item) == "121106"]


def numbers(group: Dataset) -> dict[str, tuple[float, str]]:
    found = {}
    for item in (i for i in group.ContentSequence if i.ValueType == "NUM"):
        value = item.MeasuredValueSequence[0]
        unit = value.MeasurementUnitsCodeSequence[0]
        assert unit.CodingSchemeDesignator == "UCUM"
        found[str(item.ConceptNameCodeSequence[0].CodeMeaning)] = (float(value.NumericValue), str(unit.CodeValue))
    return found


def test_a_frame_of_the_segmentation_names_its_frame_and_lies_where_that_lies() -> None:
    case = enhanced("MR")
    seg, report = encode(case, outline(case, (3, 10, 20), (2, 4, 6)))
    assert case.volume.frame_numbers is not None
    for item, k in zip(seg.PerFrameFunctionalGroupsSequence, (3, 4), strict=True):
        source = item.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPClassUID == case.headers[0].SOPClassUID
        assert source.ReferencedFrameNumber == case.volume.frame_numbers[k]
        there = case.headers[0].PerFrameFunctionalGroupsSequence[source.ReferencedFrameNumber - 1].PlanePositionSequence[0]
        assert item.PlanePositionSequence[0].ImagePositionPatient == there.ImagePositionPatient
    assert [str(r.ReferencedSOPInstanceUID) for r in seg.SourceImageSequence] == [str(case.headers[0].SOPInstanceUID)]
    line, _ = (item for item in below(report) if item.ValueType == "SCOORD")  # and the border of the image
    assert line.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber == case.volume.frame_numbers[3]


def test_an_image_of_frames_stands_once_in_library_and_evidence() -> None:
    case = enhanced("CT")
    _, report = encode(case, outline(case, (3, 10, 20)))
    images = [item for item in below(report) if item.ValueType == "IMAGE" and item.RelationshipType == "CONTAINS"]
    assert [concept(item) for item in images] == ["260753009", "121191"]  # the image, and the segment
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert [len(series.ReferencedSOPSequence) for series in evidence] == [1, 1]  # the image, the SEG


def test_a_frame_without_functional_groups_lies_where_the_volume_puts_it() -> None:
    case = enhanced("CT", orientation="oblique")
    bare = copy.deepcopy(case.headers[0])
    del bare.PerFrameFunctionalGroupsSequence, bare.SharedFunctionalGroupsSequence
    seg, _ = encode(replace(case, headers=[bare]), outline(case, (3, 10, 20)))
    (segment,) = decode_segmentation(seg, case.volume)
    assert segment.centre == pytest.approx(case.volume.to_lps(np.array([3, 11.5, 22.5])), abs=1e-5)


@pytest.mark.parametrize("modality", ["CR", "DX", "MG", "XA"])
def test_a_radiograph_has_a_segmentation_without_a_place_in_space(modality: str) -> None:
    case = projection(modality, PositionReferenceIndicator="XY")
    case.headers[0].FrameOfReferenceUID = "1.2.3"  # some radiographs have one, and no position in it
    seg, _ = encode(case, outline(case, (0, 10, 20)))
    assert "FrameOfReferenceUID" not in seg
    for groups_ in (seg.SharedFunctionalGroupsSequence[0], *seg.PerFrameFunctionalGroupsSequence):
        assert "PlanePositionSequence" not in groups_
        assert "PlaneOrientationSequence" not in groups_
    source = seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    assert (source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID) == (case.headers[0].SOPClassUID, case.headers[0].SOPInstanceUID)
    assert (seg.Rows, seg.Columns) == (80, 60)
    assert list(seg.PatientOrientation) == ["L", "F"]


@pytest.mark.parametrize("calibration", ["patient", "detector", "none"])
def test_the_segmentation_of_a_radiograph_has_no_pixel_measures(calibration: str) -> None:
    """GDCM 3.0.21 takes a pixel spacing for a volume's, looks for an orientation, and ends the PACS that asked it for a frame."""
    case = projection("DX", calibration=calibration)
    seg, _ = encode(case, outline(case, (0, 10, 20)))
    assert "PixelMeasuresSequence" not in seg.SharedFunctionalGroupsSequence[0]
    assert not any("PixelMeasuresSequence" in frame for frame in seg.PerFrameFunctionalGroupsSequence)


@pytest.mark.parametrize(
    ("calibration", "area", "axis", "words"),
    [
        ("patient", (24 * 0.2 * 0.15, "mm2"), "mm", None),
        ("detector", (24 * 0.2 * 0.15, "mm2"), "mm", "measured at the detector"),
        ("none", (24, "{pixels}"), "{pixels}", "in pixels"),
    ],
)
def test_numbers_of_a_radiograph_say_what_a_millimetre_is(calibration: str, area: tuple[float, str], axis: str, words: str | None) -> None:
    case = projection("CR", calibration=calibration)
    _, report = encode(case, outline(case, (0, 10, 20)))
    said = numbers(groups(report)[0])
    assert said["Area"] == (pytest.approx(area[0]), area[1])
    assert said["Long axis"][1] == axis
    assert numbers(groups(report)[1])["Long axis"] == said["Long axis"]
    told = [text for text in texts(report) if "detector" in text or "pixels" in text]
    assert [words in text for text in told] == ([True] if words else [])


def test_both_groups_of_a_radiograph_are_planar() -> None:
    """TID 1411 is of volumes; the segment is named by its frame, beside which no segment number may stand (PS3.3 C.18.4)."""
    case = projection("DX")
    seg, report = encode(case, outline(case, (0, 10, 20)), box_of(case, (0, 30, 30), (1, 5, 5)))
    assert [group.ContentTemplateSequence[0].TemplateIdentifier for group in groups(report)] == ["1410", "1410", "1410", "1410", "1410"]
    references = [item.ReferencedSOPSequence[0] for item in below(report) if concept(item) == "121214"]
    assert [reference.ReferencedFrameNumber for reference in references] == [1, 2]
    assert not any("ReferencedSegmentNumber" in reference for reference in references)
    assert {reference.ReferencedSOPInstanceUID for reference in references} == {seg.SOPInstanceUID}


def test_a_box_and_a_heat_map_never_pass_for_an_outline() -> None:
    case = synthetic()
    warm = heat_map_of(case, Segment(mask=np.ones((2, 3, 3), dtype=np.bool_), origin=(6, 30, 30)))
    seg, report = encode(case, outline(case, (1, 5, 5)), box_of(case, (2, 10, 20), (3, 5, 8)), warm)
    assert [str(s.SegmentLabel) for s in seg.SegmentSequence] == ["Lung nodule 1", "Lung nodule 2, box", "Pneumothorax 3, heat map"]
    assert ["not an outline" in str(s.get("SegmentDescription", "")) for s in seg.SegmentSequence] == [False, True, True]
    assert {s.SegmentedPropertyTypeCodeSequence[0].CodeValue for s in seg.SegmentSequence} == {"27925004"}
    assert any("no outlines" in text for text in texts(report))


@pytest.mark.parametrize("case", [synthetic(), enhanced("MR"), projection("DX")], ids=["slices", "frames", "radiograph"])
def test_a_box_is_a_closed_rectangle_around_its_pixels_on_its_middle_slice(case: Case) -> None:
    first, shape = ((0, 10, 20), (1, 5, 8)) if case.volume.is_projection else ((2, 10, 20), (3, 5, 8))
    _, report = encode(case, box_of(case, first, shape))
    group = groups(report)[1]
    (region,) = (item for item in group.ContentSequence if item.ValueType == "SCOORD")
    assert region.GraphicType == "POLYLINE"
    assert np.reshape(region.GraphicData, (-1, 2)).tolist() == [[24, 10], [28, 10], [28, 15], [20, 15], [20, 10], [24, 10]]
    middle = first[0] + shape[0] // 2
    reference = region.ContentSequence[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSOPInstanceUID == case.volume.sop_instance_uids[middle]
    assert reference.get("ReferencedFrameNumber") == (case.volume.frame_numbers[middle] if case.volume.frame_numbers else None)
    assert numbers(group) == {"Certainty of Finding": (90.0, "%")}
    assert numbers(groups(report)[0]) == {"Certainty of Finding": (90.0, "%")}
    (purpose,) = (item for item in group.ContentSequence if concept(item) == "130400")
    assert purpose.ConceptCodeSequence[0].CodeMeaning == "Bounded by"


@pytest.mark.parametrize("positive", [True, False])
def test_each_class_of_a_classification_gives_its_probability_positive_or_not(positive: bool) -> None:
    case = projection("DX")
    given = scores() if positive else tuple(replace(score, positive=False, threshold=0.9) for score in scores())
    findings = case.findings(scores=given)
    report = pydicom.dcmread(BytesIO(encode_report(findings, case.volume, case.headers, case.identity, None).data))
    classes = groups(report)[:-1]
    assert [group.ContentTemplateSequence[0].TemplateIdentifier for group in classes] == ["1410"] * 3
    said = [
        (str(next(i for i in g.ContentSequence if concept(i) == "121071").ConceptCodeSequence[0].CodeMeaning), numbers(g)) for g in classes
    ]
    assert said == [
        ("Pneumothorax", {"Certainty of Finding": (81.25, "%")}),
        ("Pleural effusion", {"Certainty of Finding": (25.0, "%")}),
        ("Cardiomegaly", {"Certainty of Finding": (3.05, "%")}),
    ]
    first = f"Pneumothorax: 81.2 %, {'positive' if positive else 'negative'} at a threshold of {50.0 if positive else 90.0:.1f} %."
    assert first in texts(report)
    tracking = [str(item.UID) for group in groups(report) for item in group.ContentSequence if concept(item) == "112040"]
    assert len(set(tracking)) == 4


@pytest.mark.parametrize("case", [synthetic(), enhanced("MR"), projection("DX")], ids=["slices", "frames", "radiograph"])
def test_each_tracking_uid_of_a_report_has_coordinates_on_an_image(case: Case) -> None:
    """OHIF 3.13 opens no report without them, not even one that finds nothing; what is of the whole image has its border."""
    silent = pydicom.dcmread(BytesIO(encode_report(case.findings(), case.volume, case.headers, case.identity, None).data))
    _, found = encode(case, outline(case, (0, 10, 20)), scores=scores())
    refused = encode_refusal("too-few", "few", case.headers, case.identity, manufacturer="dicomnode", algorithm_name="U-Net")
    for report in (silent, found, pydicom.dcmread(BytesIO(refused.data))):
        lines: dict[str, list[Dataset]] = {}
        for group in groups(report):
            (tracking,) = (str(item.UID) for item in group.ContentSequence if concept(item) == "112040")
            lines.setdefault(tracking, []).extend(item for item in below(group) if item.ValueType == "SCOORD")
        assert [len(of_one) for of_one in lines.values()] == [1] * len(lines)
        border = list(lines.values())[-1][0]
        rows, columns = case.headers[0].Rows, case.headers[0].Columns
        around = [[columns / 2, 0], [columns, 0], [columns, rows], [0, rows], [0, 0], [columns / 2, 0]]
        assert np.reshape(border.GraphicData, (-1, 2)).tolist() == around
        reference = border.ContentSequence[0].ReferencedSOPSequence[0]
        assert reference.ReferencedSOPInstanceUID in case.volume.sop_instance_uids
        assert ("ReferencedFrameNumber" in reference) == (case.volume.frame_numbers is not None)


def test_notes_are_told_whole() -> None:
    case = synthetic()
    note = "FLAIR alone: T1 with contrast is absent. " * 40
    assert note.strip() in texts(encode(case, outline(case, (1, 5, 5)), notes=(note,))[1])


def test_all_series_of_a_set_stand_in_library_and_evidence() -> None:
    case = synthetic(Modality="MR")
    beside = [another_series(synthetic(Modality="MR"), number) for number in (7, 8, 9)]
    findings = case.findings(other_series=("2.25.7", "2.25.8", "2.25.9"))
    headers = [header for one in (*reversed(beside), case) for header in one.headers]
    report = pydicom.dcmread(BytesIO(encode_report(findings, case.volume, headers, case.identity, None).data))
    library = [[concept(i) for i in item.ContentSequence].count("260753009") for item in below(report) if concept(item) == "126200"]
    assert library == [12, 12, 12, 12]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert {str(series.SeriesInstanceUID): len(series.ReferencedSOPSequence) for series in evidence} == {
        str(case.volume.series_instance_uid): 12, "2.25.7": 12, "2.25.8": 12, "2.25.9": 12,
    }  # fmt: skip


def test_encoding_changes_no_header() -> None:
    for case in (synthetic(), enhanced("MR"), projection("DX", calibration="none")):
        before = [header.to_json() for header in case.headers]
        encode(case, outline(case, (0, 10, 20)))
        assert [header.to_json() for header in case.headers] == before


def test_fifty_segments_that_overlap_on_many_slices_are_as_large_as_their_bits() -> None:
    """They are never held as one array of slices x rows x columns x segments, here 0.1 GB."""
    case = synthetic(shape=(60, 200, 200))
    small, mask = box_of(case, (0, 0, 0), (1, 3, 3)), np.ones((40, 60, 50), dtype=np.bool_)
    found = [replace(small, segment=Segment(mask=mask, origin=(k % 20, 80 + k, 90))) for k in range(50)]
    seg, _ = encode(case, *found)
    assert seg.NumberOfFrames == 50 * 40
    assert len(seg.PixelData) == 50 * 40 * 200 * 200 // 8
    assert seg.SegmentsOverlap == "YES"


@pytest.mark.parametrize(
    "case", [projection("DX"), projection("XA", frame=2), enhanced("MR"), projection("MG")], ids=["DX", "XA", "MR", "MG"]
)
def test_every_modality_can_be_refused(case: Case) -> None:
    data = encode_refusal("body-part", "another part", case.headers, case.identity, manufacturer="m", algorithm_name="a").data
    report = pydicom.dcmread(BytesIO(data))
    assert "Not analysed (body-part): another part" in texts(report)


def test_a_refusal_has_the_evidence_of_hundreds_of_images_of_many_kinds() -> None:
    headers = []
    for number in range(900):
        header = Dataset()
        header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", f"2.25.1.{number}"
        header.StudyInstanceUID, header.SeriesInstanceUID = "2.25.5", f"2.25.{number % 7}"
        headers.append(header)
    data = encode_refusal("modality", "no CT", headers, synthetic().identity, manufacturer="m", algorithm_name="a").data
    evidence = pydicom.dcmread(BytesIO(data)).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert sum(len(series.ReferencedSOPSequence) for series in evidence) == 900
    assert len(evidence) == 7


def test_a_malformed_number_of_an_image_stops_no_refusal() -> None:
    case = projection("DX")
    tag = Tag("Rows")
    case.headers[0]._dict[tag] = RawDataElement(tag, "US", 1, b"\x01", 0, False, True)  # as it lies in a data set that was read
    data = encode_refusal("pixel-format", "no rows", case.headers, case.identity, manufacturer="m", algorithm_name="a").data
    assert "Not analysed (pixel-format): no rows" in texts(pydicom.dcmread(BytesIO(data)))
