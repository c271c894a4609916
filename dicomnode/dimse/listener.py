"""The listener: associations, default deny, and the answers of the Verification and Storage SCP (PS3.4 A and B).

Everything that bends pynetdicom stands here. Whom it lets in and what storing means is handed to it: it must never import
storage, and what `store` raises is the only way to a failure status.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from pydicom import config as pydicom_config
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.presentation import build_context
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from dicomnode.config import ListenerSection
from dicomnode.dimse.contexts import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    TRANSFER_SYNTAXES,
    VERIFICATION,
    storage_class,
)
from dicomnode.dimse.scp import ReceivedInstance
from dicomnode.errors import ProcessingFailure, StoreRefused
from dicomnode.logs import get_logger

SUCCESS = 0x0000
# PS3.8 9.3.4: rejected-permanent, by the service user, no reason given. It is the answer to every caller that is not let in, so
# that nobody learns which AE titles exist here.
_REJECTED = (0x01, 0x01, 0x01)

_log = get_logger(__name__)


class Listener:
    """Accepts associations from start() to stop().

    `may_send` is asked for the calling AE title at every association. `store` returns when an instance is safe, or raises
    StoreRefused. `released` is called once per association that was let in, with its number, after its last store has
    ended: on release, on abort and on a broken connection.
    """

    def __init__(
        self,
        settings: ListenerSection,
        ae_title: str,
        *,
        may_send: Callable[[str], bool],
        store: Callable[[ReceivedInstance], None],
        released: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._ae_title = ae_title
        self._may_send = may_send
        self._store = store
        self._released = released
        self._numbers = itertools.count(1)
        self._server: Any = None
        self._validation_mode = pydicom_config.settings.reading_validation_mode

    @property
    def port(self) -> int:
        """The TCP port that it listens on, between start() and stop()."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Bind and listen; returns at once. Raises OSError if the address can't be bound."""
        # pynetdicom decodes command sets with pydicom, which would warn of a malformed UID and put it into the log. There is no
        # narrower switch than this process-wide one; stop() sets it back. What was received is checked in scp.py.
        self._validation_mode = pydicom_config.settings.reading_validation_mode
        pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
        entity = AE(self._ae_title)
        entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.maximum_associations = self._settings.maximum_associations
        entity.maximum_pdu_size = self._settings.maximum_pdu_bytes
        entity.acse_timeout = self._settings.association_seconds
        entity.dimse_timeout = self._settings.dimse_timeout_seconds
        entity.network_timeout = self._settings.network_timeout_seconds
        entity.add_supported_context(VERIFICATION)
        self._server = entity.make_server(
            (self._settings.host, self._settings.port),
            evt_handlers=[
                (evt.EVT_CONN_OPEN, send_without_delay),
                (evt.EVT_REQUESTED, self._admit),
                (evt.EVT_C_STORE, self._answer_store),
            ],
            server_class=_Server,
            request_handler=_RequestHandler,
        )
        self._server.ended = self._association_ended
        entity._servers.append(self._server)  # its shutdown() takes the server off this list
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="dicom-listener", daemon=True).start()
        _log.info("listening", host=self._settings.host, port=self.port, ae_title=self._ae_title)

    def stop(self, drain_seconds: float) -> None:
        """Accept no more associations, wait up to `drain_seconds` for those that run, abort the rest, and return."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        deadline = time.monotonic() + drain_seconds
        admitted = [association for association in server.active_associations if association.number is not None]
        for association in admitted:  # a connection that never asked for an association has nothing to end: its thread dies with us
            association.join(max(0.0, deadline - time.monotonic()))
        for association in admitted:
            if association.is_alive():
                association.abort()
                association.join(self._settings.association_seconds)
        pydicom_config.settings.reading_validation_mode = self._validation_mode
        _log.info("stopped listening", ae_title=self._ae_title)

    def _admit(self, event: Any) -> None:
        """Reject who may not send here; to the others, support what they ask for as far as the table has it."""
        association = event.assoc
        calling, called = _titles(association)
        if called != self._ae_title or not self._asked(calling):
            _log.warning("association rejected", calling_ae_title=_loggable(calling), called_ae_title=_loggable(called))
            association.acse.send_reject(*_REJECTED)
            association.kill()
            return
        requested = {context.abstract_syntax for context in association.requestor.primitive.presentation_context_definition_list}
        syntaxes = [syntax.uid for syntax in TRANSFER_SYNTAXES]
        association.acceptor.supported_contexts = [
            *association.acceptor.supported_contexts,
            *(build_context(uid, syntaxes) for uid in sorted(requested) if storage_class(uid) is not None),
        ]
        association.number = next(self._numbers)

    def _asked(self, calling: str) -> bool:
        """Ask whether the caller may send; a registry that can't answer lets nobody in."""
        try:
            return self._may_send(calling)
        except Exception:  # noqa: BLE001  the DIMSE boundary: pynetdicom would go on and let the caller in
            _log.exception("the registry could not be asked")
            return False

    def _answer_store(self, event: Any) -> Dataset:
        """Hand one C-STORE request over and return its status; the one place that turns an error into an answer."""
        calling, called = _titles(event.assoc)
        try:
            received = ReceivedInstance(
                association=event.assoc.number,
                calling_ae_title=calling,
                called_ae_title=called,
                context_sop_class_uid=str(event.context.abstract_syntax),
                sop_class_uid=str(event.request.AffectedSOPClassUID or ""),
                sop_instance_uid=str(event.request.AffectedSOPInstanceUID or ""),
                transfer_syntax_uid=str(event.context.transfer_syntax),
                dataset=event.request.DataSet.getvalue() if event.request.DataSet else b"",
            )
            self._store(received)
        except StoreRefused as refusal:
            return _status(refusal.dimse_status, str(refusal))
        except Exception:  # noqa: BLE001  the DIMSE boundary: the peer gets a status, the log the traceback
            _log.exception("storing failed", calling_ae_title=calling, status=f"0x{ProcessingFailure.dimse_status:04X}")
            return _status(ProcessingFailure.dimse_status, "the node failed; send again later")
        return _status(SUCCESS)

    def _association_ended(self, association: Any) -> None:
        """Report the end of an association that was let in."""
        if association.number is None:
            return
        try:
            self._released(association.number)
        except Exception:  # noqa: BLE001  the DIMSE boundary: nobody above this thread would see it
            _log.exception("an association's end could not be recorded")


