"""How often an analysis is tried: a full disk is waited for, and what ends its worker is put aside."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dicomnode.completion import prioritise
from dicomnode.config import Settings
from dicomnode.delivery import Sender
from dicomnode.dimse.scu import Outgoing, SendOutcome
from dicomnode.pipeline import RETRY_SECONDS, Analyser
from storage.errors import OutOfSpace
from storage.records import Job, Result

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import STUDY, Bench, key

DELIVERY = f"deliver/{STUDY}/1/stub/1/PACS"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Bench]:
    """A storage with one analyse job queued, and no worker."""
    desk = Bench(f"sqlite:///{tmp_path / 'node.sqlite'}", tmp_path / "node")
    desk.route()
    desk.receive()
    desk.close_studies()
    yield desk
    desk.end()


def job(desk: Bench, name: str) -> Job:
    found = desk.storage.jobs.job(name)
    assert found is not None
    return found


def test_a_full_disk_is_waited_for_and_never_counts_as_a_crash(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutOfSpace("no space")

    monkeypatch.setattr(Analyser, "_keep", full)
    analyser = Analyser(Settings(), desk.storage, desk.client)
    for attempt in range(6):
        assert analyser.analyse(key(), attempt) == RETRY_SECONDS
        assert (job(desk, key()).state, job(desk, key()).reason) == ("queued", "no space")
    monkeypatch.undo()
    assert analyser.analyse(key(), 6) is None
    assert job(desk, key()).reason_code == "analysis-failed"  # the bench's image is no DICOM


def test_an_analysis_that_ends_its_worker_is_dead_lettered_after_three_times(desk: Bench) -> None:
    for _ in range(3):
        desk.storage.jobs.start(key())
    Analyser(Settings(), desk.storage, desk.client).analyse(key(), 0)
    ended = job(desk, key())
    assert (ended.state, ended.reason_code) == ("failed", "dead-letter")
    assert "3 times" in (ended.reason or "")


def create_delivery(desk: Bench, results: Sequence[Result] = ()) -> None:
    with desk.storage.database.writing() as connection:
        desk.storage.jobs.create(
            connection, key=DELIVERY, kind="deliver", study_instance_uid=STUDY, revision=1, package="stub", version="1", digest="d" * 64,
            run=1, peer="PACS", priority="routine",
        )  # fmt: skip
        desk.storage.jobs.add_results(connection, results)
        desk.storage.jobs.add_deliveries(connection, DELIVERY, "PACS", [result.sop_instance_uid for result in results])


def test_a_sender_whose_delivery_another_one_has_begun_anew_sends_no_more_of_it(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    uids = ["2.25.1", "2.25.2", "2.25.3"]
    report = Result(
        sop_instance_uid="", sop_class_uid="1.2.840.10008.5.1.4.1.1.88.34", transfer_syntax_uid="1.2.840.10008.1.2.1", modality="SR",
        study_instance_uid=STUDY, job_key=key(), stored=desk.storage.objects.put(b"a report"), created_at=datetime.now(UTC),
    )  # fmt: skip
    create_delivery(desk, [replace(report, sop_instance_uid=uid, stored=desk.storage.objects.put(uid.encode())) for uid in uids])
    sent: list[str] = []

    def takeover() -> None:
        assert Sender(Settings(), desk.storage, desk.client).deliver(DELIVERY, 0) is None
        assert job(desk, DELIVERY).state == "done"

    def send_each(_peer: object, objects: Sequence[Outgoing], **_: object) -> Iterator[SendOutcome]:
        for item in objects:
            sent.append(item.sop_instance_uid)
            if len(sent) == 2:  # the first sender is late and another one takes its job over
                takeover()
            yield SendOutcome(sop_instance_uid=item.sop_instance_uid, state="sent", status=0, error=None)

    monkeypatch.setattr("dicomnode.delivery.send_each", send_each)
    assert Sender(Settings(), desk.storage, desk.client).deliver(DELIVERY, 0) is None
    assert sent == ["2.25.1", "2.25.2", "2.25.2", "2.25.3"], "the object that was on its way is sent twice, no other"
    assert {delivery.state for delivery in desk.storage.jobs.deliveries(job_key=DELIVERY)} == {"sent"}
    assert job(desk, DELIVERY).state == "done"


def test_a_delivery_that_has_waited_long_keeps_its_tries_when_its_priority_changes(desk: Bench) -> None:
    create_delivery(desk)
    for _ in range(20):
        desk.storage.jobs.start(DELIVERY)
        desk.storage.jobs.postpone(DELIVERY, "the peer is down")
    prioritise(desk.storage, desk.client, job(desk, DELIVERY), "stat")
    Sender(Settings(), desk.storage, desk.client).deliver(DELIVERY, 0)
    assert (job(desk, DELIVERY).state, job(desk, DELIVERY).priority) == ("done", "stat")
