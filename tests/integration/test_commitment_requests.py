"""What a peer asks this node to commit to is answered by the bytes on the disk, on an association to that peer, until it hears."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import CT, EXPLICIT, a_dataset, associate, encoded, keep_connection, store
from lying_pacs import COMMITMENT, PATIENCE, WELL_KNOWN
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import N_ACTION
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.cli import run
from dicomnode.commitment import StorageCommitment, answer_again
from dicomnode.config import CommitmentSection, EngineSection, ListenerSection, NodeSection, RetentionSection, Settings
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.receiver import Receiver
from dicomnode.retention import forget_commitments
from storage import Storage, open_storage, prepare_storage
from storage.records import CommitmentRequest, Peer

pytestmark = pytest.mark.usefixtures("calm_network_library")

MR = "1.2.840.10008.5.1.4.1.1.4"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the scanner is told."""

    event_type: int
    transaction_uid: str
    committed: tuple[str, ...]
    failed: dict[str, int]
    roles: dict[str, tuple[bool, bool]]  # that the node proposed, by SOP class


class Scanner:
    """Sends images, asks the node to commit to them, and listens for its reports."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.status = 0x0000
        entity: Any = AE("SCANNER")
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = PATIENCE
        entity.add_supported_context(COMMITMENT, scu_role=True, scp_role=True)
        handlers = [(evt.EVT_CONN_OPEN, keep_connection), (evt.EVT_N_EVENT_REPORT, self._told)]
        self.entity = entity
        self.server = entity.make_server(("127.0.0.1", 0), evt_handlers=handlers, server_class=ThreadedAssociationServer)
        entity._servers.append(self.server)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _told(self, event: Any) -> tuple[int, None]:
        dataset = event.event_information
        committed = tuple(str(item.ReferencedSOPInstanceUID) for item in dataset.get("ReferencedSOPSequence") or ())
        failed = {str(item.ReferencedSOPInstanceUID): int(item.FailureReason) for item in dataset.get("FailedSOPSequence") or ()}
        roles = {str(uid): (item.scu_role, item.scp_role) for uid, item in event.assoc.requestor.role_selection.items()}
        uid = str(dataset.TransactionUID)
        self.reports.append(Report(event_type=event.event_type, transaction_uid=uid, committed=committed, failed=failed, roles=roles))
        return self.status, None

    def end(self) -> None:
        self.server.shutdown()
        self.entity.shutdown()


class Site:
    """A node that has received three images of the scanner."""

    def __init__(self, prepared: Path, folder: Path, scanner: Scanner) -> None:
        shutil.copytree(prepared, folder / "site")
        url = f"sqlite:///{folder / 'site' / 'node.sqlite'}"
        self.scanner = scanner
        self.storage: Storage = open_storage(url, folder / "site")
        self.client = EngineClient(url)
        self.settings = Settings(
            node=NodeSection(data=folder / "site"),
            listener=ListenerSection(port=0),
            engine=EngineSection(retry_schedule_seconds=(0.01, 0.01)),
            commitment=CommitmentSection(maximum_references=4, maximum_waiting=2),
        )
        self.commitment = StorageCommitment(self.settings, self.storage, self.client)
        self.receiver = Receiver(self.settings, self.storage, commitment=self.commitment)
        self.receiver.start()
        port = scanner.server.server_address[1]
        self.peer = Peer(ae_title="SCANNER", host="127.0.0.1", port=port, sends=True, receives=False, tls=False, client_cert=None)
        self.storage.registry.add_peer(self.peer)
        association = associate(self.receiver.port, [(CT, EXPLICIT)])
        self.uids = []
        for number in range(3):
            dataset = a_dataset(CT, InstanceNumber=number + 1)
            assert store(association, encoded(dataset), uid=dataset.SOPInstanceUID).Status == 0
            self.uids.append(str(dataset.SOPInstanceUID))
        association.release()

    def ask(
        self,
        transaction_uid: str,
        references: list[tuple[str, str]],
        *,
        action_type: int = 1,
        instance: str = WELL_KNOWN,
        calling: str = "SCANNER",
    ) -> int | None:
        """Ask the node to commit; return the status of its answer."""
        dataset = Dataset()
        if transaction_uid:
            dataset.TransactionUID = transaction_uid
        dataset.ReferencedSOPSequence = []
        for sop_class, uid in references:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
            dataset.ReferencedSOPSequence.append(item)
        association = associate(self.receiver.port, [(COMMITMENT, EXPLICIT)], calling=calling)
        status, _ = association.send_n_action(dataset, action_type, COMMITMENT, instance)
        association.release()
        return status.get("Status")  # type: ignore[no-any-return]  # pynetdicom is untyped here

    @property
    def requests(self) -> list[CommitmentRequest]:
        return self.storage.requests.requests()

    def settle(self, number: int = -1) -> CommitmentRequest:
        """Answer a request as the engine would, until its row says how that ended."""
        key = self.requests[number].key
        for attempt in range(10):
            if self.commitment.answer(key, attempt) is None:
                break
        found = self.storage.requests.request(key)
        assert found is not None
        return found

    def cts(self, *uids: str) -> list[tuple[str, str]]:
        return [(CT, uid) for uid in uids or self.uids]

    def end(self) -> None:
        self.receiver.stop(0)
        self.client.close()
        self.storage.database.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a node that has received nothing yet."""
    folder = tmp_path_factory.mktemp("prepared")
    url = f"sqlite:///{folder / 'node.sqlite'}"
    prepare_storage(url, folder)
    prepare_engine(url)
    return folder


