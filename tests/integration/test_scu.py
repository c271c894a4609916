"""Sending over a real network connection: what goes out, and what is made of each answer."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dimse_cases import (
    COMPREHENSIVE_3D_SR,
    CT,
    EXPLICIT,
    IMPLICIT,
    LABEL_MAP,
    SEG,
    SHARED_DATA,
    a_dataset,
    encoded,
    keep_connection,
    received,
    split_part10,
)
from pynetdicom import AE, evt
from pynetdicom.dsutils import split_dataset
from pynetdicom.sop_class import _STORAGE_CLASSES
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.config import ListenerSection
from dicomnode.dimse.contexts import STORAGE_CLASSES, VERIFICATION
from dicomnode.dimse.listener import Listener
from dicomnode.dimse.probe import probe
from dicomnode.dimse.scp import part10_prefix
from dicomnode.dimse.scu import Outgoing, classify, echo, send, send_each
from dicomnode.dimse.storing import in_memory
from dicomnode.errors import PeerUnavailable
from storage.records import Peer

pytestmark = pytest.mark.usefixtures("calm_network_library")


class Pacs:
    """A simulated PACS that keeps what it gets and answers as `answer` says."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, str, bytes]] = []
        self.proposed: list[list[tuple[str, str]]] = []
        self.answer: Callable[[Any], Any] = lambda event: 0x0000
        self.entity = AE("PACS")
        self.entity.require_called_aet = True
        self.entity.acse_timeout = self.entity.dimse_timeout = self.entity.network_timeout = 120
        self.server: Any = None

    def listen(self, pairs: list[tuple[str, str]]) -> Peer:
        for sop_class, syntax in pairs:
            self.entity.add_supported_context(sop_class, syntax)
        handlers = [
            (evt.EVT_CONN_OPEN, keep_connection),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_REQUESTED, self._requested),
            (evt.EVT_C_ECHO, self._echo),
        ]
        self.server = self.entity.make_server(("127.0.0.1", 0), evt_handlers=handlers, server_class=ThreadedAssociationServer)
        self.entity._servers.append(self.server)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return a_peer(self.server.server_address[1])

    def _store(self, event: Any) -> Any:
        request = event.request
        self.got.append(
            (request.AffectedSOPClassUID, request.AffectedSOPInstanceUID, event.context.transfer_syntax, request.DataSet.getvalue())
        )
        return self.answer(event)

    def _echo(self, event: Any) -> Any:
        return self.answer(event)

    def _requested(self, event: Any) -> None:
        contexts = event.assoc.requestor.primitive.presentation_context_definition_list
        self.proposed.append([(context.abstract_syntax, *context.transfer_syntax) for context in contexts])


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    pacs = Pacs()
    yield pacs
    if pacs.server is not None:
        pacs.server.shutdown()
        pacs.entity.shutdown()


def a_peer(port: int) -> Peer:
    return Peer(ae_title="PACS", host="127.0.0.1", port=port, sends=False, receives=True, tls=False, client_cert=None)


def stored(folder: Path, sop_class: str = CT, syntax: str = EXPLICIT, **attributes: Any) -> tuple[Outgoing, bytes]:
    """A file as the node stores it, and its data set's bytes."""
    dataset = a_dataset(sop_class, **attributes)
    data = encoded(dataset, syntax)
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    path.write_bytes(part10_prefix(received(data, uid=dataset.SOPInstanceUID, sop_class=sop_class, syntax=syntax)) + data)
    return Outgoing(sop_class_uid=sop_class, sop_instance_uid=dataset.SOPInstanceUID, transfer_syntax_uid=syntax, path=path), data


