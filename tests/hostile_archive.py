"""A PACS that is asked for what it holds and does what a test tells it: the truth, too much, something else, half of it, or nothing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dimse_cases import CT, EXPLICIT, IMPLICIT, SEG, a_dataset, closing_connections, keep_connection
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pynetdicom import AE, evt
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.dimse.contexts import STUDY_ROOT_FIND, STUDY_ROOT_GET, STUDY_ROOT_MOVE
from dicomnode.dimse.find import query
from storage.records import Peer

PATIENCE = 120.0  # seconds: a busy machine takes its time
PENDING = 0xFF00
Sending = Callable[["Archive", list[Dataset], Any], Iterator[tuple[int, Any]]]


class Archive:
    """Holds `images`, and answers with `studies` and `series` where a test sets them. `sending` does the sub-operations."""

    def __init__(self, *, gets: bool = True, moves: bool = True) -> None:
        self.images: list[Dataset] = []
        self.studies: list[Dataset] | None = None
        self.series: list[Dataset] | None = None
        self.asked: list[Dataset] = []  # identifiers of queries
        self.retrieved: list[tuple[str, Dataset]] = []  # service and identifier of retrievals
        self.cancelled = threading.Event()  # a retrieval was
        self._heard = False
        self.answers = threading.Event()  # queries wait for this
        self.answers.set()
        self.goes_on = threading.Event()  # what is sent in parts waits for this
        self.status = 0x0000  # at the end of a query
        self.endless = False  # a query has no end
        self.sending: Sending = all_of
        self.node_port = 0  # where a C-MOVE goes; 0: it knows no destination
        self.entity: Any = AE("PACS")
        self.entity.acse_timeout = self.entity.dimse_timeout = self.entity.network_timeout = PATIENCE
        for model in [STUDY_ROOT_FIND] + [STUDY_ROOT_GET] * gets + [STUDY_ROOT_MOVE] * moves:
            self.entity.add_supported_context(model)
        for sop_class in (CT, SEG):
            self.entity.add_supported_context(sop_class, [EXPLICIT, IMPLICIT], scu_role=True, scp_role=True)
        for sop_class in (CT, SEG):
            self.entity.add_requested_context(sop_class, [EXPLICIT])
        handlers = [
            (evt.EVT_CONN_OPEN, keep_connection), (evt.EVT_C_FIND, self._find), (evt.EVT_C_MOVE, self._move), (evt.EVT_C_GET, self._get),
        ]  # fmt: skip
        self.server: Any = self.entity.make_server(("127.0.0.1", 0), evt_handlers=handlers, server_class=ThreadedAssociationServer)
        self.entity._servers.append(self.server)

    def peer(self, **values: Any) -> Peer:
        """The archive as the node's registry names it."""
        known = {"sends": True, "receives": False, "tls": False, "client_cert": None}
        return Peer(ae_title="PACS", host="127.0.0.1", port=self.server.server_address[1], **{**known, **values})

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        self.asked.append(asked)
        self.answers.wait(PATIENCE)
        answers = {"STUDY": self._studies, "SERIES": self._series, "IMAGE": self._instances}[asked.QueryRetrieveLevel](asked)
        for answer in answers:
            yield PENDING, answer
        while self.endless and not event.is_cancelled:
            yield PENDING, answers[0]
        if self.status:
            yield self.status, None

    def _studies(self, _asked: Dataset) -> list[Dataset]:
        if self.studies is not None:
            return self.studies
        of = {str(image.StudyInstanceUID): image for image in self.images}
        return [
            query("STUDY", StudyInstanceUID=uid, StudyDate=image.StudyDate, StudyTime="080000", PatientID="P1", ModalitiesInStudy="CT")
            for uid, image in of.items()
        ]  # fmt: skip

    def _series(self, asked: Dataset) -> list[Dataset]:
        if self.series is not None:
            return self.series
        mine = [image for image in self.images if image.StudyInstanceUID == asked.StudyInstanceUID]
        counts = Counter((str(image.SeriesInstanceUID), str(image.Modality), str(image.get("BodyPartExamined", ""))) for image in mine)
        return [
            query("SERIES", StudyInstanceUID=asked.StudyInstanceUID, SeriesInstanceUID=uid, Modality=modality,
                  NumberOfSeriesRelatedInstances=count, BodyPartExamined=part)
            for (uid, modality, part), count in counts.items()
        ]  # fmt: skip

    def _instances(self, asked: Dataset) -> list[Dataset]:
        return [
            query("IMAGE", StudyInstanceUID=image.StudyInstanceUID, SeriesInstanceUID=image.SeriesInstanceUID,
                  SOPInstanceUID=image.SOPInstanceUID, SOPClassUID=image.SOPClassUID)
            for image in self._matching(asked)
        ]  # fmt: skip

    def _matching(self, asked: Dataset) -> list[Dataset]:
        wanted = asked.get("SOPInstanceUID") or []
        uids = {str(uid) for uid in ([wanted] if isinstance(wanted, str) else wanted)}
        return [
            image
            for image in self.images
            if image.SeriesInstanceUID == asked.SeriesInstanceUID and (not uids or str(image.SOPInstanceUID) in uids)
        ]

    def _move(self, event: Any) -> Iterator[Any]:
        self.retrieved.append(("move", event.identifier))
        if not self.node_port:
            yield None, None
            return
        yield "127.0.0.1", self.node_port
        yield from self._sent(event)

    def _get(self, event: Any) -> Iterator[Any]:
        self.retrieved.append(("get", event.identifier))
        yield from self._sent(event)

    def hears_cancel(self, event: Any) -> bool:
        """Whether the retrieval that runs was cancelled: pynetdicom says so once."""
        if event.is_cancelled:
            self._heard = True
            self.cancelled.set()
        return self._heard

    def _sent(self, event: Any) -> Iterator[Any]:
        self._heard = False
        matching = self._matching(event.identifier)
        yield max(len(matching), 1) if self.sending is all_of else 60_000
        for one in self.sending(self, matching, event):
            if self.sending is not pending_for_ever and self.hears_cancel(event):
                yield 0xFE00, None
                return
            yield one
        if self.sending is not all_of:
            yield 0x0000, None


