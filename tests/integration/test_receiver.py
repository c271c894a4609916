"""Reception over a real network connection: contracts 1 to 5."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
import structlog
from dimse_cases import (
    COMPREHENSIVE_3D_SR,
    CT,
    EXPLICIT,
    IMPLICIT,
    JPEG_2000,
    LABEL_MAP,
    SHARED_DATA,
    a_dataset,
    answer_to_request,
    associate,
    encapsulated,
    encoded,
    split_part10,
    store,
)
from held_studies import close
from pynetdicom.dsutils import split_dataset

from dicomnode.cli import run
from dicomnode.config import ListenerSection, NodeSection, RetentionSection, Settings
from dicomnode.dimse.contexts import TRANSFER_SYNTAXES, storage_class
from dicomnode.logs import configure_logs
from dicomnode.receiver import Receiver
from dicomnode.retention import Retention
from pacs import wait_until
from storage import Storage, open_storage, prepare_storage
from storage.errors import Conflict, OutOfSpace, StorageError, Unavailable
from storage.objects import ObjectStore
from storage.records import InstanceHeader, Peer, StoredObject

pytestmark = pytest.mark.usefixtures("calm_network_library")

SCANNER = Peer(ae_title="SCANNER", host="127.0.0.1", port=104, sends=True, receives=False, tls=False, client_cert=None)
REJECTED = bytes.fromhex("0300 00000004 00 01 01 01")  # PS3.8 9.3.4: permanent, by the service user, no reason given
PAIRS = [(CT, EXPLICIT), (CT, IMPLICIT), (CT, JPEG_2000)]


@pytest.fixture(autouse=True)
def _malformed_uids_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydicom warns of those."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    storage = open_storage(url, tmp_path)
    storage.registry.add_peer(SCANNER)
    yield storage
    storage.database.close()


def settings_for(tmp_path: Path, **listener: Any) -> Settings:
    return Settings(node=NodeSection(data=tmp_path), listener=ListenerSection(port=0, **listener))


@pytest.fixture
def receiver(tmp_path: Path, storage: Storage) -> Iterator[Receiver]:
    receiver = Receiver(settings_for(tmp_path), storage)
    receiver.start()
    yield receiver
    receiver.stop(drain_seconds=0)


@pytest.fixture
def scanner(receiver: Receiver) -> Iterator[Any]:
    association = associate(receiver.port, PAIRS)
    assert association.is_established
    yield association
    if association.is_established:
        association.release()


def object_files(tmp_path: Path) -> list[Path]:
    return [
        path for path in (tmp_path / "objects").rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "intake-stopped"
    ]


def stored_bytes(storage: Storage, uid: str) -> bytes:
    instance = storage.index.find(uid)
    assert instance is not None
    return storage.objects.read(instance.stored.object_id)


def send(scanner: Any, dataset: pydicom.Dataset, syntax: str = EXPLICIT) -> int:
    return store(scanner, encoded(dataset, syntax), uid=dataset.SOPInstanceUID, sop_class=dataset.SOPClassUID, syntax=syntax).Status


def test_an_acknowledged_image_is_stored_byte_for_byte_and_indexed(scanner, storage):
    dataset = a_dataset()
    assert send(scanner, dataset, IMPLICIT) == 0x0000
    meta, data = split_part10(stored_bytes(storage, dataset.SOPInstanceUID))
    assert data == encoded(dataset, IMPLICIT)
    assert meta[:132] == bytes(128) + b"DICM"
    instance = storage.index.find(dataset.SOPInstanceUID)
    assert (instance.transfer_syntax_uid, instance.calling_ae_title, instance.called_ae_title) == (IMPLICIT, "SCANNER", "DICOMNODE")
    assert storage.index.study("1.2.3.4").patient_name == "Doe^Jane"


def test_reception_works_on_either_database(tmp_path, database_url):
    prepare_storage(database_url, tmp_path)
    storage = open_storage(database_url, tmp_path)
    storage.registry.add_peer(SCANNER)
    receiver = Receiver(settings_for(tmp_path), storage)
    receiver.start()
    association = associate(receiver.port, PAIRS)
    odd_name = a_dataset(PatientName="a\x07b\ufffd", SpecificCharacterSet="ISO_IR 192")
    other = a_dataset(SOPInstanceUID=odd_name.SOPInstanceUID)
    assert [send(association, dataset) for dataset in (odd_name, odd_name, other)] == [0, 0, 0xC003]
    association.release()
    receiver.stop()
    study = storage.index.study("1.2.3.4")
    assert (study.instances, study.patient_name) == (1, "a b\ufffd")
    assert study.released_at is not None
    storage.database.close()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[StringIO]:
    """What the node logs as it is configured in production, from debug on."""
    text = StringIO()
    monkeypatch.setattr("sys.stderr", text)
    monkeypatch.setattr("logging.basicConfig", lambda **_given: None)  # pytest's own handlers stay
    configure_logs("debug", json_lines=True)
    yield text
    structlog.reset_defaults()


def test_no_log_line_tells_of_the_patient(log, scanner, storage, monkeypatch):
    def fail_with_values(batch: list[tuple[InstanceHeader, StoredObject]]) -> None:
        ((header, _),) = batch
        try:
            raise ValueError(f"[parameters: {header.patient_name}]")
        except ValueError as error:
            raise Conflict(f"Key (patient_name)=({header.patient_name}) exists") from error

    dataset = a_dataset(PatientName="Secret^Name", PatientID="Secret1")
    assert send(scanner, dataset) == 0
    assert send(scanner, a_dataset(PatientName="Secret^Name", SOPInstanceUID=dataset.SOPInstanceUID)) == 0xC003
    assert store(scanner, encoded(dataset)[:-4], uid=dataset.SOPInstanceUID).Status == 0xC001
    assert store(scanner, encoded(dataset), uid="Secret/3").Status == 0xC001
    with monkeypatch.context() as patched:
        patched.setattr(storage.index, "add_instances", fail_with_values)
        assert send(scanner, a_dataset(PatientName="Secret^Name")) == 0xC004
        patched.setattr(storage.index, "add_instances", lambda batch: 1 / 0)
        assert send(scanner, a_dataset(PatientName="Secret^Name")) == 0xC004
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["status"] for line in lines if line["event"] == "instance refused"] == ["0xC003", "0xC001", "0xC001", "0xC004"]
    assert "ZeroDivisionError" in log.getvalue()
    assert "Secret" not in log.getvalue()
    assert not any("dropped" in line for line in lines)


def test_success_is_said_only_after_the_file_and_the_row_are_safe(scanner, storage, monkeypatch):
    order = []
    keep, add = storage.objects.keep, storage.index.add_instances
    monkeypatch.setattr(storage.objects, "keep", lambda group: (keep(group), order.append("file"))[0])
    monkeypatch.setattr(storage.index, "add_instances", lambda batch: (add(batch), order.append("row"))[0])
    status = send(scanner, a_dataset())
    order.append("answer")
    assert status == 0x0000
    assert order == ["file", "row", "answer"]


@pytest.mark.parametrize(
    ("calling", "called", "peer"),
    [
        ("NOBODY", "DICOMNODE", SCANNER),
        ("SCANNER", "OTHERNODE", SCANNER),
        ("NOBODY", "OTHERNODE", SCANNER),
        ("SCANNER", "DICOMNODE", replace(SCANNER, sends=False, receives=True, queries=False)),
        ("scanner", "DICOMNODE", SCANNER),
    ],
)
def test_whoever_may_not_send_gets_one_and_the_same_rejection(receiver, storage, calling, called, peer):
    storage.registry.add_peer(peer)
    assert answer_to_request(receiver.port, PAIRS, calling=calling, called=called) == REJECTED


def test_the_registry_is_asked_at_every_association(receiver, storage):
    storage.registry.remove_peer("SCANNER")
    assert answer_to_request(receiver.port, PAIRS) == REJECTED
    storage.registry.add_peer(SCANNER)
    association = associate(receiver.port, PAIRS)
    assert association.is_established
    association.release()
    storage.registry.add_peer(replace(SCANNER, sends=False, queries=False))
    assert answer_to_request(receiver.port, PAIRS) == REJECTED


def test_a_registry_that_cannot_be_asked_lets_nobody_in(receiver, storage, monkeypatch):
    def fail(_ae_title: str) -> None:
        raise Unavailable("no database")

    monkeypatch.setattr(storage.registry, "peer", fail)
    assert answer_to_request(receiver.port, PAIRS) == REJECTED


def test_the_same_content_again_is_success_and_no_work(scanner, storage, tmp_path):
    dataset = a_dataset()
    assert [send(scanner, dataset) for _ in range(3)] == [0, 0, 0]
    assert len(object_files(tmp_path)) == 1
    assert storage.index.study("1.2.3.4").instances == 1
    assert storage.index.quarantined() == []


@pytest.mark.parametrize("change", [{"PatientID": "P2"}, {"PixelData": bytes([1]) + bytes(47)}, {}])
def test_other_content_under_the_same_uid_is_quarantined_and_the_first_stays(scanner, storage, change):
    first = a_dataset()
    other = a_dataset(SOPInstanceUID=first.SOPInstanceUID, **change)
    syntax = EXPLICIT if change else IMPLICIT  # the same image in another transfer syntax is other content too
    assert send(scanner, first) == 0
    answer = store(scanner, encoded(other, syntax), uid=first.SOPInstanceUID, syntax=syntax)
    assert answer.Status == 0xC003
    assert answer.ErrorComment == "this SOP Instance UID is stored with other content"
    assert split_part10(stored_bytes(storage, first.SOPInstanceUID))[1] == encoded(first)
    [kept] = storage.index.quarantined("1.2.3.4")
    assert (kept.dimse_status, kept.sop_instance_uid, kept.calling_ae_title) == (0xC003, first.SOPInstanceUID, "SCANNER")
    assert split_part10(storage.objects.read(kept.stored.object_id))[1] == encoded(other, syntax)


def test_of_equal_conflicts_one_copy_is_kept(scanner, storage, tmp_path):
    first = a_dataset()
    other = a_dataset(SOPInstanceUID=first.SOPInstanceUID, PatientID="P2")
    send(scanner, first)
    assert [send(scanner, other) for _ in range(3)] == [0xC003] * 3
    assert len(object_files(tmp_path)) == 2


def test_two_associations_with_one_uid_at_once_store_it_once(receiver, storage, tmp_path):
    dataset = a_dataset()
    associations = [associate(receiver.port, PAIRS) for _ in range(4)]
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda a=a: statuses.append(send(a, dataset))) for a in associations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for association in associations:
        association.release()
    assert statuses == [0, 0, 0, 0]
    assert len(object_files(tmp_path)) == 1


REFUSALS = [
    (lambda d: encoded(d)[:-10], {}, 0xC001),
    (lambda d: encoded(d) + b"\x00", {}, 0xC001),
    (lambda d: None, {}, 0xC001),
    (encoded, {"uid": "1.2.3/../../../etc/passwd"}, 0xC001),
    (encoded, {"uid": "1.2.3"}, 0xA900),
    (encoded, {"sop_class": "1.2.840.10008.5.1.4.1.1.4"}, 0xA900),
    (encoded, {"sop_class": "1.2.3.4.5.6"}, 0xA900),
    (encoded, {"sop_class": "1.2.840.10008.1.1"}, 0xA900),
    (lambda d: encoded(d, IMPLICIT), {}, 0xC001),
]


@pytest.mark.parametrize(("content", "declared", "status"), REFUSALS)
def test_each_cause_has_its_status_and_leaves_a_row_but_no_file(scanner, storage, tmp_path, content, declared, status):
    dataset = a_dataset()
    answer = store(scanner, content(dataset), **{"uid": dataset.SOPInstanceUID, **declared})
    assert answer.Status == status
    assert 0 < len(answer.ErrorComment) <= 64
    assert object_files(tmp_path) == []
    [refusal] = storage.index.quarantined()
    assert (refusal.dimse_status, refusal.reason, refusal.stored) == (status, answer.ErrorComment, None)
    assert "/" not in refusal.sop_instance_uid
    assert send(scanner, dataset) == 0, "the association goes on"


@pytest.mark.parametrize(
    ("dataset", "syntax", "tail"),
    [
        (a_dataset(PixelData=bytes(46)), EXPLICIT, b""),
        (a_dataset(PixelData=None), EXPLICIT, b""),
        (a_dataset(PixelData=None, NumberOfFrames=2), JPEG_2000, encapsulated(bytes(10))),
        (a_dataset(PixelData=None), JPEG_2000, encapsulated(bytes(10), delimiter=False)),
    ],
)
def test_pixel_data_that_is_not_whole_is_refused_and_shown_with_its_study(scanner, storage, dataset, syntax, tail):
    answer = store(scanner, encoded(dataset) + tail, uid=dataset.SOPInstanceUID, syntax=syntax)
    assert answer.Status == 0xC002
    assert [refusal.dimse_status for refusal in storage.index.quarantined("1.2.3.4")] == [0xC002]
    assert storage.index.find(dataset.SOPInstanceUID) is None


def test_trailing_padding_is_noted(scanner, storage):
    dataset = a_dataset(PixelData=bytes(60))
    assert send(scanner, dataset) == 0
    assert storage.index.find(dataset.SOPInstanceUID).note == "pixel data has 12 bytes more than its header says"


def test_a_full_disk_is_a_transient_refusal_and_keeps_nothing(tmp_path):
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    full = open_storage(url, tmp_path, reserve_bytes=2**60)
    full.registry.add_peer(SCANNER)
    receiver = Receiver(settings_for(tmp_path), full)
    receiver.start()
    association = associate(receiver.port, PAIRS)
    assert send(association, a_dataset()) == 0xA700
    association.release()
    receiver.stop()
    assert object_files(tmp_path) == []
    assert [refusal.dimse_status for refusal in full.index.quarantined()] == [0xA700]
    full.database.close()


def test_intake_stops_before_the_disk_is_full_and_goes_on_by_itself(tmp_path, monkeypatch, capsys):
    """Seen in the answers, in `check` and in the metrics; between reserve and resumption it stays as it is, so that it doesn't flap."""
    free = 10_000_000
    monkeypatch.setattr(ObjectStore, "free_bytes", lambda _self: free)
    (tmp_path / "node.toml").write_text(f'[node]\ndata = "{tmp_path}"\n[storage]\nreserve_bytes = 1000000\nresume_bytes = 2000000\n')
    config = ["--config", str(tmp_path / "node.toml")]
    url = f"sqlite:///{tmp_path / 'dicomnode.sqlite'}"
    prepare_storage(url, tmp_path)
    storage = open_storage(url, tmp_path, reserve_bytes=1_000_000, resume_bytes=2_000_000)
    storage.registry.add_peer(SCANNER)
    receiver = Receiver(settings_for(tmp_path), storage)
    retention = Retention(storage, RetentionSection())
    receiver.start()
    retention.start()
    try:
        association = associate(receiver.port, PAIRS)
        answers = []
        for number, free in enumerate((1_500_000, 900_000, 1_500_000, 2_500_000, 999_999)):  # noqa: B007  the disk is asked for it
            answers.append(send(association, a_dataset(SOPInstanceUID=f"1.2.3.{number}")))
        assert answers == [0, 0xA700, 0xA700, 0, 0xA700]
        free = 1_999_999
        assert run(["check", "--json", *config]) == 1
        assert "images are refused until 2000000 are" in capsys.readouterr().out
        assert run(["metrics", *config]) == 0
        assert "dicomnode_intake_stopped_now 1\n" in capsys.readouterr().out
        free = 2_100_000
        wait_until(lambda: not storage.objects.intake_stopped, what="intake to go on without an image")
        assert send(association, a_dataset(SOPInstanceUID="1.2.3.9")) == 0
        association.release()
    finally:
        retention.stop()
        receiver.stop()
    assert {name: count for name, count in storage.counters.all().items() if "intake" in name} == {"intake stopped": 2, "intake resumed": 2}
    assert {instance.sop_instance_uid for instance in storage.index.instances("1.2.3.4")} == {"1.2.3.0", "1.2.3.3", "1.2.3.9"}
    storage.database.close()


