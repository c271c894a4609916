"""The programs that are measured, each a process of its own with an empty folder on one disk.

What each has acknowledged is compared byte for byte with what was sent, data set against data set. Nothing is removed before the
end: for minutes after a deletion ext4 searches longer for each inode of a new file, up to half a millisecond.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dimse_cases import split_part10
from replay import CALLING_AET, Image, answers

from dicomnode.config import load_settings
from pacs import LOOPBACK, NODE_AET, ORTHANC_AET, QUICK, free_port, program, running, wait_until
from storage import open_storage

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0


class Altered(Exception):
    """An acknowledged image is absent or not what was sent."""


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """A running receiver."""

    name: str
    port: int
    called: str | None  # its AE title; None: it speaks no DICOM
    nodelay: bool  # whether it sets TCP_NODELAY: DCMTK and Orthanc don't unless their environment says so
    promises: str  # what it has done when it answers
    check: Callable[[Sequence[Image]], None]  # compare these images, acknowledged since the last check; raises Altered
    log: Path


@contextmanager
def raw(folder: Path) -> Iterator[Receiver]:
    """The limit: TCP, write, fsync of file and folder, in one thread."""

    checked = 0

    def check(images: Sequence[Image]) -> None:
        nonlocal checked
        for image, file in zip(images, sorted(folder.glob("*.bin"))[checked:], strict=True):
            _compare(image, file.read_bytes())
        checked += len(images)

    port = free_port()
    promises = "file and folder synced; no DICOM, no index"
    with _running("limit", port, None, [sys.executable, _PLAIN, "raw", str(port), folder], folder):
        yield Receiver(name="limit", port=port, called=None, nodelay=True, promises=promises, check=check, log=_log(folder))


@contextmanager
def save_as(folder: Path) -> Iterator[Receiver]:
    """pynetdicom's threaded server with `event.dataset.save_as`."""
    port, called = free_port(), "PYNETDICOM"
    with _running("pynetdicom", port, called, [sys.executable, _PLAIN, "save_as", str(port), folder], folder):
        check = _files(folder, "{}.dcm")
        # It sends each response in one piece, so that Nagle's algorithm, which it leaves on, delays nothing.
        yield Receiver(
            name="pynetdicom save_as",
            port=port,
            called=called,
            nodelay=False,
            promises="nothing synced, no index",
            check=check,
            log=_log(folder),
        )


@contextmanager
def storescp(folder: Path, *, nodelay: bool) -> Iterator[Receiver]:
    """DCMTK's storescp, which writes what it receives bit by bit, in a process for each association."""
    port, called = free_port(), "STORESCP"
    command = [program("storescp", "dcmtk"), "--fork", "+B", "--aetitle", called, "-od", folder, str(port)]
    with _running("storescp", port, called, command, folder, environment=QUICK if nodelay else {}):
        check = _files(folder, "CT.{}")
        yield Receiver(
            name="storescp --fork",
            port=port,
            called=called,
            nodelay=nodelay,
            promises="nothing synced, no index",
            check=check,
            log=_log(folder),
        )


@contextmanager
def orthanc(folder: Path, *, nodelay: bool) -> Iterator[Receiver]:
    """Orthanc with SyncStorageArea, its own index on SQLite and no plugin."""
    port, http = free_port(), free_port()
    configuration = {
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "StorageCompression": False,
        "SyncStorageArea": True,
        "OverwriteInstances": True,
        "DicomAet": ORTHANC_AET,
        "DicomPort": port,
        "DicomAlwaysAllowStore": True,
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "SaveJobs": False,
    }
    file = folder / "orthanc.json"
    file.write_text(json.dumps(configuration), encoding="utf-8")

    def ask(path: str, body: str | None = None) -> bytes:
        request = urllib.request.Request(f"http://{LOOPBACK}:{http}{path}", data=body.encode() if body else None)
        with urllib.request.urlopen(request, timeout=60) as response:
            return bytes(response.read())

    def resource(uid: str) -> str:
        found = json.loads(ask("/tools/lookup", uid))
        if len(found) != 1:
            raise Altered(f"Orthanc knows {len(found)} resources with the UID {uid}")
        return str(found[0]["Path"])

    def check(images: Sequence[Image]) -> None:
        for image in images:
            _compare(image, split_part10(ask(f"{resource(image.sop_instance_uid)}/file"))[1])

    environment = QUICK if nodelay else {}
    promises = "file synced by fdatasync, index on SQLite"
    with _running("Orthanc", port, ORTHANC_AET, [program("Orthanc", "orthanc"), file], folder, environment=environment):
        yield Receiver(name="Orthanc", port=port, called=ORTHANC_AET, nodelay=nodelay, promises=promises, check=check, log=_log(folder))


