"""STOW-RS (PS3.18 10.5): instances that come by HTTP take the very way of those that come by C-STORE.

Each is checked, safe on disk and in the index before it is counted as stored, whatever becomes of the rest of the request. Must never
hold more of an instance in memory than its file meta information and the chunk at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

from pydicom import dcmread
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dicomnode.analysis.attributes import UNREADABLE
from dicomnode.config import Settings
from dicomnode.dimse.contexts import offered_syntaxes, storage_class
from dicomnode.dimse.scp import StoreRequest, is_uid
from dicomnode.errors import CannotUnderstand, StoreRefused
from dicomnode.reception import IncomingInstance, Reception
from dicomnode.web.access import Visitor
from dicomnode.web.json_model import Json, encode
from dicomnode.web.media import DICOM, JSON, MULTIPART, demand_json, media_type_of
from dicomnode.web.multipart import MalformedMultipart, MultipartReader, PartBegins, PartEnds
from dicomnode.web.retrieve import uids_of
from storage.objects import meta_length

NO_SUCH_CLASS: Final = 0x0122  # Failure Reason (PS3.18 10.5.3): SOP class not supported
NO_SUCH_SYNTAX: Final = 0xC122  # transfer syntax not supported
MAXIMUM_META_BYTES: Final = 65536
MAXIMUM_INSTANCES: Final = 100_000  # of one request
_HANDED_OVER_BYTES: Final = 1 << 20
_RETRY_SECONDS: Final = "60"


class Store:
    """Answers STOW-RS requests."""

    def __init__(self, settings: Settings, reception: Reception, address_of: Callable[[Request], str]) -> None:
        """`address_of` says by which address a request's caller knows the node's DICOMweb."""
        self._called = settings.node.ae_title
        self._largest = settings.listener.maximum_message_bytes
        self._syntaxes = frozenset(syntax.uid for syntax in offered_syntaxes(accept_deflated=settings.listener.accept_deflated))
        self._reception = reception
        self._address_of = address_of
        self._numbers = itertools.count(1)

    async def store(self, request: Request, visitor: Visitor) -> Response:
        """Store what the body holds: 200 all of it, 202 a part, 409 nothing; 400, 413 and 415 for what is no such body; 503 for now."""
        demand_json(request)
        reader = MultipartReader(_boundary(request))
        request_of = _RequestOf(
            association=next(self._numbers), calling_ae_title=visitor.ae_title, called_ae_title=self._called, syntaxes=self._syntaxes
        )
        body = _Body(self._reception, request_of, uids_of(request).get("StudyInstanceUID"), reader, self._largest)
        pending = bytearray()
        try:
            async for chunk in request.stream():
                pending += chunk
                if len(pending) >= _HANDED_OVER_BYTES:
                    await run_in_threadpool(body.take, bytes(pending))
                    pending.clear()
            await run_in_threadpool(body.take, bytes(pending))
            reader.end()
        except MalformedMultipart as error:
            raise HTTPException(400, f"The request can't be read: {error}.") from error
        except ClientDisconnect:
            return Response(status_code=400)  # nobody hears it; what was stored stays
        finally:
            body.discard()
            self._reception.notes.released(request_of.association)
        return self._answer(body.outcomes, self._address_of(request))

    def _answer(self, outcomes: list[_Outcome], address: str) -> Response:
        if not outcomes:
            raise HTTPException(400, "The request holds no instance.")
        failures = [outcome for outcome in outcomes if outcome.reason]
        stored = [outcome for outcome in outcomes if not outcome.reason]
        if not stored and all(failure.transient for failure in failures):
            raise HTTPException(503, "The node can store nothing now; send again later.", {"Retry-After": _RETRY_SECONDS})
        made: Json = {}
        studies = {outcome.study_instance_uid for outcome in stored}
        if len(studies) == 1:
            made["00081190"] = {"vr": "UR", "Value": [f"{address}/studies/{studies.pop()}"]}
        for tag, items in (
            ("00081198", [_failed(failure) for failure in failures if is_uid(failure.sop_instance_uid)]),
            ("00081199", [_referenced(outcome, address) for outcome in stored]),
            ("0008119A", [_reason(failure) for failure in failures if not is_uid(failure.sop_instance_uid)]),
        ):
            if items:
                made[tag] = {"vr": "SQ", "Value": items}
        status = 200 if not failures else 202 if stored else 409
        return Response(encode(made), status, media_type=JSON)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What became of one part of the body."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str = ""
    series_instance_uid: str = ""
    reason: int = 0  # Failure Reason (0008,1197); 0: it is stored
    transient: bool = False


@dataclass(frozen=True, kw_only=True)
class _RequestOf:
    """What the instances of one request have in common."""

    association: int
    calling_ae_title: str
    called_ae_title: str
    syntaxes: frozenset[str]


class _Body:
    """The body of one request as it comes; for one thread at a time."""

    def __init__(self, reception: Reception, request_of: _RequestOf, study: str | None, reader: MultipartReader, largest: int) -> None:
        self.outcomes: list[_Outcome] = []
        self._reception = reception
        self._request_of = request_of
        self._study = study
        self._reader = reader
        self._largest = largest
        self._meta: bytearray | None = None  # of a part whose file meta information isn't whole yet
        self._incoming: IncomingInstance | None = None
        self._request: StoreRequest | None = None
        self._size = 0

    def take(self, chunk: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            MalformedMultipart: it is no multipart body.
            HTTPException: 413 or 415, it holds too much, or something else than instances.
        """
        for event in self._reader.feed(chunk):
            if isinstance(event, PartBegins):
                self._begin(event)
            elif isinstance(event, PartEnds):
                self._end()
            else:
                self._content(event)

    def discard(self) -> None:
        """Forget what didn't come to its end."""
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None

    def _begin(self, part: PartBegins) -> None:
        try:
            content_type, _ = media_type_of(part.headers.get("content-type", DICOM))
        except ValueError:
            content_type = ""
        if content_type != DICOM:
            raise HTTPException(415, f"Instances are taken as {DICOM} alone.")
        if len(self.outcomes) >= MAXIMUM_INSTANCES:
            raise HTTPException(413, f"A request has at most {MAXIMUM_INSTANCES} instances.")
        self._meta, self._request, self._size = bytearray(), None, 0

    def _content(self, content: memoryview) -> None:
        self._size += len(content)
        if self._size > self._largest:
            raise HTTPException(413, f"An instance has at most {self._largest} bytes.")
        if self._meta is not None:
            self._meta += content
            self._open(self._meta)
        elif self._incoming is not None:
            self._write(content)

    def _open(self, head: bytearray) -> None:
        """Begin to store once the file meta information is whole."""
        length = meta_length(bytes(head[:144])) if len(head) >= 144 else 0
        if len(head) < max(length, 144):
            if length <= MAXIMUM_META_BYTES:
                return
            length = 0
        self._meta = None
        try:
            if not 144 < length <= MAXIMUM_META_BYTES:
                raise CannotUnderstand("the part is no DICOM file (PS3.10)")
            self._request = self._request_from(bytes(head[:length]))
            if reason := _unsupported(self._request, self._request_of.syntaxes):
                self._fail(reason)
                return
            self._incoming = self._reception.begin(self._request, self._study)
        except StoreRefused as refusal:
            self._fail(refusal.dimse_status, transient=refusal.transient)
            return
        with memoryview(head) as view, view[length:] as rest:
            if len(rest):
                self._write(rest)

    def _request_from(self, meta: bytes) -> StoreRequest:
        """Read the file meta information. Raises CannotUnderstand."""
        try:
            values = dcmread(BytesIO(meta)).file_meta
            uids = [str(values[tag].value) for tag in (0x00020002, 0x00020003, 0x00020010)]
        except UNREADABLE as error:
            raise CannotUnderstand("the file meta information can't be read") from error
        return StoreRequest(
            association=self._request_of.association,
            calling_ae_title=self._request_of.calling_ae_title,
            called_ae_title=self._request_of.called_ae_title,
            context_sop_class_uid=uids[0],
            sop_class_uid=uids[0],
            sop_instance_uid=uids[1],
            transfer_syntax_uid=uids[2],
        )

    def _write(self, content: memoryview) -> None:
        assert self._incoming is not None  # noqa: S101  who calls has looked
        try:
            self._incoming.write(content)
        except StoreRefused as refusal:
            self.discard()
            self._fail(refusal.dimse_status, transient=refusal.transient)

    def _end(self) -> None:
        if self._meta is not None:
            self._meta = None
            self._fail(CannotUnderstand.dimse_status)
        if self._incoming is None:
            return
        incoming, self._incoming = self._incoming, None
        try:
            incoming.finish()
        except StoreRefused as refusal:
            self._fail(refusal.dimse_status, transient=refusal.transient)
            return
        header = incoming.header
        assert header is not None  # noqa: S101  finish() has read it
        self.outcomes.append(
            _Outcome(
                sop_class_uid=header.sop_class_uid,
                sop_instance_uid=header.sop_instance_uid,
                study_instance_uid=header.study_instance_uid,
                series_instance_uid=header.series_instance_uid,
            )
        )

    def _fail(self, reason: int, *, transient: bool = False) -> None:
        request = self._request
        self.outcomes.append(
            _Outcome(
                sop_class_uid=request.sop_class_uid if request is not None else "",
                sop_instance_uid=request.sop_instance_uid if request is not None else "",
                reason=reason,
                transient=transient,
            )
        )
        if reason in {NO_SUCH_CLASS, NO_SUCH_SYNTAX} or request is None:  # else reception has counted it
            self._reception.notes.count(f"instance refused: 0x{reason:04X}")


