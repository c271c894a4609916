"""STOW-RS over a real network connection: each instance is answered for itself, and bad requests lose nothing."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
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


HEAD = f"POST /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\nContent-Type: {RELATED}\r\nContent-Length: 100\r\n\r\n".encode()


def said_to(site: Site, sent: bytes) -> bytes:
    """What a connection is told that says this and then nothing more, until it is closed."""
    answer = b""
    with socket.create_connection((HOST, site.web.port), timeout=PATIENCE_SECONDS) as connection, suppress(ConnectionResetError):
        connection.sendall(sent)
        while more := connection.recv(4096):
            answer += more
    return answer


def test_who_says_nothing_is_closed(tmp_path: Path) -> None:
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", header_seconds=0.3) as site:
        assert said_to(site, b"") == said_to(site, b"GET / HT") == b""


def test_a_request_that_does_not_go_on_is_ended(tmp_path: Path) -> None:
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", network_timeout_seconds=0.5, header_seconds=120) as site:
        for sent in (HEAD, HEAD + b"--cut"):
            assert said_to(site, sent).startswith(b"HTTP/1.1 408")


def test_a_request_that_is_too_large_is_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", maximum_request_bytes=5000) as site:
        large = a_dataset(Rows=1000, PixelData=bytes(12000))
        status, answer = site.stow(file_of(a_dataset()), file_of(large), *[file_of(large)] * 400)
        assert (status, answer) == (413, "A request has at most 5000 bytes.\n")
        assert [one.sop_instance_uid for one in site.storage.query.held({}, limit=9) if one.sop_instance_uid == large.SOPInstanceUID] == []


def test_what_is_more_than_is_served_at_a_time_is_told_to_come_again(tmp_path: Path) -> None:
    with (
        serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", maximum_connections=3, header_seconds=120) as site,
        ExitStack() as waiting,
    ):
        for _ in range(3):
            connection = waiting.enter_context(socket.create_connection((HOST, site.web.port), timeout=PATIENCE_SECONDS))
            connection.sendall(HEAD)
        wait_until(lambda: site.get("/studies")[0] == 503, seconds=PATIENCE_SECONDS, what="a request to be one too many")
        waiting.close()
        wait_until(lambda: site.get("/studies")[0] == 204, seconds=PATIENCE_SECONDS, what="the node to serve again")