def test_what_a_rule_lets_go_is_removed_by_one_of_two_receivers_and_can_be_sent_again(scanner, storage, tmp_path):
    dataset = a_dataset()
    assert send(scanner, dataset) == 0
    assert close(storage, "1.2.3.4") == 1
    moment = 1e-9
    rules = RetentionSection(days=moment, minimum_days=0, unanalysed_days=moment, priors=0, interval_seconds=moment)
    both = [Retention(storage, rules) for _ in range(2)]
    for each in both:
        each.start()
    try:
        wait_until(lambda: not storage.index.study("1.2.3.4").holds, what="the study to be removed")
        wait_until(lambda: not storage.retention.unfinished(), what="its file to be gone")
        assert object_files(tmp_path) == []
    finally:
        for each in both:
            each.stop()
    assert storage.leases.holder("retention") is None
    assert send(scanner, dataset) == 0
    assert len(object_files(tmp_path)) == 1
    assert stored_bytes(storage, dataset.SOPInstanceUID)
    assert close(storage, "1.2.3.4") == 2
    assert storage.counters.all()["studies removed"] == 1


@pytest.mark.parametrize(
    ("failure", "status"),
    [(OutOfSpace("full"), 0xA700), (Unavailable("busy"), 0xA700), (StorageError("broken"), 0xC004), (RuntimeError("a bug"), 0xC004)],
)
def test_a_row_that_cannot_be_written_is_no_success_and_leaves_no_file(scanner, storage, tmp_path, monkeypatch, failure, status):
    def fail(*_given: object) -> None:
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(storage.index, "add_instances", fail)
        answer = store(scanner, encoded(dataset := a_dataset()), uid=dataset.SOPInstanceUID)
    assert answer.Status == status
    assert answer.ErrorComment.endswith("send again later")
    assert object_files(tmp_path) == []
    assert send(scanner, dataset) == 0


