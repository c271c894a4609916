"""How fast 500 uncompressed slices become a volume: the node against other readers in the same run, alternating.

    python tests/benchmarks/volume.py [--out JSON] [--slices N] [--rounds R] [--readers NAME,…] [--folder DIR]

Each reader starts with the names of the files, which lie in the page cache, and ends with values and geometry: headers are read,
slices sorted by position, values rescaled. Where a reader gives stored values or another type, that is its row's note. The node's
and pydicom's voxels are compared bit for bit. A time is the median over the rounds, a ratio the median of the rounds' ratios.

Last, the study is put into a storage as if it were received, a prefetcher looks at it twice, and the clock runs from the closed
revision's instances to the volume that its job gets.

Exit code 0, or 3 if a goal is missed. The last line is one JSON object {goal: {"measured", "goal", "met"}}.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit" / "dicomnode")]  # measure this tree, wherever the package may be installed from

import numpy as np  # noqa: E402  after the path is set, like the rest
import pydicom  # noqa: E402
from ct_series import write_series  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from small_bundle import write_package  # noqa: E402

from dicomnode.analysis.decoding import Decoder  # noqa: E402
from dicomnode.analysis.frames import frames_of, read_headers  # noqa: E402
from dicomnode.analysis.manifest import Manifest, parse_manifest  # noqa: E402
from dicomnode.analysis.package import digest_of  # noqa: E402
from dicomnode.analysis.select import SelectedSeries  # noqa: E402
from dicomnode.analysis.volume import read_volume  # noqa: E402
from dicomnode.prefetch import Prefetcher  # noqa: E402
from storage import Storage, open_storage, prepare_storage  # noqa: E402
from storage.records import InstanceHeader, Route  # noqa: E402

Voxels = NDArray[Any]
Reader = Callable[[Sequence[Path]], Voxels]
READY_SECONDS = 0.05  # from closing to the volume, when it was read ahead
GOALS = (("pydicom", 4.0), ("MONAI PydicomReader", 50.0))


def node(files: Sequence[Path]) -> Voxels:
    """Headers, planes, geometry, HU as int16, the affine."""
    frames = frames_of(read_headers(files))
    uid = str(frames[0].image.SeriesInstanceUID)
    return read_volume(SelectedSeries(input_name="image", series_instance_uid=uid, frames=tuple(frames), why="")).voxels


def by_pydicom(files: Sequence[Path]) -> Voxels:
    """One file after another, rescaled by pydicom; HU as int16, sorted by position."""
    images = []
    for file in files:
        image = pydicom.dcmread(file)
        hounsfield = pydicom.pixels.apply_rescale(image.pixel_array, image).astype(np.int16)
        images.append((float(image.ImagePositionPatient[2]), hounsfield))
    return np.stack([hounsfield for _, hounsfield in sorted(images, key=lambda pair: pair[0])])


def by_pydicom_in_place(files: Sequence[Path]) -> Voxels:
    """The same into one array, without a float in between: as quick as pydicom gets."""
    voxels = np.empty((len(files), 512, 512), dtype=np.int16)
    heights = []
    for out, file in zip(voxels, files, strict=True):
        image = pydicom.dcmread(file)
        np.add(image.pixel_array, int(image.RescaleIntercept), out=out, casting="unsafe")
        heights.append(float(image.ImagePositionPatient[2]))
    order = np.argsort(heights)
    return voxels if (np.diff(order) == 1).all() else voxels[order]


def by_simpleitk(files: Sequence[Path]) -> Voxels:
    """ImageSeriesReader, files sorted by GDCM; HU."""
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent)))
    return SimpleITK.GetArrayFromImage(reader.Execute())


def by_monai(name: str) -> Reader:
    """One of MONAI's readers, on the folder."""

    def read(files: Sequence[Path]) -> Voxels:
        from monai.data import image_reader

        reader = getattr(image_reader, name)()
        voxels, _ = reader.get_data(reader.read(str(files[0].parent)))
        return np.asarray(voxels)

    return read


