"""Instances, by their UIDs, come from PACS that nobody here wrote, by C-MOVE and by C-GET; what they can't send is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import a_dataset, split_part10
from held_objects import receiving_node
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from dicomnode.config import Settings
from dicomnode.dimse.find import FindLimits, series_instances
from dicomnode.dimse.get import GetLimits
from dicomnode.dimse.move import Moved
from dicomnode.dimse.retrieving import Retriever, Wanted
from dicomnode.dimse.scu import Outgoing, send
from dicomnode.reception import Reception
from pacs import NODE_AET, PATIENCE_SECONDS, dcmqrscp, loopback_peer, orthanc, storescu
from storage.records import Peer

STUDY, SERIES = "1.2.826.0.1.88", "1.2.826.0.1.88.1"

pytestmark = pytest.mark.system


@contextmanager
def orthanc_for(folder: Path, node: Peer) -> Iterator[Peer]:
    with orthanc(folder, node_port=node.port, settings={"LuaScripts": []}) as pacs:
        yield pacs.peer


@contextmanager
def dcmqrscp_for(folder: Path, node: Peer) -> Iterator[Peer]:
    with dcmqrscp(folder, known=[node]) as pacs:
        yield pacs


@pytest.mark.parametrize("pacs_for", [orthanc_for, dcmqrscp_for])
def test_instances_come_in_either_way(tmp_path: Path, pacs_for: Callable[[Path, Peer], AbstractContextManager[Peer]]) -> None:
    files = []
    for number in range(1, 9):
        dataset = a_dataset(
            StudyInstanceUID=STUDY, SeriesInstanceUID=SERIES, SOPInstanceUID=f"{SERIES}.{number}", InstanceNumber=number, PatientID="P88"
        )
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
        files.append(tmp_path / f"{number}.dcm")
    (tmp_path / "node").mkdir()
    with (
        receiving_node(tmp_path / "node") as (storage, receiver),
        pacs_for(tmp_path / "pacs", loopback_peer(NODE_AET, receiver.port)) as pacs,
    ):
        storage.registry.add_peer(pacs)
        storescu(pacs, *files)
        reception = Reception(Settings().listener, storage)
        retriever = Retriever(NODE_AET, None, reception.begin, reception.ended)

        def retrieve(way: Any, *numbers: int, patient: str = "P88") -> Moved:
            wanted = Wanted(
                study_instance_uid=STUDY, patient_id=patient, series_instance_uid=SERIES, modality="CT",
                instances=[f"{SERIES}.{number}" for number in numbers],
            )  # fmt: skip
            return retriever.retrieve(replace(pacs, retrieve_by=way), wanted, GetLimits(seconds=PATIENCE_SECONDS), lambda: True)

        def held() -> list[int]:
            return sorted(int(instance.sop_instance_uid.rpartition(".")[2]) for instance in storage.index.instances(STUDY))

        there = series_instances(pacs, STUDY, SERIES, calling_ae_title=NODE_AET, limits=FindLimits(seconds=PATIENCE_SECONDS))
        assert sorted(there) == [f"{SERIES}.{number}" for number in range(1, 9)]
        assert set(there.values()) <= {"1.2.840.10008.5.1.4.1.1.2", ""}  # SOP Class UID is an optional key
        assert retrieve("move", 3, 5, 6) == Moved(completed=3, failed=0, error=None)
        assert held() == [3, 5, 6]
        assert retrieve("get", 1, 8) == Moved(completed=2, failed=0, error=None)
        assert held() == [1, 3, 5, 6, 8]
        refused = retrieve("get", 2, patient="P89")
        assert (refused.completed, refused.error) == (
            0,
            "1 object(s) were refused: the instance is of another patient than the one demanded",
        )
        # Not the whole series: by C-MOVE dcmqrscp sends Implicit VR, and the same image in another encoding is refused as other content.
        assert retrieve("get", 2, 4, 7) == Moved(completed=3, failed=0, error=None)
        assert held() == list(range(1, 9))
        assert {instance.calling_ae_title for instance in storage.index.instances(STUDY)} == {pacs.ae_title}


def test_what_is_stored_compressed_comes_compressed_by_get(tmp_path: Path) -> None:
    dataset = a_dataset(StudyInstanceUID=STUDY, SeriesInstanceUID=SERIES, SOPInstanceUID=f"{SERIES}.1", PatientID="P88")
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    item = Outgoing(
        sop_class_uid=str(dataset.SOPClassUID), sop_instance_uid=f"{SERIES}.1", transfer_syntax_uid=str(RLELossless),
        path=tmp_path / "1.dcm",
    )  # fmt: skip
    (tmp_path / "node").mkdir()
    with (
        receiving_node(tmp_path / "node") as (storage, receiver),
        orthanc_for(tmp_path / "pacs", loopback_peer(NODE_AET, receiver.port)) as pacs,
    ):
        (sent,) = send(pacs, [item], calling_ae_title="SCANNER", timeout_seconds=PATIENCE_SECONDS)
        assert sent.state == "sent"
        reception = Reception(Settings().listener, storage)
        retriever = Retriever(NODE_AET, None, reception.begin, reception.ended)
        wanted = Wanted(study_instance_uid=STUDY, patient_id="P88", series_instance_uid=SERIES, modality="CT")
        by_get = replace(pacs, retrieve_by="get")
        assert retriever.retrieve(by_get, wanted, GetLimits(seconds=PATIENCE_SECONDS), lambda: True).completed == 1
        (instance,) = storage.index.instances(STUDY)
        assert instance.transfer_syntax_uid == RLELossless
        assert instance.stored.sha256 == sha256(split_part10((tmp_path / "1.dcm").read_bytes())[1]).hexdigest()
