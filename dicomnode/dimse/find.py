"""The SCU of Query (C-FIND, PS3.4 C.4.1): what a peer says that it holds.

`find(peer, query, calling_ae_title=…)` gives the identifiers of the matches one by one, in the Study Root model or, where the peer knows
that alone, in the Patient Root model. It is bounded in time, in answers and in bytes; whoever closes the iterator cancels the query.
Must never try again by itself, nor take what a peer answers for more than its word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydicom import Dataset
from pynetdicom import evt

from dicomnode.config import TlsSection
from dicomnode.dimse.contexts import FIND_SYNTAXES, PATIENT_ROOT_FIND, STUDY_ROOT_FIND
from dicomnode.dimse.scu import association_with, check_certificate, status_in_words
from dicomnode.errors import PeerRefused, PeerUnavailable
from storage.records import Peer

PENDING = frozenset({0xFF00, 0xFF01})  # PS3.4 C.4.1.1.4: an answer, and more to come; FF01: not every key was matched
TRANSIENT = frozenset(
    {*range(0xA700, 0xA800), 0x0110, 0x0213}
)  # Refused: Out of Resources; PS3.7 C.5 Processing failure, Resource limitation
_MESSAGE_ID = 1


@dataclass(frozen=True, kw_only=True)
class FindLimits:
    """How much one query may cost."""

    seconds: float = 30.0  # for the association and all answers together
    answers: int = 1000
    size: int = 64 * 2**20  # bytes of all answers


ASKING = FindLimits(seconds=10.0, answers=20_000)  # of a study that seems complete


@dataclass(frozen=True, kw_only=True)
class StudyContent:
    """What a peer says that it holds of a study."""

    instances: Mapping[str, int]  # by Series Instance UID
    modalities: Mapping[str, str] = field(default_factory=dict)  # by Series Instance UID; "" where it doesn't say


def find(
    peer: Peer,
    query: Dataset,
    *,
    calling_ae_title: str,
    patient_id: str = "",
    tls: TlsSection | None = None,
    limits: FindLimits = FindLimits(),
) -> Generator[Dataset]:
    """Give the identifier of each match of `query` at `peer`, in the order in which the peer answers.

    `query` is the identifier of the request (PS3.4 C.4.1.1.3): Query/Retrieve Level (0008,0052), the unique keys of the levels above,
    and the keys to match or to return, each present, empty for "whatever it is". The Study Root model is used where the peer accepts
    it, else the Patient Root model, for which Patient ID (0010,0020) becomes `patient_id` below the level PATIENT. Closing the iterator
    before its end cancels the query.

    Raises (at the first or any later answer):
        PeerUnavailable: no association, none in time, a broken one, or a status after which asking later can work.
        PeerRefused: the peer takes no query, answers with a failure or with more than `limits` allow; or it is to be called over TLS
            and this node has no certificate.
    """
    check_certificate(peer, tls)
    until = time.monotonic() + limits.seconds
    pairs = [(model, syntax) for model in (STUDY_ROOT_FIND, PATIENT_ROOT_FIND) for syntax in FIND_SYNTAXES]
    size = _Size(limits.size)
    handlers = [(evt.EVT_PDU_RECV, size.count)]
    with association_with(peer, pairs, calling_ae_title, tls, limits.seconds, handlers) as (association, trouble):
        if trouble is not None:
            raise PeerUnavailable(_named(peer, trouble))
        accepted = {context.abstract_syntax for context in association.accepted_contexts}
        model = next((model for model in (STUDY_ROOT_FIND, PATIENT_ROOT_FIND) if model in accepted), None)
        if model is None:
            raise PeerRefused(_named(peer, "it accepts no query (C-FIND), neither Study Root nor Patient Root"))
        try:
            yield from _answers(peer, association, _identifier(query, model, patient_id), until, limits)
        except (AttributeError, ValueError, RuntimeError) as error:  # what pynetdicom raises on a broken association
            raise PeerUnavailable(_named(peer, "the association broke amid a query")) from error
        except PeerUnavailable as error:
            if size.exceeded:
                raise PeerRefused(_named(peer, f"it answered a query with more than {limits.size} bytes")) from error
            raise


def study_content(
    peer: Peer,
    study_instance_uid: str,
    *,
    calling_ae_title: str,
    patient_id: str = "",
    tls: TlsSection | None = None,
    limits: FindLimits = FindLimits(),
) -> StudyContent | None:
    """Ask `peer` how many instances it holds of each series of a study; None if it holds no such study.

    A peer that doesn't give Number of Series Related Instances (0020,1209), an optional key, is asked for the instances themselves.
    `limits` hold for each query. Raises PeerUnavailable or PeerRefused as `find` does.
    """
    ask = partial(find, peer, calling_ae_title=calling_ae_title, patient_id=patient_id, tls=tls, limits=limits)
    keys = {"StudyInstanceUID": study_instance_uid, "SeriesInstanceUID": "", "Modality": "", "NumberOfSeriesRelatedInstances": None}
    counts: dict[str, int] = {}
    modalities: dict[str, str] = {}
    for answer in ask(query("SERIES", **keys)):
        uid = str(answer.get("SeriesInstanceUID") or "")
        if not uid or str(answer.get("StudyInstanceUID") or study_instance_uid) != study_instance_uid:
            continue  # some peers ignore a key that they don't know and answer with whatever they hold
        modalities[uid] = str(answer.get("Modality") or "").strip()
        counts[uid] = number_of_instances(answer)
    for uid in [uid for uid, count in counts.items() if count < 0]:
        counts[uid] = len(_instances(ask, study_instance_uid, uid))
    return StudyContent(instances=counts, modalities=modalities) if counts else None


def series_instances(
    peer: Peer,
    study_instance_uid: str,
    series_instance_uid: str,
    *,
    calling_ae_title: str,
    patient_id: str = "",
    tls: TlsSection | None = None,
    limits: FindLimits = FindLimits(),
) -> dict[str, str]:
    """Return what `peer` says that it holds of a series: by SOP Instance UID the SOP Class UID, an optional key, "" where it doesn't say.

    Raises PeerUnavailable or PeerRefused as `find` does.
    """
    ask = partial(find, peer, calling_ae_title=calling_ae_title, patient_id=patient_id, tls=tls, limits=limits)
    return _instances(ask, study_instance_uid, series_instance_uid)


def number_of_instances(answer: Dataset) -> int:
    """Return an answer's Number of Series Related Instances (0020,1209), or -1 if it isn't there or is no number."""
    try:
        count = int(answer.NumberOfSeriesRelatedInstances)
    except (AttributeError, TypeError, ValueError):
        return -1
    return max(count, -1)


def query(level: str, **keys: Any) -> Dataset:
    """Return the identifier of a request at a Query/Retrieve Level, with keys by keyword; empty ones ask for whatever there is."""
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    return identifier


class _Size:
    """Ends an association that brings more bytes than it may."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self.exceeded = False

    def count(self, event: Any) -> None:
        """Handle EVT_PDU_RECV."""
        for item in getattr(event.pdu, "presentation_data_value_items", ()):
            self._left -= len(item.presentation_data_value or b"")
        if self._left < 0 and not self.exceeded:
            self.exceeded = True
            event.assoc.abort()
            event.assoc.dimse.msg_queue.put((None, None))  # as pynetdicom does where the peer aborts: nobody needs to wait any more


