"""Nothing leaves that doesn't say what the findings say: each planted mistake is caught, each right object passes."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Findings, ResultObject, Segment
from dicomnode.results.decoding import concept_of
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation
from results_cases import DIGEST, ORIENTATIONS, Case, finding_of, sphere, synthetic

Objects = tuple[Case, Findings, ResultObject, ResultObject]


def encode(case: Case, findings: Findings) -> Objects:
    seg = encode_segmentation(findings, case.volume, case.headers, case.identity)
    assert seg is not None
    return case, findings, seg, encode_report(findings, case.volume, case.headers, case.identity, seg)


def asymmetric(case: Case) -> Segment:
    """A wedge: no flip or turn of it is itself."""
    mask = np.zeros((4, 9, 7), dtype=np.bool_)
    for k in range(4):
        for r in range(9):
            mask[k, r, : max(1, 7 - r + k)] = True
    return Segment(mask=mask, origin=(3, 12, 20))


@pytest.fixture(scope="module")
def objects() -> Objects:
    case = synthetic()
    return encode(case, case.findings(finding_of(case, asymmetric(case)), sphere(case, (10, -20, 115), 5, side="right")))


def changed(result: ResultObject, change: Callable[[Dataset], None]) -> ResultObject:
    dataset = pydicom.dcmread(BytesIO(result.data))
    change(dataset)
    buffer = BytesIO()
    dataset.save_as(buffer)
    return replace(result, parts=(buffer.getvalue(),))


def repainted(seg: Dataset, paint: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    """Change the (frames, rows, columns) pixels of a SEG."""
    shape = (int(seg.NumberOfFrames), int(seg.Rows), int(seg.Columns))
    bits = np.unpackbits(np.frombuffer(seg.PixelData, dtype=np.uint8), bitorder="little", count=int(np.prod(shape)))
    packed = np.packbits(paint(bits.reshape(shape).copy()).ravel(), bitorder="little").tobytes()
    seg.PixelData = packed + b"\0" * (len(packed) % 2)


def one_voxel_less(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels[tuple(np.argwhere(pixels)[0])] = 0
    return pixels


def one_voxel_elsewhere(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Same count, same bounds, and the centre moves by a small part of a voxel: only a look at each voxel sees it."""
    frame, row, column = (int(v) for v in np.argwhere(pixels)[0])
    end = int(np.flatnonzero(pixels[frame, row + 6])[-1])
    pixels[frame, row + 2, column + 1] = 0
    pixels[frame, row + 6, end + 1] = 1
    return pixels


def move(seg: Dataset, millimetres: tuple[float, float, float]) -> None:
    for frame in seg.PerFrameFunctionalGroupsSequence:
        plane = frame.PlanePositionSequence[0]
        plane.ImagePositionPatient = [float(a) + b for a, b in zip(plane.ImagePositionPatient, millimetres, strict=True)]


def turn(seg: Dataset) -> None:
    plane = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    plane.ImageOrientationPatient = [-float(v) for v in plane.ImageOrientationPatient[:3]] + list(plane.ImageOrientationPatient[3:])


def swap_sides(seg: Dataset) -> None:
    first, second = (s.AnatomicRegionSequence[0] for s in seg.SegmentSequence)
    first.AnatomicRegionModifierSequence, second.AnatomicRegionModifierSequence = (
        second.AnatomicRegionModifierSequence,
        first.AnatomicRegionModifierSequence,
    )


def swap_segments(seg: Dataset) -> None:
    for frame in seg.PerFrameFunctionalGroupsSequence:
        item = frame.SegmentIdentificationSequence[0]
        item.ReferencedSegmentNumber = 3 - item.ReferencedSegmentNumber


def name_neighbour(seg: Dataset) -> None:
    source = [f.DerivationImageSequence[0].SourceImageSequence[0] for f in seg.PerFrameFunctionalGroupsSequence]
    source[0].ReferencedSOPInstanceUID = source[1].ReferencedSOPInstanceUID


def name_stranger(seg: Dataset) -> None:
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID = "1.2.3.4"


