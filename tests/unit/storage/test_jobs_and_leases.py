from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest

from storage import Storage
from storage.errors import Conflict
from storage.records import Job, Result, Revision, StoredObject

STUDY_UID = "1.2.826.0.1.3680043.8.498.1"
Stored = Callable[[int], StoredObject]


@pytest.fixture(autouse=True)
def closed_study(receive: Callable[..., str], close: Callable[..., Revision | None]) -> None:
    receive(1)
    close()


@pytest.fixture
def create(storage: Storage) -> Callable[..., bool]:
    def create_now(key: str = "k", **changes: Any) -> bool:
        values: dict[str, Any] = {
            "kind": "analyse", "study_instance_uid": STUDY_UID, "revision": 1, "package": "lung", "version": "1.0",
            "digest": "d", "run": 1, "priority": "routine",
        }  # fmt: skip
        with storage.database.writing() as connection:
            return storage.jobs.create(connection, key=key, **values | changes)

    return create_now


def job(storage: Storage, key: str = "k") -> Job:
    found = storage.jobs.job(key)
    assert found is not None
    return found


def result(stored: StoredObject, uid: str, at: datetime) -> Result:
    return Result(
        sop_instance_uid=uid, sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4", transfer_syntax_uid="1.2.840.10008.1.2.1", modality="SEG",
        study_instance_uid=STUDY_UID, job_key="k", stored=stored, created_at=at,
    )  # fmt: skip


def test_a_job_is_kept_as_created_and_created_once(storage: Storage, create: Callable[..., bool]) -> None:
    assert create(to_ae_titles=("PACS", "ARCHIVE"), report_refusals=True, priority="stat")
    assert not create(run=7)
    made = job(storage)
    assert (made.state, made.attempts, made.detail, made.run) == ("queued", 0, {}, 1)
    assert (made.to_ae_titles, made.report_refusals, made.priority, made.peer) == (("PACS", "ARCHIVE"), True, "stat", None)
    assert (made.started_at, made.ended_at, made.reason_code, made.reason) == (None, None, None, None)
    assert storage.jobs.job("other") is None


@pytest.mark.parametrize("changes", [{"revision": 2}, {"study_instance_uid": "1.2.3"}])
def test_no_job_exists_for_a_revision_that_is_not_closed(storage: Storage, create: Callable[..., bool], changes: dict[str, Any]) -> None:
    with pytest.raises(Conflict):
        create(**changes)
    assert storage.jobs.jobs() == []


def test_a_revision_and_its_jobs_are_there_together_or_not_at_all(
    storage: Storage, receive: Callable[..., str], create: Callable[..., bool]
) -> None:
    receive(2)
    seen = storage.index.study(STUDY_UID)
    assert seen is not None

    def close_with(jobs: int, *, crash: bool) -> None:
        with storage.database.writing() as connection:
            revision = storage.index.close_revision(
                connection, STUDY_UID, seen_last_received_at=seen.last_received_at, evidence="", outcome="jobs"
            )
            assert revision is not None
            for number in range(jobs):
                storage.jobs.create(
                    connection, key=f"r2-{number}", kind="analyse", study_instance_uid=STUDY_UID, revision=revision.number,
                    package=f"p{number}", version="1", digest="d", run=1, priority="routine",
                )  # fmt: skip
            if crash:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        close_with(2, crash=True)
    assert (len(storage.index.revisions(STUDY_UID)), storage.jobs.jobs()) == (1, [])
    close_with(2, crash=False)
    assert (len(storage.index.revisions(STUDY_UID)), [j.key for j in storage.jobs.jobs()]) == (2, ["r2-0", "r2-1"])


def test_a_job_runs_counts_its_attempts_and_ends_once(storage: Storage, create: Callable[..., bool]) -> None:
    create()
    assert (storage.jobs.start("k").attempts, storage.jobs.start("k").attempts) == (1, 2)
    assert job(storage).started_at is not None
    assert storage.jobs.finish("k", "refused", reason_code="modality", reason="MR is not CT", detail={"seconds": {"volume": 0.5}})
    ended = job(storage)
    assert (ended.state, ended.reason_code, ended.reason, ended.detail) == (
        "refused",
        "modality",
        "MR is not CT",
        {"seconds": {"volume": 0.5}},
    )
    assert not storage.jobs.finish("k", "done")
    assert storage.jobs.start("k") == job(storage) == ended


