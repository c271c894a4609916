"""The user agent of STOW-RS (PS3.18 10.5): sends stored objects over HTTP to a peer, exactly as they are stored; and asks for them again.

One request for each object, over one connection, so that each has its own outcome. The outcomes are those of C-STORE, and so are the
classes of failure. Nothing is negotiated: what a peer refuses by its form is sent in the next simpler one. Must never hold more of a
stored object in memory than a chunk, follow a redirect (results would go where nobody said), or try again by itself.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import httpx

from dicomnode.config import TlsSection
from dicomnode.dimse.commitment import NO_SUCH_INSTANCE, Reference
from dicomnode.dimse.contexts import IMPLICIT_LITTLE_ENDIAN
from dicomnode.dimse.recoding import recoded_file
from dicomnode.dimse.scu import SOP_CLASS_NOT_SUPPORTED, Outgoing, SendOutcome, classify, named
from dicomnode.dimse.tls import peer_context
from dicomnode.errors import ConfigError, PeerUnavailable
from storage.records import Peer

CHUNK_BYTES: Final = 1 << 20
_ANSWER_BYTES: Final = 1 << 20  # most that is read of an answer
# HTTP statuses that can be others later. Of the second kind are those with which the peer takes no other object now either.
_TRANSIENT: Final = frozenset({408, 425, 500})
_AWAY: Final = frozenset({401, 403, 407, 429, 502, 503, 504})
# PS3.18 10.5.3, PS3.4 B.2.3: SOP class not supported, the data set doesn't match it, it can't be understood, nor its transfer syntax.
_BY_ITS_FORM: Final = frozenset({SOP_CLASS_NOT_SUPPORTED, *range(0xA900, 0xAA00), *range(0xC000, 0xD000)})


def post_each(
    peer: Peer,
    objects: Sequence[Outgoing],
    *,
    tls: TlsSection | None = None,
    timeout_seconds: float = 60,
    at_peer: Collection[str] = (),
) -> Generator[SendOutcome]:
    """Send `objects` to the peer's DICOMweb and give the outcome of each before the next one is sent.

    Of an object and its alternatives goes the first that the peer doesn't refuse by its SOP class or its form: those first which refer to
    objects that the peer has, of those `at_peer` or of these. `tls` is the node's own certificate, which is shown to peers that are called
    over TLS of the site's own CA.
    """
    try:
        client = _client(peer, tls, timeout_seconds)
    except ConfigError as error:
        yield from (_outcome(item, "permanent", str(error)) for item in objects)
        return
    with client:
        away: str | None = None
        there = set(at_peer)
        for item in objects:
            outcome = _outcome(item, "transient", away, is_away=True) if away is not None else _post_best(client, peer, item, there)
            away = outcome.error if outcome.is_away else None
            yield outcome


def reach(peer: Peer, *, tls: TlsSection | None = None, timeout_seconds: float = 10) -> None:
    """See that a peer's DICOMweb answers, and lets the node in.

    Raises:
        PeerUnavailable: it doesn't; one sentence says why.
        ConfigError: its credentials or this node's certificate can't be used.
    """
    with _client(peer, tls, timeout_seconds) as client:
        try:
            answer = client.get(f"{peer.stow_url}/studies", params={"limit": "1"}, headers=_credentials(peer))
        except httpx.HTTPError as error:
            raise PeerUnavailable(f"{peer.ae_title} at {peer.stow_url}: {_words(error)}") from error
    if answer.status_code not in {200, 204, 406}:
        raise PeerUnavailable(f"{peer.ae_title} at {peer.stow_url}: HTTP {answer.status_code}")


def shown(
    peer: Peer, study_instance_uid: str, references: Sequence[Reference], *, tls: TlsSection | None = None, timeout_seconds: float = 30
) -> tuple[Reference, ...]:
    """Ask the peer's QIDO-RS for each of these instances; those that it doesn't show come back with a failure.

    That is proof of receipt: the peer says that it has them, and promises nothing (PS3.18 10.6).

    Raises:
        PeerUnavailable: it gives no answer to that; one sentence says why.
        ConfigError: its credentials or this node's certificate can't be used.
    """
    found = []
    with _client(peer, tls, timeout_seconds) as client:
        for reference in references:
            headers = {"Accept": "application/dicom+json", **_credentials(peer)}
            address = f"{peer.stow_url}/studies/{study_instance_uid}/instances"
            try:
                with client.stream("GET", address, params={"SOPInstanceUID": reference.sop_instance_uid}, headers=headers) as answer:
                    status, content = answer.status_code, _read(answer)
            except httpx.HTTPError as error:
                raise PeerUnavailable(f"its QIDO-RS: {_words(error)}") from error
            if status not in {200, 204, 404}:
                raise PeerUnavailable(f"its QIDO-RS answers with HTTP {status}")
            is_there = status == 200 and reference.sop_instance_uid in _matches(content)
            found.append(reference if is_there else replace(reference, failure=NO_SUCH_INSTANCE))
    return tuple(found)


def _matches(content: bytes) -> set[str]:
    """The SOP Instance UIDs of a QIDO-RS answer in JSON; nothing for anything else."""
    try:
        return {str(match["00080018"]["Value"][0]) for match in json.loads(content)}
    except (ValueError, TypeError, LookupError, RecursionError):
        return set()


def _client(peer: Peer, tls: TlsSection | None, timeout_seconds: float) -> httpx.Client:
    """Raises ConfigError if the node's certificate is needed and can't be used."""
    if peer.tls:
        if tls is None or tls.certificate is None:
            raise ConfigError(f"peer {peer.ae_title} is called over TLS with this node's certificate, and it has none: set [tls]")
        verify: ssl.SSLContext = peer_context(tls, pin=peer.client_cert, timeout_seconds=timeout_seconds)
    else:
        verify = ssl.create_default_context()
    return httpx.Client(verify=verify, timeout=timeout_seconds, follow_redirects=False, trust_env=False)


def _post_best(client: httpx.Client, peer: Peer, item: Outgoing, there: set[str]) -> SendOutcome:
    """Send an object, or the first of its alternatives that the peer takes; note in `there` which one. If it takes none, why not itself."""
    refused: list[SendOutcome] = []
    classes = set[str]()
    for way in sorted((item, *item.alternatives), key=lambda way: not there.issuperset(way.refers_to)):
        if way.sop_class_uid in classes or (way.recoded and way.transfer_syntax_uid == IMPLICIT_LITTLE_ENDIAN):
            continue  # PS3.18 8.7.3.5.2: Implicit VR is not for the web
        outcome, by_its_form = _post(client, peer, way)
        outcome = replace(outcome, sop_instance_uid=item.sop_instance_uid, sent=way)
        if not by_its_form:
            there.add(way.sop_instance_uid)
            return outcome
        refused.append(outcome)
        if outcome.status == SOP_CLASS_NOT_SUPPORTED:
            classes.add(way.sop_class_uid)
    first = next((outcome for outcome in refused if outcome.sent is item), refused[0])
    others = "" if len(refused) == 1 else f", and {len(refused) - 1} other form(s) of it neither"
    return replace(first, error=f"{first.error}: the peer does not take {named(item)}{others}", sent=None)


def _post(client: httpx.Client, peer: Peer, item: Outgoing) -> tuple[SendOutcome, bool]:
    """Send one object; return its outcome, and whether it was refused by its form, so that another one may be taken."""
    boundary = f"dicomnode-{os.urandom(16).hex()}"
    begin = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode("ascii")  # Orthanc takes it without parameters alone
    end = f"\r\n--{boundary}--\r\n".encode("ascii")
    names = (item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid)
    try:
        with recoded_file(item.path, *names) if item.recoded else nullcontext(item.path) as path:
            headers = {
                "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
                "Content-Length": str(len(begin) + path.stat().st_size + len(end)),
                "Accept": "application/dicom+json",
                **_credentials(peer),
            }
            with client.stream("POST", f"{peer.stow_url}/studies", content=_body(begin, path, end), headers=headers) as answer:
                outcome = _judged(item, answer.status_code, _read(answer))
                return outcome, outcome.state == "permanent" and (outcome.status in _BY_ITS_FORM or answer.status_code in {409, 415})
    except ConfigError as error:  # the credentials: a person may mend them meanwhile
        return _outcome(item, "transient", str(error), is_away=True), False
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        return _outcome(item, "transient", _words(error), is_away=True), False
    except httpx.HTTPError as error:
        return _outcome(item, "transient", _words(error)), False
    except OSError as error:
        return _outcome(item, "permanent", f"the stored file cannot be sent: {error.strerror}"), False
    except (AttributeError, ValueError, RuntimeError) as error:  # what pydicom raises for what cannot be written in another form
        return _outcome(item, "permanent", f"the stored file cannot be sent: {error}"), False


def _body(begin: bytes, path: Path, end: bytes) -> Iterator[bytes]:
    yield begin
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
    yield end


def _read(answer: httpx.Response) -> bytes:
    content = bytearray()
    for chunk in answer.iter_bytes(65536):
        content += chunk
        if len(content) > _ANSWER_BYTES:
            return b""
    return bytes(content)


def _judged(item: Outgoing, status: int, content: bytes) -> SendOutcome:
    """What an answer says of the one object that was sent (PS3.18 10.5.3): it counts as stored only if the answer names it as stored."""
    stored, reasons = _response(content)
    if status in {200, 202} and item.sop_instance_uid in stored:
        return SendOutcome(sop_instance_uid=item.sop_instance_uid, state="sent", status=0, error=None)
    if status in {200, 202, 409} and reasons:
        reason = reasons[0]
        state: Literal["transient", "permanent"] = "transient" if classify(reason) == "transient" else "permanent"
        return SendOutcome(sop_instance_uid=item.sop_instance_uid, state=state, status=reason, error=f"failure reason 0x{reason:04X}")
    if status in {200, 202}:
        return _outcome(item, "permanent", f"HTTP {status}, but the answer doesn't say that the object is stored")
    away = status in _AWAY
    return _outcome(item, "transient" if away or status in _TRANSIENT else "permanent", f"HTTP {status}", is_away=away)


def _response(content: bytes) -> tuple[set[str], list[int]]:
    """The SOP Instance UIDs that a Store Instances Response in JSON names as stored, and the failure reasons; nothing for anything else."""
    try:
        answer: Any = json.loads(content)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        stored, *failed = (answer.get(tag, {}).get("Value", []) for tag in ("00081199", "00081198", "0008119A"))
        return (
            {str(item["00081155"]["Value"][0]) for item in stored},
            [int(item["00081197"]["Value"][0]) & 0xFFFF for items in failed for item in items],
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return set(), []


def _credentials(peer: Peer) -> dict[str, str]:
    """The Authorization header by the peer's file of credentials, read anew for each request: tokens are exchanged while the node runs.

    Raises ConfigError if the file can't be read, or holds no such.
    """
    if peer.stow_credentials is None:
        return {}
    try:
        line = next(iter(Path(peer.stow_credentials).read_text(encoding="utf-8").splitlines()), "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the credentials for {peer.ae_title} cannot be read: {type(error).__name__}") from error
    scheme, _, token = line.partition(" ")
    if scheme.lower() == "bearer" and token.isascii() and token.isprintable():
        return {"Authorization": f"Bearer {token}"}
    if ":" in line:
        return {"Authorization": f"Basic {base64.b64encode(line.encode()).decode()}"}
    raise ConfigError(f"the credentials for {peer.ae_title} are no line USER:PASSCODE or Bearer TOKEN")


def _outcome(item: Outgoing, state: Literal["transient", "permanent"], error: str, *, is_away: bool = False) -> SendOutcome:
    return SendOutcome(sop_instance_uid=item.sop_instance_uid, state=state, status=None, error=error, is_away=is_away)


def _words(error: Exception) -> str:
    """What went wrong on the way, in words: of the library's own, which may name addresses alone."""
    return f"no answer: {str(error).strip() or type(error).__name__}"
