from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from storage import Storage
from storage.errors import Conflict
from storage.records import InstanceHeader, Result, Revision, StoredObject

STUDY_UID = "1.2.826.0.1.3680043.8.498.1"
Make = Callable[..., InstanceHeader]
Receive = Callable[..., str]
Close = Callable[..., Revision | None]
Stored = Callable[[int], StoredObject]


def test_an_instance_is_found_as_it_came(storage: Storage, header: Make) -> None:
    stored = storage.objects.put(b"DICM")
    assert storage.index.add_instance(header(1, note="4 bytes of trailing padding"), stored) == "stored"
    found = storage.index.find(header(1).sop_instance_uid)
    assert found is not None
    assert found.stored == stored
    assert (found.kind, found.made_here, found.note) == ("image", False, "4 bytes of trailing padding")
    assert (found.study_instance_uid, found.series_instance_uid) == (STUDY_UID, header(1).series_instance_uid)
    assert found.received_at.utcoffset() == timedelta(0)
    assert storage.index.find("1.2.3") is None


def test_the_study_shows_its_patient_series_and_counts(storage: Storage, receive: Receive) -> None:
    receive(1)
    receive(2)
    receive(3, series_instance_uid="1.2.3", modality="SR", series_number=None, kind="other")
    study = storage.index.study(STUDY_UID)
    assert study is not None
    assert (study.patient_id, study.patient_name, study.instances) == ("P1", "Doe^Jane", 3)
    assert (study.revision, study.state, study.released_at) == (0, "receiving", None)
    assert [(s.modality, s.instances) for s in storage.index.series(STUDY_UID)] == [("CT", 2), ("SR", 1)]
    assert storage.index.studies() == [study]
    assert storage.index.study("1.2.3") is None


def test_the_same_content_again_is_a_duplicate_and_other_content_a_conflict(storage: Storage, receive: Receive, stored: Stored) -> None:
    assert receive(1) == "stored"
    before = storage.index.study(STUDY_UID)
    assert receive(1) == "duplicate"
    assert receive(1, dataset_sha256="0" * 64) == "conflict"
    assert receive(1, transfer_syntax_uid="1.2.840.10008.1.2.4.70") == "conflict"
    assert receive(1, study_instance_uid="1.2.3", dataset_sha256="0" * 64) == "conflict"
    assert storage.index.studies() == [before]


def test_a_result_of_this_node_that_comes_back_is_linked_and_makes_no_revision(
    storage: Storage, receive: Receive, close: Close, header: Make, stored: Stored
) -> None:
    receive(1)
    close()
    with storage.database.writing() as connection:
        storage.jobs.create(
            connection, key="k", kind="analyse", study_instance_uid=STUDY_UID, revision=1, package="p", version="1", digest="d",
            run=1, priority="routine",
        )  # fmt: skip
        result = Result(
            sop_instance_uid="2.25.7", sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4", transfer_syntax_uid="1.2.840.10008.1.2.1",
            modality="SEG", study_instance_uid=STUDY_UID, job_key="k", stored=stored(1), created_at=storage.database.now(connection),
        )  # fmt: skip
        storage.jobs.add_results(connection, [result])
    study = storage.index.study(STUDY_UID)
    assert receive(2, sop_instance_uid="2.25.7") == "stored"
    found = storage.index.find("2.25.7")
    assert found is not None
    assert found.made_here
    assert storage.index.receiving() == []
    assert study is not None
    assert (after := storage.index.study(STUDY_UID)) is not None
    assert (after.last_received_at, after.state, after.instances) == (study.last_received_at, "closed", 2)


def test_what_is_no_image_makes_no_revision(storage: Storage, receive: Receive, close: Close) -> None:
    receive(1, kind="other")
    assert storage.index.receiving() == []
    assert close() is None
    receive(2)
    assert [study.study_instance_uid for study in storage.index.receiving()] == [STUDY_UID]


def test_late_images_make_the_next_revision_which_holds_the_earlier_ones_too(storage: Storage, receive: Receive, close: Close) -> None:
    receive(1)
    receive(2)
    first = close()
    assert first is not None
    assert (first.number, first.evidence, first.outcome) == (1, "quiet for 30 s", "jobs")
    assert close() is None
    receive(3)
    second = close()
    assert second is not None
    assert storage.index.revisions(STUDY_UID) == [first, second]
    assert [i.instance_number for i in storage.index.instances(STUDY_UID, 1)] == [1, 2]
    assert [i.instance_number for i in storage.index.instances(STUDY_UID, 2)] == [1, 2, 3]
    assert storage.index.instances(STUDY_UID, 3) == []
    assert len(storage.index.instances(STUDY_UID)) == 3


