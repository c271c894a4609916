"""Messages of Modality Performed Procedure Step (PS3.4 F.7) and Instance Availability Notification (PS3.4 R), for their SCP.

Must never decide anything: what a message means for a study is for whoever looks at its evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, Final, Literal, Protocol

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from dicomnode.dimse.contexts import INSTANCE_AVAILABILITY, PERFORMED_PROCEDURE_STEP, storage_class
from dicomnode.dimse.normalized import SUCCESS, answered
from dicomnode.dimse.scp import is_uid
from dicomnode.errors import (
    AttributeMissing,
    AttributeValueInvalid,
    AttributeValueMissing,
    NoSuchPerformedClass,
    NoticeFailure,
    NoticeNotAuthorized,
    NoticeTooLarge,
)

MOST_REFERENCES: Final = 50_000  # in a message
_REFERENCED_SOP_INSTANCE_UID: Final = b"\x08\x00\x55\x11"  # its tag, in both transfer syntaxes

StepState = Literal["in progress", "completed", "discontinued"]
_STATES: Final[Mapping[str, StepState]] = {
    "IN PROGRESS": "in progress", "COMPLETED": "completed", "DISCONTINUED": "discontinued",
}  # fmt: skip
_AVAILABLE: Final = {"ONLINE": True, "NEARLINE": True, "OFFLINE": True, "UNAVAILABLE": False}  # PS3.3 C.4.23.1.1


@dataclass(frozen=True, kw_only=True)
class Announced:
    """What a peer announces about studies: that a step has begun (MPPS), or that instances are available (IAN)."""

    kind: Literal["mpps", "ian"]
    ae_title: str  # who says so
    sop_instance_uid: str
    studies: tuple[str, ...]
    images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # images that it names, by Series Instance UID


@dataclass(frozen=True, kw_only=True)
class StepChange:
    """What a peer changes of a performed procedure step."""

    ae_title: str
    sop_instance_uid: str
    state: StepState | None  # None: as it was
    images: Mapping[str, tuple[str, ...]] | None  # None: as they were


class NoticeService(Protocol):
    """What the messages of peers mean. Each returns when it is noted for good, or raises NoticeRefused."""

    def announce(self, announced: Announced) -> None:
        """Take what a peer announces."""

    def change(self, change: StepChange) -> None:
        """Take what a peer changes of a step."""


def created(event: Any, ae_title: str, take: Callable[[Announced], None]) -> tuple[Dataset, Dataset | None]:
    """Answer an N-CREATE request, pynetdicom's event: the status, and the attributes that the node gave."""
    given = str(event.request.AffectedSOPInstanceUID or "")
    uid = given or str(generate_uid())  # PS3.7 10.1.5.1.4: whoever makes the instance names it where the request doesn't
    status = _answered(lambda: _read_creation(event, ae_title, uid), take)
    attributes = Dataset()
    if not given and status.Status == SUCCESS:
        attributes.AffectedSOPInstanceUID = uid
    return status, attributes if len(attributes) else None


def changed(event: Any, ae_title: str, take: Callable[[StepChange], None]) -> tuple[Dataset, None]:
    """Answer an N-SET request, pynetdicom's event."""
    return _answered(lambda: _read_change(event, ae_title), take), None


_answered = partial(answered, malformed=AttributeValueInvalid, failed=NoticeFailure)


