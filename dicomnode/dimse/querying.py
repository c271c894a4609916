"""Query/Retrieve as its SCP: C-FIND, C-MOVE and C-GET in the Patient Root and Study Root models (PS3.4 C).

Each runs in the thread of the association that asked, looks between two answers whether that wants to cancel, and is bounded in what it
answers. Must never read the connection, nor know where objects are kept: the association and the holdings do.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Final, Protocol

from pynetdicom.dimse_primitives import C_FIND, C_GET, C_MOVE

from dicomnode.dimse.contexts import EXPLICIT_LITTLE_ENDIAN
from dicomnode.dimse.identifier import (
    Identifier,
    Value,
    is_wholly_known,
    read_identifier,
    unique_keys,
    write_answer,
    write_failed,
)
from dicomnode.dimse.pdu import Aborted, Ended
from dicomnode.dimse.scu import Outgoing, SendOutcome
from dicomnode.dimse.wire import ConnectionLost, DeadlineMissed
from dicomnode.errors import DestinationUnknown, QueryFailure, QueryRefused, QueryTooBroad, RetrievalFailed, RetrievalTooLarge
from dicomnode.logs import get_logger
from storage.records import Peer

SUCCESS, CANCEL, PENDING, PENDING_WITH_WARNING, SUBOPERATIONS_FAILED = 0x0000, 0xFE00, 0xFF00, 0xFF01, 0xB000
MAXIMUM_MATCHES: Final = 5000  # entities that one C-FIND is answered with
MAXIMUM_RETRIEVED: Final = 20_000  # objects that one C-MOVE or C-GET fetches

_log = get_logger(__name__)


class Holdings(Protocol):
    """What the node holds. Each method may raise QueryRefused."""

    def find(self, identifier: Identifier, limit: int) -> Sequence[Mapping[str, Value]]:
        """Return what matches, at most so many, as values by keyword."""

    def held(self, keys: Mapping[str, str], limit: int) -> Sequence[Outgoing]:
        """Return the objects that unique keys name, at most so many."""

    def destination(self, ae_title: str) -> Peer | None:
        """Return the peer that objects may be moved to."""

    def send(self, peer: Peer, objects: Sequence[Outgoing], originator: tuple[str, int]) -> Generator[SendOutcome]:
        """Send objects to a peer, one by one, in the name of who asked for it: AE title and Message ID of the C-MOVE."""


class Conversation(Protocol):
    """The association that asked, as far as a query needs it."""

    calling: str
    called: str

    def respond(self, response: Any, context_id: int) -> None:
        """Send a response."""

    def is_cancelled(self, message_id: int) -> bool:
        """Read what has come meanwhile, and return whether this request is cancelled."""

    def store(self, item: Outgoing, originator: int) -> SendOutcome:
        """Send an object on this very association (C-GET)."""


@dataclass(kw_only=True)
class _Progress:
    """Sub-operations of a retrieval (PS3.4 C.4.2.1.6)."""

    remaining: int
    completed: int = 0
    warnings: int = 0
    failed: list[str] = field(default_factory=list)

    def add(self, outcome: SendOutcome) -> None:
        self.remaining -= 1
        if outcome.state != "sent":
            self.failed.append(outcome.sop_instance_uid)
        elif outcome.error is not None:
            self.warnings += 1
        else:
            self.completed += 1


class Queries:
    """Answers queries and retrievals; shared by all associations of a listener."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    def serve(self, conversation: Conversation, request: Any, context: Any) -> None:
        """Answer one request: a C_FIND, C_MOVE or C_GET primitive that came in an accepted context."""
        began = time.monotonic()
        model, explicit = str(context.abstract_syntax), str(context.transfer_syntax[0]) == EXPLICIT_LITTLE_ENDIAN
        told: dict[str, object] = {"kind": type(request).__name__.replace("_", "-"), "calling_ae_title": conversation.calling}
        answer = _Answer(conversation, request, context.context_id)
        try:
            if str(request.AffectedSOPClassUID) != model:
                raise QueryFailure("the request came outside a presentation context of its class")
            identifier = read_identifier(request.Identifier.getvalue(), str(context.transfer_syntax[0]), model)
            if isinstance(request, C_FIND):
                told |= self._find(answer, identifier, explicit)
            else:
                told |= self._retrieve(answer, identifier, model, explicit)
        except QueryRefused as refusal:
            told |= {"status": f"0x{refusal.dimse_status:04X}", "reason": str(refusal)}
            answer.last(refusal.dimse_status, comment=str(refusal))
        except (Aborted, ConnectionLost, DeadlineMissed, Ended) as end:
            told["reason"] = "the association ended" if isinstance(end, Ended) else type(end).__name__
            raise
        except Exception:  # noqa: BLE001  the DIMSE boundary: the peer gets a status, the log the traceback
            _log.exception("a query failed", calling_ae_title=conversation.calling)
            told["status"] = f"0x{QueryFailure.dimse_status:04X}"
            answer.last(QueryFailure.dimse_status, comment="the node failed; ask again later")
        finally:
            _log.info("query answered", seconds=round(time.monotonic() - began, 3), **told)

    def refuse(self, conversation: Conversation, request: Any, context: Any) -> None:
        """Say that too many queries run."""
        kind = QueryTooBroad if isinstance(request, C_FIND) else RetrievalTooLarge
        _Answer(conversation, request, context.context_id).last(kind.dimse_status, comment="too many queries at a time: ask again later")

    def _find(self, answer: _Answer, identifier: Identifier, explicit: bool) -> dict[str, object]:
        found = self._holdings.find(identifier, MAXIMUM_MATCHES + 1)
        status = PENDING if not found or is_wholly_known(identifier, found[0]) else PENDING_WITH_WARNING
        for number, match in enumerate(found[:MAXIMUM_MATCHES]):
            if answer.is_cancelled():
                answer.last(CANCEL)
                return {"status": "0xFE00", "count": number}
            answer.pending(status, write_answer(identifier, match, ae_title=answer.conversation.called, explicit_vr=explicit))
        if len(found) > MAXIMUM_MATCHES:
            raise QueryTooBroad(f"more than {MAXIMUM_MATCHES} match: ask for less")
        answer.last(SUCCESS)
        return {"status": "0x0000", "count": len(found)}

    def _retrieve(self, answer: _Answer, identifier: Identifier, model: str, explicit: bool) -> dict[str, object]:
        keys = unique_keys(identifier, model)
        request, conversation = answer.request, answer.conversation
        peer = None
        if isinstance(request, C_MOVE):
            peer = self._holdings.destination(str(request.MoveDestination or "").strip())
            if peer is None:
                raise DestinationUnknown("the move destination is no peer that receives")
        objects = self._holdings.held(keys, MAXIMUM_RETRIEVED + 1)
        if len(objects) > MAXIMUM_RETRIEVED:
            raise RetrievalTooLarge(f"more than {MAXIMUM_RETRIEVED} objects match: ask for less")
        progress = _Progress(remaining=len(objects))
        if peer is not None:
            sending = self._holdings.send(peer, objects, (conversation.calling, request.MessageID))
        else:
            sending = (conversation.store(item, request.MessageID) for item in objects)
        cancelled = False
        with closing(sending):
            for outcome in sending if objects else ():
                progress.add(outcome)
                cancelled = answer.is_cancelled()
                if cancelled:
                    break
                if progress.remaining:
                    answer.pending(PENDING, progress=progress)
        status = CANCEL if cancelled else SUBOPERATIONS_FAILED if progress.failed or progress.warnings else SUCCESS
        if status == SUBOPERATIONS_FAILED and len(progress.failed) == len(objects):
            status = RetrievalFailed.dimse_status
        failed = write_failed(progress.failed, explicit_vr=explicit) if progress.failed else None
        answer.last(status, progress=progress, identifier=failed)
        return {
            "status": f"0x{status:04X}",
            "count": progress.completed + progress.warnings,
            "peer": peer.ae_title if peer is not None else conversation.calling,
            "study_instance_uid": keys.get("StudyInstanceUID"),
        }


