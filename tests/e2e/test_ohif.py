"""What a radiologist sees of the results in OHIF, by its text and by the colours of its pixels, on phantoms with a known finding."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from highdicom.color import CIELabColor
from numpy.typing import NDArray

from dicomnode.results.profile import PROFILES
from ohif import PATIENCE_SECONDS, Viewer, chromium, ohif_or_skip, served
from pacs import LOOPBACK, Orthanc, free_port, orthanc as run_orthanc, wait_until
from shown_studies import ShownStudy, chest_ct

pytestmark = pytest.mark.system

DICOMWEB = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
MAKERS = {"CT": chest_ct}
TEXTS = "() => [...document.querySelectorAll('svg text')].map(text => text.textContent).join('; ')"


@pytest.fixture(scope="module")
def reading_room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Viewer, Orthanc]]:
    """OHIF on an Orthanc; screenshots are kept in SCREENSHOTS, else with the test's other files."""
    dist, folder = ohif_or_skip(), tmp_path_factory.mktemp("ohif")
    if not Path(DICOMWEB).exists():
        pytest.skip("Orthanc's DICOMweb is not installed (apt-get install orthanc-dicomweb)")
    screenshots = Path(os.environ.get("SCREENSHOTS", folder / "screenshots"))
    screenshots.mkdir(parents=True, exist_ok=True)
    settings = {"Plugins": [DICOMWEB], "LuaScripts": []}
    with (
        run_orthanc(folder / "orthanc", node_port=free_port(), settings=settings) as pacs,
        served(dist, pacs.http_port) as address,
        chromium() as browser,
    ):
        yield Viewer(browser, address, screenshots), pacs


@pytest.fixture(params=MAKERS)
def study(request: pytest.FixtureRequest, tmp_path: Path) -> ShownStudy:
    return MAKERS[request.param](tmp_path)


def store(pacs: Orthanc, data: bytes) -> None:
    with urllib.request.urlopen(urllib.request.Request(f"http://{LOOPBACK}:{pacs.http_port}/instances", data=data), timeout=60):
        pass


def test_ohif_shows_the_segment_and_its_numbers_in_their_place(reading_room: tuple[Viewer, Orthanc], study: ShownStudy) -> None:
    viewer, pacs = reading_room
    volume, finding = study.case.volume, study.finding
    for data in [*(file.read_bytes() for file in study.files), *(made.data for made in study.results(PROFILES["ohif"]))]:
        store(pacs, data)
    viewer.open(study.study_instance_uid)
    image = volume.sop_instance_uids[finding.key_slice]
    left, top, right, bottom = finding.bounds_px

    viewer.show("SR")
    numbers = [f"{m.name.meaning}: {float(f'{m.value:.6g}'):.2f} {m.unit.value}" for m in finding.measurements]
    for said in [*numbers, f"Certainty of Finding: {100 * finding.probability:.2f} %"]:
        viewer.wait_for(f"said => ({TEXTS})().includes(said)", said)
    assert finding.long_axis is not None
    drawn = viewer.on_page(image, *np.mean(finding.long_axis.points_px, axis=0).tolist())
    seen(viewer, f"{volume.modality}-sr", drawn, is_annotation)

    colour = np.array(CIELabColor(*finding.colour_cielab).to_rgb(clip=True), dtype=np.float64)
    viewer.show("SEG")
    viewer.wait_for("() => window.services.segmentationService.getSegmentations().length > 0")
    viewer.to_image(image)
    middle = (left + right) / 2, (top + bottom) / 2
    pixels = seen(viewer, f"{volume.modality}-seg", viewer.on_page(image, *middle), lambda pixel: is_like(pixel, colour))
    x, y = viewer.on_page(image, volume.voxels.shape[2] - 1 - middle[0], middle[1])
    assert np.ptp(pixels[y, x].astype(int)) <= 12, "the other side of the body has no colour"
    assert [line for line in viewer.console if "Error Boundary" in line] == []


def seen(viewer: Viewer, name: str, place: tuple[int, int], holds: Callable[[NDArray[np.float64]], bool]) -> NDArray[np.uint8]:
    """Wait until a pixel within two of this place on the page is as it should be; return the page."""
    pages: list[NDArray[np.uint8]] = []

    def shown() -> bool:
        pages[:] = [viewer.pixels(name)]
        x, y = place
        return any(holds(pixel) for pixel in pages[0][y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).astype(np.float64))

    wait_until(shown, seconds=PATIENCE_SECONDS, what=f"{name} to show its colour at {place}", every=0.5)
    return pages[0]


def is_annotation(pixel: NDArray[np.float64]) -> bool:
    """Whether this is the yellow or green of OHIF's annotations."""
    return bool(pixel[1] > 150 and pixel[2] < 0.6 * pixel[1])


def is_like(pixel: NDArray[np.float64], colour: NDArray[np.float64]) -> bool:
    """Whether a pixel is a grey with this colour over it: of its hue, and not pale."""
    hue, wanted = pixel - pixel.mean(), colour - colour.mean()
    return bool(np.ptp(pixel) > 40 and hue @ wanted > 0.95 * np.linalg.norm(hue) * np.linalg.norm(wanted))
