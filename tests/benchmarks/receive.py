"""How fast images are received, measured against other receivers in the same run, on the same disk, alternating.

    python tests/benchmarks/receive.py [--out JSON] [--images N] [--rounds R] [--quick] [--folder DIR] [--receivers NAME,…]

The receivers run all the time, and one at a time is sent to; in every round each is measured in every case. A rate is the
median over the rounds, a ratio the median of the rounds' ratios. The clock runs from the first connection to the end of the
last association. The sender has TCP_NODELAY set and its PDUs encoded beforehand. Every acknowledged image is compared byte for
byte with its source, and what is dirty is written before the next measurement. 240 images take 3 GB of disk a round until the
end. On a machine that does anything else the ratios mean little: syncing waits for the CPU, and shares the disk's journal.

Exit code 0, or 3 if a goal is missed. The last line is one JSON object {goal: {"measured", "goal", "met"}}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # measure this tree, wherever the package may be installed from

import pytest  # noqa: E402  after the path is set, like the rest
from receivers import RECEIVERS, Altered, Receiver  # noqa: E402
from replay import CtScanner, Image, Sent, send, send_raw  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from pacs import tail  # noqa: E402

CASES = {"1 association": 1, "4 associations": 4, "16 associations": 16, "one image per association": None}
ONE_BY_ONE = "one image per association"

# Goals as least ratios in the same run: (case, receiver, ratio).
GOALS = (
    ("1 association", "pynetdicom save_as", 4.0),
    ("16 associations", "pynetdicom save_as", 6.0),
    ("1 association", "Orthanc", 2.5),
    ("4 associations", "Orthanc", 1.5),
    ("16 associations", "Orthanc", 1.5),
    ("1 association", "limit", 0.6),
    (ONE_BY_ONE, "Orthanc", 1.0),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """All measurements of one receiver in one case with one setting of both ends."""

    receiver: Receiver
    case: str
    quickack: bool  # of the sender
    rounds: list[Sent] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Images per second in each round."""
        return [sent.images / sent.seconds for sent in self.rounds]

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    def percentile(self, percent: int) -> float:
        """Milliseconds from an image's first byte to the end of its response, over all rounds."""
        every = sorted(time for sent in self.rounds for time in sent.milliseconds)
        return every[min(len(every) - 1, len(every) * percent // 100)]

    def as_json(self) -> dict[str, object]:
        """The row for a file."""
        return {
            "receiver": self.receiver.name,
            "promises": self.receiver.promises,
            "receiver_tcp_nodelay": self.receiver.nodelay,
            "sender_tcp_nodelay": True,
            "sender_tcp_quickack": self.quickack,
            "case": self.case,
            "images_per_second": round(self.rate, 1),
            "rounds": [round(rate, 1) for rate in self.rates],
            "p50_ms": round(self.percentile(50), 2),
            "p99_ms": round(self.percentile(99), 2),
            "images_compared_byte_for_byte": sum(sent.images for sent in self.rounds),
        }


def main() -> int:
    """Measure, print, and return the exit code."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the receivers end too
    console = Console(width=None if sys.stdout.isatty() else 150)
    scanner = CtScanner()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="receive-", dir=options.folder)))
        receivers = _start(options.receivers, folder, stack, console)
        for receiver in receivers:
            _measure(Row(receiver=receiver, case="1 association", quickack=False), scanner, 8)
        rows = _rows(receivers)
        few = max(4, options.images // 10)
        for number in range(options.rounds):
            for row in _turned(rows, number):
                _measure(row, scanner, options.images // 4 if row.case == ONE_BY_ONE else options.images)
        settings = _settings_rows(receivers)
        for number in range(min(options.rounds, 3)):
            for row in _turned(settings, number):
                _measure(row, scanner, few)
    goals = _goals(rows)
    _print_rates(rows, console)
    _print_settings(settings, console)
    if options.out:
        _write(options.out, options, rows + settings, goals)
    for goal, result in goals.items():
        console.print(f"{'met   ' if result['met'] else 'MISSED'} {goal}: {result['measured']} of {result['goal']}", highlight=False)
    print(json.dumps(goals))
    return 0 if all(result["met"] for result in goals.values()) else 3


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every measurement to this file as JSON")
    parser.add_argument("--images", type=int, help="images a measurement, 240; a quarter of them one image per association")
    parser.add_argument("--rounds", type=int, help="rounds, 5")
    parser.add_argument("--quick", action="store_true", help="48 images and one round unless told otherwise: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="a folder on a disk (no tmpfs) for everything received")
    parser.add_argument("--receivers", type=lambda text: text.split(","), default=list(RECEIVERS), help=", ".join(RECEIVERS))
    options = parser.parse_args()
    options.images = options.images or (48 if options.quick else 240)
    options.rounds = options.rounds or (1 if options.quick else 5)
    unknown = set(options.receivers) - set(RECEIVERS)
    if unknown:
        parser.error(f"no receiver is called {', '.join(sorted(unknown))}")
    return options


def _start(names: Sequence[str], folder: Path, stack: ExitStack, console: Console) -> list[Receiver]:
    """Start the receivers; name those whose program is absent and leave them out."""
    receivers = []
    for name in names:
        for number, start in enumerate(RECEIVERS[name]):
            own = folder / f"{name}-{number}"
            own.mkdir()
            try:
                receivers.append(stack.enter_context(start(own)))
            except pytest.skip.Exception as absent:
                console.print(f"left out: {absent}")
    return receivers


def _rows(receivers: Sequence[Receiver]) -> list[Row]:
    """The measurements that the goals speak of: no Nagle at either end, case by case."""
    rows = [Row(receiver=receiver, case=case, quickack=False) for case in CASES for receiver in receivers]
    return [row for row in rows if _is_quick(row.receiver) and (row.receiver.called or CASES[row.case] == 1)]


def _settings_rows(receivers: Sequence[Receiver]) -> list[Row]:
    """The measurements that show what the settings of both ends do, over few images: some are very slow."""
    dicom = [receiver for receiver in receivers if receiver.called]
    return [
        Row(receiver=receiver, case=case, quickack=quickack)
        for case in ("1 association", ONE_BY_ONE)
        for quickack in (False, True)
        for receiver in dicom
    ]


def _is_quick(receiver: Receiver) -> bool:
    """Whether it has TCP_NODELAY, or doesn't need it."""
    return receiver.nodelay or receiver.name == "pynetdicom save_as"


def _turned(rows: list[Row], number: int) -> list[Row]:
    """The rows, case by case, with another receiver first in every round."""
    cases: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.quickack), []).append(row)
    return [row for case in cases.values() for row in case[number % len(case) :] + case[: number % len(case)]]


