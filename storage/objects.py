"""DICOM objects as files: written once under an id of our own, synced, then never changed.

No value from the wire is part of a path. A file under its final name is whole; what is being written has another
name, in `incoming`, on the same file system.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from storage.errors import OutOfSpace, StorageError
from storage.folders import sync_folder
from storage.incoming import Incoming, failure
from storage.records import StoredObject
from storage.writers import OBJECT_ID, Writer, burying, folder_of, folders_between, is_object_of, tags

# Between the moment an object gets its name and the one its row is committed lie waits for locks, and for a result the
# encoding of those that go with it; clocks may differ by some of it too.
_NAMED_BEFORE_ROW_SECONDS = 3600.0
_REMEMBERED_FOLDERS = 100
_BLOCK_BYTES = 2**20


class ObjectStore:
    """The files below one folder. Any number of threads and processes may use the same folder."""

    def __init__(self, folder: Path, *, reserve_bytes: int = 0, resume_bytes: int = 0):
        """Below `reserve_bytes` of free disk intake stops until `resume_bytes` are free; 0: a tenth more than the reserve."""
        self._folder = str(folder)
        self._incoming = f"{folder}/incoming"
        self._stopped = f"{folder}/intake-stopped"  # a file, so that all processes agree and a restart changes nothing
        self._reserve_bytes = reserve_bytes
        self._resume_bytes = resume_bytes
        self._tell: Callable[[bool, int], None] | None = None
        self._durable: set[str] = set()  # folders whose names this process has synced
        self._writer: Writer | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=partial(_forget_writer, weakref.ref(self)))

    def create(self, prefix: bytes) -> Incoming:
        """Begin a file with `prefix` (what precedes the data set), for the caller to write, then keep or discard.

        Raises:
            OutOfSpace: the disk is full, or below its reserve; nothing is left behind.
            StorageError: the disk failed; nothing is left behind.
        """
        self.demand(len(prefix))
        return self._begin(prefix, self.demand)

    def _begin(self, prefix: bytes, demand: Callable[[int], None]) -> Incoming:
        try:
            return Incoming(self._own_writer().new_part(), prefix, demand=demand)
        except OSError as error:
            raise failure(error) from error

    def keep(self, group: Sequence[Incoming]) -> list[StoredObject | StorageError]:
        """Give these files, each synced, their final names, and sync each folder once; of those that fail nothing is left.

        What is returned as stored survives a power cut.
        """
        outcomes: list[StoredObject | StorageError] = []
        for incoming in group:
            object_id = self._own_writer().new_id()
            folder = f"{self._folder}/{folder_of(object_id)}"
            try:
                if folder not in self._durable:
                    os.makedirs(folder, exist_ok=True)
                incoming.rename(f"{folder}/{object_id}.dcm")
                outcomes.append(StoredObject(object_id=object_id, sha256=incoming.sha256, size=incoming.size))
            except OSError as error:
                incoming.discard()
                outcomes.append(failure(error))
        folders = {folder_of(outcome.object_id) for outcome in outcomes if isinstance(outcome, StoredObject)}
        failures = {folder: unsynced for folder in folders if (unsynced := self._sync_folders(folder))}
        for position, outcome in enumerate(outcomes):
            if isinstance(outcome, StoredObject) and (error_of_folder := failures.get(folder_of(outcome.object_id))):
                self.remove(outcome.object_id)
                outcomes[position] = failure(error_of_folder)
        return outcomes

    def put(self, *chunks: bytes | memoryview) -> StoredObject:
        """Write the chunks of a result as one new file; when this returns they survive a power cut.

        Preamble and file meta information, if the first chunk has them, are no part of the digest. Results may take half of the
        reserve, and whether intake is stopped is nothing to them: what waits for them could otherwise never be removed.

        Raises:
            OutOfSpace: the disk is full, or would be below half of its reserve; nothing is left behind.
            StorageError: the disk failed; nothing is left behind.
        """
        self._demand_for_result(sum(memoryview(chunk).nbytes for chunk in chunks))
        first = memoryview(chunks[0])
        begin = meta_length(first)
        incoming = self._begin(bytes(first[:begin]), self._demand_for_result)
        try:
            for block in _blocks([first[begin:], *chunks[1:]]):
                incoming.write(block)
            incoming.sync()
            (outcome,) = self.keep([incoming])
        finally:
            incoming.discard()  # no more than a name by now, unless something failed
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome

    def path(self, object_id: str) -> Path:
        """Return where the object lies, whether it exists or not. Raises StorageError for what is no id of ours."""
        if not OBJECT_ID.fullmatch(object_id):
            raise StorageError("an object id is 32 hexadecimal digits")
        return Path(self._folder, folder_of(object_id), f"{object_id}.dcm")

    def read(self, object_id: str) -> bytes:
        """Return the object's bytes. Raises StorageError if it is absent or cannot be read."""
        try:
            return self.path(object_id).read_bytes()
        except OSError as error:
            raise StorageError(f"object {object_id} cannot be read: {error.strerror}") from error

    def digest(self, object_id: str) -> str:
        """Return the SHA-256 of the data set as it lies on the disk now. Raises StorageError if it is absent or cannot be read."""
        try:
            with self.path(object_id).open("rb") as file:
                file.seek(meta_length(file.read(144)))
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StorageError(f"object {object_id} cannot be read: {error.strerror}") from error

    def remove(self, object_id: str) -> None:
        """Remove the object; an absent one is no error. Not synced: what a power cut brings back, `sweep` removes."""
        self.path(object_id).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Return how many bytes the file system of the objects still takes."""
        free = os.statvfs(self._folder)
        return free.f_bavail * free.f_frsize

    def total_bytes(self) -> int:
        """Return the size of the file system of the objects."""
        there = os.statvfs(self._folder)
        return there.f_blocks * there.f_frsize

    @property
    def resume_bytes(self) -> int:
        """How much of the disk must be free before intake that was stopped goes on."""
        return max(self._resume_bytes, self._reserve_bytes) if self._resume_bytes else self._reserve_bytes * 11 // 10

    @property
    def intake_stopped(self) -> bool:
        """Whether nothing is taken in, as the disk came to its reserve and hasn't recovered yet. True for all processes alike."""
        return os.path.exists(self._stopped)

    def watch_intake(self, tell: Callable[[bool, int], None]) -> None:
        """Call `tell` once for each stop (True) and resumption (False) that this process comes upon first, with the free bytes."""
        self._tell = tell

    def demand(self, size: int) -> None:
        """Raise OutOfSpace if intake is stopped, or if so many bytes more would take of the disk's reserve, which stops it.

        It goes on with the first demand after enough is free: with a gap between, so that it doesn't stop and go by the image.
        """
        free, stopped = self.free_bytes(), self.intake_stopped
        if stopped and free - size >= self.resume_bytes:
            with suppress(OSError):  # another process was first
                os.unlink(self._stopped)
                self._tell_change(False, free)
        elif stopped:
            raise OutOfSpace(f"{free} bytes are free: intake goes on when {self.resume_bytes} are, {self._reserve_bytes} are the reserve")
        elif free - size < self._reserve_bytes:
            if self._reserve_bytes:
                with suppress(OSError):
                    os.close(os.open(self._stopped, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                    self._tell_change(True, free)
            raise OutOfSpace(f"{free} bytes are free, and {self._reserve_bytes} of them are the reserve")

    def look(self) -> bool:
        """Judge the disk as an image would, so that a change is seen without one; return whether intake is stopped."""
        with suppress(OutOfSpace):
            self.demand(0)
        return self.intake_stopped

    def _demand_for_result(self, size: int) -> None:
        free = self.free_bytes()
        if free - size < self._reserve_bytes // 2:
            raise OutOfSpace(f"{free} bytes are free, and half of the reserve of {self._reserve_bytes} is kept from results, too")

    def _tell_change(self, stopped: bool, free: int) -> None:
        if self._tell is not None:
            self._tell(stopped, free)

    def sweep(self, is_known: Callable[[Sequence[str]], set[str]]) -> int:
        """Remove what writers that are dead left behind, unfinished files and objects that no row knows; return how many.

        Whatever a living process is at is left alone. `is_known` must not answer before a transaction of a dead
        process, which the database may still be committing, has ended.

        Raises:
            StorageError: the rows can't be asked; what is left stays for the next time.
        """
        try:
            parts = [name for name in os.listdir(self._incoming) if name.endswith(".part")]  # of release 0.1.0: no tags yet
            removed = sum(_unlink(f"{self._incoming}/{name}") for name in parts)
            for tag in tags(self._incoming):
                with burying(self._incoming, tag) as folder:
                    if folder is not None and os.path.isdir(folder):
                        removed += self._sweep_objects(tag, os.stat(folder).st_mtime, is_known)
                        removed += sum(_unlink(f"{folder}/{name}") for name in os.listdir(folder))  # this changes that time
        except OSError as error:
            raise StorageError(f"what dead processes left cannot be removed: {error.strerror}") from error
        return removed

    def _sweep_objects(self, tag: str, last_active: float, is_known: Callable[[Sequence[str]], set[str]]) -> int:
        """Remove the writer's objects that no row knows: they lie close to its last act, which was giving one its name."""
        removed = 0
        for folder in folders_between(last_active - _NAMED_BEFORE_ROW_SECONDS, last_active + _NAMED_BEFORE_ROW_SECONDS):
            path = f"{self._folder}/{folder}"
            names = os.listdir(path) if os.path.isdir(path) else []
            object_ids = [name[:-4] for name in names if name.endswith(".dcm") and is_object_of(name[:-4], tag)]
            known = is_known(object_ids) if object_ids else set()
            removed += sum(_unlink(f"{path}/{object_id}.dcm") for object_id in object_ids if object_id not in known)
        return removed

    def _own_writer(self) -> Writer:
        writer = self._writer
        if writer is None:
            with self._lock:
                writer = self._writer = self._writer or Writer(self._incoming)
        return writer

    def _sync_folders(self, relative: str) -> OSError | None:
        """Sync a folder of objects, and its parents too unless this process has done so.

        That a folder exists says nothing: another thread may have made it and not synced its parent yet.
        """
        folder = f"{self._folder}/{relative}"
        try:
            sync_folder(folder)
            if folder not in self._durable:
                sync_folder(os.path.dirname(folder))
                sync_folder(self._folder)
                if len(self._durable) >= _REMEMBERED_FOLDERS:
                    self._durable.clear()
                self._durable.add(folder)
        except OSError as error:
            return error
        return None


def meta_length(content: bytes | memoryview) -> int:
    """Return how many bytes of a DICOM file its preamble and file meta information take (PS3.10 7.1); 0 if it has none."""
    if bytes(content[128:140]) != b"DICM\x02\x00\x00\x00UL\x04\x00":
        return 0
    return 144 + int.from_bytes(content[140:144], "little")


def _forget_writer(store: weakref.ref[ObjectStore]) -> None:
    """After fork(), in the child: be another writer than the parent."""
    if (forked := store()) is not None:
        forked._lock = threading.Lock()  # a thread of the parent may have held it
        if forked._writer is not None:
            forked._writer.leave_to_parent()
            forked._writer = None


def _blocks(chunks: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in fewer pieces: a large result comes in some ten thousands, and each piece is a call of the system."""
    block, size = list[bytes | memoryview](), 0
    for chunk in chunks:
        block.append(chunk)
        size += len(chunk)
        if size >= _BLOCK_BYTES:
            yield block[0] if len(block) == 1 else b"".join(block)
            block, size = [], 0
    yield b"".join(block)


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
