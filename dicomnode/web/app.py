"""The web role's application: which address is answered by what, to whom, and what a caller is told when something fails.

One sentence of plain text for each mistake; the causes of the node's own failures are in the log alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from dicomnode.analyses import list_old_jobs
from dicomnode.config import Settings
from dicomnode.engine import EngineClient
from dicomnode.errors import ConfigError
from dicomnode.logs import get_logger
from dicomnode.reception import Reception
from dicomnode.web.access import Access, Visitor
from dicomnode.web.retrieve import Retrieve
from dicomnode.web.search import Search
from dicomnode.web.server import WebServer, is_loopback
from dicomnode.web.store import Store
from dicomnode.web.subscribers import Subscribers
from dicomnode.web.workitems import Workitems
from storage import Storage
from storage.errors import OutOfSpace, StorageError, Unavailable

ROOT = "/dicom-web"

_log = get_logger(__name__)


class Web:
    """The web role from start() to stop()."""

    def __init__(self, settings: Settings, storage: Storage, client: EngineClient) -> None:
        """Raises ConfigError if it can't be served as it is configured."""
        if settings.web.tls != "off" and settings.tls.certificate is None:
            raise ConfigError("web.tls needs the certificate, key and ca of [tls]")
        self._storage = storage
        self._reception = Reception(settings.listener, storage)
        self._server = WebServer(settings.web, settings.tls, application(settings, storage, client, self._reception))
        if settings.web.tls == "off" and not is_loopback(settings.web.host):
            _log.warning("DICOMweb is offered without TLS: passcodes and images can be read on their way", host=settings.web.host)

    @property
    def port(self) -> int:
        """The TCP port that it listens on, between start() and stop()."""
        return self._server.port

    def start(self) -> None:
        """Remove what a crash left behind, then listen; returns at once.

        Raises:
            OSError: the address can't be bound.
            ConfigError: the TLS files can't be used.
        """
        self._reception.sweep()
        list_old_jobs(self._storage)
        self._server.start()
        self._reception.start()

    def stop(self, drain_seconds: float = 30.0) -> None:
        """Let the running requests end for up to `drain_seconds`, and return."""
        self._server.stop(drain_seconds)
        self._reception.stop()


