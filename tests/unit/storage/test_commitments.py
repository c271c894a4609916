from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from storage import Storage
from storage.records import Commitment, Delivery, Result, Revision, StoredObject

STUDY_UID = "1.2.826.0.1.3680043.8.498.1"
KEY, PEER, UIDS = "deliver", "PACS", ("2.25.1", "2.25.2")


@pytest.fixture(autouse=True)
def sent(
    storage: Storage, receive: Callable[..., str], close: Callable[..., Revision | None], stored: Callable[[int], StoredObject]
) -> None:
    """A running delivery whose two results its peer has taken."""
    receive(1)
    close()
    values: dict[str, Any] = {
        "study_instance_uid": STUDY_UID, "revision": 1, "package": "lung", "version": "1.0", "digest": "d", "run": 1, "priority": "routine",
    }  # fmt: skip
    results = [
        Result(
            sop_instance_uid=uid, sop_class_uid="1.2", transfer_syntax_uid="1.2.840.10008.1.2.1", modality="SEG",
            study_instance_uid=STUDY_UID, job_key=KEY, stored=stored(100 + number), created_at=datetime.now(UTC),
        )
        for number, uid in enumerate(UIDS)
    ]  # fmt: skip
    with storage.database.writing() as connection:
        storage.jobs.create(connection, key=KEY, kind="deliver", peer=PEER, **values)
        storage.jobs.add_results(connection, results)
        storage.jobs.add_deliveries(connection, KEY, PEER, UIDS)
    storage.jobs.start(KEY)
    for uid in UIDS:
        storage.jobs.record_delivery(uid, PEER, state="sent", status=0)


def answer(storage: Storage, asked: Commitment, *committed: str, rounds: int = 1, **failed: int) -> tuple[bool, list[Delivery]]:
    reasons = {uid: (0x0112, "no such instance") for uid in UIDS if uid not in committed} if failed else {}
    with storage.database.writing() as connection:
        return storage.commitments.answer(connection, asked, committed=committed, failed=reasons, rounds=rounds)


def states(storage: Storage) -> list[str]:
    return [row.state for row in sorted(storage.jobs.deliveries(job_key=KEY), key=lambda row: row.sop_instance_uid)]


def test_a_request_is_asked_acknowledged_awaited_and_answered(storage: Storage) -> None:
    asked = storage.commitments.ask("2.25.9", KEY, PEER, UIDS)
    assert (asked.state, asked.due_at, storage.commitments.seconds_left(KEY)) == ("asking", None, None)
    assert {row.transaction_uid for row in storage.jobs.deliveries(job_key=KEY)} == {"2.25.9"}
    with storage.database.writing() as connection:
        assert storage.commitments.acknowledged(connection, asked, state="waiting", wait_seconds=3600)
        assert not storage.commitments.acknowledged(connection, asked, state="refused")
    left = storage.commitments.seconds_left(KEY)
    assert left is not None
    assert 0 < left <= 3600
    assert answer(storage, asked, *UIDS) == (True, [])
    assert storage.commitments.is_answered("2.25.9")
    assert (states(storage), storage.commitments.seconds_left(KEY)) == (["committed"] * 2, None)
    assert answer(storage, asked, failed=1) == (False, [])
    assert storage.commitments.commitment("2.25.8") is None


def test_a_report_that_overtakes_the_acknowledgement_stands(storage: Storage) -> None:
    asked = storage.commitments.ask("2.25.9", KEY, PEER, UIDS)
    answer(storage, asked, *UIDS)
    with storage.database.writing() as connection:
        assert not storage.commitments.acknowledged(connection, asked, state="waiting", wait_seconds=60)
    assert [row.state for row in storage.commitments.commitments(job_key=KEY)] == ["answered"]


