from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage import Storage, open_storage
from storage.errors import Conflict, OutOfSpace, StorageError, Unavailable
from storage.records import InstanceHeader, StoredObject

STUDY_UID = "1.2.826.0.1.3680043.8.498.1"
Make = Callable[..., InstanceHeader]
Bring = Callable[..., tuple[str, StoredObject | None]]


def bringing(storage: Storage, header: Make) -> Bring:
    """Brings an image as the receiver does: chunk by chunk into a file, then header and file to the intake."""

    def bring(number: int = 1, content: bytes = b"pixels", **changes: Any) -> tuple[str, StoredObject | None]:
        incoming = storage.objects.create(b"meta")
        incoming.write(content)
        return storage.intake.add(header(number, dataset_sha256=incoming.sha256, **changes), incoming)

    return bring


@pytest.fixture
def bring(storage: Storage, header: Make) -> Bring:
    return bringing(storage, header)


def object_files(folder: Path) -> set[str]:
    """The ids of the objects on disk; nothing else may lie there beside the lock of the living writer."""
    files = [path for path in (folder / "objects").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.suffix for path in files} <= {".dcm"}
    return {path.stem for path in files}


def indexed(storage: Storage) -> set[str]:
    return {
        instance.stored.object_id for study in storage.index.studies() for instance in storage.index.instances(study.study_instance_uid)
    }


def test_an_image_is_stored_and_found_with_its_bytes(storage: Storage, bring: Bring, header: Make, tmp_path: Path) -> None:
    outcome, stored = bring(1)
    assert outcome == "stored"
    assert stored is not None
    found = storage.index.find(header(1).sop_instance_uid)
    assert found is not None
    assert found.stored == stored
    assert stored.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert storage.objects.read(stored.object_id) == b"metapixels"
    assert object_files(tmp_path) == {stored.object_id}


