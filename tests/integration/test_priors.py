"""Reports name what they replace and compare with an earlier study; a job done again makes the same bytes, whatever came or went."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from sqlalchemy import text

from dicomnode import pipeline
from dicomnode.cli import run
from dicomnode.completion import close_complete_studies, reanalyse
from dicomnode.config import Settings
from dicomnode.findings import Findings, Segment, Volume
from dicomnode.phantoms.chest import chest_scene, render
from dicomnode.phantoms.dicom import SeriesHeader, write_ct_series
from dicomnode.phantoms.studies import ball_in_lung, chest_grid
from dicomnode.pipeline import Analyser
from dicomnode.results.decoding import DecodedGroup, comments_of, decode_report, read
from results_cases import Case, finding_of, identity
from storage.records import Job, Study

sys.path.insert(0, str(Path(__file__).parent))
import test_prefetch
from test_display_profiles import Site

BRIGHT_HU = 1000  # nothing of a phantom is as bright as what is painted into it
REPORTS = ("1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.88.34")


class Node(Site):
    """A site that analyses each revision when it is closed."""

    def __init__(self, folder: Path, studies: Path, **profiles: tuple[str, ...]) -> None:
        super().__init__(folder, studies, **profiles)
        self.folder = folder

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

    def configuration(self) -> Path:
        """A configuration file of this node."""
        file = self.folder / "dicomnode.toml"
        file.write_text(f'[node]\ndata = "{self.folder}"\n[storage]\ndatabase_url = "{self.url}"\n')
        return file

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
    voxels[4:8, 20:28, 30:40] = 1500
    affine = np.array([[0, 0, 0.8, -20], [0, 0.8, 0, -20], [2.0, 0, 0, 100], [0, 0, 0, 1.0]])
    write_ct_series(folder, voxels, affine, SeriesHeader(seed="priors", patient_name="PHANTOM^PRIOR", patient_id="PHANTOM-P"))
    return folder


def true_findings(volumes: Mapping[str, Volume], *_: object) -> Findings:
    """What is brighter than soft tissue, each thing a finding: the truth about a phantom."""
    (volume,) = volumes.values()
    labelled, count = ndimage.label(volume.voxels > BRIGHT_HU)
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


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A study to write: what it holds and whose it is."""

    name: str
    date: str
    balls: tuple[tuple[float, float, float, float], ...]  # LPS mm of the centre, and the diameter
    values: Mapping[str, str] = field(default_factory=dict)  # of attributes

    def write(self, folder: Path, *, fine: bool = False) -> list[Path]:
        """20 x 36 x 36 mm of lung, in voxels of 0.36 or, fine, 0.05 cubic millimetres; all scans are in one frame of reference."""
        slice_mm, pixel_mm = (0.5, 0.32) if fine else (1.0, 0.6)
        pixels = round(36 / pixel_mm)
        voxels = np.full((round(20 / slice_mm), pixels, pixels), -800, dtype=np.float32)
        affine = np.array([[0, 0, pixel_mm, -18], [0, pixel_mm, 0, -18], [slice_mm, 0, 0, 100], [0, 0, 0, 1.0]])
        places = np.indices(voxels.shape).reshape(3, -1).T @ affine[:3, :3].T + affine[:3, 3]
        for x, y, z, diameter in self.balls:
            voxels[(np.linalg.norm(places - (x, y, z), axis=1) <= diameter / 2).reshape(voxels.shape)] = 1500
        header = SeriesHeader(seed=self.name, patient_name="PHANTOM^PRIOR", patient_id="PHANTOM-P", study_date=self.date)
        files = write_ct_series(folder / self.name, voxels, affine, header)
        for file in files:
            image = pydicom.dcmread(file)
            for keyword, value in ({"FrameOfReferenceUID": "2.25.7"} | dict(self.values)).items():
                setattr(image, keyword, value)
            image.save_as(file)
        return files


