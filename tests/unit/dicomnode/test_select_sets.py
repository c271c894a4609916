"""A package that needs several series gets one for each input, of one study and frame of reference; and each choice is data."""

import random
from pathlib import Path
from typing import Any

import pytest
from eligible_series import CHEST_FILM_INPUT, CT_INPUT, MR_INPUT, Headers, change, manifest_of, mr_series, projection, series
from enhanced_images import SHARED, Groups, at, enhanced_image
from pydicom.uid import EnhancedMRImageStorage, MRImageStorage

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.select import Selection, select

WEIGHTINGS = ("flair", "t1", "t1c", "t2")


def wants(weighting: str, *more: str) -> str:
    return "\n".join([f'name = "{weighting}"', MR_INPUT, f'mr_contrasts = ["{weighting}"]', *more])


FOUR = manifest_of(*(wants(weighting) for weighting in WEIGHTINGS))
TWO = manifest_of(wants("flair"), wants("t1c", "optional = true"))


def brain(*weightings: str, **values: Any) -> Headers:
    """A study with a series of each weighting, Series Number from 1 in this order."""
    return [header for number, weighting in enumerate(weightings, start=1) for header in mr_series(weighting, number, **values)]


def numbers(selection: Selection) -> dict[str, int]:
    return {chosen.input_name: int(chosen.headers[0].SeriesNumber) for chosen in selection.series}


def refusal(manifest: Manifest, headers: Headers) -> NotEligible:
    with pytest.raises(NotEligible) as caught:
        select(manifest, headers)
    return caught.value


@pytest.mark.parametrize("seed", range(5))
def test_each_input_gets_its_weighting_however_the_series_and_images_are_shuffled(seed: int) -> None:
    shuffler = random.Random(seed)
    order = [*WEIGHTINGS, "pd"]
    shuffler.shuffle(order)
    headers = brain(*order)
    shuffler.shuffle(headers)
    selection = select(FOUR, headers)
    assert numbers(selection) == {weighting: order.index(weighting) + 1 for weighting in WEIGHTINGS}
    assert [chosen.input_name for chosen in selection.series] == list(WEIGHTINGS)  # the manifest's order
    assert selection.absent == ()


def test_a_member_in_another_frame_of_reference_makes_no_set() -> None:
    headers = brain("flair", "t1", "t1c") + mr_series("t2", 4, FrameOfReferenceUID="2.25.99")
    caught = refusal(FOUR, headers)
    assert caught.code == "frame-of-reference"
    assert "flair and t1 and t1c and t2" in caught.reason


def test_of_two_visits_in_one_study_the_complete_one_is_taken() -> None:
    first = [header for number, w in enumerate(("flair", "t1", "t1c"), start=1) for header in mr_series(w, number)]
    second = [h for number, w in enumerate(WEIGHTINGS, start=11) for h in mr_series(w, number, FrameOfReferenceUID="2.25.99")]
    selection = select(FOUR, first + second)
    assert numbers(selection) == {"flair": 11, "t1": 12, "t1c": 13, "t2": 14}
    row = next(row for row in selection.considered if row["series_number"] == 1 and row["input"] == "flair")
    assert (row["chosen"], row["reason_code"]) == (False, "frame-of-reference")


def test_a_series_without_its_frame_of_reference_is_no_member() -> None:
    caught = refusal(FOUR, brain("flair", "t1", "t2") + change(mr_series("t1c", 4), FrameOfReferenceUID=None))
    assert caught.code == "missing-geometry"
    assert caught.reason.startswith("Input t1c: Series 4: ")


def test_an_optional_input_that_is_not_there_is_absent_and_said() -> None:
    selection = select(TWO, brain("flair", "t2"))
    assert numbers(selection) == {"flair": 1}
    assert selection.absent == ("t1c",)
    assert selection.why.endswith("without t1c")


def test_an_optional_input_in_another_frame_of_reference_is_absent_and_the_reason_is_kept() -> None:
    selection = select(TWO, brain("flair") + mr_series("t1c", 2, FrameOfReferenceUID="2.25.99"))
    assert selection.absent == ("t1c",)
    row = next(row for row in selection.considered if row["input"] == "t1c" and row["series_number"] == 2)
    assert row["reason_code"] == "frame-of-reference"


