"""Command sets and the PDUs that carry them, packed and unpacked by hand (PS3.7 6.3 and 9.3.1, PS3.8 9.3.5).

For what happens once per image; everything rarer is left to pynetdicom. Must never know what a request means.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

# elements (0000,eeee) of a command set (PS3.7 E.1)
GROUP_LENGTH: Final = 0x0000
AFFECTED_SOP_CLASS_UID: Final = 0x0002
COMMAND_FIELD: Final = 0x0100
MESSAGE_ID: Final = 0x0110
MESSAGE_ID_BEING_RESPONDED_TO: Final = 0x0120
PRIORITY: Final = 0x0700
COMMAND_DATA_SET_TYPE: Final = 0x0800
STATUS: Final = 0x0900
ERROR_COMMENT: Final = 0x0902
AFFECTED_SOP_INSTANCE_UID: Final = 0x1000

C_STORE_RQ: Final = 0x0001
C_STORE_RSP: Final = 0x8001
C_CANCEL_RQ: Final = 0x0FFF
NO_DATA_SET: Final = 0x0101

P_DATA_TF: Final = 0x04


def command_set(encoded: bytes) -> dict[int, bytes]:
    """Split a command set, Implicit VR Little Endian (PS3.7 6.3.1), into the values of its elements (0000,eeee).

    Raises:
        ValueError: it is cut off, or holds an element of another group.
    """
    values: dict[int, bytes] = {}
    position = 0
    while position < len(encoded):
        if len(encoded) - position < 8:
            raise ValueError("the command set is cut off or malformed")
        group, element, length = struct.unpack_from("<HHL", encoded, position)
        position += 8
        if group != 0 or length > len(encoded) - position:
            raise ValueError("the command set is cut off or malformed")
        values[element] = encoded[position : position + length]
        position += length
    return values


def store_response(command: dict[int, bytes], status: int, comment: str) -> bytes:
    """Encode a C-STORE-RSP (PS3.7 9.3.1.2): the request's UIDs as they came, the status, and an Error Comment of 64 characters."""
    parts = [
        _element(AFFECTED_SOP_CLASS_UID, command.get(AFFECTED_SOP_CLASS_UID, b"")[:64]),
        _element(COMMAND_FIELD, struct.pack("<H", C_STORE_RSP)),
        _element(MESSAGE_ID_BEING_RESPONDED_TO, command[MESSAGE_ID][:2].ljust(2, b"\0")),
        _element(COMMAND_DATA_SET_TYPE, struct.pack("<H", NO_DATA_SET)),
        _element(STATUS, struct.pack("<H", status)),
    ]
    if comment:
        parts.append(_element(ERROR_COMMENT, comment.encode("ascii", "replace")[:64], b" "))
    parts.append(_element(AFFECTED_SOP_INSTANCE_UID, command.get(AFFECTED_SOP_INSTANCE_UID, b"")[:64]))
    body = b"".join(parts)
    return _element(GROUP_LENGTH, struct.pack("<L", len(body))) + body


def store_request(message_id: int, sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """Encode a C-STORE-RQ of medium priority (PS3.7 9.3.1.1)."""
    parts = [
        _element(AFFECTED_SOP_CLASS_UID, sop_class_uid.encode("ascii")),
        _element(COMMAND_FIELD, struct.pack("<H", C_STORE_RQ)),
        _element(MESSAGE_ID, struct.pack("<H", message_id)),
        _element(PRIORITY, struct.pack("<H", 0)),
        _element(COMMAND_DATA_SET_TYPE, struct.pack("<H", 0x0000)),
        _element(AFFECTED_SOP_INSTANCE_UID, sop_instance_uid.encode("ascii")),
    ]
    body = b"".join(parts)
    return _element(GROUP_LENGTH, struct.pack("<L", len(body))) + body


def _element(element: int, value: bytes, padding: bytes = b"\0") -> bytes:
    value += padding * (len(value) % 2)
    return struct.pack("<HHL", 0, element, len(value)) + value


def pdus(context_id: int, command: bytes, maximum_length: int) -> bytes:
    """Put a command set into P-DATA-TF PDUs, none of which is longer than the peer takes (PS3.8 D.1; 0: any length)."""
    step = max(maximum_length - 6, 1) if maximum_length else len(command)
    pdus = []
    for start in range(0, len(command), step):
        fragment = command[start : start + step]
        control = 3 if start + step >= len(command) else 1
        pdus.append(struct.pack(">BBLLBB", P_DATA_TF, 0, len(fragment) + 6, len(fragment) + 2, context_id, control) + fragment)
    return b"".join(pdus)


def data_pdus(context_id: int, chunks: Iterable[bytes], maximum_length: int) -> Iterator[bytes]:
    """Put a data set that comes in chunks into P-DATA-TF PDUs (PS3.8 D.1; a maximum length of 0: any), some at a time."""
    step = max(maximum_length - 6, 1) if maximum_length else 131072
    held = b""
    for chunk in chunks:
        held += chunk
        whole = (len(held) - 1) // step * step if held else 0  # the last fragment says so, so something stays until the end
        if whole > 0:
            yield b"".join(_data_pdu(context_id, held[start : start + step], 0) for start in range(0, whole, step))
            held = held[whole:]
    yield _data_pdu(context_id, held, 2)


def _data_pdu(context_id: int, fragment: bytes, control: int) -> bytes:
    return struct.pack(">BBLLBB", P_DATA_TF, 0, len(fragment) + 6, len(fragment) + 2, context_id, control) + fragment


def unsigned(value: bytes | None) -> int:
    """The US of a value, 0 if there is none."""
    return int.from_bytes((value or b"")[:2], "little")


def uid(value: bytes | None) -> str:
    """A UID as it came, without its padding; bytes that no UID has become U+FFFD."""
    return (value or b"").decode("ascii", "replace").rstrip("\0 ")
