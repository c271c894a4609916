"""How fast the package at hand analyses a chest CT on the CPU: the backend that its check allows, against eager torch in fp32.

    python tests/benchmarks/inference.py [--out JSON] [--rounds R] [--threads N] [--quick] [--backend NAME]

Everything runs in this process, in alternating rounds, with the same windows, stitching and search for findings; a ratio is the
median of the rounds' ratios. "eager" is the network as MONAI builds it, in torch's own memory layout; "torch" is the node's torch
backend (weights and images channels-last). Times: the network alone (the calls of the backend), and the whole study from the volume
to its findings. Dice is that of all findings' voxels together with eager's. A machine that does anything else measures little.

Exit code 0, or 3 if a goal is missed. The last line is one JSON object {goal: {"measured", "goal", "met"}}.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # measure this tree, wherever the package may be installed from

import numpy as np  # noqa: E402  after the path is set, like the rest
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from dicomnode.analysis.backends import OPENVINO_BF16, TORCH, Backend, available, backend_for, choose  # noqa: E402
from dicomnode.analysis.inference import OwnModel, check_package, load_model  # noqa: E402
from dicomnode.analysis.package import digest_of  # noqa: E402
from dicomnode.findings import Findings, Volume  # noqa: E402
from dicomnode.phantoms.acquisition import scan  # noqa: E402
from dicomnode.phantoms.chest import chest_scene  # noqa: E402
from dicomnode.phantoms.studies import DEMO_PROTOCOL, ball_in_lung, check_volume, chest_grid, volume_of  # noqa: E402

PACKAGE = ROOT / "dicomnode" / "packages" / "lung-nodule-ct" / "0.2.0"
CPU = torch.device("cpu")
EAGER = "eager"
GOALS = {True: 4.5, False: 2.0}  # whether the CPU computes in bf16
LEAST_DICE = 0.998


@dataclass(frozen=True, kw_only=True)
class Eager:
    """The network as it is built: what a script that knows nothing better does."""

    network: torch.nn.Module
    name: str = "cpu fp32 torch, eager"
    device: torch.device = field(default_factory=lambda: CPU)
    windows: int = 1
    memory_bytes: int = 0

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Return what the network says."""
        with torch.inference_mode():
            result: torch.Tensor = self.network(windows)
        return result


@dataclass(kw_only=True)
class Timed:
    """A backend with a stopwatch."""

    backend: Backend
    seconds: float = 0.0

    def __getattr__(self, name: str) -> Any:
        """Whatever else the backend has."""
        return getattr(self.backend, name)

    def __call__(self, windows: torch.Tensor) -> Any:
        """Compute, and add the time."""
        started = time.perf_counter()
        try:
            return self.backend(windows)
        finally:
            self.seconds += time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Row:
    """All rounds of one backend."""

    name: str
    model: OwnModel
    whole: list[float] = field(default_factory=list)
    network: list[float] = field(default_factory=list)
    findings: list[Findings] = field(default_factory=list)


def main() -> int:
    """Measure, print, and return the exit code."""
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 150)
    torch.set_num_threads(options.threads)
    report = check_package(PACKAGE, {"image": check_volume()}, device="cpu")
    for name, row in report["backends"].items():
        console.print(f"check: {name}: {row}", highlight=False)
    chosen = options.backend or choose(report, "auto", CPU)
    started = time.perf_counter()
    model = load_model(PACKAGE, digest=digest_of(PACKAGE), device="cpu", threads=options.threads)
    loading = time.perf_counter() - started
    assert isinstance(model, OwnModel)
    rows = _rows(model, chosen, options.threads)
    volume = chest(options.quick)
    console.print(
        f"volume {volume.voxels.shape}, spacing {volume.spacing_mm}, {options.threads} threads; chosen: {chosen}", highlight=False
    )
    first = {row.name: _measure(row, volume) for row in rows}  # a first study compiles, and is no round
    for row in rows:
        for kept in (row.whole, row.network, row.findings):
            kept.clear()
    for number in range(options.rounds):
        for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
            _measure(row, volume)
    goals = _goals(rows, chosen)
    warm = {row.name: round(loading + first[row.name] - statistics.median(row.whole), 2) for row in rows}
    _print(rows, warm, console)
    if options.out:
        _write(options.out, options, rows, {"warm_seconds_saved": warm, "check": report["backends"], "chosen": chosen, "goals": goals})
    for goal, result in goals.items():
        console.print(f"{'met   ' if result['met'] else 'MISSED'} {goal}: {result['measured']} of {result['goal']}", highlight=False)
    print(json.dumps(goals))
    return 0 if all(result["met"] for result in goals.values()) else 3


