"""How fast findings become a SEG of 512 x 512 x 500: the node beside highdicom, dcmqi and numpy packbits in the same run, alternating.

    python tests/benchmarks/seg.py [--out JSON] [--slices N] [--rounds R] [--segments N,…]

Segments are ellipsoids side by side. The node and highdicom start with masks in memory and headers, and end with the file's bytes;
dcmqi starts as a process with the mask as a file and ends with the SEG as one. "packbits" packs each frame that isn't empty and throws
the bits away, the least that BINARY can cost; "packbits kept" writes them into one buffer of a file's size, as an encoder must. "node,
written" and "packbits, written" end with the bytes in a file, not synced. The node's file is in parts, as it is stored and sent; what
is zero in it is memory that nobody wrote to. A time is the median over the rounds, a ratio the median of the rounds' ratios. CPU seconds
stand beside them. Peak memory is that of a process of its own which encodes once, without what it held before, against the mask of one
byte a voxel.

Exit code 0, or 3 if a goal is missed. The last line is one JSON object {goal: {"measured", "goal", "met"}}.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # measure this tree, wherever the package may be installed from

import numpy as np  # noqa: E402  after the path is set, like the rest
from numpy.typing import NDArray  # noqa: E402
from pydicom import Dataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, RLELossless  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from dicomnode.analysis.frames import read_headers  # noqa: E402
from dicomnode.findings import Findings, LongAxis, Segment  # noqa: E402
from dicomnode.results.segmentation import encode_segmentation  # noqa: E402
from results_cases import Case, finding_of, measured, synthetic  # noqa: E402

SIDE = 512
Encoder = Callable[[], int]  # encodes once, returns the bytes of the file


def study(slices: int, segments: int) -> tuple[Case, Findings]:
    """Ellipsoids in a grid of cells, each through a quarter of the slices: BINARY has some 125 frames a segment at 500 slices."""
    case = synthetic(shape=(slices, SIDE, SIDE), spacing=(1.0, 0.7, 0.7))
    with tempfile.TemporaryDirectory(prefix="seg-headers-") as folder:  # read from files, as the node has them
        files = [Path(folder) / f"{k:04}.dcm" for k in range(slices)]
        for file, header in zip(files, case.headers, strict=True):
            header.save_as(file, enforce_file_format=True)
        case = replace(case, headers=[header for _, header in read_headers(files)])
    across = int(np.ceil(np.sqrt(segments)))
    cell, depth = SIDE // across, slices // 4
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in (depth, cell, cell)), indexing="ij", sparse=True)
    mask = (grid[0] ** 2 + grid[1] ** 2 + grid[2] ** 2 <= 1).astype(np.bool_)
    mask[depth // 2, 0, cell // 2] = mask[depth // 2, -1, cell // 2] = True
    example = finding_of(case, Segment(mask=np.ones((1, 2, 2), dtype=np.bool_), origin=(0, 0, 0)))
    found = []
    for n in range(segments):
        k, r, c = origin = (depth * (n % 4), cell * (n // across), cell * (n % across))
        ends = [(k + depth // 2, row, c + cell // 2) for row in (r, r + cell - 1)]
        index = np.argwhere(mask) + origin
        length = (cell - 1) * 0.7
        first, last, centre = (_point(case, np.asarray(place, dtype=np.float64)) for place in (*ends, index.mean(axis=0)))
        axis = LongAxis(
            slice_index=k + depth // 2, points_lps_mm=(first, last), length_mm=length,
            points_px=((ends[0][2], ends[0][1]), (ends[1][2], ends[1][1])),
        )  # fmt: skip
        segment = Segment(mask=mask, origin=origin)
        numbers = measured(case.volume, len(index), length)
        found.append(replace(example, segment=segment, centre_lps_mm=centre, long_axis=axis, measurements=numbers))
    return case, case.findings(*found)


def _point(case: Case, index: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = case.volume.to_lps(index).tolist()
    return x, y, z


def label_map(case: Case, findings: Findings) -> NDArray[np.uint8]:
    """The findings as highdicom and dcmqi take them."""
    labels = np.zeros(case.volume.voxels.shape, dtype=np.uint8)
    for finding in findings.findings:
        k, r, c = finding.segment.origin
        depth, high, wide = finding.segment.mask.shape
        labels[k : k + depth, r : r + high, c : c + wide][finding.segment.mask] = finding.number
    return labels


def node(case: Case, findings: Findings, kind: str, file: Path | None = None) -> int:
    """The node's own encoder, and into a file."""
    made = encode_segmentation(findings, case.volume, case.headers, case.identity, kind=kind)
    if made is None or (made.transfer_syntax_uid == RLELossless) != (kind == "seg-labelmap"):
        raise SystemExit(f"the node wrote no {kind}")
    if file is not None:
        with file.open("wb", buffering=2**20) as out:  # as the node's store writes it
            out.writelines(made.parts)
    return made.size


