"""DICOMweb over a real network connection: what is stored by STOW-RS is found by QIDO-RS and comes back by WADO-RS, byte for byte."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicomweb_client.web import DICOMwebClient
from dimse_cases import BIG_ENDIAN, EXPLICIT, IMPLICIT, JPEG_2000, SEG, a_dataset, encapsulated, encoded, split_part10
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, generate_uid

from dicomnode.admission import hash_passcode
from dicomnode.config import ListenerSection, NodeSection, Settings, WebSection
from dicomnode.web.app import Web
from pacs import free_port, tail, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer

PATIENCE_SECONDS = 120
HOST = "127.0.0.1"
RELATED = 'multipart/related; type="application/dicom"; boundary=cut'


@dataclass(frozen=True)
class Site:
    """A web role on loopback, what it stores, and a client of it."""

    web: Web
    storage: Storage

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
def serving(folder: Path, url: str, *peers: Peer, **web: Any) -> Iterator[Site]:
    prepare_storage(url, folder)
    storage = open_storage(url, folder)
    for peer in peers:
        storage.registry.add_peer(peer)
    web_section = WebSection(**({"port": 0} | web))
    role = Web(Settings(node=NodeSection(data=folder), listener=ListenerSection(port=0), web=web_section), storage)
    role.start()
    try:
        yield Site(role, storage)
    finally:
        role.stop(PATIENCE_SECONDS)
        storage.database.close()


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    with serving(tmp_path, database_url) as made:
        yield made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Site]:
    """A site on SQLite, for what doesn't differ between the databases."""
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}") as made:
        yield made


def with_meta(dataset: Dataset, syntax: str = EXPLICIT) -> Dataset:
    return dcmread(BytesIO(file_of(dataset, syntax)))


def test_what_a_client_stores_it_finds_and_retrieves(site: Site) -> None:
    client = site.client()
    images = [a_dataset(InstanceNumber=n, PatientName="Doe^Jörg=山田^太郎", SpecificCharacterSet="ISO_IR 192") for n in (1, 2, 3)]
    answer = client.store_instances([with_meta(image) for image in images])
    assert {item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence} == {image.SOPInstanceUID for image in images}
    assert answer.RetrieveURL.endswith("/dicom-web/studies/1.2.3.4")
    assert "FailedSOPSequence" not in answer

    (study,) = client.search_for_studies(search_filters={"PatientName": "doe*", "00100020": "P1"})
    assert study["0020000D"]["Value"] == ["1.2.3.4"]
    assert study["00100010"]["Value"] == [{"Alphabetic": "Doe^Jörg", "Ideographic": "山田^太郎"}]
    assert study["00201208"]["Value"] == [3]
    assert study["00080061"]["Value"] == ["CT"]
    (series,) = client.search_for_series("1.2.3.4")
    assert series["00081190"]["Value"] == [f"{site.url}/studies/1.2.3.4/series/1.2.3.4.5"]
    found = client.search_for_instances("1.2.3.4", "1.2.3.4.5", limit=2, offset=1)
    assert [one["00200013"]["Value"] for one in found] == [[2], [3]]
    assert found[0]["00280010"] == {"vr": "US", "Value": [4]}
    assert client.search_for_studies(search_filters={"PatientID": "P2"}) == []

    assert [encoded(back) for back in client.retrieve_study("1.2.3.4")] == [encoded(image) for image in images]
    assert [encoded(back) for back in client.retrieve_series("1.2.3.4", "1.2.3.4.5")] == [encoded(image) for image in images]
    address = "1.2.3.4", "1.2.3.4.5", images[0].SOPInstanceUID
    assert encoded(client.retrieve_instance(*address)) == encoded(images[0])
    assert client.retrieve_instance_frames(*address, [1]) == [images[0].PixelData]
    (metadata, *_) = client.retrieve_study_metadata("1.2.3.4")
    header = Dataset.from_json(metadata, lambda _tag, _vr, uri: bytes(client.retrieve_bulkdata(uri)[0]))
    assert (header.PatientName, header.Rows, header.PixelData) == ("Doe^Jörg=山田^太郎", 4, images[0].PixelData)


