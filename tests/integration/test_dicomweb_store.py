"""STOW-RS over a real network connection: each instance is answered for itself, and bad requests lose nothing."""

from __future__ import annotations

import socket
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from dimse_cases import a_dataset, encoded, split_part10
from pydicom import dcmread

from dicomweb_site import HOST, PATIENCE_SECONDS, RELATED, Site, body_of, file_of, serving
from pacs import wait_until


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
    (body_of(b"x"), f'multipart/related; type="application/dicom"; boundary="{"x" * 201}"', 400),
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
