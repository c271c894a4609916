"""Each limit of the listener bites, tells the peer what the standard has for it, and is counted by its reason."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Self

import pytest
import raw_dicom as raw
from raw_dicom import Connection, Ended, Image, association
from receiver_process import images

from dicomnode.config import ListenerSection
from dicomnode.dimse import guard
from dicomnode.dimse.listener import Listener
from dicomnode.dimse.negotiation import Caller
from dicomnode.dimse.scp import ReceivedInstance
from dicomnode.dimse.storing import in_memory
from pacs import wait_until

LIMIT_EXCEEDED = (2, 3, 2)  # rejected-transient, by the service provider (presentation): local limit exceeded (PS3.8 9.3.4)
NOT_SPECIFIED, INVALID_VALUE = (2, 0), (2, 6)  # A-ABORT by the service provider (PS3.8 9.3.8)
PEER = "127.0.0.1"
STRANGER, OTHER_STRANGER = "127.0.0.2", "127.0.0.3"


class Node:
    """A listener that lets everybody in and keeps what it gets in memory."""

    def __init__(self, **limits: Any) -> None:
        self.received: list[ReceivedInstance] = []
        self.refused: Counter[str] = Counter()
        self.released: list[int] = []
        self.hold = threading.Event()  # a store waits until this is set
        self.hold.set()
        self._listener = Listener(
            ListenerSection.model_validate({"port": 0, "association_seconds": 60.0, **limits}),
            ("DICOMNODE",),
            admit=self._admit,
            receive=in_memory(self._store),
            released=self.released.append,
            is_peer=lambda address: address == PEER,
            count=self._count,
        )

    def __enter__(self) -> Self:
        self._listener.start()
        self.port = self._listener.port
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._listener.stop(0)

    def stop(self, drain_seconds: float) -> None:
        self._listener.stop(drain_seconds)

    def wait_for(self, reason: str, times: int = 1) -> None:
        wait_until(lambda: self.refused[reason] >= times, what=f"{reason!r} to be counted, not {dict(self.refused)}")

    def _admit(self, _caller: Caller) -> str | None:
        return None

    def _store(self, received: ReceivedInstance) -> None:
        self.hold.wait(120)
        self.received.append(received)

    def _count(self, name: str) -> None:
        self.refused[name] += 1


@pytest.fixture
def image() -> Image:
    return images(1)[0]


def assert_serves(port: int, source: str | None = None, calling: str = "SCANNER") -> None:
    """Fail unless a well-behaved peer gets an answer."""
    with association(port, source=source, request=raw.association_request(calling=calling)) as connection:
        assert connection.echo() == 0
        connection.release()


def ends_with_abort(connection: Connection) -> tuple[int, int]:
    """What the A-ABORT says that comes next or after some responses; the node then waits for us to close (PS3.8 9.2, Sta13)."""
    while (answer := connection.read()).kind == raw.P_DATA:
        pass
    return answer.abortion


def ended_by_node(connection: Connection, chunks: Iterable[bytes], *, pause: float = 0.0) -> None:
    """Send until the node ends the connection or aborts; fail if it lets that go on."""
    deadline = time.monotonic() + 120
    try:
        for chunk in chunks:
            connection.send(chunk)
            if pause:
                connection.socket.settimeout(pause)
                with suppress(TimeoutError):
                    assert connection.read().kind == raw.ABORT
                    return
            assert time.monotonic() < deadline, "the node takes it for ever"
    except (Ended, TimeoutError):
        return
    pytest.fail("the node took everything")


# How many


@pytest.mark.parametrize(
    ("limits", "calling", "reason"),
    [
        ({"maximum_associations": 2}, "OTHER", "associations in all"),
        ({"maximum_associations_per_ae": 2}, "SCANNER", "associations of one AE title"),
    ],
)
def test_one_association_too_many_is_put_off(limits: dict[str, int], calling: str, reason: str) -> None:
    with Node(**limits) as node, association(node.port), association(node.port) as second:
        with Connection(node.port) as third:
            assert third.associate(raw.association_request(calling=calling)).rejection == LIMIT_EXCEEDED
        node.wait_for(f"association rejected: {reason}")
        second.release()
        wait_until(lambda: len(node.released) == 1, what="the release to be noted")
        assert_serves(node.port, calling=calling)


def test_the_limit_of_one_ae_title_is_not_another_s() -> None:
    with Node(maximum_associations_per_ae=1) as node, association(node.port):
        assert_serves(node.port, calling="OTHER")


def test_the_association_that_has_been_silent_longest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "IDLE_SECONDS", 0.2)
    with Node(maximum_associations=2) as node, association(node.port) as silent, association(node.port) as busy:
        time.sleep(0.3)
        assert busy.echo() == 0
        assert_serves(node.port)
        assert ends_with_abort(silent) == NOT_SPECIFIED
        node.wait_for("association aborted: associations in all")
        assert busy.echo() == 0


def test_an_association_in_the_middle_of_a_message_never_gives_way(monkeypatch: pytest.MonkeyPatch, image: Image) -> None:
    monkeypatch.setattr(guard, "IDLE_SECONDS", 0.0)
    with Node(maximum_associations=1) as node, association(node.port) as storing:
        node.hold.clear()
        storing.send(raw.store_request(image))
        time.sleep(0.3)
        with Connection(node.port) as other:
            assert other.associate().rejection == LIMIT_EXCEEDED
        node.hold.set()
        assert storing.response().status == 0
        storing.release()


def is_open(connection: Connection) -> bool:
    """Whether the node has not closed it yet."""
    connection.socket.setblocking(False)
    try:
        return connection.socket.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    finally:
        connection.socket.settimeout(raw.SECONDS)


@pytest.mark.parametrize(("limit", "address"), [("maximum_half_open_per_address", STRANGER), ("maximum_half_open_per_peer", PEER)])
def test_of_one_address_s_half_open_connections_the_oldest_gives_way(limit: str, address: str) -> None:
    with Node(**{limit: 2}) as node:
        first, second, third = (Connection(node.port, source=address) for _ in range(3))
        with first, second, third:
            wait_until(lambda: not is_open(first), what="the first to be closed")
            assert is_open(second)
            assert is_open(third)
            node.wait_for("connection refused: half-open connections of one address")
            assert third.associate().kind == raw.ASSOCIATE_AC


def test_an_association_is_no_half_open_connection() -> None:
    with (
        Node(maximum_half_open_per_address=1) as node,
        association(node.port, source=STRANGER) as first,
        association(node.port, source=STRANGER) as second,
    ):
        assert (first.echo(), second.echo()) == (0, 0)


def test_of_all_half_open_connections_the_oldest_of_the_address_that_holds_most_gives_way() -> None:
    with Node(maximum_half_open=3, maximum_half_open_per_address=2) as node:
        modest = Connection(node.port, source=STRANGER)
        greedy = [Connection(node.port, source=OTHER_STRANGER) for _ in range(2)]
        third = Connection(node.port, source="127.0.0.4")
        wait_until(lambda: not is_open(greedy[0]), what="the oldest of the greedy address to be closed")
        assert [is_open(connection) for connection in (modest, greedy[1], third)] == [True] * 3
        node.wait_for("connection refused: half-open connections in all")
        with Connection(node.port, source=PEER) as peer:  # a peer's has a limit of its own
            assert peer.associate().kind == raw.ASSOCIATE_AC
            assert [is_open(connection) for connection in (modest, greedy[1], third)] == [True] * 3
        for connection in (modest, *greedy, third):
            connection.close()


def test_an_aborted_association_takes_no_slot_while_its_peer_does_not_close() -> None:
    with Node(maximum_associations=1, association_seconds=20) as node, association(node.port) as aborted:
        aborted.send(raw.store_command(images(1)[0]) + raw.pdu(0x55, b"what?"))
        assert aborted.read().abortion[0] == 2
        assert_serves(node.port)


# How long


@pytest.mark.parametrize("begin", [b"", b"\x01\x00\x00", raw.association_request()[:50]])
def test_a_connection_that_asks_for_nothing_is_closed(begin: bytes) -> None:
    with Node(association_seconds=0.3) as node, Connection(node.port) as connection:
        connection.send(begin)
        connection.wait_for_end()
        node.wait_for("connection refused: no association request in time")


def test_one_byte_at_a_time_does_not_stretch_the_deadline_of_the_association_request() -> None:
    with Node(association_seconds=0.5) as node, Connection(node.port) as connection:
        ended_by_node(connection, (bytes([byte]) for byte in raw.association_request()), pause=0.05)  # all of it takes ten times as long


def test_an_idle_association_is_aborted() -> None:
    with Node(network_timeout_seconds=2) as node, association(node.port) as connection:  # none that a busy machine makes idle
        assert connection.echo() == 0
        assert ends_with_abort(connection) == NOT_SPECIFIED
        node.wait_for("association aborted: idle for too long")
        assert_serves(node.port)


def test_a_message_that_does_not_go_on_is_aborted(image: Image) -> None:
    with Node(dimse_timeout_seconds=0.3) as node, association(node.port) as connection:
        connection.send(raw.store_command(image))
        assert ends_with_abort(connection) == NOT_SPECIFIED
        node.wait_for("association aborted: message does not go on")
        assert node.received == []


@pytest.mark.parametrize("sent", [7, 12, 100])
def test_a_pdu_that_does_not_go_on_is_aborted(image: Image, sent: int) -> None:
    with Node(pdu_seconds=0.3) as node, association(node.port) as connection:
        connection.send(raw.store_command(image) + raw.data_pdus(image.dataset)[:sent])
        assert ends_with_abort(connection) == NOT_SPECIFIED
        node.wait_for("association aborted: PDU too slow")
        assert node.received == []


def test_a_pdu_s_header_that_does_not_go_on_is_aborted(image: Image) -> None:
    with Node(pdu_seconds=0.3, network_timeout_seconds=20, dimse_timeout_seconds=20) as node, association(node.port) as connection:
        connection.send(b"\x04\x00\x00")
        assert ends_with_abort(connection) == NOT_SPECIFIED
        node.wait_for("association aborted: PDU too slow")


def test_a_message_in_drops_is_aborted(image: Image) -> None:
    with Node(pdu_seconds=0.3, least_bytes_per_second=1000) as node, association(node.port) as connection:
        connection.send(raw.store_command(image))
        ended_by_node(connection, (raw.p_data((raw.CT_CONTEXT, raw.DATA, bytes([byte]))) for byte in image.dataset), pause=0.05)
        node.wait_for("association aborted: message too slow")
        assert node.received == []


def test_the_time_that_storing_takes_is_not_held_against_the_sender(image: Image) -> None:
    with Node(pdu_seconds=1, network_timeout_seconds=1, dimse_timeout_seconds=1) as node, association(node.port) as connection:
        node.hold.clear()
        connection.send(raw.store_request(image))
        time.sleep(1.5)
        node.hold.set()
        assert connection.response().status == 0


@pytest.mark.long
def test_a_peer_that_takes_no_response_is_let_go() -> None:
    with Node(pdu_seconds=0.3) as node, association(node.port) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.socket.settimeout(0.2)
        with suppress(Ended, TimeoutError):
            for _ in range(500):
                connection.send(raw.echo_request() * 500)
        # The kernel takes some megabytes of responses before it makes the node wait: at a thousand a second that is most of a minute.
        wait_until(lambda: len(node.released) == 1, what="the association to end")
        wait_until(lambda: node.refused.total() == 1, what="the abort to be counted")
        assert_serves(node.port)


# How much


def test_an_association_request_may_be_so_large_and_no_larger() -> None:
    padding = 8000
    request = raw.association_request(padding=padding)
    with Node(maximum_association_request_bytes=len(request) - 6) as node:
        with association(node.port, request=request) as connection:
            assert connection.echo() == 0
        with Connection(node.port) as connection:
            connection.send(raw.association_request(padding=padding + 1000))
            assert ends_with_abort(connection) == INVALID_VALUE
        node.wait_for("connection refused: association request too large")


@pytest.mark.parametrize("length", [65537, 2**31, 2**32 - 16])
def test_the_default_takes_64_kib(length: int) -> None:
    with Node() as node, Connection(node.port) as connection:
        connection.send(raw.pdu(raw.ASSOCIATE_RQ, b"", length=length))
        assert ends_with_abort(connection) == INVALID_VALUE
        node.wait_for("connection refused: association request too large")


@pytest.mark.parametrize("length", [8193, 2**32 - 16])
def test_a_pdu_may_be_so_large_and_no_larger(image: Image, length: int) -> None:
    with Node(accepted_pdu_bytes=8192) as node:
        with association(node.port) as connection:
            largest = raw.p_data((raw.CT_CONTEXT, raw.DATA, bytes(8192 - 6)))
            assert struct.unpack(">xxI", largest[:6]) == (8192,)
            connection.send(raw.store_command(image) + largest + raw.data_pdus(b""))
            assert connection.response().status == 0
            connection.send(raw.pdu(raw.P_DATA, b"", length=length))
            assert ends_with_abort(connection) == INVALID_VALUE
        node.wait_for("association aborted: PDU too large")


def test_a_data_set_may_be_so_large_and_no_larger(image: Image) -> None:
    size = len(image.dataset) + 2000
    allowed = Image("1.2.3", bytes(size))
    too_much = Image("1.2.4", bytes(size + 2))
    with Node(maximum_message_bytes=size) as node, association(node.port) as connection:
        assert connection.store(allowed, fragment_bytes=600).status == 0
        connection.send(raw.store_request(too_much, fragment_bytes=600))
        assert ends_with_abort(connection) == NOT_SPECIFIED
        node.wait_for("association aborted: data set too large")
        assert [len(received.dataset) for received in node.received] == [size]


def test_an_association_may_send_so_much_and_no_more(image: Image) -> None:
    one = len(raw.store_request(image))
    with Node(maximum_association_bytes=max(1024, 3 * one + one // 2)) as node, association(node.port) as connection:
        for _ in range(3):
            assert connection.store(image).status == 0
        with pytest.raises(Ended):
            connection.store(image)
        node.wait_for("association aborted: association sends too much")


def test_a_command_set_has_a_limit_of_its_own() -> None:
    endless = raw.p_data((raw.CT_CONTEXT, raw.COMMAND, bytes(8000)))
    with Node() as node, association(node.port) as connection:
        connection.send(endless * 3)
        assert ends_with_abort(connection) == INVALID_VALUE
        node.wait_for("association aborted: command set too large")


@pytest.mark.parametrize("control", [pytest.param(raw.COMMAND, marks=pytest.mark.long), raw.DATA])
def test_fragments_without_a_byte_have_an_end_too(image: Image, control: int) -> None:
    flood = raw.p_data(*[(raw.CT_CONTEXT, control, b"")] * 1000)
    with Node(pdu_seconds=0.3) as node, association(node.port) as connection:
        if control == raw.DATA:
            connection.send(raw.store_command(image))
        ended_by_node(connection, itertools.repeat(flood))
        wait_until(lambda: node.refused.total() == 1, what="the abort to be counted")


# What is no DICOM


GARBAGE: dict[str, Callable[[], bytes]] = {
    "an HTTP request": lambda: b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
    "a TLS hello": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506),
    "zeros": lambda: bytes(1000),
    "data before an association": raw.echo_request,
    "a release before an association": lambda: raw.RELEASE,
    "an empty request": lambda: raw.pdu(raw.ASSOCIATE_RQ, b""),
    "a request of noise": lambda: raw.pdu(raw.ASSOCIATE_RQ, bytes(range(256)) * 4),
    "a request whose items lie": lambda: raw.association_request()[:76] + b"\x10\x00\xff\xff" + raw.association_request()[80:],
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_association_request_ends_the_connection_and_is_counted(garbage: str) -> None:
    with Node() as node:
        with Connection(node.port) as connection:
            connection.send(GARBAGE[garbage]())
            assert connection.read().kind in {raw.ABORT, raw.ASSOCIATE_RJ}
        wait_until(lambda: node.refused.total() == 1, what="the refusal to be counted")
        assert node.released == []
        assert_serves(node.port)


MALFORMED: dict[str, Callable[[Image], bytes]] = {
    "an unknown PDU": lambda _: raw.pdu(0x55, b"what?"),
    "a second request": lambda _: raw.association_request(),
    "an empty PDU of data": lambda _: raw.pdu(raw.P_DATA, b"") * 3 + raw.pdu(0x55, b""),
    "a fragment longer than its PDU": lambda _: raw.pdu(raw.P_DATA, struct.pack(">IBB", 1000, raw.CT_CONTEXT, 3) + b"x"),
    "a fragment shorter than its header": lambda _: raw.pdu(raw.P_DATA, struct.pack(">IBB", 1, raw.CT_CONTEXT, 3) + b"x"),
    "a context that nobody proposed": lambda _: raw.p_data((99, raw.COMMAND | raw.LAST, b"x")),
    "a data set without its command": lambda _: raw.p_data((raw.CT_CONTEXT, raw.DATA | raw.LAST, b"x")),
    "a command that is none": lambda _: raw.p_data((raw.CT_CONTEXT, raw.COMMAND | raw.LAST, b"\xff" * 40)),
    "an empty command": lambda _: raw.p_data((raw.CT_CONTEXT, raw.COMMAND | raw.LAST, b"")),
    "a command within a message": lambda image: raw.store_command(image) * 2,
    "the data in another context": lambda image: raw.store_command(image) + raw.data_pdus(image.dataset, raw.ECHO_CONTEXT),
    "a release within a message": lambda image: raw.store_command(image) + raw.RELEASE,
    "a command without a field": lambda _: raw.p_data((raw.CT_CONTEXT, raw.COMMAND | raw.LAST, raw.command_set(raw.us(0x110, 1)))),
}


@pytest.mark.parametrize("malformed", MALFORMED)
def test_what_breaks_the_protocol_in_an_association_is_aborted_and_counted(malformed: str, image: Image) -> None:
    with Node() as node:
        with association(node.port) as connection:
            connection.send(MALFORMED[malformed](image))
            assert ends_with_abort(connection)[0] == 2
        wait_until(lambda: node.refused.total() == 1, what="the abort to be counted")
        wait_until(lambda: node.released == [1], what="the end to be noted")
        assert node.received == []
        assert_serves(node.port)


def test_a_peer_that_does_not_close_after_an_abort_is_closed_within_the_deadline() -> None:
    with Node(association_seconds=0.3) as node, association(node.port) as connection:
        connection.send(raw.pdu(0x55, b"what?"))
        assert [answer.kind for answer in connection.wait_for_end()] == [raw.ABORT]


def test_a_reset_at_any_moment_is_only_the_end_of_that_connection(image: Image) -> None:
    stream = raw.association_request() + raw.store_request(image)
    with Node() as node:
        for sent in (0, 1, 7, 80, len(raw.association_request()), len(raw.association_request()) + 20, len(stream)):
            connection = Connection(node.port)
            connection.send(stream[:sent])
            connection.reset()
        assert_serves(node.port)


# Draining


def test_draining_lets_a_study_end_and_refuses_new_connections() -> None:
    study = images(3)
    with Node() as node, association(node.port) as connection:
        assert connection.store(study[0]).status == 0
        stopping = threading.Thread(target=node.stop, args=(30,))
        stopping.start()
        wait_until(lambda: not connects(node.port), what="new connections to be refused")
        assert [connection.store(image).status for image in study[1:]] == [0, 0]
        connection.release()
        stopping.join(120)
        assert not stopping.is_alive()
        assert [received.sop_instance_uid for received in node.received] == [image.sop_instance_uid for image in study]


def test_stopping_ends_an_association_that_never_stops_sending() -> None:
    [image] = images(1)
    endless = raw.p_data((raw.CT_CONTEXT, raw.DATA, bytes(16000)))
    with Node() as node, association(node.port) as connection:
        connection.send(raw.store_command(image))
        stopping = threading.Thread(target=node.stop, args=(0.2,))
        stopping.start()
        ended_by_node(connection, itertools.repeat(endless))
        stopping.join(120)
        assert not stopping.is_alive()
        assert node.released == [1]


def connects(port: int) -> bool:
    try:
        Connection(port).close()
    except ConnectionError:  # refused, or reset in the queue of a socket that is closed
        return False
    return True
