"""Event reports of the worklist over a WebSocket: who subscribes is told, and is told what it missed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from dicomnode.web import subscribers
from dicomweb_site import HOST, PATIENCE_SECONDS, Site
from pacs import wait_until

sys.path.insert(0, str(Path(__file__).parent))
from test_dicomweb_access import a_peer, basic
from test_worklist import a_request, ask, close, jobs, receive, values, worklist

GLOBAL, FILTERED = "1.2.840.10008.5.1.4.34.5", "1.2.840.10008.5.1.4.34.5.1"


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    with worklist(tmp_path, database_url) as made:
        yield made


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Site]:
    """The same on SQLite, for what doesn't differ between the databases."""
    with worklist(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}") as made:
        yield made


def subscribe(site: Site, target: str, query: str = "", *, ae_title: str = "RIS", **headers: str) -> tuple[int, dict[str, str]]:
    return site.request("POST", f"/dicom-web/workitems/{target}/subscribers/{ae_title}{query}", **headers)[:2]


def unsubscribe(site: Site, target: str) -> int:
    return site.request("DELETE", f"/dicom-web/workitems/{target}/subscribers/RIS")[0]


def job_of(site: Site, uid: str) -> str:
    found = site.storage.workitems.item(uid)
    assert found is not None
    assert found.job_key is not None
    return found.job_key


@contextmanager
def channel(site: Site, ae_title: str = "RIS", **headers: str) -> Iterator[ClientConnection]:
    address = f"ws://{HOST}:{site.web.port}/dicom-web/subscribers/{ae_title}"
    with connect(address, open_timeout=PATIENCE_SECONDS, close_timeout=PATIENCE_SECONDS, additional_headers=headers) as made:
        yield made


def report(connection: ClientConnection) -> tuple[str, int, dict[str, Any]]:
    """The next report: of which work item, which event, and all of it."""
    read = json.loads(connection.recv(PATIENCE_SECONDS))
    assert read["00000002"]["Value"] == ["1.2.840.10008.5.1.4.34.6.1"]
    return read["00001000"]["Value"][0], read["00001002"]["Value"][0], read


def state(connection: ClientConnection) -> tuple[str, str, str]:
    """The next report of a state: of which work item, the state, and whether its input is ready."""
    while True:
        uid, event, read = report(connection)
        if event == 1:
            return uid, read["00741000"]["Value"][0], read["00404041"]["Value"][0]


def test_who_watches_a_work_item_is_told_all_that_becomes_of_it(one: Site) -> None:
    assert ask(one, a_request(), "1.2.9")[0] == 201
    assert ask(one, a_request(), "1.2.10")[0] == 201
    status, headers = subscribe(one, "1.2.9")
    assert (status, headers["content-location"]) == (201, f"ws://{HOST}:{one.web.port}/dicom-web/subscribers/RIS")
    with channel(one) as told:
        assert report(told)[1] == 5, "it is assigned to the node"
        assert state(told) == ("1.2.9", "SCHEDULED", "UNREADY")
        receive(one)
        close(one)
        assert state(told) == ("1.2.9", "SCHEDULED", "READY")
        job = job_of(one, "1.2.9")
        one.storage.jobs.start(job)
        assert state(told) == ("1.2.9", "IN PROGRESS", "READY")
        one.storage.jobs.progress(job, 0.5)
        uid, event, read = report(told)
        assert (uid, event, values(read, "00741002", "00741004")) == ("1.2.9", 3, [50.0])
        said = {"00741238": {"vr": "LT", "Value": ["ordered twice"]}}
        cancel_it = "/dicom-web/workitems/1.2.9/cancelrequest"
        assert one.request("POST", cancel_it, json.dumps(said).encode(), Content_Type="application/dicom+json")[0] == 202
        uid, event, read = report(told)
        assert (uid, event, values(read, "00741236"), values(read, "00741238")) == ("1.2.9", 2, ["DICOMWEB"], ["ordered twice"])
        uid, event, read = report(told)
        assert (uid, event, values(read, "00741000"), values(read, "00741238")) == ("1.2.9", 1, ["CANCELED"], ["ordered twice"])


def test_who_was_away_is_told_what_has_changed_meanwhile(site: Site) -> None:
    """What comes between two looks at the tables may still go by the subscriptions of before: so each step waits for a report first."""
    receive(site)
    close(site)
    assert ask(site, a_request(), "1.2.8")[0] == 201
    assert subscribe(site, GLOBAL)[0] == 201
    assert ask(site, a_request(), "1.2.9")[0] == 201
    with channel(site) as told:
        assert state(told) == ("1.2.9", "SCHEDULED", "READY")
    for job in jobs(site):
        site.storage.jobs.start(job.key)
        site.storage.jobs.finish(job.key, "done")
    with channel(site) as told:
        assert {state(told) for _ in range(2)} == {(uid, "COMPLETED", "READY") for uid in ("1.2.8", "1.2.9")}
        assert unsubscribe(site, "1.2.9") == 200
        assert ask(site, a_request(), "1.2.10")[0] == 201
        assert state(told) == ("1.2.10", "SCHEDULED", "READY")
        site.storage.jobs.requeue(job_of(site, "1.2.9"))
        site.storage.jobs.start(job_of(site, "1.2.10"))
        assert state(told) == ("1.2.10", "IN PROGRESS", "READY"), "of what it doesn't want to know it is told nothing"
        assert site.request("POST", f"/dicom-web/workitems/{GLOBAL}/subscribers/RIS/suspend")[0] == 200
        site.storage.jobs.progress(job_of(site, "1.2.10"), 0.5)
        assert report(told)[:2] == ("1.2.10", 3)
        assert ask(site, a_request(), "1.2.11")[0] == 201
        site.storage.jobs.finish(job_of(site, "1.2.10"), "done")
        assert state(told) == ("1.2.10", "COMPLETED", "READY"), "what is new isn't told, what was there is"
        assert unsubscribe(site, GLOBAL) == 200
        assert site.storage.subscriptions.of("RIS") == []


