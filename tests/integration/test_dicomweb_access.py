"""Who may call the web role, and how it runs."""

from __future__ import annotations

import base64
import http.client
import os
import signal
import ssl
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import a_dataset

from certificates import Authority, Identity
from dicomnode.admission import hash_passcode
from dicomnode.cli import node, run
from dicomnode.errors import ConfigError
from dicomweb_site import HOST, PATIENCE_SECONDS, RELATED, Site, body_of, file_of, serving
from pacs import free_port, tail, wait_until
from storage.records import Peer


def a_peer(ae_title: str, passcode: str | None = None, **values: Any) -> Peer:
    known = {"sends": True, "receives": False, "tls": False, "client_cert": None, "host": HOST, "port": 104}
    return Peer(ae_title=ae_title, passcode_hash=hash_passcode(passcode) if passcode else None, **(known | values))


def basic(user: str, passcode: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{passcode}'.encode()).decode()}"


def test_who_is_no_known_peer_gets_nothing_where_credentials_are_asked_for(tmp_path: Path) -> None:
    peers = (
        a_peer("MODALITY", "s3cret", queries=False),
        a_peer("VIEWER", "pässword", user="reader", sends=False, receives=True),
        a_peer("ELSEWHERE", "s3cret", networks=("192.0.2.0/24",)),
        a_peer("OPEN"),
    )
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", *peers, credentials=True) as site:
        image = body_of(file_of(a_dataset()))

        def asked(header: str | None) -> tuple[int, int]:
            named = {} if header is None else {"Authorization": header}
            stored = site.request("POST", "/dicom-web/studies", image, Content_Type=RELATED, **named)[0]
            return stored, site.get("/studies", **named)[0]

        for header in (
            None,
            "Basic",
            "Basic !",
            "Bearer x",
            basic("MODALITY", "wrong"),
            basic("VIEWER", "pässword"),
            basic("ELSEWHERE", "s3cret"),
            basic("OPEN", ""),
            basic("NOBODY", "x"),
        ):
            assert asked(header) == (401, 401), header
        assert site.get("/studies")[1]["www-authenticate"].startswith("Basic ")
        assert asked(basic("reader", "pässword")) == (403, 204)
        for _ in range(2):  # the second time from memory
            assert asked(basic("MODALITY", "s3cret")) == (200, 403)
        assert site.storage.index.callers("1.2.3.4") == [("MODALITY", "DICOMNODE")]
        site.storage.registry.add_peer(a_peer("MODALITY", "changed"))
        assert asked(basic("MODALITY", "s3cret")) == (401, 401), "a changed passcode holds from the next request on"
        assert site.get("/studies", Authorization=basic("reader", "pässword"))[0] == 200
        assert site.request("GET", "/health")[0] == 200


def test_a_page_of_another_name_cannot_ask_the_node_of_its_reader(small: Site) -> None:
    assert small.get("/studies", Host="rebound.example")[0] == 403
    assert small.get("/studies", Host=f"LOCALHOST:{small.web.port}")[0] == 204
    assert "access-control-allow-origin" not in small.get("/studies", Origin="https://elsewhere.example")[1]


def test_pages_of_known_origins_may_ask(tmp_path: Path) -> None:
    known = {"origins": ("https://ohif.example",), "address": "https://pacs.example/node/"}
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", **known) as site:
        status, answer = site.stow(file_of(a_dataset()))
        assert status == 200
        assert isinstance(answer, dict)
        assert answer["00081190"]["Value"] == ["https://pacs.example/node/dicom-web/studies/1.2.3.4"]
        assert site.get("/studies", Origin="https://ohif.example")[1]["access-control-allow-origin"] == "https://ohif.example"
        assert "access-control-allow-origin" not in site.get("/studies", Origin="https://elsewhere.example")[1]


RUN_WEB = """
import os, sys, threading
sys.argv = ["dicomnode", "run", "web"]
from dicomnode.cli import node
started = node._start_web
def start(*arguments):
    stop = started(*arguments)
    print("LOADED", sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "monai", "highdicom"}), flush=True)
    return stop
node._start_web = start
from dicomnode.cli import main
main()
"""


def test_the_role_runs_by_itself_loads_no_network_and_drains(tmp_path: Path) -> None:
    port = free_port()
    configuration = tmp_path / "dicomnode.toml"
    configuration.write_text(f"[web]\nport = {port}\n[listener]\nport = {free_port()}\n", encoding="utf-8")
    log = tmp_path / "web.log"
    with log.open("wb") as output:
        command = [sys.executable, "-c", RUN_WEB]
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "DICOMNODE_CONFIG": str(configuration)})
    try:

        def up() -> bool:
            assert process.poll() is None, tail(log)
            connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE_SECONDS)
            with closing(connection), suppress(OSError):
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            return False

        wait_until(up, seconds=PATIENCE_SECONDS, what="the web role to listen", log=log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0, tail(log)
    finally:
        process.kill()
        process.wait()
    assert "LOADED []" in log.read_text(encoding="utf-8")


def test_beyond_loopback_nobody_is_let_in_without_credentials(tmp_path: Path) -> None:
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", a_peer("VIEWER", "s3cret"), host="0.0.0.0") as site:
        assert site.get("/studies")[0] == 401
        assert site.get("/studies", Authorization=basic("VIEWER", "s3cret"))[0] == 204


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.mark.parametrize("mode", ["on", "mutual"])
def test_over_tls_a_certificate_stands_for_its_peer(tmp_path: Path, authority: Authority, mode: str) -> None:
    node, viewer, other = (authority.issue(f"{name} {mode}") for name in ("node", "viewer", "other"))
    known = a_peer("VIEWER", tls=True, client_cert=viewer.sha256), a_peer("READER", "s3cret")
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"

    def status(port: int, shown: Identity | None, **headers: str) -> int | str:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        if shown is not None:
            context.load_cert_chain(shown.certificate, shown.key)
        connection = http.client.HTTPSConnection(HOST, port, context=context, timeout=PATIENCE_SECONDS)
        try:
            with closing(connection):
                connection.request("GET", "/dicom-web/studies", headers=headers)
                return connection.getresponse().status
        except (ssl.SSLError, ConnectionError):
            return "no connection"

    with serving(tmp_path, url, *known, certificates=authority.settings(node), credentials=True, tls=mode) as site:
        passcode = {"Authorization": basic("READER", "s3cret")}
        asked = mode == "mutual"  # else no certificate is asked for, so none is seen
        assert status(site.web.port, viewer) == (204 if asked else 401)
        assert status(site.web.port, None) == ("no connection" if asked else 401)
        assert status(site.web.port, other) == 401
        assert status(site.web.port, other, **passcode) == 204
        assert status(site.web.port, None, **passcode) == ("no connection" if asked else 204)
        with pytest.raises((OSError, http.client.HTTPException)):
            site.get("/studies")


def test_tls_without_a_certificate_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"web\.tls needs"), serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", tls="on"):
        pass


@pytest.mark.parametrize("enabled", [False, True])
def test_serve_runs_the_role_where_it_is_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    configuration = tmp_path / "dicomnode.toml"
    configuration.write_text(f"[web]\nenabled = {str(enabled).lower()}\n", encoding="utf-8")
    roles: list[str] = []
    monkeypatch.setattr(node, "_supervise", lambda _settings, _config, *served: roles.extend(served) or 0)
    assert run(["serve", "--config", str(configuration)]) == 0
    assert ("web" in roles) is enabled
