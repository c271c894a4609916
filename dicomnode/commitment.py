"""Storage commitment (PS3.4 J), both ways: whether a peer holds what it was sent, and whether we hold what a peer sent.

SENT is not COMMITTED: a delivery to a peer that commits is done when the peer says so. What was asked and answered are rows; nothing
waits in a thread or on an association. For a DICOMweb stands in what its QIDO-RS shows. Must never take a peer's word for a transaction
that wasn't asked of that peer, nor give ours for bytes that weren't read again.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from typing import Any

from dicomnode.backlog import Backlogs
from dicomnode.config import Settings
from dicomnode.dimse.commitment import (
    CLASS_INSTANCE_CONFLICT,
    DUPLICATE_TRANSACTION,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    Asked,
    CommitmentReport,
    Reference,
    failure_in_words,
)
from dicomnode.dimse.commitment_scu import CommitmentOutcome, ask_commitment, report_commitment
from dicomnode.engine import EngineClient
from dicomnode.errors import ConfigError, InvalidArgument, PeerUnavailable, ResourceLimitation
from dicomnode.logs import get_logger
from dicomnode.stow import shown
from storage import Storage
from storage.errors import StorageError
from storage.records import CommitmentRequest, Delivery, Instance, Job, Peer

CRASHES_ALLOWED = 10  # an answer that ends its worker more often than this is dead-lettered
NOT_COMMITTED = "not-committed"  # reason code of a delivery whose peer took everything and commits to less

log = get_logger(__name__)


class StorageCommitment:
    """Asks peers to commit, and takes what they answer: in the sender on the association that asked, in the receiver on theirs."""

    def __init__(self, settings: Settings, storage: Storage, client: EngineClient) -> None:
        self._settings = settings
        self._storage = storage
        self._client = client
        self._backlogs = Backlogs(settings, storage, client)

    def ask(self, job: Job, peer: Peer, attempt: int) -> float | None:
        """Ask a peer to commit to what a running deliver job has sent to it.

        Return None when the job's row says how it ended or a report has put it on the queue; else seconds until it has to be looked at.
        """
        jobs, commitments = self._storage.jobs, self._storage.commitments
        deliveries = [delivery for delivery in jobs.deliveries(job_key=job.key) if delivery.state != "committed"]
        sent = [delivery.sop_instance_uid for delivery in deliveries if delivery.state == "sent"]
        if not sent:
            jobs.finish(job.key, "done") if not deliveries else self._give_up(job.key, peer.ae_title, deliveries)
            return None
        left = commitments.seconds_left(job.key)
        if left is not None:
            jobs.postpone(job.key, f"{peer.ae_title} has been asked to commit to {len(sent)} object(s): its report is awaited")
            return left
        commitments.lapse(job.key)
        schedule = self._settings.engine.retry_schedule_seconds
        if attempt > len(schedule):
            asked = len(commitments.commitments(job_key=job.key))
            reason = f"{peer.ae_title} was asked {asked} time(s) and has not reported whether it commits to {len(sent)} object(s)"
            jobs.finish(job.key, "failed", reason_code=NOT_COMMITTED, reason=reason)
            log.warning("not committed", job=job.key, peer=peer.ae_title, attempt=attempt)
            return None
        return self._request(
            job,
            peer,
            [delivery for delivery in deliveries if delivery.state == "sent"],
            schedule[attempt] if attempt < len(schedule) else None,
        )

    def _request(self, job: Job, peer: Peer, sent: Sequence[Delivery], wait: float | None) -> float | None:
        """Ask about these results, each by what the peer was sent of it."""
        jobs, commitments = self._storage.jobs, self._storage.commitments
        transaction_uid = f"2.25.{uuid.uuid4().int}"
        classes = {result.sop_instance_uid: result.sop_class_uid for result in jobs.results(study_instance_uid=job.study_instance_uid)}
        asked = commitments.ask(transaction_uid, job.key, peer.ae_title, [delivery.sop_instance_uid for delivery in sent])
        references = [
            Reference(sop_class_uid=one.sent_class or classes[one.sop_instance_uid], sop_instance_uid=one.at_peer) for one in sent
        ]
        if peer.stow_url is not None:
            outcome = self._look(job, peer, transaction_uid, references)
        else:
            outcome = ask_commitment(
                peer,
                transaction_uid,
                references,
                calling_ae_title=self._settings.node.ae_title,
                tls=self._settings.tls,
                report=self.report,
                has_report=lambda: commitments.is_answered(transaction_uid),
                response_seconds=self._settings.commitment.response_seconds,
                report_seconds=self._settings.commitment.report_seconds,
            )
        if not outcome.is_away and (peer.stow_url is None or outcome.state == "accepted"):
            self._backlogs.reached(peer)
        answer_seconds = self._settings.commitment.answer_seconds
        with self._storage.database.writing() as transaction:
            if outcome.state == "accepted":
                noted = commitments.acknowledged(transaction, asked, state="waiting", wait_seconds=answer_seconds)
            else:
                noted = commitments.acknowledged(transaction, asked, state="refused", error=outcome.error)
            if not noted:  # the report was quicker: whoever took it has ended the job or put it on the queue
                return None
            if outcome.state == "accepted":
                reason = f"{peer.ae_title} has been asked to commit to {len(sent)} object(s): its report is awaited"
                jobs.explain_wait(transaction, job.key, reason)
                return answer_seconds
            reason = f"{peer.ae_title} has {len(sent)} object(s) and was not asked to commit to them: {outcome.error}"
            log.warning("not asked to commit", job=job.key, peer=peer.ae_title)
            is_away = outcome.is_away and wait is not None
            if outcome.state == "transient" and wait is not None and not is_away:
                jobs.explain_wait(transaction, job.key, reason)
                return wait
            if not is_away:
                jobs.finish(job.key, "failed", reason_code=NOT_COMMITTED, reason=reason, connection=transaction)
                return None
        self._backlogs.put(job, peer, outcome.error or "")
        return None

    def _look(self, job: Job, peer: Peer, transaction_uid: str, references: Sequence[Reference]) -> CommitmentOutcome:
        """Take what the QIDO-RS of a peer shows for its report: by STOW-RS there is no other."""
        try:
            found = shown(peer, job.study_instance_uid, references, tls=self._settings.tls)
        except (PeerUnavailable, ConfigError) as error:
            return CommitmentOutcome(state="transient", error=str(error))
        self.report(CommitmentReport(ae_title=peer.ae_title, transaction_uid=transaction_uid, references=found))
        return CommitmentOutcome(state="accepted", error=None)

    def report(self, report: CommitmentReport) -> None:
        """Take a peer's answer, whenever and however often it comes. Raises InvalidArgument if nothing was asked of it by this UID."""
        asked = self._storage.commitments.commitment(report.transaction_uid)
        if asked is None or asked.peer != report.ae_title:
            raise InvalidArgument("nothing was asked of this AE under this UID")
        key, ticket = asked.job_key, None
        job = self._storage.jobs.job(key)
        committed = {reference.sop_instance_uid for reference in report.references if reference.failure is None}
        failed = {
            reference.sop_instance_uid: (reference.failure, f"{asked.peer} does not commit to it: {failure_in_words(reference.failure)}")
            for reference in report.references
            if reference.failure is not None
        }
        with self._storage.database.writing() as transaction:
            is_first, missing = self._storage.commitments.answer(
                transaction, asked, committed=committed - failed.keys(), failed=failed, rounds=self._settings.commitment.rounds
            )
            to_send = [delivery for delivery in missing if delivery.state == "waiting"]
            if not missing:
                if not self._storage.jobs.finish(key, "done", connection=transaction):
                    self._storage.jobs.mend(transaction, key)
            elif is_first and to_send and job is not None:
                ticket = report.transaction_uid
                self._send_again(transaction, job, ticket, to_send)
            elif is_first and all(delivery.state == "failed" for delivery in missing):
                self._give_up(key, asked.peer, missing, transaction)
        if ticket is not None:
            self._client.withdraw(key, but=ticket)  # it would look for this report; if it stays for a crash, it finds it taken
        log.info("commitment reported", job=key, peer=asked.peer, count=len(committed))

    def _send_again(self, transaction: Any, job: Job, ticket: str, deliveries: Sequence[Delivery]) -> None:
        """Put a deliver job on the queue for what its peer doesn't hold: the peer may only be slow, so by the schedule."""
        schedule = self._settings.engine.retry_schedule_seconds or (0.0,)
        wait = schedule[min(max(delivery.refusals for delivery in deliveries), len(schedule)) - 1]
        reason = f"{len(deliveries)} object(s) are sent again: {deliveries[0].error}"
        self._storage.jobs.explain_wait(transaction, job.key, reason)
        self._storage.backlogs.take(transaction, job.key)
        self._client.enqueue(transaction, job.key, "deliver", job.priority, ticket=ticket, delay_seconds=wait)
        log.warning("not committed", job=job.key, peer=job.peer, count=len(deliveries))

    def _give_up(self, key: str, peer: str, deliveries: Sequence[Delivery], transaction: Any = None) -> None:
        reason = f"{len(deliveries)} object(s) not committed to by {peer}: {deliveries[0].error}"
        self._storage.jobs.finish(key, "failed", reason_code=NOT_COMMITTED, reason=reason, connection=transaction)
        log.warning("not committed", job=key, peer=peer, count=len(deliveries))

    def request(self, asked: Asked) -> None:
        """Note for good what a peer asks this node to commit to; it is looked at and reported later.

        Raises:
            ResourceLimitation: more is asked than a peer may ask at once.
        """
        limits, requests, database = self._settings.commitment, self._storage.requests, self._storage.database
        references = sorted({(reference.sop_class_uid, reference.sop_instance_uid) for reference in asked.references})
        if len(references) > limits.maximum_references:
            raise ResourceLimitation(f"more than {limits.maximum_references} instances in a request")
        digest = hashlib.sha256(json.dumps(references).encode()).hexdigest()
        with database.writing() as transaction:
            requests.lock(transaction, asked.ae_title)
            known = requests.of_transaction(transaction, asked.ae_title, asked.transaction_uid)
            same = next((request for request in known if request.digest == digest), None)
            if same is not None and same.state == "waiting":
                return
            if same is None and requests.waiting(transaction, asked.ae_title) >= limits.maximum_waiting:
                raise ResourceLimitation("too many requests wait to be answered")
            key = same.key if same is not None else f"commit/{uuid.uuid4().hex}"
            if same is not None and same.key == known[0].key:
                requests.renew(transaction, key, references)
            else:
                identity = {"peer": asked.ae_title, "transaction_uid": asked.transaction_uid, "digest": digest}
                # A Transaction UID that was used for something else: the peer is told so, and the first request stays what it was.
                failures = [(uid, DUPLICATE_TRANSACTION) for _, uid in references] if known else None
                requests.add(transaction, key, **identity, references=references, failures=failures)
            self._client.enqueue(transaction, key, "commit", "routine", ticket=uuid.uuid4().hex)
        log.info("commitment asked", key=key, peer=asked.ae_title, count=len(references))

    def answer(self, key: str, attempt: int) -> float | None:
        """Look at what a peer asked about, and report to it; None when the row says how it ended, else seconds until the next try."""
        requests = self._storage.requests
        request = requests.start(key)
        if request is None:
            return None
        if request.attempts > attempt + CRASHES_ALLOWED:
            requests.finish(key, "failed", reason=f"the answer ended its worker {CRASHES_ALLOWED} times: dead-lettered")
            return None
        peer = self._storage.registry.peer(request.peer)
        if peer is None or not peer.sends:
            requests.finish(key, "failed", reason=f"{request.peer} is not a peer that sends")
            return None
        failures = dict(request.failures) if request.failures is not None else self._verify(request)
        if request.failures is None:
            requests.verified(key, list(failures.items()))
        references = [
            Reference(sop_class_uid=sop_class, sop_instance_uid=uid, failure=failures.get(uid)) for sop_class, uid in request.references
        ]
        outcome = report_commitment(
            peer,
            request.transaction_uid,
            references,
            calling_ae_title=self._settings.node.ae_title,
            tls=self._settings.tls,
            response_seconds=self._settings.commitment.response_seconds,
        )
        schedule = self._settings.engine.retry_schedule_seconds
        reason = f"{peer.ae_title} at {peer.host}:{peer.port} did not take the report: {outcome.error}"
        if outcome.state == "accepted":
            requests.finish(key, "reported")
            log.info("commitment answered", key=key, peer=peer.ae_title, count=len(references) - len(failures))
        elif outcome.state == "transient" and attempt < len(schedule):
            requests.postpone(key, reason)
            return schedule[attempt]
        else:
            requests.finish(key, "failed", reason=reason)
            log.warning("commitment not answered", key=key, peer=peer.ae_title, attempt=attempt)
        return None

    def _verify(self, request: CommitmentRequest) -> dict[str, int]:
        """Read the stored bytes of each instance again; return the Failure Reason of each that is not committed to."""
        held = self._storage.index.find_all([uid for _, uid in request.references])
        failures = {}
        for sop_class, uid in request.references:
            instance = held.get(uid)
            if instance is None:
                failures[uid] = NO_SUCH_INSTANCE
            elif instance.sop_class_uid != sop_class:
                failures[uid] = CLASS_INSTANCE_CONFLICT
            elif not self._is_whole(instance):
                failures[uid] = PROCESSING_FAILURE
        return failures

    def _is_whole(self, instance: Instance) -> bool:
        """Whether the file still holds the data set that was received."""
        try:
            is_whole = self._storage.objects.digest(instance.stored.object_id) == instance.stored.sha256
        except StorageError:
            is_whole = False
        if not is_whole:
            log.error("a stored object is not what was received", sop_instance_uid=instance.sop_instance_uid)
        return is_whole


def answer_again(storage: Storage, client: EngineClient, request: CommitmentRequest) -> None:
    """Send a report that was given up once more, its tries counted from 0."""
    with storage.database.writing() as transaction:
        storage.requests.reopen(transaction, request.key)
        client.enqueue(transaction, request.key, "commit", "routine", ticket=uuid.uuid4().hex)
