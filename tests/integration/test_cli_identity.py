"""What a peer is known by, from the command line to the registry and between sites; the counters; the rows of `check` about TLS."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority, self_signed
from dicomnode.admission import hash_passcode, is_passcode
from dicomnode.cli import run
from dicomnode.cli.check import _is_free
from dicomnode.cli.metrics import exposition
from dicomnode.config import ListenerSection, load_settings
from dicomnode.dimse.listener import Listener
from dicomnode.dimse.storing import in_memory
from dicomnode.dimse.tls import read_certificate
from dicomnode.engine import EngineClient
from dicomnode.errors import NodeError
from dicomnode.web.app import Web
from pacs import LOOPBACK, free_port
from storage import Storage, open_storage
from storage.records import Peer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logs_restored: None) -> Run:
    """Run a command in a folder with a fresh dicomnode.toml; return exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DICOMNODE_CONFIG", raising=False)
    assert run(["init"]) == 0

    def shell(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(word) for word in words])
        return (code, *capsys.readouterr())

    return shell


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def storage(shell: Run) -> Iterator[Storage]:
    assert shell("peer", "list")[0] == 0  # makes the database
    settings = load_settings(None)
    storage = open_storage(settings.database_url, settings.data_folder)
    yield storage
    storage.database.close()


def test_a_peer_is_kept_with_all_that_it_must_show_and_its_passcode_is_nowhere(shell: Run, storage: Storage, authority: Authority) -> None:
    scanner = authority.issue("scanner")
    Path("scanner.der").write_bytes(read_certificate(scanner.certificate))
    Path("passcode").write_text("geheim\r\nmore\n", encoding="utf-8")
    words = ["peer", "add", "CT1", "ct1.example", "104", "--sends", "--network", "10.1.0.0/16", "--network", "10.2.3.4", "--tls"]
    for file in (scanner.certificate, "scanner.der"):
        assert shell(*words, "--client-cert", file, "--user", "ct1", "--passcode-file", "passcode") == (0, "", "")
        kept = storage.registry.peer("CT1")
        assert kept is not None
        assert (kept.networks, kept.tls, kept.client_cert, kept.user) == (("10.1.0.0/16", "10.2.3.4/32"), True, scanner.sha256, "ct1")
        assert is_passcode("geheim", kept.passcode_hash or "")
    shown = [shell("peer", "list")[1], shell("peer", "list", "--json")[1]]
    (row,) = json.loads(shown[1])
    assert row["networks"] == ["10.1.0.0/16", "10.2.3.4/32"]
    assert (row["client_cert"], row["user"], row["passcode"]) == (scanner.sha256, "ct1", True)
    assert not any(word in text for text in shown for word in ("geheim", "scrypt"))
    assert shell("peer", "add", "CT1", "ct1.example", "104", "--sends") == (0, "", "")
    assert storage.registry.peer("CT1") == replace(kept, networks=(), tls=False, client_cert=None, user=None, passcode_hash=None)


