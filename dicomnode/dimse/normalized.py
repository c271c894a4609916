"""How a message of a normalized service (PS3.7 10: N-EVENT-REPORT, N-ACTION, N-SET, N-CREATE) is read, taken and answered.

Must never let an exception reach the association: whatever is wrong with a message, its peer is told a status.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from pydicom.dataset import Dataset

from dicomnode.errors import MessageRefused
from dicomnode.logs import get_logger

SUCCESS: Final = 0x0000
Message = TypeVar("Message")

_log = get_logger(__name__)


def answered(
    read: Callable[[], Message], take: Callable[[Message], None], *, malformed: type[MessageRefused], failed: type[MessageRefused]
) -> Dataset:
    """Read a message and take it; return its status, with an Error Comment if it isn't Success.

    `malformed` is what a data set that can't be read is refused as, and `failed` what stands for a failure of the node itself.
    """
    try:
        message = read()
    except MessageRefused as refusal:
        return refused(refusal)
    except Exception:  # noqa: BLE001  the DIMSE boundary: what pydicom raises for bytes from a peer is not listed anywhere
        _log.exception("a data set could not be read")
        return refused(malformed("the data set is malformed"))
    try:
        take(message)
    except MessageRefused as refusal:
        return refused(refusal)
    except Exception:  # noqa: BLE001  the DIMSE boundary
        _log.exception("a message could not be taken")
        return refused(failed("the node failed; send again later"))
    status = Dataset()
    status.Status = SUCCESS
    return status


def refused(refusal: MessageRefused) -> Dataset:
    """The status that a refused message is answered with."""
    _log.warning(f"{refusal.about} refused", status=f"0x{refusal.dimse_status:04X}", reason=str(refusal))
    status = Dataset()
    status.Status = refusal.dimse_status
    status.ErrorComment = str(refusal)[:64]  # PS3.5 6.2 VR LO
    if refusal.error_id is not None:
        status.ErrorID = refusal.error_id
    return status
