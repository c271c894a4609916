"""What peers are asked of a study, and what is made of their answers and of their silence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dicomnode.dimse.find import StudyContent
from dicomnode.errors import PeerRefused, PeerUnavailable
from dicomnode.evidence import PeerEvidence
from dicomnode.inquiry import Inquirer, Inquiry
from pacs import loopback_peer, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import InstanceHeader, Peer, Result, Study

STUDY, SERIES = "1.2.3", "1.2.3.1"


class Site:
    """A node's storage, and peers that answer as a test tells them."""

    def __init__(self, folder: Path) -> None:
        url = f"sqlite:///{folder / 'node.sqlite'}"
        prepare_storage(url, folder)
        self.storage: Storage = open_storage(url, folder)
        for title in ("PACS", "OTHER"):
            self.storage.registry.add_peer(loopback_peer(title, 104))
        self.holds: dict[str, Callable[[], StudyContent | None]] = {}
        self.names: Callable[[str], frozenset[str]] = lambda _series: frozenset()
        self.asked: list[str] = []
        self.inquiry = self.with_times()

    def with_times(self, **seconds: float) -> Inquiry:
        return Inquiry(
            self.storage, Inquirer(calling_ae_title="NODE", study_content=self._content, series_instances=self._series, **seconds)
        )  # fmt: skip

    def _content(self, peer: Peer, study: str, **asking: Any) -> StudyContent | None:
        assert study.startswith(STUDY)
        assert asking["calling_ae_title"] == "NODE"
        self.asked.append(peer.ae_title)
        return self.holds[peer.ae_title]()

    def _series(self, _peer: Peer, _study: str, series: str, **_asking: Any) -> dict[str, str]:
        return dict.fromkeys(self.names(series), "1.2.840.10008.5.1.4.1.1.2")

    def receive(self, *numbers: int, study: str = STUDY) -> Study:
        for number in numbers:
            stored = self.storage.objects.put(f"{study} {number}".encode())
            header = InstanceHeader(
                sop_instance_uid=f"{study}.1.{number}", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", transfer_syntax_uid="1.2.840.10008.1.2",
                series_instance_uid=f"{study}.1", study_instance_uid=study, dataset_sha256=stored.sha256, kind="image", modality="CT",
                instance_number=number, patient_id="P", patient_name="N", study_date="20260101", study_description="", accession_number="",
                series_number=1, series_description="", requested_priority="routine", calling_ae_title="SCANNER", called_ae_title="NODE",
            )  # fmt: skip
            assert self.storage.index.add_instance(header, stored) == "stored"
        found = self.storage.index.study(study)
        assert found is not None
        return found

    def answer(self, study: Study, *titles: str) -> tuple[PeerEvidence, ...]:
        """Ask, and wait for the answers."""
        evidence: list[tuple[PeerEvidence, ...]] = [()]

        def answered() -> bool:
            evidence[0] = self.inquiry.evidence(study, titles)
            return all(peer.state != "asked" for peer in evidence[0])

        wait_until(answered, what="the answers", every=0.01)
        return evidence[0]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.inquiry.stop()
    site.storage.database.close()


def held(**counts: int) -> Callable[[], StudyContent]:
    """A peer that holds so many instances of each series, named by its modality."""
    uids = {f"{STUDY}.{number}": modality for number, modality in enumerate(counts, start=1)}
    return lambda: StudyContent(instances=dict(zip(uids, counts.values(), strict=True)), modalities=uids)


def test_a_peer_that_holds_the_same_is_asked_once_for_each_image_that_arrives(site):
    site.holds["PACS"] = held(CT=2)
    assert site.answer(site.receive(1, 2), "PACS") == (PeerEvidence(peer="PACS", state="answered", instances=2),)
    assert site.answer(site.receive(), "PACS")[0].state == "answered"
    assert site.asked == ["PACS"]
    site.answer(site.receive(3), "PACS")
    assert site.asked == ["PACS"] * 2


def test_what_a_peer_holds_beyond_is_counted_by_instances(site):
    site.holds["PACS"] = held(CT=4, MR=3, SR=9, SEG=9)
    site.names = lambda series: frozenset(f"{series}.{number}" for number in range(1, 5 if series == SERIES else 4))
    study = site.receive(1, 2)
    assert site.answer(study, "PACS") == (PeerEvidence(peer="PACS", state="answered", instances=7, absent=5),)
    ct, mr = site.inquiry.absent(study, "PACS")
    assert (ct.modality, ct.number, ct.is_all, sorted(ct.instances)) == ("CT", 2, False, [f"{SERIES}.3", f"{SERIES}.4"])
    assert (mr.modality, mr.number, mr.is_all) == ("MR", 3, True)
    assert site.inquiry.absent(site.receive(3), "PACS") == ()  # that answer was about the study as it was