def test_a_commit_whose_answer_was_lost_keeps_its_file(scanner, storage, monkeypatch):
    add = storage.index.add_instances

    def commit_and_fail(*given: Any) -> None:
        add(*given)
        raise StorageError("the connection was lost after the commit")

    dataset = a_dataset()
    with monkeypatch.context() as patched:
        patched.setattr(storage.index, "add_instances", commit_and_fail)
        assert send(scanner, dataset) == 0xC004
    assert split_part10(stored_bytes(storage, dataset.SOPInstanceUID))[1] == encoded(dataset)
    assert send(scanner, dataset) == 0


def p_data(association: Any, context_id: int, control: int, fragment: bytes) -> bytes:
    value = bytes([context_id, control]) + fragment
    return b"\x04\x00" + (len(value) + 4).to_bytes(4, "big") + len(value).to_bytes(4, "big") + value


def test_a_connection_that_breaks_within_a_message_leaves_nothing_of_it(receiver, storage, tmp_path):
    association = associate(receiver.port, PAIRS)
    first, second = a_dataset(), a_dataset()
    assert send(association, first) == 0
    uid = second.SOPInstanceUID + "\0" * (len(second.SOPInstanceUID) % 2)
    command = pydicom.Dataset()
    command.AffectedSOPClassUID, command.CommandField, command.MessageID, command.Priority = CT, 1, 2, 2
    command.CommandDataSetType, command.AffectedSOPInstanceUID = 1, uid.rstrip("\0")
    context = next(c for c in association.accepted_contexts if c.transfer_syntax[0] == EXPLICIT).context_id
    raw: socket.socket = association.dul.socket.socket
    raw.sendall(p_data(association, context, 3, encoded(command, IMPLICIT)) + p_data(association, context, 0, encoded(second)[:200]))
    raw.shutdown(socket.SHUT_RDWR)
    association.join(120)
    receiver.stop(drain_seconds=60)
    assert storage.index.find(second.SOPInstanceUID) is None
    assert len(object_files(tmp_path)) == 1
    assert split_part10(stored_bytes(storage, first.SOPInstanceUID))[1] == encoded(first)
    assert storage.index.study("1.2.3.4").released_at is not None


