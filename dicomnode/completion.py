"""When is a study complete, which revision is it: closes revisions, with the analyses that apply to them.

Runs in every receiver and analyser; a lease in the database lets one of them work at a time. Closing a revision and
creating its jobs is one transaction (contract 7). Must never read pixels or import torch.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime

from dicomnode.analyses import Run, begin_anew, can_begin, chosen, create, create_analyses, packages_of, routes_of
from dicomnode.announcements import announced
from dicomnode.config import EngineSection
from dicomnode.engine import EngineClient
from dicomnode.evidence import (
    SETTLED_SECONDS,
    Decision,
    Evidence,
    NoticeEvidence,
    Rules,
    SeriesEvidence,
    after_fetches,
    as_json,
    decide,
    series_evidence,
)
from dicomnode.first_series import FirstSeries
from dicomnode.inquiry import Inquiry
from dicomnode.logs import get_logger
from dicomnode.missing import MissingImages
from storage import Storage
from storage.records import Job, Priority, Revision, Route, Study

LEASE = "completion"
QUIET_SECONDS_WITHOUT_ROUTE = 60.0

log = get_logger(__name__)


class Seen:
    """What was read of the studies that are being received: it holds until another image of a study comes."""

    def __init__(self, storage: Storage) -> None:
        self.first_series = FirstSeries(storage)
        self._studies: dict[str, tuple[datetime, list[tuple[str, str]], tuple[SeriesEvidence, ...]]] = {}
        self._announced: dict[str, tuple[datetime, datetime, tuple[NoticeEvidence, ...]]] = {}
        self._last_changes: dict[str, datetime] = {}
        self._callers: dict[str, list[tuple[str, str]]] = {}

    def of(self, storage: Storage, study: Study) -> tuple[list[tuple[str, str]], tuple[SeriesEvidence, ...]]:
        """Return who sent the study, and what its series tell."""
        uid = study.study_instance_uid
        if uid not in self._studies or self._studies[uid][0] != study.last_received_at:
            self._callers[uid] = storage.index.callers(uid)
            self._studies[uid] = study.last_received_at, self._callers[uid], series_evidence(storage.index.planes(uid))
        return self._studies[uid][1:]

    def announced(self, storage: Storage, study: Study) -> tuple[NoticeEvidence, ...]:
        """Return what modalities and archives have announced of the study."""
        uid = study.study_instance_uid
        changed = self._last_changes.get(uid)
        if changed is None:
            return ()
        if uid not in self._announced or self._announced[uid][:2] != (study.last_received_at, changed):
            self._announced[uid] = study.last_received_at, changed, announced(storage, uid)
        return self._announced[uid][2]

    def look_at_notices(self, storage: Storage) -> None:
        """See which studies something was announced of since the last look."""
        self._last_changes = storage.notices.last_changes()

    def first_callers(self, storage: Storage, study: Study) -> list[tuple[str, str]]:
        """Return who had sent the study when that was read last: others may have joined since."""
        uid = study.study_instance_uid
        if uid not in self._callers:
            self._callers[uid] = storage.index.callers(uid)
        return self._callers[uid]

    def forget_but(self, study_instance_uids: Collection[str]) -> None:
        """Keep nothing of studies other than these."""
        self._studies = {uid: known for uid, known in self._studies.items() if uid in study_instance_uids}
        self._callers = {uid: known for uid, known in self._callers.items() if uid in study_instance_uids}
        self._announced = {uid: known for uid, known in self._announced.items() if uid in study_instance_uids}
        self.first_series.forget_but(study_instance_uids)


class Completion:
    """A thread that closes studies when enough says that they are complete."""

    def __init__(
        self,
        storage: Storage,
        client: EngineClient,
        settings: EngineSection,
        inquiry: Inquiry | None = None,
        missing: MissingImages | None = None,
    ) -> None:
        """`inquiry` asks the peers that routes name, without it they give no answer; `missing` fetches what these hold and did not come."""
        self._inquiry = inquiry
        self._missing = missing
        self._storage = storage
        self._client = client
        self._settings = settings
        self._owner = uuid.uuid4().hex
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="completion", daemon=True)

    def start(self) -> None:
        """Begin to look for complete studies."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking and give the lease back."""
        self._stopping.set()
        self._thread.join()
        self._storage.leases.release(LEASE, self._owner)
        if self._inquiry is not None:
            self._inquiry.stop()
        if self._missing is not None:
            self._missing.stop()

    def _run(self) -> None:
        up_since, seen = datetime.now(UTC), Seen(self._storage)
        while not self._stopping.wait(self._settings.poll_seconds):
            try:
                if self._storage.leases.hold(LEASE, self._owner, self._settings.lease_seconds):
                    close_complete_studies(
                        self._storage, self._client, datetime.now(UTC), up_since=up_since, seen=seen, inquiry=self._inquiry,
                        missing=self._missing,
                    )  # fmt: skip
            except Exception:  # the database may be away for a while; the next round tries again
                log.exception("completion failed")


