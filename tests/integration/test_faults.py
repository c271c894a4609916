"""What the network does to a connection never costs an acknowledged image, never shows half of one, and never lasts."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import raw_dicom as raw
from fault_proxy import TO_NODE, TO_PEER, Fault, FaultProxy
from raw_dicom import Connection, Ended, Image, association
from receiver_process import assert_no_stray_file, assert_stored, images, object_files, scanner, stored_uids

from dicomnode.config import Settings
from dicomnode.receiver import Receiver
from pacs import PATIENCE_SECONDS, wait_until
from storage import Storage, open_storage, prepare_storage

DEADLINE = 0.5  # each deadline of a hasty node; a sender waits three times as long
PIXEL_BYTES = 40_000


@dataclass
class Node:
    """A receiver in this process, and what it keeps."""

    receiver: Receiver
    storage: Storage
    folder: Path

    def assert_whole(self, sent: list[Image], acknowledged: set[str], *, associations: int = 1) -> None:
        """Fail unless what was acknowledged is stored byte for byte, what is stored was sent, and no other file is there."""
        stored = stored_uids(self.storage)
        assert acknowledged <= stored
        assert_stored(self.storage, [image for image in sent if image.sop_instance_uid in stored], only=True)
        assert len(stored - acknowledged) <= associations, "more than the one of each association whose response was on its way"
        assert_no_stray_file(self.storage, self.folder)


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node whose deadlines are the parameter's seconds; without one it is so patient that no busy machine makes it end anything."""
    deadline: float = getattr(request, "param", PATIENCE_SECONDS)
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    storage = open_storage(url, tmp_path)
    storage.registry.add_peer(scanner())
    limits = dict.fromkeys(("association_seconds", "pdu_seconds", "dimse_timeout_seconds", "network_timeout_seconds"), deadline)
    settings = Settings.model_validate({"node": {"data": tmp_path}, "listener": {"port": 0, **limits}, "storage": {"database_url": url}})
    receiver = Receiver(settings, storage)
    receiver.start()
    yield Node(receiver, storage, tmp_path)
    receiver.stop(0)
    storage.database.close()


@pytest.fixture
def proxy(node: Node) -> Iterator[FaultProxy]:
    with FaultProxy(node.receiver.port) as proxy:
        yield proxy


def send(port: int, study: list[Image], seconds: float = PATIENCE_SECONDS) -> tuple[set[str], bool]:
    """Send like a scanner; return what was acknowledged, and whether the association was released in order."""
    acknowledged: set[str] = set()
    try:
        with Connection(port, seconds=seconds) as connection:
            if connection.associate().kind != raw.ASSOCIATE_AC:
                return acknowledged, False
            for image in study:
                if connection.store(image).status == 0:
                    acknowledged.add(image.sop_instance_uid)
            connection.send(raw.RELEASE)
            return acknowledged, connection.read().kind == raw.RELEASE_RP
    except (Ended, OSError, AssertionError, LookupError, ValueError, struct.error):  # the faults change what we get as well
        return acknowledged, False


def send_until_struck(proxy: FaultProxy, fault: Fault, study: list[Image], seconds: float) -> tuple[set[str], bool, int]:
    """Send until the fault has happened; return what was acknowledged, whether the last association was released, and their number.

    On a busy machine an association may miss a hasty node's deadline before it comes to the fault.
    """
    acknowledged: set[str] = set()
    for associations in range(1, 100):
        proxy.strike(fault)
        more, released = send(proxy.port, study, seconds)
        acknowledged |= more
        if proxy.struck == 1:
            return acknowledged, released, associations
    pytest.fail("the fault never happened")


def assert_sent_again(port: int, study: list[Image]) -> None:
    """Fail unless everything is acknowledged when it is sent again, on a busy machine perhaps not in the first association."""
    everything = {image.sop_instance_uid for image in study}
    wait_until(lambda: send(port, study) == (everything, True), what="everything to be acknowledged")


def lengths(study: list[Image]) -> dict[str, int]:
    """How many bytes an undisturbed association takes to the node."""
    request = len(raw.association_request())
    total = request + sum(len(raw.store_request(image)) for image in study) + len(raw.RELEASE)
    return {"request": request, "total": total}


def wait_for_quiet(node: Node) -> None:
    """Wait until no association is left whose end could still write."""
    wait_until(lambda: not serving() and no_temporary(node.folder), what="the half image to be dropped")


def serving() -> bool:
    """Whether a connection's thread still runs: what the proxy has passed on late may make a file yet."""
    return any(thread.name.startswith("connection-") for thread in threading.enumerate())


def no_temporary(folder: Path) -> bool:
    return not object_files(folder)[1]


ENDS = {
    "A-ABORT": lambda offset: Fault(kind="insert", direction=TO_NODE, offset=offset, data=raw.abort()),
    "FIN": lambda offset: Fault(kind="cut", direction=TO_NODE, offset=offset),
    "RST": lambda offset: Fault(kind="reset", direction=TO_NODE, offset=offset),
}


