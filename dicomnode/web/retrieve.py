"""WADO-RS (PS3.18 10.4): objects, their headers, frames and bulk data, as they are stored.

Pixels are never decoded and objects never encoded anew, but for one thing: what is stored in Implicit VR or deflated is given in
Explicit VR Little Endian to who asks for that. A response is made as it is sent, one object after another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

from pydicom import dcmread, dcmwrite
from pydicom.uid import UID
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dicomnode.analysis.headers import Header, HeaderReader
from dicomnode.analysis.stored import Unreadable
from dicomnode.dimse.scp import is_uid
from dicomnode.errors import CannotUnderstand
from dicomnode.logs import get_logger
from dicomnode.web.frames import CHUNK_BYTES, NoSuchFrame, fragments, frame, frame_count, pixel_chunks
from dicomnode.web.json_model import NoSuchValue, bulk_value, encode, header_as_json
from dicomnode.web.media import DICOM, EXPLICIT, JSON, OCTETS, Accepted, Part, accepted, compressed_type, demand_json, multipart_response
from storage import Storage
from storage.query import Held

MAXIMUM_INSTANCES: Final = 1_000_000  # of one study
MAXIMUM_FRAMES: Final = 10_000  # named in one request
_CONVERTED_BYTES: Final = 512 * 2**20  # what is larger is given as it is stored, or not at all: converting holds it in memory
_CONVERTED: Final = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"})  # Implicit VR Little Endian, deflated
_LEVELS: Final = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")

_log = get_logger(__name__)


class Retrieve:
    """Answers WADO-RS requests, for any number of threads."""

    def __init__(self, storage: Storage, address_of: Callable[[Request], str]) -> None:
        """`address_of` says by which address a request's caller knows the node's DICOMweb."""
        self._storage = storage
        self._address_of = address_of

    def objects(self, request: Request) -> Response:
        """A study, a series or an instance: 200; 206 without what can't be given as asked or is gone; 404, 406 or 410."""
        held = self._held(request)
        ranges = accepted(request)
        one = "instance" in request.path_params
        chosen = next((entry for entry in ranges if entry.takes(DICOM) and (entry.multipart is not False or one)), None)
        if chosen is None:
            raise HTTPException(406, f"Objects are given as multipart/related of {DICOM}; one instance as {DICOM}, too.")
        multipart = chosen.multipart is not False
        wanted = [entry.transfer_syntax for entry in ranges if entry.takes(DICOM) and (entry.multipart is not False) == multipart]
        there = [one_of for one_of in held if self._path(one_of).is_file()]
        if not there:
            raise HTTPException(410, "The node no longer holds this.")
        given = [(one_of, syntax) for one_of in there if (syntax := _syntax(one_of, wanted)) is not None]
        if not given:
            raise HTTPException(406, "The node has none of this in a transfer syntax that is accepted.")
        parts = [(f"{DICOM}; transfer-syntax={syntax}", self._file(one_of, syntax)) for one_of, syntax in given]
        if not multipart:
            content_type, content = parts[0]
            return StreamingResponse(content, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
        every = (Part(content_type=content_type, content=content) for content_type, content in parts)
        return multipart_response(every, DICOM, 200 if len(given) == len(held) else 206)

    def metadata(self, request: Request) -> Response:
        """The headers of a study, a series or an instance as JSON; bulk data by its address."""
        held = self._held(request)
        demand_json(request)
        address = self._address_of(request)

        def chunks() -> Iterator[bytes]:
            reader = HeaderReader()
            for number, one in enumerate(held):
                yield b"," if number else b"["
                yield encode(self._header_as_json(reader, one, address))
            yield b"]"

        return StreamingResponse(chunks(), headers={"Content-Type": JSON, "Cache-Control": "no-store"})

    def frames(self, request: Request) -> Response:
        """Frames of an instance, each a part, as they are stored; one alone also as the response itself."""
        (held,) = self._held(request)
        numbers = _frame_numbers(request.path_params["frames"])
        path, header = self._path(held), self._header(held)
        if max(numbers) > frame_count(header):
            raise HTTPException(404, "The instance has no such frame.")
        content_type, media_type, multipart = _pixels_as_accepted(accepted(request), header, single=len(numbers) == 1)
        try:
            first = frame(path, header, numbers[0])
        except (NoSuchFrame, CannotUnderstand) as error:
            raise HTTPException(404, f"The frame can't be given: {error}.") from error
        if not multipart:
            return Response(first, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

        def parts() -> Iterator[Part]:
            yield Part(content_type=content_type, content=(first,))
            for number in numbers[1:]:
                yield Part(content_type=content_type, content=(frame(path, header, number),))

        return multipart_response(parts(), media_type)

    def bulk_data(self, request: Request) -> Response:
        """A value that the metadata left out, the pixel data among them."""
        (held,) = self._held(request)
        path, header = self._path(held), self._header(held)
        name = request.path_params["value"]
        ranges = accepted(request)
        if header.pixels is not None and name.upper() == f"{header.pixels.tag:08X}":
            native = header.pixels.length is not None
            content_type, media_type, multipart = _pixels_as_accepted(ranges, header, single=native)
            if not native:
                every = (Part(content_type=content_type, content=(fragment,)) for fragment in fragments(path, header))
                return multipart_response(every, media_type)
            content: Iterator[bytes] = pixel_chunks(path, header)
        else:
            try:
                content = iter((bulk_value(header, name),))
            except NoSuchValue:
                raise HTTPException(404, "The instance has no such value.") from None
            content_type = media_type = OCTETS
            multipart = _multipart_octets(ranges)
        if not multipart:
            return StreamingResponse(content, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
        return multipart_response(iter((Part(content_type=content_type, content=content),)), media_type)

    def rendered(self, request: Request) -> Response:
        """Images for people are not made here."""
        self._held(request)
        raise HTTPException(406, "The node renders nothing; frames are given as they are stored.")

    def _held(self, request: Request) -> list[Held]:
        keys = uids_of(request)
        held = self._storage.query.held(keys, limit=MAXIMUM_INSTANCES)
        if not held:
            raise HTTPException(404, "The node holds no such object.")
        return held

    def _path(self, held: Held) -> Path:
        return self._storage.objects.path(held.object_id)

    def _header(self, held: Held) -> Header:
        try:
            return HeaderReader().read(self._path(held))
        except FileNotFoundError:
            raise HTTPException(410, "The node no longer holds this.") from None
        except Unreadable as error:
            raise HTTPException(404, f"The object can't be read: {error}.") from error

    def _header_as_json(self, reader: HeaderReader, held: Held, address: str) -> object:
        place = f"{address}/studies/{held.study_instance_uid}/series/{held.series_instance_uid}/instances/{held.sop_instance_uid}"
        try:
            header = reader.read(self._path(held))
        except (Unreadable, OSError) as error:  # what is known of it without its file
            _log.warning("a stored object could not be read", sop_instance_uid=held.sop_instance_uid, reason=type(error).__name__)
            known = (held.study_instance_uid, held.series_instance_uid, held.sop_instance_uid, held.sop_class_uid)
            return {
                tag: {"vr": "UI", "Value": [uid]} for tag, uid in zip(("0020000D", "0020000E", "00080018", "00080016"), known, strict=True)
            }
        return header_as_json(header, held.transfer_syntax_uid, place)

    def _file(self, held: Held, syntax: str) -> Iterator[bytes]:
        path = self._path(held)
        if syntax != held.transfer_syntax_uid:
            yield _converted(path)
            return
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def uids_of(request: Request) -> dict[str, str]:
    """Return the UIDs of a request's path, by keyword. Raises HTTPException 400 for what is none."""
    uids = {keyword: request.path_params.get(name) for keyword, name in zip(_LEVELS, ("study", "series", "instance"), strict=True)}
    if not all(uid is None or is_uid(uid) for uid in uids.values()):
        raise HTTPException(400, "What stands in the place of a UID is none.")
    return {keyword: uid for keyword, uid in uids.items() if uid is not None}


def _syntax(held: Held, wanted: Sequence[str | None]) -> str | None:
    """Return the transfer syntax that an object is given in, the first of the wanted ones that it can be given in; None if none.

    Where no transfer syntax is named, Explicit VR Little Endian is meant (PS3.18 8.7.3.4); what is stored compressed is then given as
    it is, for nobody here decodes it.
    """
    stored = held.transfer_syntax_uid
    explicit = stored in _CONVERTED and held.size <= _CONVERTED_BYTES
    for syntax in wanted:
        if syntax in {"*", stored}:
            return stored
        if syntax in {None, EXPLICIT} and explicit:
            return EXPLICIT
        if syntax is None:
            return stored
    return None


def _converted(path: Path) -> bytes:
    """Return a file in Explicit VR Little Endian."""
    data_set = dcmread(path)
    data_set.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    converted = BytesIO()
    dcmwrite(converted, data_set, implicit_vr=False, little_endian=True, enforce_file_format=False)
    return converted.getvalue()


def _frame_numbers(text: str) -> list[int]:
    words = text.split(",")
    if len(words) > MAXIMUM_FRAMES or not all(word.isascii() and word.isdigit() and len(word) < 10 and int(word) for word in words):
        raise HTTPException(400, f"Frames are up to {MAXIMUM_FRAMES} numbers from 1, with commas between them.")
    return [int(word) for word in words]


def _pixels_as_accepted(ranges: Sequence[Accepted], header: Header, *, single: bool) -> tuple[str, str, bool]:
    """Return the content type of pixels, their bare media type, and whether they go into parts, or raise 406.

    Native pixels are octets in little endian. Encapsulated ones are of their own media type, or octets for who takes any transfer
    syntax or names this one.
    """
    assert header.pixels is not None  # noqa: S101  who calls has looked
    stored = str(header.pixels.transfer_syntax_uid)
    native = header.pixels.length is not None
    own = OCTETS if native else compressed_type(stored)
    syntax = EXPLICIT if native else stored
    for entry in ranges:
        if entry.multipart is False and not single:
            continue
        names_it = entry.transfer_syntax in {"*", syntax, None} or (native and entry.transfer_syntax == stored)
        as_octets = entry.media_type == OCTETS and (native or entry.transfer_syntax in {"*", stored})
        if (entry.takes(own) and names_it) or (as_octets and names_it):
            media_type = OCTETS if as_octets else own
            return f"{media_type}; transfer-syntax={syntax}", media_type, entry.multipart is not False
    raise HTTPException(406, f"These pixels are given as multipart/related of {own} in transfer syntax {syntax} alone.")


def _multipart_octets(ranges: Sequence[Accepted]) -> bool:
    """Whether bulk data goes into parts, or raise 406."""
    for entry in ranges:
        if entry.takes(OCTETS):
            return entry.multipart is True
    raise HTTPException(406, f"Bulk data is given as {OCTETS}, alone or in parts.")
