"""A sender that is never the bottleneck: CT images whose PDUs are encoded before the clock starts.

What is measured is the transfer and the wait for each response. One thread per association; they hold no lock while the
kernel takes an image.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from dimse_cases import CT, EXPLICIT, a_dataset, encoded

CALLING_AET = "BENCHMARK"
WAIT_SECONDS = 60.0
_PIXELS = 16  # distinct pictures; every image has UIDs of its own
_LARGEST_PDU = 1 << 20  # what we send to a receiver without a limit

Read = Callable[[int], bytes]


@dataclass(frozen=True, kw_only=True)
class Image:
    """One CT image to send, named by UIDs that no other has."""

    study_instance_uid: str
    sop_instance_uid: str
    before: bytes  # the data set in Explicit VR Little Endian is `before`, shared by nobody, and `pixels`
    pixels: bytes

    @property
    def dataset(self) -> bytes:
        """The encoded data set."""
        return self.before + self.pixels


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What one measurement saw."""

    images: int
    seconds: float  # from the first connection to the end of the last association
    milliseconds: tuple[float, ...]  # of each image, from its first byte to the end of its response


class NotTaken(OSError):
    """The receiver refused an association or an image."""


class CtScanner:
    """Makes CT images of 512 rows and columns, 0.53 MB each: noise around a body, so that nothing compresses well."""

    def __init__(self, rows: int = 512) -> None:
        noise = np.random.default_rng(20260101)
        y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : rows * 1j]
        body = np.where(x**2 + (1.4 * y) ** 2 < 0.7, 40.0, -1000.0)
        pictures = [np.rint(body + noise.normal(0, 15, body.shape)).astype("<i2").tobytes() for _ in range(_PIXELS)]
        self._placeholders = {
            name: f"1.2.826.0.1.3680043.8.498.{number * 10**18}.{10**9}" for number, name in enumerate(("image", "study", "series"), 1)
        }
        template = encoded(
            a_dataset(
                SOPInstanceUID=self._placeholders["image"],
                StudyInstanceUID=self._placeholders["study"],
                SeriesInstanceUID=self._placeholders["series"],
                ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
                StudyDescription="CT CHEST",
                SeriesDescription="AX 1 mm",
                Manufacturer="BENCHMARK",
                SliceThickness="1.0",
                KVP="120",
                PatientPosition="HFS",
                FrameOfReferenceUID="1.2.826.0.1.3680043.8.498.1",
                ImagePositionPatient=["-180.0", "-180.0", "-250.0"],
                ImageOrientationPatient=["1", "0", "0", "0", "1", "0"],
                PixelSpacing=["0.703125", "0.703125"],
                PixelRepresentation=1,
                RescaleIntercept="0",
                RescaleSlope="1",
                Rows=rows,
                Columns=rows,
                PixelData=pictures[0],
            )
        )
        self._before = template[: -len(pictures[0])]
        self._pictures = pictures
        self._numbers = itertools.count(10**9)
        self._run = secrets.randbelow(9 * 10**17) + 10**17

    def studies(self, count: int, images: int) -> list[list[Image]]:
        """Return so many studies of so many images each, all of them new."""
        return [self._study(images) for _ in range(count)]

    def _study(self, images: int) -> list[Image]:
        study, series = self._uid("study"), self._uid("series")
        return [self._image(study, series, number) for number in range(images)]

    def _image(self, study: str, series: str, number: int) -> Image:
        uid = self._uid("image")
        before = self._before
        for name, new in (("image", uid), ("study", study), ("series", series)):
            before = before.replace(self._placeholders[name].encode(), new.encode())
        return Image(study_instance_uid=study, sop_instance_uid=uid, before=before, pixels=self._pictures[number % _PIXELS])

    def _uid(self, name: str) -> str:
        """A UID as long as its placeholder: the group lengths and offsets of the template stay true."""
        kind = {"image": 1, "study": 2, "series": 3}[name]
        return f"1.2.826.0.1.3680043.8.498.{kind * 10**18 + self._run}.{next(self._numbers)}"


def send(port: int, called: str, associations: Sequence[Sequence[Image]], *, at_once: bool, quickack: bool) -> Sent:
    """Send each sequence in an association of its own, all at once or one after the other.

    Raises:
        NotTaken: an association was refused, or an image not answered with Success.
    """
    request = _association_request(called)
    with _connected(port) as connection:
        maximum = _associate(connection, request)
        _release(connection)
    messages = [[_store_request(image, maximum, number) for number, image in enumerate(images, 1)] for images in associations]

    def exchange(association: list[bytes]) -> list[tuple[float, bytes]]:
        with _connected(port) as connection:
            _associate(connection, request)
            timed = [_timed(connection, message, _read_pdu, quickack=quickack) for message in association]
            _release(connection)
            return timed

    with ThreadPoolExecutor(len(messages) if at_once else 1) as senders:
        began = time.perf_counter()
        timed = [answer for association in senders.map(exchange, messages) for answer in association]
        seconds = time.perf_counter() - began
    for _, response in timed:
        _check(response)
    return Sent(images=len(timed), seconds=seconds, milliseconds=tuple(elapsed for elapsed, _ in timed))