def chest(quick: bool) -> Volume:
    """A chest with ten nodules of 9 to 27 mm, 48 slices of it; with `quick` 16."""
    scene = chest_scene(7)
    nodules = tuple(ball_in_lung(scene, diameter_mm=9.0 + 2 * i, right=i % 2 == 0, seed=i) for i in range(10))
    grid = chest_grid(scene, pixel_mm=1.2, slice_mm=3.0, pixels=320, slices=16 if quick else 48)
    return volume_of(scan(scene.with_nodules(nodules), grid, DEMO_PROTOCOL), grid, "benchmark")


def dice(first: Findings, second: Findings, shape: tuple[int, ...]) -> float:
    """Return the Dice of all findings' voxels; 1 if neither has any."""
    masks = []
    for findings in (first, second):
        mask = np.zeros(shape, dtype=np.bool_)
        for finding in findings.findings:
            box = tuple(slice(o, o + n) for o, n in zip(finding.segment.origin, finding.segment.mask.shape, strict=True))
            mask[box] |= finding.segment.mask
        masks.append(mask)
    voxels = int(masks[0].sum()) + int(masks[1].sum())
    return 2 * int((masks[0] & masks[1]).sum()) / voxels if voxels else 1.0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every measurement to this file as JSON")
    parser.add_argument("--rounds", type=int, help="rounds, 5")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, 2")
    parser.add_argument("--backend", choices=available(CPU), help="measure this one, whatever the check says")
    parser.add_argument("--quick", action="store_true", help="16 slices and one round unless told otherwise: to see that it runs")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def _rows(model: OwnModel, chosen: str, threads: int) -> list[Row]:
    plain = copy.deepcopy(model.network)
    for parameter in plain.parameters():
        parameter.data = parameter.data.contiguous()
    backends: dict[str, Backend] = {EAGER: Eager(network=plain)}
    for name in dict.fromkeys((TORCH, chosen)):
        backends[name] = backend_for(model.network, name, device=CPU, threads=threads)
    return [Row(name=name, model=replace(model, backend=Timed(backend=backend))) for name, backend in backends.items()]


def _measure(row: Row, volume: Volume) -> float:
    timed = row.model.backend
    assert isinstance(timed, Timed)
    timed.seconds = 0.0
    started = time.perf_counter()
    findings = row.model({"image": volume})
    row.whole.append(time.perf_counter() - started)
    row.network.append(timed.seconds)
    row.findings.append(findings)
    return row.whole[-1]


def _ratio(eager: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(eager, other, strict=True))


def _goals(rows: Sequence[Row], chosen: str) -> dict[str, dict[str, object]]:
    found = {row.name: row for row in rows}
    eager, mine = found[EAGER], found[chosen]
    goal = GOALS[OPENVINO_BF16 in available(CPU)]
    ratio = round(_ratio(eager.network, mine.network), 2)
    agreement = _dice(eager, mine)
    same = len(eager.findings[0].findings) == len(mine.findings[0].findings)
    return {
        f"{chosen}: network alone, ratio to eager fp32 torch": {"measured": ratio, "goal": goal, "met": ratio >= goal},
        f"{chosen}: Dice with the findings of eager fp32 torch": {
            "measured": agreement, "goal": LEAST_DICE, "met": agreement >= LEAST_DICE and same,
        },
    }  # fmt: skip


def _dice(eager: Row, mine: Row) -> float:
    findings = eager.findings[0]
    shape = np.max([np.add(f.segment.origin, f.segment.mask.shape) for one in (eager, mine) for f in one.findings[0].findings], axis=0)
    return round(dice(findings, mine.findings[0], tuple(shape + 1)), 5)


def _print(rows: Sequence[Row], warm: dict[str, float], console: Console) -> None:
    table = Table(title="one chest CT, volume to findings, seconds (medians)", title_justify="left")
    columns = ("backend", "network", "whole", "eager / this: network", "whole", "not the network", "findings", "Dice", "second study saves")
    for column in columns:
        table.add_column(column, justify="left" if column == "backend" else "right")
    eager = rows[0]
    for row in rows:
        share = statistics.median(1 - network / whole for network, whole in zip(row.network, row.whole, strict=True))
        table.add_row(
            row.name, f"{statistics.median(row.network):.2f}", f"{statistics.median(row.whole):.2f}",
            f"{_ratio(eager.network, row.network):.2f}", f"{_ratio(eager.whole, row.whole):.2f}", f"{share:.0%}",
            str(len(row.findings[0].findings)), f"{_dice(eager, row):.5f}", f"{warm[row.name]:.2f}",
        )  # fmt: skip
    console.print(table)


def _write(file: Path, options: argparse.Namespace, rows: Sequence[Row], more: dict[str, Any]) -> None:
    content = {
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": [
            {
                "backend": row.name, "device": row.findings[0].device, "network_seconds": row.network, "whole_seconds": row.whole,
                "findings": len(row.findings[0].findings), "dice": _dice(rows[0], row),
            }
            for row in rows
        ],
        **more,
    }  # fmt: skip
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
