"""A receiver as the operator runs it, `dicomnode run receiver`, measured from outside through /proc.

Its images are small CT images of one study, made to be told apart.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimse_cases import a_dataset, encoded, split_part10
from raw_dicom import Ended, Image, association

from dicomnode.config import Settings, load_settings, toml_value
from pacs import free_port, tail, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer

SCANNER = "SCANNER"
NEIGHBOURS = ("127.0.0.1/32", "127.0.1.0/24")  # where the scanner may call from; the rest of loopback is strangers


def scanner(ae_title: str = SCANNER, networks: tuple[str, ...] = NEIGHBOURS, *, tls: bool = False) -> Peer:
    """A peer on loopback that may send."""
    return Peer(ae_title=ae_title, host="127.0.0.1", port=104, sends=True, receives=False, tls=tls, client_cert=None, networks=networks)


def images(count: int, *, pixel_bytes: int = 48, study: str = "1.2.3.4") -> list[Image]:
    """So many CT images of a study, in Explicit VR Little Endian, each with its own pixels."""
    columns = next(columns for columns in (1, 2, 4, 8, 16, 32) if pixel_bytes // 2 // columns < 2**16)
    made = []
    for number in range(count):
        pixels = (number.to_bytes(4, "little") + bytes(range(256)) * (pixel_bytes // 256 + 1))[:pixel_bytes]
        dataset = a_dataset(
            StudyInstanceUID=study,
            SeriesInstanceUID=f"{study}.1",
            InstanceNumber=number + 1,
            PixelData=pixels,
            Rows=pixel_bytes // 2 // columns,
            Columns=columns,
        )
        made.append(Image(dataset.SOPInstanceUID, encoded(dataset)))
    return made


@dataclass(frozen=True)
class Footprint:
    """What a process holds; of the descriptors those of its database are not counted, whose pool has a size of its own."""

    threads: int
    descriptors: int
    rss_bytes: int


class ReceiverProcess:
    """A receiver with its own folder. `prefix` are words before the command, e.g. those that give it a small disk."""

    def __init__(self, folder: Path, *, prefix: Sequence[str] = (), **sections: Mapping[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "receiver.log"
        self.configuration = folder / "dicomnode.toml"
        self.port = free_port()
        self._prefix = prefix
        defaults: dict[str, dict[str, Any]] = {
            "node": {"ae_title": "DICOMNODE"},
            "listener": {"port": self.port},
            "storage": {"reserve_bytes": 0},
            "log": {"level": "info"},
        }
        lines = []
        for name in defaults | sections:
            lines.append(f"[{name}]")
            lines += [f"{key} = {toml_value(value)}" for key, value in (defaults.get(name, {}) | dict(sections.get(name, {}))).items()]
        self.configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.settings: Settings = load_settings(self.configuration, {})
        self.process: subprocess.Popen[bytes] | None = None

    def register(self, *peers: Peer) -> None:
        """Make the database if there is none, and let these peers send."""
        prepare_storage(self.settings.database_url, self.settings.data_folder)
        with self.storage() as storage:
            for peer in peers:
                storage.registry.add_peer(peer)

    @contextmanager
    def storage(self) -> Iterator[Storage]:
        """What the receiver keeps, opened beside it."""
        storage = open_storage(self.settings.database_url, self.settings.data_folder)
        try:
            yield storage
        finally:
            storage.database.close()

    def start(self) -> None:
        """Start it and wait until it accepts an association."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "dicomnode", "run", "receiver", "--config", self.configuration],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the receiver ended with {self.process.returncode}\n{tail(self.log)}"
            try:
                with association(self.port) as connection:
                    connection.release()
            except (OSError, Ended):
                return False
            return True

        wait_until(ready, what="the receiver to listen", log=self.log)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pids(self) -> list[int]:
        """Its process and the processes that this one started."""
        assert self.process is not None
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                    found += [int(word) for word in (task / "children").read_text(encoding="ascii").split()]
        return found

    def footprint(self) -> Footprint:
        """What its processes hold together."""
        threads = descriptors = rss = 0
        for pid in self.pids():
            threads += len(list(Path(f"/proc/{pid}/task").iterdir()))
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed since
                    descriptors += ".sqlite" not in str(descriptor.readlink())
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
            rss += int(status["VmRSS"].split()[0]) * 1024
        return Footprint(threads, descriptors, rss)

    def settled(self, *, seconds: float = 30.0) -> Footprint:
        """Its footprint once threads and descriptors have not changed for a second, or after so many seconds."""
        last, since, deadline = self.footprint(), time.monotonic(), time.monotonic() + seconds
        while time.monotonic() < deadline and time.monotonic() - since < 1.0:
            time.sleep(0.1)
            now = self.footprint()
            if (now.threads, now.descriptors) != (last.threads, last.descriptors):
                last, since = now, time.monotonic()
        return self.footprint()

    def wait_for_base(self, base: Footprint) -> None:
        """Wait until it holds no more threads and descriptors than `base`."""

        def back() -> bool:
            now = self.footprint()
            return now.threads <= base.threads and now.descriptors <= base.descriptors

        try:
            wait_until(back, what=f"threads and descriptors to come back to {base}")
        except BaseException:
            print(self.footprint(), tail(self.log))
            raise


@contextmanager
def receiver_process(folder: Path, *peers: Peer, prefix: Sequence[str] = (), **sections: Mapping[str, Any]) -> Iterator[ReceiverProcess]:
    """A running receiver that lets these peers send; killed at the end if the test didn't stop it."""
    receiver = ReceiverProcess(folder, prefix=prefix, **sections)
    receiver.register(*peers)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.kill()


def assert_stored(storage: Storage, sent: Sequence[Image], *, only: bool = False) -> None:
    """Fail unless each of these images is in the index and its file holds the data set byte for byte; `only`: and no other image."""
    for image in sent:
        found = storage.index.find(image.sop_instance_uid)
        assert found is not None, f"{image.sop_instance_uid} is not in the index"
        meta, dataset = split_part10(storage.objects.read(found.stored.object_id))
        assert dataset == image.dataset
        assert meta[:128] == bytes(128)
    if only:
        assert stored_uids(storage) == {image.sop_instance_uid for image in sent}


def stored_uids(storage: Storage) -> set[str]:
    """The SOP Instance UIDs of every instance in the index."""
    return {
        instance.sop_instance_uid
        for study in storage.index.studies(limit=100_000)
        for instance in storage.index.instances(study.study_instance_uid)
    }


def object_files(data_folder: Path) -> tuple[dict[str, Path], set[str]]:
    """Objects that lie in the store under a final name, by their id, and the names of its unfinished files."""
    objects = data_folder / "objects"
    unfinished = [path for path in (objects / "incoming").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.stem: path for path in objects.rglob("*.dcm")}, {path.name for path in unfinished}


def assert_no_stray_file(storage: Storage, data_folder: Path) -> None:
    """Fail if a file in the store is unfinished, or belongs to no row."""
    named = {
        instance.stored.object_id
        for study in storage.index.studies(limit=100_000)
        for instance in storage.index.instances(study.study_instance_uid)
    }
    named |= {refusal.stored.object_id for refusal in storage.index.quarantined() if refusal.stored is not None}
    finals, unfinished = object_files(data_folder)
    assert unfinished == set()
    assert finals.keys() == named