def thicker(seg: Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = "2.6"


def wider(seg: Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.8, 0.8]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: repainted(s, lambda p: p[:, :, ::-1]), "centre"),
        (lambda s: repainted(s, lambda p: p[:, ::-1, :]), "centre"),
        (lambda s: repainted(s, lambda p: np.roll(p, 1, axis=2)), "centre"),
        (lambda s: repainted(s, lambda p: np.roll(p, -1, axis=1)), "centre"),
        (lambda s: repainted(s, one_voxel_less), "voxels, its finding"),
        (lambda s: repainted(s, one_voxel_elsewhere), "other voxels"),
        (lambda s: move(s, (0, 0, 2.5)), "1.00 voxels away"),
        (lambda s: move(s, (0.7, 0, 0)), "1.00 voxels away"),
        (lambda s: move(s, (0, 0, -1.5)), "0.60 voxels away"),
        (turn, "voxels away"),
        (swap_sides, "side"),
        (swap_segments, "voxels, its finding"),
        (name_neighbour, "1.00 voxels away"),
        (name_stranger, "1.2.3.4"),
        (thicker, "ml by its own pixel measures"),
        (wider, "voxels away"),
        (lambda s: setattr(s, "FrameOfReferenceUID", "1.2.3"), "Frame of Reference"),
        (lambda s: setattr(s, "StudyInstanceUID", "1.2.3"), "another study"),
        (lambda s: setattr(s, "ContentQualification", "PRODUCT"), "RESEARCH"),
        (lambda s: setattr(s.SegmentSequence[0], "TrackingUID", "1.2.3"), "Tracking UID"),
        (lambda s: s.SegmentSequence.pop(), "belongs to segment 2"),
    ],
)
def test_a_wrong_segmentation_is_withheld(objects: Objects, change: Callable[[Dataset], None], sentence: str) -> None:
    case, findings, seg, report = objects
    with pytest.raises(ProofFailed, match=sentence):
        prove(changed(seg, change), report, findings, case.volume)


def items(below: Dataset, value_type: str) -> list[Dataset]:
    here = [i for i in below.get("ContentSequence", []) if i.ValueType == value_type]
    return here + [j for i in below.get("ContentSequence", []) for j in items(i, value_type)]


def number(report: Dataset, code: str) -> Dataset:
    return next(i.MeasuredValueSequence[0] for i in items(report, "NUM") if i.ConceptNameCodeSequence[0].CodeValue == code)


def set_number(code: str, value: str) -> Callable[[Dataset], None]:
    return lambda report: setattr(number(report, code), "NumericValue", value)


def set_unit(code: str, unit: str, scheme: str = "UCUM") -> Callable[[Dataset], None]:
    def change(report: Dataset) -> None:
        item = number(report, code).MeasurementUnitsCodeSequence[0]
        item.CodeValue, item.CodingSchemeDesignator = unit, scheme

    return change


def of_line(report: Dataset) -> Dataset:
    return items(report, "SCOORD")[0]


def move_line(report: Dataset) -> None:
    of_line(report).GraphicData = [v + 1 for v in of_line(report).GraphicData]


def stretch_line(report: Dataset) -> None:
    x1, y1, x2, y2 = of_line(report).GraphicData
    of_line(report).GraphicData = [x1, y1, x2 + 1, y2]


def line_on(uid: str) -> Callable[[Dataset], None]:
    return lambda report: setattr(of_line(report).ContentSequence[0].ReferencedSOPSequence[0], "ReferencedSOPInstanceUID", uid)


def reference(report: Dataset) -> Dataset:
    return next(i.ReferencedSOPSequence[0] for i in items(report, "IMAGE") if "ReferencedSegmentNumber" in i.ReferencedSOPSequence[0])


def drop_tracking_uid(report: Dataset) -> None:
    group = next(i for i in items(report, "CONTAINER") if i.ConceptNameCodeSequence[0].CodeValue == "125007")
    group.ContentSequence = [i for i in group.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue != "112040"]


def drop_last_group(report: Dataset) -> None:
    next(i for i in items(report, "CONTAINER") if i.ConceptNameCodeSequence[0].CodeValue == "126010").ContentSequence.pop()


def other_side(report: Dataset) -> None:
    item = next(i for i in items(report, "CODE") if i.ConceptNameCodeSequence[0].CodeValue == "272741003")
    item.ConceptCodeSequence[0].CodeValue = "24028007"


def no_finding(report: Dataset) -> None:
    item = next(i for i in items(report, "CODE") if i.ConceptNameCodeSequence[0].CodeValue == "111017")
    item.ConceptCodeSequence[0].CodeValue = "111241"


def without(concept: str) -> Callable[[Dataset], None]:
    """Leave one content item of a concept out, the last."""

    def change(report: Dataset) -> None:
        holders = [report, *items(report, "CONTAINER")]
        holder = next(h for h in reversed(holders) if concept in [concept_of(i) for i in h.get("ContentSequence", [])])
        holder.ContentSequence = [i for i in holder.ContentSequence if concept_of(i) != concept]

    return change


