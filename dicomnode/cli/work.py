"""Commands over studies and jobs: what arrived, what became of it, and doing it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dicomnode.cli.terminal import ConfigOption, JsonOption, opened, show
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.errors import UsageError
from storage import Storage
from storage.records import Commitment, CommitmentRequest, Job, JobKind, JobState, Study

study = typer.Typer(no_args_is_help=True, help="Studies: list, show all that is known of one, analyse one again.")
commitment = typer.Typer(no_args_is_help=True, help="Storage commitment: what peers were asked, and what they ask this node.")
job = typer.Typer(no_args_is_help=True, help="Jobs: list, retry, cancel, change the priority.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(study, name="study")
    app.add_typer(job, name="job")
    app.add_typer(commitment, name="commitment")


@study.command("list")
def study_list(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the studies, the last received first."""
    with opened(config) as (_, storage):
        columns = ["study_instance_uid", "patient_id", "study_date", "instances", "revision", "state", "last_received_at"]
        show(storage.index.studies(), columns, as_json=json)


@study.command("show")
def study_show(uid: str, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show a study: series, revisions, jobs with their reasons, result objects, deliveries, and what was refused."""
    with opened(config) as (_, storage):
        found = storage.index.study(uid)
        refused = storage.index.quarantined(uid)
        if found is None and not refused:
            raise UsageError(f"there is no study {uid!r}")
        tables: dict[str, tuple[Sequence[Any], list[str]]] = {
            "study": (
                [found] if found else [],
                ["patient_id", "patient_name", "study_date", "study_description", "instances", "revision", "state"],
            ),
            "series": (storage.index.series(uid), ["series_instance_uid", "modality", "series_number", "series_description", "instances"]),
            "revisions": (storage.index.revisions(uid), ["number", "closed_at", "evidence", "outcome"]),
            "jobs": (
                storage.jobs.jobs(study_instance_uid=uid),
                ["key", "state", "progress", "priority", "attempts", "reason_code", "reason"],
            ),
            "results": (storage.jobs.results(study_instance_uid=uid), ["modality", "sop_instance_uid", "created_at"]),
            "deliveries": (
                storage.jobs.deliveries(study_instance_uid=uid),
                ["sop_instance_uid", "peer", "state", "attempts", "error", "next_at", "committed_at"],
            ),
            "refused": (refused, ["sop_instance_uid", "calling_ae_title", "dimse_status", "reason", "received_at"]),
        }
        if json:
            show([{name: [dataclasses.asdict(row) for row in rows] for name, (rows, _) in tables.items()}], [], as_json=True)
            return
        analyses = storage.jobs.jobs(study_instance_uid=uid, kind="analyse")
        tables["why"], tables["considered"] = _selection(analyses)
        tables["findings"], tables["compared with"] = _findings(analyses)
        for name, (rows, columns) in tables.items():
            if rows:
                Console().print(f"[bold]{name}[/bold]")
                show(rows, columns, as_json=False)


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
    with opened(config) as (settings, storage):
        prepare_engine(settings.database_url)
        client = EngineClient(settings.database_url)
        try:
            yield storage, client
        finally:
            client.close()


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
