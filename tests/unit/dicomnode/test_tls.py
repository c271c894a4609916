"""What TLS lets through and what it refuses, by handshakes in memory; and what is said of files that can't be used."""

from __future__ import annotations

import shutil
import ssl
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority, Identity, openssl, self_signed
from dicomnode.config import TlsSection
from dicomnode.dimse import tls
from dicomnode.dimse.tls import SUITES, ServerContexts, fingerprint, peer_context, read_certificate, server_context, validity
from dicomnode.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Site:
    """A hospital with its certification authority, and another one."""

    folder: Path
    authority: Authority
    node: Identity
    node_rsa: Identity
    scanner: Identity
    expired: Identity
    stranger: Identity
    stranger_authority: Authority
    self_signed: Identity


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    authority, other = Authority(folder / "ca"), Authority(folder / "other", "site")  # of the same name
    return Site(
        folder=folder,
        authority=authority,
        node=authority.issue("node"),
        node_rsa=authority.issue("node-rsa", rsa=True),
        scanner=authority.issue("scanner"),
        expired=authority.issue("expired", days=-1),
        stranger=other.issue("scanner"),
        stranger_authority=other,
        self_signed=self_signed(folder, "self"),
    )


class Pair:
    """A TLS connection in memory."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext, host: str | None = None) -> None:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server.wrap_bio(to_server, to_client, server_side=True)
        self.client = client.wrap_bio(to_client, to_server, server_hostname=host)
        waiting = [self.client, self.server]
        for _ in range(10):
            waiting = [side for side in waiting if not _done(side.do_handshake)]
        assert waiting == []
        # A client of TLS 1.3 is done before the server has seen its certificate: only an exchange shows that it is in.
        self.server.write(b"ok")
        assert self.client.read(2) == b"ok"


def _done(step: Callable[[], object]) -> bool:
    try:
        step()
    except ssl.SSLWantReadError:
        return False
    return True


def a_client(site: Site, identity: Identity | None, *, trusts: Path | None = None) -> ssl.SSLContext:
    """A client of no scruples."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(trusts or site.authority.certificate)
    context.set_ciphers("ALL:@SECLEVEL=0")
    if identity is not None:
        context.load_cert_chain(identity.certificate, identity.key)
    return context


