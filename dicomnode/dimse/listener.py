"""The listener: accepts connections, guards them, and lets in whom it is told to (PS3.8 9.2, default deny).

Makes pynetdicom's public server class accept and no more: each connection has a thread of its own, where TLS, the association request
and the association happen under deadlines (wire.py, guard.py, association.py). Whom it lets in and what storing means is handed to it: it
must never import storage.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from pynetdicom import AE, _config as pynetdicom_config
from pynetdicom.presentation import build_context
from pynetdicom.transport import AssociationServer, RequestHandler

from dicomnode.config import ListenerSection, TlsSection
from dicomnode.dimse.association import AcceptedAssociation
from dicomnode.dimse.commitment import CommitmentService
from dicomnode.dimse.contexts import (
    ANNOUNCEMENT_SYNTAXES,
    ANNOUNCEMENTS,
    COMMITMENT_SYNTAXES,
    EXPLICIT_LITTLE_ENDIAN,
    FIND_SYNTAXES,
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    IMPLICIT_LITTLE_ENDIAN,
    QUERY_MODELS,
    STORAGE_COMMITMENT,
    VERIFICATION,
    offered_syntaxes,
    storage_class,
)
from dicomnode.dimse.conversation import RunningQuery
from dicomnode.dimse.guard import Guard
from dicomnode.dimse.negotiation import Caller, Grants
from dicomnode.dimse.pdu import (
    ASSOCIATE_RQ,
    INVALID_VALUE,
    NOT_SPECIFIED,
    UNEXPECTED_PDU,
    UNRECOGNIZED_PDU,
    Aborted,
    pdu_header,
    send_abort,
)
from dicomnode.dimse.performed import NoticeService
from dicomnode.dimse.querying import Holdings, Queries
from dicomnode.dimse.scp import StoreRequest
from dicomnode.dimse.storing import Sink
from dicomnode.dimse.tls import ServerContexts
from dicomnode.dimse.wire import ConnectionLost, DeadlineMissed, Wire
from dicomnode.logs import get_logger

_LOGGED_PER_MINUTE: Final = 100
_LOGGED_ADDRESSES: Final = 10_000
_LEAST_REQUEST: Final = 68  # bytes of an association request before its first item (PS3.8 9.3.2)

_log = get_logger(__name__)


class Listener:
    """Accepts associations from start() to stop().

    `admit` is asked at every association and returns None, or the reason for log and metrics why the caller is not let in; the
    caller gets one and the same rejection. `receive` makes the sink of each C-STORE request, or raises StoreRefused. `released` is
    called once per association that was let in, with its number, after its last store has ended: on release, on abort and on a broken
    connection. `grants` says what a caller that was let in may do, by its AE title, `commitment` what messages of storage commitment
    mean, and queries are answered from `holdings`; without it there are none. `is_peer` says from memory whether an address is a
    peer's. `count` is told of each refusal.
    """

    def __init__(
        self,
        settings: ListenerSection,
        ae_titles: Sequence[str],
        *,
        admit: Callable[[Caller], str | None],
        receive: Callable[[StoreRequest], Sink],
        released: Callable[[int], None] = lambda _association: None,
        grants: Callable[[str], Grants] = lambda _ae_title: Grants(stores=True, commits=False),
        commitment: CommitmentService | None = None,
        notices: NoticeService | None = None,
        holdings: Holdings | None = None,
        is_peer: Callable[[str], bool] = lambda _address: False,
        count: Callable[[str], None] = lambda _refusal: None,
        tls: TlsSection | None = None,
    ) -> None:
        self.settings = settings
        self.ae_titles = tuple(ae_titles)
        self.admit = admit
        self.receive = receive
        self.released = released
        self.grants = grants
        self.commitment = commitment
        self.notices = notices
        self._queries = Queries(holdings) if holdings is not None else None
        self._queries_at_a_time = threading.BoundedSemaphore(settings.maximum_queries)
        self.count = count
        self.numbers = itertools.count(1)
        self.guard = Guard(settings, is_peer)
        self.contexts = _Contexts(
            [syntax.uid for syntax in offered_syntaxes(accept_deflated=settings.accept_deflated)],
            queries=holdings is not None,
            notices=notices is not None,
        )
        self.entity = AE(self.ae_titles[0])
        self.entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        self.entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        self.entity.maximum_pdu_size = settings.maximum_pdu_bytes
        self.entity.add_supported_context(VERIFICATION)
        self._log_lock = threading.Lock()
        self._log_minute = 0
        self._logged: Counter[str] = Counter()  # lines of this minute by address: an attacker must not fill the disk with our log
        self._tls = tls if tls is not None and tls.certificate is not None else None
        self._servers: list[_Server] = []
        pynetdicom_config.LOG_HANDLER_LEVEL = "none"  # its handlers would format each PDU of ours for a log that nobody keeps

    @property
    def port(self) -> int:
        """The TCP port that it listens on, between start() and stop()."""
        return int(self._servers[0].server_address[1])

    @property
    def tls_port(self) -> int | None:
        """The TCP port for DICOM over TLS, between start() and stop(); None if there is none."""
        return int(self._servers[1].server_address[1]) if len(self._servers) > 1 else None

    def start(self) -> None:
        """Bind and listen; returns at once.

        Raises:
            OSError: an address can't be bound.
            ConfigError: the TLS files can't be used.
        """
        contexts = ServerContexts(self._tls) if self._tls is not None else None
        self._servers.append(self._serve(self.settings.port, None, 0.0))
        try:
            if self._tls is not None and contexts is not None:
                self._servers.append(self._serve(self._tls.port, contexts.current, self._tls.handshake_seconds))
        except OSError:
            self.stop(0)
            raise
        for port in filter(None, (self.port, self.tls_port)):
            _log.info("listening", host=self.settings.host, port=port, ae_title=self.ae_titles[0])

    def stop(self, drain_seconds: float) -> None:
        """Accept no more associations, wait up to `drain_seconds` for those that run, abort the rest, and return."""
        if not self._servers:
            return
        for server in self._servers:
            server.shutdown()
        self._servers = []
        self.guard.drain(drain_seconds, "the node stops")
        _log.info("stopped listening", ae_title=self.ae_titles[0])

    def serve_query(self, conversation: RunningQuery, request: Any, context: Any) -> None:
        """Answer a query or retrieval, or say that too many run."""
        if self._queries is None:
            raise Aborted("request not supported", NOT_SPECIFIED)
        if not self._queries_at_a_time.acquire(blocking=False):
            self.count("query refused: too many at a time")
            self._queries.refuse(conversation, request, context)
            return
        try:
            self._queries.serve(conversation, request, context)
        finally:
            self._queries_at_a_time.release()

    def refuse(self, what: str, reason: str, **told: object) -> None:
        """Count that somebody was refused something, and log it, of one address at most so many times a minute."""
        self.count(f"{what}: {reason}")
        minute, host = int(time.monotonic() // 60), str(told.get("host"))
        with self._log_lock:
            if self._log_minute != minute or len(self._logged) > _LOGGED_ADDRESSES:
                self._log_minute = minute
                self._logged.clear()
            self._logged[host] += 1
            lines = self._logged[host]
        if lines <= _LOGGED_PER_MINUTE:
            _log.warning(what, reason=reason, **told)
        if lines == _LOGGED_PER_MINUTE:
            _log.warning("what else this address is refused in this minute is only counted", host=host)

    def _serve(self, port: int, tls_context: Callable[[], ssl.SSLContext] | None, handshake_seconds: float) -> _Server:
        server: _Server = self.entity.make_server(
            (self.settings.host, port),
            server_class=_Server,
            request_handler=Connection,
            listener=self,
            tls_context=tls_context,
            handshake_seconds=handshake_seconds,
        )
        self.entity._servers.append(server)  # its shutdown() takes the server off this list
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="dicom-listener", daemon=True).start()
        return server


class _Contexts:
    """The presentation contexts that are accepted, each made once and shared by all associations: negotiation only reads them."""

    def __init__(self, syntaxes: list[str], *, queries: bool, notices: bool) -> None:
        self._syntaxes = syntaxes
        # For a C-GET, in which the node sends: as the caller takes it, and what most objects can be sent in first.
        self._first_uncompressed = [EXPLICIT_LITTLE_ENDIAN, IMPLICIT_LITTLE_ENDIAN]
        self._first_uncompressed += [syntax for syntax in syntaxes if syntax not in self._first_uncompressed]
        self._queries = {uid: build_context(uid, list(FIND_SYNTAXES)) for uid in QUERY_MODELS} if queries else {}
        self._notices = {uid: build_context(uid, list(ANNOUNCEMENT_SYNTAXES)) for uid in ANNOUNCEMENTS} if notices else {}
        self._made: dict[str, Any] = {}
        self._verification = build_context(VERIFICATION)
        self._commitment = build_context(STORAGE_COMMITMENT, list(COMMITMENT_SYNTAXES))
        # PS3.4 J.3.3: who reports on an association of its own proposes itself as SCP. Some forget to, so either role is taken; what
        # the caller may say in which one is judged by the message.
        self._commitment.scu_role = self._commitment.scp_role = True

    def of(self, requested: set[str], grants: Grants, roles: Mapping[str, tuple[bool, bool]] = MappingProxyType({})) -> list[Any]:
        """Return the contexts for those of the abstract syntaxes that the table has and the caller is granted.

        `roles` are the roles (SCU, SCP) that the caller proposes for itself, by class: one that queries may be the SCP of what it fetches.
        """
        for uid in requested - self._made.keys():
            if storage_class(uid) is not None:
                self._made[uid] = build_context(uid, self._syntaxes)
        contexts = [self._verification]
        if grants.queries:
            contexts += [self._queries[uid] for uid in sorted(requested) if uid in self._queries]
        fetched = {uid for uid, (_, as_scp) in roles.items() if as_scp and grants.queries and uid in self._made} & requested
        contexts += [self._fetched(uid, grants) for uid in sorted(fetched)]
        if grants.stores:
            contexts += [self._made[uid] for uid in sorted(requested - fetched) if uid in self._made]
            contexts += [self._notices[uid] for uid in sorted(requested) if uid in self._notices]
        if (grants.stores or grants.commits) and STORAGE_COMMITMENT in requested:
            contexts.append(self._commitment)
        return contexts

    def _fetched(self, uid: str, grants: Grants) -> Any:
        """The context of a class of which the caller is the SCP, and the SCU too if it may store."""
        context = build_context(uid, self._first_uncompressed)
        context.scu_role, context.scp_role = grants.stores, True
        return context


class _Server(AssociationServer):  # type: ignore[misc]  # pynetdicom is untyped here
    """The accepting socket. Its loop accepts and starts threads; nothing in it waits for a peer."""

    request_queue_size = 128

    def __init__(
        self,
        *args: Any,
        listener: Listener,
        tls_context: Callable[[], ssl.SSLContext] | None,
        handshake_seconds: float,
        **kwargs: Any,
    ) -> None:
        self.listener = listener
        self.tls_context = tls_context
        self.handshake_seconds = handshake_seconds
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        """Bind; several processes may share the port if the settings say so."""
        if self.listener.settings.processes > 1:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()
        self.socket.settimeout(None)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept and no more: pynetdicom's makes the TLS handshake here, in front of everybody else."""
        try:
            connection, address = self.socket.accept()
        except OSError as error:  # out of descriptors: the connection stays in the queue, so don't spin on it
            _log.error("a connection could not be accepted", reason=error.strerror)
            time.sleep(0.05)
            raise
        return connection, address

    def service_actions(self) -> None:
        """Do nothing: pynetdicom's runs the garbage collector in the accept loop."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what the accept loop could not do, e.g. start a thread; socketserver's prints it."""
        del request, client_address
        _log.exception("a connection could not be served")