def test_a_revision_is_not_closed_if_an_image_arrived_since_the_caller_looked(storage: Storage, receive: Receive, close: Close) -> None:
    receive(1)
    seen = storage.index.study(STUDY_UID)
    assert seen is not None
    receive(2)
    with storage.database.writing() as connection:
        refused = storage.index.close_revision(connection, STUDY_UID, seen_last_received_at=seen.last_received_at, evidence="", outcome="")
    assert refused is None
    assert storage.index.revisions(STUDY_UID) == []


def test_two_images_never_arrive_at_the_same_time(storage: Storage, receive: Receive, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(1)
    seen = storage.index.study(STUDY_UID)
    assert seen is not None
    monkeypatch.setattr(storage.database, "now", lambda _connection: seen.last_received_at)
    receive(2)
    after = storage.index.study(STUDY_UID)
    assert after is not None
    assert after.last_received_at != seen.last_received_at


def test_a_rolled_back_revision_was_never_closed(storage: Storage, receive: Receive, close: Close) -> None:
    receive(1)
    seen = storage.index.study(STUDY_UID)
    assert seen is not None

    class Crash(Exception):
        pass

    def close_and_crash() -> None:
        with storage.database.writing() as connection:
            closed = storage.index.close_revision(
                connection, STUDY_UID, seen_last_received_at=seen.last_received_at, evidence="", outcome=""
            )
            assert closed is not None
            raise Crash

    with pytest.raises(Crash):
        close_and_crash()
    assert storage.index.revisions(STUDY_UID) == []
    assert storage.index.receiving() == [seen]


def test_an_unknown_study_cannot_be_closed(storage: Storage) -> None:
    with pytest.raises(Conflict, match="no study"), storage.database.writing() as connection:
        storage.index.close_revision(connection, "1.2.3", seen_last_received_at=storage.database.now(connection), evidence="", outcome="")


def test_callers_and_priority_are_those_of_all_images_of_the_study(storage: Storage, receive: Receive, close: Close) -> None:
    receive(1, calling_ae_title="PACS", called_ae_title="OTHER")
    receive(2, calling_ae_title="PACS", called_ae_title="OTHER")
    receive(3, calling_ae_title="WORKSTATION", kind="other", requested_priority="stat")
    assert storage.index.callers(STUDY_UID) == [("PACS", "OTHER")]
    assert storage.index.requested_priority(STUDY_UID) == "routine"
    close()
    receive(4, calling_ae_title="CT1", requested_priority="stat")
    assert storage.index.callers(STUDY_UID) == [("CT1", "NODE"), ("PACS", "OTHER")]
    assert storage.index.requested_priority(STUDY_UID) == "stat"
    assert (storage.index.callers("1.2.3"), storage.index.requested_priority("1.2.3")) == ([], "routine")


def test_a_release_is_noted_on_the_studies_it_brought(storage: Storage, receive: Receive) -> None:
    receive(1)
    receive(2, study_instance_uid="1.2.3")
    storage.index.mark_released({STUDY_UID, "1.2.4"})
    released = {study.study_instance_uid: study.released_at is not None for study in storage.index.studies()}
    assert released == {STUDY_UID: True, "1.2.3": False}


def test_one_patient_with_two_studies_is_one_patient_and_the_studies_come_newest_first(storage: Storage, receive: Receive) -> None:
    receive(1)
    receive(2, study_instance_uid="1.2.3")
    assert [(s.study_instance_uid, s.patient_name) for s in storage.index.studies()] == [("1.2.3", "Doe^Jane"), (STUDY_UID, "Doe^Jane")]
    assert len(storage.index.studies(limit=1)) == 1


def test_a_series_uid_used_in_two_studies_is_a_series_in_each(storage: Storage, receive: Receive) -> None:
    receive(1)
    receive(2, study_instance_uid="1.2.3")
    assert [s.instances for s in storage.index.series(STUDY_UID)] == [s.instances for s in storage.index.series("1.2.3")] == [1]


def test_objects_that_rows_name_are_known(storage: Storage, header: Make, stored: Stored) -> None:
    storage.index.add_instance(header(1), stored(1))
    storage.index.quarantine(
        sop_instance_uid="1.2", study_instance_uid=None, calling_ae_title="A", dimse_status=0xC003, reason="", stored=stored(2)
    )
    many = [f"{n:032x}" for n in range(1200)]
    assert storage.index.is_known(many) == {stored(1).object_id, stored(2).object_id}
    assert storage.index.is_known([]) == set()


def test_what_is_unknown_is_not_about_to_be_committed_by_anybody(storage: Storage, header: Make, stored: Stored) -> None:
    """A process can die, or lose its connection, while the server is still at its commit: its file may not be taken for an orphan."""
    with ThreadPoolExecutor(1) as pool:
        with storage.database.writing() as connection:
            assert storage.index._arriving.add(connection, [(header(1), stored(1))]) == ["stored"]
            asked = pool.submit(storage.index.is_known, [stored(1).object_id])
            with pytest.raises(TimeoutError):
                asked.result(0.3)
        assert asked.result(120) == {stored(1).object_id}


@pytest.mark.parametrize("differ", ["nothing", "content", "study"])
def test_of_threads_that_bring_one_uid_exactly_one_stores_it(storage: Storage, header: Make, differ: str) -> None:
    threads, rounds = 6, 8
    barrier = threading.Barrier(threads)

    def bring(thread: int) -> list[str]:
        answers = []
        for number in range(rounds):
            changes = {
                "nothing": {},
                "content": {"dataset_sha256": f"{thread:064x}"},
                "study": {"study_instance_uid": f"1.2.{number}.{thread}", "patient_id": str(thread % 2)},
            }[differ]
            barrier.wait(120)
            answers.append(storage.index.add_instance(header(number, **changes), storage.objects.put(b"x")))
        return answers

    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(bring, range(threads)))
    losing = "conflict" if differ == "content" else "duplicate"
    for of_one_uid in zip(*answers, strict=True):
        assert sorted(of_one_uid) == sorted(["stored"] + [losing] * (threads - 1))
    studies = storage.index.studies()
    assert sum(study.instances for study in studies) == rounds
    assert all(study.instances for study in studies)  # who lost left no empty study behind


