"""What a query or retrieval does with the association that asked for it, while it runs: responses, C-CANCEL, C-STORE of a C-GET.

Must never change an object but its encoding: one that the peer takes in no context as it is stored goes out between Explicit and
Implicit VR Little Endian, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from pydicom import dcmread
from pynetdicom.dsutils import encode

from dicomnode.dimse import command as commands
from dicomnode.dimse.contexts import EXPLICIT_LITTLE_ENDIAN, IMPLICIT_LITTLE_ENDIAN
from dicomnode.dimse.scu import SUCCESS, Outgoing, SendOutcome, classify

if TYPE_CHECKING:
    from dicomnode.dimse.association import AcceptedAssociation

_CONVERTIBLE: Final = (EXPLICIT_LITTLE_ENDIAN, IMPLICIT_LITTLE_ENDIAN)
_MAXIMUM_CONVERTED: Final = 512 * 2**20  # bytes of an object that is encoded anew, in memory
_READ_BYTES: Final = 262144


class RunningQuery:
    """The association's side of one request, until it is answered."""

    def __init__(self, association: AcceptedAssociation, calling: str, called: str) -> None:
        self._association = association
        self.calling = calling
        self.called = called
        self._cancelled: set[int] = set()
        self._response: dict[int, bytes] | None = None
        self._numbers = itertools.count(1)

    def take(self, command: dict[int, bytes]) -> bool:
        """Take a message without a data set that came meanwhile; return whether it is one that may."""
        kind = commands.unsigned(command.get(commands.COMMAND_FIELD))
        if kind == commands.C_CANCEL_RQ:
            self._cancelled.add(commands.unsigned(command.get(commands.MESSAGE_ID_BEING_RESPONDED_TO)))
        elif kind == commands.C_STORE_RSP and self._response is None:
            self._response = command
        else:
            return False
        return True

    def respond(self, response: Any, context_id: int) -> None:
        """Send a response."""
        self._association.dimse.send_msg(response, context_id)

    def is_cancelled(self, message_id: int) -> bool:
        """Read what has come meanwhile, and return whether this request is cancelled."""
        while self._association.has_come():
            self._association.turn()
        return message_id in self._cancelled

    def store(self, item: Outgoing, originator: int) -> SendOutcome:
        """Send an object on this very association, in which the peer is the SCP of its class; wait for the response."""
        del originator  # PS3.7 9.1.1: of a C-MOVE alone
        chosen = _context_for(self._association.accepted_contexts, item)
        if chosen is None:
            return _failed(item, "the peer accepts no context in which the object could be sent")
        context_id, syntax = chosen
        try:
            with item.path.open("rb") as file:
                chunks = _as_stored(file) if syntax == item.transfer_syntax_uid else _converted(item, syntax)
                return self._send(item, context_id, chunks)
        except (OSError, _Unreadable) as error:
            return _failed(item, f"the stored file cannot be sent: {getattr(error, 'strerror', None) or error}")

    def _send(self, item: Outgoing, context_id: int, chunks: Iterator[bytes]) -> SendOutcome:
        first = next(chunks, b"")  # what can't be read fails before anything is sent
        number = next(self._numbers) % 65536
        self._response = None
        maximum = self._association.requestor.maximum_length or 0
        self._association.send(
            commands.pdus(context_id, commands.store_request(number, item.sop_class_uid, item.sop_instance_uid), maximum)
        )
        for pdus in commands.data_pdus(context_id, itertools.chain([first], chunks), maximum):
            self._association.send(pdus)
        while self._response is None:
            self._association.turn()
        status = commands.unsigned(self._response.get(commands.STATUS))
        if commands.unsigned(self._response.get(commands.MESSAGE_ID_BEING_RESPONDED_TO)) != number:
            return _failed(item, "the peer answered another request")
        words = None if status == SUCCESS else f"status 0x{status:04X}"
        return SendOutcome(sop_instance_uid=item.sop_instance_uid, state=classify(status), status=status, error=words)


class _Unreadable(Exception):
    """A stored file that can't be encoded anew."""


def _context_for(contexts: Iterable[Any], item: Outgoing) -> tuple[int, str] | None:
    """The context in which an object goes out, and its transfer syntax: that of the stored object if the peer takes it."""
    accepted = {
        str(context.transfer_syntax[0]): int(context.context_id)
        for context in contexts
        if context.abstract_syntax == item.sop_class_uid and context.as_scu
    }
    others = _CONVERTIBLE if item.transfer_syntax_uid in _CONVERTIBLE else ()
    return next(((accepted[syntax], syntax) for syntax in (item.transfer_syntax_uid, *others) if syntax in accepted), None)


def _as_stored(file: BinaryIO) -> Iterator[bytes]:
    """The data set of a stored file: what follows its file meta information (PS3.10 7.1)."""
    head = file.read(144)
    if len(head) < 144 or head[128:132] != b"DICM":
        raise _Unreadable("it is no DICOM file")
    file.seek(int.from_bytes(head[140:144], "little"), 1)
    while chunk := file.read(_READ_BYTES):
        yield chunk


def _converted(item: Outgoing, syntax: str) -> Iterator[bytes]:
    """The data set of a stored file, encoded anew."""
    if item.path.stat().st_size > _MAXIMUM_CONVERTED:
        raise _Unreadable("it is too large to be encoded anew")
    encoded = None
    with suppress(Exception):  # what pydicom raises for a data set is not listed anywhere
        encoded = encode(dcmread(item.path), syntax == IMPLICIT_LITTLE_ENDIAN, True)
    if encoded is None:
        raise _Unreadable("it cannot be encoded anew")
    view = memoryview(encoded)
    yield from (bytes(view[start : start + _READ_BYTES]) for start in range(0, len(view), _READ_BYTES))


def _failed(item: Outgoing, error: str) -> SendOutcome:
    return SendOutcome(sop_instance_uid=item.sop_instance_uid, state="permanent", status=None, error=error)