def close_complete_studies(
    storage: Storage,
    client: EngineClient,
    now: datetime,
    *,
    up_since: datetime,
    seen: Seen | None = None,
    inquiry: Inquiry | None = None,
    missing: MissingImages | None = None,
) -> list[Revision]:
    """Close each study that is complete at `now`, with its jobs, and return the revisions closed or begun.

    A study that isn't complete may begin a revision of the series that are, for packages that start on them.

    Silence counts from `up_since` at the earliest: while the node was down a modality could not send the rest. `seen` spares reading
    again what was read before.
    """
    seen = seen or Seen(storage)
    every = storage.registry.routes()
    least = min([SETTLED_SECONDS, *(route.quiet_seconds for route in every)])
    closed = []
    seen.look_at_notices(storage)
    receiving = storage.index.receiving()
    for study in receiving:
        silent = (now - max(study.last_received_at, up_since)).total_seconds()
        if silent < least or silent < _earliest(rules_of(chosen(every, seen.first_callers(storage, study)))):
            closed += _begin(storage, client, study, every, seen, (now, up_since))
            continue  # nothing is read of a study that images still come of, but for series that are complete
        callers, series = seen.of(storage, study)
        routes = [] if storage.fetched.is_mere_prior(study.study_instance_uid, callers) else chosen(every, callers)
        rules = rules_of(routes)
        asked = {route.completeness_peer for route in routes if route.completeness_peer is not None}
        evidence = Evidence(
            images=sum(one.images for one in series),
            released=study.released_at is not None and study.released_at >= study.last_received_at,
            silent_seconds=silent,
            series=series,
            peers=inquiry.evidence(study, asked) if inquiry is not None and silent >= _earliest(rules) else (),
            notices=seen.announced(storage, study),
        )
        evidence = _fetched(missing, inquiry, study, routes, (evidence, rules), now)
        decision = after_fetches(decide(evidence, rules), evidence.fetched)
        if not decision.closes:
            closed += _begin(storage, client, study, every, seen, (now, up_since))
            continue
        revision = _close(storage, client, study, routes, evidence, decision)
        if revision is not None:
            log.info(
                "closed", study_instance_uid=study.study_instance_uid, revision=revision.number, evidence=decision.reason,
                outcome=revision.outcome,
            )  # fmt: skip
            closed.append(revision)
    open_studies = {study.study_instance_uid for study in receiving}
    seen.forget_but(open_studies)
    if inquiry is not None:
        inquiry.forget_but(open_studies)
    return closed


def _begin(
    storage: Storage, client: EngineClient, study: Study, every: Sequence[Route], seen: Seen, times: tuple[datetime, datetime]
) -> list[Revision]:
    """Begin revisions of the series of a study that packages can start on while others come, each with its jobs."""
    if all(route.first_series_seconds is None for route in chosen(every, seen.first_callers(storage, study))):
        return []
    callers = storage.index.callers(study.study_instance_uid)
    if storage.fetched.is_mere_prior(study.study_instance_uid, callers):
        return []
    routes = chosen(every, callers)
    begun = []
    for start in seen.first_series.starts(study, routes, seen.announced(storage, study), times):
        with storage.database.writing() as transaction:
            storage.workitems.lock(transaction, study.study_instance_uid)
            revision = storage.index.begin_revision(
                transaction, study.study_instance_uid, seen_images=start.images, evidence=start.evidence,
                outcome=f"{len({route.package for route in start.routes})} job(s) while others come", facts=start.facts,
            )  # fmt: skip
            if revision is not None:
                create_analyses(storage, client, transaction, study.study_instance_uid, revision.number, start.routes)
                begun.append(revision)
        if revision is not None:
            log.info("begun", study_instance_uid=study.study_instance_uid, revision=revision.number, evidence=start.evidence)
    return begun


