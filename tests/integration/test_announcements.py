"""Modalities announce their steps (MPPS) and archives what is available (IAN), over real associations: it is evidence of completeness."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import CT, EXPLICIT, IMPLICIT, SEG, a_dataset, associate, encoded, store
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom.dimse_primitives import N_CREATE
from raw_dicom import Image, association, association_request
from sqlalchemy import text
from stub_package import enable_stub_package

from dicomnode.cli import run
from dicomnode.completion import Seen, close_complete_studies
from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.dimse.performed import MOST_REFERENCES
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.receiver import Receiver
from pacs import loopback_peer
from storage import open_storage, prepare_storage
from storage.records import Revision, Route

MPPS, IAN = "1.2.840.10008.3.1.2.3.3", "1.2.840.10008.5.1.4.33"
QUIET = 30.0
STUDY = "1.2.826.0.1.77"
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # what doesn't differ between databases is tried on one


def a(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        dataset[keyword] = DataElement(keyword, dictionary_VR(keyword), value, validation_mode=IGNORE)  # a peer writes anything
    return dataset


def references(uids: list[str], sop_class: str = CT, **more: str) -> list[Dataset]:
    return [a(ReferencedSOPClassUID=sop_class, ReferencedSOPInstanceUID=uid, **more) for uid in uids]


def performed(series: dict[str, list[str]]) -> list[Dataset]:
    """Performed Series Sequence."""
    return [
        a(
            SeriesInstanceUID=uid,
            ReferencedImageSequence=references(images),
            ReferencedNonImageCompositeSOPInstanceSequence=references(["1.9"], SEG),
        )
        for uid, images in series.items()
    ]


def begun(**values: Any) -> Dataset:
    """The data set of a step that begins, changed by `values`; None takes an attribute away."""
    scheduled = [a(StudyInstanceUID=STUDY, ReferencedStudySequence=[], AccessionNumber="A1")]
    dataset = a(PerformedProcedureStepStatus="IN PROGRESS", ScheduledStepAttributesSequence=scheduled, PatientName="Doe^Jane",
                PatientID="P1", PerformedProcedureStepID="1", PerformedStationAETitle="SCANNER", Modality="CT",
                PerformedSeriesSequence=[])  # fmt: skip
    for keyword, value in values.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            dataset.update(a(**{keyword: value}))
    return dataset


class Ward:
    """A node with a scanner and an archive; nothing closes but when it is asked to look."""

    def __init__(self, url: str, folder: Path) -> None:
        prepare_storage(url, folder)
        prepare_engine(url)
        self.storage = open_storage(url, folder)
        self.client = EngineClient(url)
        self.seen = Seen(self.storage)
        registry = self.storage.registry
        for title in ("SCANNER", "ARCHIVE", "OTHER"):
            registry.add_peer(loopback_peer(title, 104))
        enable_stub_package(registry)
        self.route = Route(
            name="r", from_ae_title="*", called_ae_title="*", package="stub", version=None, to_ae_titles=("ARCHIVE",), priority=None,
            quiet_seconds=QUIET, report_refusals=False, early=True,
        )  # fmt: skip
        registry.add_route(self.route)
        self.receiver = Receiver(Settings(node=NodeSection(data=folder), listener=ListenerSection(port=0)), self.storage)
        self.receiver.start()

    def close(self) -> None:
        self.receiver.stop(drain_seconds=0)
        self.client.close()
        self.storage.database.close()

    def create(self, dataset: Dataset, uid: str | None, sop_class: str = MPPS, calling: str = "SCANNER", syntax: str = EXPLICIT) -> Dataset:
        peer = associate(self.receiver.port, [(sop_class, syntax)], calling=calling)
        status, _ = peer.send_n_create(dataset, sop_class, uid)
        peer.release()
        return status

    def set(self, uid: str, dataset: Dataset, calling: str = "SCANNER") -> Dataset:
        peer = associate(self.receiver.port, [(MPPS, EXPLICIT)], calling=calling)
        status, _ = peer.send_n_set(dataset, MPPS, uid)
        peer.release()
        return status

    def end(self, uid: str, state: str, series: dict[str, list[str]]) -> int:
        return int(self.set(uid, a(PerformedProcedureStepStatus=state, PerformedSeriesSequence=performed(series))).Status)

    def send(self, series: str, numbers: range, **values: Any) -> list[str]:
        """Send slices of a series; return their UIDs when the association's end is noted."""
        with association(self.receiver.port, request=association_request(called="DICOMNODE")) as connection:
            uids = []
            for number in numbers:
                dataset = a_dataset(
                    StudyInstanceUID=STUDY, SeriesInstanceUID=series, InstanceNumber=number, FrameOfReferenceUID="1.2.3", RescaleSlope=1,
                    RescaleIntercept=-1024, PixelSpacing=[1, 1], ImagePositionPatient=[0, 0, 2.5 * number],
                    ImageOrientationPatient=[1, 0, 0, 0, 1, 0], **values,
                )  # fmt: skip
                assert connection.store(Image(dataset.SOPInstanceUID, encoded(dataset))).status == 0
                uids.append(str(dataset.SOPInstanceUID))
            connection.release()
        self.storage.index.mark_released([STUDY])  # whatever the receiver's own note takes
        return uids

    def look(self, seconds: float) -> list[Revision]:
        now = datetime.now(UTC)
        return close_complete_studies(
            self.storage, self.client, now + timedelta(seconds=seconds), up_since=now - timedelta(days=1), seen=self.seen
        )  # fmt: skip