def highdicom(case: Case, findings: Findings, labels: NDArray[np.uint8], kind: str) -> int:
    """What highdicom does by default with a label map in memory."""
    from highdicom.seg import Segmentation

    from dicomnode.results import provenance
    from dicomnode.results.segmentation import _algorithm, _describe

    arguments = provenance.common_arguments(case.headers[0], case.identity, "SEG", manufacturer="m", model="m")
    arguments["series_instance_uid"] = "2.25.1"
    images = provenance.source_images(case.volume, case.headers)
    seg = Segmentation(
        source_images=images, pixel_array=labels, segmentation_type="LABELMAP" if kind == "seg-labelmap" else "BINARY",
        segment_descriptions=[
            _describe(finding, finding.number, _algorithm(findings, case.identity), case.identity) for finding in findings.findings
        ],
        sop_instance_uid="2.25.2",
        transfer_syntax_uid=RLELossless if kind == "seg-labelmap" else ExplicitVRLittleEndian, **arguments,
    )  # fmt: skip
    buffer = BytesIO()
    seg.save_as(buffer)
    return buffer.tell()


def packbits(findings: Findings) -> int:
    """Each frame that isn't empty, packed."""
    frame, total = np.zeros((SIDE, SIDE), dtype=np.bool_), 0
    for finding in findings.findings:
        _, r, c = finding.segment.origin
        _, high, wide = finding.segment.mask.shape
        for mask in finding.segment.mask[finding.segment.mask.any(axis=(1, 2))]:
            frame[r : r + high, c : c + wide] = mask
            total += len(np.packbits(frame.ravel(), bitorder="little"))
            frame[r : r + high, c : c + wide] = False
    return total


def packbits_kept(findings: Findings, file: Path | None = None) -> int:
    """Each frame that isn't empty, packed into its place in one buffer; and that into a file."""
    size = SIDE * SIDE // 8
    frames = [finding.segment.mask.any(axis=(1, 2)) for finding in findings.findings]
    data = np.empty(sum(int(each.sum()) for each in frames) * size, dtype=np.uint8)
    frame, at = np.zeros((SIDE, SIDE), dtype=np.bool_), 0
    for finding, filled in zip(findings.findings, frames, strict=True):
        _, r, c = finding.segment.origin
        _, high, wide = finding.segment.mask.shape
        for mask in finding.segment.mask[filled]:
            frame[r : r + high, c : c + wide] = mask
            data[at : at + size] = np.packbits(frame.ravel(), bitorder="little")
            frame[r : r + high, c : c + wide] = False
            at += size
    if file is not None:
        file.write_bytes(data.data)
    return at