def test_objects_come_back_in_the_transfer_syntax_that_was_asked_for(small: Site) -> None:
    implicit, compressed = a_dataset(), a_dataset(PixelData=None, SOPInstanceUID=generate_uid())
    content = encoded(compressed) + encapsulated(b"\xff\x4f\xff\x51frames", offset_table=b"")
    assert small.stow(file_of(implicit, IMPLICIT), file_of(compressed, JPEG_2000, content))[0] == 200
    of = {"implicit": f"/studies/1.2.3.4/series/1.2.3.4.5/instances/{implicit.SOPInstanceUID}"}
    of["compressed"] = f"/studies/1.2.3.4/series/1.2.3.4.5/instances/{compressed.SOPInstanceUID}"
    for which, accept, status, syntax in (
        ("implicit", "application/dicom", 200, EXPLICIT),
        ("implicit", "application/dicom; transfer-syntax=*", 200, IMPLICIT),
        ("implicit", f"application/dicom; transfer-syntax={IMPLICIT}", 200, IMPLICIT),
        ("implicit", f"application/dicom; transfer-syntax={JPEG_2000}", 406, ""),
        (
            "implicit",
            f'application/dicom; transfer-syntax="{JPEG_2000}";q=0.9, application/dicom;transfer-syntax={EXPLICIT};q=0.5',
            200,
            EXPLICIT,
        ),
        ("compressed", "application/dicom", 200, JPEG_2000),
        ("compressed", "*/*;q=0.1, application/dicom;q=0.2", 200, JPEG_2000),
        ("compressed", f"application/dicom; transfer-syntax={EXPLICIT}", 406, ""),
        ("compressed", "application/dicom+xml", 406, ""),
        ("compressed", "nonsense", 400, ""),
    ):
        got, headers, body = small.get(of[which], Accept=accept)
        assert got == status, (which, accept, body)
        if status != 200:
            assert body.count(b"\n") == 1
            continue
        assert headers["content-type"] == f"application/dicom; transfer-syntax={syntax}"
        back = dcmread(BytesIO(body))
        assert (back.file_meta.TransferSyntaxUID, back.SOPInstanceUID) == (
            syntax,
            (implicit if which == "implicit" else compressed).SOPInstanceUID,
        )
        if syntax in {IMPLICIT, JPEG_2000}:
            assert split_part10(body)[1] == (encoded(implicit, IMPLICIT) if which == "implicit" else content)
        else:
            assert encoded(back) == encoded(implicit)
    parts = 'multipart/related; type="application/dicom"'
    assert small.get("/studies/1.2.3.4", Accept=f"{parts}; transfer-syntax=*")[0] == 200
    assert small.get("/studies/1.2.3.4", Accept=f"{parts}; transfer-syntax={EXPLICIT}")[0] == 206, "without the compressed image"
    assert small.get("/studies/1.2.3.4", Accept="application/dicom")[0] == 406, "a study is no single part"
    assert small.get("/studies/1.2.3.5")[0] == 404
    assert small.get(f"{of['implicit']}/rendered", Accept="image/png")[0] == 406