def test_results_arrive_byte_for_byte_in_the_order_given(pacs, tmp_path):
    pairs = [(SEG, EXPLICIT), (LABEL_MAP, EXPLICIT), (COMPREHENSIVE_3D_SR, IMPLICIT), (CT, IMPLICIT)]
    files = [stored(tmp_path, *pair) for pair in pairs]
    outcomes = send(pacs.listen(pairs), [item for item, _ in files], calling_ae_title="DICOMNODE")
    assert [(outcome.state, outcome.status, outcome.error) for outcome in outcomes] == [("sent", 0, None)] * 4
    assert [outcome.sop_instance_uid for outcome in outcomes] == [item.sop_instance_uid for item, _ in files]
    assert pacs.got == [(item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid, data) for item, data in files]


def test_an_outcome_is_known_before_the_next_object_is_sent_and_whoever_has_enough_ends_the_sending(pacs, tmp_path):
    files = [stored(tmp_path)[0] for _ in range(3)]
    sending = send_each(pacs.listen([(CT, EXPLICIT)]), files, calling_ae_title="DICOMNODE")
    assert next(sending).sop_instance_uid == files[0].sop_instance_uid
    assert len(pacs.got) == 1
    assert next(sending).sop_instance_uid == files[1].sop_instance_uid
    sending.close()
    assert [uid for _, uid, _, _ in pacs.got] == [item.sop_instance_uid for item in files[:2]]


def test_bytes_that_a_library_would_write_otherwise_go_out_as_they_are(pacs, tmp_path):
    odd = b"\xff\x00\x01\x00LO\x04\x00a\x00b " + b"\xf0\x7f\x01\x00SQ\x00\x00\xff\xff\xff\xff\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    item, data = stored(tmp_path)
    with item.path.open("ab") as file:
        file.write(odd)
    assert send(pacs.listen([(CT, EXPLICIT)]), [item], calling_ae_title="DICOMNODE")[0].state == "sent"
    assert pacs.got[0][3] == data + odd


def test_an_object_of_many_pdus_arrives_whole(pacs, tmp_path):
    item, data = stored(tmp_path, Rows=1000, Columns=700, PixelData=bytes(range(250)) * 5600)
    assert send(pacs.listen([(CT, EXPLICIT)]), [item], calling_ae_title="DICOMNODE")[0].state == "sent"
    assert pacs.got[0][3] == data


def test_exactly_the_pairs_that_are_sent_are_proposed(pacs, tmp_path):
    files = [stored(tmp_path)[0], stored(tmp_path)[0], stored(tmp_path, CT, IMPLICIT)[0], stored(tmp_path, SEG)[0]]
    send(pacs.listen([(CT, EXPLICIT), (CT, IMPLICIT), (SEG, EXPLICIT)]), files, calling_ae_title="DICOMNODE")
    assert [sorted(pairs) for pairs in pacs.proposed] == [sorted([(CT, EXPLICIT), (CT, IMPLICIT), (SEG, EXPLICIT)])]


def test_no_response_is_lost_while_the_association_s_own_thread_is_awake(pacs, tmp_path, monkeypatch):
    """As it may be on a busy machine: pynetdicom takes that thread for paused, and it isn't yet."""
    associations: list[Any] = []
    associate = AE.associate
    monkeypatch.setattr(AE, "associate", lambda *args, **kwargs: associations.append(associate(*args, **kwargs)) or associations[-1])

    def wake(_event: Any) -> int:
        associations[0]._reactor_checkpoint.set()
        return 0x0000

    pacs.answer = wake
    files = [stored(tmp_path)[0] for _ in range(40)]
    outcomes = send(pacs.listen([(CT, EXPLICIT)]), files, calling_ae_title="DICOMNODE")
    assert {(outcome.state, outcome.error) for outcome in outcomes} == {("sent", None)}


def test_more_than_128_pairs_take_a_second_association(pacs, tmp_path):
    known = [row for row in STORAGE_CLASSES if row.uid in _STORAGE_CLASSES.values()]  # by the simulated PACS
    pairs = [(row.uid, syntax) for row in known[:65] for syntax in (EXPLICIT, IMPLICIT)]
    files = [stored(tmp_path, *pair)[0] for pair in pairs]
    outcomes = send(pacs.listen(pairs), files, calling_ae_title="DICOMNODE", timeout_seconds=120)
    assert {(outcome.state, outcome.error) for outcome in outcomes} == {("sent", None)}
    assert sorted(len(proposed) for proposed in pacs.proposed) == [2, 128]
    assert len(pacs.got) == 130


