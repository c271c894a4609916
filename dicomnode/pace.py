"""What an analysis does between two windows: it says how far it is, ends when its time is over, and lets an urgent study pass.

At most once a second, whatever the network's pace. Must never make an analysis fail because the database is away for a moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dicomnode.errors import AnalysisFailed
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import Unavailable

SECONDS = 1.0  # between two looks at the database

log = get_logger(__name__)


class Pace:
    """One analysis in its course. Called with the share that is done (0..1)."""

    def __init__(self, storage: Storage, key: str, *, deadline_seconds: float, let_pass: Callable[[], None] | None) -> None:
        """Begin now. `let_pass` does an urgent job if one waits; its time isn't this analysis's. None: nobody passes."""
        self._storage = storage
        self._key = key
        self._seconds = deadline_seconds
        self._let_pass = let_pass
        self._end = time.monotonic() + deadline_seconds
        self._next = time.monotonic() + SECONDS

    def __call__(self, share: float) -> None:
        """Write the share down, and let an urgent job pass.

        Raises:
            AnalysisFailed: the time is over, or the job was ended by somebody else.
        """
        now = time.monotonic()
        if now >= self._end:
            raise AnalysisFailed(f"The analysis took longer than {self._seconds:g} s and was ended, {share:.0%} done.")
        if now < self._next:
            return
        try:
            if not self._storage.jobs.progress(self._key, share):
                raise AnalysisFailed("The job was ended while it ran.")
            if self._let_pass is not None:
                self._let_pass()
        except Unavailable:
            log.warning("the database was away", job=self._key)
        self._end += time.monotonic() - now  # what passed meanwhile was not this analysis
        self._next = time.monotonic() + SECONDS