def test_a_passcode_is_asked_for(shell: Run, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.prompt", lambda *_, **options: "geheim" if options["hide_input"] else "shown")
    assert shell("peer", "add", "CT1", "h", "104", "--sends", "--user", "ct1", "--passcode-file", "prompt")[0] == 0
    kept = storage.registry.peer("CT1")
    assert kept is not None
    assert is_passcode("geheim", kept.passcode_hash or "")


WRONG_USE = [
    ("--network 10.0.0.1/8", "host bits"),
    ("--network anywhere", "anywhere"),
    ("--network 10.0.0.0/33", "10.0.0.0/33"),
    ("--client-cert ca.pem", "--client-cert needs --tls"),
    ("--tls --client-cert absent.pem", "absent.pem cannot be read"),
    ("--tls --client-cert dicomnode.toml", "dicomnode.toml holds no certificate"),
    ("--tls --client-cert .", "cannot be read"),
    ("--passcode-file passcode", "--passcode-file needs --user"),
    ("--user ct1 --passcode-file absent", "absent cannot be read"),
    ("--user ct1 --passcode-file empty", "at least one character"),
    ("--user ct1 --passcode-file binary", "not text"),
    ("--user \x1b[31m", "user name"),
    ("--user", "--user"),
]


def test_wrong_use_is_one_sentence(shell: Run) -> None:
    Path("passcode").write_text("geheim", encoding="utf-8")
    Path("empty").write_text("\n", encoding="utf-8")
    Path("binary").write_bytes(b"\xff\xfe")
    for words, expected in WRONG_USE:
        code, _, errors = shell("peer", "add", "CT1", "h", "104", "--sends", *words.split(" "))
        assert (words, code) == (words, 2)
        assert expected in errors
        assert errors.count("\n") == 1
        assert "geheim" not in errors
    assert json.loads(shell("peer", "list", "--json")[1]) == []


def test_a_site_file_carries_what_peers_are_known_by(shell: Run, storage: Storage, tmp_path: Path) -> None:
    Path("passcode").write_text('ge"h\\eim', encoding="utf-8")
    identity = self_signed(tmp_path, "scanner")
    words = ["--network", "10.1.0.0/16", "--network", "fd00::/8", "--tls", "--client-cert", str(identity.certificate)]
    assert shell("peer", "add", "CT1", "h", "104", "--sends", *words, "--user", 'c"t\\1', "--passcode-file", "passcode")[0] == 0
    assert shell("peer", "add", "CT2", "h", "104", "--sends")[0] == 0
    before = storage.registry.peers()
    assert shell("registry", "export", "site.toml")[0] == 0
    assert stat.S_IMODE(Path("site.toml").stat().st_mode) == 0o600
    for peer in before:
        storage.registry.remove_peer(peer.ae_title)
    assert shell("registry", "import", "site.toml")[0] == 0
    assert storage.registry.peers() == before


HALF_IDENTITIES = [
    ('networks = ["10.0.0.1/8"]', "host bits"),
    ('client_cert = "abc"\ntls = true', "client_cert"),
    (f'client_cert = "{"0" * 64}"', "client_cert needs tls"),
    ('user = ""', "user name"),
    (f'passcode_hash = "{hash_passcode("geheim")}"', "passcode_hash needs user"),
    ('user = "u"\npasscode_hash = "geheim"', "a passcode hash looks like"),
    ('tls = "perhaps"', "tls"),
]


def test_a_site_file_with_half_an_identity_is_refused(shell: Run) -> None:
    for line, expected in HALF_IDENTITIES:
        Path("site.toml").write_text(f'[[peers]]\nae_title = "CT1"\nhost = "h"\nport = 104\nsends = true\n{line}\n', encoding="utf-8")
        code, _, errors = shell("registry", "import", "site.toml")
        assert (line, code) == (line, 2)
        assert expected in errors
    assert json.loads(shell("peer", "list", "--json")[1]) == []


def test_counters_are_printed_in_the_format_of_prometheus(shell: Run, storage: Storage) -> None:
    before = shell("metrics")[1]
    assert set(re.findall("^dicomnode_[a-z_]+", before, re.MULTILINE)) == {"dicomnode_intake_stopped_now", "dicomnode_free_bytes"}
    storage.counters.add(
        {"association rejected: network": 2, "connection refused: TLS handshake": 1, "association rejected: called AE title": 3}
    )
    storage.counters.add({"association rejected: network": 1, "restarts": 4})
    counted = shell("metrics")[1].partition("# HELP dicomnode_intake_stopped_now")[0]
    assert counted == (
        "# HELP dicomnode_association_rejected_total association rejected\n"
        "# TYPE dicomnode_association_rejected_total counter\n"
        'dicomnode_association_rejected_total{reason="called AE title"} 3\n'
        'dicomnode_association_rejected_total{reason="network"} 3\n'
        "# HELP dicomnode_connection_refused_total connection refused\n"
        "# TYPE dicomnode_connection_refused_total counter\n"
        'dicomnode_connection_refused_total{reason="TLS handshake"} 1\n'
        "# HELP dicomnode_restarts_total restarts\n"
        "# TYPE dicomnode_restarts_total counter\n"
        "dicomnode_restarts_total 4\n"
    )
    assert json.loads(shell("metrics", "--json")[1])[0] == {"name": "association rejected: called AE title", "count": 3}


def test_whatever_a_counter_is_called_its_line_is_one_line_of_the_format() -> None:
    text = exposition({'a\nb\\c: "quoted"\n\\': 1, "ÄÖ": 2, "x: y: z": 3})
    assert len(text.splitlines()) == 9
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{reason="([^"\\]|\\["\\n])*"\})? \d+', line), line
    assert r'{reason="\"quoted\"\n\\"} 1' in text


def configure(authority: Authority, name: str, port: int = 0, **issue: Any) -> Path:
    """Give the node of this folder a certificate."""
    identity = authority.issue(name, **issue)
    text = f'[tls]\nport = {port}\ncertificate = "{identity.certificate}"\nkey = "{identity.key}"\nca = "{authority.certificate}"\n'
    Path("dicomnode.toml").write_text(text, encoding="utf-8")
    return identity.key


