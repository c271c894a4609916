"""Who writes into an object store: each process under a tag of its own, alive for as long as it holds a lock.

The tag is part of every object's id and names the folder of what is being written, so what a dead process left can be
told from what a living one is doing, without waiting for anything to become old.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from storage.folders import sync_folder

OBJECT_ID = re.compile(r"[0-9a-f]{32}")
_TAG = re.compile(r"[0-9a-f]{12}")
_VERSION = 12  # the digit of an id that tells how it was made
_TIMED = "7"


class Writer:
    """One process's right to write: a tag, a folder for unfinished files, and the lock that says that it lives.

    In `incoming` lie `<tag>.lock` and the folder `<tag>`. The lock ends with the process, however that ends.
    """

    def __init__(self, incoming: str) -> None:
        """Raises OSError if the folder can't be made."""
        while (descriptor := _locked_anew(incoming, tag := secrets.token_hex(6))) is None:
            pass
        self.tag = tag
        self.folder = f"{incoming}/{tag}"
        self._numbers = itertools.count()
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._close.atexit = False  # threads may write until the very end: the kernel drops the lock
        os.mkdir(self.folder)
        sync_folder(incoming)  # so that after a power cut it is seen that somebody wrote

    def new_id(self) -> str:
        """Return an id that nobody else makes: time in ms (12 hex digits), version 7, a number (7), the tag (12)."""
        return f"{time.time_ns() // 1_000_000:012x}{_TIMED}{next(self._numbers) & 0xFFFFFFF:07x}{self.tag}"

    def new_part(self) -> str:
        """Return a path for a file that isn't whole."""
        return f"{self.folder}/{next(self._numbers):x}.part"

    def leave_to_parent(self) -> None:
        """After fork(), in the child: the tag stays the parent's, and so must its lock."""
        self._close.detach()
        os.close(self._descriptor)


def folder_of(object_id: str) -> str:
    """Return the relative folder of an object: by its time, 65 s a folder; of ids of release 0.1.0 by its first digits."""
    if object_id[_VERSION] == _TIMED:
        return f"{object_id[:5]}/{object_id[5:8]}"
    return f"{object_id[:2]}/{object_id[2:4]}"


def is_object_of(object_id: str, tag: str) -> bool:
    """Return whether this is the id of an object, given by the writer with this tag."""
    return OBJECT_ID.fullmatch(object_id) is not None and object_id[_VERSION] == _TIMED and object_id.endswith(tag)


def folders_between(begin: float, end: float) -> Iterator[str]:
    """Yield the relative folders of the objects with ids of this time (seconds since 1970)."""
    for number in range(int(max(begin, 0) * 1000) >> 16, (int(end * 1000) >> 16) + 1):
        yield folder_of(f"{number:08x}0000{_TIMED}")


def tags(incoming: str) -> list[str]:
    """Return the tags of the writers, dead and alive, that have left something or may do so."""
    return sorted(name[:-5] for name in os.listdir(incoming) if name.endswith(".lock") and _TAG.fullmatch(name[:-5]))


@contextmanager
def burying(incoming: str, tag: str) -> Iterator[str | None]:
    """Hold a dead writer's lock and yield its folder, which is gone afterwards unless the block raises; None if it lives."""
    lock, folder = f"{incoming}/{tag}.lock", f"{incoming}/{tag}"
    descriptor = _open_if_there(lock)
    if descriptor is None:
        yield None
        return
    try:
        if not _lock(descriptor):
            yield None
            return
        yield folder
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.unlink(lock)  # last: while there is anything, the lock is there to find it by
    finally:
        os.close(descriptor)


def _locked_anew(incoming: str, tag: str) -> int | None:
    """Make the lock file of a new tag and lock it; None if a sweeping process took it for a dead writer's in between."""
    try:
        descriptor = os.open(f"{incoming}/{tag}.lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> bool:
    """Lock a file that still has its name; return whether that worked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


def _open_if_there(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
