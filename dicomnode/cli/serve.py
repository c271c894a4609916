"""`serve`: each role as a child process of its own, started again when it dies, drained on SIGTERM.

A CUDA crash or a slow peer ends or slows one child and never the others. Must never do a role's work itself. Each child's
standard input is a pipe from here that nothing is written to: when this process is killed it ends, and the child drains.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dicomnode.logs import get_logger

RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_SECONDS = 60.0  # a child that lived this long starts the waits from the beginning

log = get_logger(__name__)


@dataclass
class _Child:
    role: str
    process: subprocess.Popen[bytes]
    started: float
    restarts: int = 0
    restart_at: float | None = None


class StopAsked:
    """Whether SIGTERM, SIGINT or `ask` came; made in the main thread.

    A Python signal handler runs in the main thread, between two of its steps: one that blocks there on a lock may never hear of
    a signal that came a moment too early or to another thread. The interpreter's own handler writes to a pipe, which always wakes.
    """

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def ask(self) -> None:
        """Ask to stop, from any thread."""
        os.write(self._writing, b"x")

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until a stop is asked for, at most so long; return whether it was."""
        return bool(select.select([self._reading], [], [], seconds)[0])


class Supervisor:
    """Keeps one child process per role alive until it is told to stop."""

    def __init__(self, config: Path | None, *, roles: tuple[str, ...], drain_seconds: float) -> None:
        self._arguments = ["--config", str(config)] if config else []
        self._roles = roles
        self._drain_seconds = drain_seconds

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; 0 if every child that lived drained, else 1."""
        stop_asked = StopAsked()
        children = [_Child(role=role, process=self._spawn(role), started=time.monotonic()) for role in self._roles]
        while not stop_asked.wait(0.2):
            for child in children:
                self._keep_alive(child)
        return self._drain(children)

    def _spawn(self, role: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dicomnode", "run", role, "--supervised", *self._arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603  # our own interpreter and role names

    def _keep_alive(self, child: _Child) -> None:
        if child.process.poll() is None:
            return
        now = time.monotonic()
        if child.restart_at is None:
            child.restarts = 0 if now - child.started > STEADY_SECONDS else child.restarts
            wait = RESTART_SECONDS[min(child.restarts, len(RESTART_SECONDS) - 1)]
            child.restart_at = now + wait
            log.error("role ended and starts again", role=child.role, status=child.process.returncode, seconds=wait)
        elif now >= child.restart_at:
            child.process, child.started, child.restart_at = self._spawn(child.role), now, None
            child.restarts += 1

    def _drain(self, children: list[_Child]) -> int:
        alive = [child for child in children if child.process.poll() is None]
        for child in alive:
            child.process.terminate()
        deadline = time.monotonic() + self._drain_seconds
        for child in alive:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("role did not drain and is killed; its work is taken over", role=child.role)
                child.process.kill()
                child.process.wait()
        # SIGTERM itself ends a role that hasn't begun to work yet: it leaves nothing undone.
        return int(any(child.process.returncode not in {0, -signal.SIGTERM} for child in alive))
