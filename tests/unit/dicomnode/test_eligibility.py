"""Each code of a refusal is reached by what deserves it; and whatever a header holds, the answer is a selection or one of them."""

import ast
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eligible_series import CHEST_FILM_INPUT, CT_INPUT, MR_INPUT, Headers, change, manifest_of, mr_series, projection, series
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import MPEG2MPML

from dicomnode.analysis.eligibility import REASONS, NotEligible
from dicomnode.analysis.select import select
from dicomnode.analysis.subject import age_years
from dicomnode.analysis.weighting import contrast_agent, weighting_of


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def coded(value: str, scheme: str = "SCT") -> Sequence:
    return Sequence([item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning="x")])


def refused(inputs: str, headers: Headers) -> NotEligible:
    with pytest.raises(NotEligible) as caught:
        select(manifest_of(inputs), headers)
    assert "Doe" not in caught.value.reason
    assert "SECRET" not in caught.value.reason
    return caught.value


def encoded(syntax: str) -> Headers:
    headers = series()
    for _, header in headers:
        header.file_meta.TransferSyntaxUID = syntax
    return headers


ADULTS = CT_INPUT + "age_years = [18, 120]\nage_may_be_absent = false\n"
FLAIR = MR_INPUT + 'mr_contrasts = ["flair"]\n'

