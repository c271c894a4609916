"""TLS by PS3.15 B.12 (BCP 195: RFC 8996 and 9325): what the listener offers, and what the node demands when it sends.

TLS 1.2 and 1.3, both sides with a certificate that one of the site's certification authorities signed. Must never fall back:
to an older version, to another suite, to a peer without a certificate (but for DICOMweb with passcodes), or to plain DICOM.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from dicomnode.config import TlsSection
from dicomnode.errors import ConfigError
from dicomnode.logs import get_logger

# PS3.15 B.12 by RFC 9325 4.2 for TLS 1.2; TLS 1.3 has only suites of that kind. Level 2: keys of 112 bits, no SHA-1 signature.
SUITES: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
)
_LEVEL = "@SECLEVEL=2"
_POLL_SECONDS = 2.0
_PEM_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_DATE_FORMATS = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}  # UTCTime and GeneralizedTime, as RFC 5280 4.1.2.5 has them

_log = get_logger(__name__)


class ServerContexts:
    """The listener's context, made anew when a file of it has changed: the next handshake uses it, associations go on with theirs.

    Files that can't be used, e.g. while certificate and key are being exchanged, leave the context as it is. For any number of threads.
    """

    def __init__(self, settings: TlsSection, *, client_certificates: bool = True) -> None:
        """Read the files. Raises ConfigError if they can't be used."""
        self._settings = settings
        self._client_certificates = client_certificates
        self._lock = threading.Lock()
        self._stamp = _stamp(settings)
        self._context = server_context(settings, client_certificates=client_certificates)
        self._looked = time.monotonic()
        _warn_of_dates(settings)

    def current(self) -> ssl.SSLContext:
        """Return the context for a connection that begins now. Looks at the files at most every two seconds."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= _POLL_SECONDS:
                self._looked = now
                self._read_again()
            return self._context

    def _read_again(self) -> None:
        stamp = _stamp(self._settings)  # before the files are read: what is written meanwhile is seen next time
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._context = server_context(self._settings, client_certificates=self._client_certificates)
            _warn_of_dates(self._settings)
        except ConfigError as error:
            _log.error("the changed TLS files cannot be used, the ones before stay in force", reason=str(error))
        else:
            _log.info("TLS certificate read again", digest=fingerprint(own_certificate(self._settings)))


class PeerContext(ssl.SSLContext):
    """What the node demands of one TLS peer that it calls, and in words what went wrong on its connection.

    The peer's certificate is signed by the site's CA, and is the one with the SHA-256 `pin`; without a pin it names the host.
    """

    pin: str | None
    timeout_seconds: float
    trouble: str | None
    connections: list[ssl.SSLSocket]


def server_context(settings: TlsSection, *, client_certificates: bool = True) -> ssl.SSLContext:
    """Return a context of a listener: who connects must show a certificate that the site's CA signed, unless none is asked for.

    Raises:
        ConfigError: a file is absent or can't be used; one sentence says which and why.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_TICKET
    context.num_tickets = 0  # nor those of TLS 1.3: what a certificate was good for ends with the context that took it
    _fill(context, settings)
    if not client_certificates:
        context.verify_mode = ssl.CERT_NONE  # DICOMweb alone, whose callers may show a passcode instead
    return context


def peer_context(settings: TlsSection, *, pin: str | None, timeout_seconds: float) -> PeerContext:
    """Return a context for one connection to a peer; each read or write of it waits for `timeout_seconds` at most.

    Raises:
        ConfigError: a file is absent or can't be used.
    """
    context = PeerContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _PeerSocket
    context.pin, context.timeout_seconds, context.trouble, context.connections = pin, timeout_seconds, None, []
    context.check_hostname = pin is None
    context.hostname_checks_common_name = False  # RFC 9525: a certificate's host names are its subjectAltName alone
    _fill(context, settings)
    return context


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a DER certificate, in hex."""
    return hashlib.sha256(certificate).hexdigest()


def read_certificate(path: Path) -> bytes:
    """Return the first certificate of a PEM or DER file as DER.

    Raises:
        ConfigError: the file can't be read or holds no certificate.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    found = _PEM_CERTIFICATE.search(content)
    try:
        certificate = ssl.PEM_cert_to_DER_cert(found[0].decode("ascii")) if found else content
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError) as error:  # ValueError: of base64 and ASCII
        raise ConfigError(f"{path} holds no certificate in PEM or DER") from error
    return certificate


def own_certificate(settings: TlsSection) -> bytes:
    """Return the node's certificate as DER. Raises ConfigError if there is none."""
    return read_certificate(_files(settings)["certificate"])


