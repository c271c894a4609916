"""One association as its acceptor: negotiation by pynetdicom's ACSE, PDUs under deadlines, C-STORE data straight into a sink.

Bends pynetdicom below its ACSE and DIMSE services: instead of two threads and their queues, the one thread of the connection reads
and writes. The data set of a C-STORE request is handed on as it comes and never held in memory; what a sink raises is the only way
to a failure status.
"""

from __future__ import annotations

import contextlib
import queue
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from pydicom.dataset import Dataset
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ, A_RELEASE_RP, P_DATA_TF
from pynetdicom.pdu_primitives import A_ABORT, A_ASSOCIATE, A_P_ABORT, A_RELEASE, P_DATA
from pynetdicom.transport import AddressInformation

from dicomnode.dimse import command as commands
from dicomnode.dimse.commitment import read_report, read_request
from dicomnode.dimse.scp import ReceivedInstance, StoreRequest
from dicomnode.dimse.wire import ConnectionLost, DeadlineMissed, Wire
from dicomnode.errors import CommitmentFailure, CommitmentRefused, InvalidArgument, NotAuthorized, ProcessingFailure, StoreRefused
from dicomnode.logs import get_logger

if TYPE_CHECKING:
    from dicomnode.dimse.listener import Connection, Listener

SUCCESS: Final = 0x0000
# PS3.8 9.3.4: rejected-permanent, by the service user, no reason given. It is the answer to every caller that is not let in, so
# that nobody learns which AE titles exist here.
_REJECTED: Final = (0x01, 0x01, 0x01)
_LIMIT_EXCEEDED: Final = (0x02, 0x03, 0x02)  # rejected-transient, by the service provider (presentation), local limit exceeded
_PROTOCOL_VERSION: Final = (0x01, 0x02, 0x02)

USER_IDENTITY: Final = "user identity"  # the reason of `admit` for a caller who lacks nothing else: it may stand in the rest of the request

# PS3.8 9.3.8: reasons of an A-ABORT by the service provider
NOT_SPECIFIED, UNRECOGNIZED_PDU, UNEXPECTED_PDU, INVALID_VALUE = 0, 1, 2, 6

ASSOCIATE_RQ, _ASSOCIATE_RJ, _P_DATA, _RELEASE_RQ, _ABORT = 0x01, 0x03, 0x04, 0x05, 0x07
_MAXIMUM_COMMAND = 16384  # bytes of a command set; the largest that the standard defines has some hundred
_MAXIMUM_OTHER = 1048576  # bytes of the data set of a request that is no C-STORE

_log = get_logger(__name__)

Message = TypeVar("Message")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks for an association: what the request says and what the connection proves."""

    calling_ae_title: str
    called_ae_title: str
    address: str  # IP that the connection comes from
    certificate: bytes | None  # the client's, DER; None without TLS
    user: str | None  # user identity negotiation, types 1 and 2 (PS3.7 D.3.3.7)
    passcode: str | None


@dataclass(frozen=True, kw_only=True)
class Grants:
    """What a caller that was let in may do, besides C-ECHO."""

    stores: bool  # send instances, and ask this node to commit to them
    commits: bool  # report what it commits to


class Sink(Protocol):
    """Where the data set of one C-STORE request goes. Every sink is finished or discarded, once."""

    def write(self, chunk: memoryview) -> None:
        """Take the next bytes; the view holds until this returns. May raise StoreRefused: the rest is not handed over."""

    def finish(self) -> None:
        """Return once the instance is safe, or raise StoreRefused; either way nothing is left to do."""

    def discard(self) -> None:
        """Forget the instance: its data set will not be whole."""


def in_memory(store: Callable[[ReceivedInstance], None]) -> Callable[[StoreRequest], Sink]:
    """Make sinks that keep a data set in memory and hand it to `store`, which may raise StoreRefused, when it is whole."""

    class _Memory:
        def __init__(self, request: StoreRequest) -> None:
            self._request = request
            self._data = bytearray()

        def write(self, chunk: memoryview) -> None:
            self._data += chunk

        def finish(self) -> None:
            store(ReceivedInstance(**vars(self._request), dataset=bytes(self._data)))

        def discard(self) -> None:
            self._data.clear()

    return _Memory


class Aborted(Exception):
    """The association has to be aborted by us: the provider's reason (PS3.8 9.3.8) for the peer, `why` for log and metrics."""

    def __init__(self, why: str, reason: int) -> None:
        super().__init__(why)
        self.why = why
        self.reason = reason


