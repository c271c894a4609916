"""The messages of storage commitment on associations that this node opens, in either role (PS3.4 J.3).

Each is sent once: outcomes say what happened, and the engine decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from pynetdicom import build_role, evt

from dicomnode.config import TlsSection
from dicomnode.dimse.commitment import (
    ALL_COMMITTED,
    FAILURES_EXIST,
    REQUEST,
    CommitmentReport,
    Reference,
    action_information,
    answered,
    event_information,
    read_report,
)
from dicomnode.dimse.contexts import COMMITMENT_SYNTAXES, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE
from dicomnode.dimse.scu import SUCCESS, association_with, check_certificate, status_in_words
from dicomnode.errors import PeerRefused
from storage.records import Peer

# PS3.7 C.5 Processing failure, Duplicate SOP Instance (of a Transaction UID: the next one is new), Resource limitation.
COMMITMENT_TRANSIENT = frozenset({0x0110, 0x0111, 0x0213})
_LOOK_SECONDS = 0.1  # how often it is looked whether a report has come
_ASSOCIATION_SECONDS = 30.0  # for each step until an association is open


@dataclass(frozen=True, kw_only=True)
class CommitmentOutcome:
    """How a peer took a message of storage commitment. "transient": sending it again later can work."""

    state: Literal["accepted", "transient", "permanent"]
    error: str | None
    is_away: bool = False  # there was no association


def ask_commitment(
    peer: Peer,
    transaction_uid: str,
    references: Sequence[Reference],
    *,
    calling_ae_title: str,
    report: Callable[[CommitmentReport], None],
    has_report: Callable[[], bool],
    tls: TlsSection | None = None,
    response_seconds: float = 30,
    report_seconds: float = 3,
) -> CommitmentOutcome:
    """Ask `peer` to commit to instances that it received (N-ACTION, PS3.4 J.3.2), and return how it took the request.

    A peer that says nothing to that within `response_seconds` may have taken it or not: that is "transient".
    The association stays open for up to `report_seconds`, for a peer that reports on it: `report` is then called in another thread, and
    raises CommitmentRefused or returns once that is noted. `has_report` says whether one has come, in whichever way.
    """
    information = action_information(transaction_uid, references)

    def reported(event: Any) -> tuple[Any, None]:
        return answered(lambda: read_report(event, peer.ae_title), report), None

    def ask(association: Any) -> Any:
        return association.send_n_action(information, REQUEST, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE)[0]

    with _commitment_message(peer, ask, calling_ae_title, tls, response_seconds, handler=reported) as (association, outcome):
        until = time.monotonic() + (report_seconds if outcome.state == "accepted" else 0)
        while association.is_established and not has_report() and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
    return outcome


def report_commitment(
    peer: Peer,
    transaction_uid: str,
    references: Sequence[Reference],
    *,
    calling_ae_title: str,
    tls: TlsSection | None = None,
    response_seconds: float = 30,
) -> CommitmentOutcome:
    """Tell `peer` what this node commits to of what it asked for (N-EVENT-REPORT, PS3.4 J.3.3), and return how it took that.

    The association proposes this node as the SCP of the class.
    """
    information = event_information(transaction_uid, references)
    kind = ALL_COMMITTED if all(reference.failure is None for reference in references) else FAILURES_EXIST

    def tell(association: Any) -> Any:
        return association.send_n_event_report(information, kind, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE)[0]

    with _commitment_message(peer, tell, calling_ae_title, tls, response_seconds, as_scp=True) as (_, outcome):
        return outcome


@contextmanager
def _commitment_message(
    peer: Peer,
    send_message: Callable[[Any], Any],
    calling_ae_title: str,
    tls: TlsSection | None,
    response_seconds: float,
    *,
    handler: Callable[[Any], Any] | None = None,
    as_scp: bool = False,
) -> Iterator[tuple[Any, CommitmentOutcome]]:
    """Open an association for storage commitment and send one message; give both, the association still open, and how that was taken."""
    nothing = SimpleNamespace(is_established=False)
    try:
        check_certificate(peer, tls)
    except PeerRefused as error:
        yield nothing, CommitmentOutcome(state="permanent", error=str(error))
        return
    pairs = [(STORAGE_COMMITMENT, syntax) for syntax in COMMITMENT_SYNTAXES]
    handlers = [(evt.EVT_N_EVENT_REPORT, handler)] if handler is not None else []
    roles = [build_role(STORAGE_COMMITMENT, scp_role=True)] if as_scp else []
    with association_with(peer, pairs, calling_ae_title, tls, _ASSOCIATION_SECONDS, handlers, roles) as (association, trouble):
        if trouble is not None:
            yield nothing, CommitmentOutcome(state="transient", error=trouble, is_away=True)
        elif not association.accepted_contexts:
            yield nothing, CommitmentOutcome(state="permanent", error="the peer does not accept the Storage Commitment Push Model")
        else:
            answer = None
            association.dimse_timeout = response_seconds
            with suppress(AttributeError, ValueError, RuntimeError):  # what pynetdicom raises on a broken association
                answer = send_message(association)
            yield association, _commitment_outcome(answer, response_seconds)


def _commitment_outcome(answer: Any, response_seconds: float) -> CommitmentOutcome:
    if answer is None or "Status" not in answer:
        words = f"the peer was silent for {response_seconds:g} s, or the association broke before it had answered"
        return CommitmentOutcome(state="transient", error=words)
    if answer.Status == SUCCESS:
        return CommitmentOutcome(state="accepted", error=None)
    state: Literal["transient", "permanent"] = "transient" if answer.Status in COMMITMENT_TRANSIENT else "permanent"
    return CommitmentOutcome(state=state, error=f"the peer answered with {status_in_words(answer)}")
