"""UIDs are names, not dice: equal runs give equal UIDs, and nothing else does."""

import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, strategies as st

from dicomnode.results.identity import derive_uid, device_uid, object_uid, series_uid, tracking_uid
from results_cases import identity

RUN = identity("1.2.3")
DIFFERENT = [
    replace(RUN, study_instance_uid="1.2.4"),
    replace(RUN, revision=2),
    replace(RUN, package="other"),
    replace(RUN, version="0.1.1"),
    replace(RUN, digest="f" * 64),
    replace(RUN, run=2),
]


@given(st.lists(st.text(), max_size=4))
def test_every_derived_uid_is_a_valid_uid_under_2_25(parts: list[str]) -> None:
    uid = derive_uid(RUN, *parts)
    assert len(uid) <= 64
    assert re.fullmatch(r"2\.25\.(0|[1-9][0-9]*)", uid)
    assert int(uid.removeprefix("2.25.")) < 2**128


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_uids_are_equal_exactly_when_their_names_are(first: list[str], second: list[str]) -> None:
    assert (derive_uid(RUN, *first) == derive_uid(RUN, *second)) == (first == second)


@pytest.mark.parametrize("other", DIFFERENT)
def test_another_run_of_any_kind_has_other_uids(other: object) -> None:
    assert derive_uid(other, "x") != derive_uid(RUN, "x")


def test_the_time_of_creation_is_no_part_of_a_uid() -> None:
    later = replace(RUN, created_at=datetime(2030, 1, 1, tzinfo=UTC))
    assert object_uid(later, "1.2", "1.3") == object_uid(RUN, "1.2", "1.3")


def test_class_encoding_and_ordinal_tell_objects_apart() -> None:
    uids = {object_uid(RUN, c, e, n) for c in ("1.2", "1.3") for e in ("1.2", "1.3") for n in (1, 2)}
    assert len(uids) == 8


def test_findings_series_and_summary_have_uids_of_their_own() -> None:
    uids = [tracking_uid(RUN, n) for n in range(3)] + [series_uid(RUN, "SEG"), series_uid(RUN, "SR"), device_uid(RUN)]
    assert len(set(uids)) == len(uids)


def test_the_device_is_the_same_for_every_study_and_another_for_other_weights() -> None:
    assert device_uid(RUN) == device_uid(identity("9.9", revision=7, run=3))
    assert device_uid(RUN) != device_uid(replace(RUN, digest="f" * 64))


def test_uids_stay_what_they_were() -> None:
    """A changed derivation would write the same run under other UIDs after an update."""
    assert object_uid(RUN, "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.1.2.1") == "2.25.76662570448683103611526166171924430536"
