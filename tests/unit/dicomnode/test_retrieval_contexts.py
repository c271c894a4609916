"""What is proposed for a C-GET fits into one association, and has each class in it; what was fetched is said of a study that closes."""

from __future__ import annotations

import pytest

from dicomnode.dimse.contexts import MAXIMUM_CONTEXTS, STORAGE_CLASSES, classes_of_modality
from dicomnode.dimse.get import storage_pairs
from dicomnode.evidence import Decision, FetchEvidence, after_fetches

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT = "1.2.840.10008.1.2.1"
ROOM = MAXIMUM_CONTEXTS - 4  # the retrieval itself, in two models and two transfer syntaxes


def test_few_classes_are_proposed_in_each_usual_transfer_syntax_uncompressed_first() -> None:
    pairs = storage_pairs([CT, MR, CT], ROOM)
    assert pairs[:2] == [(CT, EXPLICIT), (MR, EXPLICIT)]
    assert len(pairs) == len(set(pairs)) == 24
    assert {syntax for sop_class, syntax in pairs if sop_class == CT} == {syntax for sop_class, syntax in pairs if sop_class == MR}


def test_of_a_modality_that_is_not_known_all_images_fit_into_one_association() -> None:
    classes = classes_of_modality("?")
    images = [row.uid for row in STORAGE_CLASSES if row.kind == "image"]
    pairs = storage_pairs(classes, ROOM)
    assert len(pairs) == ROOM
    assert {sop_class for sop_class, syntax in pairs if syntax == EXPLICIT} == set(images)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT", "CR", "DX", "SEG", "SR"])
def test_the_usual_classes_of_a_modality_are_classes_that_the_node_stores(modality: str) -> None:
    classes = classes_of_modality(modality)
    assert set(classes) < {row.uid for row in STORAGE_CLASSES}
    assert len(classes) < 10


def fetched(**values: object) -> FetchEvidence:
    return FetchEvidence(**{"peer": "PACS", "state": "ended", "tries": 1, "instances": 3, "arrived": 3, **values})


def test_a_study_that_would_close_waits_for_a_fetch_and_for_nothing_that_has_ended() -> None:
    closes = Decision(closes=True, reason="quiet")
    assert after_fetches(closes, [fetched(state="asked", arrived=0)]) == Decision(closes=False, reason="3 image(s) are fetched from PACS")
    assert after_fetches(closes, [fetched()]) == Decision(closes=True, reason="quiet; 3 image(s) were fetched from PACS")
    assert after_fetches(closes, []) == closes
    waits = Decision(closes=False, reason="not quiet yet", incomplete=("a gap",))
    assert after_fetches(waits, [fetched(state="asked")]) == waits


def test_a_study_that_closes_incomplete_says_who_was_asked_how_often() -> None:
    closes = Decision(closes=True, reason="incomplete: a gap", incomplete=("a gap",))
    told = after_fetches(closes, [fetched(tries=3, arrived=1)])
    assert told.incomplete == ("a gap", "1 image(s) were fetched from PACS", "PACS was asked 3 time(s) for what it holds")
    assert told.reason == "incomplete: a gap; 1 image(s) were fetched from PACS; PACS was asked 3 time(s) for what it holds"
