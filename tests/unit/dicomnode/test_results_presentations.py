"""Presentation states outline the findings on the original images, shown as these say, and a wrong one doesn't leave."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom import DataElement, Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import Finding, Findings, ResultObject, Segment
from dicomnode.results.outlines import outlines
from dicomnode.results.presentation import encode_presentations
from dicomnode.results.proof_presentations import prove_presentations
from results_cases import Case, box_of, enhanced, finding_of, heat_map_of, projection, synthetic, written_again

WEDGE = np.tri(9, 7, 2, dtype=np.bool_)


def states(case: Case, findings: Findings) -> tuple[ResultObject, ...]:
    return encode_presentations(findings, case.volume, case.headers, case.identity)


def read(made: ResultObject) -> Dataset:
    return pydicom.dcmread(BytesIO(made.data))


def pair(case: Case) -> Findings:
    """A wedge with a hole, of other shape on each slice, and a block that shares a slice with it; of a film on its one image."""
    wedge = np.stack([WEDGE, np.roll(WEDGE, 1, axis=1), WEDGE[::-1]])[: len(case.volume.voxels)]
    wedge[0, 6, 2] = False
    block = Segment(mask=np.ones((min(2, len(case.volume.voxels)), 6, 5), dtype=np.bool_), origin=(len(wedge) - 1, 12, 8))
    other = replace(finding_of(case, block, side=None), colour_cielab=(60.0, -40.0, 10.0))
    return case.findings(finding_of(case, Segment(mask=wedge, origin=(0, 20, 30))), other)


@pytest.mark.parametrize("seed", range(4))
def test_lines_along_pixel_edges_enclose_the_mask_and_nothing_else(seed: int) -> None:
    """Drawn ten times as large by another program, the lines fill to the mask itself, whatever its holes and corners."""
    mask = np.random.default_rng(seed).random((12, 15)) < 0.25 + 0.2 * seed
    filled = np.zeros((120, 150), dtype=np.int64)
    for line in outlines(mask):
        assert (line[0] == line[-1]).all()
        image = Image.new("1", (150, 120))
        ImageDraw.Draw(image).polygon([tuple(point) for point in (line * 10).tolist()], fill=1)
        filled += np.asarray(image)
    centres = filled[5::10, 5::10]
    assert (centres % 2 == mask).all()


def test_a_single_pixel_is_a_square_and_pixels_that_touch_at_a_corner_are_two() -> None:
    assert [line.tolist() for line in outlines(np.eye(2, dtype=np.bool_))] == [
        [[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]],
        [[1, 1], [2, 1], [2, 2], [1, 2], [1, 1]],
    ]


@pytest.mark.parametrize(
    "case",
    [synthetic(), synthetic("coronal", reverse=True), synthetic("oblique"), enhanced("MR"), projection("DX"), projection("XA", frame=3)],
    ids=["axial", "coronal", "oblique", "frames", "film", "frame of a film"],
)
def test_each_finding_is_outlined_on_each_of_its_images(case: Case) -> None:
    findings = pair(case)
    (made,) = states(case, findings)
    prove_presentations([made], findings, case.volume)
    state = read(made)
    outlined = [a for a in state.GraphicAnnotationSequence if "GraphicObjectSequence" in a]
    crossed = [(finding.number, finding.segment.origin[0] + k) for finding in findings.findings for k in range(len(finding.segment.mask))]
    named = {}
    for annotation in outlined:
        (reference,), (label,) = annotation.ReferencedImageSequence, annotation.TextObjectSequence
        k = next(
            k
            for k, uid in enumerate(case.volume.sop_instance_uids)
            if uid == reference.ReferencedSOPInstanceUID
            and (case.volume.frame_numbers or [None] * (k + 1))[k] == reference.get("ReferencedFrameNumber")
        )
        number = int(label.UnformattedTextValue.split(":")[0])
        points = np.concatenate([np.reshape(g.GraphicData, (-1, 2)) for g in annotation.GraphicObjectSequence])
        part = np.argwhere(findings.findings[number - 1].segment.mask[k - findings.findings[number - 1].segment.origin[0]])
        part += findings.findings[number - 1].segment.origin[1:]
        assert points.min(axis=0).tolist() == part.min(axis=0)[::-1].tolist()
        assert points.max(axis=0).tolist() == (part.max(axis=0)[::-1] + 1).tolist()
        named[number, k] = str(label.UnformattedTextValue)
    assert sorted(named) == sorted(crossed)
    assert set(named.values()) == {"1: Lung nodule, left", "2: Lung nodule"}


def test_a_state_belongs_to_the_study_and_says_what_it_is() -> None:
    case = synthetic(character_set=["", "ISO 2022 IR 87"], patient_name="Yamada^Tarou=山田^太郎=やまだ^たろう")
    (made,) = states(case, pair(case))
    state = read(made)
    assert (made.modality, state.Modality, state.SOPClassUID) == ("PR", "PR", "1.2.840.10008.5.1.4.1.1.11.1")
    assert str(state.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
    assert (state.PresentationCreationDate, state.PresentationCreationTime) == ("20260304", "050607")
    assert (state.ContentLabel, state.ContentQualification, state.SeriesNumber) == ("LUNG_NODULE_CT", "RESEARCH", 9008)
    assert "RESEARCH USE ONLY" in state.ContentDescription
    (series,) = state.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == case.volume.series_instance_uid
    assert [r.ReferencedSOPInstanceUID for r in series.ReferencedImageSequence] == list(case.volume.sop_instance_uids[:4])
    assert [layer.GraphicLayer for layer in state.GraphicLayerSequence] == ["WORDS", "FINDINGS 1", "FINDINGS 2"]
    assert len({tuple(layer.GraphicLayerRecommendedDisplayCIELabValue) for layer in state.GraphicLayerSequence}) == 3
    (area,) = state.DisplayedAreaSelectionSequence
    assert (area.DisplayedAreaBottomRightHandCorner, area.PresentationPixelSpacing) == ([60, 50], [0.8, 0.7])
    assert states(case, pair(case))[0].data == made.data


def test_without_a_finding_there_is_no_state() -> None:
    case = synthetic()
    assert states(case, case.findings()) == ()
    prove_presentations((), case.findings(), case.volume)


CT = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "RescaleType": "HU"}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (synthetic(**CT, WindowCenter=[40, -600], WindowWidth=[400, 1500]), (-1024, "HU", 40, 400, None)),
        (synthetic(**CT), (-1024, "HU", -600, 1500, None)),
        (synthetic(**CT, WindowCenter="", WindowWidth="0"), (-1024, "HU", -600, 1500, None)),
        (synthetic(Modality="MR", WindowCenter="0.5", WindowWidth="0.25", VOILUTFunction="SIGMOID"), (0, "US", 0.5, 0.25, "SIGMOID")),
    ],
    ids=["first window", "none", "malformed", "function"],
)
def test_images_are_shown_as_they_say_and_else_as_pictures_show_them(case: Case, said: tuple[Any, ...]) -> None:
    (made,) = states(case, pair(case))
    state = read(made)
    (window,) = state.SoftcopyVOILUTSequence
    shown = state.RescaleIntercept, state.RescaleType, window.WindowCenter, window.WindowWidth, window.get("VOILUTFunction")
    assert shown == said
    assert (state.RescaleSlope, state.PresentationLUTShape) == (1, "IDENTITY")


def test_each_image_keeps_a_window_of_its_own() -> None:
    case = synthetic(**CT)
    for k, header in enumerate(case.headers):
        header.WindowCenter, header.WindowWidth = (40, 400) if k < 2 else (-600, 1500)
    (made,) = states(case, pair(case))
    windows = {
        float(item.WindowCenter): [r.ReferencedSOPInstanceUID for r in item.ReferencedImageSequence]
        for item in read(made).SoftcopyVOILUTSequence
    }
    assert windows == {40: list(case.volume.sop_instance_uids[:2]), -600: list(case.volume.sop_instance_uids[2:4])}


def test_images_that_are_rescaled_in_other_ways_have_states_of_their_own() -> None:
    case = synthetic(**CT)
    case.headers[3].RescaleIntercept = "-1000"
    findings = pair(case)
    made = states(case, findings)
    prove_presentations(made, findings, case.volume)
    assert [read(state).RescaleIntercept for state in made] == [-1024, -1000]
    assert len({state.sop_instance_uid for state in made}) == 2


def test_a_frame_has_its_window_and_rescaling_in_its_groups() -> None:
    case = enhanced("CT")
    (header,) = case.headers
    values, window = Dataset(), Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = "2", "-1024", "HU"
    header.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [values]
    for number, frame in enumerate(header.PerFrameFunctionalGroupsSequence, start=1):
        window = Dataset()
        window.WindowCenter, window.WindowWidth = 10 * number, 400
        frame.FrameVOILUTSequence = [window]
    (made,) = states(case, pair(case))
    state = read(made)
    assert (state.RescaleSlope, state.RescaleIntercept) == (2, -1024)
    assert len(state.SoftcopyVOILUTSequence) == 4
    for item in state.SoftcopyVOILUTSequence:
        assert item.WindowCenter == 10 * item.ReferencedImageSequence[0].ReferencedFrameNumber
    assert sorted(state.ReferencedSeriesSequence[0].ReferencedImageSequence[0].ReferencedFrameNumber) == sorted(
        case.volume.frame_numbers[:4] if case.volume.frame_numbers else ()
    )


def test_a_film_whose_small_values_are_bright_stays_so() -> None:
    """Its volume is turned round, its stored values aren't: the window is for these."""
    case = projection("DX", PhotometricInterpretation="MONOCHROME1", BitsStored=12, PixelRepresentation=0)
    dense = np.linspace(3000, 4000, 80 * 60).reshape(1, 80, 60).astype(np.int16)
    case = replace(case, volume=replace(case.volume, voxels=dense))
    (made,) = states(case, pair(case))
    state = read(made)
    (window,) = state.SoftcopyVOILUTSequence
    assert state.PresentationLUTShape == "INVERSE"
    assert (float(window.WindowCenter), float(window.WindowWidth)) == pytest.approx((592.5, 985), abs=5)  # stored: 95 to 1095
    assert state.DisplayedAreaSelectionSequence[0].PresentationPixelAspectRatio == [4, 3]


