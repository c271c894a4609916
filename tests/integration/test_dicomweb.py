"""DICOMweb over a real network connection: what is stored by STOW-RS is found by QIDO-RS and comes back by WADO-RS, byte for byte."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import (
    BIG_ENDIAN,
    COMPREHENSIVE_3D_SR as SR,
    EXPLICIT,
    IMPLICIT,
    JPEG_2000,
    SEG,
    a_dataset,
    encapsulated,
    encoded,
    split_part10,
)
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from dicomweb_site import Site, file_of, keep_as_results, serving


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    with serving(tmp_path, database_url) as made:
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


def test_results_that_never_left_the_node_stand_beside_the_images(small: Site) -> None:
    image = a_dataset()
    assert small.stow(file_of(image))[0] == 200
    report = a_dataset(SR, SOPInstanceUID="2.25.1", SeriesInstanceUID="2.25.2", Modality="SR", PixelData=None, Rows=None, Columns=None)
    keep_as_results(small.storage, "1.2.3.4", file_of(report))
    (held,) = small.storage.query.held({"SOPInstanceUID": "2.25.1"}, limit=2)
    client = small.client()
    assert [one["00080060"]["Value"] for one in client.search_for_series("1.2.3.4")] == [["CT"], ["SR"]]
    assert [encoded(one) for one in client.retrieve_study("1.2.3.4")] == [encoded(image), encoded(report)]
    assert [one["00080018"]["Value"] for one in client.retrieve_study_metadata("1.2.3.4")] == [[image.SOPInstanceUID], ["2.25.1"]]
    small.storage.objects.remove(held.object_id)
    place = "/studies/1.2.3.4/series/2.25.2/instances/2.25.1"
    assert [small.get(path)[0] for path in (place, f"{place}/frames/1", "/studies/1.2.3.4")] == [410, 410, 206]
    assert small.get(f"{place}/metadata")[0] == 200, "what the index knows of it"
