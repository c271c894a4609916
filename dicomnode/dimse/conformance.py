"""The DICOM conformance statement (PS3.2), rendered from the tables and status codes that the node runs on.

Must never state what the code doesn't do: what can be read from a table is read from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dicomnode.config import CommitmentSection, ListenerSection, RetentionSection, Settings, TlsSection
from dicomnode.dimse.commitment import CLASS_INSTANCE_CONFLICT, DUPLICATE_TRANSACTION, NO_SUCH_INSTANCE, PROCESSING_FAILURE
from dicomnode.dimse.commitment_scu import COMMITMENT_TRANSIENT
from dicomnode.dimse.conformance_dicomweb import dicomweb_lines
from dicomnode.dimse.conformance_retrieve import retrieve_lines
from dicomnode.dimse.contexts import (
    DEFLATED,
    EXCLUDED_TRANSFER_SYNTAXES,
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    INSTANCE_AVAILABILITY,
    MAXIMUM_CONTEXTS,
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
    PERFORMED_PROCEDURE_STEP,
    STORAGE_CLASSES,
    STORAGE_COMMITMENT,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    STUDY_ROOT_MOVE,
    VERIFICATION,
    offered_syntaxes,
)
from dicomnode.dimse.encoding import Limits
from dicomnode.dimse.find import ASKING, PENDING, TRANSIENT as QUERY_TRANSIENT
from dicomnode.dimse.guard import IDLE_SECONDS
from dicomnode.dimse.querying import MAXIMUM_MATCHES, MAXIMUM_RETRIEVED
from dicomnode.dimse.scp import CHARACTER_SETS
from dicomnode.dimse.scu import SOP_CLASS_NOT_SUPPORTED, TRANSIENT, WARNINGS
from dicomnode.dimse.tls import SUITES
from dicomnode.errors import CommitmentRefused, NodeError, NoticeRefused, QueryRefused, StoreRefused
from dicomnode.findings import Code
from dicomnode.version import VERSION


def conformance_statement(settings: Settings, private_codes: Sequence[Code] = ()) -> str:
    """Return the conformance statement of a node with these settings as Markdown, without a newline at its end.

    `private_codes` are those that its results use beside public ones; without any the section on them is left out.
    """
    return "\n".join(_lines(settings, private_codes))


def _lines(settings: Settings, private_codes: Sequence[Code]) -> Iterator[str]:
    yield "# DICOM conformance statement"
    yield ""
    yield f"dicomnode {VERSION}. Rendered by `dicomnode conformance` from the tables the node runs on; don't edit it by hand."
    yield "RESEARCH USE ONLY: not for diagnosis."
    yield ""
    yield "The node stores studies that peers send to it, analyses them, and sends the results to peers: to each what its display profile"
    yield "names of Segmentation, Label Map Segmentation (RLE), Comprehensive 3D SR, Comprehensive SR, Secondary Capture, Key Object"
    yield "Selection and Grayscale Softcopy Presentation State. What is received is stored as it came: no transfer syntax is converted, no"
    yield "attribute is coerced."
    yield ""
    yield "## Services"
    yield from _table(
        ("Service", "SOP classes", "SCU", "SCP"),
        [
            ("Verification", f"`{VERIFICATION}`", "yes", "yes"),
            ("Storage", f"the {len(STORAGE_CLASSES)} below", "yes, in the transfer syntax an object is stored in", "yes"),
            ("Storage Commitment Push Model", f"`{STORAGE_COMMITMENT}`", "yes, of peers registered with `--commits`", "yes"),
            ("Modality Performed Procedure Step", f"`{PERFORMED_PROCEDURE_STEP}`", "no", "yes"),
            ("Instance Availability Notification", f"`{INSTANCE_AVAILABILITY}`", "no", "yes"),
            ("Patient Root Query/Retrieve - FIND", f"`{PATIENT_ROOT_FIND}`", "yes", "yes"),
            ("Patient Root Query/Retrieve - MOVE", f"`{PATIENT_ROOT_MOVE}`", "yes", "yes"),
            ("Patient Root Query/Retrieve - GET", f"`{PATIENT_ROOT_GET}`", "yes", "yes"),
            ("Study Root Query/Retrieve - FIND", f"`{STUDY_ROOT_FIND}`", "yes", "yes"),
            ("Study Root Query/Retrieve - MOVE", f"`{STUDY_ROOT_MOVE}`", "yes", "yes"),
            ("Study Root Query/Retrieve - GET", f"`{STUDY_ROOT_GET}`", "yes", "yes"),
        ],
    )
    yield from _associations(settings)
    yield from _limits(settings.listener)
    yield from _security(settings.tls)
    yield from _checks(settings.listener)
    yield from _statuses()
    yield from _commitment(settings)
    yield from _announcements()
    yield from _queries(settings.listener)
    yield from _query_scu()
    yield from retrieve_lines(settings, _table)
    yield from dicomweb_lines(settings.web, _table)
    yield from _tables(settings.listener)
    if private_codes:
        yield "## Private codes"
        yield "What no coding scheme of PS3.16 was found to have a code for is named by one of a private scheme (PS3.16 8.2): in the SR,"
        yield "numeric content items with units of UCUM. All other codes are public; those of findings come with the model packages."
        yield from _codes(private_codes)
    yield "## Character sets"
    yield "Names, IDs, accession number and descriptions are decoded by Specific Character Set (0008,0005), ISO 2022 extensions"
    yield "included, for the node's own lists and for queries; what can't be decoded shows as U+FFFD. The stored object is not changed."
    yield f"Known are {', '.join(f'`{term}`' for term in sorted(CHARACTER_SETS) if term)}."


def _associations(settings: Settings) -> Iterator[str]:
    yield "## Associations"
    yield from _table(
        ("", ""),
        [
            ("Application context", "`1.2.840.10008.3.1.1.1`"),
            ("Implementation Class UID", f"`{IMPLEMENTATION_CLASS_UID}`"),
            ("Implementation Version Name", f"`{IMPLEMENTATION_VERSION_NAME}`"),
            ("AE titles", f"{', '.join(f'`{title}`' for title in settings.node.ae_titles)} (`node.ae_title`, `node.more_ae_titles`)"),
            ("TCP port", f"{settings.listener.port} (`listener.port`)"),
            ("TCP port of DICOM over TLS", _tls_port(settings.tls)),
            ("Asynchronous operations", "one at a time"),
            ("Extended negotiation", "not used"),
            ("Role selection", "for storage commitment: who reports proposes itself as SCP of the class; for C-GET: of what is fetched"),
            ("User identity", "as acceptor: types 1 and 2, for peers that are registered with a user name; no positive response is sent"),
        ],
    )
    yield "**As acceptor.** Who is let in calls this node by one of its AE titles and matches one registered peer that may send in all that"
    yield "is known of it: calling AE title, network, way (TLS or not), certificate, user identity. Everybody else gets the same"
    yield "A-ASSOCIATE-RJ: rejected permanent, DICOM UL service user, no reason given. The registry is asked at every association. Without"
    yield "TLS the calling AE title is a name and not a proof: keep that port inside the hospital's network."
    yield "A peer that doesn't send gets no Storage context in which it is the SCU; one that may not query (`--no-queries`) gets no"
    yield "Query/Retrieve context."
    yield "Every proposed context of the classes below is accepted with the first transfer syntax that the peer names and this"
    yield "statement lists."
    yield ""
    yield "**As requestor.** One association proposes exactly the pairs of SOP class and transfer syntax of the objects it sends, and of"
    yield f"what it sends in their place (more than one association only above {MAXIMUM_CONTEXTS} pairs). An object goes as it is stored."
    yield "Where a peer doesn't accept that, a result goes natively in Explicit or Implicit VR Little Endian, a Comprehensive 3D SR as"
    yield "Comprehensive SR, a Label Map Segmentation as BINARY Segmentation with the report that refers to it, and otherwise not at all."
    yield "A peer that is registered with TLS is called over TLS alone; its certificate must be the"
    yield "registered one, or name the host that it is called at, and in either case be signed by the site's certification authority."
    yield ""


def _limits(listener: ListenerSection) -> Iterator[str]:
    yield "## Limits of the acceptor"
    yield "Counts hold for each listener process. More associations than these are rejected transient, local limit exceeded, unless"
    yield f"one has been idle for {IDLE_SECONDS:g} s: the longest idle is aborted for the new one. An association above another limit, or"
    yield "too slow, is aborted (A-ABORT by the service provider). A connection without an association request in time is closed, and at"
    yield "the limits on those the oldest. A data set that nests too deep or inflates to too much is refused with C001."
    yield from _table(("Setting", "Value", "Meaning"), _setting_rows("listener", listener, without=frozenset({"host", "port"})))


def _security(tls: TlsSection) -> Iterator[str]:
    yield "## Security"
    yield "DICOM over TLS follows PS3.15 B.12 (BCP 195) in both directions: TLS 1.2 and 1.3, no compression, no renegotiation; as acceptor"
    yield "no session tickets. Each side shows a certificate that the site's certification authority signed. The cipher suites of TLS 1.2"
    yield f"are {', '.join(f'`{suite}`' for suite in SUITES)}."
    yield "Changed certificate files hold from the next connection on; associations that run go on. There is no fallback, neither to"
    yield "older versions nor to plain DICOM."
    yield from _table(("Setting", "Value", "Meaning"), _setting_rows("tls", tls, without=frozenset()))
    yield "A peer that is registered with a user name must give it in user identity negotiation (PS3.7 D.3.3.7): by type 1, or with its"
    yield "passcode by type 2. Kerberos, SAML and JWT (types 3 to 5) count as no identity. Passcodes are kept as scrypt hashes; on the wire"
    yield "they are readable unless the peer comes by TLS."
    yield ""


def _checks(listener: ListenerSection) -> Iterator[str]:
    yield "## Storage SCP: checks before Success"
    yield "Command, presentation context and data set name the same SOP class and instance. The data set can be read to its last byte in"
    yield "the negotiated transfer syntax. Study, Series and SOP Instance UID are well-formed. Native pixel data is at least as long as"
    yield "its header says; encapsulated pixel data is whole. Refused are, too, elements of odd length (but for native pixel data without"
    yield f"its padding byte), a second pixel data element, more than {listener.maximum_nesting} sequences inside each other, and more than"
    yield f"{Limits().maximum_elements:,} elements, items and fragments."
    yield "A deflated data set is checked as what it inflates to, and stored as it came. The preamble of a stored file is 128 zero bytes,"
    yield "its file meta information the node's own."
    yield ""


def _statuses() -> Iterator[str]:
    yield "## Storage SCP: statuses"
    yield "Success is answered after the object is on disk with its folder and row synced. The same SOP Instance UID with the same data"
    yield "set in the same transfer syntax is Success again. A failure carries an Error Comment (0000,0902) without patient data."
    yield from _table(("Status", "Meaning", "Sending again"), _scp_statuses())
    yield "## Storage SCU: what is made of a peer's status"
    yield from _table(
        ("Status", "Outcome"),
        [
            ("0000", "sent"),
            (_ranges(WARNINGS), "sent; the warning is kept with the delivery"),
            (_ranges(TRANSIENT), "sent again later"),
            (f"{SOP_CLASS_NOT_SUPPORTED:04X}", "as a context that is not accepted: what can be sent in its place is"),
            ("no association, or no response", "sent again later"),
            ("any other, or nothing that the peer accepts", "failed: a person must look"),
        ],
    )
    yield "What a peer refused when it was probed (`dicomnode peer echo --probe --save`) is not proposed to it where something else says"
    yield "the same. Where that is out of date, as it names another implementation or takes none of the rest, all is proposed on a next"
    yield "association."


def _commitment(settings: Settings) -> Iterator[str]:
    yield "## Storage commitment: SCU"
    yield "When a peer that is registered with `--commits` has taken all objects of an analysis, it is asked to commit to them (N-ACTION,"
    yield "action type 1), on an association of its own that stays open for a moment for a report on it. Later the report (N-EVENT-REPORT)"
    yield "is taken on an association that the peer opens. An object is committed when a report says so, whichever request it answers and"
    yield "however late. What the first report of the last request names as failed, or doesn't name, is sent and asked for again. Without a"
    yield "report in time the peer is asked again under a new Transaction UID. Tries and waits follow `engine.retry_schedule_seconds`; then"
    yield "the delivery has failed, for a person to look at and to repeat."
    yield from _table(("Setting", "Value", "Meaning"), _setting_rows("commitment", settings.commitment, without=frozenset()))
    yield from _table(
        ("Answer to N-ACTION", "Outcome"),
        [
            ("0000", "the report is awaited"),
            (_ranges(COMMITMENT_TRANSIENT), "asked again later"),
            ("no association, or no response", "asked again later"),
            ("any other, or nothing that the peer accepts", "failed: a person must look"),
        ],
    )
    yield "A report is answered with Success once it is noted, also one that comes twice; other answers stand below."
    yield ""
    yield "## Storage commitment: SCP"
    yield "A peer that may send may ask (N-ACTION, action type 1). The request is noted for good before Success. Then the stored"
    yield "bytes of each instance are read again, and their SHA-256 is compared with that of what was received. The report (N-EVENT-REPORT)"
    yield "goes to the peer's registered host and port on a new association, by `engine.retry_schedule_seconds`; one given up is seen"
    yield "in `dicomnode commitment list`. The same request again is Success: it is answered once, or once more if it was answered before."
    yield "What the node has committed to it keeps like everything else: for ever, unless the site sets rules (`[retention]` below)."
    yield from _table(
        ("Failure Reason (0008,1197)", "When"),
        [
            (f"{NO_SUCH_INSTANCE:04X}", "the node doesn't hold this instance"),
            (f"{CLASS_INSTANCE_CONFLICT:04X}", "the node holds it as an instance of another SOP class"),
            (f"{PROCESSING_FAILURE:04X}", "the stored bytes can't be read, or aren't those that were received"),
            (f"{DUPLICATE_TRANSACTION:04X}", "this peer has used the Transaction UID for other instances"),
        ],
    )
    yield "How long objects are kept. What was removed can be sent again; it is then stored like new."
    yield from _table(
        ("Setting", "Value", "Meaning"), _setting_rows("retention", settings.retention, without=frozenset({"interval_seconds"}))
    )
    yield "Answers to N-ACTION and N-EVENT-REPORT other than Success, with an Error Comment (0000,0902):"
    yield from _table(("Status", "Meaning"), _refusals(CommitmentRefused))


def _announcements() -> Iterator[str]:
    yield "## Modality Performed Procedure Step and Instance Availability Notification: SCP"
    yield "Both are evidence of what belongs to a study, from peers that may send; they make no study and no analysis. What they name"
    yield "and the node doesn't hold is waited for, as long as its routes say; then the study is analysed as incomplete, and its reports"
    yield "say so. They say so, too, of a step that was discontinued, which nothing more is awaited of. While a step is IN PROGRESS its"
    yield "study waits likewise. Images that are named count where their SOP class is one of kind *image*, and their Instance Availability"
    yield "(0008,0056) isn't UNAVAILABLE. Success is answered when it is noted for good. Nothing is given back but a SOP Instance UID that"
    yield "the request lacks. An announcement is forgotten a month after its last change, when others come."
    yield "Attributes that are read; the others are not kept:"
    yield from _table(
        ("Message", "Attributes"),
        [
            ("N-CREATE of a step", "Performed Procedure Step Status (IN PROGRESS); Scheduled Step Attributes Sequence: Study Instance UID"),
            ("N-SET of a step, by the AE that made it", "Performed Procedure Step Status"),
            ("both", "Performed Series Sequence, with an item when it is COMPLETED: Series Instance UID, Referenced Image Sequence"),
            (
                "N-CREATE of a notification",
                "Study Instance UID; Referenced Series Sequence: Series Instance UID, Referenced SOP Sequence",
            ),
        ],
    )
    yield from _table(("Status", "Meaning"), _refusals(NoticeRefused))


def _queries(listener: ListenerSection) -> Iterator[str]:
    yield "## Query/Retrieve: SCP"
    yield "A peer may ask what the node holds, images and results, unless it is registered with `--no-queries`. Queries are hierarchical"
    yield "(PS3.4 C.4.1.3.1): of each level above the one that is asked for the unique key has one value. Neither relational queries nor"
    yield "date-time, fuzzy or time zone matching are negotiated. Dates and times are matched each for itself. Patient's Name is matched"
    yield "without case and accents, each component group for itself; other text as it is written."
    yield from _table(
        ("Level", "Matched and returned", "Returned"),
        [
            ("PATIENT", "Patient's Name, Patient ID, Birth Date, Sex", "Number of Patient Related Studies, Series, Instances"),
            (
                "STUDY",
                "of PATIENT; Study Date, Time, ID, UID, Description, Accession Number, Modalities in Study, Referring Physician",
                "Number of Study Related Series, Instances",
            ),
            (
                "SERIES",
                "those of STUDY but Modalities in Study; Modality, Series Number, Instance UID, Description, Body Part Examined",
                "Number of Series Related Instances",
            ),
            ("IMAGE", "those of SERIES; Instance Number, SOP Instance UID, SOP Class UID", "Available Transfer Syntax UID"),
        ],
    )
    yield "Single value, list of UID, wildcard, range and universal matching are supported; several values of other attributes match if one"
    yield "does. Every answer has Query/Retrieve Level and Retrieve AE Title, and Instance Availability (`ONLINE`) where it is asked for."
    yield "Other attributes come back empty, and the status is FF01 then. Text is answered in the Specific Character Set of the request if"
    yield "that has all its characters, else in ISO_IR 192."
    yield ""
    yield f"A query is answered with at most {MAXIMUM_MATCHES:,} matches; a retrieval fetches at most {MAXIMUM_RETRIEVED:,} objects."
    yield f"A C-CANCEL holds between two answers or objects. {listener.maximum_queries} run at a time (`listener.maximum_queries`)."
    yield "Objects of a C-MOVE go to a registered peer that receives, as they are stored, with the Move Originator's AE Title and Message"
    yield "ID. Those of a C-GET go out as they are stored if the caller accepts that transfer syntax; what is stored in Explicit or"
    yield "Implicit VR Little Endian goes out in the other one if it accepts that alone."
    yield "Nothing is decompressed."
    yield from _table(
        ("Status", "Meaning"),
        [
            ("0000", "all is answered, or was sent"),
            ("FF00, FF01", "an answer, or the state of a retrieval; FF01: not each attribute is known"),
            ("B000", "some objects failed (Failed SOP Instance UID List) or were taken with a warning"),
            ("FE00", "cancelled"),
            *_refusals(QueryRefused),
        ],
    )


def _query_scu() -> Iterator[str]:
    yield "## Query: SCU"
    yield "A peer that a route names is asked how many images it holds of a study that has become quiet: at the level SERIES, by Study"
    yield "Instance UID, for Series Instance UID, Modality and Number of Series Related Instances (0020,1209); where that is absent, or"
    yield "more than what came, at the level IMAGE for the SOP Instance UIDs. The Study Root model is used where it is accepted, else"
    yield f"Patient Root. A query ends after {ASKING.seconds:g} s, {ASKING.answers:,} answers or {ASKING.size // 2**20} MiB, with C-CANCEL"
    yield "and A-ABORT. No answer is no evidence, and the peer is asked nothing for a minute."
    yield from _table(
        ("Status", "Outcome"),
        [
            (", ".join(f"{status:04X}" for status in sorted(PENDING)), "an answer"),
            ("0000", "the end of the answers"),
            (f"{_ranges(QUERY_TRANSIENT)}, no association, or no response", "no answer now"),
            ("any other, or no context that is accepted", "no answer"),
        ],
    )


def _refusals(kind: type[NodeError]) -> Iterator[tuple[str, str]]:
    for refusal in sorted(kind.__subclasses__(), key=lambda refusal: refusal.dimse_status):
        yield f"{refusal.dimse_status:04X}", " ".join((refusal.__doc__ or "").split())


def _tables(listener: ListenerSection) -> Iterator[str]:
    yield "## Storage SOP classes"
    yield "*image*: makes the next revision of its study, which is analysed. *other*: stored and linked."
    yield from _table(("SOP class", "UID", "Kind"), ((row.name, f"`{row.uid}`", row.kind) for row in STORAGE_CLASSES))
    yield "## Transfer syntaxes"
    yield "Each of them for each Storage SOP class; Verification in any of pynetdicom's default ones (Implicit and Explicit VR);"
    yield "all other classes that aren't Storage in Explicit and Implicit VR Little Endian."
    offered = offered_syntaxes(accept_deflated=listener.accept_deflated)
    yield from _table(("Transfer syntax", "UID"), ((row.name, f"`{row.uid}`") for row in offered))
    yield "Not accepted:"
    excluded: tuple[tuple[str, str, str], ...] = EXCLUDED_TRANSFER_SYNTAXES
    if DEFLATED not in offered:
        excluded = ((DEFLATED.uid, DEFLATED.name, "accepted only with `listener.accept_deflated`"), *excluded)
    yield from _table(("Transfer syntax", "UID", "Why"), ((name, f"`{uid}`", why) for uid, name, why in excluded))


def _codes(codes: Sequence[Code]) -> Iterator[str]:
    rows = ((f"`{code.value}`", f"`{code.scheme}`", code.meaning) for code in codes)
    return _table(("Code Value", "Coding Scheme Designator", "Code Meaning"), rows)


def _tls_port(tls: TlsSection) -> str:
    return (
        f"{tls.port} (`tls.port`)" if tls.certificate is not None else f"none: `tls.certificate` is not set; else {tls.port} (`tls.port`)"
    )


def _setting_rows(
    name: str, section: ListenerSection | TlsSection | CommitmentSection | RetentionSection, *, without: frozenset[str]
) -> Iterator[tuple[str, str, str]]:
    """Each setting of a section as it is, with its description; files by their names only, as the statement goes to others."""
    for key, field in type(section).model_fields.items():
        if key not in without:
            value = getattr(section, key)
            yield f"`{name}.{key}`", _shown(value), (field.description or "").removesuffix("; relative to this file")


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else f"{value}"
    return f"`{value.name if isinstance(value, Path) else value}`"


def _scp_statuses() -> Iterator[tuple[str, str, str]]:
    yield "0000", "Success: the object is stored.", ""
    refusals = sorted(StoreRefused.__subclasses__(), key=lambda refusal: refusal.dimse_status)
    for refusal in refusals:
        meaning = " ".join((refusal.__doc__ or "").split())
        yield f"{refusal.dimse_status:04X}", meaning, "can work later" if refusal.transient else "gives the same answer"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield ""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _ranges(statuses: frozenset[int]) -> str:
    """Statuses in hexadecimal, neighbours as a range."""
    first = sorted(status for status in statuses if status - 1 not in statuses)
    last = sorted(status for status in statuses if status + 1 not in statuses)
    return ", ".join(f"{a:04X}" if a == b else f"{a:04X} to {b:04X}" for a, b in zip(first, last, strict=True))
