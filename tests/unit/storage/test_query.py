from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from storage import Storage
from storage.query import LEVELS, MATCHED, MAXIMUM_UIDS, BadQuery, Level, folded
from storage.records import Result, StoredObject

STUDY_UID = "1.2.826.0.1.3680043.8.498.1"
SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"
Receive = Callable[..., str]
Close = Callable[..., Any]
Stored = Callable[[int], StoredObject]

YAMADA = "Yamada^Tarou=山田^太郎=やまだ^たろう"
MULLER = "Müller^Änne"
GREEK = "Διονυσιος"
PATIENTS = (("P1", "Doe^Jane"), ("P2", YAMADA), ("P3", MULLER), ("P4", GREEK), ("P_5", "قباني^لنزار"))


@pytest.fixture
def patients(receive: Receive) -> None:
    """Five patients with a study each: dates 20260101 to 20260105, times 090000 to 130000."""
    for number, (patient_id, name) in enumerate(PATIENTS, start=1):
        receive(
            number,
            sop_instance_uid=f"1.2.3.{number}.1.1",
            series_instance_uid=f"1.2.3.{number}.1",
            study_instance_uid=f"1.2.3.{number}",
            patient_id=patient_id,
            patient_name=name,
            study_date=f"2026010{number}",
            study_time=f"{8 + number:02}0000.5",
            accession_number=f"A{number}",
            modality="CT" if number % 2 else "MR",
            birth_date="19500101",
            sex="F",
            study_description="Chest [CT] 100%" if number == 1 else "Head",
            body_part="CHEST",
        )


def found(storage: Storage, level: Level, keyword: str, value: str, **more: str) -> list[object]:
    wanted = {"PATIENT": "PatientID", "STUDY": "AccessionNumber", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}[level]
    return [row[wanted] for row in storage.query.find(level, {keyword: value, **more})]


MATCHING = (
    ("PatientID", "P1", [1]),
    ("PatientID", "p1", []),
    ("PatientID", "P?", [1, 2, 3, 4]),
    ("PatientID", "P_*", [5]),
    ("PatientID", "", [1, 2, 3, 4, 5]),
    ("PatientID", "*", [1, 2, 3, 4, 5]),
    ("PatientID", "P1\\P3", [1, 3]),
    ("PatientName", "doe^jane", [1]),
    ("PatientName", "Doe^*", [1]),
    ("PatientName", "DOE^JANE^^", [1]),
    ("PatientName", "Doe", []),
    ("PatientName", "山田^*", [2]),
    ("PatientName", "やまだ*", [2]),
    ("PatientName", "yamada^tarou", [2]),
    ("PatientName", YAMADA, [2]),
    ("PatientName", "*郎", [2]),
    ("PatientName", "muller*", [3]),
    ("PatientName", "MÜLLER^ÄNNE", [3]),
    ("PatientName", GREEK.upper(), [4]),
    ("PatientName", "διονυσιος^*", [4]),
    ("PatientName", "قباني*", [5]),
    ("StudyDate", "20260102", [2]),
    ("StudyDate", "20260102-20260103", [2, 3]),
    ("StudyDate", "20260104-", [4, 5]),
    ("StudyDate", "-20260101", [1]),
    ("StudyTime", "0900", [1]),
    ("StudyTime", "1000-11", [2, 3]),
    ("StudyTime", "-095959", [1]),
    ("StudyTime", "-100000.5", [1, 2]),
    ("StudyDescription", "Chest [[]CT] *", []),
    ("StudyDescription", "Chest [CT]*", [1]),
    ("StudyDescription", "*100%", [1]),
    ("StudyDescription", "*[A-Z]*", []),
    ("StudyDescription", "%", []),
    ("ModalitiesInStudy", "MR", [2, 4]),
    ("ModalitiesInStudy", "MR\\CT", [1, 2, 3, 4, 5]),
    ("StudyInstanceUID", "1.2.3.4", [4]),
    ("StudyInstanceUID", "1.2.3.4\\1.2.3.1\\1.2.3.9", [1, 4]),
    ("PatientBirthDate", "19500101", [1, 2, 3, 4, 5]),
    ("PatientSex", "M", []),
)


@pytest.mark.usefixtures("patients")
def test_each_key_matches_as_the_standard_has_it(storage: Storage) -> None:
    answers = [(keyword, value, found(storage, "STUDY", keyword, value)) for keyword, value, _ in MATCHING]
    assert answers == [(keyword, value, [f"A{number}" for number in matching]) for keyword, value, matching in MATCHING]


@pytest.mark.usefixtures("patients")
def test_keys_of_several_levels_hold_together(storage: Storage) -> None:
    assert found(storage, "SERIES", "Modality", "CT", PatientID="P3") == ["1.2.3.3.1"]
    assert found(storage, "SERIES", "SeriesNumber", "2", StudyDate="20260102-") == [f"1.2.3.{number}.1" for number in (2, 3, 4, 5)]
    assert found(storage, "IMAGE", "InstanceNumber", "4", BodyPartExamined="CHEST") == ["1.2.3.4.1.1"]
    assert found(storage, "PATIENT", "PatientBirthDate", "-19600101") == [patient for patient, _ in PATIENTS]
    assert found(storage, "PATIENT", "StudyDate", "19000101") == [patient for patient, _ in PATIENTS]  # no key of this level


@pytest.mark.usefixtures("patients")
def test_limit_and_offset_page_through_the_same_order(storage: Storage) -> None:
    for level in LEVELS:
        whole = storage.query.find(level, {})
        assert len(whole) == 5
        assert [storage.query.find(level, {}, limit=1, offset=at) for at in range(6)] == [[row] for row in whole] + [[]]


