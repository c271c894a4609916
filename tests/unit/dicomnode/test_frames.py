"""Multi-frame images as planes: the attributes that classic images of them would have, and no traceback where there are none."""

import contextlib
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from ct_series import write_series
from enhanced_images import SHARED, Groups, at, enhanced_image, undefined_lengths, write_image
from hypothesis import given, settings, strategies as st
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import (
    ComprehensiveSRStorage,
    CTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    SegmentationStorage,
    UltrasoundMultiFrameImageStorage,
)

from dicomnode.analysis.eligibility import REASONS, NotEligible
from dicomnode.analysis.frames import MAXIMUM_FRAMES, Frame, frames_of, read_headers
from dicomnode.analysis.geometry import stack_of, stacks_of

REAL = Path(__file__).parents[3].parent / "shared" / "data"
STACK: list[Groups] = [at(1, 2, 3.5 * k) for k in range(5)]


def planes(image: Dataset) -> list[Frame]:
    return frames_of([(Path("image"), image)])


def read(folder: Path, image: Dataset) -> list[Frame]:
    return frames_of(read_headers([write_image(folder / "image.dcm", image)]))


def refused(frames: list[Frame]) -> str:
    with pytest.raises(NotEligible) as caught:
        stack_of([frame.header for frame in frames])
    assert caught.value.code in REASONS
    return caught.value.code


def test_each_frame_is_a_plane_with_the_attributes_of_a_classic_image(tmp_path: Path) -> None:
    frames = read(tmp_path, enhanced_image(STACK))
    assert [frame.number for frame in frames] == [1, 2, 3, 4, 5]
    header = frames[2].header
    assert header.ImagePositionPatient == [1, 2, 7]
    assert header.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
    assert header.PixelSpacing == [0.8, 0.7]
    assert (header.SliceThickness, header.RescaleSlope, header.RescaleIntercept, header.RescaleType) == (2, 1, -1024, "HU")
    assert header.SOPInstanceUID == frames[2].image.SOPInstanceUID == "2.25.71"
    assert "NumberOfFrames" not in header
    assert "PerFrameFunctionalGroupsSequence" in frames[2].image
    stack = stack_of([frame.header for frame in frames])
    np.testing.assert_allclose(stack.affine @ [1, 2, 3, 1], [1 + 3 * 0.7, 2 + 2 * 0.8, 3.5, 1])


ADC, LOCALIZER = ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]