def other(concept: str, **values: str) -> Callable[[Dataset], None]:
    """Say something else under a concept, where it stands last."""

    def change(report: Dataset) -> None:
        item = [i for i in (*items(report, "CODE"), *items(report, "TEXT")) if concept_of(i) == concept][-1]
        for keyword, value in values.items():
            setattr(item.ConceptCodeSequence[0] if keyword == "CodeValue" else item, keyword, value)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("121058"), "Procedure Reported is missing"),
        (other("121058", CodeValue="25056-3"), "Procedure Reported"),  # an MRI
        (without("111001"), "as a group's algorithm"),
        (other("111001", TextValue="Another model"), "Another model"),
        (without("111003"), "as the version"),
        (other("111003", TextValue="0.1.0"), "with its weights"),
        (other("111003", TextValue=f"9.9.9 weights sha256:{DIGEST}"), "9.9.9"),
        (set_number("118565006", "9.9"), "9.9"),
        (set_unit("118565006", "mm3"), "ml for finding 1"),
        (set_unit("118565006", "mm"), "isn't one of"),
        (set_unit("118565006", "ml", "99LOCAL"), "isn't one of"),
        (set_number("103339001", "1"), "says 1.0 mm"),
        (set_unit("103339001", "cm"), "mm for finding 1"),
        (move_line, "elsewhere"),
        (stretch_line, "long on its image"),
        (line_on("1.2.3"), "1.2.3|isn't a line on an image"),
        (line_on("1.2.826.0.1.3680043.8.498.1.3.12"), "elsewhere"),
        (lambda r: setattr(reference(r), "ReferencedSOPInstanceUID", "1.2.9"), "another segment"),
        (lambda r: setattr(reference(r), "ReferencedSegmentNumber", 2), "another segment"),
        (drop_tracking_uid, "Tracking Unique"),
        (drop_last_group, "belong to no finding"),
        (other_side, "right"),
        (no_finding, "summary"),
        (lambda r: setattr(r, "VerificationFlag", "VERIFIED"), "verified"),
        (lambda r: setattr(r, "ContentQualification", "PRODUCT"), "RESEARCH"),
        (lambda r: setattr(r, "SOPInstanceUID", "1.2.3"), "SOP Instance UID"),
    ],
)
def test_a_wrong_report_is_withheld(objects: Objects, change: Callable[[Dataset], None], sentence: str) -> None:
    case, findings, seg, report = objects
    with pytest.raises(ProofFailed, match=sentence):
        prove(seg, changed(report, change), findings, case.volume)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_right_objects_pass_in_every_orientation_and_slice_order(orientation: str, reverse: bool) -> None:
    case = synthetic(orientation, reverse=reverse)
    _, findings, seg, report = encode(
        case, case.findings(finding_of(case, asymmetric(case)), finding_of(case, replace(asymmetric(case), origin=(0, 0, 0))))
    )
    prove(seg, report, findings, case.volume)


def test_a_stack_as_uneven_as_scanners_make_it_passes() -> None:
    """Positions rounded to 0.1 mm, cosines to three decimals, spacing that differs in the fourth."""
    case = synthetic("oblique", shape=(12, 512, 512))
    for k, header in enumerate(case.headers):
        header.ImagePositionPatient = [round(float(v), 1) for v in header.ImagePositionPatient]
        header.ImageOrientationPatient = [round(float(v) + (0.0005 if k == 0 else 0), 3) for v in header.ImageOrientationPatient]
        header.PixelSpacing = [0.8005, 0.7005] if k == 0 else [0.8, 0.7]
    wedge = replace(asymmetric(case), origin=(0, 500, 500))
    _, findings, seg, report = encode(case, case.findings(finding_of(case, wedge)))
    prove(seg, report, findings, case.volume)


def test_a_report_without_findings_passes_without_segmentation() -> None:
    case = synthetic()
    findings = case.findings()
    report = encode_report(findings, case.volume, case.headers, case.identity, None)
    prove(None, report, findings, case.volume)


def test_a_segmentation_without_findings_and_findings_without_one_are_withheld(objects: Objects) -> None:
    case, findings, seg, report = objects
    for segmentation, said in ((seg, replace(findings, findings=())), (None, findings)):
        with pytest.raises(ProofFailed, match="exactly when"):
            prove(segmentation, report, said, case.volume)


def test_the_report_of_another_finding_is_withheld(objects: Objects) -> None:
    case, findings, seg, _ = objects
    other = case.findings(*reversed(findings.findings))
    report = encode_report(other, case.volume, case.headers, case.identity, seg)
    with pytest.raises(ProofFailed):
        prove(seg, report, findings, case.volume)


def test_the_slices_in_reverse_order_are_not_the_same_volume(objects: Objects) -> None:
    case, findings, seg, report = objects
    backwards = replace(case.volume, sop_instance_uids=case.volume.sop_instance_uids[::-1])
    with pytest.raises(ProofFailed):
        prove(seg, report, findings, backwards)