def test_results_stand_beside_the_images_and_count_once_when_they_came_back(
    storage: Storage, receive: Receive, close: Close, stored: Stored
) -> None:
    for number in (1, 2, 3):
        receive(number)
    close()
    with storage.database.writing() as connection:
        storage.jobs.create(
            connection, key="k", kind="analyse", study_instance_uid=STUDY_UID, revision=1, package="p", version="1", digest="d",
            run=1, priority="routine",
        )  # fmt: skip
        made = [
            Result(
                sop_instance_uid=f"2.25.{number}", sop_class_uid=sop_class, transfer_syntax_uid="1.2.840.10008.1.2.1", modality=modality,
                study_instance_uid=STUDY_UID, job_key="k", stored=stored(number), created_at=storage.database.now(connection),
                series_instance_uid=f"2.25.{number}.1", series_number=900 + number, series_description="AI", instance_number=1,
            ) for number, (sop_class, modality) in enumerate([(SEG, "SEG"), (SR, "SR")], start=1)
        ]  # fmt: skip
        storage.jobs.add_results(connection, made)

    def counts() -> list[object]:
        (study,) = storage.query.find("STUDY", {})
        (patient,) = storage.query.find("PATIENT", {})
        return [
            study["ModalitiesInStudy"], study["NumberOfStudyRelatedSeries"], study["NumberOfStudyRelatedInstances"],
            patient["NumberOfPatientRelatedStudies"], patient["NumberOfPatientRelatedSeries"], patient["NumberOfPatientRelatedInstances"],
            [(row["Modality"], row["NumberOfSeriesRelatedInstances"]) for row in storage.query.find("SERIES", {})],
            sorted(str(row["SOPInstanceUID"]) for row in storage.query.find("IMAGE", {}))[-2:],
        ]  # fmt: skip

    expected = [("CT", "SEG", "SR"), 3, 5, 1, 3, 5, [("CT", 3), ("SEG", 1), ("SR", 1)], ["2.25.1", "2.25.2"]]
    assert counts() == expected
    receive(7, sop_instance_uid="2.25.2", sop_class_uid=SR, series_instance_uid="2.25.2.1", modality="SR", series_number=902, kind="other")
    assert counts() == expected
    assert found(storage, "STUDY", "ModalitiesInStudy", "SEG") == ["A1"]
    assert [row["Modality"] for row in storage.query.find("SERIES", {"Modality": "S*", "StudyInstanceUID": STUDY_UID})] == ["SEG", "SR"]
    held = storage.query.held({"StudyInstanceUID": STUDY_UID}, limit=10)
    assert [(item.sop_class_uid, item.series_instance_uid) for item in held[-1:]] == [(SEG, "2.25.1.1")]
    assert {item.object_id for item in held} >= {stored(1).object_id}
    assert len(held) == 5
    assert [item.sop_instance_uid for item in storage.query.held({"SOPInstanceUID": "2.25.1\\2.25.2"}, limit=1)] == ["2.25.2"]


@pytest.mark.usefixtures("patients")
def test_only_what_is_asked_for_is_counted(storage: Storage) -> None:
    rows = storage.query.find("STUDY", {}, include={"ModalitiesInStudy", "PatientID"})
    assert all("NumberOfStudyRelatedSeries" not in row for row in rows)
    assert [row["ModalitiesInStudy"] for row in rows] == [("CT",), ("MR",), ("CT",), ("MR",), ("CT",)]


def test_a_key_that_cannot_be_matched_is_named_without_its_value(storage: Storage) -> None:
    hopeless: tuple[tuple[Level, str, str], ...] = (
        ("STUDY", "StudyDate", "yesterday"),
        ("STUDY", "StudyDate", "-"),
        ("STUDY", "StudyDate", "20260101-20260102-20260103"),
        ("STUDY", "StudyTime", "9"),
        ("STUDY", "StudyInstanceUID", "1.2.*"),
        ("STUDY", "StudyInstanceUID", "1.2' OR 1=1"),
        ("STUDY", "StudyInstanceUID", "\\".join(["1.2.3"] * (MAXIMUM_UIDS + 1))),
        ("SERIES", "SeriesNumber", "two"),
        ("STUDY", "PatientName", "x" * 1025),
    )
    for level, keyword, value in hopeless:
        with pytest.raises(BadQuery, match=f"^{keyword} ") as refused:
            storage.query.find(level, {keyword: value})
        assert value not in str(refused.value).split(" ", 1)[1]


@pytest.mark.usefixtures("patients")
def test_a_long_list_of_uids_is_one_query(storage: Storage) -> None:
    uids = "\\".join(f"1.2.3.{number}" for number in range(2, MAXIMUM_UIDS))
    assert found(storage, "STUDY", "StudyInstanceUID", uids) == ["A2", "A3", "A4", "A5"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(LEVELS), st.sampled_from(sorted(MATCHED["IMAGE"])), st.text(max_size=80) | st.text("*?%_[]^=\\'", max_size=30))
@pytest.mark.usefixtures("patients")
def test_whatever_a_key_says_there_is_an_answer_or_a_bad_query(storage: Storage, level: Level, keyword: str, value: str) -> None:
    with suppress(BadQuery):
        assert len(storage.query.find(level, {keyword: value})) <= 5


@pytest.mark.parametrize(("name", "other"), [("Doe^Jane", "DOE^JANE^^"), ("Strauß", "STRAUSS"), ("Ångström^", "angstrom"), ("", "^^")])
def test_names_are_compared_without_case_accents_and_empty_components(name: str, other: str) -> None:
    assert folded(name) == folded(other)


def test_a_kana_keeps_its_mark() -> None:
    assert folded("やまだ") != folded("やまた")
