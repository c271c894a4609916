"""The DICOM conformance statement (PS3.2), rendered from the tables and status codes that the node runs on.

Must never state what the code doesn't do: what can be read from a table is read from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dicomnode.config import Settings
from dicomnode.dimse.contexts import (
    DEFLATED,
    EXCLUDED_TRANSFER_SYNTAXES,
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    MAXIMUM_CONTEXTS,
    STORAGE_CLASSES,
    VERIFICATION,
    offered_syntaxes,
)
from dicomnode.dimse.scu import TRANSIENT, WARNINGS
from dicomnode.dimse.tls import SUITES
from dicomnode.errors import StoreRefused
from dicomnode.version import VERSION


def conformance_statement(settings: Settings) -> str:
    """Return the conformance statement of a node with these settings as Markdown, without a newline at its end."""
    return "\n".join(_lines(settings))


def _lines(settings: Settings) -> Iterator[str]:
    listener = settings.listener
    yield "# DICOM conformance statement"
    yield ""
    yield f"dicomnode {VERSION}. Rendered by `dicomnode conformance` from the tables the node runs on; don't edit it by hand."
    yield "RESEARCH USE ONLY: not for diagnosis."
    yield ""
    yield "The node stores studies that peers send to it, analyses them, and sends the results (Segmentation, Structured Report) to"
    yield "peers. What is received is stored as it came: no transfer syntax is converted, no attribute is coerced."
    yield ""
    yield "## Services"
    yield from _table(
        ("Service", "SOP classes", "SCU", "SCP"),
        [
            ("Verification", f"`{VERIFICATION}`", "yes", "yes"),
            ("Storage", f"the {len(STORAGE_CLASSES)} below", "yes, in the transfer syntax an object is stored in", "yes"),
        ],
    )
    yield "## Associations"
    yield from _table(
        ("", ""),
        [
            ("Application context", "`1.2.840.10008.3.1.1.1`"),
            ("Implementation Class UID", f"`{IMPLEMENTATION_CLASS_UID}`"),
            ("Implementation Version Name", f"`{IMPLEMENTATION_VERSION_NAME}`"),
            ("AE titles", f"{', '.join(f'`{title}`' for title in settings.node.ae_titles)} (`node.ae_title`, `node.more_ae_titles`)"),
            ("TCP port", f"{listener.port} (`listener.port`)"),
            ("TCP port of DICOM over TLS", f"{settings.tls.port} (`tls.port`), if `tls.certificate` is set"),
            ("Associations at a time, as acceptor", f"{listener.maximum_associations} (`listener.maximum_associations`)"),
            ("Maximum PDU, as acceptor", f"{listener.maximum_pdu_bytes} bytes (`listener.maximum_pdu_bytes`)"),
            ("Wait for an association message", f"{listener.association_seconds:g} s (`listener.association_seconds`)"),
            ("Idle association is aborted after", f"{listener.network_timeout_seconds:g} s (`listener.network_timeout_seconds`)"),
            ("Asynchronous operations", "one at a time"),
            ("Extended negotiation, role selection", "not used"),
            ("User identity", "as acceptor: types 1 and 2, for peers that are registered with a user name; no positive response is sent"),
            ("TLS", "PS3.15 B.12 in both directions: 1.2 and 1.3, each side with a certificate of the site's certification authority"),
            ("Cipher suites of TLS 1.2", ", ".join(f"`{suite}`" for suite in SUITES)),
        ],
    )
    yield "**As acceptor.** Who is let in calls this node by one of its AE titles and matches one registered peer that may send in all that"
    yield "is known of it: calling AE title, network, way (TLS or not), certificate, user identity. Everybody else gets the same"
    yield "A-ASSOCIATE-RJ: rejected permanent, DICOM UL service user, no reason given. The registry is asked at every association. Without"
    yield "TLS the calling AE title is a name and not a proof: keep that port inside the hospital's network."
    yield "Every proposed context of the classes below is accepted with the first transfer syntax that the peer names and this"
    yield "statement lists. Above the number of associations the answer is rejected transient, local limit exceeded."
    yield ""
    yield "**As requestor.** One association proposes exactly the pairs of SOP class and transfer syntax of the objects it sends"
    yield f"(more than one association only above {MAXIMUM_CONTEXTS} pairs). Nothing is re-encoded: a peer that doesn't accept"
    yield "an object's pair doesn't get it. A peer that is registered with TLS is called over TLS alone; its certificate must be the"
    yield "registered one, or name the host that it is called at, and in either case be signed by the site's certification authority."
    yield ""
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
            ("no association, or no response", "sent again later"),
            ("any other, or a context that is not accepted", "failed: a person must look"),
        ],
    )
    yield "## Storage SOP classes"
    yield "*image*: makes the next revision of its study, which is analysed. *other*: stored and linked."
    yield from _table(("SOP class", "UID", "Kind"), ((row.name, f"`{row.uid}`", row.kind) for row in STORAGE_CLASSES))
    yield "## Transfer syntaxes"
    yield "Each of them for each Storage SOP class; Verification in any of pynetdicom's default ones (Implicit and Explicit VR)."
    offered = offered_syntaxes(accept_deflated=listener.accept_deflated)
    yield from _table(("Transfer syntax", "UID"), ((row.name, f"`{row.uid}`") for row in offered))
    yield "Not accepted:"
    excluded: tuple[tuple[str, str, str], ...] = EXCLUDED_TRANSFER_SYNTAXES
    if DEFLATED not in offered:
        excluded = ((DEFLATED.uid, DEFLATED.name, "accepted only with `listener.accept_deflated`"), *excluded)
    yield from _table(("Transfer syntax", "UID", "Why"), ((name, f"`{uid}`", why) for uid, name, why in excluded))
    yield "## Character sets"
    yield "Patient name, patient ID, accession number and descriptions are decoded by Specific Character Set (0008,0005), ISO 2022"
    yield "extensions included, for the node's own lists; what can't be decoded shows as U+FFFD. The stored object is not changed."


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
