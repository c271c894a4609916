"""Volumes made before their job starts: of studies that are still quiet before they close, and of the next queued one.

What is held is used only for exactly the instances, by UID and digest, that the closed revision holds; whatever isn't ready in time is
read as usual, so nothing depends on it. Must never hold more than its budget, hold up a job, or decide anything.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import Dataset

from dicomnode.analysis.decoding import Decoder
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.manifest import Manifest, parse_manifest
from dicomnode.analysis.select import SelectedSeries, Selection, select
from dicomnode.analysis.volume import read_volume
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Volume
from dicomnode.logs import get_logger
from storage import Storage
from storage.records import Instance

LOOK_SECONDS = 0.5  # a study that had no new image for so long is read
NICENESS = 10  # reception and inference go first
MAXIMUM_STUDIES = 4  # whose headers are held
BYTES_OF_A_VALUE = 4  # at most: it is not known before whether int16 is enough

Headers = list[tuple[Path, Dataset]]
_Content = frozenset[tuple[str, str]]  # SOP Instance UID and digest of each image

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prefetched:
    """What was read of one study ahead of its job."""

    content: _Content
    headers: Headers
    selections: list[tuple[Manifest, Selection]] = field(default_factory=list)
    volumes: dict[tuple[tuple[str, int | None], ...], Volume] = field(default_factory=dict)  # by SOP Instance UID and frame of each slice

    @property
    def size(self) -> int:
        """Bytes of the volumes."""
        return sum(volume.voxels.nbytes for volume in self.volumes.values())

    def selection(self, manifest: Manifest) -> Selection:
        """Return what the manifest is given of the study.

        Raises:
            NotEligible: nothing of it.
        """
        for known, selection in self.selections:
            if known == manifest:
                return selection
        return select(manifest, self.headers)

    def volume(self, series: SelectedSeries) -> Volume | None:
        """Return the volume of a series, if it was read."""
        return self.volumes.get(_slices(series))


class Prefetcher:
    """A thread that reads ahead, in memory of this process."""

    def __init__(self, storage: Storage, decoder: Decoder, maximum_bytes: int) -> None:
        self._storage = storage
        self._decoder = decoder
        self._maximum_bytes = maximum_bytes
        self._held: dict[str, Prefetched] = {}  # by Study Instance UID, the last read at the end
        self._seen: dict[str, object] = {}  # when each open study received its last image, as of the last look
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def start(self) -> None:
        """Begin to look for studies."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; what is being read is read to its end."""
        self._stopping.set()
        self._thread.join()

    def take(self, study_instance_uid: str, instances: Sequence[Instance]) -> Prefetched | None:
        """Return what was read of exactly these instances; it stays for the study's other jobs until its place is needed."""
        with self._lock:
            held = self._held.get(study_instance_uid)
        return held if held is not None and held.content == _content(instances) else None

    def look(self) -> None:
        """Read each open study that received nothing since the last look, then the study of the next queued job."""
        receiving = self._storage.index.receiving()
        quiet = [study.study_instance_uid for study in receiving if self._seen.get(study.study_instance_uid) == study.last_received_at]
        self._seen = {study.study_instance_uid: study.last_received_at for study in receiving}
        for uid in quiet:
            images = [i for i in self._storage.index.instances(uid) if i.kind == "image" and not i.made_here]
            self._read(uid, images, self._manifests(uid))
        for job in self._storage.jobs.jobs(state="queued", kind="analyse")[:1]:
            images = self._storage.index.instances(job.study_instance_uid, job.revision)
            self._read(job.study_instance_uid, images, self._manifests(job.study_instance_uid))

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux of this thread and those that it starts
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception:  # the database may be away for a while; the next round tries again
                log.exception("prefetching failed")

    def _manifests(self, study_instance_uid: str) -> Iterable[Manifest]:
        """The manifests of the enabled packages that the study's routes name."""
        registry = self._storage.registry
        for route in registry.matching(self._storage.index.callers(study_instance_uid)):
            package = registry.package(route.package, route.version)
            if package is not None and package.state == "enabled":
                folder = registry.package_folder(package.name, package.version)
                try:
                    yield parse_manifest((folder / "manifest.toml").read_bytes(), folder)
                except (PackageError, OSError):
                    continue  # its job says so

    def _read(self, uid: str, images: Sequence[Instance], manifests: Iterable[Manifest]) -> None:
        with self._lock:
            held = self._held.get(uid)
        if not images or (held is not None and held.content == _content(images)):
            return
        with self._lock:
            self._held.pop(uid, None)
        try:
            headers = read_headers([self._storage.objects.path(image.stored.object_id) for image in images])
        except AnalysisFailed:
            return  # its job says so
        made = Prefetched(content=_content(images), headers=headers)
        for manifest in manifests:
            self._read_for(manifest, made)
        with self._lock:
            while len(self._held) >= MAXIMUM_STUDIES:
                del self._held[next(iter(self._held))]
            self._held[uid] = made

    def _read_for(self, manifest: Manifest, made: Prefetched) -> None:
        try:
            selection = select(manifest, made.headers)
            made.selections.append((manifest, selection))
            for series in selection.series:
                first = series.frames[0].header
                needed = int(first.Rows) * int(first.Columns) * len(series.frames) * BYTES_OF_A_VALUE
                if _slices(series) not in made.volumes and self._make_room(made.size + needed):
                    made.volumes[_slices(series)] = read_volume(series, self._decoder)
        except (NotEligible, AnalysisFailed):
            return  # its job says so

    def _make_room(self, needed: int) -> bool:
        """Let go of what was read first until `needed` bytes fit into the budget; False if they never do."""
        if needed > self._maximum_bytes:
            return False
        with self._lock:
            while self._held and needed + sum(held.size for held in self._held.values()) > self._maximum_bytes:
                del self._held[next(iter(self._held))]
        return True


def _content(instances: Iterable[Instance]) -> _Content:
    return frozenset((instance.sop_instance_uid, instance.stored.sha256) for instance in instances)


def _slices(series: SelectedSeries) -> tuple[tuple[str, int | None], ...]:
    return tuple((str(frame.image.SOPInstanceUID), frame.number) for frame in series.frames)
