"""What a peer asks of the worklist is read or refused with 400, whatever stands there."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from starlette.exceptions import HTTPException

from dicomnode.web.work_order import KEPT, as_json, read_data_set, read_order
from storage.records import PackageRecord, Peer


class Registry:
    """One enabled package and one peer that receives."""

    def package(self, name: str, version: str | None) -> PackageRecord | None:
        known = (name, version or "1") == ("stub", "1")
        now = datetime(2026, 1, 1, tzinfo=UTC)
        return PackageRecord(name=name, version="1", digest="d", state="enabled", check=None, added_at=now) if known else None

    def peers(self) -> list[Peer]:
        return [Peer(ae_title="PACS", host="h", port=104, sends=False, receives=True, tls=False, client_cert=None)]


TAGS = (
    "00741000", "00741200", "00741204", "00404005", "00404041", "0020000D", "00404018", "00741210", "00404025", "00404070", "00404071",
    "21000140", "00080100", "00080102", "0040A043", "0040A160", "00404021", "0040A370", "00080050", "00401001", "00100010", "00100020",
    "00081195", "00741216", "00080018", "60000010", "00091001", "7FE00010", "00280106", "00280010", "0040E021", "x", "",
)  # fmt: skip
WORDS = (
    "SCHEDULED", "HIGH", "READY", "stub", "99DICOMNODE", "111001", "111003", "DCM", "1.2.3", "20261128", "PACS", "DICOMNODE", "\0",
    "\ud800",
)  # fmt: skip
TEXT = st.sampled_from(WORDS) | st.text(max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS | st.dictionaries(st.sampled_from(("Alphabetic", "Phonetic", "x")), SCALARS, max_size=2),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(TAGS),
            st.fixed_dictionaries(
                {"vr": st.sampled_from(("CS", "SQ", "LO", "UI", "PN", "DT", "SH", "UT", "AE", "US", "OW", 1, None)) | inner},
                optional={"Value": inner | st.lists(inner, max_size=3), "BulkDataURI": SCALARS},
            )
            | inner,
            max_size=4,
        )
        | st.lists(inner, max_size=3)
    ),
    max_leaves=12,
)


def of(**values: Any) -> dict[str, Any]:
    return {tag.removeprefix("x"): {"vr": vr, "Value": [value]} for tag, (vr, value) in values.items()}


WHOLE = of(
    x00741000=("CS", "SCHEDULED"), x00741200=("CS", "HIGH"), x00741204=("LO", "label"), x00404005=("DT", "20261128"),
    x00404041=("CS", "READY"), x0020000D=("UI", "1.2.3"), x00404018=("SQ", of(x00080100=("SH", "stub"), x00080102=("SH", "99DICOMNODE"))),
    x00100010=("PN", {"Alphabetic": "Doe^Jane"}),
)  # fmt: skip


def read(body: bytes) -> Any:
    return read_order(read_data_set(body), None, "RIS", ("DICOMNODE",), Registry())  # type: ignore[arg-type]  # as much as is asked for


def outcome(body: bytes) -> tuple[int, str | None]:
    """Which status a request gets, and the package of what is made of it."""
    try:
        item = read(body).item
    except HTTPException as refusal:
        return refusal.status_code, None
    json.dumps(item.requested, allow_nan=False)
    return 201, item.package


@settings(max_examples=300)
@given(VALUES, st.sampled_from([*WHOLE, *TAGS]))
def test_whatever_stands_in_a_request_it_is_read_or_refused(value: Any, tag: str) -> None:
    for body in (value, {**WHOLE, tag: value}, {**WHOLE, "0040A370": {"vr": "SQ", "Value": [value]}}):
        status, package = outcome(json.dumps(body).encode())
        assert (status, package) in {(400, None), (201, "stub")}


def test_what_is_kept_of_a_request_is_said_again_as_it_was() -> None:
    order = read(json.dumps([WHOLE]).encode())
    assert order.item.requested == {tag: WHOLE[tag] for tag in ("00100010", "00404018")}
    assert not order.modified
    values = read_data_set(json.dumps(WHOLE).encode())
    assert as_json({keyword: values[keyword] for keyword in KEPT if keyword in values}) == order.item.requested
    assert read(json.dumps(WHOLE).encode()).item.uid == order.item.uid, "the same request has the same UID"
    assert read(json.dumps(WHOLE | of(x00741204=("LO", "other"))).encode()).item.uid != order.item.uid


@pytest.mark.parametrize("body", [b"\x00", b'{"00741000":{"vr":["CS"]}}', b'{"60000010":{"vr":"US","Value":[1]}}', b"1e999", b"9" * 5000])
def test_odd_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(HTTPException):
        read(body)