def an_image(study: str, number: int, **values: Any) -> Dataset:
    """A CT image of an earlier study of the patient."""
    series = f"{study}.1"
    dataset = a_dataset(**{
        "StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": f"{series}.{number}", "StudyDate": "20251231",
        "InstanceNumber": number, **values,
    })  # fmt: skip
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = EXPLICIT
    return dataset


# What an archive does of what it is asked to send.


def all_of(_archive: Archive, images: Sequence[Dataset], _event: Any) -> Iterator[tuple[int, Any]]:
    """Send what was asked for."""
    for image in images:
        yield PENDING, image


def of_another_patient(_archive: Archive, images: Sequence[Dataset], _event: Any) -> Iterator[tuple[int, Any]]:
    """Send images of the study that name somebody else."""
    for image in images:
        yield PENDING, an_image(str(image.StudyInstanceUID), int(image.InstanceNumber), PatientID="P2")


def of_another_study(_archive: Archive, images: Sequence[Dataset], _event: Any) -> Iterator[tuple[int, Any]]:
    """Send images of a study that nobody asked for."""
    for image in images:
        yield PENDING, an_image("1.2.3.999", int(image.InstanceNumber))


def with_wrong_uids(_archive: Archive, images: Sequence[Dataset], _event: Any) -> Iterator[tuple[int, Any]]:
    """Send images that name no study."""
    for image in images:
        yield PENDING, an_image(str(image.StudyInstanceUID), int(image.InstanceNumber), StudyInstanceUID="")


def ever_more(_archive: Archive, images: Sequence[Dataset], _event: Any) -> Iterator[tuple[int, Any]]:
    """Send images of the study without end."""
    for number in range(1, 59_000):
        yield PENDING, an_image(str(images[0].StudyInstanceUID), number)


def pending_for_ever(archive: Archive, _images: Sequence[Dataset], event: Any) -> Iterator[tuple[int, Any]]:
    """Send nothing but responses that say that there is more to come, also once it is cancelled."""
    while event.assoc.is_established and not archive.goes_on.wait(0.02):
        yield PENDING, "no data set"


def half_and_abort(_archive: Archive, images: Sequence[Dataset], event: Any) -> Iterator[tuple[int, Any]]:
    """Send the first image, and abort."""
    yield PENDING, images[0]
    event.assoc.abort()
    yield PENDING, images[-1]


def half_and_wait(archive: Archive, images: Sequence[Dataset], event: Any) -> Iterator[tuple[int, Any]]:
    """Send the first image, and the rest when it may, unless it is cancelled before."""
    yield PENDING, images[0]
    while event.assoc.is_established and not archive.hears_cancel(event) and not archive.goes_on.wait(0.02):
        pass
    for image in images[1:]:
        yield PENDING, image


def silence(archive: Archive, _images: Sequence[Dataset], _event: Any) -> Iterator[tuple[int, Any]]:
    """Answer nothing at all."""
    archive.goes_on.wait(PATIENCE)
    yield 0xA702, None


@contextmanager
def running(archive: Archive) -> Iterator[Archive]:
    """Let an archive be asked."""
    with closing_connections():
        threading.Thread(target=archive.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield archive
        finally:
            archive.answers.set()
            archive.goes_on.set()
            archive.server.shutdown()
            archive.entity.shutdown()