def test_frames_come_as_they_are_stored(small: Site) -> None:
    words = a_dataset(NumberOfFrames=3, PixelData=bytes(range(144)))
    bits = a_dataset(
        SEG,
        Rows=3,
        Columns=3,
        NumberOfFrames=3,
        BitsAllocated=1,
        BitsStored=1,
        HighBit=0,
        PixelData=bytes([0b10101011, 0b1, 0b11111110, 0b11]),
    )
    turned = a_dataset(PixelData=bytes(range(48)))
    packed = a_dataset(PixelData=None, NumberOfFrames=2)
    content = encoded(packed) + encapsulated(b"\xff\x4f\xff\x51 1", b"\xff\x4f\xff\x51 2")
    files = file_of(words), file_of(bits), file_of(turned, BIG_ENDIAN), file_of(packed, JPEG_2000, content)
    assert small.stow(*files)[0] == 200
    client = small.client()

    def frames(dataset: Dataset, numbers: list[int], **arguments: Any) -> list[bytes]:
        return client.retrieve_instance_frames("1.2.3.4", "1.2.3.4.5", dataset.SOPInstanceUID, numbers, **arguments)

    assert frames(words, [1, 3]) == [bytes(range(48)), bytes(range(96, 144))]
    assert frames(bits, [1, 2, 3]) == [bytes([0b10101011, 1]), bytes([0b00000000, 1]), bytes([0b11111111, 0])]
    assert frames(turned, [1]) == [bytes(n ^ 1 for n in range(48))], "octets are little endian"
    assert frames(packed, [2, 1], media_types=("image/jp2",)) == [b"\xff\x4f\xff\x51 2", b"\xff\x4f\xff\x51 1"]
    place = f"/studies/1.2.3.4/series/1.2.3.4.5/instances/{packed.SOPInstanceUID}/frames"
    for path, accept, status in (
        ("/1", 'multipart/related; type="application/octet-stream"; transfer-syntax=*', 200),
        ("/1", 'multipart/related; type="application/octet-stream"', 406),
        ("/1", "image/jp2", 200),
        ("/1,2", "image/jp2", 406),
        ("/1", "image/jpeg", 406),
        ("/3", "*/*", 404),
        ("/0", "*/*", 400),
        ("/1,x", "*/*", 400),
        ("/1,,2", "*/*", 400),
        ("/99999999999999999999", "*/*", 400),
    ):
        got, _, body = small.get(place + path, Accept=accept)
        assert got == status, (path, accept, body)
    assert small.get(f"{place}/1", Accept="image/jp2")[1]["content-type"] == f"image/jp2; transfer-syntax={JPEG_2000}"
    assert client.retrieve_bulkdata(f"{small.url}{place.removesuffix('/frames')}/bulkdata/7FE00010") == [
        b"\xff\x4f\xff\x51 1",
        b"\xff\x4f\xff\x51 2",
    ]


def test_metadata_says_what_the_header_says_and_survives_what_is_malformed(small: Site) -> None:
    item = Dataset()
    item.add_new(0x00283006, "OW", bytes(range(256)) * 8)
    item.LUTExplanation = "Größe"
    image = a_dataset(SpecificCharacterSet="ISO_IR 100", ModalityLUTSequence=[item], ImageComments="Ä")
    image.add_new(0x00189073, "FD", float("nan"))
    image.add_new(0x00091010, "OB", b"ab")
    image.add_new(0x00281052, "DS", "-1024")
    content = encoded(image).replace(b"-1024 ", b"nonsen")
    assert small.stow(file_of(image, content=content))[0] == 200
    place = f"/studies/1.2.3.4/series/1.2.3.4.5/instances/{image.SOPInstanceUID}"
    status, headers, body = small.get(f"{place}/metadata", Accept="application/dicom+json")
    assert (status, headers["content-type"]) == (200, "application/dicom+json")
    (made,) = json.loads(body)
    assert made["00204000"] == {"vr": "LT", "Value": ["Ä"]}
    assert made["00080005"]["Value"] == ["ISO_IR 192"]
    assert made["00189073"] == {"vr": "FD", "Value": ["NaN"]}
    assert made["00091010"] == {"vr": "OB", "InlineBinary": base64.b64encode(b"ab").decode()}
    assert made["00281052"] == {"vr": "DS"}, "a malformed value counts as absent"
    assert made["00083002"]["Value"] == [EXPLICIT]
    (lut,) = made["00283000"]["Value"]
    assert lut["00283003"]["Value"] == ["Größe"]
    assert lut["00283006"]["BulkDataURI"] == f"{small.url}{place}/bulkdata/00283000.0.00283006"
    (value,) = small.client().retrieve_bulkdata(lut["00283006"]["BulkDataURI"])
    assert value == bytes(range(256)) * 8
    for name in ("00283000.1.00283006", "00283000.-2.00283006", "00283000", "00100010", "7FE00020", "x", "..%2f..%2fetc%2fpasswd"):
        assert small.get(f"{place}/bulkdata/{name}")[0] == 404, name