@pytest.mark.parametrize("end", ["release", "abort"])
def test_the_end_of_an_association_is_a_hint_that_its_studies_are_complete(receiver, storage, end):
    association = associate(receiver.port, PAIRS)
    send(association, a_dataset())
    assert storage.index.study("1.2.3.4").released_at is None
    getattr(association, end)()
    receiver.stop(drain_seconds=60)
    assert storage.index.study("1.2.3.4").released_at is not None


def test_stopping_lets_a_running_association_end(tmp_path, storage):
    receiver = Receiver(settings_for(tmp_path), storage)
    receiver.start()
    port = receiver.port
    association = associate(port, PAIRS)
    stopping = threading.Thread(target=receiver.stop, kwargs={"drain_seconds": 120})
    stopping.start()
    dataset = a_dataset()
    assert send(association, dataset) == 0
    association.release()
    stopping.join(120)
    assert not stopping.is_alive()
    assert storage.index.find(dataset.SOPInstanceUID) is not None
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=60):
        pass


def test_stopping_does_not_wait_for_ever(tmp_path, storage):
    receiver = Receiver(settings_for(tmp_path), storage)
    receiver.start()
    association = associate(receiver.port, PAIRS)
    receiver.stop(drain_seconds=0)
    association.join(120)
    assert not association.is_established


