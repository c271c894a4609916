"""Durable work: a job's key goes on a queue in the caller's transaction and is worked off by some process, once or more.

The only importer of dbos. Knows workflows by name and imports neither pipeline nor delivery. The job's row in storage
is the truth about its outcome, and every workflow is idempotent by that row: so a workflow here has no steps of its own,
and being run again after a crash is all the recovery it needs. Only this module retries.

Takeover: each worker holds a lease in the database. Whoever sees one that has lapsed, and stays so, puts the dead worker's pending
work back on its queue (`DBOS._recover_pending_workflows`, the one private call, covered by a contract test). A worker that was only
late may find its own work on the queue: a job is done once at a time in one process, and its row tells a later one that it has ended.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, EnqueueOptions

from dicomnode.config import EngineSection
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import Unavailable
from storage.records import Job, JobKind, Priority

# Bump when the arguments of a workflow change: workers only take work of their own version.
WORKFLOW_VERSION = "dicomnode-1"
# JSON, never pickle: whoever can write the database must not run code here.
SERIALIZER = DBOSPortableJSONSerializer()
PRIORITIES: dict[Priority, int] = {"stat": 1, "routine": 10}
WORKER_LEASE = "worker/"
LAPSED_ROUNDS = 3  # a lease must be seen lapsed in so many rounds running: when the database was away, every lease has lapsed
AWAY_SECONDS = 5.0  # until a job that the database left in the middle is tried again
# A workflow that kills its worker is dead-lettered by the job's own count of attempts; the engine's limit must never come first.
RECOVERY_ATTEMPTS = 1_000_000

QueueKind = JobKind | Literal["commit", "resume"]
Work = Callable[[str, int], float | None]
"""Do the job of that key on its n-th try (0, 1, …). None when its row says how it ended, else seconds until the next try."""

log = get_logger(__name__)


class EngineClient:
    """Puts jobs on their queues. Cheap: what the receiver and the command line need, without any worker."""

    def __init__(self, database_url: str) -> None:
        self._client = DBOSClient(system_database_url=database_url, serializer=SERIALIZER)

    def enqueue(
        self,
        connection: Any,
        key: str,
        kind: QueueKind,
        priority: Priority,
        *,
        ticket: str = "0",
        attempt: int = 0,
        delay_seconds: float = 0,
    ) -> None:
        """Put a job on its queue within the caller's transaction; doing it again with the same ticket and attempt changes nothing.

        `connection` is a SQLAlchemy connection from `Database.writing()` on the same database.
        """
        options = EnqueueOptions(
            workflow_name=kind,
            queue_name=kind,
            workflow_id=_workflow_id(key, ticket, attempt),
            priority=PRIORITIES[priority],
            app_version=WORKFLOW_VERSION,
        )
        if delay_seconds > 0:
            options["delay_seconds"] = delay_seconds
        self._client.enqueue_in_transaction(connection, options, key, ticket, attempt)

    def restart(self, connection: Any, job: Job) -> None:
        """Put a job on its queue once more under a new ticket, with the priority its row has now."""
        self.enqueue(connection, job.key, job.kind, job.priority, ticket=f"{time.time_ns() // 1_000_000}")

    def withdraw(self, key: str, *, but: str | None = None) -> None:
        """Take every waiting ticket of a job off its queue, but for the one of that name; one that is running is not interrupted."""
        waiting = self._client.list_workflows(
            workflow_id_prefix=f"{key}#", status=["ENQUEUED", "DELAYED"], load_input=False, load_output=False
        )
        superfluous = [w.workflow_id for w in waiting if but is None or not w.workflow_id.startswith(f"{key}#{but}.")]
        if superfluous:
            self._client.cancel_workflows(superfluous)

    def has_pending(self, worker: str) -> bool:
        """Whether work that this worker began hasn't ended."""
        return bool(self._client.list_workflows(executor_id=worker, status="PENDING", limit=1, load_input=False, load_output=False))

    def close(self) -> None:
        """Close the client's connections."""
        self._client.destroy()


def prepare_engine(database_url: str) -> None:
    """Create or migrate the engine's tables. Safe to run twice and from several processes."""
    logging.getLogger("dbos").setLevel(logging.WARNING)
    DBOS.migrate(database_url)


