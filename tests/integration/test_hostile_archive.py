"""Whatever an archive does when it is asked for earlier studies, the asking ends, what came is known, and why there is less is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import hostile_archive
import pytest
from dimse_cases import a_dataset
from held_objects import keep, receiving_node
from hostile_archive import Archive, Sending, an_image, running

from dicomnode.config import Settings
from dicomnode.dimse import move
from dicomnode.dimse.retrieving import Retriever
from dicomnode.reception import Reception
from dicomnode.retrieval import Retrieval, in_report
from pacs import wait_until
from storage import Storage
from storage.records import Job, PriorRule

NEW, EARLIER = "1.2.3.4", "1.2.3.1"
PATIENCE = 120.0
SHORT = 1.5  # seconds that an archive has that never ends
RULE = PriorRule(ae_title="PACS", days=100)
REPORTED = "1 earlier study could not be fetched whole from PACS"


@dataclass
class Site:
    """A node that listens, holds a study of which a job is done, and knows the archive."""

    storage: Storage
    archive: Archive
    job: Job

    def retrieval(self, rule: PriorRule = RULE, **limits: Any) -> Retrieval:
        settings = Settings.model_validate({"priors": {"seconds": PATIENCE, **limits}})
        reception = Reception(settings.listener, self.storage)
        retriever = Retriever("DICOMNODE", None, reception.begin, reception.ended)
        return Retrieval(settings, self.storage, self.job, rule, retriever)

    def fetch(self, rule: PriorRule = RULE, **limits: Any) -> dict[str, Any]:
        """Fetch, and wait until its thread has ended as well."""
        with self.retrieval(rule, **limits) as retrieval:
            told = retrieval.end(lambda: False)
        wait_until(lambda: not retrieval._thread.is_alive(), what="the end of the retrieval", every=0.01)
        return told

    def held(self) -> list[str]:
        """SOP Instance UIDs that the node holds of the earlier study."""
        return sorted(instance.sop_instance_uid for instance in self.storage.index.instances(EARLIER))

    def by(self, way: Literal["move", "get"] | None) -> None:
        self.storage.registry.add_peer(self.archive.peer(retrieve_by=way))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(move, "HEED_SECONDS", 0.3)
    with receiving_node(tmp_path) as (storage, receiver), running(Archive()) as archive:
        archive.node_port = receiver.port
        archive.images = [an_image(EARLIER, number) for number in (1, 2, 3)]
        storage.registry.add_peer(archive.peer())
        keep(storage, a_dataset(StudyTime="120000", BodyPartExamined="CHEST"))
        study = storage.index.study(NEW)
        assert study is not None
        with storage.database.writing() as connection:
            storage.index.close_revision(connection, NEW, seen_last_received_at=study.last_received_at, evidence="", outcome="")
            storage.jobs.create(connection, key="k", kind="analyse", study_instance_uid=NEW, revision=1, package="p", version="1",
                                digest="d", run=1, priority="routine")  # fmt: skip
        job = storage.jobs.job("k")
        assert job is not None
        yield Site(storage, archive, job)


def uids(*numbers: int) -> list[str]:
    return [f"{EARLIER}.1.{number}" for number in numbers]


@pytest.mark.parametrize("way", ["move", "get"])
def test_what_is_asked_for_comes_in_either_way_and_marked_as_fetched(site: Site, way: Literal["move", "get"]) -> None:
    site.by(way)
    told = site.fetch()
    (study,) = told["studies"]
    assert (study["state"], study["instances"], "ended" in told) == ("fetched", 3, False), told
    assert [kind for kind, _ in site.archive.retrieved] == [way]
    assert site.held() == uids(1, 2, 3)
    assert {(one.calling_ae_title, one.called_ae_title) for one in site.storage.index.instances(EARLIER)} == {("PACS", "DICOMNODE")}
    assert site.storage.fetched.is_mere_prior(EARLIER, site.storage.index.callers(EARLIER))
    arrived = site.storage.index.study(EARLIER)
    assert arrived is not None
    wait_until(lambda: _released(site.storage), what="the end of the association to be noted", every=0.05)


def _released(storage: Storage) -> bool:
    study = storage.index.study(EARLIER)
    return study is not None and study.released_at is not None and study.released_at >= study.last_received_at


def test_a_peer_that_does_not_know_this_node_as_a_destination_is_asked_by_get(site: Site) -> None:
    site.archive.node_port = 0
    told = site.fetch()
    assert [study["state"] for study in told["studies"]] == ["fetched"]
    assert [kind for kind, _ in site.archive.retrieved] == ["move", "get"]
    assert site.held() == uids(1, 2, 3)


@pytest.mark.parametrize("way", ["move", "get"])
def test_of_a_series_that_is_held_in_part_the_rest_is_asked_for_by_instance(site: Site, way: Literal["move", "get"]) -> None:
    site.by(way)
    keep(site.storage, site.archive.images[1])
    (study,) = site.fetch()["studies"]
    assert (study["state"], study["instances"]) == ("fetched", 2)
    ((_, asked),) = site.archive.retrieved
    assert (asked.QueryRetrieveLevel, sorted(asked.SOPInstanceUID)) == ("IMAGE", uids(1, 3))


def test_a_study_of_another_part_of_the_body_does_not_take_the_place_of_one_to_compare_with(site: Site) -> None:
    site.archive.images = [an_image(EARLIER, number, BodyPartExamined="CHEST", StudyDate="20251220") for number in (1, 2, 3)]
    site.archive.images += [an_image("1.2.3.2", number, BodyPartExamined="HEAD", StudyDate="20251231") for number in (1, 2)]
    told = site.fetch(replace(RULE, body_parts=("SAME",)))
    assert told["asked"]["body_parts"] == ["CHEST"]
    assert [(study["study_instance_uid"], study["state"]) for study in told["studies"]] == [
        ("1.2.3.2", "nothing wanted"),
        (EARLIER, "fetched"),
    ]
    assert site.held() == uids(1, 2, 3)
    assert site.storage.index.study("1.2.3.2") is None


@pytest.mark.parametrize(
    ("sending", "status", "words"),
    [
        (hostile_archive.of_another_patient, 0xC006, "the instance is of another patient than the one demanded"),
        (hostile_archive.of_another_study, 0xC005, "the instance is of another study than the one demanded"),
        (hostile_archive.with_wrong_uids, 0xC001, "Study Instance UID is absent or malformed"),
    ],
)
def test_what_nobody_asked_for_is_refused_on_the_association_that_asked(site: Site, sending: Sending, status: int, words: str) -> None:
    site.by("get")
    site.archive.sending = sending
    told = site.fetch()
    (study,) = told["studies"]
    assert (study["state"], study["instances"]) == (f"not fetched to its end: 3 object(s) were refused: {words}", 0)
    assert in_report(told) == REPORTED
    assert site.storage.index.studies_of("P2") == []
    assert site.storage.index.study("1.2.3.999") is None
    assert site.held() == []
    noted = site.storage.index.quarantined()
    assert {(one.dimse_status, one.calling_ae_title, one.stored) for one in noted} == {(status, "PACS", None)}


def test_images_of_another_patient_that_come_by_move_are_no_prior_of_this_one(site: Site) -> None:
    site.by("move")
    site.archive.sending = hostile_archive.of_another_patient
    told = site.fetch()
    (study,) = told["studies"]
    assert study["state"] == "fetched, and of another patient: not compared with"
    assert in_report(told) == REPORTED
    assert [one.study_instance_uid for one in site.storage.index.studies_of("P1")] == [NEW]


@pytest.mark.parametrize("way", ["move", "get"])
def test_an_archive_that_sends_without_end_is_stopped(site: Site, way: Literal["move", "get"]) -> None:
    site.by(way)
    site.archive.sending = hostile_archive.ever_more
    told = site.fetch(maximum_instances=5)
    (study,) = told["studies"]
    words = "it was not wanted any more, or too much" if way == "move" else "it sends more than 5 object(s)"
    assert study["state"] == f"not fetched to its end: {words}"
    assert study["instances"] >= 5
    if way == "get":
        assert len(site.held()) == 5
    assert in_report(told) == REPORTED


@pytest.mark.parametrize("way", ["move", "get"])
@pytest.mark.parametrize("sending", [hostile_archive.pending_for_ever, hostile_archive.silence])
def test_an_archive_that_never_ends_has_its_time_and_no_more(site: Site, way: Literal["move", "get"], sending: Sending) -> None:
    site.by(way)
    site.archive.sending = sending
    told = site.fetch(seconds=SHORT)
    # Whoever notices first that the time is over says it in his own words.
    assert in_report(told) in {
        f"earlier studies could not be fetched from PACS: not done within {SHORT:g} s",
        "earlier studies could not be fetched from PACS: it could not be reached, or did not answer in time",
        REPORTED,
    }
    assert site.held() == []


def test_an_archive_that_aborts_amid_a_get_leaves_what_was_acknowledged(site: Site) -> None:
    site.by("get")
    site.archive.sending = hostile_archive.half_and_abort
    told = site.fetch()
    assert "the association broke amid a retrieval" in told["ended"]
    assert in_report(told) == "earlier studies could not be fetched from PACS: it could not be reached, or did not answer in time"
    assert [study["instances"] for study in told["studies"]] == [1]
    assert site.held() == uids(1)
    site.archive.sending = hostile_archive.all_of
    assert [(study["state"], study["instances"]) for study in site.fetch()["studies"]] == [("fetched", 2)]


def test_a_query_without_end_is_refused(site: Site) -> None:
    site.archive.endless = True
    told = site.fetch()
    assert told["ended"].endswith("it answered a query with more than 200 matches")
    assert in_report(told) == "earlier studies could not be fetched from PACS: it refused, or answered with more than it may"
    assert site.archive.retrieved == []


def test_a_peer_that_counts_more_than_it_sends_is_told_of(site: Site) -> None:
    site.archive.series = [counted(site, 4)]
    told = site.fetch()
    assert told["studies"][0]["state"] == "not fetched to its end: less came than the peer holds"
    assert site.held() == uids(1, 2, 3)


def counted(site: Site, count: int) -> Any:
    (series,) = site.archive._series(site.archive.images[0])
    series.NumberOfSeriesRelatedInstances = count
    return series


@pytest.mark.parametrize("way", ["move", "get"])
def test_a_retrieval_gives_way_and_goes_on_with_what_is_left(site: Site, way: Literal["move", "get"]) -> None:
    site.by(way)
    site.archive.sending = hostile_archive.half_and_wait
    with site.retrieval() as retrieval:
        wait_until(lambda: site.held() == uids(1), what="the first image", every=0.01)
        with retrieval.giving_way():
            assert site.archive.cancelled.wait(PATIENCE)
            site.archive.goes_on.set()
        told = retrieval.end(lambda: False)
    (study,) = told["studies"]
    assert (study["state"], told["gave_way"], "ended" in told) == ("fetched", 1, False)
    assert site.held() == uids(1, 2, 3)
    assert site.archive.retrieved[-1][1].SOPInstanceUID == uids(2, 3)


def test_what_an_urgent_study_ends_is_told_of(site: Site) -> None:
    site.by("get")
    site.archive.sending = hostile_archive.half_and_wait
    with site.retrieval() as retrieval:
        wait_until(lambda: site.held() == uids(1), what="the first image", every=0.01)
        told = retrieval.end(lambda: True)
    assert in_report(told) == "earlier studies could not be fetched from PACS: an urgent study waits"
    assert site.archive.cancelled.wait(PATIENCE)
