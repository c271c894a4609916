"""What a peer accepts, found out by asking for it: presentation contexts, storage commitment, Query/Retrieve, whom it thinks it is.

Opens associations and releases them; must never send an object, nor take what a peer accepts for what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from dicomnode.config import TlsSection
from dicomnode.dimse.contexts import (
    COMMITMENT_SYNTAXES,
    FIND_SYNTAXES,
    MAXIMUM_CONTEXTS,
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
    STORAGE_CLASSES,
    STORAGE_COMMITMENT,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    STUDY_ROOT_MOVE,
    VERIFICATION,
    transfer_syntax,
)
from dicomnode.dimse.scu import Pair, association_with, check_certificate
from dicomnode.errors import PeerUnavailable
from storage.records import Peer, Quirks

WRONG_AE_TITLE: Final = "NOBODY-IS-THIS"
# In which objects are stored and sent most: results are made in the first and label maps in the third of them.
PROBED_SYNTAXES: Final = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
)
_SEG: Final = "1.2.840.10008.5.1.4.1.1.66.4"
_COMPREHENSIVE_SR: Final = "1.2.840.10008.5.1.4.1.1.88.33"
_COMPREHENSIVE_3D_SR: Final = "1.2.840.10008.5.1.4.1.1.88.34"
_SERVICES: Final = (
    (VERIFICATION, "Verification", FIND_SYNTAXES),
    (STORAGE_COMMITMENT, "Storage Commitment Push Model", COMMITMENT_SYNTAXES),
    (PATIENT_ROOT_FIND, "Patient Root Query/Retrieve - FIND", FIND_SYNTAXES),
    (PATIENT_ROOT_MOVE, "Patient Root Query/Retrieve - MOVE", FIND_SYNTAXES),
    (PATIENT_ROOT_GET, "Patient Root Query/Retrieve - GET", FIND_SYNTAXES),
    (STUDY_ROOT_FIND, "Study Root Query/Retrieve - FIND", FIND_SYNTAXES),
    (STUDY_ROOT_MOVE, "Study Root Query/Retrieve - MOVE", FIND_SYNTAXES),
    (STUDY_ROOT_GET, "Study Root Query/Retrieve - GET", FIND_SYNTAXES),
)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """One SOP class and the transfer syntaxes in which the peer takes it: none if it doesn't, or never said so."""

    sop_class_uid: str
    name: str
    transfer_syntax_uids: tuple[str, ...]
    refused_syntax_uids: tuple[str, ...]  # those in which it was asked for and not accepted


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What was found out about a peer."""

    checks_called_ae_title: bool  # it rejects an association for another AE title
    maximum_pdu_bytes: int  # that it takes; 0: any
    implementation_class_uid: str
    implementation_version_name: str
    tls: str | None  # version and cipher suite; None: plain
    classes: tuple[Accepted, ...]
    refused_associations: int  # of those that were asked for with contexts: some peers accept none in which they take nothing

    def quirks(self, probed_at: datetime) -> Quirks:
        """Return what the sender is to know of it; the rest is told at each association."""
        storage = {row.uid for row in STORAGE_CLASSES}
        return Quirks(
            probed_at=probed_at,
            implementation_class_uid=self.implementation_class_uid,
            implementation_version_name=self.implementation_version_name,
            refuses={
                one.sop_class_uid: one.refused_syntax_uids
                for one in self.classes
                if one.sop_class_uid in storage and one.refused_syntax_uids
            },
        )

    def advice(self, *, commits: bool) -> list[str]:
        """Return what its record could say, in words; `commits` is what that says now."""
        lines = []
        if self.takes(STORAGE_COMMITMENT) and not commits:
            lines.append("it accepts storage commitment: `peer add … --commits` makes results wait for it")
        if commits and not self.takes(STORAGE_COMMITMENT):
            lines.append("it does not accept storage commitment, for which it is registered")
        if not self.takes(_SEG):
            lines.append("it takes no Segmentation: `--profile plain` gives it images alone")
        if self.takes(_COMPREHENSIVE_SR) and not self.takes(_COMPREHENSIVE_3D_SR):
            lines.append("it takes no Comprehensive 3D SR, but Comprehensive SR: `--object sr-comprehensive`")
        if not (self.takes(STUDY_ROOT_MOVE) or self.takes(PATIENT_ROOT_MOVE)) and (
            self.takes(STUDY_ROOT_GET) or self.takes(PATIENT_ROOT_GET)
        ):
            lines.append("it offers C-GET and no C-MOVE: `--retrieve-by get` asks for nothing else")
        return lines

    def takes(self, sop_class_uid: str) -> bool:
        """Whether it takes the class in any of the transfer syntaxes that were tried."""
        return any(accepted.transfer_syntax_uids for accepted in self.classes if accepted.sop_class_uid == sop_class_uid)


def probe(peer: Peer, *, calling_ae_title: str, tls: TlsSection | None = None, timeout_seconds: float = 10) -> Probed:
    """Ask `peer` for each context that the node could want, over as many associations as that takes.

    Raises:
        PeerUnavailable: it accepts no association at all.
        PeerRefused: the peer is to be called over TLS, and this node has no certificate.
    """
    check_certificate(peer, tls)
    named = [*_SERVICES, *((row.uid, row.name, PROBED_SYNTAXES) for row in STORAGE_CLASSES)]
    taken: dict[str, list[str]] = {uid: [] for uid, _, _ in named}
    refuses: dict[str, list[str]] = {uid: [] for uid, _, _ in named}
    acceptor: Any = None
    secured: str | None = None
    refused = 0
    trouble: str | None = None
    for pairs in _shares([(uid, syntax) for uid, _, syntaxes in named for syntax in syntaxes]):
        with association_with(peer, pairs, calling_ae_title, tls, timeout_seconds) as (association, no_association):
            if no_association is not None:
                refused, trouble = refused + 1, no_association
                continue
            accepted = {(str(context.abstract_syntax), str(context.transfer_syntax[0])) for context in association.accepted_contexts}
            for uid, syntax in pairs:
                (taken if (uid, syntax) in accepted else refuses)[uid].append(syntax)
            if acceptor is None and association.accepted_contexts:
                acceptor, secured = association.acceptor, _secured(association)
    if acceptor is None:
        raise PeerUnavailable(f"{peer.ae_title} at {peer.host}:{peer.port}: {trouble or 'it accepts nothing that the node could want'}")
    wrong = replace(peer, ae_title=WRONG_AE_TITLE)
    with association_with(wrong, [(VERIFICATION, FIND_SYNTAXES[1])], calling_ae_title, tls, timeout_seconds) as (_, rejection):
        checks = rejection is not None
    return Probed(
        checks_called_ae_title=checks,
        maximum_pdu_bytes=int(acceptor.maximum_length or 0),
        implementation_class_uid=str(acceptor.implementation_class_uid or ""),
        implementation_version_name=str(acceptor.implementation_version_name or ""),
        tls=secured,
        classes=tuple(
            Accepted(sop_class_uid=uid, name=name, transfer_syntax_uids=tuple(taken[uid]), refused_syntax_uids=tuple(refuses[uid]))
            for uid, name, _ in named
        ),
        refused_associations=refused,
    )


def syntax_name(uid: str) -> str:
    """Return the name of a transfer syntax as a table's head has it."""
    row = transfer_syntax(uid)
    return uid if row is None else row.name


def _shares(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """As many contexts as an association may propose. Verification is among each, so that there is one which every peer accepts."""
    step = MAXIMUM_CONTEXTS - 1
    for start in range(0, len(pairs), step):
        share = pairs[start : start + step]
        yield share if start == 0 else [(VERIFICATION, FIND_SYNTAXES[1]), *share]


def _secured(association: Any) -> str | None:
    connection = getattr(association.dul.socket, "socket", None)
    cipher = getattr(connection, "cipher", lambda: None)()
    return f"{cipher[1]} {cipher[0]}" if cipher else None
