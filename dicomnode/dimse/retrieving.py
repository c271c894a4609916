"""Retrieval in either way, C-MOVE or C-GET: by the peer's record, else by what the peer offers.

Must never try again by itself, but for the other way where the peer doesn't offer the first one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pydicom import Dataset

from dicomnode.config import TlsSection
from dicomnode.dimse.contexts import classes_of_modality
from dicomnode.dimse.find import query
from dicomnode.dimse.get import GetLimits, Receiving, get
from dicomnode.dimse.move import Moved, move
from dicomnode.dimse.scp import StoreRequest
from dicomnode.dimse.storing import Sink
from dicomnode.errors import RetrievalNotOffered
from storage.records import Peer

# An identifier is one element of up to 64 KiB in Explicit VR (PS3.5 7.1.2), and some archives take no long lists.
LISTED: Final = 100


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A series of a peer that is to be retrieved, or some of its instances."""

    study_instance_uid: str
    patient_id: str
    series_instance_uid: str
    modality: str
    instances: Sequence[str] = ()  # SOP Instance UIDs; none: the whole series
    sop_classes: Sequence[str] = ()  # of them, as far as the peer says it


class Retriever:
    """Retrieves from peers. Any number of threads may use it."""

    def __init__(
        self,
        ae_title: str,
        tls: TlsSection | None,
        receive: Callable[[StoreRequest, str, str], Sink],
        released: Callable[[int], None],
    ) -> None:
        """`receive` takes what comes by C-GET in, and is told of which study and Patient ID it must be; `released` hears of the end."""
        self._ae_title = ae_title
        self._tls = tls
        self._receive = receive
        self._released = released
        self._numbers = itertools.count(1)

    def retrieve(self, peer: Peer, wanted: Wanted, limits: GetLimits, goes_on: Callable[[], bool]) -> Moved:
        """Let the peer send what is wanted to this node. Raises PeerUnavailable or PeerRefused as `move` and `get` do."""
        if peer.retrieve_by != "get":
            try:
                return _in_parts(wanted, limits, lambda part, left: self._move(peer, part, left, goes_on))
            except RetrievalNotOffered as no_move:
                if peer.retrieve_by == "move":
                    raise
                try:
                    return self._by_get(peer, wanted, limits, goes_on)
                except RetrievalNotOffered:
                    raise no_move from None
        return self._by_get(peer, wanted, limits, goes_on)

    def _by_get(self, peer: Peer, wanted: Wanted, limits: GetLimits, goes_on: Callable[[], bool]) -> Moved:
        return _in_parts(wanted, limits, lambda part, left: self._get(peer, part, left, goes_on))

    def _move(self, peer: Peer, wanted: Wanted, limits: GetLimits, goes_on: Callable[[], bool]) -> Moved:
        return move(
            peer, _keys(wanted), self._ae_title, calling_ae_title=self._ae_title, patient_id=wanted.patient_id, tls=self._tls,
            seconds=limits.seconds, goes_on=goes_on,
        )  # fmt: skip

    def _get(self, peer: Peer, wanted: Wanted, limits: GetLimits, goes_on: Callable[[], bool]) -> Moved:
        number = next(self._numbers)
        receiving = Receiving(
            association=number, receive=lambda request: self._receive(request, wanted.study_instance_uid, wanted.patient_id)
        )
        classes = wanted.sop_classes if wanted.sop_classes and all(wanted.sop_classes) else classes_of_modality(wanted.modality)
        try:
            return get(
                peer, _keys(wanted), classes, receiving, calling_ae_title=self._ae_title, patient_id=wanted.patient_id, tls=self._tls,
                limits=limits, goes_on=goes_on,
            )  # fmt: skip
        finally:
            self._released(number)


def _in_parts(wanted: Wanted, limits: GetLimits, retrieve: Callable[[Wanted, GetLimits], Moved]) -> Moved:
    """Retrieve the instances that are listed some at a time: what one part fails for doesn't stop the next, but for a cancel."""
    until, parts = time.monotonic() + limits.seconds, [wanted]
    if len(wanted.instances) > LISTED:
        shares = [wanted.instances[start : start + LISTED] for start in range(0, len(wanted.instances), LISTED)]
        parts = [replace(wanted, instances=share) for share in shares]
    moved = Moved(completed=0, failed=0, error=None)
    for part in parts:
        one = retrieve(part, replace(limits, seconds=max(0.1, until - time.monotonic())))
        moved = Moved(
            completed=moved.completed + one.completed, failed=moved.failed + one.failed, error=moved.error or one.error,
            cancelled=one.cancelled,
        )  # fmt: skip
        if one.cancelled:
            break
    return moved


def _keys(wanted: Wanted) -> Dataset:
    above = {"StudyInstanceUID": wanted.study_instance_uid, "SeriesInstanceUID": wanted.series_instance_uid}
    return query("IMAGE", **above, SOPInstanceUID=list(wanted.instances)) if wanted.instances else query("SERIES", **above)
