"""The SCU of Storage and Verification: send stored objects to a peer exactly as they are stored.

A peer marked as TLS is called over TLS with the node's own certificate, or not at all. Must never re-encode a data set, and never try
again by itself: outcomes say what happened, and the engine decides.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from pynetdicom import AE, _config, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.presentation import build_context

from dicomnode.config import TlsSection
from dicomnode.dimse.contexts import (
    COMMITMENT_SYNTAXES,
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    MAXIMUM_CONTEXTS,
    STORAGE_COMMITMENT,
    VERIFICATION,
    storage_class,
    transfer_syntax,
)
from dicomnode.dimse.recoding import recoded_file
from dicomnode.dimse.tls import PeerContext, peer_context
from dicomnode.errors import ConfigError, PeerRefused, PeerUnavailable
from dicomnode.logs import get_logger
from storage.records import Peer, Quirks

SUCCESS = 0x0000
SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.20: the peer accepted the context and refuses the object by its class
WARNINGS = frozenset({0x0001, 0x0107, 0x0116, *range(0xB000, 0xC000)})  # PS3.7 C.4, PS3.4 B.2.3: stored, with a remark
# PS3.4 B.2.3 Refused: Out of Resources; PS3.7 C.5 Processing failure and Resource limitation: later it can work.
TRANSIENT = frozenset({*range(0xA700, 0xA800), 0x0110, 0x0213})
_MAXIMUM_PDU_BYTES = 131072  # responses are small; what we send is cut to what the peer asks for
_LACKING = "peer {} is called over TLS, and this node has no certificate: set tls.certificate, tls.key and tls.ca in dicomnode.toml"

_log = get_logger(__name__)

Pair = tuple[str, str]  # SOP Class UID, Transfer Syntax UID


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A stored Part 10 file to send; its data set's bytes go out unchanged unless they are `recoded`."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    path: Path
    recoded: bool = False  # the file is in another transfer syntax or SOP class, and is written in these
    refers_to: tuple[str, ...] = ()  # SOP Instance UIDs of objects that it says nothing without
    alternatives: tuple[Outgoing, ...] = ()  # what says the same to a peer that doesn't accept it, the best first


@dataclass(frozen=True, kw_only=True)
class SendOutcome:
    """What became of one object. "transient": sending again later can work. `error` also holds a warning of "sent"."""

    sop_instance_uid: str
    state: Literal["sent", "transient", "permanent"]
    status: int | None  # DIMSE status, None if there was no response
    error: str | None
    is_away: bool = False  # there was no association: the peer would have taken no other object either
    sent: Outgoing | None = None  # what went to the peer: the object, or one of its alternatives
    known_since: datetime | None = None  # when the peer refused the object, whose alternatives alone were proposed

    @property
    def is_refused(self) -> bool:
        """Whether the peer takes the object in none of the forms that were proposed, so that another one may help."""
        return self.state == "permanent" and (self.sent is None or self.status == SOP_CLASS_NOT_SUPPORTED)


def send(
    peer: Peer,
    objects: Sequence[Outgoing],
    *,
    calling_ae_title: str,
    tls: TlsSection | None = None,
    timeout_seconds: float = 30,
) -> list[SendOutcome]:
    """Send `objects` to `peer` and return an outcome for each, in their order. See `send_each`."""
    sent = send_each(peer, objects, calling_ae_title=calling_ae_title, tls=tls, timeout_seconds=timeout_seconds)
    outcomes = {outcome.sop_instance_uid: outcome for outcome in sent}
    return [outcomes[item.sop_instance_uid] for item in objects]


def send_each(
    peer: Peer,
    objects: Sequence[Outgoing],
    *,
    calling_ae_title: str,
    tls: TlsSection | None = None,
    timeout_seconds: float = 30,
    at_peer: Collection[str] = (),
    originator: tuple[str, int] | None = None,
) -> Generator[SendOutcome]:
    """Send `objects` to `peer` and give the outcome of each before the next one is sent. Whoever closes the iterator ends the sending.

    One association proposes exactly the pairs of SOP class and transfer syntax that it may send: those of the objects and of their
    alternatives; there are more associations only where there are more than 128 pairs. Of an object and its alternatives goes the
    first whose pair is accepted and, if one can, which refers to objects that the peer has: of those `at_peer`, or of these. `tls`
    is the node's own certificate, for peers that are called over TLS. `originator` is who asked for it by a C-MOVE, and that request's
    Message ID.

    To a peer that was probed, what it refused then isn't proposed, where an object has an alternative that it didn't refuse. If that
    turns out to be out of date, all is proposed on a next association: the peer is another implementation by now, or takes none of that.
    """
    try:
        check_certificate(peer, tls)
    except PeerRefused as error:
        yield from (_outcome(item, "permanent", str(error)) for item in objects)
        return
    # pynetdicom sends a file's bytes as they are only under this process-wide switch; without it each data set is decoded and
    # encoded again. It is set here, at the first sending, and stays: this function is the only sender of files.
    _config.STORE_SEND_CHUNKED_DATASET = True
    left = objects
    there, message_ids = set(at_peer), itertools.cycle(range(1, 65536))
    open_with = partial(association_with, peer, calling_ae_title=calling_ae_title, tls=tls, timeout_seconds=timeout_seconds)
    if peer.quirks is not None:
        left = yield from _send_by(peer.quirks, objects, open_with, there, message_ids, originator)
        if left:
            _log.warning("what probing found out about the peer is out of date", peer=peer.ae_title)
    yield from _send_by(None, left, open_with, there, message_ids, originator)


def _send_by(
    quirks: Quirks | None,
    objects: Sequence[Outgoing],
    open_with: Callable[[Sequence[Pair]], AbstractContextManager[tuple[Any, str | None]]],
    there: set[str],
    message_ids: Iterator[int],
    originator: tuple[str, int] | None,
) -> Generator[SendOutcome, None, Sequence[Outgoing]]:
    """Give the outcome of each object; return those that were not sent since what is known of the peer is out of date."""
    begun = 0
    for group, proposed in _groups(objects, quirks):
        withheld = any(_ways(item, quirks) != _ways(item, None) for item in group)
        with open_with(proposed) as (association, no_association):
            if withheld and _is_another(association, no_association, quirks):
                return objects[begun:]
            trouble: str | None = None
            accepted = {(context.abstract_syntax, context.transfer_syntax[0]) for context in association.accepted_contexts}
            for number, item in enumerate(group):
                if no_association is not None:
                    outcome = replace(_outcome(item, "transient", no_association), is_away=True)
                elif trouble is not None:
                    outcome = _outcome(item, "transient", trouble)
                else:
                    ways = _ways(item, quirks)
                    outcome, trouble = _send_one(association, ways, accepted, there, message_ids, originator)
                    if outcome.is_refused and ways != _ways(item, None):
                        return objects[begun + number :]
                    outcome = replace(outcome, sop_instance_uid=item.sop_instance_uid)
                    if quirks is not None and ways[0] is not item:
                        outcome = replace(outcome, known_since=quirks.probed_at)
                yield outcome
        begun += len(group)
    return ()


def _ways(item: Outgoing, quirks: Quirks | None) -> tuple[Outgoing, ...]:
    """An object and its alternatives, the best first, but for those that the peer refused when it was probed; all if it refused all."""
    ways = (item, *item.alternatives)
    if quirks is None:
        return ways
    return tuple(way for way in ways if way.transfer_syntax_uid not in quirks.refuses.get(way.sop_class_uid, ())) or ways


def _is_another(association: Any, no_association: str | None, quirks: Quirks | None) -> bool:
    """Whether the peer isn't what was probed: by what it calls itself, or as it is there and rejects the association."""
    if quirks is None:
        return False
    if no_association is not None:
        return getattr(getattr(association, "ae", None), "rejection", None) is not None
    named_as = (str(association.acceptor.implementation_class_uid or ""), str(association.acceptor.implementation_version_name or ""))
    return named_as != (quirks.implementation_class_uid, quirks.implementation_version_name)


