"""TLS with programs that nobody here wrote: DCMTK sends to the node and receives from it, or is refused. Orthanc: test_two_pacs.py."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import CT, EXPLICIT, a_dataset, encoded, received, split_part10
from raw_dicom import ASSOCIATE_AC, Connection, Image, association_request

from certificates import Authority, Identity, self_signed
from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.dimse import tls
from dicomnode.dimse.scp import part10_prefix
from dicomnode.dimse.scu import Outgoing, echo, send
from dicomnode.errors import PeerUnavailable
from dicomnode.receiver import Receiver
from pacs import LOOPBACK, NODE_AET, ORTHANC_AET, SCANNER_AET, free_port, program, running, tail, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer

pytestmark = pytest.mark.system


@dataclass(frozen=True, kw_only=True)
class Site:
    """A hospital: its certification authority, and the certificates of all that call each other."""

    folder: Path
    authority: Authority
    node: Identity
    peer: Identity
    scanner: Identity
    stranger: Identity
    self_signed: Identity
    expired: Identity


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    authority, other = Authority(folder / "ca"), Authority(folder / "other", "site")
    return Site(
        folder=folder,
        authority=authority,
        node=authority.issue("node", rsa=True),  # DCMTK's profiles have suites for servers with RSA alone
        peer=authority.issue("peer", rsa=True),
        scanner=authority.issue("scanner"),
        stranger=other.issue("scanner"),
        self_signed=self_signed(folder, "self"),
        expired=authority.issue("expired", days=-1),
    )


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    storage = open_storage(url, tmp_path)
    for ae_title in (SCANNER_AET, ORTHANC_AET):
        storage.registry.add_peer(a_peer(ae_title, 104))
    yield storage
    storage.database.close()


@pytest.fixture
def receiver(tmp_path: Path, storage: Storage, site: Site) -> Iterator[Receiver]:
    """A receiver whose TLS files may be exchanged."""
    settings = Settings(node=NodeSection(data=tmp_path), listener=ListenerSection(port=0), tls=installed(site, tmp_path, site.node))
    receiver = Receiver(settings, storage)
    receiver.start()
    yield receiver
    receiver.stop(drain_seconds=1)


def installed(site: Site, folder: Path, identity: Identity) -> Any:
    shutil.copy(identity.certificate, folder / "node.pem")
    shutil.copy(identity.key, folder / "node.key")
    return site.authority.settings(Identity(certificate=folder / "node.pem", key=folder / "node.key"))


def a_peer(ae_title: str, port: int) -> Peer:
    return Peer(ae_title=ae_title, host=LOOPBACK, port=port, sends=True, receives=True, tls=True, client_cert=None)


def a_file(folder: Path) -> Outgoing:
    dataset = a_dataset(CT)
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    data = encoded(dataset, EXPLICIT)
    path.write_bytes(part10_prefix(received(data, uid=dataset.SOPInstanceUID)) + data)
    return Outgoing(sop_class_uid=CT, sop_instance_uid=dataset.SOPInstanceUID, transfer_syntax_uid=EXPLICIT, path=path)


def dcmtk(command: str, port: int | None, *words: str | Path, shows: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run echoscu or storescu as the scanner does."""
    line = [program(command, "dcmtk"), "-v", "-aet", SCANNER_AET, "-aec", NODE_AET, *shows, LOOPBACK, str(port), *words]
    return subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=300, check=False)


def with_certificate(site: Site, identity: Identity) -> list[str | Path]:
    return ["+tls", identity.key, identity.certificate, "+cf", site.authority.certificate]


@pytest.mark.parametrize("profile", ["+py", "+pz"])
def test_dcmtk_sends_over_tls(receiver: Receiver, storage: Storage, site: Site, tmp_path: Path, profile: str) -> None:
    item = a_file(tmp_path)
    sent = dcmtk("storescu", receiver.tls_port, item.path, shows=[*with_certificate(site, site.scanner), profile])
    assert sent.returncode == 0, sent.stderr
    instance = storage.index.find(item.sop_instance_uid)
    assert instance is not None
    assert split_part10(storage.objects.read(instance.stored.object_id))[1] == split_part10(item.path.read_bytes())[1]