def test_an_optional_input_is_taken_where_it_is_there() -> None:
    assert numbers(select(TWO, brain("t1c", "flair"))) == {"flair": 2, "t1c": 1}


def test_an_input_that_must_be_there_and_is_not_refuses_with_what_came_closest() -> None:
    caught = refusal(FOUR, brain("flair", "t1", "t2"))
    assert caught.code == "mr-contrast"
    assert caught.reason.startswith("Input t1c: ")
    rows = [row for row in caught.considered if row["input"] == "t1c"]
    assert {row["reason_code"] for row in rows} == {"mr-contrast"}
    assert not any(row["chosen"] for row in caught.considered)


def test_one_series_is_not_given_to_two_inputs() -> None:
    two_t2 = manifest_of(wants("t2").replace('"t2"', '"first"', 1), wants("t2").replace('"t2"', '"second"', 1))
    assert refusal(two_t2, brain("t2")).code == "same-series"
    assert numbers(select(two_t2, brain("t2", "t2"))) == {"first": 1, "second": 2}


def test_both_echoes_of_one_series_serve_two_inputs() -> None:
    headers = mr_series("pd", 1) + mr_series("t2", 1, first=8)
    selection = select(manifest_of(wants("pd"), wants("t2")), headers)
    assert [float(chosen.headers[0].EchoTime) for chosen in selection.series] == [20.0, 98.0]
    assert [len(chosen.frames) for chosen in selection.series] == [8, 8]


def test_series_of_two_studies_make_no_set() -> None:
    assert refusal(TWO_STRICT, brain("flair") + mr_series("t1c", 2, StudyInstanceUID="2.25.50")).code == "frame-of-reference"


TWO_STRICT = manifest_of(wants("flair"), wants("t1c"))


@pytest.mark.parametrize(
    ("first", "second", "chosen", "rule"),
    [
        ({"SliceThickness": 1.0, "ConvolutionKernel": "B70f"}, {"SliceThickness": 3.0, "ConvolutionKernel": "B30f"}, 2, "preferred kernel"),
        ({"SliceThickness": 5.0}, {"SliceThickness": 1.0}, 2, "thinnest slices"),
        ({"slices": 20}, {"slices": 40}, 2, "covers the most"),
        ({"slices": 11, "spacing": 2.0, "SliceThickness": 3.0}, {"slices": 21, "spacing": 1.0, "SliceThickness": 3.0}, 2, "most images"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, {}, 2, "original before derived"),
        ({"AcquisitionDate": "20260101", "AcquisitionTime": "101500"}, {"AcquisitionDate": "20260101", "AcquisitionTime": "102000.5"}, 2,
         "latest acquisition"),
        ({}, {}, 1, "lowest series number"),
    ],
)  # fmt: skip
def test_of_two_series_that_fit_the_first_rule_that_differs_chooses_and_is_written_down(
    first: dict[str, Any], second: dict[str, Any], chosen: int, rule: str
) -> None:
    manifest = manifest_of(CT_INPUT + 'preferred_kernels = ["B30f", "B31f"]\n')
    selection = select(manifest, series(SeriesNumber=1, **first) + series(SeriesNumber=2, **second))
    assert numbers(selection) == {"image": chosen}
    assert rule in selection.why
    taken, other = selection.considered
    assert (taken["series_number"], taken["chosen"], taken["reason_code"]) == (chosen, True, None)
    assert (other["series_number"], other["chosen"], other["reason_code"]) == (3 - chosen, False, None)
    assert rule in other["reason"]
    assert taken["rank"]["images"] == taken["images"]


def test_what_was_considered_holds_each_series_with_its_reason_and_no_patient() -> None:
    gap = series(9, SeriesNumber=3)
    del gap[4]
    selection = select(manifest_of(CT_INPUT), series(SeriesNumber=1) + series(2, SeriesNumber=2) + gap)
    assert [(row["series_number"], row["reason_code"]) for row in selection.considered] == [
        (1, None), (2, "too-few-slices"), (3, "missing-slices"),
    ]  # fmt: skip
    assert set(selection.considered[0]) == {
        "input", "series_instance_uid", "series_number", "part", "images", "chosen", "reason_code", "reason", "rank",
    }  # fmt: skip
    assert "Doe" not in str(selection.considered)
    assert "SECRET" not in str(selection.considered)


