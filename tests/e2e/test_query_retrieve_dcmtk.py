"""DCMTK's findscu, movescu and getscu work against the node, and its dcmqrscp is a PACS that the node asks, moves to and delivers to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dimse_cases import CT, EXPLICIT, IMPLICIT, a_dataset, encoded, received
from held_objects import SERIES, STUDY, keep, receiving_node, slices
from pydicom import Dataset, dcmread

from dicomnode.dimse.find import FindLimits, find, query, study_content
from dicomnode.dimse.scp import part10_prefix
from dicomnode.dimse.scu import Outgoing, send
from pacs import (
    DCMQRSCP_AET,
    NODE_AET,
    PATIENCE_SECONDS,
    QUICK,
    WORKSTATION_AET,
    dcmqrscp,
    free_port,
    loopback_peer,
    program,
    storescp,
)
from storage import Storage
from storage.records import Peer

pytestmark = pytest.mark.system

NAME = "Yamada^Tarou=山田^太郎=やまだ^たろう"
PATIENT = FindLimits(seconds=PATIENCE_SECONDS)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Storage, Peer]]:
    """A node that holds a study of five images in one series, one of them in Implicit VR; the workstation is a peer of it."""
    with receiving_node(tmp_path) as (storage, receiver):
        slices(storage, 4, PatientName=NAME, SpecificCharacterSet="ISO_IR 192", PatientID="P7", StudyTime="101112")
        keep(storage, a_dataset(SOPInstanceUID=f"{SERIES}.5", InstanceNumber=5, PatientID="P7"), IMPLICIT)
        storage.registry.add_peer(loopback_peer(WORKSTATION_AET, free_port()))
        yield storage, loopback_peer(NODE_AET, receiver.port)


def run(name: str, node: Peer, *words: str | Path, keys: tuple[str, ...], caller: str = WORKSTATION_AET) -> str:
    """Run one of DCMTK's Q/R tools against the node; return what it said."""
    command = [program(name, "dcmtk"), "-v", "-aet", caller, "-aec", node.ae_title, *words]
    done = subprocess.run(
        [*command, *(word for key in keys for word in ("-k", key)), node.host, str(node.port)],
        check=False,  # what it says is judged
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        env={**os.environ, **QUICK},
    )
    return done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")


def answers(node: Peer, folder: Path, *keys: str, model: str = "-S") -> list[Dataset]:
    folder.mkdir()
    run("findscu", node, model, "-X", "-od", folder, keys=keys)
    return [dcmread(file, force=True) for file in sorted(folder.iterdir())]


def names(folder: Path) -> list[str]:
    return sorted(str(dcmread(file, stop_before_pixels=True).SOPInstanceUID) for file in folder.iterdir())


FIVE = [f"{SERIES}.{number}" for number in range(1, 6)]
STUDY_KEYS = ("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={STUDY}")


def test_findscu_finds_each_level_in_both_models(node: tuple[Storage, Peer], tmp_path: Path) -> None:
    _, peer = node
    keys = ("QueryRetrieveLevel=STUDY", "PatientName=YAMADA*", "StudyInstanceUID", "StudyTime", "NumberOfStudyRelatedInstances")
    (study,) = answers(peer, tmp_path / "study", *keys)
    assert (study.StudyInstanceUID, study.StudyTime, study.NumberOfStudyRelatedInstances) == (STUDY, "101112", 5)
    assert (str(study.PatientName), study.SpecificCharacterSet) == (NAME, "ISO_IR 192")
    keys = ("QueryRetrieveLevel=IMAGE", f"StudyInstanceUID={STUDY}", f"SeriesInstanceUID={SERIES}", "SOPInstanceUID", "PatientID=P7")
    assert sorted(str(image.SOPInstanceUID) for image in answers(peer, tmp_path / "images", *keys, model="-P")) == FIVE
    assert "DataSetDoesNotMatchSOPClass" in run("findscu", peer, "-S", keys=("QueryRetrieveLevel=SERIES", "SeriesInstanceUID"))
    assert "Association Rejected" in run("findscu", peer, "-S", keys=STUDY_KEYS, caller="NOBODY")