def _boundary(request: Request) -> bytes:
    """Return the boundary of a request's body. Raises HTTPException 415 if it isn't multipart/related of DICOM, 400 without boundary."""
    try:
        name, parameters = media_type_of(request.headers.get("content-type", ""))
    except ValueError:
        name, parameters = "", {}
    if name != MULTIPART or parameters.get("type", DICOM).lower() != DICOM:
        raise HTTPException(415, f'Instances are taken as {MULTIPART}; type="{DICOM}" alone.')
    boundary = parameters.get("boundary", "").encode("ascii", "replace")
    try:
        MultipartReader(boundary)
    except MalformedMultipart as error:
        raise HTTPException(400, f"The request can't be read: {error}.") from error
    return boundary


def _unsupported(request: StoreRequest, syntaxes: frozenset[str]) -> int:
    """The failure reason of what an association would not have agreed on; 0 if it would have."""
    if storage_class(request.sop_class_uid) is None:
        return NO_SUCH_CLASS
    return 0 if request.transfer_syntax_uid in syntaxes else NO_SUCH_SYNTAX


def _reference(outcome: _Outcome) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [outcome.sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [outcome.sop_instance_uid]},
    }


def _referenced(outcome: _Outcome, address: str) -> Json:
    place = f"studies/{outcome.study_instance_uid}/series/{outcome.series_instance_uid}/instances/{outcome.sop_instance_uid}"
    return {**_reference(outcome), "00081190": {"vr": "UR", "Value": [f"{address}/{place}"]}}


def _reason(outcome: _Outcome) -> Json:
    return {"00081197": {"vr": "US", "Value": [outcome.reason]}}


def _failed(outcome: _Outcome) -> Json:
    return {**_reference(outcome), **_reason(outcome)}
