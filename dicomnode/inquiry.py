"""Peers are asked (C-FIND) what they hold of a study that seems complete, each in a thread of its own.

An answer is evidence and nothing more: none is waited for, and a peer that gave none is left alone for a while. Must never hold up
who asks, nor remember a study that is no longer received.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from dicomnode.config import TlsSection
from dicomnode.dimse.find import ASKING, FindLimits, StudyContent, series_instances, study_content
from dicomnode.errors import NodeError
from dicomnode.evidence import PeerEvidence
from dicomnode.logs import get_logger
from storage import Storage
from storage.records import Peer, Study

AGAIN_SECONDS = 30.0  # an answer that is older is asked for again
ALONE_SECONDS = 60.0  # how long a peer that gave no answer is asked nothing
# Modalities of series that hold no images (PS3.3 C.7.3.1.1.1): a peer that has more of them has no more to analyse.
NO_IMAGES = frozenset({
    "ANN", "AR", "ASMT", "AU", "DOC", "ECG", "EEG", "EMG", "EOG", "EPS", "FID", "HD", "KER", "KO", "LEN", "M3D", "OAM", "OSSR", "PLAN",
    "POS", "PR", "REG", "RESP", "RTDOSE", "RTPLAN", "RTRECORD", "RTSTRUCT", "RWV", "SEG", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP", "VA",
})  # fmt: skip

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inquirer:
    """How this node asks a peer: the ways to ask are those of `dimse.find`."""

    calling_ae_title: str
    tls: TlsSection | None = None
    limits: FindLimits = ASKING
    again_seconds: float = AGAIN_SECONDS
    alone_seconds: float = ALONE_SECONDS
    study_content: Callable[..., StudyContent | None] = field(default=study_content)
    series_instances: Callable[..., Mapping[str, str]] = field(default=series_instances)


@dataclass(frozen=True, kw_only=True)
class AbsentImages:
    """Images of a series that a peer says that it holds, and that aren't here."""

    series_instance_uid: str
    modality: str
    number: int
    is_all: bool  # nothing of the series is here
    instances: Mapping[str, str] = field(default_factory=dict)  # SOP Instance UID: SOP Class UID, as far as the peer names them


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A study at one moment: an answer to another moment's question says nothing."""

    study: Study
    peer: Peer


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is known of the last question about a study at a peer."""

    last_received_at: datetime
    evidence: PeerEvidence
    absent: tuple[AbsentImages, ...] = ()  # by that evidence
    pending: bool  # asked and not answered yet
    at: float  # of the answer, on the monotonic clock


class Inquiry:
    """Asks peers, and keeps their last answers about the studies that are being received."""

    def __init__(self, storage: Storage, inquirer: Inquirer) -> None:
        self._storage = storage
        self._inquirer = inquirer
        self._lock = threading.Lock()
        self._asked: dict[tuple[str, str], _Asked] = {}  # by Study Instance UID and AE title
        self._alone: dict[str, tuple[float, str]] = {}  # AE title: until when it is asked nothing, and why
        self._queues: dict[str, queue.Queue[_Question | None]] = {}
        self._threads: list[threading.Thread] = []

    def evidence(self, study: Study, ae_titles: Collection[str]) -> tuple[PeerEvidence, ...]:
        """Return what each peer holds of the study as far as that is known, and ask those of which it isn't. Never waits."""
        return tuple(self._evidence(study, title) for title in sorted(ae_titles))

    def absent(self, study: Study, ae_title: str) -> tuple[AbsentImages, ...]:
        """Return which images of the study the peer holds and the node doesn't, as far as its last answer about the study as it is says."""
        with self._lock:
            known = self._asked.get((study.study_instance_uid, ae_title))
        current = known is not None and known.last_received_at == study.last_received_at and known.evidence.state == "answered"
        return known.absent if known is not None and current else ()

    def forget_but(self, study_instance_uids: Collection[str]) -> None:
        """Keep nothing of studies other than these."""
        with self._lock:
            self._asked = {key: asked for key, asked in self._asked.items() if key[0] in study_instance_uids}

    def stop(self) -> None:
        """Ask nothing more; return when the questions that are on their way have ended."""
        with self._lock:
            queues, self._queues = list(self._queues.values()), {}
        for waiting in queues:
            while not waiting.empty():
                waiting.get_nowait()
            waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _evidence(self, study: Study, title: str) -> PeerEvidence:
        now = time.monotonic()
        key = study.study_instance_uid, title
        with self._lock:
            known = self._asked.get(key)
            if known is not None and known.last_received_at != study.last_received_at:
                known = None
            if known is not None and (known.pending or now - known.at < self._inquirer.again_seconds):
                return known.evidence
            until, reason = self._alone.get(title, (now, ""))
        peer = self._storage.registry.peer(title) if until <= now else None
        if peer is None:
            reason = reason if until > now else "it is no peer any more"
            return known.evidence if known is not None else PeerEvidence(peer=title, state="silent", reason=reason)
        evidence = known.evidence if known is not None else PeerEvidence(peer=title, state="asked")  # it holds until there is another
        with self._lock:
            absent = known.absent if known is not None else ()
            self._asked[key] = _Asked(
                last_received_at=study.last_received_at, evidence=evidence, absent=absent, pending=True, at=now
            )  # fmt: skip
            if title not in self._queues:
                self._queues[title] = queue.Queue()
                thread = threading.Thread(target=self._run, args=(self._queues[title],), name=f"inquiry-{title}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._queues[title].put(_Question(study=study, peer=peer))
        return evidence

    def _run(self, questions: queue.Queue[_Question | None]) -> None:
        while (question := questions.get()) is not None:
            self._answer(question)

    def _answer(self, question: _Question) -> None:
        """Ask one question, unless it has become idle, and keep the answer."""
        title, key = question.peer.ae_title, (question.study.study_instance_uid, question.peer.ae_title)
        with self._lock:
            known = self._asked.get(key)
            until, reason = self._alone.get(title, (0.0, ""))
        if known is None or known.last_received_at != question.study.last_received_at:
            return
        alone = time.monotonic() < until
        silent = PeerEvidence(peer=title, state="silent", reason=reason)
        evidence, absent = (silent, ()) if alone else self._ask(question)
        with self._lock:
            if self._asked.get(key) is known:
                if evidence.state == "silent" and known.evidence.state == "answered":
                    evidence, absent = known.evidence, known.absent
                self._asked[key] = replace(known, evidence=evidence, absent=absent, pending=False, at=time.monotonic())

    def _ask(self, question: _Question) -> tuple[PeerEvidence, tuple[AbsentImages, ...]]:
        title = question.peer.ae_title
        try:
            return self._compared(question)
        except NodeError as error:
            reason = str(error)
        except Exception as error:
            log.exception("a peer could not be asked", peer=title)
            reason = type(error).__name__
        log.warning("a peer did not say what it holds", peer=title, reason=reason)
        with self._lock:
            self._alone[title] = (time.monotonic() + self._inquirer.alone_seconds, reason)
        return PeerEvidence(peer=title, state="silent", reason=reason), ()

    def _compared(self, question: _Question) -> tuple[PeerEvidence, tuple[AbsentImages, ...]]:
        """Ask how many images of each series the peer holds, and of series of which that is more than came, which."""
        inquirer, study, peer = self._inquirer, question.study, question.peer
        asking: dict[str, Any] = {"calling_ae_title": inquirer.calling_ae_title, "patient_id": study.patient_id, "tls": inquirer.tls}
        asking["limits"] = inquirer.limits
        content = inquirer.study_content(peer, study.study_instance_uid, **asking)
        if content is None:
            return PeerEvidence(peer=peer.ae_title, state="unknown"), ()
        here = {series.series_instance_uid: series.instances for series in self._storage.index.series(study.study_instance_uid)}
        images = {uid: count for uid, count in content.instances.items() if content.modalities.get(uid, "").upper() not in NO_IMAGES}
        absent = []
        for uid, count in images.items():
            if count > here.get(uid, 0):
                held = inquirer.series_instances(peer, study.study_instance_uid, uid, **asking)
                names = {one: held[one] for one in self._storage.index.absent(held)}
                # A peer that counts more than it names is believed about the difference: silence would be taken for completeness.
                number = len(names) if held else count - here.get(uid, 0)
                modality = content.modalities.get(uid, "")
                one = AbsentImages(series_instance_uid=uid, modality=modality, number=number, is_all=uid not in here, instances=names)
                absent += [one] if number else []
        total = sum(one.number for one in absent)
        return PeerEvidence(peer=peer.ae_title, state="answered", instances=sum(images.values()), absent=total), tuple(absent)