@contextmanager
def node(folder: Path, *, processes: int) -> Iterator[Receiver]:
    """The node's receiver role on a fresh SQLite store, the sender among its peers, everything else as it ships."""
    port = free_port()
    file = folder / "dicomnode.toml"
    file.write_text(f'[node]\nae_title = "{NODE_AET}"\n[listener]\nport = {port}\nprocesses = {processes}\n', encoding="utf-8")
    dicomnode = [sys.executable, "-m", "dicomnode"]
    with running(
        [*dicomnode, "peer", "add", CALLING_AET, LOOPBACK, "104", "--sends", "--config", file], log=folder / "peer.log"
    ) as process:
        if process.wait(START_SECONDS):
            raise RuntimeError((folder / "peer.log").read_text(encoding="utf-8"))
    settings = load_settings(file)

    def check(images: Sequence[Image]) -> None:
        storage = open_storage(settings.database_url, settings.data_folder)
        try:
            for image in images:
                instance = storage.index.find(image.sop_instance_uid)
                if instance is None:
                    raise Altered(f"the index does not know {image.sop_instance_uid}")
                _compare(image, split_part10(storage.objects.read(instance.stored.object_id))[1])
        finally:
            storage.database.close()

    name = f"node, {processes} process" + "es" * (processes > 1)
    promises = "file and folder synced, row committed with full sync"
    with _running(name, port, NODE_AET, [*dicomnode, "run", "receiver", "--config", file], folder):
        yield Receiver(name=name, port=port, called=NODE_AET, nodelay=True, promises=promises, check=check, log=_log(folder))


# Every receiver by the name it has on the command line.
RECEIVERS: Mapping[str, tuple[Callable[[Path], AbstractContextManager[Receiver]], ...]] = {
    "limit": (raw,),
    "pynetdicom": (save_as,),
    "storescp": (lambda folder: storescp(folder, nodelay=True), lambda folder: storescp(folder, nodelay=False)),
    "orthanc": (lambda folder: orthanc(folder, nodelay=True), lambda folder: orthanc(folder, nodelay=False)),
    "node": (lambda folder: node(folder, processes=1),),
    "node2": (lambda folder: node(folder, processes=2),),
}
_PLAIN = Path(__file__).with_name("plain_receivers.py")
_THIS_TREE = {"PYTHONPATH": str(ROOT)}


@contextmanager
def _running(
    name: str, port: int, called: str | None, command: Sequence[str | Path], folder: Path, *, environment: Mapping[str, str] = {}
) -> Iterator[None]:
    """Run a receiver until it has accepted something and the block is left; its log lies beside its folder."""
    log = _log(folder)
    with running(command, log=log, environment={**_THIS_TREE, **environment}):
        wait_until(lambda: answers(port, called), seconds=START_SECONDS, what=f"{name} to answer", log=log)
        yield


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _files(folder: Path, pattern: str) -> Callable[[Sequence[Image]], None]:
    """Return the check of a receiver that names its files by their SOP Instance UID."""

    def check(images: Sequence[Image]) -> None:
        for image in images:
            file = folder / pattern.format(image.sop_instance_uid)
            if not file.exists():
                raise Altered(f"{file} is absent")
            _compare(image, split_part10(file.read_bytes())[1])

    return check


def _compare(image: Image, dataset: bytes) -> None:
    if dataset != image.dataset:
        raise Altered(f"the data set of {image.sop_instance_uid} differs from what was sent")