def test_no_image_falls_between_two_revisions_and_none_changes_after_it_was_closed(storage: Storage, header: Make) -> None:
    writers, each = 4, 25
    done, closed_amid = threading.Event(), threading.Event()
    seen_at_close: dict[int, list[str]] = {}

    def write(writer: int) -> None:
        for number in range(each):
            answer = storage.index.add_instance(header(1 + writer * each + number), storage.objects.put(b"x"))
            assert answer == "stored"
            if number == each // 2:
                assert closed_amid.wait(120)  # so that images come before and after a close, however busy the machine is

    def close_once() -> None:
        with storage.database.writing() as connection:
            study = storage.index.study(STUDY_UID)
            revision = study and storage.index.close_revision(
                connection, STUDY_UID, seen_last_received_at=study.last_received_at, evidence="", outcome=""
            )
        if revision:
            seen_at_close[revision.number] = [i.sop_instance_uid for i in storage.index.instances(STUDY_UID, revision.number)]
            closed_amid.set()

    def keep_closing() -> None:
        while not done.is_set():
            close_once()

    with ThreadPoolExecutor(writers + 2) as pool:
        closing = [pool.submit(keep_closing) for _ in range(2)]
        for writing in [pool.submit(write, writer) for writer in range(writers)]:
            writing.result()
        done.set()
        for closer in closing:
            closer.result()
    close_once()
    assert len(seen_at_close) > 1
    numbers = sorted(seen_at_close)
    assert numbers == list(range(1, len(numbers) + 1)) == [r.number for r in storage.index.revisions(STUDY_UID)]
    previous: list[str] = []
    for number in numbers:
        content = [i.sop_instance_uid for i in storage.index.instances(STUDY_UID, number)]
        assert content == seen_at_close[number]
        assert content[: len(previous)] == previous
        assert len(content) > len(previous)
        previous = content
    assert len(set(previous)) == len(previous) == writers * each


WIRE_TEXT = st.text(st.characters(codec=None), max_size=20)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    uid=st.from_regex(r"[0-9.]{1,64}", fullmatch=True),
    text=WIRE_TEXT,
    ae_title=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=16),
)
def test_no_text_from_the_wire_keeps_an_instance_from_being_stored_and_found(
    storage: Storage, header: Make, uid: str, text: str, ae_title: str
) -> None:
    made = header(
        1, sop_instance_uid=uid, patient_name=text, patient_id=text, series_description=text, note=text, calling_ae_title=ae_title
    )
    answer = storage.index.add_instance(made, storage.objects.put(b"x"))
    found = storage.index.find(uid)
    assert answer in {"stored", "duplicate"}
    assert found is not None
    if answer == "stored":
        assert found.calling_ae_title == ae_title
        assert found.note == "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in text)
