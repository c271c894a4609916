"""Queries (C-FIND) over a real network connection: what a peer is asked, and what is made of each answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from dimse_cases import closing_connections, keep_connection
from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.dimse.find import FindLimits, StudyContent, find, query, series_instances, study_content
from dicomnode.errors import PeerRefused, PeerUnavailable
from pacs import free_port
from storage.records import Peer

STUDY_ROOT, PATIENT_ROOT = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.1.1"
VERIFICATION = "1.2.840.10008.1.1"
PATIENCE = 120.0  # seconds: a busy machine takes its time
PATIENT = FindLimits(seconds=PATIENCE)

Answers = Iterable[tuple[int, Dataset | None]]


class Archive:
    """A PACS whose answers to queries a test decides."""

    def __init__(self, models: tuple[str, ...]) -> None:
        self.answer: Callable[[Dataset], Answers] = lambda _: ()
        self.asked: list[tuple[str, Dataset]] = []  # SOP class and identifier
        self.sent = 0
        self.ended = threading.Event()
        self.entity: Any = AE("PACS")
        self.entity.acse_timeout = self.entity.dimse_timeout = self.entity.network_timeout = PATIENCE
        for model in models:
            self.entity.add_supported_context(model)
        handlers = [(evt.EVT_CONN_OPEN, keep_connection), (evt.EVT_C_FIND, self._find)]
        self.server: Any = self.entity.make_server(("127.0.0.1", 0), evt_handlers=handlers, server_class=ThreadedAssociationServer)

    @property
    def peer(self) -> Peer:
        port = self.server.server_address[1]
        return Peer(ae_title="PACS", host="127.0.0.1", port=port, sends=True, receives=False, tls=False, client_cert=None)

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        self.asked.append((str(event.request.AffectedSOPClassUID), event.identifier))
        try:
            for status, identifier in self.answer(event.identifier):
                if event.is_cancelled or not event.assoc.is_established:
                    return
                self.sent += 1
                yield status, identifier
        finally:
            self.ended.set()


@pytest.fixture
def archive(request: pytest.FixtureRequest) -> Iterator[Archive]:
    archive = Archive(getattr(request, "param", (STUDY_ROOT, PATIENT_ROOT)))
    archive.entity._servers.append(archive.server)
    with closing_connections():
        threading.Thread(target=archive.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield archive
        archive.server.shutdown()
        archive.entity.shutdown()


def ask(archive: Archive, limits: FindLimits = PATIENT, **keys: Any) -> Iterator[Dataset]:
    return find(archive.peer, query("STUDY", StudyInstanceUID="", **keys), calling_ae_title="NODE", patient_id="P1", limits=limits)


def studies(number: int) -> Iterator[tuple[int, Dataset]]:
    return ((0xFF00, query("STUDY", StudyInstanceUID=f"1.2.{n}")) for n in range(number))


def test_matches_come_one_by_one_in_the_order_of_the_peer(archive):
    archive.answer = lambda _: studies(3)
    assert [answer.StudyInstanceUID for answer in ask(archive, ModalitiesInStudy="CT")] == ["1.2.0", "1.2.1", "1.2.2"]
    ((model, identifier),) = archive.asked
    assert model == STUDY_ROOT
    assert (identifier.QueryRetrieveLevel, identifier.ModalitiesInStudy, identifier.StudyInstanceUID) == ("STUDY", "CT", "")
    assert "PatientID" not in identifier


@pytest.mark.parametrize("archive", [(PATIENT_ROOT,)], indirect=True)
def test_a_peer_without_the_study_root_model_is_asked_by_patient(archive):
    archive.answer = lambda _: studies(1)
    assert len(list(ask(archive))) == 1
    ((model, identifier),) = archive.asked
    assert (model, identifier.PatientID) == (PATIENT_ROOT, "P1")


@pytest.mark.parametrize("archive", [(VERIFICATION,)], indirect=True)
def test_a_peer_that_takes_no_query_refuses(archive):
    with pytest.raises(PeerRefused, match="accepts no query"):
        next(ask(archive))


def test_a_peer_that_is_not_there_is_unavailable(archive):
    nobody = replace(archive.peer, port=free_port())
    with pytest.raises(PeerUnavailable, match=r"PACS at 127\.0\.0\.1:\d+: the peer cannot be reached"):
        next(find(nobody, query("STUDY"), calling_ae_title="NODE", limits=PATIENT))


def test_more_matches_than_allowed_are_refused_and_the_query_is_cancelled(archive):
    archive.answer = lambda _: studies(100_000)
    with pytest.raises(PeerRefused, match="more than 5 matches"):
        list(ask(archive, FindLimits(seconds=PATIENCE, answers=5)))
    assert archive.ended.wait(PATIENCE)
    assert archive.sent < 100_000


def test_as_many_matches_as_allowed_are_given(archive):
    archive.answer = lambda _: studies(5)
    assert len(list(ask(archive, FindLimits(seconds=PATIENCE, answers=5)))) == 5


def test_closing_the_iterator_cancels_the_query(archive):
    archive.answer = lambda _: studies(100_000)
    answers = ask(archive)
    assert next(answers).StudyInstanceUID == "1.2.0"
    answers.close()
    assert archive.ended.wait(PATIENCE)


def test_more_bytes_than_allowed_are_refused(archive):
    archive.answer = lambda _: [(0xFF00, query("STUDY", AdditionalPatientHistory="x" * 10_000))] * 100_000
    with pytest.raises(PeerRefused, match="more than 100000 bytes"):
        list(ask(archive, FindLimits(seconds=PATIENCE, answers=100_000, size=100_000)))


def test_a_peer_that_is_silent_is_unavailable_when_the_time_is_up(archive):
    silent = threading.Event()

    def wait(_: Dataset) -> Answers:
        silent.wait(PATIENCE)
        return ()

    archive.answer = wait
    try:
        with pytest.raises(PeerUnavailable, match=r"within 0\.5 s"):
            list(ask(archive, FindLimits(seconds=0.5)))
    finally:
        silent.set()


def test_a_peer_that_never_comes_to_an_end_is_unavailable_when_the_time_is_up(archive):
    def drip(_: Dataset) -> Answers:
        while True:
            yield from studies(1)
            archive.ended.wait(0.05)

    archive.answer = drip
    with pytest.raises(PeerUnavailable, match=r"within 0\.5 s"):
        list(ask(archive, FindLimits(seconds=0.5)))


@pytest.mark.parametrize(
    ("status", "expected"),
    [(0xA700, PeerUnavailable), (0x0110, PeerUnavailable), (0xA900, PeerRefused), (0xC001, PeerRefused), (0xFE00, PeerRefused)],
)
def test_a_failure_is_no_end_of_the_matches(archive, status, expected):
    archive.answer = lambda _: [*studies(2), (status, None)]
    answers = ask(archive)
    next(answers), next(answers)
    with pytest.raises(expected, match=f"0x{status:04X}"):
        next(answers)


def series(uid: str, count: int | None, *, study: str = "1.2", modality: str = "CT") -> tuple[int, Dataset]:
    keys = {} if count is None else {"NumberOfSeriesRelatedInstances": count}
    return 0xFF00, query("SERIES", StudyInstanceUID=study, SeriesInstanceUID=uid, Modality=modality, **keys)


def image(series_uid: str, uid: str) -> tuple[int, Dataset]:
    return 0xFF00, query("IMAGE", StudyInstanceUID="1.2", SeriesInstanceUID=series_uid, SOPInstanceUID=uid)


def content(archive: Archive) -> StudyContent | None:
    return study_content(archive.peer, "1.2", calling_ae_title="NODE", patient_id="P1", limits=PATIENT)


def test_what_a_peer_holds_of_a_study_is_counted_by_series(archive):
    archive.answer = lambda _: [series("1.2.1", 300), series("1.2.2", 0), series("1.2.3", 2, modality="SR")]
    expected = StudyContent(instances={"1.2.1": 300, "1.2.2": 0, "1.2.3": 2}, modalities={"1.2.1": "CT", "1.2.2": "CT", "1.2.3": "SR"})
    assert content(archive) == expected
    assert len(archive.asked) == 1


def test_a_peer_that_gives_no_counts_is_asked_for_the_images(archive):
    def answer(asked: Dataset) -> Answers:
        if asked.QueryRetrieveLevel == "SERIES":
            return [series("1.2.1", None), series("1.2.2", 4)]
        assert (asked.StudyInstanceUID, asked.SeriesInstanceUID) == ("1.2", "1.2.1")
        return [image("1.2.1", "1.2.1.1"), image("1.2.1", "1.2.1.2"), image("1.2.1", "1.2.1.2"), image("1.2.9", "1.2.9.1")]

    archive.answer = answer
    found = content(archive)
    assert found is not None
    assert found.instances == {"1.2.1": 2, "1.2.2": 4}
    uids = series_instances(archive.peer, "1.2", "1.2.1", calling_ae_title="NODE", limits=PATIENT)
    assert uids.keys() == {"1.2.1.1", "1.2.1.2"}


def test_a_study_that_a_peer_does_not_hold_has_no_count(archive):
    assert content(archive) is None


def test_answers_about_other_studies_count_for_nothing(archive):
    archive.answer = lambda _: [series("9.1", 300, study="9"), series("", 7)]
    assert content(archive) is None