def _groups(objects: Sequence[Outgoing], quirks: Quirks | None) -> Iterator[tuple[list[Outgoing], list[Pair]]]:
    """Objects in their order, as many at a time as one association has contexts for, and the pairs to propose."""
    group, proposed = list[Outgoing](), set[Pair]()
    for item in objects:
        pairs = {_pair(way) for way in _ways(item, quirks)}
        if len(proposed | pairs) > MAXIMUM_CONTEXTS:
            yield group, sorted(proposed)
            group, proposed = [], set()
        group.append(item)
        proposed |= pairs
    if group:
        yield group, sorted(proposed)


def _send_one(
    association: Any,
    ways: Sequence[Outgoing],
    accepted: Collection[Pair],
    there: set[str],
    message_ids: Iterator[int],
    originator: tuple[str, int] | None,
) -> tuple[SendOutcome, str | None]:
    """Send an object by the first of these ways that the peer accepts; note in `there` which one."""
    outcome, trouble = _outcome(ways[0], "permanent", f"the peer does not accept {named(ways[0])}"), None
    for way in sorted(ways, key=lambda way: not there.issuperset(way.refers_to)):
        if _pair(way) not in accepted:
            continue
        outcome, trouble = _store(association, way, next(message_ids), originator)
        outcome = replace(outcome, sent=way)
        if outcome.status != SOP_CLASS_NOT_SUPPORTED:
            there.add(way.sop_instance_uid)
            break
    return outcome, trouble