def send_raw(port: int, images: Sequence[Image], *, quickack: bool) -> Sent:
    """Send data sets behind their lengths over one connection; each is answered with one byte. No DIMSE can be faster."""
    messages = [struct.pack(">Q", len(image.dataset)) + image.dataset for image in images]
    began = time.perf_counter()
    with _connected(port) as connection:
        timed = [_timed(connection, message, lambda read: read(1), quickack=quickack) for message in messages]
    seconds = time.perf_counter() - began
    return Sent(images=len(timed), seconds=seconds, milliseconds=tuple(elapsed for elapsed, _ in timed))


def answers(port: int, called: str | None) -> bool:
    """Whether an association, or with None a connection, is accepted on this port of this machine."""
    try:
        with _connected(port) as connection:
            if called is not None:
                _associate(connection, _association_request(called))
                _release(connection)
    except (OSError, EOFError):
        return False
    return True


def _timed(connection: socket.socket, message: bytes, read_answer: Callable[[Read], bytes], *, quickack: bool) -> tuple[float, bytes]:
    """Send and wait for the answer; return the milliseconds that took, and the answer."""

    def read(count: int) -> bytes:
        if quickack:  # the kernel goes back to delayed acknowledgements by itself
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return _read(connection, count)

    began = time.perf_counter()
    connection.sendall(message)
    answer = read_answer(read)
    return (time.perf_counter() - began) * 1e3, answer


def _connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError("the receiver closed the connection")
        data += more
    return data


def _read_pdu(read: Read) -> bytes:
    """Read one PDU (PS3.8 9.3) and return it with its header."""
    header = read(6)
    return header + read(int.from_bytes(header[2:], "big"))


def _associate(connection: socket.socket, request: bytes) -> int:
    """Open an association for CT images; return the largest PDU that the receiver takes."""
    connection.sendall(request)
    answer = _read_pdu(partial(_read, connection))
    if answer[0] != 2:
        raise NotTaken(f"the association was answered with a PDU of type {answer[0]}")
    items = dict(_items(answer[74:]))
    if items[0x21][2] != 0:
        raise NotTaken("CT images are not taken in Explicit VR Little Endian")
    return int.from_bytes(dict(_items(items[0x50]))[0x51], "big") or _LARGEST_PDU


def _release(connection: socket.socket) -> None:
    connection.sendall(struct.pack(">BBLL", 5, 0, 4, 0))
    _read_pdu(partial(_read, connection))


def _association_request(called: str) -> bytes:
    """A-ASSOCIATE-RQ with one presentation context (PS3.8 9.3.2)."""
    context = bytes([1, 0, 0, 0]) + _item(0x30, CT.encode()) + _item(0x40, EXPLICIT.encode())
    user = _item(0x51, struct.pack(">L", 16384)) + _item(0x52, b"1.2.826.0.1.3680043.8.498.2")
    items = _item(0x10, b"1.2.840.10008.3.1.1.1") + _item(0x20, context) + _item(0x50, user)
    body = struct.pack(">HH16s16s32x", 1, 0, called.ljust(16).encode(), CALLING_AET.ljust(16).encode()) + items
    return struct.pack(">BBL", 1, 0, len(body)) + body


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        end = 4 + int.from_bytes(data[2:4], "big")
        yield data[0], data[4:end]
        data = data[end:]


def _store_request(image: Image, maximum_pdu: int, message_id: int) -> bytes:
    """The PDUs of one C-STORE request (PS3.7 9.3.1.1) in a presentation context with the id 1."""
    elements = (
        (0x0002, CT.encode()), (0x0100, struct.pack("<H", 1)), (0x0110, struct.pack("<H", message_id)), (0x0700, struct.pack("<H", 0)),
        (0x0800, struct.pack("<H", 0)), (0x1000, image.sop_instance_uid.encode()),
    )  # fmt: skip
    group = b"".join(_element(element, value) for element, value in elements)
    dataset, step = image.dataset, maximum_pdu - 6
    parts = [_pdv(3, _element(0x0000, struct.pack("<L", len(group))) + group)]
    parts += [_pdv(0 if start + step < len(dataset) else 2, dataset[start : start + step]) for start in range(0, len(dataset), step)]
    return b"".join(parts)


def _element(element: int, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHL", 0, element, len(value)) + value


def _pdv(control: int, data: bytes) -> bytes:
    """A P-DATA-TF PDU of one PDV (PS3.8 9.3.5)."""
    return struct.pack(">BBLLBB", 4, 0, len(data) + 6, len(data) + 2, 1, control) + data


def _check(response: bytes) -> None:
    """Fail unless this PDU is a C-STORE response with Success (PS3.7 9.3.1.2)."""
    if response[0] != 4:
        raise NotTaken(f"an image was answered with a PDU of type {response[0]}")
    status = response.find(struct.pack("<HHL", 0, 0x0900, 2))
    if status < 0 or response[status + 8 : status + 10] != b"\0\0":
        raise NotTaken(f"an image was answered with the status {response[status + 8 : status + 10][::-1].hex()}")
