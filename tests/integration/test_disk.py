"""The disk: the order in which an image becomes safe, and what happens when there is no room for it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import raw_dicom as raw
from raw_dicom import Connection, Image, association
from receiver_process import ReceiverProcess, assert_no_stray_file, assert_stored, images, receiver_process, scanner

from pacs import program, tail, wait_until
from storage import Storage, open_storage

OUT_OF_RESOURCES = 0xA700
DISK_BYTES = 6 * 2**20
IMAGE_BYTES = 256 * 1024

# The order


@dataclass(frozen=True)
class Call:
    """One system call: where it begins and ends in the trace, and what it did."""

    thread: str
    name: str
    text: str
    begin: int
    end: int

    @property
    def succeeded(self) -> bool:
        return re.search(r"= -\d", self.text) is None


def calls(trace: str) -> list[Call]:
    """The system calls of strace's output; one that is interrupted by another thread's has two lines."""
    found: list[Call] = []
    begun: dict[tuple[str, str], tuple[int, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        if resumed := re.match(r"(\d+) +<\.\.\. (\w+) resumed>(.*)", line):
            thread, name, rest = resumed.groups()
            begin, start = begun.pop((thread, name))
            found.append(Call(thread, name, start + rest, begin, number))
        elif whole := re.match(r"(\d+) +(\w+)\((.*)", line):
            thread, name, rest = whole.groups()
            if rest.endswith("<unfinished ...>"):
                begun[thread, name] = (number, rest.removesuffix("<unfinished ...>"))
            else:
                found.append(Call(thread, name, rest, number, number))
    return sorted(found, key=lambda call: call.begin)


@contextmanager
def traced(receiver: ReceiverProcess, output: Path) -> Iterator[None]:
    """Let strace follow every thread of a receiver."""
    log = output.with_suffix(".log")
    syscalls = "openat,mkdir,mkdirat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg"
    pids = [word for pid in receiver.pids() for word in ("-p", str(pid))]
    with log.open("wb") as errors:
        strace = subprocess.Popen(
            [program("strace", "strace"), "-f", "-y", "-s", "8", "-e", f"trace={syscalls}", "-o", output, *pids], stderr=errors
        )
    try:
        wait_until(lambda: "attached" in tail(log) or strace.poll() is not None, what="strace to attach", log=log, every=0.05)
        if strace.poll() is not None:
            pytest.skip(f"strace may not attach here: {tail(log)}")
        yield
    finally:
        if strace.poll() is None:
            strace.send_signal(signal.SIGINT)
        strace.wait(120)


@pytest.mark.system
def test_each_step_of_an_image_s_way_ends_before_the_next_begins(tmp_path: Path) -> None:
    study = images(4, pixel_bytes=100_000)
    output = tmp_path / "trace.txt"
    with receiver_process(tmp_path / "node", scanner()) as receiver:
        with association(receiver.port) as connection:
            assert connection.store(study[0]).status == 0  # the folder of the day is made, and the writer's
            with traced(receiver, output):
                for image in study[1:]:
                    assert connection.store(image).status == 0
            connection.release()
        with receiver.storage() as storage:
            files = [str(storage.objects.path(storage.index.find(image.sop_instance_uid).stored.object_id)) for image in study[1:]]  # type: ignore[union-attr]
    trace = [call for call in calls(output.read_text(encoding="utf-8")) if call.succeeded]
    previous = -1
    for final in files:
        [renamed] = [call for call in trace if call.name.startswith("rename") and f'"{final}"' in call.text]
        mine = [call for call in trace if call.thread == renamed.thread and call.begin > previous]  # the node's leases are written too
        [temporary] = re.findall(r'"([^"]+\.part)"', renamed.text)
        written = [call for call in mine if call.name in {"write", "pwrite64", "writev"} and f"<{temporary}>" in call.text]
        synced = only(call for call in mine if "sync" in call.name and f"<{temporary}>" in call.text)
        after = [call for call in mine if call.begin > renamed.end]
        folder_synced = first(call for call in after if call.name == "fsync" and f"<{Path(final).parent}>" in call.text)
        answered = first(call for call in after if call.name in {"sendto", "sendmsg"} and "socket:" in call.text)
        logged = [call for call in mine if call.name == "pwrite64" and "-wal>" in call.text and call.begin < answered.begin]
        log_synced = first(call for call in mine if "sync" in call.name and "-wal>" in call.text and call.begin > logged[-1].end)
        assert len(written) >= 2
        order = [previous, written[0].begin, written[-1].end, synced.begin, synced.end, renamed.begin, renamed.end]
        order += [folder_synced.begin, folder_synced.end, logged[0].begin, logged[-1].end, log_synced.begin, log_synced.end]
        order += [answered.begin]
        assert order == sorted(order), order
        previous = answered.begin


def only(found: Iterator[Call]) -> Call:
    [call] = found
    return call


def first(found: Iterator[Call]) -> Call:
    return next(found)


# A small disk


def small_disk(folder: Path) -> list[str]:
    """Words that run a command with a small file system of its own on `folder`, which vanishes with it."""
    unshare = program("unshare", "util-linux")
    namespace = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    script = f'mount -t tmpfs -o size={DISK_BYTES} small "{folder}" && exec "$@"'
    words = [unshare, *namespace, "sh", "-c", script, "sh"]
    probe = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=120, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {probe.stderr}")
    return words


class SmallDisk:
    """A receiver whose data folder is a file system of 6 MiB that nobody else sees, but for /proc."""

    def __init__(self, receiver: ReceiverProcess) -> None:
        assert receiver.process is not None
        self.receiver = receiver
        self.folder = Path(f"/proc/{receiver.process.pid}/root{receiver.settings.data_folder}")
        self.filler = self.folder / "filler"

    @contextmanager
    def kept(self) -> Iterator[tuple[Storage, Path]]:
        """What it keeps, as a copy: SQLite resolves the link in /proc, and would open the file that the disk has covered."""
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name, "data")
            shutil.copytree(self.folder, copy)
            url = self.receiver.settings.database_url.replace(str(self.receiver.settings.data_folder), str(copy))
            storage = open_storage(url, copy)
            try:
                yield storage, copy
            finally:
                storage.database.close()

    def assert_keeps(self, sent: Sequence[Image], acknowledged: set[str]) -> None:
        """Fail unless exactly what was acknowledged is stored, whole, and nothing else lies on the disk."""
        with self.kept() as (storage, folder):
            assert_stored(storage, [image for image in sent if image.sop_instance_uid in acknowledged], only=True)
            assert_no_stray_file(storage, folder)


@contextmanager
def receiver_on_small_disk(folder: Path, *, database: str, reserve_bytes: int) -> Iterator[SmallDisk]:
    data = folder / "node" / "data"
    data.mkdir(parents=True)
    words = small_disk(data)
    sections = {"node": {"ae_title": "DICOMNODE"}, "storage": {"reserve_bytes": reserve_bytes}}
    if database == "elsewhere":
        sections["storage"]["database_url"] = f"sqlite:///{folder / 'index.sqlite'}"
        with receiver_process(folder / "node", scanner(), prefix=words, **sections) as receiver:
            yield SmallDisk(receiver)
        return
    # the database is on the disk that only the receiver has: it starts from a copy
    prepared = ReceiverProcess(folder / "node", **sections)
    prepared.register(scanner())
    copy = folder / "copy"
    shutil.copytree(data, copy)
    words[words.index("-c") + 1] = words[words.index("-c") + 1].replace(" && ", f' && cp -R "{copy}/." "{data}" && ', 1)
    receiver = ReceiverProcess(folder / "node", prefix=words, **sections)
    receiver.start()
    try:
        yield SmallDisk(receiver)
    finally:
        receiver.kill()


@pytest.mark.parametrize(
    ("database", "reserve_bytes"),
    [
        ("on the same disk", 0),
        pytest.param("elsewhere", 2_000_000, marks=pytest.mark.long),
        pytest.param("elsewhere", 0, marks=pytest.mark.long),
    ],
)
def test_a_full_disk_refuses_for_now_and_intake_resumes_by_itself(tmp_path: Path, database: str, reserve_bytes: int) -> None:
    study = images(40, pixel_bytes=IMAGE_BYTES)
    with receiver_on_small_disk(tmp_path, database=database, reserve_bytes=reserve_bytes) as disk:
        disk.filler.write_bytes(bytes(2 * 2**20))
        with association(disk.receiver.port) as connection:
            before, refused = until_refused(connection, study)
            assert before, "something fitted"
            assert refused.comment == "disk or database take nothing now; send again later"
            free = shutil.disk_usage(disk.folder).free
            assert reserve_bytes - IMAGE_BYTES * 1.1 <= free < reserve_bytes + IMAGE_BYTES * 1.5
            assert connection.store(study[len(before)]).status == OUT_OF_RESOURCES, "and again"
            assert connection.echo() == 0
            disk.assert_keeps(study, before)

            disk.filler.unlink()
            rest = study[len(before) : len(before) + 4]
            assert [connection.store(image).status for image in rest] == [0] * 4
            connection.release()
        disk.assert_keeps(study, before | {image.sop_instance_uid for image in rest})
        assert disk.receiver.stop() == 0


def until_refused(connection: Connection, study: Sequence[Image]) -> tuple[set[str], raw.Response]:
    """Send until an image is refused; return what was acknowledged, and the refusal."""
    acknowledged: set[str] = set()
    for image in study:
        response = connection.store(image)
        if response.status:
            assert response.status == OUT_OF_RESOURCES, hex(response.status)
            return acknowledged, response
        acknowledged.add(image.sop_instance_uid)
    raise AssertionError("the disk was never full")