def test_lookup_tables_are_repeated() -> None:
    def table(first: int, entries: NDArray[np.uint16], signed: bool) -> Dataset:
        item = Dataset()
        item.add(DataElement("LUTDescriptor", "SS" if signed else "US", [len(entries), first, 12]))
        item.add(DataElement("LUTData", "OW", entries.tobytes()))
        return item

    curve = (np.arange(100) ** 2 % 4096).astype(np.uint16)
    modality = table(7, curve, signed=False)
    modality.ModalityLUTType = "OD"
    case = projection("CR", VOILUTSequence=[table(-20, curve, signed=True)], ModalityLUTSequence=[modality])
    (made,) = states(case, pair(case))
    state = read(made)
    for (item,), first in ((state.ModalityLUTSequence, 7), (state.SoftcopyVOILUTSequence[0].VOILUTSequence, -20)):
        assert list(item.LUTDescriptor) == [100, first, 12]
        assert np.array_equal(np.frombuffer(item.LUTData, dtype=np.uint16) if isinstance(item.LUTData, bytes) else item.LUTData, curve)
    assert "RescaleSlope" not in state


def test_boxes_and_heat_maps_are_outlined_as_what_they_are() -> None:
    case = projection("DX")
    warm = heat_map_of(case, Segment(mask=WEDGE[None], origin=(0, 50, 8)), side=None)
    findings = case.findings(box_of(case, (0, 22, 33), (1, 10, 12), side="right"), warm)
    made = states(case, findings)
    prove_presentations(made, findings, case.volume)
    labels = [t.UnformattedTextValue for a in read(made[0]).GraphicAnnotationSequence for t in a.TextObjectSequence]
    assert labels[1:] == ["1: Lung nodule, right (box)", "2: Pneumothorax (heat map)"]


