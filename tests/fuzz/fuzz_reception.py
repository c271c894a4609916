"""Fuzz what reads bytes of strangers: the data set of a C-STORE request, and the PDUs of a connection.

    python tests/fuzz/fuzz_reception.py TARGET --seconds N     fuzz with atheris (coverage-guided), starting from the corpus
    python tests/fuzz/fuzz_reception.py TARGET --replay        run the corpus alone; needs no atheris

TARGET is `dataset` or `pdu`. A fault that is found is left in the folder of --artifacts (default: the current one) and ends the
program with an exit code that isn't 0. The file then goes to tests/data/fuzz/TARGET, and what was wrong to a unit test.

The first byte of an input says how the others are used: see `fuzz_dataset` and `connection_bytes`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import resource
import shutil
import socket
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve()
CORPUS = HERE.parents[1] / "data" / "fuzz"
MAXIMUM_MEGABYTES = 1024  # beyond what it starts with
sys.path.insert(0, str(HERE.parents[2]))  # the node's own packages, from wherever this is run


def _instrumented() -> contextlib.AbstractContextManager[Any]:
    """Let atheris see which lines of the node and of pynetdicom a fuzzed input reaches; each module takes time at the start."""
    if __name__ != "__main__" or "--replay" in sys.argv or importlib.util.find_spec("atheris") is None:
        return contextlib.nullcontext()
    import atheris

    network = ("acse", "association", "dimse", "dimse_messages", "pdu", "pdu_items", "pdu_primitives", "presentation")
    return atheris.instrument_imports(include=["dicomnode.dimse", *(f"pynetdicom.{module}" for module in network)])


with _instrumented():
    import structlog

    from dicomnode.config import ListenerSection
    from dicomnode.dimse import command as commands
    from dicomnode.dimse.contexts import VERIFICATION, transfer_syntax
    from dicomnode.dimse.encoding import Contents, Limits, walk
    from dicomnode.dimse.listener import Connection, Listener
    from dicomnode.dimse.scp import SOP_CLASS_UID, SOP_INSTANCE_UID, StoreRequest, is_uid, read_header
    from dicomnode.errors import StoreRefused

CT = "1.2.840.10008.5.1.4.1.1.2"
SYNTAXES = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.107",
    "1.2.840.10008.1.2.1.99",
)  # fmt: skip
DOCUMENTED = {0x0000, 0xA700, 0xA900, 0xC001, 0xC002, 0xC003}  # not C004: that one says that the node failed
LIMITS = Limits(maximum_elements=100_000, maximum_inflated_bytes=1 << 20)


# the data set


def fuzz_dataset(data: bytes) -> None:
    """Check a data set as it is checked before Success.

    First byte: bits 0 to 2 choose the transfer syntax, bit 3 deflates the rest first (so that mutations reach what is inside).
    """
    kind, payload = data[:1], data[1:]
    choice = kind[0] if kind else 0
    syntax = SYNTAXES[choice % 8 % len(SYNTAXES)]
    if choice & 8:
        deflater = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        syntax, payload = SYNTAXES[-1], deflater.compress(payload) + deflater.flush()
    contents = Contents()
    row = transfer_syntax(syntax)
    assert row is not None
    with contextlib.suppress(StoreRefused):
        walk(payload, row, contents, wanted=frozenset({SOP_CLASS_UID, SOP_INSTANCE_UID}), limits=LIMITS)
    sop_class, uid = (contents.values.get(tag, b"").decode("ascii", "replace").strip(" \0") for tag in (SOP_CLASS_UID, SOP_INSTANCE_UID))
    request = StoreRequest(
        association=1,
        calling_ae_title="SCANNER",
        called_ae_title="DICOMNODE",
        context_sop_class_uid=sop_class,
        sop_class_uid=sop_class,
        sop_instance_uid=uid,
        transfer_syntax_uid=syntax,
    )
    outcomes = [_outcome(request, payload, 0), _outcome(request, b"\xff" * 7 + payload, 7)]
    assert outcomes[0] == outcomes[1], "it matters where the data set begins"


def _outcome(request: StoreRequest, data: bytes, start: int) -> object:
    refused: StoreRefused | None = None
    try:
        header = read_header(request, data, "", start=start, limits=LIMITS)
    except StoreRefused as refusal:
        refused = refusal
    if refused is not None:
        assert refused.dimse_status in DOCUMENTED - {0}
        assert str(refused).isascii()
        assert len(str(refused)) <= 64
        assert refused.study_instance_uid is None or is_uid(refused.study_instance_uid)
        return refused.dimse_status, str(refused)
    assert all(map(is_uid, (header.sop_instance_uid, header.series_instance_uid, header.study_instance_uid)))
    for text in (header.patient_name, header.patient_id, header.study_description, header.modality, header.study_date, header.note):
        text.encode()  # no lone surrogates, which a database would refuse
        assert not any(ord(character) < 32 for character in text)
        assert len(text) <= 324
    return header


# the connection


class Peer:
    """The peer's end of a connection as a socket that has everything at once: `chunks` of the input, then an end of some kind."""

    family = socket.AF_UNIX

    def __init__(self, data: bytes, chunk: int, end: int) -> None:
        self._data = memoryview(data)
        self._chunk = chunk
        self.end = end
        self.answer = bytearray()

    def recv_into(self, view: memoryview) -> int:
        size = min(len(view), len(self._data), self._chunk)
        assert len(view) > 0, "a read of nothing"
        if size == 0 and self.end == 1:
            raise TimeoutError
        if size == 0 and self.end == 2:
            raise ConnectionResetError
        view[:size] = self._data[:size]
        self._data = self._data[size:]
        return size

    def sendall(self, data: bytes) -> None:
        if self.end == 3 and len(self._data) == 0:
            raise BrokenPipeError
        self.answer += data

    def settimeout(self, _seconds: float) -> None:
        return

    def close(self) -> None:
        return


