"""A job fetches earlier studies beside its analysis: not while an urgent one passes, and where it gets none its report says why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pydicom
import pytest
from hostile_archive import Archive, an_image, half_and_wait, running

from dicomnode import pace, pipeline
from dicomnode.cli import run
from dicomnode.completion import close_complete_studies
from dicomnode.config import Settings
from dicomnode.dimse.find import query
from dicomnode.findings import Findings, Volume
from dicomnode.pipeline import Analyser
from dicomnode.results.decoding import comments_of
from pacs import wait_until
from storage.records import Job, PriorRule

sys.path.insert(0, str(Path(__file__).parent))
from test_priors import Node, study, true_findings

__all__ = ["study"]  # a fixture

EARLIER, PATIENCE = "1.2.3.1", 120.0


@pytest.fixture
def node(tmp_path: Path, study: Path) -> Iterator[Node]:
    node = Node(tmp_path, study, VIEWER=("seg", "sr"))
    yield node
    node.client.close()
    node.storage.database.close()


@pytest.fixture
def archive(node: Node) -> Iterator[Archive]:
    """An archive that holds three images of the month before, and that the node's route names."""
    header = pydicom.dcmread(node.files[0], stop_before_pixels=True)
    with running(Archive()) as archive:
        archive.images = [an_image(EARLIER, number, PatientID=header.PatientID) for number in (1, 2, 3)]
        before = (date.fromisoformat(str(header.StudyDate)) - timedelta(days=30)).strftime("%Y%m%d")
        archive.studies = [query("STUDY", StudyInstanceUID=EARLIER, StudyDate=before, StudyTime="0800", PatientID=header.PatientID)]
        node.storage.registry.add_peer(archive.peer(retrieve_by="get"))
        (route,) = node.storage.registry.routes()
        node.storage.registry.add_route(replace(route, priors=PriorRule(ae_title="PACS")))
        yield archive


def job_of(node: Node) -> Job:
    node.receive(node.files)
    now = datetime.now(UTC)
    close_complete_studies(node.storage, node.client, now + timedelta(hours=1), up_since=now)
    (job,) = node.storage.jobs.jobs(study_instance_uid=node.study, kind="analyse")
    return job


def analysed(node: Node, job: Job, do_now: Callable[[str], object]) -> Job:
    analyser = Analyser(
        Settings.model_validate({"analysis": {"device": "cpu"}, "engine": {"poll_seconds": 0.01}}), node.storage, node.client
    )
    analyser.let_pass(do_now)
    analyser.analyse(job.key, 0)
    ended = node.storage.jobs.job(job.key)
    assert ended is not None
    assert ended.state == "done", ended.reason
    return ended


def test_nothing_is_fetched_while_an_urgent_study_passes_and_the_rest_afterwards(
    node: Node, archive: Archive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.sending = half_and_wait
    job, passed = job_of(node), list[str]()

    def do_now(key: str) -> None:
        assert archive.cancelled.wait(PATIENCE)
        assert len(node.storage.index.instances(EARLIER)) == 1
        archive.goes_on.set()
        passed.append(key)
        node.storage.jobs.finish(key, "cancelled")

    def model(volumes: Mapping[str, Volume], between: Callable[[float], None]) -> Findings:
        wait_until(lambda: len(node.storage.index.instances(EARLIER)) == 1, what="the first of three images", every=0.01)
        with node.storage.database.writing() as connection:
            node.storage.jobs.create(
                connection, key="urgent", kind="analyse", study_instance_uid=node.study, revision=1, package="other", version="1",
                digest="", run=1, priority="stat",
            )  # fmt: skip

        def has_passed() -> bool:
            between(0.5)
            return bool(passed)

        wait_until(has_passed, what="the urgent study to pass", every=0.01)
        return true_findings(volumes)

    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    told = analysed(node, job, do_now).detail["retrieval"]
    assert (told["gave_way"], [(one["state"], one["instances"]) for one in told["studies"]]) == (1, [("fetched", 3)])
    assert [kind for kind, _ in archive.retrieved] == ["get", "get"]
    assert passed == ["urgent"]
    monkeypatch.setenv("COLUMNS", "240")
    assert run(["study", "show", node.study, "--config", str(node.configuration())]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"study {EARLIER}" in line]
    assert [word.strip() for word in line.strip("│\n ").split("│")] == [f"study {EARLIER}", "PACS", "2", "3", "fetched"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0xC001, "earlier studies could not be fetched from PACS: it refused, or answered with more than it may"),
        (None, "PACS holds none that the route asks for"),
    ],
)
def test_a_report_says_why_no_earlier_study_was_fetched(
    node: Node, archive: Archive, monkeypatch: pytest.MonkeyPatch, status: int | None, words: str
) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: true_findings)
    archive.studies = []
    archive.status = status or 0x0000
    ended = analysed(node, job_of(node), lambda _key: None)
    assert ended.detail["comparison"]["reason"].endswith(f"; {words}")
    (report,) = node.reports(ended)
    assert any(words in comment for comment in comments_of(report))