def test_the_same_content_again_is_no_work_and_other_content_is_kept_for_quarantine(
    storage: Storage, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = bring(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: 1 / 0)
        assert bring(1) == ("duplicate", None)
    assert first is not None
    assert object_files(tmp_path) == {first.object_id}
    outcome, second = bring(1, b"other pixels")
    assert outcome == "conflict"
    assert second is not None
    assert storage.objects.read(second.object_id) == b"metaother pixels"
    assert bring(1, transfer_syntax_uid="1.2.840.10008.1.2.4.70")[0] == "conflict"
    assert indexed(storage) == {first.object_id}


def test_each_step_comes_after_the_one_before_is_safe(
    storage: Storage, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(1)
    steps: list[tuple[str, str]] = []
    fsync, rename, add = os.fsync, os.rename, storage.index.add_instances

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(("sync", path.suffix or "folder"))

    def noted_add(batch: Any) -> Any:
        steps.append(("row", ""))
        answer = add(batch)
        steps.append(("committed", ""))
        return answer

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", lambda source, target: (steps.append(("rename", Path(target).suffix)), rename(source, target)))
    monkeypatch.setattr(storage.index, "add_instances", noted_add)
    bring(2)
    new_folder = [("sync", "folder")] * (steps.count(("sync", "folder")) - 1)  # once in 65 s its parents are synced too
    assert steps == [("sync", ".part"), ("rename", ".dcm"), ("sync", "folder"), *new_folder, ("row", ""), ("committed", "")]


def test_what_many_threads_bring_is_all_there_and_goes_through_in_groups(
    storage: Storage, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, each = 16, 12
    barrier, groups = threading.Barrier(threads), []
    add = storage.index.add_instances
    monkeypatch.setattr(storage.index, "add_instances", lambda batch: (groups.append(len(batch)), add(batch))[1])

    def bring_many(thread: int) -> Counter[str]:
        barrier.wait(120)
        uids = (thread * each + number for number in range(each))
        studies = (f"1.2.{(thread + number) % 5}" for number in range(each))
        return Counter(bring(uid, b"%d" % uid, study_instance_uid=study)[0] for uid, study in zip(uids, studies, strict=True))

    with ThreadPoolExecutor(threads) as pool:
        outcomes = sum(pool.map(bring_many, range(threads)), Counter[str]())
    assert outcomes == {"stored": threads * each}
    assert sum(groups) == threads * each
    assert len(groups) < threads * each
    assert len(indexed(storage)) == threads * each
    assert indexed(storage) == object_files(tmp_path)
    for study in storage.index.studies():
        instances = storage.index.instances(study.study_instance_uid)
        assert study.instances == len(instances)
        assert study.last_received_at == max(instance.received_at for instance in instances)
        for instance in instances:
            content = storage.objects.read(instance.stored.object_id)
            assert content == b"meta%d" % (instance.instance_number or 0)


@pytest.mark.parametrize("differ", [False, True])
def test_of_threads_that_bring_one_uid_exactly_one_stores_it(storage: Storage, bring: Bring, tmp_path: Path, differ: bool) -> None:
    threads, rounds = 8, 6
    barrier = threading.Barrier(threads)

    def bring_each(thread: int) -> list[tuple[str, StoredObject | None]]:
        answers = []
        for number in range(rounds):
            barrier.wait(120)
            answers.append(bring(number, b"%d" % (thread if differ else 0)))
        return answers

    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(bring_each, range(threads)))
    losing = "conflict" if differ else "duplicate"
    for of_one_uid in zip(*answers, strict=True):
        assert sorted(outcome for outcome, _ in of_one_uid) == sorted(["stored"] + [losing] * (threads - 1))
    returned = {stored.object_id for thread in answers for _, stored in thread if stored is not None}
    assert object_files(tmp_path) == returned
    assert len(indexed(storage)) == rounds


def test_two_with_one_uid_in_one_group_are_one_and_a_duplicate_or_a_conflict(storage: Storage, header: Make) -> None:
    def stored(number: int) -> StoredObject:
        return StoredObject(object_id=f"{number:032x}", sha256=str(number), size=1)

    batch = [
        (header(1, dataset_sha256="a"), stored(1)),
        (header(2, dataset_sha256="a"), stored(2)),
        (header(1, dataset_sha256="a"), stored(3)),
        (header(1, dataset_sha256="b"), stored(4)),
    ]
    assert storage.index.add_instances(batch) == ["stored", "stored", "duplicate", "conflict"]
    assert indexed(storage) == {stored(1).object_id, stored(2).object_id}
    assert storage.index.add_instances([(header(1, dataset_sha256="a"), stored(1))]) == ["stored"]  # its answer was lost


class Held:
    """Holds the first group up until everybody else waits, so that the second group has them all."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch, bring: Bring) -> None:
        self._storage = storage
        self._bring = bring
        self._add = storage.index.add_instances
        self._first = threading.Event()
        self._go_on = threading.Event()
        self.groups: list[list[int | None]] = []
        self.fail: Callable[[Sequence[Any]], None] = lambda _batch: None
        monkeypatch.setattr(storage.index, "add_instances", self._noted_add)

    def _noted_add(self, batch: Sequence[tuple[InstanceHeader, StoredObject]]) -> Any:
        self.groups.append([header.instance_number for header, _ in batch])
        if len(self.groups) == 1:
            self._first.set()
            assert self._go_on.wait(120)
        self.fail(batch)
        return self._add(batch)

    def bring_in_one_group(self, numbers: Sequence[int]) -> dict[int, str | type[Exception]]:
        """Bring image 0, then these together; return how each ended."""

        def outcome(number: int) -> str | type[Exception]:
            try:
                return self._bring(number, b"%d" % number)[0]
            except Exception as error:  # noqa: BLE001  its kind is what the test asks for
                return type(error)

        with ThreadPoolExecutor(len(numbers) + 1) as pool:
            leading = pool.submit(outcome, 0)
            assert self._first.wait(120)
            following = {number: pool.submit(outcome, number) for number in numbers}
            until = time.monotonic() + 120
            while len(self._storage.intake._waiting) < len(numbers) and time.monotonic() < until:
                time.sleep(0.01)
            self._go_on.set()
            assert leading.result(120) == "stored"
            return {number: future.result(120) for number, future in following.items()}


def test_one_bad_row_fails_nobody_else(storage: Storage, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(storage, monkeypatch, bring)

    def fail(batch: Sequence[tuple[InstanceHeader, StoredObject]]) -> None:
        if any(header.instance_number == 3 for header, _ in batch):
            raise Conflict("no such row")

    held.fail = fail
    outcomes = held.bring_in_one_group([1, 2, 3, 4])
    assert outcomes == {1: "stored", 2: "stored", 3: Conflict, 4: "stored"}
    assert sorted(held.groups[1], key=str) == [1, 2, 3, 4]
    assert len(held.groups) == 6  # the first, the group, and each of it alone
    assert len(object_files(tmp_path)) == 4
    assert object_files(tmp_path) == indexed(storage)


@pytest.mark.parametrize("error", [Unavailable("down"), OutOfSpace("full")])
def test_a_database_that_takes_nothing_fails_the_group_and_is_asked_once_more_only(
    storage: Storage, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: StorageError
) -> None:
    held = Held(storage, monkeypatch, bring)

    def fail(batch: Sequence[tuple[InstanceHeader, StoredObject]]) -> None:
        if batch[0][0].instance_number != 0:
            raise error

    held.fail = fail
    assert held.bring_in_one_group([1, 2, 3]) == dict.fromkeys([1, 2, 3], type(error))
    assert len(held.groups) == 3
    assert object_files(tmp_path) == indexed(storage)
    assert len(indexed(storage)) == 1


@pytest.mark.parametrize("error", [OutOfSpace("full"), Unavailable("busy"), StorageError("broken"), RuntimeError("a bug")])
def test_a_row_that_cannot_be_written_leaves_no_file_and_the_next_one_goes_through(
    storage: Storage, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_batch: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(storage.index, "add_instances", fail)
        with pytest.raises(type(error), match=str(error)):
            bring(1)
    assert object_files(tmp_path) == set()
    assert bring(1)[0] == "stored"


def test_a_commit_whose_answer_was_lost_keeps_its_file(
    storage: Storage, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = storage.index.add_instances

    def commit_and_fail(batch: Any) -> None:
        add(batch)
        raise StorageError("the connection was lost after the commit")

    with monkeypatch.context() as patch:
        patch.setattr(storage.index, "add_instances", commit_and_fail)
        with pytest.raises(StorageError, match="after the commit"):
            bring(1)
    assert len(object_files(tmp_path)) == 1
    assert object_files(tmp_path) == indexed(storage)
    assert bring(1) == ("duplicate", None)


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, OutOfSpace), (errno.EIO, StorageError)])
@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("fsync", 2), ("rename", 1)])
def test_a_disk_that_fails_leaves_neither_file_nor_row(
    storage: Storage,
    bring: Bring,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    call: int,
    number: int,
    error: type[Exception],
) -> None:
    bring(1)
    before, original, calls = object_files(tmp_path), getattr(os, name), iter(range(1, 10))

    def failing(*given: Any) -> Any:
        if next(calls) == call:  # fsync 1 is of the file, 2 of its folder
            raise OSError(number, os.strerror(number))
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(error) as raised:
            bring(2)
    assert raised.type is error
    assert object_files(tmp_path) == before == indexed(storage)
    assert bring(2)[0] == "stored"


KILLED = """
import os, sys, pathlib, threading
sys.path.insert(0, sys.argv[3])
from conftest import HEADER
import dataclasses
from storage import open_storage
storage = open_storage(sys.argv[1], pathlib.Path(sys.argv[2]))
write = threading.Lock()

def bring(thread):
    number = thread
    while True:
        uid = f"{HEADER.series_instance_uid}.{number}"
        incoming = storage.objects.create(b"meta")
        incoming.write(uid.encode() * 1000)
        header = dataclasses.replace(HEADER, sop_instance_uid=uid, dataset_sha256=incoming.sha256)
        outcome, stored = storage.intake.add(header, incoming)
        with write:
            os.write(1, f"{uid} {stored.object_id}\\n".encode())
        number += 4

for thread in range(4):
    threading.Thread(target=bring, args=(thread,)).start()
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_said_and_the_sweep_leaves_nothing_else(
    storage: Storage, database_url: str, tmp_path: Path
) -> None:
    for said_before in (1, 25, 60):
        command = [sys.executable, "-c", KILLED, database_url, tmp_path, Path(__file__).parent]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        said = [child.stdout.readline().split() for _ in range(said_before)]
        child.kill()
        said += [line.split() for line in child.stdout.read().splitlines()]
        child.stdout.close()
        child.wait()
        after = open_storage(database_url, tmp_path)
        after.objects.sweep(after.index.is_known)
        assert object_files(tmp_path) == indexed(after)
        assert list((tmp_path / "objects" / "incoming").iterdir()) == []
        for uid, object_id in said:
            assert after.objects.read(object_id) == b"meta" + uid.encode() * 1000
        with after.database.writing() as connection:
            for table in ("instance", "series", "study"):
                connection.exec_driver_sql(f"DELETE FROM {table}")
        after.database.close()
        for path in (tmp_path / "objects").rglob("*.dcm"):
            path.unlink()
