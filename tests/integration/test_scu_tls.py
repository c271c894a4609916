"""Sending over TLS: what arrives, whom the node doesn't talk to, and what it says of each failure."""

from __future__ import annotations

import gc
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dimse_cases import CT, EXPLICIT, IMPLICIT, a_dataset, encoded, keep_connection, received
from pynetdicom import AE, evt
from pynetdicom.transport import ThreadedAssociationServer

from certificates import Authority, Identity, self_signed
from dicomnode.config import Settings, TlsSection
from dicomnode.delivery import Sender
from dicomnode.dimse.scp import part10_prefix
from dicomnode.dimse.scu import Outgoing, echo, send
from dicomnode.dimse.tls import server_context
from dicomnode.errors import PeerRefused, PeerUnavailable
from storage.records import Peer

pytestmark = pytest.mark.usefixtures("calm_network_library")

VERIFICATION = "1.2.840.10008.1.1"


@dataclass(frozen=True, kw_only=True)
class Site:
    authority: Authority
    node: Identity
    pacs: Identity
    other: Authority


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    authority = Authority(folder / "ca")
    return Site(authority=authority, node=authority.issue("node"), pacs=authority.issue("pacs"), other=Authority(folder / "other"))


@contextmanager
def pacs(context: ssl.SSLContext | None, got: list[bytes] | None = None) -> Iterator[Peer]:
    """A simulated PACS over TLS (over plain DICOM without a context)."""

    def store(event: Any) -> int:
        if got is not None:
            got.append(event.request.DataSet.getvalue())
        return 0x0000

    class Server(ThreadedAssociationServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A handshake that failed is the client's to tell."""

    entity = AE("PACS")
    entity.acse_timeout = entity.network_timeout = 5
    for uid, syntax in ((VERIFICATION, IMPLICIT), (CT, EXPLICIT)):
        entity.add_supported_context(uid, syntax)
    handlers = [(evt.EVT_CONN_OPEN, keep_connection), (evt.EVT_C_STORE, store)]
    server: Any = entity.make_server(("127.0.0.1", 0), evt_handlers=handlers, server_class=Server, ssl_context=context)
    entity._servers.append(server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield Peer(ae_title="PACS", host="127.0.0.1", port=server.server_address[1], sends=False, receives=True, tls=True, client_cert=None)
    finally:
        server.shutdown()
        entity.shutdown()


def of_the_pacs(site: Site) -> ssl.SSLContext:
    return server_context(site.authority.settings(site.pacs))


def of_the_node(site: Site) -> TlsSection:
    return site.authority.settings(site.node)


def stored(folder: Path, **attributes: Any) -> tuple[Outgoing, bytes]:
    dataset = a_dataset(CT, **attributes)
    data = encoded(dataset, EXPLICIT)
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    path.write_bytes(part10_prefix(received(data, uid=dataset.SOPInstanceUID)) + data)
    return Outgoing(sop_class_uid=CT, sop_instance_uid=dataset.SOPInstanceUID, transfer_syntax_uid=EXPLICIT, path=path), data


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_objects_arrive_byte_for_byte(site: Site, tmp_path: Path, version: ssl.TLSVersion) -> None:
    context, got = of_the_pacs(site), []
    context.minimum_version = context.maximum_version = version
    files = [stored(tmp_path), stored(tmp_path, Rows=1000, Columns=700, PixelData=bytes(range(250)) * 5600)]
    with pacs(context, got) as peer:
        outcomes = send(peer, [item for item, _ in files], calling_ae_title="DICOMNODE", tls=of_the_node(site))
        echo(peer, calling_ae_title="DICOMNODE", tls=of_the_node(site))
    assert [(outcome.state, outcome.error) for outcome in outcomes] == [("sent", None)] * 2
    assert got == [data for _, data in files]


def test_the_peer_is_known_by_its_registered_certificate_whatever_its_host_is_called(site: Site, tmp_path: Path) -> None:
    away = site.authority.issue("away", names="DNS:pacs.example")
    with pacs(server_context(site.authority.settings(away))) as peer:
        with pytest.raises(PeerUnavailable, match=r"certificate is not valid for '127\.0\.0\.1'"):
            echo(peer, calling_ae_title="DICOMNODE", tls=of_the_node(site))
        echo(replace(peer, client_cert=away.sha256), calling_ae_title="DICOMNODE", tls=of_the_node(site))
        with pytest.raises(PeerUnavailable, match="the peer's certificate is not the registered one"):
            echo(replace(peer, client_cert=site.pacs.sha256), calling_ae_title="DICOMNODE", tls=of_the_node(site))


def test_whom_the_site_does_not_vouch_for_gets_nothing(site: Site, tmp_path: Path) -> None:
    item, _ = stored(tmp_path)
    stranger, own = site.other.issue("pacs"), self_signed(tmp_path, "self")
    for identity, words in ((stranger, "certificate"), (own, "self-signed certificate")):
        context, got = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
        context.load_cert_chain(identity.certificate, identity.key)
        for pin in (None, identity.sha256):  # a pin is no way around the CA
            with pacs(context, got) as peer:
                (outcome,) = send(replace(peer, client_cert=pin), [item], calling_ae_title="DICOMNODE", tls=of_the_node(site))
            assert outcome.state == "transient"
            assert outcome.error is not None
            assert outcome.error.startswith("no TLS connection: ")
            assert words in outcome.error
            assert got == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_a_peer_that_refuses_our_certificate_is_said_to_do_so(site: Site, version: ssl.TLSVersion) -> None:
    context = server_context(site.other.settings(site.other.issue("pacs")))
    context.minimum_version = context.maximum_version = version
    trusting = TlsSection(certificate=site.node.certificate, key=site.node.key, ca=site.other.certificate)
    with pacs(context) as peer, pytest.raises(PeerUnavailable, match=r"(?i)TLS connection: .*unknown.ca"):
        echo(peer, calling_ae_title="DICOMNODE", tls=trusting)


def test_a_tls_peer_that_speaks_plain_dicom_or_an_old_version_gets_nothing(site: Site, tmp_path: Path) -> None:
    item, _ = stored(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        heard: list[bytes] = []

        def plain() -> None:
            connection, _ = listening.accept()
            with connection:
                heard.append(connection.recv(4096))
                connection.sendall(b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x00")

        thread = threading.Thread(target=plain)
        thread.start()
        peer = Peer(
            ae_title="PACS", host="127.0.0.1", port=listening.getsockname()[1], sends=False, receives=True, tls=True, client_cert=None
        )
        (outcome,) = send(peer, [item], calling_ae_title="DICOMNODE", tls=of_the_node(site))
        thread.join()
    assert outcome.state == "transient"
    assert "no TLS connection" in str(outcome.error)
    assert b"DICOMNODE" not in heard[0]


def test_a_tls_peer_that_is_down_cannot_be_reached(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    peer = Peer(ae_title="PACS", host="127.0.0.1", port=port, sends=False, receives=True, tls=True, client_cert=None)
    with pytest.raises(PeerUnavailable, match="cannot be reached"):
        echo(peer, calling_ae_title="DICOMNODE", tls=of_the_node(site))
    gc.collect()  # a socket left open would be a warning, and so an error


def test_a_silent_tls_peer_is_waited_for_no_longer_than_said(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = Peer(
            ae_title="PACS", host="127.0.0.1", port=listening.getsockname()[1], sends=False, receives=True, tls=True, client_cert=None
        )
        with pytest.raises(PeerUnavailable, match="timed out"):
            echo(peer, calling_ae_title="DICOMNODE", tls=of_the_node(site), timeout_seconds=0.3)


def test_a_peer_that_is_silent_after_the_handshake_is_waited_for_no_longer_than_said(site: Site) -> None:
    """OpenSSL sends session tickets of its own accord, so there is something to read that is no answer."""
    context = of_the_pacs(site)
    context.num_tickets = 2
    end = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def silent() -> None:
            connection, _ = listening.accept()
            with context.wrap_socket(connection, server_side=True):
                end.wait(120)

        thread = threading.Thread(target=silent)
        thread.start()
        peer = Peer(
            ae_title="PACS", host="127.0.0.1", port=listening.getsockname()[1], sends=False, receives=True, tls=True, client_cert=None
        )
        try:
            with pytest.raises(PeerUnavailable):
                echo(peer, calling_ae_title="DICOMNODE", tls=of_the_node(site), timeout_seconds=2)
            assert thread.is_alive(), "the peer gave up first"
        finally:
            end.set()
            thread.join()


def test_without_a_certificate_of_its_own_the_node_calls_no_tls_peer(site: Site, tmp_path: Path) -> None:
    item, _ = stored(tmp_path)
    got: list[bytes] = []
    with pacs(None, got) as peer:
        for tls in (None, TlsSection()):
            (outcome,) = send(peer, [item], calling_ae_title="DICOMNODE", tls=tls)
            assert (outcome.state, outcome.status) == ("permanent", None)
            assert "this node has no certificate" in str(outcome.error)
            with pytest.raises(PeerRefused, match="this node has no certificate"):
                echo(peer, calling_ae_title="DICOMNODE", tls=tls)
    assert got == []


def test_files_that_cannot_be_used_now_leave_the_objects_waiting(site: Site, tmp_path: Path) -> None:
    item, _ = stored(tmp_path)
    settings = of_the_node(site).model_copy(update={"key": tmp_path / "absent.key"})
    with pacs(of_the_pacs(site)) as peer:
        (outcome,) = send(peer, [item], calling_ae_title="DICOMNODE", tls=settings)
    assert outcome.state == "transient"
    assert "absent.key cannot be read" in str(outcome.error)


def test_results_are_delivered_over_tls(site: Site, tmp_path: Path) -> None:
    item, data = stored(tmp_path)
    got: list[bytes] = []
    with pacs(of_the_pacs(site), got) as peer:
        jobs = OneDelivery(item)
        storage: Any = SimpleNamespace(
            jobs=jobs,
            registry=SimpleNamespace(peer=lambda _: peer),
            objects=SimpleNamespace(path=lambda _: item.path),
            backlogs=SimpleNamespace(backlog=lambda _: None),
        )
        assert Sender(Settings(tls=of_the_node(site)), storage, storage).deliver("deliver", 0) is None
    assert (jobs.delivered, jobs.ended) == (["sent"], "done")
    assert got == [data]


class OneDelivery:
    """The jobs of a storage that holds one result for one peer."""

    def __init__(self, item: Outgoing) -> None:
        self.delivered: list[str] = []
        self.ended = ""
        self._item = item

    def start(self, key: str) -> Any:
        return SimpleNamespace(key=key, state="running", attempts=1, peer="PACS", study_instance_uid="1.2.3.4")

    def deliveries(self, **_: Any) -> list[Any]:
        return [SimpleNamespace(sop_instance_uid=self._item.sop_instance_uid, state="waiting", refusals=0, ways=())]

    def results(self, **_: Any) -> list[Any]:
        item = self._item
        uids = {"sop_class_uid": item.sop_class_uid, "sop_instance_uid": item.sop_instance_uid, "transfer_syntax_uid": EXPLICIT}
        return [SimpleNamespace(**uids, stored=SimpleNamespace(object_id="0"))]

    def is_current(self, started: Any) -> bool:
        return started.key == "deliver"

    def record_delivery(self, uid: str, peer: str, *, state: str, **_: Any) -> None:
        self.delivered.append(state)

    def finish(self, key: str, state: str, **_: Any) -> None:
        self.ended = state