def validity(certificate: bytes) -> tuple[datetime, datetime]:
    """Return from when until when a DER certificate, which OpenSSL has taken, is valid (RFC 5280 4.1).

    The standard library shows the dates of a peer's certificate alone.

    Raises:
        ConfigError: the dates are not written as RFC 5280 4.1.2.5 demands.
    """
    try:
        ((_, content),) = _elements(certificate)
        fields = [element for element in _elements(next(_elements(content))[1]) if element[0] != 0xA0]  # without the version
        begin, end = (
            datetime.strptime(date.decode("ascii"), _DATE_FORMATS[tag]).replace(tzinfo=UTC) for tag, date in _elements(fields[3][1])
        )
    except (ValueError, KeyError, IndexError, StopIteration) as error:
        raise ConfigError("the dates of the certificate cannot be read") from error
    return begin, end


def _fill(context: ssl.SSLContext, settings: TlsSection) -> None:
    """Set what holds for both directions, and load the files."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(":".join((*SUITES, _LEVEL)))
    context.verify_mode = ssl.CERT_REQUIRED
    files = _files(settings)
    for setting, path in files.items():
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise ConfigError(f"tls.{setting}: {path} cannot be read: {error.strerror}") from error
    try:
        context.load_verify_locations(cafile=files["ca"])
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"tls.ca: {files['ca']} holds no certificate in PEM: {_reason(error)}") from error

    def no_passphrase() -> str:
        raise ConfigError(f"tls.key: {files['key']} is encrypted; the node has nobody to ask for its passphrase")

    try:
        context.load_cert_chain(files["certificate"], files["key"], password=no_passphrase)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"tls.certificate and tls.key: {_why_no_pair(files, error)}") from error


def _why_no_pair(files: dict[str, Path], error: OSError) -> str:
    """Say why certificate and key can't be loaded; OpenSSL's own words tell them apart only sometimes."""
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        return f"the key of {files['key']} is not that of the certificate {files['certificate']}"
    read_certificate(files["certificate"])  # its own sentence
    return f"{files['certificate']} with {files['key']} cannot be used: {_reason(error)}"


def _files(settings: TlsSection) -> dict[str, Path]:
    files = {key: file for key in ("certificate", "key", "ca") if (file := getattr(settings, key)) is not None}
    if len(files) < 3:
        raise ConfigError("this node has no TLS certificate: set tls.certificate, tls.key and tls.ca in dicomnode.toml")
    return files


def _stamp(settings: TlsSection) -> tuple[object, ...]:
    """What differs once a file was changed or replaced; None for one that is away."""
    stamps: list[object] = []
    for path in _files(settings).values():
        try:
            status = path.stat()
            stamps.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def _warn_of_dates(settings: TlsSection) -> None:
    begin, end = validity(own_certificate(settings))
    if not begin <= datetime.now(UTC) <= end:
        path = str(settings.certificate)
        _log.warning("the node's certificate is not valid today, peers will refuse it", path=path, reason=f"valid {begin:%F} to {end:%F}")


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Each (tag, content) of a run of DER elements (X.690 8.1, of one-byte tags)."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(der[at : at + size], "big"), at + size
        yield tag, der[at : at + length]
        at += length


def _reason(error: BaseException) -> str:
    """The words of an error of OpenSSL, without the line of its source code."""
    verified = getattr(error, "verify_message", None)
    reason = verified or getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason).replace("_", " ").lower() if str(reason).isupper() else str(reason)


class _PeerSocket(ssl.SSLSocket):
    """A connection to a TLS peer that holds the pin, keeps a deadline on each wait, and leaves the reason of a failure with its context."""

    context: PeerContext

    def connect(self, address: Any) -> None:
        """Connect and shake hands; whoever made the context closes what became of it."""
        self.context.connections.append(self)
        super().connect(address)

    def do_handshake(self, block: bool = False) -> None:
        """Shake hands, then compare the peer's certificate with its pin."""
        context = self.context
        try:
            super().do_handshake(block)
            if context.pin is not None and fingerprint(self.getpeercert(binary_form=True) or b"") != context.pin:
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the peer's certificate is not the registered one")
        except OSError as error:
            context.trouble = f"no TLS connection: {_reason(error)}"
            raise

    def settimeout(self, value: float | None) -> None:
        """Never wait without end: pynetdicom asks for that once connected, and reads whenever TLS has something of its own to say."""
        super().settimeout(self.context.timeout_seconds if value is None else value)

    def recv(self, *arguments: Any) -> bytes:
        """Read; a peer of TLS 1.3 refuses our certificate only here."""
        try:
            return super().recv(*arguments)
        except ssl.SSLError as error:
            self.context.trouble = f"the peer ended the TLS connection: {_reason(error)}"
            raise