def test_a_filter_says_which_work_items_are_told_of(tmp_path: Path) -> None:
    with worklist(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}") as site:
        status, headers = subscribe(site, FILTERED, "?filter=PatientID=P2,ScheduledWorkitemCodeSequence.CodeValue=stub&deletionlock=true")
        assert (status, headers["warning"]) == (201, '299 dicomnode "Deletion Lock not granted."')
        with channel(site) as told:
            assert ask(site, a_request(), "1.2.8")[0] == 201
            assert ask(site, a_request(x00100020={"vr": "LO", "Value": ["P2"]}), "1.2.9")[0] == 201
            assert state(told) == ("1.2.9", "SCHEDULED", "UNREADY")
        for query, expected in (
            ("", 400), ("?PatientID=P2", 201), ("?filter=ProcedureStepState=SCHEDULED", 403), ("?filter=NoSuch=1", 400),
            ("?filter=StudyInstanceUID=x", 400),
        ):  # fmt: skip
            assert subscribe(site, FILTERED, query)[0] == expected, query
        assert subscribe(site, "1.2.77")[0] == 404
        assert subscribe(site, "nothing")[0] == 400
        assert subscribe(site, GLOBAL, ae_title="longer-than-sixteen-characters")[0] == 400
        assert site.request("POST", f"/dicom-web/workitems/{GLOBAL}/subscribers/OTHER/suspend")[0] == 404
        assert site.request("POST", "/dicom-web/workitems/1.2.9/subscribers/RIS/suspend")[0] == 400


def test_a_peer_subscribes_for_itself_and_no_page_of_elsewhere_listens(tmp_path: Path) -> None:
    peers = (a_peer("RIS", "s3cret"), a_peer("SCANNER", "s3cret", queries=False))
    with worklist(tmp_path / "a", f"sqlite:///{tmp_path / 'a' / 'node.sqlite'}", *peers, credentials=True) as site:
        ris, scanner = basic("RIS", "s3cret"), basic("SCANNER", "s3cret")
        assert subscribe(site, GLOBAL)[0] == 401
        assert subscribe(site, GLOBAL, Authorization=scanner)[0] == 403
        assert subscribe(site, GLOBAL, ae_title="OTHER", Authorization=ris)[0] == 403
        assert subscribe(site, GLOBAL, Authorization=ris)[0] == 201
        for headers, ae_title, status in (
            ({}, "RIS", 401),
            ({"Authorization": scanner}, "SCANNER", 403),
            ({"Authorization": ris}, "X", 403),
        ):
            with pytest.raises(InvalidStatus) as refused, channel(site, ae_title, **headers):
                pass
            assert refused.value.response.status_code == status
        with channel(site, Authorization=ris) as told:
            assert ask(site, a_request(), "1.2.9", Authorization=ris)[0] == 201
            assert state(told)[0] == "1.2.9"
    with worklist(tmp_path / "b", f"sqlite:///{tmp_path / 'b' / 'node.sqlite'}", origins=("https://ris.example",)) as site:
        with pytest.raises(InvalidStatus) as refused, channel(site, Origin="https://elsewhere.example"):
            pass
        assert refused.value.response.status_code == 403
        assert ask(site, a_request(), "1.2.9", Origin="https://elsewhere.example")[0] == 403
        assert ask(site, a_request(), "1.2.9", Origin="https://ris.example")[0] == 201
        with channel(site, Origin=f"http://{HOST}:{site.web.port}"):
            pass


def test_a_subscriber_that_talks_or_goes_holds_nothing_and_one_that_waits_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscribers, "MAXIMUM_CHANNELS", 2)
    with worklist(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", header_seconds=1) as site:
        for _ in range(5):
            with patiently(site) as told:
                told.send("is anybody there?")
        with patiently(site) as told, patiently(site) as talks:
            assert answer(site) == 503
            talks.send("x" * 5000)
            with pytest.raises(ConnectionClosed):
                talks.recv(PATIENCE_SECONDS)
            time.sleep(2)  # longer than a header may take
            assert told.ping().wait(PATIENCE_SECONDS)


def patiently(site: Site) -> ClientConnection:
    """A connection, once there is room for one and its header has come in time."""
    made: list[ClientConnection] = []

    def connected() -> bool:
        with suppress(InvalidStatus, InvalidMessage, OSError):
            made.append(connect(f"ws://{HOST}:{site.web.port}/dicom-web/subscribers/RIS", open_timeout=PATIENCE_SECONDS))
        return bool(made)

    wait_until(connected, what="a connection")
    return made[0]


def answer(site: Site) -> int:
    """The status of an attempt to connect whose header came in time."""
    statuses: list[int] = []

    def answered() -> bool:
        with suppress(InvalidMessage, OSError):
            try:
                with channel(site):
                    statuses.append(101)
            except InvalidStatus as refused:
                statuses.append(refused.response.status_code)
        return bool(statuses)

    wait_until(answered, what="an answer")
    return statuses[0]
