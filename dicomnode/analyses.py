"""Analyses that are asked for: the jobs of a revision with their work items, and who gets what of them.

A job, its ticket on the engine's queue and its work item are one transaction, the caller's. Must never decide whether a study is complete.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dicomnode.engine import EngineClient
from dicomnode.logs import get_logger
from dicomnode.results.identity import workitem_uid
from storage import Storage
from storage.records import Job, PackageRecord, Priority, Route, Study, WorkItem
from storage.registry import matching

SELF_TEST = "DICOMNODE-CHECK"  # AE title of the simulated scanner and PACS of `dicomnode check --send`
WORKLIST_LABEL = "dicomnode"  # of work items that nobody gave another one

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an analyse job is created with, but for its number."""

    study_instance_uid: str
    revision: int
    package: str
    version: str
    digest: str
    to_ae_titles: tuple[str, ...]
    report_refusals: bool
    objects: Mapping[str, tuple[str, ...]]
    priority: Priority


def packages_of(storage: Storage, routes: Sequence[Route]) -> tuple[list[PackageRecord], list[str]]:
    """Return the enabled packages that routes name, and the names of those that aren't enabled."""
    found: dict[tuple[str, str], PackageRecord] = {}
    missing = []
    for route in routes:
        package = storage.registry.package(route.package, route.version)
        if package is None or package.state != "enabled":
            missing.append(route.package)
        else:
            found[package.name, package.version] = package
    return list(found.values()), missing


def create_analyses(
    storage: Storage,
    client: EngineClient,
    transaction: Any,
    study_instance_uid: str,
    revision: int,
    routes: Sequence[Route],
    waiting: Sequence[WorkItem] = (),
) -> list[str]:
    """One job for each package; routes that name the same one share it, and its results go to the peers of all of them.

    A work item that waits stands for the job of its package; where no route names that, or others wait too, it gets a job of its own.
    """
    packages, _ = packages_of(storage, routes)
    first = {package.name: item for package in packages for item in reversed(waiting) if _names(item, package)}
    keys = []
    for package in packages:
        run, item = _run(storage, study_instance_uid, revision, package, routes), first.get(package.name)
        keys.append(create(storage, client, transaction, run if item is None else _as_asked(run, item, run.priority), item))
    rest = [item for item in waiting if item not in first.values()]
    return keys + [_begin(storage, client, transaction, item, revision, routes) for item in rest]


def begin_item(storage: Storage, client: EngineClient, transaction: Any, item: WorkItem, study: Study) -> None:
    """Create the analysis of a study's last revision that a work item asks for, or end the item with the reason why not.

    In the caller's write transaction, which has locked the work items of the study.
    """
    if can_begin(storage, transaction, item, study):
        _begin(storage, client, transaction, item, study.revision, routes_of(storage, study.study_instance_uid))


def _begin(storage: Storage, client: EngineClient, transaction: Any, item: WorkItem, revision: int, routes: Sequence[Route]) -> str:
    package = storage.registry.package(item.package, item.version)
    assert package is not None  # noqa: S101  can_begin has looked
    run = _run(storage, item.study_instance_uid, revision, package, routes)
    return create(storage, client, transaction, _as_asked(run, item, "routine"), item)


def can_begin(storage: Storage, transaction: Any, item: WorkItem, study: Study) -> bool:
    """Whether a work item can have its analysis; else it has ended, with why."""
    package = storage.registry.package(item.package, item.version)
    patient_id = item.requested.get("00100020", {}).get("Value", [""])[0]
    if package is None or package.state != "enabled":
        reason = f"package {item.package} is not enabled"
    elif patient_id and study.patient_id and patient_id != study.patient_id:
        reason = "the study is another patient's than the one that was named"
    else:
        return True
    storage.workitems.end(transaction, item.uid, reason)
    log.warning("work item ended", sop_instance_uid=item.uid, study_instance_uid=item.study_instance_uid, reason=reason)
    return False


def _names(item: WorkItem, package: PackageRecord) -> bool:
    return item.package == package.name and item.version in {None, package.version}


