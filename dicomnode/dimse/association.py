"""One association as its acceptor: negotiation by pynetdicom's ACSE, PDUs under deadlines, and each message to whom it is for.

Bends pynetdicom below its ACSE and DIMSE services: instead of two threads and their queues, the one thread of the connection reads
and writes.
"""

from __future__ import annotations

import contextlib
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AddressInformation

from dicomnode.dimse import command as commands
from dicomnode.dimse.commitment import answered, read_report, read_request
from dicomnode.dimse.contexts import ANNOUNCEMENTS, STORAGE_COMMITMENT
from dicomnode.dimse.conversation import RunningQuery
from dicomnode.dimse.negotiation import USER_IDENTITY, Caller, Grants, UpperLayer, caller_of, loggable, user_identity
from dicomnode.dimse.normalized import refused
from dicomnode.dimse.pdu import (
    ABORT,
    INVALID_VALUE,
    LIMIT_EXCEEDED,
    NOT_SPECIFIED,
    P_DATA_TF,
    PROTOCOL_VERSION,
    REJECTED,
    RELEASE_RQ,
    UNEXPECTED_PDU,
    UNRECOGNIZED_PDU,
    Aborted,
    Ended,
    pdu_header,
    rejection,
    send_abort,
)
from dicomnode.dimse.performed import changed, created
from dicomnode.dimse.querying import is_query
from dicomnode.dimse.scp import StoreRequest
from dicomnode.dimse.storing import Store
from dicomnode.dimse.wire import ConnectionLost, DeadlineMissed, Wire
from dicomnode.errors import NotAuthorized, NoticeNotAuthorized
from dicomnode.logs import get_logger

if TYPE_CHECKING:
    from dicomnode.dimse.listener import Connection, Listener

_MAXIMUM_COMMAND = 16384  # bytes of a command set; the largest that the standard defines has some hundred
_MAXIMUM_OTHER = 1048576  # bytes of the data set of a request that is no C-STORE and names no instances

_log = get_logger(__name__)