def echo(peer: Peer, *, calling_ae_title: str, tls: TlsSection | None = None, timeout_seconds: float = 10) -> bool:
    """Verify that `peer` answers C-ECHO (PS3.4 A); return whether it accepts storage commitment, False if it isn't registered for it.

    Raises:
        PeerUnavailable: no association, or no Success.
        PeerRefused: the peer is to be called over TLS, and this node has no certificate.
    """
    check_certificate(peer, tls)
    pairs = [(VERIFICATION, "1.2.840.10008.1.2")] + [(STORAGE_COMMITMENT, syntax) for syntax in COMMITMENT_SYNTAXES if peer.commits]
    with association_with(peer, pairs, calling_ae_title, tls, timeout_seconds) as (association, trouble):
        if trouble is not None:
            raise PeerUnavailable(f"{peer.ae_title} at {peer.host}:{peer.port}: {trouble}")
        accepted = {context.abstract_syntax for context in association.accepted_contexts}
        status = association.send_c_echo().get("Status") if VERIFICATION in accepted else None
    if status != SUCCESS:
        answer = "nothing" if status is None else f"status 0x{status:04X}"
        raise PeerUnavailable(f"{peer.ae_title} at {peer.host}:{peer.port} answered C-ECHO with {answer}")
    return STORAGE_COMMITMENT in accepted


def classify(status: int) -> Literal["sent", "transient", "permanent"]:
    """Say what a C-STORE status means for the object (PS3.4 B.2.3, PS3.7 C)."""
    if status == SUCCESS or status in WARNINGS:
        return "sent"
    return "transient" if status in TRANSIENT else "permanent"


def check_certificate(peer: Peer, tls: TlsSection | None) -> None:
    """Raise PeerRefused if the peer is to be called over TLS, and this node has no certificate."""
    if peer.tls and (tls is None or tls.certificate is None):
        raise PeerRefused(_LACKING.format(peer.ae_title))


@contextmanager
def association_with(
    peer: Peer,
    pairs: Sequence[Pair],
    calling_ae_title: str,
    tls: TlsSection | None,
    timeout_seconds: float,
    handlers: Sequence[tuple[Any, Callable[[Any], Any]]] = (),
    roles: Sequence[Any] = (),
) -> Iterator[tuple[Any, str | None]]:
    """Open an association; give it, and in words why nothing can be sent on it, or None; release it at the end.

    A peer that accepts the association but none of its contexts is no trouble of the association: each object's context
    was refused.
    """
    entity = _Entity(calling_ae_title)
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = timeout_seconds
    context: PeerContext | None = None
    nothing = SimpleNamespace(accepted_contexts=())
    try:
        socket.getaddrinfo(peer.host, peer.port)
        if peer.tls and tls is not None:
            context = peer_context(tls, pin=peer.client_cert, timeout_seconds=timeout_seconds)
    except (OSError, UnicodeError) as error:  # associate() would raise it
        yield nothing, f"the host {peer.host} is not known: {getattr(error, 'strerror', None) or error}"
        return
    except ConfigError as error:
        yield nothing, str(error)
        return
    try:
        association = entity.associate(
            peer.host,
            peer.port,
            contexts=[build_context(sop_class, syntax) for sop_class, syntax in pairs],
            ae_title=peer.ae_title,
            max_pdu=_MAXIMUM_PDU_BYTES,
            ext_neg=list(roles),
            tls_args=None if context is None else (context, peer.host),
            evt_handlers=[(evt.EVT_CONN_OPEN, _send_without_delay), (evt.EVT_PDU_RECV, entity.note_rejection), *handlers],
        )
        keep_responses(association)
        yield association, _trouble(association, context, entity.rejection)
        if association.is_established:
            association.release()
    finally:
        for connection in [*entity.connections, *(context.connections if context is not None else ())]:
            connection.close()


