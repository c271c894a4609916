"""Commands over studies and jobs: what arrived, what became of it, and doing it again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dicomnode.cli.terminal import ConfigOption, JsonOption, opened, show
from dicomnode.config import Settings
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.errors import UsageError
from storage import Storage
from storage.records import Backlog, Commitment, CommitmentRequest, Delivery, Job, JobKind, JobState, Notice, Revision, Study

study = typer.Typer(no_args_is_help=True, help="Studies: list, show all that is known of one, analyse one again.")
commitment = typer.Typer(no_args_is_help=True, help="Storage commitment: what peers were asked, and what they ask this node.")
delivery = typer.Typer(no_args_is_help=True, help="Deliveries: what waits for which peer, why, since when, and sending it again.")
job = typer.Typer(no_args_is_help=True, help="Jobs: list, retry, cancel, change the priority.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(study, name="study")
    app.add_typer(job, name="job")
    app.add_typer(delivery, name="delivery")
    app.add_typer(commitment, name="commitment")


@study.command("list")
def study_list(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the studies, the last received first."""
    with opened(config) as (_, storage):
        columns = ["study_instance_uid", "patient_id", "study_date", "instances", "revision", "state", "last_received_at"]
        show(storage.index.studies(), columns, as_json=json)


@study.command("show")
def study_show(uid: str, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show a study: series, revisions, jobs with their reasons, work items, result objects, deliveries, and what was refused."""
    with opened(config) as (_, storage):
        found = storage.index.study(uid)
        refused = storage.index.quarantined(uid)
        asked = storage.workitems.of_study(uid)
        if found is None and not refused and not asked:
            raise UsageError(f"there is no study {uid!r}")
        tables: dict[str, tuple[Sequence[Any], list[str]]] = {
            "study": (
                [found] if found else [],
                ["patient_id", "patient_name", "study_date", "study_description", "instances", "revision", "state", "removed_at"],
            ),
            "series": (storage.index.series(uid), ["series_instance_uid", "modality", "series_number", "series_description", "instances"]),
            "revisions": (storage.index.revisions(uid), ["number", "closed_at", "evidence", "outcome"]),
            "jobs": (
                storage.jobs.jobs(study_instance_uid=uid),
                ["key", "state", "progress", "priority", "attempts", "reason_code", "reason"],
            ),
            "workitems": (asked, ["uid", "state", "package", "priority", "requester", "label", "job_key", "reason"]),
            "results": (storage.jobs.results(study_instance_uid=uid), ["modality", "sop_instance_uid", "created_at"]),
            "deliveries": (
                _with_next_try(storage, uid),
                ["sop_instance_uid", "peer", "state", "attempts", "error", "note", "next_at", "committed_at"],
            ),
            "refused": (refused, ["sop_instance_uid", "calling_ae_title", "dimse_status", "reason", "received_at"]),
        }
        if json:
            show([{name: [dataclasses.asdict(row) for row in rows] for name, (rows, _) in tables.items()}], [], as_json=True)
            return
        analyses = storage.jobs.jobs(study_instance_uid=uid, kind="analyse")
        tables["evident of series"], tables["asked"] = _evidence(storage.index.revisions(uid))
        tables["announced"] = _announced(storage.notices.of_study(uid))
        tables["fetched"] = _fetched(storage.index.revisions(uid), analyses)
        tables["why"], tables["considered"] = _selection(analyses)
        tables["findings"], tables["compared with"] = _findings(analyses)
        for name, (rows, columns) in tables.items():
            if rows:
                Console().print(f"[bold]{name}[/bold]")
                show(rows, columns, as_json=False)


def _evidence(revisions: Sequence[Revision]) -> tuple[tuple[Sequence[Any], list[str]], tuple[Sequence[Any], list[str]]]:
    """Two tables: what each series told of its completeness when a revision was closed, and what peers that were asked hold."""
    series = [
        {
            "revision": revision.number, **known,
            "numbers": f"{known['numbers']}: {known['absent']}" if known["absent"] else known["numbers"],
            "stated": ", ".join(f"{a['images']} of {a['stated']}" for a in known["acquisitions"]),
        }
        for revision in revisions for known in revision.facts.get("series", ())
    ]  # fmt: skip
    peers = [{"revision": revision.number, **known} for revision in revisions for known in revision.facts.get("peers", ())]
    columns = ["revision", "series_number", "modality", "images", "numbers", "slices", "stated"]
    return (series, columns), (peers, ["revision", "peer", "state", "instances", "absent", "reason"])


def _fetched(revisions: Sequence[Revision], jobs: Sequence[Job]) -> tuple[Sequence[Any], list[str]]:
    """A table: what peers were asked to send of images that had not come, and of earlier studies to compare with."""
    from dicomnode.retrieval import RETRIEVAL

    missing = [
        {"what": f"images missing of revision {revision.number}", "peer": one["peer"], "tries": one["tries"], "instances": one["arrived"],
         "ended": one["reason"] or "fetched"}
        for revision in revisions for one in revision.facts.get("fetched", ())
    ]  # fmt: skip
    earlier = [
        {"what": f"study {one['study_instance_uid']}", "peer": told["peer"], "tries": 1 + told.get("gave_way", 0),
         "instances": one["instances"], "ended": one["state"]}
        for job in jobs for told in [job.detail.get(RETRIEVAL)] if told is not None for one in told["studies"]
    ]  # fmt: skip
    failed = [
        {"what": f"earlier studies for {job.package}", "peer": told["peer"], "tries": 1, "instances": 0, "ended": told["ended"]}
        for job in jobs for told in [job.detail.get(RETRIEVAL)] if told is not None and "ended" in told
    ]  # fmt: skip
    return missing + earlier + failed, ["what", "peer", "tries", "instances", "ended"]


def _announced(notices: Sequence[Notice]) -> tuple[Sequence[Any], list[str]]:
    """A table: what modalities and archives have announced of the study."""
    rows = [{**dataclasses.asdict(notice), "images": sum(map(len, notice.images.values()))} for notice in notices]
    return rows, ["kind", "ae_title", "state", "images", "sop_instance_uid", "created_at", "changed_at"]


def _selection(jobs: Sequence[Job]) -> tuple[tuple[Sequence[Any], list[str]], tuple[Sequence[Any], list[str]]]:
    """Two tables: why each package was given what it was, and what it could choose from; with --json both stand in the jobs' detail."""
    why = [{"package": job.package, "run": job.run, "why": job.detail["why"]} for job in jobs if job.detail.get("why")]
    considered = [{"package": job.package, "run": job.run, **series} for job in jobs for series in job.detail.get("considered", ())]
    columns = ["package", "run", "input", "series_number", "part", "images", "chosen", "reason_code", "reason"]
    return (why, ["package", "run", "why"]), (considered, columns)


def _findings(jobs: Sequence[Job]) -> tuple[tuple[Sequence[Any], list[str]], tuple[Sequence[Any], list[str]]]:
    """Two tables: what was found, with what became of it since an earlier study; and which study that was, or why there is none."""
    found, compared = [], []
    for job in jobs:
        run = {"package": job.package, "revision": job.revision, "run": job.run}
        comparison = job.detail.get("comparison")
        for finding in job.detail.get("findings", ()):
            change = finding.get("change")
            found.append({**run, **finding, "since": "" if change is None else change["words"]})
        if comparison is not None:
            empty = {"volume_ml": None, "long_axis_mm": None, "since": "no longer seen"}
            found += [{**run, **former, **empty} for former in comparison.get("vanished", ())]
            compared.append({**run, **dict.fromkeys(("date", "days", "alignment")), **comparison})
    columns = ["package", "revision", "run", "label", "side", "volume_ml", "long_axis_mm", "since", "tracking_uid"]
    return (found, columns), (compared, ["package", "revision", "run", "study_instance_uid", "date", "days", "alignment", "reason"])


@study.command("reanalyse")
def study_reanalyse(uid: str, config: ConfigOption = None) -> None:
    """Analyse the last revision of a study again with each enabled package its routes name."""
    from dicomnode.completion import reanalyse

    with _with_engine(config) as (storage, client):
        found = _known_study(storage, uid)
        if found.revision == 0:
            raise UsageError("the study has no closed revision yet: it is analysed when it is complete")
        if storage.index.revisions(uid)[-1].stays_open:
            raise UsageError("the study is still being received: it is analysed as a whole when it is complete")
        if not found.holds:
            raise UsageError(f"its objects were removed: {found.removed_why}; send the study again to have it analysed")
        keys = reanalyse(storage, client, found)
        if not keys:
            raise UsageError("no route with an enabled package matches this study")
        typer.echo("\n".join(keys))


@job.command("list")
def job_list(
    state: Annotated[Literal["queued", "running", "done", "refused", "failed", "cancelled"] | None, typer.Option(help="only these")] = None,
    kind: Annotated[Literal["analyse", "deliver"] | None, typer.Option(help="only these")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """List the jobs."""
    only_state: JobState | None = state
    only_kind: JobKind | None = kind
    with opened(config) as (_, storage):
        jobs = storage.jobs.jobs(state=only_state, kind=only_kind)
        show(jobs, ["key", "state", "progress", "priority", "attempts", "reason_code", "reason", "created_at"], as_json=json)


@job.command("retry")
def job_retry(key: str, config: ConfigOption = None) -> None:
    """Do a failed, refused or cancelled job again, or one that waits for its next try at once."""
    from dicomnode.completion import retry

    with _with_engine(config) as (storage, client):
        found = _known_job(storage, key)
        of_study = storage.index.study(found.study_instance_uid)
        if of_study is not None and of_study.removed_at is not None and found.created_at <= of_study.removed_at:
            raise UsageError(f"what the job works with was removed: {of_study.removed_why}; send the study again to have it analysed")
        if found.state in {"done", "running"}:
            raise UsageError(f"the job is {found.state}; `dicomnode study reanalyse` analyses a study again")
        typer.echo(retry(storage, client, found))


@job.command("cancel")
def job_cancel(key: str, config: ConfigOption = None) -> None:
    """Cancel a job that waits or runs."""
    from dicomnode.completion import cancel

    with _with_engine(config) as (storage, client):
        found = _known_job(storage, key)
        if found.state not in {"queued", "running"}:
            raise UsageError(f"the job is {found.state}, there is nothing to cancel")
        cancel(storage, client, found)


@job.command("priority")
def job_priority(key: str, priority: Literal["stat", "routine"], config: ConfigOption = None) -> None:
    """Change the priority of a job."""
    from dicomnode.completion import prioritise

    with _with_engine(config) as (storage, client):
        found = _known_job(storage, key)
        if found.state not in {"queued", "running"}:
            raise UsageError(f"the job is {found.state}, it has nothing to wait for")
        prioritise(storage, client, found, priority)


@delivery.command("list")
def delivery_list(
    peer: Annotated[str | None, typer.Option(help="only to this AE title")] = None,
    state: Annotated[Literal["queued", "running", "done", "failed", "cancelled"] | None, typer.Option(help="only these")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """List the deliver jobs: how much of each its peer has, why it waits or has failed, since when, and when it is tried next."""
    only_state: JobState | None = state
    with opened(config) as (_, storage):
        backlogs = {backlog.peer: backlog for backlog in storage.backlogs.backlogs()}
        objects: dict[str, list[Delivery]] = {}
        for row in storage.jobs.deliveries():
            objects.setdefault(row.job_key, []).append(row)
        jobs = [found for found in storage.jobs.jobs(state=only_state, kind="deliver") if peer in {None, found.peer}]
        rows = [_delivery(found, objects.get(found.key, []), backlogs.get(found.peer or "")) for found in jobs]
        columns = ["key", "state", "priority", "objects", "sent", "committed", "failed", "reason", "waiting_since", "next_at"]
        show(rows, columns, as_json=json)


@delivery.command("backlog")
def delivery_backlog(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the peers that could not be reached, since when, why, what waits for them, and when they are tried next."""
    with opened(config) as (_, storage):
        waiting = Counter(found.peer for found in storage.jobs.jobs(state="queued", kind="deliver") if found.in_backlog)
        rows = [{**dataclasses.asdict(backlog), "waiting": waiting[backlog.peer]} for backlog in storage.backlogs.backlogs()]
        show(rows, ["peer", "waiting", "since", "tries", "next_at", "error"], as_json=json)


@delivery.command("retry")
def delivery_retry(
    key: Annotated[str | None, typer.Argument(help="one deliver job")] = None,
    peer: Annotated[str | None, typer.Option(help="all that has failed or waits for this AE title")] = None,
    every: Annotated[bool, typer.Option("--all", help="all that has failed or waits")] = False,
    config: ConfigOption = None,
) -> None:
    """Send again, now and by a new schedule: one delivery, those of a peer, or all that have failed or wait."""
    from dicomnode.backlog import Backlogs

    if sum((key is not None, peer is not None, every)) != 1:
        raise UsageError("name one delivery, a peer by --peer, or --all")
    if key is not None:
        job_retry(key, config)
        return
    with opened(config) as (settings, storage), _engine(settings) as client:
        if peer is not None and storage.registry.peer(peer) is None:
            raise UsageError(f"there is no peer {peer!r}")
        idle = {found.peer for state in ("failed", "queued") for found in storage.jobs.jobs(state=state, kind="deliver")}
        backlogs = Backlogs(settings, storage, client)
        for ae_title in sorted(title for title in idle if title is not None and peer in {None, title}):
            typer.echo(f"{backlogs.send_again(ae_title)} for {ae_title}")


def _with_next_try(storage: Storage, uid: str) -> list[Delivery]:
    """The deliveries of a study; those that wait for a peer which is away are tried when that is."""
    waiting = {job.key for job in storage.jobs.jobs(study_instance_uid=uid, kind="deliver") if job.in_backlog}
    next_at = {backlog.peer: backlog.next_at for backlog in storage.backlogs.backlogs()}
    return [
        dataclasses.replace(row, next_at=row.next_at or next_at.get(row.peer)) if row.job_key in waiting and row.state == "waiting" else row
        for row in storage.jobs.deliveries(study_instance_uid=uid)
    ]


def _delivery(found: Job, objects: Sequence[Delivery], backlog: Backlog | None) -> dict[str, Any]:
    states = Counter(row.state for row in objects)
    own = [row.next_at for row in objects if row.next_at is not None]
    return {
        "key": found.key,
        "peer": found.peer,
        "state": found.state,
        "priority": found.priority,
        "objects": len(objects),
        "sent": states["sent"] + states["committed"],
        "committed": states["committed"],
        "failed": states["failed"],
        "reason_code": found.reason_code,
        "reason": found.reason,
        "waiting_since": found.waiting_since if found.state == "queued" else None,
        "next_at": backlog.next_at if found.in_backlog and backlog is not None else min(own, default=None),
    }


@commitment.command("list")
def commitment_list(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List what peers were asked to commit to (role SCU), and what they ask this node to commit to (role SCP)."""
    with opened(config) as (_, storage):
        rows = [_as_scu(storage, asked) for asked in storage.commitments.commitments()] + list(map(_as_scp, storage.requests.requests()))
        show(rows, ["key", "role", "peer", "state", "instances", "not_committed", "reason", "asked_at", "ended_at"], as_json=json)


@commitment.command("retry")
def commitment_retry(key: str, config: ConfigOption = None) -> None:
    """Send a report to a peer once more that was given up; a delivery that wasn't committed to: `dicomnode job retry`."""
    from dicomnode.commitment import answer_again

    with _with_engine(config) as (storage, client):
        found = storage.requests.request(key)
        if found is None:
            raise UsageError(f"there is no request {key!r}; `dicomnode commitment list` shows their keys")
        if found.state != "failed":
            raise UsageError(f"the request is {found.state}, there is nothing to repeat")
        answer_again(storage, client, found)


def _as_scu(storage: Storage, asked: Commitment) -> dict[str, Any]:
    deliveries = [row for row in storage.jobs.deliveries(job_key=asked.job_key) if row.transaction_uid == asked.transaction_uid]
    return {
        "key": asked.job_key,
        "role": "SCU",
        "peer": asked.peer,
        "transaction_uid": asked.transaction_uid,
        "state": asked.state,
        "instances": len(deliveries),
        "not_committed": sum(row.state != "committed" for row in deliveries),
        "reason": asked.error,
        "asked_at": asked.asked_at,
        "ended_at": asked.answered_at,
    }


def _as_scp(request: CommitmentRequest) -> dict[str, Any]:
    return {
        "key": request.key,
        "role": "SCP",
        "peer": request.peer,
        "transaction_uid": request.transaction_uid,
        "state": request.state,
        "instances": request.instances,
        "not_committed": None if request.failures is None else len(request.failures),
        "reason": request.reason,
        "asked_at": request.asked_at,
        "ended_at": request.ended_at,
    }


@contextmanager
def _with_engine(config: Path | None) -> Iterator[tuple[Storage, EngineClient]]:
    with opened(config) as (settings, storage), _engine(settings) as client:
        yield storage, client


@contextmanager
def _engine(settings: Settings) -> Iterator[EngineClient]:
    prepare_engine(settings.database_url)
    with closing(EngineClient(settings.database_url)) as client:
        yield client


def _known_study(storage: Storage, uid: str) -> Study:
    found = storage.index.study(uid)
    if found is None:
        raise UsageError(f"there is no study {uid!r}")
    return found


def _known_job(storage: Storage, key: str) -> Job:
    found = storage.jobs.job(key)
    if found is None:
        raise UsageError(f"there is no job {key!r}; `dicomnode job list` shows their keys")
    return found