def send_without_delay(event: Any) -> None:
    """Set TCP_NODELAY on a connection that has just opened: DIMSE waits for each response (pynetdicom: EVT_CONN_OPEN)."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _titles(association: Any) -> tuple[str, str]:
    """Calling and called AE title of an association's request, without padding."""
    request = association.requestor.primitive
    return request.calling_ae_title.strip(), request.called_ae_title.strip()


def _loggable(ae_title: str) -> str:
    return ae_title if ae_title.isprintable() else "(not printable)"


def _status(code: int, comment: str = "") -> Dataset:
    """A status with its Error Comment (0000,0902), which has at most 64 characters (PS3.7 C.3)."""
    status = Dataset()
    status.Status = code
    if comment:
        status.ErrorComment = comment.encode("ascii", "replace").decode("ascii")[:64]
    return status


class _Association(Association):  # type: ignore[misc]  # pynetdicom is untyped here
    """An association that says when its thread ends, and serves every class of the table as storage."""

    number: int | None = None
    connection: socket.socket

    def run(self) -> None:
        """Run the association to its end, then close its socket, which pynetdicom leaves open if shutting it down fails, and say so."""
        try:
            super().run()
        finally:
            self.connection.close()
            self._server.ended(self)

    def _serve_request(self, msg: Any, context_id: int) -> None:
        """Serve a C-STORE request by its context.

        pynetdicom goes by the command's SOP class: for one it doesn't know it aborts, and a request without data set or
        with an empty UID it drops without an answer. Here each gets a status.
        """
        context = self._accepted_cx.get(context_id)
        if not isinstance(msg, C_STORE) or context is None or context.abstract_syntax == VERIFICATION:
            super()._serve_request(msg, context_id)
            return
        if msg.MessageID is None:
            self.abort()
            return
        self._is_paused = True
        StorageServiceClass(self).SCP(msg, context)
        self._is_paused = False


class _RequestHandler(RequestHandler):  # type: ignore[misc]  # pynetdicom is untyped here
    """Makes associations of our kind: pynetdicom names its own class inside this method and offers no other way."""

    def _create_association(self) -> Any:
        association = super()._create_association()
        association.__class__ = _Association
        association.connection = self.request
        return association


class _Server(ThreadedAssociationServer):  # type: ignore[misc]  # pynetdicom is untyped here
    """The accepting socket. Lets many scanners connect at the same moment."""

    request_queue_size = 128
    ended: Callable[[Any], None]
