"""The Storage SCP role: what a peer sends is checked, safe on disk and in the index, and only then acknowledged.

Must never load torch, MONAI or highdicom, change a byte of a data set, or let a value from the wire name a file.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Final

from dicomnode.config import Settings
from dicomnode.dimse.association import Caller, in_memory
from dicomnode.dimse.listener import Listener
from dicomnode.dimse.scp import ReceivedInstance, is_uid, part10_prefix, read_header
from dicomnode.errors import ContentConflict, OutOfResources, ProcessingFailure, StoreRefused
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import Conflict, OutOfSpace, StorageError, Unavailable
from storage.records import InstanceHeader, StoredObject

# What is younger may be in the hands of another receiver on the same folder: between its file and its row lie at most the
# waits for locks in the database.
SWEEP_AGE_SECONDS: Final = 600.0

_log = get_logger(__name__)


class Receiver:
    """Receives instances from peers that may send, from start() to stop()."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._storage = storage
        self._ae_titles = settings.node.ae_titles
        self._lock = threading.Lock()
        self._studies: dict[int, set[str]] = {}  # association -> studies it brought images of
        self._listener = Listener(
            settings.listener, settings.node.ae_titles, admit=self._admit, receive=in_memory(self._store), released=self._released
        )

    @property
    def port(self) -> int:
        """The TCP port that it listens on, between start() and stop()."""
        return self._listener.port

    def start(self) -> None:
        """Remove what a crash left behind, then listen; returns at once. Raises OSError if the address can't be bound."""
        objects, index = self._storage.objects, self._storage.index
        swept = objects.sweep(index.is_known, older_than_seconds=SWEEP_AGE_SECONDS)
        if swept:
            _log.info("unfinished objects removed", count=swept)
        self._listener.start()

    def stop(self, drain_seconds: float = 30.0) -> None:
        """Let the running associations end for up to `drain_seconds`, abort the rest, and return."""
        self._listener.stop(drain_seconds)

    def _admit(self, caller: Caller) -> str | None:
        peer = self._storage.registry.peer(caller.calling_ae_title)
        return None if peer is not None and peer.sends and caller.called_ae_title in self._ae_titles else "calling AE title"

    def _store(self, received: ReceivedInstance) -> None:
        """Return once the instance is safe, or raise StoreRefused after the refusal was noted for the admin."""
        copy: StoredObject | None = None
        try:
            header = read_header(received, received.dataset, hashlib.sha256(received.dataset).hexdigest())
            outcome, copy = self._keep(received, header)
            if outcome == "conflict":
                raise _about(header, ContentConflict("this SOP Instance UID is stored with other content"))
        except StoreRefused as refusal:
            kept = self._note(received, refusal, copy)
            if copy is not None and not kept:
                self._storage.objects.remove(copy.object_id)
            raise
        if header.kind == "image":
            with self._lock:
                self._studies.setdefault(received.association, set()).add(header.study_instance_uid)
        _log.debug(
            "instance received",
            outcome=outcome,
            sop_instance_uid=header.sop_instance_uid,
            study_instance_uid=header.study_instance_uid,
            calling_ae_title=received.calling_ae_title,
            bytes=len(received.dataset),
        )

    def _keep(self, received: ReceivedInstance, header: InstanceHeader) -> tuple[str, StoredObject | None]:
        """Put the instance on disk, then into the index; the same content again is no work (contract 2).

        Returns "stored", "duplicate" or "conflict", and for a conflict the object that holds the second content, or None if
        the disk has no room for it.
        """
        objects, index = self._storage.objects, self._storage.index
        try:
            known = index.find(header.sop_instance_uid)
            if known is not None and (known.dataset_sha256, known.transfer_syntax_uid) == (
                header.dataset_sha256,
                header.transfer_syntax_uid,
            ):
                return "duplicate", None
            try:
                stored = objects.put(part10_prefix(received), received.dataset)
            except OutOfSpace:
                if known is None:
                    raise
                return "conflict", None
            outcome = self._index(header, stored)
            if outcome == "duplicate":  # another association was faster with the same bytes
                objects.remove(stored.object_id)
            return outcome, stored if outcome == "conflict" else None
        except (OutOfSpace, Unavailable) as error:
            raise _about(header, OutOfResources("disk or database take nothing now; send again later")) from error
        except StorageError as error:
            _log.error("storage failed", sop_instance_uid=header.sop_instance_uid, reason=_tellable(error))
            raise _about(header, ProcessingFailure("storage failed; send again later")) from error

    def _index(self, header: InstanceHeader, stored: StoredObject) -> str:
        """Add the row; if that failed and the row isn't there, take the file away too."""
        added = False
        try:
            outcome = self._storage.index.add_instance(header, stored)
            added = True
        finally:
            if not added and not self._storage.index.is_known([stored.object_id]):
                self._storage.objects.remove(stored.object_id)
        return outcome

    def _note(self, received: ReceivedInstance, refusal: StoreRefused, stored: StoredObject | None = None) -> bool:
        """Log a refusal and write it down for the admin; return whether `stored` is kept."""
        uid = received.sop_instance_uid if is_uid(received.sop_instance_uid) else "(malformed)"
        _log.warning(
            "instance refused",
            status=f"0x{refusal.dimse_status:04X}",
            reason=str(refusal),
            sop_instance_uid=uid,
            study_instance_uid=refusal.study_instance_uid,
            calling_ae_title=received.calling_ae_title,
        )
        try:
            return self._storage.index.quarantine(
                sop_instance_uid=uid,
                study_instance_uid=refusal.study_instance_uid,
                calling_ae_title=received.calling_ae_title,
                dimse_status=refusal.dimse_status,
                reason=str(refusal),
                stored=stored,
            )
        except StorageError as error:
            _log.error("the refusal could not be written down", sop_instance_uid=uid, reason=_tellable(error))
            return False

    def _released(self, association: int) -> None:
        with self._lock:
            studies = self._studies.pop(association, set())
        if studies:
            self._storage.index.mark_released(studies)


def _about(header: InstanceHeader, refusal: StoreRefused) -> StoreRefused:
    refusal.study_instance_uid = header.study_instance_uid
    return refusal


def _tellable(error: StorageError) -> str:
    """What the log may say of a failure: its chain would show the statement's parameters, a conflict the row's values."""
    return type(error).__name__ if isinstance(error, Conflict) else f"{type(error).__name__}: {error}"
