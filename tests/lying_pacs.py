"""A PACS that takes objects and, asked to commit to them, does what a test tells it: the truth, lies, late, twice, or nothing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from dimse_cases import CT, EXPLICIT, keep_connection
from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.dsutils import encode
from pynetdicom.presentation import build_context
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.dimse.scu import keep_responses
from storage.records import Peer

COMMITMENT, WELL_KNOWN = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
NO_SUCH_INSTANCE = 0x0112
PATIENCE = 120.0  # seconds: a busy machine takes its time


@dataclass(frozen=True, kw_only=True)
class Request:
    """An N-ACTION request as it came."""

    transaction_uid: str
    references: tuple[tuple[str, str], ...]
    association: Any


class LyingPacs:
    """Keeps what it gets. `answer` is called with each request to commit, in its association's thread, and returns the status."""

    def __init__(self, ae_title: str = "PACS", port: int = 0) -> None:
        self.ae_title = ae_title
        self.node_port = 0
        self.stored: Counter[str] = Counter()  # SOP Instance UIDs and how often they came
        self.tried: Counter[str] = Counter()  # and how often they were offered
        self.contents: dict[str, set[bytes]] = {}  # and what they were: one content each, however often they came
        self.aborts = 0  # so many times the association is aborted in the place of an answer
        self.files: dict[str, bytes] = {}  # and as what, as Part 10 files
        self.associations: set[Any] = set()  # on which something came
        self.commits = False
        self.requests: list[Request] = []
        self.answered: list[int | None] = []  # what the node answered to each report
        self.answer: Callable[[Request], int | Dataset] = lambda _request: 0x0000
        self.store_status: Callable[[str], int] = lambda _uid: 0x0000
        self.leave_after: int | None = None  # so many objects: then nobody listens on its port
        self._leaving = threading.Lock()
        self.threads: list[threading.Thread] = []
        self.entity: Any = AE(ae_title)
        self.entity.acse_timeout = self.entity.dimse_timeout = self.entity.network_timeout = PATIENCE
        self.entity.add_supported_context("1.2.840.10008.1.1")
        self.entity.add_supported_context(CT, EXPLICIT)
        self.entity.add_supported_context(COMMITMENT, [EXPLICIT, "1.2.840.10008.1.2"])
        handlers = [(evt.EVT_CONN_OPEN, keep_connection), (evt.EVT_C_STORE, self._store), (evt.EVT_N_ACTION, self._asked)]
        self.server: Any = self.entity.make_server(("127.0.0.1", port), evt_handlers=handlers, server_class=ThreadedAssociationServer)

    @property
    def peer(self) -> Peer:
        """The PACS as the node's registry names it."""
        port = self.server.server_address[1]
        return Peer(
            ae_title=self.ae_title, host="127.0.0.1", port=port, sends=False, receives=True, tls=False, client_cert=None, commits=True
        )

    def later(self, action: Callable[[], object]) -> None:
        """Do something in a thread of its own."""
        thread = threading.Thread(target=action)
        self.threads.append(thread)
        thread.start()

    def leave(self) -> None:
        """Listen no more."""
        with self._leaving:
            if self.server in self.entity._servers:
                self.server.shutdown()
                self.server.socket.close()

    def report_here(self, request: Request, committed: Iterable[str], failed: Iterable[str] = ()) -> None:
        """Report on the association that the request came on."""
        self.answered.append(send_report(request.association, report(request, committed, failed)))

    def report_first(self, request: Request, committed: Iterable[str]) -> None:
        """Report on the association that the request came on, in its own thread: before the request is answered."""
        event = N_EVENT_REPORT()
        event.MessageID, event.EventTypeID = 77, 1
        event.AffectedSOPClassUID, event.AffectedSOPInstanceUID = COMMITMENT, WELL_KNOWN
        context = next(context for context in request.association.accepted_contexts if context.abstract_syntax == COMMITMENT)
        syntax = context.transfer_syntax[0]
        event.EventInformation = BytesIO(encode(report(request, committed), syntax.is_implicit_VR, syntax.is_little_endian) or b"")
        request.association.dimse.send_msg(event, context.context_id)
        _, answer = request.association.dimse.get_msg(block=True)
        self.answered.append(None if answer is None else answer.Status)

    def report_anew(self, request: Request, committed: Iterable[str], failed: Iterable[str] = (), *, calling: str | None = None) -> None:
        """Report on a new association to the node."""
        with association_to(self.node_port, calling or self.ae_title) as association:
            self.answered.append(send_report(association, report(request, committed, failed)))

    def _store(self, event: Any) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        self.tried[uid] += 1
        if self.aborts:
            self.aborts -= 1
            event.assoc.abort()
            return 0xC000
        status = self.store_status(uid)
        stored = status == 0 or 0xB000 <= status < 0xC000
        self.stored[uid] += stored
        self.associations.add(event.assoc)
        if stored:
            self.files[uid] = event.encoded_dataset()
            self.contents.setdefault(uid, set()).add(event.encoded_dataset(include_meta=False))
        if self.leave_after is not None and sum(self.stored.values()) >= self.leave_after:
            self.leave()
        return status

    def _asked(self, event: Any) -> tuple[int | Dataset, None]:
        dataset = event.action_information
        references = tuple((str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in dataset.ReferencedSOPSequence)
        request = Request(transaction_uid=str(dataset.TransactionUID), references=references, association=event.assoc)
        self.requests.append(request)
        return self.answer(request), None


@contextmanager
def lying_pacs(*, port: int = 0) -> Iterator[LyingPacs]:
    """Run such a PACS, on a free port or on this one."""
    pacs = LyingPacs(port=port)
    pacs.entity._servers.append(pacs.server)
    threading.Thread(target=pacs.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield pacs
    for thread in pacs.threads:
        thread.join()
    pacs.leave()
    pacs.entity.shutdown()


@contextmanager
def association_to(port: int, calling: str, *, scp: bool | None = True) -> Iterator[Any]:
    """An association to the node that proposes storage commitment, by default in the role of its SCP."""
    entity: Any = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = PATIENCE
    roles = [] if scp is None else [build_role(COMMITMENT, scu_role=not scp, scp_role=scp)]
    association = entity.associate(
        "127.0.0.1", port, contexts=[build_context(COMMITMENT)], ae_title="DICOMNODE", ext_neg=roles,
        evt_handlers=[(evt.EVT_CONN_OPEN, keep_connection)],
    )  # fmt: skip
    keep_responses(association)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def report(request: Request, committed: Iterable[str], failed: Iterable[str] = ()) -> Dataset:
    """The data set of an N-EVENT-REPORT."""
    dataset = Dataset()
    dataset.TransactionUID = request.transaction_uid
    classes = {uid: sop_class for sop_class, uid in request.references}
    for keyword, uids in (("ReferencedSOPSequence", committed), ("FailedSOPSequence", failed)):
        items = [_item(classes.get(uid, CT), uid) for uid in uids]
        if keyword == "FailedSOPSequence":
            for item in items:
                item.FailureReason = NO_SUCH_INSTANCE
        if items:
            setattr(dataset, keyword, items)
    return dataset


def send_report(association: Any, dataset: Dataset, *, event_type: int | None = None, instance: str = WELL_KNOWN) -> int | None:
    """Send an N-EVENT-REPORT and return the status that it is answered with."""
    kind = event_type or (2 if "FailedSOPSequence" in dataset else 1)
    status, _ = association.send_n_event_report(dataset, kind, COMMITMENT, instance)
    return status.get("Status")  # type: ignore[no-any-return]  # pynetdicom is untyped here


def uids(request: Request) -> Sequence[str]:
    """The SOP Instance UIDs that a request names."""
    return [uid for _, uid in request.references]


def _item(sop_class: str, uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class
    item.ReferencedSOPInstanceUID = uid
    return item
