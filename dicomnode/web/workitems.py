"""UPS-RS (PS3.18 chapter 11): the worklist of the node's analyses, which peers may search, add to, and ask to cancel.

The node performs all of its work items itself: nobody else may claim, change or end one. Must never put a value of a request into a
message or a log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dicomnode.config import Settings
from dicomnode.dimse.scp import is_uid
from dicomnode.engine import EngineClient
from dicomnode.web.access import Visitor
from dicomnode.web.json_model import Json, encode
from dicomnode.web.media import JSON, demand_json, media_type_of
from dicomnode.web.search import MAXIMUM_PARAMETERS, PARAMETERS, count_of, included, keys_of
from dicomnode.web.work_order import MAXIMUM_BODY, as_json, read_data_set, read_order
from dicomnode.web.workitem_json import workitem_as_json
from dicomnode.worklist import request_cancel, schedule
from storage import Storage
from storage.query import BadQuery
from storage.records import WorkItem
from storage.workitems import MATCHED

STATION_KEY: Final = "ScheduledStationNameCodeSequence.CodeValue"
_WHOLE: Final = frozenset({"InputInformationSequence", "UnifiedProcedureStepPerformedProcedureSequence"})
_ENDS: Final = ("COMPLETED", "CANCELED")
_WHY_CANCEL: Final = ("ReasonForCancellation", "ProcedureStepDiscontinuationReasonCodeSequence", "ContactURI", "ContactDisplayName")


class Workitems:
    """Answers UPS-RS requests, for any number of threads."""

    def __init__(self, settings: Settings, storage: Storage, client: EngineClient, address_of: Callable[[Request], str]) -> None:
        """`address_of` says by which address a request's caller knows the node's DICOMweb."""
        self._node = settings.node
        self._maximum = settings.web.maximum_matches
        self._storage = storage
        self._client = client
        self._address_of = address_of

    def search(self, request: Request) -> Response:
        """Work items that match (PS3.18 11.9): 200 or 204; 206 with the first of more; 400 for what is no search."""
        demand_json(request)
        pairs = request.query_params.multi_items()
        if len(pairs) > MAXIMUM_PARAMETERS:
            raise HTTPException(400, f"A search has at most {MAXIMUM_PARAMETERS} parameters.")
        keys, ignored = keys_of([pair for pair in pairs if pair[0] not in PARAMETERS], MATCHED | {STATION_KEY})
        wanted, all_fields = included(request.query_params.getlist("includefield"))
        parameters = dict(pairs)
        limit = min(count_of(parameters, "limit", self._maximum), self._maximum)
        offset = count_of(parameters, "offset", 0)
        station = keys.pop(STATION_KEY, "").strip()
        try:
            elsewhere = station.strip("*") and station != self._node.ae_title
            found = [] if elsewhere else self._storage.workitems.find(keys, limit=limit + 1, offset=offset)
        except BadQuery as error:
            raise HTTPException(400, f"The search can't be done: {error}.") from error
        whole = all_fields or bool(wanted & _WHOLE)
        body = [self._as_json(request, item, whole=whole) for item in found[:limit]]
        more = bool(body) and len(found) > limit
        response = Response(encode(body), 206 if more else 200, media_type=JSON) if body else Response(status_code=204)
        response.headers["Cache-Control"] = "no-store"
        if ignored:
            response.headers.append("Warning", warning(f"The following parameters are not matched and were ignored: {', '.join(ignored)}"))
        if more:
            response.headers.append("Warning", warning("There are additional results that can be requested"))
        return response

    def retrieve(self, request: Request) -> Response:
        """One work item (PS3.18 11.5)."""
        demand_json(request)
        made = self._as_json(request, self._item(request), whole=True)
        return Response(encode([made]), media_type=JSON, headers={"Cache-Control": "no-store"})

    async def create(self, request: Request, visitor: Visitor) -> Response:
        """Add a work item (PS3.18 11.4): 201, or 400, 409, 413 or 415."""
        values = await _data_set(request)
        return await run_in_threadpool(self._create, request, values, visitor)

    async def cancel(self, request: Request, visitor: Visitor) -> Response:
        """Cancel a work item as its requester, or anybody who may ask for work, asks (PS3.18 11.8): 202, or 404 or 409."""
        values = await _data_set(request, optional=True)
        return await run_in_threadpool(self._cancel, request, values, visitor)

    async def change_state(self, request: Request, _visitor: Visitor) -> Response:
        """Refuse to let somebody else perform a work item (PS3.18 11.7): 403, or 409 where it isn't SCHEDULED."""
        values = await _data_set(request)
        return await run_in_threadpool(self._change_state, request, values)

    def _create(self, request: Request, values: Json, visitor: Visitor) -> Response:
        registry = self._storage.registry
        order = read_order(values, _uid_of_address(request), visitor.ae_title, self._node.ae_titles, registry)
        if not schedule(self._storage, self._client, order.item):
            raise refusal(409, "There is a work item of this UID already.")
        place = f"{self._address_of(request)}/workitems/{order.item.uid}"
        response = Response(status_code=201, headers={"Location": place, "Content-Location": place})
        if order.modified:
            response.headers.append("Warning", warning("The Workitem was created with modifications."))
        return response

    def _cancel(self, request: Request, values: Json, visitor: Visitor) -> Response:
        item = self._item(request)
        why = {keyword: values[keyword] for keyword in _WHY_CANCEL if values.get(keyword)}
        asked: dict[str, Any] = {"requester": visitor.ae_title, **as_json(why)}
        if item.state not in _ENDS and request_cancel(self._storage, self._client, item, asked):
            return Response(status_code=202)
        if self._item(request).state == "COMPLETED":
            raise refusal(409, "The UPS is already COMPLETED.")
        return Response(status_code=202, headers={"Warning": warning("The UPS is already in the requested state of CANCELED.")})

    def _change_state(self, request: Request, values: Json) -> Response:
        wanted = next(iter(values.get("ProcedureStepState", ())), None)
        if wanted not in {"IN PROGRESS", *_ENDS}:
            raise refusal(400, "ProcedureStepState is IN PROGRESS, COMPLETED or CANCELED.")
        if not any(is_uid(str(uid)) for uid in values.get("TransactionUID", ())):
            raise refusal(400, "The Transaction UID is missing.")
        state = self._item(request).state
        if state == wanted and state in _ENDS:
            return Response(status_code=200, headers={"Warning": warning(f"The UPS is already in the requested state of {state}.")})
        if state == "SCHEDULED":
            raise refusal(403, "The node performs its work items itself; to end one ask for its cancellation.")
        if state == "IN PROGRESS":
            raise refusal(409, "The Transaction UID is incorrect.")
        raise refusal(409, "The submitted request is inconsistent with the state of the UPS Instance.")

    def _item(self, request: Request) -> WorkItem:
        uid = request.path_params["workitem"]
        if not is_uid(uid):
            raise refusal(400, "What stands in the place of a UID is none.")
        item = self._storage.workitems.item(uid)
        if item is None:
            raise refusal(404, "The node has no such work item.")
        return item

    def _as_json(self, request: Request, item: WorkItem, *, whole: bool) -> Json:
        job = self._storage.jobs.job(item.job_key) if whole and item.job_key is not None else None
        inputs = [] if job is None else self._storage.index.instances(job.study_instance_uid, job.revision)
        made_by = None if job is None or item.parted else job.carried_from or job.key
        outputs = [] if made_by is None else self._storage.jobs.results(job_key=made_by)
        return workitem_as_json(item, self._node.ae_title, self._address_of(request), inputs, outputs)


