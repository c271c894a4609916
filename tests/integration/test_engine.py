"""Facts about durable work: queued in a transaction, done once or again, in order of urgency, taken over from the dead."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from dicomnode.completion import cancel, close_complete_studies, prioritise, reanalyse, retry
from dicomnode.config import EngineSection
from dicomnode.engine import EngineClient, Queue, Worker, prepare_engine
from pacs import wait_until
from storage import open_storage, prepare_storage
from storage.records import InstanceHeader, Peer, Priority, Result, Route

WORKER = Path(__file__).parents[1] / "engine_worker.py"
STUDY = "1.2.3.4"


class Bench:
    """A storage with one study received, an engine client, and workers as processes."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        prepare_storage(url, folder)
        prepare_engine(url)
        self.storage = open_storage(url, folder)
        self.client = EngineClient(url)
        self.workers: list[subprocess.Popen[bytes]] = []
        registry = self.storage.registry
        registry.add_peer(Peer(ae_title="PACS", host="127.0.0.1", port=104, sends=True, receives=True, tls=False, client_cert=None))
        registry.add_package("stub", "1", "d" * 64)
        registry.set_check("stub", "1", "d" * 64, {}, passed=True)
        registry.enable("stub", "1")

    def route(self, name: str = "r", priority: Priority | None = None) -> None:
        self.storage.registry.add_route(
            Route(name=name, from_ae_title="*", called_ae_title="*", package="stub", version=None, to_ae_titles=("PACS",),
                  priority=priority, quiet_seconds=5, report_refusals=False)
        )  # fmt: skip

    def receive(self, study: str = STUDY, number: int = 1, requested: Priority = "routine") -> None:
        stored = self.storage.objects.put(f"{study} {number}".encode())
        header = InstanceHeader(
            sop_instance_uid=f"{study}.{number}", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", transfer_syntax_uid="1.2.840.10008.1.2.1",
            series_instance_uid=f"{study}.0", study_instance_uid=study, dataset_sha256=stored.sha256, kind="image", modality="CT",
            instance_number=number, patient_id="P", patient_name="N", study_date="20260101", study_description="", accession_number="",
            series_number=1, series_description="", requested_priority=requested, calling_ae_title="SCANNER", called_ae_title="NODE",
        )  # fmt: skip
        assert self.storage.index.add_instance(header, stored) == "stored"

    def close_studies(self) -> int:
        now = datetime.now(UTC)
        return len(close_complete_studies(self.storage, self.client, now + timedelta(hours=1), up_since=now))

    def worker(self, behaviour: str = "done") -> subprocess.Popen[bytes]:
        """Start a worker whose analyse work is `behaviour`; it appends each key it begins to the journal."""
        command = [sys.executable, str(WORKER), self.url, str(self.folder), str(self.folder / "journal"), behaviour]
        process = subprocess.Popen(command)
        self.workers.append(process)
        return process

    def journal(self) -> list[str]:
        file = self.folder / "journal"
        return file.read_text(encoding="utf-8").split() if file.exists() else []

    def states(self) -> dict[str, str]:
        return {job.key: job.state for job in self.storage.jobs.jobs()}

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what=f"{what}; {self.states()} {self.journal()}")

    def end(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        self.client.close()
        self.storage.database.close()


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(database_url, tmp_path / "node")
    yield bench
    bench.end()


def key(study: str = STUDY, revision: int = 1, run: int = 1) -> str:
    return f"analyse/{study}/{revision}/stub/{run}"


def test_a_closed_revision_has_exactly_its_jobs_and_an_open_one_none(bench: Bench) -> None:
    bench.route("one")
    bench.route("two")
    bench.receive()
    assert bench.storage.jobs.jobs() == []
    assert bench.close_studies() == 1
    assert bench.states() == {key(): "queued"}
    assert bench.close_studies() == 0
    bench.receive(number=2)
    assert bench.close_studies() == 1
    assert bench.states() == {key(): "queued", key(revision=2): "queued"}
    assert len(bench.storage.index.instances(STUDY, 1)) == 1
    assert len(bench.storage.index.instances(STUDY, 2)) == 2


def test_the_time_the_node_was_down_is_not_silence(bench: Bench) -> None:
    bench.route()
    bench.receive()
    now = datetime.now(UTC) + timedelta(hours=1)
    assert close_complete_studies(bench.storage, bench.client, now, up_since=now - timedelta(seconds=1)) == []
    assert len(close_complete_studies(bench.storage, bench.client, now, up_since=now - timedelta(seconds=60))) == 1


def test_a_study_without_a_route_is_closed_and_says_so(bench: Bench) -> None:
    bench.receive()
    assert bench.close_studies() == 1
    (revision,) = bench.storage.index.revisions(STUDY)
    assert revision.outcome == "no route"
    assert bench.storage.jobs.jobs() == []


def test_what_the_transaction_rolled_back_is_never_worked_on(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()

    def enqueue_and_fail() -> None:
        with bench.storage.database.writing() as transaction:
            bench.client.enqueue(transaction, "analyse/ghost", "analyse", "routine")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        enqueue_and_fail()
    bench.worker()
    bench.wait(lambda: bench.states() == {key(): "done"}, "the real job")
    assert bench.journal() == [key()]


def test_stat_overtakes_routine_and_a_changed_priority_counts(bench: Bench) -> None:
    bench.route()
    for study in ("1.1", "1.2", "1.3"):
        bench.receive(study)
        bench.close_studies()
    bench.receive("1.9", requested="stat")
    bench.close_studies()
    third = bench.storage.jobs.job(key("1.3"))
    assert third is not None
    prioritise(bench.storage, bench.client, third, "stat")
    bench.worker()
    bench.wait(lambda: set(bench.states().values()) == {"done"}, "all jobs")
    assert set(bench.journal()[:2]) == {key("1.9"), key("1.3")}
    assert sorted(bench.journal()) == sorted(key(study) for study in ("1.1", "1.2", "1.3", "1.9"))


def test_another_worker_takes_over_from_a_killed_one(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    first = bench.worker("hang")
    bench.wait(lambda: bench.journal() == [key()], "the first worker to begin")
    second = bench.worker("done")
    first.send_signal(signal.SIGKILL)
    bench.wait(lambda: bench.states() == {key(): "done"}, "the takeover")
    assert bench.journal() == [key(), key()]
    job = bench.storage.jobs.job(key())
    assert job is not None
    assert job.attempts == 2
    second.terminate()
    assert second.wait(120) == 0
    assert bench.storage.leases.expired("worker/") == []


def test_a_stop_amid_a_job_is_no_crash_of_the_job(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    worker = bench.worker("hang")
    bench.wait(lambda: bench.journal() == [key()], "the worker to begin")
    worker.terminate()
    bench.wait(lambda: attempts(bench) == 0, "the attempt to be taken back")
    worker.kill()
    bench.worker("done")
    bench.wait(lambda: bench.states() == {key(): "done"}, "the takeover")
    assert attempts(bench) == 1


def test_a_worker_that_is_only_late_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr("dicomnode.engine.DBOS", SimpleNamespace(_recover_pending_workflows=lambda owners: taken.extend(owners) or ()))
    worker = Worker(EngineSection(), bench.storage, bench.client, database_url=bench.url, queues=())
    worker._launched.set()
    leases = bench.storage.leases
    for seconds in (0, 0, 60, 0, 0):  # lapsed in two rounds, renewed, lapsed in two more
        leases.hold("worker/late", "late", seconds)
        worker._renew_and_take_over()
    assert taken == []
    worker._renew_and_take_over()
    assert taken == ["late"]
    assert leases.expired("worker/") == []
    worker._renew_and_take_over()
    assert taken == ["late"]


def test_a_job_that_is_on_the_queue_again_while_it_is_worked_on_waits_for_its_end(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    begun, end = threading.Event(), threading.Event()
    states: list[str] = []

    def work(key: str, _attempt: int) -> None:
        states.append(bench.storage.jobs.start(key).state)
        begun.set()
        assert end.wait(60)
        bench.storage.jobs.finish(key, "done")

    queue = Queue(kind="analyse", work=work, concurrency=2)
    worker = Worker(EngineSection(), bench.storage, bench.client, database_url=bench.url, queues=(queue,))
    threads = [threading.Thread(target=worker.do_now, args=(key(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert begun.wait(60)
    threads[1].join(0.3)  # time to begin, which it must not use
    assert states == ["running"]
    end.set()
    for thread in threads:
        thread.join(60)
    assert states == ["running", "done"]


def attempts(bench: Bench) -> int:
    (job,) = bench.storage.jobs.jobs()
    return job.attempts


def test_an_unexpected_error_ends_the_job_visibly_and_a_retry_does_it(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    broken = bench.worker("raise")
    bench.wait(lambda: bench.states() == {key(): "failed"}, "the failure")
    broken.terminate()
    assert broken.wait(120) == 0
    job = bench.storage.jobs.job(key())
    assert job is not None
    assert job.reason_code == "internal-error"
    assert "ZeroDivisionError" in (job.reason or "")
    retry(bench.storage, bench.client, job)
    bench.worker("done")
    bench.wait(lambda: bench.states() == {key(): "done"}, "the retry")


def test_a_job_that_the_database_left_in_the_middle_is_done_when_it_is_back(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    bench.worker("database-away")
    bench.wait(lambda: bench.states() == {key(): "done"}, "the second try")
    assert bench.journal() == [key()] * 2


def test_an_analysis_whose_failure_was_reported_is_retried_as_the_next_run(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    report = Result(
        sop_instance_uid="2.25.1", sop_class_uid="1.2.840.10008.5.1.4.1.1.88.34", transfer_syntax_uid="1.2.840.10008.1.2.1", modality="SR",
        study_instance_uid=STUDY, job_key=key(), stored=bench.storage.objects.put(b"failed"), created_at=datetime.now(UTC),
    )  # fmt: skip
    with bench.storage.database.writing() as transaction:
        bench.storage.jobs.add_results(transaction, [report])
        bench.storage.jobs.finish(key(), "failed", reason_code="analysis-failed", reason="told the PACS", connection=transaction)
    job = bench.storage.jobs.job(key())
    assert job is not None
    assert retry(bench.storage, bench.client, job) == key(run=2)
    bench.worker("done")
    bench.wait(lambda: bench.states() == {key(): "failed", key(run=2): "done"}, "the next run")


def test_a_try_that_asks_for_another_comes_again_later(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    bench.worker("third-time")
    bench.wait(lambda: bench.states() == {key(): "done"}, "the third try")
    assert bench.journal() == [key()] * 3


def test_a_cancelled_job_is_never_begun(bench: Bench) -> None:
    bench.route()
    for study in ("1.1", "1.2"):
        bench.receive(study)
        bench.close_studies()
    job = bench.storage.jobs.job(key("1.1"))
    assert job is not None
    cancel(bench.storage, bench.client, job)
    bench.worker()
    bench.wait(lambda: bench.states() == {key("1.1"): "cancelled", key("1.2"): "done"}, "the other job")
    assert bench.journal() == [key("1.2")]


def test_a_study_is_analysed_again_as_the_next_run(bench: Bench) -> None:
    bench.route()
    bench.receive()
    bench.close_studies()
    study = bench.storage.index.study(STUDY)
    assert study is not None
    assert reanalyse(bench.storage, bench.client, study) == [key(run=2)]
    bench.worker()
    bench.wait(lambda: bench.states() == {key(): "done", key(run=2): "done"}, "both runs")


def test_the_engine_of_sqlite_syncs_each_commit(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    prepare_engine(url)
    client = EngineClient(url)
    with client._client._sys_db.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    client.close()