@pytest.mark.parametrize("node", [DEADLINE], indirect=True)
@pytest.mark.parametrize("end", ENDS)
def test_an_association_may_end_at_any_byte(node: Node, proxy: FaultProxy, end: str) -> None:
    study = images(2, pixel_bytes=PIXEL_BYTES)
    size = lengths(study)
    inner = range(size["request"], size["total"], (size["total"] - size["request"]) // 13)
    borders = [1, 6, 7, size["request"] - 1, size["total"] - len(raw.RELEASE), size["total"] - 1]
    offsets = sorted({*inner, *borders})
    assert len(offsets) >= 20
    sent: list[Image] = []
    everything: set[str] = set()
    associations = 0
    for offset in offsets:
        study = images(2, pixel_bytes=PIXEL_BYTES, study=f"1.2.3.4.{offset}")
        sent += study
        acknowledged, _, tries = send_until_struck(proxy, ENDS[end](offset), study, 3 * DEADLINE)
        everything |= acknowledged
        associations += tries
    wait_for_quiet(node)
    node.assert_whole(sent, everything, associations=associations)

    proxy.strike(None)
    assert_sent_again(proxy.port, sent)
    wait_for_quiet(node)
    assert_stored(node.storage, sent, only=True)
    assert_no_stray_file(node.storage, node.folder)


MIDDLE = len(raw.association_request()) + PIXEL_BYTES // 2  # within the first image
ANSWER = 300  # within the node's first response
FAULTS = {
    "cut": {"kind": "cut"},
    "reset": {"kind": "reset"},
    "half-close": {"kind": "half-close"},
    "stall": {"kind": "stall"},
    "trickle": {"kind": "trickle", "count": 10, "seconds": 0.005},
    "trickle for ever": {"kind": "trickle", "count": 10**6, "seconds": 0.02},
    "delay": {"kind": "delay", "seconds": DEADLINE / 10},
    "delay past the deadline": {"kind": "delay", "seconds": 4 * DEADLINE},
    "duplicate": {"kind": "duplicate", "count": 100},
    "noise": {"kind": "insert", "data": bytes(range(256))},
}
HARMLESS = {"trickle", "delay"}


@pytest.mark.parametrize("direction", [TO_NODE, TO_PEER])
@pytest.mark.parametrize(
    ("node", "fault"), [(PATIENCE_SECONDS if fault in HARMLESS else DEADLINE, fault) for fault in FAULTS], indirect=["node"], ids=FAULTS
)
def test_whatever_the_network_does_what_was_acknowledged_is_stored_and_it_ends(
    node: Node, proxy: FaultProxy, fault: str, direction: str
) -> None:
    study = images(3, pixel_bytes=PIXEL_BYTES)
    strike = Fault(direction=direction, offset=MIDDLE if direction == TO_NODE else ANSWER, **FAULTS[fault])  # type: ignore[arg-type]
    seconds = PATIENCE_SECONDS if fault in HARMLESS else 3 * DEADLINE
    acknowledged, released, associations = send_until_struck(proxy, strike, study, seconds)
    assert released == (fault in HARMLESS)
    wait_for_quiet(node)
    node.assert_whole(study, acknowledged, associations=associations)

    proxy.strike(None)
    assert_sent_again(proxy.port, study)
    wait_for_quiet(node)
    node.assert_whole(study, {image.sop_instance_uid for image in study})


def test_a_half_closed_sender_gets_its_answer(node: Node) -> None:
    [image] = images(1)
    with association(node.receiver.port) as connection:
        connection.send(raw.store_request(image))
        connection.socket.shutdown(socket.SHUT_WR)
        assert connection.response().status == 0
        connection.wait_for_end()
    assert_stored(node.storage, [image], only=True)


def test_requests_sent_at_once_are_answered_one_by_one(node: Node) -> None:
    study = images(5, pixel_bytes=3000)
    stream = b"".join(raw.store_request(image, number) for number, image in enumerate(study, 1))
    with association(node.receiver.port) as connection:
        connection.send(stream + raw.RELEASE)
        answers = [connection.response() for _ in study]
        assert [(answer.message, answer.status) for answer in answers] == [(number, 0) for number in range(1, 6)]
        assert connection.read().kind == raw.RELEASE_RP
    assert_stored(node.storage, study, only=True)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 16372])
def test_fragments_of_any_size_make_the_same_image(node: Node, size: int) -> None:
    [image] = images(1, pixel_bytes=500)
    with association(node.receiver.port) as connection:
        assert connection.store(image, fragment_bytes=size).status == 0
        connection.release()
    assert_stored(node.storage, [image], only=True)


def test_several_fragments_in_one_pdu_and_an_empty_last_one_make_the_same_image(node: Node) -> None:
    [image] = images(1, pixel_bytes=500)
    data, context = image.dataset, image.context
    fragments = [(context, raw.DATA, data[:100]), (context, raw.DATA, data[100:]), (context, raw.LAST, b"")]
    with association(node.receiver.port) as connection:
        connection.send(raw.store_command(image) + raw.p_data(*fragments))
        assert connection.response().status == 0
        connection.send(raw.store_command(image, 2)[:-5])  # command and data may share a PDU, and a PDU may come in pieces
        time.sleep(0.1)
        connection.send(raw.store_command(image, 2)[-5:] + raw.data_pdus(data))
        assert connection.response().status == 0
        connection.release()
    assert_stored(node.storage, [image], only=True)