def pdu_header(wire: Wire, deadline: float) -> tuple[int, int]:
    """Read the six bytes that every PDU begins with (PS3.8 9.3.1): its type, and the bytes that follow."""
    kind, _, length = struct.unpack(">BBL", wire.take(6, deadline))
    return kind, length


class _UpperLayer:
    """What pynetdicom's ACSE and DIMSE expect of a DUL service provider, for an acceptor whose one thread reads and writes itself."""

    def __init__(self, wire: Wire, send_seconds: float) -> None:
        self._wire = wire
        self._send_seconds = send_seconds
        self.artim_timer = self._idle_timer = SimpleNamespace(timeout=None)  # wire.py has the deadlines
        self.event_queue: queue.SimpleQueue[str] = queue.SimpleQueue()  # pynetdicom puts "Evt19" here for what it can't decode
        self.socket = None

    def send_pdu(self, primitive: Any) -> None:
        """Encode and send at once."""
        if isinstance(primitive, P_DATA):
            pdu: Any = P_DATA_TF(primitive)
        elif isinstance(primitive, A_ASSOCIATE):
            pdu = A_ASSOCIATE_AC(primitive) if primitive.result == 0 else A_ASSOCIATE_RJ(primitive)
        elif isinstance(primitive, A_RELEASE):
            pdu = A_RELEASE_RP(primitive)
        else:
            assert isinstance(primitive, A_ABORT | A_P_ABORT)  # noqa: S101  an acceptor sends nothing else
            pdu = A_ABORT_RQ(primitive)
        self._wire.send(pdu.encode(), self._send_seconds)

    def peek_next_pdu(self) -> None:
        """Return None: nothing is ever queued, the thread that asks is the one that reads."""

    def is_alive(self) -> bool:
        """Return False: there is no thread to wait for."""
        return False


@dataclass(kw_only=True)
class _Store:
    """A C-STORE request whose data set is being received."""

    context_id: int
    command: dict[int, bytes]
    sink: Sink | None
    refusal: StoreRefused | None
    size: int = 0


