"""The proof holds for frames of multi-frame images, projections, boxes, heat maps, classes and words: each planted mistake is caught."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Finding, Findings, ResultObject, Segment, Volume
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation
from results_cases import Case, another_series, box_of, enhanced, finding_of, heat_map_of, projection, scores, synthetic, written_again

Change = Callable[[Dataset], None]


class Objects:
    """What is proved, with one of its objects changed if so wanted."""

    def __init__(self, case: Case, *found: Finding, others: tuple[Case, ...] = (), **more: object) -> None:
        self.case, self.others = case, others
        self.findings: Findings = case.findings(*found, other_series=tuple(o.volume.series_instance_uid for o in others), **more)
        headers = [header for one in (case, *others) for header in one.headers]
        self.seg = encode_segmentation(self.findings, case.volume, headers, case.identity)
        self.report = encode_report(self.findings, case.volume, headers, case.identity, self.seg)

    def prove(self, *, seg: Change | None = None, report: Change | None = None, volume: Volume | None = None) -> None:
        changed_seg = changed(self.seg, seg) if self.seg and seg else self.seg
        changed_report = changed(self.report, report) if report else self.report
        prove(changed_seg, changed_report, self.findings, volume or self.case.volume, [o.volume for o in self.others])


def changed(result: ResultObject, change: Change) -> ResultObject:
    dataset = pydicom.dcmread(BytesIO(result.data))
    change(dataset)
    return replace(result, parts=(written_again(dataset),))


def wedge(depth: int = 1) -> NDArray[np.bool_]:
    """No flip or turn of it is itself."""
    mask = np.zeros((depth, 9, 7), dtype=np.bool_)
    for row in range(9):
        mask[:, row, : max(1, 7 - row)] = True
    return mask


def of_frames() -> Objects:
    case = enhanced("MR")
    outline = finding_of(case, Segment(mask=wedge(3), origin=(3, 12, 20)))
    return Objects(case, outline, box_of(case, (5, 30, 5), (4, 6, 8), side="right"))


def of_projection() -> Objects:
    case = projection("DX")
    outline = finding_of(case, Segment(mask=wedge(), origin=(0, 20, 30)))
    warm = heat_map_of(case, Segment(mask=wedge(), origin=(0, 50, 8)), side="right")
    box = box_of(case, (0, 22, 33), (1, 10, 12))
    return Objects(case, outline, box, warm, scores=scores(), notes=("Das Knie ≥ 5° gebeugt — nur eine Ansicht.",), omitted=7)


@pytest.fixture(scope="module")
def frames() -> Objects:
    return of_frames()


@pytest.fixture(scope="module")
def radiograph() -> Objects:
    return of_projection()


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_frames_of_a_multi_frame_image_pass_in_any_order(modality: str, shuffled: bool) -> None:
    case = enhanced(modality, shuffled=shuffled)
    Objects(case, finding_of(case, Segment(mask=wedge(3), origin=(3, 12, 20)))).prove()


@pytest.mark.parametrize("orientation", ["coronal", "oblique"])
def test_frames_pass_in_every_orientation(orientation: str) -> None:
    case = enhanced("MR", orientation=orientation, reverse=True)
    Objects(case, box_of(case, (3, 12, 20), (4, 5, 6))).prove()


@pytest.mark.parametrize("modality", ["CR", "DX", "MG"])
@pytest.mark.parametrize("calibration", ["patient", "detector", "none"])
def test_projections_pass_with_every_calibration(modality: str, calibration: str) -> None:
    case = projection(modality, calibration=calibration)
    Objects(case, finding_of(case, Segment(mask=wedge(), origin=(0, 20, 30))), box_of(case, (0, 0, 0), (1, 20, 15))).prove()


def test_a_frame_of_a_projection_run_passes() -> None:
    case = projection("XA", frame=3)
    Objects(case, finding_of(case, Segment(mask=wedge(), origin=(0, 20, 30)))).prove()


def test_what_is_said_of_frames_radiographs_and_series_beside_the_first_passes(frames: Objects, radiograph: Objects) -> None:
    frames.prove()
    radiograph.prove()
    of_set().prove()


def of_set() -> Objects:
    case = synthetic(Modality="MR")
    beside = tuple(another_series(synthetic(Modality="MR"), number) for number in (7, 8, 9))
    return Objects(case, finding_of(case, Segment(mask=wedge(2), origin=(3, 12, 20))), others=beside)


def source(seg: Dataset, frame: int) -> Dataset:
    item: Dataset = seg.PerFrameFunctionalGroupsSequence[frame].DerivationImageSequence[0].SourceImageSequence[0]
    return item


def next_frame(seg: Dataset) -> None:
    source(seg, 0).ReferencedFrameNumber = source(seg, 1).ReferencedFrameNumber


def two_frames(seg: Dataset) -> None:
    source(seg, 0).ReferencedFrameNumber = [1, 2]


def no_frame(seg: Dataset) -> None:
    del source(seg, 0).ReferencedFrameNumber


def repainted(paint: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Change:
    def change(seg: Dataset) -> None:
        shape = (int(seg.NumberOfFrames), int(seg.Rows), int(seg.Columns))
        bits = np.unpackbits(np.frombuffer(seg.PixelData, dtype=np.uint8), bitorder="little", count=int(np.prod(shape)))
        packed = np.packbits(paint(bits.reshape(shape).copy()).ravel(), bitorder="little").tobytes()
        seg.PixelData = packed + b"\0" * (len(packed) % 2)

    return change


def swap_frames(seg: Dataset) -> None:
    """The second segment's pixels under the first segment's number."""
    items = seg.PerFrameFunctionalGroupsSequence
    for item in items:
        number = item.SegmentIdentificationSequence[0]
        number.ReferencedSegmentNumber = {1: 2, 2: 1}.get(number.ReferencedSegmentNumber, number.ReferencedSegmentNumber)


def moved(seg: Dataset) -> None:
    position = seg.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0]
    position.ImagePositionPatient = [*position.ImagePositionPatient[:2], float(position.ImagePositionPatient[2]) + 1.5]


def placed(seg: Dataset) -> None:
    position = Dataset()
    position.ImagePositionPatient = [0, 0, 0]
    seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence = [position]


def spaced(seg: Dataset) -> None:
    measures = Dataset()
    measures.PixelSpacing = [0.2, 0.15]
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = [measures]


def plain_label(seg: Dataset) -> None:
    seg.SegmentSequence[1].SegmentLabel = "Lung nodule 2"


def boxed_label(seg: Dataset) -> None:
    seg.SegmentSequence[0].SegmentLabel = "Lung nodule 1, box"


def other_type(seg: Dataset) -> None:
    seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue = "1234"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (next_frame, "second of segment 1|voxels away"),
        (two_frames, "as its source"),
        (no_frame, "as its source"),
        (lambda s: setattr(source(s, 0), "ReferencedFrameNumber", 12), "voxels away"),
        (lambda s: setattr(source(s, 0), "ReferencedFrameNumber", 99), "as its source"),
        (moved, "0.60 voxels away"),
        (repainted(lambda p: p[:, :, ::-1]), "centre"),
        (repainted(lambda p: p[:, ::-1, :]), "centre"),
        (repainted(lambda p: np.roll(p, 1, axis=0)), "voxels, its finding|centre"),
        (swap_frames, "voxels, its finding"),
        (plain_label, "labelled 'Lung nodule 2'"),
        (boxed_label, "labelled 'Lung nodule 1, box'"),
        (other_type, "coded as"),
        (lambda s: setattr(s, "FrameOfReferenceUID", "1.2.3"), "Frame of Reference"),
        (lambda s: setattr(s, "SOPInstanceUID", "1.2.3"), "SOP Instance UID"),
    ],
)
def test_a_wrong_segmentation_of_frames_is_withheld(frames: Objects, change: Change, sentence: str) -> None:
    with pytest.raises(ProofFailed, match=sentence):
        frames.prove(seg=change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (repainted(lambda p: p[:, :, ::-1]), "centre"),
        (repainted(lambda p: p[:, ::-1, :]), "centre"),
        (repainted(lambda p: np.roll(p, 1, axis=2)), "centre"),
        (repainted(lambda p: np.roll(p, 1, axis=0)), "voxels, its finding|centre"),
        (swap_frames, "voxels, its finding"),
        (placed, "place in space"),
        (spaced, "claims a pixel spacing"),
        (plain_label, "labelled"),
        (lambda s: setattr(s.SegmentSequence[2], "SegmentLabel", "Pneumothorax 3"), "labelled"),
        (lambda s: setattr(s, "FrameOfReferenceUID", "1.2.3"), "Frame of Reference"),
        (lambda s: setattr(source(s, 0), "ReferencedSOPInstanceUID", "1.2.3"), "as its source"),
        (
            lambda s: setattr(s.SegmentSequence[0].AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0], "CodeValue", "24028007"),
            "side",
        ),
    ],
)
def test_a_wrong_segmentation_of_a_radiograph_is_withheld(radiograph: Objects, change: Change, sentence: str) -> None:
    with pytest.raises(ProofFailed, match=sentence):
        radiograph.prove(seg=change)


def below(item: Dataset, value_type: str) -> list[Dataset]:
    here = list(item.get("ContentSequence", []))
    return [i for i in here if i.ValueType == value_type] + [j for i in here for j in below(i, value_type)]


def concept(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def groups(report: Dataset) -> list[Dataset]:
    return [item for item in below(report, "CONTAINER") if concept(item) == "125007"]


def region(report: Dataset, number: int) -> Dataset:
    """The region of the n-th finding, from 1."""
    return below(report, "SCOORD")[number - 1]


def without_region(number: int) -> Change:
    def change(report: Dataset) -> None:
        group = groups(report)[2 * number - 1]
        group.ContentSequence = [item for item in group.ContentSequence if item.ValueType != "SCOORD"]

    return change


def points(number: int, move: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Change:
    def change(report: Dataset) -> None:
        item = region(report, number)
        item.GraphicData = move(np.reshape(item.GraphicData, (-1, 2)).astype(np.float64)).ravel().tolist()

    return change


def on_frame(number: int, frame: int | None) -> Change:
    def change(report: Dataset) -> None:
        reference = region(report, number).ContentSequence[0].ReferencedSOPSequence[0]
        if frame is None:
            del reference.ReferencedFrameNumber
        else:
            reference.ReferencedFrameNumber = frame

    return change


def value(code: str, number: str, place: int = 0) -> Change:
    def change(report: Dataset) -> None:
        items = [item for item in below(report, "NUM") if concept(item) == code]
        items[place].MeasuredValueSequence[0].NumericValue = number

    return change


def unit(code: str, ucum: str) -> Change:
    def change(report: Dataset) -> None:
        item = next(item for item in below(report, "NUM") if concept(item) == code)
        item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue = ucum

    return change


def other_finding_type(report: Dataset) -> None:
    next(item for item in below(report, "CODE") if concept(item) == "121071").ConceptCodeSequence[0].CodeValue = "1234"


def other_segment(report: Dataset) -> None:
    reference = next(i.ReferencedSOPSequence[0] for i in below(report, "IMAGE") if concept(i) in ("121191", "121214"))
    keyword = "ReferencedSegmentNumber" if "ReferencedSegmentNumber" in reference else "ReferencedFrameNumber"
    setattr(reference, keyword, 2)


def swap_scores(report: Dataset) -> None:
    """The probabilities of the first two classes, each under the other's name."""
    first, second = (next(i for i in below(g, "NUM")).MeasuredValueSequence[0] for g in groups(report)[-4:-2])
    first.NumericValue, second.NumericValue = second.NumericValue, first.NumericValue


