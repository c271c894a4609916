"""Whatever a PACS does to a delivery, it ends in one committed copy of each result, or in a failure that is seen and can be replayed.

Tickets are worked off as the engine does, by the default schedule of a day divided by 360,000.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lying_pacs import LyingPacs, Request, lying_pacs, uids

from dicomnode.completion import retry
from dicomnode.config import EngineSection
from pacs import wait_until

sys.path.insert(0, str(Path(__file__).parent))
from test_commitment import GENEROUS, Site, prepared  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("calm_network_library")

DAY = EngineSection().retry_schedule_seconds
HOUR_TRIES = next(number for number in range(len(DAY)) if sum(DAY[:number]) >= 3600)  # how often a delivery is tried within an hour
SILENCE = 0.1  # seconds until a peer that says nothing is given up: the default divided by 300
Lie = Callable[["Node"], None]


class Node(Site):
    """A node with two results on their way, and the engine's work done by the test."""

    def __init__(self, folder: Path, made: Path, pacs: LyingPacs, *, answer_seconds: float) -> None:
        super().__init__(made, folder, pacs, report_seconds=0, answer_seconds=answer_seconds, rounds=2)
        engine = EngineSection(retry_schedule_seconds=tuple(seconds / 360_000 for seconds in DAY))
        self.set(engine=engine)

    def set(self, **sections: object) -> None:
        """Change the node's settings."""
        self.settings = self.settings.model_copy(update=sections)
        self.sender._settings = self.commitment._settings = self.sender._commitment._settings = self.settings

    def wait_for_response(self, seconds: float) -> None:
        """Wait for the response to a request to commit for so long."""
        self.set(commitment=self.settings.commitment.model_copy(update={"response_seconds": seconds}))

    def settle(self) -> None:
        """Work off tickets until the job has ended and all that the PACS says later has been heard."""
        until = time.monotonic() + 5 * GENEROUS
        while self.job.state in {"queued", "running"}:
            drawn = len(self.client.drawn)
            wait = self.deliver()
            if wait is None or wait > 1:  # a report has drawn a ticket or ended the job, or will
                wait_until(
                    lambda drawn=drawn: self.job.state not in {"queued", "running"} or len(self.client.drawn) > drawn,  # type: ignore[misc]
                    what=f"a report: {self.job}",
                )
                self.attempt = 0
            else:
                time.sleep(wait)
            assert time.monotonic() < until, f"the job does not end: {self.job}"
        for thread in self.pacs.threads:
            thread.join()


def yes(pacs: LyingPacs) -> Callable[[Request], int]:
    """Commit to everything on a new association."""

    def answer(request: Request) -> int:
        pacs.later(lambda: pacs.report_anew(request, uids(request)))
        return 0

    return answer


def truth(node: Node) -> None:
    node.pacs.answer = yes(node.pacs)


def aborts_mid_store(node: Node) -> None:
    truth(node)
    node.pacs.aborts = 3


def warns(status: int) -> Lie:
    def lie(node: Node) -> None:
        truth(node)
        node.pacs.store_status = lambda _uid: status

    return lie


def refuses_for_an_hour(node: Node) -> None:
    truth(node)
    tries = iter(range(2 * HOUR_TRIES))
    node.pacs.store_status = lambda _uid: 0xA700 if next(tries, None) is not None else 0


def commits_half_first(node: Node) -> None:
    def answer(request: Request) -> int:
        half = uids(request)[: 1 if len(node.pacs.requests) == 1 else None]
        node.pacs.later(lambda: node.pacs.report_anew(request, half, [uid for uid in uids(request) if uid not in half]))
        return 0

    node.pacs.answer = answer


def answers_twice(node: Node) -> None:
    def twice(request: Request) -> None:
        for _ in range(2):
            node.pacs.report_anew(request, uids(request))

    node.pacs.answer = lambda request: (node.pacs.later(lambda: twice(request)), 0)[1]


def answers_late(node: Node) -> None:
    """When it has been asked again already, and to the first request."""

    def answer(request: Request) -> int:
        if len(node.pacs.requests) == 2:
            node.pacs.later(lambda: node.pacs.report_anew(node.pacs.requests[0], uids(request)))
        return 0

    node.pacs.answer = answer


def never_answers_at_first(node: Node) -> None:
    """No response to the first two N-ACTION requests: the association breaks."""

    def answer(request: Request) -> int:
        if len(node.pacs.requests) <= 2:
            request.association.abort()
            return 0
        return yes(node.pacs)(request)

    node.pacs.answer = answer


def silent(request: Request) -> int:
    """Say nothing until nobody waits for it any longer."""
    wait_until(lambda: request.association.dul.peek_next_pdu() is not None, what="the node to give up", every=0.02)
    return 0  # to nobody


def is_silent_at_first(node: Node) -> None:
    """No response to the first two N-ACTION requests until the time-out; their associations stay open."""
    node.wait_for_response(SILENCE)

    def answer(request: Request) -> int:
        if len(node.pacs.requests) == 2:  # the next one is answered, and a slow machine needs time for that
            node.wait_for_response(GENEROUS)
        return silent(request) if len(node.pacs.requests) <= 2 else yes(node.pacs)(request)

    node.pacs.answer = answer


