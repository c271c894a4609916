"""What a radiologist sees of the results in OHIF, by its text and by the colours of its pixels, on phantoms with a known finding.

OHIF 3.13 shows no SEG of a film: its page is lost with highdicom's as with ours. So a film's finding is looked for in the report's
rectangle and in the key image.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread

from dicomnode.analysis.growth import compare
from dicomnode.findings import Finding, ResultObject
from dicomnode.results.capture import encode_reason
from dicomnode.results.profile import PROFILES
from dicomnode.results.report import encode_refusal
from ohif import Viewer, chromium, ohif_or_skip, screenshots, served
from pacs import LOOPBACK, Orthanc, free_port, orthanc as run_orthanc
from results_cases import former_of, prior_with
from shown_studies import ShownStudy, chest_ct, chest_film_dx, head_mr

pytestmark = pytest.mark.system

DICOMWEB = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
WARNING = (255, 210, 0)
MAKERS = {"MR": head_mr, "DX": chest_film_dx}


@pytest.fixture(scope="module")
def reading_room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Viewer, Orthanc]]:
    """OHIF on an Orthanc; screenshots are kept in SCREENSHOTS, else with the test's other files."""
    dist, folder = ohif_or_skip(), tmp_path_factory.mktemp("ohif")
    if not Path(DICOMWEB).exists():
        pytest.skip("Orthanc's DICOMweb is not installed (apt-get install orthanc-dicomweb)")
    settings = {"Plugins": [DICOMWEB], "LuaScripts": []}
    with (
        run_orthanc(folder / "orthanc", node_port=free_port(), settings=settings) as pacs,
        served(dist, pacs.http_port) as address,
        chromium() as browser,
    ):
        yield Viewer(browser, address, screenshots(folder / "screenshots")), pacs


def store(pacs: Orthanc, study: ShownStudy, results: list[ResultObject]) -> None:
    for data in [*(file.read_bytes() for file in study.files), *(made.data for made in results)]:
        with urllib.request.urlopen(urllib.request.Request(f"http://{LOOPBACK}:{pacs.http_port}/instances", data=data), timeout=240):
            pass


@pytest.mark.parametrize("modality", MAKERS)
def test_ohif_shows_a_finding_and_its_numbers_in_their_place(reading_room: tuple[Viewer, Orthanc], tmp_path: Path, modality: str) -> None:
    viewer, pacs = reading_room
    study = MAKERS[modality](tmp_path)
    results = study.results(PROFILES["ohif"])
    store(pacs, study, results)
    viewer.open(study.study_instance_uid)
    finding_is_in_its_place(viewer, study, results)
    assert viewer.errors == []


def finding_is_in_its_place(viewer: Viewer, study: ShownStudy, results: list[ResultObject]) -> None:
    made = {one.modality: one for one in results}
    assert sorted(made) == (["OT", "SR"] if study.case.volume.is_projection else ["OT", "SEG", "SR"])
    report_is_in_its_place(viewer, study)
    if "SEG" in made:
        segment_is_in_its_place(viewer, study)
    key_image_is_right(viewer, study, made["OT"])


def report_is_in_its_place(viewer: Viewer, study: ShownStudy) -> None:
    finding, volume = study.finding, study.case.volume
    viewer.show("lung-nodule-ct 0.1.0 SR RESEARCH")
    numbers = [f"{m.name.meaning}: {float(f'{m.value:.6g}'):.2f} {m.unit.value}" for m in finding.measurements]
    viewer.wait_for_words(*numbers, f"Certainty of Finding: {100 * finding.probability:.2f} %")
    line = long_axis(finding) if finding.long_axis is not None else rectangle(*finding.bounds_px)
    image = volume.sop_instance_uids[finding.key_slice]
    viewer.to_image(image)
    places = viewer.on_page(image, line)
    page = viewer.wait_for_pixels(f"{volume.modality}-sr", lambda page: is_drawn(page, places))
    there = set(map(tuple, places.tolist()))
    others = [place for place in viewer.on_page(image, study.mirrored(line)).tolist() if tuple(place) not in there]
    assert others
    assert not any(is_annotation(pixel) for place in others for pixel in around(page, place)), "nothing is drawn on the other side"


def segment_is_in_its_place(viewer: Viewer, study: ShownStudy) -> None:
    volume = study.case.volume
    image = volume.sop_instance_uids[study.finding.key_slice]
    viewer.show("lung-nodule-ct 0.1.0 SEG RESEARCH")
    viewer.wait_for("() => window.services.segmentationService.getSegmentations().length > 0")
    viewer.to_image(image)
    places = viewer.on_page(image, study.inside)
    page = viewer.wait_for_pixels(f"{volume.modality}-seg", lambda page: all(is_like(page[y, x], study.colour) for x, y in places))
    for x, y in viewer.on_page(image, study.mirrored(study.inside)):
        assert np.ptp(page[y, x].astype(int)) <= 12, "the other side of the body has no colour"


def key_image_is_right(viewer: Viewer, study: ShownStudy, picture: ResultObject) -> None:
    viewer.show("lung-nodule-ct 0.1.0 OT RESEARCH")
    viewer.to_image(picture.sop_instance_uid)
    places = viewer.on_page(picture.sop_instance_uid, study.outline)

    def outlined(page: NDArray[np.uint8]) -> bool:
        return all(any(is_like(pixel, study.colour) for pixel in around(page, place)) for place in places)

    page = viewer.wait_for_pixels(f"{study.case.volume.modality}-key-image", outlined)
    for x, y in viewer.on_page(picture.sop_instance_uid, study.mirrored_picture(study.outline)):
        assert np.ptp(page[y, x].astype(int)) <= 12, "the other side of the picture has no colour"


