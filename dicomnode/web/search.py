"""QIDO-RS (PS3.18 10.6): which studies, series and instances the node holds that match.

What a search asks for and the node can't do is told in a Warning header, never passed over in silence. Must never put a value of a
key into a message or a log.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Final

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dicomnode.analysis.headers import Header, HeaderReader
from dicomnode.analysis.stored import Unreadable
from dicomnode.config import WebSection
from dicomnode.web.json_model import Json, attributes_as_json, encode, header_as_json
from dicomnode.web.media import JSON, demand_json
from dicomnode.web.retrieve import uids_of
from storage import Storage
from storage.query import COUNTED, MATCHED, Attributes, BadQuery, Level

PARAMETERS: Final = frozenset({"limit", "offset", "fuzzymatching", "includefield", "accept", "emptyvaluematching", "multiplevaluematching"})
# PS3.18 table 10.6.3-5: what is told of an image beside what the index knows, from its header.
_OF_HEADERS: Final = ("Rows", "Columns", "BitsAllocated", "NumberOfFrames")
MAXIMUM_PARAMETERS: Final = 256
_UIDS: Final = {"STUDY": 1, "SERIES": 2, "IMAGE": 3}


class Search:
    """Answers QIDO-RS requests, for any number of threads."""

    def __init__(self, settings: WebSection, storage: Storage, address_of: Callable[[Request], str]) -> None:
        """`address_of` says by which address a request's caller knows the node's DICOMweb."""
        self._maximum = settings.maximum_matches
        self._storage = storage
        self._address_of = address_of

    def studies(self, request: Request) -> Response:
        """Studies that match."""
        return self._search(request, "STUDY")

    def series(self, request: Request) -> Response:
        """Series that match, of one study or of all."""
        return self._search(request, "SERIES")

    def instances(self, request: Request) -> Response:
        """Instances that match, of a series, a study or of all."""
        return self._search(request, "IMAGE")

    def _search(self, request: Request, level: Level) -> Response:
        demand_json(request)
        pairs = request.query_params.multi_items()
        if len(pairs) > MAXIMUM_PARAMETERS:
            raise HTTPException(400, f"A search has at most {MAXIMUM_PARAMETERS} parameters.")
        parameters = dict(pairs)
        keys, ignored = keys_of([pair for pair in pairs if pair[0] not in PARAMETERS], MATCHED[level])
        wanted, all_fields = included(request.query_params.getlist("includefield"))
        keys |= uids_of(request)
        limit = min(count_of(parameters, "limit", self._maximum), self._maximum)
        offset = count_of(parameters, "offset", 0)
        try:
            found = self._storage.query.find(level, keys, limit=limit + 1, offset=offset)
        except BadQuery as error:
            raise HTTPException(400, f"The search can't be done: {error}.") from error
        warnings = []
        if ignored:
            warnings.append(f"The following parameters are not matched and were ignored: {', '.join(ignored)}")
        if parameters.get("fuzzymatching", "false").lower() == "true":
            warnings.append("The fuzzymatching parameter is not supported. Only literal matching has been performed.")
        if level != "IMAGE" and (left_out := sorted(wanted - MATCHED[level] - COUNTED[level])):
            warnings.append(f"The following attributes are not known at this level: {', '.join(left_out)}")
        if len(found) > limit and limit:
            warnings.append("There are more results that can be requested by offset.")
        address = self._address_of(request)
        headers = [("Warning", f'299 dicomnode "{warning}"') for warning in warnings]
        body = [self._as_json(match, level, wanted, address, all_fields=all_fields) for match in found[:limit]]
        response = Response(encode(body), media_type=JSON) if body else Response(status_code=204)
        for name, value in [*headers, ("Cache-Control", "no-store")]:
            response.headers.append(name, value)
        return response

    def _as_json(self, match: Attributes, level: Level, wanted: Collection[str], address: str, *, all_fields: bool) -> Json:
        uids = [str(match[keyword]) for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")[: _UIDS[level]]]
        place = address + "".join(f"/{word}/{uid}" for word, uid in zip(("studies", "series", "instances"), uids, strict=False))
        made: Json = {}
        if level == "IMAGE":
            made = self._of_header(uids, place, None if all_fields else {*wanted, *_OF_HEADERS})
        known = [(keyword, value) for keyword, value in match.items() if keyword != "AvailableTransferSyntaxUID"]
        made |= attributes_as_json(
            [*known, ("RetrieveURL", place), ("InstanceAvailability", "ONLINE"), ("SpecificCharacterSet", "ISO_IR 192")]
        )
        return dict(sorted(made.items()))

    def _of_header(self, uids: Iterable[str], place: str, wanted: Collection[str] | None) -> Json:
        """What the header of an instance's file says; `wanted` None: all of it."""
        held = self._storage.query.held(dict(zip(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), uids, strict=True)), limit=1)
        try:
            header = HeaderReader().read(self._storage.objects.path(held[0].object_id)) if held else None
        except (Unreadable, OSError):
            header = None
        if header is None:
            return {}
        if wanted is None:
            return header_as_json(header, held[0].transfer_syntax_uid, place)
        chosen = _part_of(header, wanted)
        return {tag: element for tag, element in header_as_json(chosen, held[0].transfer_syntax_uid, place).items() if tag in _tags(wanted)}


def _part_of(header: Header, wanted: Collection[str]) -> Header:
    """The header without what isn't wanted, which needs no converting then."""
    for tag in [tag for tag in header.keys() if keyword_for_tag(tag) not in wanted]:  # noqa: SIM118  a data set iterates over its elements
        del header[tag]
    return header


def _tags(keywords: Iterable[str]) -> set[str]:
    return {f"{tag_for_keyword(keyword):08X}" for keyword in keywords}


def _keyword(name: str) -> str:
    """Return the keyword of an attribute given by keyword or by eight hex digits. Raises HTTPException 400 if there is none such."""
    if len(name) == 8 and all(character in "0123456789abcdefABCDEF" for character in name):
        name = keyword_for_tag(int(name, 16)) or ""
    if not name or tag_for_keyword(name) is None:
        raise HTTPException(400, "A parameter of the search is no attribute of DICOM.")
    return name


def keys_of(pairs: Iterable[tuple[str, str]], matched: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Return the keys that are matched, and the keywords of those that are not; 400 for what is no key."""
    keys: dict[str, str] = {}
    ignored = []
    for name, value in pairs:
        path = [_keyword(word) for word in name.split(".")]
        keyword = ".".join(path)
        if keyword in keys or keyword in ignored:
            raise HTTPException(400, f"The search names {keyword} twice.")
        if keyword in matched:
            keys[keyword] = value.replace(",", "\\") if dictionary_VR(path[-1]) == "UI" else value
        else:
            ignored.append(keyword)
    return keys, ignored


def included(values: Iterable[str]) -> tuple[set[str], bool]:
    """Return the keywords of `includefield`, and whether it says all."""
    words = [word.strip() for value in values for word in value.split(",") if word.strip()]
    return {_keyword(word.rpartition(".")[2]) for word in words if word != "all"}, "all" in words


def count_of(parameters: dict[str, str], name: str, default: int) -> int:
    """Return the number that a parameter is, or `default` where it is absent; 400 for what is none."""
    text = parameters.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise HTTPException(400, f"{name} is a number from 0.")
    return int(text)
