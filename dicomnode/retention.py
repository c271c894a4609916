"""How long objects are kept: which studies may go by the site's rules, oldest first, and the thread that removes them.

Runs in every receiver; a lease in the database lets one of them work at a time. Must never remove what a job, a delivery, a commitment or
an open revision still needs: storage removes a study only if all that was seen here is still so.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from dicomnode.config import RetentionSection
from dicomnode.logs import get_logger
from storage import Storage
from storage.retention import Holding

LEASE = "retention"
LEASE_SECONDS = 60.0
LOOK_SECONDS = 5.0  # between two looks at the disk
HURRY_SECONDS = 60.0  # between two rounds while intake is stopped

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rules say of one study."""

    holding: Holding
    goes: bool
    why: str  # it goes, or it is kept


class Retention:
    """A thread that keeps an eye on the disk and removes what the rules let go."""

    def __init__(self, storage: Storage, settings: RetentionSection) -> None:
        self._storage = storage
        self._settings = settings
        self._owner = uuid.uuid4().hex
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking and give the lease back."""
        self._stopping.set()
        self._thread.join()
        self._storage.leases.release(LEASE, self._owner)

    def _run(self) -> None:
        last = float("-inf")
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                stopped = self._storage.objects.look()
                interval = min(self._settings.interval_seconds, HURRY_SECONDS) if stopped else self._settings.interval_seconds
                if time.monotonic() < last + interval:
                    continue
                last = time.monotonic()
                if self._storage.leases.hold(LEASE, self._owner, LEASE_SECONDS):
                    self._storage.retention.finish()
                    remove_due(self._storage, self._settings, datetime.now(UTC), go_on=self._go_on)
                    forget_commitments(self._storage, self._settings, datetime.now(UTC))
            except Exception:  # the database may be away for a while; the next round tries again
                log.exception("retention failed")

    def _go_on(self) -> bool:
        return not self._stopping.is_set() and self._storage.leases.hold(LEASE, self._owner, LEASE_SECONDS)


def has_rule(settings: RetentionSection) -> bool:
    """Return whether anything is ever removed."""
    return bool(settings.days or settings.quota_bytes or settings.disk_share)


def remove_due(storage: Storage, settings: RetentionSection, now: datetime, *, go_on: Callable[[], bool] = lambda: True) -> list[Verdict]:
    """Remove what may go at `now`, as long as `go_on` says so before each study; return what was removed."""
    removed = []
    for verdict in verdicts(storage, settings, now, all_studies=False):
        if not verdict.goes:
            continue
        if not go_on():
            break
        if storage.retention.remove(verdict.holding, verdict.why):
            removed.append(verdict)
            held = verdict.holding
            storage.counters.add({"studies removed": 1, "objects removed": held.objects, "bytes removed": held.size})
            log.info("removed", study_instance_uid=held.study_instance_uid, reason=verdict.why, count=held.objects, bytes=held.size)
    return removed


def forget_commitments(storage: Storage, settings: RetentionSection, now: datetime) -> int:
    """Remove what was asked and answered by storage commitment, both ways, once it is old and over; return how many requests that was."""
    if not settings.commitment_days:
        return 0
    before = now - timedelta(days=settings.commitment_days)
    return storage.commitments.forget(before) + storage.requests.forget(before)


def verdicts(storage: Storage, settings: RetentionSection, now: datetime, *, all_studies: bool) -> list[Verdict]:
    """Return for each study that holds objects whether it goes at `now` and why, in the order in which they go, the kept ones last.

    Without `all_studies` those that are too young for every rule are left out. Nothing is changed.
    """
    if not has_rule(settings) and not all_studies:
        return []
    youngest = min((days for days in (settings.days, settings.minimum_days) if days), default=0.0)
    excess = _excess(storage, settings)
    commits = {peer.ae_title for peer in storage.registry.peers() if peer.commits} if settings.until_committed else set()
    goes, kept, spare, priors = list[Verdict](), list[Verdict](), list[Holding](), list[Holding]()
    for holding in storage.retention.holdings(None if all_studies else now - timedelta(days=youngest)):
        days = (now - holding.touched_at) / timedelta(days=1)
        needed = next(_needs(settings, holding, days, commits), None)
        is_prior = needed is None and _is_prior(settings, holding, days)
        if needed is not None:
            kept.append(Verdict(holding=holding, goes=False, why=needed))
        elif settings.days and days >= settings.days and not is_prior:
            goes.append(Verdict(holding=holding, goes=True, why=f"nothing happened to it for {settings.days:g} days"))
            excess -= holding.size
        else:
            (priors if is_prior else spare).append(holding)
    compared = "it is what a later study of the patient would be compared with"
    for holdings, why in ((spare, "no rule asks for its space"), (priors, compared)):  # the last studies of a patient go last
        for holding in holdings:
            goes_for_space = excess > 0
            excess -= holding.size if goes_for_space else 0
            reason = "the store is larger than its quota" if goes_for_space else why
            (goes if goes_for_space else kept).append(Verdict(holding=holding, goes=goes_for_space, why=reason))
    return goes + kept


def _excess(storage: Storage, settings: RetentionSection) -> float:
    """How many bytes must go for the quotas."""
    excess = 0.0
    if settings.quota_bytes:
        excess = storage.retention.held_bytes() - settings.quota_bytes
    if settings.disk_share:
        total = storage.objects.total_bytes()
        excess = max(excess, total - storage.objects.free_bytes() - settings.disk_share * total)
    return excess


def _needs(settings: RetentionSection, holding: Holding, days: float, commits: set[str]) -> Iterator[str]:
    """Why a study must be kept whatever its age and the quota; `commits` are the peers whose commitment is waited for."""
    if holding.receiving:
        yield "images came since its last revision was closed"
    if holding.busy:
        yield "a job or a commitment isn't finished"
    if holding.patient_busy:
        yield "another study of the patient is on its way, and may be compared with it"
    if holding.stat and settings.keep_stat:
        yield "it was urgent (STAT)"
    if not holding.analysed and not 0 < settings.unanalysed_days <= days:
        yield "no analysis of it has ended with a result or a reason"
    if not 0 < settings.undelivered_days <= days:
        if holding.waiting_for:
            yield f"{', '.join(holding.waiting_for)}: not all of its results are delivered"
        if uncommitted := sorted(commits.intersection(holding.sent_to)):
            yield f"{', '.join(uncommitted)}: not committed to all of its results"
    if days < settings.minimum_days:
        yield f"something happened to it within {settings.minimum_days:g} days"


def _is_prior(settings: RetentionSection, holding: Holding, days: float) -> bool:
    """Whether a study is among the last that were analysed of its patient, and not too old to be compared with."""
    return holding.later is not None and holding.later < settings.priors and days < settings.prior_days and bool(holding.patient_id.strip())
