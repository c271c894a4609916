"""Who asks for an association, what it is let do, and what pynetdicom's ACSE needs to negotiate it in the connection's one thread.

Must never decide who is let in.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_RELEASE_RP, P_DATA_TF
from pynetdicom.pdu_primitives import A_ABORT, A_ASSOCIATE, A_P_ABORT, A_RELEASE, P_DATA

from dicomnode.dimse.pdu import INVALID_VALUE, Aborted
from dicomnode.dimse.wire import Wire

USER_IDENTITY: Final = "user identity"  # the reason of `admit` for a caller who lacks nothing else: it may stand in the rest of the request


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
    queries: bool = False  # ask what this node holds, and fetch it


def caller_of(request: bytes, address: str, certificate: bytes | None) -> Caller:
    """Return who calls, by what stands at fixed places in the request (PS3.8 9.3.2); who the user is stands further on.

    Raises:
        Aborted: an AE title isn't ASCII.
    """
    try:
        called, calling = request[10:26].decode("ascii"), request[26:42].decode("ascii")
    except UnicodeDecodeError as error:
        raise Aborted("association request malformed", INVALID_VALUE) from error
    return Caller(
        calling_ae_title=calling.strip(" "),
        called_ae_title=called.strip(" "),
        address=address,
        certificate=certificate,
        user=None,
        passcode=None,
    )


def user_identity(primitive: A_ASSOCIATE) -> tuple[str | None, str | None]:
    """Return user name and passcode of user identity negotiation of types 1 and 2 (PS3.7 D.3.3.7); of other types nothing is known."""
    for item in primitive.user_information:
        kind = getattr(item, "user_identity_type", None)
        if kind in {1, 2}:
            return (item.primary_field or b"").decode("utf-8"), (item.secondary_field or b"").decode("utf-8") if kind == 2 else None
    return None, None


def loggable(ae_title: str) -> str:
    """Return the AE title as a log may hold it."""
    return ae_title if ae_title.isprintable() else "(not printable)"


class UpperLayer:
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
