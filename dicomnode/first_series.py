"""Packages that start on the first complete series that suit them, while other series of the study still come.

Only where all routes of a package say so, once for a study, and only on series that are evidently complete: of a package with several
inputs all must be there. Must never decide that a study is complete, nor read an image of a series that still comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.manifest import Manifest, parse_manifest
from dicomnode.analysis.select import select
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.evidence import SETTLED_SECONDS, NoticeEvidence, SeriesEvidence, complete_by_itself, series_evidence
from storage import Storage
from storage.records import Arrival, PackageRecord, Route, Study

_Content = frozenset[tuple[str, int]]  # UID and number of images of each of some series


@dataclass(frozen=True, kw_only=True)
class Start:
    """Packages that can start on some series of a study."""

    routes: tuple[Route, ...]  # that name them
    images: Mapping[str, int]  # of each of the series
    evidence: str  # what shows that they are complete
    facts: Mapping[str, Any]


class FirstSeries:
    """Looks at the studies that are being received, and remembers what it saw of them until another image of a series comes."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._arrivals: dict[str, tuple[datetime, list[Arrival]]] = {}  # by study, as of its last image
        self._known: dict[str, dict[tuple[str, int], SeriesEvidence]] = {}  # by study, and by series and its number of images
        self._unfit: dict[str, set[tuple[str, _Content]]] = {}  # by study: the digest of a package, and what doesn't suit it
        self._manifests: dict[str, Manifest | None] = {}  # by digest

    def starts(
        self, study: Study, routes: Sequence[Route], notices: Sequence[NoticeEvidence], times: tuple[datetime, datetime]
    ) -> list[Start]:
        """Return which packages can start on what came of a study; none whose routes don't all say so, or that has started.

        `notices` are what was announced of it, `times` now and since when silence counts.
        """
        waiting = self._waiting(study, routes)
        if not waiting:
            return []
        arrivals = self._arrivals_of(study)
        found: dict[_Content, list[PackageRecord]] = defaultdict(list)
        evident: dict[_Content, list[str]] = {}
        for package, seconds in waiting:
            manifest = self._manifest(package)
            if manifest is None:
                continue  # its job says so
            complete: dict[tuple[str, int], str] = {}
            for arrival in arrivals:
                silent = _silence(arrival, times)
                if silent >= min(SETTLED_SECONDS, seconds) and _is_of(arrival, manifest):
                    words = complete_by_itself(self._evidence(study, arrival), silent, seconds, notices)
                    complete |= {(arrival.series_instance_uid, arrival.images): words} if words is not None else {}
            content = frozenset(complete)
            if content and self._suits(study, package, manifest, content):
                found[content].append(package)
                evident[content] = list(complete.values())
        return [self._start(study, routes, packages, content, evident[content]) for content, packages in found.items()]

    def forget_but(self, study_instance_uids: Collection[str]) -> None:
        """Keep nothing of studies other than these."""
        self._arrivals = {uid: known for uid, known in self._arrivals.items() if uid in study_instance_uids}
        self._known = {uid: known for uid, known in self._known.items() if uid in study_instance_uids}
        self._unfit = {uid: unfit for uid, unfit in self._unfit.items() if uid in study_instance_uids}

    def _waiting(self, study: Study, routes: Sequence[Route]) -> list[tuple[PackageRecord, float]]:
        """The enabled packages that may start early and haven't, with how long a series must have been quiet for them."""
        packages: dict[tuple[str, str], PackageRecord] = {}
        seconds: dict[tuple[str, str], list[float | None]] = defaultdict(list)
        for route in routes:
            package = self._storage.registry.package(route.package, route.version)
            if package is not None and package.state == "enabled":
                packages[package.name, package.version] = package
                seconds[package.name, package.version].append(route.first_series_seconds)
        early = {key: [each for each in all_of if each is not None] for key, all_of in seconds.items() if None not in all_of}
        jobs = self._storage.jobs.jobs(study_instance_uid=study.study_instance_uid, kind="analyse") if early else []
        started = {job.package for job in jobs}
        return [(packages[key], max(all_of)) for key, all_of in early.items() if key[0] not in started]

    def _arrivals_of(self, study: Study) -> list[Arrival]:
        uid = study.study_instance_uid
        if uid not in self._arrivals or self._arrivals[uid][0] != study.last_received_at:
            self._arrivals[uid] = study.last_received_at, self._storage.index.arrivals(uid)
        return self._arrivals[uid][1]

    def _evidence(self, study: Study, arrival: Arrival) -> SeriesEvidence:
        known = self._known.setdefault(study.study_instance_uid, {})
        key = arrival.series_instance_uid, arrival.images
        if key not in known:
            for old in [old for old in known if old[0] == arrival.series_instance_uid]:
                del known[old]
            (known[key],) = series_evidence(self._storage.index.planes(study.study_instance_uid, [arrival.series_instance_uid]))
        return known[key]

    def _suits(self, study: Study, package: PackageRecord, manifest: Manifest, content: _Content) -> bool:
        """Whether the package has all it wants in these series."""
        unfit = self._unfit.setdefault(study.study_instance_uid, set())
        if (package.digest, content) in unfit:
            return False
        series = {uid for uid, _ in content}
        images = [
            image for image in self._storage.index.instances(study.study_instance_uid)
            if image.series_instance_uid in series and image.kind == "image" and not image.made_here
        ]  # fmt: skip
        try:
            headers = read_headers([self._storage.objects.path(image.stored.object_id) for image in images])
            suits = not select(manifest, headers).absent
        except (NotEligible, AnalysisFailed):
            suits = False  # when the study closes, its job says why
        if not suits:
            unfit.add((package.digest, content))
        return suits

    def _manifest(self, package: PackageRecord) -> Manifest | None:
        if package.digest not in self._manifests:
            folder = self._storage.registry.package_folder(package.name, package.version)
            try:
                self._manifests[package.digest] = parse_manifest((folder / "manifest.toml").read_bytes(), folder)
            except (PackageError, OSError):
                self._manifests[package.digest] = None
        return self._manifests[package.digest]

    def _start(
        self, study: Study, routes: Sequence[Route], packages: Sequence[PackageRecord], content: _Content, words: Sequence[str]
    ) -> Start:
        named = {(package.name, version) for package in packages for version in (None, package.version)}
        known = self._known[study.study_instance_uid]
        series = [{**asdict(known[key]), "contradiction": None} for key in sorted(content)]
        return Start(
            routes=tuple(route for route in routes if (route.package, route.version) in named),
            images=dict(content),
            evidence="; ".join(words),
            facts={"images": sum(images for _, images in content), "series": series, "stays_open": True, "incomplete": []},
        )


def _silence(arrival: Arrival, times: tuple[datetime, datetime]) -> float:
    """Seconds since the last image of a series."""
    now, up_since = times
    return (now - max(arrival.last_received_at, up_since)).total_seconds()


def _is_of(arrival: Arrival, manifest: Manifest) -> bool:
    """Whether the package reads series of this modality."""
    return any(arrival.modality.upper() == modality.upper() for accepts in manifest.inputs for modality in accepts.modalities)
