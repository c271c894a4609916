"""Whose turn it is, among processes of one machine: a file's lock, given in the order in which they asked for it.

SQLite alone lets a process that finds the database busy sleep and look again, while others come in between.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path


class Turns:
    """The queue at one file. Each process lets one of its threads ask at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self, timeout: float) -> int | None:
        """Return the turn, to be given back; None if it was not had in time (seconds). Raises OSError."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return descriptor if _Waiter(descriptor).wait(timeout) else None
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    @staticmethod
    def give_back(turn: int) -> None:
        """Let the next one have its turn."""
        fcntl.flock(turn, fcntl.LOCK_UN)  # not by closing alone: a child forked meanwhile has it open too
        os.close(turn)


class _Waiter:
    """A thread that waits for the lock, because such a wait can't be given a time limit; it may be left alone with it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._had = threading.Event()
        self._left_alone = False
        threading.Thread(target=self._run, name="storage-turn", daemon=True).start()

    def wait(self, timeout: float) -> bool:
        """Return whether the lock was had in time; if not, the descriptor is the thread's to close."""
        if self._had.wait(timeout):
            return True
        with self._lock:
            self._left_alone = not self._had.is_set()
            return not self._left_alone

    def _run(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        with self._lock:
            if self._left_alone:
                os.close(self._descriptor)
            else:
                self._had.set()