def test_searches_say_what_they_could_not_do(small: Site) -> None:
    assert small.get("/studies")[0] == 204
    assert (
        small.stow(
            *(file_of(a_dataset(StudyInstanceUID=f"1.2.{n}", SeriesInstanceUID=f"1.2.{n}.1", PatientID=f"P{n}")) for n in range(1, 6))
        )[0]
        == 200
    )

    def search(query: str, path: str = "/studies") -> tuple[list[Any], list[str]]:
        status, headers, body = small.get(f"{path}?{query}")
        assert status in {200, 204}, (query, body)
        return [one["00100020"]["Value"][0] for one in json.loads(body or b"[]")], [headers.get("warning", "")]

    assert search("limit=2&offset=1") == (["P2", "P3"], ['299 dicomnode "There are more results that can be requested by offset."'])
    assert search("StudyInstanceUID=1.2.1,1.2.4") == (["P1", "P4"], [""])
    assert search("0020000D=1.2.5&includefield=all", "/instances") == (["P5"], [""])
    assert search("PatientID=P3&includefield=00081030,Manufacturer")[1] == [
        '299 dicomnode "The following attributes are not known at this level: Manufacturer"'
    ]
    assert "literal matching" in search("PatientName=doe*&fuzzymatching=true")[1][0]
    ignored = search("PatientID=P1&PatientComments=x")
    assert ignored == (["P1"], ['299 dicomnode "The following parameters are not matched and were ignored: PatientComments"'])
    for query in (
        "NoSuchThing=1",
        "00000001=x&limit=-1",
        "limit=ten",
        "offset=1.5",
        "StudyDate=yesterday",
        "StudyInstanceUID=../..",
        "PatientID=1&PatientID=2",
        "includefield=Nothing",
    ):
        status, headers, body = small.get(f"/studies?{query}")
        assert (status, body.count(b"\n")) == (400, 1), (query, body)
        assert headers["content-type"].startswith("text/plain")
    assert small.get("/studies", Accept="application/dicom+xml")[0] == 406
    assert small.get("/studies/none/series")[0] == 400
    assert small.get("/studies/..%2f..%2f..%2fetc%2fpasswd")[0] == 404


def test_each_instance_is_answered_for_itself(small: Site) -> None:
    good, other, text = a_dataset(), a_dataset(StudyInstanceUID="1.2.9"), a_dataset("1.2.3")
    uncommon = file_of(a_dataset(), "1.2.840.10008.1.2.4.999")
    short = a_dataset(PixelData=bytes(20))
    lying = file_of(a_dataset(SOPInstanceUID="1.2.77"), content=encoded(a_dataset(SOPInstanceUID="1.2.78")))
    status, answer = small.stow(
        file_of(good), file_of(other), file_of(text), uncommon, file_of(short), lying, b"no DICOM", path="/studies/1.2.3.4"
    )
    assert status == 202
    assert isinstance(answer, dict)
    assert [item["00081155"]["Value"] for item in answer["00081199"]["Value"]] == [[good.SOPInstanceUID]]
    failed = {item["00081155"]["Value"][0]: item["00081197"]["Value"][0] for item in answer["00081198"]["Value"]}
    assert failed == {
        other.SOPInstanceUID: 0xC005,
        text.SOPInstanceUID: 0x0122,
        dcmread(BytesIO(uncommon), stop_before_pixels=True, force=True).file_meta.MediaStorageSOPInstanceUID: 0xC122,
        short.SOPInstanceUID: 0xC002,
        "1.2.77": 0xA900,
    }
    assert answer["0008119A"]["Value"] == [{"00081197": {"vr": "US", "Value": [0xC001]}}]
    assert small.stow(file_of(good))[0] == 200, "a duplicate is no work and no failure"
    good.PatientID = "P2"
    status, answer = small.stow(file_of(good))
    assert (status, answer["00081198"]["Value"][0]["00081197"]["Value"]) == (409, [0xC003])  # type: ignore[index]
    assert [instance.stored.size for instance in small.storage.index.instances("1.2.3.4")] == [len(encoded(good)) + instance_meta(small)]
    assert {refused.dimse_status for refused in small.storage.index.quarantined()} == {0xC005, 0xC002, 0xA900, 0xC003}
    small.storage.objects._reserve_bytes = 2**62
    status, answer = small.stow(file_of(a_dataset()))
    assert (status, answer) == (503, "The node can store nothing now; send again later.\n")


def instance_meta(site: Site) -> int:
    (instance,) = site.storage.index.instances("1.2.3.4")
    return len(split_part10(site.storage.objects.read(instance.stored.object_id))[0])


def test_a_study_that_came_by_http_is_one_that_its_association_has_released(small: Site) -> None:
    assert small.stow(file_of(a_dataset()))[0] == 200

    def released() -> bool:
        study = small.storage.index.study("1.2.3.4")
        return study is not None and study.released_at is not None

    wait_until(released, seconds=PATIENCE_SECONDS, what="the study to be released")
    assert small.storage.index.callers("1.2.3.4") == [("DICOMWEB", "DICOMNODE")]


