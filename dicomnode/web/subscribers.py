"""Who watches the worklist (PS3.18 11.10 to 11.13): subscriptions, and the event reports on them over a WebSocket.

Reports are made of what the tables say, a moment after it changed: the processes that work write nothing for them. Somebody who was
away is told of the present state of what has changed meanwhile, so a report may come twice and a state in between never. Must never
wait for a subscriber that doesn't take its reports.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from dicomnode.config import Settings, check_ae_title
from dicomnode.dimse.scp import is_uid
from dicomnode.logs import get_logger
from dicomnode.web.access import Visitor
from dicomnode.web.json_model import Json, encode
from dicomnode.web.search import keys_of
from dicomnode.web.workitem_json import is_ready, report_of_assignment, report_of_cancel_request, report_of_progress, report_of_state
from dicomnode.web.workitems import refusal, warning
from storage import Storage
from storage.errors import StorageError
from storage.query import BadQuery
from storage.records import Subscription, WorkItem
from storage.subscriptions import FILTERED, GLOBAL
from storage.workitems import MATCHED

MAXIMUM_CHANNELS: Final = 32  # open at a time
_OVERLAP: Final = timedelta(seconds=60)  # a transaction that is committed now may bear a time of so long ago
_NO_KEYS: Final = frozenset({"filter", "deletionlock", "accept", "charset"})
# What a subscription can't go by: a work item that matches is watched to its end.
_CHANGING: Final = frozenset({"ProcedureStepState", "InputReadinessState", "ScheduledProcedureStepPriority"})

_log = get_logger(__name__)


class Subscribers:
    """Answers requests about subscriptions, and sends event reports, for any number of threads."""

    def __init__(self, settings: Settings, storage: Storage, address_of: Callable[[Request], str]) -> None:
        """`address_of` says by which address a request's caller knows the node's DICOMweb."""
        self._station = settings.node.ae_title
        self._seconds = settings.engine.poll_seconds
        self._storage = storage
        self._address_of = address_of
        self._open = 0

    def subscribe(self, request: Request, visitor: Visitor) -> Response:
        """Tell somebody of a work item, of all, or of those that match (PS3.18 11.10): 201, or 400, 403 or 404."""
        ae_title, target = self._named(request, visitor)
        keys = _filter(request) if target == FILTERED else {}
        try:
            self._storage.workitems.find(keys, limit=1)
        except BadQuery as error:
            raise refusal(400, f"The filter can't be matched: {error}.") from error
        self._storage.subscriptions.add(ae_title, target, keys)
        _log.info("subscribed to the worklist", peer=ae_title, sop_instance_uid=target)
        address = self._address_of(request)
        channel = f"{'wss' if address.startswith('https') else 'ws'}://{address.partition('://')[2]}/subscribers/{ae_title}"
        response = Response(status_code=201, headers={"Content-Location": channel})
        if request.query_params.get("deletionlock", "false").lower() == "true":
            response.headers["Warning"] = warning("Deletion Lock not granted.")
        return response

    def unsubscribe(self, request: Request, visitor: Visitor) -> Response:
        """Tell somebody no more (PS3.18 11.11): 200, or 400, 403 or 404."""
        self._storage.subscriptions.remove(*self._named(request, visitor))
        return Response(status_code=200)

    def suspend(self, request: Request, visitor: Visitor) -> Response:
        """Tell somebody of no new work items (PS3.18 11.12): 200, or 400, 403, or 404 without a subscription to many."""
        ae_title, target = self._named(request, visitor)
        if target not in {GLOBAL, FILTERED}:
            raise refusal(400, "Only a subscription to the worklist can be suspended.")
        if not self._storage.subscriptions.suspend(ae_title, target):
            raise refusal(404, "There is no such subscription.")
        return Response(status_code=200)

    async def channel(self, websocket: WebSocket, admitted: Callable[[HTTPConnection], Visitor]) -> None:
        """Send event reports to one subscriber until it goes (PS3.18 8.10.4); `admitted` says who it is, or raises HTTPException."""
        try:
            visitor = await run_in_threadpool(admitted, websocket)
            ae_title = _own(websocket, visitor)
            if self._open >= MAXIMUM_CHANNELS:
                raise HTTPException(503, "Too many subscribers are connected.")
        except HTTPException as error:
            await websocket.send_denial_response(PlainTextResponse(f"{error.detail}\n", error.status_code, headers=error.headers))
            return
        except StorageError:
            await websocket.send_denial_response(PlainTextResponse("The database can't be used now.\n", 503))
            return
        self._open += 1
        try:
            await websocket.accept()
            gone = asyncio.create_task(_until_gone(websocket))
            try:
                with suppress(WebSocketDisconnect):
                    await self._report(websocket, ae_title, gone)
            finally:
                gone.cancel()
        finally:
            self._open -= 1

    async def _report(self, websocket: WebSocket, ae_title: str, gone: asyncio.Task[None]) -> None:
        told, numbers = _Told(self._station), itertools.count(1)
        while not gone.done():
            with suppress(StorageError):  # it may be away for a while; the next round tells what it missed
                reports, targets, now = await run_in_threadpool(self._reports, ae_title, told)
                for report in reports:
                    await websocket.send_text(encode({**report, "00000110": _message_id(next(numbers))}).decode())
                if reports:
                    await run_in_threadpool(self._storage.subscriptions.note_told, ae_title, targets, now)
            await asyncio.wait({gone}, timeout=self._seconds)

    def _reports(self, ae_title: str, told: _Told) -> tuple[list[Json], list[str], datetime]:
        """What a subscriber has to be told now, by which subscriptions, and up to when that is."""
        now = self._storage.subscriptions.now()
        subscriptions = self._storage.subscriptions.of(ae_title)
        unwanted = {one.target for one in subscriptions if not one.wanted}
        wanted = [one for one in subscriptions if one.wanted]
        found = [self._storage.workitems.changed(one, told.since(one)) for one in wanted]
        items = {item.uid: item for several in found for item in several if item.uid not in unwanted}
        return told.reports(wanted, list(items.values()), now), [one.target for one in wanted], now

    def _named(self, request: Request, visitor: Visitor) -> tuple[str, str]:
        """Whose subscription to what a request is about."""
        target = request.path_params["workitem"]
        if not is_uid(target):
            raise refusal(400, "What stands in the place of a UID is none.")
        ae_title = _own(request, visitor)
        if target not in {GLOBAL, FILTERED} and self._storage.workitems.item(target) is None:
            raise refusal(404, "The node has no such work item.")
        return ae_title, target


class _Told:
    """What a subscriber has been told on one connection: of each work item the last, as long as it may change soon."""

    def __init__(self, station: str) -> None:
        self._station = station
        self._known: dict[str, datetime] = {}  # by target: which subscription
        self._items: dict[str, WorkItem] = {}
        self._until: datetime | None = None

    def since(self, one: Subscription) -> datetime | None:
        """From when on a subscription's changes are looked at; None: all that it is about, the present state being news."""
        known = self._known.get(one.target) == one.created_at
        until = self._until if known else one.told_until
        if one.target in {GLOBAL, FILTERED}:
            return one.created_at if until is None else max(one.created_at, until - _OVERLAP)
        return None if until is None else until - _OVERLAP

    def reports(self, subscriptions: Sequence[Subscription], items: Sequence[WorkItem], now: datetime) -> list[Json]:
        """Return the event reports on work items that were looked up, and remember them."""
        for one in subscriptions:
            if self._known.get(one.target) != one.created_at and one.told_until is None:
                self._items.pop(one.target, None)  # who subscribes to a work item is told its state, again if need be
        made = [report for item in items for report in self._on(item)]
        self._known = {one.target: one.created_at for one in subscriptions}
        self._items = {item.uid: item for item in items}
        self._until = now
        return made

    def _on(self, item: WorkItem) -> Iterator[Json]:
        before = self._items.get(item.uid)
        if before is None and item.state == "SCHEDULED":
            yield report_of_assignment(item, self._station)
        if before is not None and item.cancel is not None and before.cancel is None and item.started_at is not None:
            yield report_of_cancel_request(item)
        if before is None or (before.state, is_ready(before)) != (item.state, is_ready(item)):
            yield report_of_state(item)
        if item.progress is not None and (before is None or before.progress != item.progress):
            yield report_of_progress(item)


