"""A display profile holds together: each peer hears of no finding, and each report speaks of the segmentation that goes with it."""

from __future__ import annotations

import pytest

from dicomnode.results.profile import PROFILES, USUAL, Form, check_objects, chosen, parts
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
