"""One connection's bytes: read through one buffer of fixed size, and under deadlines that the peer cannot stretch.

What is read is handed out as views of that buffer, so a data set of any size costs the same memory. Must never know what the
bytes mean; listener.py does.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Final

BUFFER_BYTES: Final = 262144  # two PDUs of the default size: the next one is read while this one is taken


class ConnectionLost(Exception):
    """The peer closed or broke the connection, or another thread ended it."""


class DeadlineMissed(Exception):
    """The peer did not send, or did not take, within the time it had."""


class Wire:
    """A connected socket with its receive buffer. One thread at a time, but for `end`.

    `waited` counts the seconds spent waiting for the peer's bytes, so that the time we take ourselves is never held against it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._quick_ack = connection.family in {socket.AF_INET, socket.AF_INET6} and hasattr(socket, "TCP_QUICKACK")
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = 0  # of what was received and not yet taken
        self._end = 0
        self._ended = False  # shutting down alone doesn't stop what a peer goes on to send
        self.waited = 0.0
        if self._quick_ack:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def wait(self, deadline: float) -> None:
        """Wait until there is a byte. Raises as `take` does."""
        if self._begin == self._end:
            self._begin = self._end = 0
            self._receive(deadline)

    def has_come(self) -> bool:
        """Return whether there is a byte to take, or the end of the connection, without waiting."""
        if self._begin != self._end or self._ended:
            return True
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def end(self) -> None:
        """Make the thread that reads see the end of the connection, now and for good. The one call that another thread may make."""
        self._ended = True
        with contextlib.suppress(OSError):  # ended already
            socket.socket.shutdown(self._socket, socket.SHUT_RD)  # also below TLS, whose own method is for the reading thread alone

    def take(self, count: int, deadline: float) -> memoryview:
        """Return the next `count` bytes, at most BUFFER_BYTES, as a view that holds until the next call.

        `deadline` is a time of time.monotonic().

        Raises:
            ConnectionLost: the connection ended before.
            DeadlineMissed: the bytes did not come in time.
        """
        if self._begin + count > BUFFER_BYTES:
            rest = self._end - self._begin
            self._buffer[:rest] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, rest
        while self._end - self._begin < count:
            self._receive(deadline)
        taken = self._view[self._begin : self._begin + count]
        self._begin += count
        if self._begin == self._end:
            self._begin = self._end = 0  # the view stays good: nothing is received before the next call
        return taken

    def chunks(self, count: int, deadline: float) -> Iterator[memoryview]:
        """Yield the next `count` bytes in views of whatever size they come in; raises as `take` does."""
        while count:
            if self._begin == self._end:
                self._begin = self._end = 0
                self._receive(deadline)
            size = min(count, self._end - self._begin)
            yield self._view[self._begin : self._begin + size]
            self._begin += size
            count -= size

    def send(self, data: bytes, seconds: float) -> None:
        """Send everything within so many seconds. Raises as `take` does."""
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(data)
        except TimeoutError as error:
            raise DeadlineMissed from error
        except (OSError, ValueError) as error:
            raise ConnectionLost from error

    def linger(self, deadline: float) -> None:
        """Read away what still comes until the peer closes or the time is over, as an acceptor shall (PS3.8 9.2, Sta13).

        Who closes first takes the last answer away from a peer that is slow to read it, and with unread bytes resets the connection.
        """
        with contextlib.suppress(ConnectionLost, DeadlineMissed):
            while True:
                self._begin = self._end = 0
                self._receive(deadline)

    def _receive(self, deadline: float) -> None:
        start = time.monotonic()
        if self._ended:
            raise ConnectionLost
        if start >= deadline:
            raise DeadlineMissed
        try:
            self._socket.settimeout(deadline - start)
            received = self._socket.recv_into(self._view[self._end :])
            if self._quick_ack:  # a sender that waits for our acknowledgement gets it at once; the kernel forgets the option by itself
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except TimeoutError as error:
            raise DeadlineMissed from error
        except (OSError, ValueError) as error:
            raise ConnectionLost from error
        finally:
            self.waited += time.monotonic() - start
        if not received:
            raise ConnectionLost
        self._end += received