def application(settings: Settings, storage: Storage, client: EngineClient, reception: Reception) -> Starlette:
    """Return the ASGI application."""
    access = Access(settings, storage.registry)

    def address_of(request: Request) -> str:
        return (settings.web.address or _called(request)) + ROOT

    def watcher(request: HTTPConnection) -> Visitor:
        visitor = access.visitor(request)
        if not visitor.queries:
            raise HTTPException(403, "This peer may not query the node.")
        return visitor

    def reading(handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            watcher(request)
            return handler(request)

        return _telling(endpoint, reception)

    search = Search(settings.web, storage, address_of)
    retrieve = Retrieve(storage, address_of)
    store = Store(settings, reception, address_of)
    workitems = Workitems(settings, storage, client, address_of)
    subscribers = Subscribers(settings, storage, address_of)

    def watching(handler: Callable[[Request, Visitor], Response]) -> Callable[[Request], Response]:
        return _telling(lambda request: handler(request, watcher(request)), reception)

    async def channel(websocket: WebSocket) -> None:
        await subscribers.channel(websocket, watcher)

    def sending(handler: Callable[[Request, Visitor], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            visitor = await run_in_threadpool(access.visitor, request)
            if not visitor.sends:
                raise HTTPException(403, "This peer may not send to the node.")
            return await handler(request, visitor)

        return _telling_async(endpoint, reception)

    def health(_request: Request) -> Response:
        storage.registry.peers()
        return JSONResponse({"status": "ok"})

    post = sending(store.store)
    series = "/studies/{study}/series/{series}"
    instance = f"{series}/instances/{{instance}}"
    routes = [
        Route("/studies", reading(search.studies), methods=["GET"]),
        Route("/studies", post, methods=["POST"]),
        Route("/series", reading(search.series), methods=["GET"]),
        Route("/instances", reading(search.instances), methods=["GET"]),
        Route("/studies/{study}", reading(retrieve.objects), methods=["GET"]),
        Route("/studies/{study}", post, methods=["POST"]),
        Route("/studies/{study}/series", reading(search.series), methods=["GET"]),
        Route("/studies/{study}/instances", reading(search.instances), methods=["GET"]),
        Route(f"{series}/instances", reading(search.instances), methods=["GET"]),
        *(Route(path, reading(retrieve.objects), methods=["GET"]) for path in (series, instance)),
        *(Route(f"{path}/metadata", reading(retrieve.metadata), methods=["GET"]) for path in ("/studies/{study}", series, instance)),
        *(
            Route(f"{path}/{word}", reading(retrieve.rendered), methods=["GET"])
            for path in ("/studies/{study}", series, instance, f"{instance}/frames/{{frames}}")
            for word in ("rendered", "thumbnail")
        ),
        Route(f"{instance}/frames/{{frames}}", reading(retrieve.frames), methods=["GET"]),
        Route(f"{instance}/bulkdata/{{value}}", reading(retrieve.bulk_data), methods=["GET"]),
        Route("/workitems", reading(workitems.search), methods=["GET"]),
        Route("/workitems", sending(workitems.create), methods=["POST"]),
        Route("/workitems/{workitem}", reading(workitems.retrieve), methods=["GET"]),
        Route("/workitems/{workitem}/state", sending(workitems.change_state), methods=["PUT"]),
        Route("/workitems/{workitem}/subscribers/{aetitle}", watching(subscribers.subscribe), methods=["POST"]),
        Route("/workitems/{workitem}/subscribers/{aetitle}", watching(subscribers.unsubscribe), methods=["DELETE"]),
        Route("/workitems/{workitem}/subscribers/{aetitle}/suspend", watching(subscribers.suspend), methods=["POST"]),
        WebSocketRoute("/subscribers/{aetitle}", channel),
        Route("/workitems/{workitem}/cancelrequest", sending(workitems.cancel), methods=["POST"]),
    ]
    cross_origin = Middleware(
        CORSMiddleware,
        allow_origins=settings.web.origins,
        allow_methods=["GET", "POST", "PUT", "DELETE"],
        allow_headers=["*"],
        allow_credentials=True,
    )
    return Starlette(
        routes=[Route("/health", _telling(health, reception), methods=["GET"]), Mount(ROOT, routes=routes)],
        middleware=[cross_origin] if settings.web.origins else [],
        exception_handlers={HTTPException: _told},
    )


def _called(request: Request) -> str:
    """The address that a caller called. Some clients leave the port out of the Host header, dicomweb-client among them."""
    host, port = request.scope.get("server") or ("", None)
    netloc = f"{host}:{port}" if request.url.netloc == host and port else request.url.netloc
    return f"{request.url.scheme}://{netloc}"


def _told(_request: Request, error: Exception) -> Response:
    """Say what was wrong, in a line of text."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for these alone
    return PlainTextResponse(f"{error.detail}\n", error.status_code, headers=error.headers)


def _telling(endpoint: Callable[[Request], Response], reception: Reception) -> Callable[[Request], Response]:
    """The endpoint, with failures as answers: the web's boundary."""

    def guarded(request: Request) -> Response:
        try:
            return endpoint(request)
        except Exception as error:
            raise _answer(error, reception) from error

    return guarded


def _telling_async(endpoint: Callable[[Request], Awaitable[Response]], reception: Reception) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            raise _answer(error, reception) from error

    return guarded


def _answer(error: Exception, reception: Reception) -> HTTPException:
    """What a caller is told of a failure, which is counted."""
    if isinstance(error, HTTPException):
        answer = error
    elif isinstance(error, OutOfSpace | Unavailable):
        answer = HTTPException(503, "Disk or database take nothing now; try again later.", {"Retry-After": "60"})
    else:
        kind = "storage failed" if isinstance(error, StorageError) else "a request failed"
        _log.error(kind, exc_info=error)
        answer = HTTPException(500, "The node failed; its log says why.")
    reception.notes.count(f"request refused: {answer.status_code}")
    return answer
