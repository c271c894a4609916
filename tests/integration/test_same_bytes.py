"""A job done again, by another process elsewhere, makes the same bytes of every kind and form of object that a peer can have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode import pipeline
from dicomnode.findings import Findings, Volume
from dicomnode.results.profile import KINDS
from storage.records import Peer

sys.path.insert(0, str(Path(__file__).parent))
from test_priors import Node, study, true_findings  # noqa: F401  the fixture

PEERS = {
    "USUAL": Peer(ae_title="USUAL", host="127.0.0.1", port=104, sends=False, receives=True, tls=False, client_cert=None,
                  objects=("seg", "sr", "key-image", "key-object", "presentation-state")),
}  # fmt: skip
PEERS |= {
    name: replace(PEERS["USUAL"], ae_title=name, objects=objects, seg_per=per, empty_frames=empty)
    for name, objects, per, empty in (
        ("NOFILM", ("seg-no-film", "sr-comprehensive"), "model", False),
        ("LABELS", ("seg-labelmap", "sr-comprehensive"), "model", False),
        ("SHARES", ("seg-fractional", "sr"), "model", False),
        ("EACH", ("seg", "sr-comprehensive"), "finding", False),
        ("EMPTY", ("seg", "sr"), "model", True),
        ("EACHLABELS", ("seg-labelmap", "sr"), "finding", True),
    )
}
AGAIN = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from dicomnode import pipeline
from dicomnode.config import Settings
from dicomnode.engine import EngineClient
from dicomnode.pipeline import Analyser
from storage import open_storage
from test_same_bytes import likely_findings
pipeline.load_model = lambda *_, **__: likely_findings
storage = open_storage({url!r}, Path({folder!r}))
Analyser(Settings.model_validate({{"analysis": {{"device": "cpu"}}}}), storage, EngineClient({url!r})).analyse({key!r}, 0)
"""


def likely_findings(volumes: Mapping[str, Volume], *_: object) -> Findings:
    """The truth of a phantom, each voxel with a probability."""
    findings = true_findings(volumes)

    def with_shares(number: int, mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        shares = np.random.default_rng(number).integers(128, 256, mask.shape, dtype=np.uint8)
        return np.where(mask, shares, np.uint8(0))

    segments = [replace(f.segment, probability=with_shares(f.number, f.segment.mask)) for f in findings.findings]
    return replace(findings, findings=tuple(replace(f, segment=s) for f, s in zip(findings.findings, segments, strict=True)))


@pytest.fixture
def node(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:  # noqa: F811  the fixture
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: likely_findings)
    node = Node(tmp_path, study, **{name: peer.objects for name, peer in PEERS.items()})
    for peer in PEERS.values():
        node.storage.registry.add_peer(peer)
    yield node
    node.client.close()
    node.storage.database.close()


def test_every_kind_and_form_has_the_same_bytes_when_it_is_made_again_elsewhere(node: Node) -> None:
    job = node.work(node.files)
    made = node.made(job)
    kinds = Counter(
        (str(image.Modality), str(image.get("SegmentationType", "")), image.SOPClassUID.name)
        for image in (pydicom.dcmread(BytesIO(data)) for data in made.values())
    )
    assert {kind for kind, _, _ in kinds} == {"SEG", "SR", "OT", "KO", "PR"}
    assert {form for _, form, _ in kinds} == {"", "BINARY", "FRACTIONAL", "LABELMAP"}
    assert {name for _, _, name in kinds if "SR" in name} == {"Comprehensive SR Storage", "Comprehensive 3D SR Storage"}
    assert {kind for peer in PEERS.values() for kind in peer.objects} == {*KINDS}
    node.forget_results(job)
    tests = Path(__file__).resolve().parents[1]
    paths = [str(tests.parent), str(tests), str(Path(__file__).parent)]
    program = AGAIN.format(paths=paths, url=node.url, folder=str(node.folder), key=job.key)
    elsewhere = os.environ | {"TZ": "Pacific/Auckland", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", program], env=elsewhere, check=True, timeout=300)
    assert node.made(job) == made


def test_a_reason_has_the_same_bytes_when_it_is_told_again(node: Node) -> None:
    job = node.work(node.files[:3])
    made = node.made(job)
    assert job.state == "refused"
    assert {str(pydicom.dcmread(BytesIO(data)).Modality) for data in made.values()} == {"SR", "OT"}
    node.forget_results(job)
    assert node.end().state == "refused"
    assert node.made(job) == made