class Rows(Protocol):
    """The rows that say what became of a queue's work, where they aren't jobs."""

    def postpone(self, key: str, reason: str) -> None:
        """Note why the work waits for its next try."""

    def finish(self, key: str, state: Literal["failed"], *, reason_code: str, reason: str) -> bool:
        """Note that the work was given up."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """A kind of work that this worker takes, and how many of it at a time."""

    kind: QueueKind
    work: Work
    concurrency: int
    rows: Rows | None = None  # None: the jobs


class Worker:
    """A process that works off queues, holds a lease, and takes over from dead workers.

    Must be the only one in its process: DBOS keeps one instance.
    """

    def __init__(
        self, settings: EngineSection, storage: Storage, client: EngineClient, *, database_url: str, queues: tuple[Queue, ...]
    ) -> None:
        self.name = uuid.uuid4().hex
        self._settings = settings
        self._storage = storage
        self._client = client
        self._queues = queues
        self._database_url = database_url
        self._launched = threading.Event()  # the engine runs in this process
        self._stopping = threading.Event()
        self._at_work: set[str] = set()  # keys of the jobs that run now
        self._work_ended = threading.Condition()
        self._lapsed: dict[tuple[str, str], int] = {}  # leases and their owners: in how many rounds running each was seen lapsed
        self._lease_thread = threading.Thread(target=self._keep_lease, name="worker-lease", daemon=True)

    def start(self) -> None:
        """Take the lease, register the workflows and begin to work."""
        logging.getLogger("dbos").setLevel(logging.WARNING)
        self._storage.leases.hold(WORKER_LEASE + self.name, self.name, self._settings.lease_seconds)
        self._lease_thread.start()  # before the engine, whose start takes longer than a lease on a slow machine
        config = DBOSConfig(
            name="dicomnode",
            system_database_url=self._database_url,
            application_version=WORKFLOW_VERSION,
            executor_id=self.name,
            serializer=SERIALIZER,
            use_listen_notify=False,
            run_migrations=False,
            log_level="WARNING",
        )
        DBOS(config=config)
        for queue in self._queues:
            self._register(queue)
        DBOS.listen_queues([queue.kind for queue in self._queues])
        DBOS.launch()
        for queue in self._queues:
            DBOS.register_queue(
                queue.kind,
                worker_concurrency=queue.concurrency,
                polling_interval_sec=self._settings.poll_seconds,
                on_conflict="always_update",
            )
        self._launched.set()

    def stop(self, drain_seconds: float) -> bool:
        """Take no more work, let what runs end for at most `drain_seconds`, and give the lease back; return whether all of it has ended.

        What hasn't ended by then stays pending; its lease lapses and another worker takes it over, and the stop doesn't count as
        a crash of the job.
        """
        self._launched.clear()
        DBOS.destroy(workflow_completion_timeout_sec=max(1, int(drain_seconds)))
        unfinished = tuple(self._at_work)
        for key in unfinished:
            self._storage.jobs.forgive(key)
        self._stopping.set()
        self._lease_thread.join()
        if not self._client.has_pending(self.name):
            self._storage.leases.release(WORKER_LEASE + self.name, self.name)
        return not unfinished

    def do_now(self, key: str) -> float | None:
        """Do a queued job at once, in the caller's thread, between two steps of other work; return its seconds until the next try.

        A ticket of it stays on the queue: it finds the job ended, or does it if this process dies on the way.
        """
        job = self._storage.jobs.job(key)
        for queue in self._queues:
            if job is not None and queue.kind == job.kind:
                return self._run(queue, key, None, 0)
        return None

    def _register(self, queue: Queue) -> None:
        def workflow(key: str, ticket: str, attempt: int) -> None:
            self._run(queue, key, ticket, attempt)

        workflow.__qualname__ = workflow.__name__ = queue.kind
        DBOS.workflow(name=queue.kind, max_recovery_attempts=RECOVERY_ATTEMPTS)(workflow)

    def _run(self, queue: Queue, key: str, ticket: str | None, attempt: int) -> float | None:
        with self._work_ended:  # its ticket may come twice at a time: the lease lapsed, and another worker put it back on the queue
            self._work_ended.wait_for(lambda: key not in self._at_work)
            self._at_work.add(key)
        try:
            return self._work(queue, key, ticket, attempt)
        finally:
            with self._work_ended:
                self._at_work.discard(key)
                self._work_ended.notify_all()

    def _work(self, queue: Queue, key: str, ticket: str | None, attempt: int) -> float | None:
        rows = queue.rows or self._storage.jobs
        try:
            wait = queue.work(key, attempt)
        except Unavailable as error:  # nothing is wrong with the job: it is done again when the database is back
            log.warning("the database was away", job=key, attempt=attempt)
            wait, away = AWAY_SECONDS, str(error)
            self._once_possible(lambda: rows.postpone(key, away))
        except Exception as error:  # the workflow boundary: whatever a job does, its row says so and the worker lives on
            log.exception("job failed", job=key, attempt=attempt)
            reason = f"{type(error).__name__}: see the log"
            self._once_possible(lambda: rows.finish(key, "failed", reason_code="internal-error", reason=reason))
            return None
        if wait is not None and ticket is not None:
            self._once_possible(lambda: self._enqueue_again(queue, key, ticket, attempt + 1, wait))
        return wait

    def _enqueue_again(self, queue: Queue, key: str, ticket: str, attempt: int, wait: float) -> None:
        job = self._storage.jobs.job(key)
        if job is not None or queue.rows is not None:
            priority = job.priority if job is not None else "routine"
            with self._storage.database.writing() as transaction:
                self._client.enqueue(transaction, key, queue.kind, priority, ticket=ticket, attempt=attempt, delay_seconds=wait)

    def _once_possible(self, action: Callable[[], object]) -> None:
        """Do what a job's row needs, however long the database is away; a job whose row says nothing would never end."""
        while True:
            try:
                action()
            except Unavailable:
                if self._stopping.wait(AWAY_SECONDS / 5):
                    raise
            else:
                return

    def _keep_lease(self) -> None:
        while not self._stopping.wait(self._settings.lease_seconds / 3):
            try:
                self._renew_and_take_over()
            except Exception:  # the database may be away for a while; a lost lease costs a takeover, a dead thread costs the worker
                log.exception("the lease could not be renewed", worker=self.name)

    def _renew_and_take_over(self) -> None:
        leases = self._storage.leases
        leases.hold(WORKER_LEASE + self.name, self.name, self._settings.lease_seconds)
        if not self._launched.is_set():
            return
        self._lapsed = {lease: self._lapsed.get(lease, 0) + 1 for lease in leases.expired(WORKER_LEASE)}
        for (name, owner), rounds in self._lapsed.items():
            if owner != self.name and rounds >= LAPSED_ROUNDS:
                recovered = DBOS._recover_pending_workflows([owner])  # no public takeover in 3.4; see the module docstring
                leases.release(name, owner)
                log.warning("took over from a dead worker", worker=owner, count=len(recovered))


def _workflow_id(key: str, ticket: str, attempt: int) -> str:
    return f"{key}#{ticket}.{attempt}"