@pytest.mark.parametrize(
    ("group", "values", "attribute", "expected"),
    [
        ("MRImageFrameTypeSequence", {"FrameType": ADC}, "ImageType", ADC),
        ("CTImageFrameTypeSequence", {"FrameType": LOCALIZER}, "ImageType", LOCALIZER),
        ("MRImageFrameTypeSequence", {"FrameType": ADC, "ComplexImageComponent": "PHASE"}, "ComplexImageComponent", "PHASE"),
        ("MREchoSequence", {"EffectiveEchoTime": 80.5}, "EchoTime", 80.5),
        ("MRTimingAndRelatedParametersSequence", {"RepetitionTime": 4000, "FlipAngle": 90}, "RepetitionTime", 4000),
        ("MRModifierSequence", {"InversionRecovery": "YES", "InversionTimes": [2500.0, 10.0]}, "InversionTime", 2500),
        ("MRModifierSequence", {"InversionRecovery": "YES", "InversionTimes": 2500.0}, "InversionTime", 2500),
        ("MRDiffusionSequence", {"DiffusionBValue": 1000.0, "DiffusionDirectionality": "ISOTROPIC"}, "DiffusionBValue", 1000),
        ("CTReconstructionSequence", {"ConvolutionKernel": "LUNG", "ReconstructionDiameter": 350}, "ConvolutionKernel", "LUNG"),
        ("CTAcquisitionDetailsSequence", {"GantryDetectorTilt": 12.0}, "GantryDetectorTilt", 12),
        ("FrameContentSequence", {"FrameAcquisitionNumber": 4}, "AcquisitionNumber", 4),
        ("FrameContentSequence", {"TemporalPositionIndex": 2}, "TemporalPositionIdentifier", 2),
        ("FrameContentSequence", {"StackID": "1", "InStackPositionNumber": 7}, "StackID", "1"),
        ("FrameAnatomySequence", {"FrameLaterality": "L", "AnatomicRegionSequence": []}, "ImageLaterality", "L"),
        ("FrameAnatomySequence", {"AnatomicRegionSequence": [{"CodeValue": "69536005"}]}, "BodyPartExamined", "HEAD"),
        ("FrameAnatomySequence", {"AnatomicRegionSequence": [{"CodeValue": "T-D3000"}]}, "BodyPartExamined", "CHEST"),
        ("UnassignedPerFrameConvertedAttributesSequence", {"SequenceName": "*tse2d"}, "SequenceName", "*tse2d"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shared", [True, False])
def test_a_functional_group_becomes_an_attribute_of_the_plane(
    tmp_path: Path, group: str, values: dict[str, Any], attribute: str, expected: Any, shared: bool
) -> None:
    extra: Groups = {group: values}
    image = enhanced_image([s if shared else {**s, **extra} for s in STACK], shared={**SHARED, **extra} if shared else SHARED)
    for frames in (planes(image), read(tmp_path, image)):
        assert all(frame.header.get(attribute) == expected for frame in frames)


def test_a_body_part_of_the_image_stays() -> None:
    image = enhanced_image(STACK, shared={**SHARED, "FrameAnatomySequence": {"AnatomicRegionSequence": [{"CodeValue": "69536005"}]}})
    image.BodyPartExamined = "BRAIN"
    assert {frame.header.BodyPartExamined for frame in planes(image)} == {"BRAIN"}


def test_a_contrast_agent_is_in_the_frames_in_which_it_was_administered() -> None:
    usage = [
        {"ContrastBolusUsageSequence": {"ContrastBolusAgentNumber": 1, "ContrastBolusAgentAdministered": said}} for said in ("NO", "YES")
    ]
    image = enhanced_image([{**STACK[0], **usage[0]}, {**STACK[1], **usage[1]}, STACK[2]])
    agent = Dataset()
    agent.ContrastBolusAgentNumber, agent.CodeMeaning = 1, "Gadolinium"
    image.ContrastBolusAgentSequence = [agent]
    assert [frame.header.get("ContrastBolusAgent") for frame in planes(image)] == [None, "Gadolinium", None]


@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_planes_are_the_same_however_the_image_is_encoded(tmp_path: Path, syntax: str, undefined: bool) -> None:
    image = enhanced_image(
        [{**s, "FrameContentSequence": {"StackID": "1", "DimensionIndexValues": [1, k]}} for k, s in enumerate(STACK)],
        shared={**SHARED, "FrameAnatomySequence": {"AnatomicRegionSequence": [{"CodeValue": "69536005"}]}},
    )
    expected = planes(image)
    if undefined:
        undefined_lengths(image)
    image.file_meta.TransferSyntaxUID = syntax
    for frame, known in zip(read(tmp_path, image), expected, strict=True):
        assert {e.keyword: e.value for e in frame.header} == {e.keyword: e.value for e in known.header if e.keyword != "PixelData"}


@pytest.mark.parametrize("group", ["PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"])
@pytest.mark.parametrize("spoilt", ["absent", "empty", "doubled", "without value", "contradicted"])
def test_a_group_that_is_not_there_or_not_to_be_believed_is_a_refusal(group: str, spoilt: str) -> None:
    frame: dict[str, Any] = {**SHARED, **STACK[1]}
    value = frame.pop(group)
    other = {keyword: [9 for _ in numbers] for keyword, numbers in value.items() if isinstance(numbers, list)}
    if spoilt != "absent":
        frame[group] = {"empty": [], "doubled": [value, other], "without value": {}, "contradicted": other}[spoilt]
    shared = {group: value} if spoilt == "contradicted" else {}
    image = enhanced_image([{**SHARED, **s} if k != 1 else frame for k, s in enumerate(STACK)], shared=shared)
    assert refused(planes(image)) == "missing-geometry"


def test_a_group_said_twice_alike_is_believed() -> None:
    image = enhanced_image([{**SHARED, **STACK[0]}, {**SHARED, "PlanePositionSequence": [STACK[1]["PlanePositionSequence"]] * 2}])
    assert stack_of([frame.header for frame in planes(image)]).spacing_mm == pytest.approx((3.5, 0.8, 0.7))


@pytest.mark.parametrize("count", [4, 6])
def test_groups_of_more_or_fewer_frames_than_the_image_has_are_nobodys(count: int) -> None:
    frames = planes(enhanced_image(STACK, NumberOfFrames=count))
    assert len(frames) == count
    assert refused(frames) == "missing-geometry"


def test_an_image_that_claims_countless_frames_stays_as_it_is() -> None:
    (frame,) = planes(enhanced_image(STACK, NumberOfFrames=MAXIMUM_FRAMES + 1))
    assert (frame.number, frame.header.NumberOfFrames) == (None, MAXIMUM_FRAMES + 1)


def test_frames_without_groups_have_the_images_attributes() -> None:
    image = enhanced_image([], SOPClassUID=UltrasoundMultiFrameImageStorage, NumberOfFrames=3)
    del image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence
    assert [(frame.number, frame.header.Rows) for frame in planes(image)] == [(1, 4), (2, 4), (3, 4)]


def test_a_classic_image_is_one_plane_even_if_it_claims_several(tmp_path: Path) -> None:
    files = write_series(tmp_path, np.zeros((1, 3, 3), dtype=np.int16), NumberOfFrames=5)
    (frame,) = frames_of(read_headers(files))
    assert frame.number is None
    assert frame.header is frame.image


def test_no_group_says_whose_image_or_which_pixels_it_is(tmp_path: Path) -> None:
    hostile = {
        "UnassignedPerFrameConvertedAttributesSequence": {
            "SOPInstanceUID": "2.25.666",
            "Rows": 60000,
            "PatientID": "OTHER",
            "ProtocolName": "T1",
        }
    }
    for frame in read(tmp_path, enhanced_image([{**s, **hostile} for s in STACK])):
        assert (frame.header.SOPInstanceUID, frame.header.Rows, frame.header.PatientID) == ("2.25.71", 4, "SECRET")
        assert frame.header.ProtocolName == "T1"


@pytest.mark.parametrize(
    "sop_class", [SegmentationStorage, ComprehensiveSRStorage, KeyObjectSelectionDocumentStorage, "1.2.840.10008.5.1.4.1.1.481.2"]
)
def test_what_is_no_image_has_no_frames(sop_class: str) -> None:
    assert planes(enhanced_image(STACK, SOPClassUID=sop_class)) == []


def test_an_object_of_an_unknown_class_is_an_image_if_it_has_rows_and_columns() -> None:
    assert len(planes(enhanced_image(STACK, SOPClassUID="2.25.99"))) == 5
    assert planes(enhanced_image(STACK, SOPClassUID="2.25.99", Rows=None)) == []


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 100_000), undefined=st.booleans(), implicit=st.booleans())
@pytest.mark.filterwarnings("ignore")  # pydicom warns of what is spoilt here
def test_no_bytes_in_the_functional_groups_end_in_a_traceback(seed: int, undefined: bool, implicit: bool) -> None:
    rng = np.random.default_rng(seed)
    image = enhanced_image(STACK, shared={**SHARED, "FrameAnatomySequence": {"AnatomicRegionSequence": [{"CodeValue": "69536005"}]}})
    if undefined:
        undefined_lengths(image)
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        spoil(image, keyword, rng, implicit=implicit)
    frames = planes(image)
    assert len(frames) in (1, 5)
    for part in stacks_of(frames):
        with contextlib.suppress(NotEligible):
            assert stack_of([frame.header for frame in part.frames]).affine.shape == (4, 4)


def spoil(image: Dataset, keyword: str, rng: np.random.Generator, *, implicit: bool) -> None:
    """Put a sequence's bytes, with some of them changed or the end cut off, into the place of its items."""
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = implicit, True
    pydicom.filewriter.write_sequence(buffer, image[keyword], ["iso8859"])
    data = bytearray(buffer.getvalue())
    for place in rng.integers(0, len(data), rng.integers(0, 6)):
        data[place] = rng.integers(0, 256)
    value = bytes(data[: rng.integers(0, len(data)) if rng.random() < 0.3 else len(data)])
    tag = pydicom.tag.Tag(keyword)
    items = image[keyword]
    assert isinstance(items, DataElement)
    image._dict[tag] = RawDataElement(tag, None if implicit else "SQ", len(value), value, 0, implicit, True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoilt", [b"x", b"1\\2\\3", b"\xff\xff", b"-"])
def test_a_malformed_attribute_of_one_image_is_a_refusal_and_no_failure(tmp_path: Path, spoilt: bytes) -> None:
    files = write_series(tmp_path, np.zeros((3, 3, 3), dtype=np.int16))
    content = files[1].read_bytes()
    tag = b"\x28\x00\x30\x00DS"
    place = content.index(tag) + 8
    files[1].write_bytes(content[:place] + spoilt + content[place + len(spoilt) :])
    frames = frames_of(read_headers(files))
    assert len(frames) == 3
    assert refused(frames) == "missing-geometry"


def test_a_legacy_converted_image_has_the_geometry_of_the_images_it_was_made_of(tmp_path: Path) -> None:
    orientation = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)
    stored = np.random.default_rng(1).integers(0, 4000, (6, 5, 4)).astype(np.uint16)
    files = write_series(
        tmp_path, stored, orientation=orientation, PatientBirthDate="", PatientSex="", StudyID="", StudyDate="20200101", StudyTime="120000",
        AccessionNumber="", ReferringPhysicianName="", SeriesDate="20200101", SeriesTime="120000", ContentDate="20200101",
        ContentTime="120000", Manufacturer="", AcquisitionNumber=1, PatientPosition="HFS", Laterality="", PositionReferenceIndicator="",
        KVP=120, AcquisitionDate="20200101", AcquisitionTime="120000",
    )  # fmt: skip
    classic = frames_of(read_headers(files))
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(file) for file in files],
        series_instance_uid="2.25.61",
        series_number=9,
        sop_instance_uid="2.25.62",
        instance_number=1,
    )
    enhanced = read(tmp_path, converted)
    assert len(enhanced) == len(classic)
    known, found = (stack_of([frame.header for frame in frames]) for frames in (classic, enhanced))
    np.testing.assert_allclose(found.affine, known.affine, atol=1e-6)
    assert {frame.header.RescaleIntercept for frame in enhanced} == {-1024}
    assert {frame.header.BodyPartExamined for frame in enhanced} == {"CHEST"}


