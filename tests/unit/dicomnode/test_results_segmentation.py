"""A SEG is the findings' voxels in their place, the patient as the images name him, and the same bytes each time."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from dicomnode.findings import Code, Finding, ResultObject, Segment
from dicomnode.results.decoding import decode_segmentation
from dicomnode.results.segmentation import _algorithm, _describe, encode_segmentation
from results_cases import DIGEST, Case, enhanced, finding_of, projection, sphere, synthetic

ENCODE_ELSEWHERE = """
import sys
from results_cases import sphere, synthetic
from dicomnode.results.segmentation import encode_segmentation
from dicomnode.results.report import encode_report
case = synthetic()
findings = case.findings(sphere(case, (0, -10, 110), 9))
seg = encode_segmentation(findings, case.volume, case.headers, case.identity)
report = encode_report(findings, case.volume, case.headers, case.identity, seg)
sys.stdout.buffer.write(seg.data + report.data)
"""


def encode(case: Case, *found: Finding) -> tuple[ResultObject, Dataset]:
    result = encode_segmentation(case.findings(*found), case.volume, case.headers, case.identity)
    assert result is not None
    return result, pydicom.dcmread(BytesIO(result.data))


def nodule(case: Case, **about: Any) -> Finding:
    return sphere(case, (0, -10, 110), 9, **about)


def box(case: Case, first: tuple[int, int, int], shape: tuple[int, int, int]) -> Finding:
    return finding_of(case, Segment(mask=np.ones(shape, dtype=np.bool_), origin=first))


def test_a_study_without_a_finding_has_no_segmentation() -> None:
    case = synthetic()
    assert encode_segmentation(case.findings(), case.volume, case.headers, case.identity) is None


@pytest.mark.parametrize("zone", ["Pacific/Auckland", "America/Lima"])
def test_another_process_elsewhere_and_later_writes_the_same_bytes(zone: str) -> None:
    from dicomnode.results.report import encode_report

    case = synthetic()
    findings = case.findings(nodule(case))
    seg, _ = encode(case, nodule(case))
    report = encode_report(findings, case.volume, case.headers, case.identity, seg)
    root = Path(__file__).parent.parent.parent.parent
    environment = os.environ | {"TZ": zone, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", ENCODE_ELSEWHERE], env=environment, cwd=root, check=True, capture_output=True).stdout
    assert there == seg.data + report.data


def test_no_random_uid_is_written() -> None:
    case = synthetic()
    _, seg = encode(case, nodule(case))
    known = {str(h.SOPInstanceUID) for h in case.headers} | {case.volume.study_instance_uid, case.volume.series_instance_uid}
    written = {str(e.value) for e in seg.iterall() if e.VR == "UI"} - known
    assert all(uid.startswith(("2.25.", "1.2.840.10008.")) for uid in written - {case.volume.frame_of_reference_uid})


def test_frames_without_a_finding_are_left_out_and_the_slice_spacing_stays() -> None:
    case = synthetic()
    _, seg = encode(case, box(case, (1, 5, 5), (2, 4, 4)), box(case, (8, 20, 20), (1, 4, 6)))
    assert seg.NumberOfFrames == 3
    assert float(seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices) == 2.5


def test_a_frame_size_that_fills_no_whole_bytes_loses_no_pixel() -> None:
    case = synthetic(shape=(5, 11, 13))
    found = [box(case, (0, 0, 0), (5, 11, 13)), box(case, (1, 3, 3), (3, 1, 1))]
    _, seg = encode(case, found[0])
    assert seg.NumberOfFrames == 5
    assert decode_segmentation(seg, case.volume)[0].count == 5 * 11 * 13


def test_overlapping_findings_both_keep_all_their_voxels() -> None:
    case = synthetic()
    _, seg = encode(case, box(case, (2, 10, 10), (3, 6, 6)), box(case, (3, 13, 13), (3, 6, 6)))
    assert seg.SegmentsOverlap == "YES"
    assert [s.count for s in decode_segmentation(seg, case.volume)] == [108, 108]


def test_findings_that_only_touch_do_not_overlap() -> None:
    case = synthetic()
    _, seg = encode(case, box(case, (2, 10, 10), (3, 6, 6)), box(case, (2, 16, 10), (3, 6, 6)))
    assert seg.SegmentsOverlap == "NO"
    assert [s.count for s in decode_segmentation(seg, case.volume)] == [108, 108]


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 126", "Διονυσιος"),
        ("ISO_IR 127", "قباني^لنزار"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 100", "Buc^Jérôme"),
        (None, "Plain^Ascii"),
    ],
)
def test_the_patients_name_survives_in_his_own_script(character_set: Any, name: str) -> None:
    case = synthetic(patient_name=name, character_set=character_set)
    case = replace(case, headers=[_through_bytes(h) for h in case.headers])
    _, seg = encode(case, replace(nodule(case), label="Knötchen ≥ 3 mm — µ"))
    assert seg.get("SpecificCharacterSet") == case.headers[0].get("SpecificCharacterSet")
    assert str(seg.PatientName) == name
    assert seg.SegmentSequence[0].SegmentLabel == "Knotchen >= 3 mm - u 1"


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_sequences_of_the_study_are_copied_from_every_transfer_syntax(syntax: str) -> None:
    procedure = Dataset()
    procedure.CodeValue, procedure.CodingSchemeDesignator, procedure.CodeMeaning = "CTCHEST", "99LOCAL", "CT chest"
    case = synthetic(ProcedureCodeSequence=[procedure])
    case = replace(case, headers=[_through_bytes(h, syntax) for h in case.headers])
    _, seg = encode(case, nodule(case))
    assert seg.ProcedureCodeSequence[0].CodeMeaning == "CT chest"


@pytest.mark.parametrize("missing", ["PatientName", "PatientBirthDate", "StudyTime", "StudyID", "AccessionNumber", "SeriesNumber"])
def test_an_attribute_the_images_lack_is_empty_and_never_invented(missing: str) -> None:
    case = synthetic()
    for header in case.headers:
        delattr(header, missing)
    _, seg = encode(case, nodule(case))
    assert missing in seg
    if missing != "SeriesNumber":
        assert not seg[missing].value


def test_a_value_that_the_standard_does_not_know_is_copied_as_it_is() -> None:
    case = synthetic(PatientSex="U")
    assert encode(case, nodule(case))[1].PatientSex == "U"


@pytest.mark.parametrize(("keyword", "tag"), [("SliceThickness", 0x00180050), ("LossyImageCompressionRatio", 0x00282112)])
def test_an_optional_number_of_the_source_that_is_none_stops_no_result(keyword: str, tag: int) -> None:
    case = synthetic(LossyImageCompression="01", LossyImageCompressionMethod="ISO_10918_1")
    for header in case.headers:
        raw = RawDataElement(Tag(tag), "DS", 6, b"1.2.mm", 0, False, True)
        header._dict[Tag(tag)] = raw  # as it lies in a data set that was read and not looked at
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert encode(case, nodule(case))[1].SegmentSequence


def test_contrast_geometry_and_lossy_compression_of_the_source_are_said() -> None:
    case = synthetic(LossyImageCompression="01", LossyImageCompressionRatio="9.5", LossyImageCompressionMethod="ISO_10918_1")
    _, seg = encode(case, nodule(case))
    assert (seg.LossyImageCompression, float(seg.LossyImageCompressionRatio)) == ("01", 9.5)
    assert seg.FrameOfReferenceUID == case.volume.frame_of_reference_uid


def test_every_label_says_research_and_names_the_algorithm_and_its_weights() -> None:
    case = synthetic()
    _, seg = encode(case, nodule(case))
    assert seg.ContentQualification == "RESEARCH"
    assert seg.SeriesDescription == "lung-nodule-ct 0.1.0 SEG RESEARCH"
    assert "RESEARCH USE ONLY - NOT FOR DIAGNOSIS" in seg.ImageComments
    assert "RESEARCH USE ONLY - NOT FOR DIAGNOSIS" in seg.ContentDescription
    assert list(seg.SoftwareVersions)[:2] == ["lung-nodule-ct 0.1.0", DIGEST]
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("Lung nodule 3D U-Net", "0.1.0")
    assert DIGEST in str(algorithm.AlgorithmParameters)
    purposes = [i.PurposeOfReferenceCodeSequence[0].CodeValue for i in seg.ContributingEquipmentSequence]
    assert purposes == ["109101", "109102", "109102"]  # the scanner, the encoder, the node
    assert seg.ContributingEquipmentSequence[-1].ManufacturerModelName == "Lung nodule 3D U-Net"


def test_a_long_package_name_never_pushes_the_word_research_out() -> None:
    case = synthetic()
    case = replace(case, identity=replace(case.identity, package="x" * 64))
    _, seg = encode(case, nodule(case))
    assert seg.SeriesDescription.endswith(" SEG RESEARCH")
    assert len(seg.SeriesDescription) == 64


def test_site_side_and_colour_stand_in_the_segment() -> None:
    case = synthetic()
    _, seg = encode(case, nodule(case, side="right"))
    item = seg.SegmentSequence[0]
    assert item.AnatomicRegionSequence[0].CodeValue == "39607008"
    assert item.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0].CodeMeaning == "Right"
    assert item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Nodule"
    assert len(item.RecommendedDisplayCIELabValue) == 3
    assert item.SegmentAlgorithmType == "AUTOMATIC"


def test_a_finding_without_site_has_no_region() -> None:
    case = synthetic()
    _, seg = encode(case, replace(nodule(case), site=None, side=None))
    assert "AnatomicRegionSequence" not in seg.SegmentSequence[0]


def test_a_meaning_outside_of_ascii_is_written_in_ascii() -> None:
    case = synthetic()
    _, seg = encode(case, replace(nodule(case), site=Code(value="1", scheme="99X", meaning="Poumon lésé")))
    assert seg.SegmentSequence[0].AnatomicRegionSequence[0].CodeMeaning == "Poumon lese"


def test_all_analysed_images_are_referenced_and_each_frame_names_its_own() -> None:
    case = synthetic()
    _, seg = encode(case, box(case, (4, 5, 5), (1, 3, 3)))
    assert [r.ReferencedSOPInstanceUID for r in seg.SourceImageSequence] == list(case.volume.sop_instance_uids)
    frame = seg.PerFrameFunctionalGroupsSequence[0]
    assert frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID == case.volume.sop_instance_uids[4]


def test_headers_may_come_in_any_order_and_more_than_needed() -> None:
    case = synthetic()
    expected, _ = encode(case, nodule(case))
    shuffled = replace(case, headers=[*synthetic(shape=(3, 50, 60), SOPInstanceUID="9.9").headers, *reversed(case.headers)])
    assert encode(shuffled, nodule(case))[0].data == expected.data


@pytest.mark.parametrize(("number", "expected"), [("3", 9004), ("3000566", 3009567), ("", 9001), ("-5", 9001), ("2147483647", 2147483647)])
def test_the_series_sorts_after_its_images(number: str, expected: int) -> None:
    case = synthetic(SeriesNumber=number or None)
    assert encode(case, nodule(case))[1].SeriesNumber == expected


def test_dates_are_the_runs_own_in_the_time_zone_of_the_study() -> None:
    case = synthetic(TimezoneOffsetFromUTC="-0330")
    case = replace(case, identity=replace(case.identity, created_at=datetime(2026, 3, 4, 1, 2, 3, tzinfo=UTC)))
    _, seg = encode(case, nodule(case))
    assert (seg.InstanceCreationDate, seg.InstanceCreationTime) == ("20260303", "213203")
    assert (seg.ContentDate, seg.SeriesTime, seg.TimezoneOffsetFromUTC) == ("20260303", "213203", "-0330")
    assert (seg.StudyDate, seg.StudyTime) == ("20260303", "101112")


def _through_bytes(header: Dataset, syntax: str = "1.2.840.10008.1.2.1") -> Dataset:
    """A header as it comes from a file: values not yet decoded."""
    buffer = BytesIO()
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(buffer, enforce_file_format=True, implicit_vr=syntax.endswith("1.2"), little_endian=not syntax.endswith("2.2"))
    buffer.seek(0)
    return pydicom.dcmread(buffer, stop_before_pixels=True)


@pytest.mark.parametrize("kind", ["seg", "seg-labelmap"])
@pytest.mark.parametrize("case", [synthetic("oblique"), enhanced("CT"), projection("DX")], ids=["oblique", "frames", "film"])
def test_the_bytes_are_those_that_pydicom_writes(case: Case, kind: str) -> None:
    """Frames are written by hand; whoever reads the file and writes it again must get the same file."""
    mask = np.ones((1, 4, 5), dtype=np.bool_)
    for count in (1, 2):
        findings = case.findings(*(finding_of(case, Segment(mask=mask, origin=(0, 3, 7 * n))) for n in range(count)))
        made = encode_segmentation(findings, case.volume, case.headers, case.identity, kind=kind)
        assert made is not None
        image, again = pydicom.dcmread(BytesIO(made.data)), BytesIO()
        for element in image.iterall():
            element.value  # noqa: B018  # it is decoded, so it is encoded anew
        image.save_as(again, enforce_file_format=True)
        assert again.getvalue() == made.data


def test_segments_are_described_as_the_library_describes_them() -> None:
    """Of many of one kind it describes the first, and what differs is put in place by hand."""
    case, mask = synthetic(), np.ones((1, 4, 5), dtype=np.bool_)
    plain = [finding_of(case, Segment(mask=mask, origin=(0, 3, 7 * n))) for n in range(6)]
    found = [
        plain[0],
        replace(plain[1], shape="box", label="Gr\u00f6\u00dfe"),
        replace(plain[2], site=None, side=None),
        replace(plain[3], side=None, colour_cielab=(20.0, -70.5, 33.0)),
        replace(plain[4], shape="box", label="An odd number"),
        replace(plain[5], colour_cielab=(99.0, 0.0, 1.0)),
    ]
    findings = case.findings(*found)
    made = encode_segmentation(findings, case.volume, case.headers, case.identity)
    assert made is not None
    algorithm = _algorithm(findings, case.identity)
    expected = [_describe(finding, n, algorithm, case.identity) for n, finding in enumerate(findings.findings, start=1)]
    assert list(pydicom.dcmread(BytesIO(made.data)).SegmentSequence) == expected


@pytest.mark.parametrize("columns", [64, 61, 7])
@pytest.mark.parametrize("empty_frames", [False, True])
def test_the_pixels_are_the_masks_bit_by_bit_wherever_rows_begin(columns: int, empty_frames: bool) -> None:
    """Whether rows begin with a byte or within one, and whatever the frame before has there."""
    case, random = synthetic(shape=(9, 21, columns)), np.random.default_rng(3)
    masks = [random.random(shape) < 0.4 for shape in ((9, 21, columns), (3, 2, 5), (4, 1, 1), (2, 21, 3))]
    masks[0][4] = masks[1][1] = False  # slices of a finding without a voxel
    for mask in masks:
        mask[0, 0, 0] = mask[-1, -1, -1] = True
    origins = [(0, 0, 0), (2, 8, columns - 5), (5, 20, columns - 1), (7, 0, 1)]
    findings = [finding_of(case, Segment(mask=mask, origin=origin)) for mask, origin in zip(masks, origins, strict=True)]
    made = encode_segmentation(case.findings(*findings), case.volume, case.headers, case.identity, empty_frames=empty_frames)
    assert made is not None
    expected = []
    for mask, (k, r, c) in zip(masks, origins, strict=True):
        whole = np.zeros((9, 21, columns), dtype=np.bool_)
        whole[k : k + mask.shape[0], r : r + mask.shape[1], c : c + mask.shape[2]] = mask
        expected += [frame for frame in whole if empty_frames or frame.any()]
    seg = pydicom.dcmread(BytesIO(made.data))
    assert seg.NumberOfFrames == len(expected)
    bits = np.packbits(np.stack(expected).ravel(), bitorder="little").tobytes()
    assert seg.PixelData == bits + b"\0" * (len(bits) % 2)
