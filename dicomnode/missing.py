"""Images of a study that a peer says it holds and that did not come: fetched from it before the study is closed, where routes say so.

A peer is asked a few times and no more, for exactly what is missing, and a study never waits for longer than one of these takes. What was
asked and what came is a row of the database, so that a node that is started anew doesn't begin from the start. Must never decide whether
a study is complete.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import datetime

from dicomnode.config import MissingSection
from dicomnode.dimse.get import GetLimits
from dicomnode.dimse.retrieving import Retriever, Wanted
from dicomnode.errors import NodeError
from dicomnode.evidence import FetchEvidence
from dicomnode.inquiry import AbsentImages
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import StorageError
from storage.records import Study

_AT_A_TIME = 4  # studies that are fetched for; of one peer one

_STOP_SECONDS = 10.0  # for what is cancelled to end

log = get_logger(__name__)


class MissingImages:
    """Fetches for studies that are being received, each in a thread of its own."""

    def __init__(self, storage: Storage, settings: MissingSection, retriever: Retriever) -> None:
        self._storage = storage
        self._settings = settings
        self._retriever = retriever
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[str, tuple[str, threading.Thread]] = {}  # by AE title: for which study

    def fetch(self, study: Study, ae_title: str, absent: Sequence[AbsentImages], now: datetime) -> None:
        """Begin to fetch what a peer holds of a study and the node doesn't, unless it was asked often enough, or just now. Never waits."""
        settings, number = self._settings, sum(one.number for one in absent)
        with self._lock:
            if not number or self._stopping.is_set() or ae_title in self._running or len(self._running) >= _AT_A_TIME:
                return
            uid, revision = study.study_instance_uid, study.revision + 1
            before = next((one for one in self._storage.fetched.missing(uid, revision=revision) if one.peer == ae_title), None)
            if before is not None and (before.tries >= settings.tries or (now - before.asked_at).total_seconds() < settings.again_seconds):
                return
            sent_before = any(calling == ae_title for calling, _ in self._storage.index.callers(uid))
            self._storage.fetched.begin_missing(uid, ae_title, revision=revision, instances=number, sent_before=sent_before)
            thread = threading.Thread(target=self._run, args=(study, ae_title, tuple(absent)), name=f"missing-{ae_title}", daemon=True)
            self._running[ae_title] = uid, thread
            thread.start()

    def evidence(self, study: Study) -> tuple[FetchEvidence, ...]:
        """Return what was asked for the revision that is to be, and what came."""
        with self._lock:
            running = {title for title, (uid, _) in self._running.items() if uid == study.study_instance_uid}
        return tuple(
            FetchEvidence(
                peer=one.peer, state="asked" if one.peer in running else "ended", tries=one.tries, instances=one.instances,
                arrived=one.arrived, reason="" if one.peer in running else one.reason or "",
            )
            for one in self._storage.fetched.missing(study.study_instance_uid, revision=study.revision + 1)
        )  # fmt: skip

    def stop(self) -> None:
        """Fetch nothing more; return when what is on its way was cancelled, or soon: a peer may not answer an association request."""
        self._stopping.set()
        with self._lock:
            threads = [thread for _, thread in self._running.values()]
        for thread in threads:
            thread.join(_STOP_SECONDS)

    def _run(self, study: Study, ae_title: str, absent: Sequence[AbsentImages]) -> None:
        uid, number = study.study_instance_uid, sum(one.number for one in absent)
        arrived, reason = 0, ""
        try:
            before = self._here(uid, absent)
            try:
                reason = self._fetched(study, ae_title, absent)
            except NodeError as error:
                reason = str(error)
            except Exception:  # a thread's own boundary: nobody above it would see it
                log.exception("missing images could not be fetched", study_instance_uid=uid, peer=ae_title)
                reason = "the node failed"
            arrived = self._here(uid, absent) - before
            if arrived < number and not reason:
                reason = "less came than the peer holds"
            self._storage.fetched.end_missing(uid, ae_title, arrived=arrived, reason=reason or None)
        except StorageError as error:  # the database is away: the row says that the node stopped meanwhile
            reason = type(error).__name__
        finally:
            with self._lock:
                self._running.pop(ae_title, None)
        log.info("missing images fetched", study_instance_uid=uid, peer=ae_title, count=arrived, reason=reason)

    def _fetched(self, study: Study, ae_title: str, absent: Sequence[AbsentImages]) -> str:
        """Fetch series by series; return why not all of it was sent, "" if it was."""
        settings, until = self._settings, time.monotonic() + self._settings.seconds
        peer = self._storage.registry.peer(ae_title)
        if peer is None:
            return "it is no peer any more"
        number = sum(one.number for one in absent)
        if number > settings.maximum_instances:
            return f"not fetched: {number} instances, and the limit is {settings.maximum_instances}"
        troubles = []
        for one in absent:
            if self._stopping.is_set():
                return "the node stopped meanwhile"
            wanted = Wanted(
                study_instance_uid=study.study_instance_uid, patient_id=study.patient_id.strip(),
                series_instance_uid=one.series_instance_uid, modality=one.modality,
                instances=() if one.is_all else sorted(one.instances), sop_classes=tuple(set(one.instances.values())),
            )  # fmt: skip
            limits = GetLimits(
                seconds=max(0.1, until - time.monotonic()), instances=settings.maximum_instances, size=settings.maximum_bytes
            )  # fmt: skip
            moved = self._retriever.retrieve(peer, wanted, limits, lambda: not self._stopping.is_set())
            troubles += [moved.error] if moved.error is not None else []
            if moved.cancelled:
                break
        return troubles[0] if troubles else ""

    def _here(self, study_instance_uid: str, absent: Sequence[AbsentImages]) -> int:
        """How many of these images are here; where the peer doesn't name them, how many of the study."""
        names = [name for one in absent for name in one.instances]
        if len(names) == sum(one.number for one in absent):
            return len(names) - len(self._storage.index.absent(names))
        return sum(series.instances for series in self._storage.index.series(study_instance_uid))
