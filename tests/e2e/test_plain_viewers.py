"""What is seen of the results where neither SEG nor SR is shown: pictures as Orthanc renders them, presentation states as DCMTK does."""

from __future__ import annotations

import re
import subprocess
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dicomnode.results.profile import PROFILES
from ohif import screenshots
from pacs import LOOPBACK, Orthanc, free_port, orthanc, program
from shown_studies import ShownStudy, chest_ct, chest_film_dx, head_mr

pytestmark = pytest.mark.system

MAKERS = {"CT": chest_ct, "MR": head_mr, "DX": chest_film_dx}


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("plain") / "orthanc", node_port=free_port(), settings={"LuaScripts": []}) as pacs:
        yield pacs


@pytest.fixture(params=MAKERS)
def study(request: pytest.FixtureRequest, tmp_path: Path) -> ShownStudy:
    return MAKERS[request.param](tmp_path)


def read(address: str, data: bytes | None = None) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(address, data=data), timeout=240) as response:
        body: bytes = response.read()
        return body


def test_orthanc_renders_the_outline_in_its_place_and_colour_for_peers_of_either_profile(
    pacs: Orthanc, study: ShownStudy, tmp_path: Path
) -> None:
    plain, *others = study.results(PROFILES["plain"])
    assert not others, "a plain PACS is given nothing but pictures of images"
    pictures = [made for made in study.results(PROFILES["orthanc"]) if made.modality == "OT"]
    assert [made.data for made in pictures] == [plain.data]
    read(f"http://{LOOPBACK}:{pacs.http_port}/instances", plain.data)
    (found,) = pacs.post("/tools/find", {"Level": "Instance", "Query": {"SOPInstanceUID": plain.sop_instance_uid}})
    preview = read(f"http://{LOOPBACK}:{pacs.http_port}/instances/{found}/preview")
    (screenshots(tmp_path) / f"{study.case.volume.modality}-key-image-in-orthanc.png").write_bytes(preview)
    rendered = np.asarray(Image.open(BytesIO(preview))).astype(int)
    columns, rows = np.rint(study.outline).astype(int).T
    assert (np.abs(rendered[rows, columns] - study.colour) <= 1).all()
    columns, rows = np.rint(study.mirrored_picture(study.outline)).astype(int).T
    assert (np.ptp(rendered[rows, columns], axis=-1) == 0).all(), "the other side has no colour"
    columns, rows = np.rint((study.inside + 0.5) * study.scale - 0.5).astype(int).T
    assert (np.ptp(rendered[rows, columns], axis=-1) == 0).all(), "nor has what is outlined"


def test_dcmtk_reads_the_outline_where_the_image_that_it_renders_by_the_state_has_the_nodule(tmp_path: Path) -> None:
    study = chest_ct(tmp_path)
    (made,) = (one for one in study.results(("sr", "presentation-state")) if one.modality == "PR")
    state, picture = tmp_path / "state.dcm", tmp_path / "rendered.pgm"
    state.write_bytes(made.data)
    wanted = study.case.volume.sop_instance_uids[study.finding.key_slice]
    (image,) = (file for file, header in zip(study.files, study.case.headers, strict=True) if header.SOPInstanceUID == wanted)
    said = subprocess.run(
        [program("dcmp2pgm", "dcmtk"), "--verbose", "--pstate", state, image, picture],
        check=True, capture_output=True, text=True, timeout=240,
    ).stderr  # fmt: skip
    (coordinates,) = re.findall(r"coordinates: (.*)", said)
    outline = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+)\\([\d.]+)", coordinates)]
    rendered = np.asarray(Image.open(picture)).astype(int)
    drawn = Image.new("1", (rendered.shape[1] * 8, rendered.shape[0] * 8))  # fine enough for the centres of pixels
    ImageDraw.Draw(drawn).polygon([(8 * x, 8 * y) for x, y in outline], fill=1)
    within = np.asarray(drawn)[4::8, 4::8]
    assert {(x, y) for y, x in np.argwhere(within)} == {(x, y) for x, y in study.inside}
    beside = np.zeros_like(within)
    for shift in (-3, 3):
        beside |= np.roll(within, shift, 0) | np.roll(within, shift, 1)
    assert rendered[within].mean() > 200, "by the window of the state a nodule is white"
    assert rendered[beside & ~within].mean() < 120, "and the lung around it is dark"
    assert rendered[:, ::-1][within].mean() < 120