class Connection(RequestHandler):  # type: ignore[misc]  # pynetdicom is untyped here
    """One connection from its first byte to its last, in a thread of its own.

    socketserver makes it in the accept loop and calls handle(), which starts the thread.
    """

    server: _Server

    def setup(self) -> None:
        """Note whose connection it is; from here on the socket is ours to close."""
        self.address = str(self.client_address[0])
        self._socket: socket.socket = self.request
        self._wire: Wire | None = None
        self._gave_way: str | None = None
        self._listener = self.server.listener

    def handle(self) -> None:
        """Count the connection and start its thread."""
        self._listener.guard.opened(self)
        try:
            threading.Thread(target=self._run, name=f"connection-{self.address}", daemon=True).start()
        except RuntimeError:  # no more threads
            self._listener.guard.closed(self)
            self._socket.close()
            raise

    def give_way(self, reason: str) -> None:
        """End soon: whatever the thread waits for on this connection ends now."""
        self._gave_way = reason
        if self._wire is not None:
            self._wire.end()
        else:  # in its TLS handshake
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:  # noqa: BLE001  the DIMSE boundary: nobody above this thread would see it
            _log.exception("a connection failed", host=self.address)
        finally:
            self._listener.guard.closed(self)
            self._socket.close()

    def _serve(self) -> None:
        """Shake hands, read the association request, and serve the association."""
        deadline = time.monotonic() + self._listener.settings.association_seconds
        try:
            if self.server.tls_context is not None:
                self._shake_hands(self.server.tls_context())
            wire = self._wire = Wire(self._socket)
            if self._gave_way:
                raise ConnectionLost
        except ssl.SSLError as error:
            self._refuse("TLS handshake", kind=error.reason or type(error).__name__)
            return
        except (ConnectionLost, OSError):
            self._lost()
            return
        try:
            kind, length = pdu_header(wire, deadline)
            if kind != ASSOCIATE_RQ:
                raise Aborted("not an association request", UNEXPECTED_PDU if kind in range(1, 8) else UNRECOGNIZED_PDU)
            if not _LEAST_REQUEST <= length <= self._listener.settings.maximum_association_request_bytes:
                raise Aborted(
                    "association request too large" if length > _LEAST_REQUEST else "association request malformed", INVALID_VALUE
                )
            request = b"".join([struct.pack(">BBL", kind, 0, length), *map(bytes, wire.chunks(length, deadline))])
        except Aborted as aborted:
            self._refuse(aborted.why)
            send_abort(wire, aborted.reason)
            wire.linger(deadline)
        except DeadlineMissed:
            self._refuse("no association request in time")
        except ConnectionLost:
            self._lost()
        else:
            association = AcceptedAssociation(self._listener, self, wire)
            association.serve(request)
            association.__dict__.clear()  # its parts refer to each other: else they would wait for the garbage collector, 20 KB each

    def _shake_hands(self, context: ssl.SSLContext) -> None:
        self._socket.settimeout(self.server.handshake_seconds)
        try:
            self._socket = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            if self._gave_way:
                raise ConnectionLost
            self._socket.do_handshake()
        except TimeoutError as error:
            raise ssl.SSLError("the handshake took too long") from error

    def certificate(self) -> bytes | None:
        """The client's certificate, DER, if the connection is TLS."""
        return self._socket.getpeercert(binary_form=True) if isinstance(self._socket, ssl.SSLSocket) else None

    @property
    def gave_way(self) -> str | None:
        """The limit for which this connection had to go, if it had."""
        return self._gave_way

    def _lost(self) -> None:
        if self._gave_way:  # who comes and goes without a word, like a load balancer's probe, is nobody's trouble
            self._refuse(self._gave_way)

    def _refuse(self, reason: str, **told: object) -> None:
        self._listener.refuse("connection refused", reason, host=self.address, **told)
