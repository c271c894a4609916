"""Reports name what they take the place of, and a job done again makes the same bytes whatever came or went meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage
from sqlalchemy import text

from dicomnode import pipeline
from dicomnode.completion import close_complete_studies, reanalyse
from dicomnode.config import Settings
from dicomnode.findings import Findings, Segment, Volume
from dicomnode.phantoms.dicom import SeriesHeader, write_ct_series
from dicomnode.pipeline import Analyser
from results_cases import Case, finding_of, identity
from storage.records import Job, Study

sys.path.insert(0, str(Path(__file__).parent))
from test_display_profiles import Site

REPORTS = ("1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.88.34")


class Node(Site):
    """A site that analyses each revision when it is closed."""

    def work(self, files: list[Path]) -> Job:
        """Receive, close and analyse; return the ended job."""
        self.receive(files)
        now = datetime.now(UTC)
        close_complete_studies(self.storage, self.client, now + timedelta(hours=1), up_since=now)
        return self.end()

    def end(self) -> Job:
        """Do the newest job; return it as it ended."""
        job = self.storage.jobs.jobs(study_instance_uid=self.study, kind="analyse")[-1]
        Analyser(Settings.model_validate({"analysis": {"device": "cpu"}}), self.storage, self.client).analyse(job.key, 0)
        ended = self.storage.jobs.job(job.key)
        assert ended is not None
        return ended

    def made(self, job: Job) -> dict[str, bytes]:
        """The job's result objects."""
        results = self.storage.jobs.results(job_key=job.key)
        return {result.sop_instance_uid: self.storage.objects.path(result.stored.object_id).read_bytes() for result in results}

    def forget_results(self, job: Job) -> None:
        """Let a job be as before it ended: no row of its results or deliveries is left."""
        with self.storage.database.writing() as connection:
            of_job = {"key": job.key}
            made = "SELECT sop_instance_uid FROM result WHERE job_key = :key"
            connection.execute(text(f"DELETE FROM delivery WHERE sop_instance_uid IN ({made})"), of_job)
            connection.execute(text("DELETE FROM result WHERE job_key = :key"), of_job)
        self.storage.jobs.requeue(job.key)

    def known(self) -> Study:
        """The study as the index sees it."""
        found = self.storage.index.study(self.study)
        assert found is not None
        return found

    def reports(self, job: Job) -> list[pydicom.Dataset]:
        """The job's reports, read."""
        results = [result for result in self.storage.jobs.results(job_key=job.key) if result.sop_class_uid in REPORTS]
        return [pydicom.dcmread(self.storage.objects.path(result.stored.object_id)) for result in results]


def predecessors(report: pydicom.Dataset) -> list[tuple[str, str, str, str]]:
    """Study, series, class and instance of each."""
    return [
        (str(study.StudyInstanceUID), str(series.SeriesInstanceUID), str(named.ReferencedSOPClassUID), str(named.ReferencedSOPInstanceUID))
        for study in report.get("PredecessorDocumentsSequence", [])
        for series in study.ReferencedSeriesSequence
        for named in series.ReferencedSOPSequence
    ]


def named(report: pydicom.Dataset) -> tuple[str, str, str, str]:
    """The same of a report itself."""
    return str(report.StudyInstanceUID), str(report.SeriesInstanceUID), str(report.SOPClassUID), str(report.SOPInstanceUID)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    voxels = np.full((12, 48, 48), -800, dtype=np.float32)
    voxels[4:8, 20:28, 30:40] = 60
    affine = np.array([[0, 0, 0.8, -20], [0, 0.8, 0, -20], [2.0, 0, 0, 100], [0, 0, 0, 1.0]])
    write_ct_series(folder, voxels, affine, SeriesHeader(seed="priors", patient_name="PHANTOM^PRIOR", patient_id="PHANTOM-P"))
    return folder


def true_findings(volumes: Mapping[str, Volume], *_: object) -> Findings:
    """What is brighter than soft tissue, each thing a finding: the truth about a phantom."""
    (volume,) = volumes.values()
    labelled, count = ndimage.label(volume.voxels > 0)
    case = Case(volume=volume, headers=[], identity=identity(volume.study_instance_uid))
    found = []
    for number, box in enumerate(ndimage.find_objects(labelled), start=1):
        segment = Segment(mask=labelled[box] == number, origin=(box[0].start, box[1].start, box[2].start))
        found.append(finding_of(case, segment, side=None))
    assert len(found) == count
    return replace(case.findings(*found), package="bright", version="1.0")


@pytest.fixture
def node(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: true_findings)
    node = Node(
        tmp_path,
        study,
        LABELS=("seg-labelmap", "sr"),
        BOTH=("seg", "sr-comprehensive", "key-image", "key-object"),
    )
    yield node
    node.client.close()
    node.storage.database.close()


def referenced(report: pydicom.Dataset) -> set[str]:
    """The SOP classes of what a report names as its evidence."""
    return {
        str(one.ReferencedSOPClassUID)
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }


def test_a_late_image_makes_reports_that_each_name_the_one_it_takes_the_place_of(node: Node) -> None:
    first, second = node.work(node.files[:-1]), node.work(node.files[-1:])
    assert (first.revision, second.revision, second.state) == (1, 2, "done")
    former = {named(report): report for report in node.reports(first)}
    assert len(former) == 3  # of both classes on the SEG, and one on the label map
    assert [predecessors(report) for report in former.values()] == [[], [], []]
    replaced = {}
    for report in node.reports(second):
        (name,) = predecessors(report)
        replaced[name] = report
    assert replaced.keys() == former.keys()
    for name, report in replaced.items():
        assert report.SOPClassUID == former[name].SOPClassUID
        assert referenced(report) == referenced(former[name])


def test_another_run_takes_the_place_of_the_last_one_and_a_reason_is_replaced_too(node: Node) -> None:
    refused, first = node.work(node.files[:3]), node.work(node.files[3:])
    assert (refused.state, first.state) == ("refused", "done")
    reanalyse(node.storage, node.client, node.known())
    again = node.end()
    assert (again.revision, again.run) == (2, 2)
    for later, earlier in ((first, refused), (again, first)):
        assert {predecessors(report)[0] for report in node.reports(later)} <= {named(report) for report in node.reports(earlier)}


@pytest.mark.parametrize("gone", [False, True])
def test_a_job_done_again_makes_the_same_bytes_even_if_what_it_refers_to_is_gone(node: Node, gone: bool) -> None:
    first, second = node.work(node.files[:-1]), node.work(node.files[-1:])
    made = node.made(second)
    assert len(made) == 2 + 3 + 2  # segmentations, reports, picture and key objects
    node.forget_results(second)
    if gone:
        for result in node.storage.jobs.results(job_key=first.key):
            node.storage.objects.path(result.stored.object_id).unlink()
    assert node.end().state == "done"
    assert node.made(second) == made
