"""Pictures show the right slice the right way round with the outline where the finding is, and a wrong one doesn't leave."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Finding, Findings, ResultObject, Segment
from dicomnode.results.capture import MOST, encode_captures, encode_reason
from dicomnode.results.proof_captures import prove_captures
from results_cases import Case, box_of, enhanced, finding_of, heat_map_of, projection, scores, sphere, synthetic, written_again

RAMP = 4.0  # of value from voxel to voxel


def textured(case: Case) -> Case:
    """The case with values that say which way round a slice is, and which slice it is."""
    k, r, c = np.indices(case.volume.voxels.shape)
    bright = (abs(r - 6 - k) < 4) & (abs(c - 12 - 2 * k) < 6)
    values = (-800 + RAMP * r + 2 * RAMP * c + 500 * bright).astype(np.float32)
    return replace(case, volume=replace(case.volume, voxels=values))


def pictures(case: Case, findings: Findings) -> tuple[ResultObject, ...]:
    return encode_captures(findings, case.volume, case.headers, case.identity)


def read(made: ResultObject) -> Dataset:
    return pydicom.dcmread(BytesIO(made.data))


def coloured(image: Dataset) -> NDArray[np.bool_]:
    """Where the picture has colour, above the words: these begin with a yellow line."""
    pixels = image.pixel_array.astype(int)
    return np.asarray(np.ptp(pixels, axis=2) > 48)


def pair(case: Case) -> Findings:
    """Two outlines, far apart; the second in a colour that no screen can show in full."""
    wedge = Segment(mask=np.tri(9, 7, 2, dtype=np.bool_)[None].repeat(3, axis=0), origin=(2, 20, 30))
    findings = case.findings(finding_of(case, wedge), finding_of(case, Segment(mask=np.ones((2, 6, 5), dtype=np.bool_), origin=(8, 12, 8))))
    return replace(findings, findings=(findings.findings[0], replace(findings.findings[1], colour_cielab=(70.0, 60.0, 65.0))))


@pytest.mark.parametrize(
    "case",
    [
        synthetic(),
        synthetic("coronal", reverse=True),
        synthetic("oblique"),
        synthetic("sagittal", spacing=(1.0, 2.5, 0.7)),
        enhanced("MR"),
    ],
    ids=["axial", "coronal", "oblique", "oblong pixels", "frames"],
)
def test_each_finding_is_outlined_on_its_slice(case: Case) -> None:
    case = textured(case)
    findings = pair(case)
    made = pictures(case, findings)
    prove_captures(made, findings, case.volume)
    assert len(made) == 2
    for number, (one, finding) in enumerate(zip(made, findings.findings, strict=True), start=1):
        image = read(one)
        assert finding.long_axis is not None
        k = finding.long_axis.slice_index
        (source,) = image.SourceImageSequence
        assert source.ReferencedSOPInstanceUID == case.volume.sop_instance_uids[k]
        assert source.get("ReferencedFrameNumber") == (case.volume.frame_numbers[k] if case.volume.frame_numbers else None)
        assert (image.InstanceNumber, image.SeriesNumber, image.SeriesDescription) == (number, 9006, "lung-nodule-ct 0.1.0 OT RESEARCH")
        _, row_mm, column_mm = case.volume.spacing_mm
        scale = 1024 / max(50 * row_mm, 60 * column_mm)
        left, top, right, bottom = finding.bounds_px
        middle = np.argwhere(coloured(image)[: round(50 * row_mm * scale)])
        edges = np.array([top, left]), np.array([bottom, right])
        for there, wanted in zip((middle.min(axis=0), middle.max(axis=0)), edges, strict=True):
            assert there == pytest.approx((wanted + 0.5) * scale * np.array([row_mm, column_mm]), abs=3)


def test_a_picture_is_an_image_of_the_study_that_says_what_it_is() -> None:
    case = synthetic(character_set=["", "ISO 2022 IR 87"], patient_name="Yamada^Tarou=山田^太郎=やまだ^たろう", PatientPosition="HFS")
    findings = case.findings(sphere(case, (0, -10, 110), 9))
    (made,) = pictures(case, findings)
    image = read(made)
    assert str(image.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
    assert (image.StudyInstanceUID, image.AccessionNumber) == (case.volume.study_instance_uid, "A1")
    assert image.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert (image.BurnedInAnnotation, image.ContentQualification, image.Modality) == ("YES", "RESEARCH", "OT")
    assert image.ImageType == ["DERIVED", "SECONDARY"]
    assert "RESEARCH USE ONLY" in image.DerivationDescription
    assert "RESEARCH USE ONLY" in image.ImageComments
    assert list(image.PatientOrientation) == ["L", "P"]
    assert (image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture) == (image.ContentDate, image.ContentTime) == ("20260304", "050607")
    assert image.SeriesInstanceUID != case.volume.series_instance_uid


def test_a_second_encoding_gives_the_same_bytes() -> None:
    case = textured(synthetic())
    once, again = (pictures(case, pair(case)) for _ in range(2))
    assert [made.data for made in once] == [made.data for made in again]
    assert len({made.sop_instance_uid for made in once}) == 2


@pytest.mark.parametrize(
    ("orientation", "letters"),
    [("axial", ["L", "P"]), ("coronal", ["L", "F"]), ("sagittal", ["P", "F"]), ("oblique", ["LP", "PHR"])],
)
def test_rows_and_columns_say_where_they_run(orientation: str, letters: list[str]) -> None:
    case = synthetic(orientation)
    (made,) = pictures(case, case.findings())
    assert list(read(made).PatientOrientation) == letters


def test_a_film_has_one_picture_with_all_that_was_found() -> None:
    case = textured(projection("DX"))
    wedge = Segment(mask=np.tri(9, 7, 2, dtype=np.bool_)[None], origin=(0, 50, 8))
    findings = case.findings(box_of(case, (0, 22, 33), (1, 10, 12), side="right"), heat_map_of(case, wedge), scores=scores())
    (made,) = pictures(case, findings)
    prove_captures([made], findings, case.volume)
    assert list(read(made).PatientOrientation) == ["L", "F"]  # as the film says


def test_no_finding_is_a_picture_of_the_middle_without_an_outline() -> None:
    case = textured(synthetic())
    (made,) = pictures(case, case.findings())
    prove_captures([made], case.findings(), case.volume)
    (source,) = read(made).SourceImageSequence
    assert source.ReferencedSOPInstanceUID == case.volume.sop_instance_uids[6]


def test_a_reason_is_words_alone() -> None:
    case = synthetic()
    (made,) = encode_reason("too-few-slices", "2 slices", case.headers, case.identity, manufacturer="m", algorithm_name="a")
    image = read(made)
    assert "SourceImageSequence" not in image
    assert image.StudyInstanceUID == case.volume.study_instance_uid
    assert image.pixel_array.max() > 200


def test_beyond_ten_pictures_findings_are_counted_and_not_drawn() -> None:
    case = textured(synthetic())
    found = [finding_of(case, Segment(mask=np.ones((1, 4, 4), dtype=np.bool_), origin=(k, 20, 3 * k))) for k in range(12)]
    findings = case.findings(*found)
    made = pictures(case, findings)
    assert len(made) == MOST
    prove_captures(made, findings, case.volume)


def tampered(made: ResultObject, **attributes: object) -> ResultObject:
    image = read(made)
    for keyword, value in attributes.items():
        setattr(image, keyword, value)
    return replace(made, parts=(written_again(image),))


def mirrored(made: ResultObject, axis: int) -> ResultObject:
    """The image turned over, the words left as they are."""
    image = read(made)
    pixels = image.pixel_array.copy()
    rows = image.Rows - 130
    pixels[:rows] = np.flip(pixels[:rows], axis)
    return tampered(made, PixelData=pixels.tobytes())


def moved(finding: Finding, by: tuple[int, int, int]) -> Finding:
    k, r, c = (a + b for a, b in zip(finding.segment.origin, by, strict=True))
    return replace(finding, segment=replace(finding.segment, origin=(k, r, c)))


def test_what_is_wrong_does_not_leave() -> None:
    case = textured(synthetic())
    findings = pair(case)
    made = pictures(case, findings)
    without = case.findings()
    (plain,) = pictures(case, without)
    first, second = findings.findings
    next_one = read(plain).SourceImageSequence
    next_one[0].ReferencedSOPInstanceUID = case.volume.sop_instance_uids[7]
    for wrong, said, message in (
        ([mirrored(made[0], 1), made[1]], findings, "something else"),
        ([mirrored(plain, 1)], without, "something else"),
        ([mirrored(plain, 0)], without, "something else"),
        ([tampered(plain, SourceImageSequence=next_one)], without, "something else"),
        (made, replace(findings, findings=(moved(first, (0, 0, 2)), second)), "pixels away"),
        (made, replace(findings, findings=(moved(first, (0, -2, 0)), second)), "pixels away"),
        (made, replace(findings, findings=(moved(first, (5, 0, 0)), second)), "outline"),
        ([plain], findings, "no picture shows"),
        (made, without, "where there is no finding"),
        (made[:1], findings, "no picture shows"),
        ([], findings, "no picture"),
        ([tampered(plain, BurnedInAnnotation="NO")], without, "burned in"),
        ([tampered(plain, ContentQualification="PRODUCT")], without, "RESEARCH"),
        ([tampered(plain, StudyInstanceUID="1.2")], without, "another study"),
        ([tampered(plain, SOPInstanceUID="1.2")], without, "than was announced"),
    ):
        with pytest.raises(ProofFailed, match=f"(?i){message}"):
            prove_captures(wrong, said, case.volume)
