"""Each failure the node names: what the peer is told (DIMSE status) and whether trying again can help.

Must never import another room. `transient` is for the engine: it alone retries.
"""

from __future__ import annotations


class NodeError(Exception):
    """A failure with a documented answer. The message is one sentence for the person who reads it."""

    dimse_status: int = 0xC001  # PS3.4 B.2.3: Cannot understand
    transient: bool = False


class UsageError(NodeError):
    """Wrong use or input on the command line or in a file: one sentence, exit code 2."""


class ConfigError(UsageError):
    """The configuration has mistakes; the message names all of them at once."""


class StoreRefused(NodeError):
    """A C-STORE request is answered with a failure status; `dimse_status` and the message become status and Error Comment."""

    study_instance_uid: str | None = None  # as far as it could be read, so that the refusal is seen with its study


class OutOfResources(StoreRefused):
    """The disk is below its reserve, or the database cannot take a row: nothing is stored now, sending again later can work."""

    dimse_status = 0xA700  # PS3.4 B.2.3 Refused: Out of Resources
    transient = True


class DataSetDoesNotMatchSOPClass(StoreRefused):
    """Command set and data set disagree on SOP Class or SOP Instance UID, or the SOP class is not the negotiated one."""

    dimse_status = 0xA900  # PS3.4 B.2.3 Error: Data Set does not match SOP Class


class CannotUnderstand(StoreRefused):
    """The data set cannot be read to its end in the negotiated transfer syntax, or a mandatory UID is missing or malformed."""

    dimse_status = 0xC001


class OtherStudy(CannotUnderstand):
    """The instance belongs to another study than the one that it was sent to by STOW-RS, or that was asked for by C-GET."""

    dimse_status = 0xC005


class OtherPatient(CannotUnderstand):
    """The instance is of another patient than the one whose images were asked for by C-GET."""

    dimse_status = 0xC006


class PixelDataTooShort(StoreRefused):
    """The pixel data is shorter than its header says, or the fragment structure of encapsulated data is broken."""

    dimse_status = 0xC002


class ContentConflict(StoreRefused):
    """The SOP Instance UID is already stored with other content: the first stays, the second is quarantined."""

    dimse_status = 0xC003


class ProcessingFailure(StoreRefused):
    """The node itself failed while it stored the object; nothing was kept and the cause is in the log."""

    dimse_status = 0xC004
    transient = True


class MessageRefused(NodeError):
    """A message of a normalized service (PS3.7 10) is answered with a failure status (PS3.7 C)."""

    dimse_status = 0x0110
    error_id: int | None = None  # (0000,0903)
    about = "message"  # in the log


class CommitmentRefused(MessageRefused):
    """A message of the Storage Commitment Push Model (PS3.4 J.3) is answered with a failure status."""

    about = "storage commitment"


class CommitmentFailure(CommitmentRefused):
    """The node itself failed, e.g. its database is away; nothing was noted and the cause is in the log."""

    dimse_status = 0x0110  # PS3.7 C.5.14 Processing failure
    transient = True


class NoSuchInstance(CommitmentRefused):
    """The message is not about the one well-known SOP Instance of the class."""

    dimse_status = 0x0112  # PS3.7 C.5.8 No such SOP Instance


class NoSuchEventType(CommitmentRefused):
    """The event type is neither 1 (all committed) nor 2 (failures exist)."""

    dimse_status = 0x0113  # PS3.7 C.5.9 No such event type


class InvalidArgument(CommitmentRefused):
    """The data set is malformed, or lacks what it must have; or nothing was asked of this AE under this Transaction UID."""

    dimse_status = 0x0115  # PS3.7 C.5.3 Invalid argument value


class NoSuchClass(CommitmentRefused):
    """The message is of a SOP class that the node does not provide."""

    dimse_status = 0x0118  # PS3.7 C.5.7 No such SOP Class


class NoSuchAction(CommitmentRefused):
    """The action type is not 1 (Request Storage Commitment)."""

    dimse_status = 0x0123  # PS3.7 C.5.6 No such action


class NotAuthorized(CommitmentRefused):
    """The caller may not send this message: it is not registered for it, or sends it outside a context of the class."""

    dimse_status = 0x0124  # PS3.7 C.5.22 Refused: Not authorized


class ResourceLimitation(CommitmentRefused):
    """The request names more instances than a request may, or too many requests of its peer wait to be answered."""

    dimse_status = 0x0213  # PS3.7 C.5.19 Resource limitation


class NoticeRefused(MessageRefused):
    """A message of MPPS (PS3.4 F.7) or of instance availability (PS3.4 R) is answered with a failure status."""

    about = "announcement"


