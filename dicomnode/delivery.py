"""The deliver workflow: sends the stored result objects of one analysis to one peer, and tries again until they are there.

A retry sends the stored bytes. Must never encode, change or make an object, and holds nothing while it waits.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from dicomnode.config import Settings
from dicomnode.dimse.scu import Outgoing, send
from dicomnode.logs import get_logger
from storage import Storage
from storage.records import Job, Result

CRASHES_ALLOWED = 10  # a delivery that ends its worker more often than this is dead-lettered

log = get_logger(__name__)


class Sender:
    """Works off deliver jobs."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._settings = settings
        self._storage = storage

    def deliver(self, key: str, attempt: int) -> float | None:
        """Do the deliver job `key` on its n-th try; return None when its row says how it ended, else seconds until the next try."""
        jobs = self._storage.jobs
        job = jobs.start(key)
        if job.state != "running":
            return None
        if job.attempts > attempt + CRASHES_ALLOWED:
            jobs.finish(
                key, "failed", reason_code="dead-letter", reason=f"the delivery ended its worker {CRASHES_ALLOWED} times: dead-lettered"
            )
            return None
        peer = self._storage.registry.peer(job.peer or "")
        if peer is None or not peer.receives:
            jobs.finish(key, "failed", reason_code="peer-unknown", reason=f"{job.peer} is not a peer that receives results")
            return None
        waiting = self._waiting(job)
        schedule = self._settings.engine.retry_schedule_seconds
        wait = schedule[attempt] if attempt < len(schedule) else None
        objects = [self._outgoing(result) for result in waiting]
        outcomes = send(peer, objects, calling_ae_title=self._settings.node.ae_title, tls=self._settings.tls) if objects else []
        next_at = None if wait is None else datetime.now(UTC) + timedelta(seconds=wait)
        for outcome in outcomes:
            retrying = outcome.state == "transient" and wait is not None
            jobs.record_delivery(
                outcome.sop_instance_uid,
                peer.ae_title,
                state="sent" if outcome.state == "sent" else "waiting" if retrying else "failed",
                status=outcome.status,
                error=outcome.error,
                next_at=next_at if retrying else None,
            )
        failures = [outcome for outcome in outcomes if outcome.state != "sent"]
        if not failures:
            jobs.finish(key, "done")
            log.info("delivered", job=key, peer=peer.ae_title, count=len(outcomes))
            return None
        reason = f"{len(failures)} object(s) not taken by {peer.ae_title}: {failures[0].error or 'no reason given'}"
        log.warning("not delivered", job=key, peer=peer.ae_title, status=failures[0].status, attempt=attempt)
        if wait is not None and any(outcome.state == "transient" for outcome in failures):
            jobs.postpone(key, reason)
            return wait
        jobs.finish(key, "failed", reason_code="delivery-failed", reason=reason)
        return None

    def _waiting(self, job: Job) -> list[Result]:
        """The results of this job's analysis that its peer doesn't have yet."""
        open_uids = {d.sop_instance_uid for d in self._storage.jobs.deliveries(job_key=job.key) if d.state != "sent"}
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
