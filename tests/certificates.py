"""Certification authorities and certificates for the tests of TLS, made with the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from dicomnode.config import TlsSection
from dicomnode.dimse.tls import fingerprint, read_certificate
from pacs import program


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A certificate and its key, both PEM."""

    certificate: Path
    key: Path

    @property
    def sha256(self) -> str:
        """What the registry keeps of the certificate."""
        return fingerprint(read_certificate(self.certificate))


class Authority:
    """A certification authority in a folder."""

    def __init__(self, folder: Path, name: str = "site") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.identity = self_signed(folder, name)

    @property
    def certificate(self) -> Path:
        """Its own certificate."""
        return self.identity.certificate

    def issue(self, name: str, *, names: str = "IP:127.0.0.1,DNS:localhost", days: int = 60, rsa: bool = False) -> Identity:
        """Make a key and sign a certificate for it with these subject alternative names; fewer than 0 days: it has expired."""
        issued = Identity(certificate=self._folder / f"{name}.pem", key=self._folder / f"{name}.key")
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        openssl("req", "-new", *_new_key(issued.key, rsa=rsa), "-subj", f"/CN={name}", "-out", request)
        lines = ["basicConstraints=critical,CA:FALSE"]
        lines += [f"subjectAltName={names}"] if names else []
        extensions.write_text("\n".join(lines) + "\n", encoding="ascii")
        authority = ["-CA", self.identity.certificate, "-CAkey", self.identity.key]
        openssl("x509", "-req", "-in", request, *authority, "-days", days, "-extfile", extensions, "-out", issued.certificate)
        return issued

    def settings(self, identity: Identity, **values: object) -> TlsSection:
        """The settings of a node with this identity that trusts this authority, on a free port."""
        files = {"certificate": identity.certificate, "key": identity.key, "ca": self.certificate}
        return TlsSection.model_validate({"port": 0, **files, **values})


def self_signed(folder: Path, name: str) -> Identity:
    """Make a certificate that only itself vouches for."""
    made = Identity(certificate=folder / f"{name}.pem", key=folder / f"{name}.key")
    openssl("req", "-x509", *_new_key(made.key), "-subj", f"/CN={name}", "-days", 60, "-out", made.certificate)
    return made


def _new_key(file: Path, *, rsa: bool = False) -> list[str | Path]:
    kind = ["rsa:2048"] if rsa else ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    return ["-newkey", *kind, "-nodes", "-keyout", file]


def openssl(*words: str | int | Path) -> None:
    """Run the openssl command."""
    subprocess.run([program("openssl", "openssl"), *map(str, words)], check=True, capture_output=True, timeout=300)
