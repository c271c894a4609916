"""Media types of DICOMweb (PS3.18 8.7): what a caller accepts, and multipart responses.

Must never send what wasn't accepted, or hold more of a response than one chunk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse

MULTIPART: Final = "multipart/related"
DICOM: Final = "application/dicom"
JSON: Final = "application/dicom+json"
OCTETS: Final = "application/octet-stream"
EXPLICIT: Final = "1.2.840.10008.1.2.1"  # Explicit VR Little Endian: what is meant where no transfer syntax is named

_MAXIMUM_RANGES: Final = 64
_LIST: Final = re.compile(r'((?:[^",]|"(?:[^"\\]|\\.)*")+)')
_PARAMETER: Final = re.compile(r';\s*([^\s;=]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s;]*)\s*')
_TYPE: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+/[!#$%&'*+.^_`|~0-9a-z-]+")

# Of pixel data that is stored compressed: the media type of its frames (PS3.18 table 8.7.3-4, and -5 for video).
_COMPRESSED: Final = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.92": "image/jpx",
    "1.2.840.10008.1.2.4.93": "image/jpx",
    "1.2.840.10008.1.2.4.110": "image/jxl",
    "1.2.840.10008.1.2.4.111": "image/jxl",
    "1.2.840.10008.1.2.4.112": "image/jxl",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """One media range of an Accept header. `media_type` is that of the parts where it is multipart."""

    media_type: str
    multipart: bool | None  # None: either, from */*
    transfer_syntax: str | None  # "*": any
    quality: float = field(default=1.0, compare=False)

    def takes(self, media_type: str) -> bool:
        """Whether it names this media type, or a range that holds it."""
        kind, _, rest = self.media_type.partition("/")
        return self.media_type in {"*/*", media_type} or (rest == "*" and kind == media_type.partition("/")[0])


def media_type_of(value: str) -> tuple[str, dict[str, str]]:
    """Split a media type from its parameters, names in lower case. Raises ValueError for what is none."""
    name = value.partition(";")[0].strip().lower()
    rest = value[len(value.partition(";")[0]) :].strip()
    parameters = {}
    while rest:
        found = _PARAMETER.match(rest)
        if found is None:
            raise ValueError("malformed parameters")
        text = found[2]
        parameters[found[1].lower()] = re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text
        rest = rest[found.end() :]
    if not _TYPE.fullmatch(name):
        raise ValueError("no media type")
    return name, parameters


def accepted(request: Request) -> list[Accepted]:
    """Return what a caller accepts, what it prefers first: the query parameter `accept`, else the header, else anything.

    Raises:
        HTTPException: 400, there is a header and no media type in it.
    """
    text = ", ".join(request.query_params.getlist("accept")) or ", ".join(request.headers.getlist("accept"))
    if not text.strip():
        return [Accepted(media_type="*/*", multipart=None, transfer_syntax=None)]
    ranges = []
    for part in _LIST.findall(text)[:_MAXIMUM_RANGES]:
        try:
            name, parameters = media_type_of(part)
            quality = min(1.0, float(parameters.get("q", "1")))
        except ValueError:
            continue
        multipart = {MULTIPART: True, "multipart/*": True, "*/*": None}.get(name, False)
        ranges.append(
            Accepted(
                media_type=parameters.get("type", "*/*").lower() if multipart else name,
                multipart=multipart,
                transfer_syntax=parameters.get("transfer-syntax"),
                quality=quality,
            )
        )
    if not ranges:
        raise HTTPException(400, "The Accept header holds no media type.")
    return sorted((entry for entry in ranges if entry.quality > 0), key=lambda entry: -entry.quality)


def demand_json(request: Request) -> None:
    """Raise 406 unless JSON is accepted."""
    if not any(not entry.multipart and (entry.takes(JSON) or entry.takes("application/json")) for entry in accepted(request)):
        raise HTTPException(406, f"This resource is given as {JSON} alone.")


def compressed_type(transfer_syntax: str) -> str:
    """Return the media type of frames that are encapsulated in a transfer syntax."""
    return _COMPRESSED.get(transfer_syntax, "video/mp4" if transfer_syntax.startswith("1.2.840.10008.1.2.4.10") else OCTETS)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a multipart response, and how its bytes come about."""

    content_type: str
    content: Iterable[bytes]


def multipart_response(parts: Iterator[Part], media_type: str, status: int = 200) -> StreamingResponse:
    """Return a response that makes its parts one after another, each when it is its turn (RFC 2387)."""
    boundary = f"dicomnode-{os.urandom(16).hex()}"

    def chunks() -> Iterator[bytes]:
        for part in parts:
            yield f"--{boundary}\r\nContent-Type: {part.content_type}\r\n\r\n".encode("ascii")
            yield from part.content
            yield b"\r\n"
        yield f"--{boundary}--\r\n".encode("ascii")

    return StreamingResponse(
        chunks(), status, headers={"Content-Type": f'{MULTIPART}; type="{media_type}"; boundary={boundary}', "Cache-Control": "no-store"}
    )
