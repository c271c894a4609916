"""The HTTP server: connections under deadlines, TLS, and how many requests there are at a time.

uvicorn waits for ever for a header that doesn't come and for a response that isn't taken; here both end. Must never log an address
that was asked for: a search names patients.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import h11
import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dicomnode.config import TlsSection, WebSection
from dicomnode.dimse.tls import ServerContexts
from dicomnode.errors import NodeError
from dicomnode.logs import get_logger

MAXIMUM_HEADER_BYTES: Final = 65536
MAXIMUM_MESSAGE_BYTES: Final = 4096  # of a WebSocket, on which nobody has anything to say to the node
LEAST_BYTES_PER_SECOND: Final = 1024  # of a request, once it has taken longer than the time-out
_SILENT_CONNECTIONS: Final = 4  # times maximum_connections may be open, since most say nothing: what is more is closed at once
_CLOSING: Final = {"Connection": "close"}  # in the midst of a request that was not read to its end

_log = get_logger(__name__)


class WebServer:
    """Serves an application from start() to stop(), in a thread of its own."""

    def __init__(self, settings: WebSection, tls: TlsSection, application: ASGIApp) -> None:
        self._settings = settings
        self._tls = tls
        self._application = application
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The TCP port that it listens on, between start() and stop()."""
        return self._port

    def start(self) -> None:
        """Bind and listen; returns when requests are served.

        Raises:
            OSError: the address can't be bound.
            ConfigError: the TLS files can't be used.
        """
        settings = self._settings
        contexts = None
        if settings.tls != "off":
            contexts = ServerContexts(self._tls, client_certificates=settings.tls == "mutual")
        configuration = uvicorn.Config(
            Deadlines(self._application, settings),
            http=_Connection,
            ws="websockets-sansio",
            ws_max_size=MAXIMUM_MESSAGE_BYTES,
            ws_ping_interval=settings.network_timeout_seconds,
            ws_ping_timeout=settings.network_timeout_seconds,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=settings.maximum_connections,
            h11_max_incomplete_event_size=MAXIMUM_HEADER_BYTES,
            ssl_context_factory=None if contexts is None else lambda _configuration, _default: _following(contexts),
        )
        configuration.header_seconds = settings.header_seconds  # type: ignore[attr-defined]  # for the connections, which see this alone
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=128)
        self._port = int(listening.getsockname()[1])
        self._server = server = uvicorn.Server(configuration)
        self._thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="web-server", daemon=True)
        self._thread.start()
        while not server.started:
            if not self._thread.is_alive():
                raise NodeError("the web server could not start; the log says why")
            time.sleep(0.01)
        _log.info("listening", host=settings.host, port=self._port)

    def stop(self, drain_seconds: float = 30.0) -> None:
        """Take no more connections, wait up to `drain_seconds` for the requests that run, and return."""
        if self._server is None or self._thread is None:
            return
        self._server.config.timeout_graceful_shutdown = int(drain_seconds)
        self._server.should_exit = True
        self._thread.join()
        self._server = self._thread = None


def is_loopback(host: str) -> bool:
    """Whether who binds this address is heard on this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Deadlines:
    """Ends requests that are too slow or too large, and those whose response isn't taken (an ASGI application around another)."""

    def __init__(self, application: ASGIApp, settings: WebSection) -> None:
        self._application = application
        self._seconds = settings.network_timeout_seconds
        self._maximum = settings.maximum_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        abort: Callable[[], None] = scope.get("state", {}).get("abort", lambda: None)
        whole, taken, waited = False, 0, 0.0

        async def receiving() -> Message:
            nonlocal whole, taken, waited
            if whole:  # what is waited for now is that the caller goes away
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._seconds):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "Nothing of the request came for too long.", _CLOSING) from None
            waited += time.monotonic() - began
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > self._maximum:
                raise HTTPException(413, f"A request has at most {self._maximum} bytes.")
            if waited > self._seconds and taken < LEAST_BYTES_PER_SECOND * (waited - self._seconds):
                raise HTTPException(408, "The request came too slowly.", _CLOSING)
            return message

        async def sending(message: Message) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                _log.warning("a response was not taken in time and the connection is closed")
                abort()

        await self._application(scope, receive if scope["type"] == "websocket" else receiving, sending)


class _Connection(H11Protocol):
    """A connection that is closed when the header of its next request doesn't come in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to wait for the first request, unless too many others wait too."""
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        certificate = connection.getpeercert(binary_form=True) if connection is not None else None
        self.app_state = {**self.app_state, "abort": transport.abort, "certificate": certificate}
        if len(self.connections) > _SILENT_CONNECTIONS * (self.limit_concurrency or 1):
            transport.abort()
        self._await_header()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request.

        What is left of a request that was refused in its midst is read and forgotten meanwhile: a connection that is closed with unread
        bytes is reset, and the caller would never see why.
        """
        self._await_header()
        super().on_response_complete()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over; from now on it is asked now and then whether somebody is there."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _await_header(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        seconds: float = self.config.header_seconds  # type: ignore[attr-defined]  # set above
        self._deadline = self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _following(contexts: ServerContexts) -> ssl.SSLContext:
    """A context that hands each handshake over to the one of the files as they are then."""
    context = contexts.current()

    def hand_over(connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = contexts.current()

    context.sni_callback = hand_over
    return context