def test_a_cancelled_job_does_not_start(storage: Storage, create: Callable[..., bool]) -> None:
    create()
    storage.jobs.finish("k", "cancelled")
    assert (storage.jobs.start("k").state, storage.jobs.start("k").attempts) == ("cancelled", 0)


def test_a_postponed_job_says_why_it_waits_and_an_ended_one_stays_ended(storage: Storage, create: Callable[..., bool]) -> None:
    create()
    storage.jobs.start("k")
    storage.jobs.postpone("k", "PACS does not answer; next try in 30 s")
    assert (job(storage).state, job(storage).attempts, job(storage).reason) == ("queued", 1, "PACS does not answer; next try in 30 s")
    storage.jobs.start("k")
    storage.jobs.finish("k", "cancelled")
    storage.jobs.postpone("k", "too late")
    assert (job(storage).state, job(storage).reason) == ("cancelled", None)


def test_a_job_ends_in_the_callers_transaction(storage: Storage, create: Callable[..., bool]) -> None:
    create()

    def end_and_crash() -> None:
        with storage.database.writing() as connection:
            storage.jobs.finish("k", "done", connection=connection)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end_and_crash()
    assert job(storage).state == "queued"


def test_jobs_are_listed_by_what_they_are(storage: Storage, create: Callable[..., bool]) -> None:
    create("a")
    create("b", kind="deliver", peer="PACS")
    storage.jobs.finish("a", "done")
    assert [j.key for j in storage.jobs.jobs()] == ["a", "b"]
    assert [j.key for j in storage.jobs.jobs(kind="deliver")] == ["b"]
    assert [j.key for j in storage.jobs.jobs(state="done", study_instance_uid=STUDY_UID)] == ["a"]
    assert storage.jobs.jobs(study_instance_uid="1.2.3") == []


def test_priority_changes_and_a_requeued_job_is_as_new(storage: Storage, create: Callable[..., bool]) -> None:
    create()
    storage.jobs.set_priority("k", "stat")
    storage.jobs.start("k")
    storage.jobs.finish("k", "failed", reason_code="crash", reason="the worker died three times")
    storage.jobs.requeue("k")
    again = job(storage)
    assert (again.state, again.attempts, again.reason, again.started_at, again.ended_at) == ("queued", 0, None, None, None)
    assert again.priority == "stat"


def test_what_a_job_depends_on_is_noted_once_and_stays(storage: Storage, create: Callable[..., bool]) -> None:
    create()
    assert storage.jobs.remember("k", "prior", {"study": "1.2"}) == {"study": "1.2"}
    assert storage.jobs.remember("k", "prior", {"study": "3.4"}) == {"study": "1.2"}
    storage.jobs.finish("k", "failed", detail={"findings": []})
    storage.jobs.requeue("k")
    assert job(storage).detail == {"prior": {"study": "1.2"}, "findings": []}
    assert storage.jobs.remember("k", "prior", {}) == {"study": "1.2"}


def test_an_unknown_job_is_named(storage: Storage) -> None:
    for act in (
        storage.jobs.start,
        storage.jobs.requeue,
        lambda k: storage.jobs.set_priority(k, "stat"),
        lambda k: storage.jobs.finish(k, "done"),
        lambda k: storage.jobs.remember(k, "prior", {}),
    ):
        with pytest.raises(Conflict, match="no job nothing"):
            act("nothing")


def test_runs_count_up_per_revision_and_package(storage: Storage, create: Callable[..., bool]) -> None:
    def next_run(revision: int) -> int:
        with storage.database.writing() as connection:
            return storage.jobs.next_run(connection, STUDY_UID, revision, "lung")

    assert next_run(1) == 1
    create("a")
    create("b", run=2, version="1.1")
    create("c", run=9, package="heart")
    assert next_run(1) == 3
    assert next_run(2) == 1


def test_results_are_kept_once_and_the_first_bytes_stay(storage: Storage, create: Callable[..., bool], stored: Stored) -> None:
    create()
    now = datetime.fromisoformat("2026-11-22T10:00:00+00:00")
    with storage.database.writing() as connection:
        storage.jobs.add_results(connection, [result(stored(1), "2.25.1", now), result(stored(2), "2.25.2", now)])
    with storage.database.writing() as connection:
        storage.jobs.add_results(connection, [result(stored(3), "2.25.1", now)])
    kept = [result(stored(1), "2.25.1", now), result(stored(2), "2.25.2", now)]
    assert storage.jobs.results(study_instance_uid=STUDY_UID) == storage.jobs.results(job_key="k") == storage.jobs.results() == kept
    assert storage.jobs.results(job_key="other") == []
    assert storage.index.is_known([f"{n:032x}" for n in (1, 2, 3)]) == {f"{n:032x}" for n in (1, 2)}


