"""Results on their way to two PACS that nobody here wrote: Orthanc over TLS of both sides, which knows no new SOP classes, and dcmqrscp."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from pydicom import dcmread
from sqlalchemy import update

from certificates import Authority
from dicomnode.commitment import StorageCommitment
from dicomnode.completion import retry
from dicomnode.config import CommitmentSection, ListenerSection, NodeSection, Settings
from dicomnode.delivery import Sender
from dicomnode.dimse.scu import echo
from dicomnode.errors import PeerUnavailable
from dicomnode.phantoms.studies import write_check_study
from dicomnode.receiver import Receiver
from pacs import DCMQRSCP_AET, LOOPBACK, NODE_AET, ORTHANC_AET, Orthanc, dcmqrscp, free_port, orthanc, tail, wait_until
from storage.records import Delivery, Job, Peer
from storage.schema import DELIVERY

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from test_display_profiles import CAPTURE, LABEL_MAP, REPORT, SEGMENTATION, Site

pytestmark = pytest.mark.system

STRICT_AET = "STRICT"  # Orthanc, too: for results of which it is told no simpler form
GIVEN = ("seg-labelmap", "sr", "key-image")


class Node(Site):
    """A node whose analysis is on its way to three peers, with its receiver, and its sender in the hands of the test."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        studies = folder / "study"
        studies.mkdir()
        write_check_study(studies, "two")
        super().__init__(folder, studies, **dict.fromkeys((ORTHANC_AET, STRICT_AET, DCMQRSCP_AET), GIVEN))
        assert self.analyse(self.files) == "done"
        self.settings = Settings(
            node=NodeSection(data=folder),
            listener=ListenerSection(port=0),
            tls=authority.settings(authority.issue("node", rsa=True)),
            commitment=CommitmentSection(report_seconds=0),
        )
        self.sender = Sender(self.settings, self.storage, self.client)
        self.receiver = Receiver(self.settings, self.storage, commitment=StorageCommitment(self.settings, self.storage, self.client))
        self.receiver.start()
        self.classes = {result.sop_instance_uid: result.sop_class_uid for result in self.storage.jobs.results()}

    def is_at(self, name: str, where: Peer, **changed: bool) -> None:
        """Edit a peer while the node runs."""
        known = self.storage.registry.peer(name)
        assert known is not None
        self.storage.registry.add_peer(replace(known, port=where.port, sends=True, **changed))

    def job(self, name: str) -> Job:
        (job,) = (job for job in self.storage.jobs.jobs(kind="deliver") if job.peer == name)
        return job

    def deliver(self, name: str) -> None:
        self.sender.deliver(self.job(name).key, 0)

    def rows(self, name: str) -> list[Delivery]:
        return self.storage.jobs.deliveries(job_key=self.job(name).key)

    def class_of(self, row: Delivery) -> str:
        """The SOP class of what the peer has or should have."""
        return row.sent_class or self.classes[row.at_peer]

    def states(self, name: str) -> dict[str, str]:
        """By SOP class: all that are alike end alike."""
        states = {(self.class_of(row), row.state) for row in self.rows(name)}
        assert len(dict(states)) == len(states)
        return dict(states)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def node(tmp_path: Path, authority: Authority) -> Iterator[Node]:
    (tmp_path / "node").mkdir()
    node = Node(tmp_path / "node", authority)
    yield node
    node.receiver.stop(drain_seconds=1)
    node.client.close()
    node.storage.database.close()


@contextmanager
def secure_orthanc(folder: Path, authority: Authority, node: Node) -> Iterator[Orthanc]:
    """Orthanc that shows a certificate, asks for one, and takes only the SOP classes that it knows."""
    identity = authority.issue("orthanc", rsa=True)  # DCMTK's profiles have suites for servers with RSA alone
    settings = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(identity.certificate),
        "DicomTlsPrivateKey": str(identity.key),
        "DicomTlsTrustedCertificates": str(authority.certificate),
        "DicomTlsRemoteCertificateRequired": True,
        "DicomCheckCalledAet": False,
        "UnknownSopClassAccepted": False,
        "DicomModalities": {
            "node": {"AET": NODE_AET, "Host": LOOPBACK, "Port": node.receiver.tls_port, "UseDicomTls": True},
            "plain": {"AET": NODE_AET, "Host": LOOPBACK, "Port": node.receiver.port},
        },
        "LuaScripts": [],
    }
    with orthanc(folder, node_port=free_port(), settings=settings) as pacs:
        yield pacs