@pytest.mark.parametrize(
    ("group", "keyword", "values"),
    [
        ("MREchoSequence", "EffectiveEchoTime", (10.0, 80.0)),
        ("MRDiffusionSequence", "DiffusionBValue", (0.0, 1000.0)),
        ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
        ("FrameContentSequence", "StackID", ("1", "2")),
        ("MRImageFrameTypeSequence", "ComplexImageComponent", ("MAGNITUDE", "PHASE")),
        ("MRTimingAndRelatedParametersSequence", "FlipAngle", (5, 30)),
    ],
)
def test_one_image_of_several_stacks_is_split_into_them(group: str, keyword: str, values: tuple[Any, Any]) -> None:
    frames = planes(enhanced_image([{**s, group: {keyword: value}} for s in STACK for value in values]))
    parts = stacks_of(frames)
    assert [len(part.frames) for part in parts] == [5, 5]
    assert [float(dict(part.differs).popitem()[1]) if keyword != "ComplexImageComponent" else 0 for part in parts] == [
        float(value) if keyword != "ComplexImageComponent" else 0 for value in values
    ]
    for part in parts:
        assert stack_of([frame.header for frame in part.frames]).spacing_mm[0] == pytest.approx(3.5)


def test_echoes_and_times_together_are_told_apart() -> None:
    frames = planes(
        enhanced_image(
            [
                {**s, "MREchoSequence": {"EffectiveEchoTime": echo}, "FrameContentSequence": {"TemporalPositionIndex": time}}
                for s in STACK
                for echo in (10.0, 80.0)
                for time in (1, 2, 3)
            ]
        )
    )
    parts = stacks_of(frames)
    assert [dict(part.differs) for part in parts] == [
        {"TemporalPositionIdentifier": time, "EchoTime": echo} for time in ("1", "2", "3") for echo in ("10.0", "80.0")
    ]