def _write_and_die(url: str, folder: Path, told: Any) -> None:
    objects = open_storage(url, folder).objects
    orphan = objects.put(b"never indexed")
    objects.create(b"never whole").write(b"half")
    told.send(orphan.object_id)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_crash_left_behind_is_swept_at_start(tmp_path, storage):
    context = multiprocessing.get_context("spawn")
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=_write_and_die, args=(f"sqlite:///{tmp_path / 'node.sqlite'}", tmp_path, told))
    process.start()
    orphan = heard.recv()
    process.join(120)
    assert {path.suffix for path in object_files(tmp_path)} == {".dcm", ".part"}
    receiver = Receiver(settings_for(tmp_path), storage)
    receiver.start()
    receiver.stop()
    assert not storage.objects.path(orphan).exists()
    assert object_files(tmp_path) == []
    heard.close()
    told.close()


def test_every_kind_of_object_is_negotiated_in_every_accepted_syntax(receiver):
    for sop_class in (CT, LABEL_MAP, COMPREHENSIVE_3D_SR, "1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.1.1"):
        pairs = [(sop_class, row.uid) for row in TRANSFER_SYNTAXES]
        association = associate(receiver.port, pairs)
        accepted = {context.transfer_syntax[0] for context in association.accepted_contexts}
        assert accepted >= {EXPLICIT, IMPLICIT}
        if storage_class(sop_class):
            assert accepted == {row.uid for row in TRANSFER_SYNTAXES}
        association.release()


