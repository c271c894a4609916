"""OHIF in headless Chromium: what a radiologist sees of a study in Orthanc, as text and as pixels.

OHIF's static files come from the folder that OHIF_DIST names (`npm pack @ohif/app`); one server on loopback gives the browser these
and, under the same origin, Orthanc's DICOMweb.
"""

from __future__ import annotations

import json
import mimetypes
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from pacs import LOOPBACK, http_server, program, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage

DIST = Path(os.environ.get("OHIF_DIST", Path(__file__).parents[1] / ".cache" / "ohif-3.13.2" / "package" / "dist"))
PATIENCE_SECONDS = 240  # WebGL in software on a busy machine; nothing is measured here
POLL = 250  # milliseconds; with each frame, as is Playwright's habit, it would keep the renderer busy
SOFTWARE_WEBGL = [
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]
DATA_SOURCE = {
    "friendlyName": "Orthanc",
    "name": "orthanc",
    "wadoUriRoot": "/wado",
    "qidoRoot": "/dicom-web",
    "wadoRoot": "/dicom-web",
    "qidoSupportsIncludeField": False,
    "imageRendering": "wadors",
    "thumbnailRendering": "wadors",
    "enableStudyLazyLoad": True,
    "supportsFuzzyMatching": False,
    "supportsWildcard": True,
    "singlepart": "bulkdata,video",
    "omitQuotationForMultipartRequest": True,
    "bulkDataURI": {"enabled": True, "relativeResolution": "studies"},
}
CONFIGURATION = {
    "routerBasename": None,
    "extensions": [],
    "modes": [],
    "customizationService": [{"ohif.tours": {"$set": []}}],  # no guided tour over the images
    "disableConfirmationPrompts": True,  # what is opened is shown, without asking first whether to track it
    "showStudyList": True,
    "maxNumberOfWebWorkers": 2,
    "showWarningMessageForCrossOrigin": False,
    "showCPUFallbackMessage": False,
    "showLoadingIndicator": True,
    "strictZSpacingForVolumeViewport": True,
    "groupEnabledModesFirst": True,
    "showErrorDetails": "always",
    "investigationalUseDialog": {"option": "never"},
    "maxNumRequests": {"interaction": 20, "thumbnail": 5, "prefetch": 10},
    "defaultDataSourceName": "dicomweb",
    "dataSources": [
        {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "dicomweb",
            "configuration": DATA_SOURCE,
        }
    ],
}


def ohif_or_skip() -> Path:
    """Return the folder of OHIF's static files, or skip the test and say how to get them."""
    if not (DIST / "index.html").is_file():
        pytest.skip(f"OHIF is not in {DIST} (npm pack @ohif/app, unpack it and name its dist folder in OHIF_DIST; .ci/run does)")
    return DIST


def screenshots(otherwise: Path) -> Path:
    """Return the folder where pictures of what viewers show are kept: that which SCREENSHOTS names."""
    folder = Path(os.environ.get("SCREENSHOTS", otherwise))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def served(dist: Path, orthanc_http_port: int) -> Iterator[str]:
    """Serve OHIF and, beside it, Orthanc's DICOMweb on a free port of loopback; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, the name is the base class's
            """Say nothing: what fails is seen in the browser's console."""

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(("/dicom-web/", "/wado")):
                return self._from_orthanc()
            if path == "/app-config.js":
                return self._answer(200, "text/javascript", f"window.config = {json.dumps(CONFIGURATION)};".encode())
            file = (dist / path.lstrip("/")).resolve()
            if not file.is_relative_to(dist.resolve()) or not file.is_file():
                file = dist / "index.html"  # the routes of a single-page application
            kind = {".wasm": "application/wasm", ".js": "text/javascript", ".mjs": "text/javascript"}.get(file.suffix)
            return self._answer(200, kind or mimetypes.guess_type(file)[0] or "application/octet-stream", file.read_bytes())

        def _from_orthanc(self) -> None:
            wanted = {name: value for name, value in self.headers.items() if name.lower() in ("accept", "range")}
            request = urllib.request.Request(f"http://{LOOPBACK}:{orthanc_http_port}{self.path}", headers=wanted)
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
                    self._answer(response.status, response.headers["Content-Type"], response.read())
            except urllib.error.HTTPError as error:
                self._answer(error.code, "text/plain", error.read())

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            if ".bundle." in self.path:
                self.send_header("Cache-Control", "max-age=86400, immutable")  # then the browser keeps it compiled, too
            for name in ("Opener-Policy", "Embedder-Policy", "Resource-Policy"):  # cornerstone shares memory with its workers
                self.send_header(f"Cross-Origin-{name}", "require-corp" if name == "Embedder-Policy" else "same-origin")
            self.end_headers()
            self.wfile.write(body)

    with http_server(Handler) as address:
        yield address


