"""SENT is not COMMITTED: whatever a PACS answers, a result ends as one committed copy or as a failure that is seen and can be replayed."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import CT, EXPLICIT, a_dataset, encoded, received
from lying_pacs import (
    COMMITMENT,
    LyingPacs,
    Request,
    association_to,
    lying_pacs,
    report,
    send_report,
    uids,
)
from pydicom.dataset import Dataset

from dicomnode.commitment import StorageCommitment
from dicomnode.completion import retry
from dicomnode.config import CommitmentSection, EngineSection, ListenerSection, NodeSection, RetentionSection, Settings
from dicomnode.delivery import Sender
from dicomnode.dimse.scp import part10_prefix
from dicomnode.dimse.scu import echo
from dicomnode.engine import EngineClient
from dicomnode.receiver import Receiver
from dicomnode.retention import forget_commitments
from pacs import wait_until
from storage import open_storage
from storage.records import Delivery, Job, Peer, Result

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import STUDY, Bench

pytestmark = pytest.mark.usefixtures("calm_network_library")

KEY = f"deliver/{STUDY}/1/stub/1/PACS"
GENEROUS = 120.0


class Tickets(EngineClient):
    """The engine's client, whose tickets the test works off itself."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.drawn: list[str] = []

    def enqueue(self, connection: Any, key: str, *arguments: Any, **options: Any) -> None:
        super().enqueue(connection, key, *arguments, **options)
        if key == KEY:
            self.drawn.append(options.get("ticket", "0"))

    def waiting(self) -> list[str]:
        """The tickets of the delivery that are on its queue."""
        on_queue = self._client.list_workflows(workflow_id_prefix=f"{KEY}#", status=["ENQUEUED", "DELAYED"])
        return sorted(ticket.workflow_id for ticket in on_queue)