class AttributeValueInvalid(NoticeRefused):
    """The data set is malformed, or an attribute has a value that it can't have, e.g. a step that is created COMPLETED."""

    dimse_status = 0x0106  # PS3.7 C.5.12 Invalid attribute value


class StepMayNotBeUpdated(NoticeRefused):
    """Performed Procedure Step Object may no longer be updated: it is COMPLETED or DISCONTINUED (Error ID A710)."""

    dimse_status = 0x0110  # PS3.4 F.7.2.2.2
    error_id = 0xA710


class NoticeFailure(NoticeRefused):
    """The node itself failed, e.g. its database is away; nothing was noted and the cause is in the log."""

    dimse_status = 0x0110  # PS3.7 C.5.14 Processing failure
    transient = True


class DuplicateNotice(NoticeRefused):
    """The SOP Instance UID is in use."""

    dimse_status = 0x0111  # PS3.7 C.5.2 Duplicate SOP Instance


class NoSuchStep(NoticeRefused):
    """There is no performed procedure step with this SOP Instance UID."""

    dimse_status = 0x0112  # PS3.7 C.5.8 No such SOP Instance


class NoSuchPerformedClass(NoticeRefused):
    """The message is of another SOP class than these two."""

    dimse_status = 0x0118  # PS3.7 C.5.7 No such SOP Class


class AttributeMissing(NoticeRefused):
    """An attribute that must be there is absent."""

    dimse_status = 0x0120  # PS3.7 C.5.15 Missing attribute


class AttributeValueMissing(NoticeRefused):
    """An attribute that must have a value or an item has none, e.g. Performed Series Sequence of a step that is COMPLETED."""

    dimse_status = 0x0121  # PS3.7 C.5.16 Missing attribute value


class NoticeNotAuthorized(NoticeRefused):
    """The caller may not send this message: it may not send, the step is another AE's, or it came outside a context of its class."""

    dimse_status = 0x0124  # PS3.7 C.5.22 Refused: Not authorized


class NoticeTooLarge(NoticeRefused):
    """The message names more instances than a message may."""

    dimse_status = 0x0213  # PS3.7 C.5.19 Resource limitation


class QueryRefused(NodeError):
    """A query or retrieval (PS3.4 C.4) is answered with a failure status; the message becomes its Error Comment."""

    dimse_status = 0xC001


class QueryTooBroad(QueryRefused):
    """More entities match than one query is answered with (the first of them were sent), or as many queries run as may at a time."""

    dimse_status = 0xA700  # PS3.4 C.4.1.1.4 Refused: Out of Resources
    transient = True


class RetrievalTooLarge(QueryRefused):
    """More objects match than one retrieval fetches, or as many run as may at a time; nothing was sent."""

    dimse_status = 0xA701  # PS3.4 C.4.2.1.5 Refused: Out of Resources - Unable to calculate number of matches


class RetrievalFailed(QueryRefused):
    """Not one of the objects could be sent."""

    dimse_status = 0xA702  # PS3.4 C.4.2.1.5 Refused: Out of Resources - Unable to perform sub-operations
    transient = True


class DestinationUnknown(QueryRefused):
    """The Move Destination is no peer that is registered to receive."""

    dimse_status = 0xA801  # PS3.4 C.4.2.1.5 Refused: Move Destination unknown


class QueryUnacceptable(QueryRefused):
    """The level is not one of the model, a unique key is absent, or a key has a value that its attribute can't be matched with."""

    dimse_status = 0xA900  # PS3.4 C.4.1.1.4 Error: Identifier does not match SOP Class


class QueryNotUnderstood(QueryRefused):
    """The identifier cannot be read to its end, or has too many elements."""

    dimse_status = 0xC001  # PS3.4 C.4.1.1.4 Failed: Unable to process


class QueryFailure(QueryRefused):
    """The node itself failed, e.g. its database is away; the cause is in the log."""

    dimse_status = 0xC002
    transient = True


class PackageError(UsageError):
    """A model package cannot be used: malformed manifest, wrong digest, unsafe weights, or not checked."""


class TrainingFailed(NodeError):
    """A training can't go on, e.g. because too many of its steps gave no finite numbers."""


class AnalysisFailed(NodeError):
    """The analysis of an eligible study failed, e.g. an image could not be decoded or the model gave no usable output."""


class ProofFailed(NodeError):
    """A result object, decoded independently, doesn't agree with the findings: it is withheld."""


class PeerUnavailable(NodeError):
    """The peer did not accept the association, or broke it, or answered a transient status: sending again later can work."""

    transient = True


class PeerRefused(NodeError):
    """The peer answered with a permanent failure for an object: a person must look."""


class RetrievalNotOffered(PeerRefused):
    """The peer takes no retrieval of this kind, or doesn't know where to send what is retrieved: another kind can work."""
