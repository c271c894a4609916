"""The analyse workflow, straight-line: files of a revision → series → volume → findings → result objects → proof → jobs to deliver.

The page to read first. Runs in the analyser, idempotent by the job's row: everything it leaves behind is committed in one
transaction at its end, and UIDs and dates derive from the job, so being killed anywhere costs time and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydicom import Dataset

from dicomnode.analysis.decoding import Decoder
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.inference import Model, load_model
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.package import load_package
from dicomnode.analysis.pixels import check_pixels_fit
from dicomnode.analysis.select import SelectedSeries, Selection
from dicomnode.analysis.volume import read_volume
from dicomnode.analysis.warm import WarmModels
from dicomnode.carry_over import AGAIN_SECONDS, CARRIED_OVER, INPUTS, FormerIsAtWork, detail_of, digest_of_inputs, standing
from dicomnode.config import Settings
from dicomnode.dimse.retrieving import Retriever
from dicomnode.engine import EngineClient
from dicomnode.errors import AnalysisFailed, PackageError, ProofFailed
from dicomnode.findings import Finding, Findings, Reference, ResultObject, RunIdentity, Volume
from dicomnode.logs import get_logger
from dicomnode.pace import Pace
from dicomnode.prefetch import Prefetched, Prefetcher
from dicomnode.priors import compared, identity_of, superseded
from dicomnode.reception import Reception
from dicomnode.results.capture import encode_captures, encode_reason
from dicomnode.results.identity import tracking_of
from dicomnode.results.presentation import encode_presentations
from dicomnode.results.profile import OWN, REPORTS, SEGMENTATIONS, Part, alternative, made_as, parts
from dicomnode.results.proof import prove, prove_selection
from dicomnode.results.proof_captures import prove_captures
from dicomnode.results.proof_presentations import prove_presentations
from dicomnode.results.proof_refusal import prove_refusal
from dicomnode.results.report import encode_refusal, encode_report
from dicomnode.results.segmentation import encode_segmentations
from dicomnode.results.selection import encode_selection
from dicomnode.retrieval import RETRIEVAL, Retrieval, in_report, rule_for
from storage import Storage
from storage.errors import OutOfSpace
from storage.records import Instance, Job, JobState, Result

RETRY_SECONDS = 60.0  # when the disk is full: it may not be for long

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the analysis of one job ended, with the objects that say so to the PACS."""

    state: JobState
    reason_code: str | None
    reason: str | None
    objects: Mapping[Part, tuple[ResultObject, ...]]  # none of a part: there is nothing to say by it
    detail: dict[str, Any]


