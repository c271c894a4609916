"""Each kind of result object is stored by a PACS that nobody here wrote, and comes back as it was."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import pytest
from pydicom import dcmread

from dicomnode.dimse.scu import Outgoing, send
from dicomnode.results.profile import KINDS
from pacs import LOOPBACK, NODE_AET, free_port, orthanc
from shown_studies import chest_ct

pytestmark = pytest.mark.system

CLASSES = {  # by the end of the SOP Class UID
    "66.4": "Segmentation",
    "66.7": "Label Map Segmentation",
    "88.34": "Comprehensive 3D SR",
    "88.33": "Comprehensive SR",
    "7": "Secondary Capture Image",
    "88.59": "Key Object Selection",
    "11.1": "Grayscale Softcopy Presentation State",
}


def test_orthanc_keeps_each_kind_of_object_as_it_was_sent(tmp_path: Path) -> None:
    study = chest_ct(tmp_path / "study")
    made = [
        *study.results(("seg", "sr", "key-image", "key-object", "presentation-state")),
        *study.results(("seg-labelmap", "sr-comprehensive")),
    ]
    stem = "1.2.840.10008.5.1.4.1.1."
    assert {result.sop_class_uid.removeprefix(stem) for result in made} == set(CLASSES)
    assert len(made) == len(KINDS) - 2  # seg-no-film and seg-fractional are of the class of seg
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
    settings = {"UnknownSopClassAccepted": True, "LuaScripts": []}  # label maps are younger than this Orthanc
    with orthanc(tmp_path / "orthanc", node_port=free_port(), settings=settings) as pacs:
        outcomes = send(pacs.peer, outgoing, calling_ae_title=NODE_AET, timeout_seconds=120)
        assert [(outcome.state, outcome.status) for outcome in outcomes] == [("sent", 0)] * len(made)
        for result in made:
            query = {"Level": "Instance", "Query": {"SOPInstanceUID": result.sop_instance_uid}}
            (found,) = pacs.post("/tools/find", query)
            with urlopen(f"http://{LOOPBACK}:{pacs.http_port}/instances/{found}/file", timeout=60) as response:
                kept = dcmread(BytesIO(response.read()))
            sent = dcmread(BytesIO(result.data))
            assert kept == sent, CLASSES[result.sop_class_uid.removeprefix(stem)]
            assert kept.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID
