"""What is made of what is evident: which series tell that images are absent, and when a study closes, as what, and why."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, strategies as st

from dicomnode.evidence import (
    ANSWER_SECONDS,
    Acquisition,
    Decision,
    Evidence,
    NamedSeries,
    NoticeEvidence,
    PeerEvidence,
    Rules,
    SeriesEvidence,
    as_json,
    complete_by_itself,
    decide,
    notice_evidence,
    order_of_numbers,
    series_evidence,
)
from storage.records import Notice, Plane

AXIAL, SAGITTAL, CORONAL = "1 0 0 0 1 0", "0 1 0 0 0 -1", "1 0 0 0 0 -1"


def plane(number: int | None, position: float | None = None, **values: Any) -> Plane:
    given = {
        "series_instance_uid": "1.2", "series_number": 2, "modality": "CT", "instance_number": number, "acquisition_number": 1,
        "images_in_acquisition": None, "orientation": AXIAL if position is not None else "", "position": position,
    }  # fmt: skip
    return Plane(**{**given, **values})


def stack(numbers: Any, step: float = 2.5, **values: Any) -> list[Plane]:
    return [plane(number, number * step, **values) for number in numbers]


def only(planes: list[Plane]) -> SeriesEvidence:
    (series,) = series_evidence(planes)
    return series


@pytest.mark.parametrize(
    ("numbers", "order", "absent"),
    [
        ([1, 2, 3], "contiguous", ""),
        ([0, 1, 2], "contiguous", ""),
        ([3, 1, 2], "contiguous", ""),
        ([101, 102, 103], "contiguous", ""),
        ([1, 3, 5, 7], "contiguous", ""),  # every other one is another echo
        ([10, 20, 30], "contiguous", ""),
        ([1, 1, 2, 2, 3, 3], "contiguous", ""),
        ([1, 2, 4], "gap", "3 is absent"),
        ([1, 2, 4, 9], "gap", "3, 5 to 8 are absent"),
        ([1, 3, 7, 9], "gap", "5 is absent"),
        ([1, 2, 6], "gap", "3 to 5 are absent"),
        ([1, 2], "unknown", ""),
        ([1, 3], "unknown", ""),
        ([], "unknown", ""),
        ([1, 2, None, 4], "unknown", ""),
        ([5, 5, 5], "unknown", ""),
    ],
)
def test_instance_numbers(numbers, order, absent):
    assert order_of_numbers(numbers) == (order, absent)


def test_of_many_ranges_a_few_are_named():
    order, absent = order_of_numbers([1, 2, *range(4, 60, 3)])
    assert order == "gap"
    assert absent.endswith("more range(s) are absent")
    assert len(absent) < 100


@given(st.integers(4, 400), st.integers(-5, 1000), st.floats(0.3, 10), st.randoms(use_true_random=False), st.data())
def test_a_whole_stack_is_contiguous_in_any_order_and_without_one_from_its_middle_it_has_a_gap(count, first, step, shuffled, data):
    planes = stack(range(first, first + count), step)
    shuffled.shuffle(planes)
    whole = only(planes)
    assert (whole.numbers, whole.slices, whole.contradiction) == ("contiguous", "contiguous", None)
    lost = data.draw(st.integers(first + 1, first + count - 2))
    rest = only([p for p in planes if p.instance_number != lost])
    assert rest.contradiction == f"series 2: Instance Number {lost} is absent, where the slices have a gap"


def test_half_a_stack_that_came_shuffled_has_gaps():
    planes = stack(range(1, 201))
    random.Random(5).shuffle(planes)
    assert only(planes[:100]).contradiction is not None


@pytest.mark.parametrize(
    ("name", "planes", "contradiction"),
    [
        ("numbers skip, the stack is even", [plane(n, i * 2.5) for i, n in enumerate([1, 2, 3, 101, 102, 103])], None),
        ("a gap by intent", [plane(n, z) for n, z in enumerate([0, 2.5, 5, 50, 52.5, 55], start=1)], None),
        ("no numbers, a gap", [plane(None, z) for z in (0, 2.5, 5, 10, 12.5)], "series 2: the slices have a gap"),
        ("no numbers, no gap", [plane(None, z) for z in (0, 2.5, 5, 7.5)], None),
        ("two phases", stack(range(1, 11)) + [plane(n + 10, n * 2.5) for n in range(1, 11)], None),
        ("two phases, one of them with a hole", [p for p in stack(range(1, 11)) + [plane(n + 10, n * 2.5) for n in range(1, 11)] if
         p.instance_number != 15], "series 2: Instance Number 15 is absent, where the slices have a gap"),
        ("phases that moved a little", stack(range(1, 11)) + [plane(n + 10, n * 2.5 + 0.01) for n in range(1, 11)], None),
        ("three directions", [plane(i, 5.0 * i, orientation=o) for i, o in enumerate([AXIAL, SAGITTAL, CORONAL], start=1)], None),
        ("turned about an axis, one absent", [plane(i, 0.0, orientation=f"turned {i}") for i in (1, 2, 4, 5)],
         "series 2: Instance Number 3 is absent"),
        ("films", [plane(n) for n in (1, 2, 4, 9)], None),
        ("uneven distances", [plane(n, z) for n, z in enumerate([0, 1, 2.5, 3.3, 7], start=1)], None),
        ("one image", [plane(7, 0.0)], None),
        ("no series number", [plane(n, n, series_number=None) for n in (1, 2, 4, 5, 6)],
         "a series without a number: Instance Number 3 is absent, where the slices have a gap"),
    ],
)  # fmt: skip
def test_a_series_contradicts_only_where_numbers_and_slices_agree(name, planes, contradiction):
    assert only(planes).contradiction == contradiction, name


def counted(images: int, stated: int | None, *, series: str = "1.2", number: int = 2, acquisition: int | None = 1) -> list[Plane]:
    values = {"series_instance_uid": series, "series_number": number, "acquisition_number": acquisition, "images_in_acquisition": stated}
    return stack(range(1, images + 1), **values)


def test_images_in_acquisition():
    assert only(counted(50, None)).acquisitions == ()
    whole = only(counted(50, 50))
    assert whole.acquisitions == (Acquisition(number=1, images=50, stated=50, state="reached"),)
    assert whole.whole
    short = only(counted(50, 60))
    assert short.contradiction == "series 2: 50 of 60 images of acquisition 1"
    assert not short.whole
    assert only(counted(50, 60, acquisition=None)).contradiction == "series 2: 50 of 60 images"
    assert only(counted(61, 60)).whole


def test_an_acquisition_may_be_spread_over_series():
    thick, thin = series_evidence(counted(20, 120) + counted(100, 120, series="1.3", number=3))
    assert (thick.contradiction, thin.contradiction) == (None, None)
    assert not thick.whole  # what proves nothing closes nothing early
    thick, thin = series_evidence(counted(20, 120) + counted(90, 120, series="1.3", number=3))
    assert thick.contradiction == "series 2: 20 of 120 images of acquisition 1"
    assert thin.contradiction == "series 3: 90 of 120 images of acquisition 1"


def test_a_series_that_is_whole_by_itself_lends_its_images_to_no_other():
    whole, short = series_evidence(counted(100, 100) + counted(50, 100, series="1.3", number=3))
    assert whole.whole
    assert short.contradiction == "series 3: 50 of 100 images of acquisition 1"


def test_several_acquisitions_in_a_series_are_counted_apart():
    planes = counted(30, 30, acquisition=1) + [replace(p, instance_number=p.instance_number + 30) for p in counted(20, 30, acquisition=2)]
    assert only(planes).contradiction == "series 2: 20 of 30 images of acquisition 2"


def study(
    planes: list[Plane] | None = None,
    *,
    silent: float,
    released: bool = True,
    peers: tuple[PeerEvidence, ...] = (),
    notices: tuple[NoticeEvidence, ...] = (),
) -> Evidence:
    planes = counted(10, None) if planes is None else planes
    series = series_evidence(planes)
    return Evidence(images=len(planes), released=released, silent_seconds=silent, series=series, peers=peers, notices=notices)


GAP = stack([1, 2, 3, 5, 6])
HOLDS_ALL = PeerEvidence(peer="PACS", state="answered", instances=10)
HOLDS_MORE = PeerEvidence(peer="PACS", state="answered", instances=12, absent=2)
ASKED = PeerEvidence(peer="PACS", state="asked")
UNKNOWN = PeerEvidence(peer="PACS", state="unknown")
SILENT = PeerEvidence(peer="PACS", state="silent", reason="it cannot be reached")
PROGRESS = NoticeEvidence(kind="mpps", ae_title="CT1", state="in progress", series=())
WHOLE_STEP = NoticeEvidence(
    kind="mpps", ae_title="CT1", state="completed", series=(NamedSeries(series_instance_uid="1.2", images=10, absent=0),)
)
SHORT_STEP = replace(WHOLE_STEP, series=(NamedSeries(series_instance_uid="1.2", images=12, absent=2),))
CUT_OFF = replace(WHOLE_STEP, state="discontinued")
RULES = Rules(quiet_seconds=30)
EARLY = Rules(quiet_seconds=30, early=True)


@pytest.mark.parametrize(
    ("evidence", "rules", "closes", "reason"),
    [
        (study(silent=29.9), RULES, False, "not quiet for 30 s yet"),
        (study(silent=30), RULES, True, "association released and quiet for 30 s"),
        (study(silent=149, released=False), RULES, False, "not quiet for 150 s yet"),
        (study(silent=150, released=False), RULES, True, "quiet for 150 s, association not released"),
        (study(silent=0), Rules(quiet_seconds=0), True, "association released and quiet for 0 s"),
        # what is absent is waited for, four quiet periods or as long as the route says
        (study(GAP, silent=149), RULES, False, "incomplete: series 2: Instance Number 4 is absent, where the slices have a gap"),
        (study(GAP, silent=150), RULES, True,
         "incomplete: series 2: Instance Number 4 is absent, where the slices have a gap; quiet for 150 s"),
        (study(GAP, silent=30), Rules(quiet_seconds=30, longest_wait_seconds=0), True,
         "incomplete: series 2: Instance Number 4 is absent, where the slices have a gap; quiet for 30 s"),
        (study(GAP, silent=629), Rules(quiet_seconds=30, longest_wait_seconds=600), False,
         "incomplete: series 2: Instance Number 4 is absent, where the slices have a gap"),
        (study(GAP, silent=149, released=False), Rules(quiet_seconds=30, longest_wait_seconds=0), False,
         "incomplete: series 2: Instance Number 4 is absent, where the slices have a gap"),
        (study(counted(5, 9), silent=150), RULES, True, "incomplete: series 2: 5 of 9 images of acquisition 1; quiet for 150 s"),
        (study(silent=150, peers=(HOLDS_MORE,)), RULES, True, "incomplete: PACS holds 2 image(s) that aren't here; quiet for 150 s"),
        (study(silent=100, peers=(HOLDS_MORE,)), RULES, False, "incomplete: PACS holds 2 image(s) that aren't here"),
        # a peer's silence is no evidence
        (study(silent=30, peers=(ASKED,)), RULES, False, "PACS is asked what it holds"),
        (study(silent=30 + ANSWER_SECONDS, peers=(ASKED,)), RULES, True,
         "association released and quiet for 30 s; PACS did not answer in time what it holds"),
        (study(silent=30, peers=(SILENT,)), RULES, True,
         "association released and quiet for 30 s; PACS did not say what it holds: it cannot be reached"),
        (study(silent=30, peers=(UNKNOWN,)), RULES, True, "association released and quiet for 30 s; PACS holds no such study"),
        (study(silent=30, peers=(HOLDS_ALL,)), RULES, True, "association released and quiet for 30 s; PACS holds no image that isn't here"),
        # early, where it is proven
        (study(silent=2, peers=(HOLDS_ALL,)), EARLY, True, "association released and PACS holds no image that isn't here"),
        (study(silent=1.9, peers=(HOLDS_ALL,)), EARLY, False, "not quiet for 30 s yet"),
        (study(silent=2, peers=(HOLDS_ALL,)), RULES, False, "not quiet for 30 s yet"),
        (study(silent=20, released=False, peers=(HOLDS_ALL,)), EARLY, False, "not quiet for 150 s yet"),
        (study(silent=20, peers=(HOLDS_ALL, SILENT)), EARLY, False, "not quiet for 30 s yet"),
        (study(silent=20, peers=(UNKNOWN,)), EARLY, False, "not quiet for 30 s yet"),
        (study(silent=20, peers=(PeerEvidence(peer="PACS", state="answered"),)), EARLY, False, "not quiet for 30 s yet"),
        (study(counted(9, 9), silent=2), EARLY, True, "association released and each acquisition has as many images as it states"),
        (study(counted(9, 9), silent=2, peers=(SILENT,)), EARLY, False, "not quiet for 30 s yet"),
        (study(counted(9, 9) + counted(4, None, series="1.3"), silent=20), EARLY, False, "not quiet for 30 s yet"),
        (study(silent=20), EARLY, False, "not quiet for 30 s yet"),  # that nothing is absent from the middle proves nothing
        # what was announced
        (study(silent=149, notices=(PROGRESS,)), RULES, False, "incomplete: CT1 has not ended its procedure step"),
        (study(silent=150, notices=(PROGRESS,)), RULES, True, "incomplete: CT1 has not ended its procedure step; quiet for 150 s"),
        (study(silent=149, notices=(SHORT_STEP,)), EARLY, False, "incomplete: CT1 names 2 image(s) that aren't here"),
        (study(silent=30, notices=(WHOLE_STEP,)), RULES, True, "association released and quiet for 30 s"),
        (study(silent=2, notices=(WHOLE_STEP,)), EARLY, True, "association released and all 10 image(s) that CT1 names are here"),
        (study(silent=2, notices=(WHOLE_STEP, PROGRESS)), EARLY, False, "incomplete: CT1 has not ended its procedure step"),
        (study(counted(11, None), silent=20, notices=(WHOLE_STEP,)), EARLY, False, "not quiet for 30 s yet"),  # more came than it names
        (study(counted(10, None) + counted(4, None, series="1.3"), silent=20, notices=(WHOLE_STEP,)), EARLY, False,
         "not quiet for 30 s yet"),
        (study(silent=29, notices=(CUT_OFF,)), RULES, False, "not quiet for 30 s yet"),
        (study(silent=30, notices=(CUT_OFF,)), RULES, True,
         "incomplete: CT1 discontinued its procedure step; association released and quiet for 30 s"),
        (study(silent=1, peers=(HOLDS_ALL,)), Rules(quiet_seconds=1, early=True), True,
         "association released and PACS holds no image that isn't here"),
    ],
)  # fmt: skip
def test_when_a_study_closes_and_why(evidence, rules, closes, reason):
    decision = decide(evidence, rules)
    assert (decision.closes, decision.reason) == (closes, reason)
    assert bool(decision.incomplete) == reason.startswith("incomplete")


def test_a_series_is_complete_by_itself_by_what_it_states_what_was_announced_or_its_order_and_quiet():
    even, counted_, films = only(stack(range(1, 11))), only(counted(9, 9)), only([plane(n) for n in (1, 2, 3, 4)])
    for series in (even, counted_, films):
        assert complete_by_itself(series, 1.9, 5) is None
    assert complete_by_itself(counted_, 2, 5) == "series 2 has as many images as it states"
    assert complete_by_itself(even, 4.9, 5) is None
    assert complete_by_itself(even, 5, 5) == "neither the numbers nor the slices of series 2 have a gap, and it was quiet for 5 s"
    assert complete_by_itself(even, 2, 5, [PROGRESS, WHOLE_STEP]) == "series 2 has the 10 image(s) that CT1 names"
    assert complete_by_itself(even, 2, 5, [SHORT_STEP]) is None
    for series in (films, only(GAP), only(counted(5, 9))):
        assert complete_by_itself(series, 1e6, 5) is None


def test_what_an_archive_announces_is_put_together_and_steps_are_kept_apart():
    def a_notice(uid: str, kind: Any, images: dict[str, tuple[str, ...]]) -> Notice:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        return Notice(sop_instance_uid=uid, study_instance_uid="1", kind=kind, ae_title="A", state="available", images=images,
                      created_at=now, changed_at=now)  # fmt: skip

    parts = [a_notice("1", "ian", {"1.2": ("a", "b")}), a_notice("2", "ian", {"1.2": ("b", "c"), "1.3": ("d",)})]
    (together,) = notice_evidence(parts, {"c"})
    assert [(s.series_instance_uid, s.images, s.absent) for s in together.series] == [("1.2", 3, 1), ("1.3", 1, 0)]
    assert together.contradiction == "A names 1 image(s) that aren't here"
    assert len(notice_evidence([a_notice("1", "mpps", {}), a_notice("2", "mpps", {})], ())) == 2


def every_case() -> list[tuple[Evidence, Rules]]:
    peers = [(), *((peer,) for peer in (HOLDS_ALL, HOLDS_MORE, ASKED, UNKNOWN, SILENT)), (HOLDS_ALL, HOLDS_MORE)]
    contents = [counted(10, None), counted(10, 10), counted(5, 9), GAP, [plane(1), plane(4)], counted(9, 9) + GAP]
    silences = [0, 1.99, 2, 29, 30, 49, 50, 149, 150, 629, 630, 1e6]
    waits = [None, 0.0, 600.0]
    return [
        (study(content, silent=silent, released=released, peers=asked), Rules(quiet_seconds=30, longest_wait_seconds=wait, early=early))
        for content, silent, released, asked, wait, early in itertools.product(
            contents, silences, (True, False), peers, waits, (True, False)
        )
    ]


def test_in_every_case_a_study_closes_in_the_end_and_never_silently_as_incomplete():
    for evidence, rules in every_case():
        decision = decide(evidence, rules)
        against = any(peer.absent for peer in evidence.peers) or any(series.contradiction for series in evidence.series)
        assert bool(decision.incomplete) == against
        assert decision.closes or evidence.silent_seconds < 1e6, (evidence, rules)
        assert not decision.closes or decision.reason.startswith("incomplete: ") == against
        if evidence.silent_seconds < 2 or (evidence.silent_seconds < 30 and not rules.early):
            assert not decision.closes


def test_in_every_case_more_silence_never_opens_a_study_again():
    grouped: dict[Any, list[tuple[float, Decision]]] = {}
    for evidence, rules in every_case():
        grouped.setdefault((replace(evidence, silent_seconds=0), rules), []).append((evidence.silent_seconds, decide(evidence, rules)))
    for decisions in grouped.values():
        closes = [decision.closes for _, decision in sorted(decisions, key=lambda entry: entry[0])]
        assert closes == sorted(closes)


def test_the_record_is_json_and_holds_all_of_it():
    evidence = study(GAP, silent=150.12345, peers=(HOLDS_MORE,))
    record = as_json(evidence, decide(evidence, RULES))
    assert json.loads(json.dumps(record)) == record
    assert record["silent_seconds"] == 150.123
    assert record["series"][0]["absent"] == "4 is absent"
    assert record["peers"][0] == {"peer": "PACS", "state": "answered", "instances": 12, "absent": 2, "reason": ""}
    assert record["incomplete"] == [
        "series 2: Instance Number 4 is absent, where the slices have a gap", "PACS holds 2 image(s) that aren't here"
    ]  # fmt: skip
