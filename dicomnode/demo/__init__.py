"""The main job in one command: a simulated scanner sends studies to a real node, a simulated PACS takes the results.

The node is `dicomnode serve` as a process of its own with an empty SQLite store on free loopback ports; scanner and PACS
speak DIMSE to it. Nothing here analyses anything: what is shown is what the PACS received and what the node's records say.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dicomnode.config import ListenerSection
from dicomnode.demo.scanner import ScannedStudy, scan_folder, send_study
from dicomnode.demo.summary import show_summary, summarise, write_previews, write_summary
from dicomnode.dimse.listener import Listener
from dicomnode.dimse.negotiation import Caller
from dicomnode.dimse.scp import ReceivedInstance, part10_prefix
from dicomnode.dimse.scu import echo
from dicomnode.dimse.storing import in_memory
from dicomnode.errors import NodeError, UsageError
from dicomnode.phantoms.studies import write_demo_studies
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer, Route

NODE, SCANNER, PACS, LOOPBACK = "DEMONODE", "DEMOSCANNER", "DEMOPACS", "127.0.0.1"
QUIET_SECONDS = 1.0
START_SECONDS = 60.0
POLL_SECONDS = 0.2
SETTLED = {"done", "refused", "failed", "cancelled"}


def run_demo(
    source: Path | None, out: Path, timeout_seconds: float, console: Console, *, enable_packages: Callable[[Storage], Sequence[str]]
) -> int:
    """Run the demo, write DIR/pacs, DIR/preview and DIR/summary.json, print the table, and return the exit code.

    `enable_packages` puts the built-in packages into an empty registry and returns their names.

    Raises:
        UsageError: DIR holds something already, or the folder holds no DICOM.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: name another one with --out")
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory(prefix="dicomnode-demo-") as name, _progress(console) as say:
        work = Path(name)
        found = scan_folder(source) if source is not None else None  # a folder without DICOM is refused before anything is made
        (out / "pacs").mkdir(parents=True)
        (out / "preview").mkdir()
        pacs = _SimulatedPacs(out / "pacs")
        pacs.start()
        config, node = _configure(work)
        storage = _storage(work, pacs.port)
        with _running(config, out / "node.log"):
            say("starting the node, checking its packages" + ("" if found else ", drawing phantom studies"))
            with ThreadPoolExecutor(1) as beside:  # the check runs in a process of its own
                packages = beside.submit(enable_packages, storage)
                studies, not_sent = found or scan_folder(_drawn(work / "phantoms"))
                _add_routes(storage, packages.result())
            say("waiting for the node")
            _wait_until_up(node, deadline)
            for study in studies:
                say(f"sending study {study.study_instance_uid[-12:]} ({len(study.outgoing)} instances)")
                not_sent += send_study(study, node, calling_ae_title=SCANNER)
            finished = True
            for study in studies:
                say(f"waiting for study {study.study_instance_uid[-12:]}")
                finished &= _wait_until_settled(study, storage, deadline)
        say("drawing previews")
        summary = summarise(studies, not_sent, storage, finished=finished)
        write_previews(studies, storage, out)
        write_summary(summary, out)
        storage.database.close()
        pacs.stop()
        if not summary["exit"]:
            (out / "node.log").unlink()
    show_summary(summary, out, console)
    return int(summary["exit"])


class _SimulatedPacs:
    """A Storage SCP that writes each object it receives, as it came."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        settings = ListenerSection(host=LOOPBACK, port=0)
        self._listener = Listener(settings, [PACS], admit=_node_alone, receive=in_memory(self._store))

    @property
    def port(self) -> int:
        return self._listener.port

    def start(self) -> None:
        self._listener.start()

    def stop(self) -> None:
        self._listener.stop(5.0)

    def _store(self, received: ReceivedInstance) -> None:
        if not set(received.sop_instance_uid) <= set("0123456789."):
            raise NodeError("not a UID")
        (self._folder / f"{received.sop_instance_uid}.dcm").write_bytes(part10_prefix(received) + bytes(received.dataset))


def _node_alone(caller: Caller) -> str | None:
    return None if caller.calling_ae_title == NODE else "calling AE title"


def _drawn(folder: Path) -> Path:
    write_demo_studies(folder)
    return folder


def _configure(work: Path) -> tuple[Path, Peer]:
    """Write the node's configuration; return it and how the node is reached."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = int(probe.getsockname()[1])
    config = work / "dicomnode.toml"
    config.write_text(
        f'[node]\nae_title = "{NODE}"\ndata = "data"\n[listener]\nport = {port}\n[storage]\nreserve_bytes = 0\n'
        "[engine]\nretry_schedule_seconds = [1, 2, 4, 8, 16]\npoll_seconds = 0.2\n",
        encoding="utf-8",
    )
    return config, Peer(ae_title=NODE, host=LOOPBACK, port=port, sends=False, receives=True, tls=False, client_cert=None)


def _storage(work: Path, pacs_port: int) -> Storage:
    """The node's empty storage, with scanner and PACS as its peers."""
    url = f"sqlite:///{work / 'data' / 'dicomnode.sqlite'}"
    prepare_storage(url, work / "data")
    storage = open_storage(url, work / "data")
    storage.registry.add_peer(Peer(ae_title=SCANNER, host=LOOPBACK, port=104, sends=True, receives=False, tls=False, client_cert=None))
    storage.registry.add_peer(Peer(ae_title=PACS, host=LOOPBACK, port=pacs_port, sends=False, receives=True, tls=False, client_cert=None))
    return storage


def _add_routes(storage: Storage, packages: Sequence[str]) -> None:
    for package in packages:
        storage.registry.add_route(
            Route(
                name=package, from_ae_title=SCANNER, called_ae_title=NODE, package=package, version=None, to_ae_titles=(PACS,),
                priority=None, quiet_seconds=QUIET_SECONDS, report_refusals=False, longest_wait_seconds=0.0,
            )
        )  # fmt: skip


@contextmanager
def _running(config: Path, log: Path) -> Iterator[None]:
    """`dicomnode serve` as a process, drained at the end."""
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "dicomnode", "serve", "--config", str(config)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)  # noqa: S603  # our own interpreter and paths
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_up(node: Peer, deadline: float) -> None:
    until = min(deadline, time.monotonic() + START_SECONDS)
    while True:
        try:
            socket.create_connection((node.host, node.port), timeout=1).close()
        except OSError as error:
            if time.monotonic() > until:
                raise NodeError(f"the node did not start: {error}") from error
            time.sleep(POLL_SECONDS)
        else:
            echo(node, calling_ae_title=SCANNER)
            return


def _wait_until_settled(study: ScannedStudy, storage: Storage, deadline: float) -> bool:
    """Wait until the study's last revision is closed and each of its jobs has ended; False if the time ran out."""
    if not study.images_accepted:
        return True  # nothing that makes a revision arrived
    while time.monotonic() < deadline:
        known = storage.index.study(study.study_instance_uid)
        jobs = storage.jobs.jobs(study_instance_uid=study.study_instance_uid)
        if known is not None and known.state == "closed" and all(job.state in SETTLED for job in jobs):
            study.settled_at = max((job.ended_at for job in jobs if job.ended_at), default=datetime.now(UTC))
            return True
        time.sleep(POLL_SECONDS)
    return False


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("starting")
        yield lambda text: progress.update(task, description=text)
