"""Messages of the Storage Commitment Push Model (PS3.4 J.3): what is asked, what is answered, and their data sets.

Must never decide anything: what a message means is for whoever stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Final, Protocol

from pydicom.dataset import Dataset

from dicomnode.dimse import normalized
from dicomnode.dimse.contexts import STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE
from dicomnode.dimse.scp import is_uid
from dicomnode.errors import (
    CommitmentFailure,
    InvalidArgument,
    NoSuchAction,
    NoSuchClass,
    NoSuchEventType,
    NoSuchInstance,
    NotAuthorized,
    ResourceLimitation,
)

MOST_REFERENCES: Final = 50_000  # in a message, whatever the settings say
_REFERENCED_SOP_INSTANCE_UID: Final = b"\x08\x00\x55\x11"  # its tag, in both transfer syntaxes
REQUEST: Final = 1  # the one action type, Request Storage Commitment
ALL_COMMITTED, FAILURES_EXIST = 1, 2  # the event types

# PS3.3 C.14.1.1 Failure Reason (0008,1197)
PROCESSING_FAILURE, NO_SUCH_INSTANCE, CLASS_INSTANCE_CONFLICT, DUPLICATE_TRANSACTION = 0x0110, 0x0112, 0x0119, 0x0131
FAILURE_REASONS: Final[Mapping[int, str]] = {
    PROCESSING_FAILURE: "processing failure",
    NO_SUCH_INSTANCE: "no such object instance",
    CLASS_INSTANCE_CONFLICT: "class / instance conflict",
    0x0122: "referenced SOP class not supported",
    DUPLICATE_TRANSACTION: "duplicate transaction UID",
    0x0213: "resource limitation",
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An instance that is asked about; `failure` is why it is not committed to (PS3.3 C.14.1.1), None in a request and if it is."""

    sop_class_uid: str
    sop_instance_uid: str
    failure: int | None = None


@dataclass(frozen=True, kw_only=True)
class CommitmentReport:
    """What a peer answered to a request (N-EVENT-REPORT)."""

    ae_title: str  # who says so
    transaction_uid: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a peer asks this node to commit to (N-ACTION)."""

    ae_title: str  # who asks
    transaction_uid: str
    references: tuple[Reference, ...]


class CommitmentService(Protocol):
    """What the messages of peers mean. Each returns when it is noted for good, or raises CommitmentRefused."""

    def report(self, report: CommitmentReport) -> None:
        """Take a peer's answer to what it was asked."""

    def request(self, asked: Asked) -> None:
        """Take a peer's request; it is answered later."""


def failure_in_words(reason: int) -> str:
    """Say a Failure Reason as a person reads it."""
    return f"0x{reason:04X}" + (f" ({FAILURE_REASONS[reason]})" if reason in FAILURE_REASONS else "")


answered = partial(normalized.answered, malformed=InvalidArgument, failed=CommitmentFailure)


def action_information(transaction_uid: str, references: Sequence[Reference]) -> Dataset:
    """The data set of an N-ACTION request (PS3.4 Table J.3-1)."""
    dataset = Dataset()
    dataset.TransactionUID = transaction_uid
    dataset.ReferencedSOPSequence = [_item(reference) for reference in references]
    return dataset


def event_information(transaction_uid: str, references: Sequence[Reference]) -> Dataset:
    """The data set of an N-EVENT-REPORT request (PS3.4 Table J.3-2)."""
    dataset = Dataset()
    dataset.TransactionUID = transaction_uid
    committed = [_item(reference) for reference in references if reference.failure is None]
    failed = [_item(reference) for reference in references if reference.failure is not None]
    if failed:
        dataset.FailedSOPSequence = failed
    if committed:
        dataset.ReferencedSOPSequence = committed
    return dataset


def read_request(event: Any, ae_title: str) -> Asked:
    """Read an N-ACTION request (PS3.4 Table J.3-1), pynetdicom's event, of an AE that is known.

    Raises:
        CommitmentRefused: the message is not one of the class, or malformed; what pydicom raises comes through.
    """
    _check_context(event, event.request.RequestedSOPClassUID, event.request.RequestedSOPInstanceUID)
    if event.action_type != REQUEST:
        raise NoSuchAction(f"there is no action type {event.action_type}")
    _check_size(event.request.ActionInformation)
    dataset = event.action_information
    references = tuple(_references(dataset, "ReferencedSOPSequence"))
    if not references:
        raise InvalidArgument("the request names no instance")
    return Asked(ae_title=ae_title, transaction_uid=_transaction_uid(dataset), references=references)


def read_report(event: Any, ae_title: str) -> CommitmentReport:
    """Read an N-EVENT-REPORT request (PS3.4 Table J.3-2), pynetdicom's event, of an AE that is known.

    Raises:
        CommitmentRefused: the message is not one of the class, or malformed; what pydicom raises comes through.
    """
    _check_context(event, event.request.AffectedSOPClassUID, event.request.AffectedSOPInstanceUID)
    if event.event_type not in {ALL_COMMITTED, FAILURES_EXIST}:
        raise NoSuchEventType(f"there is no event type {event.event_type}")
    _check_size(event.request.EventInformation)
    dataset = event.event_information
    committed = tuple(_references(dataset, "ReferencedSOPSequence"))
    failed = tuple(_references(dataset, "FailedSOPSequence"))
    if event.event_type == ALL_COMMITTED and failed:
        raise InvalidArgument("event type 1 says that there are no failures, and the data set has some")
    return CommitmentReport(ae_title=ae_title, transaction_uid=_transaction_uid(dataset), references=(*committed, *failed))


def _check_context(event: Any, sop_class_uid: str, sop_instance_uid: str) -> None:
    if sop_class_uid != STORAGE_COMMITMENT:
        raise NoSuchClass("only the Storage Commitment Push Model is provided")
    if event.context.abstract_syntax != STORAGE_COMMITMENT:
        raise NotAuthorized("the message came outside a presentation context of its class")
    if sop_instance_uid != STORAGE_COMMITMENT_INSTANCE:
        raise NoSuchInstance("the message is not about the well-known SOP instance")


def _check_size(encoded: BytesIO | None) -> None:
    """Count the references before they are decoded, which takes 0.1 ms for each of them."""
    if encoded is not None and encoded.getvalue().count(_REFERENCED_SOP_INSTANCE_UID) > MOST_REFERENCES:
        raise ResourceLimitation(f"more than {MOST_REFERENCES} instances in a message")


def _transaction_uid(dataset: Dataset) -> str:
    uid = str(dataset.get("TransactionUID") or "")
    if not is_uid(uid):
        raise InvalidArgument("the Transaction UID is absent or malformed")
    return uid


def _references(dataset: Dataset, keyword: str) -> Iterator[Reference]:
    has_failures = keyword == "FailedSOPSequence"
    for item in dataset.get(keyword) or ():
        sop_class, instance = str(item.get("ReferencedSOPClassUID") or ""), str(item.get("ReferencedSOPInstanceUID") or "")
        if not (is_uid(sop_class) and is_uid(instance)):
            raise InvalidArgument("a reference has no well-formed SOP Class and SOP Instance UID")
        failure = int(item.get("FailureReason") or 0x0110) if has_failures else None
        yield Reference(sop_class_uid=sop_class, sop_instance_uid=instance, failure=failure)


def _item(reference: Reference) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class_uid
    item.ReferencedSOPInstanceUID = reference.sop_instance_uid
    if reference.failure is not None:
        item.FailureReason = reference.failure
    return item
