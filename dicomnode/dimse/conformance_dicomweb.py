"""The part of the conformance statement on DICOMweb (PS3.18): what the web role answers, and how results are sent by STOW-RS.

Must never state what a test of the web role doesn't hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from dicomnode.config import WebSection

SERVICES = (
    ("Search", "`/studies`, `/series`, `/instances` and those of a study or a series", "application/dicom+json"),
    ("Retrieve", "study, series, instance", "multipart/related of application/dicom; an instance as application/dicom, too"),
    ("Retrieve metadata", "`…/metadata` of study, series, instance", "application/dicom+json"),
    ("Retrieve frames", "`…/frames/1,2`", "octets, or the media type of the stored transfer syntax, as it is stored"),
    ("Retrieve bulk data", "`…/bulkdata/…`, as metadata name it", "application/octet-stream, alone or in parts"),
    ("Store", "POST to `/studies` and `/studies/{study}`", "multipart/related of application/dicom; the answer is application/dicom+json"),
)
WORKLIST = (
    ("Search", "GET `/workitems`", "200, 204 without matches, 206 with the first of more, 400"),
    ("Retrieve", "GET `/workitems/{workitem}`", "200, 400, 404"),
    ("Create", "POST `/workitems?{workitem}`", "201, 400, 409 where the UID is in use, 413, 415"),
    ("Request Cancellation", "POST `/workitems/{workitem}/cancelrequest`", "202, 400, 404, 409 where it is COMPLETED"),
    (
        "Change State",
        "PUT `/workitems/{workitem}/state`",
        "refused: 403 while it is SCHEDULED, else 409; 200 where it has ended so already; 400, 404",
    ),
)
STATES = (
    ("SCHEDULED", "the job waits for an analyser, or the work item for its study: Input Readiness State is READY or UNREADY"),
    ("IN PROGRESS", "the job runs, or waits for its next try"),
    ("COMPLETED", "the job is done and its results can be retrieved; whether they were sent is no part of it"),
    (
        "CANCELED",
        "the job was refused (110522, DCM), failed (110501, DCM), each with a second code (99DICOMNODE), or cancelled (110513, DCM)",
    ),
)
EVENTS = (
    ("1, UPS State Report", "when the state or Input Readiness State is another one"),
    ("2, UPS Cancel Requested", "when a work item that had begun was cancelled as a peer asked"),
    ("3, UPS Progress Report", "when the share of the analysis that is done is another one"),
    ("5, UPS Assigned", "with the first report of a SCHEDULED work item"),
)
ASKED = (
    ("Study Instance UID, else that of the Input Information, else of the Referenced Request", "one study, all of whose series count"),
    ("Scheduled Workitem Code of scheme 99DICOMNODE, or the processing parameter (111001, DCM) as TEXT", "the name of an enabled package"),
    ("the processing parameter (111003, DCM) as TEXT", "its version; without it the one that is enabled when the work begins"),
    ("Scheduled Station Name Code", "if it is there, one of the node's AE titles, in any scheme"),
    ("Scheduled Procedure Step Priority", "HIGH is urgent, MEDIUM and LOW are routine and shown as MEDIUM"),
    ("Output Destination, DICOM Storage", "AE titles of peers that receive results; without it those that routes name for the package"),
    ("Patient ID", "compared with the study's: the work item ends CANCELED if both are there and differ"),
    ("Start Date Time, Expiration Date Time, Input Readiness State", "shown again and not waited for"),
)
FAILURES = (
    ("0122", "the SOP class is none of those below"),
    ("C122", "the transfer syntax is none of those below"),
    ("C005", "the instance is of another study than the one that it was sent to"),
    ("any status of the Storage SCP", "as there"),
)
OUTCOMES = (
    ("200 or 202, and the object stands in Referenced SOP Sequence", "sent"),
    ("a failure reason: A700 to A7FF, 0110", "sent again later"),
    ("0122, A900 to A9FF, C000 to CFFF, 409, 415", "the next simpler form is sent; after the last: failed"),
    ("any other failure reason", "failed: a person must look"),
    ("408, 425, 500; no answer", "sent again later"),
    ("401, 403, 407, 429, 502, 503, 504; no connection", "sent again later, and no other object until then"),
    ("any other, redirects among them", "failed: a person must look"),
)


def dicomweb_lines(web: WebSection, table: Callable[[tuple[str, ...], Iterable[tuple[str, ...]]], Iterator[str]]) -> Iterator[str]:
    """Give the lines of the section; `table` makes those of a table."""
    state = "runs with `dicomnode serve`" if web.enabled else "is not run by `dicomnode serve` (`web.enabled`)"
    yield "## DICOMweb: origin server"
    yield f"The web role {state}; `dicomnode run web` runs it in any case. Its addresses begin with `/dicom-web`."
    yield from table(("Transaction", "Resource", "Media type"), SERVICES)
    yield "Objects and frames are given as they are stored: nothing is decoded, rendered or transcoded, but for objects in Implicit VR"
    yield "Little Endian or deflated, which are given in Explicit VR Little Endian where that is asked for or nothing is named. Where no"
    yield "transfer syntax is named, what is stored compressed is given in its own. 206 is answered without what can't be given, 410 for"
    yield "what the node no longer holds, 406 for what is not accepted."
    yield "Searches match and return what C-FIND does. Keys that are not matched, fuzzy matching and unknown fields are named in a"
    yield f"Warning header. One answer has up to {web.maximum_matches} matches."
    yield "An instance that is stored takes the way of C-STORE, with the same checks. Its calling AE title is that of the peer."
    yield from table(("Failure Reason (0008,1197)", "When"), FAILURES)
    yield from _worklist_lines(table)
    yield "Callers are registered peers by HTTP Basic authentication or by certificate; without either only who is on the same machine."
    yield "## DICOMweb: user agent"
    yield "Results go by STOW-RS to peers that are registered with `--stow`: a request for each object, as it is stored. What is refused by"
    yield "its form (Failure Reason 0122, A9xx or Cxxx; 409, 415) is sent as the next simpler one that says the same (native pixels,"
    yield "Comprehensive SR, a BINARY segmentation), but never in Implicit VR. An object counts as sent when the answer names it as stored;"
    yield "with `--commits` it is looked for by QIDO-RS then, and is done when that shows it: proof of receipt, which promises nothing."
    yield from table(("Answer", "Outcome"), OUTCOMES)


def _worklist_lines(table: Callable[[tuple[str, ...], Iterable[tuple[str, ...]]], Iterator[str]]) -> Iterator[str]:
    yield "### Worklist service (UPS-RS, PS3.18 chapter 11)"
    yield "Each analysis is a Unified Procedure Step, whether a route or a peer asked for it; the node performs all of them itself."
    yield "Work items are given and taken as application/dicom+json. Update Workitem is not offered (405). Work items are never deleted, so"
    yield "there is no 410, and a Deletion Lock is not granted. What is refused says why in a Warning header."
    yield from table(("Transaction", "Resource", "Status codes"), WORKLIST)
    yield from table(("Procedure Step State", "When"), STATES)
    yield "A state that is final stays: an analysis that is done again is another work item. A work item that waits is begun when the next"
    yield "revision of its study is closed, and then stands for the job of a route that names its package; of a study that is held and"
    yield "closed it is begun at once. Without a UID in the address or the data set its UID derives from the request, so the same request"
    yield "again is 409."
    yield "Search matches UID, state, priority, labels, Start Date Time, Input Readiness State, package (Scheduled Workitem Code"
    yield "Sequence.Code Value), station, patient, study, accession number and Requested Procedure ID. Input Information and the performed"
    yield "procedure are searched for with `includefield` and always retrieved. Who may query the node may search and retrieve; who may"
    yield "send to it may create and cancel."
    yield from table(("Of what is created", "Meaning"), ASKED)
    yield from table(("Event Type ID", "Sent"), EVENTS)
    yield "Subscriptions outlive a connection. Who connects again is told the present state of what changed since it was told last: a"
    yield "report may come twice, and a state that was passed meanwhile not at all. A new subscription to one work item is told its state;"
    yield "one to many, what changes from then on. Filters go by what doesn't change: all keys of a search but state, priority and Input"
    yield "Readiness State (403). SCP Status Change (4) is not sent. A peer subscribes for its own AE title alone."