class AcceptedAssociation(Association):  # type: ignore[misc]  # pynetdicom is untyped here
    """An accepted connection's association. It is never started as the thread that it could be: `serve` runs in the connection's."""

    def __init__(self, listener: Listener, connection: Connection, wire: Wire) -> None:
        super().__init__(listener.entity, "acceptor")
        settings = listener.settings
        self.dul = _UpperLayer(wire, settings.pdu_seconds)
        self.acceptor.maximum_length = settings.maximum_pdu_bytes
        self.acceptor.ae_title = listener.ae_titles[0]
        self.acceptor.address_info = connection.local
        self.acceptor.implementation_class_uid = listener.entity.implementation_class_uid
        self.acceptor.implementation_version_name = listener.entity.implementation_version_name
        self.requestor.address_info = AddressInformation.from_tuple(connection.client_address)
        self._listener = listener
        self._settings = settings
        self._connection = connection
        self._wire = wire
        self._calling = self._called = ""
        self._number = 0
        self._command = bytearray()
        self._command_context = 0
        self._store: _Store | None = None
        self._other: tuple[int, bytes, bytearray] | None = None  # context, command and data set of a request that is no C-STORE
        self._message_begin: float | None = None  # wire.waited when the message under way began
        self._message_bytes = 0
        self._received = 0
        self._abort_asked = False
        self._grants = Grants(stores=False, commits=False)
        self.bind(evt.EVT_N_ACTION, self._asked_to_commit)
        self.bind(evt.EVT_N_EVENT_REPORT, self._reported)

    def serve(self, request: bytes) -> None:
        """Answer the association request, and serve the association to its end."""
        wire = self._wire
        try:
            if self._negotiate(request):
                self._number = next(self._listener.numbers)
                while self._next_pdu():
                    pass
        except Aborted as aborted:
            self._refuse(aborted.why)
            self._leave()
            send_abort(wire, aborted.reason)
        except (ConnectionLost, DeadlineMissed):
            reason = self._connection.gave_way
            if reason is not None:
                self._refuse(reason)
                send_abort(wire, NOT_SPECIFIED)
            else:
                _log.info("connection lost", calling_ae_title=loggable(self._calling))
            return
        finally:
            self._end()
        self._leave()
        wire.linger(time.monotonic() + self._settings.association_seconds)

    def _negotiate(self, request: bytes) -> bool:
        """Let the caller in or reject it; to whom is let in, accept what is asked for as far as the table has it."""
        caller = self._caller(request)
        self._calling, self._called = caller.calling_ae_title, caller.called_ae_title
        if int.from_bytes(request[6:8], "big") & 1 == 0:
            self._reject("protocol version", _PROTOCOL_VERSION)
            return False
        reason = self._asked(caller)  # before the rest is decoded: that can cost a stranger's request a fifth of a second
        if reason not in {None, USER_IDENTITY}:
            self._reject(str(reason), _REJECTED)
            return False
        pdu = A_ASSOCIATE_RQ()
        try:
            pdu.decode(request)
            self.requestor.primitive = primitive = pdu.to_primitive()
            user, passcode = _user_identity(primitive)
        except Exception as error:
            raise Aborted("association request malformed", INVALID_VALUE) from error
        if user is not None:
            reason = self._asked(replace(caller, user=user, passcode=passcode))
        if reason is not None:
            self._reject(reason, _REJECTED)
            return False
        limit = self._listener.guard.associated(self._connection, caller.calling_ae_title)
        if limit is not None:
            self._reject(limit, _LIMIT_EXCEEDED)
            return False
        requested = {str(context.abstract_syntax) for context in primitive.presentation_context_definition_list}
        self._grants = self._granted()
        self.acceptor.supported_contexts = self._listener.contexts.of(requested, self._grants)
        try:
            self.acse.negotiate_association()
        except (ConnectionLost, DeadlineMissed):
            raise
        except Exception as error:  # e.g. of a presentation context without an abstract syntax
            raise Aborted("association request malformed", INVALID_VALUE) from error
        return bool(self.is_established)

    def _caller(self, request: bytes) -> Caller:
        """Who calls, by what stands at fixed places in the request (PS3.8 9.3.2); who the user is stands further on."""
        try:
            called, calling = request[10:26].decode("ascii"), request[26:42].decode("ascii")
        except UnicodeDecodeError as error:
            raise Aborted("association request malformed", INVALID_VALUE) from error
        return Caller(
            calling_ae_title=calling.strip(" "),
            called_ae_title=called.strip(" "),
            address=self._connection.address,
            certificate=self._connection.certificate(),
            user=None,
            passcode=None,
        )

    def _asked(self, caller: Caller) -> str | None:
        """Ask whether the caller may come in; a registry that can't answer lets nobody in."""
        try:
            return self._listener.admit(caller)
        except Exception:  # noqa: BLE001  the DIMSE boundary
            _log.exception("the registry could not be asked")
            return "registry"

    def _granted(self) -> Grants:
        """Ask what the caller may do; of a registry that can't answer it gets nothing."""
        try:
            return self._listener.grants(self._calling)
        except Exception:  # noqa: BLE001  the DIMSE boundary
            _log.exception("the registry could not be asked")
            return Grants(stores=False, commits=False)

    def _reject(self, reason: str, answer: tuple[int, int, int]) -> None:
        self._listener.refuse(
            "association rejected",
            reason,
            host=self._connection.address,
            calling_ae_title=loggable(self._calling),
            called_ae_title=loggable(self._called),
        )
        self._wire.send(struct.pack(">BBLBBBB", _ASSOCIATE_RJ, 0, 4, 0, *answer), self._settings.pdu_seconds)

    def _refuse(self, why: str) -> None:
        self._listener.refuse("association aborted", why, host=self._connection.address, calling_ae_title=loggable(self._calling))

    def _abort_blocking(self, block: bool = True) -> None:
        """Note that pynetdicom wants to abort: its own method would wait for a thread that isn't there."""
        del block
        self._abort_asked = True
        self.is_established = False

    def _leave(self) -> None:
        """Take no slot any more: before the peer hears of the end, so that it can come back at once."""
        self._listener.guard.lingers(self._connection)

    def _end(self) -> None:
        """Forget a message that will not be whole, and report the end of an association that was let in."""
        if self._store is not None and self._store.sink is not None:
            self._store.sink.discard()
        if self._number:
            try:
                self._listener.released(self._number)
            except Exception:  # noqa: BLE001  the DIMSE boundary: nobody above this thread would see it
                _log.exception("an association's end could not be recorded")

    # PDUs

    def _next_pdu(self) -> bool:
        """Read and serve one PDU; return whether the association goes on."""
        settings = self._settings
        in_message = self._message_begin is not None
        wait = settings.dimse_timeout_seconds if in_message else settings.network_timeout_seconds
        try:
            self._wire.wait(time.monotonic() + wait)
        except DeadlineMissed as missed:
            raise Aborted("message does not go on" if in_message else "idle for too long", NOT_SPECIFIED) from missed
        deadline = time.monotonic() + settings.pdu_seconds
        try:
            kind, length = pdu_header(self._wire, deadline)
        except DeadlineMissed as missed:
            raise Aborted("PDU too slow", NOT_SPECIFIED) from missed
        self._received += 6 + length
        if self._received > settings.maximum_association_bytes:
            raise Aborted("association sends too much", NOT_SPECIFIED)
        if kind == _P_DATA:
            if length > settings.accepted_pdu_bytes:
                raise Aborted("PDU too large", INVALID_VALUE)
            try:
                self._data_pdu(length, deadline)
            except DeadlineMissed as missed:
                raise Aborted("PDU too slow", NOT_SPECIFIED) from missed
            self._check_rate()
            return True
        if kind == _RELEASE_RQ and length == 4 and not in_message:
            self._wire.take(4, deadline)
            self._leave()
            self.acse.send_release(is_response=True)
            self.is_released, self.is_established = True, False
            return False
        if kind == _ABORT and length == 4:
            _log.info("association aborted by the peer", calling_ae_title=loggable(self._calling))
            return False
        raise Aborted("unexpected PDU", UNEXPECTED_PDU if kind in range(1, 8) else UNRECOGNIZED_PDU)

    def _data_pdu(self, length: int, deadline: float) -> None:
        """Serve the presentation data values of a P-DATA-TF PDU (PS3.8 9.3.5)."""
        while length:
            if length < 6:
                raise Aborted("PDU malformed", INVALID_VALUE)
            size, context_id, control = struct.unpack(">LBB", self._wire.take(6, deadline))
            length -= 4 + size
            if size < 2 or length < 0 or (size == 2 and not control & 2):  # of fragments without a byte there could be any number
                raise Aborted("PDU malformed", INVALID_VALUE)
            if context_id not in self._accepted_cx:
                raise Aborted("presentation context not accepted", INVALID_VALUE)
            if self._message_begin is None:
                self._message_begin, self._message_bytes = self._wire.waited, 0
                self._listener.guard.idle(self._connection, is_idle=False)
            self._message_bytes += size
            if control & 1:
                self._take_command(context_id, size - 2, deadline)
                if control & 2:
                    self._command_ended(context_id)
            else:
                self._take_data(context_id, size - 2, deadline)
                if control & 2:
                    self._data_ended()

    def _take_command(self, context_id: int, size: int, deadline: float) -> None:
        if self._store is not None or self._other is not None or (self._command and context_id != self._command_context):
            raise Aborted("a command within a message", INVALID_VALUE)
        self._command_context = context_id
        if len(self._command) + size > _MAXIMUM_COMMAND:
            raise Aborted("command set too large", INVALID_VALUE)
        for chunk in self._wire.chunks(size, deadline):
            self._command += chunk

    def _command_ended(self, context_id: int) -> None:
        encoded, self._command = bytes(self._command), bytearray()
        try:
            command = commands.command_set(encoded)
        except ValueError as error:
            raise Aborted("command set malformed", INVALID_VALUE) from error
        if commands.COMMAND_FIELD not in command or commands.COMMAND_DATA_SET_TYPE not in command:
            raise Aborted("command set malformed", INVALID_VALUE)
        has_data = commands.unsigned(command.get(commands.COMMAND_DATA_SET_TYPE)) != commands.NO_DATA_SET
        if commands.unsigned(command.get(commands.COMMAND_FIELD)) != commands.C_STORE_RQ:
            self._other = (context_id, encoded, bytearray())
            if not has_data:
                self._serve_other()
            return
        if commands.MESSAGE_ID not in command:
            raise Aborted("request without Message ID", INVALID_VALUE)
        self._store = self._begin_store(context_id, command)
        if not has_data:  # the sink says what is wrong with that
            self._finish_store()

    def _take_data(self, context_id: int, size: int, deadline: float) -> None:
        if self._store is not None and self._store.context_id == context_id:
            store = self._store
            store.size += size
            if store.size > self._settings.maximum_message_bytes:
                raise Aborted("data set too large", NOT_SPECIFIED)
            for chunk in self._wire.chunks(size, deadline):
                if store.sink is not None:
                    self._write(store.sink, chunk)
        elif self._other is not None and self._other[0] == context_id:
            if len(self._other[2]) + size > _MAXIMUM_OTHER:
                raise Aborted("data set too large", NOT_SPECIFIED)
            for chunk in self._wire.chunks(size, deadline):
                self._other[2].extend(chunk)
        else:
            raise Aborted("a data set without its command", INVALID_VALUE)

    def _data_ended(self) -> None:
        if self._store is not None:
            self._finish_store()
        else:
            self._serve_other()

    def _check_rate(self) -> None:
        """Abort a message that comes too slowly; only the time that we waited for the peer counts."""
        if self._message_begin is not None:
            waited = self._wire.waited - self._message_begin
            if waited > self._settings.pdu_seconds and self._message_bytes < waited * self._settings.least_bytes_per_second:
                raise Aborted("message too slow", NOT_SPECIFIED)

    def _message_ended(self) -> None:
        self._message_begin = self._store = self._other = None
        self._listener.guard.idle(self._connection, is_idle=True)

    # C-STORE

    def _begin_store(self, context_id: int, command: dict[int, bytes]) -> _Store:
        context = self._accepted_cx[context_id]
        request = StoreRequest(
            association=self._number,
            calling_ae_title=self._calling,
            called_ae_title=self._called,
            context_sop_class_uid=str(context.abstract_syntax),
            sop_class_uid=commands.uid(command.get(commands.AFFECTED_SOP_CLASS_UID)),
            sop_instance_uid=commands.uid(command.get(commands.AFFECTED_SOP_INSTANCE_UID)),
            transfer_syntax_uid=str(context.transfer_syntax[0]),
        )
        store = _Store(context_id=context_id, command=command, sink=None, refusal=None)
        try:
            store.sink = self._listener.receive(request)
        except StoreRefused as refusal:
            store.refusal = refusal
        except Exception:  # noqa: BLE001  the DIMSE boundary: the peer gets a status, the log the traceback
            store.refusal = self._failed()
        return store

    def _write(self, sink: Sink, chunk: memoryview) -> None:
        try:
            sink.write(chunk)
        except StoreRefused as refusal:
            self._refuse_store(refusal)
        except Exception:  # noqa: BLE001  the DIMSE boundary
            self._refuse_store(self._failed())

    def _refuse_store(self, refusal: StoreRefused) -> None:
        """Store nothing of this request; what still comes of it is read and dropped, and then the refusal is answered."""
        assert self._store is not None  # noqa: S101  called within a request only
        sink, self._store.sink, self._store.refusal = self._store.sink, None, refusal
        if sink is not None:
            sink.discard()

    def _finish_store(self) -> None:
        """Make the instance safe, then answer: the one place that turns an error into a status."""
        store = self._store
        assert store is not None  # noqa: S101  called at the end of a request
        sink, store.sink = store.sink, None
        if sink is not None:
            try:
                sink.finish()
            except StoreRefused as refusal:
                store.refusal = refusal
            except Exception:  # noqa: BLE001  the DIMSE boundary
                store.refusal = self._failed()
        failure = store.refusal
        response = commands.store_response(store.command, failure.dimse_status if failure else SUCCESS, str(failure) if failure else "")
        try:
            self._wire.send(commands.pdus(store.context_id, response, self.requestor.maximum_length or 0), self._settings.pdu_seconds)
        except DeadlineMissed as missed:
            raise Aborted("response not taken", NOT_SPECIFIED) from missed
        self._message_ended()

    def _failed(self) -> StoreRefused:
        _log.exception("storing failed", calling_ae_title=loggable(self._calling), status=f"0x{ProcessingFailure.dimse_status:04X}")
        return ProcessingFailure("the node failed; send again later")

    # storage commitment: pynetdicom's service class calls these

    def _asked_to_commit(self, event: Any) -> tuple[Dataset, None]:
        """Handle EVT_N_ACTION: a peer asks this node to commit to what it sent."""
        service = self._listener.commitment
        if service is None or not self._grants.stores:
            return refused(NotAuthorized("this AE may not ask for storage commitment")), None
        return answered(lambda: read_request(event, self._calling), service.request), None

    def _reported(self, event: Any) -> tuple[Dataset, None]:
        """Handle EVT_N_EVENT_REPORT: a peer says what it commits to."""
        service = self._listener.commitment
        if service is None or not self._grants.commits:
            return refused(NotAuthorized("this AE is not asked to commit to anything")), None
        return answered(lambda: read_report(event, self._calling), service.report), None

    # everything else is pynetdicom's

    def _serve_other(self) -> None:
        """Hand a whole request to pynetdicom's DIMSE provider and service classes."""
        assert self._other is not None  # noqa: S101  called at the end of a request
        context_id, command, data = self._other
        primitive = P_DATA()
        primitive.presentation_data_value_list.append((context_id, b"\x03" + command))
        if data:
            primitive.presentation_data_value_list.append((context_id, b"\x02" + bytes(data)))
        try:
            self.dimse.receive_primitive(primitive)
            while not self.dimse.msg_queue.empty():
                _, message = self.dimse.msg_queue.get_nowait()
                self._serve_request(message, context_id)
        except ConnectionLost:
            raise
        except DeadlineMissed as missed:
            raise Aborted("response not taken", NOT_SPECIFIED) from missed
        except Exception as error:
            raise Aborted("request malformed", INVALID_VALUE) from error
        if self._abort_asked or not self.dul.event_queue.empty() or self.dimse.message is not None:
            raise Aborted("request not supported", NOT_SPECIFIED)
        self._message_ended()