def _fetched(
    missing: MissingImages | None,
    inquiry: Inquiry | None,
    study: Study,
    routes: Sequence[Route],
    known: tuple[Evidence, Rules],
    now: datetime,
) -> Evidence:
    """Have what peers hold and did not come fetched, once a study is quiet and where its routes say so; return what is evident then."""
    evidence, rules = known
    asked = {route.completeness_peer for route in routes if route.fetch_missing and route.completeness_peer is not None}
    if missing is None or inquiry is None or not asked:
        return evidence
    if evidence.released and evidence.silent_seconds >= rules.quiet_seconds:
        for title in sorted(asked):
            missing.fetch(study, title, inquiry.absent(study, title), now)
    return replace(evidence, fetched=missing.evidence(study))


def _earliest(rules: Rules) -> float:
    """Seconds after its last image before which no study closes."""
    return min(SETTLED_SECONDS, rules.quiet_seconds)


def rules_of(routes: Sequence[Route]) -> Rules:
    """Return what routes that share a study make of its evidence: the longest of their times, and early only if all say so."""
    quiet = max((route.quiet_seconds for route in routes), default=QUIET_SECONDS_WITHOUT_ROUTE)
    waits = [route.longest_wait_seconds for route in routes if route.longest_wait_seconds is not None]
    return Rules(
        quiet_seconds=quiet,
        longest_wait_seconds=max(waits) if waits and len(waits) == len(routes) else None,
        early=bool(routes) and all(route.early for route in routes),
    )


def reanalyse(storage: Storage, client: EngineClient, study: Study) -> list[str]:
    """Analyse the study's last revision again with a new run of each package its routes name; return the jobs' keys."""
    routes = routes_of(storage, study.study_instance_uid)
    with storage.database.writing() as transaction:
        return create_analyses(storage, client, transaction, study.study_instance_uid, study.revision, routes)


def retry(storage: Storage, client: EngineClient, job: Job) -> str:
    """Do a job that ended without success, or that waits, again, its attempts counted from 0; return the key of the job that does it.

    An analysis whose failure the PACS has been told of is done as the next run: what it says now needs other UIDs.
    """
    if job.kind == "analyse" and storage.jobs.results(job_key=job.key):
        with storage.database.writing() as transaction:
            run = Run(**{field.name: getattr(job, field.name) for field in fields(Run)})
            return create(storage, client, transaction, run)
    client.withdraw(job.key)
    with storage.database.writing() as transaction:  # both or neither: a job that says queued and is on no queue would never end
        if job.kind == "analyse":
            begin_anew(storage, transaction, job)
        storage.jobs.requeue(job.key, connection=transaction)
        if job.kind == "deliver" and job.peer is not None:
            storage.backlogs.allow(transaction, job.peer, job.key)
        client.restart(transaction, job)
    return job.key


def cancel(storage: Storage, client: EngineClient, job: Job) -> None:
    """Cancel a job: it never starts, or what it makes is discarded."""
    storage.jobs.finish(job.key, "cancelled", reason_code="cancelled", reason="cancelled by hand")
    client.withdraw(job.key)


def prioritise(storage: Storage, client: EngineClient, job: Job, priority: Priority) -> None:
    """Give a job another priority; one that waits moves in its queue, and one that waits for its next try is tried at once."""
    storage.jobs.set_priority(job.key, priority)
    changed = storage.jobs.job(job.key)
    if changed is not None and changed.state == "queued":
        retry(storage, client, changed)


def _close(
    storage: Storage, client: EngineClient, study: Study, routes: Sequence[Route], evidence: Evidence, decision: Decision
) -> Revision | None:
    packages, missing = packages_of(storage, routes)
    problems = [f"package {name} is not enabled" for name in missing]
    with storage.database.writing() as transaction:
        storage.workitems.lock(transaction, study.study_instance_uid)
        waiting = storage.workitems.waiting(transaction, study.study_instance_uid)
        asked = [f"{len(waiting)} work item(s)"] * bool(waiting)
        outcome = "; ".join([f"{len(packages)} job(s)"] * bool(packages) + asked + problems) or _without_jobs(storage, study)
        revision = storage.index.close_revision(
            transaction, study.study_instance_uid, seen_last_received_at=study.last_received_at, evidence=decision.reason, outcome=outcome,
            facts=as_json(evidence, decision),
        )  # fmt: skip
        if revision is not None:
            able = [item for item in waiting if can_begin(storage, transaction, item, study)]
            create_analyses(storage, client, transaction, study.study_instance_uid, revision.number, routes, able)
    return revision


def _without_jobs(storage: Storage, study: Study) -> str:
    """Why a study has no jobs that no package or route stands in the way of."""
    callers = storage.index.callers(study.study_instance_uid)
    return "fetched to compare another one with" if storage.fetched.is_mere_prior(study.study_instance_uid, callers) else "no route"