def test_a_peer_that_names_no_instances_is_believed_about_the_number(site):
    site.holds["PACS"] = held(CT=5)
    assert site.answer(site.receive(1, 2), "PACS")[0].absent == 3


def test_results_that_the_peer_was_given_are_not_absent(site):
    study = site.receive(1, 2)
    storage = site.storage
    with storage.database.writing() as transaction:
        revision = storage.index.close_revision(
            transaction, STUDY, seen_last_received_at=study.last_received_at, evidence="", outcome=""
        )  # fmt: skip
        assert revision is not None
        storage.jobs.create(transaction, key="a", kind="analyse", study_instance_uid=STUDY, revision=1, package="p", version="1", digest="",
                            run=1, priority="routine")  # fmt: skip
        picture = Result(
            sop_instance_uid="9.9", sop_class_uid="1.2.840.10008.5.1.4.1.1.7", transfer_syntax_uid="1.2.840.10008.1.2.1", modality="CT",
            study_instance_uid=STUDY, job_key="a", stored=storage.objects.put(b"picture"), created_at=datetime.now(UTC),
        )  # fmt: skip
        storage.jobs.add_results(transaction, [picture])
    site.holds["PACS"] = held(CT=2, OT=1)
    site.names = lambda _series: frozenset({"9.9"})
    assert site.answer(site.receive(), "PACS")[0].absent == 0


def test_a_peer_that_knows_no_such_study_says_so(site):
    site.holds["PACS"] = lambda: None
    assert site.answer(site.receive(1), "PACS") == (PeerEvidence(peer="PACS", state="unknown"),)


@pytest.mark.parametrize("error", [PeerUnavailable("it cannot be reached"), PeerRefused("it takes no query"), ZeroDivisionError()])
def test_a_peer_that_gives_no_answer_is_left_alone_for_a_while(site, error):
    def fail() -> StudyContent:
        raise error

    site.holds["PACS"] = fail
    evidence = site.answer(site.receive(1), "PACS")[0]
    assert evidence.state == "silent"
    assert evidence.reason == (str(error) or "ZeroDivisionError")
    other = site.answer(site.receive(1, study=f"{STUDY}.9"), "PACS")[0]
    assert (other.state, other.reason) == ("silent", evidence.reason)
    assert site.asked == ["PACS"]


def test_a_peer_that_hangs_holds_up_neither_who_asks_nor_another_peer(site):
    goes_on = threading.Event()

    def hang() -> StudyContent | None:
        goes_on.wait(240)
        return None

    site.holds |= {"PACS": hang, "OTHER": held(CT=1)}
    study = site.receive(1)
    try:
        wait_until(
            lambda: site.inquiry.evidence(study, ["OTHER", "PACS"])[0].state == "answered", what="the other peer's answer", every=0.01
        )
        assert site.inquiry.evidence(study, ["OTHER", "PACS"])[1].state == "asked"
    finally:
        goes_on.set()


def test_what_is_absent_is_asked_for_again_and_holds_until_there_is_another_answer(site):
    site.inquiry = site.with_times(again_seconds=0.0, alone_seconds=0.0)
    study = site.receive(1)
    site.holds["PACS"] = held(CT=2)
    assert site.answer(study, "PACS")[0].absent == 1

    def fail() -> StudyContent:
        raise PeerUnavailable("it went away")

    site.holds["PACS"] = fail
    for _ in range(20):
        assert site.inquiry.evidence(study, ["PACS"])[0].absent == 1
    site.holds["PACS"] = held(CT=1)
    wait_until(lambda: site.inquiry.evidence(study, ["PACS"])[0].absent == 0, what="another answer", every=0.01)


def test_a_peer_that_is_gone_from_the_registry_is_not_asked(site):
    site.storage.registry.remove_peer("PACS")
    assert site.inquiry.evidence(site.receive(1), ["PACS"])[0].reason == "it is no peer any more"


def test_nothing_is_remembered_of_studies_that_are_closed(site):
    site.holds["PACS"] = held(CT=1)
    study = site.receive(1)
    site.answer(study, "PACS")
    site.inquiry.forget_but([STUDY])
    assert site.inquiry.evidence(study, ["PACS"])[0].state == "answered"
    site.inquiry.forget_but([])
    assert site.inquiry.evidence(study, ["PACS"])[0].state == "asked"
