"""Orthanc's DICOMweb and the node's: results go there by STOW-RS, studies come from there, and Orthanc reads what the node holds."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from dimse_cases import CT, EXPLICIT, a_dataset, split_part10
from pydicom import dcmread

from dicomnode.dimse.commitment import NO_SUCH_INSTANCE, Reference
from dicomnode.dimse.scu import Outgoing
from dicomnode.stow import post_each, reach, shown
from dicomweb_site import file_of, keep_as_results, serving
from pacs import LOOPBACK, PATIENCE_SECONDS, Orthanc, free_port, orthanc
from shown_studies import chest_ct
from storage.records import Peer

pytestmark = pytest.mark.system

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def test_results_reach_orthanc_by_stow_as_they_are_stored(tmp_path: Path) -> None:
    study = chest_ct(tmp_path / "study")
    made = study.results(("seg", "sr", "key-image"))
    outgoing = []
    for result in made:
        file = tmp_path / f"{result.sop_instance_uid}.dcm"
        file.write_bytes(result.data)
        outgoing.append(
            Outgoing(
                sop_class_uid=result.sop_class_uid,
                sop_instance_uid=result.sop_instance_uid,
                transfer_syntax_uid=result.transfer_syntax_uid,
                path=file,
            )
        )
    with orthanc(tmp_path / "orthanc", node_port=free_port(), settings=with_plugin()) as pacs:
        url = f"http://{LOOPBACK}:{pacs.http_port}/dicom-web"
        peer = Peer(
            ae_title="PACS", host=LOOPBACK, port=pacs.http_port, sends=False, receives=True, tls=False, client_cert=None, stow_url=url
        )
        reach(peer, timeout_seconds=120)
        outcomes = list(post_each(peer, outgoing, timeout_seconds=120))
        assert [(outcome.state, outcome.error) for outcome in outcomes] == [("sent", None)] * len(made)
        for result in made:
            (found,) = pacs.post("/tools/find", {"Level": "Instance", "Query": {"SOPInstanceUID": result.sop_instance_uid}})
            assert split_part10(kept(pacs, found))[1] == split_part10(bytes(result.data))[1]
        references = [Reference(sop_class_uid=one.sop_class_uid, sop_instance_uid=one.sop_instance_uid) for one in made]
        absent = Reference(sop_class_uid=CT, sop_instance_uid="1.2.3.4.5")
        uid = str(dcmread(BytesIO(bytes(made[0].data))).StudyInstanceUID)
        assert shown(peer, uid, [*references, absent], timeout_seconds=120) == (*references, replace(absent, failure=NO_SUCH_INSTANCE))
        text = tmp_path / "text.dcm"
        text.write_bytes(b"no DICOM")
        (outcome,) = post_each(peer, [Outgoing(sop_class_uid=CT, sop_instance_uid="1.2", transfer_syntax_uid=EXPLICIT, path=text)])
        assert outcome.state == "permanent"


def test_orthanc_stores_on_the_node_searches_it_and_retrieves_from_it(tmp_path: Path) -> None:
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}") as site:
        servers = {"node": {"Url": f"{site.url}/", "HasDelete": False}}
        with orthanc(tmp_path / "orthanc", node_port=free_port(), settings=with_plugin(Servers=servers)) as pacs:
            images = [a_dataset(InstanceNumber=number) for number in (1, 2)]
            ids = [stored(pacs, file_of(image)) for image in images]
            pacs.post("/dicom-web/servers/node/stow", {"Resources": ids, "Synchronous": True})
            held = site.storage.query.held({"StudyInstanceUID": "1.2.3.4"}, limit=10)
            assert {one.sop_instance_uid for one in held} == {image.SOPInstanceUID for image in images}
            report = a_dataset("1.2.840.10008.5.1.4.1.1.88.33", SOPInstanceUID="2.25.1", SeriesInstanceUID="2.25.2", Modality="SR")
            del report.PixelData, report.Rows, report.Columns
            keep_as_results(site.storage, "1.2.3.4", file_of(report))
            answer = pacs.post("/dicom-web/servers/node/qido", {"Uri": "/studies/1.2.3.4/instances", "Arguments": {"Modality": "SR"}})
            assert [one["00080018"]["Value"] for one in answer] == ["2.25.1"]
            pacs.post("/dicom-web/servers/node/retrieve", {"Resources": [{"Study": "1.2.3.4"}], "Synchronous": True})
            (found,) = pacs.post("/tools/find", {"Level": "Instance", "Query": {"SOPInstanceUID": "2.25.1"}})
            assert split_part10(kept(pacs, found))[1] == split_part10(file_of(report))[1]


def with_plugin(**settings: Any) -> dict[str, Any]:
    """Settings of an Orthanc with DICOMweb that routes nothing by itself."""
    if not PLUGIN.exists():
        pytest.skip("Orthanc's DICOMweb is not installed (apt-get install orthanc-dicomweb)")
    return {"Plugins": [str(PLUGIN)], "LuaScripts": [], "DicomWeb": {"Enable": True, **settings}}


def stored(pacs: Orthanc, file: bytes) -> str:
    """Give Orthanc a file; return its own identifier of it."""
    with urlopen(Request(f"http://{LOOPBACK}:{pacs.http_port}/instances", data=file), timeout=PATIENCE_SECONDS) as response:
        return str(json.load(response)["ID"])


def kept(pacs: Orthanc, identifier: str) -> bytes:
    """The file of an instance as Orthanc gives it."""
    with urlopen(f"http://{LOOPBACK}:{pacs.http_port}/instances/{identifier}/file", timeout=PATIENCE_SECONDS) as response:
        content: bytes = response.read()
    return content
