"""The node as SCP of C-FIND, C-MOVE and C-GET, asked by pynetdicom: what it holds, images and results, is found and fetched."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import CT, EXPLICIT, IMPLICIT, JPEG_2000, a_dataset, closing_connections, encapsulated, encoded, keep_connection, received
from held_objects import STUDY, keep, receiving_node, slices
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from pydicom import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.dimse_primitives import C_FIND
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import build_context
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.dimse import querying
from dicomnode.dimse.contexts import (
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_GET,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    STUDY_ROOT_MOVE,
    VERIFICATION,
)
from dicomnode.dimse.find import query
from dicomnode.dimse.scp import part10_prefix
from dicomnode.dimse.scu import keep_responses
from dicomnode.holdings import name_old_results
from pacs import wait_until
from storage import Storage
from storage.records import Peer, Result

PATIENCE = 120.0
MODELS = (STUDY_ROOT_FIND, STUDY_ROOT_MOVE, STUDY_ROOT_GET, PATIENT_ROOT_FIND, PATIENT_ROOT_GET)
IMAGES = query("IMAGE", StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.3.4.5", SOPInstanceUID="")
NAMES = {"JP": "Yamada^Tarou=山田^太郎=やまだ^たろう", "GR": "Διονυσιος", "AR": "قباني^لنزار", "FR": "Buc^Jérôme"}


class Workstation:
    """A workstation that asks and takes what it is sent."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.taken: list[tuple[Dataset, str, tuple[str, int]]] = []  # data set, transfer syntax, originator of the move
        self.status = 0x0000
        self.entity: Any = AE("WORKST")
        self.entity.acse_timeout = self.entity.dimse_timeout = self.entity.network_timeout = PATIENCE
        self.entity.add_supported_context(CT, [EXPLICIT, IMPLICIT])
        handlers = [(evt.EVT_CONN_OPEN, keep_connection), (evt.EVT_C_STORE, self.take)]
        self.server: Any = self.entity.make_server(("127.0.0.1", 0), evt_handlers=handlers, server_class=ThreadedAssociationServer)
        self.entity._servers.append(self.server)

    def take(self, event: Any) -> int:
        originator = (event.request.MoveOriginatorApplicationEntityTitle, event.request.MoveOriginatorMessageID)
        self.taken.append((event.dataset, str(event.context.transfer_syntax), originator))
        return self.status

    def associate(self, *pairs: tuple[str, str], calling: str = "WORKST", as_scp: tuple[str, ...] = ()) -> Any:
        self.entity.ae_title = calling
        association = self.entity.associate(
            "127.0.0.1",
            self.port,
            contexts=[build_context(*pair) for pair in pairs or [(model, EXPLICIT) for model in MODELS]],
            ae_title="DICOMNODE",
            ext_neg=[build_role(uid, scp_role=True) for uid in as_scp],
            evt_handlers=[(evt.EVT_CONN_OPEN, keep_connection), (evt.EVT_C_STORE, self.take)],
        )
        keep_responses(association)
        return association

    def ask(self, identifier: Dataset, model: str = STUDY_ROOT_FIND, syntax: str = EXPLICIT) -> tuple[list[int], list[Dataset]]:
        """C-FIND; return the statuses and the identifiers."""
        association = self.associate((model, syntax))
        answers = list(association.send_c_find(identifier, model))
        association.release()
        return [status.Status for status, _ in answers], [found for _, found in answers if found is not None]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Storage, int]]:
    """The storage of a running node, and its port."""
    with receiving_node(tmp_path, maximum_queries=2) as (storage, receiver):
        yield storage, receiver.port


@pytest.fixture
def storage(node: tuple[Storage, int]) -> Storage:
    return node[0]