def by_highdicom(files: Sequence[Path]) -> Voxels:
    """Volume from a series; HU as float64."""
    import highdicom

    return np.asarray(highdicom.get_volume_from_series([pydicom.dcmread(file) for file in files]).array)


READERS: dict[str, Reader] = {
    "node": node,
    "pydicom": by_pydicom,
    "pydicom in place": by_pydicom_in_place,
    "SimpleITK": by_simpleitk,
    "MONAI PydicomReader": by_monai("PydicomReader"),
    "MONAI ITKReader": by_monai("ITKReader"),
    "highdicom": by_highdicom,
}
NEEDS = {"SimpleITK": "SimpleITK", "MONAI PydicomReader": "monai", "MONAI ITKReader": "itk", "highdicom": "highdicom"}


def main() -> int:
    """Measure, print, and return the exit code."""
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 150)
    readers = {name: READERS[name] for name in options.readers if _present(name, console)}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="volume-", dir=options.folder) as folder:
        files = _series(Path(folder), options.slices)
        expected = by_pydicom_in_place(files)
        notes = {name: _note(name, read(files), expected) for name, read in readers.items()}  # and everything is imported, and cached
        times: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(options.rounds):
            names = list(readers)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                times[name].append(_seconds(readers[name], files))
        ready = _ready_seconds(Path(folder) / "node", files, options.rounds) if "node" in readers else []
    _print(times, notes, options, console)
    goals = _goals(times)
    if ready:
        seconds = statistics.median(ready)
        goals["seconds from closing to a volume read ahead"] = {
            "measured": round(seconds, 4), "goal": READY_SECONDS, "met": seconds <= READY_SECONDS
        }  # fmt: skip
    if options.out:
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        content = {
            "machine": machine,
            "slices": options.slices,
            "rounds": options.rounds,
            "seconds": times,
            "ready_seconds": ready,
            "notes": notes,
            "goals": goals,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for goal, result in goals.items():
        console.print(f"{'met   ' if result['met'] else 'MISSED'} {goal}: {result['measured']} of {result['goal']}", highlight=False)
    print(json.dumps(goals))
    return 0 if all(result["met"] for result in goals.values()) else 3


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every measurement to this file as JSON")
    parser.add_argument("--slices", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are written for the run")
    parser.add_argument("--readers", type=lambda text: text.split(","), default=list(READERS), help=", ".join(READERS))
    options = parser.parse_args()
    unknown = set(options.readers) - set(READERS)
    if unknown:
        parser.error(f"no reader is called {', '.join(sorted(unknown))}")
    return options


def _present(name: str, console: Console) -> bool:
    needed = NEEDS.get(name)
    if needed is None or importlib.util.find_spec(needed) is not None:
        return True
    console.print(f"left out: {name}, {needed} is not installed", highlight=False)
    return False


def _series(folder: Path, slices: int) -> list[Path]:
    """Write a chest-like CT: a body, air around it, noise; the files' names don't follow their positions."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:512, :512]
    body = np.where(((columns - 256) / 220) ** 2 + ((rows - 256) / 150) ** 2 < 1, 1064, 24)
    noise = rng.normal(0, 12, (4, 512, 512))
    stored = np.empty((slices, 512, 512), dtype=np.int16)
    for k in range(slices):
        stored[k] = np.roll(body + noise[k % 4], k, axis=1)
    more = {"Manufacturer": "SYNTHETIC", "KVP": 120, "StudyDate": "20260101", "SeriesDescription": "AX 1 mm", "ConvolutionKernel": "B30f"}
    files = write_series(folder, stored, spacing=(1.0, 0.7, 0.7), orientation=(1, 0, 0, 0, 1, 0), **more)
    os.sync()
    return [files[k] for k in rng.permutation(slices)]


def _note(name: str, voxels: Voxels, expected: Voxels) -> str:
    """What a reader gave; the node's and pydicom's voxels must be the expected ones to the bit."""
    same = voxels.shape == expected.shape and np.array_equal(voxels, expected)
    if name == "node" or name.startswith("pydicom"):
        if not same or voxels.dtype != np.int16:
            raise SystemExit(f"{name} gives other voxels than pydicom")
        return "int16, equal to the bit"
    return f"{voxels.dtype} {voxels.shape}{', equal' if same else ''}"


def _seconds(read: Reader, files: Sequence[Path]) -> float:
    gc.collect()
    started = time.perf_counter()
    voxels = read(files)
    seconds = time.perf_counter() - started
    del voxels
    return seconds


def _ready_seconds(folder: Path, files: Sequence[Path], rounds: int) -> list[float]:
    """Receive the files, let a prefetcher read them, and time what a job then does until it has the volume."""
    storage, manifest = _desk(folder)
    uid = ""
    for file in files:
        image = pydicom.dcmread(file, stop_before_pixels=True)
        uid, stored = str(image.StudyInstanceUID), storage.objects.put(file.read_bytes())
        header = InstanceHeader(
            sop_instance_uid=str(image.SOPInstanceUID), sop_class_uid=str(image.SOPClassUID),
            transfer_syntax_uid=str(image.file_meta.TransferSyntaxUID), series_instance_uid=str(image.SeriesInstanceUID),
            study_instance_uid=uid, dataset_sha256=stored.sha256, kind="image", modality="CT", instance_number=None, patient_id="P",
            patient_name="N", study_date="20260101", study_description="", accession_number="", series_number=1, series_description="",
            requested_priority="routine", calling_ae_title="SCANNER", called_ae_title="NODE",
        )  # fmt: skip
        storage.index.add_instance(header, stored)
    with Decoder(processes=1) as decoder:
        prefetcher = Prefetcher(storage, decoder, 2**31)
        prefetcher.look()
        prefetcher.look()
        seconds = []
        for _ in range(rounds):
            gc.collect()
            started = time.perf_counter()
            held = prefetcher.take(uid, storage.index.instances(uid))
            if held is None or held.volume(held.selection(manifest).series[0]) is None:
                raise SystemExit("the study was not read ahead")
            seconds.append(time.perf_counter() - started)
    storage.database.close()
    return seconds


def _desk(folder: Path) -> tuple[Storage, Manifest]:
    """Return a storage with one enabled package and a route to it, and the package's manifest."""
    url = f"sqlite:///{folder / 'node.sqlite'}"
    folder.mkdir()
    prepare_storage(url, folder)
    storage = open_storage(url, folder)
    package = storage.registry.package_folder("bright", "1.0")
    write_package(package)
    digest = digest_of(package)
    storage.registry.add_package("bright", "1.0", digest)
    storage.registry.set_check("bright", "1.0", digest, {}, passed=True)
    storage.registry.enable("bright", "1.0")
    storage.registry.add_route(
        Route(name="r", from_ae_title="*", called_ae_title="*", package="bright", version=None, to_ae_titles=(), priority=None,
              quiet_seconds=1, report_refusals=False)
    )  # fmt: skip
    return storage, parse_manifest((package / "manifest.toml").read_bytes(), package)


def _ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(other / own for own, other in zip(times["node"], times[name], strict=True))


def _goals(times: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    goals: dict[str, dict[str, object]] = {}
    for name, least in GOALS:
        if name in times and "node" in times:
            ratio = _ratio(times, name)
            goals[f"volume, ratio to {name}"] = {"measured": round(ratio, 2), "goal": least, "met": ratio >= least}
    return goals


def _print(times: dict[str, list[float]], notes: dict[str, str], options: argparse.Namespace, console: Console) -> None:
    title = f"{options.slices} slices of 512x512, files in the page cache, {options.rounds} rounds"
    table = Table("reader", "seconds", "best", "this / node", "gives", title=title, title_justify="left")
    for name, seconds in times.items():
        ratio = f"{_ratio(times, name):.1f}" if "node" in times else ""
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", ratio, notes[name])
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
