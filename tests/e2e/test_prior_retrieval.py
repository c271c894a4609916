"""Earlier studies fetched from PACS that nobody here wrote: Orthanc and dcmqrscp give them by C-FIND and
C-MOVE or C-GET, and a report compares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pydicom
import pytest

from dicomnode import pipeline
from dicomnode.completion import close_complete_studies
from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.dimse.scu import Outgoing, send
from dicomnode.receiver import Receiver
from pacs import NODE_AET, PATIENCE_SECONDS, dcmqrscp, loopback_peer, orthanc
from storage.records import Job, Peer, PriorRule

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from test_priors import BEFORE, NOW, Node, named, predecessors, true_findings

pytestmark = pytest.mark.system


@contextmanager
def orthanc_for(folder: Path, node: Peer) -> Iterator[Peer]:
    with orthanc(folder, node_port=node.port, settings={"LuaScripts": []}) as pacs:
        yield pacs.peer


@contextmanager
def dcmqrscp_for(folder: Path, node: Peer) -> Iterator[Peer]:
    with dcmqrscp(folder, known=[node]) as pacs:
        yield pacs


def outgoing(file: Path) -> Outgoing:
    header = pydicom.dcmread(file, stop_before_pixels=True)
    return Outgoing(
        sop_class_uid=str(header.SOPClassUID),
        sop_instance_uid=str(header.SOPInstanceUID),
        transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID),
        path=file,
    )


def work(node: Node, files: list[Path], priority: str | None = None) -> Job:
    """Receive a study and analyse it, and close whatever came beside it."""
    node.receive(files)
    now = datetime.now(UTC)
    close_complete_studies(node.storage, node.client, now + timedelta(hours=1), up_since=now)
    job = node.storage.jobs.jobs(study_instance_uid=node.study, kind="analyse")[-1]
    if priority == "stat":
        node.storage.jobs.set_priority(job.key, "stat")
    ended = node.end()
    close_complete_studies(node.storage, node.client, now + timedelta(hours=1), up_since=now)
    return ended


@pytest.mark.parametrize(
    ("pacs_for", "way"),
    [
        (orthanc_for, "get"),
        (dcmqrscp_for, "move"),
        pytest.param(orthanc_for, "move", marks=pytest.mark.long),
        pytest.param(dcmqrscp_for, "get", marks=pytest.mark.long),
    ],
)
def test_an_earlier_study_and_our_results_on_it_are_fetched_and_compared_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pacs_for: Callable[[Path, Peer], AbstractContextManager[Peer]],
    way: Literal["move", "get"],
) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: true_findings)
    before, now = BEFORE.write(tmp_path), NOW.write(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = Node(tmp_path / "first", before[0].parent, VIEWER=("seg", "sr"))
    former = first.work(before)
    results = [first.storage.objects.path(result.stored.object_id) for result in first.storage.jobs.results(job_key=former.key)]
    second = Node(tmp_path / "second", now[0].parent, VIEWER=("seg", "sr"))
    settings = Settings(node=NodeSection(data=tmp_path / "second"), listener=ListenerSection(port=0))
    receiver = Receiver(settings, second.storage)
    receiver.start()
    try:
        with pacs_for(tmp_path / "pacs", loopback_peer(NODE_AET, receiver.port)) as pacs:
            items = [outgoing(file) for file in (*before, *results)]
            outcomes = send(pacs, items, calling_ae_title="SCANNER", timeout_seconds=PATIENCE_SECONDS)
            assert [outcome.state for outcome in outcomes] == ["sent"] * len(items)
            second.storage.registry.add_peer(replace(pacs, retrieve_by=way))
            (route,) = second.storage.registry.routes()
            second.storage.registry.add_route(replace(route, from_ae_title="*", priors=PriorRule(ae_title=pacs.ae_title, days=365)))
            later = work(second, now)
    finally:
        receiver.stop(0)
    told = later.detail["retrieval"]
    assert (told["peer"], told["found"], "ended" in told) == (pacs.ae_title, 1, False), told
    (study,) = told["studies"]
    assert (study["state"], study["instances"]) == ("fetched", len(items))
    assert later.detail["comparison"]["vanished"], later.detail["comparison"]
    assert later.detail["findings"][0]["tracking_uid"] == former.detail["findings"][0]["tracking_uid"]
    assert {predecessors(report)[0] for report in second.reports(later)} <= {named(report) for report in first.reports(former)}
    # what was fetched starts no analysis by itself
    assert second.storage.jobs.jobs(study_instance_uid=former.study_instance_uid) == []
    (revision,) = second.storage.index.revisions(former.study_instance_uid)
    assert revision.outcome == "fetched to compare another one with"
    for node in (first, second):
        node.client.close()
        node.storage.database.close()