def answering(code: int, comment: str = "") -> Callable[[Any], pydicom.Dataset]:
    def answer(_event: Any) -> pydicom.Dataset:
        status = pydicom.Dataset()
        status.Status = code
        if comment:
            status.ErrorComment = comment
        return status

    return answer


@pytest.mark.parametrize(
    ("code", "state", "error"),
    [
        (0x0000, "sent", None),
        (0xB000, "sent", "status 0xB000: why"),
        (0xB007, "sent", "status 0xB007: why"),
        (0xA700, "transient", "status 0xA700: why"),
        (0xA900, "permanent", "status 0xA900: why"),
        (0xC001, "permanent", "status 0xC001: why"),
        (0x0122, "permanent", "status 0x0122: why: the peer does not support CT Image Storage in Explicit VR Little Endian"),
        (0x0110, "transient", "status 0x0110: why"),
    ],
)
def test_each_status_is_sent_transient_or_permanent(pacs, tmp_path, code, state, error):
    pacs.answer = answering(code, "why")
    [outcome] = send(pacs.listen([(CT, EXPLICIT)]), [stored(tmp_path)[0]], calling_ae_title="DICOMNODE")
    assert (outcome.state, outcome.status, outcome.error) == (state, code, error)
    assert classify(code) == state


def test_a_refused_context_is_permanent_and_the_others_are_sent(pacs, tmp_path):
    files = [stored(tmp_path, SEG)[0], stored(tmp_path)[0]]
    outcomes = send(pacs.listen([(CT, EXPLICIT)]), files, calling_ae_title="DICOMNODE")
    assert [outcome.state for outcome in outcomes] == ["permanent", "sent"]
    assert outcomes[0].error == "the peer does not accept Segmentation Storage in Explicit VR Little Endian"


def a_result(folder: Path) -> list[Outgoing]:
    """A label map with a segmentation in its place, and a report that refers to the one or, as another one, to the other."""
    labels, segmentation, report, other = (
        stored(folder, sop_class)[0] for sop_class in (LABEL_MAP, SEG, COMPREHENSIVE_3D_SR, COMPREHENSIVE_3D_SR)
    )
    of_segmentation = replace(other, refers_to=(segmentation.sop_instance_uid,))
    of_labels = replace(report, refers_to=(labels.sop_instance_uid,), alternatives=(of_segmentation,))
    return [replace(labels, alternatives=(segmentation,)), of_labels]