class Dcmqi:
    """itkimage2segimage as a process, on files that are written beforehand."""

    def __init__(self, folder: Path, case: Case, findings: Findings, labels: NDArray[np.uint8]) -> None:
        import nrrd

        self.folder = folder
        images = folder / "images"
        images.mkdir()
        for k, header in enumerate(case.headers):
            image = Dataset()
            image.update(header)
            image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
            image.BitsAllocated = image.BitsStored = 8
            image.HighBit = 7
            image.add_new("PixelData", "OB", bytes(SIDE * SIDE))
            image.file_meta = header.file_meta
            image.save_as(images / f"{k:04}.dcm", enforce_file_format=True)
        directions = case.volume.affine[:3, [2, 1, 0]].T
        space = {"space": "left-posterior-superior", "space directions": directions, "space origin": case.volume.affine[:3, 3]}
        nrrd.write(str(folder / "labels.nrrd"), labels.transpose(2, 1, 0), {**space, "encoding": "raw"})
        code = {"CodeValue": "27925004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Nodule"}
        about = {"SegmentAlgorithmType": "AUTOMATIC", "SegmentAlgorithmName": "a", "SegmentedPropertyCategoryCodeSequence": code,
                 "SegmentedPropertyTypeCodeSequence": code, "recommendedDisplayRGBValue": [200, 0, 0]}  # fmt: skip
        segments = [[{"labelID": finding.number, "SegmentDescription": "s", **about} for finding in findings.findings]]
        content = {"ContentCreatorName": "c", "SeriesDescription": "s", "SeriesNumber": "300", "InstanceNumber": "1",
                   "BodyPartExamined": "", "segmentAttributes": segments}  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(content), encoding="utf-8")

    def __call__(self, kind: str) -> int:
        """Encode once."""
        out = self.folder / "out.dcm"
        command = [
            str(Path(sys.executable).parent / "itkimage2segimage"), "--inputImageList", str(self.folder / "labels.nrrd"),
            "--inputDICOMDirectory", str(self.folder / "images"), "--inputMetadata", str(self.folder / "meta.json"),
            "--outputDICOM", str(out), "--skip", "1", "--segmentationType", "labelmap" if kind == "seg-labelmap" else "binary",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not out.exists():
            raise SystemExit(f"itkimage2segimage: {(done.stderr or done.stdout)[-400:]}")
        return out.stat().st_size


def main() -> int:
    """Measure, print, and return the exit code."""
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 150)
    warnings.simplefilter("ignore")
    if options.peak:
        print(_peak(options.slices, *options.peak.split(",")))
        return 0
    rows: list[dict[str, Any]] = []
    gc.collect()
    gc.freeze()  # what was imported, as the node does
    for segments in options.segments:
        case, findings = study(options.slices, segments)
        labels = label_map(case, findings)
        for kind in ("seg-labelmap", "seg"):  # imports, and what is looked up at the first use, are no part of it
            small, few = study(8, 2)
            node(small, few, kind)
            highdicom(small, few, label_map(small, few), kind)
        with tempfile.TemporaryDirectory(prefix="seg-") as folder:
            has_dcmqi = (Path(sys.executable).parent / "itkimage2segimage").exists() and importlib.util.find_spec("nrrd") is not None
            dcmqi = Dcmqi(Path(folder), case, findings, labels) if has_dcmqi else None
            if dcmqi is None:
                console.print("left out: dcmqi, it is not installed")
            for kind in ("seg-labelmap", "seg"):
                encoders: dict[str, Encoder] = {"node": partial(node, case, findings, kind)}
                if kind == "seg":
                    file = Path(folder) / "written"
                    encoders["packbits"] = partial(packbits, findings)
                    encoders["packbits kept"] = partial(packbits_kept, findings)
                    encoders["node, written"] = partial(node, case, findings, kind, file)
                    encoders["packbits, written"] = partial(packbits_kept, findings, file)
                if kind == "seg-labelmap" or segments < 100:  # of BINARY with 100 segments the others take minutes
                    encoders["highdicom"] = partial(highdicom, case, findings, labels, kind)
                    if dcmqi is not None:
                        encoders["dcmqi"] = partial(dcmqi, kind)
                rows += _measured(encoders, kind, segments, options.rounds)
    peaks = {(kind, n): _peak_ratio(options.slices, kind, n) for kind in ("seg-labelmap", "seg") for n in options.segments}
    goals = _goals(rows, peaks)
    _print(rows, options, console)
    if options.out:
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        content = {"machine": machine, "slices": options.slices, "rounds": options.rounds, "rows": rows, "goals": goals}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for goal, result in goals.items():
        console.print(f"{'met   ' if result['met'] else 'MISSED'} {goal}: {result['measured']} of {result['goal']}", highlight=False)
    print(json.dumps(goals))
    return 0 if all(result["met"] for result in goals.values()) else 3


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every measurement to this file as JSON")
    parser.add_argument("--slices", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--segments", type=lambda text: [int(word) for word in text.split(",")], default=[10, 100])
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # KIND,SEGMENTS: the process of its own
    return parser.parse_args()


def _measured(encoders: dict[str, Encoder], kind: str, segments: int, rounds: int) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {
        name: {"encoder": name, "kind": kind, "segments": segments, "seconds": [], "cpu_seconds": [], "bytes": 0} for name in encoders
    }
    for number in range(rounds):
        names = list(encoders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()  # none pays for what another one left
            cpu, began = _cpu(), time.perf_counter()
            rows[name]["bytes"] = encoders[name]()
            rows[name]["seconds"].append(round(time.perf_counter() - began, 3))
            rows[name]["cpu_seconds"].append(round(_cpu() - cpu, 3))
    return list(rows.values())


def _cpu() -> float:
    """CPU seconds of this process and the children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak(slices: int, kind: str, segments: str) -> int:
    """Bytes by which encoding once raises this process's peak, the masks themselves left out."""
    case, findings = study(16, 1)
    node(case, findings, kind)  # what is imported at the first use is no part of it
    case, findings = study(slices, int(segments))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew; that of getrusage is the parent's at first
    before = _status("VmRSS")
    node(case, findings, kind)
    return (_status("VmHWM") - before) * 1024


def _status(name: str) -> int:
    """KiB of this process, as Linux says."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _peak_ratio(slices: int, kind: str, segments: int) -> float:
    command = [sys.executable, __file__, "--slices", str(slices), "--peak", f"{kind},{segments}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / (slices * SIDE * SIDE)


def _goals(rows: list[dict[str, Any]], peaks: dict[tuple[str, int], float]) -> dict[str, dict[str, object]]:
    goals: dict[str, dict[str, object]] = {}
    known = {(row["encoder"], row["kind"], row["segments"]): row for row in rows}

    def most(goal: str, measured: float, bound: float) -> None:
        goals[goal] = {"measured": round(measured, 3), "goal": bound, "met": measured <= bound}

    beside_of = {"node": (("packbits", 2.0), ("packbits kept", 2.0)), "node, written": (("packbits, written", 2.0),)}
    for (encoder, kind, segments), row in known.items():
        if encoder not in beside_of:
            continue
        for other, bound in (("highdicom", 0.5),) if kind == "seg-labelmap" else beside_of[encoder]:
            if (beside := known.get((other, kind, segments))) is not None:
                ratio = statistics.median(own / max(its, 0.001) for own, its in zip(row["cpu_seconds"], beside["cpu_seconds"], strict=True))
                most(f"{kind}, {segments} segments: CPU seconds of {encoder} by those of {other}", ratio, bound)
        if kind == "seg-labelmap":
            most(f"{kind}, {segments} segments: seconds", statistics.median(row["seconds"]), 0.5 if segments <= 10 else 1.0)
            if segments >= 100:
                most(f"{kind}, {segments} segments: MB", row["bytes"] / 1e6, 5.0)
    for (kind, segments), peak in peaks.items():
        most(f"{kind}, {segments} segments: peak memory by that of the mask", peak, 1.5)
    return goals


def _print(rows: list[dict[str, Any]], options: argparse.Namespace, console: Console) -> None:
    title = f"{options.slices} slices of 512x512, {options.rounds} rounds"
    table = Table("encoder", "kind", "segments", "seconds", "CPU seconds", "MB", title=title, title_justify="left")
    for row in rows:
        times = [f"{statistics.median(row[key]):.2f}" for key in ("seconds", "cpu_seconds")]
        table.add_row(row["encoder"], row["kind"], str(row["segments"]), *times, f"{row['bytes'] / 1e6:.1f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
