"""Reads a multipart/related body as it comes (RFC 2046 5.1, RFC 2387): parts, their headers, and their bytes in chunks.

Must never hold more than a chunk and a boundary. python-multipart, which forms are read with, knows no preamble and wants a
Content-Disposition.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dicomnode.errors import NodeError

MAXIMUM_PART_HEADER: Final = 8192  # bytes
MAXIMUM_PREAMBLE: Final = 65536
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,199}[0-9A-Za-z'()+_,./:=?-]")  # Orthanc's has 73, where RFC 2046 allows 70
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*", re.DOTALL)
_LINE_END: Final = re.compile(rb"[ \t]*\r\n")


class MalformedMultipart(NodeError):
    """The body is not what its media type says."""


@dataclass(frozen=True, kw_only=True)
class PartBegins:
    """A part's header was read; names in lower case."""

    headers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PartEnds:
    """All bytes of a part have come."""


Event = PartBegins | PartEnds | memoryview


class MultipartReader:
    """Takes a body chunk by chunk and says what stands in it."""

    def __init__(self, boundary: bytes) -> None:
        """Raises MalformedMultipart for what is no boundary."""
        if not _BOUNDARY.fullmatch(boundary):
            raise MalformedMultipart("the boundary is absent or malformed")
        self._delimiter = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # the first delimiter may be the body's first bytes, without the line end before it
        self._state = "preamble"  # then "line" after a delimiter, "header", "content", and "epilogue"
        self._passed = 0

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take the next bytes and give what they complete; a memoryview given is valid until the next step.

        Raises:
            MalformedMultipart: the body is no multipart body, or a part's header is too long or malformed.
        """
        self._buffer += chunk
        while True:
            state = self._state
            if state == "epilogue":
                self._buffer.clear()
                return
            step = {"preamble": self._preamble, "line": self._line, "header": self._header, "content": self._content}[state]
            before = len(self._buffer)
            yield from step()
            if self._state == state and (len(self._buffer) == before or state == "content"):
                return

    def end(self) -> None:
        """Say that the body has ended. Raises MalformedMultipart if its last delimiter didn't come."""
        if self._state != "epilogue":
            raise MalformedMultipart("the body ends before its last boundary")

    def _preamble(self) -> Iterator[Event]:
        found = self._buffer.find(self._delimiter)
        kept = len(self._delimiter) - 1
        drop = found + len(self._delimiter) if found >= 0 else max(0, len(self._buffer) - kept)
        self._passed += drop
        del self._buffer[:drop]
        if found >= 0:
            self._state = "line"
        elif self._passed > MAXIMUM_PREAMBLE:
            raise MalformedMultipart("the boundary doesn't occur in the body")
        yield from ()

    def _line(self) -> Iterator[Event]:
        """What follows a delimiter on its line."""
        if self._buffer[:2] == b"--":
            self._buffer.clear()
            self._state = "epilogue"
        elif found := _LINE_END.match(self._buffer):
            del self._buffer[: found.end() - 2]  # an empty header begins with the line end that ends it
            self._state = "header"
        elif len(self._buffer) > 256 or not re.fullmatch(rb"-?|[ \t]*\r?", self._buffer):
            raise MalformedMultipart("something follows a boundary on its line")
        yield from ()

    def _header(self) -> Iterator[Event]:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAXIMUM_PART_HEADER:
                raise MalformedMultipart("a part's header is too long")
            return
        if end > MAXIMUM_PART_HEADER:
            raise MalformedMultipart("a part's header is too long")
        headers = {}
        for line in re.sub(rb"\r\n[ \t]+", b" ", bytes(self._buffer[:end])).split(b"\r\n"):
            found = _HEADER.fullmatch(line)
            if line and not found:
                raise MalformedMultipart("a part's header is malformed")
            if found:
                headers[found[1].decode("ascii").lower()] = found[2].decode("latin_1")
        del self._buffer[: end + 2]  # the delimiter of an empty part begins with the line end that is left
        self._state = "content"
        self._begun = False
        yield PartBegins(headers=headers)

    def _content(self) -> Iterator[Event]:
        found = self._buffer.find(self._delimiter)
        start = 0 if self._begun else 2
        end = found if found >= 0 else len(self._buffer) - len(self._delimiter) + 1
        if end > start:
            with memoryview(self._buffer) as view, view[start:end] as content:
                yield content
            self._begun = True
        if found >= 0:
            del self._buffer[: found + len(self._delimiter)]
            self._state = "line"
            yield PartEnds()
        elif self._begun:
            del self._buffer[:end]
