"""An urgent study passes a routine one between two windows; both end as if alone, and a crash on the way loses neither."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest

from dicomnode import pace, pipeline
from dicomnode.analysis.inference import Model, load_model
from dicomnode.analysis.package import digest_of
from dicomnode.completion import close_complete_studies
from dicomnode.config import Settings
from dicomnode.engine import EngineClient, Queue, Worker, prepare_engine
from dicomnode.findings import Findings, Volume
from dicomnode.phantoms.studies import write_check_study
from dicomnode.pipeline import Analyser
from storage import Storage, open_storage, prepare_storage
from storage.records import InstanceHeader, Job, Priority, Route

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from small_bundle import MANIFEST, write_package

ROUTINE, URGENT = "routine study", "urgent study"
TEXT = MANIFEST.replace("minimum_ml = 0.03", "minimum_ml = 0.5").replace("minimum_slices", 'region = "lung"\nminimum_slices')


class Crash(BaseException):
    """The process dies."""


@dataclass
class Slow:
    """A model that takes twenty windows of a few milliseconds before it says what the fast one says."""

    model: Model
    at: Callable[[int, str], None]

    def __call__(self, volumes: Mapping[str, Volume], between: Callable[[float], None]) -> Findings:
        study = next(iter(volumes.values())).study_instance_uid
        for window in range(20):
            between(window / 20)
            self.at(window, study)
            time.sleep(0.01)
        return self.model(volumes)


class Desk:
    """A storage, one package, and an analyser that is handed its tickets by the test."""

    def __init__(self, folder: Path, studies: Path, monkeypatch: pytest.MonkeyPatch, **analysis: Any) -> None:
        self.studies = studies
        url = f"sqlite:///{folder / 'node.sqlite'}"
        settings = Settings.model_validate({"engine": {"poll_seconds": 0.01}, "analysis": {"device": "cpu", **analysis}})
        prepare_storage(url, folder)
        prepare_engine(url)
        self.storage: Storage = open_storage(url, folder)
        self.client = EngineClient(url)
        registry = self.storage.registry
        package = registry.package_folder("bright", "1.0")
        write_package(package, manifest=TEXT)
        registry.add_package("bright", "1.0", digest_of(package))
        registry.set_check("bright", "1.0", digest_of(package), {}, passed=True)
        registry.enable("bright", "1.0")
        registry.add_route(
            Route(name="r", from_ae_title="*", called_ae_title="*", package="bright", version=None, to_ae_titles=(), priority=None,
                  quiet_seconds=1, report_refusals=False)
        )  # fmt: skip
        self.began: list[str] = []
        self.loads = 0
        self.at: Callable[[int, str], None] = lambda _window, _study: None
        monkeypatch.setattr(pipeline, "load_model", self._load)
        monkeypatch.setattr(pace, "SECONDS", 0.03)
        self.analyser = Analyser(settings, self.storage, self.client)
        worker = Worker(
            settings.engine, self.storage, self.client, database_url=url,
            queues=(Queue(kind="analyse", work=self._work, concurrency=1),),
        )  # fmt: skip
        self.analyser.let_pass(worker.do_now)

    def _work(self, key: str, attempt: int) -> float | None:
        self.began.append(key)
        return self.analyser.analyse(key, attempt)

    def _load(self, folder: Path, *, digest: str, **_: Any) -> Any:
        self.loads += 1
        return Slow(model=load_model(folder, digest=digest, device="cpu"), at=lambda *window: self.at(*window))  # noqa: PLW0108  # it changes

    def send(self, name: str, priority: Priority) -> str:
        """Store a study and close it; return the key of its job."""
        uid = ""
        for file in sorted((self.studies / name).glob("*.dcm")):
            image = pydicom.dcmread(file, stop_before_pixels=True)
            uid = str(image.StudyInstanceUID)
            stored = self.storage.objects.put(file.read_bytes())
            header = InstanceHeader(
                sop_instance_uid=str(image.SOPInstanceUID), sop_class_uid=str(image.SOPClassUID),
                transfer_syntax_uid=str(image.file_meta.TransferSyntaxUID), series_instance_uid=str(image.SeriesInstanceUID),
                study_instance_uid=uid, dataset_sha256=stored.sha256, kind="image", modality="CT", instance_number=None, patient_id="P",
                patient_name="N", study_date="20260101", study_description="", accession_number="", series_number=2,
                series_description="", requested_priority=priority, calling_ae_title="SCANNER", called_ae_title="NODE",
            )  # fmt: skip
            assert self.storage.index.add_instance(header, stored) == "stored"
        from datetime import UTC, datetime, timedelta

        now = datetime.now(UTC)
        close_complete_studies(self.storage, self.client, now + timedelta(hours=1), up_since=now)
        return next(job.key for job in self.storage.jobs.jobs(study_instance_uid=uid))

    def job(self, key: str) -> Job:
        found = self.storage.jobs.job(key)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for name in (ROUTINE, URGENT):
        write_check_study(folder / name, name)
    return folder


@pytest.fixture
def desk(tmp_path: Path, studies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    desk = Desk(tmp_path, studies, monkeypatch)
    yield desk
    desk.client.close()
    desk.storage.database.close()


def gist(job: Job) -> Any:
    assert job.state == "done", (job.state, job.reason)
    assert job.detail["findings"]
    return [{key: value for key, value in finding.items() if key != "tracking_uid"} for finding in job.detail["findings"]]


def test_an_urgent_study_ends_before_the_routine_one_that_was_running_and_both_say_what_they_say_alone(desk: Desk) -> None:
    keys: list[str] = []

    def at(window: int, _: str) -> None:
        if window == 3 and not keys:
            keys.append(desk.send(URGENT, "stat"))

    desk.at = at
    routine = desk.send(ROUTINE, "routine")
    desk.analyser.analyse(routine, 0)
    (urgent,) = keys
    assert desk.began == [urgent]  # once, between windows of the other
    first, second = desk.job(urgent), desk.job(routine)
    assert first.ended_at is not None
    assert second.ended_at is not None
    assert first.ended_at < second.ended_at
    assert first.started_at is not None
    assert second.started_at is not None
    assert first.started_at > second.started_at
    assert gist(first) == gist(second)  # the same chest
    assert [len(desk.storage.jobs.results(job_key=key)) for key in (urgent, routine)] == [2, 2]
    desk.analyser.analyse(urgent, 0)  # its ticket comes later, and finds it done
    assert desk.job(urgent).attempts == 1


def test_a_routine_study_passes_nobody(desk: Desk) -> None:
    keys: list[str] = []

    def at(window: int, _: str) -> None:
        if window == 3 and not keys:
            keys.append(desk.send(URGENT, "routine"))

    desk.at = at
    desk.analyser.analyse(desk.send(ROUTINE, "routine"), 0)
    assert desk.began == []
    assert desk.job(keys[0]).state == "queued"


def test_a_crash_while_the_urgent_study_passes_loses_neither(desk: Desk) -> None:
    keys: list[str] = []

    def at(window: int, study: str) -> None:
        if window == 3 and not keys:
            keys.append(desk.send(URGENT, "stat"))
        if keys and study in keys[0] and window == 5:
            raise Crash

    desk.at = at
    routine = desk.send(ROUTINE, "routine")
    with pytest.raises(Crash):
        desk.analyser.analyse(routine, 0)
    (urgent,) = keys
    assert (desk.job(routine).state, desk.job(urgent).state) == ("running", "running")
    desk.at = lambda _window, _study: None
    for key in (urgent, routine):  # the ticket that is still on the queue, and the work that is taken over
        assert desk.analyser.analyse(key, 0) is None
    assert gist(desk.job(urgent)) == gist(desk.job(routine))
    assert [len(desk.storage.jobs.results(job_key=key)) for key in (urgent, routine)] == [2, 2]


def test_how_far_a_study_is_can_be_seen_while_it_runs_and_no_longer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: len(seen) * 0.01))  # each window takes a third of the pace

    def at(_window: int, _study: str) -> None:
        seen.append(desk.job(routine).progress)

    desk.at = at
    routine = desk.send(ROUTINE, "routine")
    desk.analyser.analyse(routine, 0)
    told = [share for share in seen if share is not None]
    assert told == sorted(told)
    assert 1 < len(set(told)) < 20  # not at each window
    assert desk.job(routine).progress is None


def test_a_study_that_takes_too_long_fails_with_a_sentence_that_the_pacs_is_told(
    tmp_path: Path, studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, studies, monkeypatch, deadline_seconds=0.05)
    routine = desk.send(ROUTINE, "routine")
    desk.analyser.analyse(routine, 0)
    ended = desk.job(routine)
    assert (ended.state, ended.reason_code) == ("failed", "analysis-failed")
    assert "took longer than 0.05 s" in (ended.reason or "")
    assert [result.modality for result in desk.storage.jobs.results(job_key=routine)] == ["SR"]
    desk.client.close()
    desk.storage.database.close()


def test_a_cancelled_study_stops_between_two_windows(desk: Desk) -> None:
    windows: list[int] = []

    def at(window: int, _: str) -> None:
        windows.append(window)
        if window == 2:
            desk.storage.jobs.finish(routine, "cancelled")

    desk.at = at
    routine = desk.send(ROUTINE, "routine")
    desk.analyser.analyse(routine, 0)
    assert len(windows) < 20
    assert desk.job(routine).state == "cancelled"
    assert desk.storage.jobs.results(job_key=routine) == []


def test_the_second_study_finds_the_model_warm(desk: Desk) -> None:
    for name in (ROUTINE, URGENT):
        desk.analyser.analyse(desk.send(name, "routine"), 0)
    assert desk.loads == 1