def test_what_is_not_in_the_table_is_refused_as_a_context(receiver):
    association = associate(receiver.port, [(CT, "1.2.840.10008.1.2.1.99"), ("1.2.3.4.5", EXPLICIT), (CT, EXPLICIT)])
    assert [(c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts] == [(CT, EXPLICIT)]
    association.release()


def test_verification_is_answered(receiver):
    association = associate(receiver.port, [("1.2.840.10008.1.1", IMPLICIT)])
    assert association.send_c_echo().Status == 0x0000
    association.release()


def test_more_associations_than_allowed_are_put_off(tmp_path, storage):
    receiver = Receiver(settings_for(tmp_path, maximum_associations=1), storage)
    receiver.start()
    first = associate(receiver.port, PAIRS)
    assert first.is_established
    assert answer_to_request(receiver.port, PAIRS) == bytes.fromhex("0300 00000004 00 02 03 02")  # transient, local limit exceeded
    first.release()
    receiver.stop()


@pytest.mark.system
@pytest.mark.realdata
@pytest.mark.parametrize("option", ["-xe", "-xi"])
def test_storescu_sends_a_real_study(receiver, storage, option):
    if shutil.which("storescu") is None:
        pytest.skip("storescu is not installed (apt-get install dcmtk)")
    folder = SHARED_DATA / "ct_chest_lidc" / "LIDC-IDRI-0001"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    command = ["storescu", "-aet", "SCANNER", "-aec", "DICOMNODE", option, "127.0.0.1", str(receiver.port), "+sd", str(folder)]
    subprocess.run(command, check=True, timeout=300)
    files = sorted(folder.glob("*.dcm"))
    sent = [(pydicom.dcmread(file, stop_before_pixels=True), file.read_bytes()) for file in files]
    study = storage.index.study(sent[0][0].StudyInstanceUID)
    assert study.instances == len(files) == 16
    for header, content in sent:
        stored = pydicom.dcmread(storage.objects.path(storage.index.find(header.SOPInstanceUID).stored.object_id))
        assert stored.PixelData == content[-len(stored.PixelData) :]
    if option == "-xe":  # the files' own transfer syntax
        assert stored.file_meta.TransferSyntaxUID == EXPLICIT


@pytest.mark.realdata
def test_real_images_are_stored_byte_for_byte_and_their_truncations_refused(receiver, storage):
    folder = SHARED_DATA / "ct_chest_lidc" / "LIDC-IDRI-0002"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    association = associate(receiver.port, PAIRS)
    for file in sorted(folder.glob("*.dcm"))[:4]:
        meta, offset = split_dataset(file)
        data, uid = file.read_bytes()[offset:], str(meta.MediaStorageSOPInstanceUID)
        for keep in (len(data) - 2, len(data) // 2, 1000, 301):
            assert store(association, data[:keep], uid=uid).Status in {0xC001, 0xC002}
        assert storage.index.find(uid) is None
        assert store(association, data, uid=uid).Status == 0
        assert split_part10(stored_bytes(storage, uid))[1] == data
    association.release()
