"""DICOM objects as files: written once under an id of our own, synced, then never changed.

No value from the wire is part of a path. A file under its final name is whole; what is being written has another
name, in `incoming`, on the same file system.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from storage.errors import OutOfSpace, StorageError
from storage.records import StoredObject

_OBJECT_ID = re.compile(r"[0-9a-f]{32}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_BATCH = 500


class ObjectStore:
    """The files below one folder. Any number of threads and processes may use the same folder."""

    def __init__(self, folder: Path, *, reserve_bytes: int = 0):
        self._folder = folder
        self._incoming = folder / "incoming"
        self._reserve_bytes = reserve_bytes
        self._durable: set[Path] = set()  # folders whose names this process has synced

    def put(self, *chunks: bytes | memoryview) -> StoredObject:
        """Write the chunks as one new file; when this returns they survive a power cut.

        Preamble and file meta information, if the first chunk has them, are no part of the digest.

        Raises:
            OutOfSpace: the disk is full, or would be below its reserve; nothing is left behind.
            StorageError: the disk failed; nothing is left behind.
        """
        size = sum(memoryview(chunk).nbytes for chunk in chunks)
        free = self.free_bytes()
        if free - size < self._reserve_bytes:
            raise OutOfSpace(f"{free} bytes are free, and {self._reserve_bytes} of them are the reserve")
        object_id = uuid.uuid4().hex
        final = self.path(object_id)
        temporary = self._incoming / f"{object_id}.part"
        digest = hashlib.sha256()
        unhashed = meta_length(chunks[0])
        whole = False
        try:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(memoryview(chunk)[unhashed:])
                    unhashed = 0
                file.flush()
                final.parent.mkdir(parents=True, exist_ok=True)  # before the sync: the journal takes both in one go
                os.fsync(file.fileno())
            temporary.rename(final)
            self._sync_folders(final.parent)
            whole = True
        except OSError as error:
            kind = OutOfSpace if error.errno in _NO_SPACE else StorageError
            raise kind(f"the object could not be written: {error.strerror}") from error
        finally:
            if not whole:
                temporary.unlink(missing_ok=True)
                final.unlink(missing_ok=True)
        return StoredObject(object_id=object_id, sha256=digest.hexdigest(), size=size)

    def path(self, object_id: str) -> Path:
        """Return where the object lies, whether it exists or not. Raises StorageError for what is no id of ours."""
        if not _OBJECT_ID.fullmatch(object_id):
            raise StorageError("an object id is 32 hexadecimal digits")
        return self._folder / object_id[:2] / object_id[2:4] / f"{object_id}.dcm"

    def read(self, object_id: str) -> bytes:
        """Return the object's bytes. Raises StorageError if it is absent or cannot be read."""
        try:
            return self.path(object_id).read_bytes()
        except OSError as error:
            raise StorageError(f"object {object_id} cannot be read: {error.strerror}") from error

    def remove(self, object_id: str) -> None:
        """Remove the object; an absent one is no error. Not synced: what a power cut brings back, `sweep` removes."""
        self.path(object_id).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Return how many bytes the file system of the objects still takes."""
        return shutil.disk_usage(self._folder).free

    def sweep(self, is_known: Callable[[Sequence[str]], set[str]], *, older_than_seconds: float) -> int:
        """Remove temporary files and objects that no row knows, if older than so many seconds; return how many.

        An object is written before its row is committed: the age must exceed what a living process takes in between.
        """
        before = time.time() - older_than_seconds
        removed = 0
        for file in _files(self._incoming):
            removed += _remove_if(file, before)
        batch: list[str] = []
        for file in _files(self._folder, depth=2):
            if file.name.endswith(".dcm") and _OBJECT_ID.fullmatch(file.name[:-4]):
                batch.append(file.name[:-4])
            if len(batch) == _BATCH:
                removed += self._sweep_batch(batch, is_known, before)
                batch = []
        return removed + self._sweep_batch(batch, is_known, before)

    def _sweep_batch(self, object_ids: list[str], is_known: Callable[[Sequence[str]], set[str]], before: float) -> int:
        old = [object_id for object_id in object_ids if _is_older(self.path(object_id), before)]
        known = is_known(old) if old else set()
        return sum(_remove_if(self.path(object_id), before) for object_id in old if object_id not in known)

    def _sync_folders(self, folder: Path) -> None:
        """Sync `folder`, and its parents too unless this process has done so.

        That a folder exists says nothing: another thread may have made it and not synced its parent yet.
        """
        sync_folder(folder)
        if folder not in self._durable:
            sync_folder(folder.parent)
            sync_folder(self._folder)
            self._durable.add(folder)


def meta_length(content: bytes | memoryview) -> int:
    """Return how many bytes of a DICOM file its preamble and file meta information take (PS3.10 7.1); 0 if it has none."""
    if bytes(content[128:140]) != b"DICM\x02\x00\x00\x00UL\x04\x00":
        return 0
    return 144 + int.from_bytes(content[140:144], "little")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, and sync the name of each that was new."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def _files(folder: Path, *, depth: int = 0) -> Iterator[Path]:
    """Yield the files so many levels below the folder, one folder of names in memory at a time."""
    for path in sorted(folder.iterdir()):
        if depth == 0:
            yield path
        elif len(path.name) == 2 and path.is_dir():
            yield from _files(path, depth=depth - 1)


def _is_older(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime < before
    except FileNotFoundError:  # another process removed it
        return False


def _remove_if(path: Path, before: float) -> bool:
    if not _is_older(path, before):
        return False
    path.unlink(missing_ok=True)
    return True
