"""C-STORE as its SCP: a request's data set goes into a sink as it comes and is never held in memory (PS3.7 9.1.1).

What a sink raises is the only way to a failure status. Must never read from the connection: the association does, and hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dicomnode.dimse import command as commands
from dicomnode.dimse.negotiation import loggable
from dicomnode.dimse.scp import ReceivedInstance, StoreRequest
from dicomnode.errors import ProcessingFailure, StoreRefused
from dicomnode.logs import get_logger

SUCCESS = 0x0000

_log = get_logger(__name__)


class Sink(Protocol):
    """Where the data set of one C-STORE request goes. Every sink is finished or discarded, once."""

    def write(self, chunk: memoryview) -> None:
        """Take the next bytes; the view holds until this returns. May raise StoreRefused: the rest is not handed over."""

    def finish(self) -> None:
        """Return once the instance is safe, or raise StoreRefused; either way nothing is left to do."""

    def discard(self) -> None:
        """Forget the instance: its data set will not be whole."""


def in_memory(store: Callable[[ReceivedInstance], None]) -> Callable[[StoreRequest], Sink]:
    """Make sinks that keep a data set in memory and hand it to `store`, which may raise StoreRefused, when it is whole."""

    class _Memory:
        def __init__(self, request: StoreRequest) -> None:
            self._request = request
            self._data = bytearray()

        def write(self, chunk: memoryview) -> None:
            self._data += chunk

        def finish(self) -> None:
            store(ReceivedInstance(**vars(self._request), dataset=bytes(self._data)))

        def discard(self) -> None:
            self._data.clear()

    return _Memory


@dataclass(kw_only=True)
class Store:
    """A C-STORE request whose data set is being received."""

    context_id: int
    command: dict[int, bytes]
    calling_ae_title: str
    sink: Sink | None = None
    refusal: StoreRefused | None = None
    size: int = 0

    def begin(self, request: StoreRequest, receive: Callable[[StoreRequest], Sink]) -> None:
        """Ask for the sink."""
        try:
            self.sink = receive(request)
        except StoreRefused as refusal:
            self.refusal = refusal
        except Exception:  # noqa: BLE001  the DIMSE boundary: the peer gets a status, the log the traceback
            self.refusal = self._failed()

    def write(self, chunk: memoryview) -> None:
        """Hand on the next bytes, unless the request is refused already."""
        if self.sink is None:
            return
        try:
            self.sink.write(chunk)
        except StoreRefused as refusal:
            self._refuse(refusal)
        except Exception:  # noqa: BLE001  the DIMSE boundary
            self._refuse(self._failed())

    def finish(self) -> bytes:
        """Make the instance safe, then return the response."""
        failure = self.end()
        return commands.store_response(self.command, failure.dimse_status if failure else SUCCESS, str(failure) if failure else "")

    def end(self) -> StoreRefused | None:
        """Make the instance safe, or return why it isn't: the one place that turns an error into a status."""
        sink, self.sink = self.sink, None
        if sink is not None:
            try:
                sink.finish()
            except StoreRefused as refusal:
                self.refusal = refusal
            except Exception:  # noqa: BLE001  the DIMSE boundary
                self.refusal = self._failed()
        return self.refusal

    def discard(self) -> None:
        """Forget the instance: its data set will not be whole."""
        if self.sink is not None:
            self.sink.discard()

    def _refuse(self, refusal: StoreRefused) -> None:
        """Store nothing of this request; what still comes of it is read and dropped, and then the refusal is answered."""
        sink, self.sink, self.refusal = self.sink, None, refusal
        if sink is not None:
            sink.discard()

    def _failed(self) -> StoreRefused:
        _log.exception("storing failed", calling_ae_title=loggable(self.calling_ae_title), status=f"0x{ProcessingFailure.dimse_status:04X}")
        return ProcessingFailure("the node failed; send again later")