def reports_first(node: Node) -> None:
    node.pacs.answer = lambda request: (node.pacs.report_first(request, uids(request)), 0)[1]


COMMITTED: dict[str, tuple[Lie, int]] = {  # and how often at most an object came; more than once only the same bytes
    "tells the truth": (truth, 1),
    "aborts amid three stores": (aborts_mid_store, 1),
    "stores with B000": (warns(0xB000), 1),
    "stores with B006": (warns(0xB006), 1),
    "stores with B007": (warns(0xB007), 1),
    "is out of resources for an hour": (refuses_for_an_hour, 1),
    "commits to half": (commits_half_first, 2),
    "answers twice": (answers_twice, 1),
    "answers late on a new association": (answers_late, 1),
    "answers no request at first": (never_answers_at_first, 1),
    "is silent to requests at first": (is_silent_at_first, 1),
    "reports before it answers the request": (reports_first, 1),
}


def never_commits(node: Node) -> None:
    node.pacs.answer = lambda _request: 0x0000


def is_silent(node: Node) -> None:
    node.set(engine=EngineSection(retry_schedule_seconds=(0.01,) * 5))
    node.wait_for_response(SILENCE)
    node.pacs.answer = silent


def breaks_every_request(node: Node) -> None:
    node.pacs.answer = lambda request: (request.association.abort(), 0)[1]


def always(status: int) -> Lie:
    def lie(node: Node) -> None:
        truth(node)
        node.pacs.store_status = lambda _uid: status

    return lie


def never_holds_half(node: Node) -> None:
    def answer(request: Request) -> int:
        node.pacs.later(lambda: node.pacs.report_anew(request, set(uids(request)) & {node.uids[0]}, set(uids(request)) - {node.uids[0]}))
        return 0

    node.pacs.answer = answer


FAILED: dict[str, tuple[Lie, str, str, int | None]] = {  # reason code, what the reason says, and how often each object was tried
    "is out of resources for days": (always(0xA700), "delivery-failed", "0xA700", len(DAY) + 1),
    "fails to process": (always(0x0110), "delivery-failed", "0x0110", len(DAY) + 1),
    "finds another SOP class": (always(0xA900), "delivery-failed", "0xA900", 1),
    "cannot understand": (always(0xC000), "delivery-failed", "0xC000", 1),
    "has no such instance": (always(0x0112), "delivery-failed", "0x0112", 1),
    "doesn't support the class": (always(0x0122), "delivery-failed", "0x0122", 1),
    "doesn't let us": (always(0x0124), "delivery-failed", "0x0124", 1),
    "never commits": (never_commits, "not-committed", "has not reported", 1),
    "breaks off each request": (breaks_every_request, "not-committed", "was not asked to commit", 1),
    "is silent to each request": (is_silent, "not-committed", "was silent for 0.1 s", 1),
    "never holds half": (never_holds_half, "not-committed", "0x0112", None),
}


UNANSWERED = {"never commits", "answers late on a new association"}  # and is asked again soon; who answers is given time


@pytest.fixture
def node(prepared: Path, tmp_path: Path, lie: str) -> Iterator[Node]:  # noqa: F811  (the fixture)
    with lying_pacs() as pacs:
        node = Node(tmp_path, prepared, pacs, answer_seconds=0.05 if lie in UNANSWERED else GENEROUS)
        yield node
        for thread in pacs.threads:
            thread.join()
        node.end()


def settled(node: Node) -> dict[str, Any]:
    return {"job": node.job.state, "results": node.states, "reason": node.job.reason_code}


@pytest.mark.parametrize("lie", COMMITTED)
def test_a_pacs_that_ends_with_one_committed_copy(node: Node, lie: str) -> None:
    prepare, copies = COMMITTED[lie]
    prepare(node)
    node.settle()
    assert settled(node) == {"job": "done", "results": ["committed"] * 2, "reason": None}
    assert set(node.pacs.stored) == set(node.uids)
    assert max(node.pacs.stored.values()) <= copies
    assert all(len(copies) == 1 for copies in node.pacs.contents.values())  # a second copy has the same bytes
    assert set(node.pacs.answered) <= {0}
    if lie.startswith("stores with"):
        assert all(row.note is not None and row.note.startswith(f"status 0x{lie[-4:]}") for row in node.deliveries)


@pytest.mark.parametrize("lie", FAILED)
def test_a_pacs_that_ends_with_a_failure_that_is_seen_and_replayed(node: Node, lie: str) -> None:
    prepare, code, reason, tries = FAILED[lie]
    prepare(node)
    node.settle()
    assert (node.job.state, node.job.reason_code) == ("failed", code)
    assert reason in (node.job.reason or "")
    if tries is not None:
        assert set(node.pacs.tried.values()) == {tries}
    node.pacs.store_status = lambda _uid: 0
    truth(node)
    node.wait_for_response(GENEROUS)
    retry(node.storage, node.client, node.job)
    node.attempt = 0
    node.settle()
    assert settled(node) == {"job": "done", "results": ["committed"] * 2, "reason": None}
    assert all(len(copies) == 1 for copies in node.pacs.contents.values())
