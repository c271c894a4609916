"""A display profile holds together: each peer hears of no finding, and each report speaks of the segmentation that goes with it."""

from __future__ import annotations

import pytest

from dicomnode.pipeline import _encoded as encoded
from dicomnode.results.profile import PROFILES, USUAL, Form, check_objects, chosen, made_as, parts
from results_cases import box_of, projection, sphere, synthetic
from storage.records import STANDARD_OBJECTS


def test_named_profiles_are_sound_and_the_standard_one_is_the_default() -> None:
    for profile in PROFILES.values():
        assert check_objects(profile) == profile
    assert chosen(None, ()) == chosen("standard", ()) == STANDARD_OBJECTS
    assert chosen("plain", ()) == ("key-image",)


def test_kinds_are_put_in_order_each_once() -> None:
    assert check_objects(["key-image", "sr", "seg", "sr"]) == ("seg", "sr", "key-image")


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        (["seg", "gif"], "'gif' is no kind"),
        (["seg"], "no finding must be said"),
        (["seg", "seg-labelmap", "sr"], "seg and seg-labelmap say the same"),
        (["seg", "sr", "sr-comprehensive"], "sr and sr-comprehensive say the same"),
        ([], "no finding must be said"),
    ],
)
def test_what_does_not_go_together_is_refused(kinds: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_objects(kinds)


def test_a_report_refers_to_the_segmentation_of_its_own_profile() -> None:
    assert parts(("seg", "sr-comprehensive", "key-image")) == (("seg", USUAL), ("sr-comprehensive", USUAL), ("key-image", None))
    form = Form(kind="seg-labelmap", per="finding", empty_frames=True)
    assert parts(("seg-labelmap", "sr"), seg_per="finding", empty_frames=True) == (("seg-labelmap", form), ("sr", form))
    assert parts(("sr", "key-image"), seg_per="finding") == (("sr", None), ("key-image", None))


def test_a_name_and_a_list_are_not_both_given() -> None:
    with pytest.raises(ValueError, match="not both"):
        chosen("plain", ["seg", "sr"])
    with pytest.raises(ValueError, match="'weasis' is no display profile"):
        chosen("weasis", ())


def test_what_is_no_segmentation_of_a_film_is_the_usual_one_of_a_volume() -> None:
    form = Form(kind="seg-no-film", per="finding")
    assert [made_as(part, film=False) for part in (("seg-no-film", form), ("sr", form), ("key-image", None))] == [
        ("seg", Form(per="finding")), ("sr", Form(per="finding")), ("key-image", None),
    ]  # fmt: skip
    assert [made_as(part, film=True) for part in (("seg-no-film", form), ("sr", form), ("key-image", None))] == [
        None, ("sr", None), ("key-image", None),
    ]  # fmt: skip
    assert made_as(("seg", USUAL), film=True) == ("seg", USUAL)


def test_a_peer_with_ohif_is_given_a_report_that_draws_alone_and_no_segmentation_of_a_film() -> None:
    usual, ohif = parts(PROFILES["standard"]), parts(PROFILES["ohif"])
    film, chest = projection("CR"), synthetic()
    made = encoded(film.findings(box_of(film, (0, 20, 30), (1, 9, 7))), (film.volume,), film.headers, film.identity, {*usual, *ohif}, ())
    assert [[one.modality for one in made.get(part, ())] for part in (*usual, *ohif)] == [["SEG"], ["SR"], [], ["SR"], ["OT"]]
    (report,), (alone,) = made[usual[1]], made[ohif[1]]
    assert report.sop_instance_uid != alone.sop_instance_uid

    nodule = sphere(chest, chest.volume.to_lps((6.0, 25.0, 30.0)), 9.0)
    made = encoded(chest.findings(nodule), (chest.volume,), chest.headers, chest.identity, {*usual, *ohif}, ())
    assert [made[part] for part in ohif[:2]] == [made[part] for part in usual]


def test_of_a_film_without_findings_everybody_is_given_the_same_report() -> None:
    usual, ohif = parts(PROFILES["standard"]), parts(PROFILES["ohif"])
    film = projection("DX")
    made = encoded(film.findings(), (film.volume,), film.headers, film.identity, {*usual, *ohif}, ())
    assert made[ohif[1]] == made[usual[1]]