class _Answer:
    """The responses to one request."""

    def __init__(self, conversation: Conversation, request: Any, context_id: int) -> None:
        self.conversation = conversation
        self.request = request
        self._context_id = context_id

    def is_cancelled(self) -> bool:
        return self.conversation.is_cancelled(self.request.MessageID)

    def pending(self, status: int, identifier: bytes | None = None, progress: _Progress | None = None) -> None:
        self._respond(status, identifier, progress, remaining=True)

    def last(self, status: int, *, comment: str = "", identifier: bytes | None = None, progress: _Progress | None = None) -> None:
        self._respond(status, identifier, progress, comment=comment, remaining=status == CANCEL)

    def _respond(self, status: int, identifier: bytes | None, progress: _Progress | None, *, comment: str = "", remaining: bool) -> None:
        response = type(self.request)()
        response.MessageIDBeingRespondedTo = self.request.MessageID
        response.AffectedSOPClassUID = self.request.AffectedSOPClassUID
        response.Status = status
        if comment:
            response.ErrorComment = comment[:64]  # PS3.5 6.2 VR LO
        if identifier is not None:
            response.Identifier = BytesIO(identifier)
        if progress is not None:
            response.NumberOfRemainingSuboperations = progress.remaining if remaining else None
            response.NumberOfCompletedSuboperations = progress.completed
            response.NumberOfFailedSuboperations = len(progress.failed)
            response.NumberOfWarningSuboperations = progress.warnings
        self.conversation.respond(response, self._context_id)


def is_query(message: Any) -> bool:
    """Whether a message is a request of this service."""
    return isinstance(message, C_FIND | C_GET | C_MOVE) and bool(message.is_valid_request)