BAD_BODIES = (
    (body_of(b"x", end=False), RELATED, 400),
    (b"", RELATED, 400),
    (b"--cut--", RELATED, 400),
    (b"no boundary at all" * 10000, RELATED, 400),
    (b"\r\n--cut\r\nno header\r\n\r\nx\r\n--cut--", RELATED, 400),
    (b"\r\n--cut\r\nA: " + b"x" * 20000 + b"\r\n\r\nx\r\n--cut--", RELATED, 400),
    (b"\r\n--cut and more\r\n\r\nx\r\n--cut--", RELATED, 400),
    (b"\r\n--cut\r\nContent-Type: text/html\r\n\r\nx\r\n--cut--", RELATED, 415),
    (b"\r\n--cut\r\nContent-Type: application/dicom+json\r\n\r\n[]\r\n--cut--", RELATED, 415),
    (body_of(b"x"), 'multipart/related; type="application/dicom"', 400),
    (body_of(b"x"), f'multipart/related; type="application/dicom"; boundary="{"x" * 71}"', 400),
    (body_of(b"x"), "multipart/form-data; boundary=cut", 415),
    (body_of(b"x"), 'multipart/related; type="application/dicom+json"; boundary=cut', 415),
    (b"{}", "application/json", 415),
    (b"{}", ";;;", 415),
)


def test_bad_requests_get_a_sentence_and_lose_nothing(small: Site) -> None:
    whole = a_dataset()
    for body, content_type, status in BAD_BODIES:
        got, _, said = small.request("POST", "/dicom-web/studies", body, Content_Type=content_type)
        assert (got, said.count(b"\n")) == (status, 1), (body[:60], content_type, said)
        assert b"Traceback" not in said
    got, _, said = small.request(
        "POST", "/dicom-web/studies", body_of(file_of(whole), file_of(a_dataset())[:-30], end=False), Content_Type=RELATED
    )
    assert (got, said) == (400, b"The request can't be read: the body ends before its last boundary.\n")
    assert [instance.sop_instance_uid for instance in small.storage.index.instances("1.2.3.4")] == [whole.SOPInstanceUID]
    assert not list((small.web._reception.storage.objects.path("0" * 32).parents[2] / "incoming").rglob("*.part")), (
        "no unfinished file stays"
    )
    with suppress(OSError):  # it may be reset before the answer is read
        assert small.request("GET", "/dicom-web/studies", X="y" * 3_000_000)[0] == 400
    assert small.request("DELETE", "/dicom-web/studies/1.2.3.4")[0] == 405
    assert small.request("GET", "/")[0] == 404
    assert small.request("GET", "/health")[0] == 200


def test_beyond_its_deadlines_and_limits_a_request_ends(tmp_path: Path) -> None:
    limits = {"header_seconds": 0.3, "network_timeout_seconds": 0.5, "maximum_request_bytes": 5000, "maximum_connections": 3}
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", **limits) as site:
        assert (
            site.stow(file_of(a_dataset(Rows=100, PixelData=bytes(1200))), file_of(a_dataset(Rows=1000, PixelData=bytes(12000))))[0] == 413
        )
        head = f"POST /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\nContent-Type: {RELATED}\r\nContent-Length: 100\r\n\r\n".encode()
        for sent, answer in ((b"", b""), (b"GET / HT", b""), (head, b"HTTP/1.1 408"), (head + b"--cut", b"HTTP/1.1 408")):
            with socket.create_connection((HOST, site.web.port), timeout=PATIENCE_SECONDS) as connection:
                connection.sendall(sent)
                said = b""
                try:
                    while more := connection.recv(4096):
                        said += more
                except ConnectionResetError:
                    pass
                assert said.startswith(answer), (sent, said)
                assert bool(said) == bool(answer)
        waiting = [socket.create_connection((HOST, site.web.port), timeout=PATIENCE_SECONDS) for _ in range(3)]
        for connection in waiting:
            connection.sendall(head)
        statuses = []
        while 503 not in statuses and len(statuses) < 20:
            statuses.append(site.get("/studies")[0])
        assert 503 in statuses
        for connection in waiting:
            connection.close()
        assert site.storage.index.studies() == [] or site.storage.index.study("1.2.3.4") is not None


