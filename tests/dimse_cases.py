"""Data sets and DIMSE requests that the tests of the receiver and of the sender make."""

from __future__ import annotations

import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.presentation import build_context

from dicomnode.dimse.scp import ReceivedInstance
from dicomnode.dimse.scu import keep_responses

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
HEVC = "1.2.840.10008.1.2.4.107"
CT = "1.2.840.10008.5.1.4.1.1.2"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

_CONNECTIONS: list[socket.socket] = []


def a_dataset(sop_class: str = CT, **attributes: Any) -> Dataset:
    """A small CT image with 4 rows of 6 columns of 16 bits, changed by `attributes`; None takes an attribute away."""
    dataset = Dataset()
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyDate = "20260102"
    dataset.AccessionNumber = "A1"
    dataset.Modality = "CT"
    dataset.PatientName = "Doe^Jane"
    dataset.PatientID = "P1"
    dataset.StudyInstanceUID = "1.2.3.4"
    dataset.SeriesInstanceUID = "1.2.3.4.5"
    dataset.SeriesNumber = 2
    dataset.InstanceNumber = 7
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = 4
    dataset.Columns = 6
    dataset.BitsAllocated = 16
    dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = bytes(48)
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW"
    return dataset


def encoded(dataset: Dataset, syntax: str = EXPLICIT) -> bytes:
    """The data set's bytes in a transfer syntax, without file meta information."""
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = syntax == IMPLICIT
    buffer.is_little_endian = syntax != BIG_ENDIAN
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def deflated(data: bytes, level: int = 6) -> bytes:
    """Bytes as a raw deflate stream (PS3.5 A.5)."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def encapsulated(*fragments: bytes, offset_table: bytes = b"", delimiter: bool = True) -> bytes:
    """A Pixel Data element of undefined length in Explicit VR Little Endian (PS3.5 A.4)."""
    items = b"".join(b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in (offset_table, *fragments))
    return b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff" + items + (b"\xfe\xff\xdd\xe0\x00\x00\x00\x00" if delimiter else b"")


def received(data: bytes, *, uid: str, sop_class: str = CT, syntax: str = EXPLICIT, context: str | None = None) -> ReceivedInstance:
    """A C-STORE request that declares this."""
    return ReceivedInstance(
        association=1,
        calling_ae_title="SCANNER",
        called_ae_title="DICOMNODE",
        context_sop_class_uid=context or sop_class,
        sop_class_uid=sop_class,
        sop_instance_uid=uid,
        transfer_syntax_uid=syntax,
        dataset=data,
    )


def split_part10(content: bytes) -> tuple[bytes, bytes]:
    """A Part 10 file as (up to the end of the file meta information, the data set)."""
    assert content[128:132] == b"DICM"
    end = 144 + int.from_bytes(content[140:144], "little")
    return content[:end], content[end:]


@contextmanager
def closing_connections() -> Iterator[None]:
    """Close the sockets of `keep_connection` at the end: pynetdicom forgets one open if the other side was faster."""
    yield
    while _CONNECTIONS:
        _CONNECTIONS.pop().close()


def keep_connection(event: Any) -> None:
    """Handle EVT_CONN_OPEN of a simulated scanner or PACS."""
    _CONNECTIONS.append(event.assoc.dul.socket.socket)


def associate(port: int, pairs: list[tuple[str, str]], *, calling: str = "SCANNER", called: str = "DICOMNODE") -> Any:
    """An association of a simulated scanner."""
    handlers = [(evt.EVT_CONN_OPEN, keep_connection)]
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 120
    association = entity.associate(
        "127.0.0.1", port, contexts=[build_context(*pair) for pair in pairs], ae_title=called, evt_handlers=handlers
    )
    keep_responses(association)
    return association


def answer_to_request(port: int, pairs: list[tuple[str, str]], *, calling: str = "SCANNER", called: str = "DICOMNODE") -> bytes:
    """The PDU that answers an association request; a pynetdicom requestor takes a rejection that comes at once for an abort."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = calling, called
    maximum_length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    maximum_length.maximum_length_received = 16384
    implementation.implementation_class_uid = "1.2.3"
    primitive.user_information = [maximum_length, implementation]
    contexts = [build_context(*pair) for pair in pairs]
    for number, context in enumerate(contexts):
        context.context_id = 2 * number + 1
    primitive.presentation_context_definition_list = contexts
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection, connection.makefile("rb") as reader:
        connection.sendall(A_ASSOCIATE_RQ(primitive).encode())
        header = reader.read(6)
        return header + reader.read(int.from_bytes(header[2:], "big"))


def store(association: Any, data: bytes | None, *, uid: str, sop_class: str = CT, syntax: str = EXPLICIT) -> Dataset:
    """Send bytes as the data set of a C-STORE request, whatever they are, and return the response's status."""
    request = C_STORE()
    request.MessageID = 1
    request.Priority = 2
    request.AffectedSOPClassUID = sop_class
    request.AffectedSOPInstanceUID = uid
    if data is not None:
        request.DataSet = BytesIO(data)
    context = next(c for c in association.accepted_contexts if c.transfer_syntax[0] == syntax)
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.0005)
    association.dimse.send_msg(request, context.context_id)
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    assert response is not None, "the receiver did not answer"
    status = Dataset()
    status.Status = response.Status
    status.ErrorComment = response.ErrorComment or ""
    return status