def _run(storage: Storage, study_instance_uid: str, revision: int, package: PackageRecord, routes: Sequence[Route]) -> Run:
    """What the routes that name a package make of its analysis."""
    mine = [r for r in routes if r.package == package.name and r.version in {None, package.version}]
    return Run(
        study_instance_uid=study_instance_uid,
        revision=revision,
        package=package.name,
        version=package.version,
        digest=package.digest,
        to_ae_titles=tuple(dict.fromkeys(title for route in mine for title in route.to_ae_titles)),
        report_refusals=any(route.report_refusals for route in mine),
        objects=_objects(mine),
        priority=_priority(mine, storage.index.requested_priority(study_instance_uid)),
    )


def _as_asked(run: Run, item: WorkItem, least: Priority) -> Run:
    """The run with the work item's priority, or `least` where that is more urgent, and its destinations, where it names any."""
    return replace(
        run, priority="stat" if "stat" in {item.priority, least} else "routine", to_ae_titles=item.to_ae_titles or run.to_ae_titles
    )


def create(storage: Storage, client: EngineClient, transaction: Any, run: Run, item: WorkItem | None = None) -> str:
    """Create and enqueue the next analysis of a revision by a package, for a work item or with one of its own; return its key."""
    storage.workitems.lock(transaction, run.study_instance_uid)
    number = storage.jobs.next_run(transaction, run.study_instance_uid, run.revision, run.package)
    key = f"analyse/{run.study_instance_uid}/{run.revision}/{run.package}/{number}"
    storage.jobs.create(transaction, key=key, kind="analyse", run=number, **asdict(run))
    client.enqueue(transaction, key, "analyse", run.priority)
    if item is not None:
        storage.workitems.begin(transaction, item.uid, key)
    elif (job := storage.jobs.job(key, connection=transaction)) is not None:
        _add_item(storage, transaction, job)
    return key


def _add_item(storage: Storage, transaction: Any, job: Job, number: int = 1) -> None:
    """Let the worklist show a job that nobody but a route, or a person here, asked for."""
    uid = workitem_uid(job.key, job.created_at, number)
    storage.workitems.add_for(transaction, uid, job, label=f"{job.package} {job.version}", worklist_label=WORKLIST_LABEL)


def begin_anew(storage: Storage, transaction: Any, job: Job) -> None:
    """Give an analysis that had ended, and is done again, another work item; no state of one goes back."""
    if job.ended_at is not None:
        number = storage.workitems.part_from(transaction, job)
        _add_item(storage, transaction, job, number + 1)
    storage.workitems.keep_start(transaction, job)


def list_old_jobs(storage: Storage) -> None:
    """Let the worklist show the analyses that were created before there was one."""
    while keys := storage.workitems.unlisted_jobs(limit=500):
        with storage.database.writing() as transaction:
            for job in filter(None, (storage.jobs.job(key, connection=transaction) for key in keys)):
                _add_item(storage, transaction, job)


def _objects(routes: Sequence[Route]) -> dict[str, tuple[str, ...]]:
    """What routes give to peers in place of their display profiles: of several the first by its name counts."""
    given: dict[str, tuple[str, ...]] = {}
    for route in sorted(routes, key=lambda route: route.name):
        for peer in route.to_ae_titles if route.objects is not None else ():
            given.setdefault(peer, route.objects or ())
    return given


def _priority(routes: Sequence[Route], requested: Priority) -> Priority:
    """A route's own priority counts before the one that the images ask for; of several the more urgent."""
    asked = {route.priority for route in routes if route.priority is not None} or {requested}
    return "stat" if "stat" in asked else "routine"


def routes_of(storage: Storage, study_instance_uid: str) -> list[Route]:
    """Return the routes that match who sent a study."""
    return chosen(storage.registry.routes(), storage.index.callers(study_instance_uid))


def chosen(routes: Sequence[Route], callers: Collection[tuple[str, str]]) -> list[Route]:
    """The routes that match who sent a study; for a self-test only its own, so that a phantom never reaches a PACS."""
    mine = matching(routes, callers)
    if any(calling == SELF_TEST for calling, _ in callers):
        return [route for route in mine if route.from_ae_title == SELF_TEST]
    return mine
