"""How a received instance becomes safe: its file synced and named, the folder synced, its row committed, in this order.

What several threads bring at the same moment goes through together: one of them, the leader, gives all files their names,
syncs each folder once and commits all rows at once. There is no thread for it and no wait: who comes alone leads at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from storage.arriving import Outcome
from storage.errors import OutOfSpace, StorageError, Unavailable
from storage.incoming import Incoming
from storage.index import Index
from storage.objects import ObjectStore
from storage.records import InstanceHeader, StoredObject


class _Arrival:
    """One instance on its way, and how it ended: `outcome` or `failure`."""

    def __init__(self, header: InstanceHeader, incoming: Incoming) -> None:
        self.header = header
        self.incoming = incoming
        self.stored: StoredObject | None = None
        self.outcome: Outcome | None = None
        self.failure: Exception | None = None
        self.turn = threading.Lock()  # released when it has ended, or when its thread has to lead
        self.turn.acquire()

    @property
    def ended(self) -> bool:
        return self.outcome is not None or self.failure is not None


class Intake:
    """The way into the store and the index. Any number of threads and processes may use it."""

    def __init__(self, objects: ObjectStore, index: Index) -> None:
        self._objects = objects
        self._index = index
        self._lock = threading.Lock()
        self._waiting: list[_Arrival] = []
        self._led = False

    def add(self, header: InstanceHeader, incoming: Incoming) -> tuple[Outcome, StoredObject | None]:
        """Make the instance safe, unless its SOP Instance UID is stored already; `incoming` is used up in any case.

        "stored": file and row survive a power cut, and the object is returned. "duplicate": the same content is there, and
        this file is gone. "conflict": other content is there; this file is kept, its object returned, and the caller puts
        it into quarantine or removes it. Of several callers with one UID exactly one gets "stored".

        Raises:
            OutOfSpace, Unavailable: disk or database take nothing now.
            StorageError: disk or database failed. In each case the file is gone, unless its row was committed all the
                same and only the answer was lost.
        """
        try:
            if self._index.holds(header):
                return "duplicate", None
            incoming.sync()
            arrival = _Arrival(header, incoming)
            self._pass_through(arrival)
        finally:
            incoming.discard()  # no more than a name by now, unless something failed
        if arrival.failure is not None:
            raise arrival.failure
        assert arrival.outcome is not None  # noqa: S101  every arrival ends in one of the two ways
        return arrival.outcome, None if arrival.outcome == "duplicate" else arrival.stored

    def _pass_through(self, arrival: _Arrival) -> None:
        """Return when the arrival has ended: by this thread as the leader, or by another one."""
        with self._lock:
            self._waiting.append(arrival)
            leads, self._led = not self._led, True
        if not leads:
            arrival.turn.acquire()
            if arrival.ended:
                return
        with self._lock:
            group, self._waiting = self._waiting, []
        try:
            self._keep(group)
        finally:
            self._hand_over(group)

    def _hand_over(self, group: Sequence[_Arrival]) -> None:
        """Let the first that came meanwhile lead, and wake the threads of the group."""
        with self._lock:
            following = self._waiting[0] if self._waiting else None
            self._led = following is not None
        if following is not None:
            following.turn.release()
        for arrival in group:
            if not arrival.ended:
                arrival.failure = StorageError("the thread that wrote for others was interrupted")
            arrival.turn.release()

    def _keep(self, group: Sequence[_Arrival]) -> None:
        for arrival, kept in zip(group, self._objects.keep([arrival.incoming for arrival in group]), strict=True):
            if isinstance(kept, StorageError):
                arrival.failure = kept
            else:
                arrival.stored = kept
        named = [arrival for arrival in group if arrival.stored is not None]
        self._add_rows(named)
        if len(named) > 1 and any(arrival.failure for arrival in named):
            self._add_rows_singly(named)
        for arrival in named:
            if arrival.outcome == "duplicate" and arrival.stored is not None:
                self._objects.remove(arrival.stored.object_id)
        self._remove_unless_known([arrival.stored.object_id for arrival in named if arrival.failure and arrival.stored is not None])

    def _add_rows(self, arrivals: Sequence[_Arrival]) -> None:
        """Commit the rows of all in one transaction; if that fails, it fails for all."""
        batch = [(arrival.header, arrival.stored) for arrival in arrivals if arrival.stored is not None]
        try:
            outcomes = self._index.add_instances(batch) if batch else []
        except Exception as error:  # noqa: BLE001  raised again in the thread that each arrival came from
            for arrival in arrivals:
                arrival.failure = error
            return
        for arrival, outcome in zip(arrivals, outcomes, strict=True):
            arrival.outcome, arrival.failure = outcome, None

    def _add_rows_singly(self, arrivals: Sequence[_Arrival]) -> None:
        """Find out whose row it was: nobody's row may fail another's. A database that takes nothing is asked once more only."""
        for position, arrival in enumerate(arrivals):
            self._add_rows([arrival])
            if isinstance(arrival.failure, OutOfSpace | Unavailable):
                for rest in arrivals[position + 1 :]:
                    rest.failure = type(arrival.failure)(str(arrival.failure))
                return

    def _remove_unless_known(self, object_ids: Sequence[str]) -> None:
        """Remove the files of those whose row failed; where the row is there all the same, only the answer was lost."""
        if object_ids:
            try:
                known = self._index.is_known(object_ids)
            except StorageError:
                return  # nobody can tell: what no row names is swept after this process has ended
            for object_id in object_ids:
                if object_id not in known:
                    self._objects.remove(object_id)