@pytest.fixture
def ward(database_url: str, tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(database_url, tmp_path)
    yield ward
    ward.close()


def test_a_step_in_progress_holds_its_study_and_one_completed_says_what_must_be_there(ward: Ward, tmp_path: Path) -> None:
    step = generate_uid()
    assert ward.create(begun(), step).Status == 0
    first = ward.send("1.2.1", range(1, 7))
    assert ward.look(QUIET + 1) == []
    late = [str(generate_uid()), str(generate_uid())]
    assert ward.end(step, "COMPLETED", {"1.2.1": first, "1.2.2": late}) == 0
    assert ward.look(QUIET + 1) == []  # two images are awaited
    dataset = a_dataset(StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.2", SOPInstanceUID=late[0])
    scanner = associate(ward.receiver.port, [(CT, EXPLICIT)])
    assert store(scanner, encoded(dataset), uid=late[0]).Status == 0
    scanner.release()
    assert ward.look(QUIET + 1) == []
    (revision,) = ward.look(QUIET * 6)
    assert revision.incomplete == ("SCANNER names 1 image(s) that aren't here",)
    assert revision.evidence.startswith("incomplete: SCANNER names 1 image(s) that aren't here; quiet for ")
    (noted,) = revision.facts["notices"]
    assert (noted["kind"], noted["ae_title"], noted["state"]) == ("mpps", "SCANNER", "completed")
    assert {series["series_instance_uid"]: (series["images"], series["absent"]) for series in noted["series"]} == {
        "1.2.1": (6, 0), "1.2.2": (2, 1)
    }  # fmt: skip


@on_sqlite
def test_a_study_closes_early_when_all_images_of_a_completed_step_are_here(ward: Ward) -> None:
    step = generate_uid()
    assert ward.create(begun(), step, syntax=IMPLICIT).Status == 0
    images = ward.send("1.2.1", range(1, 7))
    assert ward.look(5) == []
    assert ward.end(step, "COMPLETED", {"1.2.1": images}) == 0
    (revision,) = ward.look(5)
    assert revision.evidence == "association released and all 6 image(s) that SCANNER names are here"
    assert revision.incomplete == ()
    assert len(ward.storage.jobs.jobs(kind="analyse")) == 1


@on_sqlite
def test_what_is_there_of_a_discontinued_step_is_all_and_that_is_said(ward: Ward) -> None:
    step = generate_uid()
    assert ward.create(begun(), step).Status == 0
    ward.send("1.2.1", range(1, 7))
    assert ward.set(step, a(PerformedProcedureStepStatus="DISCONTINUED")).Status == 0
    (revision,) = ward.look(QUIET + 1)
    assert revision.incomplete == ("SCANNER discontinued its procedure step",)
    assert revision.evidence == "incomplete: SCANNER discontinued its procedure step; association released and quiet for 30 s"


@on_sqlite
def test_a_step_that_never_ends_is_waited_for_no_longer_than_absent_images(ward: Ward) -> None:
    assert ward.create(begun(), generate_uid()).Status == 0
    ward.send("1.2.1", range(1, 7))
    assert ward.look(QUIET * 4) == []
    (revision,) = ward.look(QUIET * 6)
    assert revision.incomplete == ("SCANNER has not ended its procedure step",)


def test_what_an_archive_says_is_available_is_put_together_and_awaited(
    ward: Ward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ward.send("1.2.1", range(1, 7))
    absent = str(generate_uid())

    def notify(uids: list[str], **more: str) -> Dataset:
        named = references(uids, InstanceAvailability="ONLINE", RetrieveAETitle="ARCHIVE") + references(
            ["1.2.9"], InstanceAvailability="UNAVAILABLE"
        )
        series = a(SeriesInstanceUID="1.2.1", ReferencedSOPSequence=named)
        dataset = a(StudyInstanceUID=STUDY, ReferencedPerformedProcedureStepSequence=[], ReferencedSeriesSequence=[series])
        return ward.create(dataset, None, IAN, calling="ARCHIVE", **more)  # type: ignore[arg-type]  # a transfer syntax

    assert notify(images[:3], syntax=IMPLICIT).Status == 0
    assert ward.look(5) == []  # of half of them it says nothing
    assert notify([*images[3:], absent]).Status == 0
    assert ward.look(QUIET + 1) == []
    dataset = a_dataset(StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.1", SOPInstanceUID=absent, InstanceNumber=7)
    scanner = associate(ward.receiver.port, [(CT, EXPLICIT)])
    assert store(scanner, encoded(dataset), uid=absent).Status == 0
    scanner.release()
    ward.storage.index.mark_released([STUDY])
    (revision,) = ward.look(5)
    assert revision.evidence == "association released and all 7 image(s) that ARCHIVE names are here"
    (tmp_path / "dicomnode.toml").write_text(
        f'[node]\ndata = "."\n[storage]\ndatabase_url = "{ward.storage.database.engine.url.render_as_string(hide_password=False)}"\n',
        encoding="utf-8",
    )
    capsys.readouterr()
    assert run(["study", "show", STUDY, "--config", str(tmp_path / "dicomnode.toml")]) == 0
    assert "announced" in capsys.readouterr().out


@on_sqlite
def test_a_package_starts_on_a_series_whose_images_a_step_has_named(ward: Ward) -> None:
    ward.storage.registry.add_route(Route(**{**vars(ward.route), "first_series_seconds": 20.0, "early": False}))
    step, other = generate_uid(), generate_uid()
    assert (ward.create(begun(), step).Status, ward.create(begun(), other).Status) == (0, 0)
    images = ward.send("1.2.1", range(1, 7), AcquisitionNumber=1)
    assert ward.look(5) == []
    assert ward.end(step, "COMPLETED", {"1.2.1": images}) == 0
    (revision,) = ward.look(5)  # the other step goes on
    assert (revision.stays_open, revision.series) == (True, ("1.2.1",))
    assert revision.evidence == "series 2 has the 6 image(s) that SCANNER names"


@on_sqlite
def test_each_wrong_message_has_the_status_of_the_standard_and_changes_nothing(ward: Ward) -> None:
    step = generate_uid()
    assert ward.create(begun(), step).Status == 0
    assert ward.create(begun(), step).Status == 0x0111
    wrong: list[tuple[int, Dataset]] = [
        (0x0120, begun(PerformedProcedureStepStatus=None)),
        (0x0121, begun(PerformedProcedureStepStatus="")),
        (0x0106, begun(PerformedProcedureStepStatus="COMPLETED")),
        (0x0106, begun(PerformedProcedureStepStatus="BEGUN")),
        (0x0120, begun(ScheduledStepAttributesSequence=None)),
        (0x0121, begun(ScheduledStepAttributesSequence=[])),
        (0x0120, begun(ScheduledStepAttributesSequence=[a(AccessionNumber="1")])),
        (0x0121, begun(ScheduledStepAttributesSequence=[a(StudyInstanceUID="")])),
        (0x0106, begun(ScheduledStepAttributesSequence=[a(StudyInstanceUID="1.2.x/../..")])),
        (0x0106, begun(PerformedSeriesSequence=performed({"1.2": ["' OR 1=1"]}))),
    ]
    for status, dataset in wrong:
        assert ward.create(dataset, generate_uid()).Status == status, dataset
    assert ward.create(a(StudyInstanceUID=STUDY), None, IAN).Status == 0x0120
    assert ward.create(a(StudyInstanceUID=STUDY, ReferencedSeriesSequence=[]), None, IAN).Status == 0x0121
    assert ward.set(generate_uid(), a(PerformedProcedureStepStatus="COMPLETED")).Status == 0x0112
    assert ward.set(step, a(PerformedProcedureStepStatus="COMPLETED")).Status == 0x0121  # without a series
    assert ward.set(step, a(PerformedProcedureStepStatus="DONE")).Status == 0x0106
    assert ward.set(step, a(PerformedProcedureStepStatus="DISCONTINUED"), calling="OTHER").Status == 0x0124
    (known,) = ward.storage.notices.of_study(STUDY)
    assert (known.sop_instance_uid, known.state, known.images) == (step, "in progress", {})
    assert ward.end(step, "COMPLETED", {"1.2.1": ["1.2.3.4"]}) == 0
    ended = ward.set(step, a(PerformedProcedureStepStatus="DISCONTINUED"))
    assert (ended.Status, ended.ErrorID) == (0x0110, 0xA710)
    assert ended.ErrorComment == "Performed Procedure Step Object may no longer be updated"
    (known,) = ward.storage.notices.of_study(STUDY)
    assert (known.state, known.images) == ("completed", {"1.2.1": ("1.2.3.4",)})


def test_a_step_of_two_studies_counts_for_both_and_who_may_not_send_gets_no_context(ward: Ward) -> None:
    both = [a(StudyInstanceUID=STUDY), a(StudyInstanceUID="1.2.826.0.1.78")]
    assert ward.create(begun(ScheduledStepAttributesSequence=both), None).Status == 0  # who gives it no UID is given one
    (step,) = {notice.sop_instance_uid for study in (STUDY, "1.2.826.0.1.78") for notice in ward.storage.notices.of_study(study)}
    assert ward.set(step, a(PerformedProcedureStepStatus="DISCONTINUED")).Status == 0
    assert [notice.state for notice in ward.storage.notices.of_study("1.2.826.0.1.78")] == ["discontinued"]
    ward.storage.registry.add_peer(
        type(ward.storage.registry.peers()[0])(**{**vars(ward.storage.registry.peers()[0]), "ae_title": "ASKS", "sends": False})
    )
    assert not associate(ward.receiver.port, [(MPPS, EXPLICIT)], calling="ASKS").is_established


@on_sqlite
def test_more_instances_than_a_message_may_name_are_refused_before_they_are_read(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_REFERENCES == 50_000
    monkeypatch.setattr("dicomnode.dimse.performed.MOST_REFERENCES", 3)
    assert ward.create(begun(PerformedSeriesSequence=performed({"1.2": ["1.1", "1.2", "1.3"]})), generate_uid()).Status == 0x0213
    assert ward.storage.notices.of_study(STUDY) == []


def raw_create(ward: Ward, context: str, information: bytes, sop_class: str = MPPS) -> int:
    """Send an N-CREATE request with these bytes on a context; return the status of the answer."""
    peer = associate(ward.receiver.port, [(context, EXPLICIT)])
    request = N_CREATE()
    request.MessageID = 1
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class, generate_uid()
    request.AttributeList = BytesIO(information)
    peer._reactor_checkpoint.clear()
    while not peer._is_paused:
        threading.Event().wait(0.001)
    peer.dimse.send_msg(request, peer.accepted_contexts[0].context_id)
    _, response = peer.dimse.get_msg(block=True)
    peer._reactor_checkpoint.set()
    peer.release()
    return int(response.Status)


@on_sqlite
def test_a_malformed_data_set_and_a_message_outside_its_context_are_refused(ward: Ward) -> None:
    data = encoded(begun(PerformedSeriesSequence=performed({"1.2": ["1.1"]})))
    assert raw_create(ward, MPPS, data[: len(data) // 2]) in {0x0106, 0x0120}
    assert raw_create(ward, MPPS, b"\xff" * 40) in {0x0106, 0x0120}
    assert raw_create(ward, CT, data) == 0x0124
    assert raw_create(ward, IAN, data) == 0x0124
    assert ward.storage.notices.of_study(STUDY) == []
    assert raw_create(ward, MPPS, data) == 0


@on_sqlite
def test_a_failure_of_the_node_is_told_so_that_the_peer_sends_again(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bool:
        raise OSError("no space")

    monkeypatch.setattr(ward.storage.notices, "create", broken)
    assert ward.create(begun(), generate_uid()).Status == 0x0110


def test_what_has_not_changed_for_a_month_is_forgotten(ward: Ward) -> None:
    assert ward.create(begun(), "1.2.3").Status == 0
    with ward.storage.database.writing() as connection:
        connection.execute(text("UPDATE notice SET changed_at = :then"), {"then": "2020-01-01 00:00:00+00:00"})
    assert ward.create(begun(), "1.2.4").Status == 0
    assert [notice.sop_instance_uid for notice in ward.storage.notices.of_study(STUDY)] == ["1.2.4"]