@pytest.fixture
def site(prepared: Path, tmp_path: Path) -> Iterator[Site]:
    scanner = Scanner()
    site = Site(prepared, tmp_path, scanner)
    yield site
    site.end()
    scanner.end()


def test_what_is_held_is_committed_to_on_an_association_of_our_own_as_scp(site: Site) -> None:
    assert site.ask("1.2.3", site.cts()) == 0
    (request,) = site.requests
    assert (request.state, request.instances, request.failures) == ("waiting", 3, None)
    assert site.scanner.reports == []
    assert site.settle().state == "reported"
    (report,) = site.scanner.reports
    assert (report.event_type, report.transaction_uid, sorted(report.committed), report.failed) == (1, "1.2.3", sorted(site.uids), {})
    assert report.roles == {COMMITMENT: (False, True)}
    (request,) = site.requests
    assert (request.references, request.failures) == ((), ())
    assert site.commitment.answer(request.key, 0) is None  # a ticket that comes twice
    assert len(site.scanner.reports) == 1


def test_each_instance_that_is_not_what_was_received_is_named_with_its_reason(site: Site) -> None:
    changed, other_class, held = site.uids
    instance = site.storage.index.find(changed)
    assert instance is not None
    file = site.storage.objects.path(instance.stored.object_id)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert site.ask("1.2.3", [(CT, changed), (MR, other_class), (CT, held), (CT, "1.2.3.4")]) == 0
    site.settle()
    (report,) = site.scanner.reports
    assert (report.event_type, report.committed) == (2, (held,))
    assert report.failed == {changed: 0x0110, other_class: 0x0119, "1.2.3.4": 0x0112}
    file.unlink()
    assert site.ask("1.2.4", site.cts(changed)) == 0
    site.settle()
    assert site.scanner.reports[-1].failed == {changed: 0x0110}


def test_the_same_request_is_answered_once_or_once_more_and_another_one_under_its_uid_is_not(site: Site) -> None:
    assert site.ask("1.2.3", site.cts()) == site.ask("1.2.3", site.cts()) == 0
    assert len(site.requests) == 1
    site.settle()
    assert site.ask("1.2.3", list(reversed(site.cts()))) == 0  # it has not heard of it
    assert [request.state for request in site.requests] == ["waiting"]
    site.settle()
    assert [sorted(report.committed) for report in site.scanner.reports] == [sorted(site.uids)] * 2
    assert site.ask("1.2.3", site.cts(site.uids[0])) == 0
    site.settle()
    assert site.scanner.reports[-1].failed == {site.uids[0]: 0x0131}


def test_a_report_that_is_not_taken_is_repeated_then_given_up_seen_and_replayed(site: Site) -> None:
    site.scanner.status = 0x0110
    assert site.ask("1.2.3", site.cts()) == 0
    given_up = site.settle()
    assert (given_up.state, given_up.attempts, len(site.scanner.reports)) == ("failed", 3, 3)
    assert "did not take the report: the peer answered with status 0x0110" in (given_up.reason or "")
    site.scanner.status = 0
    answer_again(site.storage, site.client, given_up)
    assert site.settle().state == "reported"
    site.storage.registry.add_peer(replace(site.peer, port=1))
    assert site.ask("1.2.4", site.cts()) == 0
    assert "cannot be reached" in (site.settle().reason or "")
    site.storage.registry.remove_peer("SCANNER")
    answer_again(site.storage, site.client, site.requests[-1])
    assert site.settle().reason == "SCANNER is not a peer that sends"


def test_who_may_not_ask_is_refused_and_nothing_is_noted(site: Site) -> None:
    only_commits = replace(site.peer, ae_title="PACS", sends=False, receives=True, commits=True)
    only_receives = replace(site.peer, ae_title="READER", sends=False, receives=True)
    site.storage.registry.add_peer(only_commits)
    site.storage.registry.add_peer(only_receives)
    assert site.ask("1.2.3", site.cts(), calling="PACS") == 0x0124
    for stranger in ("READER", "NOBODY"):
        assert not associate(site.receiver.port, [(COMMITMENT, EXPLICIT)], calling=stranger).is_established
    assert site.requests == []