def test_beyond_the_cap_images_nearest_to_the_measured_ones_are_shown_and_the_others_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.results.presentation.MOST", 8)
    monkeypatch.setattr("dicomnode.results.proof_presentations._MOST", 8)
    case = synthetic(shape=(20, 8, 8))
    mask = np.ones((15, 2, 2), dtype=np.bool_)
    mask[7] = False  # on which it isn't
    long, short = (finding_of(case, Segment(mask=m, origin=(k, 2, 2))) for m, k in ((mask, 1), (mask[:1], 18)))
    findings = case.findings(long, short)
    made = states(case, findings)
    prove_presentations(made, findings, case.volume)
    state = read(made[0])
    shown = [str(r.ReferencedSOPInstanceUID) for r in state.ReferencedSeriesSequence[0].ReferencedImageSequence]
    assert shown == [case.volume.sop_instance_uids[k] for k in (1, 2, 3, 4, 5, 14, 15, 18)]  # measured on slices 1 and 18
    assert "7 further images have findings" in state.GraphicAnnotationSequence[0].TextObjectSequence[0].UnformattedTextValue


def test_a_line_that_is_longer_than_an_element_goes_on_in_the_next() -> None:
    comb = np.zeros((2, 8200), dtype=np.bool_)
    comb[1], comb[0, ::2] = True, True
    case = synthetic(shape=(1, 3, 8200))
    finding = replace(
        finding_of(case, Segment(mask=comb[None, :, :3], origin=(0, 0, 0))), segment=Segment(mask=comb[None], origin=(0, 0, 0))
    )
    findings = case.findings(finding)
    made = states(case, findings)
    prove_presentations(made, findings, case.volume)
    (annotation,) = (a for a in read(made[0]).GraphicAnnotationSequence if "GraphicObjectSequence" in a)
    assert [g.NumberOfGraphicPoints for g in annotation.GraphicObjectSequence] == [8001, 8001, 403]