@contextmanager
def without_warnings() -> Iterator[None]:
    """TLS 1.0 and 1.1 are deprecated; that they are refused is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def test_a_client_with_a_certificate_of_the_site_is_let_in_and_known_by_it(site: Site, version: ssl.TLSVersion) -> None:
    client = a_client(site, site.scanner)
    client.minimum_version = client.maximum_version = version
    pair = Pair(server_context(site.authority.settings(site.node)), client)
    assert fingerprint(pair.server.getpeercert(binary_form=True) or b"") == site.scanner.sha256
    assert pair.client.compression() is None
    assert pair.client.session is None or not pair.client.session.has_ticket


@pytest.mark.parametrize(
    "who", ["nobody", "expired", "stranger", "self_signed"], ids=["no certificate", "expired", "another CA of the same name", "self-signed"]
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def test_a_client_without_a_good_certificate_is_refused(site: Site, who: str, version: ssl.TLSVersion) -> None:
    client = a_client(site, getattr(site, who, None))
    client.minimum_version = client.maximum_version = version
    with pytest.raises(ssl.SSLError):
        Pair(server_context(site.authority.settings(site.node)), client)


@pytest.mark.parametrize("name", ["TLSv1", "TLSv1_1"])
def test_versions_before_1_2_are_refused(site: Site, name: str) -> None:
    client, lax = a_client(site, site.scanner), server_context(site.authority.settings(site.node))
    with without_warnings():
        client.minimum_version = client.maximum_version = lax.minimum_version = ssl.TLSVersion[name]
    lax.set_ciphers("ALL:@SECLEVEL=0")
    Pair(lax, client)  # it is the version alone that is refused
    with pytest.raises(ssl.SSLError, match=r"(?i)version|protocol"):
        Pair(server_context(site.authority.settings(site.node)), client)


@pytest.mark.parametrize("suite", SUITES)
def test_the_four_suites_are_there(site: Site, suite: str) -> None:
    client = a_client(site, site.scanner)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(suite)
    identity = site.node if "ECDSA" in suite else site.node_rsa
    pair = Pair(server_context(site.authority.settings(identity)), client)
    assert (pair.server.cipher() or ("",))[0] == suite


def test_no_other_suite_of_1_2_is_there(site: Site) -> None:
    for context in (
        server_context(site.authority.settings(site.node)),
        peer_context(site.authority.settings(site.node), pin=None, timeout_seconds=60),
    ):
        offered = [suite for suite in context.get_ciphers() if suite["protocol"] != "TLSv1.3"]
        assert {suite["name"] for suite in offered} == set(SUITES)
        assert all(suite["name"].startswith("TLS_") for suite in context.get_ciphers() if suite not in offered)
    client = a_client(site, site.scanner)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("ALL:!ECDHE-ECDSA-AES128-GCM-SHA256:!ECDHE-ECDSA-AES256-GCM-SHA384:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)no.shared.cipher|handshake.failure"):
        Pair(server_context(site.authority.settings(site.node)), client)


def test_the_node_calls_only_who_names_the_host_and_is_of_the_site(site: Site) -> None:
    settings = site.authority.settings(site.node)

    def call(host: str, called: Identity = site.node) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(called.certificate, called.key)
        Pair(server, peer_context(settings, pin=None, timeout_seconds=60), host)

    call("127.0.0.1")
    call("localhost")
    for host, called, words in (
        ("127.0.0.2", site.node, "IP address mismatch"),
        ("pacs.example", site.node, "Hostname mismatch"),
        ("127.0.0.1", site.stranger, "certificate signature failure|unable to get local issuer"),
        ("127.0.0.1", site.self_signed, "self-signed"),
        ("127.0.0.1", site.expired, "expired"),
    ):
        with pytest.raises(ssl.SSLCertVerificationError, match=words):
            call(host, called)


def test_the_dates_of_a_certificate_are_read(site: Site) -> None:
    now = datetime.now(UTC)
    begin, end = validity(read_certificate(site.node.certificate))
    assert now - timedelta(hours=1) < begin <= now
    assert abs(end - begin - timedelta(days=60)) < timedelta(seconds=2)
    assert validity(read_certificate(site.expired.certificate))[1] < now
    far = site.authority.issue("far", days=365 * 40)  # past 2050 the dates are written in another form
    assert abs(validity(read_certificate(far.certificate))[1] - now - timedelta(days=365 * 40)) < timedelta(hours=1)


@pytest.mark.parametrize("date", [b"991332000000Z", b"9901010000Z", b"990101000000+0100"])
def test_dates_that_are_none_are_said_to_be_so(site: Site, date: bytes) -> None:
    der = read_certificate(site.node.certificate)
    at = der.index(b"\x17\x0d")
    with pytest.raises(ConfigError, match="dates of the certificate cannot be read"):
        validity(der[:at] + b"\x17\x0d" + date.ljust(13, b"0")[:13] + der[at + 15 :])


def test_a_certificate_is_read_from_pem_der_and_from_among_others(site: Site, tmp_path: Path) -> None:
    der = read_certificate(site.scanner.certificate)
    assert openssl_fingerprint(site, tmp_path) == fingerprint(der)
    (tmp_path / "a.der").write_bytes(der)
    (tmp_path / "chain.pem").write_bytes(b"A comment\n" + site.scanner.certificate.read_bytes() + site.authority.certificate.read_bytes())
    assert read_certificate(tmp_path / "a.der") == read_certificate(tmp_path / "chain.pem") == der


def openssl_fingerprint(site: Site, folder: Path) -> str:
    file = folder / "fingerprint.der"
    openssl("x509", "-in", site.scanner.certificate, "-outform", "DER", "-out", file)
    openssl("dgst", "-sha256", "-out", folder / "digest", file)
    return (folder / "digest").read_text(encoding="ascii").split("= ")[1].strip()


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\x30\x82\xff\xff"]
)
def test_what_is_no_certificate_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no certificate"):
        read_certificate(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_certificate(tmp_path / "absent.pem")


def test_each_file_that_cannot_be_used_is_named_with_its_reason(site: Site, tmp_path: Path) -> None:
    encrypted, garbage = tmp_path / "encrypted.key", tmp_path / "garbage.pem"
    openssl("pkey", "-in", site.node.key, "-aes256", "-passout", "pass:x", "-out", encrypted)
    garbage.write_text("nonsense", encoding="ascii")
    good = {"certificate": site.node.certificate, "key": site.node.key, "ca": site.authority.certificate}
    for changed, words in (
        ({"certificate": tmp_path / "absent.pem"}, r"tls\.certificate: .*absent\.pem cannot be read: No such file"),
        ({"key": tmp_path / "absent.pem"}, r"tls\.key: .*absent\.pem cannot be read"),
        ({"ca": tmp_path / "absent.pem"}, r"tls\.ca: .*absent\.pem cannot be read"),
        ({"ca": tmp_path}, r"tls\.ca: .* cannot be read: Is a directory"),
        ({"ca": garbage}, r"tls\.ca: .*garbage\.pem holds no certificate"),
        ({"certificate": garbage}, r"garbage\.pem holds no certificate"),
        ({"key": garbage}, r"with .*garbage\.pem cannot be used"),
        ({"key": site.scanner.key}, r"the key of .*scanner\.key is not that of the certificate .*node\.pem"),
        ({"key": encrypted}, r"encrypted\.key is encrypted"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            server_context(TlsSection.model_validate({**good, **changed}))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="this node has no TLS certificate"):
        server_context(TlsSection())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files at each connection."""
    monkeypatch.setattr(tls, "_POLL_SECONDS", 0.0)