def test_dcmtk_is_refused_without_a_certificate_of_the_site_and_with_what_is_out_of_date(
    receiver: Receiver, storage: Storage, site: Site, tmp_path: Path
) -> None:
    item = a_file(tmp_path)
    trusted = ["+cf", site.authority.certificate]
    for why, port, shows in (
        ("no certificate", receiver.tls_port, ["+tla", *trusted]),
        ("self-signed", receiver.tls_port, with_certificate(site, site.self_signed)),
        ("another CA of the same name", receiver.tls_port, with_certificate(site, site.stranger)),
        ("expired", receiver.tls_port, with_certificate(site, site.expired)),
        ("CBC suites", receiver.tls_port, [*with_certificate(site, site.scanner), "+pa"]),
        ("NULL suites", receiver.tls_port, [*with_certificate(site, site.scanner), "+pn"]),
        ("plain on the TLS port", receiver.tls_port, []),
        ("TLS on the plain port", receiver.port, with_certificate(site, site.scanner)),
        ("a TLS peer on the plain port", receiver.port, []),
    ):
        sent = dcmtk("storescu", port, item.path, shows=[*shows, "-to", "5", "-ta", "5"])
        assert sent.returncode != 0, why
    assert storage.index.studies() == []
    assert dcmtk("echoscu", receiver.tls_port, shows=with_certificate(site, site.scanner)).returncode == 0


@pytest.mark.parametrize("name", ["TLSv1", "TLSv1_1"])
def test_old_versions_are_refused(receiver: Receiver, site: Site, name: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[name]
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.load_verify_locations(site.authority.certificate)
    context.load_cert_chain(site.scanner.certificate, site.scanner.key)
    with (
        socket.create_connection((LOOPBACK, receiver.tls_port or 0), timeout=120) as connection,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"),
    ):
        context.wrap_socket(connection, server_hostname=LOOPBACK)


def test_certificates_are_exchanged_while_associations_go_on(
    receiver: Receiver, storage: Storage, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_POLL_SECONDS", 0.0)
    context = ssl.create_default_context(cafile=str(site.authority.certificate))
    context.load_cert_chain(site.scanner.certificate, site.scanner.key)

    def call() -> Connection:
        connection = Connection(receiver.tls_port or 0)
        connection.socket = context.wrap_socket(connection.socket, server_hostname=LOOPBACK)
        assert connection.associate(association_request(calling=SCANNER_AET)).kind == ASSOCIATE_AC
        return connection

    def shown(connection: Connection) -> str:
        assert isinstance(connection.socket, ssl.SSLSocket)
        return tls.fingerprint(connection.socket.getpeercert(binary_form=True) or b"")

    with call() as old:
        renewed = site.authority.issue("renewed", rsa=True)
        installed(site, tmp_path, renewed)
        with call() as new:
            assert (shown(old), shown(new)) == (site.node.sha256, renewed.sha256)
            for connection in (old, new):
                dataset = a_dataset(CT)
                image = Image(sop_instance_uid=str(dataset.SOPInstanceUID), dataset=encoded(dataset))
                assert connection.store(image).status == 0x0000
                assert storage.index.find(image.sop_instance_uid) is not None
            new.release()
        old.release()
    assert dcmtk("echoscu", receiver.tls_port, shows=with_certificate(site, site.scanner)).returncode == 0


def test_the_node_sends_to_dcmtk_over_tls(site: Site, tmp_path: Path) -> None:
    inbox, log = tmp_path / "inbox", tmp_path / "storescp.log"
    inbox.mkdir()
    peer = a_peer("PACS", free_port())
    files = [a_file(tmp_path), a_file(tmp_path)]
    command = [program("storescp", "dcmtk"), "-v", "-aet", "PACS", "+B", "+xa", "-od", inbox, *with_certificate(site, site.peer), peer.port]
    with running(command, log=log):

        def answers() -> bool:
            try:
                echo(peer, calling_ae_title=NODE_AET, tls=site.authority.settings(site.node))
            except PeerUnavailable:
                return False
            return True

        wait_until(answers, what="storescp to answer over TLS", log=log)
        outcomes = send(peer, files, calling_ae_title=NODE_AET, tls=site.authority.settings(site.node))
        assert [(outcome.state, outcome.error) for outcome in outcomes] == [("sent", None)] * 2, tail(log)
        (refused,) = send(peer, files[:1], calling_ae_title=NODE_AET, tls=site.authority.settings(site.stranger))
        assert refused.state == "transient"
        assert "TLS connection" in str(refused.error)
        assert send(replace(peer, tls=False), files[:1], calling_ae_title=NODE_AET)[0].state == "transient"
    arrived = {split_part10(path.read_bytes())[1] for path in inbox.iterdir()}
    assert arrived == {split_part10(item.path.read_bytes())[1] for item in files}