def moved(finding: Finding, by: tuple[int, int, int]) -> Finding:
    k, r, c = (a + b for a, b in zip(finding.segment.origin, by, strict=True))
    return replace(finding, segment=replace(finding.segment, origin=(k, r, c)))


def flipped(finding: Finding, axis: int) -> Finding:
    return replace(finding, segment=replace(finding.segment, mask=np.flip(finding.segment.mask, axis)))


@pytest.mark.parametrize(
    ("wrongly", "why"),
    [
        (lambda f: moved(f, (0, 0, 1)), "other pixels"),
        (lambda f: moved(f, (0, -1, 0)), "other pixels"),
        (lambda f: moved(f, (1, 0, 0)), "other pixels|where the finding isn't"),
        (lambda f: moved(f, (3, 0, 0)), "where the finding isn't"),
        (lambda f: flipped(f, 0), "other pixels"),
        (lambda f: flipped(f, 1), "other pixels"),
        (lambda f: flipped(f, 2), "other pixels"),
        (lambda f: replace(f, side="right"), "another side"),
        (lambda f: replace(f, segment=replace(f.segment, mask=f.segment.mask[:2])), "where the finding isn't|slices without"),
    ],
    ids=["right", "up", "next slice", "far slice", "feet first", "upside down", "mirrored", "side", "shorter"],
)
def test_outlines_of_another_place_do_not_leave(wrongly: Any, why: str) -> None:
    case = synthetic()
    made = states(case, pair(case))
    first, second = pair(case).findings
    with pytest.raises(ProofFailed, match=why):
        prove_presentations(made, replace(pair(case), findings=(wrongly(first), second)), case.volume)


def changed(made: ResultObject, change: Any) -> ResultObject:
    state = read(made)
    change(state)
    return replace(made, parts=(written_again(state),))


def outline(state: Dataset) -> Dataset:
    found: Dataset = next(a for a in state.GraphicAnnotationSequence if "GraphicObjectSequence" in a)
    return found


def spike(state: Dataset) -> None:
    """A line that leaves the border and comes back between two columns of pixel centres."""
    graphic = outline(state).GraphicObjectSequence[0]
    x, y, *others = graphic.GraphicData
    graphic.GraphicData, graphic.NumberOfGraphicPoints = [x, y, x, 0.0, x, y, *others], graphic.NumberOfGraphicPoints + 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda s: setattr(outline(s), "ReferencedImageSequence", s.GraphicAnnotationSequence[-1].ReferencedImageSequence),
            "outlined|other|isn't",
        ),
        (lambda s: setattr(outline(s).ReferencedImageSequence[0], "ReferencedSOPInstanceUID", "1.2.3"), "no image of the volume"),
        (lambda s: setattr(outline(s).GraphicObjectSequence[0], "GraphicAnnotationUnits", "DISPLAY"), "in pixels"),
        (lambda s: setattr(outline(s).TextObjectSequence[0], "UnformattedTextValue", "2: Lung nodule"), "finding isn't|other pixels"),
        (lambda s: setattr(outline(s).TextObjectSequence[0], "UnformattedTextValue", "nodule"), "no finding"),
        (spike, "off its border"),
        (lambda s: outline(s).GraphicObjectSequence.pop(), "other pixels|closed"),
        (lambda s: s.GraphicAnnotationSequence.remove(outline(s)), "aren't outlined"),
        (lambda s: s.GraphicAnnotationSequence.pop(0), "for research only"),
        (lambda s: s.ReferencedSeriesSequence[0].ReferencedImageSequence.pop(), "doesn't reference"),
        (lambda s: setattr(s.ReferencedSeriesSequence[0], "SeriesInstanceUID", "1.2"), "the series"),
        (lambda s: setattr(s.DisplayedAreaSelectionSequence[0], "DisplayedAreaTopLeftHandCorner", [1, 10]), "not all of them"),
        (lambda s: setattr(s, "ContentQualification", "PRODUCT"), "RESEARCH"),
        (lambda s: setattr(s, "StudyInstanceUID", "1.2"), "another study"),
        (lambda s: setattr(s, "SOPInstanceUID", "1.2"), "than was announced"),
    ],
)
def test_a_changed_state_does_not_leave(change: Any, why: str) -> None:
    case = synthetic()
    (made,) = states(case, pair(case))
    with pytest.raises(ProofFailed, match=why):
        prove_presentations([changed(made, change)], pair(case), case.volume)


def test_a_state_is_there_exactly_where_there_are_findings() -> None:
    case = synthetic()
    made = states(case, pair(case))
    for some, said in ((made, case.findings()), ((), pair(case)), ((*made, *made), pair(case))):
        with pytest.raises(ProofFailed):
            prove_presentations(some, said, case.volume)