def test_what_a_peer_refused_when_it_was_probed_is_not_proposed_until_that_is_out_of_date(pacs, tmp_path):
    labels, report = objects = a_result(tmp_path)
    peer = pacs.listen([(SEG, EXPLICIT), (COMPREHENSIVE_3D_SR, EXPLICIT), (VERIFICATION, EXPLICIT), (VERIFICATION, IMPLICIT)])
    probed = replace(peer, quirks=probe(peer, calling_ae_title="DICOMNODE").quirks(datetime.now(UTC)))
    assert EXPLICIT in probed.quirks.refuses[LABEL_MAP]
    assert COMPREHENSIVE_3D_SR not in probed.quirks.refuses or EXPLICIT not in probed.quirks.refuses[COMPREHENSIVE_3D_SR]

    def sent(to: Peer) -> tuple[list[list[str]], list[str], list[bool]]:
        """What was proposed, association by association, what it got, and what is put down to the probe."""
        pacs.proposed.clear()
        pacs.got.clear()
        outcomes = send(to, objects, calling_ae_title="DICOMNODE")
        proposed = [[names[sop_class] for sop_class, _ in pairs] for pairs in pacs.proposed]
        return proposed, [uid for _, uid, _, _ in pacs.got], [outcome.known_since is not None for outcome in outcomes]

    names = {SEG: "SEG", LABEL_MAP: "LABELS", COMPREHENSIVE_3D_SR: "SR"}
    whole, part = ["SEG", "LABELS", "SR"], ["SEG", "SR"]
    simple = [labels.alternatives[0].sop_instance_uid, report.alternatives[0].sop_instance_uid]
    best = [labels.sop_instance_uid, report.sop_instance_uid]
    assert sent(peer) == ([whole], simple, [False, False])
    assert sent(probed) == ([part], simple, [True, False])

    pacs.entity.add_supported_context(LABEL_MAP, EXPLICIT)  # it takes more by now: it gets what it took, and nothing is lost
    pacs.server.contexts = pacs.entity.supported_contexts
    assert sent(probed) == ([part], simple, [True, False])
    renewed = replace(peer, quirks=probe(peer, calling_ae_title="DICOMNODE").quirks(datetime.now(UTC)))
    assert sent(renewed) == ([whole], best, [False, False])
    another = replace(probed.quirks, implementation_version_name="THE_NEXT_1")
    assert sent(replace(peer, quirks=another)) == ([part, whole], best, [False, False])
    nothing = {**probed.quirks.refuses, SEG: (EXPLICIT,)}
    assert sent(replace(peer, quirks=replace(probed.quirks, refuses=nothing))) == ([whole], best, [False, False])

    pacs.answer = lambda event: 0x0122 if event.request.AffectedSOPClassUID == SEG else 0
    proposed, got, blamed = sent(probed)  # segmentations by their class no longer: the label map after all, and its report
    assert (proposed, got, blamed) == ([part, whole], [simple[0], *best], [False, False])
    pacs.answer = lambda event: 0
    pacs.entity.remove_supported_context(SEG)
    pacs.server.contexts = pacs.entity.supported_contexts
    assert sent(probed) == ([part, whole], best, [False, False])
    pacs.proposed.clear()
    outcomes = send(replace(probed, ae_title="ELSE"), objects, calling_ae_title="DICOMNODE")
    assert len(pacs.proposed) == 2  # a peer that rejects an association is asked again with all contexts before it counts as away
    assert [(outcome.state, outcome.is_away) for outcome in outcomes] == [("transient", True)] * 2


def test_a_peer_that_accepts_no_context_refuses_each_object(pacs, tmp_path):
    outcomes = send(pacs.listen([(CT, IMPLICIT)]), [stored(tmp_path)[0], stored(tmp_path, SEG)[0]], calling_ae_title="DICOMNODE")
    assert [outcome.state for outcome in outcomes] == ["permanent", "permanent"]


def test_a_rejection_is_told_as_one_however_quick_the_peer_is() -> None:
    listener = Listener(ListenerSection(port=0), ["QUICK"], admit=lambda _caller: "nobody", receive=in_memory(lambda _instance: None))
    listener.start()
    quick = Peer(ae_title="QUICK", host="127.0.0.1", port=listener.port, sends=False, receives=True, tls=False, client_cert=None)
    for _ in range(30):
        with pytest.raises(PeerUnavailable, match="rejected the association: Rejected"):
            echo(quick, calling_ae_title="NODE")
    listener.stop(0)


def test_a_rejected_association_is_transient(pacs, tmp_path):
    peer = replace(pacs.listen([(CT, EXPLICIT)]), ae_title="OTHER")
    outcomes = send(peer, [stored(tmp_path)[0], stored(tmp_path)[0]], calling_ae_title="DICOMNODE")
    assert [(outcome.state, outcome.status) for outcome in outcomes] == [("transient", None)] * 2
    assert "rejected the association" in outcomes[0].error


