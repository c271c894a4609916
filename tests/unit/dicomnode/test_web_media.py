from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st
from starlette.requests import Request

from dicomnode.web.media import Accepted, accepted, media_type_of
from dicomnode.web.multipart import MalformedMultipart, MultipartReader, PartBegins, PartEnds

PARTS = ((b"Content-Type: application/dicom\r\n", b"DICM\r\n--cu\r\n"), (b"A: b\r\n c\r\n", b""), (b"", b"\r\n--"))
BODY = (
    b"preamble\r\n--cut\r\n"
    + b"\r\n--cut \t\r\n".join(header + b"\r\n" + content for header, content in PARTS)
    + b"\r\n--cut--\r\nepilogue"
)


def read(body: bytes, cuts: list[int]) -> list[tuple[dict[str, str], bytes]]:
    """The parts of a body that comes in pieces."""
    reader = MultipartReader(b"cut")
    parts: list[tuple[dict[str, str], bytes]] = []
    ended = 0
    bounds = [0, *sorted(cuts), len(body)]
    for start, end in pairwise(bounds):
        for event in reader.feed(body[start:end]):
            if isinstance(event, PartBegins):
                parts.append((dict(event.headers), b""))
            elif isinstance(event, PartEnds):
                ended += 1
            else:
                parts[-1] = parts[-1][0], parts[-1][1] + bytes(event)
    reader.end()
    assert ended == len(parts)
    return parts


@given(st.lists(st.integers(0, len(BODY)), max_size=20))
def test_a_body_reads_the_same_in_whatever_pieces_it_comes(cuts: list[int]) -> None:
    assert read(BODY, cuts) == [({"content-type": "application/dicom"}, PARTS[0][1]), ({"a": "b c"}, b""), ({}, PARTS[2][1])]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.lists(st.integers(0, 200), max_size=8))
def test_any_content_comes_back(contents: list[bytes], cuts: list[int]) -> None:
    body = b"".join(b"\r\n--cut\r\nX: y\r\n\r\n" + content for content in contents) + b"\r\n--cut--"
    wanted = [content for content in contents if b"\r\n--cut" not in b"\r\n" + content]
    if len(wanted) == len(contents):
        assert [content for _, content in read(body, [min(cut, len(body)) for cut in cuts])] == contents


@given(st.binary(max_size=300))
def test_what_is_no_multipart_body_is_told_in_one_way(body: bytes) -> None:
    reader = MultipartReader(b"cut")

    def read_all() -> None:
        list(reader.feed(body))
        reader.end()

    with pytest.raises(MalformedMultipart):
        read_all()


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (None, [("*/*", None, None)]),
        ("*/*", [("*/*", None, None)]),
        ('multipart/related; type="application/dicom"', [("application/dicom", True, None)]),
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", [("application/octet-stream", True, "*")]),
        ('image/jp2;q=0.2, multipart/related;type="image/jp2,odd\\"";q=0.5', [('image/jp2,odd"', True, None), ("image/jp2", False, None)]),
        ("application/dicom;q=0", []),
        ("rubbish, application/dicom", [("application/dicom", False, None)]),
    ],
)
def test_what_is_accepted_is_read_as_it_was_meant(header: str | None, wanted: list[tuple[str, bool | None, str | None]]) -> None:
    headers = [] if header is None else [(b"accept", header.encode())]
    request = Request({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers})
    assert accepted(request) == [Accepted(media_type=kind, multipart=parts, transfer_syntax=syntax) for kind, parts, syntax in wanted]


@pytest.mark.parametrize("text", ["", "x", ";", "a/b; c", "a/b; =d", "a/b c", "a/b/c"])
def test_what_is_no_media_type_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"media type|parameters"):
        media_type_of(text)
