"""The frozen records that storage hands out. Built by storage alone; every other room only reads them.

Times are aware datetimes in UTC. UIDs and AE titles are plain strings, already validated by whoever writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Priority = Literal["stat", "routine"]
JobKind = Literal["analyse", "deliver"]
JobState = Literal["queued", "running", "done", "refused", "failed", "cancelled"]
PackageState = Literal["added", "checked", "enabled"]
DeliveryState = Literal["waiting", "sent", "committed", "failed"]  # sent: all that is awaited of a peer that doesn't commit
CommitmentState = Literal["asking", "waiting", "answered", "unanswered", "refused"]
SegmentationPer = Literal["model", "finding"]
RetrieveBy = Literal["move", "get"]
NoticeKind = Literal["mpps", "ian"]  # Modality Performed Procedure Step, Instance Availability Notification
NoticeState = Literal["in progress", "completed", "discontinued", "available"]
ProcedureState = Literal["SCHEDULED", "IN PROGRESS", "COMPLETED", "CANCELED"]  # PS3.4 CC.1.1
ObjectKind = Literal["image", "other"]  # only images make revisions
STANDARD_OBJECTS = ("seg", "sr")  # what a peer is given of which nothing else is known


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """A file in the object store that is synced and will not change."""

    object_id: str  # 32 hex digits of our own; the path derives from it and from nothing else
    sha256: str  # of the data set: what follows the file meta information
    size: int


@dataclass(frozen=True, kw_only=True)
class InstanceHeader:
    """What the index keeps of a received SOP instance."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    series_instance_uid: str
    study_instance_uid: str
    dataset_sha256: str  # of the data set's bytes as received, without file meta
    kind: ObjectKind
    modality: str
    instance_number: int | None
    patient_id: str
    patient_name: str
    study_date: str
    study_description: str
    accession_number: str
    series_number: int | None
    series_description: str
    requested_priority: Priority  # from Requested Procedure Priority (0040,1003): STAT -> stat
    calling_ae_title: str
    called_ae_title: str
    note: str = ""  # e.g. trailing padding of the pixel data
    study_time: str = ""
    study_id: str = ""
    referring_physician: str = ""
    birth_date: str = ""
    sex: str = ""
    body_part: str = ""
    acquisition_number: int | None = None
    images_in_acquisition: int | None = None  # (0020,1002), of an image with one frame
    orientation: str = ""  # the direction cosines of Image Orientation (Patient), rounded; "" where there is no plane in space
    position: float | None = None  # of Image Position (Patient) along the normal of that plane, in mm


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One stored SOP instance."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    series_instance_uid: str
    study_instance_uid: str
    kind: ObjectKind
    made_here: bool  # a result of this node that came back: stored and linked, never analysed
    instance_number: int | None
    calling_ae_title: str
    called_ae_title: str
    note: str
    received_at: datetime
    stored: StoredObject


@dataclass(frozen=True, kw_only=True)
class Plane:
    """What the index knows of an image's place in its series and acquisition: by that it is seen whether others are absent."""

    series_instance_uid: str
    series_number: int | None
    modality: str
    instance_number: int | None
    acquisition_number: int | None
    images_in_acquisition: int | None
    orientation: str
    position: float | None


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What came of a series of images until now."""

    series_instance_uid: str
    modality: str
    images: int
    last_received_at: datetime


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series with its instance count."""

    series_instance_uid: str
    study_instance_uid: str
    modality: str
    series_number: int | None
    series_description: str
    instances: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """One study as the index sees it now."""

    study_instance_uid: str
    patient_id: str
    patient_name: str
    study_date: str
    study_description: str
    accession_number: str
    instances: int
    revision: int  # the last one; 0 while there is none
    state: Literal["receiving", "closed"]  # receiving: images arrived since the last closed revision
    first_received_at: datetime
    last_received_at: datetime
    released_at: datetime | None  # last release of an association that brought images of it
    holds: bool = True  # false: its objects were removed by the rules of retention, and none has come since
    removed_at: datetime | None = None  # when that happened last
    removed_why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Revision:
    """The n-th stable content of a study: all of it that had come, or some of its series while the others were still coming."""

    study_instance_uid: str
    number: int
    closed_at: datetime
    evidence: str  # why it was held complete, or "incomplete: …"
    outcome: str  # "jobs" or why there are none, e.g. "no route"
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was evident when it was closed; empty before that was kept
    series: tuple[str, ...] | None = None  # UIDs of those it holds, where the study stayed open; None: all that had come

    @property
    def incomplete(self) -> tuple[str, ...]:
        """What spoke against its being complete when it was closed all the same."""
        return tuple(self.facts.get("incomplete", ()))

    @property
    def stays_open(self) -> bool:
        """Whether other series of its study were still coming when it was made."""
        return self.series is not None


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A received object that was not accepted and is kept for the admin (contract 2), or a refusal with nothing kept."""

    id: int
    sop_instance_uid: str
    study_instance_uid: str | None
    calling_ae_title: str
    dimse_status: int
    reason: str
    received_at: datetime
    stored: StoredObject | None
    repeats: int = 0  # how often the same came again


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """What asking a peer for each presentation context found out: it may have changed since, so it is never the last word."""

    probed_at: datetime
    implementation_class_uid: str  # what the peer was then: another one isn't what was probed
    implementation_version_name: str
    refuses: Mapping[str, tuple[str, ...]]  # SOP Class UID: the Transfer Syntax UIDs in which it didn't accept it


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A remote application entity that may send studies here or receive results. Only the registry hands peers out."""

    ae_title: str
    host: str
    port: int
    sends: bool
    receives: bool
    tls: bool
    client_cert: str | None  # sha256 (hex) of the DER certificate that it must show; None: any that the site's CA signed
    networks: tuple[str, ...] = ()  # where it may connect from, in CIDR notation; empty: the addresses of `host`
    user: str | None = None  # the user name it must give (PS3.7 D.3.3.7); None: none is asked for
    passcode_hash: str | None = None
    objects: tuple[str, ...] = STANDARD_OBJECTS  # its display profile: the kinds of result objects that it is given
    commits: bool = False  # is asked to commit to what it received, and may answer that on an association of its own
    seg_per: SegmentationPer = "model"  # one segmentation with all findings of a model, or one for each finding
    empty_frames: bool = False  # whether segmentations hold frames without a finding, too: one for each image
    queries: bool = True  # may ask what the node holds, and fetch it
    stow_url: str | None = None  # its DICOMweb, where results go by STOW-RS instead of C-STORE
    stow_credentials: str | None = None  # path of a file with what it is shown there; its content is never kept
    quirks: Quirks | None = None  # None: it was never probed, or its address is another one since
    retrieve_by: RetrieveBy | None = None  # how it is asked for what it holds; None: by C-MOVE where it offers that, else by C-GET