def test_two_acquisitions_of_the_same_positions_stay_together_and_are_refused() -> None:
    frames = planes(enhanced_image([{**s, "FrameContentSequence": {"FrameAcquisitionNumber": n}} for s in STACK for n in (1, 2)]))
    (part,) = stacks_of(frames)
    assert refused(list(part.frames)) == "several-acquisitions"


def test_directions_of_diffusion_that_nothing_tells_apart_leave_the_image_without_diffusion() -> None:
    frames = planes(enhanced_image([{**s, "MRDiffusionSequence": {"DiffusionBValue": b}} for s in STACK for b in (0.0, 1000.0, 1000.0)]))
    plain, weighted = stacks_of(frames)
    assert stack_of([frame.header for frame in plain.frames]).spacing_mm[0] == pytest.approx(3.5)
    assert refused(list(weighted.frames)) == "duplicate-positions"


def test_a_value_that_varies_within_one_stack_splits_nothing() -> None:
    frames = planes(enhanced_image([{**s, "MREchoSequence": {"EffectiveEchoTime": 10.0 + k % 2}} for k, s in enumerate(STACK)]))
    assert [part.differs for part in stacks_of(frames)] == [()]


@pytest.mark.parametrize("order", [1, -1])
def test_parts_come_in_the_order_of_their_values_whatever_that_of_the_frames(order: int) -> None:
    frames = planes(enhanced_image([{**s, "MREchoSequence": {"EffectiveEchoTime": e}} for s in STACK for e in (100.0, 9.0)]))[::order]
    assert [dict(part.differs)["EchoTime"] for part in stacks_of(frames)] == ["9.0", "100.0"]