class AcceptedAssociation(Association):  # type: ignore[misc]  # pynetdicom is untyped here
    """An accepted connection's association. It is never started as the thread that it could be: `serve` runs in the connection's."""

    def __init__(self, listener: Listener, connection: Connection, wire: Wire) -> None:
        super().__init__(listener.entity, "acceptor")
        settings = listener.settings
        self.dul = UpperLayer(wire, settings.pdu_seconds)
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
        self._store: Store | None = None
        self._other: tuple[int, bytes, bytearray] | None = None  # context, command and data set of a request that is no C-STORE
        self._query: tuple[int, Any] | None = None  # context and request of a query that is to be, or being, answered
        self._running: RunningQuery | None = None
        self._message_begin: float | None = None  # wire.waited when the message under way began
        self._message_bytes = 0
        self._received = 0
        self._abort_asked = False
        self._grants = Grants(stores=False, commits=False)
        self.bind(evt.EVT_N_ACTION, self._asked_to_commit)
        self.bind(evt.EVT_N_EVENT_REPORT, self._reported)
        self.bind(evt.EVT_N_CREATE, self._announced)
        self.bind(evt.EVT_N_SET, self._changed)

    def serve(self, request: bytes) -> None:
        """Answer the association request, and serve the association to its end."""
        wire = self._wire
        try:
            if self._negotiate(request):
                self._number = next(self._listener.numbers)
                with contextlib.suppress(Ended):
                    while True:
                        self.turn()
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
        caller = caller_of(request, self._connection.address, self._connection.certificate())
        self._calling, self._called = caller.calling_ae_title, caller.called_ae_title
        if int.from_bytes(request[6:8], "big") & 1 == 0:
            self._reject("protocol version", PROTOCOL_VERSION)
            return False
        reason = self._asked(caller)  # before the rest is decoded: that can cost a stranger's request a fifth of a second
        if reason not in {None, USER_IDENTITY}:
            self._reject(str(reason), REJECTED)
            return False
        pdu = A_ASSOCIATE_RQ()
        try:
            pdu.decode(request)
            self.requestor.primitive = primitive = pdu.to_primitive()
            user, passcode = user_identity(primitive)
        except Exception as error:
            raise Aborted("association request malformed", INVALID_VALUE) from error
        if user is not None:
            reason = self._asked(replace(caller, user=user, passcode=passcode))
        if reason is not None:
            self._reject(reason, REJECTED)
            return False
        limit = self._listener.guard.associated(self._connection, caller.calling_ae_title)
        if limit is not None:
            self._reject(limit, LIMIT_EXCEEDED)
            return False
        requested = {str(context.abstract_syntax) for context in primitive.presentation_context_definition_list}
        self._grants = self._granted()
        roles = {str(uid): (item.scu_role, item.scp_role) for uid, item in self.requestor.role_selection.items()}
        self.acceptor.supported_contexts = self._listener.contexts.of(requested, self._grants, roles)
        try:
            self.acse.negotiate_association()
        except (ConnectionLost, DeadlineMissed):
            raise
        except Exception as error:  # e.g. of a presentation context without an abstract syntax
            raise Aborted("association request malformed", INVALID_VALUE) from error
        return bool(self.is_established)

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
        self._wire.send(rejection(answer), self._settings.pdu_seconds)

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
        if self._store is not None:
            self._store.discard()
        if self._number:
            try:
                self._listener.released(self._number)
            except Exception:  # noqa: BLE001  the DIMSE boundary: nobody above this thread would see it
                _log.exception("an association's end could not be recorded")

    # PDUs

    def has_come(self) -> bool:
        """Return whether something has come to be read."""
        return self._wire.has_come()

    def send(self, pdus: bytes) -> None:
        """Send whole PDUs. Raises Aborted if the peer doesn't take them in time."""
        try:
            self._wire.send(pdus, self._settings.pdu_seconds)
        except DeadlineMissed as missed:
            raise Aborted("message not taken", NOT_SPECIFIED) from missed

    def turn(self) -> None:
        """Read and serve one PDU, waiting for it if need be. Raises Ended at the association's end."""
        if not self._next_pdu():
            raise Ended
        if self._query is not None and self._running is None:  # the PDU of the request has been read to its end
            self._serve_query()

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
        if kind == P_DATA_TF:
            if length > settings.accepted_pdu_bytes:
                raise Aborted("PDU too large", INVALID_VALUE)
            try:
                self._data_pdu(length, deadline)
            except DeadlineMissed as missed:
                raise Aborted("PDU too slow", NOT_SPECIFIED) from missed
            self._check_rate()
            return True
        if kind == RELEASE_RQ and length == 4 and not in_message:
            self._wire.take(4, deadline)
            self._leave()
            self.acse.send_release(is_response=True)
            self.is_released, self.is_established = True, False
            return False
        if kind == ABORT and length == 4:
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
        kind = commands.unsigned(command.get(commands.COMMAND_FIELD))
        if self._running is not None:
            if has_data or not self._running.take(command):
                raise Aborted("a request amid a query", NOT_SPECIFIED)
            self._message_begin = None
            return
        if self._query is not None:
            raise Aborted("a request amid a query", NOT_SPECIFIED)
        if kind == commands.C_CANCEL_RQ and not has_data:  # of what is answered already
            self._message_ended()
            return
        if kind != commands.C_STORE_RQ:
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
                store.write(chunk)
        elif self._other is not None and self._other[0] == context_id:
            names_instances = self._accepted_cx[context_id].abstract_syntax in {STORAGE_COMMITMENT, *ANNOUNCEMENTS}
            if len(self._other[2]) + size > (self._settings.maximum_commitment_bytes if names_instances else _MAXIMUM_OTHER):
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

    def _begin_store(self, context_id: int, command: dict[int, bytes]) -> Store:
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
        store = Store(context_id=context_id, command=command, calling_ae_title=self._calling)
        store.begin(request, self._listener.receive)
        return store

    def _finish_store(self) -> None:
        assert self._store is not None  # noqa: S101  called at the end of a request
        self.send(commands.pdus(self._store.context_id, self._store.finish(), self.requestor.maximum_length or 0))
        self._message_ended()

    # queries and retrievals

    def _serve_query(self) -> None:
        """Answer the query that has come, reading meanwhile what may come amid it."""
        assert self._query is not None  # noqa: S101  called for a query only
        context_id, request = self._query
        self._running = RunningQuery(self, self._calling, self._called)
        try:
            self._listener.serve_query(self._running, request, self._accepted_cx[context_id])
        except DeadlineMissed as missed:
            raise Aborted("response not taken", NOT_SPECIFIED) from missed
        self._query = self._running = None
        self._message_ended()

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

    # what modalities and archives announce: likewise

    def _announced(self, event: Any) -> tuple[Dataset, Dataset | None]:
        """Handle EVT_N_CREATE: a procedure step has begun, or instances are available."""
        service = self._listener.notices
        if service is None or not self._grants.stores:
            return refused(NoticeNotAuthorized("this AE may not announce anything")), None
        return created(event, self._calling.strip(" "), service.announce)

    def _changed(self, event: Any) -> tuple[Dataset, None]:
        """Handle EVT_N_SET: a procedure step goes on or has ended."""
        service = self._listener.notices
        if service is None or not self._grants.stores:
            return refused(NoticeNotAuthorized("this AE may not announce anything")), None
        return changed(event, self._calling.strip(" "), service.change)

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
                if is_query(message):
                    self._query, self._other, self._message_begin = (context_id, message), None, None
                    return
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
