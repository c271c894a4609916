"""DICOM upper layer PDUs and DIMSE messages made by hand, and a socket that says exactly these bytes (PS3.8 9.3, PS3.7 E).

For tests that must lie, stop half-way or be fast: nothing here checks what it is told to send.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

VERIFICATION = "1.2.840.10008.1.1"
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
CT = "1.2.840.10008.5.1.4.1.1.2"

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
C_STORE_RQ, C_ECHO_RQ, RESPONSE = 0x0001, 0x0030, 0x8000
COMMAND, DATA, LAST = 1, 0, 2  # message control header (PS3.8 E.2)

RELEASE = struct.pack(">BBI4x", RELEASE_RQ, 0, 4)
SECONDS = 60.0


@dataclass(frozen=True)
class Context:
    """A proposed presentation context."""

    abstract_syntax: str
    transfer_syntaxes: Sequence[str] = (IMPLICIT,)


CONTEXTS = (Context(VERIFICATION), Context(CT, (EXPLICIT,)))
ECHO_CONTEXT, CT_CONTEXT = 1, 3


@dataclass(frozen=True)
class Image:
    """What one C-STORE request carries and declares."""

    sop_instance_uid: str
    dataset: bytes
    sop_class_uid: str = CT
    context: int = CT_CONTEXT


def pdu(kind: int, body: bytes, *, length: int | None = None) -> bytes:
    """A PDU; `length` is what its header says if that is to be a lie."""
    return struct.pack(">BBI", kind, 0, len(body) if length is None else length) + body


def item(kind: int, body: bytes) -> bytes:
    """An item or sub-item of an association request."""
    return struct.pack(">BBH", kind, 0, len(body)) + body


def association_request(
    contexts: Sequence[Context] = CONTEXTS,
    *,
    calling: str = "SCANNER",
    called: str = "DICOMNODE",
    maximum_pdu_bytes: int = 16384,
    more_items: Iterable[bytes] = (),
    padding: int = 0,
) -> bytes:
    """An A-ASSOCIATE-RQ; contexts are numbered 1, 3, 5, …; at least `padding` bytes of extended negotiation make it larger."""
    proposed = b"".join(
        item(0x20, bytes([number, 0, 0, 0]) + item(0x30, context.abstract_syntax.encode()) + b"".join(_syntaxes(context)))
        for number, context in zip(range(1, 256, 2), contexts, strict=False)
    )
    user = [item(0x51, struct.pack(">I", maximum_pdu_bytes)), item(0x52, b"1.2.3.4"), *more_items]
    while padding > 0:
        user.append(item(0x56, struct.pack(">H", 7) + b"1.2.3.4" + bytes(1000)))
        padding -= 1000
    titles = called.encode().ljust(16) + calling.encode().ljust(16)
    return pdu(
        ASSOCIATE_RQ,
        struct.pack(">HH", 1, 0) + titles + bytes(32) + item(0x10, APPLICATION_CONTEXT.encode()) + proposed + item(0x50, b"".join(user)),
    )


def _syntaxes(context: Context) -> Iterator[bytes]:
    return (item(0x40, syntax.encode()) for syntax in context.transfer_syntaxes)


def element(tag: int, value: bytes) -> bytes:
    """An element of a command set: Implicit VR Little Endian, padded to even length."""
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value


def us(tag: int, value: int) -> bytes:
    """An unsigned short of a command set."""
    return element(tag, struct.pack("<H", value))


def command_set(*elements: bytes) -> bytes:
    """Elements behind their group length (0000,0000)."""
    content = b"".join(elements)
    return element(0x00000000, struct.pack("<I", len(content))) + content


def p_data(*fragments: tuple[int, int, bytes]) -> bytes:
    """One P-DATA-TF PDU of fragments: presentation context, message control header, bytes."""
    return pdu(
        P_DATA, b"".join(struct.pack(">IBB", len(content) + 2, context, control) + content for context, control, content in fragments)
    )


def echo_request(message: int = 1, context: int = ECHO_CONTEXT) -> bytes:
    """A C-ECHO request."""
    command = command_set(
        element(0x00000002, VERIFICATION.encode()), us(0x00000100, C_ECHO_RQ), us(0x00000110, message), us(0x00000800, 0x0101)
    )
    return p_data((context, COMMAND | LAST, command))


def store_command(image: Image, message: int = 1) -> bytes:
    """The command set of a C-STORE request as one PDU."""
    command = command_set(
        element(0x00000002, image.sop_class_uid.encode()),
        us(0x00000100, C_STORE_RQ),
        us(0x00000110, message),
        us(0x00000700, 0),
        us(0x00000800, 0x0001),
        element(0x00001000, image.sop_instance_uid.encode()),
    )
    return p_data((image.context, COMMAND | LAST, command))


def data_pdus(dataset: bytes, context: int = CT_CONTEXT, *, fragment_bytes: int = 16372) -> bytes:
    """A data set as P-DATA-TF PDUs of one fragment each."""
    starts = range(0, len(dataset), fragment_bytes) or [0]
    return b"".join(
        p_data((context, DATA | (LAST if start + fragment_bytes >= len(dataset) else 0), dataset[start : start + fragment_bytes]))
        for start in starts
    )


def store_request(image: Image, message: int = 1, *, fragment_bytes: int = 16372) -> bytes:
    """A whole C-STORE request."""
    return store_command(image, message) + data_pdus(image.dataset, image.context, fragment_bytes=fragment_bytes)


def abort(source: int = 0, reason: int = 0) -> bytes:
    """An A-ABORT PDU."""
    return struct.pack(">BBIBBBB", ABORT, 0, 4, 0, 0, source, reason)


class Ended(Exception):
    """The connection ended, in order or not, where a PDU was awaited."""


@dataclass(frozen=True)
class Pdu:
    """A PDU as it came."""

    kind: int
    body: bytes

    @property
    def rejection(self) -> tuple[int, int, int]:
        """Result, source and reason of an A-ASSOCIATE-RJ."""
        assert self.kind == ASSOCIATE_RJ, self
        return self.body[1], self.body[2], self.body[3]

    @property
    def abortion(self) -> tuple[int, int]:
        """Source and reason of an A-ABORT."""
        assert self.kind == ABORT, self
        return self.body[2], self.body[3]

    @property
    def accepted(self) -> dict[int, int]:
        """Of an A-ASSOCIATE-AC: presentation context -> result."""
        assert self.kind == ASSOCIATE_AC, self
        results, rest = {}, self.body[68:]
        while rest:
            kind, length = struct.unpack(">BxH", rest[:4])
            if kind == 0x21:
                results[rest[4]] = rest[6]
            rest = rest[4 + length :]
        return results


@dataclass
class Response:
    """The command set of a response."""

    elements: dict[int, bytes] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """Status (0000,0900)."""
        return int.from_bytes(self.elements[0x00000900], "little")

    @property
    def message(self) -> int:
        """Message ID Being Responded To (0000,0120)."""
        return int.from_bytes(self.elements[0x00000120], "little")

    @property
    def comment(self) -> str:
        """Error Comment (0000,0902)."""
        return self.elements.get(0x00000902, b"").decode().strip(" \0")


class Connection:
    """A TCP connection of a simulated peer, TCP_NODELAY set."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", source: str | None = None, seconds: float = SECONDS) -> None:
        self.socket = socket.create_connection((host, port), timeout=seconds, source_address=(source, 0) if source else None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._messages = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close in order (FIN)."""
        self.socket.close()

    def reset(self) -> None:
        """Close with a reset (RST)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes. Raises Ended if the other side has closed."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Ended from error

    def read(self) -> Pdu:
        """Read one PDU. Raises Ended, and TimeoutError if none comes in time."""
        kind, length = struct.unpack(">BxI", self._exactly(6))
        return Pdu(kind, self._exactly(length))

    def wait_for_end(self) -> list[Pdu]:
        """Return what comes until the connection ends. Raises TimeoutError if it doesn't end in time."""
        got = []
        while True:
            try:
                got.append(self.read())
            except Ended:
                return got

    def associate(self, request: bytes | None = None) -> Pdu:
        """Ask for an association and return the answer, whatever it is."""
        self.send(association_request() if request is None else request)
        return self.read()

    def response(self) -> Response:
        """Read one response message. Raises Ended if there is an abort instead."""
        answer = self.read()
        if answer.kind == ABORT:
            raise Ended
        assert answer.kind == P_DATA, answer
        assert answer.body[5] == COMMAND | LAST
        elements, rest = {}, answer.body[6:]
        while rest:
            group, number, length = struct.unpack("<HHI", rest[:8])
            elements[group << 16 | number] = rest[8 : 8 + length]
            rest = rest[8 + length :]
        return Response(elements)

    def store(self, image: Image, *, fragment_bytes: int = 16372) -> Response:
        """Send one image and return the response to it."""
        self._messages += 1
        self.send(store_request(image, self._messages, fragment_bytes=fragment_bytes))
        response = self.response()
        assert response.message == self._messages
        return response

    def echo(self) -> int:
        """C-ECHO; return its status."""
        self._messages += 1
        self.send(echo_request(self._messages))
        return self.response().status

    def release(self) -> None:
        """Release the association and wait for the answer."""
        self.send(RELEASE)
        answer = self.read()
        assert answer.kind == RELEASE_RP, answer
        self.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                chunk = self.socket.recv(count - len(data))
            except ConnectionResetError as error:
                raise Ended from error
            if not chunk:
                raise Ended
            data += chunk
        return bytes(data)


@contextmanager
def association(
    port: int, *, request: bytes | None = None, source: str | None = None, host: str = "127.0.0.1", seconds: float = SECONDS
) -> Iterator[Connection]:
    """An established association; closed at the end, which is all the test needs if it released it before."""
    with Connection(port, host=host, source=source, seconds=seconds) as connection:
        answer = connection.associate(request)
        assert answer.kind == ASSOCIATE_AC, answer
        yield connection


def send_images(port: int, images: Iterable[Image], *, seconds: float = SECONDS, source: str | None = None) -> set[str]:
    """Send like a scanner that stops at the first trouble; return the SOP Instance UIDs answered with Success."""
    acknowledged: set[str] = set()
    try:
        with association(port, seconds=seconds, source=source) as connection:
            for image in images:
                if connection.store(image).status == 0:
                    acknowledged.add(image.sop_instance_uid)
            connection.release()
    except (Ended, OSError, AssertionError):
        pass
    return acknowledged