class Site:
    """A node with two results on their way to a PACS that commits."""

    def __init__(self, prepared: Path, folder: Path, pacs: LyingPacs, **commitment: float) -> None:
        shutil.copytree(prepared, folder / "site")
        folder = folder / "site"
        url = f"sqlite:///{folder / 'node.sqlite'}"
        self.pacs = pacs
        self.storage = open_storage(url, folder / "node")
        self.client = Tickets(url)
        self.settings = Settings(
            node=NodeSection(data=folder / "node"),
            listener=ListenerSection(port=0),
            engine=EngineSection(retry_schedule_seconds=(0.01, 0.01, 0.01)),
            commitment=CommitmentSection.model_validate({"report_seconds": 0, "answer_seconds": GENEROUS, "rounds": 2, **commitment}),
        )
        self.commitment = StorageCommitment(self.settings, self.storage, self.client)
        self.sender = Sender(self.settings, self.storage, self.client)
        self.receiver = Receiver(self.settings, self.storage, commitment=self.commitment)
        self.receiver.start()
        pacs.node_port = self.receiver.port
        self.storage.registry.add_peer(pacs.peer)
        self.attempt = 0
        self.uids = sorted(self._result(number) for number in (1, 2))
        with self.storage.database.writing() as transaction:
            self.storage.jobs.create(
                transaction, key=KEY, kind="deliver", study_instance_uid=STUDY, revision=1, package="stub", version="1", digest="d" * 64,
                run=1, peer="PACS", priority="routine",
            )  # fmt: skip
            self.storage.jobs.add_deliveries(transaction, KEY, "PACS", self.uids)

    def _result(self, number: int) -> str:
        dataset = a_dataset(CT, InstanceNumber=number)
        uid, data = str(dataset.SOPInstanceUID), encoded(dataset)
        stored = self.storage.objects.put(part10_prefix(received(data, uid=uid)), data)
        result = Result(
            sop_instance_uid=uid, sop_class_uid=CT, transfer_syntax_uid=EXPLICIT, modality="CT", study_instance_uid=STUDY,
            job_key=f"analyse/{STUDY}/1/stub/1", stored=stored, created_at=datetime.now(UTC),
        )  # fmt: skip
        with self.storage.database.writing() as transaction:
            self.storage.jobs.add_results(transaction, [result])
        return uid

    @property
    def job(self) -> Job:
        found = self.storage.jobs.job(KEY)
        assert found is not None
        return found

    @property
    def deliveries(self) -> list[Delivery]:
        return sorted(self.storage.jobs.deliveries(job_key=KEY), key=lambda delivery: delivery.sop_instance_uid)

    @property
    def states(self) -> list[str]:
        return [delivery.state for delivery in self.deliveries]

    def deliver(self) -> float | None:
        """Work off the job's next ticket as the engine would."""
        wait = self.sender.deliver(KEY, self.attempt)
        self.attempt += 1
        return wait

    def settle(self) -> None:
        """Work off tickets until the job has ended."""
        for _ in range(20):
            wait = self.deliver()
            if wait is not None:
                time.sleep(min(wait, 0.5))
            elif self.job.state != "queued":
                return
            else:
                self.attempt = 0  # a report has drawn a new ticket
        pytest.fail(f"the job does not end: {self.job}")

    def wait_for(self, state: str) -> None:
        wait_until(lambda: self.job.state == state, seconds=GENEROUS, what=f"the delivery to be {state}: {self.job}")

    def end(self) -> None:
        self.receiver.stop(0)
        self.client.close()
        self.storage.database.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a node that has received a study and closed it."""
    folder = tmp_path_factory.mktemp("prepared")
    bench = Bench(f"sqlite:///{folder / 'node.sqlite'}", folder / "node")
    bench.route()
    bench.receive()
    bench.close_studies()
    bench.end()
    return folder


@pytest.fixture
def pacs() -> Iterator[LyingPacs]:
    with lying_pacs() as pacs:
        yield pacs


@pytest.fixture
def site(prepared: Path, tmp_path: Path, pacs: LyingPacs) -> Iterator[Site]:
    site = Site(prepared, tmp_path, pacs)
    yield site
    site.end()


def impatient(prepared: Path, tmp_path: Path, pacs: LyingPacs) -> Site:
    """A site that asks again at once."""
    return Site(prepared, tmp_path, pacs, answer_seconds=0.01)


def test_a_pacs_that_reports_on_the_same_association_has_committed_to_one_copy(prepared: Path, tmp_path: Path, pacs: LyingPacs) -> None:
    site = Site(prepared, tmp_path, pacs, report_seconds=GENEROUS)

    def answer(request: Request) -> int:
        pacs.later(lambda: (time.sleep(0.2), pacs.report_here(request, uids(request))))
        return 0

    pacs.answer = answer
    assert site.deliver() is None
    assert (site.job.state, site.states) == ("done", ["committed"] * 2)
    assert list(pacs.stored.values()) == [1, 1]
    assert pacs.answered == [0]
    assert {(sop_class, uid) for sop_class, uid in pacs.requests[0].references} == {(CT, uid) for uid in site.uids}
    assert all(delivery.committed_at is not None and delivery.sent_at is not None for delivery in site.deliveries)
    site.end()


def test_a_pacs_that_reports_before_it_answers_the_request_has_committed(site: Site, pacs: LyingPacs) -> None:
    pacs.answer = lambda request: (pacs.report_first(request, uids(request)), 0)[1]
    assert site.deliver() is None
    assert (site.job.state, site.states, pacs.answered) == ("done", ["committed"] * 2, [0])
    assert list(pacs.stored.values()) == [1, 1]


def test_a_request_that_is_over_is_forgotten_after_a_while_and_one_that_is_not_stays(site: Site, pacs: LyingPacs) -> None:
    site.deliver()
    later = datetime.now(UTC) + timedelta(days=366)
    assert forget_commitments(site.storage, RetentionSection(), later) == 0
    pacs.report_anew(pacs.requests[0], site.uids)
    assert forget_commitments(site.storage, RetentionSection(), datetime.now(UTC)) == 0
    assert forget_commitments(site.storage, RetentionSection(), later) == 1
    pacs.report_anew(pacs.requests[0], site.uids)
    assert (site.states, pacs.answered) == (["committed"] * 2, [0, 0x0115])


def test_a_pacs_that_reports_on_an_association_of_its_own_ends_what_waits(site: Site, pacs: LyingPacs) -> None:
    assert site.deliver() == GENEROUS
    assert (site.job.state, site.job.reason_code, site.states) == ("queued", "waiting", ["sent"] * 2)
    assert "report is awaited" in (site.job.reason or "")
    left = site.deliver()  # a ticket too many asks nothing again
    assert left is not None
    assert 0 < left <= GENEROUS
    assert len(pacs.requests) == 1
    pacs.report_anew(pacs.requests[0], site.uids)
    assert (site.job.state, site.job.reason, site.states) == ("done", None, ["committed"] * 2)
    (asked,) = site.storage.commitments.commitments(job_key=KEY)
    assert (asked.state, asked.peer) == ("answered", "PACS")
    pacs.report_anew(pacs.requests[0], site.uids)  # twice
    pacs.report_anew(pacs.requests[0], (), site.uids)  # and then it takes it back
    assert (site.job.state, site.states, pacs.answered) == ("done", ["committed"] * 2, [0, 0, 0])
    assert site.deliver() is None
    assert list(pacs.stored.values()) == [1, 1]


def test_what_the_pacs_does_not_hold_is_sent_again_and_nothing_else(site: Site, pacs: LyingPacs) -> None:
    site.deliver()
    with site.storage.database.writing() as transaction:  # as the engine does with what it was told to wait for
        site.client.enqueue(transaction, KEY, "deliver", "routine", attempt=1, delay_seconds=GENEROUS)
    site.client.drawn.clear()
    pacs.report_anew(pacs.requests[0], site.uids[:1], site.uids[1:])
    pacs.report_anew(pacs.requests[0], site.uids[:1], site.uids[1:])  # twice counts once
    assert site.client.waiting() == [f"{KEY}#{pacs.requests[0].transaction_uid}.0"]
    assert site.states == ["committed", "waiting"]
    assert site.deliveries[1].error == "PACS does not commit to it: 0x0112 (no such object instance)"
    assert (site.job.state, site.deliveries[1].refusals) == ("queued", 1)
    assert site.client.drawn == [pacs.requests[0].transaction_uid]
    site.attempt = 0
    site.deliver()
    assert [pacs.stored[uid] for uid in site.uids] == [1, 2]
    assert uids(pacs.requests[1]) == site.uids[1:]
    pacs.report_anew(pacs.requests[1], site.uids[1:])
    assert (site.job.state, site.states) == ("done", ["committed"] * 2)


def test_a_pacs_that_never_holds_half_of_it_ends_in_a_failure_that_can_be_replayed(prepared: Path, tmp_path: Path, pacs: LyingPacs) -> None:
    site = Site(prepared, tmp_path, pacs, report_seconds=GENEROUS)

    def half(request: Request) -> int:
        pacs.later(lambda: pacs.report_anew(request, (uid for uid in uids(request) if uid == site.uids[0]), site.uids[1:]))
        return 0

    pacs.answer = half
    site.settle()
    assert (site.job.state, site.job.reason_code, site.states) == ("failed", "not-committed", ["committed", "failed"])
    assert "0x0112" in (site.job.reason or "")
    assert [pacs.stored[uid] for uid in site.uids] == [1, 3]  # sent, and twice again
    pacs.answer = lambda request: (pacs.later(lambda: pacs.report_anew(request, uids(request))), 0)[1]
    retry(site.storage, site.client, site.job)
    site.attempt = 0
    site.settle()
    assert (site.job.state, site.states) == ("done", ["committed"] * 2)
    assert [pacs.stored[uid] for uid in site.uids] == [1, 4]
    site.end()


def test_a_pacs_that_never_reports_is_asked_by_the_schedule_and_then_given_up_until_it_does(
    prepared: Path, tmp_path: Path, pacs: LyingPacs
) -> None:
    site = impatient(prepared, tmp_path, pacs)
    site.settle()
    assert (site.job.state, site.job.reason_code, site.states) == ("failed", "not-committed", ["sent"] * 2)
    assert "was asked 4 time(s) and has not reported" in (site.job.reason or "")
    assert len({request.transaction_uid for request in pacs.requests}) == 4
    assert list(pacs.stored.values()) == [1, 1]
    assert {asked.state for asked in site.storage.commitments.commitments()} == {"unanswered"}
    pacs.report_anew(pacs.requests[0], site.uids)  # late, and to the oldest transaction
    assert (site.job.state, site.job.reason, site.states) == ("done", None, ["committed"] * 2)
    pacs.report_anew(pacs.requests[3], (), site.uids)
    assert (site.states, pacs.answered) == (["committed"] * 2, [0, 0])
    site.end()


def test_a_late_no_to_an_older_request_counts_for_nothing(prepared: Path, tmp_path: Path, pacs: LyingPacs) -> None:
    site = impatient(prepared, tmp_path, pacs)
    site.deliver()
    time.sleep(0.1)
    site.deliver()
    assert len(pacs.requests) == 2
    pacs.report_anew(pacs.requests[0], (), site.uids)
    assert (site.job.state, site.states) == ("queued", ["sent"] * 2)
    pacs.report_anew(pacs.requests[1], site.uids)
    assert site.job.state == "done"
    site.end()


def test_a_pacs_that_aborts_or_breaks_off_is_asked_again_and_then_given_up(site: Site, pacs: LyingPacs) -> None:
    def abort(request: Request) -> int:
        request.association.abort()
        return 0

    pacs.answer = abort
    assert site.deliver() == 0.01
    assert (site.job.state, site.states) == ("queued", ["sent"] * 2)
    assert "was not asked to commit" in (site.job.reason or "")
    site.settle()
    assert (site.job.state, site.job.reason_code) == ("failed", "not-committed")
    assert len(pacs.requests) == 4
    assert list(pacs.stored.values()) == [1, 1]


def test_a_sender_that_dies_while_it_asks_leaves_a_request_that_is_made_again(
    site: Site, pacs: LyingPacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("storage.commitments.Commitments.acknowledged", die)
        with pytest.raises(KeyboardInterrupt):
            site.deliver()
    site.attempt = 0  # the ticket comes back to whoever takes over
    assert site.deliver() == GENEROUS
    assert [asked.state for asked in site.storage.commitments.commitments()] == ["unanswered", "waiting"]
    pacs.report_anew(pacs.requests[0], site.uids)  # it had heard the first request, too
    assert (site.job.state, list(pacs.stored.values())) == ("done", [1, 1])


@pytest.mark.parametrize(("status", "asked"), [(0x0213, 4), (0x0110, 4), (0x0124, 1), (0x0122, 1)])
def test_a_refused_request_is_repeated_where_that_can_help(site: Site, pacs: LyingPacs, status: int, asked: int) -> None:
    pacs.answer = lambda _request: status
    site.settle()
    assert (site.job.state, site.job.reason_code, len(pacs.requests)) == ("failed", "not-committed", asked)
    assert f"0x{status:04X}" in (site.job.reason or "")
    pacs.answer = lambda _request: 0
    retry(site.storage, site.client, site.job)
    site.attempt = 0
    site.deliver()
    pacs.report_anew(pacs.requests[-1], site.uids)
    assert site.job.state == "done"


def test_a_pacs_that_knows_no_storage_commitment_is_seen(site: Site, pacs: LyingPacs) -> None:
    pacs.server.contexts = [context for context in pacs.server.contexts if context.abstract_syntax != COMMITMENT]
    assert not echo(pacs.peer, calling_ae_title="DICOMNODE")
    site.settle()
    assert "does not accept the Storage Commitment Push Model" in (site.job.reason or "")
    assert (site.job.state, site.states) == ("failed", ["sent"] * 2)


def test_an_echo_tells_whether_the_pacs_commits(pacs: LyingPacs) -> None:
    assert echo(pacs.peer, calling_ae_title="DICOMNODE")
    assert not echo(replace(pacs.peer, commits=False), calling_ae_title="DICOMNODE")


def test_what_the_report_does_not_name_is_not_committed_and_what_was_not_asked_is_ignored(site: Site, pacs: LyingPacs) -> None:
    site.deliver()
    pacs.report_anew(pacs.requests[0], [site.uids[0], "1.2.3.4.5.6"])
    assert pacs.answered == [0]
    assert site.states == ["committed", "waiting"]
    assert site.deliveries[1].error == "PACS did not say whether it commits to it"


def test_reports_that_nobody_asked_for_or_that_make_no_sense_are_answered_with_their_status(site: Site, pacs: LyingPacs) -> None:
    other = Peer(ae_title="OTHER", host="127.0.0.1", port=104, sends=False, receives=True, tls=False, client_cert=None, commits=True)
    site.storage.registry.add_peer(other)
    site.deliver()
    (request,) = pacs.requests
    unknown = Request(transaction_uid="1.2.3", references=(), association=None)
    whole = report(request, site.uids)
    no_uid, no_class, contradiction = Dataset(), report(request, site.uids), report(request, (), site.uids)
    no_uid.ReferencedSOPSequence = whole.ReferencedSOPSequence
    del no_class.ReferencedSOPSequence[0].ReferencedSOPClassUID
    with association_to(site.receiver.port, "OTHER") as association:
        assert send_report(association, whole) == 0x0115  # another AE than was asked
    with association_to(site.receiver.port, "PACS") as association:
        assert send_report(association, report(unknown, site.uids)) == 0x0115
        assert send_report(association, no_uid) == 0x0115
        assert send_report(association, no_class) == 0x0115
        assert send_report(association, contradiction, event_type=1) == 0x0115
        assert send_report(association, whole, event_type=3) == 0x0113
        assert send_report(association, whole, instance="1.2.3") == 0x0112
    assert site.states == ["sent"] * 2
    with association_to(site.receiver.port, "PACS", scp=None) as association:  # without role selection
        assert send_report(association, whole) == 0
    assert site.states == ["committed"] * 2


def test_who_may_report_may_not_send_and_who_may_send_may_not_report(site: Site, pacs: LyingPacs) -> None:
    sender = Peer(ae_title="SCANNER", host="127.0.0.1", port=104, sends=True, receives=False, tls=False, client_cert=None)
    site.storage.registry.add_peer(sender)
    site.deliver()
    with association_to(site.receiver.port, "STRANGER") as association:
        assert not association.is_established
    with association_to(site.receiver.port, "SCANNER") as association:
        assert send_report(association, report(pacs.requests[0], site.uids)) == 0x0124
    assert site.states == ["sent"] * 2
    granted = {name: site.receiver._listener.grants(name) for name in ("PACS", "SCANNER", "STRANGER")}
    assert {name: (grants.stores, grants.commits) for name, grants in granted.items()} == {
        "PACS": (False, True), "SCANNER": (True, False), "STRANGER": (False, False),
    }  # fmt: skip
    contexts = {str(context.abstract_syntax) for context in site.receiver._listener.contexts.of({CT, COMMITMENT}, granted["PACS"])}
    assert contexts == {"1.2.840.10008.1.1", COMMITMENT}


def test_a_peer_that_no_longer_commits_has_what_it_was_sent(site: Site, pacs: LyingPacs) -> None:
    site.deliver()
    site.storage.registry.add_peer(replace(pacs.peer, commits=False))
    assert site.deliver() is None
    assert (site.job.state, site.states) == ("done", ["sent"] * 2)


def test_a_cancelled_delivery_stays_cancelled_whatever_is_reported(site: Site, pacs: LyingPacs) -> None:
    site.deliver()
    site.storage.jobs.finish(KEY, "cancelled")
    pacs.report_anew(pacs.requests[0], site.uids[:1], site.uids[1:])
    assert (site.job.state, site.states) == ("cancelled", ["committed", "failed"])
    assert site.client.drawn == []
