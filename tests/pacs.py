"""The programs that system tests talk to, each as a process of its own on loopback: Orthanc, DCMTK's tools and the node.

Every process is started with a log in the test's folder and ended by its own process id.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydicom import Dataset, dcmread

from dicomnode.cli import run
from dicomnode.dimse.scu import echo
from dicomnode.errors import PeerUnavailable
from storage.records import Peer

LOOPBACK = "127.0.0.1"
NODE_AET = "DICOMNODE"
ORTHANC_AET = "ORTHANC"
SCANNER_AET = "SCANNER"
WORKSTATION_AET = "WORKST"
DCMQRSCP_AET = "DCMQRSCP"
PATIENCE_SECONDS = 240.0  # how long a test waits for what happens at once on an idle machine; nothing is measured by it
TEST_PORTS = (20000, 32000)  # outgoing connections begin at 32768 (/proc/sys/net/ipv4/ip_local_port_range)
# Debian's DCMTK and Orthanc leave Nagle's algorithm on, which costs 44 ms an image.
QUICK = {"TCP_NODELAY": "1"}

# Sends each stable CT series to the node, but nothing that came from the node.
ROUTING_SCRIPT = f"""
function OnStableSeries(seriesId, tags, metadata)
  if tags['Modality'] == 'CT' and metadata['RemoteAET'] ~= '{NODE_AET}' then
    RestApiPost('/modalities/node/store', DumpJson({{ Resources = {{ seriesId }}, Asynchronous = true }}))
  end