def _user_identity(primitive: A_ASSOCIATE) -> tuple[str | None, str | None]:
    """User name and passcode of user identity negotiation of types 1 and 2 (PS3.7 D.3.3.7); of other types nothing is known."""
    for item in primitive.user_information:
        kind = getattr(item, "user_identity_type", None)
        if kind in {1, 2}:
            return (item.primary_field or b"").decode("utf-8"), (item.secondary_field or b"").decode("utf-8") if kind == 2 else None
    return None, None


def answered(read: Callable[[], Message], take: Callable[[Message], None]) -> Dataset:
    """Read a message of storage commitment and take it; return its status, with an Error Comment if it isn't Success."""
    try:
        message = read()
    except CommitmentRefused as refusal:
        return refused(refusal)
    except Exception:  # noqa: BLE001  the DIMSE boundary: what pydicom raises for bytes from a peer is not listed anywhere
        _log.exception("a data set of storage commitment could not be read")
        return refused(InvalidArgument("the data set is malformed"))
    try:
        take(message)
    except CommitmentRefused as refusal:
        return refused(refusal)
    except Exception:  # noqa: BLE001  the DIMSE boundary
        _log.exception("storage commitment failed")
        return refused(CommitmentFailure("the node failed; send again later"))
    status = Dataset()
    status.Status = SUCCESS
    return status


def refused(refusal: CommitmentRefused) -> Dataset:
    """The status that a refused message of storage commitment is answered with."""
    _log.warning("storage commitment refused", status=f"0x{refusal.dimse_status:04X}", reason=str(refusal))
    status = Dataset()
    status.Status = refusal.dimse_status
    status.ErrorComment = str(refusal)[:64]  # PS3.5 6.2 VR LO
    return status


def send_abort(wire: Wire, reason: int) -> None:
    """Send an A-ABORT of the service provider (PS3.8 9.3.8), if the connection still takes it."""
    with contextlib.suppress(ConnectionLost, DeadlineMissed):
        wire.send(struct.pack(">BBLBBBB", _ABORT, 0, 4, 0, 0, 2, reason), 1.0)


def loggable(ae_title: str) -> str:
    """The AE title as a log may hold it."""
    return ae_title if ae_title.isprintable() else "(not printable)"