def test_requests_that_make_no_sense_or_ask_too_much_are_answered_with_their_status(site: Site) -> None:
    assert site.ask("1.2.3", site.cts(), action_type=2) == 0x0123
    assert site.ask("1.2.3", site.cts(), instance="1.2.3") == 0x0112
    assert site.ask("", site.cts()) == 0x0115
    assert site.ask("1.2.3", []) == 0x0115
    assert site.ask("1.2.3", [("", site.uids[0])]) == 0x0115
    assert site.ask("1.2.3", site.cts(*(f"1.2.{number}" for number in range(5)))) == 0x0213
    assert site.requests == []
    assert [site.ask(f"1.2.{number}", site.cts()) for number in (1, 2, 3)] == [0, 0, 0x0213]
    assert site.ask("1.2.1", site.cts()) == 0  # one that waits already
    site.settle(0)
    assert site.ask("1.2.3", site.cts()) == 0


def test_what_ended_long_ago_is_forgotten_and_what_waits_is_not(site: Site) -> None:
    settings, now = RetentionSection(), datetime.now(UTC)
    site.ask("1.2.3", site.cts())
    site.settle()
    site.ask("1.2.4", site.cts())
    year, forever = timedelta(days=366), RetentionSection(commitment_days=0)
    assert forget_commitments(site.storage, forever, now + year) == 0
    assert forget_commitments(site.storage, settings, now) == 0
    assert forget_commitments(site.storage, settings, now + year) == 1
    assert [request.transaction_uid for request in site.requests] == ["1.2.4"]


def test_thousands_of_instances_are_asked_about_at_once_and_too_many_are_told_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long UID or a private item makes a request larger than other messages may be."""
    many = [(CT, f"2.25.{3 * 10**38 + number}{'0' * 20}") for number in range(10_000)]
    large = site.commitment._settings.commitment.model_copy(update={"maximum_references": 10_000})
    monkeypatch.setattr(site.commitment, "_settings", site.commitment._settings.model_copy(update={"commitment": large}))
    assert site.ask("1.2.3", many) == 0
    (request,) = site.requests
    assert (request.instances, request.state) == (10_000, "waiting")
    monkeypatch.setattr("dicomnode.dimse.commitment.MOST_REFERENCES", 9_999)
    assert site.ask("1.2.4", many) == 0x0213
    assert len(site.requests) == 1


def raw_request(site: Site, context: tuple[str, str], information: bytes) -> int:
    """Send an N-ACTION request with these bytes on a context; return the status of the answer."""
    association = associate(site.receiver.port, [context])
    request = N_ACTION()
    request.MessageID, request.ActionTypeID = 1, 1
    request.RequestedSOPClassUID, request.RequestedSOPInstanceUID = COMMITMENT, WELL_KNOWN
    request.ActionInformation = BytesIO(information)
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        threading.Event().wait(0.001)
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    association.release()
    return int(response.Status)


def test_a_malformed_data_set_and_a_request_outside_its_context_are_refused(site: Site) -> None:
    whole = Dataset()
    whole.TransactionUID = "1.2.3"
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CT, site.uids[0]
    whole.ReferencedSOPSequence = [item]
    data = encoded(whole)
    assert raw_request(site, (COMMITMENT, EXPLICIT), data[: len(data) // 2]) == 0x0115
    assert raw_request(site, (COMMITMENT, EXPLICIT), b"\xff" * 40) == 0x0115
    assert raw_request(site, (CT, EXPLICIT), data) == 0x0124
    assert site.requests == []
    assert raw_request(site, (COMMITMENT, EXPLICIT), data) == 0


def test_a_failure_of_the_node_is_told_so_that_the_peer_asks_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(site.client, "enqueue", broken)
    assert site.ask("1.2.3", site.cts()) == 0x0110
    assert site.requests == []


@pytest.mark.usefixtures("logs_restored")
def test_the_commands_show_what_was_asked_and_answer_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path / "node")]) == 0
    config = ["--config", str(tmp_path / "node" / "dicomnode.toml")]
    assert run(["peer", "add", "PACS", "127.0.0.1", "104", "--receives", "--commits", *config]) == 0
    assert run(["peer", "add", "SCANNER", "127.0.0.1", "104", "--sends", "--commits", *config]) == 2
    assert "--commits needs --receives" in capsys.readouterr().err
    assert run(["peer", "list", "--json", *config]) == 0
    assert '"commits": true' in capsys.readouterr().out
    url, data = f"sqlite:///{tmp_path / 'node' / 'data' / 'dicomnode.sqlite'}", tmp_path / "node" / "data"
    storage = open_storage(url, data)
    with storage.database.writing() as transaction:
        storage.requests.add(transaction, "commit/1", peer="SCANNER", transaction_uid="1.2.3", digest="d", references=[(CT, "1.2")])
    assert run(["commitment", "retry", "commit/1", *config]) == 2
    storage.requests.finish("commit/1", "failed", reason="it is off")
    assert run(["commitment", "list", *config]) == 0
    assert "it is off" in capsys.readouterr().out
    assert run(["commitment", "retry", "commit/1", *config]) == 0
    assert run(["commitment", "retry", "commit/2", *config]) == 2
    request = storage.requests.request("commit/1")
    assert request is not None
    assert (request.state, request.reason, request.attempts) == ("waiting", None, 0)
    storage.database.close()