def test_a_delivery_waits_is_tried_and_is_sent(storage: Storage, create: Callable[..., bool], stored: Stored) -> None:
    create()
    create("d", kind="deliver", peer="PACS")
    now = datetime.fromisoformat("2026-11-22T10:00:00+00:00")
    with storage.database.writing() as connection:
        storage.jobs.add_results(connection, [result(stored(1), "2.25.1", now)])
        storage.jobs.add_deliveries(connection, "d", "PACS", ["2.25.1"])
        storage.jobs.add_deliveries(connection, "d", "PACS", ["2.25.1"])
    (waiting,) = storage.jobs.deliveries(study_instance_uid=STUDY_UID)
    assert (waiting.state, waiting.attempts, waiting.sent_at) == ("waiting", 0, None)
    next_at = now + timedelta(seconds=30)
    storage.jobs.record_delivery("2.25.1", "PACS", state="waiting", status=0xA700, error="out of resources", next_at=next_at)
    (tried,) = storage.jobs.deliveries(job_key="d")
    assert (tried.state, tried.attempts, tried.status, tried.error, tried.next_at) == ("waiting", 1, 0xA700, "out of resources", next_at)
    storage.jobs.record_delivery("2.25.1", "PACS", state="failed", error="gave up")
    storage.jobs.requeue("d")
    assert [d.state for d in storage.jobs.deliveries()] == ["waiting"]
    storage.jobs.record_delivery("2.25.1", "PACS", state="sent", status=0)
    (sent,) = storage.jobs.deliveries()
    storage.jobs.record_delivery("2.25.1", "PACS", state="sent", status=0)
    (again,) = storage.jobs.deliveries()
    assert (sent.state, sent.attempts, sent.error, sent.next_at) == ("sent", 3, None, None)
    assert sent.sent_at is not None
    assert (again.attempts, again.sent_at) == (4, sent.sent_at)
    with pytest.raises(Conflict, match="not on its way"):
        storage.jobs.record_delivery("2.25.1", "ARCHIVE", state="sent")


def test_a_lease_has_one_holder_until_it_ends(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = storage.leases
    with storage.database.reading() as connection:
        clock = storage.database.now(connection)

    def at(seconds: float) -> None:
        monkeypatch.setattr(storage.database, "now", lambda _connection: clock + timedelta(seconds=seconds))

    at(0)
    assert leases.hold("worker/1", "a", 10)
    assert not leases.hold("worker/1", "b", 10)
    at(8)
    assert leases.hold("worker/1", "a", 10)
    at(17)
    assert (leases.holder("worker/1"), leases.expired("worker/")) == ("a", [])
    at(18)
    assert (leases.holder("worker/1"), leases.expired("worker/"), leases.expired("completion")) == (None, [("worker/1", "a")], [])
    assert leases.hold("worker/1", "b", 10)
    assert not leases.hold("worker/1", "a", 10)
    leases.release("worker/1", "a")
    assert leases.holder("worker/1") == "b"
    leases.release("worker/1", "b")
    at(1000)
    assert (leases.holder("worker/1"), leases.expired("")) == (None, [])


# SQLite has no clock of its own: one machine, one clock
@pytest.mark.system
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_leases_run_on_the_clock_of_the_database(storage: Storage) -> None:
    with storage.database.writing() as connection:
        connection.exec_driver_sql("CREATE SCHEMA slow")
        connection.exec_driver_sql(
            "CREATE FUNCTION slow.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ SELECT '2020-01-01 00:00Z'::timestamptz $$"
        )
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET search_path = slow, pg_catalog, public")
    storage.database.close()
    with storage.database.reading() as connection:
        assert storage.database.now(connection) == datetime.fromisoformat("2020-01-01T00:00:00+00:00")
    assert storage.leases.hold("n", "a", 1)
    assert storage.leases.holder("n") == "a"


def test_of_many_that_want_a_lease_one_gets_it(storage: Storage) -> None:
    barrier = threading.Barrier(6)

    def want(owner: int) -> list[bool]:
        answers = []
        for number in range(5):
            barrier.wait(120)
            answers.append(storage.leases.hold(f"n{number}", str(owner), 60))
        return answers

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(want, range(6)))
    assert [sum(row) for row in zip(*answers, strict=True)] == [1] * 5