def test_ohif_shows_of_a_chest_also_reports_of_no_finding_of_no_analysis_and_of_growth(
    reading_room: tuple[Viewer, Orthanc], tmp_path: Path
) -> None:
    viewer, pacs = reading_room
    study = chest_ct(tmp_path)
    quiet, refused, grown = study.other("quiet"), study.other("refused").case, study.other("grown", study.finding)
    reason = "too-few-slices", "10 slices — 12 are needed", refused.headers, refused.identity
    made_by = {"manufacturer": "dicomnode", "algorithm_name": "Lung nodule 3D U-Net"}
    growth = compare(grown.findings, grown.case.volume, prior_with(former_of(grown.case, grown.finding, grown=2.0)))
    followed_up = replace(grown, files=[], findings=growth).results(PROFILES["ohif"])
    said, its_picture = quiet.results(("sr", "key-image"))
    refusal, (page_of_words,) = encode_refusal(*reason, **made_by), encode_reason(*reason, **made_by)
    results = study.results(PROFILES["ohif"])
    store(pacs, study, [*results, said, its_picture, refusal, page_of_words, *followed_up])
    viewer.open(study.study_instance_uid)
    finding_is_in_its_place(viewer, study, results)

    # OHIF writes no words beside a frame around an image: what "nothing" means, and why, stands in the picture.
    middle = study.case.volume.sop_instance_uids[len(study.case.volume.voxels) // 2]
    columns, rows = study.case.volume.voxels.shape[2], study.case.volume.voxels.shape[1]
    for package, picture in (("quiet", its_picture), ("refused", page_of_words)):
        viewer.show(f"{package} 0.1.0 SR RESEARCH")
        viewer.to_image(middle)
        frame = rectangle(-0.5, -0.5, columns - 0.5, rows - 0.5)[50:]  # left and right; above and below is the end of the viewport
        places = viewer.on_page(middle, frame)
        viewer.wait_for_pixels(f"{package}-sr", lambda page, places=places: is_drawn(page, places))
        assert not viewer.words()
        viewer.show(f"{package} 0.1.0 OT RESEARCH")
        viewer.to_image(picture.sop_instance_uid)
        warning = picture_warning(picture)
        places = viewer.on_page(picture.sop_instance_uid, warning)
        viewer.wait_for_pixels(f"{package}-key-image", lambda page, places=places: is_warned(page, places))

    viewer.show("grown 0.1.0 SR RESEARCH")
    viewer.wait_for_words("Volume change since prior study: 100.00 %", "Volume doubling time: 100.00 d")
    image = study.case.volume.sop_instance_uids[study.finding.key_slice]
    viewer.to_image(image)
    places = viewer.on_page(image, long_axis(study.finding))
    viewer.wait_for_pixels("grown-sr", lambda page: is_drawn(page, places))
    assert viewer.errors == []


def long_axis(finding: Finding) -> NDArray[np.float64]:
    """Points along it: (n, 2) of (column, row)."""
    assert finding.long_axis is not None
    one, other = map(np.array, finding.long_axis.points_px)
    return one + np.linspace(0.05, 0.95, 40)[:, None] * (other - one)


def rectangle(left: float, top: float, right: float, bottom: float) -> NDArray[np.float64]:
    """Points along it: (100, 2) of (column, row), above, below, left and right."""
    part = np.linspace(0.02, 0.98, 25)
    across, down = left + part * (right - left), top + part * (bottom - top)
    sides = ((across, top), (across, bottom), (left, down), (right, down))
    return np.concatenate([np.stack(np.broadcast_arrays(x, y), axis=1) for x, y in sides])


def picture_warning(picture: ResultObject) -> NDArray[np.float64]:
    """The pixels of a key image that are all of the warning's colour: (n, 2) of (column, row)."""
    return np.argwhere((dcmread(BytesIO(picture.data)).pixel_array == WARNING).all(axis=2))[:, ::-1].astype(np.float64)


def around(page: NDArray[np.uint8], place: Sequence[int]) -> NDArray[np.float64]:
    """The pixels within two of a place."""
    x, y = place
    return page[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).astype(np.float64)


def is_drawn(page: NDArray[np.uint8], places: NDArray[np.int64]) -> bool:
    """Whether a line of OHIF's annotations, which are dashed, goes along these places."""
    return bool(np.mean([any(map(is_annotation, around(page, place))) for place in places]) > 0.5)


def is_annotation(pixel: NDArray[np.float64]) -> bool:
    """Whether this is the yellow or green of OHIF's annotations."""
    return bool(pixel[1] > 150 and pixel[2] < 0.6 * pixel[1])


def is_warned(page: NDArray[np.uint8], places: NDArray[np.int64]) -> bool:
    """Whether most of these places have the hue of the warning, the picture being smaller on the page."""
    return bool(np.mean([is_like(page[y, x], np.array(WARNING, dtype=np.float64)) for x, y in places]) > 0.8)


def is_like(pixel: NDArray[Any], colour: NDArray[np.float64]) -> bool:
    """Whether a pixel is a grey with this colour over it: of its hue, and not pale."""
    hue, wanted = pixel - pixel.mean(), colour - colour.mean()
    return bool(np.ptp(pixel.astype(int)) > 40 and hue @ wanted > 0.95 * np.linalg.norm(hue) * np.linalg.norm(wanted))