def _read_creation(event: Any, ae_title: str, uid: str) -> Announced:
    sop_class = str(event.request.AffectedSOPClassUID)
    _check_context(event, sop_class)
    if not is_uid(uid):
        raise AttributeValueInvalid("the SOP Instance UID is malformed")
    _check_size(event.request.AttributeList)
    dataset = event.attribute_list
    if sop_class == INSTANCE_AVAILABILITY:
        study = _uid_of(dataset, "StudyInstanceUID")
        series = _items(dataset, "ReferencedSeriesSequence")
        if not series:
            raise AttributeValueMissing("the notification names no series")
        images = _images(series, "ReferencedSOPSequence")
        return Announced(kind="ian", ae_title=ae_title, sop_instance_uid=uid, studies=(study,), images=images)
    if _state_of(dataset) != "in progress":
        raise AttributeValueInvalid("a step is created IN PROGRESS")
    steps = _items(dataset, "ScheduledStepAttributesSequence")
    if not steps:
        raise AttributeValueMissing("Scheduled Step Attributes Sequence has no item")
    studies = tuple(dict.fromkeys(_uid_of(step, "StudyInstanceUID") for step in steps))
    images = _images(dataset.get("PerformedSeriesSequence") or (), "ReferencedImageSequence")
    return Announced(kind="mpps", ae_title=ae_title, sop_instance_uid=uid, studies=studies, images=images)


def _read_change(event: Any, ae_title: str) -> StepChange:
    _check_context(event, str(event.request.RequestedSOPClassUID))
    _check_size(event.request.ModificationList)
    dataset = event.modification_list
    state = _state_of(dataset) if "PerformedProcedureStepStatus" in dataset else None
    images = None
    if "PerformedSeriesSequence" in dataset:
        images = _images(dataset.PerformedSeriesSequence or (), "ReferencedImageSequence")
    return StepChange(ae_title=ae_title, sop_instance_uid=str(event.request.RequestedSOPInstanceUID), state=state, images=images)


def _check_context(event: Any, sop_class_uid: str) -> None:
    if sop_class_uid not in {PERFORMED_PROCEDURE_STEP, INSTANCE_AVAILABILITY}:
        raise NoSuchPerformedClass("the node doesn't provide this class")
    if event.context.abstract_syntax != sop_class_uid:
        raise NoticeNotAuthorized("the message came outside a presentation context of its class")


def _check_size(encoded: BytesIO | None) -> None:
    """Count the references before they are decoded, which takes 0.1 ms for each of them."""
    if encoded is None:
        raise AttributeMissing("the request has no data set")
    if encoded.getvalue().count(_REFERENCED_SOP_INSTANCE_UID) > MOST_REFERENCES:
        raise NoticeTooLarge(f"more than {MOST_REFERENCES} instances in a message")


def _state_of(dataset: Dataset) -> StepState:
    if "PerformedProcedureStepStatus" not in dataset:
        raise AttributeMissing("Performed Procedure Step Status is absent")
    value = str(dataset.PerformedProcedureStepStatus or "")
    if not value:
        raise AttributeValueMissing("Performed Procedure Step Status has no value")
    if value not in _STATES:
        raise AttributeValueInvalid("Performed Procedure Step Status is none of the three")
    return _STATES[value]


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    if keyword not in dataset:
        raise AttributeMissing(f"{keyword} is absent")
    return list(dataset.get(keyword) or ())


def _uid_of(dataset: Dataset, keyword: str) -> str:
    if keyword not in dataset:
        raise AttributeMissing(f"{keyword} is absent")
    value = str(dataset.get(keyword) or "")
    if not value:
        raise AttributeValueMissing(f"{keyword} has no value")
    if not is_uid(value):
        raise AttributeValueInvalid(f"{keyword} is malformed")
    return value


def _images(series: Iterable[Dataset], keyword: str) -> dict[str, tuple[str, ...]]:
    """The images that items of a sequence of series name: of classes that the node stores as images, and not said to be unavailable."""
    found: dict[str, dict[str, None]] = {}
    for item in series:
        mine = found.setdefault(_uid_of(item, "SeriesInstanceUID"), {})
        for reference in item.get(keyword) or ():
            known = storage_class(_uid_of(reference, "ReferencedSOPClassUID"))
            uid = _uid_of(reference, "ReferencedSOPInstanceUID")
            if known is not None and known.kind == "image" and _AVAILABLE.get(str(reference.get("InstanceAvailability") or "ONLINE"), True):
                mine[uid] = None
    return {uid: tuple(images) for uid, images in found.items()}
