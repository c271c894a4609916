"""A package starts on the first complete series; what it found stands for the next revision if that would give it the same, only then."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode import pipeline
from dicomnode.analysis.package import digest_of
from dicomnode.carry_over import AGAIN_SECONDS
from dicomnode.cli import run
from dicomnode.completion import cancel, close_complete_studies, reanalyse
from dicomnode.config import Settings
from dicomnode.phantoms.dicom import SeriesHeader, write_ct_series
from dicomnode.pipeline import Analyser
from dicomnode.results.decoding import comments_of
from storage.records import Job, Revision

sys.path.insert(0, str(Path(__file__).parent))
import test_prefetch
from test_priors import BEFORE, Node, named, predecessors, true_findings

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from small_bundle import MANIFEST

FIRST_SERIES = 5.0


def write_series(folder: Path, name: str, slice_mm: float, slices: int) -> list[Path]:
    """A series with something bright in it, of one study and one frame of reference whatever its name."""
    voxels = np.full((slices, 48, 48), -800, dtype=np.float32)
    voxels[4:8, 20:28, 30:40] = 1500
    affine = np.array([[0, 0, 0.8, -20], [0, 0.8, 0, -20], [slice_mm, 0, 0, 100], [0, 0, 0, 1.0]])
    header = SeriesHeader(seed=f"first {name}", patient_name="PHANTOM^PRIOR", patient_id="PHANTOM-P", study_date="20260411")
    files = write_ct_series(folder / name, voxels, affine, header)
    for file in files:
        image = pydicom.dcmread(file)
        image.StudyInstanceUID, image.FrameOfReferenceUID = "2.25.4711", "2.25.7"
        image.save_as(file)
    return files


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("thin"), "thin", 2.0, 13)


@pytest.fixture(scope="module")
def thick(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("thick"), "thick", 4.0, 12)


class Ward(Node):
    """A node that packages may start on the first series at."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder, PACS=("seg", "sr"))
        self.change_route(first_series_seconds=FIRST_SERIES, quiet_seconds=60.0)

    def change_route(self, **values: object) -> None:
        (route,) = self.storage.registry.routes()
        self.storage.registry.add_route(replace(route, **values))  # type: ignore[arg-type]  # fields of it by name

    def look(self, seconds: float) -> list[Revision]:
        """Let studies begin and close as if they had been silent for so long."""
        now = datetime.now(UTC)
        return close_complete_studies(self.storage, self.client, now + timedelta(seconds=seconds), up_since=now)

    def jobs(self) -> list[Job]:
        return self.storage.jobs.jobs(study_instance_uid=self.study, kind="analyse")

    def analyse(self, key: str) -> float | None:
        return Analyser(Settings.model_validate({"analysis": {"device": "cpu"}}), self.storage, self.client).analyse(key, 0)

    def sent(self) -> list[tuple[str, str]]:
        """What is to reach whom."""
        return sorted((row.sop_instance_uid, row.peer) for row in self.storage.jobs.deliveries(study_instance_uid=self.study))


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ward]:
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: true_findings)
    ward = Ward(tmp_path)
    yield ward
    ward.client.close()
    ward.storage.database.close()