def test_movescu_moves_to_another_peer_and_to_itself(node: tuple[Storage, Peer], tmp_path: Path) -> None:
    storage, peer = node
    with storescp(tmp_path / "taken", ae_title="ARCHIVE") as archive:
        storage.registry.add_peer(archive)
        said = run("movescu", peer, "-S", "-aem", "ARCHIVE", keys=STUDY_KEYS)
        assert "Received Final Move Response (Success)" in said, said
    assert names(tmp_path / "taken") == FIVE
    workstation = storage.registry.peer(WORKSTATION_AET)
    assert workstation is not None
    (tmp_path / "own").mkdir()
    words = ("-S", "-aem", WORKSTATION_AET, "+P", str(workstation.port), "-od", tmp_path / "own")
    said = run("movescu", peer, *words, keys=("QueryRetrieveLevel=SERIES", f"StudyInstanceUID={STUDY}", f"SeriesInstanceUID={SERIES}"))
    assert "Received Final Move Response (Success)" in said, said
    assert names(tmp_path / "own") == FIVE
    assert "MoveDestinationUnknown" in run("movescu", peer, "-S", "-aem", "NOWHERE", keys=STUDY_KEYS)


@pytest.mark.parametrize("syntax", ["+x=", "+xi"])
def test_getscu_fetches_on_its_own_association(node: tuple[Storage, Peer], tmp_path: Path, syntax: str) -> None:
    _, peer = node
    (tmp_path / "got").mkdir()
    run("getscu", peer, "-S", syntax, "+B", "-od", tmp_path / "got", keys=STUDY_KEYS)
    assert names(tmp_path / "got") == FIVE
    pixels = {dcmread(file).PixelData for file in (tmp_path / "got").iterdir()}
    assert pixels == {bytes(48)}


def test_dcmqrscp_is_a_pacs_that_is_delivered_to_moved_to_and_asked(node: tuple[Storage, Peer], tmp_path: Path) -> None:
    storage, peer = node
    with dcmqrscp(tmp_path / "pacs", known=[peer]) as pacs:
        storage.registry.add_peer(pacs)
        said = run("movescu", peer, "-S", "-aem", DCMQRSCP_AET, keys=STUDY_KEYS)
        assert "Received Final Move Response (Success)" in said, said
        content = study_content(pacs, STUDY, calling_ae_title=NODE_AET, limits=PATIENT)
        assert content is not None
        assert content.instances == {SERIES: 5}
        other = a_dataset(SOPInstanceUID="1.2.3.9.1", StudyInstanceUID="1.2.3.9", SeriesInstanceUID="1.2.3.9.0")
        item = Outgoing(sop_class_uid=CT, sop_instance_uid="1.2.3.9.1", transfer_syntax_uid=EXPLICIT, path=tmp_path / "other.dcm")
        data = encoded(other)
        item.path.write_bytes(part10_prefix(received(data, uid="1.2.3.9.1")) + data)
        (outcome,) = send(pacs, [item], calling_ae_title=NODE_AET, timeout_seconds=PATIENCE_SECONDS)
        assert (outcome.state, outcome.status) == ("sent", 0)
        asked = find(pacs, query("STUDY", StudyInstanceUID=""), calling_ae_title=NODE_AET, limits=PATIENT)
        assert sorted(str(answer.StudyInstanceUID) for answer in asked) == sorted([STUDY, "1.2.3.9"])
        # and back: the PACS knows the node as a destination
        said = run("movescu", pacs, "-S", "-aem", NODE_AET, keys=("QueryRetrieveLevel=STUDY", "StudyInstanceUID=1.2.3.9"))
        assert "Received Final Move Response (Success)" in said, said