def test_each_pacs_gets_the_results_in_its_own_way_and_what_one_does_not_take_is_sent_again_later(
    node: Node, authority: Authority, tmp_path: Path
) -> None:
    with dcmqrscp(tmp_path / "dcmqrscp") as archive:  # the second PACS has everything before the first one is there
        node.is_at(DCMQRSCP_AET, archive)
        node.deliver(DCMQRSCP_AET)
        assert node.states(DCMQRSCP_AET) == {SEGMENTATION: "sent", REPORT: "sent", CAPTURE: "sent"}
        assert (node.job(DCMQRSCP_AET).state, node.job(ORTHANC_AET).state) == ("done", "queued")
        kept = [dcmread(file) for file in (tmp_path / "dcmqrscp" / DCMQRSCP_AET).iterdir() if file.name != "index.dat"]
        assert {dataset.SOPInstanceUID for dataset in kept} == {row.at_peer for row in node.rows(DCMQRSCP_AET)}
    with secure_orthanc(tmp_path / "orthanc", authority, node) as pacs:
        node.is_at(ORTHANC_AET, pacs.peer, tls=True, commits=True)
        node.deliver(ORTHANC_AET)
        wait_until(lambda: node.job(ORTHANC_AET).state != "queued", what="Orthanc's report over TLS", log=pacs.log)
        assert node.job(ORTHANC_AET).state == "done", (node.job(ORTHANC_AET), tail(pacs.log))
        assert node.states(ORTHANC_AET) == {SEGMENTATION: "committed", REPORT: "committed", CAPTURE: "committed"}
        (segmentation,) = (row for row in node.rows(ORTHANC_AET) if node.class_of(row) == SEGMENTATION)
        assert "because the peer does not accept" in str(segmentation.note)
        assert held(pacs) == {row.at_peer for row in node.rows(ORTHANC_AET)}
        sends_back(node, authority, pacs)
        without_simpler_forms(node, pacs)
        assert node.states(DCMQRSCP_AET) == {SEGMENTATION: "sent", REPORT: "sent", CAPTURE: "sent"}
    settings = {"UnknownSopClassAccepted": True, "DicomCheckCalledAet": False, "LuaScripts": []}
    with orthanc(tmp_path / "upgraded", node_port=free_port(), settings=settings) as upgraded:
        node.is_at(STRICT_AET, upgraded.peer, tls=False)
        retry(node.storage, node.client, node.job(STRICT_AET))
        node.deliver(STRICT_AET)
        assert node.job(STRICT_AET).state == "done"
        assert held(upgraded) == {
            row.at_peer for row in node.rows(STRICT_AET) if node.class_of(row) == LABEL_MAP
        }  # the others were there, and are not sent again


def held(pacs: Orthanc) -> set[str]:
    """The SOP Instance UIDs that Orthanc has."""
    return {pacs.get(f"/instances/{instance}/simplified-tags")["SOPInstanceUID"] for instance in pacs.get("/instances")}


def sends_back(node: Node, authority: Authority, pacs: Orthanc) -> None:
    """Orthanc sends to the node with its certificate, and gets nothing in without; nor does a stranger reach Orthanc."""
    peer = replace(pacs.peer, tls=True)
    stranger = Authority(authority.certificate.parent / "other", "site").issue("node")
    with pytest.raises(PeerUnavailable, match="TLS connection"):
        echo(peer, calling_ae_title=NODE_AET, tls=authority.settings(stranger))
    instances = pacs.get("/instances")
    for modality, accepted in (("plain", False), ("node", True)):
        body = f'{{"Resources": {instances}, "Synchronous": true}}'.replace("'", '"').encode()
        request = Request(f"http://{LOOPBACK}:{pacs.http_port}/modalities/{modality}/store", data=body)
        if accepted:
            with urlopen(request, timeout=300) as answer:
                assert answer.status == 200
        else:
            with pytest.raises(OSError, match="500"):
                urlopen(request, timeout=300)
        assert all((node.storage.index.find(uid) is not None) is accepted for uid in held(pacs))


def without_simpler_forms(node: Node, pacs: Orthanc) -> None:
    """A label map of which nothing else was made: the others arrive, and the job says which SOP class was not taken."""
    node.is_at(STRICT_AET, pacs.peer, tls=True)
    (label_map,) = (row for row in node.rows(STRICT_AET) if node.class_of(row) == LABEL_MAP)
    with node.storage.database.writing() as transaction:
        this = (DELIVERY.c.sop_instance_uid == label_map.sop_instance_uid) & (DELIVERY.c.peer == STRICT_AET)
        transaction.execute(update(DELIVERY).where(this).values(ways=[]))
    node.deliver(STRICT_AET)
    job = node.job(STRICT_AET)
    assert (job.state, job.reason_code) == ("failed", "delivery-failed")
    assert "does not accept Label Map Segmentation Storage in RLE Lossless" in str(job.reason)
    assert node.states(STRICT_AET) == {LABEL_MAP: "failed", REPORT: "sent", CAPTURE: "sent"}
