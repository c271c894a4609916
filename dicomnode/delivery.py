"""The deliver workflow: sends the stored result objects of one analysis to one peer, and tries again until they are there.

A retry sends the stored bytes. What the peer has acknowledged is recorded before the next object is sent, and a sender whose job was
started anew by another one sends no more: what ends or delays a sender costs one object sent twice at most. Must never encode, change
or make an object, and holds nothing while it waits.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from datetime import UTC, datetime, timedelta

from dicomnode.backlog import Backlogs
from dicomnode.commitment import StorageCommitment
from dicomnode.config import Settings
from dicomnode.dimse.scu import Outgoing, SendOutcome, send_each
from dicomnode.engine import EngineClient
from dicomnode.logs import get_logger
from dicomnode.stow import post_each
from storage import Storage
from storage.records import Job, Peer, Result

CRASHES_ALLOWED = 10  # a delivery that ends its worker more often than this is dead-lettered

log = get_logger(__name__)


class Sender:
    """Works off deliver jobs."""

    def __init__(self, settings: Settings, storage: Storage, client: EngineClient) -> None:
        self._settings = settings
        self._storage = storage
        self._backlogs = Backlogs(settings, storage, client)
        self._commitment = StorageCommitment(settings, storage, client)

    def deliver(self, key: str, attempt: int) -> float | None:
        """Do the deliver job `key` on its n-th try; return None when its row says how it ended, else seconds until the next try."""
        jobs = self._storage.jobs
        job = jobs.start(key)
        if job.state != "running":
            return None
        peer = self._storage.registry.peer(job.peer or "")
        if job.attempts > attempt + CRASHES_ALLOWED:
            reason = f"the delivery ended its worker {CRASHES_ALLOWED} times: dead-lettered"
            jobs.finish(key, "failed", reason_code="dead-letter", reason=reason)
        elif peer is None or not peer.receives:
            jobs.finish(key, "failed", reason_code="peer-unknown", reason=f"{job.peer} is not a peer that receives results")
        elif not self._backlogs.holds(job, peer):
            return self._deliver(job, peer, attempt)
        return None

    def _deliver(self, job: Job, peer: Peer, attempt: int) -> float | None:
        jobs = self._storage.jobs
        schedule = self._settings.engine.retry_schedule_seconds
        wait = schedule[attempt] if attempt < len(schedule) else None
        outcomes = self._send(job, peer, wait)
        if outcomes is None:
            log.warning("the delivery was cancelled, or is another worker's by now", job=job.key, peer=peer.ae_title)
            return None
        failures = [outcome for outcome in outcomes if outcome.state != "sent"]
        away = next((outcome for outcome in outcomes if outcome.is_away), None)
        if away is not None and wait is not None:
            self._backlogs.put(job, peer, away.error or "")
            return None
        if outcomes and away is None:
            self._backlogs.reached(peer)
        if not failures:
            log.info("delivered", job=job.key, peer=peer.ae_title, count=len(outcomes))
            return self._delivered(job, peer, attempt)
        reason = f"{len(failures)} object(s) not taken by {peer.ae_title}: {failures[0].error or 'no reason given'}"
        log.warning("not delivered", job=job.key, peer=peer.ae_title, status=failures[0].status, attempt=attempt)
        if wait is not None and any(outcome.state == "transient" for outcome in failures):
            jobs.postpone(job.key, reason)
            return wait
        jobs.finish(job.key, "failed", reason_code="delivery-failed", reason=reason)
        return None

    def _send(self, job: Job, peer: Peer, wait: float | None) -> list[SendOutcome] | None:
        """Send what the peer doesn't have yet and record each outcome; None if the job was ended or started anew meanwhile."""
        outcomes = []
        objects = [self._outgoing(result) for result in self._waiting(job)]
        with closing(self._sending(peer, objects)) as sending:
            for outcome in sending:
                outcomes.append(outcome)
                retrying = outcome.state == "transient" and wait is not None
                self._storage.jobs.record_delivery(
                    outcome.sop_instance_uid,
                    peer.ae_title,
                    state="sent" if outcome.state == "sent" else "waiting" if retrying else "failed",
                    status=outcome.status,
                    error=outcome.error,
                    next_at=datetime.now(UTC) + timedelta(seconds=wait) if retrying and wait is not None and not outcome.is_away else None,
                )
                if not self._storage.jobs.is_current(job):
                    return None
        return outcomes

    def _sending(self, peer: Peer, objects: list[Outgoing]) -> Generator[SendOutcome]:
        """Send to a peer by the way that its record names."""
        if peer.stow_url is not None:
            return post_each(peer, objects, tls=self._settings.tls)
        return send_each(peer, objects, calling_ae_title=self._settings.node.ae_title, tls=self._settings.tls)

    def _delivered(self, job: Job, peer: Peer, attempt: int) -> float | None:
        """The peer has everything: that is all, or it is asked to commit to it."""
        if peer.commits:
            return self._commitment.ask(job, peer, attempt)
        self._storage.jobs.finish(job.key, "done")
        return None

    def _waiting(self, job: Job) -> list[Result]:
        """The results of this job's analysis that its peer doesn't have yet, but for what it took often enough and doesn't hold."""
        rounds = self._settings.commitment.rounds
        rows = self._storage.jobs.deliveries(job_key=job.key)
        open_uids = {row.sop_instance_uid for row in rows if row.state in {"waiting", "failed"} and row.refusals <= rounds}
        return [
            result
            for result in self._storage.jobs.results(study_instance_uid=job.study_instance_uid)
            if result.sop_instance_uid in open_uids
        ]

    def _outgoing(self, result: Result) -> Outgoing:
        return Outgoing(
            sop_class_uid=result.sop_class_uid,
            sop_instance_uid=result.sop_instance_uid,
            transfer_syntax_uid=result.transfer_syntax_uid,
            path=self._storage.objects.path(result.stored.object_id),
        )
