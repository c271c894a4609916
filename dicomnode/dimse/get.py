"""The SCU of retrieval by C-GET (PS3.4 C.4.3): let a peer send what it holds on the very association on which it is asked.

What comes goes where the data sets of every C-STORE go, and is acknowledged when that has made it safe. Must never keep an instance that
wasn't asked for: whoever receives it is told of which study and patient it must be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Final

from pydicom import Dataset
from pynetdicom import build_role, evt

from dicomnode.config import TlsSection
from dicomnode.dimse.contexts import FIND_SYNTAXES, MAXIMUM_CONTEXTS, PATIENT_ROOT_GET, STUDY_ROOT_GET
from dicomnode.dimse.move import HEED_SECONDS, MESSAGE_ID, Moved, Watch, accepted_model, identifier, named, responses
from dicomnode.dimse.scp import StoreRequest
from dicomnode.dimse.scu import Pair, association_with, check_certificate
from dicomnode.dimse.storing import Sink, Store
from dicomnode.errors import OutOfResources, PeerRefused, PeerUnavailable, RetrievalNotOffered, StoreRefused
from storage.records import Peer

MAXIMUM_OBJECT_BYTES: Final = 2**30  # of a data set that is on its way: it is held in memory
MAXIMUM_REFUSED: Final = 20  # instances that were refused: then the rest isn't wanted either
# What an archive may hold images in, the most usual first: as many are proposed for each class as an association has contexts for.
_SYNTAXES: Final = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, First-Order Prediction
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
)


@dataclass(frozen=True, kw_only=True)
class GetLimits:
    """How much one retrieval may bring."""

    seconds: float = 60.0
    instances: int = 3000
    size: int = 4 * 10**9  # bytes of all data sets


@dataclass(frozen=True, kw_only=True)
class Receiving:
    """Where the instances of one association go."""

    association: int  # its number within this process
    receive: Callable[[StoreRequest], Sink]


def get(
    peer: Peer,
    query: Dataset,
    sop_classes: Collection[str],
    receiving: Receiving,
    *,
    calling_ae_title: str,
    patient_id: str = "",
    tls: TlsSection | None = None,
    limits: GetLimits = GetLimits(),
    goes_on: Callable[[], bool] = lambda: True,
) -> Moved:
    """Let `peer` send what the unique keys of `query` name, of these SOP classes; return when it has, or has given up.

    `completed` counts what was received and is safe. Once a limit is reached, or `goes_on`, asked a few times a second in another thread,
    says no, the retrieval is cancelled: what came stays. An object that this node refuses is answered so, and counts as failed.

    Raises:
        PeerUnavailable: no association, or a broken one.
        RetrievalNotOffered: the peer takes no C-GET, or none in which this node is the SCP of these classes.
        PeerRefused: the peer refuses this one; or it is to be called over TLS and this node has no certificate.
    """
    check_certificate(peer, tls)
    until = time.monotonic() + limits.seconds
    models = [(model, syntax) for model in (STUDY_ROOT_GET, PATIENT_ROOT_GET) for syntax in FIND_SYNTAXES]
    pairs = storage_pairs(sop_classes, MAXIMUM_CONTEXTS - len(models))
    roles = [build_role(sop_class, scp_role=True) for sop_class in dict.fromkeys(sop_class for sop_class, _ in pairs)]
    arriving = _Arriving(peer, receiving, calling_ae_title, limits)
    handlers = [(evt.EVT_PDU_RECV, arriving.count), (evt.EVT_C_STORE, arriving.store)]
    with association_with(peer, [*models, *pairs], calling_ae_title, tls, limits.seconds, handlers, roles) as (association, trouble):
        if trouble is not None:
            raise PeerUnavailable(named(peer, trouble))
        model = accepted_model(association, (STUDY_ROOT_GET, PATIENT_ROOT_GET))
        if model is None:
            raise RetrievalNotOffered(named(peer, "it accepts no retrieval by C-GET, neither Study Root nor Patient Root"))
        if not any(context.as_scp for context in association.accepted_contexts):
            raise RetrievalNotOffered(named(peer, "it would send no object of these classes by C-GET"))
        asked = identifier(query, patient_id if model == PATIENT_ROOT_GET else None)
        association.dimse_timeout = limits.seconds + 2 * HEED_SECONDS  # the watch is sooner
        try:
            with Watch(association, model, until, lambda: arriving.exceeded is None and goes_on()) as watch:
                moved = responses(peer, lambda: association.send_c_get(asked, model, msg_id=MESSAGE_ID), watch)
        except (PeerUnavailable, PeerRefused):
            if arriving.trouble is None:
                raise
            moved = Moved(completed=0, failed=0, error=None, cancelled=arriving.exceeded is not None)
    failed = max(moved.failed, arriving.refused)
    return replace(moved, completed=arriving.stored, failed=failed, error=arriving.trouble or moved.error)


def storage_pairs(sop_classes: Collection[str], room: int) -> list[Pair]:
    """Return the contexts to propose for these classes, at most so many: each class in the first syntax, then each in the next one."""
    pairs = [(sop_class, syntax) for syntax in _SYNTAXES for sop_class in dict.fromkeys(sop_classes)]
    return pairs[:room]


class _Arriving:
    """What comes on one association: each object is handed on and answered, in the thread that asked."""

    def __init__(self, peer: Peer, receiving: Receiving, called_ae_title: str, limits: GetLimits) -> None:
        self.stored = self.refused = 0
        self.exceeded: str | None = None  # which limit
        self._refusal: StoreRefused | None = None  # the first one
        self._peer = peer
        self._receiving = receiving
        self._called_ae_title = called_ae_title
        self._limits = limits
        self._size = 0  # bytes that came
        self._handled = 0  # and of them those of objects that were handed on

    @property
    def trouble(self) -> str | None:
        """What was wrong with what came, in words of our own."""
        if self.exceeded is not None or self._refusal is None:
            return self.exceeded
        return f"{self.refused} object(s) were refused: {self._refusal}"

    def count(self, event: Any) -> None:
        """Handle EVT_PDU_RECV: end an association that brings more than it may, or more at once than is held in memory."""
        for item in getattr(event.pdu, "presentation_data_value_items", ()):
            self._size += len(item.presentation_data_value or b"")
        if self.exceeded is None and self._size > self._limits.size:
            self._exceeded(event, f"more than {self._limits.size} bytes")
        elif self.exceeded is None and self._size - self._handled > MAXIMUM_OBJECT_BYTES:
            self._exceeded(event, f"an object of more than {MAXIMUM_OBJECT_BYTES} bytes")

    def store(self, event: Any) -> Dataset:
        """Handle EVT_C_STORE: make the object safe, and return its status."""
        request, context = event.request, event.context
        data = request.DataSet.getbuffer() if request.DataSet is not None else memoryview(b"")
        self._handled += len(data)
        answer = Dataset()
        answer.Status = 0x0000
        refusal = self._too_much() or self._kept(request, context, data)
        if refusal is None:
            self.stored += 1
            return answer
        self.refused += 1
        self._refusal = self._refusal or refusal
        if self.refused >= MAXIMUM_REFUSED and self.exceeded is None:
            self.exceeded = f"it sends what was not asked for: {self.refused} object(s) were refused"
        answer.Status, answer.ErrorComment = refusal.dimse_status, str(refusal)[:64]
        return answer

    def _kept(self, request: Any, context: Any, data: memoryview) -> StoreRefused | None:
        store = Store(context_id=context.context_id, command={}, calling_ae_title=self._peer.ae_title)
        store.begin(
            StoreRequest(
                association=self._receiving.association,
                calling_ae_title=self._peer.ae_title,
                called_ae_title=self._called_ae_title,
                context_sop_class_uid=str(context.abstract_syntax),
                sop_class_uid=str(request.AffectedSOPClassUID),
                sop_instance_uid=str(request.AffectedSOPInstanceUID),
                transfer_syntax_uid=str(context.transfer_syntax),
            ),
            self._receiving.receive,
        )
        store.write(data)
        return store.end()

    def _too_much(self) -> StoreRefused | None:
        if self.exceeded is None and self.stored >= self._limits.instances:
            self.exceeded = f"it sends more than {self._limits.instances} object(s)"
        return None if self.exceeded is None else OutOfResources("no more is wanted")

    def _exceeded(self, event: Any, words: str) -> None:
        self.exceeded = f"it sends {words}"
        event.assoc.abort()
        event.assoc.dimse.msg_queue.put((None, None))  # as pynetdicom does where the peer aborts: nobody needs to wait any more
