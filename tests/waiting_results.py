"""Results that wait for a PACS which is away: many of them, the sender's process, and what that holds meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from dimse_cases import CT, EXPLICIT, a_dataset, encoded, received
from sqlalchemy import func, select

from dicomnode.dimse.scp import part10_prefix
from dicomnode.engine import EngineClient, prepare_engine
from pacs import NODE_AET, free_port, wait_until
from storage import open_storage, prepare_storage
from storage.records import Peer, Priority, Result
from storage.schema import DELIVERY, JOB, PATIENT, REVISION, STUDY

AET = "PACS"
_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process holds now."""

    threads: int
    sockets: int
    rss_bytes: int
    cpu_seconds: float


class Waiting:
    """A node's storage with results on their way to a PACS on a port where nobody listens yet, and its sender as a process."""

    def __init__(self, folder: Path, url: str | None = None, *, schedule: tuple[float, ...], poll_seconds: float = 0.1) -> None:
        self.folder, self.port, self.count = folder, free_port(), 0
        self.url = url or f"sqlite:///{folder / 'node.sqlite'}"
        folder.mkdir(exist_ok=True)
        self.log = folder / "sender.log"
        self.config = folder / "dicomnode.toml"
        self.config.write_text(
            f'[node]\nae_title = "{NODE_AET}"\ndata = "data"\n[storage]\ndatabase_url = "{self.url}"\n'
            f"[engine]\npoll_seconds = {poll_seconds}\nretry_schedule_seconds = {list(schedule)}\n",
            encoding="utf-8",
        )
        prepare_storage(self.url, folder / "data")
        prepare_engine(self.url)
        self.storage = open_storage(self.url, folder / "data")
        self.client = EngineClient(self.url)
        peer = Peer(ae_title=AET, host="127.0.0.1", port=self.port, sends=False, receives=True, tls=False, client_cert=None)
        self.storage.registry.add_peer(peer)
        with self.storage.database.writing() as transaction:
            transaction.execute(PATIENT.insert().values(id=1, patient_id="P", patient_name="N"))

    def add(self, count: int, *, priority: Priority = "routine") -> list[str]:
        """Add so many studies with one result each, and a deliver job for each on the engine's queue; return the jobs' keys."""
        keys: list[str] = []
        for first in range(self.count, self.count + count, _BATCH):
            numbers = range(first, min(first + _BATCH, self.count + count))
            datasets = [a_dataset(CT, InstanceNumber=1) for _ in numbers]
            results = [
                self._result(f"1.2.3.{number}", str(dataset.SOPInstanceUID), encoded(dataset))
                for number, dataset in zip(numbers, datasets, strict=True)
            ]
            with self.storage.database.writing() as transaction:
                now = self.storage.database.now(transaction)
                for number, result in zip(numbers, results, strict=True):
                    at = now + timedelta(microseconds=number)
                    study = {
                        "patient_row": 1,
                        "study_instance_uid": f"1.2.3.{number}",
                        "study_date": "",
                        "study_description": "",
                        "accession_number": "",
                    }
                    times = {"first_received_at": at, "last_received_at": at, "last_image": 1, "closed_image": 1, "revision": 1}
                    transaction.execute(STUDY.insert().values(**study, **times))
                    closed = {"number": 1, "last_image": 1, "closed_at": at, "evidence": "", "outcome": ""}
                    transaction.execute(REVISION.insert().values(study_instance_uid=f"1.2.3.{number}", **closed))
                    self._job(transaction, result.job_key, "analyse", number, priority)
                    self.storage.jobs.add_results(transaction, [result])
                    key = f"deliver/1.2.3.{number}/1/stub/1/{AET}"
                    self._job(transaction, key, "deliver", number, priority)
                    self.storage.jobs.add_deliveries(transaction, key, AET, [result.sop_instance_uid])
                    self.client.enqueue(transaction, key, "deliver", priority)
                    keys.append(key)
        self.count += count
        return keys

    def _result(self, study: str, uid: str, data: bytes) -> Result:
        stored = self.storage.objects.put(part10_prefix(received(data, uid=uid)), data)
        return Result(
            sop_instance_uid=uid, sop_class_uid=CT, transfer_syntax_uid=EXPLICIT, modality="CT", study_instance_uid=study,
            job_key=f"analyse/{study}/1/stub/1", stored=stored, created_at=datetime.now(UTC),
        )  # fmt: skip

    def _job(self, transaction: object, key: str, kind: Literal["analyse", "deliver"], number: int, priority: Priority) -> None:
        self.storage.jobs.create(
            transaction, key=key, kind=kind, study_instance_uid=f"1.2.3.{number}", revision=1, package="stub", version="1",  # type: ignore[arg-type]
            digest="d" * 64, run=1, peer=AET if kind == "deliver" else None, priority=priority,
        )  # fmt: skip

    @contextmanager
    def sender(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run the sender."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "dicomnode", "run", "sender", "--config", str(self.config)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def in_backlog(self) -> int:
        """How many jobs wait in the backlog of the PACS."""
        return self._number(JOB.c.in_backlog & (JOB.c.state == "queued"))

    def jobs(self, state: str) -> int:
        """How many deliver jobs are in this state."""
        return self._number((JOB.c.kind == "deliver") & (JOB.c.state == state))

    def deliveries(self, state: str) -> int:
        """How many results are in this state on their way."""
        with self.storage.database.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(DELIVERY).where(DELIVERY.c.state == state)).scalar_one())

    def _number(self, condition: object) -> int:
        with self.storage.database.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(JOB).where(condition)).scalar_one())  # type: ignore[arg-type]

    def wait_for_backlog(self, count: int, seconds: float = 3600) -> None:
        """Wait until so many jobs are in the backlog and nothing else is on its way."""
        wait_until(lambda: self.in_backlog() == count, seconds=seconds, what=f"{count} jobs in the backlog", log=self.log)

    def close(self) -> None:
        """Close what was opened."""
        self.client.close()
        self.storage.database.close()


def held(pid: int) -> Held:
    """Return what a process holds, by /proc."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    sockets = 0
    for number in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets += str(number.readlink()).startswith("socket:")
        except OSError:  # closed meanwhile
            continue
    ticks = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    cpu = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    return Held(threads=int(status["Threads"]), sockets=sockets, rss_bytes=int(status["VmRSS"].split()[0]) * 1024, cpu_seconds=cpu)