def _measure(row: Row, scanner: CtScanner, count: int) -> None:
    associations = CASES[row.case]
    if associations is None:
        (study,) = scanner.studies(1, count)
        groups = [[image] for image in study]
    else:
        groups = scanner.studies(associations, max(1, count // associations))
    images: list[Image] = [image for group in groups for image in group]
    os.sync()
    try:
        if row.receiver.called is None:
            sent = send_raw(row.receiver.port, images, quickack=row.quickack)
        else:
            sent = send(row.receiver.port, row.receiver.called, groups, at_once=associations is not None, quickack=row.quickack)
        row.receiver.check(images)
    except (OSError, EOFError, Altered) as error:
        error.add_note(f"by {row.receiver.name}, {row.case}; the end of its log:\n{tail(row.receiver.log)}")
        raise
    row.rounds.append(sent)


def _goals(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Judge the one configuration of the node that meets most goals: an installer sets one for all cases."""
    judged = []
    for name in dict.fromkeys(row.receiver.name for row in rows if row.receiver.name.startswith("node")):
        goals: dict[str, dict[str, object]] = {}
        for case, other, least in GOALS:
            ratio = _ratio(rows, case, name, other)
            if ratio is not None:
                goals[f"{name}: {case}, ratio to {other}"] = {"measured": round(ratio, 2), "goal": least, "met": ratio >= least}
        judged.append(goals)
    return max(judged, key=lambda goals: sum(bool(goal["met"]) for goal in goals.values()), default={})


def _ratio(rows: Sequence[Row], case: str, name: str, other: str) -> float | None:
    """The median of the rounds' ratios of two receivers, or None if one was not measured."""
    found = {row.receiver.name: row for row in rows if row.case == case}
    if name not in found or other not in found:
        return None
    return statistics.median(a / b for a, b in zip(found[name].rates, found[other].rates, strict=True))


def _print_rates(rows: Sequence[Row], console: Console) -> None:
    nodes = list(dict.fromkeys(row.receiver.name for row in rows if row.receiver.name.startswith("node")))
    title = "images/s, CT of 512x512; both ends with TCP_NODELAY (pynetdicom: needs none), sender without TCP_QUICKACK"
    table = Table(title=title, title_justify="left")
    for column in ("case", "receiver", "images/s", "p50 ms", "p99 ms", *(f"{name} / this" for name in nodes)):
        table.add_column(column, justify="left" if column in {"case", "receiver"} else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ratios = [_ratio(rows, row.case, name, row.receiver.name) for name in nodes]
        texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        times = (f"{row.percentile(50):.1f}", f"{row.percentile(99):.1f}")
        table.add_row(
            row.case, row.receiver.name, f"{row.rate:.0f}", *times, *texts, end_section=following is None or following.case != row.case
        )
    console.print(table)
    for name, promises in {row.receiver.name: row.receiver.promises for row in rows}.items():
        console.print(f"{name}: {promises}", highlight=False)


def _print_settings(rows: Sequence[Row], console: Console) -> None:
    title = "images/s with other settings of both ends, few images; the sender has TCP_NODELAY always"
    table = Table(title=title, title_justify="left")
    for column in ("receiver", "its TCP_NODELAY", "sender's TCP_QUICKACK", "1 association", "p50 ms", ONE_BY_ONE, "p50 ms"):
        table.add_column(column, justify="left" if column == "receiver" else "right")
    cells: dict[tuple[str, bool, bool], list[str]] = {}
    for row in rows:
        key = (row.receiver.name, row.receiver.nodelay, row.quickack)
        cells.setdefault(key, []).extend([f"{row.rate:.0f}", f"{row.percentile(50):.1f}"])
    for (name, nodelay, quickack), texts in cells.items():
        table.add_row(name, "set" if nodelay else "stock", "set" if quickack else "stock", *texts)
    console.print(table)


def _write(file: Path, options: argparse.Namespace, rows: Sequence[Row], goals: dict[str, dict[str, object]]) -> None:
    content = {
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "images": options.images,
        "rounds": options.rounds,
        "rows": [row.as_json() for row in rows],
        "goals": goals,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
