"""Results that stand: what a package would be given of a study's next revision is what it was given of the last one.

Then nothing is computed, made or sent again: the former job's results are this one's too. Compared are the chosen images by UID and
digest, the package, what each peer is given, the earlier study to compare with, and what must be said of absent images. Must never let
a result stand that wasn't made, that is no more, or that somebody has asked to be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom import Dataset

from dicomnode.analysis.select import Selection
from dicomnode.priors import PRIOR, SUPERSEDES, same_prior
from dicomnode.results.profile import Part
from dicomnode.retrieval import RETRIEVAL
from storage import Storage
from storage.records import Instance, Job, Revision

INPUTS = "inputs"  # name of what a job's row keeps: the digest of what it was given
CARRIED_OVER = "carried-over"  # reason code of a job for which another one's results stand
AGAIN_SECONDS = 5.0  # a former job that may have the same inputs isn't done yet

_OF_ITS_OWN = (INPUTS, PRIOR, SUPERSEDES, RETRIEVAL)  # what a row keeps for its own job's results alone


class FormerIsAtWork(Exception):
    """The same package may be at work on the same images, for the former revision; the message says so."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A job whose results stand for another one."""

    origin: Job  # which made them
    revision: int  # the former revision, for which they stood already


def digest_of_inputs(job: Job, selection: Selection, instances: Sequence[Instance], given: Mapping[str, Sequence[Part]]) -> str:
    """Return the SHA-256 over all that the job's results depend on, but for other studies and what is absent of this one."""
    digests = {instance.sop_instance_uid: instance.stored.sha256 for instance in instances}
    series = [
        [one.input_name, [[uid := str(frame.image.SOPInstanceUID), frame.number, digests[uid]] for frame in one.frames]]
        for one in selection.series
    ]
    peers = {title: [str(part) for part in parts] for title, parts in given.items()}
    everything = [job.package, job.version, job.digest, series, selection.absent, peers]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def standing(storage: Storage, job: Job, inputs: str, selection: Selection, algorithm_name: str) -> Standing | None:
    """Return whose results stand for the first run of a job on its revision; None if it must be done.

    Raises:
        FormerIsAtWork: whether there are such results will be seen later.
    """
    former = _former(storage, job)
    if former is None or former.digest != job.digest:
        return None
    known = former.detail.get(INPUTS, {}).get("digest")
    if former.state in {"queued", "running"} and known in {None, inputs}:
        if former.state == "queued" and job.priority == "stat" and former.priority != "stat":
            return None  # what is urgent doesn't wait for what isn't
        raise FormerIsAtWork(f"revision {former.revision} is being analysed, maybe of the same images")
    if former.state != "done" or known != inputs:
        return None
    origin = storage.jobs.job(former.carried_from) if former.carried_from is not None else former
    if origin is None or not storage.jobs.results(job_key=origin.key):
        return None  # its results were removed
    chosen = {series.series_instance_uid for series in selection.series}
    revisions = {revision.number: revision for revision in storage.index.revisions(job.study_instance_uid)}
    if not set(_said(revisions[job.revision], chosen)) <= set(_said(revisions[origin.revision], chosen)):
        return None
    header: Dataset = selection.series[0].headers[0]
    return Standing(origin=origin, revision=former.revision) if same_prior(storage, job, origin, header, algorithm_name) else None


def detail_of(stands: Standing) -> dict[str, Any]:
    """Return what the row of a job keeps for which another one's results stand: what was found, and where that is from."""
    found = {name: value for name, value in stands.origin.detail.items() if name not in _OF_ITS_OWN}
    return {**found, "carried_over": {"revision": stands.revision, "job": stands.origin.key}}


def _former(storage: Storage, job: Job) -> Job | None:
    """The last job of the package on an earlier revision that said something or will; None for a run that somebody has asked for."""
    if job.run > 1:
        return None
    same = [other for other in storage.jobs.jobs(study_instance_uid=job.study_instance_uid, kind="analyse") if other.package == job.package]
    before = [other for other in same if other.revision < job.revision]
    for other in sorted(before, key=lambda other: (other.revision, other.run), reverse=True):
        if other.state in {"queued", "running", "done"} or storage.jobs.results(job_key=other.key):
            return other
    return None


def _said(revision: Revision, chosen: Collection[str]) -> list[str]:
    """What a report must say of what is absent, but for that of series that it isn't about."""
    others = {known.get("contradiction") for known in revision.facts.get("series", ()) if known["series_instance_uid"] not in chosen}
    return [reason for reason in revision.incomplete if reason not in others]