end
"""


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A web server on a free port of this machine; its address."""
    server = ThreadingHTTPServer((LOOPBACK, free_port()), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def free_port() -> int:
    """Return a TCP port of the loopback address that is free now and that no other test is given while this process lives.

    The kernel's own choice would not do: until the server under test listens there, any connection on its way out may take it.
    So it lies below the ports of outgoing connections, and a socket by its name in Linux's abstract namespace reserves it.
    """
    while True:
        port = random.SystemRandom().randrange(*TEST_PORTS)  # the plain generator has the same seed in every worker
        reservation = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                reservation.bind(f"\0dicomnode tests: port {port}")
                probe.bind((LOOPBACK, port))
            except OSError:
                reservation.close()
                continue
        reservation.detach()  # its file descriptor stays open as long as this process
        return port


def program(name: str, package: str) -> str:
    """Return the path of an installed program, or skip the test and say which package of Debian has it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install {package})")
    return path


def wait_until(
    condition: Callable[[], bool], *, seconds: float = PATIENCE_SECONDS, what: str, log: Path | None = None, every: float = 0.1
) -> None:
    """Poll until `condition` holds, or fail with `what` was awaited and the end of `log`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain for {what}\n{tail(log)}")
        time.sleep(every)


def tail(log: Path | None, lines: int = 40) -> str:
    """Return the last lines of a log file."""
    if log is None or not log.exists():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@contextmanager
def logs_kept() -> Iterator[None]:
    """Undo what a command that runs in this process does to the logs."""
    root, pydicom, configuration = logging.root.handlers[:], logging.getLogger("pydicom").level, structlog.get_config()
    try:
        yield
    finally:
        logging.root.handlers[:] = root
        logging.getLogger("pydicom").setLevel(pydicom)
        structlog.configure(**configuration)


@contextmanager
def running(command: Sequence[str | Path], *, log: Path, environment: Mapping[str, str] = {}) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside the test; end it by SIGTERM, after half a minute by SIGKILL."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, kw_only=True)
class Orthanc:
    """A running Orthanc: a PACS that nobody here wrote."""

    dicom_port: int
    http_port: int
    log: Path

    @property
    def peer(self) -> Peer:
        """Orthanc as the node's registry would name it."""
        return loopback_peer(ORTHANC_AET, self.dicom_port)

    def get(self, path: str) -> Any:
        """GET a resource of its REST API."""
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.http_port}{path}", timeout=PATIENCE_SECONDS) as response:
            return json.load(response)

    def post(self, path: str, body: object) -> Any:
        """POST to its REST API and return the answer."""
        request = urllib.request.Request(f"http://{LOOPBACK}:{self.http_port}{path}", data=json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            return json.load(response)

    def study_id(self, study_instance_uid: str) -> str:
        """Return Orthanc's own identifier of a study."""
        (found,) = self.post("/tools/find", {"Level": "Study", "Query": {"StudyInstanceUID": study_instance_uid}})
        return str(found)

    def find_series(self, study_instance_uid: str, folder: Path) -> list[Dataset]:
        """C-FIND the series of a study with DCMTK's findscu and return the answers."""
        folder.mkdir()
        keys = ["QueryRetrieveLevel=SERIES", f"StudyInstanceUID={study_instance_uid}", "SeriesInstanceUID", "Modality", "SeriesDescription"]
        subprocess.run(
            [program("findscu", "dcmtk"), "-S", "-X", "-od", folder, "-aet", WORKSTATION_AET, "-aec", ORTHANC_AET]
            + [word for key in keys for word in ("-k", key)]
            + [LOOPBACK, str(self.dicom_port)],
            check=True,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
        )
        return [dcmread(file, force=True) for file in sorted(folder.iterdir())]


def loopback_peer(ae_title: str, port: int) -> Peer:
    """Return a peer on this machine that sends and receives."""
    return Peer(ae_title=ae_title, host=LOOPBACK, port=port, sends=True, receives=True, tls=False, client_cert=None)


@contextmanager
def orthanc(folder: Path, *, node_port: int, settings: Mapping[str, Any] = {}) -> Iterator[Orthanc]:
    """Run Orthanc with an empty store that sends each stable CT series to the node on `node_port`; `settings` go before its own."""
    command = program("Orthanc", "orthanc")
    folder.mkdir()
    script = folder / "route.lua"
    script.write_text(ROUTING_SCRIPT, encoding="utf-8")
    server = Orthanc(dicom_port=free_port(), http_port=free_port(), log=folder / "orthanc.log")
    configuration = {
        "Name": "PACS",
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "DicomAet": ORTHANC_AET,
        "DicomPort": server.dicom_port,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": True,
        "HttpPort": server.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "StableAge": 1,
        "OverwriteInstances": False,
        "SaveJobs": False,
        "DicomModalities": {
            "node": {"AET": NODE_AET, "Host": LOOPBACK, "Port": node_port},
            "workstation": {"AET": WORKSTATION_AET, "Host": LOOPBACK, "Port": free_port()},
        },
        "LuaScripts": [str(script)],
        **settings,
    }
    file = folder / "orthanc.json"
    file.write_text(json.dumps(configuration), encoding="utf-8")

    def answers() -> bool:
        try:
            return "Version" in server.get("/system")
        except OSError:
            return False

    with running([command, file], log=server.log, environment=QUICK):
        wait_until(answers, what="Orthanc to start", log=server.log)
        yield server


@contextmanager
def storescp(folder: Path, *, ae_title: str) -> Iterator[Peer]:
    """Run DCMTK's storescp, a PACS that writes what it receives to `folder` bit by bit."""
    command = program("storescp", "dcmtk")
    folder.mkdir(parents=True)
    peer = loopback_peer(ae_title, free_port())
    log = folder.with_suffix(".log")
    with running([command, "--aetitle", ae_title, "+B", "+xa", "-od", folder, str(peer.port)], log=log, environment=QUICK):
        wait_until(lambda: listens(peer), what="storescp to listen", log=log)
        yield peer


@contextmanager
def dcmqrscp(folder: Path, *, known: Sequence[Peer] = ()) -> Iterator[Peer]:
    """Run DCMTK's dcmqrscp, a PACS that answers C-STORE, C-FIND, C-MOVE and C-GET; it moves to the peers that are `known` to it."""
    command = program("dcmqrscp", "dcmtk")
    (folder / DCMQRSCP_AET).mkdir(parents=True)
    peer = loopback_peer(DCMQRSCP_AET, free_port())
    hosts = [f"host{number} = ({other.ae_title}, {other.host}, {other.port})" for number, other in enumerate(known)]
    lines = [
        f"NetworkTCPPort = {peer.port}", "MaxPDUSize = 16384", "MaxAssociations = 16",
        "HostTable BEGIN", *hosts, "HostTable END", "VendorTable BEGIN", "VendorTable END",
        "AETable BEGIN", f"{DCMQRSCP_AET} {folder / DCMQRSCP_AET} RW (200, 1024mb) ANY", "AETable END",
    ]  # fmt: skip
    file, log = folder / "dcmqrscp.cfg", folder / "dcmqrscp.log"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with running([command, "--config", file], log=log, environment=QUICK):
        wait_until(lambda: listens(peer), what="dcmqrscp to listen", log=log)
        yield peer


def listens(peer: Peer) -> bool:
    """Whether the peer answers a C-ECHO from the scanner."""
    # A connection that is refused leaves pynetdicom with an unclosed socket, and one that says nothing keeps a listener waiting.
    sockets = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()]
    if not any(words[1].endswith(f":{peer.port:04X}") and words[3] == "0A" for words in sockets):
        return False
    try:
        echo(peer, calling_ae_title=SCANNER_AET)
    except PeerUnavailable:
        return False
    return True