def test_a_no_counts_once_for_the_last_request_and_for_so_many_rounds(storage: Storage) -> None:
    older = storage.commitments.ask("2.25.8", KEY, PEER, UIDS)
    storage.commitments.lapse(KEY)
    newer = storage.commitments.ask("2.25.9", KEY, PEER, UIDS)
    is_first, missing = answer(storage, older, failed=1)
    assert (is_first, [row.state for row in missing]) == (True, ["sent"] * 2)
    assert [row.state for row in answer(storage, newer, UIDS[0], failed=1)[1]] == ["waiting"]
    storage.jobs.record_delivery(UIDS[1], PEER, state="sent", status=0)
    last = storage.commitments.ask("2.25.10", KEY, PEER, UIDS[1:])
    (missing_still,) = answer(storage, last, failed=1)[1]
    assert (missing_still.state, missing_still.refusals, missing_still.status) == ("failed", 2, 0x0112)
    assert answer(storage, older, *UIDS) == (False, [])  # a late yes


def test_a_job_that_has_ended_waits_for_nothing_and_may_be_mended(storage: Storage) -> None:
    asked = storage.commitments.ask("2.25.9", KEY, PEER, UIDS)
    storage.jobs.finish(KEY, "failed", reason_code="not-committed", reason="no report")
    answer(storage, asked, UIDS[0], failed=1)
    assert states(storage) == ["committed", "failed"]
    answer(storage, asked, *UIDS)
    with storage.database.writing() as connection:
        storage.jobs.mend(connection, KEY)
    job = storage.jobs.job(KEY)
    assert job is not None
    assert (job.state, job.reason, states(storage)) == ("done", None, ["committed"] * 2)


def test_a_retry_counts_the_rounds_anew(storage: Storage) -> None:
    asked = storage.commitments.ask("2.25.9", KEY, PEER, UIDS)
    answer(storage, asked, failed=1, rounds=0)
    assert states(storage) == ["failed"] * 2
    storage.jobs.finish(KEY, "failed")
    storage.jobs.requeue(KEY)
    assert {(row.state, row.refusals) for row in storage.jobs.deliveries(job_key=KEY)} == {("waiting", 0)}


def test_a_peers_request_waits_is_answered_and_can_be_renewed(storage: Storage) -> None:
    requests = storage.requests
    references = [("1.2", "1.2.3"), ("1.2", "1.2.4")]
    with storage.database.writing() as connection:
        requests.lock(connection, "SCANNER")
        requests.add(connection, "commit/1", peer="SCANNER", transaction_uid="1.9", digest="d", references=references)
        assert requests.waiting(connection, "SCANNER") == 1
        assert [row.key for row in requests.of_transaction(connection, "SCANNER", "1.9")] == ["commit/1"]
        assert requests.of_transaction(connection, "OTHER", "1.9") == []
    started = requests.start("commit/1")
    assert started is not None
    assert (started.attempts, started.references, started.failures) == (1, tuple(references), None)
    requests.verified("commit/1", [("1.2.4", 0x0112)])
    requests.postpone("commit/1", "the peer is off")
    waiting = requests.request("commit/1")
    assert waiting is not None
    assert (waiting.failures, waiting.reason, waiting.state) == ((("1.2.4", 0x0112),), "the peer is off", "waiting")
    assert requests.finish("commit/1", "reported")
    assert not requests.finish("commit/1", "failed", reason_code="x", reason="too late")
    assert requests.start("commit/1") is None
    with storage.database.writing() as connection:
        requests.renew(connection, "commit/1", references)
    (renewed,) = requests.requests()
    assert (renewed.state, renewed.attempts, renewed.failures, renewed.ended_at) == ("waiting", 0, None, None)


def test_an_object_is_digested_as_it_lies_on_the_disk(storage: Storage) -> None:
    head = b"\0" * 128 + b"DICM\x02\0\0\0UL\x04\0" + (4).to_bytes(4, "little") + b"meta"
    kept = storage.objects.put(head, b"data set")
    assert storage.objects.digest(kept.object_id) == kept.sha256
    path = storage.objects.path(kept.object_id)
    path.write_bytes(path.read_bytes() + b"!")
    assert storage.objects.digest(kept.object_id) != kept.sha256