def _filter(request: Request) -> dict[str, str]:
    """The keys of a filtered subscription: of the parameter `filter`, or parameters of their own."""
    pairs = [pair for pair in request.query_params.multi_items() if pair[0].lower() not in _NO_KEYS]
    listed = [part.partition("=") for value in request.query_params.getlist("filter") for part in value.split(",")]
    keys, ignored = keys_of([*pairs, *((name, value) for name, _, value in listed)], MATCHED - _CHANGING)
    if ignored:
        raise refusal(403, f"Filtered Worklist Subscriptions are not supported by {', '.join(ignored)}.")
    if not keys:
        raise refusal(400, "A filtered subscription names what its work items match.")
    return keys


def _own(connection: HTTPConnection, visitor: Visitor) -> str:
    """The AE title of an address, which is the caller's own where it showed who it is."""
    try:
        ae_title = check_ae_title(connection.path_params["aetitle"])
    except ValueError as error:
        raise refusal(400, "What stands in the place of an AE title is none.") from error
    if visitor.known and ae_title != visitor.ae_title:
        raise refusal(403, "A peer subscribes for itself alone.")
    return ae_title


async def _until_gone(websocket: WebSocket) -> None:
    """Wait until a subscriber goes; what it says meanwhile is not listened to."""
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass


def _message_id(number: int) -> Json:
    return {"vr": "US", "Value": [number % 65536]}
