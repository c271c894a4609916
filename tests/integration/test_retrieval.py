"""Earlier studies are asked for by rule, within limits, and never at the cost of an urgent study; what was asked and found is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import a_dataset
from held_objects import keep
from hostile_archive import Archive, running
from pydicom import Dataset

from dicomnode.config import Settings
from dicomnode.dimse.find import query
from dicomnode.dimse.retrieving import Retriever
from dicomnode.reception import Reception
from dicomnode.retrieval import Retrieval, rule_for
from storage import Storage, open_storage, prepare_storage
from storage.records import Job, PriorRule, Route

NEW, EARLIER = "1.2.3.4", "1.2.3.1"
PATIENCE = 120.0
RULE = PriorRule(ae_title="PACS", count=2, days=100)


@pytest.fixture
def archive() -> Iterator[Archive]:
    with running(Archive(gets=False)) as archive:
        yield archive


@pytest.fixture
def storage(tmp_path: Path, archive: Archive) -> Iterator[Storage]:
    """A node that holds a CT study of 2 January 2026 with a job, whose route asks the archive."""
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    storage = open_storage(url, tmp_path)
    storage.registry.add_peer(archive.peer())
    storage.registry.add_route(
        Route(name="r", from_ae_title="*", called_ae_title="*", package="p", version=None, to_ae_titles=(), priority=None, quiet_seconds=1,
              report_refusals=False, priors=RULE)
    )  # fmt: skip
    keep(storage, a_dataset(StudyTime="120000", PatientBirthDate="19500101"))
    study = storage.index.study(NEW)
    assert study is not None
    with storage.database.writing() as connection:
        storage.index.close_revision(connection, NEW, seen_last_received_at=study.last_received_at, evidence="", outcome="")
        storage.jobs.create(connection, key="k", kind="analyse", study_instance_uid=NEW, revision=1, package="p", version="1", digest="d",
                            run=1, priority="routine")  # fmt: skip
    yield storage
    storage.database.close()


def job(storage: Storage) -> Job:
    found = storage.jobs.job("k")
    assert found is not None
    return found


def fetch(storage: Storage, *, urgent: bool = False, **limits: Any) -> dict[str, Any]:
    rule = rule_for(storage, job(storage))
    assert rule is not None
    settings = Settings.model_validate({"priors": {"seconds": PATIENCE, **limits}})
    reception = Reception(settings.listener, storage)
    retriever = Retriever(settings.node.ae_title, None, reception.begin, reception.ended)
    with Retrieval(settings, storage, job(storage), rule, retriever) as retrieval:
        return retrieval.end(lambda: urgent)


def a_study(uid: str, study_date: str, **values: Any) -> Dataset:
    known = {"StudyTime": "080000", "PatientID": "P1", "PatientBirthDate": "19500101", "ModalitiesInStudy": ["CT", "SR"]}
    return query("STUDY", **{"StudyInstanceUID": uid, "StudyDate": study_date, **known, **values})


def a_series(uid: str, modality: str, number: int, **values: Any) -> Dataset:
    return query(
        "SERIES", StudyInstanceUID=EARLIER, SeriesInstanceUID=uid, Modality=modality, NumberOfSeriesRelatedInstances=number, **values
    )


def test_the_rule_says_what_is_asked_for_and_what_of_the_answers_counts(storage: Storage, archive: Archive) -> None:
    archive.studies = [
        a_study("1.2.3.0", "20251201"), a_study(EARLIER, "20251231"), a_study("1.2.3.2", "20251230"),
        a_study("1.2.3.5", "20260102", StudyTime="130000"), a_study(NEW, "20260102"),
        a_study("1.2.3.6", "20251231", PatientID="P2"), a_study("1.2.3.7", "20251231", PatientBirthDate="19600101"),
        a_study("1.2.3.8", "20251231", ModalitiesInStudy="MR"), a_study("1.2.3.9", "20240101"),
    ]  # fmt: skip
    told = fetch(storage)
    asked = archive.asked[0]
    assert (asked.PatientID, asked.StudyDate) == ("P1", "20250924-20260102")
    assert told["asked"] == {"from": "20250924", "to": "20260102", "modalities": ["CT"], "count": 2}
    assert told["found"] == 3
    assert [study["study_instance_uid"] for study in told["studies"]] == [EARLIER, "1.2.3.2", "1.2.3.0"]  # the newest first
    assert {study["state"] for study in told["studies"]} == {"nothing wanted"}


def test_series_are_chosen_by_modality_and_body_part_with_results_and_marked_before_they_come(storage: Storage, archive: Archive) -> None:
    (route,) = storage.registry.routes()
    storage.registry.add_route(replace(route, priors=replace(RULE, body_parts=("CHEST",))))
    archive.studies = [a_study(EARLIER, "20251231")]
    archive.series = [
        a_series("1.1", "CT", 2, BodyPartExamined="HEAD"), a_series("1.2", "CT", 2, BodyPartExamined="CHEST"), a_series("1.3", "MR", 2),
        a_series("1.4", "SEG", 1), a_series("1.5", "CT", 1, BodyPartExamined=""),
    ]  # fmt: skip
    told = fetch(storage)
    assert [one.SeriesInstanceUID for _, one in archive.retrieved] == ["1.2"]
    assert [(study["state"], study["instances"]) for study in told["studies"]] == [("asked", 0)]
    assert "0xA801" in told["ended"]  # the archive doesn't know this node
    assert storage.fetched.peer_of(EARLIER) == "PACS"
    assert storage.fetched.is_mere_prior(EARLIER, [("PACS", "DICOMNODE")])
    assert not storage.fetched.is_mere_prior(EARLIER, [("PACS", "DICOMNODE"), ("CT1", "DICOMNODE")])
    assert not storage.fetched.is_mere_prior(NEW, [("PACS", "DICOMNODE")])


def test_what_is_held_is_not_asked_for_again_and_what_is_too_much_not_at_all(storage: Storage, archive: Archive) -> None:
    keep(storage, a_dataset(StudyInstanceUID=EARLIER, SeriesInstanceUID="1.5", StudyDate="20251231"))
    archive.studies, archive.series = [a_study(EARLIER, "20251231")], [a_series("1.5", "CT", 1)]
    assert fetch(storage)["studies"][0]["state"] == "held"
    archive.series = [a_series("1.6", "CT", 11)]
    assert fetch(storage, maximum_instances=10)["studies"][0]["state"] == "not fetched: 11 instances, and the limit is 10"
    assert archive.retrieved == []


def test_nothing_waits_for_longer_than_the_deadline_nor_while_an_urgent_study_does(storage: Storage, archive: Archive) -> None:
    archive.answers.clear()
    told = fetch(storage, seconds=0.5)
    assert told["ended"]  # whichever of the two noticed first that the time was over
    assert told["studies"] == []
    assert fetch(storage, urgent=True)["ended"] == "an urgent study waits"


def test_a_peer_that_fails_is_told_of(storage: Storage, archive: Archive) -> None:
    archive.status = 0xC001
    assert "0xC001" in fetch(storage)["ended"]
    storage.registry.add_route(replace(storage.registry.routes()[0], priors=None))
    assert rule_for(storage, job(storage)) is None
    storage.registry.add_route(replace(storage.registry.routes()[0], priors=RULE))
    with pytest.raises(Exception, match="fetches earlier studies from PACS"):
        storage.registry.remove_peer("PACS")
