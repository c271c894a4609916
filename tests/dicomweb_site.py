"""A web role on loopback, and requests to it: for the tests of DICOMweb."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from dicomweb_client.web import DICOMwebClient
from dimse_cases import EXPLICIT, encoded
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID

from dicomnode.config import ListenerSection, NodeSection, Settings, TlsSection, WebSection
from dicomnode.engine import EngineClient
from dicomnode.web.app import Web
from pacs import http_server
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer, Result

PATIENCE_SECONDS = 120
HOST = "127.0.0.1"
RELATED = 'multipart/related; type="application/dicom"; boundary=cut'


@dataclass(frozen=True)
class Site:
    """A web role on loopback, what it stores, and clients of it and of the engine, whose tables only `prepare_engine` makes."""

    web: Web
    storage: Storage
    engine: EngineClient

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.web.port}/dicom-web"

    def client(self, **settings: Any) -> DICOMwebClient:
        return DICOMwebClient(self.url, **settings)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send one request; header names are given with underscores."""
        connection = http.client.HTTPConnection(HOST, self.web.port, timeout=PATIENCE_SECONDS)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.request("GET", f"/dicom-web{path}", **headers)

    def stow(self, *parts: bytes, path: str = "/studies", content_type: str = RELATED) -> tuple[int, dict[str, Any] | str]:
        status, headers, body = self.request("POST", f"/dicom-web{path}", body_of(*parts), Content_Type=content_type)
        return status, json.loads(body) if "json" in headers.get("content-type", "") else body.decode()


def body_of(*parts: bytes, boundary: bytes = b"cut", end: bool = True) -> bytes:
    """A multipart body of DICOM files."""
    delimiter = b"\r\n--" + boundary
    each = b"".join(delimiter + b"\r\nContent-Type: application/dicom\r\n\r\n" + part for part in parts)
    return each + (delimiter + b"--\r\n" if end else b"")


def file_of(dataset: Dataset, syntax: str = EXPLICIT, content: bytes | None = None) -> bytes:
    """A data set as a DICOM file; `content` in place of its bytes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = UID("1.2.3.4")
    buffer = BytesIO()
    pydicom.filewriter.write_file_meta_info(buffer, meta)
    return bytes(128) + b"DICM" + buffer.getvalue() + (content if content is not None else encoded(dataset, syntax))


@contextmanager
def serving(folder: Path, url: str, *peers: Peer, certificates: TlsSection | None = None, **web: Any) -> Iterator[Site]:
    """A web role with these peers and settings."""
    prepare_storage(url, folder)
    storage = open_storage(url, folder)
    for peer in peers:
        storage.registry.add_peer(peer)
    web_section = WebSection(**({"port": 0} | web))
    tls = certificates if certificates is not None else TlsSection()
    client = EngineClient(url)
    role = Web(Settings(node=NodeSection(data=folder), listener=ListenerSection(port=0), web=web_section, tls=tls), storage, client)
    role.start()
    try:
        yield Site(role, storage, client)
    finally:
        role.stop(PATIENCE_SECONDS)
        client.close()
        storage.database.close()


@contextmanager
def deciding(
    judge: Callable[[Dataset], int | None], shows: Callable[[str], int | bool] = lambda _uid: True
) -> Iterator[tuple[str, list[Dataset]]]:
    """A DICOMweb that stores each instance, unless `judge` names a status or a Failure Reason; yield its address and what it stored.

    It shows what it stored if `shows` says so of a SOP Instance UID, or answers with the status that this names.
    """
    stored: list[Dataset] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, the name is the base class's
            """Say nothing."""

        def do_GET(self) -> None:
            uid = self.path.partition("SOPInstanceUID=")[2]
            answered = shows(uid)
            status = answered if not isinstance(answered, bool) else 200
            there = answered is True and uid in {str(dataset.SOPInstanceUID) for dataset in stored}
            answer = json.dumps([{"00080018": {"vr": "UI", "Value": [uid]}}] if there else []).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            dataset = dcmread(BytesIO(body[body.index(b"\r\n\r\n") + 4 : body.rindex(b"\r\n--")]))
            verdict, answer = judge(dataset), b""
            item = {"00081155": {"vr": "UI", "Value": [str(dataset.SOPInstanceUID)]}}
            if verdict is None:
                stored.append(dataset)
                answer = json.dumps({"00081199": {"vr": "SQ", "Value": [item]}}).encode()
            elif verdict not in {400, 415}:
                failed = {**item, "00081197": {"vr": "US", "Value": [verdict]}}
                answer = json.dumps({"00081198": {"vr": "SQ", "Value": [failed]}}).encode()
            self.send_response(200 if verdict is None else verdict if verdict in {400, 415} else 409)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with http_server(Handler) as address:
        yield f"{address}/dicom-web", stored


def keep_as_results(storage: Storage, study_instance_uid: str, *files: bytes) -> None:
    """Close the study's revision and keep these files as what an analysis of it made."""
    study = storage.index.study(study_instance_uid)
    assert study is not None
    seen = study.last_received_at
    headers = [(dcmread(BytesIO(file), stop_before_pixels=True), storage.objects.put(file)) for file in files]
    with storage.database.writing() as connection:
        storage.index.close_revision(connection, study_instance_uid, seen_last_received_at=seen, evidence="the test", outcome="jobs")
        storage.jobs.create(
            connection, key="k", kind="analyse", study_instance_uid=study_instance_uid, revision=1, package="p", version="1", digest="d",
            run=1, priority="routine",
        )  # fmt: skip
        made = [
            Result(
                sop_instance_uid=header.SOPInstanceUID, sop_class_uid=header.SOPClassUID, modality=header.Modality, job_key="k",
                transfer_syntax_uid=header.file_meta.TransferSyntaxUID, study_instance_uid=study_instance_uid, stored=stored,
                created_at=storage.database.now(connection), series_instance_uid=header.SeriesInstanceUID,
                series_number=header.get("SeriesNumber"), series_description=header.get("SeriesDescription"),
                instance_number=header.get("InstanceNumber"),
            ) for header, stored in headers
        ]  # fmt: skip
        storage.jobs.add_results(connection, made)
