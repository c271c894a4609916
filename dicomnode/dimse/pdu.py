"""PDUs of the upper layer by hand, below what pynetdicom's ACSE makes: headers, rejections, aborts (PS3.8 9.3).

Must never know what an association is about.
"""

from __future__ import annotations

import contextlib
import struct
from typing import Final

from dicomnode.dimse.wire import ConnectionLost, DeadlineMissed, Wire

ASSOCIATE_RQ, ASSOCIATE_RJ, P_DATA_TF, RELEASE_RQ, ABORT = 0x01, 0x03, 0x04, 0x05, 0x07

# PS3.8 9.3.4: rejected-permanent, by the service user, no reason given. It is the answer to every caller that is not let in, so
# that nobody learns which AE titles exist here.
REJECTED: Final = (0x01, 0x01, 0x01)
LIMIT_EXCEEDED: Final = (0x02, 0x03, 0x02)  # rejected-transient, by the service provider (presentation), local limit exceeded
PROTOCOL_VERSION: Final = (0x01, 0x02, 0x02)

# PS3.8 9.3.8: reasons of an A-ABORT by the service provider
NOT_SPECIFIED, UNRECOGNIZED_PDU, UNEXPECTED_PDU, INVALID_VALUE = 0, 1, 2, 6


class Aborted(Exception):
    """The association has to be aborted by us: the provider's reason (PS3.8 9.3.8) for the peer, `why` for log and metrics."""

    def __init__(self, why: str, reason: int) -> None:
        super().__init__(why)
        self.why = why
        self.reason = reason


class Ended(Exception):
    """The association has ended as associations do: it was released, or the peer aborted it."""


def pdu_header(wire: Wire, deadline: float) -> tuple[int, int]:
    """Read the six bytes that every PDU begins with (PS3.8 9.3.1): its type, and the bytes that follow."""
    kind, _, length = struct.unpack(">BBL", wire.take(6, deadline))
    return kind, length


def rejection(answer: tuple[int, int, int]) -> bytes:
    """Encode an A-ASSOCIATE-RJ with result, source and reason (PS3.8 9.3.4)."""
    return struct.pack(">BBLBBBB", ASSOCIATE_RJ, 0, 4, 0, *answer)


def send_abort(wire: Wire, reason: int) -> None:
    """Send an A-ABORT of the service provider (PS3.8 9.3.8), if the connection still takes it."""
    with contextlib.suppress(ConnectionLost, DeadlineMissed):
        wire.send(struct.pack(">BBLBBBB", ABORT, 0, 4, 0, 0, 2, reason), 1.0)
