"""Who may hold a connection or an association: so many in all, so many each, and who gives way when it gets too many.

A connection is half-open until its association is accepted, and after it has ended. At a limit the oldest half-open connection gives
way to the new one, so that nobody is locked out by those that say nothing; an association gives way only if it has been idle. Must
never wait, ask the database or touch the network: the accept loop calls it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from dicomnode.config import ListenerSection

IDLE_SECONDS: Final = 2.0  # an association that has been silent for this long gives way when there are too many


class Connection(Protocol):
    """What the guard knows of a connection."""

    address: str

    def give_way(self, reason: str) -> None:
        """End soon, whatever is going on. Returns at once."""


@dataclass
class _Association:
    ae_title: str
    idle_since: float | None = None  # None: a message is under way


class Guard:
    """The connections of one listener process. Any number of threads may call it."""

    def __init__(self, settings: ListenerSection, is_peer: Callable[[str], bool]) -> None:
        self._settings = settings
        self._is_peer = is_peer
        self._lock = threading.Lock()
        self._half_open: dict[Connection, bool] = {}  # oldest first -> whether its address is a peer's
        self._associations: dict[Connection, _Association] = {}
        self._gone = threading.Condition(self._lock)

    def opened(self, connection: Connection) -> None:
        """Count a new connection; at a limit the oldest of the address that holds most gives way to it."""
        is_peer = self._is_peer(connection.address)
        limit = self._settings.maximum_half_open_per_peer if is_peer else self._settings.maximum_half_open_per_address
        with self._lock:
            mine = [other for other in self._half_open if other.address == connection.address]
            strangers = [other for other, peers in self._half_open.items() if not peers]
            victim, reason = None, ""
            if len(mine) >= limit:
                victim, reason = mine[0], "half-open connections of one address"
            elif not is_peer and len(strangers) >= self._settings.maximum_half_open:
                held = Counter(other.address for other in strangers)
                victim = max(strangers, key=lambda other: held[other.address])  # of equals the first: the oldest
                reason = "half-open connections in all"
            if victim is not None:
                del self._half_open[victim]
            self._half_open[connection] = is_peer
        if victim is not None:
            victim.give_way(reason)

    def associated(self, connection: Connection, ae_title: str) -> str | None:
        """Turn a connection into an association of this calling AE title; return None, or the limit that forbids it."""
        with self._lock:
            of_ae = [other for other, association in self._associations.items() if association.ae_title == ae_title]
            victim, reason = None, ""
            if len(of_ae) >= self._settings.maximum_associations_per_ae:
                victim, reason = self._longest_idle(of_ae), "associations of one AE title"
            elif len(self._associations) >= self._settings.maximum_associations:
                victim, reason = self._longest_idle(list(self._associations)), "associations in all"
            if reason and victim is None:
                return reason
            if victim is not None:
                del self._associations[victim]
            self._half_open.pop(connection, None)
            self._associations[connection] = _Association(ae_title=ae_title, idle_since=time.monotonic())
        if victim is not None:
            victim.give_way(reason)
        return None

    def lingers(self, connection: Connection) -> None:
        """Turn a connection whose association has ended into a half-open one: it only waits for the peer to close."""
        with self._gone:
            if self._associations.pop(connection, None) is not None:
                self._half_open[connection] = self._is_peer(connection.address)
                self._gone.notify_all()

    def idle(self, connection: Connection, *, is_idle: bool) -> None:
        """Note that a message of this association has begun, or that it has been answered."""
        association = self._associations.get(connection)
        if association is not None:
            association.idle_since = time.monotonic() if is_idle else None

    def closed(self, connection: Connection) -> None:
        """Forget a connection that has ended, however it did."""
        with self._gone:
            self._half_open.pop(connection, None)
            self._associations.pop(connection, None)
            self._gone.notify_all()

    def drain(self, seconds: float, reason: str) -> None:
        """End what is half-open, wait up to so many seconds for the associations to end, and end those that are left."""
        with self._gone:
            half_open = list(self._half_open)
        for connection in half_open:
            connection.give_way(reason)
        with self._gone:
            self._gone.wait_for(lambda: not self._associations, timeout=seconds)
            left = list(self._associations)
        for connection in left:
            connection.give_way(reason)
        with self._gone:
            self._gone.wait_for(lambda: not self._associations and not self._half_open, timeout=self._settings.association_seconds)

    def _longest_idle(self, connections: list[Connection]) -> Connection | None:
        now = time.monotonic()
        idle = [(since, other) for other in connections if (since := self._associations[other].idle_since) is not None]
        since, longest = min(idle, key=lambda pair: pair[0], default=(now, None))
        return longest if now - since >= IDLE_SECONDS else None