def rows(shell: Run) -> dict[str, tuple[bool, str]]:
    return {row["what"]: (row["ok"], row["detail"]) for row in json.loads(shell("check", "--json")[1])}


def test_check_says_how_the_certificate_is(shell: Run, authority: Authority) -> None:
    assert not any(what.startswith("TLS") for what in rows(shell))
    assert shell("peer", "add", "CT1", "h", "104", "--sends", "--tls")[0] == 0
    ok, detail = rows(shell)["TLS certificate"]
    assert not ok
    assert "CT1" in detail
    configure(authority, "long")
    ok, detail = rows(shell)["TLS certificate"]
    assert ok
    assert "EXPIRES" not in detail
    configure(authority, "short", days=20)
    ok, detail = rows(shell)["TLS certificate"]
    assert ok
    assert "EXPIRES IN 19 DAYS" in detail
    configure(authority, "late", days=-1)
    assert not rows(shell)["TLS certificate"][0]
    key = configure(authority, "gone")
    key.unlink()
    ok, detail = rows(shell)["TLS certificate"]
    assert not ok
    assert "cannot be read" in detail


def test_check_calls_the_tls_port(shell: Run, authority: Authority) -> None:
    node = authority.issue("running")
    settings = authority.settings(node, handshake_seconds=60)
    listener = Listener(ListenerSection(port=0), ["DICOMNODE"], admit=lambda _: "calling AE title", receive=in_memory(print), tls=settings)
    listener.start()
    assert listener.tls_port
    port = listener.tls_port
    try:
        text = f'[tls]\nport = {port}\ncertificate = "{node.certificate}"\nkey = "{node.key}"\nca = "{authority.certificate}"\n'
        Path("dicomnode.toml").write_text(text, encoding="utf-8")
        assert rows(shell)["TLS port"] == (True, f"{LOOPBACK}:{port} answers with this certificate over TLSv1.3")
        configure(authority, "exchanged", port)
        ok, detail = rows(shell)["TLS port"]
        assert not ok
        assert "not the registered one" in detail
        configure(Authority(Path("other").absolute()), "foreign", port)
        assert not rows(shell)["TLS port"][0]
    finally:
        listener.stop(1)
    assert rows(shell)["TLS port"] == (True, f"nothing listens on {LOOPBACK}:{port} now")


def test_check_says_whether_dicomweb_answers_and_who_may_call_it(shell: Run, storage: Storage, authority: Authority) -> None:
    assert rows(shell)["DICOMweb"] == (True, "off: `serve` offers none, as [web] enabled is false")
    node, port = authority.issue("web"), free_port()
    client = EngineClient(load_settings(None).database_url)
    tls = f'[tls]\nport = 0\ncertificate = "{node.certificate}"\nkey = "{node.key}"\nca = "{authority.certificate}"\n'

    def configured(text: str, files: str = tls) -> tuple[bool, str]:
        Path("dicomnode.toml").write_text(f"{files}[web]\nenabled = true\nport = {port}\n{text}", encoding="utf-8")
        return rows(shell)["DICOMweb"]

    def served() -> Web:
        web = Web(load_settings(None), storage, client)
        web.start()
        return web

    free = f"nothing listens on {LOOPBACK}:{port} now, and it is free; "
    assert configured("") == (True, f"{free}whoever is on this machine may call")
    assert configured("credentials = true") == (False, "nobody may call: no peer has a passcode, or a certificate where web.tls is mutual")
    assert configured("tls = 'on'", "") == (False, "web.tls needs the certificate, key and ca of [tls]")
    for title, values in (("CARD", {"client_cert": node.sha256}), ("WORD", {"passcode_hash": hash_passcode("x")})):
        peer = Peer(ae_title=title, host="h", port=1, sends=True, receives=False, tls=True, **({"client_cert": None} | values))
        storage.registry.add_peer(peer)
    assert configured("host = '0.0.0.0'\n")[1].endswith("; WORD may call, WITHOUT TLS")
    with pytest.raises(NodeError, match="cannot be listened on: Cannot assign"):
        _is_free("192.0.2.1", port)  # nobody has it: RFC 5737
    assert configured("tls = 'mutual'\ncredentials = true") == (True, f"{free}CARD, WORD may call")
    web = served()
    try:
        assert rows(shell)["DICOMweb"] == (True, f"it answers by https at {LOOPBACK}:{port}; CARD, WORD may call")
        ok, detail = configured("")
        assert not ok
        assert f"{LOOPBACK}:{port} is in use and doesn't answer as the node's own DICOMweb" in detail
        node.key.unlink()
        assert configured("tls = 'on'")[0] is False
    finally:
        web.stop(1)
        client.close()