def test_a_peer_that_is_down_is_transient(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        peer = a_peer(unused.getsockname()[1])
        [outcome] = send(peer, [stored(tmp_path)[0]], calling_ae_title="DICOMNODE")
        assert (outcome.state, outcome.status) == ("transient", None)
        with pytest.raises(PeerUnavailable):
            echo(peer, calling_ae_title="DICOMNODE")


def test_a_peer_that_breaks_off_makes_the_rest_transient(pacs, tmp_path):
    def second_aborts(event: Any) -> int:
        if len(pacs.got) == 2:
            event.assoc.abort()
        return 0x0000

    pacs.answer = second_aborts
    files = [stored(tmp_path)[0] for _ in range(3)]
    outcomes = send(pacs.listen([(CT, EXPLICIT)]), files, calling_ae_title="DICOMNODE", timeout_seconds=120)
    assert [outcome.state for outcome in outcomes] == ["sent", "transient", "transient"]


def test_a_peer_that_never_answers_is_given_up(pacs, tmp_path):
    pacs.answer = lambda event: time.sleep(2) or 0x0000
    outcomes = send(pacs.listen([(CT, EXPLICIT)]), [stored(tmp_path)[0]], calling_ae_title="DICOMNODE", timeout_seconds=0.5)
    assert [(outcome.state, outcome.status) for outcome in outcomes] == [("transient", None)]


def test_a_file_that_is_gone_fails_alone(pacs, tmp_path):
    gone, kept = stored(tmp_path)[0], stored(tmp_path)[0]
    gone.path.unlink()
    outcomes = send(pacs.listen([(CT, EXPLICIT)]), [gone, kept], calling_ae_title="DICOMNODE")
    assert [outcome.state for outcome in outcomes] == ["permanent", "sent"]


def test_a_peer_that_demands_tls_gets_nothing_in_the_clear(pacs, tmp_path):
    peer = replace(pacs.listen([(CT, EXPLICIT)]), tls=True)
    assert send(peer, [stored(tmp_path)[0]], calling_ae_title="DICOMNODE")[0].state == "permanent"
    assert pacs.proposed == []


def test_echo(pacs):
    peer = pacs.listen([("1.2.840.10008.1.1", IMPLICIT)])
    echo(peer, calling_ae_title="DICOMNODE")
    pacs.answer = answering(0x0122)
    with pytest.raises(PeerUnavailable, match="0x0122"):
        echo(peer, calling_ae_title="DICOMNODE")


@pytest.mark.system
@pytest.mark.realdata
def test_dcmtk_receives_real_segmentations_and_reports(tmp_path):
    if shutil.which("storescp") is None:
        pytest.skip("storescp is not installed (apt-get install dcmtk)")
    folder = SHARED_DATA / "sr_seg_examples"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    files = []
    for file in sorted(folder.rglob("*.dcm")):
        meta, _ = split_dataset(file)
        names = ("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID")
        sop_class, uid, syntax = (str(meta[name].value) for name in names)
        files.append(Outgoing(sop_class_uid=sop_class, sop_instance_uid=uid, transfer_syntax_uid=syntax, path=file))
    results = [item for item in files if item.sop_class_uid == SEG or ".88." in item.sop_class_uid]
    unique = list({item.sop_instance_uid: item for item in results}.values())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    server = subprocess.Popen(["storescp", "-aet", "PACS", "+xa", "-od", str(inbox), "+B", str(port)])
    try:
        for _ in range(1200):
            try:
                echo(a_peer(port), calling_ae_title="DICOMNODE")
                break
            except PeerUnavailable:
                time.sleep(0.1)
        outcomes = send(a_peer(port), unique, calling_ae_title="DICOMNODE")
    finally:
        server.terminate()
        server.wait(120)
    assert {outcome.state for outcome in outcomes} == {"sent"}, [outcome.error for outcome in outcomes]
    arrived = {split_part10(path.read_bytes())[1] for path in inbox.iterdir()}
    assert arrived == {item.path.read_bytes()[split_dataset(item.path)[1] :] for item in unique}
