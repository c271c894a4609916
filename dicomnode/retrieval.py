"""Earlier studies of a patient, asked of a peer and fetched while the study is analysed, so that it can be compared with them.

A route says whom to ask, for how many and how old. What was asked, found and fetched is told to whoever keeps it. Must never hold up an
analysis for longer than its deadline, nor an urgent one at all, nor fetch more than its limits, nor log what a patient is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from pydicom import Dataset

from dicomnode.config import Settings
from dicomnode.dimse.find import FindLimits, find, query
from dicomnode.dimse.move import Moved, move
from dicomnode.errors import PeerRefused, PeerUnavailable
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import StorageError
from storage.records import Job, Peer, PriorRule

RETRIEVAL = "retrieval"  # name of what a job's row keeps of it
RESULTS = frozenset({"SEG", "SR"})  # modalities that are fetched with the images: they may be this node's own, of an earlier time
_LOOK_SECONDS = 0.2
_MAXIMUM_STUDIES = 200  # that a peer may answer with

log = get_logger(__name__)


@dataclass(kw_only=True)
class _Course:
    """What a retrieval is at; its own thread writes, another one reads."""

    told: dict[str, Any]
    until: float
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        """What is left of its time."""
        return max(0.1, self.until - time.monotonic())


class Retrieval:
    """The retrieval for one job. `begin` returns at once; `end` waits as long as may be."""

    def __init__(self, settings: Settings, storage: Storage, job: Job, rule: PriorRule) -> None:
        self._settings = settings
        self._storage = storage
        self._job = job
        self._rule = rule
        self._course = _Course(told={"peer": rule.ae_title, "found": 0, "studies": []}, until=time.monotonic() + settings.priors.seconds)
        self._thread = threading.Thread(target=self._run, name="priors", daemon=True)

    def begin(self) -> None:
        """Ask and fetch, beside whoever calls."""
        self._thread.start()

    def end(self, has_urgent: Callable[[], bool]) -> dict[str, Any]:
        """Wait until all is fetched, the time is over, or an urgent job waits; return what was asked, found and fetched."""
        course = self._course
        while self._thread.is_alive() and time.monotonic() < course.until:
            if has_urgent():
                course.told["ended"] = "an urgent study waits"
                break
            self._thread.join(_LOOK_SECONDS)
        else:
            if self._thread.is_alive():
                course.told["ended"] = f"not done within {self._settings.priors.seconds:g} s"
        course.stop.set()
        return {**course.told, "studies": [dict(study) for study in course.told["studies"]]}

    def _run(self) -> None:
        told = self._course.told
        try:
            peer = self._storage.registry.peer(self._rule.ae_title)
            if peer is None:
                told["ended"] = "there is no such peer any more"
                return
            self._fetch(peer)
        except (PeerRefused, PeerUnavailable) as error:
            told["ended"] = str(error)
        except StorageError as error:
            told["ended"] = f"storage failed: {type(error).__name__}"
        except Exception:  # a thread's own boundary: nobody above it would see it
            log.exception("earlier studies could not be fetched", job=self._job.key)
            told["ended"] = "the node failed"

    def _fetch(self, peer: Peer) -> None:
        course = self._course
        (own,) = self._storage.query.find("STUDY", {"StudyInstanceUID": self._job.study_instance_uid}, include={"ModalitiesInStudy"})
        patient_id, begun = str(own["PatientID"]), (str(own["StudyDate"]), str(own["StudyTime"] or ""))
        modalities = self._rule.modalities or tuple(m for m in _texts(own["ModalitiesInStudy"]) if m not in RESULTS)
        first = _days_before(begun[0], self._rule.days)
        if not patient_id or first is None:
            course.told["ended"] = "the study names no patient or has no date"
            return
        course.told["asked"] = {"from": first, "to": begun[0], "modalities": list(modalities), "count": self._rule.count}
        when = f"{first}-{begun[0]}"
        asked = query("STUDY", PatientID=patient_id, StudyDate=when, StudyInstanceUID="", StudyTime="", PatientBirthDate="",
                      ModalitiesInStudy="", NumberOfStudyRelatedInstances="")  # fmt: skip
        earlier: dict[str, tuple[str, str]] = {}
        for answer in self._find(peer, asked, patient_id):
            then = str(answer.get("StudyDate") or ""), str(answer.get("StudyTime") or "")
            uid = str(answer.get("StudyInstanceUID") or "")
            if uid and uid != self._job.study_instance_uid and first <= then[0] and then < begun and _fits(answer, own, modalities):
                earlier[uid] = then
        course.told["found"] = len(earlier)
        for uid in sorted(earlier, key=lambda uid: earlier[uid], reverse=True)[: self._rule.count]:
            if course.stop.is_set():
                return
            study: dict[str, Any] = {"study_instance_uid": uid, "study_date": earlier[uid][0], "instances": 0, "state": "asked"}
            course.told["studies"].append(study)
            self._fetch_study(peer, uid, patient_id, modalities, study)

    def _fetch_study(self, peer: Peer, uid: str, patient_id: str, modalities: tuple[str, ...], told: dict[str, Any]) -> None:
        """Fetch the series of a study that are wanted and not held yet: images, and what may be results of this node."""
        keys = query(
            "SERIES", StudyInstanceUID=uid, SeriesInstanceUID="", Modality="", BodyPartExamined="", NumberOfSeriesRelatedInstances=""
        )
        wanted = {}
        for answer in self._find(peer, keys, patient_id):
            series = str(answer.get("SeriesInstanceUID") or "")
            modality, part = str(answer.get("Modality") or ""), str(answer.get("BodyPartExamined") or "").upper()
            parts = self._rule.body_parts
            if series and (modality in RESULTS or (modality in modalities and (not part or not parts or part in parts))):
                wanted[series] = int(answer.get("NumberOfSeriesRelatedInstances") or 0)
        rows = self._storage.query.find("SERIES", {"StudyInstanceUID": uid})
        held = {str(row["SeriesInstanceUID"]): int(str(row["NumberOfSeriesRelatedInstances"])) for row in rows}
        missing = {series: count for series, count in wanted.items() if held.get(series, 0) < max(count, 1)}
        limit = self._settings.priors.maximum_instances
        if not missing:
            told["state"] = "held" if wanted else "nothing wanted"
            return
        if sum(missing.values()) > limit:
            told["state"] = f"not fetched: {sum(missing.values())} instances, and the limit is {limit}"
            return
        self._storage.fetched.add(uid, peer.ae_title, self._job.study_instance_uid)
        for series in missing:
            if self._course.stop.is_set():
                told["state"] = "not fetched to its end"
                return
            moved = self._move(peer, query("SERIES", StudyInstanceUID=uid, SeriesInstanceUID=series), patient_id, uid)
            told["instances"] += moved.completed
            if moved.error is not None:
                told["state"] = f"not fetched to its end: {moved.error}"
                return
        told["state"] = "fetched"
        log.info("earlier study fetched", job=self._job.key, study_instance_uid=uid, peer=peer.ae_title, count=told["instances"])

    def _find(self, peer: Peer, keys: Dataset, patient_id: str) -> Iterator[Dataset]:
        limits = FindLimits(seconds=self._course.seconds, answers=_MAXIMUM_STUDIES)
        title, tls = self._settings.node.ae_title, self._settings.tls
        return find(peer, keys, calling_ae_title=title, patient_id=patient_id, tls=tls, limits=limits)

    def _move(self, peer: Peer, keys: Dataset, patient_id: str, study: str) -> Moved:
        """Let the peer send to this node, until that is too much or not wanted any more."""

        def goes_on() -> bool:
            return not self._course.stop.is_set() and self._bytes_of(study) <= self._settings.priors.maximum_bytes

        return move(
            peer, keys, self._settings.node.ae_title, calling_ae_title=self._settings.node.ae_title, patient_id=patient_id,
            tls=self._settings.tls, seconds=self._course.seconds, goes_on=goes_on,
        )  # fmt: skip

    def _bytes_of(self, study: str) -> int:
        return sum(
            held.size for held in self._storage.query.held({"StudyInstanceUID": study}, limit=self._settings.priors.maximum_instances)
        )


def rule_for(storage: Storage, job: Job) -> PriorRule | None:
    """Return the rule of the job's routes by which earlier studies are fetched: of several the first by the route's name."""
    routes = storage.registry.matching(storage.index.callers(job.study_instance_uid))
    return next((route.priors for route in routes if route.package == job.package and route.priors is not None), None)


def _fits(answer: Dataset, own: dict[str, Any], modalities: tuple[str, ...]) -> bool:
    """Whether an answer is of the same patient, and has one of the modalities, as far as it says so."""
    said = _texts(answer.get("ModalitiesInStudy"))
    births = {str(own["PatientBirthDate"] or ""), str(answer.get("PatientBirthDate") or "")} - {""}
    same = str(answer.get("PatientID") or own["PatientID"]).strip() == own["PatientID"] and len(births) < 2
    return same and (not said or not modalities or bool(set(said) & set(modalities)))


def _texts(value: Any) -> tuple[str, ...]:
    """The values of an attribute that may have none, one or several."""
    if value is None or value == "":
        return ()
    return (str(value),) if isinstance(value, str) else tuple(str(one) for one in value)


def _days_before(study_date: str, days: int) -> str | None:
    try:
        return (date.fromisoformat(study_date) - timedelta(days=days)).strftime("%Y%m%d")
    except (ValueError, OverflowError):
        return None