def test_of_diffusion_the_highest_b_value_is_one_stack() -> None:
    diffusion = {"ScanningSequence": "EP", "RepetitionTime": 5000, "EchoTime": 80}
    headers = mr_series("t2", 1, **diffusion, DiffusionBValue=800.0) + mr_series("t2", 1, first=8, **diffusion, DiffusionBValue=1000.0)
    selection = select(manifest_of(wants("diffusion")), headers)
    assert {float(header.DiffusionBValue) for header in selection.series[0].headers} == {1000.0}
    assert "DiffusionBValue 1000" in selection.why


def test_of_films_the_preferred_view_and_then_the_latest_is_taken() -> None:
    ap_and_lateral = projection(1, ViewPosition="AP") + projection(2, ViewPosition="LL")
    assert numbers(select(manifest_of(CHEST_FILM_INPUT), ap_and_lateral)) == {"image": 1}
    with_pa = select(manifest_of(CHEST_FILM_INPUT), [*ap_and_lateral, *projection(3)])
    assert numbers(with_pa) == {"image": 3}
    assert "the preferred view" in with_pa.why
    again = projection(1, 0, ContentDate="20260101", ContentTime="080000") + projection(1, 1, ContentDate="20260101", ContentTime="080500")
    latest = select(manifest_of(CHEST_FILM_INPUT), again)
    assert [int(header.InstanceNumber) for header in latest.series[0].headers] == [2]
    assert "the latest acquisition" in latest.why
    assert [row["part"] for row in latest.considered] == ["image 2", "image 1"]


def test_frontal_and_lateral_films_make_a_set_without_a_frame_of_reference() -> None:
    frontal = 'name = "frontal"\n' + CHEST_FILM_INPUT
    lateral = 'name = "lateral"\n' + CHEST_FILM_INPUT.replace('["PA", "AP"]', '["LAT"]').replace('region = "chest-radiograph"', "")
    selection = select(manifest_of(frontal, lateral), projection(1, ViewPosition="LL") + projection(2))
    assert numbers(selection) == {"frontal": 2, "lateral": 1}


def enhanced(echoes: tuple[float, ...], *, shared: Groups | None = None, **values: Any) -> Headers:
    """One enhanced MR image of a head: eight slices for each echo time, interleaved."""
    groups = [{**at(0, 0, 3.0 * k), "MREchoSequence": {"EffectiveEchoTime": echo}} for k in range(8) for echo in echoes]
    timing: Groups = {
        "MRTimingAndRelatedParametersSequence": {"RepetitionTime": 3000.0, "FlipAngle": 90.0},
        "FrameAnatomySequence": {
            "AnatomicRegionSequence": [{"CodeValue": "69536005", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Head"}]
        },
    }
    image = enhanced_image(groups, shared={**SHARED, **timing, **(shared or {})}, EchoPulseSequence="SPIN", **values)
    return [(Path("enhanced"), image)]


def test_the_echoes_of_one_enhanced_image_serve_two_inputs() -> None:
    manifest = manifest_of(*(wants(w).replace(str(MRImageStorage), str(EnhancedMRImageStorage)) for w in ("pd", "t2")))
    selection = select(manifest, enhanced((20.0, 100.0)))
    assert [[frame.number for frame in chosen.frames] for chosen in selection.series] == [list(range(1, 17, 2)), list(range(2, 17, 2))]
    assert [len(chosen.headers) for chosen in selection.series] == [1, 1]


def test_of_an_enhanced_image_with_echoes_that_nothing_tells_apart_none_is_taken() -> None:
    manifest = manifest_of(MR_INPUT.replace(str(MRImageStorage), str(EnhancedMRImageStorage)))
    assert refusal(manifest, enhanced((20.0, 100.0))).code == "several-echoes"
    assert numbers(select(manifest, enhanced((20.0,)))) == {"image": 3}
    assert refusal(manifest, enhanced((20.0,), QualityControlImage="YES")).code == "quality-control"
    derived: Groups = {"MRImageFrameTypeSequence": {"FrameType": ["DERIVED", "SECONDARY", "MPR", "NONE"]}}
    assert refusal(manifest, enhanced((20.0,), shared=derived)).code == "image-type"