class Analyser:
    """Works off analyse jobs, one at a time, with models kept warm; between two windows an urgent job may pass."""

    def __init__(
        self,
        settings: Settings,
        storage: Storage,
        client: EngineClient,
        *,
        decoder: Decoder | None = None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self._decoder = decoder
        self._prefetcher = prefetcher
        self._settings = settings
        self._storage = storage
        self._client = client
        self._warm: WarmModels[Model] = WarmModels(settings.analysis.warm_memory_mb * 2**20)
        reception = Reception(settings.listener, storage)
        self._retriever = Retriever(settings.node.ae_title, settings.tls, reception.begin, reception.ended)
        self._do_now: Callable[[str], object] | None = None
        self._passing = False  # an urgent job is done between two windows of another one; nobody passes that

    def let_pass(self, do_now: Callable[[str], object]) -> None:
        """Let urgent jobs that wait be done by `do_now` between two windows of a routine one."""
        self._do_now = do_now

    def analyse(self, key: str, attempt: int) -> float | None:
        """Do the analyse job `key` on its n-th try; return None when its row says how it ended, or seconds until the next try."""
        job = self._storage.jobs.start(key)
        if job.state != "running":
            return None
        crashes = job.attempts - 1 - attempt  # tries that didn't end by asking for another
        if crashes >= self._settings.engine.analyse_attempts:
            reason = f"the analysis ended its worker {crashes} times: dead-lettered"
            self._storage.jobs.finish(key, "failed", reason_code="dead-letter", reason=reason)
            log.error("dead letter", job=key, attempt=job.attempts)
            return None
        instances = self._storage.index.instances(job.study_instance_uid, job.revision)
        try:
            given = self._given(job)  # asked once: what is made is what is given
            outcome = self._outcome(job, instances, given)
            self._keep(job, outcome, given)
        except FormerIsAtWork as reason:
            self._storage.jobs.postpone(key, str(reason))
            return AGAIN_SECONDS
        except OutOfSpace as error:
            log.warning("no space for results", job=key, reason=str(error))
            self._storage.jobs.postpone(key, str(error))
            return RETRY_SECONDS
        log.info("analysed", job=key, outcome=outcome.state, reason_code=outcome.reason_code)
        return None

    def _outcome(self, job: Job, instances: Sequence[Instance], given: Mapping[str, Sequence[Part]]) -> Outcome:
        wanted = _to_make(given.values())
        headers: list[tuple[Path, Dataset]] = []
        prefetched = self._prefetcher.take(job.study_instance_uid, instances) if self._prefetcher else None
        try:
            if prefetched is None:
                headers = read_headers([self._storage.objects.path(instance.stored.object_id) for instance in instances])
                prefetched = Prefetched(content=frozenset(), headers=headers)
            headers = prefetched.headers
            return self._analyse(job, prefetched, instances, given)
        except NotEligible as refusal:
            headers = headers if job.report_refusals else []
            reason = " ".join([refusal.reason, *self._not_the_whole_study(job)])
            refused = self._without_result(job, headers, wanted, "refused", refusal.code, reason)
            return replace(refused, detail={"considered": list(refusal.considered)})
        except PackageError as error:
            return self._without_result(job, headers, wanted, "failed", "package", str(error))
        except AnalysisFailed as error:
            return self._without_result(job, headers, wanted, "failed", "analysis-failed", str(error))
        except ProofFailed as error:
            return self._without_result(job, headers, wanted, "failed", "result-withheld", f"result withheld: {error}")

    def _analyse(self, job: Job, prefetched: Prefetched, instances: Sequence[Instance], given: Mapping[str, Sequence[Part]]) -> Outcome:
        """Choose what the package is given, and let it work, unless results of the study's former revision stand."""
        folder = self._storage.registry.package_folder(job.package, job.version)
        package = load_package(folder)
        if package.digest != job.digest:
            raise PackageError(f"the files of {job.package}@{job.version} have changed since it was enabled: its digest is wrong")
        selection = prefetched.selection(package.manifest)
        inputs = digest_of_inputs(job, selection, instances, given)
        self._storage.jobs.remember(job.key, INPUTS, {"digest": inputs})
        stands = standing(self._storage, job, inputs, selection, package.manifest.algorithm_name)
        if stands is not None:
            reason = f"carried over from revision {stands.revision}: the package was given the same then"
            return Outcome(state="done", reason_code=CARRIED_OVER, reason=reason, objects={}, detail=detail_of(stands))
        return self._computed(job, package.manifest, selection, prefetched, _to_make(given.values()))

    def _computed(self, job: Job, manifest: Manifest, selection: Selection, prefetched: Prefetched, wanted: frozenset[Part]) -> Outcome:
        """Let the package work on what was chosen."""
        clock = _Clock()
        folder = self._storage.registry.package_folder(job.package, job.version)
        with self._retrieval(job) as retrieval:
            try:
                volumes = {series.input_name: self._volume(manifest, series, prefetched) for series in selection.series}
                clock.lap("volume")
                with self._model(folder, job) as model:
                    clock.lap("load")
                    findings = model(volumes, self._pace(job, retrieval))
            except NotEligible as refusal:  # by its pixels: what the series was chosen from is known
                raise NotEligible(refusal.code, refusal.reason, considered=selection.considered) from refusal
            clock.lap("inference")
            if retrieval is not None:
                self._storage.jobs.remember(job.key, RETRIEVAL, retrieval.end(self._urgent_waits))
                clock.lap("priors")
        findings = replace(findings, notes=(*self._not_the_whole_study(job), *findings.notes))
        identity = identity_of(job)
        headers_of_all = [header for series in selection.series for header in series.headers]
        findings = compared(
            self._storage, job, findings, next(iter(volumes.values())), selection.series[0].headers, self._decoder,
            not_fetched=in_report(self._fetched(job)),
        )  # fmt: skip
        clock.lap("comparison")
        former = superseded(self._storage, job)
        objects = _encoded(findings, tuple(volumes.values()), headers_of_all, identity, wanted, former)
        clock.lap("results")
        return Outcome(
            state="done", reason_code=None, reason=None, objects=objects, detail=_detail(selection, findings, identity, clock.seconds)
        )

    def _not_the_whole_study(self, job: Job) -> list[str]:
        """What the reader is told of a study of which more was still coming, or images are evidently absent: a sentence, or none."""
        (revision,) = (known for known in self._storage.index.revisions(job.study_instance_uid) if known.number == job.revision)
        if revision.stays_open:
            return [f"The study was still being received when it was analysed; looked at was what was complete: {revision.evidence}."]
        return [f"The study was incomplete when it was analysed: {'; '.join(revision.incomplete)}."] if revision.incomplete else []

    def _volume(self, manifest: Manifest, series: SelectedSeries, prefetched: Prefetched) -> Volume:
        """Take or read a series, and refuse one whose pixels aren't what its header says."""
        volume = prefetched.volume(series) or read_volume(series, self._decoder)
        accepts = next(accepts for accepts in manifest.inputs if accepts.name == series.input_name)
        check_pixels_fit(accepts, volume, series.frames[0].header)
        return volume

    def _without_result(
        self, job: Job, headers: Sequence[tuple[Path, Dataset]], wanted: frozenset[Part], state: JobState, code: str, reason: str
    ) -> Outcome:
        """A job's end without findings, said in a report and, where wanted, in a picture; without headers nowhere but in its row."""
        log.warning("not analysed", job=job.key, outcome=state, reason_code=code)
        objects: dict[Part, tuple[ResultObject, ...]] = {}
        images, identity, made_by = [header for _, header in headers], identity_of(job), self._made_by(job)
        for kind, form in sorted(wanted, key=str) if headers else ():
            if kind in REPORTS:
                former = superseded(self._storage, job)
                report = encode_refusal(code, reason, images, identity, kind=kind, supersedes=former, **made_by)
                try:
                    prove_refusal(report, code, reason, images, identity, algorithm_name=made_by["algorithm_name"])
                except ProofFailed as error:
                    log.error("report withheld", job=job.key, reason=str(error))
                    words = f"report withheld: {error} What it should say: {reason}"
                    return Outcome(state="failed", reason_code="result-withheld", reason=words, objects={}, detail={})
                objects[kind, form] = (report,)
            if kind == "key-image":
                objects[kind, None] = encode_reason(code, reason, images, identity, **made_by)
        return Outcome(state=state, reason_code=code, reason=reason, objects=objects, detail={})

    def _given(self, job: Job) -> dict[str, tuple[Part, ...]]:
        """What each peer is given: of the kinds that a route names for it, else by its display profile now, and in its form.

        One that is gone gets nothing sent anyway.
        """
        known = {peer.ae_title: peer for peer in self._storage.registry.peers()}
        given = {}
        for title in job.to_ae_titles:
            peer = known.get(title)
            form: dict[str, Any] = {} if peer is None else {"seg_per": peer.seg_per, "empty_frames": peer.empty_frames}
            given[title] = parts(job.objects.get(title, OWN if peer is None else peer.objects), **form)
        return given

    def _made_by(self, job: Job) -> dict[str, str]:
        """Who signs a report without findings: the package as its manifest says, or by its name if the manifest can't be read."""
        try:
            manifest = load_package(self._storage.registry.package_folder(job.package, job.version)).manifest
        except PackageError:
            return {"manufacturer": "dicomnode", "algorithm_name": job.package}
        return {"manufacturer": manifest.manufacturer, "algorithm_name": manifest.algorithm_name}

    def _model(self, folder: Path, job: Job) -> AbstractContextManager[Model]:
        """The package's model, warm or loaded now, by the fastest backend that its check allows."""
        settings = self._settings.analysis

        def load() -> Model:
            record = self._storage.registry.package(job.package, job.version)
            return load_model(
                folder, digest=job.digest, device=settings.device, threads=settings.threads, backend=settings.backend,
                report=record.check if record else None,
            )  # fmt: skip

        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return self._warm.using(job.digest, load, expected_bytes=size)

    def _retrieval(self, job: Job) -> AbstractContextManager[Retrieval | None]:
        """Fetch earlier studies meanwhile, if a route says so and the job hasn't done it before; for an urgent one nothing is fetched."""
        rule = rule_for(self._storage, job) if RETRIEVAL not in job.detail else None
        if rule is None:
            return nullcontext()
        if job.priority == "stat":
            urgent = "the study is urgent"
            told = {"peer": rule.ae_title, "found": 0, "studies": [], "ended": urgent, "why": urgent}
            self._storage.jobs.remember(job.key, RETRIEVAL, told)
            return nullcontext()
        return Retrieval(self._settings, self._storage, job, rule, self._retriever)

    def _fetched(self, job: Job) -> dict[str, Any] | None:
        """What is noted of the retrieval for a job, now or at an earlier try."""
        known = self._storage.jobs.job(job.key)
        return known.detail.get(RETRIEVAL) if known is not None else None

    def _urgent_waits(self) -> bool:
        return self._storage.jobs.urgent("analyse", 2 * self._settings.engine.poll_seconds) is not None

    def _pace(self, job: Job, retrieval: Retrieval | None) -> Pace:
        let_pass = None if self._passing or job.priority == "stat" else partial(self._let_urgent_pass, retrieval)
        return Pace(self._storage, job.key, deadline_seconds=self._settings.analysis.deadline_seconds, let_pass=let_pass)

    def _let_urgent_pass(self, retrieval: Retrieval | None) -> None:
        """Do a STAT job that no free analyser has taken: it has waited for longer than two polls. One level deep; nothing is fetched."""
        urgent = self._storage.jobs.urgent("analyse", 2 * self._settings.engine.poll_seconds)
        if urgent is None or self._do_now is None:
            return
        log.info("an urgent job passes", job=urgent.key)
        self._passing = True
        try:
            with retrieval.giving_way() if retrieval is not None else nullcontext():
                self._do_now(urgent.key)
        finally:
            self._passing = False

    def _keep(self, job: Job, outcome: Outcome, given: Mapping[str, tuple[Part, ...]]) -> None:
        """Store the result objects, then commit in one transaction: their rows, the jobs that deliver them, and how this job ended."""
        each = {made.sop_instance_uid: made for objects in outcome.objects.values() for made in objects}
        results = [_result(job, made, self._storage) for made in each.values()]
        with self._storage.database.writing() as transaction:
            ended = self._storage.jobs.finish(
                job.key,
                outcome.state,
                reason_code=outcome.reason_code,
                reason=outcome.reason,
                detail=outcome.detail,
                connection=transaction,
            )
            if not ended:
                log.info("discarded", job=job.key, reason="the job has ended meanwhile, e.g. it was cancelled")
                return
            self._storage.jobs.add_results(transaction, results)
            for peer, wanted in given.items():
                ways = _ways(wanted, outcome.objects)
                if ways:
                    self._create_delivery(transaction, job, peer, ways)

    def _create_delivery(self, transaction: Any, job: Job, peer: str, ways: Mapping[str, Sequence[tuple[str, Sequence[str]]]]) -> None:
        key = f"deliver/{job.key.removeprefix('analyse/')}/{peer}"
        self._storage.jobs.create(
            transaction, key=key, kind="deliver", study_instance_uid=job.study_instance_uid, revision=job.revision,
            package=job.package, version=job.version, digest=job.digest, run=job.run, peer=peer, priority=job.priority,
        )  # fmt: skip
        self._storage.jobs.add_deliveries(transaction, key, peer, list(ways), ways)
        self._client.enqueue(transaction, key, "deliver", job.priority)


def _to_make(given: Iterable[Sequence[Part]]) -> frozenset[Part]:
    """What the node keeps, what peers are given, and what they are given where they take no label maps."""
    wanted = {*parts(OWN), *(part for each in given for part in each)}
    return frozenset(wanted | {other for part in wanted for other in [alternative(part)] if other is not None})


def _ways(wanted: Sequence[Part], objects: Mapping[Part, Sequence[ResultObject]]) -> dict[str, list[tuple[str, list[str]]]]:
    """Of each object that a peer is given itself and its alternative, each with the segmentations that it refers to."""
    ways: dict[str, list[tuple[str, list[str]]]] = {}
    for part in wanted:
        other = alternative(part)
        alternatives = objects.get(other, ()) if other is not None else ()
        for number, made in enumerate(objects.get(part, ())):
            ways[made.sop_instance_uid] = [(made.sop_instance_uid, _referred_to(part, objects))]
            if number < len(alternatives) and other is not None and alternatives[number].sop_instance_uid != made.sop_instance_uid:
                ways[made.sop_instance_uid].append((alternatives[number].sop_instance_uid, _referred_to(other, objects)))
    return ways


def _referred_to(part: Part, objects: Mapping[Part, Sequence[ResultObject]]) -> list[str]:
    kind, form = part
    return [made.sop_instance_uid for made in objects.get((form.kind, form), ())] if form is not None and kind in REPORTS else []


def _encoded(
    findings: Findings,
    volumes: Sequence[Volume],
    headers: Sequence[Dataset],
    identity: RunIdentity,
    wanted: frozenset[Part],
    supersedes: Sequence[Reference],
) -> dict[Part, tuple[ResultObject, ...]]:
    """The wanted objects, each proved. The first volume's grid is that of the findings."""
    volume, objects = volumes[0], dict[Part, tuple[ResultObject, ...]]()
    made_for = {part: made_as(part, film=volume.is_projection) for part in wanted}
    wanted = frozenset(part for part in made_for.values() if part is not None)
    for form in sorted({form for kind, form in wanted if kind in (*SEGMENTATIONS, *REPORTS)}, key=str):
        segmentations = encode_segmentations(findings, volume, headers, identity, form) if form is not None else ()
        if form is not None:
            objects[form.kind, form] = segmentations
        reports = [report for report in REPORTS if (report, form) in wanted]
        for report in reports or REPORTS[:1]:  # a segmentation is proved together with a report
            variant = form.variant if form is not None else ""
            made = encode_report(findings, volume, headers, identity, segmentations, kind=report, variant=variant, supersedes=supersedes)
            prove(segmentations, made, findings, volume, volumes[1:], form=form)
            objects[report, form] = (made,)
    if ("key-image", None) in wanted:
        objects["key-image", None] = encode_captures(findings, volume, headers, identity)
        prove_captures(objects["key-image", None], findings, volume)
    if ("key-object", None) in wanted:
        selection = encode_selection(findings, volume, headers, identity)
        prove_selection(selection, findings, volume)
        objects["key-object", None] = () if selection is None else (selection,)
    if ("presentation-state", None) in wanted:
        objects["presentation-state", None] = encode_presentations(findings, volume, headers, identity)
        prove_presentations(objects["presentation-state", None], findings, volume)
    return {part: objects[made] for part, made in made_for.items() if made is not None}


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


def _result(job: Job, made: ResultObject, storage: Storage) -> Result:
    return Result(
        sop_instance_uid=made.sop_instance_uid, sop_class_uid=made.sop_class_uid, transfer_syntax_uid=made.transfer_syntax_uid,
        modality=made.modality, study_instance_uid=job.study_instance_uid, job_key=job.key, stored=storage.objects.put(*made.parts),
        created_at=job.created_at, series_instance_uid=made.series_instance_uid, series_number=made.series_number,
        series_description=made.series_description, instance_number=made.instance_number,
    )  # fmt: skip


def _detail(selection: Selection, findings: Findings, identity: RunIdentity, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the job's row keeps of an analysis: no patient data, the numbers a list or a summary shows."""
    return {
        "series_instance_uid": selection.series[0].series_instance_uid,
        "other_series": [series.series_instance_uid for series in selection.series[1:]],
        "why": selection.why,
        "considered": list(selection.considered),
        "device": findings.device,
        "omitted": findings.omitted,
        "notes": list(findings.notes),
        "scores": [
            {"label": score.label, "probability": round(score.probability, 4), "threshold": score.threshold, "positive": score.positive}
            for score in findings.scores
        ],
        "findings": [_finding(finding, identity, findings) for finding in findings.findings],
        "comparison": _comparison(findings),
        "seconds": dict(seconds),
        "model_seconds": {stage: round(value, 3) for stage, value in findings.seconds.items()},
    }


def _finding(finding: Finding, identity: RunIdentity, findings: Findings) -> dict[str, Any]:
    return {
        "tracking_uid": tracking_of(identity, finding)[0],
        "label": finding.label,
        "probability": round(finding.probability, 4),
        "volume_ml": round(finding.volume_ml, 4),
        "long_axis_mm": None if finding.long_axis_mm is None else round(finding.long_axis_mm, 2),
        "centre_lps_mm": [round(value, 2) for value in finding.centre_lps_mm] if finding.centre_lps_mm else None,
        "box_px": list(finding.bounds_px) if finding.shape == "box" or finding.centre_lps_mm is None else None,
        "side": finding.side,
        "change": None if findings.comparison is None else _change(finding),
    }


def _change(finding: Finding) -> dict[str, Any]:
    """What became of it since the study that was compared with; "seen before" is said of what has no volume."""
    growth = finding.growth
    if growth is None:
        return {"status": "new", "words": "new", "prior_volume_ml": None, "volume_change_percent": None, "doubling_days": None}
    status: str = growth.trend or "seen before"
    words = status
    words += "" if growth.percent is None else f", {growth.percent:+.1f} %"
    words += "" if growth.doubling_days is None else f", doubling in {growth.doubling_days:.0f} days"
    return {
        "status": status,
        "words": words,
        "prior_volume_ml": None if growth.percent is None else round(growth.former.volume_ml, 4),
        "volume_change_percent": None if growth.percent is None else round(growth.percent, 2),
        "doubling_days": None if growth.doubling_days is None else round(growth.doubling_days, 1),
    }


def _comparison(findings: Findings) -> dict[str, Any]:
    """Which study was compared with, and what of it is no longer seen; or the reason why there is none."""
    if findings.comparison is None:
        return {"study_instance_uid": None, "reason": findings.not_compared}
    prior = findings.comparison.prior
    return {
        "study_instance_uid": prior.study_instance_uid,
        "date": prior.date,
        "days": prior.days,
        "version": prior.version,
        "alignment": prior.alignment,
        "vanished": [
            {"tracking_uid": former.tracking_uid, "label": former.label, "side": former.side, "prior_volume_ml": round(former.volume_ml, 4)}
            for former in findings.comparison.vanished
        ],
        "reason": None,
    }
