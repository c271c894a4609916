"""The SCU of retrieval (C-MOVE, PS3.4 C.4.2): let a peer send what it holds to an AE that it knows, this node most of all.

Must never try again by itself, nor take what a peer says was sent for received: what came is in the index.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydicom import Dataset

from dicomnode.config import TlsSection
from dicomnode.dimse.contexts import FIND_SYNTAXES, PATIENT_ROOT_MOVE, STUDY_ROOT_MOVE
from dicomnode.dimse.find import PENDING
from dicomnode.dimse.scu import SUCCESS, association_with, check_certificate, status_in_words
from dicomnode.errors import PeerRefused, PeerUnavailable
from storage.records import Peer

_MESSAGE_ID = 1
_SUBOPERATIONS_FAILED = 0xB000


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a peer says of a retrieval."""

    completed: int
    failed: int
    error: str | None  # why not all of it was sent


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

    After so many seconds, or once `goes_on`, asked at each response, says no, the retrieval is cancelled: what was sent stays sent. The
    Study Root model is used where the peer accepts it, else the Patient Root model, with `patient_id`.

    Raises:
        PeerUnavailable: no association, or a broken one.
        PeerRefused: the peer takes no retrieval, or refuses this one; or it is to be called over TLS and this node has no certificate.
    """
    check_certificate(peer, tls)
    until = time.monotonic() + seconds
    pairs = [(model, syntax) for model in (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE) for syntax in FIND_SYNTAXES]
    with association_with(peer, pairs, calling_ae_title, tls, seconds) as (association, trouble):
        if trouble is not None:
            raise PeerUnavailable(_named(peer, trouble))
        accepted = {context.abstract_syntax for context in association.accepted_contexts}
        model = next((model for model in (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE) if model in accepted), None)
        if model is None:
            raise PeerRefused(_named(peer, "it accepts no retrieval (C-MOVE), neither Study Root nor Patient Root"))
        asked = Dataset()
        asked.update(query)
        if model == PATIENT_ROOT_MOVE:
            asked.PatientID = patient_id
        try:
            return _responses(peer, association, (model, asked, destination), until, goes_on)
        except (AttributeError, ValueError, RuntimeError) as error:  # what pynetdicom raises on a broken association
            raise PeerUnavailable(_named(peer, "the association broke amid a retrieval")) from error


def _responses(peer: Peer, association: Any, asked: tuple[str, Dataset, str], until: float, goes_on: Callable[[], bool]) -> Moved:
    model, identifier, destination = asked
    completed = failed = 0
    responses = association.send_c_move(identifier, destination, model, msg_id=_MESSAGE_ID)
    while True:
        association.dimse_timeout = max(0.1, until - time.monotonic())
        status, _ = next(responses)
        if "Status" not in status:
            if time.monotonic() < until:
                raise PeerUnavailable(_named(peer, "the association broke amid a retrieval"))
            return _given_up(association, model, completed, failed, "the time was over")
        completed = int(status.get("NumberOfCompletedSuboperations") or completed) + int(status.get("NumberOfWarningSuboperations") or 0)
        failed = int(status.get("NumberOfFailedSuboperations") or failed)
        if status.Status not in PENDING:
            break
        if time.monotonic() >= until:
            return _given_up(association, model, completed, failed, "the time was over")
        if not goes_on():
            return _given_up(association, model, completed, failed, "it was not wanted any more, or too much")
    if status.Status == SUCCESS and not failed:
        return Moved(completed=completed, failed=0, error=None)
    words = f"it answered with {status_in_words(status)}"
    if status.Status not in {SUCCESS, _SUBOPERATIONS_FAILED}:
        raise PeerRefused(_named(peer, words))
    return Moved(completed=completed, failed=failed, error=words)


def _given_up(association: Any, model: str, completed: int, failed: int, error: str) -> Moved:
    """Cancel, and leave at once: what is on its way already would be taken for the answer to a release."""
    with suppress(AttributeError, ValueError, RuntimeError):
        association.send_c_cancel(_MESSAGE_ID, query_model=model)
    association.abort()
    return Moved(completed=completed, failed=failed, error=error)


def _named(peer: Peer, trouble: str) -> str:
    return f"{peer.ae_title} at {peer.host}:{peer.port}: {trouble}"