def swap_classes(report: Dataset) -> None:
    first, second = (next(i for i in below(g, "CODE") if concept(i) == "121071") for g in groups(report)[-4:-2])
    first.ConceptCodeSequence, second.ConceptCodeSequence = second.ConceptCodeSequence, first.ConceptCodeSequence


def without_class(report: Dataset) -> None:
    next(i for i in below(report, "CONTAINER") if concept(i) == "126010").ContentSequence.pop(-2)


def without_words(words: str) -> Change:
    def change(report: Dataset) -> None:
        container = next(i for i in below(report, "CONTAINER") if concept(i) == "C0034375")
        kept = [i for i in container.ContentSequence if words not in i.TextValue]
        assert len(kept) == len(container.ContentSequence) - 1
        container.ContentSequence = kept

    return change


def reworded(old: str, new: str) -> Change:
    def change(report: Dataset) -> None:
        for item in below(report, "TEXT"):
            item.TextValue = item.TextValue.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_region(1), "once as segment and once as region"),
        (without_region(2), "once as segment and once as region"),
        (points(2, lambda p: p + 1), "1.00 pixels away"),
        (points(2, lambda p: p[:4]), "no closed rectangle"),
        (points(2, lambda p: p[[0, 2]]), "no closed rectangle"),
        (points(1, lambda p: p + 1), "elsewhere"),
        (on_frame(1, None), "isn't a line on an image"),
        (on_frame(1, 99), "isn't a line on an image"),
        (on_frame(1, 1), "elsewhere"),
        (on_frame(2, 1), "rectangle of finding 2 lies on slice 0"),
        (value("118565006", "9.9"), "9.9"),
        (value("111012", "12"), "12.0 %"),
        (unit("118565006", "mm3"), "ml for finding 1"),
        (unit("111012", "1"), "isn't one of"),
        (other_finding_type, r"says \['1234'\]"),
        (other_segment, "another segment"),
        (lambda r: setattr(r, "StudyInstanceUID", "1.2.3"), "another study"),
    ],
)
def test_a_wrong_report_on_frames_is_withheld(frames: Objects, change: Change, sentence: str) -> None:
    with pytest.raises(ProofFailed, match=sentence):
        frames.prove(report=change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_region(1), "once as segment and once as region"),
        (without_region(3), "once as segment and once as region"),
        (points(3, lambda p: p + 1), "1.00 pixels away"),
        (points(3, lambda p: p * [1, -1] + [0, 80]), "pixels away"),
        (points(1, lambda p: p * [-1, 1] + [60, 0]), "elsewhere"),
        (value("42798000", "9.9"), "9.9 mm2"),
        (unit("42798000", "cm2"), "says .* mm2"),
        (unit("42798000", "{pixels}"), "isn't one of"),
        (unit("103339001", "{pixels}"), "isn't one of"),
        (other_segment, "another segment"),
        (swap_scores, "% for Pneumothorax"),
        (points(-1, lambda p: p + 1), "border of an image"),
        (points(-2, lambda p: p / 2), "border of an image"),
        (swap_classes, "not 36118008"),
        (value("111012", "80", -3), r"80.0\] % for Pneumothorax"),
        (without_class, "groups that belong to no finding"),
        (without_words("RESEARCH"), "research"),
        (without_words("Knie"), "doesn't say: Das Knie"),
        (without_words("omitted"), "7 findings are omitted"),
        (reworded("7 further", "8 further"), "7 findings are omitted"),
        (without_words("at the detector"), "measures at the detector"),
        (without_words("Pleural effusion"), "in words: Pleural effusion"),
        (reworded("25.0 %, negative", "25.0 %, positive"), "in words: Pleural effusion"),
    ],
)
def test_a_wrong_report_on_a_radiograph_is_withheld(radiograph: Objects, change: Change, sentence: str) -> None:
    with pytest.raises(ProofFailed, match=sentence):
        radiograph.prove(report=change)