class _Sink:
    """A sink that checks what it gets, and that it is finished or discarded once."""

    made: list[_Sink]
    stored: int

    def __init__(self, request: StoreRequest) -> None:
        self._request = request
        self._data = bytearray()
        self._ended = False
        _Sink.made.append(self)

    def write(self, chunk: memoryview) -> None:
        assert not self._ended
        self._data += chunk

    def finish(self) -> None:
        self._end()
        read_header(self._request, bytes(self._data), "", limits=LIMITS)
        _Sink.stored += 1

    def discard(self) -> None:
        self._end()

    def _end(self) -> None:
        assert not self._ended
        self._ended = True


def association_request(*contexts: tuple[str, str]) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2) that is let in; context IDs are 1, 3, …"""

    def item(kind: int, value: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(value)) + value

    proposed = b"".join(
        item(0x20, bytes([2 * index + 1, 0, 0, 0]) + item(0x30, abstract.encode()) + item(0x40, syntax.encode()))
        for index, (abstract, syntax) in enumerate(contexts)
    )
    user = item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3"))
    body = struct.pack(">HH16s16s32x", 1, 0, b"DICOMNODE".ljust(16), b"SCANNER".ljust(16)) + item(0x10, b"1.2.840.10008.3.1.1.1")
    body += proposed + user
    return struct.pack(">BBL", 1, 0, len(body)) + body


def p_data(context_id: int, control: int, fragment: bytes) -> bytes:
    """A P-DATA-TF PDU with one presentation data value (PS3.8 9.3.5)."""
    return struct.pack(">BBLLBB", 4, 0, len(fragment) + 6, len(fragment) + 2, context_id, control) + fragment


def store_command(uid: bytes = b"1.2.3\0", sop_class: bytes = CT.encode() + b"\0") -> bytes:
    """The command set of a C-STORE-RQ (PS3.7 9.3.1.1)."""
    elements = ((0x0002, sop_class), (0x0100, b"\1\0"), (0x0110, b"\7\0"), (0x0700, b"\0\0"), (0x0800, b"\1\0"), (0x1000, uid))
    body = b"".join(struct.pack("<HHL", 0, element, len(value)) + value for element, value in elements)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


RELEASE = struct.pack(">BBLL", 5, 0, 4, 0)

_failures: list[str] = []
_released: list[int] = []


def _watch(_logger: object, method: str, event: dict[str, Any]) -> Any:
    """Note each line of the log that tells of a failure of the node itself."""
    if method in {"exception", "critical"} or event.get("exc_info"):
        import traceback

        _failures.append(f"{event.get('event')}: {traceback.format_exc()}")
    raise structlog.DropEvent


def fuzz_pdu(data: bytes) -> None:
    """Serve one connection that sends what `connection_bytes` makes of the input."""
    sent, end, chunk = connection_bytes(data)
    serve(Peer(sent, chunk, end))


def connection_bytes(data: bytes) -> tuple[bytes, int, int]:
    """What a connection sends, how it ends, and in pieces of how many bytes.

    First byte: bits 0 and 1 say what the rest is (0: everything; 1: what follows an association request; 2: the command set of a
    request and its data set, after two bytes with the length of the former and, in bit 15, the context; 3: the data set of a C-STORE
    request), bits 2 and 3 how the connection ends (closed, silent, reset, or not reading either), bits 4 to 7 which transfer syntax
    and in what pieces its bytes come.
    """
    choice, payload = (data[0] if data else 0), data[1:]
    if choice & 3:
        head = association_request((VERIFICATION, SYNTAXES[0]), (CT, SYNTAXES[(choice >> 4) % 6]))  # contexts 1 and 3
        if choice & 3 == 2:
            size = struct.unpack_from("<H", payload.ljust(2, b"\0"))[0]
            context, size = 1 if size >> 15 else 3, size & 0x7FFF
            command, rest = payload[2 : 2 + size], payload[2 + size :]
            payload = p_data(context, 3, command) + (p_data(context, 2, rest) if rest else b"")
        elif choice & 3 == 3:
            payload = p_data(3, 3, store_command()) + p_data(3, 2, payload)
        payload = head + payload + RELEASE
    return payload, (choice >> 2) & 3, (1, 6, 7, 100, 4096, 1 << 20)[(choice >> 4) % 6]


@cache
def the_listener() -> Listener:
    """One listener for all inputs: making one takes longer than a connection."""
    settings = ListenerSection(accept_deflated=True, association_seconds=5, pdu_seconds=5)
    return Listener(
        settings,
        ["DICOMNODE"],
        admit=lambda caller: None if (caller.calling_ae_title, caller.called_ae_title) == ("SCANNER", "DICOMNODE") else "AE title",
        receive=_Sink,
        released=_released.append,
    )


def serve(peer: Peer) -> None:
    """Serve one connection as the listener does, in this thread, and check what came of it."""
    _Sink.made, _Sink.stored = [], 0
    _failures.clear()
    _released.clear()
    listener = the_listener()
    connection = Connection.__new__(Connection)
    connection.request, connection.client_address = peer, ("192.0.2.1", 50000)  # type: ignore[assignment]
    server: Any = SimpleNamespace(listener=listener, tls_context=None, handshake_seconds=5.0, server_address=("127.0.0.1", 11112))
    connection.server = server
    connection.setup()
    listener.guard.opened(connection)
    connection._serve()  # what it raises, nobody above it would handle
    listener.guard.closed(connection)
    assert not _failures, _failures[0]
    assert all(sink._ended for sink in _Sink.made), "a data set is neither stored nor forgotten"
    statuses = check_answer(bytes(peer.answer))
    assert len(_released) == (peer.answer[:1] == b"\2"), "the end of an association is told once"
    if peer.end != 3:  # else the peer did not read
        assert statuses.count(0) == _Sink.stored, "stored and acknowledged differ"


def check_answer(answer: bytes) -> list[int]:
    """Check that an answer is whole PDUs in an order that the standard knows; return the statuses of C-STORE responses."""
    kinds, statuses, message = [], [], b""
    while answer:
        assert len(answer) >= 6
        kind, length = struct.unpack_from(">BxL", answer)
        body, answer = answer[6 : 6 + length], answer[6 + length :]
        assert len(body) == length
        kinds.append(kind)
        while kind == 4 and body:
            size, _, control = struct.unpack_from(">LBB", body)
            message, body = message + (body[6 : 4 + size] if control & 1 else b""), body[4 + size :]
            if control & 3 == 3:
                command = commands.command_set(message)
                message = b""
                if commands.unsigned(command[commands.COMMAND_FIELD]) == commands.C_STORE_RSP:
                    statuses.append(commands.unsigned(command[commands.STATUS]))
    assert not message
    assert set(statuses) <= DOCUMENTED, f"undocumented or internal status in {statuses}"
    for index, kind in enumerate(kinds):
        assert kind in ({2, 3, 7} if index == 0 else {4, 6, 7}), f"PDU types {kinds}"
        assert kind not in {3, 6, 7} or index == len(kinds) - 1, f"PDUs after the last: {kinds}"
    return statuses


TARGETS: dict[str, Callable[[bytes], None]] = {"dataset": fuzz_dataset, "pdu": fuzz_pdu}


def prepare() -> None:
    """Keep the log quiet, and watch it for failures of the node."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore", UserWarning)  # as the node does: pydicom's quote what came
    structlog.configure(processors=[_watch], cache_logger_on_first_use=False)


def main() -> int:
    """Run one target; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--corpus", type=Path, help="where what is found on the way is kept (default: nowhere)")
    parser.add_argument("--artifacts", type=Path, default=Path())
    arguments = parser.parse_args()
    target, seeds = TARGETS[arguments.target], CORPUS / arguments.target
    prepare()
    if arguments.replay:
        for file in sorted(seeds.iterdir()):
            target(file.read_bytes())
        return 0
    import atheris

    found = arguments.corpus or Path(tempfile.mkdtemp(prefix="fuzz-"))
    found.mkdir(parents=True, exist_ok=True)
    if arguments.corpus is None:
        import atexit

        atexit.register(shutil.rmtree, found, ignore_errors=True)
    # The fuzzer goes by the peak of this process, and that begins with the peak of whoever started it.
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + MAXIMUM_MEGABYTES
    options = [
        f"-max_total_time={arguments.seconds}", "-timeout=10", f"-rss_limit_mb={limit}", "-max_len=65536", "-print_final_stats=1",
        f"-artifact_prefix={arguments.artifacts}/{arguments.target}-",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(found), str(seeds)], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
