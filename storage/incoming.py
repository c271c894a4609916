"""A file that is being written: it has a temporary name until it is whole and synced.

Must never hold more of a data set in memory than the chunk at hand.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from storage.errors import OutOfSpace, StorageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_RESERVE_CHECKED_BYTES = 16 * 2**20
_HASHED_BEHIND_BYTES = 8 * 2**20  # the digest may be so far behind: hashing and the disk's writing go on at the same time
_SYNC_FILE_RANGE_WRITE = 2
_CLOSED = -1


class Incoming:
    """A file of this process under a temporary name; for one thread at a time. ObjectStore.create makes them.

    `start` is where its data set begins, `size` its bytes so far.
    """

    def __init__(self, path: str, prefix: bytes, *, demand: Callable[[int], None]) -> None:
        """Raises OSError."""
        self._path: str | None = path
        self._demand = demand  # raises OutOfSpace below the disk's reserve
        self._unchecked = 0
        self._digest = hashlib.sha256()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self.start = self.size = self._hashed = len(prefix)
        try:
            _write_all(self._descriptor, prefix)
        except OSError:
            self.discard()
            raise

    @property
    def sha256(self) -> str:
        """The digest, in hex, of the data set as far as it was written. Raises OSError if the file can't be read."""
        self._digest_all()
        return self._digest.hexdigest()

    def write(self, chunk: bytes | memoryview) -> None:
        """Append to the data set.

        Raises:
            OutOfSpace: the disk is full or came to its reserve; the file is gone.
            StorageError: the disk failed; the file is gone.
        """
        size = len(chunk)
        try:
            _write_all(self._descriptor, chunk)
            self.size += size
            self._unchecked += size
            if self._unchecked > _RESERVE_CHECKED_BYTES:
                self._unchecked = 0
                self._demand(0)
            if self.size - self._hashed > _HASHED_BEHIND_BYTES:
                self._digest_all()
        except OSError as error:
            self.discard()
            raise failure(error) from error
        except OutOfSpace:
            self.discard()
            raise

    @contextmanager
    def dataset(self) -> Iterator[mmap.mmap | bytes]:
        """Yield the whole file as it is on disk, mapped and not copied; its data set begins at `start`.

        On the way what came since the last time is hashed, while the disk writes it already.
        """
        if not self.size:
            yield b""
            return
        with mmap.mmap(self._descriptor, self.size, prot=mmap.PROT_READ) as mapped:
            if self._hashed < self.size:
                _begin_to_write(self._descriptor)
                with memoryview(mapped) as view, view[self._hashed :] as rest:
                    self._digest.update(rest)
                self._hashed = self.size
            yield mapped

    def sync(self) -> None:
        """Make the bytes survive a power cut; nothing is written afterwards.

        Raises:
            OutOfSpace, StorageError: as `write` does.
        """
        try:
            self._digest_all()
            os.fsync(self._descriptor)
        except OSError as error:
            self.discard()
            raise failure(error) from error

    def rename(self, path: str) -> None:
        """Give the file its final name: from now on it isn't temporary, and `discard` leaves it alone. Raises OSError."""
        os.rename(self._path or "", path)
        self._path = None
        self._close()

    def discard(self) -> None:
        """Remove the file if it still has its temporary name. Safe to repeat."""
        if self._path is not None:
            path, self._path = self._path, None
            self._close()
            with suppress(FileNotFoundError):
                os.unlink(path)
        self._close()

    def _digest_all(self) -> None:
        if self._hashed < self.size:
            with self.dataset():
                pass

    def _close(self) -> None:
        if self._descriptor != _CLOSED:
            descriptor, self._descriptor = self._descriptor, _CLOSED
            os.close(descriptor)


def failure(error: OSError) -> StorageError:
    """Return what a failure of the disk is in storage's own words."""
    kind = OutOfSpace if error.errno in _NO_SPACE else StorageError
    return kind(f"the object could not be written: {error.strerror}")


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    written = os.write(descriptor, chunk)
    if written < len(chunk):  # close to the limit of the disk, or beyond 2 GiB
        rest = memoryview(chunk)
        while rest := rest[written:]:
            written = os.write(descriptor, rest)


@cache
def _sync_file_range() -> Any:
    """Linux's sync_file_range(2), or None."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def _begin_to_write(descriptor: int) -> None:
    """Let the disk begin with what the page cache holds of the file, and don't wait: a hint, on which nothing relies."""
    if (function := _sync_file_range()) is not None:
        function(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)