def test_the_frames_of_another_order_are_not_the_same_volume(frames: Objects) -> None:
    numbers = frames.case.volume.frame_numbers
    assert numbers is not None
    with pytest.raises(ProofFailed):
        frames.prove(volume=replace(frames.case.volume, frame_numbers=numbers[::-1]))


def test_classes_are_proved_where_none_is_positive() -> None:
    case = projection("CR")
    negative = tuple(replace(score, probability=0.2, positive=False) for score in scores())
    objects = Objects(case, scores=negative)
    objects.prove()
    with pytest.raises(ProofFailed, match=r"% for Pneumothorax"):
        objects.prove(report=value("111012", "99"))


def without_evidence(report: Dataset) -> None:
    report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence.pop()


def other_series(report: Dataset) -> None:
    first, second = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[:2]
    first.SeriesInstanceUID, second.SeriesInstanceUID = second.SeriesInstanceUID, first.SeriesInstanceUID


@pytest.mark.parametrize("change", [without_evidence, other_series])
def test_a_report_that_forgets_or_confuses_a_series_is_withheld(change: Change) -> None:
    with pytest.raises(ProofFailed, match="evidence doesn't name"):
        of_set().prove(report=change)


def test_a_series_that_the_findings_do_not_name_is_withheld() -> None:
    objects = of_set()
    with pytest.raises(ProofFailed, match="other series"):
        prove(objects.seg, objects.report, objects.findings, objects.case.volume)