def _answers(peer: Peer, association: Any, asked: tuple[str, Dataset], until: float, limits: FindLimits) -> Generator[Dataset]:
    model, identifier = asked
    late = _named(peer, f"it did not answer a query within {limits.seconds:g} s")
    ended = False
    try:
        responses = association.send_c_find(identifier, model, msg_id=_MESSAGE_ID)
        for number in range(limits.answers + 1):
            association.dimse_timeout = max(0.1, until - time.monotonic())
            status, answer = next(responses)
            if "Status" not in status:
                raise PeerUnavailable(late if time.monotonic() >= until else _named(peer, "the association broke amid a query"))
            if status.Status not in PENDING:
                ended = True
                _check(peer, status)
                return
            if time.monotonic() >= until:
                raise PeerUnavailable(late)
            if answer is None:
                raise PeerRefused(_named(peer, "an answer to a query can't be read"))
            if number == limits.answers:
                raise PeerRefused(_named(peer, f"it answered a query with more than {limits.answers} matches"))
            yield answer
    finally:
        if not ended and association.is_established:  # what is on its way already would be taken for the answer to a release
            with suppress(AttributeError, ValueError, RuntimeError):
                association.send_c_cancel(_MESSAGE_ID, query_model=model)
            association.abort()


def _instances(ask: Callable[[Dataset], Iterable[Dataset]], study: str, series: str) -> dict[str, str]:
    answers = ask(query("IMAGE", StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID="", SOPClassUID=""))
    same = (answer for answer in answers if str(answer.get("SeriesInstanceUID") or series) == series)
    return {str(answer.SOPInstanceUID): str(answer.get("SOPClassUID") or "") for answer in same if answer.get("SOPInstanceUID")}


def _identifier(query: Dataset, model: str, patient_id: str) -> tuple[str, Dataset]:
    """The model and the query in it: Patient ID is a unique key above the level in the Patient Root model alone (PS3.4 C.6.1.1)."""
    if model == PATIENT_ROOT_FIND and query.QueryRetrieveLevel != "PATIENT" and not query.get("PatientID"):
        asked = Dataset()
        asked.update(query)
        asked.PatientID = patient_id
        return model, asked
    return model, query


def _check(peer: Peer, status: Any) -> None:
    if status.Status == 0x0000:
        return
    words = _named(peer, f"it answered a query with {status_in_words(status)}")
    raise PeerUnavailable(words) if status.Status in TRANSIENT else PeerRefused(words)


def _named(peer: Peer, trouble: str) -> str:
    return f"{peer.ae_title} at {peer.host}:{peer.port}: {trouble}"