def _send_without_delay(event: Any) -> None:
    """Set TCP_NODELAY on a connection that has just opened: DIMSE waits for each response (pynetdicom: EVT_CONN_OPEN)."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def keep_responses(association: Any) -> None:
    """Let the association's own thread take no response from whoever waits for it.

    pynetdicom pauses that thread for each request. But if the thread has just passed its checkpoint and not said so yet, it goes on,
    takes the response off the queue and drops it as unexpected: an object that the peer has stored counts as unanswered and is sent
    again. That thread looks without blocking, requests wait; and on an association that we opened there is nothing for it to take.
    """
    take = association.dimse.get_msg
    association.dimse.get_msg = lambda block=False: take(block) if block else (None, None)


def _trouble(association: Any, context: PeerContext | None, rejection: A_ASSOCIATE_RJ | None) -> str | None:
    """Why an association can't be used, or None."""
    if association.is_established or (association.rejected_contexts and not association.accepted_contexts):
        return None
    if rejection is not None:
        return f"the peer rejected the association: {rejection.result_str}, {rejection.reason_str}"
    if context is not None and context.trouble is not None:
        return context.trouble
    return "the peer cannot be reached, or broke off the association request"


class _Entity(AE):  # type: ignore[misc]  # pynetdicom is untyped here
    """An AE that keeps its sockets and a peer's rejection.

    pynetdicom forgets a socket open where its shutdown fails, e.g. if the peer is down, and takes a rejection for a broken connection
    if the peer was quick: its one thread closes the socket before the other one has looked whether it is connected.
    """

    def __init__(self, ae_title: str) -> None:
        super().__init__(ae_title)
        self.connections: list[socket.socket] = []
        self.rejection: A_ASSOCIATE_RJ | None = None

    def note_rejection(self, event: Any) -> None:
        """Handle EVT_PDU_RECV."""
        if isinstance(event.pdu, A_ASSOCIATE_RJ):
            self.rejection = event.pdu

    def _create_socket(self, *arguments: Any) -> Any:
        wrapper = super()._create_socket(*arguments)
        self.connections.append(wrapper.socket)
        return wrapper


def _store(association: Any, item: Outgoing, number: int, originator: tuple[str, int] | None) -> tuple[SendOutcome, str | None]:
    """Send one object; return its outcome, and why no more can be sent on the association, or None."""
    broken = "the association broke before the peer had answered"
    if not association.is_established:
        return _outcome(item, "transient", broken), broken
    try:
        names = (item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid)
        ae_title, message_id = originator or (None, None)
        with recoded_file(item.path, *names) if item.recoded else nullcontext(item.path) as path:
            answer = association.send_c_store(path, msg_id=number, originator_aet=ae_title, originator_id=message_id)
    except OSError as error:
        return _outcome(item, "permanent", f"the stored file cannot be read: {error.strerror}"), None
    except (
        AttributeError,
        ValueError,
        RuntimeError,
    ) as error:  # what pynetdicom raises for a file unlike its Outgoing, or a broken association
        if not association.is_established:
            return _outcome(item, "transient", broken), broken
        return _outcome(item, "permanent", f"the stored file cannot be sent: {error}"), None
    if "Status" not in answer:
        return _outcome(item, "transient", broken), broken
    words = None if answer.Status == SUCCESS else status_in_words(answer)
    words = f"{words}: the peer does not support {named(item)}" if answer.Status == SOP_CLASS_NOT_SUPPORTED else words
    outcome = SendOutcome(sop_instance_uid=item.sop_instance_uid, state=classify(answer.Status), status=answer.Status, error=words)
    return outcome, None


def status_in_words(answer: Any) -> str:
    """Return a response's status, with what the peer adds to it in words."""
    comment = str(answer.get("ErrorComment", "")).strip()
    return f"status 0x{answer.Status:04X}" + (f": {comment}" if comment else "")


def named(item: Outgoing) -> str:
    """Return an object's SOP class and transfer syntax by their names."""
    sop_class, syntax = storage_class(item.sop_class_uid), transfer_syntax(item.transfer_syntax_uid)
    return f"{sop_class.name if sop_class else item.sop_class_uid} in {syntax.name if syntax else item.transfer_syntax_uid}"


def _pair(item: Outgoing) -> Pair:
    return item.sop_class_uid, item.transfer_syntax_uid


def _outcome(item: Outgoing, state: Literal["transient", "permanent"], error: str) -> SendOutcome:
    return SendOutcome(sop_instance_uid=item.sop_instance_uid, state=state, status=None, error=error)