def served(contexts: ServerContexts, site: Site) -> tuple[str, Pair]:
    pair = Pair(contexts.current(), a_client(site, site.scanner))
    return fingerprint(pair.client.getpeercert(binary_form=True) or b""), pair


def test_an_exchanged_certificate_is_served_and_who_is_connected_stays(site: Site, tmp_path: Path, impatient: None) -> None:
    settings = installed(site, tmp_path, site.node)
    contexts = ServerContexts(settings)
    before, old = served(contexts, site)
    context = contexts.current()
    assert contexts.current() is context, "nothing has changed"
    installed(site, tmp_path, site.node_rsa)
    after, _ = served(contexts, site)
    assert (before, after) == (site.node.sha256, site.node_rsa.sha256)
    old.client.write(b"still here")
    assert old.server.read(100) == b"still here"


def test_a_ca_that_is_taken_away_counts_no_more(site: Site, tmp_path: Path, impatient: None) -> None:
    settings = installed(site, tmp_path, site.node)
    contexts = ServerContexts(settings)
    served(contexts, site)
    shutil.copy(site.stranger_authority.certificate, tmp_path / "ca.pem")
    with pytest.raises(ssl.SSLError):
        served(contexts, site)
    Pair(contexts.current(), a_client(site, site.stranger))


def test_half_an_exchange_and_a_broken_file_change_nothing(site: Site, tmp_path: Path, impatient: None, capsys: Any) -> None:
    settings = installed(site, tmp_path, site.node)
    contexts = ServerContexts(settings)
    shutil.copy(site.node_rsa.certificate, tmp_path / "node.pem")
    assert served(contexts, site)[0] == site.node.sha256
    (tmp_path / "ca.pem").unlink()
    assert served(contexts, site)[0] == site.node.sha256
    installed(site, tmp_path, site.node_rsa)
    assert served(contexts, site)[0] == site.node_rsa.sha256


def test_the_files_are_not_looked_at_for_each_connection(site: Site, tmp_path: Path) -> None:
    contexts = ServerContexts(installed(site, tmp_path, site.node))
    context = contexts.current()
    installed(site, tmp_path, site.node_rsa)
    assert contexts.current() is context


def installed(site: Site, folder: Path, identity: Identity) -> TlsSection:
    """Put certificate, key and CA where the settings name them."""
    shutil.copy(identity.certificate, folder / "node.pem")
    shutil.copy(identity.key, folder / "node.key")
    shutil.copy(site.authority.certificate, folder / "ca.pem")
    return TlsSection(certificate=folder / "node.pem", key=folder / "node.key", ca=folder / "ca.pem")