@pytest.mark.realdata
@pytest.mark.parametrize("file", ["emri_small.dcm", "emri_small_RLE.dcm", "emri_small_big_endian.dcm"])
def test_an_enhanced_image_that_lost_its_groups_is_refused(file: str) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent")
    frames = frames_of(read_headers([REAL / "odd_files/pydicom" / file]))
    assert len(frames) == 10
    assert refused(frames) == "missing-geometry"


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore")  # pydicom warns of odd files
def test_each_object_of_the_collection_is_planes_or_none() -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent")
    for file in sorted([*(REAL / "sr_seg_examples").rglob("*.dcm"), *(REAL / "odd_files/pydicom").glob("*.dcm")]):
        if file.name in {"no_meta.dcm", "rtplan_truncated.dcm"}:  # not read at all
            continue
        ((_, header),) = headers = read_headers([file])
        frames = frames_of(headers)
        no_image = str(header.get("Modality")) in {"SR", "SEG", "RTDOSE"} or file.name == "parametric_map_float.dcm"
        assert bool(frames) == ("Rows" in header and not no_image), file


def test_files_keep_their_order_and_a_file_of_no_image_its_silence(tmp_path: Path) -> None:
    files = write_series(tmp_path, np.zeros((3, 3, 3), dtype=np.int16))
    report = enhanced_image(STACK, SOPClassUID=ComprehensiveSRStorage)
    headers = [
        *read_headers(files[::-1]),
        (Path("report"), report),
        (Path("image"), enhanced_image(STACK, SOPClassUID=CTImageStorage, NumberOfFrames=None)),
    ]
    assert [frame.file.name for frame in frames_of(headers)] == ["0-002.dcm", "0-001.dcm", "0-000.dcm", "image"]


def test_stacks_of_one_image_each_are_no_stacks() -> None:
    frames = planes(enhanced_image([{**s, "FrameContentSequence": {"StackID": str(k)}} for k, s in enumerate(STACK)]))
    (part,) = stacks_of(frames)
    assert stack_of([frame.header for frame in part.frames]).spacing_mm[0] == pytest.approx(3.5)


def test_frames_that_say_nothing_of_their_own_share_a_header() -> None:
    frames = planes(enhanced_image([STACK[0], {}, STACK[2], {}]))
    assert frames[1].header is frames[3].header
    assert [frame.header.get("ImagePositionPatient") for frame in frames] == [[1, 2, 0], None, [1, 2, 7], None]