@dataclass(frozen=True, kw_only=True)
class PriorRule:
    """Which earlier studies of a patient are fetched from a peer, to be compared with a new one."""

    ae_title: str  # the peer, which knows this node's AE title as a move destination
    count: int = 1  # the newest so many
    days: int = 1095  # not older than this, by Study Date
    modalities: tuple[str, ...] = ()  # of theirs; empty: those of the new study
    body_parts: tuple[str, ...] = ()  # of their series, where these say one; empty: any


@dataclass(frozen=True, kw_only=True)
class MissingImages:
    """What a peer was asked for of the images of a revision to be that did not come."""

    peer: str
    tries: int
    instances: int  # that the last try asked for
    arrived: int  # by all tries
    reason: str | None  # why the last try didn't bring all
    asked_at: datetime


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which studies go to which package, and who gets the results. "*" matches every AE title."""

    name: str
    from_ae_title: str
    called_ae_title: str
    package: str
    version: str | None  # None: the enabled one
    to_ae_titles: tuple[str, ...]
    priority: Priority | None
    quiet_seconds: float
    report_refusals: bool  # send an SR "not analysed: reason" when the package refuses the study
    objects: tuple[str, ...] | None = None  # what its peers are given of this package, in place of their display profiles
    early: bool = False  # a study closes before its quiet period is over where it is proven complete
    longest_wait_seconds: float | None = None  # after the quiet period, for images that are evidently absent; None: four quiet periods
    completeness_peer: str | None = None  # who is asked (C-FIND) what it holds of a study
    priors: PriorRule | None = None  # earlier studies that are fetched before a comparison
    # The package starts on series that are evidently complete and have been quiet for so long, while others come; None: on the study
    first_series_seconds: float | None = None
    fetch_missing: bool = False  # images that the completeness peer holds and that did not come are fetched from it


@dataclass(frozen=True, kw_only=True)
class PackageRecord:
    """A model package that the node keeps: its digest is what was consented to."""

    name: str
    version: str
    digest: str
    state: PackageState
    check: dict[str, Any] | None  # what `package check` reported
    added_at: datetime


@dataclass(frozen=True, kw_only=True)
class Job:
    """One unit of work: (kind, study, revision, package, run[, peer])."""

    key: str
    kind: JobKind
    study_instance_uid: str
    revision: int
    package: str
    version: str
    digest: str
    run: int
    peer: str | None  # deliver only
    to_ae_titles: tuple[str, ...]  # analyse only: who gets the results
    report_refusals: bool
    priority: Priority
    state: JobState
    attempts: int
    reason_code: str | None
    reason: str | None
    detail: dict[str, Any]  # analyse: {"findings": [...], "seconds": {...}, "series_instance_uid": ...}
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: float | None = None  # 0..1 while it runs, where its kind can tell
    objects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # AE title: what a route gives it in place of its profile
    waiting_since: datetime | None = None  # while it waits for its next try
    in_backlog: bool = False  # deliver only: it waits until its peer can be reached

    @property
    def carried_from(self) -> str | None:
        """The key of the job whose results stand for this one, which computed nothing; analyse only."""
        origin: str | None = self.detail.get("carried_over", {}).get("job")
        return origin


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """A Unified Procedure Step (PS3.4 annex CC): an analysis that a route or a peer asked for."""

    uid: str
    study_instance_uid: str
    requester: str | None  # AE title of the peer that asked for it; None: a route
    package: str
    version: str | None  # None: the one that is enabled when it begins
    priority: Priority
    to_ae_titles: tuple[str, ...]  # who gets the results; while it waits by its requester's word, empty: by the routes' word
    label: str
    worklist_label: str
    scheduled_at: datetime
    created_at: datetime
    requested: Mapping[str, Any]  # in the DICOM JSON Model, what its requester said of it
    patient: Mapping[str, str]  # PatientName, PatientID, PatientBirthDate, PatientSex, AccessionNumber
    requested_procedure_id: str = ""
    state: ProcedureState = "SCHEDULED"
    job_key: str | None = None  # None: it waits for the next revision of its study
    parted: bool = False  # it ended otherwise than its job, which goes on as another work item
    revision: int | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: JobState | None = None  # of its job, or its own end without one
    reason_code: str | None = None
    reason: str | None = None
    progress: float | None = None  # 0..1 while it runs
    cancel: Mapping[str, Any] | None = None  # the last request to cancel it
    changed_at: datetime | None = None
    held: bool = False  # whether the node holds objects of its study


@dataclass(frozen=True, kw_only=True)
class Subscription:
    """What a subscriber is told of (PS3.4 CC.2.3)."""

    target: str  # UID of a work item, or the well-known one of all, or of those that match
    keys: Mapping[str, str]  # what they match
    wanted: bool  # false: it is told nothing of this work item, whatever else it has subscribed to
    created_at: datetime
    suspended_at: datetime | None  # what was created later isn't told
    told_until: datetime | None  # None: nothing was told yet


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result object made by this node, stored before it is sent."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    modality: str
    study_instance_uid: str
    job_key: str
    stored: StoredObject
    created_at: datetime
    series_instance_uid: str | None = None  # None: made before it was kept
    series_number: int | None = None
    series_description: str | None = None
    instance_number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One result object on its way to one peer."""

    sop_instance_uid: str
    peer: str
    job_key: str  # of the deliver job
    state: DeliveryState
    attempts: int
    status: int | None  # last DIMSE status
    error: str | None
    next_at: datetime | None
    sent_at: datetime | None
    transaction_uid: str | None = None  # under which the peer was last asked to commit to it
    refusals: int = 0  # how often the peer answered that it doesn't hold it
    committed_at: datetime | None = None
    ways: tuple[tuple[str, tuple[str, ...]], ...] = ()  # itself and its alternatives, the best first, with what each refers to
    sent_as: str | None = None  # what the peer has in its place, by its SOP Instance UID; None: itself
    sent_class: str | None = None  # and its SOP Class UID
    note: str | None = None  # what was sent in its place or remarked by the peer, and why

    @property
    def at_peer(self) -> str:
        """The SOP Instance UID under which the peer knows it."""
        return self.sent_as or self.sop_instance_uid


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """What waits for a peer that could not be reached."""

    peer: str
    ticket: str
    since: datetime
    tries: int  # in vain, running
    next_at: datetime | None  # when the peer is tried again; None: it is back, and what waits is sent
    probe: str | None  # key of the one job that may try the peer meanwhile
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Commitment:
    """One request to a peer to commit to the results of a deliver job that it received (PS3.4 J.3)."""

    transaction_uid: str
    peer: str
    job_key: str
    state: CommitmentState  # asking: it hasn't acknowledged the request yet; waiting: it has, and its report is awaited
    asked_at: datetime
    due_at: datetime | None  # when it counts as unanswered
    answered_at: datetime | None
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a modality or an archive announced about a study: a performed procedure step, or available instances."""

    sop_instance_uid: str
    study_instance_uid: str
    kind: NoticeKind
    ae_title: str  # who said so
    state: NoticeState
    images: Mapping[str, tuple[str, ...]]  # SOP Instance UIDs of those that it names, by Series Instance UID
    created_at: datetime
    changed_at: datetime


@dataclass(frozen=True, kw_only=True)
class CommitmentRequest:
    """One request of a peer that this node commit to instances it received (PS3.4 J.3)."""

    key: str
    peer: str
    transaction_uid: str
    digest: str  # of the references
    instances: int  # how many references it had
    references: tuple[tuple[str, str], ...]  # SOP Class and SOP Instance UID; none once it is reported
    failures: tuple[tuple[str, int], ...] | None  # SOP Instance UID and Failure Reason (PS3.3 C.14.1.1); None: not looked at yet
    state: Literal["waiting", "reported", "failed"]  # failed: the report was given up
    attempts: int
    reason: str | None
    asked_at: datetime
    ended_at: datetime | None
