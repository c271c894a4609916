"""A peer that cannot be reached is tried by one ticket, whatever waits for it; once it is back, what waits is sent, urgent results first.

A job in a backlog is a row: no ticket, no thread, no association, no memory. Must never hold one back from a peer that is there.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from dicomnode.config import Settings
from dicomnode.engine import EngineClient
from dicomnode.logs import get_logger
from storage import Storage
from storage.records import Backlog, Job, Peer

SLICE_SECONDS = 20.0  # of working off: then the ticket goes to the end of its queue, and a worker that is told to stop can
ASSOCIATIONS = 4  # at a time with a peer that is back, beside those of new results
_BATCH = 16  # jobs that are looked up at a time

log = get_logger(__name__)


class Backlogs:
    """Puts deliver jobs into the backlogs of their peers, and works these off."""

    def __init__(self, settings: Settings, storage: Storage, client: EngineClient) -> None:
        self._schedule = settings.engine.retry_schedule_seconds
        self._storage = storage
        self._client = client

    def holds(self, job: Job, peer: Peer) -> bool:
        """Put a running job into its peer's backlog if the peer is known to be away, unless this job may see for itself; say whether.

        It may if it is its turn, or if it is urgent and no other job is at it.
        """
        backlog = self._storage.backlogs.backlog(peer.ae_title)
        if backlog is None or backlog.next_at is None or backlog.probe == job.key or not self._schedule:
            return False
        if job.priority == "stat" and backlog.probe is None:
            with self._storage.database.writing() as transaction:
                self._storage.backlogs.allow(transaction, peer.ae_title, job.key)
            return False
        self._put(job, peer, backlog.error or "", tried=False)
        return True

    def put(self, job: Job, peer: Peer, error: str) -> None:
        """Put a running job into its peer's backlog: the peer could not be reached. There must be a schedule to wait by."""
        self._put(job, peer, error, tried=True)

    def _put(self, job: Job, peer: Peer, error: str, *, tried: bool) -> None:
        reason = f"{peer.ae_title} at {peer.host}:{peer.port} cannot be reached: {error}"
        with self._storage.database.writing() as transaction:
            ticket = self._storage.backlogs.put(
                transaction, job.key, peer.ae_title, reason=reason, error=error, schedule=self._schedule, tried=tried
            )
            if ticket is not None:
                self._enqueue(transaction, ticket, delay_seconds=self._schedule[0])
                log.warning("the peer cannot be reached", peer=peer.ae_title, reason=error)

    def reached(self, peer: Peer) -> None:
        """Note that the peer is there: what waits for it can be sent."""
        backlog = self._storage.backlogs.backlog(peer.ae_title)
        if backlog is None or backlog.next_at is None:
            return
        with self._storage.database.writing() as transaction:
            ticket = self._storage.backlogs.reached(transaction, peer.ae_title)
            if ticket is not None:
                self._enqueue(transaction, ticket)
        log.info("the peer is back", peer=peer.ae_title)

    def send_again(self, ae_title: str) -> int:
        """Try to send all that has failed or waits for this peer, now; return how many jobs that is."""
        with self._storage.database.writing() as transaction:
            jobs, ticket = self._storage.backlogs.put_all(transaction, ae_title)
            self._enqueue(transaction, ticket)
        return jobs

    def work_off(self, do_now: Callable[[str], float | None], key: str) -> float | None:
        """Try the peer of the backlog `key` by its first job, and if it is there send what waits.

        None when nothing waits any longer, or another ticket has taken over; else seconds until the next try.
        """
        backlogs, until = self._storage.backlogs, time.monotonic() + SLICE_SECONDS
        ticket = key.rpartition("/")[2]
        with ThreadPoolExecutor(ASSOCIATIONS) as lanes:
            while True:
                backlog = backlogs.of_ticket(ticket)
                if backlog is None:
                    return None
                left = backlogs.seconds_left(backlog)
                if left > 0:
                    self._give_up(backlog)
                    return left
                if time.monotonic() >= until:
                    return 0.0
                keys = backlogs.jobs(backlog.peer, most=_BATCH)
                if not keys and backlogs.close(backlog):
                    log.info("nothing waits for the peer any longer", peer=backlog.peer)
                    return None
                if backlog.next_at is None:
                    list(lanes.map(partial(self._do, do_now), keys))
                elif keys:
                    with self._storage.database.writing() as transaction:
                        backlogs.allow(transaction, backlog.peer, keys[0])
                    self._do(do_now, keys[0])

    def _do(self, do_now: Callable[[str], float | None], key: str) -> None:
        wait = do_now(key)
        job = self._storage.jobs.job(key)
        if wait is not None and job is not None:  # the peer is there, and this job has to wait for something else
            with self._storage.database.writing() as transaction:
                self._storage.backlogs.take(transaction, key)
                self._client.enqueue(transaction, key, "deliver", job.priority, ticket=uuid.uuid4().hex, attempt=1, delay_seconds=wait)

    def _give_up(self, backlog: Backlog) -> None:
        """End what has waited for as long as the schedule, once the peer has been tried as often: slow tries take no chance away."""
        if backlog.tries < len(self._schedule):
            return
        reason = f"{backlog.peer} could not be reached since {backlog.since:%Y-%m-%d %H:%M} UTC: {backlog.error}"
        given_up = self._storage.backlogs.give_up(backlog.peer, reason, after_seconds=sum(self._schedule))
        if given_up:
            log.warning("not delivered", peer=backlog.peer, count=given_up)

    def _enqueue(self, transaction: object, ticket: str, *, delay_seconds: float = 0) -> None:
        self._client.enqueue(transaction, f"resume/{ticket}", "resume", "routine", ticket=ticket, delay_seconds=delay_seconds)
