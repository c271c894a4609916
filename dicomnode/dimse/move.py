"""The SCU of retrieval by C-MOVE (PS3.4 C.4.2): let a peer send what it holds to an AE that it knows, this node most of all.

Must never try again by itself, nor take what a peer says was sent for received: what came is in the index.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from pydicom import Dataset

from dicomnode.config import TlsSection
from dicomnode.dimse.contexts import FIND_SYNTAXES, PATIENT_ROOT_MOVE, STUDY_ROOT_MOVE
from dicomnode.dimse.find import PENDING
from dicomnode.dimse.scu import SUCCESS, association_with, check_certificate, status_in_words
from dicomnode.errors import PeerRefused, PeerUnavailable, RetrievalNotOffered
from storage.records import Peer

MESSAGE_ID: Final = 1
LATE: Final = "the time was over"
UNWANTED: Final = "it was not wanted any more, or too much"
HEED_SECONDS: Final = 3.0  # how long a peer may take to end what was cancelled; then the association is aborted
_BROKEN: Final = "the association broke amid a retrieval"
_LOOK_SECONDS: Final = 0.2
_DESTINATION_UNKNOWN: Final = 0xA801  # PS3.4 C.4.2.1.5
_SUBOPERATIONS_FAILED: Final = 0xB000


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What became of a retrieval, by what the peer says of it."""

    completed: int
    failed: int
    error: str | None  # why not all of it was sent
    cancelled: bool = False  # because its time was over or it was not wanted any more


class Watch:
    """Looks at a retrieval from beside: cancels it when its time is over or it isn't wanted any more, and aborts if that isn't heeded.

    A peer that sends no response meanwhile, or nothing but responses, is ended all the same.
    """

    def __init__(self, association: Any, model: str, until: float, goes_on: Callable[[], bool]) -> None:
        self.reason: str | None = None  # why it was cancelled
        self._association = association
        self._model = model
        self._until = until
        self._goes_on = goes_on
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retrieval-watch", daemon=True)

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        heeded_by = 0.0
        while not self._ended.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if self.reason is not None:
                if now >= heeded_by:
                    self._association.abort()
                    self._association.dimse.msg_queue.put((None, None))  # nobody needs to wait any more
                    return
                continue
            if now >= self._until or not self._goes_on():
                self.reason = LATE if now >= self._until else UNWANTED
                heeded_by = now + HEED_SECONDS
                with suppress(AttributeError, ValueError, RuntimeError):  # what pynetdicom raises on a broken association
                    self._association.send_c_cancel(MESSAGE_ID, query_model=self._model)


def move(
    peer: Peer,
    query: Dataset,
    destination: str,
    *,
    calling_ae_title: str,
    patient_id: str = "",
    tls: TlsSection | None = None,
    seconds: float = 60.0,
    goes_on: Callable[[], bool] = lambda: True,
) -> Moved:
    """Let `peer` send what the unique keys of `query` name to the AE title `destination`; return when it has, or has given up.

    After so many seconds, or once `goes_on`, asked a few times a second in another thread, says no, the retrieval is cancelled: what was
    sent stays sent. The Study Root model is used where the peer accepts it, else the Patient Root model, with `patient_id`.

    Raises:
        PeerUnavailable: no association, or a broken one.
        RetrievalNotOffered: the peer takes no C-MOVE, or doesn't know the destination.
        PeerRefused: the peer refuses this one; or it is to be called over TLS and this node has no certificate.
    """
    check_certificate(peer, tls)
    until = time.monotonic() + seconds
    pairs = [(model, syntax) for model in (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE) for syntax in FIND_SYNTAXES]
    with association_with(peer, pairs, calling_ae_title, tls, seconds) as (association, trouble):
        if trouble is not None:
            raise PeerUnavailable(named(peer, trouble))
        model = accepted_model(association, (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE))
        if model is None:
            raise RetrievalNotOffered(named(peer, "it accepts no retrieval (C-MOVE), neither Study Root nor Patient Root"))
        asked = identifier(query, patient_id if model == PATIENT_ROOT_MOVE else None)
        association.dimse_timeout = seconds + 2 * HEED_SECONDS  # the watch is sooner
        with Watch(association, model, until, goes_on) as watch:
            moved = responses(peer, lambda: association.send_c_move(asked, destination, model, msg_id=MESSAGE_ID), watch)
    return moved


def responses(peer: Peer, ask: Callable[[], Iterator[tuple[Any, Any]]], watch: Watch) -> Moved:
    """Send a request by `ask`, take its responses to the last one, and say what became of it. Raises what `move` does."""
    completed = failed = 0
    status: Any = Dataset()
    try:
        for status, _ in ask():
            completed = max(completed, _number(status, "Completed") + _number(status, "Warning"))
            failed = max(failed, _number(status, "Failed"))
            if status.get("Status") not in PENDING:
                break
    except (AttributeError, ValueError, RuntimeError) as error:  # what pynetdicom raises on a broken association
        if watch.reason is None:
            raise PeerUnavailable(named(peer, _BROKEN)) from error
    if status.get("Status") == SUCCESS and not failed:
        return Moved(completed=completed, failed=0, error=None)
    if watch.reason is not None:
        return Moved(completed=completed, failed=failed, error=watch.reason, cancelled=True)
    if "Status" not in status:
        raise PeerUnavailable(named(peer, _BROKEN))
    words = f"it answered with {status_in_words(status)}"
    if status.Status == _DESTINATION_UNKNOWN:
        raise RetrievalNotOffered(named(peer, words))
    if status.Status not in {SUCCESS, _SUBOPERATIONS_FAILED}:
        raise PeerRefused(named(peer, words))
    return Moved(completed=completed, failed=failed, error=words)


def accepted_model(association: Any, models: tuple[str, str]) -> str | None:
    """Return the first of the models that the peer accepts."""
    accepted = {context.abstract_syntax for context in association.accepted_contexts}
    return next((model for model in models if model in accepted), None)


def identifier(query: Dataset, patient_id: str | None) -> Dataset:
    """Return the identifier of a request; in the Patient Root model Patient ID is a unique key of each level (PS3.4 C.6.1.1)."""
    asked = Dataset()
    asked.update(query)
    if patient_id is not None:
        asked.PatientID = patient_id
    return asked


def named(peer: Peer, trouble: str) -> str:
    """Return what is wrong, with whom."""
    return f"{peer.ae_title} at {peer.host}:{peer.port}: {trouble}"


def _number(status: Any, kind: str) -> int:
    return int(status.get(f"NumberOf{kind}Suboperations") or 0)