def _uid_of_address(request: Request) -> str | None:
    """The UID that stands in the query of an address: alone, as PS3.18 11.4.1 has it, or as the parameter `workitem`."""
    for name, value in request.query_params.multi_items():
        uid = value if name.lower() in {"workitem", "affectedsopinstanceuid"} else name if not value else ""
        if uid and not is_uid(uid):
            raise refusal(400, "What stands in the place of a UID is none.")
        if uid:
            return uid
    return None


async def _data_set(request: Request, *, optional: bool = False) -> Json:
    """Read the data set that a request brings. Raises HTTPException 400, 413 or 415."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BODY:
            raise refusal(413, f"A work item has at most {MAXIMUM_BODY} bytes.")
    if optional and not body.strip():
        return {}
    try:
        content_type = media_type_of(request.headers.get("content-type", ""))[0]
    except ValueError:
        content_type = ""
    if content_type not in {JSON, "application/json"}:
        raise refusal(415, f"Work items are taken as {JSON} alone.")
    return await run_in_threadpool(read_data_set, bytes(body))


def refusal(status: int, why: str) -> HTTPException:
    """An answer that says why in a Warning header, too."""
    return HTTPException(status, why, {"Warning": warning(why)})


def warning(text: str) -> str:
    """The value of a Warning header (RFC 7234 5.5)."""
    return f'299 dicomnode "{text}"'
