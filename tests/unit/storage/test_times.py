"""What a DT means: the first and the last moment that it leaves open."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, strategies as st

from storage.times import moment, moments


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2026+0000", "2026-01-01T00:00:00", "2026-12-31T23:59:59.999999"),
        ("202602+0000", "2026-02-01T00:00:00", "2026-02-28T23:59:59.999999"),
        ("202412+0000", "2024-12-01T00:00:00", "2024-12-31T23:59:59.999999"),
        ("20261128+0000", "2026-11-28T00:00:00", "2026-11-28T23:59:59.999999"),
        ("2026112807+0100", "2026-11-28T06:00:00", "2026-11-28T06:59:59.999999"),
        ("202611280730-0530", "2026-11-28T13:00:00", "2026-11-28T13:00:59.999999"),
        ("20261128073015.5+0000", "2026-11-28T07:30:15.500000", "2026-11-28T07:30:15.599999"),
        ("20261128+0000-", "2026-11-28T00:00:00", None),
        ("-20261128+0000", None, "2026-11-28T23:59:59.999999"),
        ("20261128+0000-20261129+0000", "2026-11-28T00:00:00", "2026-11-29T23:59:59.999999"),
    ],
)
def test_a_dt_leaves_open_what_follows(text: str, first: str | None, last: str | None) -> None:
    expected = tuple(None if bound is None else datetime.fromisoformat(bound).replace(tzinfo=UTC) for bound in (first, last))
    assert moments(text) == expected


def test_two_days_with_a_dash_between_are_a_range_and_no_offset() -> None:
    assert moments("20261128-20261129") == (moment("20261128"), moment("20261129", latest=True))


@pytest.mark.parametrize(
    "text", ["", "-", "x", "202", "20261301", "20260230", "2026112825", "2026.5", "20261128+2500", "1--2", "0000", "9999" * 4, "٢٠٢٦"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        moments(text)


@given(st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2200, 1, 1)), st.integers(-12, 14))  # noqa: DTZ001  what is written has no zone
def test_what_is_written_is_read(when: datetime, hours: int) -> None:
    written = f"{when:%Y%m%d%H%M%S.%f}{hours:+03d}00"
    assert moment(written) == moment(written, latest=True) == when.replace(tzinfo=UTC) - timedelta(hours=hours)