def a_peer(ae_title: str, passcode: str | None = None, **values: Any) -> Peer:
    known = {"sends": True, "receives": False, "tls": False, "client_cert": None, "host": HOST, "port": 104}
    return Peer(ae_title=ae_title, passcode_hash=hash_passcode(passcode) if passcode else None, **(known | values))


def basic(user: str, passcode: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{passcode}'.encode()).decode()}"


def test_who_is_no_known_peer_gets_nothing_where_credentials_are_asked_for(tmp_path: Path) -> None:
    peers = (
        a_peer("MODALITY", "s3cret", queries=False),
        a_peer("VIEWER", "pässword", user="reader", sends=False, receives=True),
        a_peer("ELSEWHERE", "s3cret", networks=("192.0.2.0/24",)),
        a_peer("OPEN"),
    )
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", *peers, credentials=True) as site:
        image = body_of(file_of(a_dataset()))

        def asked(header: str | None) -> tuple[int, int]:
            named = {} if header is None else {"Authorization": header}
            stored = site.request("POST", "/dicom-web/studies", image, Content_Type=RELATED, **named)[0]
            return stored, site.get("/studies", **named)[0]

        for header in (
            None,
            "Basic",
            "Basic !",
            "Bearer x",
            basic("MODALITY", "wrong"),
            basic("VIEWER", "pässword"),
            basic("ELSEWHERE", "s3cret"),
            basic("OPEN", ""),
            basic("NOBODY", "x"),
        ):
            assert asked(header) == (401, 401), header
        assert site.get("/studies")[1]["www-authenticate"].startswith("Basic ")
        assert asked(basic("reader", "pässword")) == (403, 204)
        for _ in range(2):  # the second time from memory
            assert asked(basic("MODALITY", "s3cret")) == (200, 403)
        assert site.storage.index.callers("1.2.3.4") == [("MODALITY", "DICOMNODE")]
        site.storage.registry.add_peer(a_peer("MODALITY", "changed"))
        assert asked(basic("MODALITY", "s3cret")) == (401, 401), "a changed passcode holds from the next request on"
        assert site.get("/studies", Authorization=basic("reader", "pässword"))[0] == 200
        assert site.request("GET", "/health")[0] == 200


def test_a_page_of_another_name_cannot_ask_the_node_of_its_reader(small: Site) -> None:
    assert small.get("/studies", Host="rebound.example")[0] == 403
    assert small.get("/studies", Host=f"LOCALHOST:{small.web.port}")[0] == 204
    assert "access-control-allow-origin" not in small.get("/studies", Origin="https://elsewhere.example")[1]


def test_pages_of_known_origins_may_ask(tmp_path: Path) -> None:
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", origins=("https://ohif.example",)) as site:
        assert site.get("/studies", Origin="https://ohif.example")[1]["access-control-allow-origin"] == "https://ohif.example"
        assert "access-control-allow-origin" not in site.get("/studies", Origin="https://elsewhere.example")[1]


RUN_WEB = """
import os, sys, threading
sys.argv = ["dicomnode", "run", "web"]
from dicomnode.cli import node
started = node._start_web
def start(*arguments):
    stop = started(*arguments)
    print("LOADED", sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "monai", "highdicom"}), flush=True)
    return stop
node._start_web = start
from dicomnode.cli import main
main()
"""


def test_the_role_runs_by_itself_loads_no_network_and_drains(tmp_path: Path) -> None:
    port = free_port()
    configuration = tmp_path / "dicomnode.toml"
    configuration.write_text(f"[web]\nport = {port}\n[listener]\nport = {free_port()}\n", encoding="utf-8")
    log = tmp_path / "web.log"
    with log.open("wb") as output:
        command = [sys.executable, "-c", RUN_WEB]
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "DICOMNODE_CONFIG": str(configuration)})
    try:

        def up() -> bool:
            assert process.poll() is None, tail(log)
            connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE_SECONDS)
            with closing(connection), suppress(OSError):
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            return False

        wait_until(up, seconds=PATIENCE_SECONDS, what="the web role to listen", log=log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0, tail(log)
    finally:
        process.kill()
        process.wait()
    assert "LOADED []" in log.read_text(encoding="utf-8")
