"""What probing finds out about PACS that nobody here wrote agrees with how they are configured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dicomnode.dimse.contexts import STORAGE_CLASSES, STORAGE_COMMITMENT, STUDY_ROOT_FIND, STUDY_ROOT_GET, STUDY_ROOT_MOVE, VERIFICATION
from dicomnode.dimse.probe import PROBED_SYNTAXES, Probed, probe
from dicomnode.errors import PeerUnavailable
from pacs import LOOPBACK, NODE_AET, PATIENCE_SECONDS, Node, dcmqrscp, free_port, loopback_peer, orthanc, storescp
from storage.records import Peer

pytestmark = pytest.mark.system

CT, SEG, LABEL_MAP = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"


@contextmanager
def probed(peer: Peer) -> Iterator[Probed]:
    yield probe(peer, calling_ae_title=NODE_AET, timeout_seconds=PATIENCE_SECONDS)


def syntaxes(found: Probed, uid: str) -> set[str]:
    (taken,) = [accepted.transfer_syntax_uids for accepted in found.classes if accepted.sop_class_uid == uid]
    assert len(set(taken)) == len(taken)
    return set(taken)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_orthanc_that_accepts_known_classes_alone_and_checks_whom_it_is_called(node: Node, tmp_path: Path) -> None:
    settings = {"UnknownSopClassAccepted": False, "LuaScripts": [], "MaximumPduLength": 65536}
    with orthanc(tmp_path / "orthanc", node_port=node.port, settings=settings) as pacs:
        with probed(pacs.peer) as found:
            assert found.checks_called_ae_title
            assert found.maximum_pdu_bytes == 65536
            assert (found.tls, found.refused_associations) == (None, 0)
            assert found.takes(STORAGE_COMMITMENT)
            assert found.takes(STUDY_ROOT_FIND)
            assert found.takes(STUDY_ROOT_MOVE)
            assert syntaxes(found, CT) == set(PROBED_SYNTAXES)
            assert syntaxes(found, SEG) == set(PROBED_SYNTAXES)
            assert not found.takes(LABEL_MAP)  # younger than this Orthanc
            assert len(found.classes) == len(STORAGE_CLASSES) + 8
        node.cli("peer", "add", "ORTHANC", LOOPBACK, pacs.dicom_port, "--receives")
        shown = node.cli("peer", "echo", "ORTHANC", "--probe", "--save")
        assert "called AE title: checked" in shown
        assert "it accepts storage commitment" in shown
        assert "Segmentation Storage" in shown
    (record,) = node.listing("peer", "list")
    quirks = record["quirks"]
    assert set(quirks["refuses"][LABEL_MAP]) == set(PROBED_SYNTAXES)
    assert CT not in quirks["refuses"]
    assert quirks["implementation_version_name"] == found.implementation_version_name
    assert datetime.fromisoformat(quirks["probed_at"]) <= datetime.now(UTC)
    with pytest.raises(AssertionError, match="cannot be reached"):
        node.cli("peer", "echo", "ORTHANC", "--probe")  # it is down now


def test_storescp_takes_images_in_any_syntax_under_any_name_and_no_query(tmp_path: Path) -> None:
    with storescp(tmp_path / "taken", ae_title="ARCHIVE") as peer, probed(peer) as found:
        assert not found.checks_called_ae_title
        assert found.maximum_pdu_bytes == 16384
        assert "OFFIS_DCMTK" in found.implementation_version_name
        assert syntaxes(found, CT) == set(PROBED_SYNTAXES)
        assert found.takes(VERIFICATION)
        assert not any(found.takes(uid) for uid in (STORAGE_COMMITMENT, STUDY_ROOT_FIND, STUDY_ROOT_MOVE))
        assert found.advice(commits=True)[0] == "it does not accept storage commitment, for which it is registered"


def test_dcmqrscp_answers_queries_and_checks_whom_it_is_called(tmp_path: Path) -> None:
    with dcmqrscp(tmp_path / "pacs") as peer, probed(peer) as found:
        assert found.checks_called_ae_title
        assert all(found.takes(uid) for uid in (STUDY_ROOT_FIND, STUDY_ROOT_MOVE, STUDY_ROOT_GET, CT))
        assert not found.takes(STORAGE_COMMITMENT)
        assert syntaxes(found, CT) >= {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1"}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_nobody_is_no_peer_that_accepts_nothing(node: Node) -> None:
    with pytest.raises(PeerUnavailable, match="cannot be reached"):
        probe(loopback_peer("NOBODY", free_port()), calling_ae_title=NODE_AET)
    node.cli("peer", "add", "NOBODY", LOOPBACK, free_port(), "--receives")
    with pytest.raises(AssertionError, match="need --probe"):
        node.cli("peer", "echo", "NOBODY", "--json")
    assert json.loads(node.cli("peer", "list", "--json"))[0]["quirks"] is None
