"""Earlier studies of a patient, asked of a peer and fetched while the study is analysed, so that it can be compared with them.

A route says whom to ask, for how many and how old. What was asked, found and fetched is told to whoever keeps it. Must never hold up an
analysis for longer than its deadline, nor an urgent one at all, nor fetch more than its limits, nor log what a patient is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Self

from pydicom import Dataset

from dicomnode.config import Settings
from dicomnode.dimse.find import FindLimits, find, number_of_instances, query, series_instances
from dicomnode.dimse.get import GetLimits
from dicomnode.dimse.move import Moved
from dicomnode.dimse.retrieving import Retriever, Wanted
from dicomnode.errors import PeerRefused, PeerUnavailable
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import StorageError
from storage.records import Job, Peer, PriorRule

RETRIEVAL = "retrieval"  # name of what a job's row keeps of it
RESULTS = frozenset({"SEG", "SR"})  # modalities that are fetched with the images: they may be this node's own, of an earlier time
SAME = "SAME"  # a rule's body part: those of the new study
_LOOK_SECONDS = 0.2
_MAXIMUM_STUDIES = 200  # that a peer may answer with
_MAXIMUM_LOOKED_INTO = 20  # of them, for series that are wanted

log = get_logger(__name__)


@dataclass(kw_only=True)
class _Course:
    """What a retrieval is at; its own thread writes, another one reads."""

    told: dict[str, Any]
    until: float
    stop: threading.Event = field(default_factory=threading.Event)
    gives_way: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        """What is left of its time."""
        return max(0.1, self.until - time.monotonic())

    def wait_for_its_turn(self) -> bool:
        """Return once nothing urgent goes before it; whether it goes on then."""
        while self.gives_way.is_set() and not self.stop.wait(_LOOK_SECONDS):
            pass
        return not self.stop.is_set()


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """An earlier study at the peer, and the series of it that are wanted."""

    study_instance_uid: str
    patient_id: str
    series: dict[str, tuple[str, int]]  # by Series Instance UID: modality, and how many instances it is said to have


class Retrieval:
    """The retrieval for one job: entering begins it, leaving ends it, and neither waits. `end` waits as long as may be."""

    def __init__(self, settings: Settings, storage: Storage, job: Job, rule: PriorRule, retriever: Retriever) -> None:
        self._settings = settings
        self._storage = storage
        self._job = job
        self._rule = rule
        self._retriever = retriever
        self._course = _Course(told={"peer": rule.ae_title, "found": 0, "studies": []}, until=time.monotonic() + settings.priors.seconds)
        self._thread = threading.Thread(target=self._run, name="priors", daemon=True)

    def __enter__(self) -> Self:
        """Ask and fetch, beside whoever calls."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Fetch no more, whatever for."""
        self._course.stop.set()

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """Fetch nothing meanwhile: what is on its way is cancelled, and goes on afterwards. Its time is not counted."""
        began, told = time.monotonic(), self._course.told
        if self._thread.is_alive():
            told["gave_way"] = told.get("gave_way", 0) + 1
        self._course.gives_way.set()
        try:
            yield
        finally:
            self._course.until += time.monotonic() - began
            self._course.gives_way.clear()

    def end(self, has_urgent: Callable[[], bool]) -> dict[str, Any]:
        """Wait until all is fetched, the time is over, or an urgent job waits; return what was asked, found and fetched."""
        course = self._course
        while self._thread.is_alive() and time.monotonic() < course.until:
            if has_urgent():
                course.told["ended"] = course.told["why"] = "an urgent study waits"
                break
            self._thread.join(_LOOK_SECONDS)
        else:
            if self._thread.is_alive():
                course.told["ended"] = course.told["why"] = f"not done within {self._settings.priors.seconds:g} s"
        course.stop.set()
        return {**course.told, "studies": [dict(study) for study in course.told["studies"]]}

    def _run(self) -> None:
        told = self._course.told
        try:
            peer = self._storage.registry.peer(self._rule.ae_title)
            if peer is None:
                self._ended("there is no such peer any more")
                return
            self._fetch(peer)
        except PeerUnavailable as error:
            self._ended(str(error), "it could not be reached, or did not answer in time")
        except PeerRefused as error:
            self._ended(str(error), "it refused, or answered with more than it may")
        except StorageError as error:
            self._ended(f"storage failed: {type(error).__name__}", "the node failed")
        except Exception:  # a thread's own boundary: nobody above it would see it
            log.exception("earlier studies could not be fetched", job=self._job.key)
            self._ended("the node failed")
        if "ended" in told:
            log.warning("earlier studies were not fetched", job=self._job.key, peer=self._rule.ae_title, reason=told["ended"])

    def _ended(self, reason: str, why: str | None = None) -> None:
        """Tell why it ended early: to the admin, and in words of our own alone to who reads the report."""
        self._course.told.setdefault("ended", reason)
        self._course.told.setdefault("why", why or reason)

    def _fetch(self, peer: Peer) -> None:
        course = self._course
        (own,) = self._storage.query.find("STUDY", {"StudyInstanceUID": self._job.study_instance_uid}, include={"ModalitiesInStudy"})
        patient_id, begun = str(own["PatientID"]), (str(own["StudyDate"]), str(own["StudyTime"] or ""))
        modalities = self._rule.modalities or tuple(m for m in _texts(own["ModalitiesInStudy"]) if m not in RESULTS)
        first = _days_before(begun[0], self._rule.days)
        if not patient_id or first is None:
            self._ended("the study names no patient or has no date")
            return
        parts = self._body_parts()
        course.told["asked"] = {"from": first, "to": begun[0], "modalities": list(modalities), "count": self._rule.count}
        if parts:
            course.told["asked"]["body_parts"] = sorted(parts)
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
        fetched = 0
        for uid in sorted(earlier, key=lambda uid: earlier[uid], reverse=True)[:_MAXIMUM_LOOKED_INTO]:
            if fetched == self._rule.count or not course.wait_for_its_turn():
                return
            series = self._series_wanted(peer, uid, patient_id, modalities, parts)
            study: dict[str, Any] = {"study_instance_uid": uid, "study_date": earlier[uid][0], "instances": 0, "state": "nothing wanted"}
            course.told["studies"].append(study)
            if series:  # one of another part of the body doesn't take the place of one to compare with
                fetched += 1
                study["state"] = "asked"
                self._fetch_study(peer, _Earlier(study_instance_uid=uid, patient_id=patient_id, series=series), study)

    def _body_parts(self) -> frozenset[str]:
        """The parts of the body that series must be of, where they say one; none: any."""
        parts = set(self._rule.body_parts)
        if SAME in parts:
            own = self._storage.query.find("SERIES", {"StudyInstanceUID": self._job.study_instance_uid}, include={"BodyPartExamined"})
            parts = (parts - {SAME}) | {str(row["BodyPartExamined"] or "").upper() for row in own if row["Modality"] not in RESULTS}
        return frozenset(parts - {""})

    def _series_wanted(
        self, peer: Peer, uid: str, patient_id: str, modalities: tuple[str, ...], parts: frozenset[str]
    ) -> dict[str, tuple[str, int]]:
        """The series of a study that are wanted: images, and with these what may be results of this node."""
        keys = query(
            "SERIES", StudyInstanceUID=uid, SeriesInstanceUID="", Modality="", BodyPartExamined="", NumberOfSeriesRelatedInstances=""
        )
        images, results = {}, {}
        for answer in self._find(peer, keys, patient_id):
            series = str(answer.get("SeriesInstanceUID") or "")
            modality, part = str(answer.get("Modality") or ""), str(answer.get("BodyPartExamined") or "").upper()
            if not series or str(answer.get("StudyInstanceUID") or uid) != uid:
                continue  # some peers answer with whatever they hold
            if modality in RESULTS:
                results[series] = modality, max(number_of_instances(answer), 1)
            elif modality in modalities and (not part or not parts or part in parts):
                images[series] = modality, max(number_of_instances(answer), 1)
        return images | results if images else {}

    def _fetch_study(self, peer: Peer, earlier: _Earlier, told: dict[str, Any]) -> None:
        """Fetch what is wanted of a study and not held yet."""
        uid = earlier.study_instance_uid
        before = self._held(uid)
        missing = {series: count for series, (_, count) in earlier.series.items() if before.get(series, 0) < count}
        limit = self._settings.priors.maximum_instances
        if not missing:
            told["state"] = "held"
            return
        if sum(missing.values()) > limit:
            told["state"] = f"not fetched: {sum(missing.values())} instances, and the limit is {limit}"
            return
        self._storage.fetched.add(uid, peer.ae_title, self._job.study_instance_uid)
        trouble: str | None = None
        try:
            for series in missing:
                moved = self._fetch_series(peer, earlier, series)
                trouble = trouble or moved.error
                if moved.cancelled:
                    break
        finally:
            now = self._held(uid)
            told["instances"] = sum(now.values()) - sum(before.values())
        came = all(now.get(series, 0) >= count for series, count in missing.items())  # whatever the peer says of it
        if not came or trouble is not None:
            told["state"] = f"not fetched to its end: {trouble or 'less came than the peer holds'}"
            return
        known = self._storage.index.study(uid)
        if known is not None and known.patient_id.strip() != earlier.patient_id:  # a C-MOVE brings what the peer sends
            told["state"] = "fetched, and of another patient: not compared with"
            return
        told["state"] = "fetched"
        log.info("earlier study fetched", job=self._job.key, study_instance_uid=uid, peer=peer.ae_title, count=told["instances"])

    def _fetch_series(self, peer: Peer, earlier: _Earlier, series: str) -> Moved:
        """Fetch a series, as often as it gives way to an urgent study; of one that is held in part the rest."""
        course, priors, uid = self._course, self._settings.priors, earlier.study_instance_uid

        gave_way = threading.Event()

        def goes_on() -> bool:
            if course.gives_way.is_set():
                gave_way.set()
            return not course.stop.is_set() and not gave_way.is_set() and self._within_limits(uid)

        while course.wait_for_its_turn():
            gave_way.clear()
            there = series_instances(
                peer, uid, series, calling_ae_title=self._settings.node.ae_title, patient_id=earlier.patient_id, tls=self._settings.tls,
                limits=FindLimits(seconds=course.seconds, answers=priors.maximum_instances),
            )  # fmt: skip
            absent = self._storage.index.absent(there)
            if there and not absent:
                return Moved(completed=0, failed=0, error=None)
            wanted = Wanted(
                study_instance_uid=uid, patient_id=earlier.patient_id, series_instance_uid=series, modality=earlier.series[series][0],
                instances=sorted(absent) if len(absent) < len(there) else (), sop_classes=tuple({there[one] for one in absent}),
            )  # fmt: skip
            limits = GetLimits(seconds=course.seconds, instances=priors.maximum_instances, size=priors.maximum_bytes)
            moved = self._retriever.retrieve(peer, wanted, limits, goes_on)
            if not (moved.cancelled and gave_way.is_set()):
                return moved
        return Moved(completed=0, failed=0, error="it was not wanted any more", cancelled=True)

    def _find(self, peer: Peer, keys: Dataset, patient_id: str) -> Iterator[Dataset]:
        limits = FindLimits(seconds=self._course.seconds, answers=_MAXIMUM_STUDIES)
        title, tls = self._settings.node.ae_title, self._settings.tls
        return find(peer, keys, calling_ae_title=title, patient_id=patient_id, tls=tls, limits=limits)

    def _held(self, study: str) -> dict[str, int]:
        """How many instances of each series of a study are held."""
        rows = self._storage.query.find("SERIES", {"StudyInstanceUID": study})
        return {str(row["SeriesInstanceUID"]): int(str(row["NumberOfSeriesRelatedInstances"])) for row in rows}

    def _within_limits(self, study: str) -> bool:
        priors = self._settings.priors
        with suppress(StorageError):  # the database may be away for a moment
            held = self._storage.query.held({"StudyInstanceUID": study}, limit=priors.maximum_instances + 1)
            return len(held) <= priors.maximum_instances and sum(one.size for one in held) <= priors.maximum_bytes
        return True


def in_report(told: Mapping[str, Any] | None) -> str:
    """Return in a clause why a retrieval brought nothing to compare with, in words of our own alone; "" where nothing is to be said."""
    if told is None:
        return ""
    if "why" in told:
        return f"earlier studies could not be fetched from {told['peer']}: {told['why']}"
    if not told["found"]:
        return f"{told['peer']} holds none that the route asks for"
    short = [study for study in told["studies"] if study["state"] not in {"fetched", "held", "nothing wanted"}]
    studies = "1 earlier study" if len(short) == 1 else f"{len(short)} earlier studies"
    return f"{studies} could not be fetched whole from {told['peer']}" if short else ""


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