def storescu(peer: Peer, *paths: Path) -> None:
    """Send files and folders with DCMTK's storescu as the scanner does; fail unless each is answered with Success."""
    subprocess.run(
        [program("storescu", "dcmtk"), "-R", "-aet", SCANNER_AET, "-aec", peer.ae_title, "+sd", "+r", peer.host, str(peer.port), *paths],
        check=True,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        env={**os.environ, **QUICK},
    )


class Node:
    """A node of this project: its folder, its configuration and, between `start` and `stop`, its `dicomnode serve` process."""

    def __init__(self, folder: Path, database_url: str | None = None) -> None:
        folder.mkdir()
        self.folder = folder
        self.port = free_port()
        self.log = folder / "node.log"
        self.configuration = folder / "dicomnode.toml"
        self._process: subprocess.Popen[bytes] | None = None
        database = f'database_url = "{database_url}"' if database_url else ""
        self.configuration.write_text(
            f"""
[node]
ae_title = "{NODE_AET}"
[listener]
port = {self.port}
[storage]
{database}
reserve_bytes = 1000000
[engine]
poll_seconds = 0.1
retry_schedule_seconds = [0.2, 0.5, 1, 2, 5]
[analysis]
device = "cpu"
threads = 1
""",
            encoding="utf-8",
        )

    @property
    def peer(self) -> Peer:
        """The node as its peers see it."""
        return loopback_peer(NODE_AET, self.port)

    def cli(self, *words: str | int | Path) -> str:
        """Run a command of `dicomnode` with this node's configuration and return what it printed; fail unless it exits with 0.

        It runs in this process: that the executable does the same is for test_cli to say, and a start of it takes a second.
        """
        output, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(errors), logs_kept(), warnings.catch_warnings():
            code = run([*map(str, words), "--config", str(self.configuration)])
        assert code == 0, f"{' '.join(map(str, words))} ended with {code}\n{output.getvalue()}\n{errors.getvalue()}"
        return output.getvalue()

    def listing(self, *words: str) -> list[dict[str, Any]]:
        """Run a listing command with --json."""
        rows: list[dict[str, Any]] = json.loads(self.cli(*words, "--json"))
        return rows

    def start(self) -> None:
        """Start `dicomnode serve` and wait until it answers a C-ECHO of the scanner, which must be among its peers."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dicomnode", "serve", "--config", self.configuration],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

        def ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"dicomnode serve ended with {self._process.returncode}\n{tail(self.log)}"
            return listens(self.peer)

        wait_until(ready, what="the node to listen", log=self.log)

    def stop(self) -> None:
        """Send SIGTERM and wait; fail unless the node drains and exits with 0."""
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"dicomnode serve did not end in time after SIGTERM\n{tail(self.log)}")
        assert code == 0, f"dicomnode serve ended with {code}\n{tail(self.log)}"

    def roles(self) -> list[int]:
        """The process ids of the roles that `dicomnode serve` started."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(word) for word in children.read_text(encoding="ascii").split()]

    def kill(self) -> None:
        """Send SIGKILL to `dicomnode serve` alone."""
        assert self._process is not None
        process, self._process = self._process, None
        process.kill()
        process.wait()

    def close(self) -> None:
        """End a process that the test left behind with the roles it started, without judging it."""
        if self._process is None or self._process.poll() is not None:
            return
        roles = self.roles()
        self.kill()
        for role in roles:
            with suppress(ProcessLookupError):
                os.kill(role, signal.SIGKILL)