# The code, the keys of the input, and headers that deserve it.
CASES: list[tuple[str, str, Callable[[], Headers]]] = [
    ("no-images", CT_INPUT, list),
    ("modality", CT_INPUT, lambda: series(Modality="PT")),
    ("sop-class", CT_INPUT, lambda: series(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")),
    ("not-human", CT_INPUT, lambda: series(PatientSpeciesDescription="Canis lupus familiaris")),
    ("not-human", CT_INPUT, lambda: series(PatientSpeciesCodeSequence=coded("L-80700", "SRT"))),
    ("not-human", CT_INPUT, lambda: series(PatientBreedDescription="Beagle")),
    ("not-human", CT_INPUT, lambda: series(ResponsiblePersonRole="OWNER")),
    ("not-human", CT_INPUT, lambda: series(PatientSexNeutered="ALTERED")),
    ("not-human", CT_INPUT, lambda: series(AcquisitionDeviceProcessingDescription="FELINE THORAX VD")),
    ("not-human", CT_INPUT, lambda: series(InstitutionName="Veterinary Clinic")),
    ("quality-control", CT_INPUT, lambda: series(QualityControlImage="YES")),
    ("quality-control", CT_INPUT, lambda: series(BodyPartExamined="PHANTOM")),
    ("quality-control", CT_INPUT, lambda: series(AnatomicRegionSequence=coded("706342009"))),
    ("image-type", CT_INPUT, lambda: series(2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    ("image-type", CT_INPUT, lambda: series(2, ImageType=["ORIGINAL", "PRIMARY", "SCOUT"])),
    ("image-type", CT_INPUT, lambda: series(SeriesDescription="3-plane Localizer")),
    ("image-type", CT_INPUT, lambda: series(ImageType=["DERIVED", "SECONDARY", "MPR"])),
    ("image-type", CT_INPUT, lambda: series(1, ImageType=["ORIGINAL", "PRIMARY", "SCREEN_SAVE"])),
    ("image-type", CT_INPUT, lambda: series(1, ImageType=["ORIGINAL", "SECONDARY", "DOSE_INFO"])),
    ("presentation-intent", CHEST_FILM_INPUT, lambda: projection(PresentationIntentType="FOR PROCESSING")),
    ("burned-in-annotation", CT_INPUT, lambda: series(BurnedInAnnotation="YES")),
    ("body-part", CT_INPUT, lambda: series(BodyPartExamined="HEAD")),
    ("body-part", CT_INPUT, lambda: series(BodyPartExamined=None, AnatomicRegionSequence=coded("69536005"))),
    ("body-part", CT_INPUT, lambda: series(BodyPartExamined="CHEST", AnatomicRegionSequence=coded("T-D1100", "SRT"))),
    ("body-part", CT_INPUT + "body_part_may_be_absent = false\n", lambda: series(BodyPartExamined="")),
    ("body-part", CHEST_FILM_INPUT, lambda: projection(BodyPartExamined="CHESTABDOMEN")),
    ("view-position", CHEST_FILM_INPUT, lambda: projection(ViewPosition="LL")),
    ("view-position", CHEST_FILM_INPUT, lambda: projection(ViewPosition=None, ViewCodeSequence=coded("399067008"))),
    ("view-position", CHEST_FILM_INPUT, lambda: projection(ViewPosition="PA", ViewCodeSequence=coded("R-10236", "SRT"))),
    ("view-position", CHEST_FILM_INPUT, lambda: projection(ViewPosition=None, PatientOrientation=["A", "F"])),
    ("orientation", CHEST_FILM_INPUT, lambda: projection(PatientOrientation=["R", "F"])),
    ("orientation", CHEST_FILM_INPUT, lambda: projection(PatientOrientation=["L", "H"])),
    ("view-position", CHEST_FILM_INPUT + "view_position_may_be_absent = false\n", lambda: projection(ViewPosition=None)),
    ("laterality", CHEST_FILM_INPUT + 'laterality = ["U", "B"]\n', lambda: projection(ImageLaterality="L")),
    ("laterality", CHEST_FILM_INPUT + 'laterality = ["U"]\nlaterality_may_be_absent = false\n', projection),
    ("age", ADULTS, lambda: series(PatientAge="017Y")),
    ("age", ADULTS, lambda: series(PatientAge="030M")),
    ("age", ADULTS, lambda: series(PatientBirthDate="20100302", StudyDate="20280301")),
    ("age", ADULTS, lambda: change(series(), PatientAge=b"old")),
    ("age", CT_INPUT + "age_years = [0, 17]\n", lambda: series(PatientAge="018Y")),
    ("contrast", CT_INPUT + 'contrast = "with"\n', series),
    ("contrast", CT_INPUT + 'contrast = "with"\n', lambda: series(ContrastBolusAgent="NONE")),
    ("contrast", CT_INPUT + 'contrast = "without"\n', lambda: series(ContrastBolusAgent="Iomeprol 350")),
    ("contrast", CT_INPUT + 'contrast = "without"\n', lambda: series(ContrastBolusAgentSequence=coded("109219002"))),
    ("mr-contrast", FLAIR, lambda: mr_series("t2", 1)),
    ("mr-contrast", FLAIR, lambda: mr_series("t2", 1, SeriesDescription="AX FLAIR")),  # words never overrule parameters
    ("unknown-contrast", FLAIR, lambda: mr_series("t2", 1, RepetitionTime=None, EchoTime=None, ScanningSequence=None)),
    ("pixel-format", CT_INPUT, lambda: series(SamplesPerPixel=3)),
    ("pixel-format", CT_INPUT, lambda: series(NumberOfFrames=5)),
    ("pixel-format", CT_INPUT, lambda: series(PhotometricInterpretation="RGB")),
    ("pixel-format", CHEST_FILM_INPUT, lambda: projection(NumberOfFrames=30)),
    ("transfer-syntax", CT_INPUT, lambda: encoded(MPEG2MPML)),
    ("not-hu", CT_INPUT, lambda: series(RescaleIntercept=None)),
    ("not-hu", CT_INPUT, lambda: series(RescaleType="Z_EFF")),
    ("not-hu", CT_INPUT, lambda: series(RescaleSlope=-1)),
    ("orientation", CT_INPUT + 'orientations = ["axial"]\n', lambda: series(ImageOrientationPatient=[1, 0, 0, 0, 0, -1], step=(0, 1, 0))),
    ("missing-geometry", CT_INPUT, lambda: change(series(), only=3, ImagePositionPatient=None)),
    ("missing-geometry", CHEST_FILM_INPUT.replace("true", "false"), lambda: change(projection(), PixelSpacing=b"0.000\\0.000")),
    ("too-few-slices", CT_INPUT, lambda: series(2)),
    ("too-many-slices", CT_INPUT + "maximum_slices = 7\n", series),
    ("mixed-size", CT_INPUT, lambda: change(series(), only=3, Rows=5)),
    ("mixed-orientation", CT_INPUT, lambda: change(series(), only=3, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])),
    ("mixed-orientation", CT_INPUT + 'orientations = ["axial"]\n',
     lambda: change(series(), only=3, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])),
    ("mixed-frame-of-reference", CT_INPUT, lambda: change(series(), only=3, FrameOfReferenceUID="2.25.99")),
    ("too-large", CT_INPUT, lambda: series(Columns=60000)),
    ("several-echoes", MR_INPUT, lambda: mr_series("t2", 1) + mr_series("t2", 1, EchoTime=20, first=8)),
    ("several-phases", CT_INPUT, lambda: series(TemporalPositionIdentifier=1) + series(TemporalPositionIdentifier=2, first=8)),
    ("several-acquisitions", CT_INPUT, lambda: series(AcquisitionNumber=1) + series(AcquisitionNumber=2, first=8)),
    ("duplicate-positions", CT_INPUT, lambda: change(series(), only=3, ImagePositionPatient=[0, 0, 4])),
    ("duplicate-positions", CT_INPUT, lambda: series() + series(first=8)),
    ("gantry-tilt", CT_INPUT, lambda: series(GantryDetectorTilt=12.5)),
    ("missing-slices", CT_INPUT, lambda: series(9)[:4] + series(9)[5:]),
    ("uneven-spacing", CT_INPUT, lambda: change(series(), only=3, ImagePositionPatient=[0, 0, 6.8])),
    ("spacing", CT_INPUT, lambda: series(spacing=8.0)),
    ("spacing", CHEST_FILM_INPUT, lambda: projection(PixelSpacing=[9.0, 9.0])),
]  # fmt: skip


@pytest.mark.parametrize(("code", "inputs", "headers"), CASES)
def test_what_does_not_fit_is_refused_with_its_code_and_a_sentence(code: str, inputs: str, headers: Callable[[], Headers]) -> None:
    refusal = refused(inputs, headers())
    assert refusal.code == code
    assert refusal.reason.endswith(".")
    assert len(refusal.reason) < 300


def test_every_code_of_the_table_is_reached_by_a_test() -> None:
    elsewhere = set()  # in sets of series, in pixels, and in the regions that networks and lung find
    for file in ("test_select_sets.py", "test_pixels.py", "test_lung.py", "test_eligibility_films.py", "test_gates.py"):
        for node in ast.walk(ast.parse((Path(__file__).parent / file).read_text())):
            if isinstance(node, ast.Constant) and node.value in REASONS:
                elsewhere.add(node.value)
    assert set(REASONS) - {code for code, _, _ in CASES} - elsewhere == set()


def test_the_operators_manual_explains_each_code_in_the_order_of_the_checks() -> None:
    manual = (Path(__file__).parents[3] / "deploy" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", manual[manual.index("### A study was not analysed") :], re.MULTILINE)
    assert rows == list(REASONS.items())


# Headers that look like trouble and are none.
@pytest.mark.parametrize(
    ("inputs", "headers"),
    [
        (CT_INPUT, lambda: series(PatientSpeciesDescription="Homo sapiens", PatientSpeciesCodeSequence=coded("337915000"))),
        (CT_INPUT, lambda: series(ResponsiblePerson="Doe^John", ResponsiblePersonRole="PARENT")),
        (CT_INPUT, lambda: series(SeriesDescription="Thorax after scout")),
        (CT_INPUT, lambda: series(SeriesDescription="IMPACTED UPPER CANINE DENTAL")),
        (CT_INPUT, lambda: change(series(), BodyPartExamined=b"Thorax^01")),
        (CT_INPUT, lambda: series(BodyPartExamined="LUNG", AnatomicRegionSequence=coded("51185008"))),
        (CT_INPUT, lambda: series(BodyPartExamined="CHEST_TO_PELVIS")),
        (CT_INPUT, lambda: series(BodyPartExamined=None, AnatomicRegionSequence=coded("R-FAB56", "SRT"))),
        (CT_INPUT, lambda: series(QualityControlImage="NO", BurnedInAnnotation="NO")),
        (CT_INPUT + "quality_control_images = true\nburned_in_annotation = true\nanimals = true\n",
         lambda: series(QualityControlImage="YES", BurnedInAnnotation="YES", PatientBreedDescription="Beagle")),
        (CT_INPUT + 'contrast = "with"\n', lambda: series(ContrastBolusAgent="Iomeprol")),
        (CT_INPUT + 'contrast = "without"\n', lambda: series(ContrastBolusAgent="Barium", ContrastBolusRoute="ORAL")),
        (ADULTS, lambda: series(PatientAge="018Y")),
        (ADULTS, lambda: series(PatientBirthDate="20100301", StudyDate="20280301")),
        (CT_INPUT + "age_years = [0, 17]\n", lambda: series(PatientBirthDate="20100301", StudyDate="20280228")),
        (CT_INPUT + 'orientations = ["axial"]\n', lambda: series(ImageOrientationPatient=[1, 0, 0, 0, 0.99096, 0.134158],
                                                                step=(0, -0.134158, 0.99096))),
        (CHEST_FILM_INPUT, lambda: projection(ImageType=["ORIGINAL PRIMARY"], PixelSpacing=None)),
        (CHEST_FILM_INPUT, lambda: projection(ViewPosition="", ViewCodeSequence=coded("399348003"))),
        (CHEST_FILM_INPUT, lambda: projection(ViewPosition=None)),
        (CHEST_FILM_INPUT + "for_processing = true\n", lambda: projection(PresentationIntentType="FOR PROCESSING")),
        (CHEST_FILM_INPUT + 'laterality = ["U"]\n', projection),
    ],
)  # fmt: skip
def test_what_fits_is_not_refused(inputs: str, headers: Callable[[], Headers]) -> None:
    assert select(manifest_of(inputs), headers()).series


@pytest.mark.parametrize(
    ("weighting", "values"),
    [
        ("t1", {"ScanningSequence": "SE", "RepetitionTime": 600, "EchoTime": 10}),
        ("t1", {"ScanningSequence": ["GR", "IR"], "RepetitionTime": 1900, "EchoTime": 2.5, "InversionTime": 900, "FlipAngle": 9}),  # MPRAGE
        ("t1", {"ScanningSequence": "GR", "SequenceVariant": "SP", "RepetitionTime": 8, "EchoTime": 3.7, "FlipAngle": 8}),
        ("t1", {"ScanningSequence": ["SE", "IR"], "RepetitionTime": 2000, "EchoTime": 12, "InversionTime": 800}),  # T1 FLAIR
        ("t1c", {"ScanningSequence": "SE", "RepetitionTime": 600, "EchoTime": 10, "ContrastBolusAgent": "Gd"}),
        ("t1c", {"ScanningSequence": "SE", "RepetitionTime": 600, "EchoTime": 10, "SeriesDescription": "T1 AX +C"}),
        ("t1", {"ScanningSequence": "SE", "RepetitionTime": 600, "EchoTime": 10, "SeriesDescription": "+C", "ContrastBolusAgent": "NONE"}),
        ("t2", {"ScanningSequence": "SE", "RepetitionTime": 4000, "EchoTime": 100, "EchoTrainLength": 15}),
        ("t2", {"ScanningSequence": "SE", "RepetitionTime": 3200, "EchoTime": 410}),  # 3D
        ("pd", {"ScanningSequence": "SE", "SequenceVariant": "SK", "RepetitionTime": 2300, "EchoTime": 22}),
        ("flair", {"ScanningSequence": ["SE", "IR"], "RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500}),
        ("flair", {"ScanningSequence": "SE", "RepetitionTime": 4800, "EchoTime": 340, "InversionTime": 1650}),  # 3D
        ("diffusion", {"ScanningSequence": "EP", "RepetitionTime": 5000, "EchoTime": 80, "DiffusionBValue": 1000.0}),
        ("adc", {"ScanningSequence": "EP", "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}),
        ("susceptibility", {"ScanningSequence": "GR", "RepetitionTime": 27, "EchoTime": 20, "FlipAngle": 15}),
        ("angiography", {"ScanningSequence": "GR", "RepetitionTime": 22, "EchoTime": 3.6, "FlipAngle": 18, "AngioFlag": "Y"}),
        ("angiography", {"ScanningSequence": "GR", "RepetitionTime": 22, "EchoTime": 3.6, "FlipAngle": 18, "SeriesDescription": "TOF 3D"}),
        ("t2", {"AcquisitionContrast": "T2"}),
        ("flair", {"AcquisitionContrast": "FLUID_ATTENUATED"}),
        ("t1", {"SeriesDescription": "AX T1 SE"}),  # the parameters are silent
        *[("t1c", {"SeriesDescription": said}) for said in ("T1c", "ax_t1_ce", "T1W-CE", "T1GD", "t1 +C")],
        ("flair", {"SeriesDescription": "FLAIR"}),
        (None, {"SeriesDescription": "AX T1 T2"}),
        (None, {"SeriesDescription": "T10 spine"}),
        (None, {}),
        (None, {"ScanningSequence": ["SE", "IR"], "RepetitionTime": 4000, "EchoTime": 60, "InversionTime": 150}),  # STIR
        (None, {"ScanningSequence": "GR", "SequenceVariant": "SS", "RepetitionTime": 5, "EchoTime": 2.3, "FlipAngle": 50}),
        (None, {"ScanningSequence": ["EP", "SE"], "RepetitionTime": 5000, "EchoTime": 90}),
        (None, {"ScanningSequence": "SE", "RepetitionTime": 4000, "EchoTime": 100, "ImageType": ["ORIGINAL", "PRIMARY", "P"]}),
        (None, {"ScanningSequence": "SE", "RepetitionTime": b"fast", "EchoTime": 100}),
    ],
)  # fmt: skip
def test_the_mr_weighting_follows_from_how_the_image_was_acquired(weighting: str | None, values: dict[str, Any]) -> None:
    header = Dataset()
    for keyword, value in values.items():
        change([(Path(), header)], **{keyword: value})
    assert weighting_of(header) == weighting


def test_a_contrast_agent_is_what_was_given_into_vessels() -> None:
    usage = Sequence([item(ContrastBolusAgentAdministered="NO"), item(ContrastBolusAgentAdministered="YES")])
    assert contrast_agent(item(ContrastBolusUsageSequence=usage)) is True
    assert contrast_agent(item(ContrastBolusUsageSequence=usage[:1])) is False
    assert contrast_agent(item(ContrastBolusVolume="80")) is True
    assert contrast_agent(item(ContrastBolusAgent="Water", ContrastBolusAdministrationRouteSequence=coded("26643006"))) is None
    assert contrast_agent(item(ContrastBolusAgent="")) is None


@pytest.mark.parametrize(
    ("values", "age"),
    [
        ({"PatientAge": b"045Y"}, 45),
        ({"PatientAge": b"018M"}, 1.5),
        ({"PatientAge": b"010D"}, 10 / 365.25),
        ({"PatientAge": b"52W"}, 0.9966),
        ({"PatientBirthDate": b"1950.02.01", "StudyDate": b"20200131"}, 69),
        ({"PatientBirthDate": b"19500201", "StudyDate": b"20200201"}, 70),
        ({"PatientBirthDate": b"20200201", "StudyDate": b"19500201"}, None),
        ({"PatientBirthDate": b"20201301", "StudyDate": b"20210101"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_age_is_patients_age_or_else_follows_from_the_dates(values: dict[str, bytes], age: float | None) -> None:
    header = change([(Path(), Dataset())], **values)[0][1]
    assert age_years(header) == (None if age is None else pytest.approx(age, abs=1e-3))


KEYWORDS = (
    "Modality", "SOPClassUID", "ImageType", "BodyPartExamined", "AnatomicRegionSequence", "ViewPosition", "ViewCodeSequence", "Laterality",
    "ImageLaterality", "PatientAge", "PatientBirthDate", "StudyDate", "PatientSpeciesCodeSequence", "ContrastBolusAgent", "Rows", "Columns",
    "ContrastBolusUsageSequence", "ScanningSequence", "RepetitionTime", "EchoTime", "InversionTime", "FlipAngle", "DiffusionBValue",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID", "SliceThickness", "GantryDetectorTilt",
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "SeriesNumber", "InstanceNumber", "AcquisitionNumber", "AcquisitionDate",
    "AcquisitionTime", "AcquisitionDateTime", "ConvolutionKernel", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID",
    "QualityControlImage", "PresentationIntentType", "PatientOrientation", "ImagerPixelSpacing", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "SpecificCharacterSet", "PresentationLUTShape", "StackID", "TemporalPositionIdentifier",
)  # fmt: skip
PACKAGES = [
    manifest_of(CT_INPUT + 'orientations = ["axial"]\nage_years = [18, 99]\ncontrast = "without"\npreferred_kernels = ["B"]\n'),
    manifest_of(CHEST_FILM_INPUT + 'laterality = ["U"]\nage_years = [18, 99]\n'),
    manifest_of('name = "a"\n' + MR_INPUT + 'mr_contrasts = ["flair"]\n', 'name = "b"\n' + MR_INPUT + 'mr_contrasts = ["t1c", "adc"]\n'),
]
STUDIES: list[Callable[[], Headers]] = [series, projection, lambda: mr_series("flair", 1) + mr_series("t1c", 2)]


_VALUES = st.binary(max_size=40) | st.text(alphabet="0123456789.-\\eE+^ AY", max_size=20).map(str.encode)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about the values
def test_a_sop_class_of_several_values_is_none_of_those_read() -> None:
    headers = change(series(NumberOfFrames=2), SOPClassUID=b"1.2.840.10008.5.1.4.1.1.2\\1.2.840.10008.5.1.4.1.1.4")
    assert refused(CT_INPUT, headers).code in {"sop-class", "no-images"}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about the values
@settings(max_examples=300, deadline=None)
@given(
    which=st.integers(0, 2),
    garbage=st.dictionaries(st.sampled_from(KEYWORDS), _VALUES, min_size=1, max_size=4),
    only=st.none() | st.integers(0, 7),
)
def test_whatever_bytes_a_header_holds_the_answer_is_a_selection_or_a_coded_refusal(
    which: int, garbage: dict[str, bytes], only: int | None
) -> None:
    headers = change(STUDIES[which](), only, **garbage)
    with contextlib.suppress(NotEligible):
        assert select(PACKAGES[which], headers).series
