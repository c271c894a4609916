"""The deliver workflow: sends the stored result objects of one analysis to one peer, and tries again until they are there.

A retry sends the stored bytes, or the same alternative of them. What the peer has acknowledged is recorded before the next object is
sent, and a sender whose job was started anew by another one sends no more: what ends or delays a sender costs one object sent twice at
most. Must never change what an object says, and holds nothing while it waits.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from dicomnode.backlog import Backlogs
from dicomnode.commitment import StorageCommitment
from dicomnode.config import Settings
from dicomnode.dimse.recoding import other_syntaxes, simpler_class
from dicomnode.dimse.scu import Outgoing, SendOutcome, named, send_each
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
        objects, at_peer = self._waiting(job)
        with closing(self._sending(peer, objects, at_peer)) as sending:
            for outcome in sending:
                outcomes.append(outcome)
                retrying = outcome.state == "transient" and wait is not None
                self._storage.jobs.record_delivery(
                    outcome.sop_instance_uid,
                    peer.ae_title,
                    state="sent" if outcome.state == "sent" else "waiting" if retrying else "failed",
                    status=outcome.status,
                    error=outcome.error,
                    sent_as=_sent_as(outcome),
                    note=_remark(outcome),
                    next_at=datetime.now(UTC) + timedelta(seconds=wait) if retrying and wait is not None and not outcome.is_away else None,
                )
                if not self._storage.jobs.is_current(job):
                    return None
        return outcomes

    def _sending(self, peer: Peer, objects: list[Outgoing], at_peer: Collection[str]) -> Generator[SendOutcome]:
        """Send to a peer by the way that its record names."""
        if peer.stow_url is not None:
            return post_each(peer, objects, tls=self._settings.tls, at_peer=at_peer)
        return send_each(peer, objects, calling_ae_title=self._settings.node.ae_title, tls=self._settings.tls, at_peer=at_peer)

    def _delivered(self, job: Job, peer: Peer, attempt: int) -> float | None:
        """The peer has everything: that is all, or it is asked to commit to it."""
        if peer.commits:
            return self._commitment.ask(job, peer, attempt)
        self._storage.jobs.finish(job.key, "done")
        return None

    def _waiting(self, job: Job) -> tuple[list[Outgoing], list[str]]:
        """The results of this job's analysis that its peer doesn't have yet, but for what it took often enough and doesn't hold.

        Objects that refer to others go last. Beside them, what the peer has.
        """
        rounds = self._settings.commitment.rounds
        rows = self._storage.jobs.deliveries(job_key=job.key)
        results = {result.sop_instance_uid: result for result in self._storage.jobs.results(study_instance_uid=job.study_instance_uid)}
        waiting = [row for row in rows if row.state in {"waiting", "failed"} and row.refusals <= rounds]
        objects = [self._outgoing(row.ways or ((row.sop_instance_uid, ()),), results) for row in waiting]
        return sorted(objects, key=lambda item: bool(item.refers_to)), [row.at_peer for row in rows if row.state in {"sent", "committed"}]

    def _outgoing(self, ways: Sequence[tuple[str, tuple[str, ...]]], results: Mapping[str, Result]) -> Outgoing:
        """A result with its alternatives, the best first: each as it is stored, in simpler transfer syntaxes, in a simpler SOP class."""
        objects: list[Outgoing] = []
        for uid, refers_to in ways:
            stored = Outgoing(
                sop_class_uid=results[uid].sop_class_uid,
                sop_instance_uid=uid,
                transfer_syntax_uid=results[uid].transfer_syntax_uid,
                path=self._storage.objects.path(results[uid].stored.object_id),
                refers_to=refers_to,
            )
            simpler = simpler_class(stored.sop_class_uid, uid)
            other = [] if simpler is None else [replace(stored, sop_class_uid=simpler[0], sop_instance_uid=simpler[1], recoded=True)]
            for one in (stored, *other):
                syntaxes = other_syntaxes(stored.transfer_syntax_uid)
                objects += [one, *(replace(one, transfer_syntax_uid=syntax, recoded=True) for syntax in syntaxes)]
        return replace(objects[0], alternatives=tuple(objects[1:]))


def _sent_as(outcome: SendOutcome) -> tuple[str, str] | None:
    """SOP Class and SOP Instance UID of what the peer has in the place of an object."""
    sent = outcome.sent
    return None if sent is None or sent.sop_instance_uid == outcome.sop_instance_uid else (sent.sop_class_uid, sent.sop_instance_uid)


def _remark(outcome: SendOutcome) -> str | None:
    """What is to be known of an object that the peer has: what was sent in its place and why, or what the peer remarked."""
    sent = outcome.sent
    if sent is None or (sent.sop_instance_uid == outcome.sop_instance_uid and not sent.recoded):
        return outcome.error
    then = "" if outcome.known_since is None else f" by what it accepted on {outcome.known_since:%Y-%m-%d}, when it was probed"
    said = f"sent as {named(sent)}, because the peer does not accept what it was to get{then}"
    return said if outcome.error is None else f"{said}; {outcome.error}"