@contextmanager
def chromium() -> Iterator[BrowserContext]:
    """Run Debian's Chromium, headless and with WebGL in software; skip the test where it or its driver is missing."""
    executable = program("chromium", "chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=executable, headless=True, args=SOFTWARE_WEBGL, viewport={"width": 1000, "height": 640},
            timeout=1000 * PATIENCE_SECONDS,
        )  # fmt: skip
        context.set_default_timeout(1000 * PATIENCE_SECONDS)
        try:
            yield context
        finally:
            context.close()


class Viewer:
    """One page of the browser with a study open in OHIF, and what went wrong in it."""

    def __init__(self, context: BrowserContext, address: str, folder: Path) -> None:
        self.page = context.new_page()
        self.console: list[str] = []
        self.errors: list[str] = []  # of the console, of scripts and of requests
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.on("requestfailed", lambda request: self._failed(request.url, request.failure))
        self.page.on("response", lambda response: self._failed(response.url, response.status) if response.status >= 400 else None)
        self._address, self._folder = address, folder

    def open(self, study_instance_uid: str) -> None:
        """Load a study and wait for its first image."""
        self.console.clear()
        self.errors.clear()
        with self._explained("the study's first image"):
            self.page.goto(f"{self._address}/viewer?StudyInstanceUIDs={study_instance_uid}", wait_until="domcontentloaded")
            self.page.wait_for_selector("canvas.cornerstone-canvas")

    def show(self, series_description: str) -> None:
        """Open a series by double-clicking it in the list, as a reader does, who would do it again if nothing came of it."""
        from playwright.sync_api import TimeoutError as OutOfTime

        in_the_list = self.page.locator('[data-cy^="study-browser-thumbnail"]').filter(has_text=series_description).first
        with self._explained(f"the series {series_description}"):
            for last in (False, False, False, True):
                in_the_list.dblclick()
                try:
                    self.page.wait_for_function(_SHOWN, arg=series_description, timeout=250 * PATIENCE_SECONDS, polling=POLL)
                except OutOfTime:
                    if last:
                        raise
                    continue
                return

    def wait_for(self, condition: str, argument: object = None) -> None:
        """Wait until a JavaScript function of the argument says something true."""
        with self._explained(f"{condition} of {argument}"):
            self.page.wait_for_function(condition, arg=argument, polling=POLL)

    def wait_for_words(self, *words: str) -> None:
        """Wait until each of these is written on the image."""
        with self._explained(f"the words {words}"):
            self.page.wait_for_function(
                f"words => {{ {_RENDERED} return words.every(word => ({_WORDS}).includes(word)); }}", arg=list(words), polling=POLL
            )

    def words(self) -> str:
        """What annotations say on the image."""
        return str(self.page.evaluate(f"() => {_WORDS}")).strip("; ")

    def to_image(self, sop_instance_uid: str) -> None:
        """Wait for a viewport with this image among its images, and scroll to it."""
        self.wait_for(
            f"uid => {{ {_VIEWPORT} if (!vp?.getImageIds) return false;"
            " const n = vp.getImageIds().findIndex(id => id.includes(uid)); if (n < 0) return false;"
            " if (vp.getCurrentImageIdIndex() !== n) { vp.setImageIdIndex(n); return false; } return true; }",
            sop_instance_uid,
        )

    def on_page(self, sop_instance_uid: str, points: ArrayLike) -> NDArray[np.int64]:
        """Where points of an image lie on the page: (n, 2) of (column, row), both ways, pixel centres of the image at whole numbers."""
        places = self.page.evaluate(
            f"([uid, points]) => {{ {_VIEWPORT} const id = vp.getImageIds().find(id => id.includes(uid));"
            " const box = vp.canvas.getBoundingClientRect(), utilities = window.cornerstone.utilities;"
            " return points.map(at => vp.worldToCanvas(utilities.imageToWorldCoords(id, at))).map(([x, y]) => [box.x + x, box.y + y]); }",
            [sop_instance_uid, np.asarray(points, dtype=np.float64).tolist()],
        )
        return np.rint(np.array(places)).astype(np.int64)

    def pixels(self, name: str) -> NDArray[np.uint8]:
        """The page as (rows, columns, 3), and as a file of this name for a person to look at."""
        return np.asarray(Image.open(BytesIO(self.page.screenshot(path=self._folder / f"{name}.png"))).convert("RGB"))

    def wait_for_pixels(self, name: str, right: Callable[[NDArray[np.uint8]], bool]) -> NDArray[np.uint8]:
        """Wait until the page looks right; return it, and keep it as a file of this name."""
        pages: list[NDArray[np.uint8]] = []

        def shown() -> bool:
            self.page.evaluate(f"() => {{ {_RENDERED} }}")
            pages[:] = [self.pixels(name)]
            return right(pages[0])

        with self._explained(f"{name} to look right"):
            wait_until(shown, seconds=PATIENCE_SECONDS, what="these pixels", every=0.5)
        return pages[0]

    def _heard(self, message: ConsoleMessage) -> None:
        self.console.append(message.text)
        if message.type == "error" or "Error Boundary" in message.text:
            self.errors.append(message.text)

    def _failed(self, url: str, why: object) -> None:
        self.errors.append(f"{url}: {why}")

    @contextmanager
    def _explained(self, awaited: str) -> Iterator[None]:
        """Say of what didn't come what was there instead."""
        from playwright.sync_api import TimeoutError as OutOfTime

        try:
            yield
        except (OutOfTime, pytest.fail.Exception) as error:
            self.pixels("failed")
            there = {"page": self.page.inner_text("body")[:3000], "errors": "\n".join(self.errors)[:3000]}
            there["console"] = "\n".join(self.console)[-3000:]
            pytest.fail(
                f"waited in vain for {awaited} ({error}); see failed.png in {self._folder}"
                + "".join(f"\n--- {name}\n{text}" for name, text in there.items())
            )


_WORDS = "[...document.querySelectorAll('svg text')].map(text => text.textContent).join('; ')"
_VIEWPORT = (
    "const grid = window.services?.viewportGridService?.getState();"
    " const vp = grid && window.services.cornerstoneViewportService.getCornerstoneViewport(grid.activeViewportId);"
)
# OHIF learns which annotations belong to a report maybe after it has rendered its image, and then draws them with the next one.
_RENDERED = f"{_VIEWPORT} vp?.render();"
_SHOWN = (
    f"description => {{ {_VIEWPORT}"
    " const shown = grid?.viewports.get(grid.activeViewportId)?.displaySetInstanceUIDs ?? [];"
    " const of_segments = window.services.segmentationService.getSegmentations().map(one => one.segmentationId);"
    " return [...shown, ...of_segments].some("
    "   uid => window.services.displaySetService.getDisplaySetByUID(uid)?.SeriesDescription === description); }"
)