BEFORE = Scan(name="before", date="20260101", balls=((-11.1, -10.2, 108.3, 6.0), (12.2, -9.7, 112.1, 7.0)))
NOW = Scan(name="now", date="20260411", balls=((-10.3, -9.8, 108.9, 8.0), (-9.6, 13.1, 110.2, 6.0)))
DAYS = 100
GROWTH = (8 / 6) ** 3  # of the first ball's volume


def groups(report: pydicom.Dataset) -> list[DecodedGroup]:
    """The measurement groups of a report."""
    return list(decode_report(report))


def differences(report: pydicom.Dataset) -> dict[str, str]:
    """Qualitative Difference by Tracking UID."""
    return {group.tracking_uid: value for group in groups(report) for concept, value in group.codes if concept == "111049"}


def test_a_nodule_that_grew_is_the_same_and_says_by_how_much_a_new_one_and_one_that_is_gone_say_so(
    node: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    former, later = node.work(BEFORE.write(tmp_path, fine=True)), node.work(NOW.write(tmp_path, fine=True))
    assert (former.state, later.state) == ("done", "done")
    grown, gone = former.detail["findings"]
    assert former.detail["comparison"]["reason"] == "this node has analysed no earlier study of this patient with bright"
    assert any("no earlier study of this patient" in comment for comment in comments_of(node.reports(former)[0]))
    same, new = later.detail["findings"]
    assert (same["tracking_uid"], new["tracking_uid"] in (grown["tracking_uid"], gone["tracking_uid"])) == (grown["tracking_uid"], False)
    doubling = DAYS * math.log(2) / math.log(GROWTH)
    assert later.detail["comparison"]["vanished"][0]["tracking_uid"] == gone["tracking_uid"]
    for report in node.reports(later):
        numbers = {n[0]: n for g in groups(report) if g.tracking_uid == grown["tracking_uid"] for n in g.numbers}
        assert numbers["VOLUME-CHANGE"][1] == pytest.approx(100 * (GROWTH - 1), rel=0.02)
        assert numbers["DOUBLING-TIME"][1] == pytest.approx(doubling, rel=0.02)
        assert (numbers["VOLUME-CHANGE"][2], numbers["DOUBLING-TIME"][2]) == ("%", "d")
        assert differences(report) == {
            grown["tracking_uid"]: "15454001", new["tracking_uid"]: "129721008", gone["tracking_uid"]: "272519000",
        }  # fmt: skip
        (name,) = predecessors(report)
        assert name in {named(one) for one in node.reports(former) if one.SOPClassUID == report.SOPClassUID}
        words = " ".join(comments_of(report))
        assert "Compared with the study of 2026-01-01, 100 days before" in words
        assert "No longer seen: " in words
    segments = {str(item.get("TrackingUID")) for uid, data in node.made(later).items() for item in read(data).get("SegmentSequence", ())}
    assert {grown["tracking_uid"], new["tracking_uid"]} <= segments
    assert run(["study", "show", node.study, "--config", str(node.configuration())]) == 0
    shown = capsys.readouterr().out
    assert "no longer seen" in shown
    assert "doubling in 8" in shown


def test_the_same_bytes_again_whatever_other_study_came_and_whatever_of_the_prior_went(node: Node, tmp_path: Path) -> None:
    former, later = node.work(BEFORE.write(tmp_path)), node.work(NOW.write(tmp_path))
    made, study = node.made(later), node.study
    node.work(replace(BEFORE, name="between", date="20260301").write(tmp_path))
    node.study = study
    for stored in (
        *(r.stored for r in node.storage.jobs.results(job_key=former.key)),
        *(i.stored for i in node.storage.index.instances(former.study_instance_uid)),
    ):
        node.storage.objects.path(stored.object_id).unlink()
    node.forget_results(later)
    again = node.end()
    assert node.made(again) == made
    assert again.detail["findings"] == later.detail["findings"]
    reanalyse(node.storage, node.client, node.known())  # asked for anew, it looks for a prior anew
    assert node.end().detail["comparison"]["date"] == "20260301"


@pytest.mark.parametrize(
    "scan",
    [
        replace(BEFORE, values={"PatientID": "PHANTOM-Q"}),
        replace(BEFORE, values={"IssuerOfPatientID": "ELSEWHERE"}),
        replace(BEFORE, values={"PatientBirthDate": "19510101"}),
        replace(BEFORE, date="20260411"),
        replace(BEFORE, date="20260412"),
    ],
)
def test_what_is_of_another_patient_or_not_earlier_is_no_prior(node: Node, tmp_path: Path, scan: Scan) -> None:
    node.work(scan.write(tmp_path))
    comparison = node.work(NOW.write(tmp_path)).detail["comparison"]
    assert comparison["study_instance_uid"] is None
    assert comparison["reason"].startswith("this node has analysed no earlier study")


def test_within_what_measuring_twice_may_differ_by_nothing_has_doubled(node: Node, tmp_path: Path) -> None:
    node.work(BEFORE.write(tmp_path))
    later = node.work(replace(NOW, balls=((-10.3, -9.8, 108.9, 6.2), (12.2, -9.7, 112.1, 6.0))).write(tmp_path))
    changes = [finding["change"] for finding in later.detail["findings"]]
    assert [change["status"] for change in changes] == ["unchanged", "shrunk"]
    assert [change["doubling_days"] for change in changes] == [None, None]
    assert differences(node.reports(later)[0]).keys() == {finding["tracking_uid"] for finding in later.detail["findings"]}


def write_chest(folder: Path, name: str, date: str, diameter: float, pose: NDArray[np.float64]) -> list[Path]:
    """A whole chest with a ball in the left lung, of a patient who lies as `pose` (4 x 4) says, in a frame of reference of its own."""
    scene = chest_scene(102)
    grid = chest_grid(scene, pixel_mm=4.0, slice_mm=5.0, pixels=96)
    voxels = render(scene, grid).hu
    ball = ball_in_lung(scene, diameter_mm=24.0, right=False, seed=0).centre_lps_mm
    places = np.indices(voxels.shape).reshape(3, -1).T @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    voxels[(np.linalg.norm(places - ball, axis=1) <= diameter / 2).reshape(voxels.shape)] = 1500
    header = SeriesHeader(seed=name, patient_name="PHANTOM^CHEST", patient_id="PHANTOM-C", study_date=date, thickness_mm=5.0)
    return write_ct_series(folder / name, voxels, pose @ grid.affine, header)


def test_a_patient_who_lies_otherwise_in_another_frame_of_reference_is_compared_after_an_alignment(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: true_findings)
    monkeypatch.setattr(test_prefetch, "MANIFEST", test_prefetch.MANIFEST.replace("[0.3, 1.5]", "[0.3, 4.5]"))
    node = Node(tmp_path, study, VIEWER=("seg", "sr"))
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("y", 4, degrees=True).as_matrix()
    pose[:3, 3] = 30, -15, 60  # mm: without an alignment the ball would be another one
    former = node.work(write_chest(tmp_path, "chest before", "20260101", 24.0, np.eye(4)))
    later = node.work(write_chest(tmp_path, "chest now", "20260401", 32.0, pose))
    (before,), (now,) = former.detail["findings"], later.detail["findings"]
    assert now["tracking_uid"] == before["tracking_uid"]
    assert now["change"]["status"] == "grown"
    assert math.dist(now["centre_lps_mm"], before["centre_lps_mm"]) > 40
    assert later.detail["comparison"]["alignment"].startswith("the images were aligned rigidly (correlation ")
    for stored in node.storage.index.instances(former.study_instance_uid):  # the alignment is kept: it needs these images once
        node.storage.objects.path(stored.stored.object_id).unlink()
    made = node.made(later)
    node.forget_results(later)
    assert node.made(node.end()) == made
    node.client.close()
    node.storage.database.close()
