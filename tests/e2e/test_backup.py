"""The backup that deploy/README.md describes: taken while the node runs, it opens as a node that has every study."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file

from pacs import LOOPBACK, SCANNER_AET, Node, free_port, storescu


@pytest.mark.system
def test_a_copy_of_a_running_node_database_first_has_every_study_and_every_byte(tmp_path: Path) -> None:
    sent = [Path(str(get_testdata_file(name))) for name in ("CT_small.dcm", "MR_small.dcm")]
    node = Node(tmp_path / "node")
    try:
        node.cli("peer", "add", SCANNER_AET, LOOPBACK, free_port(), "--sends")
        node.start()
        storescu(node.peer, *sent)
        copy = Node(tmp_path / "copy")
        data, copied = node.folder / "data", copy.folder / "data"
        copied.mkdir()
        with closing(sqlite3.connect(data / "dicomnode.sqlite")) as source, closing(sqlite3.connect(copied / "dicomnode.sqlite")) as target:
            source.backup(target)
        shutil.copytree(data / "objects", copied / "objects")
        copy.cli("check")
        assert {study["study_instance_uid"]: study["instances"] for study in copy.listing("study", "list")} == {
            str(dcmread(file).StudyInstanceUID): 1 for file in sent
        }
        kept = {file.name: file.read_bytes() for file in (copied / "objects").rglob("*.dcm")}
        assert kept == {file.name: file.read_bytes() for file in (data / "objects").rglob("*.dcm")}
        assert len(kept) == len(sent)
        node.stop()
    finally:
        node.close()
