"""The main job with a PACS that nobody here wrote: Orthanc forwards a study and gets SEG and SR back within it."""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from pydicom import Dataset, dcmread

from dicomnode.phantoms.studies import TrueStudy, write_check_study, write_demo_studies
from pacs import LOOPBACK, ORTHANC_AET, SCANNER_AET, Node, Orthanc, free_port, storescu, wait_until
from validators import complaints

PACKAGE = "lung-nodule-ct"
PACKAGES = Path(__file__).parents[2] / "dicomnode" / "packages"
ANALYSIS_SECONDS = 240  # a generous limit for a busy machine; nothing is measured here

pytestmark = pytest.mark.system


@pytest.fixture
def chest(database_url: str, tmp_path: Path) -> TrueStudy:
    """A chest CT with one nodule: a whole one for the node on SQLite, twenty slices of one for the node on PostgreSQL."""
    if database_url.startswith("sqlite"):
        return write_demo_studies(tmp_path / "studies")[0]
    return write_check_study(tmp_path / "study", "orthanc")


@pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.long)], indirect=True)
def test_orthanc_forwards_a_study_and_gets_seg_and_sr_back_within_it_once(
    node: Node, orthanc: Orthanc, chest: TrueStudy, tmp_path: Path
) -> None:
    uid = chest.study_instance_uid
    set_up(node, orthanc)
    node.start()
    storescu(orthanc.peer, chest.folder)
    wait_until(lambda: settled(node, uid), seconds=ANALYSIS_SECONDS, what="the results to be delivered", log=node.log, every=1)

    found = orthanc.find_series(uid, tmp_path / "find")
    assert Counter(str(series.Modality) for series in found) == {"CT": 1, "SEG": 1, "SR": 1}
    results = {dataset.Modality: dataset for dataset in instances(orthanc, uid) if dataset.Modality != "CT"}
    assert {str(dataset.ContentQualification) for dataset in results.values()} == {"RESEARCH"}
    assert results["SEG"].ReferencedSeriesSequence[0].SeriesInstanceUID == chest.series_instance_uid
    assert results["SR"].VerificationFlag == "UNVERIFIED"
    for modality, dataset in results.items():
        file = tmp_path / f"{modality}.dcm"
        dataset.save_as(file)
        assert complaints(file, tmp_path) == []

    before = summary(node, uid)
    assert before["study"][0]["revision"] == 1
    assert [(job["kind"], job["state"]) for job in before["jobs"]] == [("analyse", "done"), ("deliver", "done")]
    sent_back = orthanc.post("/modalities/node/store", {"Resources": [orthanc.study_id(uid)], "Synchronous": True})
    assert sent_back["FailedInstancesCount"] == 0
    wait_until(lambda: summary(node, uid)["study"][0]["instances"] == chest.instances + 2, what="the results to be indexed")
    after = summary(node, uid)
    assert after["study"][0]["state"] == "closed", "results of this node that come back are not new images"
    assert after["study"][0]["revision"] == 1
    assert after["jobs"] == before["jobs"]
    node.stop()


def set_up(node: Node, orthanc: Orthanc) -> None:
    """Tell the node of its peers, its package and its route."""
    node.cli("peer", "add", SCANNER_AET, LOOPBACK, free_port(), "--sends")
    node.cli("peer", "add", ORTHANC_AET, LOOPBACK, orthanc.dicom_port, "--sends", "--receives")
    node.cli("package", "add", max((PACKAGES / PACKAGE).iterdir()))
    node.cli("package", "check", PACKAGE)
    node.cli("package", "enable", PACKAGE)
    node.cli("route", "add", "chest", "--from", ORTHANC_AET, "--package", PACKAGE, "--to", ORTHANC_AET, "--quiet", 1)


def summary(node: Node, study_instance_uid: str) -> dict[str, Any]:
    """What `dicomnode study show` says of the study."""
    return node.listing("study", "show", study_instance_uid)[0]


def settled(node: Node, study_instance_uid: str) -> bool:
    """Whether the study is analysed and its results delivered; fail if a job failed."""
    jobs = node.listing("job", "list")
    assert [job for job in jobs if job["state"] in {"failed", "refused", "cancelled"}] == []
    return {job["kind"] for job in jobs if job["state"] == "done" and job["study_instance_uid"] == study_instance_uid} == {
        "analyse",
        "deliver",
    }


def instances(orthanc: Orthanc, study_instance_uid: str) -> list[Dataset]:
    """The first instance of each series of the study as Orthanc keeps it."""
    found = []
    for series in orthanc.get(f"/studies/{orthanc.study_id(study_instance_uid)}/series"):
        with urlopen(f"http://{LOOPBACK}:{orthanc.http_port}/instances/{series['Instances'][0]}/file", timeout=300) as response:
            found.append(dcmread(BytesIO(response.read())))
    return found
