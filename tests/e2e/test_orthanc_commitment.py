"""Storage commitment with a PACS that nobody here wrote: Orthanc commits to what it was sent, and asks us to commit to what it sent."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from dimse_cases import CT, EXPLICIT, a_dataset, encoded, received

from dicomnode.config import load_settings
from dicomnode.dimse.scp import part10_prefix
from dicomnode.engine import EngineClient
from pacs import LOOPBACK, ORTHANC_AET, SCANNER_AET, Node, Orthanc, free_port, storescu, wait_until
from storage import Storage, open_storage
from storage.records import Result

KEY = "deliver/1.2.3.4/1/stub/1/ORTHANC"
PATIENCE = 240.0

pytestmark = pytest.mark.system


@pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.long)], indirect=True)
def test_orthanc_commits_to_what_it_was_sent_and_hears_that_we_hold_what_it_sent(node: Node, orthanc: Orthanc, tmp_path: Path) -> None:
    node.cli("peer", "list")  # makes the database
    node.cli("peer", "add", SCANNER_AET, LOOPBACK, free_port(), "--sends")
    node.cli("peer", "add", ORTHANC_AET, LOOPBACK, orthanc.dicom_port, "--sends", "--receives", "--commits")
    assert "accepts storage commitment" in node.cli("peer", "echo", ORTHANC_AET)
    node.start()
    image = tmp_path / "image.dcm"
    dataset = a_dataset(CT)
    uid, data = str(dataset.SOPInstanceUID), encoded(dataset)
    image.write_bytes(part10_prefix(received(data, uid=uid)) + data)
    storescu(orthanc.peer, image)
    (instance,) = orthanc.get("/instances")
    orthanc.post("/modalities/node/store", {"Resources": [instance], "Synchronous": True})
    settings = load_settings(node.configuration)
    storage, client = open_storage(settings.database_url, settings.data_folder), EngineClient(settings.database_url)
    try:
        assert storage.index.find(uid) is not None
        asks_us(node, orthanc, instance)
        is_asked(node, orthanc, storage, client)
    finally:
        client.close()
        storage.database.close()
    node.stop()


def asks_us(node: Node, orthanc: Orthanc, instance: str) -> None:
    """Orthanc as SCU: it is told that we hold one instance, and that we don't hold another one."""
    references = [{"SOPClassUID": CT, "SOPInstanceUID": "1.2.3.4.5.6"}]
    transaction = orthanc.post(
        "/modalities/node/storage-commitment", {"Resources": [instance], "DicomInstances": references, "Timeout": 60}
    )
    path = transaction["Path"]
    wait_until(lambda: orthanc.get(path)["Status"] != "Pending", seconds=PATIENCE, what="our report", log=node.log, every=0.5)
    answer = orthanc.get(path)
    assert answer["Status"] == "Failure"
    assert [found["SOPInstanceUID"] for found in answer["Failures"]] == ["1.2.3.4.5.6"]
    assert 0x0112 in answer["Failures"][0].values(), answer
    assert len(answer["Success"]) == 1
    assert [(row["role"], row["state"], row["not_committed"]) for row in node.listing("commitment", "list")] == [("SCP", "reported", 1)]


def is_asked(node: Node, orthanc: Orthanc, storage: Storage, client: EngineClient) -> None:
    """Orthanc as SCP: it reports on an association of its own that it holds a result which the node has sent to it."""
    dataset = a_dataset(CT, InstanceNumber=2)
    uid, data = str(dataset.SOPInstanceUID), encoded(dataset)
    (study,) = storage.index.studies()
    result = Result(
        sop_instance_uid=uid, sop_class_uid=CT, transfer_syntax_uid=EXPLICIT, modality="CT", study_instance_uid=study.study_instance_uid,
        job_key=KEY, stored=storage.objects.put(part10_prefix(received(data, uid=uid)), data), created_at=datetime.now(UTC),
    )  # fmt: skip
    with storage.database.writing() as transaction:
        storage.index.close_revision(
            transaction, study.study_instance_uid, seen_last_received_at=study.last_received_at, evidence="", outcome="jobs"
        )
        storage.jobs.create(
            transaction, key=KEY, kind="deliver", study_instance_uid=study.study_instance_uid, revision=1, package="stub", version="1",
            digest="d" * 64, run=1, peer=ORTHANC_AET, priority="routine",
        )  # fmt: skip
        storage.jobs.add_results(transaction, [result])
        storage.jobs.add_deliveries(transaction, KEY, ORTHANC_AET, [uid])
        client.enqueue(transaction, KEY, "deliver", "routine")
    wait_until(lambda: job(storage) == "done", seconds=PATIENCE, what="Orthanc to commit", log=node.log, every=0.5)
    (delivery,) = storage.jobs.deliveries(job_key=KEY)
    assert (delivery.state, delivery.attempts) == ("committed", 1)
    assert len(orthanc.get("/instances")) == 2
    assert "committed" in node.cli("study", "show", study.study_instance_uid)


def job(storage: Storage) -> str:
    found = storage.jobs.job(KEY)
    assert found is not None
    assert found.state != "failed", found.reason
    return found.state
