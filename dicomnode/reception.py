"""How an instance comes in, whoever brings it: checked, safe on disk and in the index, and only then acknowledged.

C-STORE and STOW-RS share this way, so both refuse the same things and neither says Success earlier than the other. Must never load
torch, MONAI or highdicom, change a byte of a data set, or let a value from the wire name a file.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from dicomnode.config import ListenerSection
from dicomnode.dimse.encoding import Limits
from dicomnode.dimse.scp import StoreRequest, is_uid, part10_prefix, read_header
from dicomnode.errors import CannotUnderstand, ContentConflict, OtherPatient, OtherStudy, OutOfResources, ProcessingFailure, StoreRefused
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import Conflict, OutOfSpace, StorageError, Unavailable
from storage.incoming import Incoming
from storage.records import InstanceHeader, StoredObject

NOTES_SECONDS: Final = 0.25  # how long what is no image may wait to be written down

_log = get_logger(__name__)


class Reception:
    """Takes instances in, for any number of threads, from start() to stop()."""

    def __init__(self, settings: ListenerSection, storage: Storage) -> None:
        """`settings` say how deep a data set may nest and how large an inflated one may be."""
        self.storage = storage
        self.limits = Limits(maximum_nesting=settings.maximum_nesting, maximum_inflated_bytes=settings.maximum_inflated_bytes)
        self.notes = Notes(storage)

    def sweep(self) -> None:
        """Remove what a crash left behind."""
        swept = self.storage.objects.sweep(self.storage.index.is_known)
        if swept:
            _log.info("unfinished objects removed", count=swept)

    def start(self) -> None:
        """Begin to write notes down, and to tell when the disk stops intake and when it goes on."""
        self.storage.objects.watch_intake(self._told)
        self.notes.start()

    def stop(self) -> None:
        """Write down what is left."""
        self.notes.stop()

    def ended(self, association: int) -> None:
        """Write down at once that an association has ended, where no thread does so."""
        self.notes.released(association)
        self.notes.write()

    def _told(self, stopped: bool, free: int) -> None:
        """Log and count a change of intake, which one process of the node is told of."""
        if stopped:
            _log.error("intake stopped: the disk is at its reserve", bytes=free)
        else:
            _log.info("intake goes on", bytes=free)
        self.notes.count("intake stopped" if stopped else "intake resumed")

    def begin(self, request: StoreRequest, demanded_study: str | None = None, demanded_patient: str | None = None) -> IncomingInstance:
        """Open the file that the data set of a request goes to.

        With `demanded_study` an instance of another study is refused, with `demanded_patient`, a Patient ID, one of another patient.

        Raises:
            StoreRefused: nothing can be stored, and the refusal was noted for the admin.
        """
        try:
            return IncomingInstance(self, request, self.storage.objects.create(part10_prefix(request)), (demanded_study, demanded_patient))
        except UnicodeEncodeError:
            refusal: StoreRefused = CannotUnderstand("a UID of the command is malformed")
        except StorageError as error:
            refusal = refusal_for(error)
        self.note(request, refusal)
        raise refusal

    def note(self, request: StoreRequest, refusal: StoreRefused, stored: StoredObject | None = None) -> bool:
        """Log a refusal and write it down for the admin; return whether `stored` is kept."""
        uid = request.sop_instance_uid if is_uid(request.sop_instance_uid) else "(malformed)"
        status = f"0x{refusal.dimse_status:04X}"
        self.notes.count(f"instance refused: {status}")
        _log.warning(
            "instance refused",
            status=status,
            reason=str(refusal),
            sop_instance_uid=uid,
            study_instance_uid=refusal.study_instance_uid,
            calling_ae_title=request.calling_ae_title,
        )
        try:
            return self.storage.index.quarantine(
                sop_instance_uid=uid,
                study_instance_uid=refusal.study_instance_uid,
                calling_ae_title=request.calling_ae_title,
                dimse_status=refusal.dimse_status,
                reason=str(refusal),
                stored=stored,
            )
        except StorageError as error:
            _log.error("the refusal could not be written down", sop_instance_uid=uid, reason=_tellable(error))
            return False


class IncomingInstance:
    """One request: its data set goes to a file under a temporary name, and is made an instance when it is whole (a Sink)."""

    def __init__(self, reception: Reception, request: StoreRequest, incoming: Incoming, demanded: tuple[str | None, str | None]) -> None:
        self.header: InstanceHeader | None = None  # once it is whole and was understood
        self._reception = reception
        self._request = request
        self._incoming = incoming
        self._demanded_study, self._demanded_patient = demanded

    def write(self, chunk: memoryview) -> None:
        """Append to the file. Raises StoreRefused if the disk takes no more."""
        try:
            self._incoming.write(chunk)
        except StorageError as error:
            refusal = refusal_for(error)
            self._reception.note(self._request, refusal)
            raise refusal from error

    def finish(self) -> None:
        """Check the data set and return once the instance is safe, or raise StoreRefused after the refusal was noted for the admin."""
        reception, request, incoming = self._reception, self._request, self._incoming
        stored: StoredObject | None = None
        study: str | None = None
        try:
            with incoming.dataset() as data:
                header = read_header(request, data, incoming.sha256, start=incoming.start, limits=reception.limits)
            self.header, study = header, header.study_instance_uid
            if self._demanded_study not in {None, study}:
                raise OtherStudy("the instance is of another study than the one demanded")
            if self._demanded_patient not in {None, header.patient_id.strip()}:
                raise OtherPatient("the instance is of another patient than the one demanded")
            outcome, stored = reception.storage.intake.add(header, incoming)
            if outcome == "conflict":
                raise ContentConflict("this SOP Instance UID is stored with other content")
        except (StoreRefused, StorageError) as error:
            refusal = error if isinstance(error, StoreRefused) else refusal_for(error)
            refusal.study_instance_uid = refusal.study_instance_uid or study
            kept = reception.note(request, refusal, stored)
            if stored is not None and not kept:
                reception.storage.objects.remove(stored.object_id)
            raise refusal from error
        finally:
            incoming.discard()
        if header.kind == "image":
            reception.notes.brought(request.association, header.study_instance_uid)
        _log.debug(
            "instance received",
            outcome=outcome,
            sop_instance_uid=header.sop_instance_uid,
            study_instance_uid=header.study_instance_uid,
            calling_ae_title=request.calling_ae_title,
            bytes=incoming.size,
        )

    def discard(self) -> None:
        """Remove the file."""
        self._incoming.discard()


class Notes:
    """What may be written down a moment after it happened: which studies an association brought when it ended, and the counts."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._brought: dict[int, set[str]] = {}  # association -> studies it brought images of
        self._released: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def brought(self, association: int, study_instance_uid: str) -> None:
        """Note that an association, still open, brought an image of the study."""
        with self._lock:
            self._brought.setdefault(association, set()).add(study_instance_uid)

    def released(self, association: int) -> None:
        """Note that an association has ended."""
        with self._lock:
            self._released |= self._brought.pop(association, set())

    def count(self, name: str) -> None:
        """Count something by its name."""
        with self._lock:
            self._counts[name] += 1

    def start(self) -> None:
        """Begin to write things down."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="reception-notes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write down what is left."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self.write()

    def _run(self) -> None:
        while not self._stopping.wait(NOTES_SECONDS):
            self.write()

    def write(self) -> None:
        """Write down what there is; what can't be now stays for the next time."""
        with self._lock:
            released, self._released = self._released, set()
            counts, self._counts = self._counts, Counter()
        try:
            if released:
                self._storage.index.mark_released(released)
            released = set()
            if counts:
                self._storage.counters.add(dict(counts))
            counts = Counter()
        except StorageError as error:  # the database is away: keep it for the next time
            _log.error("notes could not be written down", reason=_tellable(error))
        with self._lock:
            self._released |= released
            self._counts += counts


def refusal_for(error: StorageError) -> StoreRefused:
    """Turn a failure of storage into the answer that the peer gets."""
    if isinstance(error, OutOfSpace | Unavailable):
        return OutOfResources("disk or database take nothing now; send again later")
    _log.error("storage failed", reason=_tellable(error))
    return ProcessingFailure("storage failed; send again later")


def _tellable(error: StorageError) -> str:
    """What the log may say of a failure: its chain would show the statement's parameters, a conflict the row's values."""
    return type(error).__name__ if isinstance(error, Conflict) else f"{type(error).__name__}: {error}"