@pytest.fixture
def workstation(node: tuple[Storage, int]) -> Iterator[Workstation]:
    """A workstation that is a peer of the node."""
    storage, port = node
    workstation = Workstation(port)
    for ae_title, queries, receives in (("WORKST", True, True), ("MUTE", False, True), ("SCANNER", True, False)):
        storage.registry.add_peer(
            Peer(
                ae_title=ae_title, host="127.0.0.1", port=workstation.server.server_address[1], sends=ae_title == "SCANNER",
                receives=receives, tls=False, client_cert=None, queries=queries,
            )
        )  # fmt: skip
    with closing_connections():
        threading.Thread(target=workstation.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield workstation
        workstation.server.shutdown()
        workstation.entity.shutdown()


def test_each_level_is_found_with_the_keys_that_were_asked_for(workstation, storage):
    slices(storage, 3, StudyTime="101112", StudyID="S1", PatientBirthDate="19700101", BodyPartExamined="CHEST")
    statuses, (study,) = workstation.ask(
        query("STUDY", PatientName="doe*", StudyInstanceUID="", StudyTime="10-11", ModalitiesInStudy="", NumberOfStudyRelatedSeries="",
              NumberOfStudyRelatedInstances="", StudyID="", PatientBirthDate="")
    )  # fmt: skip
    assert statuses == [0xFF00, 0x0000]
    assert (study.QueryRetrieveLevel, study.RetrieveAETitle, study.StudyInstanceUID) == ("STUDY", "DICOMNODE", STUDY)
    assert (study.PatientName, study.StudyTime, study.StudyID, study.PatientBirthDate) == ("Doe^Jane", "101112", "S1", "19700101")
    assert (study.ModalitiesInStudy, study.NumberOfStudyRelatedSeries, study.NumberOfStudyRelatedInstances) == ("CT", 1, 3)
    assert "SpecificCharacterSet" not in study
    _, (series,) = workstation.ask(
        query("SERIES", StudyInstanceUID=STUDY, SeriesInstanceUID="", Modality="CT", NumberOfSeriesRelatedInstances="", BodyPartExamined="")
    )
    assert (series.SeriesInstanceUID, series.NumberOfSeriesRelatedInstances, series.BodyPartExamined) == ("1.2.3.4.5", 3, "CHEST")
    _, images = workstation.ask(query("IMAGE", StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.3.4.5", SOPInstanceUID="", InstanceNumber=""))
    assert [(image.SOPInstanceUID, image.InstanceNumber) for image in images] == [(f"1.2.3.4.5.{n}", n) for n in (1, 2, 3)]
    _, (patient,) = workstation.ask(query("PATIENT", PatientID="P1", NumberOfPatientRelatedStudies=""), PATIENT_ROOT_FIND, IMPLICIT)
    assert (patient.PatientID, patient.NumberOfPatientRelatedStudies) == ("P1", 1)


def test_what_is_not_known_comes_back_empty_and_says_so(workstation, storage):
    slices(storage, 1)
    identifier = query("STUDY", StudyInstanceUID="", InstitutionName="St. Elsewhere", ProcedureCodeSequence=[], Modality="MR")
    identifier.add_new(0x00091001, "LO", "private")
    statuses, (study,) = workstation.ask(identifier)
    assert statuses == [0xFF01, 0x0000]
    assert (study.InstitutionName, len(study.ProcedureCodeSequence), study.Modality, study[0x00091001].value) == ("", 0, "", None)


@pytest.mark.parametrize(
    ("name", "character_set", "asked", "answered"),
    [
        ("JP", ["", "ISO 2022 IR 87"], "山田*", ["", "ISO 2022 IR 87"]),
        ("JP", "ISO_IR 192", "*やまだ*", "ISO_IR 192"),
        ("JP", "ISO_IR 100", "yamada*", "ISO_IR 192"),
        ("GR", "ISO_IR 126", "διο*", "ISO_IR 126"),
        ("AR", "ISO_IR 127", "قباني*", "ISO_IR 127"),
        ("FR", "ISO_IR 100", "BUC^JEROME", "ISO_IR 100"),
    ],
)
def test_names_are_asked_and_answered_in_the_character_set_of_who_asks(workstation, storage, name, character_set, asked, answered):
    for number, (patient_id, patient_name) in enumerate(NAMES.items(), start=1):
        dataset = a_dataset(PatientID=patient_id, StudyInstanceUID=f"1.2.{number}", SpecificCharacterSet="ISO_IR 192")
        dataset.PatientName = patient_name
        keep(storage, dataset)
    identifier = Dataset()
    identifier.SpecificCharacterSet = character_set
    identifier.QueryRetrieveLevel = "STUDY"
    identifier.PatientName, identifier.PatientID = asked, ""
    statuses, (found,) = workstation.ask(identifier)
    assert statuses == [0xFF00, 0x0000]
    assert (found.PatientID, str(found.PatientName), found.SpecificCharacterSet) == (name, NAMES[name], answered)


@pytest.mark.parametrize(
    ("identifier", "model", "status"),
    [
        (query("PATIENT", PatientID=""), STUDY_ROOT_FIND, 0xA900),
        (query("SERIES", SeriesInstanceUID=""), STUDY_ROOT_FIND, 0xA900),
        (query("IMAGE", StudyInstanceUID=STUDY, SOPInstanceUID=""), STUDY_ROOT_FIND, 0xA900),
        (query("STUDY", StudyInstanceUID=""), PATIENT_ROOT_FIND, 0xA900),
        (query("WORKLIST", StudyInstanceUID=""), STUDY_ROOT_FIND, 0xA900),
        (query("SERIES", StudyInstanceUID=[STUDY, "1.2"], SeriesInstanceUID=""), STUDY_ROOT_FIND, 0xA900),
        (Dataset(), STUDY_ROOT_FIND, 0xA900),
    ],
)
def test_an_unacceptable_query_has_its_status(workstation, identifier, model, status):
    identifier.PatientName = ""
    assert workstation.ask(identifier, model)[0] == [status]


def test_whom_it_is_not_granted_gets_no_context_and_who_is_unknown_no_association(workstation):
    association = workstation.associate((VERIFICATION, EXPLICIT), (STUDY_ROOT_FIND, EXPLICIT), calling="MUTE")
    assert not association.is_established  # it neither sends nor queries
    association = workstation.associate((VERIFICATION, EXPLICIT), (STUDY_ROOT_FIND, EXPLICIT), calling="NOBODY")
    assert not association.is_established
    association = workstation.associate((VERIFICATION, EXPLICIT), (STUDY_ROOT_FIND, EXPLICIT), (CT, EXPLICIT))
    assert sorted(str(context.abstract_syntax) for context in association.accepted_contexts) == [VERIFICATION, STUDY_ROOT_FIND]
    association.release()


def test_more_than_a_query_may_answer_is_said(workstation, storage, monkeypatch):
    monkeypatch.setattr(querying, "MAXIMUM_MATCHES", 2)
    slices(storage, 3)
    statuses, found = workstation.ask(IMAGES)
    assert statuses == [0xFF00, 0xFF00, 0xA700]
    assert len(found) == 2


def wait_for_cancel(monkeypatch: pytest.MonkeyPatch, look: int) -> None:
    """Let the node's n-th look for a C-CANCEL wait until there is something to read."""
    looks = itertools.count(1)
    is_cancelled = querying._Answer.is_cancelled

    def patient(answer: Any) -> bool:
        if next(looks) == look:
            deadline = time.monotonic() + PATIENCE
            while not answer.conversation._association.has_come() and time.monotonic() < deadline:
                time.sleep(0.01)
        return is_cancelled(answer)

    monkeypatch.setattr(querying._Answer, "is_cancelled", patient)


def test_a_query_is_cancelled_between_two_answers(workstation, storage, monkeypatch):
    slices(storage, 12)
    association = workstation.associate((STUDY_ROOT_FIND, EXPLICIT))
    wait_for_cancel(monkeypatch, 2)
    statuses = []
    for status, _ in association.send_c_find(IMAGES, STUDY_ROOT_FIND, msg_id=7):
        statuses.append(status.Status)
        if len(statuses) == 1:
            association.send_c_cancel(7, query_model=STUDY_ROOT_FIND)
    assert statuses == [0xFF00, 0xFE00]
    again = [status.Status for status, _ in association.send_c_find(IMAGES, STUDY_ROOT_FIND, msg_id=8)]
    assert again == [0xFF00] * 12 + [0x0000]
    association.release()


def move(workstation: Workstation, identifier: Dataset, destination: str = "WORKST", **more: Any) -> list[tuple[Dataset, Dataset | None]]:
    association = workstation.associate((STUDY_ROOT_MOVE, EXPLICIT))
    answers = list(association.send_c_move(identifier, destination, STUDY_ROOT_MOVE, **more))
    association.release()
    return answers


def test_a_study_is_moved_as_it_is_stored_and_counted(workstation, storage):
    slices(storage, 2)
    keep(storage, a_dataset(SOPInstanceUID="1.2.3.4.5.9", InstanceNumber=9), IMPLICIT)
    answers = move(workstation, query("STUDY", StudyInstanceUID=STUDY), msg_id=11)
    assert [status.Status for status, _ in answers] == [0xFF00, 0xFF00, 0x0000]
    assert [status.get("NumberOfRemainingSuboperations") for status, _ in answers] == [2, 1, None]
    last = answers[-1][0]
    counted = (last.NumberOfCompletedSuboperations, last.NumberOfFailedSuboperations, last.NumberOfWarningSuboperations)
    assert counted == (3, 0, 0)
    assert {(str(dataset.SOPInstanceUID), syntax) for dataset, syntax, _ in workstation.taken} == {
        ("1.2.3.4.5.1", EXPLICIT), ("1.2.3.4.5.2", EXPLICIT), ("1.2.3.4.5.9", IMPLICIT),
    }  # fmt: skip
    assert {originator for _, _, originator in workstation.taken} == {("WORKST", 11)}


def test_what_cannot_be_moved_is_listed(workstation, storage):
    slices(storage, 1)
    compressed = a_dataset(SOPInstanceUID="1.2.3.4.5.8", PixelData=None)
    keep(storage, compressed, JPEG_2000, encoded(compressed) + encapsulated(b"\xff\x4f\xff\xd9"))
    answers = move(workstation, query("SERIES", StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.3.4.5"))
    status, identifier = answers[-1]
    assert (status.Status, status.NumberOfCompletedSuboperations, status.NumberOfFailedSuboperations) == (0xB000, 1, 1)
    assert identifier is not None
    assert identifier.FailedSOPInstanceUIDList == "1.2.3.4.5.8"


def test_a_warning_of_the_destination_is_counted_and_a_failure_of_all_is_a_failure(workstation, storage):
    slices(storage, 2)
    workstation.status = 0xB006
    ((status, _),) = move(workstation, query("STUDY", StudyInstanceUID=STUDY))[-1:]
    assert (status.Status, status.NumberOfWarningSuboperations) == (0xB000, 2)
    workstation.status = 0xC123
    ((status, identifier),) = move(workstation, query("STUDY", StudyInstanceUID=STUDY))[-1:]
    assert (status.Status, status.NumberOfFailedSuboperations) == (0xA702, 2)
    assert sorted(identifier.FailedSOPInstanceUIDList) == ["1.2.3.4.5.1", "1.2.3.4.5.2"]


def test_nothing_is_moved_to_who_is_no_peer_that_receives(workstation, storage):
    slices(storage, 1)
    for destination in ("NOBODY", "SCANNER"):
        assert [status.Status for status, _ in move(workstation, query("STUDY", StudyInstanceUID=STUDY), destination)] == [0xA801]
    assert workstation.taken == []


def test_a_retrieval_names_what_it_wants(workstation, storage):
    slices(storage, 1)
    for identifier in (query("STUDY", StudyInstanceUID=""), query("STUDY", PatientID="P1")):
        assert [status.Status for status, _ in move(workstation, identifier)] == [0xA900]
    assert [status.Status for status, _ in move(workstation, query("STUDY", StudyInstanceUID="1.2.9.9"))] == [0x0000]
    identifier = query("IMAGE", StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.3.4.5", SOPInstanceUID=["1.2.3.4.5.1", "1.2.3.4.5.7"])
    assert move(workstation, identifier)[-1][0].NumberOfCompletedSuboperations == 1


def test_a_move_is_cancelled_between_two_objects(workstation, storage, monkeypatch):
    slices(storage, 12)
    wait_for_cancel(monkeypatch, 1)
    association = workstation.associate((STUDY_ROOT_MOVE, EXPLICIT))
    take = workstation.take

    def cancelling(event: Any) -> int:
        if not workstation.taken:
            association.send_c_cancel(5, query_model=STUDY_ROOT_MOVE)
        return take(event)

    workstation.server.unbind(evt.EVT_C_STORE, take)
    workstation.server.bind(evt.EVT_C_STORE, cancelling)
    answers = list(association.send_c_move(query("STUDY", StudyInstanceUID=STUDY), "WORKST", STUDY_ROOT_MOVE, msg_id=5))
    last = answers[-1][0]
    counted = (last.Status, last.NumberOfCompletedSuboperations, last.NumberOfRemainingSuboperations)
    assert counted == (0xFE00, 1, 11)
    assert len(workstation.taken) == 1
    association.release()


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_a_study_is_fetched_on_the_same_association_in_the_syntax_that_the_peer_takes(workstation, storage, syntax):
    slices(storage, 2)
    big = a_dataset(SOPInstanceUID="1.2.3.4.5.9", Rows=600, Columns=600, PixelData=bytes(range(256)) * 2813)
    keep(storage, big, IMPLICIT)
    association = workstation.associate((STUDY_ROOT_GET, EXPLICIT), (CT, syntax), as_scp=(CT,))
    answers = list(association.send_c_get(query("STUDY", StudyInstanceUID=STUDY), STUDY_ROOT_GET, msg_id=3))
    association.release()
    assert [status.Status for status, _ in answers] == [0xFF00, 0xFF00, 0x0000]
    assert answers[-1][0].NumberOfCompletedSuboperations == 3
    assert [(str(dataset.SOPInstanceUID), got) for dataset, got, _ in workstation.taken] == [
        (f"1.2.3.4.5.{number}", syntax) for number in (1, 2, 9)
    ]
    assert workstation.taken[-1][0].PixelData == big.PixelData


def test_what_the_peer_takes_in_no_context_fails_and_the_rest_comes(workstation, storage):
    slices(storage, 1)
    compressed = a_dataset(SOPInstanceUID="1.2.3.4.5.8", PixelData=None)
    keep(storage, compressed, JPEG_2000, encoded(compressed) + encapsulated(b"\xff\x4f\xff\xd9"))
    keep(storage, a_dataset("1.2.840.10008.5.1.4.1.1.4", SOPInstanceUID="1.2.3.4.5.7"))
    association = workstation.associate((PATIENT_ROOT_GET, EXPLICIT), (CT, EXPLICIT), as_scp=(CT,))
    answers = list(association.send_c_get(query("PATIENT", PatientID="P1"), PATIENT_ROOT_GET))
    association.release()
    assert answers[-1][0].Status == 0xB000
    assert sorted(answers[-1][1].FailedSOPInstanceUIDList) == ["1.2.3.4.5.7", "1.2.3.4.5.8"]
    assert len(workstation.taken) == 1


def test_too_many_queries_at_a_time_are_refused_and_the_association_lives_on(workstation, storage, monkeypatch):
    slices(storage, 1)
    running, going_on = threading.Semaphore(0), threading.Event()
    find = storage.query.find

    def slow(*arguments: Any, **more: Any) -> Any:
        running.release()
        assert going_on.wait(PATIENCE)
        return find(*arguments, **more)

    monkeypatch.setattr(type(storage.query), "find", lambda _, *arguments, **more: slow(*arguments, **more))
    asked = query("STUDY", StudyInstanceUID="")
    answers: list[list[int]] = []
    threads = [threading.Thread(target=lambda: answers.append(workstation.ask(asked)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert running.acquire(timeout=PATIENCE)
    association = workstation.associate((STUDY_ROOT_FIND, EXPLICIT), (VERIFICATION, EXPLICIT))
    assert [status.Status for status, _ in association.send_c_find(asked, STUDY_ROOT_FIND)] == [0xA700]
    assert association.send_c_echo().Status == 0x0000
    going_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [[0xFF00, 0x0000]] * 2

    def is_answered() -> bool:
        return [status.Status for status, _ in association.send_c_find(asked, STUDY_ROOT_FIND)] == [0xFF00, 0x0000]

    wait_until(is_answered, what="a query to be free")
    association.release()


def status_of(association: Any, identifier: bytes) -> int | None:
    """The first status that bytes as an identifier are answered with; None if the association ended."""
    request = C_FIND()
    request.MessageID, request.Priority, request.AffectedSOPClassUID = 1, 2, STUDY_ROOT_FIND
    request.Identifier = BytesIO(identifier)
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _, response = association.dimse.get_msg(block=True)
    return None if response is None else int(response.Status)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_identifiers_are_refused_and_hurt_nobody(workstation, data):
    whole = encoded(query("STUDY", PatientName="A*", StudyDate="20260101-", StudyInstanceUID="", ProcedureCodeSequence=[Dataset()]))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(2, len(damaged)))]
    association = workstation.associate((STUDY_ROOT_FIND, EXPLICIT))
    assert status_of(association, bytes(damaged)) in {0x0000, 0xA900, 0xC001, 0xC002}
    association.release()


def unknown(tag: bytes, value: bytes) -> bytes:
    """An element of any length in Explicit VR Little Endian (PS3.5 7.1.2)."""
    return tag + b"UN\0\0" + len(value).to_bytes(4, "little") + value


LEVEL = encoded(query("STUDY"))
NAME, UID = b"\x10\x00\x10\x00", b"\x20\x00\x0d\x00"
MANY_KEYS = b"".join(b"\x09\x00" + n.to_bytes(2, "little") + b"LO\0\0" for n in range(1, 9000))
OPEN_SEQUENCE = b"\xf0\x7f\x01\x00SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4


@pytest.mark.parametrize(
    "identifier",
    [
        pytest.param(LEVEL + unknown(UID, b"1.2.3.4.5\\" * 90_000), id="a list of 90,000 UIDs"),
        pytest.param(LEVEL + unknown(NAME, b"*?" * 20_000), id="40,000 wildcards"),
        pytest.param(LEVEL + unknown(NAME, b"*a" * 30), id="wildcards that take turns"),
        pytest.param(LEVEL + MANY_KEYS, id="9,000 keys"),
        pytest.param(LEVEL + OPEN_SEQUENCE * 3000, id="3,000 sequences inside each other"),
    ],
)
def test_enormous_identifiers_are_answered_or_refused(workstation, storage, identifier):
    slices(storage, 1, PatientName="a" * 64)
    association = workstation.associate((STUDY_ROOT_FIND, EXPLICIT))
    assert status_of(association, identifier) in {0x0000, 0xFF00, 0xFF01, 0xA900, 0xC001}
    association.release()


def test_results_of_before_series_were_kept_are_found_once_their_files_are_read(storage):
    slices(storage, 1)
    study = storage.index.study(STUDY)
    made = a_dataset("1.2.840.10008.5.1.4.1.1.66.4", SOPInstanceUID="2.25.1", SeriesInstanceUID="2.25.9", SeriesNumber=901)
    data = encoded(made)
    file = part10_prefix(received(data, uid="2.25.1", sop_class=made.SOPClassUID)) + data
    with storage.database.writing() as connection:
        storage.index.close_revision(connection, STUDY, seen_last_received_at=study.last_received_at, evidence="", outcome="")
        storage.jobs.create(connection, key="k", kind="analyse", study_instance_uid=STUDY, revision=1, package="p", version="1", digest="d",
                            run=1, priority="routine")  # fmt: skip
        old = {"transfer_syntax_uid": EXPLICIT, "modality": "SEG", "study_instance_uid": STUDY, "job_key": "k"}
        for uid, stored in (("2.25.1", storage.objects.put(file)), ("2.25.2", storage.objects.put(b"no DICOM"))):
            result = Result(
                sop_instance_uid=uid, sop_class_uid=made.SOPClassUID, stored=stored, created_at=storage.database.now(connection), **old
            )
            storage.jobs.add_results(connection, [result])
    assert [row["Modality"] for row in storage.query.find("SERIES", {})] == ["CT"]
    name_old_results(storage)
    (_, series) = storage.query.find("SERIES", {})
    assert (series["SeriesInstanceUID"], series["SeriesNumber"], series["NumberOfSeriesRelatedInstances"]) == ("2.25.9", 901, 1)
    assert [result.sop_instance_uid for result in storage.jobs.unnamed_results()] == ["2.25.2"]


def test_a_caller_that_leaves_amid_its_answers_leaves_nothing_behind(workstation, storage):
    slices(storage, 30)
    for _ in range(3):
        association = workstation.associate((STUDY_ROOT_FIND, EXPLICIT))
        answers = association.send_c_find(
            query("IMAGE", StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.3.4.5", SOPInstanceUID=""), STUDY_ROOT_FIND
        )
        next(answers)
        association.dul.socket.socket.shutdown(socket.SHUT_RDWR)
        answers.close()
    asked = query("STUDY", StudyInstanceUID="")
    wait_until(lambda: workstation.ask(asked)[0] == [0xFF00, 0x0000], what="the two that may run at a time to be free")


def test_a_request_amid_a_query_ends_the_association(workstation, storage):
    """Two requests in one PDU: asynchronous operations were not negotiated."""
    slices(storage, 1)
    association = workstation.associate((STUDY_ROOT_FIND, EXPLICIT))
    aborted = threading.Event()
    association.bind(evt.EVT_ABORTED, lambda _event: aborted.set())
    request = C_FIND()
    request.MessageID, request.Priority, request.AffectedSOPClassUID = 1, 2, STUDY_ROOT_FIND
    request.Identifier = BytesIO(encoded(query("STUDY", StudyInstanceUID="")))
    together, send = P_DATA(), association.dul.send_pdu
    association.dul.send_pdu = lambda pdu: together.presentation_data_value_list.extend(pdu.presentation_data_value_list)
    for _ in range(2):
        association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    association.dul.send_pdu = send
    association.dul.send_pdu(together)
    assert aborted.wait(PATIENCE)
