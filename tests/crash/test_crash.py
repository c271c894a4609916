"""SIGKILL at each named point, restart, and the contracts hold: nothing acknowledged is lost, each result is at the PACS once."""

from __future__ import annotations

import hashlib
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import crash_points
import numpy as np
import pytest
from pydicom import dcmread
from stub_package import enable_stub_package

from dicomnode.config import ListenerSection, Settings
from dicomnode.dimse.listener import Listener
from dicomnode.dimse.scp import ReceivedInstance
from dicomnode.dimse.scu import Outgoing, send
from dicomnode.dimse.storing import in_memory
from dicomnode.engine import prepare_engine
from dicomnode.phantoms.dicom import SeriesHeader, write_ct_series
from pacs import LOOPBACK, free_port, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer, Route

SLICES = 8


class Pacs:
    """A Storage SCP that remembers the digest of each data set it received, per SOP Instance UID."""

    def __init__(self) -> None:
        self.received: dict[str, list[str]] = defaultdict(list)
        self._listener = Listener(
            ListenerSection(host=LOOPBACK, port=0),
            ["PACS"],
            admit=lambda _caller: None,
            receive=in_memory(self._store),
        )
        self._listener.start()
        self.port = self._listener.port

    def _store(self, received: ReceivedInstance) -> None:
        self.received[received.sop_instance_uid].append(hashlib.sha256(received.dataset).hexdigest())

    def stop(self) -> None:
        self._listener.stop(5)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Outgoing]:
    """A small CT series with one bright box in air."""
    voxels = np.full((SLICES, 32, 32), -900.0, dtype=np.float32)
    voxels[2:6, 10:18, 12:20] = 60.0
    affine = np.array([[0, 0, 2.0, 0], [0, 2.0, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
    files = write_ct_series(tmp_path_factory.mktemp("study"), voxels, affine, SeriesHeader(seed="crash"))
    headers = [(file, dcmread(file, stop_before_pixels=True)) for file in files]
    return [
        Outgoing(sop_class_uid=h.SOPClassUID, sop_instance_uid=h.SOPInstanceUID, transfer_syntax_uid=h.file_meta.TransferSyntaxUID, path=f)
        for f, h in headers
    ]


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    pacs = Pacs()
    yield pacs
    pacs.stop()


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings.model_validate(
        {
            "node": {"ae_title": "NODE", "data": tmp_path / "data"},
            "listener": {"port": free_port()},
            "storage": {"database_url": database_url, "reserve_bytes": 0},
            "engine": {"lease_seconds": 0.6, "poll_seconds": 0.1, "retry_schedule_seconds": [0.2] * 20},
        }
    )


class Node:
    """The node as a process forked from a server that has everything imported."""

    def __init__(self, settings: Settings, context: ForkServerContext) -> None:
        self._context = context
        self._settings = settings
        self._process: Any = None

    def start(self, point: str | None) -> None:
        up = self._context.Event()
        self._process = self._context.Process(target=crash_points.run_node, args=(self._settings, point, up), daemon=True)
        self._process.start()
        wait_until(lambda: up.is_set() or self._process.exitcode is not None, what="the node to start")

    def wait_for_death(self) -> None:
        self._process.join(180)
        assert self._process.exitcode == -signal.SIGKILL, "the point was never reached"

    def kill(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join(120)


@pytest.fixture
def node(settings: Settings, fork_server: ForkServerContext) -> Iterator[Node]:
    node = Node(settings, fork_server)
    yield node
    node.kill()


def each_point(points: Iterable[str] = crash_points.POINTS) -> Iterator[Any]:
    """Each point on each database: on one, by turns, always, and on the other where time doesn't matter."""
    for number, point in enumerate(points):
        for turn, database in enumerate(("sqlite", "postgresql")):
            marks = [pytest.mark.system] * turn + [pytest.mark.long] * ((number + turn) % 2)
            yield pytest.param(point, database, marks=marks)


@pytest.mark.parametrize(("point", "database_url"), list(each_point()), indirect=["database_url"])
def test_killed_at_any_point_nothing_is_lost_or_doubled(
    point: str, settings: Settings, node: Node, pacs: Pacs, study: list[Outgoing]
) -> None:
    storage = prepare(settings, pacs)
    node.start(point)
    acknowledged = push(settings, study)
    node.wait_for_death()
    for uid in acknowledged:
        assert storage.index.find(uid) is not None, f"{uid} was acknowledged and is gone after the crash at {point!r}"

    node.start(None)
    missing = [item for item in study if item.sop_instance_uid not in acknowledged]
    deadline = time.monotonic() + 120
    while missing and time.monotonic() < deadline:  # what a modality does with what was not acknowledged
        acknowledged |= push(settings, missing)
        missing = [item for item in study if item.sop_instance_uid not in acknowledged]
    assert not missing
    wait_until(
        lambda: settled(storage, study), seconds=180, what=f"the jobs to end; {[(j.key, j.state, j.reason) for j in storage.jobs.jobs()]}"
    )

    assert_every_image_is_there(storage, study)
    uid = dcmread(study[0].path, stop_before_pixels=True).StudyInstanceUID
    last = storage.index.study(uid)
    assert last is not None
    jobs = storage.jobs.jobs()
    assert [(job.state, job.reason) for job in jobs] == [("done", None)] * (2 * last.revision)
    results = storage.jobs.results()
    assert sorted(result.modality for result in results) == sorted(["SEG", "SR"] * last.revision)
    assert set(pacs.received) == {result.sop_instance_uid for result in results}
    assert all(len(set(digests)) == 1 for digests in pacs.received.values()), "a re-send had other bytes"
    assert {delivery.state for delivery in storage.jobs.deliveries()} == {"sent"}
    node.kill()
    assert_no_object_is_partial(storage)
    storage.database.close()


@pytest.mark.parametrize(("point", "database_url"), list(each_point(crash_points.FIRST_SERIES_POINTS)), indirect=["database_url"])
def test_killed_while_a_package_starts_on_the_first_series_its_results_are_made_and_sent_once(
    point: str, settings: Settings, node: Node, pacs: Pacs, study: list[Outgoing]
) -> None:
    storage = prepare(settings, pacs)
    (route,) = storage.registry.routes()
    storage.registry.add_route(replace(route, quiet_seconds=3600.0))
    node.start(point)
    assert len(push(settings, study)) == len(study)
    storage.registry.add_route(replace(route, quiet_seconds=3600.0, first_series_seconds=0.5))  # now, that all images are here
    uid = dcmread(study[0].path, stop_before_pixels=True).StudyInstanceUID
    dies_later = point in {"results stand, not committed", "carried over"}
    if not dies_later:
        node.wait_for_death()
        node.start(None)
    wait_until(lambda: analysed(storage) == {1}, seconds=180, what="the analysis of the first series")
    assert [revision.stays_open for revision in storage.index.revisions(uid)] == [True]
    storage.registry.add_route(replace(route, quiet_seconds=0.5))
    if dies_later:
        node.wait_for_death()
        node.start(None)
    wait_until(lambda: analysed(storage) == {1, 2}, seconds=180, what=f"the rest; {[(j.key, j.state) for j in storage.jobs.jobs()]}")
    wait_until(lambda: {row.state for row in storage.jobs.deliveries()} == {"sent"}, seconds=180, what="the deliveries")
    first, second = sorted(storage.jobs.jobs(kind="analyse"), key=lambda job: job.revision)
    assert second.carried_from == first.key
    assert [revision.stays_open for revision in storage.index.revisions(uid)] == [True, False]
    results = storage.jobs.results()
    assert sorted((result.modality, result.job_key) for result in results) == [("SEG", first.key), ("SR", first.key)]
    assert set(pacs.received) == {result.sop_instance_uid for result in results}
    assert all(len(set(digests)) == 1 for digests in pacs.received.values()), "a re-send had other bytes"
    node.kill()
    storage.database.close()


def analysed(storage: Storage) -> set[int]:
    """The revisions whose analysis is done."""
    return {job.revision for job in storage.jobs.jobs(kind="analyse", state="done")}


def prepare(settings: Settings, pacs: Pacs) -> Storage:
    """An empty store whose registry knows scanner, PACS, stub package and route."""
    prepare_storage(settings.database_url, settings.data_folder)
    prepare_engine(settings.database_url)
    storage = open_storage(settings.database_url, settings.data_folder)
    registry = storage.registry
    registry.add_peer(Peer(ae_title="SCANNER", host=LOOPBACK, port=104, sends=True, receives=False, tls=False, client_cert=None))
    registry.add_peer(Peer(ae_title="PACS", host=LOOPBACK, port=pacs.port, sends=False, receives=True, tls=False, client_cert=None))
    enable_stub_package(registry)
    registry.add_route(
        Route(
            name="r", from_ae_title="*", called_ae_title="*", package="stub", version=None, to_ae_titles=("PACS",),
            priority=None, quiet_seconds=1.0, report_refusals=False,
        )
    )  # fmt: skip
    return storage


def push(settings: Settings, items: list[Outgoing]) -> set[str]:
    """Send like a scanner; return the SOP Instance UIDs that were acknowledged with Success."""
    node = Peer(ae_title="NODE", host=LOOPBACK, port=settings.listener.port, sends=False, receives=True, tls=False, client_cert=None)
    return {outcome.sop_instance_uid for outcome in send(node, items, calling_ae_title="SCANNER") if outcome.state == "sent"}


def settled(storage: Storage, study: list[Outgoing]) -> bool:
    """Whether every image is in a closed revision and no job is open."""
    jobs = storage.jobs.jobs()
    analysed = {job.revision for job in jobs if job.kind == "analyse"}
    return (
        not storage.index.receiving()
        and bool(jobs)
        and {job.revision for job in jobs if job.kind == "deliver"} == analysed
        and all(job.state not in {"queued", "running"} for job in jobs)
    )


def assert_every_image_is_there(storage: Storage, study: list[Outgoing]) -> None:
    for item in study:
        found = storage.index.find(item.sop_instance_uid)
        assert found is not None
        kept = dcmread(storage.objects.path(found.stored.object_id))
        assert kept.PixelData == dcmread(item.path).PixelData
        stored = storage.objects.read(found.stored.object_id)
        sent = item.path.read_bytes()
        assert dataset_bytes(stored) == dataset_bytes(sent)
        assert hashlib.sha256(dataset_bytes(stored)).hexdigest() == found.stored.sha256


def assert_no_object_is_partial(storage: Storage) -> None:
    """After a sweep the store holds exactly what the rows name, whole."""
    storage.objects.sweep(storage.index.is_known)
    named = {result.stored for result in storage.jobs.results()}
    for study in storage.index.studies():
        named |= {instance.stored for instance in storage.index.instances(study.study_instance_uid)}
    root = storage.objects.path(next(iter(named)).object_id).parents[2]
    assert {path.stem for path in root.rglob("*.dcm")} == {stored.object_id for stored in named}
    assert list((root / "incoming").iterdir()) == []
    for stored in named:
        assert hashlib.sha256(dataset_bytes(storage.objects.read(stored.object_id))).hexdigest() == stored.sha256


def dataset_bytes(part10: bytes) -> bytes:
    """The bytes behind preamble and file meta: group length (0002,0000) says where they begin (PS3.10 7.1)."""
    return part10[128 + 4 + 12 + int.from_bytes(part10[140:144], "little") :]
