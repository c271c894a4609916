"""Calling AE title x network x certificate x called AE title x port: exactly the allowed cells get in, and nothing else is stored."""

from __future__ import annotations

import itertools
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from dimse_cases import a_dataset, encoded
from raw_dicom import ASSOCIATE_AC, ASSOCIATE_RJ, CONTEXTS, Connection, Ended, Image, Pdu, association_request, item, store_request

from certificates import Authority, Identity, self_signed
from dicomnode.admission import hash_passcode
from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.receiver import Receiver
from pacs import wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer

INSIDE, OUTSIDE = "127.0.0.2", "127.0.0.3"
REJECTED = bytes((0, 1, 1, 1))  # PS3.8 9.3.4: permanent, by the service user, no reason given
PASSCODE_HASH = hash_passcode("geh\u00e9im")
CERTIFICATES = ("plain", "pinned", "other of the site", "none", "self-signed", "of another CA of the same name")
HANDSHAKES = {"pinned", "other of the site"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of calling the node."""

    calling: str
    address: str
    shows: str  # one of CERTIFICATES; "plain": the port without TLS
    called: str

    @property
    def allowed(self) -> bool:
        """What the registry of these tests says."""
        way = {"CT-PLAIN": {"plain"}, "CT-TLS": HANDSHAKES, "CT-PINNED": {"pinned"}}.get(self.calling, set())
        return self.shows in way and self.address == INSIDE and self.called in {"DICOMNODE", "CHEST"}


@dataclass(frozen=True, kw_only=True)
class Site:
    settings: Settings
    identities: dict[str, Identity | None]
    ca: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    authority, other = Authority(folder / "ca"), Authority(folder / "other", "site")
    return Site(
        settings=Settings(
            node=NodeSection(data=folder, more_ae_titles=("CHEST",)),
            listener=ListenerSection(port=0),
            tls=authority.settings(authority.issue("node")),
        ),
        identities={
            "pinned": authority.issue("pinned"),
            "other of the site": authority.issue("another"),
            "none": None,
            "self-signed": self_signed(folder, "self"),
            "of another CA of the same name": other.issue("pinned"),
        },
        ca=authority.certificate,
    )


@pytest.fixture(scope="module")
def storage(site: Site) -> Iterator[Storage]:
    folder = site.settings.data_folder
    url = f"sqlite:///{folder / 'node.sqlite'}"
    prepare_storage(url, folder)
    storage = open_storage(url, folder)
    pinned = site.identities["pinned"]
    assert pinned is not None
    for ae_title, tls, client_cert in (("CT-PLAIN", False, None), ("CT-TLS", True, None), ("CT-PINNED", True, pinned.sha256)):
        storage.registry.add_peer(a_peer(ae_title, tls=tls, client_cert=client_cert))
    storage.registry.add_peer(a_peer("PACS", sends=False, queries=False))
    yield storage
    storage.database.close()


def a_peer(ae_title: str, **values: object) -> Peer:
    known: dict[str, object] = {"host": "127.0.0.9", "port": 104, "sends": True, "receives": False, "tls": False, "client_cert": None}
    return Peer(**{"ae_title": ae_title, "networks": (f"{INSIDE}/32",), **known, **values})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def receiver(site: Site, storage: Storage) -> Iterator[Receiver]:
    receiver = Receiver(site.settings, storage)
    receiver.start()
    yield receiver
    receiver.stop(drain_seconds=1)


@contextmanager
def connection(receiver: Receiver, site: Site, address: str, shows: str) -> Iterator[Connection]:
    """A connection from an address, over TLS unless it is to be plain. Raises Ended if the node refuses it in the handshake."""
    if shows == "plain":
        with Connection(receiver.port, source=address) as plain:
            yield plain
        return
    assert receiver.tls_port
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(site.ca)
    identity = site.identities[shows]
    if identity is not None:
        context.load_cert_chain(identity.certificate, identity.key)
    with Connection(receiver.tls_port, source=address) as opened:
        try:
            opened.socket = context.wrap_socket(opened.socket, server_hostname="127.0.0.1")
            yield opened
        except (ssl.SSLError, ConnectionError) as error:  # by TLS 1.3 the client learns of it at its first read
            raise Ended from error


def call(receiver: Receiver, site: Site, cell: Cell, image: Image, *more_items: bytes) -> Pdu | None:
    """Ask for an association and send an image, let in or not; return the answer to the request, None if TLS was refused."""
    request = association_request(CONTEXTS, calling=cell.calling, called=cell.called, more_items=more_items)
    try:
        with connection(receiver, site, cell.address, cell.shows) as caller:
            answer = caller.associate(request)
            if answer.kind == ASSOCIATE_AC:
                assert caller.store(image).status == 0x0000
                caller.release()
            else:
                caller.send(store_request(image))
                close(caller)
    except Ended:
        return None if "answer" not in locals() else answer
    return answer


def close(caller: Connection) -> None:
    """Send no more, and wait until the node has taken what came and closes too."""
    socket.socket.shutdown(caller.socket, socket.SHUT_WR)
    with suppress(ConnectionResetError):
        while socket.socket.recv(caller.socket, 65536):  # below TLS
            pass


def an_image() -> Image:
    dataset = a_dataset()
    return Image(sop_instance_uid=str(dataset.SOPInstanceUID), dataset=encoded(dataset))


def known(storage: Storage) -> set[str]:
    return {instance.sop_instance_uid for instance in storage.index.instances("1.2.3.4")}


def objects(site: Site) -> set[Path]:
    return {file for file in (site.settings.data_folder / "objects").rglob("*") if file.is_file() and file.suffix != ".lock"}


def cells() -> list[Cell]:
    titles = ("CT-PLAIN", "CT-TLS", "CT-PINNED", "PACS", "NOBODY")
    ways = itertools.product(titles, (INSIDE, OUTSIDE), CERTIFICATES, ("DICOMNODE", "CHEST", "OTHER"))
    return [Cell(calling=calling, address=address, shows=shows, called=called) for calling, address, shows, called in ways]


def test_exactly_the_allowed_cells_get_in_and_nothing_else_is_stored(receiver: Receiver, storage: Storage, site: Site) -> None:
    acknowledged, refused_by_tls, wrong = set(), 0, []
    files_before = objects(site)
    others = known(storage)
    for cell in cells():
        image = an_image()
        answer = call(receiver, site, cell, image)
        if answer is None:
            refused_by_tls += 1
        elif answer.kind == ASSOCIATE_RJ:
            assert answer.body == REJECTED, "the answer is the same, whatever was wrong"
        if (answer is not None and answer.kind == ASSOCIATE_AC) is not cell.allowed:
            wrong.append(cell)
        if (answer is None) is not (cell.shows not in {"plain", *HANDSHAKES}):
            wrong.append(cell)
        if cell.allowed:
            acknowledged.add(image.sop_instance_uid)
    assert wrong == []
    assert len(acknowledged) == 2 * (1 + 2 + 1)
    assert known(storage) - others == acknowledged
    assert len(objects(site) - files_before) == len(acknowledged)
    assert storage.index.quarantined() == []
    expected = {
        "connection refused: TLS handshake": refused_by_tls,
        "association rejected: calling AE title": 2 * 2 * 3 * 3,
        "association rejected: called AE title": 3 * 2 * 3,
        "association rejected: network": 3 * 3 * 2,
        "association rejected: certificate": 2 * (2 + 1 + 2),
    }

    def counted() -> dict[str, int]:
        return {name: count for name, count in storage.counters.all().items() if name != "association rejected: user identity"}

    wait_until(lambda: counted() == expected, what=f"the counters to say {expected}")


@pytest.mark.parametrize(
    ("title", "identity", "allowed"),
    [
        ("CT-USER", (1, b"ct", b""), True),
        ("CT-USER", (2, b"ct", b"any"), False),
        ("CT-USER", (1, b"mr", b""), False),
        ("CT-USER", None, False),
        ("CT-SECRET", (2, b"ct", "geh\u00e9im".encode()), True),
        ("CT-SECRET", (2, b"ct", b"geheim"), False),
        ("CT-SECRET", (2, b"ct", b""), False),
        ("CT-SECRET", (2, b"mr", "geh\u00e9im".encode()), False),
        ("CT-SECRET", (1, b"ct", b""), False),
        ("CT-SECRET", (3, b"ct", b""), False),  # Kerberos
        ("CT-SECRET", None, False),
        ("CT-PLAIN", (2, b"ct", b"any"), True),
    ],
)
def test_a_user_identity_is_asked_of_the_peers_that_have_one(
    receiver: Receiver, storage: Storage, site: Site, title: str, identity: tuple[int, bytes, bytes] | None, allowed: bool
) -> None:
    storage.registry.add_peer(a_peer("CT-USER", user="ct"))
    storage.registry.add_peer(a_peer("CT-SECRET", user="ct", passcode_hash=PASSCODE_HASH))
    image = an_image()
    items = []
    if identity is not None:  # PS3.7 D.3.3.7.1; no positive response is asked for
        kind, name, secret = identity
        items = [item(0x58, struct.pack(">BBH", kind, 0, len(name)) + name + struct.pack(">H", len(secret)) + secret)]
    answer = call(receiver, site, Cell(calling=title, address=INSIDE, shows="plain", called="DICOMNODE"), image, *items)
    assert answer is not None
    assert (answer.kind == ASSOCIATE_AC) is allowed
    if not allowed:
        assert answer.body == REJECTED
    assert (storage.index.find(image.sop_instance_uid) is not None) is allowed