def test_a_package_starts_on_a_complete_series_says_so_and_its_result_stands(
    ward: Ward, thin: list[Path], thick: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ward.receive(thick[:5], stated=len(thick))
    ward.receive(thin[:12], stated=12)
    assert ward.look(FIRST_SERIES - 4) == []  # it hasn't settled
    (begun,) = ward.look(FIRST_SERIES)
    uid = str(pydicom.dcmread(thin[0]).SeriesInstanceUID)
    assert (begun.number, begun.series, begun.stays_open) == (1, (uid,), True)
    assert {image.series_instance_uid for image in ward.storage.index.instances(ward.study, 1)} == {uid}
    assert ward.known().state == "receiving"
    assert ward.look(FIRST_SERIES) == []  # once
    first = ward.end()
    assert first.state == "done"
    assert len(first.detail["findings"]) == 1
    words = (
        "The study was still being received when it was analysed; looked at was what was complete: "
        "series 2 has as many images as it states."
    )
    for report in ward.reports(first):
        assert words in comments_of(report)

    ward.receive(thick[5:], stated=len(thick))
    made, sent = ward.storage.jobs.results(study_instance_uid=ward.study), ward.sent()
    (closed,) = ward.look(600)
    assert (closed.number, closed.stays_open, ward.known().state) == (2, False, "closed")
    second = ward.end()
    assert (second.state, second.reason_code, second.carried_from) == ("done", "carried-over", first.key)
    assert second.detail["findings"] == first.detail["findings"]
    assert (ward.storage.jobs.results(study_instance_uid=ward.study), ward.sent()) == (made, sent)
    assert ward.storage.jobs.standing_results(second.key) == made
    assert run(["study", "show", ward.study, "--config", str(ward.configuration())]) == 0
    assert "carried over from revision 1" in " ".join(capsys.readouterr().out.split())

    ward.receive(thin[12:])
    (later,) = ward.look(600)
    third = ward.end()
    assert (later.number, third.state, third.carried_from) == (3, "done", None)
    assert {predecessors(report)[0] for report in ward.reports(third)} == {named(report) for report in ward.reports(first)}


def test_a_result_stands_only_for_the_same_package_peers_and_earlier_study_and_only_until_another_is_asked_for(
    ward: Ward, thin: list[Path], thick: list[Path], tmp_path: Path
) -> None:
    late = iter(thick)

    def next_revision(stated: int | None = None) -> Job:
        """The job of a revision with one more image, of a series whose slices are too thick."""
        ward.study = "2.25.4711"
        ward.receive([next(late)], stated=stated)
        ward.look(6000)
        return ward.end()

    first = ward.work(thin)
    assert first.carried_from is None
    assert next_revision().carried_from == first.key
    assert next_revision().carried_from == first.key  # from one that was carried over itself

    ward.storage.registry.add_peer(replace(ward.storage.registry.peers()[0], ae_title="SECOND"))
    ward.change_route(to_ae_titles=("PACS", "SECOND"))
    second = next_revision()
    assert (second.state, second.carried_from) == ("done", None)

    before = ward.work(BEFORE.write(tmp_path))
    other = pydicom.dcmread(thick[0])
    other.StudyInstanceUID, other.SeriesInstanceUID = before.study_instance_uid, "2.25.4712"
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = "2.25.4713"
    other.save_as(tmp_path / "other.dcm")
    assert ward.work([tmp_path / "other.dcm"]).carried_from == before.key
    third = next_revision()
    assert (third.carried_from, third.detail["comparison"]["date"]) == (None, "20260101")
    assert next_revision().carried_from == third.key

    assert next_revision(stated=500).carried_from == third.key  # of the other series nearly all is absent, and that revision says so
    assert ward.storage.index.revisions(ward.study)[-1].incomplete
    named = {str(pydicom.dcmread(thin[0]).SeriesInstanceUID): ["2.25.99"]}
    assert ward.storage.notices.create(
        "2.25.1", kind="ian", ae_title="PACS", state="available", studies=[ward.study], images=named
    )  # fmt: skip
    told = next_revision()  # of this one too, as is known now: that has to be said
    assert (told.state, told.carried_from) == ("done", None)
    assert any("PACS names 1 image(s) that aren't here" in comment for comment in comments_of(ward.reports(told)[0]))
    assert next_revision().carried_from == told.key

    reanalyse(ward.storage, ward.client, ward.known())
    fourth = ward.end()
    assert (fourth.run, fourth.state, fourth.carried_from) == (2, "done", None)
    assert next_revision().carried_from == fourth.key

    (ward.package / "manifest.toml").write_text(MANIFEST.replace("RESEARCH USE ONLY", "RESEARCH USE ONLY, anew"))
    ward.storage.registry.add_package("bright", "1.0", digest_of(ward.package))
    ward.storage.registry.set_check("bright", "1.0", digest_of(ward.package), {}, passed=True)
    ward.storage.registry.enable("bright", "1.0")
    fifth = next_revision()
    assert (fifth.state, fifth.carried_from) == ("done", None)

    (holding,) = (known for known in ward.storage.retention.holdings() if known.study_instance_uid == ward.study)
    assert ward.storage.retention.remove(holding, "the rule")
    ward.receive(thin)
    ward.look(600)
    again = ward.end()
    assert (again.state, again.carried_from) == ("done", None)  # it was sent again to be analysed


def test_a_job_waits_for_the_one_that_may_be_at_the_same_and_an_urgent_one_for_none_that_is_not(
    ward: Ward, thin: list[Path], thick: list[Path]
) -> None:
    ward.receive(thin)
    ward.look(600)
    ward.receive(thick[:1])
    ward.look(600)
    ward.receive(thick[1:2])
    ward.look(600)
    first, second, third = ward.jobs()
    assert ward.analyse(second.key) == AGAIN_SECONDS
    waiting = ward.storage.jobs.job(second.key)
    assert waiting is not None
    assert (waiting.state, waiting.reason) == ("queued", "revision 1 is being analysed, maybe of the same images")
    assert ward.analyse(first.key) is None
    assert ward.analyse(second.key) is None
    cancel(ward.storage, ward.client, third)
    ward.receive(thick[2:3])
    ward.look(600)
    fourth = ward.end()
    assert [job.carried_from for job in ward.jobs()] == [None, first.key, None, first.key]  # what was cancelled said nothing
    assert fourth.state == "done"

    ward.receive(thick[3:4])
    ward.look(600)
    ward.receive(thick[4:5])
    ward.look(600)
    fifth, sixth = ward.jobs()[-2:]
    ward.storage.jobs.set_priority(sixth.key, "stat")
    assert ward.storage.jobs.start(fifth.key).state == "running"
    assert ward.analyse(sixth.key) == AGAIN_SECONDS  # it will be done sooner than this one from the begin
    ward.storage.jobs.postpone(fifth.key, "the disk is full")
    assert ward.analyse(sixth.key) is None
    urgent = ward.storage.jobs.job(sixth.key)
    assert urgent is not None
    assert (urgent.state, urgent.carried_from) == ("done", None)


TWO_INPUTS = """
[[inputs]]
name = "thin"
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
slice_spacing_mm = [0.4, 2.5]
[[inputs]]
name = "thick"
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
slice_spacing_mm = [3.0, 5.5]
optional = {optional}
"""


@pytest.mark.parametrize("optional", ["false", "true"])
def test_a_package_of_several_series_starts_when_all_of_them_are_complete(
    tmp_path: Path, thin: list[Path], thick: list[Path], monkeypatch: pytest.MonkeyPatch, optional: str
) -> None:
    head, rest = MANIFEST.split("[input]")
    two = head + TWO_INPUTS.format(optional=optional) + rest[rest.index("[preprocessing]") :]
    monkeypatch.setattr(test_prefetch, "MANIFEST", two)
    ward = Ward(tmp_path)
    ward.receive(thin, stated=len(thin))
    assert ward.look(FIRST_SERIES) == []
    ward.receive(thick[:-1], stated=len(thick))
    assert ward.look(FIRST_SERIES) == []
    ward.receive(thick[-1:], stated=len(thick))
    (begun,) = ward.look(FIRST_SERIES)
    assert len(begun.series or ()) == 2
    ward.client.close()
    ward.storage.database.close()
