"""Whether a study is complete is asked of a PACS that nobody here wrote: Orthanc holds more than came, then as much, then results, too."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dimse_cases import a_dataset
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.completion import Seen, close_complete_studies
from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.dimse.find import FindLimits, series_instances, study_content
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.inquiry import Inquirer, Inquiry
from dicomnode.receiver import Receiver
from pacs import NODE_AET, ORTHANC_AET, PATIENCE_SECONDS, Orthanc, loopback_peer, orthanc, storescu, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import Revision, Route

STUDY = "1.2.826.0.1.77"
PATIENT = FindLimits(seconds=PATIENCE_SECONDS)

pytestmark = pytest.mark.system


class Site:
    """A receiver in this process, and what closes its studies, at times of the test's choice."""

    def __init__(self, storage: Storage, client: EngineClient) -> None:
        self.storage, self.client = storage, client
        self.inquiry = Inquiry(storage, Inquirer(calling_ae_title=NODE_AET, limits=PATIENT, again_seconds=0.2, alone_seconds=0.0))
        self.seen = Seen(self.storage)

    def look(self, seconds: float) -> list[Revision]:
        """Close what is complete so many seconds from now."""
        now = datetime.now(UTC)
        later, up = now + timedelta(seconds=seconds), now - timedelta(days=1)
        return close_complete_studies(self.storage, self.client, later, up_since=up, seen=self.seen, inquiry=self.inquiry)

    def answered(self, absent: int) -> bool:
        """Whether Orthanc has said of the study as it is now that so many of its images aren't here."""
        study = self.storage.index.study(STUDY)
        assert study is not None
        return [(peer.state, peer.absent) for peer in self.inquiry.evidence(study, [ORTHANC_AET])] == [("answered", absent)]

    def released(self) -> bool:
        study = self.storage.index.study(STUDY)
        return study is not None and study.released_at is not None and study.released_at >= study.last_received_at


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    prepare_engine(url)
    storage, client = open_storage(url, tmp_path), EngineClient(url)
    site = Site(storage, client)
    yield site
    site.inquiry.stop()
    client.close()
    storage.database.close()


def write(folder: Path, name: str, **attributes: object) -> Path:
    dataset = a_dataset(StudyInstanceUID=STUDY, PatientID="P77", **attributes)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(folder / name, enforce_file_format=True)
    return folder / name


def forward(pacs: Orthanc, files: list[Path], images: list[Dataset]) -> None:
    """Let Orthanc send these instances to the node."""
    found = [pacs.post("/tools/find", {"Level": "Instance", "Query": {"SOPInstanceUID": image.SOPInstanceUID}})[0] for image in images]
    assert pacs.post("/modalities/node/store", {"Resources": found, "Synchronous": True})["FailedInstancesCount"] == 0, files


def test_a_study_waits_for_what_the_pacs_holds_and_closes_early_once_it_is_here(site: Site, tmp_path: Path) -> None:
    receiver = Receiver(Settings(node=NodeSection(data=tmp_path, ae_title=NODE_AET), listener=ListenerSection(port=0)), site.storage)
    receiver.start()
    try:
        with orthanc(tmp_path / "orthanc", node_port=receiver.port, settings={"LuaScripts": []}) as pacs:
            run(site, pacs, tmp_path)
    finally:
        receiver.stop(drain_seconds=0)


def run(site: Site, pacs: Orthanc, folder: Path) -> None:
    registry = site.storage.registry
    registry.add_peer(loopback_peer(ORTHANC_AET, pacs.dicom_port))
    registry.add_route(
        Route(name="r", from_ae_title=ORTHANC_AET, called_ae_title="*", package="none", version=None, to_ae_titles=(ORTHANC_AET,),
              priority=None, quiet_seconds=30.0, report_refusals=False, early=True, longest_wait_seconds=600.0,
              completeness_peer=ORTHANC_AET)
    )  # fmt: skip
    files = [write(folder, f"{n}.dcm", SeriesInstanceUID=f"{STUDY}.1", InstanceNumber=n) for n in range(1, 9)]
    other = [write(folder, f"{n}.dcm", SeriesInstanceUID=f"{STUDY}.2", SeriesNumber=3, InstanceNumber=n) for n in range(11, 14)]
    storescu(pacs.peer, *files, *other)
    images = [read(file) for file in files + other]

    asking = {"calling_ae_title": NODE_AET, "limits": PATIENT}
    content = study_content(pacs.peer, STUDY, **asking)
    assert content is not None
    assert content.instances == {f"{STUDY}.1": 8, f"{STUDY}.2": 3}
    assert set(content.modalities.values()) == {"CT"}
    named = {str(image.SOPInstanceUID): str(image.SOPClassUID) for image in images[8:]}
    assert series_instances(pacs.peer, STUDY, f"{STUDY}.2", **asking) == named
    assert study_content(pacs.peer, f"{STUDY}.0", **asking) is None

    forward(pacs, files, images[:6])
    wait_until(site.released, what="the end of Orthanc's association")
    wait_until(lambda: site.answered(5), what="Orthanc's answer")
    assert site.look(5) == [] == site.look(100), "five images are at the PACS and not here"
    forward(pacs, files, images[6:])
    wait_until(site.released, what="the end of Orthanc's second association")
    wait_until(lambda: site.answered(0), what="Orthanc's second answer")
    (revision,) = site.look(5)
    assert (revision.number, revision.incomplete) == (1, ())
    assert revision.evidence == f"association released and {ORTHANC_AET} holds no image that isn't here"
    assert revision.facts["peers"] == [{"peer": ORTHANC_AET, "state": "answered", "instances": 11, "absent": 0, "reason": ""}]

    late = write(folder, "late.dcm", SeriesInstanceUID=f"{STUDY}.1", InstanceNumber=9)
    lost = write(folder, "lost.dcm", SeriesInstanceUID=f"{STUDY}.1", InstanceNumber=10)
    storescu(pacs.peer, late, lost)
    forward(pacs, files, [read(late)])
    wait_until(site.released, what="the end of Orthanc's third association")
    wait_until(lambda: site.answered(1), what="Orthanc's third answer")
    assert site.look(629) == []
    (revision,) = site.look(640)
    assert (revision.number, revision.incomplete) == (2, (f"{ORTHANC_AET} holds 1 image(s) that aren't here",))


def read(file: Path) -> Dataset:
    from pydicom import dcmread

    return dcmread(file)
